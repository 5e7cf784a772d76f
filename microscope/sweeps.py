"""Many variants of one prompt, computed together from where they begin to differ.

A variant changes activations at one site, so every layer before it is the prompt's own: it resumes there. Tokens before
the first that any variant changes are the prompt's own in every layer: their keys and values are computed once.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from llama_3.model import Cache, LayerCache, Resume, Transformer
from microscope.prompts import Prompt

_TOKENS = 512  # of all variants computed together


class Sweep:
    """A prompt's own run, from which variants of it continue."""

    def __init__(self, model: Transformer, prompt: Prompt, first: int = 0):
        """first: the first position that variants may change; activations before it stay as they are."""
        self.model, self.first = model, first
        tokens = prompt.batch(model)
        self.tokens = tokens[:, first:]
        self.n_rows = max(1, _TOKENS // self.tokens.shape[1])  # variants computed together
        with torch.inference_mode():
            inputs = model.activations(tokens, [f"layers.{i}.resid_pre" for i in range(model.args.n_layers)])
            self.inputs = [x[:, first:] for x in inputs.values()]  # of each layer, (1, seq - first, d_model)
            self.layers: list[LayerCache] = []  # with room for n_rows variants
            if first:
                own = model.new_cache(1, first)
                model(tokens[:, :first], own, last_only=True)
                self.layers = model.new_cache(self.n_rows, len(prompt.ids)).layers
                for layer, known in zip(self.layers, own.layers, strict=True):
                    layer.keys[:, :first], layer.values[:, :first] = known.keys, known.values

    @torch.inference_mode()
    def logits(self, site: str, fn: Callable[[Tensor], Tensor], n_rows: int, last_only: bool = False) -> Tensor:
        """(n_rows, seq - first, vocab_size), of as many variants, at most self.n_rows.

        fn: activations at `site`, (n_rows, seq - first, ...) -> the variants', same shape.
        """
        layer = int(site.split(".")[1])
        cache = None
        if self.first:
            cache = Cache([LayerCache(each.keys[:n_rows], each.values[:n_rows]) for each in self.layers])
            cache.length = self.first
        resume = Resume(layer, self.inputs[layer].expand(n_rows, -1, -1))
        with self.model.intervene(site, fn):
            return self.model(self.tokens.expand(n_rows, -1), cache, last_only=last_only, resume=resume)


def seconds_per_variant(model: Transformer, prompt: Prompt) -> float:
    """What a variant that begins at the first layer takes in a batch of them, measured."""
    n_rows = min(8, max(1, _TOKENS // len(prompt.ids)))
    with torch.inference_mode():
        model(prompt.batch(model), last_only=True)  # the first pass of all also packs the weights
        started = time.perf_counter()
        model(prompt.batch(model, n_rows))
    return (time.perf_counter() - started) / n_rows
