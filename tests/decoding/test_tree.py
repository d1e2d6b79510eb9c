"""Draft trees against versions of a few lines of Python, and best-first trees against all trees there are."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.decoding import tree as library
from fasteagle_jax.decoding.tree import NO_PARENT, Draft, TreeSpec
from fasteagle_jax.devices.sharding import MeshShape, make_mesh, top_log_softmax
from fasteagle_jax.errors import UserError

# One program each instead of one an operation.
build = jax.jit(library.build, static_argnums=0)
visible_nodes = jax.jit(library.visible_nodes)
walk = jax.jit(library.walk, static_argnums=2)


def random_draft(seed: int, batch: int, nodes: int, vocab: int) -> Draft:
    """Trees of any shape; siblings hold different tokens."""
    rng = np.random.default_rng(seed)
    tokens, parents, depths = (np.zeros((batch, nodes), np.int32) for _ in range(3))
    for b in range(batch):
        used: dict[int, set[int]] = {i: set() for i in range(nodes)}
        parents[b, 0], tokens[b, 0] = NO_PARENT, rng.integers(vocab)
        for i in range(1, nodes):
            parent = rng.choice([j for j in range(i) if len(used[j]) < vocab])
            tokens[b, i] = rng.choice([t for t in range(vocab) if t not in used[parent]])
            used[parent].add(tokens[b, i])
            parents[b, i], depths[b, i] = parent, depths[b, parent] + 1
    return Draft(*map(jnp.asarray, (tokens, parents, depths)), jnp.zeros((batch, nodes)))


def ancestors(parents: np.ndarray, node: int) -> list[int]:
    """The node and all above it, the root first."""
    path = []
    while node != NO_PARENT:
        path.append(int(node))
        node = parents[node]
    return path[::-1]


def test_levels_that_no_node_can_reach_are_not_asked_for():
    assert [TreeSpec("best_first", nodes=nodes).num_levels(7) for nodes in (2, 4, 8, 16)] == [1, 3, 7, 7]
    assert TreeSpec("best_first", nodes=4, levels=2).num_levels(7) == 2 and TreeSpec("chain").num_levels(7) == 7


@pytest.mark.parametrize("nodes", [1, 2, 9])
def test_a_node_sees_itself_and_its_ancestors_alone(nodes):
    draft = random_draft(nodes, 5, nodes, 4)
    seen = np.asarray(visible_nodes(draft))
    for b, i in np.ndindex(5, nodes):
        assert set(np.flatnonzero(seen[b, i])) == set(ancestors(np.asarray(draft.parents[b]), i))


@pytest.mark.parametrize("seed", range(4))
def test_the_walk_goes_down_while_a_child_holds_the_chosen_token(seed):
    vocab = 3  # few tokens: many walks go deep
    draft = random_draft(seed, 16, 12, vocab)
    chosen = np.random.default_rng(seed).integers(vocab, size=(16, 12))
    num_levels = int(draft.depths.max())
    path = walk(draft, jnp.asarray(chosen), num_levels)
    tokens, parents = np.asarray(draft.tokens), np.asarray(draft.parents)
    for b in range(16):
        expected = [0]
        while True:
            below = [i for i in range(12) if parents[b, i] == expected[-1] and tokens[b, i] == chosen[b, expected[-1]]]
            if not below:
                break
            expected.append(below[0])
        assert int(path.accepted[b]) == len(expected) - 1
        expected += expected[-1:] * (num_levels + 1 - len(expected))  # the last node is repeated
        assert path.nodes[b].tolist() == expected
    assert len(set(np.asarray(path.accepted).tolist())) > 1


def random_logits(seed: int, batch: int, levels: int, vocab: int, step: float = 0.0) -> np.ndarray:
    """Logits; with a step, rounded to multiples of it: ties everywhere, and between nodes and their only child."""
    rng = np.random.default_rng(seed)
    logits = (2 * rng.standard_normal((batch, levels, vocab))).astype(np.float32)
    if not step:
        return logits
    logits = np.round(logits / step).astype(np.float32) * np.float32(step)
    logits[..., 0] += 500 * (rng.random((batch, levels)) < 0.3)  # its probability is 1
    return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The log-probabilities [..., V] as a tree scores its nodes by them."""
    values, index = jax.jit(top_log_softmax, static_argnums=1)(jnp.asarray(logits), logits.shape[-1])
    np.testing.assert_allclose(values, np.sort(jax.nn.log_softmax(logits))[..., ::-1], rtol=1e-5, atol=1e-6)
    scores = np.empty_like(logits)
    np.put_along_axis(scores, np.asarray(index), np.asarray(values), axis=-1)
    assert (scores <= 0).all()
    return scores


