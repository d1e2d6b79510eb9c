"""A target in a Hugging Face folder: config.json and safetensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line, read_json
from fasteagle_jax.targets.checkpoint import Checkpoint, StoredTensor, join_experts, split_fused
from fasteagle_jax.targets.compressed import ROUNDED_TYPES, dequantised, is_rounded
from fasteagle_jax.targets.messages import short
from fasteagle_jax.targets.table import family_of_files

_LONGEST_NAME = 255  # bytes of a file's name


def open_folder(folder: Path) -> Checkpoint:
    """The checkpoint in a Hugging Face folder; UserError if it is incomplete or of an unknown family."""
    path = folder / "config.json"
    if not path.is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        remedy = f"name {ggufs[0]} itself" if ggufs else "give a folder with config.json and *.safetensors"
        raise UserError(f"{folder} has no config.json: {remedy}")
    hf = read_json(path)
    try:
        family = family_of_files(hf)
        config = family.config.from_hf(hf)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(f"{path} has a value of a wrong type ({error}): take the model's own file") from error
    tensors: dict[str, StoredTensor] = {}
    for shard in _shards(folder):
        tensors.update(read_safetensors(shard, rounded=is_rounded(hf, path, family.packed)))
    tensors = _of_prefixes(tensors, family.prefixes)
    try:
        if family.fused is not None:
            tensors = split_fused(tensors, family.fused(config), config.num_layers)
        if family.experts:
            tensors = join_experts(tensors, family.experts, config.num_experts, config.num_layers)
        if family.tensors is not None:
            tensors = family.tensors(tensors, config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    return Checkpoint(folder, config, tensors)


def _of_prefixes(tensors: dict[str, StoredTensor], prefixes: Mapping[str, str | None]) -> dict[str, StoredTensor]:
    """The tensors by the names that a family gives them (see Family.prefixes), without those that it leaves out."""
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        new = prefixes.get(prefix, "")
        if new is not None:
            renamed[new + name.removeprefix(prefix)] = tensor
    return renamed


def _shards(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map: download it again")
        names = sorted({str(name) for name in weight_map.values()})
        if elsewhere := [name for name in names if not _is_file_name(name)]:
            raise UserError(f"{index} names {short(elsewhere[0])}, which is no file of this folder: download it again")
        shards = [folder / name for name in names]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise UserError(f"{folder} lacks {', '.join(missing)}, named by {index.name}: download them too")
        return shards
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise UserError(f"{folder} has no *.safetensors: save the model with safe_serialization=True")
    return shards


def _is_file_name(name: str) -> bool:
    """Whether a name can be that of a file in a given folder."""
    return bool(name) and name == Path(name).name and len(name.encode(errors="replace")) <= _LONGEST_NAME


def read_safetensors(path: Path, *, rounded: bool = False) -> dict[str, StoredTensor]:
    """The tensors of one file by name; opening it checks the header, and that the data covers the file.

    With `rounded` matrices may be int8 or fp8 with scales (see compressed.is_rounded), and are read as float32.
    """
    try:
        file = safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or no safetensors file ({first_line(error)}): download it again"
        ) from error
    for name, piece in slices.items():
        kind = piece.get_dtype()
        if name.endswith(".weight") and kind not in ("F32", "F16", "BF16"):
            if not rounded:
                raise UserError(f"{path}: {name} has type {kind}: take an unquantised checkpoint (F32/F16/BF16)")
            if kind not in ROUNDED_TYPES or f"{name}_scale" not in slices:
                raise UserError(f"{path}: {name} has type {kind} and no scale: take a complete checkpoint")

    def loader(name: str) -> Callable[[int | None], np.ndarray]:
        # A safetensors slice does not clamp, as NumPy's do.
        size = slices[name].get_shape()[:1]
        return lambda rows: file.get_tensor(name) if rows is None else slices[name][: min(rows, *size)]

    tensors = {name: StoredTensor(tuple(piece.get_shape()), loader(name)) for name, piece in slices.items()}
    if not rounded:
        return tensors
    kinds = {name: piece.get_dtype() for name, piece in slices.items()}
    return dequantised(path, tensors, {name: kind for name, kind in kinds.items() if kind in ROUNDED_TYPES})
