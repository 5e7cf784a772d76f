"""The evaluation against a naive computation: one sentence at a time, dense TopK, forward hooks on the site's module.

KL comes from torch.distributions, histograms from plain counting.

.venv/bin/python -m pytest tests/test_evaluation.py
"""

import json
import math
import random
import shutil
import statistics

import pytest
import torch
from conftest import TINY_PARAMS
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pipeline_runs import SITE, call, refusal, some_texts, write_sentences
from torch.distributions import Categorical, kl_divergence

import autoencoder.evaluation
import sae_evaluation
from autoencoder.evaluation import by_position, evaluate, padded_batches
from autoencoder.frequencies import frequency_histogram
from autoencoder.measures import MEASURES
from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import checkpoint_identity
from pipeline.errors import InputError
from pipeline.source import Source
from sae import SparseAutoencoder, save_sae

D_MODEL, N_LATENTS, K = TINY_PARAMS["dim"], 90, 5
BOS_ID = 276


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir)


def make_sae(seed: int = 1, k: int = K) -> SparseAutoencoder:
    sae = SparseAutoencoder(D_MODEL, N_LATENTS, k)
    generator = torch.Generator().manual_seed(seed)
    sae.initialize(0.1 * torch.randn(D_MODEL, generator=generator), generator)
    with torch.no_grad():
        sae.encoder.bias.sub_(1.6)  # so that some of the k kept are not above zero
        sae.encoder.bias[:20] = -100.0  # never fire
        sae.encoder.bias[20:22] = 3.0  # dense
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def sae():
    return make_sae()


@pytest.fixture(scope="module")
def sentences():
    rng = random.Random(2)
    return [[rng.randrange(276) for _ in range(n)] for n in (9, 2, 14, 3, 3, 8, 21, 2, 5)]


def run(model, sae, sentences, batch_tokens=40, bos_id=None) -> dict:
    return evaluate(model, {"it": sae}, SITE, sentences, batch_tokens, bos_id)["it"]


# ---- the naive computation


def log_probs(model, tokens: list[int], replace=None, n_kept: int = 0) -> torch.Tensor:
    """At every position but the last, float64. replace: maps the site's activations, except the first n_kept."""

    def hook(_module, _inputs, x):
        return torch.cat([x[:, :n_kept], replace(x[:, n_kept:])], dim=1)

    handle = model.layers[1].attention_norm.register_forward_hook(hook) if replace else None
    with torch.no_grad():
        found = model(torch.tensor([tokens]))[0, :-1].double().log_softmax(-1)
    if handle:
        handle.remove()
    return found


def activations(model, tokens: list[int]) -> torch.Tensor:
    found = []
    handle = model.layers[1].attention_norm.register_forward_hook(lambda m, i, x: found.append(x[0].detach()))
    model(torch.tensor([tokens]))
    handle.remove()
    return found[0].double()


