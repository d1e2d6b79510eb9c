"""Folders that compressed-tensors has written: int8 and fp8 weights with scales."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.linear import to_int8
from fasteagle_jax.targets.loading import load_target, open_checkpoint
from tests.tiny_folder import make_target

UP = "model.layers.1.mlp.up_proj.weight"


def scheme(**changes) -> dict:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights | changes, "input_activations": {"num_bits": 8, "dynamic": True}}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def rounded(folder: Path, config: dict) -> dict[str, np.ndarray]:
    """Rounds the layers' matrices of a folder to int8; returns what they stand for."""
    hf, file = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    (folder / "config.json").write_text(json.dumps(hf | {"quantization_config": config}))
    tensors, values = load_file(file), {}
    for name, value in list(tensors.items()):
        if "_proj" in name:
            columns, scale = to_int8(value.T)
            scale = scale.astype(ml_dtypes.bfloat16)[:, None]  # [out, 1], as files have it
            tensors |= {name: np.ascontiguousarray(columns.T), f"{name}_scale": scale}
            # Of activations that are rounded by scales made beforehand.
            tensors[name.replace(".weight", ".input_scale")] = np.ones(1, np.float32)
            values[name] = columns.T * scale.astype(np.float32)
    save_file(tensors, file)
    return values


def test_int8_weights_are_read_as_what_they_stand_for(tmp_path):
    folder = make_target(tmp_path / "target")
    values = rounded(folder, scheme())
    checkpoint = open_checkpoint(folder)
    assert not any(name.endswith("_scale") for name in checkpoint.names())
    for name, value in values.items():
        np.testing.assert_array_equal(checkpoint.read(name), value)
        np.testing.assert_array_equal(checkpoint.read(name, 3), value[:3])
    model = load_target(str(folder)).model
    np.testing.assert_array_equal(model.layer(1).mlp.up.matrix, values[UP].T)
    kept = load_target(str(folder), jnp.int8, stacked=True).model.layer(1).mlp.up
    np.testing.assert_array_equal(kept.weight[...], load_file(folder / "model.safetensors")[UP].T)  # the file's own


@pytest.mark.torch
def test_fp8_weights_are_too(tmp_path):
    """Written by torch, since safetensors for NumPy has no fp8."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = make_target(tmp_path / "target")
    hf, file = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    config = scheme(type="float", strategy="tensor") | {"format": "float-quantized"}
    (folder / "config.json").write_text(json.dumps(hf | {"quantization_config": config}))
    tensors = load_file(file)
    scale = tensors[UP].abs().max() / 448
    own = (tensors[UP] / scale).to(torch.float8_e4m3fn)
    save_file(tensors | {UP: own, f"{UP}_scale": scale[None]}, file)
    expected = own.float().numpy() * scale.numpy()
    checkpoint = open_checkpoint(folder)
    np.testing.assert_array_equal(checkpoint.read(UP), expected)
    np.testing.assert_array_equal(checkpoint.read(UP, 2), expected[:2])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "weights of quant_method gptq, which is not read: use compressed-tensors",
        ),
        (scheme() | {"format": "pack-quantized"}, "weights of format pack-quantized"),
        (scheme(num_bits=4), 'weights of group_0 {"num_bits": 4, "type": "int"'),
        (scheme(strategy="group"), '"strategy": "group"}'),
        (scheme(symmetric=False), '"symmetric": false'),
        (scheme() | {"kv_cache_scheme": {"num_bits": 8}}, "weights of kv_cache_scheme"),
    ],
)
def test_schemes_that_are_not_read_are_named(config, message, tmp_path):
    folder = make_target(tmp_path / "target")
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | {"quantization_config": config}))
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_rounded_matrix_without_a_scale_is_named(tmp_path):
    folder = make_target(tmp_path / "target")
    rounded(folder, scheme())
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{UP}_scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{UP} has type I8 and no scale"):
        open_checkpoint(folder)
