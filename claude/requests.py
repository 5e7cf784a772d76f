"""Requests before they are sent: kept on disk, counted, priced, agreed to.

A request is {"custom_id": str, "params": dict}, params as `messages.create` takes them.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from claude.prices import BATCH_PRICE, cost
from pipeline.errors import InputError
from pipeline.progress import gb, progress_bar

if TYPE_CHECKING:
    from anthropic import Anthropic

MAX_REQUESTS = 100_000  # the API's limits on a batch
MAX_BYTES = 256_000_000
SAMPLE_REQUESTS = 200  # requests whose tokens are counted for the estimate
BYTES_PER_TOKEN = 3.0  # assumed if the server does not count tokens; English text has about 3.5

_EMPTY = b'{"requests":[]}'  # a batch's body without requests


class Respondent(NamedTuple):
    """The model that is asked, and how it may answer."""

    model: str
    max_tokens: int  # per answer, thinking included
    effort: str  # how much it thinks; empty for models without this option

    def request(self, custom_id: str, content: str) -> dict[str, Any]:
        """One question."""
        params: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "messages": [{"role": "user", "content": content}],
        }
        if self.effort:
            params["output_config"] = {"effort": self.effort}
        return {"custom_id": custom_id, "params": params}


def as_json(request: dict[str, Any]) -> bytes:
    """A request as the client sends it."""
    return json.dumps(request, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


class Requests(NamedTuple):
    """Requests in a file, since a full run has a gigabyte of them."""

    file: BinaryIO  # a line of JSON per request, as it will be sent
    n: int
    n_bytes: int

    def lines(self) -> Iterator[bytes]:
        self.file.seek(0)
        for line in self.file:
            yield line.rstrip(b"\n")

    def sample(self, n: int) -> list[bytes]:
        """n of them (or all), evenly spread."""
        step = max(1, self.n / n)
        wanted = {int(i * step) for i in range(min(n, self.n))}
        return [line for i, line in enumerate(self.lines()) if i in wanted]

    def batches(self, max_requests: int, max_bytes: int = MAX_BYTES) -> Iterator[list[dict[str, Any]]]:
        """Batches within the API's limits; max_bytes limits the request body."""
        batch: list[dict[str, Any]] = []
        size = len(_EMPTY)
        for line in self.lines():
            if batch and (len(batch) == max_requests or size + len(line) > max_bytes):
                yield batch
                batch, size = [], len(_EMPTY)
            batch.append(json.loads(line))
            size += len(line) + 1  # the comma between two
        if batch:
            yield batch


@contextlib.contextmanager
def spooled(requests: Iterable[dict[str, Any]], folder: Path) -> Iterator[Requests]:
    """Requests in an unnamed temporary file in `folder`, which disappears with the process."""
    n = n_bytes = 0
    with tempfile.TemporaryFile(dir=folder) as file:
        for request in requests:
            line = as_json(request)
            if len(line) + len(_EMPTY) > MAX_BYTES:
                raise InputError(f"Request {request['custom_id']} has {gb(len(line))}; make it shorter.")
            file.write(line + b"\n")
            n += 1
            n_bytes += len(line)
        yield Requests(file, n, n_bytes)


# ---- the price


def estimate_input_tokens(client: "Anthropic", requests: Requests) -> tuple[float, str]:
    """All requests' input tokens, and how they were found: the API counts a sample, which is scaled up by bytes."""
    import anthropic

    n_tokens = n_bytes = n_counted = 0
    patient = client.with_options(max_retries=6)  # counting has its own rate limit
    for line in progress_bar(requests.sample(SAMPLE_REQUESTS), desc="counting tokens", unit="request"):
        params = {k: v for k, v in json.loads(line)["params"].items() if k != "max_tokens"}
        try:
            n_tokens += patient.messages.count_tokens(**params).input_tokens
        except anthropic.RateLimitError:
            break
        except anthropic.APIStatusError as error:
            if error.status_code not in (404, 405, 501) or params["model"] in str(error):
                raise
            break
        n_bytes += len(line)
        n_counted += 1
    if not n_counted:
        return requests.n_bytes / BYTES_PER_TOKEN, "guessed from their length: the server does not count tokens"
    return n_tokens / n_bytes * requests.n_bytes, f"counted on a sample of {n_counted}"


def announce(client: "Anthropic", requests: Requests, output_tokens: float, price_ratio: float) -> None:
    """Print the number of requests, their tokens and their price. output_tokens: assumed per answer."""
    params = json.loads(requests.sample(1)[0])["params"]
    model, max_tokens = params["model"], params["max_tokens"]
    n_input, how = estimate_input_tokens(client, requests)
    price = cost(model, n_input, requests.n * output_tokens, price_ratio)
    most = cost(model, n_input, requests.n * max_tokens, price_ratio)
    mode = "in batch mode" if price_ratio == BATCH_PRICE else "at the full price"
    print(f"{requests.n:,} requests to {model}, about {n_input:,.0f} input tokens ({how}).")
    if price is None or most is None:
        print(f"The price is unknown: claude/prices.py does not list {model}.")
    else:
        print(
            f"About {price:,.2f} USD {mode}, assuming {output_tokens:,.0f} output tokens per answer; "
            f"at most {most:,.2f} USD, if every answer took {max_tokens:,}."
        )


def require_consent_possible(yes: bool, dry_run: bool) -> None:
    """Raise InputError if nobody is there to be asked."""
    if not (yes or dry_run or sys.stdin.isatty()):
        raise InputError("Nobody is at the keyboard to agree to the price; pass --yes, or --dry_run to see it.")


def may_send(yes: bool, dry_run: bool) -> bool:
    """Whether to send what was announced; asks unless an option has decided."""
    agreed = not dry_run and (yes or input("Send them? [y/N] ").strip().lower() in ("y", "yes"))
    if not agreed:
        print("Nothing was sent.")
    return agreed
