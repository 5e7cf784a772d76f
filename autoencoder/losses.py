"""The training losses of Gao et al. 2024 (arXiv:2406.04093, section 2.4 and appendix A.2), and their gradients.

    S      = ReLU(TopK(W_enc (z - b_pre) + b_enc))      (batch, n_latents), sparse: k entries per row
    z_hat  = S W_dec^T + b_pre
    main   = |z - z_hat|^2
    aux    = |z - z_hat - A W_dec^T|^2                  A: the k_aux highest pre-activations of dead latents

With g the gradient of z_hat and dS that of the kept pre-activations:

    dW_dec = g^T S      dW_enc = dS^T (z - b_pre)      db_enc = sum dS      db_pre = sum g - W_enc^T db_enc

The dead latents' reconstruction has no ReLU and no b_pre; its gradient reaches neither b_pre nor the main loss. Both
losses and every gradient touch only kept latents. When several processes each hold a slice of the latents, they
exchange the values of their candidates and their parts of each reconstruction. Sums run in a fixed order.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distributed import ALONE, World
from sae import TopKSparseAutoencoder, rows_at_once, top_k


class Losses(NamedTuple):
    """Sums over a batch's activations, so that parts of a batch add up; divide by (activations x d_model)."""

    main: Tensor  # squared error of the reconstruction, normalised space
    aux: Tensor  # squared error of the dead latents' reconstruction of that error
    fired: Tensor  # (n_latents), int64: activations on which each latent has a value above zero


class Dead(NamedTuple):
    """The dead latents, for the auxiliary loss."""

    indices: Tensor  # int64, those of this slice
    n_by_slice: list[int]  # how many each slice has
    k: int  # kept per activation over all slices: at most the sum of n_by_slice

    @classmethod
    def where(cls, is_dead: Tensor, n_by_slice: list[int], k_aux: int) -> "Dead | None":
        """is_dead: bool (n_latents) of this slice. None, for no auxiliary loss, if k_aux is 0 or no latent is dead."""
        k = min(k_aux, sum(n_by_slice))
        return cls(is_dead.nonzero().flatten(), n_by_slice, k) if k else None


def loss_sums(
    sae: TopKSparseAutoencoder,
    z: Tensor,
    dead: Dead | None = None,
    slices: World = ALONE,
    encoder_dtype: torch.dtype = torch.float32,
) -> Losses:
    """The losses for normalised z (batch, d_model). dead: None for no auxiliary loss.

    slices: the processes that each hold a slice of the SAE; all pass the same z, and get main, aux and b_pre's gradient
    of the whole SAE. encoder_dtype: bfloat16 selects the latents by a product in bfloat16 and computes the selected
    values in float32.
    """
    weights = sae.encoder.weight, sae.encoder.bias, sae.decoder.weight.t(), sae.b_pre
    return Losses(*SparseLosses.apply(*weights, z, sae.k, dead, slices, encoder_dtype))


class Weights(NamedTuple):
    """Of an SAE, or of one slice of its latents."""

    w_enc: Tensor  # (n_latents, d_model)
    b_enc: Tensor  # (n_latents)
    directions: Tensor  # (n_latents, d_model), W_dec^T
    b_pre: Tensor  # (d_model)


