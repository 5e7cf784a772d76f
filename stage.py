"""What stage scripts share: constants as options, one-sentence errors, manifests, atomic files, the folder lock."""

import argparse
import ast
import collections
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import reprlib
import shutil
import subprocess
import sys
import threading
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PROJECT_DIR = Path(__file__).resolve().parent


class InputError(Exception):
    """Bad input. The message is one sentence that names the file and the mend; `run` prints it and exits with 2."""


def run(main: Callable[[], None]) -> None:
    """Run a script's main. InputError becomes one sentence on stderr and exit code 2; Ctrl-C exits with 130.

    Under torchrun every rank usually meets the same bad input. Rank 0 says it; the others wait, so that torchrun, which
    tears everything down at the first exit, does not silence it. An error of one rank alone is said by that rank.
    """
    rank = int(os.environ.get("RANK", 0))
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch on Linux: huge pages; a fresh tensor costs a quarter
    try:
        main()
    except InputError as error:
        if rank > 0:
            time.sleep(10)
        print(f"error: {error}", file=sys.stderr, flush=True)
        exit_at_once(2)
    except RuntimeError as error:
        if "RANK" not in os.environ or not re.search("Connection|NCCL", str(error)):
            raise
        print(f"rank {rank}: another process of this run has ended.", file=sys.stderr, flush=True)  # it said why
        exit_at_once(1)
    except KeyboardInterrupt:
        print("\nInterrupted; run the same command again to continue.", file=sys.stderr, flush=True)
        exit_at_once(130)


def exit_at_once(code: int) -> None:
    """Leave without waiting for other ranks: a process group's clean-up would hang when one rank is gone."""
    sys.stdout.flush()
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)


# ---- constants as options


def parse_constants(
    module_globals: dict[str, Any], argv: list[str] | None = None, commands: dict[str, str] | None = None
) -> argparse.Namespace:
    """Turn the upper-case constants of a script into options of the same name in lower case.

    A constant's value is the option's default, its annotation (or the value's type) the option's type, and the comment
    on its line the help text. `NAME: str` without a value is a required option. Names starting with _ are not options.
    commands: name -> help of the words that may stand first, as `command`; the first one is the default.
    """
    source = Path(module_globals["__file__"]).read_text()
    lines = source.splitlines()
    parser = argparse.ArgumentParser(
        description=module_globals["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if commands:
        text = "; ".join(f"{name}: {about}" for name, about in commands.items())
        parser.add_argument("command", nargs="?", choices=list(commands), default=next(iter(commands)), help=text)
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not isinstance(target, ast.Name) or not target.id.isupper() or target.id.startswith("_"):
            continue
        default = module_globals.get(target.id)
        annotation = module_globals.get("__annotations__", {}).get(target.id, type(default))
        if typing.get_origin(annotation) in (types.UnionType, typing.Union):
            annotation = next(t for t in typing.get_args(annotation) if t is not types.NoneType)
        value_type = annotation
        _, _, comment = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().partition("#")
        required = isinstance(node, ast.AnnAssign) and node.value is None
        text = (comment.strip() + ("" if required else f" (default: {default})")).replace("%", "%%")
        flag = f"--{target.id.lower()}"
        if value_type is bool:
            parser.add_argument(flag, type=_parse_bool, nargs="?", const=True, default=default, help=text)
        elif value_type in (tuple, list) or typing.get_origin(value_type) in (tuple, list):
            item = (typing.get_args(value_type) or (type(default[0]),))[0]
            parser.add_argument(flag, type=item, nargs="+", default=default, help=text)
        else:
            parser.add_argument(flag, type=value_type, default=default, required=required, help=text)
    return parser.parse_args(argv)


def _parse_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


# ---- progress


def progress(*args: Any, **kwargs: Any):
    """tqdm with rate and time left; where nobody watches (a log file) a line every 15 seconds instead of many."""
    from tqdm import tqdm

    watched = sys.stderr.isatty()
    return tqdm(*args, **{"dynamic_ncols": True, "mininterval": 0.2 if watched else 15.0, **kwargs})


def check_at_least(config: argparse.Namespace, **least: float) -> None:
    """Raise InputError for an option that is less than it may be."""
    for name, smallest in least.items():
        if not getattr(config, name) >= smallest:  # nor is NaN
            raise InputError(f"--{name} {getattr(config, name)} is too small; it is at least {smallest}.")


def _end_with_main_process() -> None:
    """Let this worker end when the main process is killed; it would wait for work for ever."""
    main_process = multiprocessing.parent_process()
    threading.Thread(target=lambda: (main_process.join(), os._exit(1)), daemon=True).start()


class Workers:
    """Processes that work through jobs in order, a bounded number at a time. They are spawned, not forked: torch's
    threads do not survive a fork. An InputError of a worker is raised where its result is read."""

    def __init__(self, n_workers: int):
        self.n_workers = n_workers

    def __enter__(self) -> "Workers":
        context = multiprocessing.get_context("spawn")
        options = {"mp_context": context, "initializer": _end_with_main_process}
        self.pool = ProcessPoolExecutor(self.n_workers, **options) if self.n_workers > 1 else None
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
        if kind is BrokenProcessPool:
            raise InputError(
                "A worker process was killed, perhaps for want of memory; run again to continue, with fewer "
                "--num_processes where memory is short."
            ) from None

    def map(self, function: Callable, jobs: Iterable[tuple]) -> Iterator[Any]:
        """function(*job) for each job, in order; `jobs` is read only a little ahead of what runs."""
        running: collections.deque = collections.deque()
        for job in jobs:
            if self.pool is None:
                yield function(*job)
                continue
            running.append(self.pool.submit(function, *job))
            if len(running) > self.n_workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def ahead(function: Callable, items: Iterable[Any], n_threads: int) -> Iterator[Any]:
    """function(item) for each item, in order, computed in threads at most n_threads items ahead of the caller."""
    with ThreadPoolExecutor(n_threads) as pool:
        running: collections.deque = collections.deque()
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > n_threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


# ---- files


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is synced and renamed to `path`.

    A full disk becomes an InputError, and no half file stays behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), 0o666 & ~umask)  # some libraries write files only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"Could not write {path} ({error}); free some disk and run again to continue.") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path | str, mend: str) -> Any:
    """Read a JSON file. Raises InputError, ending in `mend`, when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"No {Path(path).name} in {Path(path).parent}; {mend}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); {mend}") from None


def sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that killed processes left in `folder`. Call with the folder's lock held."""
    for pattern in (".*.tmp", ".tmp*"):  # ours; safetensors', which writes to a name of its own first
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
        lock, workers_lock = open(folder / ".lock", "a"), open(folder / ".workers.lock", "a")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error}); mend that or name another folder.") from None
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


