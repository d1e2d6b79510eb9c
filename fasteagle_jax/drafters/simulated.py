"""A simulated drafter of given acceptance: it costs nothing and drafts the known answer, with random mistakes.

B rows · N levels · S slots · K ranks of a level · V vocabulary.
It serves to measure the cost of decoding without a drafter's, and the gain from some acceptance before any training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fasteagle_jax.decoding.interfaces import Accepted, Ranking, VocabWeights
from fasteagle_jax.decoding.sampling import gumbel_noise
from fasteagle_jax.decoding.tree import Draft, TreeSpec, build
from fasteagle_jax.drafters.base import WithoutCache
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.kv_cache import Cache

RANK_STEP = 20.0  # by which a level's next guess scores less, so that a tree takes the chain of best guesses first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Simulated(WithoutCache):
    """An `interfaces.Drafter` whose guess at depth d is right with probability `rates[d - 1]`, given those before it.

    `sequences` int32 [B, S] are each row's prompt and answer. Whether a guess is right is drawn by (seed, position of
    the pending token, depth), so no draw is used twice. If it is wrong, all guesses of the tree at that depth are.
    A tree of fewer than N + 1 nodes does not have all levels.
    """

    sequences: jax.Array  # int32 [B, S]
    rates: jax.Array  # float32 [N]
    seed: jax.Array  # uint32 [B]
    vocab_size: int = dataclasses.field(metadata=dict(static=True))
    feature_layers: tuple[int, ...] = dataclasses.field(default=(0,), metadata=dict(static=True))  # not used
    context_layers: tuple[int, ...] = dataclasses.field(default=(), metadata=dict(static=True))

    @property
    def num_levels(self) -> int:
        """N."""
        return self.rates.shape[0]

    def vocab_weights(self, target: Any) -> VocabWeights:
        """The target's embedding and head, which it does not use."""
        return VocabWeights(target.embedding[...], target.head_rows(), None)

    def draft(
        self, vocab: VocabWeights, new: Accepted, cache: Cache, tree: TreeSpec, ranking: Ranking, context: Any = ()
    ) -> tuple[Draft, Cache]:
        """A tree of the sequence's next tokens, wrong ones at mistakes (see interfaces.Drafter)."""
        cache = self.skip(new, cache)
        num_levels = tree.num_levels(self.num_levels)
        batch, num_slots = self.sequences.shape
        positions = cache.length[:, None] + 1 + jnp.arange(num_levels)  # [B, N]; the pending token is at cache.length
        true = jnp.take_along_axis(self.sequences, jnp.minimum(positions, num_slots - 1), axis=1)
        noise = gumbel_noise(self.seed, cache.length, jnp.arange(num_levels))  # [B, N]
        uniform = jnp.exp(-jnp.exp(-noise))  # the Gumbel distribution function of the noise
        wrong = (uniform >= self.rates[:num_levels]).astype(jnp.int32)
        num_ranks = min(tree.num_nodes(num_levels), self.vocab_size - 1)  # K, at most the nodes of a level
        rank = jnp.arange(num_ranks)
        guesses = (true[..., None] + wrong[..., None] + rank) % self.vocab_size  # [B, N, K], distinct in a level
        scores = jnp.broadcast_to(-RANK_STEP * rank, guesses.shape)

        last = jnp.maximum(new.count - 1, 0)[:, None]
        root = jnp.take_along_axis(new.tokens, last, axis=1)
        ranks = build(tree, root[:, 0], scores)  # tokens are ranks, except the root's
        row, level = jnp.arange(batch)[:, None], jnp.maximum(ranks.depths - 1, 0)
        tokens = jnp.where(ranks.depths == 0, root, guesses[row, level, jnp.where(ranks.depths == 0, 0, ranks.tokens)])
        return ranks._replace(tokens=tokens.astype(jnp.int32)), cache


def parse_rates(text: str) -> tuple[float, ...]:
    """The rates in a text such as `0.8/0.7/0.6`, one a level; UserError for other texts."""
    try:
        rates = tuple(float(part) for part in text.split("/"))
    except ValueError:
        rates = ()
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise UserError(f"acceptance {text!r} is not understood: write one number of 0 to 1 a level, 0.8/0.7/0.6")
    return rates


def simulated(
    rates: Sequence[float], prompt: Sequence[int], answer: Sequence[int], num_slots: int, vocab_size: int, seed: int = 0
) -> Simulated:
    """The Simulated drafter of one row, whose plain answer to `prompt` is `answer`; S is `num_slots`."""
    known = [*prompt, *answer][:num_slots]
    sequences = np.zeros((1, num_slots), np.int32)
    sequences[0, : len(known)] = known
    return Simulated(
        jnp.asarray(sequences), jnp.asarray(rates, jnp.float32), jnp.asarray([seed], jnp.uint32), vocab_size
    )
