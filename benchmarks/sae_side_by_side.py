"""Several SAEs of one shape on one CPU: one after the other on all cores, side by side, or as one batched product.

Reads   nothing: random activations
Writes  a markdown table to the terminal
Method  the training step (autoencoder/step.py), without data: activations per second over all SAEs. In turn: one SAE
        after the other on all cores; a process for each core, each with an SAE and one thread, started together. And
        of the encoder's product alone, which is what a batched step could share: one after the other, and
        torch.baddbmm. Medians of ROUNDS. How long a process with torch takes to start is timed apart
Cost    about two minutes

    python benchmarks/sae_side_by_side.py
"""

from common import machine, median_rates, spread, timed

from pipeline.options import Count, parse_constants
from pipeline.run import run

D_MODEL: Count = 576  # SmolLM2's
N_LATENTS: list[int] = [2048, 4096]  # of each SAE
K: Count = 16  # latents kept
BATCH_SIZE: Count = 1024  # activations per step
STEPS: Count = 10  # steps in a round
ROUNDS: Count = 7  # rounds of each way

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import multiprocessing
import os
import subprocess
import sys
from statistics import median
from typing import Any, NamedTuple

import torch

from autoencoder.step import Step, StepOptions
from pipeline.distributed import ALONE, make_grid
from sae import SparseAutoencoder


class Shape(NamedTuple):
    d_model: int
    n_latents: int
    k: int
    batch_size: int


class One:
    """An SAE in training, on random activations."""

    def __init__(self, shape: Shape):
        generator = torch.Generator().manual_seed(0)
        self.sae = SparseAutoencoder(shape.d_model, shape.n_latents, shape.k)
        self.sae.initialize(torch.zeros(shape.d_model), generator)
        self.x = torch.randn(shape.batch_size, shape.d_model, generator=generator)
        self.trained = Step(self.sae, StepOptions(shape.batch_size, 256), make_grid(ALONE, 1))

    def steps(self, n: int) -> None:
        for n_before in range(n):
            pending = self.trained.gradients(self.x)
            self.trained.apply(pending, self.trained.agree(pending), 5e-5, n_before)

    @torch.no_grad()
    def products(self, n: int) -> None:
        for _ in range(n):
            torch.nn.functional.linear(self.x, self.sae.encoder.weight, self.sae.encoder.bias)


def beside(shape: Shape, n_steps: int, barrier: Any, seconds: Any) -> None:
    """A process with an SAE of its own: seconds of steps, then of products, whenever all are told to start."""
    torch.set_num_threads(1)
    one = One(shape)
    one.steps(2)
    while True:
        for work in (one.steps, one.products):
            barrier.wait()
            seconds.put(timed(work, n_steps)[0])


@torch.no_grad()
def batched(x: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor, n: int) -> None:
    for _ in range(n):
        torch.baddbmm(biases, x, weights.transpose(1, 2))


def measure(shape: Shape, n_steps: int, rounds: int, n: int) -> tuple[dict[str, float], float]:
    """Activations per second of each way, over n SAEs on n cores, and the spread of the rounds."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(n + 1), context.Queue()
    workers = [context.Process(target=beside, args=(shape, n_steps, barrier, queue), daemon=True) for _ in range(n)]
    for worker in workers:
        worker.start()
    torch.set_num_threads(n)
    every = [One(shape) for _ in range(n)]
    for one in every:
        one.steps(2)
    x = torch.stack([one.x for one in every])
    weights = torch.stack([one.sae.encoder.weight.detach() for one in every])
    biases = torch.stack([one.sae.encoder.bias.detach() for one in every])[:, None]
    batched(x, weights, biases, 2)

    def together() -> float:
        barrier.wait()
        return max(queue.get() for _ in range(n))

    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        ways = {
            "step, one after the other": sum(timed(one.steps, n_steps)[0] for one in every),
            "step, side by side": together(),
            "product, one after the other": sum(timed(one.products, n_steps)[0] for one in every),
            "product, side by side": together(),
            "product, torch.baddbmm": timed(batched, x, weights, biases, n_steps)[0],
        }
        for way, took in ways.items():
            seconds.setdefault(way, []).append(took)
    for worker in workers:
        worker.terminate()
    return median_rates(n * n_steps * shape.batch_size, seconds), spread(seconds)


def main() -> None:
    config = parse_constants(globals())
    n = os.cpu_count() or 1
    start = [sys.executable, "-c", "import torch"]
    started = median(timed(lambda: subprocess.run(start, check=True))[0] for _ in range(3))
    print(f"{machine()}; torch {torch.__version__}; a process that imports torch starts in {started:.1f} s\n")
    print("| way | " + " | ".join(f"{n_latents:,} latents" for n_latents in config.n_latents) + " |")
    print("|---" * (1 + len(config.n_latents)) + "|")
    columns, spreads = [], []
    for n_latents in config.n_latents:
        shape = Shape(config.d_model, n_latents, config.k, config.batch_size)
        rates, widest = measure(shape, config.steps, config.rounds, n)
        columns.append(rates)
        spreads.append(widest)
    for way in columns[0]:
        print(f"| {way} | " + " | ".join(f"{column[way]:,.0f}" for column in columns) + " |")
    print(f"\nactivations/s over all SAEs; slowest round over fastest: {max(spreads):.2f}")


if __name__ == "__main__":
    run(main)
