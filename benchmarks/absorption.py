"""Feature absorption on first letters: how often a latent for one word hides that the word begins with its letter.

An SAE may have a latent for "begins with s" and one for "short". If the second says that "short" begins with s, then
the first can stay silent there, which is sparser, and no longer means what it seems to mean (Chanin et al. 2024,
arXiv:2409.14507). Measured as SAEBench 0.6 does (Karvonen et al. 2025, arXiv:2503.09532), with the differences below.

Reads   SAE_MODEL_PATH: SAEs of one site of the residual stream; their model
Writes  a markdown table to the terminal
Method
    words    tokens of the vocabulary that are a space and at least two letters, NUM_WORDS of them at random, each read
             after EXAMPLES; x is the activation at the word. One in five is for testing, the others for fitting.
    probe    by letter a logistic regression on x; p, its direction, of length 1. Letters count whose probe has an F1 of
             at least 0.6 on the test words.
    main     by letter the latents that stand for it: logistic regressions on the 1, 2, ... latents whose firing alone
             has the highest F1, as long as one more raises the regression's F1 by more than 0.03.
    added    latent i adds h_i (d_i . p) to the projection on p, in raw units; all that latents have to add is
             (x - x_hat without latents) . p.
    absorbed a test word with the letter, on which the probe is right and no main latent fires, where the latent that
             adds most has a cosine of at least 0.025 with p and adds at least 0.4 of the projection.
    fraction of a test word: what the up to three latents that add most, of those with a cosine of at least 0.1 but not
             main, add, beside what the main latents add; 0 where they add less than 0.4 of the projection.
    The rates are shares of the test words on which the probe is right, by letter, then averaged over the letters.
Differs from SAEBench in that examples are the same for all words, so that the model reads them once; words are a
        sample; main latents are found one by one, not by an L1-regularised probe; latents are in the stream's units
        where the SAE normalises each activation, and the SAE's bias is taken off the projection.
Cost    half a minute of one core for the words of SmolLM2, seconds for each SAE

    python benchmarks/absorption.py --sae_model_path llama_3/smollm2/sae.pth
"""

import common  # noqa: F401, puts the project on sys.path

from pipeline.options import Count, parse_constants
from pipeline.run import run

SAE_MODEL_PATH: tuple[str, ...] = ("llama_3/smollm2/sae.pth",)  # one or several, of one site
LLAMA_MODEL_DIR = "models/smollm2-135M-Instruct-Q4_1"  # their model
NUM_WORDS: Count = 8000  # words, at most

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import os
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_3 import load_model, load_tokenizer
from llama_3.model import Cache, LayerCache, Transformer
from llama_3.tokenizer import Tokenizer
from pipeline.errors import InputError
from pipeline.files import PROJECT_DIR
from pipeline.progress import progress_bar
from sae import SparseAutoencoder, load_sae_model

EXAMPLES = ("ocean", "garden", "silver", "window", "music", "paper", "yellow", "kitchen", "running", "between")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_AT_ONCE = 256  # words
_TEST_EVERY = 5  # words
_LEAST_F1 = 0.6  # of a letter's probe
_MOST_MAIN, _F1_JUMP = 10, 0.03  # main latents of a letter, and what one more must bring
_LEAST_SHARE = 0.4  # of the projection, that absorbing latents must add
_LEAST_COSINE, _LEAST_COSINE_FRACTION, _MOST_ABSORBING = 0.025, 0.1, 3


class Words(NamedTuple):
    """Words as a model reads them."""

    x: Tensor  # (n, d_model), raw activations
    letters: Tensor  # (n), int64, of LETTERS
    is_test: Tensor  # (n), bool


class Probe(NamedTuple):
    directions: Tensor  # (26, d_model), of length 1, one for each letter
    f1: Tensor  # (26), on test words
    is_right: Tensor  # (n), bool: of each word, whether the probe of its letter says yes


class Absorption(NamedTuple):
    """Means over the letters that count."""

    rate: float  # share of words that are absorbed
    fraction: float
    main_latents: float  # number for a letter
    main_f1: float  # of the probe on them
    n_letters: int


# ---- words


def word_tokens(tokenizer: Tokenizer, n_vocabulary: int) -> tuple[list[int], list[int]]:
    """Tokens that are a space and at least two letters, and the number of each one's first letter."""
    found = []
    for token in range(n_vocabulary):
        text = tokenizer.token_bytes(token)
        if len(text) > 2 and text[:1] == b" " and text[1:].isalpha() and text.isascii():
            found.append((token, LETTERS.index(chr(text[1]).lower())))
    return [token for token, _ in found], [letter for _, letter in found]


