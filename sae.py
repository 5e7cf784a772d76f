"""The TopK sparse autoencoder (Gao et al. 2024, arXiv:2406.04093, section 2) and its files.

    z      = (x - mean(x)) / (std(x) + eps)                 each activation normalised over d_model, std with n - 1
    h      = ReLU(TopK(W_enc (z - b_pre) + b_enc))          keeps k of n_latents
    z_hat  = W_dec h + b_pre
    x_hat  = z_hat * std(x) + mean(x)

Only the encoder's matrix product is dense, computed in blocks of rows; decoding touches only the k kept latents. The
sparse training loss is in autoencoder/losses.py.
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

# Bytes per block of a matrix product: a CPU's cache size, and enough to keep a GPU busy.
_BLOCK_BYTES = {"cpu": 2**25, "cuda": 2**31}
_LEAST_ROWS = 256
_GROUP = 16  # latents per group in TopK's first round


def rows_at_once(row_bytes: int, device: torch.device) -> int:
    """Rows per block, at row_bytes per row."""
    return max(_LEAST_ROWS, _BLOCK_BYTES.get(device.type, 2**31) // max(1, row_bytes))


def top_k(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row (batch, n_latents), in any order, and their indices: (batch, k) each.

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


def products_are_exact(device: torch.device) -> bool:
    """Whether float32 products on `device` have float32's precision: not on a GPU that may use TF32 for them.

    Products that are not exact only choose latents; the values of the chosen are computed again by `dot_products`.
    """
    return device.type != "cuda" or not torch.backends.cuda.matmul.allow_tf32


def dot_products(a: Tensor, b: Tensor, latents: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    """a[row] . b[latent] of each entry, in float32.

    latents, rows: (n_entries), rows in ascending order; offsets: (len(a)), where each row's entries begin.
    """
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(a.contiguous(), b, latents, offsets, rows, 0)


class TopKSparseAutoencoder(nn.Module):
    """State dict: b_pre (d_model), encoder.weight (n_latents, d_model), encoder.bias (n_latents),
    decoder.weight (d_model, n_latents), whose columns are the latents' directions. `info`: the JSON beside the weights.

    Construction leaves the weights uninitialised: load a state dict or call `initialize`.
    n_slices: above 1 for one slice of an SAE that several processes train together (see `slice`); n_latents then counts
    the slice's latents, and k is the number kept over all slices.
    """

    def __init__(self, d_model: int, n_latents: int, k: int, normalize_eps: float = 1e-5, n_slices: int = 1):
        super().__init__()
        if not 0 < k <= n_latents * n_slices:
            raise ValueError(f"k = {k} must lie between 1 and n_latents = {n_latents * n_slices}")
        self.d_model, self.n_latents, self.k, self.normalize_eps = d_model, n_latents, k, normalize_eps
        self.info: dict[str, Any] = {}
        self.b_pre = nn.Parameter(torch.empty(d_model))
        # "meta" and to_empty skip nn.Linear's own initialisation.
        self.encoder = nn.Linear(d_model, n_latents, device="meta").to_empty(device=self.b_pre.device)
        self.decoder = nn.Linear(n_latents, d_model, bias=False, device="meta")
        # Stored latent by latent, so that one latent's direction is contiguous; the published shape is the transpose.
        self.decoder.weight = nn.Parameter(torch.empty(n_latents, d_model).t())

    @torch.no_grad()
    def initialize(self, b_pre: Tensor, generator: torch.Generator | None = None, orthogonal: bool = False) -> None:
        """Random unit directions, the encoder tied to the decoder, encoder bias zero (arXiv:2406.04093, section 2.4).

        b_pre: (d_model), the mean of the normalised activations. orthogonal: directions are orthogonal to one another
        within the first d_model latents, within the next d_model, and so on.
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
        """A copy of slice `rank` of `size`: n_latents / size latents from rank * n_latents / size on, all of b_pre."""
        n = self.n_latents // size
        own = slice(rank * n, (rank + 1) * n)
        part = TopKSparseAutoencoder(self.d_model, n, self.k, self.normalize_eps, n_slices=size)
        with torch.no_grad():
            part.b_pre.copy_(self.b_pre)
            part.encoder.weight.copy_(self.encoder.weight[own])
            part.encoder.bias.copy_(self.encoder.bias[own])
            part.decoder.weight.copy_(self.decoder.weight[:, own])
        return part

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (..., d_model), and the mean and std (..., 1) that undo it: x = z * (std + eps) + mean. float32."""
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
        """`encode` for activations that are already normalised."""
        x = (z - self.b_pre).to(self.encoder.weight.dtype)
        blocks = []
        for rows in x.reshape(-1, self.d_model).split(rows_at_once(4 * self.n_latents, x.device)):
            pre_acts = F.linear(rows, self.encoder.weight, self.encoder.bias)  # (rows, n_latents)
            if h_bias is not None:
                pre_acts = pre_acts + h_bias
            values, indices = top_k(pre_acts.float(), self.k)
            if x.dtype == torch.float32 and not products_are_exact(x.device):
                values = self._pre_acts_of(rows, indices, h_bias)
            blocks.append((values, indices))
        values, indices = (torch.cat(parts).view(*x.shape[:-1], self.k) for parts in zip(*blocks, strict=True))
        values, order = values.sort(dim=-1, descending=True, stable=True)
        return values.relu(), indices.gather(-1, order)

    def _pre_acts_of(self, x: Tensor, indices: Tensor, h_bias: Tensor | None) -> Tensor:
        """The pre-activations of x (rows, d_model), without b_pre, of chosen latents (rows, k): float32 (rows, k)."""
        latents, entries = indices.flatten(), torch.arange(indices.numel(), device=x.device)
        bias = self.encoder.bias if h_bias is None else self.encoder.bias + h_bias
        dots = dot_products(x, self.encoder.weight, latents, entries[:: self.k].contiguous(), entries // self.k)
        return (dots + bias[latents]).view(-1, self.k)

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

    # ---- training invariants

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale each latent's direction, a column of decoder.weight, to unit norm, in place."""
        self.decoder.weight.div_(self.decoder.weight.norm(dim=0, keepdim=True).clamp(min=1e-12))

    @torch.no_grad()
    def project_decoder_grad(self) -> None:
        """Remove from each direction's gradient the part along the direction, in place: after backward, before step."""
        if (grad := self.decoder.weight.grad) is None:
            return
        n_rows = rows_at_once(4 * self.d_model, grad.device)
        blocks = zip(self.decoder.weight.t().split(n_rows), grad.t().split(n_rows), strict=True)
        for directions, grads in blocks:  # (n_rows, d_model) each
            grads.addcmul_(directions, (directions * grads).sum(1, keepdim=True), value=-1)


