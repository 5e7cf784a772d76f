"""Prompts as tokens, the answers asked about, two prompts side by side."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latents.markup import visible, visible_token
from llama_3.generation import check_context, encode_text, generate
from llama_3.model import Transformer
from llama_3.tokenizer import Tokenizer
from pipeline.errors import InputError

MOST_PATTERN_BYTES = 2**31  # of all attention patterns of a prompt


class Prompt(NamedTuple):
    ids: list[int]
    tokens: list[str]  # each to be shown: spaces and line breaks are visible

    def batch(self, model: Transformer, n_rows: int = 1) -> Tensor:
        """(n_rows, seq) on the model's device."""
        return torch.tensor([self.ids], device=model.device).expand(n_rows, -1)

    def position(self, position: int | None) -> int:
        """The position asked for, the last for None. Raises InputError if there is none."""
        if position is None:
            return len(self.ids) - 1
        if not 0 <= position < len(self.ids):
            raise InputError(f"There is no position {position}; this prompt has positions 0 to {len(self.ids) - 1}.")
        return position


def read_prompt(model: Transformer, tokenizer: Tokenizer, text: str) -> Prompt:
    """A text as the model reads it, after begin-of-text where the model knows it. Raises InputError if too long."""
    ids = encode_text(tokenizer, text)
    check_context(model, len(ids), 1)
    return Prompt(ids, [token_text(tokenizer, each) for each in ids])


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    return visible_token(tokenizer.decode([token_id]))


def continuation(model: Transformer, tokenizer: Tokenizer, ids: list[int], new_tokens: int) -> str:
    """What the model writes after a prompt, always the likeliest token; on one line, to be shown."""
    steps = generate(model, [ids], new_tokens, tokenizer.stop_ids)
    written = [token for (token,) in steps if token is not None]
    text = tokenizer.decode([*ids, *written])[len(tokenizer.decode(ids)) :]
    return visible(text).replace("\n", "↵")


def answer_id(tokenizer: Tokenizer, text: str) -> int:
    """The token that an answer is. Raises InputError for an answer of several tokens."""
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        first = tokenizer.decode(ids[:1]) if ids else ""
        raise InputError(
            f"The answer {text!r} is {len(ids)} tokens; give one that is a single token, with its space, "
            f"such as {first!r}."
        )
    return ids[0]


def answer_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """The tokens that answers are: the answer, and one to compare with. Raises InputError for more."""
    if len(texts) > 2:
        raise InputError(f"There are {len(texts)} answers; give the answer and at most one to compare with.")
    return [answer_id(tokenizer, text) for text in texts]


def check_aligned(clean: Prompt, corrupted: Prompt) -> list[int]:
    """The positions at which two prompts differ. Raises InputError unless they have as many tokens and differ."""
    if len(clean.ids) != len(corrupted.ids):
        raise InputError(
            f"The prompts do not align: {len(clean.ids)} tokens ({' '.join(clean.tokens)}) and {len(corrupted.ids)} "
            f"({' '.join(corrupted.tokens)}); change a word for one of as many tokens."
        )
    differing = [i for i, (a, b) in enumerate(zip(clean.ids, corrupted.ids, strict=True)) if a != b]
    if not differing:
        raise InputError("Both prompts are the same; change a word in the second.")
    return differing


def check_pattern_size(model: Transformer, n_layers: int, n_tokens: int) -> None:
    """Raise InputError if the patterns of so many layers do not fit the memory set aside for them."""
    needed = 4 * n_layers * model.args.n_heads * n_tokens**2
    if needed > MOST_PATTERN_BYTES:
        raise InputError(
            f"Attention patterns of {n_tokens:,} tokens ({n_layers} x {model.args.n_heads} heads) would take "
            f"{needed / 1e9:.1f} GB, above the limit of {MOST_PATTERN_BYTES / 1e9:.1f} GB; shorten the prompt."
        )
