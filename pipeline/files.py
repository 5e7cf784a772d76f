"""Files that appear whole or not at all, JSON, checksums, the lock on an output folder, free disk."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, Stop
from pipeline.progress import gb

PROJECT_DIR = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block succeeds it is synced and renamed to `path`.

    A full disk becomes a `Stop`, and no partial file stays behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), 0o666 & ~umask)  # some libraries write files only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        raise Stop(f"Could not write {path} ({error}); {_fix(error)} and run again to continue.") from error
    finally:
        with contextlib.suppress(OSError):  # must not hide the error that ended the block
            temporary.unlink(missing_ok=True)


def _fix(error: OSError) -> str:
    """The fix for a write error; libraries report a full disk without its errno."""
    full = error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "free some disk" if full else "fix that"


def require_writable(*paths: Path | str) -> None:
    """Raise InputError unless files can be written at all these paths; call it before the work."""
    for path in map(Path, paths):
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            folder = path.absolute().parent
            while not folder.exists():
                folder = folder.parent
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise InputError(
                f"{path} cannot be written ({error.strerror}); make it writable, or work on a copy in another folder."
            ) from None


@contextlib.contextmanager
def utf8_path(path: Path | str) -> Iterator[str]:
    """A name with which a library that only accepts UTF-8 can open the file at `path`."""
    with open(path, "rb") as file:
        is_utf8 = os.fsencode(path) == str(path).encode(errors="replace")
        yield str(path) if is_utf8 else f"/dev/fd/{file.fileno()}"


def write_json(path: Path | str, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with atomic_path(path) as temporary:  # of a name that is not UTF-8, \udce9 is what JSON writes for a byte
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path | str, fix: str) -> Any:
    """Read a JSON file. Raises InputError, ending in `fix`, when it is missing or broken."""
    try:
        return json.loads(Path(path).read_bytes())  # bytes may start with a byte order mark
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"No {Path(path).name} in {Path(path).parent}; {fix}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); {fix}") from None


def sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that killed processes left in `folder`. Call with the folder's lock held."""
    for pattern in (".*.tmp", ".tmp*"):  # ours, and safetensors' own
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path | str, rank: int = 0, barrier: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold `folder` for this run alone; a second run on it raises InputError.

    Rank 0 holds .lock; the other ranks of its run share .workers.lock, so that workers which outlive a killed torchrun
    still keep others out. The system drops a lock when its last holder dies, however it dies.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock, workers_lock = open(folder / ".lock", "ab"), open(folder / ".workers.lock", "ab")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error}); fix that or name another folder.") from None
    with lock, workers_lock:
        try:
            if rank == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(workers_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(workers_lock, fcntl.LOCK_UN)
                remove_leftovers(folder)
            barrier()
            if rank > 0:
                fcntl.flock(workers_lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder} is in use by another process; wait for it to end or choose another output folder."
            ) from None
        yield


def require_disk(folder: Path | str, needed_bytes: float) -> None:
    """Raise Stop when the disk that will hold `folder` has less than `needed_bytes` free."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed_bytes > free:
        raise Stop(
            f"{folder} needs about {gb(needed_bytes)} but its disk has {gb(free)} free; free some or write elsewhere."
        )
