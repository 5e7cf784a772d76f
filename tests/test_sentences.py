"""Sentences against the documents they came from, and the reader against numpy's shuffle.

Documents must come back exactly from texts and gaps, whatever is in them; the shards must not depend on the number of
processes or on an interruption; a folder of the published kind, with a column `text` and no manifest, must be read.
Punkt is trained on the documents, without network; datasets come from a local server that speaks the hub's protocol.

    .venv/bin/python -m pytest tests/test_sentences.py
    SENTENCES_KILLS=12 .venv/bin/python -m pytest tests/test_sentences.py -k killed    # more kill -9, 2 minutes
"""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PROJECT_DIR
from hypothesis import example, given
from hypothesis import strategies as st
from support.fake_hub import FakeHub, Fault, Repo
from support.pipeline_runs import as_flags, call, refusal

import openwebtext_sentences_dataset as sentences
from pipeline.documents import document_files, iter_documents
from pipeline.errors import InputError
from pipeline.sentences import SentenceDataset

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
def punkt_fields(tmp_path_factory) -> dict:
    """Punkt's parameters after a little text, through JSON."""
    path = tmp_path_factory.mktemp("punkt") / "documents.parquet"
    pq.write_table(pa.table({"text": [PROSE] * 20}), path)
    fields, _ = sentences.load_punkt("corpus", [path], train_mb=1.0)
    return json.loads(json.dumps(fields))


@pytest.fixture(scope="module")
def splitter(punkt_fields):
    return sentences.make_splitter(punkt_fields)


@pytest.fixture(scope="module")
def plain_punkt():
    """NLTK's own class, trained by itself on the same text."""
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTrainer

    trainer = PunktTrainer()
    trainer.INCLUDE_ALL_COLLOCS = True
    for _ in range(20):
        trainer.train(PROSE, finalize=False)
    return PunktSentenceTokenizer(trainer.get_params())


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
def test_texts_and_gaps_joined_are_the_document(splitter, plain_punkt, document):
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
        (document[a:b], a) for a, b in plain_punkt.span_tokenize(document) if b > a
    ]


def test_sentences_end_where_a_reader_ends_them(splitter):
    rows = sentences.split_document(splitter, "Dr. Smith slept. Did he? Yes!\n\nHe did.")
    assert rows == [("Dr. Smith slept.", 0, " "), ("Did he?", 17, " "), ("Yes!", 25, "\n\n"), ("He did.", 31, "")]


def test_a_long_document_is_split_whatever_limit_nltk_sets(punkt_fields, monkeypatch):
    """NLTK allows a search 5 seconds, including all work between its matches: 12 MB of text on this machine."""
    from nltk import redos

    monkeypatch.setattr(redos, "DEFAULT_TIMEOUT", 0.2)
    line = PROSE.replace("\n", " ") * 20_000  # 5 MB
    rows = sentences.split_document(sentences.make_splitter(punkt_fields), line)
    assert len(rows) > 50_000 and "".join(text + gap for text, _, gap in rows) == line


# ---- the script

MANY_SHARDS = {"punkt": "corpus", "punkt_train_mb": 0.01, "shard_mb": 0.0001, "num_processes": 1}  # 1 doc per shard


def script_command(input_path: Path | str, output_dir: Path, *options: str) -> list[str]:
    command = [sys.executable, "openwebtext_sentences_dataset.py", "--input_path", str(input_path), "--output_dir"]
    return [
        *command,
        str(output_dir),
        "--punkt",
        "corpus",
        "--punkt_train_mb",
        "0.01",
        "--shard_mb",
        "0.0001",
        *options,
    ]


def run(input_path: Path | str, output_dir: Path, *options: str, **extra: str) -> subprocess.CompletedProcess:
    """Run the script in its own process; extra: its environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    command = script_command(input_path, output_dir, *options)
    return subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, timeout=120, env=kept | extra)


def write_documents(folder: Path, documents: list, name: str = "a.parquet") -> Path:
    """A parquet file whose column `text` has the type of text but contains the given bytes."""
    raw = [d.encode() if isinstance(d, str) else d for d in documents]
    column = pa.Array.from_buffers(pa.string(), len(raw), pa.array(raw, pa.binary()).buffers())
    folder.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table({"id": range(len(raw)), "text": column}), folder / name)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of documents, in two files, and their sentences as split by one process."""
    folder = tmp_path_factory.mktemp("sentences")
    write_documents(folder / "documents", DOCUMENTS[:5], "a.parquet")
    write_documents(folder / "documents", DOCUMENTS[5:], "b.parquet")
    call(sentences, **MANY_SHARDS, input_path=folder / "documents", output_dir=folder / "sentences")
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
    assert found["config"]["shard_mb"] == 0.0001 and found["config"]["num_processes"] == 1
    assert "trained on up to 0.01 MB" in found["punkt_origin"]
    shards = found["shards"]
    assert len(shards) > 3 and [s["file"] for s in shards] == sorted(p.name for p in made[1].glob("*.parquet"))
    assert sum(s["n_docs"] for s in shards) == len(DOCUMENTS)
    assert sum(s["n_sentences"] for s in shards) == found["counts"]["sentences"]


