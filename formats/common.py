"""What all formats share: an SAE in another program's words, in ours, and their files opened safely.

Every SAE here is an instance of one formula (sae.py); formats differ in names, transposes, units, and in what their
program does that no file says.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import InputError
from sae import Kind, SparseAutoencoder

Latents = Callable[[Tensor], tuple[Tensor, Tensor]]  # raw x (n, d_model) -> latents (n, n_latents) and x_hat


class Foreign(NamedTuple):
    """An SAE as another program's files hold it."""

    path: Path  # the folder, or the only file
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    def need(self, name: str) -> Any:
        """A value of the config. Raises InputError if there is none."""
        if name not in self.config:
            raise InputError(f"The configuration in {self.path} does not say {name}; fetch it again.")
        return self.config[name]

    def tensor(self, name: str, *shape: int | None) -> Tensor:
        """A tensor in float32. Raises InputError if it is missing or has another shape; None: any length."""
        if name not in self.tensors:
            raise InputError(f"{self.path} lacks the tensor {name}; fetch it again.")
        tensor = self.tensors[name].float()
        fits = all(wanted in (None, length) for length, wanted in zip(tensor.shape, shape, strict=False))
        if tensor.dim() != len(shape) or not fits:
            wanted = tuple("any" if length is None else length for length in shape)
            raise InputError(
                f"{self.path} holds {name} as {tuple(tensor.shape)} instead of {wanted}: its shapes contradict each "
                "other; fetch it again."
            )
        return tensor


class Ours(NamedTuple):
    """The same SAE in this project's words. Weights are latent by latent: W_enc and W_dec (n_latents, d_model)."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    kind: Kind
    k: int | None = None
    threshold: Tensor | None = None  # (n_latents,)
    skip: Tensor | None = None  # (d_model, d_model)
    facts: Mapping[str, Any] = {}  # for NAME.json: site, and what the file says of its model
    notes: tuple[str, ...] = ()  # what was done to the numbers, and what a user should know

    def sae(self) -> SparseAutoencoder:
        """Raises InputError where shapes contradict each other."""
        n_latents, d_model = self.W_enc.shape
        expected = {"b_enc": (n_latents,), "W_dec": (n_latents, d_model), "b_dec": (d_model,)}
        expected |= {"threshold": (n_latents,), "skip": (d_model, d_model)}
        for name, shape in expected.items():
            if (tensor := getattr(self, name)) is not None and tuple(tensor.shape) != shape:
                raise InputError(f"Its {name} is {tuple(tensor.shape)}, but W_enc says {shape}; fetch it again.")
        try:
            sae = SparseAutoencoder(d_model, n_latents, self.k, 1e-5, kind=self.kind)
        except ValueError as error:
            raise InputError(f"This SAE cannot be: {error}.") from None
        state = {"b_pre": self.b_dec, "encoder.weight": self.W_enc, "encoder.bias": self.b_enc}
        state |= {"decoder.weight": self.W_dec.t()}
        state |= {} if self.threshold is None else {"threshold": self.threshold}
        state |= {} if self.skip is None else {"skip": self.skip}
        sae.load_state_dict(state)
        return sae.requires_grad_(False).eval()


# ---- out of here


class Raw(NamedTuple):
    """An SAE without normalisation and centring, its constant scale folded into the weights.

        h = gate(W_enc x + b_enc)        x_hat = h W_dec + b_dec (+ skip x)

    Weights latent by latent, (n_latents, d_model).
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None
    skip: Tensor | None

    @property
    def centred_b_enc(self) -> Tensor:
        """b_enc where x - b_dec is encoded instead of x."""
        return self.b_enc + self.W_enc @ self.b_dec


def raw(sae: SparseAutoencoder, target: str) -> Raw:
    """Raises InputError for an SAE that normalises each activation, which no weights can do."""
    if sae.kind.normalization == "layer_norm":
        raise InputError(
            f"This SAE normalises each activation by its own mean and std, which {target} cannot and no weights can; "
            "train with --normalization none or scale for it, or export --to saelens."
        )
    scale_in = sae.kind.scale
    scale_out = sae.kind.target_scale if sae.kind.target_site else scale_in
    W_enc, b_pre = sae.encoder.weight.float(), sae.b_pre.float()
    b_enc = sae.encoder.bias.float()
    if sae.kind.centred:
        b_enc = b_enc - W_enc @ b_pre
    skip = None if sae.skip is None else sae.skip.float() * (scale_in / scale_out)
    W_dec = sae.decoder.weight.t().float()
    return Raw(W_enc * scale_in, b_enc, W_dec / scale_out, b_pre / scale_out, sae.threshold, skip)


