"""Measure sparse autoencoders on held-out sentences: their reconstruction, and what splicing them in costs the model.

Reads   SAE_MODEL_PATH, one or several, each with its JSON; the model and the sentences they were trained on
Writes  NAME.evaluation.json and NAME.evaluation.png beside each SAE; for several also NAME.comparison.png beside the
        first; prints a table
Method  next-token cross-entropy, and KL divergence from the clean model, with the site replaced by the SAE's
        reconstruction, by zero, and by its mean. Loss recovered = (zeroed - spliced) / (zeroed - clean) (Gao et al.
        2024, arXiv:2406.04093, section 4.1), and the same against the mean. A token's mean is taken over all other
        evaluated sentences, never its own. FVU = squared error / squared distance from the mean, over all tokens, in
        normalised space. Begin-of-text is passed through and never counted (autoencoder/evaluation.py). Of dialogues
        the model reads all that was captured; the stored tokens alone are replaced, predicted and counted
Cost    one pass of the model over the sentences, then its layers from the site's on again for zero, for the mean and
        for each SAE, with the output layer. Memory: 4 bytes x d_model per token, 2 GB at most, so that the layers
        before the site are computed once. Only finished files are written: a killed run starts over

    python sae_evaluation.py --sae_model_path data/sae.pth
    python sae_evaluation.py --sae_model_path a.pth b.pth c.pth
    python sae_evaluation.py --sae_model_path imported.pth --sentences_dir data/sentences
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.options import Count, parse_constants
from pipeline.run import run

SAE_MODEL_PATH: tuple[str, ...] = ("data/sae.pth",)  # the SAE, or several of one model and training set
LLAMA_MODEL_DIR: str | None = None  # Llama checkpoint folder; the one the SAEs were trained on when not given
SENTENCES_DIR: str | None = None  # folder of sentences; the one the SAEs were trained on if not given; imported: needed
NUM_SENTENCES: Count = 2000  # held-out sentences to use, at most
BATCH_TOKENS: Count = 8192  # tokens per forward pass, padding included

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import reprlib
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from autoencoder.evaluation import ROWS, evaluate
from autoencoder.frequencies import FrequencyHistogram, draw_histogram, frequency_axis
from autoencoder.measures import MEASURES
from llama_3 import load_model, load_tokenizer
from llama_3.loading import read_params
from llama_3.model import Transformer, check_site
from pipeline.dialogues import DialogueSpans, open_dataset
from pipeline.errors import InputError
from pipeline.figures import new_figure, save_figure
from pipeline.files import require_writable, write_json
from pipeline.progress import duration
from pipeline.sae_files import SaeFiles
from pipeline.sentences import SentenceDataset
from pipeline.source import Source
from sae import SparseAutoencoder, load_sae_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What compared SAEs must have in common.
_SHARED = ("model", "dataset", "first_validation_sentence", "max_tokens", "begin_of_text", "rope_scaling_factor")


# ---- inputs


def load_saes(paths: list[str], device: str, sentences_dir: str | None = None) -> dict[str, SparseAutoencoder]:
    """Path -> SAE. Raises InputError unless all have a JSON and share one model and one held-out set.

    For SAEs that were not trained here, such as imported ones, all of sentences_dir is held out.
    """
    saes: dict[str, SparseAutoencoder] = {}
    for path in paths:
        sae = saes[path] = load_sae_model(path, device)
        if "first_validation_sentence" not in sae.info and not sentences_dir:
            raise InputError(
                f"{path} has no JSON from sae_training.py beside it that says what was held out "
                "(first_validation_sentence is missing); for an SAE that was trained elsewhere name a folder of "
                "sentences with --sentences_dir."
            )
        first = saes[paths[0]]
        for name in _SHARED:
            if (value := sae.info.get(name)) != (first_value := first.info.get(name)):
                raise InputError(
                    f"{path} and {paths[0]} do not share one model and one set of held-out sentences ({name}: "
                    f"{reprlib.repr(value)} and {reprlib.repr(first_value)}); evaluate them separately."
                )
    return saes


class Place(NamedTuple):
    """Where an SAE reads, and where it reconstructs if that is another site: of a transcoder."""

    site: str
    target_site: str | None = None


def sites_of(saes: dict[str, SparseAutoencoder], model_dir: str) -> dict[str, Place]:
    """Path -> site. Raises InputError for an SAE that does not fit the model."""
    args = read_params(model_dir)
    need = lambda path: Source.read(saes[path].info, SaeFiles(path).json).need("site")
    sites = {path: Place(need(path), sae.kind.target_site) for path, sae in saes.items()}
    for path, place in sites.items():
        if saes[path].d_model != args.dim:
            raise InputError(
                f"{path} has d_model {saes[path].d_model}, but {model_dir} has {args.dim}; name the SAE's own model."
            )
        try:
            for site in filter(None, place):
                check_site(site, args.n_layers)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
    return sites


def open_sentences(source: Source, given: str | None) -> SentenceDataset:
    """The sentences of the training; others only if `given`, with a printed note."""
    if given and source.dataset is None:  # an SAE from elsewhere
        return open_dataset(given)
    known = source.need("dataset")
    dataset = open_dataset(given, known["sentences"], known["seed"]) if given else source.sentences()
    if dataset.shard_checksums() != known.get("shards", dataset.shard_checksums()):
        print(f"Note: {dataset.folder} is not the training data; its sentences may not have been held out.")
    return dataset


class HeldOut(NamedTuple):
    """The sentences, or dialogues, that SAEs are evaluated on."""

    folder: Path
    sentences: list[list[int]]  # token ids, without begin-of-text
    bos_id: int | None  # begin-of-text, if the activations were captured with one before each sentence
    counted: list[list[range]] | None = None  # places of the stored tokens of dialogues


def open_held_out(source: Source, first: int, n: int, model_dir: str, given: str | None) -> HeldOut:
    """Those of the first n held-out sentences, from number `first` on, that have a token to predict."""
    tokenizer = load_tokenizer(model_dir)
    begin_of_text = source.need("begin_of_text")
    dataset = open_sentences(source, given)
    max_tokens = source.need("max_tokens") if source.dataset else None
    chosen = range(first, min(len(dataset), first + n))
    if isinstance(dataset, DialogueSpans):
        return held_out_dialogues(dataset, chosen)
    sentences = [ids[:max_tokens] for i in chosen if len(ids := tokenizer.encode(dataset[i])) > 1]
    if not sentences:
        raise InputError(f"{dataset.folder} has no held-out sentences for {source.file}.")
    return HeldOut(dataset.folder, sentences, tokenizer.bos_id if begin_of_text else None)


def held_out_dialogues(dataset: DialogueSpans, spans: range) -> HeldOut:
    """The dialogues that begin in a range of held-out spans. Raises InputError if there are none."""
    first, last = np.searchsorted(dataset.first_span[:-1], [spans.start, spans.stop]).tolist()
    contexts = [dataset.context(i) for i in range(first, last)]
    if not contexts:
        raise InputError(f"{dataset.folder} has no dialogue that is held out whole; raise --num_sentences.")
    return HeldOut(dataset.folder, [c.token_ids for c in contexts], None, [c.spans for c in contexts])


# ---- table and figures


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row per measure, a column per SAE."""
    columns = [
        [name, *(measure.show(result.get(measure.key)) for measure in MEASURES)] for name, result in results.items()
    ]
    widths = [max(map(len, column)) for column in columns]
    titles = [("", ""), *((measure.key, measure.about) for measure in MEASURES)]
    lines = []
    for (key, about), *values in zip(titles, *columns, strict=True):
        cells = (value.rjust(width) for value, width in zip(values, widths, strict=True))
        lines.append("  ".join([f"{key:19}", *cells, about]).rstrip())
    return "\n".join(lines)


