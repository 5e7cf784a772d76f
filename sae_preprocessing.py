"""Shuffle captured activations into fixed-size batches, and take their statistics.

Reads   INPUT_DIR: one site's folder of capture_activations.py
Writes  OUTPUT_DIR/train-*.safetensors, validation-*.safetensors (acts: rows of activations, whole batches),
        statistics.safetensors (mean and variance, raw and normalised, float64), manifest.json
Method  split by sentence, then one uniformly random order over all tokens of a split, in two passes with sequential
        writes: how many rows go from each input shard to each output shard is drawn first (multivariate
        hypergeometric), then each shard's rows are permuted on their way out and again on their way in. Mean and
        variance by Welford's algorithm, merged as in Chan, Golub and LeVeque 1983
Cost    as much disk as the activations, and once more while it runs; memory a few shards per process

    python sae_preprocessing.py --input_dir data/activations/layers.22.attention_norm --output_dir data/batches
"""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

import stage

INPUT_DIR: str  # one site's captured activations
OUTPUT_DIR = "data/batches"  # folder for batches and statistics
MEAN_FILEPATH: str | None = None  # file for the statistics; statistics.safetensors in OUTPUT_DIR when not given
NUM_PROCESSES = 0  # processes; 0 for one a core
BATCH_SIZE = 1024  # activations a batch
VALIDATION_FRACTION = 0.05  # share of the sentences, the last of the seeded order, held out
NORMALIZE_EPS = 1e-5  # added to each activation's standard deviation when it is normalised
SHARD_GB = 1.0  # size of an output shard
SEED = 0  # of the order of activations

_STAGE = "sae_preprocessing.py"
_SPLITS = ("train", "validation")


class Statistics(NamedTuple):
    """Count, and per dimension mean and sum of squared distances from it, (d_model,) float64."""

    count: int
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> "Statistics":
        mean = x.mean(0) if len(x) else np.zeros(x.shape[1])
        return cls(len(x), mean, ((x - mean) ** 2).sum(0))

    def merge(self, other: "Statistics") -> "Statistics":
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return Statistics(count, mean, self.m2 + other.m2 + delta**2 * (self.count * other.count / count))


def normalize(x: np.ndarray, eps: float) -> np.ndarray:
    """What the SAE sees: each row minus its mean, over its standard deviation (n - 1) plus eps."""
    return (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + eps)


def plan_moves(n_rows: list[int], capacities: list[int], seed: tuple[int, ...]) -> np.ndarray:
    """Rows that input shard i gives to output shard o, (n_inputs, n_outputs), as a uniformly random order implies."""
    if sum(n_rows) >= 10**9:
        raise stage.InputError(f"{sum(n_rows):,} activations are more than the 10^9 shuffled at once; capture fewer.")
    rng = np.random.default_rng(seed)
    left = np.array(capacities, dtype=np.int64)
    moves = np.zeros((len(n_rows), len(capacities)), dtype=np.int64)
    for i, n in enumerate(n_rows):
        moves[i] = rng.multivariate_hypergeometric(left, n, method="marginals")
        left -= moves[i]
    return moves


def shard_sizes(n_rows: int, batch_size: int, rows_per_shard: int, keep_rest: bool) -> tuple[list[int], int]:
    """Rows of each output shard, and rows that fill no batch: kept in the last shard, or dropped."""
    rest = 0 if keep_rest else n_rows % batch_size
    kept = n_rows - rest
    sizes = [min(rows_per_shard, kept - start) for start in range(0, kept, rows_per_shard)]
    return sizes, rest


class Plan(NamedTuple):
    """What every worker needs to know."""

    input_dir: str
    output_dir: str
    scratch_dir: str
    first_validation_sentence: int
    eps: float
    seed: int
    moves: dict[str, np.ndarray]  # split -> rows from input shard i to output shard o; the last output is dropped
    n_outputs: dict[str, int]


def rng_for(plan: Plan, split: str, side: int, shard: int) -> np.random.Generator:
    return np.random.default_rng((plan.seed, _SPLITS.index(split), side, shard))


