"""A model with its tokenizer and its SAE, opened as a user's options say; shared by the terminal and the page."""

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from embedded.recipe import SMOLLM2, SMOLLM2_DIR
from latents.meanings import best_meanings
from latents.origin import source_of
from llama_3 import load_model, load_tokenizer
from llama_3.chat import usual_date
from llama_3.checkpoint import TINY_LLAMA_DIR, model_name, preferred_files
from llama_3.model import Intervention, Transformer, check_site
from llama_3.tokenizer import Tokenizer
from microscope import control
from pipeline.errors import InputError
from pipeline.files import PROJECT_DIR
from pipeline.sae_files import SaeFiles, without_ending
from sae import SparseAutoencoder, load_sae_model
from serving.engine import Row
from serving.modes import UNMEASURED, Defaults, steering_defaults
from serving.steering import Steering, check_scales, known_highest, make_steering, one_for_each

REFERENCE_SAES = {  # models with an SAE in this repository; the first that is here opens when none is named
    str(PROJECT_DIR / SMOLLM2.model_dir): str(PROJECT_DIR / SMOLLM2_DIR / "sae.pth"),
    TINY_LLAMA_DIR: str(Path(TINY_LLAMA_DIR) / "sae.pth"),
}


# ---- a user's options


@dataclass(frozen=True)
class ModelChoice:
    """What to open. The fields are options of the terminal and the page, whose comments explain each."""

    llama_model_dir: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    date: str = "auto"  # of a chat, "none", or "auto"
    sae_model_path: str | None = None
    sae_layer_idx: int | None = None  # this and the next three: for an SAE without a JSON
    k: int | None = None
    normalize_eps: float | None = None
    rope_scaling_factor: float | None = None  # also the model's, if there is no SAE

    @cached_property
    def model_dir(self) -> str:
        """The model named, or the SAE's, or the first with a reference SAE. Raises InputError if the SAE's is gone."""
        if self.llama_model_dir is not None:
            return self.llama_model_dir
        if self.sae_model_path is not None and (source := source_of(self.sae_model_path)).folders.get("model_dir"):
            return source.model_dir()
        return fetched_reference() or TINY_LLAMA_DIR

    @property
    def is_embedded(self) -> bool:
        return same_folder(self.model_dir, TINY_LLAMA_DIR)

    @property
    def name(self) -> str:
        """What the model is called. Raises InputError if there is none."""
        return "the tiny Llama" if self.is_embedded else model_name(self.model_dir)

    @property
    def sae_path(self) -> str | None:
        """The SAE named, or the model's reference SAE, or None."""
        return self.sae_model_path or reference_sae(self.model_dir)

    def about_sae(self) -> dict[str, Any]:
        """What the options say about the SAE: it must not contradict its JSON, and replaces a missing one."""
        facts = {name: getattr(self, name) for name in ("k", "normalize_eps", "rope_scaling_factor")}
        if self.sae_layer_idx is not None:
            facts["site"] = f"layers.{self.sae_layer_idx}.attention_norm"
        return {name: value for name, value in facts.items() if value is not None}


def reference_sae(model_dir: str) -> str | None:
    """The SAE in this repository that belongs to a model, if there is one."""
    paths = (sae for model, sae in REFERENCE_SAES.items() if same_folder(model, model_dir) and Path(sae).exists())
    return next(paths, None)


def fetched_reference() -> str | None:
    """The first model that was fetched and whose reference SAE is here; None if there is only the tiny Llama."""
    fetched = (model for model in REFERENCE_SAES if not same_folder(model, TINY_LLAMA_DIR))
    return next((model for model in fetched if preferred_files(model) and reference_sae(model)), None)


def same_folder(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int
    temperature: float  # 0: always the most likely token
    top_p: float
    seed: int

    def options(self, n: int, first: int = 0) -> dict[str, Any]:
        """Arguments of `generate` for n prompts from number `first` on, each with its own seed."""
        limits = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "top_p": self.top_p}
        return limits | {"seeds": self.seeds(n, first)}

    def seeds(self, n: int, first: int = 0) -> list[int]:
        return [(self.seed * 1_000_003 + first + i) % 2**64 for i in range(n)]  # as many as torch has


