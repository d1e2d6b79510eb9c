"""The trainer as a program: it learns, resumes bitwise after any kill, and refuses what cannot go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from fasteagle_jax.commands.train_drafter import main
from fasteagle_jax.data import Conversation, ConversationWriter
from tests.tiny_folder import make_target

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "configs" / "tiny.py"


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Forty conversations in which a token is followed by the next one."""
    path = tmp_path / "data.jsonl"
    rng = np.random.default_rng(0)
    samples = []
    for i in range(40):
        tokens = [int(t) for t in (rng.integers(256) + np.arange(rng.integers(20, 60))) % 256]
        samples.append(Conversation.of(f"sample-{i}", tokens, [[4, len(tokens)]]))
    with ConversationWriter(path) as writer:
        writer.append(samples)
    return path


def command(target: Path, data: Path, run: Path, *changes: str) -> list[str]:
    """The program's arguments."""
    return ["--config", str(CONFIG), "--run", str(run), f"target={target}", f"data={data}", *changes]


def start(arguments: list[str], largest_file: int | None = None) -> subprocess.Popen[str]:
    """The program in a process of its own, in the arithmetic of this one; files may have `largest_file` bytes."""
    script = "import sys; from fasteagle_jax.commands.train_drafter import main; sys.exit(main(sys.argv[1:]))"
    if largest_file is not None:  # a write past the limit then fails as on a full disk
        limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest_file}, {largest_file}))"
        script = f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); {limit}; {script}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step, as written."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return {record["step"]: (record["loss"], record["gradient_norm"]) for record in records}


def test_training_lowers_the_loss_and_leaves_a_drafter_metrics_and_a_plot(data_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    talker = make_target(tmp_path / "talker", stop_rate=-9.0)  # its greedy answers do not end with their first token
    evaluation = tmp_path / "questions.jsonl"
    evaluation.write_text("".join(json.dumps({"prompt": "Why " + "so " * i + "long?"}) + "\n" for i in range(8)))
    changes = ["steps=30", f"evaluation.prompts={evaluation}", "evaluation.every=15", "evaluation.max_new=8"]
    assert main(command(talker, data_file, run, *changes)) == 0
    loss = [value for value, _ in losses(run).values()]
    assert np.mean(loss[-3:]) < 0.8 * np.mean(loss[:3])
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "drafter" / "config.json").read_text())["trained"]["steps"] == 30
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tau chain"] >= 1 and len(last["by depth best_first:16"]) == 3


def test_a_killed_run_goes_on_bitwise(target_folder: Path, data_file: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command(target_folder, data_file, whole)) == 0
    for kill_after in (2, 7):  # before the first checkpoint (step 4), and between the first two
        process = start(command(target_folder, data_file, killed))
        metrics = killed / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= kill_after:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert main(command(target_folder, data_file, killed)) == 0
    assert losses(killed) == losses(whole)
    first, second = (load_file(run / "drafter" / "model.safetensors") for run in (whole, killed))
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_the_draft_vocabulary_is_of_the_most_frequent_tokens_of_the_corpus_named(
    target_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    with ConversationWriter(corpus) as writer:
        writer.append([Conversation.of("a", [1, 7, 7, 9, 9, 9, 200], [[1, 7]])])
    changes = ["steps=1", "drafter.draft_vocab_size=3", f"drafter.vocabulary_data={corpus}"]
    assert main(command(target_folder, data_file, tmp_path / "run", *changes)) == 0
    saved = load_file(tmp_path / "run" / "drafter" / "model.safetensors")["token_ids"]
    np.testing.assert_array_equal(saved, [7, 9, 200])
    assert "3 rows cover" in capsys.readouterr().err


def test_a_changed_configuration_is_shown_and_needs_a_flag(
    target_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(command(target_folder, data_file, run, "steps=4")) == 0
    capsys.readouterr()
    assert main(command(target_folder, data_file, run, "steps=6")) == 2
    said = capsys.readouterr().err
    assert "steps: 4 -> 6" in said and "--allow-change" in said and said.count("\n") == 1
    (run / "drafter").rename(tmp_path / "drafter-4")
    assert main([*command(target_folder, data_file, run, "steps=6"), "--allow-change"]) == 0
    assert len(losses(run)) == 6


def test_a_full_disk_while_saving_loses_nothing_that_was_saved(
    target_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, full = tmp_path / "whole", tmp_path / "full"
    assert main(command(target_folder, data_file, whole)) == 0
    process = start(command(target_folder, data_file, full), largest_file=30_000)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 2 and "cannot write a checkpoint" in said
    assert not (full / "drafter").exists()
    # The same where the system tells beforehand that there is no room.
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    capsys.readouterr()
    assert main(command(target_folder, data_file, full)) == 2
    assert "no room for a checkpoint" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert main(command(target_folder, data_file, full)) == 0
    assert losses(full) == losses(whole)


def test_a_finished_run_is_not_overwritten(
    target_folder: Path, data_file: Path, tmp_path: Path, complaint: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    assert main(command(target_folder, data_file, run, "steps=4")) == 0
    assert "is finished" in complaint(main, *command(target_folder, data_file, run, "steps=4"))


def test_mistakes_end_in_one_line_before_anything_is_written(
    target_folder: Path, data_file: Path, tmp_path: Path, complaint: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    assert "no such file" in complaint(main, *command(target_folder, tmp_path / "absent.jsonl", run)).lower()
    assert "absent" in complaint(main, *command(tmp_path / "absent", data_file, run))
    assert "lerning_rate is not a key" in complaint(
        main, *command(target_folder, data_file, run, "optimizer.lerning_rate=1")
    ).replace("optimizer.", "")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data_file.read_text().splitlines()[0] + '\n{"id": "x", "tokens": [1, "a"], "assistant": []}\n')
    assert "bad.jsonl:2" in complaint(main, *command(target_folder, bad, run))
    assert "300" in complaint(main, *command(target_folder, data_file, run, "drafter.draft_vocab_size=300"))
