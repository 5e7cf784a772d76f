"""GGUF files: weights against the same model in Meta's format, llama.cpp's own logits and token ids, and refusals.

What llama.cpp gives is in tests/support/llama_cpp.json; tests/support/llama_cpp_reference.py makes it again.
SmolLM2's file, where it has been fetched, is compared too: SMOLLM2_GGUF names it.

    .venv/bin/python -m pytest tests/test_gguf.py
"""

import json
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import write_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from support.gguf_files import as_stored, write_gguf
from support.llama_cpp_reference import LINES, OUT, PROMPT

from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import TINY_LLAMA_DIR, checkpoint_identity
from llama_3.gguf import PRE_TOKENIZERS, _read_gguf, read_gguf
from llama_3.loading import read_params
from llama_3.packed import PackedLinear
from pipeline.errors import InputError

TINY = Path(TINY_LLAMA_DIR)
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", TINY, tied=True)


@pytest.fixture(scope="module")
def reference() -> dict:
    return json.loads(OUT.read_text(encoding="utf-8"))


# ---- weights


def test_the_same_model_in_both_formats_gives_the_same_logits(tiny_gguf):
    ours, theirs = load_model(str(TINY)), load_model(str(tiny_gguf))
    tokens = torch.tensor([load_tokenizer(str(TINY)).encode(PROMPT, bos=True)])
    assert torch.equal(ours(tokens), theirs(tokens))
    assert theirs.output.weight.data_ptr() == theirs.tok_embeddings.weight.data_ptr()


