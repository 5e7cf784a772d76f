"""The retrieve script against a local server: complete batches only, whatever kills it; and what it prints.

Compares the answer files with the server's results. The machinery itself is tested in test_claude_batches.py.

.venv/bin/python -m pytest tests/test_retrieve_batches.py
"""

import json
from pathlib import Path

import pytest
from support.claude_runs import in_a_process, kill_when
from support.fake_anthropic import Fail, FakeAnthropic, meaning
from support.pipeline_runs import call, refusal

import interpret_top_sentences_retrieve_batches as script


@pytest.fixture
def server(monkeypatch):
    with FakeAnthropic() as fake:
        fake.set_environment(monkeypatch)
        yield fake


@pytest.fixture
def options(server, tmp_path) -> dict:
    """A journal of two batches that the server has, of 3 and 2 requests."""
    lines = []
    for ids in (["1", "2", "3"], ["4", "5"]):
        batch = server.create([{"custom_id": i, "params": {"model": "claude-haiku-5-5"}} for i in ids])
        lines.append({"batch_id": batch.id, "purpose": "meanings by mean", "created_at": "", "custom_ids": ids})
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"response_ids_filepath": path, "response_output_dir": tmp_path / "answers"}


def stored(options: dict) -> dict[str, list[str]]:
    files = sorted(Path(options["response_output_dir"]).glob("*.jsonl"))
    return {path.stem: sorted(json.loads(line)["custom_id"] for line in path.open()) for path in files}


def test_it_looks_once_and_says_what_is_open(server, options, capsys):
    server.looks_until_ended = 100
    server.end(server.batches[1])
    call(script, **options)
    assert stored(options) == {"msgbatch_0002": ["4", "5"]}
    said = capsys.readouterr().out
    assert "2 succeeded" in said and "1 of 2 batches have not ended" in said


def test_it_waits_and_adds_up_tokens_and_price(server, options, capsys):
    server.looks_until_ended = 3
    server.answer = lambda i, params: {"type": "expired"} if i == "5" else meaning(i, params)
    call(script, **options, wait=True, poll_s=0.01)
    assert stored(options) == {"msgbatch_0001": ["1", "2", "3"], "msgbatch_0002": ["4", "5"]}
    said = capsys.readouterr().out
    n_output = 4 * len(meaning("1", {"model": ""})["message"]["content"][0]["text"].split())
    price = (400 * 0.10 + n_output * 0.50) / 1e6 / 2
    assert f"1 expired, 4 succeeded; 400 input and {n_output} output tokens, {price:,.2f} USD" in said


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again(server, options):
    server.plan["results"] += [None, "hang"]
    kill_when(server.arrived, script, options)
    assert stored(options) == {"msgbatch_0001": ["1", "2", "3"]}
    done = in_a_process(script, options)
    assert done.returncode == 0 and "5 succeeded" in done.stdout
    assert stored(options) == {"msgbatch_0001": ["1", "2", "3"], "msgbatch_0002": ["4", "5"]}
    assert [path.name for path in options["response_output_dir"].glob(".*.tmp")] == []
    assert server.calls("results") == 3


def test_what_it_refuses_is_a_sentence(server, options, capsys, monkeypatch):
    server.plan["retrieve"] += [Fail(401, "invalid x-api-key")]
    assert "refuses the key" in refusal(capsys, script, **options)
    nothing = options | {"response_ids_filepath": "nowhere.jsonl"}
    assert "There is no nowhere.jsonl; run interpret_top_sentences_send" in refusal(capsys, script, **nothing)
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    assert "no API key" in refusal(capsys, script, **options)


def test_a_batch_of_unknown_fate_is_mentioned(server, options, capsys):
    with options["response_ids_filepath"].open("a") as file:
        line = {"batch_id": None, "purpose": "meanings by mean", "custom_ids": ["9"], "seen": {}}
        file.write(json.dumps(line) + "\n")
    call(script, **options)
    assert "run the send script again" in capsys.readouterr().out and len(stored(options)) == 2
