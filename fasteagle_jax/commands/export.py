"""Write the drafter of a training run's checkpoint, whether the run is finished or not, or one in a folder for others.

The folder holds model.safetensors and config.json, as a finished run's own `drafter` folder does, and a model card
(README.md) of the run's data, curve and acceptance length; it is read back and compared before the command ends. Stored
as int8 a drafter takes a quarter of its size in float32; its guesses differ a little, and decoding gives the target's
own tokens all the same.

With --for an EAGLE-3 drafter is written as another program reads it: its architecture's name there, the target's
layers counted its way, the target's positions, bfloat16, or for vllm and sglang its layer in --storage int8. What that
program has no place for is refused.

examples:
  fasteagle export --run runs/smollm2_135m --best --output drafters/smollm2_135m
  fasteagle export --run runs/smollm2_135m --storage int8 --output drafters/smollm2_135m-int8
  fasteagle export --run runs/smollm2_135m_eagle3 --for vllm --output eagle3-for-vllm
  fasteagle export --drafter eagle3 --target meta-llama/Llama-3.1-8B-Instruct --for sglang --output eagle3-for-sglang
  fasteagle export --run runs/smollm2_135m_eagle3 --for vllm --storage int8 --output eagle3-int8-for-vllm
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from fasteagle_jax.commands.terminal import Parser, program, whole
from fasteagle_jax.drafters.base import DrafterConfig
from fasteagle_jax.drafters.exports import RUNTIMES, export_drafter
from fasteagle_jax.drafters.files import (
    STORAGE,
    from_storage,
    load_drafter,
    save_drafter,
    tensors_of,
    to_storage,
)
from fasteagle_jax.drafters.table import class_of
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import check_new, write_text
from fasteagle_jax.io.text import parse_json
from fasteagle_jax.targets.checkpoint import Checkpoint, fingerprint
from fasteagle_jax.targets.loading import open_checkpoint
from fasteagle_jax.targets.table import family_of
from fasteagle_jax.training.checkpoints import Checkpoints
from fasteagle_jax.training.config import (
    RunConfig,
    config_of_record,
    drafter_config,
    earlier_runs,
    from_json,
    target_tokenizer,
    trained,
)
from fasteagle_jax.training.metrics_log import Record
from fasteagle_jax.training.model_card import model_card
from fasteagle_jax.training.optimizer import make_optimizer
from fasteagle_jax.training.step import first_state


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Exports as the command line says; returns the exit code."""
    parser = Parser(prog="fasteagle export", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=epath.Path, help="a training run's folder")
    source.add_argument("--drafter", type=Path, metavar="FOLDER", help="a drafter's folder, with --for and --target")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=whole(1), metavar="N", help="of a checkpoint that is kept; default the newest")
    which.add_argument("--best", action="store_true", help="the checkpoint of the highest measured acceptance length")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="a new folder")
    parser.add_argument("--storage", choices=STORAGE, help="of matrices (default float32, with --for bfloat16)")
    parser.add_argument("--for", dest="runtime", choices=RUNTIMES, help="the program that is to read EAGLE-3")
    parser.add_argument("--target", help="of --drafter; of a run it is the run's")
    parser.add_argument("--verifier", metavar="NAME", help="the target as that program finds it (default the target)")
    parser.add_argument("--license", default="", metavar="ID", help="of the model card, such as apache-2.0")
    export(parser.parse_args(argv))
    return 0


