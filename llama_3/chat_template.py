"""A model's own chat format: the Jinja template that its files carry, rendered as transformers renders it.

The template comes from the model's files and is therefore run in Jinja's immutable sandbox. Unlike there, special
tokens that somebody writes into a message stay text.
"""

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from pipeline.errors import InputError

DEFAULT_DATE = "26 Jul 2024"  # what Llama 3.1's published template writes when nobody names a date


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, with which templates mark what the assistant writes; kept as it is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


@functools.lru_cache(8)
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


class ChatTemplate(NamedTuple):
    source: str
    origin: str  # the file it is from, for messages
    special_tokens: Mapping[str, int]
    bos_token: str
    eos_token: str

    def render(
        self, messages: Sequence[tuple[str, str]], date: str | None = None, open_answer: bool = True
    ) -> tuple[str, str]:
        """The dialogue's text, and a character in it that breaks up special tokens that stand in messages; "" where
        none does.

        messages: (role, content). date: "26 Jul 2024" for example; None leaves it to the template, or to DEFAULT_DATE
        where the template asks for today's. Raises InputError where the template refuses the dialogue.
        """
        contents = [content for _, content in messages]
        found = [token for token in self.special_tokens if any(token in content for content in contents)]
        mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if not any(c in s for s in contents)) if found else ""
        for token in found:
            contents = [content.replace(token, token[0] + mark + token[1:]) for content in contents]
        roles = (role for role, _ in messages)
        dialogue = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        day = datetime.strptime(date or DEFAULT_DATE, "%d %b %Y")
        values: dict[str, Any] = {"date_string": date} if date else {}
        try:
            text = _compile(self.source).render(
                messages=dialogue,
                add_generation_prompt=open_answer,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                strftime_now=day.strftime,
                **values,
            )
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"The chat template in {self.origin} is not a Jinja template ({error.message}); correct it there, or "
                "complete text instead."
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            said = " ".join(str(error).split()).rstrip(".")
            raise InputError(f"The chat template in {self.origin} refuses this dialogue: {said}.") from None
        return text, mark

    def render_answered(
        self, messages: Sequence[tuple[str, str]], date: str | None = None
    ) -> tuple[str, str, list[tuple[int, int]]]:
        """What `render` gives without an answer to come, and the first character and the end of each of the assistant's
        messages in the text.

        Raises InputError where the template changes them.
        """
        text, mark = self.render(messages, date, open_answer=False)
        border = next(c for c in map(chr, range(0xF8FE, 0xE000, -1)) if c not in text)

        def framed(content: str) -> str:  # inside the whitespace at its ends, which templates may take away
            said = content.strip()
            return content.replace(said, border + said + border, 1) if said else content + border + border

        marked = [(role, framed(content) if role == "assistant" else content) for role, content in messages]
        parts = self.render(marked, date, open_answer=False)[0].split(border)
        n_answers = sum(role == "assistant" for role, _ in messages)
        if "".join(parts) != text or len(parts) != 2 * n_answers + 1:
            raise InputError(
                f"The chat template in {self.origin} changes what the assistant says in this dialogue, so it cannot be "
                "found again; use every token instead."
            )
        ends = list(itertools.accumulate(map(len, parts)))
        return text, mark, list(zip(ends[0:-1:2], ends[1::2], strict=True))

    def pieces(self, text: str) -> list[tuple[str, int | None]]:
        """A rendered text cut at its special tokens: (text, None) or (token, id)."""
        pattern = "|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True)))
        parts = re.split(f"({pattern})", text) if pattern else [text]
        return [(part, self.special_tokens.get(part)) for part in parts if part]

    def ends_of_answer(self) -> set[int]:
        """The special token that the template puts behind an answer, if any."""
        try:
            text, _ = self.render([("user", "A question"), ("assistant", "An answer")], open_answer=False)
        except InputError:
            return set()
        behind = self.pieces(text.rpartition("An answer")[2])
        return set([id_ for _, id_ in behind if id_ is not None][:1])
