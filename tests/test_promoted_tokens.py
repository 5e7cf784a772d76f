"""Promoted tokens against the model itself: what it computes when a latent's direction is added at the site.

.venv/bin/python -m pytest tests/test_promoted_tokens.py
"""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.pipeline_runs import call, refusal

import promoted_tokens
from latents.promotion import promoted_logits
from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import checkpoint_identity
from llama_3.model import SITES
from pipeline.files import write_json
from sae import SparseAutoencoder, save_sae


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir)


@pytest.mark.parametrize("kind", SITES)
def test_logits_are_what_the_sublayer_adds(model, kind):
    """The last layer, one token (heads can attend only to it): the change in the sublayer's output, computed by the
    model itself, through the final norm's weights and the output layer."""
    generator = torch.Generator().manual_seed(0)
    site, tokens = f"layers.2.{kind}", torch.tensor([[7]])
    base, directions = torch.randn(36, generator=generator), torch.randn(5, 36, generator=generator)
    written = {"attention_norm": "layers.2.attention_out", "ffn_norm": "layers.2.mlp_out"}.get(kind, site)

    def output(x):
        with model.intervene(site, lambda _: x.view(1, 1, -1)):
            return model.activations(tokens, written).flatten()

    added = torch.stack([output(base + direction) - output(base) for direction in directions])
    expected = (added * model.norm.weight) @ model.output.weight.t()
    found = promoted_logits(model, site, directions, base)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture
def sae_path(tiny_model_dir, tmp_path):
    """Latent 0 writes the last norm's image of token 65, "A", into the residual stream; latent 3 is dead."""
    model = load_model(tiny_model_dir)
    sae = SparseAutoencoder(d_model=36, n_latents=50, k=6)
    sae.initialize(torch.zeros(36), torch.Generator().manual_seed(3))
    with torch.no_grad():
        sae.decoder.weight[:, 0] = model.output.weight[65] / model.norm.weight
    path = tmp_path / "sae.pth"
    save_sae(sae, path, {"site": "layers.2.resid_post", "model_dir": str(tiny_model_dir)})
    columns = {"latent": range(50), "max": pa.array([0.0 if i == 3 else 2.0 for i in range(50)], pa.float32())}
    pq.write_table(pa.table(columns), tmp_path / "sae.latents.parquet")
    return path


@pytest.mark.parametrize("at_once", [256, 7])
def test_table(sae_path, tiny_model_dir, at_once):
    call(promoted_tokens, model_path=sae_path, promoted_tokens=4, latents_at_once=at_once)
    rows = pq.read_table(sae_path.with_name("sae.promoted.parquet")).to_pylist()
    assert [row["latent"] for row in rows] == list(range(50))
    assert rows[0]["tokens"][0] == load_tokenizer(tiny_model_dir).decode([65])
    for row in rows:
        assert len(row["tokens"]) == 4 and row["scores"] == sorted(row["scores"], reverse=True)
        assert not any(token.startswith("<|") for token in row["tokens"])
        assert len(row["suppressed_tokens"]) == 4 and row["suppressed_scores"] == sorted(row["suppressed_scores"])
    assert rows[0]["scores"][0] > 2 and rows[3]["scores"] == [0.0] * 4


def test_what_a_direction_suppresses_its_opposite_promotes(sae_path):
    call(promoted_tokens, model_path=sae_path)
    before = pq.read_table(sae_path.with_name("sae.promoted.parquet")).to_pylist()
    state = torch.load(sae_path, weights_only=True)
    torch.save(state | {"decoder.weight": -state["decoder.weight"]}, sae_path)
    call(promoted_tokens, model_path=sae_path)
    after = pq.read_table(sae_path.with_name("sae.promoted.parquet")).to_pylist()
    for row, opposite in zip(before, after, strict=True):
        if row["latent"] != 3:  # the dead one ties everywhere
            assert row["suppressed_tokens"] == opposite["tokens"]
            assert row["suppressed_scores"] == pytest.approx([-score for score in opposite["scores"]], rel=1e-3)


def test_another_model_of_the_same_shape_is_refused(sae_path, tiny_model_dir, capsys):
    path = sae_path.with_suffix(".json")
    info = json.loads(path.read_text())
    write_json(path, info | {"model": checkpoint_identity(str(tiny_model_dir))})
    call(promoted_tokens, model_path=sae_path)
    write_json(path, info | {"model": checkpoint_identity(str(tiny_model_dir)) | {"weights_sha256": "another"}})
    said = refusal(capsys, promoted_tokens, model_path=sae_path)
    assert str(tiny_model_dir) in said and "weights_sha256" in said and "--llama_model_dir" in said


def test_moved_files_and_another_working_directory(sae_path, tiny_model_dir, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model_dir, moved / "model")
    for name in ("sae.pth", "sae.latents.parquet"):
        shutil.copy(tmp_path / name, moved)
    info = json.loads((tmp_path / "sae.json").read_text())
    write_json(moved / "sae.json", info | {"model_dir": "model", "absolute": {"model_dir": "/nowhere"}})
    call(promoted_tokens, model_path=sae_path)
    monkeypatch.chdir(moved)
    call(promoted_tokens, model_path="sae.pth")
    before, after = (pq.read_table(folder / "sae.promoted.parquet") for folder in (tmp_path, moved))
    assert before.equals(after)


def test_refusals(sae_path, tmp_path, capsys):
    (tmp_path / "sae.latents.parquet").unlink()
    said = refusal(capsys, promoted_tokens, model_path=sae_path)
    assert "sae.latents.parquet" in said and "capture_top_activating_sentences.py" in said
    (tmp_path / "sae.json").write_text('{"k": 6, "normalize_eps": 1e-5}')
    assert "site" in refusal(capsys, promoted_tokens, model_path=sae_path)
    assert not list(tmp_path.glob("*promoted*"))


def test_a_place_that_cannot_be_written_is_said_before_the_model_is_loaded(sae_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(promoted_tokens, "load_model", None)
    (tmp_path / "sae.promoted.parquet").mkdir()
    said = refusal(capsys, promoted_tokens, model_path=sae_path)
    assert "sae.promoted.parquet cannot be written (Is a directory)" in said
