"""Train state on disk, with Orbax: whole or not at all, the last few kept.

A checkpoint holds the drafter's parameters and constants, the optimiser's state and the step; the step alone gives
the data position and the random numbers. Beside the checkpoints a run keeps its configuration.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from fasteagle_jax.errors import UserError


class Checkpoints:
    """The checkpoints of one run folder; saves in the background. Use as a context manager."""

    def __init__(self, folder: str | Path, keep: int):
        logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax logs every file
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            Path(folder).absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Starts to write the state of `step`; one that is there already is left."""
        if step not in self._manager.all_steps():
            self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            with self._failing_as_user_error():
                self._manager.save(step, args=ocp.args.StandardSave(_flat(state)))

    def _check_room(self, size: int) -> None:
        """Raises UserError before a write that cannot end well: Orbax's own words for that are many lines long."""
        free = shutil.disk_usage(self._manager.directory).free
        if free < size:
            raise UserError(
                f"no room for a checkpoint of {size / 1e6:.0f} MB in {self._manager.directory} ({free / 1e6:.0f} MB "
                f"free): make some and give the same command again; it goes on from step {self.latest_step() or 0}"
            )

    def restore(self, step: int, like: Any) -> Any:
        """The state of `step` in the structure, dtypes and shardings of `like`; UserError where it does not fit."""
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _flat(like))
        metadata = self._manager.item_metadata(step)
        if metadata is None:
            raise UserError(f"there is no whole checkpoint {step} in {self._manager.directory}")
        there = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in metadata.tree.items()}
        here = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in wanted.items()}
        if there != here:
            name = min(set(there.items()) ^ set(here.items()))[0]
            raise UserError(
                f"checkpoint {step} in {self._manager.directory} does not fit this configuration "
                f"({name} is {there.get(name, 'absent')} instead of {here.get(name, 'absent')}): "
                "use the configuration it was made with, or another run folder"
            )
        found = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in _flat(like)])

    def is_stacked(self, step: int) -> bool:
        """Whether a drafter's levels were one stack when `step` was saved; UserError where there is no such step."""
        metadata = self._manager.item_metadata(step) if step in self._manager.all_steps() else None
        if metadata is None:
            kept = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise UserError(f"there is no checkpoint {step} in {self._manager.directory} (there are: {kept})")
        return not any("levels" in name and "[0]" in name.split("levels")[1] for name in metadata.tree)

    def wait(self) -> None:
        """Returns when all is written; UserError where it could not be."""
        with self._failing_as_user_error():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _failing_as_user_error(self) -> Iterator[None]:
        """Whatever stops Orbax from writing (a full disk, no permission), in one line."""
        try:
            yield
        except Exception as error:  # tensorstore, asyncio and the system raise many kinds, some wrapped
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
            raise UserError(
                f"cannot write a checkpoint to {self._manager.directory} ({reason}): make room there and give the same "
                f"command again; it goes on from step {self._manager.latest_step() or 0}"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self._manager.close()
        except Exception:
            if error is None:  # else it is the failed write that is being reported
                raise


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by the name of their path, in the order of jax.tree.leaves."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}
