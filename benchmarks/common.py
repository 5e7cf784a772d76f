"""Shared by the benchmarks. Importing it puts the project on sys.path, so import it before the project's rooms."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embedded.recipe import command, run_command

T = TypeVar("T")


def run_script(script: str, **options: Any) -> None:
    """Run a script of the project, in one process, hiding what it prints. Raises Stop if it fails."""
    run_command(command(script, **options), quiet=True)


def timed(function: Callable[..., T], *arguments: object) -> tuple[float, T]:
    """Seconds, and what the function returned."""
    started = time.perf_counter()
    found = function(*arguments)
    return time.perf_counter() - started, found


def median_rates(n: float, seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """n things per second for each way, from the median of its runs."""
    return {way: n / median(times) for way, times in seconds.items()}


def spread(seconds: Mapping[str, Sequence[float]]) -> float:
    """Slowest over fastest run, for the way in which they differ most."""
    return max(max(times) / min(times) for times in seconds.values())


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def machine() -> str:
    return f"{os.cpu_count()} cores, {processor()}"
