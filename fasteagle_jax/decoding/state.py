"""The records of decoding: State between rounds, Stop conditions, the Generation returned.

B rows · N levels · T tokens · M nodes · V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fasteagle_jax.decoding.interfaces import Accepted
from fasteagle_jax.devices.sharding import top_log_softmax
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.attention import Past
from fasteagle_jax.nn.kv_cache import AXES as CACHE_AXES
from fasteagle_jax.nn.kv_cache import Cache, MixedCache

NO_TOKEN = -1
MAX_LOGPROBS = 20  # alternatives of a token, OpenAI's most
NO_STOP = -2  # padding of a row's stop tokens: no token has this id
# The logical axes of a State's arrays by name (see sharding.RULES).
AXES = CACHE_AXES | {
    "embedding": ("vocab", "embed"),
    "head": ("vocab", "embed"),
    "features": ("rows", None, None),
    "tokens": ("rows", None),
    "count": ("rows",),
    "text": ("rows", None),
    "depths": ("rows", None),
    "logprobs": ("rows", None),
    "wants_logprobs": ("rows",),
    "top_tokens": ("rows", None, None),
    "top_logprobs": ("rows", None, None),
    "wants_top": ("rows",),
    "num_emitted": ("rows",),
    "done": ("rows",),
}


class Statistics(NamedTuple):
    """Counts of each row's rounds."""

    rounds: jax.Array  # int32 [B], target passes after prefill
    # int32 [B, N], rounds in which the guess of each depth was accepted and kept; if a row ends within a path, its last
    # token counts as the target's own, so that tokens = 1 + rounds + sum(accepted_at).
    accepted_at: jax.Array


class TopLogprobs(NamedTuple):
    """The K most probable tokens at each place of an answer, in rows that want them."""

    top_tokens: jax.Array  # int32 [B, slots, K], best first
    top_logprobs: jax.Array  # float32 [B, slots, K]
    wants_top: jax.Array  # bool [B]


class State(NamedTuple):
    """Everything that changes while decoding."""

    target_cache: Cache | MixedCache
    drafter_cache: Any | None
    new: Accepted  # newly accepted tokens, the pending one last
    text: jax.Array  # int32 [B, slots], prompt and answer by position, the pending token last; then NO_TOKEN
    depths: jax.Array  # int32 [B, slots], at which the answer's tokens were accepted, 0 for the target's own
    logprobs: jax.Array | None  # float32 [B, slots] of the answer, in rows that want them; None: never computed
    wants_logprobs: jax.Array  # bool [B]
    num_emitted: jax.Array  # int32 [B]
    done: jax.Array  # bool [B]
    top: TopLogprobs | None = None  # None: never computed

    @property
    def emitted(self) -> jax.Array:
        """The answers so far, int32 [B, slots], NO_TOKEN past `num_emitted`."""
        first = self.target_cache.length + 1 - self.num_emitted  # the pending token is at `length`
        index = first[:, None] + jnp.arange(self.text.shape[1])
        return jnp.take_along_axis(self.text, index, axis=1, mode="fill", fill_value=NO_TOKEN)

    @property
    def statistics(self) -> Statistics:
        """The Statistics so far: each round ends with one token of the target's own, as does prefill."""
        num_levels = self.new.tokens.shape[1] - 1
        accepted_at = (self.depths[..., None] == jnp.arange(1, num_levels + 1)).sum(axis=1)
        own = (self.depths == 0).sum(axis=1)
        return Statistics(jnp.maximum(own - 1, 0), accepted_at)


class Stop(NamedTuple):
    """When a row ends: at its limit, or with the first of its tokens (kept)."""

    max_new: jax.Array  # int32 [B]
    tokens: jax.Array  # int32 [B, number of stop tokens], NO_STOP for none


class Generation(NamedTuple):
    """What `generate` returns."""

    tokens: jax.Array  # int32 [B, max_new], NO_TOKEN past `lengths`; a stop token is kept
    lengths: jax.Array  # int32 [B]
    stopped: jax.Array  # bool [B], True where a stop token ended the row, False where its length did
    statistics: Statistics


def slots_needed(prompt_slots: int, chunk: int, max_new: int, num_levels: int) -> int:
    """Cache slots of a row: its tokens, and slack for writing a whole chunk or path past its end."""
    return prompt_slots + max(chunk, max_new + num_levels + 1)


def context_of(target_cache: Cache | MixedCache, drafter: Any) -> tuple[Past, ...]:
    """What a drafter sees of the target's cache: a Past for each of its `context_layers`."""
    return tuple(target_cache.layer(layer) for layer in drafter.context_layers)


def is_stop(tokens: jax.Array, stop: Stop) -> jax.Array:
    """bool [B, T], True where a token of int32 [B, T] is one of its row's stop tokens."""
    return (tokens[..., None] == stop.tokens[:, None]).any(axis=-1)


def token_logprobs(
    logits: jax.Array, tokens: jax.Array, wants_logprobs: jax.Array, nodes: jax.Array | None = None
) -> jax.Array:
    """Log-probabilities float32 [B, T] of tokens int32 [B, T] under the target's own softmax; 0 if no row wants them.

    `logits` are those before each token, [B, T, V], or with `nodes` int32 [B, T] those of all nodes, [B, M, V].
    """

    def compute() -> jax.Array:
        before = logits if nodes is None else jnp.take_along_axis(logits, nodes[..., None], axis=1)
        own = jnp.take_along_axis(before, tokens[..., None], axis=-1)[..., 0]
        return own - jax.nn.logsumexp(before, axis=-1)

    return jax.lax.cond(wants_logprobs.any(), compute, lambda: jnp.zeros(tokens.shape))


def no_top(batch: int, num_slots: int, vocab_size: int) -> TopLogprobs:
    """TopLogprobs of rows that do not want them."""
    shape = (batch, num_slots, min(MAX_LOGPROBS, vocab_size))
    return TopLogprobs(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros((batch,), bool))


def best_logprobs(
    logits: jax.Array, wants_top: jax.Array, nodes: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The K most probable tokens int32 [B, T, K] and their log-probabilities float32; zeros if no row wants them.

    Arguments as of `token_logprobs`; the logits are those before the rules, as its are.
    """
    batch, num, vocab = logits.shape
    shape = (batch, num if nodes is None else nodes.shape[1], min(MAX_LOGPROBS, vocab))

    def compute() -> tuple[jax.Array, jax.Array]:
        before = logits if nodes is None else jnp.take_along_axis(logits, nodes[..., None], axis=1)
        # See tree._top_tokens for the barrier.
        values, index = jax.lax.optimization_barrier(top_log_softmax(before, shape[-1], "vocab"))
        return index.astype(jnp.int32), values

    return jax.lax.cond(wants_top.any(), compute, lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape)))


def make_stop(batch: int, max_new: int | list[int], stop_tokens: tuple[int, ...] = ()) -> Stop:
    """A Stop from one limit for all rows or one a row."""
    limits = list(max_new) if isinstance(max_new, (list, tuple)) else [max_new] * batch
    if len(limits) != batch or min(limits) < 1:
        raise UserError(f"max_new is {max_new}: give a whole number of at least 1, for all rows or one a row")
    tokens = jnp.asarray([stop_tokens or (NO_STOP,)] * batch, jnp.int32)
    return Stop(jnp.asarray(limits, jnp.int32), tokens)
