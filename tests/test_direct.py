"""The direct script against a local server: the questions of the batches, answers in the same form, none asked twice.

Compares what the server received and sent with the answer file, and with what the send script would have sent.

.venv/bin/python -m pytest tests/test_direct.py
"""

import json
import time
from pathlib import Path

import pytest
from support.claude_runs import asking_options, kill_when
from support.fake_anthropic import NO_CREDIT, Fail, FakeAnthropic, meaning
from support.pipeline_runs import call, refusal

import interpret_top_sentences_direct as script
import interpret_top_sentences_parse_responses as parse_script
import interpret_top_sentences_send_batches as send_script
from claude.direct import end_last_line
from claude.journal import open_journal

SENTENCES = {latent: [f"the {latent} ring", f"hello {latent}"] for latent in range(12)}


@pytest.fixture
def server(monkeypatch):
    with FakeAnthropic() as fake:
        fake.set_environment(monkeypatch)
        fake.answer = lambda _, params: meaning(latent_of(params), params)
        yield fake


@pytest.fixture
def options(tmp_path) -> dict:
    return asking_options(tmp_path, SENTENCES) | {"requests_per_minute": 1e9}


def latent_of(params: dict) -> str:
    return params["messages"][0]["content"].split("1. ")[1].replace("<", "").replace(">", "").split()[1]


def asked(server: FakeAnthropic) -> list[str]:
    return sorted((latent_of(params) for name, params in server.seen if name == "messages"), key=int)


def answers(options: dict) -> list[dict]:
    return [json.loads(line) for line in (options["response_output_dir"] / "direct.jsonl").open()]


def test_the_scripts_that_ask_have_the_same_defaults():
    """Options that both have, have the same value and the same help text."""
    lines = [
        {line.partition(":")[0].partition(" =")[0]: line for line in Path(asking.__file__).read_text().splitlines()}
        for asking in (script, send_script)
    ]
    shared = [name for name in lines[0].keys() & lines[1].keys() if name.isupper()]
    assert len(shared) == 15
    assert [lines[0][name] for name in shared] == [lines[1][name] for name in shared]


def test_the_same_questions_and_the_same_form_of_answers_as_in_batches(server, options, tmp_path):
    call(script, **options)
    got = {line["custom_id"]: line["result"] for line in answers(options)}
    params = {latent_of(params): params for name, params in server.seen if name == "messages"}
    batch_options = asking_options(tmp_path / "batches", SENTENCES)
    call(send_script, **batch_options)
    (batch,) = server.batches
    assert params == {request["custom_id"]: request["params"] for request in batch.requests}
    server.end(batch)
    assert got == {result["custom_id"]: result["result"] for result in batch.results}

    out = tmp_path / "m.yaml"
    call(parse_script, retrieved_responses_dir=options["response_output_dir"], parsed_responses_output_filepath=out)
    assert all(f"meaning of {latent}\n" in out.read_text() for latent in SENTENCES)


def test_answers_are_asked_once_whatever_the_server_does(server, options):
    server.plan["messages"] += [Fail(429), None, Fail(529), Fail(500), None, Fail(503)]
    call(script, **options, concurrency=3)
    call(script, **options)
    assert sorted(int(line["custom_id"]) for line in answers(options)) == sorted(SENTENCES)
    assert server.calls("messages") == len(SENTENCES) + 4


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again(server, options, capsys):
    server.plan["messages"] += [None] * 5 + ["hang"]
    kill_when(server.arrived, script, options | {"concurrency": 1})
    assert len(answers(options)) == 5
    with (options["response_output_dir"] / "direct.jsonl").open("a") as file:
        file.write('{"custom_id": "5", "resu')  # as if the kill had come in the middle of writing
    server.seen.clear()
    call(script, **options)
    assert "7 answers" in capsys.readouterr().out
    assert asked(server) == ["5", "6", "7", "8", "9", "10", "11"]
    assert sorted(int(line["custom_id"]) for line in answers(options)) == sorted(SENTENCES)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", ""),
        ('{"a": 1}\n', '{"a": 1}\n'),
        ('{"a": 1}', '{"a": 1}\n'),
        ('{"a": 1}\n{"a": "é', '{"a": 1}\n'),
        ("{", ""),
    ],
)
def test_a_last_line_is_whole_or_gone(tmp_path, text, kept):
    path = tmp_path / "direct.jsonl"
    path.write_text(text)
    end_last_line(path)
    assert path.read_text() == kept


def test_latents_in_a_batch_are_left_out_and_sending_meanwhile_is_refused(server, options, capsys):
    batch_options = {name: value for name, value in options.items() if name != "requests_per_minute"}
    call(send_script, **batch_options, latents="0-9")
    call(script, **options)
    assert asked(server) == ["10", "11"]
    with open_journal(options["response_ids_filepath"], "meanings by mean"):
        assert "in use" in refusal(capsys, script, **options)


def test_when_one_request_fails_for_good_the_answers_under_way_are_kept(server, options, capsys):
    server.plan["messages"] += [None, None, Fail(402, "out of money")]
    assert "no credit" in refusal(capsys, script, **options, concurrency=4)
    n_paid = server.calls("messages") - 1
    assert len(answers(options)) == n_paid >= 2
    call(script, **options)
    assert sorted(int(line["custom_id"]) for line in answers(options)) == sorted(SENTENCES)


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (Fail(401, "invalid x-api-key"), "refuses the key"),
        (Fail(400, NO_CREDIT), "no credit"),
        (Fail(403, "not for you"), "not allowed to do this"),
        (Fail(404, "model: claude-haiku-5-5"), "check the model's name"),
    ],
    ids=str,
)
def test_what_would_befall_every_request_stops_it_in_a_sentence(server, options, capsys, fail, words):
    server.plan["messages"] += [fail] * 20
    assert words in refusal(capsys, script, **options, concurrency=2)
    assert server.calls("messages") <= 3 and answers(options) == []


def test_a_request_that_is_refused_for_itself_is_noted_and_sent_again_next_time(server, options):
    server.plan["messages"] += [Fail(400, "prompt is too long")]
    call(script, **options, concurrency=1)
    by_id = {line["custom_id"]: line["result"] for line in answers(options)}
    assert by_id["0"]["type"] == "errored" and by_id["0"]["error"]["error"]["message"] == "prompt is too long"
    assert sum(result["type"] == "succeeded" for result in by_id.values()) == 11
    server.seen.clear()
    call(script, **options)
    assert asked(server) == ["0"]


def test_when_everything_is_refused_it_stops(server, options, capsys):
    server.plan["messages"] += [Fail(400, "output_config: not known")] * 12
    assert "output_config: not known" in refusal(capsys, script, **options, concurrency=1)
    assert server.calls("messages") <= 11


def test_the_rate_is_kept_and_requests_run_together(server, options):
    starts = []
    usual = server.answer

    def slow(custom_id, params):
        starts.append(time.monotonic())
        time.sleep(0.3)
        return usual(custom_id, params)

    server.answer = slow
    begin = time.monotonic()
    call(script, **options | {"requests_per_minute": 60 / 0.05}, concurrency=12)
    assert starts[-1] - starts[0] >= 10 * 0.05
    assert time.monotonic() - begin < 12 * 0.3  # one after another would take as long


def test_a_server_without_prices_and_token_counts(server, options, capsys):
    server.plan["count_tokens"] += [Fail(404, "no such path")]
    call(script, **options, dry_run=True, effort="")
    assert "does not count tokens" in capsys.readouterr().out and server.calls("messages") == 0
