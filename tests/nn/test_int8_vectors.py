"""An int8 cache: what it stores, and that attention reads exactly that."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.nn.attention import BLOCK, Past, attention, by_head
from fasteagle_jax.nn.int8_vectors import Int8Vectors, to_int8_vectors
from fasteagle_jax.nn.kv_cache import commit, empty_cache, insert_row, insert_tokens, last_tokens, take_rows

L, B, K, G, D = 2, 3, 2, 2, 8
rng = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def values_of(x: Int8Vectors) -> np.ndarray:
    return np.asarray(x.values, np.float32) * np.asarray(x.scales)[..., None]


def test_a_vector_is_rounded_by_its_largest_entry_and_zero_stays_zero():
    x = normal(4, D).at[2].set(0)
    rounded = jax.jit(to_int8_vectors)(x)
    assert rounded.values.dtype == jnp.int8 and rounded.scales.shape == (4,)
    assert np.abs(rounded.values).max(axis=-1).tolist() == [127, 127, 0, 127]
    assert (np.abs(values_of(rounded) - x) <= 0.5001 * np.asarray(rounded.scales)[:, None]).all()


@pytest.mark.parametrize("num_slots", [40, BLOCK + 40], ids=["at once", "in blocks"])
def test_attention_over_rounded_keys_is_attention_over_their_values(num_slots):
    """Those of the cache and fresh ones, which a drafter may have as they are."""
    num_queries = 3
    q = normal(B, K, G * num_queries, D)
    k, v = (to_int8_vectors(normal(B, K, num_slots, D)) for _ in "kv")
    fresh = normal(B, K, num_queries, D), normal(B, K, num_queries, D)
    rounded = tuple(map(to_int8_vectors, fresh))
    visible = jnp.broadcast_to(jnp.tril(jnp.ones((num_queries, num_queries), bool)), (B, num_queries, num_queries))
    seen = jnp.arange(num_slots) < jnp.asarray([num_slots - 2, 5, 0])[:, None, None]
    filled = jnp.int32(num_slots - 2)
    attend = jax.jit(attention)
    for parts in (fresh, rounded):
        found = attend(q, *parts, visible, Past(k, v, seen, filled))
        plain = [values_of(x) if isinstance(x, Int8Vectors) else x for x in parts]
        expected = attend(q, *map(jnp.asarray, plain), visible, Past(*map(jnp.asarray, map(values_of, (k, v))), seen))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_rounded_tokens_move_as_others_do(stacked):
    """Committed in any order, a row inserted, taken, and its last tokens put into another cache."""
    fresh = [to_int8_vectors(normal(L, B, K, 4, D)) for _ in "kv"]
    in_form = tuple(x if stacked else [x[i] for i in range(L)] for x in fresh)
    order = jnp.asarray([[2, 0, 1], [0, 1, 2], [3, 2, 1]])
    cache = empty_cache(L, B, K, 8, D, jnp.int8, stacked=stacked)
    cache = jax.jit(commit)(cache, in_form, jnp.asarray([3, 2, 3]), order)
    assert cache.num_slots == 8

    def row(cache, b, num_tokens):
        return [values_of(part[i])[b, :, :num_tokens] for part in (cache.k, cache.v) for i in range(L)]

    expected = [values_of(part)[i][0][:, [2, 0, 1]] for part in fresh for i in range(L)]
    np.testing.assert_array_equal(row(cache, 0, 3), expected)
    one = take_rows(cache, jnp.asarray([0]))
    into = insert_row(empty_cache(L, 2, K, 10, D, jnp.int8, stacked=stacked), one, jnp.int32(1))
    np.testing.assert_array_equal(row(into, 1, 3), expected)
    piece = last_tokens(cache, jnp.int32(0), 3)
    again = insert_tokens(empty_cache(L, 2, K, 8, D, jnp.int8, stacked=stacked), piece, jnp.int32(1))
    np.testing.assert_array_equal(row(again, 1, 3), expected)
    assert again.length.tolist() == [0, 3]


def test_fresh_tokens_are_rounded_in_the_layout_of_caches():
    x = normal(B, 5, K, D)
    found = by_head(to_int8_vectors(x))
    np.testing.assert_array_equal(values_of(found), values_of(to_int8_vectors(x)).swapaxes(1, 2))


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_a_donated_int8_cache_is_written_in_place(stacked):
    cache = empty_cache(L, B, K, 4096, D, jnp.int8, stacked=stacked)
    fresh = [to_int8_vectors(normal(L, B, K, 4, D)) for _ in "kv"]
    in_form = tuple(x if stacked else [x[i] for i in range(L)] for x in fresh)
    compiled = jax.jit(commit, donate_argnums=0).lower(cache, in_form, jnp.asarray([1, 2, 3])).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert size == L * B * K * 4096 * (D + 4) * 2 + 4 * B
    assert compiled.memory_analysis().alias_size_in_bytes >= size - 4 * B
    assert compiled.memory_analysis().temp_size_in_bytes < size / 20