def naive(model, sae, sentences, bos_id=None) -> dict:
    starts = [] if bos_id is None else [bos_id]
    raw = [activations(model, starts + ids)[len(starts) :] for ids in sentences]
    losses = {kind: [] for kind in ("clean", "spliced", "zeroed", "mean")}
    kl = {kind: [] for kind in losses}
    z, z_hat, active, places, x_hat = [], [], [], [], []
    for number, ids in enumerate(sentences):
        mean = torch.cat([x for other, x in enumerate(raw) if other != number]).mean(0).float()
        tokens = starts + ids
        clean = log_probs(model, tokens)
        replacements = {
            "clean": lambda x: x,
            "spliced": sae,
            "zeroed": lambda x: 0 * x,
            "mean": lambda x, mean=mean: 0 * x + mean,
        }
        for kind, replace in replacements.items():
            found = log_probs(model, tokens, replace, len(starts))
            losses[kind] += [-float(row[target]) for row, target in zip(found, tokens[1:], strict=True)]
            kl[kind] += kl_divergence(Categorical(logits=clean), Categorical(logits=found)).tolist()
        for place, x in enumerate(raw[number], 1):
            places.append(place)
            z.append((x - x.mean()) / (x.std() + sae.normalize_eps))
            pre_acts = sae.encoder.weight.double() @ (z[-1] - sae.b_pre.double()) + sae.encoder.bias.double()
            kept = pre_acts.topk(sae.k).indices
            latents = torch.zeros_like(pre_acts)
            latents[kept] = pre_acts[kept].relu()
            active.append(latents > 0)
            z_hat.append(sae.decoder.weight.double() @ latents + sae.b_pre.double())
            x_hat.append(z_hat[-1] * x.std() + x.mean())
    z, z_hat, active = torch.stack(z), torch.stack(z_hat), torch.stack(active)
    mse, x = (z - z_hat).square().mean(1).tolist(), torch.cat(raw)
    loss = {kind: statistics.fmean(values) for kind, values in losses.items()}
    return {
        "fvu": float((z - z_hat).square().sum() / (z - z.mean(0)).square().sum()),
        "fvu_raw": float((x - torch.stack(x_hat)).square().sum() / (x - x.mean(0)).square().sum()),
        "mse_normalized": statistics.fmean(mse),
        "cosine": statistics.fmean(float(a @ b / (a.norm() * b.norm())) for a, b in zip(z, z_hat, strict=True)),
        "l0": float(active.sum(1).double().mean()),
        "n_latents": len(active[0]),
        "silent_frac": float((~active.any(0)).double().mean()),
        "dense_frac": float((active.double().mean(0) > 0.1).double().mean()),
        "by_position": [
            {
                "first": first,
                "last": min(last, max(places)),
                "tokens": len(here),
                "mse_normalized": statistics.fmean(here),
            }
            for first, last in ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31))
            if (here := [error for error, place in zip(mse, places, strict=True) if first <= place <= last])
        ],
        "firing_counts": active.sum(0).tolist(),
        **{f"loss_{kind}": value for kind, value in loss.items()},
        "zeroing_cost": loss["zeroed"] - loss["clean"],
        "mean_cost": loss["mean"] - loss["clean"],
        "loss_recovered": (loss["zeroed"] - loss["spliced"]) / (loss["zeroed"] - loss["clean"]),
        "loss_recovered_mean": (loss["mean"] - loss["spliced"]) / (loss["mean"] - loss["clean"]),
        **{f"kl_{kind}": statistics.fmean(kl[kind]) for kind in ("spliced", "zeroed", "mean")},
        "tokens": len(z),
        "predictions": len(losses["clean"]),
        "sentences": len(sentences),
    }  # fmt: skip


def check(found: dict, expected: dict) -> None:
    """Everything must be equal; consumes found and expected."""
    for name in ("loss_recovered", "loss_recovered_mean"):
        # Ratios of small differences between losses in float32: their rounding shows in its fourth digit.
        assert found.pop(name) == pytest.approx(expected.pop(name), rel=2e-3, abs=1e-4)
    bands, expected_bands = found.pop("by_position"), expected.pop("by_position")
    assert [pytest.approx(band, rel=1e-4) for band in expected_bands] == bands
    check_histogram(found.pop("firing_frequency"), expected.pop("firing_counts"), expected["tokens"])
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def check_histogram(histogram: dict, counts: list[int], n_tokens: int) -> None:
    """Every firing latent is in the bin whose lower end is below its frequency and whose upper end is not."""
    edges = histogram["log10_edges"]
    where = [math.log10(n / n_tokens) for n in counts if n]
    expected = [sum(left < x <= right for x in where) for left, right in zip(edges, edges[1:], strict=False)]
    expected[0] += sum(x == edges[0] for x in where)
    assert histogram["latents"] == expected and sum(expected) == len(where)
    assert edges[-1] == 0 and edges[0] <= -math.log10(n_tokens)


# ---- evaluate


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("bos_id", [None, BOS_ID])
def test_equals_the_naive_computation(model, sae, sentences, batch_tokens, bos_id):
    expected = naive(model, sae, sentences, bos_id)
    # The data covers these cases: latents below k, silent and dense ones, four different losses.
    assert 0 < expected["l0"] < K and 20 / N_LATENTS <= expected["silent_frac"] < 1
    assert 2 / N_LATENTS <= expected["dense_frac"] < 1
    assert len({round(expected[f"loss_{name}"], 3) for name in ("clean", "spliced", "zeroed", "mean")}) == 4
    check(run(model, sae, sentences, batch_tokens, bos_id), expected)


