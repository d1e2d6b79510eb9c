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

KINDS = ("default", "linear", "llama3", "yarn", "longrope")
# The entries of a config.json's rope_parameters that `from_hf` reads.
_READ = {
    "rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "truncate", "attention_factor", "mscale", "mscale_all_dim", "short_factor", "long_factor", "partial_rotary_factor",
    "original_max_position_embeddings",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one of KINDS.

    `linear` divides all frequencies by `factor`, `llama3` and `yarn` the low ones, `longrope` each one by its own of
    `long_factor` or, for a target that is loaded for texts of no more than its original positions, `short_factor`.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0  # of yarn: turns within the original positions above which a frequency is kept
    beta_slow: float = 1.0  # of yarn: turns below which it is divided
    truncate: bool = True  # of yarn: round the bounds to whole channels
    magnitude: float = 1.0  # of the rotated queries and keys
    short_factor: tuple[float, ...] = ()  # of longrope, one a pair of channels
    long_factor: tuple[float, ...] = ()
    long: bool = True  # which of the two is used; see `for_length`
    partial: float = 1.0  # the share of a head's channels that is rotated, from the first on

    def __post_init__(self) -> None:
        if self.kind == "dynamic":
            raise UserError(
                "rope type 'dynamic' is not supported: it rotates a token by the length of the whole text, so that "
                f"what was said would change with what comes; use one of {', '.join(KINDS)}"
            )
        if self.kind not in KINDS:
            raise UserError(f"rope type {self.kind!r} is not supported: use one of {', '.join(KINDS)}")
        if self.theta <= 0 or self.factor <= 0:
            raise UserError(f"rope theta {self.theta} and factor {self.factor} must be positive")
        if not 0 < self.partial <= 1:
            raise UserError(f"partial_rotary_factor is {self.partial}: it must be above 0 and at most 1")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """The RopeConfig of a Hugging Face `config.json` (read into a dict).

        Reads `rope_scaling` and `rope_theta`, or the `rope_parameters` of newer files. Raises UserError for an entry
        that is not read.
        """
        scaling = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        if unknown := [key for key, value in scaling.items() if key not in _READ and value is not None]:
            raise UserError(
                f"config.json has rope parameters that are not supported: {', '.join(unknown)}; "
                f"use a target with rope type {', '.join(KINDS)}"
            )
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        positions = hf.get("max_position_embeddings", 2048)
        original = scaling.get("original_max_position_embeddings", positions)
        if kind in ("llama3", "yarn", "longrope"):  # Phi-3's files have it outside, which counts
            original = hf.get("original_max_position_embeddings") or original
        factor = scaling.get("factor")
        if factor is None:
            factor = positions / original if kind in ("yarn", "longrope") else 1.0
        magnitude = scaling.get("attention_factor") if kind in ("yarn", "longrope") else 1.0
        if magnitude is None:
            magnitude = _magnitude(kind, factor, original, scaling.get("mscale"), scaling.get("mscale_all_dim"))
        of_long = kind == "longrope"
        return cls(
            theta=float(scaling.get("rope_theta") or hf.get("rope_theta") or 10_000.0),
            kind=kind,
            factor=float(factor),
            low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
            high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
            original_max_positions=int(original),
            beta_fast=float(scaling.get("beta_fast") or 32),
            beta_slow=float(scaling.get("beta_slow") or 1),
            truncate=bool(scaling.get("truncate", True)),
            magnitude=float(magnitude),
            short_factor=tuple(map(float, scaling.get("short_factor") or ())) if of_long else (),
            long_factor=tuple(map(float, scaling.get("long_factor") or ())) if of_long else (),
            partial=float(scaling.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0),
        )

    def to_hf(self) -> dict[str, Any]:
        """The entries of a `config.json` that `from_hf` reads."""
        scaling: dict[str, Any] = {
            "rope_type": self.kind,
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_positions,
        }
        if self.kind in ("yarn", "longrope"):
            scaling["attention_factor"] = self.magnitude
        if self.kind == "yarn":
            scaling |= {name: getattr(self, name) for name in ("beta_fast", "beta_slow", "truncate")}
        if self.kind == "longrope":
            scaling |= {"short_factor": list(self.short_factor), "long_factor": list(self.long_factor)}
        partial = {} if self.partial == 1 else {"partial_rotary_factor": self.partial}
        return {"rope_theta": self.theta, "rope_scaling": None if self.kind == "default" else scaling} | partial

    def for_length(self, num_tokens: int) -> Self:
        """The embedding for texts of up to `num_tokens`: longrope's factors are chosen once, here.

        Chosen by the length of the text so far, as elsewhere, they would make a token depend on more than its prefix.
        """
        return dataclasses.replace(self, long=self.kind != "longrope" or num_tokens > self.original_max_positions)

    def width(self, head_dim: int) -> int:
        """The number of a head's channels that are rotated."""
        return int(head_dim * self.partial)


def _magnitude(kind: str, factor: float, original: int, mscale: float | None, mscale_all_dim: float | None) -> float:
    """The magnitude that a config.json leaves to be derived (YaRN, arXiv 2309.00071; LongRoPE, arXiv 2402.13753)."""
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))

    def of_yarn(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1

    return of_yarn(mscale) / of_yarn(mscale_all_dim) if mscale and mscale_all_dim else of_yarn(1)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> jax.Array:
    """Angle per position of each pair of rotated channels: float32 [D/2], or fewer for a partial rotation.

    `llama3` keeps short wavelengths, divides long ones by `factor` and blends in between (Llama 3.1 model card). `yarn`
    does so by channels, between those that turn `beta_fast` and `beta_slow` times (arXiv 2309.00071, section 3.2).
    """
    width = rope.width(head_dim)
    freqs = rope.theta ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if rope.kind == "linear":
        return freqs / rope.factor
    if rope.kind == "longrope":
        return freqs / jnp.asarray(rope.long_factor if rope.long else rope.short_factor, jnp.float32)
    if rope.kind == "llama3":
        turns = rope.original_max_positions * freqs / (2 * math.pi)  # full turns within the original context
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = jnp.clip(keep, 0.0, 1.0)
        return keep * freqs + (1 - keep) * freqs / rope.factor
    if rope.kind == "yarn":

        def channel(turns: float) -> float:  # that turns so often within the original context
            return width * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

        low, high = channel(rope.beta_fast), channel(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        keep = 1 - jnp.clip((jnp.arange(width // 2) - low) / (high - low or 0.001), 0.0, 1.0)
        return keep * freqs + (1 - keep) * freqs / rope.factor
    return freqs


class Rotation(NamedTuple):
    """Cosine and sine of each token's rotary angles, float32 [B, Q, 1, D/2], the same for all heads.

    Times the magnitude; of fewer channels than D, the others are not rotated.
    """

    cos: jax.Array
    sin: jax.Array


def rotation(positions: jax.Array, rope: RopeConfig | None, head_dim: int) -> Rotation:
    """The Rotation of tokens at `positions` int32 [B, Q]; the identity without `rope`."""
    if rope is None:
        zeros = jnp.zeros((*positions.shape, 1, head_dim // 2))
        return Rotation(zeros + 1, zeros)
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    if platform() != "cpu" or angles.shape[-1] % 2:
        return _scaled(jnp.cos(angles), jnp.sin(angles), rope.magnitude)
    # XLA's CPU compiler would fuse these into every layer and head that reads them, and recompute them there. The
    # results of a loop it does not fuse.
    halves = jnp.stack(jnp.split(angles, 2, axis=-1))
    cos, sin = jax.lax.map(lambda half: (jnp.cos(half), jnp.sin(half)), halves)
    return _scaled(jnp.concatenate([*cos], axis=-1), jnp.concatenate([*sin], axis=-1), rope.magnitude)


def _scaled(cos: jax.Array, sin: jax.Array, magnitude: float) -> Rotation:
    return Rotation(cos, sin) if magnitude == 1 else Rotation(cos * magnitude, sin * magnitude)


def rotate(x: jax.Array, by: Rotation, scale: float = 1.0) -> jax.Array:
    """x [B, Q, heads, D] with channels d and d + D/2 rotated as a pair (Hugging Face's order), in x's dtype.

    Of a partial rotation of D' channels d and d + D'/2; those from D' on are kept. All are multiplied by `scale`.
    """
    width = 2 * by.cos.shape[-1]
    x32 = x.astype(jnp.float32)
    a, b = jnp.split(x32[..., :width], 2, axis=-1)
    kept = [] if width == x.shape[-1] else [x32[..., width:]]
    rotated = jnp.concatenate([a * by.cos - b * by.sin, b * by.cos + a * by.sin, *kept], axis=-1)
    return (rotated if scale == 1 else rotated * scale).astype(x.dtype)
