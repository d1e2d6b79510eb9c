"""What drafters share: the target's features fused into a stream, and a draft vocabulary.

B rows · T stream positions · F feature layers · H hidden width · V draft vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.config import DrafterConfig
from fasteagle_jax.decoding.interfaces import Accepted, Tied
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.kv_cache import Ring, as_ring, empty_cache, ring_slots
from fasteagle_jax.nn.transformer import LayerConfig, hold_columns, matmul


class Constant(nnx.Variable):
    """An array of a drafter that is saved with it and never trained."""


class DrafterModule(nnx.Module):
    """A drafter that reads features [F*H] at every stream position and keeps its keys and values in a Ring."""

    architecture: str  # its name in a config.json

    def __init__(self, config: DrafterConfig, key: jax.Array, dtype: Any):
        c = config
        num_features = len(c.feature_layers) * c.hidden_size
        self.config = c
        self.fc = nnx.Param(jax.random.normal(key, (num_features, c.hidden_size), dtype) * num_features**-0.5)
        self.feature_scale = Constant(jnp.ones((num_features,), jnp.float32))
        self.token_ids = (
            None if c.draft_vocab_size == c.vocab_size else Constant(jnp.arange(c.draft_vocab_size, dtype=jnp.int32))
        )

    @property
    def num_levels(self) -> int:
        """N."""
        return self.config.num_levels

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The target's layers whose inputs are the features."""
        return self.config.feature_layers

    def fused(self, features: jax.Array) -> jax.Array:
        """g [B, T, H] of the target's features [B, T, F*H]."""
        scaled = features.astype(jnp.float32) * self.feature_scale[...]
        return matmul(scaled.astype(features.dtype), self.fc[...])

    def empty_ring(self, num_layers: int, batch: int, num_slots: int, most_written: int, *, stacked: bool) -> Ring:
        """A cache for `batch` rows of `num_slots` stream positions.

        With a window it does not grow with `num_slots`, but with `most_written`, the tokens that one write brings.
        """
        c = self.config
        slots = ring_slots(num_slots, c.window, most_written)
        dtype = self.fc[...].dtype
        return as_ring(empty_cache(num_layers, batch, c.num_kv_heads, slots, c.head_dim, dtype, stacked=stacked))

    def stored(self) -> list[tuple[str, Any, bool]]:
        """(name in the file, variable, transposed) of every tensor that is stored, of the unstacked form.

        By default all of them, as they are, by their places in the module.
        """
        places = ((path, node) for path, node in nnx.iter_graph(self) if isinstance(node, nnx.Variable))
        return [(".".join(map(str, path)), node, False) for path, node in places]

    def published(self) -> dict[str, Any]:
        """What its config.json holds for programs that know the architecture by other keys than DrafterConfig's."""
        return {}

    def skip(self, new: Accepted, cache: Ring) -> Ring:
        """The cache after the accepted tokens, whose stream positions it will never hold."""
        return cache._replace(length=cache.length + new.count)


def layer_config(config: DrafterConfig) -> LayerConfig:
    """The sizes of a decoder layer of a drafter."""
    c = config
    return LayerConfig(c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim, c.rms_norm_eps)


def copy_weights(into: nnx.Module, source: Any) -> None:
    """Gives a layer another one's weights, as float32; UserError where their sizes differ."""
    copied = jax.tree.map(lambda w: w.astype(jnp.float32), source)
    hold_columns(copied)
    if jax.tree.leaves(jax.tree.map(jnp.shape, into)) != jax.tree.leaves(jax.tree.map(jnp.shape, copied)):
        raise UserError(
            "the drafter's layers differ in size or biases from the target's and cannot start from them: "
            "set from_target=False"
        )
    nnx.update(into, nnx.state(copied))


def draft_ids(tied: Tied) -> jax.Array:
    """int32 [V], the target's id of each entry of the draft vocabulary."""
    return jnp.arange(tied.head.shape[0]) if tied.token_ids is None else tied.token_ids


def causal(query: jax.Array, key: jax.Array, window: int | None) -> jax.Array:
    """bool, True where a query at one position sees a key at another: itself and the `window` - 1 before it."""
    visible = key <= query
    return visible if window is None else visible & (query - key < window)
