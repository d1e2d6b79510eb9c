"""Accelerators: what one `jax.Device` of each kind holds and does at its best.

Sources: Google Cloud's pages on TPU versions (v2 to TPU7x, "key specifications") and NVIDIA's data sheets (dense
bfloat16, without sparsity). HBM of v5e to TPU7x is what libtpu lets a program use, as its out-of-memory error says it.
A device of TPU v2 and v3 is a core, half a chip, and so is one of TPU7x.

A kernel's latency is what a compiler's own cost model gives for one that does next to nothing. No figure measured on a
TPU is published. TPUs: `estimated_cycles` in the HLO that libtpu 0.0.42 makes of x * 2 + 1, x float32 [8, 128] (v4 619,
v5e 1832, v5p 2128, v6e 2124), over the clock: 1.5 GHz for v5e (J. Austin et al., How to Scale Your Model), for the
others what the bfloat16 peak gives for 4 matrix units a core (1.05, 1.75 and 1.75 GHz). TPU7x's clock is not known.
GPUs: XLA's kKernelLaunchOverhead (xla/service/gpu/model/gpu_performance_model_base.h), one value for all, "estimated".
"""

from __future__ import annotations

import dataclasses
import os

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device."""

    flops: float  # dense bfloat16 products a second
    hbm: float | None = None  # bytes that a program may use
    bandwidth: float | None = None  # of HBM, bytes a second
    link: float | None = None  # to one neighbour, one way, bytes a second: the chip's bidirectional figure / 2 / ports
    kernel: float | None = None  # latency of a kernel, seconds; None: no figure known


# By the start of the device_kind; the first that fits counts.
CHIPS = {
    "TPU v2": Chip(22.5e12, 7.5 * GIB, 350e9),
    "TPU v3": Chip(61.5e12, 15.5 * GIB, 450e9),
    "TPU v4": Chip(275e12, 31.25 * GIB, 1228e9, 50e9, 619 / 1.05e9),
    "TPU v5 lite": Chip(197e12, 15.75 * GIB, 819e9, 50e9, 1832 / 1.5e9),
    "TPU v5": Chip(459e12, 95.74 * GIB, 2765e9, 100e9, 2128 / 1.75e9),
    "TPU v6 lite": Chip(918e12, 31.25 * GIB, 1638e9, 100e9, 2124 / 1.75e9),
    "TPU7x": Chip(1153.5e12, 94.75 * GIB, 3690e9, 100e9),
    "NVIDIA A100": Chip(312e12, kernel=1e-6),
    "NVIDIA L40S": Chip(362e12, kernel=1e-6),
    "NVIDIA L4": Chip(121e12, kernel=1e-6),
    "NVIDIA H100 PCIe": Chip(756e12, 80e9, 2000e9, 450e9, 1e-6),
    "NVIDIA H100": Chip(989e12, 80e9, 3350e9, 450e9, 1e-6),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9, 1e-6),
    "NVIDIA B200": Chip(2250e12, 180e9, 7700e9, 900e9, 1e-6),
}


def chip(device_kind: str) -> Chip | None:
    """Of a device's kind; None where it is not known, as of a CPU."""
    return next((chip for kind, chip in CHIPS.items() if device_kind.startswith(kind)), None)


# Slices that a program can be compiled for without having one, smallest first.
SLICES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8"),
    "v5p": ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8"),
    "tpu7x": ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
}


def slice_names() -> list[str]:
    """All of them, as `v5e:2x4`."""
    return [f"{generation}:{shape}" for generation, shapes in SLICES.items() for shape in shapes]


# On TPU7x the compiler has loops hold bfloat16 stacks in tiles of 16 rows, in which arguments never come: it would copy
# all layers' weights at the start of every call, and keep both. Programs for other TPUs are the same with it.
LIBTPU_FLAGS = ("--xla_tpu_control_large_2nd_minor_layout_for_x16=false",)


def set_libtpu_flags() -> None:
    """Has libtpu compile with LIBTPU_FLAGS, unless it is in use already; a value that the user has set stays."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    names = {flag.partition("=")[0] for flag in given}
    own = [flag for flag in LIBTPU_FLAGS if flag.partition("=")[0] not in names]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(given + own)
