"""Download a model by its name from the Hugging Face hub, into a folder that the other scripts read.

Reads   the hub (HF_ENDPOINT names another); for Meta's models HF_TOKEN, of an account that accepted the licence
Writes  OUTPUT_DIR: weights, parameters and tokenizer of MODEL, manifest.json (repository, commit, sizes, checksums)
Method  Meta's models come in Meta's own format, from the folder original/ of their repositories; others as Hugging Face
        folders. A file gets its final name only after its size and checksum match the hub's
Cost    time depends on the network; disk 2.5 GB (1B), 6.4 GB (3B), 16.1 GB (8B), 0.3 GB (smollm2-135M)

    python fetch_model.py --model smollm2-135M
    HF_TOKEN=hf_... python fetch_model.py --model llama_3.2-1B-Instruct

An interrupted download continues where it stopped, at the same commit, when the command is run again.
"""

import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, cast

from pipeline.errors import InputError, Stop
from pipeline.files import locked, read_json, require_disk
from pipeline.hub import answers_of_a_hub, connection_errors, describe_file, explain, is_whole
from pipeline.manifests import MANIFEST, begin_or_continue, write_manifest
from pipeline.options import parse_constants
from pipeline.progress import gb, progress_bar
from pipeline.run import run

MODEL: str  # llama_3.2-1B, llama_3.2-3B, llama_3.1-8B, smollm2-135M, each also -Instruct; tinyllama-1.1B-Chat
OUTPUT_DIR: str | None = None  # folder for the files; models/MODEL when not given

_STAGE = "fetch_model.py"


class Model(NamedTuple):
    repo: str  # on the hub; its page has the licence
    files: tuple[str, ...]  # patterns, each matching at least one file


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


def main() -> None:
    config = parse_constants(globals())
    if config.model not in _MODELS:
        raise InputError(f"No model is called {config.model}; name one of {', '.join(_MODELS)}.")
    model = _MODELS[config.model]
    folder = Path(config.output_dir or f"models/{config.model}")
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
