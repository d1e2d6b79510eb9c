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

from fasteagle_jax.decoding.interfaces import Accepted, Ranking, Tied
from fasteagle_jax.decoding.sampling import Sampling, choose
from fasteagle_jax.decoding.tree import NO_PARENT, Draft, Tree, visible_nodes, walk
from fasteagle_jax.decoding.tree_selection import default_tree
from fasteagle_jax.devices.sharding import by_shard, constrain_all
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn import kv_cache as cache
from fasteagle_jax.nn.kv_cache import Cache, commit

NO_TOKEN = -1
NO_STOP = -2  # fills a row's stop tokens up: no token has this id
# The logical axes of what decoding keeps (see sharding.RULES).
AXES = cache.AXES | {
    "features": ("rows", None, None),
    "tokens": ("rows", None),
    "count": ("rows",),
    "emitted": ("rows", None),
    "depths": ("rows", None),
    "logprobs": ("rows", None),
    "scored": ("rows",),
    "num_emitted": ("rows",),
    "done": ("rows",),
}


class Statistics(NamedTuple):
    """What a row's rounds did."""

    rounds: jax.Array  # int32 [B], target passes after prefill
    # int32 [B, N], rounds in which the guess of each depth was accepted and kept; where a row ends inside an accepted
    # path, its last token counts as the target's own, so that tokens = 1 + rounds + sum(accepted_at)
    accepted_at: jax.Array


class State(NamedTuple):
    """Everything that changes while decoding."""

    target_cache: Cache
    drafter_cache: Any | None
    new: Accepted  # newly accepted tokens, the pending one last
    emitted: jax.Array  # int32 [B, slots], NO_TOKEN past `num_emitted`
    depths: jax.Array  # int32 [B, slots], the depth at which each was accepted, 0 for the target's own token
    logprobs: jax.Array | None  # float32 [B, slots] of the emitted tokens, where `scored`; None: never computed
    scored: jax.Array  # bool [B]
    num_emitted: jax.Array  # int32 [B]
    done: jax.Array  # bool [B]

    @property
    def statistics(self) -> Statistics:
        """What the rounds did: each ends with one token of the target's own, as does prefill."""
        num_levels = self.new.tokens.shape[1] - 1
        real = jnp.arange(self.depths.shape[1]) < self.num_emitted[:, None]
        at = jnp.arange(1, num_levels + 1)
        accepted_at = ((self.depths[..., None] == at) & real[..., None]).sum(axis=1)
        own = ((self.depths == 0) & real).sum(axis=1)
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
    """Cache slots a row needs: its tokens, and slack for a write of a whole chunk or path past its end."""
    return prompt_slots + max(chunk, max_new + num_levels + 1)


# --- prefill ----------------------------------------------------------------------------------------------------


class Prefilled(NamedTuple):
    """Prompts, or their beginnings of a whole number of chunks, in the caches."""

    target_cache: Cache
    drafter_cache: Any | None
    hidden: jax.Array  # [B, H], the target's final hidden state of the last token
    features: jax.Array  # [B, F*H], the target's features of the last token


def nothing_prefilled(
    target: Any,
    drafter: Any | None,
    batch: int,
    num_slots: int,
    most_written: int,
    drafter_slots: int | None = None,
) -> Prefilled:
    """Where prefill begins: empty caches.

    `num_slots` is for the target, `drafter_slots` for the drafter (None: the same), `most_written` how many tokens a
    row is written at a time.
    """
    width, dtype = target.config.hidden_size, target.activation_dtype
    num_features = 0 if drafter is None else len(drafter.feature_layers)
    return Prefilled(
        target.empty_cache(batch, num_slots),
        None if drafter is None else drafter.empty_cache(batch, drafter_slots or num_slots, most_written),
        jnp.zeros((batch, width), dtype),
        jnp.zeros((batch, num_features * width), dtype),
    )


