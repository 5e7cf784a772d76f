"""Hugging Face folders as transformers writes them, against transformers; and the loader's errors for broken ones.

The models are random, scaled-down shapes of every family that should load. Also here: Meta folders inside `original/`,
how much private memory loading takes, and tokenizers that do not fit.

    .venv/bin/python -m pytest tests/test_llama_folders.py
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT_DIR, TINY_VOCAB_SIZE, write_tiny_model
from safetensors.torch import load_file, save_file
from support.gguf_files import write_gguf
from support.pipeline_runs import refusal
from test_llama import close, hf_run

import llama_3_inference as inference
from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import checkpoint_identity
from llama_3.generation import generate
from llama_3.loading import read_params
from llama_3.model import INNER_SITES, SITES
from llama_3.packed import PackedLinear
from pipeline.errors import InputError

LLAMA_3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
# Scaled down from the released models, with their heads, ties and rope.
FAMILIES = {
    "llama_3.2-1B": dict(heads=(8, 2), tied=True, rope=dict(LLAMA_3, rope_theta=500000.0, factor=32.0)),
    "llama_3.2-3B": dict(heads=(6, 2), tied=True, rope=dict(LLAMA_3, rope_theta=500000.0, factor=32.0)),
    "llama_3.1-8B": dict(heads=(4, 1), tied=False, rope=dict(LLAMA_3, rope_theta=500000.0, factor=8.0)),
    "llama_3-8B": dict(heads=(4, 2), tied=False, rope=dict(rope_type="default", rope_theta=500000.0)),
    "smollm2": dict(heads=(9, 3), tied=True, rope=dict(rope_type="default", rope_theta=100000.0)),
    "tinyllama": dict(heads=(8, 1), tied=False, rope=dict(rope_type="default", rope_theta=10000.0)),
    "linear rope": dict(heads=(3, 3), tied=False, rope=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
    "own head_dim": dict(heads=(4, 2), tied=False, head_dim=22, rope=dict(rope_type="default", rope_theta=10000.0)),
}
VOCAB_SIZE = 97


def hf_model(heads, tied, rope, head_dim=10, dtype=torch.float32, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=10 * heads[0],
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head_dim,
        rms_norm_eps=3e-4,
        max_position_embeddings=131072,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        attn_implementation="eager",
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.uniform_(0.5, 1.5)
        else:
            # A tied model with large embeddings would only repeat its input.
            embedding = 0.15 if tied else 1.0
            weight.normal_(std=embedding if "embed" in name else 1.5 / weight.shape[1] ** 0.5)
    return model.to(dtype)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """transformers' model and the folder it saved, in several files with an index."""
    hf = hf_model(**FAMILIES[request.param])
    folder = tmp_path_factory.mktemp("hf")
    hf.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and (folder / "model.safetensors.index.json").exists()
    return hf, folder


# ---- equal to transformers


def test_a_saved_model_gives_transformers_logits_and_sites(pair):
    hf, folder = pair
    tokens = torch.randint(VOCAB_SIZE, (2, 300), generator=torch.Generator().manual_seed(1))
    logits, sites = hf_run(hf, tokens)
    model = load_model(str(folder))
    close(model(tokens), logits)
    assert len(sites) == 2 * (len(SITES) + len(INNER_SITES))
    for site, expected in sites.items():
        close(model.activations(tokens, site), expected)
    assert (model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()) == hf.config.tie_word_embeddings
    assert model.args.max_seq_len == 131072


