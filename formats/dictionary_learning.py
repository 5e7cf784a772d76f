"""dictionary_learning (0.1.0): config.json with `trainer`, ae.pt. The class is in trainer.dict_class:

    AutoEncoder             h = ReLU(W_enc (x - b) + b_enc)                     bias as b
    AutoEncoderTopK         h = TopK(ReLU(W_enc (x - b_dec) + b_enc))
    BatchTopKSAE            h = ReLU(...) of the same, kept above one threshold; MatryoshkaBatchTopKSAE likewise
    JumpReluAutoEncoder     h = ReLU(W_enc x + b_enc), kept above each latent's threshold

    x_hat = W_dec h + b_dec

encoder.weight (n_latents, d_model), decoder.weight (d_model, n_latents); where named W_enc (d_model, n_latents), W_dec
(n_latents, d_model).
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from formats.common import (
    Foreign,
    Ours,
    Place,
    above,
    need_autoencoder,
    raw,
    read_state,
    relu_top_k,
    site_of_hook,
    tensors_in,
    write_config,
)
from pipeline.errors import InputError
from sae import Kind, SparseAutoencoder

MARKERS = "config.json with ae.pt"
_CLASSES = {
    "AutoEncoder": Kind("relu", "none"),
    "AutoEncoderTopK": Kind("topk", "none"),
    "BatchTopKSAE": Kind("jumprelu", "none"),
    "MatryoshkaBatchTopKSAE": Kind("jumprelu", "none"),
    "JumpReluAutoEncoder": Kind("jumprelu", "none", centred=False),
}


def find(place: Place) -> Foreign | None:
    if not place.has("config.json", "ae.pt"):
        return None
    config = place.json("config.json").get("trainer", {})
    return Foreign(place.path, tensors_in(read_state(place.path / "ae.pt")), config)


def weights(foreign: Foreign) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc, b_enc, W_dec, b_dec, latent by latent."""
    if "W_enc" in foreign.tensors:
        W_enc = foreign.tensor("W_enc", None, None).t()
        n_latents, d_model = W_enc.shape
        W_dec = foreign.tensor("W_dec", n_latents, d_model)
        return W_enc, foreign.tensor("b_enc", n_latents), W_dec, foreign.tensor("b_dec", d_model)
    W_enc = foreign.tensor("encoder.weight", None, None)
    n_latents, d_model = W_enc.shape
    W_dec = foreign.tensor("decoder.weight", d_model, n_latents).t()
    bias = "bias" if "bias" in foreign.tensors else "b_dec"
    return W_enc, foreign.tensor("encoder.bias", n_latents), W_dec, foreign.tensor(bias, d_model)


def dict_class(foreign: Foreign) -> str:
    name = foreign.need("dict_class")
    if name not in _CLASSES:
        raise InputError(f"{foreign.path} holds a {name}; {', '.join(_CLASSES)} are read here.")
    return name


def to_ours(foreign: Foreign) -> Ours:
    kind, parts, notes = _CLASSES[dict_class(foreign)], weights(foreign), []
    k, threshold = foreign.config.get("k"), None
    if kind.gate == "jumprelu":
        threshold = foreign.tensor("threshold", *([None] * foreign.tensors["threshold"].dim()))
        if threshold.dim() == 0:
            if threshold < 0:
                notes.append("Its threshold was never estimated (-1), so whatever is positive is kept.")
            threshold = threshold.expand(len(parts[0])).clone()
    elif kind.gate == "topk":
        k = int(foreign.tensors["k"]) if "k" in foreign.tensors else foreign.need("k")
    site = site_of_hook(foreign.config.get("submodule_name"))
    facts = {"site": site} if site else {}
    if name := foreign.config.get("lm_name"):
        facts["model_name"] = name
    return Ours(*parts, kind, k, threshold, facts=facts, notes=tuple(notes))


def formula(foreign: Foreign, x: Tensor) -> tuple[Tensor, Tensor]:
    W_enc, b_enc, W_dec, b_dec = weights(foreign)
    name = dict_class(foreign)
    h = ((x if name == "JumpReluAutoEncoder" else x - b_dec) @ W_enc.t() + b_enc).relu()
    if name == "AutoEncoderTopK":
        h = relu_top_k(h, int(foreign.tensors["k"] if "k" in foreign.tensors else foreign.need("k")))
    elif name != "AutoEncoder":
        h = above(h, foreign.tensors["threshold"].float())
    return h, h @ W_dec + b_dec


def write(sae: SparseAutoencoder, folder: Path) -> None:
    need_autoencoder(sae, "dictionary_learning")
    parts = raw(sae, "dictionary_learning")
    n_latents, d_model = parts.W_enc.shape
    transposed = {"encoder.weight": parts.W_enc, "decoder.weight": parts.W_dec.t()}
    if sae.kind.gate == "relu":
        name = "AutoEncoder"
        state = {**transposed, "encoder.bias": parts.centred_b_enc, "bias": parts.b_dec}
    elif sae.kind.gate == "topk":
        name = "AutoEncoderTopK"
        state = {**transposed, "encoder.bias": parts.centred_b_enc, "b_dec": parts.b_dec}
        state |= {"k": torch.tensor(sae.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
    else:
        assert parts.threshold is not None
        is_one = bool((parts.threshold == parts.threshold[0]).all())
        name = "BatchTopKSAE" if is_one and sae.k is not None else "JumpReluAutoEncoder"
        state = {"W_enc": parts.W_enc.t(), "W_dec": parts.W_dec, "b_enc": parts.b_enc, "b_dec": parts.b_dec}
        state |= {"threshold": parts.threshold}
        if name == "BatchTopKSAE":
            state = {**transposed, "encoder.bias": parts.centred_b_enc, "b_dec": parts.b_dec}
            state |= {"k": torch.tensor(sae.k, dtype=torch.int), "threshold": parts.threshold[0]}
    _, layer, kind = sae.site.split(".")
    trainer = {
        "dict_class": name,
        "activation_dim": d_model,
        "dict_size": n_latents,
        "k": sae.k,
        "layer": int(layer),
        "lm_name": (sae.info.get("model") or {}).get("name"),
        "submodule_name": f"{kind}_layer_{layer}",
        "device": "cpu",
    }
    write_config(folder / "config.json", {"trainer": trainer})
    torch.save({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, folder / "ae.pt")


def package(folder: Path, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same by dictionary_learning itself; None where it is not installed."""
    if importlib.util.find_spec("dictionary_learning") is None:
        return None
    from dictionary_learning.utils import load_dictionary  # pyright: ignore[reportMissingImports]

    dictionary, _ = load_dictionary(str(folder), device="cpu")
    with torch.no_grad():
        h = dictionary.encode(x)
        return h, dictionary.decode(h)
