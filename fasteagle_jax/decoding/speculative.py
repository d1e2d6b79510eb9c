"""Speculative decoding: a round of draft - verify - commit, loops of rounds, and `generate`, jitted as a whole.

B rows · P prompt slots · C tokens of a prefill chunk · M nodes · N levels · A = N + 1 tokens a round can accept.
Between rounds, per row, with n committed tokens x[0..n-1] and the pending token x[n]:
the target cache has positions 0..n-1, `new` the features and tokens that the drafter has not read yet, and the drafter
cache the stream positions before them. Caches hold verified tokens only. Plain decoding is the same code without a
drafter.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fasteagle_jax.decoding.interfaces import Accepted, Ranking, VocabWeights
from fasteagle_jax.decoding.lookup import with_lookup
from fasteagle_jax.decoding.prefill import first_state, init_prefill, pad_prompts, prefill
from fasteagle_jax.decoding.rules import Rules, apply_rules, keep_allowed
from fasteagle_jax.decoding.sampling import Sampling, choose
from fasteagle_jax.decoding.state import (
    AXES,
    NO_TOKEN,
    Generation,
    State,
    Stop,
    TopLogprobs,
    best_logprobs,
    context_of,
    is_stop,
    make_stop,
    slots_needed,
    token_logprobs,
)
from fasteagle_jax.decoding.tree import NO_PARENT, Draft, TreeSpec, Walk, visible_nodes, walk
from fasteagle_jax.decoding.tree_selection import default_tree
from fasteagle_jax.devices.sharding import by_shard, constrain_all
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.kv_cache import commit
from fasteagle_jax.targets.experts import relative_reads

# --- a round ----------------------------------------------------------------------------------------------------


class Verified(NamedTuple):
    """What the target says of a draft."""

    out: Any  # the target's TargetOutput
    logits: jax.Array  # float32 [B, M, V], before the rules
    chosen: jax.Array  # int32 [B, M], its token after each node
    path: Walk  # the deepest one that it agrees with


def decode_round(
    target: Any,
    drafter: Any | None,
    vocab: VocabWeights | None,
    state: State,
    sampling: Sampling,
    stop: Stop,
    rules: Rules | None = None,
    *,
    tree: TreeSpec | None,
    shared_noise: bool = True,
) -> State:
    """The State after one draft and one target pass; rows that are done do not change.

    Without a tree it is a plain round of one token, which the drafter, if there is one, skips.
    """
    with jax.named_scope("draft"):
        draft, drafter_cache = draft_tree(drafter, vocab, state, sampling, rules, tree=tree, shared_noise=shared_noise)
    with jax.named_scope("verify"):
        verified = verify(target, drafter, state, draft, sampling, stop, rules, tree=tree)
    with jax.named_scope("commit"):
        return commit_path(drafter, state, drafter_cache, verified, stop, tree=tree)


def draft_tree(
    drafter: Any | None,
    vocab: VocabWeights | None,
    state: State,
    sampling: Sampling,
    rules: Rules | None = None,
    *,
    tree: TreeSpec | None,
    shared_noise: bool = True,
) -> tuple[Draft, Any]:
    """The Draft of a round, of plain decoding the pending token alone; and the drafter's cache after it."""
    if drafter is None or tree is None:
        return root_only(state.new), None if drafter is None else drafter.skip(state.new, state.drafter_cache)
    ranking = Ranking(sampling, shared_noise, None if rules is None else rules.bias)
    context = context_of(state.target_cache, drafter)
    draft, drafter_cache = drafter.draft(vocab, state.new, state.drafter_cache, tree, ranking, context)
    num_levels = num_levels_of(drafter, tree)
    return with_lookup(draft, state.text, state.target_cache.length, num_levels, tree.lookup), drafter_cache


def verify(
    target: Any,
    drafter: Any | None,
    state: State,
    draft: Draft,
    sampling: Sampling,
    stop: Stop,
    rules: Rules | None = None,
    masks: jax.Array | None = None,
    *,
    tree: TreeSpec | None,
) -> Verified:
    """The target's pass over the nodes of a draft, and the path that it agrees with.

    `masks` uint32 [B, M, V / 32], a bit a token, are of grammars: the tokens that may follow each node.
    """
    positions = state.target_cache.length[:, None] + draft.depths  # [B, M]
    feature_layers = () if drafter is None else drafter.feature_layers
    out = target(draft.tokens, positions, visible_nodes(draft), state.target_cache, feature_layers)
    logits = target.logits(out.hidden)
    ruled = logits if masks is None else keep_allowed(logits, masks)
    if rules is not None:
        so_far = (state.text, state.target_cache.length, state.num_emitted)
        ruled = apply_rules(rules, stop.tokens, ruled, draft, *so_far)
    chosen = choose(ruled, positions + 1, sampling)  # [B, M]
    return Verified(out, logits, chosen, walk(draft, chosen, num_levels_of(drafter, tree)))


