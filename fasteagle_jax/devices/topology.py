"""Devices of a slice that is not there: libtpu compiles for every TPU generation on any Linux machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from typing import Any

import jax

from fasteagle_jax.devices.chips import SLICES, set_libtpu_flags, slice_names
from fasteagle_jax.errors import UserError

INSTALL = {
    "tpu": "pip install 'fasteagle-jax[tpu]'",
    "cuda": "pip install 'fasteagle-jax[cuda]'",
}
# As XLA's GPU compiler wants a GPU described (its GpuTargetConfigProto); NVIDIA's H100 SXM.
GPUS = {
    "h100": """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
}


def topology_names() -> list[str]:
    """What `devices` knows."""
    return [*slice_names(), *GPUS]


def has_gpu_compiler() -> bool:
    """Whether NVIDIA's packages are there, without which nothing compiles for a GPU."""
    return any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


def devices(name: str) -> list[Any]:
    """The devices of a slice such as `v5e:2x4`, to compile for and not to run on.

    Raises UserError for an unknown name, where libtpu is missing, or another one than this JAX goes with.
    """
    generation, _, shape = name.partition(":")
    if name in GPUS:
        return _gpus(name)
    if shape not in SLICES.get(generation, ()):
        raise UserError(f"topology {name!r} is not known: use one of {', '.join(topology_names())}")
    _check_libtpu()
    set_libtpu_flags()
    # Nobody is asked what machine this is, and a second process may load libtpu beside this one.
    for variable in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "")
    os.environ.setdefault("TPU_HOST_BOUNDS", "1,1,1")  # or libtpu prints that it could not find them out
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if shape in ("1x1", "1x1x1"):
        options["chips_per_host_bounds"] = [1, 1, 1]
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on the real one
    return list(topologies.get_topology_desc(name, "tpu", **options).devices)


def _check_libtpu() -> None:
    """Raises UserError where there is no libtpu, or not the one that this JAX was built with."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"libtpu is not installed: {INSTALL['tpu']}")
    installed = importlib.metadata.version("libtpu")
    wanted = [
        match[1]
        for requirement in importlib.metadata.requires("jax") or []
        if (match := re.match(r"libtpu\s*==\s*([\d.]+)", requirement))
    ]
    if wanted and not f"{installed}.".startswith(wanted[0].rstrip(".") + "."):
        raise UserError(
            f"libtpu {installed} does not go with jax {jax.__version__}, which needs {wanted[0].rstrip('.')}.*: "
            f"pip install 'jax[tpu]=={jax.__version__}'"
        )


def _gpus(name: str) -> list[Any]:
    """One GPU, by its description alone."""
    if not has_gpu_compiler():
        raise UserError(f"{name} needs the CUDA compiler's packages: {INSTALL['cuda']}")
    from jax.experimental import topologies

    described = topologies.get_topology_desc("", "cuda", target_config=GPUS[name], topology="1x1x1")
    return list(described.devices)
