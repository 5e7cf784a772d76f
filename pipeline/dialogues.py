"""Dialogues on disk: a parquet file with a column `messages`, each a list of {role, content}."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.documents import arrow_file
from pipeline.files import atomic_path

DIALOGUES = "dialogues.parquet"
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
DIALOGUES_SCHEMA = pa.schema({"messages": pa.list_(_MESSAGE), "topic": pa.string(), "kind": pa.string()})


def write_dialogue_rows(path: Path, table: pa.Table) -> None:
    with atomic_path(path) as temporary, arrow_file(temporary, "wb") as file:
        pq.write_table(table, file, compression="zstd", compression_level=19)


def read_dialogue_rows(path: Path) -> pa.Table:
    return pq.ParquetFile(arrow_file(path)).read()
