"""Any kind of SAE or transcoder as its formula says, one activation at a time, dense, in float64: the oracle.

Used by test_sae_kinds.py and test_steering.py. `KINDS` has every value of every field of sae.Kind.
"""

import numpy as np
import torch

from sae import Kind, SparseAutoencoder

TARGET = "layers.1.mlp_out"
KINDS = {
    "topk": Kind(),
    "jumprelu": Kind("jumprelu"),
    "relu, raw, not centred": Kind("relu", "none", centred=False),
    "jumprelu, scaled": Kind("jumprelu", "scale", 0.25),
    "topk, raw": Kind("topk", "none"),
    "topk, scaled, not centred": Kind("topk", "scale", 2.5, centred=False),
    "transcoder, topk, raw": Kind("topk", "none", centred=False, target_site=TARGET),
    "skip transcoder, jumprelu, scaled": Kind("jumprelu", "scale", 0.5, False, TARGET, 3.0, True),
    "skip transcoder, topk": Kind("topk", centred=False, target_site=TARGET, target_scale=0.1, skip=True),
    "skip transcoder, relu, raw, centred": Kind("relu", "none", target_site=TARGET, skip=True),
}


class Dense:
    """The formula at the top of sae.py, on float64 copies of an SAE's weights."""

    def __init__(self, sae: SparseAutoencoder):
        self.sae, self.kind = sae, sae.kind
        self.w = {name: tensor.detach().double().numpy() for name, tensor in sae.state_dict().items()}

    def normalized(self, x: np.ndarray) -> tuple[np.ndarray, float, float]:
        """z, and the mean and std by which a reconstruction is undone."""
        if self.kind.normalization == "layer_norm":
            mean, std = x.mean(), x.std(ddof=1)
            return (x - mean) / (std + self.sae.normalize_eps), mean, std
        return self.kind.scale * x, 0.0, 1 / self.kind.scale

    def pre_acts(self, z: np.ndarray) -> np.ndarray:
        read = z - self.w["b_pre"] if self.kind.centred else z
        return self.w["encoder.weight"] @ read + self.w["encoder.bias"]

    def gated(self, pre_acts: np.ndarray) -> np.ndarray:
        if self.kind.gate == "topk":
            kept = np.zeros(len(pre_acts), dtype=bool)
            kept[np.argsort(-pre_acts)[: self.sae.k]] = True
        else:
            kept = pre_acts > (self.w["threshold"] if self.kind.gate == "jumprelu" else 0)
        return np.where(kept, np.maximum(pre_acts, 0), 0)

    def latents(self, x: np.ndarray) -> np.ndarray:
        return self.gated(self.pre_acts(self.normalized(x)[0]))

    def output(self, x: np.ndarray, latents: np.ndarray) -> np.ndarray:
        """The raw reconstruction of x, or of a transcoder of its target, when the latents are these."""
        z, mean, std = self.normalized(x)
        z_hat = self.w["decoder.weight"] @ latents + self.w["b_pre"]
        if self.kind.skip:
            z_hat = z_hat + self.w["skip"] @ z
        return z_hat * std + mean if self.kind.target_site is None else z_hat / self.kind.target_scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_model) raw -> (..., d_model), float64."""
        rows = [self.output(row, self.latents(row)) for row in x.double().reshape(-1, x.shape[-1]).numpy()]
        return torch.from_numpy(np.stack(rows)).view(x.shape)

    def all_latents(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_model) raw -> (..., n_latents), float64."""
        rows = [self.latents(row) for row in x.double().reshape(-1, x.shape[-1]).numpy()]
        return torch.from_numpy(np.stack(rows)).view(*x.shape[:-1], -1)
