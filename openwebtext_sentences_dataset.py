"""Split documents into sentences.

Reads   INPUT_PATH: documents in parquet (a column `text`), jsonl, jsonl.gz or jsonl.zst (a string "text" on each line)
        or txt (each file a document): a file, a folder, or a dataset of the Hugging Face hub, OWNER/NAME or
        OWNER/NAME/FOLDER, whose files are fetched into the hub's cache (HF_HOME). Of dialogues (`messages` instead of
        `text`, as sample_dialogues.py writes them) it splits what the assistant says
Writes  OUTPUT_DIR/sentences-*.parquet (text, doc_idx, start, gap), punkt.json, manifest.json; the reader
        (pipeline/sentences.py) adds sentences.arrow and the order of a seed
Method  NLTK Punkt (Kiss and Strunk 2006, Computational Linguistics 32:4); spans untouched, so that joining texts and
        gaps restores every document; bytes that are not UTF-8 become U+FFFD
Cost    about 3 MB of text per second and process; disk: 0.6 x the text, and another copy of the text for the reader

    python openwebtext_sentences_dataset.py --input_path Skylion007/openwebtext --output_dir data/sentences
    python openwebtext_sentences_dataset.py --input_path data/documents --output_dir data/sentences
"""

import collections
import functools
import io
import itertools
import json
import os
import re
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from pipeline.documents import ENDINGS, as_text, describe_files, document_files, iter_documents, kind_of, local_identity
from pipeline.errors import InputError, Stop
from pipeline.files import read_json, require_disk, require_writable, write_json
from pipeline.hub import answers_of_a_hub, connection_errors, describe_file, explain, is_whole
from pipeline.manifests import MANIFEST, complete_already, output_folder, write_manifest
from pipeline.options import CountOrZero, Size, parse_constants
from pipeline.progress import duration, gb, progress_bar
from pipeline.run import run
from pipeline.sentences import SENTENCES_STAGE, describe_sentence_shard, write_sentence_shard
from pipeline.workers import Workers

INPUT_PATH: str  # documents: a file or folder of parquet, jsonl(.gz, .zst) or txt, or a dataset id of the hub
OUTPUT_DIR = "data/sentences"  # folder for the sentences
PUNKT: Literal["english", "corpus"] = "english"  # NLTK's English model, or one trained on the documents
PUNKT_TRAIN_MB: Size = 50.0  # MB of documents to train Punkt on, from the first on
SHARD_MB: Size = 64.0  # MB of document text per shard
NUM_PROCESSES: CountOrZero = 0  # processes that split; 0 for one per core

_TEXT_BYTES_PER_S = 3e6  # measured, for one process; used to estimate the time


# ---- finding documents


class Documents(NamedTuple):
    """Where the documents are."""

    files: list[Path]  # in order, all of one kind
    identity: dict[str, Any]  # recorded in the manifest, and compared when a run continues


def find_documents(input_path: str, output_dir: Path) -> Documents:
    """Local documents, or those of a hub dataset, fetched into the cache. Raises InputError."""
    if not Path(input_path).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w./-]+)?", input_path):
        return fetch_dataset(input_path, output_dir)
    files = document_files(input_path)
    return Documents(files, local_identity(input_path, files))


# ---- a dataset of the Hugging Face hub


def fetch_dataset(input_path: str, output_dir: Path) -> Documents:
    """Fetch a dataset's documents into the hub's cache, one file after the other, except those already there.

    A folder begun earlier keeps the commit it was begun with. Raises InputError, or Stop.
    """
    owner, name, *rest = input_path.strip("/").split("/")
    repo = f"{owner}/{name}"
    try:
        revision, files = list_dataset(repo, "/".join(rest), begun_revision(output_dir, repo))
        paths = fetch_files(repo, revision, files)
    except (connection_errors(), OSError) as error:
        why = explain(error, f"datasets/{repo}")
        raise type(why)(f"There is no local {input_path}, and as a dataset of the hub: {why}") from error
    listing = describe_files([(file["source"], file["bytes"]) for file in files])
    return Documents(paths, {"dataset": repo, "revision": revision} | listing)


