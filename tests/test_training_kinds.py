"""Training the other kinds: BatchTopK, Matryoshka, transcoders with and without a skip, other normalisations.

The losses and gradients against a dense reference in float64 through autograd; whole runs; several processes.

    .venv/bin/python -m pytest tests/test_training_kinds.py
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.dense_sae import TARGET
from support.sae_runs import (
    N_LATENTS,
    TRAINING,
    D,
    K,
    assert_same_run,
    assert_similar_run,
    checkpoints_of,
    metrics_of,
    places,
    random_sae,
    refusal,
    run_script,
    sparse_dictionary_data,
    train,
    write_batches,
    write_target_batches,
)
from support.training_with_mishaps import in_processes
from test_sae import assert_close, dead_of
from test_sae_parallel import one_run

import sae_preprocessing
import sae_training
from autoencoder.losses import keep_highest_of_batch, loss_sums, nth_highest, typical_kth_highest
from autoencoder.step import shortened
from pipeline.distributed import ALONE
from pipeline.files import sha256
from sae import Kind, SparseAutoencoder, load_sae_model

BATCH_TOPK = Kind("jumprelu")


def transcoder(gate="topk", skip=False) -> Kind:
    return Kind(gate, "scale", centred=False, target_site=TARGET, skip=skip)


# ---- which latents BatchTopK keeps


@given(
    st.lists(st.one_of(st.sampled_from([0.0, 1.0, 2.5]), st.floats(0, 2.0**100, width=32)), max_size=60),
    st.integers(1, 70),
)
def test_the_nth_highest_to_the_last_bit(values, n):
    found = float(nth_highest(torch.tensor(values), n, ALONE))
    assert found == (sorted(values)[-n] if n <= len(values) else 0.0)


@given(st.integers(1, 12), st.integers(0, 1000), st.sampled_from([0.0, 1e-6, 0.5, 1.0, 3.0, 1e9]))
@settings(max_examples=25)
def test_keeps_the_highest_of_the_batch_whatever_the_guess(k, seed, guess):
    sae = random_sae(5, 23, k, seed=seed, kind=BATCH_TOPK)
    sae.requires_grad_(False)
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed))
    kept, least = keep_highest_of_batch(sae, x.split(4), 9 * k, torch.tensor(guess), ALONE, torch.float32)
    pre = (x @ sae.encoder.weight.t() + sae.encoder.bias).relu()
    expected = pre.flatten().topk(9 * k)
    torch.testing.assert_close(least, expected.values[-1])
    dense = torch.zeros(9, 23)
    for first, part in zip((0, 4, 8), kept, strict=True):
        dense[part.rows + first, part.latents] = part.values
        counts = part.rows.bincount(minlength=len(part.offsets))
        assert part.offsets.equal(counts.cumsum(0) - counts) and (part.rows.diff() >= 0).all()
    torch.testing.assert_close(dense, torch.where(pre >= expected.values[-1], pre, 0))


def test_the_first_guess_is_near():
    sae = random_sae(16, 200, 8, kind=BATCH_TOPK)
    x = torch.randn(500, 16)
    guess = float(typical_kth_highest(sae, x, 8, ALONE))
    _, least = keep_highest_of_batch(sae, [x], 8 * 500, torch.tensor(guess), ALONE, torch.float32)
    assert 0.7 < guess / float(least) < 1.3


# ---- losses and gradients against a dense reference


def reference(sae: SparseAutoencoder, z, target, dead: list[int], k_aux: int, nested: tuple[int, ...]):
    """main, aux, the parameters, how often each latent fired, how close a choice was. With gate jumprelu: BatchTopK."""
    p = {name: tensor.detach().double().requires_grad_() for name, tensor in sae.named_parameters()}
    z, target = z.double(), target.double()
    read = z - p["b_pre"] if sae.kind.centred else z
    pre = read @ p["encoder.weight"].t() + p["encoder.bias"]
    if sae.kind.gate == "topk":
        top = pre.topk(sae.k, dim=1)
        h = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        ranked = pre.detach().sort(dim=1, descending=True).values
        closest = (ranked[:, sae.k - 1] - ranked[:, sae.k]).min() if sae.k < pre.shape[1] else torch.tensor(1.0)
    else:
        ranked = pre.detach().flatten().sort(descending=True).values
        n = len(z) * sae.k
        least = ranked[n - 1]
        h = torch.where(pre >= least, pre, 0).relu()
        closest = ranked[n - 1] - ranked[n] if n < len(ranked) else torch.tensor(1.0)
    closest = min(float(closest), float(pre.detach().abs().min()))
    plain = p["b_pre"] + (z @ p["skip"].t() if sae.skip is not None else 0)
    z_hats = [h[:, :m] @ p["decoder.weight"][:, :m].t() + plain for m in (*nested, sae.n_latents)]
    main = torch.stack([(z_hat - target).square().sum() for z_hat in z_hats]).mean()

    aux = torch.zeros((), dtype=torch.float64)
    if dead:
        residual = (target - z_hats[-1]).detach()
        given = z - p["b_pre"].detach() if sae.kind.centred else z
        of_dead = (given @ p["encoder.weight"].t() + p["encoder.bias"])[:, dead]
        best = of_dead.topk(min(k_aux, len(dead)), dim=1)
        values = torch.zeros_like(of_dead).scatter(1, best.indices, best.values)
        aux = (values @ p["decoder.weight"][:, dead].t() - residual).square().sum()
        ranked = of_dead.detach().sort(dim=1, descending=True).values
        if k_aux < len(dead):
            closest = min(closest, float((ranked[:, k_aux - 1] - ranked[:, k_aux]).min()))
    return main, aux, p, (h > 0).sum(0), closest


@st.composite
def shapes(draw):
    n_latents = draw(st.integers(2, 23))
    return {
        "d_model": draw(st.integers(2, 9)),
        "n_latents": n_latents,
        "k": draw(st.integers(1, n_latents)),
        "batch": draw(st.integers(1, 11)),
        "kind": draw(
            st.sampled_from([Kind(), BATCH_TOPK, *(transcoder(g, s) for g in ("topk", "jumprelu") for s in (0, 1))])
        ),
        "nested": draw(st.lists(st.integers(1, n_latents - 1), unique=True, max_size=3).map(sorted).map(tuple)),
        "dead": draw(st.lists(st.integers(0, n_latents - 1), unique=True).map(sorted)),
        "k_aux": draw(st.integers(1, 26)),
        "seed": draw(st.integers(0, 10_000)),
    }


@given(shapes())
@settings(max_examples=80)
def test_losses_and_gradients_equal_a_dense_reference(shape):
    d_model, n_latents, batch, k_aux = (shape[name] for name in ("d_model", "n_latents", "batch", "k_aux"))
    kind = shape["kind"]._replace(skip=bool(shape["kind"].skip))
    sae = random_sae(d_model, n_latents, shape["k"], seed=shape["seed"], kind=kind)
    generator = torch.Generator().manual_seed(shape["seed"] + 1)
    z, y = torch.randn(batch, d_model, generator=generator), torch.randn(batch, d_model, generator=generator)
    target = y if kind.target_site else z
    main, aux, p, fired, closest = reference(sae, z, target, shape["dead"], k_aux, shape["nested"])
    if closest < 1e-5:  # float32 may choose other latents; one draw in thousands
        return
    (main + 0.4 * aux).backward()

    kept = None
    if kind.gate == "jumprelu":
        read = [sae.centre(z).detach()]
        (kept,), _ = keep_highest_of_batch(sae, read, batch * shape["k"], torch.tensor(0.1), ALONE, torch.float32)
    dead = dead_of(shape["dead"], n_latents, k_aux)
    sums = loss_sums(sae, z, dead, target=y if kind.target_site else None, kept=kept, nested=shape["nested"])
    (sums.main + 0.4 * sums.aux).backward()
    assert_close(sums.main.detach(), main.detach())
    assert_close(sums.aux.detach(), aux.detach())
    assert torch.equal(sums.fired, fired)
    for name, parameter in sae.named_parameters():
        assert_close(parameter.grad, p[name].grad)
    if not shape["nested"]:
        assert sums.whole.equal(sums.main)


def test_thresholds_decide_outside_of_training():
    """Validation keeps what `encode` keeps."""
    sae = random_sae(7, 40, 3, kind=BATCH_TOPK).requires_grad_(False)
    x = torch.randn(50, 7)
    z = sae.normalize(x)[0]
    values, indices = sae.encode(x)
    sums = loss_sums(sae, z)
    torch.testing.assert_close(sums.main, (sae.decode(values, indices) - z).square().sum())
    assert int(sums.fired.sum()) == int((values > 0).sum())


# ---- whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_target_batches(folder)
    return write_batches(folder)


def target_of(data: Path) -> Path:
    return data.parent / "targetbatches"


def rows_of(folder: Path, shards: str) -> torch.Tensor:
    manifest = json.loads((folder / "manifest.json").read_text())
    return torch.cat([load_file(folder / record["file"])["acts"] for record in manifest[shards]])


def everything(data: Path) -> dict:
    """All of it at once."""
    return {
        "gate": "batch_topk",
        "matryoshka": (16, 40),
        "normalization": "scale",
        "target_data_dir": target_of(data),
        "skip": True,
    }


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    return train(data, tmp_path_factory.mktemp("trained"), **everything(data))


def test_both_sites_are_shuffled_alike(data):
    """The target's rows are the function of the rows that they were before the shuffle."""
    generator = torch.Generator().manual_seed(1)
    inner, outer = torch.randn(2 * D, D, generator=generator), torch.randn(D, 2 * D, generator=generator)
    for shards in ("shards", "validation_shards"):
        x, y = rows_of(data, shards).float(), rows_of(target_of(data), shards).float()
        torch.testing.assert_close(y, (x @ inner.t()).relu() @ outer.t() + 2, rtol=0.02, atol=0.1)


