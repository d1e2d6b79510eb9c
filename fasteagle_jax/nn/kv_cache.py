"""KV caches: the committed keys and values of a stack of layers.

L layers · B rows · K heads of K/V · S slots · D head width · Q query tokens · M fresh tokens · A written tokens.
A cache holds verified tokens only: a forward pass reads it, a commit writes it once afterwards, nothing is rolled back.
`Cache` keeps every position in its own slot, `Ring` the last positions in a fixed number of slots.
`MixedCache` has a Cache of some layers and a Ring of the others.
A layer's keys, or values, are an array or, of an int8 cache, Int8Vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fasteagle_jax.devices.sharding import by_shard
from fasteagle_jax.nn.attention import EitherPast, Past, cache_storage_dtype, to_cache_storage
from fasteagle_jax.nn.int8_vectors import Int8Vectors, empty_int8_vectors

EMPTY_SLOT = -1  # the position of an empty slot
# The logical axes of a cache's arrays by name (see sharding.RULES), without the layers of a stack.
AXES = {
    "k": ("rows", "kv_heads", None, None),
    "v": ("rows", "kv_heads", None, None),
    "scales": ("rows", "kv_heads", None),
    "positions": ("rows", None),
    "cursor": ("rows",),
    "length": ("rows",),
}
# Those of a list's arrays by their number of dimensions.
_AXES_BY_DIMS = {4: AXES["k"], 3: AXES["scales"], 2: AXES["positions"], 1: ("rows",)}


class Cache(NamedTuple):
    """Keys and values [L, B, K, S, D] (or a list of L arrays [B, K, S, D]); slot p holds position p."""

    k: Any
    v: Any
    length: jax.Array  # int32 [B], filled slots

    @property
    def num_slots(self) -> int:
        """S."""
        return (self.k[0] if isinstance(self.k, list) else self.k).shape[-2]

    @property
    def layers(self) -> Any:
        """(k, v) of the layers, as a stack or a list like the cache, for `run_layers`."""
        return list(zip(self.k, self.v, strict=True)) if isinstance(self.k, list) else (self.k, self.v)

    @property
    def batch_dims(self) -> Cache:
        """The batch dimension of each array, as a Cache: 1 in stacks of layers, else 0."""
        return _batch_dims(self, "k", "v")

    def layer(self, index: Any) -> Past:
        """The Past of one layer for queries after all committed tokens."""
        return self.past((self.k[index], self.v[index]))

    def past(self, layer: Any) -> Past:
        """The Past of one of `layers`."""
        k, v = layer
        return Past(k, v, self.seen(), self.filled())

    def seen(self) -> jax.Array:
        """bool [B, 1, S], True for the filled slots, which every query sees."""
        return (jnp.arange(self.num_slots) < self.length[:, None])[:, None]

    def filled(self) -> jax.Array | None:
        """int32 [], for `Past.filled`; None for a stack, which a scan reads at once."""
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
    """An empty Cache, as a stack or a list of layers; of a `dtype` int8 in Int8Vectors."""
    shape = (batch, num_kv_heads, num_slots, head_dim)
    if not stacked:
        dtype = cache_storage_dtype(dtype)

    def empty(*shape: int) -> Any:
        return empty_int8_vectors(shape) if dtype == jnp.int8 else jnp.zeros(shape, dtype)

    def zeros() -> Any:
        return empty(num_layers, *shape) if stacked else [empty(*shape) for _ in range(num_layers)]

    return Cache(zeros(), zeros(), jnp.zeros((batch,), jnp.int32))


def commit(cache: Any, fresh: Any, counts: jax.Array, token_indices: jax.Array | None = None) -> Any:
    """The cache with `counts` of the fresh tokens appended to every row.

    Args:
      cache: a Cache or MixedCache; donate it for a write in place.
      fresh: pair (k, v) of stacks or lists of [B, K, M, D], as a forward pass over this cache returns them.
      counts: int32 [B], how many tokens each row gains.
      token_indices: int32 [B, A], the fresh tokens to append, in this order; None for all in theirs.

    All A tokens are written each time: those past the count are masked by `length` and overwritten later. An update's
    start is clamped to the end of the cache, so a row needs A slots of slack beyond its last token.
    """
    if token_indices is not None:
        batch_dim = 0 if isinstance(fresh[0], list) else 1
        fresh = jax.tree.map(lambda x: _take_tokens(x, token_indices, batch_dim), fresh)
    if isinstance(cache, MixedCache):
        return cache.commit(fresh, counts)
    k, v = _write((cache.k, cache.v), fresh, cache.length)
    return Cache(k, v, cache.length + counts)


class Ring(NamedTuple):
    """Keys and values as in a Cache, of the last positions: after the last slot, writing resumes at the first.

    Each slot knows its position, so positions can be skipped (`length` still counts them), and the first layers can be
    written without the others.
    """

    k: Any
    v: Any
    positions: Any  # int32 [L, B, S] (or a list of L arrays [B, S]), EMPTY_SLOT in an empty slot
    cursor: jax.Array  # int32 [B], the slot to be written next
    length: jax.Array  # int32 [B], the position to be written next

    @property
    def num_slots(self) -> int:
        """S."""
        return (self.k[0] if isinstance(self.k, list) else self.k).shape[-2]

    @property
    def layers(self) -> Any:
        """(k, v, positions) of the layers, as a stack or a list like the ring, for `run_layers`."""
        parts = (self.k, self.v, self.positions)
        return list(zip(*parts, strict=True)) if isinstance(self.k, list) else parts

    @property
    def batch_dims(self) -> Ring:
        """The batch dimension of each array, as a Ring: 1 in stacks of layers, else 0."""
        return _batch_dims(self, "k", "v", "positions")

    def layer(self, index: Any) -> Past:
        """The Past of one layer for queries after all committed tokens, of whatever window (see `Past.within`)."""
        return self.past((self.k[index], self.v[index], self.positions[index]))

    def past(self, layer: Any) -> Past:
        """The Past of one of `layers`."""
        k, v, positions = layer
        return Past(k, v, (positions != EMPTY_SLOT)[:, None], self.filled(), positions)

    def filled(self) -> jax.Array | None:
        """int32 [], for `Past.filled`; None for a stack, which a scan reads at once."""
        return jnp.minimum(self.length.max(), self.num_slots) if isinstance(self.k, list) else None


def ring_slots(num_slots: int, window: int | None, most_written: int) -> int:
    """S of a Ring for rows of up to `num_slots` positions of which a query sees the last `window` (None for all).

    Up to `most_written` - 1 slots stay unused at the end of each pass over the slots, and as many are overwritten past
    a count.
    """
    return num_slots if window is None else min(num_slots, window + 2 * most_written)


def as_ring(cache: Cache) -> Ring:
    """An empty Ring of an empty Cache's slots."""

    def empty(k: Any) -> jax.Array:
        return jnp.full((*k.shape[:-3], k.shape[-2]), EMPTY_SLOT, jnp.int32)

    positions = [empty(k) for k in cache.k] if isinstance(cache.k, list) else empty(cache.k)
    return Ring(cache.k, cache.v, positions, cache.length, cache.length)


