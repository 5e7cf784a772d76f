"""Text to token ids and back: Llama 3's `tokenizer.model` (tiktoken), and any `tokenizer.json` (tokenizers).

A `tokenizer.model` holds base64 tokens and ranks of a byte-level BPE; the split pattern and the special tokens are
Meta's published ones, the 256 special tokens follow the last rank.
"""

import base64
import functools
import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import blobfile
import tiktoken
import tokenizers

from llama_3.chat_template import ChatTemplate
from llama_3.checkpoint import TINY_LLAMA_DIR, check_files, preferred_files, read_json, say
from pipeline.errors import InputError

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_SPECIAL_TOKENS = 256
NAMED_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
# tiktoken's regex and merge recursion slow down or overflow on very long pieces; text is encoded in slices of this many
# characters, and a run of this many characters without (or of) whitespace is cut. Same limits as Meta's tokenizer.
MAX_CHARS = 400_000
MAX_RUN_CHARS = 25_000
_RUN = re.compile(r"\s+|\S+")
# How byte-level vocabularies write bytes (GPT-2's alphabet): those that print as themselves, the others from 256 on.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
BYTE_OF = {chr(byte): byte for byte in _PRINTED} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
_PADDING = 1024  # rows without a token that are usual: they round a vocabulary up
# Tokens that end an answer where a model has them: of a text, of a message, of a turn.
STOP_TOKENS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")