@pytest.mark.parametrize("site", ["layers.0.resid_pre", SITE, "layers.2.resid_post"])
def test_layers_before_the_site_are_computed_once(model, sae, sentences, site, monkeypatch):
    """Unless they do not fit the memory set aside for them; the results are the same."""
    layer, n_layers = int(site.split(".")[1]), TINY_PARAMS["n_layers"]
    n_batches = sum(
        1
        for _ in padded_batches(sentences, [[range(len(ids))] for ids in sentences], 40, None, model.device, "batches")
    )
    ran = []
    handles = [
        each.attention.register_forward_pre_hook(lambda m, inputs, i=i: ran.append(i))
        for i, each in enumerate(model.layers)
    ]
    found = evaluate(model, {"it": sae}, site, sentences, 40, None)["it"]
    beyond = site.endswith("resid_post")  # the first pass reaches the attention of the site's layer
    expected = {i: 1 if i < layer else 4 + (beyond and i == layer) for i in range(n_layers)}
    assert {i: ran.count(i) / n_batches for i in range(n_layers)} == expected
    ran.clear()
    monkeypatch.setattr(autoencoder.evaluation, "KEPT_BYTES", 0)
    assert evaluate(model, {"it": sae}, site, sentences, 40, None)["it"] == found
    assert ran.count(0) / n_batches == (2 if layer else 4)
    for handle in handles:
        handle.remove()


