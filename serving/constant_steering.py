"""Steering as one constant vector, which other programs can add: what `add` comes to on average, and where it goes.

Mode `add` moves a token by s_i m_i d_i times the std of its own activation (serving/steering.py). Other programs add
the same to every token, so the std becomes its mean over real text:

    c = mean std x sum over i of s_i m_i d_i        at the SAE's output site

With an SAE that does not normalise each activation, and with transcoders, this is `add` itself, but for begin-of-text,
which `add` leaves alone. Where texts do not begin with it, `add` changes their first token a hundred times as much as
the others (`stds`), and all later tokens look there: to do as much, the constant must be a multiple of the mean.

A constant at a site is the same as biases of the matrices around it, since each site is only read through a matrix, or
is the output of one:

    resid_pre L (from 1)    the bias c of layer L - 1's down projection
    attention_norm L        biases Wq c, Wk c, Wv c in layer L
    attention_out, resid_mid L    the bias c of layer L's attention output
    ffn_norm L              biases W_gate c, W_up c in layer L
    mlp_out, resid_post L   the bias c of layer L's down projection
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama_3.model import Transformer, check_site
from llama_3.padding import make_batches
from pipeline.errors import InputError
from sae import SparseAutoencoder


class Spread(NamedTuple):
    """The std of activations over d_model, over the tokens of texts without their first."""

    mean: float
    std: float
    low: float  # 5th percentile
    high: float  # 95th
    tokens: int
    first: float  # mean over the first tokens


def stds(model: Transformer, sae: SparseAutoencoder, texts: Sequence[Sequence[int]], bos_id: int | None) -> Spread:
    """What `add` multiplies by on real text: the std of each activation, or the SAE's constant.

    The first token of a text counts apart, begin-of-text or not: attention rests on it where it has nothing else to
    look at, and its activations are a hundred times as large (Xiao et al. 2023, arXiv:2309.17453; Sun et al. 2024,
    arXiv:2402.17762). texts: token ids. Raises InputError if there is no token to measure.
    """
    first, others = [], []
    with torch.inference_mode():
        for batch in make_batches([len(ids) for ids in texts], 2048):
            rows = [torch.tensor(texts[i], device=model.device) for i in batch]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
            acts = model.activations(tokens.clamp(min=0), sae.site)
            found = acts.new_full(acts.shape[:2], 1 / sae.kind.target_scale, dtype=torch.float32)
            if sae.kind.target_site is None:
                found = sae.normalize(acts)[2][..., 0]
            real = (tokens >= 0) & (tokens != (-1 if bos_id is None else bos_id))
            first.append(found[:, 0].double().cpu())
            others.append(found[:, 1:][real[:, 1:]].double().cpu())
    every = torch.cat(others) if others else torch.zeros(0, dtype=torch.float64)
    if not len(every):
        raise InputError("The texts hold no token to measure; name others with --text_path.")
    low, high = torch.quantile(every[:: -(-len(every) // 10**6)], every.new_tensor([0.05, 0.95])).tolist()
    std = float(every.std()) if len(every) > 1 else 0.0
    return Spread(float(every.mean()), std, low, high, len(every), float(torch.cat(first).mean()))


def constant(sae: SparseAutoencoder, strengths: Mapping[int, float], highest: Tensor, std: float) -> Tensor:
    """(d_model,) float32 on the CPU: what is added at the SAE's site. highest: (n_latents,); std: mean of `stds`."""
    latents = torch.tensor(list(strengths), dtype=torch.long)
    amounts = torch.tensor(list(strengths.values()), dtype=torch.float32) * highest.float().cpu()[latents]
    return std * amounts @ sae.decoder.weight.t()[latents.to(sae.decoder.weight.device)].float().cpu()


def biases_of(model: Transformer, site: str, added: Tensor) -> dict[str, Tensor]:
    """The biases that a constant (d_model,) at a site comes to, by the matrices' names in Meta's words.

    model: with plain weights, not packed. Raises InputError for layers.0.resid_pre, which no matrix writes.
    """
    layer, kind = check_site(site, model.args.n_layers), site.rpartition(".")[2]
    block, added = model.layers[layer], added.to(model.device, torch.float32)
    weights = dict(block.named_parameters())
    times = lambda part: weights[f"{part}.weight"].float() @ added
    if kind == "resid_pre":
        if layer == 0:
            raise InputError(
                "layers.0.resid_pre is the embedding, which has no bias; name another SAE, or write --lm_eval_path."
            )
        return {f"layers.{layer - 1}.feed_forward.w2": added}
    if kind == "attention_norm":
        return {f"layers.{layer}.{part}": times(part) for part in ("attention.wq", "attention.wk", "attention.wv")}
    if kind == "ffn_norm":
        return {f"layers.{layer}.{part}": times(part) for part in ("feed_forward.w1", "feed_forward.w3")}
    part = "attention.wo" if kind in ("attention_out", "resid_mid") else "feed_forward.w2"
    return {f"layers.{layer}.{part}": added}


def control_vector_layer(site: str) -> int:
    """The N of llama.cpp's direction.N that acts at a site: what is added after block N.

    Raises InputError for a site that no such vector reaches, with what does.
    """
    _, number, kind = site.split(".")
    layer = int(number) - (kind == "resid_pre")
    if kind in ("resid_pre", "mlp_out", "resid_post") and layer >= 1:
        return layer
    why = "block 0's output" if kind in ("mlp_out", "resid_post") or (kind, layer) == ("resid_pre", 0) else site
    raise InputError(
        f"A control vector of llama.cpp adds to the outputs of blocks from 1 on, so it cannot steer {why}; write a "
        "steered model instead (--checkpoint_dir), whose biases can."
    )


def lm_eval_hookpoint(site: str) -> str:
    """The module of transformers' Llama whose output is the site, or where the same constant does the same."""
    _, number, kind = site.split(".")
    layer = int(number)
    if kind == "resid_pre":
        return f"layers.{layer - 1}" if layer else "embed_tokens"
    parts = {
        "attention_norm": ".input_layernorm",
        "attention_out": ".self_attn",
        "resid_mid": ".self_attn",
        "ffn_norm": ".post_attention_layernorm",
        "mlp_out": ".mlp",
        "resid_post": "",
    }
    return f"layers.{layer}{parts[kind]}"