def read_ranks(path: str) -> dict[bytes, int]:
    """Read a tokenizer.model, {token: rank}. Raises InputError when it is missing or not in tiktoken's format."""
    # Not tiktoken's own loader: it caches by path, so a tokenizer retrained in place would load stale.
    try:
        with blobfile.BlobFile(path, "rb") as file:
            lines = file.read().splitlines()
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in (x.split() for x in lines if x)}
    except FileNotFoundError:
        raise InputError(f"There is no tokenizer at {path}; name a folder that holds tokenizer.model.") from None
    except (ValueError, OSError) as error:
        raise InputError(
            f"{path} is not a tokenizer in tiktoken's format ({error}); fetch it again, or for a model with another "
            "kind of tokenizer name the Hugging Face folder, with tokenizer.json."
        ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise InputError(f"{path} is not a whole tokenizer: its ranks are not 0 to n - 1; fetch it again.")
    return ranks


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    path.write_bytes(b"".join(base64.b64encode(token) + b" " + str(rank).encode() + b"\n" for token, rank in in_order))


class Tokenizer(Protocol):
    """What every tokenizer here has. Special tokens written in a text are text, never control."""

    special_tokens: dict[str, int]
    vocab_size: int
    starts_with_bos: bool  # whether the model's training texts begin with it
    chat_template: ChatTemplate | None  # the chat format that the model's files carry

    @property
    def bos_id(self) -> int | None: ...  # None: the model has no begin-of-text
    @property
    def eos_id(self) -> int | None: ...
    @property
    def stop_ids(self) -> frozenset[int]: ...  # of the tokens that end an answer

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids, optionally with begin-of-text and end-of-text, if the model has them."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the tokens; bytes that are not whole UTF-8 characters become U+FFFD, an id without a token none."""
        ...

    def token_bytes(self, token_id: int) -> bytes: ...
    def encode_template(self, text: str, mark: str) -> list[int]:
        """Token ids of a text that `chat_template` rendered, special tokens recognised but for those that `mark` breaks
        up."""
        ...

    def template_tokens(self, text: str, mark: str) -> list[tuple[int, tuple[int, int]]]:
        """The tokens of `encode_template`, each with its first character and its end in the text without the mark."""
        ...


class TiktokenTokenizer:
    """Llama 3's `tokenizer.model`."""

    def __init__(self, ranks: dict[bytes, int], name: str = "llama_3"):
        n = len(ranks)
        n_reserved = N_SPECIAL_TOKENS - len(NAMED_SPECIAL_TOKENS)
        names = [*NAMED_SPECIAL_TOKENS, *(f"<|reserved_special_token_{i + 2}|>" for i in range(n_reserved))]
        self.special_tokens = {token: n + i for i, token in enumerate(names)}
        self.model = tiktoken.Encoding(
            name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self.vocab_size = n + N_SPECIAL_TOKENS
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.eos_id = self.special_tokens["<|end_of_text|>"]
        self.stop_ids = frozenset(self.special_tokens[name] for name in STOP_TOKENS)
        self.starts_with_bos = True
        self.chat_template: ChatTemplate | None = None

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        ids = [self.bos_id] if bos else []
        for start in range(0, len(text), MAX_CHARS):
            piece = text[start : start + MAX_CHARS]
            cuts = [0]
            for run in _RUN.finditer(piece):
                cuts += range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS)
            for begin, end in pairwise([*cuts, len(piece)]):
                ids += self.model.encode(piece[begin:end], disallowed_special=())
        return ids + [self.eos_id] if eos else ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode([i for i in ids if i < self.vocab_size])

    def token_bytes(self, token_id: int) -> bytes:
        return self.model.decode_single_token_bytes(token_id)

    def encode_template(self, text: str, mark: str) -> list[int]:
        raise NotImplementedError("A tokenizer.model comes without a template.")

    def template_tokens(self, text: str, mark: str) -> list[tuple[int, tuple[int, int]]]:
        raise NotImplementedError("A tokenizer.model comes without a template.")


class JsonTokenizer:
    """Any tokenizer of the tokenizers library: a `tokenizer.json`, or that of a GGUF file."""

    def __init__(
        self,
        model: tokenizers.Tokenizer,
        bos_id: int | None,
        starts_with_bos: bool,
        ends: Sequence[int],
        template: tuple[str, str] | None = None,
    ):
        """ends: tokens that end a text or a turn, beside STOP_TOKENS. template: of chats, and the file it is from."""
        self.model = model
        self.is_byte_level = "ByteLevel" in str(self.model.decoder)
        self.model.no_truncation()
        self.model.no_padding()
        self.model.encode_special_tokens = True
        added = self.model.get_added_tokens_decoder()
        self.special_tokens = {t.content: i for i, t in added.items() if t.special}
        self.added = {i: t.content for i, t in added.items()}
        # Those that the library would decode as if their characters stood for bytes, as in a vocabulary.
        bytes_too = lambda token: not token.isascii() and BYTE_OF.keys() >= set(token)
        self.like_bytes = {i for i, token in self.added.items() if self.is_byte_level and bytes_too(token)}
        self.vocab_size = 1 + max(self.model.get_vocab(with_added_tokens=True).values())
        self.bos_id, self.starts_with_bos = bos_id, starts_with_bos
        self.eos_id = ends[0] if ends else None
        self.stop_ids = frozenset(ends) | {self.special_tokens[t] for t in STOP_TOKENS if t in self.special_tokens}
        self.chat_template: ChatTemplate | None = None
        if template is not None:
            bos, eos = (model.id_to_token(i) or "" if i is not None else "" for i in (self.bos_id, self.eos_id))
            self.chat_template = ChatTemplate(*template, self.special_tokens, bos, eos)
            self.stop_ids |= self.chat_template.ends_of_answer()

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        ids = self.model.encode(text, add_special_tokens=False).ids
        begin = [self.bos_id] if bos and self.bos_id is not None else []
        end = [self.eos_id] if eos and self.eos_id is not None else []
        return [*begin, *ids, *end]

    def encode_template(self, text: str, mark: str) -> list[int]:
        return [id_ for id_, _ in self.template_tokens(text, mark)]

    def template_tokens(self, text: str, mark: str) -> list[tuple[int, tuple[int, int]]]:
        if not mark:
            whole = self._recognising.encode(text, add_special_tokens=False)
            return list(zip(whole.ids, whole.offsets, strict=True))
        assert self.chat_template is not None
        added = {token.content: token for token in self.model.get_added_tokens_decoder().values()}
        pieces = self.chat_template.pieces(text)
        tokens: list[tuple[int, tuple[int, int]]] = []
        end = 0
        for i, (marked, id_) in enumerate(pieces):
            piece = marked.replace(mark, "")
            start, end = end, end + len(piece)
            if id_ is not None:
                tokens.append((id_, (start, end)))
                continue
            if i and added[pieces[i - 1][0]].rstrip:
                piece = piece.lstrip()
                start = end - len(piece)
            if i + 1 < len(pieces) and added[pieces[i + 1][0]].lstrip:
                piece = piece.rstrip()
            found = self.model.encode(piece, add_special_tokens=False)
            tokens += [(each, (start + a, start + b)) for each, (a, b) in zip(found.ids, found.offsets, strict=True)]
        return tokens

    @functools.cached_property
    def _recognising(self) -> tokenizers.Tokenizer:
        """The same tokenizer, to which special tokens in a text are control."""
        other = tokenizers.Tokenizer.from_str(self.model.to_str())
        other.encode_special_tokens = False
        return other

    def decode(self, ids: Sequence[int]) -> str:
        if not self.like_bytes.isdisjoint(ids):
            known = (i for i in ids if self.model.id_to_token(i) is not None)
            return b"".join(map(self.token_bytes, known)).decode(errors="replace")
        return self.model.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        token = self.model.id_to_token(token_id)
        if token is None:
            raise IndexError(f"There is no token {token_id}.")
        if token_id in self.added or (self.is_byte_level and not BYTE_OF.keys() >= set(token)):
            return token.encode()
        if self.is_byte_level:
            return bytes(map(BYTE_OF.__getitem__, token))
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):  # sentencepiece's way to write a byte ...
            return bytes.fromhex(match[1])
        return token.replace("\u2581", " ").encode()  # ... and a space


