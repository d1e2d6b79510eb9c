"""The Llama target: one forward pass for prefill, plain decoding, verification and training.

B rows · Q query tokens · L layers · H hidden width · V vocabulary · F feature layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.devices.sharding import training_rows
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.attention import Attend, Past
from fasteagle_jax.nn.embedding import embed
from fasteagle_jax.nn.kv_cache import Cache, empty_cache
from fasteagle_jax.nn.linear import head_logits
from fasteagle_jax.nn.norm import rms_norm
from fasteagle_jax.nn.rope import RopeConfig, rotation
from fasteagle_jax.nn.transformer import LAYER_AXES, DecoderLayer, LayerConfig, hold_rows, run_layers, unstack

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)


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


class TargetOutput(NamedTuple):
    """What a target's forward pass returns."""

    hidden: jax.Array  # [B, Q, H] after the final norm: the head's input
    features: jax.Array | None  # [B, Q, F*H] inputs of the feature layers, concatenated low to high; None for F = 0
    fresh: Any  # keys and values of the Q tokens, for `commit`


def layer_config(c: LlamaConfig) -> LayerConfig:
    """The sizes of one of the target's decoder layers."""
    return LayerConfig(
        c.hidden_size,
        c.intermediate_size,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        c.rms_norm_eps,
        c.attention_bias,
        c.mlp_bias,
    )


AXES = LAYER_AXES | {"embedding": ("vocab", "embed"), "head": ("vocab", "embed")}


class Llama(nnx.Module):
    """A frozen Llama. `layers` is one stacked DecoderLayer (leading axis L) or, unstacked, a list of L of them.

    Activations between matrix products are in `activation_dtype`, by default the weights' dtype.
    """

    def __init__(
        self,
        config: LlamaConfig,
        key: jax.Array,
        dtype: Any = jnp.float32,
        *,
        stacked: bool = True,
        activation_dtype: Any = None,
    ):
        c = config
        self.activation_dtype = jnp.dtype(activation_dtype or dtype)
        key_embed, key_layers, key_head = jax.random.split(key, 3)
        self.config = c
        self.embedding = nnx.Param(jax.random.normal(key_embed, (c.vocab_size, c.hidden_size), dtype))
        layers = jax.vmap(lambda k: DecoderLayer(layer_config(c), k, dtype))(jax.random.split(key_layers, c.num_layers))
        self.layers = layers if stacked else nnx.List(unstack(layers, c.num_layers))
        self.norm = nnx.Param(jnp.ones((c.hidden_size,), dtype))
        head = jax.random.normal(key_head, (c.vocab_size, c.hidden_size), dtype) * c.hidden_size**-0.5
        self.head = None if c.tie_embeddings else nnx.Param(head)  # [V, H]; None where vocab to the embedding

    @property
    def stacked(self) -> bool:
        """Whether the layers are one scanned stack rather than a list."""
        return not isinstance(self.layers, nnx.List)

    @property
    def dtype(self) -> Any:
        """The dtype of weights and cache."""
        return self.embedding[...].dtype

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        visible: jax.Array | Attend,
        cache: Cache | None = None,
        feature_layers: Sequence[int] = (),
    ) -> TargetOutput:
        """The final hidden states, features and fresh keys and values of Q tokens.

        Args:
          tokens, positions: int32 [B, Q].
          visible: bool [B, Q, Q], True where query i may see fresh token j; the committed slots are always seen. Or,
            without a cache, attention itself (see layers.DecoderLayer).
          cache: committed tokens, only read; None for none.
          feature_layers: indices of the layers whose inputs are the features, e.g. (2, L // 2, L - 3) of EAGLE-3.
        """
        c = self.config
        x = embed(self.embedding[...], tokens, self.activation_dtype)  # [B, Q, H]
        x = training_rows(x, visible)
        turn = rotation(positions, c.rope, c.head_dim)
        past = cache.layers if cache is not None else (None if self.stacked else [None] * c.num_layers)
        seen, filled = (cache.seen(), cache.filled()) if cache is not None else (jnp.zeros(()), None)

        def layer_step(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            weights, kv = layer
            x, fresh = weights(x, turn, visible, None if kv is None else Past(kv[0], kv[1], seen, filled))
            return training_rows(x, visible), fresh

        # The stack is cut where a feature is read, so that nothing is kept of the other layers.
        cuts = [0, *sorted({f for f in feature_layers if f > 0}), c.num_layers]
        at: dict[int, jax.Array] = {0: x}
        fresh = []
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
            x, kv = run_layers(layer_step, x, (self.layers, past), (start, stop))
            fresh.append(kv)
            at[stop] = x
        hidden = rms_norm(x, self.norm[...], c.rms_norm_eps)
        features = jnp.concatenate([at[f] for f in feature_layers], axis=-1) if feature_layers else None
        return TargetOutput(hidden, features, _join(fresh, stacked=self.stacked))

    def head_rows(self) -> jax.Array:
        """The LM head [V, H], one row a token."""
        return (self.embedding if self.head is None else self.head)[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits float32 [..., V] of final hidden states [..., H]."""
        return head_logits(hidden, self.head_rows())

    def empty_cache(self, batch: int, num_slots: int) -> Cache:
        """A cache for `batch` rows of `num_slots` tokens, in the form the layers are in."""
        c = self.config
        return empty_cache(c.num_layers, batch, c.num_kv_heads, num_slots, c.head_dim, self.dtype, stacked=self.stacked)

    def unstacked(self) -> Llama:
        """The same target with its layers as a list, which XLA's CPU compiler runs faster."""
        if not self.stacked:
            return self
        graph, state = nnx.split(self)
        other = nnx.merge(graph, state)
        other.layers = nnx.List(unstack(self.layers, self.config.num_layers))
        hold_rows(other)
        return other


def _join(fresh: list[Any], *, stacked: bool) -> Any:
    """Segments' fresh (k, v) as one pair of stacks over all layers."""
    if stacked:
        return jax.tree.map(lambda *xs: jnp.concatenate(xs), *fresh)
    layers = [kv for segment in fresh for kv in segment]
    return [k for k, _ in layers], [v for _, v in layers]