@pytest.mark.slow
def test_shards_do_not_depend_on_processes_or_interruptions(made, tmp_path, capsys):
    """Two processes, and again after the last steps of a run are undone: the same bytes. A third time does nothing."""
    inputs, expected = made
    options = MANY_SHARDS | {"input_path": inputs, "output_dir": tmp_path / "out"}
    found = run(inputs, tmp_path / "out", "--num_processes", "2")
    assert found.returncode == 0, found.stderr
    assert manifest(tmp_path / "out")["shards"] == manifest(expected)["shards"]  # sha256 among them

    broken = manifest(tmp_path / "out")
    lost, kept = broken["shards"][1]["file"], broken["shards"][0]["file"]
    (tmp_path / "out" / lost).unlink()
    (tmp_path / "out" / ".sentences-00001.parquet.9.tmp").write_bytes(b"half")
    broken = {name: broken[name] for name in ("format_version", "stage", "decides")} | {"complete": False}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(broken))
    with pytest.raises(InputError, match="is not complete; run openwebtext_sentences_dataset.py again"):
        SentenceDataset(tmp_path / "out")
    before = (tmp_path / "out" / kept).stat().st_mtime_ns
    assert run(inputs, tmp_path / "out", "--num_processes", "2").returncode == 0
    assert manifest(tmp_path / "out")["shards"] == manifest(expected)["shards"]
    assert (tmp_path / "out" / kept).stat().st_mtime_ns == before
    assert not list((tmp_path / "out").glob("*.tmp")) and not list((tmp_path / "out").glob(".*.tmp"))

    capsys.readouterr()
    call(sentences, **options)
    assert "is already complete" in capsys.readouterr().out
    said = refusal(capsys, sentences, **(options | {"shard_mb": 0.002}))
    assert "begun with shard_mb = 0.0001, but now it is 0.002" in said


def test_a_lost_shard_of_a_complete_folder_is_said(made, tmp_path, capsys):
    """Running again does not report success, and a folder without its manifest does not pass for a published one."""
    inputs, _ = made
    options = MANY_SHARDS | {"input_path": inputs, "output_dir": tmp_path / "out"}
    call(sentences, **options)
    lost = tmp_path / "out" / manifest(tmp_path / "out")["shards"][1]["file"]
    lost.unlink()
    assert f"{lost} is missing; remove {tmp_path / 'out'} and run" in refusal(capsys, sentences, **options)
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(InputError, match="without their manifest.json; remove it and run"):
        SentenceDataset(tmp_path / "out")


