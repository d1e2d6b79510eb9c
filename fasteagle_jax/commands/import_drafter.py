"""Bring a published EAGLE-3 drafter in: a folder as its authors or `speculators` wrote it becomes one of ours.

The source holds config.json and model.safetensors, or pytorch_model.bin (read by torch, which must then be installed).
Both families of tensor names are known, midlayer.* and layers.0.*, and a reduced draft vocabulary by d2t. The target is
needed for its sizes and its fingerprint; the embedding is taken from it, the rotary embedding is the drafter's own. The
norms of EAGLE-3.1 are read (norm_before_residual, norm_before_fc, fc_norm, norm_output), and a sliding window. The
target's layers that it reads are counted by their inputs (vLLM, speculators), or in an eagle_config by their outputs
(SGLang, SpecForge); what a file does not say is told. Matrices in compressed-tensors' int8 become float32. What is not
supported is refused by its name.

example:
  fasteagle import --source EAGLE3-LLaMA3.1-Instruct-8B --target meta-llama/Llama-3.1-8B-Instruct --output eagle3
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fasteagle_jax.commands.terminal import Parser, program, whole
from fasteagle_jax.drafters.eagle3 import Eagle3, Eagle3Config
from fasteagle_jax.drafters.files import draft_vocabulary_ids, fill, from_storage, int8_scheme, save_drafter, unpack
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import check_new, first_line, read_json
from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.targets.checkpoint import Checkpoint, fingerprint
from fasteagle_jax.targets.config import DecoderConfig
from fasteagle_jax.targets.loading import DEFAULT_TARGET, open_checkpoint

LEVELS = 8  # of the published evaluation: a first pass and depth 7
_LAYERS = "eagle_aux_hidden_state_layer_ids"
_EMBEDDING, _OWN_EMBEDDING = "model.embed_tokens.weight", "embed_tokens.weight"
# Changes of the model that some published drafters have: those that are read here are fields of Eagle3Config.
_READ = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_UNSUPPORTED = ("attention_bias", "mlp_bias", "bias", "qkv_bias", "parallel_drafting")
_FORMATS = ("int-quantized", "pack-quantized")  # of compressed-tensors, int8 with a scale a row


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
    layers, guess = _feature_layers(raw, target.config.num_layers)
    config = eagle3_config(raw, tensors, target.config, args.levels, layers)
    ids = draft_vocabulary_ids(tensors, config.vocab_size, str(args.source))
    tensors.pop("t2d", None)  # says what d2t says
    if config.draft_vocab_size == config.vocab_size:
        tensors.pop("d2t", None)  # files have it all the same, of zeros
    embedding = _drop_copies(tensors, target, ids, str(args.source))
    drafter = Eagle3(config, jax.random.key(0), _dtype(tensors), stacked=False)
    fill(drafter, tensors, str(args.source))
    save_drafter(drafter, args.output, fingerprint(target), {"imported": {"source": args.source.name}})
    residual = ""
    if "speculators_model_type" in raw and "norm_before_residual" not in raw:
        residual = "its config.json has no norm_before_residual: taken as false, as speculators does (vLLM takes true)"
    for told in (guess, embedding, residual):
        if told:
            print(told, file=sys.stderr)
    print(
        f"{args.output}: EAGLE-3, {config.draft_vocab_size} of {config.vocab_size} tokens, {args.levels} levels, "
        f"the target's features before layers {', '.join(map(str, config.feature_layers))}"
    )


def eagle3_config(
    raw: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    target: DecoderConfig,
    levels: int,
    layers: tuple[int, ...] | None,
) -> Eagle3Config:
    """The sizes of a published drafter from its config.json, in either form, for a target of these sizes.

    `layers` of the target are those whose inputs it reads; None for EAGLE-3's own.
    """
    sizes = dict(raw.get("transformer_layer_config") or raw)  # speculators' form nests them
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    if absent := [name for name in names if name not in sizes]:
        raise UserError(f"the drafter's config.json lacks {', '.join(absent)}: take its complete configuration")
    if sizes["hidden_size"] != target.hidden_size:
        raise UserError(
            f"the drafter has hidden_size {sizes['hidden_size']}, the target {target.hidden_size}: "
            "name the target that it was trained for"
        )
    if (kind := raw.get("speculators_model_type", "eagle3")) != "eagle3":
        raise UserError(f"the drafter is speculators' {kind}, which is not supported: take an eagle3")
    holders = (raw, sizes, raw.get("eagle_config") or {})
    for holder in holders:
        _check_scheme(holder.get("quantization_config"))
        if named := [name for name in _UNSUPPORTED if holder.get(name)]:
            raise UserError(f"the drafter has {', '.join(named)}, which is not supported: take one without it")
        if named := [name for name in holder if "layer" in name and "hidden_state" in name and name != _LAYERS]:
            raise UserError(f"the drafter has {', '.join(named)}, which is not supported: give them as {_LAYERS}")
        if holder.get("logit_scale") not in (None, 1):
            raise UserError(
                f"the drafter has logit_scale {holder['logit_scale']}, which is not supported: take another"
            )
        if holder.get("hidden_act", "silu") not in ("silu", "swish", None):
            raise UserError(f"the drafter has hidden_act {holder['hidden_act']!r}: take one with silu")
        if holder.get("use_aux_hidden_state", True) is False:
            raise UserError("the drafter has use_aux_hidden_state false, as no EAGLE-3 has: take one that reads layers")
        if holder.get("num_hidden_layers", 1) != 1:
            raise UserError(f"the drafter has {holder['num_hidden_layers']} layers: take one of a single layer")
        if holder.get("target_hidden_size") not in (None, target.hidden_size):
            raise UserError(f"the drafter has target_hidden_size {holder['target_hidden_size']}: name its target")
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
        "qk_norm": "midlayer.self_attn.q_norm.weight" in tensors,
        "window": _window(sizes),
    }
    changes |= {name: any(bool(holder.get(name)) for holder in holders) for name in _READ}
    if layers:
        changes["feature_layers"] = layers
    return default_config(target, **changes)


def _check_scheme(scheme: Any) -> None:
    """Raises UserError for a quantization_config that is not of int8 matrices with a scale a row."""
    if not scheme:
        return

    def entries_of(value: Any) -> Mapping[str, Any]:
        return value if isinstance(value, Mapping) else {}

    entries = entries_of(scheme)
    weights = [
        entries_of(entries_of(group).get("weights")) for group in entries_of(entries.get("config_groups")).values()
    ]
    known = int8_scheme("", [])["config_groups"]["group_0"]["weights"]
    others = [said for own in weights if (said := {name: own.get(name) for name in known}) != known]
    if not weights or others or entries.get("format") not in _FORMATS:
        scheme = ", ".join(map(str, (entries.get("quant_method"), entries.get("format"), *others[:1])))
        raise UserError(
            f"the drafter has quantization_config of {scheme}, which is not supported: take one in floats, or in "
            f"compressed-tensors' int8 with a scale a channel ({', '.join(_FORMATS)})"
        )


def _window(sizes: Mapping[str, Any]) -> int | None:
    """The sliding window of the drafter's layer, None for none; it has one if `layer_types` says so."""
    types, window = sizes.get("layer_types") or ["full_attention"], sizes.get("sliding_window")
    if types[0] not in ("full_attention", "sliding_attention"):
        raise UserError(f"the drafter's layer is of the type {types[0]!r}, which is not supported: take another")
    if types[0] == "sliding_attention" and not isinstance(window, int):
        raise UserError(f"the drafter's layer has a sliding_window of {window!r}: take its complete configuration")
    return window if types[0] == "sliding_attention" else None


