"""`fasteagle bench --sweep`: a drafter over its trees, and the engine over numbers of slots.

`levels`, `nodes`, `tree`: the benchmark with other trees; `tree` compares the kinds at equal numbers of nodes.
`slots`: throughput, plain against trees, on the same requests interleaved in one run, and every token compared; beside
other programs with the same weights, if wanted.
`memory`: what caches and programs take, with the drafter's window and without; nothing is decoded.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from fasteagle_jax.bench.decoders import PLAIN, DecoderSpec
from fasteagle_jax.bench.figures import show
from fasteagle_jax.bench.peers import Peer, load_peer
from fasteagle_jax.bench.progress import Parts, Progress
from fasteagle_jax.bench.prompts import Models
from fasteagle_jax.bench.runner import MEAN, Result
from fasteagle_jax.bench.timing import Spread
from fasteagle_jax.decoding.acceptance import Acceptance
from fasteagle_jax.decoding.sampling_fields import from_options
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.engine import slots as device
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import Completion, SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.loading import locate

LEAST_REQUESTS = 8
MIB = 2**20
NODES = (4, 8, 12, 16, 24, 32)  # of --sweep nodes
WIDTHS = (2, 4)  # of --sweep tree: backbone's, whose nodes the others then have
ABLATIONS = ("levels", "nodes", "tree")


class Outcome(NamedTuple):
    """The result of a measurement."""

    report: dict[str, Any]  # for JSON
    figures: dict[str, Callable[[], Any]]  # by file name
    differing: int  # answers that are not plain decoding's


def machine() -> str:
    """The machine that measures, in words."""
    return f"{jax.devices()[0].device_kind} ({jax.default_backend()}, {os.cpu_count()} CPU cores)"


# --- trees ------------------------------------------------------------------------------------------------------


class Ablation(NamedTuple):
    """A point of a sweep over trees."""

    sweep: str  # of ABLATIONS
    drafter: str  # its name
    value: int | str
    decoder: DecoderSpec

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"sweep": self.sweep, "drafter": self.drafter, "value": self.value, "tree": self.decoder.tree}


def ablation(key: str, decoder: DecoderSpec, num_levels: int) -> list[Ablation]:
    """The points of a sweep for a drafter of N levels; its own tree gives what is not swept."""
    assert decoder.tree is not None
    own = TreeSpec.parse(decoder.tree)
    kept: dict[str, Any] = {"levels": own.levels, "lookup": own.lookup}
    trees: dict[int | str, TreeSpec] = {}
    if key == "levels":
        deepest = dataclasses.replace(own, levels=None).num_levels(num_levels)
        trees = {n: dataclasses.replace(own, levels=n) for n in range(1, deepest + 1)}
    elif key == "nodes":
        trees = {n: TreeSpec("best_first", nodes=n, **kept) for n in NODES}
    else:
        kinds = [TreeSpec("chain", **kept)]
        kinds += [TreeSpec("backbone", width=width, **kept) for width in WIDTHS]
        for tree in kinds:
            nodes = tree.num_nodes(num_levels)
            trees |= {str(t): t for t in (tree, TreeSpec("best_first", nodes=nodes, **kept))}
    return [Ablation(key, decoder.name, x, dataclasses.replace(decoder, tree=str(tree))) for x, tree in trees.items()]


def points(
    key: str, ablations: Sequence[Ablation], results: Sequence[Result]
) -> tuple[list[tuple[str, Any, Result]], list[Result]]:
    """(drafter, value, result) of a sweep, and plain decoding's results; of several tasks, their mean."""
    several = any(result.task == MEAN for result in results)
    chosen = [result for result in results if not several or result.task == MEAN]
    swept = [
        (point.drafter, point.value, result)
        for point in ablations
        for result in chosen
        if point.sweep == key and result.decoder == point.decoder
    ]
    return swept, [result for result in chosen if result.decoder.name == PLAIN]


def show_ablations(title: str, keys: Sequence[str], ablations: Sequence[Ablation], results: Sequence[Result]) -> None:
    """Prints a table for each sweep of the results at one temperature."""
    for key in keys:
        rows = []
        swept, plain = points(key, ablations, results)
        for name, value, r in [(PLAIN, "", plain[0]), *swept]:
            rows.append(
                (
                    name,
                    str(value),
                    "" if r.decoder.tree is None else str(_num_nodes(r)),
                    f"{Spread.of(r.tokens_per_second).median:.1f}",
                    "" if name == PLAIN else Spread.of(r.speedup).words(),
                    "-" if r.acceptance_length is None else f"{r.acceptance_length:.2f}",
                    f"{len(r.differing)} of {r.cases}",
                )
            )
        columns = ("drafter", key, "nodes", "tok/s", "speed-up (min to max)", "tau", "differ")
        show(title, columns, rows)


