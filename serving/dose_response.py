"""How much of a concept a steered model writes, and what that costs: measured on completions of neutral prompts.

sae_steering.py finds an SAE's default strength with it, benchmarks/steering.py compares ways to steer.

Concept: the share of completions that hold one of the words of the latent's name; and, independent of names, the tokens
on which the latent fires when the clean model reads the completion again. Fluency: nats per token of the completion
under the clean model, and repeated trigrams. Repetitive text is cheap in nats, so both count.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latents.interesting import is_empty
from latents.tables import PROMOTED
from llama_3.checkpoint import TINY_LLAMA_DIR
from llama_3.generation import generate
from llama_3.model import Intervention, Transformer
from llama_3.tokenizer import Tokenizer
from pipeline.errors import InputError
from pipeline.figures import new_figure, save_figure
from pipeline.sae_files import SaeFiles
from sae import SparseAutoencoder
from serving.modes import Mode
from serving.own_words import count_hits
from serving.steered_model import Sampling, latent_meanings
from serving.steering import Steering, make_steering

MAX_NATS = 0.5  # nats per token above clean that a setting may cost
MAX_REPEATED = 0.05  # share of repeated trigrams above clean that a setting may have
FIRST_STRENGTH = 0.125  # where the search for the strongest affordable setting begins; it doubles from there
_LAST_STRENGTH = 64.0
_BROKEN_NATS, _BROKEN_REPEATED = 4 * MAX_NATS, 4 * MAX_REPEATED  # above clean: the text is no longer worth reading
_ROWS_AT_ONCE = 128  # completions written together

EVERYDAY_PROMPTS = (
    "My favourite place in the world is", "The most important thing in life is", "I think that",
    "Yesterday I went to", "Once upon a time there was", "People often say that", "When I was young,",
    "Every morning", "If you ask me,", "The news today is about", "She told me about", "What I remember most is",
    "There is nothing like", "Last summer we", "The best thing about", "It all began with",
)  # fmt: skip
DOCUMENTATION_PROMPTS = (  # for the embedded model, which knows nothing else
    "This is", "The", "It can be", "Note that", "When the", "A", "In this case", "The second", "For example,", "If",
    "We", "Some of", "The following", "You can", "One", "After that,",
)  # fmt: skip

Row = dict[str, Any]  # the figures of a setting


class Concept(NamedTuple):
    latent: int
    words: list[str]  # of its name


class Setting(NamedTuple):
    """A way to steer."""

    mode: Mode
    strength: float
    keep_error: bool = True


class Opened(NamedTuple):
    """What to steer: the model, and the SAE with each latent's highest activation."""

    model: Transformer
    tokenizer: Tokenizer
    sae: SparseAutoencoder
    highest: Tensor


class Task(NamedTuple):
    """What is completed, how, and for whom."""

    concepts: Sequence[Concept]
    prompts: Sequence[Sequence[int]]  # neutral ones, as token ids
    sampling: Sampling


def neutral_prompts(model_dir: str) -> tuple[str, ...]:
    """Beginnings that leave open what follows, of the kind of text the model knows."""
    is_embedded = Path(model_dir).resolve() == Path(TINY_LLAMA_DIR).resolve()
    return DOCUMENTATION_PROMPTS if is_embedded else EVERYDAY_PROMPTS


# ---- which latents


def plain_concepts(sae_path: str) -> dict[int, tuple[Concept, float]]:
    """Latents whose name consists of plain words, one of them among the tokens that the latent's direction promotes.

    With the standard score of its most promoted word. Words that say little about what a text is about are not plain
    (latents/interesting.py).
    """
    promoted = PROMOTED.read(SaeFiles(sae_path).beside(PROMOTED.suffix), ["tokens", "scores"]).to_pydict()
    found = {}
    for latent, name in latent_meanings(sae_path).items():
        words = name.split(", ")
        if not all(is_plain_word(word) for word in words) or latent >= len(promoted["tokens"]):
            continue
        scored = zip(promoted["tokens"][latent], promoted["scores"][latent], strict=True)
        scores = [score for token, score in scored if token.strip().lower() in words]
        if scores:
            found[latent] = Concept(latent, words), max(scores)
    return found


def is_plain_word(word: str) -> bool:
    return word.isalpha() and not is_empty(word)


