"""Measure sparse autoencoders on held-out sentences: their reconstruction, and what splicing them in costs the model.

Reads   SAE_MODEL_PATH, one or several, each with its JSON; the model and the sentences they were trained on
Writes  NAME.evaluation.json and NAME.evaluation.png beside each SAE; for several also NAME.comparison.png beside the
        first; prints a table
Method  next-token cross-entropy, and KL divergence from the clean model, with the site replaced by the SAE's
        reconstruction, by zero, and by its mean. Loss recovered = (zeroed - spliced) / (zeroed - clean) (Gao et al.
        2024, arXiv:2406.04093, section 4.1), and the same against the mean. The mean of a token's site is that over
        all other evaluated sentences, never its own. FVU = squared error / squared distance from the mean, over all
        tokens, normalised space. Begin-of-text is passed through and never counted
Cost    three passes of the model over the sentences and one for each SAE, a fourth as far as the site; several SAEs
        at one site share all but their own. Only finished files are written: killed, it starts anew

    python sae_evaluation.py --sae_model_path data/sae.pth
    python sae_evaluation.py --sae_model_path a.pth b.pth c.pth
"""

from typing import Any

from pipeline.options import Count, parse_constants
from pipeline.run import run

SAE_MODEL_PATH: tuple[str, ...] = ("data/sae.pth",)  # the SAE, or several of one model and training set
LLAMA_MODEL_DIR: str | None = None  # Llama checkpoint folder; the one they were trained on when not given
SENTENCES_DIR: str | None = None  # folder of sentences; the one they were trained on when not given
NUM_SENTENCES: Count = 2000  # held-out sentences to use, at most
BATCH_TOKENS: Count = 8192  # tokens a forward pass, padding included

_ROWS = 512  # tokens whose logits or pre-activations are in memory at once: 263 MB each at a vocabulary of 128,256
_DENSE = 0.1  # a latent that fires on a greater share of the tokens is dense
_EPS = 1e-5  # of the normalisation, for reconstructions that are plain functions
_BINS_A_DECADE = 3  # of the histogram of firing frequencies

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import math
import reprlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import blobfile
import torch
import torch.nn.functional as F

from llama_3 import load_model, load_tokenizer
from llama_3.loading import read_params
from llama_3.model import check_site
from llama_3.padding import make_batches
from pipeline.errors import InputError
from pipeline.files import atomic_path, write_json
from pipeline.progress import duration, progress_bar
from pipeline.sae_files import SaeFiles
from pipeline.sentences import SentenceDataset
from sae import TopKSparseAutoencoder, load_sae_model

# ---- measuring


class Quality:
    """How well an SAE reconstructs, added up over tokens in float64, in normalised space."""

    def __init__(self, sae: Callable, d_model: int, max_tokens: int, device: Any):

        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)
        self.sae, self.has_latents = sae, isinstance(sae, TopKSparseAutoencoder)
        self.z, self.z_square, self.cosine, self.l0 = zeros(d_model), zeros(), zeros(), zeros()
        self.error, self.tokens = zeros(max_tokens), zeros(max_tokens)  # by place in the sentence
        self.fired = torch.zeros(sae.n_latents if self.has_latents else 0, dtype=torch.int64, device=device)

    def reconstruct(self, x, place):
        """Raw x (n_tokens, d_model), place (n_tokens) of each in its sentence -> its reconstruction, raw; counted."""

        if self.has_latents:
            z, mean, std = self.sae.normalize(x)
            values, indices = self.sae.encode_normalized(z)
            z_hat = self.sae.decode(values, indices)
            x_hat = (z_hat * std + mean).to(x.dtype)  # what sae(x) gives
            self.fired += torch.bincount(indices[values > 0], minlength=len(self.fired))
            self.l0 += (values > 0).sum()
        else:
            x_hat = self.sae(x)
            mean, std = x.float().mean(-1, keepdim=True), x.float().std(-1, keepdim=True)
            z, z_hat = ((raw.float() - mean) / (std + _EPS) for raw in (x, x_hat))
        self.cosine += F.cosine_similarity(z, z_hat, dim=-1).double().sum()
        z, z_hat = z.double(), z_hat.double()
        self.z += z.sum(0)
        self.z_square += z.square().sum()
        self.error.index_add_(0, place, (z_hat - z).square().sum(-1))
        self.tokens += torch.bincount(place, minlength=len(self.tokens))
        return x_hat

    def result(self) -> dict[str, Any]:
        error, count, d_model = float(self.error.sum()), int(self.tokens.sum()), len(self.z)
        variance = float(self.z_square - self.z.square().sum() / count)
        if variance <= 0:
            raise InputError("All evaluated activations are the same; evaluate more sentences.")
        values = {
            "fvu": error / variance,
            "mse_normalized": error / (count * d_model),
            "cosine": float(self.cosine) / count,  # of z and its reconstruction, mean
            "by_position": by_position((self.error / d_model).tolist(), self.tokens.long().tolist()),
        }
        if self.has_latents:
            frequency = self.fired.double() / count
            values |= {
                "l0": float(self.l0) / count,
                "n_latents": len(self.fired),
                "silent_frac": float((self.fired == 0).double().mean()),  # latents that never fire on these tokens
                "dense_frac": float((frequency > _DENSE).double().mean()),
                "firing_frequency": frequency_histogram(self.fired[self.fired > 0].tolist(), count),
            }
        return values


