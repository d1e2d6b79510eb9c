"""What a family of targets is made of: a file of its own in this folder, and a line in the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class GgufNames:
    """How llama.cpp names a family's tensors."""

    architecture: str  # general.architecture
    top: Mapping[str, str]  # GGUF's name to Hugging Face's, both without .weight
    block: Mapping[str, str]  # the same within a layer
    permuted: tuple[str, ...] = ()  # of `block`, those whose rows GGUF keeps in the order of rotated pairs


@dataclasses.dataclass(frozen=True)
class Family:
    """Targets of one architecture."""

    architectures: tuple[str, ...]  # in a config.json
    config: Any  # a frozen dataclass with from_hf(config.json as a dict)
    model: Any  # (config, key, dtype, *, stacked, activation_dtype) -> a decoding.interfaces.Target
    top: Mapping[str, str]  # Hugging Face's name, without .weight, to the place in the model
    layer: Mapping[str, str]  # the same within a layer; {} is its number
    gguf: GgufNames | None = None
