"""steering_export.py and what it needs: the constant against per-token steering, biases against the constant at every
site, written checkpoints in transformers, tokenizers against ours, a GGUF file against its source.

.venv/bin/python -m pytest tests/test_steering_export.py
"""

import json
import shutil

import gguf
import pytest
import torch
import transformers
from conftest import write_tiny_model
from support.chat_models import write_chat_model
from support.pipeline_runs import call, refusal, some_texts

import steering_export as script
from latents.tables import LATENTS
from llama_3 import load_model, load_tokenizer
from llama_3.gguf import read_gguf
from llama_3.model import SITES
from llama_3.saving import copy_gguf, in_halves, save_hugging_face
from microscope.control import read_gguf_vectors
from pipeline.errors import InputError
from sae import Kind, SparseAutoencoder, save_sae
from serving.constant_steering import (
    biases_of,
    constant,
    control_vector_layer,
    lm_eval_hookpoint,
    stds,
)
from serving.steering import steering_function

DIM, N_LATENTS = 36, 48
IDS = [[275, 10, 300, 20, 264, 7, 301, 5], [275, 260, 261, 262]]


def random_sae(kind: Kind | None = None, site: str = "layers.1.resid_post") -> SparseAutoencoder:
    sae = SparseAutoencoder(DIM, N_LATENTS, 5, kind=kind or Kind())
    sae.initialize(torch.linspace(-1, 1, DIM), torch.Generator().manual_seed(0))
    sae.info = {"site": site}
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir))


# ---- the constant


def test_the_constant_is_the_mean_of_what_add_does(model):
    sae = random_sae()
    highest, strengths = torch.linspace(1, 3, N_LATENTS), {3: 0.5, 40: -1.5}
    spread = stds(model, sae, IDS, bos_id=275)
    acts = torch.cat([model.activations(torch.tensor([ids]), sae.site)[0, 1:] for ids in IDS])
    changes = steering_function(sae, strengths, highest, "add")(acts) - acts
    torch.testing.assert_close(constant(sae, strengths, highest, spread.mean), changes.mean(0), atol=1e-5, rtol=1e-4)
    found = acts.double().std(-1)
    assert spread.tokens == 10
    assert (spread.mean, spread.std) == pytest.approx((float(found.mean()), float(found.std())), rel=1e-6)
    assert spread.low <= found.median() <= spread.high
    assert spread.first == pytest.approx(float(model.activations(torch.tensor([[275]]), sae.site).std()), rel=1e-5)
    with pytest.raises(InputError, match="no token to measure"):
        stds(model, sae, [[275]], bos_id=275)


@pytest.mark.parametrize(
    "kind", [Kind("topk", "scale", 2.5), Kind("topk", "none", target_site="layers.2.mlp_out", target_scale=0.5)]
)
def test_without_normalisation_the_constant_is_add_itself(model, kind):
    sae = random_sae(kind)
    highest, strengths = torch.ones(N_LATENTS), {3: 0.5, 40: -1.5}
    spread = stds(model, sae, IDS, bos_id=275)
    assert spread.std == pytest.approx(0, abs=1e-7)
    x = torch.randn(7, DIM)
    expected = steering_function(sae, strengths, highest, "add")(x)
    torch.testing.assert_close(x + constant(sae, strengths, highest, spread.mean), expected)


# ---- biases