def by_position(error: list[float], tokens: list[int]) -> list[dict[str, Any]]:
    """Mean squared error of the tokens 1, 2-3, 4-7, 8-15, ... of a sentence: its first tokens are not like the rest."""
    bands = []
    first = 0
    while first < len(tokens) and (count := sum(tokens[first : 2 * first + 1])):
        last = min(2 * first + 1, len(tokens))
        mse = sum(error[first:last]) / count
        bands.append({"first": first + 1, "last": last, "tokens": count, "mse_normalized": mse})
        first = 2 * first + 1
    return bands


def frequency_histogram(fired: list[int], n_tokens: int) -> dict[str, list]:
    """Latents by the log10 of the share of tokens they fire on; the silent ones are left out."""
    n_bins = math.ceil(_BINS_A_DECADE * math.log10(max(n_tokens, 2)))
    counts = [0] * n_bins
    for n in fired:  # each bin holds its upper end, so that 1 has a place
        counts[min(n_bins - 1, max(0, n_bins - 1 + math.ceil(_BINS_A_DECADE * math.log10(n / n_tokens))))] += 1
    return {"log10_edges": [(i - n_bins) / _BINS_A_DECADE for i in range(n_bins + 1)], "latents": counts}


def evaluate(
    model,
    saes: Mapping[str, Callable],
    site: str,
    sentences: list[list[int]],
    batch_tokens: int,
    bos_id: int | None,
) -> dict[str, dict[str, Any]]:
    """What each SAE keeps of the model at one site: name -> measurements.

    saes: TopKSparseAutoencoders, or any functions of raw activations (n_tokens, d_model) to their reconstruction, same
        shape and dtype; of these, what is told of latents is None.
    sentences: token ids, without begin-of-text; bos_id puts one before each, which is passed through, never counted.
    Losses and KL are nats a prediction. Without a sentence besides it, none has a mean: what is told of it is None.
    Raises InputError where a loss is not finite, nothing is predicted, or all activations are the same.
    """

    n_tokens = sum(map(len, sentences))
    n_starts = 0 if bos_id is None else 1
    last = f"layers.{model.args.n_layers - 1}.resid_post"
    quality = {name: Quality(sae, model.args.dim, max(map(len, sentences)), model.device) for name, sae in saes.items()}
    baselines = ["zeroed", "mean"] if len(sentences) > 1 else ["zeroed"]
    variants = ["clean", *baselines, *(("spliced", name) for name in saes)]
    sums = torch.zeros(2, len(variants), dtype=torch.float64, device=model.device)  # losses, KL from clean
    n_predictions = 0

    with torch.inference_mode():
        total = torch.zeros(model.args.dim, dtype=torch.float64, device=model.device)
        for tokens, real in batches(sentences, batch_tokens, bos_id, model.device, "mean of the site"):
            total += model.activations(tokens, site)[real].double().sum(0)
        for tokens, real in batches(sentences, batch_tokens, bos_id, model.device, "evaluation"):
            clean = model.activations(tokens, [site, last])
            x = clean[site]
            own, n_own = (x.double() * real[..., None]).sum(1, keepdim=True), real.sum(1)[:, None, None]
            replaced = {"zeroed": torch.zeros_like(x), "mean": ((total - own) / (n_tokens - n_own)).to(x.dtype)}
            place = real.nonzero()[:, 1] - n_starts
            for name in saes:
                parts = zip(x[real].split(_ROWS), place.split(_ROWS), strict=True)
                x_hat = x.clone()
                x_hat[real] = torch.cat([quality[name].reconstruct(*part) for part in parts])
                replaced["spliced", name] = x_hat
            # Of the positions whose next token is the sentence's, the stream after the last layer.
            predicts = torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], dim=1)
            targets = tokens[:, 1:][predicts[:, :-1]]
            n_predictions += len(targets)
            streams = [clean[last][predicts]]
            for variant in variants[1:]:
                x_new = torch.where(real[..., None], replaced[variant], x)
                with model.intervene(site, lambda _, x_new=x_new: x_new):
                    streams.append(model.activations(tokens, last)[predicts])
            sums += losses_and_kl(model, streams, targets)
            for variant, loss in zip(variants, sums[0].tolist(), strict=True):
                if not math.isfinite(loss):
                    how = f"replaced by {variant[1]}" if isinstance(variant, tuple) else variant
                    raise InputError(f"The loss is {loss} with {site} {how}; check the model and the SAE.")
    if n_predictions == 0:
        raise InputError("No sentence has a second token to predict; evaluate longer ones.")
    loss, kl = (dict(zip(variants, row, strict=True)) for row in (sums / n_predictions).tolist())

    def recovered(baseline: str, spliced: float) -> float | None:
        if loss.get(baseline) in (None, loss["clean"]):
            return None
        return (loss[baseline] - spliced) / (loss[baseline] - loss["clean"])

    results = {}
    for name in saes:
        spliced = loss["spliced", name]
        results[name] = {
            **dict.fromkeys(("fvu", "mse_normalized", "cosine", "l0", "n_latents", "silent_frac", "dense_frac")),
            **quality[name].result(),
            "loss_clean": loss["clean"],
            "loss_spliced": spliced,
            "loss_zeroed": loss["zeroed"],
            "loss_mean": loss.get("mean"),
            "zeroing_cost": loss["zeroed"] - loss["clean"],
            "mean_cost": loss["mean"] - loss["clean"] if "mean" in loss else None,
            "loss_recovered": recovered("zeroed", spliced),
            "loss_recovered_mean": recovered("mean", spliced),
            "kl_spliced": kl["spliced", name],
            "kl_zeroed": kl["zeroed"],
            "kl_mean": kl.get("mean"),
            "tokens": n_tokens,
            "predictions": n_predictions,
            "sentences": len(sentences),
        }
    return results


