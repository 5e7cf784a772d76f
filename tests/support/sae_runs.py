"""Shared by the SAE's tests: an SAE with random weights, captured activations, scripts run in this process.

Also a small set of batches to train on, and checks of a run's output.
Used by test_sae.py, test_sae_preprocessing.py, test_sae_training.py and test_sae_parallel.py.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.files import read_json, write_json
from pipeline.manifests import MANIFEST
from pipeline.run import run
from sae import Kind, SparseAutoencoder
from support.activation_folders import write_activation_folder


def random_sae(
    d_model: int,
    n_latents: int,
    k: int,
    eps: float = 1e-5,
    seed: int = 0,
    kind: Kind = Kind(),  # noqa: B008
) -> SparseAutoencoder:
    """Every weight random: encoder and decoder not tied, biases not zero, decoder columns not of unit norm, thresholds
    of either sign."""
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(d_model, n_latents, k, eps, kind=kind)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.encoder.weight.div_(d_model**0.5)
        if sae.threshold is not None:
            sae.threshold.copy_(0.5 + torch.randn(n_latents, generator=generator))
    return sae


def write_store(folder: Path, sentences: dict[int, Tensor], shard_starts: list[int], n_sentences: int) -> Path:
    """As capture_activations.py writes: `sentences` (index -> (n_tokens, d_model)) in shards that begin at the given
    positions among them, and a complete manifest. Sentences without tokens are left out, as there."""
    return write_activation_folder(folder, sentences, shard_starts, n_sentences)


def sparse_dictionary_data(n_rows: int, d_model: int, n_true: int, n_active: int, seed: int) -> Tensor:
    """Rows that are sums of a few of n_true random directions, plus an offset and a little noise."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((n_true, d_model)) / d_model**0.5
    codes = np.zeros((n_rows, n_true))
    for row in codes:
        row[rng.choice(n_true, n_active, replace=False)] = 1 + rng.random(n_active)
    x = codes @ directions + 0.02 * rng.standard_normal((n_rows, d_model)) + 0.3
    return torch.from_numpy(x).float()


def arguments(options: dict[str, Any]) -> list[str]:
    """Options as command-line arguments."""
    parts = []
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        parts += [f"--{name}", *map(str, values)]
    return parts


def run_script(module: ModuleType, **options: Any) -> None:
    """Run a script's main in this process with these options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *arguments(options)])
        module.main()


def refusal(module: ModuleType, capsys: pytest.CaptureFixture, **options: Any) -> str:
    """Run a script that must refuse, with exit code 2 and one line that begins with "error:"; returns the line."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr(sys, "argv", [module.__file__, *arguments(options)])
        run(module.main)
    assert exit_info.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def is_complete(folder: Path) -> bool:
    path = folder / MANIFEST
    return path.exists() and read_json(path, "")["complete"]


# ---- training on a small set of batches

D, N_LATENTS, K = 14, 96, 4
STORED, BATCH = 32, 96  # rows of a stored batch, rows of a step
TRAINING = {
    "n_latents": N_LATENTS,
    "k": K,
    "k_aux": 8,
    "dead_after_tokens": 150,
    "num_epochs": 3,
    "batch_size": BATCH,
    "learning_rate": 8e-3,
    "warmup_steps": 5,
    "betas": (0.85, 0.999),
    "grad_clip": 0.25,  # exceeded in some of the steps
    "seed": 7,
    "wandb": "off",
}
TIMING = ("acts_per_s", "data_wait_frac")  # in metrics.jsonl, different in each run


def write_batches(folder: Path, n_rows: int = 3000) -> Path:
    """Batches of rows that are sums of three of 30 directions, in several shards, by sae_preprocessing.py."""
    rows = sparse_dictionary_data(n_rows, D, n_true=30, n_active=3, seed=0)
    return _batches_of(rows, folder, "")


def write_target_batches(folder: Path, n_rows: int = 3000) -> Path:
    """Of the same tokens at another site, where the activations are a nonlinear function of the first site's."""
    generator = torch.Generator().manual_seed(1)
    inner, outer = torch.randn(2 * D, D, generator=generator), torch.randn(D, 2 * D, generator=generator)
    rows = sparse_dictionary_data(n_rows, D, n_true=30, n_active=3, seed=0)
    return _batches_of((rows @ inner.t()).relu() @ outer.t() + 2, folder, "target", "layers.1.mlp_out")


def _batches_of(rows: Tensor, folder: Path, prefix: str, site: str | None = None) -> Path:
    import sae_preprocessing

    sentences = dict(enumerate(rows.split(10)))
    store = write_store(folder / f"{prefix}site", sentences, [0, 170], len(sentences))
    if site is not None:
        write_json(store / MANIFEST, read_json(store / MANIFEST, "") | {"site": site})
    options = {"batch_size": STORED, "validation_fraction": 0.2, "num_processes": 1, "shard_gb": 801 * 2 * D / 1e9}
    run_script(sae_preprocessing, input_dir=store, output_dir=folder / f"{prefix}batches", **options)
    return folder / f"{prefix}batches"


def places(folder: Path) -> dict[str, Path]:
    return {"model_save_path": folder / "sae.pth", "checkpoint_dir": folder / "checkpoints"}


def train(data: Path, folder: Path, **options: Any) -> Path:
    """Train in this process; returns the SAE's path. The figures, which cost most, have their own test."""
    import sae_training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae_training.Training, "draw", lambda *args: None)
        run_script(sae_training, **{"data_dir": data, **places(folder), **TRAINING, **options})
    return folder / "sae.pth"


def metrics_of(path: Path) -> list[dict]:
    """The lines of metrics.jsonl without the timing."""
    lines = map(json.loads, path.with_suffix(".metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def checkpoints_of(path: Path) -> list[str]:
    return sorted(file.name for file in (path.parent / "checkpoints").glob("step-*"))


def assert_same_run(a: Path, b: Path) -> None:
    """Equal to the last bit: weights and metrics."""
    first, second = (torch.load(path, weights_only=True) for path in (a, b))
    assert first.keys() == second.keys() >= {"b_pre", "encoder.weight", "encoder.bias", "decoder.weight"}
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert metrics_of(a) == metrics_of(b)


def assert_similar_run(a: Path, b: Path) -> None:
    """The same losses to 1e-5 in every step, and nearly the same weights."""
    one, two = metrics_of(a), metrics_of(b)
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (name, first["step"])
    states = [torch.load(path, weights_only=True) for path in (a, b)]
    for name in states[0]:
        torch.testing.assert_close(states[1][name], states[0][name], rtol=0, atol=2e-5)
