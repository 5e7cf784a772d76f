"""Preprocessing: GB/s of sae_preprocessing.py, statistics included, against cp and sync of the same bytes, in one run.

Reads   activations made once: random numbers in the capture's format (their values do not change the work)
Writes  DATA_DIR, three times SIZE_GB; prints a row of a markdown table
Method  the script from start to end, start-up of its processes and checksums included, against cp of the input folder
        followed by sync. One of each in turn, REPEATS times; medians. Run it alone on the machine
Cost    3 minutes on two cores

    python benchmarks/preprocessing.py
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from pipeline.files import PROJECT_DIR, require_disk, sha256
from pipeline.manifests import begin_or_continue, write_manifest
from pipeline.options import parse_constants
from pipeline.progress import gb, progress_bar
from pipeline.run import run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


DATA_DIR = "data/benchmark_preprocessing"  # folder for activations, batches and the copy
SIZE_GB = 4.0  # of activations
D_MODEL = 3072  # of them: Llama 3.2 3B's
SHARD_GB = 0.25  # of a shard, so that every core has some
NUM_PROCESSES = 0  # processes; 0 for one a core
REPEATS = 5  # runs of each way

_TOKENS = 27  # of a sentence


def make_activations(folder: Path, size_gb: float, d_model: int, shard_gb: float) -> Path:
    """Shards and manifest as capture_activations.py writes them; nothing when they are there."""
    import torch

    from pipeline.activation_store import CAPTURE_STAGE, write_shard

    decides = {"size_gb": size_gb, "d_model": d_model, "shard_gb": shard_gb}
    if begin_or_continue(folder, CAPTURE_STAGE, decides):
        return folder
    sentences = max(1, int(shard_gb * 1e9 / (2 * d_model * _TOKENS)))  # of a shard
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


def preprocess(source: Path, target: Path, config) -> None:
    options = {"shard_gb": config.shard_gb, "num_processes": config.num_processes, "batch_size": 1024}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, PROJECT_DIR / "sae_preprocessing.py", "--input_dir", source]
    subprocess.run([*command, "--output_dir", target, *flags], check=True, stdout=subprocess.DEVNULL)


def copy(source: Path, target: Path, config) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()


def timed(function, *args) -> float:
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


def main() -> None:
    config = parse_constants(globals())
    folder = Path(config.data_dir)
    require_disk(folder, int(3.1e9 * config.size_gb))
    source = make_activations(folder / "activations", config.size_gb, config.d_model, config.shard_gb)
    n_bytes = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    seconds: dict[str, list[float]] = {"preprocess": [], "copy": []}
    for _ in progress_bar(range(config.repeats), unit="round", desc="benchmark"):
        for way in (preprocess, copy):
            target = folder / way.__name__
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            seconds[way.__name__].append(timed(way, source, target, config))
    rate = {way: n_bytes / statistics.median(times) for way, times in seconds.items()}
    spread = max(max(times) / min(times) for times in seconds.values())
    machine = f"{os.cpu_count()} cores, {processor()}"
    print("| bytes | sae_preprocessing.py | cp and sync | ratio | slowest / fastest run | machine |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {gb(n_bytes)}, d_model {config.d_model} | {rate['preprocess'] / 1e9:.3f} GB/s "
        f"| {rate['copy'] / 1e9:.3f} GB/s | {rate['preprocess'] / rate['copy']:.2f} | {spread:.2f} | {machine} |"
    )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    run(main)
