"""One training step of our SAE against sparsify, SAELens, dictionary_learning and the original's dense way.

Writes  a markdown table to the terminal, OUTPUT (JSON)
Method  a step is everything between two batches: normalisation, forward, loss (auxiliary loss on, no latent dead),
        backward, projection, optimiser, decoder normalisation. Each peer runs its own trainer class with its own
        optimiser; the original's way is written here from its description: full encoder, TopK scattered into a dense
        matrix, dense decoder, autograd, AdamW over everything. Each way runs in its own process, which does one step
        when asked: the ways take turns, and medians are reported; on a GPU, which cannot hold all of them, and for the
        growth, they are measured one after the other. Memory is the process's peak resident memory (on a GPU:
        allocated) beyond its imports.
        Random activations and random weights. Run it alone on the machine
Cost    about 10 minutes on two cores. The peers need an environment of their own: requirements-peers.txt

    data/peers/bin/python benchmarks/sae_step.py
    python benchmarks/sae_step.py --profile            on a GPU; peers that are not installed are left out
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from common import resident

from pipeline.options import Count, CountOrZero, Positive, parse_constants
from pipeline.run import run

DEVICE: Literal["cpu", "cuda"] | None = None  # cuda if there is one, when not given
D_MODEL: Count | None = None  # width; 768 on a CPU, the published 3072 on a GPU, when not given
N_LATENTS: Count | None = None  # dictionary size; 16384 or 65536
K: Count | None = None  # latents kept; 32 or 64
BATCH_SIZE: Count | None = None  # activations per step; 4096 or 8192
ROUNDS: Count = 5  # measured steps of each way
WARM_UP: CountOrZero = 2  # warm-up steps before each measured one
THREADS: Count = 2  # of each process on a CPU
GROWTH = True  # also measure growth with the dictionary and the batch
GROWTH_LATENTS: tuple[Count, ...] = (2**12, 2**14, 2**16, 2**18)  # dictionary sizes, at GROWTH_BATCH_SIZE
GROWTH_BATCH_SIZE: Count = 1024  # activations per step there
GROWTH_BATCHES: tuple[Count, ...] = (1024, 4096, 16384)  # batches, at N_LATENTS
GROWTH_ROUNDS: Count = 3  # measured steps there, after one warm-up step
PROFILE = False  # print torch.profiler's table of our step
PRICE_PER_HOUR: Positive = 3.0  # dollars for an hour of this machine, for the projected cost of the published run
OUTPUT = "data/benchmark_sae_step.json"  # results

_PUBLISHED_TOKENS = 7_000_000_000  # activations of the published run, ten epochs
_NEVER = 10**12  # dead_after_tokens with which no latent ever counts as dead

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import contextlib
import importlib.util
import io
import itertools
import multiprocessing
import os
import platform
import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from autoencoder.step import Step, StepOptions
from pipeline.distributed import World, make_grid
from pipeline.errors import InputError
from pipeline.files import write_json
from pipeline.manifests import git_commit
from pipeline.progress import progress_bar
from sae import SparseAutoencoder

Batches = Iterator[Tensor]  # raw activations (batch, d_model)


class Size(NamedTuple):
    d_model: int
    n_latents: int
    k: int
    batch_size: int


class Way(NamedTuple):
    """One way to train an SAE."""

    train: Callable[[Batches], None]  # until the batches end
    state: Callable[[], dict[str, Tensor]]  # what it has learned, as a state dict of our SparseAutoencoder
    reconstruct: Callable[[Tensor], Tensor] | None = None  # a peer's own forward pass, to check `state` against


# ---- ours, and the original's


def ours(size: Size, device: str, encoder_dtype: str = "float32") -> Way:
    """The step of sae_training.py."""
    if encoder_dtype == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    sae = SparseAutoencoder(size.d_model, size.n_latents, size.k)
    sae.initialize(torch.zeros(size.d_model), torch.Generator().manual_seed(0))
    options = StepOptions(
        batch_size=size.batch_size,
        k_aux=size.d_model // 2,
        dead_after_tokens=_NEVER,
        encoder_dtype="bfloat16" if encoder_dtype == "bfloat16" else "float32",
    )
    step = Step(sae, options, make_grid(World(0, 1, torch.device(device)), 1))
    n_before = itertools.count()

    def train(batches: Batches) -> None:
        for x in batches:
            pending = step.gradients(x)
            step.apply(pending, step.agree(pending), 5e-5, next(n_before))

    return Way(train, step.sae.state_dict)


class DenseSae(nn.Module):
    """The original's SAE, but with unit norm for each latent, which costs the same."""

    def __init__(self, size: Size):
        super().__init__()
        self.b_pre = nn.Parameter(torch.zeros(size.d_model))
        self.encoder = nn.Linear(size.d_model, size.n_latents)
        self.decoder = nn.Linear(size.n_latents, size.d_model, bias=False)
        with torch.no_grad():
            self.decoder.weight.div_(self.decoder.weight.norm(dim=0))
            self.encoder.weight.copy_(self.decoder.weight.t())


