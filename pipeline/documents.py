"""Documents: parquet, JSON lines and text files, found and read in a fixed order."""

import codecs
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError

_KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".jsonl.zst": "jsonl", ".txt": "txt"}
ENDINGS = ", ".join(_KINDS)


def utf8_name(path: Path) -> str:
    """The path with slashes, decoded as UTF-8 whatever the locale; bytes that are none become surrogates."""
    return os.fsencode(path.as_posix()).decode(errors="surrogateescape")


def arrow_file(path: Path | str, mode: Literal["rb", "wb"] = "rb") -> pa.OSFile:
    """A file opened by Arrow, which on its own expects names in UTF-8."""
    return pa.OSFile(os.fsencode(path), mode)


def kind_of(name: str) -> str | None:
    """parquet, jsonl or txt, by the ending of a file's name; None for other files and hidden ones."""
    if any(part.startswith(".") for part in name.split("/")):
        return None
    return next((kind for ending, kind in _KINDS.items() if name.lower().endswith(ending)), None)


def document_files(input_path: str) -> list[Path]:
    """The file itself, or a folder's documents, subfolders included, by name. Raises InputError if there are none."""
    path = Path(input_path)
    if not path.exists():
        raise InputError(
            f"There is nothing at {input_path}; name a file or folder of documents, or a dataset id OWNER/NAME."
        )
    if path.is_file():
        if not kind_of(path.name):
            raise InputError(f"{input_path} has an unknown ending; documents come as {ENDINGS}.")
        return [path]
    names = sorted((file.relative_to(path).as_posix() for file in files_below(path)), key=os.fsencode)
    kinds = {kind for name in names if (kind := kind_of(name))}
    if not kinds:
        raise InputError(f"{input_path} holds no documents ({ENDINGS}); name another folder.")
    if len(kinds) > 1:
        raise InputError(f"{input_path} holds {' and '.join(sorted(kinds))} files; name a folder of one kind.")
    return [path / name for name in names if kind_of(name)]


def files_below(folder: Path) -> Iterator[Path]:
    """Every file in a folder and its subfolders, following links. Raises InputError for unreadable folders."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); fix or remove it.")

    seen = set()
    for where, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if (real := os.path.realpath(where)) in seen:  # a link to a parent folder, or a second path to a folder
            subfolders.clear()
            continue
        seen.add(real)
        for path in (Path(where) / name for name in names):
            if kind_of(path.name) and not path.exists():
                raise InputError(f"{path} points to nothing; fix or remove it.")
            yield path


def describe_files(listing: list[tuple]) -> dict[str, Any]:
    """Count, size, and one checksum (there may be millions of files) of names, sizes and local modification times."""
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return {"files": len(listing), "bytes": sum(size for _, size, *_ in listing), "listing_sha256": digest}


def open_parquet(path: Path) -> Any:
    """The parquet file. Raises InputError unless it has a column `text`."""
    try:
        file = pq.ParquetFile(arrow_file(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a parquet file ({error}); fetch it again.") from None
    types = {field.name: field.type for field in file.schema_arrow}
    if "text" not in types:
        raise InputError(f"{path} has no column `text`; name files of documents with one.")
    if not holds_text(types["text"]):
        raise InputError(f"The column `text` of {path} holds {types['text']}, not text; name other files.")
    return file


def holds_text(kind: Any) -> bool:
    """Whether a column of this Arrow type holds text. A column of only nulls may have any type."""
    if isinstance(kind, pa.BaseExtensionType):
        return holds_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return holds_text(kind.value_type)
    views = (pa.string_view(), pa.binary_view())
    return kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), *views, pa.null())


def as_binary(column: Any) -> Any:
    """A column that `holds_text`, as Arrow large_binary; nulls stay."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary())


def iter_parquet(path: Path, batch_size: int) -> Iterator[Any]:
    """The column `text` in batches, as bytes (Arrow large_binary, nulls as empty)."""
    try:
        for batch in open_parquet(path).iter_batches(batch_size=batch_size, columns=["text"]):
            yield pc.fill_null(as_binary(batch.column(0)), b"")
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); fetch it again.") from None


def iter_jsonl(path: Path) -> Iterator[bytes]:
    """The "text" of each line, null as empty. Lone surrogates become bytes that are not UTF-8."""

    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    try:
        with pa.input_stream(arrow_file(path), compression=compression) as stream:
            for number, line in enumerate(io.BufferedReader(stream, 2**20), 1):
                if number == 1 and (encoding := marked_encoding(line)):
                    raise InputError(f"{path} is in {encoding.upper()}; save it as UTF-8.")
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.decode(errors="surrogateescape"))
                except (ValueError, RecursionError) as error:
                    raise InputError(f"Line {number} of {path} is not JSON ({error}); correct it.") from None
                text = value.get("text", 0) if isinstance(value, dict) else 0
                text = "" if text is None else text
                if not isinstance(text, str):
                    raise InputError(f'Line {number} of {path} is not an object with a string "text"; correct it.')
                try:
                    yield text.encode(errors="surrogateescape")
                except UnicodeEncodeError:
                    yield text.encode(errors="surrogatepass")
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); fetch it again.") from None


def marked_encoding(data: bytes) -> str | None:
    """utf-16 or utf-32 if the data begin with its byte order mark, else None."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # before UTF-16: one mark begins with the other
        return "utf-32"
    return "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else None


def read_text_file(path: Path) -> bytes:
    """A text file as UTF-8 without a byte order mark; UTF-16 and UTF-32 are recognised by their marks."""
    data = path.read_bytes()
    if encoding := marked_encoding(data):
        return data.decode(encoding, errors="replace").encode()
    return data.removeprefix(codecs.BOM_UTF8)


def iter_documents(files: list[Path]) -> Iterator[bytes]:
    """Every document in order, as UTF-8, not necessarily valid. Raises InputError."""
    for path in files:
        match kind_of(path.name):
            case "parquet":
                for batch in iter_parquet(path, 64):  # a document may be megabytes long
                    yield from batch.to_pylist()
            case "jsonl":
                yield from iter_jsonl(path)
            case "txt":
                try:
                    yield read_text_file(path)
                except OSError as error:
                    raise InputError(f"{path} cannot be read ({error}); fix or remove it.") from None


def as_text(document: bytes) -> str:
    return document.decode(errors="replace")
