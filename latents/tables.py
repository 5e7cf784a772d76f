"""The tables beside an SAE, NAME.SUFFIX: what each contains, what writes it, how it is read. All are sorted by latent.

for latent, sentences in top_sentences(path, "max", n=20): ...       # one latent after another
TopFile(path).sentences(latent, "max")                               # any latent
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.documents import arrow_file
from pipeline.errors import InputError
from pipeline.files import atomic_path
from pipeline.sentences import SentenceDataset

Aggregation = Literal["mean", "max", "last"]  # how a latent's activation over a sentence is measured
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
TENTHS = 10  # parts of a latent's range, from 0 to its highest activation
SILENT = -1  # the `tenth` of sentences in which a latent does not fire

_ROW_GROUP = 2**16  # rows written at once
_LISTS = pa.large_list


class Table(NamedTuple):
    """A kind of table."""

    suffix: str  # the file is NAME.suffix
    made_by: str  # script
    holds: str
    schema: pa.Schema

    def open(self, path: Path, columns: list[str]) -> pq.ParquetFile:
        """The file, memory-mapped. Raises InputError unless it is a parquet file with these columns."""
        if path.is_dir():
            raise InputError(f"{path} is a folder, not a file; move it away and run {self.made_by}.")
        if not path.is_file():
            raise InputError(f"There is no {path}; run {self.made_by} first.")
        try:
            file = pq.ParquetFile(pa.memory_map(os.fsencode(path)))
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path} cannot be read as a parquet file ({reason}); run {self.made_by} again.") from None
        if missing := sorted(set(columns) - set(file.schema_arrow.names)):
            raise InputError(f"{path} cannot be read: it has no column {missing[0]}; run {self.made_by} again.")
        return file

    def read(self, path: Path, columns: list[str]) -> pa.Table:
        """These columns of all rows. Raises InputError as `open` and `checked` do."""
        with self.open(path, columns) as file:
            return self.checked(path, lambda: file.read(columns=columns))

    def checked(self, path: Path, read: Callable[[], pa.Table]) -> pa.Table:
        """What `read` gives, in this table's types. Raises InputError for damaged rows, other types and nulls."""
        try:
            rows = read()
            rows = rows.cast(pa.schema([self.schema.field(name) for name in rows.schema.names]))
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path} cannot be read ({reason}); run {self.made_by} again.") from None
        if nulls := [name for name in rows.schema.names if rows[name].null_count]:
            raise InputError(f"{path} cannot be read: {nulls[0]} is null in a row; run {self.made_by} again.")
        return rows

    def write(self, path: Path, columns: Mapping[str, Any]) -> None:
        """Write the whole table atomically. columns: arrays or lists."""
        with atomic_path(path) as temporary, arrow_file(temporary, "wb") as file:
            pq.write_table(pa.table(dict(columns), schema=self.schema), file, compression="zstd")


_CAPTURE_TOP = "capture_top_activating_sentences.py"
_SENTENCE = {
    "sentence_idx": pa.int64(),
    "text": pa.large_string(),
    "token_ids": _LISTS(pa.int32()),  # as the model read it
    "token_activations": _LISTS(pa.float16()),  # of the latent, per token, normalised space
}
TOP = Table(
    "top.parquet",
    _CAPTURE_TOP,
    "sentences",
    pa.schema(
        {
            "latent": pa.int32(),
            "aggregation": pa.dictionary(pa.int32(), pa.string()),
            "rank": pa.int32(),  # 0: the strongest
            "activation": pa.float32(),  # over the sentence
            **_SENTENCE,
        }
    ),
)
EXAMPLES = Table(
    "examples.parquet",
    _CAPTURE_TOP,
    "examples",
    pa.schema({"latent": pa.int32(), "tenth": pa.int8(), **_SENTENCE}),
)
LATENTS = Table(
    "latents.parquet",
    _CAPTURE_TOP,
    "frequencies, companions",
    pa.schema(
        {
            "latent": pa.int32(),
            "frequency": pa.float32(),  # share of tokens it fires on
            "mean": pa.float32(),  # activation where it fires
            "max": pa.float32(),
            "sentences": pa.int64(),  # in which it fires
            "sentences_by_tenth": pa.list_(pa.int64(), TENTHS),
            "cofiring_latents": _LISTS(pa.int32()),  # latents that fire on the same tokens, closest first
            "cofiring_jaccard": _LISTS(pa.float32()),
        }
    ),
)
PROMOTED = Table(
    "promoted.parquet",
    "promoted_tokens.py",
    "promoted tokens",
    pa.schema(
        {
            "latent": pa.int32(),
            "tokens": pa.list_(pa.string()),
            "scores": pa.list_(pa.float32()),  # logits in standard deviations over the vocabulary
            "suppressed_tokens": pa.list_(pa.string()),
            "suppressed_scores": pa.list_(pa.float32()),
        }
    ),
)
STEERING = Table(
    "steering.parquet",
    "sae_steering.py",
    "output scores",
    pa.schema(
        {
            "latent": pa.int32(),
            "output_score": pa.float32(),  # nan for a latent that never fired
            "steers_well": pa.bool_(),
        }
    ),
)


