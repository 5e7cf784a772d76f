"""Split documents into sentences, and read the result by index.

Reads   INPUT_PATH: a parquet file with a column `text`, or a folder of such files
Writes  OUTPUT_DIR/sentences-*.parquet (text, doc_idx, start, gap), punkt.json, manifest.json
Method  NLTK Punkt (Kiss and Strunk 2006, Computational Linguistics 32:4); spans untouched, so that texts and
        gaps joined give every document back
Cost    the README's table has the rate; disk about that of the documents

    python openwebtext_sentences_dataset.py --input_path data/documents --output_dir data/sentences

The reader: `SentenceDataset(folder)[i]` is sentence i in the seeded order of the published dataset.
"""

import collections
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import stage

INPUT_PATH: str  # documents: a parquet file with a column `text`, or a folder of them
OUTPUT_DIR = "data/sentences"  # folder for the sentences
PUNKT = "english"  # "english": NLTK's pre-trained model, else as "corpus": trained on the documents themselves
PUNKT_TRAIN_MB = 50.0  # MB of documents to train Punkt on
SHARD_MB = 64.0  # MB of document text a shard
NUM_PROCESSES = 0  # processes that split; 0 for one a core

_SHUFFLE_SEED = 42  # of the published order; the reader's default
_STAGE = "openwebtext_sentences_dataset.py"


# ---- reading documents


def document_files(input_path: str) -> list[Path]:
    """The parquet files to read, in order of name. Raises InputError where there is none."""
    path = Path(input_path)
    if not path.exists():
        raise stage.InputError(f"There is nothing at {input_path}; name a parquet file of documents or a folder.")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise stage.InputError(f"{input_path} holds no parquet file; name a folder of documents.")
    return files


def open_documents(path: Path) -> Any:
    """The parquet file, once its column `text` is known to be there. Raises InputError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise stage.InputError(f"{path} is not a parquet file ({error}); fetch it again.") from None
    types = {field.name: field.type for field in file.schema_arrow}
    if "text" not in types:
        raise stage.InputError(f"{path} has no column `text`; name files of documents with one.")
    if not any(
        is_text(types["text"]) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    ):
        raise stage.InputError(f"The column `text` of {path} holds {types['text']}, not text; name other files.")
    return file


def iter_text(path: Path, batch_size: int) -> Iterator[Any]:
    """The column `text` in batches, as bytes (Arrow large_binary, nulls as empty)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        for batch in open_documents(path).iter_batches(batch_size=batch_size, columns=["text"]):
            yield pc.fill_null(batch.column(0).cast(pa.large_binary()), b"")
    except (pa.ArrowInvalid, OSError) as error:
        raise stage.InputError(f"{path} is damaged ({error}); fetch it again.") from None


def iter_documents(files: list[Path]) -> Iterator[str | bytes]:
    """Every document in order; bytes where it is not valid UTF-8."""
    for path in files:
        for batch in iter_text(path, 1024):
            for raw in batch.to_pylist():
                try:
                    yield raw.decode("utf-8")
                except UnicodeDecodeError:
                    yield raw


# ---- Punkt


def load_punkt(kind: str, files: list[Path], train_mb: float) -> tuple[dict[str, Any], str]:
    """Punkt's parameters as plain lists, and where they come from."""
    from nltk.tokenize.punkt import PunktTrainer

    if kind not in ("english", "corpus"):
        raise stage.InputError(f"--punkt {kind} is unknown; write english or corpus.")
    if kind == "english" and (params := _pretrained_english()) is not None:
        return _to_json(params), "NLTK's pre-trained English model (punkt_tab)"
    trainer = PunktTrainer()
    trainer.INCLUDE_ALL_COLLOCS = True
    left = int(train_mb * 1e6)
    with stage.progress(total=left, unit="B", unit_scale=True, desc="training Punkt") as bar:
        for document in iter_documents(files):
            if left <= 0:
                break
            text = _as_text(document)[:left]
            trainer.train(text, finalize=False)
            left -= len(text)
            bar.update(len(text))
    return _to_json(trainer.get_params()), f"trained on up to {train_mb:g} MB of the documents"


