"""The gated MLP of a decoder layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.nn.linear import Linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Mlp(nnx.Module):
    """SwiGLU or GeGLU: down(act(gate(x)) * up(x)), from the normed stream to what is added to it."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        keys: Iterator[jax.Array],
        dtype: Any = jnp.float32,
        *,
        bias: bool = False,
        activation: str = "silu",
        width_axis: str | None = "mlp",
    ):
        """Random weights; `activation` is one of ACTIVATIONS, `width_axis` the logical axis of the width within."""
        inner, outer = ("embed", width_axis), (width_axis, "embed")
        self.activation = activation
        self.gate = Linear(hidden_size, intermediate_size, inner, next(keys), dtype, bias=bias)
        self.up = Linear(hidden_size, intermediate_size, inner, next(keys), dtype, bias=bias)
        self.down = Linear(intermediate_size, hidden_size, outer, next(keys), dtype, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., H] of x [..., H]."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))
