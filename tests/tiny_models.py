"""Small models for tests: random Llamas, and drafters that know the answer.

B rows · N levels · V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fasteagle_jax.decoding.interfaces import Accepted, Ranking, VocabWeights
from fasteagle_jax.decoding.tree import Draft, TreeSpec, build
from fasteagle_jax.nn.kv_cache import Cache
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OracleDrafter:
    """A Drafter that was told what the target will say, but for the positions of its mistakes.

    `sequences` int32 [B, slots] are prompt and answer in a row, of at least N tokens more than are decoded; `mistakes`
    bool [B, slots] marks positions whose guesses, all of them, are wrong (None for no position).
    Trees come from `tree.build`, by way of scores that are high for one token alone.
    """

    sequences: jax.Array
    vocab_size: int = dataclasses.field(metadata=dict(static=True))
    num_levels: int = dataclasses.field(metadata=dict(static=True))  # N
    mistakes: jax.Array | None = None
    feature_layers: tuple[int, ...] = dataclasses.field(default=(0,), metadata=dict(static=True))  # read, not used

    def vocab_weights(self, target: Any) -> VocabWeights:
        """Rows of the target, of which it uses none."""
        return VocabWeights(target.embedding[...], target.head_rows(), None)

    def empty_cache(self, batch: int, num_slots: int, most_written: int) -> Cache:
        """A Cache that is a position and nothing else."""
        return Cache([], [], jnp.zeros((batch,), jnp.int32))

    def extend(self, vocab: VocabWeights, new: Accepted, cache: Cache, num_levels: int) -> Cache:
        """The position after the accepted tokens."""
        return cache._replace(length=cache.length + new.count)

    def skip(self, new: Accepted, cache: Cache) -> Cache:
        """The position after the accepted tokens."""
        return cache._replace(length=cache.length + new.count)

    def draft(
        self, vocab: VocabWeights, new: Accepted, cache: Cache, tree: TreeSpec, ranking: Ranking
    ) -> tuple[Draft, Cache]:
        """A tree whose best guesses are the sequence's next tokens, or at a mistake the tokens after them."""
        cache = self.skip(new, cache)
        last = jnp.maximum(new.count - 1, 0)[:, None]
        root = jnp.take_along_axis(new.tokens, last, axis=1)[:, 0]
        # The pending token is at cache.length, as with every drafter.
        at = cache.length[:, None] + 1 + jnp.arange(self.num_levels)  # [B, N]
        at = jnp.minimum(at, self.sequences.shape[1] - 1)
        true = jax.nn.one_hot(jnp.take_along_axis(self.sequences, at, axis=1), self.vocab_size)  # [B, N, V]
        wrong = jnp.zeros(at.shape, bool)
        if self.mistakes is not None:
            wrong = jnp.take_along_axis(self.mistakes, at, axis=1)
        # With the true token last of all no branch holds it, however wide the tree (V must be wider).
        logits = jnp.where(wrong[..., None], 20 * jnp.roll(true, 1, axis=-1) - 40 * true, 20 * true)
        return build(tree, root, jax.nn.log_softmax(logits, axis=-1)), cache


def wrong_drafter(sequences: jax.Array, vocab_size: int, num_levels: int) -> OracleDrafter:
    """A Drafter that knows what the target will say and never guesses it: its best guess is the true token plus 1."""
    return OracleDrafter(sequences, vocab_size, num_levels, jnp.ones(sequences.shape, bool))
