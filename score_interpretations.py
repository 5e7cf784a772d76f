"""Score meanings: can one tell, by the meaning alone, sentences in which the latent fires from others?

Reads   MEANING_FILEPATH (latent -> {certainty, common_semantic}); NAME.examples.parquet, NAME.top.parquet and NAME.json
        beside MODEL_PATH; the tokenizer of the SAE's Llama folder
Writes  beside MEANING.yaml: MEANING.scores.parquet (latent, balanced_accuracy, shuffled, sentences), a histogram in
        MEANING.scores.png, and in MEANING.scores.rejected.jsonl answers that could not be read. What was sent to Claude
        and what it answered is in MEANING.score_responses-*: keep it, it was paid for
Method  detection (Paulo et al. 2024, arXiv:2410.13928): up to SENTENCES sentences in which the latent fires, drawn from
        all tenths of its range, and as many in which it is silent, shuffled, none of them one the meaning was found by.
        The scorer says in which it fires. Balanced accuracy is the mean of the share of firing sentences found and of
        silent ones passed: a guess has 0.5. The scorer is Claude, in batches (claude) or one request at a time
        (direct), or no model at all (words): the latent fires where a feature stands that is in the name which
        interpret_top_sentences_distinctive_words.py gave. `shuffled` is then the score of another latent's name
Cost    words: half a minute for 4,096 latents. Claude: prints its price first and asks; waits for the answers; after a
        kill, or when some requests failed, run it again: what has an answer is not asked again

    python score_interpretations.py --meaning_filepath data/sae.meaning_distinctive-words_max.yaml --scorer words
"""

import functools
import hashlib
import json
import random
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from claude import batches, direct
from claude.answers import Rejection, from_result, write_rejections
from claude.batches import read_results, require_consent_possible
from claude.questions import output_tokens, request
from latents.words import features
from llama_3 import load_tokenizer
from pipeline.errors import InputError
from pipeline.files import atomic_path, locked, read_json, sha256
from pipeline.options import Count, CountOrZero, NotNegative, parse_constants
from pipeline.progress import progress_bar
from pipeline.run import run

MEANING_FILEPATH = "latent_index_meaning/latent_idx_meaning_mean-aggregated.yaml"  # meanings to score
MODEL_PATH = "data/sae.pth"  # the SAE
LLAMA_MODEL_DIR: str | None = None  # Llama folder, for its tokenizer; the one the SAE was trained on when not given
SCORER: Literal["claude", "direct", "words"] = "claude"  # Claude in batches, Claude one request at a time, or no model
SENTENCES: Count = 20  # firing ones, and as many silent ones, at most
MIN_SENTENCES: CountOrZero = 5  # a latent with fewer firing or silent ones gets no score
SHOWN_SENTENCES: CountOrZero = 50  # top sentences the meaning was found by, of any aggregation: they are left out
MODEL = "claude-haiku-5-5"  # who is asked
EFFORT = "low"  # how much it thinks before it writes; empty for models and servers that do not know this option
MAX_TOKENS: Count = 2000  # of an answer, thinking included
OUTPUT_TOKENS: Count = 200  # of an answer on average, for the price
REQUESTS_PER_BATCH: Count = 10_000  # the API allows 100,000, and 256 MB
SETTLE_S: NotNegative = 120.0  # seconds after an unclear failure until an unlisted batch counts as not created
POLL_S: NotNegative = 60.0  # seconds between two looks at the batches
YES = False  # send without asking
DRY_RUN = False  # stop after the price
SEED = 0  # of the sentences' order and the shuffled names

_PROMPT = """\
Inside a language model one direction was found, called a latent, that fires on some texts and is silent on others. \
Somebody describes what it fires on as:

{meaning}

Below are {n} sentences. By this description, in which of them does the latent fire, at one place or more? It may be \
any number of them, none or all. Line breaks inside a sentence are written \\n.

<sentences>
{sentences}
</sentences>

Answer with the numbers of those sentences as a JSON list, such as [2, 3], and nothing after it.
"""


class Example(NamedTuple):
    """A sentence as the model read it."""

    tokens: list[bytes]
    tenth: int  # of the latent's range; -1 where it is silent


