"""Where in SmolLM2 an SAE does best: the demo's recipe at several sites, beside each other.

Reads   SmolLM2 (fetch_model.py) and its own words
Writes  RUN_DIR: the files of every stage, a folder per site; sites.json; prints a markdown table
Method  the same sentences and training at every site. FVU and loss recovered on held-out sentences; detection score of
        the names; the share of completions with a latent's own words at the best strength that costs at most 0.5 nats
        and 5 % repeated trigrams (sae_steering.py), and without steering
Cost    20 minutes on two cores; a killed run starts the stage it was in again

    python benchmarks/sae_sites.py
"""

import common  # noqa: F401 (puts the project on sys.path)

from pipeline.options import CountOrZero, parse_constants
from pipeline.run import run

RUN_DIR = "data/benchmark_sites"  # folder for everything
SITES: tuple[str, ...] = (
    "layers.10.resid_post",
    "layers.15.resid_post",
    "layers.20.resid_post",
    "layers.25.resid_post",
    "layers.25.attention_norm",
)  # 1/3, 1/2, 2/3 and 5/6 of the depth
NUM_SAMPLES: CountOrZero = 8000  # sentences to capture; 0 for all

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import os
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq

from embedded import recipe as recipes
from embedded.recipe import SMOLLM2, Recipe, run_command
from pipeline.documents import arrow_file
from pipeline.files import PROJECT_DIR, read_json, write_json


def capture_all(recipe: Recipe, sites: tuple[str, ...], run_dir: Path) -> None:
    """Sentences, and every site's activations in one pass of the model."""
    (_, sentences), (_, capture), *_ = recipes.training_stages(recipe, run_dir)
    run_command(sentences)
    place = capture.index("--sites") + 1
    run_command([*capture[:place], *sites, *capture[place + 1 :]])


def run_site(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """Train, evaluate, name and steer at one site; its figures."""
    folder = run_dir / recipe.site
    folder.mkdir(exist_ok=True)
    for shared in ("sentences", "activations"):
        if not (folder / shared).exists():
            (folder / shared).symlink_to(Path("..") / shared)
    sae = folder / "sae" / "sae.json"
    if not sae.exists() or "steering" not in read_json(sae, "remove it."):
        for _, words in recipes.stages(recipe, folder):
            run_command(words)
    quality = read_json(sae.with_suffix(".evaluation.json"), "remove it.")
    steering = read_json(sae, "remove it.")["steering"]
    scores = pq.ParquetFile(arrow_file(sae.with_name(f"{recipes.MEANING}.scores.parquet"))).read().to_pydict()
    return {
        "site": recipe.site,
        "fvu": quality["fvu"],
        "loss_recovered": quality["loss_recovered"],
        "detection": fmean(scores["balanced_accuracy"]),
        "strength": steering["strength"],
        **{f"{kind}_words": steering["measured"][kind]["words_share"] for kind in ("clean", "steered")},
        "nats": steering["measured"]["steered"]["nats"] - steering["measured"]["clean"]["nats"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    return "\n".join(
        [
            "| site | FVU | loss recovered | detection score | strength | its words: clean, steered | nats |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| `{row['site']}` | {row['fvu']:.3f} | {row['loss_recovered']:.1%} | {row['detection']:.2f} | "
                f"{row['strength']:g} | {row['clean_words']:.0%}, {row['steered_words']:.0%} | {row['nats']:+.2f} |"
                for row in rows
            ),
        ]
    )


def main() -> None:
    config = parse_constants(globals())
    os.chdir(PROJECT_DIR)
    run_dir = Path(config.run_dir)
    recipe = SMOLLM2._replace(num_samples=config.num_samples)
    capture_all(recipe._replace(site=config.sites[0]), config.sites, run_dir)
    rows = [run_site(recipe._replace(site=site), run_dir) for site in config.sites]
    write_json(run_dir / "sites.json", {"config": vars(config), "sites": rows})
    print(table(rows))


if __name__ == "__main__":
    run(main)
