"""Score meanings: can one tell by the meaning alone in which sentences the latent fires?

Reads   MEANING_FILEPATH (latent -> {certainty, common_semantic}); NAME.examples.parquet, NAME.top.parquet and NAME.json
        beside MODEL_PATH; the tokenizer of the SAE's model
Writes  beside MEANING.yaml: MEANING.scores.parquet (latent, balanced_accuracy, shuffled, sentences), a histogram in
        MEANING.scores.png, answers that could not be read in MEANING.scores.rejected.jsonl, and what was sent to Claude
        and what it answered in MEANING.score_responses-*: keep these, you paid for them
Method  detection (Paulo et al. 2024, arXiv:2410.13928): up to SENTENCES sentences in which the latent fires, drawn from
        all tenths of its range, and as many in which it is silent, shuffled. The meaning was not found from any of
        them. The scorer picks those in which the latent fires. Balanced accuracy is the mean of two shares, of firing
        sentences picked and of silent ones not picked: guessing gives 0.5. The scorer is Claude, in batches (claude) or
        one request at a time (direct), or no model at all (words), which picks the sentences that contain a feature of
        the name from interpret_top_sentences_distinctive_words.py; `shuffled` is then the score of another latent's
        name
Cost    words: half a minute for 4,096 latents. Claude: prints its price and asks first; waits for the answers; after a
        kill or failed requests run it again: only sentences without an answer are sent

    python score_interpretations.py --meaning_filepath data/sae.meaning_distinctive-words_max.yaml --scorer words
"""

import functools
import hashlib
import json
import random
import re
import statistics
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from claude.answers import (
    Answer,
    Rejection,
    answered,
    from_result,
    mean_output_tokens,
    read_folder,
    write_rejections,
)
from claude.batches import reconcile, retrieve, send
from claude.connection import api_errors, connect
from claude.direct import append_answers, ask_all
from claude.journal import open_journal
from claude.prices import BATCH_PRICE, FULL_PRICE
from claude.requests import Respondent, announce, may_send, require_consent_possible, spooled
from latents.meanings import Meaning, Score, read_meanings, scores_path, write_scores
from latents.origin import read_info, source_of, tokenizer_of
from latents.tables import EXAMPLES, SILENT, TENTHS, TOP, example_sentences, top_texts
from latents.words import features
from pipeline.errors import InputError
from pipeline.figures import new_figure, save_figure
from pipeline.files import locked, require_writable, sha256
from pipeline.options import Count, CountOrZero, NotNegative, Seed, parse_constants
from pipeline.progress import progress_bar
from pipeline.run import run
from pipeline.sae_files import SaeFiles

MEANING_FILEPATH = "latent_index_meaning/latent_idx_meaning_mean-aggregated.yaml"  # meanings to score
MODEL_PATH = "data/sae.pth"  # the SAE
LLAMA_MODEL_DIR: str | None = None  # Llama folder, for its tokenizer; the one the SAE was trained on when not given
SCORER: Literal["claude", "direct", "words"] = "claude"  # Claude in batches, Claude one request at a time, or no model
SENTENCES: Count = 20  # up to this many firing sentences per latent, and as many silent ones
MIN_SENTENCES: CountOrZero = 5  # a latent with fewer firing or silent ones gets no score
SHOWN_SENTENCES: CountOrZero = 50  # top sentences per aggregation that the meaning was found from: left out here
MODEL = "claude-haiku-5-5"  # the model that is asked
EFFORT = "low"  # how much it thinks before it writes; empty for models and servers without this option
MAX_TOKENS: Count = 2000  # most tokens per answer, thinking included
OUTPUT_TOKENS: Count = 200  # tokens assumed per answer for the price
REQUESTS_PER_BATCH: Count = 10_000  # the API allows 100,000 and 256 MB
SETTLE_S: NotNegative = 120.0  # after an unclear failure, seconds until an unlisted batch counts as not created
POLL_S: NotNegative = 60.0  # seconds between polls of the batches
YES = False  # send without asking
DRY_RUN = False  # stop after printing the price
SEED: Seed = 0  # seed of the sentences' order and the shuffled names

_CONCURRENCY, _REQUESTS_PER_MINUTE, _RETRIES = 8, 1000.0, 6  # for the scorer `direct`

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


# ---- sentences


