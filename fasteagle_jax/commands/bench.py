"""Measure plain against speculative decoding: the same prompts, weights and machine, in turns in one run.

Each prompt is decoded by itself (batch 1), plainly and with every tree, before the next one is; --repeats times. The
first message of a prompt of several turns is used. Times are of whole decodes, prefill included and compilation not.
The ratio of a repeat is speculative tokens/s over plain tokens/s, over all prompts. Every token is compared.

--sweep slots measures the engine instead: throughput, plain and with trees, over numbers of slots; --sweep memory says
what its caches take; --sweep rows what a target pass over several rows costs, and a round with each tree of `auto`.

Exit code 1 says that in float32 a token differed.

example:
  fasteagle bench --drafter runs/smollm2/drafter --prompts mt_bench.jsonl --prompts gsm8k.jsonl --limit 20 \\
      --tree chain --tree best_first:16 --temperature 0 --temperature 1 --json bench.json
  fasteagle bench --drafter runs/smollm2/drafter --prompts mt_bench.jsonl --sweep slots --slots 1 8 64 --plot slots.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from fasteagle_jax.commands import sweep, verify_cost
from fasteagle_jax.commands.models import Models, add_target_options, check_fits, decode, load_models
from fasteagle_jax.commands.terminal import Parser, add_filter_options, check_new, program, whole, write_new
from fasteagle_jax.commands.timing import Compilations, Spread
from fasteagle_jax.data import read_prompts
from fasteagle_jax.errors import UserError
from fasteagle_jax.metrics import Acceptance
from fasteagle_jax.sampling import Sampling, make_sampling
from fasteagle_jax.tokenizer import encode_chat
from fasteagle_jax.tree import Tree

TOKENS_DIFFER = 1  # exit code


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Measures as the command line says; returns the exit code."""
    return bench(_parser().parse_args(argv))


def _parser() -> Parser:
    parser = Parser(prog="fasteagle bench", description=__doc__)
    parser.add_argument("--prompts", action="append", required=True, metavar="SOURCE", help="repeatable")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="prompts of each source")
    parser.add_argument("--max-new", type=whole(2), default=128, metavar="T", help="tokens an answer (default 128)")
    parser.add_argument("--repeats", type=whole(1), default=3, metavar="R", help="default 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a new file for all numbers")
    sweep_options = parser.add_argument_group("sweeps of the engine")
    sweep_options.add_argument("--sweep", choices=("slots", "memory", "rows"), help="instead of the table of trees")
    sweep_options.add_argument("--slots", type=whole(1), nargs="+", default=[1, 2, 4, 8, 16, 32, 64], metavar="B")
    sweep_options.add_argument(
        "--max-len", type=whole(2), default=1024, metavar="T", help="of a request (default 1024)"
    )
    sweep_options.add_argument("--window", type=whole(1), default=512, metavar="W", help="of --sweep memory (512)")
    sweep_options.add_argument("--plot", type=Path, metavar="FILE", help="a new PNG, for --sweep slots")
    models = parser.add_argument_group("models")
    add_target_options(models)
    models.add_argument("--drafter", type=Path, required=True, metavar="FOLDER")
    models.add_argument(
        "--tree",
        action="append",
        metavar="T",
        help="chain, backbone:WIDTH or best_first:NODES; repeatable (default best_first:16)",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature", type=float, action="append", metavar="X", help="repeatable (default 0, which is greedy)"
    )
    add_filter_options(group)
    return parser


