"""A model's files, their format, and which model they contain. Needs no torch."""

import functools
import hashlib
import json
import re
import sys
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
    found = preferred_files(str(model_dir))
    if found is None:
        names = _names(str(model_dir))
        if "consolidated.00.pth" in names:
            path = blobfile.join(str(model_dir), "consolidated.00.pth")
            raise InputError(f"There is no params.json beside {path}; fetch it as well.")
        raise InputError(
            f"There is no model at {model_dir}: neither params.json (Meta's format) nor config.json (Hugging Face's) "
            "nor a .gguf file is there; name a Llama folder, or fetch one with fetch_model.py."
        )
    if not found.weights:
        if any(re.fullmatch(r"pytorch_model.*\.bin", name) for name in _names(found.folder)):
            raise InputError(
                f"{found.folder} holds its weights in pytorch_model*.bin, which are not read here; fetch them as "
                "model*.safetensors, or write those with save_pretrained of transformers."
            )
        raise InputError(f"There is no model*.safetensors beside {found.config_path}; fetch the weights as well.")
    if found.format == "gguf":
        from llama_3.gguf import read_gguf

        return found._replace(config=read_gguf(found.config_path).metadata)
    return found._replace(config=read_json(found.config_path))


def preferred_files(model_dir: str) -> Checkpoint | None:
    """The format of a folder that is whole, else the one of which most is there; its config is not read yet.

    Raises InputError where its files are several models, or parts of one that are not read.
    """
    finders = (_find_meta, _find_hugging_face, _find_original, _find_gguf)
    found = [files for find in finders if (files := find(model_dir, _names(model_dir)))]
    if not found:
        return None
    best = max(found, key=_share_there)
    if best.format == "meta" and len(best.weights) > 1:
        raise InputError(f"{best.folder} is split for several GPUs; name a Hugging Face folder of the same model.")
    if best.format == "gguf":
        _check_gguf(best)
    return best


def _names(folder: str) -> list[str]:
    return sorted(blobfile.listdir(folder)) if blobfile.isdir(folder) else []


def _share_there(files: Checkpoint) -> float:
    if files.format == "meta" and len(files.weights) > 1:  # split for several GPUs
        return 0.0
    return sum(map(blobfile.exists, files.weights)) / max(1, len(files.weights))


def _find_meta(folder: str, names: list[str]) -> Checkpoint | None:
    if "params.json" not in names:
        return None
    weights = sorted({"consolidated.00.pth", *(n for n in names if re.fullmatch(r"consolidated\.\d\d\.pth", n))})
    path = blobfile.join(folder, "params.json")
    return Checkpoint(folder, path, {}, [blobfile.join(folder, name) for name in weights], "meta")


def _find_original(model_dir: str, _names_there: list[str]) -> Checkpoint | None:
    """The `original/` of Meta's repositories."""
    folder = blobfile.join(model_dir, "original")
    return _find_meta(folder, _names(folder))


def _find_hugging_face(model_dir: str, names: list[str]) -> Checkpoint | None:
    if "config.json" not in names:
        return None
    index = "model.safetensors.index.json"
    weights = [name for name in names if re.fullmatch(r"model.*\.safetensors", name)]
    if index in names:
        path = blobfile.join(model_dir, index)
        try:
            weights = sorted(set(read_json(path)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is not an index of tensors; fetch it again.") from None
    path = blobfile.join(model_dir, "config.json")
    return Checkpoint(
        model_dir, path, {}, [blobfile.join(model_dir, name) for name in with_siblings(weights)], "hugging face"
    )


def _find_gguf(model_dir: str, names: list[str]) -> Checkpoint | None:
    if model_dir.endswith(".gguf"):
        return Checkpoint(blobfile.dirname(model_dir), model_dir, {}, [model_dir], "gguf")
    paths = [blobfile.join(model_dir, name) for name in names if name.endswith(".gguf")]
    return Checkpoint(model_dir, paths[0], {}, paths, "gguf") if paths else None


def _check_gguf(found: Checkpoint) -> None:
    names = [blobfile.basename(path) for path in found.weights]
    parts = with_siblings(names[:1])
    if len(parts) > 1 and set(names) <= set(parts):
        check_files([blobfile.join(found.folder, name) for name in parts])
        raise InputError(
            f"{found.config_path} is one part of a split model; join the parts with llama-gguf-split --merge."
        )
    if len(names) > 1:
        raise InputError(f"{found.folder} holds several GGUF files ({', '.join(names)}); name one of them.")
    if blobfile.exists(found.config_path):
        check_files(found.weights)


def with_siblings(names: list[str]) -> list[str]:
    """File names, and those of the shards that belong to them: model-00001-of-00002.safetensors names a second."""
    parts = [re.fullmatch(r"(.*-)\d{5}-of-(\d{5})(\.\w+)", name) for name in names]
    siblings = {f"{p[1]}{i + 1:05}-of-{p[2]}{p[3]}" for p in parts if p for i in range(int(p[2]))}
    return sorted({*names, *siblings})


def read_json(path: str) -> dict[str, Any]:
    try:
        with blobfile.BlobFile(path, "rb") as file:
            return dict(json.loads(file.read()))  # bytes may start with a byte order mark
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error!r}); fetch it again.") from None


def check_files(paths: Sequence[str]) -> None:
    for path in paths:
        if not blobfile.exists(path):
            raise InputError(f"There is no {blobfile.basename(path)} in {blobfile.dirname(path)}; fetch it as well.")
        try:
            with blobfile.BlobFile(path, "rb") as file:
                begin = file.read(len(LFS_POINTER))
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror or error}).") from None
        if begin == LFS_POINTER:
            raise InputError(f"{path} is a Git LFS pointer, not the weights; run git lfs pull in its folder.")


def checkpoint_identity(model_dir: str) -> dict[str, Any]:
    """What tells one checkpoint from another without reading all of it (`sample_sha256`).

    `name` is `model_name`'s.
    """
    found = find_checkpoint(model_dir)
    check_files(found.weights)
    if found.format == "gguf":
        params = json.dumps({name: found.config[name] for name in sorted(found.config) if name.startswith("llama.")})
    else:
        params = blobfile.read_text(found.config_path)
    return {
        "name": model_name(model_dir),
        "params_sha256": hashlib.sha256(params.encode()).hexdigest(),
        "weights_bytes": sum(blobfile.stat(path).size for path in found.weights),
        "weights_sha256": sample_sha256(found.weights),
    }


def model_name(model_dir: str) -> str:
    """What a model is called: a folder's name, a GGUF file's without its quantisation. Raises InputError for no model.

    Not what the files themselves say: SmolLM2-135M-Instruct's GGUF calls itself "Smollm2 135M 8k Lc100K Mix1 Ep2", and
    a fine-tuned model's config.json often names the model it began as.
    """
    found = find_checkpoint(model_dir)
    if found.format == "gguf":
        stem = blobfile.basename(found.config_path).removesuffix(".gguf")
        name = re.sub(r"[.\-_](i?q\d\w*|bf16|f16|f32)$", "", stem, flags=re.IGNORECASE)
        is_any_model = name.lower() in ("", "model", "ggml-model")
        return str(found.config.get("general.name", stem)) if is_any_model else name
    if cached := re.search(r"/models--[^/]+?--([^/]+)/snapshots/[^/]+/*$", str(model_dir)):  # the hub's cache
        return cached[1]
    return blobfile.basename(str(model_dir).rstrip("/"))


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


@functools.cache
def say(sentence: str) -> None:
    """Print what was assumed, once in a process."""
    print(sentence, file=sys.stderr, flush=True)