def test_pieces_bound_the_logits_and_change_nothing(model, sae, sentences, monkeypatch):
    expected = run(model, sae, sentences, 10_000)
    monkeypatch.setattr(autoencoder.evaluation, "ROWS", 4)
    rows = []
    handle = model.output.register_forward_hook(lambda m, inputs, out: rows.append(inputs[0].numel() // D_MODEL))
    found = run(model, sae, sentences, 10_000)
    handle.remove()
    assert max(rows) == 4 and sum(rows) == 4 * expected["predictions"]  # never padding, never more at once
    assert found.pop("by_position") == [pytest.approx(band) for band in expected.pop("by_position")]
    assert found.pop("firing_frequency") == expected.pop("firing_frequency")
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_begin_of_text_is_never_counted(model, sae, sentences):
    without, with_bos = run(model, sae, sentences), run(model, sae, sentences, bos_id=BOS_ID)
    assert without["tokens"] == with_bos["tokens"] == sum(map(len, sentences))
    assert without["loss_clean"] != with_bos["loss_clean"]
    one_token = [[ids[0]] for ids in sentences]  # the prediction after begin-of-text counts, and nothing reaches it
    losses = [-float(log_probs(model, [BOS_ID, *ids])[0, ids[0]]) for ids in one_token]
    found = run(model, sae, one_token, bos_id=BOS_ID)
    assert found["loss_clean"] == pytest.approx(statistics.fmean(losses), rel=1e-5)
    assert found["zeroing_cost"] == found["mean_cost"] == found["kl_spliced"] == 0
    assert found["loss_recovered"] is None and found["loss_recovered_mean"] is None


@pytest.mark.parametrize("bos_id", [None, BOS_ID])
def test_a_perfect_reconstruction_costs_nothing(model, sentences, bos_id):
    found = run(model, lambda x: x, sentences, bos_id=bos_id)
    assert found["fvu"] == found["mse_normalized"] == found["kl_spliced"] == 0
    assert found["loss_recovered"] == found["loss_recovered_mean"] == 1
    assert found["loss_spliced"] == found["loss_clean"] and found["cosine"] == pytest.approx(1)
    assert found["l0"] is None and found["silent_frac"] is None and found["n_latents"] is None


def test_a_perfect_sae_costs_nothing(model, sentences):
    sae = SparseAutoencoder(D_MODEL, 2 * D_MODEL, 2 * D_MODEL, normalize_eps=1e-12)  # relu(z) - relu(-z) = z
    directions = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    state = {"b_pre": torch.zeros(D_MODEL), "encoder.bias": torch.zeros(2 * D_MODEL)}
    sae.load_state_dict(state | {"encoder.weight": directions, "decoder.weight": directions.T})
    found = run(model, sae.requires_grad_(False), sentences)
    assert found["fvu"] == pytest.approx(0, abs=1e-10) and found["kl_spliced"] == pytest.approx(0, abs=1e-6)
    assert found["loss_recovered"] == pytest.approx(1, abs=1e-3) and found["l0"] == D_MODEL
    assert found["dense_frac"] == 1 and found["silent_frac"] == 0


@pytest.mark.parametrize("bos_id", [None, BOS_ID])
def test_zero_recovers_nothing(model, sentences, bos_id):
    found = run(model, torch.zeros_like, sentences, bos_id=bos_id)
    assert found["loss_recovered"] == 0 and found["loss_spliced"] == found["loss_zeroed"]
    assert found["kl_spliced"] == found["kl_zeroed"] > 0
    assert found["fvu"] >= 1  # zero is no better than the mean


def test_a_function_is_measured_as_the_sae_it_is(model, sae, sentences):
    """As a peer's SAE is, a function of raw activations."""
    expected = run(model, sae, sentences)
    found = run(model, lambda x: sae(x), sentences)
    for name in ("l0", "n_latents", "silent_frac", "dense_frac"):
        assert found.pop(name) is None and expected.pop(name) is not None
    del expected["firing_frequency"]
    # In raw space eps is lost: sae(x) is z_hat * std + mean.
    assert found.pop("by_position") == [pytest.approx(band, rel=1e-3) for band in expected.pop("by_position")]
    assert found == pytest.approx(expected, rel=1e-3)


def test_several_share_all_but_their_own_pass(model, sae, sentences, monkeypatch):
    saes = {"one": sae, "clean": make_sae(seed=7, k=3), "mean": torch.zeros_like}
    alone = {name: run(model, each, sentences) for name, each in saes.items()}
    calls = []
    original = model.activations
    monkeypatch.setattr(model, "activations", lambda *args: calls.append(1) or original(*args))
    together = evaluate(model, saes, SITE, sentences, 10_000, None)
    assert len(calls) == 4 + len(saes)  # one batch: as far as the site, clean, zeroed, mean
    assert evaluate(model, saes, SITE, sentences, 40, None) == alone
    assert list(together) == list(saes) and alone["one"]["fvu"] != alone["clean"]["fvu"]


def test_one_sentence_has_no_mean_of_others(model, sae):
    found = run(model, sae, [[1, 2, 3, 4]])
    assert found["loss_mean"] is None and found["kl_mean"] is None and found["loss_recovered_mean"] is None
    assert found["mean_cost"] is None and found["loss_recovered"] is not None


def test_what_cannot_be_measured_is_said(model, sae, sentences):
    with pytest.raises(InputError, match=f"nan with {SITE} replaced by it"):
        run(model, lambda x: x * math.nan, sentences)
    with pytest.raises(InputError, match="All evaluated activations are the same"):
        run(model, lambda x: x, [[5]], bos_id=BOS_ID)
    with pytest.raises(InputError, match="second token"):
        run(model, lambda x: x, [[5], [6]])


@settings(max_examples=60)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n), max_size=40))))
def test_every_firing_latent_is_in_its_bin(case):
    n_tokens, counts = case
    histogram = frequency_histogram([n for n in counts if n], n_tokens)._asdict()
    check_histogram(histogram, counts, n_tokens)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_bands_of_position_hold_every_token_once(lengths):
    tokens = [sum(n > place for n in lengths) for place in range(max(lengths))]
    error = [2.0 * place * n for place, n in enumerate(tokens)]
    bands = by_position(error, tokens)
    assert [band["first"] for band in bands] == [2**i for i in range(len(bands))]
    assert [band["last"] + 1 for band in bands[:-1]] == [band["first"] for band in bands[1:]]
    assert bands[-1]["last"] == max(lengths) and sum(band["tokens"] for band in bands) == sum(lengths)
    for band in bands:
        places = [p for n in lengths for p in range(n) if band["first"] <= p + 1 <= band["last"]]
        assert band["mse_normalized"] == pytest.approx(statistics.fmean(2.0 * p for p in places))


