"""What latents mean: files MEANING.yaml, latent -> {certainty, common_semantic}, most certain first.

Beside each there may be MEANING.scores.parquet: how well a meaning alone tells where its latent fires.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import yaml

from latents.tables import Table
from llama_3.checkpoint import TINY_LLAMA_DIR
from pipeline.errors import InputError
from pipeline.files import PROJECT_DIR, atomic_path
from pipeline.sae_files import SaeFiles

SCORES = Table(
    "scores.parquet",
    "score_interpretations.py",
    "scores",
    pa.schema(
        {
            "latent": pa.int32(),
            "balanced_accuracy": pa.float32(),
            "shuffled": pa.float32(),  # of another latent's meaning; null where it was not tried
            "sentences": pa.int32(),
        }
    ),
)
_GUESS = 0.5  # balanced accuracy of a guess


class Meaning(NamedTuple):
    text: str  # what the sentences have in common; `common_semantic` in the file
    certainty: float  # from 0 to 1, stated by whoever gave it
    score: float | None = None  # balanced accuracy on sentences it was not found from; None if not scored


class Score(NamedTuple):
    """A row of MEANING.scores.parquet; SCORES describes the fields."""

    latent: int
    balanced_accuracy: float
    shuffled: float | None
    sentences: int


def is_embedded(sae_path: str | Path) -> bool:
    """Whether this is the reference SAE of the embedded model."""
    return Path(sae_path).resolve() == Path(TINY_LLAMA_DIR, "sae.pth").resolve()


def write_meanings(path: Path, meanings: dict[int, Meaning]) -> None:
    """Write a YAML of meanings, most certain first, ties by latent."""
    in_order = sorted(meanings.items(), key=lambda item: (-item[1].certainty, item[0]))
    entries = {latent: {"certainty": m.certainty, "common_semantic": m.text} for latent, m in in_order}
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        yaml.dump(entries, file, Dumper=dumper, sort_keys=False, allow_unicode=True, width=1000)


def read_meanings(
    path: Path, fix: str = "correct it or make it again.", n_latents: int | None = None
) -> dict[int, Meaning]:
    """The meanings of one file, without their scores. Entries whose text is null or empty are skipped.

    Raises InputError, ending in `fix`, for a file that is missing or has anything but meanings, and for one that names
    a latent beyond n_latents.
    """
    try:
        entries = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
        found = {_latent(key): _meaning(key, entry) for key, entry in entries.items()}
    except FileNotFoundError:
        raise InputError(f"There is no {path}; {fix}") from None
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} holds no meanings of latents ({' '.join(str(error).split())}); {fix}") from None
    if n_latents is not None and (highest := max(found, default=0)) >= n_latents:
        raise InputError(f"{path} names latent {highest} of {n_latents}; it belongs to another SAE.")
    return {latent: meaning for latent, meaning in found.items() if meaning is not None}


def _latent(key: Any) -> int:
    if (type(key) is int and key >= 0) or (isinstance(key, str) and key.isascii() and key.isdigit()):
        return int(key)
    raise ValueError(f"{key!r} is not the number of a latent")


def _meaning(key: Any, entry: Mapping[str, Any]) -> Meaning | None:
    text, certainty = entry["common_semantic"], entry["certainty"]
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    if not isinstance(text, str):  # YAML reads no, 1e3 and 2024-01-01 as other types
        raise ValueError(f"the meaning of latent {key} is {text!r}, not a text; put it in quotes")
    if isinstance(certainty, bool) or not 0 <= float(certainty) <= 1:
        raise ValueError(f"the certainty of latent {key} is {certainty!r}, not a number from 0 to 1")
    return Meaning(text, float(certainty))


def scores_path(meaning_path: Path) -> Path:
    return meaning_path.with_suffix(f".{SCORES.suffix}")


def write_scores(meaning_path: Path, scores: Sequence[Score]) -> None:
    columns = zip(*scores, strict=True)
    SCORES.write(scores_path(meaning_path), dict(zip(Score._fields, columns, strict=True)))


def read_scores(meaning_path: Path, named: Container[int]) -> dict[int, float]:
    """The balanced accuracy of each latent's meaning; empty if none is scored.

    Raises InputError for a broken file, and for scores of latents that are not named.
    """
    path = scores_path(meaning_path)
    if not path.exists():
        return {}
    columns = ["latent", "balanced_accuracy"]
    table = SCORES.read(path, columns)
    scores = dict(zip(*(table[name].to_pylist() for name in columns), strict=True))
    for latent, score in scores.items():
        if latent not in named:
            raise InputError(
                f"{path} scores latent {latent}, which {meaning_path.name} does not name; run {SCORES.made_by} again."
            )
        if not 0 <= score <= 1:
            raise InputError(f"{path} gives latent {latent} the score {score}; run {SCORES.made_by} again.")
    return scores


def best_meanings(
    sae_path: str | Path, n_latents: int | None = None, unusable: list[str] | None = None
) -> dict[int, Meaning]:
    """Each latent's best meaning in the files beside the SAE: by score, then by certainty.

    A meaning without a score counts as a guess, so a score worse than guessing ranks below it. A broken file, or one
    that names latents beyond n_latents, is left out, with a line in `unusable`; without that list it raises InputError.
    """
    if is_embedded(sae_path):
        paths = sorted((PROJECT_DIR / "latent_index_meaning").glob("*.yaml"))
    else:
        paths = SaeFiles(sae_path).meanings()
    rank = lambda meaning: (_GUESS if meaning.score is None else meaning.score, meaning.certainty)
    best: dict[int, Meaning] = {}
    for path in paths:
        meanings = _unless_broken(lambda path=path: read_meanings(path, n_latents=n_latents), unusable)
        scores = (
            _unless_broken(lambda path=path, named=meanings: read_scores(path, named), unusable) if meanings else {}
        )
        for latent, meaning in meanings.items():
            meaning = meaning._replace(score=scores.get(latent))
            if latent not in best or rank(meaning) > rank(best[latent]):
                best[latent] = meaning
    return best


def _unless_broken(read: Callable[[], dict[int, Any]], unusable: list[str] | None) -> dict[int, Any]:
    try:
        return read()
    except InputError as error:
        if unusable is None:
            raise
        unusable.append(str(error))
        return {}
