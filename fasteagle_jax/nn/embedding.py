"""Token embedding."""

from __future__ import annotations

from typing import Any

import jax

from fasteagle_jax.nn.attention import cache_storage_dtype, from_cache_storage, to_cache_storage


def embed(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """The rows [..., H], in `dtype`, of an embedding [V, H] for `tokens` int32 [...]."""
    if cache_storage_dtype(table.dtype) != table.dtype:
        # Without the barrier the compiler converts the whole table ahead of the loop that reads a few rows.
        table, tokens = jax.lax.optimization_barrier((table, tokens))
    return from_cache_storage(to_cache_storage(table, cache_storage_dtype(table.dtype))[tokens]).astype(dtype)
