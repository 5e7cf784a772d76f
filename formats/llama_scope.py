"""Llama Scope (He et al. 2024, arXiv:2410.20526), as its library lm_saes reads it, and its successors' files.

Llama Scope 1: hyperparams.json, checkpoints/final.safetensors; encoder.weight (n_latents, d_model), decoder.weight
(d_model, n_latents). One scalar threshold, in raw units and for unit decoder directions d_i:

    h_i = n_i (W_enc x + b_enc / s_in)_i, kept where h_i > threshold        n_i = |W_dec_i| s_in / s_out
    x_hat = sum of h_i d_i + b_dec / s_out                                   s = sqrt(d_model) / average norm

(lm_saes `sae.py`, `post_processing.py` at 7bfb3f1.) Other tools leave n_i out, which changes L0.

Llama Scope R1, Llamascopium: config.json, sae_weights.safetensors, with log_jumprelu_threshold (n_latents,) in training
units:

    h_i = (W_enc s_in x + b_enc)_i, kept where |W_dec_i| h_i > threshold_i, or h_i without sparsity_include_decoder_norm
    x_hat = (W_dec h + b_dec) / s_out
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.common import (
    Foreign,
    Ours,
    Place,
    above,
    hook_of_site,
    need_autoencoder,
    need_gate,
    raw,
    read_safetensors,
    site_of_hook,
    write_config,
    write_safetensors,
)
from pipeline.errors import InputError
from sae import Kind, SparseAutoencoder

MARKERS = "hyperparams.json with checkpoints/final.safetensors"
MARKERS_R1 = "config.json with sae_weights.safetensors"
_WEIGHTS = "checkpoints/final.safetensors"
_NEWER_NAMES = {"W_E": "encoder.weight", "b_E": "encoder.bias", "W_D": "decoder.weight", "b_D": "decoder.bias"}
_NOT_HERE = {
    "lorsa": "a sparse attention layer",
    "clt": "a cross-layer transcoder",
    "crosscoder": "a crosscoder",
    "molt": "a mixture of linear transforms",
}


def find(place: Place) -> Foreign | None:
    if not place.has("hyperparams.json"):
        return None
    if not place.has(_WEIGHTS):
        raise InputError(f"There is no {_WEIGHTS} beside {place.path / 'hyperparams.json'}; fetch it as well.")
    return Foreign(place.path, read_safetensors(place.path / _WEIGHTS), place.json("hyperparams.json"))


def find_r1(place: Place) -> Foreign | None:
    if not place.has("config.json", "sae_weights.safetensors"):
        return None
    tensors = read_safetensors(place.path / "sae_weights.safetensors")
    for newer, name in _NEWER_NAMES.items():
        if newer in tensors:  # (d_model, n_latents) and (n_latents, d_model) there
            tensors[name] = tensors.pop(newer).t() if tensors[newer].dim() == 2 else tensors.pop(newer)
    return Foreign(place.path, tensors, place.json("config.json"))


def weights(foreign: Foreign) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc (n_latents, d_model), b_enc, W_dec (n_latents, d_model), b_dec."""
    W_enc = foreign.tensor("encoder.weight", None, None)
    n_latents, d_model = W_enc.shape
    b_enc, W_dec = foreign.tensor("encoder.bias", n_latents), foreign.tensor("decoder.weight", d_model, n_latents).t()
    b_dec = foreign.tensor("decoder.bias", d_model) if "decoder.bias" in foreign.tensors else torch.zeros(d_model)
    return W_enc, b_enc, W_dec, b_dec


def check(foreign: Foreign) -> None:
    """Raise InputError for what is no autoencoder or transcoder of the formulas above."""
    config = foreign.config
    kind = config.get("sae_type", "sae")
    if kind in _NOT_HERE:
        raise InputError(f"{foreign.path} is {_NOT_HERE[kind]} ({kind}), which has no form here.")
    if config.get("use_glu_encoder"):
        raise InputError(
            f"{foreign.path} has a gated linear unit as encoder (use_glu_encoder), which has no form here."
        )
    if config.get("norm_activation", "dataset-wise") not in ("dataset-wise", "inference"):
        raise InputError(
            f"{foreign.path} has norm_activation {config['norm_activation']!r}; dataset-wise is read here, a constant."
        )
    if config.get("act_fn") not in ("jumprelu", "relu"):
        raise InputError(f"{foreign.path} has act_fn {config.get('act_fn')!r}; jumprelu and relu are read here.")


def scales(foreign: Foreign, d_model: int) -> tuple[float, float]:
    """s_in and s_out."""
    norms = foreign.config.get("dataset_average_activation_norm")
    if isinstance(norms, dict):
        both = norms.get("in"), norms.get("out")
    else:
        in_tensors = {name: value for name, value in foreign.tensors.items() if name.startswith("dataset_average_")}
        of_hook = lambda hook: in_tensors.get(f"dataset_average_activation_norm.{foreign.config.get(hook)}")
        both = of_hook("hook_point_in"), of_hook("hook_point_out")
    if any(norm is None or not float(norm) > 0 for norm in both):
        raise InputError(f"{foreign.path} does not say dataset_average_activation_norm, in and out; fetch it again.")
    norm_in, norm_out = map(float, both)  # type: ignore[arg-type]
    return math.sqrt(d_model) / norm_in, math.sqrt(d_model) / norm_out


def thresholds(foreign: Foreign, n_latents: int) -> Tensor | float:
    """In the file's units; 0 for relu."""
    if foreign.config["act_fn"] == "relu":
        return 0.0
    names = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
    for name in names:
        if name in foreign.tensors:
            return foreign.tensor(name, n_latents).exp()
    return float(foreign.need("jump_relu_threshold"))


