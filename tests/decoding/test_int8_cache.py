"""With an int8 cache drafting gives the tokens of that target's own plain decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.decoding.speculative import generate
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.nn.kv_cache import commit
from fasteagle_jax.nn.linear import to_int8_weights
from fasteagle_jax.targets.table import FAMILIES
from tests.decoding.test_families import CHUNK, CONTEXT, MAX_NEW, PROMPTS, SAMPLINGS, random_drafter
from tests.tiny_families import hf_config, tiny_family
from tests.tiny_models import tiny_target

TREES = ("best_first:12", "backbone:4", "chain", "best_first:8+lookup:4")


def rounded(name: str, *, stacked: bool = False, int8_weights: bool = False, **changes: int):
    target = tiny_family(hf_config(name, 1) | changes)
    target = target if stacked else target.unstacked()
    if int8_weights:
        to_int8_weights(target)
    target.cache_dtype = jnp.int8
    return target


def check_lossless(target, drafters, trees) -> None:
    sizes, accepted = dict(max_new=MAX_NEW, chunk=CHUNK), 0
    for sampling in SAMPLINGS.values():
        plain = generate(target, None, PROMPTS, sampling, **sizes)
        for drafter in drafters:
            for tree in trees:
                drafted = generate(target, drafter, PROMPTS, sampling, tree=TreeSpec.parse(tree), **sizes)
                np.testing.assert_array_equal(drafted.tokens, plain.tokens)
                accepted += int(drafted.statistics.accepted_at.sum())
    assert accepted > 0  # something was at stake


@pytest.mark.slow  # test_rings.py has an int8 cache, tests/targets/test_int8.py int8 weights
@pytest.mark.parametrize("int8_weights", [False, True], ids=["", "int8 weights"])
def test_drafting_is_lossless(int8_weights):
    """A drafter of its own cache in a list of local and global layers, one of the target's in a stack."""
    if int8_weights:
        target = rounded("qwen3", stacked=True, int8_weights=True, num_hidden_layers=3)
        check_lossless(target, [random_drafter(target, **CONTEXT)], TREES[1:2])
    else:
        target = rounded("gemma3", num_hidden_layers=3)
        check_lossless(target, [random_drafter(target)], TREES[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stacked", "int8_weights"), [(False, True), (True, False)], ids=["list-int8 weights", "stacked"]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_drafting_is_lossless_for_every_family(name, stacked, int8_weights):
    target = rounded(name, stacked=stacked, int8_weights=int8_weights)
    drafters = [random_drafter(target), random_drafter(target, **CONTEXT)]
    check_lossless(target, drafters, TREES if name == "llama" else TREES[:2])


@pytest.mark.parametrize("stacked", [pytest.param(False, marks=pytest.mark.slow), True], ids=["list", "stacked"])
def test_a_token_is_read_alike_fresh_and_committed(stacked):
    """Whether in one chunk, in two or one by one: no query reads a key or value that is not rounded."""
    target = tiny_target(num_layers=2, stacked=stacked)
    target.cache_dtype = jnp.int8
    tokens = jnp.asarray(np.random.default_rng(0).integers(40, size=(2, 24)))

    @jax.jit
    def step(cache, tokens):
        num = tokens.shape[1]
        visible = jnp.broadcast_to(jnp.tril(jnp.ones((num, num), bool)), (2, num, num))
        out = target(tokens, cache.length[:, None] + jnp.arange(num), visible, cache)
        return target.logits(out.hidden), commit(cache, out.fresh, jnp.full((2,), num))

    def logits(*sizes):
        cache, found = target.empty_cache(2, 40), []
        for part in np.split(tokens, np.cumsum(sizes)[:-1], axis=1):
            of_part, cache = step(cache, part)
            found.append(of_part)
        return np.concatenate(found, axis=1), cache

    whole, cache = logits(24)
    for sizes in ((16, 8), (8,) * 3, (1,) * 8 + (16,)):
        found, other = logits(*sizes)
        # A last bit of a product may round an entry the other way, and then changes logits a little.
        steps = np.concatenate([np.abs(a - b).ravel() for a, b in zip(ints(cache), ints(other), strict=True)])
        assert steps.max() <= 1 and steps.sum() <= steps.size / 1000
        assert np.median(np.abs(found - whole)) < 1e-5
    target.cache_dtype = None
    exact, _ = logits(24)
    assert np.median(np.abs(exact - whole)) > 1e-3  # rounding is there to be seen


def ints(cache):
    return [x for x in jax.tree.leaves((cache.k, cache.v)) if x.dtype == jnp.int8]
