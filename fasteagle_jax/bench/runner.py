"""Decoders measured against each other: the same conversations, interleaved in one process.

A *case* is a turn of a conversation as a prompt: what was said before, the target's own answers included, and the next
message. Each decoder answers it by itself, batch 1.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fasteagle_jax.bench.decoders import PLAIN, DecoderSpec, find_decoder
from fasteagle_jax.bench.prompts import CHUNK, Models, check_fits, prompt_slots
from fasteagle_jax.bench.timing import Compilations
from fasteagle_jax.data.sources import Prompt
from fasteagle_jax.decoding.acceptance import Acceptance
from fasteagle_jax.decoding.prefill import pad_prompts
from fasteagle_jax.decoding.sampling import Sampling
from fasteagle_jax.decoding.speculative import advance, num_levels_of, start
from fasteagle_jax.decoding.state import State, Statistics, Stop, make_stop, slots_needed
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.drafters.simulated import simulated
from fasteagle_jax.engine.detokenizer import Detokenizer
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
class Comparison:
    """The decoders to compare, plain decoding first, and the models they run."""

    models: Models
    drafters: Mapping[Path, Any]
    decoders: Sequence[DecoderSpec]
    max_new: int

    def drafter(self, decoder: DecoderSpec, case: Case) -> Any | None:
        """A decoder's drafter, made for the case if it is a simulated one; None for plain decoding."""
        if decoder.folder is not None:
            return self.drafters[decoder.folder]
        if not decoder.rates:
            return None
        slots = slots_needed(prompt_slots(len(case.tokens)), CHUNK, self.max_new, len(decoder.rates))
        seed = int(jax.device_get(case.sampling.seed)[0])
        return simulated(decoder.rates, case.tokens, case.answer, slots, self.models.target.config.vocab_size, seed)

    def prefill(
        self, drafter: Any | None, tree: TreeSpec, tokens: Sequence[int], sampling: Sampling
    ) -> tuple[Any, Any, Stop]:
        """The State after prefill, the rows of the vocabulary that the drafter reads, and the Stop."""
        prompts, lengths = pad_prompts([list(tokens)], prompt_slots(len(tokens)))
        stop = make_stop(1, self.max_new, self.models.stop_tokens)
        sizes: dict[str, Any] = dict(max_new=self.max_new, num_levels=num_levels_of(drafter, tree), chunk=CHUNK)
        state, vocab = start(self.models.target, drafter, prompts, lengths, sampling, stop, **sizes)
        return state, vocab, stop

    def decode(self, drafter: Any | None, tree: TreeSpec, tokens: Sequence[int], sampling: Sampling) -> Run:
        """The timed decode of a prompt."""
        jax.block_until_ready(sampling)
        started = time.perf_counter()
        state, vocab, stop = jax.block_until_ready(self.prefill(drafter, tree, tokens, sampling))
        prefilled = time.perf_counter()
        rounds = jnp.asarray(self.max_new, jnp.int32)
        state = advance(self.models.target, drafter, vocab, state, sampling, stop, rounds, tree=tree)
        jax.block_until_ready(state)
        decoded = time.perf_counter()
        text, num_emitted = jax.device_get((state.text, state.num_emitted))
        answer = text[0, len(tokens) : len(tokens) + num_emitted[0]].tolist()
        ended = time.perf_counter()
        counts = Acceptance.of(_statistics(state))
        return Run(ended - started, prefilled - started, decoded - prefilled, answer, counts)

    def run(self, decoder: DecoderSpec, case: Case) -> Run:
        """The timed decode of a case by a decoder."""
        return self.decode(self.drafter(decoder, case), tree_of(decoder), case.tokens, case.sampling)

    def cases(self, task: str, prompts: Sequence[Prompt], samplings: Iterator[Sampling]) -> Iterator[Case]:
        """The cases of a task's prompts, with plain decoding's answers: each is part of the next turn's prompt."""
        detokenizer = Detokenizer(self.models.tokenizer)
        for prompt in prompts:
            messages: list[dict[str, str]] = []
            for turn, text in enumerate(prompt.turns):
                messages.append({"role": "user", "content": text})
                id = prompt.id if len(prompt.turns) == 1 else f"{prompt.id}/{turn + 1}"
                tokens = encode_chat(self.models.tokenizer, messages)
                check_fits(self.models.target.config, id, tokens, self.max_new)
                sampling = next(samplings)
                answer = self.decode(None, TreeSpec(), tokens, sampling).tokens
                yield Case(task, id, tokens, sampling, answer)
                ended = answer[-1] in self.models.stop_tokens
                text = detokenizer.text(answer[:-1] if ended else answer, tokens)
                messages.append({"role": "assistant", "content": text})

    def warm_up(self, cases: Sequence[Case]) -> None:
        """Compiles the programs that `measure` of the cases runs, and touches their memory; `cases` did so for plain
        decoding."""
        shapes = {prompt_slots(len(case.tokens)): case for case in cases}
        for decoder in self.decoders[1:]:
            for case in shapes.values():
                self.run(decoder, case)

    def measure(self, cases: Sequence[Case], repeats: int, report: Callable[[str], object]) -> Measured:
        """Every case by every decoder before the next case; `report` is given each decoder's tokens/s after each."""
        decoders = list(self.decoders)
        runs: dict[DecoderSpec, list[list[Run]]] = {decoder: [[] for _ in range(repeats)] for decoder in decoders}
        with Compilations() as compilations:
            for repeat in range(repeats):
                for i, case in enumerate(cases):
                    first = (repeat + i) % len(decoders)  # no decoder always comes first
                    for decoder in decoders[first:] + decoders[:first]:
                        runs[decoder][repeat].append(self.run(decoder, case))
                    rates = (f"{d} {rate([run for of_repeat in runs[d] for run in of_repeat]):.1f}" for d in decoders)
                    report(f"{case.task}, tokens/s: {', '.join(rates)}")
        return Measured(list(cases), runs, compilations.number)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The runs of all decoders at one temperature; lists are by repeat, then by case."""

    cases: list[Case]
    runs: dict[DecoderSpec, list[list[Run]]]
    compilations: int  # while timed: none, or the times are too long

    def results(self, temperature: float) -> list[Result]:
        """A Result for each task and decoder."""
        tasks = list(dict.fromkeys(case.task for case in self.cases))
        found = []
        for task in tasks:
            chosen = [i for i, case in enumerate(self.cases) if case.task == task]
            of_task = {d: [[runs[i] for i in chosen] for runs in repeats] for d, repeats in self.runs.items()}
            plain = of_task[DecoderSpec(PLAIN)]
            answers = [self.cases[i].answer for i in chosen]
            ids = [self.cases[i].id for i in chosen]
            found += [_result(temperature, task, d, plain, runs, ids, answers) for d, runs in of_task.items()]
        return found


def tree_of(decoder: DecoderSpec) -> TreeSpec:
    """A decoder's TreeSpec; for plain decoding, which ignores it, the default."""
    return TreeSpec() if decoder.tree is None else TreeSpec.parse(decoder.tree)


