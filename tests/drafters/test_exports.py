"""EAGLE-3 in the forms of other programs: each says what that one reads, comes back whole, or is refused by name."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fasteagle_jax.commands.import_drafter import _dtype, _feature_layers, _tensors, eagle3_config
from fasteagle_jax.drafters.eagle3 import Eagle3
from fasteagle_jax.drafters.exports import LAYER_IDS, RUNTIMES, export_drafter, runtime_config
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.drafters.files import fill, int8_scheme, tensors_of
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.errors import UserError
from tests.drafters.test_speculators import IDS, TARGET, ours

VERIFIER = {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture(scope="module")
def drafter() -> Eagle3:
    return ours()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_export_comes_back_whole(drafter, tmp_path, runtime):
    folder = tmp_path / "drafter"
    export_drafter(drafter, folder, runtime, TARGET, VERIFIER)
    raw, tensors = json.loads((folder / "config.json").read_text()), _tensors(folder)
    layers, told = _feature_layers(raw, TARGET.num_layers)
    assert layers == (2, 6, 9) and not told
    config = eagle3_config(raw, tensors, TARGET, 3, layers)
    assert config == drafter.config
    np.testing.assert_array_equal(np.flatnonzero(tensors.pop("t2d")), IDS)
    again = Eagle3(config, jax.random.key(1), stacked=False)
    fill(again, tensors, "x")
    expected = tensors_of(drafter)
    for name, value in tensors_of(again).items():
        np.testing.assert_array_equal(value, expected[name].astype(jnp.bfloat16).astype(value.dtype), err_msg=name)
    stored = {name: value.dtype.name for name, value in load_file(folder / "model.safetensors").items()}
    assert {kind for name, kind in stored.items() if name not in ("d2t", "t2d")} == {"bfloat16"}
    assert not any(name.startswith("model.") or "embed" in name or "scale" in name for name in stored)


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
def test_an_export_in_int8_comes_back_equal(drafter, tmp_path, runtime):
    """The layer's matrices packed four to an int32, the first in the lowest byte, with 128 for 0; all else bfloat16."""
    folder = tmp_path / "drafter"
    export_drafter(drafter, folder, runtime, TARGET, VERIFIER, "int8")
    raw, stored = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    matrices, own = {f"midlayer.{part}.weight" for part in parts}, tensors_of(drafter)
    assert {name for name in stored if "proj" in name} == {
        f"{name}_{part}" for name in matrices for part in ("packed", "scale", "shape")
    }
    expected = {name: value.astype(jnp.bfloat16) if value.ndim == 2 else value for name, value in own.items()}
    for name in matrices:
        packed, scale = stored[f"{name}_packed"], stored[f"{name}_scale"]
        assert packed.dtype == np.int32 and scale.dtype == jnp.bfloat16 and scale.shape == (len(packed), 1)
        assert tuple(stored[f"{name}_shape"]) == own[name].shape
        values = np.stack([(packed >> 8 * i & 255) - 128 for i in range(4)], axis=-1).reshape(own[name].shape)
        expected[name] = values * scale.astype(np.float32)
        assert np.linalg.norm(expected[name] - own[name]) < 0.01 * np.linalg.norm(own[name])
    group = raw["quantization_config"]["config_groups"]["group_0"]
    group["weights"]["observer_kwargs"] = {}  # as in files that compressed-tensors writes
    assert raw["quantization_config"]["format"] == "pack-quantized" and group["input_activations"] is None
    assert raw["quantization_config"]["ignore"] == ["re:.*lm_head$", "re:.*fc$"]
    tensors = _tensors(folder)
    config = eagle3_config(raw, tensors, TARGET, 3, (2, 6, 9))
    again = Eagle3(config, jax.random.key(1), _dtype(tensors), stacked=False)
    tensors.pop("t2d")
    fill(again, tensors, "x")
    for name, value in tensors_of(again).items():
        close = expected[name].astype(jnp.bfloat16) if value.ndim == 1 and "norm" in name else expected[name]
        np.testing.assert_array_equal(value, close.astype(value.dtype), err_msg=name)


