"""EAGLE-3 in the forms of other programs: each says what that one reads, comes back whole, or is refused by name."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fasteagle_jax.commands.import_drafter import _feature_layers, _tensors, eagle3_config
from fasteagle_jax.drafters.eagle3 import Eagle3
from fasteagle_jax.drafters.exports import LAYER_IDS, RUNTIMES, export_drafter, runtime_config
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.drafters.files import fill, tensors_of
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
        ({"target_hidden_size": 32}, "target_hidden_size 32"),
        ({"layer_types": ["chunked_attention"]}, "type 'chunked_attention'"),
        ({"layer_types": ["sliding_attention"]}, "sliding_window of None"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(drafter, entries, says):
    raw = runtime_config(drafter.config, "vllm", TARGET, VERIFIER) | entries
    with pytest.raises(UserError, match=says):
        eagle3_config(raw, {}, TARGET, 3, (2, 6, 9))
