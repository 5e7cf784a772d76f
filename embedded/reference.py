"""Make a model's reference SAE, which comes with the project: train it, name its latents, and keep what people look at.

Reads   tiny_llama: RUN_DIR, which demo.py wrote. smollm2: the model's own words (sample_dialogues.py) and DOCUMENTS
Writes  the SAE in bfloat16 and its files: llama_3/tiny_llama/sae.*, its names in latent_index_meaning/; or
        llama_3/smollm2/sae.*, its names among them
Method  smollm2 trains on both texts, but its top sentences are from the model's own words alone, so that they can be
        shown whole. The tiny Llama's quote other projects' documentation: only their places in it are kept
        (embedded/places.py)
Cost    on two cores 5 minutes for tiny_llama, an hour or two for smollm2 (3 million activations)

    python -m embedded.reference --model smollm2 --documents data/english.parquet
    make reference
"""

from typing import Literal

from pipeline.options import parse_constants
from pipeline.run import run

MODEL: Literal["smollm2", "tiny_llama"]  # whose SAE
RUN_DIR = "demo_run"  # folder of the run: the demo's for tiny_llama; made here for smollm2
DOCUMENTS: str | None = None  # smollm2: a parquet file of further English text to train on

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from embedded import recipe as recipes
from embedded.places import write_places
from embedded.recipe import SMOLLM2, SMOLLM2_DIR, TINY_LLAMA, command, run_command
from pipeline.documents import arrow_file
from pipeline.files import PROJECT_DIR, atomic_path
from pipeline.sae_files import SaeFiles
from pipeline.source import Source
from sae import load_sae_model, save_sae

_MEANINGS_DIR = "latent_index_meaning"  # of the tiny Llama's names
_OF_TRAINING = ("curves.png", "frequencies.png", "metrics.jsonl")  # NAME.* files to copy unchanged
_TOP_KEPT = 5  # sentences per latent in the committed NAME.top.parquet


def write_sae(found: SaeFiles, made: SaeFiles, model_dir: str) -> None:
    """Write the SAE in bfloat16, with a JSON that has no paths of this machine."""
    sae = load_sae_model(found.path)
    source = Source.read(sae.info, found.json).with_folder("model_dir", model_dir)
    facts = {**sae.info, **source.as_json(made.json)}
    save_sae(sae, made.path, without_absolute_paths(facts), torch.bfloat16)


def copy_files(found: SaeFiles, made: SaeFiles, suffixes: tuple[str, ...]) -> None:
    for suffix in suffixes:
        shutil.copy(found.beside(suffix), made.beside(suffix))


def without_absolute_paths(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of an SAE, except the folders and options that are absolute paths."""
    options = {name: value for name, value in facts["config"].items() if not os.path.isabs(str(value))}
    return {name: value for name, value in facts.items() if name != "absolute"} | {"config": options}


# ---- the tiny Llama's


def copy_names(found: SaeFiles, meanings_dir: Path) -> None:
    """Copy the names by every aggregation, scoring those that the demo has not scored."""
    meanings_dir.mkdir(parents=True, exist_ok=True)
    for aggregation in ("mean", "max", "last"):
        meanings = found.beside(f"meaning_distinctive-words_{aggregation}.yaml")
        if not meanings.with_suffix(".scores.parquet").exists():
            run_command(recipes.scores(Path(found.path), meanings))
        for suffix in (".yaml", ".scores.parquet", ".scores.png"):
            name = f"latent_idx_meaning_{aggregation}-aggregated_distinctive-words{suffix}"
            shutil.copy(meanings.with_suffix(suffix), meanings_dir / name)


def write_top_places(run_dir: Path, made: SaeFiles) -> None:
    """Run the bfloat16 SAE on the demo's sentences; write its table of latents and the places of its top sentences."""
    tables = run_dir / "reference"
    run_command(
        command(
            "capture_top_activating_sentences.py",
            data_dir=run_dir / "activations" / TINY_LLAMA.site,
            model_path=made.path,
            captured_data_output_dir=tables,
            top_sentences=recipes.TOP_SENTENCES,
        )
    )
    shutil.copy(tables / "sae.latents.parquet", made.beside("latents.parquet"))
    top, places = tables / "sae.top.parquet", made.beside("top_places.parquet")
    write_places(top, run_dir / "sentences", run_dir / "documents", places)


def make_tiny_llamas(run_dir: Path) -> None:
    found, made = SaeFiles(run_dir / "sae" / "sae.pth"), SaeFiles(Path(TINY_LLAMA.model_dir) / "sae.pth")
    write_sae(found, made, TINY_LLAMA.model_dir)
    copy_files(found, made, ("promoted.parquet", *_OF_TRAINING))
    run_command(recipes.evaluation(Path(made.path)))
    copy_names(found, Path(_MEANINGS_DIR))
    write_top_places(run_dir, made)
    run_command(command("sae_steering.py", model_path=made.path))


# ---- SmolLM2's


def keep_strongest(path: Path) -> None:
    """Of NAME.top.parquet, keep the strongest sentences of each latent by its highest token."""
    top = pq.ParquetFile(arrow_file(path)).read()
    top = top.filter((pc.field("aggregation") == "max") & (pc.field("rank") < _TOP_KEPT))
    with atomic_path(path) as temporary, arrow_file(temporary, "wb") as file:
        pq.write_table(top, file, compression="zstd", compression_level=19)


def make_smollm2s(run_dir: Path, documents: str | None) -> None:
    texts = run_dir / "documents"
    texts.mkdir(parents=True, exist_ok=True)
    for path in (SMOLLM2.documents, documents):
        if path:
            shutil.copy2(path, texts)
    processes = recipes.processes_for(torch.cuda.device_count())
    all_text = SMOLLM2._replace(
        documents=str(texts),
        dtype="bfloat16",
        num_samples=135_000,
        n_latents=6144,
        num_epochs=2,
        training={**SMOLLM2.training, "encoder_dtype": "bfloat16"},
    )
    for _, words in recipes.training_stages(all_text, run_dir, processes):
        run_command(words)
    own_words = all_text._replace(documents=SMOLLM2.documents, num_samples=30_000)
    (_, sentences), (_, capture), *_ = recipes.training_stages(own_words, run_dir / "own_words", processes)
    run_command(sentences)
    run_command(capture)

    found, made = SaeFiles(run_dir / "sae" / "sae.pth"), SaeFiles(Path(SMOLLM2_DIR) / "sae.pth")
    write_sae(found, made, SMOLLM2.model_dir)
    copy_files(found, made, _OF_TRAINING)
    run_command(recipes.evaluation(Path(made.path)))
    for _, words in recipes.naming_stages(Path(made.path), run_dir / "own_words" / "activations" / SMOLLM2.site):
        run_command(words)
    keep_strongest(made.beside("top.parquet"))
    made.beside("examples.parquet").unlink()
    for path in Path(SMOLLM2_DIR).glob("sae.meaning_distinctive-words_*"):
        if not path.name.startswith(recipes.MEANING):
            path.unlink()


def main() -> None:
    config = parse_constants(globals())
    os.chdir(PROJECT_DIR)
    if config.model == "tiny_llama":
        make_tiny_llamas(Path(config.run_dir))
    else:
        make_smollm2s(Path(config.run_dir), config.documents)


if __name__ == "__main__":
    run(main)
