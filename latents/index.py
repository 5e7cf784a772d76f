"""What is known about an SAE's latents, from the files beside it: a list to search and sort, and a card per latent.

Reads   NAME.json, NAME.latents.parquet, NAME.top.parquet, NAME.promoted.parquet, NAME.steering.parquet,
        NAME.meaning_*.yaml with their .scores.parquet; each may be missing. The embedded SAE's meanings are in
        latent_index_meaning/. Its top sentences belong to other projects' documentation: NAME.top_places.parquet says
        where to find them in packages that every installation has, and the activations are computed when a card is
        opened
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from embedded.places import text_at
from latents.cards import Card, CardSentence
from latents.interesting import interesting_latents
from latents.meanings import Meaning, best_meanings
from latents.origin import read_info, source_of, tokenizer_of
from latents.tables import LATENTS, PROMOTED, STEERING, TOP, Aggregation, Table, TopFile
from llama_3 import load_model
from llama_3.model import Transformer
from llama_3.tokenizer import TextStream, Tokenizer
from pipeline.documents import arrow_file
from pipeline.errors import InputError
from pipeline.sae_files import SaeFiles
from sae import SparseAutoencoder, load_sae_model

# Orders of the list; all but interesting (latents/interesting.py) and latent: highest first.
Sort = Literal["interesting", "score", "output_score", "certainty", "frequency", "latent"]
SORTS: tuple[Sort, ...] = get_args(Sort)

T = TypeVar("T")

_AGGREGATION: Aggregation = "max"  # whose top sentences a card shows
_OPTION = "the page's --llama_model_dir"  # with which a user gives the model's folder
_PROMOTED = ("tokens", "scores"), ("suppressed_tokens", "suppressed_scores")


class _Given(NamedTuple):
    """What the caller has already loaded."""

    tokenizer: Tokenizer | None
    model: Transformer | None
    sae: SparseAutoencoder | None


class LatentIndex:
    """An SAE's latents. A missing or broken file leaves fields empty; for each, `missing` says which script writes it.

    Columns, numpy arrays of n_latents: meaning (None where there is none), certainty, score, output_score, frequency,
    mean, highest (nan where unknown), steers_well (False where unknown). The tokenizer and, for the embedded SAE, the
    model are loaded as NAME.json says unless given.
    Raises InputError if nothing tells how many latents there are.
    """

    def __init__(
        self,
        sae_path: str | Path,
        tokenizer: Tokenizer | None = None,
        model: Transformer | None = None,
        sae: SparseAutoencoder | None = None,
    ):
        self.sae_path, self.files = sae_path, SaeFiles(sae_path)
        self.missing: list[str] = []
        self.info = self._unless_broken(lambda: read_info(sae_path)) or {}
        self._given = _Given(tokenizer, model, sae)
        self._latents = self._read(LATENTS, LATENTS.schema.names)
        self.n_latents = self._count_latents()
        self._latents = self._of_this_sae(LATENTS, self._latents)
        self._promoted = self._of_this_sae(PROMOTED, self._read_promoted())
        scores = self._of_this_sae(STEERING, self._read(STEERING, STEERING.schema.names))
        self._top, self._places = self._open_sentences()
        meanings = self._best_meanings()
        self.meaning = np.full(self.n_latents, None, dtype=object)
        self.certainty, self.score = np.full(self.n_latents, np.nan), np.full(self.n_latents, np.nan)
        for latent, meaning in meanings.items():
            self.meaning[latent], self.certainty[latent] = meaning.text, meaning.certainty
            self.score[latent] = np.nan if meaning.score is None else meaning.score
        self.frequency, self.mean, self.highest = (self._column(name) for name in ("frequency", "mean", "max"))
        self.output_score, self.steers_well = np.full(self.n_latents, np.nan), np.zeros(self.n_latents, dtype=bool)
        if scores is not None:
            self.output_score = scores["output_score"].to_numpy().astype(np.float64)
            self.steers_well = scores["steers_well"].to_numpy()
        self._lower = [(text or "").lower() for text in self.meaning]
        self._orders: dict[Sort, np.ndarray] = {}

    # ---- the files

    def _unless_broken(self, read: Callable[[], T]) -> T | None:
        """What `read` gives, or None and a line in `missing`."""
        try:
            return read()
        except InputError as error:
            if str(error) not in self.missing:
                self.missing.append(str(error))
            return None

    def _is_there(self, table: Table) -> bool:
        path = self.files.beside(table.suffix)
        if not path.exists():
            self.missing.append(f"No {path.name} ({table.holds}): {table.made_by} writes it.")
        return path.exists()

    def _read(self, table: Table, columns: list[str]) -> pa.Table | None:
        """A table beside the SAE, or None and a line in `missing`."""
        path = self.files.beside(table.suffix)
        return self._unless_broken(lambda: table.read(path, columns)) if self._is_there(table) else None

    def _read_promoted(self) -> pa.Table | None:
        """NAME.promoted.parquet; older ones lack the suppressed tokens."""
        path = self.files.beside(PROMOTED.suffix)
        if not self._is_there(PROMOTED):
            return None
        file = self._unless_broken(lambda: PROMOTED.open(path, ["latent"]))
        if file is None:
            return None
        columns = [name for name in PROMOTED.schema.names if name in file.schema_arrow.names]
        return self._unless_broken(lambda: PROMOTED.checked(path, lambda: file.read(columns=columns)))

    def _of_this_sae(self, table: Table, rows: pa.Table | None) -> pa.Table | None:
        """The rows, or None and a line in `missing` where they are not those of latents 0 to n_latents - 1."""
        if rows is None or np.array_equal(rows["latent"].to_numpy(), np.arange(self.n_latents)):
            return rows
        self.missing.append(
            f"{self.files.beside(table.suffix)} has {len(rows)} latents, {self.sae_path} {self.n_latents}; run "
            f"{table.made_by} again."
        )
        return None

    def _open_sentences(self) -> tuple[TopFile | None, pa.Table | None]:
        """NAME.top.parquet, or for the embedded SAE, which has none, NAME.top_places.parquet."""
        top, places = self.files.beside(TOP.suffix), self.files.beside("top_places.parquet")
        if places.is_file() and not top.exists():
            try:
                return None, pq.ParquetFile(arrow_file(places)).read()
            except (pa.ArrowException, OSError) as error:
                self.missing.append(f"{places} cannot be read ({' '.join(str(error).split())}); fetch it again.")
                return None, None
        return (self._unless_broken(lambda: TopFile(top)) if self._is_there(TOP) else None), None

    def _best_meanings(self) -> dict[int, Meaning]:
        n_before = len(self.missing)
        meanings = best_meanings(self.sae_path, self.n_latents, self.missing)
        if len(self.missing) > n_before:
            return meanings
        if not meanings:
            self.missing.append(
                f"No meanings beside {self.sae_path}: interpret_top_sentences_parse_responses.py (Claude's answers) "
                "or interpret_top_sentences_distinctive_words.py (without a model) writes them."
            )
        elif all(meaning.score is None for meaning in meanings.values()):
            self.missing.append(f"No scores of the meanings of {self.sae_path}: score_interpretations.py writes them.")
        return meanings

    def _count_latents(self) -> int:
        """By the SAE, else NAME.json, else the table."""
        if self._given.sae:
            return self._given.sae.n_latents
        n = self.info.get("n_latents", 0 if self._latents is None else len(self._latents))
        if type(n) is not int or n < 1:
            why = "".join(f" {line}" for line in self.missing)
            raise InputError(
                f"Nothing beside {self.sae_path} says how many latents it has; give its JSON or the SAE.{why}"
            )
        return n

    def _column(self, name: str) -> np.ndarray:
        """A column of NAME.latents.parquet in float64; nan if there is no such file."""
        if self._latents is None:
            return np.full(self.n_latents, np.nan)
        return self._latents[name].to_numpy().astype(np.float64)

    # ---- the list

    def search(
        self, query: str = "", sort: Sort = "interesting", limit: int = 50, offset: int = 0, living_only: bool = True
    ) -> list[dict]:
        """Latents whose meaning contains all words of the query, ignoring case; a latent named by number comes first.

        Then come meanings that have them as whole words, then as beginnings of words ("sea" in "seaside"), then as
        parts ("research"), each in the order asked for. Rows: latent, meaning, certainty, score, output_score,
        frequency, highest (None where unknown), steers_well. A latent that fired on no captured token is left out
        unless living_only is False or the query is its number.
        """
        matches, number = self._matches(query, living_only)
        order = self._order(sort)
        found = order[matches[order]]
        if words := query.lower().split():
            ranks = [match_rank(self._lower[latent], words) for latent in found]
            found = found[np.argsort(ranks, kind="stable")]
        if number is not None:
            found = np.concatenate([[number], found[found != number]])
        return [self._row(int(latent)) for latent in found[offset : offset + limit]]

    def count(self, query: str = "", living_only: bool = True) -> int:
        """How many latents `search` finds in all."""
        return int(self._matches(query, living_only)[0].sum())

    def _matches(self, query: str, living_only: bool) -> tuple[np.ndarray, int | None]:
        """(n_latents,) bool; and the latent, if the query is its number."""
        matches = ~(self.frequency == 0) if living_only else np.ones(self.n_latents, dtype=bool)  # unknown is not dead
        for word in query.lower().split():
            matches &= np.fromiter((word in text for text in self._lower), bool, self.n_latents)
        text = query.strip()
        number = int(text) if text.isascii() and text.isdigit() and int(text) < self.n_latents else None
        if number is not None:
            matches[number] = True
        return matches, number

    def _order(self, sort: Sort) -> np.ndarray:
        """Latents in this order; unknown values come last, ties go to the better score, then to the lower latent."""
        if sort not in SORTS:
            raise ValueError(f"{sort!r} is not one of {SORTS}")
        if sort not in self._orders:
            self._orders[sort] = self._interesting_first() if sort == "interesting" else self._by(sort)
        return self._orders[sort]

    def _by(self, column: str) -> np.ndarray:
        keys = [np.arange(self.n_latents)]
        if column != "latent":
            keys += [-np.nan_to_num(getattr(self, name), nan=-1.0) for name in ("certainty", "score", column)]
        return np.lexsort(keys)

    def _interesting_first(self) -> np.ndarray:
        first = np.array(interesting_latents(self), dtype=np.int64)
        others = self._order("score")
        return np.concatenate([first, others[~np.isin(others, first)]])

    def _row(self, latent: int) -> dict:
        names = ("certainty", "score", "output_score", "frequency", "highest")
        numbers = {name: float(getattr(self, name)[latent]) for name in names}
        known = {name: None if math.isnan(value) else value for name, value in numbers.items()}
        steers_well = bool(self.steers_well[latent])
        return {"latent": latent, "meaning": self.meaning[latent], **known, "steers_well": steers_well}

    def meaning_of(self, latent: int) -> str | None:
        return self.meaning.item(latent)

    # ---- cards

    def card(self, latent: int, n_sentences: int = 10) -> Card:
        """Everything known about a latent. Raises InputError if there is no such latent."""
        if not 0 <= latent < self.n_latents:
            raise InputError(f"There is no latent {latent}: {self.sae_path} has 0 to {self.n_latents - 1}.")
        tenths, co_firing = [], []
        if self._latents is not None:
            row = self._latents.slice(latent, 1).to_pylist()[0]
            tenths = row["sentences_by_tenth"]
            pairs = zip(row["cofiring_latents"], row["cofiring_jaccard"], strict=True)
            co_firing = [(other, self.meaning_of(other), jaccard) for other, jaccard in pairs]
        promoted, suppressed = self._promoted_and_suppressed(latent)
        return Card(
            latent,
            meaning=self.meaning_of(latent),
            certainty=float(self.certainty[latent]),
            score=float(self.score[latent]),
            output_score=float(self.output_score[latent]),
            steers_well=bool(self.steers_well[latent]),
            frequency=float(self.frequency[latent]),
            mean=float(self.mean[latent]),
            highest=float(self.highest[latent]),
            sentences_by_tenth=tenths,
            sentences=self._sentences(latent, n_sentences),
            promoted=promoted,
            suppressed=suppressed,
            co_firing=co_firing,
        )

    def _promoted_and_suppressed(self, latent: int) -> list[list[tuple[str, float]]]:
        if self._promoted is None:
            return [[], []]
        row = self._promoted.slice(latent, 1).to_pylist()[0]
        return [list(zip(row.get(tokens, []), row.get(scores, []), strict=False)) for tokens, scores in _PROMOTED]

    def _sentences(self, latent: int, n: int) -> list[CardSentence]:
        """Its n strongest sentences, no text twice."""
        if self._tokenizer is None:
            return []
        if self._places is not None:
            return self._sentences_at_places(self._places, self._tokenizer, latent, n)
        found: dict[tuple[int, ...], CardSentence] = {}
        top = self._top
        for sentence in (top and self._unless_broken(lambda: top.sentences(latent, _AGGREGATION))) or []:
            ids = tuple(sentence.token_ids)
            if len(found) < n and ids not in found:
                activations = [float(a) for a in sentence.token_activations]
                found[ids] = CardSentence(pieces(self._tokenizer, ids), activations, sentence.activation)
        return list(found.values())

    def _sentences_at_places(self, places: pa.Table, tokenizer: Tokenizer, latent: int, n: int) -> list[CardSentence]:
        """The sentences that NAME.top_places.parquet points to; those that differ in this installation are left out."""
        found = []
        model, sae = self._model_and_sae
        for row in places.filter(pc.field("latent") == latent).sort_by("rank").slice(0, n).to_pylist():
            text = text_at(row)
            if text is None:
                continue
            ids = tokenizer.encode(text)[: self.info["max_tokens"]]
            with torch.inference_mode():
                tokens = torch.tensor([ids], device=model.device)
                values, indices = sae.encode(model.activations(tokens, self.info["site"])[0])
            activations = (values * (indices == latent)).sum(1).tolist()
            found.append(CardSentence(pieces(tokenizer, ids), activations, max(activations)))
        return found

    # ---- the model

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        if self._given.tokenizer is not None:
            return self._given.tokenizer
        try:
            return tokenizer_of(source_of(self.sae_path), None, _OPTION)
        except InputError as error:
            self.missing.append(f"No sentences without the model's tokenizer: {error}")
            return None

    @cached_property
    def _model_and_sae(self) -> tuple[Transformer, SparseAutoencoder]:
        model = self._given.model or load_model(source_of(self.sae_path).model_dir(option=_OPTION))
        return model, self._given.sae or load_sae_model(self.sae_path, model.device)


def match_rank(text: str, words: Sequence[str]) -> int:
    """0 if all words stand in the text as whole words, 1 if all at least begin a word, 2 otherwise; both lower case."""
    rank = 0
    for word in words:
        begins = rf"(?<![\w…]){re.escape(word)}"  # "…sea" names a part of a word
        rank = max(rank, 0 if re.search(rf"{begins}(?![\w…])", text) else 1 if re.search(begins, text) else 2)
    return rank


def pieces(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    """The text of each token, in whole characters: one split over several tokens is with the last."""
    stream = TextStream(tokenizer)
    texts = [stream.add(token) for token in token_ids]
    if texts:
        texts[-1] += stream.end()
    return texts
