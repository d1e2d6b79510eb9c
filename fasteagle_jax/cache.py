"""The KV cache: committed keys and values of a stack of layers.

L layers · B rows · K heads of K/V · S slots · D head width · M fresh tokens · A written tokens.
A cache holds verified tokens only: a forward pass reads it, `commit` writes it once afterwards, nothing is rolled back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fasteagle_jax.layers import Past


class Cache(NamedTuple):
    """Keys and values [L, B, K, S, D] (or a list of L arrays [B, K, S, D]) and the filled slots of each row."""

    k: Any
    v: Any
    length: jax.Array  # int32 [B]

    def past(self) -> Any:
        """One `Past` a layer, in the cache's own form (stacked or list), for `run_layers`."""
        if isinstance(self.k, list):
            return [Past(k, v, self.length) for k, v in zip(self.k, self.v, strict=True)]
        return Past(self.k, self.v, jnp.broadcast_to(self.length, (self.k.shape[0], *self.length.shape)))

    @property
    def num_slots(self) -> int:
        """S."""
        return self.k[0].shape[-2]


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

    def zeros() -> Any:
        if stacked:
            return jnp.zeros((num_layers, *shape), dtype)
        return [jnp.zeros(shape, dtype) for _ in range(num_layers)]

    return Cache(zeros(), zeros(), jnp.zeros((batch,), jnp.int32))


def commit(cache: Cache, fresh: Any, counts: jax.Array, rows: jax.Array | None = None) -> Cache:
    """The cache with `counts` of the fresh tokens appended to every row.

    Args:
      cache: read and replaced; donate it for a write in place.
      fresh: pair (k, v) of stacks of [B, K, M, D], as a forward pass returns them.
      counts: int32 [B], how many tokens each row gains.
      rows: int32 [B, A], which fresh tokens in which order; None for all in theirs.

    All A tokens are written each time: those past the count are masked by `length` and overwritten later. An update's
    start is clamped to the end of the cache, so a row needs A slots of slack beyond its last token.
    """
    k, v = fresh
    batch = counts.shape[0]
    if rows is not None:
        k, v = (jax.tree.map(lambda x: _take_tokens(x, rows), part) for part in (k, v))
    stacked = not isinstance(cache.k, list)
    batch_dim = 1 if stacked else 0

    def write_row(b: jax.Array, kv: tuple[Any, Any]) -> tuple[Any, Any]:
        # One dynamic_update_slice a row stays in place; a scatter or a vmapped update would copy the whole cache.
        def write(slots: jax.Array, tokens: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_slice_in_dim(tokens, b, 1, axis=batch_dim).astype(slots.dtype)
            zero = jnp.zeros((), jnp.int32)
            start = (zero,) * batch_dim + (b, zero, cache.length[b], zero)
            return jax.lax.dynamic_update_slice(slots, row, start)

        return jax.tree.map(write, kv, (k, v))

    new_k, new_v = jax.lax.fori_loop(0, batch, write_row, (cache.k, cache.v))
    return Cache(new_k, new_v, cache.length + counts)


def _take_tokens(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Tokens `rows` [B, A] of x [..., B, K, M, D]: [..., B, K, A, D]."""
    index = rows[:, None, :, None]  # [B, 1, A, 1]
    index = index.reshape((1,) * (x.ndim - 4) + index.shape)
    return jnp.take_along_axis(x, index, axis=-2)
