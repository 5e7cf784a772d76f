"""Train a sparse autoencoder, or a transcoder, on shuffled batches of activations.

Reads   DATA_DIR (sae_preprocessing.py); for a transcoder also TARGET_DATA_DIR, the same tokens at another site
Writes  MODEL_SAVE_PATH: the SAE NAME.pth with NAME.json, NAME.metrics.jsonl, NAME.curves.png and NAME.frequencies.png
        beside it; CHECKPOINT_DIR: checkpoints to resume from (several nodes must all see it)
Method  Gao et al. 2024, arXiv:2406.04093; docs/method.md; departures from the original: docs/differences.md.
        GATE batch_topk: Bussmann et al. 2024, arXiv:2412.06410. MATRYOSHKA: Bussmann et al. 2025, arXiv:2503.17547.
        Transcoders: Dunefsky et al. 2024, arXiv:2406.11944, with SKIP Paulo et al. 2025, arXiv:2501.18823.
        The processes form a grid: LATENT_PARALLEL neighbours share one SAE, each holding a slice of its latents, and
        see the same activations; the groups of neighbours divide the batch. The step (autoencoder/step.py) does all
        its communication before it changes anything, so a process that is stopped, or on CPUs left alone, can still
        save the previous step
Cost    disk: a checkpoint is three times the size of the SAE; rates in docs/benchmarks.md; many GPUs: docs/scaling.md

    python sae_training.py --data_dir data/batches --model_save_path data/sae.pth
    torchrun --standalone --nproc_per_node=8 sae_training.py --data_dir data/batches --model_save_path data/sae.pth
"""

from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pipeline.options import (
    Bounds,
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    Seed,
    Share,
    ShareBelowOne,
    parse_constants,
)
from pipeline.run import exit_at_once, run

DATA_DIR = "data/batches"  # shuffled batches
B_PRE_PATH: str | None = None  # statistics file with the initial b_pre; DATA_DIR's own when not given
MODEL_SAVE_PATH = "data/sae.pth"  # where to write the trained SAE
MODEL_LOAD_PATH: str | None = None  # an SAE to start from instead of a fresh one
CHECKPOINT_DIR = "data/checkpoints"  # folder for checkpoints

N_LATENTS: Count = 2**16  # dictionary size
K: Count = 64  # latents kept per activation
GATE: Literal["topk", "batch_topk"] = "topk"  # K of each activation, or K on average over a batch; then a threshold
MATRYOSHKA: tuple[Count, ...] | None = None  # numbers of latents, fewer than all, that also reconstruct by themselves
NORMALIZATION: Literal["layer_norm", "none", "scale"] = "layer_norm"  # of each activation, none, or one constant factor
TARGET_DATA_DIR: str | None = None  # batches of another site of the same tokens: a transcoder to that site
SKIP = False  # give a transcoder a linear path beside its latents
K_AUX: CountOrZero = 2048  # dead latents in the auxiliary loss, a power of two near d_model / 2; 0 for none
AUX_LOSS_COEFF: NotNegative = 1 / 32  # weight of the auxiliary loss
DEAD_AFTER_TOKENS: Count = 10_000_000  # activations without firing before a latent counts as dead

NUM_EPOCHS: Count = 10  # passes over the training activations
EARLY_STOP_EPOCHS: Count | None = None  # stop after this many epochs without a better validation FVU
BATCH_SIZE: Count = 8192  # activations per step, over all processes
LEARNING_RATE: NotNegative = 5e-5  # peak learning rate
LEARNING_RATE_MIN_RATIO: Share = 1 / 5  # the cosine ends at this share of the peak
WARMUP_STEPS: CountOrZero = 0  # steps of linear warm-up
BETAS: tuple[ShareBelowOne, ShareBelowOne] = (0.85, 0.9999)  # AdamW's betas; rare latents need a long second moment
ADAM_EPS: Annotated[float, Bounds(least=1e-30)] = 6.25e-10  # AdamW's epsilon
WEIGHT_DECAY: NotNegative = 0.0  # AdamW's weight decay; the original's 0.01 shrank silent latents
GRAD_CLIP: Positive | None = None  # largest norm of the whole gradient, after projection; no limit when not given
ORTHOGONAL_START = False  # start with orthogonal blocks of d_model latents, instead of random latents
SEED: Seed = 0  # for the initialisation and the order of batches

LATENT_PARALLEL: Count | None = None  # processes that share one SAE; when not given a node's GPUs, 1 on CPUs
MICRO_BATCH_SIZE: Count | None = None  # activations per forward pass of a process; its whole share when not given
ENCODER_DTYPE: Literal["float32", "bfloat16"] = "float32"  # for the product that selects latents; values stay float32
ALLOW_TF32 = True  # GPUs: TF32 for dense float32 products, which choose latents and revive dead ones
LOGS_PER_EPOCH: Count = 1000  # lines in metrics.jsonl per epoch
CHECKPOINTS_PER_EPOCH: Count = 1  # checkpoints per epoch
CHECKPOINT_MINUTES: Positive = 15.0  # minutes without a checkpoint after which one is written within the epoch
KEEP_CHECKPOINTS: Count = 2  # how many of the newest checkpoints to keep
REPLICA_CHECK_STEPS: Count = 1000  # steps between checks that the processes' shared parameters are equal
EXPLOSION_FACTOR: Positive = 10.0  # a main loss above this many times its running mean stops the run
WANDB: Literal["auto", "online", "offline", "off"] = "auto"  # W&B; auto: online with an API key, else offline

