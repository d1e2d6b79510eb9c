"""Bring a published EAGLE-3 drafter in: a folder as its authors or `speculators` wrote it becomes one of ours.

The source holds config.json and model.safetensors, or pytorch_model.bin (read by torch, which must then be installed).
Both families of tensor names are known, midlayer.* and layers.0.*, and a reduced draft vocabulary by d2t. The target is
needed for its sizes and its fingerprint; the embedding is taken from it, the rotary embedding is the drafter's own.

example:
  fasteagle import --source EAGLE3-LLaMA3.1-Instruct-8B --target meta-llama/Llama-3.1-8B-Instruct --output eagle3
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fasteagle_jax.commands.terminal import Parser, program, whole
from fasteagle_jax.drafters.base import DrafterConfig
from fasteagle_jax.drafters.eagle3 import Eagle3, Eagle3Config
from fasteagle_jax.drafters.files import fill, save_drafter
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import check_new, first_line, read_json
from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.targets.checkpoint import fingerprint
from fasteagle_jax.targets.config import DecoderConfig
from fasteagle_jax.targets.loading import DEFAULT_TARGET, open_checkpoint

LEVELS = 8  # of the published evaluation: a first pass and depth 7
_NOT_OURS = ("embed_tokens.weight", "t2d")  # the target's, and what d2t says already


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Imports as the command line says; returns the exit code."""
    parser = Parser(prog="fasteagle import", description=__doc__)
    parser.add_argument("--source", required=True, type=Path, metavar="FOLDER", help="the published drafter")
    parser.add_argument("--target", default=DEFAULT_TARGET, help="folder, .gguf file or hub name (default %(default)s)")
    parser.add_argument("--levels", type=whole(1), default=LEVELS, metavar="N", help="of a draft (default %(default)s)")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="a new folder")
    import_drafter(parser.parse_args(argv))
    return 0


def import_drafter(args: argparse.Namespace) -> None:
    """Writes args.output and says what it holds."""
    check_new(args.output)
    target = open_checkpoint(args.target)
    raw = read_json(args.source / "config.json")
    tensors = _tensors(args.source)
    config = eagle3_config(raw, tensors, target.config, args.levels)
    if config.draft_vocab_size == config.vocab_size:
        tensors.pop("d2t", None)  # files have it all the same, of zeros
    _check_ids(tensors, config)
    drafter = Eagle3(config, jax.random.key(0), _dtype(tensors), stacked=False)
    fill(drafter, tensors, str(args.source))
    save_drafter(drafter, args.output, fingerprint(target), {"imported": {"source": args.source.name}})
    print(f"{args.output}: EAGLE-3, {config.draft_vocab_size} of {config.vocab_size} tokens, {args.levels} levels")


def eagle3_config(
    raw: Mapping[str, Any], tensors: Mapping[str, np.ndarray], target: DecoderConfig, levels: int
) -> Eagle3Config:
    """The sizes of a published drafter from its config.json, in either form, for a target of these sizes."""
    sizes = dict(raw.get("transformer_layer_config") or raw)  # speculators' form nests them
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    if absent := [name for name in names if name not in sizes]:
        raise UserError(f"the drafter's config.json lacks {', '.join(absent)}: take its complete configuration")
    if sizes["hidden_size"] != target.hidden_size:
        raise UserError(
            f"the drafter has hidden_size {sizes['hidden_size']}, the target {target.hidden_size}: "
            "name the target that it was trained for"
        )
    if raw.get("norm_before_residual"):
        raise UserError("the drafter has norm_before_residual, which is not supported: take one without it")
    layers = raw.get("eagle_aux_hidden_state_layer_ids") or sizes.get("eagle_aux_hidden_state_layer_ids")
    changes: dict[str, Any] = {
        "kind": "eagle3",
        "num_levels": levels,
        "intermediate_size": sizes["intermediate_size"],
        "num_heads": sizes["num_attention_heads"],
        "num_kv_heads": sizes["num_key_value_heads"],
        "head_dim": sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"],
        "rms_norm_eps": float(sizes.get("rms_norm_eps", target.rms_norm_eps)),
        "rope": RopeConfig.from_hf(sizes),  # its own, which is often not the target's
        "draft_vocab_size": len(tensors["lm_head.weight"]) if "lm_head.weight" in tensors else target.vocab_size,
    }
    if layers:
        changes["feature_layers"] = tuple(layers[:3])
    return default_config(target, **changes)


def _check_ids(tensors: Mapping[str, np.ndarray], config: DrafterConfig) -> None:
    """Raises UserError where the draft vocabulary holds a token that the target has not."""
    last = int((np.arange(len(tensors["d2t"])) + tensors["d2t"]).max()) if "d2t" in tensors else 0
    if last >= config.vocab_size:
        raise UserError(
            f"the drafter guesses tokens up to {last}, the target has {config.vocab_size}: "
            "name the target that it was trained for"
        )


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """A published drafter's tensors under the names of its authors' first files."""
    path = folder / "model.safetensors"
    try:
        if path.is_file():
            found = load_file(path)
        else:
            path = folder / "pytorch_model.bin"
            found = _torch_tensors(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a folder with model.safetensors") from None
    tensors = {}
    for name, value in found.items():
        name = name.removeprefix("model.")
        name = f"midlayer.{name.removeprefix('layers.0.')}" if name.startswith("layers.0.") else name
        if name not in _NOT_OURS:
            tensors[name] = value
    return tensors


def _torch_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise OSError("there is neither model.safetensors nor pytorch_model.bin")
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} is torch's: pip install torch, or convert it to model.safetensors") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise OSError(first_line(error)) from None
    return {
        name: value.float().numpy().astype(jnp.bfloat16) if value.dtype == torch.bfloat16 else value.numpy()
        for name, value in loaded.items()
    }


def _dtype(tensors: Mapping[str, np.ndarray]) -> Any:
    dtype = tensors["fc.weight"].dtype if "fc.weight" in tensors else np.dtype(np.float32)
    return jnp.bfloat16 if dtype in (np.dtype(np.float16), jnp.bfloat16) else jnp.float32
