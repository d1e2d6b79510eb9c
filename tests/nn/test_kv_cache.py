"""`commit` against a version in numpy that writes token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.nn.attention import attention, from_cache_storage
from fasteagle_jax.nn.int8_vectors import to_int8_vectors
from fasteagle_jax.nn.kv_cache import (
    EMPTY_SLOT,
    Cache,
    as_ring,
    commit,
    commit_ring,
    empty_cache,
    empty_mixed_cache,
    insert_row,
    insert_tokens,
    last_tokens,
    ring_slots,
    seen_in_ring,
    take_rows,
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


# --- layers of both kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize(
    ("stacked", "is_local"),
    [
        pytest.param(True, (True, False), id="stacked-mixed"),
        pytest.param(True, (True, True), id="stacked-all local", marks=pytest.mark.slow),
        pytest.param(False, (True, False), id="list-mixed", marks=pytest.mark.slow),
        pytest.param(False, (True, True), id="list-all local"),
    ],
)
def test_within_the_window_a_local_layer_is_seen_as_in_a_cache_of_all_positions(stacked, is_local, int8):
    window, most, dtype = 4, 3, jnp.int8 if int8 else jnp.float32
    sizes = B, K, 60, ring_slots(60, window, most), D, dtype
    mixed = empty_mixed_cache(is_local, *sizes, stacked=stacked)
    whole = empty_cache(L, B, K, 60, D, dtype, stacked=stacked)
    write, seen = jax.jit(commit), jax.jit(seen_alike, static_argnums=(2, 3))
    rng = np.random.default_rng(0)
    for step in range(12):
        parts = [jnp.asarray(part) for part in random_parts(step, most)]
        parts = [to_int8_vectors(part) for part in parts] if int8 else parts
        fresh = tuple(part if stacked else [part[i] for i in range(L)] for part in parts)
        counts = jnp.asarray(rng.integers(0, most + 1, B))
        order = jnp.asarray(np.stack([rng.permutation(most) for _ in range(B)]))
        mixed, whole = write(mixed, fresh, counts, order), write(whole, fresh, counts, order)
        np.testing.assert_array_equal(mixed.length, whole.length)
        for layer in range(L):
            found, expected = seen(mixed, whole, layer, window if is_local[layer] else None)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert whole.length.min() > window


def seen_alike(mixed, whole, layer, window):
    """What a query after all committed tokens attends to, of both caches."""
    q, one = jax.random.normal(jax.random.key(0), (B, K, 1, D)), jnp.ones((B, 1, 1), bool)
    found = []
    for cache in (mixed, whole):
        past = cache.layer(layer)
        if window is not None:
            past = past.within(window, cache.length[:, None])
        found.append(attention(q, q, q, one, past))
    return found


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_chunks_of_a_mixed_cache_are_taken_and_put_where_they_were(stacked):
    """Those of a prompt, whose rings have turned over, into another row of another batch."""
    chunk, window = 4, 5
    slots = ring_slots(40, window, chunk)
    mixed = empty_mixed_cache((True, False), 1, K, 20, slots, D, jnp.float32, stacked=stacked)
    into = empty_mixed_cache((True, False), B, K, 40, slots, D, jnp.float32, stacked=stacked)
    for step in range(5):
        fresh = in_form([part[:, :1] for part in random_parts(step, chunk)], stacked)
        mixed = commit(mixed, fresh, jnp.asarray([chunk]))
        into = insert_tokens(into, last_tokens(mixed, jnp.int32(0), chunk), jnp.int32(2))
    assert into.length.tolist() == [0, 0, 20]
    for layer in range(L):
        one, other = mixed.layer(layer), into.layer(layer)
        seen = np.asarray(one.seen)[0, 0]
        np.testing.assert_array_equal(np.asarray(other.seen)[2, 0, : len(seen)], seen)
        np.testing.assert_array_equal(np.asarray(other.k)[2][:, : len(seen)][:, seen], np.asarray(one.k)[0][:, seen])
        if one.positions is not None:
            np.testing.assert_array_equal(other.positions[2], one.positions[0])
    again = insert_row(into, take_rows(mixed, jnp.asarray([0])), jnp.int32(0))
    np.testing.assert_array_equal(again.length, [20, 0, 20])
    np.testing.assert_array_equal(again.local.positions[0][0], again.local.positions[0][2])
