"""Gemma 2 and 3 (text): a scaled embedding, norms before and after, GeGLU, local and global layers, a tied head.

Norms have weights that are added to 1. Gemma 2 caps scores and logits; Gemma 3 norms queries and keys instead, and its
local layers have a rotary embedding of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from fasteagle_jax.nn.linear import LogitMap
from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.nn.transformer import DECODER_LAYER_NAMES, LayerConfig, LayerKind
from fasteagle_jax.targets.config import DecoderConfig, read_window
from fasteagle_jax.targets.decoder import DecoderTarget
from fasteagle_jax.targets.family import Family, layer_names

_LAYER_NAMES = DECODER_LAYER_NAMES | {
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_output_norm",
}


@dataclasses.dataclass(frozen=True)
class Gemma2Config(DecoderConfig):
    """Sizes and switches of a Gemma 2 target."""

    query_scale: float = 256.0  # scores are divided by its square root
    soft_cap: float | None = None  # of scores
    logit_cap: float | None = None

    handled = frozenset(
        {
            "attention_bias", "sliding_window", "layer_types", "query_pre_attn_scalar", "attn_logit_softcapping",
            "final_logit_softcapping",
        }
    )  # fmt: skip
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    period = 2  # of every so many layers the last one is global
    defaults = {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Those of DecoderConfig and its own; every other layer is local, the first one included."""
        period = hf.get("sliding_window_pattern", cls.period)
        return (
            super().read(hf)
            | read_window(hf, lambda i: bool((i + 1) % period))
            | {
                "query_scale": float(hf["query_pre_attn_scalar"]),
                "soft_cap": hf["attn_logit_softcapping"],
                "logit_cap": hf["final_logit_softcapping"],
            }
        )

    @property
    def layer(self) -> LayerConfig:
        """Those of DecoderConfig, and Gemma's."""
        return dataclasses.replace(
            super().layer,
            attention_scale=self.query_scale**-0.5,
            activation="gelu_tanh",
            norm_offset=1.0,
            output_norms=True,
        )

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Local and global layers, with capped scores."""
        return tuple(dataclasses.replace(kind, soft_cap=self.soft_cap) for kind in super().layer_kinds)


@dataclasses.dataclass(frozen=True)
class Gemma3Config(Gemma2Config):
    """Sizes and switches of a Gemma 3 target (text)."""

    local_rope: RopeConfig = RopeConfig()  # of the local layers

    defaults = Gemma2Config.defaults | {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131_072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    period = 6

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """As of DecoderConfig; of a model that also sees, its text part."""
        return super().from_hf({**hf, **hf.get("text_config", {})})

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Those of Gemma 2, and the local layers' rotary embedding."""
        own = (hf.get("rope_parameters") or {}).get("sliding_attention") or {}
        theta = {"rope_theta": hf.get("rope_local_base_freq", 10_000.0)}
        return super().read(hf) | {"local_rope": _rope(hf, theta | own)}

    @classmethod
    def read_rope(cls, hf: Mapping[str, Any]) -> RopeConfig:
        """The global layers' rotary embedding."""
        own = hf.get("rope_parameters") or {}
        own = own.get("full_attention", {} if "sliding_attention" in own else own) or hf.get("rope_scaling") or {}
        return _rope(hf, {"rope_theta": hf.get("rope_theta", 1_000_000.0)} | own)

    @property
    def layer(self) -> LayerConfig:
        """Those of Gemma 2, and norms of queries and keys."""
        return dataclasses.replace(super().layer, qk_norm=True)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Local and global layers, each with a rotary embedding of its own."""
        kinds = enumerate(super().layer_kinds)
        return tuple(dataclasses.replace(k, rope=self.local_rope) if i in self.local_layers else k for i, k in kinds)


def _rope(hf: Mapping[str, Any], parameters: Mapping[str, Any]) -> RopeConfig:
    """The rotary embedding of these parameters; the others of a config.json are of other layers."""
    return DecoderConfig.read_rope({**hf, "rope_parameters": parameters})


class Gemma(DecoderTarget):
    """A frozen Gemma 2 or 3 (see DecoderTarget)."""

    @property
    def embedding_scale(self) -> float:
        """The root of the width, rounded as the weights are, as Gemma was trained."""
        return float(np.asarray(self.config.hidden_size**0.5).astype(self.dtype))

    @property
    def logit_map(self) -> LogitMap:
        """The cap of logits."""
        return LogitMap(1.0, self.config.logit_cap)


GEMMA2 = Family(("Gemma2ForCausalLM",), Gemma2Config, Gemma, layer=layer_names(_LAYER_NAMES))
GEMMA3 = Family(
    ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    Gemma3Config,
    Gemma,
    layer=layer_names(_LAYER_NAMES),
    # Of the models that also see: as first published, and as transformers writes them now.
    prefixes={
        "language_model.": "",
        "model.language_model.": "model.",
        **dict.fromkeys(("vision_tower.", "multi_modal_projector."), None),
        **dict.fromkeys(("model.vision_tower.", "model.multi_modal_projector."), None),
    },
)
