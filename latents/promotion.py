"""What a latent makes the model say next, by the logit lens."""

from typing import cast

import torch
from torch import Tensor

from llama_3.model import Transformer, TransformerBlock
from llama_3.tokenizer import Tokenizer


def direct_logits(model: Transformer, directions: Tensor) -> Tensor:
    """What directions in the last residual stream add to the logits, (..., vocab_size), before the last norm divides by
    the stream's length; its linear part. directions: (..., d_model)."""
    return model.output(directions * model.norm.weight)


def promoted_logits(model: Transformer, site: str, directions: Tensor, base: Tensor) -> Tensor:
    """What latents add to the logits of the next token, (n, vocab_size); only differences within a row mean anything.

    directions: (n, d_model) at `site`; base: (d_model,) a typical activation there, such as the SAE's b_pre.
    In the residual stream, and in what is added to it, a direction goes through the last norm's weights and the output
    layer; what later layers do with it is left out. At attention_norm it goes through the layer's values and output
    first, as if every head attended to this token alone; its effect on where heads attend is left out. At ffn_norm it
    goes through the feed-forward layer, as the difference it makes there at `base`.
    """
    _, layer_idx, kind = site.split(".")
    layer = cast(TransformerBlock, model.layers[int(layer_idx)])
    if kind == "attention_norm":
        values = layer.attention.wv(directions).unflatten(-1, (model.args.n_kv_heads, model.args.head_dim))
        values = values.repeat_interleave(model.args.n_heads // model.args.n_kv_heads, dim=-2)
        directions = layer.attention.wo(values.flatten(-2))
    elif kind == "ffn_norm":
        directions = layer.feed_forward(base + directions) - layer.feed_forward(base)
    return direct_logits(model, directions)


def plain_tokens(tokenizer: Tokenizer, device: torch.device | str) -> Tensor:
    """The ids of all tokens except the special ones."""
    special = set(tokenizer.special_tokens.values())
    return torch.tensor([i for i in range(tokenizer.vocab_size) if i not in special], device=device)


def standard_logits(model: Transformer, site: str, directions: Tensor, base: Tensor, tokens: Tensor) -> Tensor:
    """(n, len(tokens)) how much directions add to the logits of these tokens, in standard deviations over them."""
    logits = promoted_logits(model, site, directions, base)[:, tokens]
    return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True).clamp(min=1e-12)
