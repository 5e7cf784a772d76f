"""Open checkpoints: Llama folders in Meta's format and in Hugging Face's, and GGUF files.

Meta          params.json, consolidated.00.pth, tokenizer.model; also inside `original/`, where Meta's repositories
              on the hub keep them
Hugging Face  config.json, model.safetensors or model-*.safetensors (with or without an index), tokenizer.json

GGUF          one file, alone or in a folder: weights in any of the types that the gguf package reads, and the tokenizer

Any model of the Llama architecture will do: Llama 3.x, SmolLM2, TinyLlama. Paths may be local, `gs://` or `az://`
(blobfile). Local weights are mapped, not read: tensors already in the wanted dtype stay on disk until they are used.
"""

import json
import math
import os
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import blobfile
import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from llama_3.checkpoint import TINY_LLAMA_DIR, Checkpoint, check_files, find_checkpoint, say
from llama_3.gguf import StoredTensor, gguf_args, read_gguf
from llama_3.model import ModelArgs, Transformer, hidden_dim
from llama_3.packed import PackedLinear
from pipeline.errors import InputError

# RoPE scaling of released models whose params.json only says use_scaled_rope: (dim, n_layers) -> factor.
# Meta's statement in its model repository; everything else with scaled RoPE is Llama 3.1 and uses 8.
ROPE_SCALING_FACTORS = {
    (2048, 16): 32.0,  # Llama 3.2 1B
    (3072, 28): 32.0,  # Llama 3.2 3B
    (4096, 32): 8.0,  # Llama 3.1 8B
    (8192, 80): 8.0,  # Llama 3.1 70B
    (16384, 126): 8.0,  # Llama 3.1 405B
}
MAX_SEQ_LEN = {False: 8192, True: 131072}  # Llama 3 and Llama 3.1+, by use_scaled_rope

# Hugging Face's names for the same tensors, without `model.` and `.weight`.
HF_NAMES = {
    "embed_tokens": "tok_embeddings",
    "norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Fields of ModelArgs in Hugging Face's config.json.
HF_CONFIG = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_context": "original_max_position_embeddings",
}
# GGUF's, without `blk.N.` and `.weight`.
GGUF_NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
# Tables that older checkpoints carry; they follow from the parameters.
IGNORED = re.compile(
    r"(.+\.)?(rope\.freqs|freqs_cis|attn_rot_embd(\.weight)?|rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached))"
)
# Tensors without effect when keys and values are kept in the model's own dtype.
CACHE_SCALES = re.compile(r".+\.(k|v|kv|q|prob|output)_scale")
# Biases that a model may have: Hugging Face's where config.json says mlp_bias, and GGUF's.
MLP_BIAS = re.compile(r"layers\.\d+\.feed_forward\.w[123]\.bias")
# What other unknown tensors are.
STRANGERS = {
    r"\.bias$": "a bias, and biases are not supported here (but for mlp_bias); use Llama 3.x, SmolLM2 or TinyLlama",
    r"lora_|\.adapter": "part of an adapter; merge it into its model (merge_and_unload of peft) and name that",
    r"scale|qweight|qzeros|g_idx|absmax|quant|\.SCB$": "part of quantised weights; fetch the model in bfloat16",
}


