"""The page's tab Microscope: a prompt through the lens, its heads' attention, ablation, patching.

Each instrument says what it costs before it runs. Sweeps take turns with other requests, layer by layer.
"""

import html
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import gradio as gr
import torch
from torch import Tensor

from microscope import ablation, attention, patching
from microscope.attention_page import attention_html
from microscope.lens import LensLayer, logit_lens
from microscope.prompts import Prompt, continuation, read_prompt, token_text
from microscope.sweeps import seconds_per_variant
from pipeline.errors import InputError
from pipeline.progress import duration
from serving.microscope_html import (
    frame_html,
    heat_html,
    lens_detail_html,
    lens_html,
    likeliest_html,
    strongest_cells_html,
)
from serving.page_html import clicked, status_html
from serving.page_parts import QUEUED, markup, shown_in_the_page
from serving.requests import Served, check_length

T = TypeVar("T")

MOST_TOKENS = 64  # of a prompt: a map has a column for each
_N_LIKELIEST = 10
_NEW_TOKENS = 16  # written with a head switched off
_KINDS = ("resid_pre", "resid_mid", "resid_post", "attention_out", "mlp_out")
_EXAMPLES = {True: ("The file is", "The line is"), False: ("The capital of France is", "The capital of Italy is")}


class View(NamedTuple):
    """A prompt that was read."""

    prompt: Prompt
    lens: list[LensLayer]
    reading_s: float  # what lens and attention took
    variant_s: float  # what a variant of the prompt takes in a sweep


def read(served: Served, text: str) -> tuple[View, str]:
    """A prompt through the lens, and the page with its attention. Raises InputError for an empty or long prompt."""
    model = served.opened.model
    prompt = prompt_of(served, text, "The prompt")
    with served.lock:
        variant_s = seconds_per_variant(model, prompt)
        started = time.perf_counter()
        layers = logit_lens(model, prompt, "resid_post", _N_LIKELIEST)
        patterns = attention.patterns(model, prompt, list(range(model.args.n_layers)))
        view = View(prompt, layers, time.perf_counter() - started, variant_s)
    return view, frame_html(attention_html(patterns, prompt.tokens), "Attention of every head")


def prompt_of(served: Served, text: str, what: str) -> Prompt:
    if not text.strip():
        raise InputError(f"{what} is empty; write something.")
    check_length(served, text, what)
    prompt = read_prompt(served.opened.model, served.opened.tokenizer, text)
    if len(prompt.ids) > MOST_TOKENS:
        raise InputError(
            f"{what} has {len(prompt.ids)} tokens, but maps here have at most {MOST_TOKENS} columns; shorten it, or "
            "use llama_3_microscope.py."
        )
    return prompt


def costs(served: Served, view: View) -> dict[str, float]:
    """Seconds that each instrument takes, from those measured on this prompt."""
    args = served.opened.model.args
    half = view.variant_s / 2  # on average, a variant begins in the middle of the model
    return {
        "lens and attention": view.reading_s,
        "every head switched off": args.n_layers * args.n_heads * half,
        "patching every layer and token": args.n_layers * len(view.prompt.ids) * half,
    }


def costs_html(served: Served, view: View) -> str:
    said = "; ".join(f"{name} {in_seconds(seconds)}" for name, seconds in costs(served, view).items())
    return status_html(f"{len(view.prompt.ids)} tokens. On this machine: {said}.")


def in_seconds(seconds: float) -> str:
    return "about " + (duration(seconds) if seconds >= 60 else f"{max(0.1, seconds):.2g} s")


# ---- sweeps


def by_turns(served: Served, steps: Iterator[T]) -> Iterator[T]:
    """Each step while no other request reads with the model."""
    while True:
        with served.lock:
            step = next(steps, None)
        if step is None:
            return
        yield step


