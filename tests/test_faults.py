"""The data stages under kill -9 and on a full disk: the output equals an uninterrupted run's, byte for byte.

A stage is killed with all its processes once its output folder has a random number of files, and started again. Only
the manifest's time of writing, and the commit if one is made meanwhile, may differ. A few kills per stage by default;
FAULT_KILLS=10 for ten.

    FAULT_KILLS=10 .venv/bin/python -m pytest tests/test_faults.py
"""

import contextlib
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PROJECT_DIR, TINY_PARAMS
from support.pipeline_runs import SITE, as_flags, call, refusal, some_texts, without_ranks, write_sentences
from support.sae_runs import write_store

import capture_activations
import openwebtext_sentences_dataset
import sae_preprocessing
from pipeline import manifests
from pipeline.manifests import MANIFEST, read_manifest
from pipeline.sentences import SentenceDataset

N_KILLS = int(os.environ.get("FAULT_KILLS", 0))  # 0: a few
TEXTS = some_texts(400)
WIDTH = 240  # of the activations that are preprocessed


# ---- what is compared


def contents(folder: Path) -> dict[str, bytes]:
    """Every file except locks, by name; manifests without their time and commit of writing."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock")):
        data = path.read_bytes()
        if path.name == MANIFEST:
            manifest = json.loads(data)
            assert manifest.pop("written_at") and "git_commit" in manifest
            del manifest["git_commit"]
            data = json.dumps(manifest).encode()
        found[str(path.relative_to(folder))] = data
    return found


def n_files(folder: Path) -> int:
    """Number of files in the folder, which may be changing."""
    return sum(len(files) for _, _, files in os.walk(folder))


# ---- killing


def family(pid: int) -> list[int]:
    """The process and all its descendants: torchrun's workers have their own process groups."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(descendant for child in children for descendant in family(int(child)))]


def kill(process: subprocess.Popen) -> None:
    pids = family(process.pid)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/maps").exists() and family_state(pid) != "Z" for pid in pids):  # they hold its lock
        assert time.monotonic() < until
        time.sleep(0.01)


