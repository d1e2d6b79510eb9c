"""What a config.json says is read or refused by its name, and never ignored."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.rope import RopeConfig, Rotation, rotate, rotation
from fasteagle_jax.targets.checkpoint import fingerprint
from fasteagle_jax.targets.loading import load_target, open_checkpoint
from fasteagle_jax.targets.table import FAMILIES, family_of_files
from tests.tiny_families import YARN, hf_config, torch_family
from tests.tiny_folder import make_target


def read(name: str, **changes):
    hf = hf_config(name) | changes
    return family_of_files(hf).config.from_hf(hf)


REFUSED = [
    ("llama", {"sliding_window": 8}, "LlamaForCausalLM targets do not support sliding_window 8: use a target without"),
    ("llama", {"attn_logit_softcapping": 30.0, "qkv_bias": True}, "support qkv_bias True, attn_logit_softcapping 30.0"),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "support layer_types"),
    ("llama", {"no_rope_layers": [1, 1, 0, 1]}, "support no_rope_layers"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported: LlamaForCausalLM targets use silu"),
    ("qwen2", {"attention_bias": True}, "Qwen2ForCausalLM targets do not support attention_bias True"),
    ("qwen3", {"mlp_bias": True}, "support mlp_bias True"),
    ("qwen3", {"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ("mistral", {"attention_bias": True}, "support attention_bias True"),
    ("mistral", {"sliding_window": 0.5}, "window is 0.5: give a whole number"),
    ("gemma2", {"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported"),
    ("gemma3", {"use_bidirectional_attention": True}, "support use_bidirectional_attention True"),
    ("gemma3", {"layer_types": ["chunked_attention"] * 4}, "support layer_types chunked_attention"),
    ("gemma3", {"layer_types": ["sliding_attention"] * 3}, "layer_types has 3 entries for 4 layers"),
    ("gemma3", {"sliding_window": None, "layer_types": ["sliding_attention"] * 4}, "and no sliding_window"),
    ("phi3", {"mlp_bias": True}, "support mlp_bias True"),
    ("phi3", {"partial_rotary_factor": 0.7}, "11 of 16 channels would be rotated: they must be an even number"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 4 layers"),
    ("granite", {"sliding_window": 8}, "support sliding_window 8"),
    ("llama", {"num_local_experts": 4}, "LlamaForCausalLM targets do not support num_local_experts 4"),
    ("mixtral", {"attention_bias": True}, "MixtralForCausalLM targets do not support attention_bias True"),
    ("mixtral", {"num_experts_per_tok": 9}, "a token has 9 experts, and there are 4"),
    ("qwen2_moe", {"attention_bias": True}, "Qwen2MoeForCausalLM targets do not support attention_bias True"),
    ("qwen3_moe", {"mlp_bias": True}, "Qwen3MoeForCausalLM targets do not support mlp_bias True"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0 is not supported: GptOssForCausalLM targets use 7.0"),
    ("gpt_oss", {"mlp_bias": True}, "GptOssForCausalLM targets do not support mlp_bias True"),
    ("llama", {"swiglu_limit": 7.0}, "LlamaForCausalLM targets do not support swiglu_limit 7.0"),
    ("qwen3_moe", {"num_experts": 0}, "num_experts is 0: give a whole number"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported: it rotates"),
    ("llama", {"rope_scaling": {"rope_type": "proportional"}}, "rope type 'proportional' is not supported: use one of"),
    ("llama", {"rope_scaling": {"type": "default", "mrope_section": [1]}}, "not supported: mrope_section"),
    ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}}, "has 1 values"),
    ("llama", {"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM is not supported: use a target of Llama"),
    ("llama", {"architectures": ["FalconForCausalLM"]}, "GptOssForCausalLM; CONTRIBUTING.md says how to add"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_switches_that_are_not_handled_are_named(name, changes, message):
    with pytest.raises(UserError) as caught:
        read(name, **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_switches_at_rest_change_nothing():
    hf = {"sliding_window": None, "layer_types": ["full_attention"] * 4, "no_rope_layers": [1] * 4, "logits_scaling": 1}
    assert read("llama", **hf, mlp_bias=False, partial_rotary_factor=1.0) == read("llama")
    assert read("qwen2", use_sliding_window=False, sliding_window=8).layer_kinds == (
        read("qwen2", use_sliding_window=False).layer_kinds
    )
    assert read("qwen2", use_sliding_window=True).local_layers


def test_what_a_config_leaves_out_is_at_the_familys_default():
    def without(name: str, *left_out: str):
        hf = hf_config(name) | {"max_position_embeddings": 8192}
        hf = {key: value for key, value in hf.items() if key not in left_out}
        return family_of_files(hf).config.from_hf(hf)

    assert without("mistral", "sliding_window").window == 4096
    assert without("qwen3", "head_dim").head_dim == 128
    assert without("smollm3", "rope_theta", "tie_word_embeddings").rope.theta == 2_000_000
    gemma = without("gemma3", "rope_theta", "rope_local_base_freq", "tie_word_embeddings", "sliding_window_pattern")
    assert gemma.rope.theta == 1_000_000 and gemma.local_rope.theta == 10_000 and gemma.tie_embeddings
    assert gemma.local_layers == (0, 1, 2, 3)  # the sixth would be global
    assert without("gemma2", "attn_logit_softcapping").soft_cap == 50


def test_layers_with_experts_are_those_that_both_switches_leave():
    assert read("qwen3_moe").dense_layers == () == read("mixtral").dense_layers
    assert read("qwen3_moe", decoder_sparse_step=3).dense_layers == (0, 1, 3)
    config = read("qwen2_moe", decoder_sparse_step=2, mlp_only_layers=[3])
    assert config.dense_layers == (0, 2, 3)
    assert [config.layer_at(i).experts is None for i in range(4)] == [True, False, True, True]


@pytest.mark.torch
def test_experts_of_which_the_file_lacks_some_are_named(tmp_path):
    torch_family(hf_config("qwen3_moe"), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    whole = tensors.pop(name)
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"{tmp_path}: it lacks {name}: take the complete checkpoint"):
        open_checkpoint(tmp_path)
    save_file(tensors | {name: whole[:-1].copy()}, file)
    with pytest.raises(UserError, match="experts.*up_proj.weight have different shapes"):
        open_checkpoint(tmp_path)


def test_a_window_of_all_positions_is_none():
    assert read("phi3", sliding_window=256).layer_kinds == read("phi3", sliding_window=None).layer_kinds
    kinds = read("gemma3", sliding_window=256).layer_kinds
    assert {kind.window for kind in kinds} == {None} and len({kind.rope for kind in kinds}) == 2


def test_yarn_has_positions_for_its_factor():
    assert read("qwen2", rope_scaling=YARN, max_position_embeddings=16).max_positions == 64


def test_positions_which_are_a_limit_of_use_are_in_no_fingerprint(tmp_path):
    checkpoint = open_checkpoint(make_target(tmp_path / "target"))
    for name in FAMILIES:
        one, other, wider = (
            fingerprint(dataclasses.replace(checkpoint, config=read(name, **changes)))
            for changes in ({}, {"max_position_embeddings": 512}, {"intermediate_size": 56})
        )
        assert one == other != wider


def test_a_stored_head_counts_though_the_configuration_ties_it(tmp_path, caplog):
    """It was decoded with the embedding, silently; transformers 5 takes the stored head, with a warning."""
    folder = make_target(tmp_path / "target")
    plain = load_target(str(folder))
    config, file = folder / "config.json", folder / "model.safetensors"
    hf, tensors = json.loads(config.read_text()), load_file(file)
    config.write_text(json.dumps(hf | {"tie_word_embeddings": True}))
    assert not caplog.text
    own = load_target(str(folder))
    assert "says tie_word_embeddings true and has another lm_head.weight, which is used" in caplog.text
    np.testing.assert_array_equal(own.model.head[...], tensors["lm_head.weight"])
    assert own.fingerprint == plain.fingerprint and own.checkpoint.config == plain.checkpoint.config
    caplog.clear()
    copy = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | {"lm_head.weight": copy}, file)
    tied = load_target(str(folder))
    assert tied.model.head is None and not caplog.text
    copy[-1] += 1  # a row that no glance at the first ones shows
    save_file(tensors | {"lm_head.weight": copy}, file)
    assert load_target(str(folder)).model.head is not None
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    config.write_text(json.dumps(hf))
    with pytest.raises(UserError, match=r"says tie_word_embeddings false and has no lm_head.weight"):
        load_target(str(folder))


def test_a_rotation_of_some_channels_keeps_the_others():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    table = rotation(jnp.arange(3)[None], RopeConfig(partial=0.5), 8)
    rotated = rotate(x, table, 3.0)
    np.testing.assert_allclose(rotated[..., 4:], 3 * x[..., 4:])
    np.testing.assert_allclose(rotated[..., :4], 3 * rotate(x[..., :4], Rotation(*table)), rtol=1e-6)
    assert np.abs(rotated[:, 1:, :, :4] - 3 * x[:, 1:, :, :4]).min() > 0


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "longrope"])
def test_a_rotary_embedding_survives_a_config(kind):
    factors = {"short_factor": (1.0, 2.0), "long_factor": (3.0, 4.0)} if kind == "longrope" else {}
    own = {"beta_fast": 16.0, "truncate": False} if kind == "yarn" else {}
    magnitude = {"magnitude": 1.5} if kind in ("yarn", "longrope") else {}
    rope = RopeConfig(5.0, kind, 2.0, original_max_positions=64, **factors, **own, **magnitude)
    assert RopeConfig.from_hf(json.loads(json.dumps(rope.to_hf()))) == rope
