"""Which latents fire on the same tokens: pairs counted a block at a time, and what the counts say."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from latents.tables import Table

_COUNTED_AT_ONCE = 2**21  # pairs of latents: their counts fit a cache
FLOW = Table(
    "flow.parquet",
    "latent_flow.py",
    "latents of the next SAE in depth",
    pa.schema(
        {
            "latent": pa.int32(),
            "rank": pa.int32(),  # 0: the highest phi
            "next_sae": pa.string(),  # its name in the suite
            "next_latent": pa.int32(),
            "firings": pa.int64(),  # of the latent, on the tokens counted
            "next_firings": pa.int64(),
            "both": pa.int64(),
            "probability": pa.float32(),  # that next_latent fires where the latent does
            "phi": pa.float32(),
            "read_cosine": pa.float32(),  # of what their encoders read
            "cosine": pa.float32(),  # of their directions, which they write
            "mutual": pa.bool_(),  # each is the other's highest phi
        }
    ),
)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Rows of latents one below the other, filled up with -1 to the width of the widest."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[1]), value=-1) for part in parts])


def firings(tokens: Tensor, n_latents: int) -> Tensor:
    """(n_latents,) tokens on which each latent fired. tokens: (n_tokens, width), their latents, -1 for none."""
    return tokens[tokens >= 0].long().bincount(minlength=n_latents)


def pair_counts(tokens: Tensor, others: Tensor, n_latents: int, n_others: int) -> Iterator[tuple[int, Tensor]]:
    """On how many tokens two latents fire together: (first, counts), counts (height, n_others) int64 of the latents
    first, first + 1, ... A block of latents at a time, which bounds memory.

    tokens, others: (n_tokens, width) each, the latents of each token, -1 for none.
    """
    token, slot = (tokens >= 0).nonzero(as_tuple=True)
    latent = tokens[token, slot].long()
    order = latent.argsort(stable=True)
    fired = latent.bincount(minlength=n_latents)
    ends = fired.cumsum(0)
    height = max(1, _COUNTED_AT_ONCE // (n_others + 1))
    for first in range(0, n_latents, height):
        last = min(first + height, n_latents)
        counts = torch.zeros((last - first) * (n_others + 1), dtype=torch.int64)
        own = order[ends[first] - fired[first] : ends[last - 1]]
        for part in own.split(max(1, _COUNTED_AT_ONCE // max(1, others.shape[1]))):
            # Column 0 collects the -1 of tokens on which fewer fired.
            pairs = (latent[part] - first)[:, None] * (n_others + 1) + others[token[part]] + 1
            counts += pairs.flatten().bincount(minlength=len(counts))
        yield first, counts.view(last - first, n_others + 1)[:, 1:]


def phi(both: Tensor, fired: Tensor, others_fired: Tensor, n_tokens: int) -> Tensor:
    """The correlation of firing (Yule's phi, Matthews' coefficient), float64; 0 where one never or always fires. The
    arguments, counts of tokens, are broadcast."""
    a, b, both = fired.double(), others_fired.double(), both.double()
    variance = a * (n_tokens - a) * b * (n_tokens - b)
    return torch.where(variance > 0, (both * n_tokens - a * b) / variance.clamp(min=1).sqrt(), 0.0)


class Associations(NamedTuple):
    """The latents of the next SAE that go best with each latent, (n_latents, n_kept) each, highest phi first."""

    latents: Tensor  # -1: no further one
    both: Tensor
    phi: Tensor
    best_before: Tensor  # (n_others,) for each latent of the next SAE the latent of highest phi; -1: none


def associate(
    tokens: Tensor, others: Tensor, n_latents: int, n_others: int, n_kept: int, least_firings: int
) -> Associations:
    """Pairs of latents by phi, of those that both fire on at least `least_firings` tokens, and on one together.

    tokens, others: as for `pair_counts`. Ties go to the lower latent.
    """
    n_tokens, n_kept = len(tokens), min(n_kept, n_others)
    fired, others_fired = firings(tokens, n_latents), firings(others, n_others)
    latents = torch.full((n_latents, n_kept), -1, dtype=torch.int64)
    both, values = torch.zeros_like(latents), torch.zeros(n_latents, n_kept, dtype=torch.float64)
    best, best_before = torch.zeros(n_others, dtype=torch.float64), torch.full((n_others,), -1, dtype=torch.int64)
    for first, counts in pair_counts(tokens, others, n_latents, n_others):
        own = slice(first, first + len(counts))
        found = phi(counts, fired[own, None], others_fired, n_tokens)
        found[(counts == 0) | (fired[own, None] < least_firings) | (others_fired < least_firings)] = 0
        found.clamp_(min=0)
        # Integers that sort by phi, then by latent: topk does not define the order of ties.
        ranked = (found * 2**40).long() * n_others + torch.arange(n_others - 1, -1, -1)
        places = n_others - 1 - ranked.topk(n_kept).values % n_others
        values[own] = found.gather(1, places)
        latents[own] = places.masked_fill(values[own] == 0, -1)
        both[own] = counts.gather(1, places).masked_fill(values[own] == 0, 0)
        highest = found.amax(0)
        where = (found == highest).int().argmax(0)  # the first of equal ones
        better = highest > best
        best[better], best_before[better] = highest[better], where[better] + first
    return Associations(latents, both, values, best_before)
