"""Send questions to Claude through its Message Batches API so that nothing is lost and nothing is paid for twice.

The journal (claude/journal.py) says what was sent. Each batch's answers become one file BATCH_ID.jsonl, written once
they are complete (claude/answers.py).

The API cannot be told that a request to create a batch is a retry, and it lists batches without their requests. So
before a batch is created, the intent goes to disk, with the batches the API lists at that time. If the outcome is
unclear (a kill, a timeout, an error 500), nothing more is created until the API's list has been read. The one batch
that is new there, has as many requests and, if they can be read already, the same custom_ids, is ours. The batch counts
as not created only if none has turned up `settle_s` seconds after the intent. If two fit, the user must decide.

Not covered: two journals that send batches of the same size in one workspace within the same minutes, when the outcome
of one is unclear. Use a workspace for each.
"""

import json
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from claude.answers import answer_paths
from claude.connection import api_error_sentence, seconds_before
from claude.journal import Journal, read_batches
from claude.requests import MAX_REQUESTS, Requests
from pipeline.errors import InputError, Stop
from pipeline.files import atomic_path
from pipeline.progress import duration, progress_bar

if TYPE_CHECKING:
    from anthropic import Anthropic
    from anthropic.types.messages import MessageBatch

RESULTS_KEPT_DAYS = 29
CREATE_ATTEMPTS = 8
RESULTS_ATTEMPTS = 5
LONGEST_WAIT_S = 120  # between two attempts, unless the server asks for more

_REFUSED = (400, 401, 402, 403, 404, 405, 413, 422)  # errors after which no batch was created, for certain


# ---- sending


def send(client: "Anthropic", journal: Journal, requests: Requests, requests_per_batch: int, settle_s: float) -> None:
    """Create batches of the requests. Call `reconcile` first; the module's docstring says what may go wrong."""
    with progress_bar(total=requests.n, desc="sending", unit="request") as bar:
        for batch in requests.batches(min(max(requests_per_batch, 1), MAX_REQUESTS)):
            create_batch(client, journal, batch, settle_s)
            bar.update(len(batch))


def create_batch(client: "Anthropic", journal: Journal, requests: list[Any], settle_s: float) -> None:
    """Create exactly one batch and note its id in the journal.

    Raises the API's error if it refuses the batch, or after CREATE_ATTEMPTS failures.
    """
    import anthropic

    for attempt in range(1, CREATE_ATTEMPTS + 1):
        newest = client.messages.batches.list(limit=100)
        journal.intend([request["custom_id"] for request in requests], newest.data)
        try:
            # The client's own retries would create a second batch if an error came late.
            batch = client.with_options(max_retries=0).messages.batches.create(requests=requests)
            journal.created(batch)
            return
        except (anthropic.RateLimitError, anthropic.OverloadedError) as error:  # nothing was created
            journal.forget()
            if attempt == CREATE_ATTEMPTS:
                raise
            wait = seconds_before(attempt, error, LONGEST_WAIT_S)
            print(f"The API is busy ({error.status_code}); next try in {wait:,.0f} s.", file=sys.stderr)
            time.sleep(wait)
        except (anthropic.APIError, AttributeError, TypeError, ValueError) as error:
            if getattr(error, "status_code", None) in _REFUSED:
                journal.forget()
                raise
            # A timeout, a broken connection, an error 500 or an answer without an id: it may have been created.
            reason = " ".join(str(error).split())
            print(f"It is not clear whether the batch was created ({reason}).", file=sys.stderr)
            if reconcile(client, journal, settle_s):
                return
            if attempt == CREATE_ATTEMPTS:
                raise


def reconcile(client: "Anthropic", journal: Journal, settle_s: float) -> bool:
    """Find out whether the last batch was created, if the journal does not know. True if it was found.

    Waits until settle_s seconds after the intent: the API may list a batch late. Raises InputError if several batches
    could be it.
    """
    intent = journal.unclear()
    if intent is None:
        return False
    age = (datetime.now(UTC) - datetime.fromisoformat(intent["intended_at"])).total_seconds()
    until = time.monotonic() + min(max(settle_s - age, 0), settle_s)
    wait = duration(until - time.monotonic())
    print(f"Looking for the last batch in the API's list, for up to {wait}.", file=sys.stderr)
    while True:
        left = until - time.monotonic()
        found = [batch for batch in new_batches(client, journal) if may_be(client, batch, intent["custom_ids"])]
        if len(found) == 1:
            journal.created(found[0])
            print(f"It was created: {found[0].id}.", file=sys.stderr)
            return True
        if found:
            raise InputError(
                f"Batches {', '.join(batch.id for batch in found)} could each be the last one in {journal.path}; run "
                "again when they have ended, or write the right id there as batch_id, or delete that line if none fits."
            )
        if left <= 0:
            journal.forget()
            print("It was not created.", file=sys.stderr)
            return False
        time.sleep(min(left, 5))


def new_batches(client: "Anthropic", journal: Journal) -> "list[MessageBatch]":
    """Batches in the API's list that were not there when the intent was written, and are not in the journal."""
    seen = journal.batches[-1]["seen"]
    oldest = min(map(datetime.fromisoformat, seen.values()), default=None)
    known = seen.keys() | {batch["batch_id"] for batch in journal.batches}
    new = []
    for batch in client.messages.batches.list(limit=100):  # newest first, page after page
        if oldest and batch.created_at < oldest:
            break
        if batch.id not in known:
            new.append(batch)
    return new