class Verdict(NamedTuple):
    """In which of a latent's sentences it fires, as the scorer says: their numbers, from 1."""

    latent: int
    examples: list[Example]
    said: set[int]
    said_of_other: set[int] | None  # the same, by another latent's name


# ---- sentences


def grouped(path: Path, columns: list[str], keep: Any = None) -> Iterator[tuple[int, list[tuple]]]:
    """(latent, its rows) of a table sorted by latent, a row group in memory. keep: an expression on the columns."""

    def entries() -> Iterator[tuple]:
        with pq.ParquetFile(path) as file:
            for i in range(file.num_row_groups):
                table = file.read_row_group(i, columns=columns)
                table = table if keep is None else table.filter(keep)
                yield from zip(*(table[name].to_pylist() for name in columns), strict=True)

    return ((latent, list(group)) for latent, group in groupby(entries(), key=lambda entry: entry[0]))


def questions(name: str, meanings: dict[int, str], token_bytes, config) -> Iterator[tuple[int, list[Example]]]:
    """The latents of NAME that have a meaning and enough sentences, with these in the order in which they are shown."""

    is_shown = pc.field("rank") < config.shown_sentences
    shown = grouped(Path(f"{name}.top.parquet"), ["latent", "rank", "text"], is_shown)
    shown_latent, shown_rows = -1, []
    examples = grouped(Path(f"{name}.examples.parquet"), ["latent", "tenth", "text", "token_ids"])
    for latent, rows in progress_bar(examples, unit="latent", desc="sentences"):
        if latent not in meanings:
            continue
        while shown_latent < latent:
            shown_latent, shown_rows = next(shown, (2**63, []))
        seen = {text for of, _, text in shown_rows if of == latent}
        by_tenth: dict[int, list[Example]] = {}
        for _, tenth, text, token_ids in rows:
            if text not in seen:
                by_tenth.setdefault(tenth, []).append(Example([token_bytes(i) for i in token_ids], tenth))
        silent = by_tenth.pop(-1, [])
        # One of each tenth, strongest first, then a second one of each, and so on.
        places = sorted((place, -tenth) for tenth, some in by_tenth.items() for place in range(len(some)))
        firing = [by_tenth[-tenth][place] for place, tenth in places]
        n = min(len(firing), len(silent), config.sentences)
        if n >= max(1, config.min_sentences):
            chosen = firing[:n] + silent[:n]
            random.Random(f"{config.seed} {latent}").shuffle(chosen)
            yield latent, chosen


# ---- scorers


def by_words(questions: Iterator[tuple[int, list[Example]]], meanings: dict[int, str], seed: int) -> Iterator[Verdict]:
    """A latent fires where a feature of its name stands; the other name is that of the next in a shuffled circle."""

    circle = sorted(meanings)
    random.Random(seed).shuffle(circle)
    other = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
    for latent, examples in questions:
        held = [features(e.tokens, [True] * len(e.tokens)) for e in examples]
        said, said_of_other = (
            {number for number, found in enumerate(held, 1) if not found.isdisjoint(meanings[of].split(", "))}
            for of in (latent, other[latent])
        )
        yield Verdict(latent, examples, said, said_of_other)


def by_answers(
    questions: Iterator[tuple[int, list[Example]]], answers: dict[str, Any], rejected: dict[str, Any]
) -> Iterator[Verdict]:
    """What Claude said. answers: custom_id -> Answer. Fills `rejected` with those that cannot be read."""

    for latent, examples in questions:
        answer = answers.get(str(latent))
        if answer is None:
            continue
        said = numbers_in(answer.text, len(examples))
        if answer.type != "succeeded":
            rejected[answer.custom_id] = Rejection(answer.type, answer.detail), ""
        elif said is None:
            reason = f"the answer does not end in a list of numbers from 1 to {len(examples)}"
            rejected[answer.custom_id] = Rejection("no_list", reason), answer.text
        else:
            yield Verdict(latent, examples, said, None)


def prompt(meaning: str, examples: list[Example]) -> str:
    texts = [b"".join(e.tokens).decode("utf-8", "replace").strip() for e in examples]
    texts = [text.replace("\r", "\\r").replace("\n", "\\n") for text in texts]
    lines = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
    return _PROMPT.format(meaning=meaning, n=len(examples), sentences=lines)


