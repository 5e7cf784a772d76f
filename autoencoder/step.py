"""One training step of an SAE, alone or shared by the processes of a grid: gradients, agree, apply.

    pending = step.gradients(x)             of the whole batch
    agreed = step.agree(pending)            the same numbers on every process
    step.apply(pending, agreed, 5e-5, 0)    learning rate, number of steps before

Only `apply` changes anything, and it waits for no one: a process stopped or left alone before it still holds the whole
state of the previous step.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from autoencoder.losses import Dead, Kept, Losses, keep_highest_of_batch, loss_sums, typical_kth_highest
from pipeline.distributed import Grid
from sae import SparseAutoencoder

_LONGEST = 10.0  # of an activation's length, in root mean squares


class StepOptions(NamedTuple):
    """The options of a step, except the learning rate, named as in sae_training.py."""

    batch_size: int  # activations per step, over all processes
    k_aux: int  # dead latents in the auxiliary loss
    aux_loss_coeff: float = 1 / 32
    dead_after_tokens: int = 10_000_000
    betas: tuple[float, float] = (0.85, 0.9999)
    adam_eps: float = 6.25e-10
    weight_decay: float = 0.0
    grad_clip: float | None = None  # largest norm of the whole gradient
    micro_batch_size: int | None = None  # activations per forward pass of a process; None: its whole share
    encoder_dtype: str = "float32"
    matryoshka: tuple[int, ...] | None = None  # numbers of latents that also reconstruct by themselves


class Pending(NamedTuple):
    """What a step will change, besides the gradients, which are in the parameters."""

    losses: Tensor  # (2,), main and aux: what this process's rows contribute to the batch means
    fired: Tensor  # (n_latents), int64: activations of the whole batch on which each latent of the slice fired
    silent_tokens: Tensor  # (n_latents), int64: the counters after this step
    least: Tensor | None = None  # (), the least pre-activation that BatchTopK kept


class Agreed(NamedTuple):
    """What the processes agree on in a step, the same on all of them."""

    stop: bool  # one of them got a signal
    save: bool  # the first of them asks for a checkpoint
    main: float  # mean losses of the whole batch
    aux: float
    n_dead: list[int]  # dead latents after this step, by slice
    longest_silence: int  # in activations


class Step:
    """This process's slice of the SAE (all of it if alone), with AdamW's moments and the counters.

    The processes of a row of the grid each hold a slice of the latents and see the same activations; those of a column
    hold the same slice and divide the batch. sae: the whole SAE; its slice is cut here. One with gate jumprelu is
    trained by BatchTopK: on average over a batch, an activation keeps k latents.
    """

    def __init__(self, sae: SparseAutoencoder, options: StepOptions, grid: Grid):
        self.world, self.data, self.slices = grid.world, grid.column, grid.row
        self.options = options
        self.sae = sae.slice(self.slices.rank, self.slices.size) if self.slices.size > 1 else sae
        self.sae.to(self.world.device)
        self.parameters = dict(self.sae.named_parameters())  # first those that all slices share
        self.n_shared = 1 if self.sae.skip is None else 2
        self.by_batch = self.sae.kind.gate == "jumprelu"
        self.least: Tensor | None = None  # (), the least pre-activation that BatchTopK kept of the last batch
        # AdamW's moments, laid out in memory as the parameters are.
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        # Activations since each latent last fired; activations it fired on since the counter was last reset.
        self.silent_tokens, self.firing = torch.zeros(
            2, self.sae.n_latents, dtype=torch.int64, device=self.world.device
        )
        self.n_dead = [0] * self.slices.size  # by slice

    def dead(self) -> Dead | None:
        return Dead.where(self._is_dead(self.silent_tokens), self.n_dead, self.options.k_aux, self.slices.rank)

    def _is_dead(self, silent_tokens: Tensor) -> Tensor:
        return silent_tokens >= self.options.dead_after_tokens

    def normalize(self, x: Tensor) -> Tensor:
        """Raw x (..., d_model), normalised, as it is trained on: see `shortened`."""
        z, _, _ = self.sae.normalize(x)
        return z if self.sae.kind.normalization == "layer_norm" else shortened(z)

    def normalize_target(self, y: Tensor) -> Tensor:
        """Raw y (..., d_model) at a transcoder's target, likewise."""
        return shortened(self.sae.normalize_target(y))

    def losses(
        self,
        z: Tensor,
        dead: Dead | None,
        encoder_dtype: torch.dtype,
        target: Tensor | None = None,
        kept: Kept | None = None,
    ) -> Losses:
        nested = self.options.matryoshka or ()
        return loss_sums(self.sae, z, dead, self.slices, encoder_dtype, target, kept, nested)

    def gradients(self, x: Tensor, y: Tensor | None = None) -> Pending:
        """Leave the whole batch's gradients in the parameters. x: this process's rows, raw, as many on each process; y:
        of a transcoder also the rows to reconstruct."""
        options = self.options
        encoder_dtype = getattr(torch, options.encoder_dtype)
        scale = 1 / (options.batch_size * self.sae.d_model)
        losses, fired = x.new_zeros(2, dtype=torch.float32), torch.zeros_like(self.firing)
        dead = self.dead()
        parts, targets = self._parts(x), [None] if y is None else self._parts(y)
        choice, least = self._kept_of_batch(parts, encoder_dtype) if self.by_batch else ([None], None)
        for part, to, kept in zip_longest(parts, targets, choice):
            z, target = self.normalize(part), None if to is None else self.normalize_target(to)
            sums = self.losses(z, dead, encoder_dtype, target, kept)
            ((sums.main + options.aux_loss_coeff * sums.aux) * scale).backward()
            losses += torch.stack([sums.whole, sums.aux]).detach() * scale
            fired += sums.fired
        gradients = self._gradients()
        shared, own = gradients[: self.n_shared], gradients[self.n_shared :]
        for tensor in (*own, fired):
            self.data.all_reduce(tensor if tensor.is_contiguous() else tensor.t())  # the decoder's, stored by latent
        for grad in shared:
            # Each slice has the complete gradient; one sum over all processes keeps it bitwise equal on all of them.
            self.world.all_reduce(grad.div_(self.slices.size))
        self.sae.project_decoder_grad()
        if options.grad_clip is not None:
            own_square = torch.stack([torch.linalg.vector_norm(grad) for grad in own]).square().sum()
            squares = [self.slices.all_reduce(own_square), *(grad.square().sum() for grad in shared)]
            norm = torch.stack(squares).sum().sqrt()
            for grad in gradients:
                grad.mul_((options.grad_clip / norm).clamp(max=1))
        silent_tokens = (self.silent_tokens + options.batch_size).masked_fill_(fired > 0, 0)
        return Pending(losses, fired, silent_tokens, least)

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows that all processes of this row see, in micro-batches."""
        x = self.slices.all_gather(x).flatten(0, 1)
        return x.split(self.options.micro_batch_size or self.options.batch_size // self.data.size)

    def _kept_of_batch(self, parts: Sequence[Tensor], encoder_dtype: torch.dtype) -> tuple[list[Kept], Tensor]:
        """What BatchTopK keeps of the whole batch, by part, and the least of it. parts: raw."""
        sae = self.sae
        assert sae.k is not None
        with torch.no_grad():
            read = [sae.centre(self.normalize(part)) for part in parts]
            guess = self.least
            if guess is None:
                guess = typical_kth_highest(sae, read[0], sae.k, self.world)
            n_rows = self.data.size * sum(map(len, parts))  # of the whole batch
            return keep_highest_of_batch(sae, read, sae.k * n_rows, guess, self.world, encoder_dtype)

    def least_kept(self, x: Tensor) -> Tensor:
        """(), the least pre-activation that BatchTopK keeps of a batch of any size; nothing changes. x: as for
        `gradients`."""
        return self._kept_of_batch(self._parts(x), torch.float32)[1]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def agree(self, pending: Pending, signal: int = 0, save: bool = False) -> Agreed:
        """The one exchange between all processes in a step, and the point where the CPU waits for the GPU.

        signal: the number of the signal this process got; 0 for none. save: that of the first process counts.
        """
        width = self.slices.size
        numbers = torch.zeros(4 + 2 * width, dtype=torch.float64, device=self.world.device)
        numbers[0], numbers[1] = signal, save and self.world.is_main
        if self.slices.is_main:
            numbers[2:4] = pending.losses
        if self.data.is_main:
            numbers[4 + self.slices.rank] = self._is_dead(pending.silent_tokens).sum()
            numbers[4 + width + self.slices.rank] = pending.silent_tokens.max()
        stop, save_now, main, aux, *rest = self.world.all_reduce(numbers).tolist()
        return Agreed(stop > 0, save_now > 0, main, aux, [int(n) for n in rest[:width]], int(max(rest[width:])))

    def apply(self, pending: Pending, agreed: Agreed, learning_rate: float, n_before: int) -> None:
        """Take the step. n_before: the number of steps before it."""
        options = self.options
        # The class AdamW does the same but imports torch's compiler first, which costs each process seconds.
        with torch.no_grad():
            adamw(
                list(self.parameters.values()),
                self._gradients(),
                list(self.exp_avg.values()),
                list(self.exp_avg_sq.values()),
                [],
                list(torch.full((len(self.parameters),), n_before, dtype=torch.float32, device=self.world.device)),
                fused=True,
                amsgrad=False,
                beta1=options.betas[0],
                beta2=options.betas[1],
                lr=learning_rate,
                weight_decay=options.weight_decay,
                eps=options.adam_eps,
                maximize=False,
            )
        self.sae.zero_grad()
        self.sae.normalize_decoder()
        self.firing += pending.fired
        self.silent_tokens.copy_(pending.silent_tokens)
        self.n_dead = agreed.n_dead
        self.least = pending.least

    # ---- checkpoints

    def state(self) -> dict[str, dict[str, Tensor]]:
        """This slice's part of a checkpoint."""
        counters = {"silent_tokens": self.silent_tokens, "firing": self.firing}
        counters |= {} if self.least is None else {"least": self.least}
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {"sae": self.sae.state_dict(), **moments, "counters": counters}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from the `state` of this slice. All processes must call this: they exchange counts of the dead."""
        self.sae.load_state_dict(state["sae"])
        for name in self.parameters:
            self.exp_avg[name].copy_(state["exp_avg"][name])
            self.exp_avg_sq[name].copy_(state["exp_avg_sq"][name])
        self.silent_tokens.copy_(state["counters"]["silent_tokens"])
        self.firing.copy_(state["counters"]["firing"])
        least = state["counters"].get("least")
        self.least = None if least is None else least.to(self.world.device)
        unchanged = Pending(torch.zeros(2), torch.zeros_like(self.firing), self.silent_tokens)
        self.n_dead = self.agree(unchanged).n_dead

    def bytes_sent(self) -> tuple[float, float]:
        """`bytes_sent` for this run while no latent is dead."""
        sae, options = self.sae, self.options
        data, latents = bytes_sent(
            *(sae.d_model, sae.n_latents * self.slices.size, 0 if self.by_batch else sae.k or 0, options.batch_size),
            *(self.data.size, self.slices.size, getattr(torch, options.encoder_dtype).itemsize),
            n_sites=1 if sae.kind.target_site is None else 2,
            n_prefixes=1 + len(options.matryoshka or ()),
        )
        if sae.skip is not None:
            data += ring_bytes(self.world.size, 4 * sae.skip.numel())
        return data, latents


def shortened(z: Tensor) -> Tensor:
    """z (..., d_model), scaled by a constant to a mean squared length of d_model; those longer than _LONGEST times that
    are made that long.

    A few tokens in ten thousand, on which attention rests, are 50 times as long as the others (Sun et al. 2024,
    arXiv:2402.17762): squared, they would be half of the loss, and their batches would end the run.
    """
    longest = _LONGEST * z.shape[-1] ** 0.5
    return z * (longest / z.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1)


def bytes_sent(
    d_model: int,
    n_latents: int,
    k: int,
    batch_size: int,
    n_data: int,
    width: int,
    choice_bytes: int = 4,
    n_candidates: int = 0,
    n_sites: int = 1,
    n_prefixes: int = 1,
) -> tuple[float, float]:
    """Bytes a process sends per step in a grid of n_data x width: for data parallelism, and for latent parallelism.

    Data: the gradients of its slice and the firing counts. Latents: its rows of the batch, at each of n_sites, the
    values of its candidates (choice_bytes each), the partial reconstructions of each prefix, b_pre's gradient; while
    latents are dead also, for the auxiliary loss, n_candidates (the fewer of k_aux and the most that a slice has) for
    each row and a reconstruction. All-reduce and all-gather count as rings. The arithmetic is spelled out in
    docs/scaling.md.
    """
    n_slice, n_rows = n_latents // width, batch_size // n_data
    data = ring_bytes(n_data, 4 * n_slice * (2 * d_model + 1) + 8 * n_slice)
    data += ring_bytes(n_data * width, 4 * d_model)
    batch = (width - 1) * n_sites * 2 * d_model * n_rows // width
    candidates = (width - 1) * n_rows * choice_bytes * min(k, n_slice)
    latents = batch + candidates + ring_bytes(width, 4 * d_model * (n_prefixes * n_rows + 1))
    if n_candidates:
        # They are exchanged only where there are more dead latents than k_aux.
        latents += (width - 1) * n_rows * 4 * n_candidates + ring_bytes(width, 4 * d_model * n_rows)
    return data, latents


def ring_bytes(n: int, n_bytes: int) -> float:
    """What each of n processes sends in an all-reduce of n_bytes."""
    return 2 * (n - 1) / n * n_bytes