def to_ours(foreign: Foreign) -> Ours:
    """Llama Scope 1. The weights stay as they are; only the threshold changes its units, latent by latent."""
    check(foreign)
    W_enc, b_enc, W_dec, b_dec = weights(foreign)
    s_in, s_out = scales(foreign, W_enc.shape[1])
    # h_i > threshold  <=>  (W_enc s_in x + b_enc)_i > threshold s_out / |W_dec_i|
    threshold = thresholds(foreign, len(W_enc)) * s_out / W_dec.norm(dim=1)
    note = "The scalar threshold became one per latent: times s_out, divided by the norm of the latent's direction."
    return _ours(foreign, (W_enc, b_enc, W_dec, b_dec), (s_in, s_out), threshold, (note,))


def to_ours_r1(foreign: Foreign) -> Ours:
    check(foreign)
    W_enc, b_enc, W_dec, b_dec = weights(foreign)
    threshold, notes = thresholds(foreign, len(W_enc)) * torch.ones(len(W_enc)), ()
    if foreign.config.get("sparsity_include_decoder_norm"):
        threshold = threshold / W_dec.norm(dim=1)
        notes = ("Each threshold was divided by the norm of its latent's direction (sparsity_include_decoder_norm).",)
    return _ours(foreign, (W_enc, b_enc, W_dec, b_dec), scales(foreign, W_enc.shape[1]), threshold, notes)


def _ours(
    foreign: Foreign,
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
    both: tuple[float, float],
    threshold: Tensor,
    notes: tuple[str, ...],
) -> Ours:
    config = foreign.config
    reads, writes = site_of_hook(config.get("hook_point_in")), site_of_hook(config.get("hook_point_out"))
    is_transcoder = config.get("hook_point_out", config.get("hook_point_in")) != config.get("hook_point_in")
    kind = Kind(
        gate="relu" if config["act_fn"] == "relu" else "jumprelu",
        normalization="scale",
        scale=both[0],
        centred=bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
        target_site=writes if is_transcoder else None,
        target_scale=both[1] if is_transcoder else 1.0,
    )
    facts = {"site": reads} if reads else {}
    limit = None if kind.gate == "relu" else threshold
    return Ours(*parts, kind, threshold=limit, facts=facts, notes=notes)


def formula(foreign: Foreign, x: Tensor) -> tuple[Tensor, Tensor]:
    W_enc, b_enc, W_dec, b_dec = weights(foreign)
    s_in, s_out = scales(foreign, W_enc.shape[1])
    norms = W_dec.norm(dim=1)
    if foreign.config.get("apply_decoder_bias_to_pre_encoder"):
        x = x - b_dec / s_in
    h = norms * s_in / s_out * (x @ W_enc.t() + b_enc / s_in)
    h = above(h, thresholds(foreign, len(W_enc)))
    directions = W_dec / norms[:, None].clamp(min=1e-30)
    return h / norms.clamp(min=1e-30) * s_out, h @ directions + b_dec / s_out  # latents in units of W_dec


def formula_r1(foreign: Foreign, x: Tensor) -> tuple[Tensor, Tensor]:
    W_enc, b_enc, W_dec, b_dec = weights(foreign)
    s_in, s_out = scales(foreign, W_enc.shape[1])
    z = x * s_in - b_dec if foreign.config.get("apply_decoder_bias_to_pre_encoder") else x * s_in
    h = z @ W_enc.t() + b_enc
    gated = h * W_dec.norm(dim=1) if foreign.config.get("sparsity_include_decoder_norm") else h
    h = h.relu() * (gated > thresholds(foreign, len(W_enc)))
    return h, (h @ W_dec + b_dec) / s_out


# ---- out


def write(sae: SparseAutoencoder, folder: Path) -> None:
    """As Llama Scope 1, in float32. Raises InputError where its one scalar threshold does not do."""
    need_gate(sae, "Llama Scope's format", "jumprelu", "relu")
    need_autoencoder(sae, "Llama Scope's format, as written here,")
    parts = raw(sae, "Llama Scope's format")
    norms = parts.W_dec.norm(dim=1)  # in raw units; the format's h is what the unit direction is multiplied by
    config: dict[str, Any] = {"act_fn": "relu"}
    if parts.threshold is not None:
        limits = parts.threshold * norms
        if not torch.allclose(limits, limits[:1].expand_as(limits), rtol=1e-5, atol=0):
            raise InputError(
                f"Llama Scope's format has one threshold for all latents, but these lie between {limits.min():.4g} and "
                f"{limits.max():.4g}; export --to saelens or gemmascope, which have one for each."
            )
        config = {"act_fn": "jumprelu", "jump_relu_threshold": float(limits.double().mean())}
    n_latents, d_model = parts.W_enc.shape
    hook = hook_of_site(sae.site)
    average = math.sqrt(d_model)  # s = 1: the scale is folded into the weights
    write_config(
        folder / "hyperparams.json",
        {
            **config,
            "hook_point_in": hook,
            "hook_point_out": hook,
            "d_model": d_model,
            "d_sae": n_latents,
            "expansion_factor": n_latents / d_model,
            "top_k": sae.k,
            "norm_activation": "dataset-wise",
            "dataset_average_activation_norm": {"in": average, "out": average},
            "sparsity_include_decoder_norm": True,
            "apply_decoder_bias_to_pre_encoder": False,
            "use_decoder_bias": True,
            "use_glu_encoder": False,
            "dtype": "torch.float32",
        },
    )
    (folder / "checkpoints").mkdir()
    write_safetensors(
        folder / _WEIGHTS,
        {
            "encoder.weight": parts.W_enc,
            "encoder.bias": parts.b_enc,
            "decoder.weight": parts.W_dec.t(),
            "decoder.bias": parts.b_dec,
        },
    )
