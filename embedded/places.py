"""Where the top sentences of the embedded SAE stand in the installed documentation."""

import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedded.corpus import read_source
from pipeline.files import atomic_path
from pipeline.progress import progress_bar
from pipeline.sentences import SentenceDataset

_AGGREGATION = "max"  # whose top sentences are kept
_N_PLACES = 5  # sentences a latent in NAME.top_places.parquet


def checksum(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", errors="surrogatepass"))


def text_at(place: dict) -> str | None:
    """The sentence that a row of NAME.top_places.parquet points at; None where it differs in this installation."""
    paragraphs = read_source(place["source"])
    if place["paragraph"] >= len(paragraphs):
        return None
    text = paragraphs[place["paragraph"]][place["start"] : place["start"] + place["length"]]
    return text if checksum(text) == place["checksum"] else None


def write_places(
    top_path: str | Path, sentences_dir: str | Path, documents_dir: str | Path, out_path: str | Path
) -> None:
    """Write where the strongest sentences of NAME.top.parquet stand in the installed documentation, not their text.

    Columns: latent, rank, activation, source and paragraph (of embedded.corpus.read_source), start, length (in
    characters), checksum. A sentence over several paragraphs is left out, the same text stands once a latent.
    """

    dataset = SentenceDataset(sentences_dir)
    files = [dataset.folder / shard["file"] for shard in dataset.manifest["shards"]]
    spans = pa.concat_tables(pq.ParquetFile(path).read(columns=["doc_idx", "start"]) for path in files)
    doc_idx, starts = (spans[name].to_numpy() for name in ("doc_idx", "start"))
    documents = pq.ParquetFile(Path(documents_dir, "documents.parquet")).read(columns=["text", "source"])
    top = pq.ParquetFile(top_path).read(columns=["latent", "rank", "activation", "sentence_idx", "aggregation", "text"])
    top = top.filter(pc.field("aggregation") == _AGGREGATION).sort_by([("latent", "ascending"), ("rank", "ascending")])
    paragraphs: dict[str, dict[str, int]] = {}  # source -> paragraph -> number
    rows: dict[int, dict[int, dict]] = {}  # latent -> checksum -> row
    for row in progress_bar(top.to_pylist(), unit="sentence", desc="places"):
        places, text = rows.setdefault(row["latent"], {}), row["text"]
        if len(places) == _N_PLACES or checksum(text) in places:
            continue
        place = int(dataset.order[row["sentence_idx"]])
        document, source = (documents[name][int(doc_idx[place])].as_py() for name in ("text", "source"))
        if source not in paragraphs:
            paragraphs[source] = {p: number for number, p in reversed(list(enumerate(read_source(source))))}
        before, _, _ = document[: int(starts[place])].rpartition("\n\n")
        start = int(starts[place]) - (len(before) + 2 if before else 0)
        paragraph = document[int(starts[place]) - start :].partition("\n\n")[0]
        number = paragraphs[source].get(paragraph)
        if number is not None and paragraph[start : start + len(text)] == text:
            place = {"source": source, "paragraph": number, "start": start, "length": len(text)}
            row = {name: row[name] for name in ("latent", "activation")}
            places[checksum(text)] = {**row, "rank": len(places), **place, "checksum": checksum(text)}
    types = {"latent": pa.int32(), "rank": pa.int8(), "activation": pa.float32(), "source": pa.string()}
    types |= {"paragraph": pa.int32(), "start": pa.int32(), "length": pa.int32(), "checksum": pa.uint32()}
    table = pa.Table.from_pylist([place for of in rows.values() for place in of.values()], schema=pa.schema(types))
    with atomic_path(out_path) as temporary:
        pq.write_table(table, temporary, compression="zstd", compression_level=19, use_dictionary=True)
    print(f"{len(table):,} places of {len(rows):,} latents' sentences: {out_path}")
