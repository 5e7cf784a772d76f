"""Whether two programs make the same of an SAE: latents, their support, and the reconstruction, on given activations.

Near a gate's edge (the k-th highest pre-activation, a threshold) rounding decides whether a latent is kept. A latent
that only one of the two keeps counts as a difference unless its value lies within EDGE of the smallest that could be
kept.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae import SparseAutoencoder

TOLERANCE = 1e-4  # of latents and reconstruction, relative to the largest of each
EDGE = 1e-4  # of a latent's value, relative


class Difference(NamedTuple):
    latents: float  # largest, relative to the largest latent
    x_hat: float  # largest, relative to the largest number in the reconstruction
    support: int  # latents that one keeps and the other does not
    at_edge: int  # such latents where rounding decides; not in `support`, nor their rows in the others
    l0: float  # kept latents per activation
    rows: int

    @property
    def is_small(self) -> bool:
        return self.latents <= TOLERANCE and self.x_hat <= TOLERANCE and self.support == 0 and self.at_edge < self.rows

    def __str__(self) -> str:
        edge = f" ({self.at_edge} more at a gate's edge, where rounding decides)" if self.at_edge else ""
        return (
            f"largest difference over {self.rows} activations, {self.l0:.1f} latents each: latents {self.latents:.1e}, "
            f"reconstruction {self.x_hat:.1e}, relative; support {self.support}{edge}"
        )


def made_up_activations(sae: SparseAutoencoder, n: int = 256, seed: int = 0) -> Tensor:
    """Raw activations (n, d_model) on which the SAE fires: sums of its own directions, its bias, and noise.

    For where there is no model. Some are as it reconstructs, some far away.
    """
    generator = torch.Generator().manual_seed(seed)
    n_fire = min(sae.n_latents, sae.k or 32)
    indices = torch.stack([torch.randperm(sae.n_latents, generator=generator)[:n_fire] for _ in range(n)])
    norms = sae.encoder.weight.float().norm(dim=1)
    size = 1 if sae.threshold is None else 2 * float(sae.threshold[sae.threshold.isfinite()].median()) + 1
    values = size * torch.rand(n, n_fire, generator=generator) / norms[indices].clamp(min=1e-6)
    with torch.no_grad():
        directions = torch.nn.functional.normalize(sae.encoder.weight.float(), dim=1)
        z = torch.einsum("nk,nkd->nd", values, directions[indices])
        z = z + (sae.b_pre if sae.kind.centred else 0)
    noise = torch.randn(z.shape, generator=generator) * z.std() * 0.1
    std = 0.5 + 5 * torch.rand(n, 1, generator=generator)  # of each activation, where that is normalised away
    return (z + noise) * std if sae.kind.normalization == "layer_norm" else (z + noise) / sae.kind.scale


@torch.no_grad()
def ours(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense latents (n, n_latents) and x_hat (n, d_model)."""
    values, indices = sae.encode(x)
    return torch.zeros(len(x), sae.n_latents).scatter_add_(1, indices, values), sae(x)


def difference(sae: SparseAutoencoder, x: Tensor, theirs: tuple[Tensor, Tensor]) -> Difference:
    """Of what the SAE makes of raw x and what another program makes of it."""
    latents, x_hat = ours(sae, x)
    their_latents, their_x_hat = (part.detach().float() for part in theirs)
    one_only = (latents > 0) != (their_latents > 0)
    value = torch.maximum(latents, their_latents)
    at_edge = one_only & ((value - edges(sae, latents)).abs() <= EDGE * value.clamp(min=float(latents.max()) * 1e-3))
    sound = ~at_edge.any(1)
    largest = lambda part: float(part[sound].abs().max()) if sound.any() else 0.0
    size = lambda part: max(float(part.abs().max()), 1e-30)
    return Difference(
        largest(latents - their_latents) / size(latents),
        largest(x_hat - their_x_hat) / size(x_hat),
        int((one_only & ~at_edge).sum()),
        int(at_edge.any(1).sum()),
        float((latents > 0).float().sum(1).mean()),
        len(x),
    )


def edges(sae: SparseAutoencoder, latents: Tensor) -> Tensor:
    """The smallest value that a latent can have and be kept, in each row: (n, n_latents), or broadcast to it."""
    if sae.kind.gate == "topk":
        return torch.where(latents > 0, latents, torch.inf).amin(1, keepdim=True)
    return torch.zeros(()) if sae.threshold is None else sae.threshold.clamp(min=0)
