"""A model's files, their format, and which model they contain. Needs no torch."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import blobfile

from pipeline.errors import InputError

TINY_LLAMA_DIR = str(Path(__file__).resolve().parent / "tiny_llama")  # the embedded model
LFS_POINTER = b"version https://git-lfs"


class Checkpoint(NamedTuple):
    """Where a model's files are, and what its params.json or config.json holds."""

    folder: str
    config_path: str  # of a GGUF file itself
    config: dict[str, Any]  # of a GGUF file its metadata
    weights: list[str]  # paths
    format: Literal["meta", "hugging face", "gguf"]  # llama_3.loading.READERS has one for each


def find_checkpoint(model_dir: str) -> Checkpoint:
    """The files of a Llama folder of any format, or of a GGUF file. Raises InputError when there is none."""
    model_dir = str(model_dir)
    names = sorted(blobfile.listdir(model_dir)) if blobfile.isdir(model_dir) else []
    for find in (_find_hugging_face, _find_meta, _find_gguf):
        if found := find(model_dir, names):
            return found
    inside = lambda name: blobfile.join(model_dir, name)
    if "config.json" in names:
        raise InputError(f"There is no model*.safetensors beside {inside('config.json')}; fetch the weights as well.")
    if "consolidated.00.pth" in names:
        raise InputError(f"There is no params.json beside {inside('consolidated.00.pth')}; fetch it as well.")
    raise InputError(
        f"There is no model at {model_dir}: neither params.json (Meta's format) nor config.json (Hugging Face's) nor a "
        ".gguf file is there; name a Llama folder, or fetch one with fetch_model.py."
    )


def _find_hugging_face(model_dir: str, names: list[str]) -> Checkpoint | None:
    inside = lambda name: blobfile.join(model_dir, name)
    weights = [name for name in names if re.fullmatch(r"model.*\.safetensors", name)]
    index = "model.safetensors.index.json"
    if "params.json" in names or "config.json" not in names or not (weights or index in names):
        return None
    if index in names:
        try:
            weights = sorted(set(read_json(inside(index))["weight_map"].values()))
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{inside(index)} is not an index of tensors; fetch it again.") from None
    path = inside("config.json")
    return Checkpoint(model_dir, path, read_json(path), [inside(name) for name in weights], "hugging face")


def _find_meta(model_dir: str, names: list[str]) -> Checkpoint | None:
    """In the folder itself, or in the `original/` of Meta's repositories."""
    for folder in (model_dir, blobfile.join(model_dir, "original")):
        path = blobfile.join(folder, "params.json")
        if blobfile.exists(path):
            params = read_json(path)
            if blobfile.exists(blobfile.join(folder, "consolidated.01.pth")):
                raise InputError(f"{folder} is split for several GPUs; name a Hugging Face folder of the same model.")
            return Checkpoint(folder, path, params, [blobfile.join(folder, "consolidated.00.pth")], "meta")
    return None


def _find_gguf(model_dir: str, _names: list[str]) -> Checkpoint | None:
    if (path := gguf_path(model_dir)) is None:
        return None
    from llama_3.gguf import read_gguf

    return Checkpoint(blobfile.dirname(path), path, read_gguf(path).metadata, [path], "gguf")


def gguf_path(model_dir: str) -> str | None:
    """The GGUF file that is meant: `model_dir` itself, or the only one of a folder without another format.

    Raises InputError where there are several.
    """
    if model_dir.endswith(".gguf"):
        return model_dir
    names = sorted(blobfile.listdir(model_dir)) if blobfile.isdir(model_dir) else []
    found = [name for name in names if name.endswith(".gguf")]
    if not found or {"config.json", "params.json"} & set(names):
        return None
    if len(found) > 1:
        raise InputError(f"{model_dir} holds several GGUF files ({', '.join(found)}); name one of them.")
    return blobfile.join(model_dir, found[0])


def read_json(path: str) -> dict[str, Any]:
    try:
        with blobfile.BlobFile(path, "r") as file:
            return dict(json.load(file))
    except (TypeError, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error!r}); fetch it again.") from None


def check_files(paths: Sequence[str]) -> None:
    for path in paths:
        if not blobfile.exists(path):
            raise InputError(f"There is no {blobfile.basename(path)} in {blobfile.dirname(path)}; fetch it as well.")
        with blobfile.BlobFile(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise InputError(f"{path} is a Git LFS pointer, not the weights; run git lfs pull in its folder.")


def checkpoint_identity(model_dir: str) -> dict[str, Any]:
    """What tells one checkpoint from another without reading all of it (`sample_sha256`).

    `name` is the folder's, or the GGUF file's without its ending.
    """
    found = find_checkpoint(model_dir)
    check_files(found.weights)
    if found.format == "gguf":
        params = json.dumps({name: found.config[name] for name in sorted(found.config) if name.startswith("llama.")})
    else:
        params = blobfile.read_text(found.config_path)
    return {
        "name": blobfile.basename(str(model_dir).rstrip("/")).removesuffix(".gguf"),
        "params_sha256": hashlib.sha256(params.encode()).hexdigest(),
        "weights_bytes": sum(blobfile.stat(path).size for path in found.weights),
        "weights_sha256": sample_sha256(found.weights),
    }


def differing_field(known: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """The first field in which two identities differ; None if they are of the same checkpoint.

    The folder's name does not count, nor does a field that only one of them has: older files have fewer.
    """
    both = sorted((known.keys() & found.keys()) - {"name"})
    return next((name for name in both if known[name] != found[name]), None)


def sample_sha256(paths: Sequence[str], pieces: int = 64, piece_bytes: int = 2**16) -> str:
    """A checksum of `pieces` evenly spread parts of each file, its beginning and its end among them.

    Two trainings of one model differ nearly everywhere, so a sample tells them apart; all of 16 GB would take a minute.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = blobfile.stat(path).size
        with blobfile.BlobFile(path, "rb") as file:
            for i in range(pieces):
                file.seek(max(0, size - piece_bytes) * i // (pieces - 1))
                digest.update(file.read(piece_bytes))
    return digest.hexdigest()
