"""GGUF's Q8_0 with dtype int8: the file's own int8 and scales, and the answers of the file in floats."""

from __future__ import annotations

import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file

from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import generate
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.devices.memory import bytes_of
from fasteagle_jax.devices.sharding import MeshShape, make_mesh
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.linear import Linear, to_int8
from fasteagle_jax.targets.checkpoint import fingerprint
from fasteagle_jax.targets.loading import load_target, open_checkpoint, target_shapes
from tests.decoding.test_families import random_drafter
from tests.targets.test_checkpoint import HIDDEN, INNER, random_weights, to_gguf, write_gguf

Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


def write(path, *floats: str, head: bool = True):
    """A file of random weights: matrices in Q8_0 but for `floats`, norms in float32."""
    tensors = {}
    for name, value in random_weights(head=head).items():
        stored, rows = to_gguf(name, value)
        in_floats = value.ndim == 1 or name in floats
        tensors[stored] = rows if in_floats else (gguf.quants.quantize(rows, Kind.Q8_0), Kind.Q8_0)
    return write_gguf(path, tensors)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("q8") / "model.gguf")


def logits(model) -> jax.Array:
    tokens = np.arange(20)[None] * 7 % 48
    visible = np.tril(np.ones((1, 20, 20), bool))
    return jax.jit(lambda model: model.logits(model(tokens, np.arange(20)[None], visible).hidden))(model)


def linears(model) -> dict[tuple, Linear]:
    return {at: node for at, node in nnx.iter_graph(model) if isinstance(node, Linear)}


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
def test_the_files_int8_and_scales_are_kept(path, stacked):
    exact, kept = (load_target(str(path), dtype, stacked=stacked) for dtype in (jnp.float32, jnp.int8))
    # The rows of q in Hugging Face's order; embedding and head in float32, though the file has them in Q8_0.
    rows, scales = open_checkpoint(path).read_blocks(Q)
    q = kept.model.layer(1).attention.q
    weight = q.weight[...] if q.by_rows else q.weight[...].T
    assert (q.weight.dtype, q.scale.dtype, q.scale.shape) == (jnp.int8, jnp.float16, (HIDDEN // 32, HIDDEN))
    np.testing.assert_array_equal(weight, rows)
    np.testing.assert_array_equal(q.scale[...], scales.T)
    assert kept.model.embedding.dtype == kept.model.head_rows().dtype == jnp.float32
    for at, linear in linears(kept.model).items():
        assert linear.in_blocks
        np.testing.assert_array_equal(linear.matrix, linears(exact.model)[at].matrix)
    np.testing.assert_allclose(logits(kept.model), logits(exact.model), rtol=1e-6, atol=1e-5)
    # Nothing is rounded, so it is the same target. A stack's shapes are those that were loaded.
    assert kept.fingerprint == exact.fingerprint == fingerprint(open_checkpoint(path))
    shapes = target_shapes(
        kept.checkpoint.config, jnp.float32, int8=True, in_blocks=kept.checkpoint.in_blocks, stacked=stacked
    )
    assert bytes_of(shapes, None) == bytes_of(kept.model, None) < bytes_of(exact.model, None) / 2


@pytest.mark.slow
@pytest.mark.parametrize("head", [False, True], ids=["tied", "head"])
def test_drafted_tokens_are_those_of_the_file_in_floats(tmp_path, head):
    file = write(tmp_path / "model.gguf", head=head)
    exact, kept = (load_target(str(file), dtype, stacked=False).model for dtype in (jnp.float32, jnp.int8))
    prompts, sampling = [[3, 1, 4, 1, 5], [9, 2, 6]], make_sampling(2, temperature=[0.0, 0.8], seed=[0, 1])
    sizes = dict(max_new=16, chunk=16)
    expected = generate(exact, None, prompts, sampling, **sizes).tokens
    drafted = generate(kept, random_drafter(kept), prompts, sampling, tree=TreeSpec("best_first", 6), **sizes)
    np.testing.assert_array_equal(drafted.tokens, expected)


def test_beside_matrices_in_floats_a_stack_is_the_list_all_the_same(tmp_path):
    file = write(tmp_path / "model.gguf", UP)
    checkpoint = open_checkpoint(file)
    assert fingerprint(checkpoint, jnp.int8) != fingerprint(checkpoint)
    one, stack = (load_target(str(file), jnp.int8, stacked=stacked).model for stacked in (False, True))
    assert not one.layer(1).mlp.up.in_blocks and one.layer(0).mlp.up.in_blocks
    assert stack.layers.mlp.up.scale.dtype == jnp.float32 and stack.layers.mlp.gate.scale.dtype == jnp.float16
    values, scale = to_int8(checkpoint.read(UP).T)
    for i, at in ((i, at) for i in range(2) for at in linears(one.layer(0))):
        np.testing.assert_array_equal(linears(stack.layer(i))[at].matrix, linears(one.layer(i))[at].matrix)
    np.testing.assert_array_equal(one.layer(1).mlp.up.matrix, values * scale)


def test_a_matrix_that_an_adapter_changes_is_rounded_anew(path, tmp_path):
    adapter, rng = tmp_path / "adapter", np.random.default_rng(0)
    adapter.mkdir()
    parts = {"A": rng.standard_normal((2, HIDDEN)), "B": rng.standard_normal((INNER, 2))}
    name = f"base_model.model.{UP.removesuffix('.weight')}.lora"
    tensors = {f"{name}_{part}.weight": value.astype(np.float32) for part, value in parts.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    merged = load_target(str(path), jnp.int8, stacked=False, adapter=str(adapter))
    layer, plain = merged.model.layer(1), open_checkpoint(path).read(UP)
    assert layer.mlp.gate.in_blocks and not layer.mlp.up.in_blocks
    values, scale = to_int8((plain + parts["B"].astype("f4") @ parts["A"].astype("f4")).T)
    np.testing.assert_allclose(layer.mlp.up.matrix, values * scale, rtol=1e-5, atol=1e-5)
    assert merged.fingerprint != fingerprint(merged.checkpoint)


def test_on_a_mesh_scales_are_split_as_weights_are_or_the_mesh_is_refused(path):
    mesh = make_mesh(MeshShape(1, 2, 1), jax.devices()[:2])
    alone = load_target(str(path), jnp.int8, stacked=True).model
    split = load_target(str(path), jnp.int8, stacked=True, mesh=mesh).model
    for at, linear in linears(split).items():
        np.testing.assert_array_equal(linear.matrix, linears(alone)[at].matrix)
    q, down = split.layers.attention.q, split.layers.mlp.down
    assert q.weight[...].sharding.spec == q.scale[...].sharding.spec == jax.P(None, "fsdp", None)
    assert down.weight[...].sharding.spec == down.scale[...].sharding.spec == jax.P(None, None, "fsdp")
    expected = np.asarray(logits(alone))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(logits(split), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(UserError) as caught:
        load_target(str(path), jnp.int8, mesh=make_mesh(MeshShape(1, 1, 2), jax.devices()[:2]))
    assert str(caught.value) == (
        "tensor 2 of the mesh does not divide the 3 blocks of 96 inputs that have a scale each in the file: "
        "use tensor 1"
    )
    load_target(str(path), jnp.float32, mesh=make_mesh(MeshShape(1, 1, 2), jax.devices()[:2]))
