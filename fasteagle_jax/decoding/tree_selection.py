"""Selection of the draft tree: the default, and the fastest by measurement (`tree="auto"`).

A shape's speed is tokens a round and row over seconds a round. The tokens depend on drafter, target and text, the
seconds on the machine and on the number of rows computed; both are measured, at first and in use. The selection cannot
change a token of any answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from fasteagle_jax.decoding.tree import TreeSpec

EMA_DECAY = 0.95  # of the means, per device call
RETRY_ROUNDS = 256  # unused for so many, a shape is measured again if it was close
MIN_RELATIVE_SPEED = 0.8  # from this share of the best speed on
# Seconds of a target's pass by rows, relative to one row: batch 1, float32, by `fasteagle bench --sweep rows`.
PASS_COSTS = {"cpu": {2: 1.17, 4: 1.18, 8: 1.44, 16: 1.87, 32: 3.17}}
MAX_RELATIVE_COST = 1.25  # cost of a default tree's pass, relative to one row, at most


def affordable_nodes(costs: Mapping[int, float]) -> int:
    """The largest number of rows whose pass costs at most MAX_RELATIVE_COST, or the smallest listed."""
    return max((rows for rows, cost in costs.items() if cost <= MAX_RELATIVE_COST), default=min(costs))


# What a target's pass over so many tokens reads, relative to a pass over one: more experts if it is sparse.
Reads = Callable[[int], float]


def dense(num_tokens: int) -> float:
    """The Reads of a dense target."""
    return 1.0


def default_tree(platform: str, reads: Reads = dense) -> TreeSpec:
    """The TreeSpec for a single request, too short for "auto" to measure, on a JAX platform.

    On a platform without listed costs reading the weights bounds a pass: of a dense target the nodes of TreeSpec()
    cost little, of a sparse one they cost the experts that they add.
    """
    costs = PASS_COSTS.get(platform) or dict.fromkeys((2, 4, 8, TreeSpec().nodes), 1.0)
    return TreeSpec("best_first", affordable_nodes({rows: cost * reads(rows) for rows, cost in costs.items()}))


def tree_choices(num_levels: int, reads: Reads = dense, slots: int = 1) -> tuple[TreeSpec | None, ...]:
    """The trees to choose from for a drafter of N levels, from None (plain decoding) to a large one.

    A target whose pass over few tokens costs more than one token's has a smaller one, too. Left out is a tree that
    cannot pay with up to `slots` rows: whose pass reads as much as plain passes for all the tokens it could give.
    """
    sizes = [(4, 3), (8, 4), (16, num_levels)]
    if reads(4) > MAX_RELATIVE_COST:
        sizes.insert(0, (2, 1))
    trees: list[TreeSpec | None] = [None]
    for nodes, levels in sizes:
        levels = min(levels, num_levels)
        # With more rows the others' experts are read anyway, so that `slots` rows are the best case.
        if reads(slots * nodes) < (levels + 1) * reads(slots):
            trees.append(TreeSpec("best_first", nodes=nodes, levels=levels))
    return tuple(dict.fromkeys(trees))


@dataclasses.dataclass
class _Mean:
    """An exponential moving average."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, total: float, weight: float) -> None:
        self.total = EMA_DECAY * self.total + total
        self.weight = EMA_DECAY * self.weight + weight

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else float("nan")


class TreeSelector:
    """Tokens and seconds measured for each shape, and the choice of the fastest."""

    def __init__(self, trees: tuple[TreeSpec | None, ...]) -> None:
        self.trees = trees
        self._tokens = {tree: _Mean() for tree in trees}  # per round and row
        self._seconds: dict[tuple[int, TreeSpec | None], _Mean] = {}  # per round, by number of rows
        self._unused_rounds = dict.fromkeys(trees, 0)

    def record(
        self, rows: int, tree: TreeSpec | None, *, rounds: int, row_rounds: int, tokens: int, seconds: float | None
    ) -> None:
        """Records a device call.

        Args:
          rows: rows computed, with a request or not.
          tree: the shape.
          rounds: of the call.
          row_rounds: the sum of the rounds of all rows with a request.
          tokens: those rows' new tokens.
          seconds: of the call; None if it is not to be counted, since it includes compilation.
        """
        self._tokens[tree].add(tokens, row_rounds)
        if seconds is not None and rounds:
            self._seconds.setdefault((rows, tree), _Mean()).add(seconds, rounds)
        for other in self.trees:
            self._unused_rounds[other] = 0 if other == tree else self._unused_rounds[other] + rounds

    def unmeasured(self, rows: int) -> list[TreeSpec | None]:
        """The shapes not yet measured for this number of rows."""
        return [t for t in self.trees if (rows, t) not in self._seconds or not self._tokens[t].weight]

    def speed(self, rows: int, tree: TreeSpec | None) -> float:
        """Tokens a second and row; nan if not measured."""
        seconds = self._seconds.get((rows, tree), _Mean())
        return self._tokens[tree].value / seconds.value

    def choose(self, rows: int) -> TreeSpec | None:
        """The fastest shape for this number of rows, at times a close one to measure it again; all must be measured."""
        speeds = {tree: self.speed(rows, tree) for tree in self.trees}
        best = max(self.trees, key=lambda tree: speeds[tree])
        for tree in self.trees:
            if self._unused_rounds[tree] >= RETRY_ROUNDS and speeds[tree] >= MIN_RELATIVE_SPEED * speeds[best]:
                return tree
        return best
