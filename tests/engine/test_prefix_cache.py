"""The prefix cache: what it finds, what it evicts, and what a lookup costs."""

from __future__ import annotations

import hashlib

import pytest

from fasteagle_jax.engine.prefix_cache import CAPACITY, PrefixCache, common_chunks

CHUNK, BUCKET = 4, 64


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(CHUNK, lambda bucket: f"empty {bucket}")  # type: ignore[arg-type, return-value]


def prompt(*chunks: int, rest: int = 1) -> tuple[int, ...]:
    """Chunks of one token each, and so many tokens of another."""
    return tuple(token for token in chunks for _ in range(CHUNK)) + (99,) * rest


def test_the_longest_prefix_of_the_same_bucket_and_kind_is_found_that_leaves_a_token_over(cache):
    cache.insert(prompt(1, rest=0), BUCKET, True, "one")
    cache.insert(prompt(1, 2, rest=0), BUCKET, True, "two")
    assert cache.lookup(prompt(1, 2, 3), BUCKET, True) == ("two", 2)
    assert cache.lookup(prompt(1, 2, rest=0), BUCKET, True) == ("one", 1)
    assert cache.lookup(prompt(1, 3, 2), BUCKET, True) == ("one", 1)
    assert cache.lookup(prompt(2, 1), BUCKET, True) == (f"empty {BUCKET}", 0)
    assert cache.lookup(prompt(1, 2), BUCKET, False) == (f"empty {BUCKET}", 0)
    assert cache.lookup(prompt(1, 2), 2 * BUCKET, True) == (f"empty {2 * BUCKET}", 0)


def test_the_least_recently_used_prefix_is_evicted(cache):
    for i in range(CAPACITY):
        cache.insert(prompt(i, rest=0), BUCKET, True, str(i))
    cache.lookup(prompt(0), BUCKET, True)
    cache.insert(prompt(50, rest=0), BUCKET, True, "new")
    found = [cache.lookup(prompt(i), BUCKET, True)[1] for i in (*range(CAPACITY), 50)]
    assert found == [1, 0, *[1] * (CAPACITY - 2), 1]


def test_common_chunks_leave_a_token_of_both():
    assert common_chunks(prompt(1, 2), prompt(1, 2, 3), CHUNK) == 2
    assert common_chunks(prompt(1, 2, rest=0), prompt(1, 2, 3), CHUNK) == 1
    assert common_chunks(prompt(1, 2), prompt(1, 3), CHUNK) == 1


def test_a_lookup_hashes_every_token_once(cache, monkeypatch):
    """It hashed each prefix of whole chunks: n * n / 2 chunks for a prompt of n."""
    hashed = []

    class Token(int):
        def __hash__(self):
            hashed.append(1)
            return int.__hash__(self)

    sha256 = hashlib.sha256

    def counted(data: bytes):
        hashed.extend([1] * (len(data) // 4))
        return sha256(data)

    monkeypatch.setattr(hashlib, "sha256", counted)
    tokens = tuple(Token(i) for i in range(100 * CHUNK + 1))
    cache.insert(tokens[: 50 * CHUNK], BUCKET, True, "half")
    hashed.clear()
    assert cache.lookup(tokens, BUCKET, True) == ("half", 50)
    digest_words = 32 // 4
    assert len(hashed) <= len(tokens) + 100 * digest_words
