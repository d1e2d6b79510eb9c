"""Train state on disk, with Orbax: whole or not at all, the last few kept and the best one.

A checkpoint holds the drafter's parameters and constants, the optimiser's state, the average and the step, and beside
them a record in JSON: the run's configuration, the target's fingerprint, the seed and the data's position. The step
alone gives the random numbers. Checkpoints that are older than records are read as well.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line, write_file

STATE, RECORD = "default", "run"  # items of a checkpoint; the state's name is Orbax's for one without others
TAU = "tau"  # the metric by which one is best: the measured acceptance length
_OF_SYSTEM = re.compile(r": ([^:\[\]]+) \[os_error_code=")  # at the end of hundreds of characters

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run folder; saves in the background. Use as a context manager.

    `keep` last ones are kept, and the one of the highest acceptance length; None opens the folder for reading alone and
    changes nothing in it.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int | None = None):
        # Orbax logs every file, warns of intended settings, and tells of a failed write several times, which is told
        # here in one line; __exit__ restores the level.
        self._log, self._log_level = (absl := logging.getLogger("absl")), absl.level
        absl.setLevel(logging.CRITICAL)
        # tensorstore tells the second failure of a write to Orbax's event loop, which the first one has closed.
        self._excepthook, self._has_failed = sys.excepthook, False
        sys.excepthook = _but_closed_loops(sys.excepthook)
        if keep is None:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
        else:
            best = BestN(get_metric_fn=_tau, n=1, keep_checkpoints_without_metrics=False)
            options = ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
                best_fn=_tau,
                cleanup_tmp_directories=True,  # what a killed run left half written
            )
        try:
            self._manager = _Manager(
                epath.Path(os.fspath(folder)).resolve(),
                options=options,
                item_handlers={STATE: ocp.StandardCheckpointHandler(), RECORD: ocp.JsonCheckpointHandler()},
            )
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # of what a checkpoint's metadata says
            absl.setLevel(self._log_level)
            sys.excepthook = self._excepthook
            raise UserError(
                f"a checkpoint in {folder} is damaged ({_reason(error)}): remove its folder to resume from an older one"
            ) from error

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint; None if there is none."""
        return self._manager.latest_step()

    def best(self) -> tuple[int, float] | None:
        """The step and acceptance length of the best checkpoint; None if none was measured."""
        measured = {step: self._manager.metrics(step) for step in self.steps()}
        lengths = {step: float(metrics[TAU]) for step, metrics in measured.items() if metrics}
        return max(lengths.items(), key=lambda item: (item[1], item[0])) if lengths else None

    def save(self, step: int, state: Any, record: dict[str, Any], tau: float | None = None) -> None:
        """Starts to write the state of `step`, with its acceptance length if measured; an existing one is kept."""
        if step not in self._manager.all_steps():
            self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            items = {STATE: ocp.args.StandardSave(_flat(state)), RECORD: ocp.args.JsonSave(record)}
            with self._failing_as_user_error():
                self._manager.save(step, args=ocp.args.Composite(**items), metrics=None if tau is None else {TAU: tau})

    def set_tau(self, step: int, tau: float) -> None:
        """Adds the acceptance length of a checkpoint that was saved without; all processes must call it together."""
        if jax.process_index() == 0:
            # Orbax's place for a checkpoint's metrics; its own save would delete the checkpoint and write it again.
            with self._failing_as_user_error():
                write_file(self._manager.directory / str(step) / "metrics" / "metrics", json.dumps({TAU: tau}))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"acceptance length of step {step}")
        self._manager.reload()

    def record(self, step: int) -> dict[str, Any] | None:
        """The record saved beside the state of `step`; None for a checkpoint that is older than records."""
        if not (self._manager.directory / str(step) / RECORD).exists():
            return None
        with self._failing_to_read(step):
            return self._manager.restore(step, args=ocp.args.Composite(**{RECORD: ocp.args.JsonRestore()}))[RECORD]

    def _check_room(self, size: int) -> None:
        """Raises UserError for a checkpoint that the disk has no room for: Orbax's own error is many lines long."""
        if "://" in os.fspath(self._manager.directory):
            return  # a bucket
        free = shutil.disk_usage(self._manager.directory).free
        if free < size:
            raise UserError(
                f"no room for a checkpoint of {size / 1e6:.0f} MB in {self._manager.directory} ({free / 1e6:.0f} MB "
                f"free): make some and give the same command again; it resumes from step {self._latest_whole()}"
            )

    def restore(self, step: int, like: Any) -> Any:
        """The state of `step` in the structure, dtypes and shardings of `like`; UserError if it does not fit."""
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _flat(like))
        there = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in self._leaves(step).items()}
        here = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in wanted.items()}
        if there != here:
            name = min(set(there.items()) ^ set(here.items()))[0]
            raise UserError(
                f"checkpoint {step} in {self._manager.directory} does not fit this configuration "
                f"({name} is {there.get(name, 'absent')} instead of {here.get(name, 'absent')}): "
                "use the configuration that it was saved with, or another run folder; of a run of an older version, "
                "export the drafter with that version, and start from it (drafter.start)"
            )
        with self._failing_to_read(step):
            found = self._manager.restore(step, args=ocp.args.Composite(**{STATE: ocp.args.StandardRestore(wanted)}))
        return jax.tree.unflatten(jax.tree.structure(like), [found[STATE][name] for name in _flat(like)])

    def is_stacked(self, step: int) -> bool:
        """Whether a drafter's levels were one stack when `step` was saved; UserError if there is no such step."""
        return not any("levels" in name and "[0]" in name.split("levels")[1] for name in self._leaves(step))

    def _leaves(self, step: int) -> dict[str, Any]:
        """Shape and dtype of each leaf of the state of `step`; UserError if there is no such step."""
        if step in self._manager.all_steps():
            with self._failing_to_read(step):
                metadata = self._manager.item_metadata(step)[STATE]
                if metadata is not None:
                    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in metadata.tree.items()}
        kept = ", ".join(map(str, self.steps())) or "none"
        raise UserError(f"there is no checkpoint {step} in {self._manager.directory} (there are: {kept})")

    def wait(self) -> None:
        """Waits until all is written; UserError if it could not be."""
        with self._failing_as_user_error():
            self._manager.wait_until_finished()

    def _latest_whole(self) -> int:
        """The step of the newest checkpoint on the disk, where a failed one never is; 0 if there is none."""
        return max(ocp.utils.checkpoint_steps(self._manager.directory), default=0)

    @contextlib.contextmanager
    def _failing_as_user_error(self) -> Iterator[None]:
        """Raises UserError, of one line, for whatever stops Orbax from writing (a full disk, no permission)."""
        try:
            yield
        except Exception as error:  # tensorstore, asyncio and the system raise many kinds, some wrapped
            self._has_failed = True
            raise UserError(
                f"cannot write a checkpoint to {self._manager.directory} ({_reason(error)}): make room there and give "
                f"the same command again; it resumes from step {self._latest_whole()}"
            ) from error

    @contextlib.contextmanager
    def _failing_to_read(self, step: int) -> Iterator[None]:
        """Raises UserError, of one line, for whatever stops Orbax from reading `step`."""
        try:
            yield
        except Exception as error:
            earlier = [kept for kept in self.steps() if kept < step]
            raise UserError(
                f"checkpoint {step} in {self._manager.directory} is damaged ({_reason(error)}): "
                f"remove the folder {step} to resume from {f'step {earlier[-1]}' if earlier else 'the start'}"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self._manager.close()
        except Exception:
            if error is None:  # else it is the failed write that is being reported
                raise
        finally:
            self._log.setLevel(self._log_level)
            if not self._has_failed:  # else the complaint may still come
                sys.excepthook = self._excepthook


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, for which a damaged measurement is none: one bad file would close the whole folder."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._damaged: set[int] = set()
        super().__init__(*args, **kwargs)

    def metrics(self, step: int) -> Any:
        """The measurements of a step; None, with a warning, if they cannot be read."""
        try:
            found = super().metrics(step)
            if found is not None:
                float(found[TAU])
            return found
        except (ValueError, KeyError, TypeError, RecursionError):
            if step not in self._damaged:
                self._damaged.add(step)
                log.warning("%s/%d has a damaged file of its acceptance length: as not measured", self.directory, step)
            return None


def _but_closed_loops(hook: Any) -> Any:
    """An excepthook that leaves out the library's complaint of an event loop that it has closed itself."""

    def filtered(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not (isinstance(error, RuntimeError) and "Event loop is closed" in str(error)):
            hook(kind, error, trace)

    return filtered


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by the name of their path, in the order of jax.tree.leaves."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def _tau(metrics: Any) -> float:
    return float(metrics[TAU])


def _reason(error: BaseException) -> str:
    """The first line of the error that caused the others; of the system's errors that tensorstore tells, their text."""
    while error.__cause__ is not None:
        error = error.__cause__
    of_system = _OF_SYSTEM.search(str(error))
    return of_system[1] if of_system else first_line(error)[:200]


def newest_record(folder: epath.Path) -> dict[str, Any] | None:
    """The record of the newest checkpoint in a folder that need not exist; None if there is none."""
    if not folder.is_dir():
        return None
    with Checkpoints(folder) as checkpoints:
        latest = checkpoints.latest_step()
        return None if latest is None else checkpoints.record(latest)
