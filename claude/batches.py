"""Claude's Message Batches API such that nothing is lost and nothing is paid twice; for scripts that ask Claude a lot.

A request is {"custom_id": str, "params": dict}, params as `messages.create` takes them. A journal (JSON lines, one a
batch, rewritten atomically) says what was sent: {"batch_id", "purpose", "created_at", "custom_ids"}. Each batch's
answers become one file BATCH_ID.jsonl, written when they are whole: a line a request, just as the API returns it.

The API knows no idempotency key and lists batches without their requests. So before a batch is created its line,
without an id yet, goes to disk, with the batches the API lists at that time. When the creation does not end clearly (a
kill, a timeout, an error 500), nothing is created again before the API's list was asked: the one batch that is new
there, of the same number of requests and with the same custom_ids where they can be read already, is ours. Only when
none has turned up `settle_s` seconds after the intent does the batch count as not created. When two fit, the user must
decide. What this cannot see: two journals that send batches of one size within one workspace in the same minutes, one
of which fails unclearly. Use a workspace each then.
"""

import contextlib
import fcntl
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.errors import InputError
from pipeline.files import atomic_path
from pipeline.progress import duration, gb, progress_bar

# USD per million input and output tokens, from platform.claude.com/docs/en/about-claude/pricing, November 2026.
# claude-haiku-5-5 costs five times as much for prompts of more than 100,000 tokens, which are not counted here.
PRICES = {
    "claude-haiku-5-5": (0.10, 0.50),
    "claude-sonnet-5-5": (2.00, 10.00),
    "claude-opus-5-5": (4.00, 20.00),
    "claude-fable-5-1": (10.00, 50.00),
    "claude-sonnet-5": (2.00, 10.00),
    "claude-opus-5": (5.00, 25.00),
    "claude-haiku-4-5": (1.00, 5.00),
}
BATCH_PRICE_RATIO = 0.5  # a request in a batch costs half
MAX_REQUESTS = 100_000  # the API's limits on a batch
MAX_BYTES = 256_000_000
RESULTS_KEPT_DAYS = 29
SAMPLE_REQUESTS = 200  # requests whose tokens are counted for the estimate
BYTES_PER_TOKEN = 3.0  # where the server does not count tokens; English text has about 3.5
CREATE_ATTEMPTS = 8
RESULTS_ATTEMPTS = 5
LONGEST_WAIT_S = 120  # between two attempts, unless the server asks for more

_REFUSED = (400, 401, 402, 403, 404, 405, 413, 422)  # errors after which no batch was created, for certain
_EMPTY = b'{"requests":[]}'  # a batch's body without requests


# ---- the connection


def connect(max_retries: int = 2):
    """The anthropic client; it reads ANTHROPIC_API_KEY and ANTHROPIC_BASE_URL. Raises InputError without a key."""
    # The client would notice only at its first call.
    if not (os.environ.get("ANTHROPIC_API_KEY") or os.environ.get("ANTHROPIC_AUTH_TOKEN")):
        raise InputError("There is no API key; set ANTHROPIC_API_KEY (a local server takes any word).")
    import anthropic

    return anthropic.Anthropic(max_retries=max_retries)


@contextlib.contextmanager
def api_errors() -> Iterator[None]:
    """Turn an error of the API into an InputError of one sentence."""
    import anthropic

    try:
        yield
    except anthropic.APIError as error:
        raise InputError(explain(error)) from error


def explain(error: Exception) -> str:
    """One sentence on what the API refused and what to do."""
    import anthropic

    status = getattr(error, "status_code", None)
    said = " ".join(str(getattr(error, "api_message", None) or error).split()).rstrip(".")
    server = os.environ.get("ANTHROPIC_BASE_URL") or "api.anthropic.com"
    if isinstance(error, anthropic.APIConnectionError):
        return f"{server} does not answer ({said}); check the network and ANTHROPIC_BASE_URL and run again to continue."
    if status == 401:
        return f"{server} refuses the key in ANTHROPIC_API_KEY ({said}); set a valid one."
    if status == 402 or "credit balance" in said.lower():
        return f"The account has no credit left ({said}); buy some and run again to continue."
    if status == 403:
        return f"The key may not do this ({said}); use a key of a workspace that may."
    if status == 404:
        return f"{server} does not know what was asked for ({said}); check the model's name and ANTHROPIC_BASE_URL."
    if status == 429 or (status or 0) >= 500:
        return f"{server} is busy or out of order ({status}: {said}); run again later to continue."
    return f"{server} refuses the request ({said}); correct the constants it names and run again."


