"""EleutherAI's sparsify (1.3.3): cfg.json, sae.safetensors.

    h = TopK(ReLU(W_enc (x - b_dec) + b_enc))       x itself in a transcoder whose cfg says transcode
    x_hat = W_dec h + b_dec (+ W_skip x)

encoder.weight, W_dec (n_latents, d_model). Published transcoders lack `transcode`, and so do subtract b_dec.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from formats.common import (
    Foreign,
    Ours,
    Place,
    need_gate,
    raw,
    read_safetensors,
    relu_top_k,
    site_of_hook,
    write_config,
    write_safetensors,
)
from pipeline.errors import InputError
from sae import Kind, SparseAutoencoder

MARKERS = "cfg.json with sae.safetensors"


def find(place: Place) -> Foreign | None:
    if not place.has("cfg.json", "sae.safetensors"):
        return None
    return Foreign(place.path, read_safetensors(place.path / "sae.safetensors"), place.json("cfg.json"))


def weights(foreign: Foreign) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    W_enc = foreign.tensor("encoder.weight", None, None)
    n_latents, d_model = W_enc.shape
    skip = foreign.tensor("W_skip", d_model, d_model) if "W_skip" in foreign.tensors else None
    b_enc, b_dec = foreign.tensor("encoder.bias", n_latents), foreign.tensor("b_dec", d_model)
    return W_enc, b_enc, foreign.tensor("W_dec", n_latents, d_model), b_dec, skip


def to_ours(foreign: Foreign) -> Ours:
    config, (W_enc, b_enc, W_dec, b_dec, skip) = foreign.config, weights(foreign)
    if config.get("activation", "topk") != "topk":
        raise InputError(f"{foreign.path} has activation {config['activation']}; topk is read here.")
    is_transcoder = skip is not None or bool(config.get("transcode"))
    hook = foreign.path.name  # sparsify names folders by hookpoint
    site = site_of_hook(hook)
    notes = ["sparsify records neither model nor site; the folder's name was taken for the site."] if site else []
    if config.get("signed"):
        notes.append("Its cfg says signed, which sparsify itself ignores: negative latents are 0.")
    target = None
    if is_transcoder:
        if site is None or not site.endswith(".mlp_out"):
            raise InputError(
                f"{foreign.path} is a transcoder, and its folder's name is no MLP such as layers.5.mlp; give the "
                "folder the name that sparsify gave it."
            )
        site, target = site.replace(".mlp_out", ".ffn_norm"), site
    kind = Kind(
        "topk",
        "none",
        centred=not config.get("transcode", False),
        target_site=target,
        skip=skip is not None,
    )
    facts = {"site": site} if site else {}
    k = int(foreign.need("k"))
    return Ours(W_enc, b_enc, W_dec, b_dec, kind, k, skip=skip, facts=facts, notes=tuple(notes))


def formula(foreign: Foreign, x: Tensor) -> tuple[Tensor, Tensor]:
    W_enc, b_enc, W_dec, b_dec, skip = weights(foreign)
    centred = x if foreign.config.get("transcode") else x - b_dec
    h = relu_top_k((centred @ W_enc.t() + b_enc).relu(), foreign.config["k"])
    x_hat = h @ W_dec + b_dec
    return h, x_hat if skip is None else x_hat + x @ skip.t()


def write(sae: SparseAutoencoder, folder: Path) -> None:
    need_gate(sae, "sparsify", "topk")
    parts = raw(sae, "sparsify")
    is_transcoder = sae.kind.target_site is not None
    n_latents, d_model = parts.W_enc.shape
    config = {
        "activation": "topk",
        "expansion_factor": n_latents / d_model if n_latents % d_model else n_latents // d_model,
        "normalize_decoder": True,
        "num_latents": n_latents,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": parts.skip is not None,
        "transcode": is_transcoder,
        "d_in": d_model,
    }
    write_config(folder / "cfg.json", config)
    tensors = {
        "encoder.weight": parts.W_enc,
        "encoder.bias": parts.b_enc if is_transcoder else parts.centred_b_enc,
        "W_dec": parts.W_dec,
        "b_dec": parts.b_dec,
    }
    write_safetensors(folder / "sae.safetensors", tensors | ({} if parts.skip is None else {"W_skip": parts.skip}))


def package(folder: Path, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same by eai-sparsify itself; None where it is not installed."""
    if importlib.util.find_spec("sparsify") is None:
        return None
    from sparsify import SparseCoder  # pyright: ignore

    coder = SparseCoder.load_from_disk(folder, device="cpu")
    with torch.no_grad():
        kept = coder.encode(x)
        latents = torch.zeros(len(x), coder.num_latents).scatter_(1, kept.top_indices, kept.top_acts)
        return latents, coder(x, x).sae_out