def test_logits_are_those_of_llama_cpp(tiny_gguf, reference):
    tokenizer = load_tokenizer(str(tiny_gguf))
    ids = tokenizer.encode(PROMPT, bos=True)
    assert ids == reference["prompt_ids"]
    logits = load_model(str(tiny_gguf))(torch.tensor([ids]))[0, -1, ::16]
    torch.testing.assert_close(logits, torch.tensor(reference["logits"]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantisation_is_converted_as_the_library_does(tmp_path, kind):
    folder = write_tiny_model(tmp_path / "m", dim=64, n_heads=4, multiple_of=32)  # blocks have 32 elements
    path = write_gguf(tmp_path / "m.gguf", folder, kind)
    for dtype in (torch.float32, torch.bfloat16):
        found = load_model(str(path), dtype=dtype).state_dict()
        for name, tensor in torch.load(folder / "consolidated.00.pth", weights_only=True).items():
            array = tensor.float().numpy()
            stored = torch.from_numpy(as_stored(array, kind)) if array.ndim == 2 else tensor.float()
            assert torch.equal(found[name], stored.to(dtype)), name


def test_packed_layers_compute_the_same(tiny_gguf):
    plain, packed = load_model(str(tiny_gguf)), load_model(str(tiny_gguf), packed=True)
    tokens = torch.randint(0, 4096, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed(tokens), plain(tokens), rtol=1e-4, atol=1e-4)
    assert isinstance(packed.output, PackedLinear)


def test_rope_divisors_stand_for_llama_3_scaling(tmp_path, tiny_model_dir):
    """llama.cpp's converter writes only the divisors: rope_freqs.weight."""
    args = read_params(str(tiny_model_dir))  # use_scaled_rope, factor 8
    path = write_gguf(tmp_path / "m.gguf", tiny_model_dir)
    from llama_3.model import ModelArgs, rope_frequencies

    plain = rope_frequencies(ModelArgs(args.dim, 1, args.n_heads, 1, 8, 8, rope_theta=args.rope_theta))
    divisors = plain / rope_frequencies(args)
    assert divisors.max() == pytest.approx(8) and divisors.min() == 1
    with_divisors = add_tensor(path, tmp_path / "scaled.gguf", "rope_freqs.weight", divisors.numpy())
    tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = load_model(str(tiny_model_dir))(tokens)
    torch.testing.assert_close(load_model(str(with_divisors))(tokens), expected, rtol=1e-4, atol=1e-4)
    assert (load_model(str(path))(tokens) - expected).abs().max() > 0.01


def add_tensor(path: Path, out: Path, name: str, array: np.ndarray, kind: str = "F32") -> Path:
    """A copy of a GGUF file with one tensor more."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kinds = field.types
            writer.add_key_value(key, field.contents(), kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_parameters_come_from_the_metadata(tmp_path, tiny_model_dir):
    args, expected = (
        read_params(str(folder)) for folder in (write_gguf(tmp_path / "m.gguf", tiny_model_dir), tiny_model_dir)
    )
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "head_dim", "rope_theta"):
        assert getattr(args, name) == getattr(expected, name), name
    assert args.norm_eps == expected.norm_eps and args.rope_divisors is None


# ---- tokenizers


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_token_ids_are_those_of_llama_cpp(tmp_path, reference, pre):
    path = write_gguf(tmp_path / "m.gguf", TINY, weights=False, pre=pre)
    tokenizer = load_tokenizer(str(path))
    same_kind = next(name for name, kind in PRE_TOKENIZERS.items() if kind == PRE_TOKENIZERS[pre])
    for line, ids in zip(LINES, reference["ids"][same_kind], strict=True):
        assert tokenizer.encode(line) == ids, line
        assert tokenizer.decode(ids) == line
    assert tokenizer.starts_with_bos == reference["add_bos"][same_kind]


def test_the_file_says_whether_texts_begin_with_begin_of_text(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", TINY, weights=False, **{"tokenizer.ggml.add_bos_token": False})
    tokenizer = load_tokenizer(str(path))
    assert not tokenizer.starts_with_bos and tokenizer.bos_id == load_tokenizer(str(TINY)).bos_id
    assert tokenizer.eos_id in tokenizer.stop_ids


def test_sentencepiece_joins_the_best_pieces_first(tmp_path):
    """Scores decide: "ab" + "c" before "a" + "bc"; bytes stand for what has no piece; a space is put before a text."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "c",
        "ab",
        "bc",
        "abc",
    ]
    types = [2, 3, 3, *[6] * 256, *[1] * 7]
    scores = [0.0] * 259 + [-7.0, -4.0, -5.0, -6.0, -1.0, -2.0, -3.0]
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces, "tokenizer.ggml.token_type": types}
    metadata |= {"tokenizer.ggml.scores": scores, "tokenizer.ggml.merges": None, "tokenizer.ggml.pre": None}
    metadata |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "m.gguf", TINY, weights=False, **metadata)))
    piece = {text: i for i, text in enumerate(pieces)}
    assert tokenizer.encode("abcb") == [piece["▁"], piece["abc"], piece["b"]]
    assert tokenizer.encode("bcab é") == [
        *(piece[text] for text in ("▁", "bc", "ab", "▁")), piece["<0xC3>"], piece["<0xA9>"]
    ]  # fmt: skip
    for text in ("abc", " a  b", "é 再\n", "<s> is text"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.starts_with_bos and tokenizer.encode("a", bos=True)[0] == 1


# ---- which file


def test_a_folder_with_one_file_is_that_file(tiny_gguf, tmp_path):
    shutil.copy(tiny_gguf, tmp_path / "a.gguf")
    assert read_params(str(tmp_path)) == read_params(str(tiny_gguf))
    assert load_tokenizer(str(tmp_path)).encode("hello") == load_tokenizer(str(tiny_gguf)).encode("hello")
    shutil.copy(tiny_gguf, tmp_path / "b.gguf")
    with pytest.raises(InputError, match=r"several GGUF files \(a.gguf, b.gguf\); name one"):
        load_model(str(tmp_path))


def test_identity_tells_files_apart(tiny_gguf, tmp_path, tiny_model_dir):
    one = checkpoint_identity(str(tiny_gguf))
    assert one["name"] == "tiny" and one["weights_bytes"] == tiny_gguf.stat().st_size
    other = checkpoint_identity(str(write_gguf(tmp_path / "tiny.gguf", TINY, "F16", tied=True)))
    assert other["weights_sha256"] != one["weights_sha256"] and other["params_sha256"] == one["params_sha256"]
    third = checkpoint_identity(str(write_gguf(tmp_path / "other.gguf", tiny_model_dir)))
    assert third["params_sha256"] != one["params_sha256"]


# ---- refusals


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"general.architecture": "qwen2"}, "architecture qwen2; only llama"),
        ({"tokenizer.ggml.pre": "moonshine"}, "pre-tokenizer moonshine, which is not known here"),
        ({"tokenizer.ggml.pre": None}, "pre-tokenizer absent"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer of kind rwkv"),
        ({"split.count": 3}, "one part of a split model"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.scaling.type": "yarn"}, "scales RoPE by yarn"),
        ({"llama.block_count": None}, "does not say llama.block_count"),
    ],
)
def test_what_is_not_supported_is_one_sentence(tmp_path, metadata, sentence):
    path = write_gguf(tmp_path / "m.gguf", TINY, weights=False, **metadata)
    with pytest.raises(InputError, match=sentence):
        load_tokenizer(str(path))
        load_model(str(path))


