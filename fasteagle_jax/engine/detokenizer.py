"""Detokenization: the text of an answer, all at once or token by token, which is the same text.

An answer's text is what its tokens add to the prompt's: prompt and answer together read as all their tokens do.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from itertools import islice
from typing import Any

UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character whose last ones are to come
CONTEXT = 8  # tokens of a prompt, at the most, that its answer's text is read with


class Detokenizer:
    """The text of tokens by a tokenizer, special tokens left out.

    Some decoders treat the first token unlike others (a space before it is dropped): a few tokens of the prompt are
    read with the answer. Others have a token for each byte, and write a whole run of them as U+FFFD if one character in
    it is cut: here the others are kept, as decoders of byte-level tokens do.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.items()
        self.special = {token.content: id for id, token in added if token.special and token.content}
        self._tokenizer = tokenizer
        self._special_ids = set(self.special.values())
        self._byte_ids = _byte_ids(tokenizer)
        self._bytes = {id: byte for byte, id in self._byte_ids.items()}
        self._letter = list(tokenizer.encode("a", add_special_tokens=False))

    def text(self, tokens: Sequence[int], prompt: Sequence[int] = ()) -> str:
        """The text that tokens add to a prompt's."""
        context = self.context(prompt)
        return self.added(self.decode(context), self.decode([*context, *tokens]))

    def token_text(self, token: int) -> str:
        """A token's own text, with a space at its beginning; a special one's name."""
        if token in self._special_ids:
            return str(self._tokenizer.convert_ids_to_tokens(token))
        return self.text([token], self._letter)

    def context(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt that have text."""
        return list(islice((token for token in reversed(prompt) if token not in self._special_ids), CONTEXT))[::-1]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens by themselves; more tokens change nothing of it but its last character."""
        kept = self._whole_characters([token for token in tokens if token not in self._special_ids])
        return str(self._tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @staticmethod
    def added(before: str, text: str) -> str:
        """What a text has more than the one before it, of which the last character may have been cut."""
        return text[len(before) if text.startswith(before) else len(os.path.commonprefix([before, text])) :]

    def _whole_characters(self, tokens: list[int]) -> list[int]:
        """The tokens with bytes that are no character replaced by U+FFFD's."""
        if self._bytes.keys().isdisjoint(tokens):
            return tokens
        whole: list[int] = []
        run = bytearray()
        for token in [*tokens, None]:
            if token in self._bytes:
                run.append(self._bytes[token])
                continue
            whole += [self._byte_ids[byte] for byte in run.decode("utf-8", "replace").encode()]
            run.clear()
            if token is not None:
                whole.append(token)
        return whole


def _byte_ids(tokenizer: Any) -> dict[int, int]:
    """By byte, the tokens <0x00> to <0xFF> that a decoder joins to characters; none if it does not."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    ids = tokenizer.convert_tokens_to_ids(names)
    back = tokenizer.convert_ids_to_tokens([0 if id is None else id for id in ids])
    there = {byte: id for byte, (id, name) in enumerate(zip(ids, back, strict=True)) if names[byte] == name}
    mark = [there.get(byte) for byte in UNFINISHED.encode()]
    return there if None not in mark and tokenizer.decode(mark) == UNFINISHED else {}


class TextStream:
    """The text of a growing list of tokens behind a prompt, as `Detokenizer.text` gives it.

    The results of `push` and `finish` add up to `text`. Text that may be the beginning of a stop string is withheld. A
    stop string that the first `min_tokens` tokens complete does not count.
    """

    def __init__(
        self, detokenizer: Detokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        self.text = ""  # so far
        self.stopped_by: str | None = None  # the stop string that was found; the text ends before it
        self._detokenizer = detokenizer
        self._stop = stop
        self._min_tokens = min_tokens
        self._num_pushed = 0
        self._tokens = detokenizer.context(prompt)
        # tokens[context:read] have been read and lend the next ones their context
        self._context, self._read = 0, len(self._tokens)
        self._num_returned = 0  # characters

    def push(self, token: int) -> str:
        """The text that becomes certain with one more token; none after a stop string."""
        if self.stopped_by is None:
            self._tokens.append(token)
            self._num_pushed += 1
            self._append(self._next())
        return self._return(withheld=self._beginning_of_stop())

    def finish(self) -> str:
        """The text that was still withheld, with U+FFFD for an unfinished character."""
        if self.stopped_by is None:
            self._append(self._next(last=True))
        return self._return(withheld=0)

    def _next(self, *, last: bool = False) -> str:
        """The text of the tokens not read yet; empty as long as it ends inside a character."""
        before = self._detokenizer.decode(self._tokens[self._context : self._read])
        piece = self._detokenizer.added(before, self._detokenizer.decode(self._tokens[self._context :]))
        if not piece or (piece.endswith(UNFINISHED) and not last):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return piece

    def _append(self, piece: str) -> None:
        """Adds a piece, up to the stop string that it completes first."""
        known = len(self.text)
        self.text += piece
        if self._num_pushed <= self._min_tokens:
            return
        found = [(at, stop) for stop in self._stop if (at := self.text.find(stop, max(known - len(stop) + 1, 0))) >= 0]
        if found:
            at, self.stopped_by = min(found)
            self.text = self.text[:at]

    def _beginning_of_stop(self) -> int:
        """The number of characters at the end of the text that a stop string begins with."""
        if self.stopped_by is not None:
            return 0
        lengths = ((stop, n) for stop in self._stop for n in range(1, min(len(stop), len(self.text) + 1)))
        return max((n for stop, n in lengths if self.text.endswith(stop[:n])), default=0)

    def _return(self, withheld: int) -> str:
        end = max(len(self.text) - withheld, self._num_returned)
        piece, self._num_returned = self.text[self._num_returned : end], end
        return piece
