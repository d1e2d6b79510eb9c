"""A layer of experts: what it adds to a token is what a slow loop over the token's own experts adds."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fasteagle_jax.devices.sharding import MeshShape, check_experts, make_mesh, place_weights, shardings
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn import moe
from fasteagle_jax.nn.linear import RowWeight, to_int8_weights, to_rows
from fasteagle_jax.nn.moe import ExpertsConfig, SparseMlp
from tests.tiny_families import hf_config, tiny_family

H, E, K, WIDE = 24, 8, 3, 16
CLOSE = dict(rtol=1e-5, atol=1e-5)  # float32 sums of some tens of terms, in another order
rng = np.random.default_rng(0)


def sparse(**changes) -> SparseMlp:
    config = dataclasses.replace(ExpertsConfig(E, K, WIDE, renormalised=True), **changes)

    def make() -> SparseMlp:
        mlp = SparseMlp(H, config, iter(jax.random.split(jax.random.key(0), 2)))
        for i, (path, node) in enumerate(nnx.iter_graph(mlp)):
            if isinstance(node, nnx.Param) and path[-1] == "bias":
                node[...] = jax.random.normal(jax.random.key(i), node.shape)
        return mlp

    return jax.jit(make)()


def slow(mlp: SparseMlp, x: np.ndarray) -> np.ndarray:
    """Token by token and expert by expert."""
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    parts = mlp.experts.gate, mlp.experts.up, mlp.experts.down
    gate, up, down = (np.asarray(part.matrix, np.float64) for part in parts)
    of_gate, of_up, of_down = (np.zeros(E) if part.bias is None else np.asarray(part.bias[...]) for part in parts)
    of_router = 0 if mlp.router.bias is None else np.asarray(mlp.router.bias[...])
    out = np.zeros(x.shape)
    for token, y in zip(x.reshape(-1, H).astype(np.float64), out.reshape(-1, H), strict=True):
        scores = np.exp(token @ np.asarray(mlp.router.matrix, np.float64) + of_router)
        chosen = np.argsort(-scores, kind="stable")[: mlp.num_chosen]
        total = scores[chosen].sum() if mlp.renormalised else scores.sum()
        for e in chosen:
            hidden = silu(token @ gate[e] + of_gate[e]) * (token @ up[e] + of_up[e])
            y += scores[e] / total * (hidden @ down[e] + of_down[e])
        if mlp.shared is not None:
            shared = [np.asarray(part.matrix, np.float64) for part in (mlp.shared.gate, mlp.shared.up, mlp.shared.down)]
            own = (silu(token @ shared[0]) * (token @ shared[1])) @ shared[2]
            y += own / (1 + np.exp(-token @ np.asarray(mlp.shared_gate.matrix, np.float64)))
    return out


@pytest.mark.parametrize(
    "changes", [{}, {"renormalised": False, "shared_size": 20}, {"num_chosen": 1}, {"bias": True}], ids=str
)
def test_a_token_has_its_own_experts_and_no_others(changes):
    mlp = sparse(**changes)
    x = rng.normal(size=(2, 5, H)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(SparseMlp.__call__)(mlp, x), slow(mlp, x), **CLOSE)


@pytest.mark.parametrize("num_tokens", [1, 4, pytest.param(16, marks=pytest.mark.slow), 60])
def test_what_a_token_gets_does_not_depend_on_its_company(num_tokens):
    """Each alone, and among others of whom all have its experts, or none: to the rounding that a dense MLP has."""
    mlp, few = sparse(), jax.jit(SparseMlp.__call__)
    x = rng.normal(size=(1, num_tokens, H)).astype(np.float32)
    together = np.asarray(few(mlp, x))
    for others in (np.repeat(x[:, :1], num_tokens, axis=1), rng.normal(size=x.shape).astype(np.float32)):
        others[:, 0] = x[:, 0]
        np.testing.assert_allclose(few(mlp, others)[:, 0], together[:, 0], rtol=1e-6, atol=1e-6)
    alone = few(mlp, x[:, :1])
    np.testing.assert_allclose(alone[:, 0], together[:, 0], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(few(mlp, x[:, ::-1].copy())[:, ::-1], together)  # bitwise, in another order
    np.testing.assert_allclose(together, slow(mlp, x), **CLOSE)


def test_equal_scores_choose_the_first_experts():
    mlp = sparse()
    mlp.router.weight[...] = jnp.zeros_like(mlp.router.weight[...])
    chosen, weights = mlp.route(rng.normal(size=(4, H)).astype(np.float32))
    np.testing.assert_array_equal(chosen, np.tile(np.arange(K), (4, 1)))
    np.testing.assert_allclose(weights, 1 / K, rtol=1e-6)
    mlp.router.weight[...] = mlp.router.weight[...].at[:, 5].set(jnp.ones((H,)))
    np.testing.assert_array_equal(mlp.route(jnp.ones((H,)))[0], [0, 1, 5])


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_rows_and_columns_and_products_all_at_once_are_the_same(bias, monkeypatch):
    """The last is what a TPU does with many tokens."""
    mlp, x = sparse(bias=bias), rng.normal(size=(2, 50, H)).astype(np.float32)
    expected = jax.jit(SparseMlp.__call__)(mlp, x)
    by_rows = sparse(bias=bias)
    to_rows(by_rows)
    assert isinstance(by_rows.experts.down.weight, RowWeight) and by_rows.experts.down.weight.shape == (E, H, WIDE)
    np.testing.assert_allclose(jax.jit(SparseMlp.__call__)(by_rows, x), expected, **CLOSE)
    monkeypatch.setattr(moe, "platform", lambda: "tpu")
    np.testing.assert_allclose(jax.jit(lambda mlp, x: mlp(x))(mlp, x), expected, **CLOSE)


def test_only_one_expert_at_a_time_is_computed_and_no_array_has_tokens_by_experts_by_width():
    mlp, num_tokens = sparse(), 40
    x = jnp.zeros((1, num_tokens, H))
    text = jax.jit(SparseMlp.__call__).lower(mlp, x).compile().as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)}
    whole = {(E, H, WIDE), (E, WIDE, H)}
    assert whole <= shapes
    assert all(np.prod(shape) <= K * num_tokens * H + 64 * H for shape in shapes - whole)


def test_the_expected_turns_are_the_mean_of_random_choices():
    for num_tokens, block in ((1, 1), (5, 8), (60, 8), (200, 32)):
        chosen = np.argsort(rng.random((500, num_tokens, E)), axis=-1)[..., :K]
        counts = (chosen[..., None] == np.arange(E)).sum(axis=(1, 2))  # [500, E]
        mean = (-(-counts // block)).sum(axis=1).mean()
        assert moe.expected_turns(num_tokens, K, E, block) == pytest.approx(mean, rel=0.02)
    assert moe.expected_turns(9, 4, 4, 8) == 8


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((2, 2, 2), "rows"), ((2, 2, 2), "batch")]
    + [
        pytest.param(shape, rows, marks=pytest.mark.slow)
        for shape in ((1, 1, 8), (1, 4, 2))
        for rows in ("rows", "batch")
    ],
)
def test_experts_on_a_mesh_are_those_on_one_device(shape, rows):
    mlp, x = sparse(shared_size=16, bias=True), rng.normal(size=(4, 6, H)).astype(np.float32)
    expected = jax.jit(SparseMlp.__call__)(mlp, x)
    mesh = make_mesh(MeshShape(*shape))
    assert shardings(mesh, mlp).experts.down.weight.get_value().spec[0] == "tensor"
    with jax.set_mesh(mesh):
        found = jax.jit(lambda mlp, x: mlp(x, rows=rows))(place_weights(mesh, mlp), x)
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("by_rows", [False, True], ids=["mesh", "rows"])
def test_experts_of_int8_in_blocks_are_the_matrices_that_they_stand_for(by_rows):
    """On a mesh each device has whole blocks of the width."""

    def make(in_blocks: bool) -> SparseMlp:
        mlp = SparseMlp(64, ExpertsConfig(E, K, 32, renormalised=True), iter(jax.random.split(jax.random.key(0), 2)))
        to_int8_weights(mlp)
        for linear in (mlp.experts.gate, mlp.experts.up, mlp.experts.down) if in_blocks else ():
            linear.set_blocks(jnp.float32)
        return mlp

    expected, x = jax.jit(lambda: make(False))(), rng.normal(size=(4, 6, 64)).astype(np.float32)
    y, mlp = jax.jit(SparseMlp.__call__)(expected, x), jax.jit(lambda: make(True))()
    gate = mlp.experts.gate
    assert gate.scale.shape == (E, 2, 32) and gate.scale.axes == gate.weight.axes == ("expert", "embed", None)
    if by_rows:
        to_rows(mlp)
        np.testing.assert_allclose(jax.jit(SparseMlp.__call__)(mlp, x), y, **CLOSE)
        return
    mesh = make_mesh(MeshShape(1, 2, 4))
    with jax.set_mesh(mesh):
        placed = place_weights(mesh, mlp)
        assert placed.experts.gate.scale[...].sharding.spec == jax.P("tensor", "fsdp", None)
        np.testing.assert_allclose(jax.jit(lambda mlp, x: mlp(x))(placed, x), y, **CLOSE)


def test_a_mesh_that_does_not_divide_the_experts_is_named():
    config = dataclasses.replace(tiny_family(hf_config("qwen3_moe")).config, num_experts=6)
    with pytest.raises(UserError, match="tensor 4 of the mesh does not divide the target's 6 experts: use tensor 1, 2"):
        check_experts(make_mesh(MeshShape(1, 2, 4)), config)
