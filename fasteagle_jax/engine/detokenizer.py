"""Tokens becoming text, one by one: whole characters only, and no further than a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character whose last ones are to come


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens without the special ones; always that of the longer text's beginning, but for its last
    character."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """The text of a growing list of tokens.

    What `push` and `finish` return adds up to `text`. Text that may turn out to be the beginning of a stop string is
    held back.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""  # what is known of it
        self.stopped_by: str | None = None  # the stop string that was found; the text ends before it
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        self._context, self._read = 0, 0  # tokens[context:read] have been read and lend the next ones their context
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that is certain with one token more. After a stop string there is none."""
        if self.stopped_by is None:
            self._tokens.append(token)
            self._take(self._next())
        return self._show(held_back=self._beginning_of_stop())

    def finish(self) -> str:
        """What was still held back, with U+FFFD for a character that stayed unfinished."""
        if self.stopped_by is None:
            self._take(self._next(last=True))
        return self._show(held_back=0)

    def _next(self, *, last: bool = False) -> str:
        """The text of the tokens not read yet; none as long as it ends inside a character."""
        before = decode(self._tokenizer, self._tokens[self._context : self._read])
        text = decode(self._tokenizer, self._tokens[self._context :])
        if len(text) <= len(before) or (text.endswith(UNFINISHED) and not last):
            return ""
        # Decoders treat a first token unlike others (a space before it is dropped): the tokens before stay in sight.
        self._context, self._read = self._read, len(self._tokens)
        return text[len(before) :]

    def _take(self, piece: str) -> None:
        """Adds a piece, up to the stop string that it completes first."""
        known = len(self.text)
        self.text += piece
        found = [(at, stop) for stop in self._stop if (at := self.text.find(stop, max(known - len(stop) + 1, 0))) >= 0]
        if found:
            at, self.stopped_by = min(found)
            self.text = self.text[:at]

    def _beginning_of_stop(self) -> int:
        """How many characters at the end of the text a stop string begins with."""
        if self.stopped_by is not None:
            return 0
        lengths = (n for stop in self._stop for n in range(min(len(stop) - 1, len(self.text)), 0, -1))
        return max((n for n in lengths if any(self.text.endswith(stop[:n]) for stop in self._stop)), default=0)

    def _show(self, held_back: int) -> str:
        upto = max(len(self.text) - held_back, self._shown)
        piece, self._shown = self.text[self._shown : upto], upto
        return piece
