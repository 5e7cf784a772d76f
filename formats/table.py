"""Every format by name: what its files are known by, and its functions. docs/interop.md is the table for people."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from formats import dictionary_learning, gemma_scope, llama_scope, openai, plain, saelens, sparsify
from formats.common import Foreign, Ours, Place
from pipeline.errors import InputError
from sae import SparseAutoencoder

Outcome = tuple[Tensor, Tensor]  # latents (n, n_latents) and x_hat (n, d_model)


class Format(NamedTuple):
    markers: str  # by which its files are known, in words
    find: Callable[[Place], Foreign | None]  # the files opened; None if they are of another format
    to_ours: Callable[[Foreign], Ours]
    formula: Callable[[Foreign, Tensor], Outcome]  # what its own program computes of raw x, restated; dense and slow
    write: Callable[[SparseAutoencoder, Path], None] | None = None  # into an empty folder
    package: Callable[[Path, Tensor], Outcome | None] | None = None  # by its own program, where that is installed


FORMATS = {
    "llamascope": Format(
        llama_scope.MARKERS, llama_scope.find, llama_scope.to_ours, llama_scope.formula, llama_scope.write
    ),
    "sparsify": Format(
        sparsify.MARKERS, sparsify.find, sparsify.to_ours, sparsify.formula, sparsify.write, sparsify.package
    ),
    "saelens": Format(saelens.MARKERS, saelens.find, saelens.to_ours, saelens.formula, saelens.write, saelens.package),
    "dictionary_learning": Format(
        dictionary_learning.MARKERS,
        dictionary_learning.find,
        dictionary_learning.to_ours,
        dictionary_learning.formula,
        dictionary_learning.write,
        dictionary_learning.package,
    ),
    "llamascope-r1": Format(
        llama_scope.MARKERS_R1, llama_scope.find_r1, llama_scope.to_ours_r1, llama_scope.formula_r1
    ),
    "gemmascope": Format(
        gemma_scope.MARKERS, gemma_scope.find, gemma_scope.to_ours, gemma_scope.formula, gemma_scope.write
    ),
    "openai": Format(openai.MARKERS, openai.find, openai.to_ours, openai.formula, openai.write),
    "goodfire": Format(plain.MARKERS_GOODFIRE, plain.find_goodfire, plain.to_ours, plain.formula),
    "qresearch": Format(plain.MARKERS_QRESEARCH, plain.find_qresearch, plain.to_ours, plain.formula),
}
_ORIGINAL = "the tensor b_pre (this project's own, and the published SAE)"
_INSIDE = {  # files that belong to the folder they are in
    "cfg.json", "config.json", "hyperparams.json", "sae.safetensors", "sae_weights.safetensors", "ae.pt", "params.npz",
}  # fmt: skip


def recognise(path: Path) -> tuple[str, Foreign]:
    """The name of the format, and the files opened. Raises InputError for a path that is of no known one."""
    if not path.exists():
        raise InputError(f"There is nothing at {path}; name a folder, a file, or a repository OWNER/NAME of the hub.")
    if path.is_file() and path.name in _INSIDE:
        path = path.parent
    elif path.is_file() and path.parent.name == "checkpoints":
        path = path.parent.parent
    place = Place(path)
    for name, row in FORMATS.items():
        if (found := row.find(place)) is not None:
            return name, found
    if "b_pre" in place.state:
        raise InputError(
            f"{path} holds b_pre: it is already an SAE of this project. Write its JSON beside it: "
            '{"k": 64, "normalize_eps": 1e-6, "site": "layers.22.attention_norm"}.'
        )
    markers = [row.markers for row in FORMATS.values()]
    raise InputError(f"{path} is of no known format. Looked for: {'; '.join([*markers, _ORIGINAL])}.")
