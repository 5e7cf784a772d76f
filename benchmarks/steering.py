"""Steering: how often the concept appears in steered completions, and what that costs in fluency.

Reads   SAE_MODEL_PATH with its JSON, the tables that sae_steering.py reads and writes, and the sentences beside it or
        in installed packages; its model
Writes  OUTPUT_DIR: steering.json (every latent's figures too), steering.png; prints a markdown table
Method  serving/dose_response.py measures. The latents are chosen before any completion: of those whose names are plain
        words, one of them among the tokens that the latent promotes, the ones with the highest output scores, no two
        about the same words. Same prompts and seeds for all. The best setting shows the words most often at no more
        than 0.5 nats a token and 5 % repeated trigrams above clean. Two baselines on the same concepts and prompts:
        the difference between the mean activations on the latent's top sentences with its words and on the other
        latents' top sentences without them, added in the SAE's normalised space (strength 1 is the whole difference);
        and asking: a system message in the model's chat format, or a line before the prompt where it cannot chat.
        Asked and steered down: the same request, with the latent at minus the default strength
Cost    10 minutes on two cores for the embedded model, an hour for SmolLM2

    python benchmarks/steering.py
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import common  # noqa: F401 (puts the project on sys.path)

from pipeline.files import PROJECT_DIR
from pipeline.options import Count, NotNegative, Share, parse_constants
from pipeline.run import run

SAE_MODEL_PATH = str(PROJECT_DIR / "llama_3" / "tiny_llama" / "sae.pth")  # the SAE
OUTPUT_DIR = "data/benchmark_steering"  # folder for the results
N_LATENTS: Count = 24  # latents steered, one at a time
N_PROMPTS: Count = 16  # prompts completed for each, 16 at most
MAX_NEW_TOKENS: Count = 30  # tokens per completion
TEMPERATURE: NotNegative = 0.8  # sampling temperature
TOP_P: Share = 0.95  # nucleus sampling
DOSES = [0.5, 0.75, 1.0, 1.25, 1.5, 2.0]  # strengths of add, clamp and h_bias, times the SAE's default strength
FACTORS = [4.0, 16.0, 64.0]  # of scale
DIFFERENCES = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0]  # of the difference of means

_N_SENTENCES = 20  # top sentences per latent, for the difference of means
_GOAL = 0.4  # share of completions with the words, above clean, that counts as steered

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import torch
from torch import Tensor

from latents.index import LatentIndex
from latents.words import words_of
from llama_3 import load_model, load_tokenizer
from llama_3.chat import Message, check_chat, encode_dialogue
from llama_3.checkpoint import TINY_LLAMA_DIR
from llama_3.generation import encode_text
from llama_3.model import Intervention
from pipeline.errors import InputError
from pipeline.files import write_json
from pipeline.manifests import git_commit
from pipeline.progress import progress_bar
from pipeline.sae_files import SaeFiles
from pipeline.source import Source
from sae import load_sae_model
from serving.dose_response import (
    Concept,
    Opened,
    Row,
    Setting,
    Task,
    choose_concepts,
    find_best,
    is_affordable,
    measure,
    measure_each,
    neutral_prompts,
    plot,
)
from serving.modes import Mode, steering_defaults
from serving.output_scores import read_output_scores
from serving.steered_model import Sampling
from serving.steering import highest_activations


def name_of(row: Row) -> str:
    return row["mode"] + ("" if row["keep_error"] else ", error dropped")


def settings(default: float, doses: Sequence[float], factors: Sequence[float]) -> list[Setting]:
    ways: list[tuple[Mode, bool]] = [
        ("add", True),
        ("clamp", True),
        ("h_bias", True),
        ("clamp", False),
        ("h_bias", False),
    ]
    return [
        *(Setting(mode, default * dose, keep) for mode, keep in ways for dose in doses),
        *(Setting("scale", factor) for factor in factors),
        Setting("ablate", 0.0),
    ]


# ---- baselines


def difference_of_means(opened: Opened, index: LatentIndex, concepts: Sequence[Concept]) -> list[Tensor]:
    """For each concept (d_model,), normalised space: the mean activation on its top sentences that hold its words,
    minus that on the other concepts' top sentences that do not."""
    texts = [
        ["".join(sentence.tokens) for sentence in index.card(concept.latent, _N_SENTENCES).sentences]
        for concept in concepts
    ]
    means: dict[str, Tensor] = {}
    for text in {text for own in texts for text in own}:
        ids = torch.tensor([opened.tokenizer.encode(text)], device=opened.model.device)
        with torch.inference_mode():
            means[text] = opened.sae.normalize(opened.model.activations(ids, opened.sae.info["site"])[0])[0].mean(0)
    found = []
    for concept, own in zip(concepts, texts, strict=True):
        holds = lambda text, concept=concept: bool(words_of(text) & set(concept.words))
        with_it = [means[text] for text in own if holds(text)]
        without = [means[text] for other in texts if other is not own for text in other if not holds(text)]
        if not with_it or not without:
            raise InputError(f"The top sentences of latent {concept.latent} do not hold its words; name it again.")
        found.append(torch.stack(with_it).mean(0) - torch.stack(without).mean(0))
    return found


def along(opened: Opened, direction: Tensor, strength: float) -> Intervention:
    """Adds strength x direction, of normalised space, to every activation at the SAE's site."""

    def steer(x: Tensor) -> Tensor:
        _, _, std = opened.sae.normalize(x)
        return (x + strength * direction * std).to(x.dtype)

    bos_id = opened.tokenizer.bos_id
    return Intervention(opened.sae.info["site"], steer, () if bos_id is None else (bos_id,))


