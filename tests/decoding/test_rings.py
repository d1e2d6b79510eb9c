"""Local layers that keep a ring of their window say what layers that keep all positions say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.decoding.sampling import choose, make_sampling
from fasteagle_jax.decoding.speculative import generate
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.devices.sharding import MeshShape, make_mesh, place_weights
from fasteagle_jax.nn.kv_cache import Cache, MixedCache
from tests.decoding.test_families import CONTEXT, PROMPTS, SAMPLINGS, random_drafter
from tests.tiny_families import hf_config, tiny_family

MAX_NEW, CHUNK, WINDOW = 40, 8, 6


def local_target(name: str, *, stacked: bool, int8: bool):
    target = tiny_family(hf_config(name, 1) | {"sliding_window": WINDOW})
    target = target if stacked else target.unstacked()
    target.cache_dtype = jnp.int8 if int8 else None
    return target


@jax.jit
def said(target, texts, sampling):
    """The token that the target chooses after each one of texts int32 [B, T], in one pass, with no ring."""
    batch, num_tokens = texts.shape
    cache = target.empty_cache(batch, num_tokens)
    assert isinstance(cache, Cache)
    positions = jnp.broadcast_to(jnp.arange(num_tokens), texts.shape)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((num_tokens, num_tokens), bool)), (batch, num_tokens, num_tokens))
    out = target(texts, positions, causal, cache)
    return choose(target.logits(out.hidden), positions + 1, sampling)


def check_said(target, sampling, found) -> None:
    longest = max(map(len, PROMPTS)) + MAX_NEW
    texts = np.zeros((len(PROMPTS), longest), np.int32)
    for text, prompt, tokens in zip(texts, PROMPTS, np.asarray(found.tokens), strict=True):
        text[: len(prompt) + MAX_NEW] = [*prompt, *tokens]
    expected = np.asarray(said(target, texts, sampling))
    for row, prompt, tokens in zip(expected, PROMPTS, np.asarray(found.tokens), strict=True):
        np.testing.assert_array_equal(tokens, row[len(prompt) - 1 : len(prompt) - 1 + MAX_NEW])


# gemma3 has layers of both kinds, all of mistral's are local.
CASES = [("gemma3", True, True)]
SLOW = [
    (name, stacked, int8)
    for name in ("gemma3", "gemma2", "mistral", "mixtral")
    for stacked in (False, True)
    for int8 in (False, True)
    if (name, stacked, int8) not in CASES
]


@pytest.mark.parametrize(
    ("name", "stacked", "int8"), CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_tokens_are_those_of_a_cache_of_all_positions(name, stacked, int8):
    """Plain and drafted, in texts that are many times as long as the window, whose rings turn over."""
    target = local_target(name, stacked=stacked, int8=int8)
    cache = jax.eval_shape(lambda: target.empty_cache(3, 200, CHUNK))
    assert isinstance(cache, MixedCache) and cache.local.num_slots == WINDOW + 2 * CHUNK
    assert (cache.full is None) == (name in ("mistral", "mixtral"))
    drafters = [random_drafter(target, **CONTEXT)]
    if name != "gemma3" or not int8:
        drafters.append(random_drafter(target))
    accepted = 0
    for sampling in SAMPLINGS.values():
        sizes = dict(max_new=MAX_NEW, chunk=CHUNK)
        plain = generate(target, None, PROMPTS, sampling, **sizes)
        check_said(target, sampling, plain)
        for drafter in drafters:
            drafted = generate(target, drafter, PROMPTS, sampling, tree=TreeSpec("best_first", 12), **sizes)
            np.testing.assert_array_equal(drafted.tokens, plain.tokens)
            accepted += int(drafted.statistics.accepted_at.sum())
    assert accepted > 0  # something was at stake


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
def test_a_drafter_that_is_told_to_read_a_local_layer_reads_its_ring(stacked):
    """By default it reads the last layer with full attention, of a target that has one."""
    target = local_target("gemma3", stacked=stacked, int8=False)
    kinds = target.config.layer_kinds
    assert kinds[random_drafter(target, **CONTEXT).config.context_layer].window is None and kinds[0].window == WINDOW
    drafter = random_drafter(target, **CONTEXT, context_layer=0)
    sizes, sampling = dict(max_new=MAX_NEW, chunk=CHUNK), SAMPLINGS["mixed"]
    plain = generate(target, None, PROMPTS, sampling, **sizes)
    drafted = generate(target, drafter, PROMPTS, sampling, tree=TreeSpec.parse("backbone:4"), **sizes)
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)


def test_without_a_gain_all_positions_are_kept():
    """A window that with what is written at a time is no shorter than the rows, or a target without windows."""
    target = local_target("gemma3", stacked=True, int8=False)
    for cache in (target.empty_cache(1, 20, CHUNK), target.empty_cache(1, 200)):
        assert isinstance(cache, Cache)
    assert isinstance(target.empty_cache(1, 16, CHUNK, 200), MixedCache)  # a prompt of a longer row
    assert isinstance(tiny_family(hf_config("llama", 0)).empty_cache(1, 200, CHUNK), Cache)


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
def test_int8_caches_and_rings_split_over_a_mesh_say_what_they_say_on_one_device(stacked):
    sizes = dict(vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, sliding_window=WINDOW)
    target = tiny_family(hf_config("gemma3", 1) | sizes)
    target = target if stacked else target.unstacked(by_rows=False)
    target.cache_dtype = jnp.int8
    drafter, sampling = random_drafter(target, **CONTEXT), make_sampling(4, temperature=[0.0, 0.7, 40.0, 0.0])
    prompts, sizes = [*PROMPTS, PROMPTS[1][:5]], dict(max_new=MAX_NEW, chunk=CHUNK)
    plain = generate(target, None, prompts, sampling, **sizes)
    mesh = make_mesh(MeshShape(2, 2, 2))
    with jax.set_mesh(mesh):
        split = [place_weights(mesh, model) for model in (target, drafter)]
        drafted = generate(*split, prompts, sampling, tree=TreeSpec("best_first", 12), **sizes)
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
