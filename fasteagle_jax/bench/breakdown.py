"""Where the time of a round goes: its parts as programs of their own, in turns with the whole, on a real state.

target   the pass over the tree's nodes, logits included
draft    the drafter's pass, logits included; with its tree, where the drafter grows that by itself
tree     ranking the guesses, building the tree, and who sees whom in it
choose   the target's choice at every node, and the walk down the tree
commit   writing the accepted tokens' keys and values
rest     the whole round less these: the loop, its bookkeeping, and what measuring the parts alone gets wrong
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fasteagle_jax.bench.decoders import Way
from fasteagle_jax.bench.runner import Case, Contest, tree_of
from fasteagle_jax.bench.timing import Spread
from fasteagle_jax.decoding.interfaces import Ranking
from fasteagle_jax.decoding.sampling import choose
from fasteagle_jax.decoding.speculative import advance, decode_rounds, root_only
from fasteagle_jax.decoding.state import State
from fasteagle_jax.decoding.tree import Draft, visible_nodes, walk
from fasteagle_jax.nn.kv_cache import commit

PARTS = ("target", "draft", "tree", "choose", "commit")
ROUNDS = 8  # at once, of the whole
REPEATS = 9


@dataclasses.dataclass(frozen=True)
class Split:
    """A way's round at one temperature, in milliseconds."""

    temperature: float
    way: Way
    case: str
    cached_tokens: int  # that the round's pass reads
    nodes: int
    parts: dict[str, Spread]  # of PARTS; without those that it has not
    round: Spread

    @property
    def rest(self) -> float:
        """What the parts do not explain, of the medians; less than 0 where they are slower alone."""
        return self.round.median - sum(part.median for part in self.parts.values())

    @property
    def overhead(self) -> float:
        """The share that is neither the target's nor the drafter's pass; a rest below 0 makes it no smaller."""
        passes = sum(self.parts[name].median for name in ("target", "draft") if name in self.parts)
        return 1 - passes / max(self.round.median, self.round.median - self.rest)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        raw = dataclasses.asdict(self)
        del raw["way"]
        named = {"drafter": self.way.name, "tree": self.way.tree, "rest": self.rest, "overhead": self.overhead}
        return {**raw, **named}


class _Program:
    """A function of (carry, *fixed), compiled for a call with flat lists, which costs the host least."""

    def __init__(self, function: Callable[..., Any], carry: Any, fixed: Any):
        carry_tree: Any = jax.tree.structure(carry)
        fixed_tree: Any = jax.tree.structure(fixed)

        def flat(carry_leaves: list[Any], fixed_leaves: list[Any]) -> Any:
            return function(carry_tree.unflatten(carry_leaves), *fixed_tree.unflatten(fixed_leaves))

        self.call = jax.jit(flat, donate_argnums=0)


class _Part:
    """A program with its arguments and times; the carry is donated, a fresh copy every time."""

    def __init__(self, program: _Program, carry: Any, fixed: Any):
        self._program, self._carry, self._fixed = program, jax.tree.leaves(carry), jax.tree.leaves(fixed)
        self.milliseconds: list[float] = []

    def __call__(self) -> Any:
        """What the function returns, after a further measurement."""
        carry = jax.block_until_ready([jnp.copy(leaf) for leaf in self._carry])
        started = time.perf_counter()
        out = jax.block_until_ready(self._program.call(carry, self._fixed))
        self.milliseconds.append(1e3 * (time.perf_counter() - started))
        return out