def test_documents_that_changed_in_a_run_are_refused(tmp_path, capsys):
    """Other documents of the same size under the same name."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "One is here."}\n' * 50)
    options = MANY_SHARDS | {"input_path": path, "output_dir": tmp_path / "out"}
    call(sentences, **options)
    path.write_text('{"text": "Two is here."}\n' * 50)
    os.utime(path, ns=(0, 10**18))
    assert "was begun with documents" in refusal(capsys, sentences, **options)


def test_links_to_documents_are_followed(tmp_path, capsys):
    """Also links in circles; a link to nothing is reported, not skipped."""
    elsewhere = write_documents(tmp_path / "elsewhere", ["Far away."], "b.parquet")
    inputs = write_documents(tmp_path / "in", ["Right here."])
    (inputs / "more").symlink_to(elsewhere)
    (inputs / "round").symlink_to(inputs)
    assert [path.name for path in document_files(str(inputs))] == ["a.parquet", "b.parquet"]
    (inputs / "c.parquet").symlink_to(tmp_path / "nowhere.parquet")
    said = refusal(capsys, sentences, input_path=inputs, output_dir=tmp_path / "out", **MANY_SHARDS)
    assert f"{inputs / 'c.parquet'} points to nothing" in said and not (tmp_path / "out").exists()


def test_many_small_documents_keep_their_order_over_row_groups(tmp_path):
    texts = [f"Document {i}. It is short.".encode() for i in range(2500)]
    pq.write_table(pa.table({"text": pa.array(texts, pa.large_binary())}), tmp_path / "a.parquet", row_group_size=700)
    shards = list(sentences.shard_jobs([tmp_path / "a.parquet"], tmp_path, 10_000))
    assert [d for _, _, documents in shards for d in documents] == texts
    firsts = np.cumsum([0, *(len(documents) for _, _, documents in shards)])
    assert [first for _, first, _ in shards] == firsts[:-1].tolist()
    assert all(10_000 <= sum(map(len, documents)) < 10_100 for _, _, documents in shards[:-1])


# ---- kinds of documents

FEW_SHARDS = MANY_SHARDS | {"shard_mb": 0.001}


def as_json_line(document) -> bytes:
    """An object with the document; invalid bytes stay invalid in the line."""
    if isinstance(document, bytes):
        return b'{"text": "' + document + b'"}'
    return json.dumps({"id": 1, "text": document}, ensure_ascii=False).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def in_frames(compress, content: bytes) -> bytes:
    """Compressed as two concatenated parts, as parallel compressors write them, split inside a line."""
    return compress(content[:1000]) + compress(content[1000:])


def test_every_kind_of_file_gives_the_same_sentences(tmp_path):
    lines = b"\xef\xbb\xbf" + b"\n".join(map(as_json_line, DOCUMENTS)) + b"\n\n"
    write_documents(tmp_path / "parquet", DOCUMENTS)
    for name, content in {
        "a.jsonl": lines,
        "a.jsonl.gz": in_frames(gzip.compress, lines),
        "a.jsonl.zst": in_frames(zstd, lines),
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "txt" / "sub").mkdir(parents=True)
    for i, document in enumerate(DOCUMENTS):
        content = document.encode() if isinstance(document, str) else document or b""
        (tmp_path / "txt" / ("sub" if i > 3 else "") / f"{i:02}.txt").write_bytes(content)
    names = [f"{i:02}.txt" for i in range(4)] + [f"sub/{i:02}.txt" for i in range(4, len(DOCUMENTS))]
    assert [f.relative_to(tmp_path / "txt").as_posix() for f in document_files(tmp_path / "txt")] == names
    shards = {}
    for kind in ("parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "txt"):
        call(sentences, input_path=tmp_path / kind, output_dir=tmp_path / f"{kind}.out", **FEW_SHARDS)
        shards[kind] = manifest(tmp_path / f"{kind}.out")["shards"]  # sha256 among them
    assert len(shards["parquet"]) > 1 and all(found == shards["parquet"] for found in shards.values())


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "txt"])
def test_a_file_whose_name_is_not_utf8(tmp_path, capsys, suffix):
    """Its bytes are Latin-1, as old archives leave them: read, and listed in the order of bytes."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for name in (f"{chr(0x1F600)}.{suffix}", os.fsdecode(b"\xe9") + f".{suffix}"):  # F0..., E9: as str the other way
        with open(folder / name, "wb") as file:
            if suffix == "parquet":
                pq.write_table(pa.table({"text": [PROSE]}), file)
            else:
                file.write(as_json_line(PROSE) if suffix == "jsonl" else PROSE.encode())
    assert [os.fsencode(file.name)[0] for file in document_files(str(folder))] == [0xE9, 0xF0]
    call(sentences, input_path=folder, output_dir=folder / "out", **FEW_SHARDS)
    assert manifest(folder / "out")["counts"]["docs"] == 2
    assert manifest(folder / "out")["config"]["input_path"] == str(folder)
    assert len(SentenceDataset(folder / "out")) == manifest(folder / "out")["counts"]["sentences"] > 2
    assert "caf\\udce9" in capsys.readouterr().out


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]


@pytest.mark.parametrize("kind", [*TEXT_TYPES, pa.dictionary(pa.int32(), pa.string()), pa.json_(pa.string())], ids=str)
def test_a_column_of_text_in_any_of_arrows_forms(tmp_path, kind):
    texts = [PROSE, None, "One. Two."]
    plain = pa.array(texts)
    if isinstance(kind, pa.BaseExtensionType):
        column = pa.ExtensionArray.from_storage(kind, plain)
    else:
        column = plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.nulls(2)}), tmp_path / "b.parquet")  # nothing but nulls
    found = list(iter_documents([tmp_path / "a.parquet", tmp_path / "b.parquet"]))
    assert found == [(text or "").encode() for text in [*texts, None, None]]


