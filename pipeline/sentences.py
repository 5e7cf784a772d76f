"""Sentences by index: what openwebtext_sentences_dataset.py writes, or the published dataset. Also their file format.

A shard sentences-NNNNN.parquet has a row per sentence: text, doc_idx (of its document, from 0 over all shards), start
(its first character in the document), gap (the document's text up to the next sentence). Joining texts and gaps gives
the documents.
"""

import fcntl
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.documents import (
    arrow_file,
    as_text,
    describe_files,
    document_files,
    iter_parquet,
    kind_of,
    open_parquet,
    utf8_name,
)
from pipeline.errors import InputError
from pipeline.files import atomic_path, sha256
from pipeline.manifests import MANIFEST, check_complete, check_files, read_manifest

SENTENCES_STAGE = "openwebtext_sentences_dataset.py"
SHUFFLE_SEED = 42  # of the published order; the reader's default

SentenceRow = tuple[str, int, int, str]  # text, doc_idx, start, gap
_SCHEMA = pa.schema({"text": pa.large_string(), "doc_idx": pa.int64(), "start": pa.int64(), "gap": pa.large_string()})
_ROW_GROUP = 2**16  # sentences; the writer holds hardly more as Python objects
_COUNTS = ("n_docs", "n_invalid_utf8", "text_bytes")  # kept in the file's metadata

T = TypeVar("T")


# ---- shards


def write_sentence_shard(path: Path, documents: Iterable[list[SentenceRow]], counts: dict[str, int]) -> dict[str, Any]:
    """Write the sentences of each document; counts: those of _COUNTS. Returns the shard's record for the manifest."""
    with (
        atomic_path(path) as temporary,
        arrow_file(temporary, "wb") as file,
        pq.ParquetWriter(file, _SCHEMA, compression="zstd") as writer,
    ):
        rows: list[SentenceRow] = []

        def write_rows() -> None:
            columns = [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), _SCHEMA, strict=True)]
            writer.write_table(pa.table(columns, schema=_SCHEMA))
            rows.clear()

        for sentences in documents:
            rows += sentences
            if len(rows) >= _ROW_GROUP:
                write_rows()
        if rows:
            write_rows()
        writer.add_key_value_metadata({name: str(counts[name]) for name in _COUNTS})
    return describe_sentence_shard(path)


