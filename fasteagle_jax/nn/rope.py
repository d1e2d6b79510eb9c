"""Rotary position embedding.

B rows · Q query tokens · D head width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from fasteagle_jax.devices.sharding import platform
from fasteagle_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: `default`, `linear` (positions / factor) or `llama3` (frequency-dependent)."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("default", "linear", "llama3"):
            raise UserError(f"rope type {self.kind!r} is not supported: use default, linear or llama3")
        if self.theta <= 0 or self.factor <= 0:
            raise UserError(f"rope theta {self.theta} and factor {self.factor} must be positive")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """The RopeConfig of a Hugging Face `config.json` (read into a dict).

        Reads `rope_scaling` and `rope_theta`, or the `rope_parameters` of newer files.
        """
        scaling = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        original = scaling.get("original_max_position_embeddings", hf.get("max_position_embeddings", 2048))
        return cls(
            theta=float(scaling.get("rope_theta", hf.get("rope_theta", 10_000.0))),
            kind=scaling.get("rope_type", scaling.get("type", "default")) or "default",
            factor=float(scaling.get("factor", 1.0)),
            low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
            high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
            original_max_positions=int(original),
        )

    def to_hf(self) -> dict[str, Any]:
        """The entries of a `config.json` that `from_hf` reads."""
        scaling = {
            "rope_type": self.kind,
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_positions,
        }
        return {"rope_theta": self.theta, "rope_scaling": None if self.kind == "default" else scaling}


def rope_frequencies(rope: RopeConfig, head_dim: int) -> jax.Array:
    """Angle per position of each pair of channels: float32 [D/2].

    `llama3` keeps short wavelengths, divides long ones by `factor` and blends in between (Llama 3.1 model card).
    """
    freqs = rope.theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.kind == "linear":
        return freqs / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_positions * freqs / (2 * math.pi)  # full turns within the original context
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = jnp.clip(keep, 0.0, 1.0)
        return keep * freqs + (1 - keep) * freqs / rope.factor
    return freqs


class Rotation(NamedTuple):
    """Cosine and sine of each token's rotary angles, float32 [B, Q, 1, D/2], the same for all heads."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions: jax.Array, rope: RopeConfig | None, head_dim: int) -> Rotation:
    """The Rotation of tokens at `positions` int32 [B, Q]; the identity without `rope`."""
    if rope is None:
        zeros = jnp.zeros((*positions.shape, 1, head_dim // 2))
        return Rotation(zeros + 1, zeros)
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    if platform() != "cpu" or head_dim % 4:
        return Rotation(jnp.cos(angles), jnp.sin(angles))
    # XLA's CPU compiler would fuse these into every layer and head that reads them, and recompute them there. The
    # results of a loop it does not fuse.
    halves = jnp.stack(jnp.split(angles, 2, axis=-1))
    cos, sin = jax.lax.map(lambda half: (jnp.cos(half), jnp.sin(half)), halves)
    return Rotation(jnp.concatenate([*cos], axis=-1), jnp.concatenate([*sin], axis=-1))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """x [B, Q, heads, D] with channels d and d + D/2 rotated as a pair (Hugging Face's order), in x's dtype."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * by.cos - b * by.sin, b * by.cos + a * by.sin], axis=-1)
    return rotated.astype(x.dtype)
