"""The page's requests to a shared model: checked against the limits, and continued together."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from latents.index import LatentIndex, pieces
from llama_3.chat import Message, encode_dialogue
from llama_3.generation import check_context, check_temperature, encode_text
from llama_3.tokenizer import TextStream
from microscope.attribution import Outlook, latents_add, outlook
from pipeline.errors import InputError
from serving.engine import Ended, Engine, Row
from serving.steered_model import Sampling, SteeredModel, strongest_latents
from serving.steering import Steering

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    max_prompts: int
    max_prompt_chars: int  # of a prompt, text or message
    max_new_tokens: int


@dataclass(frozen=True)
class Served:
    """What all requests share, read-only."""

    opened: SteeredModel
    limits: Limits
    index: LatentIndex | None  # None without an SAE
    engine: Engine  # continues all completions and answers together
    lock: threading.Lock  # held while a text or a card is read with the model, so that only one is at a time


# ---- checks


def check_sampling(served: Served, sampling: Sampling) -> None:
    """Raise InputError for what no slider allows: an empty number box, or values that a program sent."""
    bounds = {
        "Temperature": (sampling.temperature, 0, 10),
        "Top-p": (sampling.top_p, 0, 1),
    }
    for name, (number, least, most) in bounds.items():
        if not isinstance(number, (int, float)) or not least <= number <= most:
            raise InputError(f"{name} must be a number from {least} to {most}; correct it.")
    whole = {
        "Tokens": (sampling.max_new_tokens, 1, served.limits.max_new_tokens),
        "The seed": (sampling.seed, 0, 2**32 - 1),
    }
    for name, (number, least, most) in whole.items():
        if type(number) is not int or not least <= number <= most:
            raise InputError(f"{name} must be a whole number from {least} to {most}; correct it.")


def check_length(served: Served, text: str, what: str) -> None:
    most = served.limits.max_prompt_chars
    if len(text) > most:
        raise InputError(f"{what} has {len(text):,} characters, but the limit is {most:,}; shorten it.")


def prompts_in(lines: Iterable[str]) -> list[str]:
    """The lines that are not empty, without line ends and a byte order mark."""
    return [prompt for line in lines if (prompt := line.rstrip("\r\n").removeprefix("\ufeff")).strip()]


def prompts_of(served: Served, text: str) -> list[str]:
    """The prompts, one per line. Raises InputError if there are none, too many, or too long ones."""
    prompts = prompts_in(text.split("\n"))
    if not prompts:
        raise InputError("There is no prompt; write at least one line.")
    if len(prompts) > served.limits.max_prompts:
        raise InputError(
            f"There are {len(prompts)} prompts, but the limit is {served.limits.max_prompts}; remove some."
        )
    for number, prompt in enumerate(prompts, 1):
        check_length(served, prompt, f"Prompt {number}")
    return prompts


# ---- growing texts


def growing(served: Served, rows: Sequence[Row]) -> Iterator[list[str]]:
    """The texts of all rows, whenever one of them has grown or ended. Raises the error of a row that fails."""
    streams = [TextStream(served.opened.tokenizer, row.prompt) for row in rows]
    texts = [""] * len(rows)
    for number, event in served.engine.stream(rows):
        if isinstance(event, Ended):
            if event.error is not None:
                raise event.error
            texts[number] += streams[number].end()
        else:
            texts[number] += streams[number].add(event.id)
        yield texts[:]


def at_most_every(seconds: float, values: Iterable[T]) -> Iterator[T]:
    """The first value at once, later ones no more often than this, and always the last."""
    shown_at, waiting = 0.0, []
    for value in values:
        if time.monotonic() - shown_at > seconds:
            yield value
            shown_at, waiting = time.monotonic(), []
        else:
            waiting = [value]
    yield from waiting


# ---- requests


def completions(
    served: Served, prompts: Sequence[str], steering: Steering, sampling: Sampling
) -> Iterator[dict[str, list[str]]]:
    """The growing completions of every prompt, clean and, if anything steers, steered, from the same seeds.

    Raises InputError before the first step if something cannot be completed.
    """
    model, tokenizer = served.opened.model, served.opened.tokenizer
    check_sampling(served, sampling)
    check_temperature(sampling.temperature)
    encoded = [encode_text(tokenizer, prompt) for prompt in prompts]
    for number, prompt in enumerate(encoded, 1):
        try:
            check_context(model, len(prompt), sampling.max_new_tokens)
        except InputError as error:
            raise InputError(f"Prompt {number}: {error}") from None
    interventions = {"clean": []}
    if steered := served.opened.interventions(steering):
        interventions["steered"] = steered
    n = len(prompts)
    rows = [row for each in interventions.values() for row in served.opened.rows(encoded, sampling, 0, each)]
    for texts in growing(served, rows):
        yield {kind: texts[i * n : (i + 1) * n] for i, kind in enumerate(interventions)}


class Answer(NamedTuple):
    dialogue: list[Message]  # with the message and its answer so far
    n_forgotten: int  # oldest messages that no longer fit the context


def chat(
    served: Served,
    dialogue: Sequence[Message],
    message: str,
    system: str,
    steering: Steering,
    sampling: Sampling,
) -> Iterator[Answer]:
    """The dialogue with the message and its growing answer. Raises InputError before the first step for bad input."""
    if not message.strip():
        raise InputError("There is no message; write one.")
    check_length(served, message, "The message")
    check_length(served, system, "The system message")
    check_sampling(served, sampling)
    check_temperature(sampling.temperature)
    model, tokenizer, date = served.opened.model, served.opened.tokenizer, served.opened.date
    first = [Message("system", system)] if system.strip() else []
    length = lambda messages: len(encode_dialogue(tokenizer, [*first, *messages], date))
    question = Message("user", message)
    check_context(model, length([question]), sampling.max_new_tokens)
    read = [*dialogue, question]  # the part that the model reads
    while length(read) + sampling.max_new_tokens > model.args.max_seq_len:
        del read[:2]
    n_forgotten = len(dialogue) + 1 - len(read)
    prompt = encode_dialogue(tokenizer, [*first, *read], date)
    number = len(dialogue) // 2  # each answer has another seed
    rows = served.opened.rows([prompt], sampling, number, served.opened.interventions(steering))
    for (text,) in growing(served, rows):
        yield Answer([*dialogue, question, Message("assistant", text)], n_forgotten)


class Look(NamedTuple):
    """A text as the model and the SAE see it."""

    tokens: list[str]
    latents: list[list[tuple[int, float]]]  # of each token, with activations, strongest first
    token: int | None = None  # the one whose latents are listed
    latent: int | None = None  # the one that colours the text
    outlook: Outlook | None = None  # of each token; None where latents add nothing to the next token directly
    adds: Sequence[float] = ()  # what the listed latents add to the logit of the token that follows


def look_at(served: Served, text: str) -> Look:
    """The first look at a text. Raises InputError if it is empty or too long."""
    if not text.strip():
        raise InputError("There is no text; write something to look at.")
    check_length(served, text, "The text")
    opened = served.opened
    ids = encode_text(opened.tokenizer, text)
    check_context(opened.model, len(ids), 0)
    with served.lock:
        rows = [latents for _, latents in strongest_latents(opened, ids)]
        ahead = outlook(opened.model, ids, opened.need_sae())
    skipped = int(ids[0] == opened.tokenizer.bos_id)  # no SAE here was trained on begin-of-text
    if ahead is not None:
        ahead = Outlook(ahead.answers[skipped:], ahead.probabilities[skipped:], ahead.scales[skipped:])
    return Look(pieces(opened.tokenizer, ids[skipped:]), rows[skipped:], outlook=ahead)


def at_token(served: Served, look: Look, token: int) -> Look:
    """The look with one token's latents listed, and what each adds to the logit of the likeliest next token."""
    look = look._replace(token=token, adds=())
    if look.outlook is None:
        return look
    with served.lock:
        opened = served.opened
        answer, scale = look.outlook.answers[token], look.outlook.scales[token]
        return look._replace(adds=latents_add(opened.model, opened.need_sae(), look.latents[token], answer, scale))
