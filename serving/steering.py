"""Steer a model by latents of its sparse autoencoder: five modes, each an intervention at the SAE's site.

With z the normalised activation, v_i the value of latent i where the gate keeps it (else 0), d_i its direction, s_i its
strength and m_i its highest observed activation, each mode changes the reconstruction z_hat = sum v_i d_i + b_pre by

    h_bias  to what encoding gives with s_i m_i added to the latent's pre-activation (the published way)
    add     s_i m_i d_i
    clamp   (s_i m_i - v_i) d_i
    scale   (s_i - 1) v_i d_i
    ablate  -v_i d_i

times the activation's std (of an SAE without a normalisation by activation: a constant, `SparseAutoencoder.normalize`).
With `keep_error` the change is added to the activation itself, so what the SAE does not
reconstruct stays; without, the changed reconstruction replaces the activation. benchmarks/steering.py compares them.
Clamping follows Templeton et al. 2024, "Scaling Monosemanticity", under "Influence on Behavior". A transcoder steers
at its target site, where its directions are; its latents' values are known only at its input, so it can only `add`.

Control vectors from files need no SAE: each is added to the residual stream of every token, begin-of-text included,
times its scale, as llama.cpp does (microscope/control.py).
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from latents import tables
from llama_3.model import Intervention
from pipeline.errors import InputError
from pipeline.sae_files import SaeFiles
from sae import SparseAutoencoder
from serving.modes import DEFAULT_MODE, MODES, Mode

S = TypeVar("S", float, float | None)

_MOST = 1_000_000  # of a strength; the model's sums of squares overflow long after


class Steering(NamedTuple):
    """What a user asks for; without strengths and control vectors nothing is steered."""

    strengths: Mapping[int, float] = {}  # latent -> strength, in multiples of its highest activation
    mode: Mode = DEFAULT_MODE
    keep_error: bool = True
    control_vectors: Mapping[str, float] = {}  # name -> scale

    @property
    def steers(self) -> bool:
        return bool(self.strengths or self.control_vectors)


def make_steering(
    sae: SparseAutoencoder, steering: Steering, highest: Tensor | None, bos_id: int | None
) -> Intervention:
    """For `generate(steering=...)` and `model.intervene(*...)`: `steering_function` at the SAE's output site.

    bos_id: begin-of-text keeps its activations, since no SAE here was trained on it; None if the model has none.
    """
    function = steering_function(sae, steering.strengths, highest, steering.mode, steering.keep_error)
    return Intervention(sae.output_site, function, () if bos_id is None else (bos_id,))


def steering_function(
    sae: SparseAutoencoder,
    strengths: Mapping[int, float],
    highest: Tensor | None,
    mode: Mode = DEFAULT_MODE,
    keep_error: bool = True,
) -> Callable[[Tensor], Tensor]:
    """Raw x (..., d_model) at the SAE's output site -> the same shape and dtype, steered.

    strengths: latent -> strength, in multiples of `highest`; in mode scale the factor itself.
    highest: (n_latents,), each latent's highest observed activation, normalised space (`highest_activations`); None
    if unknown: strengths are then plain activations.
    With keep_error, strength 0 (h_bias, add) and factor 1 (scale) return x bit for bit. The function holds all its
    state and changes none: requests share only the SAE. Raises InputError as `check_latents` does, and for a transcoder
    that is to do more than `add`.
    """
    if highest is None:
        highest = torch.ones(sae.n_latents)
    check_latents(strengths, highest, mode)
    if len(highest) != sae.n_latents:
        raise InputError(
            f"There are {len(highest)} highest activations for {sae.n_latents} latents; "
            "run capture_top_activating_sentences.py with this SAE."
        )
    if sae.kind.target_site is not None and not (mode == "add" and keep_error):
        raise InputError(
            f"A transcoder's latents cannot be changed where it writes ({sae.kind.target_site}), only added to it; "
            "choose mode add and keep the error."
        )
    device = sae.b_pre.device
    latents = torch.tensor(list(strengths), dtype=torch.long, device=device)
    factors = torch.tensor([float(s) for s in strengths.values()], device=device)
    values_at = factors * highest.to(device, torch.float32)[latents]  # strength x highest
    directions = sae.decoder.weight.t()[latents]  # (n_steered, d_model)
    h_bias = torch.zeros(sae.n_latents, device=device).index_add(0, latents, values_at)

    def change(z: Tensor) -> Tensor:
        """What to add to the reconstruction of z, normalised space; broadcasts to z's shape."""
        if mode == "h_bias":
            return sae.decode(*sae.encode_normalized(z, h_bias)) - sae.decode(*sae.encode_normalized(z))
        if mode == "add":
            return values_at.to(directions.dtype) @ directions
        values, indices = sae.encode_normalized(z)
        kept = (values[..., None, :] * (indices[..., None, :] == latents[:, None])).sum(-1)  # (..., n_steered)
        changed = {"clamp": values_at.expand_as(kept), "scale": kept * factors, "ablate": torch.zeros_like(kept)}
        return (changed[mode] - kept).to(directions.dtype) @ directions

    def steer(x: Tensor) -> Tensor:
        if sae.kind.target_site is not None:
            return (x + change(x) / sae.kind.target_scale).to(x.dtype)
        z, mean, std = sae.normalize(x)
        if keep_error:
            return (x + change(z) * std).to(x.dtype)
        return ((sae.decode(*sae.encode_normalized(z)) + change(z)) * std + mean).to(x.dtype)

    return steer


