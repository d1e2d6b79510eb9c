"""Train state on disk, with Orbax: whole or not at all, the last few kept.

A checkpoint holds the drafter's parameters and constants, the optimiser's state and the step; the step alone gives
the data position and the random numbers. Beside the checkpoints a run keeps its configuration.
"""

from __future__ import annotations

import logging
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
            self._manager.save(step, args=ocp.args.StandardSave(_flat(state)))

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

    def wait(self) -> None:
        """Returns when all is written; raises what a write raised."""
        self._manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by the name of their path, in the order of jax.tree.leaves."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}
