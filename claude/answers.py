"""Claude's answers, wherever they come from."""

import json
from pathlib import Path
from typing import NamedTuple

from pipeline.files import atomic_path


class Answer(NamedTuple):
    """An answer, wherever it comes from."""

    custom_id: str
    text: str
    type: str  # succeeded, errored, expired or canceled
    detail: str  # why it stopped, or what the error was


class Rejection(NamedTuple):
    """Why an answer gives no meaning."""

    status: str
    reason: str


def from_result(line: dict) -> Answer:
    """An answer from a line of the API's results, whatever is odd about it."""
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
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for custom_id, (rejection, text) in rejected.items():
            line = json.dumps({"custom_id": custom_id, **rejection._asdict(), "text": text}, ensure_ascii=False)
            file.write(line.encode("utf-8", "replace") + b"\n")
