"""The kinds of SAE beside TopK, and transcoders, on SmolLM2: the same activations, as many of them, the same L0.

Reads   SmolLM2 (fetch_model.py) and its own words
Writes  RUN_DIR: the activations, a folder per kind; kinds.json, curves.png; prints a markdown table
Method  the demo's recipe for every kind, in one process: equal data, order, seed and learning rate, k 32. FVU, of raw
        activations, because kinds normalise differently, and loss recovered on held-out sentences; dead latents at the
        end of training; absorption of first letters (absorption.py); detection score of the names from distinctive
        words, mean over latents. The SAEs are at SITE; transcoders go from the same layer's MLP input to its output,
        and an SAE of that output stands beside them. Sentences are read after begin-of-text: else the first token of
        each, 130 times as long as the others in the residual stream, is all that raw activations teach. The curves are
        of held-out activations, as each kind normalises them. Speed: of the step alone on random activations, all kinds
        in turn, the median of ROUNDS
Cost    about 5 minutes per kind on two cores; a killed run continues with the stage it was in

    python benchmarks/sae_kinds.py
    python benchmarks/sae_kinds.py --steps_only      # nothing but the speed
"""

from common import machine, median_rates, timed

from pipeline.options import Count, CountOrZero, parse_constants
from pipeline.run import run

RUN_DIR = "data/benchmark_kinds"  # folder for everything
SITE = "layers.15.resid_post"  # of the SAEs
NUM_SAMPLES: CountOrZero = 8000  # sentences to capture; 0 for all
NUM_EPOCHS: Count = 6  # passes over them
NUM_SENTENCES: Count = 1000  # held-out sentences to evaluate on
ROUNDS: Count = 15  # steps of each kind to time
STEPS_ONLY = False  # time the steps, train nothing

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import json
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import absorption
import pyarrow.parquet as pq
import torch

from autoencoder.step import Step, StepOptions
from embedded import recipe as recipes
from embedded.recipe import SMOLLM2, Recipe, command, flags, run_command
from pipeline.distributed import ALONE, make_grid
from pipeline.documents import arrow_file
from pipeline.figures import new_figure, save_figure
from pipeline.files import PROJECT_DIR, read_json, write_json
from sae import Kind, SparseAutoencoder, load_sae_model

_K, _BATCH_SIZE = 32, 1024  # the recipe's
_PREFIXES = (128, 512, 1536)  # and all 4096


class Way(NamedTuple):
    """A kind of SAE to train."""

    training: Mapping[str, object]  # options of sae_training.py besides the recipe's
    kind: Kind = Kind()
    reads: str | None = None  # kind of site in SITE's layer; SITE itself when None
    writes: str | None = None  # kind of the target's site


