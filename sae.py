"""The TopK sparse autoencoder (Gao et al. 2024, arXiv:2406.04093, section 2), its sparse training loss, and its files.

    z      = (x - mean(x)) / (std(x) + eps)                 each activation normalised over d_model, std with n - 1
    h      = ReLU(TopK(W_enc (z - b_pre) + b_enc))          k of n_latents stay
    z_hat  = W_dec h + b_pre
    x_hat  = z_hat * std(x) + mean(x)

Only the encoder's product is dense. Decoding and every gradient touch just the k kept latents.
"""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import blobfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stage

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")


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
    def initialize(self, b_pre: Tensor, generator: torch.Generator | None = None) -> None:
        """Random unit directions, the encoder tied to the decoder, encoder bias zero (arXiv:2406.04093, section 2.4).

        b_pre: (d_model), the mean of what the SAE sees: of normalised activations.
        """
        directions = torch.randn(self.n_latents, self.d_model, generator=generator)
        directions = F.normalize(directions, dim=1)
        self.decoder.weight.copy_(directions.t())
        self.encoder.weight.copy_(directions)
        self.encoder.bias.zero_()
        self.b_pre.copy_(b_pre)

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
        pre_acts = F.linear(x, self.encoder.weight, self.encoder.bias)  # (..., n_latents)
        if h_bias is not None:
            pre_acts = pre_acts + h_bias
        values, indices = pre_acts.float().topk(self.k, dim=-1)
        return values.relu(), indices

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
        weight, grad = self.decoder.weight, self.decoder.weight.grad
        grad.sub_(weight * (weight * grad).sum(0, keepdim=True))


# ---- training loss


class SparseAutoencode(torch.autograd.Function):
    """z (batch, d_model) -> z_hat, and which latents were kept with what value; gradients touch only those.

    With S (batch, n_latents) the sparse matrix of kept values, g the gradient of z_hat and dS that of the kept
    pre-activations: dW_dec = g^T S, dW_enc = dS^T (z - b_pre), db_enc = sum dS, db_pre = sum g - W_enc^T db_enc.
    """

    @staticmethod
    def forward(ctx, z, b_pre, w_enc, b_enc, directions, k):
        pre_acts = torch.addmm(b_enc - w_enc @ b_pre, z, w_enc.t())  # (batch, n_latents), the one dense tensor
        values, indices = pre_acts.topk(k, dim=1)
        values = values.relu()
        z_hat = F.embedding_bag(indices, directions, per_sample_weights=values, mode="sum") + b_pre
        ctx.save_for_backward(z, b_pre, w_enc, directions, values, indices)
        ctx.mark_non_differentiable(values, indices)
        return z_hat, values, indices

    @staticmethod
    def backward(ctx, g, _values, _indices):
        z, b_pre, w_enc, directions, values, indices = ctx.saved_tensors
        batch, k = values.shape
        n_latents = len(directions)
        flat = indices.flatten()
        bags = torch.arange(batch, device=z.device)
        grad_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            g.contiguous(), directions, flat, bags * k, bags.repeat_interleave(k), 0
        )
        grad_pre = grad_values * (values.flatten() > 0)
        # The kept latents as a sparse matrix by latent; a stable sort makes every sum's order fixed.
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=n_latents)
        crow = F.pad(counts.cumsum(0), (1, 0))
        rows = order // k

        def by_latent(entries: Tensor) -> Tensor:
            return torch.sparse_csr_tensor(crow, rows, entries[order], (n_latents, batch), check_invariants=False)

        grad_directions = by_latent(values.flatten()) @ g
        # A column of ones beside z gives the sums over dS, and so the encoder bias's gradient, in the same product.
        both = by_latent(grad_pre) @ torch.cat([z, z.new_ones(batch, 1)], dim=1)
        grad_b_enc = both[:, -1].contiguous()
        grad_w_enc = both[:, :-1] - grad_b_enc[:, None] * b_pre
        grad_b_pre = g.sum(0) - grad_b_enc @ w_enc
        return None, grad_b_pre, grad_w_enc, grad_b_enc, grad_directions, None


class Losses(NamedTuple):
    """Sums over a batch's activations, so that parts of a batch add up; divide by (activations x d_model)."""

    main: Tensor  # squared error of the reconstruction, normalised space
    aux: Tensor  # squared error of the dead latents' reconstruction of that error
    values: Tensor  # (batch, k), detached
    indices: Tensor  # (batch, k)