def prompt_ids(tokenizer: Tokenizer, bos_id: int | None) -> list[int]:
    """What stands before each word: the examples spelled out, and begin-of-text before them if the SAE knows it."""
    lines = "".join(f" {word} has the first letter: {word[0].upper()}\n" for word in EXAMPLES)
    return [*([] if bos_id is None else [bos_id]), *tokenizer.encode(lines)]


@torch.inference_mode()
def read_words(model: Transformer, tokenizer: Tokenizer, site: str, bos_id: int | None, n_words: int) -> Words:
    tokens, letters = map(torch.tensor, word_tokens(tokenizer, model.args.vocab_size))
    if not len(tokens):
        raise InputError("The model's vocabulary has no tokens of a space and letters; name another model.")
    chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[:n_words]
    tokens, letters = tokens[chosen], letters[chosen]
    prompt = prompt_ids(tokenizer, bos_id)
    known = model.new_cache(1, len(prompt) + 1)
    model.activations(torch.tensor([prompt]), site, cache=known)
    layers = [LayerCache(*(each.repeat(_AT_ONCE, 1, 1, 1) for each in layer)) for layer in known.layers]
    rows = []
    with progress_bar(total=len(tokens), unit="word", desc="words") as bar:
        for batch in tokens[:, None].split(_AT_ONCE):
            cache = Cache([LayerCache(*(each[: len(batch)] for each in layer)) for layer in layers])
            cache.length = len(prompt)
            rows.append(model.activations(batch, site, cache=cache)[:, 0].float())
            bar.update(len(batch))
    return Words(torch.cat(rows).clone(), letters, torch.arange(len(tokens)) % _TEST_EVERY == 0)


# ---- probes