def choose_concepts(sae_path: str, n: int, scores: Mapping[int, float] | None = None) -> list[Concept]:
    """n of `plain_concepts`, no two about words that begin alike: those with the highest scores, latent -> score;
    without scores, those that promote their words most.

    Raises InputError if there is none.
    """
    concepts = plain_concepts(sae_path)
    rank = {latent: promotion for latent, (_, promotion) in concepts.items()}
    if scores is not None:
        rank = {latent: scores.get(latent, -math.inf) for latent in concepts}
    chosen: list[Concept] = []
    used: set[str] = set()
    for latent in sorted(concepts, key=lambda latent: (-rank[latent], latent)):
        concept, _ = concepts[latent]
        beginnings = {word[:4] for word in concept.words}
        if not used & beginnings:
            used |= beginnings
            chosen.append(concept)
    if not chosen:
        raise InputError(f"No latent of {sae_path} promotes a word of its name; name another SAE.")
    return chosen[:n]


# ---- one setting


def part_by_part(functions: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """Apply each function to its equal part of a batch's rows."""
    return lambda x: torch.cat([f(part) for f, part in zip(functions, x.chunk(len(functions)), strict=True)])


def completions(
    opened: Opened,
    sampling: Sampling,
    prompts: Sequence[Sequence[Sequence[int]]],
    steerings: Sequence[Intervention | None],
) -> list[list[list[int]]]:
    """Complete prompts[i], as many for each i, under steerings[i]: token ids of each completion.

    Seeds depend only on a prompt's place. Steerings are all None or all at the same site.
    """
    n = len(prompts[0])
    found: list[list[list[int]]] = []
    size = max(1, _ROWS_AT_ONCE // n)
    for first in range(0, len(steerings), size):
        group = steerings[first : first + size]
        functions = [steering.fn for steering in group if steering is not None]
        together = group[0]._replace(fn=part_by_part(functions)) if group[0] is not None else None
        starts = [prompt for part in prompts[first : first + size] for prompt in part]
        options = sampling.options(len(starts), first * n)
        rows: list[list[int]] = [[] for _ in starts]
        for step in generate(opened.model, starts, stop_tokens=opened.tokenizer.stop_ids, steering=together, **options):
            for row, token in zip(rows, step, strict=True):
                if token is not None:
                    row.append(token)
        found += [rows[i : i + n] for i in range(0, len(rows), n)]
    return found


def read_again(opened: Opened, prompts: Sequence[Sequence[int]], rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """The clean model reads prompts and completions: nats of each completion token (n,), and which latents fire on it
    (n, k), -1 for none."""
    model, sae = opened.model, opened.sae
    texts = [[*prompt, *row] for prompt, row in zip(prompts, rows, strict=True)]
    tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    completed = torch.zeros_like(tokens, dtype=torch.bool)
    for i, (prompt, ids) in enumerate(zip(prompts, texts, strict=True)):
        tokens[i, : len(ids)] = torch.tensor(ids)
        completed[i, len(prompt) : len(ids)] = True
    tokens, completed = tokens.to(model.device), completed.to(model.device)
    acts: list[Tensor] = []
    with torch.inference_mode(), model.intervene(sae.site, lambda x: (acts.append(x), x)[1]):
        logits = model(tokens)[:, :-1]  # a position's logits predict the next token
        nats = logits.logsumexp(-1) - logits.gather(-1, tokens[:, 1:, None])[..., 0]
        values, indices = sae.encode(acts[0][completed])
    return nats[completed[:, 1:]].cpu(), torch.where(values > 0, indices, -1).cpu()


def repeated_trigrams(row: Sequence[int]) -> float:
    """The share of a completion's trigrams that occurred in it before."""
    trigrams = list(zip(row, row[1:], row[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def measures(tokenizer: Tokenizer, concept: Concept, rows: Sequence[list[int]], nats: Tensor, fired: Tensor) -> Row:
    """What one latent's completions show."""
    return {
        **concept._asdict(),
        "words_share": count_hits([tokenizer.decode(row) for row in rows], concept.words) / len(rows),
        "fired_share": float((fired == concept.latent).any(-1).double().mean()) if len(fired) else 0.0,
        "nats": float(nats.double().mean()) if len(nats) else 0.0,
        "repeated": fmean(map(repeated_trigrams, rows)),
        "example": tokenizer.decode(rows[0]),
    }


def measure(
    opened: Opened, task: Task, setting: Setting | None, requests: Sequence[Sequence[int]] | None = None
) -> Row:
    """The figures of a setting, None for clean; requests: as of `measure_each`."""
    if setting is None:
        clean = {"mode": "clean", "strength": 0.0, "keep_error": True}
        return clean | measure_each(opened, task, [None] * len(task.concepts), requests)
    asked_for = [Steering({c.latent: setting.strength}, setting.mode, setting.keep_error) for c in task.concepts]
    bos_id = opened.tokenizer.bos_id
    steerings = [make_steering(opened.sae, steering, opened.highest, bos_id) for steering in asked_for]
    return setting._asdict() | measure_each(opened, task, steerings, requests)


def measure_each(
    opened: Opened,
    task: Task,
    steerings: Sequence[Intervention | None],
    requests: Sequence[Sequence[int]] | None = None,
) -> Row:
    """The figures with an intervention for each concept: means over the concepts, and each one's own, `each`.

    requests: token ids that the model reads before each concept's prompts, and that nobody sees afterwards.
    """
    starts = [task.prompts] * len(task.concepts)
    if requests is not None:  # they begin with begin-of-text, where the model has one, and only they
        bare = [[token for token in prompt if token != opened.tokenizer.bos_id] for prompt in task.prompts]
        starts = [[[*request, *prompt] for prompt in bare] for request in requests]
    parts = completions(opened, task.sampling, starts, steerings)
    each = [
        measures(opened.tokenizer, concept, rows, *read_again(opened, task.prompts, rows))
        for concept, rows in zip(task.concepts, parts, strict=True)
    ]
    shares = [one["words_share"] for one in each]
    return {
        **{name: fmean(one[name] for one in each) for name in ("words_share", "fired_share", "nats", "repeated")},
        "words_share_error": stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0,
        "each": each,
    }


# ---- which setting


def is_affordable(clean: Row, row: Row, max_nats: float = MAX_NATS, max_repeated: float = MAX_REPEATED) -> bool:
    return row["nats"] <= clean["nats"] + max_nats and row["repeated"] <= clean["repeated"] + max_repeated


def find_best(clean: Row, rows: Iterable[Row]) -> Row | None:
    """The affordable setting with most of the concept; among equals the first."""
    return max((row for row in rows if is_affordable(clean, row)), key=lambda row: row["words_share"], default=None)


def climb(measure_at: Callable[[float], Row], clean: Row) -> Iterator[Row]:
    """The dose-response: strengths doubled until the text is broken, then three between the last affordable one and the
    next. measure_at: a strength -> its figures."""
    strength, affordable = FIRST_STRENGTH, FIRST_STRENGTH / 2
    while strength <= _LAST_STRENGTH:
        yield (row := measure_at(strength))
        if is_affordable(clean, row):
            affordable = strength
        if not is_affordable(clean, row, _BROKEN_NATS, _BROKEN_REPEATED):
            break
        strength *= 2
    for share in (1.25, 1.5, 1.75):
        yield measure_at(share * affordable)


# ---- pictures


def plot(clean: Row, rows: Sequence[Row], best: Row | None, path: Path, name_of: Callable[[Row], str]) -> None:
    """The concept against each cost, a line per name, a point per strength."""
    figure = new_figure(11, 4.6)
    axes = figure.subplots(1, 2, sharey=True)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(name_of(row), []).append(row)
    costs = {"nats": "nats per token under the clean model", "repeated": "repeated trigrams, %"}
    limits = {"nats": MAX_NATS, "repeated": MAX_REPEATED}
    for axis, (cost, label) in zip(axes, costs.items(), strict=True):
        scale = 100 if cost == "repeated" else 1
        for i, (name, points) in enumerate(lines.items()):
            points = sorted(points, key=lambda point: point["strength"])
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
        axis.axvline(scale * (clean[cost] + limits[cost]), color="gray", linestyle=":", label="limit")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("completions with the latent's own words, %")
    axes[0].legend(fontsize=8)
    figure.suptitle("Steering: concept against fluency; numbers are strengths")
    save_figure(figure, path, dpi=130)
