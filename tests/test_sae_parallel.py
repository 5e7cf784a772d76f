"""Training in several processes and through mishaps, equal to one uninterrupted process to the last bit.

Data x latent grids of 2 x 1, 1 x 2 and 2 x 2 processes follow the run of one process; so does a run that was killed,
stopped or lost a process and continued on the same or another number of processes. These are real processes, from
torchrun and gloo or forked from this one. KILLS=200 kills a run at that many random moments instead of a few.

    .venv/bin/python -m pytest tests/test_sae_parallel.py
"""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import PROJECT_DIR
from support.sae_runs import (
    BATCH,
    N_LATENTS,
    TRAINING,
    D,
    K,
    arguments,
    assert_same_run,
    assert_similar_run,
    checkpoints_of,
    is_complete,
    metrics_of,
    places,
    train,
    write_batches,
)
from support.training_with_mishaps import in_processes, train_with

from autoencoder.checkpoints import load_checkpoint, whole_checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_batches(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """One uninterrupted run in one process."""
    return train(data, tmp_path_factory.mktemp("trained"))


def one_run(data: Path, folder: Path, mishap: dict | None = None, bytes_path: Path | None = None, **options) -> dict:
    """What training_with_mishaps.py takes."""
    everything = {"data_dir": data, **places(folder), **TRAINING, **options}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in everything.items()}
    return {"options": plain, "mishap": mishap, "bytes_path": bytes_path and str(bytes_path)}


def torchrun(n_processes: int, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}", *words]
    process = subprocess.Popen(
        command, cwd=PROJECT_DIR, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # workers and all
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run_in(n_processes: int, *runs: dict) -> subprocess.CompletedProcess:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in runs]
        for one, free in zip(runs, sockets, strict=True):
            free.bind(("127.0.0.1", 0))
            one["port"] = free.getsockname()[1]
    return torchrun(n_processes, "tests/support/training_with_mishaps.py", json.dumps(runs))


# ---- several processes


class Pairs(NamedTuple):
    """Results of two processes: `folder`/GRID, and a copy of what each mishap left behind, `folder`/left/GRID."""

    folder: Path
    stopped: subprocess.CompletedProcess
    alone: subprocess.CompletedProcess
    corrupt: subprocess.CompletedProcess


@pytest.fixture(scope="module")
def pairs(data, tmp_path_factory) -> Pairs:
    """Three torchruns, because starting one takes longest: two whole runs, data parallel and latent parallel, and one
    whose torchrun gets SIGTERM; that one continued, and one of which a process is killed; that one continued, and one
    in which a process goes wrong."""
    folder = tmp_path_factory.mktemp("pairs")
    stop = {"what": "terminate torchrun", "method": "gradients", "call": 33, "rank": 0}
    kill = {"what": "kill", "method": "gradients", "call": 40, "rank": 0}  # the one that writes checkpoints
    corrupt = {"what": "corrupt", "method": "gradients", "call": 6, "rank": 1}
    stopped = run_in(
        2,
        one_run(data, folder / "2x1"),
        one_run(data, folder / "1x2", latent_parallel=2, checkpoint_minutes=1e-9),
        one_run(data, folder / "stopped", stop, latent_parallel=2),
    )
    shutil.copytree(folder / "stopped", folder / "left" / "stopped")
    alone = run_in(2, one_run(data, folder / "stopped", latent_parallel=2), one_run(data, folder / "alone", kill))
    shutil.copytree(folder / "alone", folder / "left" / "alone")
    last = run_in(
        2, one_run(data, folder / "alone"), one_run(data, folder / "corrupt", corrupt, replica_check_steps=10)
    )
    return Pairs(folder, stopped, alone, last)


@pytest.mark.parametrize("grid", ["2x1", "1x2"])
def test_two_processes_train_like_one(trained, pairs, grid):
    assert (pairs.folder / grid / "sae.pth").exists(), pairs.stopped.stderr
    assert "2 x cpu" in pairs.stopped.stdout
    assert any(line["dead_frac"] > 0 and line["train_aux"] > 0 for line in metrics_of(trained)[:-10])
    assert_similar_run(pairs.folder / grid / "sae.pth", trained)


