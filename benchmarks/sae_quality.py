"""Quality of our SAE against those of sparsify, SAELens and dictionary_learning: same activations, equal tokens.

Reads   the embedded tiny Llama and the documentation on this machine, made into activations by the scripts themselves
Writes  DATA_DIR: those activations and our SAEs; a markdown table to the terminal, DATA_DIR/results.json, curves.png
Method  n_latents, k and the activations are the same for all; ours is trained by sae_training.py, each peer by its own
        trainer (see sae_step.py) at its recommended learning rate, optimiser and initialisation. Two defaults of the
        peers are meant for runs of 10^8 to 10^10 activations and are set for this one: a latent counts as dead in
        training after DEAD_AFTER_TOKENS, as in ours, and a warm-up of 1000 steps becomes WARM_UP_STEPS. All see
        activations normalised per token, as ours are; any further scaling is the peer's own. Each peer's weights
        become a state dict of our class (exactly: TopK and ReLU are the same), and one program measures all:
        autoencoder.evaluation on held-out sentences, and dead latents, those silent over the last DEAD_AFTER_TOKENS
        training activations once training is over. Curves: FVU of a batch just before training on it.
        Training time is the trainer's alone for a peer, the whole script's (start, validation, checkpoints) for ours
Cost    about 25 minutes on two cores. The peers need an environment of their own: requirements-peers.txt

    data/peers/bin/python benchmarks/sae_quality.py
"""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.options import Count, CountOrZero, NotNegative, Positive, Share, parse_constants
from pipeline.run import run

DATA_DIR = "data/benchmark_sae_quality"  # folder for everything
SITES = ("layers.6.attention_norm", "layers.6.resid_post")  # two kinds of input to an SAE
NUM_SAMPLES: Count = 60_000  # sentences, about 1.24 million activations
NUM_EPOCHS: Count = 2  # passes over them
N_LATENTS: Count = 4096  # dictionary size
K: Count = 32  # latents kept per activation
DEAD_AFTER_TOKENS: Count = 300_000  # activations without firing before a latent counts as dead
WARM_UP_STEPS: CountOrZero = 30  # for peers whose default is 1000
PEERS: tuple[str, ...] = ("sparsify", "sparsify, Adam", "SAELens", "dictionary_learning")  # rows beside ours
PEER_BATCH_SIZE: Count = 4096  # SAELens' default; sparsify's is 65,536 tokens, dictionary_learning's buffer gives 8192
PEER_LR_FACTORS: tuple[Positive, ...] = (1.0,)  # multiples of each peer's recommended learning rate to try
BATCH_SIZE: Count = 1024  # ours: activations per step
LEARNING_RATE: NotNegative = 4e-3  # ours
LEARNING_RATE_MIN_RATIO: Share = 0.05  # ours: the cosine ends at this share of the peak
OUR_WARM_UP_STEPS: CountOrZero = 20  # ours
K_AUX: CountOrZero = 128  # ours: dead latents in the auxiliary loss, d_model / 2

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import contextlib
import io
import json
import shutil
import subprocess
import time
from collections.abc import Iterator

import torch
from sae_step import WAYS, Size, missing
from torch import Tensor

from autoencoder.evaluation import evaluate
from embedded.recipe import command
from llama_3 import load_model, load_tokenizer
from llama_3.model import Transformer
from pipeline.activation_store import open_shard
from pipeline.errors import InputError, Stop
from pipeline.figures import new_figure, save_figure
from pipeline.files import PROJECT_DIR, write_json
from pipeline.manifests import git_commit, read_manifest
from pipeline.progress import progress_bar
from pipeline.sentences import SentenceDataset
from pipeline.statistics import read_statistics
from sae import SparseAutoencoder, load_sae_model

_MODEL_DIR = PROJECT_DIR / "llama_3" / "tiny_llama"
_CURVE_POINTS = 60
_BATCH_TOKENS = 2048  # a forward pass of the tiny Llama


class Task(NamedTuple):
    """The settings that are the same for all."""

    n_latents: int
    k: int
    num_epochs: int
    dead_after_tokens: int


class Trained(NamedTuple):
    sae: SparseAutoencoder
    curve: list[tuple[int, float]]  # (activations seen, FVU of the next batch)
    seconds: float


def run_stage(script: str, **options: object) -> None:
    flags: list[str] = []
    for name, value in options.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    if subprocess.run([*command(script), *flags], cwd=PROJECT_DIR).returncode:
        raise Stop(f"{script} failed; its message is above.")


