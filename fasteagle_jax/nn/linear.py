"""Matrix products in the form that each backend runs fastest, and the weight layouts that go with them.

A product runs in its weight's dtype, accumulates in float32 and returns in the activation's dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

FEW_ROWS = 64  # up to so many a CPU multiplies faster from the left (see _product_from_left)
FEW_HEAD_ROWS = 32  # likewise under a head, whose product is large and transposed once more
BLOCK = 32  # inputs that share a scale in a matrix rounded by blocks, as GGUF's Q8_0 is


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("...i,io->...o", x, w, preferred_element_type=jnp.float32)


def _product_of_a_row(x: jax.Array, w: jax.Array) -> jax.Array:
    # XLA's CPU compiler has a fast path for two bfloat16 rows, and none for one.
    twice = jnp.concatenate([x.reshape(1, -1)] * 2)  # [2, in]
    return _product(twice, w)[:1].reshape(*x.shape[:-1], w.shape[1])


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., in] times w [in, out], in x's dtype.

    The backward pass rounds cotangents to w's dtype first, so that all three products take the fast path.
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
    # XLA's CPU compiler streams the left matrix row by row, the fastest order in memory. The barriers hide the
    # transpositions, or it would swap the factors back. In bfloat16 its fast path needs both matrices contracted over
    # their last dimension.
    if w.dtype == jnp.bfloat16:
        return jax.lax.optimization_barrier(jnp.einsum("oi,ni->on", w, x, preferred_element_type=jnp.float32)).T
    product = jnp.einsum("oi,in->on", w, jax.lax.optimization_barrier(x.T), preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product).T


def matmul_by_rows(x: jax.Array, w: jax.Array, few: int) -> jax.Array:
    """float32 [n, out], x [n, in] times w [out, in]; a CPU multiplies up to `few` rows from the left."""
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
    """Products float32 [..., V] of hidden states [..., H] and a head [V, H], one row a token.

    The head gets a gradient only with `trains_head`. `matmul` with head.T would miss the bfloat16 fast path of XLA on a
    CPU.
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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LogitMap:
    """The map from a head's products to logits: times `scale`, then a tanh into +-`soft_cap` (None for no cap)."""

    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, products: jax.Array) -> jax.Array:
        """Logits float32 [..., V] of products [..., V]."""
        logits = products if self.scale == 1 else products * self.scale
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)


class RowWeight(nnx.Param):
    """A frozen matrix in the layout [out, in], one row an output."""


