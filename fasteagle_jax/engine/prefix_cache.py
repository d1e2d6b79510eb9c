"""The prefix cache: prefilled chunks of prompts, kept for later prompts that begin alike."""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

from fasteagle_jax.decoding.prefill import Prefilled

Key = tuple[bool, bytes]  # whether the drafter's cache has the chunk, too; the chunk's digest


class PrefixCache:
    """A tree of chunks. A chunk's key is the digest of its tokens and of all before them, so of its path in the tree.

    The least recently used chunk is evicted first; whoever uses a chunk uses those before it too, so that it is a leaf.
    """

    def __init__(self, capacity: int) -> None:
        """An empty cache of `capacity` chunks at most."""
        self.capacity = capacity
        self._chunks: collections.OrderedDict[Key, Prefilled] = collections.OrderedDict()

    def depth(self, digests: Sequence[bytes], drafts: bool) -> int:
        """How many of the chunks, from the first on, are in the cache."""
        return next((n for n, digest in enumerate(digests) if (drafts, digest) not in self._chunks), len(digests))

    def path(self, digests: Sequence[bytes], drafts: bool) -> list[Prefilled]:
        """The chunks from the first on that are in the cache, which counts as use."""
        found = digests[: self.depth(digests, drafts)]
        self._use(found, drafts)
        return [self._chunks[drafts, digest] for digest in found]

    def insert(self, digests: Sequence[bytes], drafts: bool, chunk: Prefilled) -> None:
        """Keeps the last chunk of those with the digests."""
        self._chunks[drafts, digests[-1]] = chunk
        self._use(digests, drafts)
        while len(self._chunks) > self.capacity:
            self._chunks.popitem(last=False)

    def _use(self, digests: Sequence[bytes], drafts: bool) -> None:
        for digest in reversed(digests):
            if (drafts, digest) in self._chunks:
                self._chunks.move_to_end((drafts, digest))


def chunk_digests(tokens: Sequence[int], chunk: int) -> list[bytes]:
    """A hash chain: each whole chunk's digest is of its tokens and the digest before it, so of all tokens so far."""
    whole = len(tokens) // chunk
    pieces = np.asarray(tokens[: whole * chunk], np.int32).reshape(whole, chunk)
    digests = itertools.accumulate(
        pieces, lambda before, ids: hashlib.sha256(before + ids.tobytes()).digest(), initial=b""
    )
    return list(digests)[1:]
