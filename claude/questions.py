"""What Claude is asked about a latent."""

import functools
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from claude.batches import add_up
from latents.tables import Aggregation, top_sentences
from llama_3 import load_tokenizer
from pipeline.errors import InputError
from pipeline.files import read_json
from pipeline.progress import progress_bar

# Defaults of the two scripts that ask.
TOP_SENTENCES_DICT_FILEPATH = "data/sae.top.parquet"
RESPONSE_IDS_FILEPATH = "{name}.{aggregation}.response_ids.jsonl"
RESPONSE_OUTPUT_DIR = "{name}.{aggregation}.responses"
AGGREGATION: Aggregation = "mean"
MODEL = "claude-haiku-5-5"
EFFORT = "low"
MAX_TOKENS = 4000
OUTPUT_TOKENS = 500  # 387 in the published run, by a tokenizer of fewer tokens
SENTENCES_PER_REQUEST = 50
MIN_SENTENCES = 5
MARK_SHARE = 0.5

_PROMPT = """\
A language model reads text token by token. Inside it one direction was found, called a latent, that switches on for \
some texts and stays silent for others. Below are the {n} sentences {how}, strongest first{marks}. The model reads \
from left to right: at each token it knows that token and what stands before it, nothing after it. Line breaks inside \
a sentence are written \\n.

<sentences>
{sentences}
</sentences>

Find out what the latent stands for. Write a few short lines, one for each step:

1. Key words: words, parts of words or signs that come back, above all at the tokens with the strongest activation.
2. Themes: subjects, situations, tones, text types or grammatical forms that the sentences share. Early sentences \
weigh more.
3. Outliers: sentences that do not fit. Would a wider or a narrower description cover them without becoming empty?
4. Certainty: for what share of the sentences does the description hold, and would it fail for most other sentences?

Then close with one JSON object and nothing after it:

{{"common_semantic": "what the sentences share, as specific as they allow, in at most 15 words", "certainty": 0.0}}

certainty is a number from 0 (a guess) to 1 (every sentence fits, others would not). If the sentences share nothing, \
common_semantic is null and certainty 0.
"""
_HOW = {
    "mean": "with the highest average activation",
    "max": "that hold a token with the highest activation",
    "last": "with the highest activation at their last token",
}
_MARKS = "; the tokens that activate it most are written <<like this>>"


def with_marks(tokens: list[bytes], activations: list[float], share: float) -> str:
    """The text of a sentence on one line, tokens of at least `share` of its highest activation <<marked>>."""
    characters: list[tuple[bytes, float]] = []  # tokens, those joined that share the bytes of a character
    for token, activation in zip(tokens, activations, strict=True):
        if characters and token and 0x80 <= token[0] < 0xC0:
            before, highest = characters.pop()
            token, activation = before + token, max(highest, activation)
        characters.append((token, activation))
    threshold = share * max(activations, default=0)
    parts = []
    for strong, run in groupby(characters, key=lambda c: 0 < threshold <= c[1]):
        text = b"".join(token for token, _ in run).decode("utf-8", "replace")
        if strong:
            core = text.strip() or text
            text = text.replace(core, f"<<{core}>>", 1)
        parts.append(text)
    return "".join(parts).replace("\r", "\\r").replace("\n", "\\n").strip()


def prompt(texts: list[str], aggregation: str, marked: bool) -> str:
    lines = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
    return _PROMPT.format(n=len(texts), how=_HOW[aggregation], marks=_MARKS if marked else "", sentences=lines)


def request(latent: int, content: str, model: str, max_tokens: int, effort: str) -> dict[str, Any]:
    """A question to Claude, as an entry of a batch."""
    params: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": content}],
    }
    if effort:
        params["output_config"] = {"effort": effort}
    return {"custom_id": str(latent), "params": params}


def parse_latents(text: str | None) -> list[range] | None:
    """Ranges of latents from a text such as 0-99,512; None for all."""
    if text is None:
        return None
    try:
        bounds = [[int(bound) for bound in part.split("-")] for part in text.split(",")]
        ranges = [range(part[0], part[-1] + 1) for part in bounds if len(part) <= 2]
    except ValueError:
        ranges = []
    if not ranges or len(ranges) < len(bounds) or not all(ranges):
        raise InputError(f"--latents {text} is not a list of latents; write it like 0-99,512.")
    return ranges


def model_dir_of(top_path: Path) -> str:
    """The Llama folder that NAME.json beside NAME.top.parquet names."""
    mend = "name the folder with the tokenizer with --model_dir."
    info = read_json(str(top_path).removesuffix(".top.parquet") + ".json", mend)
    if not isinstance(info, dict) or "model_dir" not in info:
        raise InputError(f"The JSON beside {top_path} names no model_dir; {mend}")
    return info["model_dir"]


def journal_and_answers(config) -> tuple[Path, Path]:
    """RESPONSE_IDS_FILEPATH and RESPONSE_OUTPUT_DIR, filled in."""
    name = config.top_sentences_dict_filepath.removesuffix(".top.parquet")
    fill = lambda text: Path(text.replace("{name}", name).replace("{aggregation}", config.aggregation))
    return fill(config.response_ids_filepath), fill(config.response_output_dir)


def questions(config, skip: set[str]) -> Iterator[dict[str, Any]]:
    """The requests of a run, without those whose custom_id is in `skip`."""

    top_path = Path(config.top_sentences_dict_filepath)
    token_bytes = functools.cache(load_tokenizer(config.model_dir or model_dir_of(top_path)).token_bytes)
    latents = top_sentences(top_path, config.aggregation, config.sentences_per_request, parse_latents(config.latents))
    n_latents = 0
    for latent, sentences in progress_bar(latents, desc="questions", unit="latent"):
        n_latents += 1
        if len(sentences) < config.min_sentences or str(latent) in skip:
            continue
        texts = [with_marks([token_bytes(i) for i in s.token_ids], s.activations, config.mark_share) for s in sentences]
        content = prompt(texts, config.aggregation, config.mark_share <= 1)
        yield request(latent, content, config.model, config.max_tokens, config.effort)
    if n_latents == 0:
        raise InputError(f"{top_path} has no sentences by {config.aggregation} for these latents; choose others.")


def output_tokens(response_dir: Path, assumed: float) -> float:
    """Output tokens of an answer: the mean of those in the folder, or what is assumed where there are none."""
    totals = add_up(response_dir.glob("*.jsonl"))
    if not totals.types["succeeded"]:
        return assumed
    return sum(n_output for _, n_output in totals.tokens.values()) / totals.types["succeeded"]
