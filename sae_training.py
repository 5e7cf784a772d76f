"""Train a TopK sparse autoencoder on shuffled batches of activations.

Reads   DATA_DIR (sae_preprocessing.py)
Writes  MODEL_SAVE_PATH: the SAE NAME.pth with NAME.json, NAME.metrics.jsonl, NAME.curves.png and NAME.frequencies.png
        beside it; CHECKPOINT_DIR: checkpoints to resume from (several nodes must all see it)
Method  Gao et al. 2024, arXiv:2406.04093; departures from it and from the original are listed in the README.
        The processes form a grid, data x latents: LATENT_PARALLEL neighbours share one SAE, a slice of its latents
        each, and see the same activations; the groups of neighbours share the batch out. All exchanges of a step come
        before it changes anything, so that whoever is stopped or left alone holds the whole state of the step before
Cost    disk: a checkpoint is three times the SAE; rates in the README's table

    python sae_training.py --data_dir data/batches --model_save_path data/sae.pth
    torchrun --standalone --nproc_per_node=8 sae_training.py --data_dir data/batches --model_save_path data/sae.pth
"""

from typing import Literal, NamedTuple

from pipeline.options import Count, CountOrZero, NotNegative, Positive, Seed, Share, ShareBelowOne, parse_constants
from pipeline.run import exit_at_once, run

DATA_DIR = "data/batches"  # shuffled batches
B_PRE_PATH: str | None = None  # statistics whose b_pre it starts with; those of DATA_DIR when not given
MODEL_SAVE_PATH = "data/sae.pth"  # where the trained SAE goes
MODEL_LOAD_PATH: str | None = None  # an SAE to start from instead of a fresh one
CHECKPOINT_DIR = "data/checkpoints"  # folder for checkpoints

N_LATENTS: Count = 2**16  # dictionary size
K: Count = 64  # latents kept per activation
K_AUX: CountOrZero = 2048  # dead latents in the auxiliary loss, a power of two near d_model / 2
AUX_LOSS_COEFF: NotNegative = 1 / 32  # weight of the auxiliary loss
DEAD_AFTER_TOKENS: Count = 10_000_000  # activations without firing before a latent counts as dead

NUM_EPOCHS: Count = 10  # passes over the training activations
EARLY_STOP_EPOCHS: Count | None = None  # ends after so many epochs without a better validation FVU
BATCH_SIZE: Count = 8192  # activations a step, over all processes
LEARNING_RATE: NotNegative = 5e-5  # peak
LEARNING_RATE_MIN_RATIO: Share = 1 / 5  # the cosine ends at this share of the peak
WARMUP_STEPS: CountOrZero = 0  # steps of linear warm-up
BETAS: tuple[ShareBelowOne, ShareBelowOne] = (0.85, 0.9999)  # of AdamW; rare latents need a long second moment
ADAM_EPS: Positive = 6.25e-10  # of AdamW
WEIGHT_DECAY: NotNegative = 0.0  # of AdamW; the original's 0.01 shrank silent latents
GRAD_CLIP: Positive | None = None  # largest norm of the whole gradient, after projection
ORTHOGONAL_START = False  # latents begin at right angles, d_model by d_model, instead of at random
SEED: Seed = 0  # of the initialisation and of the order of batches

LATENT_PARALLEL: Count = 1  # processes that share one SAE, a slice of its latents each
MICRO_BATCH_SIZE: Count | None = None  # activations in one forward pass of a process; all of its share when not given
ENCODER_DTYPE: Literal["float32", "bfloat16"] = (
    "float32"  # of the product that chooses latents; chosen values stay float32
)
ALLOW_TF32 = False  # on GPUs: TF32 in float32 products
LOGS_PER_EPOCH: Count = 1000  # lines in metrics.jsonl an epoch
CHECKPOINTS_PER_EPOCH: Count = 1  # checkpoints an epoch
KEEP_CHECKPOINTS: Count = 2  # newest checkpoints kept
REPLICA_CHECK_STEPS: Count = 1000  # steps between comparisons of the parameters that processes hold in common
EXPLOSION_FACTOR: Positive = 10.0  # a main loss above this many times its running mean stops the run
WANDB: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online with a key, offline without