def logits_with(model, site: str, added: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    with model.intervene(site, lambda x: x + added):
        return model(ids)


@pytest.fixture(scope="module", params=["meta", "gguf", "tied"])
def source(request, tmp_path_factory):
    """A folder of a model that can be exported; the last with scaled RoPE."""
    folder = tmp_path_factory.mktemp("source")
    if request.param == "gguf":
        return write_chat_model(folder)
    is_tied = request.param == "tied"
    return write_tiny_model(folder / request.param, tied=is_tied, use_scaled_rope=is_tied)


@pytest.mark.parametrize("kind", SITES)
def test_biases_are_the_constant(source, kind, tmp_path):
    """transformers' logits of the written folder against ours with the constant added, at every kind of site."""
    if source.name != "meta" and kind not in ("attention_norm", "mlp_out"):
        pytest.skip("the other formats at two sites are enough")
    site, added = f"layers.1.{kind}", 0.3 * torch.randn(DIM, generator=torch.Generator().manual_seed(1))
    model = load_model(str(source))
    assert save_hugging_face(str(source), tmp_path / "out", biases_of(model, site, added)) == torch.float32
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not theirs.config.to_dict().get("missing_keys")
    ids = torch.tensor([IDS[0]])
    with torch.inference_mode():
        found = theirs(ids).logits
    expected = logits_with(model, site, added, ids)
    assert float((expected - model(ids)).abs().max()) > 0.1  # the constant does something
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if kind.startswith("attention") or kind == "resid_mid":
        with pytest.raises(InputError, match="attention_bias true, which is not supported here"):
            load_model(str(tmp_path / "out"))
        return
    for packed in (False, True):
        ours = load_model(str(tmp_path / "out"), packed=packed)
        torch.testing.assert_close(ours(ids), found, atol=1e-4, rtol=1e-4)


def test_the_written_tokenizer_is_the_same(source, tmp_path):
    model, ours = load_model(str(source)), load_tokenizer(str(source))
    save_hugging_face(str(source), tmp_path / "out", biases_of(model, "layers.1.mlp_out", torch.ones(DIM)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*some_texts(20), "hello the  \n\n x", "édité 12 345"]:
        assert theirs(text).input_ids == ours.encode(text, bos=ours.starts_with_bos), text
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eos_id
    assert (theirs.chat_template is None) == (ours.chat_template is None)


def test_a_hugging_face_folder_keeps_its_files(source, tmp_path):
    """Exporting what was exported: a folder in that format is the source."""
    model = load_model(str(source))
    save_hugging_face(str(source), tmp_path / "first", {})
    (tmp_path / "first" / "LICENSE").write_text("as it was")
    added = torch.randn(DIM)
    biases = biases_of(load_model(str(tmp_path / "first")), "layers.0.mlp_out", added)
    save_hugging_face(str(tmp_path / "first"), tmp_path / "second", biases)
    assert (tmp_path / "second" / "LICENSE").read_text() == "as it was"
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config == json.loads((tmp_path / "first" / "config.json").read_text()) | {"mlp_bias": True}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=torch.float32)
    ids, expected = torch.tensor([IDS[1]]), logits_with(model, "layers.0.mlp_out", added, torch.tensor([IDS[1]]))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-4, rtol=1e-4)
    more = {"layers.0.feed_forward.w2": -added, "layers.1.feed_forward.w1": torch.ones(model.args.hidden_dim)}
    save_hugging_face(str(tmp_path / "second"), tmp_path / "third", more)
    third = load_model(str(tmp_path / "third"))
    assert third.layers[0].feed_forward.w2.bias is None or not third.layers[0].feed_forward.w2.bias.any()
    assert third.layers[1].feed_forward.w1.bias.tolist() == [1.0] * model.args.hidden_dim


def test_rows_in_halves():
    """Meta's (pair, element) to Hugging Face's (element, pair), for matrices and biases."""
    rows = torch.arange(12.0)
    assert in_halves(rows, 6).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    matrix = torch.randn(12, 5)
    assert torch.equal(in_halves(matrix, 6), matrix[in_halves(rows, 6).long()])


def test_a_gguf_file_is_copied_with_its_biases(tmp_path):
    folder = write_chat_model(tmp_path)
    path, added = str(next(folder.glob("*.gguf"))), torch.randn(DIM)
    copy_gguf(path, tmp_path / "steered.gguf", {"layers.1.feed_forward.w2": added, "layers.2.attention.wq": added[:6]})
    before, after = read_gguf(path), read_gguf(str(tmp_path / "steered.gguf"))
    assert after.metadata == before.metadata
    assert after.tensors.keys() - before.tensors.keys() == {"blk.1.ffn_down.bias", "blk.2.attn_q.bias"}
    for name, tensor in before.tensors.items():
        assert (after.tensors[name].data == tensor.data).all() and after.tensors[name][:2] == tensor[:2]
    found = after.tensors["blk.1.ffn_down.bias"]
    assert found.kind == gguf.GGMLQuantizationType.F32
    assert torch.equal(torch.from_numpy(found.values().copy()), added)
    with pytest.raises(InputError, match=r"blk\.2\.attn_q\.bias, a bias, and biases are not supported here"):
        load_model(str(tmp_path / "steered.gguf"))


def test_a_gguf_file_with_a_bias_opens(tmp_path):
    """Its bias is the constant, and a second one is added to it."""
    path, added = str(next(write_chat_model(tmp_path).glob("*.gguf"))), torch.randn(DIM)
    copy_gguf(path, tmp_path / "once.gguf", {"layers.1.feed_forward.w2": added})
    copy_gguf(str(tmp_path / "once.gguf"), tmp_path / "twice.gguf", {"layers.1.feed_forward.w2": added})
    model, ids = load_model(path), torch.tensor([IDS[0]])
    for name, times in (("once", 1), ("twice", 2)):
        expected = logits_with(model, "layers.1.mlp_out", times * added, ids)
        for packed in (False, True):
            found = load_model(str(tmp_path / f"{name}.gguf"), packed=packed)(ids)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_where_a_constant_goes():
    assert [control_vector_layer(f"layers.{site}") for site in ("3.resid_pre", "2.resid_post", "2.mlp_out")] == [2] * 3
    for site in ("1.resid_pre", "0.resid_pre", "0.resid_post", "0.mlp_out", "2.attention_norm", "2.attention_out"):
        with pytest.raises(InputError, match="cannot steer .*; write a steered model instead"):
            control_vector_layer(f"layers.{site}")
    with pytest.raises(InputError, match="is the embedding, which has no bias"):
        biases_of(load_model_of_nothing(), "layers.0.resid_pre", torch.zeros(DIM))


def load_model_of_nothing():
    from llama_3.model import ModelArgs, Transformer

    return Transformer(ModelArgs(dim=DIM, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=9, hidden_dim=8))


