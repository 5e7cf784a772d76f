"""How well each latent steers, judged by one forward pass: does adding it make the model say what it promotes?

The output score of Arad et al. 2025, "SAEs Are Good for Steering - If You Select the Right Features",
arXiv:2505.20063: what a latent *promotes* is read off its direction by the logit lens; the model then reads a neutral
prompt, steered by the latent. Its score is high if the promoted tokens are indeed what the model says next.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latents.promotion import plain_tokens, standard_logits
from llama_3.model import check_site
from serving.dose_response import Opened, Setting, part_by_part
from serving.steering import Steering, make_steering


class Before(NamedTuple):
    """What all latents share of a prompt."""

    tokens: Tensor  # (1, seq)
    resid_pre: Tensor  # (1, seq, d_model), entering the layer of the SAE's site
    logprobs: Tensor  # (seq, vocab_size), of the clean model


def promoted_ids(opened: Opened, latents: Tensor, n: int) -> Tensor:
    """(len(latents), n) the tokens that each latent's direction promotes most (latents/promotion.py)."""
    model, tokenizer, sae, highest = opened
    plain = plain_tokens(tokenizer, latents.device)
    directions = sae.decoder.weight.t()[latents] * highest.to(latents.device)[latents, None]
    return plain[standard_logits(model, sae.info["site"], directions, sae.b_pre, plain).topk(n).indices]


def raw_scores(
    opened: Opened, setting: Setting, prompts: Sequence[Sequence[int]], n_promoted: int, at_once: int, latents=None
):
    model, tokenizer, sae, highest = opened
    site = sae.info["site"]
    layer_idx = check_site(site, model.args.n_layers)
    if latents is None:
        latents = highest.nonzero()[:, 0]
    befores = []
    with torch.inference_mode():
        for prompt in prompts:
            tokens = torch.tensor([list(prompt)])
            x = model.activations(tokens, f"layers.{layer_idx}.resid_pre")
            befores.append(Before(tokens, x, model.continue_from(layer_idx, x, tokens)[0].log_softmax(-1)))
        for some in latents.split(at_once):
            ids = promoted_ids(opened, some, n_promoted)
            asked = [Steering({int(i): setting.strength}, setting.mode, setting.keep_error) for i in some]
            steerings = [make_steering(sae, s, highest, tokenizer.bos_id) for s in asked]
            together = steerings[0]._replace(fn=part_by_part([s.fn for s in steerings]))
            out = []
            for b in befores:
                n = len(some)
                with model.intervene(*together):
                    logits = model.continue_from(layer_idx, b.resid_pre.expand(n, -1, -1), b.tokens.expand(n, -1))[
                        :, 1:
                    ]
                lp = logits.log_softmax(-1)  # n, pos, V
                after = lp.gather(-1, ids[:, None].expand(-1, lp.shape[1], -1))
                before = b.logprobs[1:][None].expand(n, -1, -1).gather(-1, ids[:, None].expand(-1, lp.shape[1], -1))
                rank = (lp > after.amax(-1, keepdim=True)).sum(-1)  # rank of best promoted
                kl = (lp.exp() * (lp - b.logprobs[1:])).sum(-1)
                out.append((after, before, rank, kl))
            yield some, ids, [torch.cat(z, 1) for z in zip(*out)]
