"""The sparse training loss of the autoencoder and its gradients."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sae import TopKSparseAutoencoder, rows_at_once, top_k


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