def _num_nodes(result: Result) -> int:
    assert result.decoder.tree is not None
    return TreeSpec.parse(result.decoder.tree).num_nodes(len(result.accepted_at))


# --- slots ------------------------------------------------------------------------------------------------------


def throughput(
    args: argparse.Namespace,
    models: Models,
    drafters: Mapping[Path, Any],
    decoders: Sequence[DecoderSpec],
    prompts: Sequence[list[int]],
    parts: Parts,
) -> Outcome:
    """Measures tokens a second over args.slots and prints the table."""
    check_trained(decoders)
    sampling = from_options(args) | {"temperature": args.temperature[0]}
    params = SamplingParams(**sampling, max_new_tokens=args.max_new)
    peers = {name: load_peer(name, locate(args.target), models.stop_tokens, args.max_len) for name in args.beside}

    def peers_of(slots: int) -> dict[str, Peer]:
        return {name: peer for name, peer in peers.items() if slots <= (peer.most_rows or slots)}

    if idle := peers.keys() - {name for slots in args.slots for name in peers_of(slots)}:
        raise UserError(f"--beside {idle.pop()} decodes one row at a time: have 1 among the --slots")
    runs = {slots: args.repeats * (len(decoders) + len(peers_of(slots))) for slots in args.slots}
    progress = Progress(sum(runs.values()), "run")

    def measure(slots: int) -> list[dict[str, Any]]:
        engines = {decoder: _engine(args, models, drafters, slots, decoder) for decoder in decoders}
        beside = peers_of(slots)
        num_requests = max(LEAST_REQUESTS, 2 * slots)
        asked = list(itertools.islice(itertools.cycle(prompts), num_requests))
        seeded = [dataclasses.replace(params, seed=(args.seed + i) % 2**32) for i in range(num_requests)]
        for engine in engines.values():  # compiled, measured, its memory touched
            engine.warm_up()
            engine.generate(asked[:slots], seeded[:slots])
            engine.seconds = engine.device_seconds = 0.0
        for peer in beside.values():
            peer.generate(asked[:slots], dataclasses.replace(params, max_new_tokens=2), slots)
        everyone: list[DecoderSpec | str] = [*decoders, *beside]
        rates: dict[DecoderSpec | str, list[float]] = {one: [] for one in everyone}
        answers: dict[DecoderSpec, list[Completion]] = {}
        differing: dict[DecoderSpec | str, set[int]] = {one: set() for one in everyone}  # requests, in any repeat
        for repeat in range(args.repeats):
            first = repeat % len(everyone)  # none always comes first
            tokens: dict[DecoderSpec | str, list[Sequence[int]]] = {}
            for one in [*everyone[first:], *everyone[:first]]:
                started = time.perf_counter()
                if isinstance(one, DecoderSpec):
                    answers[one] = engines[one].generate(asked, seeded)
                    tokens[one] = [completion.tokens for completion in answers[one]]
                else:
                    tokens[one] = list(beside[one].generate(asked, params, slots))
                seconds = time.perf_counter() - started
                rates[one].append(sum(map(len, tokens[one])) / seconds)
                progress.update(f"{slots} slots, {one}: {rates[one][-1]:.1f} tokens/s")
            for one in everyone:
                pairs = enumerate(zip(tokens[one], tokens[decoders[0]], strict=True))
                differing[one].update(i for i, (ours, plain) in pairs if list(ours) != list(plain))
        found = []
        for one in everyone:
            ratio = Spread.of([a / b for a, b in zip(rates[one], rates[decoders[0]], strict=True)])
            # The peers' noise is another.
            others = None if one in beside and params.temperature else len(differing[one])
            point = Point(slots, str(one), num_requests, rates[one], ratio, differing=others)
            if isinstance(one, DecoderSpec):
                engine = engines[one]
                point = dataclasses.replace(
                    point,
                    acceptance_length=Acceptance.total([completion.statistics for completion in answers[one]]).length,
                    host_share=1 - engine.device_seconds / engine.seconds,
                    memory=dataclasses.asdict(engine.memory),
                )
            found.append(point)
        jax.clear_caches()  # programs of other numbers of slots are not run again
        return [dataclasses.asdict(point) for point in found]

    records = []
    for slots in args.slots:
        name = f"{slots} slots"
        if name in parts:
            progress.update(f"{name} are measured already", runs[slots])
        records += parts.get(name, functools.partial(measure, slots))
    progress.close()
    found = [Point(**{**record, "ratio": Spread(**record["ratio"])}) for record in records]
    title = (
        f"{args.max_new} new tokens at most, max_len {args.max_len}, temperature {params.temperature:g},"
        f" {models.dtype}, {machine()}"
    )
    _print_throughput(title, found)
    report = {
        "params": dataclasses.asdict(params),
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "points": records,
    }
    differing = sum(point.differing or 0 for point in found if point.decoder not in args.beside)
    return Outcome(report, {"slots": functools.partial(plot, found, title)}, differing)