def test_a_stopped_pair_leaves_its_last_step_and_continues(data, trained, pairs):
    """SIGTERM to torchrun: one sentence, a checkpoint of two slices; continued, to the last bit what it would have
    been; in one process nearly that."""
    left, done = pairs.folder / "left" / "stopped", pairs.stopped
    assert done.returncode != 0 and done.stderr.count("Stopped by SIGTERM after step ") == 1
    assert "Traceback" not in done.stderr.partition("Stopped by")[0]
    first, second = whole_checkpoints(left / "checkpoints")[-1]
    step = int(first.name[5:14])
    assert 33 <= step <= 45 and not (left / "sae.pth").exists()
    assert (first.name, second.name) == (f"step-{step:09d}.0-of-2.pt", f"step-{step:09d}.1-of-2.pt")
    assert_same_run(pairs.folder / "stopped" / "sae.pth", pairs.folder / "1x2" / "sae.pth")
    assert_similar_run(train(data, left), trained)


def test_a_process_left_alone_saves_its_last_step_and_continues(data, trained, pairs):
    """kill -9 of the process that writes the checkpoints; the other writes one and ends."""
    left, done = pairs.folder / "left" / "alone", pairs.alone
    assert done.returncode != 0 and "another process of this run has ended" in done.stderr
    assert checkpoints_of(left / "x") == ["step-000000025.0-of-1.pt", "step-000000040.0-of-1.pt"]
    assert "Continuing from step 40 " in pairs.corrupt.stdout
    assert_same_run(pairs.folder / "alone" / "sae.pth", pairs.folder / "2x1" / "sae.pth")
    assert_similar_run(train(data, left), trained)


