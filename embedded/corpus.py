"""Gather the English documentation that every installation of this project already has, as documents in parquet.

Reads   docstrings of the Python standard library and of PACKAGES, pydoc_data.topics, descriptions of installed packages
Writes  OUTPUT_DIR/documents.parquet (text, source, held_out), manifest.json
Cost    about 20 s on two cores; 12 MB of text

Only prose is kept: whole paragraphs with sentence punctuation that are mostly words. Code, doctests, tables, headings
and reST markup are dropped; a paragraph that occurs twice is kept once. A document is one file, one topic or one
package's description.

    python -m embedded.corpus --output_dir data/documents
"""

import hashlib
import inspect
import multiprocessing
import os
import re
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.documents import arrow_file
from pipeline.files import atomic_path, sha256
from pipeline.manifests import output_folder, write_manifest
from pipeline.options import NotNegative, parse_constants
from pipeline.progress import progress_bar
from pipeline.run import run

OUTPUT_DIR = "data/documents"  # folder for documents.parquet
MAX_MB: NotNegative = 0.0  # MB of text to keep, from evenly spaced files; 0 for all

CORPUS_STAGE = "embedded/corpus.py"
_DOCUMENTS = "documents.parquet"
_SCHEMA = pa.schema({"text": pa.string(), "source": pa.string(), "held_out": pa.bool_()})
# Installed packages whose documentation counts as English prose; a missing one is skipped.
_PACKAGES = [
    "anthropic",
    "blobfile",
    "click",
    "contourpy",
    "fontTools",
    "fsspec",
    "gradio",
    "huggingface_hub",
    "jinja2",
    "joblib",
    "matplotlib",
    "mpmath",
    "networkx",
    "nltk",
    "numpy",
    "packaging",
    "pandas",
    "PIL",
    "pyarrow",
    "pydantic",
    "pyparsing",
    "safetensors",
    "sympy",
    "tiktoken",
    "tokenizers",
    "torch",
    "tqdm",
    "urllib3",
    "wandb",
    "yaml",
]
# Files whose text no model here is trained on, relative to the standard library or to site-packages.
_HELD_OUT = frozenset(
    [
        "argparse.py",
        "asyncio/queues.py",
        "calendar.py",
        "concurrent/futures/_base.py",
        "datetime.py",
        "email/message.py",
        "fractions.py",
        "http/cookiejar.py",
        "json/decoder.py",
        "logging/handlers.py",
        "statistics.py",
        "textwrap.py",
        "threading.py",
        "unittest/mock.py",
        "topics:formatstrings",
        "topics:import",
        "topics:naming",
        "topics:assert",
        "topics:exceptions",
        "topics:typesseq",
        "gradio/blocks.py",
        "matplotlib/legend.py",
        "matplotlib/ticker.py",
        "mpmath/calculus/quadrature.py",
        "networkx/algorithms/clique.py",
        "networkx/algorithms/traversal/depth_first_search.py",
        "nltk/tokenize/punkt.py",
        "nltk/translate/bleu_score.py",
        "numpy/fft/_pocketfft.py",
        "numpy/lib/_function_base_impl.py",
        "numpy/polynomial/hermite.py",
        "pandas/core/groupby/groupby.py",
        "pandas/core/resample.py",
        "PIL/ImageDraw.py",
        "sympy/geometry/polygon.py",
        "sympy/stats/crv_types.py",
        "torch/nn/modules/loss.py",
        "torch/optim/lr_scheduler.py",
        "torch/distributed/rpc/api.py",
        "torch/utils/data/dataloader.py",
        "wandb/sdk/artifacts/artifact.py",
    ]
)
_SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "idlelib", "lib2to3", "site-packages", "__pycache__"}

# Triple-quoted strings, found without parsing: the whole installation takes seconds instead of minutes.
_TRIPLE_QUOTED = re.compile(r'("""|\'\'\')(.*?)\1', re.DOTALL)
_ROLE = re.compile(r":[\w:+-]+:`~?!?([^`<]*?)(?:\s*<[^`>]*>)?`")  # :func:`x`, :ref:`x <y>`
_LITERAL = re.compile(r"`{1,2}~?([^`]*)`{1,2}_{0,2}")  # ``x``, `x`_
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_BULLET = re.compile(r"^([-*]|\d+[.)]|:\w+[^:]*:)\s+")  # "- x", "1. x", ":param x: y"
_NOT_PROSE = (">>>", "...", "$ ", ".. ", "#", "|", "+-", "@", "def ", "class ", "import ", "from ")
_RULE = re.compile(r"[-=~^*`_+]{3,}")
_WORD = re.compile(r"[(\"']?[A-Za-z]+(?:['-][A-Za-z]+)*[.,;:!?)\"']*")
_MIN_WORDS = 5
_MIN_WORD_SHARE = 0.72  # share of a paragraph's characters that belong to plain words


def prose_paragraphs(doc: str) -> list[str]:
    """The paragraphs of a docstring that are English prose, each on one line, without markup."""
    paragraphs: list[str] = []
    block: list[str] = []

    def flush() -> None:
        text = " ".join(block)
        block.clear()
        for pattern in (_ROLE, _LITERAL, _BOLD):
            text = pattern.sub(r"\1", text)
        words = text.split()
        text = " ".join(words)
        if len(words) < _MIN_WORDS or text[-1] not in ".!?:;)" or not text[0].isalnum():
            return
        if sum(len(w) for w in words if _WORD.fullmatch(w)) >= _MIN_WORD_SHARE * sum(map(len, words)):
            paragraphs.append(text[:-1] + "." if text[-1] in ":;" else text)

    indent = skipped_below = None  # indentation of the block, and of the code or directive being skipped
    for line in inspect.cleandoc(doc).splitlines():
        text = line.strip()
        depth = len(line) - len(line.lstrip())
        if not text:
            flush()
            indent = None
            continue
        if skipped_below is not None:
            if depth > skipped_below:
                continue
            skipped_below = None
        if text.startswith(_NOT_PROSE) or _RULE.match(text):
            flush()
            indent = None
            if text.startswith(".. ") and not text.startswith((".. note", ".. warn")):
                skipped_below = depth
            continue
        if indent is not None and depth != indent:
            flush()
        if _BULLET.match(text):
            flush()
            text = _BULLET.sub("", text)
        indent = depth
        block.append(text)
        if text.endswith("::"):
            block[-1] = text[:-1]
            flush()
            skipped_below = depth
    flush()
    return paragraphs