def requests(opened: Opened, concepts: Sequence[Concept], can_chat: bool) -> list[list[int]]:
    """Token ids that ask for each concept; what follows them begins the answer."""
    found = []
    for concept in concepts:
        wish = f"Write about {concept.words[0]}."
        if can_chat:
            messages = [Message("system", wish), Message("user", f"{wish} Begin at once.")]
            found.append(encode_dialogue(opened.tokenizer, messages, None))
        else:
            found.append(encode_text(opened.tokenizer, f"{wish}\n\n"))
    return found


def can_chat(opened: Opened, model_dir: str) -> bool:
    if Path(model_dir).resolve() == Path(TINY_LLAMA_DIR).resolve():  # has the tokens, but was not trained to
        return False
    try:
        check_chat(opened.tokenizer)
    except InputError:
        return False
    return True


# ---- results


def table(clean: Row, rows: list[Row], best: Row | None) -> str:
    lines = [
        "| mode | strength | texts with the words | tokens on which it fires | nats per token | repeated trigrams |",
        "|---|---|---|---|---|---|",
    ]
    for row in [clean, *rows]:
        strength = f"{row['strength']:g}" if row["strength"] else ""
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


def n_steered(clean: Row, row: Row) -> int:
    """Concepts whose words are in at least _GOAL more of the completions than of the clean ones."""
    pairs = zip(row["each"], clean["each"], strict=True)
    return sum(one["words_share"] - before["words_share"] >= _GOAL for one, before in pairs)


def with_own_strengths(clean: Row, rows: list[Row]) -> tuple[float, int]:
    """Of one way of steering, each latent at whichever of the strengths shows its words most at no more than the
    allowed cost for itself, or unsteered: mean share of completions with the words, and how many latents reach _GOAL.

    The strengths are chosen on the completions that are counted, which flatters a little.
    """
    shares = []
    for i, before in enumerate(clean["each"]):
        affordable = [row["each"][i] for row in rows if is_affordable(before, row["each"][i])]
        shares.append(max(one["words_share"] for one in [before, *affordable]))
    gains = [share - before["words_share"] for share, before in zip(shares, clean["each"], strict=True)]
    return fmean(shares), sum(gain >= _GOAL for gain in gains)


def open_everything(sae_path: str) -> tuple[Opened, str]:
    """What is steered, and the model's folder."""
    highest = highest_activations(sae_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sae = load_sae_model(sae_path, device)
    model_dir = Source.read(sae.info, SaeFiles(sae_path).json).model_dir()
    model = load_model(model_dir, device, rope_scaling_factor=sae.info.get("rope_scaling_factor"), packed=True)
    return Opened(model, load_tokenizer(model_dir), sae, highest), model_dir


def main() -> None:
    config = parse_constants(globals())
    sae_path = config.sae_model_path
    concepts = choose_concepts(sae_path, config.n_latents, read_output_scores(sae_path))
    opened, model_dir = open_everything(sae_path)
    index = LatentIndex(sae_path, opened.tokenizer, opened.model, opened.sae)
    print("Latents: " + "; ".join(f"{concept.latent} {', '.join(concept.words)}" for concept in concepts))
    prompts = [encode_text(opened.tokenizer, prompt) for prompt in neutral_prompts(model_dir)[: config.n_prompts]]
    task = Task(concepts, prompts, Sampling(config.max_new_tokens, config.temperature, config.top_p, seed=0))
    default = steering_defaults(opened.sae.info, SaeFiles(sae_path).json).strength

    clean = measure(opened, task, None)
    chosen = progress_bar(settings(default, config.doses, config.factors), unit="setting", desc="steering")
    rows = [measure(opened, task, setting) for setting in chosen]
    directions = difference_of_means(opened, index, concepts)
    for strength in progress_bar(config.differences, unit="setting", desc="difference of means"):
        steerings = [along(opened, direction, strength) for direction in directions]
        way = {"mode": "difference of means", "strength": strength, "keep_error": True}
        rows.append(way | measure_each(opened, task, steerings))
    best = find_best(clean, rows)
    asked = requests(opened, concepts, can_chat(opened, model_dir))
    rows.append(measure(opened, task, None, asked) | {"mode": "asked"})
    rows.append(measure(opened, task, Setting("add", -default), asked) | {"mode": "asked, steered down"})

    folder = Path(config.output_dir)
    result = {"config": vars(config), "git_commit": git_commit(), "clean": clean, "settings": rows, "best": best}
    write_json(folder / "steering.json", result)
    plot(clean, rows, best, folder / "steering.png", name_of)
    print(table(clean, rows, best))
    print(f"{len(concepts)} latents, {len(prompts)} completions each. Figures: {folder / 'steering.png'}")
    for row in rows:
        if is_affordable(clean, row) and row["mode"] not in ("asked, steered down", "scale", "ablate"):
            reached = f"{n_steered(clean, row)} of {len(concepts)}"
            print(f"{name_of(row)} {row['strength']:g}: {reached} latents have their words in {_GOAL:.0%} more of them")
    for name in dict.fromkeys(name_of(row) for row in rows if row["strength"]):
        share, n = with_own_strengths(clean, [row for row in rows if name_of(row) == name])
        reached = f"{n} of {len(concepts)} latents reach {_GOAL:.0%} more"
        print(f"{name}, each latent at its own strength: words in {share:.0%} of completions; {reached}")


if __name__ == "__main__":
    run(main)
