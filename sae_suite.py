"""Train SAEs and transcoders at many places of a model from one capture; evaluate, name and compare them over depth.

Reads   MODEL_DIR (a Llama folder), SENTENCES_DIR (openwebtext_sentences_dataset.py)
Writes  SUITE_DIR/layers.N.KIND: a folder for each SAE, with sae.pth, the files beside it, its report, and suite.log,
        what its stages said; SUITE_DIR/activations/SITE; suite.md, suite.json, suite.png, index.html over all of them
Method  the stage scripts, as processes: one pass of the model over the sentences captures every site; then each SAE is
        preprocessed, trained, evaluated, named and reported, SIDE_BY_SIDE of them at once, each on its share of the
        cores or on a GPU of its own. What is there is not made again, so a killed run goes on; an SAE that fails does
        not stop the others. layers.N.transcoder goes from ffn_norm to mlp_out of layer N (Dunefsky et al. 2024,
        arXiv:2406.11944). A suite of this kind: Llama Scope (He et al. 2024, arXiv:2410.20526). Without SITES nothing
        is trained: what is missing for the SAEs that SUITE_DIR holds is made, and they are compared
Cost    disk: 2 bytes x d_model per token and site; three times that for each SAE that is being trained. It prints
        the sums, and estimates of memory and time, before it starts

    python sae_suite.py --sites 'layers.*.transcoder' layers.15.resid_post --suite_dir data/suite
    python sae_suite.py --suite_dir data/suite
"""

from typing import Any, Literal, NamedTuple

from pipeline.options import Count, CountOrZero, NotNegative, Share, parse_constants
from pipeline.run import run

SITES: tuple[str, ...] | None = None  # what to train: layers.N.SITE, layers.N.transcoder, or quoted patterns
SUITE_DIR = "data/suite"  # folder for everything
MODEL_DIR = "models/smollm2-135M-Instruct-Q4_1"  # Llama folder
SENTENCES_DIR = "data/sentences"  # folder of sentences

NUM_SAMPLES: CountOrZero = 8_000  # sentences to capture; 0 for all
BEGIN_OF_TEXT = True  # read each after begin-of-text; without it the first token, the longest by far, dominates
DTYPE: Literal["bfloat16", "float32"] = "float32"  # of the capture; bfloat16 on GPUs, and on CPUs that support it
BATCH_TOKENS: Count = 1024  # tokens per forward pass; 4096 on a GPU
WINDOW_SENTENCES: Count = 1024  # sentences in a window; each process of the capture holds two, at all sites

N_LATENTS: Count = 2048  # of each SAE
K: Count = 16  # latents kept per activation
GATE: Literal["topk", "batch_topk"] = "topk"  # K of each activation, or K on average over a batch
SKIP = True  # give transcoders a linear path beside their latents
K_AUX: CountOrZero = 256  # dead latents in the auxiliary loss
NUM_EPOCHS: Count = 6  # passes over the activations
BATCH_SIZE: Count = 1024  # activations per step
LEARNING_RATE: NotNegative = 2e-3  # peak
LEARNING_RATE_MIN_RATIO: Share = 0.05  # the cosine ends at this share of it
WARMUP_STEPS: CountOrZero = 20  # steps of linear warm-up
DEAD_AFTER_TOKENS: Count = 300_000  # activations without firing before a latent counts as dead

NUM_EVALUATED: Count = 500  # held-out sentences that each SAE is evaluated on
REPORT_LATENTS: Count = 200  # latents with a card in each report
SIDE_BY_SIDE: CountOrZero = 0  # SAEs at work at once; 0: one for each GPU or, without one, each core
KEEP = False  # keep batches and checkpoints of trained SAEs

_TRAINING = (  # options of sae_training.py
    *("n_latents", "k", "gate", "k_aux", "num_epochs", "batch_size", "learning_rate", "learning_rate_min_ratio"),
    *("warmup_steps", "dead_after_tokens"),
)
_CAPTURE = ("num_samples", "begin_of_text", "dtype", "batch_tokens", "window_sentences")  # of capture_activations.py
_SAMPLE = 500  # sentences that tell how many tokens there are
_MEASURED_STEPS = 3  # training steps that tell how long training takes
_NAMES_S = 0.008  # seconds per latent of top sentences, names, scores and report on one core, measured with SmolLM2
_STAGE_S = 2.5  # seconds that a process takes to start and load
_MODEL_SPEED = 0.6  # of a single product's, that of the model's forward pass; SmolLM2 on two cores
_PREPROCESSING_RATE = 0.1e9  # bytes per second and core; docs/benchmarks.md
_GOOD = 0.7  # detection score of a good name
_NAMES_SHOWN = 4  # of each SAE in the index

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import contextlib
import html
import os
import queue
import shutil
import signal
import subprocess
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean

import torch

from autoencoder.step import Step, StepOptions
from embedded import recipe as recipes
from embedded.recipe import command, run_command
from latents.index import LatentIndex
from latents.meanings import best_meanings
from latents.origin import source_of
from latents.pages import page_html, picture, read_part, write_text
from latents.suites import Member, activations_dir, batches_dir, by_kind, chosen, trained
from llama_3 import load_tokenizer
from llama_3.loading import read_params
from llama_3.model import ModelArgs
from pipeline.distributed import ALONE, make_grid
from pipeline.errors import InputError, Stop
from pipeline.figures import new_figure, save_figure
from pipeline.files import PROJECT_DIR, locked, read_json, require_disk, write_json
from pipeline.manifests import MANIFEST
from pipeline.progress import duration, gb, progress_bar
from pipeline.sentences import SentenceDataset
from sae import SparseAutoencoder

# ---- the stages of one SAE


class Stage(NamedTuple):
    """A command, the file it ends with, and the files that this is made from."""

    title: str
    words: list[str]
    writes: Path
    reads: tuple[Path, ...]

    @property
    def is_done(self) -> bool:
        """Whether its file is there, and no older than what it is made from."""
        if not self.writes.exists():
            return False
        made = self.writes.stat().st_mtime
        return all(path.stat().st_mtime <= made for path in self.reads if path.exists())


def training_options(member: Member, config: Namespace) -> dict[str, Any]:
    """What an SAE is trained with; the same for all, but for the skip, which only transcoders have."""
    options = {name: getattr(config, name) for name in _TRAINING}
    return options | ({"skip": config.skip} if member.writes else {})


def training_stages(member: Member, config: Namespace, n_threads: int) -> list[Stage]:
    """From activations to sae.pth."""
    stages = []
    for site in member.sites:
        out = batches_dir(member.suite_dir, site)
        places = {"input_dir": activations_dir(member.suite_dir, site), "output_dir": out}
        options = {"batch_size": config.batch_size, "num_processes": n_threads, "shard_gb": 0.1}
        shuffle = command("sae_preprocessing.py", **places, **options)
        stages.append(Stage(f"batches of {site}", shuffle, out / MANIFEST, ()))
    places = {"data_dir": batches_dir(member.suite_dir, member.reads), "model_save_path": member.files.path}
    places["checkpoint_dir"] = member.folder / "checkpoints"
    if member.writes:
        places["target_data_dir"] = batches_dir(member.suite_dir, member.writes)
    train = command("sae_training.py", **places, **training_options(member, config), wandb="off")
    return [*stages, Stage("training", train, Path(member.files.path), ())]


def later_stages(member: Member, config: Namespace) -> list[Stage]:
    """From sae.pth to the report."""
    files, path = member.files, Path(member.files.path)
    evaluation, report = files.beside("evaluation.json"), files.beside("report.html")
    top, latents, promoted = (files.beside(f"{name}.parquet") for name in ("top", "latents", "promoted"))
    meanings, scores = (path.with_name(f"{recipes.MEANING}.{ending}") for ending in ("yaml", "scores.parquet"))
    options = {"num_sentences": config.num_evaluated, "batch_tokens": config.batch_tokens}
    evaluate = command("sae_evaluation.py", sae_model_path=path, **options)
    made = [(top, path), (meanings, top), (scores, meanings), (promoted, latents)]
    naming = recipes.naming_stages(path, member.activations)[: len(made)]
    write_report = command("sae_report.py", sae_model_path=path, latents=config.report_latents)
    return [
        Stage("evaluation", evaluate, evaluation, (path,)),
        *(Stage(title, words, out, (read,)) for (title, words), (out, read) in zip(naming, made, strict=True)),
        Stage("report", write_report, report, (evaluation, scores, promoted)),
    ]


