"""The description of a family of targets: each is a file of its own in this folder and a line in the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class GgufNames:
    """llama.cpp's names of a family's tensors."""

    architecture: str  # general.architecture
    top: Mapping[str, str]  # GGUF's name to Hugging Face's, both without .weight
    block: Mapping[str, str]  # likewise within a layer
    permuted: tuple[str, ...] = ()  # keys of `block` whose rows GGUF orders by rotated pairs


@dataclasses.dataclass(frozen=True)
class Family:
    """A family: targets of one architecture."""

    architectures: tuple[str, ...]  # in a config.json
    config: Any  # a frozen dataclass with from_hf(config.json as a dict)
    model: Any  # (config, key, dtype, *, stacked, activation_dtype) -> a decoding.interfaces.Target
    top: Mapping[str, str]  # Hugging Face's name, without .weight, to the place in the model
    layer: Mapping[str, str]  # likewise within a layer; {} is its index
    gguf: GgufNames | None = None
