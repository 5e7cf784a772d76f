"""The files that belong to an SAE: NAME.pth and the files beside it. docs/files.md describes each."""

from pathlib import Path
from typing import NamedTuple


def without_ending(path: str | Path, ending: str) -> str:
    """The path without this ending, in capitals or not."""
    return str(path)[: -len(ending)] if str(path).lower().endswith(ending) else str(path)


class SaeFiles(NamedTuple):
    """The files of the SAE at `path`, NAME.pth."""

    path: str | Path

    @property
    def name(self) -> str:
        """The path without its ending."""
        return without_ending(self.path, ".pth")

    @property
    def json(self) -> str:
        """What the SAE is: k, normalisation, site, model, quality. A string, since it may be remote (gs://, az://)."""
        return f"{self.name}.json"

    def beside(self, suffix: str) -> Path:
        """A local file beside the SAE, such as beside("top.parquet"): NAME.top.parquet."""
        return Path(f"{self.name}.{suffix}")

    def meanings(self) -> list[Path]:
        """Every NAME.meaning_*.yaml, in order of name."""
        prefix = self.beside("meaning_")
        found = (path for path in prefix.parent.glob("*") if path.name.startswith(prefix.name))
        return sorted(path for path in found if path.suffix.lower() == ".yaml")
