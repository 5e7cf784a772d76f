"""The training losses of Gao et al. 2024 (arXiv:2406.04093, section 2.4 and appendix A.2), and their gradients.

    S      = ReLU(TopK(W_enc (z - b_pre) + b_enc))      (batch, n_latents), sparse: k entries per row
    z_hat  = S W_dec^T + b_pre
    main   = |z - z_hat|^2
    aux    = |z - z_hat - A W_dec^T|^2                  A: the k_aux highest pre-activations of dead latents

With x = z - b_pre, g the gradient of z_hat and dS that of the kept pre-activations:

    dW_dec = g^T S      dW_enc = dS^T x      db_enc = sum dS      db_pre = sum g - W_enc^T db_enc

Other kinds change one part each. BatchTopK (Bussmann et al. 2024, arXiv:2412.06410) keeps the k x batch highest of the
whole batch instead of k per row: `keep_highest_of_batch`. A Matryoshka SAE (Bussmann et al. 2025, arXiv:2503.17547) has
several z_hat, each from the first n of its latents; main is the mean of their squared errors. A transcoder reads z and
reconstructs a target; without centring x = z, and db_pre = sum g; a skip adds z W_skip^T to z_hat, dW_skip = g^T z.

The dead latents' reconstruction has no ReLU and no b_pre; its gradient reaches neither b_pre nor the main loss. Both
losses and every gradient touch only kept latents. When several processes each hold a slice of the latents, they
exchange the values of their candidates and their parts of each reconstruction. Sums run in a fixed order. Nothing here
makes the CPU wait for a GPU, except one count in `keep_highest` when there are several slices.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distributed import ALONE, World
from sae import SparseAutoencoder, dot_products, products_are_exact, rows_at_once, top_k

_BELOW_GUESS = 0.8  # of what the last batch kept least: BatchTopK looks at nothing lower at first
_FIRST_ROWS = 256  # from which it guesses before the first batch


class Losses(NamedTuple):
    """Sums over a batch's activations, so that parts of a batch add up; divide by (activations x d_model)."""

    main: Tensor  # squared error of the reconstruction, normalised space; with `nested`, the mean over its prefixes
    aux: Tensor  # squared error of the dead latents' reconstruction of the error
    fired: Tensor  # (n_latents), int64: activations on which each latent has a value above zero
    whole: Tensor  # squared error of the reconstruction from all latents: main, unless there are prefixes; no gradient


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
    target: Tensor | None = None,
    kept: "Kept | None" = None,
    nested: Sequence[int] = (),
) -> Losses:
    """The losses for normalised z (batch, d_model). dead: None for no auxiliary loss.

    slices: the processes that each hold a slice of the SAE; all pass the same z, and get main, aux and the gradients
    of b_pre and the skip of the whole SAE. encoder_dtype: bfloat16 selects the latents by a product in bfloat16 and
    computes the selected values in float32; so does float32 where its products are not exact
    (`sae.products_are_exact`). target: (batch, d_model), what a transcoder should give, normalised; z when None.
    kept: of z, chosen before; by the SAE's own gate when None. nested: numbers of latents below n_latents, ascending,
    that also have to reconstruct by themselves.
    """
    with torch.no_grad():
        x = sae.centre(z)
        left = x if target is None and sae.kind.centred else (z if target is None else target) - sae.b_pre
        if kept is None:
            kept = keep(sae, x, slices, encoder_dtype)
        if nested:
            kept = by_prefix(kept, nested, slices.rank * sae.n_latents, len(z))
    weights = sae.encoder.weight, sae.encoder.bias, sae.decoder.weight.t(), sae.b_pre, sae.skip
    given = Given(z, x, left, kept, 1 + len(nested), dead, slices, sae.kind.centred)
    return Losses(*SparseLosses.apply(*weights, given))


