"""Activations at 8 bits a value: packed rows against a loop over blocks, and a store of them through every stage.

.venv/bin/python -m pytest tests/test_packing.py
"""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY_PARAMS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.pipeline_runs import SITE, call, refusal, some_texts, write_sentences
from support.sae_runs import metrics_of, train

import capture_activations
import capture_top_activating_sentences
import sae_preprocessing
from pipeline.activation_store import ActivationStore
from pipeline.files import read_json, write_json
from pipeline.manifests import MANIFEST
from pipeline.packing import BLOCK, empty_rows, pack, row_bytes, unpack

D = TINY_PARAMS["dim"]


def naive(x: torch.Tensor, block: int) -> np.ndarray:
    """What a row becomes: value by value, in float64 except where a stored number is rounded."""
    out = np.zeros(tuple(x.shape))
    for i, row in enumerate(x.double().numpy()):
        for start in range(0, len(row), block):
            part = row[start : start + block]
            scale = float(torch.tensor(np.float32(np.abs(part).max()) / np.float32(127)).bfloat16())
            steps = [0 if scale == 0 else max(-127, min(127, round(value / scale))) for value in part]
            out[i, start : start + block] = [step * scale for step in steps]
    return out


# ---- rows


@given(st.integers(1, 200), st.integers(1, 80), st.integers(0, 9), st.integers(0, 1000), st.floats(-30, 30))
@settings(max_examples=30)
def test_packed_rows_against_a_loop(d_model, block, n, seed, log2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_model, generator=generator) * 2**log2
    x[:, :3] *= 300  # a few large coordinates
    x = x.bfloat16()
    rows = pack(x, block)
    assert rows.shape == (n, row_bytes(d_model, "int8", block)) and rows.dtype == torch.uint8
    found, expected = unpack(rows, d_model, block), torch.from_numpy(naive(x, block))
    # A value exactly between two steps may go to either.
    step = torch.nn.functional.pad(x.float(), (0, -d_model % block)).unflatten(1, (-1, block)).abs().amax(2) / 127
    step = step.repeat_interleave(block, 1)[:, :d_model]
    assert ((found.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-3 * step).float().mean() >= 0.99 or n == 0
    assert ((found.float() - x.float()).abs() <= 0.51 * step + 2**-8 * x.float().abs()).all()


def test_zeros_and_very_small_and_large_numbers():
    x = torch.tensor([[0.0] * 3, [1e-39] * 3, [1e38, -1e38, 0.0], [-1e-3, 0.0, 1e-3]]).bfloat16()
    found = unpack(pack(x), 3)
    assert torch.isfinite(found).all() and (found[0] == 0).all()
    torch.testing.assert_close(found[2:], x[2:], rtol=2**-7, atol=0)


@given(st.integers(1, 70), st.integers(0, 40))
@settings(max_examples=20)
def test_packed_rows_can_be_moved_without_being_read(d_model, n):
    x = torch.randn(n, d_model)
    order = torch.randperm(n)
    assert torch.equal(unpack(pack(x)[order], d_model), unpack(pack(x), d_model)[order])


def test_rows_that_are_not_packed_pass_through():
    x = torch.randn(4, 6).bfloat16()
    assert unpack(x, 6) is x
    assert empty_rows(3, 70, "int8").shape == (3, 70 + 4) and row_bytes(70, "bfloat16") == 140 and BLOCK == 64


# ---- a store


@pytest.fixture(scope="module")
def made(tiny_model_dir, tmp_path_factory):
    """The same sentences in both stores, their batches, an SAE of each."""
    folder = tmp_path_factory.mktemp("packing")
    sentences = write_sentences(folder / "sentences", some_texts(200))
    options = {"model_dir": tiny_model_dir, "sentences_dir": sentences, "sites": [SITE], "max_tokens": 30}
    options |= {"dtype": "float32", "batch_tokens": 200, "window_sentences": 256}
    for dtype in ("bfloat16", "int8"):
        call(capture_activations, **options, store_dtype=dtype, output_dir=folder / dtype / "acts")
        acts, batches = folder / dtype / "acts" / SITE, folder / dtype / "batches"
        call(sae_preprocessing, input_dir=acts, output_dir=batches, batch_size=32, num_processes=1)
        sae = train(batches, folder / dtype / "sae", num_epochs=3)
        call(capture_top_activating_sentences, data_dir=acts, model_path=sae, top_sentences=5)
    return folder, options


def test_the_store_holds_the_same_activations_in_half_the_bytes(made):
    folder, _ = made
    stores = {dtype: ActivationStore(folder / dtype / "acts" / SITE) for dtype in ("bfloat16", "int8")}
    assert stores["int8"].manifest["dtype"] == "int8" and stores["int8"].dtype == "int8"
    for shard, packed in zip(*(store.shards() for store in stores.values()), strict=True):
        assert packed.acts.shape == (len(shard.acts), D + 2) and packed.token_ids.equal(shard.token_ids)
        assert torch.equal(packed.acts, pack(shard.acts))
    for i in range(20):
        one, two = (store.sentence(i) for store in stores.values())
        assert (one is None) == (two is None)
        if one is not None:
            assert two[0].dtype == torch.bfloat16 and torch.equal(two[0], unpack(pack(one[0]), D))


def test_batches_are_the_packed_rows_in_the_same_order(made):
    folder, _ = made
    batches = {dtype: folder / dtype / "batches" for dtype in ("bfloat16", "int8")}
    manifests = {dtype: read_json(path / MANIFEST, "") for dtype, path in batches.items()}
    assert manifests["int8"]["dtype"] == "int8" and manifests["int8"]["order"] == manifests["bfloat16"]["order"]
    for records in ("shards", "validation_shards"):
        for record in manifests["int8"][records]:
            one, two = (load_file(path / record["file"])["acts"] for path in batches.values())
            assert torch.equal(two, pack(one))
    one, two = (load_file(path / "statistics.safetensors") for path in batches.values())
    for name in ("mean_raw", "var_raw", "mean_normalized", "var_normalized"):
        torch.testing.assert_close(two[name], one[name], rtol=0.02, atol=0.01)


def test_training_and_top_sentences_come_out_alike(made):
    folder, _ = made
    one, two = (metrics_of(folder / dtype / "sae" / "sae.pth") for dtype in ("bfloat16", "int8"))
    assert two[0]["train_fvu"] == pytest.approx(one[0]["train_fvu"], rel=0.01)
    assert two[-1]["val_fvu"] == pytest.approx(one[-1]["val_fvu"], rel=0.1) and two != one
    tables = [
        pq.read_table(folder / dtype / "sae" / "sae.latents.parquet").to_pydict() for dtype in ("bfloat16", "int8")
    ]
    assert np.corrcoef(tables[0]["frequency"], tables[1]["frequency"])[0, 1] > 0.98


def test_a_store_without_its_dtype_is_an_old_one(made, tmp_path):
    folder, _ = made
    old = shutil.copytree(folder / "bfloat16" / "acts" / SITE, tmp_path / "old")
    manifest = json.loads((old / MANIFEST).read_text())
    del manifest["dtype"]
    write_json(old / MANIFEST, manifest)
    assert ActivationStore(old).dtype == "bfloat16" and ActivationStore(old).sentence(0) is not None


def test_a_store_of_an_unknown_dtype_is_refused(made, tmp_path, capsys):
    folder, _ = made
    new = shutil.copytree(folder / "int8" / "acts" / SITE, tmp_path / "new")
    manifest = json.loads((new / MANIFEST).read_text())
    write_json(new / MANIFEST, manifest | {"dtype": "int3"})
    said = refusal(capsys, sae_preprocessing, input_dir=new, output_dir=tmp_path / "batches")
    assert said == f"{new / MANIFEST} says that activations are stored as int3; use newer code to read them."
    write_json(new / MANIFEST, manifest | {"dtype": "bfloat16"})
    said = refusal(capsys, sae_preprocessing, input_dir=new, output_dir=tmp_path / "batches")
    assert "but the manifest says" in said and not (tmp_path / "batches").exists()


def test_a_folder_is_not_continued_in_another_dtype(made, capsys):
    folder, options = made
    said = refusal(capsys, capture_activations, **options, output_dir=folder / "int8" / "acts")
    assert "was begun with store_dtype = 'int8', but now it is None" in said
