"""The batch machinery through the real client against a local server: whatever happens, each request is paid once.

Compares what the server has seen (batches that exist) with what was asked for, and answer files with the server's
results.

.venv/bin/python -m pytest tests/test_claude_batches.py
"""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_anthropic import NO_CREDIT, Fail, FakeAnthropic, meaning

from claude import batches as mb
from claude import requests as requests_room
from claude.answers import add_up, answered, read_results
from claude.batches import reconcile, retrieve
from claude.connection import api_errors, connect
from claude.journal import Journal, open_journal
from claude.prices import BATCH_PRICE, cost
from claude.requests import announce, as_json, spooled
from pipeline.errors import InputError, Stop


@pytest.fixture
def server(monkeypatch):
    with FakeAnthropic() as fake:
        fake.set_environment(monkeypatch)
        yield fake


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    """Waits are a hundred times shorter, so that backoff does not slow the tests."""
    monkeypatch.setattr(mb, "LONGEST_WAIT_S", 0.01)


def a_request(custom_id: str, text: str = "What is this?") -> dict:
    params = {"model": "claude-haiku-5-5", "max_tokens": 50, "messages": [{"role": "user", "content": text}]}
    return {"custom_id": custom_id, "params": params}


def send(path: Path, ids: list[str], per_batch: int = 4, settle_s: float = 0.2) -> None:
    """As a script does: reconcile, leave out what is in flight, send the rest."""
    client = connect()
    with open_journal(path, "testing") as journal, api_errors():
        reconcile(client, journal, settle_s)
        todo = sorted(set(ids) - journal.pending(path.parent / "answers"))
        with spooled(map(a_request, todo), path.parent) as requests:
            mb.send(client, journal, requests, per_batch, settle_s)


def ids(n: int) -> list[str]:
    return [str(i) for i in range(n)]


def assert_each_once(server: FakeAnthropic, path: Path, expected: list[str]) -> None:
    assert sorted(server.sent_ids()) == sorted(expected)
    written = {batch["batch_id"]: batch["custom_ids"] for batch in Journal(path).batches}
    assert written == {batch.id: [r["custom_id"] for r in batch.requests] for batch in server.batches}


# ---- creating


@pytest.mark.parametrize(
    "plan",
    [
        [],
        [Fail(429)],
        [Fail(529), Fail(429), Fail(529)],
        [Fail(500)],
        ["create then 500"],
        ["create then garbage"],
        ["create then cut"],
        [Fail(503), "create then 500", Fail(429), "create then 500"],
    ],
    ids=str,
)
def test_each_request_is_created_once_whatever_create_answers(server, tmp_path, plan):
    server.plan["create"] += plan
    send(tmp_path / "ids.jsonl", ids(10))
    assert_each_once(server, tmp_path / "ids.jsonl", ids(10))
    assert [len(batch.requests) for batch in server.batches] == [4, 4, 2]


def test_the_intent_is_on_disk_before_the_call_and_the_id_after_it(server, tmp_path):
    path = tmp_path / "ids.jsonl"
    lines_at_call = []
    create = server.create
    server.create = lambda requests: lines_at_call.append(path.read_text()) or create(requests)
    send(path, ids(3))
    (line,) = lines_at_call[0].splitlines()
    assert json.loads(line)["batch_id"] is None and json.loads(line)["custom_ids"] == ids(3)
    assert [batch["batch_id"] for batch in Journal(path).batches] == [server.batches[0].id]


def test_an_unclear_failure_stays_unclear_until_the_list_was_read(server, tmp_path):
    path = tmp_path / "ids.jsonl"
    server.plan["create"] += ["create then 500"]
    server.plan["list"] += [None, Fail(500), Fail(500), Fail(500)]  # the client tries three times
    with pytest.raises(Stop, match="busy or failing"):
        send(path, ids(3))
    assert Journal(path).unclear()
    send(path, ids(3))
    assert_each_once(server, path, ids(3))


