"""A web page on Llama 3 and its sparse autoencoder: complete and chat, steered or not, and look inside.

Reads   LLAMA_MODEL_DIR; SAE_MODEL_PATH and what lies beside it. Without either: the embedded model and its SAE.
        With a model and no SAE: a plain page to complete and chat
Writes  nothing; serves on HOST:PORT until Ctrl-C
Method  steering.py says what each mode does; strength 1 is a latent's highest observed activation. Requests share the
        model and the SAE alone: latents, strengths and dialogues belong to the browser window that set them

    python llama_3_inference_gradio.py
    python llama_3_inference_gradio.py --llama_model_dir models/llama_3.2-3B-Instruct --sae_model_path data/sae.pth
    python llama_3_inference_gradio.py --share --auth user:password       # a public address
"""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pipeline.options import Count, CountOrZero, NotNegative, Port, Positive, parse_constants
from pipeline.run import run

if TYPE_CHECKING:
    import gradio as gr


LLAMA_MODEL_DIR: str | None = None  # Llama folder; the embedded tiny Llama when not given
SAE_MODEL_PATH: str | None = None  # the SAE; the embedded one with the embedded model when not given
SAE_LAYER_IDX: CountOrZero | None = (
    None  # for an SAE without a JSON: it reads this layer's attention_norm (published: 22)
)
K: Count | None = None  # for an SAE without a JSON: latents kept (the published: 64)
NORMALIZE_EPS: NotNegative | None = None  # for an SAE without a JSON (the published: 1e-6)
ROPE_SCALING_FACTOR: Positive | None = None  # overrides the checkpoint's (the published SAE's activations: 8)
DEVICE = "auto"  # auto: a GPU where there is one
DTYPE: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
DATE = "auto"  # chat: today's date as in "26 Jul 2024", or none; auto: that one from Llama 3.1 on, none before
HOST = "127.0.0.1"  # address to listen on; 0.0.0.0 lets every machine of the network in
PORT: Port = 7860  # port to listen on
SHARE = False  # also open a public address at gradio.live; needs --auth
AUTH: str | None = None  # user:password that the page asks for
MAX_PROMPTS: Count = 8  # most prompts of one request
MAX_PROMPT_CHARS: Count = 4000  # longest prompt, text or message, in characters
MAX_NEW_TOKENS: Count = 256  # most tokens to add
MAX_REQUESTS: Count = 4  # requests of a tab worked on by turns; the others queue

_N_SLOTS = 4  # latents to steer with at once
_N_RESULTS = 8  # latents found by a search in the steering panel
_N_ROWS = 50  # latents on a page of the list
_N_STRONGEST = 12  # latents listed for a token
_STRENGTHS = (-10.0, 10.0)  # ends of a strength slider
_REFRESH_S = 0.08  # between two pictures of a growing text

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import argparse
import contextlib
import difflib
import functools
import html
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from latents.cards import CARD_CSS, card_html
from latents.index import SORTS, LatentIndex, pieces
from llama_3.chat import Message, check_chat, encode_dialogue
from llama_3.checkpoint import TINY_LLAMA_DIR
from llama_3.generation import check_context, encode_text
from pipeline.errors import InputError
from serving.requests import (
    Page,
    Sampling,
    Steering,
    answers,
    at_most_every,
    check_length,
    check_sampling,
    completions,
    prompts_of,
)
from serving.steered_model import _VISIBLE, known_highest, set_up, strongest_latents
from serving.steering import DEFAULT_MODE, DEFAULT_STRENGTH, MODES, check_latents

# ---- requests


# ---- Complete and steer


def complete(page: Page, text: str, steering: Steering, sampling: Sampling) -> Iterator[tuple[str, str]]:
    """The growing table of completions, and a line of status, both HTML."""
    started = time.monotonic()
    prompts = prompts_of(page, text)
    check_sampling(page, sampling)
    for number, prompt in enumerate(prompts, 1):
        try:
            check_context(page.setup.model, len(encode_text(page.setup.tokenizer, prompt)), sampling.n_tokens)
        except InputError as error:
            raise InputError(f"Prompt {number}: {error}") from None
    for texts in at_most_every(_REFRESH_S, completions(page, prompts, steering, sampling)):
        yield table_html(prompts, texts), status_html("Writing …")
    yield table_html(prompts, texts), status_html(f"Done in {time.monotonic() - started:.1f} s.")


