"""Train a sparse autoencoder, or a transcoder, on shuffled batches of activations; or several, as a model makes them.

Reads   DATA_DIR (sae_preprocessing.py); for a transcoder also TARGET_DATA_DIR, the same tokens at another site.
        With --stream MODEL instead the sentences in SENTENCES_DIR: no activation is on disk
Writes  MODEL_SAVE_PATH: the SAE NAME.pth with NAME.json, NAME.metrics.jsonl, NAME.curves.png and NAME.frequencies.png
        beside it; CHECKPOINT_DIR: checkpoints to resume from (several nodes must all see it). Of several SAEs each has
        a folder: FOLDER/SITE/NAME.pth, CHECKPOINT_DIR/SITE
Method  Gao et al. 2024, arXiv:2406.04093; docs/method.md; departures from the original: docs/differences.md.
        GATE batch_topk: Bussmann et al. 2024, arXiv:2412.06410. MATRYOSHKA: Bussmann et al. 2025, arXiv:2503.17547.
        Transcoders: Dunefsky et al. 2024, arXiv:2406.11944, with SKIP Paulo et al. 2025, arXiv:2501.18823.
        The processes form a grid: LATENT_PARALLEL neighbours share one SAE, each holding a slice of its latents, and
        see the same activations; the groups of neighbours divide the batch. The step (autoencoder/step.py) does all
        its communication before it changes anything, so a process that is stopped, or on CPUs left alone, can still
        save the previous step. A stream (pipeline/activation_stream.py): the model fills a buffer, which is shuffled
        and used up; all SITES from one pass of the model
Cost    disk: a checkpoint is three times the size of the SAE; rates in docs/benchmarks.md; many GPUs: docs/scaling.md

    python sae_training.py --data_dir data/batches --model_save_path data/sae.pth
    torchrun --standalone --nproc_per_node=8 sae_training.py --data_dir data/batches --model_save_path data/sae.pth
    python sae_training.py --stream models/smollm2-135M-Instruct-Q4_1 --num_epochs 1 \\
        --sites layers.10.resid_post layers.15.ffn_norm:layers.15.mlp_out --model_save_path data/saes/sae.pth
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

DATA_DIR: str | None = None  # shuffled batches; data/batches when not given
B_PRE_PATH: str | None = None  # statistics file with the initial b_pre; DATA_DIR's own when not given
MODEL_SAVE_PATH = "data/sae.pth"  # where to write the trained SAE
MODEL_LOAD_PATH: str | None = None  # an SAE to start from instead of a fresh one
CHECKPOINT_DIR = "data/checkpoints"  # folder for checkpoints

STREAM: str | None = None  # a Llama folder: train on activations as this model makes them, in place of DATA_DIR
SITES: tuple[str, ...] = ("layers.22.attention_norm",)  # of a stream: an SAE for each; READ:WRITE for a transcoder
BUFFER_SIZE: Count = 2_000_000  # of a stream: activations in the shuffle buffer, per site, over all processes
SENTENCES_DIR = "data/sentences"  # of a stream: folder of sentences
NUM_SAMPLES: CountOrZero = 25_000_000  # of a stream: sentences from the start of the seeded order; 0 for all
VALIDATION_FRACTION: ShareBelowOne = 0.05  # of a stream: share of the sentences held out, from the end of that order
MAX_TOKENS: Count = 192  # of a stream: longer sentences are cut to this length
BEGIN_OF_TEXT = False  # of a stream: put begin-of-text before each sentence (it is never trained on)
DTYPE: Literal["bfloat16", "float32"] = "bfloat16"  # of a stream: for the model's computation
BATCH_TOKENS: Count = 4096  # of a stream: tokens per forward pass of the model; a CPU is fastest at 1024
ROPE_SCALING_FACTOR: Positive | None = None  # of a stream: overrides the checkpoint's

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
_DATA_DIR = "data/batches"
_OF_FILES = ("data_dir", "target_data_dir", "b_pre_path", "model_load_path")  # options that contradict --stream
_OF_STREAMS = [  # options that mean nothing without it
    *("sites", "buffer_size", "sentences_dir", "num_samples", "validation_fraction", "max_tokens", "begin_of_text"),
    *("dtype", "batch_tokens", "rope_scaling_factor"),
]
_NOT_IN_THE_RESULT = [  # options that may change when a run is continued
    *(
        "data_dir",
        "stream",
        "sentences_dir",
        "model_save_path",
        "checkpoint_dir",
        "b_pre_path",
        "latent_parallel",
        "micro_batch_size",
        "wandb",
    ),
    *("logs_per_epoch", "checkpoints_per_epoch", "checkpoint_minutes", "keep_checkpoints", "replica_check_steps"),
    "explosion_factor",
]
_SINCE = {"gate": "topk", "matryoshka": None, "normalization": "layer_norm", "target_data_dir": None, "skip": False}
_SINCE |= {name: globals()[name.upper()] for name in _OF_STREAMS if name not in _NOT_IN_THE_RESULT}
_SAMPLE = 2**15  # activations from which BatchTopK's threshold is taken, and whose lengths are compared
_OUTLIERS = 3.0  # root mean square over median length
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from autoencoder.checkpoints import (
    Slice,
    checkpoint_files,
    delete_checkpoints,
    load_checkpoint,
    steps_of,
    whole_checkpoints,
)
from autoencoder.curves import WandbMode, plot_curves, plot_frequencies, start_wandb
from autoencoder.inputs import (
    NO_VARIANCE,
    Data,
    KindOptions,
    Place,
    StreamOptions,
    check_batches,
    check_stream,
    open_data,
    open_stream,
    start_stream,
)
from autoencoder.step import Agreed, Pending, Step, StepOptions
from pipeline.activation_batches import Rows, StoredRows
from pipeline.activation_stream import StreamedRows
from pipeline.distributed import make_grid, noted_signals, world
from pipeline.errors import InputError, Stop
from pipeline.files import locked, remove_leftovers, require_disk, require_writable
from pipeline.manifests import begin_or_continue, git_commit, write_manifest
from pipeline.progress import gb, progress_bar
from pipeline.sae_files import SaeFiles
from sae import Kind, SparseAutoencoder, load_sae_model, rows_at_once, save_sae, save_tensors


class RunOptions(NamedTuple):
    """The options of a run by name, except those of its step (autoencoder.step.StepOptions)."""

    model_save_path: str
    checkpoint_dir: str
    n_latents: int
    k: int
    matryoshka: tuple[int, ...] | None
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


# ---- options


def refuse_contradictions(config: dict[str, Any]) -> None:
    """Raise InputError for options of batches together with --stream, or of a stream without it."""
    if config["stream"]:
        if given := next((name for name in _OF_FILES if config[name]), None):
            raise InputError(f"--{given} and --stream contradict each other; leave one of them out.")
        return
    for name in _OF_STREAMS:
        if config[name] != globals()[name.upper()]:
            raise InputError(f"--{name} is for a stream; name its model with --stream, or leave --{name} out.")


def check_options(options: RunOptions, n_processes: int) -> None:
    """Raise InputError for options that do not fit one another or the number of processes."""
    nested = [*(options.matryoshka or ()), options.n_latents]
    if any(smaller >= larger for smaller, larger in itertools.pairwise(nested)):
        raise InputError(
            f"--matryoshka {' '.join(map(str, nested[:-1]))} must ascend and stay below --n_latents "
            f"{options.n_latents}; correct it."
        )
    width = options.latent_parallel
    if n_processes % width or options.n_latents % width:
        raise InputError(
            f"--latent_parallel {width} must divide the {n_processes} processes and --n_latents {options.n_latents}; "
            "choose another."
        )


def slices_by_default(n_latents: int, n_processes: int) -> int:
    """How many processes share one SAE: the GPUs of a node, of which more send less (docs/scaling.md); 1 on CPUs."""
    if not torch.cuda.is_available():
        return 1
    return math.gcd(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), n_processes, n_latents)


def empty_sae(options: RunOptions, d_model: int, eps: float, kind: Kind) -> SparseAutoencoder:
    """The whole SAE, its weights uninitialised. Raises InputError for an impossible k or size."""
    try:
        return SparseAutoencoder(d_model, options.n_latents, options.k, eps, kind=kind)
    except ValueError as error:
        raise InputError(f"{error}; correct --k or --n_latents.") from None
    except RuntimeError as error:  # how torch reports a lack of memory
        raise InputError(
            f"--n_latents {options.n_latents} does not fit in memory ({str(error).partition(chr(10))[0]}); give fewer."
        ) from None


def steps_to_continue_from(each_options: Sequence[RunOptions]) -> set[int]:
    """The steps of which every SAE has a checkpoint."""
    return set.intersection(*(steps_of(Path(options.checkpoint_dir)) for options in each_options))


def starting_sae(
    options: RunOptions, data: Data, load_path: str | None, seed: int, orthogonal: bool, continues: bool
) -> SparseAutoencoder:
    """The whole SAE as training begins; uninitialised if its weights come from a checkpoint."""
    sae = empty_sae(options, data.source.need("d_model"), data.normalize_eps, data.kind)
    if continues:
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
    """The training of one SAE: its step, its data, its progress, the files it writes. Several share their `rows`."""

    def __init__(self, options: RunOptions, step: Step, rows: StoredRows | StreamedRows, data: Data):
        self.options, self.step, self.rows, self.data = options, step, rows, data
        self.world = step.world
        self.batch_size = step.options.batch_size
        self.folder = Path(options.checkpoint_dir)
        self.metrics_path, self.curves_path, self.frequencies_path = (
            SaeFiles(options.model_save_path).beside(name)
            for name in ("metrics.jsonl", "curves.png", "frequencies.png")
        )
        self.progress = TrainingProgress()
        self.n_steps = rows.steps_per_epoch * options.num_epochs
        self.checkpoint_every = math.ceil(rows.steps_per_epoch / options.checkpoints_per_epoch)
        self.saved_at = time.monotonic()  # when the last checkpoint was written, or the run started

    @property
    def rows_at_once(self) -> int:
        """Activations per forward pass of this process."""
        share = self.batch_size // self.step.data.size
        return min(self.step.options.micro_batch_size or share, share)

    def own(self, found: Rows) -> tuple[Tensor, Tensor | None]:
        """What this SAE reads, and a transcoder's target."""
        target_site = self.data.place.target_site
        return found[self.data.place.site], None if target_site is None else found[target_site]

    def epoch_ends(self) -> bool:
        return self.progress.step % self.rows.steps_per_epoch == 0

    def checkpoint_due(self) -> bool:
        return self.progress.step % self.rows.steps_per_epoch % self.checkpoint_every == 0

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
        good = whole_checkpoints(self.folder)
        raise Stop(
            f"The loss is {loss} at step {progress.step + 1} (activations of {self.rows.origin(progress.step)}, at "
            f"{self.data.place.site}); the last good checkpoint is {good[-1][0] if good else 'none'}: look at these "
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

    def set_threshold(self, held_out: Rows) -> None:
        """After BatchTopK: one threshold for all latents, with which an activation keeps k of them on average.

        That is the least pre-activation that BatchTopK keeps of a large batch. The batch is of held-out activations,
        where there are some: an SAE that has seen its activations several times fires less on them than on others.
        held_out: as many rows on each process. All processes must call this.
        """
        threshold = self.step.sae.threshold
        if threshold is not None:
            threshold.fill_(self.step.least_kept(self.own(held_out)[0]))

    def measure(
        self, agreed: Agreed, rate: float, since: TrainingProgress, quality: Validation | None
    ) -> dict[str, float]:
        """A line of metrics.jsonl. since: progress at the previous line; quality: at the end of an epoch."""
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
        if quality:
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
        """Write a checkpoint. All processes must call this.

        Alone, for one between two epochs' checkpoints, it does not wait for the shards' checksums, as on a signal, nor
        is the counter `firing` reset: when it happens must not show in what the run writes in the end. Returns each
        process's part of that counter.
        """
        self.check_replicas()
        self.save()
        # gather doubles as a barrier: all have written.
        firing = self.world.gather(self.step.firing.cpu() if self.step.data.is_main else None)
        self.saved_at = time.monotonic()
        return firing

    def delete_older_checkpoints(self) -> None:
        """Once those of all SAEs are written."""
        if self.world.is_main:
            delete_checkpoints(self.folder, self.options.keep_checkpoints)

    def resume(self, steps: set[int]) -> None:
        """Continue from the newest checkpoint of one of these steps, if any, and cut metrics.jsonl back to it."""
        if self.world.is_main:
            delete_checkpoints(self.folder, self.options.keep_checkpoints, steps)  # incomplete ones too
            remove_leftovers(self.folder)
        found = self.world.gather(whole_checkpoints(self.folder))[0]
        if found:
            state = load_checkpoint(found[-1], self.step.slices.rank, self.step.slices.size)
            self.progress = TrainingProgress(**state["progress"])
            self.step.load(state)
            self.world.print(f"Continuing from step {self.progress.step} ({found[-1][0]}).")
        if self.world.is_main:
            self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
            self.metrics_path.write_text("".join(line + "\n" for line in self.progress.metrics), encoding="utf-8")


class HeldOutSums:
    """Sums over this process's held-out activations, for the quality of one SAE."""

    def __init__(self, training: Training):
        self.training, self.step = training, training.step
        self.d_model, self.dead = self.step.sae.d_model, self.step.dead()
        # Of z, z^2 and both squared errors, and the count; firings apart, because each slice has only its own.
        shapes, device = (2 * self.d_model + 3, 1), training.world.device
        self.sums, self.l0 = (torch.zeros(n, dtype=torch.float64, device=device) for n in shapes)

    def add(self, found: Rows) -> None:
        step = self.step
        rows, target = self.training.own(found)
        z = step.normalize(rows)
        y = None if target is None else step.normalize_target(target)
        parts = step.losses(z, self.dead, torch.float32, y)
        self.l0 += parts.fired.sum()
        z = (z if y is None else y).double()
        counted = torch.stack([parts.whole, parts.aux, z.new_tensor(len(z))])
        self.sums += torch.cat([z.sum(0), z.square().sum(0), counted])

    def quality(self) -> Validation | None:
        """Over all processes; None if there are no held-out activations or they are all alike."""
        step, d = self.step, self.d_model
        step.data.all_reduce(self.sums)
        step.world.all_reduce(self.l0)
        total, squares, (main, aux, count) = self.sums[:d], self.sums[d : 2 * d], self.sums[2 * d :].tolist()
        if count == 0:
            return None
        variance = float((squares - total.square() / count).sum())
        if variance <= NO_VARIANCE * float(squares.sum()):
            return None
        loss = (main + step.options.aux_loss_coeff * aux) / (count * d)
        return Validation(main / (count * d), aux / (count * d), loss, main / variance, float(self.l0) / count)


def validate(trainings: Sequence[Training]) -> list[Validation | None]:
    """The quality of all SAEs on all held-out activations. All processes must call this."""
    first = trainings[0]
    n_rows = first.step.options.micro_batch_size or first.batch_size // first.step.data.size
    sums = [HeldOutSums(training) for training in trainings]
    with torch.no_grad():
        for found in first.rows.held_out(n_rows):
            for each in sums:
                each.add(found)
    return [each.quality() for each in sums]


def train(
    trainings: Sequence[Training],
    verified: Callable[[], None],
    report: Callable[[Training, dict[str, float]], None],
) -> int:
    """Train to the end and return 0; on a signal, save the last finished step and return the signal's number.

    Several SAEs take each step together: no SAE changes before the gradients of all are there, so that all can always
    be saved as they were after the same step. verified: waits for the shards' checksums, may raise InputError. report:
    called with each line's values.
    """
    first = trainings[0]
    options, progress, rows, everyone = first.options, first.progress, first.rows, first.world
    log_every = max(1, rows.steps_per_epoch // options.logs_per_epoch)
    with (
        noted_signals() as stop_signal,
        rows.reading(range(progress.step, first.n_steps), lambda: stop_signal.number > 0) as following,
        progress_bar(
            total=first.n_steps * first.batch_size,
            initial=progress.step * first.batch_size,
            unit="act",
            unit_scale=True,
            desc="SAE" if len(trainings) == 1 else f"{len(trainings)} SAEs",
            disable=not everyone.is_main,
        ) as bar,
    ):
        logged = [dataclasses.replace(training.progress) for training in trainings]
        while any(training.goes_on() for training in trainings):
            started = time.perf_counter()
            pending, agreed = [], []
            with saved_when_left_alone(trainings):
                found = following()
                waited = time.perf_counter() - started
                if found is not None:
                    pending = [training.step.gradients(*training.own(found)) for training in trainings]
                    overdue = first.checkpoint_overdue()
                    agreed = [
                        t.step.agree(p, stop_signal.number, overdue) for t, p in zip(trainings, pending, strict=True)
                    ]
            if found is None or any(each.stop for each in agreed):
                for training in trainings:
                    training.save()
                return stop_signal.number or signal.SIGTERM
            for training, each in zip(trainings, agreed, strict=True):
                training.check_loss(each)
            rates = [t.apply(p, each) for t, p, each in zip(trainings, pending, agreed, strict=True)]
            seconds = time.perf_counter() - started
            for training in trainings:
                training.progress.seconds += seconds
                training.progress.waited += waited
            bar.update(first.batch_size)

            if progress.step % log_every == 0 or first.checkpoint_due():
                qualities: list[Validation | None] = [None] * len(trainings)
                if first.epoch_ends():
                    if first.step.sae.threshold is not None:
                        held_out = rows.held_out_sample(_SAMPLE)
                        for training in trainings:
                            training.set_threshold(held_out)
                    qualities = validate(trainings)
                lines = [
                    training.measure(*line)
                    for training, *line in zip(trainings, agreed, rates, logged, qualities, strict=True)
                ]
                for training, values in zip(trainings, lines, strict=True):
                    training.log(values)
                    report(training, values)
                logged = [dataclasses.replace(training.progress) for training in trainings]
                state = "loss {train_total:.4f}, FVU {train_fvu:.3f}, dead {dead_frac:.1%}".format(**lines[0])
                bar.set_postfix_str(state, refresh=False)
            with saved_when_left_alone(trainings):
                if first.checkpoint_due() or agreed[0].save:
                    for training in trainings:
                        if first.checkpoint_due():
                            training.checkpoint(verified)
                        else:
                            training.write_checkpoint()
                    for training in trainings:
                        training.delete_older_checkpoints()
                elif progress.step % options.replica_check_steps == 0:
                    for training in trainings:
                        training.check_replicas()
    return 0


@contextlib.contextmanager
def saved_when_left_alone(trainings: Sequence[Training]) -> Iterator[None]:
    """Wrap code that waits for other processes and changes nothing: if one of them is gone, save the state."""
    first = trainings[0]
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Stop(
            f"{first.world.device} has too little memory for {first.rows_at_once} activations at a time; give a "
            "smaller --micro_batch_size, or a larger --latent_parallel."
        ) from error
    except RuntimeError:
        if first.world.size > 1:
            for training in trainings:
                training.save(whoever_comes_first=True)
        raise


# ---- main


def longest_over_typical(rows: Rows) -> float:
    """Root mean square over median of the length of activations, of the site where it is largest."""
    ratios = [0.0]
    for acts in rows.values():
        lengths = acts.float().norm(dim=1)
        ratios.append(float(lengths.square().mean().sqrt() / lengths.median().clamp(min=1e-30)))
    return max(ratios)


def sae_bytes(training: Training) -> int:
    options, d_model = training.options, training.step.sae.d_model
    return 4 * (2 * options.n_latents * d_model + options.n_latents + d_model + training.data.kind.skip * d_model**2)


def announce(trainings: Sequence[Training]) -> None:
    """Print what will be read, written, held in memory and sent. Raises Stop if the disk is too small."""
    first = trainings[0]
    options, step = first.options, first.step
    present = sum(path.stat().st_size for each in trainings for path in checkpoint_files(each.folder))
    on_disk = sum(map(sae_bytes, trainings)) * (3 * (options.keep_checkpoints + 1) + 1)
    require_disk(first.folder, on_disk - present)
    for training in trainings:
        announce_one(training)
    if options.warmup_steps >= first.n_steps:
        print(
            f"Note: --warmup_steps {options.warmup_steps:,} is at least the run's {first.n_steps:,} steps: the "
            f"run ends while the learning rate is still rising to {options.learning_rate:g}.",
            flush=True,
        )
    sample = first.rows.sample(_SAMPLE) if first.data.kind.normalization != "layer_norm" else {}
    if (ratio := longest_over_typical(sample)) > _OUTLIERS:
        print(
            f"Note: without a normalisation by activation the few longest activations decide what is learned: their "
            f"root mean square length is {ratio:.0f} times the median. Of sentences it is usually the first token: "
            "capture them with --begin_of_text.",
            flush=True,
        )
    if step.options.dead_after_tokens <= first.batch_size:
        print(
            f"Note: --dead_after_tokens {step.options.dead_after_tokens:,} is no more than a step's "
            f"{first.batch_size:,} activations: a latent counts as dead after one silent step.",
            flush=True,
        )
    if step.world.size > 1:
        data, latents = map(gb, step.bytes_sent())
        print(
            f"Per step, each process sends {data} of gradients and {latents} between slices of the latents"
            f"{'' if len(trainings) == 1 else ', for each SAE'}.",
            flush=True,
        )


def announce_one(training: Training) -> None:
    options, step, kind = training.options, training.step, training.data.kind
    what = ("Matryoshka, " if options.matryoshka else "") + kind.in_words.replace("JumpReLU", "BatchTopK")
    n_bytes = sae_bytes(training)
    n_slice, n_rows = step.sae.n_latents, training.rows_at_once
    block = 4 * n_slice * min(n_rows, rows_at_once(4 * n_slice, step.world.device))
    # Weights, two moments, gradients; with micro-batches also one micro-batch's gradients.
    copies = 4 if n_rows == training.batch_size // step.data.size else 5
    memory = copies * n_bytes // step.slices.size + block
    memory += n_rows * (24 * step.sae.d_model + 80 * min(options.k, n_slice))
    print(
        f"{what}: reading {training.data.told}; "
        f"writing {options.model_save_path} ({gb(n_bytes)}) and checkpoints ({gb(3 * n_bytes)} each) to "
        f"{training.folder}; {training.n_steps:,} steps of {training.batch_size} on {step.world.size} x "
        f"{step.world.device.type}, about {gb(memory)} of memory each for the weights, their gradients and moments, "
        f"and {n_rows} activations.",
        flush=True,
    )


def train_until_stopped(
    trainings: Sequence[Training], wandb_mode: WandbMode, folder: Path, config: dict[str, Any]
) -> None:
    """Train to the end, logging to W&B if it is on. After a signal the process exits here."""
    first = trainings[0]
    everyone = first.world
    wandb_run = start_wandb(wandb_mode, folder, config, first.progress.wandb_id) if everyone.is_main else None
    wandb_id = everyone.gather(wandb_run.id if wandb_run else first.progress.wandb_id)[0]
    for training in trainings:
        training.progress.wandb_id = wandb_id

    def report(training: Training, values: dict[str, float]) -> None:
        if wandb_run:
            prefix = "" if len(trainings) == 1 else f"{training.data.place.folder}/"
            wandb_run.log({prefix + name: value for name, value in values.items()}, step=training.progress.step)

    with first.rows.verifying() as verified:
        number = train(trainings, verified, report)
    if wandb_run:
        wandb_run.finish(exit_code=1 if number else 0)
    if number:
        if everyone.is_main:
            print(
                f"\nStopped by {signal.Signals(number).name} after step {first.progress.step}, which is saved; run the "
                "same command again to continue.",
                file=sys.stderr,
                flush=True,
            )
        exit_at_once(128 + number)


def finish(training: Training, config: dict[str, Any]) -> None:
    """Write the SAE, its JSON and figures from the last checkpoint."""
    options, progress, data = training.options, training.progress, training.data
    state = load_checkpoint(whole_checkpoints(training.folder)[-1], 0, 1)
    sae = empty_sae(options, data.source.need("d_model"), data.normalize_eps, data.kind)
    sae.load_state_dict(state["sae"])
    if config["normalization"] == "none":
        sae = sae.rescaled("none")
    training.draw(state["counters"]["firing"])
    last, tokens = json.loads(progress.metrics[-1]), progress.step * training.batch_size
    quality = {name: last.get(name) for name in (*Validation._fields, "dead_frac")}
    cost = {"tokens": tokens, "seconds": progress.seconds, "acts_per_s": tokens / progress.seconds}
    info = {
        **data.source.as_json(SaeFiles(options.model_save_path).json),
        "first_validation_sentence": data.first_validation_sentence,
        "normalization": sae.kind.normalization,
        **({"matryoshka": list(options.matryoshka)} if options.matryoshka else {}),
        "tokens_trained": tokens,
        "quality": quality | cost,
        "config": config,
        "git_commit": git_commit(),
    }
    save_sae(sae, options.model_save_path, info)
    held_out = "val_fvu" in last and f"FVU {last['val_fvu']:.4f}, L0 {last['val_l0']:.1f} on held-out activations, "
    print(
        f"{held_out or ''}{last['dead_frac']:.1%} dead latents; {cost['acts_per_s']:,.0f} activations/s, "
        f"{progress.waited / progress.seconds:.1%} of the time waiting for data: {options.model_save_path}",
        flush=True,
    )


_T = TypeVar("_T", RunOptions, StepOptions, KindOptions, StreamOptions)


def options_of(kind: type[_T], config: dict[str, Any]) -> _T:
    return kind(**{name: config[name] for name in kind._fields})


def options_of_each(options: RunOptions, places: Sequence[Place]) -> list[RunOptions]:
    """Those of every SAE: of several each has a folder."""
    if len(places) == 1:
        return [options]
    path, checkpoints = Path(options.model_save_path), Path(options.checkpoint_dir)
    return [
        options._replace(model_save_path=str(path.parent / name / path.name), checkpoint_dir=str(checkpoints / name))
        for name in (place.folder for place in places)
    ]


def main() -> None:
    config = vars(parse_constants(globals()))
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    config["latent_parallel"] = config["latent_parallel"] or slices_by_default(config["n_latents"], n_processes)
    config["sites"] = tuple(config["sites"])
    options, step_options, kind = (options_of(each, config) for each in (RunOptions, StepOptions, KindOptions))
    refuse_contradictions(config)
    check_options(options, n_processes)
    decides = {name: value for name, value in config.items() if name not in _NOT_IN_THE_RESULT}
    # None, so that runs begun before these options existed can continue.
    decides |= {name: None for name, default in _SINCE.items() if decides[name] == default}
    seed, fit = config["seed"], (step_options.batch_size, n_processes, options.early_stop_epochs is not None)
    stream, folders, datas, saes = None, {}, [], []
    if config["stream"]:
        stream = open_stream(options_of(StreamOptions, config), kind.skip)
        check_stream(stream, *fit)
        empty_sae(options, stream.args.dim, 0.0, Kind())  # refuses what does not fit now, not after the first filling
        places, decides = stream.places, decides | stream.identity()
    else:
        data, folders = open_data(
            config["data_dir"] or _DATA_DIR, config["b_pre_path"], config["target_data_dir"], kind
        )
        check_batches(folders, *fit)
        places, datas = [data.place], [data]
        begun = bool(steps_to_continue_from([options]))
        saes = [starting_sae(options, data, config["model_load_path"], seed, config["orthogonal_start"], begun)]
        checksums = [[shard["sha256"] for shard in its["shards"]] for _, its in folders.values()]
        decides |= {"target_data_dir": None, **dict(zip(("batches", "targets"), checksums, strict=False))}
        config = {name: value for name, value in config.items() if name not in _OF_STREAMS}  # as the SAE's JSON has it
    each_options = options_of_each(options, places)
    if int(os.environ.get("RANK", 0)) == 0:
        for each in each_options:
            require_writable(each.model_save_path, SaeFiles(each.model_save_path).json)
    torch.backends.cuda.matmul.allow_tf32 = config["allow_tf32"]

    folder = Path(options.checkpoint_dir)
    with world() as everyone, locked(folder, everyone.rank, everyone.barrier):
        done = begin_or_continue(folder, _STAGE, decides) if everyone.is_main else False
        if everyone.gather(done)[0] and all(Path(each.model_save_path).exists() for each in each_options):
            everyone.print(f"{options.model_save_path} is already complete.")
            return
        grid = make_grid(everyone, options.latent_parallel)
        if stream:
            rows, datas = start_stream(stream, kind, step_options.batch_size, seed, folder, grid)
            begin = None, seed, config["orthogonal_start"], bool(steps_to_continue_from(each_options))
            saes = [starting_sae(each, data, *begin) for each, data in zip(each_options, datas, strict=True)]
        else:
            rows = StoredRows(folders, step_options.batch_size, seed, grid)
        trainings = [
            Training(each, Step(sae, step_options, grid), rows, data)
            for each, sae, data in zip(each_options, saes, datas, strict=True)
        ]
        if everyone.is_main:
            announce(trainings)
        steps = everyone.gather(steps_to_continue_from(each_options))[0]
        for training in trainings:
            training.resume(steps)
        if any(training.goes_on() for training in trainings):
            train_until_stopped(trainings, config["wandb"], folder, config)
        if everyone.is_main:
            for training in trainings:
                finish(training, config)
            write_manifest(folder, _STAGE, complete=True, decides=decides, config=config)


if __name__ == "__main__":
    run(main)