def test_a_batch_that_the_list_shows_late_is_waited_for(server, tmp_path):
    server.plan["create"] += ["create then 500"]
    server.plan["list"] += [None, "without the newest"]
    send(tmp_path / "ids.jsonl", ids(3), settle_s=0.3)
    assert_each_once(server, tmp_path / "ids.jsonl", ids(3))


def test_the_list_is_read_over_pages_and_other_batches_are_not_taken(server, tmp_path):
    server.page = 2
    others = [server.create([a_request(str(i))]) for i in range(5)]
    server.plan["create"] += ["create then 500"]
    create = server.create

    def create_among_others(requests):
        batch = create(requests)
        others.extend(create([a_request("other")] * n) for n in (1, 2, 5, 6))
        return batch

    server.create = create_among_others
    path = tmp_path / "ids.jsonl"
    send(path, ids(3))
    (batch,) = Journal(path).batches
    mine = [b for b in server.batches if b not in others]
    assert [batch["batch_id"]] == [b.id for b in mine]


def test_two_batches_that_both_fit_are_left_to_the_user(server, tmp_path):
    path = tmp_path / "ids.jsonl"
    server.plan["create"] += ["create then 500"]
    create = server.create
    server.create = lambda requests: (create([a_request(f"9{i}") for i in range(3)]), create(requests))[1]
    with pytest.raises(InputError, match="could each be"):
        send(path, ids(3))
    assert len(server.batches) == 2
    for batch in server.batches:  # once they have ended, their custom_ids tell them apart
        server.end(batch)
    send(path, ids(3))
    (batch,) = Journal(path).batches
    assert batch["batch_id"] == server.batches[1].id and len(server.batches) == 2


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (Fail(401, "invalid x-api-key"), "refuses the key"),
        (Fail(400, NO_CREDIT), "no credit"),
        (Fail(402, "billing"), "no credit"),
        (Fail(403, "not for you"), "not allowed to do this"),
        (Fail(400, "requests.0.params.max_tokens: Field required"), "max_tokens"),
        (Fail(413, "too large"), "too large"),
    ],
    ids=str,
)
def test_what_the_api_refuses_is_one_sentence_and_nothing_is_pending(server, tmp_path, fail, words):
    server.plan["create"] += [fail]
    with pytest.raises(Stop, match=words) as error:
        send(tmp_path / "ids.jsonl", ids(3))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert Journal(tmp_path / "ids.jsonl").batches == [] and server.batches == []


def test_a_busy_api_is_given_up_after_some_attempts(server, tmp_path):
    server.plan["create"] += [Fail(529)] * mb.CREATE_ATTEMPTS
    with pytest.raises(Stop, match="busy"):
        send(tmp_path / "ids.jsonl", ids(3))
    assert server.calls("create") == mb.CREATE_ATTEMPTS and Journal(tmp_path / "ids.jsonl").batches == []


def test_no_server_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "x")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(Stop, match="does not answer"), api_errors():
        connect(max_retries=0).messages.batches.list()


