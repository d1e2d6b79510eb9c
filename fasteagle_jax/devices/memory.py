"""What an engine needs of a device's memory, known before it is taken."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fasteagle_jax.devices.sharding import Axes, shardings
from fasteagle_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the device, or on each one of a mesh."""

    target: int  # weights
    drafter: int  # weights
    target_cache: int  # of all slots
    drafter_cache: int  # of all slots
    prefill: int  # caches of prompts under way
    work: int  # logits and activations of a round, estimated
    resizing: int = 0  # a second batch, alive while the number of rows changes
    prefix_cache: int = 0  # chunks of prompts that are kept, at most

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = {
            "target": self.target,
            "drafter": self.drafter,
            "target cache": self.target_cache,
            "drafter cache": self.drafter_cache,
            "prefill": self.prefill,
            "prefix cache": self.prefix_cache,
            "work": self.work,
            "resizing": self.resizing,
        }
        return f"{_gib(self.total)}: " + ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)

    def check(self, available: int | None, remedy: str) -> None:
        """Raises UserError where it is more than what is available (None: not known)."""
        if available is not None and self.total > available:
            raise UserError(f"memory needed is {self}; the device has {_gib(available)} free: {remedy}")


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def bytes_of(tree: Any, mesh: Mesh | None = None, axes: Axes | None = None) -> int:
    """Bytes a device of a pytree's arrays or jax.ShapeDtypeStructs: placed on the mesh, or as they are placed."""
    leaves = jax.tree.leaves(tree)
    placed = [getattr(x, "sharding", None) for x in leaves]
    if mesh is not None:
        placed = jax.tree.leaves(shardings(mesh, tree, axes or {}))
    shapes = [x.shape if s is None else s.shard_shape(x.shape) for s, x in zip(placed, leaves, strict=True)]
    return sum(math.prod(shape) * np.dtype(x.dtype).itemsize for shape, x in zip(shapes, leaves, strict=True))


def available(mesh: Mesh | None = None) -> int | None:
    """Bytes that can still be taken on the first device, or on each of a mesh's; None where that is not known."""
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    statistics = devices[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return int(statistics["bytes_limit"]) - int(statistics.get("bytes_in_use", 0))
    if jax.default_backend() != "cpu":
        return None
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:  # not Linux
        pass
    try:  # a container's own limit
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit.isdigit():
            free.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(free) // len(devices) if free else None  # simulated devices share it
