"""Prose from docstrings written for the tests: sentences stay; code, tables and markup go.

.venv/bin/python -m pytest tests/test_embedded_corpus.py
"""

import multiprocessing
import multiprocessing.pool
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pipeline_runs import call, refusal

from embedded import corpus as corpus
from pipeline.manifests import check_files, read_manifest


def check(doc: str, *expected: str) -> None:
    assert corpus.prose_paragraphs(doc) == list(expected)


# ---- one docstring


def test_paragraphs_become_single_lines():
    check(
        """Return the number of things that are

        in the box, counting the ones that
        have been taken out of it since.

        Is this a paragraph of its own?  Yes, it surely is!
        """,
        "in the box, counting the ones that have been taken out of it since.",
        "Is this a paragraph of its own? Yes, it surely is!",
    )


def test_markup_goes_and_its_text_stays():
    check(
        """See :func:`~os.path.join`, :class:`the list <builtins.list>` and :py:meth:`close` for **all** the details.

        Set ``name`` and `other` as the `first page`_ says, then go on.
        """,
        "See os.path.join, the list and close for all the details.",
        "Set name and other as the first page says, then go on.",
    )


def test_doctests_go():
    check(
        """Add the two numbers and return their sum.

        >>> add(1, 2)
        3
        >>> for word in "This is the code of it.".split():
        ...     print(word, "is the word that is printed.")

        This stands after the example and is prose.
        """,
        "Add the two numbers and return their sum.",
        "This stands after the example and is prose.",
    )


def test_code_blocks_go():
    check(
        """The following example shows how to do it::

            this is code that reads like a sentence of words.

            and so does this second paragraph of the same block.

        Here is the text after the block of code.

        .. code-block:: python

            here is more of the code that must not be kept.

        .. versionchanged:: 3.5
           It was different in the versions before this one.

        The end of all this has now come.
        """,
        "The following example shows how to do it.",
        "Here is the text after the block of code.",
        "The end of all this has now come.",
    )


def test_lists_give_a_paragraph_a_point():
    check(
        """There are two things that you should know:

        - The first of them is about the files.
        * The second of them is about the folders.
        - short
        1. The third of them has a number before it.
        2) The fourth of them has another number before it.
        """,
        "There are two things that you should know.",
        "The first of them is about the files.",
        "The second of them is about the folders.",
        "The third of them has a number before it.",
        "The fourth of them has another number before it.",
    )


@pytest.mark.xfail(strict=True, reason="a second line, indented under the first, starts a paragraph of its own")
@pytest.mark.parametrize("bullet", ["-", "1.", ":param path:"])
def test_a_point_may_have_two_lines(bullet):
    check(
        f"{bullet} The second point of the list goes\n  over two lines of plain text here.\n\nThat is all there is.\n",
        "The second point of the list goes over two lines of plain text here.",
        "That is all there is.",
    )


def test_parameters():
    check(
        """Move the thing to another place at once.

        Parameters
        ----------
        x : array_like, shape (n, 3), optional
            The positions of the things that are to be moved.
        speed : float
            How fast the thing should move, in metres a second.

        :param path: the path of the file that is to be opened.
        :returns: nothing at all, since this function does not return.
        """,
        "Move the thing to another place at once.",
        "The positions of the things that are to be moved.",
        "How fast the thing should move, in metres a second.",
        "the path of the file that is to be opened.",
        "nothing at all, since this function does not return.",
    )


def test_tables_and_headings_go():
    check(
        """A Heading That Has No Full Stop
        ===============================

        +----------------------+---------------------------+
        | this is the name     | this is what it does.     |
        +----------------------+---------------------------+
        | another of the names | another of the meanings.  |

        ========  ==========
        f(x, y)   x**2 + y_1.
        g(x, y)   x / y - 3.
        ========  ==========

        The text below the tables is kept as it is.
        """,
        "The text below the tables is kept as it is.",
    )


@pytest.mark.xfail(strict=True, reason="the words on the line of the directive are lost")
def test_notes_are_prose():
    check(
        """.. note:: This is a note about something that
           one should know before the work begins.

        .. warning::

           This is a warning about something that is dangerous.
        """,
        "This is a note about something that one should know before the work begins.",
        "This is a warning about something that is dangerous.",
    )


def test_what_is_mostly_symbols_goes():
    check("x_1 = f(y_2) and z_3 = g(x_1, y_2) with a_b = c_d.\n\nToo few words.\n\n(n, m) -> shape\n\n\n")
    check("")
    check("   \n\n\t\n")


@given(st.text(alphabet=st.sampled_from("ab :.`*-|>=\n\t<~_1#"), max_size=200))
def test_any_text_gives_clean_paragraphs(doc):
    for paragraph in corpus.prose_paragraphs(doc):
        assert paragraph == " ".join(paragraph.split()) and len(paragraph.split()) >= 5
        assert paragraph[-1] in ".!?)"


# ---- the installation


@pytest.fixture(scope="module")
def sources():
    return corpus.find_sources()


