"""Checkpoints: the last ones and the best are kept, old ones are read, and what is half written is none."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from fasteagle_jax.errors import UserError
from fasteagle_jax.training.checkpoints import Checkpoints, _flat, newest_record


def state_of(step: int) -> dict[str, jax.Array]:
    """A small state."""
    return {"w": jnp.full((3, 2), step, jnp.float32), "step": jnp.int32(step)}


def written(folder: Path, lengths: dict[int, float | None], keep: int = 2) -> list[int]:
    """The steps that are left after saving these, with the acceptance lengths measured."""
    with Checkpoints(folder, keep) as checkpoints:
        for step, tau in lengths.items():
            checkpoints.save(step, state_of(step), {"step": step}, tau)
        checkpoints.wait()
        return checkpoints.steps()


def test_the_best_is_kept_besides_the_last(tmp_path: Path) -> None:
    assert written(tmp_path, {1: 1.2, 2: 2.5, 3: 2.4, 4: None, 5: None}) == [2, 4, 5]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best() == (2, 2.5) and checkpoints.latest_step() == 5
    assert written(tmp_path, {6: 2.6, 7: None, 8: None}) == [6, 7, 8]


def test_an_acceptance_length_measured_later_counts_for_the_best(tmp_path: Path) -> None:
    written(tmp_path, {1: 1.2, 2: None})
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.set_tau(2, 2.5)
        assert checkpoints.best() == (2, 2.5)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(2, state_of(0)), state_of(2))
        for step in (3, 4, 5):
            checkpoints.save(step, state_of(step), {"step": step}, 2.4 if step == 3 else None)
        checkpoints.wait()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 4, 5] and checkpoints.best() == (2, 2.5)


def test_without_a_measurement_the_last_are_kept_and_none_is_best(tmp_path: Path) -> None:
    assert written(tmp_path, dict.fromkeys(range(1, 6))) == [4, 5]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best() is None


def test_orbax_is_silenced_only_while_checkpoints_are_open(tmp_path: Path) -> None:
    log = logging.getLogger("absl")
    before = log.level
    with Checkpoints(tmp_path, 2), Checkpoints(tmp_path):
        assert log.level == logging.CRITICAL
    assert log.level == before != logging.CRITICAL


def test_a_checkpoint_holds_its_record(tmp_path: Path) -> None:
    assert newest_record(epath.Path(tmp_path / "absent")) is None
    assert newest_record(epath.Path(tmp_path)) is None
    written(tmp_path, {3: None})
    assert newest_record(epath.Path(tmp_path)) == {"step": 3}


def test_a_checkpoint_of_before_there_were_records_is_read_and_followed(tmp_path: Path) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    with ocp.CheckpointManager(tmp_path, options=options, item_handlers=ocp.StandardCheckpointHandler()) as old:
        old.save(7, args=ocp.args.StandardSave(_flat(state_of(7))))
        old.wait_until_finished()
    assert newest_record(epath.Path(tmp_path)) is None
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 7 and checkpoints.best() is None
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(7, state_of(0)), state_of(7))
        checkpoints.save(8, state_of(8), {"step": 8})
        checkpoints.wait()
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(8, state_of(0)), state_of(8))
        assert checkpoints.steps() == [7, 8] and checkpoints.record(8) == {"step": 8}


@pytest.mark.parametrize(
    ("like", "said"),
    [
        ({"w": jnp.zeros((3, 3)), "step": jnp.int32(0)}, r"'w'\] is \(\(3, 2\), 'float32'\) instead of \(\(3, 3\)"),
        ({"w": jnp.zeros((3, 2), jnp.bfloat16), "step": jnp.int32(0)}, "'float32'.* instead of .*'bfloat16'"),
        ({"w": jnp.zeros((3, 2))}, r"'step'\] is .* instead of absent"),
        ({"w": jnp.zeros((3, 2)), "step": jnp.int32(0), "v": jnp.zeros(1)}, r"'v'\] is absent instead of"),
    ],
)
def test_another_shape_dtype_or_leaf_is_refused_in_one_line(tmp_path: Path, like: object, said: str) -> None:
    written(tmp_path, {1: None})
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=said) as error:
        checkpoints.restore(1, like)
    assert "\n" not in str(error.value) and "another run folder" in str(error.value)


def test_what_a_killed_run_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    written(tmp_path, {1: None, 2: None})
    torn = tmp_path / "3.orbax-checkpoint-tmp"
    (torn / "default").mkdir(parents=True)
    with Checkpoints(tmp_path) as reader:  # which leaves a running training's folder alone
        assert reader.latest_step() == 2
    assert torn.exists()
    assert written(tmp_path, {3: None}) == [2, 3]
    assert not torn.exists()


def test_a_damaged_checkpoint_is_named_with_the_one_before(tmp_path: Path) -> None:
    # Of one array: where several reads fail, Orbax has closed its event loop when tensorstore tells it of the second.
    state = {"w": jnp.ones((3, 2))}
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {"step": step})
        checkpoints.wait()
    for file in (tmp_path / "2" / "default").rglob("*"):
        if file.is_file() and not file.name.startswith("_"):
            file.write_bytes(b"")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="remove the folder 2 .* step 1") as error:
        checkpoints.restore(2, state)
    assert "\n" not in str(error.value)


def test_damaged_metadata_is_one_line(tmp_path: Path) -> None:
    written(tmp_path, {1: 1.5})
    (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text('{"performance_metrics": 7}')
    before = logging.getLogger("absl").level, sys.excepthook
    with pytest.raises(UserError, match="damaged") as error:
        Checkpoints(tmp_path)
    assert "\n" not in str(error.value)
    assert (logging.getLogger("absl").level, sys.excepthook) == before


def test_an_array_that_its_metadata_leaves_out_is_one_line(tmp_path: Path) -> None:
    written(tmp_path, {1: None})
    file = tmp_path / "1" / "default" / "_METADATA"
    metadata = json.loads(file.read_text())
    next(iter(metadata["tree_metadata"].values()))["value_metadata"]["skip_deserialize"] = "a"
    file.write_text(json.dumps(metadata))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="checkpoint 1 in .* is damaged") as error:
        checkpoints.restore(1, state_of(1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"tau": null}', b"\xff"])
def test_a_damaged_measurement_is_none_and_closes_no_other_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    """An empty file in an old checkpoint ended training and export of every other one in a traceback."""
    written(tmp_path, {1: 2.5, 2: 1.5, 3: 2.0})
    (tmp_path / "1" / "metrics" / "metrics").write_bytes(damage)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best() == (3, 2.0) and checkpoints.record(3) == {"step": 3}
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(3, state_of(0)), state_of(3))
    assert caplog.text.count("damaged file of its acceptance length") == 1
    assert newest_record(epath.Path(tmp_path)) == {"step": 3}
    assert written(tmp_path, {4: 1.0}) == [3, 4]
