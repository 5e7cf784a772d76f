"""The send script against a local server: what it asks, what it leaves out, and that no kill makes it pay twice.

Compares the requests the server received with the sentences in the file, and marked text with the text itself.

.venv/bin/python -m pytest tests/test_send_batches.py
"""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import claude_runs
from support.claude_runs import TOKENIZER, asking_options, kill_when
from support.fake_anthropic import NO_CREDIT, Fail, FakeAnthropic, meaning
from support.pipeline_runs import call, refusal

import interpret_top_sentences_retrieve_batches as retrieve_script
import interpret_top_sentences_send_batches as script
from claude.answers import answered
from claude.journal import open_journal
from claude.questions import with_marks
from latents.tables import top_sentences

SENTENCES = {latent: [f"the {latent} ring", f"hello {latent}", "12 aaaa\n\nllo"] for latent in (0, 3, 4, 17, 90, 101)}


@pytest.fixture
def server(monkeypatch):
    with FakeAnthropic() as fake:
        fake.set_environment(monkeypatch)
        yield fake


@pytest.fixture
def options(tmp_path) -> dict:
    return asking_options(tmp_path, SENTENCES) | {"settle_s": 0.5}


def retrieve(options: dict) -> None:
    call(retrieve_script, **{name: options[name] for name in ("response_ids_filepath", "response_output_dir")})


def all_ids() -> list[str]:
    return sorted(map(str, SENTENCES))


# ---- what is asked


def test_a_latent_is_asked_with_its_strongest_sentences_as_the_model_read_them(server, options):
    call(script, **options, sentences_per_request=2, model="claude-sonnet-5-5", max_tokens=77, effort="medium")
    (batch,) = server.batches
    assert [request["custom_id"] for request in batch.requests] == ["0", "3", "4", "17", "90", "101"]
    params = batch.requests[3]["params"]
    (question,) = params.pop("messages")
    assert params == {"model": "claude-sonnet-5-5", "max_tokens": 77, "output_config": {"effort": "medium"}}
    content = question["content"]
    shown = content.split("<sentences>\n")[1].split("\n</sentences>")[0].split("\n")
    plain = [line.replace("<<", "").replace(">>", "") for line in shown]
    assert plain == ["1. the 17 ring", "2. hello 17"]
    assert all(line.count("<<") == 1 for line in shown)
    assert '{"common_semantic": "' in content and "{n}" not in content and "{sentences}" not in content


def test_no_marks_no_effort_other_aggregation(server, options):
    call(script, **options, mark_share=2, effort="", aggregation="last", latents="17")
    ((request,),) = [batch.requests for batch in server.batches]
    content = request["params"]["messages"][0]["content"]
    assert "output_config" not in request["params"] and "<<" not in content
    assert "1. last the 17 ring\n2. last hello 17\n3. last 12 aaaa\\n\\nllo\n" in content


@given(st.data(), st.text(st.characters(exclude_characters="<>\r\n", exclude_categories=["Cs"])), st.floats(0.01, 1))
def test_marks_are_put_around_whole_characters_of_strong_tokens(data, text, share):
    raw = text.strip().encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=8)))
    bounds = [(a, b) for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) if a < b]
    activations = [data.draw(st.sampled_from([0.0, 1.0, 2.0, 4.0])) for _ in bounds]
    marked = with_marks([raw[a:b] for a, b in bounds], activations, share)
    assert marked.replace("<<", "").replace(">>", "") == text.strip()

    # Tokens between two cuts that fall between characters are marked together, or not at all.
    between_characters = {len(text.strip()[:n].encode()) for n in range(len(text.strip()) + 1)}
    strong, start = "", 0
    for end in [*(cut for cut in cuts if cut in between_characters), len(raw)]:
        highest = max((h for h, (a, b) in zip(activations, bounds, strict=True) if start <= a and b <= end), default=0)
        if highest > 0 and highest >= share * max(activations):
            strong += raw[start:end].decode()
        start = max(start, end)
    inside = "".join(part.split(">>")[0] for part in marked.split("<<")[1:])
    assert "".join(inside.split()) == "".join(strong.split())


@pytest.mark.parametrize(
    ("latents", "expected"),
    [("0-4", ["0", "3", "4"]), ("17,90", ["17", "90"]), ("3-3,100-200", ["3", "101"]), ("101,0", ["0", "101"])],
)
def test_latents_can_be_chosen(server, options, latents, expected):
    call(script, **options, latents=latents)
    assert server.sent_ids() == expected


def test_latents_with_few_sentences_are_not_asked(server, tmp_path):
    options = asking_options(tmp_path, {1: ["one"] * 4, 2: ["one"] * 5})
    del options["min_sentences"]
    call(script, **options)
    assert server.sent_ids() == ["2"]


def test_moved_files_and_another_working_directory(server, options, tmp_path, monkeypatch):
    """The model's folder is found relative to the SAE, wherever both are now."""
    before = tmp_path / "before"
    (tmp_path / "sae.json").write_text(json.dumps({"model_dir": ".", "absolute": {"model_dir": str(before)}}))
    monkeypatch.chdir("/")
    del options["model_dir"]
    call(script, **options)
    assert server.sent_ids() == ["0", "3", "4", "17", "90", "101"]


