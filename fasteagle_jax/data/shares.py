"""Several processes that share a file's work: which of it is whose, where each writes, and how they meet."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import jax

from fasteagle_jax.errors import UserError


class Share(NamedTuple):
    """The part of the work that is this process's."""

    process: int
    processes: int

    def has(self, number: int) -> bool:
        """Whether the line or sample of this number is its."""
        return number % self.processes == self.process

    def of_file(self, path: Path) -> Path:
        """`path`, or the process's own beside it where there are several."""
        if self.processes == 1:
            return path
        return path.with_name(f"{path.stem}-{self.process:05d}-of-{self.processes:05d}{path.suffix}")


def connect(args: argparse.Namespace) -> bool:
    """Whether there are other processes, which this one has then joined. Nothing that uses a device may come before."""
    asked = (args.coordinator, args.num_processes, args.process_id)
    if not args.distributed and all(value is None for value in asked):
        return False
    try:
        jax.distributed.initialize(*asked)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the other processes ({error}): give --coordinator, --num-processes and --process-id"
        ) from error
    return True


def join(args: argparse.Namespace) -> Share:
    """This process's share of work that each does by itself. Nothing that uses a device may come before."""
    if not connect(args):
        return Share(jax.process_index(), jax.process_count())
    share = Share(jax.process_index(), jax.process_count())
    # All that follows is local. Shut down now, no process waits for the slowest at its end, or dies with another.
    jax.distributed.shutdown()
    return share