class Weights(NamedTuple):
    """Of an SAE, or of one slice of its latents."""

    w_enc: Tensor  # (n_latents, d_model)
    b_enc: Tensor  # (n_latents)
    directions: Tensor  # (n_latents, d_model), W_dec^T

    @classmethod
    def of(cls, sae: SparseAutoencoder) -> "Weights":
        """Without gradients: to choose with."""
        return cls(*(w.detach() for w in (sae.encoder.weight, sae.encoder.bias, sae.decoder.weight.t())))


class Given(NamedTuple):
    """What `SparseLosses` computes with, besides the weights."""

    z: Tensor  # (batch, d_model)
    x: Tensor  # (batch, d_model), what the encoder reads
    left: Tensor  # (batch, d_model), what latents and skip should add up to: the target without b_pre
    kept: "Kept"
    n_prefixes: int
    dead: Dead | None
    slices: World
    centred: bool


class SparseLosses(torch.autograd.Function):
    """`Losses`, with the gradients above."""

    @staticmethod
    def forward(
        ctx: Any, w_enc: Tensor, b_enc: Tensor, directions: Tensor, b_pre: Tensor, skip: Tensor | None, given: Given
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z, x, left, kept, n_prefixes, dead, slices, _ = given
        weights = Weights(w_enc, b_enc, directions)
        if skip is not None:
            left = left - F.linear(z, skip)
        added = slices.all_reduce(weighted_sums(directions, kept.latents, kept.values, kept.offsets))
        # By prefix: (n_prefixes, batch, d_model). What is left by the latents of one and all before it.
        errors = left - added.view(n_prefixes, *x.shape).cumsum(0) if n_prefixes > 1 else (left - added)[None]
        aux, for_aux = x.new_zeros(()), ()
        if dead:
            aux, *aux_grads = auxiliary_loss(weights, x, errors[-1], dead, slices)
            for_aux = (dead.indices, *aux_grads)
        fired = n_entries(kept.latents, kept.values > 0, len(w_enc))
        whole = errors[-1].square().sum()
        main = errors.square().sum() / n_prefixes if n_prefixes > 1 else whole.clone()
        ctx.slices, ctx.centred, ctx.has_skip = slices, given.centred, skip is not None
        ctx.save_for_backward(w_enc, directions, z if skip is not None else None, x, errors, *kept, *for_aux)
        ctx.mark_non_differentiable(fired, whole)
        return main, aux, fired, whole

    @staticmethod
    def backward(ctx: Any, g_main: Tensor, g_aux: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        w_enc, directions, z, x, errors, *rest = ctx.saved_tensors
        kept, for_aux, n_prefixes = Kept(*rest[:4]), rest[4:], len(errors)
        g = errors * (-2 * g_main / n_prefixes)
        if n_prefixes > 1:
            g = g.flip(0).cumsum(0).flip(0)  # a latent is part of its own prefix's reconstruction and of those after it
        by_row = g.flatten(0, 1)  # as kept.rows counts
        grad_pre = dot_products(by_row, directions, kept.latents, kept.offsets, kept.rows) * (kept.values > 0)
        # By latent instead of by row; a stable sort, of int32 because that is cheaper, fixes the order of every sum.
        order = kept.latents.int().argsort(stable=True)
        rows, counts = kept.rows[order], n_entries(kept.latents, torch.ones_like(kept.latents), len(w_enc))
        starts = counts.cumsum(0) - counts
        grad_directions = weighted_sums(by_row, rows, kept.values[order], starts)
        grad_pre = grad_pre[order]
        rows = rows % len(x) if n_prefixes > 1 else rows
        grad_w_enc = weighted_sums(x, rows, grad_pre, starts)
        grad_b_enc = weighted_sums(x.new_ones(len(x), 1), rows, grad_pre, starts).squeeze(1)
        grad_b_pre = g[0].sum(0)
        if ctx.centred:
            grad_b_pre -= ctx.slices.all_reduce(grad_b_enc @ w_enc)
        grad_skip = g[0].t() @ z if ctx.has_skip else None
        if for_aux:
            indices, *aux_grads = for_aux
            for grad, aux_grad in zip((grad_w_enc, grad_b_enc, grad_directions), aux_grads, strict=True):
                grad.index_add_(0, indices, aux_grad * g_aux)
        return grad_w_enc, grad_b_enc, grad_directions, grad_b_pre, grad_skip, None


# ---- the main loss: which latents are kept


class Kept(NamedTuple):
    """The kept latents, by row: an entry per pair of batch row and latent."""

    values: Tensor  # >= 0
    latents: Tensor
    rows: Tensor
    offsets: Tensor  # (batch,), where each row's entries begin

    @classmethod
    def of(cls, values: Tensor, latents: Tensor, rows: Tensor, n_rows: int) -> "Kept":
        """Entries in ascending order of rows."""
        counts = n_entries(rows, torch.ones_like(rows), n_rows)
        return cls(values, latents, rows, counts.cumsum(0) - counts)

    def only(self, stays: Tensor) -> "Kept":
        """The entries that stay, bool (n_entries); on a GPU the CPU waits here for their number."""
        places = stays.nonzero().flatten()
        return Kept.of(self.values[places], self.latents[places], self.rows[places], len(self.offsets))


def keep(sae: SparseAutoencoder, x: Tensor, slices: World, encoder_dtype: torch.dtype) -> Kept:
    """What the SAE's own gate keeps of x (batch, d_model), of which b_pre has been taken off if it is centred."""
    weights = Weights.of(sae)
    if sae.kind.gate == "topk":
        assert sae.k is not None
        return keep_highest(weights, x, sae.k, slices, encoder_dtype)
    return keep_above(weights, x, x.new_zeros(()) if sae.threshold is None else sae.threshold, encoder_dtype)


def keep_highest(weights: Weights, x: Tensor, k: int, slices: World, encoder_dtype: torch.dtype) -> Kept:
    """This slice's share of each row's k highest latents over all slices. Values are always float32."""
    batch, n_latents = len(x), len(weights.w_enc)
    blocks = (top_k(block, min(k, n_latents)) for block in rough_pre_acts(weights, x, encoder_dtype))
    values, indices = (torch.cat(parts) for parts in zip(*blocks, strict=True))  # (batch, min(k, n_latents))
    slots = values.shape[1]
    offsets, entries = torch.arange(batch, device=x.device) * slots, torch.arange(batch * slots, device=x.device)
    kept = Kept(values.flatten(), indices.flatten(), entries // slots, offsets)
    if slices.size > 1:
        kept = kept.only(highest_of_all(values, k, slices).flatten())
    kept = exact_values(kept, weights, x, encoder_dtype)
    return kept._replace(values=kept.values.relu())


def keep_above(weights: Weights, x: Tensor, least: Tensor, encoder_dtype: torch.dtype) -> Kept:
    """This slice's pre-activations above 0 and above `least`, one number or one per latent. Values are float32."""
    least, first, parts = least.clamp(min=0), 0, []
    for block in rough_pre_acts(weights, x, encoder_dtype):
        row, latent = (~(block <= least)).nonzero(as_tuple=True)  # NaN counts as above: it must reach the loss
        parts.append((block[row, latent].float(), latent, row + first))
        first += len(block)
    values, latents, rows = (torch.cat(part) for part in zip(*parts, strict=True))
    kept = Kept.of(values, latents, rows, len(x))
    kept = exact_values(kept, weights, x, encoder_dtype)
    return kept._replace(values=kept.values.relu())


def keep_highest_of_batch(
    sae: SparseAutoencoder, parts: Sequence[Tensor], n: int, guess: Tensor, everyone: World, encoder_dtype: torch.dtype
) -> tuple[list[Kept], Tensor]:
    """BatchTopK: this process's share of the n highest pre-activations above 0 of a whole batch, and the least of them,
    0 if there are fewer. Values equal to the least are all kept.

    parts: what the encoder reads (rows, d_model), of this process's rows; its share is that of its slice of the
    latents. guess: (), about the least, the same on all processes; a good one saves work, all give the same result.
    """
    weights = Weights.of(sae)
    first = floor = float(guess) * _BELOW_GUESS
    while True:
        candidates = [keep_above(weights, x, x.new_tensor(floor), encoder_dtype) for x in parts]
        found = torch.tensor(sum(len(kept.values) for kept in candidates), device=sae.b_pre.device)
        if floor <= 0 or int(everyone.all_reduce(found)) >= n:
            break
        floor = floor / 2 if floor > first / 1000 else 0.0
    least = nth_highest(torch.cat([kept.values for kept in candidates]), n, everyone)
    return [kept.only(~(kept.values < least) & (kept.values != 0)) for kept in candidates], least


def typical_kth_highest(sae: SparseAutoencoder, x: Tensor, k: int, everyone: World) -> Tensor:
    """(), about the least that BatchTopK keeps: the k-th highest pre-activation of a row, averaged over the first ones
    of x, what the encoder reads, of each process."""
    block = next(rough_pre_acts(Weights.of(sae), x[:_FIRST_ROWS], torch.float32))
    values, _ = top_k(block, min(k, block.shape[1]))
    kth = values.amin(1).mean()
    return everyone.all_reduce(kth.reshape(1))[0] / everyone.size


def nth_highest(values: Tensor, n: int, everyone: World) -> Tensor:
    """(), the n-th highest of the float32 values >= 0 of all processes, exactly; 0 if there are fewer than n.

    Digit by digit, from the highest: the bits of floats >= 0, read as integers, sort as the floats do. The processes
    exchange how often each value of a digit occurs, 16 kB at most.
    """
    bits, known, left = values.view(torch.int32).long(), values.new_zeros((), dtype=torch.int64), n
    for shift, width in ((20, 11), (10, 10), (0, 10)):
        digit = (bits >> shift) & (2**width - 1)
        matches = (bits >> (shift + width)) == known
        counts = everyone.all_reduce(n_entries(digit, matches, 2**width))
        at_least = counts.flip(0).cumsum(0).flip(0)  # how many have this digit or a higher one
        found = ((at_least >= left).sum() - 1).clamp(min=0)
        left = left - (at_least[found] - counts[found])
        known = (known << width) | found
    return known.int().view(torch.float32)


def rough_pre_acts(weights: Weights, x: Tensor, encoder_dtype: torch.dtype) -> Iterator[Tensor]:
    """The pre-activations of x in blocks of rows (n_rows, n_latents), in encoder_dtype; each block overwrites the last:
    it is the one dense tensor."""
    rough, w, b = (tensor.to(encoder_dtype) for tensor in (x, weights.w_enc, weights.b_enc))
    n_rows = rows_at_once(rough.element_size() * len(w), x.device)
    block = rough.new_empty(min(n_rows, len(x)), len(w))
    for rows in rough.split(n_rows):
        yield torch.addmm(b, rows, w.t(), out=block[: len(rows)])


def exact_values(kept: Kept, weights: Weights, x: Tensor, encoder_dtype: torch.dtype) -> Kept:
    """The entries with their pre-activations in float32, computed again where the product that chose them was rough."""
    if encoder_dtype == torch.float32 and products_are_exact(x.device):
        return kept
    dots = dot_products(x, weights.w_enc, kept.latents, kept.offsets, kept.rows)
    return kept._replace(values=dots + weights.b_enc[kept.latents])


def by_prefix(kept: Kept, nested: Sequence[int], first_latent: int, batch: int) -> Kept:
    """The entries by the first prefix that holds their latent, then by row; they count rows as prefix * batch + row.

    nested: the prefixes' numbers of latents, without the last, which is all. first_latent: of this slice.
    """
    sizes = torch.tensor(list(nested), device=kept.latents.device)
    rows = torch.bucketize(kept.latents + first_latent, sizes, right=True) * batch + kept.rows
    order = rows.argsort(stable=True)
    return Kept.of(kept.values[order], kept.latents[order], rows[order], (1 + len(nested)) * batch)


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
