"""Where activations come from: one record, written by capture_activations.py and carried whole to the SAE.

    source = Source.read(manifest, folder / MANIFEST)   # of activations, of batches, or of NAME.json
    source.model_dir(given=config.model_dir)             # the model's folder, compared with the one that was captured
    source.sentences(given=config.sentences_dir)         # the sentences, likewise
    json |= source.as_json(path)                         # into the next manifest

Folders are stored relative to the file that names them, so that a data folder can be moved as a whole, and as the
absolute path they had, for what lies elsewhere. Identities are checksums: a model or sentences of the same name that
are not those that were captured are named in a sentence.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_3.checkpoint import checkpoint_identity
from pipeline.errors import InputError
from pipeline.sentences import SentenceDataset

_FOLDERS = ("model_dir", "sentences_dir", "activations_dir")


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known of the activations' origin. None: the file does not say.

    `folders` holds, for model_dir, sentences_dir and activations_dir, where each may lie now, likeliest first.
    """

    file: str  # the manifest or JSON that says all this, for messages
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
        folders = {name: _candidates(info, name, Path(file).parent) for name in _FOLDERS if info.get(name)}
        fields = {field.name for field in dataclasses.fields(cls)} - {"file", "folders"}
        return cls(str(file), folders, **{name: info[name] for name in fields if name in info})

    def as_json(self, file: str | Path) -> dict[str, Any]:
        """The record for a JSON file that will lie at `file`; what is not known is left out."""
        fields = [field.name for field in dataclasses.fields(self) if field.name not in ("file", "folders")]
        record = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        places = {name: _first_that_exists(candidates) for name, candidates in self.folders.items()}
        base = Path(file).resolve().parent
        relative = {n: p if _is_remote(p) else Path(os.path.relpath(p, base)).as_posix() for n, p in places.items()}
        absolute = {n: p for n, p in places.items() if not _is_remote(p)}
        return {**record, **relative, "absolute": absolute}

    def with_folder(self, name: str, folder: str | Path) -> "Source":
        """The same with one folder, for example activations_dir, as given."""
        return dataclasses.replace(self, folders={**self.folders, name: [_absolute(folder)]})

    def need(self, name: str) -> Any:
        """A field. Raises InputError where the file does not say it."""
        if (value := getattr(self, name)) is None:
            raise InputError(
                f"{self.file} does not say {name}; name an SAE or data that a stage of this project wrote."
            )
        return value

    def folder(self, name: str, given: str | None, option: str) -> str:
        """A folder: the one `given` by the option, else where the file says. Raises InputError where there is none."""
        if given:
            return given
        candidates = self.folders.get(name, [])
        if not candidates:
            raise InputError(f"{self.file} does not say {name}; name the folder with {option}.")
        found = _first_that_exists(candidates)
        if not _is_remote(found) and not Path(found).exists():
            raise InputError(f"{self.file} says {name} {found}, where there is nothing now; name it with {option}.")
        return found

    def model_dir(self, given: str | None = None, option: str = "--llama_model_dir") -> str:
        """The folder of the model, once it is known to be the one that was captured. Raises InputError."""
        folder = self.folder("model_dir", given, option)
        self.check_model(folder, option)
        return folder

    def check_model(self, folder: str, option: str) -> None:
        """Raise InputError where the checkpoint in `folder` is not the one that was captured."""
        if self.model is None:
            return
        found = checkpoint_identity(folder)
        for name in sorted((self.model.keys() & found.keys()) - {"name"}):
            if self.model[name] != found[name]:
                raise InputError(
                    f"{folder} is not the model that {self.file} is of ({name} is {found[name]}, there it is "
                    f"{self.model[name]}); name that model's folder with {option}."
                )

    def sentences(self, given: str | None = None, option: str = "--sentences_dir") -> SentenceDataset:
        """The sentences that were captured, in the same order. Raises InputError where they are others."""
        dataset = self.need("dataset")
        found = SentenceDataset(
            self.folder("sentences_dir", given, option), dataset.get("sentences"), dataset.get("seed", 42)
        )
        known, shards = dataset.get("shards"), found.shard_checksums()
        in_all = dataset.get("sentences_in_all", len(found.order))
        if len(found.order) != in_all or (known and shards and shards != known):
            raise InputError(
                f"{found.folder} has {len(found.order)} sentences, and not those of {self.file}, which is of {in_all}; "
                f"name those with {option}."
            )
        return found


def _candidates(info: Mapping[str, Any], name: str, base: Path) -> list[str]:
    """Where a folder may lie: relative to the file that names it, where it was, relative to the working directory
    (older files)."""
    stored = info[name]
    if _is_remote(stored):
        return [stored]
    absolute = info.get("absolute", {}).get(name)
    return [_absolute(base / stored), *([absolute] if absolute else []), _absolute(stored)]


def _first_that_exists(candidates: list[str]) -> str:
    return next((path for path in candidates if _is_remote(path) or Path(path).exists()), candidates[0])


def _absolute(path: str | Path) -> str:
    return str(path) if _is_remote(str(path)) else os.path.abspath(path)


def _is_remote(path: str) -> bool:
    return str(path).startswith(("gs://", "az://"))
