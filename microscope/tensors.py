"""The forward pass as a table of tensors; tensors saved to a file, and patched into another prompt."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from llama_3.checkpoint import checkpoint_identity, differing_field
from llama_3.model import INNER_SITES, SITES, Intervention, ModelArgs, Transformer, check_site
from microscope.prompts import Prompt, check_pattern_size
from pipeline.errors import InputError
from pipeline.files import atomic_path

# In the order in which a layer computes them.
ORDER = (
    "resid_pre", "attention_norm", "q", "k", "v", "attention_pattern", "head_out", "attention_out",
    "resid_mid", "ffn_norm", "mlp_hidden", "mlp_out", "resid_post",
)  # fmt: skip


class Row(NamedTuple):
    """What is printed of a tensor."""

    site: str
    shape: tuple[int, ...]
    dtype: str
    mean: float
    std: float
    norm: float
    nan: float  # share of NaN


def all_sites(args: ModelArgs, layers: Sequence[int]) -> list[str]:
    assert set(ORDER) == {*SITES, *INNER_SITES}
    return [f"layers.{i}.{kind}" for i in layers for kind in ORDER]


@torch.inference_mode()
def tensors(model: Transformer, prompt: Prompt, sites: Sequence[str]) -> dict[str, Tensor]:
    """The activations at sites, without the batch dimension, on the CPU. Raises InputError for an unknown site."""
    try:
        for site in sites:
            check_site(site, model.args.n_layers, ORDER)
    except ValueError as error:
        raise InputError(str(error)) from None
    n_patterns = sum(site.endswith(".attention_pattern") for site in sites)
    check_pattern_size(model, n_patterns, len(prompt.ids))
    return {site: x[0].cpu() for site, x in model.activations(prompt.batch(model), list(sites)).items()}


def row_of(site: str, x: Tensor) -> Row:
    values = x.float()
    mean, std, norm = (float(each) for each in (values.mean(), values.std(), values.norm()))
    return Row(
        site, tuple(x.shape), str(x.dtype).removeprefix("torch."), mean, std, norm, float(x.isnan().float().mean())
    )


# ---- files


def save_tensors(path: Path | str, found: dict[str, Tensor], model_dir: str) -> None:
    """Write tensors by site, and which model they are of, to a safetensors file, atomically."""
    contiguous = {site: x.contiguous() for site, x in found.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(contiguous, temporary, {"model": json.dumps(checkpoint_identity(model_dir))})


def load_tensors(path: Path | str, model_dir: str) -> dict[str, Tensor]:
    """Tensors by site. Raises InputError for a file that is missing, broken or of another model."""
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            known = json.loads((file.metadata() or {})["model"])
            found = {site: file.get_tensor(site) for site in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); save tensors with the command tensors and --save_path."
        ) from None
    if differing_field(known, checkpoint_identity(model_dir)):
        raise InputError(f"{path} is of another model ({known.get('name')}); save tensors of {model_dir}.")
    return found


def patches_from(
    found: dict[str, Tensor], n_tokens: int, positions: Sequence[int] | None, average: bool
) -> list[Intervention]:
    """Interventions that put saved tensors in the place of a prompt's own.

    average: the saved tensor's mean over its positions, at every position. Raises InputError where lengths differ.
    """
    interventions = []
    for site, x in found.items():
        if site.endswith(".attention_pattern") and average:
            raise InputError(f"{site} has no average over positions; save other sites, or leave --average out.")
        length = x.shape[1] if site.endswith(".attention_pattern") else x.shape[0]
        if not average and length != n_tokens:
            raise InputError(f"{site} was saved for {length} tokens, this prompt has {n_tokens}; write --average.")
        value = x.mean(0, keepdim=True) if average else x
        replace = lambda own, value=value: value.to(own).expand_as(own)
        interventions.append(Intervention(site, replace, (), positions))
    return interventions
