"""Ask Claude what each latent means: one question a latent, with the sentences that activate it most, in batches.

Reads   TOP_SENTENCES_DICT_FILEPATH: NAME.top.parquet of capture_top_activating_sentences.py; NAME.json beside it
Writes  RESPONSE_IDS_FILEPATH, the journal of what was sent: keep it, it is the way to answers that were paid for
Method  strongest sentence first, as far as the model read it, the tokens that activate the latent <<marked>>. Latents
        that have an answer in RESPONSE_OUTPUT_DIR, or are in a batch that was not retrieved yet, are left out: run it
        again to send what failed. message_batches.py says how nothing is paid twice
Cost    it prints requests, tokens and price before anything is sent, and asks; minutes for 65,536 latents

    export ANTHROPIC_API_KEY=...
    python interpret_top_sentences_send_batches.py --top_sentences_dict_filepath data/sae.top.parquet --latents 0-99
"""

import functools
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import message_batches
import stage

TOP_SENTENCES_DICT_FILEPATH = "data/sae.top.parquet"  # top sentences of each latent
RESPONSE_IDS_FILEPATH = "{name}.{aggregation}.response_ids.jsonl"  # journal; {name} is that of NAME.top.parquet
RESPONSE_OUTPUT_DIR = "{name}.{aggregation}.responses"  # answers; latents that have one are not asked again
MODEL_DIR: str | None = None  # Llama folder, for its tokenizer; the one NAME.json names when not given
AGGREGATION = "mean"  # how a latent's activation over a sentence was measured: mean, max or last
LATENTS: str | None = None  # which latents, such as 0-99,512; all when not given
MODEL = "claude-haiku-5-5"  # who is asked
EFFORT = "low"  # how much it thinks before it writes; empty for models and servers that do not know this option
MAX_TOKENS = 4000  # of an answer, thinking included
OUTPUT_TOKENS = 500  # of an answer on average, for the price: 387 in the published run, by a tokenizer of fewer tokens
SENTENCES_PER_REQUEST = 50  # strongest ones shown
MIN_SENTENCES = 5  # a latent with fewer is not asked about
MARK_SHARE = 0.5  # tokens with at least this share of the sentence's highest activation are marked; above 1: none
REQUESTS_PER_BATCH = 10_000  # the API allows 100,000, and 256 MB
SETTLE_S = 300.0  # after an unclear failure, seconds until a batch the API does not list counts as not created
YES = False  # send without asking
DRY_RUN = False  # stop after the price

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


class Sentence(NamedTuple):
    """A sentence as the model read it."""

    token_ids: list[int]
    activations: list[float]  # of the latent, one a token


def top_sentences(
    path: Path, aggregation: str, n: int, wanted: list[range] | None
) -> Iterator[tuple[int, list[Sentence]]]:
    """Each latent's n strongest sentences, a row group of NAME.top.parquet in memory. wanted: all latents when None."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    columns = ["latent", "token_ids", "token_activations"]
    rows = (pc.field("aggregation") == aggregation) & (pc.field("rank") < n)

    def entries() -> Iterator[tuple]:
        with pq.ParquetFile(path) as file:
            for i in range(file.num_row_groups):
                latents = file.read_row_group(i, columns=["latent"])["latent"].to_numpy()
                if wanted is None or any(((r.start <= latents) & (latents < r.stop)).any() for r in wanted):
                    table = file.read_row_group(i, columns=[*columns, "aggregation", "rank"]).filter(rows)
                    for batch in table.to_batches(max_chunksize=4096):
                        yield from zip(*(batch[name].to_pylist() for name in columns), strict=True)

    for latent, group in groupby(entries(), key=lambda entry: entry[0]):
        if wanted is None or any(latent in r for r in wanted):
            yield latent, [Sentence(token_ids, activations) for _, token_ids, activations in group]


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
        raise stage.InputError(f"--latents {text} is not a list of latents; write it like 0-99,512.")
    return ranges


def check_top_sentences(path: Path) -> None:
    """Raise InputError unless the file is what capture_top_activating_sentences.py writes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    mend = "run capture_top_activating_sentences.py to make it."
    if not path.is_file():
        raise stage.InputError(f"There is no {path}; {mend}")
    try:
        missing = {"latent", "aggregation", "rank", "token_ids", "token_activations"} - set(pq.read_schema(path).names)
    except (pa.ArrowInvalid, OSError) as error:
        raise stage.InputError(f"{path} is not a parquet file ({error}); {mend}") from None
    if missing:
        raise stage.InputError(f"{path} has no column {sorted(missing)[0]}; {mend}")