class TextStream:
    """The text of tokens that come one by one, given out in whole characters.

    A character may be spread over several tokens; what is not yet whole waits. The texts given out, joined, are what
    `decode` makes of all the tokens after the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self.tokenizer = tokenizer
        # Some decoders treat the first token apart (a leading space): what was given out last stays as context.
        self.context = list(prompt)
        self.waiting: list[int] = []

    def add(self, token: int) -> str:
        self.waiting.append(token)
        text = self._text()
        return "" if text.endswith("\ufffd") else self._give(text)

    def end(self) -> str:
        """What is left, half characters as U+FFFD."""
        return self._give(self._text())

    def _text(self) -> str:
        before = self.tokenizer.decode(self.context)
        return self.tokenizer.decode(self.context + self.waiting)[len(before) :]

    def _give(self, text: str) -> str:
        if self.waiting:
            self.context, self.waiting = self.waiting, []
        return text


def read_tokenizer_json(
    path: str,
    bos_id: int | None,
    eos_ids: int | list[int] | None,
    template: tuple[str, str] | None = None,
    n_rows: int | None = None,
) -> JsonTokenizer:
    """bos_id, eos_ids: what config.json says. n_rows: of the model's embedding; added tokens beyond are left out.

    Raises InputError when the file is missing or broken.
    """
    if not blobfile.exists(path):
        raise InputError(f"There is no tokenizer at {path}; fetch it as well.")
    check_files([path])
    try:
        with blobfile.BlobFile(path, "r") as file:
            text = file.read()
        model = tokenizers.Tokenizer.from_str(_without_rowless(text, n_rows, path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(
            f"{path} is not a tokenizer of the tokenizers library ({error}); fetch it again, or update that library "
            "for a newer file."
        ) from None
    framed = model.encode("a")  # what the model expects before a text, and after it
    begin = next((i for i, of_text in enumerate(framed.sequence_ids) if of_text is not None), 0)
    if begin > 1:
        say(f"{path} puts {begin} tokens before a text; only the first, {framed.tokens[0]}, is put here.")
    ends = eos_ids if isinstance(eos_ids, list) else [] if eos_ids is None else [eos_ids]
    return JsonTokenizer(model, framed.ids[0] if begin else bos_id, begin > 0, ends, template)


def _without_rowless(text: str, n_rows: int | None, path: str) -> str:
    """A tokenizer.json without added tokens that the model's embedding has no row for: in texts they are plain text."""
    whole: dict[str, Any] = json.loads(text)
    names = [
        token["content"] for token in whole.get("added_tokens", ()) if n_rows is not None and token["id"] >= n_rows
    ]
    if not names:
        return text
    _say_rowless(path, names)
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] not in names]
    vocabulary = whole["model"]["vocab"]
    if isinstance(vocabulary, dict):
        whole["model"]["vocab"] = {token: i for token, i in vocabulary.items() if token not in names}
    return json.dumps(whole)


def _say_rowless(path: str, names: Sequence[str]) -> None:
    say(f"{path} has tokens that the model has no row for ({', '.join(names)}); they are read as plain text.")