def need_gate(sae: SparseAutoencoder, target: str, *gates: str) -> None:
    """Raise InputError unless the SAE has one of the gates."""
    if sae.kind.gate not in gates:
        raise InputError(f"{target} holds SAEs with {' or '.join(gates)}, but this one has {sae.kind.gate}.")


def need_autoencoder(sae: SparseAutoencoder, target: str) -> None:
    """Raise InputError for a transcoder."""
    if sae.kind.target_site is not None:
        raise InputError(f"{target} holds autoencoders, but this is a transcoder to {sae.kind.target_site}.")


# ---- gates, for formulas


def relu_top_k(pre_acts: Tensor, k: int) -> Tensor:
    """The k highest of each row, negatives 0, dense."""
    top = pre_acts.topk(k, dim=-1)
    return torch.zeros_like(pre_acts).scatter_(-1, top.indices, top.values.relu())


def above(pre_acts: Tensor, threshold: Tensor | float) -> Tensor:
    """What lies above a threshold, dense, negatives 0."""
    return pre_acts.relu() * (pre_acts > threshold)


# ---- sites


_HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attention_out",
    "hook_mlp_out": "mlp_out",
}
_MODULES = {  # of transformers' Llama: what the module gives out
    "": "resid_post",
    ".mlp": "mlp_out",
    ".self_attn": "attention_out",
    ".input_layernorm": "attention_norm",
    ".post_attention_layernorm": "ffn_norm",
}


def site_of_hook(hook: str | None) -> str | None:
    """layers.15.resid_post of blocks.15.hook_resid_post, layers.15, resid_post_layer_15, ...; None if not known.

    Raises InputError for a norm's output before its weight, which is no site here.
    """
    hook = hook or ""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", hook):
        if match[2] in ("ln1.hook_normalized", "ln2.hook_normalized"):
            raise InputError(
                f"This SAE reads {hook}, the norm's output before the norm's weight, which is no site of this "
                "project's Llama; it cannot be imported."
            )
        return f"layers.{match[1]}.{_HOOKS[match[2]]}" if match[2] in _HOOKS else None
    if match := re.fullmatch(r"(?:model\.)?layers\.(\d+)(\.\w+)?", hook):
        kind = _MODULES.get(match[2] or "")
        return f"layers.{match[1]}.{kind}" if kind else None
    if match := re.fullmatch(r"(resid_pre|resid_post|mlp_out)_layer_(\d+)", hook):
        return f"layers.{match[2]}.{match[1]}"
    return "layers.0.resid_pre" if hook.removeprefix("model.") == "embed_tokens" else None


def hook_of_site(site: str) -> str:
    """TransformerLens' name of a site, or, for the outputs of norms, which have none there, transformers' module."""
    _, layer, kind = site.split(".")
    hook = next((hook for hook, ours in _HOOKS.items() if ours == kind), None)
    if hook is not None:
        return f"blocks.{layer}.{hook}"
    module = next(module for module, ours in _MODULES.items() if ours == kind)
    return f"model.layers.{layer}{module}"


# ---- files


class Place:
    """A folder, or a single file, that may hold an SAE."""

    def __init__(self, path: Path):
        self.path = path
        self.folder = path if path.is_dir() else None
        files = path.rglob("*") if self.folder else ()
        self.names = {each.relative_to(path).as_posix() for each in files if each.is_file()}
        self._state: dict[str, Any] | None = None

    def has(self, *names: str) -> bool:
        return self.names.issuperset(names)

    def json(self, name: str) -> dict[str, Any]:
        return read_config(self.path / name)

    @property
    def state(self) -> dict[str, Any]:
        """What the only .pt or .pth file holds; empty where there is none, or several."""
        if self._state is None:
            files = [self.path] if self.folder is None else [self.path / name for name in sorted(self.names)]
            files = [file for file in files if file.suffix in (".pt", ".pth") and file.name != "ae.pt"]
            self._state = read_state(files[0]) if len(files) == 1 else {}
        return self._state


def read_config(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is not the JSON of an SAE ({error}); fetch it again.") from None


def read_state(path: Path) -> dict[str, Any]:
    """A file of torch.save: tensors and plain values only. Raises InputError for anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+)|Unsupported (?:operand|class) (\S+)", str(error))
        named = f" ({what[1] or what[2]})" if what else ""
        raise InputError(
            f"{path} holds more than tensors and plain values{named}; opening it would run its code, so it is refused. "
            "Ask its author for a state dict."
        ) from None
    except (RuntimeError, EOFError, LookupError, ValueError, OSError) as error:
        raise InputError(f"{path} is truncated or no file of torch ({first_line(error)}); fetch it again.") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__} instead of tensors by name; fetch it again.")
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is truncated or not in safetensors' format ({first_line(error)}); fetch it again."
        ) from None


def read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a whole file of numpy arrays ({first_line(error)}); fetch it again.") from None


def tensors_in(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    safetensors.torch.save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
