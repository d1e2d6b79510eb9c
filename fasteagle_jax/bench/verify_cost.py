"""`fasteagle bench --sweep rows`: what a target pass over several rows costs against one row, and whole rounds.

A tree of M nodes is a pass over M rows. With the acceptance, these ratios decide which tree pays on a device.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from fasteagle_jax.bench.decoders import DecoderSpec
from fasteagle_jax.bench.figures import show
from fasteagle_jax.bench.progress import Parts
from fasteagle_jax.bench.prompts import CHUNK, Models, prompt_slots
from fasteagle_jax.bench.sweeps import Outcome, check_trained, machine
from fasteagle_jax.bench.timing import Spread
from fasteagle_jax.decoding.prefill import pad_prompts
from fasteagle_jax.decoding.sampling import Sampling, choose, make_sampling
from fasteagle_jax.decoding.sampling_fields import from_options
from fasteagle_jax.decoding.speculative import advance, num_levels_of, start
from fasteagle_jax.decoding.state import make_stop
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.decoding.tree_selection import tree_choices
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.kv_cache import Cache
from fasteagle_jax.targets.experts import relative_reads

ROWS = (1, 2, 4, 8, 16, 32)
ROUNDS = 4  # timed together
READ_BYTES = 2**28  # of a vector that is summed, to see what the device can read
SIDE = 1024  # of a matrix that is squared, to see what it can multiply

K = TypeVar("K")


@dataclasses.dataclass(frozen=True)
class Cost:
    """The time of a pass or a round, over the repeats."""

    name: str
    milliseconds: Spread
    ratio: Spread  # to a pass over one row, or to a plain round, in the same repeat


@functools.partial(jax.jit, static_argnames="num_rows")
def verify_pass(target: Any, cache: Cache, sampling: Sampling, *, num_rows: int) -> jax.Array:
    """The tokens int32 [1, M] chosen after each of M = `num_rows` rows: forward pass, head and choice."""
    tokens = jnp.arange(num_rows)[None]
    positions = cache.length[:, None] + tokens
    out = target(tokens, positions, jnp.tril(jnp.ones((1, num_rows, num_rows), bool)), cache)
    return choose(target.logits(out.hidden), positions + 1, sampling)


def rows(
    args: argparse.Namespace,
    models: Models,
    drafters: Mapping[Path, Any],
    decoders: Sequence[DecoderSpec],
    first_turns: list[list[int]],
    parts: Parts,
) -> Outcome:
    """Times passes over ROWS and rounds of the first drafter's trees of `auto`, interleaved, after the first prompt."""
    check_trained(decoders)
    trained = drafters[decoders[1].folder]  # type: ignore[index]
    prompts, lengths = pad_prompts(first_turns[:1], prompt_slots(len(first_turns[0])))
    sampling = make_sampling(1, **from_options(args) | {"temperature": args.temperature[0]})
    max_new = args.max_len - prompts.shape[1]
    if max_new <= (most := ROUNDS * (trained.num_levels + 1)):  # a row that is done would be timed doing nothing
        raise UserError(
            f"--max-len {args.max_len} leaves {max(max_new, 0)} tokens after a prompt of {prompts.shape[1]}: "
            f"give {prompts.shape[1] + most + 1} or more, or a task whose first prompt is shorter"
        )
    decoders_of_auto = {
        f"round, {tree or 'plain'}": (None if tree is None else trained, tree)
        for tree in tree_choices(trained.num_levels, functools.partial(relative_reads, models.target.config))
    }
    rounds = round_timers(models.target, decoders_of_auto, first_turns[0], sampling, max_new)
    sizes: dict[str, Any] = {"max_new": max_new, "num_levels": num_levels_of(None, None), "chunk": CHUNK}
    cache = start(models.target, None, prompts, lengths, sampling, make_stop(1, max_new), **sizes)[0].target_cache
    passes: dict[str, Callable[[], float]] = {
        f"pass, rows: {m}": functools.partial(_seconds, verify_pass, models.target, cache, sampling, num_rows=m)
        for m in ROWS
    }
    vector, square = jnp.ones(READ_BYTES // 4, jnp.float32), jnp.ones((SIDE, SIDE), jnp.float32)
    device: dict[str, Callable[[], float]] = {
        "read": functools.partial(_seconds, jax.jit(jnp.sum), vector),
        "multiply": functools.partial(_seconds, jax.jit(jnp.matmul), square, square),
    }
    timed = passes | rounds | device
    seconds = interleaved(timed, args.repeats)

    costs = []
    for group in (passes, rounds):
        one = seconds[next(iter(group))]
        for name in group:
            ratios = [a / b for a, b in zip(seconds[name], one, strict=True)]
            costs.append(Cost(name, Spread.of([1e3 * second for second in seconds[name]]), Spread.of(ratios)))
    _print(f"batch 1, {cache.num_slots} slots, {models.dtype}, {machine()}", costs)
    read = Spread.of([READ_BYTES / second / 1e9 for second in seconds["read"]])  # GB/s
    multiply = Spread.of([2 * SIDE**3 / second / 1e9 for second in seconds["multiply"]])  # GFLOP/s, float32
    print(f"the device reads {read.words()} GB/s and multiplies {multiply.words()} GFLOP/s in float32")
    report = {"costs": [dataclasses.asdict(cost) for cost in costs]}
    return Outcome(report | {"read": dataclasses.asdict(read), "multiply": dataclasses.asdict(multiply)}, {}, 0)


def round_timers(
    target: Any,
    decoders: Mapping[K, tuple[Any | None, TreeSpec | None]],
    tokens: Sequence[int],
    sampling: Sampling,
    max_new: int,
) -> dict[K, Callable[[], float]]:
    """For each decoder, a drafter with its tree or (None, None), a function that times a round after a prompt.

    A call returns the mean seconds of the ROUNDS after prefill; no token ends the answer.
    """
    prompts, lengths = pad_prompts([list(tokens)], prompt_slots(len(tokens)))
    stop = make_stop(1, max_new)
    count = jnp.asarray(ROUNDS)

    def timer(drafter: Any | None, tree: TreeSpec | None) -> Callable[[], float]:
        sizes: dict[str, Any] = {"max_new": max_new, "num_levels": num_levels_of(drafter, tree), "chunk": CHUNK}
        prefilled, vocab = start(target, drafter, prompts, lengths, sampling, stop, **sizes)
        run = functools.partial(advance, tree=tree or TreeSpec())

        def time_rounds() -> float:
            state = jax.block_until_ready(jax.tree.map(jnp.copy, prefilled))  # `advance` consumes it
            return _seconds(run, target, drafter, vocab, state, sampling, stop, count) / ROUNDS

        return time_rounds

    return {key: timer(drafter, tree) for key, (drafter, tree) in decoders.items()}


def interleaved(
    timed: Mapping[K, Callable[[], float]], repeats: int, report: Callable[[], object] = lambda: None
) -> dict[K, list[float]]:
    """What each call returns in each repeat, after one call that is not counted; `report` is called after each
    repeat."""
    for run in timed.values():  # compiled, its memory touched
        run()
    seconds: dict[K, list[float]] = {name: [] for name in timed}
    for repeat in range(repeats):
        first = repeat % len(timed)  # no program always comes first
        for name in [*list(timed)[first:], *list(timed)[:first]]:
            seconds[name].append(timed[name]())
        report()
    return seconds


def _seconds(run: Callable[..., Any], *args: Any, **static: Any) -> float:
    """Seconds of one call, to its result."""
    started = time.perf_counter()
    jax.block_until_ready(run(*args, **static))
    return time.perf_counter() - started


def _print(title: str, costs: Sequence[Cost]) -> None:
    rows = [(cost.name, cost.milliseconds.words(), cost.ratio.words()) for cost in costs]
    show(title, ("", "ms (min to max)", "ratio (min to max)"), rows, left=1)
