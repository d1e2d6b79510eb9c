"""Shares of work between processes: lines or samples by number, files, and how processes find each other."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import jax

from fasteagle_jax.errors import UserError


class Share(NamedTuple):
    """This process's part of the work."""

    process: int
    processes: int

    def has(self, number: int) -> bool:
        """Whether the line or sample of this number is this process's."""
        return number % self.processes == self.process

    def of_file(self, path: Path) -> Path:
        """`path`, or this process's file beside it if there are several processes."""
        if self.processes == 1:
            return path
        return path.with_name(f"{path.stem}-{self.process:05d}-of-{self.processes:05d}{path.suffix}")


def connect(args: argparse.Namespace) -> bool:
    """Joins the other processes, if any; returns whether there are. Nothing may use a device before."""
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
    """This process's share of work that each does by itself. Nothing may use a device before."""
    if not connect(args):
        return Share(jax.process_index(), jax.process_count())
    share = Share(jax.process_index(), jax.process_count())
    # The rest is local. After a shutdown here, no process waits for the slowest at its end, or dies with another.
    jax.distributed.shutdown()
    return share
