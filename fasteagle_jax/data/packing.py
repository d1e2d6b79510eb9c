"""Batches of rows packed from conversations.

N tokens of all samples · B rows of a batch · T tokens of a row · V vocabulary.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fasteagle_jax.data.conversations import Conversation, Conversations, log
from fasteagle_jax.data.windows import conversation_id
from fasteagle_jax.errors import UserError

MIN_WINDOW = 16  # tokens: a shorter last window of a sample has too little context to be worth a segment
FIRST_LEARNED = 2  # index in a segment of the first token that a loss may look at, see losses.select_positions
PACKING_WINDOW = 512  # segments packed together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows, all [B, T]: a pytree of NumPy or JAX arrays.

    Two samples of 3 and 4 tokens, the assistant's being a, and T = 8:

    tokens      x a a y y a a 0
    positions   0 1 2 0 1 2 3 0     from 0 in each segment
    segments    1 1 1 2 2 2 2 0     0 is padding
    supervised  0 1 1 0 0 1 1 0     True where t is the assistant's and predicted at t-1, in the same segment
    """

    tokens: Any  # int32
    positions: Any  # int32
    segments: Any  # int32
    supervised: Any  # bool


class LeftOut(NamedTuple):
    """Pieces of samples with answers that are not packed, and the tokens in them."""

    silent_pieces: int  # without a token to learn from
    silent_tokens: int
    short_pieces: int  # last windows below MIN_WINDOW tokens
    short_tokens: int

    def __str__(self) -> str:
        """The counts in words."""
        silent = f"{self.silent_pieces} pieces of {self.silent_tokens} tokens without a token to learn from"
        short = f"{self.short_pieces} last windows of {self.short_tokens} tokens, each below {MIN_WINDOW}"
        return ", ".join([silent] * (self.silent_pieces > 0) + [short] * (self.short_pieces > 0)) or "nothing"


