"""Dialogues as Llama 3 Instruct was trained on them, in tokens.

Format: Meta's "Llama 3" and "Llama 3.1" model cards and prompt formats. Every message is

    <|start_header_id|>ROLE<|end_header_id|>\\n\\nCONTENT<|eot_id|>

after one <|begin_of_text|>, with its content stripped; an open assistant header prompts the answer. From
Llama 3.1 on a system message always comes first, and begins with two lines: the knowledge cut-off and the date.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llama_3.chat_template import DEFAULT_DATE, ChatTemplate
from llama_3.tokenizer import Tokenizer
from pipeline.errors import InputError

CHAT_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ROLES = ("system", "user", "assistant")
DATE_HEADER = "Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"  # Llama 3.1, 3.2


class Message(NamedTuple):
    role: str  # system, user or assistant
    content: str


def check_chat(tokenizer: Tokenizer) -> None:
    """Raise InputError unless the model has a chat template, or Llama 3's chat tokens."""
    if tokenizer.chat_template is not None:
        return
    for name in CHAT_TOKENS:
        if name not in tokenizer.special_tokens:
            raise InputError(
                f"This model has neither a chat template nor the token {name}, so it cannot chat; complete text with "
                "it, or name an Instruct model."
            )


def usual_date(rope_scaling_factor: float) -> str | None:
    """The date that dialogues with a model carry if nobody names another: the header came with Llama 3.1, as did
    scaled RoPE."""
    return DEFAULT_DATE if rope_scaling_factor != 1 else None


def encode_dialogue(tokenizer: Tokenizer, messages: Sequence[Message], date: str | None = None) -> list[int]:
    """Token ids of a dialogue, ending where the assistant's next answer begins.

    date: Llama 3.1 and later, "26 Jul 2024" for example; None gives Llama 3's format, without the date header.
    Special tokens written in a message are text. Raises InputError for a model without chat tokens, ValueError for a
    role that does not exist.
    """
    _check_dialogue(tokenizer, messages)
    if tokenizer.chat_template is not None:
        return tokenizer.encode_template(*tokenizer.chat_template.render(messages, date))
    turns = [token for _, *parts in _llama_3_turns(tokenizer, messages, date) for part in parts for token in part]
    header = [tokenizer.special_tokens[name] for name in CHAT_TOKENS[:3]]
    return [header[0], *turns, header[1], *tokenizer.encode("assistant"), header[2], *tokenizer.encode("\n\n")]


class EncodedDialogue(NamedTuple):
    ids: list[int]
    answers: list[range]  # places of the tokens that the assistant writes: each message, and what ends its turn


def encode_answered(tokenizer: Tokenizer, messages: Sequence[Message], date: str | None = None) -> EncodedDialogue:
    """Token ids of a dialogue as it stands, without an answer to come, and which of them are the assistant's.

    date and errors as of `encode_dialogue`; InputError also for a template that changes what the assistant says.
    """
    _check_dialogue(tokenizer, messages)
    if tokenizer.chat_template is not None:
        return _encode_rendered(tokenizer, tokenizer.chat_template, messages, date)
    ids, answers = [tokenizer.special_tokens[CHAT_TOKENS[0]]], []
    n_blank = len(tokenizer.encode("\n\n"))
    for role, header, content in _llama_3_turns(tokenizer, messages, date):
        ids += header + content
        if role == "assistant":
            answers.append(range(len(ids) - len(content) + n_blank, len(ids)))
    return EncodedDialogue(ids, answers)


def _encode_rendered(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], date: str | None
) -> EncodedDialogue:
    """`encode_answered` in the model's own format. A token that belongs to an answer in part counts as the answer's."""
    marked, mark, said = template.render_answered(messages, date)
    tokens = tokenizer.template_tokens(marked, mark)
    starts, ends = [start for _, (start, _) in tokens], [end for _, (_, end) in tokens]
    stops = (re.escape(name) for name, id_ in tokenizer.special_tokens.items() if id_ in tokenizer.stop_ids)
    end_of_turn = re.compile(rf"\s*({'|'.join(stops)})")
    answers = []
    for first, end in said:
        closing = end_of_turn.match(marked, end)
        begin, end = (i - marked.count(mark, 0, i) * len(mark) for i in (first, closing.end() if closing else end))
        answers.append(range(bisect_right(ends, begin), bisect_left(starts, end) if end > begin else 0))
    return EncodedDialogue([id_ for id_, _ in tokens], answers)


def _check_dialogue(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    check_chat(tokenizer)
    for role, _ in messages:
        if role not in ROLES:
            raise ValueError(f"{role!r} is not a role; write one of {', '.join(ROLES)}.")


def _llama_3_turns(
    tokenizer: Tokenizer, messages: Sequence[Message], date: str | None
) -> Iterator[tuple[str, list[int], list[int]]]:
    """(role, tokens of the header, tokens of the content and of its end) of each message in Llama 3's format."""
    _, header, end_header, end_of_turn = (tokenizer.special_tokens[name] for name in CHAT_TOKENS)
    turns = [Message(role, content.strip()) for role, content in messages]
    if date is not None:
        system = turns.pop(0).content if turns and turns[0].role == "system" else ""
        turns.insert(0, Message("system", DATE_HEADER.format(date=date) + system))
    for role, content in turns:
        in_header = [header, *tokenizer.encode(role), end_header]
        yield role, in_header, [*tokenizer.encode("\n\n" + content), end_of_turn]
