"""Model folders as other tools leave them: tokens without rows, ties, shards, formats side by side, tensors nobody
needs. What is right is transformers' own answer where it has one.

    .venv/bin/python -m pytest tests/test_odd_models.py
"""

import codecs
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_model
from safetensors.torch import load_file, save_file
from support.gguf_files import write_gguf, written
from support.pipeline_runs import call, refusal
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

import llama_3_inference as inference
from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import TINY_LLAMA_DIR, find_checkpoint
from llama_3.generation import encode_text, generate
from llama_3.loading import read_params
from llama_3.model import Intervention
from llama_3.tokenizer import read_ranks
from pipeline.errors import InputError

TINY = Path(TINY_LLAMA_DIR)
CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_act="silu",
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=320,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
)


def weights(vocab_size: int) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    some = lambda *shape: torch.randn(*shape, generator=make) * 0.3
    state = {"model.embed_tokens.weight": some(vocab_size, 32), "lm_head.weight": some(vocab_size, 32)}
    state["model.norm.weight"] = 1 + some(32)
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32)}
        shapes |= {"self_attn.o_proj": (32, 32), "mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32)}
        shapes |= {"mlp.down_proj": (32, 64)}
        state |= {f"{layer}{name}.weight": some(*shape) for name, shape in shapes.items()}
        state |= {f"{layer}{name}.weight": 1 + some(32) for name in ("input_layernorm", "post_attention_layernorm")}
    return state


def write(folder: Path, template: str | None = "<s> $A", added=(), without=(), extra=None, **changes) -> Path:
    """A Hugging Face folder with a byte-level tokenizer of 256 bytes.

    template: what the tokenizer puts around a text. added: tokens that are not special. without, extra: tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | changes
    (folder / "config.json").write_text(json.dumps(config))
    state = weights(config["vocab_size"]) | (extra or {})
    save_file({k: v for k, v in state.items() if k not in without}, folder / "model.safetensors", {"format": "pt"})
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in added])
    if template:
        ends = [("<s>", 0), ("</s>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def check_logits(folder: Path) -> None:
    """Those of transformers."""
    from transformers import LlamaForCausalLM

    tokens = torch.arange(2, 40)[None]
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
    for packed in (False, True):
        torch.testing.assert_close(load_model(str(folder), packed=packed)(tokens), expected, atol=1e-4, rtol=1e-4)


def complete(capsys, folder: Path, prompt: str = "Hello") -> str:
    """What the terminal prints, standard error at its end."""
    capsys.readouterr()
    call(inference, llama_model_dir=folder, max_new_tokens=3, temperature=0, prompts=[prompt])
    printed = capsys.readouterr()
    assert "clean" in printed.out
    return printed.out + printed.err


def refused(capsys, folder: Path) -> str:
    return refusal(capsys, inference, llama_model_dir=folder, max_new_tokens=3, temperature=0, prompts=["Hello"])


# ---- begin-of-text


@pytest.mark.parametrize(
    ("template", "bos_id", "begins"),
    [
        ("<s> $A", 0, [0]),
        ("<s> $A </s>", 0, [0]),
        ("$A </s>", 0, []),
        ("$A", 0, []),
        (None, 0, []),
    ],
)
def test_begin_of_text_is_what_stands_before_a_text(tmp_path, template, bos_id, begins):
    tokenizer = load_tokenizer(str(write(tmp_path, template)))
    assert (tokenizer.bos_id, tokenizer.starts_with_bos) == (bos_id, bool(begins))
    assert encode_text(tokenizer, "Hi") == [*begins, 41, 74]


def test_more_than_one_token_before_a_text_is_said(tmp_path, capsys):
    assert encode_text(load_tokenizer(str(write(tmp_path, "<s> </s> $A"))), "Hi") == [0, 41, 74]
    assert "puts 2 tokens before a text; only the first, <s>" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [dict(bos_token_id=[0]), dict(bos_token_id="<s>"), dict(eos_token_id=["</s>"])])
def test_ends_that_are_no_numbers_are_refused(tmp_path, capsys, changes):
    assert "write the token's number, or null, there" in refused(capsys, write(tmp_path, None, **changes))


def test_add_bos_token_without_a_template_is_said(tmp_path, capsys):
    write(tmp_path, None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "<s>"}))
    assert encode_text(load_tokenizer(str(tmp_path)), "Hi") == [41, 74]  # as transformers 5.23
    assert "says add_bos_token, but tokenizer.json puts no begin-of-text" in capsys.readouterr().err


def test_a_gguf_file_without_begin_of_text_begins_without(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", TINY, weights=False, **{"tokenizer.ggml.bos_token_id": None})
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.bos_id is None and not tokenizer.starts_with_bos
    with pytest.raises(InputError, match="cannot begin without a prompt"):
        encode_text(tokenizer, "")


def test_steering_without_begin_of_text_skips_nothing(tmp_path):
    """As the README writes it: skip_tokens=(tokenizer.bos_id,)."""
    folder = str(write(tmp_path, None, bos_token_id=None))
    model, bos_id = load_model(folder), load_tokenizer(folder).bos_id
    tokens = torch.arange(2, 9)[None]
    with model.intervene("layers.0.resid_pre", torch.zeros_like, skip_tokens=(bos_id,)):
        assert bos_id is None and not model.activations(tokens, "layers.0.resid_pre").any()


# ---- added tokens and rows


@pytest.mark.parametrize("token", ["good morning", "<｜fim▁hole｜>", "café", "Ġa", "再"])
def test_added_tokens_are_their_own_text(tmp_path, token):
    tokenizer = load_tokenizer(str(write(tmp_path, added=[token])))
    ids = tokenizer.encode(f"x{token}y")
    assert 258 in ids and tokenizer.token_bytes(258) == token.encode()
    assert tokenizer.decode([258]) == token
    assert b"".join(map(tokenizer.token_bytes, ids)) == f"x{token}y".encode()


@pytest.mark.slow
def test_a_vocabulary_may_be_padded_as_much_as_it_likes(tmp_path, capsys):
    check_logits(write(tmp_path, vocab_size=1400))
    assert "has 258 tokens, its model rows for 1400" in complete(capsys, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.decode([41, 1399, 74]) == "Hi"


def test_metas_folder_may_be_padded_too(tmp_path, capsys):
    params = json.loads((write_tiny_model(tmp_path, vocab_size=4000) / "params.json").read_text())
    tokenizer = load_tokenizer(str(tmp_path))
    assert f"its model rows for {params['vocab_size']}" in capsys.readouterr().err
    assert tokenizer.decode([*tokenizer.encode("a"), 3999]) == "a"


def test_an_added_token_beyond_the_rows_is_plain_text(tmp_path, capsys):
    check_logits(write(tmp_path, vocab_size=258, added=["[PAD]"]))
    said = complete(capsys, tmp_path, "before [PAD] behind")
    assert "tokens that the model has no row for ([PAD])" in said
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.vocab_size == 258 and tokenizer.decode(tokenizer.encode("[PAD]")) == "[PAD]"
    assert max(tokenizer.encode("[PAD]")) < 258


def test_begin_of_text_beyond_the_rows_is_refused(tmp_path, capsys):
    assert "has begin-of-text 320, its model 320 tokens" in refused(capsys, write(tmp_path, None, bos_token_id=320))


def test_rows_of_a_gguf_file_without_a_token_give_no_text(tmp_path, capsys):
    """llama.cpp's converter names them [PAD123]."""
    tokens = _tokens_of(TINY)
    types = [1] * (len(tokens) - 256) + [3] * 256
    names = {"tokenizer.ggml.tokens": [*tokens, f"[PAD{len(tokens)}]"], "tokenizer.ggml.token_type": [*types, 5]}
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "m.gguf", TINY, weights=False, **names)))
    assert tokenizer.decode([*tokenizer.encode("a"), len(tokens)]) == "a"
    beyond = {"tokenizer.ggml.tokens": [*tokens, "[PAD]"], "tokenizer.ggml.token_type": [*types, 4]}
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "n.gguf", TINY, **beyond)))
    assert max(tokenizer.encode("[PAD]")) < len(tokens)
    assert "no row for ([PAD])" in capsys.readouterr().err


