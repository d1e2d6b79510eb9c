"""The gated MLP of a decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.nn.linear import Linear

GATE_GAIN, GATE_LIMIT = 1.702, 7.0  # of the clamped SwiGLU


def _clamped(gate: jax.Array, up: jax.Array) -> jax.Array:
    gate, up = jnp.minimum(gate, GATE_LIMIT), jnp.clip(up, -GATE_LIMIT, GATE_LIMIT)
    return gate * jax.nn.sigmoid(GATE_GAIN * gate) * (up + 1)


# What an MLP's two products become together, by the activation's name.
GATES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "silu": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "clamped_swiglu": _clamped,
}


class Mlp(nnx.Module):
    """A gated MLP: down(act(gate(x), up(x))), act one of GATES, from the normed stream to what is added to it."""

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
        """Random weights; `activation` is one of GATES, `width_axis` the logical axis of the width within."""
        inner, outer = ("embed", width_axis), (width_axis, "embed")
        self.activation = activation
        self.gate = Linear(hidden_size, intermediate_size, inner, next(keys), dtype, bias=bias)
        self.up = Linear(hidden_size, intermediate_size, inner, next(keys), dtype, bias=bias)
        self.down = Linear(intermediate_size, hidden_size, outer, next(keys), dtype, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., H] of x [..., H]."""
        return self.down(self.neurons(x))

    def neurons(self, x: jax.Array) -> jax.Array:
        """The values within, [..., intermediate_size] of x [..., H]."""
        return GATES[self.activation](self.gate(x), self.up(x))
