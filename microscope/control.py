"""Control vectors: one direction per layer that tells positive prompts from negative ones, found from pairs of them.

mean  the mean of the differences between the pairs' activations
pca   the first principal component of these differences, not centred, pointing to the positive prompts
sets  the difference of the means of two sets of texts, which need not be pairs (Marks and Tegmark 2023,
      arXiv:2310.06824)

Activations are resid_post of each prompt's last token, as in repeng (Vogel 2024; Zou et al. 2023, arXiv:2310.01405); of
texts in sets, the mean over tokens, begin-of-text left out.
A vector is as long as the activations of its layer are on average, so that strengths are shares of the stream.

Files are llama.cpp's: direction.N is added to the output of block N, our layers.N.resid_post, at every token. Block 0
cannot be steered there. repeng writes what it found at the output of block N as direction.N; llama.cpp's own
cvector-generator names it direction.N+1, one layer later, and nothing in a file tells the two apart.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_3.generation import check_context, encode_text
from llama_3.model import Intervention, Transformer
from llama_3.tokenizer import Tokenizer
from pipeline.errors import InputError
from pipeline.files import atomic_path
from sae import SparseAutoencoder

Method = Literal["mean", "pca", "sets"]
_ARCHITECTURE = "controlvector"


class ControlVector(NamedTuple):
    vectors: Tensor  # (n_layers, d_model) float32, each as long as its layer's activations
    separation: Tensor  # (n_layers,) share of held-out pairs whose positive prompt lies further along the vector


@torch.inference_mode()
def text_activations(model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], part: slice) -> Tensor:
    """(len(texts), n_layers, d_model) float32 on the CPU: resid_post of each text, the mean over a part of its tokens.

    Raises InputError for a text that is too long.
    """
    sites = [f"layers.{i}.resid_post" for i in range(model.args.n_layers)]
    rows = []
    for text in texts:
        ids = encode_text(tokenizer, text)
        check_context(model, len(ids), 0)
        acts = model.activations(torch.tensor([ids], device=model.device), sites)
        rows.append(torch.stack([acts[site][0, part].float().mean(0).cpu() for site in sites]))
    return torch.stack(rows) if rows else torch.empty(0, model.args.n_layers, model.args.dim)


def last_activations(model: Transformer, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """`text_activations` of each text's last token."""
    return text_activations(model, tokenizer, texts, slice(-1, None))


