"""Random SAEs in other programs' files, each written from its published layout, and what that program computes, step by
step as its loader does it. Dimensions differ, so that a transposed axis cannot hide."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, N, K = 24, 96, 5


class Weights:
    """Random ones; directions of unequal lengths."""

    def __init__(self, seed: int = 0, d_model: int = D, n_latents: int = N):
        generator = torch.Generator().manual_seed(seed)
        randn = lambda *shape: torch.randn(*shape, generator=generator)
        self.W_enc, self.b_enc = randn(n_latents, d_model) / d_model**0.5, 0.1 * randn(n_latents)
        norms = 0.5 + 2 * torch.rand(n_latents, 1, generator=generator)
        self.W_dec = norms * torch.nn.functional.normalize(randn(n_latents, d_model), dim=1)
        self.b_dec = 0.3 * randn(d_model)
        self.threshold = 0.2 + torch.rand(n_latents, generator=generator)
        self.skip = randn(d_model, d_model) / d_model
        self.x = 2 * randn(200, d_model) + self.b_dec


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def top_k(pre: Tensor, k: int) -> Tensor:
    """Row by row."""
    out = torch.zeros_like(pre)
    for row, values in enumerate(pre):
        for i in values.argsort(descending=True)[:k]:
            out[row, i] = max(values[i], torch.tensor(0.0))
    return out


def linear(w: Weights) -> dict[str, Tensor]:
    decoder = {"decoder.weight": w.W_dec.t(), "decoder.bias": w.b_dec}
    return {"encoder.weight": w.W_enc, "encoder.bias": w.b_enc, **decoder}


def jump(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where((pre > threshold) & (pre > 0), pre, torch.zeros(()))


Expected = tuple[Tensor, Tensor]  # latents in the units of the file's own decoder, x_hat


def llama_scope(
    folder: Path, w: Weights, norm_in: float = 3.0, norm_out: float | None = None, **config: Any
) -> Expected:
    """lm_saes' steps: fold the norms into the biases, make directions unit, then gate by the scalar threshold."""
    norm_out = norm_out or norm_in
    hook = "blocks.3.hook_resid_post"
    settings = {
        "act_fn": "jumprelu", "jump_relu_threshold": 0.8, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm_in, "out": norm_out}, "sparsity_include_decoder_norm": True,
        "apply_decoder_bias_to_pre_encoder": False, "use_decoder_bias": True, "use_glu_encoder": False, "top_k": 50,
        "hook_point_in": hook, "hook_point_out": hook, "d_sae": N,
    }  # fmt: skip
    write_json(folder / "hyperparams.json", settings | config)
    tensors = {
        "encoder.weight": w.W_enc,
        "encoder.bias": w.b_enc,
        "decoder.weight": w.W_dec.t(),
        "decoder.bias": w.b_dec,
    }
    write_safetensors(folder / "checkpoints" / "final.safetensors", tensors)
    s_in, s_out = math.sqrt(D) / norm_in, math.sqrt(D) / norm_out
    b_enc, b_dec, W_dec = w.b_enc / s_in, w.b_dec / s_out, w.W_dec * s_in / s_out  # to raw activations
    norms = W_dec.norm(dim=1)
    W_enc, b_enc, W_dec = w.W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]  # to unit directions
    h = jump(w.x @ W_enc.t() + b_enc, 0.8)
    return h / norms * s_in, h @ W_dec + b_dec


