"""GPT-OSS in the forms that its files have: experts in MXFP4, as floats, and GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fasteagle_jax.compiling.published import PUBLISHED
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.checkpoint import fingerprint
from fasteagle_jax.targets.gpt_oss import GptOssConfig
from fasteagle_jax.targets.loading import load_target, open_checkpoint
from fasteagle_jax.targets.mxfp4 import unpack
from tests.tiny_families import hf_config, tiny_family

E, H, WIDE, LAYERS = 4, 64, 32, 2
HF = hf_config("gpt_oss") | dict(
    hidden_size=H, intermediate_size=WIDE, num_local_experts=E, num_hidden_layers=LAYERS, tie_word_embeddings=False
)
SCHEME = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
rng = np.random.default_rng(0)


def packed(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Random blocks and scales of matrices [E, out, in]."""
    *leading, num_in = shape
    blocks = rng.integers(256, size=(*leading, num_in // 32, 16)).astype(np.uint8)
    return blocks, rng.integers(118, 124, size=(*leading, num_in // 32)).astype(np.uint8)


def tensors_of_a_folder() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tensors of a folder with experts in MXFP4, and with the same experts in bfloat16, as transformers has it."""
    heads, kv_heads, D, V = (HF[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"))

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(ml_dtypes.bfloat16)

    shared = {"model.embed_tokens.weight": normal(V, H), "lm_head.weight": normal(V, H), "model.norm.weight": normal(H)}
    quantised, plain = {}, {}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shared |= {f"{layer}{name}.weight": normal(H) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, num in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            shared[f"{layer}self_attn.{name}_proj.weight"] = normal(num * D, H)
            shared[f"{layer}self_attn.{name}_proj.bias"] = normal(num * D)
        shared |= {
            f"{layer}self_attn.o_proj.weight": normal(H, heads * D),
            f"{layer}self_attn.o_proj.bias": normal(H),
            f"{layer}self_attn.sinks": normal(heads),
            f"{layer}mlp.router.weight": normal(E, H),
            f"{layer}mlp.router.bias": normal(E),
        }
        for name, num_out, num_in in (("gate_up_proj", 2 * WIDE, H), ("down_proj", H, WIDE)):
            shared[f"{layer}mlp.experts.{name}_bias"] = normal(E, num_out)
            blocks, scales = packed(E, num_out, num_in)
            quantised |= {f"{layer}mlp.experts.{name}_blocks": blocks, f"{layer}mlp.experts.{name}_scales": scales}
            plain[f"{layer}mlp.experts.{name}"] = np.ascontiguousarray(unpack(blocks, scales).swapaxes(1, 2))
    return shared | quantised, shared | plain


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A folder in MXFP4, and the same in bfloat16."""
    made = []
    for tensors, own in zip(tensors_of_a_folder(), ({"quantization_config": SCHEME}, {}), strict=True):
        folder = tmp_path_factory.mktemp("folder")
        (folder / "config.json").write_text(json.dumps(HF | own))
        save_file(tensors, folder / "model.safetensors")
        made.append(folder)
    return made[0], made[1]


@pytest.mark.torch
def test_mxfp4_is_unpacked_to_the_values_that_transformers_unpacks():
    """Of all bytes, and of all scales that give numbers bfloat16 has: 127 of them below 1 and as many above."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = np.arange(256, dtype=np.uint8).repeat(16).reshape(2, 8, 16, 16)
    scales = np.arange(256, dtype=np.uint8).reshape(2, 8, 16).clip(1, 251)
    ours = unpack(blocks, scales)
    for dtype in (torch.float32, torch.bfloat16):
        theirs = convert_moe_packed_tensors(torch.asarray(blocks), torch.asarray(scales), dtype=dtype)  # [E, in, out]
        np.testing.assert_array_equal(ours.astype(np.float32), theirs.float().numpy().swapaxes(1, 2))
    assert len(np.unique(ours.astype(np.float32))) > 256


def test_a_folder_in_mxfp4_is_that_of_its_values(folders):
    quantised, plain = (open_checkpoint(folder) for folder in folders)
    assert fingerprint(quantised) == fingerprint(plain) and quantised.names() == plain.names()
    for name in plain.names():
        assert quantised.shape(name) == quantised.read(name).shape
        np.testing.assert_array_equal(quantised.read(name), plain.read(name))
        np.testing.assert_array_equal(quantised.read(name, 3), plain.read(name)[:3])
    file = load_file(folders[1] / "model.safetensors")
    name = "model.layers.1.mlp.experts.{}"
    np.testing.assert_array_equal(
        quantised.read(name.format("up_proj.weight"))[2, 5], file[name.format("gate_up_proj")][2, :, 11]
    )
    np.testing.assert_array_equal(
        quantised.read(name.format("gate_proj.bias"))[2], file[name.format("gate_up_proj_bias")][2, 0::2]
    )


@pytest.mark.torch
def test_the_loaded_target_says_what_transformers_says_of_a_folder_in_mxfp4(folders):
    """Which unpacks it itself."""
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folders[0],
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    )
    text = rng.integers(1, HF["vocab_size"], size=30)
    with torch.no_grad():
        expected = theirs(torch.asarray(text[None]), use_cache=False).logits.numpy()
    model = load_target(str(folders[0]), jnp.float32).model
    visible = np.tril(np.ones((1, 30, 30), bool))
    found = jax.jit(lambda model: model.logits(model(text[None], np.arange(30)[None], visible).hidden))(model)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_blocks_and_scales_that_do_not_go_together_and_schemes_that_are_not_read_are_named(folders, tmp_path):
    tensors = load_file(folders[0] / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"

    def message(tensors: dict[str, np.ndarray], method: str = "mxfp4") -> str:
        (tmp_path / "config.json").write_text(json.dumps(HF | {"quantization_config": {"quant_method": method}}))
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UserError) as caught:
            load_target(str(tmp_path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"{name} has only one of blocks and scales" in message(
        {key: value for key, value in tensors.items() if key != f"{name}_scales"}
    )
    short = {f"{name}_scales": np.ascontiguousarray(tensors[f"{name}_scales"][:, :-1])}
    assert f"{name} has blocks (4, 64, 1, 16) and scales (4, 63, 1), which are no" in message(tensors | short)
    fewer = {f"{name}_bias": tensors[f"{name}_bias"][:3].copy()}
    assert f"{name}.bias is (3, 64) instead of (4, 64)" in message(tensors | fewer)
    flat = {f"{name}_bias": tensors[f"{name}_bias"].reshape(-1)}
    assert f"{name}.bias is (256,) instead of (4, 64)" in message(tensors | flat)
    flat = {f"{name}_blocks": tensors[f"{name}_blocks"].reshape(4, -1)}
    assert f"{name} has blocks (4, 1024) and scales (4, 64, 1), which are no" in message(tensors | flat)
    assert "quant_method mxfp8" in message(tensors, "mxfp8")


def test_a_gguf_of_it_is_that_of_its_folder(folders, tmp_path):
    """Blocks have another order of bytes there, and half the values with twice the scale."""
    file, checkpoint = load_file(folders[0] / "model.safetensors"), open_checkpoint(folders[0])
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_context_length(HF["max_position_embeddings"])
    writer.add_embedding_length(H)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_expert_feed_forward_length(WIDE)
    writer.add_head_count(HF["num_attention_heads"])
    writer.add_head_count_kv(HF["num_key_value_heads"])
    writer.add_key_length(HF["head_dim"])
    writer.add_layer_norm_rms_eps(HF["rms_norm_eps"])
    writer.add_rope_freq_base(HF["rope_theta"])
    writer.add_sliding_window(HF["sliding_window"])
    writer.add_expert_count(E)
    writer.add_expert_used_count(HF["num_experts_per_tok"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(HF["rope_scaling"]["factor"])
    writer.add_rope_scaling_orig_ctx_len(HF["rope_scaling"]["original_max_position_embeddings"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, LAYERS)
    for name in checkpoint.names():
        part, _, kind = name.rpartition(".")
        of_file = part if part.endswith("sinks") else name
        if ".experts." not in name:
            values = file[of_file].astype(np.float32)
            stored = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert stored is not None, part
            writer.add_tensor(f"{stored}.{kind}", values)
    for i in range(LAYERS):
        for name, place in (("gate_proj", "ffn_gate_exps"), ("up_proj", "ffn_up_exps"), ("down_proj", "ffn_down_exps")):
            experts = f"model.layers.{i}.mlp.experts"
            writer.add_tensor(f"blk.{i}.{place}.bias", checkpoint.read(f"{experts}.{name}.bias").astype(np.float32))
            source, rows = (
                ("down_proj", slice(None)) if name == "down_proj" else ("gate_up_proj", slice(name[0] == "u", None, 2))
            )
            blocks, scales = (file[f"{experts}.{source}_{part}"][:, rows] for part in ("blocks", "scales"))
            pairs = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
            halves = pairs[..., :16] | pairs[..., 16:] << 4  # values j and j + 16 in byte j
            data = np.concatenate([scales[..., None], halves], axis=-1).reshape(*blocks.shape[:2], -1)
            writer.add_tensor(f"blk.{i}.{place}.weight", data, raw_dtype=gguf.GGMLQuantizationType.MXFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_checkpoint(path)
    assert found.names() == checkpoint.names()
    for name in found.names():
        np.testing.assert_array_equal(found.read(name), checkpoint.read(name).astype(np.float32))
    expected = GptOssConfig.from_hf(HF | {"rope_scaling": HF["rope_scaling"] | {"beta_fast": 32.0}})
    assert found.config == expected and not found.config.rope.truncate


def test_it_is_what_its_published_configuration_says():
    """gpt-oss-20b's, as openai/gpt-oss-20b has it."""
    config = PUBLISHED["gpt_oss_20b"].target_config
    layer = config.layer
    assert (config.num_layers, config.hidden_size, layer.num_heads, layer.head_dim) == (24, 2880, 64, 64)
    assert config.local_layers == tuple(range(0, 24, 2)) and config.window == 128
    assert (layer.experts.num_experts, layer.experts.num_chosen) == (32, 4) and layer.sinks and layer.attention_bias
    assert config.rope.magnitude == pytest.approx(1.3466, abs=1e-4) and not config.rope.truncate
    # 20.9 billion weights: embedding and head, and of each layer attention, router and all experts.
    per_layer = layer.matrix_size + 3 * 28 * 2880 * 2880
    assert 2 * 201_088 * 2880 + 24 * per_layer == pytest.approx(20.9e9, rel=0.002)


def test_a_random_target_has_sinks_and_biases_that_matter():
    """Or the tests of lossless decoding would not see them."""
    model = tiny_family(HF)
    visible = np.tril(np.ones((1, 8, 8), bool))
    said = jax.jit(lambda model: model(np.arange(8)[None], np.arange(8)[None], visible).hidden)
    whole = said(model)
    for of in (model.layers.attention.sinks, model.layers.mlp.router.bias, model.layers.mlp.experts.down.bias):
        kept = of[...]
        of[...] = jnp.zeros_like(kept)
        assert np.abs(said(model) - whole).max() > 0.01
        of[...] = kept
