"""What is known of an SAE's latents, found by name beside it: a list to search and sort, and a card for each latent.

Reads   NAME.json, NAME.latents.parquet, NAME.top.parquet, NAME.promoted.parquet, NAME.meaning_*.yaml with their
        .scores.parquet; each may be missing. The embedded SAE's meanings stand in latent_index_meaning/. Its top
        sentences belong to other projects' documentation: NAME.top_places.parquet says where they stand in the packages
        that every installation has, and the activations are computed when a card is opened
"""

import html
import math
import threading
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import stage

if TYPE_CHECKING:
    from llama_3.model import Transformer
    from llama_3.tokenizer import Tokenizer
    from sae import TopKSparseAutoencoder

SORTS = ("certainty", "score", "frequency", "latent")  # orders of the list; latent: lowest first, else highest first

_AGGREGATION = "max"  # whose top sentences a card shows
_N_PLACES = 5  # sentences a latent in NAME.top_places.parquet
_GUESS = 0.5  # balanced accuracy of a guess


class Meaning(NamedTuple):
    text: str
    certainty: float
    score: float | None  # balanced accuracy on sentences the meaning was not found by; None where not scored


class Sentence(NamedTuple):
    """A sentence as the model read it."""

    tokens: list[str]  # joined they are the text; a character of several tokens stands at its last one
    activations: list[float]  # of the latent on each token, normalised space
    activation: float  # the highest of them


class Card(NamedTuple):
    """A latent. None, nan or an empty list where a file is missing (LatentIndex.missing)."""

    latent: int
    meaning: str | None
    certainty: float
    score: float  # balanced accuracy of the meaning
    frequency: float  # share of tokens it fires on
    mean: float  # activation where it fires, normalised space
    highest: float  # observed activation
    sentences_by_tenth: list[int]  # sentences by their highest activation, in tenths of the range, weakest first
    sentences: list[Sentence]  # strongest first, the same text once
    promoted: list[tuple[str, float]]  # tokens, and their logits in standard deviations over the vocabulary
    suppressed: list[tuple[str, float]]
    co_firing: list[tuple[int, str | None, float]]  # latent, meaning, Jaccard index


# ---- meanings


def is_embedded(sae_path: str | Path) -> bool:
    """Whether this is the reference SAE of the embedded model."""
    from llama_3.loading import TINY_LLAMA_DIR

    return Path(sae_path).resolve() == Path(TINY_LLAMA_DIR, "sae.pth").resolve()


def read_meanings(sae_path: str | Path) -> dict[int, Meaning]:
    """Each latent's best meaning of all that lie beside the SAE: the best scored, then the most certain.

    A meaning without a score counts as a guess, with one below a guess behind it. Raises InputError for a broken file.
    """
    from sae import beside

    if is_embedded(sae_path):
        paths = sorted((stage.PROJECT_DIR / "latent_index_meaning").glob("*.yaml"))
    else:
        prefix = beside(sae_path, "meaning_")
        paths = sorted(prefix.parent.glob(f"{prefix.name}*.yaml"))
    rank = lambda meaning: (_GUESS if meaning.score is None else meaning.score, meaning.certainty)
    best: dict[int, Meaning] = {}
    for path in paths:
        for latent, meaning in _read_meaning_file(path).items():
            if latent not in best or rank(meaning) > rank(best[latent]):
                best[latent] = meaning
    return best


