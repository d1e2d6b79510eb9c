"""Mistral: Llama with a size of heads of its own and, in the first version, a window in all layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fasteagle_jax.targets.config import DecoderConfig, read_window
from fasteagle_jax.targets.family import Family


@dataclasses.dataclass(frozen=True)
class MistralConfig(DecoderConfig):
    """Sizes and switches of a Mistral target."""

    handled = frozenset({"sliding_window"})
    defaults = {"num_key_value_heads": 8, "sliding_window": 4096}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Those of DecoderConfig, and the window."""
        return super().read(hf) | read_window({**hf, "layer_types": None}, lambda i: True)


MISTRAL = Family(("MistralForCausalLM",), MistralConfig)