def _tokens_of(folder: Path) -> list[str]:
    ranks = read_ranks(str(folder / "tokenizer.model"))
    special = load_tokenizer(str(folder)).special_tokens
    return [*(written(token) for token in sorted(ranks, key=ranks.__getitem__)), *sorted(special, key=special.get)]


# ---- ties


def test_a_head_of_its_own_counts_although_config_ties(tmp_path, capsys):
    check_logits(write(tmp_path, tie_word_embeddings=True))
    assert "holds a lm_head.weight of its own, which is used" in capsys.readouterr().err
    state = load_file(tmp_path / "model.safetensors")
    assert torch.equal(load_model(str(tmp_path)).output.weight, state["lm_head.weight"])


def test_a_tied_model_may_be_stored_under_either_name_or_both(tmp_path):
    check_logits(write(tmp_path / "head", tie_word_embeddings=True, without=["model.embed_tokens.weight"]))
    check_logits(write(tmp_path / "embedding", tie_word_embeddings=True, without=["lm_head.weight"]))
    same = {"lm_head.weight": weights(320)["model.embed_tokens.weight"]}
    check_logits(write(tmp_path / "both", tie_word_embeddings=True, extra=same))
    for name in ("head", "embedding", "both"):
        model = load_model(str(tmp_path / name))
        assert model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()