def original(size: Size, device: str, dead_after_steps: int = 80_000, k_aux: int = 2048) -> Way:
    """The original's dense step, from its description."""
    sae = DenseSae(size).to(device)
    optimizer = torch.optim.AdamW(sae.parameters(), lr=5e-5, betas=(0.85, 0.9999), eps=6.25e-10, weight_decay=0.01)
    silent_steps = torch.zeros(size.n_latents, dtype=torch.int64, device=device)

    def train(batches: Batches) -> None:
        for x in batches:
            z = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
            pre_acts = sae.encoder(z - sae.b_pre)  # (batch, n_latents)
            values, indices = pre_acts.topk(size.k, dim=-1)
            latents = torch.zeros_like(pre_acts).scatter(-1, indices, values.relu())
            z_hat = sae.decoder(latents) + sae.b_pre
            loss = F.mse_loss(z_hat, z)
            silent_steps.add_(1)
            silent_steps[(latents > 0).any(0)] = 0
            dead = silent_steps >= dead_after_steps
            if dead.sum() >= k_aux:
                values, indices = (pre_acts * dead).topk(k_aux, dim=-1)
                latents = torch.zeros_like(pre_acts).scatter(-1, indices, values.relu())
                error_hat = sae.decoder(latents) + sae.b_pre
                loss = loss + F.mse_loss(error_hat, (z - z_hat).detach()) / 32
            optimizer.zero_grad()
            loss.backward()
            with torch.no_grad():
                weight, grad = sae.decoder.weight, sae.decoder.weight.grad
                assert grad is not None
                grad.sub_(weight * (weight * grad).sum(0, keepdim=True))
                optimizer.step()
                weight.div_(weight.norm(dim=0, keepdim=True))

    return Way(train, sae.state_dict)


def product(size: Size, device: str, dtype: str = "float32") -> Way:
    """The encoder's matrix product alone, a lower bound for any step."""
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    torch_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    weight = torch.randn(size.n_latents, size.d_model).to(device, torch_dtype)
    x = torch.randn(size.batch_size, size.d_model).to(device, torch_dtype)
    out = torch.empty(size.batch_size, size.n_latents, device=device, dtype=torch_dtype)

    def train(batches: Batches) -> None:
        for _ in batches:
            torch.mm(x, weight.t(), out=out)

    return Way(train, dict)


# ---- peers: their own trainers; sizes from `size`, everything else their defaults unless a comment says why not


