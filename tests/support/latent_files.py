"""Shared by the tests of the index and the report: handmade files of an SAE's latents."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latents.meanings import Meaning, Score, write_meanings, write_scores
from latents.tables import LATENTS, PROMOTED, STEERING, TOP

N_LATENTS = 40
DEAD = (7, 23)  # latents that fire on no token
MEANINGS = {  # latent -> meaning, certainty; latents 0 to 29, the others have none
    i: (text, 0.5 + (i * 7 % 10) / 20)
    for i, text in enumerate(
        [
            f"{noun} {detail}"
            for noun in ("Dogs", "cats & <b>birds</b>", "legal words", "École, été", "the word “of”", "numbers")
            for detail in ("in fiction", "at sea", "of Rome", "", "and dogs")
        ]
    )
}
TEXTS = ["hello the ring 12 é, seen", "再 llama\n\nédited <i>", "aaaa  on hello", "the end", "ring ring ring hello é"]


def write_latents(folder: Path, model_dir: Path, tokenizer, seed: int = 0) -> Path:
    """NAME.json, latents, top, promoted, steering and scored meanings of N_LATENTS latents; returns the path of
    NAME.pth, which is not there. Row groups are small, so that a latent's rows lie in two of them."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    info: dict[str, Any] = {"n_latents": N_LATENTS, "k": 6, "d_model": 36, "site": "layers.1.attention_norm"}
    info |= {"model_dir": str(model_dir), "model": {"name": "tiny"}, "tokens_trained": 12345, "begin_of_text": False}
    (folder / "sae.json").write_text(json.dumps(info))
    alive = [i not in DEAD for i in range(N_LATENTS)]
    tenths = [[rng.randrange(300) * living for _ in range(10)] for living in alive]
    columns = {
        "latent": list(range(N_LATENTS)),
        "frequency": [rng.choice([1e-4, 1e-3, 2e-3, 0.1]) * living for living in alive],
        "mean": [rng.random() * living for living in alive],
        "max": [(2 + rng.random()) * living for living in alive],
        "sentences": [sum(row) for row in tenths],
        "sentences_by_tenth": tenths,
        "cofiring_latents": [[(i + 1) % N_LATENTS, 35] for i in range(N_LATENTS)],
        "cofiring_jaccard": [[0.5, 0.25]] * N_LATENTS,
    }
    LATENTS.write(folder / "sae.latents.parquet", columns)

    rows = []
    for latent in range(N_LATENTS):
        for aggregation in ("mean", "max", "last") if alive[latent] else ():
            texts = rng.sample(TEXTS, 4)
            for rank, text in enumerate([*texts[:2], texts[1], *texts[2:]]):  # one occurs twice
                ids = tokenizer.encode(text)
                acts = [0.0] * len(ids)
                acts[rng.randrange(len(ids))] = 2.0 - rank / 4
                row = {"latent": latent, "aggregation": aggregation, "rank": rank, "activation": max(acts)}
                row |= {"sentence_idx": rank, "text": text, "token_ids": ids}
                rows.append({**row, "token_activations": np.array(acts, np.float16)})
    table = pa.Table.from_pylist(rows, schema=TOP.schema)
    pq.write_table(table, folder / "sae.top.parquet", row_group_size=11)

    tokens = [[" the", "<b>", "\n"][: 1 + i % 3] for i in range(N_LATENTS)]
    scores = [[3.0, 2.5, 2.0][: 1 + i % 3] for i in range(N_LATENTS)]
    promoted = {"latent": list(range(N_LATENTS)), "tokens": tokens, "scores": scores}
    promoted |= {"suppressed_tokens": tokens, "suppressed_scores": [[-s for s in row] for row in scores]}
    PROMOTED.write(folder / "sae.promoted.parquet", promoted)

    scores = [rng.random() / 4 if living else math.nan for living in alive]
    well = [score > 0.2 for score in scores]
    STEERING.write(
        folder / "sae.steering.parquet", {"latent": range(N_LATENTS), "output_score": scores, "steers_well": well}
    )

    scored = {i: round(rng.random(), 2) for i in range(0, 30, 2)}
    write_meaning_file(folder / "sae.meaning_a.yaml", MEANINGS, scored)
    return folder / "sae.pth"


def write_meaning_file(path: Path, named: dict[int, tuple[str, float]], scores: dict[int, float] | None = None) -> None:
    write_meanings(path, {latent: Meaning(text, certainty) for latent, (text, certainty) in named.items()})
    if scores is not None:
        write_scores(path, [Score(latent, score, None, 40) for latent, score in scores.items()])


def known(value: float) -> float | None:
    return None if math.isnan(value) else value