def find_sources() -> list[tuple[str, Path]]:
    """(name, path) of every file to read, in a fixed order: the standard library, packages, package descriptions."""
    library = Path(sysconfig.get_paths()["stdlib"])
    site = Path(sysconfig.get_paths()["purelib"])
    sources = [(library, path) for path in library.rglob("*.py")]
    for package in _PACKAGES:
        sources += [(site, path) for path in (site / package).rglob("*.py")]
        sources += [(site, path) for path in site.glob(f"{package}-*.dist-info/METADATA")]
    named = [(path.relative_to(root), path) for root, path in sources]
    return sorted((str(name), path) for name, path in named if not set(name.parts) & _SKIPPED_FOLDERS)


def read_file(source: tuple[str, Path]) -> tuple[str, list[str]]:
    name, path = source
    text = path.read_text("utf-8", errors="replace")
    if path.name == "METADATA":
        return name, prose_paragraphs(text.partition("\n\n")[2])
    return name, [p for _, doc in _TRIPLE_QUOTED.findall(text) for p in prose_paragraphs(doc)]


def read_topics() -> list[tuple[str, list[str]]]:
    """The language reference behind Python's help(), one document per topic."""
    from pydoc_data.topics import topics

    return [(f"topics:{name}", prose_paragraphs(topics[name])) for name in sorted(topics)]


def read_source(name: str) -> list[str]:
    """The paragraphs of the file or topic of this name in this installation; empty if it is not installed."""
    from pydoc_data.topics import topics

    kind, _, topic = name.partition(":")
    if kind == "topics":
        return prose_paragraphs(topics.get(topic, ""))
    for root in ("stdlib", "purelib"):
        path = Path(sysconfig.get_paths()[root], name)
        if path.is_file():
            return read_file((name, path))[1]
    return []


def read_all(sources: list[tuple[str, Path]]) -> list[tuple[str, list[str]]]:
    """(name, paragraphs) of every file and topic, held-out ones first, so that shared paragraphs are held out."""
    with multiprocessing.Pool(os.cpu_count()) as pool:
        read = pool.imap(read_file, sources, chunksize=32)
        documents = list(progress_bar(read, total=len(sources), unit="file", desc="documentation"))
    documents += read_topics()
    return sorted(documents, key=lambda document: (document[0] not in _HELD_OUT, document[0]))


def take_evenly(documents: list[tuple[str, list[str]]], max_mb: float) -> list[tuple[str, list[str]]]:
    """About max_mb of text, from evenly spaced documents."""
    share = max_mb * 1e6 / sum(len(p) for _, paragraphs in documents for p in paragraphs)
    return [document for i, document in enumerate(documents) if int((i + 1) * share) > int(i * share)]


def rows_of(documents: list[tuple[str, list[str]]]) -> list[dict[str, Any]]:
    """The rows of documents.parquet; a paragraph that occurs twice is kept where it occurs first."""
    seen: set[str] = set()
    rows = []
    for name, paragraphs in documents:
        fresh = list(dict.fromkeys(p for p in paragraphs if p not in seen))
        seen.update(fresh)
        if fresh:
            rows.append({"text": "\n\n".join(fresh), "source": name, "held_out": name in _HELD_OUT})
    return rows


def write_documents(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write documents.parquet; returns its record for the manifest."""
    path = folder / _DOCUMENTS
    with atomic_path(path) as temporary, arrow_file(temporary, "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file, compression="zstd")
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def read_documents(folder: Path | str) -> dict[str, list[Any]]:
    """Column -> values of documents.parquet."""
    return pq.ParquetFile(arrow_file(Path(folder, _DOCUMENTS))).read().to_pydict()


def main() -> None:
    config = parse_constants(globals())
    warnings.simplefilter("ignore")
    folder = Path(config.output_dir)
    sources = find_sources()
    print(f"Reading the documentation in {len(sources)} files of {sys.prefix}; writing to {folder}.")
    sizes = "".join(f"{name} {path.stat().st_size}\n" for name, path in sources)
    decides = {"max_mb": config.max_mb, "installation": hashlib.sha256(sizes.encode()).hexdigest()}
    with output_folder(folder, CORPUS_STAGE, decides, needed_bytes=0) as complete:
        if complete:
            return
        documents = read_all(sources)
        rows = rows_of(take_evenly(documents, config.max_mb) if config.max_mb else documents)
        shard = write_documents(folder, rows)
        held_out = [row for row in rows if row["held_out"]]
        counts = {
            "documents": len(rows),
            "characters": sum(len(row["text"]) for row in rows),
            "held_out_documents": len(held_out),
            "held_out_characters": sum(len(row["text"]) for row in held_out),
        }
        options = vars(config)
        write_manifest(folder, CORPUS_STAGE, True, decides=decides, config=options, counts=counts, shards=[shard])
    print(
        f"{len(rows)} documents, {counts['characters'] / 1e6:.1f} MB of text, {len(held_out)} held out: "
        f"{folder / _DOCUMENTS}"
    )


if __name__ == "__main__":
    run(main)
