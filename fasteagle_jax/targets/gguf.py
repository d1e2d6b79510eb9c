"""A target in a GGUF file."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line
from fasteagle_jax.targets.checkpoint import Checkpoint, StoredTensor
from fasteagle_jax.targets.family import Family, GgufNames
from fasteagle_jax.targets.table import family_of_gguf

_GGUF_TOP = re.compile(r"(\w+)\.weight")
_GGUF_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_GGUF_ROTARY = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")  # tables, no parameters
# The format's numbers of value types.
_STRING, _ARRAY = 8, 9
_NUMBER_TYPES = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
_NUMBER_TYPES |= {10: "<u8", 11: "<i8", 12: "<f8"}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file: its shape [out, in], its type, its stored bytes uint8 [out, bytes a row]."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: np.ndarray = dataclasses.field(repr=False)

    def read(self, num_rows: int | None = None) -> np.ndarray:
        """The values of all or the first `num_rows` rows: float16 and bfloat16 as stored, others as float32."""
        if len(self.shape) == 1:  # rows are values here, and `data` their bytes
            return self._values(self.data)[:num_rows]
        return self._values(self.data[:num_rows])

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """The values int8 [..., out, in] of a Q8_0 matrix, and the scales float16 [..., out, in / 32] of its blocks."""
        _, size = GGML_QUANT_SIZES[self.kind]
        blocks = self.data.reshape(*self.shape[:-1], -1, size)  # a float16 and 32 int8 each
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        return np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(self.shape), scales

    def _values(self, data: np.ndarray) -> np.ndarray:
        if self.kind == GGMLQuantizationType.F16:
            return data.view(np.float16)
        if self.kind == GGMLQuantizationType.BF16:
            return data.view(ml_dtypes.bfloat16)
        try:
            return dequantize(data, self.kind)
        except NotImplementedError as error:
            raise UserError(f"GGUF type {self.kind.name} is not supported: use a Q4_K or Q8_0 file") from error


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata and tensors (under their GGUF names, data unread) of a GGUF file; UserError if it is damaged.

    Parses the header itself: gguf.GGUFReader is slow, since it makes several NumPy arrays for every string of the
    vocabulary.
    """
    try:
        return _parse_gguf(np.memmap(path, dtype=np.uint8, mode="r"))
    except (OSError, ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path} is truncated or no GGUF file ({first_line(error)}): download it again") from error


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a GGUF file; UserError if it is damaged or of an unknown family."""
    metadata, stored = read_gguf(path)
    try:
        family = family_of_gguf(metadata.get("general.architecture", "unknown"))
        names = family.gguf
        assert names is not None
        config = family.config.from_hf(_hf_config(path, family, metadata, stored))
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(f"{path}") else f"{path}: {error}") from error
    tensors: dict[str, StoredTensor] = {}
    for name, hf_name in _hf_names(path, names, stored):
        tensor = stored[name]
        entry = StoredTensor(tensor.shape, tensor.read)
        if tensor.kind == GGMLQuantizationType.Q8_0 and len(tensor.shape) > 1:
            entry = dataclasses.replace(entry, blocks=tensor.blocks)
        if any(f".{part}." in name for part in names.permuted):
            num_heads = config.num_heads if ".attn_q." in name else config.num_kv_heads
            if tensor.shape[0] != num_heads * config.head_dim:
                raise UserError(
                    f"{path}: {name} has {tensor.shape[0]} rows, not {num_heads} heads of {config.head_dim}: "
                    "take another copy of the model"
                )
            entry = _unpermuted(entry, num_heads)
        tensors[hf_name] = entry
    return Checkpoint(path, config, tensors)


def _parse_gguf(file: np.ndarray) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    cursor = _Cursor(file)
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("<u4")
    if version not in (2, 3):
        raise ValueError(f"version {version} instead of 2 or 3")
    num_tensors, num_fields = cursor.number("<u8"), cursor.number("<u8")
    metadata = {cursor.string(): cursor.value(cursor.number("<u4")) for _ in range(num_fields)}
    headers = []
    for _ in range(num_tensors):
        name = cursor.string()
        shape = tuple(cursor.number("<u8") for _ in range(cursor.number("<u4")))[::-1]
        headers.append((name, shape, GGMLQuantizationType(cursor.number("<u4")), cursor.number("<u8")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.offset // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in headers:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ValueError(f"{name} of shape {shape} does not fill blocks of {block} values")
        stored = (*shape[:-1], shape[-1] // block * block_bytes)
        data = file[start + offset : start + offset + math.prod(stored)]
        if len(data) < math.prod(stored):
            raise ValueError(f"the file ends inside {name}")
        tensors[name] = GgufTensor(shape, kind, data.reshape(stored))
    return metadata, tensors


class _Cursor:
    """A position in the header of a GGUF file; every `take` past the end raises ValueError."""

    def __init__(self, file: np.ndarray) -> None:
        self.file = file.data
        self.offset = 0

    def take(self, size: int) -> bytes:
        data = bytes(self.file[self.offset : self.offset + size])
        if len(data) < size:
            raise ValueError("the file ends inside its header")
        self.offset += size
        return data

    def number(self, dtype: str | np.dtype[Any]) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

    def string(self) -> str:
        return self.take(int.from_bytes(self.take(8), "little")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.number("<u4"), self.number("<u8")
            if kind == _STRING:
                return [self.string() for _ in range(count)]
            dtype = self.number_type(kind)
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return self.number(self.number_type(kind))

    def number_type(self, kind: int) -> np.dtype[Any]:
        if kind not in _NUMBER_TYPES:
            raise ValueError(f"unknown value type {kind}")
        return np.dtype(_NUMBER_TYPES[kind])


def _hf_names(path: Path, known: GgufNames, names: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of GGUF and Hugging Face names; UserError for a tensor that the family does not have."""
    for name in names:
        top, block = _GGUF_TOP.fullmatch(name), _GGUF_BLOCK.fullmatch(name)
        if _GGUF_ROTARY.fullmatch(name):
            continue
        if top and top[1] in known.top:
            yield name, f"{known.top[top[1]]}.weight"
        elif block and block[2] in known.block:
            yield name, f"model.layers.{block[1]}.{known.block[block[2]]}.{block[3]}"
        else:
            raise UserError(
                f"{path}: tensor {name} has no place in a {known.architecture} model: use a target without it"
            )


