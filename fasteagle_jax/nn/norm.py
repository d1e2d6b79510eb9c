"""Root-mean-square normalisation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """RMSNorm with a gain per channel, initially 1: `offset` + `weight`."""

    def __init__(self, size: int, eps: float, dtype: Any = jnp.float32, *, offset: float = 0.0):
        self.eps = eps
        self.offset = offset
        self.weight = nnx.Param(jnp.full((size,), 1 - offset, dtype), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., size] normalised and weighted, in x's dtype."""
        return rms_norm(x, self.weight[...] if self.offset == 0 else self.gain, self.eps)

    @property
    def gain(self) -> jax.Array:
        """The gain float32 [..., size]: a sum in bfloat16 would lose what Gemma's weights add to 1."""
        return self.weight[...].astype(jnp.float32) + self.offset


def rms_norm(x: jax.Array, scale: jax.Array | None, eps: float) -> jax.Array:
    """x [..., size] over its root mean square, times `scale` [size], None for 1; zero stays zero.

    Computed in float32, returned in x's dtype.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed if scale is None else normed * scale.astype(jnp.float32)).astype(x.dtype)
