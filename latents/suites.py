"""A suite: SAEs and transcoders at many places of one model, in one folder.

SUITE_DIR/layers.3.resid_post/sae.pth      an SAE of that site, with the files beside it
          layers.3.transcoder/sae.pth      the transcoder of layer 3's MLP, from ffn_norm to mlp_out
          activations/layers.3.ffn_norm    the captured activations of a site, all of the same tokens
          batches/layers.3.ffn_norm        shuffled, while they are needed
"""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from llama_3.model import SITES
from pipeline.errors import InputError
from pipeline.sae_files import SaeFiles

TRANSCODER = "transcoder"
KINDS = (*SITES, TRANSCODER)  # in the order in which a suite lists the SAEs of a layer
_READS, _WRITES = "ffn_norm", "mlp_out"  # of a transcoder


class Member(NamedTuple):
    """An SAE of a suite."""

    suite_dir: Path
    layer: int
    kind: str  # of KINDS

    @property
    def name(self) -> str:
        """Also its folder's: layers.3.resid_post, layers.3.transcoder."""
        return f"layers.{self.layer}.{self.kind}"

    @property
    def folder(self) -> Path:
        return self.suite_dir / self.name

    @property
    def files(self) -> SaeFiles:
        return SaeFiles(self.folder / "sae.pth")

    @property
    def reads(self) -> str:
        """The site that it encodes."""
        return f"layers.{self.layer}.{_READS}" if self.kind == TRANSCODER else self.name

    @property
    def writes(self) -> str | None:
        """The site that a transcoder reconstructs; None for the one it encodes."""
        return f"layers.{self.layer}.{_WRITES}" if self.kind == TRANSCODER else None

    @property
    def sites(self) -> list[str]:
        return [self.reads, *([self.writes] if self.writes else [])]

    @property
    def is_trained(self) -> bool:
        return Path(self.files.path).is_file() and Path(self.files.json).is_file()

    @property
    def activations(self) -> Path:
        """Those that it encodes."""
        return activations_dir(self.suite_dir, self.reads)


def activations_dir(suite_dir: Path, site: str) -> Path:
    return suite_dir / "activations" / site


def batches_dir(suite_dir: Path, site: str) -> Path:
    return suite_dir / "batches" / site


def named(suite_dir: Path, name: str) -> Member | None:
    """The member of this name; None for a name that no member can have."""
    parts = re.fullmatch(r"layers\.(\d+)\.(\w+)", name)
    return Member(suite_dir, int(parts[1]), parts[2]) if parts and parts[2] in KINDS else None


def chosen(suite_dir: Path, globs: Sequence[str], n_layers: int) -> list[Member]:
    """The members that these patterns name, each once, by layer. Raises InputError for one that names none."""
    every = [Member(suite_dir, layer, kind) for layer in range(n_layers) for kind in KINDS]
    for glob in globs:
        if not any(fnmatchcase(member.name, glob) for member in every):
            raise InputError(
                f"--sites {glob} names nothing: write layers.N.S with N from 0 to {n_layers - 1}, or *, and S one of "
                f"{', '.join(KINDS)}."
            )
    return [member for member in every if any(fnmatchcase(member.name, glob) for glob in globs)]


def trained(suite_dir: Path) -> list[Member]:
    """The members that are there, by layer. Raises InputError if there is none."""
    found = [member for path in suite_dir.glob("layers.*") if (member := named(suite_dir, path.name))]
    members = [member for member in found if member.is_trained]
    if not members:
        raise InputError(
            f"{suite_dir} holds no layers.N.KIND/sae.pth; name a suite's folder, or train one: sae_suite.py --sites."
        )
    return sorted(members, key=lambda member: (member.layer, KINDS.index(member.kind)))


def by_kind(members: Sequence[Member]) -> dict[str, list[Member]]:
    """The members of each kind, by layer."""
    return {kind: found for kind in KINDS if (found := [member for member in members if member.kind == kind])}
