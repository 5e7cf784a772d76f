"""Send requests to Claude one by one, with answers as they arrive: for servers without batches."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, Stop

if TYPE_CHECKING:
    from anthropic import Anthropic

_HOPELESS = 10  # with so many errors and no success, it gives up


def ask(client: "Anthropic", request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request, in the format of a line of a batch's results.

    A request that the server refuses for its content gives an "errored" line. Raises the API's error for what would
    hit the next request too: no connection, no credit, a wrong key, an unknown model.
    """
    import anthropic

    try:
        message = client.messages.create(**request["params"])
    except (anthropic.BadRequestError, anthropic.ContentTooLargeError, anthropic.UnprocessableEntityError) as error:
        if "credit balance" in str(error).lower():
            raise
        reason = {"type": error.type or "invalid_request_error", "message": error.api_message or str(error)}
        errored = {"type": "errored", "error": {"type": "error", "error": reason, "request_id": error.request_id}}
        return {"custom_id": request["custom_id"], "result": errored}
    return {"custom_id": request["custom_id"], "result": {"type": "succeeded", "message": message.to_dict(mode="json")}}


def ask_all(
    client: "Anthropic", requests: Iterator[dict[str, Any]], concurrency: int, per_minute: float
) -> Iterator[dict[str, Any]]:
    """Answers in order of arrival: `concurrency` requests at a time, at most `per_minute` started per minute.

    If one raises, no more are started, and its error is raised once the answers in flight have arrived.
    """
    running: set[Future] = set()
    failure: BaseException | None = None
    following = next(requests, None)
    next_start = time.monotonic()
    with ThreadPoolExecutor(concurrency) as pool:
        while running or (following and not failure):
            pause = max(0.0, next_start - time.monotonic())
            may_start = not failure and len(running) < concurrency
            if following and may_start and not pause:
                running.add(pool.submit(ask, client, following))
                following = next(requests, None)
                next_start = time.monotonic() + 60 / per_minute
                continue
            if not running:
                time.sleep(pause)
                continue
            finished, running = wait(
                running, timeout=pause if following and may_start else None, return_when=FIRST_COMPLETED
            )
            for future in finished:
                if future.exception():
                    failure = future.exception()
                else:
                    yield future.result()
    if failure:
        raise failure


def append_answers(path: Path, answers: Iterable[dict[str, Any]]) -> None:
    """Append each answer to the file as it arrives. Raises InputError if the server refuses everything."""
    n_succeeded = n_errored = 0
    try:
        end_last_line(path)
        with open(path, "ab") as file:
            for answer in answers:
                file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
                file.flush()
                succeeded = answer["result"]["type"] == "succeeded"
                n_succeeded, n_errored = n_succeeded + succeeded, n_errored + (not succeeded)
                if n_errored == _HOPELESS and not n_succeeded:
                    reason = answer["result"]["error"]["error"]["message"]
                    raise InputError(f"The server refuses every request ({reason}); correct the option it names.")
    except OSError as error:
        raise Stop(f"Could not write {path} ({error}); free some disk and run again to continue.") from error
    print(f"{n_succeeded:,} answers, {n_errored:,} refused: {path}")


def end_last_line(path: Path) -> None:
    """Make the file end with a complete line: a kill may have cut the last one short."""
    whole, newline, last = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    if not last:
        return
    try:
        json.loads(last)
        with open(path, "ab") as file:
            file.write(b"\n")
    except ValueError:
        os.truncate(path, len(whole) + len(newline))
