"""Decoding: prefill, rounds of draft - verify - commit, and `generate`, which is all of it as one jitted function.

B rows · P prompt slots · C tokens of a prefill chunk · M nodes · N levels · A = N + 1 tokens a round can accept.
Between rounds, per row, with n committed tokens x[0..n-1] and the pending token x[n]:
the target cache holds positions 0..n-1, the drafter cache stream positions up to the first not yet drafted from, and
`new` the features and tokens since. Caches hold verified tokens only. Plain decoding is the same code with no drafter.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fasteagle_jax.cache import Cache, commit
from fasteagle_jax.errors import UserError
from fasteagle_jax.interfaces import Accepted, Ranking, Tied
from fasteagle_jax.sampling import Sampling, choose
from fasteagle_jax.tree import NO_PARENT, Draft, Tree, visible_nodes, walk

NO_TOKEN = -1


class Statistics(NamedTuple):
    """What a row's rounds did."""

    rounds: jax.Array  # int32 [B], target passes after prefill
    # int32 [B, N], rounds in which the guess of each depth was accepted and kept; where a row ends inside an accepted
    # path, its last token counts as the target's own, so that tokens = 1 + rounds + sum(accepted_at)
    accepted_at: jax.Array


class State(NamedTuple):
    """Everything that changes while decoding."""

    target_cache: Cache
    drafter_cache: Cache | None
    new: Accepted  # newly accepted tokens, the pending one last
    emitted: jax.Array  # int32 [B, slots], NO_TOKEN past `num_emitted`
    num_emitted: jax.Array  # int32 [B]
    done: jax.Array  # bool [B]
    statistics: Statistics


class Stop(NamedTuple):
    """When a row ends: at its limit, or with the first of these tokens (kept)."""

    max_new: jax.Array  # int32 [B]
    tokens: jax.Array  # int32 [number of stop tokens], NO_TOKEN for none


class Generation(NamedTuple):
    """What `generate` returns."""

    tokens: jax.Array  # int32 [B, max_new], NO_TOKEN past `lengths`; a stop token is kept
    lengths: jax.Array  # int32 [B]
    stopped: jax.Array  # bool [B], True where a stop token ended the row, False where its length did
    statistics: Statistics


def slots_needed(prompt_slots: int, chunk: int, max_new: int, num_levels: int) -> int:
    """Cache slots a row needs: its tokens, and slack for a write of a whole chunk or path past its end."""
    return prompt_slots + max(chunk, max_new + num_levels + 1)


# --- prefill ----------------------------------------------------------------------------------------------------