def all_nodes(scores: np.ndarray) -> dict[tuple[int, ...], float]:
    """Every path of tokens of one row's scores [N, V], with its score summed from the root down."""
    found = {}
    for depth in range(1, len(scores) + 1):
        for path in itertools.product(range(scores.shape[1]), repeat=depth):
            total = np.float32(0)
            for level, token in enumerate(path):
                total = np.float32(total + scores[level, token])
            found[path] = total
    return found


def paths(draft: Draft, b: int) -> list[tuple[int, ...]]:
    """Each guess as the path of tokens that leads to it from the root's children on."""
    parents, tokens = np.asarray(draft.parents[b]), np.asarray(draft.tokens[b])
    return [tuple(tokens[ancestors(parents, i)[1:]].tolist()) for i in range(1, len(tokens))]


SIZES = [(2, 1, 5), (8, 3, 5), (12, 4, 4), (16, 2, 6), (30, 3, 3)]  # nodes, levels, vocabulary


@pytest.mark.parametrize(("nodes", "levels", "vocab"), SIZES)
def test_best_first_takes_the_most_probable_of_all_nodes_there_are(nodes, levels, vocab):
    logits = random_logits(0, 4, levels, vocab)
    draft = build(TreeSpec("best_first", nodes), jnp.arange(4), jnp.asarray(logits))
    scores = log_softmax(logits)
    for b in range(4):
        ranked = sorted((score, path) for path, score in all_nodes(scores[b]).items())[::-1]
        assert sorted(paths(draft, b)) == sorted(path for _, path in ranked[: nodes - 1])


@pytest.mark.parametrize(("nodes", "levels", "vocab"), SIZES)
@pytest.mark.parametrize("step", [0.5, 2.0])
def test_best_first_takes_a_best_set_closed_under_parents_also_where_scores_tie(nodes, levels, vocab, step):
    logits = random_logits(1, 4, levels, vocab, step)
    draft = build(TreeSpec("best_first", nodes), jnp.arange(4), jnp.asarray(logits))
    scores = log_softmax(logits)
    parents, depths = np.asarray(draft.parents), np.asarray(draft.depths)
    for b in range(4):
        every = all_nodes(scores[b])
        chosen = paths(draft, b)
        assert len(set(chosen)) == len(chosen) == nodes - 1
        best = sorted(every.values())[::-1][: nodes - 1]
        np.testing.assert_array_equal(sorted(every[path] for path in chosen)[::-1], best)
        # `paths` climbs through parents, so closure is: parents come first and are one level up.
        for i in range(1, nodes):
            assert 0 <= parents[b, i] < i and depths[b, i] == depths[b, parents[b, i]] + 1 == len(chosen[i - 1])


@pytest.mark.parametrize(("nodes", "levels", "vocab"), [(2, 1, 5), (4, 2, 6), (8, 3, 5), (11, 4, 4)])
def test_a_tree_grown_from_guesses_of_each_path_is_the_best_there_is(nodes, levels, vocab):
    """A path is known by a number: that of its parent times the vocabulary, plus its token and one."""
    num_paths = sum(vocab**depth for depth in range(levels))
    logits = np.concatenate([random_logits(3, 2, num_paths, vocab, step) for step in (0, 0.5)])  # [B, paths, V]
    scores = log_softmax(logits)
    rows = np.arange(4)[:, None]

    @jax.jit
    def grown():
        return library.grow(
            TreeSpec("best_first", nodes),
            jnp.arange(4),
            jnp.arange(vocab),
            levels,
            jnp.zeros((4, 1), jnp.int32),
            lambda path, depth: jnp.asarray(logits)[rows, path],
            lambda path, parent, index, depth: jnp.take_along_axis(path, parent, axis=1) * vocab + index + 1,
        )

    draft = grown()
    parents, depths = np.asarray(draft.parents), np.asarray(draft.depths)
    for b in range(4):
        every = {}
        for depth in range(1, levels + 1):
            for path in itertools.product(range(vocab), repeat=depth):
                number, total = 0, np.float32(0)
                for token in path:
                    total, number = np.float32(total + scores[b, number, token]), number * vocab + token + 1
                every[path] = total
        chosen = paths(draft, b)
        assert len(set(chosen)) == len(chosen) == nodes - 1
        best = sorted(every.values())[::-1][: nodes - 1]
        np.testing.assert_array_equal(sorted(every[path] for path in chosen)[::-1], best)
        assert all(depths[b, i] == depths[b, parents[b, i]] + 1 and parents[b, i] < i for i in range(1, nodes))