def test_no_key_is_one_sentence(monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    monkeypatch.delenv("ANTHROPIC_AUTH_TOKEN", raising=False)
    with pytest.raises(InputError, match="ANTHROPIC_API_KEY"):
        connect()


# ---- the journal


def test_a_second_process_and_another_purpose_are_refused(tmp_path):
    path = tmp_path / "ids.jsonl"
    with open_journal(path, "one") as journal:
        journal.intend(["1"], [])
        with pytest.raises(InputError, match="in use"), open_journal(path, "one"):
            pass
    with pytest.raises(InputError, match="'one'"), open_journal(path, "two"):
        pass


@pytest.mark.parametrize("text", ["{", "[]\n", '{"batch_id": "a"}\n', "\n"])
def test_a_broken_journal_is_refused(tmp_path, text):
    (tmp_path / "ids.jsonl").write_text(text)
    with pytest.raises(InputError, match="not a journal"):
        Journal(tmp_path / "ids.jsonl")


# ---- the API's limits


@given(st.lists(st.text(max_size=40), min_size=1, max_size=30), st.integers(1, 7), st.integers(200, 1000))
def test_batches_keep_order_and_limits(tmp_path_factory, texts, most, max_bytes):
    requests = [a_request(str(i), text) for i, text in enumerate(texts)]
    with spooled(requests, tmp_path_factory.getbasetemp()) as on_disk:
        batches = list(on_disk.batches(most, max_bytes))
    assert [r for batch in batches for r in batch] == requests
    body = lambda batch: len(as_json({"requests": batch}))
    assert all(len(batch) <= most and (len(batch) == 1 or body(batch) <= max_bytes) for batch in batches)
    for batch, after in zip(batches, batches[1:], strict=False):  # none is smaller than necessary
        assert len(batch) == most or body([*batch, after[0]]) > max_bytes


def test_bytes_are_those_on_the_wire(server, tmp_path):
    requests = [a_request(str(i), "é“\n" * i) for i in range(5)]
    client = connect()
    client.messages.batches.create(requests=requests)
    with spooled(requests, tmp_path) as on_disk:
        assert server.body_sizes[-1] == on_disk.n_bytes + on_disk.n - 1 + len(b'{"requests":[]}')


# ---- the estimate


def test_tokens_are_counted_on_a_sample_and_the_price_is_half(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(requests_room, "SAMPLE_REQUESTS", 20)
    with spooled((a_request(str(i), "word " * 400) for i in range(500)), tmp_path) as requests:
        announce(connect(), requests, output_tokens=100, price_ratio=BATCH_PRICE)
    said = capsys.readouterr().out
    assert server.calls("count_tokens") == 20 and "500 requests" in said
    assert "counted on a sample of 20" in said
    n_input = int(said.split("about ")[1].split(" ")[0].replace(",", ""))
    assert n_input == pytest.approx(500 * 500, rel=0.01)
    by_hand = (n_input * 0.10 + 500 * 100 * 0.50) / 1e6 / 2
    assert f"About {by_hand:.2f} USD" in said


def test_a_server_that_does_not_count_tokens_gets_a_guess(server, tmp_path, capsys):
    server.plan["count_tokens"] += [Fail(404, "no such path")]
    with spooled([a_request("1", "word " * 3000)], tmp_path) as requests:
        announce(connect(), requests, 100, 1.0)
    assert "does not count tokens" in capsys.readouterr().out


def test_an_unknown_model_is_refused_before_anything_is_sent(server, tmp_path):
    request = a_request("1")
    request["params"]["model"] = "claude-nobody"
    refused = pytest.raises(Stop, match="claude-nobody")
    with spooled([request], tmp_path) as requests, refused, api_errors():
        announce(connect(), requests, 100, 1.0)


def test_cost_of_the_published_run():
    assert cost("claude-nobody", 1, 1, 1.0) is None
    dated = cost("claude-haiku-4-5-20251001", 2e6, 1e6, 0.5)
    assert dated == pytest.approx((2 * 1.00 + 5.00) / 2)


# ---- retrieving


def sent(server, path: Path, n: int = 6, per_batch: int = 3) -> None:
    send(path, ids(n), per_batch)
    assert len(server.batches) == n // per_batch


def results_on_disk(folder: Path) -> dict[str, dict]:
    lines = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.open()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line["result"] for line in lines}


@pytest.mark.parametrize("plan", [[], ["cut at a line end"], ["cut in a line"], ["broken off"], [Fail(500)]], ids=str)
def test_answers_are_stored_whole_and_as_the_api_gives_them(server, tmp_path, plan):
    types = ["succeeded", "errored", "expired", "canceled"]
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}, "request_id": "r"}

    def answer(custom_id, params):
        name = types[int(custom_id) % 4]
        if name == "succeeded":
            return meaning(custom_id, params) | {"something_new": {"a": [1, None, "\u2028"]}}
        return {"type": "errored", "error": error} if name == "errored" else {"type": name}

    server.answer = answer
    sent(server, tmp_path / "ids.jsonl")
    server.plan["results"] += plan
    out = tmp_path / "answers"
    assert retrieve(connect(), tmp_path / "ids.jsonl", out, wait=False, poll_s=0) == []
    expected = {r["custom_id"]: r["result"] for batch in server.batches for r in batch.results}
    assert results_on_disk(out) == expected
    assert sorted(p.name for p in out.iterdir()) == ["msgbatch_0001.jsonl", "msgbatch_0002.jsonl"]
    totals = add_up(out.glob("*.jsonl"))
    assert totals.types == {"succeeded": 2, "errored": 2, "expired": 1, "canceled": 1}
    assert answered(out) == {"0", "4"}
    n_words = len(expected["0"]["message"]["content"][0]["text"].split())
    assert totals.tokens == {"claude-haiku-5-5": (200, 2 * n_words)}


