"""Shuffle captured activations into fixed-size batches, and compute their statistics.

Reads   INPUT_DIR: one site's folder, from capture_activations.py
Writes  OUTPUT_DIR/train-*.safetensors, validation-*.safetensors (acts: rows of activations, whole batches),
        statistics.safetensors (mean and variance, raw and normalised, initial b_pre; float64), manifest.json
Method  split by sentence, then one uniformly random order over all tokens of a split, in two passes with sequential
        writes: how many rows go from each input shard to each output shard is drawn first (multivariate
        hypergeometric), then each shard's rows are permuted on their way out and again on their way in. Mean and
        variance by Welford's algorithm, merged as in Chan, Golub and LeVeque 1983. Checksums are compared before a
        shard is used
Cost    as much disk as the activations, twice that while it runs; memory: two shards per process. Activations stored as
        int8 stay packed (pipeline/packing.py) on their way

    python sae_preprocessing.py --input_dir data/activations/layers.22.attention_norm --output_dir data/batches
"""

from typing import Literal, NamedTuple

from pipeline.options import Count, CountOrZero, NotNegative, Seed, ShareBelowOne, Size, parse_constants
from pipeline.run import run

INPUT_DIR: str  # one site's captured activations
OUTPUT_DIR = "data/batches"  # folder for batches and statistics
MEAN_FILEPATH: str | None = None  # file for the statistics; statistics.safetensors in OUTPUT_DIR when not given
NUM_PROCESSES: CountOrZero = 0  # processes; 0 for one per core
BATCH_SIZE: Count = 1024  # activations per batch
VALIDATION_FRACTION: ShareBelowOne = 0.05  # share of the sentences held out, from the end of the seeded order
NORMALIZE_EPS: NotNegative = 1e-5  # added to each activation's standard deviation when it is normalised
B_PRE_START: Literal["mean", "median"] = "mean"  # initial b_pre; median: the geometric median of a sample
SHARD_GB: Size = 1.0  # size of an output shard
MEMORY_GB: Size = 16.0  # memory for all processes together; fewer run if it is not enough for one per core
SEED: Seed = 0  # for the order of activations

_STAGE = "sae_preprocessing.py"
_SPLITS = ("train", "validation")
_DECIDING = (  # options the result depends on, besides the activations
    *("batch_size", "validation_fraction", "normalize_eps", "seed", "b_pre_start", "shard_gb", "mean_filepath"),
)
_PURPOSES = ("moves", "scatter", "gather")  # of random numbers
_SHUFFLE = 2  # version of the order that a seed gives
_MEDIAN_ROWS = 2**15  # sample for the geometric median: its error is about 1/180 of a standard deviation

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.activation_store import ActivationStore, Shard, open_shard, write_shard
from pipeline.errors import InputError
from pipeline.files import remove_leftovers, require_writable, sha256
from pipeline.manifests import MANIFEST, output_folder, write_manifest
from pipeline.packing import row_bytes, unpack
from pipeline.progress import gb, progress_bar
from pipeline.statistics import ActivationStatistics, Statistics, normalize, write_statistics
from pipeline.workers import Workers


def geometric_median(x: np.ndarray, n_steps: int = 200) -> np.ndarray:
    """The point with the least sum of distances to the rows of x, by Weiszfeld's iteration (Weiszfeld 1937).

    Distances are smoothed at 10^-9 of their scale, so that the iteration cannot get stuck on a row.
    """
    median = x.mean(0)
    scale = max(1e-100, float(np.sqrt(((x - median) ** 2).sum(1).mean())))
    for _ in range(n_steps):
        distance = x - median
        weight = 1 / np.sqrt(np.einsum("ij,ij->i", distance, distance) + (1e-9 * scale) ** 2)
        before, median = median, weight @ x / weight.sum()
        if np.linalg.norm(median - before) <= 1e-9 * scale:
            break
    return median


# ---- how many rows go where


def random_numbers(seed: int, purpose: str, split: str, shard: int = 0) -> np.random.Generator:
    """A stream for each purpose, split and shard.

    All seeds have four parts: numpy pads shorter ones with zeros, so (0, 0) would give the same stream as (0, 0, 0, 0).
    """
    return np.random.default_rng((seed, _PURPOSES.index(purpose), _SPLITS.index(split), shard))


