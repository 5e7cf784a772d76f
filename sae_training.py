"""Train a TopK sparse autoencoder on shuffled batches of activations.

Reads   DATA_DIR (sae_preprocessing.py)
Writes  MODEL_SAVE_PATH: the SAE NAME.pth with NAME.json, NAME.metrics.jsonl and NAME.curves.png beside it;
        CHECKPOINT_DIR: checkpoints to resume from
Method  Gao et al. 2024, arXiv:2406.04093; departures from it and from the original are listed in the README
Cost    disk: a checkpoint is three times the SAE; rates in the README's table

    python sae_training.py --data_dir data/batches --model_save_path data/sae.pth
    torchrun --standalone --nproc_per_node=8 sae_training.py --data_dir data/batches --model_save_path data/sae.pth
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import stage

DATA_DIR = "data/batches"  # shuffled batches
B_PRE_PATH: str | None = None  # statistics whose mean_normalized starts b_pre; those of DATA_DIR when not given
MODEL_SAVE_PATH = "data/sae.pth"  # where the trained SAE goes
MODEL_LOAD_PATH: str | None = None  # an SAE to start from instead of a fresh one
CHECKPOINT_DIR = "data/checkpoints"  # folder for checkpoints

N_LATENTS = 2**16  # dictionary size
K = 64  # latents kept per activation
K_AUX = 2048  # dead latents in the auxiliary loss, a power of two near d_model / 2
AUX_LOSS_COEFF = 1 / 32  # weight of the auxiliary loss
DEAD_AFTER_TOKENS = 10_000_000  # activations without firing before a latent counts as dead

NUM_EPOCHS = 10  # passes over the training activations
BATCH_SIZE = 8192  # activations a step, over all processes
LEARNING_RATE = 5e-5  # peak
LEARNING_RATE_MIN_RATIO = 1 / 5  # the cosine ends at this share of the peak
WARMUP_STEPS = 0  # steps of linear warm-up
BETAS = (0.85, 0.9999)  # of AdamW; rare latents need a long second moment
ADAM_EPS = 6.25e-10  # of AdamW
WEIGHT_DECAY = 0.0  # of AdamW; the original's 0.01 shrank silent latents
SEED = 0  # of the initialisation and of the order of batches
LOGS_PER_EPOCH = 1000  # lines in metrics.jsonl an epoch
CHECKPOINTS_PER_EPOCH = 1  # checkpoints an epoch
KEEP_CHECKPOINTS = 2  # newest checkpoints kept
ALLOW_TF32 = False  # on GPUs: TF32 in float32 products
WANDB = "auto"  # auto: online with a key, offline without; online, offline or off

_STAGE = "sae_training.py"


class Batches:
    """Rows of the training shards by global batch, memory-mapped; the order depends on seed and epoch alone."""

    def __init__(self, data_dir: str, manifest: dict, batch_size: int, seed: int):
        from activation_store import open_shard

        self.stored = manifest["batch_size"]
        self.batch_size, self.seed = batch_size, seed
        self.files = [open_shard(Path(data_dir) / s["file"], "sae_preprocessing.py") for s in manifest["shards"]]
        self.where = [  # stored batch -> (shard, first row)
            (i, row) for i, s in enumerate(manifest["shards"]) for row in range(0, s["n_rows"], self.stored)
        ]
        self.per_step = batch_size // self.stored
        self.steps_per_epoch = len(self.where) // self.per_step

    def order(self, epoch: int):
        import numpy as np

        return np.random.default_rng((self.seed, epoch)).permutation(len(self.where))

    def read(self, epoch: int, step: int, rank: int, world_size: int):
        """This process's share of a step's rows, (batch_size / world_size, d_model) bfloat16."""
        import torch

        share = self.batch_size // world_size
        begin, end = rank * share, (rank + 1) * share
        parts = []
        for j, batch in enumerate(self.order(epoch)[step * self.per_step : (step + 1) * self.per_step]):
            first, last = max(begin - j * self.stored, 0), min(end - j * self.stored, self.stored)
            if first < last:
                shard, row = self.where[batch]
                parts.append(self.files[shard].get_slice("acts")[row + first : row + last])
        return torch.cat(parts)


class Validation(NamedTuple):
    main: float  # mean squared error, normalised space
    fvu: float  # fraction of variance unexplained
    l0: float  # kept values above zero per activation


def validate(sae, data_dir: str, manifest: dict, batch_size: int, w) -> Validation | None:
    """Measure the SAE on all held-out activations, shared out over the processes; None where there are none."""
    import torch

    from activation_store import open_shard

    d = sae.d_model
    sums = torch.zeros(2 * d + 3, dtype=torch.float64, device=w.device)  # sum z, sum z^2, squared error, L0, count
    chunk = 0
    with torch.no_grad():
        for record in manifest["validation_shards"]:
            acts = open_shard(Path(data_dir) / record["file"], "sae_preprocessing.py").get_slice("acts")
            for row in range(0, record["n_rows"], batch_size):
                chunk += 1
                if chunk % w.size != w.rank:
                    continue
                z, _, _ = sae.normalize(acts[row : row + batch_size].to(w.device))
                values, indices = sae.encode_normalized(z)
                error = (sae.decode(values, indices) - z).square().sum()
                z = z.double()
                parts = [z.sum(0), z.square().sum(0), error[None], (values > 0).sum()[None], z.new_tensor([len(z)])]
                sums += torch.cat([part.double() for part in parts])
    w.all_reduce(sums)
    total, squares, (error, l0, count) = sums[:d], sums[d : 2 * d], sums[2 * d :].tolist()
    if count == 0:
        return None
    variance = float((squares - total.square() / count).sum())
    return Validation(error / (count * d), error / variance, l0 / count)


def learning_rate(step: int, n_steps: int, peak: float, min_ratio: float, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine from the peak to peak * min_ratio at the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, n_steps - 1 - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * done)) / 2)


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def save_checkpoint(folder: Path, step: int, keep: int, state: dict) -> None:
    import torch

    with stage.atomic_path(folder / f"step-{step:09d}.pt") as temporary:
        torch.save(state, temporary)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()


def plot_curves(metrics_path: Path, png_path: Path) -> None:
    """The four published figures: train total loss, validation loss, dead latents, auxiliary loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    panels = [
        ("train_total", "total loss, training", True),
        ("val_main", "main loss, held out", True),
        ("dead_frac", "dead latents", False),
        ("train_aux", "auxiliary loss, training", False),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), constrained_layout=True)
    for axis, (name, title, log) in zip(axes, panels, strict=True):
        points = [(line["tokens"] / 1e6, line[name]) for line in lines if name in line]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 30 else None, color="tab:blue")
        axis.set_title(title)
        axis.set_xlabel("million activations")
        axis.grid(alpha=0.3)
        if log and any(y > 0 for _, y in points):
            axis.set_yscale("log")
        if name == "dead_frac":
            axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
            axis.set_ylim(bottom=0)
    with stage.atomic_path(png_path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def start_wandb(mode: str, folder: Path, config: dict):
    if mode == "off":
        return None
    import wandb

    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") or wandb.api.api_key else "offline"
    return wandb.init(project="llama3-sae", dir=str(folder), config=config, mode=mode)


def main() -> None:
    config = stage.parse_constants(globals())
    manifest = stage.read_manifest(config.data_dir, "sae_preprocessing.py")
    stage.check_files(config.data_dir, manifest["shards"] + manifest["validation_shards"], "sae_preprocessing.py")
    size = int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % manifest["batch_size"] or config.batch_size % size:
        raise stage.InputError(
            f"--batch_size {config.batch_size} must be a multiple of the stored batches of {manifest['batch_size']} in "
            f"{config.data_dir} and of the {size} processes; choose another."
        )
    if config.batch_size > manifest["counts"]["train"]:
        raise stage.InputError(
            f"{config.data_dir} has {manifest['counts']['train']} activations to train on, fewer than --batch_size "
            f"{config.batch_size}; capture more or lower it."
        )
    if not 0 < config.k <= config.n_latents:
        raise stage.InputError(f"--k {config.k} must lie between 1 and --n_latents {config.n_latents}.")
    import torch

    from activation_store import open_shard
    from distributed import world
    from sae import TopKSparseAutoencoder, beside, load_sae_model, loss_sums, save_sae

    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    save_path = Path(config.model_save_path)
    folder = Path(config.checkpoint_dir)
    b_pre_path = Path(config.b_pre_path or Path(config.data_dir) / manifest["statistics"])
    if not b_pre_path.is_file():
        raise stage.InputError(f"There are no statistics at {b_pre_path}; run sae_preprocessing.py again.")
    statistics = open_shard(b_pre_path, "sae_preprocessing.py")
    d_model = manifest["d_model"]
    decides = {
        name: value
        for name, value in vars(config).items()
        if name
        not in (
            "data_dir",
            "model_save_path",
            "checkpoint_dir",
            "b_pre_path",
            "wandb",
            "keep_checkpoints",
        )
    }
    decides["batches"] = [s["sha256"] for s in manifest["shards"]]

    if config.model_load_path:
        sae = load_sae_model(config.model_load_path, normalize_eps=manifest["normalize_eps"], k=config.k)
        if (sae.d_model, sae.n_latents) != (d_model, config.n_latents):
            raise stage.InputError(
                f"{config.model_load_path} has d_model {sae.d_model} and {sae.n_latents} latents, this run "
                f"{d_model} and {config.n_latents}; load another or change --n_latents."
            )
        sae.requires_grad_(True)
    else:
        sae = TopKSparseAutoencoder(d_model, config.n_latents, config.k, manifest["normalize_eps"])
        generator = torch.Generator().manual_seed(config.seed)
        sae.initialize(statistics.get_tensor("mean_normalized").float(), generator)

    with world() as w, stage.locked(folder, w.rank, w.barrier):
        done = stage.begin_or_continue(folder, _STAGE, decides) if w.is_main else False
        if w.gather(done)[0] and save_path.exists():
            w.print(f"{save_path} is complete already.")
            return
        batches = Batches(config.data_dir, manifest, config.batch_size, config.seed)
        n_steps = batches.steps_per_epoch * config.num_epochs
        sae_bytes = 4 * (2 * config.n_latents * d_model + config.n_latents + d_model)
        if w.is_main:
            stage.require_disk(folder, 3 * sae_bytes * config.keep_checkpoints + sae_bytes)
        w.print(
            f"Reading {manifest['counts']['train']:,} activations of {manifest['site']} from {config.data_dir}; "
            f"writing {save_path} ({stage.gb(sae_bytes)}) and checkpoints ({stage.gb(3 * sae_bytes)} each) to "
            f"{folder}; {n_steps:,} steps of {config.batch_size} on {w.size} x {w.device.type}."
        )

        sae.to(w.device)
        optimizer = torch.optim.AdamW(
            sae.parameters(),
            lr=config.learning_rate,
            betas=tuple(config.betas),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        silent_tokens = torch.zeros(config.n_latents, dtype=torch.int64, device=w.device)  # since each last fired
        step = 0
        metrics_path = beside(save_path, "metrics.jsonl")
        metrics: list[str] = []
        if found := checkpoints(folder):
            state = torch.load(found[-1], map_location="cpu", weights_only=True)
            sae.load_state_dict(state["sae"])
            optimizer.load_state_dict(state["optimizer"])
            silent_tokens.copy_(state["silent_tokens"])
            step, metrics = state["step"], state["metrics"]
            w.print(f"Continuing from step {step} ({found[-1]}).")
        if w.is_main:  # lines beyond the checkpoint come again
            save_path.parent.mkdir(parents=True, exist_ok=True)
            metrics_path.write_text("".join(line + "\n" for line in metrics))
        wandb_run = start_wandb(config.wandb, folder, vars(config)) if w.is_main else None
        variance = float(statistics.get_tensor("var_normalized").mean())
        scale = 1 / (config.batch_size * d_model)

        def log(**values: float) -> None:
            tokens = step * config.batch_size
            metrics.append(json.dumps({"step": step, "tokens": tokens, **values}))
            if w.is_main:
                with open(metrics_path, "a") as file:
                    file.write(metrics[-1] + "\n")
                if wandb_run:
                    wandb_run.log(values, step=step)

        def checkpoint() -> None:
            if w.is_main:
                state = {"sae": sae.state_dict(), "optimizer": optimizer.state_dict(), "silent_tokens": silent_tokens}
                save_checkpoint(folder, step, config.keep_checkpoints, {**state, "step": step, "metrics": metrics})
                plot_curves(metrics_path, beside(save_path, "curves.png"))
            w.barrier()

        per_epoch = batches.steps_per_epoch
        log_every = max(1, per_epoch // config.logs_per_epoch)
        checkpoint_every = max(1, per_epoch // config.checkpoints_per_epoch)
        read = lambda s: batches.read(s // per_epoch, s % per_epoch, w.rank, w.size)
        with (
            ThreadPoolExecutor(1) as reader,
            stage.progress(
                total=n_steps * config.batch_size,
                initial=step * config.batch_size,
                unit="act",
                unit_scale=True,
                desc="SAE",
                disable=not w.is_main,
            ) as bar,
        ):
            ahead = reader.submit(read, step) if step < n_steps else None
            while step < n_steps:
                x = ahead.result().to(w.device)
                if step + 1 < n_steps:
                    ahead = reader.submit(read, step + 1)
                z, _, _ = sae.normalize(x)
                dead = (silent_tokens >= config.dead_after_tokens).nonzero().flatten()
                sums = loss_sums(sae, z, dead, config.k_aux)
                ((sums.main + config.aux_loss_coeff * sums.aux) * scale).backward()
                fired = sums.fired
                for tensor in (*(p.grad for p in sae.parameters()), fired):
                    w.all_reduce(tensor)
                sae.project_decoder_grad()
                lr = learning_rate(
                    step, n_steps, config.learning_rate, config.learning_rate_min_ratio, config.warmup_steps
                )
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
                sae.normalize_decoder()
                silent_tokens += config.batch_size
                silent_tokens[fired > 0] = 0
                step += 1
                bar.update(config.batch_size)

                epoch_ends = step % per_epoch == 0
                if step % log_every == 0 or step % checkpoint_every == 0 or epoch_ends:
                    main_loss, aux_loss = (w.all_reduce(torch.stack([sums.main, sums.aux]).detach()) * scale).tolist()
                    if not math.isfinite(main_loss + aux_loss):
                        good = checkpoints(folder)
                        raise stage.InputError(
                            f"The loss is {main_loss} at step {step} (batches of {config.data_dir}); lower "
                            f"--learning_rate or continue from {good[-1] if good else 'the start'}."
                        )
                    dead_frac = float((silent_tokens >= config.dead_after_tokens).float().mean())
                    values = {
                        "train_main": main_loss,
                        "train_aux": aux_loss,
                        "train_total": main_loss + config.aux_loss_coeff * aux_loss,
                        "train_fvu": main_loss / variance,
                        "dead_frac": dead_frac,
                        "longest_silence_tokens": int(silent_tokens.max()),
                        "learning_rate": lr,
                    }
                    if epoch_ends:
                        quality = validate(sae, config.data_dir, manifest, config.batch_size, w)
                    if epoch_ends and quality:
                        values |= {"val_main": quality.main, "val_fvu": quality.fvu, "val_l0": quality.l0}
                    log(**values)
                    fvu = main_loss / variance
                    bar.set_postfix_str(f"loss {main_loss:.4f}, FVU {fvu:.3f}, dead {dead_frac:.1%}", refresh=False)
                if step % checkpoint_every == 0 or epoch_ends:
                    checkpoint()

        last = json.loads(metrics[-1])
        inherited = ("model", "model_dir", "sentences_dir", "site", "layer", "begin_of_text", "bos_id", "max_tokens")
        more = ("rope_scaling_factor", "dataset", "first_validation_sentence")
        info = {name: manifest[name] for name in (*inherited, *more)}
        info |= {
            "normalization": "layer_norm",
            "activations_dir": manifest["input_dir"],
            "tokens_trained": step * config.batch_size,
            "quality": {name: last.get(name) for name in ("val_main", "val_fvu", "val_l0", "dead_frac")},
            "config": vars(config),
            "git_commit": stage.git_commit(),
        }
        if w.is_main:
            save_sae(sae, save_path, info)
            stage.write_manifest(folder, _STAGE, complete=True, decides=decides, config=vars(config))
            if wandb_run:
                wandb_run.finish()
        quality = ""
        if "val_fvu" in last:
            quality = f"FVU {last['val_fvu']:.4f}, L0 {last['val_l0']:.1f} on held-out activations, "
        w.print(f"{quality}{last['dead_frac']:.1%} dead latents: {save_path}")


if __name__ == "__main__":
    stage.run(main)
