"""What Claude is asked about a latent."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from claude.requests import Respondent
from latents.tables import Aggregation, top_sentences
from pipeline.errors import InputError
from pipeline.progress import progress_bar

_PROMPT = """\
A language model reads text token by token. Inside it one direction was found, called a latent, that switches on for \
some texts and stays silent for others. Below are the {n} sentences {how}, strongest first{marks}. The model reads \
from left to right: at each token it knows that token and what stands before it, nothing after it. Line breaks inside \
a sentence are written \\n.

<sentences>
{sentences}
</sentences>

Find out what the latent stands for. Write a few short lines, one for each step:

1. Key words: words, parts of words or signs that come back, above all at the tokens with the strongest activation.
2. Themes: subjects, situations, tones, text types or grammatical forms that the sentences share. Early sentences \
weigh more.
3. Outliers: sentences that do not fit. Would a wider or a narrower description cover them without becoming empty?
4. Certainty: for what share of the sentences does the description hold, and would it fail for most other sentences?

Then close with one JSON object and nothing after it:

{{"common_semantic": "what the sentences share, as specific as they allow, in at most 15 words", "certainty": 0.0}}

certainty is a number from 0 (a guess) to 1 (every sentence fits, others would not). If the sentences share nothing, \
common_semantic is null and certainty 0.
"""
_HOW: dict[Aggregation, str] = {
    "mean": "with the highest average activation",
    "max": "that hold a token with the highest activation",
    "last": "with the highest activation at their last token",
}
_MARKS = "; the tokens that activate it most are written <<like this>>"


def with_marks(tokens: list[bytes], activations: list[float], share: float) -> str:
    """The text of a sentence on one line, with tokens of at least `share` of its highest activation <<marked>>."""
    characters: list[tuple[bytes, float]] = []  # tokens, joined where they share a character's bytes
    for token, activation in zip(tokens, activations, strict=True):
        if characters and token and 0x80 <= token[0] < 0xC0:
            before, highest = characters.pop()
            token, activation = before + token, max(highest, activation)
        characters.append((token, activation))
    threshold = share * max(activations, default=0)
    parts = []
    for strong, run in groupby(characters, key=lambda c: 0 < threshold <= c[1]):
        text = b"".join(token for token, _ in run).decode("utf-8", "replace")
        if strong:
            core = text.strip() or text
            text = text.replace(core, f"<<{core}>>", 1)
        parts.append(text)
    return "".join(parts).replace("\r", "\\r").replace("\n", "\\n").strip()


def latent_prompt(texts: list[str], aggregation: Aggregation, marked: bool) -> str:
    lines = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
    return _PROMPT.format(n=len(texts), how=_HOW[aggregation], marks=_MARKS if marked else "", sentences=lines)


def parse_latents(text: str | None) -> list[range] | None:
    """Ranges of latents from a text such as 0-99,512; None for all."""
    if text is None:
        return None
    try:
        bounds = [[int(bound) for bound in part.split("-")] for part in text.split(",")]
        ranges = [range(part[0], part[-1] + 1) for part in bounds if len(part) <= 2]
    except ValueError:
        ranges = []
    if not ranges or len(ranges) < len(bounds) or not all(ranges):
        raise InputError(f"--latents {text} is not a list of latents; write it like 0-99,512.")
    return ranges


@dataclasses.dataclass(frozen=True)
class Questions:
    """A question about each latent that has enough top sentences."""

    top_path: Path  # NAME.top.parquet
    aggregation: Aggregation
    latents: list[range] | None  # which latents; None for all
    n_sentences: int  # shown, strongest first
    min_sentences: int
    mark_share: float  # see `with_marks`; above 1 for no marks
    respondent: Respondent

    def requests(self, token_bytes: Callable[[int], bytes], skip: set[str]) -> Iterator[dict[str, Any]]:
        """The questions as requests, except those whose custom_id (the latent's number) is in `skip`."""
        token_bytes = functools.cache(token_bytes)
        by_latent = top_sentences(self.top_path, self.aggregation, self.n_sentences, self.latents)
        n_latents = 0
        for latent, sentences in progress_bar(by_latent, desc="questions", unit="latent"):
            n_latents += 1
            if len(sentences) < self.min_sentences or str(latent) in skip:
                continue
            texts = [
                with_marks([token_bytes(i) for i in s.token_ids], s.token_activations, self.mark_share)
                for s in sentences
            ]
            content = latent_prompt(texts, self.aggregation, self.mark_share <= 1)
            yield self.respondent.request(str(latent), content)
        if n_latents == 0:
            raise InputError(
                f"{self.top_path} has no sentences by {self.aggregation} for these latents; choose others."
            )