def scatter_shard(plan: Plan, i: int) -> None:
    """Pass 1: permute an input shard's rows, so that those of each output shard lie together; take its statistics."""
    import torch

    from activation_store import ActivationStore, write_shard

    torch.set_num_threads(1)
    path = Path(plan.scratch_dir) / f"scattered-{i:05d}.safetensors"
    if path.exists():
        return
    store = ActivationStore(plan.input_dir)
    source = store.folder / store.records[i]["file"]
    if stage.sha256(source) != store.records[i]["sha256"]:
        raise stage.InputError(f"{source} is altered: its checksum is not the manifest's; capture it again.")
    shard = store.shard(i)
    finite = torch.isfinite(shard.acts).all(1)
    if not finite.all():
        row = int((~finite).nonzero()[0, 0])
        sentence = int(shard.sentence_idx[int(torch.searchsorted(shard.offsets, row, right=True)) - 1])
        raise stage.InputError(f"{source} holds NaN or infinity in sentence {sentence}; capture it again.")
    n_train = int(shard.offsets[(shard.sentence_idx < plan.first_validation_sentence).sum()])
    tensors = {}
    for split, acts in (("train", shard.acts[:n_train]), ("validation", shard.acts[n_train:])):
        order = torch.from_numpy(rng_for(plan, split, 0, i).permutation(len(acts)))
        tensors[split] = acts[order]
    for name, transform in (("raw", lambda x: x), ("normalized", lambda x: normalize(x, plan.eps))):
        total = Statistics.of(np.zeros((0, store.d_model)))
        for start in range(0, n_train, 8192):
            chunk = shard.acts[start : min(start + 8192, n_train)].double().numpy()
            total = total.merge(Statistics.of(transform(chunk)))
        tensors[f"{name}_mean"] = torch.from_numpy(total.mean)
        tensors[f"{name}_m2"] = torch.from_numpy(total.m2)
    write_shard(path, tensors)


def gather_shard(plan: Plan, split: str, o: int) -> dict:
    """Pass 2: collect an output shard's rows from all scattered shards and permute them. Returns its record."""
    import torch

    from activation_store import open_shard, write_shard

    torch.set_num_threads(1)
    moves = plan.moves[split]
    path = Path(plan.output_dir) / f"{split}-{o:05d}.safetensors"
    if not path.exists():
        starts = moves[:, :o].sum(1)
        parts = []
        for i in np.flatnonzero(moves[:, o]):
            scattered = open_shard(Path(plan.scratch_dir) / f"scattered-{i:05d}.safetensors", _STAGE)
            parts.append(scattered.get_slice(split)[int(starts[i]) : int(starts[i] + moves[i, o])])
        rows = torch.cat(parts)
        order = torch.from_numpy(rng_for(plan, split, 1, o).permutation(len(rows)))
        write_shard(path, {"acts": rows[order]})
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": stage.sha256(path),
        "n_rows": int(moves[:, o].sum()),
    }


def merge_statistics(plan: Plan, n_train: list[int]) -> dict[str, Statistics]:
    from activation_store import open_shard

    merged: dict[str, Statistics] = {}
    for i, count in enumerate(n_train):
        file = open_shard(Path(plan.scratch_dir) / f"scattered-{i:05d}.safetensors", _STAGE)
        for name in ("raw", "normalized"):
            part = Statistics(count, file.get_tensor(f"{name}_mean").numpy(), file.get_tensor(f"{name}_m2").numpy())
            merged[name] = merged[name].merge(part) if name in merged else part
    return merged


