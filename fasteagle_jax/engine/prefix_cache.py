"""The prefix cache: prefilled prefixes of prompts, kept for later prompts that share them."""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Callable

import numpy as np

from fasteagle_jax.decoding.prefill import Prefilled

CAPACITY = 4  # prefixes; the least recently used one is evicted first


class PrefixCache:
    """Prefixes of whole chunks by their tokens, and each bucket's empty one."""

    def __init__(self, chunk: int, empty_prefix: Callable[[int], Prefilled]) -> None:
        """An empty cache; `empty_prefix` makes the empty caches of a bucket."""
        self._chunk, self._empty_prefix = chunk, empty_prefix
        self._empty: dict[int, Prefilled] = {}  # by bucket
        self._cached: collections.OrderedDict[tuple[int, bool, bytes], Prefilled] = collections.OrderedDict()

    def lookup(self, prompt: tuple[int, ...], bucket: int, drafts: bool) -> tuple[Prefilled, int]:
        """The longest cached prefix that leaves at least one token of the prompt, and its number of chunks."""
        digests = chunk_digests(prompt[:-1], self._chunk)
        for n in range(len(digests), 0, -1):
            if (key := (bucket, drafts, digests[n - 1])) in self._cached:
                self._cached.move_to_end(key)
                return self._cached[key], n
        if bucket not in self._empty:
            self._empty[bucket] = self._empty_prefix(bucket)
        return self._empty[bucket], 0

    def insert(self, tokens: tuple[int, ...], bucket: int, drafts: bool, prefix: Prefilled) -> None:
        """Keeps the prefix of `tokens`, a whole number of chunks."""
        self._cached[bucket, drafts, chunk_digests(tokens, self._chunk)[-1]] = prefix
        if len(self._cached) > CAPACITY:
            self._cached.popitem(last=False)


def chunk_digests(tokens: tuple[int, ...], chunk: int) -> list[bytes]:
    """A hash chain: each whole chunk's digest is of its tokens and the digest before it, so of all tokens so far."""
    whole = len(tokens) // chunk
    pieces = np.asarray(tokens[: whole * chunk], np.int32).reshape(whole, chunk)
    digests = itertools.accumulate(
        pieces, lambda before, ids: hashlib.sha256(before + ids.tobytes()).digest(), initial=b""
    )
    return list(digests)[1:]


def common_chunks(a: tuple[int, ...], b: tuple[int, ...], chunk: int) -> int:
    """The number of whole chunks that two prompts share as a prefix, each having at least one token after it."""
    n = 0
    while (n + 1) * chunk < min(len(a), len(b)) and a[n * chunk : (n + 1) * chunk] == b[n * chunk : (n + 1) * chunk]:
        n += 1
    return n
