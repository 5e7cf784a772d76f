"""The tables beside an SAE: top sentences, examples, statistics of latents."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError

Aggregation = Literal["mean", "max", "last"]  # how a latent's activation over a sentence is measured


class Sentence(NamedTuple):
    """A sentence as the model read it."""

    token_ids: list[int]
    activations: list[float]  # of the latent, one a token


def top_sentences(
    path: Path, aggregation: str, n: int, wanted: list[range] | None
) -> Iterator[tuple[int, list[Sentence]]]:
    """Each latent's n strongest sentences, a row group of NAME.top.parquet in memory. wanted: all latents when None."""

    columns = ["latent", "token_ids", "token_activations"]
    rows = (pc.field("aggregation") == aggregation) & (pc.field("rank") < n)

    def entries() -> Iterator[tuple]:
        with pq.ParquetFile(path) as file:
            for i in range(file.num_row_groups):
                latents = file.read_row_group(i, columns=["latent"])["latent"].to_numpy()
                if wanted is None or any(((r.start <= latents) & (latents < r.stop)).any() for r in wanted):
                    table = file.read_row_group(i, columns=[*columns, "aggregation", "rank"]).filter(rows)
                    for batch in table.to_batches(max_chunksize=4096):
                        yield from zip(*(batch[name].to_pylist() for name in columns), strict=True)

    for latent, group in groupby(entries(), key=lambda entry: entry[0]):
        if wanted is None or any(latent in r for r in wanted):
            yield latent, [Sentence(token_ids, activations) for _, token_ids, activations in group]


def check_top_sentences(path: Path) -> None:
    """Raise InputError unless the file is what capture_top_activating_sentences.py writes."""

    mend = "run capture_top_activating_sentences.py to make it."
    if not path.is_file():
        raise InputError(f"There is no {path}; {mend}")
    try:
        missing = {"latent", "aggregation", "rank", "token_ids", "token_activations"} - set(pq.read_schema(path).names)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a parquet file ({error}); {mend}") from None
    if missing:
        raise InputError(f"{path} has no column {sorted(missing)[0]}; {mend}")
