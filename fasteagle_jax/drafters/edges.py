"""Edge scores: guesses that levels made once are scored again by the tokens before them (cf. DFlash2's selector).

B rows · N levels · f nodes of a level · C candidates of a level · R rank · J reach · H hidden width · V draft
vocabulary.
A level's logit of token v after token u is that of the cascade plus <(A e[u]) * (P h), B[v]>, h being the level's
state and e the target's embedding; with a reach of J, A reads the J tokens before, from the pending one on; gated, A e
becomes silu(A e + G h), as in a SwiGLU. In training this is the logit of every v. The first level's u is known, the
pending token. Of the others a draft takes the C best guesses without u, and their shares A e and rows of B at once. A
node of the tree then carries its path's sums of shares: one product with the head a draft, where a correction of the
state needs one a level.
"""

from __future__ import annotations

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
    """A, P and B, and G if it is gated. B starts at zero, so that training starts from guesses without edge scores."""

    def __init__(
        self,
        hidden_size: int,
        rank: Any,
        reach: int,
        gated: bool,
        vocab_size: int,
        eps: float,
        key: jax.Array,
        dtype: Any,
    ):
        key_state, key_token, key_gate = jax.random.split(key, 3)
        self.eps, self.reach = eps, reach
        self.of_state = Linear(hidden_size, rank, ("embed", None), key_state, dtype)
        self.of_token = Linear(reach * hidden_size, rank, ("embed", None), key_token, dtype)
        self.gate = Linear(hidden_size, rank, ("embed", None), key_gate, dtype) if gated else None
        self.table = nnx.Param(jnp.zeros((vocab_size, rank), dtype), axes=("vocab", None))

    def normed(self, x: jax.Array) -> jax.Array:
        """States or embeddings [..., H] over their root mean square; zero stays zero."""
        return rms_norm(x, jnp.ones((x.shape[-1],), jnp.float32), self.eps)

    def query(self, h: jax.Array, e: jax.Array) -> jax.Array:
        """What reads B, [..., R], for guesses of states h [..., H] after tokens of embeddings e [..., J, H].

        The nearest token comes first; those that are not known are zero.
        """
        return self.combined(self.of_token(self.normed(e).reshape(*e.shape[:-2], -1)), h)

    def combined(self, of_path: jax.Array, h: jax.Array) -> jax.Array:
        """The query [..., R] of a path's sum of shares [..., R] and a state [..., H]."""
        h = self.normed(h)
        if self.gate is not None:
            of_path = jax.nn.silu(of_path + self.gate(h))
        return of_path * self.of_state(h)

    def shares(self, e: jax.Array) -> jax.Array:
        """Tokens' shares [..., J, R] in queries 1 to J levels below them, of their embeddings e [..., H]."""
        parts = self.of_token.matrix.reshape(self.reach, e.shape[-1], -1)  # [J, H, R]
        return matmul(self.normed(e), jnp.concatenate(list(parts), axis=1)).reshape(*e.shape[:-1], self.reach, -1)

    def of_all(self, h: jax.Array, of_path: jax.Array) -> jax.Array:
        """Scores float32 [B, V] of all tokens, of states h [B, H] after paths of shares [B, R]."""
        return head_logits(self.combined(of_path, h), self.table[...])


class Candidates:
    """Each level's best guesses, and how probable they are after those of the levels before."""

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
            without the tokens before.
          temperature: float32 [B]; scores are divided by it, as logits are, where it is above 0.
        """
        self._edges, self._states = edges, states
        self.best, index = top_k(ranked, min(NUM_CANDIDATES, ranked.shape[-1]), "vocab")  # [B, N, C]
        self.token_ids = token_ids[index]  # int32 [B, N, C]
        self._shares = edges.shares(embed(vocab.embedding, self.token_ids[:, :-1], states.dtype))  # [B, N-1, C, J, R]
        self._rows = edges.table[...][index[:, 1:]]  # [B, N-1, C, R]
        self._scale = jnp.where(temperature > 0, temperature, 1.0)[:, None, None]

    def after(self, paths: jax.Array, level: int) -> jax.Array:
        """Log-probabilities float32 [B, f, C] of a level's candidates after f nodes.

        `paths` [B, f, J, R] are the sums of shares of the tokens on the way to each node in queries of this level and
        of the J - 1 below.
        """
        if level == 0:
            return self.best[:, :1]
        query = self._edges.combined(paths[:, :, 0], self._states[:, level, None])  # [B, f, R]
        rows = self._rows[:, level - 1]
        scores = jnp.einsum("bfr,bcr->bfc", query, rows, preferred_element_type=jnp.float32)
        return renormalised(self.best[:, level, None], scores / self._scale)

    def below(self, paths: jax.Array, parent: jax.Array, index: jax.Array, level: int) -> jax.Array:
        """The paths [B, f', J, R] to nodes of a level, of the parents' [B, f, J, R].

        `parent` and `index` int32 [B, f'] are the places of the nodes' parents among the f, and of their tokens among
        the level's candidates.
        """
        above = jnp.take_along_axis(paths, parent[..., None, None], axis=1)  # [B, f', J, R]
        own = jnp.take_along_axis(self._shares[:, level], index[..., None, None], axis=1)
        return jnp.pad(above[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0))) + own


def renormalised(log_probs: jax.Array, scores: jax.Array) -> jax.Array:
    """Log-probabilities [..., C] of candidates that had `log_probs` [..., C] before their scores [..., C] were added.

    All other tokens are taken to have the score 0, so that they keep what they had.
    """
    others = jnp.maximum(1 - jnp.exp(log_probs).sum(axis=-1, keepdims=True), 1e-9)
    raised = log_probs + scores
    total = jnp.logaddexp(jax.nn.logsumexp(raised, axis=-1, keepdims=True), jnp.log(others))
    return raised - total
