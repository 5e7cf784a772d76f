"""Read the shuffled batches of sae_preprocessing.py for training: which rows belong to which step, read ahead.

A shard is memory-mapped; a step's rows are whole stored batches of about a thousand rows, so that reading is sequential
over megabytes although the order is random.
"""

import functools
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.activation_store import open_shard

_READERS = 4  # threads that read
_AHEAD = 4  # steps read ahead


class Batches:
    """Rows of the training shards by global batch, memory-mapped; the order depends on seed and epoch alone."""

    def __init__(self, data_dir: str | Path, manifest: dict[str, Any], batch_size: int, seed: int):
        self.stored, self.d_model = manifest["batch_size"], manifest["d_model"]
        self.batch_size, self.seed = batch_size, seed
        self.names = [record["file"] for record in manifest["shards"]]
        self.shards = [open_rows(Path(data_dir) / name) for name in self.names]
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
        """This process's share of a step's rows, (batch_size / world_size, d_model) bfloat16.

        out: where to put them; fresh memory costs several times as much as the copy itself.
        """
        share = self.batch_size // world_size
        begin, end = rank * share, (rank + 1) * share
        out = torch.empty(share, self.d_model, dtype=torch.bfloat16) if out is None else out
        rows = out.view(torch.int16).numpy()  # numpy copies in this thread alone and lets others run
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


def open_rows(path: Path) -> np.ndarray:
    """A shard's activations as a memory-mapped array of their bits, (n_rows, d_model) int16."""
    return open_shard(path, "sae_preprocessing.py").get_tensor("acts").view(torch.int16).numpy()


class Reader:
    """Gives the steps' rows in order, on `device`; threads read _AHEAD steps ahead.

    On GPUs the threads also copy to the device, from pinned memory, while it computes.
    """

    def __init__(self, batches: Batches, steps: range, rank: int, size: int, device: torch.device):
        shape = (batches.batch_size // size, batches.d_model)
        self.batches, self.steps, self.rank, self.size, self.device = batches, iter(steps), rank, size, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A step's buffer is reused once `next` is called for the following step: by then its rows have been used.
        self.buffers = [
            torch.empty(shape, dtype=torch.bfloat16, pin_memory=self.stream is not None) for _ in range(_AHEAD)
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
            return rows
        with torch.cuda.stream(self.stream):
            rows = rows.to(self.device, non_blocking=True)
            self.stream.record_event().synchronize()  # waits here, in this thread
        return rows

    def next(self) -> tuple[Tensor, float]:
        """The next step's rows, and the seconds spent waiting for them."""
        started = time.perf_counter()
        while len(self.ahead) < _AHEAD and (step := next(self.steps, None)) is not None:
            self.ahead.append(self.pool.submit(self.read, step))
        rows = self.ahead.popleft().result()
        if self.stream is not None:
            rows.record_stream(torch.cuda.current_stream())
        return rows, time.perf_counter() - started