def heads_off(served: Served, view: View) -> Iterator[tuple[Tensor, str]]:
    """The growing map of what the likeliest token loses without each head, (n_layers, n_heads), NaN where it is not
    known yet; and that token."""
    args = served.opened.model.args
    clean = ablation.effect(served.opened.model, view.prompt)
    answer = int(clean.log_p.argmax())
    drops = torch.full((args.n_layers, args.n_heads), torch.nan)
    sweep = ablation.every_head(served.opened.model, view.prompt, "zero")
    for layer, effects in enumerate(by_turns(served, sweep)):
        drops[layer] = torch.tensor([float(clean.log_p[answer] - each.log_p[answer]) for each in effects])
        yield drops, token_text(served.opened.tokenizer, answer)


def without_head_html(served: Served, view: View, number: int) -> str:
    """What the model says and writes without a head, beside what it says with it."""
    model, tokenizer = served.opened.model, served.opened.tokenizer
    name = ablation.head_name(number, model.args.n_heads)
    off = ablation.Ablation(heads=ablation.parse_heads([name], model))
    parts = [f"<h4>Without head {name}</h4>"]
    with served.lock:
        for what, each in (("whole", ablation.Ablation()), (f"without {name}", off)):
            best = ablation.effect(model, view.prompt, each).log_p.topk(3)
            with ablation.ablated(model, each):
                written = continuation(model, tokenizer, view.prompt.ids, _NEW_TOKENS)
            said = likeliest_html(tokenizer, best.indices.tolist(), best.values.exp().tolist())
            parts.append(f"<p class='status'>{what}</p>{said}<p>… {html.escape(written)}</p>")
    return "".join(parts)


def patched(served: Served, view: View, other: str, kind: str, answers: list[str]) -> Iterator[tuple[Tensor, str]]:
    """The growing patch map, (n_layers, seq), and what is measured. Raises InputError for prompts that do not align."""
    model, tokenizer = served.opened.model, served.opened.tokenizer
    if kind not in _KINDS:
        raise InputError(f"{kind!r} is not a site; choose one of {', '.join(_KINDS)}.")
    corrupted = prompt_of(served, other, "The other prompt")
    with served.lock:
        contrast = patching.contrast_of(model, tokenizer, view.prompt, corrupted, answers)
        ends = contrast.ends(model)
    answer, against = (token_text(tokenizer, each) for each in (contrast.answer, contrast.other))
    what = f"logit of {answer} minus {against}: {ends[0]:.2f} after the prompt, {ends[1]:.2f} after the other"
    found = torch.full((model.args.n_layers, len(view.prompt.ids)), torch.nan)
    sites = [f"layers.{i}.{kind}" for i in range(model.args.n_layers)]
    for layer, row in enumerate(by_turns(served, patching.patch_rows(model, contrast, sites, ends))):
        found[layer] = row
        yield found, what


# ---- the tab