def sparsify(
    size: Size,
    device: str,
    optimizer: str = "signum",
    n_steps: int = 10**6,
    dead_after_tokens: int = _NEVER,
    warm_up_steps: int = 1000,
    lr_factor: float = 1.0,
) -> Way:
    """sparsify's Trainer, with a stand-in model that returns the next batch, whatever the tokens.

    Its default optimiser is schedule-free signum at 5e-3 / sqrt(n_latents / 2^14); Adam has 2e-4 / the same root.
    """
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    class Activations(torch.nn.Module):
        def forward(self, tokens):
            if tokens.shape == (1, 1):  # the trainer asks for the width
                return torch.zeros(1, 1, size.d_model, device=device)
            return next(source["batches"])[None]

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.acts = Activations()
            self.device = torch.device(device)
            self.dummy_inputs = {"tokens": torch.zeros(1, 1, dtype=torch.long)}

        @property
        def base_model(self):
            return self

        def forward(self, tokens):
            return self.acts(tokens)

    class Steps(torch.utils.data.Dataset):
        def __len__(self):
            return n_steps

        def __getitem__(self, step):
            return {"input_ids": torch.zeros(size.batch_size, dtype=torch.long)}

    source: dict[str, Any] = {}
    base_lr = {"signum": 5e-3, "adam": 2e-4}[optimizer] / (size.n_latents / 2**14) ** 0.5
    trainer = Trainer(
        TrainConfig(
            SparseCoderConfig(num_latents=size.n_latents, k=size.k),
            batch_size=1,  # one sequence of size.batch_size tokens
            optimizer=optimizer,
            lr=base_lr * lr_factor,
            lr_warmup_steps=warm_up_steps,
            auxk_alpha=1 / 32,  # off by default; its paper's value
            dead_feature_threshold=dead_after_tokens,
            hookpoints=["acts"],
            log_to_wandb=False,
            save_every=10**9,
        ),
        Steps(),
        Model(),
    )
    trainer.save = lambda: None  # no checkpoint at the end
    sae = trainer.saes["acts"]

    def train(batches: Batches) -> None:
        source["batches"] = batches
        with contextlib.suppress(StopIteration):
            trainer.fit()

    @contextlib.contextmanager
    def result() -> Iterator[None]:
        """Schedule-free optimisers: the averaged weights are the result."""
        schedule_free = [o for o in trainer.optimizers if hasattr(o, "eval")]
        for o in schedule_free:
            o.eval()
        yield
        for o in schedule_free:
            o.train()

    def state() -> dict[str, Tensor]:
        names = {"b_pre": sae.b_dec, "encoder.weight": sae.encoder.weight, "encoder.bias": sae.encoder.bias}
        names["decoder.weight"] = sae.W_dec
        with result():
            found = {name: tensor.detach().clone() for name, tensor in names.items()}
        return {**found, "decoder.weight": found["decoder.weight"].t()}

    def reconstruct(x: Tensor) -> Tensor:
        with result():
            return sae(x).sae_out

    return Way(train, state, reconstruct)


def sparsify_adam(size: Size, device: str, **options: Any) -> Way:
    return sparsify(size, device, optimizer="adam", **options)


def sae_lens(
    size: Size,
    device: str,
    n_steps: int = 10**6,
    dead_after_tokens: int = _NEVER,
    warm_up_steps: int = 0,
    lr_factor: float = 1.0,
) -> Way:
    """SAELens' SAETrainer and TopKTrainingSAE: Adam at 3e-4, constant, decoder norms free."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=size.d_model, d_sae=size.n_latents, k=size.k, device=device))
    config = SAETrainerConfig(
        total_training_samples=n_steps * size.batch_size,
        train_batch_size_samples=size.batch_size,
        lr=3e-4 * lr_factor,
        lr_end=3e-5 * lr_factor,  # its runner's lr / 10, which the constant schedule ignores
        lr_warm_up_steps=warm_up_steps,
        device=device,
        dead_feature_window=dead_after_tokens // size.batch_size,
    )

    def train(batches: Batches) -> None:
        with contextlib.suppress(StopIteration):
            SAETrainer(config, sae, batches).fit()

    def state() -> dict[str, Tensor]:
        norms = sae.W_dec.detach().norm(dim=1)  # it keeps the latents that are largest when multiplied by these
        return {
            "b_pre": sae.b_dec.detach().clone(),
            "encoder.weight": sae.W_enc.detach().t() * norms[:, None],
            "encoder.bias": sae.b_enc.detach() * norms,
            "decoder.weight": (sae.W_dec.detach() / norms[:, None]).t(),
        }

    return Way(train, state, sae)


def dictionary_learning(
    size: Size,
    device: str,
    n_steps: int = 10**6,
    dead_after_tokens: int = _NEVER,
    warm_up_steps: int = 1000,
    lr_factor: float = 1.0,
) -> Way:
    """dictionary_learning's TopKTrainer, called as its trainSAE does, on activations of unit mean squared norm, as its
    documentation recommends: Adam at 2e-4 / sqrt(n_latents / 2^14)."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=n_steps,
        activation_dim=size.d_model,
        dict_size=size.n_latents,
        k=size.k,
        layer=0,
        lm_name="none",
        lr=2e-4 * lr_factor / (size.n_latents / 2**14) ** 0.5,
        warmup_steps=warm_up_steps,
        seed=0,
        device=device,
    )
    trainer.dead_feature_threshold = dead_after_tokens
    scale: list[float] = []

    def train(batches: Batches) -> None:
        for step, x in enumerate(batches):
            if not scale:
                scale.append(float(x.square().sum(1).mean().sqrt()))
            trainer.update(step, x / scale[0])

    def state() -> dict[str, Tensor]:
        sae, s = trainer.ae, scale[0] if scale else 1.0
        found = {
            "b_pre": sae.b_dec * s,
            "encoder.weight": sae.encoder.weight,
            "encoder.bias": sae.encoder.bias * s,
            "decoder.weight": sae.decoder.weight,
        }
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    return Way(train, state, lambda x: trainer.ae(x / scale[0]) * scale[0])


