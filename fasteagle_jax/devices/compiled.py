"""Compiled programs that are kept from one start to the next."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from pathlib import Path

from fasteagle_jax.io.fetch import cache_folder


def keep_compiled() -> None:
    """Turns JAX's persistent compilation cache on, in the cache folder, unless a folder is set.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off. XLA compiles for
    the CPU it runs on, and machines may share a home: each kind of CPU has a folder of its own.
    """
    import jax  # not by those who only read options

    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    folder = cache_folder() / "compiled" / _cpu_kind()
    with contextlib.suppress(OSError):  # nothing is kept if nothing can be written there
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _cpu_kind() -> str:
    """A name for the instructions that this machine's CPU has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):  # not Linux
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