def seen_in_ring(positions: jax.Array, queries: jax.Array, window: int | None) -> jax.Array:
    """The mask bool [B, Q, S], or [B, 1, S] without a window, True where a query sees a slot.

    Slots are given by their `positions` int32 [B, S], and `queries` int32 [B, Q] by theirs.
    """
    occupied = positions[:, None] != EMPTY_SLOT
    if window is None:
        return occupied
    return occupied & (queries[:, :, None] - positions[:, None] < window)


def commit_ring(ring: Ring, fresh: Any, counts: jax.Array) -> Ring:
    """The ring with the first `counts` int32 [B] of the fresh tokens in it, at the positions from `length` on.

    `fresh` is the pair (k, v) of stacks of [B, K, A, D] of the first layers, or of all; other layers do not change.
    All A tokens are written, as by `commit`; the slots of those past the count are marked empty.
    """
    k, v = fresh
    num_tokens = k[0].shape[-2]
    starts = jnp.where(ring.cursor + num_tokens > ring.num_slots, 0, ring.cursor)
    index = jnp.arange(num_tokens)
    written = jnp.where(index < counts[:, None], ring.length[:, None] + index, EMPTY_SLOT)  # [B, A]
    old = (ring.k, ring.v, ring.positions)
    if isinstance(k, list):
        num_layers = len(k)
        new = _write([part[:num_layers] for part in old], (k, v, [written] * num_layers), starts)
        new = [first + part[num_layers:] for first, part in zip(new, old, strict=True)]
    else:
        positions = jnp.broadcast_to(written, (k.shape[0], *written.shape))
        new = _write(old, (k, v, positions), starts)
    return Ring(new[0], new[1], new[2], starts + counts, ring.length + counts)


