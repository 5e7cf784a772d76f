"""Figures without a window."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, **options: Any) -> "Figure":
    """An empty figure of width x height inches. Imports matplotlib only here: it takes a third of a second."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", **options)


def save_figure(figure: "Figure", path: Path | str, dpi: int = 110) -> None:
    """Write a PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
