"""Shuffled batches against the captured activations they come from: the same rows reordered, and numpy's statistics.

Also: the split by sentence, any number of processes, the same bytes after an interruption, refusals.

    .venv/bin/python -m pytest tests/test_sae_preprocessing.py
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROJECT_DIR
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.sae_runs import arguments, is_complete, refusal, run_script, write_store

import sae_preprocessing
from llama_3 import load_model
from pipeline.errors import InputError
from pipeline.files import locked, sha256
from sae_preprocessing import (
    Statistics,
    consecutive_groups,
    geometric_median,
    hypergeometric,
    plan_moves,
    processes_that_fit,
    random_numbers,
    shard_sizes,
)

D = 6
BATCH = 16
ROWS_PER_SHARD = 8 * BATCH
N_SENTENCES = 150
EMPTY = {0, 17, 80, 149}  # sentences without tokens are not captured
SHARD_STARTS = [0, 60, 95]  # of the captured sentences
OPTIONS = {
    "batch_size": BATCH,
    "validation_fraction": 0.2,
    "shard_gb": (ROWS_PER_SHARD + 1) * 2 * D / 1e9,
    "num_processes": 1,
    "seed": 5,
}
FIRST_VALIDATION_SENTENCE = 120


def sentences(seed: int = 0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (N_SENTENCES,), generator=generator).tolist()
    rows = lambda n: 0.5 + 2 * torch.randn(n, D, generator=generator) + 4 * torch.randn(n, 1, generator=generator)
    return {i: rows(n).to(torch.bfloat16) for i, n in enumerate(lengths) if i not in EMPTY}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "site", sentences(), SHARD_STARTS, N_SENTENCES)


@pytest.fixture(scope="module")
def batches(store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("batches") / "out"
    run_script(sae_preprocessing, input_dir=store, output_dir=folder, **OPTIONS)
    return folder


def keys(acts: torch.Tensor) -> list[bytes]:
    """Each row as bytes."""
    return [row.tobytes() for row in acts.view(torch.int16).numpy()]


def where_from() -> dict[bytes, tuple[int, int, int]]:
    """Row -> (sentence, input shard, number of the row); all rows differ."""
    origin, number = {}, 0
    for position, (i, acts) in enumerate(sentences().items()):
        shard = sum(position >= start for start in SHARD_STARTS) - 1
        for key in keys(acts):
            origin[key] = (i, shard, number)
            number += 1
    assert len(origin) == number
    return origin


def output_rows(folder: Path, split: str) -> list[list[bytes]]:
    """The rows of each shard, as the manifest lists them."""
    manifest = json.loads((folder / "manifest.json").read_text())
    records = manifest["shards" if split == "train" else "validation_shards"]
    shards = [keys(load_file(folder / record["file"])["acts"]) for record in records]
    assert [len(rows) for rows in shards] == [record["n_rows"] for record in records]
    return shards


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


# ---- rows


def test_rows_are_the_input_rows_and_sentences_are_not_split(batches):
    origin = where_from()
    train, validation = (Counter(sum(output_rows(batches, split), [])) for split in ("train", "validation"))
    expected = {split: Counter() for split in ("train", "validation")}
    for key, (sentence, _, _) in origin.items():
        expected["train" if sentence < FIRST_VALIDATION_SENTENCE else "validation"][key] += 1
    assert validation == expected["validation"]
    assert train <= expected["train"]
    dropped = expected["train"].total() - train.total()
    assert dropped == expected["train"].total() % BATCH and dropped > 0

    manifest = json.loads((batches / "manifest.json").read_text())
    counts = {"train": train.total(), "validation": validation.total(), "dropped": dropped}
    assert manifest["counts"] == counts
    assert manifest["first_validation_sentence"] == FIRST_VALIDATION_SENTENCE


def test_shards_hold_whole_batches_and_match_their_records(batches):
    manifest = json.loads((batches / "manifest.json").read_text())
    sizes = [record["n_rows"] for record in manifest["shards"]]
    assert len(sizes) > 3 and sizes[:-1] == [ROWS_PER_SHARD] * (len(sizes) - 1)
    assert all(size % BATCH == 0 for size in sizes) and manifest["batch_size"] == BATCH
    records = manifest["shards"] + manifest["validation_shards"]
    for record in records:
        acts = load_file(batches / record["file"])["acts"]
        assert acts.dtype == torch.bfloat16 and acts.shape == (record["n_rows"], D)
        assert sha256(batches / record["file"]) == record["sha256"]
    names = {record["file"] for record in records} | {"statistics.safetensors", "manifest.json"}
    assert {path.name for path in batches.iterdir() if path.suffix != ".lock" and path.name != ".lock"} == names


def test_manifest_passes_on_what_the_capture_said(store, batches):
    manifest, source = (json.loads((folder / "manifest.json").read_text()) for folder in (batches, store))
    assert manifest["complete"] and manifest["stage"] == "sae_preprocessing.py"
    carried = ("model", "site", "layer", "d_model", "dtype", "begin_of_text", "bos_id", "activations", "absolute")
    for name in (*carried, "max_tokens", "rope_scaling_factor", "dataset"):
        expected = source[name]
        if name == "absolute":
            expected = expected | {"activations_dir": str(store)}
        assert manifest[name] == expected
    for name in ("model_dir", "sentences_dir"):
        assert (batches / manifest[name]).resolve() == (store / source[name]).resolve()
    assert (batches / manifest["activations_dir"]).samefile(store) and manifest["normalize_eps"] == 1e-5
    assert manifest["config"]["seed"] == OPTIONS["seed"]


def test_order_is_shuffled_globally(batches):
    origin = where_from()
    shards = output_rows(batches, "train")
    places = [origin[key] for key in sum(shards, [])]
    numbers = np.array([number for _, _, number in places])
    ranks = numbers.argsort().argsort()
    n = len(ranks)
    assert abs(np.corrcoef(ranks, np.arange(n))[0, 1]) < 4 / n**0.5  # Spearman's
    assert abs(np.corrcoef(ranks[:-1], ranks[1:])[0, 1]) < 4 / n**0.5  # neighbours
    same_sentence = sum(a[0] == b[0] for a, b in zip(places, places[1:], strict=False))
    assert same_sentence < 0.05 * n
    for rows in shards[:-1]:
        assert {origin[key][1] for key in rows} == {0, 1, 2}
        correlation = np.corrcoef([origin[key][2] for key in rows], np.arange(len(rows)))[0, 1]
        assert abs(correlation) < 4 / len(rows) ** 0.5  # within a shard too


def test_another_seed_gives_another_order_of_the_same_rows(store, batches, tmp_path):
    run_script(sae_preprocessing, input_dir=store, output_dir=tmp_path / "out", **OPTIONS | {"seed": 6})
    ours, others = (output_rows(folder, "validation") for folder in (batches, tmp_path / "out"))
    assert ours != others and Counter(sum(ours, [])) == Counter(sum(others, []))
    assert output_rows(batches, "train") != output_rows(tmp_path / "out", "train")


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(store, batches, tmp_path):
    run_script(sae_preprocessing, input_dir=store, output_dir=tmp_path / "out", **OPTIONS | {"num_processes": 2})
    assert contents(tmp_path / "out") == contents(batches)


@pytest.mark.parametrize(("n_sentences", "fraction", "validation"), [(1, 0.05, 0), (9, 0.05, 0), (4, 0.25, 1)])
def test_small_inputs(tmp_path, n_sentences, fraction, validation):
    """Any size works: a single sentence, none held out, one row per batch."""
    few = dict(list(sentences().items())[:n_sentences])
    few = dict(enumerate(few.values()))
    write_store(tmp_path / "in", few, [0], n_sentences)
    options = {"batch_size": 1, "validation_fraction": fraction, "num_processes": 1}
    run_script(sae_preprocessing, input_dir=tmp_path / "in", output_dir=tmp_path / "out", **options)
    rows = {split: sum(output_rows(tmp_path / "out", split), []) for split in ("train", "validation")}
    n_train = n_sentences - validation
    assert Counter(rows["train"]) == Counter(key for i in range(n_train) for key in keys(few[i]))
    assert Counter(rows["validation"]) == Counter(key for i in range(n_train, n_sentences) for key in keys(few[i]))


# ---- random numbers


def test_all_streams_of_a_plan_differ():
    """numpy pads seeds with zeros: (0, 0) is (0, 0, 0, 0)."""
    assert (np.random.default_rng((0, 0)).random(4) == np.random.default_rng((0, 0, 0, 0)).random(4)).all()
    for seed in (0, 1, 2**40):
        streams = [
            random_numbers(seed, purpose, split, shard).integers(2**62)
            for purpose in ("scatter", "gather")
            for split in ("train", "validation")
            for shard in range(50)
        ]
        streams += [random_numbers(seed, "moves", split).integers(2**62) for split in ("train", "validation")]
        assert len(set(streams)) == len(streams) == 202


# ---- how many rows go where


@st.composite
def counts_and_capacities(draw):
    n_rows = draw(st.lists(st.integers(0, 50), min_size=1, max_size=8))
    cuts = sorted(draw(st.lists(st.integers(0, sum(n_rows)), max_size=6)))
    bounds = [0, *cuts, sum(n_rows)]
    return n_rows, [b - a for a, b in zip(bounds, bounds[1:], strict=False)]


@given(counts_and_capacities(), st.integers(0, 1000), st.sampled_from([10**6, 30]))
@example(([0, 0], [0]), 0, 30)
def test_plan_moves_fills_every_shard_from_every_shard(case, seed, most):
    n_rows, capacities = case
    moves = plan_moves(np.random.default_rng(seed), n_rows, capacities, most)
    assert moves.shape == (len(n_rows), len(capacities)) and (moves >= 0).all()
    assert moves.sum(1).tolist() == n_rows
    assert moves.sum(0).tolist() == capacities
    assert (moves == plan_moves(np.random.default_rng(seed), n_rows, capacities, most)).all()


@pytest.mark.parametrize("most", [100, 60, 1])  # at once; groups of one or two shards; each shard a group
def test_plan_moves_has_the_mean_and_spread_of_a_uniform_order(most):
    n_rows, capacities = [30, 10, 40, 20], [45, 15, 40]
    draws = np.stack([plan_moves(np.random.default_rng(seed), n_rows, capacities, most) for seed in range(400)])
    total = sum(n_rows)
    for i, n in enumerate(n_rows):
        for o, c in enumerate(capacities):
            variance = n * (c / total) * (1 - c / total) * (total - n) / (total - 1)  # hypergeometric
            assert abs(draws[:, i, o].mean() - n * c / total) < 5 * (variance / 400) ** 0.5
            assert 0.7 < draws[:, i, o].var() / variance < 1.4
    # Two cells of a row: the covariance is negative, and known.
    covariance = -30 * (45 / total) * (15 / total) * (total - 30) / (total - 1)
    assert abs(np.cov(draws[:, 0, 0], draws[:, 0, 1])[0, 1] / covariance - 1) < 0.5


@pytest.mark.parametrize(("n_shards", "rows"), [(40, 17_500_000), (100, 10**8)])  # 7 x 10^8 and 10^10 rows
def test_plan_moves_of_many_rows(n_shards, rows):
    """Beyond numpy's 10^9; Pearson's statistic of the table is chi-squared with (n - 1)^2 degrees of freedom."""
    moves = plan_moves(np.random.default_rng(3), [rows] * n_shards, [rows] * n_shards)
    assert (moves.sum(0) == rows).all() and (moves.sum(1) == rows).all()
    expected = rows / n_shards
    freedom = (n_shards - 1) ** 2
    assert abs(((moves - expected) ** 2 / expected).sum() - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(("good", "bad", "n"), [(7, 9, 6), (3, 40, 30), (5, 2, 6)])
def test_hypergeometric_has_the_probabilities_of_the_textbook(good, bad, n):
    rng = np.random.default_rng(0)
    found = np.bincount([hypergeometric(rng, good, bad, n) for _ in range(4000)], minlength=n + 1)
    expected = np.array([math.comb(good, k) * math.comb(bad, n - k) / math.comb(good + bad, n) for k in range(n + 1)])
    assert found[expected == 0].sum() == 0
    deviation = (found - 4000 * expected) / np.sqrt(4000 * expected * (1 - expected) + 1e-9)
    assert np.abs(deviation).max() < 4.5


@pytest.mark.parametrize(
    ("good", "bad", "n", "k"), [(0, 5, 3, 0), (5, 0, 3, 3), (5, 5, 0, 0), (5, 5, 10, 5), (10**10, 0, 10**9, 10**9)]
)
def test_hypergeometric_without_a_choice(good, bad, n, k):
    assert hypergeometric(np.random.default_rng(0), good, bad, n) == k


def test_hypergeometric_of_large_numbers():
    good, bad, n = 3 * 10**9, 7 * 10**9, 5 * 10**8
    rng = np.random.default_rng(1)
    z = np.array([hypergeometric(rng, good, bad, n) for _ in range(100)], dtype=float) - n * 0.3
    z /= (n * 0.3 * 0.7 * (good + bad - n) / (good + bad - 1)) ** 0.5
    assert abs(z.mean()) < 5 / 100**0.5 and 0.5 < z.var() < 1.8 and np.abs(z).max() < 5


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.integers(1, 40))
def test_groups_are_consecutive_and_small(sizes, most):
    groups = consecutive_groups(np.array(sizes), most)
    assert [i for group in groups for i in range(len(sizes))[group]] == list(range(len(sizes)))
    for group in groups:
        assert len(sizes[group]) == 1 or sum(sizes[group]) <= most


@given(st.integers(0, 500), st.integers(1, 20), st.integers(1, 5), st.booleans())
def test_shard_sizes(n_rows, batch_size, batches_per_shard, keep_rest):
    sizes, rest = shard_sizes(n_rows, batch_size, batches_per_shard * batch_size, keep_rest)
    assert sum(sizes) + rest == n_rows
    assert all(0 < size <= batches_per_shard * batch_size for size in sizes)
    if keep_rest:
        assert rest == 0
    else:
        assert rest < batch_size and all(size % batch_size == 0 for size in sizes)


# ---- statistics


def test_statistics_equal_numpy(batches):
    x = torch.cat([acts for i, acts in sentences().items() if i < FIRST_VALIDATION_SENTENCE]).double().numpy()
    z = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)
    manifest = json.loads((batches / "manifest.json").read_text())
    got = load_file(batches / manifest["statistics"])
    assert got["count"].item() == len(x)
    expected = {"mean_raw": x.mean(0), "var_raw": x.var(0), "mean_normalized": z.mean(0), "var_normalized": z.var(0)}
    assert got.keys() == {"count", "b_pre", *expected}
    assert got["b_pre"].equal(got["mean_normalized"])
    for name, value in expected.items():
        assert got[name].dtype == torch.float64
        np.testing.assert_allclose(got[name].numpy(), value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_statistics_of_real_activations_equal_numpy(tmp_path):
    """The embedded Llama's activations: means far from 0 with small spreads, unlike random numbers."""
    model = load_model()
    tokens = torch.arange(3000).view(30, 100)
    acts = dict(enumerate(model.activations(tokens, "layers.6.resid_pre").to(torch.bfloat16)))
    write_store(tmp_path / "in", acts, [0, 10, 20], 30)
    options = {"batch_size": 100, "validation_fraction": 0.0, "num_processes": 1}
    run_script(sae_preprocessing, input_dir=tmp_path / "in", output_dir=tmp_path / "out", **options)
    got = load_file(tmp_path / "out" / "statistics.safetensors")
    x = torch.cat(list(acts.values())).double().numpy()
    assert (np.abs(x.mean(0)) / x.std(0)).max() > 1  # the data covers this case
    np.testing.assert_allclose(got["mean_raw"], x.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got["var_raw"], x.var(0), rtol=1e-9)
    z = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got["mean_normalized"], z.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got["var_normalized"], z.var(0), rtol=1e-9)


