"""What latents mean: files MEANING.yaml, latent -> {certainty, common_semantic}, most certain first.

Beside each there may be MEANING.scores.parquet: how well a meaning alone tells where its latent fires.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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


def read_meanings(path: Path, fix: str = "make it again.") -> dict[int, Meaning]:
    """The meanings of one file, with their scores if there are any.

    Raises InputError, ending in `fix`, for a file that is missing or has no meanings.
    """
    try:
        entries = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
        fields = [(int(i), str(entry["common_semantic"]), float(entry["certainty"])) for i, entry in entries.items()]
    except FileNotFoundError:
        raise InputError(f"There is no {path}; {fix}") from None
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} holds no meanings of latents ({' '.join(str(error).split())}); {fix}") from None
    scores = read_scores(path)
    return {latent: Meaning(text, certainty, scores.get(latent)) for latent, text, certainty in fields}


def scores_path(meaning_path: Path) -> Path:
    return meaning_path.with_suffix(f".{SCORES.suffix}")


def write_scores(meaning_path: Path, scores: Sequence[Score]) -> None:
    columns = zip(*scores, strict=True)
    SCORES.write(scores_path(meaning_path), dict(zip(Score._fields, columns, strict=True)))


def read_scores(meaning_path: Path) -> dict[int, float]:
    """The balanced accuracy of each latent's meaning; empty if none is scored."""
    path = scores_path(meaning_path)
    if not path.is_file():
        return {}
    columns = ["latent", "balanced_accuracy"]
    table = SCORES.open(path, columns).read(columns=columns)
    return dict(zip(*(table[name].to_pylist() for name in columns), strict=True))


def best_meanings(sae_path: str | Path) -> dict[int, Meaning]:
    """Each latent's best meaning in the files beside the SAE: by score, then by certainty.

    A meaning without a score counts as a guess, so a score worse than guessing ranks below it. Raises InputError for a
    broken file.
    """
    if is_embedded(sae_path):
        paths = sorted((PROJECT_DIR / "latent_index_meaning").glob("*.yaml"))
    else:
        paths = SaeFiles(sae_path).meanings()
    rank = lambda meaning: (_GUESS if meaning.score is None else meaning.score, meaning.certainty)
    best: dict[int, Meaning] = {}
    for path in paths:
        for latent, meaning in read_meanings(path).items():
            if latent not in best or rank(meaning) > rank(best[latent]):
                best[latent] = meaning
    return best
