"""Many prompts continued by one model together: continuous batching.

One step is one forward pass that gives every row its next token. Rows come and go between steps (Yu et al. 2022,
"Orca", OSDI, section 3.1), so a short answer never waits for a long one. All rows share one padded cache: the row in
slot i is filled to its own length. A new prompt is read into the next free slot in parts of _PART tokens, and between
two steps about one part is read, so that a long prompt does not silence the others.

Each row has its own steering, sampling and seed and sees nothing of its neighbours: it says what
`llama_3.generation.generate` says, up to rounding, which may differ with the number of rows.
"""

import collections
import contextlib
import functools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from llama_3.generation import overflow, sample, says_something
from llama_3.model import Cache, Intervention, LayerCache, Transformer
from pipeline.errors import Stop

_PART = 64  # tokens of a prompt read at once
_LEAST_LENGTH = 256  # positions that the cache has room for at first

Reason = Literal["stop", "length", "cancelled", "error"]


# ---- rows


class Token(NamedTuple):
    """The next token of a row."""

    id: int
    logprob: float | None = None  # None where the row did not ask
    likeliest: Sequence[tuple[int, float]] = ()  # tokens and their logprobs, likeliest first


class Ended(NamedTuple):
    """The end of a row; nothing comes after it."""

    reason: Reason  # stop: by a token, or because its receiver wanted no more
    error: Exception | None = None


@dataclass(eq=False)
class Row:
    """A prompt to continue.

    tell is called in the engine's thread with every Token, to say whether it wants another, and in the end once with
    Ended. Logprobs are natural, of the (steered) model before temperature and top_p.
    """

    prompt: Sequence[int]  # at least one token
    max_new_tokens: int
    stop_tokens: Collection[int]
    tell: Callable[[Token | Ended], bool] = lambda event: True
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    steering: Sequence[Intervention] = ()  # without positions or heads
    n_logprobs: int | None = None  # likeliest tokens told beside each token's own logprob; None: no logprobs
    cancelled: bool = False  # set from any thread: the row leaves before the next step

    generator: torch.Generator = field(init=False, repr=False)
    last: int = field(default=-1, init=False)
    n_new: int = field(default=0, init=False)
    began: float = field(default=0.0, init=False)  # time.monotonic()

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)


