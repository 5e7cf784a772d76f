"""What an SAE keeps of the model at its site: its reconstruction, and what splicing it in costs the model.

Losses are next-token cross-entropy in nats, KL divergences are from the clean model; both with the site replaced by the
SAE's reconstruction, by zero, and by its mean over all other sentences. The measures are described in measures.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder.frequencies import frequency_histogram
from autoencoder.measures import DENSE
from llama_3.model import Resume, Transformer, check_site
from llama_3.padding import make_batches
from pipeline.errors import InputError
from pipeline.progress import progress_bar
from sae import SparseAutoencoder

ROWS = 512  # tokens whose logits or pre-activations are in memory at once: 263 MB each at a vocabulary of 128,256
KEPT_BYTES = 2 * 10**9  # of activations kept from one pass to the next; those beyond it are computed twice
_EPS = 1e-5  # of the normalisation, for reconstructions that are plain functions

Reconstruction = Callable[[Tensor], Tensor]  # raw activations (n_tokens, d_model) -> their reconstruction


def evaluate(
    model: Transformer,
    saes: Mapping[str, Reconstruction],
    site: str,
    sentences: list[list[int]],
    batch_tokens: int,
    bos_id: int | None,
    counted: list[list[range]] | None = None,
    target_site: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure each SAE at one site: name -> measurements.

    saes: SparseAutoencoders, or any functions of raw activations (n_tokens, d_model) to their reconstruction, same
        shape and dtype; for plain functions the latent metrics are None.
    target_site: of transcoders, all with this one; it is what they reconstruct and what is replaced.
    sentences: token ids, without begin-of-text. bos_id: put before each sentence, passed through, never counted.
    counted: places of the tokens to replace, to predict and to count in each sentence, at least one; all when None.
    Losses and KL are nats per prediction. With one sentence there is no mean of others, so its metrics are None.
    Raises InputError if a loss is not finite, nothing is predicted, or all activations are the same.
    """
    counted = counted or [[range(len(ids))] for ids in sentences]
    n_tokens, n_starts = sum(len(places) for of_one in counted for places in of_one), 0 if bos_id is None else 1
    output_site = target_site or site
    layer = min(check_site(each, model.args.n_layers) for each in (site, output_site))
    last = f"layers.{model.args.n_layers - 1}.resid_post"
    before = f"layers.{layer}.resid_pre"  # the layers up to here are computed once for all variants
    quality = [Quality(sae, model.args.dim, max(map(len, sentences)), model.device) for sae in saes.values()]
    has_mean = len(sentences) > 1
    variants = ["clean", "zeroed", *(["mean"] if has_mean else []), *(f"replaced by {name}" for name in saes)]
    sums = torch.zeros(2, len(variants), dtype=torch.float64, device=model.device)  # losses, KL from clean
    n_predictions = 0

    with torch.inference_mode():
        total = torch.zeros(model.args.dim, dtype=torch.float64, device=model.device)
        kept: list[Tensor | None] = []  # the residual stream there, batch by batch
        room = KEPT_BYTES
        for tokens, real in padded_batches(sentences, counted, batch_tokens, bos_id, model.device, "mean of the site"):
            found = model.activations(tokens, [before, output_site])
            total += found[output_site][real].double().sum(0)
            room -= found[before].nbytes
            kept.append(found[before] if room >= 0 else None)
        for number, (tokens, real) in enumerate(
            padded_batches(sentences, counted, batch_tokens, bos_id, model.device, "evaluation")
        ):
            stream = kept[number]
            resume = Resume(layer, model.activations(tokens, before) if stream is None else stream)
            clean = model.activations(tokens, [site, output_site, last], resume)
            x = clean[output_site]
            position = real.nonzero()[:, 1] - n_starts
            replacements = [torch.zeros_like(x)]
            if has_mean:
                replacements.append(mean_of_others(x, real, total, n_tokens))
            replacements += [each.reconstruct_all(clean[site], x, real, position) for each in quality]
            # The stream after the last layer, at the positions whose next token counts.
            predicts = torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], dim=1)
            targets = tokens[:, 1:][predicts[:, :-1]]
            n_predictions += len(targets)
            streams = [clean[last][predicts]]
            for replacement in replacements:
                x_new = torch.where(real[..., None], replacement, x)
                with model.intervene(output_site, lambda _, x_new=x_new: x_new):
                    streams.append(model.activations(tokens, last, resume)[predicts])
            sums += losses_and_kl(model, streams, targets)
            check_finite(sums[0].tolist(), variants, output_site)
    if n_predictions == 0:
        raise InputError("No sentence has a second token to predict; evaluate longer ones.")
    losses, kl = (sums / n_predictions).tolist()
    counts = {"tokens": n_tokens, "predictions": n_predictions, "sentences": len(sentences)}
    n_baselines = len(variants) - len(saes)  # clean among them
    return {
        name: {
            **each.result(),
            **costs(Costs(*losses[:n_baselines]), losses[i], Costs(*kl[:n_baselines]), kl[i]),
            **counts,
        }
        for i, (name, each) in enumerate(zip(saes, quality, strict=True), n_baselines)
    }