def test_matrices_that_are_multiplied_as_one_are_all_in_int8_or_none(drafter, tmp_path):
    tensors = tensors_of(drafter)
    k = tensors["midlayer.self_attn.k_proj.weight"]
    k[:], k[:, 0] = 10.5 * 9 / 127, 9  # halfway between two integers
    rough = Eagle3(drafter.config, jax.random.key(0), stacked=False)
    tensors.pop("t2d")
    fill(rough, tensors, "x")
    export_drafter(rough, tmp_path / "drafter", "vllm", TARGET, VERIFIER, "int8")
    stored = load_file(tmp_path / "drafter" / "model.safetensors")
    for part, kind in (("self_attn.q", ""), ("self_attn.k", ""), ("self_attn.v", ""), ("self_attn.o", "_packed")):
        assert f"midlayer.{part}_proj.weight{kind}" in stored
    (pattern,) = json.loads((tmp_path / "drafter" / "config.json").read_text())["quantization_config"]["ignore"][2:]
    assert all(re.match(pattern.removeprefix("re:"), f"model.layers.32.{name}") for name in ("qkv_proj", "a.v_proj"))
    assert not re.match(pattern.removeprefix("re:"), "model.layers.32.self_attn.o_proj")


@pytest.mark.parametrize(
    ("runtime", "says"),
    [("tpu-inference", "the matrices of its EAGLE-3 have no scales"), ("speculators", "int8 was not tried there")],
)
def test_int8_is_refused_where_it_is_not_read(drafter, tmp_path, runtime, says):
    with pytest.raises(UserError, match=f"storage int8 is not written for {runtime}, {says}"):
        export_drafter(drafter, tmp_path / "drafter", runtime, TARGET, VERIFIER, "int8")
    assert not (tmp_path / "drafter").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"_scale": None}, "is int8 without a"),
        ({"_shape": None}, "is not of 8 bits in its"),
        ({"_shape": np.asarray([16, 8])}, "is not of 8 bits in its"),
    ],
)
def test_damaged_int8_is_refused_by_name(drafter, tmp_path, damage, says):
    export_drafter(drafter, tmp_path / "drafter", "vllm", TARGET, VERIFIER, "int8")
    path, name = tmp_path / "drafter" / "model.safetensors", "midlayer.mlp.up_proj.weight"
    tensors = load_file(path) | {f"{name}{part}": value for part, value in damage.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    with pytest.raises(UserError, match=f"{name}.* {says}"):
        _tensors(tmp_path / "drafter")


def test_each_program_finds_its_own_keys(drafter):
    configs = {runtime: runtime_config(drafter.config, runtime, TARGET, VERIFIER) for runtime in RUNTIMES}
    for runtime in ("vllm", "tpu-inference"):
        assert configs[runtime]["architectures"] == ["Eagle3LlamaForCausalLM"]
        assert configs[runtime][LAYER_IDS] == [2, 6, 9] and "eagle_config" not in configs[runtime]
    assert configs["sglang"]["architectures"] == ["LlamaForCausalLMEagle3"] and LAYER_IDS not in configs["sglang"]
    assert configs["sglang"]["eagle_config"] == {"use_aux_hidden_state": True, LAYER_IDS: [1, 5, 8]}
    assert configs["speculators"]["architectures"] == ["Eagle3Speculator"]
    assert configs["speculators"]["norm_before_residual"] is False  # vLLM takes its absence for True
    for runtime, config in configs.items():
        layer = config["transformer_layer_config"] if runtime == "speculators" else config
        assert layer["max_position_embeddings"] == TARGET.max_positions and layer["rope_theta"] == 5e5
        assert layer["rope_scaling"]["rope_type"] == "llama3" and layer["vocab_size"] == 259
        assert config["draft_vocab_size"] == len(IDS)


def test_a_drafter_of_all_tokens_has_a_map_only_where_one_is_needed(tmp_path):
    whole = Eagle3(default_config(TARGET, kind="eagle3"), jax.random.key(0), stacked=False)
    for runtime in RUNTIMES:
        export_drafter(whole, tmp_path / runtime, runtime, TARGET, VERIFIER)
        tensors = load_file(tmp_path / runtime / "model.safetensors")
        assert ("d2t" in tensors) == (runtime == "tpu-inference") and "t2d" not in tensors
    assert not load_file(tmp_path / "tpu-inference" / "model.safetensors")["d2t"].any()


@pytest.mark.parametrize(
    ("runtime", "changes", "says"),
    [
        ("sglang", {"window": 8}, "sglang does not read EAGLE-3 with a window of 8"),
        ("sglang", {"norm_before_residual": True, "fc_norm": True}, "with norm_before_residual, fc_norm: export"),
        ("tpu-inference", {"norm_output": True}, "tpu-inference does not read EAGLE-3 with norm_output"),
        ("vllm", {"qk_norm": True}, "vllm does not read EAGLE-3 with qk_norm"),
        ("vllm", {"feature_layers": (6, 2, 9)}, r"feature_layers is \(6, 2, 9\): programs join"),
        ("vllm", {"feature_layers": (2, 6)}, "vllm reads three layers"),
        ("sglang", {"feature_layers": (0, 6, 9)}, r"sglang reads three outputs .* \(0, 6, 9\)"),
        ("tpu-inference", {"feature_layers": (1, 6, 9)}, r"tpu-inference reads layers \(2, 6, 9\) of the target alone"),
    ],
)
def test_what_a_program_has_no_place_for_is_refused(drafter, runtime, changes, says):
    with pytest.raises(UserError, match=says):
        runtime_config(dataclasses.replace(drafter.config, **changes), runtime, TARGET, VERIFIER)


def test_windows_and_norms_come_back_where_they_are_read(drafter):
    changes = {"window": 8, "norm_before_residual": True, "norm_before_fc": True, "norm_output": True}
    config = dataclasses.replace(drafter.config, **changes)
    for runtime in ("vllm", "speculators"):
        raw = runtime_config(config, runtime, TARGET, VERIFIER)
        tensors = {"lm_head.weight": np.zeros((len(IDS), 16), np.float32)}
        assert eagle3_config(raw, tensors, TARGET, 3, (2, 6, 9)) == config
    with pytest.raises(UserError, match="norm_before_fc and fc_norm are both True"):
        dataclasses.replace(config, fc_norm=True)


def test_only_eagle3_is_read_elsewhere(tmp_path):
    cascade = jax.eval_shape(lambda: FastEagle(default_config(TARGET), jax.random.key(0), stacked=False))
    with pytest.raises(UserError, match="a drafter of kind fasteagle cannot be exported for vllm: eagle3 alone can"):
        export_drafter(cascade, tmp_path / "x", "vllm", TARGET, VERIFIER)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"speculators_model_type": "dflash"}, "the drafter is speculators' dflash"),
        ({"attention_bias": True}, "the drafter has attention_bias"),
        ({"parallel_drafting": True}, "the drafter has parallel_drafting"),
        ({"quantization_config": {"quant_method": "gptq"}}, "has quantization_config of gptq, None, which"),
        ({"quantization_config": 8}, "has quantization_config of None"),
        ({"quantization_config": {"config_groups": {"a": [1]}}}, "has quantization_config of None"),
        ({"quantization_config": int8_scheme("float-quantized", [])}, "of compressed-tensors, float-quantized, which"),
        (
            {"quantization_config": int8_scheme("int-quantized", []) | {"config_groups": {"a": {"weights": {}}}}},
            "of compressed-tensors, int-quantized, {'num_bits': None",
        ),
        ({"target_hidden_size": 32}, "target_hidden_size 32"),
        ({"logit_scale": 0.25}, "logit_scale 0.25, which is not supported"),
        (
            {"eagle_config": {"aux_hidden_state_layers": [1]}},
            "aux_hidden_state_layers, which .* give them as eagle_aux",
        ),
        ({"layer_types": ["chunked_attention"]}, "type 'chunked_attention'"),
        ({"layer_types": ["sliding_attention"]}, "sliding_window of None"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(drafter, entries, says):
    raw = runtime_config(drafter.config, "vllm", TARGET, VERIFIER) | entries
    with pytest.raises(UserError, match=says):
        eagle3_config(raw, {}, TARGET, 3, (2, 6, 9))
