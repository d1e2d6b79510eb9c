"""Prefill: prompts into the caches, chunk by chunk, and the first token.

B rows · P prompt slots · C tokens of a chunk · H hidden width · F feature layers · N levels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fasteagle_jax.decoding.interfaces import Accepted, VocabWeights
from fasteagle_jax.decoding.rules import Rules, apply_rules
from fasteagle_jax.decoding.sampling import Sampling, choose
from fasteagle_jax.decoding.state import (
    AXES,
    MAX_LOGPROBS,
    NO_TOKEN,
    State,
    Stop,
    best_logprobs,
    context_of,
    is_stop,
    no_top,
    token_logprobs,
)
from fasteagle_jax.decoding.tree import NO_PARENT, Draft
from fasteagle_jax.devices.sharding import constrain_all
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.kv_cache import Cache, MixedCache, commit

LOGITS_AT_ONCE = 16  # positions whose logits are there together when prompts are scored


class Prefilled(NamedTuple):
    """Prompts, or prefixes of them that end with a chunk, in the caches."""

    target_cache: Cache | MixedCache
    drafter_cache: Any | None
    hidden: jax.Array  # [B, H], the target's final hidden state at the last token
    features: jax.Array  # [B, F*H], the target's features at the last token


def init_prefill(
    target: Any,
    drafter: Any | None,
    batch: int,
    num_slots: int,
    most_written: int,
    drafter_slots: int | None = None,
) -> Prefilled:
    """Empty caches, from which prefill starts.

    `num_slots` is the target's, `drafter_slots` the drafter's and of whose rows windows keep the end (None: equally
    many), and `most_written` the most tokens that are written to a row at a time.
    """
    width, dtype = target.config.hidden_size, target.activation_dtype
    num_features = 0 if drafter is None else len(drafter.feature_layers)
    return Prefilled(
        target.empty_cache(batch, num_slots, most_written, drafter_slots),
        None if drafter is None else drafter.empty_cache(batch, drafter_slots or num_slots, most_written),
        jnp.zeros((batch, width), dtype),
        jnp.zeros((batch, num_features * width), dtype),
    )


def prefill(
    target: Any,
    drafter: Any | None,
    vocab: VocabWeights | None,
    prefix: Prefilled,
    prompts: jax.Array,
    lengths: jax.Array,
    start_chunk: jax.Array | int = 0,
    end_chunk: jax.Array | None = None,
    *,
    chunk: int,
    num_levels: int | None = None,
) -> Prefilled:
    """The prompts in the caches, one chunk a forward pass.

    Args:
      target, drafter, vocab: the models; drafter and vocab are None for plain decoding.
      prefix: the prompts' first `start_chunk` chunks, in caches that have slots for all.
      prompts: int32 [B, P], right-padded, P a multiple of `chunk`.
      lengths: int32 [B], at least 1, and longer than the prefix.
      start_chunk: the chunk to resume with.
      end_chunk: int32 [], the chunk to stop before; None for none, so that the prompts' ends are reached.
      chunk: C, tokens a forward pass takes. Chunks do not depend on where prefill resumes, so results do not either.
      num_levels: of later drafts, None for all of the drafter's. 0 leaves the prompts out of its cache, which is
        cheaper if nothing will be drafted.
    """
    batch = prompts.shape[0]
    feature_layers = drafter.feature_layers if drafter is not None else ()
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((chunk, chunk), bool)), (batch, chunk, chunk))

    def take_chunk(i: jax.Array, carry: Prefilled) -> Prefilled:
        start = i * chunk
        tokens = jax.lax.dynamic_slice_in_dim(prompts, start, chunk, axis=1)  # [B, C]
        positions = jnp.broadcast_to(start + jnp.arange(chunk), tokens.shape)
        out = target(tokens, positions, causal, carry.target_cache, feature_layers)
        count = jnp.clip(lengths - start, 0, chunk)  # int32 [B], tokens of each row in this chunk
        target_cache = commit(carry.target_cache, out.fresh, count)

        last = jnp.maximum(count - 1, 0)[:, None, None]
        in_chunk = (count > 0)[:, None]
        hidden = jnp.where(in_chunk, jnp.take_along_axis(out.hidden, last, axis=1)[:, 0], carry.hidden)
        if drafter is None:
            return Prefilled(target_cache, None, hidden, carry.features)
        features = jnp.where(in_chunk, jnp.take_along_axis(out.features, last, axis=1)[:, 0], carry.features)
        # Stream position t of the drafter reads the features of t and the token x[t+1]. So from the second chunk on its
        # features start with the previous chunk's last one, and only the chunk's own tokens are read.
        shifted = jnp.concatenate([carry.features[:, None], out.features[:, :-1]], axis=1)
        new = Accepted(
            jnp.where(i == 0, out.features, shifted),
            jnp.where(i == 0, jnp.roll(tokens, -1, axis=1), tokens),
            jnp.where(i == 0, jnp.maximum(count - 1, 0), count),
        )
        drafter_cache = carry.drafter_cache
        if num_levels == 0:
            drafter_cache = drafter.skip(new, drafter_cache)
        else:
            levels, context = num_levels or drafter.num_levels, context_of(target_cache, drafter)
            drafter_cache = drafter.extend(vocab, new, drafter_cache, levels, context)
        return constrain_all(Prefilled(target_cache, drafter_cache, hidden, features), AXES)

    # Without the barrier XLA sees caches of zeros and, if the loop has one iteration, folds attention over them at
    # compile time, which is very slow.
    prefix = jax.lax.optimization_barrier(prefix)
    num_chunks = (lengths.max() + chunk - 1) // chunk
    if end_chunk is not None:
        num_chunks = jnp.minimum(num_chunks, end_chunk)
    return jax.lax.fori_loop(start_chunk, num_chunks, take_chunk, prefix)


class Scores(NamedTuple):
    """Log-probabilities of a prompt's tokens. Entry t is of the token after position t."""

    logprobs: jax.Array  # float32 [B, P]
    top_tokens: jax.Array  # int32 [B, P, K], the most probable ones in its place, best first
    top_logprobs: jax.Array  # float32 [B, P, K]


