"""The Llama 3 transformer in plain PyTorch, with Meta's parameter names, open at seven sites of every layer.

Architecture: "The Llama 3 Herd of Models", arXiv:2407.21783, section 3.2. RMSNorm: arXiv:1910.07467. SwiGLU:
arXiv:2002.05202. Rotary embeddings: arXiv:2104.09864. Grouped-query attention: arXiv:2305.13245.

Sites, each (batch, seq, d_model), in the order in which a layer computes them:

    x -> resid_pre -> attention_norm -> attention -> attention_out -> + -> resid_mid
                                                     -> ffn_norm -> mlp -> mlp_out -> + -> resid_post
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_3.packed import PackedLinear, pack_all

SITES = ("resid_pre", "attention_norm", "attention_out", "resid_mid", "ffn_norm", "mlp_out", "resid_post")

Hook = Callable[[str, Tensor], Tensor]  # (site, x) -> x


@dataclass(frozen=True)
class ModelArgs:
    """What a checkpoint's params.json or config.json says. rope_scaling_factor 1 means plain RoPE."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    hidden_dim: int  # width inside the feed-forward layer
    head_dim: int = 0  # dim / n_heads when not given
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_divisors: tuple[float, ...] | None = None  # of each pair's frequency, in place of the scaling above (GGUF)
    rope_original_context: int = 8192  # 0: every wavelength counts as long, so all are stretched ("linear" scaling)
    max_seq_len: int = 8192  # positions it was trained for

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)


def hidden_dim(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Width of the feed-forward layer as Meta's params.json implies it: two thirds of 4 dim, scaled, rounded up."""
    width = int(2 * 4 * dim / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * math.ceil(width / multiple_of)


# ---- rotary position embedding


def rope_frequencies(args: ModelArgs) -> Tensor:
    """Angle per position of each rotated pair, (head_dim / 2), float32, in radians.

    With a scaling factor, wavelengths longer than the original context are stretched by it, wavelengths under a quarter
    of it are kept, and those between are blended (Llama 3.1, arXiv:2407.21783 section 3.4, and Meta's released code).
    """
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.int64).float() / args.head_dim
    freqs = 1.0 / (args.rope_theta**exponents)
    if args.rope_divisors is not None:
        return freqs / torch.tensor(args.rope_divisors)
    if args.rope_scaling_factor == 1.0:
        return freqs
    wavelengths = 2 * math.pi / freqs
    low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
    kept = (args.rope_original_context / wavelengths - low) / (high - low)
    kept = kept.clamp(0.0, 1.0)  # 1: short waves, unchanged; 0: long waves, fully stretched
    return (1 - kept) * freqs / args.rope_scaling_factor + kept * freqs


@functools.lru_cache(8)
def rope_frequencies_on(args: ModelArgs, device: torch.device) -> Tensor:
    """`rope_frequencies` on a device, copied there once: each copy to a GPU would make the CPU wait for it."""
    with torch.inference_mode(False):  # whatever mode the first caller is in
        return rope_frequencies(args).to(device)


def rope_tables(freqs: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (..., seq, 1, head_dim / 2) float32, for integer positions (..., seq)."""
    angles = positions.float()[..., None, None] * freqs
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring pairs of x, (batch, seq, heads, head_dim), computed in float32."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


# ---- layers


class LayerCache(NamedTuple):
    """Keys and values of one layer, each (batch, max_len, n_kv_heads, head_dim)."""

    keys: Tensor
    values: Tensor


class Cache:
    """Key/value cache for one generation: `length` positions of every layer are filled."""

    def __init__(self, layers: list[LayerCache]):
        self.layers = layers
        self.length = 0

    @property
    def max_len(self) -> int:
        return self.layers[0].keys.shape[1]


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What each query, (batch, seq, n_heads, head_dim), reads: same shape. Causal without a mask.

    k, v: (batch, keys, n_kv_heads, head_dim). mask: True where a query sees a key, broadcast to (batch, heads, seq,
    keys).
    """
    if q.is_cuda:
        # cuDNN would be first choice on an H100, where it plans anew for each length of the cache, and on a B200 it
        # has given wrong results with few key heads (pytorch issue 193893).
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Without cuDNN, only FlashAttention takes fewer key heads than query heads; whatever it refuses would get the
        # slow path that holds the scores of all pairs in memory. With all heads there is another fused kernel.
        if q.shape[2] != k.shape[2] and not flash_attention_takes(q, mask):
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and q.shape[1] > 1,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def flash_attention_takes(q: Tensor, mask: Tensor | None) -> bool:
    """As torch's sdp_utils.cpp decides: 16 bits, no mask, an NVIDIA GPU from Ampere (A100, RTX 30) on."""
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    return is_half and mask is None and torch.cuda.get_device_capability(q.device) >= (8, 0)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: LayerCache | None, start: int
    ) -> Tensor:
        seq = x.shape[1]
        q = rotate(self.wq(x).unflatten(-1, (-1, self.head_dim)), rope)  # (batch, seq, n_heads, head_dim)
        k = rotate(self.wk(x).unflatten(-1, (-1, self.head_dim)), rope)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))
        if cache is not None:
            cache.keys[:, start : start + seq] = k
            cache.values[:, start : start + seq] = v
            k, v = cache.keys[:, : start + seq], cache.values[:, : start + seq]
        return self.wo(attend(q, k, v, mask).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, layer_idx: int, args: ModelArgs):
        super().__init__()
        self.prefix = f"layers.{layer_idx}."
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: LayerCache | None,
        start: int,
        hook: Hook,
    ) -> Tensor:
        p = self.prefix
        x = hook(p + "resid_pre", x)
        h = hook(p + "attention_norm", self.attention_norm(x))
        x = hook(p + "resid_mid", x + hook(p + "attention_out", self.attention(h, rope, mask, cache, start)))
        h = hook(p + "ffn_norm", self.ffn_norm(x))
        return hook(p + "resid_post", x + hook(p + "mlp_out", self.feed_forward(h)))


