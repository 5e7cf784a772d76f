"""Where activations come from: one record, written by capture_activations.py and carried along to the SAE.

    source = Source.read(manifest, folder / MANIFEST)   # of activations, of batches, or of NAME.json
    source.model_dir(given=config.model_dir)             # the model's folder, compared with the one that was captured
    source.sentences(given=config.sentences_dir)         # the sentences, likewise
    json |= source.as_json(path)                         # into the next manifest

Folders are stored relative to the file that names them, so that a data folder can be moved as a whole, and as absolute
paths, for folders elsewhere. Identities are checksums: a different model or different sentences of the same name are
refused.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_3.checkpoint import checkpoint_identity, differing_field
from pipeline.dialogues import open_dataset
from pipeline.errors import InputError
from pipeline.files import PROJECT_DIR
from pipeline.sentences import SHUFFLE_SEED, SentenceDataset

_FOLDERS = ("model_dir", "sentences_dir", "activations_dir")


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known of the activations' origin; None for what the file does not state.

    `folders` lists where model_dir, sentences_dir and activations_dir may be now, likeliest first.
    """

    file: str  # the manifest or JSON that states all this, for messages
    folders: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] | None = None  # identity of the checkpoint (llama_3.checkpoint.checkpoint_identity)
    documents: dict[str, Any] | None = None  # identity of the documents the sentences are from
    dataset: dict[str, Any] | None = None  # sentences captured, sentences_in_all, seed, checksums of their shards
    activations: str | None = None  # checksum of the captured shards' checksums: which run of capture
    site: str | None = None
    layer: int | None = None
    d_model: int | None = None
    begin_of_text: bool | None = None  # whether each sentence came after begin-of-text
    bos_id: int | None = None
    max_tokens: int | None = None  # longer sentences were cut there
    rope_scaling_factor: float | None = None

    @classmethod
    def read(cls, info: Mapping[str, Any], file: str | Path) -> "Source":
        """The origin that a manifest or NAME.json (`info`, read from `file`) states."""
        folders = {name: _candidates(info, name, str(file)) for name in _FOLDERS if info.get(name)}
        return cls(str(file), folders, **{name: info[name] for name in _field_names() if name in info})

    def as_json(self, file: str | Path) -> dict[str, Any]:
        """The record for a JSON file to be written at `file`; unknown fields are left out."""
        record = {name: getattr(self, name) for name in _field_names() if getattr(self, name) is not None}
        places = {name: _first_that_exists(candidates) for name, candidates in self.folders.items()}
        absolute = {name: place for name, place in places.items() if not _is_remote(place)}
        return {**record, **{name: _relative(place, str(file)) for name, place in places.items()}, "absolute": absolute}

    def with_folder(self, name: str, folder: str | Path) -> "Source":
        """A copy with one folder, for example activations_dir, set to `folder`."""
        return dataclasses.replace(self, folders={**self.folders, name: [_absolute(folder)]})

    def need(self, name: str) -> Any:
        """A field. Raises InputError if the file does not state it."""
        if (value := getattr(self, name)) is None:
            raise InputError(
                f"{self.file} does not state {name}; name an SAE or data that a stage of this project wrote."
            )
        return value

    def folder(self, name: str, given: str | None, option: str) -> str:
        """A folder: the one `given` by the option, else the one the file names. Raises InputError if there is none."""
        if given:
            return given
        candidates = self.folders.get(name, [])
        if not candidates:
            raise InputError(f"{self.file} does not state {name}; name the folder with {option}.")
        found = _first_that_exists(candidates)
        if not _exists(found):
            raise InputError(f"{self.file} has {name} = {found}, which no longer exists; name it with {option}.")
        return found

    def model_dir(self, given: str | None = None, option: str = "--llama_model_dir") -> str:
        """The model's folder. Raises InputError if it is not the model that was captured."""
        folder = self.folder("model_dir", given, option)
        self.check_model(folder, option)
        return folder

    def check_model(self, folder: str, option: str) -> None:
        """Raise InputError if the checkpoint in `folder` is not the one that was captured."""
        if self.model is None:
            return
        found = checkpoint_identity(folder)
        if name := differing_field(self.model, found):
            raise InputError(
                f"{folder} is not the model of {self.file}: {name} is {found[name]} instead of {self.model[name]}; "
                f"name that model's folder with {option}."
            )

    def sentences(self, given: str | None = None, option: str = "--sentences_dir") -> SentenceDataset:
        """The sentences that were captured, in the same order. Raises InputError if the folder holds others."""
        dataset = self.need("dataset")
        folder = self.folder("sentences_dir", given, option)
        found = open_dataset(folder, dataset.get("sentences"), dataset.get("seed", SHUFFLE_SEED))
        n_found, n_known = len(found.order), dataset.get("sentences_in_all", len(found.order))
        if n_found != n_known:
            raise InputError(
                f"{folder} holds {n_found} sentences, but {self.file} is of {n_known}; name their folder with {option}."
            )
        known, shards = dataset.get("shards"), found.shard_checksums()
        if known and shards and shards != known:
            raise InputError(
                f"{folder} does not hold the sentences of {self.file} (their checksums differ); name their folder with "
                f"{option}."
            )
        return found


def _field_names() -> list[str]:
    """The fields that are stored in the JSON unchanged."""
    return [field.name for field in dataclasses.fields(Source) if field.name not in ("file", "folders")]


# ---- folders


def _candidates(info: Mapping[str, Any], name: str, file: str) -> list[str]:
    """Where a folder that `file` names may be: relative to that file, then at its old absolute path.

    Older files have no absolute path; their path is relative to the working directory or the project's.
    """
    stored = info[name]
    if _is_remote(stored):
        return [stored]
    beside = [] if _is_remote(file) else [_absolute(Path(file).resolve().parent / stored)]
    if absolute := info.get("absolute", {}).get(name):
        return [*beside, absolute]
    return [*beside, _absolute(stored), _absolute(PROJECT_DIR / stored)]


def _relative(place: str, file: str) -> str:
    """The place as seen from the file's folder; links are resolved, since `..` starts from where they point."""
    if _is_remote(place) or _is_remote(file):
        return place
    return Path(os.path.relpath(os.path.realpath(place), Path(file).resolve().parent)).as_posix()


def _first_that_exists(candidates: list[str]) -> str:
    """The first that exists, or else the last: where the folder used to be."""
    return next(filter(_exists, candidates), candidates[-1])


def _exists(path: str) -> bool:
    return _is_remote(path) or Path(path).exists()


def _absolute(path: str | Path) -> str:
    return str(path) if _is_remote(str(path)) else os.path.abspath(path)


def _is_remote(path: str) -> bool:
    return path.startswith(("gs://", "az://"))
