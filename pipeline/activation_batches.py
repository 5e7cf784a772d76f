"""Read the shuffled batches of sae_preprocessing.py for training: which rows belong to which step, read ahead.

A shard is memory-mapped; a step's rows are whole stored batches of about a thousand rows, so that reading is sequential
over megabytes although the order is random. pipeline/activation_stream.py gives training rows without a disk.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.activation_store import dtype_of, open_shard
from pipeline.distributed import Grid
from pipeline.manifests import MANIFEST, verifying
from pipeline.packing import StoreDtype, empty_rows, unpack

STAGE = "sae_preprocessing.py"
_READERS = 4  # threads that read
_AHEAD = 4  # steps read ahead

Rows = dict[str, Tensor]  # site -> a process's rows (n, d_model), raw, of the same tokens at every site


class Batches:
    """Rows of the training shards by global batch, memory-mapped; the order depends on seed and epoch alone."""

    def __init__(self, data_dir: str | Path, manifest: dict[str, Any], batch_size: int, seed: int):
        self.stored, self.d_model = manifest["batch_size"], manifest["d_model"]
        self.dtype: StoreDtype = dtype_of(manifest, Path(data_dir) / MANIFEST)
        self.batch_size, self.seed = batch_size, seed
        self.names = [record["file"] for record in manifest["shards"]]
        self.shards = [open_rows(Path(data_dir) / name).view(torch.uint8).numpy() for name in self.names]
        self.where = [  # stored batch -> (shard, first row)
            (i, row) for i, s in enumerate(manifest["shards"]) for row in range(0, s["n_rows"], self.stored)
        ]
        self.per_step = batch_size // self.stored
        self.steps_per_epoch = len(self.where) // self.per_step

    def stored_batches(self, epoch: int, step: int) -> list[tuple[int, int]]:
        """A step's stored batches: (shard, first row)."""
        order = _order(self.seed, epoch, len(self.where))
        return [self.where[batch] for batch in order[step * self.per_step : (step + 1) * self.per_step]]

    def read(self, epoch: int, step: int, rank: int, world_size: int, out: Tensor | None = None) -> Tensor:
        """This process's share of a step's rows, batch_size / world_size of them, as they are stored.

        out: where to put them; fresh memory costs several times as much as the copy itself.
        """
        share = self.batch_size // world_size
        begin, end = rank * share, (rank + 1) * share
        out = empty_rows(share, self.d_model, self.dtype) if out is None else out
        rows = out.view(torch.uint8).numpy()  # numpy copies in this thread alone and lets others run
        for j, (shard, row) in enumerate(self.stored_batches(epoch, step)):
            first, last = max(begin, j * self.stored), min(end, (j + 1) * self.stored)
            if first < last:
                source = slice(row + first - j * self.stored, row + last - j * self.stored)
                rows[first - begin : last - begin] = self.shards[shard][source]
        return out


@functools.lru_cache(2)  # reading ahead may reach into the next epoch
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n stored batches in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def open_rows(path: Path) -> Tensor:
    """A shard's activations as they are stored, memory-mapped."""
    return open_shard(path, STAGE).get_tensor("acts")


class Reader:
    """Gives the steps' rows in order, on `device`; threads read _AHEAD steps ahead.

    On GPUs the threads also copy to the device, from pinned memory, while it computes.
    """

    def __init__(self, batches: Batches, steps: range, rank: int, size: int, device: torch.device):
        n_rows = batches.batch_size // size
        self.batches, self.steps, self.rank, self.size, self.device = batches, iter(steps), rank, size, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A step's buffer is reused once `next` is called for the following step: by then its rows have been used.
        self.buffers = [
            empty_rows(n_rows, batches.d_model, batches.dtype, pin_memory=self.stream is not None)
            for _ in range(_AHEAD)
        ]
        self.pool = ThreadPoolExecutor(_READERS)
        self.ahead: deque[Future[Tensor]] = deque()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def read(self, step: int) -> Tensor:
        place = divmod(step, self.batches.steps_per_epoch)
        rows = self.batches.read(*place, self.rank, self.size, out=self.buffers[step % len(self.buffers)])
        if self.stream is None:
            return unpack(rows, self.batches.d_model)
        with torch.cuda.stream(self.stream):
            rows = unpack(rows.to(self.device, non_blocking=True), self.batches.d_model)
            self.stream.record_event().synchronize()  # waits here, in this thread
        return rows

    def next(self) -> Tensor:
        """The next step's rows."""
        while len(self.ahead) < _AHEAD and (step := next(self.steps, None)) is not None:
            self.ahead.append(self.pool.submit(self.read, step))
        rows = self.ahead.popleft().result()
        if self.stream is not None:
            rows.record_stream(torch.cuda.current_stream())
        return rows


