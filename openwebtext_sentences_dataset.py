"""Split documents into sentences, and read the result by index.

Reads   INPUT_PATH: documents in parquet (a column `text`), jsonl, jsonl.gz or jsonl.zst (a string "text" on each line)
        or txt (each file a document): a file, a folder, or a dataset of the Hugging Face hub, OWNER/NAME or
        OWNER/NAME/FOLDER, whose files are fetched to the hub's cache (HF_HOME)
Writes  OUTPUT_DIR/sentences-*.parquet (text, doc_idx, start, gap), punkt.json, manifest.json; the reader adds
        sentences.arrow and the order of a seed
Method  NLTK Punkt (Kiss and Strunk 2006, Computational Linguistics 32:4); spans untouched, so that texts and
        gaps joined give every document back; bytes that are not UTF-8 become U+FFFD
Cost    about 3 MB of text a second and process; disk 0.6 of the text, and once more the text for the reader

    python openwebtext_sentences_dataset.py --input_path Skylion007/openwebtext --output_dir data/sentences
    python openwebtext_sentences_dataset.py --input_path data/documents --output_dir data/sentences

The reader: `SentenceDataset(folder)[i]` is sentence i in the seeded order of the published dataset.
"""

import codecs
import collections
import contextlib
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import re
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import stage

INPUT_PATH: str  # documents: a file or folder of parquet, jsonl(.gz, .zst) or txt, or a dataset id of the hub
OUTPUT_DIR = "data/sentences"  # folder for the sentences
PUNKT = "english"  # "english": NLTK's pre-trained model, else as "corpus": trained on the documents themselves
PUNKT_TRAIN_MB = 50.0  # MB of documents to train Punkt on: the first ones
SHARD_MB = 64.0  # MB of document text a shard
NUM_PROCESSES = 0  # processes that split; 0 for one a core

_SHUFFLE_SEED = 42  # of the published order; the reader's default
_STAGE = "openwebtext_sentences_dataset.py"
_KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".jsonl.zst": "jsonl", ".txt": "txt"}
_ENDINGS = ", ".join(_KINDS)
_TEXT_BYTES_PER_S = 3e6  # one process, as measured; for the estimate before the start
_ROW_GROUP = 2**16  # sentences; a worker holds no more as Python objects


# ---- finding documents


class Documents(NamedTuple):
    """Where the documents are."""

    files: list[Path]  # in order, all of one kind
    identity: dict[str, Any]  # what the manifest keeps of them, and compares when a run continues


def kind_of(name: str) -> str | None:
    """parquet, jsonl or txt, by the ending of a file's name; None for other files and hidden ones."""
    if any(part.startswith(".") for part in name.split("/")):
        return None
    return next((kind for ending, kind in _KINDS.items() if name.lower().endswith(ending)), None)


def document_files(input_path: str) -> list[Path]:
    """The file, or those of a folder and its subfolders in order of name. Raises InputError where there is none."""
    path = Path(input_path)
    if not path.exists():
        raise stage.InputError(
            f"There is nothing at {input_path}; name a file or folder of documents, or a dataset id OWNER/NAME."
        )
    if path.is_file():
        if not kind_of(path.name):
            raise stage.InputError(f"{input_path} has an unknown ending; documents come as {_ENDINGS}.")
        return [path]
    names = sorted(file.relative_to(path).as_posix() for file in files_below(path))
    kinds = {kind for name in names if (kind := kind_of(name))}
    if not kinds:
        raise stage.InputError(f"{input_path} holds no documents ({_ENDINGS}); name another folder.")
    if len(kinds) > 1:
        raise stage.InputError(f"{input_path} holds {' and '.join(sorted(kinds))} files; name a folder of one kind.")
    return [path / name for name in names if kind_of(name)]


