"""Draft trees: the guesses that the target verifies in one pass.

B rows · M nodes, root included · N levels · V draft vocabulary · C candidates · f nodes of a level that are expanded ·
k children of each.
Node 0 is the root, the pending token, at depth 0; a node of depth d guesses the token d positions after it. A tree is
plain arrays, parents before children; verification knows only these, not which builder they are from.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fasteagle_jax.devices.sharding import top_k, top_log_softmax
from fasteagle_jax.errors import UserError

NO_PARENT = -1
BEFORE_TEXT = -2  # stands before the first position: no token has this id, nor does a slot without one
KINDS = ("chain", "backbone", "best_first")
MAX_CANDIDATES = 10  # limit of f and of k, as in EAGLE-3
MAX_LOOKUP = 8  # limit of a lookup's suffix
LOOKUP = "+lookup:"  # between the name of a tree and the tokens of its lookup
_SIZES = {"chain": ("levels",), "backbone": ("width", "levels"), "best_first": ("nodes", "levels")}  # as written


class Draft(NamedTuple):
    """One tree of guesses for each row."""

    tokens: jax.Array  # int32 [B, M]
    parents: jax.Array  # int32 [B, M], NO_PARENT for the root
    depths: jax.Array  # int32 [B, M]
    scores: jax.Array  # float32 [B, M], log-probabilities of the paths to the nodes, 0 of the root


@dataclasses.dataclass(frozen=True)
class TreeSpec:
    """The shape of tree to draft; static, so each gets its own compiled program.

    `chain`: the best token of each level. `backbone` (FastEagle): the `width` best tokens of each level, all children
    of the best node one level up. `best_first`: the `nodes` - 1 most probable nodes (cf. DDTree, arXiv 2604.12989).
    `levels` limits a tree to the drafter's first levels. With `lookup` as many nodes are shared with what is copied
    from the row's own text after suffixes of up to so many tokens (see lookup.py).
    """

    kind: str = "best_first"
    nodes: int = 16  # M of best_first, root included
    width: int = 4  # k of backbone
    levels: int | None = None
    lookup: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"tree {self.kind!r} is not known: use one of {', '.join(KINDS)}")
        for name, least in (("nodes", 2), ("width", 1), ("levels", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"tree {name} is {value}: it must be at least {least}")
        check_lookup(self.lookup)

    @classmethod
    def parse(cls, text: str) -> TreeSpec:
        """The TreeSpec named `chain`, `backbone:4` (width) or `best_first:16` (nodes).

        Its levels are appended as `:3`, then a lookup as `+lookup:4`.
        """
        shape, has_lookup, lookup = text.partition(LOOKUP)
        kind, *sizes = shape.split(":")
        names = _SIZES.get(kind, ())
        numbers = [*sizes, lookup] if has_lookup else sizes
        if kind in KINDS and (len(sizes) > len(names) or not all(number.isdigit() for number in numbers)):
            raise UserError(
                f"tree {text!r} is not understood: write chain, backbone:WIDTH or best_first:NODES, "
                f"and :LEVELS behind it for the first levels alone, {LOOKUP}TOKENS for a lookup"
            )
        given = dict(zip(names, map(int, sizes), strict=False))
        return cls(kind, **given, lookup=int(lookup) if has_lookup else None)

    def __str__(self) -> str:
        sizes = (getattr(self, name) for name in _SIZES[self.kind])
        shape = ":".join([self.kind, *(str(size) for size in sizes if size is not None)])
        return shape if self.lookup is None else f"{shape}{LOOKUP}{self.lookup}"

    def num_levels(self, drafter_levels: int) -> int:
        """N of the tree: the drafter's levels, at most `levels` and the depth that so many nodes can reach."""
        deepest = self.nodes - 1 if self.kind == "best_first" else drafter_levels
        return min(self.levels or drafter_levels, drafter_levels, deepest)

    def num_nodes(self, drafter_levels: int) -> int:
        """M, for a best-first tree of few levels an upper bound."""
        levels = self.num_levels(drafter_levels)
        return {"chain": levels + 1, "backbone": levels * self.width + 1, "best_first": self.nodes}[self.kind]


def check_lookup(lookup: int | None) -> None:
    """Raises UserError for a number of tokens that no lookup has."""
    if lookup is not None and (not isinstance(lookup, int) or not 1 <= lookup <= MAX_LOOKUP):
        raise UserError(f"lookup is {lookup!r}: give 1 to {MAX_LOOKUP} tokens, or None for no lookup")