# --- results ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """A decoder on a task, or the mean over the tasks, at one temperature. Lists are by repeat, or by depth."""

    temperature: float
    task: str
    decoder: DecoderSpec
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
        del raw["decoder"]
        raw["rounds_speedup"] = [number(value) for value in self.rounds_speedup]
        return {**raw, "drafter": self.decoder.name, "tree": self.decoder.tree}

    @classmethod
    def read(cls, record: Mapping[str, Any], decoders: Iterable[DecoderSpec]) -> Result:
        """The Result whose `record()` it is, of one of the decoders."""
        fields = {**record, "decoder": find_decoder(record, decoders)}
        del fields["drafter"], fields["tree"]
        fields["rounds_speedup"] = [math.nan if value is None else value for value in record["rounds_speedup"]]
        return cls(**fields)


def _result(
    temperature: float,
    task: str,
    decoder: DecoderSpec,
    plain: list[list[Run]],
    runs: list[list[Run]],
    ids: Sequence[str],
    answers: Sequence[list[int]],
) -> Result:
    """The Result of a decoder's runs, and plain decoding's, on a task's cases."""
    counts = Acceptance.total([run.acceptance for run in runs[0]])  # in every repeat the same
    seconds = sum(run.seconds for repeat in runs for run in repeat)
    prefill = sum(run.prefill_seconds for repeat in runs for run in repeat)
    rounds = sum(run.round_seconds for repeat in runs for run in repeat)
    rates, plain_rates = ([rate(repeat) for repeat in repeats] for repeats in (runs, plain))
    differing = {
        id for repeat in runs for id, run, answer in zip(ids, repeat, answers, strict=True) if run.tokens != answer
    }
    return Result(
        temperature,
        task,
        decoder,
        len(ids),
        rates,
        [a / b for a, b in zip(rates, plain_rates, strict=True)],
        [_round_rate(a) / _round_rate(b) for a, b in zip(runs, plain, strict=True)],
        number(counts.length),
        list(counts.accepted_at),
        [number(share) for share in counts.by_depth],
        sum(len(run.tokens) for run in runs[0]),
        counts.rounds,
        prefill / seconds,
        (seconds - prefill - rounds) / seconds,
        sorted(differing),
    )


def means(results: Sequence[Result]) -> list[Result]:
    """The mean over the tasks for each decoder; none if there is one task."""
    by_decoder = {d: [r for r in results if r.decoder == d] for d in dict.fromkeys(r.decoder for r in results)}
    return [_mean(of_decoder) for of_decoder in by_decoder.values() if len(of_decoder) > 1]


def _mean(results: Sequence[Result]) -> Result:
    """The mean of a decoder's tasks, each counting alike; acceptance by depth is of all tasks' rounds together."""
    first, num = results[0], len(results)

    def by_repeat(name: str) -> list[float]:
        return [sum(values) / num for values in zip(*(getattr(result, name) for result in results), strict=True)]

    counts = Acceptance.total([Acceptance(result.target_passes, tuple(result.accepted_at)) for result in results])
    lengths = [result.acceptance_length for result in results if result.acceptance_length is not None]
    return Result(
        first.temperature,
        MEAN,
        first.decoder,
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
    """The value, or None for nan, which JSON does not have."""
    return None if math.isnan(value) else value