def hypergeometric(rng: np.random.Generator, good: int, bad: int, n: int) -> int:
    """How many of n drawn without replacement are good. numpy's own sampler stops at 10^9.

    Inverts the distribution over the mean +- 12 standard deviations (less than 10^-30 lies outside), built up from log
    ratios of neighbouring probabilities.
    """
    lowest, highest = max(0, n - bad), min(good, n)
    if lowest == highest:
        return lowest
    total = good + bad
    mean = n * good / total
    reach = 12 * (mean * (bad / total) * ((total - n) / (total - 1))) ** 0.5 + 1
    low, high = max(lowest, int(mean - reach)), min(highest, int(mean + reach) + 1)
    k = np.arange(low, high, dtype=np.float64)
    ratios = (good - k) / (k + 1) * ((n - k) / (bad - n + k + 1))  # p(k + 1) / p(k)
    logs = np.concatenate([[0.0], np.log(ratios).cumsum()])
    cumulated = np.exp(logs - logs.max()).cumsum()
    return low + int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))


def consecutive_groups(sizes: np.ndarray, most: int) -> list[slice]:
    """Group neighbouring shards, with at most `most` rows (or one shard) per group."""
    starts, total = [0], 0
    for i, size in enumerate(sizes):
        total += int(size)
        if total > most and i > starts[-1]:
            starts.append(i)
            total = int(size)
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def draw_moves(rng: np.random.Generator, n_rows: np.ndarray, capacities: np.ndarray) -> np.ndarray:
    """`plan_moves` for fewer rows than numpy's limit."""
    left = capacities.copy()
    moves = np.zeros((len(n_rows), len(capacities)), dtype=np.int64)
    for i, n in enumerate(n_rows):
        moves[i] = rng.multivariate_hypergeometric(left, int(n), method="marginals")
        left -= moves[i]
    return moves


def plan_moves(rng: np.random.Generator, n_rows: list[int], capacities: list[int], most: int = 4 * 10**8) -> np.ndarray:
    """How many rows go from input shard i to output shard o in a uniformly random order: (n_inputs, n_outputs).

    With more than `most` rows (numpy draws from fewer than 10^9), draw first the counts between groups of shards, then
    how many of those rows each shard of a group sends and receives, then the counts between shards. Each step is
    uniform given the previous one, so the result is too.
    """
    rows, room = np.array(n_rows, dtype=np.int64), np.array(capacities, dtype=np.int64)
    if rows.sum() <= most:
        return draw_moves(rng, rows, room)
    inputs, outputs = consecutive_groups(rows, most), consecutive_groups(room, most)
    between = np.zeros((len(inputs), len(outputs)), dtype=np.int64)
    left = [int(room[to].sum()) for to in outputs]
    for a, come_from in enumerate(inputs):
        n = int(rows[come_from].sum())
        for b in range(len(outputs)):
            between[a, b] = hypergeometric(rng, left[b], sum(left[b + 1 :]), n)
            left[b] -= int(between[a, b])
            n -= int(between[a, b])
    leaving = [draw_moves(rng, between[a], rows[come_from]) for a, come_from in enumerate(inputs)]  # (n_groups, shards)
    arriving = [draw_moves(rng, between[:, b], room[to]) for b, to in enumerate(outputs)]
    moves = np.zeros((len(rows), len(room)), dtype=np.int64)
    for a, come_from in enumerate(inputs):
        for b, to in enumerate(outputs):
            moves[come_from, to] = draw_moves(rng, leaving[a][b], arriving[b][a])
    return moves


def shard_sizes(n_rows: int, batch_size: int, rows_per_shard: int, keep_rest: bool) -> tuple[list[int], int]:
    """Rows of each output shard, and how many are dropped because they fill no batch; keep_rest drops none."""
    rest = 0 if keep_rest else n_rows % batch_size
    kept = n_rows - rest
    sizes = [min(rows_per_shard, kept - start) for start in range(0, kept, rows_per_shard)]
    return sizes, rest


class Split(NamedTuple):
    """The shuffle of the training rows, or of the held-out rows."""

    n_rows: list[int]  # of each input shard
    moves: np.ndarray  # (n_inputs, n_outputs + 1); the last column counts dropped rows
    n_outputs: int

    @property
    def n_dropped(self) -> int:
        return int(self.moves[:, self.n_outputs :].sum())


