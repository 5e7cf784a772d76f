"""What the server answers, in the forms of OpenAI's API: completions, chats, their chunks, logprobs, usage, errors."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_3.tokenizer import Tokenizer
from serving.engine import Ended, Token
from serving.growing_text import Piece

Kind = Literal["completion", "chat"]

_OBJECTS = {"completion": ("text_completion", "text_completion"), "chat": ("chat.completion", "chat.completion.chunk")}
_IDS = {"completion": "cmpl", "chat": "chatcmpl"}
DONE = b"data: [DONE]\n\n"


# ---- one choice


@dataclass
class Choice:
    """A completion as it grows."""

    tokenizer: Tokenizer
    has_logprobs: bool
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # where each token's text begins
    ended: Ended | None = None

    def add(self, event: Piece | Ended) -> None:
        if isinstance(event, Ended):
            self.ended = event
            return
        if event.token is not None:
            self.tokens.append(event.token)
            self.offsets.append(len(self.text))
        self.text += event.text

    @property
    def finish_reason(self) -> str | None:
        return self.ended.reason if self.ended else None

    def logprobs(self, kind: Kind, first: int = 0) -> dict[str, Any] | None:
        """Of the tokens from number `first` on; None where they were not asked for."""
        if not self.has_logprobs:
            return None
        tokens = self.tokens[first:]
        if kind == "chat":
            return {"content": [self._chat_logprob(token) for token in tokens], "refusal": None}
        # Several tokens may be written alike, as parts of characters are: the likeliest keeps its place.
        named = lambda token: {self.tokenizer.decode([i]): logprob for i, logprob in reversed(token.likeliest)}
        return {
            "tokens": [self.tokenizer.decode([token.id]) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [named(token) for token in tokens],
            "text_offset": self.offsets[first:],
        }

    def _chat_logprob(self, token: Token) -> dict[str, Any]:
        likeliest = [self._named(i, logprob) for i, logprob in token.likeliest]
        return {**self._named(token.id, token.logprob), "top_logprobs": likeliest}

    def _named(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        try:
            in_bytes = list(self.tokenizer.token_bytes(token_id))
        except (LookupError, ValueError):  # a row of the model without a token
            in_bytes = []
        return {"token": self.tokenizer.decode([token_id]), "logprob": logprob, "bytes": in_bytes}


# ---- whole answers, and chunks of them


@dataclass(frozen=True)
class Head:
    """What all parts of an answer repeat, and what our own fields say."""

    kind: Kind
    model: str
    steering: Sequence[dict[str, Any]]  # what was applied
    seed: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self, is_chunk: bool) -> dict[str, Any]:
        name = _OBJECTS[self.kind][is_chunk]
        return {"id": f"{_IDS[self.kind]}-{self.id}", "object": name, "created": self.created, "model": self.model}

    def own(self) -> dict[str, Any]:
        return {"steering": list(self.steering), "seed": self.seed}


def usage(n_prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, int]:
    n_new = sum(len(choice.tokens) for choice in choices)
    total = n_prompt_tokens + n_new
    return {"prompt_tokens": n_prompt_tokens, "completion_tokens": n_new, "total_tokens": total}


def whole(head: Head, choices: Sequence[Choice], n_prompt_tokens: int) -> dict[str, Any]:
    """The response of a request that does not stream."""
    rows = []
    for number, choice in enumerate(choices):
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        said = {"message": message} if head.kind == "chat" else {"text": choice.text}
        logprobs = choice.logprobs(head.kind)
        rows.append({"index": number, **said, "logprobs": logprobs, "finish_reason": choice.finish_reason})
    return {**head.fields(False), "choices": rows, "usage": usage(n_prompt_tokens, choices), **head.own()}


def opening(head: Head, n_choices: int) -> dict[str, Any]:
    """The first chunk of a stream: what is steered by, and in a chat the roles."""
    roles = {"delta": {"role": "assistant", "content": ""}} if head.kind == "chat" else {"text": ""}
    rows = [{"index": i, **roles, "logprobs": None, "finish_reason": None} for i in range(n_choices)]
    return {**head.fields(True), "choices": rows, **head.own()}


def chunk(head: Head, number: int, choice: Choice, event: Piece | Ended) -> dict[str, Any]:
    """What a choice has gained with an event, which it has added already."""
    text = event.text if isinstance(event, Piece) else ""
    delta = {"content": text} if isinstance(event, Piece) else {}
    said = {"delta": delta} if head.kind == "chat" else {"text": text}
    has_token = isinstance(event, Piece) and event.token is not None
    logprobs = choice.logprobs(head.kind, len(choice.tokens) - 1) if has_token else None
    row = {"index": number, **said, "logprobs": logprobs, "finish_reason": choice.finish_reason}
    return {**head.fields(True), "choices": [row]}


def server_sent(data: dict[str, Any]) -> bytes:
    """An event of text/event-stream."""
    return b"data: " + json.dumps(data, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


# ---- errors

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