RUNS = {
    "batch_topk": {"gate": "batch_topk"},
    "matryoshka": {"matryoshka": (16, 40)},
    "none": {"normalization": "none"},
    "scale": {"normalization": "scale", "gate": "batch_topk"},
    "transcoder": {"target": True, "normalization": "none"},
    "skip transcoder": {"target": True, "skip": True},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_learns_and_saves_what_it_measured(data, tmp_path, options):
    """The saved SAE, opened and applied to the held-out rows, has the numbers of the last validation."""
    targets = {"target_data_dir": target_of(data)} if options.get("target") else {}
    options = {name: value for name, value in options.items() if name != "target"} | targets
    path = train(data, tmp_path, **options)
    lines, sae = metrics_of(path), load_sae_model(path)
    ends = [line for line in lines if "val_fvu" in line]
    assert ends[-1]["val_fvu"] < 0.75 * lines[0]["train_fvu"] and ends[-1]["val_fvu"] < ends[0]["val_fvu"]

    x = rows_of(data, "validation_shards")
    y = rows_of(target_of(data), "validation_shards") if targets else x
    z, mean, std = sae.normalize(x)
    values, indices = sae.encode(x)
    z_hat, target = sae.reconstruct(z, values, indices).double(), sae.normalize_target(y).double()
    error = (z_hat - target).square().sum()
    assert ends[-1]["val_fvu"] == pytest.approx(float(error / (target - target.mean(0)).square().sum()), rel=1e-4)
    l0 = float((values > 0).sum(1).double().mean())
    assert ends[-1]["val_l0"] == pytest.approx(l0, rel=1e-3)
    assert l0 == pytest.approx(K, rel=1e-3) if sae.kind.gate == "jumprelu" else l0 <= K
    torch.testing.assert_close(sae.restore(z_hat.float(), mean, std), sae(x).float(), rtol=0.02, atol=0.02)

    info = json.loads(path.with_suffix(".json").read_text())
    assert info["k"] == K and info["normalization"] == options.get("normalization", "layer_norm")
    assert info.get("target_site") == (TARGET if targets else None)
    assert info.get("matryoshka") == (list(options["matryoshka"]) if "matryoshka" in options else None)
    if options.get("normalization") == "scale":
        rows = rows_of(data, "shards").double()
        assert float((rows * sae.kind.scale).square().sum(1).mean()) == pytest.approx(D, rel=1e-2)


def test_the_threshold_keeps_k_of_other_activations(data, tmp_path):
    """After many passes over few activations, of which it keeps fewer."""
    sae = load_sae_model(train(data, tmp_path, gate="batch_topk", num_epochs=8))
    l0 = lambda x: float((sae.encode(x)[0] > 0).sum(1).double().mean())
    fresh = sparse_dictionary_data(12_000, D, n_true=30, n_active=3, seed=0)[3000:]
    assert l0(fresh) == pytest.approx(K, rel=0.04)
    assert l0(rows_of(data, "shards")) < 0.98 * K


def test_without_normalisation_it_trains_as_with_a_scale(data, tmp_path):
    """The constant is folded into the weights when the SAE is saved, and taken out when training starts from it."""
    options = {"target_data_dir": target_of(data), "skip": True, "gate": "batch_topk"}
    none, scale = (train(data, tmp_path / name, normalization=name, **options) for name in ("none", "scale"))
    for name in ("val_fvu", "val_l0"):
        assert metrics_of(none)[-1][name] == metrics_of(scale)[-1][name]
    raw, scaled = load_sae_model(none), load_sae_model(scale)
    assert (raw.kind.normalization, raw.kind.scale, raw.kind.target_scale) == ("none", 1, 1)
    x = rows_of(data, "shards").float()  # one of the others decides the threshold, and lies on it
    torch.testing.assert_close(raw(x), scaled(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(raw.encode(x)[0] * scaled.kind.target_scale, scaled.encode(x)[0], rtol=1e-4, atol=1e-4)
    more = {"num_epochs": 1, "learning_rate": 0.0, "model_load_path": none}
    again = load_sae_model(train(data, tmp_path / "again", normalization="none", **more, **options))
    torch.testing.assert_close(again(x), raw(x), rtol=1e-3, atol=1e-3)


def test_prefixes_reconstruct_by_themselves(data, tmp_path):
    """The first 16 latents of a Matryoshka SAE explain more than the first 16 of one trained as a whole."""
    x = rows_of(data, "validation_shards")
    left = []
    for options in ({}, {"matryoshka": (16, 40)}):
        sae = load_sae_model(train(data, tmp_path / str(len(left)), **options))
        values, indices = sae.encode(x)
        z_hat = sae.decode(values * (indices < 16), indices)
        left.append(float((z_hat - sae.normalize(x)[0]).square().sum()))
    assert left[1] < 0.8 * left[0]


@pytest.mark.slow
def test_micro_batches_give_the_same_result(data, trained, tmp_path):
    """BatchTopK chooses among the whole batch."""
    assert_similar_run(train(data, tmp_path, micro_batch_size=20, **everything(data)), trained)


def test_a_run_that_lost_its_last_epoch_continues_to_the_last_bit(data, trained, tmp_path):
    folder = shutil.copytree(trained.parent / "checkpoints", tmp_path / "checkpoints")
    (folder / checkpoints_of(trained)[-1]).unlink()
    assert_same_run(train(data, tmp_path, **everything(data)), trained)


def test_bfloat16_encoder(data, trained, tmp_path):
    last = metrics_of(train(data, tmp_path, encoder_dtype="bfloat16", **everything(data)))[-1]
    assert last["val_fvu"] == pytest.approx(metrics_of(trained)[-1]["val_fvu"], rel=0.1)


@pytest.mark.slow
def test_grids_of_processes_train_like_one(data, trained, tmp_path):
    """Data and latent parallel, with micro-batches; what is chosen is chosen among all processes' rows and latents."""
    options = {name: str(value) if isinstance(value, Path) else value for name, value in everything(data).items()}
    grids = {"2x1": {}, "1x2": {"latent_parallel": 2, "micro_batch_size": 20}}
    runs = [one_run(data, tmp_path / name, **options, **grid) for name, grid in grids.items()]
    assert in_processes(2, *runs) == [0, 0]
    for name in grids:
        assert_similar_run(tmp_path / name / "sae.pth", trained)


def test_a_run_starts_from_an_sae_of_its_kind_only(data, trained, tmp_path, capsys):
    path = train(data, tmp_path, num_epochs=1, learning_rate=0.0, model_load_path=trained, **everything(data))
    first, second = (torch.load(p, weights_only=True) for p in (trained, path))
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-6)
    options = {"data_dir": data, **places(tmp_path / "x"), **TRAINING}
    said = refusal(sae_training, capsys, **options, model_load_path=trained)
    assert "but this run trains the published kind; load another or change the options" in said


def with_longer(data: Path, folder: Path, every: int, factor: float) -> Path:
    """A copy of the batches in which some activations are longer, statistics as before."""
    shutil.copytree(data, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for record in manifest["shards"]:
        acts = load_file(folder / record["file"])["acts"]
        acts[::every] *= factor
        save_file({"acts": acts}, folder / record["file"])
        record |= {"sha256": sha256(folder / record["file"]), "bytes": (folder / record["file"]).stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_few_long_activations_are_pointed_out(data, tmp_path, capsys):
    """Without a normalisation they decide what is learned."""
    options = {"num_epochs": 1, "normalization": "scale"}
    train(data, tmp_path / "a", **options)
    assert "the few longest activations" not in capsys.readouterr().out
    train(with_longer(data, tmp_path / "long", 20, 100), tmp_path / "b", **options)
    assert "root mean square length is 23 times the median" in capsys.readouterr().out


def test_one_activation_in_thousands_does_not_end_a_run(data, tmp_path):
    """As where attention rests: those 10 times as long as the others are made that long."""
    z = torch.randn(5, D) * torch.tensor([[1.0], [2.0], [100.0], [0.0], [1e4]])
    found = shortened(z)
    assert found[[0, 1, 3]].equal(z[[0, 1, 3]])
    torch.testing.assert_close(found[[2, 4]].norm(dim=1), torch.full((2,), 10 * D**0.5))
    torch.testing.assert_close(found[2] / found[2].norm(), z[2] / z[2].norm())
    longer = with_longer(data, tmp_path / "long", 701, 200)
    plain, other = (metrics_of(train(d, tmp_path / d.name, normalization="none"))[-1] for d in (data, longer))
    assert other["val_fvu"] < 1.2 * plain["val_fvu"]


# ---- refusals


def test_targets_of_other_tokens_are_refused(data, tmp_path, capsys):
    options = {"data_dir": data, **places(tmp_path), **TRAINING}
    said = refusal(sae_training, capsys, **options, target_data_dir=data)
    assert "are both of layers.1.attention_norm; name another site's batches" in said
    said = refusal(sae_training, capsys, **options, skip=True)
    assert "--skip is for a transcoder" in said and "--target_data_dir" in said
    shuffled = {"batch_size": 32, "validation_fraction": 0.2, "num_processes": 1, "seed": 5}
    run_script(sae_preprocessing, input_dir=data.parent / "targetsite", output_dir=tmp_path / "other", **shuffled)
    said = refusal(sae_training, capsys, **options, target_data_dir=tmp_path / "other")
    assert "do not hold the same tokens in the same order; capture both sites in one run" in said


@pytest.mark.parametrize("sizes", [(40, 16), (16, N_LATENTS), (16, 16)])
def test_prefixes_that_do_not_nest_are_refused(data, tmp_path, capsys, sizes):
    said = refusal(sae_training, capsys, data_dir=data, **places(tmp_path), **TRAINING, matryoshka=sizes)
    assert "must ascend and stay below --n_latents 96" in said and not (tmp_path / "checkpoints").exists()


def test_runs_from_before_these_options_continue(data, tmp_path):
    """Their checkpoint folders do not mention them."""
    path = train(data, tmp_path)
    manifest = tmp_path / "checkpoints" / "manifest.json"
    before = json.loads(manifest.read_text())
    assert all(before["decides"].pop(name, "absent") is None for name in sae_training._SINCE)
    manifest.write_text(json.dumps(before))
    path.unlink()
    train(data, tmp_path)
    assert path.exists()