def files_below(folder: Path) -> Iterator[Path]:
    """Every file in a folder and its subfolders, through links too; InputError for what cannot be looked into."""

    def refuse(error: OSError) -> None:
        raise stage.InputError(f"{error.filename} cannot be read ({error.strerror}); mend or remove it.")

    seen = set()
    for where, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if (real := os.path.realpath(where)) in seen:  # a link to a folder above, or two ways to one
            subfolders.clear()
            continue
        seen.add(real)
        for path in (Path(where) / name for name in names):
            if kind_of(path.name) and not path.exists():
                raise stage.InputError(f"{path} points to nothing; mend or remove it.")
            yield path


def find_documents(input_path: str, output_dir: Path) -> Documents:
    """Local documents, or those of a dataset of the hub once they are in its cache. Raises InputError."""
    if not Path(input_path).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w./-]+)?", input_path):
        return fetch_dataset(input_path, output_dir)
    files = document_files(input_path)
    root = Path(input_path) if Path(input_path).is_dir() else Path(input_path).parent
    stats = [(f.relative_to(root).as_posix(), f.stat()) for f in files]
    return Documents(files, describe_files([(name, s.st_size, s.st_mtime_ns) for name, s in stats]))


def describe_files(listing: list[tuple]) -> dict[str, Any]:
    """A dataset may have millions of files: their names, sizes and, of local ones, times of change, as a checksum."""
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return {"files": len(listing), "bytes": sum(size for _, size, *_ in listing), "listing_sha256": digest}


# ---- a dataset of the Hugging Face hub


def fetch_dataset(input_path: str, output_dir: Path) -> Documents:
    """Fetch a dataset's documents to the hub's cache, one file after the other; what is there is not fetched again.

    A folder that was begun goes on with the commit it was begun with. Raises InputError.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError  # the base of every error of its client, of connections too

    from fetch_model import explain, is_whole

    owner, name, *rest = input_path.strip("/").split("/")
    repo, folder = f"{owner}/{name}", "/".join(rest)
    revision = None
    if (output_dir / stage.MANIFEST).exists():
        begun = stage.read_json(output_dir / stage.MANIFEST, "remove the folder or name another.")
        documents = begun.get("decides", {}).get("documents", {})
        revision = documents.get("revision") if documents.get("dataset") == repo else None
    try:
        revision, files = list_dataset(repo, folder, revision)
        at = {"repo_id": repo, "repo_type": "dataset", "revision": revision}
        cached = [try_to_load_from_cache(filename=file["source"], **at) for file in files]
        missing = sum(file["bytes"] for file, path in zip(files, cached, strict=True) if not isinstance(path, str))
        print(
            f"Fetching {repo} at {revision}: {len(files)} files, {stage.gb(sum(f['bytes'] for f in files))}, "
            f"{stage.gb(missing)} of it not yet in the cache.",
            flush=True,
        )
        from huggingface_hub.constants import HF_HUB_CACHE

        stage.require_disk(HF_HUB_CACHE, missing)
        paths = []
        for file, path in zip(files, cached, strict=True):
            if not isinstance(path, str):
                path = hf_hub_download(filename=file["source"], tqdm_class=stage.progress, **at)
                if not is_whole(Path(path), file):
                    os.unlink(os.path.realpath(path))
                    os.unlink(path)
                    raise stage.InputError(f"{file['source']} of {repo} arrived damaged and was removed; run again.")
            paths.append(Path(path))
    except (HTTPError, OSError) as error:
        why = explain(error, f"datasets/{repo}")
        raise stage.InputError(f"There is nothing at {input_path} here, and as a dataset of the hub: {why}") from error
    listing = describe_files([(file["source"], file["bytes"]) for file in files])
    return Documents(paths, {"dataset": repo, "revision": revision} | listing)


def list_dataset(repo: str, folder: str, revision: str | None) -> tuple[str, list[dict[str, Any]]]:
    """The commit of `revision` (None: the newest) and its files of documents (source, bytes, checksum), in order.

    Parquet is preferred to jsonl, jsonl to txt. A dataset that is none of them may have a conversion to parquet, which
    the hub makes and keeps beside the newest commit. Raises InputError.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        for tried in [revision] if revision else [None, "refs/convert/parquet"]:
            try:
                info = HfApi().dataset_info(repo, revision=tried, files_metadata=True, timeout=30)
            except RevisionNotFoundError:
                if revision:
                    raise
                break
            names = [s.rfilename for s in info.siblings if s.rfilename.startswith(f"{folder}/" if folder else "")]
            for kind in ("parquet", "jsonl", "txt"):
                if any(kind_of(name) == kind for name in names):
                    files = [
                        {
                            "source": found.rfilename,
                            "bytes": found.lfs.size if found.lfs else found.size,
                            **({"sha256": found.lfs.sha256} if found.lfs else {"git_sha1": found.blob_id}),
                        }
                        for found in sorted(info.siblings, key=lambda found: found.rfilename)
                        if found.rfilename in names and kind_of(found.rfilename) == kind
                    ]
                    return info.sha, files
    except (json.JSONDecodeError, KeyError, TypeError):
        raise stage.InputError(
            f"{constants.ENDPOINT} does not answer as the Hugging Face hub does; check HF_ENDPOINT and the network."
        ) from None
    where = f"folder {folder} of the dataset {repo}" if folder else f"dataset {repo}"
    raise stage.InputError(f"The {where} holds no documents ({_ENDINGS}); name another.")


