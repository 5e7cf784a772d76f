"""statistics.safetensors: mean and variance of the training activations, computed by sae_preprocessing.py."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.activation_store import open_shard, write_shard
from pipeline.errors import InputError

_STAGE = "sae_preprocessing.py"


class ActivationStatistics(NamedTuple):
    """Of the training activations; all but the count are (d_model,) float64, population variances."""

    count: int
    mean_raw: Tensor
    var_raw: Tensor
    mean_normalized: Tensor
    var_normalized: Tensor
    b_pre: Tensor  # initial value of the SAE's b_pre, in normalised space


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
