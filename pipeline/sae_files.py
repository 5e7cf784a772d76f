"""The files that belong to an SAE: NAME.pth and the files beside it. docs/files.md describes each."""

from pathlib import Path
from typing import NamedTuple


class SaeFiles(NamedTuple):
    """The files of the SAE at `path`, NAME.pth."""

    path: str | Path

    @property
    def name(self) -> str:
        """The path without its ending."""
        return str(self.path).removesuffix(".pth")

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
        return sorted(prefix.parent.glob(f"{prefix.name}*.yaml"))
