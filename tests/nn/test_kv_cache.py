"""`commit` against a version in numpy that writes token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.nn.attention import from_cache_storage
from fasteagle_jax.nn.kv_cache import (
    EMPTY_SLOT,
    Cache,
    as_ring,
    commit,
    commit_ring,
    empty_cache,
    ring_slots,
    seen_in_ring,
)

L, B, K, S, D = 2, 3, 2, 12, 4


def random_parts(seed: int, tokens: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((L, B, K, tokens, D), dtype=np.float32) for _ in "kv"]


def in_form(parts: list[np.ndarray], stacked: bool) -> tuple:
    return tuple(jnp.asarray(part) if stacked else [jnp.asarray(x) for x in part] for part in parts)


def filled(cache: Cache) -> list[list[np.ndarray]]:
    """The part of k and of v below each row's length; what is behind it is nobody's business."""
    return [
        [np.asarray(part)[:, b, :, : cache.length[b]] for b in range(B)]
        for part in (np.stack(cache.k), np.stack(cache.v))
    ]


def slow_commit(old: list[list[np.ndarray]], fresh: list[np.ndarray], counts, rows) -> list[list[np.ndarray]]:
    new = []
    for part, tokens in zip(old, fresh, strict=True):
        new.append([])
        for b in range(B):
            row = part[b]
            for a in range(counts[b]):
                row = np.concatenate([row, tokens[:, b, :, rows[b][a]][:, :, None]], axis=2)
            new[-1].append(row)
    return new


def assert_same(actual: list[list[np.ndarray]], expected: list[list[np.ndarray]]) -> None:
    for part, expected_part in zip(actual, expected, strict=True):
        for row, expected_row in zip(part, expected_part, strict=True):
            np.testing.assert_array_equal(row, expected_row)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_commits_append_the_counted_tokens_in_the_given_order_whatever_the_rows_lengths(stacked):
    cache = empty_cache(L, B, K, S, D, jnp.float32, stacked=stacked)
    expected = filled(cache)
    rng = np.random.default_rng(0)
    write = jax.jit(commit)
    # Lengths grow apart: to 12 of 12 slots in row 0 (no slack needed, the last write fills it), 4 and 6 in the others.
    for round, counts in enumerate([[4, 0, 1], [4, 0, 2], [0, 1, 0], [4, 3, 3]]):
        fresh = random_parts(round, 5)
        rows = np.stack([rng.permutation(5)[:4] for _ in range(B)])
        cache = write(cache, in_form(fresh, stacked), jnp.asarray(counts), jnp.asarray(rows))
        expected = slow_commit(expected, fresh, counts, rows)
        assert_same(filled(cache), expected)
    np.testing.assert_array_equal(cache.length, [12, 4, 6])


def test_a_list_of_bfloat16_on_a_cpu_is_written_as_bits_without_a_float32_copy_of_any_layer():
    cache, fresh = empty_cache(L, B, K, S, D, jnp.bfloat16, stacked=False), in_form(random_parts(0, 4), False)
    counts = jnp.array([4, 2, 0])
    compiled = jax.jit(commit).lower(cache, fresh, counts).compile()
    assert f"f32[{B},{K},{S},{D}]" not in compiled.as_text()
    new = compiled(cache, fresh, counts)
    for held, tokens in zip((new.k, new.v), fresh, strict=True):
        for layer, expected in zip(held, tokens, strict=True):
            for b, count in enumerate(counts):
                np.testing.assert_array_equal(
                    from_cache_storage(layer)[b, :, :count], expected[b, :, :count].astype(jnp.bfloat16)
                )


def test_without_rows_all_fresh_tokens_are_appended_in_their_order():
    cache, fresh = empty_cache(L, B, K, S, D, jnp.float32), random_parts(0, 5)
    cache = commit(cache, in_form(fresh, True), jnp.array([5, 2, 0]))
    assert_same(filled(cache), [[part[:, b, :, :n] for b, n in enumerate([5, 2, 0])] for part in fresh])


def test_a_write_of_few_tokens_at_the_end_spares_the_others_as_long_as_the_slack_is_kept():
    """All A tokens are written: a row's last A slots are where a write may land, and the start clamps beyond them."""
    cache, fresh = empty_cache(L, B, K, S, D, jnp.float32), random_parts(0, 4)
    for _ in range(2):
        cache = commit(cache, in_form(fresh, True), jnp.array([4, 4, 4]))
    before = filled(cache)  # 8 of 12 slots, the slack of exactly A = 4 being left
    cache = commit(cache, in_form(random_parts(1, 4), True), jnp.array([0, 1, 4]))
    for part, old in zip(filled(cache), before, strict=True):
        for row, old_row in zip(part, old, strict=True):
            np.testing.assert_array_equal(row[:, :, :8], old_row)
    np.testing.assert_array_equal(cache.length, [8, 9, 12])


