"""Families of targets: a newcomer's through the table, and layers of several kinds in one stack."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fasteagle_jax import Engine, SamplingParams
from fasteagle_jax.devices.sharding import MeshShape, make_mesh, shardings
from fasteagle_jax.drafters.eagle3 import Eagle3
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.attention import Cached
from fasteagle_jax.nn.kv_cache import commit
from fasteagle_jax.nn.linear import Linear
from fasteagle_jax.nn.packed_attention import Packed
from fasteagle_jax.nn.rope import rotation
from fasteagle_jax.targets import table
from fasteagle_jax.targets.checkpoint import fingerprint
from fasteagle_jax.targets.llama import Llama
from fasteagle_jax.targets.loading import open_checkpoint
from tests import toy_family
from tests.tiny_folder import make_drafter, make_target
from tests.tiny_models import tiny_config
from tests.toy_family import Toy, ToyConfig

T, WINDOW = 12, 4
CLOSE = dict(rtol=1e-5, atol=1e-5)  # float32 sums of some tens of terms, in another order


def toy(num_layers: int, seed: int = 0) -> Toy:
    sizes = vars(tiny_config(num_layers=num_layers)) | {"window": WINDOW}
    return jax.jit(lambda: Toy(ToyConfig(**sizes), jax.random.key(seed)))()


def slow_hidden(target: Toy, tokens: jax.Array) -> jax.Array:
    """Layer by layer, each with a mask and a rotary table of its own."""
    c = target.config
    positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    x = target.embedding[...][tokens] * c.hidden_size**0.5
    for i in range(c.num_layers):
        kind = c.layer_kinds[i]
        seen = (distance >= 0) & (distance < (kind.window or T))
        mask = jnp.broadcast_to(seen, (*tokens.shape, T))
        x, _ = target.layer(i)(x, rotation(positions, kind.rope, c.head_dim), Cached(mask))
    return target.norm(x)


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (2, T), 0, 40)


@pytest.mark.parametrize("stacked", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["stacked", "list"])
def test_alternating_windows_and_rotary_tables_are_those_of_the_unrolled_slow_version(tokens, stacked):
    stack = toy(4)
    expected = jax.jit(slow_hidden)(stack, tokens)
    target = stack if stacked else stack.unstacked()
    positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (*tokens.shape, T))
    whole = jax.jit(lambda target: target(tokens, positions, causal, None, (3,)))(target)
    np.testing.assert_allclose(whole.hidden, expected, **CLOSE)
    packed = jax.jit(lambda target: target(tokens, positions, Packed(jnp.ones(tokens.shape, jnp.int32))))(target)
    np.testing.assert_allclose(packed.hidden, expected, **CLOSE)

    def in_two_parts(target):  # the second reads the first from the cache
        half = T // 2
        first = target(tokens[:, :half], positions[:, :half], causal[:, :half, :half], target.empty_cache(2, T))
        cache = commit(target.empty_cache(2, T), first.fresh, jnp.full((2,), half))
        return target(tokens[:, half:], positions[:, half:], causal[:, half:, half:], cache).hidden

    np.testing.assert_allclose(jax.jit(in_two_parts)(target), expected[:, T // 2 :], **CLOSE)
    no_window = ToyConfig(**(vars(stack.config) | {"window": T}))
    without = jax.jit(lambda tokens: slow_hidden(Toy(no_window, jax.random.key(0)), tokens))(tokens)
    assert not np.allclose(without, expected, **CLOSE)  # the window is short enough to matter


def test_more_layers_of_the_same_kinds_compile_to_no_more_layer_bodies(tokens):
    def products(num_layers: int) -> int:
        target = toy(num_layers)
        positions, segments = jnp.broadcast_to(jnp.arange(T), tokens.shape), jnp.ones(tokens.shape, jnp.int32)
        text = jax.jit(lambda target: target(tokens, positions, Packed(segments)).hidden).lower(target).as_text()
        return text.count("stablehlo.dot_general")

    assert products(12) == products(6) > 0


def test_keys_and_values_of_a_layer_are_those_of_the_pass(tokens):
    target = toy(3)
    positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (*tokens.shape, T))
    out = jax.jit(lambda target: target(tokens, positions, causal, None, (1, 2)))(target)
    inputs = jnp.split(out.features, 2, axis=-1)
    for layer, x in zip((1, 2), inputs, strict=True):
        for found, whole in zip(target.keys_values(layer, x, positions), out.fresh, strict=True):
            np.testing.assert_allclose(found, whole[layer], **CLOSE)


def test_a_newcomers_family_is_loaded_decoded_and_drafted_for(tmp_path):
    folder = make_target(tmp_path / "toy")
    config = json.loads((folder / "config.json").read_text())
    llama = fingerprint(open_checkpoint(folder))
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["ToyForCausalLM"], "sliding_window": 5}))
    with pytest.raises(UserError, match="ToyForCausalLM is not supported: use a target of LlamaForCausalLM"):
        open_checkpoint(folder)
    with toy_family.added():
        assert fingerprint(open_checkpoint(folder)) != llama  # its window is no default
        drafter = make_drafter(tmp_path / "drafter", folder)
        params = SamplingParams(temperature=0.8, seed=3, max_new_tokens=24)
        prompts = ["Once upon a time", "a b c d e f g h i j k l m"]
        plain = Engine.load(str(folder), None, slots=2, max_len=128)
        assert type(plain.target) is Toy and not plain.target.stacked
        expected = [c.tokens for c in plain.generate(prompts, params)]
        drafted = Engine.load(str(folder), drafter, slots=2, max_len=128, tree="best_first:6")
        assert [c.tokens for c in drafted.generate(prompts, params)] == expected
        with pytest.raises(UserError, match="int is of no family of targets: there are llama, .*gpt_oss, toy"):
            table.family_of(3)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Llama, {}),
        (FastEagle, {"reinject": True, "correction": 4}),
        (FastEagle, {"levels": "shared", "edges": 4}),
        (Eagle3, {}),
    ],
)
def test_every_matrix_is_a_linears_but_embedding_and_heads_and_has_logical_axes(kind, options):
    config = tiny_config()
    if kind is not Llama:
        config = default_config(config, "fasteagle" if kind is FastEagle else "eagle3", num_levels=2, **options)
    model = jax.eval_shape(lambda: kind(config, jax.random.key(0), stacked=False))
    nodes = list(nnx.iter_graph(model))
    of_linears = {id(node.weight) for _, node in nodes if isinstance(node, Linear)}
    for path, node in nodes:
        if isinstance(node, nnx.Param):
            assert len(node.axes) == node.ndim, path
            assert node.ndim == 1 or id(node) in of_linears or path[-1] in ("embedding", "head", "table"), path


def test_weights_without_axes_and_axes_that_are_not_known_raise():
    mesh, value = make_mesh(MeshShape(1, 8, 1)), jnp.zeros((8, 8))
    with pytest.raises(ValueError, match=r"weight \['w'\] has no logical axes"):
        shardings(mesh, {"w": nnx.Param(value)})
    with pytest.raises(ValueError, match="logical axis 'width' is not known: use one of batch, rows"):
        shardings(mesh, {"w": nnx.Param(value, axes=("width", None))})
    (placed,) = jax.tree.leaves(shardings(mesh, {"w": nnx.Param(value, axes=("embed", None))}))
    assert placed.spec == jax.P("fsdp", None)
