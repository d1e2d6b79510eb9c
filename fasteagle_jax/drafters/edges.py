"""Edge scores: guesses that levels made once are scored again by the token before them (cf. DFlash2's selector).

B rows · N levels · f nodes of a level · C candidates of a level · R rank · H hidden width · V draft vocabulary.
A level's logit of token v after token u is that of the cascade plus <(A e[u]) * (P h), B[v]>, h being the level's
state and e the target's embedding. In training this is the logit of every v. The first level's u is known, the
pending token. Of the others a draft takes the C best guesses without u, and scores all pairs of candidates of
neighbouring levels at once: one product with the head a draft, where a correction of the state needs one a level.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.decoding.interfaces import VocabWeights
from fasteagle_jax.devices.sharding import top_k
from fasteagle_jax.nn.embedding import embed
from fasteagle_jax.nn.linear import Linear, head_logits
from fasteagle_jax.nn.norm import rms_norm

NUM_CANDIDATES = 64  # C; without u the best guesses are other ones


class EdgeScores(nnx.Module):
    """A, P and B. B starts at zero, so that training starts from guesses without edge scores."""

    def __init__(self, hidden_size: int, rank: Any, vocab_size: int, eps: float, key: jax.Array, dtype: Any):
        key_state, key_token = jax.random.split(key)
        self.eps = eps
        self.of_state = Linear(hidden_size, rank, ("embed", None), key_state, dtype)
        self.of_token = Linear(hidden_size, rank, ("embed", None), key_token, dtype)
        self.table = nnx.Param(jnp.zeros((vocab_size, rank), dtype), axes=("vocab", None))

    def factors(self, part: Linear, x: jax.Array) -> jax.Array:
        """`part` of normed states or embeddings [..., H]: [..., R]."""
        return part(rms_norm(x, jnp.ones((x.shape[-1],), jnp.float32), self.eps))

    def query(self, h: jax.Array, e: jax.Array) -> jax.Array:
        """(A e) * (P h) [..., R], whose products with B are the scores, of states and embeddings [..., H]."""
        return self.factors(self.of_token, e) * self.factors(self.of_state, h)

    def of_all(self, h: jax.Array, e: jax.Array) -> jax.Array:
        """Scores float32 [..., V] of all tokens, of states h and embeddings e [..., H] of the tokens before."""
        return head_logits(self.query(h, e), self.table[...])

    def scores(self, h: jax.Array, e: jax.Array, index: jax.Array) -> jax.Array:
        """Scores float32 [B, f, C] of candidates after tokens.

        Args:
          h: the level's state [B, H].
          e: embeddings [B, f, H] of the tokens before.
          index: int32 [B, C], the candidates' places in the draft vocabulary.
        """
        query = self.factors(self.of_token, e) * self.factors(self.of_state, h)[:, None]  # [B, f, R]
        return jnp.einsum("bfr,bcr->bfc", query, self.table[...][index], preferred_element_type=jnp.float32)


class Candidates:
    """Each level's best guesses, and how probable they are after each of the level before."""

    def __init__(
        self,
        edges: EdgeScores,
        vocab: VocabWeights,
        token_ids: jax.Array,
        states: jax.Array,
        ranked: jax.Array,
        temperature: jax.Array,
    ):
        """The candidates of a draft.

        Args:
          edges, vocab: the weights.
          token_ids: int32 [V], the target's ids.
          states: the levels' [B, N, H].
          ranked: log-probabilities float32 [B, N, V] (see base.rank), the first level's after the root, the others'
            without the token before.
          temperature: float32 [B]; scores are divided by it, as logits are, where it is above 0.
        """
        best, index = top_k(ranked, min(NUM_CANDIDATES, ranked.shape[-1]), "vocab")  # [B, N, C]
        self.token_ids = token_ids[index]  # int32 [B, N, C]
        scale = jnp.where(temperature > 0, temperature, 1.0)[:, None, None]
        self.log_probs = [best[:, :1]]  # of each level float32 [B, f, C]: f = 1 at the first, C at others
        for level in range(1, ranked.shape[1]):
            e = embed(vocab.embedding, self.token_ids[:, level - 1], states.dtype)
            scores = edges.scores(states[:, level], e, index[:, level]) / scale
            self.log_probs.append(renormalised(best[:, level, None], scores))

    def after(self, index: jax.Array, level: int) -> jax.Array:
        """Log-probabilities float32 [B, f, C] of a level's candidates after those of the level before at `index`.

        `index` is int32 [B, f]; 0 for the root before level 0.
        """
        return jnp.take_along_axis(self.log_probs[level], index[..., None], axis=1)


def renormalised(log_probs: jax.Array, scores: jax.Array) -> jax.Array:
    """Log-probabilities [..., C] of candidates that had `log_probs` [..., C] before their scores [..., C] were added.

    All other tokens are taken to have the score 0, so that they keep what they had.
    """
    others = jnp.maximum(1 - jnp.exp(log_probs).sum(axis=-1, keepdims=True), 1e-9)
    raised = log_probs + scores
    total = jnp.logaddexp(jax.nn.logsumexp(raised, axis=-1, keepdims=True), jnp.log(others))
    return raised - total