def test_replicas_that_differ_stop_the_run(pairs):
    """Rank 1's weights change before step 7; they are compared after step 10."""
    assert pairs.corrupt.returncode != 0
    said = [line for line in pairs.corrupt.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "The parameters of rank 1 differ at step 10 from those of rank 0," in said[0]
    path = pairs.folder / "corrupt" / "sae.pth"
    assert not path.exists() and not checkpoints_of(path)


def test_four_processes_train_like_one_and_send_what_is_said(data, trained, tmp_path, capfd):
    """2 x 2 processes, and the bytes that a run without dead latents sends in each step."""
    grid = {"latent_parallel": 2, "micro_batch_size": 20}
    alive = {"dead_after_tokens": 10**9, "num_epochs": 1}
    runs = [
        one_run(data, tmp_path / "2x2", **grid),
        one_run(data, tmp_path / "bytes", bytes_path=tmp_path / "sent", latent_parallel=2, **alive),
    ]
    assert in_processes(4, *runs) == [0] * 4
    said = capfd.readouterr().out
    assert "4 x cpu" in said
    assert_similar_run(tmp_path / "2x2" / "sae.pth", trained)
    n = N_LATENTS // 2
    # Rings of two send all of it once, that of four one and a half times; 8 bytes a latent for what fired.
    gradients = 4 * (2 * n * D + n) + 8 * n + 1.5 * 4 * D
    # Half of the row's activations in bfloat16, candidates, a reconstruction; 4: the gradient's norm, for clipping.
    candidates = 2 * D * BATCH // 4 + 4 * BATCH // 2 * K + 4 * D * (BATCH // 2 + 1) + 4
    for rank in range(4):
        steps = [float(line) for line in (tmp_path / f"sent.{rank}").read_text().splitlines()]
        assert steps == [gradients + candidates] * len(steps) and len(steps) == 25
    told = f"{gradients / 1e6:.2f} MB of gradients and {(candidates - 4) / 1e6:.2f} MB between slices"
    assert told in said


def test_missing_data_under_torchrun(tmp_path):
    options = {"data_dir": tmp_path / "nowhere", **places(tmp_path), **TRAINING}
    done = torchrun(2, "sae_training.py", *arguments(options))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == [f"error: There is no folder {tmp_path / 'nowhere'}; run sae_preprocessing.py to make it."]
    assert "Traceback" not in done.stderr.partition("error: ")[0]
    assert not (tmp_path / "checkpoints").exists()


def test_slices_are_cut_anew(pairs):
    """A checkpoint of two slices, read as one and as three."""
    paths = whole_checkpoints(pairs.folder / "1x2" / "checkpoints")[-1]
    assert len(paths) == 2
    halves = [torch.load(path, weights_only=True) for path in paths]
    whole, thirds = load_checkpoint(paths, 0, 1), [load_checkpoint(paths, rank, 3) for rank in range(3)]
    for kind in ("sae", "exp_avg", "exp_avg_sq"):
        for name, dim in (("encoder.weight", 0), ("encoder.bias", 0), ("decoder.weight", 1)):
            expected = torch.cat([half[kind][name] for half in halves], dim)
            assert expected.shape[dim] == N_LATENTS and torch.equal(whole[kind][name], expected)
            assert torch.equal(torch.cat([third[kind][name] for third in thirds], dim), expected)
        assert all(torch.equal(part[kind]["b_pre"], halves[0][kind]["b_pre"]) for part in (whole, *thirds))
    silent = torch.cat([half["counters"]["silent_tokens"] for half in halves])
    assert torch.equal(torch.cat([third["counters"]["silent_tokens"] for third in thirds]), silent)


# ---- one process and its end


def forked(data: Path, folder: Path, mishap: dict | None = None, limit: int | None = None, **options) -> int:
    """Train in a process forked from this one; returns its exit code. limit: largest file it may write, in bytes."""

    def child() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        train_with(**one_run(data, folder, mishap, **options))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def test_killed_at_random_and_run_again_ends_like_an_unbroken_run(data, trained, tmp_path):
    """kill -9 before or during a step, or while a checkpoint is written or read, until a run reaches the end."""
    rng = random.Random(0)
    for kill in range(int(os.environ.get("KILLS", 4))):
        folder = tmp_path / str(kill)
        code, ends = -1, 0
        for _ in range(2):
            method = rng.choice(["gradients", "agree", "apply", "log", "save", "checkpoint", "check_replicas"])
            often = method not in ("save", "checkpoint", "check_replicas")
            mishap = {"what": "kill", "method": method, "call": rng.randrange(45) if often else rng.randrange(4)}
            minutes = rng.choice([1e-9, 1e-3, 15])
            code = forked(data, folder, mishap, checkpoints_per_epoch=4, checkpoint_minutes=minutes)
            ends += code == -signal.SIGKILL
        assert ends >= 1 or code == 0
        if code != 0:
            assert not (folder / "sae.pth").exists() and not is_complete(folder / "checkpoints")
            assert forked(data, folder, checkpoints_per_epoch=4) == 0
        assert_same_run(folder / "sae.pth", trained)


@pytest.mark.parametrize(("what", "code"), [("terminate", 143), ("interrupt", 130)])
def test_a_signal_is_answered_with_a_checkpoint(data, trained, tmp_path, capfd, what, code):
    mishap = {"what": what, "method": "gradients", "call": 31}
    assert forked(data, tmp_path, mishap) == code
    name = {"terminate": "SIGTERM", "interrupt": "SIGINT"}[what]
    said = f"Stopped by {name} after step 31, which is saved; run the same command again to continue."
    assert capfd.readouterr().err.splitlines()[-1] == said
    assert checkpoints_of(tmp_path / "x")[-1] == "step-000000031.0-of-1.pt"
    assert forked(data, tmp_path) == 0
    assert "Continuing from step 31 " in capfd.readouterr().out
    assert_same_run(tmp_path / "sae.pth", trained)


def test_a_full_disk_is_said_in_a_sentence(data, trained, tmp_path, capfd):
    """No file may grow beyond 20,000 bytes, but a checkpoint is larger."""
    assert forked(data, tmp_path, limit=20_000) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "Could not write" in line]
    assert len(said) == 1 and said[0].startswith("error: Could not write ") and "step-000000025.0-of-1.pt (" in said[0]
    assert said[0].endswith("free some disk and run again to continue.")
    assert not checkpoints_of(tmp_path / "x") and not list((tmp_path / "checkpoints").glob(".*.tmp"))
    assert_same_run(train(data, tmp_path), trained)


def test_wandb_offline_without_asking_and_one_run_for_both_parts(data, tmp_path):
    """The default mode with no key, on the real command line, ended by SIGTERM and restarted: run folders with one id,
    nothing read from the terminal."""
    hidden = ("WANDB_", "RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    options = {"data_dir": data, **places(tmp_path), **TRAINING, "wandb": "auto"}
    command = [sys.executable, "sae_training.py", *arguments(options)]
    common = {"cwd": PROJECT_DIR, "env": environment, "stdin": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **common)
    while process.poll() is None and not checkpoints_of(tmp_path / "x"):
        time.sleep(0.01)
    process.terminate()  # while the figures of the first checkpoint are drawn
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 143, err
    assert "Stopped by SIGTERM after step " in err
    done = subprocess.run(command, capture_output=True, timeout=240, **common)
    assert done.returncode == 0, done.stderr
    runs = list((tmp_path / "checkpoints" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(list(run.glob("*.wandb")) for run in runs)
    assert len({run.name.rpartition("-")[2] for run in runs}) == 1
    assert (tmp_path / "sae.curves.png").exists() and (tmp_path / "sae.frequencies.png").exists()
