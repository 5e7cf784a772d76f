"""SAELens (6.54), and its files from before version 6: cfg.json, sae_weights.safetensors.

W_enc (d_model, n_latents), W_dec (n_latents, d_model), b_enc, b_dec, by architecture threshold (n_latents), W_skip
(d_out, d_in):

    z = x, or with normalize_activations layer_norm (x - mean) / (std + 1e-5)
    pre = (z - c b_dec) W_enc + b_enc                c: apply_b_dec_to_input
    standard  h = ReLU(pre)
    topk      h = ReLU(TopK(pre)), or of pre |W_dec_i| with rescale_acts_by_decoder_norm, which decoding divides out
    jumprelu  h = ReLU(pre), kept where pre > threshold
    x_hat = h W_dec + b_dec, times std, plus mean with layer_norm

transcoder, skip_transcoder, jumprelu_transcoder, jumprelu_skip_transcoder never subtract b_dec; a skip adds W_skip x.
BatchTopK and Matryoshka SAEs save themselves as jumprelu.
"""

import importlib.util
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
    raw,
    read_safetensors,
    relu_top_k,
    site_of_hook,
    write_config,
    write_safetensors,
)
from pipeline.errors import InputError
from sae import Gate, Kind, SparseAutoencoder

MARKERS = "cfg.json with sae_weights.safetensors"
_EPS = 1e-5
_GATES: dict[str, Gate] = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_FACTS = ("hook_name", "hook_name_out", "model_name", "prepend_bos")  # in version 6 in `metadata`
_OLD_NAMES = {"hook_point": "hook_name", "hook_point_layer": "hook_layer", "activation_fn": "activation_fn_str"}


def find(place: Place) -> Foreign | None:
    if not place.has("cfg.json", "sae_weights.safetensors"):
        return None
    tensors = read_safetensors(place.path / "sae_weights.safetensors")
    return Foreign(place.path, tensors, as_version_6(place.json("cfg.json")))