def losses_and_kl(model, streams: list, targets):
    """Cross-entropy of each stream, and its KL divergence from the first, summed: (2, n_streams) float64, nats.

    streams: after the last layer, (n, d_model) each; targets (n). Only _ROWS rows of logits are in memory at a time.
    """

    def log_probs(stream):
        return model.output(model.norm(stream)).float().log_softmax(-1)

    sums = torch.zeros(2, len(streams), dtype=torch.float64, device=targets.device)
    for begin in range(0, len(targets), _ROWS):
        piece = slice(begin, begin + _ROWS)
        first = log_probs(streams[0][piece])
        probs = first.exp()
        for i, stream in enumerate(streams):
            found = log_probs(stream[piece]) if i else first
            sums[0, i] -= found.gather(1, targets[piece, None]).double().sum()
            sums[1, i] += (probs * (first - found)).sum(-1).double().sum()
    return sums


def batches(sentences: list[list[int]], batch_tokens: int, bos_id: int | None, device: Any, label: str):
    """Padded batches: tokens (batch, seq) int64, and where the sentences' own tokens are (batch, seq)."""

    starts = [] if bos_id is None else [bos_id]
    with progress_bar(total=sum(map(len, sentences)), unit="token", unit_scale=True, desc=label) as bar:
        for batch in make_batches([len(ids) + len(starts) for ids in sentences], batch_tokens):
            rows = [torch.tensor(starts + sentences[i]) for i in batch]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            places = torch.arange(tokens.shape[1])[None]
            real = (places >= len(starts)) & (places < torch.tensor([len(row) for row in rows])[:, None])
            yield tokens.to(device), real.to(device)
            bar.update(int(real.sum()))


