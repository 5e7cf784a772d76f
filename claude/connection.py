"""The connection to Claude, or to a server that speaks its API, and its errors in one sentence."""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.errors import InputError, Stop

if TYPE_CHECKING:  # importing it takes most of a second
    from anthropic import Anthropic


def connect(max_retries: int = 2) -> "Anthropic":
    """The client; it reads ANTHROPIC_API_KEY and ANTHROPIC_BASE_URL. Raises InputError without a key."""
    # The client itself would notice only at its first call.
    if not (os.environ.get("ANTHROPIC_API_KEY") or os.environ.get("ANTHROPIC_AUTH_TOKEN")):
        raise InputError("There is no API key; set ANTHROPIC_API_KEY (a local server takes any word).")
    import anthropic

    return anthropic.Anthropic(max_retries=max_retries)


@contextlib.contextmanager
def api_errors() -> Iterator[None]:
    """Turn an API error into a `Stop` with one sentence."""
    import anthropic

    try:
        yield
    except anthropic.APIError as error:
        raise Stop(api_error_sentence(error)) from error


def api_error_sentence(error: Exception) -> str:
    """What went wrong with the API and what to do about it."""
    import anthropic

    status = getattr(error, "status_code", None)
    message = " ".join(str(getattr(error, "api_message", None) or error).split()).rstrip(".")
    server = os.environ.get("ANTHROPIC_BASE_URL") or "api.anthropic.com"
    if isinstance(error, anthropic.APIConnectionError):
        return (
            f"{server} does not answer ({message}); check the network and ANTHROPIC_BASE_URL and run again to continue."
        )
    if status == 401:
        return f"{server} refuses the key in ANTHROPIC_API_KEY ({message}); set a valid one."
    if status == 402 or "credit balance" in message.lower():
        return f"The account has no credit left ({message}); buy some and run again to continue."
    if status == 403:
        return f"The key is not allowed to do this ({message}); use a key of a workspace that is."
    if status == 404:
        return f"{server} does not know what was asked for ({message}); check the model's name and ANTHROPIC_BASE_URL."
    if status == 429 or (status or 0) >= 500:
        return f"{server} is busy or failing ({status}: {message}); run again later to continue."
    return f"{server} refuses the request ({message}); correct the constants it names and run again."


def seconds_before(attempt: int, error: Exception, longest_s: float) -> float:
    """How long to wait after attempt number `attempt`: what the server asks for, else longer each time."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return float(headers["retry-after"])
    except (KeyError, ValueError):
        return min(2.0**attempt, longest_s)
