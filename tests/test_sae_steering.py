"""The strength that fits an SAE and its latents' output scores: against steering one latent after another in whole
forward passes, and against responses whose best strength is known. Then the stage itself, on a random model.

.venv/bin/python -m pytest tests/test_sae_steering.py
"""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY_PARAMS
from support.pipeline_runs import call, refusal

import sae_steering
from latents.meanings import Meaning, write_meanings
from latents.promotion import promoted_logits
from latents.tables import PROMOTED
from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import TINY_LLAMA_DIR
from llama_3.model import SITES, Resume
from pipeline.errors import InputError
from pipeline.files import write_json
from sae import SparseAutoencoder, load_sae_model, save_sae
from serving import dose_response
from serving.dose_response import Opened, Setting, choose_concepts, climb, find_best, read_again, repeated_trigrams
from serving.modes import UNMEASURED, steering_defaults
from serving.output_scores import output_scores
from serving.steering import Steering, highest_activations, make_steering

N_LATENTS, DEAD = 50, 3
NAMES = {  # latent -> name, promoted tokens with their scores
    0: ("hello, ring", [("hello", 5.0)]),
    1: ("hello", [("hello", 6.0)]),  # promotes its word more than latent 0
    2: ("the", [("the", 9.0)]),  # a word of any text
    4: ("seen", [(" on", 9.0)]),  # does not promote its word
    5: ("ring", [(" Ring", 3.0), ("ring", 2.0)]),
    6: ("in the", [("in", 9.0)]),  # not a word
    7: ("llama", [("llama", 1.0)]),
}


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir)


def random_sae(site: str) -> SparseAutoencoder:
    sae = SparseAutoencoder(TINY_PARAMS["dim"], N_LATENTS, 6)
    sae.initialize(torch.zeros(TINY_PARAMS["dim"]), torch.Generator().manual_seed(3))
    sae.info = {"site": site}
    return sae.requires_grad_(False)


@pytest.fixture
def sae_path(tiny_model_dir, tmp_path):
    """An SAE with the tables and names that the stage reads."""
    path = tmp_path / "sae.pth"
    save_sae(
        random_sae(""), path, {"site": "layers.1.resid_post", "model_dir": str(tiny_model_dir), "tokens_trained": 7}
    )
    highest = pa.array([0.0 if i == DEAD else 2.0 for i in range(N_LATENTS)], pa.float32())
    pq.write_table(pa.table({"latent": range(N_LATENTS), "max": highest}), tmp_path / "sae.latents.parquet")
    pairs = [NAMES.get(i, ("", []))[1] for i in range(N_LATENTS)]
    columns = {"tokens": [[t for t, _ in row] for row in pairs], "scores": [[s for _, s in row] for row in pairs]}
    columns |= {"suppressed_tokens": [[]] * N_LATENTS, "suppressed_scores": [[]] * N_LATENTS}
    PROMOTED.write(tmp_path / "sae.promoted.parquet", {"latent": range(N_LATENTS), **columns})
    write_meanings(tmp_path / "sae.meaning_a.yaml", {i: Meaning(name, 0.9) for i, (name, _) in NAMES.items()})
    return path


# ---- output scores


@pytest.mark.parametrize("kind", SITES)
def test_logits_continued_from_a_layer_are_those_of_the_whole_model(model, kind):
    tokens = torch.tensor([[276, 5, 44, 9], [276, 7, 7, 1]])
    layer_idx = SITES.index(kind) % 3
    x = model.activations(tokens, f"layers.{layer_idx}.resid_pre")
    with model.intervene(f"layers.{layer_idx}.{kind}", lambda x: 2 * x, (276,)):
        expected, found = model(tokens), model(tokens, resume=Resume(layer_idx, x))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, model(tokens), atol=1e-2)


