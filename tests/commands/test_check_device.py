"""`fasteagle check-device` in its small version, on the CPU: each part, what resuming runs, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_folder import make_drafter, make_target

from fasteagle_jax.bench import device_check, device_tokens
from fasteagle_jax.commands import check_device
from fasteagle_jax.commands.check_device import NOT_LOSSLESS, PARTS, main


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of all parts, one drafter and one batch."""
    folder = tmp_path_factory.mktemp("device") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_check, "DRAFTERS", {"eagle3": device_check.DRAFTERS["eagle3"] | {"num_levels": 2}})
        patch.setattr(device_check, "RATES", (0.8, 0.7))
        patch.setattr(check_device, "SMALL", device_check.dataclasses.replace(device_check.SMALL, batches=(2,)))
        target = make_target(tmp_path_factory.mktemp("device") / "target", stop_rate=-4)
        assert main(["--output", str(folder), "--small", "--target", str(target)]) == 0
    return folder


@pytest.mark.slow
def test_the_report_has_a_row_of_everything_in_json_and_markdown(checked: Path) -> None:
    found = json.loads((checked / "report.json").read_text())
    assert found["about"]["platform"] == "cpu" and list(found["parts"]) == list(PARTS)
    rows = {name: row for part in found["parts"].values() for name, row in part.items()}
    assert not [row["error"] for row in rows.values() if "error" in row]
    cases = [row for name, row in rows.items() if name.startswith("lossless")]
    assert {row["dtype"] for row in cases} == {"float32", "bfloat16"}
    assert all(row["wrong"] == 0 and row["accepted"] > 20 for row in cases)
    rounds = [row for name, row in rows.items() if name.startswith("round")]
    assert [(row["dtype"], row["drafter"], row["nodes"]) for row in rounds] == [
        ("bfloat16", "none", 1), ("bfloat16", "eagle3", 4), ("bfloat16", "eagle3", 2),
        ("int8", "none", 1), ("int8", "eagle3", 2),
    ]  # fmt: skip
    assert all(0 < row["milliseconds_min"] <= row["milliseconds"] <= row["milliseconds_max"] for row in rounds)
    assert all(row["estimate_milliseconds"] is None for row in rounds)  # nobody knows what this CPU could
    assert all(row["tokens_a_round_and_row"] >= 1 for row in rounds)
    decode = rows["decode, batch 2, simulated"]
    assert decode["speedup"] > 0 and 1 < decode["acceptance_length"] <= 3
    assert rows["train step, eagle3"]["tokens_per_second"] > 0 and rows["train step, eagle3"]["share_of_peak"] is None
    real = [row for name, row in rows.items() if name.startswith("target")]
    assert [row["temperature"] for row in real] == [0, 1] and all(row["answers"] == 4 for row in real)
    assert all(row["wrong"] == row["not_the_cpus"] == 0 for row in real)  # it is the CPU's
    assert all(row["changed"] is None for row in real)  # no drafter comes for it
    text = (checked / "report.md").read_text()
    assert (
        all(f"\n## {name}\n" in text for name in ("lossless", "target", "rounds", "decodes", "train"))
        and "failed" not in text
    )


