"""The engine's sizes: checks, prompt buckets, numbers of rows, memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fasteagle_jax.devices.memory import Memory, available, bytes_of
from fasteagle_jax.devices.sharding import check_experts, check_heads, process_values
from fasteagle_jax.engine.model_runner import ModelRunner
from fasteagle_jax.engine.slots import AXES
from fasteagle_jax.errors import UserError

DEFAULT_MAX_LEN = 2048  # tokens of a request, if the target has positions for so many
LEAST_ROWS = 4  # fewer rows are hardly faster to compute
PREFILL_CHUNKS = 4  # a device call's chunks of prompts by default, and so the most prompts prefilled together
PREFIX_PROMPTS = 4  # prompts of max_len that the prefix cache holds by default

LOGITS_BUFFERS_PER_ROUND = 8  # float32 arrays of the logits' size that a round takes, by the compiler's account


def checked_max_len(max_len: int | None, slots: int, positions: int) -> int:
    """The most tokens of a request: `max_len`, or for None what the target has positions for, at most DEFAULT_MAX_LEN.

    UserError for numbers of tokens and slots that no engine has.
    """
    if not isinstance(slots, int) or slots < 1:
        raise UserError(f"slots is {slots!r}: give a whole number of at least 1")
    if max_len is None:
        return min(positions, DEFAULT_MAX_LEN)
    if not isinstance(max_len, int) or not 1 <= max_len <= positions:
        raise UserError(f"max_len is {max_len!r}: give a whole number up to the target's {positions} positions")
    return max_len


def check_mesh(mesh: Mesh, slots: int, target: Any, drafter: Any | None) -> None:
    """Raises UserError if the mesh does not divide the slots, the heads of K/V of a model, or the target's experts."""
    data = mesh.shape["data"]
    if slots % data:
        raise UserError(f"slots is {slots}, which data {data} of the mesh does not divide: use a multiple of {data}")
    check_heads(mesh, target, drafter)
    check_experts(mesh, target)


def available_everywhere(mesh: Mesh | None) -> int | None:
    """`available` on the device, of all processes, that has the least."""
    free = available(mesh)
    least = float(process_values(mesh, math.inf if free is None else free).min())
    return None if math.isinf(least) else int(least)


def check_prefill(prefill_budget: int | None, chunk: int) -> int:
    """The tokens of prompts that a device call prefills at most; UserError if these are fewer than a chunk."""
    if prefill_budget is None:
        return PREFILL_CHUNKS * chunk
    if not isinstance(prefill_budget, int) or prefill_budget < chunk:
        raise UserError(f"prefill_budget is {prefill_budget!r}: give at least {chunk} tokens, a chunk of a prompt")
    return prefill_budget


def prefix_capacity(prefix_cache_bytes: int | None, chunk_bytes: int, max_chunks: int) -> int:
    """The number of chunks that the prefix cache holds; UserError for memory that holds none, unless it is 0.

    `chunk_bytes` are a chunk's, `max_chunks` the most of a prompt.
    """
    if prefix_cache_bytes is None:
        return PREFIX_PROMPTS * max_chunks
    if not isinstance(prefix_cache_bytes, int) or prefix_cache_bytes < 0 or 0 < prefix_cache_bytes < chunk_bytes:
        raise UserError(
            f"prefix_cache_bytes is {prefix_cache_bytes!r}, and a chunk of a prompt takes {chunk_bytes}: give at least "
            "so many, or 0 to keep none"
        )
    return prefix_cache_bytes // chunk_bytes


def prompts_together(buckets: Sequence[int], chunk: int, prefill_budget: int, slots: int) -> dict[int, int]:
    """The most prompts that are prefilled together in each bucket.

    Their chunks fit a device call's budget, and their caches the largest bucket's.
    """
    most = min(PREFILL_CHUNKS, prefill_budget // chunk, slots)
    return {bucket: max(1, min(most, buckets[-1] // bucket)) for bucket in buckets}


def prompt_buckets(max_len: int, chunk: int) -> tuple[int, ...]:
    """The sizes of cache that prompts are prefilled in: 4, 16, 64, ... chunks, the last one for all prompts."""
    most = -(-max_len // chunk) * chunk
    sizes = itertools.takewhile(lambda size: size < most, (chunk * 4**i for i in itertools.count(1)))
    return (*sizes, most)


def row_counts(slots: int, data: int = 1) -> tuple[int, ...]:
    """The numbers of rows that are computed: all slots, and quarters thereof as long as that saves something.

    All are multiples of the mesh's `data` axis, over which rows are split.
    """
    counts = [slots // data]
    while counts[-1] > LEAST_ROWS:
        counts.append(-(-counts[-1] // 4))
    return tuple(data * count for count in counts)


def memory_needed(runner: ModelRunner, row_counts: tuple[int, ...], prefix_capacity: int) -> Memory:
    """What an engine takes of each device, from shapes alone.

    While the number of rows changes, and while trees are measured for another number, two batches are alive: at most
    those of the two largest of `row_counts`. Of each bucket one group of prompts is under way at most, and one of
    these prompts is copied.
    """
    target, drafter, mesh = runner.target, runner.drafter, runner.mesh
    batch = runner.slots_shape(row_counts[0])
    second = runner.slots_shape(row_counts[1]) if len(row_counts) > 1 else None
    groups = [runner.prefill_shape(most, bucket) for bucket, most in runner.buckets.items()]
    one = [runner.prefill_shape(1, bucket) for bucket, most in runner.buckets.items() if most > 1]
    embedding = {"embedding": target.embedding[...]}
    vocab = embedding if drafter is None else jax.eval_shape(drafter.vocab_weights, target)
    own_vocab = bytes_of(vocab, mesh, AXES) - bytes_of(embedding, mesh, AXES)
    nodes = max(1 if tree is None else tree.num_nodes(runner.num_levels) for tree in runner.trees)
    logits = {"logits": jax.ShapeDtypeStruct((row_counts[0], nodes, target.config.vocab_size), jnp.float32)}
    return Memory(
        target=bytes_of(target, mesh),
        drafter=bytes_of(drafter, mesh) + own_vocab,
        target_cache=bytes_of(batch.state.target_cache, mesh, AXES),
        drafter_cache=bytes_of(batch.state.drafter_cache, mesh, AXES),
        prefill=bytes_of(groups, mesh, AXES) + max((bytes_of(prompt, mesh, AXES) for prompt in one), default=0),
        work=LOGITS_BUFFERS_PER_ROUND * bytes_of(logits, mesh, {"logits": ("rows", None, "vocab")}),
        resizing=bytes_of(second, mesh, AXES),
        prefix_cache=prefix_capacity * bytes_of(runner.chunk_shape(), mesh, AXES),
    )