@pytest.mark.parametrize("kind", [pa.binary(3), pa.list_(pa.string()), pa.int64()], ids=str)
def test_a_column_of_something_else_is_refused(tmp_path, kind):
    pq.write_table(pa.table({"text": pa.nulls(1, kind)}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="The column `text` of .*a.parquet holds .*, not text; name other files"):
        list(iter_documents([tmp_path / "a.parquet"]))


SAID = [
    [("user", "Why?"), ("assistant", "One is here. Two.")],
    [("system", "Speak."), ("user", "Ä"), ("assistant", "Où?"), ("user", "No."), ("assistant", "Yes. Or\n\nno.")],
    [("user", "Nothing?")],
    [],
]
ANSWERS = ["One is here. Two.", "Où?\n\nYes. Or\n\nno.", "", ""]


def as_objects(dialogue: list[tuple[str, str]], **more: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} | more for role, content in dialogue]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_dialogue_is_a_document_of_the_assistants_messages(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        objects = [as_objects(dialogue, name="N") for dialogue in SAID]
        pq.write_table(pa.table({"topic": ["t"] * len(SAID), "messages": objects}), path)
    else:
        lines = [json.dumps({"id": i, "messages": as_objects(dialogue)}) for i, dialogue in enumerate(SAID)]
        path.write_text("\n".join([*lines, '{"text": "Plain.", "messages": 1}']))
    assert list(iter_documents([path])) == [text.encode() for text in ANSWERS + ["Plain."] * (kind == "jsonl")]
    call(sentences, input_path=path, output_dir=tmp_path / "out", **FEW_SHARDS)
    assert "Two." in list(SentenceDataset(tmp_path / "out"))


def test_a_column_of_texts_is_read_although_there_are_messages(tmp_path):
    pq.write_table(pa.table({"text": ["Text."], "messages": [as_objects(SAID[0])]}), tmp_path / "a.parquet")
    assert list(iter_documents([tmp_path / "a.parquet"])) == [b"Text."]


@pytest.mark.parametrize(
    "messages",
    [None, "text", ["text"], [{"role": "user"}], [{"role": "user", "content": None}], [{"role": 1, "content": "a"}]],
)
def test_malformed_messages_are_refused_in_a_sentence(tmp_path, capsys, messages):
    good = as_objects(SAID[0])
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in [good, messages]))
    pq.write_table(pa.table({"messages": [messages]}), tmp_path / "a.parquet")
    for path, where in ((tmp_path / "a.jsonl", "Line 2"), (tmp_path / "a.parquet", "Row 0")):
        said = refusal(capsys, sentences, input_path=path, output_dir=tmp_path / "out", **FEW_SHARDS)
        assert said == (
            f"{where} of {path} holds no dialogue: `messages` must be a list of objects, each with a text `role` and a "
            "text `content`; correct it."
        )
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_a_byte_order_mark_says_how_a_text_file_is_encoded(tmp_path, encoding):
    text = "Der Müller ging. \U0001f469 Ende."
    mark = "\ufeff" if encoding.endswith("-be") else ""  # Python writes the others' itself
    (tmp_path / "a.txt").write_bytes((mark + text).encode(encoding))
    assert list(iter_documents([tmp_path / "a.txt"])) == [text.encode()]


def test_bytes_that_are_not_utf8_are_counted_in_the_last_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes("Der Müller ging.".encode("latin-1"))
    call(sentences, input_path=tmp_path / "a.txt", output_dir=tmp_path / "out", **FEW_SHARDS)
    assert "1 documents (1 with bytes that are not UTF-8, now U+FFFD): " in capsys.readouterr().out


def test_half_a_surrogate_pair_in_json_becomes_replacement_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "One \\ud83d two."}\n{"text": "\\ud83d\\ude80"}')
    call(sentences, input_path=tmp_path / "a.jsonl", output_dir=tmp_path / "out", **FEW_SHARDS)
    assert sorted(SentenceDataset(tmp_path / "out")) == ["One \ufffd\ufffd\ufffd two.", "\U0001f680"]
    assert manifest(tmp_path / "out")["counts"] == {"sentences": 2, "docs": 2, "invalid_utf8": 1}


def nothing(folder: Path) -> Path:
    return folder / "nowhere"


def unknown_ending(folder: Path) -> Path:
    (folder / "a.csv").write_text("Text.")
    return folder / "a.csv"


def no_documents(folder: Path) -> Path:
    (folder / "a.csv").write_text("Text.")
    (folder / ".a.txt").write_text("Text.")
    return folder


def two_kinds(folder: Path) -> Path:
    (folder / "a.txt").write_text("Text.")
    (folder / "a.jsonl").write_text('{"text": "Text."}')
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


def damaged_parquet(folder: Path) -> Path:
    path = folder / "a.parquet"
    pq.write_table(pa.table({"text": [str(i) * 30 for i in range(9999)]}), path, compression="zstd")
    content = path.read_bytes()
    path.write_bytes(content[:5000] + bytes(500) + content[5500:])
    return path


def good_lines(n: int) -> str:
    return '{"text": "Text."}\n' * n


def not_json(folder: Path) -> Path:
    (folder / "a.jsonl").write_text(good_lines(400) + "{oops\n")
    return folder


