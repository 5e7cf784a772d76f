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

from pipeline.options import Count, NotNegative, Seed, Share, parse_constants
from pipeline.run import run
from serving.modes import DEFAULT_MODE, Mode

MODEL_PATH = "data/sae.pth"  # the SAE
LLAMA_MODEL_DIR: str | None = None  # Llama checkpoint folder; the one the SAE was trained on when not given
MODE: Mode = DEFAULT_MODE  # steering mode measured, and from then on the SAE's default; not ablate
KEEP_ERROR = True  # steering keeps what the SAE does not reconstruct
N_CONCEPTS: Count = 16  # latents whose dose-response is measured
N_PROMPTS: Count = 8  # prompts completed for each at each strength, 16 at most
MAX_NEW_TOKENS: Count = 24  # tokens per completion
TEMPERATURE: NotNegative = 0.8  # sampling temperature
TOP_P: Share = 0.95  # nucleus sampling
SEED: Seed = 0  # of the completions
LATENTS_AT_ONCE: Count = 128  # latents scored together, each taking about 10 bytes x vocabulary x prompt of memory

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

from typing import Any

from pipeline.manifests import git_commit
from pipeline.progress import progress_bar
from serving.dose_response import (
    Concept,
    Opened,
    Row,
    Setting,
    Task,
    climb,
    measure,
)


def dose_response(opened: Opened, task: Task, concepts: list[Concept], mode: Mode, keep_error: bool) -> list[Row]:
    """The figures of each strength, by strength; the first is clean."""
    clean = measure(opened, task, concepts, None)
    at = lambda strength: measure(opened, task, concepts, Setting(mode, strength, keep_error))
    rows = []
    with progress_bar(total=None, unit="strength", desc="dose-response") as bar:
        for row in climb(at, clean):
            rows.append(row)
            bar.update()
    return [clean, *sorted(rows, key=lambda row: row["strength"])]


def steering_entry(clean: Row, rows: list[Row], best: Row, task: Task) -> dict[str, Any]:
    """The entry `steering` of NAME.json."""
    figures = lambda row: {name: round(row[name], 4) for name in ("words_share", "nats", "repeated")}
    strongest = max(row["strength"] for row in rows)
    measured = {
        "latents": len(best["each"]),
        "prompts": len(task.prompts),
        "max_new_tokens": task.sampling.max_new_tokens,
        "clean": figures(clean),
        "steered": figures(best),
        "git_commit": git_commit(),
    }
    return {
        "mode": best["mode"],
        "keep_error": best["keep_error"],
        "strength": best["strength"],
        "slider": [-strongest, strongest],
        "measured": measured,
    }


def table(rows: list[Row]) -> str:
    lines = ["strength  texts with the words  nats per token  repeated trigrams"]
    for row in rows:
        lines.append(f"{row['strength']:8g}{row['words_share']:22.1%}{row['nats']:16.2f}{row['repeated']:19.1%}")
    return "\n".join(lines)
