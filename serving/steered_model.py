"""A model with its tokenizer and SAE, opened by what a user names."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latents.meanings import best_meanings
from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import TINY_LLAMA_DIR
from llama_3.model import Transformer, check_site
from llama_3.tokenizer import Tokenizer
from pipeline.errors import InputError
from sae import TopKSparseAutoencoder, load_sae_model
from serving.steering import highest_activations, make_steering

_DATE_OF_THE_TEMPLATE = "26 Jul 2024"  # what Llama 3.1's published template writes when nobody names a date


class Setup(NamedTuple):
    """What the options name, opened."""

    model: "Transformer"
    tokenizer: "Tokenizer"
    sae: "TopKSparseAutoencoder | None"
    meanings: dict[int, str]
    options: dict[str, Any]  # of generate, but for seeds and steering
    steering: "tuple[str, Callable[[Tensor], Tensor], Sequence[int]] | None"
    date: str | None  # of a chat


def set_up(config) -> Setup:

    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if config.dtype == "auto" else config.dtype
    if dtype not in ("bfloat16", "float16", "float32"):
        raise InputError(f"--dtype {dtype} is unknown; write bfloat16, float16 or float32.")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device} cannot be used here ({reason}); write cpu or cuda.") from None
    model_dir = config.llama_model_dir or TINY_LLAMA_DIR
    sae, sae_path = None, config.sae_model_path
    if config.latents or config.show_latents or sae_path:
        if sae_path is None and config.llama_model_dir is not None:
            raise InputError("Latents need an SAE of this model; name it with --sae_model_path.")
        sae_path = sae_path or str(Path(TINY_LLAMA_DIR) / "sae.pth")
        sae = load_sae_model(sae_path, device, **what_options_say(config))
        if "site" not in sae.info:
            raise InputError(f"{sae_path} has no JSON that names its site; name its layer with --sae_layer_idx.")
    rope_scaling_factor = sae.info.get("rope_scaling_factor") if sae else config.rope_scaling_factor
    model = load_model(model_dir, device, getattr(torch, dtype), rope_scaling_factor, packed=True)
    tokenizer = load_tokenizer(model_dir)
    if sae and sae.d_model != model.args.dim:
        raise InputError(
            f"{sae_path} has d_model {sae.d_model}, {model_dir} has {model.args.dim}; they do not belong together."
        )
    if sae:
        try:
            check_site(sae.info["site"], model.args.n_layers)
        except ValueError as error:
            raise InputError(f"{sae_path} does not belong to {model_dir}: {error}") from None
    steering = None
    if config.latents:
        strengths = strength_of_each(config.latents, config.strengths)
        highest = known_highest(sae_path, sae.n_latents)
        function = make_steering(sae, strengths, highest, config.mode, config.keep_error)
        steering = (sae.info["site"], function, (tokenizer.bos_id,))  # no SAE here was trained on begin-of-text
    options = {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_p")}
    date = None if config.date == "none" else config.date
    if config.date == "auto":  # the date header came with Llama 3.1, as did scaled RoPE
        date = _DATE_OF_THE_TEMPLATE if model.args.rope_scaling_factor != 1 else None
    meanings = latent_meanings(sae_path) if sae else {}
    return Setup(model, tokenizer, sae, meanings, options, steering, date)


def what_options_say(config) -> dict[str, Any]:
    """What the options say of the SAE: it must not contradict its JSON, and stands for one that is missing."""
    told = {name: getattr(config, name) for name in ("k", "normalize_eps", "rope_scaling_factor")}
    if config.sae_layer_idx is not None:
        told["site"] = f"layers.{config.sae_layer_idx}.attention_norm"
    return {name: value for name, value in told.items() if value is not None}


def known_highest(sae_path: str, n_latents: int) -> "Tensor":
    """`steering.highest_activations`, or ones, with a line that says so, where a published SAE comes without them."""

    try:
        return highest_activations(sae_path)
    except InputError as error:
        print(f"{error} Until then a strength counts in plain activation.", file=sys.stderr)
        return torch.ones(n_latents)


def strength_of_each(latents: list[int], strengths: list[float]) -> dict[int, float]:
    """Latent -> strength. A single strength is that of all. Raises InputError where they do not fit together."""
    if len(strengths) == 1:
        strengths = strengths * len(latents)
    if len(strengths) != len(latents):
        raise InputError(
            f"--latents names {len(latents)}, --strengths {len(strengths)}; give one strength for each or one for all."
        )
    if len(set(latents)) < len(latents):
        raise InputError("--latents names a latent twice; name it once, with the strength it shall have.")
    return dict(zip(latents, strengths, strict=True))


def latent_meanings(sae_path: str) -> dict[int, str]:
    """The best meaning of each latent that has one (`latent_index.best_meanings`)."""

    return {latent: meaning.text for latent, meaning in best_meanings(sae_path).items()}


def strongest_latents(setup: Setup, ids: list[int], n: int) -> list[tuple[str, list[tuple[int, float]]]]:
    """Each token's text and its n strongest latents with their activations, normalised space; none on begin-of-text."""

    with torch.inference_mode():
        acts = setup.model.activations(torch.tensor([ids], device=setup.model.device), setup.sae.info["site"])[0]
        values, indices = setup.sae.encode(acts)
    rows = []
    for token, value, index in zip(ids, values.tolist(), indices.tolist(), strict=True):
        pairs = sorted(zip(index, value, strict=True), key=lambda pair: -pair[1])[:n]
        kept = [] if token == setup.tokenizer.bos_id else [pair for pair in pairs if pair[1] > 0]
        rows.append((setup.tokenizer.decode([token]), kept))
    return rows


# Control characters that a model writes could move the cursor or worse. Pictures of them are shown.
_VISIBLE = {i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"} | dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


def seeds_of(config, n: int, first: int = 0) -> list[int]:
    return [config.seed * 1_000_003 + first + i for i in range(n)]


def prompts_in(lines: Iterable[str]) -> list[str]:
    return [prompt for line in lines if (prompt := line.rstrip("\r\n")).strip()]
