"""Measure drafters against plain decoding: the same prompts, weights and machine, interleaved in one process.

Every turn of every conversation is decoded by itself (batch 1), plainly and by every drafter, before the next one is;
--repeats times, after a warm-up. The context of a second turn holds the target's own first answer. Times are of whole
answers, prefill included and compilation not. The speed-up of a repeat is a drafter's tokens/s over plain decoding's,
over all prompts of a task. Every token is compared.

Tasks are files of --prompts-folder by name (mt_bench for mt_bench.jsonl), other files, or data sets of the hub.
Drafters are NAME=FOLDER, each with its tree behind it: chain, backbone:WIDTH or best_first:NODES, and :LEVELS behind
that for the first levels alone, +lookup:K for guesses that are copied from the text after up to K tokens that match.
simulated=0.8/0.7/0.6 is one that is accepted so often at each depth, at no cost.

--sweep levels,nodes,tree measures each drafter with other trees. --sweep slots measures the engine: throughput over
numbers of slots, --beside other programs if wanted; --sweep memory says what its caches take. --sweep rows measures
what a target pass over several rows costs, and a round with each tree of `auto`.

--acceptance measures no time: all prompts go through the engine's slots at once (--slots, the largest number given), by
every drafter at every temperature, and tau and the acceptance by depth get standard errors and intervals, by drawing
the conversations anew; so do the differences of two drafters on the same conversations. There NAME=none@TREE+lookup:K
is lookup without a drafter. `outside` is the share of an answer's tokens that a drafter's vocabulary lacks.

--predict FOLDER measures nothing: it estimates speed-ups on TPUs from compiled programs (--predict --help).
--cost RESULTS puts the tau of a finished --acceptance against rounds compiled for TPUs and GPUs (--cost --help).

--results keeps what is measured, task by task: the same command after an interruption measures the rest. If the output
is no terminal, a line a minute on stderr says what is measured and how fast it is.

Exit code 1 says that in float32 a token differed.

example:
  fasteagle bench --tasks mt_bench,humaneval,gsm8k --prompts-folder prompts --temperature 0,1 --results runs/bench \\
      --drafters fasteagle=runs/fasteagle/drafter@best_first:16,eagle3=runs/eagle3/drafter@best_first:16:5
  fasteagle bench --tasks gsm8k.jsonl --drafters fasteagle=runs/fasteagle/drafter --sweep levels,nodes,tree
  fasteagle bench --acceptance --tasks mt_bench,gsm8k --prompts-folder prompts --max-new 64 --max-len 2048 \\
      --drafters a=runs/a/drafter@best_first:8,b=runs/b/drafter@best_first:8
  fasteagle bench --tasks gsm8k.jsonl --drafters simulated=0.8/0.7/0.6@chain
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from fasteagle_jax.bench import cost, predict, verify_cost
from fasteagle_jax.bench import sweeps as sweep
from fasteagle_jax.bench.acceptance import acceptance
from fasteagle_jax.bench.breakdown import Breakdown, RoundProfiler
from fasteagle_jax.bench.decoders import DecoderSpec, find_drafters, load_drafters, parse_decoders
from fasteagle_jax.bench.figures import (
    ablation_figure,
    acceptance_figure,
    breakdown_figure,
    show_breakdowns,
    show_results,
    speedup_figure,
)
from fasteagle_jax.bench.peers import PEERS
from fasteagle_jax.bench.progress import Parts, Progress, check_results
from fasteagle_jax.bench.prompts import Models, check_fits
from fasteagle_jax.bench.runner import Case, Comparison, Measured, Result, means
from fasteagle_jax.bench.tasks import read_tasks
from fasteagle_jax.commands.answers import ONE_AT_A_TIME
from fasteagle_jax.commands.models import add_target_options, load_models
from fasteagle_jax.commands.terminal import Parser, add_dtype_option, add_filter_options, program, whole
from fasteagle_jax.data.sources import Prompt
from fasteagle_jax.decoding.sampling import Sampling, make_sampling
from fasteagle_jax.decoding.sampling_fields import from_options, recorded
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.decoding.tree_selection import default_tree
from fasteagle_jax.drafters.files import TENSORS
from fasteagle_jax.drafters.simulated import parse_rates
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import sha256
from fasteagle_jax.targets.loading import open_checkpoint
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
    if any(word.partition("=")[0] == "--cost" for word in words):
        args = _cost_parser().parse_args(words)
        cost.cost(args, functools.partial(_models_of, args))
        return 0
    return bench(_parser().parse_args(words))


def _prediction_parser() -> Parser:
    parser = Parser(prog="fasteagle bench --predict", description=predict.__doc__)
    parser.add_argument("--predict", type=Path, required=True, metavar="FOLDER", help="of fasteagle compile --table")
    parser.add_argument("--rates", required=True, metavar="R/R/...", help="accepted at each depth, e.g. 0.8/0.7/0.6")
    return parser


def _cost_parser() -> Parser:
    parser = Parser(prog="fasteagle bench --cost", description=cost.__doc__)
    cost.add_options(parser)
    group = parser.add_argument_group("weights, of --measure")
    group.add_argument("--target", help="folder, .gguf file or hub name (default: that of the results)")
    group.add_argument("--drafters", metavar="D,...", help="NAME=FOLDER (default: those of the results)")
    add_dtype_option(group, "default that of the results")
    return parser


def _models_of(args: argparse.Namespace, target: str, dtype: str | None) -> Models:
    """A target by its name; --dtype counts more than `dtype`."""
    return load_models(argparse.Namespace(target=target, adapter="", dtype=args.dtype or dtype), None)


def _parser() -> Parser:
    parser = Parser(prog="fasteagle bench", description=__doc__)
    parser.add_argument(
        "--tasks", type=_words, required=True, metavar="T,...", help="names, files or data sets; see bench/tasks.py"
    )
    parser.add_argument("--prompts-folder", type=Path, metavar="FOLDER", help="where tasks are, a .jsonl file each")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="prompts of each task")
    parser.add_argument("--max-new", type=whole(2), default=128, metavar="T", help="tokens an answer (default 128)")
    parser.add_argument("--repeats", type=whole(1), default=3, metavar="R", help="default 3")
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="a new folder for numbers and figures, or one left unfinished"
    )
    parser.add_argument("--acceptance", action="store_true", help="tau alone, with intervals, of many prompts at once")
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
        "--beside",
        type=_peers,
        default=[],
        metavar="P,...",
        help=f"other programs beside --sweep slots, some of {','.join(PEERS)}",
    )
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


def _peers(text: str) -> list[str]:
    words = list(dict.fromkeys(_words(text)))
    if unknown := [word for word in words if word not in PEERS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not known: write some of {','.join(PEERS)}")
    return words


def bench(args: argparse.Namespace) -> int:
    """Measures, prints the tables and writes the results; returns the exit code."""
    # --- what was asked for -----------------------------------------------------------------------------------
    alone = ALONE.get(",".join(args.sweep))
    decoders = parse_decoders(
        args.drafters, "auto" if args.sweep == ["slots"] else str(default_tree(jax.default_backend()))
    )
    for decoder in decoders:
        if decoder.tree not in (None, "auto") or not alone and decoder.tree:
            TreeSpec.parse(decoder.tree)
    if len(decoders) == 1:
        raise UserError("plain decoding alone is nothing to compare: name a drafter, NAME=FOLDER")
    if args.acceptance and args.sweep:
        raise UserError("--acceptance and --sweep are two measurements: give one of them")
    for decoder in decoders:
        if decoder.is_lookup_alone and not args.acceptance:
            raise UserError(f"{decoder.name} is lookup without a drafter: it is measured with --acceptance alone")
    if args.beside and args.sweep != ["slots"]:
        raise UserError("--beside is of --sweep slots: leave it out, or add that")
    if args.beside and args.adapter:
        raise UserError("--beside reads the target's files, without --adapter: leave one of them out")
    if args.beside and jax.default_backend() != "cpu":
        raise UserError(f"--beside decodes on the CPU, and this is a {jax.default_backend()}: set JAX_PLATFORMS=cpu")
    if args.beside and recorded(from_options(args), ()).keys() - {"temperature", "seed"}:
        raise UserError("--beside samples without filters: leave --top-k, --top-p and --min-p out")
    if alone and len(args.temperature) > 1:
        raise UserError(f"--sweep {args.sweep[0]} is of one temperature: give --temperature one number")
    check_results(args.results)
    if args.results is not None:
        import matplotlib.figure  # noqa: F401  # which draws at the end: a missing one is found out now
    for temperature in args.temperature:
        make_sampling(1, **from_options(args) | {"temperature": temperature})
    decoders = find_drafters(decoders, open_checkpoint(args.target, args.adapter))
    tasks = read_tasks(args.tasks, args.prompts_folder, args.limit)
    models = load_models(args, None)
    drafters = load_drafters(models, decoders)
    for prompts in tasks.values():
        for prompt in prompts:  # all turns without answers: `cases` checks each prompt with them
            messages = [{"role": "user", "content": "\n".join(prompt.turns)}]
            tokens = encode_chat(models.tokenizer, messages)
            check_fits(models.target.config, prompt.id, tokens, args.max_new * len(prompt.turns))

    # --- measuring --------------------------------------------------------------------------------------------
    settings = {
        "machine": sweep.machine(),
        "jax": jax.__version__,
        "dtype": models.dtype,
        "target": models.fingerprint,
        "arguments": {
            name: os.fspath(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name != "results"
        },
    }
    digests = {
        "prompts": hashlib.sha256(repr(tasks).encode()).hexdigest(),
        "weights": {decoder.name: sha256(decoder.folder / TENSORS) for decoder in decoders if decoder.folder},
    }
    parts = Parts(args.results, settings | digests)
    if alone:
        first_turns = [
            encode_chat(models.tokenizer, [{"role": "user", "content": prompt.turns[0]}])
            for prompts in tasks.values()
            for prompt in prompts
        ]
        outcome = alone(args, models, drafters, decoders, first_turns, parts)
    elif args.acceptance:
        outcome = acceptance(args, models, drafters, decoders, tasks, parts)
    else:
        outcome = _compare(args, models, drafters, decoders, tasks, parts)
    configs = {
        decoder.name: dataclasses.asdict(drafters[decoder.folder].config)
        if decoder.folder
        else {"kind": "lookup"}
        if decoder.is_lookup_alone
        else {"rates": decoder.rates}
        for decoder in decoders[1:]
    }
    date = datetime.date.today().isoformat()
    parts.finish({"date": date, **settings, "drafters": configs, **outcome.report}, outcome.figures)
    if outcome.differing and models.dtype == "float32":
        print(f"warning: {outcome.differing} answers differ, in float32 none should", file=sys.stderr)
        return TOKENS_DIFFER
    return 0


def _compare(
    args: argparse.Namespace,
    models: Models,
    drafters: Mapping[Path, Any],
    decoders: list[DecoderSpec],
    tasks: Mapping[str, Sequence[Prompt]],
    parts: Parts,
) -> sweep.Outcome:
    """The tasks by every decoder at every temperature; in a sweep, by every drafter with other trees."""
    ablations: list[sweep.Ablation] = []
    if args.sweep:
        levels = {d: drafters[d.folder].num_levels if d.folder else len(d.rates) for d in decoders[1:]}
        ablations = [point for key in args.sweep for d in decoders[1:] for point in sweep.ablation(key, d, levels[d])]
        decoders = [decoders[0], *dict.fromkeys(point.decoder for point in ablations)]
    comparison = Comparison(models, drafters, decoders, args.max_new)
    profilers = [] if args.sweep else [RoundProfiler(comparison, decoder) for decoder in decoders]
    num_cases = {task: sum(len(prompt.turns) for prompt in prompts) for task, prompts in tasks.items()}
    progress = Progress(len(args.temperature) * sum(num_cases.values()) * (1 + args.repeats), "answer")

    def sampling(index: int, temperature: float) -> Sampling:
        seed = (args.seed + index) % 2**32
        return make_sampling(1, **from_options(args) | {"temperature": temperature, "seed": seed})

    def measure(task: str, temperature: float, first: int) -> dict[str, Any]:
        """A task for JSON; the seed of its first case is that of case `first` of all."""
        cases = []
        for case in comparison.cases(task, tasks[task], (sampling(i, temperature) for i in itertools.count(first))):
            cases.append(case)
            progress.update(f"{task}, plain decoding's answers first")
        comparison.warm_up(cases)
        measured = comparison.measure(cases, args.repeats, progress.update)
        longest = max(range(len(cases)), key=lambda i: len(cases[i].answer))
        return {
            "results": [result.record() for result in measured.results(temperature)],
            "cases": _records(measured, temperature),
            "compilations": measured.compilations,
            "longest": {
                "index": first + longest,
                "id": cases[longest].id,
                "tokens": cases[longest].tokens,
                "answer": cases[longest].answer,
            },
        }

    def measure_rounds(temperature: float, longest: dict[str, Any]) -> list[dict[str, Any]]:
        case = Case("", longest["id"], longest["tokens"], sampling(longest["index"], temperature), longest["answer"])
        return [profiler.measure(case, temperature).record() for profiler in profilers]

    results: list[Result] = []
    breakdowns: list[Breakdown] = []
    cases: list[dict[str, Any]] = []
    compilations = 0
    for temperature in args.temperature:
        of_tasks, longest, first = list[Result](), None, 0
        for task in tasks:
            name = f"temperature {temperature}, {task}"
            if name in parts:
                progress.update(f"{task} is measured already", num_cases[task] * (1 + args.repeats))
            part = parts.get(name, functools.partial(measure, task, temperature, first))
            of_tasks += [Result.read(record, decoders) for record in part["results"]]
            cases += part["cases"]
            compilations += part["compilations"]
            if longest is None or len(part["longest"]["answer"]) > len(longest["answer"]):
                longest = part["longest"]
            first += num_cases[task]
        results += of_tasks + means(of_tasks)
        if longest and len(longest["answer"]) > 1:  # there is a round
            name = f"temperature {temperature}: rounds"
            records = parts.get(name, functools.partial(measure_rounds, temperature, longest))
            breakdowns += [Breakdown.read(record, decoders) for record in records]
    progress.close()
    if compilations:
        print(f"warning: {compilations} programs were compiled while timed: the times are too long", file=sys.stderr)

    figures: dict[str, Callable[[], Any]] = {}
    for temperature in args.temperature:
        shown = [result for result in results if result.temperature == temperature]
        title = f"temperature {temperature:g}, {args.max_new} new tokens at most, {models.dtype}, {sweep.machine()}"
        if args.sweep:
            sweep.show_ablations(title, args.sweep, ablations, shown)
        else:
            show_results(title, shown)
    if args.sweep:
        for key in args.sweep:
            figures[key] = functools.partial(ablation_figure, key, *sweep.points(key, ablations, results))
    else:
        figures["speedup"] = functools.partial(speedup_figure, results)
        figures["acceptance"] = functools.partial(acceptance_figure, results)
        if breakdowns:
            show_breakdowns(breakdowns)
            figures["time"] = functools.partial(breakdown_figure, breakdowns)
    print("tau: tokens a target pass, without the token that prefill makes; by depth: of those whose predecessor held")
    report = {
        "compilations_while_timed": compilations,
        "results": [result.record() for result in results],
        "time_of_a_round": [breakdown.record() for breakdown in breakdowns],
        "ablations": [point.record() for point in ablations],
        "cases": cases,
    }
    differing = len({(result.temperature, id) for result in results for id in result.differing})
    return sweep.Outcome(report, figures, differing)


def _records(measured: Measured, temperature: float) -> list[dict[str, Any]]:
    """A record of each case for JSON: its sizes, and the target passes of each decoder."""
    return [
        {
            "temperature": temperature,
            "task": case.task,
            "id": case.id,
            "prompt_tokens": len(case.tokens),
            "new_tokens": len(case.answer),
            "target_passes": {str(decoder): runs[0][i].acceptance.rounds for decoder, runs in measured.runs.items()},
        }
        for i, case in enumerate(measured.cases)
    ]