# ---- reading documents


def open_parquet(path: Path) -> Any:
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
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if not any(is_text(types["text"]) for is_text in texts):
        raise stage.InputError(f"The column `text` of {path} holds {types['text']}, not text; name other files.")
    return file


def iter_parquet(path: Path, batch_size: int) -> Iterator[Any]:
    """The column `text` in batches, as bytes (Arrow large_binary, nulls as empty)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        for batch in open_parquet(path).iter_batches(batch_size=batch_size, columns=["text"]):
            yield pc.fill_null(batch.column(0).cast(pa.large_binary()), b"")
    except (pa.ArrowInvalid, OSError) as error:
        raise stage.InputError(f"{path} is damaged ({error}); fetch it again.") from None


def iter_jsonl(path: Path) -> Iterator[bytes]:
    """The "text" of each line, null as empty. Lone surrogates that a line may hold become bytes that are not UTF-8."""
    import pyarrow as pa

    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    try:
        with pa.input_stream(str(path), compression=compression) as stream:
            for number, line in enumerate(io.BufferedReader(stream, 2**20), 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.decode(errors="surrogateescape"))
                except (ValueError, RecursionError) as error:
                    raise stage.InputError(f"Line {number} of {path} is not JSON ({error}); mend it.") from None
                text = value.get("text", 0) if isinstance(value, dict) else 0
                if not isinstance(text, str | None):
                    raise stage.InputError(f'Line {number} of {path} is not an object with a string "text"; mend it.')
                try:
                    yield (text or "").encode(errors="surrogateescape")
                except UnicodeEncodeError:
                    yield text.encode(errors="surrogatepass")
    except (pa.ArrowInvalid, OSError) as error:
        raise stage.InputError(f"{path} is damaged ({error}); fetch it again.") from None


def iter_documents(files: list[Path]) -> Iterator[bytes]:
    """Every document in order, in UTF-8 as far as it is valid. Raises InputError."""
    for path in files:
        match kind_of(path.name):
            case "parquet":
                for batch in iter_parquet(path, 64):  # a document may have megabytes
                    yield from batch.to_pylist()
            case "jsonl":
                yield from iter_jsonl(path)
            case "txt":
                try:
                    yield path.read_bytes()
                except OSError as error:
                    raise stage.InputError(f"{path} cannot be read ({error}); mend or remove it.") from None


def as_text(document: bytes) -> str:
    return document.decode(errors="replace")


def count_documents(files: list[Path]) -> tuple[int, int]:
    """Read files to their end: (documents, bytes of text). Runs in a worker process. Raises InputError."""
    documents = n_bytes = 0
    for document in iter_documents(files):
        documents += 1
        n_bytes += len(document)
    return documents, n_bytes


def check_documents(workers: stage.Workers, files: list[Path]) -> tuple[int, int]:
    """(documents, bytes of text) of all files. It costs a hundredth of the splitting; a bad line 10 hours later more.

    Raises InputError.
    """
    a_job = 1000 if kind_of(files[0].name) == "txt" else 1
    jobs = ((files[i : i + a_job],) for i in range(0, len(files), a_job))
    documents = n_bytes = 0
    with stage.progress(total=len(files), unit="file", desc="checking documents") as bar:
        for n, size in workers.map(count_documents, jobs):
            documents, n_bytes = documents + n, n_bytes + size
            bar.update(min(a_job, len(files) - bar.n))
    return documents, n_bytes


# ---- Punkt


def load_punkt(kind: str, files: list[Path], train_mb: float) -> tuple[dict[str, Any], str]:
    """Punkt's parameters as plain lists, and where they come from."""
    if kind == "english" and (params := _pretrained_english()) is not None:
        return _to_json(params), "NLTK's pre-trained English model (punkt_tab)"
    left = int(train_mb * 1e6)
    sample: list[str] = []
    for document in iter_documents(files):
        if left <= 0:
            break
        sample.append(as_text(document)[:left])
        left -= len(sample[-1])
    import_punkt()
    from nltk.tokenize.punkt import PunktTrainer

    trainer = PunktTrainer()
    trainer.INCLUDE_ALL_COLLOCS = True
    with stage.progress(total=sum(map(len, sample)), unit="B", unit_scale=True, desc="training Punkt") as bar:
        for text in sample:
            trainer.train(text, finalize=False)
            bar.update(len(text))
    return _to_json(trainer.get_params()), f"trained on up to {train_mb:g} MB of the documents"