# --- both -------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedCache:
    """The caches of a target's layers, of which the local ones keep the last positions alone."""

    full: Cache | None  # of the other layers; None if there are none
    local: Ring
    is_local: tuple[bool, ...] = dataclasses.field(metadata={"static": True})  # of each layer

    @property
    def length(self) -> jax.Array:
        """int32 [B], positions so far."""
        return self.local.length

    @property
    def num_slots(self) -> int:
        """S of the layers that keep all positions, else of the local ones."""
        return self.local.num_slots if self.full is None else self.full.num_slots

    @property
    def stacked(self) -> bool:
        """Whether layers are stacks."""
        return not isinstance(self.local.k, list)

    def place(self, index: int) -> int:
        """A layer's index among those of its kind."""
        return self.is_local[:index].count(self.is_local[index])

    @property
    def layers(self) -> Any:
        """What `past` reads, a list or a stack like the layers: of a stack of both kinds, a layer's kind and place."""
        if self.full is None:
            return self.local.layers
        places = [self.place(i) for i in range(len(self.is_local))]
        if self.stacked:
            return jnp.asarray(self.is_local), jnp.asarray(places, jnp.int32)
        of_each = {False: self.full.layers, True: self.local.layers}
        return [of_each[local][place] for local, place in zip(self.is_local, places, strict=True)]

    def past(self, layer: Any) -> Past | EitherPast:
        """The Past of one of `layers`."""
        full, local = self.full, self.local
        if full is None:
            return local.past(layer)
        if not self.stacked:
            return local.past(layer) if len(layer) == 3 else full.past(layer)
        is_local, place = layer
        return EitherPast(is_local, _reader(local, place), _reader(full, place), isinstance(full.k, Int8Vectors))

    def layer(self, index: int) -> Past:
        """The Past of one layer for queries after all committed tokens."""
        cache = self.local if self.is_local[index] else self.full
        assert cache is not None
        return cache.layer(self.place(index))

    def commit(self, fresh: Any, counts: jax.Array) -> MixedCache:
        """The cache with the first `counts` int32 [B] of fresh tokens in it, as by `commit`."""

        def of(local: bool) -> Any:
            indices = [i for i, own in enumerate(self.is_local) if own == local]
            return tuple(x[np.asarray(indices)] if self.stacked else [x[i] for i in indices] for x in fresh)

        full = None if self.full is None else commit(self.full, of(False), counts)
        return MixedCache(full, commit_ring(self.local, of(True), counts), self.is_local)


def _reader(cache: Cache | Ring, place: jax.Array) -> Callable[[], Past]:
    """A function that reads the Past of a layer of a stack, at `place` int32 [], inside of a conditional.

    The scales of an int8 cache are read before it: XLA's TPU compiler would copy those of all layers to the chip's own
    memory for each conditional.
    """
    if not isinstance(cache.k, Int8Vectors):
        return lambda: cache.layer(place)
    scales = jax.lax.optimization_barrier([x.scales[place] for x in (cache.k, cache.v)])

    def read() -> Past:
        past = cache.layer(place)
        k, v = (Int8Vectors(x.values, own) for x, own in zip((past.k, past.v), scales, strict=True))
        return past._replace(k=k, v=v)

    return read