# ---- the model


class Intervention(NamedTuple):
    """What `Transformer.intervene(*intervention)` does to a forward pass; `generate` takes it as `steering`."""

    site: str
    fn: Callable[[Tensor], Tensor]  # activations at the site, (..., d_model) -> same
    skip_tokens: Sequence[int] = ()  # positions with one of them keep their value


class Resume(NamedTuple):
    """Where a forward pass begins instead of at the embeddings."""

    layer: int
    x: Tensor  # the residual stream before that layer, (batch, seq, d_model)


# The active ones, each with its model. They belong to the thread (or asyncio task) that entered them, so requests
# served at the same time do not affect each other.
_interventions: ContextVar[tuple[tuple["Transformer", Intervention], ...]] = ContextVar("interventions", default=())


class _AllCaptured(Exception):
    """Raised inside a forward pass when nothing further is wanted."""


class Transformer(nn.Module):
    """Llama 3. Call it with int64 tokens (batch, seq); returns float32 logits (batch, seq, vocab_size)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        # With a given weight it does not initialise one, which on the meta device would import all of torch._dynamo.
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim, _weight=torch.empty(args.vocab_size, args.dim))
        self.layers = nn.ModuleList(TransformerBlock(i, args) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.to_pack: list[PackedLinear] = []  # emptied by the first forward pass; the largest is last

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def new_cache(self, batch_size: int, max_len: int) -> Cache:
        """Room for the keys and values of `max_len` positions of `batch_size` sequences, in the model's dtype."""
        shape = (batch_size, max_len, self.args.n_kv_heads, self.args.head_dim)
        make = lambda: torch.zeros(shape, dtype=self.dtype, device=self.device)
        return Cache([LayerCache(make(), make()) for _ in range(self.args.n_layers)])

    def continue_from(self, layer_idx: int, x: Tensor, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position, for a residual stream that enters layer `layer_idx` as x.

        x: (batch, seq, d_model), as `activations(tokens, f"layers.{layer_idx}.resid_pre")` gives it; tokens:
        (batch, seq), without padding at the left. Interventions act in the layers that are computed.
        """
        rope = rope_tables(rope_frequencies(self.args).to(x.device), torch.arange(x.shape[1], device=x.device))
        hook = self._intervention_hook(tokens)
        for layer in self.layers[layer_idx:]:
            x = layer(x, rope, None, None, 0, hook)
        return self.output(self.norm(x)).float()

    def forward(
        self, tokens: Tensor, cache: Cache | None = None, n_pad: Tensor | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits of the next token at every position.

        tokens: (batch, seq). Padding on the right needs no mask: attention is causal.
        cache:  continues after cache.length positions and fills in the new ones.
        n_pad:  (batch,) how many positions at the left of each row, counted from the very first, are padding, so
                that rows of unequal length end together. The padding's logits are meaningless.
        last_only: logits of the last position only, (batch, 1, vocab_size).
        Raises ValueError when the cache is too short.
        """
        x = self._run(tokens, cache, n_pad, self._intervention_hook(tokens))
        return self.output(self.norm(x[:, -1:] if last_only else x)).float()

    @overload
    def activations(self, tokens: Tensor, sites: str, resume: Resume | None = None) -> Tensor: ...
    @overload
    def activations(self, tokens: Tensor, sites: Sequence[str], resume: Resume | None = None) -> dict[str, Tensor]: ...
    def activations(
        self, tokens: Tensor, sites: str | Sequence[str], resume: Resume | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Activations at one site, (batch, seq, d_model) in the model's dtype, or at several as a dict.

        Nothing beyond the deepest site is computed, and with `resume` no layer before its own; all sites must then be
        in that layer or after it. Raises ValueError for an unknown site.
        """
        wanted = [sites] if isinstance(sites, str) else list(sites)
        for site in wanted:
            check_site(site, self.args.n_layers)
        found: dict[str, Tensor] = {}
        intervene = self._intervention_hook(tokens)

        def hook(site: str, x: Tensor) -> Tensor:
            x = intervene(site, x)
            if site in wanted:
                found[site] = x
                if len(found) == len(set(wanted)):
                    raise _AllCaptured
            return x

        with contextlib.suppress(_AllCaptured):
            self._run(tokens, None, None, hook, resume)
        return found[sites] if isinstance(sites, str) else {site: found[site] for site in wanted}

    @contextlib.contextmanager
    def intervene(
        self, site: str, fn: Callable[[Tensor], Tensor], skip_tokens: Sequence[int | None] = ()
    ) -> Iterator[None]:
        """Replace the activations at `site` by fn(activations), (..., d_model) -> same, inside the with block.

        Positions with one of `skip_tokens` keep their value; None is no token. Blocks nest: the outer function runs
        first. A generator should enter the block around each forward pass, not around its `yield`: code that runs
        between two of its values shares its thread.
        """
        check_site(site, self.args.n_layers)
        skip = tuple(token for token in skip_tokens if token is not None)
        token = _interventions.set((*_interventions.get(), (self, Intervention(site, fn, skip))))
        try:
            yield
        finally:
            _interventions.reset(token)

    def _intervention_hook(self, tokens: Tensor) -> Hook:
        active = [intervention for model, intervention in _interventions.get() if model is self]

        def hook(site: str, x: Tensor) -> Tensor:
            for intervention in active:
                if intervention.site == site:
                    changed = intervention.fn(x.clone())  # fn may work in place
                    if intervention.skip_tokens:
                        skip = torch.isin(tokens, torch.tensor(intervention.skip_tokens, device=tokens.device))
                        changed = torch.where(skip[..., None], x, changed)
                    x = changed
            return x

        return hook

    def _run(
        self, tokens: Tensor, cache: Cache | None, n_pad: Tensor | None, hook: Hook, resume: Resume | None = None
    ) -> Tensor:
        """The residual stream after the last layer, (batch, seq, d_model)."""
        if self.to_pack:
            pack_all(self.to_pack)
        seq = tokens.shape[1]
        start = cache.length if cache is not None else 0
        if cache is not None and start + seq > cache.max_len:
            raise ValueError(f"{start + seq} positions do not fit the cache of {cache.max_len}.")
        positions = torch.arange(start, start + seq, device=tokens.device)
        mask = None  # plain causal attention
        if n_pad is not None or (start > 0 and seq > 1):
            keys = torch.arange(start + seq, device=tokens.device)
            mask = (keys[None, :] <= positions[:, None])[None, None]  # (1, 1, seq, keys)
            if n_pad is not None:
                mask = mask & (keys[None, :] >= n_pad[:, None])[:, None, None]
                mask = mask | (keys[None, :] == positions[:, None])  # a padded position sees itself: no row is empty
                positions = (positions[None] - n_pad[:, None]).clamp(min=0)  # (batch, seq)
        rope = rope_tables(rope_frequencies_on(self.args, tokens.device), positions)
        first, x = resume or Resume(0, self.tok_embeddings(tokens).to(self.dtype))
        for i, layer in enumerate(list(self.layers)[first:], first):
            x = layer(x, rope, mask, cache.layers[i] if cache is not None else None, start, hook)
        if cache is not None:
            cache.length += seq
        return x


def check_site(site: str, n_layers: int) -> int:
    """The layer of a site such as layers.22.attention_norm. Raises ValueError, with the fix, for anything else."""
    parts = site.split(".")
    if len(parts) != 3 or parts[0] != "layers" or not parts[1].isdecimal() or parts[2] not in SITES:
        raise ValueError(f"{site!r} is not a site; write layers.N.S with S one of {', '.join(SITES)}.")
    if int(parts[1]) >= n_layers:
        raise ValueError(f"{site!r} is beyond the model's {n_layers} layers; they are counted from 0.")
    return int(parts[1])