def table_html(prompts: Sequence[str], texts: Mapping[str, Sequence[str]]) -> str:
    """Each prompt with its completions beside each other; words that only one of them has are marked."""
    heads = "".join(f"<div class='kind'>{kind}</div>" for kind in texts)
    rows = []
    for prompt, *row in zip(prompts, *texts.values(), strict=True):
        row = [completion.rstrip("\ufffd") for completion in row]  # half a character waits
        marked = mark_differences(*row) if len(row) == 2 else [html.escape(visible(completion)) for completion in row]
        rows += [f"<div class='text'><b>{html.escape(visible(prompt))}</b>{completion}</div>" for completion in marked]
    return f"<div class='completions columns-{len(texts)}'>{heads}{''.join(rows)}</div>"


def mark_differences(clean: str, steered: str) -> tuple[str, str]:
    """Both texts as HTML, words that the other has not in <del> and <ins>."""
    words = [re.findall(r"\s*\S+|\s+$", visible(text)) for text in (clean, steered)]
    spans: tuple[list[str], list[str]] = ([], [])
    matcher = difflib.SequenceMatcher(None, *([word.strip() for word in row] for row in words), autojunk=False)
    for kind, *places in matcher.get_opcodes():
        for side, tag in enumerate(("del", "ins")):
            first, last = places[2 * side : 2 * side + 2]
            if text := html.escape("".join(words[side][first:last])):
                spans[side].append(text if kind == "equal" else f"<{tag}>{text}</{tag}>")
    return "".join(spans[0]), "".join(spans[1])


def visible(text: str) -> str:
    """Pictures in place of control characters."""
    return text.translate(_VISIBLE)


def status_html(text: str, is_error: bool = False) -> str:
    return f"<p class='status{' error' if is_error else ''}' role='status'>{html.escape(text)}</p>" if text else ""


# ---- choosing latents


def results_html(page: Page, query: str) -> str:
    """The first latents that a search finds, to click."""
    if not query.strip():
        return ""
    rows = page.index.search(query, sort="score", limit=_N_RESULTS)
    if not rows:
        return status_html(unfound(page, query), is_error=True)
    more = page.index.count(query) - len(rows)
    links = "".join(f"<li>{latent_link(row['latent'], row['meaning'], 'steer')}</li>" for row in rows)
    return f"<ul class='results'>{links}</ul>" + (f"<p class='status'>and {more:,} more</p>" if more > 0 else "")


def unfound(page: Page, query: str) -> str:
    """Why a search finds nothing."""
    if query.strip().isdigit():
        return f"There is no latent {query.strip()}; this SAE has latents 0 to {page.index.n_latents - 1}."
    return f"No latent's meaning has {query.strip()!r}; try another word or a latent's number."


def latent_link(latent: int, meaning: str | None, action: str) -> str:
    """What is clicked to choose a latent; see _CLICKS."""
    named = html.escape(meaning) if meaning else "<i>no meaning</i>"
    return f"<a href='#{action}-{latent}'><span class='latent-number'>{latent}</span> {named}</a>"


def clicked(address: Any) -> tuple[str, int]:
    """What was clicked, "card" for example, and its number."""
    match = re.fullmatch(r"([a-z]+)-(\d{1,9})", str(address))
    if match is None:
        raise InputError("That is nothing to click.")
    return match[1], int(match[2])


def with_latent(page: Page, chosen: Sequence[int], latent: int) -> list[int]:
    """The chosen latents and this one. Raises InputError where it cannot be."""
    check_latents({latent: 1.0}, page.highest)
    if latent in chosen:
        raise InputError(f"Latent {latent} is chosen already.")
    if len(chosen) == _N_SLOTS:
        raise InputError(f"{_N_SLOTS} latents at once are the limit here; remove one first.")
    return [*chosen, latent]


# ---- Look inside


class Look(NamedTuple):
    """A text as the model and the SAE see it."""

    tokens: list[str]
    latents: list[list[tuple[int, float]]]  # of each token, with activations, strongest first
    token: int | None = None  # whose latents are listed
    latent: int | None = None  # that colours the text


def look_at(page: Page, text: str) -> Look:
    """A text as it is looked at first. Raises InputError for an empty or too long one."""

    if not text.strip():
        raise InputError("There is no text; write something to look at.")
    check_length(page, text, "The text")
    ids = encode_text(page.setup.tokenizer, text)
    check_context(page.setup.model, len(ids), 0)
    with page.lock:
        rows = [latents for _, latents in strongest_latents(page.setup, ids, page.setup.sae.k)]
    skipped = int(ids[0] == page.setup.tokenizer.bos_id)  # no SAE here was trained on begin-of-text
    return Look(pieces(page.setup.tokenizer, ids[skipped:]), rows[skipped:])