def _read_meaning_file(path: Path) -> dict[int, Meaning]:
    import pyarrow.parquet as pq
    import yaml

    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
        fields = [(int(i), str(entry["common_semantic"]), float(entry["certainty"])) for i, entry in entries.items()]
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise stage.InputError(f"{path} holds no meanings of latents ({_line(error)}); make it again.") from None
    scores: dict[int, float] = {}
    scores_path = path.with_name(path.stem + ".scores.parquet")
    if scores_path.is_file():
        table = pq.ParquetFile(scores_path).read(columns=["latent", "balanced_accuracy"])
        scores = dict(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return {latent: Meaning(text, certainty, scores.get(latent)) for latent, text, certainty in fields}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


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
        import pyarrow as pa

        from sae import beside

        self.sae_path = sae_path
        self.missing: list[str] = []
        self._given = (tokenizer, model, sae)
        json_path = beside(sae_path, "json")
        self.info: dict[str, Any] = stage.read_json(json_path, "train the SAE anew.") if json_path.is_file() else {}
        latents = self._table("latents.parquet", "capture_top_activating_sentences.py", "frequencies, companions")
        self._latents = latents and latents.read()
        self._promoted_file = self._table("promoted.parquet", "promoted_tokens.py", "promoted tokens")
        self._top = self._places = None
        if beside(sae_path, "top_places.parquet").is_file() and not beside(sae_path, "top.parquet").is_file():
            self._places = self._table("top_places.parquet", "", "").read()
        else:
            self._top = self._table("top.parquet", "capture_top_activating_sentences.py", "sentences")
        self._group: tuple[int, Any] = (-1, None)  # the row group of NAME.top.parquet read last
        self._reading = threading.Lock()  # a page's users may open cards at once

        meanings = read_meanings(sae_path)
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
            raise stage.InputError(f"Nothing beside {sae_path} says how many latents it has; give its JSON or the SAE.")
        n = self.n_latents
        if self._latents is not None and len(self._latents) != n:
            raise stage.InputError(
                f"{beside(sae_path, 'latents.parquet')} has {len(self._latents)} latents, {sae_path} {n}; run "
                "capture_top_activating_sentences.py again."
            )
        if meanings and max(meanings) >= n:
            raise stage.InputError(
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
        import pyarrow as pa
        import pyarrow.parquet as pq

        from sae import beside

        path = beside(self.sae_path, suffix)
        if not path.is_file():
            self.missing.append(f"No {path.name} ({what}): {made_by} makes it.")
            return None
        try:
            return pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise stage.InputError(f"{path} cannot be read ({_line(error)}); make it again.") from None

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
        import pyarrow.compute as pc

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
            raise stage.InputError(f"There is no latent {latent}: {self.sae_path} has 0 to {self.n_latents - 1}.")
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
        import pyarrow as pa
        import pyarrow.compute as pc

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
        from llama_3 import load_tokenizer

        if self._given[0] is not None:
            return self._given[0]
        try:
            return load_tokenizer(self._model_dir())
        except stage.InputError as error:
            self.missing.append(f"No sentences without the model's tokenizer: {error}")
            return None

    def _model_dir(self) -> str:
        from llama_3.loading import TINY_LLAMA_DIR

        if is_embedded(self.sae_path):
            return TINY_LLAMA_DIR
        if "model_dir" not in self.info:
            raise stage.InputError(f"{self.sae_path} has no JSON that names its model; give the tokenizer.")
        return self.info["model_dir"]

    @cached_property
    def _model_and_sae(self) -> tuple["Transformer", "TopKSparseAutoencoder"]:
        from llama_3 import load_model
        from sae import load_sae_model

        _, model, sae = self._given
        model = model or load_model(self._model_dir())
        return model, sae or load_sae_model(self.sae_path, model.device)

    def _from_places(self, latent: int, n: int) -> list[Sentence]:
        """The latent's sentences that NAME.top_places.parquet points at; those that differ here are left out."""
        import pyarrow.compute as pc
        import torch

        from documentation_corpus import read_source

        found = []
        model, sae = self._model_and_sae
        for row in self._places.filter(pc.field("latent") == latent).sort_by("rank").slice(0, n).to_pylist():
            paragraphs = read_source(row["source"])
            if row["paragraph"] >= len(paragraphs):
                continue
            text = paragraphs[row["paragraph"]][row["start"] : row["start"] + row["length"]]
            if checksum(text) != row["checksum"]:
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
    from llama_3.tokenizer import TextStream

    stream = TextStream(tokenizer)
    texts = [stream.add(token) for token in token_ids]
    if texts:
        texts[-1] += stream.end()
    return texts


# ---- places


def checksum(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", errors="surrogatepass"))


def write_places(
    top_path: str | Path, sentences_dir: str | Path, documents_dir: str | Path, out_path: str | Path
) -> None:
    """Write where the strongest sentences of NAME.top.parquet stand in the installed documentation, not their text.

    Columns: latent, rank, activation, source and paragraph (of documentation_corpus.read_source), start, length (in
    characters), checksum. A sentence over several paragraphs is left out, the same text stands once a latent.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from documentation_corpus import read_source
    from openwebtext_sentences_dataset import SentenceDataset

    dataset = SentenceDataset(sentences_dir)
    files = [dataset.folder / shard["file"] for shard in dataset.manifest["shards"]]
    spans = pa.concat_tables(pq.ParquetFile(path).read(columns=["doc_idx", "start"]) for path in files)
    doc_idx, starts = (spans[name].to_numpy() for name in ("doc_idx", "start"))
    documents = pq.ParquetFile(Path(documents_dir, "documents.parquet")).read(columns=["text", "source"])
    top = pq.ParquetFile(top_path).read(columns=["latent", "rank", "activation", "sentence_idx", "aggregation", "text"])
    top = top.filter(pc.field("aggregation") == _AGGREGATION).sort_by([("latent", "ascending"), ("rank", "ascending")])
    paragraphs: dict[str, dict[str, int]] = {}  # source -> paragraph -> number
    rows: dict[int, dict[int, dict]] = {}  # latent -> checksum -> row
    for row in stage.progress(top.to_pylist(), unit="sentence", desc="places"):
        places, text = rows.setdefault(row["latent"], {}), row["text"]
        if len(places) == _N_PLACES or checksum(text) in places:
            continue
        place = int(dataset.order[row["sentence_idx"]])
        document, source = (documents[name][int(doc_idx[place])].as_py() for name in ("text", "source"))
        if source not in paragraphs:
            paragraphs[source] = {p: number for number, p in reversed(list(enumerate(read_source(source))))}
        before, _, _ = document[: int(starts[place])].rpartition("\n\n")
        start = int(starts[place]) - (len(before) + 2 if before else 0)
        paragraph = document[int(starts[place]) - start :].partition("\n\n")[0]
        number = paragraphs[source].get(paragraph)
        if number is not None and paragraph[start : start + len(text)] == text:
            place = {"source": source, "paragraph": number, "start": start, "length": len(text)}
            row = {name: row[name] for name in ("latent", "activation")}
            places[checksum(text)] = {**row, "rank": len(places), **place, "checksum": checksum(text)}
    types = {"latent": pa.int32(), "rank": pa.int8(), "activation": pa.float32(), "source": pa.string()}
    types |= {"paragraph": pa.int32(), "start": pa.int32(), "length": pa.int32(), "checksum": pa.uint32()}
    table = pa.Table.from_pylist([place for of in rows.values() for place in of.values()], schema=pa.schema(types))
    with stage.atomic_path(out_path) as temporary:
        pq.write_table(table, temporary, compression="zstd", compression_level=19, use_dictionary=True)
    print(f"{len(table):,} places of {len(rows):,} latents' sentences: {out_path}")


# ---- HTML

# Colours are shares of the text's colour and of one orange over what stands behind: they read on white and on black.
CARD_CSS = """
.latent-card { border: 1px solid color-mix(in srgb, currentColor 16%, transparent); border-radius: 10px;
  padding: 1em 1.15em; line-height: 1.5; overflow-wrap: anywhere; }
.latent-card h3 { margin: 0; font-size: 1.15em; line-height: 1.3; }
.latent-card h3 .latent-number { opacity: .55; font-weight: 400; margin-right: .35em; }
.latent-card h4 { margin: 1em 0 .3em; font-size: .78em; font-weight: 600; letter-spacing: .03em; opacity: .65; }
.latent-card ol, .latent-card ul { margin: 0; padding: 0; list-style: none; }
.latent-card a { color: inherit; text-decoration: underline; text-decoration-color: rgb(240 120 0 / .8);
  text-underline-offset: .2em; }
.latent-facts { display: flex; flex-wrap: wrap; gap: .1em 1.3em; margin: .35em 0 0; font-size: .86em; }
.latent-facts div { display: flex; gap: .4em; }
.latent-facts dt { opacity: .65; }
.latent-facts dd { margin: 0; font-variant-numeric: tabular-nums; }
.latent-sentences li { padding: .4em 0 .4em 3.4em; position: relative; font-size: .95em;
  border-top: 1px solid color-mix(in srgb, currentColor 9%, transparent); }
.latent-sentences li:first-child { border-top: 0; }
.latent-sentences .latent-value { position: absolute; left: 0; opacity: .6; font-size: .86em;
  font-variant-numeric: tabular-nums; }
.latent-tokens { white-space: pre-wrap; }
.latent-tokens span { background: rgb(255 136 0 / calc(.08 + .5 * var(--a))); border-radius: .2em; padding: .1em 0; }
.latent-lists { display: flex; flex-wrap: wrap; gap: 0 1.4em; }
.latent-lists > div { flex: 1 1 8.5em; min-width: 0; }
.latent-lists > .latent-strength { flex-basis: 10em; }
.latent-lists > .latent-together { flex: 2 1 12em; }
.latent-lists li { display: flex; justify-content: space-between; gap: .8em; font-size: .88em; padding: .08em 0; }
.latent-lists li > :last-child { opacity: .6; font-variant-numeric: tabular-nums; }
.latent-lists code { white-space: pre; font-size: .95em; padding: 0 .25em; border-radius: .2em; overflow: hidden;
  text-overflow: ellipsis; background: color-mix(in srgb, currentColor 7%, transparent); }
.latent-tenths { display: block; width: 100%; max-width: 20em; height: 5.2em; }
.latent-tenths rect { fill: rgb(240 120 0 / .75); }
.latent-tenths text { fill: currentColor; font-size: 9px; opacity: .7; text-anchor: middle; }
.latent-tenths .first { text-anchor: start; } .latent-tenths .last { text-anchor: end; }
.latent-tenths line { stroke: currentColor; opacity: .3; }
.latent-none { opacity: .6; font-style: italic; margin: 0; font-size: .9em; }
"""


def tokens_html(tokens: Sequence[str], activations: Sequence[float], highest: float) -> str:
    """A sentence coloured by activation: the deeper, the nearer to `highest`. CARD_CSS has the colours."""
    parts = []
    for token, activation in zip(tokens, activations, strict=True):
        if not (activation > 0 and token):
            parts.append(html.escape(token))
            continue
        depth = min(1.0, activation / highest) if highest > 0 else 1.0
        word = token.lstrip() or token  # the space before a word is not coloured
        parts.append(html.escape(token[: len(token) - len(word)]))
        parts.append(f'<span style="--a:{depth:.2f}" title="{activation:.3g}">{html.escape(word)}</span>')
    return f'<span class="latent-tokens">{"".join(parts)}</span>'


def card_html(card: Card, href: Callable[[int], str | None] = lambda latent: None) -> str:
    """A card as a fragment of a page that has CARD_CSS. href: a latent's address, for links from card to card."""
    facts = [
        ("certainty", card.certainty, "{:.2f}", "of the meaning, as its giver says"),
        ("score", card.score, "{:.2f}", "balanced accuracy of the meaning on other sentences; a guess has 0.50"),
        ("fires on", 100 * card.frequency, "{:.3g} % of tokens", "among the tokens captured"),
        ("mean", card.mean, "{:.2f}", "activation where it fires, normalised space"),
        ("highest", card.highest, "{:.2f}", "activation observed, normalised space"),
    ]
    known = [
        f'<div title="{about}"><dt>{name}</dt><dd>{form.format(value)}</dd></div>'
        for name, value, form, about in facts
        if not math.isnan(value)
    ]
    title = '<span class="latent-none">no meaning</span>' if card.meaning is None else html.escape(card.meaning)
    parts = [
        f'<article class="latent-card" data-latent="{card.latent}">',
        f'<h3><span class="latent-number">{card.latent}</span>{title}</h3>',
        f'<dl class="latent-facts">{"".join(known)}</dl>',
        "<h4>Sentences that activate it most</h4>",
        _sentences_html(card),
        '<div class="latent-lists">',
    ]
    if card.sentences_by_tenth:
        parts.append(f'<div class="latent-strength"><h4>Sentences by strength</h4>{tenths_svg(card)}</div>')
    for name, pairs in (("Makes the model say", card.promoted), ("Keeps it from saying", card.suppressed)):
        if pairs:
            rows = (f"<li><code>{_visible(token)}</code><span>{value:+.1f}</span></li>" for token, value in pairs)
            parts.append(f"<div><h4>{name}</h4><ul>{''.join(rows)}</ul></div>")
    if card.co_firing:
        rows = "".join(
            f"<li>{_named(other, of, href(other))}<span>{share:.0%}</span></li>" for other, of, share in card.co_firing
        )
        parts.append(f'<div class="latent-together"><h4>Fires together with</h4><ul>{rows}</ul></div>')
    return "".join(parts) + "</div></article>"


def _sentences_html(card: Card) -> str:
    if not card.sentences:
        return '<p class="latent-none">none known</p>'
    highest = max(s.activation for s in card.sentences) if math.isnan(card.highest) else card.highest
    rows = (
        f'<li><span class="latent-value">{s.activation:.2f}</span>{tokens_html(s.tokens, s.activations, highest)}</li>'
        for s in card.sentences
    )
    return f'<ol class="latent-sentences">{"".join(rows)}</ol>'


def _visible(token: str) -> str:
    """A token with its spaces, line breaks and control characters made visible."""
    signs = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5"}
    shown = (signs.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in token)
    return html.escape("".join(shown)) or "\u2205"


def _named(latent: int, meaning: str | None, address: str | None) -> str:
    text = f"{latent} {html.escape(meaning or '')}".rstrip()
    return f'<a href="{html.escape(address)}">{text}</a>' if address else f"<span>{text}</span>"


def tenths_svg(card: Card) -> str:
    """How many sentences have their highest activation in each tenth of the latent's range; log scale."""
    counts = card.sentences_by_tenth
    top = math.log1p(max(max(counts), 1))
    bars = []
    for i, count in enumerate(counts):
        height = 44 * math.log1p(count) / top
        where = f"{i / len(counts):.0%} to {(i + 1) / len(counts):.0%} of its highest"
        bars.append(
            f'<rect x="{20 * i + 2}" y="{58 - height:.1f}" width="16" height="{height:.1f}" rx="1.5">'
            f"<title>{where}: {count:,} sentences</title></rect>"
            f'<text x="{20 * i + 10}" y="{55 - height:.1f}">{_short(count)}</text>'
        )
    axis = '<line x1="0" x2="200" y1="58" y2="58"/><text class="first" x="0" y="69">weak</text>'
    axis += '<text class="last" x="200" y="69">strong</text>'
    about = 'class="latent-tenths" viewBox="0 0 200 72" preserveAspectRatio="xMinYMid" role="img"'
    return f"<svg {about}>{''.join(bars)}{axis}</svg>"


def _short(count: int) -> str:
    """A count in at most four characters; nothing for 0."""
    if count < 1000:
        return str(count) if count else ""
    for unit in ("k", "M", "G"):
        count /= 1000
        if count < 999.5:
            return f"{count:.1f}{unit}" if count < 9.95 else f"{count:.0f}{unit}"
    return f"{count:.0f}G"