_SCALED = Kind(normalization="scale", scale=0.15)  # how normalization none trains
_TRANSCODER = Kind(centred=False, target_site="layers.15.mlp_out")
WAYS = {
    "TopK": Way({}),
    "BatchTopK": Way({"gate": "batch_topk"}, Kind("jumprelu")),
    "Matryoshka TopK": Way({"matryoshka": _PREFIXES}),
    "Matryoshka BatchTopK": Way({"matryoshka": _PREFIXES, "gate": "batch_topk"}, Kind("jumprelu")),
    "TopK, no normalisation": Way({"normalization": "none"}, _SCALED),
    "transcoder": Way({}, _TRANSCODER, "ffn_norm", "mlp_out"),
    "skip transcoder": Way({"skip": True}, _TRANSCODER._replace(skip=True), "ffn_norm", "mlp_out"),
    "TopK of mlp_out": Way({}, reads="mlp_out"),
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


def evaluate(saes: Mapping[str, Path], n_sentences: int) -> None:
    """All that have not been, in one run."""
    left = [sae for sae in saes.values() if not sae.with_suffix(".evaluation.json").exists()]
    if left:
        run_command(command("sae_evaluation.py", sae_model_path=left, num_sentences=n_sentences, batch_tokens=1024))


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


def curve(sae: Path) -> list[tuple[int, float]]:
    """(activations trained on, FVU of held-out ones), at the end of each epoch."""
    lines = map(json.loads, sae.with_suffix(".metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["tokens"], line["val_fvu"]) for line in lines if "val_fvu" in line]


def draw(saes: Mapping[str, Path], path: Path) -> None:
    """A panel for SAEs of SITE and one for what writes mlp_out; dashed: without normalisation of each activation."""
    panels = {"SAEs of resid_post": [], "of mlp_out": []}
    for title in saes:
        panels["SAEs of resid_post" if WAYS[title].reads is None else "of mlp_out"].append(title)
    panels = {panel: titles for panel, titles in panels.items() if titles}
    figure = new_figure(5.5 * len(panels), 4)
    for axis, (panel, titles) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for title in titles:
            tokens, fvu = zip(*curve(saes[title]), strict=True)
            style = "--" if WAYS[title].kind.normalization == "scale" else "-"
            axis.plot([n / 1e6 for n in tokens], fvu, style, marker="o", markersize=3, label=title)
        axis.set(title=panel, xlabel="million activations", ylabel="FVU of held-out activations, as trained on")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, path)


def step_table(rates: Mapping[str, float]) -> str:
    return "\n".join(
        [
            "| kind | activations/s in the step | time of a step, beside TopK's |",
            "|---|---|---|",
            *(f"| {title} | {rate * _BATCH_SIZE:,.0f} | {rates['TopK'] / rate:.2f} |" for title, rate in rates.items()),
        ]
    )


def table(rows: list[dict[str, Any]]) -> str:
    return "\n".join(
        [
            "| kind | FVU | L0 | dead | loss recovered | KL, nats | absorbed | absorption fraction | main latents | "
            "detection score |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(
                f"| {row['kind']} | {row['fvu_raw']:.4f} | {row['l0']:.1f} | {row['dead_frac']:.1%} | "
                f"{row['loss_recovered']:.2%} | {row['kl_spliced']:.4f} | {absorbed_in(row)} | "
                f"{row.get('detection', '')} |"
                for row in rows
            ),
        ]
    )


def absorbed_in(row: dict[str, Any]) -> str:
    if "rate" not in row:
        return " | | "
    return f"{row['rate']:.1%} | {row['fraction']:.1%} | {row['main_latents']:.1f}"


def main() -> None:
    config = parse_constants(globals())
    os.chdir(PROJECT_DIR)
    run_dir = Path(config.run_dir)
    recipe = SMOLLM2._replace(site=config.site, num_samples=config.num_samples, num_epochs=config.num_epochs)
    if config.steps_only:
        print(f"{machine()}\n\n{step_table(steps_per_second(576, recipe.n_latents, config.rounds))}")
        return
    make_batches(recipe, run_dir)
    folders = {title: run_dir / title.replace(", ", "-").replace(" ", "-") for title in WAYS}
    saes = {title: train(way, recipe, run_dir, folders[title]) for title, way in WAYS.items()}
    draw(saes, run_dir / "curves.png")
    evaluate(saes, config.num_sentences)
    at_site = {title: load_sae_model(sae) for title, sae in saes.items() if WAYS[title].reads is None}
    absorptions = absorption.measure(at_site, recipe.model_dir, absorption.NUM_WORDS)
    rows: list[dict[str, Any]] = []
    for title, sae in saes.items():
        quality = read_json(sae.with_suffix(".evaluation.json"), "remove it.")
        numbers = {key: value for key, value in quality.items() if isinstance(value, (int, float))}
        rows.append({"kind": title, **numbers, **(absorptions[title]._asdict() if title in absorptions else {})})
    print(f"{machine()}\n\n{table(rows)}\n", flush=True)
    for row, (title, sae) in zip(rows, saes.items(), strict=True):
        row["detection"] = round(name(sae, run_dir / "activations" / site_of(recipe, WAYS[title].reads)), 3)
        write_json(run_dir / "kinds.json", {"config": vars(config), "machine": machine(), "kinds": rows})
    print(f"{table(rows)}\n\n{step_table(steps_per_second(576, recipe.n_latents, config.rounds))}")


if __name__ == "__main__":
    run(main)