def empty_mixed_cache(
    is_local: Sequence[bool],
    batch: int,
    num_kv_heads: int,
    num_slots: int,
    local_slots: int,
    head_dim: int,
    dtype: Any,
    *,
    stacked: bool,
) -> MixedCache:
    """An empty MixedCache, with `local_slots` slots in each of the layers that `is_local` names, else `num_slots`."""

    def empty(num_layers: int, num_slots: int) -> Cache:
        return empty_cache(num_layers, batch, num_kv_heads, num_slots, head_dim, dtype, stacked=stacked)

    num_local = sum(is_local)
    full = None if num_local == len(is_local) else empty(len(is_local) - num_local, num_slots)
    return MixedCache(full, as_ring(empty(num_local, local_slots)), tuple(is_local))


def _write(slots: Any, tokens: Any, starts: jax.Array) -> Any:
    """Slots [(L,) B, (K,) S, (D)] with each row's tokens [(L,) B, (K,) A, (D)] written at its start int32 [B]."""
    stacked = not isinstance(slots[0], list)
    batch_dim = 1 if stacked else 0

    def write_rows(slots: Any, tokens: Any, starts: jax.Array) -> Any:
        def write_row(b: jax.Array, slots: Any) -> Any:
            # One dynamic_update_slice a row stays in place; a scatter or a vmapped update would copy the whole cache.
            def write(into: jax.Array, tokens: jax.Array) -> jax.Array:
                row = to_cache_storage(jax.lax.dynamic_slice_in_dim(tokens, b, 1, axis=batch_dim), into.dtype)
                # Without the barrier XLA's TPU compiler fails: it sees that all rows of tokens go to all rows of slots.
                row = jax.lax.optimization_barrier(row)
                start = [jnp.zeros((), jnp.int32)] * into.ndim
                start[batch_dim] = b
                start[_slot_dim(into, batch_dim)] = starts[b]
                return jax.lax.dynamic_update_slice(into, row, start)

            return jax.tree.map(write, slots, tokens)

        return jax.lax.fori_loop(0, starts.shape[0], write_row, slots)

    # Without shard_map GSPMD would all-gather the slots: the loop index may address any row.
    axes = _AXES_BY_DIMS
    if stacked:
        axes = {1: axes[1]} | {dims + 1: (None, *names) for dims, names in axes.items() if dims > 1}
    return by_shard(write_rows, axes, tuple(slots), tuple(tokens), starts)


def _batch_dims(cache: Any, *stacks: str) -> Any:
    dims = jax.tree.map(lambda _: 0, cache)
    if isinstance(cache.k, list):
        return dims
    return dims._replace(**{name: jax.tree.map(lambda _: 1, getattr(cache, name)) for name in stacks})


def insert_row(batch: Any, row: Any, slot: jax.Array) -> Any:
    """A pytree of a batch's arrays [B, ...] and caches with `row`, a pytree of one row [1, ...], at slot int32 [].

    The row's arrays may be shorter than the batch's, as a prompt's cache is.
    """

    def insert(into: jax.Array, part: jax.Array, dim: int) -> jax.Array:
        start = [jnp.zeros((), jnp.int32)] * into.ndim
        start[dim] = slot
        return jax.lax.dynamic_update_slice(into, part.astype(into.dtype), start)

    return jax.tree.map(insert, batch, row, batch_dims(batch))