def n_training_rows(shard: Shard, first_validation_sentence: int) -> int:
    """How many of a shard's rows to train on: the first ones, because sentences are in order."""
    return int(shard.offsets[(shard.sentence_idx < first_validation_sentence).sum()])


def plan_splits(
    store: ActivationStore, first_validation_sentence: int, batch_size: int, rows_per_shard: int, seed: int
) -> dict[str, Split]:
    """Raises InputError if the training rows do not fill one batch."""
    n_rows: dict[str, list[int]] = {split: [] for split in _SPLITS}
    for shard in store.shards():
        n_train = n_training_rows(shard, first_validation_sentence)
        n_rows["train"].append(n_train)
        n_rows["validation"].append(len(shard.acts) - n_train)
    if sum(n_rows["train"]) < batch_size:
        raise InputError(
            f"{store.folder} has {sum(n_rows['train'])} activations to train on, fewer than one batch of "
            f"{batch_size}; capture more sentences or lower --batch_size."
        )
    splits = {}
    for split, rows in n_rows.items():
        sizes, rest = shard_sizes(sum(rows), batch_size, rows_per_shard, keep_rest=split == "validation")
        moves = plan_moves(random_numbers(seed, "moves", split), rows, [*sizes, rest])
        splits[split] = Split(rows, moves, len(sizes))
    return splits


def check_variety(store: ActivationStore) -> None:
    """Raise InputError if all activations are the same. Usually the first two differ."""
    first = None
    for shard in store.shards():
        first = shard.acts[:1] if first is None else first
        if any((rows != first).any() for rows in shard.acts.split(4096)):
            return
    if store.n_tokens > 1:
        raise InputError(
            f"All {store.n_tokens:,} activations of {store.folder} are alike: there is nothing to learn; capture other "
            "sentences, or another site."
        )


# ---- moving the rows


class Plan(NamedTuple):
    """What every worker needs to know."""

    input_dir: str
    output_dir: Path
    first_validation_sentence: int
    eps: float
    seed: int

    @property
    def scratch_dir(self) -> Path:
        return self.output_dir / ".scattered"

    def scattered(self, i: int) -> Path:
        return self.scratch_dir / f"scattered-{i:05d}.safetensors"


def scatter_shard(plan: Plan, i: int) -> None:
    """Pass 1: permute an input shard's rows, from which each output shard takes a run; compute its statistics."""
    torch.set_num_threads(1)
    if plan.scattered(i).exists():
        return
    store = ActivationStore(plan.input_dir)
    store.verify(i)
    shard = store.shard(i)
    n_train = n_training_rows(shard, plan.first_validation_sentence)
    tensors = {}
    for name, total in take_statistics(store, i, shard, n_train, plan.eps).items():
        tensors |= {f"{name}_mean": torch.from_numpy(total.mean), f"{name}_m2": torch.from_numpy(total.m2)}
    for split, acts in (("train", shard.acts[:n_train]), ("validation", shard.acts[n_train:])):
        order = torch.from_numpy(random_numbers(plan.seed, "scatter", split, i).permutation(len(acts)))
        tensors[split] = acts[order]
    write_shard(plan.scattered(i), tensors)


