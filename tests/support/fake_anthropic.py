"""A local server that speaks Anthropic's Message Batches and Messages protocols, and misbehaves on request.

Tests reach it through the real client: `with FakeAnthropic() as server:` and `ANTHROPIC_BASE_URL=server.url`. It runs
in the test's process, with a thread per request, so that a script in a subprocess can talk to it and be killed.

    server.plan["create"] += [Fail(429, retry_after=0.01), "create then 500"]   # for the next two calls of create
    server.answer = lambda custom_id, params: {"type": "expired"}               # the result of every request

`server.batches` has every batch that was created, `server.seen` every (endpoint, body) that arrived, so that a test can
show that nothing was lost or sent twice. Endpoints: create, list, retrieve, results, cancel, count_tokens,
messages. Behaviours: a Fail, "hang" (answer nothing until `server.release` is set), and those named in the methods.
"""

import collections
import json
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

MODELS = ("claude-haiku-5-5", "claude-sonnet-5-5")
ROUTES = (
    ("POST", r"/v1/messages/batches", "create"),
    ("GET", r"/v1/messages/batches", "list"),
    ("GET", r"/v1/messages/batches/([^/]+)", "retrieve"),
    ("GET", r"/v1/messages/batches/([^/]+)/results", "results"),
    ("POST", r"/v1/messages/batches/([^/]+)/cancel", "cancel"),
    ("POST", r"/v1/messages/count_tokens", "count_tokens"),
    ("POST", r"/v1/messages", "messages"),
)
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
NO_CREDIT = (
    "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to upgrade or purchase "
    "credits."
)


class Fail(NamedTuple):
    """Answer with an error instead."""

    status: int
    message: str = "not now"
    retry_after: float | None = 0.01


class Batch:
    def __init__(self, number: int, requests: list[dict]):
        self.id = f"msgbatch_{number:04d}"
        self.requests = requests
        self.created_at = datetime(2026, 11, 21, tzinfo=UTC) + timedelta(seconds=number)
        self.results: list[dict] | None = None
        self.results_gone = False
        self.canceled = False

    def to_json(self, url: str) -> dict:
        types = collections.Counter(r["result"]["type"] for r in self.results or [])
        counts = {name: types[name] for name in ("succeeded", "errored", "canceled", "expired")}
        ended = self.results is not None
        stamp = lambda days: (self.created_at + timedelta(days=days)).isoformat().replace("+00:00", "Z")
        return {
            "id": self.id,
            "type": "message_batch",
            "processing_status": "ended" if ended else "canceling" if self.canceled else "in_progress",
            "request_counts": {"processing": 0 if ended else len(self.requests), **counts},
            "created_at": stamp(0),
            "ended_at": stamp(0.01) if ended else None,
            "expires_at": stamp(1),
            "archived_at": stamp(29) if self.results_gone else None,
            "cancel_initiated_at": None,
            "results_url": f"{url}/v1/messages/batches/{self.id}/results" if ended and not self.results_gone else None,
        }


def message(text: str, model: str = MODELS[0], stop_reason: str = "end_turn", n_input: int = 100) -> dict:
    """A Message as the API returns it. Output tokens: one per word."""
    return {
        "id": "msg_01",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [{"type": "text", "text": text}] if text else [],
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": {"input_tokens": n_input, "output_tokens": len(text.split()), "service_tier": "batch"},
    }


def meaning(custom_id: str, params: dict) -> dict:
    """The usual answer: a meaning that names the custom_id."""
    text = f'A thought. {{"common_semantic": "meaning of {custom_id}", "certainty": 0.75}}'
    return {"type": "succeeded", "message": message(text, params["model"])}


