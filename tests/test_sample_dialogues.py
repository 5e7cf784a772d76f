"""Dialogues sampled from a tiny random model that can chat: filters, resuming, refusals.

.venv/bin/python -m pytest tests/test_sample_dialogues.py
"""

import pyarrow.parquet as pq
import pytest
from support.chat_models import write_chat_model
from support.pipeline_runs import call, refusal

import sample_dialogues
from llama_3 import load_model, load_tokenizer
from llama_3.chat import Message
from llama_3.generation import stream_chat
from pipeline.distributed import ALONE
from pipeline.manifests import MANIFEST, read_manifest
from sample_dialogues import Answerer, Sampling, is_worth_keeping, questions, sample_share, whole_sentences

OPTIONS = {
    "num_dialogues": 7,
    "max_new_tokens": 6,
    "batch_size": 3,
    "dtype": "float32",
    "temperature": 1.0,
    "top_p": 1.0,
}
PROSE = " ".join(f"Word{i} is followed by another word{i}." for i in range(20))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def keep_all(monkeypatch):
    """A random model's answers are no English."""
    monkeypatch.setattr(sample_dialogues, "whole_sentences", lambda answer: answer)
    monkeypatch.setattr(sample_dialogues, "is_worth_keeping", lambda answer: len(answer) % 3 > 0)


# ---- questions and filters


def test_every_topic_is_asked_about_in_every_kind_of_text_once():
    asked = questions(0, seed=0)
    n_topics = sum(theme.count(";") + 1 for theme in sample_dialogues._TOPICS.values())
    assert len({question.text for question in asked}) == len(asked) == n_topics * len(sample_dialogues._KINDS)
    assert {question.kind for question in asked} == set(sample_dialogues._KINDS)
    assert len({question.seed for question in asked}) == len(asked)
    assert questions(5, seed=0) == asked[:5] != questions(5, seed=1)


def test_topics_are_plain_words():
    topics = [topic for theme in sample_dialogues._TOPICS.values() for topic in theme.split("; ")]
    assert all(topic == " ".join(topic.split()) and "{" not in topic for topic in topics)
    assert len(set(topics)) == len(topics)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("One. Two! And thr", "One. Two!"),
        ('She said "Go." Then', 'She said "Go."'),
        ("It is 3.5 and no", ""),
        ("All of it?", "All of it?"),
        ("One.\n\n2", "One."),
        (" One.  ", "One."),
        ("", ""),
    ],
)
def test_an_answer_ends_with_its_last_whole_sentence(answer, expected):
    assert whole_sentences(answer) == expected