@pytest.mark.slow
def test_greedy_generation_equals_transformers_over_200_tokens(pair):
    hf, folder = pair
    prompt = torch.randint(VOCAB_SIZE, (1, 11), generator=torch.Generator().manual_seed(2))
    hf.generation_config.eos_token_id = None
    options = dict(max_new_tokens=200, do_sample=False, pad_token_id=0)
    expected = hf.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 11:].tolist()
    steps = generate(load_model(str(folder), packed=True), prompt.tolist(), 200, stop_tokens=[])
    assert [token for (token,) in steps] == expected
    assert len(set(expected)) > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_give_the_same_logits(pair, dtype):
    if not PackedLinear.can("cpu", dtype):
        pytest.skip(f"this CPU has no oneDNN for {dtype}")
    model, packed = (load_model(str(pair[1]), dtype=dtype, packed=packed) for packed in (False, True))
    assert isinstance(packed.output, PackedLinear) and isinstance(packed.layers[1].attention.wq, PackedLinear)
    tokens = torch.randint(VOCAB_SIZE, (3, 40), generator=torch.Generator().manual_seed(3))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for some in (tokens, tokens[:1, :1], tokens[:, :7]):
        torch.testing.assert_close(packed(some), model(some), atol=tolerance, rtol=0)
    acts = packed.activations(tokens, "layers.0.mlp_out")
    assert acts.dtype == dtype and packed.new_cache(1, 1).layers[0].keys.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_file_in_any_dtype_loads_into_any(tmp_path, dtype):
    hf = hf_model(**FAMILIES["llama_3.2-1B"], dtype=dtype)
    hf.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    for wanted in (torch.float32, torch.bfloat16):
        model = load_model(str(tmp_path), dtype=wanted)
        assert {weight.dtype for weight in model.parameters()} == {wanted}
        assert torch.equal(model.layers[0].feed_forward.w3.weight, hf.model.layers[0].mlp.up_proj.weight.to(wanted))


def test_many_files_need_no_index(pair, tmp_path):
    folder = shutil.copytree(pair[1], tmp_path / "copy")
    (folder / "model.safetensors.index.json").unlink()
    tokens = torch.arange(30)[None]
    close(load_model(str(folder))(tokens), load_model(str(pair[1]))(tokens))


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "drop"}))


@pytest.mark.parametrize("family", ["llama_3.1-8B", "linear rope"])
def test_the_older_way_to_write_rope_scaling_is_read(tmp_path, family):
    hf_model(**FAMILIES[family]).save_pretrained(tmp_path)
    args = read_params(str(tmp_path))
    rope = FAMILIES[family]["rope"]
    older = {("type" if name == "rope_type" else name): value for name, value in rope.items() if name != "rope_theta"}
    change_config(tmp_path, rope_parameters="drop", rope_scaling=older, rope_theta=rope["rope_theta"])
    assert read_params(str(tmp_path)) == args
    assert args.rope_scaling_factor == rope["factor"] and args.rope_theta == rope["rope_theta"]
    assert read_params(str(tmp_path), rope_scaling_factor=1.0).rope_scaling_factor == 1.0


def test_a_meta_folder_is_found_inside_original(tmp_path):
    write_tiny_model(tmp_path / "original")
    tokens = torch.arange(20)[None]
    close(load_model(str(tmp_path))(tokens), load_model(str(tmp_path / "original"))(tokens))
    assert load_tokenizer(str(tmp_path)).vocab_size == TINY_VOCAB_SIZE
    assert checkpoint_identity(str(tmp_path))["weights_bytes"] > 1000


def test_two_checkpoints_differ_in_identity(tmp_path, tiny_model_dir):
    hf_model(**FAMILIES["smollm2"]).save_pretrained(tmp_path)
    first, second = checkpoint_identity(str(tmp_path)), checkpoint_identity(str(tiny_model_dir))
    assert first["weights_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert all(first[name] != second[name] for name in first)


# ---- memory

MEASURE = """
import ctypes, re, sys, threading, time
import torch
from llama_3 import load_model
def anon():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
load_model()  # what the first load costs once: imports, threads
for folder in sys.argv[1:]:
    for dtype in (torch.float32, torch.bfloat16):
        ctypes.CDLL(None).malloc_trim(0)  # else what earlier models left would be used again, unseen
        before, highest, done = anon(), 0, False
        def watch():
            global highest
            while not done:
                highest = max(highest, anon())
                time.sleep(0.0005)
        thread = threading.Thread(target=watch)
        thread.start()
        model = load_model(folder, dtype=dtype)
        done = True
        thread.join()
        print((highest - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
        del model
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_takes_little_more_private_memory_than_the_weights(tmp_path):
    """A bfloat16 checkpoint with 35 million parameters, in Meta's and Hugging Face's formats, and as a GGUF file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(dim=512, n_layers=12, n_heads=8, n_kv_heads=4, vocab_size=TINY_VOCAB_SIZE, multiple_of=32)
    write_tiny_model(tmp_path / "meta", dtype="bfloat16", tied=True, **sizes)
    write_gguf(tmp_path / "m.gguf", tmp_path / "meta", "Q8_0", tied=True)
    config = LlamaConfig(
        vocab_size=TINY_VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1400,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "hf", max_shard_size="10MB")
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("meta", "hf", "m.gguf"))]
    run = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, check=True)
    meta, meta_mapped, hf, hf_mapped, gguf, gguf_bfloat16 = map(float, run.stdout.split())
    assert 0.9 < meta <= 1.15 and 0.9 < hf <= 1.15 and 0.9 < gguf <= 1.15 and 0.9 < gguf_bfloat16 <= 1.15
    # Weights already in the wanted dtype stay mapped; Hugging Face's queries and keys are put in another order.
    assert meta_mapped <= 0.35 and hf_mapped <= 0.5


