"""Pairs of latents counted a block at a time, against dense counting; phi against the correlation of numpy.

.venv/bin/python -m pytest tests/test_coactivation.py
"""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latents import coactivation
from latents.coactivation import associate, firings, pair_counts, phi, stacked


@st.composite
def what_fired(draw) -> tuple[np.ndarray, np.ndarray]:
    """Two SAEs on the same tokens: bool (n_tokens, n_latents), of any density, some latents silent or always on."""
    n_tokens = draw(st.integers(1, 30))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    share = rng.choice([0.0, 0.1, 0.5, 1.0], size=draw(st.integers(1, 9)))
    other_share = rng.choice([0.0, 0.1, 0.5, 1.0], size=draw(st.integers(1, 9)))
    return rng.random((n_tokens, len(share))) < share, rng.random((n_tokens, len(other_share))) < other_share


def as_tokens(fired: np.ndarray) -> torch.Tensor:
    """The latents of each token in some order, -1 for none, with one column more than is needed."""
    width = int(fired.sum(1).max()) + 1
    rows = [np.random.default_rng(i).permutation(np.flatnonzero(row)) for i, row in enumerate(fired)]
    return torch.tensor(np.array([np.pad(row, (width - len(row), 0), constant_values=-1) for row in rows])).int()


@settings(max_examples=40)
@given(what_fired(), st.sampled_from([1, 7, 2**21]))
def test_counts_equal_dense_counting(fired, at_once):
    before, after = fired
    tokens, others = map(as_tokens, fired)
    assert firings(tokens, before.shape[1]).tolist() == before.sum(0).tolist()
    counts = np.full((before.shape[1], after.shape[1]), -1)
    with mock.patch.object(coactivation, "_COUNTED_AT_ONCE", at_once):
        for first, block in pair_counts(tokens, others, *counts.shape):
            counts[first : first + len(block)] = block.numpy()
    assert (counts == before.T.astype(int) @ after.astype(int)).all()


@settings(max_examples=40)
@given(what_fired())
def test_phi_is_the_correlation(fired):
    before, after = fired
    counts = before.T.astype(int) @ after.astype(int)
    found = phi(torch.tensor(counts), torch.tensor(before.sum(0))[:, None], torch.tensor(after.sum(0)), len(before))
    for a, b in np.ndindex(counts.shape):
        varies = 0 < before[:, a].sum() < len(before) and 0 < after[:, b].sum() < len(before)
        expected = np.corrcoef(before[:, a], after[:, b])[0, 1] if varies else 0.0
        assert float(found[a, b]) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=40)
@given(what_fired(), st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 20, 2**21]))
def test_the_best_pairs(fired, n_kept, least, at_once):
    before, after = fired
    counts = before.T.astype(int) @ after.astype(int)
    n_before, n_after = before.sum(0), after.sum(0)
    values = phi(torch.tensor(counts), torch.tensor(n_before)[:, None], torch.tensor(n_after), len(before)).numpy()
    values[(counts == 0) | (n_before[:, None] < least) | (n_after < least)] = 0
    values = values.clip(0)
    with mock.patch.object(coactivation, "_COUNTED_AT_ONCE", at_once):
        found = associate(*map(as_tokens, fired), *counts.shape, n_kept, least)
    for a in range(counts.shape[0]):
        best = sorted(
            (b for b in range(counts.shape[1]) if values[a, b] > 0), key=lambda b: (-int(values[a, b] * 2**40), b)
        )
        best = best[:n_kept]
        width = found.latents.shape[1]
        assert width == min(n_kept, counts.shape[1])
        assert found.latents[a].tolist() == best + [-1] * (width - len(best))
        assert found.both[a].tolist() == [counts[a, b] for b in best] + [0] * (width - len(best))
        np.testing.assert_allclose(found.phi[a, : len(best)].numpy(), values[a, best])
    for b in range(counts.shape[1]):
        expected = int(values[:, b].argmax()) if values[:, b].max() > 0 else -1
        assert int(found.best_before[b]) == expected


def test_nothing_fires():
    nothing = torch.full((5, 0), -1, dtype=torch.int32)
    found = associate(nothing, nothing, 3, 4, 2, 1)
    assert (found.latents == -1).all() and (found.best_before == -1).all() and (found.phi == 0).all()


def test_rows_are_filled_up_to_the_widest():
    parts = [torch.tensor([[1], [2]]), torch.tensor([[3, 4]])]
    assert stacked(parts).tolist() == [[1, -1], [2, -1], [3, 4]]