def test_short_repeated_and_foreign_answers_are_dropped():
    assert is_worth_keeping(PROSE)
    assert not is_worth_keeping(" ".join(PROSE.split()[:39])) and is_worth_keeping(" ".join(PROSE.split()[:40]))
    assert not is_worth_keeping("Again and again and again. " * 20)
    assert not is_worth_keeping(PROSE + "再" * (len(PROSE) // 30))
    assert not is_worth_keeping("")


# ---- the stage


def test_the_dialogues_hold_what_the_model_answers_to_each_question(model_dir, tmp_path, keep_all, monkeypatch):
    monkeypatch.setattr(sample_dialogues, "is_worth_keeping", lambda answer: True)
    call(sample_dialogues, model_dir=model_dir, output_dir=tmp_path / "out", **OPTIONS)
    model, tokenizer = load_model(str(model_dir)), load_tokenizer(str(model_dir))
    rows = pq.read_table(tmp_path / "out" / "dialogues.parquet").to_pylist()
    for row, question in zip(rows, questions(7, seed=0), strict=True):
        asked, answered = row["messages"]
        assert asked == {"role": "user", "content": question.text} and answered["role"] == "assistant"
        assert question.text == row["kind"].format(row["topic"])
        alone = stream_chat(
            model,
            tokenizer,
            [[Message("user", question.text)]],
            max_new_tokens=6,
            temperature=1.0,
            seeds=[question.seed],
        )
        assert answered["content"] == "".join(text for (text,) in alone)
    manifest = read_manifest(tmp_path / "out", "sample_dialogues.py")
    answers = [row["messages"][1]["content"] for row in rows]
    assert manifest["counts"] == {
        "dialogues": 7,
        "dropped": 0,
        "tokens": sum(len(tokenizer.encode(answer)) for answer in answers),
        "characters": sum(map(len, answers)),
    }
    assert [path.name for path in sorted((tmp_path / "out").glob("[!.]*"))] == ["dialogues.parquet", MANIFEST]


def test_a_run_that_was_stopped_gives_the_same_file(model_dir, tmp_path, keep_all, monkeypatch, capsys):
    call(sample_dialogues, model_dir=model_dir, output_dir=tmp_path / "whole", **OPTIONS)
    expected = (tmp_path / "whole" / "dialogues.parquet").read_bytes()
    write_part, written = sample_dialogues.write_part, []

    def stopping(path, *args):
        if len(written) == 1:
            raise MemoryError
        written.append(path.name)
        write_part(path, *args)

    monkeypatch.setattr(sample_dialogues, "write_part", stopping)
    for _ in range(3):
        written.clear()
        try:
            call(sample_dialogues, model_dir=model_dir, output_dir=tmp_path / "out", **OPTIONS)
        except MemoryError:
            assert not (tmp_path / "out" / "dialogues.parquet").exists()
    assert (tmp_path / "out" / "dialogues.parquet").read_bytes() == expected
    dropped = read_manifest(tmp_path / "out", "sample_dialogues.py")["counts"]["dropped"]
    assert dropped > 0 and len(pq.read_table(tmp_path / "out" / "dialogues.parquet")) == 7 - dropped > 0

    (tmp_path / "out" / "part-00000.parquet").touch()  # as after a kill between the manifest and the clearing up
    capsys.readouterr()
    call(sample_dialogues, model_dir=model_dir, output_dir=tmp_path / "out", **OPTIONS)
    assert "already complete" in capsys.readouterr().out and not list((tmp_path / "out").glob("part-*"))


def test_two_processes_write_the_parts_that_one_writes(model_dir, tmp_path, keep_all):
    answerer = Answerer(load_model(str(model_dir)), load_tokenizer(str(model_dir)), Sampling(6, 1.0, 1.0))
    asked = questions(7, seed=0)
    batches = [asked[:3], asked[3:6], asked[6:]]
    sample_share(answerer, batches, tmp_path / "one", ALONE)
    parts = [path.name for path in sorted((tmp_path / "one").iterdir())]
    assert len(parts) == 3
    for rank in (1, 0):
        sample_share(answerer, batches, tmp_path / "two", ALONE._replace(rank=rank, size=2))
        assert sorted(path.name for path in (tmp_path / "two").iterdir()) == (parts[1:2] if rank else parts)
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in parts)


def test_a_folder_begun_with_other_options_is_refused(model_dir, tmp_path, capsys, monkeypatch):
    options = {"model_dir": model_dir, "output_dir": tmp_path / "out", **OPTIONS}
    call(sample_dialogues, **options)
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    assert "begun with temperature = 1.0, but now it is 0.5" in refusal(
        capsys, sample_dialogues, **options | {"temperature": 0.5}
    )
    assert "begun with questions" in refusal(capsys, sample_dialogues, **options | {"num_dialogues": 6})
    monkeypatch.setattr(sample_dialogues, "_KINDS", ("Sing about {}.",))
    assert "begun with questions" in refusal(capsys, sample_dialogues, **options)
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before


def test_models_that_cannot_answer_are_refused_and_nothing_is_written(model_dir, tmp_path, capsys):
    options = {"output_dir": tmp_path / "out", **OPTIONS}
    long = refusal(capsys, sample_dialogues, model_dir=model_dir, **options | {"max_new_tokens": 10**6})
    assert "exceed the model's context" in long
    stubborn = write_chat_model(tmp_path / "stubborn", template="{{ raise_exception('I need a system message.') }}")
    refused = refusal(capsys, sample_dialogues, model_dir=stubborn, **options)
    assert "chat.gguf refuses this dialogue: I need a system message." in refused
    base = write_chat_model(tmp_path / "base", template=None, chat_tokens=False)
    assert "so it cannot chat" in refusal(capsys, sample_dialogues, model_dir=base, **options)
    assert not (tmp_path / "out").exists()
