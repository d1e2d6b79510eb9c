"""What every test runs under: a CPU that looks like eight devices, exact float32 products, nothing compiled earlier."""

from __future__ import annotations

import os
import tempfile

# Nearly all the time goes into LLVM and, before it, into the MLIR that fusions are written in, for programs that run
# for milliseconds: with LLVM's optimisation off and fusions written as LLVM IR, the tests take a third as long. XLA's
# own passes, fusions among them, stay. `XLA_FLAGS= pytest` runs what users run; everything passes there too.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

import jax
import pytest

# A configuration counts only before the backend starts, which importing fasteagle_jax does not do.
if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compare a pass over many rows with one over few: both must round alike, on accelerators too.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs for this session, in which many tests, and the processes they start, run the same ones.

    No longer: a program compiled by another jaxlib or for another CPU must not decide a test.
    """
    folder = tempfile.TemporaryDirectory(prefix="programs-")
    config.add_cleanup(folder.cleanup)
    kept = {"jax_compilation_cache_dir": folder.name, "jax_persistent_cache_min_compile_time_secs": 0.3}
    for name, value in kept.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


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