_STAGE = "sae_training.py"
_BATCHES_STAGE = "sae_preprocessing.py"
_NOT_IN_THE_RESULT = [  # options that may change when a run is continued
    *("data_dir", "model_save_path", "checkpoint_dir", "b_pre_path", "latent_parallel", "micro_batch_size", "wandb"),
    *("logs_per_epoch", "checkpoints_per_epoch", "checkpoint_minutes", "keep_checkpoints", "replica_check_steps"),
    "explosion_factor",
]
_SINCE = {"gate": "topk", "matryoshka": None, "normalization": "layer_norm", "target_data_dir": None, "skip": False}
_SAMPLE = 2**15  # activations from which BatchTopK's threshold is taken, and whose lengths are compared
_OUTLIERS = 3.0  # root mean square over median length
_NO_VARIANCE = 1e-9  # share of the mean square; anything less is rounding
_SMALL_LOSS = 1e-3  # share of the variance; a loss that stays below it is no explosion, however small it was before
_LOSS_MEMORY = 0.98  # decay of the loss's running mean: about 50 steps

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoencoder.checkpoints import Slice, checkpoint_files, delete_checkpoints, load_checkpoint, whole_checkpoints
from autoencoder.curves import WandbMode, plot_curves, plot_frequencies, start_wandb
from autoencoder.step import Agreed, Pending, Step, StepOptions
from pipeline.activation_batches import Batches, Reader, open_rows
from pipeline.distributed import make_grid, noted_signals, world
from pipeline.errors import InputError, Stop
from pipeline.files import locked, require_disk, require_writable
from pipeline.manifests import (
    MANIFEST,
    begin_or_continue,
    check_files,
    git_commit,
    read_manifest,
    verifying,
    write_manifest,
)
from pipeline.progress import gb, progress_bar
from pipeline.sae_files import SaeFiles
from pipeline.source import Source
from pipeline.statistics import ActivationStatistics, read_statistics
from sae import Kind, Normalization, SparseAutoencoder, load_sae_model, rows_at_once, save_sae, save_tensors


class RunOptions(NamedTuple):
    """The options of a run by name, except those of its step (autoencoder.step.StepOptions)."""

    data_dir: str
    model_save_path: str
    checkpoint_dir: str
    n_latents: int
    k: int
    gate: str
    matryoshka: tuple[int, ...] | None
    normalization: Normalization
    target_data_dir: str | None
    skip: bool
    num_epochs: int
    early_stop_epochs: int | None
    learning_rate: float
    learning_rate_min_ratio: float
    warmup_steps: int
    latent_parallel: int
    logs_per_epoch: int
    checkpoints_per_epoch: int
    checkpoint_minutes: float
    keep_checkpoints: int
    replica_check_steps: int
    explosion_factor: float


# ---- inputs


class Data(NamedTuple):
    """What sae_preprocessing.py wrote to DATA_DIR, and for a transcoder to TARGET_DATA_DIR."""

    manifest: dict[str, Any]
    b_pre: Tensor  # (d_model), the mean of what is reconstructed, normalised
    variance: float  # of what is reconstructed, normalised, per coordinate
    kind: Kind  # of the SAE that these data and the options make
    target: dict[str, Any] | None = None  # the manifest of TARGET_DATA_DIR


