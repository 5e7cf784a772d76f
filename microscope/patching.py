"""Activation patching: which activations of a clean prompt restore its answer in a corrupted one.

The corrupted prompt runs with one activation replaced by the clean run's. What that restores of the logit difference
between the clean answer and the corrupted one is normalised: 0 as in the corrupted run, 1 as in the clean one (Wang et
al. 2022, arXiv:2211.00593; Heimersheim and Nanda 2024, arXiv:2404.15255). Attribution patching approximates the whole
map from one backward pass: the gradient of the corrupted run times the difference of activations (Nanda 2023).
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama_3.model import Transformer
from microscope.prompts import Prompt

_ROWS = 32  # copies of the prompt computed together


class Contrast(NamedTuple):
    """Two runs and what is measured: the answer's logit minus the other's."""

    clean: Prompt
    corrupted: Prompt
    answer: int
    other: int

    def difference(self, logits: Tensor) -> Tensor:
        """(rows,) logit differences after the last token; logits: (rows, seq, vocab_size)."""
        return logits[:, -1, self.answer] - logits[:, -1, self.other]

    def ends(self, model: Transformer) -> tuple[float, float]:
        """The clean run's difference and the corrupted run's."""
        with torch.inference_mode():
            clean, corrupted = (self.difference(model(each.batch(model))) for each in (self.clean, self.corrupted))
        return float(clean), float(corrupted)


def normalised(differences: Tensor, ends: tuple[float, float]) -> Tensor:
    clean, corrupted = ends
    return (differences - corrupted) / (clean - corrupted)


@torch.inference_mode()
def patch_map(model: Transformer, contrast: Contrast, sites: Sequence[str], ends: tuple[float, float]) -> Tensor:
    """(len(sites), seq): what each site restores at each position alone. sites: of width d_model."""
    return torch.stack(
        [_patched(model, contrast, site, torch.arange(len(contrast.clean.ids)), slice(None), ends) for site in sites]
    )


@torch.inference_mode()
def patch_heads(model: Transformer, contrast: Contrast, ends: tuple[float, float]) -> Tensor:
    """(n_layers, n_heads): what the output of each head restores, patched at all positions."""
    heads = torch.arange(model.args.n_heads)
    return torch.stack(
        [
            _patched(model, contrast, f"layers.{i}.head_out", slice(None), heads, ends)
            for i in range(model.args.n_layers)
        ]
    )


def _patched(
    model: Transformer,
    contrast: Contrast,
    site: str,
    positions: Tensor | slice,
    heads: Tensor | slice,
    ends: tuple[float, float],
) -> Tensor:
    """One variant per position or per head, whichever is a tensor: a copy of the corrupted prompt with one patch."""
    source = model.activations(contrast.clean.batch(model), site)[0]  # (seq, ...)
    variants = positions if isinstance(positions, Tensor) else heads
    assert isinstance(variants, Tensor)
    parts = []
    for part in variants.split(_ROWS):

        def patch(x: Tensor, part: Tensor = part) -> Tensor:
            rows = torch.arange(len(part))
            if isinstance(positions, Tensor):
                x[rows, part] = source[part]
            else:
                x[rows, :, part] = source[:, part].transpose(0, 1)
            return x

        with model.intervene(site, patch):
            parts.append(contrast.difference(model(contrast.corrupted.batch(model, len(part)))).cpu())
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