def commit_path(
    drafter: Any | None, state: State, drafter_cache: Any, verified: Verified, stop: Stop, *, tree: TreeSpec | None
) -> State:
    """The State with the path's tokens and the target's own after it, up to a stop token or the row's limit."""
    out, logits, chosen, path = verified
    num_accepted, num_levels = state.new.tokens.shape[1], num_levels_of(drafter, tree)  # a tree may accept fewer
    picked = jnp.take_along_axis(chosen, path.nodes, axis=1)  # [B, N+1], new tokens, valid up to `accepted`
    index = jnp.arange(num_levels + 1)
    stops = is_stop(picked, stop) & (index <= path.accepted[:, None])
    until_stop = jnp.where(stops.any(axis=1), jnp.argmax(stops, axis=1), num_levels + 1) + 1
    count = jnp.minimum(path.accepted + 1, jnp.minimum(until_stop, stop.max_new - state.num_emitted))
    count = jnp.where(state.done, 0, count).astype(jnp.int32)
    target_cache = commit(state.target_cache, out.fresh, count, path.nodes)

    slot = state.target_cache.length[:, None] + 1 + index  # the pending token is at `length`
    real = index < count[:, None]
    depths = jnp.where(index == count[:, None] - 1, 0, index + 1)
    new_entries: tuple[Any, ...] = jnp.where(real, picked, NO_TOKEN), jnp.where(real, depths, NO_TOKEN), None
    if state.logprobs is not None:
        new_entries = *new_entries[:2], token_logprobs(logits, picked, state.wants_logprobs, path.nodes)
    text, depths, logprobs = _write((state.text, state.depths, state.logprobs), new_entries, slot)
    top = state.top
    if top is not None:
        best = best_logprobs(logits, top.wants_top, path.nodes)
        top_tokens, top_logprobs = _write((top.top_tokens, top.top_logprobs), best, slot)
        top = TopLogprobs(top_tokens, top_logprobs, top.wants_top)
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
        text,
        depths,
        logprobs,
        state.wants_logprobs,
        num_emitted,
        done,
        top,
    )


def _at(x: jax.Array, nodes: jax.Array) -> jax.Array:
    """The values [B, A, X] of x [B, M, X] at nodes int32 [B, A]."""
    return jnp.take_along_axis(x, nodes[..., None], axis=1)


def _write(into: Any, new_entries: Any, slots: jax.Array) -> Any:
    """Arrays [B, slots, ...] with `new_entries` [B, A, ...] written at `slots` int32 [B, A]."""

    def write(into: Any, new_entries: Any, slots: jax.Array) -> Any:
        row = jnp.arange(slots.shape[0])[:, None]
        return jax.tree.map(lambda x, new: x.at[row, slots].set(new), into, new_entries)

    return by_shard(write, {2: ("rows", None), 3: ("rows", None, None)}, into, new_entries, slots)


def root_only(new: Accepted) -> Draft:
    """The draft of plain decoding: the pending token alone."""
    last = jnp.maximum(new.count - 1, 0)[:, None]
    root = jnp.take_along_axis(new.tokens, last, axis=1)
    return Draft(root, jnp.full_like(root, NO_PARENT), jnp.zeros_like(root), jnp.zeros(root.shape))


# --- loops of rounds, and generate ------------------------------------------------------------------------------