def llama_scope_r1(folder: Path, w: Weights, include_norm: bool = True, newer: bool = False) -> Expected:
    hook = "blocks.3.hook_resid_post"
    config = {
        "act_fn": "jumprelu", "norm_activation": "dataset-wise", "hook_point_in": hook, "hook_point_out": hook,
        "d_model": D, "expansion_factor": N / D, "top_k": K, "sparsity_include_decoder_norm": include_norm,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    tensors = {
        "encoder.weight": w.W_enc,
        "encoder.bias": w.b_enc,
        "decoder.weight": w.W_dec.t(),
        "decoder.bias": w.b_dec,
    }
    if newer:
        tensors = {"W_E": w.W_enc.t(), "b_E": w.b_enc, "W_D": w.W_dec, "b_D": w.b_dec}
    prefix = "activation_function." if newer else ""
    tensors |= {f"{prefix}log_jumprelu_threshold": w.threshold.log()}
    tensors |= {f"dataset_average_activation_norm.{hook}": torch.tensor(3.0)}
    write_safetensors(folder / "sae_weights.safetensors", tensors)
    s = math.sqrt(D) / 3
    h = (s * w.x) @ w.W_enc.t() + w.b_enc
    gated = h * w.W_dec.norm(dim=1) if include_norm else h
    h = torch.where((gated > w.threshold) & (h > 0), h, torch.zeros(()))
    return h, (h @ w.W_dec + w.b_dec) / s


def sparsify(folder: Path, w: Weights, skip: bool = False, **config: Any) -> Expected:
    cfg = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": 0, "k": K, "signed": False, "d_in": D}
    write_json(folder / "cfg.json", cfg | config)
    tensors = {"encoder.weight": w.W_enc, "encoder.bias": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    write_safetensors(folder / "sae.safetensors", tensors | ({"W_skip": w.skip} if skip else {}))
    x = w.x if config.get("transcode") else w.x - w.b_dec
    h = top_k((x @ w.W_enc.t() + w.b_enc).relu(), K)
    return h, h @ w.W_dec + w.b_dec + (w.x @ w.skip.t() if skip else 0)


def saelens(folder: Path, w: Weights, architecture: str = "standard", version: int = 6, **config: Any) -> Expected:
    """config: of cfg.json; in version 5 topk is an activation_fn_str."""
    hook = "blocks.3.hook_resid_post"
    cfg: dict[str, Any] = {
        "architecture": architecture, "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
    }  # fmt: skip
    about = {"hook_name": hook, "model_name": "a-llama", "prepend_bos": False}
    about |= {"hook_name_out": "blocks.3.hook_mlp_out"} if "transcoder" in architecture else {}
    if version == 6:
        cfg |= {"metadata": about, **({"k": K} if architecture == "topk" else {})}
    else:
        cfg |= about | {"hook_layer": 3, "normalize_activations": False, "finetuning_scaling_factor": False}
        cfg |= {"activation_fn_str": "topk" if architecture == "topk" else "relu"}
        cfg |= {"activation_fn_kwargs": {"k": K} if architecture == "topk" else {}}
        cfg |= {"architecture": "standard"} if architecture == "topk" else {}
    cfg |= config
    write_json(folder / "cfg.json", cfg)
    tensors = {"W_enc": w.W_enc.t(), "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    tensors |= {"threshold": w.threshold} if "jumprelu" in architecture else {}
    tensors |= {"W_skip": w.skip} if "skip" in architecture else {}
    tensors |= {"scaling_factor": torch.ones(N)} if version == 5 else {}
    write_safetensors(folder / "sae_weights.safetensors", tensors)
    mean, std = torch.zeros(len(w.x), 1), torch.ones(len(w.x), 1)
    z = w.x
    if cfg["normalize_activations"] == "layer_norm":
        mean = w.x.mean(1, keepdim=True)
        std = ((w.x - mean).square().sum(1, keepdim=True) / (D - 1)).sqrt()
        z = (w.x - mean) / (std + 1e-5)
    is_centred = cfg["apply_b_dec_to_input"] and "transcoder" not in architecture
    pre = (z - w.b_dec if is_centred else z) @ w.W_enc.t() + w.b_enc
    norms = w.W_dec.norm(dim=1) if cfg.get("rescale_acts_by_decoder_norm") else torch.ones(N)
    if architecture == "topk":
        h = top_k(pre * norms, K)
    else:
        h = jump(pre, w.threshold if "jumprelu" in architecture else 0.0)
    x_hat = (h / norms) @ w.W_dec + w.b_dec + (w.x @ w.skip.t() if "skip" in architecture else 0)
    return h, x_hat * std + mean


def dictionary_learning(folder: Path, w: Weights, dict_class: str) -> Expected:
    trainer = {
        "dict_class": dict_class,
        "k": K,
        "layer": 3,
        "lm_name": "a/llama",
        "submodule_name": "resid_post_layer_3",
    }
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {}})
    state = {"encoder.weight": w.W_enc, "encoder.bias": w.b_enc, "decoder.weight": w.W_dec.t(), "b_dec": w.b_dec}
    by_rows = {"W_enc": w.W_enc.t(), "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    pre = ((w.x if dict_class == "JumpReluAutoEncoder" else w.x - w.b_dec) @ w.W_enc.t() + w.b_enc).relu()
    if dict_class == "AutoEncoderTopK":
        state |= {"k": torch.tensor(K), "threshold": torch.tensor(-1.0)}
        h = top_k(pre, K)
    elif dict_class == "JumpReluAutoEncoder":
        state = by_rows | {"threshold": w.threshold}
        h = jump(pre, w.threshold)
    elif dict_class == "AutoEncoder":
        state["bias"] = state.pop("b_dec")
        h = pre
    else:
        state = (by_rows if dict_class.startswith("Matryoshka") else state) | {"threshold": torch.tensor(0.7)}
        state |= {"k": torch.tensor(K, dtype=torch.int32)}
        h = jump(pre, 0.7)
    torch.save(state, folder / "ae.pt")
    return h, h @ w.W_dec + w.b_dec


def openai(folder: Path, w: Weights, activation: str = "TopK") -> Expected:
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {
        "pre_bias": w.b_dec, "latent_bias": w.b_enc, "encoder.weight": w.W_enc, "decoder.weight": w.W_dec.t(),
        "stats_last_nonzero": torch.zeros(N, dtype=torch.long), "activation": activation,
    }  # fmt: skip
    if activation == "TopK":
        state["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
    torch.save(state, folder / "autoencoder.pt")
    if activation != "TopK":
        h = ((w.x - w.b_dec) @ w.W_enc.t() + w.b_enc).relu()
        return h, h @ w.W_dec + w.b_dec
    mean = w.x.mean(1, keepdim=True)
    std = ((w.x - mean).square().sum(1, keepdim=True) / (D - 1)).sqrt()
    h = top_k(((w.x - mean) / (std + 1e-5) - w.b_dec) @ w.W_enc.t() + w.b_enc, K)
    return h, (h @ w.W_dec + w.b_dec) * std + mean


def gemma_scope(folder: Path, w: Weights, lower: bool = False) -> Expected:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("w_enc", "w_dec") if lower else ("W_enc", "W_dec")
    arrays = {names[0]: w.W_enc.t(), names[1]: w.W_dec, "b_enc": w.b_enc, "b_dec": w.b_dec, "threshold": w.threshold}
    np.savez(folder / "params.npz", **{name: array.numpy() for name, array in arrays.items()})
    h = jump(w.x @ w.W_enc.t() + w.b_enc, w.threshold)
    return h, h @ w.W_dec + w.b_dec


def goodfire(folder: Path, w: Weights, encoder: str = "encoder_linear", decoder: str = "decoder_linear") -> Expected:
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"{encoder}.weight": w.W_enc, f"{encoder}.bias": w.b_enc, f"{decoder}.weight": w.W_dec.t()}
    torch.save(state | {f"{decoder}.bias": w.b_dec}, folder / "a-llama-l3.pth")
    h = (w.x @ w.W_enc.t() + w.b_enc).relu()
    return h, h @ w.W_dec + w.b_dec