# ---- files


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """torch.save, atomically. Raises Stop for a full disk."""
    with atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(str(error).partition("\n")[0]) from error


def save_sae(
    sae: TopKSparseAutoencoder, path: str | Path, info: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write NAME.pth, a plain state dict in `dtype`, and NAME.json."""
    state = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in sae.state_dict().items()}
    shape = {"d_model": sae.d_model, "n_latents": sae.n_latents, "k": sae.k, "normalize_eps": sae.normalize_eps}
    save_tensors(Path(path), state)
    write_json(SaeFiles(path).json, {"format_version": FORMAT_VERSION, **shape, **info})


def load_sae_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **keywords: Any
) -> TopKSparseAutoencoder:
    """Load NAME.pth with its NAME.json. Published files without a JSON need k and normalize_eps as keywords.

    Raises InputError for a file that is not an SAE, or a keyword that contradicts the JSON.
    """
    state = _read_state(str(path), device)
    info = _read_info(str(path), keywords)
    n_latents, d_model = state["encoder.weight"].shape
    try:
        sae = TopKSparseAutoencoder(d_model, n_latents, info["k"], info["normalize_eps"])
    except ValueError as error:
        raise InputError(f"{path}: {error}; correct k.") from None
    sae.to(device=device, dtype=dtype).load_state_dict(state)
    sae.info = info
    return sae.requires_grad_(False).eval()


def _read_state(path: str, device: str | torch.device) -> dict[str, Tensor]:
    """The state dict, names and shapes checked; other entries of the file are dropped."""
    try:
        with blobfile.BlobFile(path, "rb") as file:
            state = torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"There is no SAE at {path}; run sae_training.py or name a .pth file.") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, OSError):
        raise InputError(f"{path} is truncated or not a state dict of tensors; fetch or train it again.") from None
    keys = {"b_pre", "encoder.weight", "encoder.bias", "decoder.weight"}
    if not isinstance(state, dict) or not keys <= state.keys():
        found = sorted(map(str, state))[:4] if isinstance(state, dict) else type(state).__name__
        raise InputError(f"{path} is not an SAE: it needs {sorted(keys)} and holds {found}.")
    shapes: dict[str, tuple[int, ...]] = {name: tuple(getattr(state[name], "shape", ())) for name in keys}
    if len(shapes["encoder.weight"]) != 2:
        raise InputError(f"{path} holds encoder.weight as {shapes['encoder.weight']}: it is not a matrix.")
    n_latents, d_model = shapes["encoder.weight"]
    expected = {"b_pre": (d_model,), "encoder.bias": (n_latents,), "decoder.weight": (d_model, n_latents)}
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise InputError(f"{path} holds {name} as {shapes[name]} instead of {shape}.")
    return {name: state[name] for name in keys}


def _read_info(path: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """NAME.json, if there is one, and the keywords. Raises InputError if k or normalize_eps is in neither."""
    json_path = SaeFiles(path).json
    info: dict[str, Any] = {}
    if blobfile.exists(json_path):
        try:
            info = dict(json.loads(blobfile.BlobFile(json_path, "rb").read()))
        except (ValueError, TypeError, OSError) as error:
            raise InputError(
                f"{json_path} is not JSON ({error}); train the SAE again, or write the file by hand."
            ) from None
    for name, known in (("format_version", FORMAT_VERSION), ("normalization", "layer_norm")):
        if info.get(name, known) != known:
            raise InputError(f"{json_path} has {name} {info[name]}, this code reads {known}; use newer code for it.")
    for name, value in keywords.items():
        if name in info and info[name] != value:
            raise InputError(f"{json_path} says {name} = {info[name]!r}, not {value!r}; leave {name} out.")
    info |= keywords
    for name in ("k", "normalize_eps"):
        if name not in info:
            raise InputError(
                f"{path} has no JSON beside it; give {name} (the published SAE: k=64, normalize_eps=1e-6), or write "
                f'{json_path}: {{"k": 64, "normalize_eps": 1e-6, "site": "layers.22.attention_norm"}}.'
            )
    return info