def sum_of_distances(x, point) -> float:
    return float(np.sqrt(((x - point) ** 2).sum(1)).sum())


def test_geometric_median_has_the_least_sum_of_distances():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 3))
    x[:80] += 30  # outliers, which pull the mean
    found = geometric_median(x)
    # Convex: the sum is least where the gradient, the sum of unit vectors towards the rows, is zero.
    towards = (x - found) / np.linalg.norm(x - found, axis=1, keepdims=True)
    assert np.linalg.norm(towards.sum(0)) < 1e-5
    assert np.linalg.norm(found - x.mean(0)) > 3


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([[2.0, 3.0]], [2.0, 3.0]),
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], [0.0, 0.0]),  # more than half in one place
        ([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0], [0.0, 0.0]], [0.0, 0.0]),  # it starts on a row
    ],
)
def test_geometric_median_of_a_few_points(x, expected):
    np.testing.assert_allclose(geometric_median(np.array(x)), expected, atol=1e-6)


def test_b_pre_may_start_at_the_geometric_median(store, tmp_path):
    run_script(sae_preprocessing, input_dir=store, output_dir=tmp_path / "out", **OPTIONS, b_pre_start="median")
    got = load_file(tmp_path / "out" / "statistics.safetensors")
    x = load_file(tmp_path / "out" / "train-00000.safetensors")["acts"].double().numpy()
    z = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)
    for moved in np.eye(D) * 1e-3:
        for sign in (-1, 1):
            assert sum_of_distances(z, got["b_pre"].numpy()) < sum_of_distances(z, got["b_pre"].numpy() + sign * moved)
    assert not got["b_pre"].equal(got["mean_normalized"])


