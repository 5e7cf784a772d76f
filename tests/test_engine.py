"""The engine: many rows together against `generate` for each alone; rows that come, go, fail and are cancelled.

.venv/bin/python -m pytest tests/test_engine.py
"""

import contextlib
import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from conftest import TINY_PARAMS
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_3 import load_model, load_tokenizer
from llama_3.generation import generate
from llama_3.model import Cache, Intervention, LayerCache
from pipeline.errors import InputError
from sae import SparseAutoencoder
from serving import engine as engine_module
from serving.engine import Ended, Engine, Full, Row, ShuttingDown, Token
from serving.growing_text import GrowingText, Piece, StopStrings
from serving.steering import Steering, make_steering

SECONDS = 60  # a busy machine is not a failure
SITE = "layers.1.attention_norm"


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def sae():
    sae = SparseAutoencoder(TINY_PARAMS["dim"], 50, 4)
    sae.initialize(torch.zeros(TINY_PARAMS["dim"]), torch.Generator().manual_seed(5))
    sae.info = {"site": SITE}
    return sae.requires_grad_(False)


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    """Prompts of these tests are read in several parts, and the cache has to grow."""
    monkeypatch.setattr(engine_module, "_PART", 5)
    monkeypatch.setattr(engine_module, "_LEAST_LENGTH", 8)


@contextlib.contextmanager
def running(model, max_rows=3, max_waiting=100) -> Iterator[Engine]:
    engine = Engine(model, max_rows, max_waiting)
    try:
        yield engine
    finally:
        engine.close()
        engine.join(SECONDS)
        assert not engine._thread.is_alive()


class Listener:
    """Keeps what a row is told; `wants` ends the row after that many tokens."""

    def __init__(self, wants: int = 10**9, pause=lambda: None):
        self.tokens: list[Token] = []
        self.ended: Ended | None = None
        self.wants, self.pause = wants, pause
        self.over = threading.Event()

    def __call__(self, event) -> bool:
        assert self.ended is None
        if isinstance(event, Ended):
            self.ended = event
            self.over.set()
            return False
        self.pause()
        self.tokens.append(event)
        return len(self.tokens) < self.wants

    def wait(self) -> list[int]:
        assert self.over.wait(SECONDS)
        return [token.id for token in self.tokens]


def alone(model, row: Row) -> list[int]:
    """What `generate` gives for a row by itself."""
    steering = row.steering[0] if row.steering else None
    options = (row.max_new_tokens, row.stop_tokens, row.temperature, row.top_p, [row.seed], steering)
    return [token for (token,) in generate(model, [row.prompt], *options) if token is not None]


def some_rows(sae, n: int, seed: int = 0) -> list[Row]:
    """Prompts of 1 to 23 tokens, with and without steering, some sampled, some with a stop token."""
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        prompt = [276, *(rng.randrange(276) for _ in range(rng.randrange(23)))]
        strengths = {rng.randrange(50): rng.choice([-4.0, 2.0, 6.0])}
        mode = rng.choice(["add", "clamp", "h_bias", "scale"])
        steering = [make_steering(sae, Steering(strengths, mode), None, 276)] if rng.random() < 0.7 else []
        stops = [rng.randrange(276)] if rng.random() < 0.3 else []
        sampling = rng.choice([(0.0, 1.0), (1.0, 0.9), (1.5, 1.0)])
        rows.append(Row(prompt, rng.randrange(1, 20), stops, Listener(), *sampling, number, steering))
    return rows


# ---- rows together


@pytest.mark.parametrize("max_rows", [1, 4, 12])
def test_rows_together_say_what_each_says_alone(model, sae, max_rows):
    rows = some_rows(sae, 16)
    expected = [alone(model, row) for row in rows]
    rng = random.Random(1)
    with running(model, max_rows) as engine:
        left = rows[:]
        while left:  # a few at a time, while others run
            engine.submit([left.pop(0) for _ in range(min(len(left), rng.randrange(1, 6)))])
            time.sleep(rng.choice([0, 0.002, 0.01]))
        assert [row.tell.wait() for row in rows] == expected
        for row, tokens in zip(rows, expected, strict=True):
            assert row.tell.ended.reason == ("length" if len(tokens) == row.max_new_tokens else "stop")
        assert engine.counts.new_tokens == sum(map(len, expected))
        assert engine.counts.prompt_tokens == sum(len(row.prompt) for row in rows)
        most_at_once = sum(map(len, expected)) / max(1, engine.counts.steps)
        assert (most_at_once > 2) == (max_rows > 2)  # they really share steps
        assert engine.n_rows == engine.n_waiting == 0 and not any(engine._slots.filled)


