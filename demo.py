"""Run every stage of the pipeline on the embedded tiny Llama, on a laptop CPU, and show the results.

Writes  demo_run/: every stage's files; report.md with the figures; sae/sae.report.html with the latents and the rest
Cost    minutes on two cores, no network

    make demo
"""

from embedded import recipe
from pipeline.options import Count, parse_constants
from pipeline.run import run

RUN_DIR = "demo_run"  # folder for everything; emptied first
NUM_SAMPLES: Count = recipe.NUM_SAMPLES  # sentences to capture
NUM_EPOCHS: Count = recipe.NUM_EPOCHS  # of SAE training
REPORT_LATENTS: Count = 150  # latents with a card in the HTML report
STEERING_SAMPLES: Count = 128  # completions to count, clean and steered each

_N_TRIED = 16  # latents tried for steering
_N_PROMPTS = 8  # prompts to complete

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from latents.cards import CardSentence
from latents.index import LatentIndex
from latents.interesting import interesting_latents
from llama_3 import load_model, load_tokenizer
from llama_3.generation import complete
from pipeline.files import PROJECT_DIR, locked, read_json, write_json
from pipeline.manifests import read_manifest
from pipeline.progress import duration, progress_bar
from pipeline.sae_files import SaeFiles
from sae import load_sae_model
from serving.dose_response import neutral_prompts
from serving.modes import Defaults, steering_defaults
from serving.own_words import count_hits
from serving.steering import Steering, highest_activations, make_steering

Times = list[tuple[str, float]]  # title of a stage, seconds


# ---- the stages


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
        recipe.run_command(command)
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
    how: Defaults
    prompts: list[str]
    clean: list[str]  # completions
    steered: list[str]

    def hits(self) -> list[int]:
        """Completions with the candidate's words, clean and steered."""
        return [count_hits(texts, self.best.words) for texts in (self.clean, self.steered)]


def steering_candidates(index: LatentIndex) -> list[Candidate]:
    """The interesting latents whose name is single words."""
    named = [(latent, index.meaning[latent]) for latent in interesting_latents(index)]
    candidates = [Candidate(latent, meaning.split(", "), meaning) for latent, meaning in named]
    return [candidate for candidate in candidates if all(word.isalpha() for word in candidate.words)]


def steer(run_dir: Path, index: LatentIndex, n_samples: int) -> Steered:
    """Try the candidates with the highest output scores, on a few completions; then make new completions, clean and
    steered by the best one."""
    model, tokenizer = load_model(recipe.MODEL_DIR), load_tokenizer(recipe.MODEL_DIR)
    sae_path = str(run_dir / "sae" / "sae.pth")
    sae, highest = load_sae_model(sae_path), highest_activations(sae_path)
    how = steering_defaults(sae.info, SaeFiles(sae_path).json)
    neutral = neutral_prompts(recipe.MODEL_DIR)[:_N_PROMPTS]

    def completions(n: int, first_seed: int, candidate: Candidate | None) -> list[str]:
        steering = None
        if candidate:
            asked_for = Steering({candidate.latent: how.strength}, how.mode)
            steering = make_steering(sae, asked_for, highest, tokenizer.bos_id)
        prompts = [neutral[i % len(neutral)] for i in range(n)]
        seeds = [first_seed + i for i in range(n)]
        options = {"max_new_tokens": 30, "temperature": 0.8, "top_p": 0.95, "seeds": seeds}
        return complete(model, tokenizer, prompts, **options, steering=steering)

    output_score = lambda it: -index.output_score[it.latent]
    candidates = sorted(steering_candidates(index), key=output_score)[:_N_TRIED]
    n_try = 16
    clean = completions(n_try, 0, None)
    gain = lambda it: count_hits(completions(n_try, 0, it), it.words) - count_hits(clean, it.words)
    best = max(progress_bar(candidates, unit="latent", desc="steering"), key=gain)
    both = [completions(n_samples, 1_000_000, candidate) for candidate in (None, best)]
    return Steered(best, how, list(neutral), *both)


def write_steered(path: Path, found: Steered) -> None:
    """Write what sae_report.py shows of the steering."""
    examples = {kind: texts[:_N_PROMPTS] for kind, texts in (("clean", found.clean), ("steered", found.steered))}
    counts = {"n": len(found.clean), "hits": found.hits()}
    how = {"mode": found.how.mode, "strength": found.how.strength, "prompts": found.prompts}
    write_json(path, {**found.best._asdict(), **counts, **how, **examples})


# ---- report.md


def report_text(run_dir: Path, index: LatentIndex, found: Steered, times: Times) -> str:
    lines = [
        "# What the demo found",
        "",
        *measures_table(run_dir, found),
        "",
        f"(Steering: same prompts and seeds, strength {found.how.strength:g} times the latent's highest activation. "
        f"The latent was chosen from {_N_TRIED} by completions other than those counted.)",
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
    return "\n".join([*lines, ""])


def measures_table(run_dir: Path, found: Steered) -> list[str]:
    capture = read_manifest(run_dir / "activations" / recipe.SITE, "capture_activations.py")
    quality = read_json(run_dir / "sae" / "sae.evaluation.json", "run sae_evaluation.py.")
    info = read_json(run_dir / "sae" / "sae.json", "run sae_training.py.")
    scores, shuffled = read_scores(run_dir)
    clean_hits, steered_hits = found.hits()
    words = " or ".join(f"“{word}”" for word in found.best.words)
    mean = lambda numbers: sum(numbers) / len(numbers)
    return [
        f"| measured on {recipe.SITE} of the tiny Llama | |",
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
    table: dict[str, Any] = pq.read_table(run_dir / "sae" / f"{recipe.MEANING}.scores.parquet").to_pydict()
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
        times = run_stages(recipe.stages(run_dir, config.num_samples, config.num_epochs))
        started = time.time()
        index = LatentIndex(sae_path)
        found = steer(run_dir, index, config.steering_samples)
        write_steered(run_dir / "sae" / "sae.steered.json", found)
        times.append(("Steering", time.time() - started))
        report = report_text(run_dir, index, found, times)
        (run_dir / "report.md").write_text(report, encoding="utf-8")
        recipe.run_command(recipe.command("sae_report.py", sae_model_path=sae_path, latents=config.report_latents))
    print("\n" + report)
    page = sae_path.with_suffix(".report.html").resolve()
    print(f"Everything is in {run_dir.resolve()}; open this in a browser: {page}")


if __name__ == "__main__":
    run(main)
