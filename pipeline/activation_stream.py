"""The rows that training reads from a model as it makes them: `sae_training.py --stream`. No activation touches a disk.

A buffer of BUFFER_SIZE activations per site is filled by the model, shuffled, used up step by step, and filled again;
packed (pipeline/packing.py), in the memory of the CPU. Sentences come in a seeded random order, so each filling is a
random sample of all; a larger buffer means that a step's activations are from more different sentences.

The buffer has LANES lanes; each gets sentences of all lengths, and about as many tokens as the others. A step takes as
many rows from every lane. The lanes are divided among the processes, each of which runs its sentences through its copy
of the model, so neither the steps nor the model's batches depend on the number of processes.

All of it is planned from the lengths of the sentences, which are counted once: which step uses which rows depends on
the sentences, the sizes and the seed alone. So a run that continues makes the filling it was in again and goes on
within it, to the last bit as if it had not been stopped. A pass over the sentences uses each activation once, except
that the few rows of each filling that fill no step are dropped, other ones in each pass.
"""

import contextlib
import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llama_3.tokenizer import Tokenizer
from pipeline.activation_batches import Rows
from pipeline.activation_store import open_shard, write_shard
from pipeline.capturing import Capturer, Window, on_device, read_window
from pipeline.distributed import Grid, World
from pipeline.errors import InputError
from pipeline.packing import unpack
from pipeline.progress import progress_bar
from pipeline.sentences import SentenceDataset
from pipeline.statistics import ActivationStatistics, Statistics, normalize
from pipeline.workers import ahead

LANES = 16  # parts of the buffer; a multiple of the number of processes, and a divisor of the batch size
_SPARE = 4 * LANES  # tokens that a filling gets beyond what its steps need, because its lanes are not exactly equal
_CHUNK_BYTES = 2**20  # of float64 rows whose statistics are taken at a time: a processor's cache


# ---- the plan


class Filling(NamedTuple):
    """What one filling of the buffer holds."""

    lanes: list[np.ndarray]  # the sentences of each lane, ascending
    n_rows: int  # that are used of each lane


