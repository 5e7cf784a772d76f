"""Where to find the embedded SAE's top sentences in the installed documentation."""

import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedded.corpus import read_documents, read_source
from pipeline.documents import arrow_file
from pipeline.files import atomic_path
from pipeline.progress import progress_bar
from pipeline.sentences import SentenceDataset, read_sentence_table

_AGGREGATION = "max"  # whose top sentences are kept
_N_PLACES = 5  # sentences per latent in NAME.top_places.parquet
_SCHEMA = pa.schema(
    {
        "latent": pa.int32(),
        "rank": pa.int8(),
        "activation": pa.float32(),
        "source": pa.string(),
        "paragraph": pa.int32(),
        "start": pa.int32(),
        "length": pa.int32(),
        "checksum": pa.uint32(),
    }
)


def checksum(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", errors="surrogatepass"))


def text_at(place: dict) -> str | None:
    """The sentence that a row of NAME.top_places.parquet points at; None if it differs in this installation."""
    paragraphs = read_source(place["source"])
    if place["paragraph"] >= len(paragraphs):
        return None
    text = paragraphs[place["paragraph"]][place["start"] : place["start"] + place["length"]]
    return text if checksum(text) == place["checksum"] else None


def write_places(
    top_path: str | Path, sentences_dir: str | Path, documents_dir: str | Path, out_path: str | Path
) -> None:
    """Write where the strongest sentences of NAME.top.parquet are in the installed documentation, without their text.

    Columns: _SCHEMA; source and paragraph as embedded.corpus.read_source counts them, start and length in characters.
    A sentence that spans paragraphs is left out; a text is listed once per latent.
    """
    dataset = SentenceDataset(sentences_dir)
    spans = read_sentence_table(sentences_dir, ["doc_idx", "start"])
    doc_idx, starts = (spans[name].to_numpy() for name in ("doc_idx", "start"))
    documents = read_documents(documents_dir)
    top = pq.ParquetFile(arrow_file(top_path)).read(
        columns=["latent", "rank", "activation", "sentence_idx", "aggregation", "text"]
    )
    top = top.filter(pc.field("aggregation") == _AGGREGATION).sort_by([("latent", "ascending"), ("rank", "ascending")])
    paragraphs: dict[str, dict[str, int]] = {}  # source -> paragraph -> number
    places: dict[int, dict[int, dict]] = {}  # latent -> checksum -> row
    for row in progress_bar(top.to_pylist(), unit="sentence", desc="places"):
        of_latent, text = places.setdefault(row["latent"], {}), row["text"]
        if len(of_latent) == _N_PLACES or checksum(text) in of_latent:
            continue
        sentence = int(dataset.order[row["sentence_idx"]])
        document, source = (documents[name][int(doc_idx[sentence])] for name in ("text", "source"))
        if source not in paragraphs:
            paragraphs[source] = {p: number for number, p in reversed(list(enumerate(read_source(source))))}
        if place := find_place(text, document, int(starts[sentence]), paragraphs[source]):
            known = {"latent": row["latent"], "activation": row["activation"], "source": source}
            of_latent[checksum(text)] = {**known, **place, "rank": len(of_latent), "checksum": checksum(text)}
    table = pa.Table.from_pylist([place for rows in places.values() for place in rows.values()], schema=_SCHEMA)
    with atomic_path(out_path) as temporary, arrow_file(temporary, "wb") as file:
        pq.write_table(table, file, compression="zstd", compression_level=19, use_dictionary=True)
    print(f"{len(table):,} places of {len(places):,} latents' sentences: {out_path}")


def find_place(text: str, document: str, start: int, numbers: dict[str, int]) -> dict[str, int] | None:
    """The paragraph that holds the whole sentence at `start` of a document, and where in it; None if none does.

    numbers: paragraph of the document's source -> its number.
    """
    before, _, _ = document[:start].rpartition("\n\n")
    start_in_paragraph = start - (len(before) + 2 if before else 0)
    paragraph = document[start - start_in_paragraph :].partition("\n\n")[0]
    number = numbers.get(paragraph)
    if number is None or paragraph[start_in_paragraph : start_in_paragraph + len(text)] != text:
        return None
    return {"paragraph": number, "start": start_in_paragraph, "length": len(text)}