def prefill(
    target: Any,
    drafter: Any | None,
    tied: Tied | None,
    prompts: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    stop: Stop,
    *,
    max_new: int,
    num_levels: int,
    chunk: int,
) -> State:
    """The State after the prompts and the first token chosen from them.

    Args:
      target, drafter, tied: the models; drafter and tied are None for plain decoding.
      prompts: int32 [B, P], right-padded, P a multiple of `chunk`.
      lengths: int32 [B], at least 1.
      sampling, stop: per row.
      max_new: the most tokens any row will emit.
      num_levels: N of the draft tree, 0 for plain decoding.
      chunk: C, prompt tokens a forward pass takes.
    """
    batch, prompt_slots = prompts.shape
    num_slots = slots_needed(prompt_slots, chunk, max_new, num_levels)
    feature_layers = drafter.feature_layers if drafter is not None else ()
    width = target.config.hidden_size
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((chunk, chunk), bool)), (batch, chunk, chunk))
    # Stream position t of the drafter reads the token after it, x[t+1].
    following = jnp.pad(prompts[:, 1:], ((0, 0), (0, 1)))

    def take_chunk(i: jax.Array, carry: Any) -> Any:
        target_cache, drafter_cache, last_hidden, last_features = carry
        start = i * chunk
        tokens = jax.lax.dynamic_slice_in_dim(prompts, start, chunk, axis=1)  # [B, C]
        positions = jnp.broadcast_to(start + jnp.arange(chunk), tokens.shape)
        out = target(tokens, positions, causal, target_cache, feature_layers)
        target_cache = commit(target_cache, out.fresh, jnp.clip(lengths - start, 0, chunk))

        last = lengths - 1 - start  # [B], where the prompt's last token is in this chunk
        here = ((last >= 0) & (last < chunk))[:, None]
        at = jnp.clip(last, 0, chunk - 1)[:, None, None]
        last_hidden = jnp.where(here, jnp.take_along_axis(out.hidden, at, axis=1)[:, 0], last_hidden)
        if drafter is not None:
            last_features = jnp.where(here, jnp.take_along_axis(out.features, at, axis=1)[:, 0], last_features)
            next_tokens = jax.lax.dynamic_slice_in_dim(following, start, chunk, axis=1)
            known = Accepted(out.features, next_tokens, jnp.clip(lengths - 1 - start, 0, chunk))
            drafter_cache = drafter.extend(tied, known, drafter_cache)
        return target_cache, drafter_cache, last_hidden, last_features

    start = (
        target.empty_cache(batch, num_slots),
        None if drafter is None else drafter.empty_cache(batch, num_slots),
        jnp.zeros((batch, width), target.activation_dtype),
        jnp.zeros((batch, len(feature_layers) * width), target.activation_dtype),
    )
    # Without the barrier XLA knows that the caches are zeros and, where the loop has one turn, folds attention over
    # them at compile time, which took minutes.
    start = jax.lax.optimization_barrier(start)
    target_cache, drafter_cache, hidden, features = jax.lax.fori_loop(0, prompt_slots // chunk, take_chunk, start)

    pending = choose(target.logits(hidden[:, None]), lengths[:, None], sampling)  # [B, 1]
    emitted = jnp.full((batch, max_new + num_levels + 1), NO_TOKEN, jnp.int32)
    slack = ((0, 0), (0, num_levels))
    return State(
        target_cache,
        drafter_cache,
        Accepted(
            jnp.pad(features[:, None], (*slack, (0, 0))),
            jnp.pad(pending, slack),
            jnp.ones((batch,), jnp.int32),
        ),
        emitted.at[:, :1].set(pending),
        jnp.ones((batch,), jnp.int32),
        _is_stop(pending[:, 0], stop.tokens) | (stop.max_new <= 1),
        Statistics(jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, num_levels), jnp.int32)),
    )


# --- a round ----------------------------------------------------------------------------------------------------


def decode_round(
    target: Any,
    drafter: Any | None,
    tied: Tied | None,
    state: State,
    sampling: Sampling,
    stop: Stop,
    *,
    tree: Tree,
    shared_noise: bool = True,
) -> State:
    """The State after one draft and one target pass; rows that are done do not change."""
    batch = state.done.shape[0]
    num_levels = state.statistics.accepted_at.shape[1]
    row = jnp.arange(batch)[:, None]

    with jax.named_scope("draft"):
        if drafter is None:
            draft, drafter_cache = _root_only(state.new), None
        else:
            draft, drafter_cache = drafter.draft(
                tied, state.new, state.drafter_cache, tree, Ranking(sampling, shared_noise)
            )

    with jax.named_scope("verify"):
        positions = state.target_cache.length[:, None] + draft.depths  # [B, M]
        feature_layers = () if drafter is None else drafter.feature_layers
        out = target(draft.tokens, positions, visible_nodes(draft), state.target_cache, feature_layers)
        chosen = choose(target.logits(out.hidden), positions + 1, sampling)  # [B, M]
        path = walk(draft, chosen, num_levels)
        picked = chosen[row, path.nodes]  # [B, A], the tokens of this round, valid up to `accepted`

    with jax.named_scope("commit"):
        index = jnp.arange(num_levels + 1)
        stops = _is_stop(picked, stop.tokens) & (index <= path.accepted[:, None])
        until_stop = jnp.where(stops.any(axis=1), jnp.argmax(stops, axis=1), num_levels + 1) + 1
        count = jnp.minimum(path.accepted + 1, jnp.minimum(until_stop, stop.max_new - state.num_emitted))
        count = jnp.where(state.done, 0, count).astype(jnp.int32)
        target_cache = commit(state.target_cache, out.fresh, count, path.nodes)

        slot = state.num_emitted[:, None] + index
        kept = jnp.where(index < count[:, None], picked, NO_TOKEN)
        emitted = state.emitted.at[row, slot].set(kept)
        num_emitted = state.num_emitted + count
        done = state.done | (until_stop <= count) | (num_emitted >= stop.max_new)

        new = Accepted(state.new.features, picked, count)
        if drafter is not None:
            new = new._replace(features=out.features[row, path.nodes])
        statistics = Statistics(
            state.statistics.rounds + ~state.done,
            state.statistics.accepted_at + (index[1:] < count[:, None]),
        )
    return State(target_cache, drafter_cache, new, emitted, num_emitted, done, statistics)


