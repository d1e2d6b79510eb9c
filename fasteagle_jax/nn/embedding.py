"""Token embedding."""

from __future__ import annotations

from typing import Any

import jax

from fasteagle_jax.nn.attention import cache_storage_dtype, from_cache_storage, to_cache_storage


def embed(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """The rows [..., H] of an embedding [V, H] for `tokens` int32 [...], in `dtype`."""
    if cache_storage_dtype(table.dtype) != table.dtype:
        # Or the compiler takes the bits of the whole table, once, before the loop that reads a few rows.
        table, tokens = jax.lax.optimization_barrier((table, tokens))
    return from_cache_storage(to_cache_storage(table, cache_storage_dtype(table.dtype))[tokens]).astype(dtype)
