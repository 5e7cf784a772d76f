"""What the SAE's test files share: an SAE with random weights, captured activations, scripts run in this process.

Used by test_sae.py, test_sae_preprocessing.py and test_sae_training.py.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stage
from activation_store import CAPTURE_STAGE, write_shard
from sae import TopKSparseAutoencoder


def random_sae(d_model: int, n_latents: int, k: int, eps: float = 1e-5, seed: int = 0) -> TopKSparseAutoencoder:
    """Every weight random: encoder and decoder not tied, biases not zero, decoder columns not of unit norm."""
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSparseAutoencoder(d_model, n_latents, k, eps)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.encoder.weight.div_(d_model**0.5)
    return sae


def write_store(folder: Path, sentences: dict[int, Tensor], shard_starts: list[int], n_sentences: int) -> Path:
    """What capture_activations.py leaves: `sentences` (index -> (n_tokens, d_model)) in shards that begin at the given
    positions among them, and a complete manifest. Sentences without tokens are left out, as there."""
    folder.mkdir(parents=True, exist_ok=True)
    indices = sorted(sentences)
    records = []
    for number, (first, last) in enumerate(zip(shard_starts, [*shard_starts[1:], len(indices)], strict=True)):
        mine = indices[first:last]
        acts = torch.cat([sentences[i] for i in mine]).to(torch.bfloat16)
        path = folder / f"acts-{number:05d}-00.safetensors"
        write_shard(
            path,
            {
                "acts": acts,
                "token_ids": torch.arange(len(acts), dtype=torch.int32),
                "sentence_idx": torch.tensor(mine),
                "offsets": torch.tensor([0, *(len(sentences[i]) for i in mine)]).cumsum(0),
            },
        )
        records.append({"file": path.name, "first_sentence_idx": mine[0], "n_sentences": len(mine)})
        records[-1] |= {"bytes": path.stat().st_size, "sha256": stage.sha256(path), "n_tokens": len(acts)}
    dataset = {"sentences": n_sentences, "sentences_in_all": n_sentences, "seed": 42, "shards": []}
    about = {"model": {"name": "tiny"}, "model_dir": "models/tiny", "sentences_dir": "data/sentences", "layer": 1}
    stage.write_manifest(
        folder,
        CAPTURE_STAGE,
        complete=True,
        decides={},
        **about,
        site="layers.1.attention_norm",
        d_model=acts.shape[1],
        dtype="bfloat16",
        begin_of_text=False,
        bos_id=256,
        max_tokens=192,
        rope_scaling_factor=32,
        dataset=dataset,
        counts={"sentences": len(indices), "tokens": sum(map(len, sentences.values()))},
        shards=records,
    )
    return folder


def sparse_dictionary_data(n_rows: int, d_model: int, n_true: int, n_active: int, seed: int) -> Tensor:
    """Rows that are sums of few of n_true random directions, on an offset of their own, with a little noise."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((n_true, d_model)) / d_model**0.5
    codes = np.zeros((n_rows, n_true))
    for row in codes:
        row[rng.choice(n_true, n_active, replace=False)] = 1 + rng.random(n_active)
    x = codes @ directions + 0.02 * rng.standard_normal((n_rows, d_model)) + 0.3
    return torch.from_numpy(x).float()


def arguments(options: dict[str, Any]) -> list[str]:
    """Options as the command line has them."""
    parts = []
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        parts += [f"--{name}", *map(str, values)]
    return parts


def run_script(module: ModuleType, **options: Any) -> None:
    """A script's main, in this process, with these options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *arguments(options)])
        module.main()


def refusal(module: ModuleType, capsys: pytest.CaptureFixture, **options: Any) -> str:
    """Run a script that must refuse: exit code 2 and one line that begins with "error:", which is returned."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr(sys, "argv", [module.__file__, *arguments(options)])
        stage.run(module.main)
    assert exit_info.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def is_complete(folder: Path) -> bool:
    path = folder / stage.MANIFEST
    return path.exists() and stage.read_json(path, "")["complete"]