# ---- showing

_MEANINGS = {
    "fvu": "fraction of variance unexplained",
    "mse_normalized": "mean squared error",
    "cosine": "between an activation and its reconstruction",
    "l0": "latents above zero a token",
    "n_latents": "latents",
    "silent_frac": "latents that fire on none of these tokens",
    "dead_frac": "latents dead at the end of training",
    "dense_frac": f"latents that fire on more than {_DENSE:.0%} of the tokens",
    "loss_clean": "cross-entropy of the model as it is, nats",
    "loss_spliced": "... with the SAE spliced in",
    "loss_zeroed": "... with the site set to zero",
    "loss_mean": "... with the site set to its mean",
    "zeroing_cost": "zeroed - clean",
    "mean_cost": "mean - clean",
    "loss_recovered": "(zeroed - spliced) / (zeroed - clean)",
    "loss_recovered_mean": "(mean - spliced) / (mean - clean)",
    "kl_spliced": "KL(clean || spliced), nats a token",
    "kl_zeroed": "KL(clean || zeroed)",
    "kl_mean": "KL(clean || mean)",
    "tokens": "activations",
    "sentences": "held-out sentences",
}


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row a measurement, a column an SAE."""

    def shown(value: Any) -> str:
        return "-" if value is None else f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"

    columns = [[name, *(shown(result.get(key)) for key in _MEANINGS)] for name, result in results.items()]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for key, meaning, *values in zip(["", *_MEANINGS], ["", *_MEANINGS.values()], *columns, strict=True):
        cells = (value.rjust(width) for value, width in zip(values, widths, strict=True))
        lines.append("  ".join([f"{key:19}", *cells, meaning]).rstrip())
    return "\n".join(lines)


def draw(path: Path, name: str, result: dict[str, Any]) -> None:
    """One SAE: what it costs the model beside the mean and zero, how often its latents fire, its error by place."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (costs, frequencies, places) = plt.subplots(
        1, 3, figsize=(15, 4), layout="constrained", width_ratios=[1.2, 1.1, 1]
    )
    about = f"{name}, {result['site']}: FVU {result['fvu']:.3f}, L0 {result['l0']:.1f}"
    figure.suptitle(f"{about}, {result['tokens']:,} tokens of {result['sentences']:,} held-out sentences")

    kinds = [kind for kind in ("zeroed", "mean", "spliced") if result[f"loss_{kind}"] is not None]
    labels = {"zeroed": "site zero", "mean": "site its mean", "spliced": "SAE spliced in"}
    clean = result["loss_clean"]
    for offset, label, color, values in (
        (0.2, "cross-entropy above clean", "tab:blue", [result[f"loss_{kind}"] - clean for kind in kinds]),
        (-0.2, "KL from clean", "tab:orange", [result[f"kl_{kind}"] for kind in kinds]),
    ):
        bars = costs.barh([i + offset for i in range(len(kinds))], values, 0.36, label=label, color=color)
        costs.bar_label(bars, fmt="{:+.4f}" if offset > 0 else "{:.4f}", padding=3)
    costs.set_yticks(range(len(kinds)), [f"{labels[kind]}\n{result[f'loss_{kind}']:.4f}" for kind in kinds])
    costs.axvline(0, color="black", linewidth=0.8)
    costs.margins(x=0.2)
    shares = [("", result["loss_recovered"]), (" against the mean", result["loss_recovered_mean"])]
    shares = [f"{share:.1%}{against}" for against, share in shares if share is not None]
    costs.set(title="loss recovered: " + (", ".join(shares) or "-"), xlabel=f"nats a token; clean: {clean:.4f}")
    costs.legend(frameon=False, loc="upper right")

    edges, latents = (result["firing_frequency"][key] for key in ("log10_edges", "latents"))
    colors = ["tab:orange" if left >= math.log10(_DENSE) else "tab:blue" for left in edges[:-1]]
    frequencies.bar(edges[:-1], latents, 1 / _BINS_A_DECADE, align="edge", color=colors, edgecolor="white")
    n, silent = result["n_latents"], result["silent_frac"]
    frequencies.set_title(f"{n:,} latents: {silent:.1%} silent, {result['dense_frac']:.1%} dense (orange)")
    frequency_axis(frequencies, edges[0])

    bands = result["by_position"]
    scale = result["fvu"] / result["mse_normalized"] if result["mse_normalized"] else 0.0
    labels = [str(b["first"]) if b["first"] == b["last"] else f"{b['first']}\u2013{b['last']}" for b in bands]
    places.tick_params(axis="x", labelsize=8)
    places.plot(labels, [band["mse_normalized"] * scale for band in bands], marker="o")
    places.axhline(result["fvu"], color="grey", linewidth=1, linestyle=":", label="all tokens")
    places.set(title="error by place of the token", xlabel="place in the sentence", ylabel="squared error / variance")
    places.set_ylim(bottom=0)
    places.legend(frameon=False)
    save(figure, path)


