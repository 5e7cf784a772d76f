"""The logit lens: what the model would say next if it ended after a layer.

The residual stream there goes through the last norm and the output layer (nostalgebraist 2020, "interpreting GPT"). At
attention_out and mlp_out this shows what the sublayer alone would say.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llama_3.model import Transformer
from microscope.prompts import Prompt

KINDS = ("resid_pre", "resid_mid", "resid_post", "attention_out", "mlp_out")


class LensLayer(NamedTuple):
    """One layer's answer at every position of a prompt."""

    token_ids: Tensor  # (seq, n), most likely first
    probabilities: Tensor  # (seq, n)
    entropy: Tensor  # (seq,) nats
    kl: Tensor  # (seq,) nats, of the final distribution from this one: sum p_final log(p_final / p_here)


@torch.inference_mode()
def logit_lens(model: Transformer, prompt: Prompt, kind: str, n: int) -> list[LensLayer]:
    """Every layer's answer, the first layer first; n tokens each."""
    names = [f"layers.{i}.{kind}" for i in range(model.args.n_layers)]
    last = f"layers.{model.args.n_layers - 1}.resid_post"
    acts = model.activations(prompt.batch(model), [*names, last])
    final = model.unembed(acts[last][0]).log_softmax(-1)
    layers = []
    for name in names:
        log_p = model.unembed(acts[name][0]).log_softmax(-1)  # (seq, vocab)
        best = log_p.topk(n)
        entropy = -(log_p.exp() * log_p).sum(-1)
        kl = (final.exp() * (final - log_p)).sum(-1)
        layers.append(LensLayer(best.indices.cpu(), best.values.exp().cpu(), entropy.cpu(), kl.cpu()))
    return layers