def family_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def survives_kills(command: list[str], out: Path, expected: dict[str, bytes], n_kills: int, most_files: int) -> None:
    """Kill the command n_kills times, once `out` has a random number of files up to most_files, then let it finish;
    compare whenever it finishes."""
    rng = random.Random(n_kills)
    start = lambda: subprocess.Popen(
        command, cwd=PROJECT_DIR, env=without_ranks(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    done, tries = 0, 0
    while done < n_kills:
        tries += 1
        assert tries <= 4 * n_kills + 4, "it ends before it can be killed"
        at_least = rng.randint(min(n_files(out) + 1, most_files), most_files)
        process = start()
        while process.poll() is None and n_files(out) < at_least:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        if process.poll() is None:
            kill(process)
            process.stderr.close()
            done += 1
            continue
        assert process.returncode == 0, process.stderr.read()
        process.stderr.close()
        assert contents(out) == expected
        shutil.rmtree(out)
    process = start()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert contents(out).keys() == expected.keys()
    assert contents(out) == expected


# ---- the stages


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    rng = random.Random(1)
    texts = [". ".join(f"Sentence {rng.random()} of document {i}" for _ in range(200)) for i in range(40)]
    path = tmp_path_factory.mktemp("documents") / "documents.parquet"
    pq.write_table(pa.table({"text": texts}), path)
    return path


def sentences_options(documents: Path, out: Path) -> dict:
    options = {"punkt": "corpus", "punkt_train_mb": 0.05, "shard_mb": 0.02, "num_processes": 1}
    return {"input_path": documents, "output_dir": out, **options}


@pytest.fixture(scope="module")
def sentences_dir(tmp_path_factory) -> Path:
    folder = write_sentences(tmp_path_factory.mktemp("faults") / "sentences", TEXTS)
    SentenceDataset(folder)  # makes what a first reader makes
    return folder


def capture_options(model_dir: Path, sentences_dir: Path, out: Path) -> dict:
    options = {"dtype": "float32", "batch_tokens": 200, "window_sentences": 16, "sites": [SITE, "layers.0.resid_pre"]}
    shard_gb = 100 * 2 * TINY_PARAMS["dim"] / 1e9
    return {"model_dir": model_dir, "sentences_dir": sentences_dir, "output_dir": out, "shard_gb": shard_gb, **options}


@pytest.fixture(scope="module")
def activations(tmp_path_factory) -> Path:
    generator = torch.Generator().manual_seed(0)
    acts = {i: torch.randn(1 + i % 7, WIDTH, generator=generator) for i in range(400)}
    return write_store(tmp_path_factory.mktemp("faults") / SITE, acts, list(range(0, 400, 10)), 400)


def preprocessing_options(activations: Path, out: Path) -> dict:
    options = {"batch_size": 16, "shard_gb": 17 * 2 * WIDTH / 1e9, "num_processes": 1}  # one batch per shard
    return {"input_dir": activations, "output_dir": out, **options}


def uninterrupted(script, options: dict) -> dict[str, bytes]:
    """What the stage writes without interruption; the folder is emptied again, for another run in the same place."""
    out = Path(options["output_dir"])
    call(script, **options)
    expected = contents(out)
    shutil.rmtree(out)
    assert len(expected) > 5
    return expected


@pytest.mark.slow
def test_sentences_survive_kills(documents, tmp_path):
    options = sentences_options(documents, tmp_path / "out")
    expected = uninterrupted(openwebtext_sentences_dataset, options)
    command = [sys.executable, "openwebtext_sentences_dataset.py", *as_flags(options)]
    survives_kills(command, tmp_path / "out", expected, N_KILLS or 2, len(expected))


@pytest.mark.slow
def test_capture_survives_kills_under_torchrun(tiny_model_dir, sentences_dir, tmp_path):
    """Two processes against one."""
    options = capture_options(tiny_model_dir, sentences_dir, tmp_path / "out")
    expected = uninterrupted(capture_activations, options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "capture_activations.py", *as_flags(options)]
    survives_kills(command, tmp_path / "out", expected, N_KILLS or 1, len(expected) + 2 * len(TEXTS) // 16)


@pytest.mark.slow
def test_workers_end_with_a_killed_torchrun(tiny_model_dir, sentences_dir, tmp_path):
    """kill -9 of torchrun alone: its workers do not keep the folder locked, and the command can continue."""
    options = capture_options(tiny_model_dir, sentences_dir, tmp_path / "out")
    expected = uninterrupted(capture_activations, options)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*start, "capture_activations.py", *as_flags(options)]
    process = subprocess.Popen(command, cwd=PROJECT_DIR, env=without_ranks(), stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while n_files(tmp_path / "out") < 8:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    while not all(is_free(lock) for lock in (tmp_path / "out").glob(".*lock")):
        assert time.monotonic() < until
        time.sleep(0.05)
    call(capture_activations, **options)
    assert contents(tmp_path / "out") == expected


def is_free(lock: Path) -> bool:
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.parametrize("n_processes", [1, 2] if N_KILLS else [1])
@pytest.mark.slow
def test_preprocessing_survives_kills(activations, tmp_path, n_processes):
    options = preprocessing_options(activations, tmp_path / "out")
    expected = uninterrupted(sae_preprocessing, options)
    changed = json.loads(expected[MANIFEST])
    changed["config"]["num_processes"] = n_processes
    expected[MANIFEST] = json.dumps(changed).encode()
    command = [sys.executable, "sae_preprocessing.py", *as_flags(options | {"num_processes": n_processes})]
    survives_kills(command, tmp_path / "out", expected, N_KILLS or 2, 40 + len(expected))


# ---- a full disk


@contextlib.contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """Writing more fails with an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sentences", "capture", "preprocessing, pass 1", "preprocessing, pass 2"])
def test_a_full_disk_stops_with_a_sentence_and_the_run_continues(
    name, documents, tiny_model_dir, sentences_dir, activations, tmp_path, capsys
):
    out = tmp_path / "out"
    large = {"shard_gb": 129 * 2 * WIDTH / 1e9}  # larger than what the first pass writes
    script, options, room = {
        "sentences": lambda: (openwebtext_sentences_dataset, sentences_options(documents, out), 5000),
        "capture": lambda: (capture_activations, capture_options(tiny_model_dir, sentences_dir, out), 7000),
        "preprocessing, pass 1": lambda: (sae_preprocessing, preprocessing_options(activations, out), 15_000),
        "preprocessing, pass 2": lambda: (sae_preprocessing, preprocessing_options(activations, out) | large, 40_000),
    }[name]()
    expected = uninterrupted(script, options)
    with files_of_at_most(room):
        said = refusal(capsys, script, **options)
    assert f"Could not write {out}" in said and "free some disk and run again to continue" in said
    left = contents(out)
    assert left and not [path for path in left if path.endswith(".tmp")]
    finished = {path: data for path, data in left.items() if path in expected and MANIFEST not in path}
    assert finished.items() <= expected.items()
    call(script, **options)
    assert contents(out) == expected


def test_a_full_disk_while_the_sentences_are_made_ready(tiny_model_dir, tmp_path, capsys):
    folder = write_sentences(tmp_path / "sentences", TEXTS)
    options = capture_options(tiny_model_dir, folder, tmp_path / "out")
    with files_of_at_most(4000):
        said = refusal(capsys, capture_activations, **options)
    assert f"Could not write {folder / 'sentences.arrow'}" in said and not (tmp_path / "out").exists()
    assert [p.name for p in folder.iterdir() if not p.name.endswith(".lock")] == ["sentences.parquet"]


@pytest.mark.skipif(os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="mounting needs root")
@pytest.mark.slow
def test_a_disk_that_is_really_full(activations, tmp_path, capsys):
    """A tmpfs with room for the first pass, 1.1 MB, and part of the second."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", tmp_path / "."], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(mounted.stderr)
    try:
        options = preprocessing_options(activations, tmp_path / "out")
        with_room: Callable[..., None] = lambda folder, needed: None  # it would notice beforehand
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(manifests, "require_disk", with_room)
            said = refusal(capsys, sae_preprocessing, **options)
        assert "No space left" in said and "free some disk" in said
        assert list((tmp_path / "out").glob("train-*")) and not list((tmp_path / "out").rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=8m", tmp_path / "."], check=True)
        call(sae_preprocessing, **options)
        assert read_manifest(tmp_path / "out", "sae_preprocessing.py")["complete"]
    finally:
        subprocess.run(["umount", "-l", tmp_path / "."], check=True)