# ---- refusals


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
BREAKAGES = {
    "missing tensor": (lambda f: change_tensors(f, lambda t: t.pop(Q)), ["lacks", "layers.1.attention.wq.weight"]),
    "surplus tensor": (lambda f: change_tensors(f, lambda t: t.update(extra=torch.ones(2))), ["extra", "unknown"]),
    "misshapen tensor": (
        lambda f: change_tensors(f, lambda t: t.update({Q: t[Q].T[:7].contiguous()})),
        [Q, "(7, 40)", "(40, 40)"],
    ),
    "integers": (lambda f: change_tensors(f, lambda t: t.update({Q: t[Q].to(torch.int8)})), [Q, "int8"]),
    "untied without output": (lambda f: change_tensors(f, lambda t: t.pop("lm_head.weight")), ["output.weight"]),
    "pointer": (lambda f: (f / "model.safetensors").write_text(POINTER), ["model.safetensors", "git lfs pull"]),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:3000]),
        ["model.safetensors", "truncated"],
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no model*.safetensors", "config.json"]),
    "index without its files": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-2.safetensors"}}'),
        ["model-1-of-2.safetensors"],
    ),
    "broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ["index.json"]),
    "broken config": (lambda f: (f / "config.json").write_text("{"), ["config.json"]),
    "config of something else": (lambda f: change_config(f, model_type="gpt2"), ["config.json", "gpt2"]),
    "quantised": (lambda f: change_config(f, quantization_config={"bits": 4}), ["quantization_config"]),
    "with biases": (lambda f: change_config(f, attention_bias=True), ["attention_bias"]),
    "unknown rope": (lambda f: change_config(f, rope_parameters={"rope_type": "yarn"}), ["yarn"]),
    "config without a size": (lambda f: change_config(f, hidden_size="drop"), ["config.json", "hidden_size"]),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_folder_is_refused_in_a_sentence(tmp_path, breakage):
    hf_model(**FAMILIES["llama_3.1-8B"]).save_pretrained(tmp_path)
    load_model(str(tmp_path))
    damage, names = BREAKAGES[breakage]
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path))
    message = str(caught.value)
    assert str(tmp_path) in message and "\n" not in message
    for name in names:
        assert name in message


def test_a_pointer_in_place_of_metas_weights_is_refused(tmp_path):
    write_tiny_model(tmp_path)
    (tmp_path / "consolidated.00.pth").write_text(POINTER)
    with pytest.raises(InputError, match="consolidated.00.pth is a Git LFS pointer"):
        load_model(str(tmp_path))


def test_a_model_split_for_several_gpus_is_refused(tmp_path):
    write_tiny_model(tmp_path)
    shutil.copy(tmp_path / "consolidated.00.pth", tmp_path / "consolidated.01.pth")
    with pytest.raises(InputError, match="split for several GPUs"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("vocab_size", [TINY_VOCAB_SIZE - 1, TINY_VOCAB_SIZE - 256])
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, vocab_size):
    write_tiny_model(tmp_path, vocab_size=vocab_size)
    with pytest.raises(InputError, match=f"has {TINY_VOCAB_SIZE} tokens, its model {vocab_size}"):
        load_tokenizer(str(tmp_path))


def test_the_script_refuses_with_exit_code_2(tmp_path, capsys):
    write_tiny_model(tmp_path)
    (tmp_path / "consolidated.00.pth").write_text(POINTER)
    said = refusal(capsys, inference, llama_model_dir=tmp_path, prompts=["a"])
    assert "consolidated.00.pth is a Git LFS pointer" in said
