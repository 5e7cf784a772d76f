"""The activations' file format: what capture_activations.py writes and later stages read.

One folder per site holds safetensors shards and a manifest.json. A shard holds whole sentences, in order:

    acts          (n_tokens, d_model) bfloat16   a row per token; of a store of dtype int8: rows of bytes,
                                                 (n_tokens, row_bytes) uint8, see pipeline/packing.py
    token_ids     (n_tokens,) int32
    sentence_idx  (n_sentences,) int64           index into the sentence dataset's seeded order, ascending
    offsets       (n_sentences + 1,) int64       sentence s has the rows offsets[s] to offsets[s + 1]
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.dialogues import CAPTURE_STAGE
from pipeline.errors import InputError
from pipeline.files import atomic_path, sha256, utf8_path
from pipeline.manifests import MANIFEST, check_files, check_sum, read_manifest
from pipeline.packing import StoreDtype, row_bytes, unpack
from pipeline.source import Source


def open_shard(path: Path, made_by: str) -> Any:
    """A memory-mapped safetensors file; InputError when its header is broken."""
    try:
        with utf8_path(path) as name:
            return safe_open(name, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete it and run {made_by} again.") from None


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:  # how the library reports a full disk
            raise OSError(str(error)) from error


def dtype_of(manifest: dict[str, Any], path: Path) -> StoreDtype:
    """How a folder's activations are stored. Raises InputError for a way that this code does not know."""
    if (dtype := manifest.get("dtype", "bfloat16")) not in StoreDtype.__args__:
        raise InputError(f"{path} says that activations are stored as {dtype}; use newer code to read them.")
    return dtype


class Shard(NamedTuple):
    """One shard's tensors; `acts` is memory-mapped, and as it is stored: `unpack` it before use."""

    acts: Tensor
    token_ids: Tensor
    sentence_idx: Tensor
    offsets: Tensor


def write_activations(
    folder: Path, name: str, acts: Tensor, sentence_idx: list[int], token_ids: list[list[int]], shard_bytes: int
) -> list[dict[str, Any]]:
    """Write sentences to NAME-00.safetensors, NAME-01.safetensors, ... of about shard_bytes; returns their records.

    acts: a row per token, bfloat16 or packed, the sentences' tokens one after the other. A shard has as many whole
    sentences as fit, at least one.
    """
    rows_per_shard = shard_bytes // (acts.shape[1] * acts.itemsize)
    records: list[dict[str, Any]] = []
    first = row = 0
    while first < len(sentence_idx):
        last, n_tokens = first + 1, len(token_ids[first])
        while last < len(sentence_idx) and n_tokens + len(token_ids[last]) <= rows_per_shard:
            n_tokens += len(token_ids[last])
            last += 1
        ids = token_ids[first:last]
        shard = Shard(
            acts=acts[row : row + n_tokens].contiguous(),
            token_ids=torch.tensor([token for sentence in ids for token in sentence], dtype=torch.int32),
            sentence_idx=torch.tensor(sentence_idx[first:last]),
            offsets=torch.tensor([0, *map(len, ids)]).cumsum(0),
        )
        path = folder / f"{name}-{len(records):02d}.safetensors"
        write_shard(path, shard._asdict())
        records.append(
            {
                "file": path.name,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
                "first_sentence_idx": sentence_idx[first],
                "n_sentences": last - first,
                "n_tokens": n_tokens,
            }
        )
        first, row = last, row + n_tokens
    return records


def run_checksum(records: list[dict[str, Any]]) -> str:
    """One checksum over the shards' checksums: identifies the run of capture_activations.py."""
    return hashlib.sha256("".join(record["sha256"] for record in records).encode()).hexdigest()


class ActivationStore:
    """Read one site's captured activations. Raises InputError for a folder that is incomplete or damaged.

    `source` is the record of where they come from.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        sites = sorted(self.folder.glob("layers.*/manifest.json"))
        if sites and not (self.folder / MANIFEST).exists():
            raise InputError(f"{folder} holds a folder for each site; name one of them: {sites[0].parent}.")
        self.manifest = read_manifest(folder, CAPTURE_STAGE)
        self.records = self.manifest["shards"]
        check_files(folder, self.records, CAPTURE_STAGE)
        self.d_model: int = self.manifest["d_model"]
        self.dtype: StoreDtype = dtype_of(self.manifest, self.folder / MANIFEST)
        self.n_tokens: int = self.manifest["counts"]["tokens"]
        stated = {**self.manifest, "activations": run_checksum(self.records)}  # older manifests do not state it
        self.source = Source.read(stated, self.folder / MANIFEST).with_folder("activations_dir", self.folder)
        self._files: dict[int, Any] = {}  # shard -> its file, opened at first use

    def _file(self, i: int) -> Any:
        if i not in self._files:
            self._files[i] = open_shard(self.folder / self.records[i]["file"], CAPTURE_STAGE)
        return self._files[i]

    def verify(self, i: int) -> None:
        """Raise InputError when shard i is not the one that was captured: call before its activations are used."""
        check_sum(self.folder, self.records[i], CAPTURE_STAGE)

    def shard(self, i: int) -> Shard:
        """Shard i, its shape checked against the manifest; `verify` checks its checksum."""
        path = self.folder / self.records[i]["file"]
        try:
            shard = Shard(*(self._file(i).get_tensor(name) for name in Shard._fields))
        except SafetensorError as error:
            raise InputError(f"{path} is damaged ({error}); capture it again.") from None
        expected = self.records[i]["n_tokens"], row_bytes(self.d_model, self.dtype)
        if (len(shard.acts), shard.acts.shape[1] * shard.acts.itemsize) != expected:
            raise InputError(
                f"{path} holds activations of shape {tuple(shard.acts.shape)}, but the manifest says "
                f"{(expected[0], self.d_model)} as {self.dtype}; capture into an empty folder again."
            )
        offsets = shard.offsets
        whole = len(offsets) == len(shard.sentence_idx) + 1 and offsets[0] == 0 and offsets[-1] == len(shard.acts)
        if not whole or (offsets.diff() < 0).any() or (shard.sentence_idx.diff() <= 0).any():
            raise InputError(f"{path} is damaged: its sentences do not fit its activations; capture it again.")
        return shard

    def shards(self) -> Iterator[Shard]:
        for i in range(len(self.records)):
            yield self.shard(i)

    def sentence(self, sentence_idx: int) -> tuple[Tensor, Tensor] | None:
        """(acts, token_ids) of one sentence; None when it was not captured (it had no tokens)."""
        i = bisect_right([record["first_sentence_idx"] for record in self.records], sentence_idx) - 1
        if i < 0:
            return None
        file = self._file(i)
        sentences = file.get_tensor("sentence_idx")
        row = int(torch.searchsorted(sentences, sentence_idx))
        if row == len(sentences) or int(sentences[row]) != sentence_idx:
            return None
        start, end = file.get_tensor("offsets")[row : row + 2].tolist()
        return unpack(file.get_slice("acts")[start:end], self.d_model), file.get_slice("token_ids")[start:end]