def last_tokens(batch: Any, row: jax.Array, num_tokens: int) -> Any:
    """The last `num_tokens` tokens of a row int32 [] of a pytree of caches and arrays [B, ...].

    They are those that the newest commit, of `num_tokens` tokens, wrote. The result is a pytree of one row [1, ...]
    whose caches have `num_tokens` slots and the row's own lengths. `insert_tokens` puts them where they were.
    """

    def take(cache: Any) -> Any:
        start = _start_of_last(cache, row, num_tokens)

        def of(x: jax.Array, dim: int) -> jax.Array:
            x = jax.lax.dynamic_slice_in_dim(x, row, 1, axis=dim)
            if (slot_dim := _slot_dim(x, dim)) == x.ndim:
                return x
            return jax.lax.dynamic_slice_in_dim(x, start, num_tokens, axis=slot_dim)

        return jax.tree.map(of, cache, cache.batch_dims)

    def of_part(part: Any) -> Any:
        return take(part) if _is_cache(part) else jax.lax.dynamic_slice_in_dim(part, row, 1, axis=0)

    return jax.tree.map(of_part, batch, is_leaf=_is_cache)


def insert_tokens(batch: Any, tokens: Any, row: jax.Array) -> Any:
    """The pytree with a row that goes on with the tokens of `last_tokens`, after those that were before them there."""

    def insert(cache: Any, tokens: Any) -> Any:
        start = _start_of_last(tokens, 0, _num_slots(tokens))

        def into(x: jax.Array, part: jax.Array, dim: int) -> jax.Array:
            starts = [jnp.zeros((), jnp.int32)] * x.ndim
            starts[dim] = row
            if (slot_dim := _slot_dim(x, dim)) < x.ndim:
                starts[slot_dim] = start
            return jax.lax.dynamic_update_slice(x, part, starts)

        return jax.tree.map(into, cache, tokens, cache.batch_dims)

    def of_part(part: Any, tokens: Any) -> Any:
        if _is_cache(part):
            return insert(part, tokens)
        return jax.lax.dynamic_update_slice_in_dim(part, tokens, row, axis=0)

    return jax.tree.map(of_part, batch, tokens, is_leaf=_is_cache)


def _is_cache(part: Any) -> bool:
    return hasattr(part, "batch_dims")


def _num_slots(cache: Any) -> int:
    """S; 0 of a cache without layers."""
    return cache.num_slots if jax.tree.leaves(cache.k) else 0


def _slot_dim(x: jax.Array, batch_dim: int) -> int:
    """The dimension of a cache's array in which its slots are; x.ndim if it has one value a row."""
    return batch_dim + (2 if x.ndim - batch_dim >= 3 else 1)


def _start_of_last(cache: Any, row: Any, num_tokens: int) -> jax.Array:
    """The slot int32 [] at which the newest commit of `num_tokens` tokens began.

    The first chunk of a prompt gives a drafter one token less (see decoding.prefill), from slot 0 on.
    """
    end = cache.cursor if isinstance(cache, Ring) else cache.length
    return jnp.maximum(end[row] - num_tokens, 0)


def take_rows(batch: Any, rows: jax.Array) -> Any:
    """The `rows` int32 [B'] of a pytree of a batch's arrays [B, ...] and caches."""
    return jax.tree.map(lambda x, dim: jnp.take(x, rows, axis=dim), batch, batch_dims(batch))


def batch_dims(batch: Any) -> Any:
    """The batch dimension of each array of a pytree: that of a cache's `batch_dims`, else 0."""

    def of(part: Any) -> Any:
        return part.batch_dims if _is_cache(part) else jax.tree.map(lambda _: 0, part)

    return jax.tree.map(of, batch, is_leaf=_is_cache)


def _take_tokens(x: jax.Array, token_indices: jax.Array, batch_dim: int) -> jax.Array:
    """Tokens `token_indices` [B, A] of x [(L,) B, K, M, (D)]: [(L,) B, K, A, (D)]."""
    dim = batch_dim + 2
    index = jnp.expand_dims(token_indices, (*range(batch_dim), batch_dim + 1, *range(dim + 1, x.ndim)))
    return jnp.take_along_axis(x, index, axis=dim)
