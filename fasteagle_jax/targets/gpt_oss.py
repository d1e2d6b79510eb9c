"""GPT-OSS: experts with biases and a clamped SwiGLU, attention sinks, every other layer local.

Files have gate and up of all experts in one tensor, interleaved, and most have the experts' matrices in MXFP4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.mlp import GATE_GAIN, GATE_LIMIT
from fasteagle_jax.nn.transformer import DECODER_LAYER_NAMES, LayerConfig
from fasteagle_jax.targets.checkpoint import StoredTensor
from fasteagle_jax.targets.config import read_window
from fasteagle_jax.targets.experts import SparseConfig, expert_names
from fasteagle_jax.targets.family import GGUF_BLOCK_NAMES, Family, GgufNames, layer_names
from fasteagle_jax.targets.mxfp4 import unpacked

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclasses.dataclass(frozen=True)
class GptOssConfig(SparseConfig):
    """Sizes and switches of a GPT-OSS target."""

    handled = frozenset(
        {"attention_bias", "sliding_window", "layer_types", "num_local_experts", "swiglu_alpha", "swiglu_limit"}
    )
    defaults = {
        "head_dim": 64,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "rope_theta": 150_000.0,
        "sliding_window": 128,
        "attention_bias": True,
        "swiglu_alpha": GATE_GAIN,
        "swiglu_limit": GATE_LIMIT,
    }

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Those of DecoderConfig, the window of every other layer, the first one included, and the experts."""
        for name, known in (("swiglu_alpha", GATE_GAIN), ("swiglu_limit", GATE_LIMIT)):
            if hf[name] != known:
                raise UserError(f"{name} {hf[name]!r} is not supported: GptOssForCausalLM targets use {known}")
        if not (hf.get("rope_parameters") or hf.get("rope_scaling")):
            hf = {**hf, "rope_scaling": _ROPE}
        return (
            super().read(hf)
            | read_window(hf, lambda i: i % 2 == 0)
            | {
                "num_experts": hf["num_local_experts"],
                "experts_per_token": hf["num_experts_per_tok"],
                "expert_size": hf["intermediate_size"],
            }
        )

    @property
    def layer(self) -> LayerConfig:
        """Those of SparseConfig, with sinks, biases of experts and router, and the clamped SwiGLU."""
        layer = super().layer
        assert layer.experts is not None
        experts = dataclasses.replace(layer.experts, bias=True)
        return dataclasses.replace(layer, experts=experts, sinks=True, activation="clamped_swiglu")


# --- tensors of its files ---------------------------------------------------------------------------------------


# The rows (outputs) of the parts of a tensor of experts.
_PARTS = {
    "gate_up_proj": {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)},
    "down_proj": {"down_proj": slice(None)},
}


def _tensors(tensors: Mapping[str, StoredTensor], config: GptOssConfig) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face folder by the names of the table below: unpacked, gate and up apart, [E, out, in].

    Raises UserError for packed experts whose blocks and scales do not go together.
    """
    found = dict(tensors)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        if (sinks := found.pop(f"{layer}self_attn.sinks", None)) is not None:
            found[f"{layer}self_attn.sinks.weight"] = sinks
        for name, parts in _PARTS.items():
            experts = f"{layer}{_EXPERTS}."
            bias, matrix = found.pop(f"{experts}{name}_bias", None), found.pop(f"{experts}{name}", None)
            blocks, scales = (found.pop(f"{experts}{name}_{kind}", None) for kind in ("blocks", "scales"))
            if (blocks is None) != (scales is None):
                raise UserError(f"{experts}{name} has only one of blocks and scales: take the complete checkpoint")
            for part, rows in parts.items():
                if bias is not None:
                    found[f"{experts}{part}.bias"] = _rows(bias, 2, rows)
                if matrix is not None:  # [E, in, out]
                    found[f"{experts}{part}.weight"] = _rows(matrix, 3, rows, transposed=True)
                if blocks is not None and scales is not None:
                    own = _rows(blocks, 4, rows), _rows(scales, 3, rows)
                    found[f"{experts}{part}.weight"] = unpacked(f"{experts}{part}", *own)
    return found


def _rows(tensor: StoredTensor, dims: int, rows: slice, *, transposed: bool = False) -> StoredTensor:
    """Some rows of a tensor [E, out, ...], or `transposed` [E, in, out], of so many dimensions; of others, itself.

    The shape of the latter is found wrong when the target is loaded.
    """
    if len(tensor.shape) != dims:
        return tensor

    def change(x: np.ndarray) -> np.ndarray:
        return (x.mT if transposed else x)[:, rows]

    shape = change(np.broadcast_to(np.zeros((), np.bool_), tensor.shape)).shape
    return StoredTensor(shape, lambda num: change(tensor.load(num)))


_EXPERTS = "mlp.experts"

GPT_OSS = Family(
    ("GptOssForCausalLM",),
    GptOssConfig,
    layer=layer_names(
        DECODER_LAYER_NAMES | {"mlp.router": "mlp.router"} | expert_names(_EXPERTS, "gate_proj", "up_proj", "down_proj")
    ),
    tensors=_tensors,
    packed=("mxfp4",),
    gguf=GgufNames(
        "gpt-oss",
        block={name: place for name, place in GGUF_BLOCK_NAMES.items() if not name.startswith("ffn")}
        | {
            "attn_sinks": "self_attn.sinks",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
            "ffn_gate_exps": f"{_EXPERTS}.gate_proj",
            "ffn_up_exps": f"{_EXPERTS}.up_proj",
            "ffn_down_exps": f"{_EXPERTS}.down_proj",
        },
        rope={"truncate": False},
    ),
)