def is_done(member: Member, config: Namespace) -> bool:
    return member.is_trained and all(stage.is_done for stage in later_stages(member, config))


def check_trained(members: Sequence[Member], config: Namespace, n_sentences: int) -> None:
    """Raise InputError if a trained SAE was trained with other options, or on other activations."""
    for member in members:
        if not member.is_trained:
            continue
        info = read_json(member.files.json, "remove its folder.")
        then = {**info, **info.get("config", {}), "sentences": info.get("dataset", {}).get("sentences")}
        now = training_options(member, config)
        now |= {"site": member.reads, "sentences": n_sentences, "begin_of_text": config.begin_of_text}
        now |= {"target_site": member.writes} if member.writes else {}
        for name, value in now.items():
            if name in then and then[name] != value:
                raise InputError(
                    f"{member.files.path} was trained with {name} = {then[name]!r}, but now it is {value!r}; use the "
                    "old value, remove its folder, or name another --suite_dir."
                )


def check_others(suite_dir: Path, config: Namespace, n_sentences: int) -> None:
    """Raise InputError if the suite holds an SAE of another model, or of other tokens."""
    for path in sorted(suite_dir.glob("layers.*/sae.json")):
        source = source_of(path.with_suffix(".pth"))
        source.check_model(config.model_dir, "--model_dir")
        if not source.dataset:  # of another tool
            continue
        then = source.dataset["sentences"], source.begin_of_text
        if then != (n_sentences, config.begin_of_text):
            raise InputError(
                f"{path} is of {then[0]} sentences with begin_of_text = {then[1]}, but now it is {n_sentences} and "
                f"{config.begin_of_text}; use the old values, or name another --suite_dir."
            )


# ---- many at once