def build(tree: TreeSpec, root: jax.Array, logits: jax.Array, token_ids: jax.Array | None = None) -> Draft:
    """The Draft of the shape `tree` from N levels of guesses.

    Args:
      tree: the shape.
      root: int32 [B], the pending token.
      logits: float32 [B, N, V] of each level.
      token_ids: int32 [V], the target's id of each entry of a reduced draft vocabulary; None if they are equal.
    """
    num_levels = tree.num_levels(logits.shape[1])
    logits = logits[:, :num_levels]
    if tree.kind == "best_first":
        return _best_first(tree.nodes, root, logits, token_ids)
    return _backbone(1 if tree.kind == "chain" else tree.width, root, logits, token_ids)


def _top_tokens(logits: jax.Array, k: int, token_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities float32 and target ids int32 [B, N, k] of the k best tokens of each level, best first."""
    # Without the barrier XLA's CPU compiler may move a slice of the values to before top_k, which it then does not
    # recognise: it sorts the whole vocabulary.
    values, index = jax.lax.optimization_barrier(top_log_softmax(logits, k, "vocab"))
    return values, (index if token_ids is None else token_ids[index]).astype(jnp.int32)


def _backbone(width: int, root: jax.Array, logits: jax.Array, token_ids: jax.Array | None) -> Draft:
    batch, num_levels, vocab = logits.shape
    width = min(width, vocab)
    values, guesses = _top_tokens(logits, width, token_ids)  # [B, N, k]
    tokens = jnp.concatenate([root[:, None], guesses.reshape(batch, -1)], axis=1)
    # The nodes of level d are 1 + (d - 1) k ... d k; their parent is the first (best) node of level d - 1.
    levels = np.arange(num_levels).repeat(width)
    parents = np.concatenate([[NO_PARENT], np.where(levels == 0, 0, 1 + (levels - 1) * width)])
    depths = np.concatenate([[0], levels + 1])
    best = values[..., 0]
    of_nodes = (jnp.cumsum(best, axis=1) - best)[..., None] + values  # [B, N, k]
    return Draft(
        tokens,
        jnp.broadcast_to(jnp.asarray(parents, jnp.int32), tokens.shape),
        jnp.broadcast_to(jnp.asarray(depths, jnp.int32), tokens.shape),
        jnp.pad(of_nodes.reshape(batch, -1), ((0, 0), (1, 0))),
    )


class _Candidates(NamedTuple):
    """The C nodes that can be among the best `budget`, parents before children."""

    parent: np.ndarray  # [C], index of the parent candidate, NO_PARENT for children of the root
    level: np.ndarray  # [C], 0-based
    rank: np.ndarray  # [C], the node's token is the rank-th best of its level, 0-based


@functools.cache
def _candidates(budget: int, num_levels: int, vocab: int) -> _Candidates:
    """The static candidates of a best-first tree with `budget` nodes besides the root.

    Levels are independent given the context, so a node is a tuple of 1-based ranks (r1, ..., rd), and every tuple that
    is no longer and larger nowhere is at least as probable: r1 + r1 r2 + ... + r1...rd nodes, itself included. A node
    for which that exceeds the budget never needs to be chosen.
    """
    found: list[tuple[int, int, int]] = []  # parent, level, rank
    frontier = [(NO_PARENT, 1, 0)]  # candidate index, product of its ranks, nodes at least as probable
    for level in range(num_levels):
        next_frontier = []
        for parent, product, better in frontier:
            for rank in range(1, min(budget, vocab) + 1):
                total = better + product * rank
                if total > budget:
                    break
                next_frontier.append((len(found), product * rank, total))
                found.append((parent, level, rank - 1))
        frontier = next_frontier
    parent, level_of, rank_of = np.asarray(found, np.int32).T
    return _Candidates(parent, level_of, rank_of)


def _best_first(nodes: int, root: jax.Array, logits: jax.Array, token_ids: jax.Array | None) -> Draft:
    batch, num_levels, vocab = logits.shape
    table = _candidates(nodes - 1, num_levels, vocab)
    budget = min(nodes - 1, len(table.parent))
    values, guesses = _top_tokens(logits, int(table.rank.max()) + 1, token_ids)  # [B, N, ranks]

    # A child scores its parent's score plus at most 0, and top_k gives ties to the parent, which comes first: with each
    # node its parent is chosen.
    total = values[:, 0, table.rank[table.level == 0]]  # [B, C of level 0]
    for level in range(1, int(table.level.max()) + 1):
        of_level = table.level == level
        own = values[:, level, table.rank[of_level]]
        total = jnp.concatenate([total, total[:, table.parent[of_level]] + own], axis=1)
    _, picked = top_k(total, budget)  # [B, M-1], best first
    picked = jnp.sort(picked, axis=-1)  # by candidate index: parents before children

    levels = jnp.asarray(table.level)[picked]
    flat = levels * guesses.shape[2] + jnp.asarray(table.rank)[picked]
    tokens = jnp.take_along_axis(guesses.reshape(batch, -1), flat, axis=1)
    score = jnp.take_along_axis(total, picked, axis=1)
    return draft_of(root, picked, jnp.asarray(table.parent)[picked], tokens, levels + 1, score)


def draft_of(
    root: jax.Array, picked: jax.Array, parent: jax.Array, tokens: jax.Array, depths: jax.Array, scores: jax.Array
) -> Draft:
    """The Draft of the root and the picked candidates [B, M-1], parents before children.

    `picked` are their indices, ascending, `parent` those of their parents, NO_PARENT for children of the root.
    """
    is_parent = parent[:, :, None] == picked[:, None, :]  # [B, child, node]
    parents = jnp.where(parent == NO_PARENT, 0, 1 + jnp.argmax(is_parent, axis=-1))
    zero = jnp.zeros((root.shape[0], 1), jnp.int32)
    return Draft(
        jnp.concatenate([root[:, None], tokens], axis=1),
        jnp.concatenate([zero + NO_PARENT, parents.astype(jnp.int32)], axis=1),
        jnp.concatenate([zero, depths], axis=1),
        jnp.pad(scores, ((0, 0), (1, 0))),
    )


# --- trees grown level by level, of guesses that depend on their path -------------------------------------------


class _Scored(NamedTuple):
    """The candidates of a level."""

    tokens: jax.Array  # int32 [B, C]
    parents: jax.Array  # int32 [B, C], indices among all scored nodes, 0 for the root
    score: jax.Array  # float32 [B, C], log-probabilities of the paths
    depth: int


def grow(
    tree: TreeSpec,
    root: jax.Array,
    token_ids: jax.Array,
    num_levels: int,
    state: Any,
    guess: Callable[[Any, int], jax.Array],
    follow: Callable[[Any, jax.Array, jax.Array, int], Any],
) -> Draft:
    """The Draft of the shape `tree` from guesses that depend on the path to them.

    `best_first` is EAGLE-2's dynamic tree (arXiv 2406.16858, section 4): the best nodes of each level are expanded, and
    the most probable of all scored nodes are kept; this is the best tree of up to MAX_CANDIDATES + 1 nodes. `backbone`
    and `chain` expand the best node of each level alone, and keep all that they score.

    Args:
      tree: the shape.
      root: int32 [B], the pending token.
      token_ids: int32 [V], the target's ids.
      num_levels: N, the depth.
      state: the drafter's state at the root, of [B, 1] nodes.
      guess: (state, depth) -> logits float32 [B, f, V] of the tokens at `depth` below each of the state's f nodes.
      follow: (state, parent, index, depth) -> the state at f' nodes of that depth, given by int32 [B, f'] each: the
        index of the parent among the state's nodes, and that of the token in `token_ids`.
    """
    batch = root.shape[0]
    above = jnp.zeros((batch, 1))  # float32 [B, f], the scores of the expanded nodes
    indices = jnp.zeros((batch, 1), jnp.int32)  # [B, f], theirs among all scored nodes
    scored: list[_Scored] = []
    num_scored = 1  # the root is node 0
    for depth in range(1, num_levels + 1):
        expanded, children = _growth(tree, depth, len(token_ids))
        values, index = top_log_softmax(guess(state, depth), children, "vocab")  # [B, f, k]
        score = (above[..., None] + values).reshape(batch, -1)  # [B, f*k]
        index = index.reshape(batch, -1)
        tokens = token_ids[index].astype(jnp.int32)
        scored.append(_Scored(tokens, jnp.repeat(indices, children, axis=1), score, depth))
        if depth == num_levels:
            break
        above, best = top_k(score, min(expanded, score.shape[1]))
        state = follow(state, best // children, jnp.take_along_axis(index, best, axis=1), depth)
        indices = num_scored + best
        num_scored += score.shape[1]
    return _best_scored(root, scored, tree.num_nodes(num_levels))


def _growth(tree: TreeSpec, depth: int, vocab: int) -> tuple[int, int]:
    """How many nodes of a depth are expanded, and how many children each expanded node one level up has there.

    The r-th best node of depth d, or of its parent's children, is kept only after r - 1 others and d - 1 ancestors,
    which are no worse; a node is worth expanding only if there is room for a child besides.
    """
    if tree.kind == "best_first":
        room = tree.nodes - depth
        return min(MAX_CANDIDATES, room - 1), min(MAX_CANDIDATES, room, vocab)
    return 1, min(1 if tree.kind == "chain" else tree.width, vocab)


def _best_scored(root: jax.Array, scored: Sequence[_Scored], num_nodes: int) -> Draft:
    """The Draft of the `num_nodes` - 1 best scored nodes; all their parents are among them.

    A child scores no more than its parent and comes after it, and top_k takes the first of equals.
    """
    tokens = jnp.concatenate([s.tokens for s in scored], axis=1)  # [B, all]
    parents = jnp.concatenate([s.parents for s in scored], axis=1)
    depths = jnp.concatenate([jnp.full(s.tokens.shape, s.depth, jnp.int32) for s in scored], axis=1)
    score = jnp.concatenate([s.score for s in scored], axis=1)
    _, picked = top_k(score, min(num_nodes - 1, score.shape[1]))
    picked = jnp.sort(picked, axis=1)  # [B, M-1], parents before children
    parts = (parents - 1, tokens, depths, score)  # the root has index 0
    of_picked = (jnp.take_along_axis(x, picked, axis=1) for x in parts)
    return draft_of(root, picked, *of_picked)


# --- verification -----------------------------------------------------------------------------------------------


def visible_nodes(draft: Draft) -> jax.Array:
    """The mask bool [B, M, M], True where node i may see node j: itself and its ancestors.

    A root with children 1 and 2, and 3 below 1:    . 0 1 2 3
                                                    0 x
                                                    1 x x
                                                    2 x   x
                                                    3 x x   x
    """
    num_nodes = draft.parents.shape[1]
    nodes = jnp.arange(num_nodes)
    seen = jnp.broadcast_to(nodes[:, None] == nodes, (*draft.parents.shape, num_nodes))

    def climb(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        seen, at = state  # int32 [B, M], the ancestor that each node has climbed to, or NO_PARENT
        seen = seen | (at[:, :, None] == nodes)
        above = jnp.take_along_axis(draft.parents, jnp.maximum(at, 0), axis=1)
        return seen, jnp.where(at == NO_PARENT, NO_PARENT, above)

    return jax.lax.fori_loop(0, draft.depths.max(), climb, (seen, draft.parents))[0]


def path_ends(draft: Draft, text: jax.Array, length: jax.Array, num_tokens: int) -> jax.Array:
    """The last tokens int32 [B, M, num_tokens] of a row's text with the path to each node, the node's own first.

    `text` is int32 [B, S] by position, and `length` int32 [B] the root's position. BEFORE_TEXT stands before a text.
    """
    batch, num_nodes = draft.tokens.shape
    at = jnp.broadcast_to(jnp.arange(num_nodes), (batch, num_nodes))
    ends = []
    for back in range(num_tokens):
        position = length[:, None] + draft.depths - back
        of_text = jnp.take_along_axis(text, jnp.maximum(position, 0), axis=1)
        of_text = jnp.where(position < 0, BEFORE_TEXT, of_text)
        of_path = jnp.take_along_axis(draft.tokens, at, axis=1)
        ends.append(jnp.where(back <= draft.depths, of_path, of_text))
        at = jnp.maximum(jnp.take_along_axis(draft.parents, at, axis=1), 0)
    return jnp.stack(ends, axis=-1)


class Walk(NamedTuple):
    """The accepted path of each row."""

    nodes: jax.Array  # int32 [B, N+1], from the root down; the last accepted node repeats past `accepted`
    accepted: jax.Array  # int32 [B], accepted guesses, so accepted + 1 nodes are on the path


def walk(draft: Draft, chosen: jax.Array, num_levels: int) -> Walk:
    """The Walk from the root down, while a child holds the token int32 [B, M] that the target chose at its parent."""
    agrees = draft.tokens[:, None, :] == chosen[:, :, None]  # [B, node, child]
    follows = agrees & (draft.parents[:, None, :] == jnp.arange(draft.tokens.shape[1])[:, None])
    step = jnp.where(follows.any(axis=-1), jnp.argmax(follows, axis=-1), NO_PARENT)  # [B, M]
    at = jnp.zeros(draft.tokens.shape[0], jnp.int32)
    accepted = jnp.zeros_like(at)
    nodes = [at]
    for depth in range(1, num_levels + 1):
        below = jnp.take_along_axis(step, at[:, None], axis=1)[:, 0]
        accepted = accepted + ((below != NO_PARENT) & (accepted == depth - 1))
        at = jnp.where(below == NO_PARENT, at, below).astype(jnp.int32)
        nodes.append(at)
    return Walk(jnp.stack(nodes, axis=1), accepted)
