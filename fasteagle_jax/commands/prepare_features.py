"""Store the target's features of the training data, so that training need not run the target's layers.

For small targets: a token takes (F + 1) x H numbers, F being the feature layers and H the hidden width; for SmolLM2
135M 4.6 kB, so a million tokens 4.6 GB. A drafter that reads the target's keys and values needs the input of that layer
besides (5.8 kB); what is stored for it also serves drafters that read some of its layers. Target, data, length and
layers are those of a training run's configuration; all epochs, batch sizes and seeds use the same features. Without
them training runs the layers itself, which needs no disk and suits any target.

After an interruption of any kind the same command resumes, and writes files again that are missing or corrupt.

example:
  fasteagle prepare-features --config configs/smollm2_135m.py --output runs/features data=runs/data/answers.jsonl
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from fasteagle_jax.commands.terminal import Parser, program
from fasteagle_jax.data.conversations import read_conversations
from fasteagle_jax.data.features import STORED, FeatureSettings, TargetValues, write_features
from fasteagle_jax.data.manifest import check_target
from fasteagle_jax.data.packing import Batch, PackedData
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import writing
from fasteagle_jax.io.progress import progress_bar
from fasteagle_jax.targets.decoder import DecoderTarget
from fasteagle_jax.targets.loading import load_target
from fasteagle_jax.training.config import RunConfig, apply_changes, drafter_config, load_config
from fasteagle_jax.training.step import target_outputs


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Stores features as the command line says; returns the exit code."""
    args = _parser().parse_args(argv)
    prepare(apply_changes(load_config(args.config), args.changes), args.output, args.store)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fasteagle prepare-features", description=__doc__)
    parser.add_argument("--config", required=True, help="a Python file with get_config() -> RunConfig: the run's")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="for the features, resumed")
    parser.add_argument("--store", choices=tuple(STORED), default="bfloat16", help="as (default %(default)s)")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="as of fasteagle train")
    return parser


def prepare(config: RunConfig, folder: Path, store: str) -> None:
    """Writes the features of a run, or what the folder still lacks of them."""
    of_run: dict[str, Any] = {"training": True, "max_len": config.length, "adapter": config.adapter}
    loaded = load_target(config.target, config.dtype_of_target, **of_run)
    check_target(config.data, *loaded.fingerprints)
    conversations = read_conversations(*config.data, vocab_size=loaded.model.config.vocab_size)
    data = PackedData(conversations, config.length, config.batch_size, config.seed)
    if any(data.left_out):
        print(f"left out  {data.left_out}", file=sys.stderr)
    layers = drafter_config(config.drafter, loaded.model.config).input_layers
    settings = FeatureSettings(
        loaded.fingerprint, layers, loaded.model.config.hidden_size, data.digest(), config.length, store
    )
    num_tokens = int(data.lengths.sum())
    needed = num_tokens * settings.bytes_per_token
    print(f"features  {num_tokens} tokens x {settings.bytes_per_token} bytes: {needed / 1e9:.2f} GB", file=sys.stderr)

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        there = sum(file.stat().st_size for file in folder.glob("*.npy"))
        if (free := shutil.disk_usage(folder).free) < needed - there:
            raise UserError(
                f"{folder} needs {(needed - there) / 1e9:.1f} GB more and has {free / 1e9:.1f} GB free: "
                "name another --output, or train without stored features"
            )
        compute = partial(_compute, loaded.model, layers=layers, attention=config.attention)
        with progress_bar(num_tokens, "token", unit_scale=True) as bar:
            for done in write_features(folder, data, settings, compute):
                bar.update(done)
    print(f"{folder}: features of {num_tokens} tokens, {len(data.lengths)} pieces")


@partial(jax.jit, static_argnames=("layers", "attention"))
def _compute(target: DecoderTarget, batch: Batch, *, layers: tuple[int, ...], attention: str) -> TargetValues:
    return target_outputs(target, batch, layers, attention)
