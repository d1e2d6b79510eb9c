"""The gated MLP of a decoder layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.nn.linear import Linear


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), from the normed stream to what is added to it."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        keys: Iterator[jax.Array],
        dtype: Any = jnp.float32,
        *,
        bias: bool = False,
    ):
        self.gate = Linear(hidden_size, intermediate_size, ("embed", "mlp"), next(keys), dtype, bias=bias)
        self.up = Linear(hidden_size, intermediate_size, ("embed", "mlp"), next(keys), dtype, bias=bias)
        self.down = Linear(intermediate_size, hidden_size, ("mlp", "embed"), next(keys), dtype, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., H] of x [..., H]."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
