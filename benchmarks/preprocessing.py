"""Preprocessing: GB/s of sae_preprocessing.py, statistics included, against cp and sync of the same bytes, in one run.

Reads   activations made once: random numbers in the capture's format (their values do not affect the work)
Writes  DATA_DIR, three times SIZE_GB; prints a row of a markdown table
Method  the script from start to end, start-up of its processes and checksums included, against cp of the input folder
        followed by sync. One of each in turn, REPEATS times; medians. Run it alone on the machine
Cost    3 minutes on two cores

    python benchmarks/preprocessing.py
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from common import machine, median_rates, run_script, spread, timed

from pipeline.files import require_disk, sha256
from pipeline.manifests import begin_or_continue, write_manifest
from pipeline.options import Count, CountOrZero, Positive, parse_constants
from pipeline.progress import gb, progress_bar
from pipeline.run import run

DATA_DIR = "data/benchmark_preprocessing"  # folder for activations, batches and the copy
SIZE_GB: Positive = 4.0  # size of the activations
D_MODEL: Count = 3072  # their width: Llama 3.2 3B's
SHARD_GB: Positive = 0.25  # size of a shard: several for every core
NUM_PROCESSES: CountOrZero = 0  # processes; 0 for one per core
REPEATS: Count = 5  # runs of each way

_TOKENS = 27  # per sentence

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import torch

from pipeline.activation_store import CAPTURE_STAGE, write_shard


def make_activations(folder: Path, size_gb: float, d_model: int, shard_gb: float) -> Path:
    """Write shards and a manifest as capture_activations.py does, unless they are there."""
    decides = {"size_gb": size_gb, "d_model": d_model, "shard_gb": shard_gb}
    if begin_or_continue(folder, CAPTURE_STAGE, decides):
        return folder
    sentences = max(1, int(shard_gb * 1e9 / (2 * d_model * _TOKENS)))  # per shard
    records = []
    for i in progress_bar(range(max(1, round(size_gb / shard_gb))), unit="shard", desc="activations"):
        generator = torch.Generator().manual_seed(i)
        acts = torch.empty(sentences * _TOKENS, d_model).normal_(generator=generator).to(torch.bfloat16)
        path = folder / f"acts-{i:05d}-00.safetensors"
        tensors = {
            "acts": acts,
            "token_ids": torch.zeros(len(acts), dtype=torch.int32),
            "sentence_idx": torch.arange(i * sentences, (i + 1) * sentences),
            "offsets": torch.arange(0, len(acts) + 1, _TOKENS),
        }
        write_shard(path, tensors)
        about = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
        records.append(about | {"first_sentence_idx": i * sentences, "n_sentences": sentences, "n_tokens": len(acts)})
    inherited = ("model", "model_dir", "sentences_dir", "site", "layer", "bos_id", "max_tokens", "rope_scaling_factor")
    n = len(records) * sentences
    write_manifest(
        folder,
        CAPTURE_STAGE,
        complete=True,
        decides=decides,
        **dict.fromkeys(inherited),
        begin_of_text=False,
        d_model=d_model,
        dtype="bfloat16",
        dataset={"sentences": n, "sentences_in_all": n, "seed": 42, "shards": []},
        counts={"sentences": n, "tokens": n * _TOKENS},
        shards=records,
    )
    return folder


def preprocess(source: Path, target: Path, options: dict[str, Any]) -> None:
    run_script("sae_preprocessing.py", input_dir=source, output_dir=target, batch_size=1024, **options)


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()


def main() -> None:
    config = parse_constants(globals())
    folder = Path(config.data_dir).resolve()
    require_disk(folder, int(3.1e9 * config.size_gb))
    source = make_activations(folder / "activations", config.size_gb, config.d_model, config.shard_gb)
    n_bytes = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    options = {"shard_gb": config.shard_gb, "num_processes": config.num_processes}
    ways = {
        "preprocess": lambda target: preprocess(source, target, options),
        "copy": lambda target: copy(source, target),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in progress_bar(range(config.repeats), unit="round", desc="benchmark"):
        for way, run_way in ways.items():
            target = folder / way
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            seconds[way].append(timed(run_way, target)[0])
    rate = median_rates(n_bytes / 1e9, seconds)
    print("| bytes | sae_preprocessing.py | cp and sync | ratio | slowest / fastest run | machine |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {gb(n_bytes)}, d_model {config.d_model} | {rate['preprocess']:.3f} GB/s | {rate['copy']:.3f} GB/s "
        f"| {rate['preprocess'] / rate['copy']:.2f} | {spread(seconds):.2f} | {machine()} |"
    )


if __name__ == "__main__":
    run(main)