def import_punkt() -> None:
    """Lift NLTK's limit of 5 s on a search: it counts all the time spent on a document, so that a long one fails."""
    from nltk import redos

    redos.DEFAULT_TIMEOUT = None


def _pretrained_english():
    """NLTK's parameters for English, fetched if need be; None where there are none. NLTK's own complaints are not
    shown: what is used instead is printed and written to the manifest."""
    import nltk
    from nltk.tokenize.punkt import PunktTokenizer

    timeout = socket.getdefaulttimeout()
    for fetch in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if fetch:
                    socket.setdefaulttimeout(20)
                    nltk.download("punkt_tab", quiet=True, print_error_to=io.StringIO())
                return PunktTokenizer("english")._params
            except (LookupError, OSError, ValueError):
                pass
            finally:
                socket.setdefaulttimeout(timeout)
    print("NLTK's English Punkt is not here and cannot be fetched; Punkt is trained on the documents.", flush=True)
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
    import_punkt()
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    params = PunktParameters()
    params.abbrev_types = set(fields["abbrev_types"])
    params.collocations = set(map(tuple, fields["collocations"]))
    params.sent_starters = set(fields["sent_starters"])
    params.ortho_context = collections.defaultdict(int, fields["ortho_context"])
    splitter = PunktSentenceTokenizer()
    splitter._params = params
    # It looks at the word before a full stop and the one behind it; every second or fourth pair came before. 15 to 35 %
    # of the time.
    splitter.text_contains_sentbreak = functools.lru_cache(2**15)(splitter.text_contains_sentbreak)
    return splitter


# ---- splitting


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


