"""Muon's steps against singular value decompositions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.training.muon import MOMENTUM, UPDATE_RMS, orthogonal, scale_by_muon


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16), (3, 8, 12)])
def test_what_is_made_orthogonal_has_the_singular_vectors_and_values_near_one(shape: tuple[int, ...]) -> None:
    x = jax.random.normal(jax.random.key(0), shape)
    u, sizes, vt = np.linalg.svd(np.asarray(x), full_matrices=False)
    assert sizes.min() > 1e-3 * sizes.max()
    made = u.mT @ np.asarray(orthogonal(x)) @ vt.mT
    values = np.diagonal(made, axis1=-2, axis2=-1)
    others = made - values[..., None] * np.eye(made.shape[-1])
    # The polynomial takes a size s, of a matrix of norm 1, to between 0.5 and 1.3 where s is not tiny.
    tiny = sizes < 0.01 * np.linalg.norm(sizes, axis=-1, keepdims=True)
    assert values[~tiny].min() > 0.5 and values.max() < 1.3
    assert np.abs(others).max() < 0.03  # bfloat16


def test_a_step_is_of_the_momentum_that_looks_ahead_and_has_a_size_of_its_own() -> None:
    gradients = [{"m": jax.random.normal(jax.random.key(i), (6, 20)) * 10.0**i} for i in range(3)]
    rule = scale_by_muon()
    state = rule.init(gradients[0])
    momentum = np.zeros((6, 20))
    for gradient in gradients:
        updates, state = rule.update(gradient, state)
        g = np.asarray(gradient["m"])
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * g
        ahead = MOMENTUM * momentum + (1 - MOMENTUM) * g
        expected = orthogonal(jnp.asarray(ahead, jnp.float32)) * UPDATE_RMS * 20**0.5
        np.testing.assert_allclose(updates["m"], expected, atol=2e-3)
        np.testing.assert_allclose(state.momentum["m"], momentum, rtol=1e-5, atol=1e-6)
        # Of rank r, an orthogonal matrix [r, n] has root mean square n ** -0.5.
        assert 0.7 * UPDATE_RMS < np.sqrt(np.mean(np.square(updates["m"]))) < 1.2 * UPDATE_RMS