def _feature_layers(raw: Mapping[str, Any], num_layers: int) -> tuple[tuple[int, ...] | None, str]:
    """The target's layers whose inputs the drafter reads, None if it does not say; and what was guessed.

    An eagle_config counts layers by their outputs, each the input of the next layer.
    """
    if "feature_layers" in raw:  # a folder of ours
        return tuple(raw["feature_layers"]), ""
    outputs_of_default = (1, num_layers // 2 - 1, num_layers - 4)
    found: dict[tuple[int, ...], str] = {}
    guess = ""
    for where in ("config.json", "transformer_layer_config", "eagle_config"):
        holder = raw if where == "config.json" else raw.get(where) or {}
        if not isinstance(holder, Mapping):
            raise UserError(f"the drafter's {where} is {holder!r}: take its complete configuration")
        ids = holder.get(_LAYERS)
        if ids is None:
            continue
        if not isinstance(ids, list) or not ids or set(map(type, ids)) != {int}:
            raise UserError(f"the drafter's {_LAYERS} is {ids!r}: give a list of layers")
        if ids != sorted(set(ids)):  # vLLM and SGLang join them in the order of layers, SpecForge as they stand
            raise UserError(f"the drafter's {_LAYERS} is {ids}: give different layers in their order")
        after = tuple(i + 1 for i in ids)
        if where == "eagle_config":
            found[after] = where
        elif tuple(ids) == outputs_of_default:
            guess = f"{_LAYERS} {ids}: taken as counted by outputs, before layers {after}, EAGLE-3's own"
            found[after] = where
        else:
            found[tuple(ids)] = where
    if len(found) > 1:
        both = " and ".join(f"before {layers} by {where}" for layers, where in found.items())
        raise UserError(f"the drafter reads the target's features {both}: mend its config.json")
    if not found:
        guess = f"its config.json has no {_LAYERS}: taken as EAGLE-3's own, 2, L // 2 and L - 3 of L layers"
    return next(iter(found), None), guess


def _drop_copies(tensors: dict[str, np.ndarray], target: Checkpoint, ids: np.ndarray | None, source: str) -> str:
    """Removes copies of the target's embedding, norm and head, the head's of all rows or the draft vocabulary's.

    UserError if norm or head differ: they are another target's. Returns what to tell of an embedding that does.
    """
    head = "lm_head.weight" if "lm_head.weight" in target.tensors else _EMBEDDING
    known = {_OWN_EMBEDDING: _EMBEDDING, "verifier_norm.weight": "model.norm.weight", "verifier_lm_head.weight": head}
    told = ""
    for name, of_target in known.items():
        if (copy := tensors.pop(name, None)) is None:
            continue
        own = target.read(of_target)
        own = own[ids] if ids is not None and len(copy) == len(ids) < len(own) else own
        if copy.shape == own.shape and np.array_equal(copy.astype("f4"), own.astype(copy.dtype).astype("f4")):
            continue
        if name != _OWN_EMBEDDING:
            raise UserError(
                f"{source}: {name} is not the target's {of_target}: name the target that it was trained for"
            )
        told = f"{source}: it has an embedding of its own, and the target's is used: fewer guesses may be accepted"
    return told


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
        tensors[name] = value
    return _in_floats(tensors, path)


def _in_floats(tensors: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """The tensors with matrices in int8, packed or not, in float32, times their scales."""
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        name = name.removesuffix("_packed")
        values, shape = unpack(tensors.pop(f"{name}_packed")), tensors.pop(f"{name}_shape", None)
        if shape is None or values.shape != tuple(shape):
            raise UserError(f"{path}: {name}_packed is not of 8 bits in its {name}_shape: take one in int8 or floats")
        tensors[name] = values
    tensors = from_storage(tensors)
    if bad := [name for name, value in tensors.items() if value.dtype == np.int8]:
        raise UserError(f"{path}: {bad[0]} is int8 without a {bad[0]}_scale: take the complete drafter")
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
    half = all(v.dtype in (np.dtype(np.float16), jnp.bfloat16) for v in tensors.values() if v.ndim == 2)
    return jnp.bfloat16 if half else jnp.float32
