"""Llama: RMSNorm, grouped-query attention and SwiGLU, one kind of layer throughout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.nn.transformer import DECODER_LAYER_NAMES
from fasteagle_jax.targets.decoder import DecoderTarget
from fasteagle_jax.targets.family import Family, GgufNames


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches of a Llama target."""

    vocab_size: int  # V
    hidden_size: int  # H
    intermediate_size: int
    num_layers: int  # L
    num_heads: int
    num_kv_heads: int  # K
    head_dim: int  # D
    rms_norm_eps: float = 1e-5
    max_positions: int = 2048
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or value < 1):
                raise UserError(f"{field.name} is {value!r}: give a whole number of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}: "
                "grouped attention shares each K/V head among equally many query heads"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """The configuration that a Hugging Face `config.json` (read into a dict) describes."""
        if hf.get("hidden_act", "silu") != "silu":
            raise UserError(f"hidden_act {hf['hidden_act']!r} is not supported: Llama targets use silu")
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        absent = [name for name in required if name not in hf]
        if absent:
            raise UserError(f"config.json lacks {', '.join(absent)}: take the model's complete configuration")
        num_heads = hf["num_attention_heads"]
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=hf.get("num_key_value_heads") or num_heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // num_heads,
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            max_positions=hf.get("max_position_embeddings", 2048),
            rope=RopeConfig.from_hf(hf),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            attention_bias=bool(hf.get("attention_bias", False)),
            mlp_bias=bool(hf.get("mlp_bias", False)),
        )


class Llama(DecoderTarget):
    """A frozen Llama (see DecoderTarget)."""


LLAMA = Family(
    architectures=("LlamaForCausalLM",),
    config=LlamaConfig,
    model=Llama,
    top={"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"},
    layer={f"model.layers.{{}}.{name}": place for name, place in DECODER_LAYER_NAMES.items()},
    gguf=GgufNames(
        architecture="llama",
        top={"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
        block={
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        },
        permuted=("attn_q", "attn_k"),
    ),
)
