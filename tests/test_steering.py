"""Steering against a dense oracle in numpy: write all latents as a vector, edit it, decode. Then at every site of a
model, in simultaneous requests, and the benchmark's figures where they are known in advance.

.venv/bin/python -m pytest tests/test_steering.py
"""

import importlib.util
import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PROJECT_DIR, TINY_PARAMS
from hypothesis import given
from hypothesis import strategies as st
from support import sae_runs
from support.dense_sae import KINDS, Dense
from support.pipeline_runs import call, refusal

from latents.origin import read_info
from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import TINY_LLAMA_DIR
from llama_3.generation import generate
from llama_3.model import SITES, Intervention
from pipeline.errors import InputError
from sae import Kind, load_sae_model
from serving.modes import MODES, steering_defaults
from serving.steering import Steering, check_latents, highest_activations, make_steering, steering_function

D, N, K = 8, 20, 5
HIGHEST = torch.linspace(0.5, 3.0, N)
NEUTRAL = {"h_bias": 0.0, "add": 0.0, "scale": 1.0}  # the strength that changes nothing


def random_sae(*shape: int, seed: int = 0, kind: Kind = Kind()):  # noqa: B008
    return sae_runs.random_sae(*shape, seed=seed, kind=kind).requires_grad_(False)


def dense_steering(sae, x, strengths, highest, mode: str, keep_error: bool) -> torch.Tensor:
    """Steer x (..., d_model), one activation after another, in float64."""
    dense, rows = Dense(sae), []
    for row in x.reshape(-1, sae.d_model).double().numpy():
        pre_acts = dense.pre_acts(dense.normalized(row)[0])
        clean = dense.gated(pre_acts)
        steered = clean.copy()
        for latent, strength in strengths.items():
            target = strength * float(highest[latent])
            if mode == "h_bias":
                pre_acts[latent] += target
            else:
                now = steered[latent]
                steered[latent] = {"add": now + target, "clamp": target, "scale": now * strength, "ablate": 0}[mode]
        if mode == "h_bias":
            steered = dense.gated(pre_acts)
        x_hat, x_hat_steered = (dense.output(row, latents) for latents in (clean, steered))
        rows.append(row + x_hat_steered - x_hat if keep_error else x_hat_steered)
    return torch.from_numpy(np.stack(rows)).view(x.shape)


def random_x(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.7


# ---- the function


@given(
    st.dictionaries(st.integers(0, N - 1), st.integers(-24, 24).map(lambda n: n / 4), max_size=5),
    st.sampled_from(list(MODES)),
    st.booleans(),
    st.sampled_from([(D,), (7, D), (2, 3, D)]),
    st.sampled_from([kind for kind in KINDS.values() if kind.target_site is None]),
    st.integers(0, 50),
)
def test_equals_the_dense_oracle(strengths, mode, keep_error, shape, kind, seed):
    sae, x = random_sae(D, N, K, seed=seed, kind=kind), random_x(*shape, seed=seed)
    before = x.clone()
    steered = steering_function(sae, strengths, HIGHEST, mode, keep_error)(x)
    expected = dense_steering(sae, x, strengths, HIGHEST, mode, keep_error)
    torch.testing.assert_close(steered.double(), expected, rtol=2e-5, atol=2e-4)
    assert steered.dtype == x.dtype and x.equal(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("mode", "strength"), NEUTRAL.items())
def test_the_neutral_strength_changes_no_bit(mode, strength, dtype):
    sae, x = random_sae(D, N, K), random_x(100, D).to(dtype)
    steered = steering_function(sae, dict.fromkeys(range(N), strength), HIGHEST, mode)(x)
    assert steered.equal(x) and steered.dtype == dtype


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_is_rounded_once(mode):
    sae, x = random_sae(D, N, K), random_x(100, D).bfloat16()
    steered = steering_function(sae, {3: 2.0, 9: -1.5}, HIGHEST, mode)(x)
    expected = steering_function(sae, {3: 2.0, 9: -1.5}, HIGHEST, mode)(x.float())
    assert steered.equal(expected.bfloat16()) and not steered.equal(x)


def test_an_sae_in_bfloat16_steers():
    sae, x = random_sae(D, N, K), random_x(100, D)
    for mode in MODES:
        expected = steering_function(sae, {3: 4.0}, HIGHEST, mode)(x)
        found = steering_function(random_sae(D, N, K).bfloat16(), {3: 4.0}, HIGHEST, mode)(x)
        close = ((found - expected).abs() < 0.3).all(-1).float().mean()  # TopK may choose differently on a few
        assert found.dtype == torch.float32 and close > 0.9


# ---- refusals and files


@pytest.mark.parametrize(
    ("strengths", "mode", "said"),
    [
        ({3: 1.0, N: 1.0}, "add", f"latent {N};.*0 to {N - 1}"),
        ({-1: 1.0}, "add", "latent -1"),
        ({2: 1.0}, "ablate", "Latent 2 never fired"),
        ({3: math.nan}, "clamp", "strength nan"),
        ({3: -math.inf}, "h_bias", "strength -inf"),
        ({3: 1e30}, "add", "strength 1e\\+30; give a number from -1,000,000 to 1,000,000"),
        ({3: None}, "scale", "strength None"),
        ({3: 1.0}, "boost", "'boost'.*h_bias, add, clamp, scale, ablate"),
        ({}, "", "mode ''"),
    ],
)
def test_refuses(strengths, mode, said):
    highest = HIGHEST.clone()
    highest[2] = 0
    with pytest.raises(InputError, match=said):
        check_latents(strengths, highest, mode)
    with pytest.raises(InputError, match=said):
        steering_function(random_sae(D, N, K), strengths, highest, mode)


def test_refuses_the_activations_of_another_sae():
    with pytest.raises(InputError, match=f"{N} highest activations for {N + 1} latents"):
        steering_function(random_sae(D, N + 1, K), {3: 1.0}, HIGHEST)


def test_highest_activations(tmp_path):
    sae_path = str(tmp_path / "sae.pth")
    with pytest.raises(InputError, match=r"no .*sae\.latents\.parquet; run capture_top_activating_sentences\.py"):
        highest_activations(sae_path)
    pq.write_table(pa.table({"latent": [0, 1, 2], "max": pa.array([1.5, 0, 3], pa.float32())}), tmp_path / "table")
    (tmp_path / "table").rename(tmp_path / "sae.latents.parquet")
    assert highest_activations(sae_path).equal(torch.tensor([1.5, 0.0, 3.0]))
    pq.write_table(pa.table({"latent": [0, 1, 2]}), tmp_path / "sae.latents.parquet")
    with pytest.raises(InputError, match=r"sae\.latents\.parquet cannot be read"):
        highest_activations(sae_path)
    (tmp_path / "sae.latents.parquet").write_bytes(b"half a file")
    with pytest.raises(InputError, match=r"sae\.latents\.parquet cannot be read"):
        highest_activations(sae_path)


# ---- in a model


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir)


