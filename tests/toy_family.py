"""A newcomer's family of targets: what stands here would be a file of targets/, and `added` its line in the table.

Every other layer has a window and a rotary table of its own; the embedding is scaled, and logits are capped.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

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

    handled = LlamaConfig.handled | {"sliding_window"}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return super().read(hf) | {"window": hf["sliding_window"]}

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Alternating local and global layers."""
        local, whole = LayerKind(RopeConfig(100.0), self.window), LayerKind(self.rope)
        return tuple(whole if i % 2 else local for i in range(self.num_layers))


class Toy(DecoderTarget):
    """A scaled embedding and capped logits."""

    @property
    def logit_map(self) -> LogitMap:
        return LogitMap(0.5, self.config.soft_cap)

    @property
    def embedding_scale(self) -> float:
        return self.config.hidden_size**0.5


def tiny_toy(seed: int = 0, **changes: Any) -> Toy:
    """A random Toy of `tiny_config(**changes)`."""
    sizes = {name: value for name, value in vars(tiny_config(**changes)).items() if name != "window"}
    return jax.jit(lambda: Toy(ToyConfig(**sizes), jax.random.key(seed)))()


TOY = Family(("ToyForCausalLM",), ToyConfig, Toy, LLAMA.top, LLAMA.layer)


@contextlib.contextmanager
def added() -> Iterator[None]:
    """The toy's line in the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table.FAMILIES, "toy", TOY)
        yield
