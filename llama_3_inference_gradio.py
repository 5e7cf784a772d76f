"""A web page for Llama 3 and its sparse autoencoder: complete and chat, steered or not, and look inside.

Reads   LLAMA_MODEL_DIR; SAE_MODEL_PATH and what lies beside it. Without either: SmolLM2 and its reference SAE if
        fetch_model.py has fetched it, else the embedded tiny Llama and its. With a model and no SAE: a plain page to
        complete and chat
Writes  nothing; serves on HOST:PORT until Ctrl-C
Method  serving/steering.py explains the modes; strength 1 is a latent's highest observed activation. Requests share
        only the model and the SAE: latents, strengths and dialogues belong to the browser window that set them

    python llama_3_inference_gradio.py
    python llama_3_inference_gradio.py --llama_model_dir models/llama_3.2-3B-Instruct --sae_model_path data/sae.pth
    python llama_3_inference_gradio.py --share --auth user:password       # a public address
"""

import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from pipeline.options import Count, CountOrZero, NotNegative, Port, Positive, parse_constants
from pipeline.run import run

LLAMA_MODEL_DIR: str | None = (
    None  # Llama folder; when not given: the SAE's, else SmolLM2's if fetched, else the tiny one
)
SAE_MODEL_PATH: str | None = None  # the SAE; the model's reference SAE in llama_3/ when not given
SAE_LAYER_IDX: CountOrZero | None = None  # for an SAE without a JSON: its layer, at attention_norm (published SAE: 22)
K: Count | None = None  # for an SAE without a JSON: latents kept per token (published SAE: 64)
NORMALIZE_EPS: NotNegative | None = None  # for an SAE without a JSON (published SAE: 1e-6)
ROPE_SCALING_FACTOR: Positive | None = None  # overrides the checkpoint's (published SAE's activations: 8)
CONTROL_VECTORS: list[str] = []  # GGUF files to steer with: of control_vectors.py, repeng or llama.cpp
VECTOR_SCALES: list[float] = [1.0]  # their scales when the page opens, one for each or one for all; 0: off
VECTOR_SHIFT: Literal[0, 1] = 0  # 1: files of llama.cpp's cvector-generator, which names each layer one too high
DEVICE = "auto"  # auto: a GPU if there is one
DTYPE: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
DATE = "auto"  # chat: today's date, written like "26 Jul 2024", or none; auto: that date from Llama 3.1 on, else none
HOST = "127.0.0.1"  # address to listen on; 0.0.0.0 lets in every machine on the network
PORT: Port = 7860  # port to listen on; 0: any free one
SHARE = False  # also open a public address at gradio.live; needs --auth
AUTH: str | None = None  # user:password that the page asks for
MAX_PROMPTS: Count = 8  # most prompts per request
MAX_PROMPT_CHARS: Count = 4000  # longest prompt, text or message, in characters
MAX_NEW_TOKENS: Count = 256  # most tokens to add
MAX_REQUESTS: Count = 4  # requests per tab served together; others queue

_N_SLOTS = 4  # latents to steer with at once
_MAX_WAITING = 10_000  # completions; the page's own queue limits requests
_N_ROWS = 50  # latents on a page of the list
_REFRESH_S = 0.08  # seconds between updates of a growing text
_EXAMPLE_S = 20  # most seconds spent at the start on the completions with which the page opens
_SUGGESTED = 10  # latents offered before anything is searched
_NOTHING_CHOSEN = "Nothing steers yet. Find a latent above, or in the list of latents."
_TINY_LATENT = "state"  # the meaning of the latent that steers the tiny Llama when the page opens
_NO_CHAT_MODEL = "The embedded model completes text; it was not trained to chat."


class Examples(NamedTuple):
    """What the boxes hold when the page opens."""

    prompts: Sequence[str]
    text: str  # to look inside
    message: str  # of a chat


