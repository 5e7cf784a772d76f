"""Process-group set-up: the same script runs under plain python and under torchrun with any number of processes."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh


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
        """Sum `tensor` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every process's picklable value, in order of rank, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self.group)
        return values


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
    """Join the process group that torchrun describes in the environment: nccl on GPUs, gloo on CPUs."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if size > 1:  # torchrun gives each process one thread; share the cores instead
            local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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
