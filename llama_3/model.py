"""The Llama 3 transformer in plain PyTorch, with Meta's parameter names, open at thirteen sites of every layer.

Architecture: "The Llama 3 Herd of Models", arXiv:2407.21783, section 3.2. RMSNorm: arXiv:1910.07467. SwiGLU:
arXiv:2002.05202. Rotary embeddings: arXiv:2104.09864. Grouped-query attention: arXiv:2305.13245.

Sites, each (batch, seq, d_model), in the order in which a layer computes them:

    x -> resid_pre -> attention_norm -> attention -> attention_out -> + -> resid_mid
                                                     -> ffn_norm -> mlp -> mlp_out -> + -> resid_post

and inside attention and the feed-forward layer:

    q                  (batch, seq, n_heads, head_dim)     queries, rotated to their position
    k, v               (batch, seq, n_kv_heads, head_dim)  keys, rotated, and values; of the new positions with a cache
    attention_pattern  (batch, n_heads, query, key)        each query's weights over keys, summing to 1; computed
                                                           explicitly only where it is asked for
    head_out           (batch, seq, n_heads, head_dim)     the weighted sums of values, before the output matrix
    mlp_hidden         (batch, seq, hidden_dim)            silu(w1 x) * w3 x

Gradients flow through every site. Parameters need none here, so a pass records nothing until an intervention returns
something that requires a gradient.
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
INNER_SITES = ("q", "k", "v", "attention_pattern", "head_out", "mlp_hidden")
_HEADS_DIM = {"q": 2, "k": 2, "v": 2, "attention_pattern": 1, "head_out": 2}  # dimension that counts the heads


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


# ---- hooks


class Intervention(NamedTuple):
    """What `Transformer.intervene(*intervention)` does to a forward pass; `generate` takes it as `steering`."""

    site: str
    fn: Callable[[Tensor], Tensor]  # activations at the site -> same shape
    skip_tokens: Sequence[int] = ()  # positions with one of them keep their value
    positions: Sequence[int] | None = None  # the others keep their value; counted from each row's first real token
    heads: Sequence[int] | None = None  # the others keep their value


class Hook:
    """What happens at the sites during one forward pass: each is replaced by interventions, then kept if wanted."""

    def __init__(self, interventions: Sequence[Intervention], tokens: Tensor, positions: Tensor, wanted: Sequence[str]):
        """tokens: (batch, seq); positions: theirs, (seq,) or (batch, seq); wanted: sites to keep in `found`."""
        self.interventions, self.tokens, self.positions = interventions, tokens, positions
        self.wanted = set(wanted)
        self.found: dict[str, Tensor] = {}

    def needs(self, site: str) -> bool:
        """Whether anything happens at `site`."""
        return site in self.wanted or any(each.site == site for each in self.interventions)

    def __call__(self, site: str, x: Tensor) -> Tensor:
        for intervention in self.interventions:
            if intervention.site == site:
                changed = intervention.fn(x.clone())  # fn may work in place
                applies = self._where(intervention, x)
                x = changed if applies is None else torch.where(applies, changed, x)
        if site in self.wanted:
            self.found[site] = x
            if len(self.found) == len(self.wanted):
                raise _AllCaptured
        return x

    def _where(self, intervention: Intervention, x: Tensor) -> Tensor | None:
        """Where an intervention applies, broadcasting to x; None for everywhere."""
        heads_dim = _HEADS_DIM.get(intervention.site.rpartition(".")[2])
        seq_dim = 2 if heads_dim == 1 else 1
        applies = None
        if intervention.skip_tokens or intervention.positions is not None:
            at = ~torch.isin(self.tokens, torch.tensor(intervention.skip_tokens, device=x.device))  # (batch, seq)
            if intervention.positions is not None:
                at &= torch.isin(self.positions, torch.tensor(intervention.positions, device=x.device))
            applies = at.view(len(at), *(at.shape[1] if dim == seq_dim else 1 for dim in range(1, x.dim())))
        if intervention.heads is not None and heads_dim is not None:
            of_heads = torch.zeros(x.shape[heads_dim], dtype=torch.bool, device=x.device)
            of_heads[list(intervention.heads)] = True
            of_heads = of_heads.view(-1, *[1] * (x.dim() - 1 - heads_dim))
            applies = of_heads if applies is None else applies & of_heads
        return applies


class _AllCaptured(Exception):
    """Raised inside a forward pass when nothing further is wanted."""


# ---- layers


class LayerCache(NamedTuple):
    """Keys and values of one layer, each (batch, max_len, n_kv_heads, head_dim)."""

    keys: Tensor
    values: Tensor

    def extended(self, k: Tensor, v: Tensor, at: Tensor | int, length: int) -> tuple[Tensor, Tensor]:
        """Write keys and values of new positions; return those of the first `length` positions.

        at: where the new ones begin, or (batch, seq), the place of each.
        """
        if isinstance(at, int):
            places = (slice(None), slice(at, at + k.shape[1]))
        else:
            places = (torch.arange(len(at), device=at.device)[:, None], at)
        self.keys[places] = k
        self.values[places] = v
        return self.keys[:, :length], self.values[:, :length]


class Cache:
    """Key/value cache: `length` positions of every layer are filled, or with `lengths` each row's own number, of which
    `length` is the largest."""

    def __init__(self, layers: list[LayerCache], lengths: Sequence[int] | None = None):
        self.layers = layers
        self.lengths = lengths
        self.length = max(lengths) if lengths else 0

    @property
    def max_len(self) -> int:
        return self.layers[0].keys.shape[1]

    def add(self, n: int) -> None:
        """Count n new positions as filled."""
        self.length += n
        if self.lengths is not None:
            self.lengths = [length + n for length in self.lengths]


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
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: LayerCache | None,
        at: Tensor | int,
        length: int,
        hook: Hook,
        prefix: str,
    ) -> Tensor:
        """at, length: as of `LayerCache.extended`."""
        q = hook(prefix + "q", rotate(self.wq(x).unflatten(-1, (-1, self.head_dim)), rope))
        k = hook(prefix + "k", rotate(self.wk(x).unflatten(-1, (-1, self.head_dim)), rope))
        v = hook(prefix + "v", self.wv(x).unflatten(-1, (-1, self.head_dim)))
        if cache is not None:
            k, v = cache.extended(k, v, at, length)
        if hook.needs(prefix + "attention_pattern"):
            pattern = hook(prefix + "attention_pattern", attention_pattern(q, k, mask))
            out = pattern @ v.transpose(1, 2).repeat_interleave(q.shape[2] // k.shape[2], dim=1)
            out = out.transpose(1, 2)
        else:
            out = attend(q, k, v, mask)
        return self.wo(hook(prefix + "head_out", out).flatten(-2))


def attention_pattern(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Weights of each query over the keys, (batch, n_heads, query, key) in q's dtype, the softmax in float32.

    q, k: (batch, seq, heads, head_dim). mask: true where a query sees a key; None: causal, the queries being the last.
    """
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).float() / math.sqrt(q.shape[-1])
    if mask is None:
        n_queries, n_keys = scores.shape[-2:]
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
    return scores.masked_fill(~mask, -math.inf).softmax(-1).type_as(q)


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x: Tensor, hook: Callable[[Tensor], Tensor] = lambda hidden: hidden) -> Tensor:
        """hook: of what is between the two matrix products, (..., hidden_dim)."""
        return self.w2(hook(F.silu(self.w1(x)) * self.w3(x)))


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
        at: Tensor | int,
        length: int,
        hook: Hook,
    ) -> Tensor:
        p = self.prefix
        x = hook(p + "resid_pre", x)
        h = hook(p + "attention_norm", self.attention_norm(x))
        attention_out = hook(p + "attention_out", self.attention(h, rope, mask, cache, at, length, hook, p))
        x = hook(p + "resid_mid", x + attention_out)
        h = hook(p + "ffn_norm", self.ffn_norm(x))
        mlp_out = hook(p + "mlp_out", self.feed_forward(h, lambda hidden: hook(p + "mlp_hidden", hidden)))
        return hook(p + "resid_post", x + mlp_out)