class Quantized(NamedTuple):
    """A tensor of a GGUF file, in one of llama.cpp's types; converted when it is asked for."""

    source: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`, on the CPU; rows are converted a few at a time, so that no second copy is made."""
        out = torch.empty(self.shape, dtype=dtype)
        rows, stored = out.view(-1, self.shape[-1]), self.source.data.reshape(-1, self.source.data.shape[-1])
        step = max(1, _CONVERTED_AT_ONCE // self.shape[-1])
        for first in range(0, len(rows), step):
            part = self.source._replace(data=stored[first : first + step]).values()
            rows[first : first + step] = torch.from_numpy(np.require(part, np.float32, ["C", "W"]))
        return out


_CONVERTED_AT_ONCE = 2**18  # elements: their intermediate results, 1 MB each in float32, fit the cache


class Loaded(NamedTuple):
    """A tensor as it lies in its file."""

    tensor: Tensor | Quantized
    name: str  # its name there
    path: str


# ---- parameters


def read_params(model_dir: str, rope_scaling_factor: float | None = None) -> ModelArgs:
    """ModelArgs of a checkpoint folder. rope_scaling_factor overrides what the parameters say (1: no scaling)."""
    return model_args(find_checkpoint(model_dir), rope_scaling_factor)


def model_args(found: Checkpoint, rope_scaling_factor: float | None = None) -> ModelArgs:
    reader = READERS[found.format]
    try:
        args = reader.args(found)
    except KeyError as error:
        raise InputError(
            f"{found.config_path} does not say {error.args[0]}; take the file that belongs to the weights."
        ) from None
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"{found.config_path} does not describe a Llama model ({error}); take the file that belongs to the weights."
        ) from None
    if rope_scaling_factor is not None and _fault("rope_scaling_factor", rope_scaling_factor):
        raise InputError(f"A rope_scaling_factor of {rope_scaling_factor} cannot be used; give a positive number.")
    args |= {"rope_scaling_factor": float(rope_scaling_factor)} if rope_scaling_factor is not None else {}
    for name, value in args.items():
        if fault := _fault(name, value):
            their_name = reader.config_names.get(name, name)
            raise InputError(f"{found.config_path}: {their_name} is {json.dumps(value)}; write {fault} there.")
    return ModelArgs(**args)


def _fault(name: str, value: Any) -> str | None:
    """What a field of ModelArgs must be, if the value is something else."""
    if name == "rope_divisors":
        return None
    if name in ("norm_eps", "rope_theta") or name.endswith("factor"):
        good = type(value) in (int, float) and 0 < value < math.inf
        return None if good else "a positive number"
    lowest = 0 if name in ("head_dim", "rope_original_context") else 1  # 0: worked out, and linear scaling
    return None if type(value) is int and value >= lowest else "a positive whole number"


def _not_supported(found: Checkpoint, what: str) -> InputError:
    return InputError(
        f"{found.config_path} says {what}, which is not supported here; Llama 3.x, SmolLM2 and TinyLlama are."
    )


def _meta_args(found: Checkpoint) -> dict[str, Any]:
    params = found.config
    if params.get("vocab_size") == -1:
        raise InputError(
            f"{found.config_path} describes Llama 2 (vocab_size is -1), whose tokenizer is not read in Meta's format; "
            "name the Hugging Face folder of the same model."
        )
    scaled = bool(params.get("use_scaled_rope", False))
    known = ROPE_SCALING_FACTORS.get((params["dim"], params["n_layers"]), 8.0)
    return {
        "dim": params["dim"],
        "n_layers": params["n_layers"],
        "n_heads": params["n_heads"],
        "n_kv_heads": params.get("n_kv_heads") or params["n_heads"],
        "vocab_size": params["vocab_size"],
        "hidden_dim": hidden_dim(params["dim"], params.get("multiple_of", 256), params.get("ffn_dim_multiplier")),
        "norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta", 500000.0),
        "rope_scaling_factor": float(params.get("rope_scaling_factor", known)) if scaled else 1.0,
        "max_seq_len": params.get("max_seq_len", MAX_SEQ_LEN[scaled]),
    }


def _hugging_face_args(found: Checkpoint) -> dict[str, Any]:
    config = found.config
    for name, known in {"model_type": ["llama"], "hidden_act": ["silu", "swish"]}.items():
        if config.get(name, known[0]) not in known:
            raise _not_supported(found, f"{name} {json.dumps(config[name])}")
    if config.get("attention_bias"):
        raise _not_supported(found, f"attention_bias {json.dumps(config['attention_bias'])}")
    if config.get("quantization_config"):
        raise InputError(
            f"{found.config_path} has a quantization_config, which is not supported here; fetch the model in bfloat16."
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # the newer and the older way
    args = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "vocab_size": config["vocab_size"],
        "hidden_dim": config["intermediate_size"],
        "head_dim": config.get("head_dim") or 0,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta") or config.get("rope_theta", 10000.0),
        "max_seq_len": config.get("max_position_embeddings", 2048),
    }
    return args | _hugging_face_rope(found, rope, args["max_seq_len"])


def _hugging_face_rope(found: Checkpoint, rope: dict[str, Any], max_seq_len: int) -> dict[str, Any]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return {}
    if kind not in ("llama3", "linear"):
        raise _not_supported(found, f"rope_type {json.dumps(kind)}")
    needed = ["factor", "low_freq_factor", "high_freq_factor"] if kind == "llama3" else ["factor"]
    if missing := [name for name in needed if rope.get(name) is None]:
        raise InputError(
            f"{found.config_path} has RoPE of type {kind} without {' and '.join(missing)}; write what the model was "
            "trained with (Llama 3.1: factor 8, low_freq_factor 1, high_freq_factor 4)."
        )
    if kind == "linear":
        return {"rope_scaling_factor": rope["factor"], "rope_original_context": 0}
    if rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise InputError(f"{found.config_path} has a high_freq_factor that is not above low_freq_factor; correct it.")
    original = "original_max_position_embeddings"
    return {  # the original length is where transformers looks for it
        "rope_scaling_factor": rope["factor"],
        "rope_low_freq_factor": rope["low_freq_factor"],
        "rope_high_freq_factor": rope["high_freq_factor"],
        "rope_original_context": found.config.get(original) or rope.get(original) or max_seq_len,
    }


# ---- weights


def load_model(
    model_dir: str = TINY_LLAMA_DIR,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    rope_scaling_factor: float | None = None,
    packed: bool = False,
) -> Transformer:
    """Load a checkpoint for inference. Raises InputError, naming file and fix, when it is not whole.

    Weights of another dtype or device are converted one tensor at a time; the others stay mapped to their file.
    packed: on a CPU that supports it, use PackedLinear layers: faster, but without parameters.
    """
    found = find_checkpoint(str(model_dir))
    args = model_args(found, rope_scaling_factor)
    if args.n_heads % args.n_kv_heads or args.head_dim % 2 or args.head_dim < 2:
        raise InputError(
            f"{found.config_path} does not describe a Llama model ({args.n_heads} heads of {args.head_dim} numbers, "
            f"{args.n_kv_heads} for keys); take the file that belongs to the weights."
        )
    check_files(found.weights)
    reader = READERS[found.format]
    loaded = without_needless(reader.weights(found))
    with torch.device("meta"):
        model = Transformer(args)
        if found.format == "gguf" or found.config.get("mlp_bias"):
            _add_biases(model, loaded)
    expected = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    _check(loaded, expected, found)
    output, embedding = loaded["output.weight"].tensor, loaded["tok_embeddings.weight"].tensor
    tied = output is embedding or (
        isinstance(output, Tensor) and isinstance(embedding, Tensor) and output.data_ptr() == embedding.data_ptr()
    )
    packed = packed and PackedLinear.can(device, dtype)
    state = {}
    for name in sorted(expected, key=lambda name: loaded[name].tensor.numel()):
        tensor, _, path = loaded[name]
        if isinstance(tensor, Quantized):
            if tied and name == "output.weight" and not packed:
                continue
            tensor, path = tensor.read(dtype), None
        if reader.rotates_halves and name.endswith((".wq.weight", ".wk.weight")):
            tensor = tensor.unflatten(0, (-1, 2, args.head_dim // 2)).transpose(1, 2)
        layer, _, kind = name.rpartition(".")
        if packed and kind == "weight" and isinstance(model.get_submodule(layer), nn.Linear):
            in_file = path is not None and not _is_remote(path)
            linear = PackedLinear(tensor, dtype, in_file, state.pop(f"{layer}.bias", None))  # it is smaller, so earlier
            model.set_submodule(layer, linear)
            model.to_pack.append(linear)
        elif packed and name == "tok_embeddings.weight":
            state[name] = tensor  # rows are converted as they are looked up: the table stays in its file
        elif not (tied and name == "output.weight"):
            state[name] = tensor.to(device=device, dtype=dtype).reshape(expected[name])
    if tied and not packed:
        state["output.weight"] = state["tok_embeddings.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_state_dict(state, strict=True, assign=True)
    if tied and not packed:
        model.output.weight = model.tok_embeddings.weight  # one parameter: `.to` copies it once
    return model.requires_grad_(False).eval()


def _add_biases(model: Transformer, loaded: dict[str, Loaded]) -> None:
    """Give matrices of the feed-forward layers the biases that the files hold."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and MLP_BIAS.fullmatch(f"{name}.bias") and f"{name}.bias" in loaded:
            layer.bias = nn.Parameter(torch.empty(layer.out_features))


def _is_remote(path: str) -> bool:
    return path.startswith(("gs://", "az://"))


def _utf8_name(path: str, file: BinaryIO) -> str:
    """A name of the opened file for libraries that expect UTF-8: its path, or its descriptor if that is not UTF-8."""
    return path if os.fsencode(path) == path.encode(errors="replace") else f"/dev/fd/{file.fileno()}"


def _read_meta(found: Checkpoint) -> dict[str, Loaded]:
    (path,) = found.weights
    try:
        if _is_remote(path):
            with blobfile.BlobFile(path, "rb") as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
        else:
            with open(path, "rb") as file:
                state = torch.load(_utf8_name(path, file), map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, OSError):
        raise InputError(f"{path} is truncated or not a checkpoint of tensors; fetch it again.") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds more than tensors by name; name a folder with Meta's own consolidated.00.pth.")
    return {name: Loaded(tensor, name, path) for name, tensor in state.items()}


def _read_hugging_face(found: Checkpoint) -> dict[str, Loaded]:
    """The tensors of Hugging Face's files under Meta's names."""
    loaded: dict[str, Loaded] = {}
    for path in found.weights:
        try:
            if _is_remote(path):
                with blobfile.BlobFile(path, "rb") as file:
                    tensors = safetensors.torch.load(file.read())
            else:
                with open(path, "rb") as opened, safetensors.safe_open(_utf8_name(path, opened), "pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path} is truncated or not in safetensors' format ({error}); fetch it again.") from None
        loaded |= {_meta_name(name): Loaded(tensor, name, path) for name, tensor in tensors.items()}
    if found.config.get("tie_word_embeddings"):
        _tie(loaded, found)
    return loaded


def _tie(loaded: dict[str, Loaded], found: Checkpoint) -> None:
    """One tensor as embedding and output, unless the files hold two that differ: as transformers does."""
    both = ("tok_embeddings.weight", "output.weight")
    there = [loaded[name] for name in both if name in loaded]
    if len(there) == 2:
        one, other = (each.tensor for each in there)
        assert isinstance(one, Tensor) and isinstance(other, Tensor)
        if one.dtype != other.dtype or not torch.equal(one, other):
            say(
                f"{found.config_path} says tie_word_embeddings, but {there[1].path} holds a {there[1].name} of its "
                "own, which is used."
            )
            return
    if there:
        loaded.update(dict.fromkeys(both, there[0]))


def without_needless(loaded: dict[str, Loaded]) -> dict[str, Loaded]:
    """The tensors that have an effect; prints a line for cache scales and zero biases left out."""
    kept: dict[str, Loaded] = {}
    for name, each in loaded.items():
        if IGNORED.fullmatch(each.name):
            continue
        if CACHE_SCALES.fullmatch(each.name):
            say(f"{each.path} holds scales of an 8-bit cache ({each.name}), which are ignored.")
        elif each.name.endswith(".bias") and not _values(each).any():
            if MLP_BIAS.fullmatch(name):
                continue
            say(f"{each.path} holds biases of zero ({each.name}), which change nothing.")
        else:
            kept[name] = each
    return kept


def _values(loaded: Loaded) -> Tensor:
    return loaded.tensor.read(torch.float32) if isinstance(loaded.tensor, Quantized) else loaded.tensor


def _gguf_args(found: Checkpoint) -> dict[str, Any]:
    return gguf_args(read_gguf(found.config_path))


def _read_gguf(found: Checkpoint) -> dict[str, Loaded]:
    """The tensors of a GGUF file under Meta's names; rows of wq and wk are in Meta's order there."""
    (path,) = found.weights
    tensors = read_gguf(path).tensors
    for name, tensor in {tensor.kind: (name, tensor) for name, tensor in tensors.items()}.values():
        try:
            tensor._replace(data=tensor.data.reshape(-1, tensor.data.shape[-1])[:1]).values()
        except NotImplementedError:
            raise InputError(
                f"{path} holds {name} as {tensor.kind.name}, which the gguf package does not convert; use "
                "another quantisation of this model."
            ) from None
    loaded: dict[str, Loaded] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.removeprefix("blk.").rpartition(".")
        layer, _, part = stem.rpartition(".")
        known = GGUF_NAMES.get(part, part)
        if part != "rope_freqs":
            ours = f"layers.{layer}.{known}.{kind}" if layer else f"{known}.{kind}"
            loaded[ours if part in GGUF_NAMES else name] = Loaded(Quantized(tensor), name, path)
    if "output.weight" not in loaded and "tok_embeddings.weight" in loaded:
        loaded["output.weight"] = loaded["tok_embeddings.weight"]
    return loaded


def _meta_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> layers.3.feed_forward.w3.weight; unknown names stay what they are."""
    match = re.fullmatch(r"(?:model\.)?(layers\.\d+\.)?(.+)\.(weight|bias)", name)
    if match is None or match[2] not in HF_NAMES:
        return name
    return f"{match[1] or ''}{HF_NAMES[match[2]]}.{match[3]}"


class Reader(NamedTuple):
    """How to read a format; tensors and parameters get Meta's names."""

    args: Callable[[Checkpoint], dict[str, Any]]  # fields of ModelArgs
    weights: Callable[[Checkpoint], dict[str, Loaded]]
    rotates_halves: bool  # True: RoPE pairs a head's two halves; False: neighbouring elements, as in Meta's format
    config_names: dict[str, str]  # fields of ModelArgs that the format names differently
    names: dict[str, str]  # its names of layers -> Meta's
    layers: str  # what it writes before them


READERS = {
    "meta": Reader(_meta_args, _read_meta, False, {}, {}, "layers."),
    "hugging face": Reader(_hugging_face_args, _read_hugging_face, True, HF_CONFIG, HF_NAMES, "model.layers."),
    "gguf": Reader(_gguf_args, _read_gguf, False, {}, GGUF_NAMES, "blk."),
}


def _their_name(name: str, reader: Reader) -> str:
    """A tensor's name in the files: layers.3.feed_forward.w3.weight -> model.layers.3.mlp.up_proj.weight."""
    match = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.weight", name)
    assert match is not None
    theirs = next((theirs for theirs, ours in reader.names.items() if ours == match[2]), match[2])
    if match[1]:
        return f"{reader.layers}{match[1]}.{theirs}.weight"
    return f"{'model.' * (theirs in ('embed_tokens', 'norm') and reader.rotates_halves)}{theirs}.weight"


def _check(loaded: dict[str, Loaded], expected: dict[str, tuple[int, ...]], found: Checkpoint) -> None:
    """Raise InputError unless exactly the expected tensors are there, in shapes and dtypes that fit."""
    config = blobfile.basename(found.config_path)
    for name, shape in expected.items():
        if name not in loaded:
            raise _missing(name, found)
        tensor, their_name, path = loaded[name]
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{path} holds {their_name} as {tuple(tensor.shape)}, but {config} says {shape}; "
                "the two files belong to different models."
            )
        if isinstance(tensor, Tensor) and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(
                f"{path} holds {their_name} in {str(tensor.dtype).removeprefix('torch.')}; "
                "fetch the model in bfloat16, float16 or float32."
            )
    if surplus := sorted(loaded.keys() - expected.keys()):
        _, their_name, path = loaded[surplus[0]]
        what = next((what for pattern, what in STRANGERS.items() if re.search(pattern, their_name)), None)
        fix = "convert the model again" if found.format == "gguf" else f"{config} belongs to another one"
        raise InputError(f"{path} holds {their_name}, {what or f'unknown to this model; {fix}'}.")


def _missing(name: str, found: Checkpoint) -> InputError:
    theirs = _their_name(name, READERS[found.format])
    lacks = f"lacks the tensor {theirs}" if theirs == name else f"lacks the tensor {theirs} (here {name})"
    if found.format == "gguf":
        return InputError(f"{found.config_path} {lacks}; convert the model again.")
    where = found.weights[0] if len(found.weights) == 1 else f"Every file from {found.weights[0]} on"
    if name == "output.weight" and found.format == "hugging face":
        return InputError(
            f"{where} {lacks}; where the model uses its embedding there, write tie_word_embeddings true in "
            f"{found.config_path}, else fetch the weights again."
        )
    config = blobfile.basename(found.config_path)
    return InputError(f"{where} {lacks}; it does not belong to the {config} beside it: fetch both from one place.")
