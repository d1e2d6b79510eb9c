"""The KV caches: committed keys and values of a stack of layers.

L layers · B rows · K heads of K/V · S slots · D head width · Q query tokens · M fresh tokens · A written tokens.
A cache holds verified tokens only: a forward pass reads it, a commit writes it once afterwards, nothing is rolled back.
`Cache` keeps every position, in its own slot; `Ring` the last ones, in a fixed number of slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fasteagle_jax.devices.sharding import by_shard
from fasteagle_jax.nn.attention import Past, cache_storage_dtype, to_cache_storage

NOTHING = -1  # the position of a slot that holds none
# The logical axes of a cache's arrays by name (see sharding.RULES), a stack's first dimension left out.
AXES = {
    "k": ("rows", "kv_heads", None, None),
    "v": ("rows", "kv_heads", None, None),
    "positions": ("rows", None),
    "cursor": ("rows",),
    "length": ("rows",),
}
_AXES_BY_DIMS = {5: (None, *AXES["k"]), 4: AXES["k"], 3: (None, *AXES["positions"]), 2: AXES["positions"], 1: ("rows",)}


class Cache(NamedTuple):
    """Keys and values [L, B, K, S, D] (or a list of L arrays [B, K, S, D]); slot p holds position p."""

    k: Any
    v: Any
    length: jax.Array  # int32 [B], filled slots

    @property
    def num_slots(self) -> int:
        """S."""
        return self.k[0].shape[-2]

    @property
    def layers(self) -> Any:
        """One (k, v) a layer, in the cache's own form (stacked or list), for `run_layers`."""
        return list(zip(self.k, self.v, strict=True)) if isinstance(self.k, list) else (self.k, self.v)

    @property
    def batch_dims(self) -> Cache:
        """The batch dimension of each array, in the cache's form: 1 in stacks of layers, else 0."""
        return _batch_dims(self, "k", "v")

    def layer(self, index: int) -> Past:
        """What queries after all committed tokens see of one layer."""
        return Past(self.k[index], self.v[index], self.seen(), self.filled())

    def seen(self) -> jax.Array:
        """bool [B, 1, S], True for the filled slots, which every query sees."""
        return (jnp.arange(self.num_slots) < self.length[:, None])[:, None]

    def filled(self) -> jax.Array | None:
        """int32 [], for `Past.filled`; None for a stack, which a scan reads in one go."""
        return self.length.max() if isinstance(self.k, list) else None


def empty_cache(
    num_layers: int,
    batch: int,
    num_kv_heads: int,
    num_slots: int,
    head_dim: int,
    dtype: Any,
    *,
    stacked: bool = True,
) -> Cache:
    """A Cache with nothing in it; a list of layers where `stacked` is False."""
    shape = (batch, num_kv_heads, num_slots, head_dim)
    if not stacked:
        dtype = cache_storage_dtype(dtype)

    def zeros() -> Any:
        if stacked:
            return jnp.zeros((num_layers, *shape), dtype)
        return [jnp.zeros(shape, dtype) for _ in range(num_layers)]

    return Cache(zeros(), zeros(), jnp.zeros((batch,), jnp.int32))


def commit(cache: Cache, fresh: Any, counts: jax.Array, token_indices: jax.Array | None = None) -> Cache:
    """The cache with `counts` of the fresh tokens appended to every row.

    Args:
      cache: read and replaced; donate it for a write in place.
      fresh: pair (k, v) of stacks of [B, K, M, D], as a forward pass returns them.
      counts: int32 [B], how many tokens each row gains.
      token_indices: int32 [B, A], which fresh tokens in which order; None for all in theirs.

    All A tokens are written each time: those past the count are masked by `length` and overwritten later. An update's
    start is clamped to the end of the cache, so a row needs A slots of slack beyond its last token.
    """
    if token_indices is not None:
        fresh = jax.tree.map(lambda x: _take_tokens(x, token_indices), fresh)
    k, v = _write((cache.k, cache.v), fresh, cache.length)
    return Cache(k, v, cache.length + counts)


class Ring(NamedTuple):
    """Keys and values as in a Cache, of the last positions: where the slots end, writing begins anew at the first.

    Each slot knows its position, so that positions can be left out (`length` goes on without them) and the first
    layers can be written without the others.
    """

    k: Any
    v: Any
    positions: Any  # int32 [L, B, S] (or a list of L arrays [B, S]), NOTHING where the slot is empty
    cursor: jax.Array  # int32 [B], the slot to be written next
    length: jax.Array  # int32 [B], the position to be written next

    @property
    def num_slots(self) -> int:
        """S."""
        return self.k[0].shape[-2]

    @property
    def layers(self) -> Any:
        """One (k, v, positions) a layer, in the ring's own form (stacked or list), for `run_layers`."""
        parts = (self.k, self.v, self.positions)
        return list(zip(*parts, strict=True)) if isinstance(self.k, list) else parts

    @property
    def batch_dims(self) -> Ring:
        """The batch dimension of each array, in the ring's form: 1 in stacks of layers, else 0."""
        return _batch_dims(self, "k", "v", "positions")

    def filled(self) -> jax.Array | None:
        """int32 [], for `Past.filled`; None for a stack, which a scan reads in one go."""
        return jnp.minimum(self.length.max(), self.num_slots) if isinstance(self.k, list) else None


def ring_slots(num_slots: int, window: int | None, most_written: int) -> int:
    """S of a Ring for rows of up to `num_slots` positions of which a query sees the last `window` (None for all).

    Up to `most_written` - 1 slots stay unused at the end of each turn, and as many are overwritten past a count.
    """
    return num_slots if window is None else min(num_slots, window + 2 * most_written)


