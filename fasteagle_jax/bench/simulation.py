"""Random targets and drafters, decoded: `fasteagle simulate` compares what theory predicts with what happens.

V vocabulary · N levels · M nodes. Targets are Markov chains of random laws, drafters these with an error; both are
drawn from a seed, and so is the noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from fasteagle_jax.bench import theory
from fasteagle_jax.errors import UserError

Z = 2.576  # of the rows' intervals, 99%
Z_95 = 1.96


@dataclasses.dataclass(frozen=True)
class World:
    """A target and two drafters for it: one knows the path to a guess, the other the root alone."""

    target: np.ndarray  # [V, V], the law of the next token after each
    drafter: np.ndarray  # [V, V]

    def law(self, root: int) -> theory.Law:
        """The target's, of paths from a root."""
        return lambda path: self.target[path[-1] if path else root]

    def scores(self, root: int, *, knows_path: bool) -> theory.Law:
        """The drafter's; without the path, of a level the law of the token so far from the root."""
        if knows_path:
            return lambda path: self.drafter[path[-1] if path else root]
        powers = {0: self.drafter[root]}

        def of_level(path: tuple[int, ...]) -> np.ndarray:
            for depth in range(len(powers), len(path) + 1):
                powers[depth] = powers[depth - 1] @ self.drafter
            return powers[len(path)]

        return of_level


def random_world(
    rng: np.random.Generator, vocab: int, concentration: float, error: float, temperature: float = 1.0
) -> World:
    """Rows of a Dirichlet law of a concentration; the drafter's are mixed with `error` of other ones of the same law.

    At a temperature the target's rows are p^(1 / temperature), normalised, and so are the drafter's.
    """
    for name, value in (("concentration", concentration), ("temperature", temperature)):
        if not value > 0:
            raise UserError(f"{name} is {value}: it must be above 0")
    theory.check_rates([error])
    if vocab < 2:
        raise UserError(f"a vocabulary of {vocab}: give at least 2 tokens")
    alpha = np.full(vocab, concentration)
    target, other = rng.dirichlet(alpha, vocab), rng.dirichlet(alpha, vocab)
    tempered = [np.power(np.maximum(p, 1e-12), 1 / temperature) for p in (target, (1 - error) * target + error * other)]
    return World(*(p / p.sum(axis=1, keepdims=True) for p in tempered))


@dataclasses.dataclass(frozen=True)
class Row:
    """A prediction and what was simulated, with the half width of its 99% interval."""

    name: str
    predicted: float
    simulated: float
    half_width: float
    relation: str = "="  # "<=": at most the predicted, ">=": at least

    @property
    def agrees(self) -> bool:
        """Whether the interval allows what is predicted."""
        gap = self.simulated - self.predicted
        if self.relation == "=":
            return abs(gap) <= self.half_width
        return gap <= self.half_width if self.relation == "<=" else gap >= -self.half_width


def simulate(
    seed: int = 0,
    *,
    vocab: int = 12,
    levels: int = 5,
    nodes: int = 16,
    concentration: float = 0.2,
    error: float = 0.3,
    temperature: float = 1.0,
    passes: int = 20_000,
) -> Iterator[Row]:
    """The rows of `fasteagle simulate`, in the order of docs/theory.md."""
    for name, value, least in (("levels", levels, 1), ("nodes", nodes, 2), ("passes", passes, 100)):
        if value < least:
            raise UserError(f"{name} is {value}: give at least {least}")
    rng = np.random.default_rng(seed)
    world = random_world(rng, vocab, concentration, error, temperature)
    roots = rng.integers(vocab, size=passes)
    yield from _lossless(world, levels, nodes, rng)
    yield from _lengths(world, levels, nodes, roots, rng)
    yield from _trees(world, levels, nodes)
    yield from _shared_noise(world, levels, roots, rng)
    yield from _estimate(rng)
    yield from _entropy(rng, vocab, concentration)


def best_lengths(world: World, sizes: Sequence[int], levels: int) -> list[float]:
    """Expected tokens a pass of the drafter's best trees of these numbers of nodes, the mean of all roots.

    The drafter knows the path, and ranks by its own laws; 1 for the root alone.
    """
    roots = range(len(world.target))
    scores = [world.scores(root, knows_path=True) for root in roots]

    def length(size: int) -> float:
        trees = [theory.best_tree(of_root, size, levels) for of_root in scores]
        return float(np.mean([theory.tree_length(world.law(root), trees[root]) for root in roots]))

    return [length(size) for size in sizes]


# --- 1. losslessness --------------------------------------------------------------------------------------------


def _choice(p: np.ndarray, noise: np.ndarray) -> int:
    """The token of a law [V] with Gumbel noise [V]."""
    with np.errstate(divide="ignore"):
        return int(np.argmax(np.log(p) + noise))


