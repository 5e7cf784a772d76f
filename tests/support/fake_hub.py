"""A local server that speaks as much of the Hugging Face hub's HTTP protocol as downloading a model or dataset needs,
and as uploading small files to a model repository does.

The hub itself lists a repository's files (with sizes and checksums) and redirects downloads: small files to one of its
own paths, large ones to a second server, the CDN, at an address that needs no token and accepts none. A dataset is a
repository whose name here starts with datasets/, as in the hub's addresses. Tests set `tokens` and `faults`, and read
in `requests` what was requested and how much was sent.
"""

import base64
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_SUFFIXES = (".pth", ".model", ".safetensors", ".bin", ".parquet")  # kept in Git LFS, as on the hub


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    sent: int = 0  # bytes of the file


@dataclass
class Fault:
    """How the next answer with a file's content goes wrong."""

    damaged: bool = False  # two bytes in the middle are changed
    stop_at: int | None = None  # nothing after this byte of the file: the connection closes, or
    stall: bool = False  # stays open


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    main: str = ""
    refs: dict[str, str] = field(default_factory=dict)  # other names of commits
    readers: set[str] | None = None  # tokens that may read; None: everybody, even without a token

    def commit(self, files: dict[str, bytes]) -> str:
        """Make `files` the newest commit; returns its id."""
        self.main = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[self.main] = files
        return self.main