@pytest.mark.parametrize(("tensor", "fix"), [("lm_head", "tie_word_embeddings"), ("model.embed_tokens", "fetch both")])
def test_a_missing_tensor_has_the_files_name(tmp_path, capsys, tensor, fix):
    said = refused(capsys, write(tmp_path, without=[f"{tensor}.weight"]))
    assert f"lacks the tensor {tensor}.weight" in said and fix in said


# ---- RoPE and other parameters

LLAMA_3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LLAMA_3},
        {"rope_scaling": LLAMA_3, "max_position_embeddings": "drop"},
        {"rope_scaling": LLAMA_3, "original_max_position_embeddings": 64},
        {"rope_parameters": LLAMA_3 | {"rope_theta": 50000.0}},
        {"rope_scaling": LLAMA_3 | {"original_max_position_embeddings": 128}},
        {"rope_scaling": None},
        {"hidden_act": "swish"},
    ],
)
def test_parameters_are_read_as_transformers_reads_them(tmp_path, changes):
    write(tmp_path)
    config = {name: value for name, value in (CONFIG | changes).items() if value != "drop"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_logits(tmp_path)


REFUSED = {
    "attention_bias": (dict(attention_bias=True), "attention_bias true, which is not supported here; Llama 3.x,"),
    "yarn": (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), 'rope_type "yarn", which is not supported here'),
    "dynamic": (dict(rope_scaling=dict(type="dynamic", factor=2.0)), 'rope_type "dynamic", which is not supported'),
    "mistral": (dict(model_type="mistral"), 'model_type "mistral", which is not supported here'),
    "gelu": (dict(hidden_act="gelu"), 'hidden_act "gelu", which is not supported here'),
    "eps null": (dict(rms_norm_eps=None), "rms_norm_eps is null; write a positive number there"),
    "eps text": (dict(rms_norm_eps="1e-05"), 'rms_norm_eps is "1e-05"; write a positive number there'),
    "eps nan": (dict(rms_norm_eps=float("nan")), "rms_norm_eps is NaN; write a positive number"),
    "theta": (dict(rope_theta=-1), "rope_theta is -1; write a positive number there"),
    "context": (dict(max_position_embeddings=None), "max_position_embeddings is null; write a positive whole number"),
    "layers": (dict(num_hidden_layers=2.5), "num_hidden_layers is 2.5; write a positive whole number"),
    "heads": (dict(num_key_value_heads=3), "4 heads of 8 numbers, 3 for keys"),
    "llama3 alone": (dict(rope_scaling=dict(type="llama3", factor=8)), "without low_freq_factor and high_freq_factor"),
    "linear alone": (dict(rope_scaling=dict(type="linear")), "without factor"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_said_with_a_fix_that_fixes(tmp_path, capsys, kind):
    changes, sentence = REFUSED[kind]
    said = refused(capsys, write(tmp_path, **changes))
    assert sentence in said and "fetch it again" not in said and "Error(" not in said


def test_llama_2_in_metas_format_is_named(tmp_path, capsys):
    params = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert "Llama 2 (vocab_size is -1)" in refused(capsys, tmp_path)


def test_a_gguf_files_scaling_is_linear_unless_it_says_otherwise(tmp_path, tiny_model_dir):
    """As in llama.cpp: the older key counts, and 0 means none."""
    for metadata, factor in [
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 2.0}, 2.0),
        ({"llama.rope.scaling.type": "linear"}, 1.0),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, 1.0),
    ]:
        path = write_gguf(tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", tiny_model_dir, **metadata)
        assert read_params(str(path)).rope_scaling_factor == factor


# ---- files


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path):
    config = write(tmp_path) / "config.json"
    expected = read_params(str(tmp_path))
    config.write_bytes(codecs.BOM_UTF8 + config.read_bytes())
    assert read_params(str(tmp_path)) == expected


