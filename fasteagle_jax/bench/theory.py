"""What theory says of acceptance: the formulas of docs/theory.md.

V vocabulary · N levels · M nodes of a tree, its root included. Probabilities are float64; a path is a tuple of tokens.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.text import parse_json

Law = Callable[[tuple[int, ...]], np.ndarray]  # of a path from the root: probabilities [V] of the next token


def check_rates(rates: Sequence[float]) -> None:
    """Raises UserError for a probability outside of 0 to 1."""
    if bad := [rate for rate in rates if not 0 <= rate <= 1]:
        raise UserError(f"{bad[0]} is no probability: give rates of 0 to 1")


# --- tokens a pass ----------------------------------------------------------------------------------------------


def chain_length(rates: Sequence[float]) -> float:
    """Expected tokens a pass of a chain whose guess at depth d is right with `rates[d - 1]` where those before are."""
    check_rates(rates)
    return 1 + float(np.cumprod(rates).sum())


def constant_chain_length(rate: float, depth: int) -> float:
    """That of a constant rate: (1 - a^(N + 1)) / (1 - a) (Leviathan et al., arXiv 2211.17192, equation 1)."""
    check_rates([rate])
    return depth + 1.0 if rate == 1 else (1 - rate ** (depth + 1)) / (1 - rate)


def tree_length(law: Law, nodes: Sequence[tuple[int, ...]]) -> float:
    """Expected tokens a pass of a tree: 1 and, for every node, the probability of the path to it.

    The guesses must not depend on the noise that the target draws with.
    """
    return 1 + sum(path_probability(law, path) for path in nodes)


def path_probability(law: Law, path: tuple[int, ...]) -> float:
    """The probability that the next tokens are those of a path."""
    return math.prod(float(law(path[:i])[token]) for i, token in enumerate(path))


def pooled_length(runs: Sequence[int], depth: int) -> float:
    """What the product of marginals says of runs of accepted guesses: the trap. Their mean is the right number.

    The marginal of depth d is the share of passes whose guess at depth d agrees, whatever was before; here that of runs
    longer than d - 1, as if what comes after a wrong guess were wrong too.
    """
    marginals = [np.mean(np.asarray(runs) >= d) for d in range(1, depth + 1)]
    return 1 + float(np.cumprod(marginals).sum())


# --- trees ------------------------------------------------------------------------------------------------------


def best_tree(scores: Law, num_nodes: int, depth: int) -> list[tuple[int, ...]]:
    """The M - 1 paths, up to `depth` long, of the largest products of `scores`; a parent comes before its children."""
    heap: list[tuple[float, tuple[int, ...], int]] = []  # -probability, parent, rank among its children
    ranked: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
    mass: dict[tuple[int, ...], float] = {(): 1.0}

    def offer(parent: tuple[int, ...], rank: int) -> None:
        if parent not in ranked:
            p = scores(parent)
            order = np.argsort(-p, kind="stable")
            ranked[parent] = order, p[order]
        if rank < len(ranked[parent][0]):
            heapq.heappush(heap, (-mass[parent] * float(ranked[parent][1][rank]), parent, rank))

    offer((), 0)
    nodes: list[tuple[int, ...]] = []
    while heap and len(nodes) < num_nodes - 1:
        minus, parent, rank = heapq.heappop(heap)
        node = (*parent, int(ranked[parent][0][rank]))
        nodes.append(node)
        mass[node] = -minus
        offer(parent, rank + 1)
        if len(node) < depth:
            offer(node, 0)
    return nodes


def backbone(scores: Law, width: int, depth: int) -> list[tuple[int, ...]]:
    """The paper's tree: `width` children a level, of the best node alone."""
    nodes: list[tuple[int, ...]] = []
    parent: tuple[int, ...] = ()
    for _ in range(depth):
        order = np.argsort(-scores(parent), kind="stable")[:width]
        nodes += [(*parent, int(token)) for token in order]
        parent = (*parent, int(order[0]))
    return nodes


def best_size(lengths: Sequence[float], costs: Sequence[float]) -> int:
    """The index of the best tokens a pass per cost of a pass, of trees of growing size."""
    return int(np.argmax(np.asarray(lengths) / np.asarray(costs)))


# --- temperature ------------------------------------------------------------------------------------------------


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """1 - sum min(p, q), of distributions [V]."""
    return float(1 - np.minimum(p, q).sum())


