"""Targets whose layers are rounded to int8 as they are loaded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fasteagle_jax import Engine, SamplingParams
from fasteagle_jax.devices.sharding import MeshShape, make_mesh
from fasteagle_jax.nn.linear import Linear, to_int8, to_int8_weights
from fasteagle_jax.targets.checkpoint import fingerprint
from fasteagle_jax.targets.loading import load_target, open_checkpoint
from tests.tiny_families import hf_config, tiny_family, torch_family
from tests.tiny_folder import make_drafter, make_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("int8") / "target")


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
def test_a_loaded_targets_matrices_are_rounded_and_nothing_else(folder, stacked):
    exact, rounded = (load_target(str(folder), dtype, stacked=stacked).model for dtype in (jnp.float32, jnp.int8))
    assert rounded.dtype == jnp.float32  # of embedding, head and cache
    np.testing.assert_array_equal(rounded.embedding[...], exact.embedding[...])
    np.testing.assert_array_equal(rounded.head_rows(), exact.head_rows())
    one, other = exact.layer(1), rounded.layer(1)
    np.testing.assert_array_equal(other.mlp_norm.weight[...], one.mlp_norm.weight[...])
    for of_exact, of_rounded in ((one.attention.k, other.attention.k), (one.mlp.down, other.mlp.down)):
        values, scale = to_int8(np.asarray(of_exact.matrix))
        assert of_rounded.weight.dtype == jnp.int8
        np.testing.assert_array_equal(of_rounded.scale[...], scale)
        np.testing.assert_array_equal(of_rounded.matrix, values * scale)


def test_the_fingerprint_says_so(folder):
    checkpoint = open_checkpoint(folder)
    loaded = load_target(str(folder), jnp.int8)
    assert loaded.fingerprint == fingerprint(checkpoint, jnp.int8) != fingerprint(checkpoint)
    assert loaded.fingerprints == (loaded.fingerprint, fingerprint(checkpoint))
    assert fingerprint(checkpoint, jnp.bfloat16) == fingerprint(checkpoint)


@pytest.mark.torch
@pytest.mark.slow  # the last test rounds random ones
def test_experts_are_rounded_one_by_one_and_routers_are_not(tmp_path):
    torch_family(hf_config("qwen2_moe") | {"num_hidden_layers": 2}, tmp_path)
    exact, rounded = (load_target(str(tmp_path), dtype, stacked=True).model for dtype in (jnp.float32, jnp.int8))
    one, other = exact.layer(1).mlp, rounded.layer(1).mlp
    np.testing.assert_array_equal(other.router.matrix, one.router.matrix)
    np.testing.assert_array_equal(other.shared_gate.matrix, one.shared_gate.matrix)
    values, scale = to_int8(np.asarray(one.experts.down.matrix))
    np.testing.assert_array_equal(other.experts.down.weight[...], values)
    np.testing.assert_array_equal(other.experts.down.scale[...], scale)
    by_rows = load_target(str(tmp_path), jnp.int8, stacked=False).model.layer(1).mlp
    assert by_rows.experts.down.by_rows
    np.testing.assert_array_equal(by_rows.experts.down.matrix, other.experts.down.matrix)
    x = jax.random.normal(jax.random.key(0), (1, 5, one.router.weight.shape[0]))
    np.testing.assert_allclose(by_rows(x), other(x), rtol=1e-5, atol=1e-5)


def test_on_a_mesh_scales_are_split_as_outputs_are(folder):
    mesh = make_mesh(MeshShape(1, 4, 2))
    alone = load_target(str(folder), jnp.int8, stacked=True).model
    split = load_target(str(folder), jnp.int8, stacked=True, mesh=mesh).model
    for path, node in nnx.iter_graph(alone):
        if isinstance(node, Linear):
            own = dict(nnx.iter_graph(split))[path]
            np.testing.assert_array_equal(own.weight[...], node.weight[...])
            np.testing.assert_array_equal(own.scale[...], node.scale[...])
    assert split.layers.mlp.up.scale[...].sharding.spec == jax.P(None, "tensor")


def test_the_engines_answers_are_those_of_the_rounded_target_alone(folder, tmp_path, caplog):
    drafter = make_drafter(tmp_path / "drafter", folder)
    params = SamplingParams(temperature=0.8, seed=3, max_new_tokens=24, ignore_eos=True)
    prompts = ["Once upon a time", "a b c d e f g h i j k l m"]
    plain = Engine.load(str(folder), None, slots=2, max_len=128, dtype="int8")
    expected = [c.tokens for c in plain.generate(prompts, params)]
    drafted = Engine.load(str(folder), drafter, slots=2, max_len=128, tree="best_first:6", dtype="int8")
    assert [c.tokens for c in drafted.generate(prompts, params)] == expected
    assert "answers stay exact, but fewer guesses may be accepted" in caplog.text
    exact = Engine.load(str(folder), None, slots=2, max_len=128)
    assert plain.memory.target < exact.memory.target and plain.fingerprint != exact.fingerprint


def test_a_stack_of_random_layers_can_be_rounded_too():
    target = tiny_family(hf_config("qwen3_moe"))
    shapes = {path: node.shape for path, node in nnx.iter_graph(target) if isinstance(node, nnx.Param)}
    to_int8_weights(target)
    dtypes = {path: node.dtype for path, node in nnx.iter_graph(target) if isinstance(node, nnx.Param)}
    rounded = {path for path, dtype in dtypes.items() if dtype == jnp.int8}
    assert {path[-2] for path in rounded} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert all(dict(nnx.iter_graph(target))[path].shape == shapes[path] for path in rounded)
