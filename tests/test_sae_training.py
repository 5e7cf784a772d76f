"""Training in one process: the result against plain numpy, what is read and written, other routes to the same result.

Also: the schedule, what metrics.jsonl holds, that a sparse dictionary is learnt and dead latents return, refusals.
The batches come from sae_preprocessing.py. Several processes and interruptions: test_sae_parallel.py.

    .venv/bin/python -m pytest tests/test_sae_training.py
"""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.sae_runs import (
    BATCH,
    N_LATENTS,
    STORED,
    TRAINING,
    D,
    K,
    assert_same_run,
    assert_similar_run,
    checkpoints_of,
    is_complete,
    metrics_of,
    places,
    random_sae,
    refusal,
    run_script,
    train,
    write_batches,
)
from torch.utils._python_dispatch import TorchDispatchMode

import autoencoder.losses
import autoencoder.step
import sae as sae_module
import sae_training
from autoencoder.checkpoints import delete_checkpoints, whole_checkpoints
from autoencoder.curves import plot_curves, plot_frequencies
from autoencoder.inputs import open_data
from autoencoder.step import Step, StepOptions
from pipeline.activation_batches import Batches, Reader
from pipeline.distributed import ALONE, Grid, World, make_grid
from pipeline.files import locked, sha256
from sae import SparseAutoencoder, load_sae_model, save_sae
from sae_training import learning_rate, stops_early

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")