class FakeAnthropic:
    """The server; see the module's docstring."""

    def __init__(self, key: str = "test-key"):
        self.key = key
        self.plan: dict[str, list[Any]] = collections.defaultdict(list)
        self.answer: Callable[[str, dict], dict] = meaning
        self.looks_until_ended = 0  # how many times a batch is polled before it ends
        self.page = 1000  # most batches on a page of the list
        self.batches: list[Batch] = []
        self.seen: list[tuple[str, Any]] = []
        self.body_sizes: list[int] = []
        self.arrived = threading.Event()  # set when a call hangs
        self.release = threading.Event()  # lets it continue
        self.lock = threading.Lock()

    def __enter__(self) -> "FakeAnthropic":
        handler = type("Handler", (_Handler,), {"fake": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release.set()
        self.http.shutdown()
        self.http.server_close()

    def set_environment(self, monkeypatch: Any) -> None:
        """Let the client, here and in subprocesses, find this server."""
        monkeypatch.setenv("ANTHROPIC_BASE_URL", self.url)
        monkeypatch.setenv("ANTHROPIC_API_KEY", self.key)

    def calls(self, endpoint: str) -> int:
        return sum(name == endpoint for name, _ in self.seen)

    def sent_ids(self) -> list[str]:
        """The custom_ids of every batch that exists; these are paid for."""
        return [request["custom_id"] for batch in self.batches for request in batch.requests]

    def create(self, requests: list[dict]) -> Batch:
        batch = Batch(len(self.batches) + 1, requests)
        self.batches.append(batch)
        return batch

    def end(self, batch: Batch) -> None:
        """Process a batch; its results come in a different order from its requests."""
        if batch.results is None:
            batch.results = [
                {"custom_id": r["custom_id"], "result": self.answer(r["custom_id"], r["params"])}
                for r in reversed(batch.requests)
            ]

    def look(self, batch: Batch) -> None:
        looks = sum(name == "retrieve" and body == batch.id for name, body in self.seen)
        if looks > self.looks_until_ended:
            self.end(batch)


class _Handler(BaseHTTPRequestHandler):
    fake: FakeAnthropic
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer waits 40 ms for an acknowledgement

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_call("GET")

    def do_POST(self) -> None:
        self.handle_call("POST")

    def handle_call(self, method: str) -> None:
        length = int(self.headers.get("content-length") or 0)
        raw = self.rfile.read(length)
        path = urlsplit(self.path).path
        matches = ((name, re.fullmatch(route, path)) for m, route, name in ROUTES if m == method)
        endpoint, match = next(((name, match) for name, match in matches if match), (None, None))
        if endpoint is None:
            return self.fail(Fail(404, f"no such endpoint {path}"))
        fake = self.fake
        with fake.lock:
            argument = match.group(1) if match.groups() else json.loads(raw) if raw else None
            fake.seen.append((endpoint, argument))
            fake.body_sizes.append(length)
            behaviour = fake.plan[endpoint].pop(0) if fake.plan[endpoint] else None
        if fake.key not in (self.headers.get("x-api-key"), self.headers.get("authorization", "")[len("Bearer ") :]):
            return self.fail(Fail(401, "invalid x-api-key"))
        if isinstance(behaviour, Fail):
            return self.fail(behaviour)
        if behaviour == "hang":
            return self.hang()
        getattr(self, f"on_{endpoint}")(argument, behaviour)
        return None

    def hang(self) -> None:
        self.fake.arrived.set()
        self.fake.release.wait(60)
        self.close_connection = True

    def fail(self, fail: Fail) -> None:
        error = {"type": ERROR_TYPES.get(fail.status, "api_error"), "message": fail.message}
        headers = {} if fail.retry_after is None else {"retry-after": str(fail.retry_after)}
        self.reply({"type": "error", "error": error, "request_id": "req_01"}, fail.status, headers)

    def reply(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    # ---- batches

    def on_create(self, body: dict, behaviour: str | None) -> None:
        """Behaviours: "create then 500", "create then hang", "create then garbage", "create then cut"."""
        ids = [request["custom_id"] for request in body["requests"]]
        if len(set(ids)) != len(ids) or not all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", i) for i in ids):
            return self.fail(Fail(400, "custom_id: not unique or not well formed"))
        if not 0 < len(ids) <= 100_000:
            return self.fail(Fail(400, "requests: too many or none"))
        with self.fake.lock:
            batch = self.fake.create(body["requests"])
        if behaviour == "create then 500":
            return self.fail(Fail(500, "Internal server error"))
        if behaviour == "create then hang":
            return self.hang()
        if behaviour == "create then garbage":
            return self.reply(b"<html>Bad gateway</html>", headers={"content-type": "text/html"})
        if behaviour == "create then cut":
            self.close_connection = True
            return None
        return self.reply(batch.to_json(self.fake.url))

    def on_list(self, _: None, behaviour: str | None) -> None:
        """Behaviour: "without the newest"."""
        query = parse_qs(urlsplit(self.path).query)
        size = min(int(query.get("limit", ["20"])[0]), self.fake.page)
        newest_first = self.fake.batches[::-1][behaviour == "without the newest" :]
        ids = [batch.id for batch in newest_first]
        start = ids.index(query["after_id"][0]) + 1 if "after_id" in query else 0
        page = newest_first[start : start + size]
        self.reply(
            {
                "data": [batch.to_json(self.fake.url) for batch in page],
                "has_more": start + size < len(ids),
                "first_id": page[0].id if page else None,
                "last_id": page[-1].id if page else None,
            }
        )

    def find(self, batch_id: str) -> Batch | None:
        found = next((batch for batch in self.fake.batches if batch.id == batch_id), None)
        if found is None:
            self.fail(Fail(404, f"no batch {batch_id}"))
        return found

    def on_retrieve(self, batch_id: str, behaviour: str | None) -> None:
        if batch := self.find(batch_id):
            with self.fake.lock:
                self.fake.look(batch)
            self.reply(batch.to_json(self.fake.url))

    def on_cancel(self, batch_id: str, behaviour: str | None) -> None:
        if batch := self.find(batch_id):
            batch.canceled = True
            batch.results = [{"custom_id": r["custom_id"], "result": {"type": "canceled"}} for r in batch.requests]
            self.reply(batch.to_json(self.fake.url))

    def on_results(self, batch_id: str, behaviour: str | None) -> None:
        """Behaviours: "cut at a line end" (which looks like the end), "cut in a line", "broken off"."""
        if not (batch := self.find(batch_id)):
            return
        lines = [json.dumps(result).encode() + b"\n" for result in batch.results or []]
        data = b"".join(lines)
        if behaviour == "cut at a line end":
            data = b"".join(lines[: len(lines) // 2])
        elif behaviour == "cut in a line":
            data = data[: len(data) - len(lines[-1]) // 2]
        self.send_response(200)
        self.send_header("content-type", "application/binary")
        if behaviour == "broken off":  # fewer bytes than promised
            self.send_header("content-length", str(len(data)))
            data = data[: len(data) // 2]
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True

    # ---- messages

    def on_count_tokens(self, params: dict, behaviour: str | None) -> None:
        if params["model"] not in MODELS:
            return self.fail(Fail(404, f"model: {params['model']}"))
        return self.reply({"input_tokens": len(params["messages"][0]["content"]) // 4})

    def on_messages(self, params: dict, behaviour: str | None) -> None:
        if params["model"] not in MODELS:
            return self.fail(Fail(404, f"model: {params['model']}"))
        result = self.fake.answer("", params)
        if result["type"] != "succeeded":
            return self.fail(Fail(400, result["error"]["error"]["message"]))
        return self.reply(result["message"])