def look_html(page: Page, look: Look) -> tuple[str, str]:
    """The text, token by token, and the list of one token's latents."""
    highest = page.highest[look.latent].item() if look.latent is not None else 0.0
    links = []
    for i, (token, latents) in enumerate(zip(look.tokens, look.latents, strict=True)):
        activation = dict(latents).get(look.latent, 0.0)
        depth = min(1.0, activation / highest) if highest > 0 else 1.0
        style = f" style='--a:{depth:.2f}' title='{activation:.2f}'" if activation > 0 else ""
        shown = html.escape(visible(token)).replace("\n", "⏎\n") or "·"  # ·: a part of a character
        links.append(f"<a href='#token-{i}' class='{'here' if i == look.token else ''}'{style}>{shown}</a>")
    text = f"<div class='look latent-tokens'>{''.join(links)}</div>"
    if look.latent is not None:
        named = f"{look.latent} {page.index.meaning_of(look.latent) or ''}".strip()
        text += f"<p class='status'>Coloured by latent {html.escape(named)}.</p>"
    if look.token is None:
        return text, status_html("Click a token to see its strongest latents.")
    latents = look.latents[look.token][:_N_STRONGEST]
    strongest = latents[0][1] if latents else 1.0
    rows = []
    for latent, activation in latents:
        rows.append(
            f"<li class='{'here' if latent == look.latent else ''}' style='--share:{activation / strongest:.3f}'>"
            f"{latent_link(latent, page.index.meaning_of(latent), 'colour')}"
            f"<span class='value'>{activation:.2f}</span>"
            f"<span class='actions'><a href='#card-{latent}'>card</a> <a href='#steer-{latent}'>steer</a></span></li>"
        )
    shown = html.escape(repr(visible(look.tokens[look.token])))
    return text, f"<h4>Strongest latents on {shown}</h4><ul class='strongest'>{''.join(rows)}</ul>"


# ---- Latents


def list_html(page: Page, query: str, sort: str, offset: int) -> tuple[str, str]:
    """A page of the list of latents, and which it is."""
    rows = page.index.search(query, sort=sort, limit=_N_ROWS, offset=offset)
    if not rows:
        return "", status_html(unfound(page, query), is_error=True)
    number = lambda value, form: "" if value is None else form.format(value)
    cells = "".join(
        f"<tr><td class='name'>{latent_link(row['latent'], row['meaning'], 'card')}</td>"
        f"<td>{number(row['certainty'], '{:.2f}')}</td><td>{number(row['score'], '{:.2f}')}</td>"
        f"<td>{number(row['frequency'], '{:.3%}')}</td></tr>"
        for row in rows
    )
    head = "<tr><th>Latent</th><th>Certainty</th><th>Score</th><th>Fires on</th></tr>"
    where = f"{offset + 1:,} to {offset + len(rows):,} of {page.index.count(query):,}"
    return f"<div class='scrolled'><table class='latents'>{head}{cells}</table></div>", status_html(where)


def show_card(page: Page, latent: int) -> str:

    with page.lock:  # sentences of the embedded SAE are encoded when they are shown
        card = page.index.card(latent)
    steer = f"<p><a class='to-steering' href='#steer-{latent}'>Steer with this latent</a></p>"
    return steer + card_html(card, lambda other: f"#card-{other}")


# ---- Chat


