"""The engine's sizes: checks, prompt buckets, numbers of rows, memory."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fasteagle_jax.devices.memory import Memory, available, bytes_of
from fasteagle_jax.devices.sharding import check_experts, check_heads, process_values
from fasteagle_jax.engine import prefix_cache
from fasteagle_jax.engine.model_runner import ModelRunner
from fasteagle_jax.engine.slots import AXES
from fasteagle_jax.errors import UserError

LEAST_ROWS = 4  # fewer rows are hardly faster to compute

LOGITS_BUFFERS_PER_ROUND = 8  # float32 arrays of the logits' size that a round takes, by the compiler's account


def check_sizes(slots: int, max_len: int, positions: int) -> None:
    """Raises UserError for numbers of slots and tokens that no engine has."""
    if not isinstance(slots, int) or slots < 1:
        raise UserError(f"slots is {slots!r}: give a whole number of at least 1")
    if not isinstance(max_len, int) or not 1 <= max_len <= positions:
        raise UserError(f"max_len is {max_len!r}: give a whole number up to the target's {positions} positions")


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


def memory_needed(runner: ModelRunner, row_counts: tuple[int, ...]) -> Memory:
    """What an engine takes of each device, from shapes alone.

    While the number of rows changes, and while trees are measured for another number, two batches are alive: at most
    those of the two largest of `row_counts`.
    """
    target, drafter, mesh = runner.target, runner.drafter, runner.mesh
    batch, prefixes = runner.shapes(row_counts[0])
    second = runner.shapes(row_counts[1])[0] if len(row_counts) > 1 else None
    prefix_sizes = [bytes_of(prefix, mesh, AXES) for prefix in prefixes]
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
        prefill=sum(prefix_sizes) + prefix_cache.CAPACITY * prefix_sizes[-1],
        work=LOGITS_BUFFERS_PER_ROUND * bytes_of(logits, mesh, {"logits": ("rows", None, "vocab")}),
        resizing=bytes_of(second, mesh, AXES),
    )