def no_text_in_a_line(folder: Path) -> Path:
    (folder / "a.jsonl").write_text(good_lines(2) + '\n{"content": "Text."}\n')
    return folder


def number_for_text(folder: Path) -> Path:
    (folder / "a.jsonl").write_text(good_lines(1) + '{"text": 5}\n')
    return folder


def list_for_object(folder: Path) -> Path:
    (folder / "a.jsonl").write_text('["Text."]\n')
    return folder


def cut_zstd(folder: Path) -> Path:
    (folder / "a.jsonl.zst").write_bytes(zstd(good_lines(9000).encode())[:-5])
    return folder


def cut_gzip(folder: Path) -> Path:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(good_lines(9000).encode())[:-20])
    return folder


def no_lines(folder: Path) -> Path:
    (folder / "a.jsonl").touch()
    return folder / "a.jsonl"


def no_rows(folder: Path) -> Path:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "a.parquet")
    return folder


def blanks(folder: Path) -> Path:
    (folder / "a.txt").write_text("\ufeff \n\u3000", encoding="utf-8")
    (folder / "b.txt").touch()
    return folder


def utf_16_lines(folder: Path) -> Path:
    (folder / "a.jsonl").write_text(good_lines(2), encoding="utf-16")
    return folder


BAD_INPUT = [
    (no_lines, "There is no text in {folder}/a.jsonl (0 documents); give other documents."),
    (no_rows, "There is no text in {folder}/a.parquet (0 documents); give other documents."),
    (blanks, "There is no text in the 2 files from {folder}/a.txt on (2 documents); give other documents."),
    (utf_16_lines, "{folder}/a.jsonl is in UTF-16; save it as UTF-8."),
    (nothing, "nothing at {folder}/nowhere; name a file or folder"),
    (unknown_ending, "{folder}/a.csv has an unknown ending; documents come as .parquet, .jsonl"),
    (no_documents, "{folder} holds no documents (.parquet, .jsonl, .jsonl.gz, .jsonl.zst, .txt); name another"),
    (two_kinds, "{folder} holds jsonl and txt files; name a folder of one kind"),
    (no_text_column, "{folder}/a.parquet has no column `text`; name files"),
    (text_in_disguise, "{folder}/a.parquet is not a parquet file ("),
    (numbers, "The column `text` of {folder}/a.parquet holds"),
    (damaged_parquet, "{folder}/a.parquet is damaged ("),
    (not_json, "Line 401 of {folder}/a.jsonl is not JSON ("),
    (no_text_in_a_line, 'Line 4 of {folder}/a.jsonl is not an object with a string "text"'),
    (number_for_text, 'Line 2 of {folder}/a.jsonl is not an object with a string "text"'),
    (list_for_object, 'Line 1 of {folder}/a.jsonl is not an object with a string "text"'),
    (cut_zstd, "{folder}/a.jsonl.zst is damaged (Truncated"),
    (cut_gzip, "{folder}/a.jsonl.gz is damaged (Truncated"),
]


@pytest.mark.parametrize(("make", "complaint"), BAD_INPUT)
def test_bad_input_is_refused_in_a_sentence_and_nothing_is_written(tmp_path, capsys, make, complaint):
    (tmp_path / "in").mkdir()
    said = refusal(capsys, sentences, input_path=make(tmp_path / "in"), output_dir=tmp_path / "out", **FEW_SHARDS)
    assert complaint.format(folder=tmp_path / "in") in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_worker_s_refusal_is_one_sentence_too(tmp_path):
    (tmp_path / "in").mkdir()
    found = run(not_json(tmp_path / "in"), tmp_path / "out", "--num_processes", "2")
    errors = re.findall("^error: (.*)", found.stderr, re.MULTILINE)
    assert found.returncode == 2 and len(errors) == 1 and "Traceback" not in found.stderr
    assert f"Line 401 of {tmp_path}/in/a.jsonl is not JSON" in errors[0] and not (tmp_path / "out").exists()


def test_mended_documents_can_be_written_to_the_same_folder(tmp_path, capsys):
    options = FEW_SHARDS | {"input_path": tmp_path / "a.parquet", "output_dir": tmp_path / "out"}
    pq.write_table(pa.table({"content": ["Text."]}), tmp_path / "a.parquet")
    refusal(capsys, sentences, **options)
    pq.write_table(pa.table({"text": ["Text. " * 9]}), tmp_path / "a.parquet")
    call(sentences, **options)


def test_an_unknown_punkt_is_refused(tmp_path, capsys):
    said = refusal(capsys, sentences, input_path=tmp_path, output_dir=tmp_path / "out", punkt="german")
    assert said == "--punkt german is unknown; write english or corpus."


# ---- Punkt