@pytest.mark.parametrize(
    ("site", "setting", "at_once"),
    [
        ("layers.1.resid_post", Setting("add", 3.0), 7),
        ("layers.0.attention_norm", Setting("clamp", -2.0), 64),
        ("layers.2.ffn_norm", Setting("h_bias", 4.0), 13),
    ],
)
def test_output_scores_against_one_latent_after_another(model, tiny_model_dir, site, setting, at_once):
    tokenizer, sae = load_tokenizer(tiny_model_dir), random_sae(site)
    highest = torch.linspace(0.5, 3.0, N_LATENTS)
    highest[DEAD] = 0
    prompts = [[276, 9, 8, 7, 6], [276, 5, 44], [276, 5], [276, 100, 101, 3]]
    plain = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_tokens.values()]
    expected = {}
    for latent in range(N_LATENTS):
        if latent == DEAD:
            continue
        direction = highest[latent] * sae.decoder.weight[:, latent][None]
        lens = promoted_logits(model, site, direction, sae.b_pre)[0]
        promoted = sorted(plain, key=lambda token: -lens[token])[:10]
        steering = make_steering(sae, Steering({latent: setting.strength}, setting.mode), highest, tokenizer.bos_id)
        gains = []
        for prompt in (prompts[1], prompts[3]):  # the shortest of at least three tokens
            tokens = torch.tensor([prompt])
            clean = model(tokens)[0].softmax(-1)
            with model.intervene(*steering):
                steered = model(tokens)[0].softmax(-1)
            gains += [float(steered[i, promoted].max() - clean[i, promoted].max()) for i in range(1, len(prompt))]
        expected[latent] = sum(gains) / len(gains)
    found: dict[int, float] = {}
    for latents, scores in output_scores(Opened(model, tokenizer, sae, highest), setting, prompts, at_once):
        assert len(latents) <= at_once
        found |= dict(zip(latents.tolist(), scores.tolist(), strict=True))
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert max(found.values()) - min(found.values()) > 0.01


# ---- which latents, which strength


def test_concepts_by_hand(sae_path):
    by_promotion = choose_concepts(str(sae_path), 9)
    assert [(c.latent, c.words) for c in by_promotion] == [(1, ["hello"]), (5, ["ring"]), (7, ["llama"])]
    assert [c.latent for c in choose_concepts(str(sae_path), 2, {0: 0.9, 1: 0.1, 5: 0.2, 7: 0.3})] == [0, 7]
    write_meanings(sae_path.with_name("sae.meaning_a.yaml"), {2: Meaning("the", 0.9)})
    with pytest.raises(InputError, match="promotes a word of its name"):
        choose_concepts(str(sae_path), 9)


def response(best: float, repeated: float = 0.0):
    """Words grow with strength; at `best` the text costs just what is allowed, at twice that four times as much."""
    cost = lambda strength: dose_response.MAX_NATS * (strength / best) ** 2
    return lambda strength: {
        "strength": strength,
        "words_share": strength / 128,
        "nats": 3.0 + cost(strength),
        "repeated": repeated * strength,
    }


@pytest.mark.parametrize(
    ("best", "found", "broken"),
    [(0.62, 0.5, 2.0), (0.63, 0.625, 2.0), (4.0, 4.0, 16.0), (0.2, 0.1875, 0.5), (7.9, 7.0, 16.0)],
)
def test_the_strongest_affordable_strength_is_found(best, found, broken):
    clean = {"nats": 3.0, "repeated": 0.0}
    rows = list(climb(response(best), clean))
    assert find_best(clean, rows)["strength"] == found
    assert max(row["strength"] for row in rows) == broken and len(rows) <= 12


def test_repetition_counts_as_much_as_nats():
    clean = {"nats": 3.0, "repeated": 0.0}
    rows = list(climb(response(100.0, repeated=0.04), clean))
    assert find_best(clean, rows)["strength"] == 1.25 and max(row["strength"] for row in rows) == 8.0
    rows = list(climb(response(0.01), clean))
    assert find_best(clean, rows) is None