@pytest.fixture(scope="module")
def wide_sae():
    return random_sae(TINY_PARAMS["dim"], N, K)


BOS = 276
TOKENS = torch.tensor([[BOS, 5, 44, 100, 7, 3], [9, 8, BOS, 6, 5, 4]])


@pytest.mark.parametrize("kind", SITES)
def test_every_site(model, wide_sae, kind):
    site = f"layers.1.{kind}"
    clean, logits = model.activations(TOKENS, site), model(TOKENS)
    skipped = TOKENS == BOS
    strengths = dict.fromkeys(range(0, N, 2), 2.0)  # some of them fire on any token
    for mode in MODES:
        with model.intervene(site, steering_function(wide_sae, strengths, HIGHEST, mode), (BOS,)):
            steered, steered_logits = model.activations(TOKENS, site), model(TOKENS)
        expected = dense_steering(wide_sae, clean, strengths, HIGHEST, mode, True)
        expected[skipped] = clean[skipped].double()
        torch.testing.assert_close(steered.double(), expected, rtol=1e-4, atol=1e-3)
        assert steered[skipped].equal(clean[skipped])
        assert steered_logits[:, 0][0].equal(logits[:, 0][0]) and not steered_logits.equal(logits)
        if mode in NEUTRAL:
            with model.intervene(site, steering_function(wide_sae, {3: NEUTRAL[mode]}, HIGHEST, mode), (BOS,)):
                assert model(TOKENS).equal(logits)


def test_a_model_without_begin_of_text_is_steered_everywhere(model, wide_sae):
    wide_sae.info = {"site": "layers.1.resid_post"}
    asked_for = Steering({3: 6.0}, "add")
    everywhere = make_steering(wide_sae, asked_for, HIGHEST, bos_id=None)
    assert everywhere.skip_tokens == () and make_steering(wide_sae, asked_for, HIGHEST, BOS).skip_tokens == (BOS,)
    clean = model.activations(TOKENS, everywhere.site)
    with model.intervene(*everywhere):
        steered = model.activations(TOKENS, everywhere.site)
    assert ((steered - clean).abs().amax(-1) > 0).all()
    steps = list(generate(model, TOKENS.tolist(), 3, stop_tokens=[], steering=everywhere))
    assert len(steps) == 3


def test_unknown_highest_activations_count_as_one():
    sae, x = random_sae(D, N, K), random_x(20, D)
    found = steering_function(sae, {3: 4.0}, None)(x)
    assert found.equal(steering_function(sae, {3: 4.0}, torch.ones(N))(x))


REQUESTS = [  # (site, strengths, mode, keep_error)
    ("layers.1.resid_post", {3: 6.0, 7: 2.0}, "add", True),
    ("layers.1.attention_norm", {7: 9.0}, "h_bias", True),
    ("layers.1.resid_post", {3: -6.0}, "clamp", False),
    None,
]