def logistic_regression(x: Tensor, y: Tensor, balanced: bool = False) -> tuple[Tensor, Tensor]:
    """Weights (d, n_classes) and biases (n_classes) for x (n, d) and bool y (n, n_classes), each class against the
    rest.

    The penalty on the weights of standardised x is half their square, beside the sum of the losses. balanced: words
    with and without the letter weigh the same in total.
    """
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    z, y = (x - mean) / std, y.float()
    weight = y / (2 * y.mean(0)) + (1 - y) / (2 - 2 * y.mean(0)) if balanced else None
    w = torch.zeros(z.shape[1], y.shape[1], requires_grad=True)
    b = torch.zeros(y.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        total = F.binary_cross_entropy_with_logits(z @ w + b, y, weight, reduction="sum") + w.square().sum() / 2
        (total / len(z)).backward()
        return float(total.detach()) / len(z)

    optimizer.step(loss)
    w = w.detach() / std[:, None]
    return w, b.detach() - mean @ w


def f1_score(said: Tensor, y: Tensor) -> Tensor:
    """Of bool columns (n, ...): 2 true positives / (positives + said to be)."""
    return 2 * (said & y).sum(0) / (said.sum(0) + y.sum(0)).clamp(min=1)


def fit_probe(words: Words) -> Probe:
    y = words.letters[:, None] == torch.arange(len(LETTERS))
    w, b = logistic_regression(words.x[~words.is_test], y[~words.is_test])
    says = words.x @ w + b > 0
    return Probe(F.normalize(w.t(), dim=1), f1_score(says[words.is_test], y[words.is_test]), (says & y).any(1))


def main_latents(latents: Tensor, y: Tensor, is_test: Tensor) -> tuple[list[int], float]:
    """The latents that stand for what bool y (n) says, and the F1 on test words of a probe on them.

    latents: (n, n_latents).
    """
    given, test = ~is_test, is_test
    fires, n_positive = (latents[given] > 0).float(), y[given].sum()
    alone = 2 * (y[given].float() @ fires) / (n_positive + fires.sum(0))  # F1 of firing
    best = alone.topk(min(_MOST_MAIN, len(alone))).indices.tolist()
    reached = 0.0
    for k in range(1, len(best) + 1):
        values = latents[:, best[:k]]
        w, b = logistic_regression(values[given], y[given, None], balanced=True)
        f1 = float(f1_score((values @ w + b)[test, 0] > 0, y[test]))
        if k > 1 and f1 - reached <= _F1_JUMP:
            return best[: k - 1], reached
        reached = f1
    return best, reached


# ---- the measure


def absorbed(
    added: Tensor, projection: Tensor, fires: Tensor, cosines: Tensor, main: list[int]
) -> tuple[Tensor, Tensor]:
    """Of each word with a letter, whether it is absorbed, bool (n), and its absorption fraction (n).

    added: (n, n_latents), what each latent adds to the projection on the probe; projection: (n), what all have to add;
    fires: bool (n, n_latents); cosines: (n_latents), of directions with the probe; main: the letter's main latents.
    """
    most, which = added.max(1)
    stands_in = (cosines[which] >= _LEAST_COSINE) & (projection >= 0) & (most >= _LEAST_SHARE * projection)
    is_absorbed = ~fires[:, main].any(1) & stands_in

    by_main = added[:, main].sum(1)
    may_absorb = cosines >= _LEAST_COSINE_FRACTION
    may_absorb[main] = False
    highest = torch.where(may_absorb, added, 0).clamp(min=0).topk(min(_MOST_ABSORBING, added.shape[1])).values.sum(1)
    by_others = torch.minimum(highest, projection - by_main)
    fraction = torch.where(by_main <= 0, 1.0, by_others / (by_others + by_main))
    is_none = (projection <= 0) | (by_main >= projection) | (highest < _LEAST_SHARE * projection)
    return is_absorbed, fraction.masked_fill(is_none, 0).clamp(0, 1)


@torch.no_grad()
def latents_of(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dense latents (n, n_latents); what 1 of a latent adds in raw units, times its direction (n, 1); x without what
    the SAE gives when nothing fires (n, d_model)."""
    values, indices = sae.encode(x)
    latents = torch.zeros(len(x), sae.n_latents).scatter_add_(1, indices, values)
    _, mean, std = sae.normalize(x)
    return latents, std, x - sae.restore(sae.b_pre.expand_as(x), mean, std)


def absorption(sae: SparseAutoencoder, words: Words, probe: Probe) -> Absorption:
    latents, size, left = latents_of(sae, words.x)
    directions = sae.decoder.weight.detach().t().float()  # (n_latents, d_model)
    rates, fractions, numbers, scores = [], [], [], []
    for letter in (probe.f1 >= _LEAST_F1).nonzero().flatten().tolist():
        y = words.letters == letter
        chosen = words.is_test & y & probe.is_right
        if not chosen.any():
            continue
        main, f1 = main_latents(latents, y, words.is_test)
        along = directions @ probe.directions[letter]
        own = latents[chosen]
        cosines = along / directions.norm(dim=1).clamp(min=1e-12)
        found = absorbed(own * size[chosen] * along, left[chosen] @ probe.directions[letter], own > 0, cosines, main)
        is_absorbed, fraction = (float(part.double().mean()) for part in found)
        rates.append(is_absorbed)
        fractions.append(fraction)
        numbers.append(len(main))
        scores.append(f1)
    if not rates:
        raise InputError("No letter's probe is good enough on these words; name a larger model, or a later site.")
    return Absorption(fmean(rates), fmean(fractions), fmean(numbers), fmean(scores), len(rates))


def measure(saes: dict[str, SparseAutoencoder], model_dir: str, n_words: int) -> dict[str, Absorption]:
    """Name -> absorption, of SAEs of one site. Prints what the words and the probe are."""
    first = next(iter(saes.values()))
    for name, sae in saes.items():
        if (sae.site, sae.kind.target_site) != (first.site, None):
            raise InputError(f"{name} is not an SAE of {first.site}; give SAEs of one site, and no transcoders.")
    model, tokenizer = load_model(model_dir, packed=True), load_tokenizer(model_dir)
    bos_id = tokenizer.bos_id if first.info.get("begin_of_text") else None
    words = read_words(model, tokenizer, first.site, bos_id, n_words)
    probe = fit_probe(words)
    counts = probe.f1 >= _LEAST_F1
    print(
        f"{len(words.x):,} words at {first.site}, {int(words.is_test.sum()):,} of them for testing; the probes of "
        f"{int(counts.sum())} letters have an F1 of {_LEAST_F1} or more, {float(probe.f1[counts].mean()):.2f} on "
        f"average, and are right on {float(probe.is_right[words.is_test].double().mean()):.0%} of the test words.",
        flush=True,
    )
    return {name: absorption(sae, words, probe) for name, sae in saes.items()}


def table(found: dict[str, Absorption]) -> str:
    lines = ["| SAE | absorbed | fraction | main latents of a letter | their F1 |", "|---|---|---|---|---|"]
    for name, row in found.items():
        lines.append(f"| {name} | {row.rate:.1%} | {row.fraction:.1%} | {row.main_latents:.1f} | {row.main_f1:.2f} |")
    return "\n".join(lines)


def main() -> None:
    config = parse_constants(globals())
    os.chdir(PROJECT_DIR)
    saes = {path: load_sae_model(path) for path in config.sae_model_path}
    print(table(measure(saes, config.llama_model_dir, config.num_words)))


if __name__ == "__main__":
    run(main)
