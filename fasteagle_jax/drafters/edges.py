"""Edge scores: guesses that levels made once are scored again by the tokens before them (cf. DFlash2's selector).

B rows · N levels · f nodes of a level · C candidates of a level · R rank · J reach · H hidden width · V draft
vocabulary.
A level's logit of token v after token u is that of the cascade plus <(A e[u]) * (P h), B[v]>, h being the level's
state and e the target's embedding; with a reach of J, A reads the J tokens before, as far as they follow the pending
one. In training this is the logit of every v. The first level's u is known, the pending token. Of the others a draft
takes the C best guesses without u, and scores all pairs of candidates of neighbouring levels at once (and of levels up
to J apart, whose scores add up): one product with the head a draft, where a correction of the state needs one a level.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.decoding.interfaces import VocabWeights
from fasteagle_jax.devices.sharding import top_k
from fasteagle_jax.nn.embedding import embed
from fasteagle_jax.nn.linear import Linear, head_logits, matmul
from fasteagle_jax.nn.norm import rms_norm

NUM_CANDIDATES = 64  # C; without u the best guesses are other ones


class EdgeScores(nnx.Module):
    """A, P and B. B starts at zero, so that training starts from guesses without edge scores."""

    def __init__(
        self, hidden_size: int, rank: Any, reach: int, vocab_size: int, eps: float, key: jax.Array, dtype: Any
    ):
        key_state, key_token = jax.random.split(key)
        self.eps, self.reach = eps, reach
        self.of_state = Linear(hidden_size, rank, ("embed", None), key_state, dtype)
        self.of_token = Linear(reach * hidden_size, rank, ("embed", None), key_token, dtype)
        self.table = nnx.Param(jnp.zeros((vocab_size, rank), dtype), axes=("vocab", None))

    def normed(self, x: jax.Array) -> jax.Array:
        """States or embeddings [..., H] over their root mean square; zero stays zero."""
        return rms_norm(x, jnp.ones((x.shape[-1],), jnp.float32), self.eps)

    def query(self, h: jax.Array, e: jax.Array) -> jax.Array:
        """(A e) * (P h) [..., R], whose products with B are the scores.

        `h` are states [..., H] and `e` the embeddings [..., J, H] of the tokens before, the nearest first, zero for
        those that are not known.
        """
        tokens = self.normed(e).reshape(*e.shape[:-2], -1)  # [..., J*H]
        return self.of_token(tokens) * self.of_state(self.normed(h))

    def of_all(self, h: jax.Array, e: jax.Array) -> jax.Array:
        """Scores float32 [B, V] of all tokens, of states h and embeddings e [B, H] of the nearest tokens before."""
        known = jnp.pad(e[:, None], ((0, 0), (0, self.reach - 1), (0, 0)))
        return head_logits(self.query(h, known), self.table[...])

    def scores(self, h: jax.Array, e: jax.Array, distance: int, index: jax.Array) -> jax.Array:
        """The share float32 [B, f, C] that tokens have in the scores of candidates.

        Args:
          h: the level's state [B, H].
          e: embeddings [B, f, H] of the tokens.
          distance: of the candidates to the tokens, 1 to J.
          index: int32 [B, C], the candidates' places in the draft vocabulary.
        """
        hidden = h.shape[-1]
        part = self.of_token.matrix[(distance - 1) * hidden : distance * hidden]  # [H, R]
        query = matmul(self.normed(e), part) * self.of_state(self.normed(h))[:, None]  # [B, f, R]
        return jnp.einsum("bfr,bcr->bfc", query, self.table[...][index], preferred_element_type=jnp.float32)


class Candidates:
    """Each level's best guesses, and how probable they are after those of the levels before."""

    def __init__(
        self,
        edges: EdgeScores,
        vocab: VocabWeights,
        token_ids: jax.Array,
        root: jax.Array,
        states: jax.Array,
        ranked: jax.Array,
        temperature: jax.Array,
    ):
        """The candidates of a draft.

        Args:
          edges, vocab: the weights.
          token_ids: int32 [V], the target's ids.
          root: int32 [B], the token before the first level's guesses.
          states: the levels' [B, N, H].
          ranked: log-probabilities float32 [B, N, V] (see base.rank), the first level's after the root, the others'
            without the tokens before.
          temperature: float32 [B]; scores are divided by it, as logits are, where it is above 0.
        """
        self.best, index = top_k(ranked, min(NUM_CANDIDATES, ranked.shape[-1]), "vocab")  # [B, N, C]
        self.token_ids = token_ids[index]  # int32 [B, N, C]
        scale = jnp.where(temperature > 0, temperature, 1.0)[:, None, None]
        # By level and distance the scores float32 [B, f, C] after each candidate of the level so far before, or after
        # the root alone.
        self._scores: list[list[jax.Array]] = [[]]
        for level in range(1, ranked.shape[1]):
            of_level = []
            for distance in range(1, min(edges.reach, level + 1) + 1):
                before = self.token_ids[:, level - distance] if distance <= level else root[:, None]
                e = embed(vocab.embedding, before, states.dtype)
                of_level.append(edges.scores(states[:, level], e, distance, index[:, level]) / scale)
            self._scores.append(of_level)

    def after(self, path: jax.Array, level: int) -> jax.Array:
        """Log-probabilities float32 [B, f, C] of a level's candidates after f nodes.

        `path` int32 [B, f, J] are the candidates' indices on the way to each node, its own first; those of the root and
        before are not looked at.
        """
        if level == 0:
            return self.best[:, :1]
        parts = []  # of each distance
        for distance, scores in enumerate(self._scores[level], 1):
            at = path[..., distance - 1, None]  # [B, f, 1]
            parts.append(scores if scores.shape[1] == 1 else jnp.take_along_axis(scores, at, axis=1))
        return renormalised(self.best[:, level, None], functools.reduce(jnp.add, parts))


def renormalised(log_probs: jax.Array, scores: jax.Array) -> jax.Array:
    """Log-probabilities [..., C] of candidates that had `log_probs` [..., C] before their scores [..., C] were added.

    All other tokens are taken to have the score 0, so that they keep what they had.
    """
    others = jnp.maximum(1 - jnp.exp(log_probs).sum(axis=-1, keepdims=True), 1e-9)
    raised = log_probs + scores
    total = jnp.logaddexp(jax.nn.logsumexp(raised, axis=-1, keepdims=True), jnp.log(others))
    return raised - total
