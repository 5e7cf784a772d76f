"""What a request asks to be steered by, as interventions of its rows, and as the response reports it."""

from collections.abc import Sequence
from typing import Any

from latents.index import LatentIndex
from llama_3.model import Intervention
from pipeline.errors import InputError
from serving.api_bodies import GoodfireController, Steer
from serving.modes import Mode
from serving.steered_model import SteeredModel
from serving.steering import Steering

_GOODFIRE_MODES: dict[str, Mode] = {"nudge": "add", "pin": "clamp", "mul": "scale"}


def asked_for(steering: Sequence[Steer] | None, controller: GoodfireController | None) -> list[Steer]:
    """Both ways to ask, as one list."""
    asked = list(steering or ())
    for each in controller.interventions if controller else ():
        asked += [
            Steer(latent=latent, strength=each.value, mode=_GOODFIRE_MODES[each.mode]) for latent in each.features
        ]
    return asked


def resolve(
    asked: Sequence[Steer], opened: SteeredModel, index: LatentIndex | None
) -> tuple[list[Intervention], list[dict[str, Any]]]:
    """The interventions, and what they do, item by item, for the response.

    Latents steered in one mode are one intervention; modes act in the order in which they are first named, after
    control vectors. Raises InputError for what does not exist, is named twice, or cannot be steered by.
    """
    applied: list[dict[str, Any]] = []
    by_mode: dict[Mode, dict[int, float]] = {}
    scales: dict[str, float] = {}
    for each in asked:
        if (name := each.control_vector) is not None:
            if name in scales:
                raise InputError(f"The control vector {name!r} is named twice; name it once.")
            known = opened.control_vectors.get(name)
            scales[name] = each.scale if each.scale is not None else known.scale if known else 1.0
            applied.append({"control_vector": name, "scale": scales[name]})
            continue
        opened.need_sae()
        assert index is not None
        latent = found(index, each.search) if each.search is not None else each.latent
        assert latent is not None
        mode = each.mode or opened.defaults.mode
        strength = opened.defaults.strength if each.strength is None else each.strength
        strengths = by_mode.setdefault(mode, {})
        if latent in strengths:
            raise InputError(f"Latent {latent} is to be steered twice in mode {mode}; name it once.")
        strengths[latent] = strength
        meaning = index.meaning_of(latent) if latent < index.n_latents else None
        applied.append({"latent": latent, "meaning": meaning, "strength": strength, "mode": mode})
    steerings = [Steering(control_vectors=scales), *(Steering(strengths, mode) for mode, strengths in by_mode.items())]
    return [each for steering in steerings for each in opened.interventions(steering)], applied


def found(index: LatentIndex, query: str) -> int:
    """The latent that a search finds: of the best matches the one that steers best. Raises InputError without one."""
    rows = index.search(query, sort="output_score", limit=1)
    if not rows:
        raise InputError(f"No latent's meaning contains {query!r}; try another word, or name a latent.")
    return rows[0]["latent"]
