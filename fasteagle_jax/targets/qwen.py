"""Qwen2 and Qwen2.5: Llama with biases of q, k and v. Qwen3: with norms of queries and keys instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fasteagle_jax.nn.transformer import LayerConfig
from fasteagle_jax.targets.config import DecoderConfig, read_window
from fasteagle_jax.targets.family import GGUF_BLOCK_NAMES, Family, GgufNames

_WINDOW = {"use_sliding_window", "sliding_window", "layer_types"}


class _QwenConfig(DecoderConfig):
    """What both have: a window of the layers from `max_window_layers` on, if it is used at all."""

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Those of DecoderConfig, and the window."""
        used = bool(hf.get("use_sliding_window", False))
        first = hf.get("max_window_layers", 28)
        window = {**hf, "sliding_window": hf.get("sliding_window", 4096) if used else None}
        return super().read(hf) | read_window(window, lambda i: i >= first)


@dataclasses.dataclass(frozen=True)
class Qwen2Config(_QwenConfig):
    """Sizes and switches of a Qwen2 target."""

    handled = frozenset(_WINDOW)

    @property
    def layer(self) -> LayerConfig:
        """Those of DecoderConfig, and biases of q, k and v."""
        return dataclasses.replace(super().layer, qkv_bias=True)


@dataclasses.dataclass(frozen=True)
class Qwen3Config(_QwenConfig):
    """Sizes and switches of a Qwen3 target."""

    handled = frozenset({*_WINDOW, "attention_bias"})
    defaults = {"head_dim": 128}

    @property
    def layer(self) -> LayerConfig:
        """Those of DecoderConfig, and norms of queries and keys."""
        return dataclasses.replace(super().layer, qk_norm=True)


QWEN2 = Family(("Qwen2ForCausalLM",), Qwen2Config, gguf=GgufNames("qwen2"))
QWEN3 = Family(
    ("Qwen3ForCausalLM",),
    Qwen3Config,
    gguf=GgufNames(
        "qwen3",
        block=GGUF_BLOCK_NAMES | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    ),
)
