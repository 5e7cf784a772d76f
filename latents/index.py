"""What is known of an SAE's latents, found by name beside it: a list to search and sort, and a card for each latent.

Reads   NAME.json, NAME.latents.parquet, NAME.top.parquet, NAME.promoted.parquet, NAME.meaning_*.yaml with their
        .scores.parquet; each may be missing. The embedded SAE's meanings stand in latent_index_meaning/. Its top
        sentences belong to other projects' documentation: NAME.top_places.parquet says where they stand in the packages
        that every installation has, and the activations are computed when a card is opened
"""

import math
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from embedded.places import text_at
from latents.cards import Card, Sentence
from latents.meanings import best_meanings, is_embedded
from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import TINY_LLAMA_DIR
from llama_3.model import Transformer
from llama_3.tokenizer import TextStream, Tokenizer
from pipeline.errors import InputError
from pipeline.files import read_json
from pipeline.sae_files import SaeFiles
from sae import TopKSparseAutoencoder, load_sae_model

SORTS = ("certainty", "score", "frequency", "latent")  # orders of the list; latent: lowest first, else highest first

_AGGREGATION = "max"  # whose top sentences a card shows


# ---- meanings


# ---- the index


class LatentIndex:
    """An SAE's latents. A missing file makes missing fields; `missing` says in a line each which script makes it.

    Columns, numpy arrays of n_latents: meaning (None where there is none), certainty, score, frequency, highest (nan
    where unknown). The tokenizer, and for the embedded SAE the model, are loaded when not given, as NAME.json says.
    Raises InputError where nothing tells how many latents there are, and for a broken file.
    """

    def __init__(
        self,
        sae_path: str | Path,
        tokenizer: "Tokenizer | None" = None,
        model: "Transformer | None" = None,
        sae: "TopKSparseAutoencoder | None" = None,
    ):

        self.sae_path = sae_path
        self.missing: list[str] = []
        self._given = (tokenizer, model, sae)
        json_path = SaeFiles(sae_path).beside("json")
        self.info: dict[str, Any] = read_json(json_path, "train the SAE anew.") if json_path.is_file() else {}
        latents = self._table("latents.parquet", "capture_top_activating_sentences.py", "frequencies, companions")
        self._latents = latents and latents.read()
        self._promoted_file = self._table("promoted.parquet", "promoted_tokens.py", "promoted tokens")
        self._top = self._places = None
        if (
            SaeFiles(sae_path).beside("top_places.parquet").is_file()
            and not SaeFiles(sae_path).beside("top.parquet").is_file()
        ):
            self._places = self._table("top_places.parquet", "", "").read()
        else:
            self._top = self._table("top.parquet", "capture_top_activating_sentences.py", "sentences")
        self._group: tuple[int, Any] = (-1, None)  # the row group of NAME.top.parquet read last
        self._reading = threading.Lock()  # a page's users may open cards at once

        meanings = best_meanings(sae_path)
        if not meanings:
            self.missing.append(
                f"No meanings beside {sae_path}: interpret_top_sentences_parse_responses.py (answers of Claude) or "
                "interpret_top_sentences_distinctive_words.py (no model asked) makes them."
            )
        elif all(meaning.score is None for meaning in meanings.values()):
            self.missing.append(f"No scores of the meanings of {sae_path}: score_interpretations.py makes them.")
        if sae is not None:
            self.n_latents = sae.n_latents
        elif self._latents is not None:
            self.n_latents = len(self._latents)
        elif "n_latents" in self.info:
            self.n_latents = self.info["n_latents"]
        else:
            raise InputError(f"Nothing beside {sae_path} says how many latents it has; give its JSON or the SAE.")
        n = self.n_latents
        if self._latents is not None and len(self._latents) != n:
            raise InputError(
                f"{SaeFiles(sae_path).beside('latents.parquet')} has {len(self._latents)} latents, {sae_path} {n}; run "
                "capture_top_activating_sentences.py again."
            )
        if meanings and max(meanings) >= n:
            raise InputError(
                f"A meaning file of {sae_path} names latent {max(meanings)} of {n}; it belongs to another SAE."
            )
        self.meaning = np.full(n, None, dtype=object)
        self.certainty, self.score = np.full(n, np.nan), np.full(n, np.nan)
        for latent, meaning in meanings.items():
            self.meaning[latent], self.certainty[latent] = meaning.text, meaning.certainty
            self.score[latent] = np.nan if meaning.score is None else meaning.score
        columns = ("frequency", "mean", "max")
        self.frequency, self.mean, self.highest = (
            np.full(n, np.nan) if self._latents is None else self._latents[name].to_numpy().astype(np.float64)
            for name in columns
        )
        self._lower = pa.array([(text or "").lower() for text in self.meaning], pa.string())
        self._orders: dict[str, np.ndarray] = {}

    def _table(self, suffix: str, made_by: str, what: str) -> Any:
        """The parquet file beside the SAE, or None and a line in `missing`."""

        path = SaeFiles(self.sae_path).beside(suffix)
        if not path.is_file():
            self.missing.append(f"No {path.name} ({what}): {made_by} makes it.")
            return None
        try:
            return pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{path} cannot be read ({' '.join(str(error).split())}); make it again.") from None

    # ---- the list

    def search(
        self, query: str = "", sort: str = "certainty", limit: int = 50, offset: int = 0, living_only: bool = True
    ) -> list[dict]:
        """Latents whose meaning holds all words of the query, whatever the case; first the one whose number it is.

        Rows: latent, meaning, certainty, score, frequency, highest; None where unknown. A latent that fired on no
        captured token is left out unless living_only is False or it is asked for by number.
        """
        matches, number = self._matches(query, living_only)
        order = self._order(sort)
        found = order[matches[order]]
        if number is not None:
            found = np.concatenate([[number], found[found != number]])
        return [self._row(int(latent)) for latent in found[offset : offset + limit]]

    def count(self, query: str = "", living_only: bool = True) -> int:
        """How many latents `search` finds in all."""
        return int(self._matches(query, living_only)[0].sum())

    def _matches(self, query: str, living_only: bool) -> tuple[np.ndarray, int | None]:
        """(n_latents,) bool, and the latent whose number the query is."""

        matches = ~(self.frequency == 0) if living_only else np.ones(self.n_latents, dtype=bool)  # unknown is not dead
        for word in query.lower().split():
            matches &= pc.match_substring(self._lower, word).to_numpy(zero_copy_only=False)
        text = query.strip()
        number = int(text) if text.isascii() and text.isdigit() and int(text) < self.n_latents else None
        if number is not None:
            matches[number] = True
        return matches, number

    def _order(self, sort: str) -> np.ndarray:
        """Latents in this order; what is unknown comes last, ties go to the better score, then to the lower latent."""
        if sort not in SORTS:
            raise ValueError(f"{sort!r} is none of {SORTS}")
        if sort not in self._orders:
            keys = [np.arange(self.n_latents)]
            if sort != "latent":
                keys += [-np.nan_to_num(getattr(self, name), nan=-1.0) for name in ("certainty", "score", sort)]
            self._orders[sort] = np.lexsort(keys)
        return self._orders[sort]

    def _row(self, latent: int) -> dict:
        numbers = {name: float(getattr(self, name)[latent]) for name in ("certainty", "score", "frequency", "highest")}
        known = {name: None if math.isnan(value) else value for name, value in numbers.items()}
        return {"latent": latent, "meaning": self.meaning[latent], **known}

    def meaning_of(self, latent: int) -> str | None:
        return self.meaning[latent]

    # ---- cards

    def card(self, latent: int, n_sentences: int = 10) -> Card:
        """Everything known of a latent. Raises InputError when there is no such latent."""
        if not 0 <= latent < self.n_latents:
            raise InputError(f"There is no latent {latent}: {self.sae_path} has 0 to {self.n_latents - 1}.")
        tenths, co_firing = [], []
        if self._latents is not None:
            row = self._latents.slice(latent, 1).to_pylist()[0]
            tenths = row["sentences_by_tenth"]
            pairs = zip(row["cofiring_latents"], row["cofiring_jaccard"], strict=True)
            co_firing = [(other, self.meaning[other], jaccard) for other, jaccard in pairs]
        promoted, suppressed = self._promoted_and_suppressed(latent)
        return Card(
            latent,
            self.meaning[latent],
            float(self.certainty[latent]),
            float(self.score[latent]),
            float(self.frequency[latent]),
            float(self.mean[latent]),
            float(self.highest[latent]),
            tenths,
            self._sentences(latent, n_sentences),
            promoted,
            suppressed,
            co_firing,
        )

    @cached_property
    def _promoted(self) -> Any:
        return self._promoted_file.read()

    def _promoted_and_suppressed(self, latent: int) -> tuple[list, list]:
        if self._promoted_file is None:
            return [], []
        row = self._promoted.slice(latent, 1).to_pylist()[0]
        pairs = lambda tokens, scores: list(zip(row.get(tokens, []), row.get(scores, []), strict=True))
        return pairs("tokens", "scores"), pairs("suppressed_tokens", "suppressed_scores")

    def _sentences(self, latent: int, n: int) -> list[Sentence]:
        if self._places is not None:
            return self._from_places(latent, n)
        if self._top is None or self._tokenizer is None:
            return []
        found: dict[tuple, Sentence] = {}
        for row in self._top_rows(latent):
            if len(found) < n and (ids := tuple(row["token_ids"])) not in found:
                activations = [float(a) for a in row["token_activations"]]
                found[ids] = Sentence(pieces(self._tokenizer, ids), activations, row["activation"])
        return list(found.values())

    def _top_rows(self, latent: int) -> list[dict]:
        """The latent's rows of NAME.top.parquet by the highest token, best first.

        The table is sorted by latent, so its rows lie in one row group or two neighbours, found by their statistics.
        """

        wanted = (pc.field("latent") == latent) & (pc.field("aggregation") == _AGGREGATION)
        parts = []
        for number in range(self._top.num_row_groups):
            statistics = self._top.metadata.row_group(number).column(0).statistics
            if statistics is not None and not statistics.min <= latent <= statistics.max:
                continue
            with self._reading:
                if self._group[0] != number:
                    columns = ["latent", "aggregation", "rank", "activation", "token_ids", "token_activations"]
                    self._group = (number, self._top.read_row_group(number, columns=columns))
                parts.append(self._group[1].filter(wanted))
        return pa.concat_tables(parts).sort_by("rank").to_pylist() if parts else []

    @cached_property
    def _tokenizer(self) -> "Tokenizer | None":

        if self._given[0] is not None:
            return self._given[0]
        try:
            return load_tokenizer(self._model_dir())
        except InputError as error:
            self.missing.append(f"No sentences without the model's tokenizer: {error}")
            return None

    def _model_dir(self) -> str:

        if is_embedded(self.sae_path):
            return TINY_LLAMA_DIR
        if "model_dir" not in self.info:
            raise InputError(f"{self.sae_path} has no JSON that names its model; give the tokenizer.")
        return self.info["model_dir"]

    @cached_property
    def _model_and_sae(self) -> tuple["Transformer", "TopKSparseAutoencoder"]:

        _, model, sae = self._given
        model = model or load_model(self._model_dir())
        return model, sae or load_sae_model(self.sae_path, model.device)

    def _from_places(self, latent: int, n: int) -> list[Sentence]:
        """The latent's sentences that NAME.top_places.parquet points at; those that differ here are left out."""

        found = []
        model, sae = self._model_and_sae
        for row in self._places.filter(pc.field("latent") == latent).sort_by("rank").slice(0, n).to_pylist():
            text = text_at(row)
            if text is None:
                continue
            ids = self._tokenizer.encode(text)[: self.info["max_tokens"]]
            with torch.inference_mode():
                tokens = torch.tensor([ids], device=model.device)
                values, indices = sae.encode(model.activations(tokens, self.info["site"])[0])
            activations = (values * (indices == latent)).sum(1).tolist()
            found.append(Sentence(pieces(self._tokenizer, ids), activations, max(activations)))
        return found


def pieces(tokenizer: "Tokenizer", token_ids: Sequence[int]) -> list[str]:
    """The text of each token, in whole characters: one spread over several tokens stands at its last one."""

    stream = TextStream(tokenizer)
    texts = [stream.add(token) for token in token_ids]
    if texts:
        texts[-1] += stream.end()
    return texts


# ---- HTML
