"""Decoding with bfloat16 weights, activations and caches says what exact arithmetic says of the same weights.

But at near-ties: rounding may turn a choice between two tokens whose logits are all but equal, and anything wrong turns
others too. The reference is plain greedy decoding in float32 of the weights as bfloat16 has them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import generate
from fasteagle_jax.decoding.tree import TreeSpec
from tests.tiny_models import oracle_drafter, tiny_target

B, N, V, MAX_NEW, CHUNK = 24, 3, 40, 32, 16
SIZES = dict(num_layers=3, sharpness=6.0)
NEAR = (
    0.15  # logits have a standard deviation of 6; rounded to 8 bits through three layers they turn gaps of up to 0.06
)

PROMPTS = [np.random.default_rng(b).integers(V, size=3 + b).tolist() for b in range(B)]
LONGEST = max(map(len, PROMPTS)) + MAX_NEW + N + 1


@pytest.fixture(scope="module")
def rounded():
    """A target in bfloat16."""
    return tiny_target(dtype=jnp.bfloat16, **SIZES)


@pytest.fixture(scope="module")
def exact(rounded):
    """The same weights in float32."""
    values = [x.astype(jnp.float32) for x in jax.tree.leaves(rounded)]
    return jax.tree.unflatten(jax.tree.structure(tiny_target(**SIZES)), values)


@pytest.fixture(scope="module")
def expected(exact) -> np.ndarray:
    """What it says, int32 [B, MAX_NEW]."""
    made = generate(exact, None, PROMPTS, make_sampling(B), max_new=MAX_NEW, chunk=CHUNK)
    return np.asarray(made.tokens)


@pytest.fixture(scope="module")
def texts(expected) -> np.ndarray:
    """Prompts with their answers behind them, int32 [B, LONGEST]."""
    texts = np.zeros((B, LONGEST), np.int32)
    for text, prompt, answer in zip(texts, PROMPTS, expected, strict=True):
        text[: len(prompt) + MAX_NEW] = [*prompt, *answer]
    return texts


@pytest.fixture(scope="module")
def logits(exact, expected, texts) -> np.ndarray:
    """Exact ones for each token of the answers, float32 [B, MAX_NEW, V]."""

    @jax.jit
    def of(tokens):
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((LONGEST, LONGEST), bool)), (B, LONGEST, LONGEST))
        return exact.logits(exact(tokens, jnp.broadcast_to(jnp.arange(LONGEST), tokens.shape), causal).hidden)

    whole = np.asarray(of(jnp.asarray(texts)))
    found = np.stack([row[len(p) - 1 : len(p) - 1 + MAX_NEW] for row, p in zip(whole, PROMPTS, strict=True)])
    np.testing.assert_array_equal(found.argmax(axis=-1), expected)
    return found


def test_near_ties_are_few(logits):
    """Else nothing would follow from the test below."""
    first, second = -np.sort(-logits, axis=-1)[..., :2].transpose(2, 0, 1)
    assert 0 < (first - second < NEAR).mean() < 0.1


@pytest.mark.parametrize(
    ("tree", "stacked"),
    [
        pytest.param(None, False, marks=pytest.mark.slow),
        pytest.param("chain", True, marks=pytest.mark.slow),
        ("best_first:6", False),
    ],
    ids=["plain", "chain", "tree"],
)
def test_answers_differ_from_exact_ones_at_near_ties_alone(rounded, expected, texts, logits, tree, stacked):
    target = rounded if stacked else rounded.unstacked()
    drafter = None if tree is None else oracle_drafter(jnp.asarray(texts), V, N, 0.7)
    shape = None if tree is None else TreeSpec.parse(tree)
    made = generate(target, drafter, PROMPTS, make_sampling(B), max_new=MAX_NEW, tree=shape, chunk=CHUNK)
    if tree is not None:
        assert made.statistics.accepted_at.sum() > B * MAX_NEW / 3  # guesses are at stake
    differing = 0
    for b, (ours, theirs) in enumerate(zip(np.asarray(made.tokens), expected, strict=True)):
        places = np.flatnonzero(ours != theirs)
        if not len(places):
            continue
        differing += 1
        at = places[0]  # what comes after it follows another text
        gap = logits[b, at, theirs[at]] - logits[b, at, ours[at]]
        assert gap < NEAR, (b, at, gap)
    assert differing <= B // 2