def _lossless(world: World, levels: int, nodes: int, rng: np.random.Generator) -> Iterator[Row]:
    """A text of plain decoding and of trees that are redrawn at random, with the same noise."""
    length, vocab = 2000, len(world.target)
    noise = rng.gumbel(size=(length + levels + 1, vocab))
    plain = [0]
    for position in range(length):
        plain.append(_choice(world.target[plain[-1]], noise[position]))
    drafted, passes = [0], 0
    while len(drafted) <= length:
        size = int(rng.integers(2, nodes + 1))
        tree = set(theory.best_tree(world.scores(drafted[-1], knows_path=bool(rng.integers(2))), size, levels))
        passes += 1
        path: tuple[int, ...] = ()
        while True:
            token = _choice(world.target[drafted[-1]], noise[len(drafted) - 1])
            drafted.append(token)
            path = (*path, token)
            if path not in tree or len(drafted) > length:
                break
    same = float(np.mean(np.asarray(plain) == np.asarray(drafted[: length + 1])))
    yield Row("1. share of tokens equal to plain decoding's, random trees", 1.0, same, 0.0)
    seen = np.bincount(plain[:-1], minlength=vocab)
    state = int(np.argmax(seen))
    after = np.bincount(np.asarray(plain[1:])[np.asarray(plain[:-1]) == state], minlength=vocab) / seen[state]
    likely = int(np.argmax(world.target[state]))
    p = float(world.target[state, likely])
    yield Row(
        "1. law: share of the likeliest token after one", p, float(after[likely]), _half_width(p, int(seen[state]))
    )


# --- 2. tokens a pass -------------------------------------------------------------------------------------------


def _draw_paths(world: World, roots: np.ndarray, depth: int, rng: np.random.Generator) -> np.ndarray:
    """The target's next tokens int [passes, depth] after each root."""
    cumulative = np.cumsum(world.target, axis=1)
    tokens, at = np.zeros((len(roots), depth), int), roots
    for i in range(depth):
        at = np.minimum((cumulative[at] < rng.random((len(roots), 1))).sum(axis=1), len(world.target) - 1)
        tokens[:, i] = at
    return tokens


