"""The HTML of the page: completions, lists of latents, a text seen inside. Every link in it is "#action-number"."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from latents.cards import CARD_CSS, card_html
from latents.index import LatentIndex, Sort
from latents.interesting import latents_to_steer
from latents.markup import mark_differences, visible
from pipeline.errors import InputError
from serving.requests import Look, Served

PAGE_CSS = Path(__file__).with_name("page.css")

_N_RESULTS = 8  # latents found by a search in the steering panel
_N_STRONGEST = 12  # latents listed for a token


def page_css() -> str:
    return CARD_CSS + PAGE_CSS.read_text(encoding="utf-8")


def page_title(served: Served) -> str:
    name = served.opened.choice.name
    return f"Complete with {name}" if served.index is None else f"Look inside {name}, and steer it"


def title_html(served: Served) -> str:
    about = "No SAE, so nothing to look into"
    if served.index is not None:
        n_named = sum(meaning is not None for meaning in served.index.meaning)
        sae = served.opened.need_sae()
        place = f"SAE at {sae.site}"
        if sae.kind.target_site is not None:
            place = f"Transcoder from {sae.site} to {sae.output_site}"
        about = f"{html.escape(place)} · {served.index.n_latents:,} latents, {n_named:,} with a meaning"
    return f"<h1>{html.escape(page_title(served))}</h1><p>{about}</p>"


def status_html(text: str, is_error: bool = False) -> str:
    return f"<p class='status{' error' if is_error else ''}' role='status'>{html.escape(text)}</p>" if text else ""


def completions_html(prompts: Sequence[str], texts: Mapping[str, Sequence[str]]) -> str:
    """Each prompt with its completions side by side; words that only one of them has are marked."""
    heads = "".join(f"<div class='kind'>{kind}</div>" for kind in texts)
    rows = []
    for prompt, *row in zip(prompts, *texts.values(), strict=True):
        row = [completion.rstrip("\ufffd") for completion in row]  # half a character is held back
        marked = mark_differences(*row) if len(row) == 2 else [html.escape(visible(completion)) for completion in row]
        rows += [f"<div class='text'><b>{html.escape(visible(prompt))}</b>{completion}</div>" for completion in marked]
    return f"<div class='completions columns-{len(texts)}'>{heads}{''.join(rows)}</div>"


# ---- links


def latent_link(index: LatentIndex, latent: int, action: str) -> str:
    """A link that chooses a latent."""
    meaning = index.meaning_of(latent)
    named = html.escape(meaning) if meaning else "<i>no meaning</i>"
    return f"<a href='#{action}-{latent}'><span class='latent-number'>{latent}</span> {named}</a>"


def clicked(address: object) -> tuple[str, int]:
    """What was clicked, such as "card", and its number. Raises InputError for any other address."""
    match = re.fullmatch(r"([a-z]+)-(\d{1,9})", str(address))
    if match is None:
        raise InputError("That is not a link of this page; click a latent or a token.")
    return match[1], int(match[2])


# ---- choosing latents


def results_html(index: LatentIndex, query: str, n_suggested: int) -> str:
    """The first latents that a search finds, to click; without a search, those that are best to steer with."""
    if not query.strip():
        names = {latent: index.meaning.item(latent) for latent in latents_to_steer(index)[:n_suggested]}
        links = " ".join(f"<a href='#steer-{latent}'>{html.escape(name)}</a>" for latent, name in names.items())
        return f"<p class='suggested'>or one of these: {links}</p>" if names else ""
    rows = index.search(query, sort="score", limit=_N_RESULTS)
    if not rows:
        return status_html(why_nothing_is_found(index, query), is_error=True)
    more = index.count(query) - len(rows)
    links = "".join(f"<li>{latent_link(index, row['latent'], 'steer')}</li>" for row in rows)
    return f"<ul class='results'>{links}</ul>" + (f"<p class='status'>and {more:,} more</p>" if more > 0 else "")


def why_nothing_is_found(index: LatentIndex, query: str) -> str:
    if query.strip().isdigit():
        return f"There is no latent {query.strip()}; this SAE has latents 0 to {index.n_latents - 1}."
    return f"No latent's meaning contains {query.strip()!r}; try another word or a latent's number."


def slot_html(index: LatentIndex, latent: int) -> str:
    return f"<p>{latent_link(index, latent, 'card')}</p>"


def list_html(index: LatentIndex, query: str, sort: Sort, offset: int, n_rows: int) -> tuple[str, str]:
    """A page of the list of latents, and which page it is."""
    rows = index.search(query, sort=sort, limit=n_rows, offset=offset)
    if not rows:
        return "", status_html(why_nothing_is_found(index, query), is_error=True)
    number = lambda value, form: "" if value is None else form.format(value)
    cells = "".join(
        f"<tr><td class='name'>{latent_link(index, row['latent'], 'card')}</td>"
        f"<td>{number(row['certainty'], '{:.2f}')}</td><td>{number(row['score'], '{:.2f}')}</td>"
        f"<td>{number(row['frequency'], '{:.3%}')}</td></tr>"
        for row in rows
    )
    head = "<tr><th>Latent</th><th>Certainty</th><th>Score</th><th>Fires on</th></tr>"
    where = f"{offset + 1:,} to {offset + len(rows):,} of {index.count(query):,}"
    return f"<div class='scrolled'><table class='latents'>{head}{cells}</table></div>", status_html(where)


def steerable_card_html(index: LatentIndex, latent: int) -> str:
    """A latent's card, under a link to steer with it."""
    steer = f"<p><a class='to-steering' href='#steer-{latent}'>Steer with this latent</a></p>"
    return steer + card_html(index.card(latent), lambda other: f"#card-{other}")


