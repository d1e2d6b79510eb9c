"""Compiled programs of continuous batching: a fixed number of slots that requests pass through.

B slots · P prompt slots of a bucket · S cache slots · N levels.
Every function is one compiled program for each combination of shapes; `model_runner` chooses the shapes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fasteagle_jax.decoding import prefill as prompts
from fasteagle_jax.decoding import rules as decoding_rules
from fasteagle_jax.decoding import state as decoding_state
from fasteagle_jax.decoding.interfaces import Accepted, VocabWeights
from fasteagle_jax.decoding.prefill import Prefilled, Scores
from fasteagle_jax.decoding.rules import Rules, no_rules
from fasteagle_jax.decoding.sampling import Sampling, make_sampling
from fasteagle_jax.decoding.speculative import commit_path, decode_rounds, draft_tree, verify
from fasteagle_jax.decoding.state import NO_STOP, State, Stop, TopLogprobs, no_top
from fasteagle_jax.decoding.tree import Draft, TreeSpec
from fasteagle_jax.devices.sharding import constrain_all
from fasteagle_jax.nn import kv_cache

# The logical axes of slots and of prefilled caches. Arrays that the host reads between calls are replicated.
READ = ("text", "depths", "logprobs", "top_tokens", "top_logprobs", "num_emitted", "done")
AXES = {name: axes for name, axes in decoding_state.AXES.items() if name not in READ} | decoding_rules.AXES


class Slots(NamedTuple):
    """The active requests, a row each; free rows are done.

    Rules, and the state's `top`, are there while a request needs one of them: each program is compiled once for slots
    without them, which do no work for either, and once for slots with both.
    """

    state: State
    sampling: Sampling
    stop: Stop
    rules: Rules | None = None


class DeviceRequest(NamedTuple):
    """A request as the programs take it; arrays of one row."""

    prompt: jax.Array  # int32 [1, P]
    length: jax.Array  # int32 [1], of the prompt
    sampling: Sampling
    stop: Stop
    wants_logprobs: jax.Array  # bool [1], whether log-probabilities are wanted
    rules: Rules | None = None  # for slots with rules
    wants_top: jax.Array | None = None  # bool [1], for slots with rules: whether the most probable tokens are wanted
    first_mask: jax.Array | None = None  # bool [1, V], for slots with rules: which tokens a grammar lets come first


@functools.partial(jax.jit, static_argnames=("batch", "num_slots", "most_written", "num_stop_tokens"))
def empty_slots(
    target: Any, drafter: Any | None, *, batch: int, num_slots: int, most_written: int, num_stop_tokens: int
) -> Slots:
    """`batch` free slots for requests of up to `num_slots` tokens: prompt, answer and slack."""
    num_levels = 0 if drafter is None else drafter.num_levels
    empty = prompts.init_prefill(target, drafter, batch, num_slots, most_written)

    def row(dtype: Any, *shape: int) -> jax.Array:
        return jnp.zeros((batch, *shape), dtype)

    state = State(
        empty.target_cache,
        empty.drafter_cache,
        Accepted(
            row(empty.features.dtype, num_levels + 1, empty.features.shape[1]),
            row(jnp.int32, num_levels + 1),
            row(jnp.int32),
        ),
        row(jnp.int32, num_slots),
        row(jnp.int32, num_slots),
        row(jnp.float32, num_slots),
        row(bool),
        row(jnp.int32),
        ~row(bool),
    )
    stop = Stop(row(jnp.int32), row(jnp.int32, num_stop_tokens) + NO_STOP)
    return constrain_all(Slots(state, make_sampling(batch), stop), AXES)


@functools.partial(jax.jit, static_argnames=("batch", "num_slots", "vocab_size"))
def empty_rules(*, batch: int, num_slots: int, vocab_size: int) -> tuple[Rules, TopLogprobs]:
    """What slots with rules have besides: rules that change nothing, and no row's most probable tokens."""
    return constrain_all((no_rules(batch, vocab_size), no_top(batch, num_slots, vocab_size)), AXES)


@functools.partial(jax.jit, static_argnames=("rows", "num_slots", "drafter_slots", "most_written"))
def init_prefill(
    target: Any, drafter: Any | None, *, rows: int, num_slots: int, drafter_slots: int, most_written: int
) -> Prefilled:
    """Compiled `prefill.init_prefill`."""
    return constrain_all(prompts.init_prefill(target, drafter, rows, num_slots, most_written, drafter_slots), AXES)


@functools.partial(jax.jit, static_argnames=("chunk", "num_levels"), donate_argnames=("prefix",))
def prefill(
    target: Any,
    drafter: Any | None,
    vocab: VocabWeights | None,
    prefix: Prefilled,
    prompt: jax.Array,
    lengths: jax.Array,
    start_chunk: jax.Array,
    end_chunk: jax.Array,
    *,
    chunk: int,
    num_levels: int,
) -> Prefilled:
    """Compiled `prefill.prefill` of chunks `start_chunk` to `end_chunk` int32 []."""
    args = (target, drafter, vocab, prefix, prompt, lengths, start_chunk, end_chunk)
    return constrain_all(prompts.prefill(*args, chunk=chunk, num_levels=num_levels), AXES)


@jax.jit
def take_prompt(prefilled: Prefilled, row: jax.Array) -> Prefilled:
    """One prompt of several, that of row int32 []."""
    return constrain_all(kv_cache.take_rows(prefilled, row[None]), AXES)


