"""Training on a stream, and at 8 bits a value, beside training from bfloat16 on disk, on the same sentences.

Reads   the model of --model (fetch_model.py for SmolLM2) and its recipe's text
Writes  RUN_DIR: the files of every stage, a folder per way and seed; streaming.json; prints markdown tables
Method  rounding: activations in float32, rounded in four ways; the squared error of the normalised activation over
        their variance, the first tokens of sentences apart, because theirs are far longer in a residual stream; and the
        worst row's. Training: the recipe's options for every way and SEEDS. FVU and loss recovered by sae_evaluation.py
        on held-out sentences, mean, standard deviation and range over the seeds
Cost    15 minutes on two cores with the tiny Llama; a killed run starts the stage it was in again

    python benchmarks/streaming.py
    python benchmarks/streaming.py --model smollm2 --num_samples 1000 --seeds 0 --run_dir data/benchmark_streaming_2
"""

from typing import Literal

from common import machine

from pipeline.options import Count, parse_constants
from pipeline.run import run

MODEL: Literal["tiny_llama", "smollm2"] = "tiny_llama"  # whose recipe
RUN_DIR = "data/benchmark_streaming"  # folder for everything
NUM_SAMPLES: Count = 4000  # sentences
SEEDS: tuple[int, ...] = (0, 1, 2)  # of initialisation and order
BUFFER_SIZES: tuple[int, ...] = (20_000, 200_000)  # activations in the stream's buffer; the larger one holds a pass

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import os
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from embedded import recipe as recipes
from embedded.recipe import RECIPES, Recipe, flags, run_command
from llama_3 import load_model, load_tokenizer
from pipeline.capturing import read_window
from pipeline.files import PROJECT_DIR, read_json, write_json
from pipeline.packing import pack, unpack
from pipeline.sentences import SentenceDataset

_MEASURED = 400  # sentences whose activations are rounded
_MAX_TOKENS = 192


# ---- rounding


def packed_by(block: int | None) -> Callable[[Tensor], Tensor]:
    """Rounding to int8 with a scale for each block of values; None: for each row."""
    return lambda x: unpack(pack(x, block or x.shape[1]), x.shape[1], block or x.shape[1]).float()


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda x: x.bfloat16().float(),
    "float16": lambda x: x.half().float(),
    "int8, a scale per row": packed_by(None),
    "int8, a scale per 64 values": packed_by(64),
}


def normalized(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)


def rounding_errors(recipe: Recipe, sentences: SentenceDataset, sites: list[str]) -> list[dict[str, Any]]:
    """A row per site and way of rounding."""
    tokenizer = load_tokenizer(recipe.model_dir)
    window = read_window(sentences, tokenizer, -1, range(min(_MEASURED, len(sentences))), _MAX_TOKENS)
    model = load_model(recipe.model_dir, packed=True)
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    with torch.inference_mode():
        for ids in window.token_ids:
            for site, x in model.activations(torch.tensor([ids]), sites).items():
                found[site].append(x[0].float())
    first = torch.zeros(window.n_tokens, dtype=torch.bool)
    first[window.offsets()[:-1]] = True
    rows = []
    for site, parts in found.items():
        x = torch.cat(parts)
        z = normalized(x)
        variance = float((z - z.mean(0)).square().sum(1).mean())
        peak = float((x.abs().amax(1) / x.square().mean(1).sqrt())[~first].median())
        for way, rounded in _ROUNDINGS.items():
            error = (normalized(rounded(x)) - z).square().sum(1) / variance
            rows.append(
                {
                    "site": site,
                    "way": way,
                    "peak": peak,
                    "first": float(error[first].mean()),
                    "others": float(error[~first].mean()),
                    "worst": float(error.max()),
                }
            )
    return rows


def rounding_table(rows: list[dict[str, Any]]) -> str:
    return "\n".join(
        [
            "| site | largest / rms coordinate | stored as | error: first tokens | other tokens | worst row |",
            "|---|---|---|---|---|---|",
            *(
                f"| `{row['site']}` | {row['peak']:.0f} | {row['way']} | {row['first']:.1e} | {row['others']:.1e} | "
                f"{row['worst']:.1e} |"
                for row in rows
            ),
        ]
    )


# ---- training


