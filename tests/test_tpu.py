"""The decode round and the train step at 8B, compiled for slices by libtpu: what fits, what moves, what is exchanged.

Few layers stand for all: a scan compiles to one body, whatever it repeats. The golden figures are of the jax and
libtpu that pyproject.toml pins; another compiler may fuse otherwise, hence the tolerance.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import pytest

from fasteagle_jax import topology
from fasteagle_jax.compiling import Decoding, Report, compile_program
from fasteagle_jax.run import RunConfig, load_config
from fasteagle_jax.sharding import MeshShape

pytestmark = pytest.mark.tpu
SLICES = ("v5e:2x4", "v6e:2x4")
TOLERANCE = 0.05  # of a golden figure


def config(num_layers: int = 8) -> RunConfig:
    whole = load_config("configs/llama31_8b.py")
    assert whole.target_config is not None
    few = dataclasses.replace(whole.target_config, num_layers=num_layers)
    return dataclasses.replace(whole, target_config=few, drafter=dataclasses.replace(whole.drafter, num_levels=3))


@functools.cache
def report(slice_name: str, program: str) -> Report:
    mesh = MeshShape(1, 1, 8) if program == "decode" else None
    with jax.default_matmul_precision("default"):
        return compile_program(config(), program, topology.devices(slice_name), Decoding(), mesh)