_TINY_EXAMPLES = Examples(  # the tiny Llama knows nothing but documentation
    ("This function returns", "The first argument", "When the"),
    "Open the file and read all of its lines. If it does not exist, an error is raised.",
    "",
)
_EXAMPLES = Examples(
    ("My favourite place in the world is", "The most important thing in life is", "When I woke up this morning,"),
    "When I was a child we spent every summer by the sea. My grandmother cooked fish and told us stories of the war, "
    "and after dinner my uncle played old songs on his guitar.",
    "What should I do with a free day?",
)

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import functools
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator

import torch

from latents.index import SORTS, LatentIndex, Sort
from latents.interesting import interesting_latents, latents_to_steer
from latents.meanings import is_embedded
from llama_3.chat import Message, check_chat
from pipeline.errors import InputError
from serving.engine import Engine
from serving.local_requests import past_proxies
from serving.microscope_tab import microscope_tab
from serving.modes import MODES
from serving.page_html import (
    clicked,
    completions_html,
    list_html,
    look_html,
    page_css,
    page_title,
    results_html,
    slot_html,
    status_html,
    steerable_card_html,
    title_html,
)
from serving.page_parts import QUEUED, QUICK, markup, shown_in_the_page
from serving.requests import Limits, Look, Served, at_most_every, at_token, chat, completions, look_at, prompts_of
from serving.steered_model import (
    ModelChoice,
    OpenedVector,
    Sampling,
    VectorChoice,
    open_model,
    taken_from,
    with_control_vectors,
)
from serving.steering import Steering, check_latents

with past_proxies():  # importing gradio makes an HTTP client, which fails with a SOCKS proxy
    import gradio as gr

N = TypeVar("N", gr.Slider, gr.Number)
Values = dict[Any, Any]  # what the components of a browser window hold


# ---- the page


def build(served: Served) -> gr.Blocks:
    """The page. What a browser window chooses is kept in its own components."""
    index = served.index
    with gr.Blocks(title=page_title(served), analytics_enabled=False, fill_width=True) as blocks:
        markup(title_html(served), elem_classes="title")
        with gr.Row():
            controls = steering_controls(served, index)
            panel = controls.latents
            with gr.Column(scale=3, min_width=360), gr.Tabs(selected="complete") as tabs:
                with gr.Tab("Complete and steer" if index else "Complete", id="complete"):
                    complete_tab(served, controls)
                if index and panel:
                    with gr.Tab("Look inside", id="look"):
                        strongest = look_tab(served, index)
                    with gr.Tab("Latents", id="latents"):
                        latents, card = latents_tab(served, index)
                    for links in (latents, card, strongest, *panel.labels):
                        to_card(served, index, links, card, tabs)
                    for links in (card, strongest):
                        to_steering(served, index, links, panel, tabs)
                with gr.Tab("Microscope", id="microscope"):
                    microscope_tab(served)
                with gr.Tab("Chat", id="chat"):
                    chat_tab(served, controls)
    return blocks


def unrepeated(growing: Iterable[tuple[Any, str]]) -> Iterator[tuple[Any, Any]]:
    """Skip a status line that equals the one before: arriving late, it would overwrite what Stop writes there."""
    shown = None
    for content, line in growing:
        yield content, gr.skip() if line == shown else line
        shown = line


def examples_for(served: Served) -> Examples:
    return _TINY_EXAMPLES if served.opened.choice.is_embedded else _EXAMPLES


# ---- how to sample, and how to steer


def as_sent(number: N) -> N:
    """A number box whose value is checked where it is used: gradio's own check crashes on an empty box."""
    number.preprocess = lambda payload: payload
    return number


class SamplingInputs(NamedTuple):
    """The components of the fields of `Sampling`."""

    max_new_tokens: gr.Slider
    temperature: gr.Slider
    top_p: gr.Slider
    seed: gr.Number

    def read(self, values: Values) -> Sampling:
        return Sampling(**{name: values[component] for name, component in self._asdict().items()})


