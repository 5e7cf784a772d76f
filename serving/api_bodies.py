"""The bodies that the server accepts: OpenAI's, with steering, and those of inspection. Needs no torch.

OpenAI's API reference (2026) describes the fields. A field that would change the result and is not supported is refused
unless its value is neutral; one that cannot is accepted and ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serving.modes import MODES, Mode


def _whole(text: str) -> str:
    """JSON can hold half a surrogate pair, which is no character."""
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("holds half a surrogate pair")
    return text


_Text = Annotated[str, AfterValidator(_whole)]
_SomeText = Annotated[_Text, Field(min_length=1)]
_NOT_SUPPORTED: dict[str, Any] = {  # field -> its neutral value
    "audio": None,
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "modalities": ["text"],
    "presence_penalty": 0,
    "reasoning_effort": None,
    "response_format": {"type": "text"},
    "suffix": None,
    "tool_choice": "none",
    "tools": [],
    "verbosity": None,
    "web_search_options": None,
}
_IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


# ---- steering


class Steer(Body):
    """One thing to steer by: a latent, the latent that a search finds, or a control vector."""

    latent: int | None = Field(default=None, ge=0, description="its number")
    search: _SomeText | None = Field(
        default=None, description="words of its meaning; of those found, the one that steers best"
    )
    strength: float | None = Field(
        default=None, description="in multiples of its highest activation; the SAE's own if left out"
    )
    mode: Mode | None = Field(default=None, description=f"{', '.join(MODES)}; the SAE's own if left out")
    control_vector: _SomeText | None = Field(default=None, description="the name of one that the server has")
    scale: float | None = Field(default=None, description="of a control vector; the server's own if left out")

    @model_validator(mode="after")
    def _one(self) -> "Steer":
        if sum(each is not None for each in (self.latent, self.search, self.control_vector)) != 1:
            raise ValueError("name exactly one of latent, search and control_vector")
        if self.control_vector is None and self.scale is not None:
            raise ValueError("scale belongs to a control_vector; a latent has a strength")
        if self.control_vector is not None and (self.strength is not None or self.mode is not None):
            raise ValueError("a control_vector has a scale, no strength and no mode")
        return self


def _features(given: Any) -> Any:
    """Goodfire's ways to name features: a number, an object with index_in_sae, a group of them."""
    if isinstance(given, dict) and "features" in given:
        given = given["features"]
    given = given if isinstance(given, list) else [given]
    return [each.get("index_in_sae", each) if isinstance(each, dict) else each for each in given]


class GoodfireIntervention(Body):
    """nudge adds, pin sets, mul multiplies: our modes add, clamp, scale."""

    mode: Literal["nudge", "pin", "mul"]
    features: Annotated[list[int], BeforeValidator(_features), Field(min_length=1)]
    value: float


class GoodfireController(BaseModel):
    """Goodfire's `controller`, without scopes."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)  # also its name and thresholds

    interventions: list[GoodfireIntervention] = []
    scopes: list[Any] = Field(default=[], max_length=0, description="conditions are not supported")


# ---- completions


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Any = None  # ignored


class Generation(Body):
    """What completions and chats have in common."""

    model: str | None = Field(default=None, description="the server's model may be left out")
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=1.0, ge=0, le=1)
    n: int | None = Field(default=1, ge=1)
    stop: list[_SomeText] | None = Field(default=None, max_length=16)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, description="drawn if left out; the response says it")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    steering: list[Steer] | None = Field(default=None, description="what to steer by, in this request only")
    controller: GoodfireController | None = Field(default=None, description="Goodfire's way to say it")

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, neutral in _NOT_SUPPORTED.items():
            if body.get(name) not in (None, neutral):
                raise ValueError(f"{name} is not supported here; leave it out")
        known = {name: value for name, value in body.items() if name not in (*_NOT_SUPPORTED, *_IGNORED)}
        if isinstance(known.get("stop"), str):
            known["stop"] = [known["stop"]]
        return known


class CompletionBody(Generation):
    """POST /v1/completions"""

    prompt: _Text | list[int] | list[_Text] | list[list[int]] = Field(
        description="one text or several, or their tokens"
    )
    logprobs: int | None = Field(default=None, ge=0, le=20, description="likeliest tokens told beside each token")


def _text_of(content: Any) -> Any:
    """A message's content, of which parts of text are joined."""
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise ValueError("only parts of type text are supported")
        return "".join(str(part.get("text", "")) for part in content)
    return content


class MessageBody(BaseModel):
    model_config = ConfigDict(extra="ignore")  # also a name, a refusal, annotations that clients send back

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[_Text, BeforeValidator(_text_of)]


Dialogue = Annotated[list[MessageBody], Field(min_length=1)]


class ChatBody(Generation):
    """POST /v1/chat/completions"""

    messages: Dialogue
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _fits(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs true")
        return self


# ---- inspection


class InspectBody(Body):
    """POST /v1/latents/inspect: a text or a dialogue"""

    model: str | None = None
    text: _SomeText | None = None
    messages: Dialogue | None = None
    top_k: int = Field(default=8, ge=1, le=64, description="strongest latents of each token")

    @model_validator(mode="after")
    def _one(self) -> "InspectBody":
        if (self.text is None) == (self.messages is None):
            raise ValueError("Give either text or messages")
        return self


class ContrastBody(Body):
    """POST /v1/latents/contrast: two sets, each of texts or dialogues"""

    model: str | None = None
    positive: list[_SomeText | Dialogue] = Field(min_length=1, max_length=100, description="what to steer towards")
    negative: list[_SomeText | Dialogue] = Field(min_length=1, max_length=100, description="what to steer away from")
    top_k: int = Field(default=10, ge=1, le=100, description="latents in each direction")