def mean_activations(model: Transformer, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """`text_activations` of all tokens but begin-of-text, where the stream is much longer."""
    return text_activations(model, tokenizer, texts, slice(int(tokenizer.starts_with_bos), None))


def control_vector(positive: Tensor, negative: Tensor, method: Method) -> ControlVector:
    """positive, negative: (n, n_layers, d_model) activations; pairs, unless the method is sets.

    The last fifth of each, at least one, is held out. Raises InputError for fewer than two.
    """
    if min(len(positive), len(negative)) < 2:
        raise InputError("A control vector needs at least two pairs of prompts, one of them to check it; add some.")
    (known_p, held_p), (known_n, held_n) = (
        each.tensor_split([len(each) - max(1, len(each) // 5)]) for each in (positive, negative)
    )
    if method == "pca":
        differences = known_p - known_n
        directions = torch.linalg.svd(differences.transpose(0, 1), full_matrices=False).Vh[:, 0]  # (n_layers, d_model)
        along = torch.einsum("pld,ld->pl", differences, directions)
        directions = directions * torch.where((along > 0).float().mean(0) < 0.5, -1.0, 1.0)[:, None]
    else:
        directions = known_p.mean(0) - known_n.mean(0)
    directions = F.normalize(directions, dim=-1)
    along_p, along_n = ((held * directions).sum(-1) for held in (held_p, held_n))  # (n held out, n_layers)
    if method == "sets":
        separation = (along_p[:, None] > along_n).float().mean((0, 1))  # every text with every other
    else:
        separation = (along_p > along_n).float().mean(0)
    length = torch.cat([positive, negative]).norm(dim=-1).mean(0)
    return ControlVector(directions * length[:, None], separation)


@contextlib.contextmanager
def steered(model: Transformer, vectors: Mapping[int, Tensor], strength: float) -> Iterator[None]:
    """The model with strength x vector added to every token at layers.N.resid_post, inside the with block."""
    with contextlib.ExitStack() as stack:
        for each in interventions(vectors, strength):
            stack.enter_context(model.intervene(*each))
        yield


def interventions(vectors: Mapping[int, Tensor], strength: float) -> list[Intervention]:
    """Add strength x vector to every token at layers.N.resid_post, for `generate(steering=...)`."""
    added = {layer: strength * vector for layer, vector in vectors.items()}
    return [
        Intervention(f"layers.{layer}.resid_post", lambda x, change=change: x + change.to(x))
        for layer, change in added.items()
    ]


# ---- latents


def nearest_latents(vector: Tensor, sae: SparseAutoencoder, n: int) -> list[tuple[int, float]]:
    """The n latents whose directions have the highest absolute cosine with a vector (d_model,), and the cosines.

    The vector's mean over d_model is taken off first where the SAE does so with activations.
    """
    cosines = _unit(vector, sae) @ _directions(sae)
    best = cosines.abs().topk(min(n, len(cosines))).indices
    return [(int(i), float(cosines[i])) for i in best]


def pursuit(vector: Tensor, sae: SparseAutoencoder, n: int) -> tuple[list[tuple[int, float]], float]:
    """A vector as a sum of n latents by orthogonal matching pursuit (Pati et al. 1993): latents and coefficients of the
    vector at unit length, and the share of its squared length that they explain."""
    target = _unit(vector, sae)
    directions = _directions(sae)
    chosen: list[int] = []
    left, coefficients = target, target.new_zeros(0)
    for _ in range(n):
        scores = (left @ directions).abs()
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        basis = directions[:, chosen]
        coefficients = torch.linalg.lstsq(basis, target[:, None]).solution[:, 0]
        left = target - basis @ coefficients
    return list(zip(chosen, coefficients.tolist(), strict=True)), 1 - float(left.square().sum())


def _unit(vector: Tensor, sae: SparseAutoencoder) -> Tensor:
    return F.normalize(vector - vector.mean() if sae.kind.normalization == "layer_norm" else vector, dim=0)


def _directions(sae: SparseAutoencoder) -> Tensor:
    return F.normalize(sae.decoder.weight.detach().float(), dim=0)  # (d_model, n_latents)


# ---- files


def write_gguf(path: Path | str, vectors: Mapping[int, Tensor]) -> None:
    """Layer -> (d_model,), layers from 1 on, as llama.cpp's --control-vector reads them; atomically."""
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", "llama")
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(vectors))
        for layer, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{layer}", vector.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_gguf_vectors(path: Path | str, model: Transformer, shift: int = 0) -> dict[int, Tensor]:
    """Layer -> (d_model,) float32: direction.N belongs to layer N - shift.

    shift: 0 reads a file as llama.cpp does; 1 undoes what cvector-generator does to names, so that each vector acts
    where it was found. Raises InputError for a file that is broken or does not fit the model.
    """
    try:
        tensors = gguf.GGUFReader(str(path)).tensors
        found = {each.name: torch.from_numpy(each.data.copy()) for each in tensors}
        kinds = {each.name: each.tensor_type.name for each in tensors}
    except (OSError, ValueError, LookupError) as error:
        raise InputError(f"{path} cannot be read ({error}); name a control vector in GGUF.") from None
    if not found:
        raise InputError(f"{path} holds no direction.N; name a control vector.")
    vectors = {}
    for name, vector in found.items():
        kind, _, layer = name.partition(".")
        if kind != "direction" or not layer.isdecimal() or vector.dim() != 1:
            raise InputError(f"{path} holds {name}, not only direction.N; name a control vector.")
        if kinds[name] != "F32":
            raise InputError(f"{path} holds {name} as {kinds[name]}, and llama.cpp reads F32 alone; write it again.")
        if vector.shape[0] != model.args.dim or not 1 <= int(layer) < model.args.n_layers:
            raise InputError(
                f"{path} has {name} of {vector.shape[0]} numbers, but this model has layers 1 to "
                f"{model.args.n_layers - 1} of {model.args.dim}; name a control vector of this model."
            )
        if not vector.isfinite().all():
            raise InputError(f"{path} holds NaN or infinite numbers in {name}; make the vector again.")
        vectors[int(layer) - shift] = vector.float()
    return vectors
