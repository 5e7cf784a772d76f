"""A latent's card and its HTML, as the page and the report show it."""

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from latents.markup import visible_token


class CardSentence(NamedTuple):
    """A sentence on a card, as the model read it."""

    tokens: list[str]  # joined they are the text; a character split over several tokens is with the last
    activations: list[float]  # of the latent, per token, normalised space
    activation: float  # the highest of them


class Card(NamedTuple):
    """What is known about a latent. None, nan or an empty list where a file is missing (LatentIndex.missing)."""

    latent: int
    meaning: str | None
    certainty: float
    score: float  # balanced accuracy of the meaning
    output_score: float  # how much steering by it makes the model say what it promotes
    steers_well: bool
    frequency: float  # share of tokens it fires on
    mean: float  # activation where it fires, normalised space
    highest: float  # highest observed activation
    sentences_by_tenth: list[int]  # sentences by their highest activation, in tenths of the range, weakest first
    sentences: list[CardSentence]  # strongest first, no text twice
    promoted: list[tuple[str, float]]  # tokens, and their logits in standard deviations over the vocabulary
    suppressed: list[tuple[str, float]]
    co_firing: list[tuple[int, str | None, float]]  # latent, meaning, Jaccard index


STEERS_WELL = ' <span class="latent-steers">steers well</span>'
CARD_CSS = Path(__file__).with_name("card.css").read_text(encoding="utf-8")


def tokens_html(tokens: Sequence[str], activations: Sequence[float], highest: float) -> str:
    """A sentence coloured by activation: the deeper, the closer to `highest`. CARD_CSS has the colours."""
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
    """A card as a fragment for a page with CARD_CSS. href: gives a latent's address, for links between cards."""
    facts = [
        ("certainty", card.certainty, "{:.2f}", "of the meaning, as stated by whoever gave it"),
        ("score", card.score, "{:.2f}", "balanced accuracy of the meaning on other sentences; guessing gives 0.50"),
        ("output score", card.output_score, "{:z.2f}", "how far steering by it makes the model say what it promotes"),
        ("fires on", 100 * card.frequency, "{:.3g} % of tokens", "of the captured tokens"),
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
        f'<h3><span class="latent-number">{card.latent}</span>{title}{STEERS_WELL if card.steers_well else ""}</h3>',
        f'<dl class="latent-facts">{"".join(known)}</dl>',
        "<h4>Sentences that activate it most</h4>",
        _sentences_html(card),
        '<div class="latent-lists">',
    ]
    if card.sentences_by_tenth:
        parts.append(f'<div class="latent-strength"><h4>Sentences by strength</h4>{tenths_svg(card)}</div>')
    for name, pairs in (("Makes the model say", card.promoted), ("Keeps it from saying", card.suppressed)):
        if pairs:
            rows = (
                f"<li><code>{html.escape(visible_token(token))}</code><span>{value:+.1f}</span></li>"
                for token, value in pairs
            )
            parts.append(f"<div><h4>{name}</h4><ul>{''.join(rows)}</ul></div>")
    if card.co_firing:
        rows = "".join(
            f"<li>{_named(other, meaning, href(other))}<span>{jaccard:.0%}</span></li>"
            for other, meaning, jaccard in card.co_firing
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
    size, unit = next(((s, u) for s, u in ((1e3, "k"), (1e6, "M")) if count < 999.5 * s), (1e9, "G"))
    return f"{count / size:.1f}{unit}" if count < 9.95 * size else f"{count / size:.0f}{unit}"
