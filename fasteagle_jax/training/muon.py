"""Muon: steps by the momentum of matrices, made orthogonal (https://kellerjordan.github.io/posts/muon/).

optax.contrib.muon is the same rule but for a correction of the first steps' momentum. Here the iteration's products are
of bfloat16 numbers summed in float32, for which an accelerator, and a CPU with AMX, is made: of what it makes
orthogonal, singular values between 0.5 and 1.5 do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of x, x^3 and x^5 of singular values x (the post's)
STEPS = 5
MOMENTUM = 0.95
UPDATE_RMS = 0.2  # root mean square of updates at rate 1, as of AdamW's (arXiv 2502.16982, section 2.2)


class MuonState(NamedTuple):
    """The momentum, with the structure of the parameters."""

    momentum: Any


def scale_by_muon(decay: float = MOMENTUM) -> optax.GradientTransformation:
    """Replaces gradients [..., m, n] by their momentum made orthogonal, of root mean square UPDATE_RMS.

    The momentum is Nesterov's.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(gradients: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        def mixed(momentum: jax.Array, gradient: jax.Array) -> jax.Array:
            return decay * momentum + (1 - decay) * gradient

        momentum = jax.tree.map(mixed, state.momentum, gradients)
        ahead = jax.tree.map(mixed, momentum, gradients)
        return jax.tree.map(_update, ahead), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def _update(matrix: jax.Array) -> jax.Array:
    return UPDATE_RMS * max(matrix.shape[-2:]) ** 0.5 * orthogonal(matrix)


def orthogonal(x: jax.Array) -> jax.Array:
    """[..., m, n] with the singular vectors of x, and singular values that are near 1 where those of x are not tiny.

    By five Newton-Schulz steps, p(x) = a x + b (x x^T) x + c (x x^T)^2 x, or the same with x^T x from the right.
    """
    a, b, c = COEFFICIENTS
    is_tall = x.shape[-2] > x.shape[-1]
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    for _ in range(STEPS):
        # Not transposed, after which XLA's CPU compiler would multiply float32 numbers.
        squared = _product("...kn,...km->...nm" if is_tall else "...nk,...mk->...nm", x, x)
        polynomial = b * squared + c * _product("...nk,...km->...nm", squared, squared)
        pair = (x, polynomial) if is_tall else (polynomial, x)
        x = a * x + _product("...nk,...km->...nm", *pair)
    return x


def _product(contraction: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(contraction, x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
