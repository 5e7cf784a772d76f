"""Run every stage of the pipeline on the embedded tiny Llama, on a laptop CPU, and show what came out.

Writes  demo_run/: every stage's files; report.md, the figures; sae/sae.report.html, the latents and everything else
Cost    minutes on two cores, no network

    make demo
"""

from embedded import recipe
from pipeline.options import Count, parse_constants
from pipeline.run import run
from serving.steering import DEFAULT_STRENGTH

RUN_DIR = "demo_run"  # folder for everything; emptied first
NUM_SAMPLES: Count = recipe.NUM_SAMPLES  # sentences to capture
NUM_EPOCHS: Count = recipe.NUM_EPOCHS  # of SAE training
REPORT_LATENTS: Count = 150  # latents in the report
STEERING_SAMPLES: Count = 128  # completions counted, clean and steered each
STRENGTH = DEFAULT_STRENGTH  # of steering, in multiples of the latent's highest activation

_N_TRIED = 16  # latents tried for steering
_PROMPTS = ("This is", "The", "It can be", "Note that", "When the", "A", "In this case", "The second")

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

from latents.index import LatentIndex
from latents.interesting import interesting_latents
from latents.promotion import promoted_logits
from latents.words import words_of
from llama_3 import load_model, load_tokenizer
from llama_3.generation import complete
from pipeline.errors import InputError
from pipeline.files import PROJECT_DIR, locked, read_json, write_json
from pipeline.manifests import read_manifest
from pipeline.progress import duration, progress_bar
from sae import load_sae_model
from sae_report import write_report
from serving.steering import DEFAULT_MODE, highest_activations, make_steering


def read_scores(run: Path) -> dict[str, dict[int, float]]:
    """balanced_accuracy, and shuffled (that of another latent's name), each latent -> score."""

    table = pq.read_table(run / "sae" / f"{recipe.MEANING}.scores.parquet").to_pydict()
    return {name: dict(zip(table["latent"], table[name], strict=True)) for name in ("balanced_accuracy", "shuffled")}


def steering_candidates(index) -> list[dict]:
    """The interesting latents that are named by single words, as latent, words and meaning."""

    named = [(latent, index.meaning[latent].split(", ")) for latent in interesting_latents(index)]
    return [
        {"latent": latent, "words": words, "meaning": index.meaning[latent]}
        for latent, words in named
        if all(word.isalpha() for word in words)
    ]


def marked(sentence) -> str:
    """A sentence of a card on one line, its strongest token between « and »."""
    strongest = max(range(len(sentence.tokens)), key=lambda i: sentence.activations[i])
    before, token, after = (
        "".join(part)
        for part in (sentence.tokens[:strongest], sentence.tokens[strongest], sentence.tokens[strongest + 1 :])
    )
    space = " " if token.startswith(" ") else ""
    return " ".join(f"{before}{space}«{token.strip()}»{after}".split())


def count_hits(texts: list[str], words: list[str]) -> int:
    """Texts that hold one of the words."""

    return sum(bool(words_of(text) & set(words)) for text in texts)


def promotes_own_words(model, tokenizer, sae, highest, entry: dict) -> float:
    """How much a latent at its highest, read and written by its layer's attention and unembedded, promotes its words:
    the best word's logit above the vocabulary's mean, up to a factor; words of several tokens do not count.

    Over the 24 latents of benchmarks/steering.py its rank correlation with what strength 8 gained was 0.71, that of the
    logit in standard deviations 0.50.
    """

    latent = entry["latent"]
    logits = promoted_logits(model, recipe.SITE, highest[latent] * sae.decoder.weight[:, latent][None], sae.b_pre)[0]
    tokens = [tokenizer.encode(f" {word}") for word in entry["words"]]
    return max((float(logits[ids[0]] - logits.mean()) for ids in tokens if len(ids) == 1), default=float("-inf"))


def steer(run: Path, candidates: list[dict], config) -> dict:
    """Try the candidates whose direction promotes their words on a few completions; then count the best one's words in
    fresh completions, clean and steered."""

    model, tokenizer = load_model(recipe.MODEL_DIR), load_tokenizer(recipe.MODEL_DIR)
    sae_path = str(run / "sae" / "sae.pth")
    sae, highest = load_sae_model(sae_path), highest_activations(sae_path)

    def completions(n: int, first_seed: int, entry: dict | None) -> list[str]:
        steering = None
        if entry:
            function = make_steering(sae, {entry["latent"]: config.strength}, highest)
            steering = (recipe.SITE, function, (tokenizer.bos_id,))
        prompts = [_PROMPTS[i % len(_PROMPTS)] for i in range(n)]
        seeds = [first_seed + i for i in range(n)]
        options = {"max_new_tokens": 30, "temperature": 0.8, "top_p": 0.95, "seeds": seeds}
        return complete(model, tokenizer, prompts, **options, steering=steering)

    promotes = lambda entry: promotes_own_words(model, tokenizer, sae, highest, entry)
    candidates = sorted(candidates, key=promotes, reverse=True)[:_N_TRIED]
    n_try = 16
    clean = completions(n_try, 0, None)
    gain = lambda entry: count_hits(completions(n_try, 0, entry), entry["words"]) - count_hits(clean, entry["words"])
    best = max(progress_bar(candidates, unit="latent", desc="steering"), key=gain)
    n = config.steering_samples
    clean, steered = completions(n, 1_000_000, None), completions(n, 1_000_000, best)
    hits = [count_hits(clean, best["words"]), count_hits(steered, best["words"])]
    return {**best, "clean": clean, "steered": steered, "hits": hits, "n": n}


