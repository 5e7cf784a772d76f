"""Every kind of SAE and transcoder against the dense formula of tests/support/dense_sae.py: encoded and decoded, in
files, in the evaluation, in attributions. Steering and top sentences of all kinds are in their own tests.

    .venv/bin/python -m pytest tests/test_sae_kinds.py
"""

import json
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import TINY_PARAMS
from support.dense_sae import KINDS, TARGET, Dense
from support.sae_runs import random_sae

import sae as sae_module
from autoencoder.evaluation import evaluate
from llama_3 import load_model
from microscope.attribution import attribution
from microscope.prompts import Prompt
from pipeline.errors import InputError
from sae import Kind, SparseAutoencoder, load_sae_model, save_sae
from serving import inspection
from serving.modes import MODES
from serving.steered_model import ModelChoice, SteeredModel
from serving.steering import Steering, make_steering, steering_function

D, N, K = 6, 40, 3
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
TRANSCODERS = {name: kind for name, kind in KINDS.items() if kind.target_site}
AUTOENCODERS = {name: kind for name, kind in KINDS.items() if not kind.target_site}


def make(kind: Kind, d_model: int = D, seed: int = 0) -> SparseAutoencoder:
    return random_sae(d_model, N, K, seed=seed, kind=kind).requires_grad_(False)


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    """Raw activations, each position with its own mean and scale."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=generator)
    return rand(*shape) * (0.2 + rand(*shape[:-1], 1).abs()) + 3 * rand(*shape[:-1], 1)


def dense_of(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*values.shape[:-1], N).scatter_add(-1, indices, values)


def test_the_kinds_have_every_value_of_every_field():
    for position, name in enumerate(Kind._fields):
        found = {kind[position] for kind in KINDS.values()}
        expected = {"gate": 3, "normalization": 3}.get(name, 2)
        assert len(found) >= expected, name


# ---- the formula


@every_kind
@pytest.mark.parametrize("shape", [(D,), (7, D), (2, 5, D)])
def test_forward_and_encode_equal_the_formula(kind, shape):
    sae, x = make(kind), inputs(*shape)
    oracle = Dense(sae)
    values, indices = sae.encode(x)
    latents = oracle.all_latents(x)
    width = K if kind.gate == "topk" else int((latents > 0).sum(-1).max())
    assert values.shape == indices.shape == (*shape[:-1], width) and indices.dtype == torch.int64
    assert (values >= 0).all() and (values.diff(dim=-1) <= 0).all()
    assert (indices >= 0).all() and (indices < N).all()
    np.testing.assert_allclose(dense_of(values, indices).numpy(), latents.numpy(), atol=2e-5)
    found = sae(x)
    assert found.shape == x.shape and found.dtype == x.dtype
    np.testing.assert_allclose(found.double().numpy(), oracle(x).numpy(), rtol=1e-4, atol=2e-5)


@every_kind
def test_the_interface_holds_together(kind):
    """normalize, encode, decode and restore are the steps of forward; normalize can be undone."""
    sae, x = make(kind), inputs(9, D)
    z, mean, std = sae.normalize(x)
    assert mean.shape == std.shape == (9, 1)
    torch.testing.assert_close(z * (std + sae.normalize_eps) + mean, x)
    values, indices = sae.encode(x)
    torch.testing.assert_close(sae.restore(sae.reconstruct(z, values, indices), mean, std), sae(x))
    if not kind.skip:
        torch.testing.assert_close(sae.decode(values, indices), sae.reconstruct(z, values, indices))
    if kind.target_site is None:
        torch.testing.assert_close(sae.normalize_target(x), z)
    else:
        torch.testing.assert_close(sae.restore(sae.normalize_target(x), mean, std), x)


@every_kind
def test_blocks_of_rows_and_their_widths_change_nothing(kind, monkeypatch):
    """Rows in blocks of three keep different numbers of latents; all are filled up to the widest."""
    sae, x = make(kind), inputs(17, D)
    values, indices = sae.encode(x)
    monkeypatch.setattr(sae_module, "_LEAST_ROWS", 3)
    monkeypatch.setattr(sae_module, "_BLOCK_BYTES", {"cpu": 1})
    again, where = sae.encode(x)
    assert again.shape == values.shape
    torch.testing.assert_close(dense_of(again, where), dense_of(values, indices))
    torch.testing.assert_close(sae.decode(again, where), sae.decode(values, indices))


@every_kind
@pytest.mark.filterwarnings("ignore:std\\(\\)")
def test_nothing_to_encode_or_to_keep(kind):
    sae = make(kind)
    assert sae(torch.zeros(0, D)).shape == (0, D)
    assert sae.encode(torch.zeros(2, 0, D))[0].shape == (2, 0, K if kind.gate == "topk" else 1)
    sae.encoder.bias.fill_(-1000.0)
    values, indices = sae.encode(inputs(4, D))
    assert values.shape == (4, K if kind.gate == "topk" else 1) and not values.any()
    assert sae.decode(values, indices).equal(sae.b_pre.expand(4, D))


@pytest.mark.parametrize("gate", ["topk", "jumprelu", "relu"])
def test_nan_is_seen(gate):
    """NaN from a broken checkpoint must reach the checks behind encode."""
    sae, x = make(Kind(gate)), inputs(4, D)
    x[2, 1] = torch.nan
    values, _ = sae.encode(x)
    assert not values[2].isfinite().all() and values[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("gate", ["jumprelu", "relu"])
def test_raising_a_pre_activation_lets_the_gate_through(gate):
    sae, x = make(Kind(gate)), inputs(5, D)
    h_bias = torch.zeros(N)
    assert all(a.equal(b) for a, b in zip(sae.encode(x, h_bias), sae.encode(x), strict=True))
    h_bias[11] = 50.0
    before, after = dense_of(*sae.encode(x)), dense_of(*sae.encode(x, h_bias))
    pre = (sae.normalize(x)[0] - sae.b_pre) @ sae.encoder.weight.t() + sae.encoder.bias
    torch.testing.assert_close(after[:, 11], pre[:, 11] + 50)
    after[:, 11] = before[:, 11]
    assert after.equal(before)


@every_kind
def test_slices_hold_what_the_whole_holds(kind):
    sae = make(kind)
    parts = [sae.slice(rank, 4) for rank in range(4)]
    for name, whole in sae.state_dict().items():
        pieces = [part.state_dict()[name] for part in parts]
        if name in ("b_pre", "skip"):
            assert all(piece.equal(whole) for piece in pieces)
        else:
            assert torch.cat(pieces, dim=1 if name == "decoder.weight" else 0).equal(whole), name
    assert all(part.kind == kind and part.k == K for part in parts)


# ---- files


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(kind, dtype, tmp_path):
    sae, x = make(kind), inputs(9, D)
    sae.info = {"site": "layers.1.ffn_norm"}
    save_sae(sae, tmp_path / "sae.pth", sae.info, dtype)
    loaded = load_sae_model(tmp_path / "sae.pth")
    assert (loaded.kind, loaded.k, loaded.normalize_eps) == (kind, K, sae.normalize_eps)
    assert loaded.site == "layers.1.ffn_norm" and loaded.output_site == (kind.target_site or "layers.1.ffn_norm")
    if loaded.threshold is not None:
        assert loaded.threshold.equal(sae.threshold)  # float32 in either file
    if dtype == torch.float32:
        assert loaded(x).equal(sae(x))
    np.testing.assert_allclose(loaded(x).double().numpy(), Dense(loaded)(x).numpy(), rtol=1e-4, atol=2e-5)
    info = json.loads((tmp_path / "sae.json").read_text())
    assert info["format_version"] == (1 if kind == Kind() else 2)  # what only new code reads, old code refuses
    assert {name: info[name] for name in Kind._fields if name in info} == kind.not_default
    assert ("normalize_eps" in info) == (kind.normalization == "layer_norm")
    save_sae(loaded, tmp_path / "again.pth", loaded.info, dtype)
    assert json.loads((tmp_path / "again.json").read_text()) == info


def test_a_kind_without_json_is_told_by_keywords(tmp_path):
    sae, x = make(Kind("relu", "none", centred=False)), inputs(4, D)
    torch.save(sae.state_dict(), tmp_path / "a.pth")
    loaded = load_sae_model(tmp_path / "a.pth", gate="relu", normalization="none", centred=False)
    assert loaded(x).equal(sae(x)) and loaded.k is None
    with pytest.raises(InputError, match="a.pth.* give k "):
        load_sae_model(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gate": "softmax"}, "gate = 'softmax' is none of topk, jumprelu, relu"),
        ({"normalization": "batch"}, "normalization = 'batch' is none of layer_norm, none, scale"),
        ({"normalization": "scale", "scale": 0}, "scale = 0 is not a number above 0"),
        ({"normalization": "scale", "scale": "2"}, "scale = '2' is not a number above 0"),
        ({"scale": 2.0}, "scale = 2.0 contradicts normalization = 'layer_norm'"),
        ({"centred": "no"}, "centred = 'no' is neither true nor false"),
        ({"skip": True}, "which needs a target_site"),
        ({"target_scale": 2.0}, "which needs a target_site"),
        ({"format_version": 3}, "has format_version 3, this code reads 1 and 2"),
    ],
)
def test_an_impossible_kind_is_refused(tmp_path, change, sentence):
    save_sae(make(Kind()), tmp_path / "a.pth", {})
    info = json.loads((tmp_path / "a.json").read_text()) | change
    (tmp_path / "a.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=rf"a\.json.*{sentence}"):
        load_sae_model(tmp_path / "a.pth")


def test_a_file_that_lacks_what_its_kind_adds_is_refused(tmp_path):
    for kind, name in ((Kind("jumprelu"), "threshold"), (KINDS["skip transcoder, topk"], "skip")):
        save_sae(make(kind), tmp_path / "a.pth", {})
        state = torch.load(tmp_path / "a.pth")
        torch.save(state | {name: state[name][:-1]}, tmp_path / "a.pth")
        with pytest.raises(InputError, match=rf"a\.pth holds {name} as "):
            load_sae_model(tmp_path / "a.pth")
        del state[name]
        torch.save(state, tmp_path / "a.pth")
        with pytest.raises(InputError, match=rf"a\.pth is not an SAE: it needs .*'{name}'"):
            load_sae_model(tmp_path / "a.pth")


# ---- in a model


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir)


SENTENCES = [[5, 9, 200, 31, 7], [80, 3], [1, 2, 3, 4, 250, 6, 7, 8], [17, 17, 90]]
SITE = "layers.1.ffn_norm"  # what a transcoder to TARGET reads


@every_kind
def test_evaluation_equals_a_naive_one(model, kind):
    sae = make(kind, TINY_PARAMS["dim"])
    target = kind.target_site or SITE
    result = evaluate(model, {"it": sae}, SITE, SENTENCES, 20, None, target_site=kind.target_site)["it"]
    oracle, losses = Dense(sae), {"clean": [], "spliced": [], "zeroed": []}
    y, y_hat, latents = [], [], []
    for ids in SENTENCES:
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            clean = model.activations(tokens, [SITE, target])
            y.append(clean[target][0].double())
            y_hat.append(oracle(clean[SITE][0]))
            latents.append(oracle.all_latents(clean[SITE][0]))
            for name, x in {"clean": y[-1], "spliced": y_hat[-1], "zeroed": 0 * y[-1]}.items():
                with model.intervene(target, lambda _, x=x: x.float()[None]):
                    logits = model(tokens)[0, :-1].double()
                losses[name] += (logits.logsumexp(-1) - logits.gather(1, tokens[0, 1:, None])[:, 0]).tolist()
    y, y_hat, latents = torch.cat(y), torch.cat(y_hat), torch.cat(latents)
    fvu = lambda a, b: float((a - b).square().sum() / (a - a.mean(0)).square().sum())
    z, z_hat = y, y_hat
    if kind.target_site is None and kind.normalization == "layer_norm":
        mean, std = y.mean(1, keepdim=True), y.std(1, keepdim=True)
        z, z_hat = (y - mean) / (std + sae.normalize_eps), (y_hat - mean) / std
    expected = {
        "fvu": fvu(z, z_hat),
        "fvu_raw": fvu(y, y_hat),
        "l0": float((latents > 0).sum(1).double().mean()),
        **{f"loss_{name}": float(np.mean(values)) for name, values in losses.items()},
    }
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert result["silent_frac"] == pytest.approx(float((latents == 0).all(0).double().mean()))


@pytest.mark.parametrize("kind", AUTOENCODERS.values(), ids=AUTOENCODERS)
def test_attribution_sums_to_the_difference(model, kind):
    sae = make(kind, TINY_PARAMS["dim"])
    sae.info["site"] = "layers.1.resid_post"
    prompt = Prompt([5, 9, 200, 31], ["a"] * 4)
    parts, difference = attribution(model, prompt, 7, 8, sae)
    assert sum(part.amount for part in parts) == pytest.approx(difference, rel=1e-3, abs=1e-4)
    x = model.activations(torch.tensor([prompt.ids]), sae.site)[0, -1]
    fires = {f"latent {i}" for i in Dense(sae).all_latents(x).nonzero()[:, 0].tolist()}
    assert {part.name for part in parts if part.name.startswith("latent")} == fires and fires


def test_attribution_refuses_a_transcoder(model):
    sae = make(KINDS["transcoder, topk, raw"], TINY_PARAMS["dim"])
    sae.info["site"] = "layers.1.resid_pre"
    with pytest.raises(InputError, match="this one is a transcoder to layers.1.mlp_out"):
        attribution(model, Prompt([5, 9], ["a", "b"]), 7, 8, sae)


@pytest.mark.parametrize("kind", TRANSCODERS.values(), ids=TRANSCODERS)
def test_a_transcoder_adds_where_it_writes(model, kind):
    sae = make(kind, TINY_PARAMS["dim"])
    sae.info["site"] = SITE
    intervention = make_steering(sae, Steering({3: 2.0, 8: -0.5}), torch.full((N,), 4.0), None)
    assert intervention.site == TARGET
    x = inputs(5, TINY_PARAMS["dim"])
    directions = sae.decoder.weight.t().double()
    expected = x.double() + (8 * directions[3] - 2 * directions[8]) / kind.target_scale
    torch.testing.assert_close(intervention.fn(x).double(), expected, rtol=1e-5, atol=1e-4)
    assert steering_function(sae, {3: 0.0}, None)(x).equal(x)
    for mode in MODES:
        for keep_error in (True, False):
            if (mode, keep_error) != ("add", True):
                with pytest.raises(InputError, match="only added to it; choose mode add"):
                    steering_function(sae, {3: 1.0}, None, mode, keep_error)


class NoBos:
    bos_id = None


@pytest.mark.parametrize("gate", ["jumprelu", "relu"])
def test_a_text_read_in_parts_keeps_any_number_of_latents(model, gate, monkeypatch):
    """As the server reads: parts that keep different numbers are put together."""
    sae = make(Kind(gate), TINY_PARAMS["dim"])
    sae.info["site"] = SITE
    opened = SteeredModel(ModelChoice(), model, cast(Any, NoBos()), None, sae)
    ids = SENTENCES[2]
    monkeypatch.setattr(inspection, "_PART", 3)
    reading = inspection.kept_latents(opened, ids)
    with pytest.raises(StopIteration) as end:
        while True:
            next(reading)
    kept = end.value.value
    with torch.inference_mode():
        expected = Dense(sae).all_latents(model.activations(torch.tensor([ids]), SITE)[0])
    np.testing.assert_allclose(dense_of(kept.values, kept.indices).numpy(), expected.numpy(), atol=2e-4)


@every_kind
def test_what_a_latent_adds_to_the_output(kind):
    """In the raw space, but where each activation has a scale of its own."""
    sae, x = make(kind), inputs(4, D)
    added, base = sae.at_output(torch.tensor([2, 7]), torch.arange(N) / 4)
    _, mean, std = sae.normalize(x)
    values, indices = torch.tensor([[0.5, 1.75]]).expand(4, 2), torch.tensor([[2, 7]]).expand(4, 2)
    x_hat = sae.restore(sae.decode(values, indices), mean, std)
    expected = (base + added.sum(0)).expand(4, D)
    if kind.target_site is None and kind.normalization == "layer_norm":
        expected = expected * std + mean
    torch.testing.assert_close(x_hat, expected)


@pytest.mark.parametrize("to", [("none", 1.0), ("scale", 0.3)], ids=str)
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.normalization != "layer_norm"])
def test_other_constant_scales_compute_the_same(name, to):
    kind = KINDS[name]
    if kind.target_site and kind.centred:
        pytest.skip("a centred transcoder takes off the bias of another space")
    sae, x = make(kind), inputs(6, D)
    other = sae.rescaled(*to, 5.0 if kind.target_site else 1.0)
    assert other.kind[1:3] == to and other.kind.target_scale == (5.0 if kind.target_site else 1.0)
    assert other.decoder.weight.equal(sae.decoder.weight)
    torch.testing.assert_close(other(x), sae(x), rtol=1e-4, atol=1e-4)
    fires = lambda each: dense_of(*each.encode(x)) > 0
    assert fires(other).equal(fires(sae)) and fires(sae).any()