def test_the_english_model_is_used_where_nltk_has_it(tmp_path, monkeypatch):
    """Handmade model files, with an abbreviation that no training would find."""
    import nltk.data

    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    (folder / "abbrev_types.txt").write_text("zzq")
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    (tmp_path / "a.txt").write_text("See zzq. Five of them. And kkq. Five more.")
    call(sentences, input_path=tmp_path / "a.txt", output_dir=tmp_path / "out", num_processes=1)
    assert manifest(tmp_path / "out")["punkt_origin"] == "NLTK's pre-trained English model (punkt_tab)"
    texts = [row["text"] for row in read_rows(tmp_path / "out")]
    assert texts == ["See zzq. Five of them.", "And kkq.", "Five more."]


@pytest.mark.slow
def test_without_network_punkt_is_trained_quietly(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE)
    nowhere = {"HOME": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    found = run(tmp_path / "a.txt", tmp_path / "out", "--punkt", "english", "--num_processes", "1", **nowhere)
    assert found.returncode == 0, found.stderr
    assert "NLTK's English Punkt is not here and cannot be fetched" in found.stdout
    assert "trained on up to 0.01 MB" in manifest(tmp_path / "out")["punkt_origin"]
    assert "nltk_data" not in found.stdout + found.stderr and "Warning" not in found.stderr


def test_the_bar_of_the_training_ends_at_its_end(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text(PROSE)
    call(sentences, input_path=tmp_path / "a.txt", output_dir=tmp_path / "out", **(FEW_SHARDS | {"punkt_train_mb": 50}))
    trained = re.findall(r"training Punkt: .*?(\d+)/(\d+)", capsys.readouterr().err)
    assert trained[-1] == (str(len(PROSE)),) * 2


# ---- datasets of the hub

DATASET = "Someone/web-text"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with FakeHub() as hub:
        hub.repos[f"datasets/{DATASET}"] = Repo()
        write_documents(tmp_path / "local", DOCUMENTS[:5], "train-0.parquet")
        write_documents(tmp_path / "local", DOCUMENTS[5:], "train-1.parquet")
        yield hub


def dataset_files(tmp_path: Path, folder: str = "data/") -> dict[str, bytes]:
    files = {f"{folder}{path.name}": path.read_bytes() for path in (tmp_path / "local").iterdir()}
    return files | {"README.md": b"# x", ".gitattributes": b"x", "requirements.txt": b"numpy\n"}


def from_hub(hub: FakeHub, tmp_path: Path, out: str, dataset: str = DATASET, **extra: str):
    """Run the script on a dataset, in its own process: the hub's client reads its settings when imported."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    return run(dataset, tmp_path / out, "--num_processes", "1", **(settings | extra))


@pytest.mark.slow
def test_a_dataset_of_the_hub_gives_what_its_files_give(hub, made, tmp_path):
    commit = hub.repos[f"datasets/{DATASET}"].commit(dataset_files(tmp_path))
    found = from_hub(hub, tmp_path, "out")
    assert found.returncode == 0, found.stderr
    size = sum(path.stat().st_size for path in (tmp_path / "local").iterdir())
    assert f"Fetching {DATASET} at {commit}: 2 files, {size / 1e6:.2f} MB" in found.stdout
    assert manifest(tmp_path / "out")["shards"] == manifest(made[1])["shards"]
    documents = manifest(tmp_path / "out")["decides"]["documents"]
    assert documents["dataset"] == DATASET and documents["revision"] == commit and documents["bytes"] == size
    assert {r.path for r in hub.requests if r.sent} == {"data/train-0.parquet", "data/train-1.parquet"}

    # The hub has a newer commit; the folder continues with its own, from the cache.
    hub.repos[f"datasets/{DATASET}"].commit({"data/other.parquet": b"x"})
    (tmp_path / "out" / manifest(made[1])["shards"][1]["file"]).unlink()
    broken = manifest(tmp_path / "out") | {"complete": False}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(broken))
    hub.requests.clear()
    found = from_hub(hub, tmp_path, "out")
    assert found.returncode == 0 and "0.00 MB of it not yet in the cache" in found.stdout, found.stderr
    assert manifest(tmp_path / "out")["shards"] == manifest(made[1])["shards"]
    assert not [r for r in hub.requests if r.sent]


@pytest.mark.slow
def test_a_folder_of_a_dataset_and_the_hubs_conversion(hub, made, tmp_path):
    repo = hub.repos[f"datasets/{DATASET}"]
    repo.refs["refs/convert/parquet"] = repo.commit(dataset_files(tmp_path, "default/train/"))
    repo.commit({"subsets/urlsf.tar": b"tar", "openwebtext.py": b"print()", "README.md": b"# x"})
    found = from_hub(hub, tmp_path, "out", f"{DATASET}/default")
    assert found.returncode == 0, found.stderr
    assert manifest(tmp_path / "out")["shards"] == manifest(made[1])["shards"]


@pytest.mark.slow
def test_what_the_hub_does_not_give_is_refused_in_a_sentence(hub, tmp_path):
    def said(*args, **extra) -> str:
        found = from_hub(hub, tmp_path, "out", *args, **extra)
        assert found.returncode == 2 and "Traceback" not in found.stderr and not (tmp_path / "out").exists()
        (sentence,) = re.findall("^error: (.*)", found.stderr, re.MULTILINE)
        return sentence

    repo = hub.repos[f"datasets/{DATASET}"]
    repo.commit(dataset_files(tmp_path))
    nothing_there = "There is no local no/such, and as a dataset of the hub: "
    assert said("no/such").startswith(f"{nothing_there}{hub.url} does not have datasets/no/such")
    assert "No connection to http://127.0.0.1:9" in said(HF_ENDPOINT="http://127.0.0.1:9")
    hub.faults["data/train-1.parquet"] = Fault(damaged=True)
    assert "data/train-1.parquet of Someone/web-text arrived damaged and was removed; run again" in said()
    (kept,) = (tmp_path / "hf").rglob("snapshots/*/*/*.parquet")
    assert kept.name == "train-0.parquet" and len(list((tmp_path / "hf").rglob("blobs/*"))) == 1


# ---- kill -9


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def count_shards(folder: Path) -> int:
    return len(list(folder.glob("sentences-*.parquet")))


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(tmp_path):
    """The main process is killed: its workers must end by themselves, and no partial file may pass for a whole one."""
    rng = random.Random()
    texts = [PROSE * rng.randint(1, 60) for _ in range(120)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"input_path": tmp_path / "a.jsonl", "output_dir": tmp_path / "whole", "shard_mb": 0.05}
    call(sentences, **(MANY_SHARDS | options))
    n_shards = len(manifest(tmp_path / "whole")["shards"])

    flags = ("--shard_mb", "0.05", "--num_processes", "2")
    killed, kills = 0, int(os.environ.get("SENTENCES_KILLS", 2))
    for _ in range(kills):
        command = script_command(tmp_path / "a.jsonl", tmp_path / "out", *flags)
        process = subprocess.Popen(command, cwd=PROJECT_DIR, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + (rng.uniform(0, 3) if rng.random() < 0.3 else 60)  # at any time, or after some shards
        more = rng.randint(1, 2 * n_shards // kills)
        there = count_shards(tmp_path / "out")
        while process.poll() is None and time.monotonic() < end and count_shards(tmp_path / "out") < there + more:
            time.sleep(rng.uniform(0, 0.04))
        workers = children(process.pid)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 20
        while any(map(is_alive, workers)):
            assert time.monotonic() < deadline, "workers outlive the main process"
            time.sleep(0.05)
        if (tmp_path / "out" / "manifest.json").exists() and manifest(tmp_path / "out")["complete"]:
            shutil.rmtree(tmp_path / "out")  # start over
    assert killed
    assert run(tmp_path / "a.jsonl", tmp_path / "out", *flags).returncode == 0
    assert manifest(tmp_path / "out")["shards"] == manifest(tmp_path / "whole")["shards"]
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "whole")


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


# ---- the reader


def test_the_reader_gives_the_rows_in_numpys_order(made):
    texts = [row["text"] for row in read_rows(made[1])]
    order = np.random.default_rng(42).permutation(len(texts))
    dataset = SentenceDataset(made[1])
    assert len(dataset) == len(texts) and dataset.manifest["complete"]
    assert list(dataset) == [texts[i] for i in order]
    other = SentenceDataset(made[1], seed=7)
    assert list(other) == [texts[i] for i in np.random.default_rng(7).permutation(len(texts))]


@pytest.fixture
def published(tmp_path) -> Path:
    """A folder like the published dataset: files with a column `text`, no manifest."""
    for i, start in enumerate((0, 40, 70)):
        texts = [f"Sentence {n}." for n in range(start, (40, 70, 100)[i])]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"train-{i:05d}-of-00003.parquet", row_group_size=16)
    return tmp_path


def test_the_published_dataset_is_read_in_its_published_order(published):
    dataset = SentenceDataset(published)
    order = np.random.default_rng(42).permutation(100)
    assert [dataset[i] for i in range(100)] == [f"Sentence {n}." for n in order]
    assert dataset.manifest == {}


def test_num_samples_takes_the_first_of_the_order(published):
    whole = list(SentenceDataset(published))
    part = SentenceDataset(published, num_samples=13)
    assert len(part) == 13 and list(part) == whole[:13]
    assert len(SentenceDataset(published, num_samples=1000)) == 100
    for i in (13, 99, -1):
        with pytest.raises(IndexError, match=f"sentence {i} of 13"):
            part[i]


def test_text_and_order_are_memory_mapped_files_made_once(published):
    SentenceDataset(published)
    made = {path: path.stat().st_mtime_ns for path in published.iterdir()}
    allocated = pa.total_allocated_bytes()
    dataset = SentenceDataset(published)
    assert {path: path.stat().st_mtime_ns for path in published.iterdir()} == made
    assert isinstance(dataset.order.base, np.memmap) and pa.total_allocated_bytes() == allocated
    for path in (published / "sentences.arrow", published / "sentences.order-42.npy"):  # cut short: made again
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[:-50])
        assert list(SentenceDataset(published)) == list(dataset)
        assert path.read_bytes() == content


@pytest.mark.slow
def test_readers_that_start_together_make_the_files_once(published):
    command = "import sys, pipeline.sentences as s; print(s.SentenceDataset(sys.argv[1])[7])"
    readers = [
        subprocess.Popen([sys.executable, "-c", command, published], cwd=PROJECT_DIR, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    found = {reader.communicate(timeout=60)[0] for reader in readers}
    assert found == {f"Sentence {np.random.default_rng(42).permutation(100)[7]}.\n".encode()}


def test_published_files_in_a_subfolder_and_with_broken_text(tmp_path):
    write_documents(tmp_path / "data", ["One.", b"Two \xff.", None])
    assert sorted(SentenceDataset(tmp_path)) == ["", "One.", "Two \ufffd."]


def test_the_reader_refuses_documents_that_are_no_sentences(tmp_path):
    (tmp_path / "a.txt").write_text("Text. More.")
    with pytest.raises(InputError, match=f"{tmp_path} holds txt files, not parquet files of sentences"):
        SentenceDataset(tmp_path)


def test_an_altered_shard_is_refused_by_name(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "out", ignore=shutil.ignore_patterns("*.arrow"))
    shard = tmp_path / "out" / manifest(made[1])["shards"][1]["file"]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=f"{shard} does not have the checksum in its manifest"):
        SentenceDataset(tmp_path / "out")
    assert not (tmp_path / "out" / "sentences.arrow").exists()


def test_a_changed_file_is_read_anew(published):
    assert len(SentenceDataset(published)) == 100
    pq.write_table(pa.table({"text": ["Only."]}), published / "train-00000-of-00003.parquet")
    assert len(SentenceDataset(published)) == 61


def test_a_removed_file_is_read_no_longer(published):
    assert len(SentenceDataset(published)) == 100
    (published / "train-00002-of-00003.parquet").unlink()
    assert len(SentenceDataset(published)) == 70


def test_a_damaged_folder_is_refused_by_name(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "out")
    shard = tmp_path / "out" / manifest(made[1])["shards"][2]["file"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{shard} has .* bytes instead of"):
        SentenceDataset(tmp_path / "out")
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard} is missing"):
        SentenceDataset(tmp_path / "out")
    with pytest.raises(InputError, match=f"nothing at {tmp_path}/nowhere"):
        SentenceDataset(tmp_path / "nowhere")


@pytest.mark.parametrize("make", [no_text_column, text_in_disguise])
def test_the_reader_refuses_what_the_script_refuses(tmp_path, make):
    make(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}/a.parquet"):
        SentenceDataset(tmp_path)


def test_a_missing_text_is_an_empty_sentence(tmp_path):
    pq.write_table(pa.table({"text": ["One.", None]}), tmp_path / "a.parquet")
    assert sorted(map(repr, SentenceDataset(tmp_path))) == ["''", "'One.'"]


@pytest.mark.slow
def test_a_locale_that_is_not_utf8_changes_nothing(tmp_path):
    """That of ASCII alone, which every system has; Python otherwise takes UTF-8 instead of it."""
    folder = tmp_path / "straße"
    folder.mkdir()
    (folder / "köln.jsonl").write_text(json.dumps({"text": "Die Köln. Straße ist lang. Sie ging. " * 40}))
    call(sentences, input_path=folder, output_dir=tmp_path / "here", **FEW_SHARDS)
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flags = as_flags({"input_path": folder, "output_dir": folder / "out", **FEW_SHARDS})
    command = [sys.executable, "openwebtext_sentences_dataset.py", *flags]
    done = subprocess.run(command, cwd=PROJECT_DIR, env=os.environ | ascii_locale, capture_output=True)
    assert done.returncode == 0, done.stderr
    found, expected = manifest(folder / "out"), manifest(tmp_path / "here")
    assert (found["shards"], found["decides"]) == (expected["shards"], expected["decides"])
