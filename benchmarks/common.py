"""Shared by the benchmarks. Importing it puts the project on sys.path, so import it before the project's rooms."""

import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embedded.recipe import command, run_command
from pipeline.errors import Stop

if TYPE_CHECKING:
    from torch import Tensor

    from llama_3.model import Transformer

T = TypeVar("T")


def run_script(script: str, **options: Any) -> None:
    """Run a script of the project, in one process, hiding what it prints. Raises Stop if it fails."""
    run_command(command(script, **options), quiet=True)


def timed(function: Callable[..., T], *arguments: object) -> tuple[float, T]:
    """Seconds, and what the function returned."""
    started = time.perf_counter()
    found = function(*arguments)
    return time.perf_counter() - started, found


def median_rates(n: float, seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """n things per second for each way, from the median of its runs."""
    return {way: n / median(times) for way, times in seconds.items()}


def spread(seconds: Mapping[str, Sequence[float]]) -> float:
    """Slowest over fastest run, for the way in which they differ most."""
    return max(max(times) / min(times) for times in seconds.values())


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def machine() -> str:
    return f"{os.cpu_count()} cores, {processor()}"


def resident(name: str) -> int:
    """Bytes of this process: VmRSS for now, VmHWM for the peak."""
    found = re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else 0


# ---- our model in TransformerLens


def transformer_lens_config(model: "Transformer") -> Any:
    """HookedTransformerConfig. Raises Stop for RoPE with scaling."""
    from transformer_lens import HookedTransformerConfig

    args = model.args
    if args.rope_scaling_factor != 1 or args.rope_divisors is not None:
        raise Stop("This comparison is written for plain RoPE; name a model without scaling.")
    return HookedTransformerConfig(
        n_layers=args.n_layers,
        d_model=args.dim,
        n_ctx=64,
        d_head=args.head_dim,
        n_heads=args.n_heads,
        n_key_value_heads=args.n_kv_heads,
        d_mlp=args.hidden_dim,
        d_vocab=args.vocab_size,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=args.norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=args.head_dim,
        rotary_base=int(args.rope_theta),
        rotary_adjacent_pairs=True,  # as Meta's weights have them
        init_weights=False,
        device="cpu",
    )


def transformer_lens_state(model: "Transformer") -> "dict[str, Tensor]":
    """Our weights under TransformerLens' names."""
    args, ours = model.args, model.state_dict()
    heads = lambda name: ours[name].unflatten(0, (-1, args.head_dim)).transpose(1, 2)  # (heads, d_model, head_dim)
    state = {
        "embed.W_E": ours["tok_embeddings.weight"],
        "ln_final.w": ours["norm.weight"],
        "unembed.W_U": ours["output.weight"].T,
    }
    for i in range(args.n_layers):
        to, ff = f"blocks.{i}.", f"layers.{i}.feed_forward."
        state |= {
            to + "ln1.w": ours[f"layers.{i}.attention_norm.weight"],
            to + "ln2.w": ours[f"layers.{i}.ffn_norm.weight"],
            to + "attn.W_Q": heads(f"layers.{i}.attention.wq.weight"),
            to + "attn._W_K": heads(f"layers.{i}.attention.wk.weight"),
            to + "attn._W_V": heads(f"layers.{i}.attention.wv.weight"),
            to + "attn.W_O": ours[f"layers.{i}.attention.wo.weight"].T.unflatten(0, (args.n_heads, args.head_dim)),
            to + "mlp.W_gate": ours[ff + "w1.weight"].T,
            to + "mlp.W_in": ours[ff + "w3.weight"].T,
            to + "mlp.W_out": ours[ff + "w2.weight"].T,
        }
    return state


def load_into_transformer_lens(theirs: Any, given: "Mapping[str, Tensor]") -> None:
    """Copy `given` into a HookedTransformer; biases of its blocks and unembedding, which Llama has not, become 0."""
    state = theirs.state_dict()
    for name, tensor in given.items():
        assert state[name].shape == tensor.shape, (name, state[name].shape, tensor.shape)
    is_bias = lambda name: re.match(r"(blocks|unembed)\.(.*\.)?_?b_\w+$", name)
    zeros = {name: each.new_zeros(each.shape) for name, each in state.items() if is_bias(name)}
    theirs.load_state_dict({**zeros, **given}, strict=False)  # masks and tables of positions stay
