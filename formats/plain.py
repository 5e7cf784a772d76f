"""State dicts without a configuration; what they are, their tensors' names say:

    Goodfire   encoder_linear.*, decoder_linear.*     resid_post of the layer in the repository's name
    qresearch  encoder.*, decoder.*, both with bias   resid_pre of the layer in the repository's name
    ours, and the published SAE: b_pre, encoder.weight, encoder.bias, decoder.weight; given k and normalize_eps

The first two: h = ReLU(W_enc x + b_enc), x_hat = W_dec h + b_dec. weight of the encoder (n_latents, d_model), of the
decoder (d_model, n_latents). Goodfire: README of their repositories; qresearch: their SAE.ipynb, which hooks a layer
and takes its input.
"""

from torch import Tensor

from formats.common import Foreign, Ours, Place, tensors_in
from pipeline.errors import InputError
from sae import Kind

MARKERS_GOODFIRE = "the tensor encoder_linear.weight in a .pt or .pth file"
MARKERS_QRESEARCH = "the tensors encoder.weight and decoder.bias in a .pt file"


def find_goodfire(place: Place) -> Foreign | None:
    return _renamed(place, "encoder_linear", "decoder_linear")


def find_qresearch(place: Place) -> Foreign | None:
    return _renamed(place, "encoder", "decoder")


def _renamed(place: Place, encoder: str, decoder: str) -> Foreign | None:
    names = {f"{encoder}.weight", f"{encoder}.bias", f"{decoder}.weight", f"{decoder}.bias"}
    state = tensors_in(place.state)
    if not names <= state.keys():
        return None
    if more := sorted(state.keys() - names):
        raise InputError(f"{place.path} holds {more[0]} beside an encoder and a decoder; that is no format known here.")
    short = lambda name: name.replace(encoder, "encoder").replace(decoder, "decoder")
    return Foreign(place.path, {short(name): state[name] for name in names}, {})


def weights(foreign: Foreign) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    W_enc = foreign.tensor("encoder.weight", None, None)
    n_latents, d_model = W_enc.shape
    W_dec = foreign.tensor("decoder.weight", d_model, n_latents).t()
    return W_enc, foreign.tensor("encoder.bias", n_latents), W_dec, foreign.tensor("decoder.bias", d_model)


def to_ours(foreign: Foreign) -> Ours:
    return Ours(*weights(foreign), Kind("relu", "none", centred=False))


def formula(foreign: Foreign, x: Tensor) -> tuple[Tensor, Tensor]:
    W_enc, b_enc, W_dec, b_dec = weights(foreign)
    h = (x @ W_enc.t() + b_enc).relu()
    return h, h @ W_dec + b_dec