class PackedData:
    """Batches of samples packed into rows, a function of (seed, step): a run resumes, on any hosts, by its step alone.

    An epoch is every sample once, in an order of its own. A sample longer than T is cut into windows of T, the
    *pieces*, each its own segment and shuffled like a sample. A last window below MIN_WINDOW tokens is left out, and so
    is a piece without a token that a loss looks at: a row of such pieces would be a step of loss 0. Both are counted
    (`left_out`). Each PACKING_WINDOW shuffled pieces are packed by best fit; an epoch's last batch may have empty rows.
    Samples without an assistant's turn are counted (`num_dropped`), logged and dropped.

    With `held_out` this share of the conversations, chosen by their ids, is in no batch: `sample_rows` has their
    pieces. All windows of a conversation are of one side. Which pieces there are does not depend on it.
    """

    def __init__(self, conversations: Sequence[Conversation], T: int, B: int, seed: int, held_out: float = 0.0) -> None:
        if T < 2 or B < 1 or seed < 0:
            raise UserError(f"row length {T}, batch size {B}, seed {seed}: give at least 2, 1 and 0")
        if not conversations:
            raise UserError("no conversations to pack: give a file with at least one")
        self.T, self.B, self.seed = T, B, seed
        # All samples end to end, and the pieces of them that become segments.
        samples = conversations if isinstance(conversations, Conversations) else Conversations(conversations)
        num_spans = np.diff(samples.span_ends)
        self.num_dropped = int((num_spans == 0).sum())
        if self.num_dropped == len(samples):
            raise UserError(
                f"none of {len(samples)} conversations has an assistant's turn to learn from: "
                "give conversations with answers, as prepare-data writes them"
            )
        if self.num_dropped:
            log.warning("dropped %d of %d conversations without an assistant's turn", self.num_dropped, len(samples))
        self._tokens = samples.tokens
        starts, lengths = samples.ends[:-1], np.diff(samples.ends)
        spans = samples.spans + np.repeat(starts, num_spans)[:, None]
        edges = np.zeros(len(self._tokens) + 1, np.int8)
        edges[spans[:, 0]] += 1
        edges[spans[:, 1]] -= 1
        self._assistant = np.cumsum(edges[:-1], dtype=np.int8, out=edges[:-1]).view(bool)
        windows = np.where(num_spans > 0, -(-lengths // T), 0)
        sample = np.repeat(np.arange(len(lengths)), windows)
        offset = (np.arange(len(sample)) - np.repeat(np.cumsum(windows) - windows, windows)) * T
        length = np.minimum(T, lengths[sample] - offset)
        start = starts[sample] + offset
        is_short = (offset > 0) & (length < min(MIN_WINDOW, T))
        # The first span that ends past a piece's first token to learn: does it begin in the piece?
        span = np.searchsorted(spans[:, 1], start + FIRST_LEARNED, side="right")
        is_silent = ~is_short & (np.append(spans[:, 0], len(self._tokens))[span] >= start + length)
        self.left_out = LeftOut(
            int(is_silent.sum()), int(length[is_silent].sum()), int(is_short.sum()), int(length[is_short].sum())
        )
        kept = ~is_short & ~is_silent
        if not kept.any():
            raise UserError(
                f"none of {len(kept)} pieces of {len(samples)} conversations has a token to learn from, an answer's "
                f"third or later in its piece of at most {T}: give longer conversations"
            )
        self._starts, self.lengths = start[kept], length[kept]  # int64, of the pieces
        is_held_out = np.zeros(int(kept.sum()), bool)
        if held_out:
            is_held_out = np.array([_fraction(id) < held_out for id in samples.ids])[sample[kept]]
        self._trained, self._held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
        if held_out and not (len(self._trained) and len(self._held_out)):
            some = "none" if len(self._trained) else "all"
            raise UserError(
                f"{some} of {len(is_held_out)} pieces are held out by a share of {held_out}: "
                "give more data, or change held_out.share"
            )
        self._planning = threading.RLock()  # of the two below: a thread may make batches ahead
        self._first_step = [0]  # of each epoch planned so far
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def num_batches_per_epoch(self, epoch: int) -> int:
        """The number of batches, which differs a little between epochs, as rows fill differently."""
        with self._planning:
            while len(self._first_step) <= epoch + 1:
                known = len(self._first_step) - 1
                num_rows = len(self._plan(known)[1]) - 1
                self._first_step.append(self._first_step[-1] + -(-num_rows // self.B))
        return self._first_step[epoch + 1] - self._first_step[epoch]

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step, counted from 0 over all epochs, or some of its rows (a slice of B)."""
        return self.filled(self.pieces(step, rows))

    def pieces(self, step: int, rows: slice | None = None) -> list[np.ndarray]:
        """The indices, int64, of the pieces in each row of a step's batch; none in an empty row."""
        while step >= self._first_step[-1]:
            self.num_batches_per_epoch(len(self._first_step) - 1)
        epoch = int(np.searchsorted(self._first_step, step, side="right")) - 1
        order, row_starts = self._plan(epoch)
        first_row = (step - self._first_step[epoch]) * self.B
        num_rows = len(row_starts) - 1
        found = []
        for row in range(self.B)[rows or slice(None)]:
            start, end = (row_starts[min(first_row + r, num_rows)] for r in (row, row + 1))
            found.append(order[start:end])
        return found

    def epochs(self, step: int) -> float:
        """The number of epochs in the first `step` batches."""
        epoch, first = 0, 0
        while first + self.num_batches_per_epoch(epoch) <= step:
            first += self.num_batches_per_epoch(epoch)
            epoch += 1
        return epoch + (step - first) / self.num_batches_per_epoch(epoch)

    def sample_rows(self, limit: int, *, held_out: bool) -> list[list[int]]:
        """At most so many rows of pieces that batches have, or that none has; the same for all seeds and B."""
        return self._packed(self._held_out if held_out else self._trained, 0, 0)[:limit]

    def num_tokens(self, step: int) -> int:
        """The number of tokens in a step's batch, without padding."""
        return sum(int(self.lengths[pieces].sum()) for pieces in self.pieces(step))

    def filled(self, rows: Sequence[Sequence[int] | np.ndarray]) -> Batch:
        """The batch [number of rows, T] of rows of pieces."""
        shape = len(rows), self.T
        out = Batch(*(np.zeros(shape, dtype) for dtype in (np.int32, np.int32, np.int32, bool)))
        for b, pieces in enumerate(rows):
            at = 0
            for segment, piece in enumerate(pieces, 1):
                source = slice(self._starts[piece], self._starts[piece] + self.lengths[piece])
                target = slice(at, at + self.lengths[piece])
                out.tokens[b, target] = self._tokens[source]
                out.positions[b, target] = np.arange(self.lengths[piece])
                out.segments[b, target] = segment
                out.supervised[b, target] = self._assistant[source]
                out.supervised[b, at] = False  # nothing in the segment predicts its first token
                at += self.lengths[piece]
        return out

    def digest(self) -> str:
        """The sha256 of the pieces, which does not depend on B and the seed."""
        digest = hashlib.sha256(np.stack([self._starts, self.lengths]).astype("<i8").tobytes())
        digest.update(np.ascontiguousarray(self._tokens, "<i4").data)
        return digest.hexdigest()

    def spans_digest(self) -> str:
        """The sha256 of which tokens are the assistant's."""
        return hashlib.sha256(np.packbits(self._assistant).tobytes()).hexdigest()

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pieces' order in an epoch, and the index in it at which each row starts (one entry more than rows)."""
        with self._planning:
            if epoch not in self._plans:
                packed = self._packed(self._trained, self.seed, epoch)
                rows = np.cumsum([0, *map(len, packed)])
                order = np.concatenate(packed)
                for old in sorted(self._plans)[:-1]:  # keep two, for a reader between two epochs
                    del self._plans[old]
                self._plans[epoch] = order, rows
            return self._plans[epoch]

    def _packed(self, pieces: np.ndarray, seed: int, epoch: int) -> list[list[int]]:
        """The pieces in rows, in a random order."""
        # Sorted raw bits of Philox: unlike Generator.permutation, the same in every version of NumPy.
        bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(len(pieces))
        order = pieces[np.argsort(bits, kind="stable")]
        windows = [order[i : i + PACKING_WINDOW] for i in range(0, len(order), PACKING_WINDOW)]
        return [row for window in windows for row in best_fit(window, self.lengths, self.T)]


def _fraction(id: str) -> float:
    """A number from 0 to 1 by the id of a conversation, the same for all its windows."""
    digest = hashlib.sha256(conversation_id(id).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def best_fit(pieces: np.ndarray, lengths: np.ndarray, T: int) -> list[list[int]]:
    """The shuffled `pieces` in rows of at most T tokens: the longest first, each into the fullest row that has room.

    Rows come in the shuffled order of their earliest pieces, so that long ones do not stand together.
    """
    rank = {int(piece): i for i, piece in enumerate(pieces)}
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for piece in sorted(rank, key=lambda piece: (-lengths[piece], rank[piece])):
        length = int(lengths[piece])
        at = bisect.bisect_left(rooms, (length, -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row = T, len(rows)
            rows.append([])
        rows[row].append(piece)
        bisect.insort(rooms, (room - length, row))
    return sorted(rows, key=lambda row: min(rank[piece] for piece in row))