class Example(NamedTuple):
    """A sentence as the model read it."""

    tokens: list[bytes]
    tenth: int  # of the latent's range; SILENT where it does not fire

    @property
    def fires(self) -> bool:
        return self.tenth != SILENT


class Draw(NamedTuple):
    """How sentences are chosen; see the constants."""

    sentences: int
    min_sentences: int
    shown_sentences: int
    seed: int


def draw_examples(
    files: SaeFiles, wanted: Container[int], token_bytes: Callable[[int], bytes], draw: Draw
) -> Iterator[tuple[int, list[Example]]]:
    """The wanted latents that have enough sentences, each with its sentences in the order shown."""
    shown = top_texts(files.beside(TOP.suffix), draw.shown_sentences)
    shown_latent, shown_texts = -1, set()
    examples = example_sentences(files.beside(EXAMPLES.suffix))
    for latent, rows in progress_bar(examples, unit="latent", desc="sentences"):
        if latent not in wanted:
            continue
        while shown_latent < latent:
            shown_latent, shown_texts = next(shown, (2**63, set()))
        seen = shown_texts if shown_latent == latent else set()
        by_tenth: dict[int, list[Example]] = {}
        for row in rows:
            if row.text not in seen:
                tokens = [token_bytes(i) for i in row.token_ids]
                by_tenth.setdefault(row.tenth, []).append(Example(tokens, row.tenth))
        silent = by_tenth.pop(SILENT, [])
        # One of each tenth, strongest first, then a second one of each, and so on.
        turns = sorted((turn, -tenth) for tenth, sentences in by_tenth.items() for turn in range(len(sentences)))
        firing = [by_tenth[-tenth][turn] for turn, tenth in turns]
        n = min(len(firing), len(silent), draw.sentences)
        if n >= max(1, draw.min_sentences):
            chosen = firing[:n] + silent[:n]
            random.Random(f"{draw.seed} {latent}").shuffle(chosen)
            yield latent, chosen


# ---- scorers


class Verdict(NamedTuple):
    """The sentences that the scorer picked: their numbers, from 1."""

    latent: int
    examples: list[Example]
    picked: set[int]
    picked_by_other: set[int] | None  # by another latent's name


def by_words(
    questions: Iterator[tuple[int, list[Example]]], meanings: dict[int, Meaning], seed: int
) -> Iterator[Verdict]:
    """Pick sentences that contain a feature of the name. The other name is the next latent's in a shuffled circle."""
    circle = sorted(meanings)
    random.Random(seed).shuffle(circle)
    other = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
    for latent, examples in questions:
        held = [features(example.tokens, [True] * len(example.tokens)) for example in examples]
        picked, picked_by_other = (
            {number for number, found in enumerate(held, 1) if not found.isdisjoint(meanings[named].text.split(", "))}
            for named in (latent, other[latent])
        )
        yield Verdict(latent, examples, picked, picked_by_other)


def by_answers(
    questions: Iterator[tuple[int, list[Example]]],
    answers: dict[str, Answer],
    rejected: dict[str, tuple[Rejection, str]],
) -> Iterator[Verdict]:
    """What Claude picked. answers: by custom_id. Adds the answers that cannot be used to `rejected`."""
    for latent, examples in questions:
        answer = answers.get(str(latent))
        if answer is None:
            continue
        picked = numbers_in(answer.text, len(examples))
        if answer.type != "succeeded":
            rejected[answer.custom_id] = Rejection(answer.type, answer.detail), ""
        elif picked is None:
            reason = f"the answer does not end in a list of numbers from 1 to {len(examples)}"
            rejected[answer.custom_id] = Rejection("no_list", reason), answer.text
        else:
            yield Verdict(latent, examples, picked, None)


def detection_prompt(meaning: str, examples: list[Example]) -> str:
    texts = [b"".join(example.tokens).decode("utf-8", "replace").strip() for example in examples]
    texts = [text.replace("\r", "\\r").replace("\n", "\\n") for text in texts]
    lines = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
    return _PROMPT.format(meaning=meaning, n=len(examples), sentences=lines)


def numbers_in(answer: str, n: int) -> set[int] | None:
    """The sentences that an answer names: its last JSON list, if that has only whole numbers from 1 to n."""
    for candidate in reversed(re.findall(r"\[[^\[\]]*\]", answer)):
        try:
            numbers = json.loads(re.sub(r"(?<=\d),\s*\]$", "]", candidate))
        except ValueError:
            continue
        is_right = all(type(number) is int and 1 <= number <= n for number in numbers)
        return set(numbers) if is_right else None
    return None


