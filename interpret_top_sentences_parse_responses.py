"""Turn Claude's answers into a file of meanings: latent -> {certainty, common_semantic}, most certain first.

Reads   RETRIEVED_RESPONSES_DIR: *.jsonl of the retrieve and direct scripts; *.yaml, the original's published answers,
        custom_id -> {content, model, input_tokens, output_tokens} or {canceled: true}
Writes  PARSED_RESPONSES_OUTPUT_FILEPATH, and beside it NAME.rejected.jsonl: custom_id, status, reason and text of each
        latent that got no meaning
Method  the last JSON object with both fields counts, however it is wrapped; backslashes that JSON does not define are
        taken literally; quotes inside a text, curly quotes, comments and a trailing comma are read if they allow only
        one reading; a certainty above 1 is a percentage. Files are read in order of name: a latent's last meaning
        counts, even if a later answer has none
Cost    a minute for 65,536 answers

    python interpret_top_sentences_parse_responses.py --retrieved_responses_dir data/sae.mean.responses
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from claude.answers import Answer, Rejection, fill_in, from_result, read_results, write_rejections
from latents.meanings import Meaning, write_meanings
from latents.tables import Aggregation
from pipeline.errors import InputError
from pipeline.files import locked, require_writable
from pipeline.options import parse_constants
from pipeline.progress import progress_bar
from pipeline.run import run

RETRIEVED_RESPONSES_DIR = "data/sae.{aggregation}.responses"  # folder of answers, or one file
PARSED_RESPONSES_OUTPUT_FILEPATH = "latent_index_meaning/latent_idx_meaning_{aggregation}-aggregated.yaml"  # meanings
AGGREGATION: Aggregation = "mean"  # fills in {aggregation}

_FIELDS = ("common_semantic", "certainty")
_REFUSAL = re.compile(
    r"\W*(I apologi[sz]e|I['’]m sorry|I am sorry|Sorry|(Unfortunately, )?I (can ?not|can['’]t|won['’]t|will not)"
    r"|I['’]m (not able|unable|not comfortable)|I am (not able|unable)|I must decline|I (do not|don['’]t) feel)\b",
    re.IGNORECASE,
)
_BACKSLASH = re.compile(r'\\(u[0-9a-fA-F]{4}|["\\/bfnrt])?')
_BACKSLASH_OR_QUOTE = re.compile(_BACKSLASH.pattern + '|"')
_DECODER = json.JSONDecoder(strict=False)  # allows line breaks inside strings

# An object that is almost JSON. Its text ends at the first (shortest) or at the last (longest) quote where it can.
_SPACE = r"(?>\s+|//[^\n]*+|\#[^\n]*+|/\*.*?\*/)*+"  # comments too
_QUOTE = "[\"'“”„‘’]"
_KEY = rf"(?:{_QUOTE}%s{_QUOTE}|%s){_SPACE}:{_SPACE}"
_SEMANTIC = _KEY.replace(
    "%s", "common_semantic"
) + r"""(?:null|None|(?P<quote>["'])(?P<plain>LETTERS)(?P=quote)|[“„‘](?P<curly>LETTERS)[”“’])""".replace(
    "LETTERS", r"(?:\\.|(?!common_semantic)[^\\])*LAZY"
)
_CERTAINTY = _KEY.replace("%s", "certainty") + rf"{_QUOTE}?(?P<certainty>[\w.%+-]{{1,40}}){_QUOTE}?"
_ALMOST_JSON = rf"\{{{_SPACE}(?:FIRST){_SPACE},{_SPACE}(?:SECOND){_SPACE},?{_SPACE}\}}"
_SHORTEST, _LONGEST = (
    [
        re.compile(_ALMOST_JSON.replace("FIRST", a).replace("SECOND", b).replace("LAZY", lazy), re.DOTALL)
        for a, b in ((_SEMANTIC, _CERTAINTY), (_CERTAINTY, _SEMANTIC))
    ]
    for lazy in ("?", "")
)
_BEGINNING = re.compile(rf"\{{{_SPACE}{_QUOTE}?(?:common_semantic|certainty){_QUOTE}?{_SPACE}:", re.DOTALL)


# ---- reading answers


def read_answers(path: Path) -> Iterator[Answer]:
    """The answers in a file of ours (.jsonl) or of the original (.yaml)."""
    if path.suffix.lower() == ".jsonl":
        return map(from_result, read_results(path))
    return read_published(path)


def read_published(path: Path) -> Iterator[Answer]:
    """Answers as the original stored them."""
    fix = "move it out of the folder of answers."
    try:
        with open(path, "rb") as file:
            entries = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({' '.join(str(error).split())}); {fix}") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"{path} does not map custom ids to answers; {fix}")
    for custom_id, entry in entries.items():
        content = entry.get("content")
        kind = next((name for name in ("canceled", "expired", "errored") if entry.get(name)), "succeeded")
        yield Answer(str(custom_id), content if isinstance(content, str) else "", kind, "")


# ---- what an answer means


def judge(answer: Answer) -> Meaning | Rejection:
    """The meaning in an answer, or why it has none. Never raises."""
    if not (answer.custom_id.isascii() and answer.custom_id.isdecimal()):
        return Rejection("bad_custom_id", f"{answer.custom_id!r} is not a latent's index")
    if answer.type != "succeeded":
        return Rejection(answer.type, answer.detail)
    fields = last_object(answer.text)
    if fields is not None:
        return meaning_of(fields)
    if not answer.text.strip():
        return Rejection("refusal" if answer.detail == "refusal" else "empty", "the answer has no text")
    if answer.detail == "refusal" or _REFUSAL.match(answer.text):
        return Rejection("refusal", "Claude declined to answer")
    if answer.detail == "max_tokens":
        return Rejection("cut", "the answer reached max_tokens")
    return Rejection("no_json", f"the answer has no JSON object with {' and '.join(_FIELDS)}")


def last_object(text: str) -> dict | None:
    """The last object in a text that has both fields, wherever it stands; None if there is none."""
    found, end = last_json(text)
    return last_almost_json(text[end:]) or found


def last_json(text: str) -> tuple[dict | None, int]:
    """The last JSON object that has both fields, and where it ends."""
    start = min(text.rfind(f'"{field}"') for field in _FIELDS)
    while (start := text.rfind("{", 0, max(start, 0))) >= 0:
        for candidate in (text[start:], _BACKSLASH.sub(_double_unknown, text[start:])):
            try:
                value, length = _DECODER.raw_decode(candidate)
            except (ValueError, RecursionError):
                continue
            if all(field in value for field in _FIELDS):
                return value, len(text) - len(candidate) + length
            break
    return None, 0


def last_almost_json(text: str) -> dict | None:
    """The last object that is almost JSON; None if there is none, or one that can be read in two ways."""
    found = None
    for beginning in _BEGINNING.finditer(text):
        shortest, longest = (
            next(filter(None, (pattern.match(text, beginning.start()) for pattern in patterns)), None)
            for patterns in (_SHORTEST, _LONGEST)
        )
        if shortest is None or longest is None or shortest.groups() != longest.groups():
            return None
        semantic = shortest["curly"] if shortest["plain"] is None else shortest["plain"]
        if shortest["quote"] == '"' and _is_open(semantic):
            return None
        found = {"common_semantic": semantic and _unescaped(semantic), "certainty": shortest["certainty"]}
    return found


def _is_open(text: str) -> bool:
    """Whether a quote inside a text has no partner: then it may be the text's last letter that is lost."""
    return re.sub(r"\\.", "", text, flags=re.DOTALL).count('"') % 2 == 1


def _unescaped(text: str) -> str:
    """What stands between an object's quotes."""
    whole = lambda match: '\\"' if match[0] == '"' else _double_unknown(match)
    text = text.replace("\\'", "'")
    return _DECODER.decode(f'"{_BACKSLASH_OR_QUOTE.sub(whole, text)}"')


def _double_unknown(match: re.Match) -> str:
    return match[0] if match[1] else "\\\\"


def meaning_of(fields: dict[str, Any]) -> Meaning | Rejection:
    """The two fields, checked."""
    text = fields["common_semantic"]
    if text is None or (isinstance(text, str) and not text.strip()):
        return Rejection("no_meaning", "Claude found nothing in common")
    if not isinstance(text, str):
        return Rejection("bad_common_semantic", f"common_semantic is {text!r}, not a text")
    certainty = certainty_of(fields["certainty"])
    if certainty is None:
        return Rejection("bad_certainty", f"certainty is {fields['certainty']!r}, not a number from 0 to 1")
    return Meaning(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), certainty)


def certainty_of(value: Any) -> float | None:
    """A certainty from 0 to 1 out of 0.9, 1, "0.9", "90%", 90 or "90"; None for anything else."""
    percent = False
    if isinstance(value, str):
        percent = value.strip().endswith("%")
        value = value.strip().removesuffix("%")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if percent or 1 < number <= 100:
        number /= 100
    return number if 0 <= number <= 1 else None


def answer_files(source: Path) -> list[Path]:
    """The file itself, or a folder's answer files in order of name. Raises InputError if there is none."""
    kinds = (".jsonl", ".yaml", ".yml")
    paths = [source] if source.is_file() else sorted(path for path in source.glob("*") if path.suffix.lower() in kinds)
    if not paths:
        raise InputError(
            f"There are no answers in {source}; run interpret_top_sentences_retrieve_batches.py first, or name their "
            "folder with --retrieved_responses_dir."
        )
    return paths


def judge_all(paths: list[Path]) -> tuple[dict[int, Meaning], dict[str, tuple[Rejection, str]]]:
    """The meanings by latent; and by custom_id, why there is no meaning, with the answer's text."""
    meanings: dict[int, Meaning] = {}
    rejected: dict[str, tuple[Rejection, str]] = {}
    for path in progress_bar(paths, desc="answers", unit="file"):
        for answer in read_answers(path):
            found = judge(answer)
            if isinstance(found, Meaning):
                meanings[int(answer.custom_id)] = found
            else:
                rejected[answer.custom_id] = found, answer.text
    return meanings, {i: entry for i, entry in rejected.items() if not (i.isdecimal() and int(i) in meanings)}


def main() -> None:
    config = parse_constants(globals())
    source = fill_in(config.retrieved_responses_dir, config.aggregation)
    out_path = fill_in(config.parsed_responses_output_filepath, config.aggregation)
    rejected_path = out_path.with_suffix(".rejected.jsonl")
    paths = answer_files(source)
    require_writable(out_path, rejected_path)
    print(f"Reading {len(paths)} files in {source}; writing {out_path} and {rejected_path.name}.")

    meanings, rejected = judge_all(paths)
    with locked(out_path.parent):
        write_meanings(out_path, meanings)
        write_rejections(rejected_path, rejected)
    print(f"{len(meanings):,} latents have a meaning: {out_path}")
    if rejected:
        statuses = Counter(rejection.status for rejection, _ in rejected.values())
        reasons = ", ".join(f"{n:,} {status}" for status, n in statuses.most_common())
        print(f"{len(rejected):,} have none ({reasons}): {rejected_path}")


if __name__ == "__main__":
    run(main)
