"""Phi-3 and Phi-4 (mini): Llama whose files have q, k and v, and gate and up, in one matrix each.

Heads may be rotated in part, and the rotary embedding be longrope.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.targets.config import DecoderConfig, read_window
from fasteagle_jax.targets.family import Family


@dataclasses.dataclass(frozen=True)
class Phi3Config(DecoderConfig):
    """Sizes and switches of a Phi-3 target."""

    handled = frozenset({"sliding_window", "partial_rotary_factor"})
    defaults = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Those of DecoderConfig, and the window of all layers."""
        return super().read(hf) | read_window({**hf, "layer_types": None}, lambda i: True)

    @classmethod
    def read_rope(cls, hf: Mapping[str, Any]) -> RopeConfig:
        """The rotary embedding; its first files name longrope otherwise."""
        key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
        parameters = dict(hf.get(key) or {})
        if (parameters.get("rope_type") or parameters.get("type")) in ("su", "yarn"):
            parameters |= {"rope_type": "longrope"}
        return super().read_rope({**hf, key: parameters})


def _fused(config: Phi3Config) -> Mapping[str, Mapping[str, int]]:
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "self_attn.qkv_proj": {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads, "self_attn.v_proj": kv_heads},
        "mlp.gate_up_proj": {"mlp.gate_proj": config.intermediate_size, "mlp.up_proj": config.intermediate_size},
    }


PHI3 = Family(("Phi3ForCausalLM",), Phi3Config, fused=_fused)
