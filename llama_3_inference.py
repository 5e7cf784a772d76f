"""Complete text with Llama 3, optionally steered by a latent of a sparse autoencoder.

Reads   LLAMA_MODEL_DIR; SAE_MODEL_PATH and what lies beside it. Without either: the embedded model and its SAE
Writes  nothing; prints the completions, and with a latent the clean and the steered ones side by side
Method  steering adds strength x the latent's highest observed activation to its pre-activation before TopK, at the
        SAE's site (the original's h_bias), and keeps what the SAE does not reconstruct: strength 0 changes nothing

    python llama_3_inference.py --prompts "The file" "If the argument is"
    python llama_3_inference.py --prompts "The file" --latent 123 --strength 4
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import stage

if TYPE_CHECKING:
    from torch import Tensor

    from llama_3.model import Transformer
    from llama_3.tokenizer import Tokenizer
    from sae import TopKSparseAutoencoder

LLAMA_MODEL_DIR: str | None = None  # Llama checkpoint folder; the embedded tiny Llama when not given
SAE_MODEL_PATH: str | None = None  # SAE for steering; the embedded one with the embedded model when not given
PROMPTS = ("This function returns", "If the file does not exist,", "The user")  # texts to complete
MAX_NEW_TOKENS = 40  # tokens to add
TEMPERATURE = 0.7  # 0: always the most likely token
TOP_P = 0.95  # sample from the most likely tokens that together have this probability
SEED = 0  # each prompt's samples depend on this and on its place in the list alone
LATENT: int | None = None  # latent to steer with
STRENGTH = 4.0  # in multiples of the latent's highest observed activation
DEVICE = "auto"  # auto: a GPU where there is one


# ---- generation


def sample(logits: "Tensor", temperature: float, top_p: float, uniform: "Tensor") -> "Tensor":
    """One token a row: nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751) with given random numbers.

    logits: (batch, vocab_size); uniform: (batch,) in [0, 1). Returns (batch,). temperature 0 takes the largest logit.
    """
    import torch

    if temperature == 0:
        return logits.argmax(-1)
    probs, tokens = (logits.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probs.cumsum(-1)
    outside = cumulative - probs >= top_p
    outside[..., 0] = False  # the likeliest token always stays
    probs[outside] = 0
    cumulative = probs.cumsum(-1)
    place = torch.searchsorted(cumulative, (uniform.to(probs) * cumulative[:, -1])[:, None], right=True)
    return tokens.gather(-1, place.clamp(max=logits.shape[-1] - 1)).squeeze(-1)


def generate(
    model: "Transformer",
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    steering: "tuple[str, Callable[[Tensor], Tensor], Sequence[int]] | None" = None,
) -> Iterator[list[int | None]]:
    """Stream the next token of every prompt, None for one that has stopped.

    prompts: token ids, of any lengths, each at least one. seeds: one a prompt; a prompt's samples depend on its seed,
    not on its neighbours. steering: (site, function, skip_tokens) for `model.intervene`, in force in this call only.
    """
    import torch

    batch, longest = len(prompts), max(map(len, prompts))
    device = model.device
    n_pad = torch.tensor([longest - len(p) for p in prompts], device=device)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    generators = [torch.Generator().manual_seed(s) for s in (seeds or range(batch))]
    cache = model.new_cache(batch, longest + max_new_tokens)
    stops = set(stop_tokens)
    alive = [True] * batch
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            if steering is None:
                logits = model(tokens, cache, n_pad, last_only=True)[:, 0]
            else:
                with model.intervene(*steering):
                    logits = model(tokens, cache, n_pad, last_only=True)[:, 0]
            uniform = torch.stack([torch.rand((), generator=g) for g in generators])
            tokens = sample(logits, temperature, top_p, uniform.to(device))[:, None]
        step: list[int | None] = []
        for row, token in enumerate(tokens[:, 0].tolist()):
            alive[row] = alive[row] and token not in stops
            step.append(token if alive[row] else None)
        if not any(alive):
            return
        yield step


def complete(model: "Transformer", tokenizer: "Tokenizer", prompts: Sequence[str], **options) -> list[str]:
    """The completions of texts, each after begin-of-text; options as of `generate`."""
    ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    added: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, ids, stop_tokens=[tokenizer.eos_id], **options):
        for row, token in enumerate(step):
            if token is not None:
                added[row].append(token)
    return [tokenizer.decode(row) for row in added]


# ---- steering


def steer_by_latent(
    sae: "TopKSparseAutoencoder", latent: int, strength: float, highest: float
) -> "Callable[[Tensor], Tensor]":
    """A function for `model.intervene`: add strength x highest to the latent's pre-activation, keep the SAE's error.

    highest: the latent's highest observed activation, normalised space (NAME.latents.parquet).
    """
    import torch

    h_bias = torch.zeros(sae.n_latents, device=sae.b_pre.device)
    h_bias[latent] = strength * highest

    def steer(x: "Tensor") -> "Tensor":
        return x + (sae(x, h_bias) - sae(x))

    return steer


def highest_activation(sae_path: str, latent: int) -> float:
    """A latent's highest activation in NAME.latents.parquet. Raises InputError where it is not known."""
    import pyarrow.parquet as pq

    from sae import beside

    path = beside(sae_path, "latents.parquet")
    if not path.exists():
        raise stage.InputError(f"There is no {path}; run capture_top_activating_sentences.py first.")
    highest = pq.read_table(path, columns=["max"]).column("max")
    if not 0 <= latent < len(highest):
        raise stage.InputError(f"--latent {latent} is not among the {len(highest)} latents of {sae_path}.")
    if not (value := highest[latent].as_py()) > 0:
        raise stage.InputError(f"Latent {latent} of {sae_path} never fired; choose a living one.")
    return value


