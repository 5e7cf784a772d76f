"""The text of a row as it grows: whole characters, up to the first stop string."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from llama_3.tokenizer import TextStream, Tokenizer
from serving.engine import Ended, Token


class StopStrings:
    """Text given on until one of several strings is complete in it. What may become one is held back.

    Of strings that overlap the one that is complete first counts, so the result does not depend on how the text is cut
    into pieces.
    """

    def __init__(self, strings: Sequence[str]):
        self.strings = strings
        self.held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """What can be given on now, without the stop string once it is found."""
        text = self.held + piece
        ends = [(text.find(each) + len(each), -len(each)) for each in self.strings if each in text]
        if ends:
            end, minus_length = min(ends)  # of those that end together the longest
            self.found, self.held = True, ""
            return text[: end + minus_length]
        lengths = range(min(len(text), max(map(len, self.strings), default=1) - 1), 0, -1)
        n_held = next((n for n in lengths if any(each.startswith(text[-n:]) for each in self.strings)), 0)
        given, self.held = text[: len(text) - n_held], text[len(text) - n_held :]
        return given

    def end(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self.held = self.held, ""
        return held


class Piece(NamedTuple):
    """What a row's text gains with a token. The text may be empty: half a character, or the beginning of a stop."""

    text: str
    token: Token | None  # None: the rest of the text, after the last token


class GrowingText:
    """For `Row.tell`: turns a row's tokens into pieces of text, and ends the row at a stop string.

    prompt: the row's; tell: called in the engine's thread with every Piece and at last with Ended.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str], tell: Callable[[Piece | Ended], object]
    ):
        self._stream = TextStream(tokenizer, prompt)
        self._stops = StopStrings(stops)
        self._tell = tell

    def __call__(self, event: Token | Ended) -> bool:
        """Whether the row should go on."""
        if isinstance(event, Token):
            self._tell(Piece(self._stops.add(self._stream.add(event.id)), event))
            return not self._stops.found
        if not self._stops.found:
            rest = self._stops.add(self._stream.end())
            rest += "" if self._stops.found else self._stops.end()
            if rest:
                self._tell(Piece(rest, None))
        self._tell(event)
        return False
