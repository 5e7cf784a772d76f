"""How often latents fire: the histogram that training and evaluation draw, and its axis."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from autoencoder.measures import DENSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS_PER_DECADE = 3


class FrequencyHistogram(NamedTuple):
    """Latents by the log10 of the share of tokens on which they fire; silent ones are left out."""

    log10_edges: list[float]  # up to 0
    latents: list[int]  # in each bin, lower edge excluded, upper edge included


def frequency_histogram(fired: Iterable[int], n_tokens: int) -> FrequencyHistogram:
    """fired: how many of n_tokens each latent fired on, without zeros."""
    n_bins = math.ceil(_BINS_PER_DECADE * math.log10(max(n_tokens, 2)))
    latents = [0] * n_bins
    for n in fired:
        latents[min(n_bins - 1, max(0, n_bins - 1 + math.ceil(_BINS_PER_DECADE * math.log10(n / n_tokens))))] += 1
    return FrequencyHistogram([(i - n_bins) / _BINS_PER_DECADE for i in range(n_bins + 1)], latents)


def draw_histogram(axis: "Axes", histogram: FrequencyHistogram, label: str = "") -> None:
    """Bars, dense latents in orange."""
    starts = histogram.log10_edges[:-1]
    colors = ["tab:orange" if start >= math.log10(DENSE) else "tab:blue" for start in starts]
    width = 1 / _BINS_PER_DECADE
    axis.bar(starts, histogram.latents, width, align="edge", color=colors, edgecolor="white", label=label)
    frequency_axis(axis, starts[0])


def frequency_axis(axis: "Axes", lowest: float) -> None:
    """Ticks for log10 of a share of tokens."""
    decades = range(math.ceil(lowest), 1)
    axis.set_xticks(decades, [f"{100 * 10.0**decade:.10g}%" for decade in decades])
    axis.set(xlabel="share of tokens that a latent fires on", ylabel="latents")
    axis.axvline(math.log10(DENSE), color="grey", linewidth=1, linestyle=":")