def test_a_row_with_several_interventions(model, sae):
    """Each acts, in order, on this row alone, though its neighbour is steered at the same site."""
    add = make_steering(sae, Steering({3: 5.0}, "add"), None, 276)
    clamp = make_steering(sae, Steering({9: 4.0}, "clamp"), None, 276)
    further = Intervention("layers.2.resid_post", lambda x: x + 1.5)
    prompt = [276, 8, 9, 10, 11, 12, 13]
    tokens = list(prompt)
    for _ in range(9):
        with model.intervene(*add), model.intervene(*clamp), model.intervene(*further):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    with running(model) as engine:
        rows = [Row(prompt, 9, [], Listener(), steering=steering) for steering in ([add, clamp, further], [add], [])]
        engine.submit(rows)
        assert rows[0].tell.wait() == tokens[len(prompt) :]
        assert [row.tell.wait() for row in rows[1:]] == [alone(model, row) for row in rows[1:]]


def test_a_row_that_overflows_ends_alone(model, sae):
    """Neither its neighbours nor the rows that take its place in the cache meet its NaN and infinities."""
    for poison in (float("nan"), float("inf")):
        broken = [Intervention(SITE, lambda x, poison=poison: x * 0 + poison)]
        late = []  # breaks only after some steps
        late = [Intervention(SITE, lambda x, n=late: n.append(1) or (x * poison if len(n) > 6 else x))]  # noqa: B023
        good = some_rows(sae, 8, seed=3)
        expected = [alone(model, row) for row in good]
        bad = [Row([276, *range(20)], 10, [], Listener(), steering=steering) for steering in (broken, late, broken)]
        with running(model, 4) as engine:
            for row in [bad[0], *good[:3], bad[1], *good[3:5], bad[2], *good[5:]]:
                engine.submit([row])
            assert [row.tell.wait() for row in good] == expected
            for row in bad:
                row.tell.wait()
                assert isinstance(row.tell.ended.error, InputError) and "lower the strength" in str(
                    row.tell.ended.error
                )
            assert all(x.isfinite().all() for layer in engine._slots.layers for x in layer)


def test_steering_that_raises_ends_its_row_alone(model, sae, capsys):
    def fails(x):
        raise RuntimeError("a mistake")

    good = some_rows(sae, 3)
    expected = [alone(model, row) for row in good]
    bad = Row([276, 1], 5, [], Listener(), steering=[Intervention(SITE, fails)])
    with running(model) as engine:
        engine.submit([good[0], bad, *good[1:]])
        assert [row.tell.wait() for row in good] == expected
        bad.tell.wait()
        assert str(bad.tell.ended.error) == "a mistake"
    assert "a mistake" in capsys.readouterr().err


def test_a_receiver_that_fails_stops_nobody_else(model, sae, capsys):
    def fails(event):
        raise OSError("gone")

    good = some_rows(sae, 3)
    expected = [alone(model, row) for row in good]
    with running(model) as engine:
        engine.submit([Row([276], 50, [], fails), *good])
        assert [row.tell.wait() for row in good] == expected
        assert engine.n_rows == 0
    assert "gone" in capsys.readouterr().err


def test_a_receiver_that_wants_no_more(model):
    row = Row([276, 5], 50, [], Listener(wants=4))
    with running(model) as engine:
        engine.submit([row])
        assert len(row.tell.wait()) == 4 and row.tell.ended == Ended("stop")


def test_logprobs_are_those_of_a_full_forward_pass(model, sae):
    steering = make_steering(sae, Steering({3: 5.0}, "add"), None, 276)
    rows = [
        Row([276, 5, 6, 7, 8, 9, 10], 6, [], Listener(), 1.0, 0.9, 4, [steering], n_logprobs=3),
        Row([276, 7], 6, [], Listener(), n_logprobs=0),
        Row([276, 7], 6, [], Listener()),
    ]
    with running(model) as engine:
        engine.submit(rows)
        tokens = rows[0].prompt + rows[0].tell.wait()
        with model.intervene(*steering):
            logprobs = model(torch.tensor([tokens]))[0].log_softmax(-1)
        for place, token in enumerate(rows[0].tell.tokens, len(rows[0].prompt) - 1):
            top = logprobs[place].topk(3)
            assert [i for i, _ in token.likeliest] == top.indices.tolist()
            torch.testing.assert_close(torch.tensor([p for _, p in token.likeliest]), top.values, atol=1e-4, rtol=0)
            assert token.logprob == pytest.approx(logprobs[place, token.id].item(), abs=1e-4)
        rows[1].tell.wait()
        rows[2].tell.wait()
        assert all(token.logprob is not None and not token.likeliest for token in rows[1].tell.tokens)
        assert all(token.logprob is None for token in rows[2].tell.tokens)


