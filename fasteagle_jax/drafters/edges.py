"""Edge scores: guesses that levels made once are scored again by the tokens before them (cf. DFlash2's selector).

B rows · f nodes of a level · R rank · J reach · H hidden width · V draft vocabulary.
A level's logit of token v after token u is that of the cascade plus <(A e[u]) * (P h), B[v]>, h being the level's
state and e the target's embedding; with a reach of J, A reads the J tokens before, from the pending one on; gated, A e
becomes silu(A e + G h), as in a SwiGLU. A draft makes the levels' logits once, one product with the head in all, where
a correction of the state needs one a level. A node of the tree carries its path's sums of shares; the product with B
that scores all tokens below it is R wide, not H.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.nn.linear import Linear, head_logits, matmul
from fasteagle_jax.nn.norm import rms_norm


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

    def query(self, h: jax.Array, e: jax.Array) -> jax.Array:
        """What reads B, [..., R], for guesses of states h [..., H] after tokens of embeddings e [..., J, H].

        The nearest token comes first; those that are not known are zero.
        """
        return self.combined(self.of_token(rms_norm(e, None, self.eps).reshape(*e.shape[:-2], -1)), h)

    def combined(self, of_path: jax.Array, h: jax.Array) -> jax.Array:
        """The query [..., R] of a path's sum of shares [..., R] and a state [..., H]."""
        h = rms_norm(h, None, self.eps)
        if self.gate is not None:
            of_path = jax.nn.silu(of_path + self.gate(h))
        return of_path * self.of_state(h)

    def shares(self, e: jax.Array) -> jax.Array:
        """Tokens' shares [..., J, R] in queries 1 to J levels below them, of their embeddings e [..., H]."""
        e = rms_norm(e, None, self.eps)
        # One product a part: beside one another they would be a copy of the matrix in every round.
        parts = self.of_token.matrix.reshape(self.reach, e.shape[-1], -1)  # [J, H, R]
        return jnp.stack([matmul(e, part) for part in parts], axis=-2)

    def of_all(self, h: jax.Array, of_path: jax.Array) -> jax.Array:
        """Scores float32 [..., V] of all tokens, of states h [..., H] after paths of shares [..., R]."""
        return head_logits(self.combined(of_path, h), self.table[...])


def below(paths: jax.Array, parent: jax.Array, shares: jax.Array) -> jax.Array:
    """The paths [B, f', J, R] to nodes whose tokens have `shares` [B, f', J, R], below `parent` int32 [B, f'].

    `paths` [B, f, J, R] are the sums of shares on the way to each of f nodes, in queries of the level below them and of
    the J - 1 after that.
    """
    above = jnp.take_along_axis(paths, parent[..., None, None], axis=1)
    return jnp.pad(above[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0))) + shares