def prefill(
    target: Any,
    drafter: Any | None,
    tied: Tied | None,
    begun: Prefilled,
    prompts: jax.Array,
    lengths: jax.Array,
    first: jax.Array | int = 0,
    *,
    chunk: int,
    num_levels: int | None = None,
) -> Prefilled:
    """The prompts in the caches, a chunk a forward pass.

    Args:
      target, drafter, tied: the models; drafter and tied are None for plain decoding.
      begun: the prompts' first `first` chunks, in caches that have slots for all.
      prompts: int32 [B, P], right-padded, P a multiple of `chunk`.
      lengths: int32 [B], at least 1, and more than the chunks begun.
      first: the chunk to go on with.
      chunk: C, tokens a forward pass takes. A prompt's chunks are the same wherever it goes on, so its numbers are.
      num_levels: of the drafts to come, None for all of the drafter's. 0 leaves the prompts out of its cache: cheaper,
        where nothing will be drafted.
    """
    batch = prompts.shape[0]
    feature_layers = drafter.feature_layers if drafter is not None else ()
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((chunk, chunk), bool)), (batch, chunk, chunk))

    def take_chunk(i: jax.Array, carry: Prefilled) -> Prefilled:
        start = i * chunk
        tokens = jax.lax.dynamic_slice_in_dim(prompts, start, chunk, axis=1)  # [B, C]
        positions = jnp.broadcast_to(start + jnp.arange(chunk), tokens.shape)
        out = target(tokens, positions, causal, carry.target_cache, feature_layers)
        here = jnp.clip(lengths - start, 0, chunk)  # tokens of each row in this chunk
        target_cache = commit(carry.target_cache, out.fresh, here)

        at_last = jnp.maximum(here - 1, 0)[:, None, None]
        any_here = (here > 0)[:, None]
        hidden = jnp.where(any_here, jnp.take_along_axis(out.hidden, at_last, axis=1)[:, 0], carry.hidden)
        if drafter is None:
            return Prefilled(target_cache, None, hidden, carry.features)
        features = jnp.where(any_here, jnp.take_along_axis(out.features, at_last, axis=1)[:, 0], carry.features)
        # Stream position t of the drafter reads the token after it, x[t+1], and the features of t: from the second
        # chunk on, those begin with the last of the chunk before, and nothing but the chunk's own tokens is read.
        shifted = jnp.concatenate([carry.features[:, None], out.features[:, :-1]], axis=1)
        known = Accepted(
            jnp.where(i == 0, out.features, shifted),
            jnp.where(i == 0, jnp.roll(tokens, -1, axis=1), tokens),
            jnp.where(i == 0, jnp.maximum(here - 1, 0), here),
        )
        drafter_cache = carry.drafter_cache
        if num_levels == 0:
            drafter_cache = drafter.skip(known, drafter_cache)
        else:
            drafter_cache = drafter.extend(tied, known, drafter_cache, num_levels or drafter.num_levels)
        return constrain_all(Prefilled(target_cache, drafter_cache, hidden, features), AXES)

    # Without the barrier XLA knows that the caches are zeros and, where the loop has one turn, folds attention over
    # them at compile time, which took minutes.
    begun = jax.lax.optimization_barrier(begun)
    num_chunks = (lengths.max() + chunk - 1) // chunk
    return jax.lax.fori_loop(first, num_chunks, take_chunk, begun)


