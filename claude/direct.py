"""Requests to Claude one at a time, answers as they come."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from pipeline.errors import InputError

CONCURRENCY = 8  # requests under way at a time
REQUESTS_PER_MINUTE = 1000.0  # at most
RETRIES = 6  # of a request when the server is busy or out of order
_HOPELESS = 10  # errors before the first success, after which it stops: they will not end


def ask(client, request: dict) -> dict:
    """The answer to a request, in the form of a line of a batch's results.

    A request that the server refuses for what it is gives an "errored" line. Raises the API's error for what would
    befall the next request too: no connection, no credit, a wrong key, an unknown model.
    """
    import anthropic

    try:
        message = client.messages.create(**request["params"])
    except (anthropic.BadRequestError, anthropic.ContentTooLargeError, anthropic.UnprocessableEntityError) as error:
        if "credit balance" in str(error).lower():
            raise
        said = {"type": error.type or "invalid_request_error", "message": error.api_message or str(error)}
        errored = {"type": "errored", "error": {"type": "error", "error": said, "request_id": error.request_id}}
        return {"custom_id": request["custom_id"], "result": errored}
    return {"custom_id": request["custom_id"], "result": {"type": "succeeded", "message": message.to_dict(mode="json")}}


def ask_all(client, requests: Iterator[dict], concurrency: int, per_minute: float) -> Iterator[dict]:
    """Answers in the order in which they come: `concurrency` requests at a time, at most `per_minute` started.

    When one raises, no more are started; its error is raised when the answers under way have come.
    """
    running: set[Future] = set()
    failure: BaseException | None = None
    following = next(requests, None)
    next_start = time.monotonic()
    with ThreadPoolExecutor(concurrency) as pool:
        while running or (following and not failure):
            pause = max(0.0, next_start - time.monotonic())
            may_start = following and not failure and len(running) < concurrency
            if may_start and not pause:
                running.add(pool.submit(ask, client, following))
                following = next(requests, None)
                next_start = time.monotonic() + 60 / per_minute
                continue
            if not running:
                time.sleep(pause)
                continue
            finished, running = wait(running, timeout=pause if may_start else None, return_when=FIRST_COMPLETED)
            for future in finished:
                if future.exception():
                    failure = future.exception()
                else:
                    yield future.result()
    if failure:
        raise failure


def append_answers(path: Path, answers: Iterable[dict]) -> None:
    """Write each answer to the end of the file as it comes. Raises InputError when the server refuses everything."""
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
                    said = answer["result"]["error"]["error"]["message"]
                    raise InputError(f"The server refuses every request ({said}); correct the option it names.")
    except OSError as error:
        raise InputError(f"Could not write {path} ({error}); free some disk and run again to continue.") from error
    print(f"{n_succeeded:,} answers, {n_errored:,} refused: {path}")


def end_last_line(path: Path) -> None:
    """Let the file end with a whole line: a kill may have cut the last one short."""
    whole, newline, last = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    if not last:
        return
    try:
        json.loads(last)
        with open(path, "ab") as file:
            file.write(b"\n")
    except ValueError:
        os.truncate(path, len(whole) + len(newline))
