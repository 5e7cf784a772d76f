"""A latent's card and its HTML."""

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from latents.markup import visible_token


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
            rows = (
                f"<li><code>{html.escape(visible_token(token))}</code><span>{value:+.1f}</span></li>"
                for token, value in pairs
            )
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
