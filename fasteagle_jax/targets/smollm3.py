"""SmolLM3: Llama with layers without rotary embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.transformer import LayerKind
from fasteagle_jax.targets.config import DecoderConfig, read_window
from fasteagle_jax.targets.family import Family


@dataclasses.dataclass(frozen=True)
class SmolLM3Config(DecoderConfig):
    """Sizes and switches of a SmolLM3 target."""

    unrotated_layers: tuple[int, ...] = ()  # those without rotary embedding

    handled = frozenset(
        {
            "attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", "use_sliding_window",
            "sliding_window", "layer_types",
        }
    )  # fmt: skip
    defaults = {"num_key_value_heads": 4, "rope_theta": 2_000_000.0, "tie_word_embeddings": True}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Those of DecoderConfig, the layers without rotary embedding, and a window of those, if there is one."""
        num_layers, interval = hf["num_hidden_layers"], hf.get("no_rope_layer_interval", 4)
        rotated = hf.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(num_layers)]
        if len(rotated) < num_layers:
            raise UserError(f"no_rope_layers has {len(rotated)} entries for {num_layers} layers: take the model's own")
        window = {**hf, "sliding_window": hf.get("sliding_window") if hf.get("use_sliding_window") else None}
        unrotated = tuple(i for i in range(num_layers) if not rotated[i])
        return super().read(hf) | read_window(window, lambda i: i in unrotated) | {"unrotated_layers": unrotated}

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Rotated and other layers."""
        kinds = enumerate(super().layer_kinds)
        return tuple(dataclasses.replace(k, rope=None) if i in self.unrotated_layers else k for i, k in kinds)


SMOLLM3 = Family(("SmolLM3ForCausalLM",), SmolLM3Config)