def test_a_batch_that_never_comes_whole_leaves_no_file_and_the_others_are_stored(server, tmp_path):
    sent(server, tmp_path / "ids.jsonl")
    server.plan["results"] += ["cut at a line end"] * mb.RESULTS_ATTEMPTS
    with pytest.raises(Stop, match="msgbatch_0001 arrive incomplete"):
        retrieve(connect(), tmp_path / "ids.jsonl", tmp_path / "answers", wait=False, poll_s=0)
    assert sorted(results_on_disk(tmp_path / "answers")) == ["3", "4", "5"]
    retrieve(connect(), tmp_path / "ids.jsonl", tmp_path / "answers", wait=False, poll_s=0)
    assert sorted(results_on_disk(tmp_path / "answers")) == ids(6)


def test_waiting_looks_until_all_have_ended_and_survives_an_api_out_of_order(server, tmp_path):
    sent(server, tmp_path / "ids.jsonl")
    server.looks_until_ended = 3
    client = connect(max_retries=0)
    waiting = retrieve(client, tmp_path / "ids.jsonl", tmp_path / "answers", wait=False, poll_s=0)
    assert waiting == ["msgbatch_0001", "msgbatch_0002"] and not (tmp_path / "answers").exists()
    server.plan["retrieve"] += [Fail(500), Fail(529)]
    assert retrieve(client, tmp_path / "ids.jsonl", tmp_path / "answers", wait=True, poll_s=0.01) == []
    assert sorted(results_on_disk(tmp_path / "answers")) == ids(6)


def test_what_is_stored_is_not_fetched_again(server, tmp_path):
    sent(server, tmp_path / "ids.jsonl")
    for _ in range(2):
        retrieve(connect(), tmp_path / "ids.jsonl", tmp_path / "answers", wait=False, poll_s=0)
    assert server.calls("results") == 2


def test_gone_results_and_foreign_batches_are_told_in_a_sentence(server, tmp_path):
    path = tmp_path / "ids.jsonl"
    sent(server, path)
    server.end(server.batches[0])
    server.batches[0].results_gone = True
    with pytest.raises(Stop, match="29 days"):
        retrieve(connect(), path, tmp_path / "answers", wait=False, poll_s=0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["batch_id"], lines[1]["custom_ids"] = "msgbatch_none", ["7", "8", "9"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "answers" / "msgbatch_0002.jsonl").unlink()
    with pytest.raises(Stop, match=r"does not know batch msgbatch_none.*\(1 more batch"):
        retrieve(connect(), path, tmp_path / "answers", wait=False, poll_s=0)
    assert list((tmp_path / "answers").iterdir()) == []


def test_a_line_that_a_kill_cut_short_is_left_out_but_no_other(tmp_path):
    good = json.dumps({"custom_id": "1", "result": {"type": "expired"}}) + "\n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(good.encode() + '{"custom_id": "é'.encode()[:-1])
    assert len(list(read_results(path))) == 1
    path.write_text("{}\n" + good)
    with pytest.raises(InputError, match="Line 1"):
        list(read_results(path))