def _pretrained_english():
    import nltk
    from nltk.tokenize.punkt import PunktTokenizer

    try:
        return PunktTokenizer("english")._params
    except LookupError:
        pass
    nltk.download("punkt_tab", quiet=True)
    try:
        return PunktTokenizer("english")._params
    except LookupError:
        return None


def _to_json(params) -> dict[str, Any]:
    return {
        "abbrev_types": sorted(params.abbrev_types),
        "collocations": sorted(map(list, params.collocations)),
        "sent_starters": sorted(params.sent_starters),
        "ortho_context": dict(sorted(params.ortho_context.items())),
    }


def make_splitter(fields: dict[str, Any]):
    """A Punkt sentence tokenizer with the parameters of punkt.json."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    params = PunktParameters()
    params.abbrev_types = set(fields["abbrev_types"])
    params.collocations = set(map(tuple, fields["collocations"]))
    params.sent_starters = set(fields["sent_starters"])
    params.ortho_context = collections.defaultdict(int, fields["ortho_context"])
    splitter = PunktSentenceTokenizer()
    splitter._params = params
    return splitter


# ---- splitting


def _as_text(document: str | bytes) -> str:
    return document if isinstance(document, str) else document.decode("utf-8", errors="replace")


def split_document(splitter, text: str) -> list[tuple[str, int, str]]:
    """(sentence, start, gap) in order; the sentences and gaps joined are the document. Without text: one empty row."""
    spans = [(start, end) for start, end in splitter.span_tokenize(text) if end > start]
    if not spans:
        return [("", 0, text)]
    spans[0] = (0, spans[0][1])
    ends = [start for start, _ in spans[1:]] + [len(text)]
    return [
        (text[start:end], start, text[end:next_start]) for (start, end), next_start in zip(spans, ends, strict=True)
    ]


def write_shard(path: Path, first_doc_idx: int, documents: list[str | bytes], punkt: dict[str, Any]) -> dict:
    """Split a shard's documents and write them, unless done; runs in a worker process. Returns the shard's record."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.exists():
        return describe_shard(path)
    splitter = make_splitter(punkt)
    rows = {"text": [], "doc_idx": [], "start": [], "gap": []}
    for doc_idx, document in enumerate(documents, first_doc_idx):
        for sentence, start, gap in split_document(splitter, _as_text(document)):
            rows["text"].append(sentence)
            rows["doc_idx"].append(doc_idx)
            rows["start"].append(start)
            rows["gap"].append(gap)
    columns = {
        "text": pa.array(rows["text"], pa.large_string()),
        "doc_idx": pa.array(rows["doc_idx"], pa.int64()),
        "start": pa.array(rows["start"], pa.int64()),
        "gap": pa.array(rows["gap"], pa.large_string()),
    }
    counts = {"n_docs": len(documents), "n_invalid_utf8": sum(isinstance(d, bytes) for d in documents)}
    table = pa.table(columns).replace_schema_metadata({name: str(n) for name, n in counts.items()})
    with stage.atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return describe_shard(path)


def shards_of_documents(files: list[Path], shard_chars: int) -> Iterator[tuple[int, list[str | bytes]]]:
    """(index of the first document, documents) of each shard. Depends on the documents and shard_chars alone."""
    first, documents, size = 0, [], 0
    for document in iter_documents(files):
        documents.append(document)
        size += len(document)
        if size >= shard_chars:
            yield first, documents
            first, documents, size = first + len(documents), [], 0
    if documents:
        yield first, documents


def describe_shard(path: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    own = metadata.metadata
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": stage.sha256(path),
        "n_sentences": metadata.num_rows,
        "n_docs": int(own[b"n_docs"]),
        "n_invalid_utf8": int(own[b"n_invalid_utf8"]),
    }


# ---- the reader