def test_damaged_files_are_one_sentence(tmp_path, tiny_gguf):
    whole = tiny_gguf.read_bytes()
    path = tmp_path / "m.gguf"
    for content in (b"", b"GGUF", whole[:1000], whole[: len(whole) // 2], whole[:-5000], b"nope" + whole[4:]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"m\.gguf (is not a GGUF file|is truncated or damaged)"):
            load_model(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        load_model(str(tmp_path / "none.gguf"))


FEW_TOKENS = {
    "tokenizer.ggml.tokens": ["a", "b"],
    "tokenizer.ggml.token_type": [1, 1],
    "tokenizer.ggml.merges": None,
    "of every kind": [True, False],
    "negative": [-3, 2],
}


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory) -> Path:
    """Metadata of 1 KB and a tensor."""
    return write_gguf(tmp_path_factory.mktemp("small") / "m.gguf", TINY, weights=False, **FEW_TOKENS)


def test_metadata_is_what_the_library_reads(small_gguf, tiny_gguf):
    for path in (small_gguf, tiny_gguf):
        found, reader = read_gguf(str(path)), gguf.GGUFReader(path)
        expected = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        assert found.metadata == expected
        assert list(found.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            assert found.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
            assert np.array_equal(found.tensors[tensor.name].values(), tensor.data)


@given(st.lists(st.tuples(st.integers(0, 2**12), st.integers(0, 255)), max_size=4), st.integers(-50, 0))
def test_any_damage_is_a_sentence_or_changes_a_value(small_gguf, tmp_path_factory, changes, cut):
    content = bytearray(small_gguf.read_bytes())
    for position, byte in changes:
        content[position % len(content)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content[: len(content) + cut])
    _read_gguf.cache_clear()
    try:
        read_params(str(path))
    except InputError as error:
        assert "damaged.gguf" in str(error)


def test_counts_beyond_the_file_are_one_sentence(tmp_path, small_gguf):
    """The number of tensors, of keys, of a text's bytes."""
    whole = small_gguf.read_bytes()
    for position in (8, 16, 24):
        path = tmp_path / f"{position}.gguf"
        path.write_bytes(whole[:position] + b"\xff" * 8 + whole[position + 8 :])
        with pytest.raises(InputError, match=r"gguf is truncated or damaged"):
            read_params(str(path))
    (tmp_path / "m.gguf").write_bytes(whole[:4] + b"\x09" + whole[5:])
    with pytest.raises(InputError, match=r"m\.gguf is in version 9 of GGUF; 2 and 3 are read here"):
        read_params(str(tmp_path / "m.gguf"))


def test_a_type_that_the_library_does_not_convert_is_named(tmp_path, tiny_gguf):
    path = add_tensor(tiny_gguf, tmp_path / "m.gguf", "blk.0.extra.weight", np.zeros(8, np.int8), "I8")
    with pytest.raises(InputError, match=r"blk\.0\.extra\.weight as I8, which the gguf package does not convert"):
        load_model(str(path))


def test_a_tensor_that_is_missing_or_unknown_is_named(tmp_path, tiny_gguf):
    path = add_tensor(tiny_gguf, tmp_path / "m.gguf", "blk.0.attn_q.bias", np.ones(256, np.float32))
    with pytest.raises(InputError, match=r"holds blk\.0\.attn_q\.bias, a bias, and biases are not supported"):
        load_model(str(path))
    path = add_tensor(tiny_gguf, tmp_path / "n.gguf", "blk.0.extra.weight", np.zeros(256, np.float32))
    with pytest.raises(InputError, match=r"holds blk\.0\.extra\.weight, unknown to this model"):
        load_model(str(path))


def test_biases_of_zero_and_rotary_tables_change_nothing(tmp_path, tiny_gguf, capsys):
    path = add_tensor(tiny_gguf, tmp_path / "m.gguf", "blk.0.attn_q.bias", np.zeros(256, np.float32))
    path = add_tensor(path, tmp_path / "n.gguf", "blk.0.attn_rot_embd.weight", np.ones(16, np.float32))
    tokens = torch.arange(9)[None]
    assert torch.equal(load_model(str(path))(tokens), load_model(str(tiny_gguf))(tokens))
    assert "biases of zero (blk.0.attn_q.bias)" in capsys.readouterr().err


# ---- a real model

SMOLLM2 = Path(os.environ.get("SMOLLM2_GGUF", "models/smollm2-135M-Instruct-Q4_1"))


@pytest.mark.skipif(not SMOLLM2.exists(), reason=f"SmolLM2 is not at {SMOLLM2}; SMOLLM2_GGUF names it")
@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france():
    model, tokenizer = load_model(str(SMOLLM2)), load_tokenizer(str(SMOLLM2))
    ids = tokenizer.encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.decode([int(model(torch.tensor([ids]))[0, -1].argmax())]) == " Paris"