class Sending(NamedTuple):
    """How Claude is asked; see the constants."""

    in_batches: bool
    output_tokens: float
    requests_per_batch: int
    settle_s: float
    poll_s: float
    yes: bool
    dry_run: bool


def ask_claude(requests: Iterator[dict[str, Any]], folder: Path, sending: Sending) -> bool:
    """Send what has no answer yet and wait for all answers, stored in `folder`. False if sending was declined."""
    client = connect(_RETRIES)
    journal_path = folder.with_name(folder.name + ".ids.jsonl")
    with open_journal(journal_path, "scores") as journal, locked(folder), api_errors():
        if sending.in_batches:
            reconcile(client, journal, sending.settle_s)
            retrieve(client, journal_path, folder, wait=False, poll_s=sending.poll_s)
        skip = answered(folder) | journal.pending(folder)
        with spooled((request for request in requests if request["custom_id"] not in skip), folder) as unanswered:
            if unanswered.n:
                output_tokens = mean_output_tokens(folder, sending.output_tokens)
                announce(client, unanswered, output_tokens, BATCH_PRICE if sending.in_batches else FULL_PRICE)
                if not may_send(sending.yes, sending.dry_run):
                    return False
            if sending.in_batches:
                send(client, journal, unanswered, sending.requests_per_batch, sending.settle_s)
            else:
                each = map(json.loads, unanswered.lines())
                answers = ask_all(client, each, _CONCURRENCY, _REQUESTS_PER_MINUTE)
                answers = progress_bar(answers, total=unanswered.n, desc="asking", unit="request")
                append_answers(folder / "direct.jsonl", answers)
        if sending.in_batches:
            retrieve(client, journal_path, folder, wait=True, poll_s=sending.poll_s)
    return True


def response_folder(meaning_path: Path, examples_path: Path, draw: Draw, model: str) -> Path:
    """The folder for the answers: a different one for other meanings, sentences or models."""
    decides = [sha256(meaning_path), sha256(examples_path), draw.sentences, draw.shown_sentences, draw.seed, model]
    checksum = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    return meaning_path.with_suffix(f".score_responses-{checksum[:8]}")


def read_answers(folder: Path) -> dict[str, Answer]:
    """Answers by custom_id; where there are several, one that succeeded."""
    answers = map(from_result, read_folder(folder))
    return {answer.custom_id: answer for answer in sorted(answers, key=lambda a: a.type == "succeeded")}


# ---- scores


class Result(NamedTuple):
    """All scores, and for each tenth how many firing sentences were shown and how many were picked."""

    scores: list[Score]
    shown: list[int]
    picked: list[int]


def score_verdicts(verdicts: Iterable[Verdict]) -> Result:
    result = Result([], [0] * TENTHS, [0] * TENTHS)
    for latent, examples, picked, picked_by_other in verdicts:
        shuffled = None if picked_by_other is None else balanced_accuracy(examples, picked_by_other)
        result.scores.append(Score(latent, balanced_accuracy(examples, picked), shuffled, len(examples)))
        for number, example in enumerate(examples, 1):
            if example.fires:
                result.shown[example.tenth] += 1
                result.picked[example.tenth] += number in picked
    return result


def balanced_accuracy(examples: list[Example], picked: set[int]) -> float:
    """The mean of two shares: of firing sentences that were picked, and of silent ones that were not."""
    firing = [number in picked for number, example in enumerate(examples, 1) if example.fires]
    silent = [number not in picked for number, example in enumerate(examples, 1) if not example.fires]
    return (sum(firing) / len(firing) + sum(silent) / len(silent)) / 2


def describe(values: list[float]) -> str:
    share = sum(value > 0.7 for value in values) / len(values)
    return f"mean {statistics.mean(values):.3f}, median {statistics.median(values):.3f}, {share:.1%} above 0.7"


def draw_histogram(path: Path, scores: list[float], shuffled: list[float], title: str) -> None:
    figure = new_figure(6, 3)
    axes = figure.subplots()
    bins = [i / 20 for i in range(21)]
    axes.hist(scores, bins, label=f"its meaning: {len(scores):,} latents")
    if shuffled:
        axes.hist(shuffled, bins, histtype="step", color="black", label="another latent's meaning")
    axes.axvline(0.5, color="grey", linewidth=1, linestyle=":")
    axes.set(xlabel="balanced accuracy of detection (guessing: 0.5)", ylabel="latents", xlim=(0, 1), title=title)
    axes.legend(frameon=False)
    save_figure(figure, path, dpi=120)