def may_be(client: "Anthropic", batch: "MessageBatch", custom_ids: list[str]) -> bool:
    """Whether a batch may contain these requests. Its custom_ids can be read only once it has ended."""
    import anthropic
    import httpx2  # the client's transport, whose errors it passes on while streaming

    if n_requests(batch) != len(custom_ids):
        return False
    if batch.processing_status != "ended" or not batch.results_url:
        return True
    try:
        return {result.custom_id for result in client.messages.batches.results(batch.id)} == set(custom_ids)
    except (anthropic.AnthropicError, httpx2.HTTPError, ValueError):
        return True


def n_requests(batch: "MessageBatch") -> int:
    counts = batch.request_counts
    return counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired


# ---- retrieving


def retrieve(
    client: "Anthropic", journal_path: str | Path, out_dir: str | Path, wait: bool, poll_s: float
) -> list[str]:
    """Store the complete answers of each batch that has ended as out_dir/BATCH_ID.jsonl. Returns the ids still open.

    With `wait`, polls every poll_s seconds until all have ended. Once the others are stored, raises Stop for a batch
    whose answers are gone, do not match the journal, or are still incomplete after RESULTS_ATTEMPTS.
    """
    import anthropic

    faults: dict[str, str] = {}
    while True:
        # Read at each poll: more may have been sent meanwhile.
        batches = {b["batch_id"]: b["custom_ids"] for b in read_batches(Path(journal_path)) if b["batch_id"]}
        stored = {path.stem for path in answer_paths(out_dir)}
        open_ids = [batch_id for batch_id in batches if batch_id not in stored and batch_id not in faults]
        waiting = []
        for batch_id in progress_bar(open_ids, desc="batches", unit="batch"):
            try:
                if not store_results(client, batch_id, batches[batch_id], Path(out_dir)):
                    waiting.append(batch_id)
            except BatchFault as error:
                faults[batch_id] = str(error)
            except (anthropic.APIConnectionError, anthropic.RateLimitError, anthropic.InternalServerError) as error:
                if not wait:
                    raise
                print(api_error_sentence(error), file=sys.stderr)
                waiting.append(batch_id)
        if not (wait and waiting):
            break
        print(f"{len(waiting)} of {len(batches)} batches have not ended; next poll in {duration(poll_s)}.")
        time.sleep(poll_s)
    if faults:
        others = f" ({len(faults) - 1} more batches failed.)" if len(faults) > 1 else ""
        raise Stop(next(iter(faults.values())) + others)
    return waiting


def store_results(client: "Anthropic", batch_id: str, custom_ids: list[str], out_dir: Path) -> bool:
    """Store a batch's answers if it has ended. Returns whether it has."""
    import anthropic
    import httpx2

    try:
        batch = client.messages.batches.retrieve(batch_id)
    except anthropic.NotFoundError:
        raise BatchFault(
            f"The API does not know batch {batch_id}; use the key of the workspace that sent it, or remove its line "
            "from the journal to send its requests again."
        ) from None
    if batch.processing_status != "ended":
        return False
    if batch.archived_at or not batch.results_url:
        raise BatchFault(
            f"The answers of batch {batch_id} are gone (the API keeps them {RESULTS_KEPT_DAYS} days); remove its line "
            "from the journal to send its requests again."
        )
    if n_requests(batch) != len(custom_ids):
        raise BatchFault(
            f"Batch {batch_id} has {n_requests(batch):,} requests, but the journal says {len(custom_ids):,}; correct "
            "its line there."
        )
    for attempt in range(1, RESULTS_ATTEMPTS + 1):
        try:
            with atomic_path(out_dir / f"{batch_id}.jsonl") as temporary:
                write_results(client, batch, custom_ids, temporary)
            return True
        except (CutShort, httpx2.HTTPError, ValueError) as error:
            reason = f"{error}; attempt {attempt} of {RESULTS_ATTEMPTS}"
            print(f"The answers of {batch_id} broke off ({reason}).", file=sys.stderr)
            time.sleep(min(2.0**attempt, LONGEST_WAIT_S) if attempt < RESULTS_ATTEMPTS else 0)
    raise BatchFault(f"The answers of batch {batch_id} arrive incomplete; run again later to fetch them.")


class BatchFault(Stop):
    """The answers of one batch cannot be fetched; others may be fine."""


class CutShort(Exception):
    """The answers that arrived are not all that the batch has."""


def write_results(client: "Anthropic", batch: "MessageBatch", custom_ids: list[str], path: Path) -> None:
    """Write a batch's answers as they arrive. Raises CutShort, or the connection's error, if they are incomplete."""
    types: Counter[str] = Counter()
    missing = set(custom_ids)
    with open(path, "w", encoding="utf-8") as file:
        for result in client.messages.batches.results(batch.id):
            line: dict[str, Any] = result.to_dict(mode="json")
            if line["custom_id"] not in missing:
                raise BatchFault(
                    f"Batch {batch.id} answers {line['custom_id']!r} twice, or its line in the journal lacks it; "
                    "correct that line."
                )
            missing.remove(line["custom_id"])
            types[line["result"]["type"]] += 1
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    counts = {name: getattr(batch.request_counts, name) for name in ("succeeded", "errored", "canceled", "expired")}
    if missing or any(types[name] != n for name, n in counts.items()):
        raise CutShort(f"{types.total():,} answers arrived, but the batch has {counts}")
