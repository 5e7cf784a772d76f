"""Sentences against the documents they came from, and the reader against numpy's shuffle.

Documents must come back exactly from texts and gaps, whatever is in them; the shards must not depend on the number of
processes or on an interruption; a folder of the published kind, with a column `text` and no manifest, must be read.
The script runs as its users run it, in a process of its own; Punkt is trained on the documents, without network.

    .venv/bin/python -m pytest tests/test_sentences.py
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PROJECT_DIR
from hypothesis import example, given
from hypothesis import strategies as st

import openwebtext_sentences_dataset as sentences
from stage import InputError

PROSE = (
    "Dr. Smith went home at 5 p.m. yesterday. He slept. Prof. Miller did not; she wrote to Dr. Brown, who lives in the "
    'U.S. and reads a lot. Did he answer? Yes! Mr. Jones (a friend) said: "Go." Nobody went.\n\nThe end came at last. '
)
DOCUMENTS = [
    PROSE * 3,
    "",
    " \n\t \u3000 ",
    "  Leading space. And trailing space.  \n\n",
    "A NUL\0 here.\0 And\0\0there. \0",
    b"Broken \xff\xfe bytes. And a cut \xe4\xb8",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002\u6211\u4eec\u53bb\u516c\u56ed\u5427\uff01\u597d\u7684\u3002",
    "\u0634\u0643\u0631\u0627 \u062c\u0632\u064a\u0644\u0627. "
    "\u0647\u0644 \u0623\u0646\u062a \u0628\u062e\u064a\u0631\u061f \u202eabc\u202c. \u05e9\u05dc\u05d5\u05dd!",
    "Go on. " * 500 + "x" * 200_000,  # a line of 203 kB
    None,
    "No end\r\nof line\rat all \u2028 here. \U0001f469\u200d\U0001f680 e\u0301. \ufeffEnd.",
    PROSE,
]  # fmt: skip
EXPECTED = [(d or b"").decode(errors="replace") if isinstance(d or b"", bytes) else d for d in DOCUMENTS]


@pytest.fixture(scope="module")
def splitter(tmp_path_factory):
    """Punkt trained on a little text, after its parameters went through JSON."""
    path = tmp_path_factory.mktemp("punkt") / "documents.parquet"
    pq.write_table(pa.table({"text": [PROSE] * 20}), path)
    fields, _ = sentences.load_punkt("corpus", [path], train_mb=1.0)
    return sentences.make_splitter(json.loads(json.dumps(fields)))


# ---- splitting one document

characters = st.characters(exclude_categories=["Cs"])
words = st.sampled_from(
    [
        "Dr.",
        "Smith",
        "He",
        "p.m.",
        "go",
        "!",
        "?",
        "...",
        '."',
        ".)",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\0",
        "\x1c",
        "\x85",
        ".",
    ]
    + ["\u00a0", "\u3000", "\u3002", "\u2028", "\u061f", "\u202e", "1.", "e.g.", "end."]
)
documents = st.lists(st.one_of(words, st.text(characters, max_size=6)), max_size=40).map("".join)


@given(documents)
@example("")
@example(" \n ")
@example("  One.  Two.  ")
@example('He said "no." (Yes.) Then. ')
def test_texts_and_gaps_joined_are_the_document(splitter, document):
    rows = sentences.split_document(splitter, document)
    position = 0
    for text, start, gap in rows:
        assert start == position and document.startswith(text, start)
        position += len(text) + len(gap)
        assert text or len(rows) == 1  # only a document without text has an empty sentence
        assert not gap.strip()  # no text hides in a gap
    assert position == len(document)
    assert "".join(text + gap for text, _, gap in rows) == document
    assert [(text, start) for text, start, _ in rows if text] == [
        (document[a:b], a) for a, b in splitter.span_tokenize(document) if b > a
    ]


def test_sentences_end_where_a_reader_ends_them(splitter):
    rows = sentences.split_document(splitter, "Dr. Smith slept. Did he? Yes!\n\nHe did.")
    assert rows == [("Dr. Smith slept.", 0, " "), ("Did he?", 17, " "), ("Yes!", 25, "\n\n"), ("He did.", 31, "")]


# ---- the script


def run(input_path: Path, output_dir: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "openwebtext_sentences_dataset.py", "--input_path", str(input_path), "--output_dir"]
    command += [str(output_dir), "--punkt", "corpus", "--punkt_train_mb", "0.01", "--shard_mb", "0.0001", *options]
    return subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, timeout=120)


def write_documents(folder: Path, documents: list, name: str = "a.parquet") -> Path:
    """One parquet file whose column `text` has the type of text but holds the given bytes."""
    raw = [d.encode() if isinstance(d, str) else d for d in documents]
    column = pa.Array.from_buffers(pa.string(), len(raw), pa.array(raw, pa.binary()).buffers())
    folder.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table({"id": range(len(raw)), "text": column}), folder / name)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of documents, in two files, and the sentences of them by two processes."""
    folder = tmp_path_factory.mktemp("sentences")
    write_documents(folder / "documents", DOCUMENTS[:5], "a.parquet")
    write_documents(folder / "documents", DOCUMENTS[5:], "b.parquet")
    found = run(folder / "documents", folder / "sentences", "--num_processes", "2")
    assert found.returncode == 0, found.stderr
    return folder / "documents", folder / "sentences"


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def read_rows(folder: Path) -> list[dict]:
    return [row for shard in manifest(folder)["shards"] for row in pq.read_table(folder / shard["file"]).to_pylist()]


