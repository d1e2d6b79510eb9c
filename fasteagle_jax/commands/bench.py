"""Measure drafters against plain decoding: the same prompts, weights and machine, in turns in one process.

Every turn of every conversation is decoded by itself (batch 1), plainly and by every drafter, before the next one is;
--repeats times, after a warm-up. The context of a second turn holds the target's own first answer. Times are of whole
answers, prefill included and compilation not. The speed-up of a repeat is a drafter's tokens/s over plain decoding's,
over all prompts of a task. Every token is compared.

Tasks are files of --prompts-folder by name (mt_bench for mt_bench.jsonl), other files, or data sets of the hub.
Drafters are NAME=FOLDER, each with its tree behind it: chain, backbone:WIDTH or best_first:NODES, and :LEVELS behind
that for the first levels alone. simulated=0.8/0.7/0.6 is one that is accepted so often at each depth, at no cost.

--sweep levels,nodes,tree measures each drafter with other trees. --sweep slots measures the engine: throughput over
numbers of slots; --sweep memory says what its caches take. --sweep rows measures what a target pass over several rows
costs, and a round with each tree of `auto`.

--predict FOLDER measures nothing: it estimates speed-ups on TPUs from compiled programs (--predict --help).

Exit code 1 says that in float32 a token differed.

example:
  fasteagle bench --tasks mt_bench,humaneval,gsm8k --prompts-folder prompts --temperature 0,1 --results runs/bench \\
      --drafters fasteagle=runs/fasteagle/drafter@best_first:16,eagle3=runs/eagle3/drafter@best_first:16:5
  fasteagle bench --tasks gsm8k.jsonl --drafters fasteagle=runs/fasteagle/drafter --sweep levels,nodes,tree
  fasteagle bench --tasks gsm8k.jsonl --drafters simulated=0.8/0.7/0.6@chain
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from fasteagle_jax.bench import predict, verify_cost
from fasteagle_jax.bench import sweeps as sweep
from fasteagle_jax.bench.breakdown import Split, Splitter
from fasteagle_jax.bench.decoders import Way, find_drafters, load_drafters, parse_ways, read_tasks
from fasteagle_jax.bench.figures import (
    ablation_figure,
    acceptance_figure,
    show_results,
    show_splits,
    speedup_figure,
    split_figure,
)
from fasteagle_jax.bench.prompts import Models, check_fits
from fasteagle_jax.bench.runner import Contest, Measured, Result
from fasteagle_jax.commands.answers import ONE_AT_A_TIME
from fasteagle_jax.commands.models import add_target_options, load_models
from fasteagle_jax.commands.terminal import Parser, add_filter_options, program, whole
from fasteagle_jax.data.sources import Prompt
from fasteagle_jax.decoding.sampling import Sampling, make_sampling
from fasteagle_jax.decoding.sampling_fields import from_options
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.decoding.tree_selection import default_tree
from fasteagle_jax.drafters.simulated import parse_rates
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import check_new, new_folder
from fasteagle_jax.targets.tokenizer import encode_chat

TOKENS_DIFFER = 1  # exit code
ALONE = {
    "slots": sweep.throughput,
    "memory": sweep.memory,
    "rows": verify_cost.rows,
}  # sweeps of other things than tasks


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Measures as the command line says; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--predict" for word in words):  # measures nothing, and needs no model
        args = _prediction_parser().parse_args(words)
        print(predict.predictions(args.predict, parse_rates(args.rates)))
        return 0
    return bench(_parser().parse_args(words))


def _prediction_parser() -> Parser:
    parser = Parser(prog="fasteagle bench --predict", description=predict.__doc__)
    parser.add_argument("--predict", type=Path, required=True, metavar="FOLDER", help="of fasteagle compile --table")
    parser.add_argument("--rates", required=True, metavar="R/R/...", help="accepted at each depth, e.g. 0.8/0.7/0.6")
    return parser


def _parser() -> Parser:
    parser = Parser(prog="fasteagle bench", description=__doc__)
    parser.add_argument("--tasks", type=_words, required=True, metavar="T,...", help="names, files or data sets")
    parser.add_argument("--prompts-folder", type=Path, metavar="FOLDER", help="where tasks are, a .jsonl file each")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="prompts of each task")
    parser.add_argument("--max-new", type=whole(2), default=128, metavar="T", help="tokens an answer (default 128)")
    parser.add_argument("--repeats", type=whole(1), default=3, metavar="R", help="default 3")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="a new folder for numbers and figures")
    sweep_options = parser.add_argument_group("sweeps")
    sweep_options.add_argument(
        "--sweep",
        type=_sweeps,
        default=[],
        metavar="S",
        help="levels,nodes,tree, or some of them; or slots, memory or rows",
    )
    sweep_options.add_argument("--slots", type=whole(1), nargs="+", default=[1, 2, 4, 8, 16, 32, 64], metavar="B")
    sweep_options.add_argument(
        "--max-len", type=whole(2), default=1024, metavar="T", help="of a request of the engine (default 1024)"
    )
    sweep_options.add_argument("--window", type=whole(1), default=512, metavar="W", help="of --sweep memory (512)")
    models = parser.add_argument_group("models")
    add_target_options(models)
    models.add_argument(
        "--drafters",
        type=_words,
        required=True,
        metavar="D,...",
        help="NAME=FOLDER[@TREE], FOLDER being `shipped` for the one that comes with the program, or"
        f" simulated=RATES[@TREE]; plain is always there (default tree {ONE_AT_A_TIME}; of --sweep slots auto)",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature", type=_numbers, default=[0.0], metavar="X,...", help="default 0, which is greedy"
    )
    add_filter_options(group)
    return parser


def _words(text: str) -> list[str]:
    words = [word for word in (part.strip() for part in text.split(",")) if word]
    if not words:
        raise argparse.ArgumentTypeError(f"{text!r} is an empty list: name at least one")
    return words


def _numbers(text: str) -> list[float]:
    try:
        return list(dict.fromkeys(float(word) for word in _words(text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers: write 0,1") from None


def _sweeps(text: str) -> list[str]:
    words = _words(text)
    if ",".join(words) not in ALONE and not set(words) <= set(sweep.ABLATIONS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not known: write some of {','.join(sweep.ABLATIONS)}, or {' or '.join(ALONE)}"
        )
    return list(dict.fromkeys(words))


def bench(args: argparse.Namespace) -> int:
    """Measures, prints the tables, writes the results; returns the exit code."""
    # --- what was asked for -----------------------------------------------------------------------------------
    alone = ALONE.get(",".join(args.sweep))
    ways = parse_ways(args.drafters, "auto" if args.sweep == ["slots"] else str(default_tree(jax.default_backend())))
    for way in ways:
        if way.tree not in (None, "auto") or not alone and way.tree:
            TreeSpec.parse(way.tree)
    if len(ways) == 1:
        raise UserError("plain decoding alone is nothing to compare: name a drafter, NAME=FOLDER")
    if alone and len(args.temperature) > 1:
        raise UserError(f"--sweep {args.sweep[0]} is of one temperature: give --temperature one number")
    check_new(args.results)
    for temperature in args.temperature:
        make_sampling(1, **from_options(args) | {"temperature": temperature})
    ways = find_drafters(ways, args.target)
    tasks = read_tasks(args.tasks, args.prompts_folder, args.limit)
    models = load_models(args, None)
    drafters = load_drafters(models, ways)
    for prompts in tasks.values():
        for prompt in prompts:  # the longest turn; those with answers in them are known later
            said = [{"role": "user", "content": "\n".join(prompt.turns)}]
            tokens = encode_chat(models.tokenizer, said)
            check_fits(models.target.config.max_positions, prompt.id, tokens, args.max_new * len(prompt.turns))

    # --- measuring --------------------------------------------------------------------------------------------
    results = contextlib.nullcontext() if args.results is None else new_folder(args.results)
    with results as folder:  # made now: what cannot be written is found out at once
        if alone:
            first_turns = [
                encode_chat(models.tokenizer, [{"role": "user", "content": prompt.turns[0]}])
                for prompts in tasks.values()
                for prompt in prompts
            ]
            outcome = alone(args, models, drafters, ways, first_turns)
        else:
            outcome = _compare(args, models, drafters, ways, tasks)
        report = {
            "date": datetime.date.today().isoformat(),
            "machine": sweep.machine(),
            "jax": jax.__version__,
            "dtype": models.dtype,
            "target": models.fingerprint,
            "arguments": {name: os.fspath(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
            "drafters": {
                way.name: dataclasses.asdict(drafters[way.folder].config) if way.folder else {"rates": way.rates}
                for way in ways[1:]
            },
            **outcome.report,
        }
        if folder is not None:
            (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n")
            for name, figure in outcome.figures.items():
                figure().savefig(folder / f"{name}.png", dpi=120)
    if outcome.differing and models.dtype == "float32":
        print(f"warning: {outcome.differing} answers differ, in float32 none should", file=sys.stderr)
        return TOKENS_DIFFER
    return 0


def _compare(
    args: argparse.Namespace,
    models: Models,
    drafters: Mapping[Path, Any],
    ways: list[Way],
    tasks: Mapping[str, Sequence[Prompt]],
) -> sweep.Outcome:
    """The tasks by every way at every temperature; in a sweep, by every way with other trees."""
    ablations: list[sweep.Ablation] = []
    if args.sweep:
        levels = {way: drafters[way.folder].num_levels if way.folder else len(way.rates) for way in ways[1:]}
        ablations = [point for key in args.sweep for way in ways[1:] for point in sweep.ablation(key, way, levels[way])]
        ways = [ways[0], *dict.fromkeys(point.way for point in ablations)]
    contest = Contest(models, drafters, ways, args.max_new)
    splitters = [] if args.sweep else [Splitter(contest, way) for way in ways]
    turns = sum(len(prompt.turns) for prompts in tasks.values() for prompt in prompts)
    results: list[Result] = []
    splits: list[Split] = []
    cases: list[dict[str, Any]] = []
    late = 0
    with tqdm(total=len(args.temperature) * turns * (1 + args.repeats), unit="answer", disable=None) as bar:
        for temperature in args.temperature:

            def sampling(index: int, temperature: float = temperature) -> Sampling:
                seed = (args.seed + index) % 2**32
                return make_sampling(1, **from_options(args) | {"temperature": temperature, "seed": seed})

            conversations = []
            for case in contest.conversations(tasks, sampling):
                conversations.append(case)
                bar.update()
            contest.warm_up(conversations)
            measured = contest.measure(conversations, args.repeats, bar.update)
            late += measured.compilations
            results += measured.results(temperature)
            cases += _records(measured, temperature)
            longest = max(conversations, key=lambda case: len(case.answer))
            if len(longest.answer) > 1:  # there is a round
                splits += [splitter.measure(longest, temperature) for splitter in splitters]
    if late:
        print(f"warning: {late} programs were compiled while timed: the times are too long", file=sys.stderr)

    figures: dict[str, Callable[[], Any]] = {}
    for temperature in args.temperature:
        its = [result for result in results if result.temperature == temperature]
        title = f"temperature {temperature:g}, {args.max_new} new tokens at most, {models.dtype}, {sweep.machine()}"
        if args.sweep:
            sweep.show_ablations(title, args.sweep, ablations, its)
        else:
            show_results(title, its)
    if args.sweep:
        for key in args.sweep:
            figures[key] = functools.partial(ablation_figure, key, *sweep.points(key, ablations, results))
    else:
        figures["speedup"] = functools.partial(speedup_figure, results)
        figures["acceptance"] = functools.partial(acceptance_figure, results)
        if splits:
            show_splits(splits)
            figures["time"] = functools.partial(split_figure, splits)
    print("tau: tokens a target pass, without the token that prefill makes; by depth: of those whose predecessor held")
    report = {
        "compilations_while_timed": late,
        "results": [result.record() for result in results],
        "time_of_a_round": [split.record() for split in splits],
        "ablations": [point.record() for point in ablations],
        "cases": cases,
    }
    differing = len({(result.temperature, id) for result in results for id in result.differing})
    return sweep.Outcome(report, figures, differing)


def _records(measured: Measured, temperature: float) -> list[dict[str, Any]]:
    """Each case for JSON: its sizes, and the target passes by way."""
    return [
        {
            "temperature": temperature,
            "task": case.task,
            "id": case.id,
            "prompt_tokens": len(case.tokens),
            "new_tokens": len(case.answer),
            "target_passes": {str(way): runs[0][i].acceptance.rounds for way, runs in measured.runs.items()},
        }
        for i, case in enumerate(measured.cases)
    ]