def first_sampling(served: Served, max_new_tokens: int) -> Sampling:
    """What the sampling inputs hold when the page opens."""
    most = min(served.limits.max_new_tokens, served.opened.model.args.max_seq_len // 2)
    return Sampling(min(max_new_tokens, most), temperature=0.7, top_p=0.95, seed=0)


def sampling_inputs(served: Served, first: Sampling) -> SamplingInputs:
    most = min(served.limits.max_new_tokens, served.opened.model.args.max_seq_len - 1)
    with gr.Row():
        return SamplingInputs(
            as_sent(gr.Slider(1, most, first.max_new_tokens, step=1, label="Tokens", buttons=[])),
            as_sent(gr.Slider(0, 2, first.temperature, step=0.05, label="Temperature", buttons=[])),
            as_sent(gr.Slider(0, 1, first.top_p, step=0.01, label="Top-p", buttons=[])),
            as_sent(gr.Number(first.seed, precision=0, minimum=0, label="Seed", min_width=80)),
        )


class Panel(NamedTuple):
    """The components that say with which latents to steer, and how."""

    first: Steering  # when the page opens
    chosen: gr.State  # list of latents
    strengths: list[gr.Slider]  # one per slot; the first ones are those of the chosen latents
    mode: gr.Dropdown
    keep_error: gr.Checkbox
    labels: list[gr.HTML]  # one per slot
    outputs: list[Any]  # what `slots` updates

    @property
    def inputs(self) -> list[Any]:
        """What `read` needs."""
        return [self.chosen, self.mode, self.keep_error, *self.strengths]

    def read(self, values: Values) -> Steering:
        strengths = zip(values[self.chosen], (values[slider] for slider in self.strengths), strict=False)
        return Steering(dict(strengths), values[self.mode], values[self.keep_error])


class Controls(NamedTuple):
    """All components that say how to steer."""

    first: Steering  # when the page opens
    latents: Panel | None
    scales: dict[str, gr.Number]  # of control vectors

    @property
    def inputs(self) -> list[Any]:
        """What `read` needs."""
        return [*(self.latents.inputs if self.latents else []), *self.scales.values()]

    def read(self, values: Values) -> Steering:
        steering = self.latents.read(values) if self.latents else Steering()
        scales = {name: values[number] for name, number in self.scales.items()}
        return steering._replace(control_vectors={name: scale for name, scale in scales.items() if scale != 0})


def slots(index: LatentIndex, chosen: list[int], strengths: Sequence[float]) -> list[Any]:
    """New values of `Panel.outputs`."""
    updates: list[Any] = [chosen, "" if chosen else status_html(_NOTHING_CHOSEN)]
    for i in range(_N_SLOTS):
        if i < len(chosen):
            updates += [gr.Column(visible=True), slot_html(index, chosen[i]), strengths[i]]
        else:
            updates += [gr.Column(visible=False), gr.skip(), gr.skip()]
    return updates


def steering_controls(served: Served, index: LatentIndex | None) -> Controls:
    """The column at the left, if there is anything to steer with."""
    vectors = served.opened.control_vectors
    if not (index or vectors):
        return Controls(Steering(), None, {})
    with gr.Column(scale=1, min_width=320, elem_classes="steering"):
        panel = steering_panel(served, index) if index else None
        scales = {name: scale_input(name, vector) for name, vector in vectors.items()}
    first = panel.first if panel else Steering()
    first_scales = {name: vector.scale for name, vector in vectors.items() if vector.scale != 0}
    return Controls(first._replace(control_vectors=first_scales), panel, scales)


def scale_input(name: str, vector: OpenedVector) -> gr.Number:
    info = f"Scale; the vector is added {vector.where}. 0: off, below 0: the opposite"
    return as_sent(gr.Number(vector.scale, label=f"Control vector {name}", info=info, step=0.1))


def steering_panel(served: Served, index: LatentIndex) -> Panel:
    unit = "Strength, in activation" if served.opened.highest is None else "Strength × its highest"
    default = served.opened.defaults
    query = gr.Textbox(label="Find a latent to steer with", placeholder="a word of its meaning, or its number")
    results = markup(results_html(index, "", _SUGGESTED))
    first = first_chosen(served, index)
    chosen = gr.State(first)
    hint = markup("" if first else status_html(_NOTHING_CHOSEN))
    groups, labels, removes, strengths = [], [], [], []
    for i in range(_N_SLOTS):
        with gr.Column(visible=i < len(first), elem_classes="slot", elem_id=f"slot-{i}") as group:
            with gr.Row():
                labels.append(markup(slot_html(index, first[i]) if i < len(first) else ""))
                removes.append(gr.Button("✕", size="sm", scale=0, min_width=30))
            strength = gr.Slider(*default.slider, default.strength, step=default.step, label=unit, buttons=[])
            strengths.append(as_sent(strength))
        groups.append(group)
    mode = gr.Dropdown(list(MODES), value=default.mode, label="Mode", info=MODES[default.mode])
    keep_error = gr.Checkbox(True, label="Keep what the SAE does not reconstruct")
    outputs = [chosen, hint, *(part for slot in zip(groups, labels, strengths, strict=True) for part in slot)]
    steering = Steering(dict.fromkeys(first, default.strength), default.mode, keep_error=True)
    panel = Panel(steering, chosen, strengths, mode, keep_error, labels, outputs)

    def remove(i: int, chosen: list[int], *strengths: float) -> list[Any]:
        return slots(index, chosen[:i] + chosen[i + 1 :], strengths[:i] + strengths[i + 1 :])

    for i, button in enumerate(removes):
        button.click(functools.partial(remove, i), [chosen, *strengths], outputs, **QUICK)
    query.change(
        lambda text: results_html(index, text, _SUGGESTED), query, results, trigger_mode="always_last", **QUICK
    )
    mode.change(lambda name: gr.Dropdown(info=MODES.get(name)), mode, mode, **QUICK)
    to_steering(served, index, results, panel)
    return panel


def first_chosen(served: Served, index: LatentIndex) -> list[int]:
    """The latent that steers when the page opens; none where nothing is known of any."""
    if is_embedded(index.sae_path):
        found = index.search(_TINY_LATENT, sort="score")
        return [row["latent"] for row in found if row["meaning"] == _TINY_LATENT][:1]
    highest = served.opened.highest
    return [] if highest is None else [latent for latent in latents_to_steer(index) if highest[latent] > 0][:1]


# ---- links from one part to another


def to_card(served: Served, index: LatentIndex, links: gr.HTML, card: gr.HTML, tabs: gr.Tabs) -> None:
    """A click on a "card" link shows that latent's card."""

    def show(event: gr.EventData) -> tuple[Any, Any]:
        with shown_in_the_page():
            kind, latent = clicked(event.value)
            if kind != "card":
                return gr.skip(), gr.skip()
            n_missing = len(index.missing)
            with served.lock:  # sentences of the embedded SAE are encoded when they are shown
                card = steerable_card_html(index, latent)
            for line in index.missing[n_missing:]:
                print(line, file=sys.stderr)
            return card, gr.Tabs(selected="latents")

    links.select(show, None, [card, tabs], trigger_mode="always_last", **QUEUED)


def to_steering(served: Served, index: LatentIndex, links: gr.HTML, panel: Panel, tabs: gr.Tabs | None = None) -> None:
    """A click on a "steer" link adds that latent to those that steer, and shows the completions."""

    def add(event: gr.EventData, chosen: list[int], *strengths: float) -> list[Any]:
        with shown_in_the_page():
            kind, latent = clicked(event.value)
            if kind != "steer":
                return [gr.skip()] * (len(panel.outputs) + (tabs is not None))
            chosen = with_latent(served, index, chosen, latent)
        strengths = (*strengths[: len(chosen) - 1], served.opened.defaults.strength)
        return [*slots(index, chosen, strengths), *([gr.Tabs(selected="complete")] if tabs else [])]

    links.select(add, [panel.chosen, *panel.strengths], [*panel.outputs, *([tabs] if tabs else [])], **QUEUED)


def with_latent(served: Served, index: LatentIndex, chosen: Sequence[int], latent: int) -> list[int]:
    """The chosen latents and this one. Raises InputError if it cannot be added."""
    highest = served.opened.highest
    check_latents({latent: 1.0}, torch.ones(index.n_latents) if highest is None else highest)
    if latent in chosen:
        raise InputError(f"Latent {latent} is already chosen.")
    if len(chosen) == _N_SLOTS:
        raise InputError(f"At most {_N_SLOTS} latents can steer at once; remove one first.")
    return [*chosen, latent]


# ---- Complete and steer


def complete_tab(served: Served, controls: Controls) -> None:
    prompts = examples_for(served).prompts[: served.limits.max_prompts]
    text = gr.Textbox(
        "\n".join(prompts),
        lines=3,
        max_lines=8,
        label=f"Prompts, one per line, at most {served.limits.max_prompts}",
    )
    first_sampled = first_sampling(served, 48)
    sampling = sampling_inputs(served, first_sampled)
    with gr.Row(elem_classes="buttons"):
        go = gr.Button("Complete", variant="primary", scale=0)
        stop = gr.Button("Stop", scale=0)
        change = "the prompts or what steers" if controls.inputs else "the prompts"
        status = markup(status_html(f"An example, written at the start. Change {change}, then press Complete."))
    table = markup(example_html(served, prompts, controls.first, first_sampled))

    def complete(values: Values) -> Iterator[tuple[str, str]]:
        """The growing table of completions, and a line of status."""
        started = time.monotonic()
        prompts = prompts_of(served, values[text] or "")
        growing = completions(served, prompts, controls.read(values), sampling.read(values))
        shown = ""
        for texts in at_most_every(_REFRESH_S, growing):
            shown = completions_html(prompts, texts)
            yield shown, status_html("Writing …")
        yield shown, status_html(f"Done in {time.monotonic() - started:.1f} s.")

    inputs = [text, *sampling, *controls.inputs]

    def run(*values: Any) -> Iterator[tuple[Any, Any]]:
        with shown_in_the_page():
            yield from unrepeated(complete(dict(zip(inputs, values, strict=True))))

    running = gr.on([go.click, text.submit], run, inputs, [table, status], **QUEUED)
    stop.click(lambda: status_html("Stopped."), None, status, cancels=[running], **QUICK)


def example_html(served: Served, prompts: Sequence[str], steering: Steering, sampling: Sampling) -> str:
    """The completions with which the page opens, as far as they come in _EXAMPLE_S. The first step also packs the
    weights; it does not count."""
    texts: dict[str, list[str]] = {}
    until = 0.0
    for grown in completions(served, prompts, steering, sampling):
        texts, until = grown, until or time.monotonic() + _EXAMPLE_S
        if time.monotonic() > until:
            break
    return completions_html(prompts, texts)


# ---- Look inside


def look_tab(served: Served, index: LatentIndex) -> gr.HTML:
    """Returns the list of a token's latents."""
    example = examples_for(served).text
    first = first_look(served, index, example)
    look = gr.State(first)
    text = gr.Textbox(example, lines=3, max_lines=8, label="Text")
    with gr.Row(elem_classes="buttons"):
        go = gr.Button("Look", variant="primary", scale=0)
    with gr.Row():
        coloured, listed = look_html(served, index, first)
        with gr.Column(scale=1, min_width=300):
            tokens = markup(coloured)
        with gr.Column(scale=1, min_width=300):
            strongest = markup(listed, elem_classes="side")

    def begin(text: str) -> tuple[Any, ...]:
        with shown_in_the_page():
            look = look_at(served, text or "")
        return look, *look_html(served, index, look)

    def change(look: Look, event: gr.EventData) -> tuple[Any, ...]:
        with shown_in_the_page():
            kind, number = clicked(event.value)
            if kind == "token" and number < len(look.tokens):
                look = at_token(served, look, number)
            elif kind == "colour" and number < index.n_latents:
                look = look._replace(latent=number)
            else:
                return gr.skip(), gr.skip(), gr.skip()
        return look, *look_html(served, index, look)

    outputs = [look, tokens, strongest]
    gr.on([go.click, text.submit], begin, text, outputs, **QUEUED)
    for links in (tokens, strongest):
        links.select(change, look, outputs, trigger_mode="always_last", **QUEUED)
    return strongest


def first_look(served: Served, index: LatentIndex, text: str) -> Look:
    """The look with which the page opens: at the token on which an interesting latent comes closest to its highest."""
    look, interesting = look_at(served, text), set(interesting_latents(index))
    nearest = max(
        (
            (activation / index.highest[latent], i, latent)
            for i, latents in enumerate(look.latents)
            for latent, activation in latents
            if latent in interesting
        ),
        default=None,
    )
    return look if nearest is None else at_token(served, look, nearest[1])._replace(latent=nearest[2])


# ---- Latents


def latents_tab(served: Served, index: LatentIndex) -> tuple[gr.HTML, gr.HTML]:
    """Returns the list of latents and the card."""
    with gr.Row():
        with gr.Column(scale=1, min_width=340):
            with gr.Row():
                query = gr.Textbox(label="Search the meanings", placeholder="words, or a latent's number", scale=2)
                sort = gr.Dropdown(list(SORTS), value=SORTS[0], label="Sort by", scale=1, min_width=110)
            rows, where = map(markup, list_html(index, "", SORTS[0], 0, _N_ROWS))
            with gr.Row():
                before, after = gr.Button("Previous", size="sm"), gr.Button("Next", size="sm")
        with gr.Column(scale=1, min_width=340):
            first = [row["latent"] for row in index.search(limit=1)]
            card = markup("".join(steerable_card_html(index, latent) for latent in first), elem_classes="side-card")
    offset = gr.State(0)

    def find(query: str, sort: Sort, offset: int, step: int) -> tuple[str, str, int]:
        last = max(0, (index.count(query) - 1) // _N_ROWS * _N_ROWS)
        offset = min(max(0, offset + step * _N_ROWS), last)
        return *list_html(index, query, sort, offset, _N_ROWS), offset

    outputs = [rows, where, offset]
    first = lambda query, sort: find(query, sort, 0, 0)
    gr.on([query.change, sort.change], first, [query, sort], outputs, trigger_mode="always_last", **QUICK)
    for button, step in ((before, -1), (after, 1)):
        button.click(functools.partial(find, step=step), [query, sort, offset], outputs, **QUICK)
    return rows, card


# ---- Chat


def chat_tab(served: Served, controls: Controls) -> None:
    try:
        check_chat(served.opened.tokenizer)
    except InputError as error:
        markup(status_html(str(error)))
        return
    dialogue = gr.State([])
    system = gr.Textbox(label="System message", placeholder="none")
    steers = "What is chosen in the panel steers the answers." if controls.inputs else ""
    shown = gr.Chatbot(show_label=False, height=420, render_markdown=False, buttons=[], placeholder=steers)
    message = gr.Textbox(examples_for(served).message, label="Message", placeholder="write, then Enter")
    with gr.Row(elem_classes="buttons"):
        go = gr.Button("Send", variant="primary", scale=0)
        stop, clear = gr.Button("Stop", scale=0), gr.Button("New dialogue", scale=0)
        status = markup(status_html(_NO_CHAT_MODEL if served.opened.choice.is_embedded else ""))
    sampling = sampling_inputs(served, first_sampling(served, 200))

    def grow(values: Values) -> Iterator[tuple[list[Message], str]]:
        """The growing dialogue, and a line of status."""
        steering = controls.read(values)
        what = (values[dialogue], values[message] or "", values[system] or "")
        grown, forgotten = [], ""
        for answer in at_most_every(_REFRESH_S, chat(served, *what, steering, sampling.read(values))):
            grown = answer.dialogue
            if answer.n_forgotten:
                forgotten = f"The context is full; the first {answer.n_forgotten} messages were forgotten."
            yield grown, status_html(forgotten or "Writing …")
        yield grown, status_html(forgotten)

    inputs = [dialogue, message, system, *sampling, *controls.inputs]

    def run(*values: Any) -> Iterator[tuple[Any, ...]]:
        sent = gr.update(value="")
        with shown_in_the_page():
            for grown, line in unrepeated(grow(dict(zip(inputs, values, strict=True)))):
                yield grown, [turn._asdict() for turn in grown], sent, line
                sent = gr.skip()  # the next message may be half written

    running = gr.on([go.click, message.submit], run, inputs, [dialogue, shown, message, status], **QUEUED)
    stop.click(lambda: status_html("Stopped."), None, status, cancels=[running], **QUICK)
    forget = lambda: ([], [], "")
    gr.on([clear.click, shown.clear], forget, None, [dialogue, shown, status], cancels=[running], **QUICK)


# ---- the server


def open_served(choice: ModelChoice, limits: Limits, vectors: VectorChoice) -> Served:
    """Load everything. Raises InputError for what does not fit together."""
    opened = open_model(choice, needs_sae=choice.sae_path is not None)
    opened = with_control_vectors(opened, vectors)
    index = None
    if opened.sae is not None:
        index = LatentIndex(opened.sae_path, opened.tokenizer, opened.model, opened.sae)
        for line in index.missing:
            print(line, file=sys.stderr)
    engine = Engine(opened.model, max_rows=2 * limits.max_prompts, max_waiting=_MAX_WAITING)
    return Served(opened, limits, index, engine, threading.Lock())


def launch(served: Served, host: str, port: int, share: bool, auth: str | None, max_requests: int) -> None:
    """Serve until Ctrl-C. auth: user:password."""
    user, _, password = (auth or "").partition(":")
    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]  # no font is fetched
    theme = gr.themes.Base(
        primary_hue="orange", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"]
    )
    blocks = build(served)
    blocks.queue(default_concurrency_limit=max_requests)
    try:
        with past_proxies(f"{host},127.0.0.1,localhost" if share else "*"):  # sharing needs gradio.live
            _, local, public = blocks.launch(
                server_name=host,
                server_port=port,
                share=share,
                auth=(user, password) if auth else None,
                theme=theme,
                css=page_css(),
                ssr_mode=False,
                quiet=True,
                footer_links=[],
                run_history=False,
                max_file_size="1kb",  # nothing here takes files
                prevent_thread_lock=True,
            )
    except OSError:  # another program took the port meanwhile
        raise InputError(
            f"{host}:{port} was taken by another program while the model was loading; choose another --port."
        ) from None
    except (ImportError, ValueError) as error:
        if not share:
            raise
        raise InputError(f"--share cannot use this proxy ({error}); unset ALL_PROXY, or leave --share out.") from None
    print(f"Ready: {local}" + (f" and {public}" if public else "") + " (Ctrl-C ends it)", flush=True)
    blocks.block_thread()
    served.engine.close()
    served.engine.join()


def check_access(auth: str | None, share: bool) -> None:
    if auth is not None and not re.fullmatch("[^:]+:.+", auth):
        raise InputError("--auth has no user and password; write it as user:password.")
    if share and auth is None:
        raise InputError("--share lets anyone in; set a password with --auth user:password.")


def free_port(host: str, port: int) -> int:
    """The port, or, for 0, one that is free. Raises InputError where it is not."""
    try:
        with socket.create_server((host, port)) as server:
            return server.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]
        raise InputError(f"Cannot listen on {host}:{port} ({reason}); choose another --port or --host.") from None


def main() -> None:
    config = parse_constants(globals())
    check_access(config.auth, config.share)
    port = free_port(config.host, config.port)
    choice, vectors = taken_from(vars(config), ModelChoice), taken_from(vars(config), VectorChoice)
    print(f"Loading {choice.name} ...", file=sys.stderr, flush=True)
    served = open_served(choice, Limits(config.max_prompts, config.max_prompt_chars, config.max_new_tokens), vectors)
    launch(served, config.host, port, config.share, config.auth, config.max_requests)


if __name__ == "__main__":
    run(main)