def begun_revision(output_dir: Path, repo: str) -> str | None:
    """The commit of this dataset that the folder was begun with, if any."""
    if not (output_dir / MANIFEST).exists():
        return None
    begun = read_json(output_dir / MANIFEST, "remove the folder or name another.")
    documents = begun.get("decides", {}).get("documents", {})
    return documents.get("revision") if documents.get("dataset") == repo else None


def list_dataset(repo: str, folder: str, revision: str | None) -> tuple[str, list[dict[str, Any]]]:
    """The commit of `revision` (None: the newest) and its document files (`describe_file`), in order.

    Parquet is preferred to jsonl, jsonl to txt. A dataset with none of these may have a parquet conversion, which the
    hub makes and keeps beside the newest commit. Raises InputError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    with answers_of_a_hub():
        for tried in [revision] if revision else [None, "refs/convert/parquet"]:
            try:
                info: Any = HfApi().dataset_info(repo, revision=tried, files_metadata=True, timeout=30)
            except RevisionNotFoundError:
                if revision:
                    raise
                break
            inside = [file for file in info.siblings if file.rfilename.startswith(f"{folder}/" if folder else "")]
            inside.sort(key=lambda file: file.rfilename)
            for kind in ("parquet", "jsonl", "txt"):
                if files := [describe_file(file) for file in inside if kind_of(file.rfilename) == kind]:
                    return info.sha, files
    where = f"folder {folder} of the dataset {repo}" if folder else f"dataset {repo}"
    raise InputError(f"The {where} holds no documents ({ENDINGS}); name another.")


def fetch_files(repo: str, revision: str, files: list[dict[str, Any]]) -> list[Path]:
    """Fetch the files that are not yet in the hub's cache; returns all paths. Raises Stop for a damaged file."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = [try_to_load_from_cache(repo, file["source"], revision=revision, repo_type="dataset") for file in files]
    missing = sum(file["bytes"] for file, path in zip(files, cached, strict=True) if not isinstance(path, str))
    print(
        f"Fetching {repo} at {revision}: {len(files)} files, {gb(sum(f['bytes'] for f in files))}, "
        f"{gb(missing)} of it not yet in the cache.",
        flush=True,
    )
    require_disk(HF_HUB_CACHE, missing)
    paths = []
    for file, path in zip(files, cached, strict=True):
        if not isinstance(path, str):
            path = hf_hub_download(
                repo, file["source"], repo_type="dataset", revision=revision, tqdm_class=cast(Any, progress_bar)
            )
            if not is_whole(Path(path), file):
                os.unlink(os.path.realpath(path))
                os.unlink(path)
                raise Stop(f"{file['source']} of {repo} arrived damaged and was removed; run again.")
        paths.append(Path(path))
    return paths


# ---- reading documents


def count_documents(files: list[Path]) -> tuple[int, int, bool]:
    """Read files to their end: (documents, bytes of text, whether there is more than blanks). Runs in a worker process.

    Raises InputError.
    """
    documents, n_bytes, any_text = 0, 0, False
    for document in iter_documents(files):
        documents += 1
        n_bytes += len(document)
        any_text = any_text or bool(as_text(document).strip())
    return documents, n_bytes, any_text


