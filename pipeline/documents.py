"""Documents and dialogues: parquet, JSON lines and text files, found and read in a fixed order.

A dialogue is a document as well: the assistant's messages, joined by blank lines.
"""

import codecs
import hashlib
import io
import itertools
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

Dialogue = list[tuple[str, str]]  # role and content of each message


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


def local_identity(input_path: str, files: list[Path]) -> dict[str, Any]:
    """`describe_files` of the documents in a local file or folder."""
    root = Path(input_path) if Path(input_path).is_dir() else Path(input_path).parent
    stats = [(utf8_name(file.relative_to(root)), file.stat()) for file in files]
    return describe_files([(name, s.st_size, s.st_mtime_ns) for name, s in stats])


def open_any_parquet(path: Path) -> Any:
    """The parquet file, whatever its columns. Raises InputError."""
    try:
        return pq.ParquetFile(arrow_file(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a parquet file ({error}); fetch it again.") from None


def open_parquet(path: Path) -> Any:
    """The parquet file. Raises InputError unless it has a column `text`."""
    file = open_any_parquet(path)
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


def iter_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of each line that is not blank. Raises InputError."""
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
                    yield number, json.loads(line.decode(errors="surrogateescape"))
                except (ValueError, RecursionError) as error:
                    raise InputError(f"Line {number} of {path} is not JSON ({error}); correct it.") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); fetch it again.") from None


def iter_jsonl(path: Path) -> Iterator[bytes]:
    """The "text" of each line, null as empty, or its dialogue."""
    for number, value in iter_json_lines(path):
        fields = value if isinstance(value, dict) else {}
        if "text" not in fields and "messages" in fields:
            yield answers(as_dialogue(fields["messages"], f"Line {number} of {path}"))
            continue
        text = fields.get("text", 0)
        text = "" if text is None else text
        if not isinstance(text, str):
            raise InputError(
                f'Line {number} of {path} is not an object with a string "text", or with "messages"; correct it.'
            )
        yield as_bytes(text)


def as_bytes(text: str) -> bytes:
    """A text as UTF-8; lone surrogates become bytes that are not."""
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")


def as_dialogue(messages: Any, where: str) -> Dialogue:
    """A dialogue as files hold it: objects with a role and a content. Raises InputError, which says `where` it is."""
    is_text = lambda message, name: isinstance(message, dict) and isinstance(message.get(name), str)
    if isinstance(messages, list) and all(is_text(m, "role") and is_text(m, "content") for m in messages):
        return [(message["role"], message["content"]) for message in messages]
    raise InputError(
        f"{where} holds no dialogue: `messages` must be a list of objects, each with a text `role` and a text "
        "`content`; correct it."
    )


def answers(dialogue: Dialogue) -> bytes:
    """A dialogue as a document."""
    return as_bytes("\n\n".join(content for role, content in dialogue if role == "assistant"))


def holds_dialogues(path: Path) -> bool:
    """Whether a parquet file has a column `messages` and none of texts."""
    names = open_any_parquet(path).schema_arrow.names
    return "messages" in names and "text" not in names


def iter_dialogues(path: Path) -> Iterator[Dialogue]:
    """Every dialogue of a parquet or jsonl file, from its `messages`. Raises InputError."""
    if kind_of(path.name) == "jsonl":
        for number, value in iter_json_lines(path):
            yield as_dialogue(value.get("messages") if isinstance(value, dict) else None, f"Line {number} of {path}")
        return
    file = open_any_parquet(path)
    if "messages" not in file.schema_arrow.names:
        raise InputError(f"{path} has no column `messages`; name files of dialogues with one.")
    row = 0
    try:
        for batch in file.iter_batches(batch_size=64, columns=["messages"]):
            for messages in batch.column(0).to_pylist():
                yield as_dialogue(messages, f"Row {row} of {path}")
                row += 1
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
            case "parquet" if holds_dialogues(path):
                yield from map(answers, iter_dialogues(path))
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


def first_texts(path: str, n: int) -> list[str]:
    """The first n documents of a file or folder that are not empty. Raises InputError if there is none."""
    found = filter(str.strip, map(as_text, iter_documents(document_files(path))))
    if not (texts := list(itertools.islice(found, n))):
        raise InputError(f"{path} holds no text; name another with --text_path.")
    return texts