def shared_agreement(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """For each token [V] the probability that both p and q pick it with the same Gumbel noise.

    With noise G both pick x if G[x] - G[y] >= max(log p[y]/p[x], log q[y]/q[x]) for all y, whose probability is
    1 / sum_y max(p[y]/p[x], q[y]/q[x]).
    """
    both = np.zeros(len(p))
    for x in np.flatnonzero((p > 0) & (q > 0)):
        both[x] = 1 / np.maximum(p / p[x], q / q[x]).sum()
    return both


def agreement_bounds(tv: float) -> tuple[float, float]:
    """The least and the most that shared noise can agree at a total variation."""
    check_rates([tv])
    return (1 - tv) / (1 + tv), 1 - tv


def agreement_by_loss(kl: float, tv: float = 1.0) -> float:
    """The least chance of agreement of shared noise at a KL divergence in nats: d = min(TV, sqrt(KL / 2)) (Pinsker)."""
    if kl < 0:
        raise UserError(f"a KL divergence of {kl}: it is at least 0")
    return agreement_bounds(min(tv, math.sqrt(kl / 2), 1.0))[0]


# --- measuring --------------------------------------------------------------------------------------------------


def ratio(tokens: np.ndarray, passes: np.ndarray) -> tuple[float, float]:
    """tau and its standard error, from each prompt's tokens and passes [prompts], by the delta method for ratios."""
    tau = tokens.sum() / passes.sum()
    rest = tokens - tau * passes
    return float(tau), float(np.sqrt((rest**2).sum() / (len(rest) - 1) * len(rest)) / passes.sum())


def passes_needed(deviation: float, error: float, correlation: float = 0.0, passes_a_prompt: float = 1.0) -> float:
    """Passes until tau's standard error is `error`.

    `deviation` is that of a pass's tokens, `correlation` between those of two passes of one prompt: the passes of a
    prompt then count as if there were 1 + (passes - 1) x correlation times fewer (Kish's design effect).
    """
    return (deviation / error) ** 2 * (1 + (passes_a_prompt - 1) * correlation)


# --- the bound of the target's entropy --------------------------------------------------------------------------


def entropy_bound(mean: float, second: float, num_nodes: int) -> float:
    """Most expected tokens a pass of any tree of M nodes whose guesses do not know the target's noise.

    With independent surprisals -log p of mean `mean` > 0 (the entropy in nats) and mean square `second` it is
    1 + log(M - 1) / mean + second / mean^2, the target's own token included (docs/theory.md has the proof).
    """
    if mean <= 0:
        return math.inf
    return 1 + math.log(max(num_nodes - 1, 1)) / mean + second / mean**2


def surprisals(p: np.ndarray) -> tuple[float, float]:
    """The mean of -log p and of its square under p [V], in nats."""
    kept = p[p > 0]
    return float(-(kept * np.log(kept)).sum()), float((kept * np.log(kept) ** 2).sum())


def product_paths(p: np.ndarray, num_nodes: int) -> float:
    """Expected tokens a pass of the best tree for tokens that are drawn from p [V] independently."""
    order = -np.sort(-p)
    heap: list[tuple[float, int, float]] = [(-float(order[0]), 0, 1.0)]  # -probability, rank, parent's
    total = 1.0
    for _ in itertools.repeat(None, num_nodes - 1):
        minus, rank, above = heapq.heappop(heap)
        total -= minus
        if rank + 1 < len(order):
            heapq.heappush(heap, (-above * float(order[rank + 1]), rank + 1, above))
        heapq.heappush(heap, (minus * float(order[0]), 0, -minus))
    return total


def measured_surprisals(lines: Iterable[bytes], name: str) -> tuple[float, float, int]:
    """Mean, mean square and number of the surprisals -log p in a batch file's answers with logprobs; UserError if none.

    `lines` are records of `fasteagle batch`'s simple form, `name` is the file's.
    """
    found: list[float] = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            for answer in record.get("answers") or [record]:
                found += [-float(value) for value in answer.get("logprobs") or []]
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(f"{name}:{number} is no record of fasteagle batch ({error}): give its output") from None
    if not found:
        raise UserError(f'{name} holds no logprobs: ask for them with "logprobs": true in the lines of fasteagle batch')
    values = np.asarray(found)
    return float(values.mean()), float((values**2).mean()), len(values)
