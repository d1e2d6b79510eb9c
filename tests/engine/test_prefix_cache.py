"""The prefix cache: what it finds, what it evicts, and what a prompt's digests cost."""

from __future__ import annotations

import hashlib

import pytest

from fasteagle_jax.engine.prefix_cache import PrefixCache, chunk_digests

CHUNK, CAPACITY = 4, 4


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(CAPACITY)


def digests(*chunks: int) -> list[bytes]:
    """Of chunks of one token each, and a token more."""
    return chunk_digests([token for token in chunks for _ in range(CHUNK)] + [99], CHUNK)


def keep(cache: PrefixCache, *chunks: int, drafts: bool = True) -> None:
    """Inserts every chunk of a path as its own text."""
    for n in range(1, len(chunks) + 1):
        cache.insert(digests(*chunks[:n]), drafts, str(chunks[:n]))  # type: ignore[arg-type]


def test_the_longest_path_of_the_same_kind_is_found(cache):
    keep(cache, 1, 2)
    keep(cache, 1, 3)
    assert cache.path(digests(1, 2, 5), True) == ["(1,)", "(1, 2)"]
    assert cache.path(digests(1, 3, 2), True) == ["(1,)", "(1, 3)"]
    assert cache.path(digests(2, 1), True) == []
    assert cache.path(digests(1, 2), False) == []
    assert [cache.depth(digests(*chunks), True) for chunks in ((1, 2), (1, 4), (3,), ())] == [2, 1, 0, 0]


def test_the_least_recently_used_leaf_is_evicted(cache):
    keep(cache, 1, 2)
    keep(cache, 3)
    keep(cache, 1, 4)
    assert cache.path(digests(1, 2), True) == ["(1,)", "(1, 2)"]
    keep(cache, 5)  # in place of 3, the oldest
    assert cache.depth(digests(3), True) == 0
    keep(cache, 6)  # in place of 1, 4
    assert [cache.depth(digests(1, n), True) for n in (2, 4)] == [2, 1]


def test_of_a_path_longer_than_the_cache_the_beginning_stays(cache):
    keep(cache, *range(7))
    assert cache.depth(digests(*range(7)), True) == CAPACITY
    nothing = PrefixCache(0)
    keep(nothing, 1)
    assert nothing.path(digests(1), True) == []


def test_every_token_of_a_prompt_is_hashed_once(monkeypatch):
    """Each prefix of whole chunks was hashed: n * n / 2 chunks for a prompt of n."""
    hashed = []
    sha256 = hashlib.sha256

    def counted(data: bytes):
        hashed.append(len(data) // 4)
        return sha256(data)

    monkeypatch.setattr(hashlib, "sha256", counted)
    assert len(chunk_digests(tuple(range(100 * CHUNK + 1)), CHUNK)) == 100
    digest_words = 32 // 4
    assert sum(hashed) <= 100 * (CHUNK + digest_words)
