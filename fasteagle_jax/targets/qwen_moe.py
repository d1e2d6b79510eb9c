"""Qwen2-MoE: Qwen2 with experts, and one more that all tokens have, behind a gate. Qwen3-MoE: Qwen3 with experts.

Some layers may be dense. A token's chosen experts have their probabilities as weights, renormalised or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fasteagle_jax.nn.transformer import DECODER_LAYER_NAMES, LayerConfig
from fasteagle_jax.targets.config import read_window
from fasteagle_jax.targets.experts import SparseConfig, expert_names, read_dense_layers
from fasteagle_jax.targets.family import Family, layer_names

_HANDLED = {"use_sliding_window", "sliding_window", "num_experts", "num_local_experts"}
_EXPERTS = "mlp.experts"
_LAYER_NAMES = (
    DECODER_LAYER_NAMES | {"mlp.gate": "mlp.router"} | expert_names(_EXPERTS, "gate_proj", "up_proj", "down_proj")
)


class _QwenMoeConfig(SparseConfig):
    """What both have."""

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Those of DecoderConfig, the window, and the experts."""
        window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
        return (
            super().read(hf)
            | read_window({**hf, "sliding_window": window}, lambda i: cls.is_local(hf, i))
            | {
                # transformers writes it under either name.
                "num_experts": hf.get("num_local_experts") or hf["num_experts"],
                "experts_per_token": hf["num_experts_per_tok"],
                "expert_size": hf["moe_intermediate_size"],
                "renormalised": bool(hf.get("norm_topk_prob", False)),
                "dense_layers": read_dense_layers(hf),
            }
        )

    @classmethod
    def is_local(cls, hf: Mapping[str, Any], index: int) -> bool:
        """Whether a layer has the window, if there is one and `layer_types` does not say."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Qwen2MoeConfig(_QwenMoeConfig):
    """Sizes and switches of a Qwen2-MoE target."""

    handled = frozenset(_HANDLED | {"qkv_bias", "layer_types"})
    defaults = {
        "num_key_value_heads": 16,
        "max_position_embeddings": 32_768,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    }
    qkv_bias: bool = True

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Those of both, and the shared expert."""
        return super().read(hf) | {
            "shared_expert_size": hf["shared_expert_intermediate_size"],
            "qkv_bias": bool(hf["qkv_bias"]),
        }

    @classmethod
    def is_local(cls, hf: Mapping[str, Any], index: int) -> bool:
        """Every other one of the first `max_window_layers`."""
        return index % 2 == 0 and index < hf.get("max_window_layers", 28)

    @property
    def layer(self) -> LayerConfig:
        """Those of SparseConfig, and biases of q, k and v."""
        return dataclasses.replace(super().layer, qkv_bias=self.qkv_bias)


@dataclasses.dataclass(frozen=True)
class Qwen3MoeConfig(_QwenMoeConfig):
    """Sizes and switches of a Qwen3-MoE target."""

    handled = frozenset(_HANDLED | {"attention_bias"})
    defaults = {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }

    @classmethod
    def is_local(cls, hf: Mapping[str, Any], index: int) -> bool:
        """All layers."""
        return True

    @property
    def layer(self) -> LayerConfig:
        """Those of SparseConfig, and norms of queries and keys."""
        return dataclasses.replace(super().layer, qk_norm=True)


_SHARED = {f"mlp.shared_expert.{part}_proj": f"mlp.shared.{part}" for part in ("gate", "up", "down")}

QWEN2_MOE = Family(
    ("Qwen2MoeForCausalLM",),
    Qwen2MoeConfig,
    layer=layer_names(_LAYER_NAMES | _SHARED | {"mlp.shared_expert_gate": "mlp.shared_gate"}),
    experts=_EXPERTS,
)
QWEN3_MOE = Family(("Qwen3MoeForCausalLM",), Qwen3MoeConfig, layer=layer_names(_LAYER_NAMES), experts=_EXPERTS)
