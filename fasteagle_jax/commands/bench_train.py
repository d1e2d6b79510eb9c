"""Measure a run's train step: tokens a second, beside the same with other values, interleaved on one machine.

Texts are random tokens in full rows, and weights random ones but for the target's: neither changes the time.

examples:
  fasteagle bench-train --config configs/smollm2_135m.py --against dtype=float32
  fasteagle bench-train --config configs/smollm2_135m.py \\
      --against "loss.share=1 drafter.draft_vocab_size=None loss.chunk=1024"    # the plain loss, all logits at once
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fasteagle_jax.bench.figures import show
from fasteagle_jax.bench.timing import Spread
from fasteagle_jax.commands.terminal import Parser, program, whole
from fasteagle_jax.data.conversations import Conversation
from fasteagle_jax.data.packing import PackedData
from fasteagle_jax.targets.loading import load_target
from fasteagle_jax.training.config import RunConfig, apply_changes, drafter_config, load_config
from fasteagle_jax.training.init import init_drafter
from fasteagle_jax.training.optimizer import make_optimizer
from fasteagle_jax.training.step import first_state, train_step


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Measures as the command line says; returns the exit code."""
    args = _parser().parse_args(argv)
    first = apply_changes(load_config(args.config), args.changes)
    names = ["as configured", *args.against]
    configs = [first, *(apply_changes(first, words.split()) for words in args.against)]
    report = compare(configs, args.steps, args.repeats)
    kind = jax.devices()[0].device_kind
    where = f"{kind}, {os.cpu_count()} CPU cores" if kind == "cpu" else kind
    rows = []
    for name, rates in zip(names, report, strict=True):
        ratios = [ours / theirs for ours, theirs in zip(rates, report[0], strict=True)]
        rows.append((name, Spread.of(rates).words(0), Spread.of(ratios).words() if rates is not report[0] else ""))
    title = f"{first.target}: train steps of {first.batch_size} x {first.length} tokens, {where}"
    show(title, ("what", "tok/s (min to max)", "ratio (min to max)"), rows, left=1)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fasteagle bench-train", description=__doc__)
    parser.add_argument("--config", required=True, help="a Python file with get_config() -> RunConfig")
    parser.add_argument(
        "--against", action="append", default=[], metavar='"key=value ..."', help="values to compare with; repeatable"
    )
    parser.add_argument("--steps", type=whole(1), default=3, metavar="N", help="a repeat (default %(default)s)")
    parser.add_argument("--repeats", type=whole(1), default=5, metavar="N", help="default %(default)s")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="as of fasteagle train")
    return parser


def compare(configs: Sequence[RunConfig], num_steps: int, repeats: int) -> list[list[float]]:
    """Tokens a second of each configuration's train step on one device, one number a repeat.

    A repeat is `num_steps` steps of each in turn, so that what slows the machine down slows all; compilation is not
    counted.
    """
    runs = [_start(config) for config in configs]
    for run in runs:
        run()  # compiles
        print(".", end="", file=sys.stderr, flush=True)
    rates: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for config, run, found in zip(configs, runs, rates, strict=True):
            start = time.perf_counter()
            for _ in range(num_steps):
                run()
            found.append(num_steps * config.batch_size * config.length / (time.perf_counter() - start))
    print(file=sys.stderr)
    return rates


def _start(config: RunConfig) -> Callable[[], None]:
    """A function that takes the next step of a run and waits for it."""
    of_run: dict[str, Any] = {"training": True, "max_len": config.length, "adapter": config.adapter}
    target = load_target(config.target, config.dtype_of_target, **of_run).model
    rng = np.random.default_rng(config.seed)
    rows = rng.integers(target.config.vocab_size, size=(config.batch_size, config.length))
    samples = [Conversation.of(str(i), row.tolist(), [[0, config.length]]) for i, row in enumerate(rows)]
    batch = jax.tree.map(jnp.asarray, PackedData(samples, config.length, config.batch_size, config.seed).batch(0))
    sizes = drafter_config(config.drafter, target.config)
    drafter = init_drafter(sizes, target, jax.random.key(config.seed), from_target=False)
    graph, params, constants = nnx.split(drafter, nnx.Param, ...)  # type: ignore[misc]  # `...`: all the rest
    optimizer = make_optimizer(config.optimizer, config.steps, config.loss.deepkd)
    state = first_state(params, optimizer, config.optimizer.ema)
    step = train_step(config, graph)

    def run() -> None:
        nonlocal state
        state, result = step(state, constants, target, batch)
        float(result.loss)

    return run
