"""Decoding with bfloat16 weights and caches says what exact arithmetic says of the same weights, but at near-ties.

The reference is plain greedy decoding in float32 of the weights as bfloat16 has them. Rounding may turn a choice
between two tokens whose logits are all but equal; anything wrong turns others too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import generate
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.drafters.files import load_drafter
from fasteagle_jax.targets.loading import load_target
from tests.tiny_folder import make_drafter, make_target

B, MAX_NEW, CHUNK = 24, 32, 16
NEAR = 0.25  # of logits of some 20, whose roundings to 8 bits through two layers add up to about 0.1

PROMPTS = [np.random.default_rng(b).integers(256, size=3 + b).tolist() for b in range(B)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target whose greedy answers do not end, and a drafter for it."""
    folder = tmp_path_factory.mktemp("bfloat16")
    target = make_target(folder / "target", stop_rate=-9.0)
    return target, make_drafter(folder / "drafter", target)


@pytest.fixture(scope="module")
def exact(folders):
    """The target in float32, its weights rounded to bfloat16."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), load_target(str(folders[0])).model)


@pytest.fixture(scope="module")
def expected(exact) -> np.ndarray:
    """What it says, int32 [B, MAX_NEW]."""
    made = generate(exact, None, PROMPTS, make_sampling(B), max_new=MAX_NEW, chunk=CHUNK)
    return np.asarray(made.tokens)


@pytest.fixture(scope="module")
def logits(exact, expected) -> np.ndarray:
    """Its logits for each token of its answers, float32 [B, MAX_NEW, V]."""
    longest = max(map(len, PROMPTS)) + MAX_NEW
    texts = np.zeros((B, longest), np.int32)
    for text, prompt, answer in zip(texts, PROMPTS, expected, strict=True):
        text[: len(prompt) + MAX_NEW] = [*prompt, *answer]

    @jax.jit
    def of(tokens):
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((longest, longest), bool)), (B, longest, longest))
        return exact.logits(exact(tokens, jnp.broadcast_to(jnp.arange(longest), tokens.shape), causal).hidden)

    whole = np.asarray(of(jnp.asarray(texts)))
    found = np.stack([row[len(p) - 1 : len(p) - 1 + MAX_NEW] for row, p in zip(whole, PROMPTS, strict=True)])
    assert (found.argmax(axis=-1) == expected).mean() > 0.99  # these are its logits
    return found


def test_near_ties_are_few(logits):
    """Else nothing would follow from the test below."""
    first, second = -np.sort(-logits, axis=-1)[..., :2].transpose(2, 0, 1)
    assert (first - second < NEAR).mean() < 0.15


@pytest.mark.parametrize(
    ("tree", "stacked"), [(None, False), ("chain", True), ("best_first:6", False)], ids=["plain", "chain", "tree"]
)
def test_answers_differ_from_exact_ones_at_near_ties_alone(folders, expected, logits, tree, stacked):
    loaded = load_target(str(folders[0]), jnp.bfloat16, stacked=stacked)
    drafter = None
    if tree is not None:
        drafter = load_drafter(folders[1], loaded.checkpoint.config, loaded.fingerprint, jnp.bfloat16, stacked=stacked)
    made = generate(
        loaded.model,
        drafter,
        PROMPTS,
        make_sampling(B),
        max_new=MAX_NEW,
        tree=None if tree is None else TreeSpec.parse(tree),
        chunk=CHUNK,
    )
    if tree is not None:
        assert made.statistics.accepted_at.sum() > 0  # guesses are at stake
    answers, differing = np.asarray(made.tokens), 0
    for b, (ours, theirs) in enumerate(zip(answers, expected, strict=True)):
        places = np.flatnonzero(ours != theirs)
        if not len(places):
            continue
        differing += 1
        at = places[0]  # what comes after it follows another text
        gap = logits[b, at, theirs[at]] - logits[b, at, ours[at]]
        assert gap < NEAR, (b, at, gap)
    assert differing <= B // 3
