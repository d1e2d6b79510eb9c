"""A Linear's layouts, and a weight of int8 with a scale."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.devices.sharding import MeshShape, make_mesh, shardings
from fasteagle_jax.nn.linear import Linear, RowWeight, to_int8

IN, OUT = 24, 40


@pytest.mark.parametrize("by_rows", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("num_rows", [1, 3, 100])
def test_an_int8_weight_multiplies_as_the_matrix_it_stands_for(by_rows, num_rows):
    linear = Linear(IN, OUT, ("embed", "mlp"), jax.random.key(0), bias=True, int8=True)
    exact = Linear(IN, OUT, ("embed", "mlp"), jax.random.key(0), bias=True)
    assert linear.weight.dtype == jnp.int8 and linear.scale.shape == (OUT,) and linear.dtype == jnp.float32
    largest = np.abs(exact.matrix).max(axis=0)
    assert (np.abs(linear.matrix - exact.matrix) <= largest / 127 / 2 * 1.001).all()  # half a step at most
    if by_rows:
        matrix = np.asarray(linear.matrix)
        linear.set_layout(RowWeight)
        assert linear.weight.shape == (OUT, IN)
        np.testing.assert_array_equal(linear.matrix, matrix)
    x = jax.random.normal(jax.random.key(1), (num_rows, IN))
    np.testing.assert_allclose(linear(x), x @ linear.matrix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_rows", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("num_rows", [1, 3, 100])
def test_an_int8_weight_in_blocks_multiplies_as_the_matrix_it_stands_for(by_rows, num_rows):
    linear = Linear(64, OUT, ("embed", "mlp"), jax.random.key(0), bias=True, int8=True)
    before = np.asarray(linear.matrix)
    linear.set_blocks(jnp.float32)
    assert linear.scale.shape == (2, OUT) and linear.scale.axes == ("embed", "mlp") and linear.in_blocks
    np.testing.assert_array_equal(linear.matrix, before)
    linear.scale[...] *= jnp.asarray([[1.0], [3.0]])
    if by_rows:
        linear.set_layout(RowWeight)
    matrix = before * np.repeat([[1.0], [3.0]], 32, axis=0)
    np.testing.assert_allclose(linear.matrix, matrix, rtol=1e-6)
    x = jax.random.normal(jax.random.key(1), (num_rows, 64))
    np.testing.assert_allclose(linear(x), x @ matrix, rtol=1e-5, atol=1e-5)
    linear.set_matrix(before)  # with its outputs' scales in all blocks
    np.testing.assert_allclose(linear.matrix, before, rtol=1e-6)


def test_it_may_be_set_anew_in_a_stack_and_in_bfloat16():
    stack = jax.vmap(lambda key: Linear(IN, OUT, ("embed", "mlp"), key, jnp.bfloat16, int8=True))(
        jax.random.split(jax.random.key(0), 3)
    )
    assert stack.weight.shape == (3, IN, OUT) and stack.scale.shape == (3, OUT) and stack.dtype == jnp.bfloat16
    value = jax.random.normal(jax.random.key(2), (3, IN, OUT)).at[1, :, 4].set(0)
    stack.set_matrix(value)
    rounded, scale = to_int8(value)
    np.testing.assert_array_equal(stack.weight[...], rounded)
    np.testing.assert_array_equal(stack.matrix, (rounded * scale[:, None]).astype(jnp.bfloat16))
    one = jax.tree.map(lambda w: w[1], stack)
    assert one(jnp.ones((2, IN), jnp.bfloat16)).dtype == jnp.bfloat16 and not one.matrix[:, 4].any()


def test_the_scale_is_split_over_a_mesh_as_the_outputs_are():
    mesh = make_mesh(MeshShape(1, 2, 4))
    for axes, expected in ((("embed", "mlp"), jax.P("tensor")), (("mlp", "embed"), jax.P(None))):
        linear = Linear(IN, OUT, axes, jax.random.key(0), int8=True)
        assert shardings(mesh, linear).scale.get_value().spec == expected