def check_documents(workers: Workers, files: list[Path]) -> tuple[int, int]:
    """(documents, bytes of text) of all files. Raises InputError for a bad one, now instead of ten hours later, and
    where there is no text in any.

    It takes a hundredth of the time of the splitting.
    """
    files_per_job = 1000 if kind_of(files[0].name) == "txt" else 1
    jobs = ((files[i : i + files_per_job],) for i in range(0, len(files), files_per_job))
    documents, n_bytes, any_text = 0, 0, False
    with progress_bar(total=len(files), unit="file", desc="checking documents") as bar:
        for n, size, text in workers.map(count_documents, jobs):
            documents, n_bytes, any_text = documents + n, n_bytes + size, any_text or text
            bar.update(min(files_per_job, len(files) - bar.n))
    if not any_text:
        where = f"{files[0]}" if len(files) == 1 else f"the {len(files)} files from {files[0]} on"
        raise InputError(f"There is no text in {where} ({documents:,} documents); give other documents.")
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
    lift_time_limit()
    from nltk.tokenize.punkt import PunktTrainer

    trainer = PunktTrainer()
    trainer.INCLUDE_ALL_COLLOCS = True  # pyright: ignore[reportAttributeAccessIssue] # its default says False
    with progress_bar(total=sum(map(len, sample)), unit="B", unit_scale=True, desc="training Punkt") as bar:
        for text in sample:
            trainer.train(text, finalize=False)
            bar.update(len(text))
    return _to_json(trainer.get_params()), f"trained on up to {train_mb:g} MB of the documents"


def lift_time_limit() -> None:
    """Lift NLTK's limit of 5 s on a search: it counts all the time spent on a document, so long ones fail."""
    from nltk import redos

    redos.DEFAULT_TIMEOUT = None


def _pretrained_english() -> Any:
    """NLTK's parameters for English, fetched if need be; None if they cannot be had. NLTK's own complaints are hidden:
    the fallback is printed and recorded in the manifest."""
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
    print("NLTK's English Punkt is not here and cannot be fetched; training Punkt on the documents.", flush=True)
    return None


def _to_json(params: Any) -> dict[str, Any]:
    return {
        "abbrev_types": sorted(params.abbrev_types),
        "collocations": sorted(map(list, params.collocations)),
        "sent_starters": sorted(params.sent_starters),
        "ortho_context": dict(sorted(params.ortho_context.items())),
    }


def make_splitter(fields: dict[str, Any]) -> Any:
    """A Punkt sentence tokenizer with the parameters of punkt.json."""
    lift_time_limit()
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    params = PunktParameters()
    params.abbrev_types = set(fields["abbrev_types"])
    params.collocations = set(map(tuple, fields["collocations"]))
    params.sent_starters = set(fields["sent_starters"])
    params.ortho_context = collections.defaultdict(int, fields["ortho_context"])
    splitter = PunktSentenceTokenizer()
    splitter._params = params
    # It looks at the words before and after a full stop. Half to three quarters of the pairs are new; caching the rest
    # saves 15 to 35 % of the time.
    splitter.text_contains_sentbreak = functools.lru_cache(2**15)(splitter.text_contains_sentbreak)
    return splitter


# ---- splitting


def split_document(splitter: Any, text: str) -> list[tuple[str, int, str]]:
    """(sentence, start, gap) in order; joined, sentences and gaps are the document. Without text: one empty row."""
    spans = [(start, end) for start, end in splitter.span_tokenize(text) if end > start]
    if not spans:
        return [("", 0, text)]
    spans[0] = (0, spans[0][1])
    ends = [start for start, _ in spans[1:]] + [len(text)]
    return [
        (text[start:end], start, text[end:next_start]) for (start, end), next_start in zip(spans, ends, strict=True)
    ]


def shard_jobs(files: list[Path], folder: Path, shard_bytes: int) -> Iterator[tuple[Path, int, list[bytes]]]:
    """(path, index of the first document, documents) of each shard: the fewest whole documents that reach shard_bytes.
    Depends on the documents and shard_bytes alone. A shard that exists comes without its documents."""
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
def read_splitter(path: Path, modified_ns: int) -> Any:
    """The splitter of a punkt.json, made once per process; modified_ns changes when the file is replaced."""
    return make_splitter(json.loads(path.read_bytes()))