def main() -> None:
    config = stage.parse_constants(globals())
    from activation_store import ActivationStore

    store = ActivationStore(config.input_dir)
    output_dir = Path(config.output_dir)
    scratch_dir = output_dir / ".scattered"
    mean_path = Path(config.mean_filepath) if config.mean_filepath else output_dir / "statistics.safetensors"
    decides = {name: getattr(config, name) for name in ("batch_size", "validation_fraction", "normalize_eps", "seed")}
    decides |= {
        "mean_filepath": config.mean_filepath,
        "shard_gb": config.shard_gb,
        "activations": [s["sha256"] for s in store.records],
    }

    n_sentences = store.manifest["dataset"]["sentences"]
    first_validation_sentence = n_sentences - round(config.validation_fraction * n_sentences)
    n_rows: dict[str, list[int]] = {"train": [], "validation": []}
    for shard in store.shards():
        n_train = int(shard.offsets[(shard.sentence_idx < first_validation_sentence).sum()])
        n_rows["train"].append(n_train)
        n_rows["validation"].append(len(shard.acts) - n_train)
    if sum(n_rows["train"]) < config.batch_size:
        raise stage.InputError(
            f"{config.input_dir} has {sum(n_rows['train'])} activations to train on, fewer than one batch of "
            f"{config.batch_size}; capture more sentences or lower --batch_size."
        )
    rows_per_shard = max(1, int(config.shard_gb * 1e9 / (2 * store.d_model * config.batch_size))) * config.batch_size
    moves, n_outputs, n_dropped = {}, {}, 0
    for number, split in enumerate(_SPLITS):
        sizes, rest = shard_sizes(sum(n_rows[split]), config.batch_size, rows_per_shard, split == "validation")
        moves[split] = plan_moves(n_rows[split], [*sizes, rest], (config.seed, number))
        n_outputs[split] = len(sizes)
        n_dropped += rest
    plan = Plan(
        config.input_dir,
        config.output_dir,
        str(scratch_dir),
        first_validation_sentence,
        config.normalize_eps,
        config.seed,
        moves,
        n_outputs,
    )
    n_bytes = 2 * store.d_model * store.n_tokens
    print(
        f"Reading {store.n_tokens:,} activations, {stage.gb(n_bytes)}, from {config.input_dir}; writing as much to "
        f"{output_dir}, and once more while it runs."
    )

    with stage.locked(output_dir):
        if stage.begin_or_continue(output_dir, _STAGE, decides):
            print(f"{output_dir} is complete already.")
            shutil.rmtree(scratch_dir, ignore_errors=True)
            return
        present = sum(f.stat().st_size for f in output_dir.rglob("*.safetensors"))
        stage.require_disk(output_dir, 2 * n_bytes - present)
        scratch_dir.mkdir(exist_ok=True)
        stage.remove_leftovers(scratch_dir)
        jobs = [(split, o) for split in _SPLITS for o in range(n_outputs[split])]
        n_workers = min(config.num_processes or os.cpu_count() or 1, max(len(store.records), len(jobs)))
        with (
            stage.Workers(n_workers) as workers,
            stage.progress(total=2 * n_bytes, unit="B", unit_scale=True, desc="shuffle") as bar,
        ):
            for i, _ in enumerate(workers.map(scatter_shard, [(plan, i) for i in range(len(store.records))])):
                bar.update(2 * store.d_model * store.records[i]["n_tokens"])
            records: dict[str, list[dict]] = {"train": [], "validation": []}
            for job, record in zip(jobs, workers.map(gather_shard, [(plan, *job) for job in jobs]), strict=True):
                records[job[0]].append(record)
                bar.update(2 * store.d_model * record["n_rows"])
        write_statistics(mean_path, merge_statistics(plan, n_rows["train"]))
        inherited = ("model", "model_dir", "sentences_dir", "site", "layer", "d_model", "dtype", "begin_of_text")
        counts = {split: sum(r["n_rows"] for r in records[split]) for split in _SPLITS}
        stage.write_manifest(
            output_dir,
            _STAGE,
            complete=True,
            decides=decides,
            config=vars(config),
            **{
                name: store.manifest[name]
                for name in (*inherited, "bos_id", "max_tokens", "rope_scaling_factor", "dataset")
            },
            input_dir=str(config.input_dir),
            first_validation_sentence=first_validation_sentence,
            normalize_eps=config.normalize_eps,
            batch_size=config.batch_size,
            statistics=os.path.relpath(mean_path, output_dir),
            counts={**counts, "dropped": n_dropped},
            shards=records["train"],
            validation_shards=records["validation"],
        )
        shutil.rmtree(scratch_dir)
    print(
        f"{counts['train']:,} activations to train on, {counts['validation']:,} held out, {n_dropped} dropped: "
        f"{output_dir}"
    )


def write_statistics(path: Path, statistics: dict[str, Statistics]) -> None:
    """mean_raw, var_raw, mean_normalized, var_normalized (population variance), each (d_model,) float64; count."""
    import torch

    from activation_store import write_shard

    tensors = {"count": torch.tensor(statistics["raw"].count)}
    for name, s in statistics.items():
        tensors[f"mean_{name}"] = torch.from_numpy(s.mean)
        tensors[f"var_{name}"] = torch.from_numpy(s.m2 / s.count)
    write_shard(path, tensors)


if __name__ == "__main__":
    stage.run(main)