class Crew:
    """Processes side by side, each with its share of the cores, or with a GPU of its own."""

    def __init__(self, n: int, n_gpus: int):
        self.n_threads = max(1, (os.cpu_count() or 1) // n)
        self.slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for i in range(n):
            gpu = {"CUDA_VISIBLE_DEVICES": visible_gpu(i % n_gpus)} if n_gpus else {}
            self.slots.put({"OMP_NUM_THREADS": str(self.n_threads), **gpu})
        self.running: set[subprocess.Popen] = set()
        self.is_stopping = False

    def run(self, stage: Stage, log: Path, slot: dict[str, str]) -> None:
        """Run a stage in a slot; what it says goes to the log. Raises Stop if it fails."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as out:
            out.write(f"\n$ {' '.join(['python', *stage.words[1:]])}\n".encode(errors="backslashreplace"))
            out.flush()
            start = out.tell()
            process = subprocess.Popen(
                stage.words,
                cwd=PROJECT_DIR,
                env={**os.environ, **slot},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.running.add(process)
        if self.is_stopping:
            process.terminate()
        code = process.wait()
        self.running.discard(process)
        if code:
            raise Stop(f"{stage.title}: {last_words(log, start) or f'exit code {code}'}")

    def stop(self) -> None:
        """End all processes; training saves its state first."""
        self.is_stopping = True
        for process in list(self.running):
            process.terminate()


def visible_gpu(i: int) -> str:
    """The i-th of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[i] if visible else str(i)


def last_words(log: Path, start: int) -> str:
    """The error sentence in a log from `start` on, or else its last line."""
    lines = [line for line in log.read_bytes()[start:].decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]


class Work:
    """What is to be done for the members of a suite."""

    def __init__(self, members: Sequence[Member], config: Namespace, crew: Crew):
        self.members, self.config, self.crew = members, config, crew
        self.locks = {site: threading.Lock() for member in members for site in member.sites}  # of batches
        self.bar = progress_bar(total=len(members), unit="SAE", desc="suite")

    def all(self) -> dict[str, str]:
        """Work through all members; returns what failed, by name."""
        failures: dict[str, str] = {}
        with self.bar, ThreadPoolExecutor(self.crew.slots.qsize()) as pool:
            jobs = {pool.submit(self.one, member): member for member in self.members}
            try:
                for job in as_completed(jobs):
                    try:
                        job.result()
                    except (Stop, OSError) as error:
                        failures[jobs[job].name] = str(error)
                        self.bar.write(f"{jobs[job].name} failed: {error}")
                    self.bar.update()
            except BaseException:
                self.crew.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return {member.name: failures[member.name] for member in self.members if member.name in failures}

    def one(self, member: Member) -> None:
        """Every stage of a member that is not done. Raises Stop."""
        slot = self.crew.slots.get()
        try:
            if not member.is_trained:
                *batches, train = training_stages(member, self.config, self.crew.n_threads)
                for site, stage in zip(member.sites, batches, strict=True):
                    with self.locks[site]:  # two SAEs may share a site
                        self.run(stage, member, slot)
                self.run(train, member, slot)
            if self.config.sites and not self.config.keep:
                self.tidy(member)
            for stage in later_stages(member, self.config):
                if not stage.is_done:
                    self.run(stage, member, slot)
        finally:
            self.crew.slots.put(slot)

    def run(self, stage: Stage, member: Member, slot: dict[str, str]) -> None:
        self.bar.set_postfix_str(f"{member.name}: {stage.title}")
        self.crew.run(stage, member.folder / "suite.log", slot)

    def tidy(self, member: Member) -> None:
        """Remove a trained member's checkpoints, and batches that no other one needs."""
        shutil.rmtree(member.folder / "checkpoints", ignore_errors=True)
        for site in member.sites:
            with self.locks[site]:
                if all(other.is_trained for other in self.members if site in other.sites):
                    shutil.rmtree(batches_dir(member.suite_dir, site), ignore_errors=True)


def is_complete(suite_dir: Path, site: str) -> bool:
    """Whether all activations of a site are there."""
    manifest = activations_dir(suite_dir, site) / MANIFEST
    return manifest.exists() and read_json(manifest, "remove its folder.").get("complete") is True


# ---- what it will take


def rate_of_products(device: str, width: int) -> float:
    """Operations per second of a product of matrices as the model has them."""
    a, b = torch.randn(1024, width, device=device), torch.randn(width, 4 * width, device=device)
    seconds = []
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        float((a @ b)[0, 0])
        seconds.append(time.perf_counter() - started)
    return 2 * a.shape[0] * b.numel() / min(seconds[1:])


def rate_of_training(d_model: int, config: Namespace, device: str, n_threads: int) -> float:
    """Activations per second of a training step with so many threads, on random activations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    sae = SparseAutoencoder(d_model, config.n_latents, config.k)
    sae.initialize(torch.zeros(d_model))
    alone = ALONE._replace(device=torch.device(device))
    step = Step(sae, StepOptions(config.batch_size, config.k_aux), make_grid(alone, 1))
    x = torch.randn(config.batch_size, d_model).to(device)
    seconds = []
    for n_before in range(1 + _MEASURED_STEPS):
        started = time.perf_counter()
        pending = step.gradients(x)
        step.apply(pending, step.agree(pending), 0.0, n_before)
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return config.batch_size / min(seconds[1:])


def parameters_of(args: ModelArgs, n_layers: int) -> float:
    """Weights of the model's first n_layers."""
    heads = (2 * args.n_heads + 2 * args.n_kv_heads) * args.head_dim
    return n_layers * args.dim * (heads + 3 * args.hidden_dim)


def announce(
    members: Sequence[Member], dataset: SentenceDataset, config: Namespace, args: ModelArgs, crew: Crew, device: str
) -> None:
    """Print what it will take; the measuring takes seconds. Raises Stop if the disk is too small."""
    suite_dir = members[0].suite_dir
    sites = {site for member in members for site in member.sites}
    untrained = [member for member in members if not member.is_trained]
    tokenizer = load_tokenizer(config.model_dir)
    sample = [len(tokenizer.encode(dataset[i])) for i in range(0, len(dataset), max(1, len(dataset) // _SAMPLE))]
    a_sentence = fmean(sample)
    n_tokens = len(dataset) * a_sentence

    n_at_once = min(crew.slots.qsize(), max(1, len(untrained)))
    site_bytes = 2 * args.dim * n_tokens
    sae_bytes = 4 * config.n_latents * (2 * args.dim + 1)
    captured = site_bytes * sum(not is_complete(suite_dir, site) for site in sites)
    # Two sites of each SAE at work, and one more while it is being shuffled.
    shuffled = site_bytes * ((len(sites) if config.keep else min(len(sites), 2 * n_at_once)) + n_at_once)
    kept = sae_bytes * len(untrained) * (1 + 6 * config.keep) + 6 * sae_bytes * n_at_once
    require_disk(suite_dir, captured + (shuffled + kept if untrained else 0))
    in_windows = 2 * 2 * args.dim * len(sites) * a_sentence * min(config.window_sentences, len(dataset))
    training = 5 * sae_bytes + 4 * config.batch_size * (config.n_latents + 6 * args.dim)

    speed = _MODEL_SPEED * rate_of_products(device, args.dim)
    steps = rate_of_training(args.dim, config, device, crew.n_threads)
    deepest = 1 + max(member.layer for member in members)
    seconds = {"capture": 2 * parameters_of(args, deepest) * n_tokens / speed if captured else 0.0}
    seconds["shuffling"] = 4 * site_bytes * sum(len(m.sites) for m in untrained) / _PREPROCESSING_RATE / n_at_once
    seconds["training"] = len(untrained) * (n_tokens * config.num_epochs / steps + 3 * _STAGE_S) / n_at_once
    evaluated = [member for member in members if not member.files.beside("evaluation.json").exists()]
    named = [member for member in members if not member.files.beside("top.parquet").exists()]
    passes = sum(1 + 4 * (args.n_layers - member.layer) / args.n_layers for member in evaluated)
    whole = parameters_of(args, args.n_layers) + args.dim * args.vocab_size
    seconds["evaluation"] = passes * 2 * whole * config.num_evaluated * a_sentence / speed
    seconds["names"] = len(named) * (config.n_latents * _NAMES_S + 8 * _STAGE_S) / n_at_once
    print(
        f"{len(members)} SAEs ({len(members) - len(untrained)} of them trained), {config.n_latents:,} latents and k "
        f"{config.k}, {crew.slots.qsize()} at once, on {crew.n_threads} core{'s' * (crew.n_threads > 1)} each; "
        f"{len(sites)} sites, {len(dataset):,} sentences, about {n_tokens:,.0f} tokens.\n"
        f"Disk: {gb(captured)} of activations; up to {gb(shuffled if untrained else 0)} of batches, "
        f"{'kept' if config.keep else 'removed after training'}; {gb(kept if untrained else 0)} of SAEs and "
        "checkpoints.\n"
        f"Memory: {gb(in_windows)} in each process of the capture, besides the model; then {n_at_once} x "
        f"{gb(training)} for training, besides what a process with torch takes.\n"
        f"Time, from quick measurements of one product and one training step, and more if the machine does other work: "
        f"{', '.join(f'{title} {duration(value)}' for title, value in seconds.items() if value >= 1) or 'little'}; in "
        f"all about {duration(sum(seconds.values()))}.",
        flush=True,
    )


# ---- table, picture, index


class Column(NamedTuple):
    """A number of each SAE."""

    title: str
    key: str
    form: str  # in the table
    about: str = ""  # of the picture; empty for those not drawn
    bounds: tuple[float | None, float | None] = (None, None)  # of its axis

    def show(self, row: dict[str, Any]) -> str:
        value = row.get(self.key)
        return "-" if value is None else self.form.format(value)

    def plain(self, row: dict[str, Any]) -> str:
        """As a number that can be sorted; percentages without their sign."""
        return "" if row.get(self.key) is None else self.show(row).removesuffix("%").replace(",", "")

    @property
    def plain_title(self) -> str:
        return self.title + (", %" if "%" in self.form else "")


_COLUMNS = (
    Column("latents", "n_latents", "{:,}"),
    Column("k", "k", "{}"),
    Column("FVU", "fvu", "{:.4f}", "FVU, held-out sentences", (0, None)),
    Column("loss recovered", "loss_recovered", "{:.1%}", "loss recovered", (None, 1.0)),
    Column("cost of zeroing, nats", "zeroing_cost", "{:.3f}"),
    Column("KL, nats", "kl_spliced", "{:.4f}"),
    Column("L0", "l0", "{:.1f}", "L0", (0, None)),
    Column("dead", "dead_frac", "{:.1%}", "share of dead latents", (0, None)),
    Column("names", "names", "{:,}"),
    Column("name score", "score", "{:.3f}", "detection score of the names", (0.5, None)),
    Column(f"names above {_GOOD}", "good_names", "{:.0%}"),
)


def measured(member: Member) -> dict[str, Any]:
    """What is known of a trained SAE; what is not measured is left out."""
    info = read_json(member.files.json, "train it again.")
    row = {"name": member.name, "layer": member.layer, "kind": member.kind}
    row |= {name: info.get(name) for name in ("n_latents", "k", "tokens_trained")}
    row["dead_frac"] = info.get("quality", {}).get("dead_frac")
    quality = member.files.beside("evaluation.json")
    if quality.exists():
        found = read_json(quality, "run sae_evaluation.py again.")
        row |= {name: found.get(name) for name in ("fvu", "loss_recovered", "zeroing_cost", "kl_spliced", "l0")}
    meanings = best_meanings(member.files.path, info.get("n_latents"), [])
    scores = [meaning.score for meaning in meanings.values() if meaning.score is not None]
    if meanings:
        row["names"] = len(meanings)
    if scores:
        row |= {"score": fmean(scores), "good_names": fmean(score > _GOOD for score in scores)}
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In markdown, by kind and depth."""
    lines = [f"| SAE | {' | '.join(column.title for column in _COLUMNS)} |", "|---" * (1 + len(_COLUMNS)) + "|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        lines += [f"| {row['name']} | {' | '.join(column.show(row) for column in _COLUMNS)} |" for row in of_kind]
    return "\n".join(lines)


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """What is drawn of _COLUMNS over depth, a line for each kind of SAE."""
    drawn = [column for column in _COLUMNS if column.about]
    figure = new_figure(13, 6.5)
    axes = figure.subplots(2, 3).flatten()
    every = [row["layer"] for row in rows]
    for axis, column in zip(axes, drawn, strict=False):
        for kind in dict.fromkeys(row["kind"] for row in rows):
            found = [(r["layer"], r[column.key]) for r in rows if r["kind"] == kind and r.get(column.key) is not None]
            layers, values = zip(*found, strict=True) if found else ((), ())
            axis.plot(layers, values, marker="o", markersize=4, label=kind)  # even nothing takes its colour
        axis.margins(y=0.1)
        low, high = axis.get_ylim()
        least, most = column.bounds
        axis.set_ylim(low if least is None else min(least, low), high if most is None else max(most, high))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(title=column.about, xlabel="layer", xlim=(min(every) - 0.5, max(every) + 0.5))
        axis.grid(alpha=0.3)
    axes[-1].axis("off")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="center")
    save_figure(figure, path)


def some_names(member: Member) -> list[str]:
    """Of its most interesting latents."""
    found = LatentIndex(member.files.path).search(limit=_NAMES_SHOWN)
    return [row["meaning"] for row in found if row["meaning"]]


def index_html(members: Sequence[Member], rows: Sequence[dict[str, Any]], model: str, drawing: Path) -> str:
    """A page over all reports: the picture, and a table to search and sort."""
    kinds = ", ".join(f"{len(found)} x {kind}" for kind, found in by_kind(members).items())
    facts = [("model", model), ("SAEs", kinds), ("latents in all", f"{sum(row['n_latents'] for row in rows):,}")]
    items = "".join(f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts)
    head = ["layer", "SAE, and names of some latents", *(column.plain_title for column in _COLUMNS)]
    lines = []
    for member, row in zip(members, rows, strict=True):
        report = member.files.beside("report.html")
        link = f'<a href="{member.name}/{report.name}">{member.kind}</a>' if report.exists() else member.kind
        names = html.escape("; ".join(some_names(member)))
        cells = "".join(f"<td>{column.plain(row)}</td>" for column in _COLUMNS)
        lines.append(f"<tr><td>{member.layer}</td><td>{link}<br><small>{names}</small></td>{cells}</tr>")
    heads = "".join(f"<th><button>{title}</button></th>" for title in head)
    parts = [
        f"<header><p class=kicker>A suite of sparse autoencoders</p><h1>{html.escape(model)}, layer by layer</h1>"
        f"<dl class=facts>{items}</dl></header>",
        f"<section><h2>Over depth</h2>{picture(drawing, 'FVU, loss recovered, L0, dead latents, scores')}</section>",
        "<section><h2>Reports</h2><div class=search><input type=search id=query placeholder='Search kinds and names' "
        "aria-label='Search kinds and names' autocomplete=off><output id=found></output></div>"
        f"<div class=scroll style='max-height: none'><table id=index><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div></section>",
    ]
    return page_html(f"{model}: a suite of SAEs", parts, read_part("report.js"))


def summarise(suite_dir: Path, members: Sequence[Member]) -> None:
    """Write and print what is known of the trained members."""
    rows = [measured(member) for member in members]
    info = read_json(members[0].files.json, "train it again.")
    model = info.get("model", {}).get("name") or "a Llama"
    write_json(suite_dir / "suite.json", {"model": model, "saes": rows})
    write_text(suite_dir / "suite.md", table(rows) + "\n")
    draw(suite_dir / "suite.png", rows)
    write_text(suite_dir / "index.html", index_html(members, rows, model, suite_dir / "suite.png"))
    print(f"\n{table(rows)}\n\n{suite_dir / 'suite.png'}\n{suite_dir / 'index.html'}", flush=True)


# ---- main


@contextlib.contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """In this block SIGTERM raises KeyboardInterrupt, which ends the stages too; otherwise they would run on."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def open_sentences(config: Namespace) -> SentenceDataset:
    """Those to capture. Raises InputError if there are none."""
    dataset = SentenceDataset(config.sentences_dir, config.num_samples)
    if not len(dataset):
        raise InputError(f"There are no sentences in {config.sentences_dir}; give another folder.")
    return dataset


def capture(members: Sequence[Member], config: Namespace, n_gpus: int) -> dict[str, str]:
    """Every site in one pass, unless it is there; returns who has no activations, by name. Raises Stop if all have
    none."""
    sites = dict.fromkeys(site for member in members for site in member.sites)
    places = {"model_dir": config.model_dir, "sentences_dir": config.sentences_dir}
    places["output_dir"] = members[0].suite_dir / "activations"
    options = {name: getattr(config, name) for name in _CAPTURE}
    try:
        run_command(command("capture_activations.py", n_gpus or 2, **places, **options, sites=tuple(sites)))
    except Stop:
        without = [m.name for m in members if not all(is_complete(m.suite_dir, site) for site in m.sites)]
        if len(without) == len(members):
            raise
        return dict.fromkeys(without, "its activations could not be captured; capture_activations.py says why, above.")
    return {}


def main() -> None:
    config = parse_constants(globals())
    suite_dir = Path(config.suite_dir).absolute()
    n_gpus = torch.cuda.device_count()
    at_once = config.side_by_side or n_gpus or os.cpu_count() or 1
    if not config.sites:
        members = trained(suite_dir)
        crew = Crew(min(at_once, len(members)), n_gpus)
        with ended_as_by_ctrl_c(), locked(suite_dir):
            failures = Work(members, config, crew).all()
            summarise(suite_dir, members)
    else:
        config.model_dir, config.sentences_dir = map(os.path.abspath, (config.model_dir, config.sentences_dir))
        if config.k > config.n_latents:
            raise InputError(f"--k {config.k} exceeds --n_latents {config.n_latents}; correct one of them.")
        args, dataset = read_params(config.model_dir), open_sentences(config)
        members = chosen(suite_dir, config.sites, args.n_layers)
        check_trained(members, config, len(dataset))
        check_others(suite_dir, config, len(dataset))
        crew = Crew(min(at_once, len(members)), n_gpus)
        with ended_as_by_ctrl_c(), locked(suite_dir):
            failures = {}
            if todo := [member for member in members if not is_done(member, config)]:
                announce(todo, dataset, config, args, crew, "cuda" if n_gpus else "cpu")
                failures = capture(todo, config, n_gpus)
            failures |= Work([member for member in members if member.name not in failures], config, crew).all()
            if any(member.is_trained for member in members):
                summarise(suite_dir, trained(suite_dir))
    for name, why in failures.items():
        log = suite_dir / name / "suite.log"
        print(f"{name}: {why}" + (f"  ({log})" if log.exists() else ""))
    if failures:
        raise Stop(
            f"{len(failures)} of {len(members)} SAEs failed, named above with their errors; correct that and run the "
            "same command again."
        )


if __name__ == "__main__":
    run(main)