def _unpermuted(tensor: StoredTensor, num_heads: int) -> StoredTensor:
    """The rows (or biases) of q or k in Hugging Face's order.

    In GGUF the rows of a head that are rotated as a pair are neighbours, 0 D/2 1 D/2+1 ...; in Hugging Face's order the
    first members of all pairs come first, then the second ones, 0 1 ... D/2 D/2+1 ...
    """

    def in_order(rows: np.ndarray) -> np.ndarray:
        pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])  # [head, D/2, member, ...]
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    def blocks() -> tuple[np.ndarray, np.ndarray]:
        assert tensor.blocks is not None
        values, scales = tensor.blocks()
        return in_order(values), in_order(scales)

    return StoredTensor(
        tensor.shape, lambda num: in_order(tensor.load(None))[:num], blocks if tensor.blocks is not None else None
    )


def _hf_config(
    path: Path, family: Family, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]
) -> dict[str, Any]:
    """The Hugging Face `config.json` equivalent to the metadata, as a dict."""
    architecture = metadata["general.architecture"]

    def field(key: str, default: Any = None) -> Any:
        key = f"{architecture}.{key}"
        value = metadata.get(key, default)
        if value is None:
            raise UserError(f"{path} lacks {key}: convert the model again with llama.cpp")
        if isinstance(value, list):  # one value per layer
            if len(set(value)) != 1:
                raise UserError(f"{path}: {key} differs between layers: use a target with equal layers")
            value = value[0]
        # Files hold float32, where 1e-5 is 9.999999747e-06: the shortest spelling is what was meant.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} has no token_embd.weight: take a complete model (no part of a split file)")
    num_heads = field("attention.head_count")
    head_dim = field("attention.key_length", field("embedding_length") // num_heads)
    if field("rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{path}: partly rotated heads are not supported: use a plain Llama target")
    theta, max_positions = field("rope.freq_base", 10_000.0), field("context_length")
    scaling: dict[str, Any] = {"rope_type": field("rope.scaling.type", "none").replace("none", "default")}
    scaling |= family.gguf.rope if family.gguf is not None else {}
    scaling["factor"] = field("rope.scaling.factor", 1.0)
    scaling["original_max_position_embeddings"] = field("rope.scaling.original_context_length", max_positions)
    if "rope_freqs.weight" in tensors:
        original = field("rope.scaling.original_context_length", 8192)
        scaling = _llama3_scaling(path, tensors["rope_freqs.weight"].read(), theta, head_dim, original)
    experts = {
        name: value
        for name, key in (("num_local_experts", "expert_count"), ("num_experts_per_tok", "expert_used_count"))
        if (value := field(key, 0))
    }
    return experts | {
        "architectures": list(family.architectures),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": field("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": max_positions,
        "sliding_window": field("attention.sliding_window", 0) or None,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,  # q, k and v alone have theirs in Qwen2
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _llama3_scaling(
    path: Path, divisors: np.ndarray, theta: float, head_dim: int, original: int
) -> dict[str, float | int | str]:
    """The llama3 scaling that `rope_freqs.weight` (D/2 divisors of the rotary frequencies) was computed from.

    The file has only the result: the factor is its largest entry, and the two bounds are assumed to be those of all
    published Llama 3 models, 1 and 4. UserError if these settings do not reproduce the file.
    """
    factor = float(divisors.max(initial=1.0))
    low, high = 1.0, 4.0
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    ramp = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)  # 1: short waves, left alone
    expected = 1 / ((1 - ramp) / factor + ramp)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UserError(
            f"{path}: rope_freqs.weight is not the Llama 3 scaling of factor {factor:g}, bounds {low:g} and "
            f"{high:g}, {original} positions: use the model's Hugging Face folder"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
