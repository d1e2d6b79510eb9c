"""Train variants of a run that differ in a few settings, and measure what the real decode accepts of each.

A variant is one or more changes of the configuration, `base` is none. All see the same data in the same order for the
same number of steps. --folder keeps a run for each variant, so that the same command resumes after an interruption, and
more variants can be added. Acceptance length is new tokens over target passes; by depth: of guesses whose predecessor
was accepted, those accepted. Above temperature 0 it is measured with and without shared noise.

examples:
  fasteagle ablate --config configs/smollm2_135m.py --folder runs/ablate/supervision --prompts mt_bench.jsonl \\
      --variant base --variant loss.last_level_only=True steps=300
  fasteagle ablate --config configs/smollm2_135m.py --folder runs/ablate/feature --prompts mt_bench.jsonl \\
      --variant base --variant loss.smooth_l1=0.1 --variant loss.smooth_l1=1 --json feature.json steps=300
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fasteagle_jax.bench.figures import show
from fasteagle_jax.bench.prompts import check_fits
from fasteagle_jax.bench.sweeps import machine
from fasteagle_jax.commands.terminal import TERMINATED, Parser, program, whole
from fasteagle_jax.data.sources import read_prompts
from fasteagle_jax.decoding.acceptance import Acceptance
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.drafters.files import load_drafter
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import check_new, write_new
from fasteagle_jax.io.text import parse_json
from fasteagle_jax.targets.loading import load_target, open_checkpoint
from fasteagle_jax.targets.tokenizer import encode_chat, load_tokenizer, stop_token_ids
from fasteagle_jax.training.config import RunConfig, apply_changes, changes_since, load_config
from fasteagle_jax.training.loop import train
from fasteagle_jax.training.metrics_log import finite

BASE = "base"
LAST = 50  # steps whose mean loss is reported
SLOTS = 8


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Trains and measures as the command line says; returns the exit code."""
    parser = Parser(prog="fasteagle ablate", description=__doc__)
    parser.add_argument("--config", required=True, help="a Python file with get_config() -> RunConfig")
    parser.add_argument("--folder", required=True, type=Path, help="for the runs, one folder a variant")
    parser.add_argument(
        "--variant",
        action="append",
        required=True,
        metavar='"key=value ..."',
        help=f"changes of the configuration, `{BASE}` for none; repeatable",
    )
    parser.add_argument("--prompts", action="append", required=True, metavar="SOURCE", help="held out; repeatable")
    parser.add_argument("--limit", type=whole(1), default=16, metavar="N", help="prompts a source (default 16)")
    parser.add_argument("--max-new", type=whole(2), default=64, metavar="T", help="tokens an answer (default 64)")
    parser.add_argument("--tree", action="append", metavar="T", help="repeatable (default chain and best_first:16)")
    parser.add_argument("--temperature", type=float, action="append", metavar="X", help="repeatable (default 0 and 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a new file for all numbers")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="of all variants, e.g. steps=300")
    return ablate(parser.parse_args(argv))


@dataclasses.dataclass(frozen=True)
class Measured:
    """Acceptance of a variant's drafts under one setting of decoding."""

    variant: str
    tree: str
    temperature: float
    shared_noise: bool
    acceptance_length: float
    by_depth: list[float | None]

    @property
    def setting(self) -> str:
        """The setting of decoding, in words."""
        return f"{self.tree}, T={self.temperature:g}{'' if self.shared_noise else ' own ranking'}"


