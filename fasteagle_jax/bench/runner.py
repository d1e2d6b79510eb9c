"""StepOptions of decoding measured against each other: the same conversations, in turns in one process.

A *case* is a turn of a conversation as a prompt: what was said before, the target's own answers included, and the next
message. Each way decodes it by itself, batch 1.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fasteagle_jax.bench.decoders import PLAIN, Way
from fasteagle_jax.bench.prompts import CHUNK, Models, check_fits, pad, prompt_slots
from fasteagle_jax.bench.timing import Compilations
from fasteagle_jax.data.sources import Prompt
from fasteagle_jax.decoding.acceptance import Acceptance
from fasteagle_jax.decoding.sampling import Sampling
from fasteagle_jax.decoding.speculative import advance, start
from fasteagle_jax.decoding.state import State, Statistics, Stop, make_stop, slots_needed
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.drafters.simulated import simulated
from fasteagle_jax.engine.detokenizer import decode
from fasteagle_jax.targets.tokenizer import encode_chat

MEAN = "mean"  # of the tasks


@dataclasses.dataclass(frozen=True)
class Case:
    """A turn of a conversation."""

    task: str
    id: str
    tokens: list[int]
    sampling: Sampling  # of one row
    answer: list[int]  # what plain decoding says


@dataclasses.dataclass(frozen=True)
class Run:
    """One decode of one case."""

    seconds: float
    prefill_seconds: float  # of them, up to the first token
    round_seconds: float  # of them, in rounds; the rest is what the host did with the tokens
    tokens: list[int]
    acceptance: Acceptance


@jax.jit
def _statistics(state: State) -> Statistics:
    return state.statistics


@dataclasses.dataclass(frozen=True)
class Contest:
    """What is measured, and with what."""

    models: Models
    drafters: Mapping[Path, Any]
    ways: Sequence[Way]
    max_new: int

    def drafter(self, way: Way, case: Case) -> Any | None:
        """The drafter of a way, for a case if it is a simulated one; None of the plain way."""
        if way.folder is not None:
            return self.drafters[way.folder]
        if not way.rates:
            return None
        slots = slots_needed(prompt_slots(len(case.tokens)), CHUNK, self.max_new, len(way.rates))
        seed = int(jax.device_get(case.sampling.seed)[0])
        return simulated(way.rates, case.tokens, case.answer, slots, self.models.target.config.vocab_size, seed)

    def begin(
        self, drafter: Any | None, tree: TreeSpec, tokens: Sequence[int], sampling: Sampling
    ) -> tuple[Any, Any, Stop]:
        """The State after prefill, the target's rows for the drafter, and where the answer stops."""
        prompts, lengths = pad([tokens])
        stop = make_stop(1, self.max_new, self.models.stop_tokens)
        # The prefill is that of any tree of so many levels, so that they share its program.
        num_levels = None if drafter is None else tree.num_levels(drafter.num_levels)
        sizes: dict[str, Any] = dict(max_new=self.max_new, tree=TreeSpec("chain", levels=num_levels), chunk=CHUNK)
        state, vocab = start(self.models.target, drafter, prompts, lengths, sampling, stop, **sizes)
        return state, vocab, stop

    def decode(self, drafter: Any | None, tree: TreeSpec, tokens: Sequence[int], sampling: Sampling) -> Run:
        """Decodes a prompt between looks at the clock."""
        jax.block_until_ready(sampling)
        started = time.perf_counter()
        state, vocab, stop = jax.block_until_ready(self.begin(drafter, tree, tokens, sampling))
        filled = time.perf_counter()
        rounds = jnp.asarray(self.max_new, jnp.int32)
        state = advance(self.models.target, drafter, vocab, state, sampling, stop, rounds, tree=tree)
        jax.block_until_ready(state)
        decoded = time.perf_counter()
        emitted, num_emitted = jax.device_get((state.emitted, state.num_emitted))
        made = emitted[0, : num_emitted[0]].tolist()
        ended = time.perf_counter()
        counts = Acceptance.of(_statistics(state))
        return Run(ended - started, filled - started, decoded - filled, made, counts)

    def run(self, way: Way, case: Case) -> Run:
        """A way's decode of a case."""
        return self.decode(self.drafter(way, case), tree_of(way), case.tokens, case.sampling)

    def conversations(
        self, tasks: Mapping[str, Sequence[Prompt]], sampling: Callable[[int], Sampling]
    ) -> Iterator[Case]:
        """The cases of all prompts, one by one, with the plain answers: each is part of the next turn.

        `sampling` gives that of the case of an index.
        """
        index = 0
        for task, prompts in tasks.items():
            for prompt in prompts:
                messages: list[dict[str, str]] = []
                for turn, text in enumerate(prompt.turns):
                    messages.append({"role": "user", "content": text})
                    id = prompt.id if len(prompt.turns) == 1 else f"{prompt.id}/{turn + 1}"
                    tokens = encode_chat(self.models.tokenizer, messages)
                    check_fits(self.models.target.config.max_positions, id, tokens, self.max_new)
                    its = sampling(index)
                    answer = self.decode(None, TreeSpec(), tokens, its).tokens
                    yield Case(task, id, tokens, its, answer)
                    messages.append({"role": "assistant", "content": decode(self.models.tokenizer, answer)})
                    index += 1

    def warm_up(self, cases: Sequence[Case]) -> None:
        """Compiles, and touches the memory of, all that `measure` of the cases needs. Plain decoding is warm."""
        shapes = {prompt_slots(len(case.tokens)): case for case in cases}
        for way in self.ways[1:]:
            for case in shapes.values():
                self.run(way, case)

    def measure(self, cases: Sequence[Case], repeats: int, step: Callable[[], object]) -> Measured:
        """Every case by every way, way after way before the next case is; `step` is called after each case."""
        ways = list(self.ways)
        runs: dict[Way, list[list[Run]]] = {way: [[] for _ in range(repeats)] for way in ways}
        with Compilations() as compilations:
            for repeat in range(repeats):
                for i, case in enumerate(cases):
                    turn = (repeat + i) % len(ways)  # no way always comes first
                    for way in ways[turn:] + ways[:turn]:
                        runs[way][repeat].append(self.run(way, case))
                    step()
        return Measured(list(cases), runs, compilations.number)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The runs of all ways at one temperature, by repeat and case."""

    cases: list[Case]
    runs: dict[Way, list[list[Run]]]
    compilations: int  # while timed: none, or the times are too long

    def results(self, temperature: float) -> list[Result]:
        """By task and way, and the mean of the tasks if there are several."""
        tasks = list(dict.fromkeys(case.task for case in self.cases))
        found = []
        for task in tasks:
            chosen = [i for i, case in enumerate(self.cases) if case.task == task]
            its = {way: [[runs[i] for i in chosen] for runs in repeats] for way, repeats in self.runs.items()}
            answers = [self.cases[i].answer for i in chosen]
            ids = [self.cases[i].id for i in chosen]
            found += [_result(temperature, task, way, its[Way(PLAIN)], runs, ids, answers) for way, runs in its.items()]
        if len(tasks) > 1:
            for way in self.runs:
                found.append(mean([result for result in found if result.way == way]))
        return found


def tree_of(way: Way) -> TreeSpec:
    """The TreeSpec of a way; any for plain decoding, which makes none."""
    return TreeSpec() if way.tree is None else TreeSpec.parse(way.tree)


# --- results ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """A way on a task, or the mean over the tasks, at one temperature. Lists are by repeat, or by depth."""

    temperature: float
    task: str
    way: Way
    cases: int
    tokens_per_second: list[float]  # of whole answers, prefill included
    speedup: list[float]  # over plain decoding
    rounds_speedup: list[float]  # likewise, prefill left out
    acceptance_length: float | None  # tokens a target pass; the one that prefill makes is not counted
    accepted_at: list[int]  # rounds in which the guess of each depth was accepted
    acceptance_by_depth: list[float | None]  # share accepted, of those whose predecessor was
    new_tokens: int
    target_passes: int
    prefill_share: float  # of the time of the answers
    host_share: float  # of it, in which nothing was computed for the next token
    differing: list[str]  # cases of which any repeat has another token than plain decoding

    def record(self) -> dict[str, Any]:
        """For JSON."""
        raw = dataclasses.asdict(self)
        del raw["way"]
        raw["rounds_speedup"] = [number(value) for value in self.rounds_speedup]
        return {**raw, "drafter": self.way.name, "tree": self.way.tree}


def _result(
    temperature: float,
    task: str,
    way: Way,
    plain: list[list[Run]],
    its: list[list[Run]],
    ids: Sequence[str],
    answers: Sequence[list[int]],
) -> Result:
    """The Result of runs by repeat and case."""
    counts = Acceptance.total([run.acceptance for run in its[0]])  # in every repeat the same
    seconds = sum(run.seconds for runs in its for run in runs)
    prefill = sum(run.prefill_seconds for runs in its for run in runs)
    rounds = sum(run.round_seconds for runs in its for run in runs)
    rates, plain_rates = ([rate(runs) for runs in repeats] for repeats in (its, plain))
    differing = {id for runs in its for id, run, answer in zip(ids, runs, answers, strict=True) if run.tokens != answer}
    return Result(
        temperature,
        task,
        way,
        len(ids),
        rates,
        [a / b for a, b in zip(rates, plain_rates, strict=True)],
        [_round_rate(a) / _round_rate(b) for a, b in zip(its, plain, strict=True)],
        number(counts.length),
        list(counts.accepted_at),
        [number(share) for share in counts.by_depth],
        sum(len(run.tokens) for run in its[0]),
        counts.rounds,
        prefill / seconds,
        (seconds - prefill - rounds) / seconds,
        sorted(differing),
    )


def mean(results: Sequence[Result]) -> Result:
    """The mean of a way's tasks, each counting alike; acceptance by depth is of all tasks' rounds together."""
    first, num = results[0], len(results)

    def by_repeat(name: str) -> list[float]:
        return [sum(values) / num for values in zip(*(getattr(result, name) for result in results), strict=True)]

    counts = Acceptance.total([Acceptance(result.target_passes, tuple(result.accepted_at)) for result in results])
    lengths = [result.acceptance_length for result in results if result.acceptance_length is not None]
    return Result(
        first.temperature,
        MEAN,
        first.way,
        sum(result.cases for result in results),
        by_repeat("tokens_per_second"),
        by_repeat("speedup"),
        by_repeat("rounds_speedup"),
        sum(lengths) / len(lengths) if lengths else None,
        list(counts.accepted_at),
        [number(share) for share in counts.by_depth],
        sum(result.new_tokens for result in results),
        counts.rounds,
        sum(result.prefill_share for result in results) / num,
        sum(result.host_share for result in results) / num,
        [id for result in results for id in result.differing],
    )


def rate(runs: Sequence[Run]) -> float:
    """Tokens a second over all cases."""
    return sum(len(run.tokens) for run in runs) / sum(run.seconds for run in runs)


def _round_rate(runs: Sequence[Run]) -> float:
    """Tokens a second in rounds: all but the one that prefill makes. Answers of one token leave nothing: nan."""
    seconds = sum(run.round_seconds for run in runs)
    return sum(len(run.tokens) - 1 for run in runs) / seconds or math.nan


def number(value: float) -> float | None:
    """The value, or None for nan, which JSON has not."""
    return None if math.isnan(value) else value
