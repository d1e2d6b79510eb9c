"""The target and drafter that a program's options name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fasteagle_jax.bench.prompts import Models
from fasteagle_jax.commands.terminal import add_dtype_option, dtype_named
from fasteagle_jax.drafters.files import load_drafter
from fasteagle_jax.nn.linear import product_dtype
from fasteagle_jax.targets.loading import DEFAULT_TARGET, load_target
from fasteagle_jax.targets.tokenizer import load_tokenizer, stop_token_ids


def add_target_options(parser: Any) -> None:
    """Adds --target, --adapter, --dtype and --cache-dtype."""
    parser.add_argument("--target", default=DEFAULT_TARGET, help="folder, .gguf file or hub name (default %(default)s)")
    parser.add_argument(
        "--adapter",
        default="",
        metavar="FOLDER",
        help="a LoRA adapter of PEFT's, merged into the target as it is loaded",
    )
    add_dtype_option(parser, "default float32 on a CPU, else bfloat16")
    parser.add_argument(
        "--cache-dtype", choices=("int8",), help="of the target's keys and values; default that of the weights"
    )


def load_models(args: argparse.Namespace, drafter_folder: Path | None) -> Models:
    """The models that the options name; UserError for those that cannot be had or do not fit each other."""
    dtype = dtype_named(args.dtype)
    options: dict[str, Any] = {name: getattr(args, name, None) for name in ("max_len", "cache_dtype")}
    target = load_target(args.target, dtype, **options, adapter=args.adapter)
    tokenizer = load_tokenizer(target.checkpoint.path)
    stop_tokens = stop_token_ids(tokenizer, target.checkpoint.path)
    drafter = None
    if drafter_folder is not None:
        drafter = load_drafter(drafter_folder, target.model.config, target.fingerprint, product_dtype(dtype))
    return Models(target.model, target.fingerprint, tokenizer, stop_tokens, drafter, jnp.dtype(dtype).name)