def export(args: argparse.Namespace) -> None:
    """Writes args.output and prints what it holds."""
    check_new(args.output)
    args.storage = args.storage or ("float32" if args.runtime is None else "bfloat16")
    if args.runtime is None and args.verifier is not None:
        raise UserError("--verifier is for --for: leave it out")
    if args.drafter is not None:
        _convert(args)
        return
    if args.target is not None:
        raise UserError("--target is for --drafter: a run's is in its configuration")
    try:
        config = from_json(parse_json((args.run / "config.json").read_text()))
    except FileNotFoundError:
        raise UserError(f"{args.run} holds no config.json: name a training run's folder") from None
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"{args.run / 'config.json'} is not of a training run: name a training run's folder") from None
    if not (args.run / "checkpoints").is_dir():
        raise _no_checkpoint(args.run, config)
    with Checkpoints(args.run / "checkpoints") as checkpoints:
        step = checkpoints.latest_step() if args.step is None else args.step
        if args.best:
            best = checkpoints.best()
            if best is None:
                raise UserError(
                    f"no checkpoint in {args.run} was measured: leave out --best, or train with evaluation.prompts"
                )
            step = best[0]
        if step is None:
            raise _no_checkpoint(args.run, config)
        record, sizes = checkpoints.record(step), None
        if record is not None:
            config, sizes = config_of_record(record)  # config.json's may be newer, with --allow-change
        target = open_checkpoint(config.target, config.adapter)
        target_sizes = target.config.for_length(config.length)  # as of the run's target
        drafter = _restored(config, sizes or drafter_config(config.drafter, target_sizes), checkpoints, step)
    mark = fingerprint(target, config.dtype_of_target)
    if record is not None and record["target_fingerprint"] != mark:
        raise UserError(
            f"{args.run} trains a drafter for target {record['target_fingerprint']}, the weights of {config.target} "
            f"are {mark}: use that target"
        )
    if args.runtime is not None:
        _write_for(args, drafter, target, args.verifier or config.target)
        return
    records = _records_until(step, args.run / "metrics.jsonl")
    tokens = record["data"]["tokens"] if record is not None else sum(each["tokens"] for each in records)
    earlier = (record or {}).get("earlier") or earlier_runs(config.drafter.start)
    info = target_tokenizer(target) | {"trained": trained(config, step, tokens, earlier)}
    save_drafter(drafter, args.output, mark, info, args.storage)
    tensors = tensors_of(drafter)
    written = json.loads((args.output / "config.json").read_text())
    card = model_card(written, records, sum(x.size for x in tensors.values()), args.storage, args.license)
    write_text(args.output / "README.md", card)
    expected = from_storage(to_storage(tensors, args.storage))
    found = tensors_of(load_drafter(args.output, target_sizes, mark, stacked=False))
    if any(not np.array_equal(expected[name].astype(found[name].dtype), found[name]) for name in expected):
        raise UserError(f"{args.output} does not read back as it was written: check the disk and export again")
    print(f"{args.output}: step {step}, {tokens / 1e6:.2f}M training tokens, {drafter.num_levels} levels")


def _convert(args: argparse.Namespace) -> None:
    """Writes a drafter's folder for another program."""
    if args.runtime is None or args.target is None or args.step is not None or args.best:
        raise UserError("--drafter needs --for and --target, and has no checkpoints: give these alone")
    target = open_checkpoint(args.target)
    drafter = load_drafter(args.drafter, target.config, fingerprint(target), stacked=False)
    _write_for(args, drafter, target, args.verifier or args.target)


def _write_for(args: argparse.Namespace, drafter: Any, target: Checkpoint, name: str) -> None:
    verifier = {"name_or_path": name, "architectures": list(family_of(target.config).architectures[:1])}
    export_drafter(drafter, args.output, args.runtime, target.config, verifier, args.storage)
    print(f"{args.output}: for {args.runtime}, {drafter.config.draft_vocab_size} tokens, target {name}")


def _no_checkpoint(run: epath.Path, config: RunConfig) -> UserError:
    return UserError(f"{run} has no checkpoint yet: wait for the first one, after {config.save_every} steps")


def _records_until(step: int, path: epath.Path) -> list[Record]:
    """The records of the steps up to one in metrics.jsonl."""
    records = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record["step"] > step:
            break  # before the last line, which a running training may be writing
        records.append(record)
    return records


def _restored(config: RunConfig, sizes: DrafterConfig, checkpoints: Checkpoints, step: int) -> Any:
    """The drafter of a checkpoint, in the form (stacked or list) that it was trained in."""

    def state(*, stacked: bool) -> tuple[Any, Any]:
        drafter = class_of(sizes)(sizes, jax.random.key(0), stacked=stacked)
        graph, params, constants = nnx.split(drafter, nnx.Param, ...)  # type: ignore[misc]  # `...`: all the rest
        optimizer = make_optimizer(config.optimizer, config.steps, config.loss.deepkd)
        return graph, (first_state(params, optimizer, config.optimizer.ema), constants)

    stacked = checkpoints.is_stacked(step)
    graph, like = nnx.eval_shape(lambda: state(stacked=stacked))
    train_state, constants = checkpoints.restore(step, like)
    return nnx.merge(graph, train_state.weights, constants)