# ---- the script

TEXTS = some_texts(80)


@pytest.fixture
def info(tiny_model_dir, tmp_path):
    """The fields that sae_training.py writes beside an SAE and the evaluation reads."""
    return {
        "site": SITE,
        "begin_of_text": False,
        "max_tokens": 12,
        "model_dir": str(tiny_model_dir),
        "model": checkpoint_identity(str(tiny_model_dir)),
        "sentences_dir": str(write_sentences(tmp_path / "sentences", TEXTS)),
        "dataset": {"sentences": 70, "seed": 42},
        "first_validation_sentence": 50,
        "quality": {"dead_frac": 0.125},
    }


@pytest.fixture
def sae_path(sae, info, tmp_path):
    save_sae(sae, tmp_path / "sae.pth", info)
    return tmp_path / "sae.pth"


def read(path) -> dict:
    return json.loads(path.with_suffix(".evaluation.json").read_text())


def size_of_png(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def forms() -> dict[str, str]:
    return {measure.key: measure.form for measure in MEASURES}


@pytest.mark.slow
@pytest.mark.parametrize(("n", "begin_of_text"), [(2000, False), (7, True)])
def test_script_takes_the_held_out_sentences(sae_path, sae, info, model, tiny_model_dir, capsys, n, begin_of_text):
    """begin_of_text: also with sentences other than those of the training, which then must be named."""
    trained_on = info["dataset"] | {"shards": [], "sentences_in_all": 80}
    if begin_of_text:
        trained_on |= {"shards": ["other sentences"], "sentences_in_all": 81}
    save_sae(sae, sae_path, info | {"begin_of_text": begin_of_text, "dataset": trained_on})
    options = {"sae_model_path": sae_path, "num_sentences": n, "batch_tokens": 100}
    if begin_of_text:
        assert info["sentences_dir"] in refusal(capsys, sae_evaluation, **options)
        options["sentences_dir"] = info["sentences_dir"]
    call(sae_evaluation, **options)
    tokenizer = load_tokenizer(tiny_model_dir)
    held_out = [tokenizer.encode(text)[:12] for text in TEXTS[50 : min(70, 50 + n)]]
    expected = naive(model, sae, [ids for ids in held_out if len(ids) > 1], tokenizer.bos_id if begin_of_text else None)
    result = read(sae_path)
    out = capsys.readouterr().out
    assert ("is not the training data" in out) == begin_of_text
    for name in ("fvu", "loss_recovered", "zeroing_cost", "kl_spliced"):
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert line.split()[1] == forms()[name].format(result[name])
    assert result.pop("site") == SITE and result.pop("dead_frac") == 0.125
    check(result, expected)
    assert min(size_of_png(sae_path.with_suffix(".evaluation.png"))) > 300
    assert {path.name for path in sae_path.parent.iterdir()} == {
        "sae.pth", "sae.json", "sae.evaluation.json", "sae.evaluation.png", "sentences"
    }  # fmt: skip


def test_an_sae_from_elsewhere_on_sentences_given(sae_path, sae, info, model, tiny_model_dir, capsys):
    """As sae_convert.py import writes it: no sentences, and so nothing that was held out."""
    known = ("site", "begin_of_text", "model_dir", "model")
    save_sae(sae, sae_path, {name: info[name] for name in known} | {"imported": {"format": "saelens"}})
    options = {"sae_model_path": sae_path, "num_sentences": 9, "batch_tokens": 100}
    assert "name a folder of sentences with --sentences_dir" in refusal(capsys, sae_evaluation, **options)
    call(sae_evaluation, **options, sentences_dir=info["sentences_dir"])
    assert "not the training data" not in capsys.readouterr().out
    given = [load_tokenizer(tiny_model_dir).encode(text) for text in TEXTS[:9]]
    expected, result = naive(model, sae, [ids for ids in given if len(ids) > 1]), read(sae_path)
    for name in ("fvu", "l0", "loss_clean", "loss_spliced"):
        assert result[name] == pytest.approx(expected[name], rel=1e-4)
    assert result["dead_frac"] is None


def test_script_works_from_anywhere_after_a_move(sae, info, tiny_model_dir, tmp_path, monkeypatch):
    before, after, elsewhere = tmp_path / "before", tmp_path / "after", tmp_path / "elsewhere"
    shutil.copytree(tiny_model_dir, before / "model")
    shutil.copytree(info["sentences_dir"], before / "sentences")
    source = Source.read(info, before / "sae.json")
    for name in ("model", "sentences"):
        source = source.with_folder(f"{name}_dir", before / name)
    (before / "runs").mkdir()
    save_sae(sae, before / "runs" / "sae.pth", info | source.as_json(before / "runs" / "sae.json"))
    before.rename(after)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    call(sae_evaluation, sae_model_path=after / "runs" / "sae.pth", batch_tokens=100)
    assert read(after / "runs" / "sae.pth")["sentences"] > 0


@pytest.mark.slow
def test_script_puts_several_side_by_side(sae_path, sae, info, tmp_path, capsys):
    other_site = "layers.2.resid_post"
    paths = [sae_path, tmp_path / "few.pth", tmp_path / "other" / "sae.pth"]
    save_sae(make_sae(seed=3, k=2), paths[1], info)
    paths[2].parent.mkdir()
    save_sae(sae, paths[2], info | {"site": other_site})
    call(sae_evaluation, sae_model_path=[*paths, paths[1]], batch_tokens=100)
    out = capsys.readouterr().out
    results = [read(path) for path in paths]
    rows = {line.split()[0]: line.split()[1:4] for line in out.splitlines() if line and line[0].isalpha()}
    for name in ("fvu", "l0", "loss_clean", "kl_spliced", "loss_recovered_mean"):
        assert rows[name] == [forms()[name].format(result[name]) for result in results]
    heading = next(line for line in out.splitlines() if line.startswith("  "))
    assert heading.split() == list(map(str, paths))  # two are called sae, so the columns have their paths
    assert [result["site"] for result in results] == [SITE, SITE, other_site]
    assert results[0]["loss_clean"] == results[1]["loss_clean"] == results[2]["loss_clean"]
    assert results[0]["loss_zeroed"] == results[1]["loss_zeroed"] != results[2]["loss_zeroed"]
    sizes = {size_of_png(path.with_suffix(".evaluation.png")) for path in paths}
    assert len(sizes) == 1 and min(size_of_png(tmp_path / "sae.comparison.png")) > 300
    assert not list(tmp_path.rglob("*.tmp")) and len(list(tmp_path.rglob("*.comparison.png"))) == 1
    # Alone, each has the same measurements.
    call(sae_evaluation, sae_model_path=paths[1], batch_tokens=100)
    assert read(paths[1]) == results[1]
    assert "few" in capsys.readouterr().out.splitlines()[1].split()


def test_a_failure_leaves_nothing(sae_path, sae, info, tmp_path, capsys):
    broken = make_sae()
    broken.b_pre.fill_(math.nan)
    save_sae(broken, tmp_path / "broken.pth", info)
    assert "broken.pth" in refusal(capsys, sae_evaluation, sae_model_path=[sae_path, tmp_path / "broken.pth"])
    assert not [*tmp_path.glob("*evaluation*"), *tmp_path.glob(".*")]


def test_script_refuses_what_does_not_fit_before_the_model_is_loaded(
    sae_path, sae, info, tmp_path, capsys, monkeypatch
):
    def must_not_load(*_args, **_keywords):
        raise AssertionError("the model was loaded before the input was checked")

    monkeypatch.setattr(sae_evaluation, "load_model", must_not_load)
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in refusal(capsys, sae_evaluation, sae_model_path=sae_path, llama_model_dir=nowhere)
    assert str(nowhere) in refusal(capsys, sae_evaluation, sae_model_path=sae_path, sentences_dir=nowhere)
    assert str(nowhere) in refusal(capsys, sae_evaluation, sae_model_path=nowhere)
    assert str(nowhere) in refusal(capsys, sae_evaluation, sae_model_path=[sae_path, nowhere])
    assert "--num_sentences" in refusal(capsys, sae_evaluation, sae_model_path=sae_path, num_sentences=0)
    assert "--batch_tokens" in refusal(capsys, sae_evaluation, sae_model_path=sae_path, batch_tokens=0)

    other = tmp_path / "other.pth"

    def of_other(sae=sae, **changes) -> str:
        save_sae(sae, other, {name: value for name, value in (info | changes).items() if value is not None})
        return refusal(capsys, sae_evaluation, sae_model_path=other)

    assert "held-out" in of_other(first_validation_sentence=70)
    assert "held out (first_validation_sentence" in of_other(first_validation_sentence=None)
    assert "layers" in of_other(site="layers.9.attention_norm") and str(other) in of_other(site="nothing")
    small = SparseAutoencoder(12, 24, 5)
    small.initialize(torch.zeros(12))
    said = of_other(small)
    assert "d_model 12" in said and str(D_MODEL) in said
    for changes in (
        {"model": {"name": "another"}},
        {"first_validation_sentence": 51},
        {"dataset": {"sentences": 69, "seed": 42}},
        {"begin_of_text": True},
        {"max_tokens": 11},
    ):
        save_sae(sae, other, info | changes)
        said = refusal(capsys, sae_evaluation, sae_model_path=[sae_path, other])
        assert str(sae_path) in said and str(other) in said and next(iter(changes)) in said
    other.with_suffix(".json").unlink()
    assert "no JSON" in refusal(capsys, sae_evaluation, sae_model_path=other)
    assert not [*tmp_path.glob("*evaluation*"), *tmp_path.glob("*comparison*")]


def test_a_place_that_cannot_be_written_is_said_before_the_model_is_loaded(sae_path, capsys, monkeypatch):
    monkeypatch.setattr(sae_evaluation, "load_model", None)
    sae_path.with_name("sae.evaluation.png").mkdir()
    said = refusal(capsys, sae_evaluation, sae_model_path=sae_path)
    assert "sae.evaluation.png cannot be written (Is a directory)" in said


# ---- parts of sentences, as of dialogues


def test_tokens_that_do_not_count_are_read_and_passed_through(model, sae, sentences):
    """Begin-of-text as a token that does not count gives what begin-of-text gives; a position further on."""
    expected = run(model, sae, sentences, bos_id=BOS_ID)
    longer = [[BOS_ID, *ids] for ids in sentences]
    counted = [[range(1, 2), range(2, len(ids))] for ids in longer]
    found = evaluate(model, {"it": sae}, SITE, longer, 40, None, counted)["it"]
    assert [band["first"] for band in found.pop("by_position")] == [2, 4, 8, 16]
    del expected["by_position"]
    assert found.pop("firing_frequency") == expected.pop("firing_frequency")
    assert found == pytest.approx(expected, rel=1e-6)


def test_only_what_counts_is_predicted_and_measured(model, sae, sentences):
    counted = [[range(1, 2), *([range(4, len(ids))] if len(ids) > 5 else [])] for ids in sentences]
    found = evaluate(model, {"it": sae}, SITE, sentences, 40, None, counted)["it"]
    losses, spliced = [], []
    for ids, places in zip(sentences, counted, strict=True):
        chosen = [i for part in places for i in part]

        def replace(x, chosen=chosen):
            x = x.clone()
            x[:, chosen] = sae(x[:, chosen])
            return x

        for into, rows in ((losses, log_probs(model, ids)), (spliced, log_probs(model, ids, replace))):
            into += [-float(rows[i - 1][ids[i]]) for i in chosen]
    assert found["tokens"] == found["predictions"] == len(losses) < sum(map(len, sentences))
    assert found["loss_clean"] == pytest.approx(statistics.fmean(losses), rel=1e-5)
    assert found["loss_spliced"] == pytest.approx(statistics.fmean(spliced), rel=1e-5)
