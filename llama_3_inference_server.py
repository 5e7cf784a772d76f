"""Serve Llama 3 to other programs: OpenAI's API, with steering by latents in every request, and inspection.

Reads   LLAMA_MODEL_DIR; SAE_MODEL_PATH and what lies beside it. Without either: SmolLM2 and its reference SAE if
        fetch_model.py has fetched it, else the embedded tiny Llama and its. With a model and no SAE: completions and
        chats without steering
Writes  nothing; serves on HOST:PORT until Ctrl-C
Method  Requests share forward passes, each with its own steering (serving/engine.py). docs/api.md has examples

    python llama_3_inference_server.py
    python llama_3_inference_server.py --llama_model_dir models/llama_3.2-3B-Instruct --sae_model_path data/sae.pth
    LLAMA_API_KEY=secret python llama_3_inference_server.py --host 0.0.0.0   # for other machines
"""

from typing import Literal

from pipeline.options import Count, CountOrZero, NotNegative, Port, Positive, parse_constants
from pipeline.run import run

LLAMA_MODEL_DIR: str | None = (
    None  # Llama folder; when not given: the SAE's, else SmolLM2's if fetched, else the tiny one
)
SAE_MODEL_PATH: str | None = None  # the SAE; the model's reference SAE in llama_3/ when not given
SAE_LAYER_IDX: CountOrZero | None = None  # for an SAE without a JSON: its layer, at attention_norm (published SAE: 22)
K: Count | None = None  # for an SAE without a JSON: latents kept per token (published SAE: 64)
NORMALIZE_EPS: NotNegative | None = None  # for an SAE without a JSON (published SAE: 1e-6)
ROPE_SCALING_FACTOR: Positive | None = None  # overrides the checkpoint's (published SAE's activations: 8)
CONTROL_VECTORS: list[str] = []  # GGUF files that requests may steer with: of control_vectors.py, repeng or llama.cpp
VECTOR_SCALES: list[float] = [1.0]  # their scales unless a request says otherwise, one for each or one for all
VECTOR_SHIFT: Literal[0, 1] = 0  # 1: files of llama.cpp's cvector-generator, which names each layer one too high
DEVICE = "auto"  # auto: a GPU if there is one
DTYPE: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
DATE = "auto"  # chat: today's date, written like "26 Jul 2024", or none; auto: that date from Llama 3.1 on, else none
HOST = "127.0.0.1"  # address to listen on; any other needs a key
PORT: Port = 8000  # port to listen on; 0: any free one
API_KEY: str | None = None  # what requests must carry; better in the environment: LLAMA_API_KEY
MAX_ROWS: Count = 16  # completions computed together, and most that one request may ask for
MAX_WAITING: CountOrZero = 64  # completions that may wait for a place; beyond that requests are refused with 429
MAX_PROMPT_TOKENS: Count = 2048  # longest prompt, dialogue or text
MAX_NEW_TOKENS: Count = 1024  # most tokens of a completion
GRACE_S: NotNegative = 10.0  # seconds that running completions have to end after Ctrl-C

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import asyncio
import hmac
import ipaddress
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

from latents.index import LatentIndex, Sort
from llama_3.chat import Message, encode_dialogue
from llama_3.generation import check_context, check_temperature, encode_text
from llama_3.model import Intervention
from pipeline.errors import InputError
from serving.api_answers import DONE, Choice, Head, Kind, chunk, error, opening, server_sent, usage, whole
from serving.api_bodies import ChatBody, CompletionBody, ContrastBody, Generation, InspectBody, MessageBody
from serving.api_page import api_page
from serving.api_steering import asked_for, resolve
from serving.engine import Ended, Engine, Full, Row, ShuttingDown
from serving.growing_text import GrowingText, Piece
from serving.inspection import card_json, contrast, encode_asked, inspect
from serving.metrics import CONTENT_TYPE, Metrics, exposition
from serving.steered_model import (
    ModelChoice,
    Sampling,
    SteeredModel,
    VectorChoice,
    open_model,
    taken_from,
    with_control_vectors,
)

T = TypeVar("T")