# ---- before anything is sent


def test_dry_run_tells_the_price_and_sends_nothing(server, options, capsys):
    call(script, **options | {"yes": False}, dry_run=True)
    said = capsys.readouterr().out
    assert "6 requests to claude-haiku-5-5" in said and "USD in batch mode" in said and "Nothing was sent" in said
    assert server.calls("create") == 0 and server.calls("count_tokens") == 6
    assert not options["response_ids_filepath"].exists()


@pytest.mark.parametrize(("reply", "n_batches"), [("y", 1), ("no", 0), ("", 0)])
def test_it_asks(server, options, monkeypatch, reply, n_batches):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: reply)
    call(script, **options | {"yes": False})
    assert len(server.batches) == n_batches


def test_the_length_of_answers_that_are_there_is_used_for_the_price(server, options, capsys):
    call(script, **options, latents="0-4")
    retrieve(options)
    capsys.readouterr()
    call(script, **options, dry_run=True)
    n_words = len(meaning("0", {"model": ""})["message"]["content"][0]["text"].split())
    assert f"assuming {n_words} output tokens" in capsys.readouterr().out


def test_bad_input_is_refused_in_a_sentence_and_nothing_is_written(server, options, tmp_path, capsys, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    refused = lambda **changes: refusal(capsys, script, **options | changes)
    assert "There is no nowhere.parquet" in refused(top_sentences_dict_filepath="nowhere.parquet")
    not_parquet = tmp_path / "tokenizer.model"
    assert "cannot be read as a parquet file" in refused(top_sentences_dict_filepath=not_parquet)
    assert "pass --yes" in refused(yes=False)
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    assert "no API key" in refused()
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_choices_are_refused_in_a_sentence(server, options, capsys):
    refused = lambda **changes: refusal(capsys, script, **options | changes)
    assert "write it like 0-99,512" in refused(latents="9-3")
    assert "write it like 0-99,512" in refused(latents="a")
    assert "--aggregation median is unknown; write mean, max or last." in refused(aggregation="median")
    assert "choose others" in refused(latents="5000")
    assert "claude-nobody" in refused(model="claude-nobody")
    without_json = {name: value for name, value in options.items() if name != "model_dir"}
    assert "--model_dir" in refusal(capsys, script, **without_json)
    call(script, **options, latents="0")
    assert "holds batches for 'meanings by mean'" in refused(aggregation="max")


@pytest.mark.parametrize(("fail", "words"), [(Fail(401, "invalid x-api-key"), "key"), (Fail(400, NO_CREDIT), "credit")])
def test_a_wrong_key_and_no_credit_are_a_sentence(server, options, capsys, fail, words):
    server.plan["count_tokens"] += [fail]
    assert words in refusal(capsys, script, **options)
    assert server.batches == []


# ---- nothing lost, nothing twice


def test_what_has_an_answer_or_is_under_way_is_left_out_and_what_failed_is_sent_again(server, options):
    types = {"0": "errored", "3": "expired", "4": "canceled"}

    def fail_at_first(custom_id, params):
        if custom_id in types and len(server.batches) == 1:
            error = {"type": "error", "error": {"type": "api_error", "message": "no"}}
            return {"type": types[custom_id]} | ({"error": error} if types[custom_id] == "errored" else {})
        return meaning(custom_id, params)

    server.answer = fail_at_first
    call(script, **options)
    call(script, **options)  # all are in flight
    assert len(server.batches) == 1
    retrieve(options)
    call(script, **options)
    assert sorted(r["custom_id"] for r in server.batches[1].requests) == ["0", "3", "4"]
    retrieve(options)
    call(script, **options)
    assert len(server.batches) == 2 and answered(options["response_output_dir"]) == set(all_ids())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["hang", "create then hang"])
def test_killed_while_a_batch_is_created_and_run_again(server, options, moment):
    server.plan["create"] += [None, moment]
    options["requests_per_batch"] = 2
    kill_when(server.arrived, script, options)
    assert len(server.batches) == (1 if moment == "hang" else 2)
    call(script, **options)
    assert sorted(server.sent_ids()) == all_ids()
    assert [len(batch.requests) for batch in server.batches] == [2, 2, 2]
    retrieve(options)
    assert answered(options["response_output_dir"]) == set(all_ids())


def test_two_processes_do_not_send_together(server, options, capsys):
    with open_journal(options["response_ids_filepath"], "meanings by mean"):
        assert "in use by another process" in refusal(capsys, script, **options)


def test_the_files_are_read_as_the_tokenizer_reads(tmp_path):
    path = claude_runs.write_top_sentences(tmp_path, {5: ["é hello“"], 6: ["in"]})
    ((latent, (sentence,)),) = top_sentences(Path(path), "mean", 10, [range(5, 6)])
    assert (
        latent == 5 and TOKENIZER.decode(sentence.token_ids) == "é hello“" and sentence.token_activations[:2] == [8, 7]
    )
