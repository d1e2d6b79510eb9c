"""What decoding and training ask of a target and of a drafter: two small protocols.

B rows · T tokens · A newly accepted tokens · N levels · H hidden width · F feature layers · V draft vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax

from fasteagle_jax.decoding.sampling import Sampling
from fasteagle_jax.decoding.tree import Draft, TreeSpec
from fasteagle_jax.nn.linear import LogitMap, head_logits


class VocabWeights(NamedTuple):
    """The frozen rows that a drafter reads and writes tokens with."""

    embedding: jax.Array  # [target vocabulary, H]
    head: jax.Array  # [V, H]
    token_ids: jax.Array | None  # int32 [V], target id of each row of `head`; None if they are the same
    logit_map: LogitMap = LogitMap()  # from the head's products to logits

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Draft logits float32 [..., V] of the head's inputs [..., H]."""
        return self.logit_map(head_logits(hidden, self.head))


class Accepted(NamedTuple):
    """The A newest verified tokens of each row and the target features they were predicted from."""

    features: jax.Array  # [B, A, F*H], of the tokens one before
    tokens: jax.Array  # int32 [B, A]; the last counted one is the pending token
    count: jax.Array  # type: ignore[assignment]  # int32 [B], how many of the A are real


class Ranking(NamedTuple):
    """How a drafter ranks its guesses: as the target will pick, or by probability alone."""

    sampling: Sampling
    shared_noise: bool  # rank with the target's own noise at temperature > 0


class Drafter(Protocol):
    """A model that guesses the tokens after the pending one."""

    num_levels: int  # N: no draft is deeper
    feature_layers: tuple[int, ...]  # whose inputs in the target it reads

    def vocab_weights(self, target: Any) -> VocabWeights:
        """The target's rows that it needs, gathered once."""
        ...

    def empty_cache(self, batch: int, num_slots: int, most_written: int) -> Any:
        """Its own cache for rows of up to `num_slots` positions, holding nothing; one write brings `most_written`."""
        ...

    def extend(self, vocab: VocabWeights, new: Accepted, cache: Any, num_levels: int) -> Any:
        """The cache with the accepted tokens in it and no draft made (prefill); drafts to come have `num_levels`."""
        ...

    def skip(self, new: Accepted, cache: Any) -> Any:
        """The cache after the accepted tokens, without them: cheap, and drafts will be the poorer for it."""
        ...

    def draft(
        self, vocab: VocabWeights, new: Accepted, cache: Any, tree: TreeSpec, ranking: Ranking
    ) -> tuple[Draft, Any]:
        """A Draft rooted at each row's pending token, and the cache with the accepted tokens in it."""
        ...