def test_lm_evals_hookpoint_is_the_site(tiny_model_dir, model, tmp_path):
    """Its hook adds to a module's output, or to the first of its outputs (lm_eval/models/hf_steered.py)."""
    save_hugging_face(str(tiny_model_dir), tmp_path / "plain", {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    added, ids = torch.randn(DIM), torch.tensor([IDS[0]])

    def hook(module, inputs, output):
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    modules = dict(theirs.base_model.named_modules())
    for site in [*(f"layers.1.{kind}" for kind in SITES), "layers.0.resid_pre"]:
        handle = modules[lm_eval_hookpoint(site)].register_forward_hook(hook)
        with torch.inference_mode():
            torch.testing.assert_close(theirs(ids).logits, logits_with(model, site, added, ids), atol=1e-4, rtol=1e-4)
        handle.remove()


# ---- the script


@pytest.fixture
def sae_path(tmp_path, tiny_model_dir):
    from llama_3.checkpoint import checkpoint_identity

    info = {"site": "layers.1.resid_post", "layer": 1, "model_dir": str(tiny_model_dir), "rope_scaling_factor": 8.0}
    info |= {"absolute": {"model_dir": str(tiny_model_dir)}, "model": checkpoint_identity(str(tiny_model_dir))}
    save_sae(random_sae(), tmp_path / "sae.pth", info)
    columns = {name: [0] * N_LATENTS for name in LATENTS.schema.names}
    columns |= {"latent": list(range(N_LATENTS)), "max": [0.0, *[2.0] * (N_LATENTS - 1)]}
    columns |= {"sentences_by_tenth": [[0] * 10] * N_LATENTS}
    columns |= dict.fromkeys(("cofiring_latents", "cofiring_jaccard"), [[]] * N_LATENTS)
    LATENTS.write(tmp_path / "sae.latents.parquet", columns)
    (tmp_path / "texts.txt").write_text("hello the ring. " * 9)
    return tmp_path / "sae.pth"


def test_everything_at_once(sae_path, tmp_path, capsys, tiny_model_dir, model):
    (tmp_path / "sae.meaning_a.yaml").write_text("5:\n  certainty: 0.9\n  common_semantic: hello, ring\n")
    out = {
        "control_vector_path": tmp_path / "v.gguf",
        "checkpoint_dir": tmp_path / "steered",
        "lm_eval_path": tmp_path / "v.pt",
    }
    options = {"sae_model_path": sae_path, "text_path": tmp_path / "texts.txt", "latents": [5, 7], "strengths": [3, -1]}
    call(script, **options, **out, completions=4, new_tokens=5)
    printed = capsys.readouterr().out
    assert "Latent 5 (hello, ring): add, strength 3." in printed and "90 % lie between" in printed
    assert "Of 4 completions of 5 tokens, share with hello, ring" in printed and "the constant x 1" in printed
    assert "transformers' logits, against ours with the constant added" in printed
    assert "run llama.cpp's convert_hf_to_gguf.py" in printed
    (added,) = read_gguf_vectors(tmp_path / "v.gguf", model).values()
    entry = torch.load(tmp_path / "v.pt", weights_only=True)["layers.1"]
    assert entry["action"] == "add" and entry["bias"] is None and torch.equal(entry["steering_vector"], added)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "steered", dtype=torch.float32)
    ids = torch.tensor([IDS[0]])
    with torch.inference_mode():
        torch.testing.assert_close(
            theirs(ids).logits, logits_with(model, "layers.1.resid_post", added, ids), atol=1e-4, rtol=1e-4
        )
    assert not list(tmp_path.glob(".*.tmp"))
    assert "is already there" in refusal(capsys, script, **options, **out)


def test_refusals(sae_path, tmp_path, capsys):
    options = {"sae_model_path": sae_path, "text_path": tmp_path / "texts.txt", "latents": 5}
    refused = lambda **more: refusal(capsys, script, **options | more)
    assert "Nothing is to be written" in refused()
    vector = {"control_vector_path": tmp_path / "v.gguf"}
    assert "There is no latent 99" in refused(latents=99, **vector)
    assert "Latent 0 never fired" in refused(latents=0, **vector)
    assert "must end in .pt" in refused(lm_eval_path=tmp_path / "v.csv")
    info = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps(info | {"site": "layers.1.attention_norm"}))
    assert "cannot steer layers.1.attention_norm; write a steered model instead" in refused(**vector)
    assert not (tmp_path / "v.gguf").exists()
    shutil.rmtree(tmp_path / "steered", ignore_errors=True)


def test_a_checkpoint_that_differs_is_removed(sae_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "biases_of", lambda model, site, added: {"layers.1.feed_forward.w2": added * 1.5})
    options = {"sae_model_path": sae_path, "text_path": tmp_path / "texts.txt", "latents": 5, "strengths": 5}
    said = refusal(capsys, script, **options, checkpoint_dir=tmp_path / "steered", completions=0)
    assert "The logits of the written model differ by" in said
    assert not (tmp_path / "steered").exists() and not list(tmp_path.glob(".*.tmp"))
