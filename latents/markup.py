"""Text that a model wrote, made safe to show: control characters visible, two texts with their differences marked."""

import difflib
import html
import re
from collections.abc import Sequence
from itertools import groupby

# Control characters could move a terminal's cursor or worse, so Unicode's pictures of them are shown.
_PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"} | dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)
_SIGNS = str.maketrans({" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5"})
_WORD = re.compile(r"\s*(?:\w+|[^\w\s]+)|\s+$")  # with the space before it


def visible(text: str) -> str:
    """Pictures in place of control characters; tabs and line breaks stay."""
    return text.translate(_PICTURES)


def visible_token(token: str) -> str:
    """A token shown by itself: spaces, line breaks and everything unprintable are visible too."""
    shown = visible(token.translate(_SIGNS))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) or "\u2205"


def mark_differences(clean: str, steered: str, concept: Sequence[str] = ()) -> tuple[str, str]:
    """Both texts as HTML: words the other lacks in <del> (clean) or <ins> (steered), words of the concept in <mark>."""
    texts = [_WORD.findall(visible(text)) for text in (clean, steered)]
    matcher = difflib.SequenceMatcher(None, *([word.strip() for word in words] for words in texts), autojunk=False)
    same: tuple[set[int], set[int]] = (set(), set())
    for block in matcher.get_matching_blocks():
        same[0].update(range(block.a, block.a + block.size))
        same[1].update(range(block.b, block.b + block.size))
    wanted = {word.lower() for word in concept}
    left, right = (
        "".join(_tagged(words, kept, wanted, tag)) for words, kept, tag in zip(texts, same, ("del", "ins"), strict=True)
    )
    return left, right


def _tagged(words: list[str], same: set[int], wanted: set[str], tag: str) -> list[str]:
    """The words as HTML. Neighbours that differ share a tag; each word of the concept has its own."""

    def kind(i: int) -> tuple[str, int]:
        if words[i].strip().lower() in wanted:
            return "mark", i
        return ("" if i in same else tag), -1

    parts = []
    for (name, _), run in groupby(range(len(words)), key=kind):
        text = "".join(words[i] for i in run)
        core = text.lstrip() if name else ""  # the space before it is not marked
        parts.append(html.escape(text.removesuffix(core)))
        parts.append(f"<{name}>{html.escape(core)}</{name}>" if core else "")
    return parts