# ---- writing sentences


class SentenceColumns(NamedTuple):
    """Looks up the sentence columns of a row: text, tokens, the latent's activations on them."""

    n_latents: int
    dataset: SentenceDataset
    captured: np.ndarray  # sentence_idx of each captured sentence, ascending
    token_ids: pa.LargeListArray  # of each captured sentence
    pair_keys: np.ndarray  # sentence_idx * n_latents + latent of each (sentence, latent) pair, ascending
    pair_places: np.ndarray  # position of each pair in `activations`
    activations: pa.LargeListArray  # per token

    def columns(self, sentence_idx: np.ndarray, latent: np.ndarray) -> dict[str, Any]:
        sentence = np.searchsorted(self.captured, sentence_idx)
        pair = self.pair_places[np.searchsorted(self.pair_keys, sentence_idx * self.n_latents + latent)]
        return {
            "sentence_idx": pa.array(sentence_idx, pa.int64()),
            "text": self.dataset.texts.take(pa.array(self.dataset.order[sentence_idx])),
            "token_ids": self.token_ids.take(pa.array(sentence)),
            "token_activations": self.activations.take(pa.array(pair)),
        }


def write_top(
    path: Path,
    sentences: SentenceColumns,
    latent: np.ndarray,
    aggregation: np.ndarray,
    rank: np.ndarray,
    activation: np.ndarray,
    sentence_idx: np.ndarray,
) -> None:
    """NAME.top.parquet, by latent, aggregation and rank. aggregation: indices into AGGREGATIONS. Rows in any order."""
    order = np.lexsort((rank, aggregation, latent))
    columns = {
        "latent": pa.array(latent[order], pa.int32()),
        "aggregation": pa.DictionaryArray.from_arrays(aggregation[order].astype(np.int32), list(AGGREGATIONS)),
        "rank": pa.array(rank[order], pa.int32()),
        "activation": pa.array(activation[order], pa.float32()),
    }
    _write_rows(path, TOP, columns, sentences, sentence_idx[order], latent[order])


def write_examples(
    path: Path, sentences: SentenceColumns, latent: np.ndarray, tenth: np.ndarray, sentence_idx: np.ndarray
) -> None:
    """NAME.examples.parquet, by latent; a latent's rows stay in the order in which they come."""
    order = np.argsort(latent, kind="stable")
    columns = {"latent": pa.array(latent[order], pa.int32()), "tenth": pa.array(tenth[order], pa.int8())}
    _write_rows(path, EXAMPLES, columns, sentences, sentence_idx[order], latent[order])


def _write_rows(
    path: Path,
    table: Table,
    columns: dict[str, pa.Array],
    sentences: SentenceColumns,
    sentence_idx: np.ndarray,
    latent: np.ndarray,
) -> None:
    """Write rows in parts: with their sentences, all at once would take too much memory."""
    with (
        atomic_path(path) as temporary,
        arrow_file(temporary, "wb") as file,
        pq.ParquetWriter(file, table.schema, compression="zstd") as writer,
    ):
        for start in range(0, len(latent), _ROW_GROUP):
            rows = slice(start, start + _ROW_GROUP)
            own = {name: column[rows] for name, column in columns.items()}
            part = pa.table({**own, **sentences.columns(sentence_idx[rows], latent[rows])}, schema=table.schema)
            writer.write_table(part, row_group_size=_ROW_GROUP)


def lists(lengths: list[np.ndarray], values: list[np.ndarray]) -> pa.LargeListArray:
    """A column of lists, from the lists' lengths and their values, each in consecutive parts."""
    offsets = np.concatenate([[0], *lengths]).cumsum()
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(np.concatenate(values)))


# ---- reading sentences


class TopSentence(NamedTuple):
    """One of the sentences that activate a latent most, as the model read it."""

    token_ids: list[int]
    token_activations: list[float]  # of the latent
    activation: float  # of the latent over the sentence


class ExampleSentence(NamedTuple):
    """A sentence drawn from a part of a latent's range."""

    tenth: int  # 0: the weakest; SILENT where the latent does not fire
    text: str
    token_ids: list[int]


_TOP_SENTENCE = ["token_ids", "token_activations", "activation"]
_TOP_COLUMNS = ["latent", "aggregation", "rank", *_TOP_SENTENCE]


def open_top(path: Path) -> pq.ParquetFile:
    """NAME.top.parquet. Raises InputError unless it is what capture_top_activating_sentences.py writes."""
    return TOP.open(path, _TOP_COLUMNS)