def draw(path: Path, name: str, result: dict[str, Any]) -> None:
    """One SAE: its cost to the model next to the mean's and zero's, how often latents fire, its error by position."""
    figure = new_figure(15, 4)
    place = " to ".join(filter(None, (result["site"], result.get("target_site"))))
    about = f"{name}, {place}: FVU {result['fvu']:.3f}, L0 {result['l0']:.1f}"
    figure.suptitle(f"{about}, {result['tokens']:,} tokens of {result['sentences']:,} held-out sentences")
    costs, frequencies, positions = figure.subplots(1, 3, width_ratios=[1.2, 1.1, 1])
    draw_costs(costs, result)
    draw_histogram(frequencies, FrequencyHistogram(**result["firing_frequency"]))
    silent, dense = result["silent_frac"], result["dense_frac"]
    frequencies.set_title(f"{result['n_latents']:,} latents: {silent:.1%} silent, {dense:.1%} dense (orange)")
    draw_positions(positions, result)
    save_figure(figure, path)


def draw_costs(axis: "Axes", result: dict[str, Any]) -> None:
    kinds = [kind for kind in ("zeroed", "mean", "spliced") if result[f"loss_{kind}"] is not None]
    labels = {"zeroed": "site zero", "mean": "site its mean", "spliced": "SAE spliced in"}
    clean = result["loss_clean"]
    for offset, label, color, values in (
        (0.2, "cross-entropy above clean", "tab:blue", [result[f"loss_{kind}"] - clean for kind in kinds]),
        (-0.2, "KL from clean", "tab:orange", [result[f"kl_{kind}"] for kind in kinds]),
    ):
        bars = axis.barh([i + offset for i in range(len(kinds))], values, 0.36, label=label, color=color)
        axis.bar_label(bars, fmt="{:+.4f}" if offset > 0 else "{:.4f}", padding=3)
    axis.set_yticks(range(len(kinds)), [f"{labels[kind]}\n{result[f'loss_{kind}']:.4f}" for kind in kinds])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.margins(x=0.2)
    shares = [("", result["loss_recovered"]), (" against the mean", result["loss_recovered_mean"])]
    shares = [f"{share:.1%}{against}" for against, share in shares if share is not None]
    title = "loss recovered: " + (", ".join(shares) or "-")
    axis.set(title=title, xlabel=f"nats per prediction; clean: {clean:.4f}")
    axis.legend(frameon=False, loc="upper right")


