"""Matrices that compressed-tensors has rounded to int8 or fp8, with a scale a row or a tensor.

What the format says of activations is left out: they are not rounded here, as if the file had the rounded matrices in
float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.checkpoint import StoredTensor

ROUNDED_TYPES = ("I8", "F8_E4M3")  # in a safetensors file
_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
_READ = "compressed-tensors with 8-bit weights, symmetric, a scale a channel or a tensor (int8, fp8)"


def is_rounded(hf: Mapping[str, Any], path: Path, packed: Sequence[str] = ()) -> bool:
    """Whether a config.json says that matrices are rounded as here; UserError, naming the scheme, if it is not read.

    `packed` are methods that the family unpacks.
    """
    scheme = hf.get("quantization_config") or hf.get("compression_config")
    if not scheme:
        return False
    method, form = scheme.get("quant_method"), scheme.get("format")
    wrong = []
    if method in packed:
        return False
    if method != "compressed-tensors":
        wrong.append(f"quant_method {method}")
    elif form not in _FORMATS:
        wrong.append(f"format {form}")
    if scheme.get("kv_cache_scheme"):
        wrong.append("kv_cache_scheme")
    groups = scheme.get("config_groups") or {}
    for name, group in groups.items() if not wrong else ():
        weights = group.get("weights") or {}
        settings = {key: weights.get(key) for key in ("num_bits", "type", "symmetric", "strategy")}
        known = settings["num_bits"] == 8 and settings["type"] in ("int", "float") and settings["symmetric"]
        if not known or settings["strategy"] not in ("channel", "tensor"):
            wrong.append(f"{name} {json.dumps(settings)}")
    if wrong:
        raise UserError(f"{path} has weights of {', '.join(wrong)}, which is not read: use {_READ}, or floats")
    return True


def dequantised(path: Path, tensors: Mapping[str, StoredTensor], kinds: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The tensors of a file, with those that are rounded multiplied by their scales.

    These scales are left out, and so are those of activations.
    `kinds` has the types, of ROUNDED_TYPES, of the rounded ones, whose scales are named NAME_scale.
    """
    left_out = {f"{name}_scale" for name in kinds} | kinds.keys()
    left_out |= {name for name in tensors if name.endswith((".input_scale", ".output_scale"))}
    found = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    for name, kind in kinds.items():
        load = tensors[name].load if kind == "I8" else _fp8(path, name)
        found[name] = StoredTensor(tensors[name].shape, _scaled(load, tensors[f"{name}_scale"].load))
    return found


def _scaled(
    load: Callable[[int | None], np.ndarray], scale: Callable[[int | None], np.ndarray]
) -> Callable[[int | None], np.ndarray]:
    def scaled(num_rows: int | None) -> np.ndarray:
        factors = scale(None).astype(np.float32).reshape(-1, 1)  # [out, 1], or [1, 1] of a whole tensor
        values = load(num_rows).astype(np.float32)
        return values * (factors if len(factors) == 1 else factors[: len(values)])

    return scaled


def _fp8(path: Path, name: str) -> Callable[[int | None], np.ndarray]:
    """Reads a tensor of float8_e4m3fn, which NumPy, and so safetensors for NumPy, does not have."""

    def load(num_rows: int | None) -> np.ndarray:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(size))[name]
        data = np.memmap(path, np.uint8, "r", 8 + size + entry["data_offsets"][0], tuple(entry["shape"]))
        return np.asarray(data[:num_rows]).view(ml_dtypes.float8_e4m3fn)

    return load
