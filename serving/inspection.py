"""Latents asked about from outside: cards, the strongest latents of a text, and those that tell two sets apart.

What reads with the model is a generator that pauses after every part of a text, for `Engine.work`.
"""

import math
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latents.index import LatentIndex, pieces
from llama_3.chat import Message, encode_answered
from llama_3.generation import check_context, encode_text
from pipeline.errors import InputError
from sae import joined
from serving.modes import Defaults
from serving.steered_model import SteeredModel

_PART = 64  # tokens read at once


class Kept(NamedTuple):
    """The latents that the SAE keeps on a text's tokens, without begin-of-text, on which no SAE here was trained."""

    ids: list[int]
    values: Tensor  # (len(ids), width), normalised space, largest first, 0 where fewer fire
    indices: Tensor  # (len(ids), width)


def encode_asked(opened: SteeredModel, asked: str | Sequence[Message], max_tokens: int) -> list[int]:
    """Token ids of a text or a dialogue. Raises InputError for one that is too long or cannot be encoded."""
    text = isinstance(asked, str)
    ids = encode_text(opened.tokenizer, asked) if text else encode_answered(opened.tokenizer, asked, opened.date).ids
    what = "text" if text else "dialogue"
    if len(ids) > max_tokens:
        raise InputError(f"The {what} has {len(ids):,} tokens, but the limit is {max_tokens:,}; shorten it.")
    check_context(opened.model, len(ids), 0)
    return ids


def kept_latents(opened: SteeredModel, ids: Sequence[int]) -> Generator[None, None, Kept]:
    """Read a text in parts. Raises InputError where the model gives no finite numbers."""
    sae = opened.need_sae()
    cache = opened.model.new_cache(1, len(ids))
    found: list[tuple[Tensor, Tensor]] = []
    for begin in range(0, len(ids), _PART):
        with torch.inference_mode():
            part = torch.tensor([ids[begin : begin + _PART]], device=opened.model.device)
            values, indices = sae.encode(opened.model.activations(part, sae.info["site"], cache=cache)[0])
            found.append((values.cpu(), indices.cpu()))
        yield
    values, indices = joined(found)
    if not values.isfinite().all():
        raise InputError(f"The model gives NaN or infinite numbers at {sae.info['site']}; check the checkpoint.")
    skipped = int(ids[0] == opened.tokenizer.bos_id)
    return Kept(list(ids[skipped:]), values[skipped:], indices[skipped:])


# ---- inspect


def inspect(
    opened: SteeredModel, index: LatentIndex, ids: Sequence[int], top_k: int
) -> Generator[None, None, list[dict[str, Any]]]:
    """Each token with its top_k strongest latents that fire."""
    kept = yield from kept_latents(opened, ids)
    rows = zip(kept.ids, pieces(opened.tokenizer, kept.ids), kept.values.tolist(), kept.indices.tolist(), strict=True)
    return [
        {
            "token_id": token,
            "token": text,
            "latents": [
                {"latent": latent, "activation": value, "meaning": index.meaning_of(latent)}
                for latent, value in list(zip(indices, values, strict=True))[:top_k]
                if value > 0
            ],
        }
        for token, text, values, indices in rows
    ]


# ---- contrast


def mean_activations(kept: Kept, n_latents: int) -> Tensor:
    """(n_latents,) each latent's mean activation over the tokens of a text."""
    total = torch.zeros(n_latents).index_add(0, kept.indices.flatten(), kept.values.float().flatten())
    return total / max(1, len(kept.ids))


def separation(positive: Tensor, negative: Tensor) -> Tensor:
    """(n_latents,) share of pairs, one text of each set, in which the positive one has the higher activation, ties
    counting half: the area under the ROC curve. positive, negative: (n_texts, n_latents)."""
    wins = torch.zeros(positive.shape[1])
    for row in positive:
        wins += (row > negative).sum(0) + 0.5 * (row == negative).sum(0)
    return wins / (len(positive) * len(negative))


def contrast(
    opened: SteeredModel,
    index: LatentIndex,
    positive: Sequence[Sequence[int]],
    negative: Sequence[Sequence[int]],
    top_k: int,
) -> Generator[None, None, dict[str, list[dict[str, Any]]]]:
    """The top_k latents that point towards the positive texts, and those that point towards the negative ones.

    A text's activation of a latent is the mean over its tokens, in multiples of the latent's highest. Latents are
    ranked by score = (2 separation - 1) x (difference of the sets' means): large differences that most pairs of texts
    show.
    """
    sae = opened.need_sae()
    highest = torch.ones(sae.n_latents) if opened.highest is None else opened.highest.cpu().float()
    of_sets = []
    for texts in (positive, negative):
        rows = []
        for ids in texts:
            kept = yield from kept_latents(opened, ids)
            rows.append(mean_activations(kept, sae.n_latents) / highest.clamp(min=1e-12))
        of_sets.append(torch.stack(rows) * (highest > 0))
    means = [rows.mean(0) for rows in of_sets]
    apart = separation(*of_sets)
    score = (2 * apart - 1) * (means[0] - means[1])  # both factors have the sign of the difference, or nearly
    found: dict[str, list[dict[str, Any]]] = {}
    for name, sign in (("positive", 1), ("negative", -1)):
        towards = torch.where(sign * (means[0] - means[1]) > 0, score, -1.0)
        best = towards.topk(min(top_k, len(towards)))
        found[name] = [
            {
                "latent": latent,
                "meaning": index.meaning_of(latent),
                "score": value,
                "separation": apart[latent].item(),
                "mean_positive": means[0][latent].item(),
                "mean_negative": means[1][latent].item(),
                "steers_well": bool(index.steers_well[latent]),
                "steering": suggested(opened.defaults, latent),
            }
            for latent, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if value > 0
        ]
    return found


# ---- cards


def suggested(defaults: Defaults, latent: int) -> dict[str, Any]:
    """An item for a request's `steering`."""
    return {"latent": latent, "strength": defaults.strength, "mode": defaults.mode}


def card_json(opened: SteeredModel, index: LatentIndex, latent: int, n_sentences: int) -> dict[str, Any]:
    """Everything known about a latent; None where a file is missing. Raises InputError if there is no such latent."""
    card = index.card(latent, n_sentences)
    known = {name: None if isinstance(x, float) and math.isnan(x) else x for name, x in card._asdict().items()}
    tokens = lambda pairs: [{"token": token, "score": score} for token, score in pairs]
    return known | {
        "sentences": [
            {"text": "".join(s.tokens), "activation": s.activation, "tokens": s.tokens, "activations": s.activations}
            for s in card.sentences
        ],
        "promoted": tokens(card.promoted),
        "suppressed": tokens(card.suppressed),
        "co_firing": [
            {"latent": other, "meaning": meaning, "jaccard": jaccard} for other, meaning, jaccard in card.co_firing
        ],
        "steering": suggested(opened.defaults, latent),
    }