@dataclasses.dataclass(frozen=True)
class Point:
    """A decoder, or another program, at one number of slots; lists are by repeat."""

    slots: int
    decoder: str
    requests: int
    tokens_per_second: list[float]
    ratio: Spread  # to plain
    differing: int | None  # answers; None where they are not to be the same
    acceptance_length: float | None = None  # None, as what follows, of other programs
    host_share: float | None = None  # of the time, in which the device waited for the host
    memory: dict[str, int] | None = None  # bytes, as stated by the engine


def check_trained(decoders: Sequence[DecoderSpec]) -> None:
    """Raises UserError for simulated drafters, which know one answer alone."""
    for decoder in decoders:
        if decoder.rates:
            raise UserError(
                f"{decoder.name} is simulated, request by request: the engine takes drafters of folders alone"
            )


def _engine(
    args: argparse.Namespace, models: Models, drafters: Mapping[Path, Any], slots: int, decoder: DecoderSpec
) -> Engine:
    drafter = None if decoder.folder is None else drafters[decoder.folder]
    ends = models.stop_tokens
    return Engine(models.target, drafter, models.tokenizer, ends, slots=slots, max_len=args.max_len, tree=decoder.tree)


def _print_throughput(title: str, points: Sequence[Point]) -> None:
    rows = []
    for p in points:
        rows.append(
            (
                p.decoder,
                str(p.slots),
                str(p.requests),
                Spread.of(p.tokens_per_second).words(1),
                "" if p.decoder == PLAIN else p.ratio.words(),
                "" if p.acceptance_length is None else f"{p.acceptance_length:.2f}",
                "" if p.host_share is None else f"{p.host_share:.1%}",
                "" if p.differing is None else str(p.differing),
            )
        )
    columns = ("drafter", "slots", "requests", "tok/s (min to max)", "ratio (min to max)", "tau", "host", "differ")
    show(title, columns, rows, left=1)


def plot(points: Sequence[Point], title: str) -> Any:
    """A figure of throughput over slots, a line a decoder, with the spread of the repeats."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for decoder in dict.fromkeys(point.decoder for point in points):
        shown = [point for point in points if point.decoder == decoder]
        spreads = [Spread.of(point.tokens_per_second) for point in shown]
        slots = [point.slots for point in shown]
        axes.plot(slots, [s.median for s in spreads], marker="o", label=decoder)
        axes.fill_between(slots, [s.min for s in spreads], [s.max for s in spreads], alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks([point.slots for point in points], [str(point.slots) for point in points])
    axes.set_xlabel("slots")
    axes.set_ylabel("new tokens a second, all requests")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


# --- memory -----------------------------------------------------------------------------------------------------


def memory(
    args: argparse.Namespace,
    models: Models,
    drafters: Mapping[Path, Any],
    decoders: Sequence[DecoderSpec],
    prompts: Sequence[list[int]],
    parts: Parts,
) -> Outcome:
    """Prints the memory of engines of args.slots with each drafter, as stated and as compiled."""
    check_trained(decoders)
    rows, records = [], []
    for decoder, window, slots in itertools.product(decoders[1:], (None, args.window), args.slots):
        assert decoder.folder is not None
        drafter = nnx.merge(*nnx.split(drafters[decoder.folder]))
        drafter.config = dataclasses.replace(drafter.config, window=window)
        engine = Engine(
            models.target,
            drafter,
            models.tokenizer,
            models.stop_tokens,
            slots=slots,
            max_len=args.max_len,
            tree=decoder.tree,
        )
        stated = engine.memory
        compiled = compiled_round(engine)
        record = {
            "drafter": decoder.name,
            "tree": decoder.tree,
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
        size_words = (f"{size / MIB:.0f}" for size in sizes)
        rows.append((str(decoder), str(slots), "none" if window is None else str(window), *size_words))
    names = ("slots", "window", "weights", "target cache", "drafter cache", "work, stated", "arguments", "temporaries")
    show(f"MiB; max_len {args.max_len}, {models.dtype}", ("drafter", *names), rows, left=1)
    return Outcome({"points": records}, {}, 0)


def compiled_round(engine: Engine) -> Any:
    """The compiler's memory analysis of the engine's rounds, all slots in use."""
    slots = engine.runner.slots_shape(engine.num_slots)
    lowered = device.advance.lower(
        engine.target,
        engine.drafter,
        engine.runner.vocab,
        slots,
        np.zeros(engine.num_slots, bool),
        np.int32(1),
        np.asarray(False),
        tree=engine.trees[-1],
        shared_noise=True,
    )
    return lowered.compile().memory_analysis()