def make_report(run: Path, times: list[tuple[str, float]], config) -> str:
    """Steer, write what came of it beside the SAE for sae_report.py, and return report.md."""

    capture = read_manifest(run / "activations" / recipe.SITE, "capture_activations.py")
    quality = read_json(run / "sae" / "sae.evaluation.json", "run sae_evaluation.py.")
    info = read_json(run / "sae" / "sae.json", "run sae_training.py.")
    index = LatentIndex(run / "sae" / "sae.pth")
    candidates = steering_candidates(index)
    started = time.time()
    steering = steer(run, candidates, config)
    times = [*times, ("Steering", time.time() - started)]
    examples = {kind: steering[kind][: len(_PROMPTS)] for kind in ("clean", "steered")}
    facts = {name: steering[name] for name in ("latent", "meaning", "words", "n", "hits")}
    steering_path = run / "sae" / "sae.steering.json"
    facts |= {"mode": DEFAULT_MODE, "strength": config.strength, "prompts": _PROMPTS}
    write_json(steering_path, {**facts, **examples})
    scores, others = (list(scores.values()) for scores in read_scores(run).values())
    share = sum(score > 0.7 for score in scores) / len(scores)
    (clean_hits, steered_hits), n = steering["hits"], steering["n"]
    words = " or ".join(f"“{word}”" for word in steering["words"])
    lines = [
        "# What the demo found",
        "",
        f"| measured on {recipe.SITE} of the tiny Llama | |",
        "|---|---|",
        f"| tokens captured | {capture['counts']['tokens']:,} of {capture['counts']['sentences']:,} sentences |",
        f"| activations trained on | {info['tokens_trained']:,} |",
        f"| FVU, held-out sentences | {quality['fvu']:.4f} |",
        f"| L0 | {quality['l0']:.1f} of {info['n_latents']} latents |",
        f"| dead latents | {info['quality']['dead_frac']:.1%} |",
        f"| language-model loss, clean | {quality['loss_clean']:.4f} nats a token |",
        f"| ... with the SAE spliced in | {quality['loss_spliced']:.4f} |",
        f"| ... with the site set to zero | {quality['loss_zeroed']:.4f} |",
        f"| loss recovered | {quality['loss_recovered']:.1%} |",
        f"| a name tells firing from silent sentences, balanced accuracy | {sum(scores) / len(scores):.2f} "
        f"(another latent's name: {sum(others) / len(others):.2f}) |",
        f"| ... names above 0.7 | {share:.0%} of {len(scores):,} |",
        f"| {n} completions with {words}, clean and steered by latent {steering['latent']} | "
        f"{clean_hits} and {steered_hits} |",
        "",
        f"(Steering: same prompts and seeds, strength {config.strength:g} times the latent's highest activation. The "
        f"latent was chosen among {_N_TRIED} by other completions than those counted.)",
        "",
        "| stage | time |",
        "|---|---|",
        *(f"| {title} | {seconds:.0f} s |" for title, seconds in times),
        f"| all | {duration(sum(seconds for _, seconds in times))} |",
        "",
        "Ten latents, with the sentence that activates each most:",
        "",
    ]
    for entry in candidates[:10]:
        card = index.card(entry["latent"], 1)
        lines.append(f"- {card.latent} **{card.meaning}**, score {card.score:.2f}: {marked(card.sentences[0])}")
    return "\n".join([*lines, ""])


def main() -> None:
    config = parse_constants(globals())

    os.chdir(PROJECT_DIR)
    run = Path(config.run_dir)
    with locked(run):
        for path in run.iterdir():
            if not path.name.endswith(".lock"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        times = []
        todo = recipe.stages(run, config.num_samples, config.num_epochs)
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
        for number, (title, command) in enumerate(todo, 1):
            shown = " ".join(part.replace(sys.executable, "python") for part in command)
            shown = shown.replace("python -m torch.distributed.run", "torchrun")
            print(f"\n[{number}/{len(todo)}] {title}\n$ {shown}", flush=True)
            started = time.time()
            env = environment if "torch.distributed.run" in command else None
            code = subprocess.run(command, env=env).returncode
            if code:
                raise InputError(f"The stage {title!r} failed with exit code {code}; its message is above.")
            times.append((title, time.time() - started))
            print(f"[{number}/{len(todo)}] done in {times[-1][1]:.0f} s", flush=True)
        report = make_report(run, times, config)
        (run / "report.md").write_text(report)
        written = write_report(run / "sae" / "sae.pth", config.report_latents)
    print("\n" + report)
    print(f"Everything is in {run.resolve()}; open this in a browser: {written[0].resolve()}")


if __name__ == "__main__":
    run(main)
