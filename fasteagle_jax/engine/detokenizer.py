"""Incremental detokenization: whole characters only, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character whose last ones are to come


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens without the special ones; more tokens change nothing of it but its last character."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """The text of a growing list of tokens.

    The results of `push` and `finish` add up to `text`. Text that may be the beginning of a stop string is withheld.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""  # so far
        self.stopped_by: str | None = None  # the stop string that was found; the text ends before it
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        self._context, self._read = 0, 0  # tokens[context:read] have been read and lend the next ones their context
        self._num_returned = 0  # characters

    def push(self, token: int) -> str:
        """The text that becomes certain with one more token; none after a stop string."""
        if self.stopped_by is None:
            self._tokens.append(token)
            self._append(self._next())
        return self._return(withheld=self._beginning_of_stop())

    def finish(self) -> str:
        """The text that was still withheld, with U+FFFD for an unfinished character."""
        if self.stopped_by is None:
            self._append(self._next(last=True))
        return self._return(withheld=0)

    def _next(self, *, last: bool = False) -> str:
        """The text of the tokens not read yet; empty as long as it ends inside a character."""
        before = decode(self._tokenizer, self._tokens[self._context : self._read])
        text = decode(self._tokenizer, self._tokens[self._context :])
        if len(text) <= len(before) or (text.endswith(UNFINISHED) and not last):
            return ""
        # Decoders treat a first token unlike others (a space before it is dropped): the tokens before stay in sight.
        self._context, self._read = self._read, len(self._tokens)
        return text[len(before) :]

    def _append(self, piece: str) -> None:
        """Adds a piece, up to the stop string that it completes first."""
        known = len(self.text)
        self.text += piece
        found = [(at, stop) for stop in self._stop if (at := self.text.find(stop, max(known - len(stop) + 1, 0))) >= 0]
        if found:
            at, self.stopped_by = min(found)
            self.text = self.text[:at]

    def _beginning_of_stop(self) -> int:
        """The number of characters at the end of the text that a stop string begins with."""
        if self.stopped_by is not None:
            return 0
        lengths = (n for stop in self._stop for n in range(min(len(stop) - 1, len(self.text)), 0, -1))
        return max((n for n in lengths if any(self.text.endswith(stop[:n]) for stop in self._stop)), default=0)

    def _return(self, withheld: int) -> str:
        end = max(len(self.text) - withheld, self._num_returned)
        piece, self._num_returned = self.text[self._num_returned : end], end
        return piece
