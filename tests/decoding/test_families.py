"""Drafting for every family of targets is lossless, and a drafter that reads the target's cache reads it as it is."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fasteagle_jax.decoding.interfaces import Ranking
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import generate, start
from fasteagle_jax.decoding.state import context_of, make_stop
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.devices.sharding import MeshShape, make_mesh, place_weights
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.drafters.files import load_drafter, save_drafter
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.linear import to_int8_weights
from fasteagle_jax.nn.packed_attention import Packed
from fasteagle_jax.targets.table import FAMILIES
from fasteagle_jax.training.init import init_drafter
from tests.tiny_families import V, hf_config, tiny_family

N, MAX_NEW, CHUNK = 3, 20, 16
rng = np.random.default_rng(0)
PROMPTS = [rng.integers(V, size=n).tolist() for n in (3, 17, 30)]  # all texts are longer than a window
SAMPLINGS = {
    "greedy": make_sampling(3),
    # At the highest temperature the noise, which the drafter knows, decides: guesses are accepted.
    "mixed": make_sampling(3, temperature=[0.0, 0.7, 40.0], top_k=[0, 8, 0], top_p=[1.0, 0.9, 1.0], seed=[0, 1, 2]),
}
CONTEXT = dict(context="target", levels="shared", side_by_side=True, reinject=True)
OTHERS = [name for name in FAMILIES if name != "llama"]


def random_drafter(target, **changes) -> FastEagle:
    """A random drafter with nothing at its neutral value."""
    config = default_config(target.config, num_levels=N, feature_layers=(1, 2), **changes)

    def make() -> FastEagle:
        drafter = FastEagle(config, jax.random.key(1), stacked=target.stacked)
        for i, (_, node) in enumerate(nnx.iter_graph(drafter)):
            if isinstance(node, nnx.Param):
                node[...] += 0.2 * jax.random.normal(jax.random.key(i), node.shape)
        return drafter

    return jax.jit(make)()


@pytest.mark.slow  # the tests of rings and of int8 caches have this on gemma3 and qwen3
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("name", OTHERS)
def test_drafting_is_lossless(name, int8):
    """The tokens of the target's own plain decoding, with its weights rounded to int8 of the rounded target's."""
    target = tiny_family(hf_config(name, 1)).unstacked()
    if int8:
        to_int8_weights(target)
    sizes = dict(max_new=MAX_NEW, chunk=CHUNK)
    plain = {kind: generate(target, None, PROMPTS, sampling, **sizes) for kind, sampling in SAMPLINGS.items()}
    drafter, accepted = random_drafter(target), 0
    for kind, sampling in SAMPLINGS.items():
        drafted = generate(target, drafter, PROMPTS, sampling, tree=TreeSpec("best_first", 12), **sizes)
        np.testing.assert_array_equal(drafted.tokens, plain[kind].tokens)
        accepted += int(drafted.statistics.accepted_at.sum())
    assert accepted > 0  # something was at stake
    assert len({tuple(row) for row in np.asarray(plain["mixed"].tokens).tolist()}) == len(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("name", OTHERS)
def test_drafting_from_the_targets_cache_in_stacks_of_layers_is_lossless(name, int8):
    target = tiny_family(hf_config(name, 1))
    if int8:
        to_int8_weights(target)
    sizes, accepted = dict(max_new=MAX_NEW, chunk=CHUNK), 0
    drafter = random_drafter(target, **CONTEXT)
    for sampling in SAMPLINGS.values():
        plain = generate(target, None, PROMPTS, sampling, **sizes)
        drafted = generate(target, drafter, PROMPTS, sampling, tree=TreeSpec.parse("backbone:4"), **sizes)
        np.testing.assert_array_equal(drafted.tokens, plain.tokens)
        accepted += int(drafted.statistics.accepted_at.sum())
    assert accepted > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"), [("qwen3_moe", (2, 2, 2)), ("qwen3_moe", (1, 4, 2)), ("gpt_oss", (2, 2, 2))], ids=str
)
def test_experts_split_over_a_mesh_say_what_they_say_on_one_device(name, shape):
    sizes = dict(vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    target = tiny_family(hf_config(name) | sizes)
    changes = CONTEXT if name == "gpt_oss" else {}  # its sinks are split by heads, in both
    drafter, sampling = (
        random_drafter(target, **changes),
        make_sampling(4, temperature=[0.0, 0.7, 40.0, 0.0], seed=[0, 1, 2, 3]),
    )
    prompts = [*PROMPTS, PROMPTS[1][:5]]
    plain = generate(target, None, prompts, sampling, max_new=MAX_NEW, chunk=CHUNK)
    mesh = make_mesh(MeshShape(*shape))
    with jax.set_mesh(mesh):
        split = [place_weights(mesh, model) for model in (target, drafter)]
        tree = TreeSpec("backbone", 4) if changes else TreeSpec("best_first", 12)
        drafted = generate(*split, prompts, sampling, tree=tree, max_new=MAX_NEW, chunk=CHUNK)
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)


# Of the families whose attention differs from Llama's, a layer of each kind: local and capped, local and normed, not
# rotated, of a scale of its own, with biases, with sinks.
LAYERS = [
    ("gemma2", 0),
    ("gemma3", None),
    ("gemma3", 0),
    ("smollm3", 2),
    ("granite", None),
    ("qwen2", None),
    ("phi3", None),
    ("gpt_oss", None),
    ("gpt_oss", 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_a_drafter_that_reads_the_targets_cache_guesses_after_every_prefix_what_training_says(name, layer, tmp_path):
    """Its attention is that of the layer it reads, in decoding, in training and in its files."""
    target = tiny_family(hf_config(name, 0))
    kinds, shared = target.config.layer_kinds, target.config.layer
    own = {} if layer is None else {"context_layer": layer}
    drafter = random_drafter(target, **CONTEXT, **own)
    c = drafter.config
    kind = kinds[c.context_layer]
    assert (c.rope, c.window, c.soft_cap, c.qk_norm) == (kind.rope, kind.window, kind.soft_cap, shared.qk_norm)
    assert c.sinks == shared.sinks == (drafter.shared.attention.sinks is not None)
    if layer is None:
        assert kind.window is None and all(later.window for later in kinds[c.context_layer + 1 :])
    text = rng.integers(V, size=24)

    @functools.partial(jax.jit, static_argnums=2)
    def guessed(drafter, target, n):
        """The chain after the first n tokens."""
        tokens = jnp.asarray(text)[None]
        sampling, stop = make_sampling(1), make_stop(1, 4)
        sizes = dict(max_new=4, num_levels=N, chunk=8)
        state, vocab = start(target, drafter, tokens, jnp.full((1,), n), sampling, stop, **sizes)
        pending = state.new._replace(tokens=state.new.tokens.at[:, 0].set(tokens[:, n]))
        context, ranking = context_of(state.target_cache, drafter), Ranking(sampling, True)
        draft, _ = drafter.draft(vocab, pending, state.drafter_cache, TreeSpec("chain"), ranking, context)
        return draft.tokens[0, 1:]

    @jax.jit
    def trained(drafter, target):
        """The most likely guesses of levels at every position [N, T], and at some of them alone."""
        tokens, positions = jnp.asarray(text)[None], jnp.arange(24)[None]
        packed = Packed(jnp.ones((1, 24), jnp.int32), c.window)
        out = target(tokens, positions, packed, None, (1, 2, c.context_layer))
        features, inputs = jnp.split(out.features, [2 * c.hidden_size], axis=-1)
        context = (target.keys_values(c.context_layer, inputs, positions),)
        stream = target.embedding[...], features, jnp.roll(tokens, -1, axis=1), positions, packed
        some = jnp.asarray([[0, 12, 21]])
        of_all, of_some = (drafter.hidden_states(*stream, context=context, at=at)[0] for at in (None, some))
        vocab = drafter.vocab_weights(target)
        return [vocab.logits(states)[:, 0].argmax(axis=-1) for states in (of_all, of_some)]

    expected, of_some = map(np.asarray, trained(drafter, target))
    np.testing.assert_array_equal(of_some, expected[:, [0, 12, 21]])
    for n in (1, 13, 22):
        assert guessed(drafter, target, n).tolist() == expected[:, n - 1].tolist()
    save_drafter(drafter, tmp_path / "drafter", "of a test", {})
    again = load_drafter(tmp_path / "drafter", target.config, "of a test", stacked=True)
    assert guessed(again, target, 13).tolist() == expected[:, 12].tolist()
    with pytest.raises(UserError, match="drafter window is 3, the target's .*: to read the target's keys and values"):
        default_config(target.config, **CONTEXT, **own, window=3)


@pytest.mark.slow  # from plain layers: tests/training/test_step.py
def test_a_drafter_starts_from_what_a_targets_layer_has_in_common_with_a_plain_one(caplog):
    target = tiny_family(hf_config("gemma3", 0))
    config = default_config(target.config, num_levels=N, feature_layers=(1, 2))
    drafter = jax.jit(lambda target: init_drafter(config, target, jax.random.key(0)))(target)
    assert caplog.messages == [
        "the drafter starts from the target's layer 3, without self_attn.q_norm, self_attn.k_norm, "
        "its norms after attention and MLP, its activation gelu_tanh"
    ]
    last, level = target.layer(3), jax.tree.map(lambda w: w[1], drafter.levels)
    np.testing.assert_array_equal(level.mlp.up.matrix, last.mlp.up.matrix)
    np.testing.assert_allclose(level.attention.q.matrix, last.attention.q.matrix * last.attention.query_gain)
    np.testing.assert_array_equal(level.mlp_norm.weight[...], 1 + last.mlp_norm.weight[...])
    np.testing.assert_array_equal(level.norm.weight[...], 1 + target.norm.weight[...])
    caplog.clear()
    sparse = tiny_family(hf_config("qwen3_moe", 0) | {"attention_bias": False})
    config = default_config(sparse.config, num_levels=N, feature_layers=(1, 2))
    drafter = jax.jit(lambda target: init_drafter(config, target, jax.random.key(0)))(sparse)
    assert caplog.messages == [
        "the drafter starts from the target's layer 3, without its experts, self_attn.q_norm, self_attn.k_norm"
    ]
    copied, own = sparse.layer(3).attention.o.matrix, jax.tree.map(lambda w: w[1], drafter.levels)
    np.testing.assert_array_equal(own.attention.o.matrix, copied)
    caplog.clear()
    sinks = tiny_family(hf_config("gpt_oss", 0) | {"tie_word_embeddings": False})
    config = default_config(sinks.config, num_levels=N, feature_layers=(1, 2), **CONTEXT)
    assert config.context_layer == 3 and config.sinks and config.qkv_bias
    drafter = jax.jit(lambda target: init_drafter(config, target, jax.random.key(0)))(sinks)
    assert caplog.messages == [
        "the drafter starts from the target's layer 3, without self_attn.o_proj.bias, its experts, "
        "its activation clamped_swiglu"
    ]
    copied = sinks.layer(3).attention.sinks[...]
    np.testing.assert_array_equal(drafter.shared.attention.sinks[...], copied)
    caplog.clear()
    with_context = default_config(
        tiny_family(hf_config("qwen3", 0)).config, num_levels=N, feature_layers=(1, 2), **CONTEXT
    )
    jax.eval_shape(lambda: init_drafter(with_context, tiny_family(hf_config("qwen3", 0)), jax.random.key(0)))
    assert not caplog.messages  # its norms of queries and keys are the target's
