"""The Llama 3 tokenizer: byte-level BPE by tiktoken, from a `tokenizer.model` of base64 tokens and ranks.

The split pattern and the special tokens are Meta's published ones; the 256 special tokens follow the last rank.
"""

import base64
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import blobfile
import tiktoken

from stage import InputError

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
        raise InputError(f"{path} is not a tokenizer in tiktoken's format ({error}); fetch it again.") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise InputError(f"{path} is not a whole tokenizer: its ranks are not 0 to n - 1; fetch it again.")
    return ranks


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    path.write_bytes(b"".join(base64.b64encode(token) + b" " + str(rank).encode() + b"\n" for token, rank in in_order))


class Tokenizer:
    """Text to token ids and back. Special tokens written in a text are text, never control."""

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
        """Text of the tokens; bytes that are not whole UTF-8 characters become U+FFFD."""
        return self.model.decode(list(ids))

    def token_bytes(self, token_id: int) -> bytes:
        return self.model.decode_single_token_bytes(token_id)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())