def test_an_unknown_start_of_b_pre_is_refused(store, tmp_path, capsys):
    said = refusal(sae_preprocessing, capsys, input_dir=store, output_dir=tmp_path / "out", b_pre_start="mode")
    assert "--b_pre_start mode is unknown" in said and not (tmp_path / "out").exists()


def test_statistics_go_where_mean_filepath_says(store, batches, tmp_path):
    path = tmp_path / "elsewhere" / "mean.safetensors"
    run_script(sae_preprocessing, input_dir=store, output_dir=tmp_path / "out", mean_filepath=path, **OPTIONS)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (tmp_path / "out" / manifest["statistics"]).resolve() == path.resolve()
    assert path.read_bytes() == (batches / "statistics.safetensors").read_bytes()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.sampled_from([0.0, 1e4]), st.integers(0, 1000))
@settings(max_examples=50)
def test_statistics_of_parts_merge_to_those_of_the_whole(parts, offset, seed):
    rng = np.random.default_rng(seed)
    x = offset + rng.standard_normal((sum(parts), 5))
    merged = Statistics.of(np.zeros((0, 5)))
    for part in np.split(x, np.cumsum(parts)[:-1]):
        merged = merged.merge(Statistics.of(part))
    assert merged.count == len(x)
    if len(x):
        np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(merged.m2, ((x - x.mean(0)) ** 2).sum(0), rtol=1e-9, atol=1e-12)


