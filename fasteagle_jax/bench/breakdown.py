"""Where the time of a round goes: its parts as programs of their own, interleaved with the whole, on a real state.

target   the pass over the tree's nodes, logits included
draft    the drafter's pass, logits included; with its tree, if the drafter builds that by itself
tree     ranking the guesses, building the tree, and who sees whom in it
choose   the target's choice at every node, and the walk down the tree
commit   writing the accepted tokens' keys and values
rest     the whole round less these: the loop, its bookkeeping, and what measuring the parts alone gets wrong
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fasteagle_jax.bench.decoders import DecoderSpec, find_decoder
from fasteagle_jax.bench.runner import Case, Comparison, tree_of
from fasteagle_jax.bench.timing import Spread
from fasteagle_jax.decoding.interfaces import Ranking
from fasteagle_jax.decoding.lookup import with_lookup
from fasteagle_jax.decoding.sampling import choose
from fasteagle_jax.decoding.speculative import advance, decode_rounds, root_only
from fasteagle_jax.decoding.state import State, context_of
from fasteagle_jax.decoding.tree import Draft, visible_nodes, walk
from fasteagle_jax.nn.kv_cache import commit

PARTS = ("target", "draft", "tree", "choose", "commit")
ROUNDS = 8  # at once, of the whole
REPEATS = 9


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """The time of a decoder's round at one temperature, in milliseconds."""

    temperature: float
    decoder: DecoderSpec
    case: str
    cached_tokens: int  # that the round's pass reads
    nodes: int
    parts: dict[str, Spread]  # of PARTS, those that the decoder has
    round: Spread

    @property
    def rest(self) -> float:
        """The round's median less the parts' medians; below 0 if the parts are slower alone."""
        return self.round.median - sum(part.median for part in self.parts.values())

    @property
    def overhead(self) -> float:
        """The share that is neither the target's nor the drafter's pass; a rest below 0 makes it no smaller."""
        passes = sum(self.parts[name].median for name in ("target", "draft") if name in self.parts)
        return 1 - passes / max(self.round.median, self.round.median - self.rest)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        raw = dataclasses.asdict(self)
        del raw["decoder"]
        named = {"drafter": self.decoder.name, "tree": self.decoder.tree, "rest": self.rest, "overhead": self.overhead}
        return {**raw, **named}

    @classmethod
    def read(cls, record: Mapping[str, Any], decoders: Iterable[DecoderSpec]) -> Breakdown:
        """The Breakdown whose `record()` it is, of one of the decoders."""
        fields: dict[str, Any] = {field.name: record.get(field.name) for field in dataclasses.fields(cls)}
        fields["decoder"] = find_decoder(record, decoders)
        fields["parts"] = {name: Spread(**part) for name, part in record["parts"].items()}
        fields["round"] = Spread(**record["round"])
        return cls(**fields)


class _Program:
    """A jitted function of (carry, *fixed) that takes flat lists of leaves, which costs the host least."""

    def __init__(self, function: Callable[..., Any], carry: Any, fixed: Any):
        carry_tree: Any = jax.tree.structure(carry)
        fixed_tree: Any = jax.tree.structure(fixed)

        def flat(carry_leaves: list[Any], fixed_leaves: list[Any]) -> Any:
            return function(carry_tree.unflatten(carry_leaves), *fixed_tree.unflatten(fixed_leaves))

        self.call = jax.jit(flat, donate_argnums=0)


class _Part:
    """A program with its arguments and measured times; each call donates a fresh copy of the carry."""

    def __init__(self, program: _Program, carry: Any, fixed: Any):
        self._program, self._carry, self._fixed = program, jax.tree.leaves(carry), jax.tree.leaves(fixed)
        self.milliseconds: list[float] = []

    def __call__(self) -> Any:
        """The function's result; the call is timed."""
        carry = jax.block_until_ready([jnp.copy(leaf) for leaf in self._carry])
        started = time.perf_counter()
        out = jax.block_until_ready(self._program.call(carry, self._fixed))
        self.milliseconds.append(1e3 * (time.perf_counter() - started))
        return out


class RoundProfiler:
    """Times the parts of a decoder's rounds; its programs serve all states of the same shapes."""

    def __init__(self, comparison: Comparison, decoder: DecoderSpec):
        self._comparison, self._decoder = comparison, decoder
        self._programs: dict[str, _Program] = {}

    def measure(self, case: Case, temperature: float) -> Breakdown:
        """The Breakdown of a round halfway through a case's answer."""
        comparison, decoder = self._comparison, self._decoder
        target, drafter, tree = comparison.models.target, comparison.drafter(decoder, case), tree_of(decoder)
        sampling = case.sampling
        half = jnp.asarray(comparison.run(decoder, case).acceptance.rounds // 2, jnp.int32)
        state, vocab, stop = comparison.prefill(drafter, tree, case.tokens, sampling)
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

        def draft_logits(cache: Any, drafter: Any, vocab: Any, new: Any, context: Any) -> Any:
            return drafter.draft_logits(vocab, new, cache, num_levels, context)

        def finished(draft: Draft, text: Any) -> Any:
            draft = with_lookup(draft, text[0], text[1], num_levels, tree.lookup)
            return draft, visible_nodes(draft)

        def build_tree(
            _: Any, drafter: Any, vocab: Any, new: Any, text: Any, cache: Any, logits: Any, sampling: Any
        ) -> Any:
            return finished(drafter.build_tree(vocab, new, cache, logits, tree, Ranking(sampling, True)), text)

        def whole_draft(cache: Any, drafter: Any, vocab: Any, new: Any, text: Any, context: Any, sampling: Any) -> Any:
            draft, after = drafter.draft(vocab, new, cache, tree, Ranking(sampling, True), context)
            return *finished(draft, text), after

        models = drafter, vocab, state.new
        text = state.text, state.target_cache.length
        context = () if drafter is None else context_of(state.target_cache, drafter)
        if drafter is None:
            draft, visible = run("tree", plain_draft, (), state.new)
        elif getattr(drafter, "has_split_draft", False):
            logits, cache = run("draft", draft_logits, state.drafter_cache, *models, context)
            draft, visible = run("tree", build_tree, (), *models, text, cache, logits, sampling)
        else:
            draft, visible, _ = run("draft", whole_draft, state.drafter_cache, *models, text, context, sampling)

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
        return Breakdown(
            temperature,
            decoder,
            case.id,
            int(jax.device_get(state.target_cache.length)[0]),
            draft.tokens.shape[1],
            {name: Spread.of(parts[name].milliseconds) for name in PARTS if name in parts},
            Spread.of([milliseconds / num_rounds for milliseconds in whole.milliseconds]),
        )
