"""Gemma Scope (Lieberum et al. 2024, arXiv:2408.05147): params.npz with W_enc (d_model, n_latents), W_dec (n_latents,
d_model), b_enc, b_dec, threshold (n_latents), float32.

    h = ReLU(W_enc x + b_enc), kept above each latent's threshold
    x_hat = W_dec h + b_dec
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats.common import Foreign, Ours, Place, above, need_autoencoder, need_gate, raw, read_npz
from sae import Kind, SparseAutoencoder

MARKERS = "params.npz, or another .npz file"
FILE = "params.npz"


def find(place: Place) -> Foreign | None:
    path = place.path / FILE if place.has(FILE) else place.path
    if path.suffix != ".npz":
        return None
    names = {"w_enc": "W_enc", "w_dec": "W_dec"}  # as some files have them
    return Foreign(place.path, {names.get(name, name): tensor for name, tensor in read_npz(path).items()}, {})


def weights(foreign: Foreign) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    W_enc = foreign.tensor("W_enc", None, None).t()
    n_latents, d_model = W_enc.shape
    return (
        W_enc,
        foreign.tensor("b_enc", n_latents),
        foreign.tensor("W_dec", n_latents, d_model),
        foreign.tensor("b_dec", d_model),
    )


def to_ours(foreign: Foreign) -> Ours:
    parts = weights(foreign)
    threshold = foreign.tensor("threshold", len(parts[0]))
    return Ours(*parts, Kind("jumprelu", "none", centred=False), threshold=threshold)


def formula(foreign: Foreign, x: Tensor) -> tuple[Tensor, Tensor]:
    W_enc, b_enc, W_dec, b_dec = weights(foreign)
    h = above(x @ W_enc.t() + b_enc, foreign.tensors["threshold"].float())
    return h, h @ W_dec + b_dec


def write(sae: SparseAutoencoder, folder: Path) -> None:
    need_autoencoder(sae, "Gemma Scope's format")
    need_gate(sae, "Gemma Scope's format", "jumprelu", "relu")
    parts = raw(sae, "Gemma Scope's format")
    threshold = torch.zeros(len(parts.W_enc)) if parts.threshold is None else parts.threshold
    arrays = {"W_enc": parts.W_enc.t(), "W_dec": parts.W_dec, "b_enc": parts.b_enc, "b_dec": parts.b_dec}
    arrays["threshold"] = threshold
    contiguous: dict[str, Any] = {name: np.ascontiguousarray(array.detach()) for name, array in arrays.items()}
    np.savez(folder / FILE, **contiguous)
