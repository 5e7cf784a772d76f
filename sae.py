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
from typing import Any, NamedTuple

import blobfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stage

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


class LatentGroup(NamedTuple):
    """The processes that together hold one SAE, each a slice of its latents of the same size; alone, all of them."""

    group: Any = None  # of torch.distributed
    rank: int = 0
    size: int = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the slices, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def highest(self, values: Tensor, k: int) -> Tensor:
        """Which of the slices' candidates (batch, slots) are among the k highest of each row: bool (batch, slots).

        Only values travel, 4 bytes x batch x slots from each process to each other. Equal ones go to the lower slice.
        """
        if self.size == 1:
            return torch.ones_like(values, dtype=torch.bool)
        every = [torch.empty_like(values) for _ in range(self.size)]
        torch.distributed.all_gather(every, values.contiguous(), group=self.group)
        best = torch.cat(every, 1).sort(dim=1, descending=True, stable=True).indices[:, :k]
        keep = torch.zeros(len(values), self.size * values.shape[1], dtype=torch.bool, device=values.device)
        return keep.scatter_(1, best, True).view(len(values), self.size, -1)[:, self.rank]


class Kept(NamedTuple):
    """Latents kept, one entry a (row of the batch, latent) pair, by row."""

    values: Tensor  # >= 0
    latents: Tensor
    rows: Tensor
    offsets: Tensor  # (batch,), where each row's entries begin


def weighted_sums(source: Tensor, which: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Sum weights[e] * source[which[e]] over the entries from each offset to the next; no entries give zeros."""
    return F.embedding_bag(which, source, offsets=offsets, per_sample_weights=weights, mode="sum")


def dot_products(a: Tensor, b: Tensor, kept: Kept) -> Tensor:
    """a[row] . b[latent] of every entry."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        a.contiguous(), b, kept.latents, kept.offsets, kept.rows, 0
    )