_BYTES_PER_TOKEN = 64  # of the largest body that is read: long tokens, written in JSON's escapes
_USUAL_TOKENS = 16  # of a completion whose request does not say, as with OpenAI
_BODY_S = 30.0  # seconds in which a body must arrive
_OPEN_PATHS = ("/", "/health", "/docs", "/openapi.json")  # need no key
_ABOUT = (
    "OpenAI's completions and chats with a Llama, steered in every request by latents of its sparse autoencoder, and "
    "what its latents say about a text."
)


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    max_rows: int
    max_prompt_tokens: int
    max_new_tokens: int

    @property
    def body_bytes(self) -> int:
        return 2**20 + _BYTES_PER_TOKEN * self.max_prompt_tokens * self.max_rows


@dataclass(frozen=True)
class Served:
    """What all requests share."""

    opened: SteeredModel
    index: LatentIndex | None  # None without an SAE
    engine: Engine
    limits: Limits
    metrics: Metrics
    reading_cards: threading.Lock  # a card of the tiny Llama's computes with the model

    @property
    def model_id(self) -> str:
        return Path(self.opened.choice.model_dir).name

    def need_index(self) -> LatentIndex:
        if self.index is None:
            raise InputError("This server has no SAE, so there are no latents; start it with --sae_model_path.")
        return self.index


# ---- a request, from its body to its rows


@dataclass(frozen=True)
class Asked:
    """A request that can be run."""

    head: Head
    prompts: list[list[int]]
    n: int  # choices of each
    max_new_tokens: int
    temperature: float
    top_p: float
    stops: list[str]
    n_logprobs: int | None
    steering: list[Intervention]

    @property
    def n_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def completion_asked(served: Served, body: CompletionBody) -> Asked:
    """Raises InputError for what cannot be done."""
    given = body.prompt
    is_one = isinstance(given, str) or all(isinstance(each, int) for each in given)
    several = [given] if is_one else given
    prompts = [encode_prompt(served, each) for each in several]
    max_new_tokens = body.max_tokens or min(_USUAL_TOKENS, served.limits.max_new_tokens)
    return asked(served, body, "completion", prompts, max_new_tokens, body.logprobs)


def encode_prompt(served: Served, prompt: Any) -> list[int]:
    """prompt: a text, or its tokens."""
    tokenizer = served.opened.tokenizer
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    if not prompt:
        raise InputError("A prompt holds no tokens; give at least one.")
    if unknown := [i for i in prompt if not 0 <= i < tokenizer.vocab_size]:
        raise InputError(f"There is no token {unknown[0]}; this model has tokens 0 to {tokenizer.vocab_size - 1}.")
    return prompt


def chat_asked(served: Served, body: ChatBody) -> Asked:
    """Raises InputError for what cannot be done."""
    opened = served.opened
    prompt = encode_dialogue(opened.tokenizer, messages_of(body.messages), opened.date)
    room = max(1, min(served.limits.max_new_tokens, opened.model.args.max_seq_len - len(prompt)))
    max_new_tokens = body.max_completion_tokens or body.max_tokens or room
    n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return asked(served, body, "chat", [prompt], max_new_tokens, n_logprobs)


def messages_of(given: Sequence[MessageBody]) -> list[Message]:
    return [Message("system" if each.role == "developer" else each.role, each.content) for each in given]


def asked(
    served: Served, body: Generation, kind: Kind, prompts: list[list[int]], max_new_tokens: int, n_logprobs: int | None
) -> Asked:
    limits, n = served.limits, body.n or 1
    if len(prompts) * n > limits.max_rows:
        raise InputError(f"The request is for {len(prompts) * n} completions, but the limit is {limits.max_rows}.")
    if max_new_tokens > limits.max_new_tokens:
        raise InputError(f"max_tokens is {max_new_tokens:,}, but the limit is {limits.max_new_tokens:,}; lower it.")
    for prompt in prompts:
        if len(prompt) > limits.max_prompt_tokens:
            raise InputError(
                f"The prompt has {len(prompt):,} tokens, but the limit is {limits.max_prompt_tokens:,}; shorten it."
            )
        check_context(served.opened.model, len(prompt), max_new_tokens)
    temperature = 1.0 if body.temperature is None else body.temperature
    check_temperature(temperature)
    steering, applied = resolve(asked_for(body.steering, body.controller), served.opened, served.index)
    seed = secrets.randbits(32) if body.seed is None else body.seed
    return Asked(
        Head(kind, served.model_id, applied, seed),
        prompts,
        n,
        max_new_tokens,
        temperature,
        1.0 if body.top_p is None else body.top_p,
        body.stop or [],
        n_logprobs,
        steering,
    )