def _root_only(new: Accepted) -> Draft:
    """The draft of plain decoding: the pending token alone."""
    last = jnp.maximum(new.count - 1, 0)[:, None]
    root = jnp.take_along_axis(new.tokens, last, axis=1)
    return Draft(root, jnp.full_like(root, NO_PARENT), jnp.zeros_like(root))


def _is_stop(tokens: jax.Array, stop_tokens: jax.Array) -> jax.Array:
    return (tokens[..., None] == stop_tokens).any(axis=-1)


# --- whole programs ---------------------------------------------------------------------------------------------


def decode_rounds(
    target: Any,
    drafter: Any | None,
    tied: Tied | None,
    state: State,
    sampling: Sampling,
    stop: Stop,
    rounds: jax.Array | None = None,
    *,
    tree: Tree,
    shared_noise: bool = True,
) -> State:
    """The State after rounds until every row is done, or `rounds` (int32) more of them."""

    def unfinished(carry: tuple[State, jax.Array]) -> jax.Array:
        state, ran = carry
        more = ~state.done.all()
        return more if rounds is None else more & (ran < rounds)

    def one(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, ran = carry
        state = decode_round(target, drafter, tied, state, sampling, stop, tree=tree, shared_noise=shared_noise)
        return state, ran + 1

    return jax.lax.while_loop(unfinished, one, (state, jnp.zeros((), jnp.int32)))[0]


_STATIC = ("max_new", "tree", "chunk", "shared_noise")


@functools.partial(jax.jit, static_argnames=_STATIC)
def generate_jit(
    target: Any,
    drafter: Any | None,
    prompts: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    stop: Stop,
    *,
    max_new: int,
    tree: Tree,
    chunk: int,
    shared_noise: bool = True,
) -> Generation:
    """Prefill and all rounds in one compiled program; arguments as of `prefill` and `decode_round`."""
    state, tied = start(target, drafter, prompts, lengths, sampling, stop, max_new=max_new, tree=tree, chunk=chunk)
    state = decode_rounds(target, drafter, tied, state, sampling, stop, tree=tree, shared_noise=shared_noise)
    tokens = state.emitted[:, :max_new]
    last = jnp.take_along_axis(tokens, state.num_emitted[:, None] - 1, axis=1)[:, 0]
    return Generation(tokens, state.num_emitted, _is_stop(last, stop.tokens), state.statistics)


@functools.partial(jax.jit, static_argnames=("max_new", "tree", "chunk"))
def start(
    target: Any,
    drafter: Any | None,
    prompts: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    stop: Stop,
    *,
    max_new: int,
    tree: Tree,
    chunk: int,
) -> tuple[State, Tied | None]:
    """The first State and the drafter's rows of the target, for a caller that looks on between rounds (`advance`)."""
    tied = None if drafter is None else drafter.tie(target)
    num_levels = 0 if drafter is None else tree.num_levels(drafter.num_levels)
    state = prefill(
        target,
        drafter,
        tied,
        prompts,
        lengths,
        sampling,
        stop,
        max_new=max_new,
        num_levels=num_levels,
        chunk=chunk,
    )
    return state, tied


@functools.partial(jax.jit, static_argnames=("tree", "shared_noise"), donate_argnames=("state",))
def advance(
    target: Any,
    drafter: Any | None,
    tied: Tied | None,
    state: State,
    sampling: Sampling,
    stop: Stop,
    rounds: jax.Array,
    *,
    tree: Tree,
    shared_noise: bool = True,
) -> State:
    """The State after up to `rounds` more rounds; the one given is consumed."""
    return decode_rounds(target, drafter, tied, state, sampling, stop, rounds, tree=tree, shared_noise=shared_noise)


# --- the host's side --------------------------------------------------------------------------------------------


def pad_prompts(prompts: list[list[int]], chunk: int) -> tuple[jax.Array, jax.Array]:
    """Prompts right-padded to int32 [B, P], P the next multiple of `chunk`, and their lengths int32 [B]."""
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {i} is empty: give at least one token")
    longest = max(len(prompt) for prompt in prompts)
    slots = -(-longest // chunk) * chunk
    padded = np.zeros((len(prompts), slots), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(padded), jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)


def make_stop(batch: int, max_new: int | list[int], stop_tokens: tuple[int, ...] = ()) -> Stop:
    """A Stop from one limit for all rows or one a row."""
    limits = list(max_new) if isinstance(max_new, (list, tuple)) else [max_new] * batch
    if len(limits) != batch or min(limits) < 1:
        raise UserError(f"max_new is {max_new}: give a whole number of at least 1, for all rows or one a row")
    return Stop(jnp.asarray(limits, jnp.int32), jnp.asarray(stop_tokens or (NO_TOKEN - 1,), jnp.int32))


def generate(
    target: Any,
    drafter: Any | None,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    max_new: int | list[int] = 128,
    stop_tokens: tuple[int, ...] = (),
    tree: Tree | None = None,
    chunk: int = 64,
    shared_noise: bool = True,
) -> Generation:
    """New tokens for a batch of prompts: exactly those of plain decoding, whatever the drafter and the tree.

    Args:
      target: e.g. targets.llama.Llama.
      drafter: None decodes plainly.
      prompts: token ids, any lengths of at least 1.
      sampling: per row, from `sampling.make_sampling`.
      max_new: the most new tokens, for all rows or one a row.
      stop_tokens: a row ends with the first of these, which is kept.
      tree: what to draft; None for the default.
      chunk: prompt tokens a forward pass of the prefill takes.
      shared_noise: let the drafter rank its guesses with the target's own noise at temperature > 0.

    Returns:
      A Generation. Compiled once for each shape of the arguments.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, a prompt that does not fit the target's positions.
    """
    limits = max_new if isinstance(max_new, (list, tuple)) else [max_new]
    config = target.config
    if not prompts or chunk < 1:
        raise UserError(f"{len(prompts)} prompts in chunks of {chunk}: give at least one prompt, and 1")
    stop = make_stop(len(prompts), max_new, stop_tokens)
    for i, prompt in enumerate(prompts):
        limit = limits[i] if len(limits) > 1 else limits[0]
        if len(prompt) + limit > config.max_positions:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, which with {limit} new ones exceed the target's "
                f"{config.max_positions} positions: shorten it or lower max_new"
            )
        bad = [t for t in prompt if not 0 <= t < config.vocab_size]
        if bad:
            raise UserError(f"prompt {i} holds token {bad[0]}, outside the vocabulary of {config.vocab_size}")
    tokens, lengths = pad_prompts(prompts, chunk)
    return generate_jit(
        target,
        drafter,
        tokens,
        lengths,
        sampling,
        stop,
        max_new=max(limits),
        tree=tree or Tree(),
        chunk=chunk,
        shared_noise=shared_noise,
    )