def numbers_in(answer: str, n: int) -> set[int] | None:
    """The sentences that an answer names: its last JSON list, if that holds whole numbers from 1 to n alone."""
    for candidate in reversed(re.findall(r"\[[^\[\]]*\]", answer)):
        try:
            numbers = json.loads(candidate)
        except ValueError:
            continue
        right = all(type(number) is int and 1 <= number <= n for number in numbers)
        return set(numbers) if right else None
    return None


def ask_claude(requests: Iterator[dict], folder: Path, config) -> bool:
    """Send what has no answer yet, and wait for all answers, which come into `folder`. False when nothing was sent."""

    client = batches.connect(direct.RETRIES)
    journal_path = folder.with_name(folder.name + ".ids.jsonl")
    with (
        batches.open_journal(journal_path, "scores") as journal,
        locked(folder),
        batches.api_errors(),
    ):
        if config.scorer == "claude":
            batches.reconcile(client, journal, config.settle_s)
            batches.retrieve(client, journal_path, folder, wait=False, poll_s=config.poll_s)
        skip = batches.answered(folder) | batches.pending(journal, folder)
        left = (request for request in requests if request["custom_id"] not in skip)
        with batches.spooled(left, folder) as spooled:
            price_ratio = batches.BATCH_PRICE_RATIO if config.scorer == "claude" else 1.0
            if spooled.n:
                batches.announce(client, spooled, output_tokens(folder, config.output_tokens), price_ratio)
                if not batches.may_send(config.yes, config.dry_run):
                    return False
            if config.scorer == "claude":
                batches.send(client, journal, spooled, config.requests_per_batch, config.settle_s)
            else:
                each = map(json.loads, spooled.lines())
                answers = direct.ask_all(client, each, direct.CONCURRENCY, direct.REQUESTS_PER_MINUTE)
                answers = progress_bar(answers, total=spooled.n, desc="asking", unit="request")
                direct.append_answers(folder / "direct.jsonl", answers)
        if config.scorer == "claude":
            batches.retrieve(client, journal_path, folder, wait=True, poll_s=config.poll_s)
    return True


# ---- scores


def balanced_accuracy(examples: list[Example], said: set[int]) -> float:
    """The mean of two shares: of firing sentences said to fire, and of silent ones said to be silent."""
    right = [(e.tenth >= 0) == (number in said) for number, e in enumerate(examples, 1)]
    firing, silent = ([r for r, e in zip(right, examples, strict=True) if (e.tenth >= 0) == f] for f in (True, False))
    return (sum(firing) / len(firing) + sum(silent) / len(silent)) / 2


def describe(values: list[float]) -> str:
    import statistics

    share = sum(value > 0.7 for value in values) / len(values)
    return f"mean {statistics.mean(values):.3f}, median {statistics.median(values):.3f}, {share:.1%} above 0.7"


