"""The reference SAE's files, made from a small SAE as from the demo's: its JSON has no path of this machine.

.venv/bin/python -m pytest tests/test_reference.py
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import PROJECT_DIR
from support.sae_runs import random_sae

from embedded import reference
from embedded.recipe import TINY_LLAMA
from llama_3.checkpoint import checkpoint_identity
from pipeline.sae_files import SaeFiles
from pipeline.source import Source
from sae import load_sae_model, save_sae

COPIED = ("curves.png", "frequencies.png", "metrics.jsonl")


@pytest.fixture
def made(tmp_path, monkeypatch) -> SaeFiles:
    """A reference SAE in its own project, made from a run inside it."""
    project = tmp_path / "project"
    run, model_dir = project / "demo_run", project / TINY_LLAMA.model_dir
    for folder in (run / "sae", run / "sentences", model_dir):
        folder.mkdir(parents=True)
    monkeypatch.chdir(project)
    found = SaeFiles(run / "sae" / "sae.pth")
    source = Source("demo", site=TINY_LLAMA.site, d_model=6).with_folder("sentences_dir", run / "sentences")
    source = source.with_folder("model_dir", PROJECT_DIR / TINY_LLAMA.model_dir)
    config = {"data_dir": str(run / "batches"), "model_save_path": "demo_run/sae/sae.pth", "k": 3, "b_pre_path": None}
    save_sae(random_sae(6, 20, 3), found.path, {**source.as_json(found.json), "config": config}, torch.float32)
    for suffix in COPIED:
        found.beside(suffix).write_text(suffix)
    made = SaeFiles(Path(TINY_LLAMA.model_dir) / "sae.pth")
    reference.write_sae(found, made, TINY_LLAMA.model_dir)
    reference.copy_files(found, made, COPIED)
    return made


def test_its_json_holds_no_absolute_path(made):
    text = Path(made.json).read_text()
    info = json.loads(text)
    assert '"/' not in text and str(Path.cwd()) not in text and "absolute" not in info
    assert info["model_dir"] == "." and info["sentences_dir"] == "../../demo_run/sentences"
    assert info["config"] == {"model_save_path": "demo_run/sae/sae.pth", "k": 3, "b_pre_path": None}
    assert info["site"] == TINY_LLAMA.site and info["n_latents"] == 20


def test_it_is_the_demos_in_bfloat16(made):
    stored = torch.load(made.path, weights_only=True)
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())
    found = load_sae_model("demo_run/sae/sae.pth")
    assert load_sae_model(made.path).encoder.weight.equal(found.encoder.weight.bfloat16().float())
    assert [made.beside(suffix).read_text() for suffix in COPIED] == list(COPIED)


def test_the_committed_one_belongs_to_the_embedded_model():
    path = PROJECT_DIR / TINY_LLAMA.model_dir / "sae.pth"
    source = Source.read(load_sae_model(path).info, SaeFiles(path).json)
    assert source.site == TINY_LLAMA.site and source.model is not None
    assert checkpoint_identity(str(PROJECT_DIR / TINY_LLAMA.model_dir)).items() >= source.model.items()
    assert Path(source.model_dir()).samefile(PROJECT_DIR / TINY_LLAMA.model_dir)
