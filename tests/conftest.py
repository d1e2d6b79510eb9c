"""What every test runs under: a CPU that looks like eight devices, exact float32 products, nothing cached on disk."""

from __future__ import annotations

import os

# Nearly all the time goes into LLVM, for programs that run for milliseconds: unoptimised, the tests take half as long.
# XLA's own passes, fusions among them, stay. `XLA_FLAGS= pytest` runs what users run; everything passes there too.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

# A configuration counts only before the backend starts, which importing fasteagle_jax does not do.
if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compare a pass over many rows with one over few: both must round alike, on accelerators too.
jax.config.update("jax_default_matmul_precision", "highest")
# A program compiled by another jaxlib or for another CPU must not decide a test.
jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture
def compilations():
    """A list that grows by one with every program compiled."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)
