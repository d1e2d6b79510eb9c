"""`fasteagle bench --sweep`: the engine over numbers of slots.

`slots`: throughput, plain against trees, on the same requests in turns in one run, and every token compared.
`memory`: what caches and programs take, with the drafter's window and without; nothing is decoded.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from fasteagle_jax import slots as device
from fasteagle_jax.commands.models import Models
from fasteagle_jax.commands.terminal import write_new
from fasteagle_jax.commands.timing import Spread
from fasteagle_jax.engine import Engine
from fasteagle_jax.errors import UserError
from fasteagle_jax.metrics import Acceptance
from fasteagle_jax.requests import Completion, SamplingParams

LEAST_REQUESTS = 8
TOKENS_DIFFER = 1  # exit code
PLAIN = "plain"
MIB = 2**20


def throughput(args: argparse.Namespace, models: Models, prompts: Sequence[list[int]], trees: Sequence[str]) -> int:
    """Measures tokens a second over args.slots, prints the table, writes JSON and plot; returns the exit code."""
    params = SamplingParams(
        temperature=(args.temperature or [0.0])[0],
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        max_new_tokens=args.max_new,
    )
    points = []
    for slots in tqdm(args.slots, unit="number of slots", disable=None):
        ways = {PLAIN: _engine(args, models, slots, None)} | {
            tree: _engine(args, models, slots, tree) for tree in trees
        }
        num_requests = max(LEAST_REQUESTS, 2 * slots)
        asked = list(itertools.islice(itertools.cycle(prompts), num_requests))
        its = [dataclasses.replace(params, seed=(args.seed + i) % 2**32) for i in range(num_requests)]
        for engine in ways.values():  # compiled, measured, its memory touched
            engine.warm_up()
            engine.generate(asked[:slots], its[:slots])
            engine.seconds = engine.device_seconds = 0.0
        rates: dict[str, list[float]] = {way: [] for way in ways}
        made: dict[str, list[Completion]] = {}
        for repeat in range(args.repeats):
            order = list(ways)[repeat % len(ways) :] + list(ways)[: repeat % len(ways)]  # no way always comes first
            for way in order:
                started = time.perf_counter()
                made[way] = ways[way].generate(asked, its)
                seconds = time.perf_counter() - started
                rates[way].append(sum(len(completion.tokens) for completion in made[way]) / seconds)
        for way, engine in ways.items():
            took = [completion.statistics for completion in made[way]]
            counts = Acceptance(
                sum(t.rounds for t in took), tuple(map(sum, zip(*(t.accepted_at for t in took), strict=True)))
            )
            points.append(
                Point(
                    slots,
                    way,
                    num_requests,
                    rates[way],
                    Spread.of([a / b for a, b in zip(rates[way], rates[PLAIN], strict=True)]),
                    counts.length,
                    1 - engine.device_seconds / engine.seconds,
                    sum(a.tokens != b.tokens for a, b in zip(made[way], made[PLAIN], strict=True)),
                    dataclasses.asdict(engine.memory),
                )
            )
        del ways, engine
        jax.clear_caches()  # programs of other numbers of slots are not run again
    title = (
        f"{args.max_new} new tokens at most, max_len {args.max_len}, temperature {params.temperature:g},"
        f" {models.dtype}, {machine()}"
    )
    _print_throughput(title, points)
    report = {
        "machine": machine(),
        "jax": jax.__version__,
        "dtype": models.dtype,
        "target": models.fingerprint,
        "params": dataclasses.asdict(params),
        "max_len": args.max_len,
        "repeats": args.repeats,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "points": [dataclasses.asdict(point) for point in points],
    }
    if args.json:
        write_new(args.json, json.dumps(report, indent=2) + "\n")
    if args.plot:
        plot(points, title, args.plot)
    differing = sum(point.differing for point in points)
    if differing and models.dtype == "float32":
        print(f"warning: {differing} answers differ, in float32 none should", file=sys.stderr)
        return TOKENS_DIFFER
    return 0


@dataclasses.dataclass(frozen=True)
class Point:
    """One way of decoding at one number of slots; lists are by repeat."""

    slots: int
    way: str
    requests: int
    tokens_per_second: list[float]
    ratio: Spread  # to plain
    acceptance_length: float
    host_share: float  # of the time, in which the device waited for the host
    differing: int  # answers
    memory: dict[str, int]  # bytes, as stated by the engine


def machine() -> str:
    """What it was measured on, in words."""
    return f"{jax.devices()[0].device_kind} ({jax.default_backend()}, {os.cpu_count()} CPU cores)"


def _engine(args: argparse.Namespace, models: Models, slots: int, tree: str | None) -> Engine:
    drafter = models.drafter if tree is not None else None
    ends = models.stop_tokens
    return Engine(models.target, drafter, models.tokenizer, ends, slots=slots, max_len=args.max_len, tree=tree)


def _print_throughput(title: str, points: Sequence[Point]) -> None:
    table = Table(title=title)
    names = ("slots", "requests", "way", "tok/s (min to max)", "ratio (min to max)", "tau", "host", "differ")
    for name in names:
        table.add_column(name, justify="left" if name == "way" else "right")
    for p in points:
        rate = Spread.of(p.tokens_per_second)
        table.add_row(
            str(p.slots),
            str(p.requests),
            p.way,
            f"{rate.median:.1f} ({rate.min:.1f} to {rate.max:.1f})",
            "" if p.way == PLAIN else f"{p.ratio.median:.2f} ({p.ratio.min:.2f} to {p.ratio.max:.2f})",
            f"{p.acceptance_length:.2f}",
            f"{p.host_share:.1%}",
            str(p.differing),
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def plot(points: Sequence[Point], title: str, path: Path) -> None:
    """A PNG of throughput over slots, a line a way, with the spread of the repeats."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for way in dict.fromkeys(point.way for point in points):
        its = [point for point in points if point.way == way]
        spreads = [Spread.of(point.tokens_per_second) for point in its]
        slots = [point.slots for point in its]
        axes.plot(slots, [s.median for s in spreads], marker="o", label=way)
        axes.fill_between(slots, [s.min for s in spreads], [s.max for s in spreads], alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks([point.slots for point in points], [str(point.slots) for point in points])
    axes.set_xlabel("slots")
    axes.set_ylabel("new tokens a second, all requests")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


# --- memory -----------------------------------------------------------------------------------------------------


def memory(args: argparse.Namespace, models: Models, tree: str) -> int:
    """Prints what engines of args.slots take, as stated and as compiled; returns the exit code."""
    if models.drafter is None:
        raise UserError("--sweep memory is about a drafter's cache: give --drafter")
    table = Table(title=f"MiB; max_len {args.max_len}, tree {tree}, {models.dtype}")
    names = ("slots", "window", "weights", "target cache", "drafter cache", "work, stated", "arguments", "temporaries")
    for name in names:
        table.add_column(name, justify="right")
    records = []
    for window, slots in itertools.product((None, args.window), args.slots):
        drafter = nnx.merge(*nnx.split(models.drafter))
        drafter.config = dataclasses.replace(drafter.config, window=window)
        engine = Engine(
            models.target, drafter, models.tokenizer, models.stop_tokens, slots=slots, max_len=args.max_len, tree=tree
        )
        stated = engine.memory
        compiled = compiled_round(engine)
        record = {
            "slots": slots,
            "window": window,
            **dataclasses.asdict(stated),
            "arguments": int(compiled.argument_size_in_bytes),
            "temporaries": int(compiled.temp_size_in_bytes),
        }
        records.append(record)
        sizes = (
            stated.target + stated.drafter,
            stated.target_cache,
            stated.drafter_cache,
            stated.work,
            record["arguments"],
            record["temporaries"],
        )
        table.add_row(str(slots), "none" if window is None else str(window), *(f"{size / MIB:.0f}" for size in sizes))
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    if args.json:
        report = {"machine": machine(), "jax": jax.__version__, "max_len": args.max_len, "tree": tree}
        write_new(args.json, json.dumps({**report, "points": records}, indent=2) + "\n")
    return 0


def compiled_round(engine: Engine) -> Any:
    """The compiler's own account of the memory of the engine's rounds, all slots in use."""
    slots = jax.eval_shape(lambda: engine._empty(engine.num_slots))
    lowered = device.advance.lower(
        engine.target,
        engine.drafter,
        engine._tied,
        slots,
        np.zeros(engine.num_slots, bool),
        np.int32(1),
        np.asarray(False),
        tree=engine.trees[-1],
        shared_noise=True,
    )
    return lowered.compile().memory_analysis()
