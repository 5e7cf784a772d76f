"""Dialogues as Llama 3 Instruct was trained on them, in tokens.

Format: Meta's "Llama 3" and "Llama 3.1" model cards and prompt formats. Every message is

    <|start_header_id|>ROLE<|end_header_id|>\\n\\nCONTENT<|eot_id|>

after one <|begin_of_text|>, with its content stripped; an open assistant header prompts the answer. From
Llama 3.1 on a system message always comes first, and begins with two lines: the knowledge cut-off and the date.
"""

from collections.abc import Sequence
from typing import NamedTuple

from llama_3.chat_template import DEFAULT_DATE
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
    check_chat(tokenizer)
    for role, _ in messages:
        if role not in ROLES:
            raise ValueError(f"{role!r} is not a role; write one of {', '.join(ROLES)}.")
    if tokenizer.chat_template is not None:
        return tokenizer.encode_template(*tokenizer.chat_template.render(messages, date))
    begin, header, end_header, end_of_turn = (tokenizer.special_tokens[name] for name in CHAT_TOKENS)
    turns = [Message(role, content.strip()) for role, content in messages]
    if date is not None:
        system = turns.pop(0).content if turns and turns[0].role == "system" else ""
        turns.insert(0, Message("system", DATE_HEADER.format(date=date) + system))
    open_turn = lambda role: [header, *tokenizer.encode(role), end_header]
    ids = [begin]
    for role, content in turns:
        ids += [*open_turn(role), *tokenizer.encode("\n\n" + content), end_of_turn]
    return [*ids, *open_turn("assistant"), *tokenizer.encode("\n\n")]
