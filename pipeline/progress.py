"""What a stage shows while it works: a progress bar, sizes and durations in words."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(*args: Any, **kwargs: Any) -> tqdm:
    """tqdm with rate and time left; in a log file, which nobody watches, only a line every 15 seconds."""
    watched = sys.stderr.isatty()
    return tqdm(*args, **{"dynamic_ncols": True, "mininterval": 0.2 if watched else 15.0, **kwargs})


def gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