def choose(z, w_enc, b_enc, b_pre, k: int, latents: LatentGroup, encoder_dtype: torch.dtype) -> Kept:
    """Of the k highest latents of each row over all slices, those of this one. Values in float32, always."""
    batch, n_latents = len(z), len(w_enc)
    shift = b_enc - w_enc @ b_pre  # W (z - b_pre) + b = W z + shift
    x, w, b = (tensor.to(encoder_dtype) for tensor in (z, w_enc, shift))
    n_rows = rows_at_once(x.element_size() * n_latents, z.device)
    block = x.new_empty(min(n_rows, batch), n_latents)  # the one dense tensor, used again and again
    chosen = [top_k(torch.addmm(b, rows, w.t(), out=block[: len(rows)]), min(k, n_latents)) for rows in x.split(n_rows)]
    values, indices = (torch.cat(parts) for parts in zip(*chosen, strict=True))  # (batch, min(k, n_latents))
    slots = values.shape[1]
    offsets = torch.arange(batch, device=z.device) * slots
    kept = Kept(values.flatten(), indices.flatten(), (offsets // slots).repeat_interleave(slots), offsets)
    if encoder_dtype != torch.float32:
        kept = kept._replace(values=dot_products(z, w_enc, kept) + shift[kept.latents])
    if latents.size > 1:
        here = latents.highest(kept.values.view(batch, slots), k)
        counts, here = here.sum(1), here.flatten()
        kept = Kept(kept.values[here], kept.latents[here], kept.rows[here], counts.cumsum(0) - counts)
    return kept._replace(values=kept.values.relu())


def auxiliary_loss(
    w_enc, b_enc, directions, b_pre, z, error, dead, k_aux: int, n_dead: list[int], latents: LatentGroup
):
    """Squared error with which dead latents reconstruct `error`, and its gradients for their rows: w_enc, b_enc,
    directions. Dense over the dead latents, in blocks of rows."""
    w, directions = w_enc[dead], directions[dead]
    shift = b_enc[dead] - w @ b_pre
    k_aux, slots = min(k_aux, sum(n_dead)), min(k_aux, max(n_dead))
    loss, grad_w, grad_b, grad_directions = z.new_zeros(()), *map(torch.zeros_like, (w, shift, directions))
    n_rows = rows_at_once(4 * max(n_dead), z.device)
    for rows, target in zip(z.split(n_rows), error.split(n_rows), strict=True):
        pre_acts = torch.addmm(shift, rows, w.t())  # (rows, dead latents)
        values = pre_acts
        some = slots < max(n_dead) or latents.size > 1
        if some:  # not every dead latent is kept
            values, where = pre_acts.topk(min(slots, len(dead)), dim=1, sorted=False)
            missing = slots - values.shape[1]
            here = latents.highest(F.pad(values, (0, missing), value=-torch.inf), k_aux)[:, : values.shape[1]]
            values = torch.zeros_like(pre_acts).scatter_(1, where, values * here)
        error_hat = latents.all_reduce(values @ directions)
        g = error_hat - target
        loss += g.square().sum()
        g = 2 * g
        grad_values = g @ directions.t()
        if some:
            grad_values *= torch.zeros_like(pre_acts).scatter_(1, where, here.to(pre_acts.dtype))
        grad_directions += values.t() @ g
        grad_w += grad_values.t() @ rows
        grad_b += grad_values.sum(0)
    return loss, grad_w - grad_b[:, None] * b_pre, grad_b, grad_directions


class SparseLosses(torch.autograd.Function):
    """main and aux of `Losses`, and fired. Gradients touch only the kept latents.

    With S (batch, n_latents) the sparse matrix of kept values, g the gradient of z_hat and dS that of the kept
    pre-activations: dW_dec = g^T S, dW_enc = dS^T (z - b_pre), db_enc = sum dS, db_pre = sum g - W_enc^T db_enc.
    """

    @staticmethod
    def forward(ctx, w_enc, b_enc, directions, b_pre, z, dead, k, k_aux, n_dead, latents, encoder_dtype):
        kept = choose(z, w_enc, b_enc, b_pre, k, latents, encoder_dtype)
        z_hat = latents.all_reduce(weighted_sums(directions, kept.latents, kept.values, kept.offsets)) + b_pre
        error = z - z_hat
        aux, aux_grads = z.new_zeros(()), ()
        if sum(n_dead):
            aux, *aux_grads = auxiliary_loss(w_enc, b_enc, directions, b_pre, z, error, dead, k_aux, n_dead, latents)
        fired = kept.latents[kept.values > 0].bincount(minlength=len(w_enc))
        ctx.latents = latents
        ctx.save_for_backward(w_enc, directions, b_pre, z, error, *kept, dead, *aux_grads)
        ctx.mark_non_differentiable(fired)
        return error.square().sum(), aux, fired

    @staticmethod
    def backward(ctx, g_main, g_aux, _fired):
        w_enc, directions, b_pre, z, error, *rest = ctx.saved_tensors
        kept, dead, aux_grads = Kept(*rest[:4]), rest[4], rest[5:]
        g = error * (-2 * g_main)
        grad_pre = dot_products(g, directions, kept) * (kept.values > 0)
        # By latent instead of by row; a stable sort makes every sum's order fixed.
        order = kept.latents.argsort(stable=True)
        rows, counts = kept.rows[order], kept.latents.bincount(minlength=len(w_enc))
        starts = counts.cumsum(0) - counts
        grad_directions = weighted_sums(g, rows, kept.values[order], starts)
        grad_pre = grad_pre[order]
        grad_w_enc = weighted_sums(z, rows, grad_pre, starts)
        grad_b_enc = weighted_sums(z.new_ones(len(z), 1), rows, grad_pre, starts).squeeze(1)
        grad_w_enc.addcmul_(grad_b_enc[:, None], b_pre, value=-1)
        grad_b_pre = g.sum(0) - ctx.latents.all_reduce(grad_b_enc @ w_enc)
        if aux_grads:
            for grad, aux_grad in zip((grad_w_enc, grad_b_enc, grad_directions), aux_grads, strict=True):
                grad.index_add_(0, dead, aux_grad * g_aux)
        return grad_w_enc, grad_b_enc, grad_directions, grad_b_pre, *[None] * 7


class Losses(NamedTuple):
    """Sums over a batch's activations, so that parts of a batch add up; divide by (activations x d_model)."""

    main: Tensor  # squared error of the reconstruction, normalised space
    aux: Tensor  # squared error of the dead latents' reconstruction of that error
    fired: Tensor  # (n_latents), int64: activations on which each latent has a value above zero


def loss_sums(
    sae: TopKSparseAutoencoder,
    z: Tensor,
    dead: Tensor | None,
    k_aux: int,
    latents: LatentGroup = LatentGroup(),  # noqa: B008 (a constant tuple)
    encoder_dtype: torch.dtype = torch.float32,
    n_dead: list[int] | None = None,
) -> Losses:
    """The training losses of arXiv:2406.04093, section 2.4 and appendix A.2, for normalised z (batch, d_model).

    dead: indices of the dead latents, or None. They alone, the min(k_aux, n_dead) largest of each activation and with
    their sign, reconstruct what the living left, without b_pre; their gradient does not reach the main loss.
    latents: where `sae` is a slice; every process passes the same z, and n_dead, the number of dead latents of each;
    main, aux and b_pre's gradient are then those of the whole on every process. encoder_dtype: bfloat16 chooses the
    latents by a product in bfloat16 and computes the chosen values in float32.
    """
    dead = torch.zeros(0, dtype=torch.int64, device=z.device) if dead is None else dead
    n_dead = [len(dead)] if n_dead is None else n_dead
    weights = sae.encoder.weight, sae.encoder.bias, sae.decoder.weight.t(), sae.b_pre
    return Losses(*SparseLosses.apply(*weights, z, dead, sae.k, k_aux, n_dead, latents, encoder_dtype))


# ---- files


def info_path(path: str | Path) -> str:
    """The JSON beside NAME.pth."""
    return str(path).removesuffix(".pth") + ".json"


def beside(path: str | Path, suffix: str) -> Path:
    """A file that belongs to the SAE NAME.pth, such as beside(path, "top.parquet"): NAME.top.parquet."""
    return Path(str(path).removesuffix(".pth") + "." + suffix)


def save_tensors(path: Path, state: dict) -> None:
    """torch.save, atomically; a full disk is an InputError."""
    with stage.atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # how it reports a full disk
            raise OSError(str(error).partition("\n")[0]) from error


def save_sae(sae: TopKSparseAutoencoder, path: str | Path, info: dict[str, Any], dtype=torch.float32) -> None:
    """Write NAME.pth, a plain state dict in `dtype`, and NAME.json."""
    state = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in sae.state_dict().items()}
    shape = {"d_model": sae.d_model, "n_latents": sae.n_latents, "k": sae.k, "normalize_eps": sae.normalize_eps}
    save_tensors(Path(path), state)
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
                f"{path} has no JSON beside it; give {name} (the published SAE: k=64, normalize_eps=1e-6), or write "
                f'{info_path(path)}: {{"k": 64, "normalize_eps": 1e-6, "site": "layers.22.attention_norm"}}.'
            )
    if not 0 < info["k"] <= n_latents:
        raise stage.InputError(f"{path} has {n_latents} latents, k = {info['k']} of them cannot stay; correct k.")
    sae = TopKSparseAutoencoder(d_model, n_latents, info["k"], info["normalize_eps"]).to(device=device, dtype=dtype)
    sae.load_state_dict({name: state[name] for name in keys})
    sae.info = info
    return sae.requires_grad_(False).eval()
