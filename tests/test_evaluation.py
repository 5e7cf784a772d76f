"""The evaluation against a naive computation: one sentence at a time, dense TopK, forward hooks on the site's module.

.venv/bin/python -m pytest tests/test_evaluation.py
"""

import contextlib
import json
import random

import pytest
import torch
from conftest import TINY_PARAMS
from helpers_pipeline import SITE, call, refusal, some_texts, write_sentences

import sae_evaluation
from llama_3 import load_model, load_tokenizer
from sae import TopKSparseAutoencoder, save_sae

D_MODEL, N_LATENTS, K = TINY_PARAMS["dim"], 90, 5


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir)


@pytest.fixture(scope="module")
def sae():
    sae = TopKSparseAutoencoder(D_MODEL, N_LATENTS, K)
    sae.initialize(0.1 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        sae.encoder.bias.sub_(1.6)  # so that some of the k kept are not above zero
        sae.encoder.bias[:20] = -100.0  # never fire
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def sentences():
    rng = random.Random(2)
    return [[rng.randrange(276) for _ in range(n)] for n in (9, 2, 14, 3, 3, 8, 21, 2, 5)]


def run(model, sae, sentences, batch_tokens=40, bos_id=None):
    with torch.inference_mode():
        return sae_evaluation.evaluate(model, sae, SITE, sentences, batch_tokens, bos_id)


def cross_entropy(model, ids: list[int], replace=None, n_kept: int = 0) -> list[float]:
    """-log p of every token but the first. replace: function of the site's activations, not of the first n_kept."""

    def hook(_module, _inputs, x):
        return torch.cat([x[:, :n_kept], replace(x[:, n_kept:])], dim=1)

    handle = model.layers[1].attention_norm.register_forward_hook(hook) if replace else None
    with torch.no_grad():
        log_probs = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    if handle:
        handle.remove()
    return [-float(log_probs[i, target]) for i, target in enumerate(ids[1:])]


def naive(model, sae, sentences, bos_id=None) -> dict:
    starts = [] if bos_id is None else [bos_id]
    losses = {"clean": [], "spliced": [], "zeroed": []}
    z, z_hat, active = [], [], []
    for ids in sentences:
        tokens = starts + ids
        for name, replace in {"clean": None, "spliced": sae, "zeroed": lambda x: 0 * x}.items():
            losses[name] += cross_entropy(model, tokens, replace, len(starts))
        found = []
        handle = model.layers[1].attention_norm.register_forward_hook(lambda m, i, x, found=found: found.append(x))
        model(torch.tensor([tokens]))
        handle.remove()
        for x in found[0][0, len(starts) :].double():
            z.append((x - x.mean()) / (x.std() + sae.normalize_eps))
            pre_acts = sae.encoder.weight.double() @ (z[-1] - sae.b_pre.double()) + sae.encoder.bias.double()
            kept = pre_acts.topk(sae.k).indices
            latents = torch.zeros_like(pre_acts)
            latents[kept] = pre_acts[kept].relu()
            active.append(latents > 0)
            z_hat.append(sae.decoder.weight.double() @ latents + sae.b_pre.double())
    z, z_hat, active = torch.stack(z), torch.stack(z_hat), torch.stack(active)
    clean, spliced, zeroed = (sum(values) / len(values) for values in losses.values())
    return {
        "fvu": float((z - z_hat).square().sum() / (z - z.mean(0)).square().sum()),
        "mse_normalized": float((z - z_hat).square().mean()),
        "l0": float(active.sum(1).double().mean()),
        "silent_frac": float((~active.any(0)).double().mean()),
        "loss_clean": clean,
        "loss_spliced": spliced,
        "loss_zeroed": zeroed,
        "zeroing_cost": zeroed - clean,
        "loss_recovered": (zeroed - spliced) / (zeroed - clean),
        "tokens": sum(map(len, sentences)),
        "sentences": len(sentences),
    }


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("bos_id", [None, 276])
def test_equals_the_naive_computation(model, sae, sentences, batch_tokens, bos_id):
    expected = naive(model, sae, sentences, bos_id)
    found = run(model, sae, sentences, batch_tokens, bos_id)
    # A ratio of small differences between losses in float32: their rounding shows in its fourth digit.
    assert found.pop("loss_recovered") == pytest.approx(expected.pop("loss_recovered"), rel=1e-3)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert 0 < expected["l0"] < K and 20 / N_LATENTS <= expected["silent_frac"] < 1  # the data has what this is about
    assert len({round(expected[f"loss_{name}"], 3) for name in ("clean", "spliced", "zeroed")}) == 3


def test_begin_of_text_is_never_counted(model, sae, sentences):
    without, with_bos = run(model, sae, sentences), run(model, sae, sentences, bos_id=276)
    assert without["tokens"] == with_bos["tokens"] == sum(map(len, sentences))
    assert without["loss_clean"] != with_bos["loss_clean"]
    one_token = [[ids[0]] for ids in sentences]  # the prediction after begin-of-text counts
    losses = [cross_entropy(model, [276, *ids])[0] for ids in one_token]
    assert run(model, sae, one_token, bos_id=276)["loss_clean"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


class Standin:
    """What `evaluate` needs of an SAE, with a reconstruction of one's choice in both spaces."""

    d_model, n_latents = D_MODEL, 4

    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, x):
        return x if self.scale == 1 else self.scale * x

    def normalize(self, x):
        return x, None, None

    def encode_normalized(self, z):
        self.z = z
        return torch.ones(*z.shape[:-1], 2), torch.zeros(*z.shape[:-1], 2, dtype=torch.int64)

    def decode(self, values, indices):
        return self.scale * self.z


@pytest.mark.parametrize("bos_id", [None, 276])
def test_a_perfect_sae_recovers_all(model, sentences, bos_id):
    result = run(model, Standin(1.0), sentences, bos_id=bos_id)
    assert result["loss_recovered"] == 1.0 and result["fvu"] == 0.0 and result["l0"] == 2.0
    assert result["loss_spliced"] == result["loss_clean"] and result["silent_frac"] == 0.75


@pytest.mark.parametrize("bos_id", [None, 276])
def test_zero_recovers_nothing(model, sentences, bos_id):
    result = run(model, Standin(0.0), sentences, bos_id=bos_id)
    assert result["loss_recovered"] == 0.0 and result["loss_spliced"] == result["loss_zeroed"]
    assert result["fvu"] >= 1.0  # zero is no better than the mean


def test_no_share_where_zeroing_costs_nothing(model, sae, monkeypatch):
    monkeypatch.setattr(model, "intervene", lambda *_: contextlib.nullcontext())
    result = run(model, sae, [[1, 2, 3]])
    assert result["zeroing_cost"] == 0 and result["loss_recovered"] is None


# ---- the script

TEXTS = some_texts(80)


@pytest.fixture
def sae_path(sae, tiny_model_dir, tmp_path):
    info = {
        "site": SITE,
        "begin_of_text": False,
        "max_tokens": 12,
        "model_dir": str(tiny_model_dir),
        "sentences_dir": str(write_sentences(tmp_path / "sentences", TEXTS)),
        "dataset": {"sentences": 70, "seed": 42},
        "first_validation_sentence": 50,
    }
    save_sae(sae, tmp_path / "sae.pth", info)
    return tmp_path / "sae.pth"


@pytest.mark.parametrize(("n", "begin_of_text"), [(2000, False), (7, True)])
def test_script_takes_the_held_out_sentences(sae_path, sae, model, tiny_model_dir, capsys, n, begin_of_text):
    info_path = sae_path.with_suffix(".json")
    info_path.write_text(json.dumps(json.loads(info_path.read_text()) | {"begin_of_text": begin_of_text}))
    call(sae_evaluation, sae_model_path=sae_path, num_sentences=n, batch_tokens=100)
    tokenizer = load_tokenizer(tiny_model_dir)
    held_out = [tokenizer.encode(text)[:12] for text in TEXTS[50 : min(70, 50 + n)]]
    expected = naive(model, sae, [ids for ids in held_out if len(ids) > 1], tokenizer.bos_id if begin_of_text else None)
    result = json.loads((sae_path.parent / "sae.evaluation.json").read_text())
    assert result.pop("site") == SITE
    assert result == pytest.approx(expected, rel=1e-4, abs=1e-5)
    out = capsys.readouterr().out
    assert all(name in out for name in ("fvu", "loss_recovered", "zeroing_cost"))


def test_script_refuses_what_does_not_fit(sae_path, tmp_path, capsys):
    info = json.loads(sae_path.with_suffix(".json").read_text())
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in refusal(capsys, sae_evaluation, sae_model_path=sae_path, llama_model_dir=nowhere)
    assert str(nowhere) in refusal(capsys, sae_evaluation, sae_model_path=sae_path, sentences_dir=nowhere)
    assert str(nowhere) in refusal(capsys, sae_evaluation, sae_model_path=nowhere)
    sae_path.with_suffix(".json").write_text(json.dumps(info | {"first_validation_sentence": 70}))
    assert "held-out" in refusal(capsys, sae_evaluation, sae_model_path=sae_path)
    del info["first_validation_sentence"]
    sae_path.with_suffix(".json").write_text(json.dumps(info))
    assert "held out" in refusal(capsys, sae_evaluation, sae_model_path=sae_path)
    other = TopKSparseAutoencoder(12, 24, 5)
    other.initialize(torch.zeros(12))
    save_sae(other, tmp_path / "other.pth", info | {"first_validation_sentence": 50, "d_model": 12})
    said = refusal(capsys, sae_evaluation, sae_model_path=tmp_path / "other.pth")
    assert "d_model 12" in said and str(D_MODEL) in said
    assert not list(tmp_path.glob("*.evaluation.json"))
