"""The ways to steer, as a user chooses them; serving/steering.py has their equations. Needs no torch."""

from typing import Literal

Mode = Literal["h_bias", "add", "clamp", "scale", "ablate"]
MODES: dict[Mode, str] = {
    "h_bias": "add strength x its highest activation to the latent before TopK",
    "add": "add strength x its highest activation x the latent's direction to every token",
    "clamp": "set the latent to strength x its highest activation on every token",
    "scale": "multiply the latent by the strength where it fires; 1 changes nothing",
    "ablate": "set the latent to 0; the strength does not matter",
}
DEFAULT_MODE: Mode = "add"  # these two: the best of benchmarks/steering.py on the reference SAE
DEFAULT_STRENGTH = 4.0  # in multiples of the latent's highest activation