def check_latents(strengths: Mapping[int, float], highest: Tensor, mode: str = DEFAULT_MODE) -> None:
    """Raise InputError for an unknown mode, a latent outside range(n_latents), one that never fired, or a strength that
    is not a number or too large to compute with. highest: (n_latents,)."""
    if mode not in MODES:
        raise InputError(f"There is no steering mode {mode!r}; choose one of {', '.join(MODES)}.")
    for latent, strength in strengths.items():
        if not 0 <= latent < len(highest):
            raise InputError(f"There is no latent {latent}; this SAE has latents 0 to {len(highest) - 1}.")
        if not highest[latent] > 0:
            raise InputError(f"Latent {latent} never fired; choose a living one.")
        if not isinstance(strength, (int, float)) or not abs(strength) <= _MOST:  # nan is not either
            raise InputError(
                f"Latent {latent} cannot have strength {strength}; give a number from {-_MOST:,} to {_MOST:,}."
            )


def check_scales(scales: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise InputError for a control vector that was not opened, or a scale that is no usable number."""
    for name, scale in scales.items():
        if name not in known:
            there = f"open are {', '.join(known)}" if known else "none is open; name its file with --control_vectors"
            raise InputError(f"There is no control vector {name!r}; {there}.")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) <= _MOST:
            raise InputError(
                f"The control vector {name} cannot have scale {scale}; give a number from {-_MOST:,} to {_MOST:,}."
            )


def highest_activations(sae_path: str | Path, n_latents: int | None = None) -> Tensor:
    """(n_latents,) float32, each latent's highest activation in NAME.latents.parquet, 0 for one that never fired.

    Raises InputError where the file is missing, unreadable or of another SAE.
    """
    return torch.from_numpy(tables.highest_activations(SaeFiles(sae_path).beside(tables.LATENTS.suffix), n_latents))


def known_highest(sae_path: str | Path, n_latents: int) -> Tensor | None:
    """`highest_activations`; None, with a printed sentence, if they are missing, broken or of another SAE."""
    try:
        return highest_activations(sae_path, n_latents)
    except InputError as error:
        print(f"{error} Until then strengths are plain activations.", file=sys.stderr)
        return None


def strength_of_each(latents: Sequence[int], strengths: Sequence[S]) -> dict[int, S]:
    """Latent -> strength, from the options --latents and --strengths. A single strength applies to all.

    Raises InputError if they do not fit together.
    """
    if len(set(latents)) < len(latents):
        raise InputError("--latents names a latent twice; name it once, with one strength.")
    return dict(zip(latents, one_for_each(latents, strengths, "--latents", "--strengths"), strict=True))


def one_for_each(things: Sequence[Any], values: Sequence[S], their_option: str, option: str) -> list[S]:
    """As many values as things; a single one is for all. Raises InputError for another number of them."""
    if len(values) == 1:
        return [*values] * len(things)
    if len(values) != len(things):
        raise InputError(
            f"{their_option} names {len(things)}, {option} {len(values)}; give one for each or one for all."
        )
    return list(values)
