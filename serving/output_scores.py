"""How well each latent steers, judged by one forward pass: does adding it make the model say what it promotes?

After the output score of Arad et al. 2025, "SAEs Are Good for Steering - If You Select the Right Features",
arXiv:2505.20063. What a latent promotes is read off its direction by the logit lens; then the model reads a neutral
prompt, steered by the latent. With T the tokens promoted most, and p, p' the clean and the steered model's
probabilities of the next token,

    output score = mean over positions of  max_T p' - max_T p

The paper scores the last position of one prompt, leaves out p, and multiplies by 1 - rank / vocabulary, which is near 1
wherever the probability counts.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latents.promotion import plain_tokens, standard_logits
from latents.tables import STEERING
from llama_3.model import Intervention, Resume, Transformer, check_site
from pipeline.sae_files import SaeFiles
from serving.dose_response import Opened, Setting, part_by_part
from serving.steering import Steering, make_steering

STEERS_WELL = 0.015  # least output score of a latent that is said to steer well; docs/method.md says how it was found

_N_PROMOTED = 10  # tokens that a latent promotes
_N_PROMPTS, _SHORTEST = 2, 3  # prompts read, and the tokens that one has at least; the shortest cost least


class Read(NamedTuple):
    """A prompt as far as all latents have it in common."""

    tokens: Tensor  # (1, seq)
    resid_pre: Tensor  # (1, seq, d_model), what enters the layer of the SAE's site
    probs: Tensor  # (seq - 1, vocab_size), of the clean model, from the second position on


def output_scores(
    opened: Opened, setting: Setting, prompts: Sequence[Sequence[int]], at_once: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(latents, their output scores) for all latents that ever fired, `at_once` at a time.

    prompts: as token ids; the shortest are read. The first position counts for nothing: it is begin-of-text, or a word
    that models treat like it. Layers before the SAE's are computed once for all.
    """
    model, sae = opened.model, opened.sae
    layer_idx = check_site(sae.output_site, model.args.n_layers)
    shortest = sorted((prompt for prompt in prompts if len(prompt) >= _SHORTEST), key=len)[:_N_PROMPTS]
    plain = plain_tokens(opened.tokenizer, model.device)
    with torch.inference_mode():
        read = [read_once(model, layer_idx, prompt) for prompt in shortest]
    for latents in opened.highest.nonzero()[:, 0].split(at_once):
        with torch.inference_mode():
            promoted = promoted_tokens(opened, latents, plain)
            with model.intervene(*one_latent_a_row(opened, latents, setting)):
                gains = [gain(model, layer_idx, prompt, promoted) for prompt in read]
        yield latents, torch.cat(gains, 1).mean(1).cpu()


def promoted_tokens(opened: Opened, latents: Tensor, plain: Tensor) -> Tensor:
    """(len(latents), _N_PROMOTED) the tokens that each latent's direction promotes most, of those in `plain`."""
    sae = opened.sae
    added = sae.at_output(latents, opened.highest.to(plain.device))
    logits = standard_logits(opened.model, sae.output_site, *added, plain)
    return plain[logits.topk(_N_PROMOTED).indices]


def one_latent_a_row(opened: Opened, latents: Tensor, setting: Setting) -> Intervention:
    """Steers row i of a batch by latents[i]."""
    asked_for = [Steering({latent: setting.strength}, setting.mode, setting.keep_error) for latent in latents.tolist()]
    bos_id = opened.tokenizer.bos_id
    steerings = [make_steering(opened.sae, steering, opened.highest, bos_id) for steering in asked_for]
    return steerings[0]._replace(fn=part_by_part([steering.fn for steering in steerings]))


def read_once(model: Transformer, layer_idx: int, prompt: Sequence[int]) -> Read:
    tokens = torch.tensor([list(prompt)], device=model.device)
    resid_pre = model.activations(tokens, f"layers.{layer_idx}.resid_pre")
    return Read(tokens, resid_pre, model(tokens, resume=Resume(layer_idx, resid_pre))[0, 1:].softmax(-1))


def gain(model: Transformer, layer_idx: int, read: Read, promoted: Tensor) -> Tensor:
    """(n, seq - 1) by how much the likeliest of the promoted tokens becomes likelier. promoted: (n, n_promoted), those
    of the latent that steers row n of a batch."""
    n, seq = len(promoted), read.tokens.shape[1]
    resume = Resume(layer_idx, read.resid_pre.expand(n, -1, -1))
    logits = model(read.tokens.expand(n, -1), resume=resume)[:, 1:]
    theirs = promoted[:, None].expand(-1, seq - 1, -1)
    after = (logits.gather(-1, theirs) - logits.logsumexp(-1, keepdim=True)).exp()
    before = read.probs.expand(n, -1, -1).gather(-1, theirs)
    return after.amax(-1) - before.amax(-1)


def read_output_scores(sae_path: str) -> dict[int, float]:
    """Latent -> output score, from NAME.steering.parquet; latents that never fired are left out."""
    table = STEERING.read(SaeFiles(sae_path).beside(STEERING.suffix), ["latent", "output_score"])
    scores = zip(table["latent"].to_pylist(), table["output_score"].to_pylist(), strict=True)
    return {latent: score for latent, score in scores if score == score}