# ---- a text seen inside


def look_html(served: Served, index: LatentIndex, look: Look) -> tuple[str, str]:
    """The text, token by token, and the list of one token's latents."""
    return coloured_text_html(index, served.opened.highest, look), strongest_html(served, index, look)


def coloured_text_html(index: LatentIndex, highest: Tensor | None, look: Look) -> str:
    """The deeper the colour, the closer to the latent's highest activation (to 1 if that is unknown)."""
    strongest = 1.0 if highest is None or look.latent is None else highest[look.latent].item()
    links = []
    for i, (token, latents) in enumerate(zip(look.tokens, look.latents, strict=True)):
        activation = 0.0 if look.latent is None else dict(latents).get(look.latent, 0.0)
        depth = min(1.0, activation / strongest) if strongest > 0 else 1.0
        style = f" style='--a:{depth:.2f}' title='{activation:.2f}'" if activation > 0 else ""
        shown = html.escape(visible(token)).replace("\n", "⏎\n") or "·"  # ·: part of a character
        links.append(f"<a href='#token-{i}' class='{'here' if i == look.token else ''}'{style}>{shown}</a>")
    text = f"<div class='look latent-tokens'>{''.join(links)}</div>"
    if look.latent is not None:
        named = f"{look.latent} {index.meaning_of(look.latent) or ''}".strip()
        text += f"<p class='status'>Coloured by latent {html.escape(named)}.</p>"
    return text


def strongest_html(served: Served, index: LatentIndex, look: Look) -> str:
    """The strongest latents of the token that was clicked, and what they add to the next one."""
    if look.token is None:
        return status_html("Click a token to see its strongest latents.")
    latents = look.latents[look.token][:_N_STRONGEST]
    strongest = latents[0][1] if latents else 1.0
    rows = []
    for i, (latent, activation) in enumerate(latents):
        adds = f"<span class='value adds'>{look.adds[i]:+.2f}</span>" if look.adds else ""
        rows.append(
            f"<li class='{'here' if latent == look.latent else ''}' style='--share:{activation / strongest:.3f}'>"
            f"{latent_link(index, latent, 'colour')}<span class='value'>{activation:.2f}</span>{adds}"
            f"<span class='actions'><a href='#card-{latent}'>card</a> <a href='#steer-{latent}'>steer</a></span></li>"
        )
    shown = html.escape(repr(visible(look.tokens[look.token])))
    return f"<h4>Strongest latents on {shown}</h4>{next_html(served, look)}<ul class='strongest'>{''.join(rows)}</ul>"


def next_html(served: Served, look: Look) -> str:
    """What comes next by the model, where its latents can be said to add to that."""
    if look.outlook is None or look.token is None:
        return ""
    answer, probability = look.outlook.answers[look.token], look.outlook.probabilities[look.token]
    said = repr(visible(served.opened.tokenizer.decode([answer])))
    return status_html(
        f"Next is {said} with probability {probability:.2f}. After each latent's activation: what it adds directly to "
        "that token's logit, over the mean token's."
    )
