"""A newcomer's family of targets: what stands here would be a file of targets/, and `added` its line in the table.

Every other layer has a window and a rotary table of its own; the embedding is scaled, and logits are capped.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import pytest

from fasteagle_jax.nn.linear import LogitMap
from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.nn.transformer import LayerKind
from fasteagle_jax.targets import table
from fasteagle_jax.targets.decoder import DecoderTarget
from fasteagle_jax.targets.family import Family
from fasteagle_jax.targets.llama import LLAMA, LlamaConfig
from tests.tiny_models import tiny_config


@dataclasses.dataclass(frozen=True)
class ToyConfig(LlamaConfig):
    """A Llama's sizes, and the toy's own."""

    window: int = 6
    soft_cap: float = 20.0

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        return dataclasses.replace(super().from_hf(hf), window=hf["sliding_window"])


class Toy(DecoderTarget):
    """Alternating local and global layers."""

    @staticmethod
    def layer_kinds(config: ToyConfig) -> tuple[LayerKind, ...]:
        local, whole = LayerKind(RopeConfig(100.0), config.window), LayerKind(config.rope)
        return tuple(whole if i % 2 else local for i in range(config.num_layers))

    @property
    def logit_map(self) -> LogitMap:
        return LogitMap(0.5, self.config.soft_cap)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return super().embed(tokens) * self.config.hidden_size**0.5


def tiny_toy(seed: int = 0, **changes: Any) -> Toy:
    """A random Toy of `tiny_config(**changes)`."""
    sizes = vars(tiny_config(**changes))
    return jax.jit(lambda: Toy(ToyConfig(**sizes), jax.random.key(seed)))()


TOY = Family(("ToyForCausalLM",), ToyConfig, Toy, LLAMA.top, LLAMA.layer)


@contextlib.contextmanager
def added() -> Iterator[None]:
    """The toy's line in the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table.FAMILIES, "toy", TOY)
        yield
