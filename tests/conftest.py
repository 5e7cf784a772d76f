"""Shared by test files: a tiny checkpoint in Meta's format, and hypothesis without time limits.

.venv/bin/python -m pytest tests
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: tests start more processes than a machine has GPUs
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny shapes gain nothing from threads; subprocesses inherit it

settings.register_profile("project", deadline=None, print_blob=True)  # a busy machine is not a failure
settings.load_profile("project")

PROJECT_DIR = Path(__file__).resolve().parents[1]

TINY_MERGES = (
    b" t", b"he", b"in", b"er", b" a", b" the", b"on", b"re", b"ing", b"ll", b"lo", b"llo", b"hello", b"  ", b"aa",
    b"aaaa", b"\xc3\xa9", b"\n\n", b"12", b"ed",
)  # fmt: skip
TINY_VOCAB_SIZE = 256 + len(TINY_MERGES) + 256  # bytes, merges, special tokens

# All dimensions differ: head_dim 6, two query heads per key head, 120 in the feed-forward layer.
TINY_PARAMS = {
    "dim": 36,
    "n_layers": 3,
    "n_heads": 6,
    "n_kv_heads": 2,
    "vocab_size": TINY_VOCAB_SIZE,
    "multiple_of": 20,
    "ffn_dim_multiplier": 1.2,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}


def tiny_ranks() -> dict[bytes, int]:
    """The ranks of the tiny tokenizer: every byte, then the merges."""
    return {token: rank for rank, token in enumerate([*(bytes([i]) for i in range(256)), *TINY_MERGES])}


def write_tiny_model(folder: Path | str, seed: int = 0, tied: bool = False, dtype: str = "float32", **overrides: Any):
    """Write a checkpoint in Meta's format with random weights into `folder`, and return the folder.

    overrides: entries of params.json. Weights are large enough for attention to be sharp and norms are not 1, so that
    errors show.
    """
    import torch

    from llama_3.loading import read_params
    from llama_3.model import Transformer
    from llama_3.tokenizer import write_ranks

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(TINY_PARAMS | overrides))
    write_ranks(folder / "tokenizer.model", tiny_ranks())
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(read_params(str(folder))).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weight = 0.5 + torch.rand(shape, generator=generator)
        else:
            std = 1.0 if name == "tok_embeddings.weight" else 1.5 / shape[1] ** 0.5
            weight = std * torch.randn(shape, generator=generator)
        state[name] = weight.to(getattr(torch, dtype))
    if tied:
        state["output.weight"] = state["tok_embeddings.weight"]
    torch.save(state, folder / "consolidated.00.pth")
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint shared by the tests of a session; to change one, write your own."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))
