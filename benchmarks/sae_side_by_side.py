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

import torch

from autoencoder.step import Step, StepOptions
from pipeline.distributed import ALONE, make_grid
from sae import SparseAutoencoder


def steps(d_model: int, n_latents: int, k: int, batch_size: int) -> "tuple[Step, torch.Tensor]":
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(d_model, n_latents, k)
    sae.initialize(torch.zeros(d_model), generator)
    x = torch.randn(batch_size, d_model, generator=generator).bfloat16()
    return Step(sae, StepOptions(batch_size, 256), make_grid(ALONE, 1)), x


def take(step: Step, x: torch.Tensor, n: int) -> None:
    for n_before in range(n):
        pending = step.gradients(x)
        step.apply(pending, step.agree(pending), 5e-5, n_before)


def beside(shape: tuple[int, int, int, int], n_steps: int, barrier, seconds) -> None:
    """A process of the side-by-side way: seconds of each round, from the common start to its own end."""
    torch.set_num_threads(1)
    step, x = steps(*shape)
    take(step, x, 2)
    while True:
        barrier.wait()
        took, _ = timed(take, step, x, n_steps)
        seconds.put(took)


def measure(shape: tuple[int, int, int, int], n_steps: int, rounds: int, n: int) -> tuple[dict[str, float], float]:
    """Activations per second of each way, and the spread of its rounds. n: cores, and SAEs side by side."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(n + 1), context.Queue()
    workers = [context.Process(target=beside, args=(shape, n_steps, barrier, queue), daemon=True) for _ in range(n)]
    for worker in workers:
        worker.start()
    torch.set_num_threads(n)
    step, x = steps(*shape)
    take(step, x, 2)
    one, many = "one after the other, all cores", "side by side, a core each"
    seconds: dict[str, list[float]] = {one: [], many: []}
    for _ in range(rounds):
        took, _ = timed(take, step, x, n_steps)
        seconds[one].append(n * took)  # n SAEs, one after the other
        barrier.wait()
        seconds[many].append(max(queue.get() for _ in range(n)))
    for worker in workers:
        worker.terminate()
    return median_rates(n * n_steps * shape[3], seconds), spread(seconds)


def products(shape: tuple[int, int, int, int], rounds: int, n: int) -> dict[str, float]:
    """Activations per second of the encoder's product of n SAEs, with all cores."""
    d_model, n_latents, _, batch_size = shape
    x, w, b = torch.randn(n, batch_size, d_model), torch.randn(n, n_latents, d_model), torch.randn(n, 1, n_latents)
    ways = {
        "product, one after the other": lambda: [torch.addmm(b[i], x[i], w[i].t()) for i in range(n)],
        "product, torch.baddbmm": lambda: torch.baddbmm(b, x, w.transpose(1, 2)),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(1 + 5 * rounds):
        for way, multiply in ways.items():
            took, _ = timed(multiply)
            seconds[way] += [took] if i else []
    return median_rates(n * batch_size, seconds)


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
        shape = config.d_model, n_latents, config.k, config.batch_size
        rates, widest = measure(shape, config.steps, config.rounds, n)
        columns.append(rates | products(shape, config.rounds, n))
        spreads.append(widest)
    for way in columns[0]:
        print(f"| {way} | " + " | ".join(f"{column[way]:,.0f}" for column in columns) + " |")
    print(f"\nactivations/s over all SAEs; slowest round over fastest: {max(spreads):.2f}")


if __name__ == "__main__":
    run(main)
