"""Monitoring sae_training.py: training curves, how often latents fire, Weights & Biases."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from autoencoder.frequencies import draw_histogram, frequency_histogram
from pipeline.errors import InputError
from pipeline.figures import new_figure, save_figure

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run as WandbRun

WandbMode = Literal["auto", "online", "offline", "off"]

_PANELS = (  # name in metrics.jsonl, title, whether its axis is logarithmic
    ("train_total", "total loss, training", True),
    ("val_total", "total loss, held out", True),
    ("dead_frac", "dead latents", False),
    ("train_aux", "auxiliary loss, training", False),
)


def plot_curves(metrics: list[str], png_path: Path) -> None:
    """The four published figures: total loss in training and held out, dead latents, auxiliary loss.

    metrics: lines of metrics.jsonl.
    """
    from matplotlib.ticker import PercentFormatter

    lines = [json.loads(line) for line in metrics]
    end = lines[-1]["tokens"] / 1e6
    figure = new_figure(16, 3.6)
    for axis, (name, title, log) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
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
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    save_figure(figure, png_path)


def plot_frequencies(firing: Tensor, n_activations: int, png_path: Path) -> None:
    """A histogram of the share of activations each latent fired on; latents that never fired stand apart, in grey.

    firing: (n_latents), how many of the last n_activations each latent fired on.
    """
    fired = firing[firing > 0].tolist()
    n_silent = len(firing) - len(fired)
    histogram = frequency_histogram(fired, n_activations)
    figure = new_figure(7, 3.6)
    axis = figure.subplots()
    draw_histogram(axis, histogram, f"{len(fired):,} latents that fired")
    never = histogram.log10_edges[0] - 0.5
    axis.bar(never, n_silent, width=0.4, color="tab:gray", label=f"{n_silent:,} that never fired")
    axis.set_xlabel(f"share of the last {n_activations:,} activations that a latent fired on")
    axis.set_axisbelow(True)
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, png_path)


def start_wandb(mode: WandbMode, folder: Path, config: dict[str, Any], run_id: str | None) -> "WandbRun | None":
    """The run, None if W&B is off. run_id: the id of the run to continue, if any."""
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