class Entry(NamedTuple):
    make: Callable[..., Way]
    options: Mapping[str, str] = {}
    package: str | None = None  # that has to be installed
    devices: tuple[str, ...] = ("cpu", "cuda")
    has_warm_up: bool = False  # of the learning rate, by default
    huge_pages: bool = False  # as pipeline.run requests; peers do not, and one row shows what they would gain


WAYS = {
    "ours, float32": Entry(ours, huge_pages=True),
    "ours, TF32": Entry(ours, {"encoder_dtype": "tf32"}, devices=("cuda",)),
    "ours, bfloat16 encoder": Entry(ours, {"encoder_dtype": "bfloat16"}, huge_pages=True),
    "sparsify": Entry(sparsify, package="sparsify"),
    "sparsify, Adam": Entry(sparsify_adam, package="sparsify", has_warm_up=True),
    "sparsify, Adam, in huge pages": Entry(
        sparsify_adam, package="sparsify", devices=("cpu",), has_warm_up=True, huge_pages=True
    ),
    "SAELens": Entry(sae_lens, package="sae_lens"),
    "dictionary_learning": Entry(dictionary_learning, package="dictionary_learning", has_warm_up=True),
    "the original's way": Entry(original),
    "encoder's product alone, float32": Entry(product, huge_pages=True),
    "encoder's product alone, TF32": Entry(product, {"dtype": "tf32"}, devices=("cuda",)),
    "encoder's product alone, bfloat16": Entry(product, {"dtype": "bfloat16"}, huge_pages=True),
}
_PEERS = [name for name, entry in WAYS.items() if entry.package and not entry.huge_pages]


def missing(name: str) -> bool:
    package = WAYS[name].package
    return package is not None and importlib.util.find_spec(package) is None


# ---- a process for each way


class Measured(NamedTuple):
    seconds: list[float]  # of each measured step
    memory: int  # bytes
    error: str | None = None  # why it ended early


def available_memory() -> int:
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))
    assert found
    return int(found[1]) * 1024


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def serve(connection: Connection, name: str, size: Size, device: str, threads: int) -> None:
    """Runs in its own process: set the way up, then do a step whenever the parent asks, until it sends False."""
    entry = WAYS[name]
    os.environ["THP_MEM_ALLOC_ENABLE"] = str(int(entry.huge_pages))  # torch reads it at its first tensor
    if entry.package:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(entry.package)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    before = resident("VmRSS")
    if device == "cpu":  # let an allocation beyond free memory fail, instead of the system killing a process
        limit = before + available_memory()
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def batches() -> Batches:
        x = torch.randn(size.batch_size, size.d_model).to(device)
        connection.send("ready")
        while connection.recv():
            began = now()
            yield x
            seconds = now() - began
            peak = torch.cuda.max_memory_allocated() if device == "cuda" else max(0, resident("VmHWM") - before)
            connection.send((seconds, peak))

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            entry.make(size, device, **entry.options).train(batches())
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        connection.send("out of memory")