def chat(
    page: Page, dialogue: "list[Message]", message: str, system: str, steering: Steering, sampling: Sampling
) -> "Iterator[tuple[list[Message], str]]":
    """The dialogue with the message and its growing answer, and a line of status."""

    if not message.strip():
        raise InputError("There is no message; write one.")
    check_length(page, message, "The message")
    check_length(page, system, "The system message")
    check_sampling(page, sampling)
    first = [Message("system", system)] if system.strip() else []
    length = lambda messages: len(encode_dialogue(page.setup.tokenizer, [*first, *messages], page.setup.date))
    question = Message("user", message)
    check_context(page.setup.model, length([question]), sampling.n_tokens)
    read = [*dialogue, question]  # what the model reads of it
    while length(read) + sampling.n_tokens > page.setup.model.args.max_seq_len:
        del read[:2]
    forgotten = len(dialogue) + 1 - len(read)
    status = f"The context is full; the first {forgotten} messages were forgotten." if forgotten else ""
    grown = answers(page, [*first, *read], len(dialogue) // 2, steering, sampling)
    for answer in at_most_every(_REFRESH_S, grown):
        yield [*dialogue, question, Message("assistant", answer)], status_html(status or "Writing …")
    yield [*dialogue, question, Message("assistant", answer)], status_html(status)


# ---- the page

# A click on a link to #action-number becomes the component's select event, with that address as its value.
_CLICKS = """
element.addEventListener('click', (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (!link) return;
    event.preventDefault();
    trigger('select', {index: 0, value: link.getAttribute('href').slice(1)});
});
"""

_CSS = """
html { scrollbar-gutter: stable; }
.gradio-container { width: 100%; max-width: 1500px !important; margin: 0 auto !important; }
.title h1 { font-size: 1.35rem; font-weight: 650; margin: 0; letter-spacing: -.01em; }
.title p { margin: .15rem 0 0; opacity: .7; font-size: .9rem; }
.steering { position: sticky; top: .8rem; align-self: flex-start; }
.side h4 { font-size: .95rem; font-weight: 650; margin: 0 0 .2rem; }
.status { margin: .3rem 0; font-size: .88rem; opacity: .75; }
.status.error { opacity: 1; color: #c2410c; font-weight: 550; }
.dark .status.error { color: #fb923c; }
.latent-number { font-variant-numeric: tabular-nums; opacity: .55; font-size: .88em; margin-right: .3em; }
.results, .strongest { list-style: none; margin: 0; padding: 0; font-size: .92rem; }
.results .latent-number, .latents .latent-number { display: inline-block; min-width: 2.6em; text-align: right; }
.results li, .strongest li { margin: 0; }
.results a, .strongest a, .latents a, .slot a { color: inherit; text-decoration: none; }
.results a { display: block; padding: .2rem .45rem; border-radius: .35rem; }
.results a:hover, .latents tr:hover { background: rgb(255 136 0 / .14); }
.slot { border-left: 3px solid rgb(255 136 0 / .8); padding-left: .6rem !important; }
.slot, .slot .row { gap: .35rem !important; }
.slot p { margin: .35rem 0 0; font-size: .92rem; }
.steering .html-container { padding: 0; }
.steering .block:has(> .html-container > div:empty) { display: none; }
.buttons { align-items: center; flex-wrap: wrap; }
.buttons .block { flex: 1 1 12rem; }
.buttons button { min-width: 8.5rem !important; font-weight: 600; padding: .4rem 1rem; white-space: nowrap; }
.completions { display: grid; gap: .1rem 1.4rem; font-size: .97rem; line-height: 1.55; }
.completions.columns-2 { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
.completions .kind { font-size: .78rem; text-transform: uppercase; letter-spacing: .06em; opacity: .6; }
.completions .text { white-space: pre-wrap; overflow-wrap: anywhere; padding: .55rem 0;
    border-top: 1px solid var(--border-color-primary); }
.completions b { font-weight: 650; }
.completions ins { text-decoration: none; background: rgb(255 136 0 / .24); border-radius: .2em; }
.completions del { text-decoration: none; background: rgb(128 128 128 / .16); border-radius: .2em; }
.look { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2; font-size: 1.02rem; }
.look a { color: inherit; text-decoration: none; border-radius: .25em; padding: .15em 0; cursor: pointer;
    box-shadow: inset -1px 0 0 rgb(128 128 128 / .25); background: rgb(255 136 0 / calc(.6 * var(--a, 0))); }
.look a:hover, .look a.here { outline: 2px solid rgb(255 136 0 / .8); }
.strongest li { display: flex; gap: .6rem; padding: .25rem .4rem; border-radius: .35rem; align-items: baseline;
    background: linear-gradient(90deg, rgb(255 136 0 / .16) calc(100% * var(--share)), transparent 0);
    margin-top: 2px; }
.strongest li.here { box-shadow: inset 3px 0 0 rgb(255 136 0 / .9); }
.strongest li > a { flex: 1; }
.strongest .value { font-variant-numeric: tabular-nums; }
.strongest .actions { opacity: .7; font-size: .85em; white-space: nowrap; }
.strongest .actions a { text-decoration: underline; margin-left: .3em; }
.scrolled { max-height: 72vh; overflow-y: auto; }
.latents { width: 100%; border-collapse: collapse; font-size: .92rem; }
.latents th { text-align: right; white-space: nowrap; padding: .22rem .3rem;
    font-weight: 550; font-size: .8rem; opacity: .65; }
.latents th:first-child { text-align: left; }
.latents td { text-align: right; font-variant-numeric: tabular-nums; padding: .22rem .3rem;
    border-top: 1px solid var(--border-color-primary); white-space: nowrap; }
.latents td.name { text-align: left; white-space: normal; width: 100%; overflow-wrap: anywhere; }
.latents td.name a { display: block; }
.side-card p { margin: 0 0 .6rem; }
.to-steering { display: inline-block; font-weight: 550; padding: .25rem .7rem; border-radius: .4rem;
    color: inherit; text-decoration: none; background: rgb(255 136 0 / .22); }
.to-steering:hover { background: rgb(255 136 0 / .4); }
footer { display: none !important; }
@media (max-width: 700px) { .completions.columns-2 { grid-template-columns: minmax(0, 1fr); }
    .completions .kind { display: none; } .steering { position: static; } }
"""


@contextlib.contextmanager
def shown_in_the_page() -> Iterator[None]:
    """Bad input becomes a sentence in a corner of the page."""
    import gradio as gr

    try:
        yield
    except InputError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None


def markup(value: str = "", **options: Any) -> "gr.HTML":
    """HTML whose links choose something (_CLICKS)."""
    import gradio as gr

    return gr.HTML(value, js_on_load=_CLICKS, apply_default_css=False, **options)


def title_html(page: Page) -> str:
    model = page.limits.llama_model_dir or "the embedded tiny Llama"
    about = html.escape(Path(model).name if page.limits.llama_model_dir else model)
    if page.setup.sae is not None:
        n_named = sum(meaning is not None for meaning in page.index.meaning)
        site = html.escape(page.setup.sae.info["site"])
        about += f" · SAE at {site} · {page.index.n_latents:,} latents, {n_named:,} with a meaning"
        return f"<h1>Look inside Llama 3, and steer it</h1><p>{about}</p>"
    return f"<h1>Complete with Llama 3</h1><p>{about} · no SAE, so nothing to look into</p>"


def build(page: Page) -> "gr.Blocks":
    """The page. What a browser window chooses is kept in its own components."""
    import gradio as gr

    has_sae = page.setup.sae is not None
    with gr.Blocks(title="Llama 3, looked into and steered", analytics_enabled=False, fill_width=True) as blocks:
        markup(title_html(page), elem_classes="title")
        with gr.Row():
            panel = steering_panel(page) if has_sae else None
            with gr.Column(scale=3, min_width=360), gr.Tabs(selected="complete") as tabs:
                with gr.Tab("Complete and steer" if has_sae else "Complete", id="complete"):
                    complete_tab(page, panel)
                if has_sae:
                    with gr.Tab("Look inside", id="look"):
                        strongest = look_tab(page)
                    with gr.Tab("Latents", id="latents"):
                        list_, card = latents_tab(page)
                with gr.Tab("Chat", id="chat"):
                    chat_tab(page, panel)
        if has_sae:
            for links in (list_, card, strongest, *panel.labels):
                to_card(page, links, card, tabs)
            for links in (card, strongest):
                to_steering(page, links, panel, tabs)
    return blocks


def to_card(page: Page, links: "gr.HTML", card: "gr.HTML", tabs: "gr.Tabs") -> None:
    """A click on a link named card shows that latent's card."""
    import gradio as gr

    def show(event: gr.EventData) -> tuple:
        with shown_in_the_page():
            kind, latent = clicked(event.value)
            return (show_card(page, latent), gr.Tabs(selected="latents")) if kind == "card" else (gr.skip(), gr.skip())

    links.select(show, None, [card, tabs], trigger_mode="always_last", **_QUEUED)


def to_steering(page: Page, links: "gr.HTML", panel: "Panel", tabs: "gr.Tabs | None" = None) -> None:
    """A click on a link named steer adds that latent to those that steer, and shows the completions."""
    import gradio as gr

    def add(event: gr.EventData, chosen: list[int], *strengths: float) -> list:
        with shown_in_the_page():
            kind, latent = clicked(event.value)
            if kind != "steer":
                return [gr.skip()] * (len(panel.outputs) + (tabs is not None))
            chosen = with_latent(page, chosen, latent)
        strengths = [*strengths[: len(chosen) - 1], DEFAULT_STRENGTH]
        return [*slots(page, chosen, strengths), *([gr.Tabs(selected="complete")] if tabs else [])]

    links.select(add, [panel.chosen, *panel.strengths], [*panel.outputs, *([tabs] if tabs else [])], **_QUEUED)


# ---- its parts

# Options of events: in the queue, where an error becomes a sentence, or at once, where there can be none.
_QUEUED = {"show_progress": "hidden", "api_visibility": "private"}
_QUICK = {**_QUEUED, "queue": False}


class Panel(NamedTuple):
    """The components that say how to steer."""

    chosen: "gr.State"  # list of latents
    strengths: "list[gr.Slider]"  # one a slot; the first ones are those of the chosen latents
    mode: "gr.Dropdown"
    keep_error: "gr.Checkbox"
    labels: "list[gr.HTML]"  # one a slot
    outputs: list  # what `slots` updates

    @property
    def inputs(self) -> list:
        """What `steering_of` reads."""
        return [self.chosen, self.mode, self.keep_error, *self.strengths]


def steering_of(chosen: list[int], mode: str, keep_error: bool, *strengths: float) -> Steering:
    return Steering(dict(zip(chosen, strengths, strict=False)), mode, keep_error)


def slots(page: Page, chosen: list[int], strengths: Sequence[float]) -> list:
    """New values of `Panel.outputs`."""
    import gradio as gr

    updates: list = [chosen, "" if chosen else status_html(_NOTHING_CHOSEN)]
    for i in range(_N_SLOTS):
        if i < len(chosen):
            updates += [gr.Column(visible=True), slot_html(page, chosen[i]), strengths[i]]
        else:
            updates += [gr.Column(visible=False), gr.skip(), gr.skip()]
    return updates


def slot_html(page: Page, latent: int) -> str:
    return f"<p>{latent_link(latent, page.index.meaning_of(latent), 'card')}</p>"


def steering_panel(page: Page) -> Panel:
    import gradio as gr

    with gr.Column(scale=1, min_width=320, elem_classes="steering"):
        query = gr.Textbox(label="Find a latent to steer with", placeholder="a word of its meaning, or its number")
        results = markup()
        found = page.index.search(_EXAMPLE_WORD, sort="score", limit=_N_ROWS) if page.is_embedded else []
        first = [row["latent"] for row in found if row["meaning"] == _EXAMPLE_WORD][:1]
        chosen = gr.State(first)
        hint = markup("" if first else status_html(_NOTHING_CHOSEN))
        unit = (
            "Strength × its highest" if page.index.highest[page.index.highest > 0].size else "Strength, in activation"
        )
        groups, labels, removes, strengths = [], [], [], []
        for i in range(_N_SLOTS):
            with gr.Column(visible=i < len(first), elem_classes="slot", elem_id=f"slot-{i}") as group:
                with gr.Row():
                    labels.append(markup(slot_html(page, first[i]) if i < len(first) else ""))
                    removes.append(gr.Button("✕", size="sm", scale=0, min_width=30))
                strengths.append(gr.Slider(*_STRENGTHS, DEFAULT_STRENGTH, step=0.25, label=unit, buttons=[]))
            groups.append(group)
        mode = gr.Dropdown(list(MODES), value=DEFAULT_MODE, label="Mode", info=MODES[DEFAULT_MODE])
        keep_error = gr.Checkbox(True, label="Keep what the SAE does not reconstruct")
    outputs = [chosen, hint, *(part for slot in zip(groups, labels, strengths, strict=True) for part in slot)]
    panel = Panel(chosen, strengths, mode, keep_error, labels, outputs)

    def remove(i: int, chosen: list[int], *strengths: float) -> list:
        return slots(page, chosen[:i] + chosen[i + 1 :], strengths[:i] + strengths[i + 1 :])

    for i, button in enumerate(removes):
        button.click(functools.partial(remove, i), [chosen, *strengths], outputs, **_QUICK)
    query.change(lambda text: results_html(page, text), query, results, trigger_mode="always_last", **_QUICK)
    mode.change(lambda name: gr.Dropdown(info=MODES.get(name)), mode, mode, **_QUICK)
    to_steering(page, results, panel)
    return panel


def sampling_inputs(page: Page) -> list:
    """Components of the fields of `Sampling`."""
    import gradio as gr

    most = min(page.limits.max_new_tokens, page.setup.model.args.max_seq_len - 1)
    with gr.Row():
        return [
            gr.Slider(1, most, min(48, most), step=1, label="Tokens", buttons=[]),
            gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", buttons=[]),
            gr.Slider(0, 1, 0.95, step=0.01, label="Top-p", buttons=[]),
            gr.Number(0, precision=0, minimum=0, label="Seed", min_width=80),
        ]


def unrepeated(growing: Iterable[tuple[Any, str]]) -> Iterator[tuple]:
    """Leave a line of status out where it is the one before: a late one would come over what Stop writes there."""
    import gradio as gr

    shown = None
    for content, line in growing:
        yield content, gr.skip() if line == shown else line
        shown = line


def complete_tab(page: Page, panel: Panel | None) -> None:
    import gradio as gr

    prompts = gr.Textbox(
        _EXAMPLES if page.is_embedded else _OTHER_EXAMPLES,
        lines=3,
        max_lines=8,
        label=f"Prompts, one a line, at most {page.limits.max_prompts}",
    )
    sampling = sampling_inputs(page)
    with gr.Row(elem_classes="buttons"):
        go = gr.Button("Complete", variant="primary", scale=0)
        stop = gr.Button("Stop", scale=0)
        status = markup()
    table = markup()

    def run(text: str, *values: Any) -> Iterator[tuple[str, str]]:
        sampling, steering = Sampling(*values[:4]), steering_of(*values[4:]) if panel else Steering()
        with shown_in_the_page():
            yield from unrepeated(complete(page, text, steering, sampling))

    inputs = [prompts, *sampling, *(panel.inputs if panel else [])]
    running = gr.on([go.click, prompts.submit], run, inputs, [table, status], **_QUEUED)
    stop.click(lambda: status_html("Stopped."), None, status, cancels=[running], **_QUICK)


def look_tab(page: Page) -> "gr.HTML":
    """Returns the list of a token's latents."""
    import gradio as gr

    look = gr.State(None)
    text = gr.Textbox(_EXAMPLE, lines=3, max_lines=8, label="Text")
    with gr.Row(elem_classes="buttons"):
        go = gr.Button("Look", variant="primary", scale=0)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            tokens = markup()
        with gr.Column(scale=1, min_width=300):
            strongest = markup(elem_classes="side")

    def begin(text: str) -> tuple:
        with shown_in_the_page():
            look = look_at(page, text)
        return look, *look_html(page, look)

    def change(look: Look, event: gr.EventData) -> tuple:
        with shown_in_the_page():
            kind, number = clicked(event.value)
            if kind == "token" and number < len(look.tokens):
                look = look._replace(token=number)
            elif kind == "colour":
                look = look._replace(latent=number)
            else:
                return gr.skip(), gr.skip(), gr.skip()
        return look, *look_html(page, look)

    outputs = [look, tokens, strongest]
    gr.on([go.click, text.submit], begin, text, outputs, **_QUEUED)
    for links in (tokens, strongest):
        links.select(change, look, outputs, trigger_mode="always_last", **_QUEUED)
    return strongest


def latents_tab(page: Page) -> "tuple[gr.HTML, gr.HTML]":
    """Returns the list of latents and the card."""
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=1, min_width=340):
            with gr.Row():
                query = gr.Textbox(label="Search the meanings", placeholder="words, or a latent's number", scale=2)
                sort = gr.Dropdown(list(SORTS), value="score", label="Sort by", scale=1, min_width=110)
            rows, where = list_html(page, "", "score", 0)
            list_, where = markup(rows), markup(where)
            with gr.Row():
                before, after = gr.Button("Before", size="sm"), gr.Button("After", size="sm")
        with gr.Column(scale=1, min_width=340):
            card = markup(status_html("Click a latent to see its card."), elem_classes="side-card")
    offset = gr.State(0)

    def find(query: str, sort: str, offset: int, step: int) -> tuple[str, str, int]:
        last = max(0, (page.index.count(query) - 1) // _N_ROWS * _N_ROWS)
        offset = min(max(0, offset + step * _N_ROWS), last)
        return *list_html(page, query, sort, offset), offset

    outputs = [list_, where, offset]
    first = lambda query, sort: find(query, sort, 0, 0)
    gr.on([query.change, sort.change], first, [query, sort], outputs, trigger_mode="always_last", **_QUICK)
    for button, step in ((before, -1), (after, 1)):
        button.click(functools.partial(find, step=step), [query, sort, offset], outputs, **_QUICK)
    return list_, card


def chat_tab(page: Page, panel: Panel | None) -> None:
    import gradio as gr

    try:
        check_chat(page.setup.tokenizer)
    except InputError as error:
        markup(status_html(str(error)))
        return
    dialogue = gr.State([])
    system = gr.Textbox(label="System message", placeholder="none")
    shown = gr.Chatbot(show_label=False, height=420, render_markdown=False, buttons=[])
    message = gr.Textbox(label="Message", placeholder="write, then Enter")
    with gr.Row(elem_classes="buttons"):
        go = gr.Button("Send", variant="primary", scale=0)
        stop, clear = gr.Button("Stop", scale=0), gr.Button("New dialogue", scale=0)
        status = markup(status_html("" if not page.is_embedded else _NO_CHAT_MODEL))
    sampling = sampling_inputs(page)

    def run(dialogue: list, message: str, system: str, *values: Any) -> Iterator[tuple]:
        sampling, steering = Sampling(*values[:4]), steering_of(*values[4:]) if panel else Steering()
        sent = gr.update(value="")
        with shown_in_the_page():
            for grown, line in unrepeated(chat(page, dialogue, message, system, steering, sampling)):
                yield grown, [turn._asdict() for turn in grown], sent, line
                sent = gr.skip()  # the next message may be half written

    inputs = [dialogue, message, system, *sampling, *(panel.inputs if panel else [])]
    running = gr.on([go.click, message.submit], run, inputs, [dialogue, shown, message, status], **_QUEUED)
    stop.click(lambda: status_html("Stopped."), None, status, cancels=[running], **_QUICK)
    forget = lambda: ([], [], "")
    gr.on([clear.click, shown.clear], forget, None, [dialogue, shown, status], cancels=[running], **_QUICK)


_NOTHING_CHOSEN = "Nothing steers yet. Find a latent above, or in the list of latents."
_EXAMPLE_WORD = "state"  # the meaning of the latent that steers the embedded model at first
_EXAMPLES = "This function returns\nThe first argument\nWhen the"  # the embedded model knows documentation
_OTHER_EXAMPLES = "The best thing about the town is\nWhen I was young,\nThe letter said that"
_EXAMPLE = "Open the file and read all of its lines. If it does not exist, an error is raised."
_NO_CHAT_MODEL = "The embedded model completes text; it was not trained to chat."


# ---- the server


def open_page(config: argparse.Namespace) -> Page:
    """Load everything and warm it up. Raises InputError for what does not fit together."""

    sae_path = config.sae_model_path
    if sae_path is None and config.llama_model_dir is None:
        sae_path = str(Path(TINY_LLAMA_DIR) / "sae.pth")
    options = vars(config) | {"sae_model_path": sae_path, "latents": [], "show_latents": 0}
    setup = set_up(argparse.Namespace(**options, temperature=0.0, top_p=1.0))
    index = highest = None
    if setup.sae is not None:
        index = LatentIndex(sae_path, setup.tokenizer, setup.model, setup.sae)
        highest = known_highest(sae_path, setup.sae.n_latents)
        for line in index.missing:
            print(line, file=sys.stderr)
    page = Page(setup, config, index, highest, threading.Lock())
    steering = Steering({int(highest.argmax()): 1.0}) if setup.sae is not None else Steering()
    list(completions(page, ["Warm"], steering, Sampling(2, 0.0, 1.0, 0)))  # the first pass packs the weights
    return page


def launch(page: Page, config: argparse.Namespace) -> None:
    import gradio as gr

    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]  # no font is fetched
    theme = gr.themes.Base(
        primary_hue="orange", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"]
    )
    blocks = build(page)
    blocks.queue(default_concurrency_limit=config.max_requests)
    _, local, public = blocks.launch(
        server_name=config.host,
        server_port=config.port,
        share=config.share,
        auth=tuple(config.auth.split(":", 1)) if config.auth else None,
        theme=theme,
        css=CARD_CSS + _CSS,
        ssr_mode=False,
        quiet=True,
        footer_links=[],
        run_history=False,
        max_file_size="1kb",  # nothing here takes files
        prevent_thread_lock=True,
    )
    print(f"Ready: {local}" + (f" and {public}" if public else "") + " (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


def check_options(config: argparse.Namespace) -> None:
    if config.auth is not None and not re.fullmatch("[^:]+:.+", config.auth):
        raise InputError("--auth has no user and password; write it as user:password.")
    if config.share and config.auth is None:
        raise InputError("--share lets anyone in; name a password with --auth user:password.")
    try:
        with socket.create_server((config.host, config.port)):
            pass
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]
        raise InputError(
            f"{config.host}:{config.port} cannot be listened on ({reason}); choose another --port or --host."
        ) from None


def main() -> None:
    config = parse_constants(globals())
    check_options(config)
    print(f"Loading {config.llama_model_dir or 'the embedded tiny Llama'} ...", file=sys.stderr, flush=True)
    page = open_page(config)
    launch(page, config)


if __name__ == "__main__":
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    run(main)
