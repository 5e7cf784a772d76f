"""Activation patching: which activations of a clean prompt restore its answer in a corrupted one.

The corrupted prompt runs with one activation replaced by the clean run's. What that restores of the logit difference
between the clean answer and the corrupted one is normalised: 0 as in the corrupted run, 1 as in the clean one (Wang et
al. 2022, arXiv:2211.00593; Heimersheim and Nanda 2024, arXiv:2404.15255). Attribution patching approximates the whole
map from one backward pass: the gradient of the corrupted run times the difference of activations (Nanda 2023).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama_3.model import Transformer
from llama_3.tokenizer import Tokenizer
from microscope.prompts import Prompt, answer_ids, check_aligned, token_text
from microscope.sweeps import Sweep
from pipeline.errors import InputError


class Contrast(NamedTuple):
    """Two runs and what is measured: the answer's logit minus the other's."""

    clean: Prompt
    corrupted: Prompt
    answer: int
    other: int

    @property
    def first(self) -> int:
        """The first position at which the prompts differ: before it, so do no activations."""
        pairs = zip(self.clean.ids, self.corrupted.ids, strict=True)
        return next(i for i, (a, b) in enumerate(pairs) if a != b)

    def difference(self, logits: Tensor) -> Tensor:
        """(rows,) logit differences after the last token; logits: (rows, seq, vocab_size)."""
        return logits[:, -1, self.answer] - logits[:, -1, self.other]

    def ends(self, model: Transformer) -> tuple[float, float]:
        """The clean run's difference and the corrupted run's. Raises InputError if they are the same."""
        with torch.inference_mode():
            both = (model(each.batch(model), last_only=True) for each in (self.clean, self.corrupted))
            clean, corrupted = (float(self.difference(logits)) for logits in both)
        if abs(clean - corrupted) < 1e-6:
            raise InputError(
                f"Both prompts give the same logit difference, {clean:.3f}, so there is none to restore; name other "
                "answers or prompts."
            )
        return clean, corrupted


def contrast_of(
    model: Transformer, tokenizer: Tokenizer, clean: Prompt, corrupted: Prompt, answers: Sequence[str]
) -> Contrast:
    """answers: the clean prompt's and the corrupted one's; the likeliest tokens where there are fewer than two.

    Raises InputError for prompts that do not align, and answers that do not tell them apart.
    """
    check_aligned(clean, corrupted)
    ids = answer_ids(tokenizer, answers)
    for each in (clean, corrupted)[len(ids) :]:
        with torch.inference_mode():
            ids.append(int(model(each.batch(model), last_only=True)[0, -1].argmax()))
    if ids[0] == ids[1]:
        raise InputError(f"Both answers are {token_text(tokenizer, ids[0])!r}; name two different ones.")
    return Contrast(clean, corrupted, ids[0], ids[1])


def normalised(differences: Tensor, ends: tuple[float, float]) -> Tensor:
    clean, corrupted = ends
    return (differences - corrupted) / (clean - corrupted)


@torch.inference_mode()
def patch_map(model: Transformer, contrast: Contrast, sites: Sequence[str], ends: tuple[float, float]) -> Tensor:
    """(len(sites), seq): what each site restores at each position alone. sites: of width d_model."""
    return torch.stack(list(patch_rows(model, contrast, sites, ends)))


def patch_rows(
    model: Transformer, contrast: Contrast, sites: Sequence[str], ends: tuple[float, float]
) -> Iterator[Tensor]:
    """The rows of `patch_map`, (seq,), one by one."""
    sweep = Sweep(model, contrast.corrupted, contrast.first)
    with torch.inference_mode():
        clean = model.activations(contrast.clean.batch(model), list(sites))
    for site in sites:
        source = clean[site][0, contrast.first :]  # (seq - first, d_model)

        def patch(x: Tensor, positions: Tensor, source: Tensor = source) -> Tensor:
            x[torch.arange(len(positions)), positions] = source[positions]
            return x

        restored = _restored(sweep, contrast, site, patch, len(source), ends)
        yield torch.cat([torch.zeros(contrast.first), restored])  # both runs are the same before


@torch.inference_mode()
def patch_heads(model: Transformer, contrast: Contrast, ends: tuple[float, float]) -> Tensor:
    """(n_layers, n_heads): what the output of each head restores, patched at all positions."""
    sweep = Sweep(model, contrast.corrupted, contrast.first)
    sites = [f"layers.{i}.head_out" for i in range(model.args.n_layers)]
    clean = model.activations(contrast.clean.batch(model), sites)
    rows = []
    for site in sites:
        source = clean[site][0, contrast.first :]  # (seq - first, n_heads, head_dim)

        def patch(x: Tensor, heads: Tensor, source: Tensor = source) -> Tensor:
            x[torch.arange(len(heads)), :, heads] = source[:, heads].transpose(0, 1)
            return x

        rows.append(_restored(sweep, contrast, site, patch, model.args.n_heads, ends))
    return torch.stack(rows)


def _restored(
    sweep: Sweep,
    contrast: Contrast,
    site: str,
    patch: Callable[[Tensor, Tensor], Tensor],
    n_variants: int,
    ends: tuple[float, float],
) -> Tensor:
    """(n_variants,): what each of the corrupted prompt's variants restores. patch: (activations at the site, numbers of
    the variants) -> the activations with each variant's part replaced."""
    parts = [
        contrast.difference(sweep.logits(site, lambda x, part=part: patch(x, part), len(part), last_only=True)).cpu()
        for part in torch.arange(n_variants).split(sweep.n_rows)
    ]
    return normalised(torch.cat(parts), ends)


def attribution_patch(
    model: Transformer, contrast: Contrast, sites: Sequence[str], ends: tuple[float, float]
) -> Tensor:
    """`patch_map` to first order, from one forward pass of each prompt and one backward pass."""
    with torch.no_grad():
        clean = model.activations(contrast.clean.batch(model), list(sites))
    found: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for site in sites:

            def keep(x: Tensor, site: str = site) -> Tensor:
                found[site] = x if x.requires_grad else x.requires_grad_()
                return found[site]

            stack.enter_context(model.intervene(site, keep))
        difference = contrast.difference(model(contrast.corrupted.batch(model)))
    gradients = torch.autograd.grad(difference.sum(), [found[site] for site in sites])
    changes = [
        (gradient * (clean[site] - found[site].detach())).sum(-1)[0]
        for site, gradient in zip(sites, gradients, strict=True)
    ]
    return torch.stack(changes).cpu() / (ends[0] - ends[1])