# ---- coming and going


def test_cancelled_rows_leave_at_once(model, sae):
    """While reading, while running, and while waiting; the others go on."""
    good = some_rows(sae, 4)
    expected = [alone(model, row) for row in good]
    slow = lambda: time.sleep(0.01)
    doomed = [Row([276] * n, 500, [], Listener(pause=slow)) for n in (3, 40, 3, 3)]
    with running(model, 2) as engine:
        engine.submit([doomed[0], doomed[1], good[0], doomed[2], *good[1:], doomed[3]])
        time.sleep(0.1)
        engine.cancel(doomed)
        assert [row.tell.wait() for row in good] == expected
        for row in doomed:
            assert len(row.tell.wait()) < 500 and row.tell.ended == Ended("cancelled")
        engine.cancel(doomed + good)  # no effect on what has ended
        assert engine.n_rows == 0 and engine.counts.rows["cancelled"] == 4


def test_no_more_wait_than_may(model):
    slow = lambda: time.sleep(0.005)
    with running(model, 2, 3) as engine:
        rows = [Row([276], 100, [], Listener(pause=slow)) for _ in range(5)]
        engine.submit(rows)
        with pytest.raises(Full) as full:
            engine.submit([Row([276], 1, [], Listener())])
        assert full.value.retry_after >= 1 and engine.counts.refused == 1
        engine.cancel(rows)
        for row in rows:
            row.tell.wait()
        later = Row([276], 1, [], Listener())
        engine.submit([later])
        assert len(later.tell.wait()) == 1


def test_closing_lets_rows_end_and_refuses_others(model):
    slow = lambda: time.sleep(0.005)
    with running(model, 1) as engine:
        first, second = Row([276], 20, [], Listener(pause=slow)), Row([276], 20, [], Listener())
        engine.submit([first, second])
        time.sleep(0.02)
        engine.close(SECONDS)
        with pytest.raises(ShuttingDown):
            engine.submit([Row([276], 1, [], Listener())])
        with pytest.raises(ShuttingDown):
            engine.work(iter(()))
        second.tell.wait()
        assert isinstance(second.tell.ended.error, ShuttingDown)
        assert len(first.tell.wait()) == 20 and first.tell.ended == Ended("length")


def test_closing_without_time_ends_rows(model):
    with running(model) as engine:
        row = Row([276], 400, [], Listener(pause=lambda: time.sleep(0.01)))
        engine.submit([row])
        time.sleep(0.05)
        engine.close(0)
        assert len(row.tell.wait()) < 400 and isinstance(row.tell.ended.error, ShuttingDown)


def test_a_stream_for_a_thread_of_ones_own(model, sae):
    rows = some_rows(sae, 5)
    expected = [alone(model, row) for row in rows]
    found = [[] for _ in rows]
    with running(model) as engine:
        for number, event in engine.stream(rows):
            if isinstance(event, Token):
                found[number].append(event.id)
        assert found == expected
        stream = engine.stream([Row([276], 400, [])])
        next(stream)
        stream.close()
        deadline = time.monotonic() + SECONDS
        while engine.n_rows and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.counts.rows["cancelled"] == 1


def test_other_work_goes_on_between_steps(model):
    """Its parts alternate with the rows' steps; it may fail and be cancelled."""
    seen = []

    def steps(n, fails=False):
        for _ in range(n):
            seen.append(len(row.tell.tokens))
            yield
        if fails:
            raise InputError("no")
        return n

    row = Row([276], 60, [], Listener(pause=lambda: time.sleep(0.001)))
    with running(model) as engine:
        engine.submit([row])
        futures = [engine.work(steps(20)), engine.work(steps(3, fails=True)), engine.work(steps(10**9))]
        assert futures[0].result(SECONDS) == 20
        with pytest.raises(InputError):
            futures[1].result(SECONDS)
        assert futures[2].cancel()
        assert len(row.tell.wait()) == 60
        assert len(set(seen)) > 10  # tokens came between its parts
    assert engine._work == type(engine._work)()