def top_sentences(
    path: Path, aggregation: Aggregation, n: int, wanted: list[range] | None = None
) -> Iterator[tuple[int, list[TopSentence]]]:
    """Each latent's n strongest sentences, strongest first. wanted: all latents when None."""
    rows = (pc.field("aggregation") == aggregation) & (pc.field("rank") < n)
    with open_top(path) as file:
        groups = _RowGroups(TOP, path, file)
        for latent, entries in _by_latent(groups, _TOP_SENTENCE, rows, ["aggregation", "rank"], wanted):
            yield latent, [TopSentence(*entry) for entry in entries]


def top_texts(path: Path, n: int) -> Iterator[tuple[int, set[str]]]:
    """The texts of each latent's n strongest sentences by any aggregation."""
    with TOP.open(path, ["latent", "rank", "text"]) as file:
        for latent, entries in _by_latent(_RowGroups(TOP, path, file), ["text"], pc.field("rank") < n, ["rank"]):
            yield latent, {text for (text,) in entries}


def example_sentences(path: Path) -> Iterator[tuple[int, list[ExampleSentence]]]:
    """Each latent's rows of NAME.examples.parquet."""
    columns = list(ExampleSentence._fields)
    with EXAMPLES.open(path, ["latent", *columns]) as file:
        for latent, entries in _by_latent(_RowGroups(EXAMPLES, path, file), columns):
            yield latent, [ExampleSentence(*entry) for entry in entries]


class _RowGroups(NamedTuple):
    """The row groups of an open file."""

    table: Table
    path: Path
    file: pq.ParquetFile

    def read(self, number: int, columns: list[str]) -> pa.Table:
        return self.table.checked(self.path, lambda: self.file.read_row_group(number, columns=columns))


def _by_latent(
    groups: _RowGroups,
    columns: list[str],
    rows: pc.Expression | None = None,
    row_columns: list[str] | None = None,
    wanted: list[range] | None = None,
) -> Iterator[tuple[int, list[tuple]]]:
    """(latent, its rows' columns), one row group in memory at a time. rows: a filter expression on row_columns."""

    def entries() -> Iterator[tuple]:
        for i in range(groups.file.num_row_groups):
            latents = groups.read(i, ["latent"])["latent"].to_numpy()
            if wanted is not None and not any(((r.start <= latents) & (latents < r.stop)).any() for r in wanted):
                continue
            table = groups.read(i, ["latent", *columns, *(row_columns or [])])
            table = table if rows is None else table.filter(rows)
            for batch in table.to_batches(max_chunksize=4096):
                yield from zip(*(batch[name].to_pylist() for name in ("latent", *columns)), strict=True)

    for latent, group in groupby(entries(), key=lambda entry: entry[0]):
        if wanted is None or any(latent in r for r in wanted):
            yield latent, [entry[1:] for entry in group]


class TopFile:
    """NAME.top.parquet, for reading any latent from any number of threads. Raises InputError as `open_top` does.

    The table is sorted by latent, so a latent's rows are in one row group or adjacent ones, found by their statistics.
    """

    def __init__(self, path: Path):
        self._file = open_top(path)
        self._groups = _RowGroups(TOP, path, self._file)
        self._lock = threading.Lock()
        self._last: tuple[int, pa.Table | None] = (-1, None)  # number and content of the row group read last

    def sentences(self, latent: int, aggregation: Aggregation) -> list[TopSentence]:
        """A latent's sentences, strongest first."""
        rows = (pc.field("latent") == latent) & (pc.field("aggregation") == aggregation)
        parts = []
        for number in range(self._file.num_row_groups):
            statistics = self._file.metadata.row_group(number).column(0).statistics
            if statistics is None or not statistics.has_min_max or statistics.min <= latent <= statistics.max:
                parts.append(self._row_group(number).filter(rows))
        if not parts:
            return []
        table = pa.concat_tables(parts).sort_by("rank")
        return [TopSentence(*entry) for entry in zip(*(table[n].to_pylist() for n in _TOP_SENTENCE), strict=True)]

    def _row_group(self, number: int) -> pa.Table:
        with self._lock:
            last, table = self._last
            if last != number or table is None:
                table = self._groups.read(number, _TOP_COLUMNS)
                self._last = (number, table)
            return table


# ---- statistics of latents


def highest_activations(path: Path, n_latents: int | None = None) -> np.ndarray:
    """(n_latents,) float32: the column `max` of NAME.latents.parquet, 0 for a latent that never fired.

    Raises InputError where the file is missing or unreadable, and where it does not have n_latents rows.
    """
    highest = LATENTS.read(path, ["max"])["max"].to_numpy().astype(np.float32)
    if n_latents is not None and len(highest) != n_latents:
        raise InputError(f"{path} has {len(highest)} latents, the SAE {n_latents}; run {LATENTS.made_by} again.")
    return highest
