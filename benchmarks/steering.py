"""Steering modes: how often the concept appears in steered completions, and what that costs in fluency.

Reads   SAE_MODEL_PATH with its latents.parquet, promoted.parquet and the names of its latents; its model
Writes  OUTPUT_DIR: steering.json (every latent's figures too), steering.png; prints a markdown table
Method  the latents are chosen before any is steered: their names are plain words, one of them among the tokens that
        the latent's direction promotes; the most promoted first, no two about the same words. Same prompts and seeds
        for all. Concept: completions that hold one of the name's words; and, independent of names, tokens on which the
        latent fires when the clean model rereads the completion. Fluency: nats per token of the completion under the
        clean model, and repeated trigrams. Repetitive text is cheap in nats, so both count: the best mode and strength
        shows the words most often at no more than MAX_NATS and MAX_REPEATED above clean
Cost    10 minutes on two cores

    python benchmarks/steering.py
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import common  # noqa: F401 (puts the project on sys.path)

from pipeline.files import PROJECT_DIR
from pipeline.options import Count, NotNegative, Share, parse_constants
from pipeline.run import run
from serving.modes import Mode

SAE_MODEL_PATH = str(PROJECT_DIR / "llama_3" / "tiny_llama" / "sae.pth")  # the SAE
OUTPUT_DIR = "data/benchmark_steering"  # folder for the results
N_LATENTS: Count = 24  # latents steered, one at a time
MAX_NEW_TOKENS: Count = 30  # tokens per completion
TEMPERATURE: NotNegative = 0.8  # sampling temperature
TOP_P: Share = 0.95  # nucleus sampling
STRENGTHS = [2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0]  # of h_bias, add and clamp, times the latent's highest activation
FACTORS = [4.0, 16.0, 64.0]  # of scale
MAX_NATS: NotNegative = 0.5  # nats per token above clean that the best setting may cost
MAX_REPEATED: Share = 0.05  # share of repeated trigrams above clean that the best setting may have

_PROMPTS = (
    "This is", "The", "It can be", "Note that", "When the", "A", "In this case", "The second", "For example,", "If",
    "We", "Some of", "The following", "You can", "One", "After that,",
)  # fmt: skip


if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import pyarrow.parquet as pq
import torch
from torch import Tensor

from llama_3 import load_model, load_tokenizer
from llama_3.generation import encode_text, generate
from llama_3.model import Intervention, Transformer
from llama_3.tokenizer import Tokenizer
from pipeline.errors import InputError
from pipeline.figures import new_figure, save_figure
from pipeline.files import write_json
from pipeline.manifests import git_commit
from pipeline.progress import progress_bar
from pipeline.sae_files import SaeFiles
from pipeline.source import Source
from sae import TopKSparseAutoencoder, load_sae_model
from serving.own_words import count_hits
from serving.steered_model import Sampling, latent_meanings
from serving.steering import Steering, highest_activations, make_steering

Row = dict[str, Any]  # the figures of a setting


class Condition(NamedTuple):
    """A way to steer."""

    mode: Mode
    strength: float
    keep_error: bool


class Opened(NamedTuple):
    """What to steer: the model, and the SAE with each latent's highest activation."""

    model: Transformer
    tokenizer: Tokenizer
    sae: TopKSparseAutoencoder
    highest: Tensor


def name_of(row: Row) -> str:
    return row["mode"] + ("" if row["keep_error"] else ", error dropped")


class Concept(NamedTuple):
    latent: int
    words: list[str]


def choose_concepts(sae_path: str, n: int) -> list[Concept]:
    """Latents chosen by the rule in the module docstring, those that promote their words most first."""
    path = SaeFiles(sae_path).beside("promoted.parquet")
    if not path.exists():
        raise InputError(f"There is no {path}; run promoted_tokens.py first.")
    promoted = pq.ParquetFile(path).read().to_pydict()
    found = []
    for latent, name in latent_meanings(sae_path).items():
        words = name.split(", ")
        if not all(word.isalpha() and len(word) > 3 and word != "number" for word in words):
            continue
        scored = zip(promoted["tokens"][latent], promoted["scores"][latent], strict=True)
        scores = [score for token, score in scored if token.strip().lower() in words]
        if scores:
            found.append((max(scores), Concept(latent, words)))
    chosen: list[Concept] = []
    used: set[str] = set()
    for _, concept in sorted(found, key=lambda pair: (-pair[0], pair[1].latent)):
        beginnings = {word[:4] for word in concept.words}
        if not used & beginnings:
            used |= beginnings
            chosen.append(concept)
    if not chosen:
        raise InputError(f"No latent of {sae_path} promotes a word of its name; name another SAE.")
    return chosen[:n]


