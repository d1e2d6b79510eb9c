"""The record of a run: the file, what TensorBoard and W&B are told, and the estimate of the acceptance length."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from etils import epath

from fasteagle_jax.errors import UserError
from fasteagle_jax.training.metrics_log import Log, expected_length, plot, scalars


def record(step: int, **more: object) -> dict:
    """What the trainer writes of a step, in short."""
    return {"step": step, "loss": 2.0 / step, "accuracy": [0.5, 0.25], "level_loss": [1.0, None], "tokens": 8} | more


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Name: (step, value) of all scalars in TensorBoard's files: length, its checksum, an Event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event  # imports torch where there is one

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.*")):
        raw = path.read_bytes()
        while raw:
            size = struct.unpack("<Q", raw[:8])[0]
            event = Event.FromString(raw[12 : 12 + size])
            raw = raw[16 + size :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_the_estimate_is_the_mean_length_of_a_chain_of_independent_guesses() -> None:
    assert expected_length([0.5, 0.5]) == 1 + 0.5 + 0.25
    assert expected_length([0.0, 1.0]) == 1 and expected_length([1.0] * 7) == 8
    assert expected_length([0.5, None]) is None


def test_lists_become_one_number_a_level_and_what_is_not_finite_none() -> None:
    found = scalars(
        record(3) | {"tau best_first:16": 2.5, "by depth best_first:16": [0.75, None], "skipped": [[1], [2]]}
    )
    assert found == {
        "train/loss": pytest.approx(2 / 3),
        "train/accuracy/level_1": 0.5,
        "train/accuracy/level_2": 0.25,
        "train/level_loss/level_1": 1.0,
        "train/tokens": 8.0,
        "eval/tau_best_first_16": 2.5,
        "eval/by_depth_best_first_16/depth_1": 0.75,
    }


def test_the_file_is_the_record_up_to_the_checkpoint_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Log(epath.Path(tmp_path), 0) as log:
        for step in (1, 2, 3):
            log.write(record(step))
        log.amend({"tau chain": 1.5})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [record(1), record(2), record(3) | {"tau chain": 1.5}]
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    with Log(epath.Path(tmp_path), 2) as log:
        assert log.records == [record(1), record(2)]
        log.write(record(3, loss=1.0))
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [2.0, 1.0, 1.0]


def test_tensorboard_shows_every_number(tmp_path: Path) -> None:
    for start in (0, 2):
        with Log(epath.Path(tmp_path), start, tensorboard=True) as log:
            log.write(record(start + 1))
            log.write(record(start + 2, **{"tau chain": 1.25}))
    found = events(tmp_path / "tensorboard")
    assert found["eval/tau_chain"] == [(2, 1.25), (4, 1.25)]
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4]
    assert found["train/accuracy/level_2"][0] == (1, 0.25)


def test_wandb_gets_the_same_numbers_in_one_run_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, logged = [], []

    def init(**options: object) -> SimpleNamespace:
        started.append(options)
        return SimpleNamespace(
            log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for start in (0, 1):
        with Log(epath.Path(tmp_path), start, wandb="drafters", config={"steps": 2}) as log:
            log.write(record(start + 1))
    assert logged == [(1, scalars(record(1))), "finished", (2, scalars(record(2))), "finished"]
    assert started[0] == started[1]
    assert started[0]["project"] == "drafters" and started[0]["config"] == {"steps": 2}


def test_wandb_asked_for_and_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb=drafters asks for .* pip install wandb"):
        Log(epath.Path(tmp_path), 0, wandb="drafters")


def test_a_run_with_skipped_steps_is_drawn(tmp_path: Path) -> None:
    records = [record(1), record(2, loss=None, accuracy=[None, None], skipped=[[3]]), record(3, **{"tau chain": 2.0})]
    plot(records, epath.Path(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