# ---- the model


class Resume(NamedTuple):
    """Where a forward pass begins instead of at the embeddings."""

    layer: int
    x: Tensor  # the residual stream before that layer, (batch, seq, d_model)


# The active ones, each with its model. They belong to the thread (or asyncio task) that entered them, so requests
# served at the same time do not affect each other.
_interventions: ContextVar[tuple[tuple["Transformer", Intervention], ...]] = ContextVar("interventions", default=())


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

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        n_pad: Tensor | None = None,
        last_only: bool = False,
        resume: Resume | None = None,
    ) -> Tensor:
        """Logits of the next token at every position.

        tokens: (batch, seq). Padding on the right needs no mask: attention is causal.
        cache:  continues after cache.length positions, or each row after its own of cache.lengths, and fills in the new
                ones.
        n_pad:  (batch,) how many positions at the left of each row, counted from the very first, are padding, so
                that rows of unequal length end together. The padding's logits are meaningless.
        last_only: logits of the last position only, (batch, 1, vocab_size).
        resume: compute only the layers from there on.
        Raises ValueError when the cache is too short.
        """
        x = self._run(tokens, cache, n_pad, self._hook(tokens, cache, n_pad), resume)
        return self.unembed(x[:, -1:] if last_only else x)

    def unembed(self, x: Tensor) -> Tensor:
        """Float32 logits (..., vocab_size) of the next token from the residual stream x, (..., d_model).

        After an earlier layer than the last: the logit lens (nostalgebraist 2020, "interpreting GPT").
        """
        return self.output(self.norm(x)).float()

    @overload
    def activations(
        self, tokens: Tensor, sites: str, resume: Resume | None = None, cache: Cache | None = None
    ) -> Tensor: ...
    @overload
    def activations(
        self, tokens: Tensor, sites: Sequence[str], resume: Resume | None = None, cache: Cache | None = None
    ) -> dict[str, Tensor]: ...
    def activations(
        self,
        tokens: Tensor,
        sites: str | Sequence[str],
        resume: Resume | None = None,
        cache: Cache | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Activations at one site in the model's dtype, or at several as a dict; the module lists their shapes.

        Nothing beyond the deepest site is computed, and with `resume` no layer before its own; all sites must then be
        in that layer or after it. With a cache, a long text can be read in parts, always with the same sites. Raises
        ValueError for an unknown site.
        """
        wanted = [sites] if isinstance(sites, str) else list(sites)
        for site in wanted:
            check_site(site, self.args.n_layers, (*SITES, *INNER_SITES))
        hook = self._hook(tokens, cache, None, wanted)
        with contextlib.suppress(_AllCaptured):
            self._run(tokens, cache, None, hook, resume)
        if cache is not None:
            cache.add(tokens.shape[1])
        return hook.found[sites] if isinstance(sites, str) else {site: hook.found[site] for site in wanted}

    @contextlib.contextmanager
    def intervene(
        self,
        site: str,
        fn: Callable[[Tensor], Tensor],
        skip_tokens: Sequence[int | None] = (),
        positions: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """Replace the activations at `site` by fn(activations), of the same shape, inside the with block.

        Positions with one of `skip_tokens` keep their value (None is no token), and so do all but `positions` and
        `heads`, where given. Positions count from each row's first real token, in attention_pattern those of queries;
        heads of k and v are key/value heads. Blocks nest: the outer function runs first. A generator should enter the
        block around each forward pass, not around its `yield`: code that runs between two of its values shares its
        thread. Raises ValueError for a site, head or position that cannot exist.
        """
        check_site(site, self.args.n_layers, (*SITES, *INNER_SITES))
        self._check_part(site, positions, heads)
        skip = tuple(token for token in skip_tokens if token is not None)
        intervention = Intervention(site, fn, skip, positions, heads)
        token = _interventions.set((*_interventions.get(), (self, intervention)))
        try:
            yield
        finally:
            _interventions.reset(token)

    def _check_part(self, site: str, positions: Sequence[int] | None, heads: Sequence[int] | None) -> None:
        kind = site.rpartition(".")[2]
        n_heads = self.args.n_kv_heads if kind in ("k", "v") else self.args.n_heads
        for head in heads or ():
            if kind not in _HEADS_DIM:
                raise ValueError(f"{site} has no heads; the sites with heads are {', '.join(_HEADS_DIM)}.")
            if not 0 <= head < n_heads:
                raise ValueError(f"{site} has no head {head}; its heads are 0 to {n_heads - 1}.")
        for position in positions or ():
            if position < 0:
                raise ValueError(f"There is no position {position}; positions are counted from 0.")

    def _hook(self, tokens: Tensor, cache: Cache | None, n_pad: Tensor | None, wanted: Sequence[str] = ()) -> Hook:
        active = [intervention for model, intervention in _interventions.get() if model is self]
        start = cache.length if cache is not None else 0
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if cache is not None and cache.lengths is not None:
            positions = torch.tensor(cache.lengths, device=tokens.device)[:, None] + positions
        else:
            positions = positions + start
        if n_pad is not None:
            positions = positions - n_pad[:, None]  # negative in the padding
        return Hook(active, tokens, positions, wanted)

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
        at: Tensor | int = start
        positions = torch.arange(start, start + seq, device=tokens.device)
        mask = None  # plain causal attention
        if cache is not None and cache.lengths is not None:
            at = positions = hook.positions  # (batch, seq)
            keys = torch.arange(start + seq, device=tokens.device)
            mask = (keys <= positions[..., None])[:, None]  # (batch, 1, seq, keys)
        elif n_pad is not None or (start > 0 and seq > 1):
            keys = torch.arange(start + seq, device=tokens.device)
            mask = (keys[None, :] <= positions[:, None])[None, None]  # (1, 1, seq, keys)
            if n_pad is not None:
                mask = mask & (keys[None, :] >= n_pad[:, None])[:, None, None]
                mask = mask | (keys[None, :] == positions[:, None])  # a padded position sees itself: no row is empty
                positions = hook.positions.clamp(min=0)  # (batch, seq)
        rope = rope_tables(rope_frequencies_on(self.args, tokens.device), positions)
        first, x = resume or Resume(0, self.tok_embeddings(tokens).to(self.dtype))
        for i, layer in enumerate(list(self.layers)[first:], first):
            x = layer(x, rope, mask, cache.layers[i] if cache is not None else None, at, start + seq, hook)
        if cache is not None:
            cache.add(seq)
        return x


def check_site(site: str, n_layers: int, kinds: Sequence[str] = SITES) -> int:
    """The layer of a site such as layers.22.attention_norm. Raises ValueError, with the fix, for anything else.

    kinds: what may stand last; by default those of width d_model, which an SAE can be trained on.
    """
    parts = site.split(".")
    if len(parts) != 3 or parts[0] != "layers" or not parts[1].isdecimal() or parts[2] not in kinds:
        raise ValueError(f"{site!r} is not a site; write layers.N.S with S one of {', '.join(kinds)}.")
    if int(parts[1]) >= n_layers:
        raise ValueError(f"{site!r} is beyond the model's {n_layers} layers; they are counted from 0.")
    return int(parts[1])
