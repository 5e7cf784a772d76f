"""Shared by the tests of the scripts that ask Claude: handmade top sentences, a script run until a kill.

Used by test_send_batches.py, test_retrieve_batches.py and test_direct.py.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import PROJECT_DIR, tiny_ranks

from latents.tables import TOP
from llama_3.tokenizer import TiktokenTokenizer, write_ranks
from support.pipeline_runs import as_flags

TOKENIZER = TiktokenTokenizer(tiny_ranks())


def write_top_sentences(folder: Path, sentences: dict[int, list[str]], row_group_size: int = 7) -> Path:
    """NAME.top.parquet with these sentences of each latent, strongest first, and a folder with the tokenizer.

    The sentences by max and last are different. Activations decrease from token to token: 8, 7, 6, ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_ranks(folder / "tokenizer.model", tiny_ranks())
    rows: list[dict[str, Any]] = []
    for latent, texts in sentences.items():
        for aggregation in ("mean", "max", "last"):
            for rank, text in enumerate(texts):
                ids = TOKENIZER.encode(text if aggregation == "mean" else f"{aggregation} {text}")
                rows.append(
                    {
                        "latent": latent,
                        "aggregation": aggregation,
                        "rank": rank,
                        "activation": float(len(texts) - rank),
                        "sentence_idx": rank,
                        "text": text + " that the model did not read",
                        "token_ids": ids,
                        "token_activations": np.array([max(0.0, 8.0 - i) for i in range(len(ids))], np.float16),
                    }
                )
    table = pa.Table.from_pylist(rows, schema=TOP.schema)
    path = folder / "sae.top.parquet"
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def asking_options(folder: Path, sentences: dict[int, list[str]]) -> dict[str, Any]:
    """The options with which send and direct ask about these sentences, without a question on the terminal."""
    return {
        "top_sentences_dict_filepath": write_top_sentences(folder, sentences),
        "model_dir": folder,
        "response_ids_filepath": folder / "ids.jsonl",
        "response_output_dir": folder / "answers",
        "min_sentences": 1,
        "yes": True,
    }


def command(script: ModuleType, options: dict[str, Any]) -> list[str]:
    return [sys.executable, Path(script.__file__).name, *as_flags(options)]


def kill_when(arrived: threading.Event, script: ModuleType, options: dict[str, Any]) -> None:
    """Run a script and kill it, as kill -9 does, once the server has seen the call that hangs."""
    process = subprocess.Popen(
        command(script, options), cwd=PROJECT_DIR, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not arrived.wait(0.05):
            assert process.poll() is None, "it ended before the call that hangs"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def in_a_process(script: ModuleType, options: dict[str, Any]) -> subprocess.CompletedProcess:
    """Run the real command line to its end."""
    return subprocess.run(command(script, options), cwd=PROJECT_DIR, capture_output=True, text=True, timeout=100)
