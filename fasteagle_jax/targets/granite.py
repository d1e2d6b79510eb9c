"""Granite 3 (dense): Llama with multipliers of the embedding, scores, what layers add to the stream, and logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fasteagle_jax.nn.linear import LogitMap
from fasteagle_jax.nn.transformer import LayerConfig
from fasteagle_jax.targets.config import DecoderConfig
from fasteagle_jax.targets.decoder import DecoderTarget
from fasteagle_jax.targets.family import Family


@dataclasses.dataclass(frozen=True)
class GraniteConfig(DecoderConfig):
    """Sizes and switches of a Granite target."""

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0  # of scores, in place of head_dim^-1/2
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0  # logits are divided by it

    handled = frozenset(
        {
            "attention_bias", "mlp_bias", "embedding_multiplier", "attention_multiplier", "residual_multiplier",
            "logits_scaling",
        }
    )  # fmt: skip

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Those of DecoderConfig, and the multipliers."""
        names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
        return super().read(hf) | {name: float(hf.get(name, 1.0)) for name in names}

    @property
    def layer(self) -> LayerConfig:
        """Those of DecoderConfig, and the layers' multipliers."""
        return dataclasses.replace(
            super().layer, attention_scale=self.attention_multiplier, residual_scale=self.residual_multiplier
        )


class Granite(DecoderTarget):
    """A frozen Granite (see DecoderTarget)."""

    @property
    def embedding_scale(self) -> float:
        """The embedding's multiplier."""
        return self.config.embedding_multiplier

    @property
    def logit_map(self) -> LogitMap:
        """The division of logits."""
        return LogitMap(1 / self.config.logits_scaling)


GRANITE = Family(("GraniteForCausalLM",), GraniteConfig, Granite)
