"""Words, word sequences and parts of words in a sentence: the features that name latents without a model."""

import codecs
import re
from collections.abc import Sequence

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def words_of(sentence: str) -> frozenset[str]:
    return frozenset(word.lower() for word in WORD.findall(sentence))


def features(tokens: list[bytes], strong: Sequence[bool]) -> set[str]:
    """The features of a sentence's strong tokens: words in lower case, sequences of two or three words, and what
    `token_feature` makes of a token."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character goes to the token that completes it
    pieces = [decoder.decode(token) for token in tokens]
    text = "".join(pieces)
    strong_chars = bytearray(len(text))
    found: set[str] = set()
    end = 0
    for piece, is_strong in zip(pieces, strong, strict=True):
        start, end = end, end + len(piece)
        if is_strong:
            strong_chars[start:end] = b"\1" * len(piece)
            if feature := token_feature(text, start, end):
                found.add(feature)
    words = [(word[0].lower(), 1 in strong_chars[slice(*word.span())]) for word in WORD.finditer(text)]
    for first in range(len(words)):
        for last in range(first + 1, min(first + 3, len(words)) + 1):
            if any(is_strong for _, is_strong in words[first:last]):
                found.add(" ".join(word for word, _ in words[first:last]))
    return found


def token_feature(text: str, start: int, end: int) -> str | None:
    """The feature of the token text[start:end] by itself; None if it is a whole word or only part of a character."""
    token = text[start:end]
    core = token.strip()
    if not core:
        return "line break" if "\n" in token else None
    if core.isdigit():
        return "number"
    if not any(map(str.isalpha, core)):
        return f"“{core}”"
    start = text.index(core, start)
    end = start + len(core)
    if core[0].isalpha() and text[:start][-1:].isalpha():
        return f"…{core}"
    if core[-1].isalpha() and text[end : end + 1].isalpha():
        return f"{core}…"
    return None