def shard_jobs(files: list[Path], folder: Path, shard_bytes: int) -> Iterator[tuple[Path, int, list[bytes]]]:
    """(its file, index of the first document, documents) of each shard: whole documents, the fewest that reach
    shard_bytes. Depends on the documents and shard_bytes alone. A shard that is there already comes without them."""
    first, documents, size = 0, [], 0
    paths = (folder / f"sentences-{number:05d}.parquet" for number in itertools.count())
    for document in iter_documents(files):
        documents.append(document)
        size += len(document)
        if size >= shard_bytes:
            path = next(paths)
            yield path, first, [] if path.exists() else documents
            first, documents, size = first + len(documents), [], 0
    if documents:
        path = next(paths)
        yield path, first, [] if path.exists() else documents


@functools.cache
def read_splitter(path: Path, modified_ns: int):
    """The splitter of a punkt.json, made once in a process; modified_ns tells another file at the same place."""
    return make_splitter(json.loads(path.read_text()))


def write_shard(path: Path, first_doc_idx: int, documents: list[bytes]) -> dict:
    """Split a shard's documents and write them, unless done; runs in a worker process. Returns the shard's record."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.exists():
        return describe_shard(path)
    punkt_path = path.parent / "punkt.json"
    splitter = read_splitter(punkt_path, punkt_path.stat().st_mtime_ns)
    schema = pa.schema(
        {"text": pa.large_string(), "doc_idx": pa.int64(), "start": pa.int64(), "gap": pa.large_string()}
    )
    invalid = 0
    with stage.atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        rows: list[tuple[str, int, int, str]] = []
        for doc_idx, document in enumerate(documents, first_doc_idx):
            text = as_text(document)
            invalid += text.encode() != document
            rows += [(sentence, doc_idx, start, gap) for sentence, start, gap in split_document(splitter, text)]
            if len(rows) >= _ROW_GROUP or doc_idx == first_doc_idx + len(documents) - 1:
                columns = [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), schema, strict=True)]
                writer.write_table(pa.table(columns, schema=schema))
                rows.clear()
        counts = {"n_docs": len(documents), "n_invalid_utf8": invalid, "text_bytes": sum(map(len, documents))}
        writer.add_key_value_metadata({name: str(n) for name, n in counts.items()})
    return describe_shard(path)


def describe_shard(path: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise stage.InputError(f"{path} is damaged ({error}); delete it and run again.") from None
    counts = {name: int(metadata.metadata[name.encode()]) for name in ("n_docs", "n_invalid_utf8", "text_bytes")}
    size = {"file": path.name, "bytes": path.stat().st_size, "sha256": stage.sha256(path)}
    return size | {"n_sentences": metadata.num_rows} | counts


# ---- the reader


class SentenceDataset:
    """Sentences by index, in the order of the published dataset.

    `dataset[i]` is row `order[i]` of the parquet files, with order = numpy.random.default_rng(seed).permutation(n): how
    Hugging Face datasets shuffles, so that a sentence index means the same sentence as in the published files. Texts
    and order come from memory-mapped files that the first reader makes beside the parquet files, checking those against
    the manifest; access takes constant time and memory. `len` is num_samples, or less where there are fewer sentences;
    len(order) is all of them. Also reads the published dataset: a column `text` and no manifest. Raises InputError.
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
            if (kind := kind_of(files[0].name)) != "parquet":
                raise stage.InputError(f"{folder} holds {kind} files, not parquet files of sentences; run {_STAGE}.")
            if "gap" in open_parquet(files[0]).schema_arrow.names:
                raise stage.InputError(
                    f"{folder} holds sentences of {_STAGE} without their {stage.MANIFEST}; remove it and run {_STAGE} "
                    "again."
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
                    with stage.atomic_path(order_path) as temporary, open(temporary, "wb") as file:
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
            raise stage.InputError(f"The reader cannot write to {self.folder} ({error}); copy it elsewhere.") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @staticmethod
    def _open_arrow(path: Path, of: bytes) -> Any:
        """The table, or None where there is none of these files."""
        import pyarrow as pa

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
        import pyarrow as pa

        checksums = {shard["file"]: shard["sha256"] for shard in self.manifest.get("shards", [])}
        schema = pa.schema([("text", pa.large_string())], metadata={"of": of})
        with stage.atomic_path(arrow_path) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
            for path in files:
                if path.name in checksums and stage.sha256(path) != checksums[path.name]:
                    raise stage.InputError(
                        f"{path} is not what its manifest says (checksum); remove {self.folder} and run {_STAGE} again."
                    )
                for batch in iter_parquet(path, 65_536):
                    try:
                        texts = batch.cast(pa.large_string())
                    except pa.ArrowInvalid:  # not UTF-8
                        texts = pa.array(map(as_text, batch.to_pylist()), pa.large_string())
                    writer.write_batch(pa.record_batch([texts], schema=schema))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < self.n:
            raise IndexError(f"sentence {i} of {self.n}")
        return self.texts[int(self.order[i])].as_py()


# ---- main


def main() -> None:
    config = stage.parse_constants(globals())
    folder = Path(config.output_dir)
    if config.punkt not in ("english", "corpus"):
        raise stage.InputError(f"--punkt {config.punkt} is unknown; write english or corpus.")
    if config.shard_mb <= 0 or config.punkt_train_mb <= 0:
        raise stage.InputError("--shard_mb and --punkt_train_mb must be above 0.")
    documents = find_documents(config.input_path, folder)
    files, n_workers = documents.files, config.num_processes or os.cpu_count() or 1
    decides = {
        "documents": documents.identity,
        "punkt": config.punkt,
        "punkt_train_mb": config.punkt_train_mb,
        "shard_mb": config.shard_mb,
    }
    print(
        f"Reading {len(files)} files of documents, {stage.gb(documents.identity['bytes'])}, from {config.input_path}; "
        f"writing to {folder}.",
        flush=True,
    )
    if (folder / stage.MANIFEST).exists() and stage.begin_or_continue(folder, _STAGE, decides):
        stage.check_complete(folder, _STAGE)
        print(f"{folder} is complete already.")
        return
    with stage.Workers(n_workers) as workers:
        n_docs, n_bytes = check_documents(workers, files)
        print(
            f"{n_docs:,} documents, {stage.gb(n_bytes)} of text: about {stage.gb(0.6 * n_bytes)} of sentences in "
            f"{stage.duration(n_bytes / n_workers / _TEXT_BYTES_PER_S)}; the reader will copy the text once more.",
            flush=True,
        )
        with stage.locked(folder):
            if stage.begin_or_continue(folder, _STAGE, decides):
                return
            done = sum(path.stat().st_size for path in folder.glob("sentences-*.parquet"))
            stage.require_disk(folder, 1.6 * n_bytes - done)
            if not (folder / "punkt.json").exists():
                params, origin = load_punkt(config.punkt, files, config.punkt_train_mb)
                stage.write_json(folder / "punkt.json", {"origin": origin, **params})
            punkt_origin = json.loads((folder / "punkt.json").read_text())["origin"]
            print(f"Punkt: {punkt_origin}.", flush=True)

            shards = []
            jobs = shard_jobs(files, folder, int(config.shard_mb * 1e6))
            with stage.progress(total=n_bytes, unit="B", unit_scale=True, desc="sentences") as bar:
                for record in workers.map(write_shard, jobs):
                    shards.append(record)
                    bar.set_postfix(sentences=sum(shard["n_sentences"] for shard in shards), refresh=False)
                    bar.update(record["text_bytes"])
            counts = {
                name: sum(shard[f"n_{name}"] for shard in shards) for name in ("sentences", "docs", "invalid_utf8")
            }
            stage.write_manifest(
                folder,
                _STAGE,
                complete=True,
                decides=decides,
                config=vars(config),
                punkt_origin=punkt_origin,
                counts=counts,
                shards=shards,
            )
    print(f"{counts['sentences']:,} sentences of {counts['docs']:,} documents: {folder}")


if __name__ == "__main__":
    stage.run(main)
