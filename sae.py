"""The TopK sparse autoencoder (Gao et al. 2024, arXiv:2406.04093, section 2), its sparse training loss, and its files.

    z      = (x - mean(x)) / (std(x) + eps)                 each activation normalised over d_model, std with n - 1
    h      = ReLU(TopK(W_enc (z - b_pre) + b_enc))          k of n_latents stay
    z_hat  = W_dec h + b_pre
    x_hat  = z_hat * std(x) + mean(x)

Only the encoder's product is dense, in blocks of rows that never stand in memory together. Decoding and every gradient
touch just the k kept latents; sums run in a fixed order. Several processes can hold one SAE, each a slice of latents.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import blobfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.files import atomic_path, write_json
from pipeline.manifests import FORMAT_VERSION
from pipeline.sae_files import SaeFiles

# Bytes of one block: of a product on a CPU as much as its cache holds, on a GPU enough to keep it busy.
_BLOCK_BYTES = {"cpu": 2**25, "cuda": 2**31}
_LEAST_ROWS = 256
_GROUP = 16  # neighbouring groups of TopK's first round


def rows_at_once(row_bytes: int, device: torch.device) -> int:
    """How many rows of so many bytes make a block."""
    return max(_LEAST_ROWS, _BLOCK_BYTES.get(device.type, 2**31) // max(1, row_bytes))


def top_k(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (batch, n_latents), in any order, and their indices: (batch, k) each.

    Exact in two rounds: the k groups of latents with the highest maxima hold the k highest latents.
    """
    batch, n_latents = pre_acts.shape
    n_groups = n_latents // _GROUP
    if n_latents % _GROUP or n_groups < 2 * k:
        return pre_acts.topk(k, dim=1, sorted=False)
    grouped = pre_acts.view(batch, _GROUP, n_groups)  # group j: latents j, j + n_groups, ...
    groups = grouped.amax(1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, groups[:, None].expand(-1, _GROUP, -1)).flatten(1)  # (batch, _GROUP * k)
    values, places = candidates.topk(k, dim=1, sorted=False)
    return values, places // k * n_groups + groups.gather(1, places % k)