def take_statistics(store: ActivationStore, i: int, shard: Shard, n_train: int, eps: float) -> dict[str, Statistics]:
    """Statistics of shard i's training rows, raw and normalised. Raises InputError for NaN in any row."""
    nothing = np.zeros((0, store.d_model))
    raw_total, normalized_total = Statistics.of(nothing), Statistics.of(nothing)
    step = max(1, 2**17 // store.d_model)  # small enough for a chunk to stay in the processor's cache
    for first, last, is_train in ((0, n_train, True), (n_train, len(shard.acts), False)):
        for start in range(first, last, step):
            chunk = shard.acts[start : min(start + step, last)]
            x = unpack(chunk, store.d_model).double().numpy()
            with np.errstate(invalid="ignore"):
                raw = Statistics.of(x)
            if not np.isfinite(raw.mean).all():
                row = start + int((~np.isfinite(x)).any(1).nonzero()[0][0])
                sentence = int(shard.sentence_idx[int(torch.searchsorted(shard.offsets, row, right=True)) - 1])
                raise InputError(
                    f"{store.folder / store.records[i]['file']} holds NaN or infinity in sentence {sentence}; capture "
                    "it again."
                )
            if is_train:
                raw_total = raw_total.merge(raw)
                normalized_total = normalized_total.merge(Statistics.of(normalize(x, eps)))
    return {"raw": raw_total, "normalized": normalized_total}


def gather_shard(plan: Plan, split: str, o: int, starts: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """Pass 2: collect an output shard's rows, counts[i] of them from scattered shard i at row starts[i]; permute them.

    Returns the shard's record.
    """
    torch.set_num_threads(1)
    path = plan.output_dir / f"{split}-{o:05d}.safetensors"
    n_rows = int(counts.sum())
    if not path.exists():
        order = random_numbers(plan.seed, "gather", split, o).permutation(n_rows)
        goes_to = torch.from_numpy(np.argsort(order))
        rows, first = None, 0
        for i in np.flatnonzero(counts):
            scattered = open_shard(plan.scattered(int(i)), _STAGE)
            part = scattered.get_slice(split)[int(starts[i]) : int(starts[i] + counts[i])]
            if rows is None:
                rows = torch.empty(n_rows, part.shape[1], dtype=part.dtype)
            rows[goes_to[first : first + len(part)]] = part
            first += len(part)
        assert rows is not None  # no output shard is empty
        write_shard(path, {"acts": rows})
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path), "n_rows": n_rows}


def gather_jobs(plan: Plan, splits: dict[str, Split]) -> Iterator[tuple[Plan, str, int, np.ndarray, np.ndarray]]:
    """The arguments of gather_shard for every output shard."""
    for name, split in splits.items():
        starts = np.zeros(len(split.moves), dtype=np.int64)
        for o in range(split.n_outputs):
            counts = split.moves[:, o].copy()
            yield plan, name, o, starts.copy(), counts
            starts += counts


def shuffle(plan: Plan, store: ActivationStore, splits: dict[str, Split], n_workers: int) -> dict[str, list[dict]]:
    """Run both passes, or what is left of them. Returns the records of each split's shards."""
    records: dict[str, list[dict]] = {split: [] for split in _SPLITS}
    n_bytes = row_bytes(store.d_model, store.dtype)
    plan.scratch_dir.mkdir(exist_ok=True)
    remove_leftovers(plan.scratch_dir)
    total = 2 * n_bytes * store.n_tokens
    with (
        Workers(n_workers) as workers,
        progress_bar(total=total, unit="B", unit_scale=True, desc="shuffle") as bar,
    ):
        for i, _ in enumerate(workers.map(scatter_shard, ((plan, i) for i in range(len(store.records))))):
            bar.update(n_bytes * store.records[i]["n_tokens"])
        for record in workers.map(gather_shard, gather_jobs(plan, splits)):
            records[record["file"].split("-")[0]].append(record)
            bar.update(n_bytes * record["n_rows"])
    return records


# ---- the stage


def processes_that_fit(wanted: int, memory_gb: float, largest_shard_bytes: int) -> int:
    """How many processes fit, at most `wanted`. Raises InputError when not even one does."""
    needed = 2.2 * largest_shard_bytes  # one shard being read, one being written, and row orders
    if needed > memory_gb * 1e9:
        raise InputError(
            f"--memory_gb {memory_gb:g} is less than the {gb(needed)} that one process needs for shards of "
            f"{gb(largest_shard_bytes)}; raise it, lower --shard_gb or capture smaller shards."
        )
    return min(wanted, int(memory_gb * 1e9 / needed))


def merge_statistics(plan: Plan, n_rows: list[int], b_pre_start: str, first_shard: str) -> ActivationStatistics:
    """Statistics of all training rows, n_rows of each input shard. first_shard: the output shard to take b_pre from."""
    merged: dict[str, Statistics] = {}
    for i, count in enumerate(n_rows):
        file = open_shard(plan.scattered(i), _STAGE)
        for name in ("raw", "normalized"):
            part = Statistics(count, file.get_tensor(f"{name}_mean").numpy(), file.get_tensor(f"{name}_m2").numpy())
            merged[name] = merged[name].merge(part) if name in merged else part
    statistics = ActivationStatistics.of(merged["raw"], merged["normalized"])
    if b_pre_start == "mean":
        return statistics
    # Rows are in random order, so the first ones are a sample.
    rows = open_shard(plan.output_dir / first_shard, _STAGE).get_slice("acts")[:_MEDIAN_ROWS]
    sample = unpack(rows, len(statistics.b_pre)).double().numpy()
    return statistics._replace(b_pre=torch.from_numpy(geometric_median(normalize(sample, plan.eps))))


