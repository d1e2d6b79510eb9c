"""Conversations as tokens, in memory and on disk, a JSON line each."""

from __future__ import annotations

import array
import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self, overload

import numpy as np

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.lines import LineFile
from fasteagle_jax.io.text import json_value

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
    """A conversation as tokens: int32 [n], with the assistant's spans [start, end) in order: int32 [k, 2]."""

    id: str
    tokens: np.ndarray
    assistant: np.ndarray

    @classmethod
    def of(cls, id: str, tokens: Sequence[int], assistant: Sequence[Sequence[int]]) -> Self:
        """The conversation of plain lists; UserError for invalid tokens or spans."""
        if not isinstance(id, str) or not id:
            raise UserError(f"id {id!r}: give a text")
        if not isinstance(tokens, list) or set(map(type, tokens)) != {int}:
            raise UserError("tokens: give a list of at least one whole number")
        if not 0 <= min(tokens) <= max(tokens) < 2**31:
            raise UserError(f"tokens from {min(tokens)} to {max(tokens)}: give numbers from 0 to 2**31 - 1")
        if not isinstance(assistant, list) or any(
            not isinstance(span, list) or len(span) != 2 or set(map(type, span)) != {int} for span in assistant
        ):
            raise UserError("assistant: give a list of [start, end] pairs of whole numbers")
        end = 0
        for span in assistant:
            if not end <= span[0] < span[1] <= len(tokens):
                raise UserError(
                    f"assistant span {span} of {len(tokens)} tokens: "
                    "give spans [start, end) in order, not empty and inside the tokens"
                )
            end = span[1]
        return cls(id, np.array(tokens, np.int32), np.array(assistant, np.int32).reshape(-1, 2))


class Conversations(Sequence[Conversation]):
    """Conversations end to end in a few arrays, 4 bytes a token; items are views of these."""

    def __init__(self, conversations: Iterable[Conversation]) -> None:
        self.ids: list[str] = []
        tokens, spans = array.array("i"), array.array("i")  # which grow in place, unlike lists and unlike NumPy's
        ends, span_ends = array.array("q", [0]), array.array("q", [0])
        for c in conversations:
            self.ids.append(c.id)
            tokens.frombytes(c.tokens.astype(np.int32, copy=False).tobytes())
            spans.frombytes(c.assistant.astype(np.int32, copy=False).tobytes())
            ends.append(len(tokens))
            span_ends.append(len(spans) // 2)
        self.tokens = np.asarray(tokens)  # int32 [N]
        self.spans = np.asarray(spans).reshape(-1, 2)  # int32, each counted from its conversation's first token
        self.ends, self.span_ends = np.asarray(ends), np.asarray(span_ends)  # one entry more than conversations

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...

    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...

    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        tokens = self.tokens[self.ends[i] : self.ends[i + 1]]
        return Conversation(self.ids[i], tokens, self.spans[self.span_ends[i] : self.span_ends[i + 1]])


def read_conversations(*paths: str | os.PathLike[str], vocab_size: int | None = None) -> Conversations:
    """The conversations of files by ConversationWriter.

    Raises UserError with file and line for a corrupt line, and for a token that is not below `vocab_size`.
    """
    return Conversations(conversation for path in paths for conversation in _lines(path, vocab_size))


def _lines(path: str | os.PathLike[str], vocab_size: int | None) -> Iterator[Conversation]:
    try:
        with open(path, "rb") as file:
            for n, line in enumerate(file, 1):
                conversation = _conversation(line, f"{path}:{n}")
                if vocab_size is not None and (largest := int(conversation.tokens.max())) >= vocab_size:
                    raise UserError(
                        f"{path}:{n}: token {largest}, the target's vocabulary has {vocab_size}: "
                        "prepare the data with this target's tokenizer"
                    )
                yield conversation
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a file of conversations") from error


def _conversation(line: bytes, where: str) -> Conversation:
    try:
        record = json_value(line)
        if not isinstance(record, dict):
            raise UserError(f"a {type(record).__name__}, not an object")
        return Conversation.of(*(record[key] for key in ("id", "tokens", "assistant")))
    except (ValueError, KeyError) as error:  # UserError is a ValueError
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{where}: no conversation ({reason}): delete the line, or give the command that writes the file again"
        ) from error


class ConversationWriter(LineFile):
    """Appends conversations to a file of JSON lines and resumes where a killed run stopped.

    `id in writer` says whether a conversation is there already. On opening, a torn last line is cut off; a whole line
    that is corrupt raises UserError with file and line. For one process at a time, which is enforced.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.ids: set[str] = set()
        try:
            super().__init__(Path(path), lambda line, n: self.ids.add(_conversation(line, f"{path}:{n}").id))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; give another file") from error

    def append(self, conversations: Iterable[Conversation]) -> None:
        """Writes a batch and waits until it is on the disk. An id that is there already raises UserError."""
        lines: dict[str, str] = {}
        for c in conversations:
            if c.id in self.ids or c.id in lines:
                raise UserError(f"conversation {c.id!r} is in the file already: skip those `in` the writer")
            record = {"id": c.id, "tokens": c.tokens.tolist(), "assistant": c.assistant.tolist()}
            Conversation.of(**record)  # nothing is written that could not be read
            lines[c.id] = json.dumps(record, separators=(",", ":")) + "\n"
        self.append_lines("".join(lines.values()).encode())
        self.ids.update(lines)

    def __contains__(self, id: str) -> bool:
        return id in self.ids

    def __len__(self) -> int:
        return len(self.ids)