def _accepted(trees: Sequence[Sequence[tuple[int, ...]]], roots: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Accepted guesses of each pass, of the tree of its root."""
    sets = [set(tree) for tree in trees]

    def run(root: int, path: np.ndarray) -> int:
        return next((d for d in range(len(path)) if tuple(path[: d + 1]) not in sets[root]), len(path))

    return np.asarray([run(root, path) for root, path in zip(roots, tokens, strict=True)])


def _lengths(world: World, levels: int, nodes: int, roots: np.ndarray, rng: np.random.Generator) -> Iterator[Row]:
    tokens = _draw_paths(world, roots, levels, rng)
    every = range(len(world.target))
    for who, knows_path in (("root alone", False), ("path", True)):
        scores = [world.scores(root, knows_path=knows_path) for root in every]
        shapes = {
            "chain": [theory.backbone(s, 1, levels) for s in scores],
            "backbone of 3": [theory.backbone(s, 3, levels) for s in scores],
            f"best of {nodes} nodes": [theory.best_tree(s, nodes, levels) for s in scores],
        }
        for shape, trees in shapes.items():
            predicted = np.mean([theory.tree_length(world.law(root), trees[root]) for root in every])
            found = 1 + _accepted(trees, roots, tokens)
            yield _mean_row(f"2. tokens a pass, drafter knows the {who}, {shape}", float(predicted), found)
    rate = 0.7
    runs = np.minimum(rng.geometric(1 - rate, len(roots)) - 1, levels)
    yield _mean_row(f"2. a chain of constant rate {rate}", theory.constant_chain_length(rate, levels), 1 + runs)
    # Half of the texts are easy and half are hard: the marginals are pooled over both.
    mixed = np.minimum(rng.geometric(np.where(rng.random(len(roots)) < 0.5, 0.1, 0.6)) - 1, levels)
    lengths = [theory.constant_chain_length(r, levels) for r in (0.9, 0.4)]
    yield _mean_row("2. easy and hard texts, by their own rates", float(np.mean(lengths)), 1 + mixed)
    pooled = theory.pooled_length(mixed.tolist(), levels)
    yield Row("2. the same by the product of pooled marginals: too low", float(np.mean(1 + mixed)), pooled, 0.0, "<=")


# --- 3. the best tree -------------------------------------------------------------------------------------------


def _trees(world: World, levels: int, nodes: int) -> Iterator[Row]:
    """The best tree by the target's own law against the backbone of as many nodes, and the growth of its length."""
    law, sizes = world.law(0), range(2, 4 * nodes)
    best = [theory.tree_length(law, theory.best_tree(law, size, levels)) for size in sizes]
    width = max((nodes - 1) // levels, 1)
    backbone = theory.tree_length(law, theory.backbone(law, width, levels))
    as_many = best[width * levels + 1 - sizes[0]]
    yield Row(f"3. a backbone of {width * levels + 1} nodes, at most the best tree", as_many, backbone, 1e-12, "<=")
    gains = np.diff(best)
    yield Row("3. the largest rise of a node's gain with the size: none", 0.0, float(np.diff(gains).max()), 1e-12, "<=")


# --- 4. shared noise --------------------------------------------------------------------------------------------


def _shared_noise(world: World, levels: int, roots: np.ndarray, rng: np.random.Generator) -> Iterator[Row]:
    p, q = world.target[0], world.drafter[0]
    both, tv = theory.shared_agreement(p, q), theory.total_variation(p, q)
    noise = rng.gumbel(size=(len(roots), len(p)))
    with np.errstate(divide="ignore"):
        drawn = np.argmax(np.log(p) + noise, axis=1)
        same = drawn == np.argmax(np.log(q) + noise, axis=1)
    yield _mean_row("4. agreement of shared noise", float(both.sum()), same)
    low, high = theory.agreement_bounds(tv)
    yield Row("4. at least (1 - TV) / (1 + TV)", low, float(same.mean()), _half_width(low, len(roots)), ">=")
    yield Row("4. at most 1 - TV", high, float(same.mean()), _half_width(high, len(roots)), "<=")
    other = np.argmax(np.log(np.maximum(q, 1e-300)) + rng.gumbel(size=noise.shape), axis=1)
    yield _mean_row("4. agreement of independent noise, sum p q", float((p * q).sum()), drawn == other)
    # A chain with shared noise: the guess at each depth is the drafter's own draw.
    joint = np.stack([theory.shared_agreement(*pair) for pair in zip(world.target, world.drafter, strict=True)])
    reached, predicted = np.full(len(joint), 1 / len(joint)), 1.0
    for _ in range(levels):
        reached = reached @ joint
        predicted += reached.sum()
    at, alive, found = roots.copy(), np.ones(len(roots), bool), np.ones(len(roots))
    for _ in range(levels):
        noise = rng.gumbel(size=(len(roots), len(p)))
        with np.errstate(divide="ignore"):
            at_target, at_drafter = (np.argmax(np.log(x[at]) + noise, axis=1) for x in (world.target, world.drafter))
        alive &= at_target == at_drafter
        found, at = found + alive, at_target
    yield _mean_row("4. tokens a pass of a chain with shared noise", float(predicted), found)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = float(np.where(p > 0, p * np.log(p / q), 0).sum())
    floor = theory.agreement_by_loss(kl, tv)
    simulated = float(same.mean())
    yield Row(
        "5. agreement by the loss: at least (1 - d) / (1 + d)", floor, simulated, _half_width(floor, len(roots)), ">="
    )


# --- 5. the estimate --------------------------------------------------------------------------------------------


def _estimate(rng: np.random.Generator, trials: int = 400, prompts: int = 40) -> Iterator[Row]:
    """How often the interval of the ratio over prompts, and that of passes taken as independent, hold the true tau."""
    truth_rates = rng.beta(4, 2, 200_000)
    rounds = rng.integers(10, 60, len(truth_rates))
    depth = 5
    lengths = np.asarray([1.0]) + (truth_rates[:, None] ** np.arange(1, depth + 1)).sum(axis=1)
    truth = float((lengths * rounds).sum() / rounds.sum())
    inside, naive = 0, 0
    for _ in range(trials):
        picked = rng.integers(len(truth_rates), size=prompts)
        runs = [1 + np.minimum(rng.geometric(1 - truth_rates[i] + 1e-12, rounds[i]) - 1, depth) for i in picked]
        tokens, passes = np.asarray([r.sum() for r in runs]), np.asarray([len(r) for r in runs])
        tau, error = theory.ratio(tokens, passes)
        every = np.concatenate(runs)
        inside += abs(tau - truth) <= Z_95 * error
        naive += abs(tau - truth) <= Z_95 * every.std() / math.sqrt(len(every))
    expected = 0.95
    # Of 40 prompts: the delta method's intervals are a little short.
    allowed = 0.03 + _half_width(expected, trials)
    yield Row("5. share of 95% intervals by prompt that hold tau", expected, inside / trials, allowed)
    yield Row("5. the same with passes taken as independent: too few", expected, naive / trials, 0.0, "<=")


# --- 6. the bound -----------------------------------------------------------------------------------------------


def _entropy(rng: np.random.Generator, vocab: int, concentration: float) -> Iterator[Row]:
    p = rng.dirichlet(np.full(vocab, concentration))
    for num_nodes in (16, 1024):
        bound = theory.entropy_bound(*theory.surprisals(p), num_nodes)
        best = theory.product_paths(p, num_nodes)
        yield Row(f"6. the best tree of {num_nodes} nodes, at most the entropy's bound", bound, best, 0.0, "<=")


def _half_width(p: float, count: int) -> float:
    return Z * math.sqrt(max(p * (1 - p), 1e-9) / count)


def _mean_row(name: str, predicted: float, found: np.ndarray) -> Row:
    return Row(name, predicted, float(found.mean()), Z * float(found.std()) / math.sqrt(len(found)))
