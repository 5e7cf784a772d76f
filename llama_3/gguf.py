"""GGUF files of the Llama architecture: what their metadata says of the model and of its tokenizer. Needs no torch.

The format is described in docs/gguf.md of ggml. The `gguf` package knows the kinds of tensors; its own reader takes
seconds for a vocabulary. llama_3/loading.py reads the weights. Keys, pre-tokenizers and what these do are llama.cpp's
(its gguf-py constants and src/llama-vocab.cpp).
"""

import functools
import math
import os
import struct
from typing import Any, NamedTuple

import gguf
import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from pipeline.errors import InputError

# Kinds of token in tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


class StoredTensor(NamedTuple):
    """A tensor as it lies in a file."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray  # (..., bytes of a row) uint8, mapped

    def values(self) -> np.ndarray:
        """The tensor as float32. Raises NotImplementedError for a kind that the gguf package does not convert."""
        return gguf.quants.dequantize(self.data, self.kind)


class Gguf(NamedTuple):
    """One file: its metadata, and its tensors."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def need(self, key: str) -> Any:
        """A value of the metadata. Raises InputError where there is none."""
        if key not in self.metadata:
            raise InputError(f"{self.path} does not say {key}; convert the model again.")
        return self.metadata[key]


def read_gguf(path: str) -> Gguf:
    """Open a GGUF file of the Llama architecture. Raises InputError for any other file. The last two stay open."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); GGUF files are read from a local disk.") from None
    return _read_gguf(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(2)
def _read_gguf(path: str, _size: int, _modified_ns: int) -> Gguf:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is not a GGUF file; fetch it again.")
    try:
        cursor = _Cursor(np.memmap(path, np.uint8, "r"))
        cursor.take(4)
        version, n_tensors, n_keys = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
        if version not in (2, 3):
            raise InputError(f"{path} is in version {version} of GGUF; 2 and 3 are read here: convert the model again.")
        metadata = dict(_read_entry(cursor) for _ in range(n_keys))
        if len(metadata) < n_keys:
            raise ValueError("a key of the metadata comes twice")
        tensors = _read_tensors(cursor, n_tensors, metadata.get("general.alignment", 32))
    except (ValueError, LookupError, OverflowError, MemoryError) as error:  # ValueError: text that is not UTF-8, too
        if "is not a valid GGMLQuantizationType" in str(error):
            raise InputError(
                f"{path} is in a form that the gguf package here does not read ({_line(error)}); update the package, "
                "or use another file of this model."
            ) from None
        raise InputError(f"{path} is truncated or damaged ({_line(error)}); fetch it again.") from None
    if metadata.get("split.count", 1) > 1:
        raise InputError(f"{path} is one part of a split model; join the parts with llama-gguf-split --merge.")
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise InputError(
            f"{path} holds a model of architecture {architecture}; only llama is read here (Llama 3.x, SmolLM2, "
            "TinyLlama)."
        )
    return Gguf(path, metadata, tensors)


class _Cursor:
    """Reads a file's bytes in order. Raises ValueError where they end."""

    def __init__(self, data: np.ndarray):
        self.data, self.bytes, self.position = data, memoryview(data), 0

    def take(self, n_bytes: int) -> memoryview:
        begin, self.position = self.position, self.position + n_bytes
        if self.position > len(self.bytes):
            raise ValueError("the file ends too early")
        return self.bytes[begin : self.position]

    def number(self, form: str) -> Any:
        """One number; form: as of the module struct."""
        return struct.unpack("<" + form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")


# Kinds of values in the metadata, as of the module struct; then texts and arrays.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


def _read_entry(cursor: _Cursor) -> tuple[str, Any]:
    """A key of the metadata and its value."""
    key, kind = cursor.text(), cursor.number("I")
    if kind != _ARRAY:
        return key, _read_value(cursor, kind)
    kind, length = cursor.number("I"), cursor.number("Q")
    if kind in _NUMBERS:
        form = np.dtype(_NUMBERS[kind]).newbyteorder("<")
        return key, np.frombuffer(cursor.take(length * form.itemsize), form).tolist()
    return key, [_read_value(cursor, kind) for _ in range(length)]


def _read_value(cursor: _Cursor, kind: int) -> Any:
    if kind == _TEXT:
        return cursor.text()
    if kind not in _NUMBERS:
        raise ValueError(f"a value of kind {kind}")
    return cursor.number(_NUMBERS[kind])


def _read_tensors(cursor: _Cursor, n_tensors: int, alignment: Any) -> dict[str, StoredTensor]:
    """The tensors by name, from where they are described: name, widths (the last dimension first), kind, place."""
    described = []
    for _ in range(n_tensors):
        name, n_dims = cursor.text(), cursor.number("I")
        if not 1 <= n_dims <= 4:
            raise ValueError(f"{name} has {n_dims} dimensions")
        widths = [cursor.number("Q") for _ in range(n_dims)]
        described.append((name, tuple(reversed(widths)), cursor.number("I"), cursor.number("Q")))
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"an alignment of {alignment}")
    begin = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, shape, number, place in described:
        kind = gguf.GGMLQuantizationType(number)
        in_bytes = gguf.quants.quant_shape_to_byte_shape(shape, kind)
        if name in tensors or 0 in in_bytes:
            raise ValueError(f"{name} comes twice or is empty")
        cursor.position = begin + place
        data = np.frombuffer(cursor.take(math.prod(in_bytes)), np.uint8).reshape(in_bytes)
        tensors[name] = StoredTensor(kind, shape, data)
    return tensors


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def gguf_args(file: Gguf) -> dict[str, Any]:
    """Keyword arguments of llama_3.model.ModelArgs."""
    need, metadata = file.need, file.metadata
    n_heads, dim = need("llama.attention.head_count"), need("llama.embedding_length")
    kind = metadata.get("llama.rope.scaling.type", "linear")  # with the factor that there is, as in llama.cpp
    if kind not in ("none", "linear"):
        raise InputError(f"{file.path} scales RoPE by {kind}, which is not supported; use another model.")
    factor = metadata.get("llama.rope.scaling.factor") or metadata.get("llama.rope.scale_linear") or 1.0
    if metadata.get("llama.expert_count", 0):
        raise InputError(f"{file.path} is a mixture of experts, which is not supported; use another model.")
    args = {
        "dim": dim,
        "n_layers": need("llama.block_count"),
        "n_heads": n_heads,
        "n_kv_heads": metadata.get("llama.attention.head_count_kv", n_heads),
        "vocab_size": _tensor(file, "token_embd.weight").shape[0],
        "hidden_dim": need("llama.feed_forward_length"),
        "head_dim": metadata.get("llama.attention.key_length", dim // n_heads),
        "norm_eps": round(need("llama.attention.layer_norm_rms_epsilon"), 12),  # a float32
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        "max_seq_len": need("llama.context_length"),
    }
    if kind == "linear":
        args |= {"rope_scaling_factor": factor, "rope_original_context": 0}
    if metadata.get("llama.rope.dimension_count", args["head_dim"]) != args["head_dim"]:
        raise InputError(f"{file.path} rotates only part of each head, which is not supported; use another model.")
    if "rope_freqs.weight" in file.tensors:  # Llama 3.1 and later: the whole of their scaling
        args["rope_divisors"] = tuple(map(float, file.tensors["rope_freqs.weight"].values()))
    return args


def _tensor(file: Gguf, name: str) -> StoredTensor:
    if name not in file.tensors:
        raise InputError(f"{file.path} lacks the tensor {name}; it is not a whole model, use another file.")
    return file.tensors[name]


# ---- tokenizers

_LLAMA_3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHINESE_KOREAN = "[一-龥ࠀ-一가-퟿]+"
_CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"  # letters of scripts with upper and lower case


class PreTokenizer(NamedTuple):
    """How a byte-level BPE cuts a text into pieces before it merges: by each pattern in turn."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is taken whole
    add_bos: bool = False  # where the metadata does not say


_LIKE_LLAMA_3 = PreTokenizer((_LLAMA_3,), ignore_merges=True, add_bos=True)
_DIGIT_BY_DIGIT = PreTokenizer((r"\p{N}", _GPT_2))
PRE_TOKENIZERS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LIKE_LLAMA_3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), PreTokenizer((_LLAMA_3,))),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGIT_BY_DIGIT
    ),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), PreTokenizer((_GPT_2,))),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "qwen2": PreTokenizer((_LLAMA_3.replace("{1,3}", ""),)),
    "deepseek-llm": PreTokenizer(
        (
            "[\r\n]",
            rf"\s?{_CASED}+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            _CHINESE_KOREAN,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_KOREAN, r"\p{N}")),
}


class GgufTokenizer(NamedTuple):
    """What llama_3.tokenizer makes a tokenizer of."""

    model: tokenizers.Tokenizer
    bos_id: int | None
    add_bos: bool
    eos_ids: list[int]  # of a text, of a turn, of a message: those that the file names
    template: tuple[str, str] | None  # of chats, and the file it is from
    rowless: list[str]  # added tokens left out, since the model has no row for them


def gguf_tokenizer(file: Gguf) -> GgufTokenizer:
    """The tokenizer in a file's metadata. Raises InputError for a kind that is not known here."""
    kind = file.need("tokenizer.ggml.model")
    metadata, tokens = file.metadata, file.need("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise InputError(f"{file.path} has {len(types)} kinds for {len(tokens)} tokens; convert the model again.")
    vocabulary = _vocabulary(file, tokens, types)
    if kind == "gpt2":
        pre = metadata.get("tokenizer.ggml.pre", "absent")
        if pre not in PRE_TOKENIZERS:
            raise InputError(
                f"{file.path} has the pre-tokenizer {pre}, which is not known here ({', '.join(PRE_TOKENIZERS)}); use "
                "another model, or the Hugging Face folder of this one."
            )
        model, add_bos, bos_id = _byte_level(file, PRE_TOKENIZERS[pre], vocabulary), PRE_TOKENIZERS[pre].add_bos, None
    elif kind == "llama":
        model, add_bos, bos_id = _sentence_piece(file, tokens, types, vocabulary), True, 1
    else:
        raise InputError(f"{file.path} has a tokenizer of kind {kind}, which is not known here; use another model.")
    added = [
        AddedToken(token, special=types[i] == _CONTROL, normalized=False)
        for token, i in sorted(vocabulary.items(), key=lambda item: item[1])
        if types[i] in (_CONTROL, _USER_DEFINED)
    ]
    model.add_tokens([token for token in added if not token.special])
    model.add_special_tokens([token for token in added if token.special])
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return GgufTokenizer(
        model,
        metadata.get("tokenizer.ggml.bos_token_id", bos_id),
        metadata.get("tokenizer.ggml.add_bos_token", add_bos),
        [i for i in dict.fromkeys(ends) if i is not None],
        (template, file.path) if (template := metadata.get("tokenizer.chat_template")) else None,
        [token for token in tokens[gguf_rows(file) or len(tokens) :] if token not in vocabulary],
    )


def _byte_level(file: Gguf, pre: PreTokenizer, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """A byte-level BPE: bytes written as GPT-2 writes them."""
    merges = [tuple(merge.split(" ", 1)) for merge in file.need("tokenizer.ggml.merges")]
    model = tokenizers.Tokenizer(BPE(vocabulary, merges, ignore_merges=pre.ignore_merges))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = decoders.ByteLevel()
    return model


def _sentence_piece(
    file: Gguf, tokens: list[str], types: list[int], vocabulary: dict[str, int]
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE, which joins the pair whose piece has the highest score: as merges, best piece first."""
    scores = file.need("tokenizer.ggml.scores")
    pieces = [i for i in vocabulary.values() if types[i] in (_NORMAL, _USER_DEFINED, _UNUSED)]
    merges = [
        (token[:cut], token[cut:])
        for token in sorted((tokens[i] for i in pieces), key=lambda token: (-scores[vocabulary[token]], token))
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = tokens[types.index(_UNKNOWN)] if _UNKNOWN in types else None
    model = tokenizers.Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Replace(" ", "▁")]
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prefix else steps)
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    return model


def _vocabulary(file: Gguf, tokens: list[str], types: list[int]) -> dict[str, int]:
    """Token -> id; of two of one name the first.

    Without the [PAD123] that converters write for rows without a token, and without added tokens that have no row.
    """
    n_rows = gguf_rows(file) or len(tokens)
    padding = {i for i, type_ in enumerate(types) if type_ == _UNUSED and tokens[i] == f"[PAD{i}]"}
    rowless = {i for i in range(n_rows, len(tokens)) if types[i] in (_CONTROL, _USER_DEFINED)}
    left_out = padding | rowless
    return {token: i for i, token in reversed(list(enumerate(tokens))) if i not in left_out}


def gguf_rows(file: Gguf) -> int | None:
    """How many tokens the embedding has rows for; None where the file holds none."""
    embedding = file.tensors.get("token_embd.weight")
    return None if embedding is None else embedding.shape[0]
