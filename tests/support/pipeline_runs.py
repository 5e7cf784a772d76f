"""Shared by the tests of the stages: scripts called in this process or under torchrun, and handmade input files."""

import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PROJECT_DIR

from pipeline.run import run
from support.activation_folders import SITE as SITE
from support.activation_folders import write_activation_folder


def as_flags(options: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in options.items():
        flags += [f"--{name}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    return flags


def call(script: ModuleType, command_word: str | None = None, **options: Any) -> None:
    """Run a script's main in this process, as `python script.py [command] --name value ...` would."""
    words = [] if command_word is None else [command_word]
    with mock.patch.object(sys, "argv", [script.__file__, *words, *as_flags(options)]):
        run(script.main)


def refusal(capsys: pytest.CaptureFixture, script: ModuleType, **options: Any) -> str:
    """The error sentence of a script that refuses: exactly one, without a traceback, and with exit code 2."""
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
    """A dataset like the published one, a column `text`, in which sentence i of the seeded order is texts[i]."""
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
    starts = range(0, len(acts), sentences_a_shard)
    return write_activation_folder(folder, acts, starts, n_sentences, token_ids, sentences_dir)


def without_ranks() -> dict[str, str]:
    """The environment of a run without torchrun."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