class Quality:
    """How well an SAE reconstructs, added up over tokens in float64, in normalised space; the FVU also in raw space,
    where SAEs with different normalisations can be compared."""

    def __init__(self, sae: Reconstruction, d_model: int, max_tokens: int, device: torch.device):
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)
        self.sae = sae
        self.z, self.z_square, self.cosine, self.l0 = zeros(d_model), zeros(), zeros(), zeros()
        self.error, self.tokens = zeros(max_tokens), zeros(max_tokens)  # by position in the sentence
        self.raw, self.raw_square, self.raw_error = zeros(d_model), zeros(), zeros()
        n_latents = sae.n_latents if isinstance(sae, SparseAutoencoder) else 0
        self.fired = torch.zeros(n_latents, dtype=torch.int64, device=device)

    def reconstruct_all(self, x: Tensor, target: Tensor, real: Tensor, position: Tensor) -> Tensor:
        """The target (batch, seq, d_model), its `real` tokens (batch, seq) replaced by their reconstruction from x."""
        x_hat = target.clone()
        parts = zip(x[real].split(ROWS), target[real].split(ROWS), position.split(ROWS), strict=True)
        x_hat[real] = torch.cat([self.reconstruct(*part) for part in parts])
        return x_hat

    def reconstruct(self, x: Tensor, target: Tensor, position: Tensor) -> Tensor:
        """Encode raw x (n_tokens, d_model), reconstruct the target, and add it to the sums. target: x itself, or of a
        transcoder the activations at its target site. position (n_tokens): in the sentence."""
        if isinstance(self.sae, SparseAutoencoder):
            z, mean, std = self.sae.normalize(x)
            values, indices = self.sae.encode_normalized(z)
            z_hat = self.sae.reconstruct(z, values, indices)
            x_hat = self.sae.restore(z_hat, mean, std).to(x.dtype)  # what sae(x) gives
            z = self.sae.normalize_target(target)
            self.fired += torch.bincount(indices[values > 0], minlength=len(self.fired))
            self.l0 += (values > 0).sum()
        else:
            x_hat = self.sae(x)
            mean, std = target.float().mean(-1, keepdim=True), target.float().std(-1, keepdim=True)
            z, z_hat = ((raw.float() - mean) / (std + _EPS) for raw in (target, x_hat))
        raw = target.double()
        self.raw += raw.sum(0)
        self.raw_square += raw.square().sum()
        self.raw_error += (x_hat.double() - raw).square().sum()
        self.cosine += F.cosine_similarity(z, z_hat, dim=-1).double().sum()
        z, z_hat = z.double(), z_hat.double()
        self.z += z.sum(0)
        self.z_square += z.square().sum()
        self.error.index_add_(0, position, (z_hat - z).square().sum(-1))
        self.tokens += torch.bincount(position, minlength=len(self.tokens))
        return x_hat

    def result(self) -> dict[str, Any]:
        error, count, d_model = float(self.error.sum()), int(self.tokens.sum()), len(self.z)
        variance = float(self.z_square - self.z.square().sum() / count)
        if variance <= 1e-9 * float(self.z_square):  # nothing but rounding
            raise InputError("All evaluated activations are the same; evaluate more sentences.")
        values: dict[str, Any] = {
            "fvu": error / variance,
            "fvu_raw": float(self.raw_error / (self.raw_square - self.raw.square().sum() / count)),
            "mse_normalized": error / (count * d_model),
            "cosine": float(self.cosine) / count,
            **dict.fromkeys(("l0", "n_latents", "silent_frac", "dense_frac")),
            "by_position": by_position((self.error / d_model).tolist(), self.tokens.long().tolist()),
        }
        if isinstance(self.sae, SparseAutoencoder):
            frequency = self.fired.double() / count
            values |= {
                "l0": float(self.l0) / count,
                "n_latents": len(self.fired),
                "silent_frac": float((self.fired == 0).double().mean()),
                "dense_frac": float((frequency > DENSE).double().mean()),
                "firing_frequency": frequency_histogram(self.fired[self.fired > 0].tolist(), count)._asdict(),
            }
        return values


