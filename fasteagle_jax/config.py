"""Typed configurations: of a target (Llama), of a drafter, of a training run.

All are frozen dataclasses that check themselves; a bad value raises UserError with the value and the remedy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from fasteagle_jax.errors import UserError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)


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
        """What a Hugging Face `config.json` (read into a dict) says of it, or its defaults.

        Reads both spellings of scaling: `rope_scaling` + `rope_theta` and, of newer files, `rope_parameters`.
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
        """The keys of a `config.json` from which `from_hf` reads it."""
        scaling = {
            "rope_type": self.kind,
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_positions,
        }
        return {"rope_theta": self.theta, "rope_scaling": None if self.kind == "default" else scaling}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches of a Llama-architecture target, named after their letters in the code."""

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
        architectures = hf.get("architectures") or []
        if not any(name in SUPPORTED_ARCHITECTURES for name in architectures):
            raise UserError(
                f"architecture {', '.join(architectures) or 'unknown'} is not supported: "
                f"use a target of {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
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


def check_features(feature_layers: tuple[int, ...], num_layers: int) -> None:
    """Raises UserError where a target of so many layers has no such inputs; `num_layers` is the last one's output."""
    if wrong := [f for f in feature_layers if not 0 <= f <= num_layers]:
        raise UserError(
            f"feature_layers has {', '.join(map(str, wrong))}, the target {num_layers} layers: "
            f"give 0 to {num_layers}, or take the target that the drafter was trained for"
        )


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """Sizes and switches of a drafter; `hidden_size` and `vocab_size` are its target's."""

    hidden_size: int  # H
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int  # rows of the head it guesses among; vocab_size for all
    feature_layers: tuple[int, ...]  # the target's layers whose inputs it reads
    kind: str = "fasteagle"
    num_levels: int = 7  # N
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    reinject: bool = False  # add the fused input again before every level
    correction: int | None = None  # R, hidden units that correct a guess by the token before it; None for none
    window: int | None = None  # W: a position sees itself and the W - 1 before it; None for all

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "num_levels")
        for name in sizes:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(f"drafter {name} is {getattr(self, name)!r}: give a whole number of at least 1")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise UserError(
                f"draft_vocab_size is {self.draft_vocab_size}: it must be 1 to the target's {self.vocab_size}"
            )
        if self.correction is not None and (not isinstance(self.correction, int) or self.correction < 1):
            raise UserError(f"drafter correction is {self.correction!r}: give a number of units, or None for none")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise UserError(
                f"drafter window is {self.window!r}: give a whole number of at least 1, or None for no limit"
            )
        if not self.feature_layers:
            raise UserError("feature_layers is empty: name at least one of the target's layers")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"drafter num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