def make_batches(folder: Path, sites: tuple[str, ...], num_samples: int) -> None:
    """Make shuffled activations of every site in folder/batches with the scripts and the demo's options."""
    sentences = folder / "sentences"
    run_stage("embedded/corpus.py", output_dir=folder / "documents", max_mb=6)
    run_stage(
        "openwebtext_sentences_dataset.py",
        input_path=folder / "documents",
        output_dir=sentences,
        punkt="corpus",
        punkt_train_mb=1,
        shard_mb=2,
    )
    run_stage(
        "capture_activations.py",
        model_dir=_MODEL_DIR,
        sentences_dir=sentences,
        output_dir=folder / "activations",
        num_samples=num_samples,
        sites=sites,
        dtype="float32",
        batch_tokens=_BATCH_TOKENS,
        window_sentences=4000,
    )
    for site in sites:
        activations, batches = folder / "activations" / site, folder / "batches" / site
        run_stage("sae_preprocessing.py", input_dir=activations, output_dir=batches, shard_gb=0.1)


class Activations:
    """A site's training activations, in memory."""

    def __init__(self, folder: Path):
        self.manifest = read_manifest(folder, "sae_preprocessing.py")
        shards = [open_shard(folder / record["file"], "sae_preprocessing.py") for record in self.manifest["shards"]]
        self.acts = torch.cat([shard.get_tensor("acts") for shard in shards])  # (n, d_model) bfloat16
        self.variance = float(read_statistics(folder / self.manifest["statistics"]).var_normalized.mean())

    def normalized(self, acts: Tensor) -> Tensor:
        acts = acts.float()
        eps = self.manifest["normalize_eps"]
        return (acts - acts.mean(-1, keepdim=True)) / (acts.std(-1, keepdim=True) + eps)

    def batches(self, batch_size: int, n_epochs: int) -> Iterator[Tensor]:
        """Normalised batches, made of stored ones in another order each epoch."""
        generator = torch.Generator().manual_seed(0)
        stored = self.acts.split(self.manifest["batch_size"])
        each = batch_size // self.manifest["batch_size"]
        for _ in range(n_epochs):
            order = torch.randperm(len(stored), generator=generator).tolist()
            for i in range(0, len(order) - each + 1, each):
                yield self.normalized(torch.cat([stored[j] for j in order[i : i + each]]))

    def n_steps(self, batch_size: int, n_epochs: int) -> int:
        return len(self.acts) // self.manifest["batch_size"] // (batch_size // self.manifest["batch_size"]) * n_epochs