def by_position(error: list[float], tokens: list[int]) -> list[dict[str, Any]]:
    """Mean squared error of the tokens 1, 2-3, 4-7, 8-15, ... of a sentence: its first tokens are not like the rest."""
    bands = []
    first = 0
    while first < len(tokens):
        last = min(2 * first + 1, len(tokens))
        if count := sum(tokens[first:last]):
            mse = sum(error[first:last]) / count
            bands.append({"first": first + 1, "last": last, "tokens": count, "mse_normalized": mse})
        first = 2 * first + 1
    return bands


class Costs(NamedTuple):
    """Losses, or KL divergences, without an SAE."""

    clean: float
    zeroed: float
    mean: float | None = None


def costs(loss: Costs, loss_spliced: float, kl: Costs, kl_spliced: float) -> dict[str, float | None]:
    """What one SAE costs the model, next to what zero and the mean cost it."""

    def recovered(baseline: float | None) -> float | None:
        if baseline in (None, loss.clean):
            return None
        return (baseline - loss_spliced) / (baseline - loss.clean)

    return {
        "loss_clean": loss.clean,
        "loss_spliced": loss_spliced,
        "loss_zeroed": loss.zeroed,
        "loss_mean": loss.mean,
        "zeroing_cost": loss.zeroed - loss.clean,
        "mean_cost": None if loss.mean is None else loss.mean - loss.clean,
        "loss_recovered": recovered(loss.zeroed),
        "loss_recovered_mean": recovered(loss.mean),
        "kl_spliced": kl_spliced,
        "kl_zeroed": kl.zeroed,
        "kl_mean": kl.mean,
    }


def check_finite(losses: list[float], variants: list[str], site: str) -> None:
    for loss, variant in zip(losses, variants, strict=True):
        if not math.isfinite(loss):
            raise InputError(f"The loss is {loss} with {site} {variant}; check the model and the SAE.")


def mean_of_others(x: Tensor, real: Tensor, total: Tensor, n_tokens: int) -> Tensor:
    """For each sentence of x (batch, seq, d_model) the mean over all other sentences' tokens: (batch, 1, d_model).

    total: the sum over all n_tokens, float64.
    """
    own, n_own = (x.double() * real[..., None]).sum(1, keepdim=True), real.sum(1)[:, None, None]
    return ((total - own) / (n_tokens - n_own)).to(x.dtype)


def losses_and_kl(model: Transformer, streams: list[Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy of each stream, and its KL divergence from the first, summed: (2, n_streams) float64, nats.

    streams: after the last layer, (n, d_model) each; targets (n). Only ROWS rows of logits are in memory at a time.
    """

    def log_probs(stream: Tensor) -> Tensor:
        return model.output(model.norm(stream)).float().log_softmax(-1)

    sums = torch.zeros(2, len(streams), dtype=torch.float64, device=targets.device)
    for begin in range(0, len(targets), ROWS):
        piece = slice(begin, begin + ROWS)
        first = log_probs(streams[0][piece])
        probs = first.exp()
        for i, stream in enumerate(streams):
            found = log_probs(stream[piece]) if i else first
            sums[0, i] -= found.gather(1, targets[piece, None]).double().sum()
            sums[1, i] += (probs * (first - found)).sum(-1).double().sum()
    return sums


def padded_batches(
    sentences: list[list[int]],
    counted: list[list[range]],
    batch_tokens: int,
    bos_id: int | None,
    device: torch.device,
    label: str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (batch, seq) int64, and a mask of those that count (batch, seq). label: of the progress bar."""
    starts = [] if bos_id is None else [bos_id]
    with progress_bar(total=sum(map(len, sentences)), unit="token", unit_scale=True, desc=label) as bar:
        for batch in make_batches([len(ids) + len(starts) for ids in sentences], batch_tokens):
            rows = [torch.tensor(starts + sentences[i]) for i in batch]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            real = torch.zeros_like(tokens, dtype=torch.bool)
            for row, i in enumerate(batch):
                for places in counted[i]:
                    real[row, len(starts) + places.start : len(starts) + places.stop] = True
            yield tokens.to(device), real.to(device)
            bar.update(sum(len(sentences[i]) for i in batch))
