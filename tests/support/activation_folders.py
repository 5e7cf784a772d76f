"""Makes a folder of captured activations by hand, with the writer and the manifest of capture_activations.py."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.activation_store import CAPTURE_STAGE, run_checksum, write_activations
from pipeline.manifests import MANIFEST, write_manifest
from pipeline.source import Source

SITE = "layers.1.attention_norm"


def write_activation_folder(
    folder: Path,
    acts: dict[int, Tensor],
    shard_starts: Sequence[int],
    n_sentences: int,
    token_ids: dict[int, list[int]] | None = None,
    sentences_dir: Path | str = "data/sentences",
) -> Path:
    """acts: sentence_idx -> (n_tokens, d_model), of sentences that have tokens; shard_starts: positions among them.

    token_ids: counted from 0 in each shard if they do not matter.
    """
    indices = sorted(acts)
    d_model = 0
    records = []
    for number, (first, last) in enumerate(zip(shard_starts, [*shard_starts[1:], len(indices)], strict=True)):
        members = indices[first:last]
        rows = torch.cat([acts[i] for i in members]).to(torch.bfloat16)
        d_model = rows.shape[1]
        counter = iter(range(len(rows)))
        ids = [token_ids[i] if token_ids else [next(counter) for _ in acts[i]] for i in members]
        records += write_activations(folder, f"acts-{number:05d}", rows, members, ids, shard_bytes=2**40)
    assert len(records) == len(shard_starts)
    source = Source(
        file="",
        model={"name": "tiny"},
        dataset={"sentences": n_sentences, "sentences_in_all": n_sentences, "seed": 42, "shards": []},
        activations=run_checksum(records),
        site=SITE,
        layer=1,
        d_model=d_model,
        begin_of_text=False,
        bos_id=256,
        max_tokens=192,
        rope_scaling_factor=32,
    )
    source = source.with_folder("model_dir", "models/tiny").with_folder("sentences_dir", sentences_dir)
    write_manifest(
        folder,
        CAPTURE_STAGE,
        complete=True,
        decides={},
        **source.as_json(folder / MANIFEST),
        dtype="bfloat16",
        counts={"sentences": len(indices), "tokens": sum(map(len, acts.values()))},
        shards=records,
    )
    return folder
