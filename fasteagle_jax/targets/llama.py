"""Llama: RMSNorm, grouped-query attention and SwiGLU, one kind of layer throughout."""

from __future__ import annotations

import dataclasses

from fasteagle_jax.targets.config import DecoderConfig
from fasteagle_jax.targets.decoder import DecoderTarget
from fasteagle_jax.targets.family import Family, GgufNames


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Sizes and switches of a Llama target."""

    handled = frozenset({"attention_bias", "mlp_bias"})


class Llama(DecoderTarget):
    """A frozen Llama (see DecoderTarget)."""


LLAMA = Family(
    architectures=("LlamaForCausalLM",),
    config=LlamaConfig,
    model=Llama,
    gguf=GgufNames("llama", permuted=("attn_q", "attn_k")),
)