def test_too_much_work_is_refused(model):
    with running(model, 1, 2) as engine:
        row = Row([276], 300, [], Listener(pause=lambda: time.sleep(0.01)))
        engine.submit([row])

        def forever():
            while True:
                yield

        futures = [engine.work(forever()) for _ in range(2)]
        time.sleep(0.05)
        with pytest.raises(Full):
            futures.extend(engine.work(forever()) for _ in range(3))
        for future in futures:
            future.cancel()


def test_a_mistake_of_the_engines_own_ends_its_rows_and_no_others(model, sae, monkeypatch, capsys):
    doomed = [Row([276, 1], 400, [], Listener(pause=lambda: time.sleep(0.002))) for _ in range(2)]
    good = some_rows(sae, 3)
    expected = [alone(model, row) for row in good]
    with running(model, 2) as engine:
        engine.submit([*doomed, *good])
        time.sleep(0.05)
        forward = engine._forward

        def fails_once(*what):
            monkeypatch.setattr(engine, "_forward", forward)
            raise MemoryError("no room")

        monkeypatch.setattr(engine, "_forward", fails_once)
        for row in doomed:
            row.tell.wait()
            assert str(row.tell.ended.error) == "no room"
        assert [row.tell.wait() for row in good] == expected
    assert "no room" in capsys.readouterr().err


# ---- the model's side


def test_rows_of_one_cache_at_places_of_their_own(model):
    """Each continues after its own length as in a cache of its own, whatever the others' padding holds."""
    prompts = [[276, 5, 44], [276], [276, 8, 7, 6, 5, 4, 3, 2, 260]]
    n = len(prompts)
    whole = model.new_cache(n, 16)
    for layer in whole.layers:
        for x in layer:
            x.fill_(7.0)  # beyond a row's length anything finite may stand
    logits = []
    for i, prompt in enumerate(prompts):
        own = Cache([LayerCache(keys[i : i + 1], values[i : i + 1]) for keys, values in whole.layers])
        logits.append(model(torch.tensor([prompt[:-1] or prompt]), own)[0, -1])
    together = Cache(whole.layers, [len(prompt[:-1] or prompt) for prompt in prompts])
    new = torch.tensor([[prompt[-1], 9] for prompt in prompts])
    found = model(new, together)
    assert together.lengths == [4, 3, 10] and together.length == 10
    for i, prompt in enumerate(prompts):
        expected = model(torch.tensor([[*(prompt[:-1] or prompt), prompt[-1], 9]]))[0, -2:]
        torch.testing.assert_close(found[i], expected, atol=2e-4, rtol=1e-4)


def test_activations_read_in_parts(model):
    tokens = torch.randint(0, 276, (2, 11), generator=torch.Generator().manual_seed(0))
    for sites in ("layers.1.attention_norm", ["layers.0.resid_post", "layers.2.mlp_out"]):
        expected = model.activations(tokens, sites)
        cache = model.new_cache(2, 11)
        parts = [model.activations(tokens[:, at : at + 4], sites, cache=cache) for at in range(0, 11, 4)]
        if isinstance(sites, str):
            torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)
        else:
            for site in sites:
                found = torch.cat([part[site] for part in parts], 1)
                torch.testing.assert_close(found, expected[site], atol=1e-4, rtol=1e-4)


# ---- text


def up_to_the_first_stop(text: str, stops: list[str]) -> str:
    """Character by character: the text before the first stop that becomes complete, of several the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@settings(max_examples=60)
@given(
    st.lists(st.text("ab\n", max_size=4), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_a_stop_string_is_found_however_the_text_is_cut(pieces, stops):
    until = StopStrings(stops)
    given_on = ""
    for piece in pieces:
        given_on += until.add(piece)
        whole = "".join(pieces)
        assert whole.startswith(given_on)
        if until.found:
            break
    assert given_on + until.end() == up_to_the_first_stop("".join(pieces), stops)


@pytest.mark.parametrize("stops", [[], ["ring"], ["é", "zz"]])
def test_growing_text_is_the_whole_text(tokenizer, stops):
    text = "the ring é and 再 llama, another ring"
    ids = tokenizer.encode(text)
    told = []
    grow = GrowingText(tokenizer, [276], stops, told.append)
    n_read, goes_on = 0, True
    while n_read < len(ids) and goes_on:
        goes_on = grow(Token(ids[n_read]))
        n_read += 1
    assert grow(Ended("length")) is False
    assert "".join(event.text for event in told[:-1]) == up_to_the_first_stop(text, stops)
    assert told[-1] == Ended("length") and goes_on == (up_to_the_first_stop(text, stops) == text)
    assert sum(isinstance(event, Piece) and event.token is not None for event in told) == n_read
