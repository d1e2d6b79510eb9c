"""A drafter without weights, to which all tokens are equally probable: its trees hold what lookup copies.

B rows · M nodes · N levels · V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fasteagle_jax.decoding.interfaces import Accepted, Ranking, VocabWeights
from fasteagle_jax.decoding.tree import NO_PARENT, Draft, TreeSpec
from fasteagle_jax.drafters.base import WithoutCache, pending
from fasteagle_jax.nn.kv_cache import Cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextOnly(WithoutCache):
    """An `interfaces.Drafter` that guesses the ids after the pending token's; see decoding.lookup for better ones."""

    num_levels: int = dataclasses.field(default=7, metadata=dict(static=True))  # N
    feature_layers: tuple[int, ...] = dataclasses.field(default=(0,), metadata=dict(static=True))  # not used
    context_layers: tuple[int, ...] = dataclasses.field(default=(), metadata=dict(static=True))

    def vocab_weights(self, target: Any) -> VocabWeights:
        """The target's embedding, of which it reads the number of rows, and no head."""
        embedding = target.embedding[...]
        return VocabWeights(embedding, embedding[:0], None)

    def draft(
        self, vocab: VocabWeights, new: Accepted, cache: Cache, tree: TreeSpec, ranking: Ranking, context: Any = ()
    ) -> tuple[Draft, Cache]:
        """Any M - 1 tokens below the root (see interfaces.Drafter)."""
        vocab_size = vocab.embedding.shape[0]
        node = jnp.arange(tree.num_nodes(self.num_levels))
        tokens = (pending(new)[:, None] + node) % vocab_size  # [B, M], distinct
        depths = jnp.broadcast_to(jnp.minimum(node, 1), tokens.shape)
        parents = jnp.where(depths == 0, NO_PARENT, 0)
        return Draft(tokens, parents, depths, -math.log(vocab_size) * depths), self.skip(new, cache)