STATE = {"b_pre", "encoder.weight", "encoder.bias", "decoder.weight"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_batches(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """One uninterrupted run in one process."""
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


def test_reader_gives_the_steps_in_order(data):
    """Each step's rows stay valid until the next are requested, though buffers are reused."""
    batches = Batches(str(data), manifest_of(data), BATCH, seed=3)
    per_epoch = batches.steps_per_epoch
    with Reader(batches, range(7, per_epoch + 9), 1, 2, torch.device("cpu")) as reader:
        for step in range(7, per_epoch + 9):
            assert torch.equal(reader.next(), batches.read(*divmod(step, per_epoch), 1, 2))


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
    n_steps = per_epoch * TRAINING["num_epochs"]
    assert [line["step"] for line in lines] == list(range(1, n_steps + 1))
    for line in lines:
        assert line["tokens"] == line["step"] * BATCH
        assert line["train_total"] == pytest.approx(line["train_main"] + line["train_aux"] / 32, rel=1e-6)
        assert 0 <= line["dead_frac"] <= 1
        assert (line["dead_frac"] > 0) == (line["longest_silence_tokens"] >= TRAINING["dead_after_tokens"])
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
    assert state.keys() == STATE
    torch.testing.assert_close(state["decoder.weight"].norm(dim=0), torch.ones(N_LATENTS))
    assert state["decoder.weight"].shape == (D, N_LATENTS) and state["encoder.weight"].shape == (N_LATENTS, D)

    info, manifest, last = (
        json.loads(trained.with_suffix(".json").read_text()),
        manifest_of(data),
        metrics_of(trained)[-1],
    )
    for name in ("model", "site", "layer", "begin_of_text", "bos_id", "max_tokens", "dataset", "rope_scaling_factor"):
        assert info[name] == manifest[name]
    assert info["first_validation_sentence"] == manifest["first_validation_sentence"]
    assert (trained.parent / info["activations_dir"]).resolve() == (data.parent / "site").resolve()
    assert (info["k"], info["normalize_eps"], info["tokens_trained"]) == (K, 1e-5, last["tokens"])
    names = ("val_main", "val_aux", "val_total", "val_fvu", "val_l0", "dead_frac", "tokens")
    quality = info["quality"]
    assert {name: quality[name] for name in names} == {name: last[name] for name in names}
    assert quality["acts_per_s"] == pytest.approx(last["tokens"] / quality["seconds"]) and quality["seconds"] > 0
    assert info["config"]["seed"] == TRAINING["seed"]


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
    """With a learning rate of 0 the result equals the start."""
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
    """Half of the latents start too weak to be kept: without the auxiliary loss they stay dead, with it they return."""
    n = 96
    start = SparseAutoencoder(D, n, K)
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


def test_k_aux_of_zero_is_no_auxiliary_loss(data, tmp_path):
    """Like a weight of zero: the same weights to the last bit, while latents are dead."""
    without, weightless = (
        train(data, tmp_path / name, num_epochs=2, **options)
        for name, options in (("without", {"k_aux": 0}), ("weightless", {"aux_loss_coeff": 0.0}))
    )
    first, second = (torch.load(path, weights_only=True) for path in (without, weightless))
    assert all(torch.equal(first[name], second[name]) for name in STATE)
    lines = metrics_of(without)
    assert any(line["dead_frac"] > 0 for line in lines) and not any(line["train_aux"] for line in lines)
    assert any(line["train_aux"] for line in metrics_of(weightless)) and lines[-1]["val_aux"] == 0


# ---- checkpoints


def test_checkpoints_kept(trained, data):
    per_epoch = steps_per_epoch(data)
    assert checkpoints_of(trained) == [f"step-{2 * per_epoch:09d}.0-of-1.pt", f"step-{3 * per_epoch:09d}.0-of-1.pt"]


@pytest.mark.slow
def test_checkpoints_by_time_change_nothing_else(data, trained, tmp_path):
    """One after every step, within the epochs: the newest two are kept, the run is the same to the last bit."""
    path = train(data, tmp_path, checkpoint_minutes=1e-9)
    n_steps = steps_per_epoch(data) * TRAINING["num_epochs"]
    assert checkpoints_of(path) == [f"step-{step:09d}.0-of-1.pt" for step in (n_steps - 1, n_steps)]
    assert_same_run(path, trained)
    states = [
        torch.load(one.parent / "checkpoints" / checkpoints_of(one)[-1], weights_only=True) for one in (path, trained)
    ]
    for name in ("firing", "silent_tokens"):
        assert torch.equal(*(state["counters"][name] for state in states)), name


def test_slices_without_the_others_do_not_count(data, trained, tmp_path):
    for name in ("step-000000025.0-of-1.pt", "step-000000050.0-of-2.pt", "step-000000050.2-of-2.pt", "other.pt"):
        (tmp_path / name).touch()
    assert whole_checkpoints(tmp_path) == [[tmp_path / "step-000000025.0-of-1.pt"]]
    delete_checkpoints(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000000025.0-of-1.pt", "other.pt"}


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(data, trained, tmp_path, capsys):
    folder = shutil.copytree(trained.parent / "checkpoints", tmp_path / "checkpoints")
    newest = folder / checkpoints_of(trained)[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    said = refusal(sae_training, capsys, data_dir=data, **places(tmp_path), **TRAINING)
    assert f"{newest} is damaged; delete it to continue from the previous checkpoint." in said
    newest.unlink()
    assert_same_run(train(data, tmp_path), trained)


def test_a_complete_run_is_left_alone(data, trained, capsys):
    before = trained.stat().st_mtime_ns
    train(data, trained.parent)
    assert "is already complete" in capsys.readouterr().out
    assert trained.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_complete_run_is_saved_elsewhere_with_all_that_belongs_to_it(data, trained, tmp_path):
    path = tmp_path / "elsewhere" / "again.pth"
    options = {"data_dir": data, "checkpoint_dir": trained.parent / "checkpoints", "model_save_path": path}
    run_script(sae_training, **options, **TRAINING)
    assert_same_run(path, trained)
    for suffix in ("curves.png", "frequencies.png"):
        assert (path.parent / f"again.{suffix}").read_bytes().startswith(b"\x89PNG")
    first, second = (json.loads(p.with_suffix(".json").read_text()) for p in (trained, path))
    assert first["quality"] == second["quality"]


def test_counters_of_the_last_checkpoint(data, trained):
    """Counted since the previous checkpoint: what never fired since then has been silent for at least as long."""
    state = torch.load(trained.parent / "checkpoints" / checkpoints_of(trained)[-1], weights_only=True)
    firing, silent_tokens = state["counters"]["firing"], state["counters"]["silent_tokens"]
    n_activations = (state["progress"]["step"] - state["progress"]["counting_since"]) * BATCH
    assert n_activations == steps_per_epoch(data) * BATCH
    assert torch.equal(firing == 0, silent_tokens >= n_activations)
    assert 0.9 * K < firing.sum() / n_activations <= K and firing.max() <= n_activations
    assert int(silent_tokens.max()) == metrics_of(trained)[-1]["longest_silence_tokens"]


# ---- other routes to the same result


@pytest.mark.parametrize("size", [20, 96])
def test_micro_batches_give_the_same_result(data, trained, tmp_path, size):
    assert_similar_run(train(data, tmp_path, micro_batch_size=size), trained)


def test_bfloat16_encoder(data, trained, tmp_path):
    last = metrics_of(train(data, tmp_path, encoder_dtype="bfloat16"))[-1]
    assert last["val_fvu"] == pytest.approx(metrics_of(trained)[-1]["val_fvu"], rel=0.1)
    assert last["val_fvu"] != metrics_of(trained)[-1]["val_fvu"]


class Tf32(TorchDispatchMode):
    """Dense float32 products as a GPU computes them in TF32: of factors rounded to 10 bits of mantissa."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm"):
            args = (*args[:-2], *map(self.rounded, args[-2:]))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(factor: torch.Tensor) -> torch.Tensor:
        if factor.dtype != torch.float32:
            return factor
        return (factor.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


@pytest.mark.slow
def test_tf32_chooses_almost_the_same_latents_and_changes_no_value(data, trained, tmp_path, monkeypatch):
    """What --allow_tf32 changes on a GPU: FVU by less than a hundredth of itself; values are float32's."""
    for module in (sae_module, autoencoder.losses):
        monkeypatch.setattr(module, "products_are_exact", lambda device: False)
    x = load_file(data / manifest_of(data)["validation_shards"][0]["file"])["acts"]
    loaded = load_sae_model(trained)
    with Tf32():
        fvu = metrics_of(train(data, tmp_path))[-1]["val_fvu"]
        values, indices = loaded.encode(x, h_bias=torch.linspace(0, 0.1, N_LATENTS))
    assert fvu == pytest.approx(metrics_of(trained)[-1]["val_fvu"], rel=0.01)
    pre_acts = (loaded.normalize(x)[0] - loaded.b_pre) @ loaded.encoder.weight.t() + loaded.encoder.bias
    pre_acts += torch.linspace(0, 0.1, N_LATENTS)
    torch.testing.assert_close(values, pre_acts.gather(1, indices).relu(), rtol=0, atol=2e-6)
    best = pre_acts.topk(K).indices
    same = (best.sort().values == indices.sort().values).float().mean()
    assert same > 0.99


def test_gradients_are_clipped(data, tmp_path, monkeypatch):
    norms = []
    real = Step.apply

    def noted(self, *args):
        norms.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in self.sae.parameters())))
        real(self, *args)

    monkeypatch.setattr(Step, "apply", noted)
    for clip in (1e9, 0.25):
        train(data, tmp_path / str(clip), num_epochs=1, grad_clip=clip)
    free, clipped = norms[: len(norms) // 2], norms[len(norms) // 2 :]
    assert clipped[0] == pytest.approx(min(free[0], 0.25), rel=1e-5)
    assert max(free) > 0.3 and max(clipped) <= 0.25 * (1 + 1e-5) and min(clipped) < 0.24


def test_steps_are_those_of_adamw(data, tmp_path, monkeypatch):
    """Against torch's class on the same gradients, weight decay included."""
    real, copies, states = Step.apply, [], []

    def compared(self, pending, agreed, rate, n_before):
        own = list(self.sae.parameters())
        if not states:
            copies.extend(torch.nn.Parameter(p.detach().clone()) for p in own)
            options = {"betas": (0.85, 0.999), "eps": 6.25e-10, "weight_decay": 0.01, "fused": True}
            states.append(torch.optim.AdamW(copies, **options))
        for copy, p in zip(copies, own, strict=True):
            copy.data.copy_(p)
            copy.grad = p.grad.clone()
        real(self, pending, agreed, rate, n_before)
        states[0].param_groups[0]["lr"] = rate
        states[0].step()
        copies[3].data.div_(copies[3].norm(dim=0))
        for copy, p in zip(copies, own, strict=True):
            torch.testing.assert_close(p, copy, rtol=0, atol=1e-7)

    monkeypatch.setattr(Step, "apply", compared)
    train(data, tmp_path, num_epochs=1, weight_decay=0.01)
    assert states


def test_the_step_by_itself_does_what_the_run_does(data, trained):
    """As benchmarks call it, equal to the last bit."""
    source, folders = open_data(str(data))
    sae = SparseAutoencoder(D, N_LATENTS, K)
    sae.initialize(source.b_pre, torch.Generator().manual_seed(TRAINING["seed"]))
    options = StepOptions(**{name: value for name, value in TRAINING.items() if name in StepOptions._fields})
    step = Step(sae, options, make_grid(ALONE, 1))
    batches = Batches(*folders[source.place.site], BATCH, TRAINING["seed"])
    n_steps = batches.steps_per_epoch * TRAINING["num_epochs"]
    for n_before in range(n_steps):
        pending = step.gradients(batches.read(*divmod(n_before, batches.steps_per_epoch), 0, 1))
        step.apply(pending, step.agree(pending), learning_rate(n_before, n_steps, 8e-3, 1 / 5, 5), n_before)
    expected = torch.load(trained, weights_only=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in step.sae.state_dict().items())


class Waits(TorchDispatchMode):
    """Counts what makes the CPU wait for a GPU: numbers read from tensors, and results whose size depends on values."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        of_unknown_size = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        reads = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "_unique2")
        if name in reads or by_mask or of_unknown_size:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.slow  # the first dispatch mode imports much of torch
@pytest.mark.parametrize("encoder_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("n_slices", "waits"), [(1, ["tolist"]), (2, ["nonzero", "tolist"])])
def test_a_step_waits_for_the_gpu_once_or_twice(monkeypatch, encoder_dtype, n_slices, waits):
    """With a limit for the gradient and more dead latents than k_aux. The second of two slices has a stand-in for the
    first, which sends the same."""
    monkeypatch.setattr(World, "all_reduce", lambda self, tensor: tensor)
    monkeypatch.setattr(World, "all_gather", lambda self, tensor: torch.stack([tensor] * self.size))
    seen, tolist = Waits(), torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (seen.seen.append("tolist"), tolist(self))[1])
    row = World(n_slices - 1, n_slices, torch.device("cpu"))
    options = StepOptions(64, 5, dead_after_tokens=64, grad_clip=0.1, encoder_dtype=encoder_dtype)
    step = Step(random_sae(D, 2 * N_LATENTS, 2), options, Grid(row, ALONE, row))
    x = torch.randn(64 // n_slices, D).bfloat16()
    for n_before in range(2):
        seen.seen.clear()
        with seen:
            pending = step.gradients(x)
            agreed = step.agree(pending)
            step.apply(pending, agreed, 1e-3, n_before)
        step.n_dead = [agreed.n_dead[row.rank]] * n_slices
        assert seen.seen == waits, n_before
    assert step.n_dead[0] > 5


def test_early_stopping(data, tmp_path):
    """With a learning rate of 0 no epoch is better than the first: after two more the run ends and is complete."""
    path = train(data, tmp_path, learning_rate=0.0, num_epochs=9, early_stop_epochs=2)
    assert metrics_of(path)[-1]["step"] == 3 * steps_per_epoch(data)
    assert is_complete(tmp_path / "checkpoints")
    train(data, tmp_path, learning_rate=0.0, num_epochs=9, early_stop_epochs=2)
    assert metrics_of(path)[-1]["step"] == 3 * steps_per_epoch(data)
    assert not stops_early([], 1) and not stops_early([3.0, 2.0, 1.0], 1) and not stops_early([1.0, 1.0], None)
    assert stops_early([3.0, 2.0, 2.5], 1) and not stops_early([3.0, 2.0, 2.5], 2) and stops_early([2.0, 2.0], 1)


# ---- refusals


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", 1e-4), ("seed", 8), ("k", 5), ("betas", (0.9, 0.999)), ("num_epochs", 4)]
)
def test_changed_constant_is_refused_by_name(data, trained, capsys, name, value):
    said = refusal(sae_training, capsys, data_dir=data, **places(trained.parent), **TRAINING | {name: value})
    assert str(trained.parent / "checkpoints") in said and f"was begun with {name} = " in said
    assert is_complete(trained.parent / "checkpoints")


def test_a_second_process_on_the_checkpoints_is_refused(data, tmp_path, capsys):
    with locked(tmp_path / "checkpoints"):
        said = refusal(sae_training, capsys, data_dir=data, **places(tmp_path), **TRAINING)
    assert f"{tmp_path / 'checkpoints'} is in use by another process" in said
    assert not (tmp_path / "sae.pth").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_size": 80}, "--batch_size 80 must be a multiple of the stored batches of 32"),
        ({"batch_size": 32 * 1000}, "fewer than --batch_size 32000"),
        ({"k": 97}, "k = 97 must lie between 1 and n_latents = 96; correct --k or --n_latents."),
        ({"k": 0}, "--k 0 is too small; it must be at least 1."),
        ({"n_latents": 10**15}, "--n_latents 1000000000000000 does not fit in memory ("),
        ({"n_latents": 2**62}, f"--n_latents {2**62} does not fit in memory ("),
        ({"adam_eps": 1e-50}, "--adam_eps 1e-50 is too small; it must be at least 1e-30."),
        ({"latent_parallel": 2}, "--latent_parallel 2 must divide the 1 processes and --n_latents 96"),
        ({"micro_batch_size": 0}, "--micro_batch_size 0 is too small; it must be at least 1."),
        ({"encoder_dtype": "float16"}, "--encoder_dtype float16 is unknown; write float32 or bfloat16."),
        ({"b_pre_path": "/nowhere/statistics.safetensors"}, "no statistics at /nowhere/statistics.safetensors"),
        ({"model_load_path": "/nowhere/sae.pth"}, "no SAE at /nowhere/sae.pth"),
        ({"data_dir": "/nowhere"}, "There is no folder /nowhere; run sae_preprocessing.py to make it."),
    ],
)
def test_bad_options(data, tmp_path, capsys, changed, words):
    said = refusal(sae_training, capsys, **{"data_dir": data, **places(tmp_path), **TRAINING, **changed})
    assert words in said
    assert not (tmp_path / "sae.pth").exists()
    assert not (tmp_path / "checkpoints" / "manifest.json").exists()  # so that the corrected command is not refused


def test_activations_that_differ_by_rounding_alone(data, tmp_path, capsys):
    statistics = load_file(data / "statistics.safetensors")
    altered = statistics | {"var_normalized": 1e-12 * statistics["mean_normalized"].square()}
    save_file(altered, tmp_path / "statistics.safetensors")
    options = TRAINING | {"b_pre_path": tmp_path / "statistics.safetensors"}
    said = refusal(sae_training, capsys, data_dir=data, **places(tmp_path), **options)
    assert f"activations to train on in {data} are alike once normalised: there is nothing to learn" in said


def test_held_out_activations_that_are_all_alike_measure_nothing(data, tmp_path):
    copy = tmp_path / "batches"
    shutil.copytree(data, copy)
    manifest = manifest_of(data)
    for record in manifest["validation_shards"]:
        acts = load_file(copy / record["file"])["acts"]
        save_file({"acts": acts[:1].repeat(len(acts), 1)}, copy / record["file"])
        record["sha256"] = sha256(copy / record["file"])
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert not any("val_fvu" in line for line in metrics_of(train(copy, tmp_path, num_epochs=1)))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"warmup_steps": 100_000}, "Note: --warmup_steps 100,000 is at least the run's 25 steps"),
        ({"dead_after_tokens": 1}, "Note: --dead_after_tokens 1 is no more than a step's"),
        ({}, ""),
    ],
)
def test_options_with_which_little_is_learnt_are_noted(data, tmp_path, capsys, changed, said):
    train(data, tmp_path, num_epochs=1, **changed)
    out = capsys.readouterr().out
    assert said in out and ("Note" in out) == bool(said)


def test_a_place_that_cannot_be_written_is_said_before_the_training(data, tmp_path, capsys):
    options = places(tmp_path) | {"model_save_path": tmp_path}
    said = refusal(sae_training, capsys, data_dir=data, **options, **TRAINING)
    assert f"{tmp_path} cannot be written (Is a directory)" in said and not (tmp_path / "checkpoints").exists()


def test_altered_batches(data, tmp_path, capsys):
    """A changed byte is found before the first checkpoint."""
    copy = tmp_path / "batches"
    shutil.copytree(data, copy)
    path = copy / manifest_of(data)["shards"][1]["file"]
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    said = refusal(sae_training, capsys, data_dir=copy, **places(tmp_path), **TRAINING)
    assert str(path) in said and "sae_preprocessing.py" in said
    assert not list((tmp_path / "checkpoints").glob("step-*")) and not (tmp_path / "sae.pth").exists()


def test_truncated_batches(data, tmp_path, capsys):
    copy = tmp_path / "batches"
    copy.mkdir()
    for path in data.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    record = manifest_of(data)["shards"][1]
    (copy / record["file"]).write_bytes((data / record["file"]).read_bytes()[:-2])
    said = refusal(sae_training, capsys, data_dir=copy, **places(tmp_path), **TRAINING)
    assert f"{copy / record['file']} has {record['bytes'] - 2} bytes instead of {record['bytes']}" in said


@pytest.mark.parametrize(
    ("value", "call", "words"), [(math.nan, 0, "The loss is nan at step 2"), (30.0, 26, "at step 28 (activations of ")]
)
def test_a_bad_loss_stops_the_run(data, tmp_path, capsys, monkeypatch, value, call, words):
    """Weights become NaN in step 1, or thirty times as large in step 27: noticed in the next step, whose batch's shards
    are named; checkpoints hold only what came before."""
    real, calls = Step.apply, []

    def goes_wrong(self, *args):
        real(self, *args)
        calls.append(len(calls))
        if calls[-1] == call:
            self.sae.encoder.weight.data.mul_(value)

    monkeypatch.setattr(Step, "apply", goes_wrong)
    monkeypatch.setattr(sae_training.Training, "draw", lambda *args: None)
    said = refusal(sae_training, capsys, data_dir=data, **places(tmp_path), **TRAINING)
    batches, (epoch, step) = Batches(str(data), manifest_of(data), BATCH, TRAINING["seed"]), divmod(call + 1, 25)
    shards = {batches.names[shard] for shard, _ in batches.stored_batches(epoch, step)}
    assert words in said and all(name in said for name in shards) and str(data) in said
    good = [] if call == 0 else ["step-000000025.0-of-1.pt"]
    assert checkpoints_of(tmp_path / "sae.pth") == good and (good[0] if good else "checkpoint is none") in said
    assert ("more than 10 times its running mean" in said) == (call > 0)
    assert not (tmp_path / "sae.pth").exists()


def test_no_checkpoint_of_bad_weights(data, tmp_path, capsys, monkeypatch):
    """They become infinite in the very step that ends the first epoch, whose loss is still right."""
    real = sae_training.Training.checkpoint

    def after_a_mishap(self, verified):
        self.step.sae.encoder.weight.data[3, 3] = math.inf
        real(self, verified)

    monkeypatch.setattr(sae_training.Training, "checkpoint", after_a_mishap)
    said = refusal(sae_training, capsys, data_dir=data, **places(tmp_path), **TRAINING)
    assert "The weights are not finite after step 25" in said and not checkpoints_of(tmp_path / "sae.pth")


def test_too_little_memory_on_a_device(data, tmp_path, capsys, monkeypatch):
    def too_much(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(autoencoder.step, "loss_sums", too_much)
    said = refusal(sae_training, capsys, data_dir=data, **places(tmp_path), **TRAINING, micro_batch_size=48)
    assert "too little memory for 48 activations at a time; give a smaller --micro_batch_size" in said


# ---- figures


@pytest.mark.slow
@pytest.mark.parametrize("firing", [[0, 5, 100, 2400, 1], [0, 0], [7, 8]])
def test_figures_are_drawn(trained, tmp_path, firing):
    lines = trained.with_suffix(".metrics.jsonl").read_text().splitlines()
    plot_curves(lines, tmp_path / "curves.png")
    plot_frequencies(torch.tensor(firing), 2400, tmp_path / "frequencies.png")
    for name in ("curves", "frequencies"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