class TopKSparseAutoencoder(nn.Module):
    """State dict: b_pre (d_model), encoder.weight (n_latents, d_model), encoder.bias (n_latents),
    decoder.weight (d_model, n_latents), whose columns are the latents' directions. `info`: the JSON beside the weights.

    Construction leaves the weights uninitialised: load a state dict or call `initialize`.
    """

    def __init__(self, d_model: int, n_latents: int, k: int, normalize_eps: float = 1e-5):
        super().__init__()
        if not 0 < k <= n_latents:
            raise ValueError(f"k = {k} must lie between 1 and n_latents = {n_latents}.")
        self.d_model, self.n_latents, self.k, self.normalize_eps = d_model, n_latents, k, normalize_eps
        self.info: dict[str, Any] = {}
        self.b_pre = nn.Parameter(torch.empty(d_model))
        self.encoder, self.decoder = nn.Module(), nn.Module()  # not nn.Linear, which would initialise itself
        self.encoder.weight = nn.Parameter(torch.empty(n_latents, d_model))
        self.encoder.bias = nn.Parameter(torch.empty(n_latents))
        # Stored latent by latent, so that one latent's direction is contiguous; the published shape is the transpose.
        self.decoder.weight = nn.Parameter(torch.empty(n_latents, d_model).t())

    @torch.no_grad()
    def initialize(self, b_pre: Tensor, generator: torch.Generator | None = None, orthogonal: bool = False) -> None:
        """Random unit directions, the encoder tied to the decoder, encoder bias zero (arXiv:2406.04093, section 2.4).

        b_pre: (d_model), the mean of what the SAE sees: of normalised activations. orthogonal: every d_model
        directions, from the first on, stand at right angles to one another.
        """
        if orthogonal:
            n_bases = -(-self.n_latents // self.d_model)
            squares = (torch.randn(self.d_model, self.d_model, generator=generator) for _ in range(n_bases))
            directions = torch.cat([torch.linalg.qr(square).Q for square in squares])[: self.n_latents]
        else:
            directions = F.normalize(torch.randn(self.n_latents, self.d_model, generator=generator), dim=1)
        self.decoder.weight.copy_(directions.t())
        self.encoder.weight.copy_(directions)
        self.encoder.bias.zero_()
        self.b_pre.copy_(b_pre)

    def slice(self, rank: int, size: int) -> "TopKSparseAutoencoder":
        """A copy of the latents rank * n_latents / size and following, as many; for training in a `LatentGroup`.

        b_pre is whole. k stays the number of latents kept of all slices.
        """
        n = self.n_latents // size
        part = TopKSparseAutoencoder(self.d_model, n, min(self.k, n), self.normalize_eps)
        part.k = self.k
        with torch.no_grad():
            part.b_pre.copy_(self.b_pre)
            part.encoder.weight.copy_(self.encoder.weight[rank * n : (rank + 1) * n])
            part.encoder.bias.copy_(self.encoder.bias[rank * n : (rank + 1) * n])
            part.decoder.weight.copy_(self.decoder.weight[:, rank * n : (rank + 1) * n])
        return part

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (..., d_model), and the mean and std (..., 1) that lead back: x = z * (std + eps) + mean. float32."""
        x = x.float()
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        return (x - mean) / (std + self.normalize_eps), mean, std

    def encode(self, x: Tensor, h_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Raw x (..., d_model) -> values >= 0 and int64 indices of the kept latents, (..., k) each, largest first.

        h_bias: (n_latents), added to the encoder's output before TopK: steering. Values are in normalised space.
        """
        z, _, _ = self.normalize(x)
        return self.encode_normalized(z, h_bias)

    def encode_normalized(self, z: Tensor, h_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = (z - self.b_pre).to(self.encoder.weight.dtype)
        blocks = []
        for rows in x.reshape(-1, self.d_model).split(rows_at_once(4 * self.n_latents, x.device)):
            pre_acts = F.linear(rows, self.encoder.weight, self.encoder.bias)  # (rows, n_latents)
            if h_bias is not None:
                pre_acts = pre_acts + h_bias
            blocks.append(top_k(pre_acts.float(), self.k))
        values, indices = (torch.cat(parts).view(*x.shape[:-1], self.k) for parts in zip(*blocks, strict=True))
        values, order = values.sort(dim=-1, descending=True, stable=True)
        return values.relu(), indices.gather(-1, order)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Kept latents (..., k) -> reconstruction (..., d_model) in normalised space."""
        k = values.shape[-1]
        directions = self.decoder.weight.t()  # (n_latents, d_model)
        weights = values.reshape(-1, k).to(directions.dtype)
        z_hat = F.embedding_bag(indices.reshape(-1, k), directions, per_sample_weights=weights, mode="sum")
        return z_hat.view(*values.shape[:-1], self.d_model) + self.b_pre

    def forward(self, x: Tensor, h_bias: Tensor | None = None) -> Tensor:
        """Raw activations (..., d_model) -> their reconstruction, same shape and dtype."""
        z, mean, std = self.normalize(x)
        z_hat = self.decode(*self.encode_normalized(z, h_bias))
        return (z_hat * std + mean).to(x.dtype)

    # ---- what training keeps true

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale each latent's direction, a column of decoder.weight, to unit norm, in place."""
        self.decoder.weight.div_(self.decoder.weight.norm(dim=0, keepdim=True).clamp(min=1e-12))

    @torch.no_grad()
    def project_decoder_grad(self) -> None:
        """Remove from each direction's gradient the part along the direction, in place: after backward, before step."""
        rows = rows_at_once(4 * self.d_model, self.b_pre.device)
        weight, grad = self.decoder.weight.t(), self.decoder.weight.grad.t()  # (n_latents, d_model)
        for directions, grads in zip(weight.split(rows), grad.split(rows), strict=True):
            grads.addcmul_(directions, (directions * grads).sum(1, keepdim=True), value=-1)


# ---- training loss


# ---- files


def save_tensors(path: Path, state: dict) -> None:
    """torch.save, atomically; a full disk is an InputError."""
    with atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # how it reports a full disk
            raise OSError(str(error).partition("\n")[0]) from error


def save_sae(sae: TopKSparseAutoencoder, path: str | Path, info: dict[str, Any], dtype=torch.float32) -> None:
    """Write NAME.pth, a plain state dict in `dtype`, and NAME.json."""
    state = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in sae.state_dict().items()}
    shape = {"d_model": sae.d_model, "n_latents": sae.n_latents, "k": sae.k, "normalize_eps": sae.normalize_eps}
    save_tensors(Path(path), state)
    write_json(SaeFiles(path).json, {"format_version": FORMAT_VERSION, **shape, **info})


def load_sae_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **keywords: Any
) -> TopKSparseAutoencoder:
    """Load NAME.pth and what NAME.json says of it. Published files without a JSON need k and normalize_eps as keywords.

    Raises InputError for a file that is no SAE, and for a keyword that contradicts the JSON.
    """
    path = str(path)
    try:
        with blobfile.BlobFile(path, "rb") as file:
            state = torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"There is no SAE at {path}; run sae_training.py or name a .pth file.") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, OSError):
        raise InputError(f"{path} is truncated or not a state dict of tensors; fetch or train it again.") from None
    keys = {"b_pre", "encoder.weight", "encoder.bias", "decoder.weight"}
    if not isinstance(state, dict) or not keys <= state.keys():
        found = sorted(state)[:4] if isinstance(state, dict) else type(state).__name__
        raise InputError(f"{path} is not an SAE: it needs {sorted(keys)} and holds {found}.")
    shapes = {name: tuple(getattr(state[name], "shape", ())) for name in keys}
    if len(shapes["encoder.weight"]) != 2:
        raise InputError(f"{path} holds encoder.weight as {shapes['encoder.weight']}: it is not a matrix.")
    n_latents, d_model = shapes["encoder.weight"]
    right = {"b_pre": (d_model,), "encoder.bias": (n_latents,), "decoder.weight": (d_model, n_latents)}
    for name, shape in right.items():
        if shapes[name] != shape:
            raise InputError(f"{path} holds {name} as {shapes[name]} instead of {shape}.")
    info: dict[str, Any] = {}
    if blobfile.exists(SaeFiles(path).json):
        try:
            info = dict(json.loads(blobfile.read_text(SaeFiles(path).json)))
        except (ValueError, TypeError) as error:
            raise InputError(f"{SaeFiles(path).json} is not JSON ({error}).") from None
    for name, value in keywords.items():
        if name in info and info[name] != value:
            raise InputError(f"{SaeFiles(path).json} says {name} = {info[name]!r}, not {value!r}; leave {name} out.")
    info = {**info, **keywords}
    for name in ("k", "normalize_eps"):
        if name not in info:
            raise InputError(
                f"{path} has no JSON beside it; give {name} (the published SAE: k=64, normalize_eps=1e-6), or write "
                f'{SaeFiles(path).json}: {{"k": 64, "normalize_eps": 1e-6, "site": "layers.22.attention_norm"}}.'
            )
    if not 0 < info["k"] <= n_latents:
        raise InputError(f"{path} has {n_latents} latents, k = {info['k']} of them cannot stay; correct k.")
    sae = TopKSparseAutoencoder(d_model, n_latents, info["k"], info["normalize_eps"]).to(device=device, dtype=dtype)
    sae.load_state_dict({name: state[name] for name in keys})
    sae.info = info
    return sae.requires_grad_(False).eval()
