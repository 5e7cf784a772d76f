"""How to steer with an SAE: the strength that fits it, and which of its latents steer well.

Reads   MODEL_PATH, an SAE with its JSON; NAME.latents.parquet (capture_top_activating_sentences.py),
        NAME.promoted.parquet (promoted_tokens.py), the names of its latents; the Llama folder
Writes  NAME.steering.parquet: latent, output_score, steers_well; NAME.steering.png, the dose-response; and in NAME.json
        the entry `steering`: mode, strength, ends of a slider, how they were measured. Page, terminal and demo use it
Method  Strength: N_CONCEPTS latents, chosen before any is steered: their names are plain words, one of them among the
        tokens that the latent promotes; the most promoted first, no two about the same words. Each steers completions
        of neutral prompts at growing strengths; the default is the strength at which most completions hold the
        latent's own words, at no more than 0.5 nats a token and 5 % repeated trigrams above clean
        (serving/dose_response.py). Latents: the output score of every living one at that strength, arXiv:2505.20063
        (serving/output_scores.py)
Cost    for SmolLM2 on two cores: about a minute per 1,000 completions of 24 tokens, and two for the scores

    python sae_steering.py --model_path data/sae.pth
"""

from typing import Literal

from pipeline.options import Count, NotNegative, Seed, Share, parse_constants
from pipeline.run import run

MODEL_PATH = "data/sae.pth"  # the SAE
LLAMA_MODEL_DIR: str | None = None  # Llama checkpoint folder; the one the SAE was trained on when not given
MODE: Literal["add", "clamp", "h_bias"] = "add"  # steering mode measured, and from then on the SAE's default
N_CONCEPTS: Count = 16  # latents whose dose-response is measured
N_PROMPTS: Count = 8  # prompts completed for each at each strength, 16 at most
MAX_NEW_TOKENS: Count = 24  # tokens per completion
TEMPERATURE: NotNegative = 0.8  # sampling temperature
TOP_P: Share = 0.95  # nucleus sampling
SEED: Seed = 0  # of the completions
LATENTS_AT_ONCE: Count = 128  # latents scored together, each taking about 10 bytes x vocabulary x prompt of memory

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from latents.tables import STEERING
from llama_3 import load_model, load_tokenizer
from llama_3.generation import encode_text
from pipeline.errors import Stop
from pipeline.files import read_json, require_writable, write_json
from pipeline.manifests import git_commit
from pipeline.progress import progress_bar
from pipeline.sae_files import SaeFiles
from pipeline.source import Source
from sae import load_sae_model
from serving.dose_response import (
    Opened,
    Row,
    Setting,
    Task,
    choose_concepts,
    climb,
    find_best,
    measure,
    neutral_prompts,
    plot,
)
from serving.modes import Mode
from serving.output_scores import STEERS_WELL, output_scores
from serving.steered_model import Sampling
from serving.steering import highest_activations


def dose_response(opened: Opened, task: Task, mode: Mode) -> tuple[Row, list[Row]]:
    """The figures without steering, and of each strength, by strength."""
    clean = measure(opened, task, None)
    at = lambda strength: measure(opened, task, Setting(mode, strength))
    rows = list(progress_bar(climb(at, clean), unit="strength", desc="dose-response"))
    return clean, sorted(rows, key=lambda row: row["strength"])


def steering_entry(clean: Row, rows: list[Row], best: Row, task: Task) -> dict[str, Any]:
    """The entry `steering` of NAME.json."""
    figures = lambda row: {name: round(row[name], 4) for name in ("words_share", "nats", "repeated")}
    strongest = rows[-1]["strength"]
    how = {"mode": best["mode"], "strength": best["strength"], "slider": [-strongest, strongest]}
    numbers = {
        "latents": len(task.concepts),
        "prompts": len(task.prompts),
        "max_new_tokens": task.sampling.max_new_tokens,
    }
    measured = {**numbers, "clean": figures(clean), "steered": figures(best), "git_commit": git_commit()}
    return {**how, "measured": measured}


def score_latents(opened: Opened, setting: Setting, prompts: Sequence[list[int]], at_once: int) -> Tensor:
    """(n_latents,) output scores, nan for latents that never fired."""
    scores = torch.full((opened.sae.n_latents,), torch.nan)
    living = int((opened.highest > 0).sum())
    with progress_bar(total=living, unit="latent", desc="output scores") as bar:
        for latents, found in output_scores(opened, setting, prompts, at_once):
            scores[latents.cpu()] = found
            bar.update(len(latents))
    return scores


def print_rows(clean: Row, rows: list[Row], best: Row) -> None:
    print("strength  texts with the words  nats per token  repeated trigrams")
    for row in [clean, *rows]:
        figures = f"{row['strength']:8g}{row['words_share']:22.1%}{row['nats']:16.2f}{row['repeated']:19.1%}"
        print(figures + ("   <- the default" if row is best else ""))


def main() -> None:
    config = parse_constants(globals())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sae, files = load_sae_model(config.model_path, device), SaeFiles(config.model_path)
    table_path, figure_path = files.beside(STEERING.suffix), files.beside("steering.png")
    require_writable(table_path, figure_path, files.json)
    info = read_json(files.json, "train the SAE again.")
    source = Source.read(sae.info, files.json)
    source.need("site")
    highest = highest_activations(config.model_path, sae.n_latents)
    concepts = choose_concepts(config.model_path, config.n_concepts)
    model_dir = source.model_dir(config.llama_model_dir)
    model = load_model(model_dir, device, rope_scaling_factor=source.rope_scaling_factor, packed=True)
    opened = Opened(model, load_tokenizer(model_dir), sae, highest)
    print(f"Reading {config.model_path} and {model_dir}; writing {table_path}, {figure_path} and to {files.json}.")
    print("Latents: " + "; ".join(f"{concept.latent} {', '.join(concept.words)}" for concept in concepts))

    prompts = [encode_text(opened.tokenizer, prompt) for prompt in neutral_prompts(model_dir)]
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed)
    task = Task(concepts, prompts[: config.n_prompts], sampling)
    clean, rows = dose_response(opened, task, config.mode)
    best = find_best(clean, rows)
    if best is None:
        raise Stop("Every strength measured costs too much fluency; measure more with --n_prompts and --n_concepts.")
    print_rows(clean, rows, best)
    scores = score_latents(opened, Setting(best["mode"], best["strength"]), prompts, config.latents_at_once)
    steers_well = (scores >= STEERS_WELL).tolist()
    columns = {"latent": range(sae.n_latents), "output_score": scores.numpy(), "steers_well": steers_well}
    STEERING.write(table_path, {name: pa.array(column) for name, column in columns.items()})
    plot(clean, rows, best, figure_path, lambda row: row["mode"])
    write_json(files.json, info | {"steering": steering_entry(clean, rows, best, task)})
    print(f"{sum(steers_well):,} of {sae.n_latents:,} latents steer well: {table_path}")


if __name__ == "__main__":
    run(main)
