"""The training losses of Gao et al. 2024 (arXiv:2406.04093, section 2.4 and appendix A.2), and their gradients.

    S      = ReLU(TopK(W_enc (z - b_pre) + b_enc))      (batch, n_latents), sparse: k entries per row
    z_hat  = S W_dec^T + b_pre
    main   = |z - z_hat|^2
    aux    = |z - z_hat - A W_dec^T|^2                  A: the k_aux highest pre-activations of dead latents

With x = z - b_pre, g the gradient of z_hat and dS that of the kept pre-activations:

    dW_dec = g^T S      dW_enc = dS^T x      db_enc = sum dS      db_pre = sum g - W_enc^T db_enc

The dead latents' reconstruction has no ReLU and no b_pre; its gradient reaches neither b_pre nor the main loss. Both
losses and every gradient touch only kept latents. When several processes each hold a slice of the latents, they
exchange the values of their candidates and their parts of each reconstruction. Sums run in a fixed order. Nothing here
makes the CPU wait for a GPU, except one count in `keep_highest` when there are several slices.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distributed import ALONE, World
from sae import SparseAutoencoder, dot_products, products_are_exact, rows_at_once, top_k


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
    def where(cls, is_dead: Tensor, n_by_slice: list[int], k_aux: int, rank: int = 0) -> "Dead | None":
        """is_dead: bool (n_latents) of slice `rank`, as many as n_by_slice says.

        None, for no auxiliary loss, if k_aux is 0 or no latent is dead.
        """
        k = min(k_aux, sum(n_by_slice))
        return cls(is_dead.nonzero_static(size=n_by_slice[rank]).flatten(), n_by_slice, k) if k else None


def loss_sums(
    sae: SparseAutoencoder,
    z: Tensor,
    dead: Dead | None = None,
    slices: World = ALONE,
    encoder_dtype: torch.dtype = torch.float32,
) -> Losses:
    """The losses for normalised z (batch, d_model). dead: None for no auxiliary loss.

    slices: the processes that each hold a slice of the SAE; all pass the same z, and get main, aux and b_pre's gradient
    of the whole SAE. encoder_dtype: bfloat16 selects the latents by a product in bfloat16 and computes the selected
    values in float32; so does float32 where its products are not exact (`sae.products_are_exact`).
    """
    weights = sae.encoder.weight, sae.encoder.bias, sae.decoder.weight.t(), sae.b_pre
    return Losses(*SparseLosses.apply(*weights, z, sae.k, dead, slices, encoder_dtype))


class Weights(NamedTuple):
    """Of an SAE, or of one slice of its latents."""

    w_enc: Tensor  # (n_latents, d_model)
    b_enc: Tensor  # (n_latents)
    directions: Tensor  # (n_latents, d_model), W_dec^T


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
        weights, x = Weights(w_enc, b_enc, directions), z - b_pre
        kept = keep_highest(weights, x, k, slices, encoder_dtype)
        # z - z_hat, in which b_pre cancels.
        error = x - slices.all_reduce(weighted_sums(directions, kept.latents, kept.values, kept.offsets))
        aux, for_aux = x.new_zeros(()), ()
        if dead:
            aux, *aux_grads = auxiliary_loss(weights, x, error, dead, slices)
            for_aux = (dead.indices, *aux_grads)
        fired = n_entries(kept.latents, kept.values > 0, len(w_enc))
        ctx.slices = slices
        ctx.save_for_backward(w_enc, directions, x, error, *kept, *for_aux)
        ctx.mark_non_differentiable(fired)
        return error.square().sum(), aux, fired

    @staticmethod
    def backward(ctx: Any, g_main: Tensor, g_aux: Tensor, _fired: Tensor) -> tuple[Tensor | None, ...]:
        w_enc, directions, x, error, *rest = ctx.saved_tensors
        kept, for_aux = Kept(*rest[:4]), rest[4:]
        g = error * (-2 * g_main)
        grad_pre = dot_products(g, directions, kept.latents, kept.offsets, kept.rows) * (kept.values > 0)
        # By latent instead of by row; a stable sort, of int32 because that is cheaper, fixes the order of every sum.
        order = kept.latents.int().argsort(stable=True)
        rows, counts = kept.rows[order], n_entries(kept.latents, torch.ones_like(kept.latents), len(w_enc))
        starts = counts.cumsum(0) - counts
        grad_directions = weighted_sums(g, rows, kept.values[order], starts)
        grad_pre = grad_pre[order]
        grad_w_enc = weighted_sums(x, rows, grad_pre, starts)
        grad_b_enc = weighted_sums(x.new_ones(len(x), 1), rows, grad_pre, starts).squeeze(1)
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


def keep_highest(weights: Weights, x: Tensor, k: int, slices: World, encoder_dtype: torch.dtype) -> Kept:
    """This slice's share of each row's k highest latents over all slices. Values are always float32."""
    batch, n_latents = len(x), len(weights.w_enc)
    rough, w, b = (tensor.to(encoder_dtype) for tensor in (x, weights.w_enc, weights.b_enc))
    n_rows = rows_at_once(rough.element_size() * n_latents, x.device)
    block = rough.new_empty(min(n_rows, batch), n_latents)  # the one dense tensor, reused
    chosen = [
        top_k(torch.addmm(b, rows, w.t(), out=block[: len(rows)]), min(k, n_latents)) for rows in rough.split(n_rows)
    ]
    values, indices = (torch.cat(parts) for parts in zip(*chosen, strict=True))  # (batch, min(k, n_latents))
    slots = values.shape[1]
    offsets, entries = torch.arange(batch, device=x.device) * slots, torch.arange(batch * slots, device=x.device)
    kept = Kept(values.flatten(), indices.flatten(), entries // slots, offsets)
    if slices.size > 1:
        stays = highest_of_all(values, k, slices)
        counts, places = stays.sum(1), stays.flatten().nonzero().flatten()  # the CPU waits here for their number
        kept = Kept(kept.values[places], kept.latents[places], kept.rows[places], counts.cumsum(0) - counts)
    if encoder_dtype != torch.float32 or not products_are_exact(x.device):
        exact = dot_products(x, weights.w_enc, kept.latents, kept.offsets, kept.rows) + weights.b_enc[kept.latents]
        kept = kept._replace(values=exact)
    return kept._replace(values=kept.values.relu())


def highest_of_all(candidates: Tensor, k: int, slices: World) -> Tensor:
    """Which of this slice's candidates (batch, slots) are among the k highest of all slices: bool (batch, slots).

    Only values are sent, batch x slots from each process to each other. Ties go to the lower slice.
    """
    if slices.size == 1:
        return torch.ones_like(candidates, dtype=torch.bool)
    every = slices.all_gather(candidates).transpose(0, 1).flatten(1)  # (batch, size * slots)
    least = every.topk(k, dim=1).values[:, -1:]
    above, is_least = ~(every <= least), every == least  # NaN counts as above: it must reach the loss
    # Where more values equal the least than there is room for, the first of them stay.
    stays = above | (is_least & (is_least.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return stays.unflatten(1, (slices.size, -1))[:, slices.rank]


# ---- the auxiliary loss


def auxiliary_loss(
    weights: Weights, x: Tensor, error: Tensor, dead: Dead, slices: World
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared error of the dead latents' reconstruction of `error`, and its gradients with respect to their rows of
    w_enc, b_enc and directions. Dense over the dead latents, in blocks of rows."""
    w_enc, b_enc, directions = (tensor[dead.indices] for tensor in weights)
    loss = x.new_zeros(())
    grad_w, grad_b, grad_directions = (torch.zeros_like(tensor) for tensor in (w_enc, b_enc, directions))
    n_rows = rows_at_once(4 * max(dead.n_by_slice), x.device)
    for rows, target in zip(x.split(n_rows), error.split(n_rows), strict=True):
        values = torch.addmm(b_enc, rows, w_enc.t())  # (n_rows, dead latents)
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
    return loss, grad_w, grad_b, grad_directions


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


def n_entries(latents: Tensor, counted: Tensor, n_latents: int) -> Tensor:
    """How many of the entries that are `counted` (true or 1) each latent has: int64 (n_latents).

    `bincount` does the same but makes the CPU wait twice for a GPU.
    """
    return torch.zeros(n_latents, dtype=torch.int64, device=latents.device).scatter_add_(0, latents, counted.long())