def test_fresh_tokens_are_rounded_to_the_caches_dtype():
    cache, fresh = empty_cache(L, B, K, S, D, jnp.bfloat16), random_parts(0, 4)
    cache = commit(cache, in_form(fresh, True), jnp.array([4, 4, 4]))
    assert cache.k.dtype == jnp.bfloat16
    np.testing.assert_array_equal(cache.k[:, :, :, :4], jnp.asarray(fresh[0], jnp.bfloat16))


def test_a_donated_cache_is_written_in_place():
    cache, fresh = empty_cache(L, B, K, S, D, jnp.float32), in_form(random_parts(0, 4), True)
    compiled = jax.jit(commit, donate_argnums=0).lower(cache, fresh, jnp.array([1, 2, 3])).compile()
    one_copy = cache.k.nbytes
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * one_copy  # k and v are their own outputs
    assert compiled.memory_analysis().temp_size_in_bytes < one_copy


# --- the ring ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_a_ring_always_holds_the_window_whatever_the_pace_and_what_is_left_out(stacked):
    """Against a dictionary of what was written; a write of the first layer alone leaves the others as they are."""
    window, most = 4, 3
    ring = as_ring(empty_cache(L, B, K, ring_slots(100, window, most), D, jnp.float32, stacked=stacked))
    assert ring.num_slots == window + 2 * most
    rng = np.random.default_rng(3)
    written: dict[tuple[int, int, int], np.ndarray] = {}  # layer, row, position: k
    length = np.zeros(B, int)
    write = jax.jit(commit_ring)
    for step in range(40):
        counts = rng.integers(0, most + 1, B)
        if step % 7 == 6:  # left out
            ring = ring._replace(length=ring.length + jnp.asarray(counts))
            length += counts
            continue
        num_layers = 1 if step % 5 == 4 else L
        fresh = random_parts(step, most)
        ring = write(ring, in_form([part[:num_layers] for part in fresh], stacked), jnp.asarray(counts))
        for layer, b in np.ndindex(num_layers, B):
            for i in range(counts[b]):
                written[layer, b, length[b] + i] = fresh[0][layer, b, :, i]
        length += counts
        np.testing.assert_array_equal(ring.length, length)
        for layer, b in np.ndindex(L, B):
            positions = np.asarray(ring.positions[layer][b])
            held = positions[positions != EMPTY_SLOT].tolist()
            assert len(set(held)) == len(held)
            expected = {p for (at, row, p) in written if (at, row) == (layer, b) and length[b] - window <= p}
            assert expected <= set(held)
            for slot in np.flatnonzero(positions != EMPTY_SLOT):
                np.testing.assert_array_equal(ring.k[layer][b, :, slot], written[layer, b, positions[slot]])


def test_a_query_sees_the_positions_of_its_window_that_the_ring_holds():
    positions = jnp.array([[3, 4, EMPTY_SLOT, 1]])
    queries = jnp.array([[5, 6]])
    assert seen_in_ring(positions, queries, 3).tolist() == [[[True, True, False, False], [False, True, False, False]]]
    assert seen_in_ring(positions, queries, None).tolist() == [[[True, True, False, True]]]


def test_without_a_window_a_ring_has_a_slot_for_every_position():
    assert ring_slots(100, None, 8) == 100
    assert ring_slots(100, 512, 8) == 100
    assert ring_slots(2000, 512, 8) == ring_slots(90_000, 512, 8) == 528