def make_sentences(recipe: Recipe, run_dir: Path) -> None:
    *documents, (_, sentences), _, _, _, _ = recipes.training_stages(recipe, run_dir, 1)
    for _, words in documents:
        if not (run_dir / "documents").exists():
            run_command(words)
    run_command(sentences)


def make_batches(recipe: Recipe, run_dir: Path) -> None:
    """Of both stores."""
    *_, (_, capture), (_, shuffle), _, _ = recipes.training_stages(recipe, run_dir, 1)
    for dtype in ("bfloat16", "int8"):
        run_command([*capture, *flags({"store_dtype": dtype, "output_dir": run_dir / dtype})])
        folders = {"input_dir": run_dir / dtype / recipe.site, "output_dir": run_dir / f"batches-{dtype}"}
        run_command([*shuffle, *flags(folders)])


def train(recipe: Recipe, run_dir: Path, folder: Path, seed: int, data: dict[str, object]) -> Path:
    """Train, unless that has been done; returns the SAE's path. data: options that say where activations are from."""
    sae = folder / "sae.pth"
    if not sae.exists():
        stages = dict(recipes.training_stages(recipe, run_dir, 1))
        words = stages["Sparse autoencoder, one process"]
        place = words.index("--data_dir")
        places = {"model_save_path": sae, "checkpoint_dir": folder / "checkpoints"}
        options = {**data, **places, "seed": seed}
        run_command([*words[:place], *words[place + 2 :], *flags(options)], quiet=True)
    return sae


def training_table(found: dict[str, list[dict[str, Any]]]) -> str:
    def spread(rows: list[dict[str, Any]], name: str, form: str) -> str:
        values = [row[name] for row in rows]
        if len(values) == 1:
            return f"{values[0]:{form}}"
        return f"{fmean(values):{form}} ± {stdev(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    return "\n".join(
        [
            "| activations from | tokens | FVU | loss recovered | dead |",
            "|---|---|---|---|---|",
            *(
                f"| {way} | {rows[0]['tokens_trained']:,} | {spread(rows, 'fvu', '.4f')} | "
                f"{spread(rows, 'loss_recovered', '.2%')} | {spread(rows, 'dead_frac', '.1%')} |"
                for way, rows in found.items()
            ),
        ]
    )


def main() -> None:
    config = parse_constants(globals())
    os.chdir(PROJECT_DIR)
    run_dir = Path(config.run_dir)
    recipe = RECIPES[config.model]._replace(num_samples=config.num_samples)
    make_sentences(recipe, run_dir)
    sentences = SentenceDataset(run_dir / "sentences", config.num_samples)
    sites = [recipe.site, f"{recipe.site.rpartition('.')[0]}.resid_post"]
    errors = rounding_errors(recipe, sentences, list(dict.fromkeys(sites)))
    print(f"{machine()}\n\n{rounding_table(errors)}\n", flush=True)

    make_batches(recipe, run_dir)
    stream = {"stream": recipe.model_dir, "sentences_dir": run_dir / "sentences", "sites": recipe.site}
    stream |= {"num_samples": config.num_samples, "dtype": recipe.dtype, "batch_tokens": 1024}
    ways: dict[str, dict[str, object]] = {
        "disk, bfloat16": {"data_dir": run_dir / "batches-bfloat16"},
        "disk, int8": {"data_dir": run_dir / "batches-int8"},
        **{f"a stream, buffer of {n:,}": {**stream, "buffer_size": n} for n in config.buffer_sizes},
    }
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for seed in config.seeds:
        for way, data in ways.items():
            folder = run_dir / "-".join([*re.findall(r"\w+", way), str(seed)])  # disk-int8-0
            sae = train(recipe, run_dir, folder, seed, data)
            if not sae.with_suffix(".evaluation.json").exists():
                run_command(recipes.evaluation(sae), quiet=True)
            quality = read_json(sae.with_suffix(".evaluation.json"), "remove it.")
            info = read_json(sae.with_suffix(".json"), "remove it.")
            found[way].append({**quality, "seed": seed, "tokens_trained": info["tokens_trained"]})
            print(f"{way}, seed {seed}: FVU {quality['fvu']:.4f}", flush=True)
    results = {"config": vars(config), "machine": machine(), "rounding": errors, "training": found}
    write_json(run_dir / "streaming.json", results)
    print(f"\n{machine()}\n\n{training_table(found)}")


if __name__ == "__main__":
    run(main)