def report(result: Result, meaning_path: Path, n_meanings: int, scorer: str) -> None:
    """Draw and print the scores."""
    scores = [score.balanced_accuracy for score in result.scores]
    shuffled = [score.shuffled for score in result.scores if score.shuffled is not None]
    picture_path = meaning_path.with_suffix(".scores.png")
    draw_histogram(picture_path, scores, shuffled, f"{meaning_path.stem}, scored by {scorer}")
    print(f"{len(scores):,} of {n_meanings:,} meanings scored: balanced accuracy {describe(scores)}")
    if shuffled:
        print(f"another latent's meaning on the same sentences: {describe(shuffled)}")
    shares = ", ".join(
        f"{picked / shown:.0%}" if shown else "-" for picked, shown in zip(result.picked, result.shown, strict=True)
    )
    print(f"firing sentences picked, by tenth of the latent's range, weakest first: {shares}")
    print(f"{scores_path(meaning_path)}, {picture_path}")


def write_rejected(meaning_path: Path, rejected: dict[str, tuple[Rejection, str]]) -> None:
    """Write the answers that cannot be used, and remove those of an earlier run."""
    path = meaning_path.with_suffix(".scores.rejected.jsonl")
    path.unlink(missing_ok=True)
    if rejected:
        write_rejections(path, rejected)
        print(f"{len(rejected):,} answers could not be read or failed: {path}")


def open_inputs(meaning_path: Path, files: SaeFiles) -> dict[int, Meaning]:
    """The meanings, after checking that the tables are there. Raises InputError if something is missing."""
    fix = "give a file from a naming script with --meaning_filepath."
    meanings = read_meanings(meaning_path, fix, read_info(files.path).get("n_latents"))
    if not meanings:
        raise InputError(f"{meaning_path} holds no meanings; {fix}")
    for table in (TOP, EXAMPLES):
        table.open(files.beside(table.suffix), ["latent", "text"]).close()
    return meanings


def main() -> None:
    config = parse_constants(globals())
    if config.scorer != "words":
        require_consent_possible(config.yes, config.dry_run)
    meaning_path, files = Path(config.meaning_filepath), SaeFiles(config.model_path)
    meanings = open_inputs(meaning_path, files)
    if not config.dry_run:
        require_writable(scores_path(meaning_path))
    examples_path = files.beside(EXAMPLES.suffix)
    tokenizer = tokenizer_of(source_of(config.model_path), config.llama_model_dir, "--llama_model_dir")
    token_bytes = functools.cache(tokenizer.token_bytes)
    draw = Draw(config.sentences, config.min_sentences, config.shown_sentences, config.seed)
    print(f"Reading {meaning_path} and {examples_path}; writing {scores_path(meaning_path)}.")

    rejected: dict[str, tuple[Rejection, str]] = {}
    questions = functools.partial(draw_examples, files, meanings, token_bytes, draw)
    if config.scorer == "words":
        verdicts = by_words(questions(), meanings, config.seed)
    else:
        respondent = Respondent(config.model, config.max_tokens, config.effort)
        requests = (
            respondent.request(str(latent), detection_prompt(meanings[latent].text, examples))
            for latent, examples in questions()
        )
        sending = Sending(
            config.scorer == "claude",
            config.output_tokens,
            config.requests_per_batch,
            config.settle_s,
            config.poll_s,
            config.yes,
            config.dry_run,
        )
        folder = response_folder(meaning_path, examples_path, draw, config.model)
        if not ask_claude(requests, folder, sending):
            return
        verdicts = by_answers(questions(), read_answers(folder), rejected)
    result = score_verdicts(verdicts)

    write_rejected(meaning_path, rejected)
    if not result.scores:
        raise InputError(
            f"No latent of {meaning_path} has an answer and {config.min_sentences} sentences that its meaning was not "
            "found from; lower --min_sentences or --shown_sentences."
        )
    write_scores(meaning_path, result.scores)
    report(result, meaning_path, len(meanings), config.scorer)


if __name__ == "__main__":
    run(main)
