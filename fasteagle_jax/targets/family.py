"""The description of a family of targets: each is a file of its own in this folder and a line in the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fasteagle_jax.nn.transformer import DECODER_LAYER_NAMES
from fasteagle_jax.targets.checkpoint import StoredTensor
from fasteagle_jax.targets.decoder import DecoderTarget

TOP_NAMES = {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"}
GGUF_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def layer_names(names: Mapping[str, str] = DECODER_LAYER_NAMES) -> dict[str, str]:
    """A table of a layer's parts with the names that they have in a whole model; {} is the layer's index."""
    return {f"model.layers.{{}}.{name}": place for name, place in names.items()}


@dataclasses.dataclass(frozen=True)
class GgufNames:
    """llama.cpp's names of a family's tensors."""

    architecture: str  # general.architecture
    top: Mapping[str, str] = dataclasses.field(default_factory=lambda: GGUF_TOP_NAMES)  # to HF's, both without .weight
    block: Mapping[str, str] = dataclasses.field(default_factory=lambda: GGUF_BLOCK_NAMES)  # likewise within a layer
    permuted: tuple[str, ...] = ()  # keys of `block` whose rows GGUF orders by rotated pairs
    rope: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # rope parameters that the files leave out


@dataclasses.dataclass(frozen=True)
class Family:
    """A family: targets of one architecture."""

    architectures: tuple[str, ...]  # in a config.json
    config: Any  # a targets.config.DecoderConfig's class
    # (config, key, dtype, *, stacked, activation_dtype) -> a decoding.interfaces.Target
    model: Any = DecoderTarget
    # Hugging Face's name, without .weight, to the place in the model.
    top: Mapping[str, str] = dataclasses.field(default_factory=lambda: TOP_NAMES)
    # Likewise within a layer; {} is its index.
    layer: Mapping[str, str] = dataclasses.field(default_factory=layer_names)
    gguf: GgufNames | None = None
    # Of files of larger models that contain one: a prefix of names there to the one here, None for what is left out.
    prefixes: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    # Of a configuration: name in the file, within a layer, of several matrices in one, to their names and numbers of
    # rows.
    fused: Callable[[Any], Mapping[str, Mapping[str, int]]] | None = None
    # Name in the file, within a layer, of the list of experts, each with tensors of its own; empty for none.
    experts: str = ""
    # The tensors of a Hugging Face folder under the names of the tables, given those that it holds and the
    # configuration, for what the fields above do not say.
    tensors: Callable[[Mapping[str, StoredTensor], Any], dict[str, StoredTensor]] | None = None
    packed: tuple[str, ...] = ()  # quant_method's of a config.json that `tensors` unpacks
