"""Training: two processes against one, an interrupted run against an unbroken one, the result against plain numpy.

Also: the schedule, what metrics.jsonl holds, that a sparse dictionary is learnt and dead latents return, refusals.
The batches come from sae_preprocessing.py.

    .venv/bin/python -m pytest tests/test_sae_training.py
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT_DIR
from helpers_sae import arguments, is_complete, refusal, run_script, sparse_dictionary_data, write_store
from safetensors.torch import load_file

import sae_preprocessing
import sae_training
import stage
from activation_batches import Batches
from sae import TopKSparseAutoencoder, load_sae_model, save_sae
from sae_training import learning_rate

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")

D, N_LATENTS, K = 14, 96, 4
STORED, BATCH = 32, 96  # rows of a stored batch, rows of a step
ROWS = 3000
OPTIONS = {
    "n_latents": N_LATENTS,
    "k": K,
    "k_aux": 8,
    "dead_after_tokens": 150,
    "num_epochs": 3,
    "batch_size": BATCH,
    "learning_rate": 8e-3,
    "warmup_steps": 5,
    "betas": (0.85, 0.999),
    "seed": 7,
    "wandb": "off",
}
STATE = ("b_pre", "encoder.weight", "encoder.bias", "decoder.weight")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Batches of rows that are sums of three of 30 directions, in several shards."""
    folder = tmp_path_factory.mktemp("data")
    rows = sparse_dictionary_data(ROWS, D, n_true=30, n_active=3, seed=0)
    sentences = dict(enumerate(rows.split(10)))
    write_store(folder / "site", sentences, [0, 170], len(sentences))
    options = {"batch_size": STORED, "validation_fraction": 0.2, "num_processes": 1, "shard_gb": 801 * 2 * D / 1e9}
    run_script(sae_preprocessing, input_dir=folder / "site", output_dir=folder / "batches", **options)
    return folder / "batches"


def places(folder: Path) -> dict[str, Path]:
    return {"model_save_path": folder / "sae.pth", "checkpoint_dir": folder / "checkpoints"}