@dataclass(frozen=True)
class VectorChoice:
    """Control vectors to steer with. The fields are options of the terminal and the page, like `ModelChoice`'s.

    Raises InputError where they do not fit together.
    """

    control_vectors: Sequence[str] = ()
    vector_scales: Sequence[float] = (1.0,)
    vector_shift: int = 0

    def __post_init__(self) -> None:
        if len(self.scales) < len(self.control_vectors):
            raise InputError("Two files of --control_vectors have one name; rename one, since names tell them apart.")

    @cached_property
    def scales(self) -> dict[str, float]:
        """Name -> scale; a vector is called as its file without .gguf."""
        names = [without_ending(Path(path).name, ".gguf") for path in self.control_vectors]
        scales = one_for_each(names, self.vector_scales, "--control_vectors", "--vector_scales")
        return dict(zip(names, scales, strict=True))


Job = TypeVar("Job", ModelChoice, Sampling, VectorChoice)


def taken_from(options: Mapping[str, Any], job: type[Job]) -> Job:
    """A job, its fields filled from the options of the same names."""
    return job(**{field.name: options[field.name] for field in dataclasses.fields(job)})


# ---- what is opened


class OpenedVector(NamedTuple):
    """A control vector: what is added, times a scale, to the residual stream after some layers."""

    by_layer: Mapping[int, Tensor]  # layer -> (d_model,)
    scale: float  # unless a user says otherwise

    @property
    def where(self) -> str:
        layers = sorted(self.by_layer)
        return f"after layer {layers[0]}" if len(layers) == 1 else f"after layers {layers[0]} to {layers[-1]}"


