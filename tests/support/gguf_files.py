"""GGUF files for tests, written with the gguf package from a folder in Meta's format."""

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from llama_3.loading import GGUF_NAMES, read_params
from llama_3.tokenizer import BYTE_OF, N_SPECIAL_TOKENS, TiktokenTokenizer, load_tokenizer, read_ranks

OURS = {ours: theirs for theirs, ours in GGUF_NAMES.items()}
BYTES_AS_TEXT = {byte: text for text, byte in BYTE_OF.items()}


def written(token: bytes) -> str:
    """A token as byte-level vocabularies write it."""
    return "".join(BYTES_AS_TEXT[byte] for byte in token)


@functools.cache
def merges_of(tokenizer_path: str) -> list[str]:
    """The merges of a tokenizer.model: the two parts that a token's bytes are at when it is made."""
    ranks, merges = read_ranks(tokenizer_path), []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
            best = min(range(len(joined)), key=joined.__getitem__)
            if joined[best] >= ranks[token]:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(written, parts)))
    return merges


def write_gguf(
    path: Path,
    model_dir: Path,
    kind: str = "F32",
    tied: bool = False,
    pre: str = "llama-bpe",
    weights: bool = True,
    **metadata: Any,
) -> Path:
    """The model of a folder in Meta's format as a GGUF file; matrices in the quantisation `kind`.

    weights: False writes the final norm alone, for what reads the metadata only.
    metadata: keys and values that are added, or replace others; None leaves one out.
    """
    args, tokenizer = read_params(str(model_dir)), load_tokenizer(str(model_dir))
    assert isinstance(tokenizer, TiktokenTokenizer)
    ranks = read_ranks(str(model_dir / "tokenizer.model"))
    tokens = [written(token) for token in sorted(ranks, key=ranks.__getitem__)]
    special = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__)
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": args.n_layers,
        "llama.context_length": args.max_seq_len,
        "llama.embedding_length": args.dim,
        "llama.feed_forward_length": args.hidden_dim,
        "llama.attention.head_count": args.n_heads,
        "llama.attention.head_count_kv": args.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": args.norm_eps,
        "llama.rope.freq_base": args.rope_theta,
        "llama.rope.dimension_count": args.dim // args.n_heads,
        "llama.vocab_size": args.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *special],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3] * N_SPECIAL_TOKENS,
        "tokenizer.ggml.merges": merges_of(str(model_dir / "tokenizer.model")),
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
    } | metadata
    writer = gguf.GGUFWriter(path, values.pop("general.architecture"))
    for name, value in values.items():
        add_value(writer, name, value)
    state = torch.load(model_dir / "consolidated.00.pth", weights_only=True)
    for name, tensor in state.items():
        if (tied and name == "output.weight") or not (weights or name == "norm.weight"):
            continue
        *layer, part = name.removesuffix(".weight").removeprefix("layers.").split(".", 1)
        part = part if layer and layer[0].isdigit() else ".".join([*layer, part])
        theirs = f"blk.{layer[0]}.{OURS[part]}.weight" if layer and layer[0].isdigit() else f"{OURS[part]}.weight"
        array = tensor.float().numpy()
        kind_of = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(theirs, gguf.quants.quantize(array, kind_of), raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
    if isinstance(value, list):
        writer.add_array(name, value)
    elif value is not None:
        add[type(value)](name, value)


def as_stored(array: np.ndarray, kind: str) -> np.ndarray:
    """What a matrix is after quantisation and back, by the library."""
    kind_of = gguf.GGMLQuantizationType[kind]
    return gguf.quants.dequantize(gguf.quants.quantize(array, kind_of), kind_of)


def write_vector(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A control vector as repeng 0.4 and llama.cpp's cvector-generator write it."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
