"""Files of Claude's answers: BATCH_ID.jsonl for a batch, or direct.jsonl, a line per answer as the API returns it."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from claude.prices import cost
from latents.tables import Aggregation
from pipeline.errors import InputError
from pipeline.files import atomic_path


class Answer(NamedTuple):
    """An answer from any kind of file."""

    custom_id: str
    text: str
    type: str  # succeeded, errored, expired or canceled
    detail: str  # why it stopped, or what the error was


class Rejection(NamedTuple):
    """Why an answer cannot be used."""

    status: str
    reason: str


def fill_in(template: str, aggregation: Aggregation, name: str = "") -> Path:
    """A path with {aggregation} and {name} filled in."""
    return Path(template.replace("{aggregation}", aggregation).replace("{name}", name))


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of an answer file. A last line that a kill cut short is left out."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                result = json.loads(line)
                _ = result["custom_id"], result["result"]["type"]
            except (ValueError, KeyError, TypeError):
                if not line.endswith(b"\n"):
                    return
                raise InputError(
                    f"Line {number} of {path} is not an API answer; remove the line, or the file to fetch it again."
                ) from None
            yield result


def answer_paths(response_dir: str | Path) -> list[Path]:
    """The answer files of a folder, in order of their names."""
    return sorted(path for path in Path(response_dir).glob("*") if path.suffix.lower() == ".jsonl")


def read_folder(response_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of all answer files of a folder, in order of their names."""
    for path in answer_paths(response_dir):
        yield from read_results(path)


def answered(response_dir: str | Path) -> set[str]:
    """The custom_ids that have an answer in a folder."""
    return {line["custom_id"] for line in read_folder(response_dir) if line["result"]["type"] == "succeeded"}


def from_result(line: dict[str, Any]) -> Answer:
    """An answer from a line of the API's results, however malformed."""
    custom_id, result = str(line["custom_id"]), line["result"]
    if result["type"] != "succeeded":
        detail = result.get("error")
        while isinstance(detail, dict):  # {"error": {"message": ...}}, once or twice
            detail = detail.get("error") or detail.get("message")
        return Answer(custom_id, "", str(result["type"]), str(detail or ""))
    message = result.get("message")
    message = message if isinstance(message, dict) else {}
    blocks = message.get("content")
    blocks = [block for block in blocks if isinstance(block, dict)] if isinstance(blocks, list) else []
    text = "".join(str(block.get("text") or "") for block in blocks if block.get("type") == "text")
    return Answer(custom_id, text, "succeeded", str(message.get("stop_reason") or ""))


def write_rejections(path: Path, rejected: dict[str, tuple[Rejection, str]]) -> None:
    """Write custom_id, status, reason and the text of answers that cannot be used. rejected: by custom_id."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for custom_id, (rejection, text) in rejected.items():
            line = json.dumps({"custom_id": custom_id, **rejection._asdict(), "text": text}, ensure_ascii=False)
            file.write(line.encode("utf-8", "replace") + b"\n")


# ---- totals


class Totals(NamedTuple):
    """What answer files contain."""

    types: Counter[str]  # requests by type: succeeded, errored, expired, canceled
    tokens: dict[str, tuple[int, int]]  # input and output tokens by model

    def report(self, price_ratio: float) -> str:
        """One line to print: requests by type, tokens, and what they cost."""
        types = ", ".join(f"{n:,} {name}" for name, n in sorted(self.types.items())) or "no answers"
        n_input, n_output = (sum(tokens[side] for tokens in self.tokens.values()) for side in (0, 1))
        costs = [cost(model, *tokens, price_ratio) for model, tokens in self.tokens.items()]
        known = [c for c in costs if c is not None]
        price = "price unknown" if len(known) < len(costs) else f"{sum(known):,.2f} USD"
        return f"{types}; {n_input:,} input and {n_output:,} output tokens, {price}"


def add_up(paths: Iterable[Path]) -> Totals:
    types: Counter[str] = Counter()
    tokens: dict[str, tuple[int, int]] = {}
    for path in paths:
        for result in read_results(path):
            types[result["result"]["type"]] += 1
            message = result["result"].get("message") or {}
            usage, model = message.get("usage") or {}, message.get("model") or "an unnamed model"
            if usage:
                n_input, n_output = tokens.get(model, (0, 0))
                n_input += sum(usage.get(f"{kind}input_tokens") or 0 for kind in ("", "cache_creation_", "cache_read_"))
                tokens[model] = n_input, n_output + (usage.get("output_tokens") or 0)
    return Totals(types, tokens)


def mean_output_tokens(response_dir: Path, assumed: float) -> float:
    """Output tokens per answer in a folder, or `assumed` if it has no answers."""
    totals = add_up(answer_paths(response_dir))
    if not totals.types["succeeded"]:
        return assumed
    return sum(n_output for _, n_output in totals.tokens.values()) / totals.types["succeeded"]
