"""Compile a run's programs from shapes alone and say what a device needs: no weights, no data, no accelerator.

With --topology the compiler is that of the slice's TPU (libtpu, which runs on any Linux machine) or of the GPU;
without, the devices are simulated CPU devices, as many as the mesh has, and a TPU's or GPU's compiler may need somewhat
more or less.
docs/tpu.md explains the figures.

examples:
  fasteagle compile --config llama31_8b --topology v5e:2x4
  fasteagle compile --config llama31_8b --topology v6e:2x4 --program decode --batch 32 --tree plain
  fasteagle compile --config llama31_8b loss.chunk=16384    # simulated; the loss at all positions at once
  fasteagle compile --table runs/compiled    # the targets of docs/tpu.md on its slices; the same command resumes
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fasteagle_jax.commands.terminal import Parser, program, whole
from fasteagle_jax.compiling.programs import PROGRAMS, Decoding, Report, compile_program
from fasteagle_jax.compiling.published import PUBLISHED
from fasteagle_jax.compiling.table import table
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.devices import topology
from fasteagle_jax.devices.chips import GIB
from fasteagle_jax.devices.sharding import MeshShape
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import check_new, write_new
from fasteagle_jax.training.config import apply_changes, load_config


@functools.partial(program, keeps_compiled=False)  # compiling is what it measures
def main(argv: Sequence[str] | None = None) -> int:
    """Compiles as the command line says; returns the exit code."""
    parser = Parser(prog="fasteagle compile", description=__doc__)
    parser.add_argument("--config", help=f"a Python file with get_config() -> RunConfig, or {', '.join(PUBLISHED)}")
    parser.add_argument(
        "--table", type=Path, metavar="FOLDER", help="compile the table of docs/tpu.md, what is not in the folder yet"
    )
    parser.add_argument("--topology", metavar="SLICE", help="e.g. v5e:2x4, or h100; default: simulated devices")
    parser.add_argument(
        "--program", type=_programs, default=PROGRAMS, metavar="P", help="of prefill,decode,train (default: all)"
    )
    parser.add_argument(
        "--devices", type=whole(1), metavar="N", help="simulated ones; default: as many as the mesh has"
    )
    parser.add_argument("--mesh", metavar="D,F,T", help="data, fsdp and tensor; default: see docs/tpu.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a new file for the numbers")
    group = parser.add_argument_group("decoding")
    group.add_argument("--batch", type=whole(1), default=1, metavar="B", help="rows (default 1)")
    group.add_argument("--tree", default="best_first:60", metavar="T", help="or plain (default best_first:60)")
    group.add_argument("--cache", type=whole(2), default=2048, metavar="S", help="slots a row (default 2048)")
    group.add_argument(
        "--cache-dtype", choices=("int8",), default="", help="of the target's cache; default the weights'"
    )
    parser.add_argument("changes", nargs="*", metavar="key=value", help="as of fasteagle train")
    args = parser.parse_args(argv)
    if args.table:
        print(table(args.table))
        return 0
    if not args.config:
        raise UserError(f"no configuration: give --config, e.g. {next(iter(PUBLISHED))}")
    check_new(args.json)
    config = apply_changes(PUBLISHED.get(args.config) or load_config(args.config), args.changes)
    tree = None if args.tree == "plain" else TreeSpec.parse(args.tree)
    decoding = Decoding(args.batch, tree, args.cache, min(256, args.cache // 4), args.cache_dtype)
    mesh = None if args.mesh is None else MeshShape.parse(args.mesh)
    if args.topology:
        jax.config.update("jax_platforms", "cpu")  # nothing runs: no plugin is to look for an accelerator or take it
        devices = topology.devices(args.topology)
    else:
        devices = simulated_devices(args.devices or _size(mesh or config.mesh or MeshShape(1, 1, 1)))
    reports = []
    for name in args.program:
        reports.append(compile_program(config, name, devices, decoding, mesh))
        print(describe(reports[-1]))
    if args.json:
        write_new(args.json, json.dumps([report.to_json() for report in reports], indent=2) + "\n")
    return 0


def describe(report: Report) -> str:
    """The Report in lines to be read."""
    r, gib = report, lambda size: f"{size / GIB:.2f} GiB"
    lines = [
        f"{r.program}: {r.shapes}; {r.devices} x {r.device_kind}, {r.mesh}; compiled in {r.compile_seconds:.0f} s",
        "  weights      " + ", ".join(f"{name} {gib(size)}" for name, size in r.weights.items()),
        f"  caches       {gib(r.caches)}",
        f"  temporaries  {gib(r.temporaries)}",
        f"  peak         {gib(r.peak)}" + (f" of {gib(r.hbm)}: {r.peak / r.hbm:.0%}" if r.hbm else ""),
        f"  moved        {r.cost.bytes / 1e9:.3f} GB, {r.bytes_ratio:.2f} of the ideal {r.ideal_bytes / 1e9:.3f} GB",
        f"  products     {r.cost.product_flops / 1e9:.1f} GFLOP, "
        f"{r.cost.product_flops / r.necessary_flops:.2f} of the necessary {r.necessary_flops / 1e9:.1f}",
    ]
    if r.experts is not None:
        lines.append(
            f"  experts      {r.experts:.1f} of a layer's read a device, were all chosen alike and independently"
        )
    for kind, own in r.cost.collectives.items():
        lines.append(f"  {kind:12} {own.number:.0f}, {own.bytes / 1e6:.2f} MB")
    if r.estimate is not None:
        parts = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in r.seconds.items())
        lines.append(f"  estimate     {1e3 * r.estimate:.2f} ms, bound by {r.bound} ({parts})")
    if r.latency is not None and r.estimate_with_latency is not None:
        each = f"{r.cost.kernels:.0f} kernels, {1e6 * r.latency / max(r.cost.kernels, 1):.2f} us each"
        lines.append(f"  with latency {1e3 * r.estimate_with_latency:.2f} ms ({each})")
    if r.state_layout_stable is False:
        lines.append("  state        comes out otherwise than it goes in: the next call compiles or lays out anew")
    if r.cost.host_calls:
        lines.append(f"  host         {r.cost.host_calls} calls to the host in the program")
    return "\n".join(lines)


# --- words of the command line ----------------------------------------------------------------------------------


def simulated_devices(number: int) -> list[Any]:
    """So many CPU devices, simulated if nothing has used one yet."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:  # in use already: what there is must do
        pass
    devices = jax.devices()
    if len(devices) < number:
        raise UserError(f"the mesh has {number} devices, and there are {len(devices)}: give the command by itself")
    return devices[:number]


def _size(mesh: MeshShape) -> int:
    return math.prod(n for n in (mesh.data, mesh.fsdp, mesh.tensor) if n > 0)


def _programs(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in PROGRAMS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(PROGRAMS)}")
    return names