class Child:
    """A process that does one step of a way when asked."""

    def __init__(self, name: str, size: Size, device: str, threads: int):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, size, device, threads))
        self.process.start()
        theirs.close()
        self.seconds: list[float] = []
        self.memory = 0
        self.error: str | None = None

    def wait(self) -> "Child":
        """Wait until it is set up."""
        self._receive()
        return self

    def _receive(self) -> Any:
        try:
            message = self.connection.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            message = "out of memory" if code == -9 else f"failed (exit code {code})"
        if message in ("ready", None) or isinstance(message, tuple):
            return message
        self.error = message
        return None

    def step(self, counts: bool) -> None:
        if self.error:
            return
        self.connection.send(True)
        found = self._receive()
        if found:
            self.memory = found[1]
            if counts:
                self.seconds.append(found[0])

    def close(self) -> Measured:
        if not self.error:
            self.connection.send(False)
        self.process.join()
        return Measured(self.seconds, self.memory, self.error)


def measure_in_turn(
    names: list[str], size: Size, device: str, threads: int, rounds: int, warm_up: int
) -> dict[str, Measured]:
    children = {name: Child(name, size, device, threads) for name in names}
    for child in progress_bar(children.values(), unit="way", desc="starting"):
        child.wait()
    for _ in progress_bar(range(rounds), unit="round", desc="steps"):
        for child in children.values():
            for _ in range(warm_up):  # a process idle since its last turn has lost its caches and some pages
                child.step(counts=False)
            child.step(counts=True)
    return {name: child.close() for name, child in children.items()}


def measure_alone(name: str, size: Size, device: str, threads: int, rounds: int, warm_up: int = 1) -> Measured:
    """Measure one way by itself."""
    child = Child(name, size, device, threads).wait()
    for i in range(warm_up + rounds):
        child.step(i >= warm_up)
    return child.close()


def measure(names: list[str], size: Size, device: str, threads: int, rounds: int, warm_up: int) -> dict[str, Measured]:
    """Measure in turn, so that all ways meet the same noise; on a GPU one after the other, for its memory's sake."""
    if device == "cpu":
        return measure_in_turn(names, size, device, threads, rounds, warm_up)
    bar = progress_bar(names, unit="way", desc="steps")
    return {name: measure_alone(name, size, device, threads, rounds, max(1, warm_up)) for name in bar}


# ---- results


def ratio(a: Measured, b: Measured | None) -> str:
    if b is None or not a.seconds or not b.seconds:
        return "-"
    return f"{median(a.seconds) / median(b.seconds):.2f}"


def table(found: dict[str, Measured], batch_size: int) -> str:
    """Markdown: a row per way. Times as multiples of sparsify's faster optimiser, the original, the product alone."""
    fast = fastest_peer({name: one for name, one in found.items() if name.startswith("sparsify")})
    bases = [found.get(name) for name in (fast or "", "the original's way", "encoder's product alone, float32")]
    rows = [
        f"| a step of {batch_size} | ms | activations/s | x sparsify | x the original | x the product alone | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        if one.error or not one.seconds:
            rows.append(f"| {name} | {one.error} | - | - | - | - | - |")
            continue
        seconds = median(one.seconds)
        ratios = " | ".join(ratio(one, base) for base in bases)
        rows.append(
            f"| {name} | {1000 * seconds:,.1f} | {batch_size / seconds:,.0f} | {ratios} | {one.memory / 1e9:.2f} GB |"
        )
    return "\n".join(rows)


def growth_table(what: str, found: dict[int, dict[str, Measured]]) -> str:
    """Markdown: a row per size, ms and memory of each way."""
    names = list(next(iter(found.values())))
    rows = ["| " + " | ".join([what, *names]) + " |", "|" + "---|" * (1 + len(names))]
    for size, ways in found.items():
        cells = [
            one.error or f"{1000 * median(one.seconds):,.0f} ms, {one.memory / 1e9:.1f} GB" for one in ways.values()
        ]
        rows.append("| " + " | ".join([f"{size:,}", *cells]) + " |")
    return "\n".join(rows)


def fastest_peer(found: dict[str, Measured]) -> str | None:
    peers = {name: median(one.seconds) for name, one in found.items() if name in _PEERS and one.seconds}
    return min(peers, key=lambda name: peers[name]) if peers else None


def profile(size: Size, device: str, options: Mapping[str, str]) -> str:
    """torch.profiler's table over five of our steps."""
    torch.manual_seed(0)
    way = ours(size, device, **options)
    x = torch.randn(size.batch_size, size.d_model, device=device)
    way.train(x for _ in range(3))
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=activities) as found:
        way.train(x for _ in range(5))
        if device == "cuda":
            torch.cuda.synchronize()
    return found.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=20, max_name_column_width=60)