def first_state(
    target: Any,
    prefilled: Prefilled,
    lengths: jax.Array,
    sampling: Sampling,
    stop: Stop,
    *,
    num_slots: int,
    num_levels: int,
    scored: jax.Array | None = None,
) -> State:
    """The State after prefill, with the first token chosen.

    Args:
      target, prefilled, lengths, sampling, stop: per row.
      num_slots: of `emitted`; a round writes up to N past a row's last token.
      num_levels: N of the drafter, 0 for plain decoding.
      scored: bool [B], rows whose log-probabilities are wanted; None where they are never computed.
    """
    batch = lengths.shape[0]
    logits = target.logits(prefilled.hidden[:, None])  # [B, 1, V]
    pending = choose(logits, lengths[:, None], sampling)  # [B, 1]
    slack = ((0, 0), (0, num_levels))
    nothing = jnp.full((batch, num_slots), NO_TOKEN, jnp.int32)
    logprobs = None
    if scored is not None:
        logprobs = jnp.zeros((batch, num_slots)).at[:, :1].set(_logprobs(logits, pending, scored))
    return State(
        prefilled.target_cache,
        prefilled.drafter_cache,
        Accepted(
            jnp.pad(prefilled.features[:, None], (*slack, (0, 0))),
            jnp.pad(pending, slack),
            jnp.ones((batch,), jnp.int32),
        ),
        nothing.at[:, :1].set(pending),
        nothing.at[:, :1].set(0),
        logprobs,
        jnp.zeros((batch,), bool) if scored is None else scored,
        jnp.ones((batch,), jnp.int32),
        _is_stop(pending, stop)[:, 0] | (stop.max_new <= 1),
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
    tree: Tree | None,
    shared_noise: bool = True,
) -> State:
    """The State after one draft and one target pass; rows that are done do not change.

    Without a tree the round is plain: one token, and the drafter, if there is one, skips it.
    """
    num_accepted = state.new.tokens.shape[1]  # A of the state: a tree may bring fewer
    drafts = drafter is not None and tree is not None
    num_levels = tree.num_levels(drafter.num_levels) if drafts else 0  # type: ignore[union-attr]

    with jax.named_scope("draft"):
        if drafts:
            ranking = Ranking(sampling, shared_noise)
            draft, drafter_cache = drafter.draft(tied, state.new, state.drafter_cache, tree, ranking)  # type: ignore[union-attr]
        else:
            draft = root_only(state.new)
            drafter_cache = None if drafter is None else drafter.skip(state.new, state.drafter_cache)

    with jax.named_scope("verify"):
        positions = state.target_cache.length[:, None] + draft.depths  # [B, M]
        feature_layers = () if drafter is None else drafter.feature_layers
        out = target(draft.tokens, positions, visible_nodes(draft), state.target_cache, feature_layers)
        logits = target.logits(out.hidden)
        chosen = choose(logits, positions + 1, sampling)  # [B, M]
        path = walk(draft, chosen, num_levels)
        picked = jnp.take_along_axis(chosen, path.nodes, axis=1)  # [B, N+1], this round's tokens, up to `accepted`

    with jax.named_scope("commit"):
        index = jnp.arange(num_levels + 1)
        stops = _is_stop(picked, stop) & (index <= path.accepted[:, None])
        until_stop = jnp.where(stops.any(axis=1), jnp.argmax(stops, axis=1), num_levels + 1) + 1
        count = jnp.minimum(path.accepted + 1, jnp.minimum(until_stop, stop.max_new - state.num_emitted))
        count = jnp.where(state.done, 0, count).astype(jnp.int32)
        target_cache = commit(state.target_cache, out.fresh, count, path.nodes)

        slot = state.num_emitted[:, None] + index
        real = index < count[:, None]
        depths = jnp.where(index == count[:, None] - 1, 0, index + 1)
        told: tuple[Any, ...] = jnp.where(real, picked, NO_TOKEN), jnp.where(real, depths, NO_TOKEN), None
        if state.logprobs is not None:
            told = *told[:2], _logprobs(_at(logits, path.nodes), picked, state.scored)
        emitted, depths, logprobs = _write((state.emitted, state.depths, state.logprobs), told, slot)
        num_emitted = state.num_emitted + count
        done = state.done | (until_stop <= count) | (num_emitted >= stop.max_new)

        unused = ((0, 0), (0, num_accepted - num_levels - 1))
        features = state.new.features
        if drafter is not None:
            features = jnp.pad(_at(out.features, path.nodes), (*unused, (0, 0)))
        new = Accepted(features, jnp.pad(picked, unused), count)
    return State(
        target_cache,
        drafter_cache,
        new,
        emitted,
        depths,
        logprobs,
        state.scored,
        num_emitted,
        done,
    )


def _at(x: jax.Array, nodes: jax.Array) -> jax.Array:
    """x [B, M, X] at nodes int32 [B, A]: [B, A, X]."""
    return jnp.take_along_axis(x, nodes[..., None], axis=1)


