"""Dialogues on disk, and their spans: what `capture_activations.py --dialogues` stores activations of.

A dialogue goes through the model whole, up to the last token that is stored. Its stored tokens are cut into spans,
where a sentence or a line seems to end. To later stages a span is a sentence: `DialogueSpans` is a `SentenceDataset`.

OUTPUT_DIR/dialogues holds, dialogues in the seeded order:

    contexts.arrow  token_ids large_list of int32; dialogue int64, its row counted over all files
    spans.arrow     text large_string; context int64, the row of contexts.arrow; first and n_tokens int32, in token_ids
"""

import functools
import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llama_3.chat import ROLES, Message, encode_answered
from llama_3.tokenizer import Tokenizer
from pipeline.documents import arrow_file, document_files, iter_dialogues, kind_of
from pipeline.errors import InputError
from pipeline.files import atomic_path, sha256
from pipeline.manifests import MANIFEST, begin_or_continue, check_files, check_sum, read_manifest, write_manifest
from pipeline.progress import progress_bar
from pipeline.sentences import SHUFFLE_SEED, SentenceDataset, open_arrow
from pipeline.workers import ahead

DIALOGUES = "dialogues.parquet"  # of sample_dialogues.py
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
DIALOGUES_SCHEMA = pa.schema({"messages": pa.list_(_MESSAGE), "topic": pa.string(), "kind": pa.string()})

CAPTURE_STAGE = "capture_activations.py"
_CONTEXTS, _SPANS = "contexts.arrow", "spans.arrow"
_CONTEXT_SCHEMA = pa.schema({"token_ids": pa.large_list(pa.int32()), "dialogue": pa.int64()})
_SPAN_SCHEMA = pa.schema(
    {"text": pa.large_string(), "context": pa.int64(), "first": pa.int32(), "n_tokens": pa.int32()}
)
_ROWS = 4096  # dialogues written at once
_THREADS = 4  # that encode dialogues
# Where a sentence seems to end, not after a number ("1. Flour"), or a line does.
_SENTENCE_END = re.compile(rb"(?<!\d)[.!?]+[\"')\]*_]*(?= +\S)|(?:\xe3\x80\x82|\xef\xbc\x81|\xef\xbc\x9f)+|\n+")


# ---- dialogues.parquet


def write_dialogue_rows(path: Path, table: pa.Table) -> None:
    with atomic_path(path) as temporary, arrow_file(temporary, "wb") as file:
        pq.write_table(table, file, compression="zstd", compression_level=19)


def read_dialogue_rows(path: Path) -> pa.Table:
    return pq.ParquetFile(arrow_file(path)).read()


# ---- reading dialogues


def read_dialogues(path: str) -> list[list[Message]]:
    """All dialogues of a file or folder, parquet or jsonl. Raises InputError."""
    if not Path(path).exists():
        raise InputError(f"There is nothing at {path}; name a file or folder of dialogues, parquet or jsonl.")
    files = document_files(path)
    if kind_of(files[0].name) == "txt":
        raise InputError(f"{path} holds txt files; dialogues come as parquet or jsonl.")
    dialogues = []
    for file in files:
        for number, dialogue in enumerate(iter_dialogues(file)):
            for role, _ in dialogue:
                if role not in ROLES:
                    raise InputError(
                        f"Dialogue {number} of {file} has a message of {role!r}; write one of {', '.join(ROLES)}, or "
                        "leave it out."
                    )
            dialogues.append([Message(*message) for message in dialogue])
    if not dialogues:
        raise InputError(f"There are no dialogues in {path}; name others.")
    return dialogues


# ---- cutting spans


class Context(NamedTuple):
    """A dialogue as the model reads it, and which of its tokens are stored."""

    token_ids: list[int]
    spans: list[range]  # places of the stored tokens, each span without a gap
    was_cut: bool = False


class Cutter:
    """How dialogues become contexts."""

    def __init__(
        self, tokenizer: Tokenizer, date: str | None, all_tokens: bool, max_tokens: int, max_dialogue_tokens: int
    ):
        """all_tokens: whether to store all, or the assistant's alone. max_tokens: in a span."""
        self.tokenizer, self.date, self.all_tokens = tokenizer, date, all_tokens
        self.max_tokens, self.max_dialogue_tokens = max_tokens, max_dialogue_tokens
        self.token_bytes = functools.cache(tokenizer.token_bytes)

    def context(self, number: int, messages: Sequence[Message]) -> Context:
        """number: of the dialogue, for messages. Raises InputError."""
        try:
            ids, answers = encode_answered(self.tokenizer, messages, self.date)
        except InputError as error:
            raise InputError(f"Dialogue {number} cannot be read by the model: {error}") from None
        n = min(len(ids), self.max_dialogue_tokens)
        stored = self.without_begin_of_text(ids) if self.all_tokens else answers
        spans = [span for places in stored for span in self.spans(ids, range(places.start, min(places.stop, n)))]
        return Context(ids[: spans[-1].stop] if spans else [], spans, n < len(ids))

    def without_begin_of_text(self, ids: list[int]) -> list[range]:
        """All places but those of begin-of-text: no SAE here is trained on it."""
        gaps = [-1, *(i for i, token in enumerate(ids) if token == self.tokenizer.bos_id), len(ids)]
        return [range(before + 1, after) for before, after in pairwise(gaps)]

    def spans(self, ids: list[int], places: range) -> list[range]:
        """Cut places without a gap where a sentence or a line seems to end, and after max_tokens."""
        tokens = [self.token_bytes(ids[i]) for i in places]
        starts = list(accumulate(map(len, tokens), initial=0))[:-1]
        # A span begins with the first token that begins behind an end.
        begins = {bisect_left(starts, match.end()) for match in _SENTENCE_END.finditer(b"".join(tokens))}
        edges = sorted({0, len(tokens)} | begins)
        return [
            places[first : min(first + self.max_tokens, end)]
            for begin, end in pairwise(edges)
            for first in range(begin, end, self.max_tokens)
        ]


