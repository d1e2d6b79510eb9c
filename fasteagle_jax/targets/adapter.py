"""A LoRA adapter in a folder of PEFT's, merged into a target's checkpoint: W + s B A, computed when W is read.

R rank. Of a matrix W [out, in], lora_A is [R, in], lora_B [out, R] and s is lora_alpha / R (/ sqrt(R) with use_rslora;
arXiv 2106.09685, section 4.1, and 2312.03732); of an embedding W [V, H], lora_embedding_A is [R, V] and
lora_embedding_B [H, R]. The sum is float32, and is rounded once, to the dtype that is loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import read_json
from fasteagle_jax.targets.checkpoint import Checkpoint, StoredTensor
from fasteagle_jax.targets.messages import short

_LARGEST = 1e30  # of ranks and scales, which no adapter has: a float32 does not hold much more
_PREFIX = "base_model.model."
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(\.default)?(\.weight)?"  # .default: of older files
)
# Settings that change what is computed and are not handled: name, the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "use_qalora": (False, None),
    "target_parameters": (None, []),
    # Others (pissa, olora, corda, loftq) begin by changing the weights below, which the target's files do not have.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The two parts of a module's update, read when they are needed."""

    a: StoredTensor
    b: StoredTensor
    scale: float
    is_embedding: bool

    def rows(self, num_rows: int | None) -> np.ndarray:
        """The first rows, None for all, of the update float32 [out, in]."""
        a, b = (part.load(None).astype(np.float32) for part in (self.a, self.b))
        if self.is_embedding:
            return self.scale * (a[:, :num_rows].T @ b.T)
        return self.scale * (b[:num_rows] @ a)


def with_adapter(
    checkpoint: Checkpoint, folder: Path, read_tensors: Callable[[Path], dict[str, StoredTensor]]
) -> Checkpoint:
    """The checkpoint with the adapter of a folder merged in, and with the adapter's digest as its `variant`.

    Args:
      checkpoint: of the target that the adapter was trained on.
      folder: with adapter_config.json and adapter_model.safetensors, as PEFT saves them.
      read_tensors: reads a safetensors file.

    Raises:
      UserError: a folder without them, a kind or a setting of adapters that is not handled (it is named), a module that
        the target lacks or of another size.
    """
    config = _config(folder)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        remedy = "save it with safe_serialization=True" if (folder / "adapter_model.bin").is_file() else "give a LoRA's"
        raise UserError(f"{folder} has no adapter_model.safetensors: {remedy}")
    pairs, whole = _parts(path, read_tensors(path), config)
    tensors = dict(checkpoint.tensors)
    for name, new in whole.items():
        _check(path, checkpoint, name, new.shape)
        tensors[name] = new
    for name, pair in pairs.items():
        shape = (pair.a.shape[1], pair.b.shape[0]) if pair.is_embedding else (pair.b.shape[0], pair.a.shape[1])
        _check(path, checkpoint, name, shape)
        tensors[name] = _merged(tensors[name], pair)
    if checkpoint.config.tie_embeddings and "model.embed_tokens.weight" in pairs:
        raise UserError(
            f"{path} changes the embedding of a target whose head is the same matrix: "
            "merge it with PEFT's merge_and_unload and give the merged folder"
        )
    digest = hashlib.sha256(path.read_bytes() + (folder / "adapter_config.json").read_bytes()).hexdigest()[:16]
    return dataclasses.replace(checkpoint, tensors=tensors, variant=digest)


def _config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no adapter_config.json: give a folder that PEFT saved")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{path} is of kind {kind!r}: LORA adapters alone can be merged; merge it with PEFT")
    for name, values in _NEUTRAL.items():
        if config.get(name) not in values:
            raise UserError(f"{path} has {name} {config[name]!r}, which is not handled: merge it with PEFT")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), (int, float)) or not 0 < config[name] < _LARGEST:
            raise UserError(f"{path} has {name} {config.get(name)!r}: give a number above 0")
    for name in ("rank_pattern", "alpha_pattern"):
        own = config.get(name) or {}
        if not isinstance(own, dict) or not all(isinstance(v, (int, float)) and 0 < v < _LARGEST for v in own.values()):
            raise UserError(f"{path} has {name} {short(own)}: give numbers above 0 by modules' names")
        for key in own:
            try:
                re.compile(key)
            except (re.error, OverflowError, RecursionError) as error:
                raise UserError(f"{path} has {name} {short(key)}, which is no pattern ({error}): mend it") from error
    return config


def _parts(
    path: Path, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> tuple[dict[str, _Pair], dict[str, StoredTensor]]:
    """The updates by the target's tensor names, and the tensors that the adapter replaces as a whole."""
    found: dict[str, dict[str, StoredTensor]] = {}
    embeddings: set[str] = set()
    whole: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(_PREFIX)
        if match := _LORA.fullmatch(name):
            found.setdefault(match["module"], {})[match["part"]] = tensor
            if match["embedding"]:
                embeddings.add(match["module"])
        else:
            whole[name.replace(".modules_to_save.default", "").replace(".modules_to_save", "")] = tensor
    pairs = {}
    for module, parts in found.items():
        if set(parts) != {"A", "B"} or parts["A"].shape[0] != parts["B"].shape[1]:
            raise UserError(f"{path}: {module} lacks one of lora_A and lora_B, or their ranks differ: save it again")
        rank = parts["A"].shape[0]
        pairs[f"{module}.weight"] = _Pair(
            parts["A"], parts["B"], _scale(path, module, rank, config), module in embeddings
        )
    if not pairs and not whole:
        raise UserError(f"{path} holds no weights: give a trained adapter")
    return pairs, whole


def _scale(path: Path, module: str, rank: int, config: Mapping[str, Any]) -> float:
    """A module's s; UserError if the rank of its weights is not the one in adapter_config.json."""

    def setting(pattern: str, default: float) -> float:
        # PEFT matches a pattern at the end of a module's name, from a dot on.
        own = config.get(pattern) or {}
        return next((v for key, v in own.items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)

    expected = setting("rank_pattern", config["r"])
    if rank != expected:
        raise UserError(
            f"{path}: {module} has rank {rank}, adapter_config.json says {expected}: take them from one run"
        )
    alpha = setting("alpha_pattern", config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check(path: Path, checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    if name not in checkpoint.tensors:
        raise UserError(
            f"{path} changes {name}, which {checkpoint.path} lacks: give the target that it was trained on, or, if "
            "this is it, merge it with PEFT's merge_and_unload and give the merged folder"
        )
    if checkpoint.shape(name) != tuple(shape):
        raise UserError(
            f"{path}: {name} is {tuple(shape)}, the target's {checkpoint.shape(name)}: "
            "give the target that it was trained on"
        )


def _merged(base: StoredTensor, pair: _Pair) -> StoredTensor:
    def load(num_rows: int | None) -> np.ndarray:
        return base.load(num_rows).astype(np.float32) + pair.rows(num_rows)

    return StoredTensor(base.shape, load)
