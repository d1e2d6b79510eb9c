"""Small models for tests: random Llamas, and a drafter that knows the answer.

B rows · S slots.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fasteagle_jax.drafters.simulated import Simulated
from fasteagle_jax.targets.llama import Llama, LlamaConfig


def tiny_config(**changes: Any) -> LlamaConfig:
    """The LlamaConfig of a target that compiles and runs in moments, with `changes`."""
    sizes: dict[str, Any] = dict(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_layers=5,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=512,
    )
    return LlamaConfig(**(sizes | changes))


def tiny_target(
    seed: int = 0, *, dtype: Any = jnp.float32, stacked: bool = True, sharpness: float = 1.0, **changes: Any
) -> Llama:
    """A random Llama of `tiny_config(**changes)`; its logits have a standard deviation of about `sharpness`."""
    config = tiny_config(**changes)

    def make() -> Llama:
        target = Llama(config, jax.random.key(seed), dtype)
        target.norm.weight[...] = target.norm.weight[...] * sharpness
        return target

    target = jax.jit(make)()  # one program instead of one an operation
    return target if stacked else target.unstacked()


def oracle_drafter(sequences: jax.Array, vocab_size: int, num_levels: int, rate: float = 1.0) -> Simulated:
    """A drafter that knows `sequences`, int32 [B, S], and guesses right with probability `rate` at each depth."""
    rates = jnp.full((num_levels,), rate, jnp.float32)
    return Simulated(sequences, rates, jnp.arange(len(sequences), dtype=jnp.uint32), vocab_size)
