"""Hold the theory of acceptance to random targets and drafters (docs/theory.md has the theorems).

A target is a Markov chain whose laws are drawn from a Dirichlet distribution, its drafters have an error. Each line is
a prediction, what was simulated, and the half width of its 99% interval; one in a hundred disagrees by chance.
With --costs, the speed-up of its best trees where passes cost so much: E(M) c(1) / c(M).
With --logprobs, the bound that the entropy of a real target sets instead, from a batch file's answers at temperature 1.

examples:
  fasteagle simulate
  fasteagle simulate --vocab 30 --concentration 0.05 --temperature 0.7 --nodes 60 --levels 7 --seed 3
  fasteagle simulate --rates 0.8,0.75,0.7
  fasteagle simulate --costs 1:1,2:1.17,4:1.18,8:1.44,16:1.87,32:3.17
  fasteagle simulate --logprobs answers.jsonl
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fasteagle_jax.bench import theory
from fasteagle_jax.bench.simulation import Row, best_lengths, random_world, simulate
from fasteagle_jax.commands.terminal import Parser, program, whole
from fasteagle_jax.errors import UserError

SIZES = (2, 4, 8, 16, 60)  # nodes, of the bound


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the comparison that the command line asks for; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.logprobs is not None:
        print(bound(args.logprobs))
    elif args.rates is not None:
        print(f"{theory.chain_length(args.rates):.3f} tokens a pass of a chain with these rates")
    elif args.costs is not None:
        world = random_world(
            np.random.default_rng(args.seed), args.vocab, args.concentration, args.error, args.temperature
        )
        print(speeds(list(args.costs), list(args.costs.values()), best_lengths(world, list(args.costs), args.levels)))
    else:
        names = ("vocab", "levels", "nodes", "concentration", "error", "temperature", "passes")
        rows = list(simulate(args.seed, **{name: getattr(args, name) for name in names}))
        print(table(rows))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="fasteagle simulate", description=__doc__)
    parser.add_argument("--vocab", type=whole(2), default=12, metavar="V", help="tokens (default 12)")
    parser.add_argument("--levels", type=whole(1), default=5, metavar="N", help="of the drafters (default 5)")
    parser.add_argument("--nodes", type=whole(2), default=16, metavar="M", help="of the best tree (default 16)")
    parser.add_argument(
        "--concentration",
        type=float,
        default=0.2,
        metavar="X",
        help="of the Dirichlet law; less is surer (default 0.2)",
    )
    parser.add_argument(
        "--error", type=float, default=0.3, metavar="P", help="share of another law in the drafter's (default 0.3)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of both (default 1)")
    parser.add_argument("--passes", type=whole(100), default=20_000, metavar="N", help="simulated (default 20000)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--rates", type=_rates, metavar="A,B,...", help="tokens a pass of a chain with these acceptances"
    )
    other.add_argument("--costs", type=_costs, metavar="M:C,...", help="what a pass over so many nodes costs, 1 first")
    other.add_argument("--logprobs", type=Path, metavar="FILE", help="the bound by a target's entropy")
    return parser


def _rates(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers like 0.8,0.75,0.7") from None


def _costs(text: str) -> dict[int, float]:
    """Costs by number of nodes, in order."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        costs = {int(nodes): float(cost) for nodes, cost in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give nodes and costs like 1:1,4:1.18,8:1.44") from None
    if list(costs)[0] != 1 or sorted(costs) != list(costs) or not all(0 < cost < math.inf for cost in costs.values()):
        raise argparse.ArgumentTypeError(f"{text!r}: give 1 node first, then more and more, and costs above 0")
    return costs


def speeds(sizes: Sequence[int], costs: Sequence[float], lengths: Sequence[float]) -> str:
    """Tokens a pass, cost and speed-up of trees by their nodes, and which is the fastest."""
    lines = [
        f"{size:5d}  {length:13.3f}  {cost / costs[0]:5.2f}  {length * costs[0] / cost:8.3f}"
        for size, cost, length in zip(sizes, costs, lengths, strict=True)
    ]
    best = sizes[theory.best_size(lengths, costs)]
    return "\n".join(["nodes  tokens a pass   cost  speed-up", *lines, f"best: {best} nodes"])


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text, and how many disagree."""
    width = max(len(row.name) for row in rows)
    lines = [
        f"{row.name:{width}}  {row.predicted:8.4f} {row.relation:2} {row.simulated:8.4f} +- {row.half_width:.4f}"
        f"{'' if row.agrees else '  disagrees'}"
        for row in rows
    ]
    wrong = sum(not row.agrees for row in rows)
    return "\n".join([f"{'':{width}}  predicted   simulated", *lines, f"{wrong} of {len(rows)} disagree"])


def bound(path: Path) -> str:
    """The most that trees can be accepted whose guesses do not know the noise, by the surprisals in a file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the output of fasteagle batch") from None
    mean, second, count = theory.measured_surprisals(lines, str(path))
    head = f"{count} tokens: entropy {mean:.3f} nats, mean square of surprisals {second:.3f}"
    rows = [f"{size:3d} nodes: at most {theory.entropy_bound(mean, second, size):.2f} tokens a pass" for size in SIZES]
    return "\n".join([head, *rows])
