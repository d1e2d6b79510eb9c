"""The engine's sizes: checks, prompt buckets, numbers of rows."""

from __future__ import annotations

import itertools
import math

from jax.sharding import Mesh

from fasteagle_jax.devices.memory import available
from fasteagle_jax.devices.sharding import check_heads, process_values
from fasteagle_jax.drafters.base import DrafterConfig
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.llama import LlamaConfig

LEAST_ROWS = 4  # fewer rows are hardly faster to compute


def check_sizes(slots: int, max_len: int, positions: int) -> None:
    """Raises UserError for numbers of slots and tokens that no engine has."""
    if not isinstance(slots, int) or slots < 1:
        raise UserError(f"slots is {slots!r}: give a whole number of at least 1")
    if not isinstance(max_len, int) or not 1 <= max_len <= positions:
        raise UserError(f"max_len is {max_len!r}: give a whole number up to the target's {positions} positions")


def check_mesh(mesh: Mesh, slots: int, target: LlamaConfig, drafter: DrafterConfig | None) -> None:
    """Raises UserError where the mesh does not divide the slots, or the heads of K/V of a model."""
    data = mesh.shape["data"]
    if slots % data:
        raise UserError(f"slots is {slots}, which data {data} of the mesh does not divide: use a multiple of {data}")
    check_heads(mesh, target, drafter)


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


def row_counts(slots: int, ways: int = 1) -> tuple[int, ...]:
    """The numbers of rows that are computed: all slots, and quarters thereof as long as that saves something.

    Where rows are split `ways`, each part has equally many.
    """
    counts = [slots // ways]
    while counts[-1] > LEAST_ROWS:
        counts.append(-(-counts[-1] // 4))
    return tuple(ways * count for count in counts)