def order_checksum(plan: Plan, store: ActivationStore, splits: dict[str, Split]) -> str:
    """The same for two sites of the same tokens, shuffled in the same way: which token stands in which row."""
    source = store.source
    decides = {
        "shuffle": [_SHUFFLE, plan.seed, plan.first_validation_sentence],
        "rows": {name: [split.n_rows, split.moves.tolist()] for name, split in splits.items()},
        "shards": [[record["first_sentence_idx"], record["n_tokens"]] for record in store.records],
        "tokens": [source.model, source.dataset, source.begin_of_text, source.max_tokens],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def finish(
    plan: Plan,
    store: ActivationStore,
    splits: dict[str, Split],
    records: dict[str, list[dict]],
    statistics_path: Path,
    decides: dict[str, Any],
    options: dict[str, Any],
) -> None:
    counts = {split: sum(record["n_rows"] for record in records[split]) for split in _SPLITS}
    counts["dropped"] = sum(split.n_dropped for split in splits.values())
    write_manifest(
        plan.output_dir,
        _STAGE,
        complete=True,
        decides=decides,
        config=options,
        **store.source.as_json(plan.output_dir / MANIFEST),
        dtype=store.dtype,
        first_validation_sentence=plan.first_validation_sentence,
        normalize_eps=plan.eps,
        batch_size=options["batch_size"],
        order=order_checksum(plan, store, splits),
        statistics=os.path.relpath(statistics_path, plan.output_dir),
        counts=counts,
        shards=records["train"],
        validation_shards=records["validation"],
    )
    print(
        f"{counts['train']:,} activations to train on, {counts['validation']:,} held out, {counts['dropped']} dropped: "
        f"{plan.output_dir}"
    )


def main() -> None:
    config = parse_constants(globals())
    store = ActivationStore(config.input_dir)
    n_sentences = store.source.need("dataset")["sentences"]
    first_validation_sentence = n_sentences - round(config.validation_fraction * n_sentences)
    n_bytes = row_bytes(store.d_model, store.dtype)
    batch_bytes = n_bytes * config.batch_size
    rows_per_shard = max(1, int(config.shard_gb * 1e9 / batch_bytes)) * config.batch_size
    splits = plan_splits(store, first_validation_sentence, config.batch_size, rows_per_shard, config.seed)
    check_variety(store)
    output_dir = Path(config.output_dir)
    mean_path = Path(config.mean_filepath or output_dir / "statistics.safetensors")
    require_writable(mean_path)
    plan = Plan(config.input_dir, output_dir, first_validation_sentence, config.normalize_eps, config.seed)
    n_jobs = max(len(store.records), sum(split.n_outputs for split in splits.values()))
    largest = max(*(r["bytes"] for r in store.records), n_bytes * rows_per_shard)
    n_workers = min(config.num_processes or os.cpu_count() or 1, n_jobs)
    n_workers = processes_that_fit(n_workers, config.memory_gb, largest)
    decides = {name: getattr(config, name) for name in _DECIDING}
    decides |= {"shuffle": _SHUFFLE, "activations": [record["sha256"] for record in store.records]}
    in_all = n_bytes * store.n_tokens
    print(
        f"Reading {store.n_tokens:,} activations, {gb(in_all)}, from {config.input_dir}; writing as much to "
        f"{output_dir}, twice that while it runs."
    )
    with output_folder(output_dir, _STAGE, decides, 2 * in_all) as complete:
        if not complete:
            records = shuffle(plan, store, splits, n_workers)
            statistics = merge_statistics(plan, splits["train"].n_rows, config.b_pre_start, records["train"][0]["file"])
            write_statistics(mean_path, statistics)
            finish(plan, store, splits, records, mean_path, decides, vars(config))
        shutil.rmtree(plan.scratch_dir, ignore_errors=True)


if __name__ == "__main__":
    run(main)