# ---- writing spans


def write_spans(
    folder: Path, dialogues: list[list[Message]], order: Sequence[int], cutter: Cutter, decides: dict
) -> None:
    """Write the contexts and spans of dialogues[i], for i in order, unless done. Raises InputError.

    decides: what they depend on; a folder begun with other values is refused.
    """
    if (folder / MANIFEST).exists():
        begin_or_continue(folder, CAPTURE_STAGE, decides)
        return
    counts = dict.fromkeys(("dialogues", "spans", "tokens", "tokens_read", "empty_dialogues", "cut_dialogues"), 0)
    contexts = ahead(lambda i: (i, cutter.context(i, dialogues[i])), map(int, order), _THREADS)
    with (
        atomic_path(folder / _CONTEXTS) as context_path,
        atomic_path(folder / _SPANS) as span_path,
        arrow_file(context_path, "wb") as context_file,
        arrow_file(span_path, "wb") as span_file,
        pa.ipc.new_file(context_file, _CONTEXT_SCHEMA) as context_writer,
        pa.ipc.new_file(span_file, _SPAN_SCHEMA) as span_writer,
    ):
        context_rows: list[dict[str, Any]] = []
        span_rows: list[dict[str, Any]] = []

        def write() -> None:
            context_writer.write_batch(pa.RecordBatch.from_pylist(context_rows, schema=_CONTEXT_SCHEMA))
            span_writer.write_batch(pa.RecordBatch.from_pylist(span_rows, schema=_SPAN_SCHEMA))
            context_rows.clear()
            span_rows.clear()

        for i, context in progress_bar(contexts, total=len(order), unit="dialogue", desc="spans of dialogues"):
            counts["cut_dialogues"] += context.was_cut
            if not context.spans:
                counts["empty_dialogues"] += 1
                continue
            context_rows.append({"token_ids": context.token_ids, "dialogue": i})
            for span in context.spans:
                text = cutter.tokenizer.decode(context.token_ids[span.start : span.stop])
                place = {"context": counts["dialogues"], "first": span.start, "n_tokens": len(span)}
                span_rows.append({"text": text, **place})
                counts["tokens"] += len(span)
            counts["dialogues"] += 1
            counts["spans"] += len(context.spans)
            counts["tokens_read"] += len(context.token_ids)
            if len(context_rows) == _ROWS:
                write()
        write()
        if not counts["spans"]:
            raise InputError(f"None of the {len(order):,} dialogues has a token to store; name others.")
    shards = [
        {"file": name, "bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in (_CONTEXTS, _SPANS)
    ]
    write_manifest(folder, CAPTURE_STAGE, complete=True, decides=decides, counts=counts, shards=shards)


# ---- reading spans


class DialogueSpans(SentenceDataset):
    """Spans by index, as `SentenceDataset` gives sentences, and the contexts that they are in. Raises InputError."""

    def __init__(self, folder: str | Path):
        self.path = self.folder = Path(folder)
        self.manifest = read_manifest(folder, CAPTURE_STAGE)
        check_files(folder, self.manifest["shards"], CAPTURE_STAGE)
        for shard in self.manifest["shards"]:
            check_sum(folder, shard, CAPTURE_STAGE)
        self.files_sha256 = ""  # the checksums are in the manifest
        spans, contexts = (open_arrow(self.folder / name) for name in (_SPANS, _CONTEXTS))
        self.texts: Any = spans.column("text")
        self.n = len(self.texts)
        self.order = np.arange(self.n)
        self.context_of, self.first, self.lengths = (
            spans.column(name).to_numpy() for name in ("context", "first", "n_tokens")
        )
        self._token_ids: Any = contexts.column("token_ids")
        self.n_contexts = len(self._token_ids)
        self.first_span = np.searchsorted(self.context_of, np.arange(self.n_contexts + 1))  # of each context

    def context(self, i: int) -> Context:
        spans = slice(self.first_span[i], self.first_span[i + 1])
        places = zip(self.first[spans].tolist(), self.lengths[spans].tolist(), strict=True)
        return Context(self._token_ids[i].as_py(), [range(first, first + n) for first, n in places])


def open_dataset(folder: str | Path, num_samples: int | None = None, seed: int = SHUFFLE_SEED) -> SentenceDataset:
    """The sentences of a folder, or the spans of dialogues in it."""
    if (Path(folder) / _SPANS).exists():
        return DialogueSpans(folder)
    return SentenceDataset(folder, num_samples, seed)