def draw_histogram(path: Path, scores: list[float], shuffled: list[float], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    bins = [i / 20 for i in range(21)]
    axes.hist(scores, bins, label=f"its meaning: {len(scores):,} latents")
    if shuffled:
        axes.hist(shuffled, bins, histtype="step", color="black", label="another latent's meaning")
    axes.axvline(0.5, color="grey", linewidth=1, linestyle=":")
    axes.set(xlabel="balanced accuracy of detection (a guess: 0.5)", ylabel="latents", xlim=(0, 1), title=title)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def read_meanings(path: Path) -> dict[int, str]:
    """latent -> common_semantic. Raises InputError for a file that is none of meanings."""

    mend = "name a file that a naming script wrote with --meaning_filepath."
    try:
        with open(path, encoding="utf-8") as file:
            entries = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        meanings = {int(latent): str(entry["common_semantic"]) for latent, entry in entries.items()}
    except FileNotFoundError:
        raise InputError(f"There is no {path}; {mend}") from None
    except (yaml.YAMLError, OSError, AttributeError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{path} holds no meanings ({' '.join(str(error).split())}); {mend}") from None
    if not meanings:
        raise InputError(f"{path} holds no meanings; {mend}")
    return meanings


def main() -> None:
    config = parse_constants(globals())

    if config.scorer != "words":
        require_consent_possible(config.yes, config.dry_run)
    meaning_path, name = Path(config.meaning_filepath), config.model_path.removesuffix(".pth")
    meanings = read_meanings(meaning_path)
    for table in ("top", "examples"):
        if not Path(f"{name}.{table}.parquet").is_file():
            raise InputError(f"There is no {name}.{table}.parquet; run capture_top_activating_sentences.py first.")
    info = read_json(f"{name}.json", "name an SAE that sae_training.py wrote.")
    token_bytes = functools.cache(load_tokenizer(config.llama_model_dir or info["model_dir"]).token_bytes)
    named = lambda suffix: meaning_path.with_suffix(f".{suffix}")
    print(f"Reading {meaning_path} and {name}.examples.parquet; writing {named('scores.parquet')}.")
    ask = lambda: questions(name, meanings, token_bytes, config)

    rejected: dict[str, Any] = {}
    if config.scorer == "words":
        verdicts = by_words(ask(), meanings, config.seed)
    else:
        # Other meanings, sentences or models are other questions: their answers go elsewhere.
        files = [sha256(path) for path in (meaning_path, f"{name}.examples.parquet")]
        asked = [*files, config.sentences, config.shown_sentences, config.seed, config.model]
        folder = named(f"score_responses-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}")
        requests = (
            request(latent, prompt(meanings[latent], examples), config.model, config.max_tokens, config.effort)
            for latent, examples in ask()
        )
        if not ask_claude(requests, folder, config):
            return
        lines = (line for path in sorted(folder.glob("*.jsonl")) for line in read_results(path))
        answers = {a.custom_id: a for a in sorted(map(from_result, lines), key=lambda a: a.type == "succeeded")}
        verdicts = by_answers(ask(), answers, rejected)

    table: dict[str, list] = {"latent": [], "balanced_accuracy": [], "shuffled": [], "sentences": []}
    by_tenth = [[0, 0] for _ in range(10)]  # of firing sentences in each tenth: all, found
    for verdict in verdicts:
        shuffled = None
        if verdict.said_of_other is not None:
            shuffled = balanced_accuracy(verdict.examples, verdict.said_of_other)
        row = verdict.latent, balanced_accuracy(verdict.examples, verdict.said), shuffled, len(verdict.examples)
        for column, value in zip(table.values(), row, strict=True):
            column.append(value)
        for number, example in enumerate(verdict.examples, 1):
            if example.tenth >= 0:
                by_tenth[example.tenth][0] += 1
                by_tenth[example.tenth][1] += number in verdict.said
    named("scores.rejected.jsonl").unlink(missing_ok=True)  # of an earlier run
    if rejected:
        write_rejections(named("scores.rejected.jsonl"), rejected)
        print(f"{len(rejected):,} answers could not be read or failed: {named('scores.rejected.jsonl')}")
    if not table["latent"]:
        raise InputError(
            f"No latent of {meaning_path} has an answer and {config.min_sentences} sentences that its meaning was not "
            "found by; lower --min_sentences or --shown_sentences."
        )
    scores, others = table["balanced_accuracy"], [value for value in table["shuffled"] if value is not None]
    types = {"latent": pa.int32(), "balanced_accuracy": pa.float32(), "shuffled": pa.float32(), "sentences": pa.int32()}
    with atomic_path(named("scores.parquet")) as temporary:
        pq.write_table(pa.table(table, schema=pa.schema(types)), temporary, compression="zstd")
    draw_histogram(named("scores.png"), scores, others, f"{meaning_path.stem}, scored by {config.scorer}")
    print(f"{len(scores):,} of {len(meanings):,} meanings scored: balanced accuracy {describe(scores)}")
    if others:
        print(f"another latent's meaning on the same sentences: {describe(others)}")
    shares = ", ".join(f"{found / n:.0%}" if n else "-" for n, found in by_tenth)
    print(f"firing sentences found, by tenth of the latent's range, weakest first: {shares}")
    print(f"{named('scores.parquet')}, {named('scores.png')}")


if __name__ == "__main__":
    run(main)