def bench(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON; returns the exit code."""
    # --- what was asked for -----------------------------------------------------------------------------------
    named = list(dict.fromkeys(args.tree or (["auto", "best_first:8"] if args.sweep else ["best_first:16"])))
    trees = [] if args.sweep else [Tree.parse(text) for text in named]
    temperatures = list(dict.fromkeys(args.temperature or [0.0]))
    check_new(args.json)
    check_new(args.plot)
    for temperature in temperatures:
        make_sampling(1, temperature, args.top_k, args.top_p, args.seed, args.min_p)
    prompts = [(source, prompt) for source in args.prompts for prompt in read_prompts(source, args.limit)]
    if not prompts:
        raise UserError("no prompt in any source: name other sources")

    models = load_models(args, args.drafter)
    cases = []
    for i, (_, prompt) in enumerate(prompts):
        tokens = encode_chat(models.tokenizer, [{"role": "user", "content": prompt.turns[0]}])
        check_fits(models, prompt.id, tokens, args.max_new)
        cases.append(Case(prompt.id, tokens, (args.seed + i) % 2**32))

    if args.sweep == "slots":
        return sweep.throughput(args, models, [case.tokens for case in cases], named)
    if args.sweep == "rows":
        return verify_cost.rows(args, models, cases[0].tokens)
    if args.sweep == "memory":
        return sweep.memory(args, models, next((text for text in named if text != "auto"), "best_first:8"))

    # --- decoding ---------------------------------------------------------------------------------------------
    def run(case: Case, tree: Tree | None, temperature: float) -> Run:
        sampling = make_sampling(1, temperature, args.top_k, args.top_p, case.seed, args.min_p)
        return _run(models, case, tree, sampling, args.max_new)

    ways: list[Tree | None] = [None, *trees]
    runs: dict[tuple[float, Tree | None], list[list[Run]]] = {}  # by repeat, by prompt
    with tqdm(total=len(temperatures) * (1 + args.repeats) * len(cases), unit="prompt", disable=None) as bar:
        late = 0
        for temperature in temperatures:
            # Everything runs once untimed: compiled, its memory touched.
            for case in cases:
                for way in ways:
                    run(case, way, temperature)
                bar.update()
            for repeat in range(args.repeats):
                of_repeat: dict[Tree | None, list[Run]] = {way: [] for way in ways}
                with Compilations() as compilations:
                    for i, case in enumerate(cases):
                        turn = (repeat + i) % len(ways)  # no way always comes first
                        for way in ways[turn:] + ways[:turn]:
                            of_repeat[way].append(run(case, way, temperature))
                        bar.update()
                late += compilations.number
                for way in ways:
                    runs.setdefault((temperature, way), []).append(of_repeat[way])

    # --- results ----------------------------------------------------------------------------------------------
    results = [
        compare(temperature, tree, runs[temperature, None], runs[temperature, tree])
        for temperature in temperatures
        for tree in trees
    ]
    report = {
        "device": sweep.machine(),
        "dtype": models.dtype,
        "jax": jax.__version__,
        "target": models.fingerprint,
        "drafter": dataclasses.asdict(models.drafter.config) if models.drafter is not None else None,
        "prompts": [case.id for case in cases],
        "prompt_tokens": [len(case.tokens) for case in cases],
        "max_new": args.max_new,
        "repeats": args.repeats,
        "seed": args.seed,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "batch": 1,
        "compilations_while_timed": late,
        "results": [dataclasses.asdict(result) for result in results],
    }
    _print_table(report, results)
    if late:
        print(f"warning: {late} programs were compiled while timed: the times are too long", file=sys.stderr)
    if args.json:
        write_new(args.json, json.dumps(report, indent=2) + "\n")
    differing = max(result.differing_prompts for result in results)
    if differing and models.dtype == "float32":
        print(f"warning: {differing} of {len(cases)} prompts differ, in float32 none should", file=sys.stderr)
        return TOKENS_DIFFER
    return 0


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt in tokens."""

    id: str
    tokens: list[int]
    seed: int


@dataclasses.dataclass(frozen=True)
class Run:
    """One decode of one prompt."""

    seconds: float
    tokens: list[int]
    acceptance: Acceptance


def _run(models: Models, case: Case, tree: Tree | None, sampling: Sampling, max_new: int) -> Run:
    """Decodes a prompt, plainly where there is no tree, between two looks at the clock."""
    drafter = None if tree is None else models.drafter
    jax.block_until_ready(sampling)
    started = time.perf_counter()
    out = decode(
        models.target,
        drafter,
        [case.tokens],
        sampling,
        max_new=max_new,
        stop_tokens=models.stop_tokens,
        tree=tree or Tree(),
    )
    out.tokens.block_until_ready()
    seconds = time.perf_counter() - started
    tokens = np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()
    return Run(seconds, tokens, Acceptance.of(out.statistics))


# --- results ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """Plain against one tree at one temperature; lists are by repeat or, where named so, by prompt."""

    temperature: float
    tree: str
    plain_tokens_per_second: list[float]
    tokens_per_second: list[float]
    ratio: Spread
    acceptance_length: float | None  # tokens a target pass; the one that prefill makes is not counted
    acceptance_by_depth: list[float | None]  # share accepted, of those whose predecessor was
    new_tokens: int
    target_passes: int
    differing_prompts: int  # where any token differs in any repeat
    new_tokens_by_prompt: list[int]
    target_passes_by_prompt: list[int]


def compare(temperature: float, tree: Tree, plain: list[list[Run]], speculative: list[list[Run]]) -> Result:
    """The Result of runs by repeat and prompt."""
    plain_rates, rates = ([_rate(runs) for runs in repeats] for repeats in (plain, speculative))
    first = speculative[0]
    acceptance = first[0].acceptance
    for run in first[1:]:
        acceptance += run.acceptance
    differing = {
        i
        for a, b in zip(plain, speculative, strict=True)
        for i, (x, y) in enumerate(zip(a, b, strict=True))
        if x.tokens != y.tokens
    }
    return Result(
        temperature,
        str(tree),
        plain_rates,
        rates,
        Spread.of([b / a for a, b in zip(plain_rates, rates, strict=True)]),
        _number(acceptance.length),
        [_number(share) for share in acceptance.by_depth],
        sum(len(run.tokens) for run in first),
        acceptance.rounds,
        len(differing),
        [len(run.tokens) for run in first],
        [run.acceptance.rounds for run in first],
    )


def _rate(runs: list[Run]) -> float:
    """Tokens a second over all prompts."""
    return sum(len(run.tokens) for run in runs) / sum(run.seconds for run in runs)


def _number(value: float) -> float | None:
    """The value, or None for nan, which JSON has not."""
    return None if math.isnan(value) else value


def _print_table(report: dict[str, Any], results: list[Result]) -> None:
    title = (
        f"{len(report['prompts'])} prompts, {report['max_new']} new tokens at most, batch 1, {report['dtype']},"
        f" {report['device']}"
    )
    table = Table(title=title)
    for name in ("temperature", "tree", "plain tok/s", "tok/s", "ratio (min to max)", "tau", "by depth", "differ"):
        table.add_column(name, justify="left" if name in ("tree", "by depth") else "right")
    for r in results:
        table.add_row(
            f"{r.temperature:g}",
            r.tree,
            f"{statistics.median(r.plain_tokens_per_second):.1f}",
            f"{statistics.median(r.tokens_per_second):.1f}",
            f"{r.ratio.median:.2f} ({r.ratio.min:.2f} to {r.ratio.max:.2f})",
            "-" if r.acceptance_length is None else f"{r.acceptance_length:.2f}",
            " ".join("-" if share is None else f"{share:.2f}" for share in r.acceptance_by_depth),
            str(r.differing_prompts),
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    print("tau: tokens a target pass, without the token that prefill makes; by depth: of those whose predecessor held")