def is_large(path: str) -> bool:
    return PurePosixPath(path).suffix in LARGE_SUFFIXES


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub:
    """`with FakeHub() as hub`: hub.url is for HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: set[str] = set()  # those the hub knows
        self.requests: list[Request] = []
        self.faults: dict[str, Fault] = {}  # by path of a file; each happens once
        self.status: int | None = None  # every request is answered with this status
        self.sizes: dict[str, int] = {}  # path -> a size to state that is not the file's
        self.ignore_range = False

    def __enter__(self) -> "FakeHub":
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, answer)) for answer in (_hub, _cdn)]
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        return self

    def __exit__(self, *exc: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def sent(self, path: str) -> list[Request]:
        """The requests that were answered with content from the file."""
        return [r for r in self.requests if r.path == path and r.sent]


# ---- the protocol


def _handler(hub: FakeHub, answer: Callable) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # otherwise each answer waits 40 ms for an acknowledgement

        def do_GET(self) -> None:
            answer(hub, self)

        def do_HEAD(self) -> None:
            answer(hub, self)

        def do_POST(self) -> None:
            _upload(hub, self)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


def _reply(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, object], body: bytes = b"") -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": len(body)} | headers).items():
        handler.send_header(name, str(value))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def _refuse(handler: BaseHTTPRequestHandler, status: int, code: str | None, message: str) -> None:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    _reply(handler, status, headers, json.dumps({"error": message}).encode())


def _hub(hub: FakeHub, handler: BaseHTTPRequestHandler) -> None:
    """Model info, `resolve` and the path that small files are redirected to."""
    url = urlsplit(handler.path)
    parts = [unquote(part) for part in url.path.strip("/").split("/")]
    request = Request(handler.command, url.path, handler.headers.get("Range"))
    hub.requests.append(request)
    if hub.status is not None:
        return _reply(handler, hub.status, {"Content-Type": "text/html"}, b"<html>hello</html>")
    token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
    if token and token not in hub.tokens:
        return _refuse(handler, 401, None, "Invalid credentials in Authorization header")
    kind = "datasets" if "datasets" in parts[:3] else "models"
    is_info = parts[:2] == ["api", kind]
    is_cached = parts[:3] == ["api", "resolve-cache", kind]
    parts = parts if is_info or is_cached or kind == "models" else parts[1:]
    name = "/".join(parts[3:5] if is_cached else parts[2:4] if is_info else parts[:2])
    name = name if kind == "models" else f"datasets/{name}"
    repo = hub.repos.get(name)
    if repo is None:  # without a token the hub does not tell a private repository from none
        return _refuse(handler, 404 if token else 401, "RepoNotFound" if token else None, "Repository not found")
    rest = parts[5:] if is_cached else parts[4:] if is_info else parts[3:]  # resolve-cache, revision, resolve
    revision = repo.main if is_info and not rest else rest[1] if is_info else rest[0]
    revision = ({"main": repo.main} | repo.refs).get(revision, revision)
    files = repo.commits.get(revision)
    if files is None:
        return _refuse(handler, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
    if is_info and rest[:1] == ["tree"]:
        return _reply(handler, 200, {}, _tree(files))
    if is_info:  # public for a gated repository too
        return _reply(handler, 200, {}, _model_info(hub, name, revision, files, "blobs" in parse_qs(url.query)))
    if repo.readers is not None and token not in repo.readers:
        message = f"Access to model {name} is restricted."
        return _refuse(handler, 403 if token else 401, "GatedRepo", message)
    path = "/".join(rest[1:])
    if path not in files:
        return _refuse(handler, 404, "EntryNotFound", "Entry not found")
    content = files[path]
    if is_cached:
        return _send(hub, handler, request, path, content, {"X-Repo-Commit": revision})
    headers = {"X-Repo-Commit": revision, "X-Linked-Size": len(content)}
    if is_large(path):  # the hash offers the xet protocol, which a client need not take
        sha = hashlib.sha256(content).hexdigest()
        location = f"{hub.cdn_url}/{'' if kind == 'datasets' else 'models/'}{name}/{revision}/{path}?signature=1"
        return _reply(handler, 302, headers | {"Location": location, "X-Linked-Etag": f'"{sha}"', "X-Xet-Hash": sha})
    location = f"/api/resolve-cache/{kind}/{name.removeprefix('datasets/')}/{revision}/{path}"
    _reply(handler, 307, headers | {"Location": location, "X-Linked-Etag": f'"{git_blob_id(content)}"'})
    return None


def _upload(hub: FakeHub, handler: BaseHTTPRequestHandler) -> None:
    """A repository made, how files are to come (all within the commit), and a commit of lines of JSON."""
    body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    parts = urlsplit(handler.path).path.strip("/").split("/")
    hub.requests.append(Request("POST", "/" + "/".join(parts), None))
    token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
    if token not in hub.tokens:
        return _refuse(handler, 401, None, "Invalid credentials in Authorization header")
    answer = lambda value: _reply(handler, 200, {"Content-Type": "application/json"}, json.dumps(value).encode())
    if parts == ["api", "validate-yaml"]:
        return answer({"errors": [], "warnings": []})
    if parts == ["api", "repos", "create"]:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        hub.repos.setdefault(name, Repo()).commit(hub.repos[name].commits.get(hub.repos[name].main, {}))
        return answer({"url": f"{hub.url}/{name}", "id": name})
    name = "/".join(parts[2:4])
    if parts[4] == "preupload":
        asked = json.loads(body)["files"]
        return answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
    assert parts[4] == "commit", parts
    lines = [json.loads(line) for line in body.splitlines()]
    files = dict(hub.repos[name].commits.get(hub.repos[name].main, {}))
    for line in lines:
        if line["key"] == "file":
            files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
    oid = hub.repos[name].commit(files)
    return answer({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"})


def _tree(files: dict[str, bytes]) -> bytes:
    rows = []
    for path, content in sorted(files.items()):
        row = {"type": "file", "path": path, "size": len(content), "oid": git_blob_id(content)}
        sha = hashlib.sha256(content).hexdigest()
        rows.append(row | ({"lfs": {"oid": sha, "size": len(content), "pointerSize": 1}} if is_large(path) else {}))
    return json.dumps(rows).encode()


def _model_info(hub: FakeHub, name: str, commit: str, files: dict[str, bytes], blobs: bool) -> bytes:
    siblings: list[dict] = [{"rfilename": path} for path in sorted(files)]
    for sibling in siblings if blobs else []:
        content = files[sibling["rfilename"]]
        size = hub.sizes.get(sibling["rfilename"], len(content))
        sibling |= {"size": size, "blobId": git_blob_id(content)}
        if is_large(sibling["rfilename"]):
            pointer = f"version 1\noid sha256:{hashlib.sha256(content).hexdigest()}\nsize {size}\n".encode()
            sibling["blobId"] = git_blob_id(pointer)
            sibling["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": len(pointer)}
    name = name.removeprefix("datasets/")
    return json.dumps({"id": name, "modelId": name, "sha": commit, "siblings": siblings}).encode()


def _cdn(hub: FakeHub, handler: BaseHTTPRequestHandler) -> None:
    """A file at a signed address; a request with a token is refused."""
    url = urlsplit(handler.path)
    kind, owner, name, revision, path = unquote(url.path).strip("/").split("/", 4)
    name = f"{owner}/{name}" if kind == "models" else f"{kind}/{owner}/{name}"
    request = Request(handler.command, url.path, handler.headers.get("Range"))
    hub.requests.append(request)
    if handler.headers.get("Authorization") or url.query != "signature=1":
        return _reply(handler, 400, {}, b"Only one auth mechanism allowed")
    _send(hub, handler, request, path, hub.repos[name].commits[revision][path])
    return None


def _send(
    hub: FakeHub,
    handler: BaseHTTPRequestHandler,
    request: Request,
    path: str,
    content: bytes,
    more: dict[str, object] | None = None,
) -> None:
    request.path = path
    start = 0
    headers: dict[str, object] = {"Accept-Ranges": "bytes", "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
    headers |= more or {}
    if request.range and not hub.ignore_range:
        start = int(request.range.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            return _reply(handler, 416, {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    handler.send_response(206 if start else 200)
    for name, value in ({"Content-Length": len(content) - start} | headers).items():
        handler.send_header(name, str(value))
    handler.end_headers()
    if handler.command == "HEAD":
        return None
    fault = hub.faults.pop(path, Fault())
    if fault.damaged:
        content = content[: len(content) // 2] + b"?!" + content[len(content) // 2 + 2 :]
    end = len(content) if fault.stop_at is None else fault.stop_at
    request.sent = end - start
    with contextlib.suppress(ConnectionError):  # the client was killed
        handler.wfile.write(content[start:end])
        if fault.stall:
            time.sleep(30)
    handler.close_connection = end < len(content)
    return None
