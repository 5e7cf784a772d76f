"""The ways to steer, as a user chooses them, and what an SAE's JSON says of how to steer with it. Needs no torch.

serving/steering.py has the modes' equations.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.errors import InputError

Mode = Literal["h_bias", "add", "clamp", "scale", "ablate"]
MODES: dict[Mode, str] = {
    "h_bias": "add strength x its highest activation to the latent before the gate",
    "add": "add strength x its highest activation x the latent's direction to every token",
    "clamp": "set the latent to strength x its highest activation on every token",
    "scale": "multiply the latent by the strength where it fires; 1 changes nothing",
    "ablate": "set the latent to 0; the strength does not matter",
}
DEFAULT_MODE: Mode = "add"  # as good as any in benchmarks/steering.py, and the one that computes least


class Defaults(NamedTuple):
    """How to steer with an SAE unless a user says otherwise."""

    mode: Mode
    strength: float  # in multiples of a latent's highest activation
    slider: tuple[float, float]  # least and most strength worth trying

    @property
    def step(self) -> float:
        """Of the slider: a power of two, so that the strengths sae_steering.py tries lie on its steps."""
        return 2.0 ** math.floor(math.log2((self.slider[1] - self.slider[0]) / 128))


UNMEASURED = Defaults(DEFAULT_MODE, 4.0, (-10.0, 10.0))  # for an SAE that sae_steering.py has not measured


def steering_defaults(info: Mapping[str, Any], file: str | Path) -> Defaults:
    """What the entry `steering` of an SAE's JSON (`info`, read from `file`) says; UNMEASURED without one.

    Raises InputError for an entry that sae_steering.py would not write.
    """
    if "steering" not in info:
        return UNMEASURED
    try:
        entry = info["steering"]
        low, high = map(float, entry["slider"])
        found = Defaults(entry["mode"], float(entry["strength"]), (low, high))
        if found.mode not in MODES or not -math.inf < low <= found.strength <= high < math.inf or low == high:
            raise ValueError(f"{found.mode}, {found.strength}, {found.slider}")
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{file} does not say under `steering` how to steer ({error}); run sae_steering.py again."
        ) from None
    return found