def ablate(args: argparse.Namespace) -> int:
    """Trains what is not trained yet, measures, prints a table and writes the JSON; returns the exit code."""
    # --- variants, trees and prompts --------------------------------------------------------------------------
    check_new(args.json)
    base = apply_changes(load_config(args.config), args.changes)
    variants = {name: _variant(base, name) for name in dict.fromkeys(args.variant)}
    trees = list(dict.fromkeys(TreeSpec.parse(text) for text in args.tree or ("chain", "best_first:16")))
    temperatures = list(dict.fromkeys(args.temperature or [0.0, 1.0]))
    for temperature in temperatures:
        SamplingParams(temperature=temperature)
    prompts = [prompt for source in args.prompts for prompt in read_prompts(source, args.limit)]
    if not prompts:
        raise UserError("no prompt in any source: name other sources")

    target = open_checkpoint(base.target, base.adapter)
    tokenizer = load_tokenizer(target.path)
    asked = [encode_chat(tokenizer, [{"role": "user", "content": prompt.turns[0]}]) for prompt in prompts]
    for prompt, tokens in zip(prompts, asked, strict=True):
        check_fits(target.config, prompt.id, tokens, args.max_new)
    room = max(map(len, asked)) + args.max_new

    # --- training ---------------------------------------------------------------------------------------------
    for name, config in variants.items():
        _check_trained(args.folder / _folder_name(name), config)
    for name, config in variants.items():
        run = args.folder / _folder_name(name)
        if not (run / "drafter").exists():
            print(f"variant {name}: {run}", file=sys.stderr)
            try:
                train(config, run)
            except SystemExit:  # by SIGTERM: the run ends with 0, but nothing was measured
                raise SystemExit(TERMINATED) from None

    # --- decoding ---------------------------------------------------------------------------------------------
    loaded = load_target(base.target, jnp.float32, max_len=room, adapter=base.adapter)
    stop = stop_token_ids(tokenizer, target.path)
    found, losses = [], {}
    for name in variants:
        run = args.folder / _folder_name(name)
        losses[name] = _last_loss(run)
        drafter = load_drafter(run / "drafter", loaded.model.config, loaded.fingerprint)
        for tree in trees:
            for shared in (True, False) if any(temperatures) else (True,):
                engine = Engine(
                    loaded.model, drafter, tokenizer, stop, slots=SLOTS, max_len=room, tree=tree, shared_noise=shared
                )
                for temperature in temperatures if shared else filter(None, temperatures):
                    counts = _decode(engine, asked, temperature, args.max_new)
                    depths = [None if np.isnan(share) else round(share, 4) for share in counts.by_depth]
                    found.append(Measured(name, str(tree), temperature, shared, counts.length, depths))
                    print(f"{name}: {found[-1].setting}: {counts.length:.2f}", file=sys.stderr, flush=True)
        jax.clear_caches()  # programs of this drafter

    # --- results ----------------------------------------------------------------------------------------------
    _print(found, losses, base, len(asked))
    if args.json:
        report = {
            "machine": machine(),
            "jax": jax.__version__,
            "target": loaded.fingerprint,
            "config": args.config,
            "changes": args.changes,
            "steps": base.steps,
            "tokens": base.steps * base.batch_size * base.length,
            "seed": base.seed,
            "prompts": [prompt.id for prompt in prompts],
            "max_new": args.max_new,
            "losses": {name: finite(loss) for name, loss in losses.items()},
            "measured": [dataclasses.asdict(each) for each in found],
        }
        write_new(args.json, json.dumps(report, indent=2) + "\n")
    return 0


def _variant(base: RunConfig, name: str) -> RunConfig:
    return base if name == BASE else apply_changes(base, name.split())


def _check_trained(run: Path, config: RunConfig) -> None:
    """Raises UserError if a run's finished drafter is of another configuration."""
    if (run / "drafter").exists():
        changed = changes_since(parse_json((run / "config.json").read_text()), config)
        if changed:
            raise UserError(
                f"{run} was trained with another configuration ({'; '.join(changed)}): "
                "use that one, or another --folder"
            )


def _folder_name(variant: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", variant)


def _last_loss(run: Path) -> float:
    """The mean training loss of the last steps without skipped ones, spikes among them; nan if all were skipped."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records[-LAST:] if "skipped" not in record]
    return float(np.mean(losses)) if losses else float("nan")


def _decode(engine: Engine, prompts: Sequence[list[int]], temperature: float, max_new: int) -> Acceptance:
    params = [
        SamplingParams(temperature=temperature, seed=seed, max_new_tokens=max_new) for seed in range(len(prompts))
    ]
    return Acceptance.total([completion.statistics for completion in engine.generate(prompts, params)])


def _print(found: Sequence[Measured], losses: dict[str, float], base: RunConfig, num_prompts: int) -> None:
    tokens = base.steps * base.batch_size * base.length
    title = f"acceptance length; {base.steps} steps, {tokens} tokens, {num_prompts} prompts, {machine()}"
    columns = dict.fromkeys(each.setting for each in found)
    by_depth = {each.variant: each.by_depth for each in reversed(found)}  # under the first setting
    rows = []
    for variant, loss in losses.items():
        lengths = [f"{each.acceptance_length:.2f}" for each in found if each.variant == variant]
        depths = " ".join("-" if share is None else f"{share:.2f}" for share in by_depth[variant])
        rows.append((variant, f"{loss:.3f}", *lengths, depths))
    show(title, ("variant", "loss", *columns, "by depth, first setting"), rows, left=1)
