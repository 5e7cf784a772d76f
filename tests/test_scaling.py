"""Processes on this machine in place of the GPUs of one node or two: their grids, and the loss of a node.

Eight processes forked from this one train in grids of 8 x 1, 2 x 4 and 1 x 8. Two torchruns on 127.0.0.1 are two nodes,
of which one is lost and replaced. Also: the numbers in docs/scaling.md.

    .venv/bin/python -m pytest tests/test_scaling.py
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT_DIR
from support.sae_runs import TRAINING, assert_similar_run, metrics_of, places, train, write_batches
from support.training_with_mishaps import free_port, in_processes

import sae_training
from autoencoder.step import bytes_sent

GRIDS = {"8x1": 1, "2x4": 4, "1x8": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_batches(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    """An epoch in one process."""
    return train(data, tmp_path_factory.mktemp("alone"), num_epochs=1)


def options_of(data: Path, folder: Path, **changed) -> dict:
    options = {"data_dir": data, **places(folder), **TRAINING, "num_epochs": 1, **changed}
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def assert_same_weights(path: Path, other: Path) -> None:
    """To 1e-5, and the losses of every step."""
    assert_similar_run(path, other)
    states = [torch.load(each, weights_only=True) for each in (path, other)]
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_eight_processes_train_like_one(data, alone, tmp_path):
    runs = [{"options": options_of(data, tmp_path / grid, latent_parallel=width)} for grid, width in GRIDS.items()]
    assert in_processes(8, *runs) == [0] * 8
    assert any(line["train_aux"] > 0 for line in metrics_of(alone)[:-5])
    for grid in GRIDS:
        assert_same_weights(tmp_path / grid / "sae.pth", alone)


@pytest.mark.slow
def test_a_node_is_lost_and_replaced(data, alone, tmp_path):
    """Two nodes of a process each that divide the batch, one folder of checkpoints. kill -9 of the second node's
    torchrun during step 12 takes its process along; the first node's torchrun starts its own anew once a third one
    joins, and they continue from the last checkpoint. Half of the time is torch's: a node counts as lost after 15 s."""
    # Otherwise torch 2.13's agent of rank 0 keeps its first store, and never tells a new node where that is.
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    port = free_port()

    def node(number: int, mishap: dict | None = None) -> subprocess.Popen:
        rendezvous = f"is_host={int(number == 0)},read_timeout=240"
        run = {"options": options_of(data, tmp_path, checkpoint_minutes=1e-6), "mishap": mishap}
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        command += ["--max_restarts=1", "--rdzv_id=run", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
        command += [f"--rdzv_conf={rendezvous}", "--monitor_interval=0.1", "--local_addr=127.0.0.1"]
        command += ["tests/support/training_with_mishaps.py", json.dumps([run])]
        with open(tmp_path / f"{number}.out", "w") as out:
            return subprocess.Popen(
                command, cwd=PROJECT_DIR, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    mishap = {"what": "kill torchrun", "method": "gradients", "call": 11, "rank": None}
    nodes = [node(0), node(1, mishap)]
    try:
        assert nodes[1].wait(300) == -signal.SIGKILL
        nodes.append(node(2))
        codes = [nodes[0].wait(300), nodes[2].wait(300)]
    finally:
        for process in nodes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)
    said = [(tmp_path / f"{number}.out").read_text() for number in range(3)]
    assert codes == [0, 0], said
    found = [int(n) for text in said for n in re.findall(r"Continuing from step (\d+) ", text)]
    assert found and set(found) <= {10, 11}
    assert_same_weights(tmp_path / "sae.pth", alone)


# ---- how many slices


@pytest.mark.parametrize(
    ("n_processes", "per_node", "n_latents", "expected"),
    [(1, 1, 2**16, 1), (8, 8, 2**16, 8), (64, 8, 2**16, 8), (6, 6, 2**16, 2), (12, 8, 2**16, 4)],
)
def test_the_gpus_of_a_node_share_an_sae(monkeypatch, n_processes, per_node, n_latents, expected):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_node))
    assert sae_training.slices_by_default(n_latents, n_processes) == 1  # CPUs
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sae_training.slices_by_default(n_latents, n_processes) == expected


# ---- docs/scaling.md


def test_bytes_on_the_page_are_those_of_the_formula():
    """At the published size, with a bfloat16 encoder, in MB; dead latents in the last column, as many as are used."""
    page = (PROJECT_DIR / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) x (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert len(rows) == 7
    for n_data, width, *shown in rows:
        size = (3072, 2**16, 64, 8192, int(n_data), int(width), 2)
        data, slices = bytes_sent(*size)
        dead = bytes_sent(*size, n_candidates=min(2048, 2**16 // int(width)))[1] - slices
        assert [float(value) for value in shown] == pytest.approx([data / 1e6, slices / 1e6, dead / 1e6], abs=0.051)
