"""Results as text tables of at most 80 columns, and as pictures."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from pipeline.figures import new_figure, save_figure

WIDTH = 80  # columns of a table


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """Columns as wide as they need, the first `left` and all texts aligned left, lines cut at 80 columns."""
    cells = [[each if isinstance(each, str) else f"{each:.3g}" for each in row] for row in rows]
    widths = [max(map(columns_of, column)) for column in zip(heads, *cells, strict=True)]
    is_text = [i < left or any(isinstance(row[i], str) for row in rows) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        parts = []
        for text, width, to_left in zip(row, widths, is_text, strict=True):
            space = " " * (width - columns_of(text))
            parts.append(text + space if to_left else space + text)
        return cut("  ".join(parts).rstrip(), WIDTH)

    return "\n".join(map(line, [list(heads), *cells]))


def columns_of(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)


def heat_map(
    path: Path | str,
    values: Tensor,
    rows: str,
    columns: Sequence[str] | str,
    title: str,
    texts: Sequence[Sequence[str]] | None = None,
    centred: bool = True,
) -> None:
    """A PNG of values (n_rows, n_columns), row 0 at the bottom. columns: a name, or the text of each.

    texts: written into the cells. centred: colours for both signs, white at 0; else one colour from 0 on.
    """
    array = values.float().numpy()
    n_rows, n_columns = array.shape
    cell = 0.75 if texts else max(0.16, min(0.5, 6 / n_columns))
    figure = new_figure(max(5.0, 2 + cell * n_columns), max(3.0, 1.6 + (0.24 if texts else 0.17) * n_rows))
    axes = figure.subplots()
    most = max(float(np.nanmax(np.abs(array))), 1e-9)
    low, colours = (-most, "RdBu_r") if centred else (0.0, "Blues")
    image = axes.imshow(array, cmap=colours, vmin=low, vmax=most, aspect="auto", origin="lower")
    figure.colorbar(image, ax=axes)
    axes.set(title=title, ylabel=rows)
    if isinstance(columns, str):
        axes.set_xlabel(columns)
    else:
        axes.set_xticks(range(n_columns), columns, rotation=60, ha="right", fontsize=8, parse_math=False)
    for i, line in enumerate(texts or ()):
        for j, text in enumerate(line):
            dark = abs(array[i, j]) > 0.6 * most
            axes.text(
                j, i, cut(text, 9), ha="center", va="center", fontsize=6, color="white" if dark else "black",
                parse_math=False,
            )  # fmt: skip
    save_figure(figure, path)


def pattern_grid(path: Path | str, patterns: Tensor, tokens: Sequence[str], layer: int) -> None:
    """A PNG of every head's pattern, (n_heads, query, key), queries from the top down."""
    n_heads, n_tokens, _ = patterns.shape
    n_columns = min(4, n_heads)
    n_rows = -(-n_heads // n_columns)
    figure = new_figure(3 * n_columns, 3 * n_rows + 0.4)
    grid = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for head, axes in enumerate(grid):
        if head >= n_heads:
            axes.set_axis_off()
            continue
        axes.imshow(patterns[head].numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"head {layer}.{head}", fontsize=9)
        if n_tokens <= 24:
            axes.set_xticks(range(n_tokens), tokens, rotation=90, fontsize=6, parse_math=False)
            axes.set_yticks(range(n_tokens), tokens, fontsize=6, parse_math=False)
    figure.suptitle("Where each token (row) looks (column)")
    save_figure(figure, path)


def all_patterns(path: Path | str, patterns: Tensor) -> None:
    """A PNG of all patterns, (n_layers, n_heads, query, key), as one map: a row per layer, the first at the top."""
    n_layers, n_heads, n_tokens, _ = patterns.shape
    step = n_tokens + max(1, n_tokens // 12)  # with a gap
    image = np.full((n_layers * step, n_heads * step), np.nan, np.float32)
    for layer in range(n_layers):
        for head in range(n_heads):
            at = slice(layer * step, layer * step + n_tokens), slice(head * step, head * step + n_tokens)
            image[at] = patterns[layer, head].numpy()
    figure = new_figure(1 + 0.6 * n_heads, 1 + 0.6 * n_layers)
    axes = figure.subplots()
    axes.imshow(image, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    middle = n_tokens / 2
    axes.set_xticks([middle + i * step for i in range(n_heads)], [str(i) for i in range(n_heads)], fontsize=7)
    axes.set_yticks([middle + i * step for i in range(n_layers)], [str(i) for i in range(n_layers)], fontsize=7)
    axes.set(title="Where tokens (rows) look (columns)", xlabel="head", ylabel="layer")
    save_figure(figure, path)


def score_maps(path: Path | str, maps: dict[str, Tensor]) -> None:
    """A PNG of several maps (n_layers, n_heads) side by side, from 0 to 1."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(3.2 * len(maps), 5)
    for axes, (name, values) in zip(figure.subplots(1, len(maps)), maps.items(), strict=True):
        image = axes.imshow(values.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
        axes.set(title=name, xlabel="head", ylabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes)
    save_figure(figure, path)


def bars(path: Path | str, amounts: dict[str, float], title: str) -> None:
    """A PNG of named amounts, the first at the top."""
    figure = new_figure(7, 1 + 0.24 * len(amounts))
    axes = figure.subplots()
    colours = ["tab:blue" if value < 0 else "tab:orange" for value in amounts.values()]
    axes.barh(range(len(amounts)), list(amounts.values()), color=colours)
    axes.set_yticks(range(len(amounts)), [cut(name, 48) for name in amounts], fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set(title=title)
    save_figure(figure, path)