@pytest.mark.slow
def test_the_order_of_files_is_fixed(sources, monkeypatch):
    names = [name for name, _ in sources]
    assert names == sorted(names) and len(set(sources)) == len(sources) > 1000
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(rglob(self, pattern))))  # another disk
    monkeypatch.setattr(corpus, "_PACKAGES", corpus._PACKAGES[::-1])
    assert corpus.find_sources() == sources


def test_tests_and_vendored_files_are_left_out(sources):
    for name, path in sources:
        assert not {"tests", "test", "_vendor", "site-packages"} & set(name.split("/")) and path.is_file()


def test_held_out_files_are_in_this_installation(sources):
    names = {name for name, _ in sources} | {name for name, _ in corpus.read_topics()}
    assert len(corpus._HELD_OUT & names) >= 30


def test_topics_are_english_text():
    topics = dict(corpus.read_topics())
    assert len(topics) > 50
    text = " ".join(p for paragraphs in topics.values() for p in paragraphs)
    assert len(text) > 100_000 and "`" not in text
    assert 0.03 < text.split().count("the") / len(text.split()) < 0.12
    assert any("exception" in p for p in topics["topics:exceptions"])


def test_a_real_file(sources):
    name, paragraphs = corpus.read_file(("textwrap.py", dict(sources)["textwrap.py"]))
    assert name == "textwrap.py"
    assert any(p.startswith("Wrap a single paragraph of text, returning a list of wrapped lines.") for p in paragraphs)
    assert not any("def " in p or ">>>" in p for p in paragraphs)


# ---- the script


def test_documents(tmp_path, monkeypatch, capsys):
    """Held-out documents come first and keep paragraphs they share with others; no paragraph occurs twice."""
    shared = "This very sentence stands in two of the files."
    files = {
        "zz.py": f'"""{shared}\n\nThe last of the files has this to say."""',
        "argparse.py": f"def f():\n    '''{shared}'''\n    # no docstring: this is a comment of words.\n",
        "code.py": "x = 1\n",
        "some-1.0.dist-info/METADATA": "Name: some\nSummary: not this line.\n\nWhat the package is good for.\n",
        "latin.py": b'"""The caf\xe9 is open on all days of the week."""',
    }
    sources = []
    for name, text in files.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        sources.append((name, path))
    topics = [("topics:naming", ["How names are bound is told in this topic."]), ("topics:empty", [])]
    monkeypatch.setattr(corpus, "find_sources", lambda: sources)
    monkeypatch.setattr(corpus, "read_topics", lambda: topics)
    monkeypatch.setattr(multiprocessing, "Pool", multiprocessing.pool.ThreadPool)
    call(corpus, output_dir=tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "documents.parquet").to_pylist()
    assert [(row["source"], row["held_out"]) for row in rows] == [
        ("argparse.py", True),
        ("topics:naming", True),
        ("latin.py", False),
        ("some-1.0.dist-info/METADATA", False),
        ("zz.py", False),
    ]
    texts = {row["source"]: row["text"] for row in rows}
    assert texts["argparse.py"] == shared and texts["zz.py"] == "The last of the files has this to say."
    assert texts["some-1.0.dist-info/METADATA"] == "What the package is good for."
    assert texts["latin.py"] == "The caf\ufffd is open on all days of the week."
    manifest = read_manifest(tmp_path / "out", "embedded/corpus.py")
    assert manifest["counts"] == {
        "documents": 5,
        "characters": sum(map(len, texts.values())),
        "held_out_documents": 2,
        "held_out_characters": len(texts["argparse.py"]) + len(texts["topics:naming"]),
    }
    check_files(tmp_path / "out", manifest["shards"], "embedded/corpus.py")
    written = (tmp_path / "out" / "documents.parquet").stat().st_mtime_ns
    call(corpus, output_dir=tmp_path / "out")
    assert "is already complete" in capsys.readouterr().out
    sources[0][1].write_text("another installation")
    assert "was begun with installation" in refusal(capsys, corpus, output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "documents.parquet").stat().st_mtime_ns == written


def test_max_mb_takes_evenly_from_the_whole(tmp_path, monkeypatch):
    documents = [(f"file{i:03d}.py", [f"This is the sentence of number {i} of them all."]) for i in range(200)]
    monkeypatch.setattr(corpus, "find_sources", lambda: [])
    monkeypatch.setattr(corpus, "read_topics", lambda: documents)
    monkeypatch.setattr(multiprocessing, "Pool", multiprocessing.pool.ThreadPool)
    size = sum(len(p[0]) for _, p in documents)
    call(corpus, output_dir=tmp_path / "out", max_mb=size / 4 / 1e6)
    chosen = [int(name[4:7]) for name in pq.read_table(tmp_path / "out" / "documents.parquet")["source"].to_pylist()]
    assert 48 <= len(chosen) <= 51 and {b - a for a, b in zip(chosen, chosen[1:], strict=False)} <= {3, 4, 5}
