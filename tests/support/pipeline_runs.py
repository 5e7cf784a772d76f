"""What the tests of the stages share: scripts called in this process or under torchrun, and input files by hand."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PROJECT_DIR

from pipeline.files import sha256
from pipeline.manifests import write_manifest
from pipeline.run import run

SITE = "layers.1.attention_norm"


def as_flags(options: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in options.items():
        flags += [f"--{name}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    return flags


def call(script, **options: Any) -> None:
    """Run a script's main in this process, as `python script.py --name value ...` would."""
    with mock.patch.object(sys, "argv", [script.__file__, *as_flags(options)]):
        run(script.main)


def refusal(capsys, script, **options: Any) -> str:
    """The sentence with which a script refuses; it must be one, without traceback, and the exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        call(script, **options)
    assert exit_.value.code == 2
    return the_sentence(capsys.readouterr().err)


def the_sentence(stderr: str) -> str:
    sentences = [line.removeprefix("error: ") for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, stderr
    return sentences[0]


def torchrun(n_processes: int, script: str, **options: Any) -> subprocess.CompletedProcess:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}", script]
    return subprocess.run(
        [sys.executable, *command, *as_flags(options)], cwd=PROJECT_DIR, capture_output=True, text=True, timeout=120
    )


def some_texts(n: int, seed: int = 0) -> list[str]:
    """Sentences of 1 to 25 words; every ninth is empty."""
    rng = random.Random(seed)
    words = ["the", "hello", "ring", "12", "é", "seen", "aaaa", "on", "\n\n", "llama", "edited", "“", "再"]
    return ["" if i % 9 == 4 else " ".join(rng.choices(words, k=rng.randint(1, 25))) for i in range(n)]


def write_sentences(folder: Path, texts: list[str]) -> Path:
    """A dataset of the published kind, a column `text`, such that sentence i in the seeded order is texts[i]."""
    import numpy as np

    folder.mkdir(parents=True)
    rows: list[str] = [""] * len(texts)
    for i, row in enumerate(np.random.default_rng(42).permutation(len(texts))):
        rows[row] = texts[i]
    pq.write_table(pa.table({"text": rows}), folder / "sentences.parquet")
    return folder


def write_activations(
    folder: Path,
    sentences_dir: Path,
    n_sentences: int,
    acts: dict[int, Any],
    token_ids: dict[int, list[int]],
    sentences_a_shard: int,
) -> Path:
    """A folder as capture_activations.py writes it, from acts[sentence_idx], each (n_tokens, d_model)."""
    import torch

    from pipeline.activation_store import CAPTURE_STAGE, write_shard

    records = []
    indices = sorted(acts)
    for start in range(0, len(indices), sentences_a_shard):
        some = indices[start : start + sentences_a_shard]
        path = folder / f"acts-{len(records):05d}-00.safetensors"
        rows = torch.cat([acts[i] for i in some]).to(torch.bfloat16)
        tensors = {
            "acts": rows,
            "token_ids": torch.tensor([t for i in some for t in token_ids[i]], dtype=torch.int32),
            "sentence_idx": torch.tensor(some),
            "offsets": torch.tensor([0, *(len(acts[i]) for i in some)]).cumsum(0),
        }
        write_shard(path, tensors)
        size = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
        records.append(size | {"first_sentence_idx": some[0], "n_sentences": len(some), "n_tokens": len(rows)})
    write_manifest(
        folder,
        CAPTURE_STAGE,
        complete=True,
        sentences_dir=str(sentences_dir),
        site=SITE,
        begin_of_text=False,
        d_model=records and rows.shape[1],
        dataset={"sentences": n_sentences, "sentences_in_all": n_sentences, "seed": 42},
        counts={"tokens": sum(r["n_tokens"] for r in records)},
        shards=records,
    )
    return folder


def without_ranks() -> dict[str, str]:
    """The environment of a run that is not torchrun's."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
