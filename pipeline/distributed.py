"""Process-group set-up: the same script runs under plain python and under torchrun with any number of processes."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from pipeline.errors import InputError

# How long a process waits for the others. The longest such wait is an hour or so: for the slowest process's checksums
# before the first checkpoint, or for rank 0 to write the tables of the top sentences; nccl's own limit is ten minutes.
# A lost process needs no limit: torchrun ends the others of its node, and its broken connections those of other nodes.
# Only a machine that vanishes without closing its connections keeps the others waiting this long.
_LONGEST_WAIT = timedelta(hours=6)


class World(NamedTuple):
    """This process's place among others. rank counts over all nodes; without torchrun the world is one process."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # None: all processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *args: Any) -> None:
        if self.is_main:
            print(*args, flush=True)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(self.group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor`, which must be contiguous, over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(_contiguous(tensor), group=self.group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every process's `tensor`, which must be contiguous and have the same shape everywhere: (size, *shape)."""
        if self.size == 1:
            return tensor[None]
        every = tensor.new_empty(self.size * len(tensor), *tensor.shape[1:])
        # As bytes: gloo does not know every type that nccl does.
        dist.all_gather_single(every.view(torch.uint8), _contiguous(tensor).view(torch.uint8), group=self.group)
        return every.unflatten(0, (self.size, -1))

    def gather(self, value: Any) -> list[Any]:
        """Every process's picklable value, in order of rank, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self.group)
        return values


def _contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself. Raises ValueError where nccl would refuse it, on CPUs too, whose gloo would not."""
    if not tensor.is_contiguous():
        raise ValueError(f"nccl takes contiguous tensors only; {tuple(tensor.shape)} has strides {tensor.stride()}")
    return tensor


ALONE = World(0, 1, torch.device("cpu"))


class Grid(NamedTuple):
    """The processes of a run in rows and columns, as one of them sees it."""

    world: World  # all processes
    column: World
    row: World  # neighbouring ranks, on one node if it has that many


def make_grid(world: World, width: int) -> Grid:
    """The processes in rows of `width`, which must divide their number."""
    if world.size == 1:
        return Grid(world, world, world)
    names = ("column", "row")
    mesh = init_device_mesh(world.device.type, (world.size // width, width), mesh_dim_names=names)
    column, row = (
        World(mesh.get_local_rank(name), mesh.size(i), world.device, mesh.get_group(name))
        for i, name in enumerate(names)
    )
    return Grid(world, column, row)


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Join the process group that torchrun describes in the environment: nccl for tensors on GPUs, gloo for all else.

    Raises InputError where torchrun started more processes than the machine has GPUs.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        n_gpus = torch.cuda.device_count()
        if local_size > n_gpus:
            raise InputError(
                f"torchrun started {local_size} processes on a machine with {n_gpus} GPU{'s' * (n_gpus > 1)}, and each "
                "needs its own; give --nproc_per_node=gpu."
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if size > 1:
        # torchrun gives each process one thread; share the cores instead.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
        # Without device_id: with it, `barrier` would go through nccl and keep the GPUs busy while it waits.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_LONGEST_WAIT)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=_end_with_torchrun, args=(os.getppid(),), daemon=True).start()
    yield World(rank, size, device)
    if size > 1:  # not after an error: a clean-up with a missing rank would hang, and the process ends anyway
        dist.barrier()
        dist.destroy_process_group()


def _end_with_torchrun(torchrun: int) -> None:
    """End this worker when torchrun was killed and cannot end it: it would run on and keep the folder locked."""
    while os.getppid() == torchrun:
        time.sleep(0.5)
    os._exit(1)


@dataclass
class StopSignal:
    number: int = 0  # of the signal that came; 0 for none


@contextlib.contextmanager
def noted_signals() -> Iterator[StopSignal]:
    """In this block SIGTERM and Ctrl-C do not end the process; they are only noted."""
    seen = StopSignal()

    def note(number: int, _frame: FrameType | None) -> None:
        seen.number = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