def test_a_lost_shard_is_named_without_an_index(tmp_path, capsys):
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    assert "There is no model-00002-of-00002.safetensors in" in refused(capsys, tmp_path)


def test_a_lost_part_of_a_gguf_file_is_named(tmp_path):
    names = [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    path = write_gguf(tmp_path / names[0], TINY, weights=False)
    shutil.copy(path, tmp_path / names[2])
    for given in (tmp_path, path):
        with pytest.raises(InputError, match=rf"There is no {names[1]} in"):
            load_model(str(given))
    shutil.copy(path, tmp_path / names[1])
    with pytest.raises(InputError, match="join the parts with llama-gguf-split --merge"):
        load_model(str(tmp_path))


def test_of_two_formats_the_whole_one_is_read(tmp_path, tiny_model_dir):
    params = (tiny_model_dir / "params.json").read_text()
    hugging_face = write(tmp_path / "a")
    (hugging_face / "params.json").write_text(params)
    assert find_checkpoint(str(hugging_face)).format == "hugging face"
    assert load_model(str(hugging_face)).args.vocab_size == 320
    assert load_tokenizer(str(hugging_face)).vocab_size == 258

    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        shutil.copy(tiny_model_dir / "consolidated.00.pth", hugging_face / name)
    assert find_checkpoint(str(hugging_face)).format == "hugging face"  # the other is split for several GPUs

    meta = shutil.copytree(tiny_model_dir, tmp_path / "b")
    shutil.copy(hugging_face / "config.json", meta)
    (meta / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-2.safetensors"}}')
    assert find_checkpoint(str(meta)).format == "meta" and load_model(str(meta)).args.dim == 36
    assert load_tokenizer(str(meta)).vocab_size == load_tokenizer(str(tiny_model_dir)).vocab_size

    original = shutil.copytree(hugging_face, tmp_path / "c")
    (original / "params.json").unlink()
    (original / "model.safetensors").unlink()
    shutil.copytree(tiny_model_dir, original / "original")
    assert find_checkpoint(str(original)).folder.endswith("original")

    gguf = tmp_path / "d"
    gguf.mkdir()
    write_gguf(gguf / "m.gguf", tiny_model_dir)
    shutil.copy(hugging_face / "config.json", gguf)
    assert find_checkpoint(str(gguf)).format == "gguf" and load_model(str(gguf)).args.dim == 36
    assert load_tokenizer(str(gguf)).encode("hello") == load_tokenizer(str(tiny_model_dir)).encode("hello")


@pytest.mark.parametrize("version", [1, 4])
def test_gguf_of_another_version_is_not_called_damaged(tmp_path, tiny_model_dir, version):
    path = write_gguf(tmp_path / "m.gguf", tiny_model_dir)
    data = path.read_bytes()
    path.write_bytes(data[:4] + version.to_bytes(4, "little") + data[8:])
    with pytest.raises(InputError, match=f"is in version {version} of GGUF; 2 and 3 are read here"):
        load_model(str(path))


def test_weights_of_pickles_are_named(tmp_path, capsys):
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pytorch_model*.bin, which are not read here" in refused(capsys, tmp_path)


def test_a_pointer_in_place_of_a_gguf_file_or_tokenizer_is_named(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
    (tmp_path / "m.gguf").write_text(pointer)
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match=r"m\.gguf is a Git LFS pointer"):
            load(str(tmp_path / "m.gguf"))
    (write(tmp_path / "hf") / "tokenizer.json").write_text(pointer)
    with pytest.raises(InputError, match=r"tokenizer\.json is a Git LFS pointer"):
        load_tokenizer(str(tmp_path / "hf"))


# ---- tensors nobody needs

LAYER = "model.layers.0.self_attn."


@pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"])
def test_rotary_tables_are_ignored(tmp_path, name):
    check_logits(write(tmp_path, extra={LAYER + name: torch.ones(4)}))


@pytest.mark.parametrize("name", ["k_scale", "k_proj.v_scale", "q_proj.bias"])
def test_what_changes_nothing_is_said(tmp_path, capsys, name):
    said = complete(capsys, write(tmp_path, extra={LAYER + name: torch.zeros(32)}))
    assert f"({LAYER}{name}), which" in said
    check_logits(tmp_path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("q_proj.bias", "a bias, and biases are not supported here"),
        ("q_proj.weight_scale", "part of quantised weights; fetch the model in bfloat16"),
        ("q_proj.lora_A.weight", "part of an adapter; merge it"),
        ("strange", "unknown to this model"),
    ],
)
def test_other_tensors_are_named_for_what_they_are(tmp_path, capsys, name, what):
    assert f"{name}, {what}" in refused(capsys, write(tmp_path, extra={LAYER + name: torch.ones(32)}))


# ---- NaN


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_gives_no_numbers_is_refused(tmp_path, capsys, value):
    name = "model.layers.1.mlp.down_proj.weight"
    broken = weights(320)[name]
    broken[0] = value
    said = refused(capsys, write(tmp_path, extra={name: broken}))
    assert "The model computes logits that are NaN, infinite or all equal; check the checkpoint" in said


@pytest.mark.parametrize("factor", [1e20, 1e300])
def test_steering_that_overflows_is_refused(tiny_model_dir, factor):
    overflowing = Intervention("layers.1.resid_post", lambda x: x * factor)
    with pytest.raises(InputError, match="The steered model computes logits that are NaN.*lower the strength"):
        list(generate(load_model(tiny_model_dir), [[1, 2, 3]], 2, stop_tokens=[], steering=overflowing))


def test_a_temperature_too_small_to_divide_by_is_refused(capsys, tiny_model_dir):
    options = {"llama_model_dir": tiny_model_dir, "max_new_tokens": 2, "prompts": ["the"], "temperature": "1e-310"}
    said = refusal(capsys, inference, **options)
    assert "A temperature of 1e-310 cannot be used; write 0" in said