_STAGE = "sae_training.py"
_NOT_IN_THE_RESULT = [  # constants that may change between two parts of one run
    *("data_dir", "model_save_path", "checkpoint_dir", "b_pre_path", "latent_parallel", "micro_batch_size", "wandb"),
    *("logs_per_epoch", "checkpoints_per_epoch", "keep_checkpoints", "replica_check_steps", "explosion_factor"),
]
_LOSS_MEMORY = 0.98  # of the running mean of the loss: about 50 steps

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

from autoencoder.checkpoints import Slice, checkpoint_files, delete_checkpoints, load_checkpoint, whole_checkpoints
from autoencoder.curves import plot_curves, plot_frequencies, start_wandb
from autoencoder.losses import LatentGroup, loss_sums
from pipeline.activation_batches import Batches, Reader, open_rows
from pipeline.activation_store import open_shard
from pipeline.distributed import grid, noted_signals, world
from pipeline.errors import InputError
from pipeline.files import locked, require_disk
from pipeline.manifests import begin_or_continue, check_files, git_commit, read_manifest, verifying, write_manifest
from pipeline.progress import gb, progress_bar
from pipeline.sae_files import SaeFiles
from sae import TopKSparseAutoencoder, load_sae_model, rows_at_once, save_sae, save_tensors

# ---- validation, schedule


class Validation(NamedTuple):
    val_main: float  # mean squared error, normalised space
    val_aux: float  # mean squared error of the auxiliary reconstruction by the latents dead at this moment
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
    """Whether the best of the epochs' validation FVUs lies `patience` or more epochs back."""
    return bool(patience and val_fvus) and len(val_fvus) - 1 - val_fvus.index(min(val_fvus)) >= patience


def bytes_sent(config, d_model: int, n_data: int) -> tuple[float, float]:
    """What a process sends each step: for data parallelism, and for latent parallelism.

    Data: the gradients of its slice and what fired. Latents: the values of its candidates, the partial reconstructions,
    b_pre's gradient; the auxiliary loss comes on top with min(k_aux, dead latents) candidates and a reconstruction.
    Published size, eight processes: 2.82 GB as 8 x 1; 0.19 GB as 1 x 8, 0.84 GB once 2048 latents of a slice are dead.
    """
    n_slice, width = config.n_latents // config.latent_parallel, config.latent_parallel
    rows = config.batch_size // n_data
    ring = lambda n, n_bytes: 2 * (n - 1) / n * n_bytes  # of an all-reduce
    data = ring(n_data, 4 * n_slice * (2 * d_model + 1) + 8 * n_slice) + ring(n_data * width, 4 * d_model)
    candidates = (width - 1) * 4 * rows * min(config.k, n_slice)
    return data, candidates + ring(width, 4 * d_model * (rows + 1))


# ---- training


@dataclasses.dataclass
class Progress:
    """How far a run is; goes into checkpoints. There is no random state: the order of data follows from the seed."""

    step: int = 0
    seconds: float = 0.0  # of training, validation and checkpoints left out
    waited: float = 0.0  # seconds of these that went into waiting for data
    mean_loss: float | None = None  # running mean of the main loss
    counting_since: int = 0  # the step at which `firing` began
    metrics: list[str] = dataclasses.field(default_factory=list)  # lines of metrics.jsonl
    val_fvus: list[float] = dataclasses.field(default_factory=list)  # of each epoch
    wandb_id: str | None = None


class Agreed(NamedTuple):
    """What the processes tell one another in a step, the same on each of them."""

    stop: bool  # one of them got a signal
    main: float  # losses of the whole batch, means
    aux: float
    n_dead: list[int]  # dead latents after this step, by slice
    longest_silence: int  # in activations


