"""The base of target families: one forward pass for prefill, plain decoding, verification and training.

B rows · Q query tokens · L layers · H hidden width · K heads of K/V · D head width · V vocabulary · F feature layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.devices.sharding import training_rows
from fasteagle_jax.nn.embedding import embed
from fasteagle_jax.nn.kv_cache import Cache, MixedCache, empty_cache, empty_mixed_cache, ring_slots
from fasteagle_jax.nn.linear import LogitMap, head_logits, to_rows
from fasteagle_jax.nn.norm import RMSNorm
from fasteagle_jax.nn.transformer import (
    DecoderLayer,
    LayerConfig,
    LayerKinds,
    Windowed,
    run_layers,
    unstack,
)


class TargetOutput(NamedTuple):
    """The results of a target's forward pass."""

    hidden: jax.Array  # [B, Q, H] after the final norm: the head's input
    features: jax.Array | None  # [B, Q, F*H] inputs of the feature layers, concatenated low to high; None for F = 0
    fresh: Any  # keys and values of the Q tokens, for `kv_cache.commit`


class DecoderTarget(nnx.Module):
    """A frozen target: embedding, decoder layers, final norm, head. A family overrides what differs.

    `layers` is one stacked layer (leading axis L) or, unstacked, a list of L of them; always a list if some have parts
    that others lack. Activations between matrix products are in `activation_dtype`, by default the weights' dtype. Set
    `cache_dtype` to int8 for a cache of rounded keys and values, with a scale a head and token: all of its decoding,
    with and without drafts, then reads these.
    """

    def __init__(
        self,
        config: Any,
        key: jax.Array,
        dtype: Any = jnp.float32,
        *,
        stacked: bool = True,
        activation_dtype: Any = None,
    ):
        c = config
        self.activation_dtype = jnp.dtype(activation_dtype or dtype)
        self.cache_dtype: Any = None  # None for the weights'
        key_embed, key_layers, key_head = jax.random.split(key, 3)
        self.config = c
        axes = ("vocab", "embed")
        self.embedding = nnx.Param(jax.random.normal(key_embed, (c.vocab_size, c.hidden_size), dtype), axes=axes)
        keys, configs = jax.random.split(key_layers, c.num_layers), [c.layer_at(i) for i in range(c.num_layers)]
        if len(set(configs)) == 1:
            layers = jax.vmap(lambda k: self.make_layer(configs[0], k, dtype))(keys)
            self.layers: Any = layers if stacked else nnx.List(unstack(layers, c.num_layers))
        else:  # of several structures, which no stack has
            self.layers = nnx.List([self.make_layer(config, k, dtype) for config, k in zip(configs, keys, strict=True)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype, offset=c.layer.norm_offset)
        head = jax.random.normal(key_head, (c.vocab_size, c.hidden_size), dtype) * c.hidden_size**-0.5
        self.head = None if c.tie_embeddings else nnx.Param(head, axes=axes)  # None if it is the embedding

    # --- what a family may override -----------------------------------------------------------------------------

    @staticmethod
    def make_layer(config: LayerConfig, key: jax.Array, dtype: Any) -> Any:
        """A layer of random weights: a DecoderLayer, or a module with its call and parts."""
        return DecoderLayer(config, key, dtype)

    @property
    def logit_map(self) -> LogitMap:
        """The map from the head's products to logits."""
        return LogitMap()

    @property
    def embedding_scale(self) -> float:
        """The factor between the embedding's rows and the first layer's input."""
        return 1.0

    def embed(self, tokens: jax.Array) -> jax.Array:
        """The first layer's input [B, Q, H] of tokens int32 [B, Q]."""
        rows = embed(self.embedding[...], tokens, self.activation_dtype)
        return rows if self.embedding_scale == 1 else rows * self.embedding_scale

    # --- the forward pass ---------------------------------------------------------------------------------------

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        visible: jax.Array | Windowed,
        cache: Cache | MixedCache | None = None,
        feature_layers: Sequence[int] = (),
    ) -> TargetOutput:
        """The final hidden states, features and fresh keys and values of Q tokens.

        Args:
          tokens, positions: int32 [B, Q].
          visible: bool [B, Q, Q], True where query i may see fresh token j; committed slots are seen within a layer's
            window. Or, without a cache, a Windowed attention such as nn.packed_attention.Packed.
          cache: committed tokens, only read; None for none.
          feature_layers: indices of the layers whose inputs are the features, e.g. (2, L // 2, L - 3) of EAGLE-3.
        """
        c = self.config
        x = training_rows(self.embed(tokens), visible)  # [B, Q, H]
        kinds = LayerKinds(c.layer_kinds, positions, c.head_dim, stacked=self.stacked)
        layers = cache.layers if cache is not None else (None if self.stacked else [None] * c.num_layers)
        indices = jnp.arange(c.num_layers) if self.stacked else [None] * c.num_layers

        def layer_step(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            weights, kv, number, index = layer
            context = kinds.of(number)
            attend = context.attend(visible, None if cache is None else cache.past(kv))
            x, fresh = weights(x, context.rotation, attend, index)
            return training_rows(x, visible), fresh

        # The layers run in segments that end where a feature is read, so that nothing is kept of the other layers.
        bounds = [0, *sorted({f for f in feature_layers if f > 0}), c.num_layers]
        inputs: dict[int, jax.Array] = {0: x}  # of layers, by index
        fresh = []
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            x, kv = run_layers(layer_step, x, (self.layers, layers, kinds.numbers, indices), (start, stop))
            fresh.append(kv)
            inputs[stop] = x
        features = jnp.concatenate([inputs[f] for f in feature_layers], axis=-1) if feature_layers else None
        return TargetOutput(self.norm(x), features, _join(fresh, stacked=self.stacked))

    def layer(self, index: int) -> Any:
        """One of the layers, unstacked."""
        return jax.tree.map(lambda w: w[index], self.layers) if self.stacked else self.layers[index]

    def keys_values(self, index: int, inputs: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The keys and values [B, K, Q, D] of a layer for its inputs [B, Q, H] at positions int32 [B, Q]."""
        layer, kind = self.layer(index), self.config.layer_kinds[index]
        table = LayerKinds((kind,), positions, self.config.head_dim, stacked=False).of(0).rotation
        _, k, v = layer.attention.project(layer.input_norm(inputs), table)
        return k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def head_rows(self) -> jax.Array:
        """The LM head [V, H], one row a token."""
        return (self.embedding if self.head is None else self.head)[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits float32 [..., V] of final hidden states [..., H]."""
        return self.logit_map(head_logits(hidden, self.head_rows()))

    # --- cache, and the form of the layers ----------------------------------------------------------------------

    @property
    def stacked(self) -> bool:
        """Whether the layers are one scanned stack rather than a list."""
        return not isinstance(self.layers, nnx.List)

    @property
    def dtype(self) -> Any:
        """The dtype of weights and, but for `cache_dtype`, of the cache."""
        return self.embedding[...].dtype

    def empty_cache(
        self, batch: int, num_slots: int, most_written: int | None = None, longest: int | None = None
    ) -> Cache | MixedCache:
        """An empty cache for `batch` rows of `num_slots` tokens, as a stack or a list like the layers.

        Given the most tokens of one write, local layers have a ring of their window's positions, of a size for rows of
        up to `longest` tokens (None: `num_slots`): rows of other numbers of slots then fit each other's rings.
        """
        c, dtype, longest = self.config, self.cache_dtype or self.dtype, longest or num_slots
        windows = [kind.window for kind in c.layer_kinds]
        if most_written is not None and any(windows):
            local_slots = ring_slots(longest, max(window or 0 for window in windows), most_written)
            if local_slots < longest:
                is_local = [window is not None for window in windows]
                sizes = batch, c.num_kv_heads, num_slots, local_slots, c.head_dim, dtype
                return empty_mixed_cache(is_local, *sizes, stacked=self.stacked)
        return empty_cache(c.num_layers, batch, c.num_kv_heads, num_slots, c.head_dim, dtype, stacked=self.stacked)

    def unstacked(self, *, by_rows: bool = True) -> Self:
        """The same target with its layers as a list, which XLA's CPU compiler runs faster.

        With `by_rows` the weights become RowWeights if these are faster.
        """
        if not self.stacked and not by_rows:
            return self
        graph, state = nnx.split(self)
        other = nnx.merge(graph, state)
        if self.stacked:
            other.layers = nnx.List(unstack(self.layers, self.config.num_layers))
        if by_rows:
            to_rows(other)
        return other


def _join(fresh: list[Any], *, stacked: bool) -> Any:
    """The segments' fresh (k, v) as one pair of stacks or lists over all layers."""
    if stacked:
        return jax.tree.map(lambda *xs: jnp.concatenate(xs), *fresh)
    layers = [kv for segment in fresh for kv in segment]
    return [k for k, _ in layers], [v for _, v in layers]
