"""Mixtral: Mistral with experts in place of MLPs; a token's chosen experts have weights that add up to 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fasteagle_jax.nn.transformer import DECODER_LAYER_NAMES
from fasteagle_jax.targets.config import read_window
from fasteagle_jax.targets.experts import SparseConfig, expert_names
from fasteagle_jax.targets.family import Family, layer_names


@dataclasses.dataclass(frozen=True)
class MixtralConfig(SparseConfig):
    """Sizes and switches of a Mixtral target."""

    handled = frozenset({"sliding_window", "num_local_experts"})
    defaults = {
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
    }

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Those of DecoderConfig, the window of all layers, and the experts."""
        return (
            super().read(hf)
            | read_window({**hf, "layer_types": None}, lambda i: True)
            | {
                "num_experts": hf["num_local_experts"],
                "experts_per_token": hf["num_experts_per_tok"],
                "expert_size": hf["intermediate_size"],
            }
        )


_EXPERTS = "block_sparse_moe.experts"

MIXTRAL = Family(
    ("MixtralForCausalLM",),
    MixtralConfig,
    layer=layer_names(
        DECODER_LAYER_NAMES
        | {"block_sparse_moe.gate": "mlp.router"}
        | expert_names(_EXPERTS, gate="w1", up="w3", down="w2")
    ),
    experts=_EXPERTS,
)