class Full(Stop):
    """No more rows can wait. retry_after: seconds after which one may try again."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDown(Stop):
    """The engine takes no more rows, or has ended this one before its time."""


_SHUTTING_DOWN = "The server is shutting down; send the request again later."


# ---- the padded cache


class Slots:
    """One key/value cache for rows of different lengths. Slot i has `filled[i]` positions; the rest of it is zeros, so
    that nothing a row leaves behind, not even NaN, reaches the next one through the mask."""

    def __init__(self, model: Transformer, max_slots: int):
        self.model, self.max_slots = model, max_slots
        self.layers: list[LayerCache] = []
        self.filled = [0] * max_slots

    @property
    def room(self) -> tuple[int, int]:
        """Slots, and positions of each."""
        if not self.layers:
            return 0, 0
        n_slots, length, *_ = self.layers[0].keys.shape
        return n_slots, length

    def reserve(self, n_slots: int, length: int) -> None:
        """Make room for n_slots of `length` positions, at least twice what there was if there is too little."""
        slots, positions = self.room
        if n_slots <= slots and length <= positions:
            return
        if n_slots > slots:
            slots = min(max(n_slots, 2 * slots), self.max_slots)
        if length > positions:
            positions = min(max(length, 2 * positions, _LEAST_LENGTH), self.model.args.max_seq_len)
        old, (n_old, length_old) = self.layers, self.room
        self.layers = self.model.new_cache(slots, positions).layers
        for new_layer, old_layer in zip(self.layers, old, strict=False):
            for new, before in zip(new_layer, old_layer, strict=True):
                new[:n_old, :length_old] = before

    def one(self, slot: int) -> Cache:
        """The cache of one slot."""
        cache = Cache([LayerCache(keys[slot : slot + 1], values[slot : slot + 1]) for keys, values in self.layers])
        cache.length = self.filled[slot]
        return cache

    def first(self, n: int) -> Cache:
        """The cache of the first n slots."""
        return Cache([LayerCache(keys[:n], values[:n]) for keys, values in self.layers], self.filled[:n])

    def move(self, source: int, target: int) -> None:
        """Move the row in slot `source` to `target`, whose own is lost."""
        n = max(self.filled[source], self.filled[target])
        for layer in self.layers:
            for x in layer:
                x[target, :n] = x[source, :n]
        self.filled[target] = self.filled[source]
        self.clear(source)

    def clear(self, slot: int) -> None:
        for layer in self.layers:
            for x in layer:
                x[slot, : self.filled[slot]] = 0
        self.filled[slot] = 0


# ---- steering of rows


def for_rows(steering: Sequence[Sequence[Intervention]], device: torch.device) -> list[Intervention]:
    """Interventions on a batch that give row i what steering[i] says, in that order. One per site."""
    kinds: dict[tuple, dict[Callable[[Tensor], Tensor], list[int]]] = {}
    for row, interventions in enumerate(steering):
        for each in interventions:
            functions = kinds.setdefault((each.site, tuple(each.skip_tokens)), {})
            functions.setdefault(each.fn, []).append(row)
    found = []
    for (site, skip), functions in kinds.items():
        on_device = tuple((f, torch.tensor(rows, device=device)) for f, rows in functions.items())
        found.append(Intervention(site, functools.partial(_change, on_device), skip))
    return found


def _change(functions: Sequence[tuple[Callable[[Tensor], Tensor], Tensor]], x: Tensor) -> Tensor:
    """x: (batch, seq, d_model), changed in place. functions: each with the rows that it changes."""
    for function, rows in functions:
        x[rows] = function(x[rows])
    return x


# ---- the engine


class Counts:
    """What the engine has done since it began."""

    def __init__(self) -> None:
        self.steps = self.prompt_tokens = self.new_tokens = self.refused = 0
        self.rows: dict[Reason, int] = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}


class Engine:
    """Continues rows in a thread of its own, the only one that computes with the model.

    max_rows: continued together; max_waiting: rows that may wait for a place. Close it in the end.
    """

    def __init__(self, model: Transformer, max_rows: int, max_waiting: int):
        self.model, self.max_rows, self.max_waiting = model, max_rows, max_waiting
        self.counts = Counts()
        self._slots = Slots(model, max_rows)
        self._rows: list[Row] = []  # row i is in slot i
        self._reading: Row | None = None  # in the slot after the last row
        self._steering: list[Intervention] | None = None  # of all rows together; None after one came or left
        self._changed = threading.Condition()  # guards the fields below
        self._waiting: collections.deque[Row] = collections.deque()
        self._work: collections.deque[tuple[Generator[None, None, Any], Future]] = collections.deque()
        self._ends_at: float | None = None  # time.monotonic() at which rows are given up; None: not closing
        self._row_s = 1.0  # seconds a row takes, averaged over the last ones
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- from any thread

    def submit(self, rows: Sequence[Row]) -> None:
        """Continue these rows. Raises Full, for all of them, where there is no room, and ShuttingDown."""
        with self._changed:
            if self._ends_at is not None:
                raise ShuttingDown(_SHUTTING_DOWN)
            if self.n_rows + len(self._waiting) + len(rows) > self.max_rows + self.max_waiting:
                self.counts.refused += 1
                seconds = max(1, min(60, round(self._row_s * len(rows) / self.max_rows)))
                raise Full(f"{len(self._waiting)} completions are waiting already; try again later.", seconds)
            self._waiting.extend(rows)
            self._changed.notify_all()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Let the rows go before the next step. Does nothing to those that have ended."""
        with self._changed:
            for row in rows:
                row.cancelled = True
            self._changed.notify_all()

    def work(self, steps: Generator[None, None, Any]) -> Future:
        """What the generator returns. It is advanced once between two steps of the rows, so it should yield often.

        Raises Full where as much work is waiting as rows may wait.
        """
        future: Future = Future()
        with self._changed:
            if self._ends_at is not None:
                raise ShuttingDown(_SHUTTING_DOWN)
            if len(self._work) >= max(1, self.max_waiting):
                self.counts.refused += 1
                raise Full(f"{len(self._work)} requests are waiting already; try again later.", 1)
            self._work.append((steps, future))
            self._changed.notify_all()
        return future

    def stream(self, rows: Sequence[Row]) -> Iterator[tuple[int, Token | Ended]]:
        """Continue rows from a thread of one's own: (row, event) as they come. Leaving the iterator cancels them."""
        events: queue.SimpleQueue[tuple[int, Token | Ended]] = queue.SimpleQueue()
        for number, row in enumerate(rows):
            row.tell = lambda event, number=number: events.put((number, event)) or True
        self.submit(rows)
        n_open = len(rows)
        try:
            while n_open:
                number, event = events.get()
                n_open -= isinstance(event, Ended)
                yield number, event
        finally:
            self.cancel(rows)

    def tokens(self, rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
        """`stream` where only tokens are of interest: (row, token). Raises the error of a row that fails."""
        for number, event in self.stream(rows):
            if isinstance(event, Token):
                yield number, event.id
            elif event.error is not None:
                raise event.error

    @property
    def n_rows(self) -> int:
        """Rows in the cache."""
        return len(self._rows) + (self._reading is not None)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def close(self, grace_s: float = 0.0) -> None:
        """Refuse new rows, end the waiting ones, and after grace_s also the others. Returns at once; see `join`."""
        with self._changed:
            if self._ends_at is None:
                self._ends_at = time.monotonic() + grace_s
            self._changed.notify_all()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until a closed engine has ended."""
        self._thread.join(timeout_s)

    # ---- in the engine's thread

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    while not (self._rows or self._reading or self._waiting or self._work or self._ends_at):
                        self._changed.wait()
                if self._ends_at is not None and not self._goes_on():
                    return
                try:
                    self._turn()
                except Exception as error:  # nobody's own: memory, or a mistake here
                    self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """End all rows in the cache, and begin a new one."""
        rows, self._rows, self._reading, self._steering = self._in_cache(), [], None, None
        self._slots = Slots(self.model, self.max_rows)
        traceback.print_exception(error)
        for row in rows:
            self._tell_end(row, Ended("error", error))

    def _turn(self) -> None:
        """Rows leave, prompts are read, every row gets a token, other work goes on."""
        for row in self._in_cache():
            if row.cancelled:
                self._end(row, Ended("cancelled"))
        with self._changed:
            gone = [row for row in self._waiting if row.cancelled]
            for row in gone:
                self._waiting.remove(row)
        for row in gone:
            self._tell_end(row, Ended("cancelled"))
        self._read_prompts()
        if self._rows:
            self._step()
        self._advance_work()

    def _goes_on(self) -> bool:
        """Whether a closing engine still has rows to end in peace."""
        with self._changed:
            waiting, work = [*self._waiting], [*self._work]
            self._waiting.clear()
            self._work.clear()
        for row in waiting:
            self._tell_end(row, Ended("error", ShuttingDown(_SHUTTING_DOWN)))
        for steps, future in work:
            steps.close()
            _settle(future, ShuttingDown(_SHUTTING_DOWN))
        if self._ends_at is not None and time.monotonic() > self._ends_at:
            for row in self._in_cache():
                self._end(row, Ended("error", ShuttingDown(_SHUTTING_DOWN)))
        return bool(self._rows or self._reading)

    def _in_cache(self) -> list[Row]:
        return [*self._rows, *([self._reading] if self._reading else [])]

    def _read_prompts(self) -> None:
        """About one part of a prompt, or several short prompts. Parts begin at multiples of _PART, however busy it is,
        so that rounding does not depend on the neighbours."""
        n_read = 0
        while n_read < _PART:
            if self._reading is None and len(self._rows) < self.max_rows:
                with self._changed:
                    self._reading = self._waiting.popleft() if self._waiting else None
            if self._reading is None:
                return
            n_read += self._read_part(self._reading)

    def _read_part(self, row: Row) -> int:
        """Read the next tokens of a prompt; with the last of them comes the row's first token. Returns their number."""
        slot = len(self._rows)
        begin = self._slots.filled[slot]
        part = row.prompt[begin : begin + _PART]
        row.began = row.began or time.monotonic()
        try:
            self._slots.reserve(slot + 1, begin + len(part))
            cache = self._slots.one(slot)
            self._slots.filled[slot] += len(part)  # also if it fails halfway
            logits = self._forward([part], cache, row.steering)
        except Exception as error:  # this row's own: its steering, or memory
            self._end(row, _failed(error))
            return len(part)
        self.counts.prompt_tokens += len(part)
        if self._slots.filled[slot] == len(row.prompt):
            self._reading, self._steering = None, None
            self._rows.append(row)
            self._give([row], logits)
        return len(part)

    def _step(self) -> None:
        """The next token of every row."""
        n = len(self._rows)
        if self._steering is None:
            self._steering = for_rows([row.steering for row in self._rows], self.model.device)
        self._slots.reserve(n, max(self._slots.filled[:n]) + 1)
        cache = self._slots.one(0) if n == 1 else self._slots.first(n)
        for slot in range(n):
            self._slots.filled[slot] += 1
        logits = self._forward([[row.last] for row in self._rows], cache, self._steering)
        self.counts.steps += 1
        self._give(self._rows[:], logits)

    def _forward(self, tokens: Sequence[Sequence[int]], cache: Cache, steering: Sequence[Intervention]) -> Tensor:
        """Logits of the next token, (batch, vocab_size)."""
        with contextlib.ExitStack() as stack:
            for each in steering:
                stack.enter_context(self.model.intervene(*each))
            return self.model(torch.tensor(tokens, device=self.model.device), cache, last_only=True)[:, 0]

    def _give(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Draw the next token of these rows from their logits, (len(rows), vocab_size), and tell them."""
        usable = says_something(logits).tolist()
        for row, is_usable in zip(rows, usable, strict=True):
            if not is_usable:
                self._end(row, Ended("error", overflow(bool(row.steering))))
        if not all(usable):
            kept = [i for i, is_usable in enumerate(usable) if is_usable]
            rows, logits = [rows[i] for i in kept], logits[kept]
        for row, token in zip(rows, draw(rows, logits) if rows else (), strict=True):
            if token.id in row.stop_tokens:
                self._end(row, Ended("stop"))
            else:
                row.last, row.n_new = token.id, row.n_new + 1
                self.counts.new_tokens += 1
                if not _told(row, token):
                    self._end(row, Ended("stop"))
                elif row.n_new == row.max_new_tokens:
                    self._end(row, Ended("length"))

    def _end(self, row: Row, ended: Ended) -> None:
        """Take a row out of the cache, close the gap, and tell it."""
        if row is self._reading:
            self._reading = None
            self._slots.clear(len(self._rows))
        else:
            slot, last = self._rows.index(row), len(self._rows) - 1
            self._rows[slot] = self._rows[last]
            self._rows.pop()
            self._steering = None
            if slot < last:
                self._slots.move(last, slot)
            if self._reading is not None:
                self._slots.move(last + 1, last)
            elif slot == last:
                self._slots.clear(last)
        self._tell_end(row, ended)

    def _tell_end(self, row: Row, ended: Ended) -> None:
        self.counts.rows[ended.reason] += 1
        if ended.reason in ("stop", "length"):
            self._row_s += 0.1 * (time.monotonic() - row.began - self._row_s)
        _told(row, ended)

    def _advance_work(self) -> None:
        with self._changed:
            if not self._work:
                return
            steps, future = self._work.popleft()
        if future.cancelled():
            steps.close()
            return
        try:
            next(steps)
        except StopIteration as done:
            _settle(future, done.value)
        except Exception as error:
            _settle(future, error)
        else:
            with self._changed:
                self._work.append((steps, future))


def draw(rows: Sequence[Row], logits: Tensor) -> list[Token]:
    """The next token of each row, from its logits, (len(rows), vocab_size)."""
    uniform = torch.stack([torch.rand((), generator=row.generator) for row in rows])
    ways: dict[tuple[float, float], list[int]] = {}
    for i, row in enumerate(rows):
        ways.setdefault((row.temperature, row.top_p), []).append(i)
    tokens: dict[int, int] = {}
    for (temperature, top_p), of in ways.items():
        own = logits if len(ways) == 1 else logits[of]
        drawn = sample(own, temperature, top_p, uniform[of].to(logits.device))
        tokens |= zip(of, drawn.tolist(), strict=True)
    found = [Token(tokens[i]) for i in range(len(rows))]
    for i, row in enumerate(rows):
        if row.n_logprobs is not None:
            logprobs = logits[i].log_softmax(-1)
            top = logprobs.topk(row.n_logprobs)
            likeliest = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            found[i] = Token(tokens[i], logprobs[tokens[i]].item(), likeliest)
    return found


def _told(row: Row, event: Token | Ended) -> bool:
    """Whether the row's receiver wants more. One that fails wants none: it must not stop the others."""
    try:
        return row.tell(event)
    except Exception:
        traceback.print_exc()
        return False


def _failed(error: Exception) -> Ended:
    if not isinstance(error, Stop):
        traceback.print_exception(error)
    return Ended("error", error)


def _settle(future: Future, result: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
