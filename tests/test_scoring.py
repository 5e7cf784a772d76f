"""Detection scoring: perfect, constant and shuffled predictors, by words and through the real client against a local
server; the sentences shown are held out and half of them silent.

.venv/bin/python -m pytest tests/test_scoring.py
"""

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import PROJECT_DIR
from hypothesis import given
from hypothesis import strategies as st
from support.fake_anthropic import Fail, FakeAnthropic, message
from support.pipeline_runs import call, refusal

import score_interpretations as scoring
from claude import batches
from llama_3 import load_tokenizer
from pipeline.files import write_json
from pipeline.sae_files import SaeFiles

TOKENIZER_DIR = PROJECT_DIR / "llama_3/tiny_llama"
TOKENIZER = load_tokenizer(TOKENIZER_DIR)
NAMES = {4: "llama", 7: "of", 9: "unicorn", 11: "llama"}  # 4 right, 7 everywhere, 9 nowhere, 11 has too few sentences
N, SHOWN = 6, 3
SHOWN_TEXT = "A llama that was shown"


def rows_of(latent: int, texts: list[str], **more) -> list[dict]:
    return [{"latent": latent, "text": text, "token_ids": TOKENIZER.encode(text)} | more for text in texts]


@pytest.fixture
def folder(tmp_path):
    """Files of an SAE: every firing sentence contains "llama", no silent one does, and all contain "of"."""
    examples, top = [], []
    for latent in NAMES:
        n_silent = 2 if latent == 11 else 9
        examples += rows_of(latent, [f"A herd of {i} camels\nin {latent}" for i in range(n_silent)], tenth=-1)
        for tenth in (0, 3, 9):
            texts = [SHOWN_TEXT, *(f"A llama of {tenth} and {i}" for i in range(3))]
            examples += rows_of(latent, texts, tenth=tenth)
        for rank, text in enumerate([SHOWN_TEXT, "Others", "More", "A llama of 9 and 0"]):  # the last one not shown
            top += rows_of(latent, [text], aggregation="max", rank=rank, token_activations=[])
    pq.write_table(pa.Table.from_pylist(examples), tmp_path / "sae.examples.parquet")
    pq.write_table(pa.Table.from_pylist(top), tmp_path / "sae.top.parquet")
    write_json(tmp_path / "sae.json", {"model_dir": str(TOKENIZER_DIR)})
    entries = {latent: {"certainty": 1.0, "common_semantic": name} for latent, name in NAMES.items()}
    (tmp_path / "sae.meaning_max.yaml").write_text(yaml.safe_dump(entries))
    return tmp_path


def options(folder, **more):
    paths = {"meaning_filepath": folder / "sae.meaning_max.yaml", "model_path": folder / "sae.pth"}
    return paths | {"sentences": N, "min_sentences": 4, "shown_sentences": SHOWN} | more


def scores(folder) -> dict[int, dict]:
    rows = pq.read_table(folder / "sae.meaning_max.scores.parquet").to_pylist()
    assert (folder / "sae.meaning_max.scores.png").read_bytes()[:4] == b"\x89PNG"
    return {row.pop("latent"): row for row in rows}


# ---- without a model


def test_words(folder, capsys):
    call(scoring, **options(folder, scorer="words"))
    found = scores(folder)
    assert {latent: row["balanced_accuracy"] for latent, row in found.items()} == {4: 1.0, 7: 0.5, 9: 0.5}
    assert all(row["sentences"] == 2 * N for row in found.values())
    assert {row["shuffled"] for row in found.values()} <= {0.5, 1.0} and found[4]["shuffled"] == 0.5
    said = capsys.readouterr().out
    assert "3 of 4 meanings scored" in said and "mean 0.667, median 0.500, 33.3% above 0.7" in said
    assert "another latent's meaning" in said


def test_sentences_are_held_out_balanced_and_from_all_tenths(folder):
    token_bytes = TOKENIZER.token_bytes
    draw = scoring.Draw(sentences=N, min_sentences=4, shown_sentences=SHOWN, seed=0)
    files = SaeFiles(folder / "sae.pth")
    asked = dict(scoring.draw_examples(files, NAMES, token_bytes, draw))
    assert asked.keys() == {4, 7, 9}
    for examples in asked.values():
        texts = [b"".join(e.tokens).decode() for e in examples]
        assert sorted(e.tenth for e in examples) == [-1] * N + [0, 0, 3, 3, 9, 9]
        assert SHOWN_TEXT not in texts and len(set(texts)) == 2 * N
        assert all(("llama" in text) == (e.tenth >= 0) for text, e in zip(texts, examples, strict=True))
    orders = [[e.tenth for e in examples] for examples in asked.values()]
    assert len({tuple(order) for order in orders}) > 1  # each latent has its own order
    assert dict(scoring.draw_examples(files, NAMES, token_bytes, draw)) == asked
    few = dict(scoring.draw_examples(files, NAMES, token_bytes, draw._replace(sentences=4)))
    assert [len(examples) for examples in few.values()] == [8] * 3