def describe_sentence_shard(path: Path) -> dict[str, Any]:
    """The record of an existing shard. Raises InputError if it is damaged."""
    try:
        metadata = pq.read_metadata(arrow_file(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run again.") from None
    counts = {name: int(metadata.metadata[name.encode()]) for name in _COUNTS}
    size = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
    return size | {"n_sentences": metadata.num_rows} | counts


def read_sentence_table(folder: Path | str, columns: list[str]) -> pa.Table:
    """Columns of all shards, sentences in the documents' order. Raises InputError for an incomplete folder."""
    check_complete(folder, SENTENCES_STAGE)
    shards = read_manifest(folder, SENTENCES_STAGE)["shards"]
    files = (arrow_file(Path(folder, shard["file"])) for shard in shards)
    return pa.concat_tables([pq.ParquetFile(file).read(columns=columns) for file in files])


# ---- the reader


def open_arrow(path: Path) -> pa.Table:
    """A memory-mapped Arrow file. Raises pa.ArrowInvalid or OSError."""
    return pa.ipc.open_file(pa.memory_map(os.fsencode(path))).read_all()


class SentenceDataset:
    """Sentences by index, in the order of the published dataset.

    `dataset[i]` is row `order[i]` of the parquet files, with order = numpy.random.default_rng(seed).permutation(n): how
    Hugging Face datasets shuffles, so that a sentence index means the same sentence as in the published files. Texts
    and order come from memory-mapped files that the first reader makes beside the parquet files, checking those against
    the manifest; access takes constant time and memory. `len` is num_samples, or less if there are fewer sentences;
    len(order) counts all of them. Also reads the published dataset: a column `text`, no manifest. Raises InputError.
    """

    def __init__(self, folder: str | Path, num_samples: int | None = None, seed: int = SHUFFLE_SEED):
        self.path = Path(folder)  # a folder, or a single file
        self.manifest, files = _parquet_files(self.path)
        self.folder = self.path.parent if self.path.is_file() else self.path
        stats = [(utf8_name(Path(f.name)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        self.files_sha256: str = describe_files(stats)["listing_sha256"]
        arrow_path, order_path = self.folder / "sentences.arrow", self.folder / f"sentences.order-{seed}.npy"
        table = self._opened(lambda: self._open_arrow(arrow_path), lambda: self._write_arrow(files, arrow_path))
        self.texts: Any = table.column("text")
        self.order: np.ndarray = self._opened(
            lambda: self._open_order(order_path), lambda: self._write_order(seed, order_path)
        )
        self.n = min(num_samples or len(self.texts), len(self.texts))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < self.n:
            raise IndexError(f"sentence {i} of {self.n}")
        return self.texts[int(self.order[i])].as_py()

    def shard_checksums(self) -> list[str]:
        """Checksums of the parquet files; empty for the published dataset, which has no manifest."""
        return [shard["sha256"] for shard in self.manifest.get("shards", [])]

    def documents(self) -> dict[str, Any] | None:
        """The identity of the documents that the sentences are from; None for the published dataset."""
        return self.manifest.get("decides", {}).get("documents")

    def _opened(self, open_file: Callable[[], T | None], make_file: Callable[[], None]) -> T:
        """What open_file returns, after make_file if need be; of several processes only one makes the file."""
        if (found := open_file()) is not None:
            return found
        try:
            lock = open(self.folder / ".reader.lock", "ab")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"The reader cannot write to {self.folder} ({error}); copy it elsewhere.") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (found := open_file()) is None:  # another process may have made it meanwhile
                make_file()
                found = open_file()
        if found is None:
            raise InputError(f"The files of {self.folder} are changing; wait until they are complete, and run again.")
        return found

    def _open_arrow(self, path: Path) -> pa.Table | None:
        """The texts, or None if there is no copy of these files."""
        try:
            table = open_arrow(path)
        except (pa.ArrowInvalid, OSError):
            return None
        return table if table.schema.metadata == {b"of": self.files_sha256.encode()} else None

    def _write_arrow(self, files: list[Path], path: Path) -> None:
        """Copy the column `text` of the files."""
        checksums = {shard["file"]: shard["sha256"] for shard in self.manifest.get("shards", [])}
        schema = pa.schema([("text", pa.large_string())], metadata={"of": self.files_sha256})
        with (
            atomic_path(path) as temporary,
            arrow_file(temporary, "wb") as out,
            pa.ipc.new_file(out, schema) as writer,
        ):
            for file in files:
                if file.name in checksums and sha256(file) != checksums[file.name]:
                    raise InputError(
                        f"{file} does not have the checksum in its manifest; remove {self.folder} and run "
                        f"{SENTENCES_STAGE} again."
                    )
                for batch in iter_parquet(file, 65_536):
                    try:
                        texts = batch.cast(pa.large_string())
                    except pa.ArrowInvalid:  # not UTF-8
                        texts = pa.array(map(as_text, batch.to_pylist()), pa.large_string())
                    writer.write_batch(pa.record_batch([texts], schema=schema))

    def _open_order(self, path: Path) -> np.ndarray | None:
        try:
            order = np.load(path, mmap_mode="r")
        except (OSError, ValueError):
            return None
        return order.view(np.ndarray) if order.shape == (len(self.texts),) else None

    def _write_order(self, seed: int, path: Path) -> None:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.random.default_rng(seed).permutation(len(self.texts)))


def _parquet_files(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """The manifest, empty for the published dataset, and the parquet files in order. Raises InputError."""
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder, SENTENCES_STAGE)
        check_files(folder, manifest["shards"], SENTENCES_STAGE)
        return manifest, [folder / shard["file"] for shard in manifest["shards"]]
    if not folder.exists():
        raise InputError(f"There is nothing at {folder}; run {SENTENCES_STAGE}, or name the folder of its sentences.")
    files = document_files(str(folder))
    if (kind := kind_of(files[0].name)) != "parquet":
        raise InputError(f"{folder} holds {kind} files, not parquet files of sentences; run {SENTENCES_STAGE}.")
    if "gap" in open_parquet(files[0]).schema_arrow.names:
        raise InputError(
            f"{folder} holds sentences of {SENTENCES_STAGE} without their {MANIFEST}; remove it and "
            f"run {SENTENCES_STAGE} again."
        )
    return {}, files