class StoredRows:
    """The rows of one site, or of a transcoder's two, from folders of batches: what training reads.

    folders: site -> folder and manifest. All steps are counted from the start of the run.
    """

    def __init__(self, folders: dict[str, tuple[str, dict[str, Any]]], batch_size: int, seed: int, grid: Grid):
        self.folders, self.grid, self.world = folders, grid, grid.world
        self.batches = {site: Batches(*each, batch_size, seed) for site, each in folders.items()}
        self.first, (self.data_dir, self.manifest) = next(iter(self.batches.values())), next(iter(folders.values()))
        self.steps_per_epoch = self.first.steps_per_epoch

    @contextlib.contextmanager
    def reading(self, steps: range, stopped: Callable[[], bool]) -> Iterator[Callable[[], Rows | None]]:
        """Yields a function that gives the rows of one step after the other, on the device. It is quick: `stopped` is
        not asked."""
        world = self.world
        with contextlib.ExitStack() as stack:
            readers = {
                site: stack.enter_context(Reader(batches, steps, world.rank, world.size, world.device))
                for site, batches in self.batches.items()
            }
            yield lambda: {site: reader.next() for site, reader in readers.items()}

    def held_out(self, n_rows: int) -> Iterator[Rows]:
        """The held-out rows, n_rows at a time, divided among the rows of the grid."""
        chunk = 0
        for record in self.manifest["validation_shards"]:
            shards = {site: open_rows(Path(folder) / record["file"]) for site, (folder, _) in self.folders.items()}
            for parts in zip(*(rows.split(n_rows) for rows in shards.values()), strict=True):
                chunk += 1
                if chunk % self.grid.column.size == self.grid.column.rank:
                    yield {site: self._on_device(part) for site, part in zip(shards, parts, strict=True)}

    def held_out_sample(self, n_rows: int) -> Rows:
        """Up to n_rows held-out rows, as many on each process, the same each time; of training if none are held out."""
        record = (self.manifest["validation_shards"] or self.manifest["shards"])[0]
        found: Rows = {}
        for site, (folder, _) in self.folders.items():
            rows = open_rows(Path(folder) / record["file"])[:n_rows]
            share = -(-len(rows) // self.world.size)
            own = torch.arange(self.world.rank * share, (self.world.rank + 1) * share) % len(rows)
            found[site] = self._on_device(rows[own])
        return found

    def sample(self, n_rows: int) -> Rows:
        """Some rows of every site."""
        first = {site: Path(self.folders[site][0]) / batches.names[0] for site, batches in self.batches.items()}
        return {site: unpack(open_rows(path)[:n_rows], self.first.d_model) for site, path in first.items()}

    def origin(self, step: int) -> str:
        """Where the rows of a step are, in words."""
        rows = self.first.stored_batches(*divmod(step, self.steps_per_epoch))
        return f"{', '.join(sorted({self.first.names[shard] for shard, _ in rows}))} in {self.data_dir}"

    @contextlib.contextmanager
    def verifying(self) -> Iterator[Callable[[], None]]:
        """Compares checksums while the block runs; yields a function that waits for that, and raises InputError."""
        with contextlib.ExitStack() as stack:
            waits = [
                stack.enter_context(verifying(folder, self._share(manifest), STAGE))
                for folder, manifest in self.folders.values()
            ]

            def verified() -> None:
                for wait in waits:
                    wait()

            yield verified

    def _share(self, manifest: dict[str, Any]) -> list[dict[str, Any]]:
        return all_shards(manifest)[self.world.rank :: self.world.size]

    def _on_device(self, rows: Tensor) -> Tensor:
        return unpack(rows.to(self.world.device), self.first.d_model)


def all_shards(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return manifest["shards"] + manifest["validation_shards"]