def test_moved_files_and_another_working_directory(folder, tmp_path, monkeypatch):
    """The model's folder is found from the SAE, not from the working directory."""
    call(scoring, **options(folder, scorer="words"))
    before = scores(folder)
    shutil.copytree(TOKENIZER_DIR, tmp_path / "moved" / "model", ignore=shutil.ignore_patterns("sae*"))
    for path in folder.glob("sae.*"):
        shutil.copy(path, tmp_path / "moved")
    write_json(tmp_path / "moved" / "sae.json", {"model_dir": "model", "absolute": {"model_dir": "/nowhere"}})
    monkeypatch.chdir(tmp_path / "moved")
    call(scoring, scorer="words", **options(Path()))
    assert scores(tmp_path / "moved") == before


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_balanced_accuracy(pairs):
    """(fires, picked) for each sentence, against the mean of sensitivity and specificity."""
    pairs = [*pairs, (True, True), (False, True)]
    examples = [scoring.Example([], 5 if fires else -1) for fires, _ in pairs]
    said = {number for number, (_, s) in enumerate(pairs, 1) if s}
    hits = [s for fires, s in pairs if fires]
    passes = [not s for fires, s in pairs if not fires]
    expected = (sum(hits) / len(hits) + sum(passes) / len(passes)) / 2
    assert scoring.balanced_accuracy(examples, said) == pytest.approx(expected)
    firing = {number for number, e in enumerate(examples, 1) if e.tenth >= 0}
    assert scoring.balanced_accuracy(examples, firing) == 1.0
    for constant in (set(), set(range(1, len(pairs) + 1))):
        assert scoring.balanced_accuracy(examples, constant) == 0.5


# ---- answers


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[1, 3]", {1, 3}),
        ("[]", set()),
        ("It fires in [1] and more.\n\n```json\n[2, 4]\n```\n", {2, 4}),
        ("[3, 3]", {3}),
        ("", None),
        ("1, 3", None),
        ("[0, 1]", None),
        ("[5]", None),
        ("[1.0]", None),
        ("[true]", None),
        ('["1"]', None),
        ("[1, 2", None),
        ("[1] [x", {1}),
        ("[1, 3,]", {1, 3}),
        ("[,]", None),
        ("[" + "9" * 5000 + "]", None),
    ],
)
def test_numbers_in(answer, expected):
    assert scoring.numbers_in(answer, 4) == expected


@given(st.sets(st.integers(1, 12)), st.text(st.characters(exclude_characters="[]")), st.text(max_size=20))
def test_numbers_in_any_wrapping(numbers, before, after):
    answer = f"{before}{json.dumps(sorted(numbers))}" + after.replace("[", "(").replace("]", ")")
    assert scoring.numbers_in(answer, 12) == numbers
    found = scoring.numbers_in(after, 12)  # anything at all: no exception
    assert found is None or found <= set(range(1, 13))


# ---- Claude


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(batches, "LONGEST_WAIT_S", 0.01)
    with FakeAnthropic() as fake:
        fake.set_environment(monkeypatch)
        fake.answer = detect
        yield fake


def detect(custom_id: str, params: dict) -> dict:
    """A scorer that picks the sentences containing the word in the description."""
    text = params["messages"][0]["content"]
    word = text.split(":\n\n")[1].split("\n")[0]
    lines = re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE)
    assert len(lines) == 2 * N
    return succeeded("Those: " + json.dumps([int(number) for number, line in lines if word in line.split()]))


def succeeded(text: str) -> dict:
    return {"type": "succeeded", "message": message(text)}


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["claude", "direct"])
def test_through_claude(folder, server, scorer, capsys):
    server.looks_until_ended = 2
    call(scoring, **options(folder, scorer=scorer, yes=True, poll_s=0.01))
    found = scores(folder)
    assert {latent: row["balanced_accuracy"] for latent, row in found.items()} == {4: 1.0, 7: 0.5, 9: 0.5}
    assert {row["shuffled"] for row in found.values()} == {None}
    assert "USD" in capsys.readouterr().out
    asked = len(server.sent_ids()), server.calls("messages")
    assert asked == ((3, 0) if scorer == "claude" else (0, 3))
    call(scoring, **options(folder, scorer=scorer, yes=True, poll_s=0.01))
    assert (len(server.sent_ids()), server.calls("messages")) == asked  # nothing is paid twice
    assert scores(folder) == found