def test_repeated_trigrams():
    assert repeated_trigrams([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)
    assert repeated_trigrams([7] * 5) == pytest.approx(2 / 3)
    assert repeated_trigrams([1, 2]) == repeated_trigrams([]) == 0


def test_completions_read_again_token_by_token():
    """Of the embedded model, whose text is text."""
    model, tokenizer = load_model(TINY_LLAMA_DIR), load_tokenizer(TINY_LLAMA_DIR)
    path = f"{TINY_LLAMA_DIR}/sae.pth"
    opened = Opened(model, tokenizer, load_sae_model(path), highest_activations(path))
    prompts = [tokenizer.encode(prompt, bos=True) for prompt in dose_response.DOCUMENTATION_PROMPTS[:5]]
    rows = [tokenizer.encode(" list of files"[: 3 * i]) for i in range(len(prompts))]
    nats, fired = read_again(opened, prompts, rows)
    expected_nats, expected_fired = [], []
    for before, row in zip(prompts, rows, strict=True):
        for token in row:
            logits = model(torch.tensor([before]))[0, -1].detach()
            expected_nats.append(float(logits.logsumexp(0) - logits[token]))
            before = [*before, token]
            acts = model.activations(torch.tensor([before]), opened.sae.info["site"])[0, -1]
            values, indices = opened.sae.encode(acts)
            expected_fired.append({i for i, value in zip(indices.tolist(), values.tolist(), strict=True) if value > 0})
    torch.testing.assert_close(nats, torch.tensor(expected_nats), rtol=1e-4, atol=1e-4)
    assert [set(row) - {-1} for row in fired.tolist()] == expected_fired


# ---- the stage


def test_the_stage(sae_path, tmp_path, capsys):
    """The table, the figure, the entry in the JSON, which keeps everything else; the same again."""
    before = json.loads((tmp_path / "sae.json").read_text())
    options = {"model_path": sae_path, "n_concepts": 2, "n_prompts": 2, "max_new_tokens": 5}
    call(sae_steering, **options)
    said = capsys.readouterr().out
    assert "Latents: 1 hello; 5 ring" in said and said.count("<- the default") == 1
    after = json.loads((tmp_path / "sae.json").read_text())
    entry = after.pop("steering")
    assert after == before
    low, high = entry["slider"]
    assert entry["mode"] == "add" and low == -high < 0 < entry["strength"] <= high
    assert entry["measured"]["latents"] == entry["measured"]["prompts"] == 2
    assert steering_defaults({"steering": entry}, "sae.json") == ("add", entry["strength"], (low, high))
    rows = pq.read_table(tmp_path / "sae.steering.parquet").to_pylist()
    assert [row["latent"] for row in rows] == list(range(N_LATENTS))
    assert [row["latent"] for row in rows if math.isnan(row["output_score"])] == [DEAD]
    assert not rows[DEAD]["steers_well"]
    assert all(row["steers_well"] == (row["output_score"] >= sae_steering.STEERS_WELL) for row in rows)
    assert (tmp_path / "sae.steering.png").read_bytes().startswith(b"\x89PNG")
    call(sae_steering, **options)
    assert json.loads((tmp_path / "sae.json").read_text()) == {**before, "steering": entry}
    assert repr(pq.read_table(tmp_path / "sae.steering.parquet").to_pylist()) == repr(rows)


def test_refusals(sae_path, tmp_path, capsys, monkeypatch):
    written = lambda: [path.name for path in tmp_path.iterdir() if "steering" in path.name]
    monkeypatch.setattr(sae_steering, "load_model", None)  # all of it is said before the model is loaded
    for suffix, script in [("promoted", "promoted_tokens.py"), ("latents", "capture_top_activating_sentences.py")]:
        path = tmp_path / f"sae.{suffix}.parquet"
        content = path.read_bytes()
        path.unlink()
        said = refusal(capsys, sae_steering, model_path=sae_path)
        assert path.name in said and script in said
        path.write_bytes(content)
    (tmp_path / "sae.meaning_a.yaml").write_text("1: {certainty: 0.9, common_semantic: nothing}")
    assert "promotes a word of its name" in refusal(capsys, sae_steering, model_path=sae_path)
    write_json(tmp_path / "sae.json", {"k": 6, "normalize_eps": 1e-5})
    assert "site" in refusal(capsys, sae_steering, model_path=sae_path)
    assert written() == []
    (tmp_path / "sae.steering.png").mkdir()
    assert "sae.steering.png cannot be written" in refusal(capsys, sae_steering, model_path=sae_path)


def test_an_sae_that_was_not_measured():
    assert steering_defaults({}, "sae.json") == UNMEASURED
