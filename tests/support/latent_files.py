"""What the tests of the index and of the report share: the files of an SAE's latents, written by hand."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

N_LATENTS = 40
DEAD = (7, 23)  # they fire on no token
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
    """NAME.json, latents, top, promoted and scored meanings of N_LATENTS latents; returns the path of NAME.pth, which
    is not there. Row groups are small, so that a latent's rows lie in two of them."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    info: dict[str, Any] = {"n_latents": N_LATENTS, "k": 6, "d_model": 36, "site": "layers.1.attention_norm"}
    info |= {"model_dir": str(model_dir), "model": {"name": "tiny"}, "tokens_trained": 12345, "begin_of_text": False}
    (folder / "sae.json").write_text(json.dumps(info))
    alive = [i not in DEAD for i in range(N_LATENTS)]
    tenths = [[rng.randrange(300) * living for _ in range(10)] for living in alive]
    columns = {
        "latent": pa.array(range(N_LATENTS), pa.int32()),
        "frequency": pa.array([rng.choice([1e-4, 1e-3, 2e-3, 0.1]) * living for living in alive], pa.float32()),
        "mean": pa.array([rng.random() * living for living in alive], pa.float32()),
        "max": pa.array([(2 + rng.random()) * living for living in alive], pa.float32()),
        "sentences": pa.array([sum(row) for row in tenths]),
        "sentences_by_tenth": pa.FixedSizeListArray.from_arrays(pa.array(sum(tenths, [])), 10),
        "cofiring_latents": pa.array([[(i + 1) % N_LATENTS, 35] for i in range(N_LATENTS)], pa.large_list(pa.int32())),
        "cofiring_jaccard": pa.array([[0.5, 0.25]] * N_LATENTS, pa.large_list(pa.float32())),
    }
    pq.write_table(pa.table(columns), folder / "sae.latents.parquet")

    rows = []
    for latent in range(N_LATENTS):
        for aggregation in ("mean", "max", "last") if alive[latent] else ():
            texts = rng.sample(TEXTS, 4)
            for rank, text in enumerate([*texts[:2], texts[1], *texts[2:]]):  # one stands twice
                ids = tokenizer.encode(text)
                acts = [0.0] * len(ids)
                acts[rng.randrange(len(ids))] = 2.0 - rank / 4
                row = {"latent": latent, "aggregation": aggregation, "rank": rank, "activation": max(acts)}
                rows.append({**row, "sentence_idx": rank, "text": text, "token_ids": ids, "token_activations": acts})
    table = pa.Table.from_pylist(rows)
    types = {"latent": pa.int32(), "aggregation": pa.dictionary(pa.int32(), pa.string()), "rank": pa.int32()}
    types |= {"activation": pa.float32(), "token_ids": pa.large_list(pa.int32())}
    types |= {"token_activations": pa.large_list(pa.float16())}
    for name, type_ in types.items():
        column = table[name]
        if name == "token_activations":
            column = pa.array([np.array(a, np.float16) for a in column.to_pylist()], type_)
        table = table.set_column(table.schema.get_field_index(name), name, column.cast(type_))
    pq.write_table(table, folder / "sae.top.parquet", row_group_size=11)

    tokens = [[" the", "<b>", "\n"][: 1 + i % 3] for i in range(N_LATENTS)]
    scores = [[3.0, 2.5, 2.0][: 1 + i % 3] for i in range(N_LATENTS)]
    promoted = {"latent": range(N_LATENTS), "tokens": tokens, "scores": scores}
    promoted |= {"suppressed_tokens": tokens, "suppressed_scores": [[-s for s in row] for row in scores]}
    pq.write_table(pa.table({name: list(column) for name, column in promoted.items()}), folder / "sae.promoted.parquet")

    scored = {i: round(rng.random(), 2) for i in range(0, 30, 2)}
    write_meanings(folder / "sae.meaning_a.yaml", MEANINGS, scored)
    return folder / "sae.pth"


def write_meanings(path: Path, meanings: dict[int, tuple[str, float]], scores: dict[int, float] | None = None) -> None:
    import yaml

    entries = {i: {"certainty": certainty, "common_semantic": text} for i, (text, certainty) in meanings.items()}
    path.write_text(yaml.safe_dump(entries, sort_keys=False, allow_unicode=True), encoding="utf-8")
    if scores is not None:
        table = {"latent": list(scores), "balanced_accuracy": list(scores.values())}
        pq.write_table(pa.table(table), path.with_suffix(".scores.parquet"))


def known(value: float) -> float | None:
    return None if math.isnan(value) else value