class Training:
    """A run: this process's slice of the SAE, its moments and counters, and where they are kept."""

    def __init__(self, config, batches, sae, variance: float, w, data, latents):

        self.config, self.batches, self.variance = config, batches, variance
        self.w, self.data, self.latents = w, data, latents
        self.latent_group = LatentGroup(latents.group, latents.rank, latents.size)
        self.folder = Path(config.checkpoint_dir)
        self.metrics_path, self.curves_path, self.frequencies_path = (
            SaeFiles(config.model_save_path).beside(name) for name in ("metrics.jsonl", "curves.png", "frequencies.png")
        )
        self.sae = sae.to(w.device)
        self.parameters = dict(sae.named_parameters())
        # AdamW's moments, laid out in memory as the parameters are.
        self.exp_avg, self.exp_avg_sq = (
            {name: torch.zeros_like(p) for name, p in self.parameters.items()} for _ in range(2)
        )
        # Activations since each latent last fired, and how often it fired since Progress.counting_since.
        self.silent_tokens, self.firing = torch.zeros(2, sae.n_latents, dtype=torch.int64, device=w.device)
        self.progress = Progress()
        self.wandb_run = None
        self.stop_signal = SimpleNamespace(number=0)
        self.verified = lambda: None  # waits for the checksums of the shards; raises InputError
        self.n_steps = batches.steps_per_epoch * config.num_epochs
        self.checkpoint_every = math.ceil(batches.steps_per_epoch / config.checkpoints_per_epoch)

    # ---- one step

    def dead(self, n_dead: list[int]):
        return (self.silent_tokens >= self.config.dead_after_tokens).nonzero().flatten() if any(n_dead) else None

    def losses(self, z, n_dead: list[int], dead, encoder_dtype):

        return loss_sums(self.sae, z, dead, self.config.k_aux, self.latent_group, encoder_dtype, n_dead)

    def gradients(self, x, n_dead: list[int]):
        """Leaves the whole batch's gradients in the parameters. x: this process's rows.

        Returns the losses of these rows (2,), and how often each latent of the slice fired on the whole batch.
        """

        config = self.config
        scale = 1 / (config.batch_size * self.sae.d_model)
        losses, fired = x.new_zeros(2, dtype=torch.float32), torch.zeros_like(self.firing)
        dead = self.dead(n_dead)
        for part in x.split(config.micro_batch_size or len(x)):
            z, _, _ = self.sae.normalize(part)
            sums = self.losses(z, n_dead, dead, getattr(torch, config.encoder_dtype))
            ((sums.main + config.aux_loss_coeff * sums.aux) * scale).backward()
            losses += torch.stack([sums.main, sums.aux]).detach() * scale
            fired += sums.fired
        b_pre, *own = (p.grad for p in self.parameters.values())
        for tensor in (*own, fired):
            self.data.all_reduce(tensor)
        # Complete in each slice; by one sum over all processes it stays equal to the last bit on all of them.
        self.w.all_reduce(b_pre.div_(self.latents.size))
        self.sae.project_decoder_grad()
        if config.grad_clip is not None:
            square = self.latents.all_reduce(sum(grad.square().sum() for grad in own)) + b_pre.square().sum()
            for grad in (b_pre, *own):
                grad.mul_((config.grad_clip / square.sqrt()).clamp(max=1))
        return losses, fired

    def agree(self, losses, silent_tokens) -> Agreed:
        """The one exchange between all processes in a step, and the point where the CPU waits for the GPU."""

        width = self.latents.size
        numbers = torch.zeros(3 + 2 * width, dtype=torch.float64, device=self.w.device)
        numbers[0] = self.stop_signal.number
        if self.latents.is_main:
            numbers[1:3] = losses
        if self.data.is_main:
            numbers[3 + self.latents.rank] = (silent_tokens >= self.config.dead_after_tokens).sum()
            numbers[3 + width + self.latents.rank] = silent_tokens.max()
        stop, main, aux, *rest = self.w.all_reduce(numbers).tolist()
        return Agreed(stop > 0, main, aux, [int(n) for n in rest[:width]], int(max(rest[width:])))

    def apply(self, fired, silent_tokens, main: float) -> float:
        """The step itself: only here does anything change, with nothing to wait for. Returns the learning rate."""
        from torch.optim.adamw import adamw

        config, progress = self.config, self.progress
        lr = learning_rate(
            progress.step, self.n_steps, config.learning_rate, config.learning_rate_min_ratio, config.warmup_steps
        )
        # The class AdamW does the same, and imports torch's compiler first: seconds for each process.
        with torch.no_grad():
            adamw(
                list(self.parameters.values()),
                [p.grad for p in self.parameters.values()],
                list(self.exp_avg.values()),
                list(self.exp_avg_sq.values()),
                [],
                [torch.full((), progress.step, dtype=torch.float32, device=self.w.device) for _ in self.parameters],
                fused=True,
                amsgrad=False,
                beta1=config.betas[0],
                beta2=config.betas[1],
                lr=lr,
                weight_decay=config.weight_decay,
                eps=config.adam_eps,
                maximize=False,
            )
        self.sae.zero_grad()
        self.sae.normalize_decoder()
        if self.checkpoint_due():  # after the last step: counting begins anew
            self.firing.zero_()
            progress.counting_since = progress.step
        self.firing += fired
        self.silent_tokens.copy_(silent_tokens)
        mean = main if progress.mean_loss is None else progress.mean_loss
        progress.mean_loss = _LOSS_MEMORY * mean + (1 - _LOSS_MEMORY) * main
        progress.step += 1
        return lr

    def check_loss(self, agreed: Agreed) -> None:
        """Raise InputError before a bad step changes anything."""

        progress, mean = self.progress, self.progress.mean_loss
        exploded = mean is not None and agreed.main > self.config.explosion_factor * mean
        if math.isfinite(agreed.main + agreed.aux) and not exploded:
            return
        what = f"{agreed.main:.4g}, more than {self.config.explosion_factor:g} times its running mean {mean:.4g},"
        rows = self.batches.stored_batches(*divmod(progress.step, self.batches.steps_per_epoch))
        shards = sorted({self.batches.names[shard] for shard, _ in rows})
        good = whole_checkpoints(self.folder)
        raise InputError(
            f"The loss is {what if exploded else agreed.main + agreed.aux} at step {progress.step + 1} (activations of "
            f"{', '.join(shards)} in {self.config.data_dir}); the last good checkpoint is "
            f"{good[-1][0] if good else 'none'}: look at these activations, or begin again in another --checkpoint_dir "
            "with a lower --learning_rate or a --grad_clip."
        )

    # ---- now and then

    def checkpoint_due(self) -> bool:
        return self.progress.step % self.batches.steps_per_epoch % self.checkpoint_every == 0

    def goes_on(self) -> bool:
        early = stops_early(self.progress.val_fvus, self.config.early_stop_epochs)
        return self.progress.step < self.n_steps and not early

    def check_replicas(self) -> None:
        """Compare sums over the bits of what processes hold in common."""

        if self.w.size == 1:
            return
        own = [int(p.detach().view(torch.int32).sum()) for p in self.parameters.values()]  # b_pre is the first
        own.append(int(self.silent_tokens.sum()))
        every, width = self.w.gather(own), self.latents.size
        wrong = [rank for rank, sums in enumerate(every) if sums != every[rank % width] or sums[0] != every[0][0]]
        if wrong:
            others = "rank 0" if width == 1 else f"ranks 0 to {width - 1}"
            raise InputError(
                f"The parameters of rank {', '.join(map(str, wrong))} differ at step {self.progress.step} from "
                f"those of {others}, which should hold the same; look for a faulty device, and run the same command "
                "again to continue from the last checkpoint."
            )

    def validate(self, data_dir: str, manifest: dict, n_dead: list[int]) -> Validation | None:
        """Measure the SAE on all held-out activations, shared out over the data ranks; None where there are none."""

        d = self.sae.d_model
        n_rows = self.config.micro_batch_size or self.config.batch_size // self.data.size
        # Sums of z, of z^2, of both squared errors, and the count; fired values apart, which slices do not share.
        sums, l0 = (torch.zeros(n, dtype=torch.float64, device=self.w.device) for n in (2 * d + 3, 1))
        dead, chunk = self.dead(n_dead), 0
        with torch.no_grad():
            for record in manifest["validation_shards"]:
                shard = torch.from_numpy(open_rows(Path(data_dir) / record["file"])).view(torch.bfloat16)
                for rows in shard.split(n_rows):
                    chunk += 1
                    if chunk % self.data.size != self.data.rank:
                        continue
                    z, _, _ = self.sae.normalize(rows.to(self.w.device))
                    parts = self.losses(z, n_dead, dead, torch.float32)
                    l0 += parts.fired.sum()
                    z = z.double()
                    counted = torch.stack([parts.main, parts.aux, z.new_tensor(len(z))])
                    sums += torch.cat([z.sum(0), z.square().sum(0), counted])
        self.data.all_reduce(sums)
        self.w.all_reduce(l0)
        total, squares, (main, aux, count) = sums[:d], sums[d : 2 * d], sums[2 * d :].tolist()
        if count == 0:
            return None
        variance = float((squares - total.square() / count).sum())
        loss = (main + self.config.aux_loss_coeff * aux) / (count * d)
        return Validation(main / (count * d), aux / (count * d), loss, main / variance, float(l0) / count)

    def log(self, **values: float) -> None:
        step = self.progress.step
        line = json.dumps({"step": step, "tokens": step * self.config.batch_size, **values})
        self.progress.metrics.append(line)
        if self.w.is_main:
            try:
                with open(self.metrics_path, "a") as file:
                    file.write(line + "\n")
            except OSError as error:
                raise InputError(
                    f"Could not write {self.metrics_path} ({error}); free some disk and run again to continue."
                ) from error
            if self.wandb_run:
                self.wandb_run.log(values, step=step)

    def draw(self, firing) -> None:

        progress = self.progress
        plot_curves(progress.metrics, self.curves_path)
        n_activations = (progress.step - progress.counting_since) * self.config.batch_size
        plot_frequencies(firing, n_activations, self.frequencies_path)

    # ---- checkpoints

    def save(self, by_whoever_comes_first: bool = False) -> None:
        """Write this process's slice, without a word to the others. Processes with the same slice leave it to the first
        of them, or, where that one may be gone, to whoever comes first."""

        path = Slice(self.progress.step, self.latents.rank, self.latents.size).path(self.folder)
        if self.progress.step == 0 or path.exists():
            return
        if by_whoever_comes_first:
            try:
                path.with_name(f".{path.name}.claimed.tmp").touch(exist_ok=False)
            except FileExistsError:
                return
        elif not self.data.is_main:
            return
        if not all(p.isfinite().all() for p in self.parameters.values()):
            raise InputError(
                f"The weights are not finite after step {self.progress.step}, no checkpoint of them was written; begin "
                "again in another --checkpoint_dir with a lower --learning_rate or a --grad_clip."
            )
        state = {"progress": dataclasses.asdict(self.progress), "sae": self.sae.state_dict()}
        state |= {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        state["counters"] = {"silent_tokens": self.silent_tokens, "firing": self.firing}
        save_tensors(path, state)

    @contextlib.contextmanager
    def saved_when_left_alone(self) -> Iterator[None]:
        """For what waits for other processes and changes nothing: where one of them is gone, the state is saved."""

        try:
            yield
        except torch.OutOfMemoryError as error:
            rows = self.config.micro_batch_size or self.config.batch_size // self.data.size
            raise InputError(
                f"{self.w.device} has too little memory for {rows} activations at a time; give a smaller "
                "--micro_batch_size, or a larger --latent_parallel."
            ) from error
        except RuntimeError:
            if self.w.size > 1:
                self.save(by_whoever_comes_first=True)
            raise

    def check_data(self) -> None:
        """InputError on every process where one found a shard altered."""
        said = None
        try:
            self.verified()
        except InputError as error:
            said = str(error)
        for message in self.w.gather(said):
            if message:
                raise InputError(message)

    def checkpoint(self) -> None:
        """A checkpoint that all processes come to: checked, written, older ones deleted, figures drawn."""
        self.check_data()
        self.check_replicas()
        self.save()
        # Behind this all have written.
        firing = self.w.gather(self.firing.cpu() if self.data.is_main else None)
        if self.w.is_main:
            delete_checkpoints(self.folder, self.config.keep_checkpoints)
            if self.goes_on():  # else they are drawn at the end
                self.draw(torch.cat([part for part in firing if part is not None]))

    def load(self, paths: list[Path]) -> None:

        state = load_checkpoint(paths, self.latents.rank, self.latents.size)
        self.progress = Progress(**state["progress"])
        self.sae.load_state_dict(state["sae"])
        for name in self.parameters:
            self.exp_avg[name].copy_(state["exp_avg"][name])
            self.exp_avg_sq[name].copy_(state["exp_avg_sq"][name])
        self.silent_tokens.copy_(state["counters"]["silent_tokens"])
        self.firing.copy_(state["counters"]["firing"])


def train(t: Training, manifest: dict) -> int:
    """Train to the end; returns 0. A signal stops it at a checkpoint of the last whole step; returns its number."""

    config, progress, w, batches = t.config, t.progress, t.w, t.batches
    log_every = max(1, batches.steps_per_epoch // config.logs_per_epoch)
    with (
        noted_signals() as t.stop_signal,
        Reader(batches, range(progress.step, t.n_steps), t.data.rank, t.data.size, w.device) as reader,
        progress_bar(
            total=t.n_steps * config.batch_size,
            initial=progress.step * config.batch_size,
            unit="act",
            unit_scale=True,
            desc="SAE",
            disable=not w.is_main,
        ) as bar,
    ):
        agreed = t.agree(torch.zeros(2), t.silent_tokens)
        logged = dataclasses.replace(progress)
        while t.goes_on():
            started = time.perf_counter()
            x, waited = reader.next()
            with t.saved_when_left_alone():
                losses, fired = t.gradients(x, agreed.n_dead)
                silent_tokens = (t.silent_tokens + config.batch_size).masked_fill_(fired > 0, 0)
                agreed = t.agree(losses, silent_tokens)
            if agreed.stop:
                t.save()
                return t.stop_signal.number or signal.SIGTERM
            t.check_loss(agreed)
            lr = t.apply(fired, silent_tokens, agreed.main)
            progress.seconds += time.perf_counter() - started
            progress.waited += waited
            bar.update(config.batch_size)

            step = progress.step
            epoch_ends = step % batches.steps_per_epoch == 0
            if step % log_every == 0 or t.checkpoint_due():
                seconds = progress.seconds - logged.seconds
                values = {
                    "train_main": agreed.main,
                    "train_aux": agreed.aux,
                    "train_total": agreed.main + config.aux_loss_coeff * agreed.aux,
                    "train_fvu": agreed.main / t.variance,
                    "dead_frac": sum(agreed.n_dead) / config.n_latents,
                    "longest_silence_tokens": agreed.longest_silence,
                    "learning_rate": lr,
                    "acts_per_s": (step - logged.step) * config.batch_size / seconds,
                    "data_wait_frac": (progress.waited - logged.waited) / seconds,
                }
                if epoch_ends and (quality := t.validate(config.data_dir, manifest, agreed.n_dead)):
                    values |= quality._asdict()
                    progress.val_fvus.append(quality.val_fvu)
                t.log(**values)
                logged = dataclasses.replace(progress)
                postfix = f"loss {values['train_total']:.4f}, FVU {values['train_fvu']:.3f}, "
                bar.set_postfix_str(postfix + f"dead {values['dead_frac']:.1%}", refresh=False)
            with t.saved_when_left_alone():
                if t.checkpoint_due():
                    t.checkpoint()
                elif step % config.replica_check_steps == 0:
                    t.check_replicas()
    return 0


def check_options(config, manifest: dict, size: int) -> None:
    """size: processes. Raises InputError."""
    width = config.latent_parallel
    if size % width or config.n_latents % width:
        raise InputError(
            f"--latent_parallel {width} must divide the {size} processes and --n_latents {config.n_latents}; choose "
            "another."
        )
    if config.batch_size % manifest["batch_size"] or config.batch_size % (size // width):
        raise InputError(
            f"--batch_size {config.batch_size} must be a multiple of the stored batches of {manifest['batch_size']} in "
            f"{config.data_dir} and of the {size // width} processes that share it out; choose another."
        )
    if config.batch_size > manifest["counts"]["train"]:
        raise InputError(
            f"{config.data_dir} has {manifest['counts']['train']} activations to train on, fewer than --batch_size "
            f"{config.batch_size}; capture more or lower it."
        )
    if not 0 < config.k <= config.n_latents:
        raise InputError(f"--k {config.k} must lie between 1 and --n_latents {config.n_latents}.")
    if config.early_stop_epochs and not manifest["validation_shards"]:
        raise InputError(f"{config.data_dir} holds nothing out, --early_stop_epochs needs that; leave it out.")


def starting_sae(config, manifest: dict, mean):
    """The whole SAE as training begins; its weights are left unset where checkpoints hold others."""

    sae = TopKSparseAutoencoder(manifest["d_model"], config.n_latents, config.k, manifest["normalize_eps"])
    if whole_checkpoints(Path(config.checkpoint_dir)):
        return sae
    if not config.model_load_path:
        sae.initialize(mean, torch.Generator().manual_seed(config.seed), config.orthogonal_start)
        return sae
    loaded = load_sae_model(config.model_load_path, normalize_eps=manifest["normalize_eps"], k=config.k)
    if (loaded.d_model, loaded.n_latents) != (sae.d_model, sae.n_latents):
        raise InputError(
            f"{config.model_load_path} has d_model {loaded.d_model} and {loaded.n_latents} latents, this run "
            f"{sae.d_model} and {sae.n_latents}; load another or change --n_latents."
        )
    return loaded.requires_grad_(True)


def announce(t: Training, manifest: dict) -> None:
    """What will be read, written, held in memory and sent; InputError where the disk is too small."""

    config, d_model = t.config, manifest["d_model"]
    sae_bytes = 4 * (2 * config.n_latents * d_model + config.n_latents + d_model)
    present = sum(path.stat().st_size for path in checkpoint_files(t.folder))
    require_disk(t.folder, 3 * sae_bytes * (config.keep_checkpoints + 1) + sae_bytes - present)
    n_slice, share = config.n_latents // t.latents.size, config.batch_size // t.data.size
    rows = min(config.micro_batch_size or share, share)
    block = 4 * n_slice * min(rows, rows_at_once(4 * n_slice, t.w.device))
    copies = 4 if rows == share else 5  # weights, two moments, gradients, those of one micro-batch
    memory = copies * sae_bytes // t.latents.size + block + rows * (24 * d_model + 80 * min(config.k, n_slice))
    t.w.print(
        f"Reading {manifest['counts']['train']:,} activations of {manifest['site']} from {config.data_dir}; "
        f"writing {config.model_save_path} ({gb(sae_bytes)}) and checkpoints ({gb(3 * sae_bytes)} each) to "
        f"{t.folder}; {t.n_steps:,} steps of {config.batch_size} on {t.w.size} x {t.w.device.type}, about "
        f"{gb(memory)} of memory each for the weights, their gradients and moments, and {rows} activations."
    )
    if t.w.size > 1:
        data, latents = map(gb, bytes_sent(config, d_model, t.data.size))
        t.w.print(f"Each process sends in a step {data} of gradients and {latents} between slices of the latents.")


def finish(t: Training, manifest: dict, decides: dict) -> None:
    """Write the SAE, its JSON and figures from the last checkpoint, which holds it whole."""

    config, progress = t.config, t.progress
    state = load_checkpoint(whole_checkpoints(t.folder)[-1], 0, 1)
    sae = TopKSparseAutoencoder(manifest["d_model"], config.n_latents, config.k, manifest["normalize_eps"])
    sae.load_state_dict(state["sae"])
    t.draw(state["counters"]["firing"])
    last, tokens = json.loads(progress.metrics[-1]), progress.step * config.batch_size
    inherited = ("model", "model_dir", "sentences_dir", "site", "layer", "begin_of_text", "bos_id", "max_tokens")
    more = ("rope_scaling_factor", "dataset", "first_validation_sentence")
    quality = {name: last.get(name) for name in (*Validation._fields, "dead_frac")}
    cost = {"tokens": tokens, "seconds": progress.seconds, "acts_per_s": tokens / progress.seconds}
    info = {name: manifest[name] for name in (*inherited, *more)} | {
        "normalization": "layer_norm",
        "activations_dir": manifest["input_dir"],
        "tokens_trained": tokens,
        "quality": quality | cost,
        "config": vars(config),
        "git_commit": git_commit(),
    }
    save_sae(sae, config.model_save_path, info)
    write_manifest(t.folder, _STAGE, complete=True, decides=decides, config=vars(config))
    if t.wandb_run:
        t.wandb_run.finish()
    held_out = "val_fvu" in last and f"FVU {last['val_fvu']:.4f}, L0 {last['val_l0']:.1f} on held-out activations, "
    print(
        f"{held_out or ''}{last['dead_frac']:.1%} dead latents; {cost['acts_per_s']:,.0f} activations/s, "
        f"{progress.waited / progress.seconds:.1%} of the time waiting for data: {config.model_save_path}",
        flush=True,
    )


def main() -> None:
    config = parse_constants(globals())
    manifest = read_manifest(config.data_dir, "sae_preprocessing.py")
    check_files(config.data_dir, manifest["shards"] + manifest["validation_shards"], "sae_preprocessing.py")
    check_options(config, manifest, int(os.environ.get("WORLD_SIZE", 1)))

    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    save_path, folder = Path(config.model_save_path), Path(config.checkpoint_dir)
    b_pre_path = Path(config.b_pre_path or Path(config.data_dir) / manifest["statistics"])
    if not b_pre_path.is_file():
        raise InputError(f"There are no statistics at {b_pre_path}; run sae_preprocessing.py again.")
    statistics = open_shard(b_pre_path, "sae_preprocessing.py")
    variance = float(statistics.get_tensor("var_normalized").mean())
    decides = {name: value for name, value in vars(config).items() if name not in _NOT_IN_THE_RESULT}
    decides["batches"] = [s["sha256"] for s in manifest["shards"]]
    sae = starting_sae(config, manifest, statistics.get_tensor("b_pre").float())

    with world() as w, locked(folder, w.rank, w.barrier):
        done = begin_or_continue(folder, _STAGE, decides) if w.is_main else False
        if w.gather(done)[0] and save_path.exists():
            w.print(f"{save_path} is complete already.")
            return
        data, latents = grid(w, config.latent_parallel)
        sae = sae.slice(latents.rank, latents.size) if latents.size > 1 else sae
        batches = Batches(config.data_dir, manifest, config.batch_size, config.seed)
        t = Training(config, batches, sae, variance, w, data, latents)
        if w.is_main:
            announce(t, manifest)
            delete_checkpoints(folder, config.keep_checkpoints)  # slices without the others
        found = w.gather(whole_checkpoints(folder))[0]
        if found:
            t.load(found[-1])
            w.print(f"Continuing from step {t.progress.step} ({found[-1][0]}).")
        if w.is_main:  # lines beyond the checkpoint come again
            save_path.parent.mkdir(parents=True, exist_ok=True)
            t.metrics_path.write_text("".join(line + "\n" for line in t.progress.metrics))
        if t.goes_on():
            if w.is_main:
                t.wandb_run = start_wandb(config.wandb, folder, vars(config), t.progress.wandb_id)
            t.progress.wandb_id = w.gather(t.wandb_run.id if t.wandb_run else t.progress.wandb_id)[0]
            shards = manifest["shards"] + manifest["validation_shards"]
            mine = shards[w.rank :: w.size]
            with verifying(config.data_dir, mine, "sae_preprocessing.py") as t.verified:
                number = train(t, manifest)
            if number:
                if w.is_main:
                    if t.wandb_run:
                        t.wandb_run.finish(exit_code=1)
                    print(
                        f"\nStopped by {signal.Signals(number).name} after step {t.progress.step}, which is saved; run "
                        "the same command again to continue.",
                        file=sys.stderr,
                        flush=True,
                    )
                exit_at_once(128 + number)
        if w.is_main:
            finish(t, manifest, decides)


if __name__ == "__main__":
    run(main)