class SentenceDataset:
    """Sentences by index, in the order of the published dataset.

    `dataset[i]` is row `order[i]` of the parquet files, with order = numpy.random.default_rng(seed).permutation(n): how
    Hugging Face datasets shuffles, so that a sentence index means the same sentence as in the published files. Texts
    come from a memory-mapped Arrow file that the first reader makes beside the parquet files. Also reads the published
    dataset, which has a column `text` and no manifest. Raises InputError.
    """

    def __init__(self, folder: str | Path, num_samples: int | None = None, seed: int = _SHUFFLE_SEED):
        self.folder = Path(folder)
        if (self.folder / stage.MANIFEST).exists():
            self.manifest = stage.read_manifest(self.folder, _STAGE)
            stage.check_files(self.folder, self.manifest["shards"], _STAGE)
            files = [self.folder / shard["file"] for shard in self.manifest["shards"]]
        else:
            self.manifest = {}
            files = document_files(str(folder))
        arrow_path = self.folder / "sentences.arrow"
        of = json.dumps([[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]).encode()
        table = self._open_arrow(arrow_path)
        if table is None or table.schema.metadata != {b"of": of}:
            self._write_arrow(files, arrow_path, of)
            table = self._open_arrow(arrow_path)
        self.texts = table.column("text")
        self.order = np.random.default_rng(seed).permutation(len(self.texts))
        self.n = min(num_samples or len(self.texts), len(self.texts))

    @staticmethod
    def _open_arrow(path: Path) -> Any:
        import pyarrow as pa

        try:
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (pa.ArrowInvalid, OSError):
            return None

    @staticmethod
    def _write_arrow(files: list[Path], arrow_path: Path, of: bytes) -> None:
        """Copy the column `text` of the files; `of` says which files, and is compared when the copy is opened."""
        import pyarrow as pa

        schema = pa.schema([("text", pa.large_string())], metadata={"of": of})
        with stage.atomic_path(arrow_path) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
            for path in files:
                for batch in iter_text(path, 65_536):
                    writer.write_batch(pa.record_batch([batch.cast(pa.large_string())], schema=schema))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < self.n:
            raise IndexError(f"sentence {i} of {self.n}")
        return self.texts[int(self.order[i])].as_py()


# ---- main


def main() -> None:
    config = stage.parse_constants(globals())
    files = document_files(config.input_path)
    for path in files:
        open_documents(path)
    n_bytes = sum(f.stat().st_size for f in files)
    folder = Path(config.output_dir)
    print(
        f"Reading {len(files)} files of documents, {stage.gb(n_bytes)}, from {config.input_path}; writing to {folder}."
    )
    decides = {
        "documents": [[f.name, f.stat().st_size] for f in files],
        "punkt": config.punkt,
        "punkt_train_mb": config.punkt_train_mb,
        "shard_mb": config.shard_mb,
    }
    with stage.locked(folder):
        if stage.begin_or_continue(folder, _STAGE, decides):
            print(f"{folder} is complete already.")
            return
        stage.require_disk(folder, 2 * n_bytes)
        if not (folder / "punkt.json").exists():
            params, origin = load_punkt(config.punkt, files, config.punkt_train_mb)
            stage.write_json(folder / "punkt.json", {"origin": origin, **params})
        punkt = json.loads((folder / "punkt.json").read_text())
        print(f"Punkt: {punkt['origin']}.")

        n_workers = config.num_processes or os.cpu_count() or 1
        jobs = (
            (folder / f"sentences-{number:05d}.parquet", first, documents, punkt)
            for number, (first, documents) in enumerate(shards_of_documents(files, int(config.shard_mb * 1e6)))
        )
        described = []
        with stage.Workers(n_workers) as workers, stage.progress(unit="doc", desc="sentences") as bar:
            for record in workers.map(write_shard, jobs):
                described.append(record)
                bar.update(record["n_docs"])
        counts = {name: sum(s[f"n_{name}"] for s in described) for name in ("sentences", "docs", "invalid_utf8")}
        stage.write_manifest(
            folder,
            _STAGE,
            complete=True,
            decides=decides,
            config=vars(config),
            punkt_origin=punkt["origin"],
            counts=counts,
            shards=described,
        )
    print(f"{counts['sentences']:,} sentences of {counts['docs']:,} documents: {folder}")


if __name__ == "__main__":
    stage.run(main)