class SparseLosses(torch.autograd.Function):
    """`Losses`, with the gradients above."""

    @staticmethod
    def forward(
        ctx: Any,
        w_enc: Tensor,
        b_enc: Tensor,
        directions: Tensor,
        b_pre: Tensor,
        z: Tensor,
        k: int,
        dead: Dead | None,
        slices: World,
        encoder_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = Weights(w_enc, b_enc, directions, b_pre)
        kept = keep_highest(weights, z, k, slices, encoder_dtype)
        z_hat = slices.all_reduce(weighted_sums(directions, kept.latents, kept.values, kept.offsets)) + b_pre
        error = z - z_hat
        aux, for_aux = z.new_zeros(()), ()
        if dead:
            aux, *aux_grads = auxiliary_loss(weights, z, error, dead, slices)
            for_aux = (dead.indices, *aux_grads)
        fired = kept.latents[kept.values > 0].bincount(minlength=len(w_enc))
        ctx.slices = slices
        ctx.save_for_backward(w_enc, directions, b_pre, z, error, *kept, *for_aux)
        ctx.mark_non_differentiable(fired)
        return error.square().sum(), aux, fired

    @staticmethod
    def backward(ctx: Any, g_main: Tensor, g_aux: Tensor, _fired: Tensor) -> tuple[Tensor | None, ...]:
        w_enc, directions, b_pre, z, error, *rest = ctx.saved_tensors
        kept, for_aux = Kept(*rest[:4]), rest[4:]
        g = error * (-2 * g_main)
        grad_pre = dot_products(g, directions, kept) * (kept.values > 0)
        # By latent instead of by row; a stable sort fixes the order of every sum.
        order = kept.latents.argsort(stable=True)
        rows, counts = kept.rows[order], kept.latents.bincount(minlength=len(w_enc))
        starts = counts.cumsum(0) - counts
        grad_directions = weighted_sums(g, rows, kept.values[order], starts)
        grad_pre = grad_pre[order]
        grad_w_enc = weighted_sums(z, rows, grad_pre, starts)
        grad_b_enc = weighted_sums(z.new_ones(len(z), 1), rows, grad_pre, starts).squeeze(1)
        grad_w_enc.addcmul_(grad_b_enc[:, None], b_pre, value=-1)
        grad_b_pre = g.sum(0) - ctx.slices.all_reduce(grad_b_enc @ w_enc)
        if for_aux:
            indices, *aux_grads = for_aux
            for grad, aux_grad in zip((grad_w_enc, grad_b_enc, grad_directions), aux_grads, strict=True):
                grad.index_add_(0, indices, aux_grad * g_aux)
        return grad_w_enc, grad_b_enc, grad_directions, grad_b_pre, *[None] * 5


# ---- the main loss: which latents are kept


class Kept(NamedTuple):
    """The kept latents, by row: an entry per pair of batch row and latent."""

    values: Tensor  # >= 0
    latents: Tensor
    rows: Tensor
    offsets: Tensor  # (batch,), where each row's entries begin


def keep_highest(weights: Weights, z: Tensor, k: int, slices: World, encoder_dtype: torch.dtype) -> Kept:
    """This slice's share of each row's k highest latents over all slices. Values are always float32."""
    batch, n_latents = len(z), len(weights.w_enc)
    shift = weights.b_enc - weights.w_enc @ weights.b_pre  # W (z - b_pre) + b = W z + shift
    x, w, b = (tensor.to(encoder_dtype) for tensor in (z, weights.w_enc, shift))
    n_rows = rows_at_once(x.element_size() * n_latents, z.device)
    block = x.new_empty(min(n_rows, batch), n_latents)  # the one dense tensor, reused
    chosen = [top_k(torch.addmm(b, rows, w.t(), out=block[: len(rows)]), min(k, n_latents)) for rows in x.split(n_rows)]
    values, indices = (torch.cat(parts) for parts in zip(*chosen, strict=True))  # (batch, min(k, n_latents))
    slots = values.shape[1]
    offsets = torch.arange(batch, device=z.device) * slots
    kept = Kept(values.flatten(), indices.flatten(), (offsets // slots).repeat_interleave(slots), offsets)
    if encoder_dtype != torch.float32:
        kept = kept._replace(values=dot_products(z, weights.w_enc, kept) + shift[kept.latents])
    if slices.size > 1:
        stays = highest_of_all(kept.values.view(batch, slots), k, slices)
        counts, stays = stays.sum(1), stays.flatten()
        kept = Kept(kept.values[stays], kept.latents[stays], kept.rows[stays], counts.cumsum(0) - counts)
    return kept._replace(values=kept.values.relu())


def highest_of_all(candidates: Tensor, k: int, slices: World) -> Tensor:
    """Which of this slice's candidates (batch, slots) are among the k highest of all slices: bool (batch, slots).

    Only values are sent, 4 bytes x batch x slots from each process to each other. Ties go to the lower slice.
    """
    if slices.size == 1:
        return torch.ones_like(candidates, dtype=torch.bool)
    every = [torch.empty_like(candidates) for _ in range(slices.size)]
    torch.distributed.all_gather(every, candidates.contiguous(), group=slices.group)
    best = torch.cat(every, 1).sort(dim=1, descending=True, stable=True).indices[:, :k]
    is_best = torch.zeros(len(candidates), slices.size * candidates.shape[1], dtype=torch.bool, device=best.device)
    return is_best.scatter_(1, best, True).view(len(candidates), slices.size, -1)[:, slices.rank]


# ---- the auxiliary loss


def auxiliary_loss(
    weights: Weights, z: Tensor, error: Tensor, dead: Dead, slices: World
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared error of the dead latents' reconstruction of `error`, and its gradients with respect to their rows of
    w_enc, b_enc and directions. Dense over the dead latents, in blocks of rows."""
    w_enc, b_enc, directions = (tensor[dead.indices] for tensor in weights[:3])
    shift = b_enc - w_enc @ weights.b_pre
    loss = z.new_zeros(())
    grad_w, grad_b, grad_directions = (torch.zeros_like(tensor) for tensor in (w_enc, b_enc, directions))
    n_rows = rows_at_once(4 * max(dead.n_by_slice), z.device)
    for rows, target in zip(z.split(n_rows), error.split(n_rows), strict=True):
        values = torch.addmm(shift, rows, w_enc.t())  # (n_rows, dead latents)
        left_out = None
        if dead.k < sum(dead.n_by_slice):
            left_out = ~kept_of_dead(values, dead, slices)
            values = values.masked_fill_(left_out, 0)
        g = slices.all_reduce(values @ directions) - target
        loss += g.square().sum()
        g *= 2
        grad_values = g @ directions.t()
        if left_out is not None:
            grad_values.masked_fill_(left_out, 0)
        grad_directions += values.t() @ g
        grad_w += grad_values.t() @ rows
        grad_b += grad_values.sum(0)
    return loss, grad_w - grad_b[:, None] * weights.b_pre, grad_b, grad_directions


def kept_of_dead(pre_acts: Tensor, dead: Dead, slices: World) -> Tensor:
    """Which pre-activations (rows, dead latents of this slice) are among the dead.k highest of all slices: bool."""
    slots = min(dead.k, max(dead.n_by_slice))  # candidates per slice, padded if it has fewer
    values, indices = pre_acts.topk(min(slots, pre_acts.shape[1]), dim=1, sorted=False)
    candidates = F.pad(values, (0, slots - values.shape[1]), value=-torch.inf)
    stays = highest_of_all(candidates, dead.k, slices)[:, : values.shape[1]]
    return torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(1, indices, stays)


# ---- sums over kept latents


def weighted_sums(source: Tensor, indices: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Sum weights[e] * source[indices[e]] over the entries from each offset to the next; zeros for no entries."""
    return F.embedding_bag(indices, source, offsets=offsets, per_sample_weights=weights, mode="sum")


def dot_products(a: Tensor, b: Tensor, kept: Kept) -> Tensor:
    """a[row] . b[latent] of every entry."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        a.contiguous(), b, kept.latents, kept.offsets, kept.rows, 0
    )