@dataclass(frozen=True)
class SteeredModel:
    """A model with its tokenizer and, if there is one, its SAE. Requests may share it: it is read-only."""

    choice: ModelChoice
    model: Transformer
    tokenizer: Tokenizer
    date: str | None  # of a chat; None: without the date header
    sae: SparseAutoencoder | None = None
    sae_path: str = ""  # empty without an SAE
    control_vectors: Mapping[str, OpenedVector] = dataclasses.field(default_factory=dict)  # by name

    def need_sae(self) -> SparseAutoencoder:
        if self.sae is None:
            raise InputError("Latents need an SAE of this model; name it with --sae_model_path.")
        return self.sae

    @cached_property
    def highest(self) -> Tensor | None:
        """(n_latents,) each latent's highest observed activation; None, with a printed sentence, if unknown."""
        return known_highest(self.sae_path, self.need_sae().n_latents)

    @cached_property
    def defaults(self) -> Defaults:
        """How to steer unless a user says otherwise. Raises InputError where the SAE's JSON is broken."""
        return steering_defaults(self.sae.info, SaeFiles(self.sae_path).json) if self.sae else UNMEASURED

    @cached_property
    def meanings(self) -> Mapping[int, str]:
        """The best meaning of each latent that has one; prints a sentence for each unusable file."""
        unusable: list[str] = []
        meanings = latent_meanings(self.sae_path, self.need_sae().n_latents, unusable)
        for line in unusable:
            print(line, file=sys.stderr)
        return meanings

    def interventions(self, steering: Steering) -> list[Intervention]:
        """`steering` for a row; none where nothing is steered. Raises InputError for impossible steering."""
        check_scales(steering.control_vectors, self.control_vectors)
        found = [
            each
            for name, scale in steering.control_vectors.items()
            for each in control.interventions(self.control_vectors[name].by_layer, scale)
        ]
        if steering.strengths:
            found.append(make_steering(self.need_sae(), steering, self.highest, self.tokenizer.bos_id))
        return found

    def rows(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, first: int, steering: Sequence[Intervention]
    ) -> list[Row]:
        """For the engine: prompts from number `first` on, each with its own seed, until the model's own stop tokens."""
        stops = self.tokenizer.stop_ids
        options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "steering": steering}
        return [
            Row(prompt, sampling.max_new_tokens, stops, seed=seed, **options)
            for prompt, seed in zip(prompts, sampling.seeds(len(prompts), first), strict=True)
        ]

    def text_after(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """What the tokens add to the prompt's text."""
        return self.tokenizer.decode([*prompt, *tokens])[len(self.tokenizer.decode(prompt)) :]


def open_model(choice: ModelChoice, needs_sae: bool = False) -> SteeredModel:
    """Open what is named. needs_sae: if no SAE is named, open the model's reference SAE.

    Raises InputError for anything missing, broken, or mismatched.
    """
    device = pick_device(choice.device)
    sae_path = choice.sae_path if needs_sae else choice.sae_model_path
    if needs_sae and sae_path is None:
        raise InputError("Latents need an SAE of this model; name it with --sae_model_path.")
    sae = open_sae(sae_path, device, choice) if sae_path else None
    rope_scaling_factor = sae.info.get("rope_scaling_factor") if sae else choice.rope_scaling_factor
    dtype = pick_dtype(choice.dtype, device)
    model = load_model(choice.model_dir, device, dtype, rope_scaling_factor, packed=True)
    tokenizer = load_tokenizer(choice.model_dir)
    date = chat_date(choice.date, model)
    if not (sae and sae_path):
        return SteeredModel(choice, model, tokenizer, date)
    check_fits(sae, sae_path, model, choice.model_dir)
    return SteeredModel(choice, model, tokenizer, date, sae, sae_path)


def with_control_vectors(opened: SteeredModel, choice: VectorChoice) -> SteeredModel:
    """A copy that can also be steered by control vectors. Raises InputError for a broken file or another model's."""
    vectors = {
        name: OpenedVector(control.read_gguf_vectors(path, opened.model, choice.vector_shift), scale)
        for path, (name, scale) in zip(choice.control_vectors, choice.scales.items(), strict=True)
    }
    return dataclasses.replace(opened, control_vectors=vectors)


def pick_device(name: str) -> str:
    """auto: a GPU if there is one. Raises InputError for a device that cannot be used."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device} cannot be used here ({reason}); write cpu or cuda.") from None
    return device


def pick_dtype(name: str, device: str) -> torch.dtype:
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    return getattr(torch, name)


def open_sae(path: str, device: str, choice: ModelChoice) -> SparseAutoencoder:
    """The SAE. Raises InputError if its site is unknown."""
    sae = load_sae_model(path, device, **choice.about_sae())
    if "site" not in sae.info:
        raise InputError(f"{path} has no JSON that names its site; name its layer with --sae_layer_idx.")
    return sae


def sae_of(path: str, model: Transformer, model_dir: str, device: str) -> SparseAutoencoder:
    """An SAE that names its site. Raises InputError for one that does not, or is of another model."""
    sae = open_sae(path, device, ModelChoice())
    check_fits(sae, path, model, model_dir)
    return sae


def check_fits(sae: SparseAutoencoder, sae_path: str, model: Transformer, model_dir: str) -> None:
    """Raise InputError unless the model has the SAE's width and site."""
    if sae.d_model != model.args.dim:
        raise InputError(
            f"{sae_path} has d_model {sae.d_model}, but {model_dir} has {model.args.dim}; name an SAE of this model."
        )
    try:
        for site in (sae.site, sae.output_site):
            check_site(site, model.args.n_layers)
    except ValueError as error:
        raise InputError(f"{sae_path} does not belong to {model_dir}: {error}") from None


def chat_date(date: str, model: Transformer) -> str | None:
    if date == "auto":
        return usual_date(model.args.rope_scaling_factor)
    return None if date == "none" else date


# ---- what it shows


def latent_meanings(sae_path: str, n_latents: int | None = None, unusable: list[str] | None = None) -> dict[int, str]:
    """The best meaning of each latent that has one (`latents.meanings.best_meanings`)."""
    return {latent: meaning.text for latent, meaning in best_meanings(sae_path, n_latents, unusable).items()}


def strongest_latents(
    opened: SteeredModel, ids: Sequence[int], n: int | None = None
) -> list[tuple[str, list[tuple[int, float]]]]:
    """Each token's text and its n strongest latents with their activations, normalised space; none on begin-of-text.

    n: None for all that fire.
    """
    sae = opened.need_sae()
    with torch.inference_mode():
        acts = opened.model.activations(torch.tensor([ids], device=opened.model.device), sae.info["site"])[0]
        values, indices = sae.encode(acts)
    if not values.isfinite().all():
        raise InputError(f"The model gives NaN or infinite numbers at {sae.info['site']}; check the checkpoint.")
    rows = []
    for token, value, index in zip(ids, values.tolist(), indices.tolist(), strict=True):
        pairs = sorted(zip(index, value, strict=True), key=lambda pair: -pair[1])[:n]
        kept = [] if token == opened.tokenizer.bos_id else [pair for pair in pairs if pair[1] > 0]
        rows.append((opened.tokenizer.decode([token]), kept))
    return rows
