"""The kinds of SAE beside TopK, and transcoders, on SmolLM2: the same activations, as many of them, the same L0.

Reads   SmolLM2 (fetch_model.py) and its own words
Writes  RUN_DIR: the activations, a folder per kind; kinds.json; prints a markdown table
Method  the demo's recipe for every kind, in one process. FVU, of raw activations, because kinds normalise differently,
        and loss recovered on held-out sentences; dead latents at the end of training; detection score of the names from
        distinctive words, mean over latents. The SAEs are at SITE; transcoders go from the same layer's MLP input to
        its output, and an SAE of that output stands beside them. Sentences are read after begin-of-text: else the first
        token of each, 130 times as long as the others in the residual stream, is all that raw activations teach.
        Speed: of the step alone on random activations, all kinds in turn, the median of ROUNDS
Cost    about 5 minutes per kind on two cores; a killed run starts the stage it was in again

    python benchmarks/sae_kinds.py
"""

from common import machine, median_rates, timed

from pipeline.options import Count, CountOrZero, parse_constants
from pipeline.run import run

RUN_DIR = "data/benchmark_kinds"  # folder for everything
SITE = "layers.15.resid_post"  # of the SAEs
NUM_SAMPLES: CountOrZero = 8000  # sentences to capture; 0 for all
NUM_EPOCHS: Count = 6  # passes over them
ROUNDS: Count = 15  # steps of each kind to time

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import os
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch

from autoencoder.step import Step, StepOptions
from embedded import recipe as recipes
from embedded.recipe import SMOLLM2, Recipe, command, flags, run_command
from pipeline.distributed import ALONE, make_grid
from pipeline.documents import arrow_file
from pipeline.files import PROJECT_DIR, read_json, write_json
from sae import Kind, SparseAutoencoder

_K, _BATCH_SIZE = 32, 1024  # the recipe's
_PREFIXES = (128, 512, 1536)  # and all 4096


class Way(NamedTuple):
    """A kind of SAE to train."""

    training: Mapping[str, object]  # options of sae_training.py besides the recipe's
    kind: Kind = Kind()
    reads: str | None = None  # kind of site in SITE's layer; SITE itself when None
    writes: str | None = None  # kind of the target's site


_TRANSCODER = Kind(centred=False, target_site="layers.15.mlp_out")
WAYS = {
    "TopK": Way({}),
    "BatchTopK": Way({"gate": "batch_topk"}, Kind("jumprelu")),
    "Matryoshka TopK": Way({"matryoshka": _PREFIXES}),
    "Matryoshka BatchTopK": Way({"matryoshka": _PREFIXES, "gate": "batch_topk"}, Kind("jumprelu")),
    "TopK, no normalisation": Way({"normalization": "none"}, Kind(normalization="none")),
    "TopK, constant scale": Way({"normalization": "scale"}, Kind(normalization="scale", scale=0.5)),
    "BatchTopK, constant scale": Way(
        {"normalization": "scale", "gate": "batch_topk"}, Kind("jumprelu", "scale", scale=0.5)
    ),
    "TopK of mlp_out": Way({}, reads="mlp_out"),
    "transcoder": Way({}, _TRANSCODER, "ffn_norm", "mlp_out"),
    "skip transcoder": Way({"skip": True}, _TRANSCODER._replace(skip=True), "ffn_norm", "mlp_out"),
}


def site_of(recipe: Recipe, kind: str | None) -> str:
    """The site of this kind in the recipe's layer."""
    return recipe.site if kind is None else f"{recipe.site.rpartition('.')[0]}.{kind}"


def make_batches(recipe: Recipe, run_dir: Path) -> None:
    """Sentences, every site's activations in one pass of the model, and their batches, shuffled alike."""
    (_, sentences), (_, capture), (_, shuffle), *_ = recipes.training_stages(recipe, run_dir, 1)
    sites = dict.fromkeys(site_of(recipe, kind) for way in WAYS.values() for kind in (way.reads, way.writes))
    run_command(sentences)
    run_command([*capture, *flags({"sites": tuple(sites), "begin_of_text": True})])
    for site in sites:
        places = {"input_dir": run_dir / "activations" / site, "output_dir": run_dir / "batches" / site}
        run_command([*shuffle, *flags(places)])


