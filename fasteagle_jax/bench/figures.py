"""The benchmark's tables for the terminal and its figures."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fasteagle_jax.bench.breakdown import PARTS, Breakdown
from fasteagle_jax.bench.decoders import PLAIN, DecoderSpec
from fasteagle_jax.bench.runner import MEAN, Result
from fasteagle_jax.bench.timing import Spread

COLOURS = {"target": "C0", "draft": "C1", "tree": "C2", "choose": "C3", "commit": "C4", "rest": "C7"}


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> None:
    """Prints a table whose first `left` columns hold words, as Markdown has them."""
    table = Table(title=title, box=box.MARKDOWN)
    for i, name in enumerate(columns):
        table.add_column(Text(name), justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*map(Text, row))  # names of files and variants are no markup
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def show_results(title: str, results: Sequence[Result]) -> None:
    """Prints a row for each result."""
    columns = (
        "task",
        "drafter",
        "tok/s",
        "speed-up (min to max)",
        "rounds alone",
        "tau",
        "by depth",
        "prefill",
        "host",
        "differ",
    )
    rows = []
    for r in results:
        plain = r.decoder.name == PLAIN
        rows.append(
            (
                r.task,
                str(r.decoder),
                f"{Spread.of(r.tokens_per_second).median:.1f}",
                "" if plain else Spread.of(r.speedup).words(),
                "" if plain else f"{Spread.of(r.rounds_speedup).median:.2f}",
                "-" if r.acceptance_length is None else f"{r.acceptance_length:.2f}",
                " ".join("-" if share is None else f"{share:.2f}" for share in r.acceptance_by_depth),
                f"{r.prefill_share:.0%}",
                f"{r.host_share:.1%}",
                f"{len(r.differing)} of {r.cases}",
            )
        )
    show(title, columns, rows)


def show_breakdowns(breakdowns: Sequence[Breakdown]) -> None:
    """Prints a row for each round."""
    rows = []
    for s in breakdowns:
        parts = ("" if name not in s.parts else f"{s.parts[name].median:.2f}" for name in PARTS)
        whole = (f"{s.rest:.2f}", s.round.words(), f"{s.overhead:.0%}")
        rows.append((str(s.decoder), f"{s.temperature:g}", str(s.nodes), *parts, *whole))
    columns = ("drafter", "temperature", "nodes", *PARTS, "rest", "round (min to max)", "overhead")
    show("milliseconds of a round, medians of the parts alone and of the whole", columns, rows, left=1)
    print(
        "rest: the round less its parts; overhead: the share of it that is neither the target's nor the drafter's pass."
        " A drafter without a tree part builds its tree in its draft."
    )


# --- figures ----------------------------------------------------------------------------------------------------


def _panels(temperatures: Sequence[float], width: float = 5.0) -> tuple[Any, list[Any]]:
    """A figure with a panel a temperature."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width * len(temperatures), 6.0), 4.5), layout="constrained")
    panels = figure.subplots(1, len(temperatures), squeeze=False, sharey=True)[0]
    for axes, temperature in zip(panels, temperatures, strict=True):
        axes.set_title(f"temperature {temperature:g}", fontsize="small")
        axes.grid(alpha=0.3, axis="y")
    return figure, list(panels)


def _temperatures(found: Sequence[Any]) -> list[float]:
    return list(dict.fromkeys(one.temperature for one in found))


def _decoders(found: Sequence[Any]) -> list[DecoderSpec]:
    return list(dict.fromkeys(one.decoder for one in found))


def speedup_figure(results: Sequence[Result]) -> Any:
    """Bars of the speed-up by task, the median of the repeats with its spread."""
    temperatures = _temperatures(results)
    decoders = [decoder for decoder in _decoders(results) if decoder.name != PLAIN]
    tasks = list(dict.fromkeys(result.task for result in results))
    figure, panels = _panels(temperatures, width=1.5 + 0.9 * len(tasks))
    by = {(r.temperature, r.task, r.decoder): Spread.of(r.speedup) for r in results}
    for axes, temperature in zip(panels, temperatures, strict=True):
        for i, decoder in enumerate(decoders):
            spreads = [by[temperature, task, decoder] for task in tasks]
            at = [place + (i + 0.5) * 0.8 / len(decoders) - 0.4 for place in range(len(tasks))]
            errors = [[s.median - s.min for s in spreads], [s.max - s.median for s in spreads]]
            axes.bar(at, [s.median for s in spreads], 0.8 / len(decoders), yerr=errors, capsize=2, label=str(decoder))
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    panels[0].set_ylabel("tokens a second, over plain decoding's")
    panels[-1].legend(fontsize="small")
    return figure


