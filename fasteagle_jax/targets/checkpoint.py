"""A target's checkpoint, the same for all file formats, and its fingerprint.

`loading.open_checkpoint(name)` returns a `Checkpoint`: the configuration and, one at a time, the tensors under their
Hugging Face names and shapes ([out, in]). Files are checked when they are opened, so that a truncated download is found
before the first tensor is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fasteagle_jax.errors import UserError

_FINGERPRINT_ROWS = 64  # of the embedding and of the head


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in its file: its Hugging Face shape, and a function that reads its first rows (None: all).

    `blocks`, of one that the file has in int8 with a scale of each BLOCK (`nn.linear`) inputs, reads these: int8
    [..., out, in] and float16 [..., out, in / BLOCK].
    """

    shape: tuple[int, ...]
    load: Callable[[int | None], np.ndarray]
    blocks: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A target's configuration and its tensors, read lazily under their Hugging Face names."""

    path: Path
    config: Any  # the family's configuration
    tensors: Mapping[str, StoredTensor] = dataclasses.field(repr=False)
    variant: str = ""  # a digest of what was merged into the tensors (an adapter); empty: nothing
    notes: tuple[str, ...] = ()  # what to warn of when the weights are loaded

    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self.tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, which is not read."""
        return self._stored(name).shape

    def read(self, name: str, num_rows: int | None = None) -> np.ndarray:
        """Tensor `name`, or its first `num_rows` rows, in float32, float16 or bfloat16 (ml_dtypes) as stored.

        Quantised GGUF tensors are dequantised to float32. The array may be a read-only view of a file.
        """
        return self._stored(name).load(num_rows)

    @property
    def in_blocks(self) -> frozenset[str]:
        """The tensors that `read_blocks` reads."""
        return frozenset(name for name, tensor in self.tensors.items() if tensor.blocks is not None)

    def read_blocks(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tensor `name` of `in_blocks`, int8 [..., out, in], and its scales float16 [..., out, in / BLOCK]."""
        blocks = self._stored(name).blocks
        assert blocks is not None
        return blocks()

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise UserError(f"{self.path} has no tensor {name}: take a complete checkpoint of the target")
        return self.tensors[name]


def split_fused(
    tensors: Mapping[str, StoredTensor], fused: Mapping[str, Mapping[str, int]], num_layers: int
) -> dict[str, StoredTensor]:
    """The tensors, with those that hold several matrices one below the other replaced by these.

    `fused` has the names and numbers of rows of the matrices by the tensor's name within a layer. Raises UserError for
    a tensor of another number of rows.
    """
    split = dict(tensors)
    for layer in range(num_layers):
        for name, rows in fused.items():
            whole = split.pop(f"model.layers.{layer}.{name}.weight", None)
            if whole is None:
                continue
            if whole.shape[0] != sum(rows.values()):
                raise UserError(
                    f"model.layers.{layer}.{name}.weight has {whole.shape[0]} rows instead of {sum(rows.values())}: "
                    "take the complete, unmodified checkpoint"
                )
            stops = itertools.accumulate(rows.values())
            for part, stop in zip(rows, stops, strict=True):
                split[f"model.layers.{layer}.{part}.weight"] = _rows_of(whole, stop - rows[part], stop)
    return split


def join_experts(
    tensors: Mapping[str, StoredTensor], experts: str, num_experts: int, num_layers: int
) -> dict[str, StoredTensor]:
    """The tensors, with those of a layer's experts replaced by one [E, ...] of each part.

    `experts` is the name of the list of them within a layer: LIST.3.PART.weight becomes a part of LIST.PART.weight.
    Raises UserError if some have a part that others lack, or have in another shape.
    """
    joined = dict(tensors)
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}.{experts}."
        parts = {name.removeprefix(prefix).partition(".")[2] for name in tensors if name.startswith(prefix)}
        for part in parts:
            names = [f"{prefix}{e}.{part}" for e in range(num_experts)]
            if absent := [name for name in names if name not in joined]:
                raise UserError(f"it lacks {', '.join(absent[:3])}: take the complete checkpoint")
            own = [joined.pop(name) for name in names]
            if len({tensor.shape for tensor in own}) > 1:
                raise UserError(f"{prefix}*.{part} have different shapes: take the complete, unmodified checkpoint")
            joined[prefix + part] = StoredTensor((num_experts, *own[0].shape), _stack_of(own))
    return joined


def _stack_of(tensors: Sequence[StoredTensor]) -> Callable[[int | None], np.ndarray]:
    return lambda num: np.stack([tensor.load(None) for tensor in tensors[:num]])


def _rows_of(tensor: StoredTensor, start: int, stop: int) -> StoredTensor:
    return StoredTensor((stop - start, *tensor.shape[1:]), lambda num: tensor.load(stop)[start:][:num])


# The fields of the first fingerprints, hashed even at their defaults. max_positions is not among them: it is a limit of
# use, which users change, and not a property of the weights.
_FIRST_FIELDS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "rms_norm_eps", "rope", "tie_embeddings", "attention_bias", "mlp_bias",
    "theta", "kind", "factor", "low_freq_factor", "high_freq_factor", "original_max_positions",
}  # fmt: skip


def _identity(config: Any) -> dict[str, Any]:
    """The fields of a configuration that identify a target, in their order."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _FIRST_FIELDS or (field.name != "max_positions" and value != field.default):
            fields[field.name] = _identity(value) if dataclasses.is_dataclass(value) else value
    return fields


def fingerprint(checkpoint: Checkpoint, dtype: Any = None) -> str:
    """Sixteen hex digits that identify this target, the same for all file formats of the same values.

    Hashes the configuration, all names and shapes, and, in float32, the norm weights and the first rows of the
    embedding and of an untied head: megabytes, not the whole model. A file that differs in layers' matrices alone has
    the same fingerprint; a checkpoint that an adapter was merged into (its `variant`), and weights rounded to a `dtype`
    of int8, have another one. If the file has all layers' matrices in int8 blocks, none is rounded. A new field of a
    configuration is left out at its default, so that it does not change fingerprints.
    """
    config = _identity(checkpoint.config)
    for value in config.values():
        if isinstance(value, dict) and value["kind"] not in ("llama3", "yarn", "longrope"):
            del value["original_max_positions"]
    # A tied head may be stored or left out, and old files store the rotary frequencies: neither is a weight.
    ignored = ("lm_head.weight",) if checkpoint.config.tie_embeddings else ()
    names = [name for name in checkpoint.names() if name not in ignored and not name.endswith("inv_freq")]
    variant = [checkpoint.variant] if checkpoint.variant else []
    if dtype is not None and np.dtype(dtype) == np.int8 and _is_rounded(checkpoint):
        variant.append("int8")
    identity = [config, [(name, checkpoint.shape(name)) for name in names], *variant]
    digest = hashlib.sha256(json.dumps(identity).encode())
    for name in names:
        if name.endswith("norm.weight") or name in ("model.embed_tokens.weight", "lm_head.weight"):
            num_rows = None if name.endswith("norm.weight") else _FINGERPRINT_ROWS
            digest.update(checkpoint.read(name, num_rows).astype("<f4").tobytes())
    return digest.hexdigest()[:16]


def _is_rounded(checkpoint: Checkpoint) -> bool:
    """Whether a dtype of int8 rounds any matrix of the layers."""
    kept = checkpoint.in_blocks
    of_layers = (name for name in checkpoint.names() if name.startswith("model.layers.") and name.endswith(".weight"))
    return any(name not in kept and len(checkpoint.shape(name)) > 1 for name in of_layers)