def find_template(folder: str) -> tuple[str, str] | None:
    """A Hugging Face folder's chat template, and the file it is from: chat_template.jinja or tokenizer_config.json.

    Of several templates that named default.
    """
    path = blobfile.join(folder, "chat_template.jinja")
    if blobfile.exists(path):
        return blobfile.read_text(path), path
    path = blobfile.join(folder, "tokenizer_config.json")
    found = read_json(path).get("chat_template") if blobfile.exists(path) else None
    if isinstance(found, list):
        found = next((each.get("template") for each in found if each.get("name") == "default"), None)
    return (found, path) if isinstance(found, str) else None


def load_tokenizer(model_dir: str = TINY_LLAMA_DIR) -> Tokenizer:
    """The tokenizer of a checkpoint: tokenizer.model in Meta's format, tokenizer.json in Hugging Face's, a GGUF file's.

    Raises InputError when it is missing, broken, or does not fit the vocabulary of the model beside it.
    """
    found = preferred_files(str(model_dir))
    if found is not None and found.format == "gguf":
        from llama_3.gguf import gguf_rows, gguf_tokenizer, read_gguf

        file = read_gguf(found.config_path)
        parts = gguf_tokenizer(file)
        tokenizer: Tokenizer = JsonTokenizer(
            parts.model, parts.bos_id, parts.add_bos and parts.bos_id is not None, parts.eos_ids, parts.template
        )
        if parts.rowless:
            _say_rowless(found.config_path, parts.rowless)
        n_rows = gguf_rows(file)
    else:
        config = read_json(found.config_path) if found is not None else {}
        n_rows = config.get("vocab_size")
        tokenizer = _folder_tokenizer(str(model_dir), config, n_rows)
    if isinstance(n_rows, int):
        _check_vocabulary(tokenizer, n_rows, str(model_dir))
    return tokenizer


def _folder_tokenizer(model_dir: str, config: dict[str, Any], n_rows: int | None) -> Tokenizer:
    inside = lambda *parts: blobfile.join(model_dir, *parts)
    original, here = inside("original", "tokenizer.model"), inside("tokenizer.model")
    path = original if blobfile.exists(original) else here
    # TinyLlama's tokenizer.model is sentencepiece's: beside a config.json it is tokenizer.json that counts.
    in_json = blobfile.exists(inside("tokenizer.json")) or not blobfile.exists(path)
    if not (in_json and blobfile.exists(inside("config.json"))):
        check_files([path] if blobfile.exists(path) else [])
        return TiktokenTokenizer(read_ranks(path))
    generation, settings = inside("generation_config.json"), inside("tokenizer_config.json")
    ids = config | (read_json(generation) if blobfile.exists(generation) else {})
    bos_id, eos_ids = ids.get("bos_token_id"), ids.get("eos_token_id")
    for name, value in (("bos_token_id", bos_id), ("eos_token_id", eos_ids)):
        several = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if any(type(id_) is not int and id_ is not None for id_ in several):
            raise InputError(f"{model_dir} says {name} {json.dumps(value)}; write the token's number, or null, there.")
    tokenizer = read_tokenizer_json(inside("tokenizer.json"), bos_id, eos_ids, find_template(model_dir), n_rows)
    if blobfile.exists(settings) and read_json(settings).get("add_bos_token") and not tokenizer.starts_with_bos:
        say(
            f"{settings} says add_bos_token, but tokenizer.json puts no begin-of-text before a text: prompts begin "
            "without it, as with transformers 5 (llama.cpp and transformers 4 add it)."
        )
    return tokenizer


def _check_vocabulary(tokenizer: Tokenizer, n_rows: int, model_dir: str) -> None:
    """Raise InputError where the model cannot read the tokenizer's tokens. It may have rows that no token uses."""
    if tokenizer.vocab_size > n_rows:
        raise InputError(
            f"The tokenizer in {model_dir} has {tokenizer.vocab_size} tokens, its model {n_rows}; "
            "the two belong to different models."
        )
    if tokenizer.bos_id is not None and not 0 <= tokenizer.bos_id < n_rows:
        raise InputError(
            f"The tokenizer in {model_dir} has begin-of-text {tokenizer.bos_id}, its model {n_rows} tokens; "
            "the two belong to different models."
        )
    if n_rows >= tokenizer.vocab_size + _PADDING:
        say(
            f"The tokenizer in {model_dir} has {tokenizer.vocab_size} tokens, its model rows for {n_rows}; the others "
            "are taken for padding."
        )