class Linear(nnx.Module):
    """A matrix product with an optional bias, which owns its weight's layout, scale and logical axes.

    `weight` is [in, out] (with a leading dimension in a stack of layers) or a RowWeight [out, in], `matrix` [in, out]
    for either. The variable's `axes` are the logical axes of its last two dimensions (see sharding.RULES). A frozen
    weight may be int8 with a `scale`: float32 [out], by which the product is multiplied, or [in / BLOCK, out] of any
    float dtype, by which the weight is multiplied on its way into the product.
    """

    quantises: ClassVar[bool] = True  # whether `to_int8_weights` rounds it

    def __init__(
        self,
        num_in: int,
        num_out: int,
        axes: tuple[str | None, str | None],
        key: jax.Array | None = None,
        dtype: Any = jnp.float32,
        *,
        bias: bool = False,
        int8: bool = False,
    ):
        """Random weights of variance 1 / num_in, or zeros if `key` is None.

        With `int8` they are rounded, and multiplied in `dtype`.
        """
        shape = (num_in, num_out)
        value = jnp.zeros(shape, dtype) if key is None else jax.random.normal(key, shape, dtype) * num_in**-0.5
        # A vector of the stream's width is replicated, as norms are.
        vector_axes = (None if axes[1] == "embed" else axes[1],)
        scale = None
        if int8:
            value, scale = to_int8(value)
        self.weight = nnx.Param(value, axes=axes)
        self.scale = None if scale is None else nnx.Param(scale, axes=vector_axes)
        self.bias = nnx.Param(jnp.zeros((num_out,), dtype), axes=vector_axes) if bias else None
        self.product_dtype = jnp.dtype(dtype)  # of an int8 weight

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] times the weight, plus the bias: [..., out] in x's dtype."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def product(self, x: jax.Array) -> jax.Array:
        """x [..., in] times the weight alone: [..., out] in x's dtype."""
        weight = self._scaled_blocks() if self.in_blocks else self.weight[...].astype(self.dtype)
        if self.by_rows:
            rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
            y = matmul_by_rows(rows, weight, FEW_ROWS).reshape(*x.shape[:-1], -1).astype(x.dtype)
        else:
            y = matmul(x, weight)
        if self.scale is not None and not self.in_blocks:
            y = (y * self.scale[...]).astype(x.dtype)
        return y

    def _scaled_blocks(self) -> jax.Array:
        """The weight in its own layout times the scales of its blocks.

        In float32 that is exact, 8 bits times 11 of a float16. Block by block the products would be of 32 inputs, which
        XLA multiplies slowly, and their sums written to memory.
        """
        assert self.scale is not None
        weight, scale = self.weight[...], self.scale[...].astype(jnp.float32)
        *leading, num_first, num_last = weight.shape
        if self.by_rows:
            scaled = weight.reshape(*leading, num_first, -1, BLOCK) * scale.mT[..., None]
        else:
            scaled = weight.reshape(*leading, -1, BLOCK, num_last) * scale[..., None, :]
        return scaled.reshape(weight.shape).astype(self.dtype)

    @property
    def by_rows(self) -> bool:
        """Whether the weight is a RowWeight."""
        return isinstance(self.weight, RowWeight)

    @property
    def num_in(self) -> int:
        """The number of inputs."""
        return self.weight.shape[-1 if self.by_rows else -2]

    @property
    def in_blocks(self) -> bool:
        """Whether the weight is int8 with a scale of each block of inputs."""
        return self.scale is not None and self.scale.ndim == self.weight.ndim

    @property
    def dtype(self) -> Any:
        """The dtype of products: the weight's, or of an int8 one that it was made for."""
        return self.weight.dtype if self.scale is None else self.product_dtype

    @property
    def matrix(self) -> jax.Array:
        """The weight as [..., in, out], scaled."""
        matrix = self._scaled_blocks() if self.in_blocks else self.weight[...]
        matrix = matrix.mT if self.by_rows else matrix
        if self.scale is None or self.in_blocks:
            return matrix
        return (matrix * self.scale[...][..., None, :]).astype(self.dtype)

    def set_matrix(self, value: jax.Array) -> None:
        """Sets the weight from [..., in, out]."""
        if self.scale is not None:
            value, scale = to_int8(value)
            self.scale[...] = over_blocks(scale, self.num_in) if self.in_blocks else scale
        self.weight[...] = value.mT if self.by_rows else value

    def set_int8(self) -> None:
        """Rounds the weight to int8, with a scale of each output."""
        weight, matrix = self.weight, self.matrix
        rounded, scale = to_int8(matrix)
        metadata = {name: value for name, value in weight.get_metadata().items() if name != "axes"}
        *leading, num_in, num_out = weight.axes
        out_axis = num_in if self.by_rows else num_out
        # Of experts the scale is split as their outputs are; elsewhere see __init__.
        vector_axes = (*leading, None if out_axis == "embed" and not leading else out_axis)
        self.scale = nnx.data(nnx.Param(scale, axes=vector_axes, **metadata))
        self.weight = type(weight)(rounded.mT if self.by_rows else rounded, axes=weight.axes, **metadata)

    def set_blocks(self, dtype: Any = jnp.float32) -> None:
        """Spreads an int8 weight's scale [..., out] over its blocks of inputs, to [..., in / BLOCK, out] in `dtype`."""
        weight, scale = self.weight, self.scale
        assert scale is not None and not self.in_blocks
        axes = (*weight.axes[:-2], *weight.axes[:-3:-1]) if self.by_rows else weight.axes
        spread = over_blocks(scale[...], self.num_in).astype(dtype)
        metadata = {name: value for name, value in scale.get_metadata().items() if name != "axes"}
        self.scale = nnx.data(nnx.Param(spread, axes=axes, **metadata))

    def set_layout(self, kind: type[nnx.Param]) -> None:
        """Stores an unstacked weight in the layout of `kind`, RowWeight or nnx.Param."""
        weight = self.weight
        if type(weight) is not kind and weight.ndim == len(weight.axes):
            self.weight = kind(weight[...].mT, axes=(*weight.axes[:-2], *weight.axes[:-3:-1]))


def to_int8(matrix: Any) -> tuple[Any, Any]:
    """A matrix [..., in, out] rounded to int8, and the scale float32 [..., out] that gives its size back.

    Of JAX's arrays, or of NumPy's.
    """
    xp: Any = jnp if isinstance(matrix, jax.Array) else np
    largest = xp.abs(matrix.astype(np.float32)).max(axis=-2)
    scale = xp.where(largest > 0, largest / 127, np.float32(1))
    return xp.rint(matrix / scale[..., None, :]).astype(np.int8), scale


def over_blocks(scale: Any, num_in: int) -> Any:
    """A scale [..., out] for each block of `num_in` inputs: [..., in / BLOCK, out]. Of JAX's arrays, or of NumPy's."""
    xp: Any = jnp if isinstance(scale, jax.Array) else np
    return xp.repeat(scale[..., None, :], num_in // BLOCK, axis=-2)


def to_int8_weights(model: nnx.Module) -> None:
    """Rounds the matrices of a model's Linears to int8; embeddings, heads, norms and routers stay as they are."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear) and module.quantises and module.scale is None:
            module.set_int8()


def product_dtype(dtype: Any) -> Any:
    """The dtype of products, embeddings and caches of a model whose weights are of `dtype`.

    Of int8 weights float32 on a CPU, where it is the fastest, and bfloat16 elsewhere.
    """
    if jnp.dtype(dtype) != jnp.int8:
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def rows_are_faster() -> bool:
    """Whether this backend decodes unstacked layers faster with RowWeights than with [in, out]."""
    return jax.default_backend() == "cpu"


def to_rows(model: nnx.Module) -> None:
    """Converts the unstacked weights of a model's Linears to RowWeights, if these are faster.

    Only decoding gains: a training step has many rows, and gradients.
    """
    if rows_are_faster():
        _set_layouts(model, RowWeight)


def to_columns(model: nnx.Module) -> None:
    """Undoes `to_rows`."""
    _set_layouts(model, nnx.Param)


def _set_layouts(model: nnx.Module, kind: type[nnx.Param]) -> None:
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            module.set_layout(kind)