def main() -> None:
    config = stage.parse_constants(globals())
    import torch

    from llama_3 import load_model, load_tokenizer
    from llama_3.loading import TINY_LLAMA_DIR
    from sae import load_sae_model

    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    model_dir = config.llama_model_dir or TINY_LLAMA_DIR
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    sae = None
    if config.latent is not None:
        if config.sae_model_path is None and config.llama_model_dir is not None:
            raise stage.InputError("--latent needs an SAE of this model; name it with --sae_model_path.")
        sae_path = config.sae_model_path or str(Path(TINY_LLAMA_DIR) / "sae.pth")
        sae = load_sae_model(sae_path, device)
        if "site" not in sae.info:
            raise stage.InputError(f"{sae_path} has no JSON that names its site; train it with this project.")
    model = load_model(model_dir, device, dtype, sae.info.get("rope_scaling_factor") if sae else None)
    tokenizer = load_tokenizer(model_dir)
    if sae and sae.d_model != model.args.dim:
        raise stage.InputError(
            f"{sae_path} has d_model {sae.d_model}, {model_dir} has {model.args.dim}; they do not belong together."
        )
    highest = highest_activation(sae_path, config.latent) if sae else 0.0
    prompts = list(config.prompts)
    options = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "seeds": [config.seed * 1_000_003 + i for i in range(len(prompts))],
    }
    print(f"{model_dir} on {device}, seed {config.seed}\n")
    clean = complete(model, tokenizer, prompts, **options)
    steered: list[str] | None = None
    if sae:
        function = steer_by_latent(sae, config.latent, config.strength, highest)
        skip_tokens = (tokenizer.bos_id,)  # no SAE here was trained on begin-of-text
        steered = complete(model, tokenizer, prompts, **options, steering=(sae.info["site"], function, skip_tokens))
    for i, prompt in enumerate(prompts):
        print(f"{prompt!r}\n  clean    {clean[i]!r}")
        if steered is not None:
            print(f"  steered  {steered[i]!r}")
        print()


if __name__ == "__main__":
    stage.run(main)
