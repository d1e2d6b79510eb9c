"""Compile a run's train step from shapes alone and say what memory a device needs: no weights, no data, no accelerator.

The devices are simulated CPU devices, as many as the configuration's mesh has; a TPU's or GPU's compiler may need
somewhat more or less for temporaries.

examples:
  fasteagle compile --config configs/llama31_8b.py
  fasteagle compile --config configs/llama31_8b.py loss.chunk=16384    # the loss at all positions at once
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from fasteagle_jax.commands.terminal import Parser, check_new, program, whole, write_new
from fasteagle_jax.data import Batch
from fasteagle_jax.drafters.table import AXES, class_of
from fasteagle_jax.errors import UserError
from fasteagle_jax.run import RunConfig, apply_changes, drafter_config, load_config, train_step
from fasteagle_jax.sharding import MeshShape, batch_sharding, check_batch, make_mesh, shardings
from fasteagle_jax.targets import llama
from fasteagle_jax.targets.llama import Llama
from fasteagle_jax.training import first_state, make_optimizer

GIB = 2**30


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Compiles as the command line says; returns the exit code."""
    parser = Parser(prog="fasteagle compile", description=__doc__)
    parser.add_argument("--config", required=True, help="a Python file with get_config() -> RunConfig")
    parser.add_argument("--devices", type=whole(1), metavar="N", help="default: as many as the mesh has")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a new file for the numbers")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="as of fasteagle train")
    args = parser.parse_args(argv)
    check_new(args.json)
    config = apply_changes(load_config(args.config), args.changes)
    report = compile_train_step(config, args.devices)
    for name, value in report.items():
        print(f"{name:24} {value / GIB:8.2f} GiB" if name.endswith("_bytes") else f"{name:24} {value}")
    if args.json:
        write_new(args.json, json.dumps(report, indent=2) + "\n")
    return 0


def compile_train_step(config: RunConfig, num_devices: int | None = None) -> dict[str, Any]:
    """What the train step takes on each device, in bytes, and how long it took to compile."""
    if config.target_config is None:
        raise UserError("the configuration has no target_config: name the target's sizes there")
    shape = config.mesh or MeshShape(1, 1, 1)
    known = math.prod(n for n in (shape.data, shape.fsdp, shape.tensor) if n > 0)
    num_devices = num_devices or known
    devices = _devices(num_devices)
    mesh = make_mesh(shape, devices)
    check_batch(mesh, config.batch_size // config.accumulate)
    sizes, dtype = drafter_config(config.drafter, config.target_config), jnp.dtype(config.dtype)

    def on_mesh(tree: Any, axes: Any) -> Any:
        placed = shardings(mesh, tree, axes)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placed)

    optimizer = make_optimizer(config.optimizer, config.steps)

    def start() -> Any:
        drafter = class_of(sizes)(sizes, jax.random.key(0))
        graph, params, constants = nnx.split(drafter, nnx.Param, ...)  # type: ignore[misc]  # `...`: all the rest
        return graph, first_state(params, optimizer, config.optimizer.ema), constants

    graph, state, constants = nnx.eval_shape(start)
    state = on_mesh(state, AXES)
    target_config = config.target_config
    target = on_mesh(jax.eval_shape(lambda: Llama(target_config, jax.random.key(0), dtype)), llama.AXES)
    constants = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), constants)
    rows = (config.batch_size, config.length)
    split = batch_sharding(mesh, 2)
    batch = Batch(*(jax.ShapeDtypeStruct(rows, kind, sharding=split) for kind in (jnp.int32,) * 3 + (jnp.bool_,)))
    placed = jax.tree.map(lambda x: x.sharding, state), NamedSharding(mesh, PartitionSpec())
    step = train_step(config, graph, constants, optimizer, placed)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = step.lower(state, target, batch).compile()
    memory = compiled.memory_analysis()

    def a_device(tree: Any) -> int:
        shards = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(tree)]
        return sum(math.prod(s) * x.dtype.itemsize for s, x in zip(shards, jax.tree.leaves(tree), strict=True))

    return {
        "mesh": str(shape),
        "devices": num_devices,
        "tokens_a_step": config.batch_size * config.length,
        "loss_chunk": config.loss.chunk,
        "target_bytes": a_device(target),
        "drafter_bytes": a_device(state.params),
        "optimizer_bytes": a_device(state.optimizer),
        "arguments_bytes": int(memory.argument_size_in_bytes),
        "temporaries_bytes": int(memory.temp_size_in_bytes),
        "compile_seconds": round(time.perf_counter() - began, 1),
    }


def _devices(number: int) -> list[Any]:
    """So many devices, simulated on a CPU if nothing has used one yet."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:  # in use already: what there is must do
        pass
    devices = jax.devices()
    if len(devices) < number:
        raise UserError(f"the mesh has {number} devices, and there are {len(devices)}: give the command by itself")
    return devices[:number]