@pytest.mark.slow
def test_resuming_runs_what_is_missing_or_failed(
    checked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, ran = checked / "report.json", []
    whole = json.loads(path.read_text())
    cut = json.loads(path.read_text())
    del cut["parts"]["lossless"]["lossless, float32, case 0"]
    cut["parts"]["train"]["train step, eagle3"] = {"error": "RESOURCE_EXHAUSTED"}
    path.write_text(json.dumps(cut))

    def tasks(part: str) -> dict:
        return {name: lambda name=name, row=row: ran.append(name) or row for name, row in whole["parts"][part].items()}

    monkeypatch.setattr(check_device, "lossless_tasks", lambda small: tasks("lossless"))
    monkeypatch.setattr(check_device, "target_tasks", lambda name, small: tasks("target"))
    monkeypatch.setattr(check_device, "round_tasks", lambda sizes: tasks("rounds"))
    monkeypatch.setattr(check_device, "train_tasks", lambda sizes: tasks("train"))
    arguments = ["--output", str(checked), "--small", "--resume"]
    assert main([*arguments, "--minutes", "0"]) == 0
    assert ran == [] and "2 rows are left" in capsys.readouterr().err
    assert main([*arguments, "--parts", "train"]) == 0
    assert main(arguments) == 0
    assert ran == ["train step, eagle3", "lossless, float32, case 0"]
    assert json.loads(path.read_text())["parts"].keys() == whole["parts"].keys()
    whole["parts"]["lossless"]["lossless, float32, case 0"]["wrong"] = 1
    path.write_text(json.dumps(cut))
    assert main(arguments) == NOT_LOSSLESS
    assert "1 answers differ from plain decoding or the CPU's" in capsys.readouterr().err


def test_answers_that_drafting_changes_or_that_leave_the_cpus_count(tmp_path, monkeypatch, capsys) -> None:
    path = make_target(tmp_path / "target", stop_rate=-4)
    target, drafter = str(path), make_drafter(tmp_path / "drafter", path)
    own = device_tokens.answers(target, 0.0, 4, drafted=True)
    assert own["drafted"] is None and [len(answer) for answer in own["plain"]] == [4] * 4
    others = [[(token + 1) % 256 if i == 2 else token for i, token in enumerate(answer)] for answer in own["plain"]]
    monkeypatch.setattr(device_tokens, "on_cpu", lambda *_: {"plain": [*own["plain"][:3], others[3]]})
    row = device_tokens.compare(target, 0.0, 4)
    assert (row["changed"], row["not_the_cpus"], row["wrong"]) == (None, 1, 1)
    assert row["largest_gap"] > device_tokens.NEAR and row["tokens_per_second"] is None
    monkeypatch.setattr(device_tokens, "drafter_folder", lambda *_: drafter)
    with monkeypatch.context() as patch:
        patch.setattr(device_tokens, "NEAR", row["largest_gap"] + 1)
        row = device_tokens.compare(target, 0.0, 4)
        assert (row["changed"], row["wrong"]) == (0, 0) and row["tokens_per_second"] > 0
    monkeypatch.setattr(device_tokens, "on_cpu", lambda *_: own)
    monkeypatch.setattr(device_tokens, "answers", lambda *_, **__: own | {"drafted": others})
    row = device_tokens.compare(target, 0.0, 4)
    assert (row["changed"], row["not_the_cpus"], row["wrong"]) == (4, 0, 4)

    monkeypatch.setattr(device_tokens, "is_at_hand", lambda name: False)
    assert device_tokens.target_tasks("smollm2-135m", small=True) == {}
    assert "smollm2-135m is not on this machine: the part `target` is left out" in capsys.readouterr().err


def test_a_row_that_fails_says_why_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand many lines more")

    monkeypatch.setattr(check_device, "round_tasks", lambda sizes: {"a": fail, "b": lambda: {"batch": 1}})
    assert main(["--output", str(tmp_path / "new"), "--parts", "rounds"]) == 0
    rows = json.loads((tmp_path / "new" / "report.json").read_text())["parts"]["rounds"]
    assert rows["a"]["error"] == "RESOURCE_EXHAUSTED: out of memory" and rows["b"]["batch"] == 1
    assert "- a: RESOURCE_EXHAUSTED" in (tmp_path / "new" / "report.md").read_text()


def test_mistakes_are_one_line(tmp_path: Path, complaint) -> None:
    there, other = tmp_path / "there", tmp_path / "other"
    there.mkdir()
    assert f"{there} exists: name another --output, or give --resume" in complaint(main, "--output", str(there))
    assert "report.json is not there" in complaint(main, "--output", str(there), "--resume")
    other.mkdir()
    (other / "report.json").write_text('{"about": {"device": "abacus"}, "parts": {}}')
    assert "is of device 'abacus'" in complaint(main, "--output", str(other), "--resume")
    (other / "report.json").write_text("[]")
    assert "is damaged" in complaint(main, "--output", str(other), "--resume")
    assert "'speed' is not one of lossless, target, rounds, train" in complaint(
        main, "--output", "x", "--parts", "speed"
    )