def require_disk(folder: Path | str, needed_bytes: int) -> None:
    """Raise InputError when the disk that will hold `folder` has less than `needed_bytes` free."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed_bytes > free:
        raise InputError(
            f"{folder} needs about {gb(needed_bytes)} but its disk has {gb(free)} free; free some or write elsewhere."
        )


def gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# ---- manifests


def git_commit() -> str | None:
    """The commit this code stands at, with -dirty behind it when tracked files differ; None outside a checkout."""
    git = ["git", "-C", str(PROJECT_DIR)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
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
    mend = f"run {stage} to make it."
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; {mend}")
    manifest = read_json(folder / MANIFEST, mend)
    if not isinstance(manifest, dict) or manifest.get("stage") != stage:
        found = manifest.get("stage") if isinstance(manifest, dict) else "something else"
        raise InputError(f"{folder / MANIFEST} is from {found}, not from {stage}; name the folder {stage} wrote.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder / MANIFEST} has format version {manifest.get('format_version')}, this code reads "
            f"{FORMAT_VERSION}; run {stage} again."
        )
    if not manifest.get("complete"):
        raise InputError(f"{folder} is not complete; run {stage} again with the same options, it continues.")
    return manifest


def begin_or_continue(folder: Path | str, stage: str, decides: dict[str, Any]) -> bool:
    """Check an output folder before writing to it. Returns True when its work is already complete.

    `decides` holds everything the result depends on. A folder begun with other values is refused by naming the first
    difference; a fresh folder gets an incomplete manifest that records them.
    """
    folder = Path(folder)
    decides = json.loads(json.dumps(decides))
    if (folder / MANIFEST).exists():
        manifest = read_json(folder / MANIFEST, "remove the folder or name another.")
        if not isinstance(manifest, dict):
            raise InputError(f"{folder / MANIFEST} is no manifest; remove the folder or name another.")
        old = manifest.get("decides", {}) if manifest.get("stage") == stage else {"stage": manifest.get("stage")}
        for name in sorted(decides.keys() | old.keys()):
            if decides.get(name) != old.get(name):
                then, now = (reprlib.repr(values.get(name)) for values in (old, decides))
                raise InputError(
                    f"{folder} was begun with {name} = {then}, now it is {now}; use the old value, remove the folder "
                    "or name another."
                )
        return bool(manifest["complete"])
    others = [p.name for p in folder.glob("*") if not p.name.startswith(".")] if folder.is_dir() else []
    if others:
        raise InputError(f"{folder} holds other files ({others[0]}, ...) and no {MANIFEST}; name an empty folder.")
    write_manifest(folder, stage, complete=False, decides=decides)
    return False


def check_files(folder: Path | str, shards: list[dict], stage: str) -> None:
    """Raise InputError unless each shard of a manifest is there with its size in bytes (checksums: see `sha256`)."""
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
    """Raise InputError where a complete folder has lost a shard: to run the stage again would not mend that."""
    manifest = read_manifest(folder, stage)
    check_files(folder, manifest["shards"] + manifest.get("validation_shards", []), stage)


def check_sum(folder: Path | str, shard: dict, stage: str) -> None:
    """Raise InputError unless a shard's bytes are those whose checksum its manifest holds.

    A second of one core for 1.5 GB where the processor has SHA instructions. What it reads stays in the page cache for
    whoever reads the shard next, so it is no second pass over the disk.
    """
    path = Path(folder) / shard["file"]
    try:
        is_whole = sha256(path) == shard["sha256"]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); remove {folder} and run {stage} again.") from None
    if not is_whole:
        raise InputError(
            f"{path} is altered, or of another run: its checksum is not the one in {MANIFEST} beside it; remove "
            f"{folder} and run {stage} again."
        )


@contextlib.contextmanager
def verifying(folder: Path | str, shards: list[dict], stage: str) -> Iterator[Callable[[], None]]:
    """Compare checksums of `shards` in a thread while the block runs, for those who read shards in random order.

    Yields a function that waits for all of them and raises InputError for an altered one: call it before anything
    lasting is written.
    """
    with ThreadPoolExecutor(1) as pool:
        jobs = [pool.submit(check_sum, folder, shard, stage) for shard in shards]

        def wait() -> None:
            for job in jobs:
                job.result()

        try:
            yield wait
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
