"""Where heads look: their patterns on a prompt, and scores that tell kinds of heads apart.

Scores are taken on a random sequence of tokens that is read twice, which no head can know from training (Olsson et al.
2022, arXiv:2209.11895, "In-context Learning and Induction Heads").
"""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from llama_3.model import Transformer
from microscope.prompts import Prompt, check_pattern_size


class HeadScores(NamedTuple):
    """Mean weight, each (n_layers, n_heads), that a head gives from a token of the second reading to ..."""

    induction: Tensor  # the token after this one's first occurrence
    previous: Tensor  # the token before
    first: Tensor  # the very first token


@torch.inference_mode()
def patterns(model: Transformer, prompt: Prompt, layers: list[int]) -> Tensor:
    """(len(layers), n_heads, query, key) on the CPU. Raises InputError where they would take too much memory."""
    check_pattern_size(model, len(layers), len(prompt.ids))
    sites = [f"layers.{i}.attention_pattern" for i in layers]
    found = model.activations(prompt.batch(model), sites)
    return torch.stack([found[site][0].float().cpu() for site in sites])


def repeated_tokens(vocab: list[int], n_tokens: int, seed: int, bos_id: int | None) -> list[int]:
    """n_tokens random tokens twice, after begin-of-text where the model knows it. vocab: the ids to draw from."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [vocab[int(i)] for i in torch.randint(len(vocab), (n_tokens,), generator=generator)]
    return [*([] if bos_id is None else [bos_id]), *drawn, *drawn]


@torch.inference_mode()
def head_scores(model: Transformer, tokens: list[int], n_tokens: int) -> HeadScores:
    """Scores on a sequence whose last 2 n_tokens tokens are the same n_tokens twice."""
    check_pattern_size(model, 1, len(tokens))
    queries = torch.arange(len(tokens) - n_tokens, len(tokens))
    scores: list[list[Tensor]] = [[], [], []]
    batch = torch.tensor([tokens], device=model.device)

    def keep(pattern: Tensor) -> Tensor:
        for kind, keys in zip(scores, (queries - n_tokens + 1, queries - 1, queries * 0), strict=True):
            kind.append(pattern[0][:, queries, keys].float().mean(-1).cpu())
        return pattern

    with contextlib.ExitStack() as stack:
        for layer in range(model.args.n_layers):  # each layer's pattern is dropped after its scores
            stack.enter_context(model.intervene(f"layers.{layer}.attention_pattern", keep))
        model.activations(batch, f"layers.{model.args.n_layers - 1}.head_out")
    return HeadScores(*(torch.stack(kind) for kind in scores))