def train_peer(
    name: str, lr_factor: float, data: Activations, task: Task, batch_size: int, warm_up_steps: int
) -> Trained:
    torch.manual_seed(0)
    d_model = data.acts.shape[1]
    n_steps = data.n_steps(batch_size, task.num_epochs)
    entry = WAYS[name]
    options = {**entry.options, "n_steps": n_steps, "dead_after_tokens": task.dead_after_tokens}
    if entry.has_warm_up:
        options["warm_up_steps"] = warm_up_steps
    size = Size(d_model, task.n_latents, task.k, batch_size)
    way = entry.make(size, "cpu", **options, lr_factor=lr_factor)
    sae = SparseAutoencoder(d_model, task.n_latents, task.k, data.manifest["normalize_eps"])
    curve: list[tuple[int, float]] = []
    every = max(1, n_steps // _CURVE_POINTS)
    waiting = 0.0

    def watched() -> Iterator[Tensor]:
        nonlocal waiting
        for step, z in enumerate(bar):
            began = time.perf_counter()
            if step % every == 0 and step:
                sae.load_state_dict(way.state())
                with torch.no_grad():
                    error = (sae.decode(*sae.encode_normalized(z)) - z).square().mean()
                curve.append((step * len(z), float(error) / data.variance))
            waiting += time.perf_counter() - began
            yield z

    bar = progress_bar(data.batches(batch_size, task.num_epochs), total=n_steps, unit="step", desc=name)
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        way.train(watched())
    bar.close()
    seconds = time.perf_counter() - began - waiting
    sae.load_state_dict(way.state())
    assert way.reconstruct
    with torch.no_grad():
        z = data.normalized(data.acts[:batch_size])
        same = torch.isclose(sae.decode(*sae.encode_normalized(z)), way.reconstruct(z), atol=1e-3, rtol=1e-3).all(1)
    if same.float().mean() < 0.999:  # rounding breaks ties between latents
        raise AssertionError(f"{name}: its weights reconstruct {int((~same).sum())} rows differently in our class.")
    return Trained(sae, curve, seconds)


def train_ours(site: str, folder: Path, task: Task, **options: object) -> Trained:
    place = folder / "ours" / site
    shutil.rmtree(place, ignore_errors=True)
    began = time.perf_counter()
    run_stage(
        "sae_training.py",
        data_dir=folder / "batches" / site,
        model_save_path=place / "sae.pth",
        checkpoint_dir=place / "checkpoints",
        logs_per_epoch=_CURVE_POINTS // task.num_epochs,
        wandb="off",
        **task._asdict(),
        **options,
    )
    seconds = time.perf_counter() - began
    lines = [json.loads(line) for line in (place / "sae.metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [(line["tokens"], line["train_fvu"]) for line in lines if "train_fvu" in line]
    return Trained(load_sae_model(place / "sae.pth"), curve, seconds)


def dead_fraction(sae: SparseAutoencoder, data: Activations, n_tokens: int) -> float:
    """Share of latents silent over the last n_tokens training activations."""
    fired = torch.zeros(sae.n_latents, dtype=torch.bool)
    with torch.no_grad():
        for acts in data.acts[-n_tokens:].split(8192):
            values, indices = sae.encode_normalized(data.normalized(acts))
            fired[indices[values > 0]] = True
    return 1 - float(fired.float().mean())


def measure(
    trained: dict[str, Trained],
    site: str,
    data: Activations,
    model: Transformer,
    sentences: list[list[int]],
    dead_after_tokens: int,
) -> dict[str, dict]:
    found = evaluate(model, {name: one.sae for name, one in trained.items()}, site, sentences, _BATCH_TOKENS, None)
    for name, one in trained.items():
        dead = dead_fraction(one.sae, data, dead_after_tokens)
        found[name] |= {"dead_frac": dead, "curve": one.curve, "training_seconds": one.seconds}
    return found


def table(results: dict[str, dict[str, dict]]) -> str:
    rows = [
        "| site | SAE | FVU | L0 | dead latents | silent on held-out | loss recovered | KL, nats | training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for site, found in results.items():
        for name, one in found.items():
            rows.append(
                f"| {site} | {name} | {one['fvu']:.4f} | {one['l0']:.1f} | {one['dead_frac']:.1%} "
                f"| {one['silent_frac']:.1%} | {one['loss_recovered']:.2%} | {one['kl_spliced']:.4f} "
                f"| {one['training_seconds']:.0f} s |"
            )
    return "\n".join(rows)


def plot(results: dict[str, dict[str, dict]], path: Path) -> None:
    figure = new_figure(6 * len(results), 4)
    axes = figure.subplots(1, len(results), squeeze=False)
    for axis, (site, found) in zip(axes[0], results.items(), strict=True):
        for name, one in found.items():
            tokens, fvu = zip(*one["curve"], strict=True)
            ours = name == "ours"
            axis.plot([t / 1e6 for t in tokens], fvu, label=name, lw=2.5 if ours else 1.2, zorder=3 if ours else 2)
        low = min(one["fvu"] for one in found.values())
        axis.set(title=site, xlabel="million activations", ylabel="FVU of the next batch", yscale="log")
        axis.set_ylim(bottom=0.85 * low)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:.2g}")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    save_figure(figure, path, dpi=130)


def check_peers(peers: tuple[str, ...]) -> list[str]:
    """The peers that are installed. Raises InputError for an unknown one."""
    known = [name for name, entry in WAYS.items() if entry.package]
    for name in peers:
        if name not in known:
            raise InputError(f"--peers {name!r} is unknown; write {', '.join(known)}.")
    absent = [name for name in peers if missing(name)]
    if absent:
        print(f"Not installed here, so not measured: {', '.join(absent)}; see benchmarks/requirements-peers.txt.")
    return [name for name in peers if name not in absent]


def main() -> None:
    config = parse_constants(globals())
    peers = check_peers(tuple(config.peers))
    task = Task(config.n_latents, config.k, config.num_epochs, config.dead_after_tokens)
    ours = {
        "k_aux": config.k_aux,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "learning_rate_min_ratio": config.learning_rate_min_ratio,
        "warmup_steps": config.our_warm_up_steps,
    }
    folder = Path(config.data_dir).absolute()
    make_batches(folder, tuple(config.sites), config.num_samples)
    model, tokenizer = load_model(str(_MODEL_DIR)), load_tokenizer(str(_MODEL_DIR))
    results: dict[str, dict[str, dict]] = {}
    for site in config.sites:
        data = Activations(folder / "batches" / site)
        if config.peer_batch_size % data.manifest["batch_size"]:
            raise InputError(
                f"--peer_batch_size {config.peer_batch_size} must be a multiple of the stored batches of "
                f"{data.manifest['batch_size']}; choose another."
            )
        texts = SentenceDataset(folder / "sentences", config.num_samples)
        held_out = range(data.manifest["first_validation_sentence"], config.num_samples)
        sentences = [ids[: data.manifest["max_tokens"]] for i in held_out if len(ids := tokenizer.encode(texts[i])) > 1]
        trained = {"ours": train_ours(site, folder, task, **ours)}
        for name in peers:
            for factor in config.peer_lr_factors:
                row = name if factor == 1 else f"{name}, {factor:g} x its learning rate"
                trained[row] = train_peer(name, factor, data, task, config.peer_batch_size, config.warm_up_steps)
        results[site] = measure(trained, site, data, model, sentences, task.dead_after_tokens)
        print("\n" + table({site: results[site]}), flush=True)
        write_json(folder / "results.json", {"git_commit": git_commit(), "sites": results})
        plot(results, folder / "curves.png")
    print("\n" + table(results))
    print(f"\nCurves: {folder / 'curves.png'}")


if __name__ == "__main__":
    run(main)