def microscope_tab(served: Served) -> None:
    tokenizer = served.opened.tokenizer
    first, second = _EXAMPLES[served.opened.choice.is_embedded]
    example, frame = read(served, first)
    view, chosen = gr.State(example), gr.State(last_cell(example))
    text = gr.Textbox(first, label="Prompt", lines=1, max_lines=4)
    with gr.Row(elem_classes="buttons"):
        go = gr.Button("Read", variant="primary", scale=0)
        cost = markup(costs_html(served, example))
    with gr.Tabs():
        with gr.Tab("Lens"):
            markup(status_html("What the model would say next if it ended after a layer. Click a cell."))
            with gr.Row():
                with gr.Column(scale=3, min_width=340):
                    lens = markup(lens_html(tokenizer, example.prompt, example.lens, last_cell(example)))
                with gr.Column(scale=1, min_width=220):
                    detail = markup(
                        lens_detail_html(tokenizer, example.prompt, example.lens, last_cell(example)),
                        elem_classes="side",
                    )
        with gr.Tab("Attention"):
            patterns = gr.HTML(frame, apply_default_css=False)
        with gr.Tab("Ablation"):
            ablate = gr.Button("Switch off every head", variant="primary", scale=0)
            heads_status = markup(status_html("What the likeliest next token loses without each head alone."))
            with gr.Row():
                with gr.Column(scale=3, min_width=340):
                    heads = markup()
                with gr.Column(scale=1, min_width=260):
                    without = markup(elem_classes="side")
        with gr.Tab("Patching"):
            with gr.Row():
                other = gr.Textbox(second, label="Another prompt of as many tokens", scale=2)
                answers = [
                    gr.Textbox(label=f"Answer after the {each}", placeholder="the likeliest token", min_width=120)
                    for each in ("prompt", "other")
                ]
                kind = gr.Dropdown(list(_KINDS), value="resid_pre", label="Site", min_width=120)
            patch = gr.Button("Patch every layer and token", variant="primary", scale=0)
            patch_status = markup(
                status_html("The other prompt runs with one activation of the prompt in the place of its own.")
            )
            with gr.Row():
                with gr.Column(scale=3, min_width=340):
                    restored = markup()
                with gr.Column(scale=1, min_width=260):
                    strongest = markup(elem_classes="side")

    def begin(text: str) -> tuple[Any, ...]:
        with shown_in_the_page():
            found, frame = read(served, text or "")
        cell = last_cell(found)
        pictures = [html_of(tokenizer, found.prompt, found.lens, cell) for html_of in (lens_html, lens_detail_html)]
        return found, cell, costs_html(served, found), *pictures, frame, "", "", "", ""

    outputs = [view, chosen, cost, lens, detail, patterns, heads, without, restored, strongest]
    gr.on([go.click, text.submit], begin, text, outputs, **QUEUED)

    def look(view: View, event: gr.EventData) -> tuple[Any, ...]:
        with shown_in_the_page():
            kind, cell = clicked(event.value)
            if kind != "lens" or cell >= len(view.lens) * len(view.prompt.ids):
                return gr.skip(), gr.skip()
        return tuple(html_of(tokenizer, view.prompt, view.lens, cell) for html_of in (lens_html, lens_detail_html))

    lens.select(look, view, [lens, detail], trigger_mode="always_last", **QUEUED)

    def switch_off(view: View) -> Iterator[tuple[Any, ...]]:
        args = served.opened.model.args
        columns = [str(i) for i in range(args.n_heads)]
        names = [f"head {ablation.head_name(i, args.n_heads)}" for i in range(args.n_layers * args.n_heads)]
        with shown_in_the_page():
            for drops, answer in heads_off(served, view):
                done = int((~drops[:, 0].isnan()).sum())
                about = f"Log probability that {answer} loses without each head; {done} of {args.n_layers} layers."
                if done == args.n_layers:
                    about = f"Log probability that {answer} loses without each head. Click one."
                listed = strongest_cells_html(drops, names, f"What {answer} loses most without")
                yield heat_html(drops, columns, "head"), listed, status_html(about)

    ablate.click(switch_off, view, [heads, without, heads_status], **QUEUED)

    def without_head(view: View, event: gr.EventData) -> Any:
        args = served.opened.model.args
        with shown_in_the_page():
            kind, number = clicked(event.value)
            if kind != "head" or number >= args.n_layers * args.n_heads:
                return gr.skip()
            return without_head_html(served, view, number)

    heads.select(without_head, view, without, trigger_mode="always_last", **QUEUED)

    def restore(view: View, other: str, kind: str, *answers: str) -> Iterator[tuple[Any, ...]]:
        n_layers = served.opened.model.args.n_layers
        names = [f"layer {i}, {token}" for i in range(n_layers) for token in view.prompt.tokens]
        with shown_in_the_page():
            given = [each for each in answers if each]
            if answers[1] and not answers[0]:
                raise InputError("There is only an answer after the other prompt; write both, or none.")
            for found, what in patched(served, view, other or "", kind, given):
                done = int((~found[:, 0].isnan()).sum())
                about = f"Share restored of the {what}." + (
                    "" if done == n_layers else f" {done} of {n_layers} layers."
                )
                listed = strongest_cells_html(found, names, "What restores most")
                yield heat_html(found, view.prompt.tokens), listed, status_html(about)

    patch.click(restore, [view, other, kind, *answers], [restored, strongest, patch_status], **QUEUED)


def last_cell(view: View) -> int:
    """The number of the last layer's last token in the lens."""
    return len(view.lens) * len(view.prompt.ids) - 1