# ---- memory


def test_processes_that_fit():
    assert processes_that_fit(8, 22.0, 10**9) == 8 and processes_that_fit(8, 5.0, 10**9) == 2
    with pytest.raises(InputError, match="--memory_gb 2 is less than the 2.20 GB"):
        processes_that_fit(1, 2.0, 10**9)


def test_too_little_memory_is_refused(store, tmp_path, capsys):
    options = OPTIONS | {"memory_gb": 1e-6}
    said = refusal(sae_preprocessing, capsys, input_dir=store, output_dir=tmp_path / "out", **options)
    assert "--memory_gb 1e-06 is less than" in said and not (tmp_path / "out").exists()


# ---- interruption


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("function", "calls"), [("scatter_shard", 1), ("gather_shard", 2), ("write_statistics", 0)])
def test_continues_after_an_interruption(store, batches, tmp_path, monkeypatch, function, calls):
    """The state after a kill: finished files, temporary ones, an incomplete manifest."""
    out = tmp_path / "out"
    real, n_calls = getattr(sae_preprocessing, function), 0

    def dying(*args):
        nonlocal n_calls
        if n_calls == calls:
            raise Killed
        n_calls += 1
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sae_preprocessing, function, dying)
        run_script(sae_preprocessing, input_dir=store, output_dir=out, **OPTIONS)
    assert not is_complete(out)
    for folder in (out, out / ".scattered"):
        (folder / ".train-00000.safetensors.999.tmp").write_bytes(b"half a shard")

    n_calls = 0
    done_before = contents(out)
    run_script(sae_preprocessing, input_dir=store, output_dir=out, **OPTIONS)
    assert is_complete(out) and contents(out) == contents(batches)
    assert done_before.items() <= contents(out).items()
    assert {path.name for path in out.iterdir()} == {path.name for path in batches.iterdir()}


