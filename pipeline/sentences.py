"""Sentences by index: what openwebtext_sentences_dataset.py writes, or the published dataset."""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.documents import as_text, describe_files, document_files, iter_parquet, kind_of, open_parquet
from pipeline.errors import InputError
from pipeline.files import atomic_path, sha256
from pipeline.manifests import MANIFEST, check_files, read_manifest

SENTENCES_STAGE = "openwebtext_sentences_dataset.py"
SHUFFLE_SEED = 42  # of the published order; the reader's default


class SentenceDataset:
    """Sentences by index, in the order of the published dataset.

    `dataset[i]` is row `order[i]` of the parquet files, with order = numpy.random.default_rng(seed).permutation(n): how
    Hugging Face datasets shuffles, so that a sentence index means the same sentence as in the published files. Texts
    and order come from memory-mapped files that the first reader makes beside the parquet files, checking those against
    the manifest; access takes constant time and memory. `len` is num_samples, or less where there are fewer sentences;
    len(order) is all of them. Also reads the published dataset: a column `text` and no manifest. Raises InputError.
    """

    def __init__(self, folder: str | Path, num_samples: int | None = None, seed: int = SHUFFLE_SEED):
        self.folder = Path(folder)
        if (self.folder / MANIFEST).exists():
            self.manifest = read_manifest(self.folder, SENTENCES_STAGE)
            check_files(self.folder, self.manifest["shards"], SENTENCES_STAGE)
            files = [self.folder / shard["file"] for shard in self.manifest["shards"]]
        else:
            self.manifest = {}
            files = document_files(str(folder))
            if (kind := kind_of(files[0].name)) != "parquet":
                raise InputError(f"{folder} holds {kind} files, not parquet files of sentences; run {SENTENCES_STAGE}.")
            if "gap" in open_parquet(files[0]).schema_arrow.names:
                raise InputError(
                    f"{folder} holds sentences of {SENTENCES_STAGE} without their {MANIFEST}; remove it and "
                    f"run {SENTENCES_STAGE} again."
                )
            if self.folder.is_file():
                self.folder = self.folder.parent
        arrow_path = self.folder / "sentences.arrow"
        order_path = self.folder / f"sentences.order-{seed}.npy"
        of = json.dumps([[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]).encode()
        stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        self.files_sha256 = describe_files(stats)["listing_sha256"]
        if (table := self._open_arrow(arrow_path, of)) is None:
            with self._one_maker():
                if (table := self._open_arrow(arrow_path, of)) is None:  # another process may have made it meanwhile
                    self._write_arrow(files, arrow_path, of)
                    table = self._open_arrow(arrow_path, of)
        self.texts = table.column("text")
        if (order := self._open_order(order_path)) is None:
            with self._one_maker():
                if (order := self._open_order(order_path)) is None:
                    with atomic_path(order_path) as temporary, open(temporary, "wb") as file:
                        np.save(file, np.random.default_rng(seed).permutation(len(self.texts)))
                    order = self._open_order(order_path)
        self.order = order
        self.n = min(num_samples or len(self.texts), len(self.texts))

    @contextlib.contextmanager
    def _one_maker(self) -> Iterator[None]:
        """Other processes of a torchrun wait here while one makes the files."""
        try:
            lock = open(self.folder / ".reader.lock", "a")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"The reader cannot write to {self.folder} ({error}); copy it elsewhere.") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @staticmethod
    def _open_arrow(path: Path, of: bytes) -> Any:
        """The table, or None where there is none of these files."""

        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (pa.ArrowInvalid, OSError):
            return None
        return table if table.schema.metadata == {b"of": of} else None

    def _open_order(self, path: Path) -> np.ndarray | None:
        try:
            order = np.load(path, mmap_mode="r")
        except (OSError, ValueError):
            return None
        return order.view(np.ndarray) if order.shape == (len(self.texts),) else None

    def _write_arrow(self, files: list[Path], arrow_path: Path, of: bytes) -> None:
        """Copy the column `text` of the files; `of` says which files, and is compared when the copy is opened."""

        checksums = {shard["file"]: shard["sha256"] for shard in self.manifest.get("shards", [])}
        schema = pa.schema([("text", pa.large_string())], metadata={"of": of})
        with atomic_path(arrow_path) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
            for path in files:
                if path.name in checksums and sha256(path) != checksums[path.name]:
                    raise InputError(
                        f"{path} is not what its manifest says (checksum); remove {self.folder} and run "
                        f"{SENTENCES_STAGE} again."
                    )
                for batch in iter_parquet(path, 65_536):
                    try:
                        texts = batch.cast(pa.large_string())
                    except pa.ArrowInvalid:  # not UTF-8
                        texts = pa.array(map(as_text, batch.to_pylist()), pa.large_string())
                    writer.write_batch(pa.record_batch([texts], schema=schema))

    def shard_checksums(self) -> list[str]:
        """Checksums of the parquet files; empty for the published dataset, which has no manifest."""
        return [shard["sha256"] for shard in self.manifest.get("shards", [])]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < self.n:
            raise IndexError(f"sentence {i} of {self.n}")
        return self.texts[int(self.order[i])].as_py()