def all_shards(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return manifest["shards"] + manifest["validation_shards"]


def open_data(
    data_dir: str,
    b_pre_path: str | None,
    gate: str = "topk",
    normalization: Normalization = "layer_norm",
    target_dir: str | None = None,
    skip: bool = False,
) -> Data:
    """Raises InputError for data that cannot be trained on, or that do not belong together."""
    manifest = read_manifest(data_dir, _BATCHES_STAGE)
    check_files(data_dir, all_shards(manifest), _BATCHES_STAGE)
    target = open_target(target_dir, data_dir, manifest) if target_dir else None
    if skip and target is None:
        raise InputError("--skip is for a transcoder; name the batches of the site it writes with --target_data_dir.")

    read = statistics_of(data_dir, manifest, None if target else b_pre_path)
    written = statistics_of(target_dir, target, b_pre_path) if target_dir and target else read  # what is reconstructed
    kind = Kind(  # while it trains; `finish` folds the scale of normalization none into the weights
        gate="jumprelu" if gate == "batch_topk" else "topk",
        normalization="layer_norm" if normalization == "layer_norm" else "scale",
        scale=1.0 if normalization == "layer_norm" else unit_scale(read),
        centred=target is None,
        target_site=target["site"] if target else None,
        target_scale=unit_scale(written) if target else 1.0,
        skip=skip,
    )
    if target is None and kind.normalization == "layer_norm":
        b_pre, mean, var = written.b_pre, written.mean_normalized, written.var_normalized
    else:
        factor = kind.target_scale if target else kind.scale
        mean, var = written.mean_raw * factor, written.var_raw * factor**2
        b_pre = mean
    if float(var.mean()) <= _NO_VARIANCE * float(mean.square().mean()):
        raise InputError(
            f"All {written.count:,} activations to train on in {target_dir or data_dir} are alike once normalised: "
            "there is nothing to learn; capture other sentences, or another site."
        )
    return Data(manifest, b_pre.float(), float(var.mean()), kind, target)


def statistics_of(folder: str, manifest: dict[str, Any], path: str | None) -> ActivationStatistics:
    """Those at `path` if given, else the folder's own."""
    return read_statistics(Path(path or Path(folder) / manifest["statistics"]))


def unit_scale(statistics: ActivationStatistics) -> float:
    """The factor that makes the mean squared length of activations d_model."""
    square = float((statistics.mean_raw.square() + statistics.var_raw).mean())
    return square**-0.5 if square > 0 else 1.0


def open_target(target_dir: str, data_dir: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a transcoder's target. Raises InputError unless its rows are of the same tokens as data_dir's."""
    target = read_manifest(target_dir, _BATCHES_STAGE)
    check_files(target_dir, all_shards(target), _BATCHES_STAGE)
    if manifest.get("order") is None or manifest.get("order") != target.get("order"):
        raise InputError(
            f"{target_dir} and {data_dir} do not hold the same tokens in the same order; capture both sites in one run "
            "and run sae_preprocessing.py on each with the same options."
        )
    if target["site"] == manifest["site"]:
        raise InputError(f"{target_dir} and {data_dir} are both of {target['site']}; name another site's batches.")
    return target


def check_options(options: RunOptions, batch_size: int, manifest: dict[str, Any], n_processes: int) -> None:
    """Raise InputError for options that do not fit one another, the data or the number of processes."""
    nested = [*(options.matryoshka or ()), options.n_latents]
    if any(smaller >= larger for smaller, larger in itertools.pairwise(nested)):
        raise InputError(
            f"--matryoshka {' '.join(map(str, nested[:-1]))} must ascend and stay below --n_latents "
            f"{options.n_latents}; correct it."
        )
    width, data_dir = options.latent_parallel, options.data_dir
    if n_processes % width or options.n_latents % width:
        raise InputError(
            f"--latent_parallel {width} must divide the {n_processes} processes and --n_latents {options.n_latents}; "
            "choose another."
        )
    if batch_size % manifest["batch_size"] or batch_size % n_processes:
        raise InputError(
            f"--batch_size {batch_size} must be a multiple of the stored batches of {manifest['batch_size']} in "
            f"{data_dir} and of the {n_processes} processes that divide it; choose another."
        )
    if batch_size > manifest["counts"]["train"]:
        raise InputError(
            f"{data_dir} has {manifest['counts']['train']} activations to train on, fewer than --batch_size "
            f"{batch_size}; capture more or lower it."
        )
    if options.early_stop_epochs and not manifest["validation_shards"]:
        raise InputError(f"{data_dir} has no held-out activations for --early_stop_epochs; leave that option out.")


def slices_by_default(n_latents: int, n_processes: int) -> int:
    """How many processes share one SAE: the GPUs of a node, of which more send less (docs/scaling.md); 1 on CPUs."""
    if not torch.cuda.is_available():
        return 1
    return math.gcd(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), n_processes, n_latents)


def empty_sae(options: RunOptions, data: Data) -> SparseAutoencoder:
    """The whole SAE, its weights uninitialised. Raises InputError for an impossible k or size."""
    d_model, eps = data.manifest["d_model"], data.manifest["normalize_eps"]
    try:
        return SparseAutoencoder(d_model, options.n_latents, options.k, eps, kind=data.kind)
    except ValueError as error:
        raise InputError(f"{error}; correct --k or --n_latents.") from None
    except RuntimeError as error:  # how torch reports a lack of memory
        raise InputError(
            f"--n_latents {options.n_latents} does not fit in memory ({str(error).partition(chr(10))[0]}); give fewer."
        ) from None


def starting_sae(
    options: RunOptions, data: Data, load_path: str | None, seed: int, orthogonal: bool
) -> SparseAutoencoder:
    """The whole SAE as training begins; uninitialised if there is a checkpoint to load weights from."""
    sae = empty_sae(options, data)
    if whole_checkpoints(Path(options.checkpoint_dir)):
        return sae
    if not load_path:
        sae.initialize(data.b_pre, torch.Generator().manual_seed(seed), orthogonal)
        return sae
    eps = {"normalize_eps": sae.normalize_eps} if sae.kind.normalization == "layer_norm" else {}
    loaded = load_sae_model(load_path, k=sae.k, **eps)
    if "layer_norm" not in (loaded.kind.normalization, sae.kind.normalization):
        loaded = loaded.rescaled("scale", sae.kind.scale, sae.kind.target_scale)
    if loaded.kind != sae.kind:
        raise InputError(
            f"{load_path} is {loaded.kind.not_default or 'of the published kind'}, but this run trains "
            f"{sae.kind.not_default or 'the published kind'}; load another or change the options."
        )
    if (loaded.d_model, loaded.n_latents) != (sae.d_model, sae.n_latents):
        raise InputError(
            f"{load_path} has d_model {loaded.d_model} and {loaded.n_latents} latents, but this run has {sae.d_model} "
            f"and {sae.n_latents}; load another or change --n_latents."
        )
    return loaded.requires_grad_(True)


# ---- training


class Validation(NamedTuple):
    val_main: float  # mean squared error, normalised space
    val_aux: float  # mean squared error of the auxiliary reconstruction by the currently dead latents
    val_total: float  # the loss
    val_fvu: float  # fraction of variance unexplained
    val_l0: float  # kept values above zero per activation


def learning_rate(step: int, n_steps: int, peak: float, min_ratio: float, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine from the peak to peak * min_ratio at the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, n_steps - 1 - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * done)) / 2)


def stops_early(val_fvus: list[float], patience: int | None) -> bool:
    """Whether the best validation FVU is `patience` or more epochs old."""
    return bool(patience and val_fvus) and len(val_fvus) - 1 - val_fvus.index(min(val_fvus)) >= (patience or 0)


@dataclasses.dataclass
class TrainingProgress:
    """How far a run has come; saved in checkpoints. There is no random state: the seed fixes the order of the data."""

    step: int = 0
    seconds: float = 0.0  # of training, without validation and checkpoints
    waited: float = 0.0  # of these, the seconds spent waiting for data
    mean_loss: float | None = None  # running mean of the main loss
    counting_since: int = 0  # the step at which the counter `firing` was last reset
    metrics: list[str] = dataclasses.field(default_factory=list)  # lines of metrics.jsonl
    val_fvus: list[float] = dataclasses.field(default_factory=list)  # one per epoch
    wandb_id: str | None = None


class Training:
    """A run: its step, its data, its progress, and the files it writes."""

    def __init__(self, options: RunOptions, step: Step, batches: Batches, data: Data, targets: Batches | None = None):
        """targets: of a transcoder, the rows to reconstruct."""
        self.options, self.step, self.data = options, step, data
        self.batches, self.targets = batches, targets
        self.world = step.world
        self.batch_size = step.options.batch_size
        self.folder = Path(options.checkpoint_dir)
        self.metrics_path, self.curves_path, self.frequencies_path = (
            SaeFiles(options.model_save_path).beside(name)
            for name in ("metrics.jsonl", "curves.png", "frequencies.png")
        )
        self.progress = TrainingProgress()
        self.n_steps = batches.steps_per_epoch * options.num_epochs
        self.checkpoint_every = math.ceil(batches.steps_per_epoch / options.checkpoints_per_epoch)
        self.saved_at = time.monotonic()  # when the last checkpoint was written, or the run started

    @property
    def rows_at_once(self) -> int:
        """Activations per forward pass of this process."""
        share = self.batch_size // self.step.data.size
        return min(self.step.options.micro_batch_size or share, share)

    def epoch_ends(self) -> bool:
        return self.progress.step % self.batches.steps_per_epoch == 0

    def checkpoint_due(self) -> bool:
        return self.progress.step % self.batches.steps_per_epoch % self.checkpoint_every == 0

    def checkpoint_overdue(self) -> bool:
        """By this process's clock; in `Step.agree` that of the main one decides for all."""
        return time.monotonic() - self.saved_at >= 60 * self.options.checkpoint_minutes

    def goes_on(self) -> bool:
        early = stops_early(self.progress.val_fvus, self.options.early_stop_epochs)
        return self.progress.step < self.n_steps and not early

    def check_loss(self, agreed: Agreed) -> None:
        """Raise Stop before a bad step changes anything."""
        progress, mean = self.progress, self.progress.mean_loss
        exploded = mean is not None and agreed.main > max(
            self.options.explosion_factor * mean,
            _SMALL_LOSS * self.data.variance,
        )
        if math.isfinite(agreed.main + agreed.aux) and not exploded:
            return
        loss = f"{agreed.main + agreed.aux}"
        if exploded:
            factor = self.options.explosion_factor
            loss = f"{agreed.main:.4g}, more than {factor:g} times its running mean {mean:.4g},"
        rows = self.batches.stored_batches(*divmod(progress.step, self.batches.steps_per_epoch))
        shards = sorted({self.batches.names[shard] for shard, _ in rows})
        good = whole_checkpoints(self.folder)
        raise Stop(
            f"The loss is {loss} at step {progress.step + 1} (activations of {', '.join(shards)} in "
            f"{self.options.data_dir}); the last good checkpoint is {good[-1][0] if good else 'none'}: look at these "
            "activations, or start over in another --checkpoint_dir with a lower --learning_rate or a --grad_clip."
        )

    def apply(self, pending: Pending, agreed: Agreed) -> float:
        """Take the step. Returns its learning rate."""
        options, progress = self.options, self.progress
        rate = learning_rate(
            progress.step, self.n_steps, options.learning_rate, options.learning_rate_min_ratio, options.warmup_steps
        )
        if self.checkpoint_due():  # the previous step ended with a checkpoint: start counting again
            self.step.firing.zero_()
            progress.counting_since = progress.step
        self.step.apply(pending, agreed, rate, progress.step)
        mean = agreed.main if progress.mean_loss is None else progress.mean_loss
        progress.mean_loss = _LOSS_MEMORY * mean + (1 - _LOSS_MEMORY) * agreed.main
        progress.step += 1
        return rate

    # ---- validation and metrics

    def validate(self) -> Validation | None:
        """Measure the SAE on all held-out activations, divided among the data ranks; None if there are none or they
        are all alike."""
        step, device = self.step, self.world.device
        d = step.sae.d_model
        n_rows = step.options.micro_batch_size or self.batch_size // step.data.size
        # Sums of z, z^2 and both squared errors, and the count; firings apart, because each slice has only its own.
        sums, l0 = (torch.zeros(n, dtype=torch.float64, device=device) for n in (2 * d + 3, 1))
        dead, chunk = step.dead(), 0
        with torch.no_grad():
            for record in self.data.manifest["validation_shards"]:
                path = Path(self.options.data_dir) / record["file"]
                rows_of = lambda path: torch.from_numpy(open_rows(path)).view(torch.bfloat16).split(n_rows)
                target_dir = self.options.target_data_dir
                targets = rows_of(Path(target_dir) / record["file"]) if target_dir else ()
                for rows, target in itertools.zip_longest(rows_of(path), targets):
                    chunk += 1
                    if chunk % step.data.size != step.data.rank:
                        continue
                    z = step.normalize(rows.to(device))
                    y = None if target is None else step.normalize_target(target.to(device))
                    parts = step.losses(z, dead, torch.float32, y)
                    l0 += parts.fired.sum()
                    z = (z if y is None else y).double()
                    counted = torch.stack([parts.whole, parts.aux, z.new_tensor(len(z))])
                    sums += torch.cat([z.sum(0), z.square().sum(0), counted])
        step.data.all_reduce(sums)
        self.world.all_reduce(l0)
        total, squares, (main, aux, count) = sums[:d], sums[d : 2 * d], sums[2 * d :].tolist()
        if count == 0:
            return None
        variance = float((squares - total.square() / count).sum())
        if variance <= _NO_VARIANCE * float(squares.sum()):
            return None
        loss = (main + step.options.aux_loss_coeff * aux) / (count * d)
        return Validation(main / (count * d), aux / (count * d), loss, main / variance, float(l0) / count)

    def set_threshold(self) -> None:
        """After BatchTopK: one threshold for all latents, with which an activation keeps k of them on average.

        That is the least pre-activation that BatchTopK keeps of a large batch. The batch is of held-out activations,
        where there are some: an SAE that has seen its activations several times fires less on them than on others.
        All processes must call this.
        """
        step, world = self.step, self.world
        if step.sae.threshold is None:
            return
        record = (self.data.manifest["validation_shards"] or self.data.manifest["shards"])[0]
        rows = open_rows(Path(self.options.data_dir) / record["file"])[:_SAMPLE]
        share = -(-len(rows) // world.size)
        own = rows[np.arange(world.rank * share, (world.rank + 1) * share) % len(rows)]
        step.sae.threshold.fill_(step.least_kept(torch.from_numpy(own).view(torch.bfloat16).to(world.device)))

    def measure(self, agreed: Agreed, rate: float, since: TrainingProgress) -> dict[str, float]:
        """A line of metrics.jsonl, with validation at the end of an epoch. since: progress at the previous line."""
        progress = self.progress
        seconds = progress.seconds - since.seconds
        values = {
            "train_main": agreed.main,
            "train_aux": agreed.aux,
            "train_total": agreed.main + self.step.options.aux_loss_coeff * agreed.aux,
            "train_fvu": agreed.main / self.data.variance,
            "dead_frac": sum(agreed.n_dead) / self.options.n_latents,
            "longest_silence_tokens": agreed.longest_silence,
            "learning_rate": rate,
            "acts_per_s": (progress.step - since.step) * self.batch_size / seconds,
            "data_wait_frac": (progress.waited - since.waited) / seconds,
        }
        if self.epoch_ends():
            self.set_threshold()
        if self.epoch_ends() and (quality := self.validate()):
            values |= quality._asdict()
            progress.val_fvus.append(quality.val_fvu)
        return values

    def log(self, values: dict[str, float]) -> None:
        step = self.progress.step
        line = json.dumps({"step": step, "tokens": step * self.batch_size, **values})
        self.progress.metrics.append(line)
        if self.world.is_main:
            try:
                with open(self.metrics_path, "a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:
                raise Stop(
                    f"Could not write {self.metrics_path} ({error}); free some disk and run again to continue."
                ) from error

    def draw(self, firing: Tensor) -> None:
        """firing: the counters of all slices."""
        plot_curves(self.progress.metrics, self.curves_path)
        n_activations = (self.progress.step - self.progress.counting_since) * self.batch_size
        plot_frequencies(firing, n_activations, self.frequencies_path)

    # ---- checkpoints

    def save(self, whoever_comes_first: bool = False) -> None:
        """Write this process's slice, without waiting for other processes. Of those that hold the same slice, the main
        one writes; with whoever_comes_first, since that one may be gone, the first to get here does."""
        step = self.step
        path = Slice(self.progress.step, step.slices.rank, step.slices.size).path(self.folder)
        if self.progress.step == 0 or path.exists():
            return
        if whoever_comes_first:
            try:
                path.with_name(f".{path.name}.claimed.tmp").touch(exist_ok=False)
            except FileExistsError:
                return
        elif not step.data.is_main:
            return
        if not all(p.isfinite().all() for p in step.parameters.values()):
            raise Stop(
                f"The weights are not finite after step {self.progress.step}, so no checkpoint was written; start over "
                "in another --checkpoint_dir with a lower --learning_rate or a --grad_clip."
            )
        save_tensors(path, {"progress": dataclasses.asdict(self.progress), **step.state()})

    @contextlib.contextmanager
    def saved_when_left_alone(self) -> Iterator[None]:
        """Wrap code that waits for other processes and changes nothing: if one of them is gone, save the state."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise Stop(
                f"{self.world.device} has too little memory for {self.rows_at_once} activations at a time; give a "
                "smaller --micro_batch_size, or a larger --latent_parallel."
            ) from error
        except RuntimeError:
            if self.world.size > 1:
                self.save(whoever_comes_first=True)
            raise

    def check_data(self, verified: Callable[[], None]) -> None:
        """Raise InputError on every process if any of them found an altered shard."""
        found = None
        try:
            verified()
        except InputError as error:
            found = str(error)
        for message in self.world.gather(found):
            if message:
                raise InputError(message)

    def check_replicas(self) -> None:
        """Compare checksums of what the processes should hold in common. Raises Stop if they differ."""
        if self.world.size == 1:
            return
        step, width = self.step, self.step.slices.size
        own = [int(p.detach().view(torch.int32).sum()) for p in step.parameters.values()]
        own.append(int(step.silent_tokens.sum()))
        every, n = self.world.gather(own), step.n_shared
        wrong = [rank for rank, sums in enumerate(every) if sums != every[rank % width] or sums[:n] != every[0][:n]]
        if wrong:
            others = "rank 0" if width == 1 else f"ranks 0 to {width - 1}"
            raise Stop(
                f"The parameters of rank {', '.join(map(str, wrong))} differ at step {self.progress.step} from "
                f"those of {others}, which should be the same; look for a faulty device, and run the same command "
                "again to continue from the last checkpoint."
            )

    def checkpoint(self, verified: Callable[[], None]) -> None:
        """Check, write the checkpoint of an epoch (or part), draw the figures. All processes must call this."""
        self.check_data(verified)
        firing = self.write_checkpoint()
        if self.world.is_main and self.goes_on():  # otherwise `finish` draws them
            self.draw(torch.cat([part for part in firing if part is not None]))

    def write_checkpoint(self) -> list[Tensor | None]:
        """Write a checkpoint, delete older ones. All processes must call this.

        Alone, for one between two epochs' checkpoints, it does not wait for the shards' checksums, as on a signal, nor
        is the counter `firing` reset: when it happens must not show in what the run writes in the end. Returns each
        process's part of that counter.
        """
        self.check_replicas()
        self.save()
        # gather doubles as a barrier: all have written.
        firing = self.world.gather(self.step.firing.cpu() if self.step.data.is_main else None)
        if self.world.is_main:
            delete_checkpoints(self.folder, self.options.keep_checkpoints)
        self.saved_at = time.monotonic()
        return firing

    def resume(self) -> None:
        """Continue from the newest complete checkpoint, if any, and cut metrics.jsonl back to it."""
        if self.world.is_main:
            delete_checkpoints(self.folder, self.options.keep_checkpoints)  # incomplete ones too
        found = self.world.gather(whole_checkpoints(self.folder))[0]
        if found:
            state = load_checkpoint(found[-1], self.step.slices.rank, self.step.slices.size)
            self.progress = TrainingProgress(**state["progress"])
            self.step.load(state)
            self.world.print(f"Continuing from step {self.progress.step} ({found[-1][0]}).")
        if self.world.is_main:
            self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
            self.metrics_path.write_text("".join(line + "\n" for line in self.progress.metrics), encoding="utf-8")


def train(training: Training, verified: Callable[[], None], report: Callable[[dict[str, float], int], None]) -> int:
    """Train to the end and return 0; on a signal, save the last finished step and return the signal's number.

    verified: waits for the shards' checksums, may raise InputError. report: called with each line's values and step.
    """
    options, step, progress, batches = training.options, training.step, training.progress, training.batches
    log_every = max(1, batches.steps_per_epoch // options.logs_per_epoch)
    place = range(progress.step, training.n_steps), step.world.rank, step.world.size, step.world.device
    with (
        noted_signals() as stop_signal,
        Reader(batches, *place) as reader,
        Reader(training.targets, *place) if training.targets else contextlib.nullcontext() as target_reader,
        progress_bar(
            total=training.n_steps * training.batch_size,
            initial=progress.step * training.batch_size,
            unit="act",
            unit_scale=True,
            desc="SAE",
            disable=not step.world.is_main,
        ) as bar,
    ):
        logged = dataclasses.replace(progress)
        while training.goes_on():
            started = time.perf_counter()
            x, waited = reader.next()
            y, waited_for_y = target_reader.next() if target_reader else (None, 0.0)
            with training.saved_when_left_alone():
                pending = step.gradients(x, y)
                agreed = step.agree(pending, stop_signal.number, training.checkpoint_overdue())
            if agreed.stop:
                training.save()
                return stop_signal.number or signal.SIGTERM
            training.check_loss(agreed)
            rate = training.apply(pending, agreed)
            progress.seconds += time.perf_counter() - started
            progress.waited += waited + waited_for_y
            bar.update(training.batch_size)

            if progress.step % log_every == 0 or training.checkpoint_due():
                values = training.measure(agreed, rate, logged)
                training.log(values)
                report(values, progress.step)
                logged = dataclasses.replace(progress)
                state = "loss {train_total:.4f}, FVU {train_fvu:.3f}, dead {dead_frac:.1%}".format(**values)
                bar.set_postfix_str(state, refresh=False)
            with training.saved_when_left_alone():
                if training.checkpoint_due():
                    training.checkpoint(verified)
                elif agreed.save:
                    training.write_checkpoint()
                elif progress.step % options.replica_check_steps == 0:
                    training.check_replicas()
    return 0


# ---- main


def longest_over_typical(options: RunOptions, batches: Batches) -> float:
    """Root mean square over median of the length of activations, those read or those written, whichever is larger."""
    folders = filter(None, (options.data_dir, options.target_data_dir))
    ratios = []
    for folder in folders:
        rows = torch.from_numpy(open_rows(Path(folder) / batches.names[0])[:_SAMPLE]).view(torch.bfloat16)
        lengths = rows.float().norm(dim=1)
        ratios.append(float(lengths.square().mean().sqrt() / lengths.median().clamp(min=1e-30)))
    return max(ratios)


def announce(training: Training) -> None:
    """Print what will be read, written, held in memory and sent. Raises Stop if the disk is too small."""
    options, step, manifest = training.options, training.step, training.data.manifest
    d_model, kind = manifest["d_model"], training.data.kind
    what = ("Matryoshka, " if options.matryoshka else "") + kind.in_words.replace("JumpReLU", "BatchTopK")
    to = f" and of {kind.target_site} from {options.target_data_dir}" if kind.target_site else ""
    sae_bytes = 4 * (2 * options.n_latents * d_model + options.n_latents + d_model + options.skip * d_model**2)
    present = sum(path.stat().st_size for path in checkpoint_files(training.folder))
    require_disk(training.folder, 3 * sae_bytes * (options.keep_checkpoints + 1) + sae_bytes - present)
    n_slice, n_rows = step.sae.n_latents, training.rows_at_once
    block = 4 * n_slice * min(n_rows, rows_at_once(4 * n_slice, step.world.device))
    # Weights, two moments, gradients; with micro-batches also one micro-batch's gradients.
    copies = 4 if n_rows == training.batch_size // step.data.size else 5
    memory = copies * sae_bytes // step.slices.size + block + n_rows * (24 * d_model + 80 * min(options.k, n_slice))
    print(
        f"{what}: reading {manifest['counts']['train']:,} activations of {manifest['site']} from "
        f"{options.data_dir}{to}; "
        f"writing {options.model_save_path} ({gb(sae_bytes)}) and checkpoints ({gb(3 * sae_bytes)} each) to "
        f"{training.folder}; {training.n_steps:,} steps of {training.batch_size} on {step.world.size} x "
        f"{step.world.device.type}, about {gb(memory)} of memory each for the weights, their gradients and moments, "
        f"and {n_rows} activations.",
        flush=True,
    )
    if options.warmup_steps >= training.n_steps:
        print(
            f"Note: --warmup_steps {options.warmup_steps:,} is at least the run's {training.n_steps:,} steps: the "
            f"run ends while the learning rate is still rising to {options.learning_rate:g}.",
            flush=True,
        )
    if kind.normalization != "layer_norm" and (ratio := longest_over_typical(options, training.batches)) > _OUTLIERS:
        print(
            f"Note: without a normalisation by activation the few longest activations decide what is learned: their "
            f"root mean square length is {ratio:.0f} times the median. Of sentences it is usually the first token: "
            "capture them with --begin_of_text.",
            flush=True,
        )
    if step.options.dead_after_tokens <= training.batch_size:
        print(
            f"Note: --dead_after_tokens {step.options.dead_after_tokens:,} is no more than a step's "
            f"{training.batch_size:,} activations: a latent counts as dead after one silent step.",
            flush=True,
        )
    if step.world.size > 1:
        data, latents = map(gb, step.bytes_sent())
        print(
            f"Per step, each process sends {data} of gradients and {latents} between slices of the latents.", flush=True
        )


def train_until_stopped(training: Training, wandb_mode: WandbMode, config: dict[str, Any]) -> None:
    """Train to the end, logging to W&B if it is on. After a signal the process exits here."""
    everyone, progress = training.world, training.progress
    wandb_run = start_wandb(wandb_mode, training.folder, config, progress.wandb_id) if everyone.is_main else None
    progress.wandb_id = everyone.gather(wandb_run.id if wandb_run else progress.wandb_id)[0]

    def report(values: dict[str, float], step: int) -> None:
        if wandb_run:
            wandb_run.log(values, step=step)

    folders = [(training.options.data_dir, training.data.manifest)]
    if training.options.target_data_dir and training.data.target:
        folders.append((training.options.target_data_dir, training.data.target))
    with contextlib.ExitStack() as stack:
        waits = [
            stack.enter_context(verifying(folder, all_shards(its)[everyone.rank :: everyone.size], _BATCHES_STAGE))
            for folder, its in folders
        ]

        def verified() -> None:
            for wait in waits:
                wait()

        number = train(training, verified, report)
    if wandb_run:
        wandb_run.finish(exit_code=1 if number else 0)
    if number:
        if everyone.is_main:
            print(
                f"\nStopped by {signal.Signals(number).name} after step {progress.step}, which is saved; run the same "
                "command again to continue.",
                file=sys.stderr,
                flush=True,
            )
        exit_at_once(128 + number)


def finish(training: Training, config: dict[str, Any], decides: dict[str, Any]) -> None:
    """Write the SAE, its JSON and figures from the last checkpoint."""
    options, progress, manifest = training.options, training.progress, training.data.manifest
    state = load_checkpoint(whole_checkpoints(training.folder)[-1], 0, 1)
    sae = empty_sae(options, training.data)
    sae.load_state_dict(state["sae"])
    if options.normalization == "none":
        sae = sae.rescaled("none")
    training.draw(state["counters"]["firing"])
    last, tokens = json.loads(progress.metrics[-1]), progress.step * training.batch_size
    quality = {name: last.get(name) for name in (*Validation._fields, "dead_frac")}
    cost = {"tokens": tokens, "seconds": progress.seconds, "acts_per_s": tokens / progress.seconds}
    source = Source.read(manifest, Path(options.data_dir) / MANIFEST)
    if "activations_dir" not in source.folders:  # batches of an older version
        source = source.with_folder("activations_dir", manifest["input_dir"])
    info = {
        **source.as_json(SaeFiles(options.model_save_path).json),
        "first_validation_sentence": manifest["first_validation_sentence"],
        "normalization": sae.kind.normalization,
        **({"matryoshka": list(options.matryoshka)} if options.matryoshka else {}),
        "tokens_trained": tokens,
        "quality": quality | cost,
        "config": config,
        "git_commit": git_commit(),
    }
    save_sae(sae, options.model_save_path, info)
    write_manifest(training.folder, _STAGE, complete=True, decides=decides, config=config)
    held_out = "val_fvu" in last and f"FVU {last['val_fvu']:.4f}, L0 {last['val_l0']:.1f} on held-out activations, "
    print(
        f"{held_out or ''}{last['dead_frac']:.1%} dead latents; {cost['acts_per_s']:,.0f} activations/s, "
        f"{progress.waited / progress.seconds:.1%} of the time waiting for data: {options.model_save_path}",
        flush=True,
    )


_T = TypeVar("_T", RunOptions, StepOptions)


def options_of(kind: type[_T], config: dict[str, Any]) -> _T:
    return kind(**{name: config[name] for name in kind._fields})


def main() -> None:
    config = vars(parse_constants(globals()))
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    config["latent_parallel"] = config["latent_parallel"] or slices_by_default(config["n_latents"], n_processes)
    options, step_options = options_of(RunOptions, config), options_of(StepOptions, config)
    kind = options.gate, options.normalization, options.target_data_dir, options.skip
    data = open_data(options.data_dir, config["b_pre_path"], *kind)
    check_options(options, step_options.batch_size, data.manifest, n_processes)
    if int(os.environ.get("RANK", 0)) == 0:
        require_writable(options.model_save_path, SaeFiles(options.model_save_path).json)
    torch.backends.cuda.matmul.allow_tf32 = config["allow_tf32"]
    decides = {name: value for name, value in config.items() if name not in _NOT_IN_THE_RESULT}
    # None, so that runs begun before these options existed can continue.
    decides |= {name: None for name, default in _SINCE.items() if decides[name] == default}
    decides["batches"] = [shard["sha256"] for shard in data.manifest["shards"]]
    if data.target:
        decides |= {"target_data_dir": None, "targets": [shard["sha256"] for shard in data.target["shards"]]}
    sae = starting_sae(options, data, config["model_load_path"], config["seed"], config["orthogonal_start"])

    folder = Path(options.checkpoint_dir)
    with world() as everyone, locked(folder, everyone.rank, everyone.barrier):
        done = begin_or_continue(folder, _STAGE, decides) if everyone.is_main else False
        if everyone.gather(done)[0] and Path(options.model_save_path).exists():
            everyone.print(f"{options.model_save_path} is already complete.")
            return
        step = Step(sae, step_options, make_grid(everyone, options.latent_parallel))
        order = step_options.batch_size, config["seed"]
        batches = Batches(options.data_dir, data.manifest, *order)
        to = options.target_data_dir
        targets = Batches(to, data.target, *order) if to and data.target else None
        training = Training(options, step, batches, data, targets)
        if everyone.is_main:
            announce(training)
        training.resume()
        if training.goes_on():
            train_until_stopped(training, config["wandb"], config)
        if everyone.is_main:
            finish(training, config, decides)


if __name__ == "__main__":
    run(main)