def as_version_6(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration in version 6's words: defaults made explicit, activation_fn_str as the architecture."""
    config = {_OLD_NAMES.get(name, name): value for name, value in config.items()}
    metadata = config.get("metadata") or {}
    config |= {name: metadata[name] for name in _FACTS if name in metadata}
    if config.get("activation_fn_str") == "topk":
        config["architecture"] = "topk"
        config.setdefault("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    config.setdefault("architecture", "standard")
    normalize = config.get("normalize_activations", "none")
    if isinstance(normalize, bool):
        normalize = "expected_average_only_in" if normalize else "none"
    config["normalize_activations"] = normalize
    return config


def weights(foreign: Foreign) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    W_enc = foreign.tensor("W_enc", None, None).t()
    n_latents, d_model = W_enc.shape
    return (
        W_enc,
        foreign.tensor("b_enc", n_latents),
        foreign.tensor("W_dec", n_latents, d_model),
        foreign.tensor("b_dec", d_model),
    )


def is_transcoder(foreign: Foreign) -> bool:
    return "transcoder" in foreign.config["architecture"]


def centres(foreign: Foreign) -> bool:
    return bool(foreign.config.get("apply_b_dec_to_input", True)) and not is_transcoder(foreign)


def check(foreign: Foreign) -> None:
    """Raise InputError for what has no form here."""
    config = foreign.config
    if config["architecture"] not in _GATES:
        raise InputError(
            f"{foreign.path} has architecture {config['architecture']}; {', '.join(_GATES)} are read here."
        )
    if config["normalize_activations"] not in ("none", "layer_norm", "expected_average_only_in"):
        raise InputError(
            f"{foreign.path} has normalize_activations {config['normalize_activations']}, which has no form here."
        )
    if config.get("reshape_activations", "none") != "none":
        raise InputError(f"{foreign.path} reads the heads' outputs ({config['reshape_activations']}), no site here.")
    scaling = foreign.tensors.get("scaling_factor")
    if scaling is not None and config.get("finetuning_scaling_factor") and not bool((scaling == 1).all()):
        raise InputError(f"{foreign.path} has a scaling_factor other than 1; fold it into W_dec with SAELens first.")


def to_ours(foreign: Foreign) -> Ours:
    check(foreign)
    config, notes = foreign.config, []
    W_enc, b_enc, W_dec, b_dec = weights(foreign)
    gate = _GATES[config["architecture"]]
    if config["normalize_activations"] == "expected_average_only_in":
        notes.append(
            "Its activations were scaled in training; SAELens takes the scale for folded in, and so does this."
        )
    k = int(foreign.need("k")) if gate == "topk" else None
    if gate == "topk" and config.get("rescale_acts_by_decoder_norm"):
        norms = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
        notes.append("The norms of the directions were folded into the encoder (rescale_acts_by_decoder_norm).")
    site, target = site_of_hook(config.get("hook_name")), None
    if is_transcoder(foreign):
        target = site_of_hook(config.get("hook_name_out"))
        if target is None:
            raise InputError(f"{foreign.path} is a transcoder that does not say hook_name_out; write it into cfg.json.")
    kind = Kind(
        gate,
        "layer_norm" if config["normalize_activations"] == "layer_norm" else "none",
        centred=centres(foreign),
        target_site=target,
        skip="skip" in config["architecture"],
    )
    facts = {"site": site} if site else {}
    facts |= {"model_name": config["model_name"]} if config.get("model_name") else {}
    facts |= {"begin_of_text": config["prepend_bos"]} if isinstance(config.get("prepend_bos"), bool) else {}
    return Ours(
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        kind,
        k,
        foreign.tensor("threshold", len(W_enc)) if gate == "jumprelu" else None,
        foreign.tensor("W_skip", W_enc.shape[1], W_enc.shape[1]) if kind.skip else None,
        facts,
        tuple(notes),
    )


def formula(foreign: Foreign, x: Tensor) -> tuple[Tensor, Tensor]:
    config, (W_enc, b_enc, W_dec, b_dec) = foreign.config, weights(foreign)
    z, mean, std = x, torch.zeros(len(x), 1), torch.ones(len(x), 1)
    if config["normalize_activations"] == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        z = (x - mean) / (std + _EPS)
    pre = (z - b_dec if centres(foreign) else z) @ W_enc.t() + b_enc
    directions = W_dec
    gate = _GATES[config["architecture"]]
    if gate == "topk":
        if config.get("rescale_acts_by_decoder_norm"):
            pre, directions = pre * W_dec.norm(dim=1), W_dec / W_dec.norm(dim=1, keepdim=True)
        h = relu_top_k(pre, config["k"])
    else:
        h = above(pre, foreign.tensors["threshold"].float()) if gate == "jumprelu" else pre.relu()
    x_hat = h @ directions + b_dec
    if "skip" in config["architecture"]:
        x_hat = x_hat + x @ foreign.tensors["W_skip"].float().t()
    return h, x_hat * std + mean


def write(sae: SparseAutoencoder, folder: Path) -> None:
    kind = sae.kind
    config: dict[str, Any] = {"normalize_activations": "none"}
    if kind.normalization == "layer_norm":
        if sae.normalize_eps != _EPS:
            raise InputError(
                f"SAELens normalises with eps 1e-5, but this SAE has {sae.normalize_eps:g}, which gives other latents; "
                "train it with --normalize_eps 1e-5."
            )
        if kind.target_site is not None:
            raise InputError("SAELens does not normalise the input of transcoders; train with --normalization none.")
        config = {"normalize_activations": "layer_norm"}
        W_enc, b_enc, W_dec = sae.encoder.weight.float(), sae.encoder.bias.float(), sae.decoder.weight.t().float()
        b_dec, skip, threshold = sae.b_pre.float(), None, sae.threshold
        centred = kind.centred
    else:
        parts = raw(sae, "SAELens")
        centred = kind.centred and kind.target_site is None
        b_enc = parts.centred_b_enc if centred else parts.b_enc
        W_enc, W_dec, b_dec, skip, threshold = parts.W_enc, parts.W_dec, parts.b_dec, parts.skip, parts.threshold
    n_latents, d_model = W_enc.shape
    architecture = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}[kind.gate]
    metadata = {
        "model_name": (sae.info.get("model") or {}).get("name"),
        "hook_name": hook_of_site(sae.site),
        "prepend_bos": bool(sae.info.get("begin_of_text", False)),
    }
    if kind.target_site is not None:
        if kind.gate == "topk":
            raise InputError("SAELens has no TopK transcoder; export --to sparsify, or train with BatchTopK.")
        architecture = {"relu": "", "jumprelu": "jumprelu_"}[kind.gate] + ("skip_" if kind.skip else "") + "transcoder"
        metadata["hook_name_out"] = hook_of_site(kind.target_site)
        config["d_out"] = d_model
    if kind.gate == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    config |= {
        "architecture": architecture,
        "d_in": d_model,
        "d_sae": n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": centred,
        "reshape_activations": "none",
        "metadata": metadata,
    }
    write_config(folder / "cfg.json", config)
    tensors = {"W_enc": W_enc.t(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    tensors |= {} if threshold is None else {"threshold": threshold.float()}
    tensors |= {} if skip is None else {"W_skip": skip}
    write_safetensors(folder / "sae_weights.safetensors", tensors)


def package(folder: Path, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same by SAELens itself; None where it is not installed."""
    if importlib.util.find_spec("sae_lens") is None:
        return None
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    sae = SAE.load_from_disk(folder, device="cpu")
    with torch.no_grad():
        return sae.encode(x), sae(x)