def test_answers_that_cannot_be_used_are_listed_and_failed_requests_asked_again(folder, server, capsys):
    error = {"type": "errored", "error": {"type": "error", "error": {"type": "api_error", "message": "oops"}}}
    bad = {"7": succeeded("All of them."), "9": error}
    server.answer = lambda custom_id, params: bad.get(custom_id) or detect(custom_id, params)
    chosen = options(folder, scorer="claude", yes=True, poll_s=0.01)
    call(scoring, **chosen)
    assert scores(folder).keys() == {4}
    path = folder / "sae.meaning_max.scores.rejected.jsonl"
    rejected = {r["custom_id"]: r for r in map(json.loads, path.read_text().splitlines())}
    assert rejected["7"]["status"] == "no_list" and rejected["7"]["text"] == "All of them."
    assert rejected["9"]["status"] == "errored" and rejected.keys() == {"7", "9"}
    assert "2 answers" in capsys.readouterr().out
    bad.clear()
    call(scoring, **chosen)
    assert sorted(server.sent_ids()) == ["4", "7", "9", "9"]  # what errored was not paid for
    assert scores(folder).keys() == {4, 9}


def test_killed_while_waiting(folder, server, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    server.looks_until_ended = 1
    chosen = options(folder, scorer="claude", yes=True, poll_s=0.01)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(batches.time, "sleep", kill)
        call(scoring, **chosen)
    assert len(server.sent_ids()) == 3 and not list(folder.glob("*.scores.*"))
    call(scoring, **chosen)
    assert len(server.sent_ids()) == 3 and scores(folder)[4]["balanced_accuracy"] == 1.0


def test_other_meanings_are_other_questions(folder, server):
    chosen = options(folder, scorer="claude", yes=True, poll_s=0.01)
    call(scoring, **chosen)
    path = folder / "sae.meaning_max.yaml"
    path.write_text(path.read_text().replace("unicorn", "llama"))
    call(scoring, **chosen)
    assert len(server.sent_ids()) == 6 and scores(folder)[9]["balanced_accuracy"] == 1.0


def test_dry_run_sends_nothing(folder, server, capsys):
    call(scoring, **options(folder, scorer="claude", dry_run=True))
    assert "3 requests" in capsys.readouterr().out
    assert not server.batches and not list(folder.glob("*.scores.*"))


def test_unclear_creation_is_not_repeated(folder, server):
    server.plan["create"] += [Fail(529), "create then 500"]
    call(scoring, **options(folder, scorer="claude", yes=True, poll_s=0.01, settle_s=0.2))
    assert len(server.sent_ids()) == 3 and len(scores(folder)) == 3


# ---- refusals


def test_refusals(folder, capsys, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    monkeypatch.delenv("ANTHROPIC_AUTH_TOKEN", raising=False)
    assert "ANTHROPIC_API_KEY" in refusal(capsys, scoring, **options(folder, scorer="claude", yes=True))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "test-key")
    assert "--yes" in refusal(capsys, scoring, **options(folder, scorer="claude"))
    assert "claude, direct or words" in refusal(capsys, scoring, **options(folder, scorer="gpt"))
    chosen = options(folder, scorer="words")
    assert "lower --min_sentences" in refusal(capsys, scoring, **chosen | {"min_sentences": 50})
    for text in ("[1, 2]", "1: 2", "{1: {certainty: 1}}", ": :", "x: {common_semantic: y}", "{}"):
        (folder / "bad.yaml").write_text(text)
        assert "bad.yaml" in refusal(capsys, scoring, **chosen | {"meaning_filepath": folder / "bad.yaml"})
    assert "nowhere.yaml" in refusal(capsys, scoring, **chosen | {"meaning_filepath": folder / "nowhere.yaml"})
    (folder / "sae.examples.parquet").unlink()
    said = refusal(capsys, scoring, **chosen)
    assert "sae.examples.parquet" in said and "capture_top_activating_sentences.py" in said
    assert not list(folder.glob("*.scores.*"))


def test_a_place_that_cannot_be_written_is_said_before_the_scoring(folder, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "by_words", None)
    chosen = options(folder, scorer="words")
    Path(chosen["meaning_filepath"]).with_suffix(".scores.parquet").mkdir()
    assert "scores.parquet cannot be written (Is a directory)" in refusal(capsys, scoring, **chosen)
