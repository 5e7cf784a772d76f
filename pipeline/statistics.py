"""Mean and variance of the training activations, and their file, statistics.safetensors.

By Welford's algorithm, merged as in Chan, Golub and LeVeque 1983, so that parts can be computed anywhere.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.activation_store import open_shard, write_shard
from pipeline.errors import InputError

_STAGE = "sae_preprocessing.py"


class Statistics(NamedTuple):
    """Count, and per dimension mean and sum of squared distances from it, (d_model,) float64."""

    count: int
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> "Statistics":
        mean = x.mean(0) if len(x) else np.zeros(x.shape[1])
        distance = x - mean
        return cls(len(x), mean, np.einsum("ij,ij->j", distance, distance))

    def merge(self, other: "Statistics") -> "Statistics":
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return Statistics(count, mean, self.m2 + other.m2 + delta**2 * (self.count * other.count / count))


def normalize(x: np.ndarray, eps: float) -> np.ndarray:
    """The SAE's input: each row minus its mean, over its standard deviation (n - 1) plus eps."""
    z = x - x.mean(1, keepdims=True)
    std = np.sqrt(np.einsum("ij,ij->i", z, z) / (x.shape[1] - 1))
    z /= std[:, None] + eps
    return z


class ActivationStatistics(NamedTuple):
    """Of the training activations; all but the count are (d_model,) float64, population variances."""

    count: int
    mean_raw: Tensor
    var_raw: Tensor
    mean_normalized: Tensor
    var_normalized: Tensor
    b_pre: Tensor  # initial value of the SAE's b_pre, in normalised space

    @classmethod
    def of(cls, raw: Statistics, normalized: Statistics) -> "ActivationStatistics":
        """b_pre is the mean."""
        mean_raw, var_raw, mean, var = (
            torch.from_numpy(part.copy())
            for each in (raw, normalized)
            for part in (each.mean, each.m2 / max(1, each.count))
        )
        return cls(raw.count, mean_raw, var_raw, mean, var, b_pre=mean.clone())  # a file holds no tensor twice


def write_statistics(path: Path, statistics: ActivationStatistics) -> None:
    write_shard(path, {**statistics._asdict(), "count": torch.tensor(statistics.count)})


def read_statistics(path: Path) -> ActivationStatistics:
    """Raises InputError if there are none."""
    if not path.is_file():
        raise InputError(f"There are no statistics at {path}; run {_STAGE} again.")
    file = open_shard(path, _STAGE)
    try:
        found = {name: file.get_tensor(name) for name in ActivationStatistics._fields}
    except SafetensorError as error:
        raise InputError(f"{path} does not hold statistics of {_STAGE} ({error}); name another file.") from None
    return ActivationStatistics(**{**found, "count": int(found["count"])})