def test_lost_outputs_are_made_again(store, batches, tmp_path):
    out = tmp_path / "out"
    run_script(sae_preprocessing, input_dir=store, output_dir=out, **OPTIONS)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    for name in ("train-00001.safetensors", "validation-00000.safetensors", "statistics.safetensors"):
        (out / name).unlink()
    run_script(sae_preprocessing, input_dir=store, output_dir=out, **OPTIONS)
    assert is_complete(out) and contents(out) == contents(batches)


def test_a_complete_folder_is_left_alone(store, batches, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in batches.iterdir() if path.name != ".lock"}
    run_script(sae_preprocessing, input_dir=store, output_dir=batches, **OPTIONS)
    assert "is already complete" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in batches.iterdir() if path.name != ".lock"}


def test_killed_while_it_tidies_up(store, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(sae_preprocessing.shutil, "rmtree", lambda path, ignore_errors: None)  # killed right before
        run_script(sae_preprocessing, input_dir=store, output_dir=out, **OPTIONS)
    run_script(sae_preprocessing, input_dir=store, output_dir=out, **OPTIONS)
    assert not (out / ".scattered").exists()


def test_changed_options_are_refused_by_name(store, batches, capsys):
    for name, value in (("seed", 6), ("batch_size", 8), ("normalize_eps", 1e-6), ("validation_fraction", 0.1)):
        said = refusal(sae_preprocessing, capsys, input_dir=store, output_dir=batches, **OPTIONS | {name: value})
        assert f"was begun with {name} = {OPTIONS.get(name, 1e-5)}, but now it is {value}" in said
    assert is_complete(batches)


def test_a_second_process_on_the_same_folder_is_refused(store, tmp_path, capsys):
    with locked(tmp_path / "out"):
        said = refusal(sae_preprocessing, capsys, input_dir=store, output_dir=tmp_path / "out", **OPTIONS)
    assert "in use by another process" in said


# ---- refusals


@pytest.fixture
def own_store(tmp_path) -> Path:
    """A copy of the captured activations that the test may damage."""
    return write_store(tmp_path / "site", sentences(), SHARD_STARTS, N_SENTENCES)


def said_and_wrote_nothing(capsys, input_dir: Path, out: Path, **options) -> str:
    said = refusal(sae_preprocessing, capsys, input_dir=input_dir, output_dir=out, **OPTIONS | options)
    assert not is_complete(out) and not contents(out)
    return said


@pytest.mark.slow
def test_missing_folder_from_the_command_line(tmp_path):
    options = OPTIONS | {"input_dir": tmp_path / "nowhere", "output_dir": tmp_path / "out"}
    command = [sys.executable, "sae_preprocessing.py", *arguments(options)]
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: There is no folder {tmp_path / 'nowhere'}; run capture_activations.py to make it."
    ]
    assert not (tmp_path / "out").exists()


