"""Sentence splitting: sentences/s of openwebtext_sentences_dataset.py on one and two processes against a plain loop.

Reads   INPUT_PATH, or the documentation on this machine; Punkt is trained on it once, before the clock starts
Writes  DATA_DIR; prints a row of a markdown table
Method  each way runs in its own process, timed from start to end, so that imports and starting workers count. The
        plain loop is what one would write with NLTK: a PunktSentenceTokenizer with the same parameters, over the
        documents one after the other, its sentences kept in a list; it writes nothing. Ours is the whole script:
        documents checked, spans and gaps, parquet, checksums. All three must find the same number of sentences. One
        of each in turn, REPEATS times; medians. A short corpus is read COPIES times, as separate files, so that the
        rate is that of a long run; the splitter's cache has lost nearly all of one copy by the next (it answers 24 %
        of the look-ups in the first copy of the documentation, 27 % in the second). Run it alone on the machine
Cost    10 minutes on two cores

    python benchmarks/sentences.py
    python benchmarks/sentences.py --input_path documents.parquet
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import machine, median_rates, run_script, timed

from pipeline.errors import InputError
from pipeline.files import read_json, write_json
from pipeline.manifests import MANIFEST
from pipeline.options import Count, Positive, parse_constants
from pipeline.progress import progress_bar
from pipeline.run import run

INPUT_PATH: str | None = None  # a parquet file of documents; made from the documentation when not given
DATA_DIR = "data/benchmark_sentences"  # folder for documents and sentences
COPIES: Count = 8  # times the documents are read
PUNKT_TRAIN_MB: Positive = 1.0  # MB of documents to train Punkt on
SHARD_MB: Positive = 2.0  # MB per shard: many shards for each process
REPEATS: Count = 5  # runs of each way

_PLAIN_LOOP = """
import json, sys
import pyarrow.parquet as pq
from nltk import redos
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
fields = json.load(open(sys.argv[1]))
params = PunktParameters()
params.abbrev_types = set(fields["abbrev_types"])
params.collocations = {tuple(pair) for pair in fields["collocations"]}
params.sent_starters = set(fields["sent_starters"])
params.ortho_context.update(fields["ortho_context"])
tokenizer = PunktSentenceTokenizer()
tokenizer._params = params
sentences = []
for path in sys.argv[2:]:
    for text in pq.read_table(path, columns=["text"])["text"].to_pylist():
        sentences += tokenizer.tokenize(text)
print(len(sentences))
"""


def make_documents(folder: Path, input_path: str | None, copies: int) -> Path:
    """A folder with `copies` copies of the parquet file, by default of the documentation on this machine."""
    if input_path is None:
        run_script("embedded/corpus.py", output_dir=folder / "documentation")
        input_path = str(folder / "documentation" / "documents.parquet")
    documents = folder / "documents"
    shutil.rmtree(documents, ignore_errors=True)
    documents.mkdir()
    for i in range(copies):
        shutil.copy(input_path, documents / f"documents-{i:02d}.parquet")
    return documents


def plain_loop(documents: Path, punkt_path: Path) -> int:
    files = sorted(documents.iterdir())
    done = subprocess.run([sys.executable, "-c", _PLAIN_LOOP, punkt_path, *files], check=True, capture_output=True)
    return int(done.stdout)


def begin(documents: Path, begun: Path, options: dict[str, Any]) -> None:
    """Make a folder as the script leaves it after training Punkt, before splitting anything."""
    shutil.rmtree(begun, ignore_errors=True)
    run_script("openwebtext_sentences_dataset.py", input_path=documents, output_dir=begun, **options)
    for shard in begun.glob("*.parquet"):
        shard.unlink()
    manifest = read_json(begun / MANIFEST, "")
    write_json(begun / MANIFEST, manifest | {"complete": False})


def ours(documents: Path, begun: Path, folder: Path, n_processes: int, options: dict[str, Any]) -> int:
    """The whole script, starting from a copy of `begun`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(begun, folder)
    options = options | {"input_path": documents, "output_dir": folder, "num_processes": n_processes}
    run_script("openwebtext_sentences_dataset.py", **options)
    return read_json(folder / MANIFEST, "")["counts"]["sentences"]


def main() -> None:
    config = parse_constants(globals())
    folder = Path(config.data_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    documents = make_documents(folder, config.input_path, config.copies)
    options = {"punkt": "corpus", "punkt_train_mb": config.punkt_train_mb, "shard_mb": config.shard_mb}
    begun = folder / "begun"
    begin(documents, begun, options)
    ways = {
        "plain": (plain_loop, documents, begun / "punkt.json"),
        "one": (ours, documents, begun, folder / "sentences", 1, options),
        "two": (ours, documents, begun, folder / "sentences", 2, options),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, int] = {}
    for _ in progress_bar(range(config.repeats), unit="round", desc="benchmark"):
        for way, call in ways.items():
            took, found[way] = timed(*call)
            seconds[way].append(took)
    if len(set(found.values())) > 1:
        raise InputError(f"The ways found different numbers of sentences ({found}); fix the splitting.")
    n = found["plain"]
    n_bytes = sum(shard["text_bytes"] for shard in read_json(folder / "sentences" / MANIFEST, "")["shards"])
    rate = median_rates(n, seconds)
    print("| sentences/s | plain NLTK loop | ours, one process | ours, two | two / one | two / loop | machine |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {n:,} sentences, {n_bytes / 1e6:.0f} MB | {rate['plain']:,.0f} | {rate['one']:,.0f} | {rate['two']:,.0f} "
        f"| {rate['two'] / rate['one']:.2f} | {rate['two'] / rate['plain']:.2f} "
        f"| {machine()} |"
    )


if __name__ == "__main__":
    run(main)