def draw_positions(axis: "Axes", result: dict[str, Any]) -> None:
    bands = result["by_position"]
    scale = result["fvu"] / result["mse_normalized"] if result["mse_normalized"] else 0.0
    labels = [str(b["first"]) if b["first"] == b["last"] else f"{b['first']}\u2013{b['last']}" for b in bands]
    axis.tick_params(axis="x", labelsize=8)
    axis.plot(labels, [band["mse_normalized"] * scale for band in bands], marker="o")
    axis.axhline(result["fvu"], color="grey", linewidth=1, linestyle=":", label="all tokens")
    axis.set(
        title="error by position", xlabel="position in the sentence or dialogue", ylabel="squared error / variance"
    )
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)


_PANELS = (  # of the comparison: key, title with an arrow towards better values, format
    ("fvu", "\u2190 FVU", "{:.4f}"),
    ("kl_spliced", "\u2190 KL from clean, nats", "{:.4f}"),
    ("loss_recovered", "loss recovered \u2192", "{:.1%}"),
    ("l0", "L0", "{:.1f}"),
    ("silent_frac", "\u2190 silent latents", "{:.1%}"),
)


def draw_comparison(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Several SAEs, a colour each: the main measures side by side, the firing frequencies overlaid."""
    from matplotlib import colormaps
    from matplotlib.ticker import PercentFormatter

    names = list(results)
    height = 2.4 + 0.35 * len(names)
    figure = new_figure(15, height + 2.6)
    (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[height - 1, 2.6])
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    colors = [palette(i % palette.N) for i in range(len(names))]
    for axis, (key, title, form) in zip(above.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for row, (name, color) in enumerate(zip(names, colors, strict=True)):
            if (value := results[name][key]) is not None:
                axis.plot(value, row, "o", color=color)
                axis.annotate(form.format(value), (value, row), (0, 6), textcoords="offset points", ha="center")
        axis.set(title=title, ylim=(len(names) - 0.4, -0.7))
        axis.set_yticks(range(len(names)), names if key == "fvu" else [""] * len(names))
        axis.margins(x=0.25)
        axis.locator_params(axis="x", nbins=4)
        axis.grid(alpha=0.3)
    firing = below.subplots()
    histograms = [FrequencyHistogram(**result["firing_frequency"]) for result in results.values()]
    for histogram, result, color in zip(histograms, results.values(), colors, strict=True):
        shares = [n / result["n_latents"] for n in histogram.latents]
        firing.stairs(shares, histogram.log10_edges, color=color, linewidth=1.5)
    frequency_axis(firing, min(histogram.log10_edges[0] for histogram in histograms))
    firing.set(ylabel="share of latents", title="how often latents fire, colours as above")
    firing.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    save_figure(figure, path)


# ---- main


def seconds_per_pass(model: Transformer, sentences: list[list[int]]) -> float:
    """About how long one pass of the model over the sentences takes, measured on a few of them."""
    sample = [torch.tensor(ids[: ROWS // 8]) for ids in sentences[:: -(-len(sentences) // 8)]]  # at most ROWS in all
    tokens = torch.nn.utils.rnn.pad_sequence(sample, batch_first=True).to(model.device)
    for _ in range(2):  # the first warms up
        started = time.monotonic()
        with torch.inference_mode():
            float(model(tokens).sum())
    return (time.monotonic() - started) * sum(map(len, sentences)) / tokens.numel()


def announce(model: Transformer, held_out: HeldOut, sites: dict[str, Place]) -> None:
    unit = "sentences" if held_out.counted is None else "dialogues"
    n_layers, n_passes = model.args.n_layers, 0.0
    for place, n_saes in Counter(sites.values()).items():
        layer = min(check_site(site, n_layers) for site in filter(None, place))
        n_passes += (layer + 1 + (3 + n_saes) * (n_layers - layer)) / n_layers  # clean, zeroed, mean, and each SAE
    print(
        f"Reading {len(held_out.sentences):,} held-out {unit}, {sum(map(len, held_out.sentences)):,} tokens, from "
        f"{held_out.folder}; writing evaluation.json and evaluation.png for {', '.join(sites)} (under 1 MB each); "
        f"{n_passes:.1f} passes of the model, about {duration(n_passes * seconds_per_pass(model, held_out.sentences))} "
        f"on {model.device}."
    )


def finish(results: dict[str, dict[str, Any]]) -> None:
    """Write each SAE's results and figure, print the table. results: path of the SAE -> what was measured."""
    stems = [Path(path).stem for path in results]
    names = stems if len(set(stems)) == len(stems) else list(results)  # columns of the table
    written = []
    for name, (path, result) in zip(names, results.items(), strict=True):
        write_json(SaeFiles(path).beside("evaluation.json"), result)
        written.append(SaeFiles(path).beside("evaluation.png"))
        draw(written[-1], name, result)
    by_name = dict(zip(names, results.values(), strict=True))
    print(table(by_name))
    print(", ".join(map(str, written)))
    if len(results) > 1:
        comparison = SaeFiles(next(iter(results))).beside("comparison.png")
        draw_comparison(comparison, by_name)
        print(comparison)


def main() -> None:
    config = parse_constants(globals())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    saes = load_saes(list(dict.fromkeys(config.sae_model_path)), device, config.sentences_dir)
    require_writable(*(SaeFiles(path).beside(name) for path in saes for name in ("evaluation.json", "evaluation.png")))
    path, sae = next(iter(saes.items()))  # the others share its model and sentences (load_saes)
    source = Source.read(sae.info, SaeFiles(path).json)
    model_dir = source.model_dir(config.llama_model_dir)
    sites = sites_of(saes, model_dir)
    first = sae.info.get("first_validation_sentence", 0)
    held_out = open_held_out(source, first, config.num_sentences, model_dir, config.sentences_dir)
    model = load_model(model_dir, device, rope_scaling_factor=source.rope_scaling_factor)
    announce(model, held_out, sites)

    measured: dict[str, dict[str, Any]] = {}
    for place in dict.fromkeys(sites.values()):
        there = {path: sae for path, sae in saes.items() if sites[path] == place}
        read = held_out.sentences, config.batch_tokens, held_out.bos_id, held_out.counted
        measured |= evaluate(model, there, place.site, *read, target_site=place.target_site)
    dead = {path: sae.info.get("quality", {}).get("dead_frac") for path, sae in saes.items()}
    where = {path: {name: site for name, site in place._asdict().items() if site} for path, place in sites.items()}
    finish({path: {**where[path], **measured[path], "dead_frac": dead[path]} for path in saes})


if __name__ == "__main__":
    run(main)