def _wait_before(attempt: int, error: Exception) -> float:
    """Seconds to wait before attempt number `attempt`: what the server asks for, else longer each time."""
    response = getattr(error, "response", None)
    try:
        return float(response.headers["retry-after"])
    except (AttributeError, KeyError, ValueError):
        return min(2.0**attempt, LONGEST_WAIT_S)


# ---- the journal


class Journal:
    """The batches of one purpose, in a file. `batches`: a dict a batch, the last of which may still lack its id."""

    def __init__(self, path: Path, purpose: str | None = None):
        self.path, self.purpose = path, purpose
        self.batches: list[dict] = []
        if not path.exists():
            return
        mend = "restore it from a copy; without it paid answers are lost."
        try:
            self.batches = [json.loads(line) for line in path.open(encoding="utf-8")]
            purposes = {batch["purpose"] for batch in self.batches}
            for batch in self.batches:
                batch["batch_id"], *batch["custom_ids"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a journal of batches ({error!r}); {mend}") from None
        if purpose and purposes - {purpose}:
            raise InputError(
                f"{path} holds batches for {sorted(purposes)[0]!r}, not for {purpose!r}; name another file."
            )

    def save(self) -> None:
        """Write the file; it is on the disk when this returns."""
        with atomic_path(self.path) as temporary:
            lines = (json.dumps(batch, ensure_ascii=False) + "\n" for batch in self.batches)
            temporary.write_text("".join(lines), encoding="utf-8")
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def intend(self, custom_ids: list[str], seen: list) -> None:
        """Write down that a batch will be created. seen: the newest batches the API lists now."""
        self.batches.append(
            {
                "batch_id": None,
                "purpose": self.purpose,
                "intended_at": datetime.now(UTC).isoformat(),
                "seen": {batch.id: batch.created_at.isoformat() for batch in seen},
                "custom_ids": custom_ids,
            }
        )
        self.save()

    def created(self, batch) -> None:
        """Write down the id of the batch that was intended."""
        intent = self.batches[-1]
        self.batches[-1] = {
            "batch_id": batch.id,
            "purpose": intent["purpose"],
            "created_at": batch.created_at.isoformat(),
            "custom_ids": intent["custom_ids"],
        }
        self.save()

    def forget(self) -> None:
        """Strike out the batch that was intended: it was not created."""
        self.batches.pop()
        self.save()

    def unclear(self) -> dict | None:
        """The batch of which it is not known whether it was created."""
        return self.batches[-1] if self.batches and self.batches[-1]["batch_id"] is None else None


@contextlib.contextmanager
def open_journal(path: str | Path, purpose: str) -> Iterator[Journal]:
    """A journal to write to, for this process alone. Raises InputError when another process holds it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path} is in use by another process; wait for it to end.") from None
        yield Journal(path, purpose)


# ---- answers on disk


def read_results(path: Path) -> Iterator[dict]:
    """The lines of an answer file. A last line that a kill cut short is left out."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                result = json.loads(line)
                result["custom_id"], result["result"]["type"]
            except (ValueError, KeyError, TypeError):
                if not line.endswith(b"\n"):
                    return
                raise InputError(
                    f"Line {number} of {path} is not an answer of the API; remove it, or the file to fetch it again."
                ) from None
            yield result


def answered(response_dir: str | Path) -> set[str]:
    """The custom_ids that have an answer in a folder."""
    files = sorted(Path(response_dir).glob("*.jsonl"))
    return {r["custom_id"] for path in files for r in read_results(path) if r["result"]["type"] == "succeeded"}


def pending(journal: Journal, response_dir: str | Path) -> set[str]:
    """The custom_ids in batches whose answers are not in the folder yet."""
    stored = {path.stem for path in Path(response_dir).glob("*.jsonl")}
    return {i for batch in journal.batches if batch["batch_id"] not in stored for i in batch["custom_ids"]}


class Totals(NamedTuple):
    """What answer files hold."""

    types: Counter  # requests by type: succeeded, errored, expired, canceled
    tokens: dict[str, tuple[int, int]]  # input and output tokens by model

    def report(self, price_ratio: float) -> str:
        """One line for people: requests by type, tokens, and what they cost."""
        types = ", ".join(f"{n:,} {name}" for name, n in sorted(self.types.items())) or "no answers"
        n_input, n_output = (sum(tokens[side] for tokens in self.tokens.values()) for side in (0, 1))
        costs = [cost(model, *tokens, price_ratio) for model, tokens in self.tokens.items()]
        price = "price unknown" if None in costs else f"{sum(costs):,.2f} USD"
        return f"{types}; {n_input:,} input and {n_output:,} output tokens, {price}"


def add_up(paths: Iterable[Path]) -> Totals:
    types: Counter = Counter()
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


def cost(model: str, n_input: float, n_output: float, price_ratio: float) -> float | None:
    """USD for tokens of a model; None when PRICES does not have it. A dated name has the price of the plain one."""
    names = [name for name in PRICES if model == name or model.startswith(name + "-20")]
    if not names:
        return None
    in_price, out_price = PRICES[names[0]]
    return price_ratio * (n_input * in_price + n_output * out_price) / 1e6


# ---- sending


def as_json(request: dict) -> bytes:
    """A request as the client sends it."""
    return json.dumps(request, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


@contextlib.contextmanager
def spooled(requests: Iterable[dict], folder: Path) -> Iterator["Requests"]:
    """Requests in a nameless temporary file in `folder` (a full run has a gigabyte of them), gone with the process."""
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


class Requests(NamedTuple):
    file: BinaryIO  # a line of JSON a request, as it will be sent
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

    def batches(self, max_requests: int, max_bytes: int = MAX_BYTES) -> Iterator[list[dict]]:
        """Batches within the API's limits; bytes are those of the body that is sent."""
        batch: list[dict] = []
        size = len(_EMPTY)
        for line in self.lines():
            if batch and (len(batch) == max_requests or size + len(line) > max_bytes):
                yield batch
                batch, size = [], len(_EMPTY)
            batch.append(json.loads(line))
            size += len(line) + 1  # the comma between two
        if batch:
            yield batch


def estimate_input_tokens(client, requests: Requests) -> tuple[float, str]:
    """All requests' input tokens, and how they were found: counted by the API on a sample, in proportion to bytes."""
    import anthropic

    n_tokens = n_bytes = n_counted = 0
    patient = client.with_options(max_retries=6)  # counting has a rate limit of its own
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


def announce(client, requests: Requests, output_tokens: float, price_ratio: float) -> None:
    """Print the number of requests, their tokens and their price. output_tokens: assumed for an answer."""
    params = json.loads(requests.sample(1)[0])["params"]
    n_input, how = estimate_input_tokens(client, requests)
    n_output = requests.n * output_tokens
    price, most = (
        cost(params["model"], n_input, n, price_ratio) for n in (n_output, requests.n * params["max_tokens"])
    )
    mode = "in batch mode" if price_ratio == BATCH_PRICE_RATIO else "at the full price"
    print(f"{requests.n:,} requests to {params['model']}, about {n_input:,.0f} input tokens ({how}).")
    if price is None:
        print(f"The price is not known: batches.PRICES does not have {params['model']}.")
    else:
        print(
            f"About {price:,.2f} USD {mode}, assuming {output_tokens:,.0f} output tokens an answer; "
            f"at most {most:,.2f} USD, if every answer had {params['max_tokens']:,}."
        )


def require_consent_possible(yes: bool, dry_run: bool) -> None:
    """Raise InputError when nobody is there to be asked."""
    if not (yes or dry_run or sys.stdin.isatty()):
        raise InputError("Nobody is at the keyboard to agree to the price; pass --yes, or --dry_run to see it.")


def may_send(yes: bool, dry_run: bool) -> bool:
    """Whether to send what was announced; asks unless one of the options says."""
    agreed = not dry_run and (yes or input("Send them? [y/N] ").strip().lower() in ("y", "yes"))
    if not agreed:
        print("Nothing was sent.")
    return agreed


def send(client, journal: Journal, requests: Requests, requests_per_batch: int, settle_s: float) -> None:
    """Create batches of the requests. Call `reconcile` first; see the module's docstring for what may go wrong."""
    with progress_bar(total=requests.n, desc="sending", unit="request") as bar:
        for batch in requests.batches(min(max(requests_per_batch, 1), MAX_REQUESTS)):
            create_batch(client, journal, batch, settle_s)
            bar.update(len(batch))


def create_batch(client, journal: Journal, requests: list[dict], settle_s: float) -> None:
    """Create one batch, exactly one, and note its id in the journal.

    Raises the API's error when it refuses the batch, or when CREATE_ATTEMPTS have failed.
    """
    import anthropic

    for attempt in range(1, CREATE_ATTEMPTS + 1):
        newest = client.messages.batches.list(limit=100)
        journal.intend([request["custom_id"] for request in requests], newest.data)
        try:
            # The client's own retries would create a second batch after an error that comes late.
            batch = client.with_options(max_retries=0).messages.batches.create(requests=requests)
            journal.created(batch)
            return
        except (anthropic.RateLimitError, anthropic.OverloadedError) as error:  # nothing was created
            journal.forget()
            if attempt == CREATE_ATTEMPTS:
                raise
            wait = _wait_before(attempt, error)
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


def reconcile(client, journal: Journal, settle_s: float) -> bool:
    """Find out whether the last batch was created, if the journal does not know. True when it was found.

    Waits until settle_s seconds after the intent: the API may list a batch late. Raises InputError when several batches
    could be it.
    """
    intent = journal.unclear()
    if intent is None:
        return False
    age = (datetime.now(UTC) - datetime.fromisoformat(intent["intended_at"])).total_seconds()
    until = time.monotonic() + min(max(settle_s - age, 0), settle_s)
    wait = duration(until - time.monotonic())
    print(f"Looking for the last batch in the API's list, for {wait} if it is not there.", file=sys.stderr)
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
                "again when they have ended, or write the right id there as batch_id, or delete that line if none is."
            )
        if left <= 0:
            journal.forget()
            print("It was not created.", file=sys.stderr)
            return False
        time.sleep(min(left, 5))


def new_batches(client, journal: Journal) -> list:
    """Batches in the API's list that were not there at the time of the journal's intent, and are not in the journal."""
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


def may_be(client, batch, custom_ids: list[str]) -> bool:
    """Whether a batch may hold these requests. Which ones it holds can be read only when it has ended."""
    import anthropic
    import httpx2  # the client's transport, whose errors it hands through in a stream

    if n_requests(batch) != len(custom_ids):
        return False
    if batch.processing_status != "ended" or not batch.results_url:
        return True
    try:
        return {result.custom_id for result in client.messages.batches.results(batch.id)} == set(custom_ids)
    except (anthropic.AnthropicError, httpx2.HTTPError, ValueError):
        return True


def n_requests(batch) -> int:
    counts = batch.request_counts
    return counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired


# ---- retrieving


def retrieve(client, journal_path: str | Path, out_dir: str | Path, wait: bool, poll_s: float) -> list[str]:
    """Store the answers of each batch that has ended, whole, as out_dir/BATCH_ID.jsonl. Returns the ids still open.

    With `wait` it looks every poll_s seconds until all have ended. When the others are stored, raises InputError for a
    batch whose answers are gone, or are not those of the journal, or do not come whole after RESULTS_ATTEMPTS.
    """
    import anthropic

    refused: dict[str, str] = {}
    while True:
        # Read at each look: more may have been sent meanwhile.
        batches = {b["batch_id"]: b["custom_ids"] for b in Journal(Path(journal_path)).batches if b["batch_id"]}
        stored = {path.stem for path in Path(out_dir).glob("*.jsonl")}
        open_ids = [batch_id for batch_id in batches if batch_id not in stored and batch_id not in refused]
        waiting = []
        for batch_id in progress_bar(open_ids, desc="batches", unit="batch"):
            try:
                if not store_results(client, batch_id, batches[batch_id], Path(out_dir)):
                    waiting.append(batch_id)
            except InputError as error:
                refused[batch_id] = str(error)
            except (anthropic.APIConnectionError, anthropic.RateLimitError, anthropic.InternalServerError) as error:
                if not wait:
                    raise
                print(explain(error), file=sys.stderr)
                waiting.append(batch_id)
        if not (wait and waiting):
            break
        print(f"{len(waiting)} of {len(batches)} batches have not ended; next look in {duration(poll_s)}.")
        time.sleep(poll_s)
    if refused:
        others = f" ({len(refused) - 1} more batches have a fault.)" if len(refused) > 1 else ""
        raise InputError(next(iter(refused.values())) + others)
    return waiting


def store_results(client, batch_id: str, custom_ids: list[str], out_dir: Path) -> bool:
    """Store a batch's answers if it has ended. Returns whether it has."""
    import anthropic
    import httpx2

    try:
        batch = client.messages.batches.retrieve(batch_id)
    except anthropic.NotFoundError:
        raise InputError(
            f"The API does not know batch {batch_id}; use the key of the workspace that sent it, or remove its line "
            "from the journal to send its requests again."
        ) from None
    if batch.processing_status != "ended":
        return False
    if batch.archived_at or not batch.results_url:
        raise InputError(
            f"The answers of batch {batch_id} are gone, the API keeps them {RESULTS_KEPT_DAYS} days; remove its line "
            "from the journal to send its requests again."
        )
    if n_requests(batch) != len(custom_ids):
        raise InputError(
            f"Batch {batch_id} has {n_requests(batch):,} requests, the journal says {len(custom_ids):,}; correct its "
            "line there."
        )
    for attempt in range(1, RESULTS_ATTEMPTS + 1):
        try:
            with atomic_path(out_dir / f"{batch_id}.jsonl") as temporary:
                write_results(client, batch, custom_ids, temporary)
            return True
        except (Cut, httpx2.HTTPError, ValueError) as error:
            reason = f"{error}; attempt {attempt} of {RESULTS_ATTEMPTS}"
            print(f"The answers of {batch_id} broke off ({reason}).", file=sys.stderr)
            time.sleep(min(2.0**attempt, LONGEST_WAIT_S) if attempt < RESULTS_ATTEMPTS else 0)
    raise InputError(f"The answers of batch {batch_id} do not come whole; run again later to fetch them.")


class Cut(Exception):
    """Other answers came than the batch has."""


def write_results(client, batch, custom_ids: list[str], path: Path) -> None:
    """Write a batch's answers as they come. Raises Cut, or what the connection raises, when they are not whole."""
    types: Counter = Counter()
    missing = set(custom_ids)
    with open(path, "w", encoding="utf-8") as file:
        for result in client.messages.batches.results(batch.id):
            line = result.to_dict(mode="json")
            if line["custom_id"] not in missing:
                raise InputError(
                    f"Batch {batch.id} answers {line['custom_id']!r}, which its line in the journal does not have (or "
                    "twice); correct that line."
                )
            missing.remove(line["custom_id"])
            types[line["result"]["type"]] += 1
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    counts = {name: getattr(batch.request_counts, name) for name in ("succeeded", "errored", "canceled", "expired")}
    if missing or any(types[name] != n for name, n in counts.items()):
        raise Cut(f"{types.total():,} answers came, the batch has {counts}")