def test_folder_of_sites(own_store, tmp_path, capsys):
    sites = tmp_path / "sites"
    sites.mkdir()
    own_store.rename(sites / "layers.1.attention_norm")
    said = said_and_wrote_nothing(capsys, sites, tmp_path / "out")
    assert f"name one of them: {sites / 'layers.1.attention_norm'}" in said


def test_incomplete_capture(own_store, tmp_path, capsys):
    manifest = json.loads((own_store / "manifest.json").read_text())
    (own_store / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    assert f"{own_store} is not complete" in said_and_wrote_nothing(capsys, own_store, tmp_path / "out")


def test_a_folder_of_another_stage(batches, tmp_path, capsys):
    said = said_and_wrote_nothing(capsys, batches, tmp_path / "out")
    assert "is from sae_preprocessing.py, not from capture_activations.py" in said


def flip(path: Path, position: int, bit: int = 0x40) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


def data_start(path: Path) -> int:
    """Where a safetensors file's tensors begin: the int64 ones first, activations last."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize(
    "where",
    ["activation", "sentence_idx", "offsets", "name"],
)
def test_altered_shard(own_store, tmp_path, capsys, where):
    path = own_store / "acts-00001-00.safetensors"
    start = data_start(path)
    header = json.loads(path.read_bytes()[8:start])
    position = {
        "activation": path.stat().st_size - 5,
        "sentence_idx": start + header["sentence_idx"]["data_offsets"][0] + 6,
        "offsets": start + header["offsets"]["data_offsets"][1] - 1,  # the last offset, made negative
        "name": path.read_bytes().index(b'"acts"') + 2,
    }[where]
    flip(path, position, 0x80 if where == "offsets" else 0x01)
    said = said_and_wrote_nothing(capsys, own_store, tmp_path / "out")
    assert str(path) in said


def test_altered_offset_where_validation_begins(own_store, tmp_path, capsys):
    path = own_store / "acts-00002-00.safetensors"
    start = data_start(path)
    header = json.loads(path.read_bytes()[8:start])
    n_train = sum(i < FIRST_VALIDATION_SENTENCE for i in list(sentences())[SHARD_STARTS[2] :])
    # Made negative. With a lower bit the list of planned shards would take all memory.
    flip(path, start + header["offsets"]["data_offsets"][0] + 8 * n_train + 7, 0x80)
    said = said_and_wrote_nothing(capsys, own_store, tmp_path / "out")
    assert str(path) in said


def test_broken_header(own_store, tmp_path, capsys):
    path = own_store / "acts-00001-00.safetensors"
    flip(path, 7)
    said = said_and_wrote_nothing(capsys, own_store, tmp_path / "out")
    assert str(path) in said


def test_truncated_shard(own_store, tmp_path, capsys):
    path = own_store / "acts-00002-00.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    said = said_and_wrote_nothing(capsys, own_store, tmp_path / "out")
    assert f"{path} has {path.stat().st_size} bytes instead of" in said


def test_a_shard_of_another_run(own_store, tmp_path, capsys):
    """Same names and sizes, other activations."""
    write_store(tmp_path / "other", {i: x * 2 for i, x in sentences().items()}, SHARD_STARTS, N_SENTENCES)
    path = own_store / "acts-00001-00.safetensors"
    path.write_bytes((tmp_path / "other" / path.name).read_bytes())
    said = said_and_wrote_nothing(capsys, own_store, tmp_path / "out")
    assert f"{path} was altered or is from another run" in said


def test_a_manifest_of_another_width(own_store, tmp_path, capsys):
    manifest = json.loads((own_store / "manifest.json").read_text())
    (own_store / "manifest.json").write_text(json.dumps(manifest | {"d_model": D + 1}))
    said = said_and_wrote_nothing(capsys, own_store, tmp_path / "out")
    assert f"the manifest says ({manifest['shards'][0]['n_tokens']}, {D + 1})" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("validation_fraction", -0.5), ("validation_fraction", float("nan")), ("seed", -1)],
)
def test_numbers_out_of_range(own_store, tmp_path, capsys, name, value):
    said = said_and_wrote_nothing(capsys, own_store, tmp_path / "out", **{name: value})
    reason = "is not a finite number" if value != value else "is too small"
    assert f"--{name} {value} {reason}" in said


def test_too_small_a_disk_leaves_nothing(own_store, tmp_path, capsys, monkeypatch):
    """Not even a manifest, which would later refuse other options."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    assert "free some or write elsewhere" in said_and_wrote_nothing(capsys, own_store, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.slow
def test_a_killed_worker_is_one_sentence(own_store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sae_preprocessing, "scatter_shard", end_at_once)
    said = refusal(
        sae_preprocessing, capsys, input_dir=own_store, output_dir=tmp_path / "out", **OPTIONS | {"num_processes": 2}
    )
    assert "A worker process was killed" in said and "run again to continue" in said


def end_at_once(*_args) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_missing_shard(own_store, tmp_path, capsys):
    path = own_store / "acts-00001-00.safetensors"
    path.unlink()
    assert f"{path} is missing" in said_and_wrote_nothing(capsys, own_store, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("sentence", [1, 62, 148])  # the very first row, a middle one, the last
def test_nan_in_activations_names_the_sentence(tmp_path, capsys, value, sentence):
    """The checksum matches the file: the model itself produced the value."""
    rows = sentences()
    rows[sentence][0 if sentence == 1 else -1, D - 1] = value
    write_store(tmp_path / "site", rows, SHARD_STARTS, N_SENTENCES)
    said = said_and_wrote_nothing(capsys, tmp_path / "site", tmp_path / "out")
    assert f"NaN or infinity in sentence {sentence};" in said and "acts-0000" in said


@pytest.mark.slow
def test_an_error_in_a_worker_process_is_said_once(tmp_path, capsys):
    rows = sentences()
    rows[62][0, 0] = float("nan")
    write_store(tmp_path / "site", rows, SHARD_STARTS, N_SENTENCES)
    said = said_and_wrote_nothing(capsys, tmp_path / "site", tmp_path / "out", num_processes=2)
    assert "NaN or infinity in sentence 62;" in said


def test_fewer_than_one_batch(own_store, tmp_path, capsys):
    said = said_and_wrote_nothing(capsys, own_store, tmp_path / "out", batch_size=4096)
    assert str(own_store) in said and "fewer than one batch of 4096" in said


def test_activations_that_are_all_alike_are_said_to_be(tmp_path, capsys):
    rows = {i: torch.arange(float(D)).expand(len(x), D) for i, x in sentences().items()}
    write_store(tmp_path / "site", rows, SHARD_STARTS, N_SENTENCES)
    said = said_and_wrote_nothing(capsys, tmp_path / "site", tmp_path / "out")
    assert f"activations of {tmp_path / 'site'} are alike: there is nothing to learn" in said


def test_statistics_where_nothing_can_be_written(own_store, tmp_path, capsys):
    (tmp_path / "file").touch()
    said = said_and_wrote_nothing(capsys, own_store, tmp_path / "out", mean_filepath=tmp_path / "file" / "mean")
    assert "file/mean cannot be written (Not a directory)" in said