def test_every_document_comes_back_exactly_and_in_order(made):
    rebuilt = [""] * len(DOCUMENTS)
    rows = read_rows(made[1])
    for row in rows:
        assert row["start"] == len(rebuilt[row["doc_idx"]])
        rebuilt[row["doc_idx"]] += row["text"] + row["gap"]
    assert rebuilt == EXPECTED
    assert [row["doc_idx"] for row in rows] == sorted(row["doc_idx"] for row in rows)
    assert {row["doc_idx"] for row in rows} == set(range(len(DOCUMENTS)))  # the empty ones too


def test_the_manifest_tells_what_is_there(made):
    found = manifest(made[1])
    assert found["complete"] and found["stage"] == "openwebtext_sentences_dataset.py" and found["format_version"] == 1
    assert found["counts"] == {"sentences": len(read_rows(made[1])), "docs": len(DOCUMENTS), "invalid_utf8": 1}
    assert found["config"]["shard_mb"] == 0.0001 and found["config"]["num_processes"] == 2
    assert "trained on up to 0.01 MB" in found["punkt_origin"]
    shards = found["shards"]
    assert len(shards) > 3 and [s["file"] for s in shards] == sorted(p.name for p in made[1].glob("*.parquet"))
    assert sum(s["n_docs"] for s in shards) == len(DOCUMENTS)
    assert sum(s["n_sentences"] for s in shards) == found["counts"]["sentences"]


def test_shards_do_not_depend_on_processes_or_interruptions(made, tmp_path):
    """One process, and again after the last steps of a run are undone: the same bytes. A third time does nothing."""
    inputs, expected = made
    assert run(inputs, tmp_path / "out", "--num_processes", "1").returncode == 0
    assert manifest(tmp_path / "out")["shards"] == manifest(expected)["shards"]  # sha256 among them

    broken = manifest(tmp_path / "out")
    lost, kept = broken["shards"][1]["file"], broken["shards"][0]["file"]
    (tmp_path / "out" / lost).unlink()
    (tmp_path / "out" / ".sentences-00001.parquet.9.tmp").write_bytes(b"half")
    broken = {name: broken[name] for name in ("format_version", "stage", "decides")} | {"complete": False}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(broken))
    with pytest.raises(InputError, match="is not complete; run openwebtext_sentences_dataset.py again"):
        sentences.SentenceDataset(tmp_path / "out")
    before = (tmp_path / "out" / kept).stat().st_mtime_ns
    assert run(inputs, tmp_path / "out", "--num_processes", "3").returncode == 0
    assert manifest(tmp_path / "out")["shards"] == manifest(expected)["shards"]
    assert (tmp_path / "out" / kept).stat().st_mtime_ns == before
    assert not list((tmp_path / "out").glob("*.tmp")) and not list((tmp_path / "out").glob(".*.tmp"))

    again = run(inputs, tmp_path / "out")
    assert again.returncode == 0 and "is complete already" in again.stdout
    other = run(inputs, tmp_path / "out", "--shard_mb", "0.002")
    assert other.returncode == 2 and "begun with shard_mb = 0.0001, now it is 0.002" in other.stderr


def test_many_small_documents_keep_their_order_over_row_groups(tmp_path):
    texts = [f"Document {i}. It is short." for i in range(2500)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=700)
    shards = list(sentences.shards_of_documents([tmp_path / "a.parquet"], 10_000))
    assert [d for _, documents in shards for d in documents] == texts
    firsts = np.cumsum([0, *(len(documents) for _, documents in shards)])
    assert [first for first, _ in shards] == firsts[:-1].tolist()
    assert all(sum(map(len, documents)) >= 10_000 for _, documents in shards[:-1])


def nothing(folder: Path) -> Path:
    return folder / "nowhere"


def no_parquet(folder: Path) -> Path:
    (folder / "a.txt").write_text("Text.")
    return folder


def no_text_column(folder: Path) -> Path:
    pq.write_table(pa.table({"content": ["Text."]}), folder / "a.parquet")
    return folder


def text_in_disguise(folder: Path) -> Path:
    (folder / "a.parquet").write_text("Text.")
    return folder / "a.parquet"