class Splitter:
    """Measures a way's rounds; its programs serve all states of the same shapes."""

    def __init__(self, contest: Contest, way: Way):
        self._contest, self._way = contest, way
        self._programs: dict[str, _Program] = {}

    def measure(self, case: Case, temperature: float) -> Split:
        """The Split of the state halfway through a case's answer."""
        contest, way = self._contest, self._way
        target, drafter, tree = contest.models.target, contest.drafter(way, case), tree_of(way)
        sampling = case.sampling
        half = jnp.asarray(contest.run(way, case).acceptance.rounds // 2, jnp.int32)
        state, vocab, stop = contest.begin(drafter, tree, case.tokens, sampling)
        state = advance(target, drafter, vocab, state, sampling, stop, half, tree=tree)
        num_levels = 0 if drafter is None else tree.num_levels(drafter.num_levels)
        feature_layers = () if drafter is None else drafter.feature_layers
        parts: dict[str, _Part] = {}

        def run(name: str, function: Callable[..., Any], carry: Any, *fixed: Any) -> Any:
            if name not in self._programs:
                self._programs[name] = _Program(function, carry, fixed)
            parts[name] = _Part(self._programs[name], carry, fixed)
            return parts[name]()

        # --- draft and tree -------------------------------------------------------------------------------------
        def plain_draft(_: Any, new: Any) -> Any:
            draft = root_only(new)
            return draft, visible_nodes(draft)

        def guess(cache: Any, drafter: Any, vocab: Any, new: Any) -> Any:
            return drafter.draft_logits(vocab, new, cache, num_levels)

        def grow(_: Any, drafter: Any, vocab: Any, new: Any, cache: Any, logits: Any, sampling: Any) -> Any:
            draft = drafter.build_tree(vocab, new, cache, logits, tree, Ranking(sampling, True))
            return draft, visible_nodes(draft)

        def whole_draft(cache: Any, drafter: Any, vocab: Any, new: Any, sampling: Any) -> Any:
            draft, after = drafter.draft(vocab, new, cache, tree, Ranking(sampling, True))
            return draft, visible_nodes(draft), after

        models = drafter, vocab, state.new
        if drafter is None:
            draft, visible = run("tree", plain_draft, (), state.new)
        elif getattr(drafter, "has_split_draft", False):
            logits, cache = run("draft", guess, state.drafter_cache, *models)
            draft, visible = run("tree", grow, (), *models, cache, logits, sampling)
        else:
            draft, visible, _ = run("draft", whole_draft, state.drafter_cache, *models, sampling)

        # --- the target -----------------------------------------------------------------------------------------
        def verify(_: Any, target: Any, draft: Draft, visible: jax.Array, cache: Any) -> Any:
            positions = cache.length[:, None] + draft.depths
            out = target(draft.tokens, positions, visible, cache, feature_layers)
            return target.logits(out.hidden), out.features, out.fresh

        def pick(_: Any, logits: jax.Array, draft: Draft, length: jax.Array, sampling: Any) -> Any:
            return walk(draft, choose(logits, length[:, None] + draft.depths + 1, sampling), num_levels)

        logits, _, fresh = run("target", verify, (), target, draft, visible, state.target_cache)
        path = run("choose", pick, (), logits, draft, state.target_cache.length, sampling)
        run("commit", commit, state.target_cache, fresh, path.accepted + 1, path.nodes)

        # --- the whole ------------------------------------------------------------------------------------------
        def rounds(state: State, target: Any, drafter: Any, vocab: Any, sampling: Any, stop: Any) -> Any:
            many = jnp.asarray(ROUNDS, jnp.int32)
            return decode_rounds(target, drafter, vocab, state, sampling, stop, many, tree=tree)

        _, ran = run("round", rounds, state, target, drafter, vocab, sampling, stop)
        whole, num_rounds = parts.pop("round"), int(ran)
        for part in (*parts.values(), whole):
            part.milliseconds.clear()  # of compilation
        for _ in range(REPEATS):
            for part in (*parts.values(), whole):
                part()
        return Split(
            temperature,
            way,
            case.id,
            int(jax.device_get(state.target_cache.length)[0]),
            draft.tokens.shape[1],
            {name: Spread.of(parts[name].milliseconds) for name in PARTS if name in parts},
            Spread.of([milliseconds / num_rounds for milliseconds in whole.milliseconds]),
        )