def acceptance_figure(results: Sequence[Result]) -> Any:
    """Lines of the conditional acceptance by depth, all tasks together."""
    last = [result for result in results if result.decoder.name != PLAIN]
    if any(result.task == MEAN for result in last):
        last = [result for result in last if result.task == MEAN]
    temperatures = _temperatures(last)
    figure, panels = _panels(temperatures)
    for axes, temperature in zip(panels, temperatures, strict=True):
        for result in last:
            if result.temperature == temperature:
                depths = [(d, s) for d, s in enumerate(result.acceptance_by_depth, 1) if s is not None]
                axes.plot([d for d, _ in depths], [s for _, s in depths], marker="o", label=str(result.decoder))
        axes.set_xlabel("depth")
        axes.set_ylim(0, 1)
    panels[0].set_ylabel("accepted, of those whose predecessor was")
    panels[-1].legend(fontsize="small")
    return figure


def breakdown_figure(breakdowns: Sequence[Breakdown]) -> Any:
    """Stacked bars of a round's milliseconds."""
    temperatures = _temperatures(breakdowns)
    figure, panels = _panels(temperatures)
    for axes, temperature in zip(panels, temperatures, strict=True):
        shown = [split for split in breakdowns if split.temperature == temperature]
        names = [str(split.decoder).replace(" ", "\n") for split in shown]
        bottoms = [0.0] * len(shown)
        for part in (*PARTS, "rest"):
            heights = [
                max(split.rest, 0.0) if part == "rest" else split.parts[part].median if part in split.parts else 0.0
                for split in shown
            ]
            axes.bar(names, heights, bottom=bottoms, label=part, color=COLOURS[part])
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        rounds = [split.round for split in shown]
        errors = [[s.median - s.min for s in rounds], [s.max - s.median for s in rounds]]
        axes.errorbar(names, [s.median for s in rounds], yerr=errors, fmt="k_", capsize=3, label="the whole, measured")
    panels[0].set_ylabel("milliseconds of a round")
    panels[-1].legend(fontsize="small")
    return figure


def ablation_figure(label: str, points: Sequence[tuple[str, Any, Result]], plain: Sequence[Result]) -> Any:
    """tau, and tokens a second with plain decoding's as a dashed line, over the values of a sweep.

    `points` are (drafter, value, result); `plain` the results of plain decoding.
    """
    from matplotlib.figure import Figure

    temperatures = _temperatures([result for *_, result in points])
    figure = Figure(figsize=(6.0 * 2, 4.0 * len(temperatures)), layout="constrained")
    grid = figure.subplots(len(temperatures), 2, squeeze=False)
    for (left, right), temperature in zip(grid, temperatures, strict=True):
        for name in dict.fromkeys(name for name, *_ in points):
            series = [(x, r) for who, x, r in points if who == name and r.temperature == temperature]
            at = [x for x, _ in series]
            left.plot(at, [r.acceptance_length for _, r in series], marker="o", label=name)
            rates = [Spread.of(r.tokens_per_second) for _, r in series]
            errors = [[s.median - s.min for s in rates], [s.max - s.median for s in rates]]
            right.errorbar(at, [s.median for s in rates], yerr=errors, marker="o", capsize=2, label=name)
        for result in plain:
            if result.temperature == temperature:
                right.axhline(Spread.of(result.tokens_per_second).median, color="black", linestyle="--", label=PLAIN)
        for axes, what in ((left, "tau"), (right, "tokens a second")):
            axes.set_ylabel(what)
            axes.set_xlabel(label)
            axes.set_title(f"temperature {temperature:g}", fontsize="small")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
            if any(isinstance(x, str) for _, x, _ in points):
                axes.tick_params(axis="x", rotation=30)
    return figure


def intervals_figure(title: str, estimates: Sequence[Mapping[str, Any]]) -> Any:
    """tau by task with its interval, a point a drafter and tree, of the records of `acceptance.Counts.estimates`."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(record["task"] for record in estimates))
    decoders = list(dict.fromkeys((record["drafter"], record["tree"]) for record in estimates))
    figure = Figure(figsize=(max(1.5 + 1.1 * len(tasks), 6.0), 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (name, tree) in enumerate(decoders):
        shown = [r for r in estimates if (r["drafter"], r["tree"]) == (name, tree) and r["tau"] is not None]
        at = [tasks.index(r["task"]) + (i + 0.5) * 0.8 / len(decoders) - 0.4 for r in shown]
        lengths = [r["tau"] for r in shown]
        errors = [[r["tau"] - r["interval"][0] for r in shown], [r["interval"][1] - r["tau"] for r in shown]]
        axes.errorbar(at, lengths, yerr=errors, fmt="o", capsize=2, label=f"{name} {tree}")
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axes.set_ylabel("tau, with intervals of 95%")
    axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small")
    return figure
