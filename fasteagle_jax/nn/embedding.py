"""Token embedding."""

from __future__ import annotations

from typing import Any

import jax

from fasteagle_jax.nn.attention import held, held_dtype, values_of


def embed(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """The rows [..., H] of an embedding [V, H] for `tokens` int32 [...], in `dtype`; read as `held`, for its reason."""
    if held_dtype(table.dtype) != table.dtype:
        # Or the compiler takes the bits of the whole table, once, before the loop that reads a few rows.
        table, tokens = jax.lax.optimization_barrier((table, tokens))
    return values_of(held(table, held_dtype(table.dtype))[tokens]).astype(dtype)