def test_requests_at_the_same_time_do_not_meet(model, wide_sae):
    """Interleaved step by step in one thread, and in several threads; the SAE and the model keep no trace."""
    weights = {name: tensor.clone() for name, tensor in {**wide_sae.state_dict(), **model.state_dict()}.items()}
    options = {"max_new_tokens": 20, "stop_tokens": [], "temperature": 1.5, "seeds": [5, 6]}

    def start(request):
        if request is None:
            return generate(model, TOKENS.tolist(), **options)
        site, *how = request
        steering = Intervention(site, steering_function(wide_sae, how[0], HIGHEST, *how[1:]), (BOS,))
        return generate(model, TOKENS.tolist(), **options, steering=steering)

    alone = [list(start(request)) for request in REQUESTS]
    assert len({json.dumps(steps) for steps in alone}) == len(REQUESTS)
    in_turn = zip(*[start(request) for request in REQUESTS], strict=True)
    assert [list(steps) for steps in zip(*in_turn, strict=True)] == alone
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        for _ in range(3):
            assert list(pool.map(lambda request: list(start(request)), REQUESTS)) == alone
    after = {**wide_sae.state_dict(), **model.state_dict()}
    assert all(after[name].equal(tensor) for name, tensor in weights.items())


# ---- the embedded model


SAE_PATH = f"{TINY_LLAMA_DIR}/sae.pth"


def test_the_default_makes_a_latents_own_word_likelier():
    """Latents named “right”, “maximum” and “shape”, whose directions promote those words."""
    model, tokenizer, sae = load_model(TINY_LLAMA_DIR), load_tokenizer(TINY_LLAMA_DIR), load_sae_model(SAE_PATH)
    highest, default = highest_activations(SAE_PATH), steering_defaults(sae.info, SAE_PATH)
    tokens = torch.tensor([tokenizer.encode("It can be used when the second", bos=True)])
    words = {869: " right", 1784: " maximum", 2405: " shape"}
    ids = [tokenizer.encode(word) for word in words.values()]
    assert all(len(token) == 1 for token in ids)
    for latent in words:
        with model.intervene(*make_steering(sae, Steering({latent: default.strength}, default.mode), highest, 4096)):
            steered = model(tokens)[0, 1:].log_softmax(-1)
        gain = (steered - model(tokens)[0, 1:].log_softmax(-1)).mean(0)[torch.tensor(ids)[:, 0]]
        own = list(words).index(latent)
        assert gain[own] > 1 and gain.argmax() == own


# ---- the benchmark


@pytest.fixture(scope="module")
def benchmark():
    path = PROJECT_DIR / "benchmarks" / "steering.py"
    spec = importlib.util.spec_from_file_location("steering_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)  # as when it is run
        spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_benchmark(benchmark, tmp_path, capsys):
    """Strength 0 gives the clean figures, clamping to 0 those of ablation; the best setting respects its limits. The
    baselines, and steering against what is asked for, change the texts."""
    options = {"n_latents": 2, "n_prompts": 8, "max_new_tokens": 12, "doses": [0, 2], "factors": [1]}
    call(benchmark, output_dir=tmp_path, **options, differences=[0, 3])
    result = json.loads((tmp_path / "steering.json").read_text())
    figures = lambda row: [(row["words_share"], row["fired_share"], row["nats"], row["repeated"]), row["each"]]
    clean, best = result["clean"], result["best"]
    found = {(row["mode"], row["strength"], row["keep_error"]): row for row in result["settings"]}
    assert len(found) == 5 * 2 + 1 + 1 + 2 + 2
    for key in [("h_bias", 0, True), ("add", 0, True), ("scale", 1, True), ("difference of means", 0, True)]:
        assert figures(found[key]) == figures(clean)
    assert figures(found["clamp", 0, True]) == figures(found["ablate", 0, True])
    default = steering_defaults(read_info(SAE_PATH), SAE_PATH).strength
    strong = found["add", 2 * default, True]
    assert strong["words_share"] > clean["words_share"] and strong["nats"] > clean["nats"] + 0.3
    assert found["difference of means", 3, True]["each"] != clean["each"]
    asked, down = found["asked", 0, True], found["asked, steered down", -default, True]
    assert asked["each"] != clean["each"] and down["each"] != asked["each"]
    assert best in result["settings"] and best["nats"] <= clean["nats"] + 0.5
    texts = [one["example"] for one in strong["each"]]
    assert all(texts) and len(set(texts)) == 2
    out = capsys.readouterr().out
    assert f"| clean |  | {clean['words_share']:.1%} ± " in out and out.count("\n| ") == len(found) + 2
    added = [row["each"] for row in result["settings"] if row["mode"] == "add"]
    best_each = []
    for before, *of_one in zip(clean["each"], *added, strict=True):
        cheap = [one for one in of_one if one["nats"] <= before["nats"] + 0.5]
        cheap = [one for one in cheap if one["repeated"] <= before["repeated"] + 0.05]
        best_each.append(max(one["words_share"] for one in [before, *cheap]))
    assert f"add, each latent at its own strength: words in {sum(best_each) / 2:.0%} of completions;" in out
    assert (tmp_path / "steering.png").read_bytes().startswith(b"\x89PNG")


def test_benchmark_refuses_an_sae_without_output_scores(benchmark, tmp_path, capsys):
    said = refusal(capsys, benchmark, sae_model_path=tmp_path / "sae.pth", output_dir=tmp_path / "out")
    assert "sae.steering.parquet" in said and "sae_steering.py" in said and not (tmp_path / "out").exists()