def train(data: Path, folder: Path, **options) -> Path:
    """Train in this process; returns the SAE's path. The figure, which costs most, has its own test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae_training.Training, "draw", lambda *args: None)
        run_script(sae_training, data_dir=data, **places(folder), **OPTIONS | options)
    return folder / "sae.pth"


def metrics_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.with_suffix(".metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """One unbroken run in one process."""
    return train(data, tmp_path_factory.mktemp("trained"))


def manifest_of(data: Path) -> dict:
    return json.loads((data / "manifest.json").read_text())


def steps_per_epoch(data: Path, batch_size: int = BATCH) -> int:
    return manifest_of(data)["counts"]["train"] // STORED // (batch_size // STORED)


# ---- reading


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_stored_batch_is_read_once_an_epoch(data, world_size):
    """The processes' shares of a step, put together, are its batch."""
    manifest = manifest_of(data)
    assert len(manifest["shards"]) > 2
    batches = Batches(str(data), manifest, BATCH, seed=3)
    rows = torch.cat([load_file(data / record["file"])["acts"] for record in manifest["shards"]])
    stored = rows.view(torch.int16).reshape(-1, STORED * D)
    assert batches.steps_per_epoch == steps_per_epoch(data) == len(stored) // (BATCH // STORED)
    orders = []
    for epoch in range(2):
        read = []
        for step in range(batches.steps_per_epoch):
            shares = [batches.read(epoch, step, rank, world_size) for rank in range(world_size)]
            assert all(share.shape == (BATCH // world_size, D) for share in shares)
            read += list(torch.cat(shares).view(torch.int16).reshape(-1, STORED * D).numpy().copy())
        keys = [row.tobytes() for row in read]
        assert len(set(keys)) == len(keys) == batches.steps_per_epoch * (BATCH // STORED)
        assert Counter(keys) <= Counter(row.tobytes() for row in stored.numpy())
        orders.append(keys)
    assert orders[0] != orders[1]


# ---- schedule and metrics


def test_learning_rate_schedule():
    rates = [learning_rate(step, 100, 0.5, 0.2, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * i for i in range(1, 11)])
    assert rates[10] == max(rates) == 0.5
    assert rates[-1] == min(rates[10:]) == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    middle = 10 + 89 / 3  # a third of the way down: cos 60 degrees
    below, above = (learning_rate(step, 100, 0.5, 0.2, 10) for step in (math.floor(middle), math.ceil(middle)))
    assert above < 0.1 + 0.4 * 0.75 < below
    assert learning_rate(0, 1, 0.5, 0.2, 0) == 0.5  # a single step


def test_metrics(data, trained):
    per_epoch = steps_per_epoch(data)
    lines = metrics_of(trained)
    n_steps = per_epoch * OPTIONS["num_epochs"]
    assert [line["step"] for line in lines] == list(range(1, n_steps + 1))
    for line in lines:
        assert line["tokens"] == line["step"] * BATCH
        assert line["train_total"] == pytest.approx(line["train_main"] + line["train_aux"] / 32, rel=1e-6)
        assert 0 <= line["dead_frac"] <= 1
        assert (line["dead_frac"] > 0) == (line["longest_silence_tokens"] >= OPTIONS["dead_after_tokens"])
        assert line["longest_silence_tokens"] <= line["tokens"]
        expected = learning_rate(line["step"] - 1, n_steps, 8e-3, 1 / 5, 5)
        assert line["learning_rate"] == pytest.approx(expected, rel=1e-9)
        assert ({"val_main", "val_fvu", "val_l0"} <= line.keys()) == (line["step"] % per_epoch == 0)
        assert any(key.startswith("val_") for key in line) == (line["step"] % per_epoch == 0)
    assert any(line["dead_frac"] > 0 and line["train_aux"] > 0 for line in lines)  # the aux loss was at work


def test_fewer_log_points_than_steps(data, tmp_path):
    per_epoch = steps_per_epoch(data)
    lines = metrics_of(train(data, tmp_path, num_epochs=2, logs_per_epoch=4))
    every = per_epoch // 4
    expected = [step for step in range(1, 2 * per_epoch + 1) if step % every == 0 or step % per_epoch == 0]
    assert [line["step"] for line in lines] == expected


# ---- the result


def test_learns_a_sparse_dictionary(trained):
    lines = metrics_of(trained)
    ends = [line["val_fvu"] for line in lines if "val_fvu" in line]
    assert ends[-1] < 0.3 and ends[-1] < ends[0]
    assert ends[-1] < 0.5 * lines[0]["train_fvu"]
    assert lines[-1]["train_main"] < 0.5 * lines[0]["train_main"]


def test_saved_sae_and_its_json(data, trained):
    state = torch.load(trained, weights_only=True)
    assert state.keys() == set(STATE)
    torch.testing.assert_close(state["decoder.weight"].norm(dim=0), torch.ones(N_LATENTS))
    assert state["decoder.weight"].shape == (D, N_LATENTS) and state["encoder.weight"].shape == (N_LATENTS, D)

    info, manifest, last = (
        json.loads(trained.with_suffix(".json").read_text()),
        manifest_of(data),
        metrics_of(trained)[-1],
    )
    for name in ("model", "site", "layer", "begin_of_text", "bos_id", "max_tokens", "dataset"):
        assert info[name] == manifest[name]
    assert (info["k"], info["normalize_eps"], info["tokens_trained"]) == (K, 1e-5, last["tokens"])
    assert info["quality"] == {name: last[name] for name in ("val_main", "val_fvu", "val_l0", "dead_frac")}
    assert info["config"]["seed"] == OPTIONS["seed"]


def test_quality_equals_numpy_on_the_held_out_rows(data, trained):
    sae = load_sae_model(trained)
    records = manifest_of(data)["validation_shards"]
    x = torch.cat([load_file(data / record["file"])["acts"] for record in records])
    z = sae.normalize(x)[0].double().numpy()
    values, indices = sae.encode(x)
    z_hat = sae.decode(values, indices).double().numpy()
    error = ((z - z_hat) ** 2).sum()
    last = metrics_of(trained)[-1]
    assert last["val_main"] == pytest.approx(error / z.size, rel=1e-5)
    assert last["val_fvu"] == pytest.approx(error / ((z - z.mean(0)) ** 2).sum(), rel=1e-5)
    assert last["val_l0"] == pytest.approx((values > 0).sum().item() / len(z), rel=1e-9)


def test_starts_at_the_mean_of_what_the_sae_sees(data, tmp_path):
    """With a learning rate of 0 the result is the start."""
    start = load_sae_model(train(data, tmp_path, num_epochs=1, learning_rate=0.0))
    mean = load_file(data / "statistics.safetensors")["mean_normalized"]
    torch.testing.assert_close(start.b_pre, mean.float())
    torch.testing.assert_close(start.encoder.weight, start.decoder.weight.t())
    assert not start.encoder.bias.any()


def test_starts_from_a_given_sae(data, trained, tmp_path):
    path = train(data, tmp_path, num_epochs=1, learning_rate=0.0, model_load_path=trained)
    first, second = (torch.load(p, weights_only=True) for p in (trained, path))
    for name in STATE:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-6)


def test_auxiliary_loss_revives_dead_latents(data, tmp_path):
    """Half of the latents start too weak to be kept: they stay dead without the auxiliary loss, and return with it."""
    n = 96
    start = TopKSparseAutoencoder(D, n, K)
    mean = load_file(data / "statistics.safetensors")["mean_normalized"]
    start.initialize(mean.float(), torch.Generator().manual_seed(0))
    with torch.no_grad():
        start.encoder.weight[n // 2 :] *= 0.1
        start.encoder.bias[n // 2 :] = -0.3
    save_sae(start, tmp_path / "start.pth", {})
    options = {"n_latents": n, "k_aux": 24, "num_epochs": 4, "model_load_path": tmp_path / "start.pth"}
    last, weights = {}, {}
    for coeff in (0.0, 1 / 32):
        path = train(data, tmp_path / str(coeff), aux_loss_coeff=coeff, **options)
        last[coeff], weights[coeff] = metrics_of(path)[-1], torch.load(path, weights_only=True)
    assert last[0.0]["dead_frac"] >= 0.5
    torch.testing.assert_close(weights[0.0]["encoder.weight"][n // 2 :], start.encoder.weight[n // 2 :].detach())
    assert last[1 / 32]["dead_frac"] < 0.75 * last[0.0]["dead_frac"]
    assert last[1 / 32]["val_fvu"] < last[0.0]["val_fvu"]


# ---- several processes


def torchrun(n_processes: int, options: dict) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    command += ["sae_training.py", *arguments(options)]
    process = subprocess.Popen(
        command, cwd=PROJECT_DIR, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # workers and all
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_two_processes_train_like_one(data, trained, tmp_path):
    done = torchrun(2, {"data_dir": data, **places(tmp_path), **OPTIONS})
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    one, two = metrics_of(trained), metrics_of(tmp_path / "sae.pth")
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (name, a["step"])
    first, second = (torch.load(p, weights_only=True) for p in (trained, tmp_path / "sae.pth"))
    for name in STATE:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=2e-5)


def test_missing_data_under_torchrun(tmp_path):
    done = torchrun(2, {"data_dir": tmp_path / "nowhere", **places(tmp_path), **OPTIONS})
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == [f"error: There is no folder {tmp_path / 'nowhere'}; run sae_preprocessing.py to make it."]
    assert "Traceback" not in done.stderr.partition("error: ")[0]
    assert not (tmp_path / "checkpoints").exists()


# ---- interruption


def test_killed_and_run_again_ends_like_an_unbroken_run(data, trained, tmp_path, capsys):
    """kill -9 of the process group once it is past its first checkpoint; everything but the frequency of checkpoints is
    the options of `trained`, and that does not touch the result."""
    options = OPTIONS | {"checkpoints_per_epoch": 4}
    command = [sys.executable, "sae_training.py", *arguments({"data_dir": data, **places(tmp_path), **options})]
    path, metrics_path, folder = tmp_path / "sae.pth", tmp_path / "sae.metrics.jsonl", tmp_path / "checkpoints"
    process = subprocess.Popen(
        command, cwd=PROJECT_DIR, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    first = steps_per_epoch(data) // 4
    try:
        while process.poll() is None:
            if metrics_path.exists() and len(metrics_path.read_bytes().splitlines()) > first + 1:
                break
            time.sleep(0.01)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err.decode()
    assert list(folder.glob("step-*.pt")) and not path.exists() and not is_complete(folder)

    train(data, tmp_path, checkpoints_per_epoch=4)
    assert "Continuing from step" in capsys.readouterr().out
    assert is_complete(folder)
    assert metrics_path.read_bytes() == trained.with_suffix(".metrics.jsonl").read_bytes()
    assert_same_weights(path, trained)


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = (torch.load(path, weights_only=True) for path in (a, b))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_killed_between_the_last_checkpoint_and_the_end(data, trained, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dies(*args):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("sae.save_sae", dies)
        train(data, tmp_path)
    assert not (tmp_path / "sae.pth").exists() and not is_complete(tmp_path / "checkpoints")
    path = train(data, tmp_path)
    assert_same_weights(path, trained)
    assert metrics_of(path) == metrics_of(trained)


def test_checkpoints_kept(trained, data):
    steps = sorted(int(path.stem.removeprefix("step-")) for path in (trained.parent / "checkpoints").glob("step-*.pt"))
    per_epoch = steps_per_epoch(data)
    assert steps == [2 * per_epoch, 3 * per_epoch]


def test_a_complete_run_is_left_alone(data, trained, capsys):
    before = trained.stat().st_mtime_ns
    train(data, trained.parent)
    assert "is complete already" in capsys.readouterr().out
    assert trained.stat().st_mtime_ns == before


# ---- refusals


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", 1e-4), ("seed", 8), ("k", 5), ("betas", (0.9, 0.999)), ("num_epochs", 4)]
)
def test_changed_constant_is_refused_by_name(data, trained, capsys, name, value):
    said = refusal(sae_training, capsys, data_dir=data, **places(trained.parent), **OPTIONS | {name: value})
    assert str(trained.parent / "checkpoints") in said and f"was begun with {name} = " in said
    assert is_complete(trained.parent / "checkpoints")


def test_a_second_process_on_the_checkpoints_is_refused(data, tmp_path, capsys):
    with stage.locked(tmp_path / "checkpoints"):
        said = refusal(sae_training, capsys, data_dir=data, **places(tmp_path), **OPTIONS)
    assert f"{tmp_path / 'checkpoints'} is in use by another process" in said
    assert not (tmp_path / "sae.pth").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_size": 80}, "--batch_size 80 must be a multiple of the stored batches of 32"),
        ({"batch_size": 32 * 1000}, "fewer than --batch_size 32000"),
        ({"k": 97}, "--k 97 must lie between 1 and --n_latents 96"),
        ({"k": 0}, "--k 0 must lie between 1 and"),
        ({"b_pre_path": "/nowhere/statistics.safetensors"}, "no statistics at /nowhere/statistics.safetensors"),
        ({"model_load_path": "/nowhere/sae.pth"}, "no SAE at /nowhere/sae.pth"),
        ({"data_dir": "/nowhere"}, "There is no folder /nowhere; run sae_preprocessing.py to make it."),
    ],
)
def test_bad_options(data, tmp_path, capsys, changed, words):
    said = refusal(sae_training, capsys, **{"data_dir": data, **places(tmp_path), **OPTIONS, **changed})
    assert words in said
    assert not (tmp_path / "sae.pth").exists()
    assert not (tmp_path / "checkpoints" / "manifest.json").exists()  # so that the mended command is not refused


def test_truncated_batches(data, tmp_path, capsys):
    copy = tmp_path / "batches"
    copy.mkdir()
    for path in data.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    record = manifest_of(data)["shards"][1]
    (copy / record["file"]).write_bytes((data / record["file"]).read_bytes()[:-2])
    said = refusal(sae_training, capsys, data_dir=copy, **places(tmp_path), **OPTIONS)
    assert f"{copy / record['file']} has {record['bytes'] - 2} bytes instead of {record['bytes']}" in said


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, capsys, monkeypatch):
    real = torch.optim.AdamW.step

    def explode(self, *args, **kwargs):
        real(self, *args, **kwargs)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", explode)
    said = refusal(sae_training, capsys, data_dir=data, **places(tmp_path), **OPTIONS)
    assert "The loss is nan at step 2" in said and str(data) in said
    assert not (tmp_path / "sae.pth").exists() and not list((tmp_path / "checkpoints").glob("step-*"))


# ---- figure, Weights & Biases


def test_curves_are_drawn(trained, tmp_path):
    sae_training.plot_curves(trained.with_suffix(".metrics.jsonl"), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_wandb_offline_without_asking(data, tmp_path):
    """The default mode with no key: an offline run folder, nothing read from the terminal."""
    hidden = ("WANDB_", "RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    options = {"data_dir": data, **places(tmp_path), **OPTIONS, "num_epochs": 1, "wandb": "auto"}
    command = [sys.executable, "sae_training.py", *arguments(options)]
    done = subprocess.run(
        command, cwd=PROJECT_DIR, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    runs = list((tmp_path / "checkpoints" / "wandb").glob("offline-run-*"))
    assert len(runs) == 1 and list(runs[0].glob("*.wandb"))
    assert np.isfinite(metrics_of(tmp_path / "sae.pth")[-1]["val_fvu"])
    assert (tmp_path / "sae.curves.png").exists()
