"""Counters of the server in Prometheus' text format (version 0.0.4)."""

import bisect
import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Sequence

from serving.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # upper bounds of a histogram's buckets


class Histogram:
    """How often a duration fell below each of _SECONDS."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts = [0] * (len(_SECONDS) + 1)  # the last: above all of them
        self.total = 0.0

    def add(self, seconds: float) -> None:
        with self._lock:
            self.counts[bisect.bisect_left(_SECONDS, seconds)] += 1
            self.total += seconds

    def lines(self, name: str) -> Iterable[str]:
        bounds = [*map(str, _SECONDS), "+Inf"]
        for bound, count in zip(bounds, itertools.accumulate(self.counts), strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {sum(self.counts)}"


class Metrics:
    """What the server counts itself; the engine counts its own."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()  # by path and status
        self.first_token = Histogram()  # seconds from a request to its first token
        self.whole = Histogram()  # seconds from a request to its end


def exposition(metrics: Metrics, engine: Engine) -> str:
    """All of them as text."""
    counts = engine.counts
    responses = [(f'{{path="{path}",status="{status}"}}', n) for (path, status), n in sorted(metrics.responses.items())]
    values: list[tuple[str, str, str, Sequence[tuple[str, float]]]] = [
        ("llama_responses_total", "counter", "Responses begun, by path and status.", responses),
        ("llama_rows", "gauge", "Completions in the batch.", [("", engine.n_rows)]),
        ("llama_rows_waiting", "gauge", "Completions waiting for a place in the batch.", [("", engine.n_waiting)]),
        (
            "llama_rows_ended_total",
            "counter",
            "Completions ended, by reason.",
            [(f'{{reason="{reason}"}}', n) for reason, n in counts.rows.items()],
        ),
        ("llama_refused_total", "counter", "Requests refused because too many waited.", [("", counts.refused)]),
        ("llama_steps_total", "counter", "Forward passes over the batch.", [("", counts.steps)]),
        ("llama_prompt_tokens_total", "counter", "Tokens of prompts read.", [("", counts.prompt_tokens)]),
        ("llama_new_tokens_total", "counter", "Tokens generated.", [("", counts.new_tokens)]),
    ]
    lines = []
    for name, kind, about, samples in values:
        lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{labels} {value}" for labels, value in samples]
    histograms = (
        ("llama_first_token_seconds", "From a request to its first token.", metrics.first_token),
        ("llama_request_seconds", "From a request to the end of its answer.", metrics.whole),
    )
    for name, about, histogram in histograms:
        lines += [f"# HELP {name} {about}", f"# TYPE {name} histogram", *histogram.lines(name)]
    return "\n".join(lines) + "\n"
