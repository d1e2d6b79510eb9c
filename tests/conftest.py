"""What every test runs under: a CPU that looks like eight devices, exact float32 products, programs compiled once."""

from __future__ import annotations

import gc
import hashlib
import os
import platform
import shutil
import tempfile
from pathlib import Path

import jaxlib.version
import pytest

# Nearly all the time goes into LLVM and, before it, into the MLIR that fusions are written in, for programs that run
# for milliseconds: with LLVM's optimisation off and fusions written as LLVM IR, the tests take a third as long. One
# module a program: the workers fill the cores already, and splitting costs more than LLVM then takes. XLA's own passes,
# fusions among them, stay. `XLA_FLAGS= pytest` runs what users run; everything passes there too.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jaxlib.version.__version_info__ < (0, 11):  # a flag that is not known ends the process
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)

import jax  # noqa: E402  # reads the flags

LARGEST_PROGRAMS = 2 * 2**30  # bytes of all folders of compiled programs; one whole session writes about a tenth
# Linux gives a process 65,530 maps of memory. A compiled program takes dozens of them, the longest test a third of all,
# and LLVM ends the process when there are none left.
MOST_MAPS = 25_000

# A configuration counts only before the backend starts, which importing fasteagle_jax does not do.
if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compare a pass over many rows with one over few: both must round alike, on accelerators too.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs, in pytest's own cache: many tests, and the processes they start, run the same ones.

    One folder serves the workers of pytest-xdist, who inherit it, all their children, and later sessions.
    """
    if not hasattr(config, "workerinput"):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_programs_folder(config))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _programs_folder(config: pytest.Config) -> Path:
    """Where compiled programs are kept; for this session alone where pytest keeps nothing.

    JAX finds a program by its text, and not by the CPU that it was compiled for: one that another CPU's compiler or
    another jaxlib made must not decide a test, so the folder's name has both. JAX never removes a program either:
    those of texts that are gone would fill the disk.
    """
    cache = getattr(config, "cache", None)
    if cache is None:  # -p no:cacheprovider
        folder = tempfile.TemporaryDirectory(prefix="programs-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        return Path(folder.name)
    made_for = f"{os.environ['XLA_FLAGS']}\n{_cpu()}"
    digest = hashlib.sha256(made_for.encode()).hexdigest()[:16]
    folder = cache.mkdir(f"programs-{jaxlib.__version__}-{digest}")
    kept = [path.stat().st_size for path in folder.parent.glob("programs-*/*")]
    if sum(kept) > LARGEST_PROGRAMS:
        for each in folder.parent.glob("programs-*"):
            shutil.rmtree(each, ignore_errors=True)
    return cache.mkdir(folder.name)


def _cpu() -> str:
    """The instructions that this CPU has, and its name: LLVM compiles for both."""
    names = ("flags", "Features", "model name", "CPU part")
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return "\n".join(sorted({line for line in lines if line.startswith(names)})) or repr(platform.uname())


def pytest_collection_finish() -> None:
    """Spares the garbage collector what lives to the end: the modules, and most of what JAX traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_runtest_setup() -> None:
    """Forgets the programs of earlier tests before they have taken all maps of memory."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


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
