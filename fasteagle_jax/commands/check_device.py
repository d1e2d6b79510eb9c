"""Check and measure this machine's device, a GPU, a TPU or a CPU: nothing is fetched, weights are random.

Four parts: `lossless` holds speculative to plain decoding with small models, every token in float32 and all but
near-ties in bfloat16; `target` does so with a real target in float32, if its weights are on this machine, and compares
its answers with the CPU's; `rounds` times decode rounds at the sizes of LLaMA-3.1-8B (of fewer layers if the device is
small), plain and with each drafter, by batch and nodes, in bfloat16 and some in int8, beside what `fasteagle compile`
would estimate, and whole decodes with simulated acceptance; `train` times train steps. All on the first device.

OUTPUT/report.json gets each row as soon as it is measured, OUTPUT/report.md shows them. With --resume the same command
runs what is missing or failed.

examples:
  fasteagle check-device --output runs/device
  fasteagle check-device --output runs/device --resume --minutes 30    # what 8 minutes had no room for
  fasteagle check-device --output runs/device-small --small --parts lossless
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from fasteagle_jax.bench.device_check import FULL, SMALL, Row, Task, lossless_tasks, report, round_tasks, train_tasks
from fasteagle_jax.bench.device_tokens import target_tasks
from fasteagle_jax.commands.terminal import Parser, program
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line, write_text, writing
from fasteagle_jax.targets.loading import DEFAULT_TARGET

PARTS = ("lossless", "target", "rounds", "train")
NOT_LOSSLESS = 1  # exit code


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Checks as the command line says; returns the exit code, NOT_LOSSLESS if an answer was wrong."""
    args = _parser().parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    path = args.output / "report.json"
    about = _about(args.small)
    parts = _begin(args.output, path, about, resume=args.resume)
    sizes = SMALL if args.small else FULL
    makers: dict[str, Callable[[], dict[str, Task]]] = {
        "lossless": lambda: lossless_tasks(args.small),
        "target": lambda: target_tasks(args.target, args.small),
        "rounds": lambda: round_tasks(sizes),
        "train": lambda: train_tasks(sizes),
    }
    num_left = 0
    for name in args.parts:
        num_left += _run(makers[name](), parts.setdefault(name, {}), deadline, lambda: _write(path, about, parts))
    text = report(about, parts)
    write_text(args.output / "report.md", text)
    print(text)
    rest = f"; {num_left} rows are left: --resume runs them" if num_left else ""
    print(f"written: {path} and report.md beside it{rest}", file=sys.stderr)
    wrong = sum(row.get("wrong", 0) for part in parts.values() for row in part.values())
    if wrong:
        print(f"{wrong} answers differ from plain decoding or the CPU's: this device is not lossless", file=sys.stderr)
    return NOT_LOSSLESS if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fasteagle check-device", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="a new one for the report")
    parser.add_argument("--resume", action="store_true", help="go on with the report in that folder")
    parser.add_argument(
        "--parts", type=_parts, default=PARTS, metavar="P", help=f"of {','.join(PARTS)} (default: all, in this order)"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, metavar="M", help="begin no row after so many (default %(default)g)"
    )
    parser.add_argument("--target", default=DEFAULT_TARGET, metavar="T", help="of that part (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="small models, which say nothing of speed")
    return parser


def _about(small: bool) -> Row:
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("fasteagle-jax", "jax", "jaxlib")}
    return {"device": device.device_kind, "platform": device.platform, "small": small} | versions


def _begin(folder: Path, path: Path, about: Row, *, resume: bool) -> dict[str, dict[str, Row]]:
    """The rows that there are by part; UserError for a folder that exists, or to resume one of something else."""
    if not resume:
        if folder.exists():
            raise UserError(f"{folder} exists: name another --output, or give --resume to go on with its report")
        with writing(folder):
            folder.mkdir(parents=True)
        return {}
    if not path.exists():
        raise UserError(f"{path} is not there: leave out --resume, and name a new --output")
    try:
        old: Any = json.loads(path.read_text())
        parts = dict(old["parts"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): name a new --output") from error
    if differ := [f"{name} {old['about'].get(name)!r}" for name in about if old["about"].get(name) != about[name]]:
        raise UserError(f"{path} is of {', '.join(differ)}: name a new --output for this device and program")
    return parts


def _run(tasks: dict[str, Task], rows: dict[str, Row], deadline: float, save: Callable[[], None]) -> int:
    """Adds the rows that are missing or failed, until the deadline; returns how many are left."""
    missing = [name for name in tasks if name not in rows or "error" in rows[name]]
    for i, name in enumerate(missing):
        if time.monotonic() > deadline:
            return len(missing) - i
        started = time.monotonic()
        try:
            row = tasks[name]()
        except (
            RuntimeError,
            ValueError,
            TypeError,
            NotImplementedError,
        ) as error:  # XLA's, and of what a backend lacks
            row = {"error": first_line(error)[:300]}
        rows[name] = row | {"took_seconds": round(time.monotonic() - started, 1)}
        save()
        print(f"{name}: {row.get('error', 'done')}", file=sys.stderr)
    return 0


def _write(path: Path, about: Row, parts: dict[str, dict[str, Row]]) -> None:
    with writing(path):
        write_text(path, json.dumps({"about": about, "parts": parts}, indent=1) + "\n")


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(PARTS)}")
    return names