def train(way: Way, recipe: Recipe, run_dir: Path, folder: Path) -> Path:
    """Train, unless that has been done; returns the SAE's path."""
    sae = folder / "sae.pth"
    if not sae.exists():
        stages = dict(recipes.training_stages(recipe, run_dir, 1))
        places: dict[str, object] = {"data_dir": run_dir / "batches" / site_of(recipe, way.reads)}
        places |= {"model_save_path": sae, "checkpoint_dir": folder / "checkpoints"}
        if way.writes:
            places["target_data_dir"] = run_dir / "batches" / site_of(recipe, way.writes)
        run_command([*stages["Sparse autoencoder, one process"], *flags({**places, **way.training})])
    return sae


def name(sae: Path, activations: Path) -> float:
    """Name the latents; the mean detection score of the names."""
    scores = sae.with_name(f"{recipes.MEANING}.scores.parquet")
    if not scores.exists():
        for _, words in recipes.naming_stages(sae, activations)[:3]:
            run_command(words, quiet=True)
    return fmean(pq.ParquetFile(arrow_file(scores)).read().to_pydict()["balanced_accuracy"])


def steps_per_second(d_model: int, n_latents: int, rounds: int) -> dict[str, float]:
    """Of every kind, one step each in turn; the first of each does not count."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, _BATCH_SIZE, d_model, generator=generator).bfloat16()
    steps: dict[str, Step] = {}
    for title, way in WAYS.items():
        sae = SparseAutoencoder(d_model, n_latents, _K, kind=way.kind)
        sae.initialize(torch.zeros(d_model), generator)
        options = StepOptions(_BATCH_SIZE, d_model // 2, matryoshka=way.training.get("matryoshka"))
        steps[title] = Step(sae, options, make_grid(ALONE, 1))
    seconds: dict[str, list[float]] = {title: [] for title in steps}

    def one(step: Step, n_before: int, target: torch.Tensor | None) -> None:
        pending = step.gradients(x, target)
        step.apply(pending, step.agree(pending), 5e-5, n_before)

    for n_before in range(1 + rounds):
        for title, step in steps.items():
            took, _ = timed(one, step, n_before, y if WAYS[title].writes else None)
            seconds[title] += [took] if n_before else []
    return median_rates(1, seconds)


def table(rows: list[dict[str, Any]]) -> str:
    return "\n".join(
        [
            "| kind | FVU | L0 | dead | loss recovered | KL, nats | detection score | step, beside TopK's |",
            "|---|---|---|---|---|---|---|---|",
            *(
                f"| {row['kind']} | {row['fvu_raw']:.4f} | {row['l0']:.1f} | {row['dead_frac']:.1%} | "
                f"{row['loss_recovered']:.2%} | {row['kl_spliced']:.4f} | {row.get('detection', '-')} | "
                f"{row['step_time']:.2f} |"
                for row in rows
            ),
        ]
    )


def main() -> None:
    config = parse_constants(globals())
    os.chdir(PROJECT_DIR)
    run_dir = Path(config.run_dir)
    recipe = SMOLLM2._replace(site=config.site, num_samples=config.num_samples, num_epochs=config.num_epochs)
    make_batches(recipe, run_dir)
    folders = {title: run_dir / title.replace(", ", "-").replace(" ", "-") for title in WAYS}
    saes = {title: train(way, recipe, run_dir, folders[title]) for title, way in WAYS.items()}
    run_command(command("sae_evaluation.py", sae_model_path=[*saes.values()], num_sentences=1000, batch_tokens=1024))
    rates = steps_per_second(576, recipe.n_latents, config.rounds)
    rows: list[dict[str, Any]] = []
    for title, sae in saes.items():
        quality = read_json(sae.with_suffix(".evaluation.json"), "remove it.")
        numbers = {key: value for key, value in quality.items() if isinstance(value, (int, float))}
        rows.append({"kind": title, **numbers, "step_time": rates["TopK"] / rates[title]})
    print(
        f"{machine()}; {rates['TopK'] * _BATCH_SIZE:,.0f} activations/s in TopK's step\n\n{table(rows)}\n", flush=True
    )
    for row, (title, sae) in zip(rows, saes.items(), strict=True):
        row["detection"] = round(name(sae, run_dir / "activations" / site_of(recipe, WAYS[title].reads)), 3)
        write_json(run_dir / "kinds.json", {"config": vars(config), "machine": machine(), "kinds": rows})
    print(table(rows))


if __name__ == "__main__":
    run(main)