def score_prompts(target: Any, prompts: jax.Array, lengths: jax.Array, *, chunk: int) -> Scores:
    """The Scores of prompts int32 [B, P], whose `lengths` int32 [B] count, one chunk a forward pass."""
    batch, num_slots = prompts.shape
    at_once = math.gcd(chunk, LOGITS_AT_ONCE)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((chunk, chunk), bool)), (batch, chunk, chunk))
    following = jnp.roll(prompts, -1, axis=1)
    everybody = jnp.ones((batch,), bool)

    def score(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        hidden, tokens = part
        logits = target.logits(hidden)  # [B, G, V]
        return token_logprobs(logits, tokens, everybody), *best_logprobs(logits, everybody)

    def take_chunk(i: jax.Array, carry: tuple[Any, Scores]) -> tuple[Any, Scores]:
        cache, scores = carry
        start = i * chunk
        tokens, after = (jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in (prompts, following))
        positions = jnp.broadcast_to(start + jnp.arange(chunk), tokens.shape)
        out = target(tokens, positions, causal, cache, ())
        cache = commit(cache, out.fresh, jnp.clip(lengths - start, 0, chunk))
        # All of a chunk's logits at once would be the largest array of the program.
        parts = [x.reshape(batch, chunk // at_once, at_once, *x.shape[2:]).swapaxes(0, 1) for x in (out.hidden, after)]
        new = [x.swapaxes(0, 1).reshape(batch, chunk, *x.shape[3:]) for x in jax.lax.map(score, tuple(parts))]
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return cache, Scores(*(update(x, part) for x, part in zip(scores, new, strict=True)))

    shape = (batch, num_slots, min(MAX_LOGPROBS, target.config.vocab_size))
    scores = Scores(jnp.zeros(shape[:2]), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    carry = jax.lax.optimization_barrier((target.empty_cache(batch, num_slots, chunk), scores))  # see `prefill`
    return jax.lax.fori_loop(0, (lengths.max() + chunk - 1) // chunk, take_chunk, carry)[1]


def first_state(
    target: Any,
    prefilled: Prefilled,
    prompts: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    stop: Stop,
    rules: Rules | None = None,
    *,
    num_slots: int,
    num_levels: int,
    wants_logprobs: jax.Array | None = None,
    wants_top: jax.Array | None = None,
) -> State:
    """The State after prefill, with the first token chosen.

    Args:
      target, prefilled: the model, and its caches with all prompts in them.
      prompts, lengths: int32 [B, P] and [B], as of `prefill`.
      sampling, stop, rules: of each row.
      num_slots: of `text`; a round writes up to N past a row's last token.
      num_levels: N of the drafter, 0 for plain decoding.
      wants_logprobs: bool [B], rows whose log-probabilities are wanted; None if they are never computed.
      wants_top: bool [B], rows whose most probable tokens are wanted; None if they are never computed.
    """
    batch = lengths.shape[0]
    logits = target.logits(prefilled.hidden[:, None])  # [B, 1, V]
    ruled = logits
    if rules is not None:
        last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)  # [B, 1]
        node = Draft(last, jnp.full_like(last, NO_PARENT), jnp.zeros_like(last), jnp.zeros(last.shape))
        ruled = apply_rules(rules, stop.tokens, logits, node, prompts, lengths - 1, jnp.zeros_like(lengths))
    pending = choose(ruled, lengths[:, None], sampling)  # [B, 1]
    slack = ((0, 0), (0, num_levels))
    row, at = jnp.arange(batch), lengths  # the pending token follows the prompt
    text = jnp.pad(prompts, ((0, 0), (0, num_slots - prompts.shape[1])))
    text = jnp.where(jnp.arange(num_slots) < lengths[:, None], text, NO_TOKEN)
    logprobs = None
    if wants_logprobs is not None:
        logprobs = token_logprobs(logits, pending, wants_logprobs)[:, 0]
        logprobs = jnp.zeros((batch, num_slots)).at[row, at].set(logprobs)
    top = None
    if wants_top is not None:
        tokens, values = (best[:, 0] for best in best_logprobs(logits, wants_top))
        top = no_top(batch, num_slots, logits.shape[-1])
        top = top._replace(
            top_tokens=top.top_tokens.at[row, at].set(tokens),
            top_logprobs=top.top_logprobs.at[row, at].set(values),
            wants_top=wants_top,
        )
    return State(
        prefilled.target_cache,
        prefilled.drafter_cache,
        Accepted(
            jnp.pad(prefilled.features[:, None], (*slack, (0, 0))),
            jnp.pad(pending, slack),
            jnp.ones((batch,), jnp.int32),
        ),
        text.at[row, at].set(pending[:, 0]),
        jnp.full_like(text, NO_TOKEN).at[row, at].set(0),
        logprobs,
        jnp.zeros((batch,), bool) if wants_logprobs is None else wants_logprobs,
        jnp.ones((batch,), jnp.int32),
        is_stop(pending, stop)[:, 0] | (stop.max_new <= 1),
        top,
    )


def pad_prompts(prompts: Sequence[Sequence[int]], chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts right-padded to int32 [B, P], P the next multiple of `chunk`, and their lengths int32 [B].

    Arrays of the host, which compile nothing.
    """
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {i} is empty: give at least one token")
    longest = max(len(prompt) for prompt in prompts)
    slots = -(-longest // chunk) * chunk
    padded = np.zeros((len(prompts), slots), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, np.asarray([len(prompt) for prompt in prompts], np.int32)
