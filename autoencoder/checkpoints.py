"""Checkpoints of sae_training.py: a file for each slice of the latents, step-000000123.0-of-2.pt and 1-of-2.

Each process writes its slice without waiting for the others, so it still can when one of them is gone. A checkpoint
counts when all of its slices are there, and any number of processes can read it, a slice each.
"""

import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.files import utf8_path

# The dimension that is cut into slices; tensors not listed are whole in every slice.
_LATENT_DIM = {
    **{"encoder.weight": 0, "encoder.bias": 0, "decoder.weight": 1, "threshold": 0},
    **{"silent_tokens": 0, "firing": 0},
}


class Slice(NamedTuple):
    """One file of a checkpoint: the slice of one of the processes that share an SAE."""

    step: int
    rank: int
    size: int

    def path(self, folder: Path) -> Path:
        return folder / f"step-{self.step:09d}.{self.rank}-of-{self.size}.pt"


def checkpoint_files(folder: Path) -> dict[Path, Slice]:
    found = {path: re.fullmatch(r"step-(\d+)\.(\d+)-of-(\d+)\.pt", path.name) for path in sorted(folder.glob("step-*"))}
    return {path: Slice(*map(int, match.groups())) for path, match in found.items() if match}


def whole_checkpoints(folder: Path) -> list[list[Path]]:
    """The files of each complete checkpoint, in order of rank; oldest checkpoint first."""
    slices = {s: path for path, s in checkpoint_files(folder).items()}
    kinds = sorted({(s.step, s.size) for s in slices})
    checkpoints = [[Slice(step, rank, size) for rank in range(size)] for step, size in kinds]
    return [[slices[s] for s in checkpoint] for checkpoint in checkpoints if slices.keys() >= set(checkpoint)]


def steps_of(folder: Path) -> set[int]:
    """The steps of the complete checkpoints."""
    files = checkpoint_files(folder)
    return {files[paths[0]].step for paths in whole_checkpoints(folder)}


def delete_checkpoints(folder: Path, keep: int, steps: set[int] | None = None) -> None:
    """Delete all but the newest `keep` complete checkpoints, of these steps if given; incomplete ones go too."""
    files = checkpoint_files(folder)
    good = [paths for paths in whole_checkpoints(folder) if steps is None or files[paths[0]].step in steps]
    kept = {path for paths in good[-keep:] for path in paths}
    for path in files.keys() - kept:
        path.unlink()


def load_checkpoint(paths: list[Path], rank: int, size: int) -> dict[str, dict[str, Any]]:
    """Slice `rank` of `size` of a checkpoint, however many slices it was written in.

    Raises InputError for a damaged file.
    """
    slices = []
    for path in paths:
        try:
            with utf8_path(path) as name:
                slices.append(torch.load(name, map_location="cpu", weights_only=True, mmap=True))
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError) as error:
            raise InputError(f"{path} is damaged; delete it to continue from the previous checkpoint.") from error
    state = {"progress": slices[0]["progress"]}
    for part in slices[0].keys() - state.keys():
        state[part] = {}
        for name, tensor in slices[0][part].items():
            tensors = [other[part][name] for other in slices]
            state[part][name] = _cut(tensors, _LATENT_DIM[name], rank, size) if name in _LATENT_DIM else tensor
    return state


def _cut(tensors: list[Tensor], dim: int, rank: int, size: int) -> Tensor:
    """Part `rank` of `size` of the tensors concatenated along `dim`, without a copy of the whole."""
    length = sum(tensor.shape[dim] for tensor in tensors) // size
    begin, parts = rank * length, []
    for tensor in tensors:
        first, last = max(begin, 0), min(begin + length, tensor.shape[dim])
        if first < last:
            parts.append(tensor.narrow(dim, first, last - first))
        begin -= tensor.shape[dim]
    return torch.cat(parts, dim)
