"""What one watches sae_training.py by: training curves, how often latents fire, Weights & Biases."""

import json
import math
import os
from pathlib import Path

import numpy as np

from pipeline.errors import InputError
from pipeline.files import atomic_path


def plot_curves(metrics: list[str], png_path: Path) -> None:
    """The four published figures: total loss in training and held out, dead latents, auxiliary loss.

    metrics: lines of metrics.jsonl.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in metrics]
    panels = [
        ("train_total", "total loss, training", True),
        ("val_total", "total loss, held out", True),
        ("dead_frac", "dead latents", False),
        ("train_aux", "auxiliary loss, training", False),
    ]
    end = lines[-1]["tokens"] / 1e6
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), constrained_layout=True)
    for axis, (name, title, log) in zip(axes, panels, strict=True):
        points = [(line["tokens"] / 1e6, line[name]) for line in lines if name in line]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 30 else None, color="tab:blue")
        axis.set_title(title)
        axis.set_xlabel("million activations")
        axis.grid(alpha=0.3)
        axis.set_xlim(0, 1.02 * end)
        if log and any(y > 0 for _, y in points):
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, max([1.05 * y for _, y in points if y > 0], default=1.0))
        if name == "dead_frac":
            axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    with atomic_path(png_path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def plot_frequencies(firing, n_activations: int, png_path: Path) -> None:
    """On what share of activations each latent fired, as a histogram; those that never did apart.

    firing: (n_latents,), how many of the last n_activations each latent fired on.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = np.asarray(firing)
    fired = np.log10(counts[counts > 0] / n_activations)
    floor = math.floor(-math.log10(n_activations))
    bins = np.arange(floor, 0.01, 0.25)
    figure, axis = plt.subplots(figsize=(7, 3.6), constrained_layout=True)
    axis.hist(fired, bins=bins, color="tab:blue", label=f"{len(fired):,} latents that fired")
    silent = len(counts) - len(fired)
    axis.bar(floor - 0.5, silent, width=0.4, color="tab:gray", label=f"{silent:,} that never fired")
    ticks = range(floor, 1)
    axis.set_xticks([floor - 0.5, *ticks], ["never", *(f"$10^{{{tick}}}$" for tick in ticks)])
    axis.set_xlabel(f"share of the last {n_activations:,} activations that a latent fired on")
    axis.set_ylabel("latents")
    axis.set_axisbelow(True)
    axis.grid(alpha=0.3)
    axis.legend()
    with atomic_path(png_path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def start_wandb(mode: str, folder: Path, config: dict, run_id: str | None):
    """run_id: of the run to continue, if any. None where W&B is off."""
    if mode == "off":
        return None
    import wandb

    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") or wandb.api.api_key else "offline"
    try:
        return wandb.init(
            project="llama3-sae",
            dir=str(folder),
            config=config,
            mode=mode,
            id=run_id,
            resume="allow" if run_id else None,
        )
    except wandb.Error as error:
        raise InputError(f"Weights & Biases does not start ({error}); use --wandb offline or off.") from None