def deal(sentence_idx: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The sentences of each lane: from the longest to the shortest, each to the lane with the fewest tokens, so that
    they end almost equal. lengths: of these sentences, in tokens."""
    tokens = [(0, i) for i in range(LANES)]  # a heap of (tokens, lane)
    lanes: list[list[int]] = [[] for _ in range(LANES)]
    by_length = np.argsort(-lengths, kind="stable")
    for i, length in zip(sentence_idx[by_length].tolist(), lengths[by_length].tolist(), strict=True):
        n, lane = tokens[0]
        lanes[lane].append(i)
        heapq.heapreplace(tokens, (n + length, lane))
    return [np.sort(np.array(lane, dtype=np.int64)) for lane in lanes]


def plan_fillings(lengths: np.ndarray, buffer_size: int, rows_per_lane: int) -> list[Filling]:
    """Consecutive sentences in fillings of about equally many whole steps, and at most about buffer_size tokens.

    lengths: (n_sentences,) in tokens; rows_per_lane: that a step takes from each lane.
    """
    ends, batch_size = np.concatenate([[0], lengths.cumsum()]), LANES * rows_per_lane
    n_steps = int(lengths.sum()) // batch_size
    n = max(1, -(-n_steps // max(1, buffer_size // batch_size)))
    edges = [0]
    for i in range(1, n):
        steps = i * n_steps // n - (i - 1) * n_steps // n
        edge = int(np.searchsorted(ends, ends[edges[-1]] + steps * batch_size + _SPARE))
        edges.append(min(edge, len(lengths)))
    fillings = []
    for first, last in itertools.pairwise([*edges, len(lengths)]):
        idx = np.flatnonzero(lengths[first:last]) + first  # those with tokens
        lanes = deal(idx, lengths[idx])
        fewest = min(int(lengths[lane].sum()) for lane in lanes)
        fillings.append(Filling(lanes, fewest // rows_per_lane * rows_per_lane))
    return fillings


# ---- lengths of sentences


def sentence_lengths(path: Path, sentences: SentenceDataset, tokenizer: Tokenizer, max_tokens: int, w: World) -> Tensor:
    """(n_sentences,) int32 tokens of each sentence, cut at max_tokens; counted by all processes, kept in a file."""
    if not w.gather(path.exists())[0]:
        own = range(w.rank * len(sentences) // w.size, (w.rank + 1) * len(sentences) // w.size)
        bar = progress_bar(own, desc="counting tokens", unit="sentence", disable=not w.is_main, leave=False)
        lengths = [min(len(tokenizer.encode(sentences[i])), max_tokens) for i in bar]
        every = w.gather(torch.tensor(lengths, dtype=torch.int32))
        if w.is_main:
            write_shard(path, {"lengths": torch.cat(every)})
        w.barrier()
    return open_shard(path, "sae_training.py").get_tensor("lengths")


# ---- the rows


class StreamedRows:
    """The rows of all sites of a stream, from one pass of the model: what training reads, as StoredRows reads it.

    lengths: of all sentences; those from first_validation_sentence on are held out. Raises InputError if there are too
    few for a step.
    """

    def __init__(
        self,
        sentences: SentenceDataset,
        tokenizer: Tokenizer,
        max_tokens: int,
        capturer: Capturer,
        lengths: np.ndarray,
        first_validation_sentence: int,
        buffer_size: int,
        batch_size: int,
        seed: int,
        grid: Grid,
    ):
        self.sentences, self.tokenizer, self.max_tokens, self.capturer = sentences, tokenizer, max_tokens, capturer
        self.seed, self.grid, self.world = seed, grid, grid.world
        self.d_model = capturer.model.args.dim
        self.rows_per_lane = batch_size // LANES
        n_own = LANES // self.world.size
        self.own = range(self.world.rank * n_own, (self.world.rank + 1) * n_own)
        train, held_out = lengths[:first_validation_sentence], lengths[first_validation_sentence:]
        self.fillings = plan_fillings(train, buffer_size, self.rows_per_lane)
        self.held_out_lanes = [
            [lane + first_validation_sentence for lane in filling.lanes]
            for filling in plan_fillings(held_out, buffer_size, 1)
        ]
        self.n_train = LANES * sum(filling.n_rows for filling in self.fillings)
        self.n_held_out = int(held_out.sum())
        self.steps_per_epoch = self.n_train // batch_size
        if not self.steps_per_epoch:
            raise InputError(
                f"The sentences to train on in {sentences.folder} have {train.sum()} tokens, too few in fillings of "
                f"{buffer_size} for steps of {batch_size}; give more, raise --buffer_size or lower --batch_size."
            )
        self.held: tuple[int, int] | None = None  # pass and number of the filling in memory
        self.buffer: dict[str, list[Tensor]] = {}  # site -> of each own lane, packed rows in the order of their use

    # ---- which rows belong to which step

    def order(self, epoch: int) -> np.ndarray:
        """The fillings' order in a pass over the sentences."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.fillings))

    def place(self, step: int) -> tuple[int, int, int]:
        """A step's pass, the number of its filling, and which of that filling's steps it is."""
        epoch, step = divmod(step, self.steps_per_epoch)
        order = self.order(epoch)
        ends = np.array([self.fillings[i].n_rows // self.rows_per_lane for i in order]).cumsum()
        at = int(np.searchsorted(ends, step, side="right"))
        return epoch, int(order[at]), step - int(ends[at - 1] if at else 0)

    def origin(self, step: int) -> str:
        """Where the rows of a step are from, in words."""
        epoch, number, _ = self.place(step)
        ends = [int(edge(lane)) for lane in self.fillings[number].lanes if len(lane) for edge in (np.min, np.max)]
        return f"sentences {min(ends)} to {max(ends)} of {self.sentences.folder}, in pass {epoch + 1}"

    # ---- the model

    def lane(self, sentence_idx: np.ndarray) -> Window:
        return read_window(self.sentences, self.tokenizer, -2, sentence_idx.tolist(), self.max_tokens)

    def lanes(self, lanes: list[np.ndarray], about: str) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """This process's lanes: number, and {site: packed rows}, sentences in order. Each is made when asked for."""
        own = [lanes[i] for i in self.own]
        with progress_bar(
            total=sum(map(len, own)), unit="sentence", desc=about, disable=not self.world.is_main, leave=False
        ) as bar:
            for i, window in zip(self.own, ahead(self.lane, own, 1), strict=True):
                with torch.inference_mode():
                    acts = self.capturer.window(window, lambda n_sentences, n_tokens: add(bar, n_sentences))
                yield i, acts

    def fill(self, epoch: int, number: int, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Make a filling, unless it is in memory. Returns False if any process was `stopped` meanwhile."""
        if self.held == (epoch, number):
            return True
        filling, self.held = self.fillings[number], None
        self.buffer = {site: [] for site in self.capturer.sites}
        for i, acts in self.lanes(filling.lanes, "filling the buffer"):
            for site, rows in acts.items():
                order = np.random.default_rng((self.seed, epoch, number, i)).permutation(len(rows))[: filling.n_rows]
                self.buffer[site].append(rows[torch.from_numpy(order)])
            if any(self.world.gather(stopped())):
                return False
        self.held = epoch, number
        return True

    def rows(self, step: int) -> Rows:
        """This process's rows of a step of the filling in memory, counted from its first."""
        own = slice(step * self.rows_per_lane, (step + 1) * self.rows_per_lane)
        return {site: self._on_device([lane[own] for lane in lanes]) for site, lanes in self.buffer.items()}

    def _on_device(self, parts: Sequence[Tensor]) -> Tensor:
        return unpack(on_device(torch.cat(list(parts)), self.world.device), self.d_model)

    # ---- what training reads

    @contextlib.contextmanager
    def reading(self, steps: range, stopped: Callable[[], bool]) -> Iterator[Callable[[], Rows | None]]:
        """Yields a function that gives the rows of one step after the other, on the device; None if any process was
        `stopped` while the buffer was being filled. All processes must call it."""
        coming = iter(steps)

        def following() -> Rows | None:
            epoch, number, step = self.place(next(coming))
            return self.rows(step) if self.fill(epoch, number, stopped) else None

        yield following

    def held_out(self, n_rows: int) -> Iterator[Rows]:
        """The held-out rows, n_rows at a time, made anew by the model and divided among the rows of the grid."""
        for lanes in self.held_out_lanes:
            for _, acts in self.lanes(lanes, "held-out activations"):
                # A row of the grid sees the lanes of its processes, which differ in length.
                every = {site: torch.cat(self.grid.row.gather(rows)) for site, rows in acts.items()}
                n = len(next(iter(every.values())))
                for start in range(0, n, n_rows):
                    yield {site: self._on_device([rows[start : start + n_rows]]) for site, rows in every.items()}

    def held_out_sample(self, n_rows: int) -> Rows:
        """About n_rows held-out rows, as many on each process, the same each time; of the filling in memory if there
        are not enough held-out sentences for every lane."""
        own = self.buffer
        if self.held_out_lanes and all(map(len, self.held_out_lanes[0])):
            n_sentences = sum(len(lane) for lanes in self.held_out_lanes for lane in lanes)
            n = -(-n_rows * n_sentences // (LANES * self.n_held_out))  # of each lane
            lanes = self.lanes([lane[:n] for lane in self.held_out_lanes[0]], "held-out activations")
            made = [acts for _, acts in lanes]
            own = {site: [acts[site] for acts in made] for site in self.capturer.sites}
        shortest = min(len(rows) for lanes in own.values() for rows in lanes)
        n = min(n_rows // LANES, *self.world.gather(shortest))
        return {site: self._on_device([rows[:n] for rows in lanes]) for site, lanes in own.items()}

    def sample(self, n_rows: int) -> Rows:
        """Some rows of every site; none before a filling is in memory."""
        lanes = {site: lanes[0][:n_rows] for site, lanes in self.buffer.items() if lanes}
        return {site: unpack(rows, self.d_model) for site, rows in lanes.items()}

    @contextlib.contextmanager
    def verifying(self) -> Iterator[Callable[[], None]]:
        """There are no files to verify."""
        yield lambda: None

    # ---- statistics

    def statistics(self, eps: float) -> dict[str, ActivationStatistics]:
        """{site: statistics} of the first filling, whatever the number of processes. All processes must call this.

        eps: of the normalisation.
        """
        self.fill(*self.place(0)[:2])
        found = {}
        for site, lanes in self.buffer.items():
            own = [lane_statistics(rows, self.d_model, eps) for rows in lanes]
            raw, normalized = zip(*itertools.chain(*self.world.gather(own)), strict=True)
            found[site] = ActivationStatistics.of(merged(raw), merged(normalized))
        return found


def add(bar: tqdm, n: int) -> None:
    bar.update(n)


def lane_statistics(rows: Tensor, d_model: int, eps: float) -> tuple[Statistics, Statistics]:
    """Of activations as they are, and normalised one by one. rows: packed."""
    raw = normalized = Statistics.of(np.zeros((0, d_model)))
    for part in rows.split(max(1, _CHUNK_BYTES // (8 * d_model))):
        x = unpack(part, d_model).double().numpy()
        raw, normalized = raw.merge(Statistics.of(x)), normalized.merge(Statistics.of(normalize(x, eps)))
    return raw, normalized


def merged(parts: Sequence[Statistics]) -> Statistics:
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total