def numbers(folder: Path) -> Path:
    pq.write_table(pa.table({"text": [1, 2]}), folder / "a.parquet")
    return folder


BAD_INPUT = [
    (nothing, "nothing at {folder}/nowhere; name a parquet file"),
    (no_parquet, "{folder} holds no parquet file; name a folder"),
    (no_text_column, "{folder}/a.parquet has no column `text`; name files"),
    (text_in_disguise, "{folder}/a.parquet is not a parquet file ("),
    (numbers, "The column `text` of {folder}/a.parquet holds"),
]


@pytest.mark.parametrize(("make", "complaint"), BAD_INPUT)
def test_bad_input_is_refused_in_a_sentence(tmp_path, make, complaint):
    (tmp_path / "in").mkdir()
    found = run(make(tmp_path / "in"), tmp_path / "out")
    errors = re.findall("error: (.*)", found.stderr)
    assert found.returncode == 2 and len(errors) == 1 and "Traceback" not in found.stderr
    assert complaint.format(folder=tmp_path / "in") in errors[0]
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_mended_documents_can_be_written_to_the_same_folder(tmp_path):
    pq.write_table(pa.table({"content": ["Text."]}), tmp_path / "a.parquet")
    refused = run(tmp_path / "a.parquet", tmp_path / "out")
    assert refused.returncode == 2 and refused.stderr.startswith("error: ")  # on a line of its own
    pq.write_table(pa.table({"text": ["Text. " * 9]}), tmp_path / "a.parquet")
    assert run(tmp_path / "a.parquet", tmp_path / "out").returncode == 0


def test_an_unknown_punkt_is_refused():
    with pytest.raises(InputError, match="--punkt german is unknown; write english or corpus"):
        sentences.load_punkt("german", [], 1.0)


# ---- the reader


def test_the_reader_gives_the_rows_in_numpys_order(made):
    texts = [row["text"] for row in read_rows(made[1])]
    order = np.random.default_rng(42).permutation(len(texts))
    dataset = sentences.SentenceDataset(made[1])
    assert len(dataset) == len(texts) and dataset.manifest["complete"]
    assert list(dataset) == [texts[i] for i in order]
    other = sentences.SentenceDataset(made[1], seed=7)
    assert list(other) == [texts[i] for i in np.random.default_rng(7).permutation(len(texts))]


@pytest.fixture
def published(tmp_path) -> Path:
    """A folder like the published dataset: files with a column `text`, no manifest."""
    for i, start in enumerate((0, 40, 70)):
        texts = [f"Sentence {n}." for n in range(start, (40, 70, 100)[i])]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"train-{i:05d}-of-00003.parquet", row_group_size=16)
    return tmp_path


def test_the_published_dataset_is_read_in_its_published_order(published):
    dataset = sentences.SentenceDataset(published)
    order = np.random.default_rng(42).permutation(100)
    assert [dataset[i] for i in range(100)] == [f"Sentence {n}." for n in order]
    assert dataset.manifest == {}


def test_num_samples_takes_the_first_of_the_order(published):
    whole = list(sentences.SentenceDataset(published))
    part = sentences.SentenceDataset(published, num_samples=13)
    assert len(part) == 13 and list(part) == whole[:13]
    assert len(sentences.SentenceDataset(published, num_samples=1000)) == 100
    for i in (13, 99, -1):
        with pytest.raises(IndexError, match=f"sentence {i} of 13"):
            part[i]


def test_a_changed_file_is_read_anew(published):
    assert len(sentences.SentenceDataset(published)) == 100
    pq.write_table(pa.table({"text": ["Only."]}), published / "train-00000-of-00003.parquet")
    assert len(sentences.SentenceDataset(published)) == 61


def test_a_removed_file_is_read_no_longer(published):
    assert len(sentences.SentenceDataset(published)) == 100
    (published / "train-00002-of-00003.parquet").unlink()
    assert len(sentences.SentenceDataset(published)) == 70


def test_a_damaged_folder_is_refused_by_name(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "out")
    shard = tmp_path / "out" / manifest(made[1])["shards"][2]["file"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{shard} has .* bytes instead of"):
        sentences.SentenceDataset(tmp_path / "out")
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard} is missing"):
        sentences.SentenceDataset(tmp_path / "out")
    with pytest.raises(InputError, match=f"nothing at {tmp_path}/nowhere"):
        sentences.SentenceDataset(tmp_path / "nowhere")


@pytest.mark.parametrize("make", [no_text_column, text_in_disguise])
def test_the_reader_refuses_what_the_script_refuses(tmp_path, make):
    make(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}/a.parquet"):
        sentences.SentenceDataset(tmp_path)


def test_a_missing_text_is_an_empty_sentence(tmp_path):
    pq.write_table(pa.table({"text": ["One.", None]}), tmp_path / "a.parquet")
    assert sorted(map(repr, sentences.SentenceDataset(tmp_path))) == ["''", "'One.'"]
