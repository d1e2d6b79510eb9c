"""Matrix products, in the forms that each backend runs fastest, and the weights' layouts that go with them.

A product runs in its weight's dtype, accumulates in float32 and returns in the activation's dtype.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

FEW_ROWS = 64  # up to which a CPU multiplies faster from the left (see _product_from_left)

FEW_HEAD_ROWS = 32  # the same under a head, whose product is large itself, and is transposed once more


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("...i,io->...o", x, w, preferred_element_type=jnp.float32)


def _product_of_a_row(x: jax.Array, w: jax.Array) -> jax.Array:
    # XLA's CPU compiler has no fast path for one bfloat16 row, and one eight times faster for two.
    twice = jnp.concatenate([x.reshape(1, -1)] * 2)  # [2, in]
    return _product(twice, w)[:1].reshape(*x.shape[:-1], w.shape[1])


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., in] times w [in, out], in x's dtype.

    Also backwards: cotangents are rounded to w's dtype first, so that all three products take the fast path.
    """
    rows = math.prod(x.shape[:-1])
    x_w = x.astype(w.dtype)
    if rows == 1 and w.dtype == jnp.bfloat16:
        y = jax.lax.platform_dependent(x_w, w, cpu=_product_of_a_row, default=_product)
    else:
        y = _product(x_w, w)
    return y.astype(x.dtype)


def _matmul_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return matmul(x, w), (x.astype(w.dtype), w, jnp.zeros((0,), x.dtype))


def _matmul_backward(saved: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w, like_x = saved
    dy = dy.astype(w.dtype)
    dx = jnp.einsum("...o,io->...i", dy, w, preferred_element_type=jnp.float32)
    dw = jnp.einsum("...i,...o->io", x, dy, preferred_element_type=jnp.float32)
    return dx.astype(like_x.dtype), dw.astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def _product_of_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("ni,oi->no", x, w, preferred_element_type=jnp.float32)


def _product_from_left(x: jax.Array, w: jax.Array) -> jax.Array:
    # XLA's CPU compiler streams the left matrix row by row, which memory likes best: 0.7 of the time for 2 to 32 rows.
    # It turns the product around again where it can see the transpositions, hence the barriers. In bfloat16 its fast
    # path wants both matrices with their rows along what is summed.
    if w.dtype == jnp.bfloat16:
        return jax.lax.optimization_barrier(jnp.einsum("oi,ni->on", w, x, preferred_element_type=jnp.float32)).T
    product = jnp.einsum("oi,in->on", w, jax.lax.optimization_barrier(x.T), preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product).T


def matmul_by_rows(x: jax.Array, w: jax.Array, few: int) -> jax.Array:
    """x [n, in] times w [out, in], float32 [n, out]."""
    num_rows = len(x)
    if num_rows == 1 and w.dtype == jnp.bfloat16:
        x = jnp.concatenate([x] * 2)  # as in _product_of_a_row
    if 1 < len(x) <= few:
        product = jax.lax.platform_dependent(x, w, cpu=_product_from_left, default=_product_of_rows)
    else:
        product = _product_of_rows(x, w)
    return product[:num_rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def head_logits(hidden: jax.Array, head: jax.Array, trains_head: bool = False) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., H] under a head, one row [H] a token: [V, H].

    The head gets a gradient with `trains_head` alone. It is not `matmul` with head.T: XLA's CPU compiler has no fast
    path for that in bfloat16.
    """
    rows = hidden.reshape(-1, hidden.shape[-1]).astype(head.dtype)
    return matmul_by_rows(rows, head, FEW_HEAD_ROWS).reshape(*hidden.shape[:-1], head.shape[0])


def _head_forward(hidden: jax.Array, head: jax.Array, trains_head: bool) -> tuple[jax.Array, tuple[Any, ...]]:
    x = hidden.astype(head.dtype) if trains_head else None
    return head_logits(hidden, head), (x, head, jnp.zeros((0,), hidden.dtype))


def _head_backward(trains_head: bool, saved: tuple[Any, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    x, head, like_hidden = saved
    dy = dy.astype(head.dtype)  # as in `matmul`
    dx = jnp.einsum("...v,vh->...h", dy, head, preferred_element_type=jnp.float32).astype(like_hidden.dtype)
    if not trains_head:
        return dx, None
    return dx, jnp.einsum("...v,...h->vh", dy, x, preferred_element_type=jnp.float32).astype(head.dtype)


head_logits.defvjp(_head_forward, _head_backward)


class RowWeight(nnx.Param):
    """A frozen matrix held [out, in], a row an output."""


def rows_are_faster() -> bool:
    """Whether this backend decodes faster with RowWeights than with [in, out]; where layers are not stacked."""
    return jax.default_backend() == "cpu"


def affine(x: jax.Array, w: nnx.Param, b: nnx.Param | None) -> jax.Array:
    """x [..., in] times a weight in either layout, plus a bias: [..., out] in x's dtype."""
    if isinstance(w, RowWeight):
        rows = x.reshape(-1, x.shape[-1]).astype(w.dtype)
        y = matmul_by_rows(rows, w[...], FEW_ROWS).reshape(*x.shape[:-1], -1).astype(x.dtype)
    else:
        y = matmul(x, w[...])
    return y if b is None else y + b[...].astype(y.dtype)