def write_shard(path: Path, first_doc_idx: int, documents: list[bytes]) -> dict[str, Any]:
    """Split a shard's documents and write them, unless done; runs in a worker process. Returns the shard's record."""
    if path.exists():
        return describe_sentence_shard(path)
    punkt_path = path.parent / "punkt.json"
    splitter = read_splitter(punkt_path, punkt_path.stat().st_mtime_ns)
    rows = (
        [(sentence, doc_idx, start, gap) for sentence, start, gap in split_document(splitter, as_text(document))]
        for doc_idx, document in enumerate(documents, first_doc_idx)
    )
    counts = {
        "n_docs": len(documents),
        "n_invalid_utf8": sum(as_text(document).encode() != document for document in documents),
        "text_bytes": sum(map(len, documents)),
    }
    return write_sentence_shard(path, rows, counts)


# ---- the stage


def read_or_train_punkt(folder: Path, kind: str, files: list[Path], train_mb: float) -> str:
    """Write punkt.json unless it exists; returns where its parameters come from."""
    path = folder / "punkt.json"
    if not path.exists():
        params, origin = load_punkt(kind, files, train_mb)
        write_json(path, {"origin": origin, **params})
    return read_json(path, "remove the folder and run again.")["origin"]


def split_documents(workers: Workers, files: list[Path], folder: Path, shard_bytes: int, n_bytes: int) -> list[dict]:
    """Write the shards that do not exist yet; returns the records of all."""
    shards: list[dict] = []
    n_sentences = 0
    with progress_bar(total=n_bytes, unit="B", unit_scale=True, desc="sentences") as bar:
        for record in workers.map(write_shard, shard_jobs(files, folder, shard_bytes)):
            shards.append(record)
            n_sentences += record["n_sentences"]
            bar.set_postfix(sentences=n_sentences, refresh=False)
            bar.update(record["text_bytes"])
    return shards


def main() -> None:
    config = parse_constants(globals())
    folder = Path(config.output_dir)
    documents = find_documents(config.input_path, folder)
    files, n_workers = documents.files, config.num_processes or os.cpu_count() or 1
    decides = {"documents": documents.identity}
    decides |= {name: getattr(config, name) for name in ("punkt", "punkt_train_mb", "shard_mb")}
    print(
        f"Reading {len(files)} files of documents, {gb(documents.identity['bytes'])}, from {config.input_path}; "
        f"writing to {folder}.",
        flush=True,
    )
    if (folder / MANIFEST).exists() and complete_already(folder, SENTENCES_STAGE, decides):
        return  # before the documents are read
    require_writable(folder / MANIFEST)
    with Workers(n_workers) as workers:
        n_docs, n_bytes = check_documents(workers, files)
        print(
            f"{n_docs:,} documents, {gb(n_bytes)} of text: about {gb(0.6 * n_bytes)} of sentences in "
            f"{duration(n_bytes / n_workers / _TEXT_BYTES_PER_S)}; the reader will copy the text once more.",
            flush=True,
        )
        with output_folder(folder, SENTENCES_STAGE, decides, 1.6 * n_bytes) as complete:
            if complete:
                return
            punkt_origin = read_or_train_punkt(folder, config.punkt, files, config.punkt_train_mb)
            print(f"Punkt: {punkt_origin}.", flush=True)
            shards = split_documents(workers, files, folder, int(config.shard_mb * 1e6), n_bytes)
            counts = {
                name: sum(shard[f"n_{name}"] for shard in shards) for name in ("sentences", "docs", "invalid_utf8")
            }
            write_manifest(
                folder,
                SENTENCES_STAGE,
                complete=True,
                decides=decides,
                config=vars(config),
                punkt_origin=punkt_origin,
                counts=counts,
                shards=shards,
            )
    n_invalid = counts["invalid_utf8"]
    note = f" ({n_invalid:,} with bytes that are not UTF-8, now U+FFFD)" if n_invalid else ""
    print(f"{counts['sentences']:,} sentences of {counts['docs']:,} documents{note}: {folder}")


if __name__ == "__main__":
    run(main)
