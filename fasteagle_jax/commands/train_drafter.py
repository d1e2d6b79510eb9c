"""Train a drafter, FastEagle or EAGLE-3, on conversations from prepare-data.

The run folder holds config.json, checkpoints/, metrics.jsonl, tensorboard/, curve.png and, at the end, drafter/
(safetensors and config.json); it may be of a bucket, gs://... . After an interruption the same command resumes from
the last checkpoint, bitwise as without it. SIGTERM saves and ends with exit code 0.

example:
  fasteagle train --config configs/smollm2_135m.py --run runs/smollm2 steps=2000 loss.share=0.5
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fasteagle_jax.commands.terminal import Parser, add_share_options, program
from fasteagle_jax.data.shares import connect
from fasteagle_jax.training.config import apply_changes, load_config
from fasteagle_jax.training.loop import train


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says; returns the exit code."""
    parser = Parser(prog="fasteagle train", description=__doc__)
    parser.add_argument("--config", required=True, help="a Python file with get_config() -> RunConfig")
    parser.add_argument("--run", required=True, help="the folder for checkpoints, metrics and the drafter")
    parser.add_argument("--allow-change", action="store_true", help="resume though the configuration has changed")
    parser.add_argument(
        "--profile", type=_steps, metavar="A:B", help="trace steps A to B with jax.profiler into the run's profile/"
    )
    parser.add_argument("changes", nargs="*", metavar="key=value", help="e.g. steps=100 loss.share=0.25")
    add_share_options(parser, "the run's mesh")
    args = parser.parse_args(argv)
    connect(args)
    config = apply_changes(load_config(args.config), args.changes)
    train(config, args.run, allow_change=args.allow_change, profile=args.profile)
    return 0


def _steps(text: str) -> range:
    """An argparse type: `100:110`, the steps from 100 to 110."""
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of steps: write first:last, e.g. 100:110")
    return range(int(first), int(last) + 1)
