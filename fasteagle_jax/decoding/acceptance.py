"""Acceptance counts and acceptance length of real decoding.

B rows · N levels. Acceptance length tau = new tokens / target passes, the target's own token included; the token that
prefill ends with is in neither count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import generate
from fasteagle_jax.decoding.state import Statistics
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.devices.sharding import fetch


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """Counts of one or more decodes; `+` adds them up."""

    rounds: int
    accepted_at: tuple[int, ...]  # [N], rounds in which the guess of each depth was accepted

    @classmethod
    def of(cls, statistics: Statistics) -> Acceptance:
        """The counts summed over all rows."""
        rounds, accepted_at = fetch((statistics.rounds, statistics.accepted_at))
        return cls(int(rounds.sum()), tuple(int(n) for n in accepted_at.sum(axis=0)))

    @classmethod
    def total(cls, counts: Sequence[Any]) -> Acceptance:
        """The sum of at least one Acceptance or RequestStatistics: anything with `rounds` and `accepted_at`."""
        accepted_at = zip(*(part.accepted_at for part in counts), strict=True)
        return cls(sum(part.rounds for part in counts), tuple(map(sum, accepted_at)))

    def __add__(self, other: Acceptance) -> Acceptance:
        return Acceptance.total([self, other])

    @property
    def length(self) -> float:
        """tau; 1 for plain decoding, nan without a round."""
        return 1 + sum(self.accepted_at) / self.rounds if self.rounds else float("nan")

    @property
    def by_depth(self) -> tuple[float, ...]:
        """For each depth, the share of guesses accepted among those whose predecessor was; nan if there were none."""
        reached = (self.rounds, *self.accepted_at[:-1])
        return tuple(a / b if b else float("nan") for a, b in zip(self.accepted_at, reached, strict=False))


def measure_acceptance(
    target: Any,
    drafter: Any,
    prompts: list[list[int]],
    tree: TreeSpec,
    *,
    max_new: int,
    stop_tokens: tuple[int, ...] = (),
    temperature: float = 0.0,
    batch_size: int = 8,
) -> Acceptance:
    """The Acceptance of real decoding on token prompts; a row's seed is its index."""
    total = None
    longest = max(len(prompt) for prompt in prompts)
    chunk = min(64, longest)
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        seeds = [start + i for i in range(len(rows))]
        out = generate(
            target,
            drafter,
            rows,
            make_sampling(len(rows), temperature=temperature, seed=seeds),
            max_new=max_new,
            stop_tokens=stop_tokens,
            tree=tree,
            chunk=chunk,
        )
        counts = Acceptance.of(out.statistics)
        total = counts if total is None else total + counts
    assert total is not None
    return total
