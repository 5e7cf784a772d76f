"""Direct logit attribution: what each part of the model adds, by itself, to the logits of the next token.

The last residual stream is a sum: the embedding, every head's output, every MLP's. The last norm divides all of it by
one number, so that logits are a sum of the parts' logits, exactly. With an SAE of the residual stream, what comes
before its site is instead the sum of its latents, its offset and what it does not reconstruct.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from latents.promotion import direct_logits
from llama_3.model import Transformer, TransformerBlock
from microscope.prompts import Prompt
from pipeline.errors import InputError
from sae import SparseAutoencoder


class Part(NamedTuple):
    name: str  # embedding, head 3.1, mlp 3, latent 747, offset of the SAE, error of the SAE
    amount: float  # of the logit difference


@torch.inference_mode()
def attribution(
    model: Transformer, prompt: Prompt, answer: int, other: int | None, sae: SparseAutoencoder | None = None
) -> tuple[list[Part], float]:
    """The parts of the logit of `answer` minus that of `other` after the prompt, and the difference itself.

    other None: minus the mean logit of the vocabulary. Raises InputError for an SAE outside the residual stream.
    """
    vectors, last = _parts(model, prompt, sae)
    scale = torch.rsqrt(last.float().square().mean() + model.norm.eps)
    logits = direct_logits(model, torch.stack(list(vectors.values()))).float() * scale  # (parts, vocab_size)
    minus = logits.mean(-1) if other is None else logits[:, other]
    amounts = (logits[:, answer] - minus).tolist()
    whole = model.unembed(last)
    difference = float(whole[answer] - (whole.mean() if other is None else whole[other]))
    return [Part(*each) for each in zip(vectors, amounts, strict=True)], difference


def _parts(model: Transformer, prompt: Prompt, sae: SparseAutoencoder | None) -> tuple[dict[str, Tensor], Tensor]:
    """The vectors, (d_model,) each, that add up to the last residual stream at the last position; and that stream."""
    tokens = prompt.batch(model)
    first, vectors = 0, {"embedding": model.tok_embeddings(tokens)[0, -1].to(model.dtype)}
    if sae is not None:
        _, layer, kind = sae.site.split(".")
        if kind not in ("resid_pre", "resid_post") or sae.kind.target_site is not None:
            what = f"is at {sae.site}" if sae.kind.target_site is None else f"is a transcoder to {sae.output_site}"
            raise InputError(
                f"An attribution to latents needs an SAE of the residual stream, but this one {what}; name one at "
                "resid_pre or resid_post."
            )
        first = int(layer) + (kind == "resid_post")
        vectors = _latents(sae, model.activations(tokens, sae.site)[0, -1])
    end = f"layers.{model.args.n_layers - 1}.resid_post"
    wanted = [f"layers.{i}.{kind}" for i in range(first, model.args.n_layers) for kind in ("head_out", "mlp_out")]
    acts = model.activations(tokens, [*wanted, end])
    for i in range(first, model.args.n_layers):
        block = cast(TransformerBlock, model.layers[i])
        heads = acts[f"layers.{i}.head_out"][0, -1]  # (n_heads, head_dim)
        each_alone = torch.diag_embed(heads.t()).permute(1, 2, 0).flatten(1)  # (n_heads, n_heads * head_dim)
        for head, vector in enumerate(block.attention.wo(each_alone)):
            vectors[f"head {i}.{head}"] = vector
        vectors[f"mlp {i}"] = acts[f"layers.{i}.mlp_out"][0, -1]
    return vectors, acts[end][0, -1]


class Outlook(NamedTuple):
    """What the model says after each token of a text, and what its logits make of an SAE's latents there."""

    answers: list[int]  # the likeliest next token
    probabilities: list[float]
    scales: list[float]  # from a latent's activation times its decoder row to the last norm's output


@torch.inference_mode()
def outlook(model: Transformer, ids: Sequence[int], sae: SparseAutoencoder) -> Outlook | None:
    """None for an SAE whose output is no term of the last residual stream, so that nothing adds up directly."""
    if sae.output_site.rpartition(".")[2] not in ("resid_pre", "resid_mid", "resid_post", "attention_out", "mlp_out"):
        return None
    end = f"layers.{model.args.n_layers - 1}.resid_post"
    acts = model.activations(torch.tensor([ids], device=model.device), [*{sae.site, end}])
    last = acts[end][0]
    best = model.unembed(last).softmax(-1).max(-1)
    scales = torch.rsqrt(last.float().square().mean(-1) + model.norm.eps)
    if sae.kind.target_site is None:
        _, _, std = sae.normalize(acts[sae.site][0])
        scales = scales * (std.flatten() + sae.normalize_eps)
    else:
        scales = scales / sae.kind.target_scale
    return Outlook(best.indices.tolist(), best.values.tolist(), scales.tolist())


@torch.inference_mode()
def latents_add(
    model: Transformer, sae: SparseAutoencoder, latents: Sequence[tuple[int, float]], answer: int, scale: float
) -> list[float]:
    """What latents with these activations add to the logit of `answer`, minus what they add to the mean token's.

    scale: of an `Outlook`.
    """
    if not latents:
        return []
    indices, activations = zip(*latents, strict=True)
    amounts = torch.tensor(activations, device=sae.decoder.weight.device)
    vectors = (sae.decoder.weight[:, list(indices)].float() * amounts * scale).T
    logits = direct_logits(model, vectors.to(model.dtype)).float()  # (latents, vocab_size)
    return (logits[:, answer] - logits.mean(-1)).tolist()


def _latents(sae: SparseAutoencoder, x: Tensor) -> dict[str, Tensor]:
    """x, (d_model,), as the sum of its latents, the SAE's offset and its error."""
    z, mean, std = sae.normalize(x)
    values, indices = sae.encode_normalized(z)
    scale = std + sae.normalize_eps
    vectors = {
        f"latent {int(i)}": value * sae.decoder.weight[:, i].float() * scale
        for value, i in zip(values, indices, strict=True)
        if value > 0
    }
    vectors["offset of the SAE"] = sae.b_pre.float() * scale + mean
    vectors["error of the SAE"] = x.float() - torch.stack(list(vectors.values())).sum(0)
    return {name: vector.to(x.dtype) for name, vector in vectors.items()}
