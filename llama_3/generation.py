"""Generate text: sampling, streams of tokens and of text, batches of prompts of any lengths."""

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llama_3.chat import Message, encode_dialogue
from llama_3.model import Intervention, Transformer
from llama_3.tokenizer import TextStream, Tokenizer
from pipeline.errors import InputError

_LOWEST_TEMPERATURE = 1e-30  # logits divided by it stay finite in float32
_LIKELIEST = 256  # tokens looked at first; more than 99.9 % of a fluent model's probability


def sample(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """One token per row: nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751) with given random numbers.

    logits: (batch, vocab_size); uniform: (batch,) in [0, 1). Returns (batch,). temperature 0 takes the largest logit.
    """
    if temperature == 0:
        return logits.argmax(-1)
    return _sample_among(_LIKELIEST, logits.float(), temperature, top_p, uniform)


def _sample_among(n: int, logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """`sample`, looking at the n likeliest tokens first: the answer nearly always lies among them, and sorting a whole
    vocabulary would take most of the time."""
    if n >= logits.shape[-1]:
        return _sample_sorted(logits, temperature, top_p, uniform)
    highest, tokens = logits.topk(n, dim=-1)
    largest = highest[:, :1]
    total = (logits - largest).div_(temperature).exp_().sum(-1, keepdim=True)  # in place: fresh memory costs more
    cumulative = ((highest - largest).double().div_(temperature).exp_() / total).cumsum(-1)
    whole = top_p >= 1
    mass = cumulative.new_ones(len(logits)) if whole else _nucleus_mass(cumulative, top_p)
    wanted = uniform.to(cumulative) * mass
    place = torch.searchsorted(cumulative, wanted[:, None], right=True).squeeze(-1)
    chosen = tokens.gather(-1, place.clamp(max=n - 1)[:, None]).squeeze(-1)
    beyond = place >= n if whole else cumulative[:, -1] < top_p
    if beyond.any():  # waits for a GPU; only these rows are looked at again
        chosen[beyond] = _sample_among(16 * n, logits[beyond], temperature, top_p, uniform[beyond])
    return chosen


def _nucleus_mass(cumulative: Tensor, top_p: float) -> Tensor:
    """(batch,) probability of the fewest likeliest tokens that together have top_p. cumulative: (batch, n), likeliest
    first."""
    last = (cumulative < top_p).sum(-1, keepdim=True).clamp(max=cumulative.shape[-1] - 1)
    return cumulative.gather(-1, last).squeeze(-1)


def _sample_sorted(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """`sample` by sorting the whole vocabulary."""
    probs, tokens = (logits.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probs.cumsum(-1)
    mass = _nucleus_mass(cumulative, top_p)
    place = torch.searchsorted(cumulative, (uniform.to(probs) * mass)[:, None], right=True)
    return tokens.gather(-1, place.clamp(max=logits.shape[-1] - 1)).squeeze(-1)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_tokens: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    steering: Intervention | Sequence[Intervention] | None = None,
) -> Iterator[list[int | None]]:
    """Stream the next token of every prompt, None for one that has stopped.

    prompts: token ids, of any lengths, each at least one. seeds: one per prompt; a prompt's samples depend on its seed,
    not on its neighbours. steering: for `model.intervene`, in force in this call only; several act in their order.
    Raises InputError where the longest prompt and the new tokens do not fit the model's context, for a temperature
    that cannot be divided by, and where the model gives no finite numbers.
    """
    check_temperature(temperature)
    batch, longest = len(prompts), max(map(len, prompts))
    check_context(model, longest, max_new_tokens)
    device = model.device
    n_pad = None  # rows of one length need no mask
    if min(map(len, prompts)) < longest:
        n_pad = torch.tensor([longest - len(p) for p in prompts], device=device)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    generators = [torch.Generator().manual_seed(s) for s in (seeds or range(batch))]
    cache = model.new_cache(batch, longest + max_new_tokens)
    stops = set(stop_tokens)
    alive = [True] * batch
    interventions = [steering] if isinstance(steering, Intervention) else list(steering or ())
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            with contextlib.ExitStack() as stack:
                for each in interventions:
                    stack.enter_context(model.intervene(*each))
                logits = model(tokens, cache, n_pad, last_only=True)[:, 0]
            if not says_something(logits).all():
                raise overflow(is_steered=bool(interventions))
            uniform = torch.stack([torch.rand((), generator=g) for g in generators])
            tokens = sample(logits, temperature, top_p, uniform.to(device))[:, None]
        step: list[int | None] = []
        for row, token in enumerate(tokens[:, 0].tolist()):
            alive[row] = alive[row] and token not in stops
            step.append(token if alive[row] else None)
        if not any(alive):
            return
        yield step


def says_something(logits: Tensor) -> Tensor:
    """(batch,) bool: whether a row of logits, (batch, vocab_size), says anything about the next token. Rows that are
    NaN, infinite or all equal, as after an overflow, do not."""
    lowest, highest = logits.amin(-1), logits.amax(-1)  # on a CPU twice as fast as aminmax
    return (lowest < highest) & lowest.isfinite() & highest.isfinite()


def overflow(is_steered: bool) -> InputError:
    """The error for logits that say nothing."""
    what = "steered model" if is_steered else "model"
    first = "lower the strength, or " if is_steered else ""
    return InputError(
        f"The {what} computes logits that are NaN, infinite or all equal; {first}check the checkpoint, or use float32."
    )


def check_temperature(temperature: float) -> None:
    """Raise InputError for a temperature that logits cannot be divided by."""
    if temperature != 0 and not _LOWEST_TEMPERATURE <= temperature < math.inf:
        raise InputError(
            f"A temperature of {temperature:g} cannot be used; write 0 for always the most likely token, or at "
            f"least {_LOWEST_TEMPERATURE:g}."
        )


def check_context(model: Transformer, n_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise InputError if prompt and new tokens exceed the model's context."""
    if n_prompt_tokens + max_new_tokens > model.args.max_seq_len:
        raise InputError(
            f"A prompt of {n_prompt_tokens} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{model.args.max_seq_len}; shorten the prompt or ask for fewer tokens."
        )


def stream(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], **options: Any
) -> Iterator[list[str]]:
    """Stream what each prompt gains, step by step, in whole characters; prompts and options as of `generate`."""
    texts = [TextStream(tokenizer, prompt) for prompt in prompts]
    for step in generate(model, prompts, stop_tokens=tokenizer.stop_ids, **options):
        yield [text.end() if token is None else text.add(token) for text, token in zip(texts, step, strict=True)]
    yield [text.end() for text in texts]


def encode_text(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's token ids, after begin-of-text where the model knows it."""
    if ids := tokenizer.encode(prompt, bos=tokenizer.starts_with_bos):
        return ids
    if tokenizer.bos_id is None:
        raise InputError("This model has no begin-of-text token, so it cannot begin without a prompt; write one.")
    return [tokenizer.bos_id]


def stream_text(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], **options: Any
) -> Iterator[list[str]]:
    """Stream the completions of texts; options as of `generate`."""
    return stream(model, tokenizer, [encode_text(tokenizer, prompt) for prompt in prompts], **options)


def stream_chat(
    model: Transformer,
    tokenizer: Tokenizer,
    dialogues: Sequence[Sequence[Message]],
    date: str | None = None,
    **options: Any,
) -> Iterator[list[str]]:
    """Stream the assistant's next message of each dialogue; date as of `encode_dialogue`, options as of `generate`."""
    return stream(model, tokenizer, [encode_dialogue(tokenizer, d, date) for d in dialogues], **options)


def complete(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], **options: Any) -> list[str]:
    """The whole completions of texts."""
    return ["".join(pieces) for pieces in zip(*stream_text(model, tokenizer, prompts, **options), strict=True)]
