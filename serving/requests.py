"""What a request to the page asks for, checked and carried out."""

import argparse
import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from latents.index import LatentIndex
from llama_3.chat import Message
from llama_3.generation import stream_chat, stream_text
from pipeline.errors import InputError
from serving.steered_model import Setup, prompts_in, seeds_of
from serving.steering import DEFAULT_MODE, make_steering


class Page(NamedTuple):
    """What all requests share; nobody changes it."""

    setup: Setup
    limits: argparse.Namespace  # the options
    index: "LatentIndex | None"  # None without an SAE
    highest: "Tensor | None"  # (n_latents,) each latent's highest observed activation; ones where it is not known
    lock: threading.Lock  # held for one step of the model: requests take turns, torch works on one at a time

    @property
    def is_embedded(self) -> bool:
        return self.limits.llama_model_dir is None


class Steering(NamedTuple):
    """What a request steers with."""

    strengths: Mapping[int, float] = {}
    mode: str = DEFAULT_MODE
    keep_error: bool = True


class Sampling(NamedTuple):
    n_tokens: int
    temperature: float
    top_p: float
    seed: int


def check_sampling(page: Page, sampling: Sampling) -> None:
    """Raise InputError for what no slider allows: a number box is empty, or a program sent something else."""
    numbers = {"tokens": sampling.n_tokens, "temperature": sampling.temperature, "top-p": sampling.top_p}
    most = {"tokens": page.limits.max_new_tokens, "temperature": 10, "top-p": 1}
    least = {"tokens": 1, "temperature": 0, "top-p": 0}
    for name, number in numbers.items():
        if not isinstance(number, (int, float)) or not least[name] <= number <= most[name]:
            raise InputError(f"{name.capitalize()} is a number from {least[name]} to {most[name]}; correct it.")
    if not isinstance(sampling.seed, int) or not 0 <= sampling.seed < 2**32:
        raise InputError(f"The seed is a whole number from 0 to {2**32 - 1}; correct it.")


def check_length(page: Page, text: str, what: str) -> None:
    if len(text) > page.limits.max_prompt_chars:
        raise InputError(
            f"{what} has {len(text):,} characters; {page.limits.max_prompt_chars:,} is the limit here. Shorten it."
        )


def prompts_of(page: Page, text: str) -> list[str]:
    """The prompts, one a line. Raises InputError where there are none, too many, or too long ones."""
    prompts = prompts_in(text.split("\n"))
    if not prompts:
        raise InputError("There is no prompt; write at least one line.")
    if len(prompts) > page.limits.max_prompts:
        raise InputError(f"These are {len(prompts)} prompts; {page.limits.max_prompts} is the limit here.")
    for number, prompt in enumerate(prompts, 1):
        check_length(page, prompt, f"Prompt {number}")
    return prompts


def intervention(page: Page, steering: Steering) -> "tuple[str, Any, tuple[int, ...]] | None":
    """`steering` of llama_3_inference.generate, or None where nothing is steered."""
    if page.setup.sae is None or not steering.strengths:
        return None
    function = make_steering(
        page.setup.sae, steering.strengths, page.highest, mode=steering.mode, keep_error=steering.keep_error
    )
    return page.setup.sae.info["site"], function, (page.setup.tokenizer.bos_id,)


def by_turns(page: Page, steps: Iterator) -> Iterator:
    """Each step computed while no other request's is."""
    while True:
        with page.lock:
            step = next(steps, None)
        if step is None:
            return
        yield step


def at_most_every(seconds: float, values: Iterator) -> Iterator:
    """The first value at once, later ones no faster than this, and the last."""
    shown_at, waiting = 0.0, []
    for value in values:
        if time.monotonic() - shown_at > seconds:
            yield value
            shown_at, waiting = time.monotonic(), []
        else:
            waiting = [value]
    yield from waiting


def completions(
    page: Page, prompts: Sequence[str], steering: Steering, sampling: Sampling
) -> Iterator[dict[str, list[str]]]:
    """The growing completions of every prompt, clean and, with latents, steered, from the same seeds."""
    setup = page.setup
    kinds = {"clean": None}
    if (steered := intervention(page, steering)) is not None:
        kinds["steered"] = steered
    options = {
        "max_new_tokens": sampling.n_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seeds": seeds_of(argparse.Namespace(seed=sampling.seed), len(prompts)),
    }
    streams = [stream_text(setup.model, setup.tokenizer, prompts, steering=how, **options) for how in kinds.values()]
    texts = {kind: [""] * len(prompts) for kind in kinds}
    for steps in by_turns(page, itertools.zip_longest(*streams, fillvalue=[""] * len(prompts))):
        for kind, step in zip(kinds, steps, strict=True):
            texts[kind] = [text + piece for text, piece in zip(texts[kind], step, strict=True)]
        yield texts


def answers(
    page: Page, messages: "Sequence[Message]", n_before: int, steering: Steering, sampling: Sampling
) -> Iterator[str]:
    """The growing answer to a dialogue. n_before: answers given before, so that each is another sample."""
    setup = page.setup
    stream = stream_chat(
        setup.model,
        setup.tokenizer,
        [messages],
        setup.date,
        max_new_tokens=sampling.n_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seeds=seeds_of(argparse.Namespace(seed=sampling.seed), 1, n_before),
        steering=intervention(page, steering),
    )
    text = ""
    for (piece,) in by_turns(page, stream):
        text += piece
        yield text