def loss_sums(sae: TopKSparseAutoencoder, z: Tensor, dead: Tensor | None, k_aux: int) -> Losses:
    """The training losses of arXiv:2406.04093, section 2.4 and appendix A.2, for normalised z (batch, d_model).

    dead: indices of the dead latents, or None. They alone, the min(k_aux, n_dead) largest of each activation and with
    their sign, reconstruct what the living left, without b_pre; their gradient does not reach the main loss.
    """
    directions = sae.decoder.weight.t()
    z_hat, values, indices = SparseAutoencode.apply(
        z, sae.b_pre, sae.encoder.weight, sae.encoder.bias, directions, sae.k
    )
    main = (z_hat - z).square().sum()
    aux = main.new_zeros(())
    if dead is not None and len(dead) > 0:
        error = (z - z_hat).detach()
        pre_acts = F.linear(z - sae.b_pre.detach(), sae.encoder.weight[dead], sae.encoder.bias[dead])
        kept, where = pre_acts.topk(min(k_aux, len(dead)), dim=1)
        error_hat = torch.zeros_like(pre_acts).scatter(1, where, kept) @ directions[dead]
        aux = (error_hat - error).square().sum()
    return Losses(main, aux, values, indices)


# ---- files


def info_path(path: str | Path) -> str:
    """The JSON beside NAME.pth."""
    return str(path).removesuffix(".pth") + ".json"


def beside(path: str | Path, suffix: str) -> Path:
    """A file that belongs to the SAE NAME.pth, such as beside(path, "top.parquet"): NAME.top.parquet."""
    return Path(str(path).removesuffix(".pth") + "." + suffix)


def save_sae(sae: TopKSparseAutoencoder, path: str | Path, info: dict[str, Any], dtype=torch.float32) -> None:
    """Write NAME.pth, a plain state dict in `dtype`, and NAME.json."""
    state = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in sae.state_dict().items()}
    shape = {"d_model": sae.d_model, "n_latents": sae.n_latents, "k": sae.k, "normalize_eps": sae.normalize_eps}
    with stage.atomic_path(path) as temporary:
        torch.save(state, temporary)
    stage.write_json(info_path(path), {"format_version": stage.FORMAT_VERSION, **shape, **info})


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
        raise stage.InputError(f"There is no SAE at {path}; run sae_training.py or name a .pth file.") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, OSError):
        raise stage.InputError(
            f"{path} is truncated or not a state dict of tensors; fetch or train it again."
        ) from None
    keys = {"b_pre", "encoder.weight", "encoder.bias", "decoder.weight"}
    if not isinstance(state, dict) or not keys <= state.keys():
        found = sorted(state)[:4] if isinstance(state, dict) else type(state).__name__
        raise stage.InputError(f"{path} is not an SAE: it needs {sorted(keys)} and holds {found}.")
    shapes = {name: tuple(getattr(state[name], "shape", ())) for name in keys}
    if len(shapes["encoder.weight"]) != 2:
        raise stage.InputError(f"{path} holds encoder.weight as {shapes['encoder.weight']}: it is not a matrix.")
    n_latents, d_model = shapes["encoder.weight"]
    right = {"b_pre": (d_model,), "encoder.bias": (n_latents,), "decoder.weight": (d_model, n_latents)}
    for name, shape in right.items():
        if shapes[name] != shape:
            raise stage.InputError(f"{path} holds {name} as {shapes[name]} instead of {shape}.")
    info: dict[str, Any] = {}
    if blobfile.exists(info_path(path)):
        try:
            info = dict(json.loads(blobfile.read_text(info_path(path))))
        except (ValueError, TypeError) as error:
            raise stage.InputError(f"{info_path(path)} is not JSON ({error}).") from None
    for name, value in keywords.items():
        if name in info and info[name] != value:
            raise stage.InputError(f"{info_path(path)} says {name} = {info[name]!r}, not {value!r}; leave {name} out.")
    info = {**info, **keywords}
    for name in ("k", "normalize_eps"):
        if name not in info:
            raise stage.InputError(
                f"{path} has no JSON beside it; give {name} (the published SAE: k=64, normalize_eps=1e-6)."
            )
    if not 0 < info["k"] <= n_latents:
        raise stage.InputError(f"{path} has {n_latents} latents, k = {info['k']} of them cannot stay; correct k.")
    sae = TopKSparseAutoencoder(d_model, n_latents, info["k"], info["normalize_eps"]).to(device=device, dtype=dtype)
    sae.load_state_dict({name: state[name] for name in keys})
    sae.info = info
    return sae.requires_grad_(False).eval()