def decode_rounds(
    target: Any,
    drafter: Any | None,
    vocab: VocabWeights | None,
    state: State,
    sampling: Sampling,
    stop: Stop,
    rounds: jax.Array | None = None,
    until_one_is_done: jax.Array | bool = False,
    *,
    tree: TreeSpec | None,
    shared_noise: bool = True,
    rules: Rules | None = None,
) -> tuple[State, jax.Array]:
    """The State after rounds until every row is done, at most `rounds` (int32 []); and how many ran, int32 [].

    With `until_one_is_done` the first row that becomes done ends them, too.
    """

    def unfinished(carry: tuple[State, jax.Array]) -> jax.Array:
        now, num_rounds = carry
        more = ~now.done.all() & ~(until_one_is_done & (now.done & ~state.done).any())
        return more if rounds is None else more & (num_rounds < rounds)

    def step(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        now, num_rounds = carry
        now = decode_round(target, drafter, vocab, now, sampling, stop, rules, tree=tree, shared_noise=shared_noise)
        return constrain_all(now, AXES), num_rounds + 1

    return jax.lax.while_loop(unfinished, step, (state, jnp.zeros((), jnp.int32)))


@functools.partial(jax.jit, static_argnames=("max_new", "tree", "chunk", "shared_noise"))
def generate_jit(
    target: Any,
    drafter: Any | None,
    prompts: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    stop: Stop,
    rules: Rules | None = None,
    *,
    max_new: int,
    tree: TreeSpec,
    chunk: int,
    shared_noise: bool = True,
) -> Generation:
    """Prefill and all rounds in one compiled program; for the arguments see `prefill` and `decode_round`."""
    sizes = {"max_new": max_new, "num_levels": num_levels_of(drafter, tree), "chunk": chunk}
    state, vocab = start(target, drafter, prompts, lengths, sampling, stop, rules, **sizes)
    options: dict[str, Any] = {"tree": tree, "shared_noise": shared_noise, "rules": rules}
    state, _ = decode_rounds(target, drafter, vocab, state, sampling, stop, **options)
    tokens = state.emitted[:, :max_new]
    last = jnp.take_along_axis(tokens, state.num_emitted[:, None] - 1, axis=1)
    return Generation(tokens, state.num_emitted, is_stop(last, stop)[:, 0], state.statistics)


def num_levels_of(drafter: Any | None, tree: TreeSpec | None) -> int:
    """How many levels a round drafts with this tree; 0 for plain decoding."""
    return 0 if drafter is None or tree is None else tree.num_levels(drafter.num_levels)


@functools.partial(jax.jit, static_argnames=("max_new", "num_levels", "chunk"))
def start(
    target: Any,
    drafter: Any | None,
    prompts: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    stop: Stop,
    rules: Rules | None = None,
    *,
    max_new: int,
    num_levels: int,
    chunk: int,
) -> tuple[State, VocabWeights | None]:
    """The State after prefill and the drafter's rows of the target, for a caller that runs rounds by `advance`."""
    vocab = None if drafter is None else drafter.vocab_weights(target)
    batch, prompt_slots = prompts.shape
    num_slots = slots_needed(prompt_slots, chunk, max_new, num_levels)
    prefix = init_prefill(target, drafter, batch, num_slots, max(chunk, num_levels + 1))
    prefilled = prefill(target, drafter, vocab, prefix, prompts, lengths, chunk=chunk, num_levels=num_levels)
    of_text = prompt_slots + max_new + num_levels + 1
    sizes: dict[str, Any] = {"num_slots": of_text, "num_levels": num_levels}
    return first_state(target, prefilled, prompts, lengths, sampling, stop, rules, **sizes), vocab


@functools.partial(jax.jit, static_argnames=("tree", "shared_noise"), donate_argnames=("state",))
def advance(
    target: Any,
    drafter: Any | None,
    vocab: VocabWeights | None,
    state: State,
    sampling: Sampling,
    stop: Stop,
    rounds: jax.Array,
    rules: Rules | None = None,
    *,
    tree: TreeSpec,
    shared_noise: bool = True,
) -> State:
    """The State after at most `rounds` (int32 []) more rounds; the given one is donated."""
    options: dict[str, Any] = {"tree": tree, "shared_noise": shared_noise, "rules": rules}
    return decode_rounds(target, drafter, vocab, state, sampling, stop, rounds, **options)[0]


def generate(
    target: Any,
    drafter: Any | None,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    max_new: int | list[int] = 128,
    stop_tokens: tuple[int, ...] = (),
    tree: TreeSpec | None = None,
    lookup: int | None = None,
    chunk: int = 64,
    shared_noise: bool = True,
    rules: Rules | None = None,
) -> Generation:
    """New tokens for a batch of prompts: exactly those of plain decoding, for any drafter and tree.

    Args:
      target: an interfaces.Target.
      drafter: an interfaces.Drafter, for lookup alone a drafters.text_only.TextOnly; None for plain decoding.
      prompts: token ids, each prompt of at least one.
      sampling: of each row, from `sampling.make_sampling`.
      max_new: the most new tokens, for all rows or one a row.
      stop_tokens: a row ends with the first of these, which is kept.
      tree: what to draft; None for `tree_selection.default_tree`.
      lookup: K, for a tree that also holds what is copied from the row's own text after suffixes of up to K tokens
        (see lookup.py); None for what `tree` says.
      chunk: prompt tokens a forward pass of the prefill takes.
      shared_noise: let the drafter rank its guesses with the target's own noise at temperature > 0.
      rules: on the logits of each row, from `rules.make_rules`; None for none.

    Returns:
      A Generation. Compiled once for each shape of the arguments.

    Raises:
      UserError: a lookup out of range, an empty prompt, a token outside the vocabulary, a prompt that does not fit the
        target's positions.
    """
    limits = max_new if isinstance(max_new, (list, tuple)) else [max_new]
    config = target.config
    if not prompts or chunk < 1:
        raise UserError(f"{len(prompts)} prompts in chunks of {chunk}: give at least one prompt, and 1")
    stop = make_stop(len(prompts), max_new, stop_tokens)
    tree = tree or default_tree(jax.default_backend(), functools.partial(relative_reads, config))
    if lookup is not None:
        tree = dataclasses.replace(tree, lookup=lookup)
    for i, prompt in enumerate(prompts):
        limit = limits[i] if len(limits) > 1 else limits[0]
        check_room(f"prompt {i}", len(prompt), limit, config.max_positions)
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
        rules,
        max_new=max(limits),
        tree=tree,
        chunk=chunk,
        shared_noise=shared_noise,
    )


def check_room(name: str, num_tokens: int, max_new: int, max_positions: int) -> None:
    """Raises UserError if a prompt of so many tokens and its answer do not fit the target's positions."""
    if num_tokens + max_new > max_positions:
        raise UserError(
            f"{name} has {num_tokens} tokens, which with {max_new} new ones exceed the target's "
            f"{max_positions} positions: shorten it or lower max_new"
        )
