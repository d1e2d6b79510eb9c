"""Vectors rounded to int8 with a scale each: the keys and values of an int8 cache, one a head and token.

D width of a vector.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Vectors:
    """Vectors [..., D]. Products are of the integers; what comes of them is multiplied by the scales."""

    values: jax.Array  # int8 [..., D]
    scales: jax.Array  # float32 [...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the vectors."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """int8."""
        return self.values.dtype

    def __getitem__(self, index: Any) -> Int8Vectors:
        """The vectors at an index of leading dimensions."""
        return Int8Vectors(self.values[index], self.scales[index])


def to_int8_vectors(x: jax.Array) -> Int8Vectors:
    """Vectors [..., D] rounded, the largest entry of each to 127."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=-1)
    scales = jnp.where(largest > 0, largest / 127, 1)
    values = jnp.rint(x / scales[..., None]).astype(jnp.int8)
    # The barrier keeps XLA from rounding again, maybe otherwise, where they are read and where they are committed.
    return jax.lax.optimization_barrier(Int8Vectors(values, scales))


def empty_int8_vectors(shape: tuple[int, ...]) -> Int8Vectors:
    """Zeros."""
    return Int8Vectors(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))
