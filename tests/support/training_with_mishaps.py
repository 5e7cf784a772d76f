"""Run sae_training.py once or several times in a row, with a mishap at a given moment: for test_sae_training.py and
test_sae_parallel.py, which start it in separate processes.

    torchrun --standalone --nproc_per_node=2 tests/support/training_with_mishaps.py '[{"options": {}, "mishap": {...}}]'

A mishap: {"what": a key of MISHAPS, "method": of Step (what it needs) or Training, "call": before which of its calls,
"rank": which process}.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

import torch

import sae_training
from autoencoder.step import Step
from pipeline.run import run
from sae_training import Training


def corrupt(step: Step) -> None:
    step.sae.encoder.weight.data[0, 0] += 1e-3


def blow_up(step: Step) -> None:
    step.sae.encoder.weight.data.mul_(30)


def kill_torchrun(_step: Step) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)  # the process ends meanwhile, like all of that torchrun


MISHAPS = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "terminate torchrun": lambda _: os.kill(os.getppid(), signal.SIGTERM),
    "kill torchrun": kill_torchrun,
    "interrupt": lambda _: os.kill(os.getpid(), signal.SIGINT),
    "corrupt": corrupt,
    "blow up": blow_up,
}


def owner_of(method: str) -> type[Step] | type[Training]:
    return Step if method in ("gradients", "agree", "apply") else Training


def arrange(what: str, method: str, call: int, rank: int | None = 0) -> None:
    """Make `what` happen in process `rank` just before the given call of that method, counted from 0.

    rank: None for the first process of this torchrun, whichever rank that is.
    """
    if int(os.environ.get("LOCAL_RANK" if rank is None else "RANK", 0)) != (rank or 0):
        return
    owner = owner_of(method)
    real, calls = getattr(owner, method), Counter()

    def wrapped(self, *args, **kwargs):
        if calls["so far"] == call:
            MISHAPS[what](self)
        calls["so far"] += 1
        return real(self, *args, **kwargs)

    setattr(owner, method, wrapped)


def count_bytes(path: Path) -> None:
    """Count the bytes this process sends within Step.gradients, all-reduce as a ring; writes one number per step to
    `path` with the rank appended."""
    import torch.distributed as dist

    gradients, all_reduce, all_gather = Step.gradients, dist.all_reduce, dist.all_gather_single
    sent = Counter()

    def counted_reduce(tensor, *args, group=None, **kwargs):
        n = dist.get_world_size(group)
        sent["bytes"] += 2 * (n - 1) / n * tensor.nbytes
        return all_reduce(tensor, *args, group=group, **kwargs)

    def counted_gather(every, tensor, *args, group=None, **kwargs):
        sent["bytes"] += (dist.get_world_size(group) - 1) * tensor.nbytes
        return all_gather(every, tensor, *args, group=group, **kwargs)

    def counted_step(self, *args):
        sent.clear()
        dist.all_reduce, dist.all_gather_single = counted_reduce, counted_gather
        result = gradients(self, *args)
        dist.all_reduce, dist.all_gather_single = all_reduce, all_gather
        with open(f"{path}.{self.world.rank}", "a") as file:
            file.write(f"{sent['bytes']}\n")
        return result

    Step.gradients = counted_step


def train_with(
    options: dict, mishap: dict | None = None, bytes_path: str | None = None, port: int | None = None
) -> None:
    """port: where the processes of this run meet, separate from the previous run's."""
    if port:
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    methods = {owner: dict(vars(owner)) for owner in (Step, Training)}
    if mishap:
        arrange(**mishap)
    if bytes_path:
        count_bytes(Path(bytes_path))
    sys.argv = ["sae_training.py"]
    for name, value in options.items():
        sys.argv += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    Training.draw = lambda *args: None  # importing matplotlib costs most of the time
    run(sae_training.main)
    for owner, originals in methods.items():
        for name, method in originals.items():
            if callable(method) and getattr(owner, name) is not method:
                setattr(owner, name, method)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def in_processes(n: int, *runs: dict) -> list[int | None]:
    """What torchrun does with so many processes on one node, but forked from this one, so that none has to import
    torch. runs: what `train_with` takes. Returns the exit codes."""
    ports = [free_port() for _ in runs]

    def child(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        torch.set_num_threads(1)
        for one, port in zip(runs, ports, strict=True):
            train_with(**one, port=port)

    processes = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        train_with(**one)
