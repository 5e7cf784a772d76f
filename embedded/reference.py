"""Make the embedded model's reference SAE: the demo's, in bfloat16, with its names.

Reads   RUN_DIR, which demo.py wrote
Writes  OUTPUT_DIR/sae.pth and its files; MEANINGS_DIR: the names of its latents, with their scores
Method  top sentences quote other projects' documentation, so only their places in it are kept (embedded/places.py)
Cost    5 minutes on two cores

    make reference
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from embedded import recipe
from embedded.places import write_places
from pipeline.files import PROJECT_DIR
from pipeline.options import parse_constants
from pipeline.run import run
from pipeline.sae_files import SaeFiles
from pipeline.source import Source
from sae import load_sae_model, save_sae

RUN_DIR = "demo_run"  # folder of the demo's run
OUTPUT_DIR = "llama_3/tiny_llama"  # folder of the embedded model
MEANINGS_DIR = "latent_index_meaning"  # folder for the names

_COPIED = ("promoted.parquet", "curves.png", "frequencies.png", "metrics.jsonl")  # NAME.* files to copy unchanged


def write_sae(found: SaeFiles, made: SaeFiles) -> None:
    """Write the SAE in bfloat16, with a JSON that has no paths of this machine."""
    sae = load_sae_model(found.path)
    source = Source.read(sae.info, found.json).with_folder("model_dir", recipe.MODEL_DIR)
    facts = {**sae.info, **source.as_json(made.json)}
    save_sae(sae, made.path, without_absolute_paths(facts), torch.bfloat16)
    for suffix in _COPIED:
        shutil.copy(found.beside(suffix), made.beside(suffix))


def without_absolute_paths(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of an SAE, except the folders and options that are absolute paths, and how to steer, which is measured
    anew."""
    options = {name: value for name, value in facts["config"].items() if not os.path.isabs(str(value))}
    others = {name: value for name, value in facts.items() if name not in ("absolute", "steering")}
    return others | {"config": options}


def copy_names(found: SaeFiles, meanings_dir: Path) -> None:
    """Copy the names by every aggregation, scoring those that the demo has not scored."""
    meanings_dir.mkdir(parents=True, exist_ok=True)
    for aggregation in ("mean", "max", "last"):
        meanings = found.beside(f"meaning_distinctive-words_{aggregation}.yaml")
        if not meanings.with_suffix(".scores.parquet").exists():
            recipe.run_command(recipe.scores(Path(found.path), meanings))
        for suffix in (".yaml", ".scores.parquet", ".scores.png"):
            name = f"latent_idx_meaning_{aggregation}-aggregated_distinctive-words{suffix}"
            shutil.copy(meanings.with_suffix(suffix), meanings_dir / name)


def write_top_places(run_dir: Path, made: SaeFiles) -> None:
    """Run the bfloat16 SAE on the demo's sentences; write its table of latents and the places of its top sentences."""
    tables = run_dir / "reference"
    recipe.run_command(
        recipe.command(
            "capture_top_activating_sentences.py",
            data_dir=run_dir / "activations" / recipe.SITE,
            model_path=made.path,
            captured_data_output_dir=tables,
            top_sentences=recipe.TOP_SENTENCES,
        )
    )
    shutil.copy(tables / "sae.latents.parquet", made.beside("latents.parquet"))
    top, places = tables / "sae.top.parquet", made.beside("top_places.parquet")
    write_places(top, run_dir / "sentences", run_dir / "documents", places)


def main() -> None:
    config = parse_constants(globals())
    os.chdir(PROJECT_DIR)
    run_dir = Path(config.run_dir)
    found, made = SaeFiles(run_dir / "sae" / "sae.pth"), SaeFiles(Path(config.output_dir) / "sae.pth")
    write_sae(found, made)
    measures = recipe.command("sae_evaluation.py", sae_model_path=made.path, num_sentences=1000, batch_tokens=2048)
    recipe.run_command(measures)
    copy_names(found, Path(config.meanings_dir))
    write_top_places(run_dir, made)
    recipe.run_command(recipe.command("sae_steering.py", model_path=made.path, n_concepts=24, n_prompts=16))


if __name__ == "__main__":
    run(main)
