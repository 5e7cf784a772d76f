"""Heads and layers switched off, and what the model then says.

Zero takes away everything that a head writes; mean keeps what it writes on average over the positions of the prompt,
and takes away only what depends on the place.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_3.model import Intervention, Transformer
from microscope.prompts import Prompt
from microscope.sweeps import Sweep
from pipeline.errors import InputError

Value = Literal["zero", "mean"]


class Ablation(NamedTuple):
    """What is switched off."""

    heads: Mapping[int, Sequence[int]] = {}  # layer -> heads
    attention_layers: Sequence[int] = ()
    mlp_layers: Sequence[int] = ()
    value: Value = "zero"


class Effect(NamedTuple):
    """What an ablated model says."""

    log_p: Tensor  # (vocab_size,) of the token after the prompt
    losses: Tensor  # (seq - 1,) nats of each of the prompt's own tokens, from the second on

    @property
    def loss(self) -> float:
        """Nats per token of the prompt itself."""
        return float(self.losses.mean()) if len(self.losses) else 0.0


def parse_heads(texts: Sequence[str], model: Transformer) -> dict[int, list[int]]:
    """Layer -> heads, from texts such as 3.1: layer 3, head 1. Raises InputError for other texts and missing heads."""
    heads: dict[int, list[int]] = {}
    for text in texts:
        layer, dot, head = text.partition(".")
        if not (dot and layer.isdecimal() and head.isdecimal()):
            raise InputError(f"{text!r} is not a head; write LAYER.HEAD, such as 3.1.")
        check_layers([int(layer)], model)
        if int(head) >= model.args.n_heads:
            raise InputError(f"There is no head {text}; layers have heads 0 to {model.args.n_heads - 1}.")
        heads.setdefault(int(layer), []).append(int(head))
    return heads


def head_name(i: int, n_heads: int) -> str:
    """The name of the i-th of all heads, layer by layer."""
    return f"{i // n_heads}.{i % n_heads}"


def check_layers(layers: Sequence[int], model: Transformer) -> None:
    for layer in layers:
        if not 0 <= layer < model.args.n_layers:
            raise InputError(f"There is no layer {layer}; this model has layers 0 to {model.args.n_layers - 1}.")


def all_but(kept: Mapping[int, Sequence[int]], n_heads: int) -> dict[int, list[int]]:
    """For the layers of `kept`: every head that is not kept."""
    return {layer: [head for head in range(n_heads) if head not in heads] for layer, heads in kept.items()}


def replacement(value: Value) -> Callable[[Tensor], Tensor]:
    """(batch, seq, ...) -> the same shape, zero or the mean over the positions."""
    return torch.zeros_like if value == "zero" else lambda x: x.mean(1, keepdim=True).expand_as(x)


@contextlib.contextmanager
def ablated(model: Transformer, ablation: Ablation) -> Iterator[None]:
    """The model without these heads and layers, inside the with block."""
    fn = replacement(ablation.value)
    interventions = [
        *(Intervention(f"layers.{i}.head_out", fn, heads=heads) for i, heads in ablation.heads.items()),
        *(Intervention(f"layers.{i}.attention_out", fn) for i in ablation.attention_layers),
        *(Intervention(f"layers.{i}.mlp_out", fn) for i in ablation.mlp_layers),
    ]
    with contextlib.ExitStack() as stack:
        for each in interventions:
            stack.enter_context(model.intervene(*each))
        yield


@torch.inference_mode()
def effect(model: Transformer, prompt: Prompt, ablation: Ablation = Ablation()) -> Effect:  # noqa: B008
    with ablated(model, ablation):
        logits = model(prompt.batch(model))
    return effects_of(logits, prompt)[0]


def effects_of(logits: Tensor, prompt: Prompt) -> list[Effect]:
    """logits: (rows, seq, vocab_size), of variants of a model on one prompt."""
    targets = torch.tensor(prompt.ids[1:], device=logits.device)
    effects = []
    for row in logits:  # one after the other: log_softmax needs as much memory again
        log_p = row.log_softmax(-1)
        effects.append(Effect(log_p[-1].cpu(), F.nll_loss(log_p[:-1], targets, reduction="none").cpu()))
    return effects


def every_head(model: Transformer, prompt: Prompt, value: Value) -> Iterator[list[Effect]]:
    """The effect of each head alone, layer by layer."""
    sweep = Sweep(model, prompt)
    fn = replacement(value)
    for layer in range(model.args.n_layers):
        effects = []
        for heads in torch.arange(model.args.n_heads).split(sweep.n_rows):

            def switch_off(x: Tensor, heads: Tensor = heads) -> Tensor:
                rows = torch.arange(len(heads))
                x[rows, :, heads] = fn(x)[rows, :, heads]
                return x

            effects += effects_of(sweep.logits(f"layers.{layer}.head_out", switch_off, len(heads)), prompt)
        yield effects
