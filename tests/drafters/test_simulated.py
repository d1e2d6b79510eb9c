"""The simulated drafter is accepted as often as it was asked to be, and changes no token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.decoding.acceptance import Acceptance
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import generate
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.drafters.simulated import Simulated, parse_rates
from fasteagle_jax.errors import UserError
from tests.tiny_models import tiny_target

B, MAX_NEW, V, CHUNK = 8, 300, 40, 8
RATES = (0.9, 0.5, 0.8, 0.3)
PROMPTS = [[b, b + 1, b + 2] for b in range(B)]


@pytest.fixture(scope="module")
def target():
    return tiny_target(num_layers=2)


@pytest.fixture(scope="module")
def plain(target):
    sampling = make_sampling(B, temperature=1.0, seed=list(range(B)))
    return np.asarray(generate(target, None, PROMPTS, sampling, max_new=MAX_NEW, chunk=CHUNK).tokens)


@pytest.mark.parametrize("tree", ["best_first:9", pytest.param("best_first:3", marks=pytest.mark.slow)])
def test_conditional_acceptance_is_what_was_asked_for(target, plain, tree):
    sequences = jnp.asarray(np.concatenate([np.asarray(PROMPTS), plain], axis=1))
    seeds = jnp.arange(100, 100 + B).astype(jnp.uint32)
    drafter = Simulated(sequences, jnp.asarray(RATES, jnp.float32), seeds, V, (1,))
    sampling = make_sampling(B, temperature=1.0, seed=list(range(B)))
    made = generate(target, drafter, PROMPTS, sampling, max_new=MAX_NEW, tree=TreeSpec.parse(tree), chunk=CHUNK)
    np.testing.assert_array_equal(made.tokens, plain)

    counts = Acceptance.of(made.statistics)
    held = min(len(RATES), TreeSpec.parse(tree).num_nodes(len(RATES)) - 1)  # a tree of 3 nodes holds two levels of four
    assert not any(counts.accepted_at[held:])
    # A row's last round may end inside a path, whose last guess then counts as the target's own: B of thousands.
    tried = (counts.rounds, *counts.accepted_at)[:held]
    assert min(tried) > 200
    for rate, found, number in zip(RATES[:held], counts.by_depth, tried, strict=False):
        sampling_error = (rate * (1 - rate) / number) ** 0.5
        assert abs(found - rate) < 4 * sampling_error + B / number


def test_draws_are_the_same_again_and_others_with_another_seed(target, plain):
    def rounds(seed: int) -> list[int]:
        sequences = jnp.asarray(np.concatenate([np.asarray(PROMPTS), plain], axis=1))
        seeds = jnp.full((B,), seed, jnp.uint32)
        drafter = Simulated(sequences, jnp.asarray(RATES, jnp.float32), seeds, V, (1,))
        sampling = make_sampling(B, temperature=1.0, seed=list(range(B)))
        made = generate(
            target, drafter, PROMPTS, sampling, max_new=MAX_NEW, tree=TreeSpec("best_first", 9), chunk=CHUNK
        )
        return jax.device_get(made.statistics.rounds).tolist()

    assert rounds(1) == rounds(1) != rounds(2)


@pytest.mark.parametrize("text", ["", "0.5/", "1.5", "high"])
def test_rates_that_cannot_be_are_user_errors(text):
    with pytest.raises(UserError, match=r"write one number of 0 to 1 a level"):
        parse_rates(text)
    assert parse_rates("0.8/0.7/1") == (0.8, 0.7, 1.0)
