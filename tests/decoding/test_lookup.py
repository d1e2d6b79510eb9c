"""Lookup finds what stood before, mixes it with the drafter's guesses, and keeps the tree's budget."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.decoding.lookup import RATES, with_lookup
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import generate
from fasteagle_jax.decoding.tree import MAX_LOOKUP, Draft, TreeSpec, build
from fasteagle_jax.drafters.text_only import TextOnly
from fasteagle_jax.errors import UserError
from tests.tiny_models import tiny_target

B, S, V = 24, 48, 4

looked_up = jax.jit(with_lookup, static_argnums=(3, 4))


def random_rows(nodes: int, levels: int) -> tuple[Draft, np.ndarray, np.ndarray]:
    """Drafts below the last token of texts of few tokens, in which much is repeated; the first row's is one token."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([[0], rng.integers(1, S - 1, B - 1)]).astype(np.int32)
    text = np.where(np.arange(S) <= lengths[:, None], rng.integers(V, size=(B, S)), -1).astype(np.int32)
    logits = rng.normal(scale=2, size=(B, levels, V)).astype(np.float32)
    root = jnp.asarray(text[np.arange(B), lengths])
    draft = jax.jit(build, static_argnums=0)(TreeSpec("best_first", nodes), root, jax.nn.log_softmax(logits))
    return draft, text, lengths


def paths(draft: Draft, b: int) -> list[tuple[int, ...]]:
    """Each node's tokens from the root's child on."""
    tokens, parents = np.asarray(draft.tokens[b]).tolist(), np.asarray(draft.parents[b]).tolist()
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        found.append((*found[parent], token))
    return found


def match(known: list[int], end: int, longest: int) -> tuple[int, int]:
    """The longest suffix of `known`, up to `longest` tokens, that ends before `end` too, and where it last does."""
    best = (0, 0)
    for position in range(end):
        size = 0
        while size < min(longest, position + 1) and known[position - size] == known[len(known) - 1 - size]:
            size += 1
        best = max(best, (size, position))
    return best


def slowly(draft: Draft, b: int, text: list[int], levels: int, longest: int) -> dict[tuple[int, ...], float]:
    """The probability of every path of the drafter's or of lookup's."""
    known, found = paths(draft, b), {(): 1.0}
    given = dict(zip(known, np.exp(np.asarray(draft.scores[b], np.float64)).tolist(), strict=True))
    for path in known:
        size, at = match(text + list(path), len(text) - 1, longest)
        copy = text + list(path)
        for i in range(levels * (size > 0)):
            copy.append(copy[at + 1 + i])
        copy = copy[len(text) + len(path) :]
        for child in known:
            if len(child) == len(path) + 1 and child[:-1] == path:
                own = given[child] / given[path]
                is_copy = size > 0 and child[-1] == copy[0]
                found[child] = found[path] * ((1 - RATES[size]) * own + RATES[size] * is_copy)
        if size and (*path, copy[0]) not in given:
            for i in range(levels - len(path)):
                above = (*path, *copy[:i])
                found[*above, copy[i]] = found[above] * RATES[min(size + i, longest)]
    return found


@pytest.mark.parametrize(("nodes", "levels", "longest"), [(8, 3, 4), (12, 5, 2), (16, 4, 1)])
def test_the_most_probable_nodes_of_the_drafters_and_the_copied_ones_are_kept(nodes, levels, longest):
    draft, text, lengths = random_rows(nodes, levels)
    made = looked_up(draft, jnp.asarray(text), jnp.asarray(lengths), levels, longest)
    new = 0
    for b in range(B):
        every = slowly(draft, b, text[b, : lengths[b] + 1].tolist(), levels, longest)
        chosen = paths(made, b)
        assert len(set(chosen)) == nodes  # which all have their parents
        best = sorted(every.values())[::-1][:nodes]
        np.testing.assert_allclose([every[path] for path in chosen], np.exp(made.scores[b]), rtol=1e-5)
        np.testing.assert_allclose(sorted(every[path] for path in chosen)[::-1], best, rtol=1e-5)
        assert np.asarray(made.depths[b]).tolist() == [len(path) for path in chosen]
        new += len(set(chosen) - set(paths(draft, b)))
    assert new > B / 2  # lookup had its say


def test_a_row_in_which_nothing_stood_before_keeps_its_tree():
    draft, _, lengths = random_rows(8, 3)
    text = jnp.where(jnp.arange(S) <= lengths[:, None], V + jnp.arange(S), -1)
    text = text.at[jnp.arange(B), lengths].set(draft.tokens[:, 0])
    made = looked_up(draft, text, jnp.asarray(lengths), 3, 4)
    for name in ("tokens", "parents", "depths"):
        np.testing.assert_array_equal(getattr(made, name), getattr(draft, name))
    np.testing.assert_allclose(made.scores, draft.scores, rtol=1e-5)


def test_a_loop_is_copied_beyond_the_end_of_the_text():
    """Of `1 2 1 2 1` the copy of `2 1` reaches the end after one token."""
    text = jnp.asarray([[1, 2, 1, 2, 1, -1, -1, -1]])
    draft = build(TreeSpec("best_first", 5), jnp.asarray([1]), jnp.full((1, 4, 9), -math.log(9)))
    made = looked_up(draft, text, jnp.asarray([4]), 4, 4)
    assert max(paths(made, 0), key=len) == (2, 1, 2, 1)


@pytest.fixture(scope="module")
def target():
    return tiny_target(num_layers=1)


def test_without_a_drafter_what_repeats_is_accepted_and_the_rest_stays_the_targets(target):
    """A random target's greedy text falls into loops; sampled text is as without lookup, too."""
    prompts = [[1, 2, 3, 4] * 4, [5], list(range(9)), [7] * 12]
    sampling = make_sampling(4, temperature=[0.0, 0.0, 0.0, 0.7], seed=[0, 1, 2, 3])
    sizes = dict(max_new=40, chunk=16, tree=TreeSpec("best_first", 6))
    plain = generate(target, None, prompts, sampling, **sizes)
    copied = generate(target, TextOnly(4), prompts, sampling, lookup=4, **sizes)
    np.testing.assert_array_equal(copied.tokens, plain.tokens)
    assert copied.statistics.rounds[:3].max() <= 20 and copied.statistics.accepted_at[:, 3].sum() > 5  # of 39 rounds


@pytest.mark.parametrize("text", ["best_first:8+lookup:4", "chain+lookup:1", "backbone:3:2+lookup:8"])
def test_a_trees_name_holds_its_lookup(text):
    assert str(TreeSpec.parse(text)) == text and TreeSpec.parse(text).lookup == int(text[-1])
    assert len(RATES) == MAX_LOOKUP + 1
    for wrong in (text + "x", text[:-1]):
        with pytest.raises(UserError, match="is not understood: write chain"):
            TreeSpec.parse(wrong)


@pytest.mark.parametrize("lookup", [0, 9, 2.5, -1])
def test_a_lookup_out_of_range_is_an_error_of_one_line(target, lookup):
    with pytest.raises(UserError, match=f"lookup is {lookup}: give 1 to 8 tokens") as error:
        generate(target, TextOnly(), [[1]], make_sampling(1), lookup=lookup)
    assert "\n" not in str(error.value)