def conditions(strengths: Sequence[float], factors: Sequence[float]) -> list[Condition]:
    from_strengths: list[tuple[Mode, bool]] = [
        ("add", True),
        ("clamp", True),
        ("h_bias", True),
        ("clamp", False),
        ("h_bias", False),
    ]
    return [
        *(Condition(mode, strength, keep) for mode, keep in from_strengths for strength in strengths),
        *(Condition("scale", factor, True) for factor in factors),
        Condition("ablate", 0.0, True),
    ]


def completions(
    opened: Opened, steering: Intervention | None, sampling: Sampling, n_times: int = 1
) -> list[list[list[int]]]:
    """Complete the prompts n_times in one batch, with the same seeds each time: token ids by time."""
    n = len(_PROMPTS)
    prompts = [encode_text(opened.tokenizer, prompt) for prompt in _PROMPTS] * n_times
    options: dict[str, Any] = sampling.options(n) | {"seeds": sampling.seeds(n) * n_times}
    rows: list[list[int]] = [[] for _ in prompts]
    for step in generate(opened.model, prompts, stop_tokens=opened.tokenizer.stop_ids, steering=steering, **options):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return [rows[first : first + n] for first in range(0, len(rows), n)]


def part_by_part(functions: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """Apply each function to its equal part of a batch's rows."""
    return lambda x: torch.cat([f(part) for f, part in zip(functions, x.chunk(len(functions)), strict=True)])


def read_again(
    model: Transformer, tokenizer: Tokenizer, sae: TopKSparseAutoencoder, rows: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """The clean model reads prompts and completions: nats of each completion token (n,), and which latents fire on it
    (n, k), -1 for none."""
    prompts = [encode_text(tokenizer, prompt) for prompt in _PROMPTS]
    texts = [prompt + row for prompt, row in zip(prompts, rows, strict=True)]
    tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    completed = torch.zeros_like(tokens, dtype=torch.bool)
    for i, (prompt, ids) in enumerate(zip(prompts, texts, strict=True)):
        tokens[i, : len(ids)] = torch.tensor(ids)
        completed[i, len(prompt) : len(ids)] = True
    tokens, completed = tokens.to(model.device), completed.to(model.device)
    acts: list[Tensor] = []
    with torch.inference_mode(), model.intervene(sae.info["site"], lambda x: (acts.append(x), x)[1]):
        logprobs = model(tokens).log_softmax(-1)
        values, indices = sae.encode(acts[0][completed])
    # A position's logits predict the next token.
    nats = -logprobs[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0][completed[:, 1:]]
    return nats.cpu(), torch.where(values > 0, indices, -1).cpu()


def repeated_trigrams(row: list[int]) -> float:
    """The share of a completion's trigrams that occurred in it before."""
    trigrams = list(zip(row, row[1:], row[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def measures(tokenizer: Tokenizer, concept: Concept, rows: list[list[int]], nats: Tensor, fired: Tensor) -> Row:
    """What one latent's completions show."""
    return {
        **concept._asdict(),
        "words_share": count_hits([tokenizer.decode(row) for row in rows], concept.words) / len(rows),
        "fired_share": float((fired == concept.latent).any(-1).double().mean()) if len(fired) else 0.0,
        "nats": float(nats.double().mean()) if len(nats) else 0.0,
        "repeated": sum(map(repeated_trigrams, rows)) / len(rows),
        "example": tokenizer.decode(rows[0]),
    }


def measure(opened: Opened, concepts: list[Concept], condition: Condition | None, sampling: Sampling) -> Row:
    """The figures of a condition, None for clean: means over the latents, the standard error of the first, and each
    latent's own."""
    model, tokenizer, sae, highest = opened
    if condition is None:
        parts = completions(opened, None, sampling) * len(concepts)
        again = [read_again(model, tokenizer, sae, parts[0])] * len(concepts)
    else:
        mode, strength, keep_error = condition
        asked_for = [Steering({concept.latent: strength}, mode, keep_error) for concept in concepts]
        steerings = [make_steering(sae, steering, highest, tokenizer.bos_id) for steering in asked_for]
        together = steerings[0]._replace(fn=part_by_part([steering.fn for steering in steerings]))
        parts = completions(opened, together, sampling, len(concepts))
        again = [read_again(model, tokenizer, sae, rows) for rows in parts]
    each = [
        measures(tokenizer, concept, rows, *seen) for concept, rows, seen in zip(concepts, parts, again, strict=True)
    ]
    shares = [one["words_share"] for one in each]
    setting = condition._asdict() if condition else {"mode": "clean", "strength": 0.0, "keep_error": True}
    return {
        **setting,
        **{name: fmean(one[name] for one in each) for name in ("words_share", "fired_share", "nats", "repeated")},
        "words_share_error": stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0,
        "each": each,
    }


def find_best(clean: Row, rows: list[Row], max_nats: float, max_repeated: float) -> Row | None:
    """The best by the rule in the module docstring; among equals the first, whose mode computes less."""
    affordable = [
        row
        for row in rows
        if row["nats"] <= clean["nats"] + max_nats and row["repeated"] <= clean["repeated"] + max_repeated
    ]
    return max(affordable, key=lambda row: row["words_share"], default=None)


def table(clean: Row, rows: list[Row], best: Row | None) -> str:
    lines = [
        "| mode | strength | texts with the words | tokens on which it fires | nats per token | repeated trigrams |",
        "|---|---|---|---|---|---|",
    ]
    for row in [clean, *rows]:
        strength = "" if row["mode"] in ("clean", "ablate") else f"{row['strength']:g}"
        cells = [
            name_of(row),
            strength,
            f"{row['words_share']:.1%} ± {row['words_share_error']:.1%}",
            f"{row['fired_share']:.1%}",
            f"{row['nats']:.2f}",
            f"{row['repeated']:.1%}",
        ]
        lines.append("| " + " | ".join(f"**{cell}**" if row is best and cell else cell for cell in cells) + " |")
    return "\n".join(lines)


def plot(clean: Row, rows: list[Row], best: Row | None, path: Path) -> None:
    """The concept against each cost, a line per mode, a point per strength."""
    figure = new_figure(11, 4.6)
    axes = figure.subplots(1, 2, sharey=True)
    rows_by_mode: dict[str, list[Row]] = {}
    for row in rows:
        rows_by_mode.setdefault(name_of(row), []).append(row)
    costs = {"nats": "nats per token under the clean model", "repeated": "repeated trigrams, %"}
    for axis, (cost, label) in zip(axes, costs.items(), strict=True):
        scale = 100 if cost == "repeated" else 1
        for i, (name, points) in enumerate(rows_by_mode.items()):
            x, y = [scale * point[cost] for point in points], [100 * point["words_share"] for point in points]
            style = "--" if "dropped" in name else "-"
            axis.plot(x, y, marker="o", markersize=4, linestyle=style, color=f"C{i}", label=name)
            for point, *place in zip(points, x, y, strict=True):
                if name == "scale" or (best and name == name_of(best)):  # the other modes' strengths are about the same
                    axis.annotate(f"{point['strength']:g}", place, (3, 3), textcoords="offset points", fontsize=7)
        axis.plot([scale * clean[cost]], [100 * clean["words_share"]], "k*", markersize=11, label="clean")
        if best:
            place = [scale * best[cost]], [100 * best["words_share"]]
            axis.plot(*place, "o", markersize=13, fillstyle="none", color="black", label="best")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("completions with the latent's own words, %")
    axes[0].legend(fontsize=8)
    figure.suptitle("Steering: concept against fluency; numbers are strengths, similar on neighbouring lines")
    save_figure(figure, path, dpi=130)


def open_everything(sae_path: str) -> Opened:
    highest = highest_activations(sae_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sae = load_sae_model(sae_path, device)
    model_dir = Source.read(sae.info, SaeFiles(sae_path).json).model_dir()
    model = load_model(model_dir, device, rope_scaling_factor=sae.info.get("rope_scaling_factor"), packed=True)
    return Opened(model, load_tokenizer(model_dir), sae, highest)


def main() -> None:
    config = parse_constants(globals())
    concepts = choose_concepts(config.sae_model_path, config.n_latents)
    opened = open_everything(config.sae_model_path)
    print("Latents: " + "; ".join(f"{concept.latent} {', '.join(concept.words)}" for concept in concepts))
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, seed=0)
    settings = [None, *conditions(config.strengths, config.factors)]
    with progress_bar(settings, unit="setting", desc="steering") as bar:
        clean, *rows = [measure(opened, concepts, condition, sampling) for condition in bar]
    best = find_best(clean, rows, config.max_nats, config.max_repeated)
    folder = Path(config.output_dir)
    result = {"config": vars(config), "git_commit": git_commit(), "clean": clean, "settings": rows, "best": best}
    write_json(folder / "steering.json", result)
    plot(clean, rows, best, folder / "steering.png")
    print(table(clean, rows, best))
    print(f"{len(concepts)} latents, {len(_PROMPTS)} completions each. Figures: {folder / 'steering.png'}")


if __name__ == "__main__":
    run(main)
