"""OpenAI's sparse_autoencoder: one file of torch.save, a state dict with pre_bias, latent_bias, encoder.weight
(n_latents, d_model), decoder.weight (d_model, n_latents), activation, activation_state_dict, stats_last_nonzero.

    activation TopK:  z = (x - mean) / (std + 1e-5), h = ReLU(TopK(W_enc (z - pre_bias) + latent_bias))
                      x_hat = (W_dec h + pre_bias) std + mean
    activation ReLU:  the same without normalisation, h = ReLU(...)

(sparse_autoencoder/model.py; its files name no model and no site.)
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.common import Foreign, Ours, Place, need_autoencoder, need_gate, raw, relu_top_k, tensors_in
from pipeline.errors import InputError
from sae import Kind, SparseAutoencoder

MARKERS = "the tensors pre_bias and latent_bias in a .pt file"
FILE = "autoencoder.pt"
_EPS = 1e-5


def find(place: Place) -> Foreign | None:
    state = place.state
    if "pre_bias" not in state:
        return None
    config = {"activation": state.get("activation", "ReLU"), **dict(state.get("activation_state_dict") or {})}
    return Foreign(place.path, tensors_in(state), config)


def weights(foreign: Foreign) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    W_enc = foreign.tensor("encoder.weight", None, None)
    n_latents, d_model = W_enc.shape
    W_dec = foreign.tensor("decoder.weight", d_model, n_latents).t()
    return W_enc, foreign.tensor("latent_bias", n_latents), W_dec, foreign.tensor("pre_bias", d_model)


def to_ours(foreign: Foreign) -> Ours:
    activation = foreign.config["activation"]
    if activation == "TopK":
        return Ours(*weights(foreign), Kind(), int(foreign.need("k")))
    if activation == "ReLU":
        return Ours(*weights(foreign), Kind("relu", "none"))
    raise InputError(f"{foreign.path} has activation {activation}; TopK and ReLU are read here.")


def formula(foreign: Foreign, x: Tensor) -> tuple[Tensor, Tensor]:
    W_enc, latent_bias, W_dec, pre_bias = weights(foreign)
    mean, std = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    if foreign.config["activation"] == "TopK":
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        x = (x - mean) / (std + _EPS)
    h = (x - pre_bias) @ W_enc.t() + latent_bias
    h = relu_top_k(h, foreign.config["k"]) if foreign.config["activation"] == "TopK" else h.relu()
    return h, (h @ W_dec + pre_bias) * std + mean


def write(sae: SparseAutoencoder, folder: Path) -> None:
    need_autoencoder(sae, "OpenAI's format")
    need_gate(sae, "OpenAI's format", "topk", "relu")
    state: dict[str, Any]
    if sae.kind.gate == "topk":
        if sae.kind != Kind() or sae.normalize_eps != _EPS:
            raise InputError(
                "In OpenAI's format TopK normalises each activation with eps 1e-5, but this SAE has normalization "
                f"{sae.kind.normalization}, eps {sae.normalize_eps:g}; export --to saelens."
            )
        W_enc, W_dec, pre_bias = sae.encoder.weight.float(), sae.decoder.weight.float(), sae.b_pre.float()
        state = {"activation": "TopK", "activation_state_dict": {"k": sae.k, "postact_fn": "ReLU"}}
        state |= {"pre_bias": pre_bias, "latent_bias": sae.encoder.bias.float()}
    else:
        parts = raw(sae, "OpenAI's format")
        W_enc, W_dec = parts.W_enc, parts.W_dec.t()
        state = {"activation": "ReLU", "pre_bias": parts.b_dec, "latent_bias": parts.centred_b_enc}
    state |= {"encoder.weight": W_enc, "decoder.weight": W_dec}
    state |= {"stats_last_nonzero": torch.zeros(sae.n_latents, dtype=torch.long)}
    whole = {
        name: value.detach().clone().contiguous() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }
    torch.save(whole, folder / FILE)
