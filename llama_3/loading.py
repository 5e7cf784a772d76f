"""Open checkpoints: a folder in Meta's format with `consolidated.00.pth`, `params.json` and `tokenizer.model`.

Paths may be local, `gs://` or `az://` (blobfile).
"""

import json
import pickle
import warnings

import blobfile
import torch

from llama_3.model import ModelArgs, Transformer, hidden_dim
from llama_3.tokenizer import Tokenizer, read_ranks
from stage import PROJECT_DIR, InputError

TINY_LLAMA_DIR = str(PROJECT_DIR / "llama_3" / "tiny_llama")  # the embedded model

# RoPE scaling of released models whose params.json only says use_scaled_rope: (dim, n_layers) -> factor.
# Meta's statement in its model repository; everything else with scaled RoPE is Llama 3.1 and uses 8.
ROPE_SCALING_FACTORS = {
    (2048, 16): 32.0,  # Llama 3.2 1B
    (3072, 28): 32.0,  # Llama 3.2 3B
    (4096, 32): 8.0,  # Llama 3.1 8B
    (8192, 80): 8.0,  # Llama 3.1 70B
    (16384, 126): 8.0,  # Llama 3.1 405B
}


def read_params(model_dir: str, rope_scaling_factor: float | None = None) -> ModelArgs:
    """ModelArgs of a checkpoint folder. rope_scaling_factor overrides what the parameters say (1: no scaling)."""
    path = blobfile.join(model_dir, "params.json")
    try:
        with blobfile.BlobFile(path, "r") as file:
            params = dict(json.load(file))
        for name in ("dim", "n_layers", "n_heads", "vocab_size"):
            if not isinstance(params[name], int) or params[name] < 1:
                raise ValueError(f"{name} = {params[name]!r}")
        if rope_scaling_factor is None:
            rope_scaling_factor = 1.0
            if params.get("use_scaled_rope", False):
                known = ROPE_SCALING_FACTORS.get((params["dim"], params["n_layers"]), 8.0)
                rope_scaling_factor = float(params.get("rope_scaling_factor", known))
        return ModelArgs(
            dim=params["dim"],
            n_layers=params["n_layers"],
            n_heads=params["n_heads"],
            n_kv_heads=params.get("n_kv_heads") or params["n_heads"],
            vocab_size=params["vocab_size"],
            hidden_dim=hidden_dim(params["dim"], params.get("multiple_of", 256), params.get("ffn_dim_multiplier")),
            norm_eps=params.get("norm_eps", 1e-5),
            rope_theta=params.get("rope_theta", 500000.0),
            rope_scaling_factor=rope_scaling_factor,
        )
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"There is no model at {model_dir}: params.json is missing; name a Llama folder.") from None
    except (KeyError, TypeError, ValueError, ArithmeticError, OSError) as error:
        raise InputError(f"{path} is not a Llama 3 params.json ({error!r}); fetch it again.") from None


def load_model(
    model_dir: str = TINY_LLAMA_DIR,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    rope_scaling_factor: float | None = None,
) -> Transformer:
    """Load a checkpoint for inference. Raises InputError, naming file and mend, when it is not whole."""
    args = read_params(str(model_dir), rope_scaling_factor)
    path = blobfile.join(str(model_dir), "consolidated.00.pth")
    try:
        if path.startswith(("gs://", "az://")):
            with blobfile.BlobFile(path, "rb") as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise InputError(f"There is no consolidated.00.pth in {model_dir}; name a folder in Meta's format.") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, OSError):
        raise InputError(f"{path} is truncated or not a checkpoint of tensors; fetch it again.") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} is not a state dict of tensors; fetch it again.")
    with torch.device("meta"):
        model = Transformer(args)
    expected = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    state.pop("rope.freqs", None)  # older Meta checkpoints carry the table
    for name, shape in expected.items():
        if name not in state:
            raise InputError(f"{path} lacks the tensor {name}; it does not belong to the params.json beside it.")
        if tuple(state[name].shape) != shape:
            raise InputError(
                f"{path} holds {name} as {tuple(state[name].shape)}, but params.json says {shape}; "
                "the two files belong to different models."
            )
    surplus = sorted(state.keys() - expected.keys())
    if surplus:
        raise InputError(f"{path} holds {surplus[0]}, unknown to this model; params.json belongs to another one.")
    tied = state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()
    state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in state.items()}
    if tied:
        state["output.weight"] = state["tok_embeddings.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def load_tokenizer(model_dir: str = TINY_LLAMA_DIR) -> Tokenizer:
    """The tokenizer of a checkpoint folder (its `tokenizer.model`)."""
    return Tokenizer(read_ranks(blobfile.join(str(model_dir), "tokenizer.model")))