class Running:
    """A request's rows in the engine, and their events in this loop. `close` lets the rows go."""

    def __init__(self, served: Served, request: Asked):
        """Raises Full and ShuttingDown."""
        self.served, self.request = served, request
        self.choices: list[Choice] = []
        self.rows: list[Row] = []
        self._events: asyncio.Queue[tuple[int, Piece | Ended]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._began = time.monotonic()
        self._had_token = False
        tokenizer = served.opened.tokenizer
        prompts = [prompt for prompt in request.prompts for _ in range(request.n)]
        sampling = Sampling(request.max_new_tokens, request.temperature, request.top_p, request.head.seed)
        for number, (prompt, seed) in enumerate(zip(prompts, sampling.seeds(len(prompts)), strict=True)):
            self.choices.append(Choice(tokenizer, request.n_logprobs is not None))
            text = GrowingText(tokenizer, prompt, request.stops, lambda event, number=number: self._tell(number, event))
            self.rows.append(
                Row(
                    prompt,
                    request.max_new_tokens,
                    tokenizer.stop_ids,
                    text,
                    request.temperature,
                    request.top_p,
                    seed,
                    request.steering,
                    request.n_logprobs,
                )
            )
        served.engine.submit(self.rows)

    def _tell(self, number: int, event: Piece | Ended) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    async def next(self) -> tuple[int, Piece | Ended]:
        """The next event of any row, added to its choice. Raises the error of a row that failed."""
        number, event = await self._events.get()
        if not self._had_token and isinstance(event, Piece):
            self._had_token = True
            self.served.metrics.first_token.add(time.monotonic() - self._began)
        if isinstance(event, Ended) and event.reason in ("error", "cancelled"):
            raise event.error or ShuttingDown("The request was cancelled.")
        self.choices[number].add(event)
        return number, event

    @property
    def has_ended(self) -> bool:
        return all(choice.ended for choice in self.choices)

    def close(self) -> None:
        self.served.engine.cancel(self.rows)
        self.served.metrics.whole.add(time.monotonic() - self._began)


class Chunks(StreamingResponse):
    """An answer in server-sent events. A client that leaves lets its rows go, whatever the stream waits for."""

    def __init__(self, running: Running, first: tuple[int, Piece | Ended], includes_usage: bool):
        super().__init__(self._chunks(first, includes_usage), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self.running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.running.close()

    async def _chunks(self, event: tuple[int, Piece | Ended], includes_usage: bool) -> AsyncIterator[bytes]:
        running, head = self.running, self.running.request.head
        nothing = {"usage": None} if includes_usage else {}
        yield server_sent({**opening(head, len(running.choices)), **nothing})
        while True:
            number, what = event
            yield server_sent({**chunk(head, number, running.choices[number], what), **nothing})
            if running.has_ended:
                break
            try:
                event = await running.next()
            except Exception as failure:
                yield server_sent(error(*status_and_message(failure)))
                return
        if includes_usage:
            used = usage(running.request.n_prompt_tokens, running.choices)
            yield server_sent({**head.fields(True), "choices": [], "usage": used})
        yield DONE


async def answer(served: Served, http: Request, body: Generation, request: Asked) -> Response:
    """The whole answer, or, once there is a first token, a stream of it."""
    running = Running(served, request)
    try:
        first = await while_connected(http, running.next())
        if body.stream:
            includes_usage = bool(body.stream_options and body.stream_options.include_usage)
            return Chunks(running, first, includes_usage)
        await while_connected(http, until_ended(running))
    except BaseException:
        running.close()
        raise
    running.close()
    return JSONResponse(whole(request.head, running.choices, request.n_prompt_tokens))


async def until_ended(running: Running) -> None:
    while not running.has_ended:
        await running.next()


class NoSuchModel(HTTPException):
    """A request names another model than the server's."""


class Disconnected(Exception):
    """The client has left before its answer."""


async def while_connected(http: Request, work: Awaitable[T]) -> T:
    """What the work gives; it is cancelled, and Disconnected raised, if the client leaves."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise Disconnected
    finally:
        for task in tasks:
            task.cancel()


async def worked(served: Served, http: Request, steps: Generator[None, None, T]) -> T:
    """What a generator returns that the engine advances between its steps."""
    return await while_connected(http, asyncio.wrap_future(served.engine.work(steps)))


# ---- errors


def status_and_message(failure: Exception) -> tuple[int, str]:
    if isinstance(failure, InputError):
        return 400, str(failure)
    if isinstance(failure, Full):
        return 429, str(failure)
    if isinstance(failure, ShuttingDown):
        return 503, str(failure)
    return 500, "The server failed; its log says why."


def what_is_wrong(failure: RequestValidationError) -> tuple[str, str | None]:
    """The first mistake in a body or an address as a sentence, and the field it is in."""
    first = failure.errors()[0]
    place = [str(each) for each in first["loc"][1:]]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return f"The body is not JSON ({first['ctx']['error']}, character {place[0]}); correct it.", None
    if first["type"] == "missing" and not place:
        return "There is no body; send JSON with Content-Type: application/json.", None
    if first["type"] == "model_attributes_type" and not place:
        return "The body is not a JSON object, or was sent without Content-Type: application/json; correct it.", None
    if first["type"] == "extra_forbidden":
        return f"Unrecognized request argument: {'.'.join(place)}; leave it out.", ".".join(place)
    name = ".".join(place)
    return (f"{name}: {message}; correct it." if name else f"{message}."), name or None


def add_error_answers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, failure: RequestValidationError) -> Response:
        message, param = what_is_wrong(failure)
        return JSONResponse(error(400, message, param=param), 400)

    @app.exception_handler(AnyHTTPException)
    async def refused(http: Request, failure: AnyHTTPException) -> Response:
        message = failure.detail
        if message == "Not Found":
            message = f"There is no {http.url.path} here; /docs lists what there is."
        elif message == "Method Not Allowed":
            message = f"{http.url.path} does not take {http.method}; /docs says what it takes."
        elif message == "There was an error parsing the body":
            message = "The body cannot be read as JSON; correct it."
        code = "model_not_found" if isinstance(failure, NoSuchModel) else None
        return JSONResponse(error(failure.status_code, message, code), failure.status_code, failure.headers)

    @app.exception_handler(Disconnected)
    async def gone(http: Request, failure: Disconnected) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def failed(http: Request, failure: Exception) -> Response:
        status, message = status_and_message(failure)
        headers = {"Retry-After": str(failure.retry_after)} if isinstance(failure, Full) else None
        code = "rate_limit_exceeded" if status == 429 else None
        return JSONResponse(error(status, message, code), status, headers)

    for kind in (InputError, Full, ShuttingDown, Exception):
        app.exception_handler(kind)(failed)


# ---- who may enter


class Door:
    """Around the app: asks for the key, refuses addresses that a web page could have forged, counts responses, and
    neither waits for a body for ever nor reads one of any size."""

    def __init__(self, app: ASGIApp, served: Served, api_key: str | None):
        self.app, self.metrics, self.max_bytes = app, served.metrics, served.limits.body_bytes
        self.api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(event: Event) -> None:
            if event["type"] == "http.response.start":
                route = scope.get("route")
                self.metrics.responses[getattr(route, "path", "other"), event["status"]] += 1
            await send(event)

        if (refusal := self._refusal(scope)) is not None:
            return await refusal(scope, receive, counted)
        deadline, n_bytes, has_body = time.monotonic() + _BODY_S, 0, False

        async def received() -> Event:
            nonlocal has_body, n_bytes
            if has_body:
                return await receive()
            try:
                event = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                message = f"The body did not arrive within {_BODY_S:g} seconds; send it at once."
                raise HTTPException(408, message, {"Connection": "close"}) from None
            has_body = not event.get("more_body", False)
            n_bytes += len(event.get("body", b""))
            if n_bytes > self.max_bytes:
                message = f"The body has over {self.max_bytes:,} bytes, which is the limit; shorten it."
                raise HTTPException(413, message, {"Connection": "close"})
            return event

        try:
            return await self.app(scope, received, counted)
        except Exception:  # answered further out, with 500
            self.metrics.responses[getattr(scope.get("route"), "path", "other"), 500] += 1
            raise

    def _refusal(self, scope: Scope) -> Response | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self.api_key is None:
            # A web page can send requests to 127.0.0.1 under a name of its own; a client of ours names no other host.
            if is_loopback(host_of(headers.get("host", ""))):
                return None
            return JSONResponse(error(403, "Without a key this server answers only to 127.0.0.1 and localhost."), 403)
        given = headers.get("authorization", "").removeprefix("Bearer ").encode()
        if scope["path"] in _OPEN_PATHS or hmac.compare_digest(given, self.api_key.encode()):
            return None
        message = "The API key is missing or wrong; send it as Authorization: Bearer KEY."
        return JSONResponse(error(401, message, "invalid_api_key"), 401, {"WWW-Authenticate": "Bearer"})


def host_of(header: str) -> str:
    """The host in a Host header, without its port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# ---- the app


def build(served: Served, api_key: str | None) -> FastAPI:
    app = FastAPI(
        title=f"{served.opened.choice.name}, steered",
        description=_ABOUT,
        version="1",
        docs_url=None,
        redoc_url=None,
    )
    add_error_answers(app)
    add_openai(app, served)
    add_latents(app, served)
    add_state(app, served)
    app.add_middleware(Door, served=served, api_key=api_key)
    return app


def check_model(served: Served, name: str | None) -> None:
    """Raise a 404 for another model than the server's."""
    if name not in (None, "", served.model_id):
        raise NoSuchModel(404, f"There is no model {name!r}; this server has {served.model_id}.")


def add_openai(app: FastAPI, served: Served) -> None:
    sae = served.opened.sae
    about_sae = None if sae is None else {"path": served.opened.sae_path, "site": sae.info["site"]}
    if sae is not None and about_sae is not None:
        default = served.opened.defaults
        about_sae |= {"n_latents": sae.n_latents, "k": sae.k, "mode": default.mode, "strength": default.strength}
    model = {"id": served.model_id, "object": "model", "created": int(time.time()), "owned_by": "local"}
    vectors = {name: {"scale": each.scale, "where": each.where} for name, each in served.opened.control_vectors.items()}
    model |= {"max_model_len": served.opened.model.args.max_seq_len, "sae": about_sae, "control_vectors": vectors}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model, and its SAE."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> dict[str, Any]:
        """The model, if it has this name."""
        check_model(served, model_id)
        return model

    @app.post("/v1/completions")
    async def completions(http: Request, body: CompletionBody) -> Response:
        """Continue a text or several, steered or not."""
        check_model(served, body.model)
        return await answer(served, http, body, await run_in_threadpool(completion_asked, served, body))

    @app.post("/v1/chat/completions")
    async def chat(http: Request, body: ChatBody) -> Response:
        """The assistant's next message in a dialogue, steered or not."""
        check_model(served, body.model)
        return await answer(served, http, body, await run_in_threadpool(chat_asked, served, body))


def add_latents(app: FastAPI, served: Served) -> None:
    @app.get("/v1/latents")
    async def latents(
        search: str = Query("", max_length=200, description="words of the meaning, or a latent's number"),
        sort: Sort = "interesting",
        limit: int = Query(20, ge=1, le=200),
        offset: int = Query(0, ge=0),
    ) -> dict[str, Any]:
        """The latents whose meaning has all words of the search."""
        index = served.need_index()
        rows = await run_in_threadpool(index.search, search, sort, limit, offset)
        return {"object": "list", "data": rows, "total": index.count(search)}

    @app.get("/v1/latents/{latent}")
    async def card(latent: int, n_sentences: int = Query(10, ge=0, le=50)) -> dict[str, Any]:
        """Everything known about a latent, and how to steer by it."""
        index = served.need_index()
        if not 0 <= latent < index.n_latents:
            raise HTTPException(404, f"There is no latent {latent}; this SAE has latents 0 to {index.n_latents - 1}.")

        def read() -> dict[str, Any]:
            with served.reading_cards:
                return card_json(served.opened, index, latent, n_sentences)

        return await run_in_threadpool(read)

    @app.post("/v1/latents/inspect")
    async def look_inside(http: Request, body: InspectBody) -> dict[str, Any]:
        """The strongest latents of each token of a text or a dialogue."""
        check_model(served, body.model)
        index = served.need_index()
        what = body.text if body.messages is None else messages_of(body.messages)
        assert what is not None
        ids = await run_in_threadpool(encode_asked, served.opened, what, served.limits.max_prompt_tokens)
        rows = await worked(served, http, inspect(served.opened, index, ids, body.top_k))
        return {"object": "list", "data": rows, "usage": {"prompt_tokens": len(ids), "total_tokens": len(ids)}}

    @app.post("/v1/latents/contrast")
    async def tell_apart(http: Request, body: ContrastBody) -> dict[str, Any]:
        """The latents that tell two sets of texts or dialogues apart, ranked, ready for steering."""
        check_model(served, body.model)
        index = served.need_index()

        def encode() -> tuple[list[list[int]], list[list[int]]]:
            texts = lambda given: [each if isinstance(each, str) else messages_of(each) for each in given]
            encoded = lambda each: encode_asked(served.opened, each, served.limits.max_prompt_tokens)
            return list(map(encoded, texts(body.positive))), list(map(encoded, texts(body.negative)))

        positive, negative = await run_in_threadpool(encode)
        found = await worked(served, http, contrast(served.opened, index, positive, negative, body.top_k))
        n = sum(map(len, positive + negative))
        return {"object": "contrast", **found, "usage": {"prompt_tokens": n, "total_tokens": n}}


def add_state(app: FastAPI, served: Served) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server is there, and how busy it is."""
        rows = {"rows": served.engine.n_rows, "waiting": served.engine.n_waiting, "max_rows": served.limits.max_rows}
        return {"status": "ok", "model": served.model_id, **rows}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(exposition(served.metrics, served.engine), media_type=CONTENT_TYPE)

    @app.get("/docs", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def docs(http: Request) -> Response:
        return HTMLResponse(api_page(app.openapi(), str(http.base_url).rstrip("/")))


# ---- the server


class Server(uvicorn.Server):
    """uvicorn's, which asks the engine to end when it shuts down."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace_s: float):
        super().__init__(config)
        self.engine, self.grace_s = engine, grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.close(self.grace_s)
        await super().shutdown(sockets)


def open_served(choice: ModelChoice, vectors: VectorChoice, max_waiting: int, limits: Limits) -> Served:
    """Load everything, and start the engine. Raises InputError for what does not fit together."""
    opened = with_control_vectors(open_model(choice, needs_sae=choice.sae_path is not None), vectors)
    index = None
    if opened.sae is not None:
        index = LatentIndex(opened.sae_path, opened.tokenizer, opened.model, opened.sae)
        for line in index.missing:
            print(line, file=sys.stderr)
        _ = opened.highest, opened.defaults  # read once, before requests share them
    with torch.inference_mode():
        opened.model(torch.zeros(1, 1, dtype=torch.long, device=opened.model.device))  # packs the weights
    engine = Engine(opened.model, limits.max_rows, max_waiting)
    return Served(opened, index, engine, limits, Metrics(), threading.Lock())


def check_access(host: str, api_key: str | None) -> None:
    if api_key is None and not is_loopback(host):
        raise InputError(f"--host {host} lets other machines in; set a key: LLAMA_API_KEY=... or --api_key.")


def listen(host: str, port: int) -> socket.socket:
    """Raises InputError where one cannot listen."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512
        )
    except (OSError, OverflowError) as failure:
        reason = (getattr(failure, "strerror", None) or str(failure)).partition(" (")[0]
        raise InputError(f"Cannot listen on {host}:{port} ({reason}); choose another --port or --host.") from None


def make_server(served: Served, api_key: str | None, grace_s: float) -> Server:
    config = uvicorn.Config(
        build(served, api_key),
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=int(grace_s) + 5,  # for readers that are slow
        server_header=False,
    )
    return Server(config, served.engine, grace_s)


def serve(served: Served, listening: socket.socket, api_key: str | None, grace_s: float) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"Ready: {address}/v1 ({served.model_id}; {address}/docs; Ctrl-C ends it)", flush=True)
    try:
        make_server(served, api_key, grace_s).run([listening])
    except KeyboardInterrupt:  # raised by uvicorn after it has shut down
        print("Stopped.", file=sys.stderr)
    finally:
        served.engine.close()
        served.engine.join()


def main() -> None:
    config = parse_constants(globals())
    api_key = config.api_key or os.environ.get("LLAMA_API_KEY") or None
    check_access(config.host, api_key)
    listening = listen(config.host, config.port)
    choice, vectors = taken_from(vars(config), ModelChoice), taken_from(vars(config), VectorChoice)
    print(f"Loading {choice.name} ...", file=sys.stderr, flush=True)
    limits = Limits(config.max_rows, config.max_prompt_tokens, config.max_new_tokens)
    serve(open_served(choice, vectors, config.max_waiting, limits), listening, api_key, config.grace_s)


if __name__ == "__main__":
    run(main)