def machine(device: str, threads: int) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return f"{threads} threads, {found[1] if found else platform.processor()}, torch {torch.__version__}"


def print_projected_cost(names: list[str], found: dict[str, Measured], batch_size: int, price: float) -> None:
    print(f"\nThe published {_PUBLISHED_TOKENS:,} activations on one such GPU at ${price} an hour:")
    for name in (name for name in names if WAYS[name].make in (ours, original) and found[name].seconds):
        hours = _PUBLISHED_TOKENS / batch_size * median(found[name].seconds) / 3600
        print(f"  {name}: {hours:,.1f} hours, ${hours * price:,.0f}")


def main() -> None:
    config = parse_constants(globals())
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    defaults = Size(768, 2**14, 32, 4096) if device == "cpu" else Size(3072, 2**16, 64, 8192)
    size = Size(*(getattr(config, name) or default for name, default in defaults._asdict().items()))
    if size.k > min([size.n_latents, *(config.growth_latents if config.growth else ())]):
        raise InputError(f"--k {size.k} is more than the latents of the smallest SAE; lower it.")
    names = [name for name, entry in WAYS.items() if device in entry.devices]
    absent = [name for name in names if missing(name)]
    names = [name for name in names if name not in absent]
    title = f"{machine(device, config.threads)}; d_model {size.d_model}, n_latents {size.n_latents}, k {size.k}"
    print(title)
    if absent:
        print(f"Not installed here, so not measured: {', '.join(absent)}; see benchmarks/requirements-peers.txt.")
    found = measure(names, size, device, config.threads, config.rounds, config.warm_up)
    print("\n" + table(found, size.batch_size), flush=True)
    results: dict[str, Any] = {"machine": title, "size": size._asdict(), "git_commit": git_commit()}
    results |= {"not_installed": absent, "steps": {name: one._asdict() for name, one in found.items()}}

    if device == "cuda":
        print_projected_cost(names, found, size.batch_size, config.price_per_hour)
    if config.growth:
        ways = ["ours, float32", "ours, bfloat16 encoder", fastest_peer(found), "the original's way"]
        batch_size = config.growth_batch_size
        grows = {
            f"n_latents, batch {batch_size}": {
                n: size._replace(n_latents=n, batch_size=batch_size) for n in config.growth_latents
            },
            f"batch, n_latents {size.n_latents}": {n: size._replace(batch_size=n) for n in config.growth_batches},
        }
        for what, sizes in grows.items():
            grown = {
                n: {way: measure_alone(way, each, device, config.threads, config.growth_rounds) for way in ways if way}
                for n, each in progress_bar(sizes.items(), unit="size", desc=what)
            }
            print("\n" + growth_table(what, grown), flush=True)
            results[what] = {n: {way: one._asdict() for way, one in measured.items()} for n, measured in grown.items()}
    write_json(config.output, results)
    if config.profile:
        for name in (name for name in names if WAYS[name].make is ours):
            print(f"\n{name}, five steps\n" + profile(size, device, WAYS[name].options))


if __name__ == "__main__":
    run(main)