def test_best_first_is_the_whole_tree_where_more_nodes_are_asked_for_than_there_are():
    logits = random_logits(2, 2, 2, 3)
    draft = build(TreeSpec("best_first", 50), jnp.arange(2), jnp.asarray(logits))
    for b in range(2):
        assert sorted(paths(draft, b)) == sorted(all_nodes(logits[b]))


@pytest.mark.parametrize("width", [1, 3, 9])
def test_backbone_gives_the_best_tokens_of_a_level_to_the_best_node_of_the_level_above(width):
    logits = random_logits(3, 4, 3, 6)
    k = min(width, 6)  # no wider than the vocabulary
    draft = build(TreeSpec("backbone", width=width), jnp.arange(4), jnp.asarray(logits))
    for b in range(4):
        ranked = np.argsort(-logits[b], axis=-1)[:, :k]
        backbone: tuple[int, ...] = ()
        expected = []
        for level in range(3):
            expected += [(*backbone, int(token)) for token in ranked[level]]
            backbone += (int(ranked[level, 0]),)
        assert paths(draft, b) == expected
        assert draft.depths[b].tolist() == [0, *np.repeat([1, 2, 3], k)]


def test_a_chain_is_the_best_token_of_each_level_below_the_other():
    logits = random_logits(4, 3, 5, 7)
    draft = build(TreeSpec("chain"), jnp.array([6, 5, 4]), jnp.asarray(logits))
    np.testing.assert_array_equal(draft.tokens, np.c_[[6, 5, 4], logits.argmax(axis=-1)])
    np.testing.assert_array_equal(draft.parents, np.tile(np.arange(-1, 5), (3, 1)))
    np.testing.assert_array_equal(draft.depths, np.tile(np.arange(6), (3, 1)))


@pytest.mark.parametrize("tree", ["chain", "backbone:2", "best_first:6"])
def test_guesses_of_a_reduced_draft_vocabulary_are_the_targets_ids(tree):
    logits, ids = jnp.asarray(random_logits(5, 2, 3, 4)), jnp.array([3, 11, 12, 40])
    plain = build(TreeSpec.parse(tree), jnp.array([7, 8]), logits)
    mapped = build(TreeSpec.parse(tree), jnp.array([7, 8]), logits, ids)
    np.testing.assert_array_equal(mapped.tokens[:, 1:], ids[plain.tokens[:, 1:]])
    np.testing.assert_array_equal(mapped.tokens[:, 0], [7, 8])
    np.testing.assert_array_equal(mapped.parents, plain.parents)


@pytest.mark.parametrize("kind", ["chain", "backbone", "best_first"])
def test_levels_cut_the_tree_to_the_first_levels(kind):
    logits = jnp.asarray(random_logits(6, 2, 4, 5))
    cut = build(TreeSpec(kind, nodes=7, levels=2), jnp.arange(2), logits)
    jax.tree.map(np.testing.assert_array_equal, cut, build(TreeSpec(kind, nodes=7), jnp.arange(2), logits[:, :2]))


@pytest.mark.parametrize("text", ["chain", "backbone:3", "best_first:12", "chain:2", "best_first:12:5"])
def test_a_trees_text_reads_back_as_the_tree(text):
    assert str(TreeSpec.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("bush", "use one of chain"),
        ("chain:3:4", "write chain"),
        ("backbone:x", "write chain"),
        ("best_first:1", "at least 2"),
        ("backbone:0", "at least 1"),
    ],
)
def test_a_tree_that_cannot_be_says_what_to_write(text, remedy):
    with pytest.raises(UserError, match=remedy):
        TreeSpec.parse(text)


@pytest.mark.parametrize("kind", ["backbone:4", "best_first:12"])
def test_a_vocabulary_split_over_devices_gives_the_same_tree_ties_included(kind: str) -> None:
    logits = jnp.asarray(np.random.default_rng(0).integers(-9, 0, (3, 4, 240)), jnp.float32)
    root, tree = jnp.arange(3), TreeSpec.parse(kind)
    whole = build(tree, root, logits)
    mesh = make_mesh(MeshShape(1, 2, 4))
    with jax.set_mesh(mesh):
        split = jax.device_put(logits, jax.NamedSharding(mesh, jax.P(None, None, "tensor")))
        compiled = build.lower(tree, root, split).compile()
        for a, b in zip(whole, compiled(root, split), strict=True):
            assert (a == b).all()
    assert "f32[3,4,240]" not in compiled.as_text()  # no device holds all logits