def model_dir_of(top_path: Path) -> str:
    """The Llama folder that NAME.json beside NAME.top.parquet names."""
    mend = "name the folder with the tokenizer with --model_dir."
    info = stage.read_json(str(top_path).removesuffix(".top.parquet") + ".json", mend)
    if not isinstance(info, dict) or "model_dir" not in info:
        raise stage.InputError(f"The JSON beside {top_path} names no model_dir; {mend}")
    return info["model_dir"]


def journal_and_answers(config) -> tuple[Path, Path]:
    """RESPONSE_IDS_FILEPATH and RESPONSE_OUTPUT_DIR, filled in."""
    name = config.top_sentences_dict_filepath.removesuffix(".top.parquet")
    fill = lambda text: Path(text.replace("{name}", name).replace("{aggregation}", config.aggregation))
    return fill(config.response_ids_filepath), fill(config.response_output_dir)


def questions(config, skip: set[str]) -> Iterator[dict[str, Any]]:
    """The requests of a run, without those whose custom_id is in `skip`."""
    from llama_3 import load_tokenizer

    top_path = Path(config.top_sentences_dict_filepath)
    token_bytes = functools.cache(load_tokenizer(config.model_dir or model_dir_of(top_path)).token_bytes)
    latents = top_sentences(top_path, config.aggregation, config.sentences_per_request, parse_latents(config.latents))
    n_latents = 0
    for latent, sentences in stage.progress(latents, desc="questions", unit="latent"):
        n_latents += 1
        if len(sentences) < config.min_sentences or str(latent) in skip:
            continue
        texts = [with_marks([token_bytes(i) for i in s.token_ids], s.activations, config.mark_share) for s in sentences]
        content = prompt(texts, config.aggregation, config.mark_share <= 1)
        yield request(latent, content, config.model, config.max_tokens, config.effort)
    if n_latents == 0:
        raise stage.InputError(f"{top_path} has no sentences by {config.aggregation} for these latents; choose others.")


def output_tokens(response_dir: Path, assumed: float) -> float:
    """Output tokens of an answer: the mean of those in the folder, or what is assumed where there are none."""
    totals = message_batches.add_up(response_dir.glob("*.jsonl"))
    if not totals.types["succeeded"]:
        return assumed
    return sum(n_output for _, n_output in totals.tokens.values()) / totals.types["succeeded"]


def main() -> None:
    config = stage.parse_constants(globals())
    check_top_sentences(Path(config.top_sentences_dict_filepath))
    message_batches.require_consent_possible(config.yes, config.dry_run)
    client = message_batches.connect()
    journal_path, response_dir = journal_and_answers(config)
    print(f"Reading {config.top_sentences_dict_filepath} and the answers in {response_dir}; writing {journal_path}.")

    purpose = f"meanings by {config.aggregation}"
    with message_batches.open_journal(journal_path, purpose) as journal, message_batches.api_errors():
        message_batches.reconcile(client, journal, config.settle_s)
        done, under_way = message_batches.answered(response_dir), message_batches.pending(journal, response_dir)
        print(f"{len(done):,} latents have an answer, {len(under_way):,} are in batches not retrieved yet.")
        with message_batches.spooled(questions(config, done | under_way), journal_path.parent) as requests:
            if requests.n == 0:
                print("Nothing is left to send.")
                return
            price_ratio = message_batches.BATCH_PRICE_RATIO
            message_batches.announce(client, requests, output_tokens(response_dir, config.output_tokens), price_ratio)
            if message_batches.may_send(config.yes, config.dry_run):
                message_batches.send(client, journal, requests, config.requests_per_batch, config.settle_s)
                print(
                    f"{requests.n:,} requests sent. Next: python interpret_top_sentences_retrieve_batches.py --wait "
                    f"--response_ids_filepath {journal_path} --response_output_dir {response_dir}"
                )


if __name__ == "__main__":
    stage.run(main)
