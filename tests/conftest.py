"""What every test runs under: a CPU that looks like eight devices, exact float32 products, nothing compiled earlier."""

from __future__ import annotations

import gc
import os
import tempfile

# Nearly all the time goes into LLVM and, before it, into the MLIR that fusions are written in, for programs that run
# for milliseconds: with LLVM's optimisation off and fusions written as LLVM IR, the tests take a third as long. One
# module a program: the workers fill the cores already, and splitting costs more than LLVM then takes. XLA's own passes,
# fusions among them, stay. `XLA_FLAGS= pytest` runs what users run; everything passes there too.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

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

    One folder serves the workers of pytest-xdist, who inherit it, and all their children. No longer than a session: a
    program compiled by another jaxlib or for another CPU must not decide a test.
    """
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="programs-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_finish() -> None:
    """Spares the garbage collector what lives to the end: the modules, and most of what JAX traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


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
