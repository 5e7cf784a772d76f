"""The SAE benchmarks: the naive step they compare with, their tables, and the peers' weights as ours.

.venv/bin/python -m pytest tests/test_sae_benchmarks.py        the peers' tests skip where those are not installed
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

PROJECT_DIR = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT_DIR / "benchmarks"))

import absorption
import sae_quality
import sae_step
from sae_step import Measured, Size
from support.pipeline_runs import call

from llama_3 import load_model, load_tokenizer
from sae import Kind, SparseAutoencoder

SIZE = Size(d_model=7, n_latents=20, k=3, batch_size=11)


def dense_step(state: dict[str, np.ndarray], x: np.ndarray, k: int, aux: bool, lr=5e-5, decay=0.01):
    """The first step of the original's method by its formulas, in float64: parameters after it, and gradients.

    aux: every latent counts as dead and is kept by the auxiliary loss, in which living latents are zeros.
    """
    w_enc, b_enc, w_dec, b_pre = (
        state[name].astype(np.float64) for name in ("encoder.weight", "encoder.bias", "decoder.weight", "b_pre")
    )
    x = x.astype(np.float64)
    z = (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True, ddof=1) + 1e-6)
    pre = (z - b_pre) @ w_enc.T + b_enc
    kept = pre >= np.sort(pre, axis=1)[:, -k][:, None]
    h = np.where(kept, pre, 0).clip(0)
    z_hat = h @ w_dec.T + b_pre
    g = 2 * (z_hat - z) / z.size
    grad_dec, grad_pre, grad_b = g.T @ h, (g @ w_dec) * (h > 0), g.sum(0)
    if aux:
        h_aux = pre.clip(0)
        g_aux = 2 * (h_aux @ w_dec.T + b_pre - (z - z_hat)) / z.size / 32
        grad_dec, grad_b = grad_dec + g_aux.T @ h_aux, grad_b + g_aux.sum(0)
        grad_pre = grad_pre + (g_aux @ w_dec) * (h_aux > 0)
    grad_dec -= w_dec * (w_dec * grad_dec).sum(0)
    grads = {
        "encoder.weight": grad_pre.T @ (z - b_pre),
        "encoder.bias": grad_pre.sum(0),
        "decoder.weight": grad_dec,
        "b_pre": grad_b - (grad_pre @ w_enc).sum(0),
    }
    after = {
        name: state[name] * (1 - lr * decay) - lr * grad / (np.abs(grad) + 6.25e-10) for name, grad in grads.items()
    }
    after["decoder.weight"] /= np.linalg.norm(after["decoder.weight"], axis=0)
    return after, grads


@pytest.mark.parametrize("aux", [False, True])
def test_original_step_follows_the_formulas(aux):
    torch.manual_seed(0)
    x = torch.randn(SIZE.batch_size, SIZE.d_model) * 3 + 1
    if aux:  # all of them count as dead from the first step on
        way = sae_step.original(SIZE, "cpu", dead_after_steps=0, k_aux=SIZE.n_latents)
    else:
        way = sae_step.original(SIZE, "cpu")
    before = {name: tensor.numpy().copy() for name, tensor in way.state().items()}
    way.train(iter([x]))
    expected, grads = dense_step(before, x.numpy(), SIZE.k, aux)
    for name, tensor in way.state().items():
        clear = np.abs(grads[name]) > 1e-6  # Adam's first step is the gradient's sign
        assert clear.mean() > 0.1
        np.testing.assert_allclose(tensor.numpy()[clear], expected[name][clear], atol=2e-7, err_msg=name)
        assert np.abs(tensor.numpy() - before[name])[clear].min() > 1e-6 or name == "decoder.weight"


@pytest.mark.parametrize("make", [sae_step.ours, sae_step.original])
def test_ways_learn(make):
    torch.manual_seed(0)
    x = torch.randn(SIZE.batch_size, SIZE.d_model)
    way = make(SIZE, "cpu")

    def error() -> float:
        sae = SparseAutoencoder(SIZE.d_model, SIZE.n_latents, SIZE.k)
        sae.load_state_dict(way.state())
        with torch.no_grad():
            return float((sae(x) - x).square().mean())

    before = error()
    way.train(x for _ in range(300))
    assert error() < 0.99 * before


@pytest.mark.parametrize("name", sae_step._PEERS)
def test_a_peers_weights_as_ours_reconstruct_the_same(name):
    if sae_step.missing(name):
        pytest.skip("peers are not installed here")
    torch.manual_seed(0)
    x = torch.randn(64, 24) * 2 + torch.randn(24)
    entry = sae_step.WAYS[name]
    way = entry.make(Size(24, 64, 4, 64), "cpu", **entry.options)
    way.train(x for _ in range(5))
    state = way.state()
    sae = SparseAutoencoder(24, 64, 4)
    sae.load_state_dict(state)
    with torch.no_grad():
        found = sae.decode(*sae.encode_normalized(x))
        assert way.reconstruct is not None
        torch.testing.assert_close(found, way.reconstruct(x), atol=1e-5, rtol=1e-5)
    assert found.std() > 0.01


def test_tables():
    ours = Measured([0.9, 1.0, 1.4], 2_500_000_000)
    product = Measured([0.5, 0.5, 0.7], 10**9)
    gone = Measured([], 0, "out of memory")
    found = {
        "ours, float32": ours,
        "sparsify": Measured([3.0], 1),
        "sparsify, Adam": Measured([2.0, 2.0], 10**9),
        "the original's way": gone,
        "encoder's product alone, float32": product,
    }
    lines = sae_step.table(found, 4000).splitlines()
    assert lines[2] == "| ours, float32 | 1,000.0 | 4,000 | 0.50 | - | 2.00 | 2.50 GB |"
    assert "out of memory" in lines[5]
    assert len({line.count("|") for line in lines}) == 1
    assert sae_step.fastest_peer(found) == "sparsify, Adam"
    grown = sae_step.growth_table("n_latents", {4096: {"ours, float32": ours, "the original's way": gone}})
    assert grown.splitlines()[2] == "| 4,096 | 1,000 ms, 2.5 GB | out of memory |"

    one = {"fvu": 0.1, "l0": 31.96, "dead_frac": 0.01, "silent_frac": 0.02, "loss_recovered": 0.98765}
    one["kl_spliced"] = 0.00321
    rows = sae_quality.table({"a site": {"ours": {**one, "training_seconds": 61.4}}}).splitlines()
    assert rows[2] == "| a site | ours | 0.1000 | 32.0 | 1.0% | 2.0% | 98.77% | 0.0032 | 61 s |"


@pytest.mark.slow
def test_step_benchmark_runs_without_peers(tmp_path, monkeypatch, capsys):
    """With two of the ways that need no peer, each of which is a process of its own."""
    find, peers = importlib.util.find_spec, {"sparsify", "sae_lens", "dictionary_learning"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name in peers else find(name, *args))
    own = ["ours, bfloat16 encoder", "the original's way"]
    ways = {name: entry for name, entry in sae_step.WAYS.items() if entry.package or name in own}
    monkeypatch.setattr(sae_step, "WAYS", ways)
    size = {"d_model": 16, "n_latents": 64, "k": 4, "batch_size": 32}
    output = tmp_path / "found.json"
    call(sae_step, device="cpu", **size, rounds=2, warm_up=1, threads=1, growth=False, output=output)
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("Not installed here, so not measured: "))
    assert all(peer in line for peer in sae_step._PEERS) and "ours" not in line
    steps = json.loads(output.read_text())["steps"]
    assert list(steps) == own
    assert all(len(one["seconds"]) == 2 and min(one["seconds"]) > 0 and one["error"] is None for one in steps.values())
    assert "| ours, bfloat16 encoder |" in out


@pytest.mark.slow
def test_a_way_without_memory_is_a_row():
    huge = Size(d_model=2**16, n_latents=2**30, k=4, batch_size=8)  # 256 TB of weights
    found = sae_step.measure_alone("the original's way", huge, "cpu", threads=1, rounds=1)
    assert found == Measured([], 0, "out of memory")


# ---- absorption


def test_absorption_of_an_sae_whose_absorption_is_known():
    """Words of three letters, each x = letter + word in orthogonal directions. The latent of a letter is silent on some
    words, where the word's own latent writes both; on others the word's own latent writes the word alone."""
    n_letters, n_words = 3, 40
    n = n_letters * n_words
    d = n_letters + n
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(1))).Q
    letters = torch.arange(n) // n_words
    generator = torch.Generator().manual_seed(2)
    hidden = torch.rand(n, generator=generator) < torch.tensor([0.0, 0.25, 0.5])[letters]
    is_test = torch.rand(n, generator=generator) < 0.5
    of_letter, of_word = basis[:n_letters], basis[n_letters:]
    encoder, decoder = torch.cat([of_letter, of_word]), torch.cat([of_letter, of_word])
    for word in hidden.nonzero().flatten().tolist():
        letter = int(letters[word])
        encoder[letter] -= 2 * of_word[word]
        encoder[n_letters + word] *= 2**0.5
        decoder[n_letters + word] = (of_letter[letter] + of_word[word]) / 2**0.5
    sae = SparseAutoencoder(d, d, kind=Kind("jumprelu", "none", centred=False))  # rounding does not fire
    zeros = torch.zeros(d)
    state = {"b_pre": zeros, "encoder.weight": encoder, "encoder.bias": zeros, "decoder.weight": decoder.t()}
    sae.load_state_dict(state | {"threshold": zeros + 0.1})
    x = of_letter[letters] + of_word
    torch.testing.assert_close(sae(x), x, atol=1e-5, rtol=1e-5)  # it hides, it does not lose

    words = absorption.Words(x, letters, is_test)
    probe = absorption.fit_probe(words)
    assert (probe.f1[:n_letters] == 1).all() and (probe.f1[n_letters:] == 0).all() and probe.is_right.all()
    rates = [float(hidden[is_test & (letters == letter)].float().mean()) for letter in range(n_letters)]
    found = absorption.absorption(sae, words, probe)
    assert found.rate == pytest.approx(sum(rates) / n_letters) and rates[2] > rates[1] > rates[0] == 0
    assert found.fraction == pytest.approx(found.rate) and found.main_latents == 1 and found.n_letters == n_letters


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 3))
@settings(max_examples=40)
def test_absorbed_as_its_definition_says(seed, n_latents, n_main):
    """A loop over words, in the words of SAEBench's definition."""
    rng = np.random.default_rng(seed)
    fires = rng.random((6, n_latents)) < 0.5
    cosines = rng.choice([-0.3, 0.02, 0.05, 0.1, 0.5], n_latents)
    added = np.where(fires, rng.choice([0.5, 1.0, 2.0], (6, n_latents)), 0) * cosines
    projection = rng.choice([-0.1, 0.05, 0.3, 1.0], 6)
    main = rng.choice(n_latents, min(n_main, n_latents), replace=False).tolist()
    found = absorption.absorbed(*map(torch.tensor, (added, projection, fires, cosines)), main)
    for word in range(6):
        top = int(added[word].argmax())
        full = not fires[word, main].any() and cosines[top] >= 0.025 and projection[word] >= 0
        full = full and added[word, top] >= 0.4 * projection[word]
        assert bool(found[0][word]) == full

        others = [i for i in range(n_latents) if i not in main and cosines[i] >= 0.1 and added[word, i] > 0]
        absorbing = sum(sorted((added[word, i] for i in others), reverse=True)[:3])
        mains = added[word, main].sum()
        if projection[word] <= 0 or mains >= projection[word] or absorbing / projection[word] < 0.4:
            expected = 0.0
        elif mains <= 0:
            expected = 1.0
        else:
            rest = min(absorbing, projection[word] - mains)
            expected = rest / (rest + mains)
        assert float(found[1][word]) == pytest.approx(expected, abs=1e-9)


def test_words_and_their_activations(tiny_model_dir):
    """Each as if the whole prompt had been read."""
    model, tokenizer = load_model(tiny_model_dir), load_tokenizer(tiny_model_dir)
    tokens, letters = absorption.word_tokens(tokenizer, model.args.vocab_size)
    texts = [tokenizer.decode([token]) for token in tokens]
    assert texts and all(text[0] == " " and text[1:].isalpha() for text in texts)
    assert [absorption.LETTERS[letter] for letter in letters] == [text[1].lower() for text in texts]
    site, prompt = "layers.1.resid_post", absorption.prompt_ids(tokenizer, tokenizer.bos_id)
    words = absorption.read_words(model, tokenizer, site, tokenizer.bos_id, len(tokens))
    assert sorted(words.letters.tolist()) == sorted(letters) and words.is_test.any()
    expected = torch.cat([model.activations(torch.tensor([[*prompt, token]]), site)[0, -1:] for token in tokens])
    for x, letter in zip(words.x, words.letters, strict=True):
        same = (expected - x).abs().amax(1) < 1e-3
        assert letters[int(same.nonzero()[0, 0])] == letter
    assert len(absorption.read_words(model, tokenizer, site, None, 2).x) == min(2, len(tokens))