def _write(into: Any, told: Any, slots: jax.Array) -> Any:
    """Arrays [B, slots] with those told [B, A] at slots int32 [B, A]."""

    def write(into: Any, told: Any, slots: jax.Array) -> Any:
        row = jnp.arange(slots.shape[0])[:, None]
        return jax.tree.map(lambda x, new: x.at[row, slots].set(new), into, told)

    return by_shard(write, {2: ("rows", None)}, into, told, slots)


def root_only(new: Accepted) -> Draft:
    """The draft of plain decoding: the pending token alone."""
    last = jnp.maximum(new.count - 1, 0)[:, None]
    root = jnp.take_along_axis(new.tokens, last, axis=1)
    return Draft(root, jnp.full_like(root, NO_PARENT), jnp.zeros_like(root))


def _is_stop(tokens: jax.Array, stop: Stop) -> jax.Array:
    """bool [B, T] for tokens int32 [B, T]."""
    return (tokens[..., None] == stop.tokens[:, None]).any(axis=-1)


def _logprobs(logits: jax.Array, tokens: jax.Array, scored: jax.Array) -> jax.Array:
    """float32 [B, T], log-probability of tokens int32 [B, T] under the target's own softmax; 0 if nobody asks."""

    def compute() -> jax.Array:
        own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return own - jax.nn.logsumexp(logits, axis=-1)

    return jax.lax.cond(scored.any(), compute, lambda: jnp.zeros(tokens.shape))


# --- whole programs ---------------------------------------------------------------------------------------------


def decode_rounds(
    target: Any,
    drafter: Any | None,
    tied: Tied | None,
    state: State,
    sampling: Sampling,
    stop: Stop,
    rounds: jax.Array | None = None,
    until_one_is_done: jax.Array | bool = False,
    *,
    tree: Tree | None,
    shared_noise: bool = True,
) -> tuple[State, jax.Array]:
    """The State after rounds until every row is done or `rounds` (int32) more of them, and how many there were.

    Where `until_one_is_done`, the first row that becomes done is the end, too.
    """

    def unfinished(carry: tuple[State, jax.Array]) -> jax.Array:
        now, ran = carry
        more = ~now.done.all() & ~(until_one_is_done & (now.done & ~state.done).any())
        return more if rounds is None else more & (ran < rounds)

    def one(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        now, ran = carry
        now = decode_round(target, drafter, tied, now, sampling, stop, tree=tree, shared_noise=shared_noise)
        return constrain_all(now, AXES), ran + 1

    return jax.lax.while_loop(unfinished, one, (state, jnp.zeros((), jnp.int32)))


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
    state, _ = decode_rounds(target, drafter, tied, state, sampling, stop, tree=tree, shared_noise=shared_noise)
    tokens = state.emitted[:, :max_new]
    last = jnp.take_along_axis(tokens, state.num_emitted[:, None] - 1, axis=1)
    return Generation(tokens, state.num_emitted, _is_stop(last, stop)[:, 0], state.statistics)


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
    batch, prompt_slots = prompts.shape
    num_slots = slots_needed(prompt_slots, chunk, max_new, num_levels)
    begun = nothing_prefilled(target, drafter, batch, num_slots, max(chunk, num_levels + 1))
    prefilled = prefill(target, drafter, tied, begun, prompts, lengths, chunk=chunk, num_levels=num_levels)
    num_emitted = max_new + num_levels + 1
    state = first_state(target, prefilled, lengths, sampling, stop, num_slots=num_emitted, num_levels=num_levels)
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
    return decode_rounds(target, drafter, tied, state, sampling, stop, rounds, tree=tree, shared_noise=shared_noise)[0]


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
    tokens = jnp.asarray([stop_tokens or (NO_STOP,)] * batch, jnp.int32)
    return Stop(jnp.asarray(limits, jnp.int32), tokens)


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
      tree: what to draft; None for `pace.default_tree`.
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
        tree=tree or default_tree(jax.default_backend()),
        chunk=chunk,
        shared_noise=shared_noise,
    )