def draw_comparison(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Several SAEs, a colour each: the main measures side by side, and the firing frequencies on top of each other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [  # arrows: where better is
        ("fvu", "\u2190 FVU", "{:.4f}"),
        ("kl_spliced", "\u2190 KL from clean, nats", "{:.4f}"),
        ("loss_recovered", "loss recovered \u2192", "{:.1%}"),
        ("l0", "L0", "{:.1f}"),
        ("silent_frac", "\u2190 silent latents", "{:.1%}"),
    ]
    height = 2.4 + 0.35 * len(results)
    layout = [[key for key, _, _ in panels], ["firing"] * len(panels)]
    figure, axes = plt.subplot_mosaic(
        layout, figsize=(15, height + 2.6), height_ratios=[height - 1, 2.6], layout="constrained"
    )
    names = list(results)
    palette = plt.get_cmap("tab10" if len(names) <= 10 else "tab20")
    colors = [palette(i % palette.N) for i in range(len(names))]
    for key, title, form in panels:
        axis = axes[key]
        for row, (name, color) in enumerate(zip(names, colors, strict=True)):
            if (value := results[name][key]) is not None:
                axis.plot(value, row, "o", color=color)
                axis.annotate(form.format(value), (value, row), (0, 6), textcoords="offset points", ha="center")
        axis.set(title=title, ylim=(len(names) - 0.4, -0.7))
        axis.set_yticks(range(len(names)), names if key == "fvu" else [""] * len(names))
        axis.margins(x=0.25)
        axis.locator_params(axis="x", nbins=4)
        axis.grid(alpha=0.3)
    for name, color in zip(names, colors, strict=True):
        edges, latents = (results[name]["firing_frequency"][key] for key in ("log10_edges", "latents"))
        shares = [n / results[name]["n_latents"] for n in latents]
        axes["firing"].stairs(shares, edges, color=color, linewidth=1.5)
    frequency_axis(axes["firing"], edges[0])
    axes["firing"].set(ylabel="share of latents", title="how often latents fire, colours as above")
    axes["firing"].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    save(figure, path)


def frequency_axis(axis: Any, lowest: float) -> None:
    """Ticks for log10 of a share of tokens."""
    decades = range(math.ceil(lowest), 1)
    axis.set_xticks(decades, [f"{100 * 10.0**decade:.10g}%" for decade in decades])
    axis.set(xlabel="share of tokens that a latent fires on", ylabel="latents")
    axis.axvline(math.log10(_DENSE), color="grey", linewidth=1, linestyle=":")


def save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


# ---- main

# What the JSON beside an SAE must tell, and in what SAEs that are compared must agree.
_NEEDED = ("site", "model_dir", "sentences_dir", "dataset", "first_validation_sentence", "max_tokens", "begin_of_text")
_SHARED = ("model", "dataset", "first_validation_sentence", "max_tokens", "begin_of_text", "rope_scaling_factor")


def load_saes(paths: list[str], device: str) -> dict[str, Any]:
    """Path -> SAE. Raises InputError unless each has its JSON and all are of one model and one held-out set."""

    saes: dict[str, Any] = {}
    for path in paths:
        no_json = blobfile.exists(path) and not blobfile.exists(SaeFiles(path).json)
        sae = None if no_json else load_sae_model(path, device)
        missing = [name for name in _NEEDED if no_json or name not in sae.info]
        if missing:
            raise InputError(
                f"{path} has no JSON of sae_training.py beside it that tells what was held out ({missing[0]} is "
                "missing); name an SAE that sae_training.py wrote."
            )
        saes[path] = sae
        first = saes[paths[0]].info
        for name in _SHARED:
            if (mine := sae.info.get(name)) != (its := first.get(name)):
                raise InputError(
                    f"{path} and {paths[0]} are not of one model and one set of held-out sentences ({name}: "
                    f"{reprlib.repr(mine)} and {reprlib.repr(its)}); evaluate each by itself."
                )
    return saes


def seconds_a_pass(model, sentences: list[list[int]]) -> float:
    """About how long one pass of the model over the sentences takes, from a few of them."""

    few = [torch.tensor(ids[: _ROWS // 8]) for ids in sentences[:: -(-len(sentences) // 8)]]  # not over _ROWS in all
    tokens = torch.nn.utils.rnn.pad_sequence(few, batch_first=True).to(model.device)
    for _ in range(2):  # the first warms up
        started = time.monotonic()
        with torch.inference_mode():
            float(model(tokens).sum())
    return (time.monotonic() - started) * sum(map(len, sentences)) / tokens.numel()


def main() -> None:
    config = parse_constants(globals())

    device = "cuda" if torch.cuda.is_available() else "cpu"
    paths = list(dict.fromkeys(config.sae_model_path))
    saes = load_saes(paths, device)
    info = saes[paths[0]].info
    model_dir = config.llama_model_dir or info["model_dir"]
    args = read_params(model_dir)
    for path, sae in saes.items():
        if sae.d_model != args.dim:
            raise InputError(f"{path} has d_model {sae.d_model}, {model_dir} has {args.dim}; name its own model.")
        try:
            check_site(sae.info["site"], args.n_layers)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
    tokenizer = load_tokenizer(model_dir)
    dataset = SentenceDataset(
        config.sentences_dir or info["sentences_dir"], info["dataset"]["sentences"], info["dataset"]["seed"]
    )
    first = info["first_validation_sentence"]
    chosen = range(first, min(len(dataset), first + config.num_sentences))
    sentences = [ids[: info["max_tokens"]] for i in chosen if len(ids := tokenizer.encode(dataset[i])) > 1]
    if not sentences:
        raise InputError(f"{dataset.folder} has no held-out sentences for {paths[0]}.")
    model = load_model(model_dir, device, rope_scaling_factor=info.get("rope_scaling_factor"))
    stems = [Path(path).stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else paths  # columns of the table
    sites = list(dict.fromkeys(sae.info["site"] for sae in saes.values()))
    n_passes = 4 * len(sites) + len(paths)
    print(
        f"Reading {len(sentences):,} held-out sentences, {sum(map(len, sentences)):,} tokens, of {dataset.folder}; "
        f"writing evaluation.json and evaluation.png for {', '.join(paths)} (under 1 MB each); {n_passes} passes of "
        f"the model, about {duration(n_passes * seconds_a_pass(model, sentences))} on {device}."
    )
    shards = [shard["sha256"] for shard in dataset.manifest.get("shards", [])]
    if shards != info["dataset"].get("shards", shards):
        print(f"Note: {dataset.folder} is not the data of the training; that these were held out is not certain.")

    results: dict[str, dict[str, Any]] = {}
    for site in sites:
        here = {path: sae for path, sae in saes.items() if sae.info["site"] == site}
        bos_id = tokenizer.bos_id if info["begin_of_text"] else None
        results |= evaluate(model, here, site, sentences, config.batch_tokens, bos_id)
    for path, name in zip(paths, names, strict=True):
        dead_frac = saes[path].info.get("quality", {}).get("dead_frac")
        results[path] = {"site": saes[path].info["site"], **results[path], "dead_frac": dead_frac}
        write_json(SaeFiles(path).beside("evaluation.json"), results[path])
        draw(SaeFiles(path).beside("evaluation.png"), name, results[path])
    results = {name: results[path] for path, name in zip(paths, names, strict=True)}
    if len(paths) > 1:
        draw_comparison(SaeFiles(paths[0]).beside("comparison.png"), results)
    print(table(results))
    print(", ".join(str(SaeFiles(path).beside("evaluation.png")) for path in paths))
    if len(paths) > 1:
        print(SaeFiles(paths[0]).beside("comparison.png"))


if __name__ == "__main__":
    run(main)