@functools.partial(jax.jit, static_argnames=("chunk",))
def last_chunk(prefilled: Prefilled, *, chunk: int) -> Prefilled:
    """The newest chunk of a single prompt, in caches of C slots."""
    return constrain_all(kv_cache.last_tokens(prefilled, jnp.zeros((), jnp.int32), chunk), AXES)


@functools.partial(jax.jit, donate_argnames=("prefilled",))
def put_chunk(prefilled: Prefilled, piece: Prefilled, row: jax.Array) -> Prefilled:
    """The caches with a `last_chunk` added to row int32 []."""
    return constrain_all(kv_cache.insert_tokens(prefilled, piece, row), AXES)


@functools.partial(jax.jit, static_argnames=("chunk",))
def score_prompt(target: Any, prompt: jax.Array, length: jax.Array, *, chunk: int) -> Scores:
    """Compiled `prefill.score_prompts` of one row, for the host."""
    return constrain_all(prompts.score_prompts(target, prompt, length, chunk=chunk), {})


@functools.partial(jax.jit, donate_argnames=("slots",))
def admit(target: Any, slots: Slots, slot: jax.Array, prefilled: Prefilled, request: DeviceRequest) -> Slots:
    """The slots with a prefilled request in slot int32 [], its first token chosen."""
    state = slots.state
    rules = request.rules
    if rules is not None:
        assert request.first_mask is not None
        rules = rules._replace(bias=jnp.where(request.first_mask, rules.bias, decoding_rules.BANNED))
    one = prompts.first_state(
        target,
        prefilled,
        request.prompt,
        request.length,
        request.sampling,
        request.stop,
        rules,
        num_slots=state.text.shape[1],
        num_levels=state.new.tokens.shape[1] - 1,
        wants_logprobs=request.wants_logprobs,
        wants_top=request.wants_top,
    )
    new = Slots(one, request.sampling, request.stop, request.rules)
    return constrain_all(kv_cache.insert_row(slots, new, slot), AXES)


@functools.partial(jax.jit, static_argnames=("tree", "shared_noise"), donate_argnames=("slots",))
def advance(
    target: Any,
    drafter: Any | None,
    vocab: VocabWeights | None,
    slots: Slots,
    ended: jax.Array,
    rounds: jax.Array,
    until_one_is_done: jax.Array,
    *,
    tree: TreeSpec | None,
    shared_noise: bool,
) -> tuple[Slots, jax.Array]:
    """The slots after up to `rounds` int32 [] rounds, and the number of rounds; rows `ended` bool [B] are done."""
    state = slots.state._replace(done=slots.state.done | ended)
    state, ran = decode_rounds(
        target,
        drafter,
        vocab,
        state,
        slots.sampling,
        slots.stop,
        rounds,
        until_one_is_done,
        tree=tree,
        shared_noise=shared_noise,
        rules=slots.rules,
    )
    return constrain_all((slots._replace(state=state), ran), AXES)


class Drafted(NamedTuple):
    """The draft of the next round, and the drafter's cache after it; the slots are as before it."""

    draft: Draft
    drafter_cache: Any


@functools.partial(jax.jit, static_argnames=("tree", "shared_noise"))
def draft_round(
    drafter: Any | None,
    vocab: VocabWeights | None,
    slots: Slots,
    ended: jax.Array,
    *,
    tree: TreeSpec | None,
    shared_noise: bool,
) -> Drafted:
    """The Drafted of slots of which the rows `ended` bool [B] are done, for the host to make its nodes' masks."""
    return _drafted(drafter, vocab, _with_ended(slots, ended), tree=tree, shared_noise=shared_noise)


@functools.partial(jax.jit, static_argnames=("tree", "shared_noise"), donate_argnames=("slots", "drafted"))
def verify_round(
    target: Any,
    drafter: Any | None,
    vocab: VocabWeights | None,
    slots: Slots,
    drafted: Drafted,
    ended: jax.Array,
    masks: jax.Array,
    *,
    tree: TreeSpec | None,
    shared_noise: bool,
) -> tuple[Slots, Drafted]:
    """The slots after the round of a draft, and the Drafted of the next one.

    The draft's nodes have masks uint32 [B, M, V / 32] (see speculative.verify); the rows `ended` bool [B] are done.
    """
    slots = _with_ended(slots, ended)
    state, stop = slots.state, slots.stop
    verified = verify(target, drafter, state, drafted.draft, slots.sampling, stop, slots.rules, masks, tree=tree)
    state = commit_path(drafter, state, drafted.drafter_cache, verified, stop, tree=tree)
    slots = constrain_all(slots._replace(state=state), AXES)
    return slots, _drafted(drafter, vocab, slots, tree=tree, shared_noise=shared_noise)


def _with_ended(slots: Slots, ended: jax.Array) -> Slots:
    return slots._replace(state=slots.state._replace(done=slots.state.done | ended))


def _drafted(
    drafter: Any | None, vocab: VocabWeights | None, slots: Slots, *, tree: TreeSpec | None, shared_noise: bool
) -> Drafted:
    options: dict[str, Any] = {"tree": tree, "shared_noise": shared_noise}
    draft, drafter_cache = draft_tree(drafter, vocab, slots.state, slots.sampling, slots.rules, **options)
    return Drafted(constrain_all(draft, {}), constrain_all({"drafter_cache": drafter_cache}, AXES)["drafter_cache"])


@jax.jit
def take_rows(slots: Slots, rows: jax.Array, in_use: jax.Array) -> Slots:
    """New slots, one for each of `rows` int32 [B']; those not `in_use` bool [B'] are free."""
    new = kv_cache.take_rows(slots, rows)
    return constrain_all(new._replace(state=new.state._replace(done=new.state.done | ~in_use)), AXES)