def as_ring(cache: Cache) -> Ring:
    """An empty Cache's slots as a Ring with nothing in it."""
    positions = jax.tree.map(lambda k: jnp.full((*k.shape[:-3], k.shape[-2]), NOTHING, jnp.int32), cache.k)
    return Ring(cache.k, cache.v, positions, cache.length, cache.length)


def seen_in_ring(positions: jax.Array, queries: jax.Array, window: int | None) -> jax.Array:
    """bool [B, Q, S], or [B, 1, S] without a window: True where the query int32 [B, Q] sees the slot int32 [B, S].

    Queries and slots are given by their positions.
    """
    held = positions[:, None] != NOTHING
    if window is None:
        return held
    return held & (queries[:, :, None] - positions[:, None] < window)


def commit_ring(ring: Ring, fresh: Any, counts: jax.Array) -> Ring:
    """The ring with the first `counts` int32 [B] of the fresh tokens in it, at the positions from `length` on.

    `fresh` is the pair (k, v) of stacks of [B, K, A, D] of the first layers, or all; the others keep what they have.
    All A tokens are written, as by `commit`; the slots of those past the count hold nothing.
    """
    k, v = fresh
    num_tokens = k[0].shape[-2]
    starts = jnp.where(ring.cursor + num_tokens > ring.num_slots, 0, ring.cursor)
    index = jnp.arange(num_tokens)
    written = jnp.where(index < counts[:, None], ring.length[:, None] + index, NOTHING)  # [B, A]
    old = (ring.k, ring.v, ring.positions)
    if isinstance(k, list):
        num = len(k)
        new = _write([part[:num] for part in old], (k, v, [written] * num), starts)
        new = [first + part[num:] for first, part in zip(new, old, strict=True)]
    else:
        positions = jnp.broadcast_to(written, (k.shape[0], *written.shape))
        new = _write(old, (k, v, positions), starts)
    return Ring(new[0], new[1], new[2], starts + counts, ring.length + counts)


def _write(slots: Any, tokens: Any, starts: jax.Array) -> Any:
    """Slots with each row's tokens written from its start on: [(L,) B, (K,) S, (D)] and S = A, int32 [B]."""
    stacked = not isinstance(slots[0], list)
    batch_dim = 1 if stacked else 0

    def write_rows(slots: Any, tokens: Any, starts: jax.Array) -> Any:
        def write_row(b: jax.Array, slots: Any) -> Any:
            # One dynamic_update_slice a row stays in place; a scatter or a vmapped update would copy the whole cache.
            def write(into: jax.Array, tokens: jax.Array) -> jax.Array:
                row = to_cache_storage(jax.lax.dynamic_slice_in_dim(tokens, b, 1, axis=batch_dim), into.dtype)
                # XLA's TPU compiler fails where it sees that all rows of tokens go, in turn, to all rows of slots.
                row = jax.lax.optimization_barrier(row)
                start = [jnp.zeros((), jnp.int32)] * into.ndim
                start[batch_dim] = b
                start[batch_dim + (2 if into.ndim - batch_dim == 4 else 1)] = starts[b]
                return jax.lax.dynamic_update_slice(into, row, start)

            return jax.tree.map(write, slots, tokens)

        return jax.lax.fori_loop(0, starts.shape[0], write_row, slots)

    # Left to the compiler, a turn whose row may be anybody's would bring the devices' shards together.
    return by_shard(write_rows, _AXES_BY_DIMS, tuple(slots), tuple(tokens), starts)


def _batch_dims(cache: Any, *stacks: str) -> Any:
    dims = jax.tree.map(lambda _: 0, cache)
    return dims if isinstance(cache.k, list) else dims._replace(**dict.fromkeys(stacks, 1))


def insert_row(batch: Any, row: Any, slot: jax.Array) -> Any:
    """A pytree of a batch's arrays [B, ...] and caches with one row, of the same structure, at slot int32 [].

    A row's arrays may be shorter than the batch's, as a prompt's cache is.
    """

    def insert(into: jax.Array, part: jax.Array, dim: int) -> jax.Array:
        start = [jnp.zeros((), jnp.int32)] * into.ndim
        start[dim] = slot
        return jax.lax.dynamic_update_slice(into, part.astype(into.dtype), start)

    return jax.tree.map(insert, batch, row, batch_dims(batch))


def take_rows(batch: Any, rows: jax.Array) -> Any:
    """A pytree of a batch's arrays [B, ...] and caches with `rows` int32 [B'] of it."""
    return jax.tree.map(lambda x, dim: jnp.take(x, rows, axis=dim), batch, batch_dims(batch))


def batch_dims(batch: Any) -> Any:
    """The batch dimension of each array of a pytree: what a cache in it says, else 0."""

    def has_own(part: Any) -> bool:
        return hasattr(part, "batch_dims")

    def of(part: Any) -> Any:
        return part.batch_dims if has_own(part) else jax.tree.map(lambda _: 0, part)

    return jax.tree.map(of, batch, is_leaf=has_own)


def _take_tokens(x: jax.Array, token_indices: jax.Array) -> jax.Array:
    """Tokens `token_indices` [B, A] of x [..., B, K, M, D]: [..., B, K, A, D]."""
    index = token_indices[:, None, :, None]  # [B, 1, A, 1]
    index = index.reshape((1,) * (x.ndim - 4) + index.shape)
    return jnp.take_along_axis(x, index, axis=-2)
