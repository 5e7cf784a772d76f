"""manifest.json: what a folder holds, which stage made it, whether it is complete; checksums of its shards."""

import contextlib
import json
import reprlib
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llama_3.checkpoint import differing_field
from pipeline.errors import InputError
from pipeline.files import PROJECT_DIR, locked, read_json, require_disk, sha256, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_VERIFIERS = 4  # threads that compute checksums, at about 1.5 GB/s each


def git_commit() -> str | None:
    """The commit of this code, with -dirty appended when tracked files differ; None outside a checkout."""
    git = ["git", "-C", str(PROJECT_DIR)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True).stdout.strip().decode()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("-dirty" if changed.strip() else "")


def write_manifest(folder: Path | str, stage: str, complete: bool, **fields: Any) -> dict:
    manifest = {
        "format_version": FORMAT_VERSION,
        "stage": stage,
        "complete": complete,
        "git_commit": git_commit(),
        "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **fields,
    }
    write_json(Path(folder) / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path | str, stage: str) -> dict:
    """Read the manifest that `stage` (a script's name) completed in `folder`, or raise InputError."""
    folder = Path(folder)
    fix = f"run {stage} to make it."
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; {fix}")
    manifest = read_json(folder / MANIFEST, fix)
    if not isinstance(manifest, dict) or manifest.get("stage") != stage:
        found = manifest.get("stage") if isinstance(manifest, dict) else "something else"
        raise InputError(f"{folder / MANIFEST} is from {found}, not from {stage}; name the folder {stage} wrote.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder / MANIFEST} has format version {manifest.get('format_version')}, this code reads "
            f"{FORMAT_VERSION}; run {stage} again."
        )
    if not manifest.get("complete"):
        raise InputError(f"{folder} is not complete; run {stage} again with the same options to continue.")
    return manifest


def begin_or_continue(folder: Path | str, stage: str, decides: dict[str, Any]) -> bool:
    """Check an output folder before writing to it. Returns True when its work is already complete.

    `decides` holds everything the result depends on. A folder begun with other values is refused with a sentence that
    names the first difference; a fresh folder gets an incomplete manifest that records them.
    """
    folder = Path(folder)
    decides = json.loads(json.dumps(decides))
    if (folder / MANIFEST).exists():
        manifest = read_json(folder / MANIFEST, "remove the folder or name another.")
        if not isinstance(manifest, dict):
            raise InputError(f"{folder / MANIFEST} is not a manifest; remove the folder or name another.")
        old = manifest.get("decides", {}) if manifest.get("stage") == stage else {"stage": manifest.get("stage")}
        for name in sorted(decides.keys() | old.keys()):
            if _differ(name, old.get(name), decides.get(name)):
                then, now = (reprlib.repr(values.get(name)) for values in (old, decides))
                raise InputError(
                    f"{folder} was begun with {name} = {then}, but now it is {now}; use the old value, remove the "
                    "folder or name another."
                )
        return bool(manifest["complete"])
    others = [p.name for p in folder.glob("*") if not p.name.startswith(".")] if folder.is_dir() else []
    if others:
        raise InputError(f"{folder} holds other files ({others[0]}, ...) but no {MANIFEST}; name an empty folder.")
    write_manifest(folder, stage, complete=False, decides=decides)
    return False


def _differ(name: str, then: Any, now: Any) -> bool:
    if name == "model" and isinstance(then, dict) and isinstance(now, dict):
        return differing_field(then, now) is not None
    return then != now


def complete_already(folder: Path | str, stage: str, decides: dict[str, Any]) -> bool:
    """`begin_or_continue`; if the folder is complete, also check that its shards are there and print so."""
    if not begin_or_continue(folder, stage, decides):
        return False
    check_complete(folder, stage)
    print(f"{folder} is already complete.", flush=True)
    return True


@contextlib.contextmanager
def output_folder(folder: Path | str, stage: str, decides: dict[str, Any], needed_bytes: float) -> Iterator[bool]:
    """Hold an output folder for this run alone, begun or continued. Yields whether its work is already complete.

    needed_bytes: disk space for the whole output; files already there are subtracted. Raises InputError as `locked` and
    `complete_already` do, and Stop as `require_disk` does.
    """
    folder = Path(folder)
    with locked(folder):
        if not (folder / MANIFEST).exists():
            require_disk(folder, needed_bytes)
        if complete_already(folder, stage, decides):
            yield True
            return
        present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        require_disk(folder, needed_bytes - present)
        yield False


def check_files(folder: Path | str, shards: list[dict], stage: str) -> None:
    """Raise InputError unless each shard of a manifest is there and has the right size (checksums: see `check_sum`)."""
    for shard in shards:
        path = Path(folder) / shard["file"]
        if not path.is_file():
            raise InputError(f"{path} is missing; remove {folder} and run {stage} again.")
        if path.stat().st_size != shard["bytes"]:
            raise InputError(
                f"{path} has {path.stat().st_size} bytes instead of {shard['bytes']}; remove {folder} and run {stage} "
                "again."
            )


def check_complete(folder: Path | str, stage: str) -> None:
    """Raise InputError if a complete folder has lost a shard: running the stage again would not restore it."""
    manifest = read_manifest(folder, stage)
    check_files(folder, manifest["shards"] + manifest.get("validation_shards", []), stage)


def check_sum(folder: Path | str, shard: dict, stage: str) -> None:
    """Raise InputError unless a shard has the checksum in its manifest.

    A core takes a second for 1.5 GB if the processor has SHA instructions. The bytes stay in the page cache for
    whoever reads the shard next, so the disk is read once.
    """
    path = Path(folder) / shard["file"]
    try:
        is_whole = sha256(path) == shard["sha256"]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); remove {folder} and run {stage} again.") from None
    if not is_whole:
        raise InputError(
            f"{path} was altered or is from another run: its checksum is not the one in {MANIFEST} beside it; remove "
            f"{folder} and run {stage} again."
        )


@contextlib.contextmanager
def verifying(folder: Path | str, shards: list[dict], stage: str) -> Iterator[Callable[[], None]]:
    """Compare checksums of `shards` in threads while the block runs, for stages that read shards in random order.

    Yields a function that waits for all of them and raises InputError for an altered one: call it before writing
    anything lasting.
    """
    with ThreadPoolExecutor(_VERIFIERS) as pool:
        jobs = [pool.submit(check_sum, folder, shard, stage) for shard in shards]

        def wait() -> None:
            for job in jobs:
                job.result()

        try:
            yield wait
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
