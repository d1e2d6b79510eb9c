"""The trainer as a program: it learns, resumes bitwise after any kill, skips bad steps, refuses what cannot go on."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from etils.epath.backend import fsspec_backend
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import load_file, save_file

from fasteagle_jax.commands import ablate, export, prepare_features
from fasteagle_jax.commands.train_drafter import main
from fasteagle_jax.data.conversations import Conversation, ConversationWriter
from fasteagle_jax.data.manifest import manifest_path
from fasteagle_jax.decoding.acceptance import Acceptance
from fasteagle_jax.drafters.files import load_drafter
from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.targets.loading import load_target
from fasteagle_jax.training import loop
from fasteagle_jax.training.checkpoints import Checkpoints, newest_record
from fasteagle_jax.training.config import apply_changes, load_config
from fasteagle_jax.training.held_out import LENGTH, HeldOut
from fasteagle_jax.training.loop import _spike_limit
from tests.tiny_folder import make_drafter, make_target

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "configs" / "tiny.py"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
}
POISON = 77  # a token for which `poisoned` has no finite embedding


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty conversations in which a token is followed by the next one."""
    path = tmp_path_factory.mktemp("trainer") / "data.jsonl"
    rng = np.random.default_rng(0)
    samples = []
    for i in range(40):
        tokens = [int(t) for t in (rng.integers(256) + np.arange(rng.integers(20, 60))) % 256]
        samples.append(Conversation.of(f"sample-{i}", tokens, [[4, len(tokens)]]))
    with ConversationWriter(path) as writer:
        writer.append(samples)
    return path


def command(target: Path, data: Path, run: Path | epath.Path, *changes: str) -> list[str]:
    """The program's arguments. Without TensorBoard's writer, which takes seconds to import torch where there is one,
    and with one level, whose step is compiled soonest: most of what a run does is the same for any number."""
    return [
        *("--config", str(CONFIG), "--run", str(run)),
        *(f"target={target}", f"data={data}", "tensorboard=False", "drafter.num_levels=1", *changes),
    ]


# Runs of as many steps share their compiled train step: what does not matter stays as the configuration has it.
@pytest.fixture(scope="module")
def finished(target_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps with all its checkpoints, to be copied."""
    run = tmp_path_factory.mktemp("trainer") / "finished"
    assert main(command(target_folder, data_file, run, "keep=4")) == 0
    return run


def start(arguments: list[str], largest_file: int | None = None) -> subprocess.Popen[str]:
    """The program in a process of its own, in the arithmetic of this one; files may have `largest_file` bytes."""
    script = "import sys; from fasteagle_jax.commands.train_drafter import main; sys.exit(main(sys.argv[1:]))"
    if largest_file is not None:  # a write past the limit then fails as on a full disk
        limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest_file}, {largest_file}))"
        script = f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); {limit}; {script}"
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )


# Each word is a life of the same command: SIGNAL:STEP:DELAY, sent so many seconds after a step's batch was asked for.
# They are forked from a process that has imported everything and started nothing.
LIVES = """
import os, signal, sys, threading
from fasteagle_jax.commands import ablate, train_drafter
from fasteagle_jax.data.packing import PackedData
whole_batch = PackedData.batch
for word in sys.argv[1].split(","):
    name, at, delay = word.split(":")
    pid = os.fork()
    if pid == 0:
        def batch(self, step, *rest, sent=[]):
            if step >= int(at) and not sent:
                sent.append(threading.Timer(float(delay), os.kill, (os.getpid(), getattr(signal, name))))
                sent[0].start()
            return whole_batch(self, step, *rest)
        PackedData.batch = batch
        os._exit(train_drafter.main(sys.argv[2:]))
    print(name, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def lead_lives(lives: list[tuple[str, int, float]], arguments: list[str]) -> list[str]:
    """Runs the program once a life; the signal and the exit code of each."""
    words = ",".join(f"{name}:{step}:{delay}" for name, step, delay in lives)
    process = subprocess.run(
        [sys.executable, "-c", LIVES, words, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def records(run: Path | epath.Path) -> list[dict]:
    """What metrics.jsonl says, of every step once."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return found


def losses(run: Path | epath.Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step, as written."""
    return {record["step"]: (record["loss"], record["gradient_norm"]) for record in records(run)}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Eight prompts."""
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": "Why " + "so " * i + "long?"}) + "\n" for i in range(8)))
    return path


def test_training_lowers_the_loss_and_leaves_a_drafter_metrics_a_plot_and_a_trace(
    data_file: Path, tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    talker = make_target(tmp_path / "talker", stop_rate=-9.0)  # its greedy answers do not end with their first token
    changes = ["steps=30", f"evaluation.prompts={questions}", "evaluation.every=15", "evaluation.max_new=8"]
    changes.append("drafter.num_levels=2")
    assert main([*command(talker, data_file, run, *changes, "tensorboard=True"), "--profile", "20:21"]) == 0
    said = capsys.readouterr().err  # no terminal: lines, and few of them
    assert "\r" not in said and sum("step/s" in line or "s/step" in line for line in said.splitlines()) < 10
    assert re.search(r"^100%.* 30/30 .*loss .*tokens/s", said, re.MULTILINE) and "step 15: tau chain" in said
    loss = [value for value, _ in losses(run).values()]
    assert np.mean(loss[-3:]) < 0.8 * np.mean(loss[:3])
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "drafter" / "config.json").read_text())["trained"]["steps"] == 30
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tau chain"] >= 1 and len(last["by depth best_first:16"]) == 2
    assert last["expected_length"] >= 1 and last["tokens_per_second"] > 0 and last["data_seconds"] >= 0
    assert "flops_utilisation" not in last  # nobody knows what this CPU could
    assert list((run / "tensorboard").glob("events.*")) and list((run / "profile").rglob("*.xplane.pb"))
    with Checkpoints(run / "checkpoints") as checkpoints:
        best, tau = checkpoints.best()
        about = checkpoints.record(30)
    assert best in (15, 30) and tau >= 1
    assert about["config"]["steps"] == 30 and about["data"]["next_batch"] == 30 and about["seed"] == 0
    assert (
        about["target_fingerprint"] == json.loads((run / "drafter" / "config.json").read_text())["target_fingerprint"]
    )


def test_no_step_waits_for_the_host_and_losses_are_those_of_a_loop_that_waits_for_every_step(
    target_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """With a spike factor each step needs the losses before it; without, the next step is under way meanwhile."""
    changes = ["steps=7", "save_every=4", "evaluation.every=1000"]
    ahead, waiting = tmp_path / "ahead", tmp_path / "waiting"
    for run, factor in ((ahead, 0), (waiting, 1e6)):
        assert main(command(target_folder, data_file, run, *changes, f"spike_factor={factor}")) == 0
    assert losses(ahead) == losses(waiting)
    assert [record["step"] for record in records(ahead)] == list(range(1, 8))
    for record in records(ahead):  # complete, each of them
        assert record.keys() == records(waiting)[0].keys()
        assert record["seconds"] > 0 and 0 <= record["data_seconds"] <= record["seconds"]
    first, second = (load_file(run / "drafter" / "model.safetensors") for run in (ahead, waiting))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


# --- interruptions ----------------------------------------------------------------------------------------------


@pytest.mark.slow  # what a kill leaves behind: tests/training/test_checkpoints.py; a run goes on: in a bucket, below
@pytest.mark.parametrize("kills", [2, 10])
def test_kills_and_preemptions_leave_the_run_that_nobody_disturbed(
    target_folder: Path, data_file: Path, tmp_path: Path, kills: int
) -> None:
    """Bitwise: the same parameters, and every step's loss once, so no batch was seen twice or skipped."""
    changes = [f"steps={16 * kills}", "optimizer.ema=0.9", "evaluation.every=1000"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command(target_folder, data_file, whole, *changes)) == 0
    rng = np.random.default_rng(1)
    steps = sorted(int(step) for step in rng.integers(1, 12 * kills, kills))
    names = ["SIGTERM" if i % 2 else "SIGKILL" for i in range(kills)]
    lives = [(name, step, float(rng.uniform(0, 0.05))) for name, step in zip(names, steps, strict=True)]
    ends = lead_lives(lives, command(target_folder, data_file, killed, *changes))
    assert ends == [f"{name} {0 if name == 'SIGTERM' else -signal.SIGKILL}" for name in names]
    assert not (killed / "drafter").exists()
    assert main(command(target_folder, data_file, killed, *changes)) == 0
    assert losses(killed) == losses(whole)
    first, second = (load_file(run / "drafter" / "model.safetensors") for run in (whole, killed))
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.mark.slow  # a run in a bucket, below, ends with one and goes on
def test_sigterm_saves_ends_with_0_and_an_evaluation_cut_short_is_made_up_for(
    talkative: tuple[Path, Path], data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, questions: Path
) -> None:
    target, _ = talkative
    run, whole = tmp_path / "run", tmp_path / "whole"
    changes = [
        f"evaluation.prompts={questions}",
        "evaluation.every=3",
        "evaluation.max_new=4",
        "evaluation.trees=chain",
    ]
    evaluate = loop.measure_acceptance

    def interrupted(*args: object, **options: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)  # in which Python hears it
        raise AssertionError("the evaluation went on")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "measure_acceptance", interrupted)
    assert main(command(target, data_file, run, *changes)) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["3"] and not (run / "drafter").exists()
    assert not any(name.startswith("tau") for name in records(run)[-1])
    # The first evaluation of a run is to be its best one.
    more = itertools.cycle([Acceptance(99, (99,)), *[Acceptance(2, (0,))] * 3])  # of four evaluations a run
    monkeypatch.setattr(loop, "measure_acceptance", lambda *args, **options: evaluate(*args, **options) + next(more))
    for folder in (run, whole):
        assert main(command(target, data_file, folder, *changes)) == 0
    measured = [[{name: r[name] for name in r if name.startswith("tau")} for r in records(f)] for f in (run, whole)]
    assert measured[0] == measured[1] and [bool(m) for m in measured[0]] == [False, False, True] * 4
    best = []
    for folder in (run, whole):  # the evaluation made up for counts like any other
        with Checkpoints(folder / "checkpoints") as checkpoints:
            best.append((checkpoints.best(), checkpoints.steps()))
    assert best[0] == best[1] and best[0][0][0] == 3


# --- held-out rows ----------------------------------------------------------------------------------------------


def test_held_out_rows_stop_a_run_and_its_drafter_is_the_best_one(
    target_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed in a measurement ends likewise."""
    scripted = {2: 1.25, 4: 1.5, 6: 1.375, 8: 1.4375}  # by step
    changes = ["held_out.share=0.2", "held_out.every=2", "held_out.patience=2", "held_out.rows=3", "keep=9"]
    measure, seen, kill_at = HeldOut.__call__, [], [0]

    def measured(self: HeldOut, weights: object) -> dict:
        found = measure(self, weights)
        seen.append(found)
        step = 2 * len(seen)
        if step == kill_at[0]:
            raise KeyboardInterrupt
        return found | {LENGTH: scripted[step]}

    monkeypatch.setattr(HeldOut, "__call__", measured)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command(target_folder, data_file, whole, *changes)) == 0
    assert len(records(whole)) == 8 and [LENGTH in record for record in records(whole)] == [False, True] * 4
    accuracy, expected = (seen[-1][f"held-out {name}"] for name in ("accuracy", "expected length"))
    assert 1 + accuracy[0] == pytest.approx(seen[-1][LENGTH]) and expected > 1  # one level, so a path is a guess
    first, kill_at[0] = seen.copy(), 6
    seen.clear()
    assert main(command(target_folder, data_file, killed, *changes)) != 0
    seen[:], kill_at[0] = seen[:2], 0
    assert main(command(target_folder, data_file, killed, *changes)) == 0
    assert losses(killed) == losses(whole) and seen == first
    assert export.main(["--run", str(killed), "--best", "--output", str(tmp_path / "best")]) == 0
    drafters = [load_file(folder / "model.safetensors") for folder in (whole / "drafter", tmp_path / "best")]
    jax.tree.map(np.testing.assert_array_equal, *drafters)
    for folder in (whole / "drafter", killed / "drafter"):
        assert json.loads((folder / "config.json").read_text())["trained"]["steps"] == 4


@pytest.mark.slow
def test_held_out_files_are_measured_beside_stored_features_which_serve_any_share(
    target_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    features = tmp_path / "features"
    arguments = ["--config", str(CONFIG), "--output", str(features), "--store", "float32"]
    settings = [f"target={target_folder}", f"data={data_file}", "drafter.num_levels=1"]
    assert prepare_features.main([*arguments, *settings]) == 0
    lengths = []
    for name, change in (("share", "held_out.share=0.3"), ("file", f"held_out.data={data_file}")):
        changes = ["held_out.rows=4", f"features={features}", change]
        assert main(command(target_folder, data_file, tmp_path / name, *changes)) == 0
        lengths.append(records(tmp_path / name)[-1][LENGTH])
    assert all(1 <= length <= 2 for length in lengths)
    run_layers = tmp_path / "layers"
    assert main(command(target_folder, data_file, run_layers, "held_out.rows=4", "held_out.share=0.3")) == 0
    found = [records(run)[-1] for run in (tmp_path / "share", run_layers)]
    for name in ("loss", "held-out expected length"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("held_out.patience=3", "there are none: set held_out.share or data"),
        ("held_out.share=1", "share is 1.0: it must be 0 or more and below 1"),
        ("held_out.every=0", "every is 0: it must be at least 1"),
        ("held_out.share=1e-9", "none of 40 pieces are held out by a share of 1e-09: give more data"),
    ],
)
def test_a_bad_held_out_choice_is_refused(
    target_folder: Path, data_file: Path, tmp_path: Path, complaint: Callable[..., str], change: str, said: str
) -> None:
    assert said in complaint(main, *command(target_folder, data_file, tmp_path / "run", change))


# --- bad steps --------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(target_folder: Path, tmp_path: Path) -> Path:
    """The target without a finite embedding of POISON."""
    folder = tmp_path / "poisoned"
    shutil.copytree(target_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = np.nan
    save_file(weights, folder / "model.safetensors")
    return folder


def write_data(path: Path, poison: Sequence[int]) -> Path:
    """Twenty conversations, of which these hold POISON."""
    rng = np.random.default_rng(2)
    samples = []
    for i in range(20):
        tokens = [int(t) for t in rng.integers(POISON, size=40)]
        samples.append(Conversation.of(f"{i}", [POISON, *tokens] if i in poison else tokens, [[4, 40]]))
    with ConversationWriter(path) as writer:
        writer.append(samples)
    return path


def test_a_step_without_a_finite_loss_is_skipped_and_reported(
    poisoned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    data = write_data(tmp_path / "some.jsonl", poison=[3])
    assert main(command(poisoned, data, run, "drafter.scale_features=False")) == 0
    bad = [record for record in records(run) if "skipped" in record]
    assert 1 <= len(bad) <= 2  # 20 samples of 40 tokens, 2 rows of 48 tokens a step: once in ten steps
    assert bad[0]["loss"] is None and "NaN" not in (run / "metrics.jsonl").read_text()
    assert all(np.isfinite(record["loss"]) for record in records(run) if record not in bad)
    said = capsys.readouterr().err
    assert f"step {bad[0]['step']}: update skipped, loss nan" in said and f"pieces {bad[0]['skipped']}" in said
    for value in load_file(run / "drafter" / "model.safetensors").values():
        assert np.isfinite(value).all()


def test_too_many_bad_steps_in_a_row_end_the_run_with_the_last_good_checkpoint(
    poisoned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    good = write_data(tmp_path / "good.jsonl", poison=[])
    bad = write_data(tmp_path / "bad.jsonl", poison=range(20))
    changes = ["drafter.scale_features=False", "max_bad_steps=3"]
    assert main(command(poisoned, good, run, "steps=4", *changes)) == 0
    shutil.rmtree(run / "drafter")
    capsys.readouterr()
    assert main([*command(poisoned, bad, run, "steps=12", *changes), "--allow-change"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "steps 5 to 7 gave no usable update" in said and f"checkpoint 4 in {run / 'checkpoints'}" in said


def test_a_spike_is_a_loss_above_so_many_times_the_mean_of_the_last_good_ones() -> None:
    steps: list[dict] = [{"step": i, "loss": 2.0} for i in range(30)]
    assert _spike_limit(0.0, steps) == np.inf
    assert _spike_limit(3.0, steps) == 6
    assert _spike_limit(3.0, [*steps, {"step": 31, "loss": 100.0, "skipped": [[1]]}]) == 6
    assert _spike_limit(3.0, steps[:10]) == np.inf
    assert _spike_limit(3.0, [{"step": i, "loss": 9.0} for i in range(50)] + steps * 4) == 6


# --- what a run is made of --------------------------------------------------------------------------------------


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
    config = apply_changes(load_config(str(CONFIG)), command(target_folder, data_file, tmp_path, *changes)[4:])
    loop.train(config, tmp_path / "quiet", quiet=True)
    assert capsys.readouterr() == ("", "")


def test_a_changed_configuration_is_shown_and_needs_a_flag(
    target_folder: Path, data_file: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_without_drafter(finished, tmp_path / "run")
    longer = command(target_folder, data_file, run, "keep=4", "steps=14")
    capsys.readouterr()
    assert main(longer) == 2
    said = capsys.readouterr().err
    assert "steps 12, not 14" in said and "--allow-change" in said and said.count("\n") == 1
    assert main([*longer, "--allow-change"]) == 0
    assert len(losses(run)) == 14


def test_the_checkpoint_says_what_a_run_was_and_another_target_or_other_data_are_refused(
    target_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data_file = tmp_path / "run", Path(shutil.copy(data_file, tmp_path))
    assert main(command(target_folder, data_file, run)) == 0
    shutil.rmtree(run / "drafter")

    def complaint(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    (run / "config.json").unlink()  # the checkpoint holds the configuration
    assert "steps 12, not 6" in complaint(*command(target_folder, data_file, run, "steps=6"))
    same_name = tmp_path / "target"  # other weights where the target was
    shutil.copytree(target_folder, same_name)
    weights = load_file(same_name / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, same_name / "model.safetensors")
    other = command(same_name, data_file, run)
    assert f"target {target_folder}, not {same_name}" in complaint(*other)
    assert "trains a drafter for target" in complaint(*other, "--allow-change")
    lines = data_file.read_text()
    data_file.write_text(lines.replace("[[4,", "[[5,"))  # the same tokens, other answers
    assert "other answers marked in its data" in complaint(*command(target_folder, data_file, run))
    data_file.write_text(lines)
    with ConversationWriter(data_file) as writer:
        writer.append([Conversation.of("one more", list(range(40)), [[4, 40]])])
    assert "other data" in complaint(*command(target_folder, data_file, run))
    assert main([*command(target_folder, data_file, run), "--allow-change"]) == 0
    copy_without_drafter(run, tmp_path / "run2")
    muon = command(target_folder, data_file, tmp_path / "run2", "optimizer.name=muon")
    assert main([*muon, "--allow-change"]) == 2
    assert "does not fit this configuration" in capsys.readouterr().err.splitlines()[-1]


def copy_without_drafter(run: Path, to: Path) -> Path:
    """The run, as it was before its end."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "drafter")
    return to


def test_a_run_of_before_checkpoints_had_records_goes_on_with_its_configuration(
    target_folder: Path, data_file: Path, finished: Path, tmp_path: Path
) -> None:
    old = copy_without_drafter(finished, tmp_path / "old")
    kept = old / "checkpoints" / "8"
    for path in (old / "checkpoints").iterdir():
        if path != kept:
            shutil.rmtree(path)
    shutil.rmtree(kept / "run")
    config = json.loads((old / "config.json").read_text())
    for name in ("accumulate", "spike_factor", "max_bad_steps", "tensorboard", "wandb"):  # not yet there
        del config[name]
    for name in ("name", "ema"):
        del config["optimizer"][name]
    (old / "config.json").write_text(json.dumps(config))
    assert main(command(target_folder, data_file, old, "keep=4", "tensorboard=True")) == 0
    assert losses(old) == losses(finished)


@pytest.mark.slow  # as the test below, where the system tells only in the middle of a write
def test_a_full_disk_while_saving_loses_nothing_that_was_saved(
    target_folder: Path, data_file: Path, finished: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    process = start(command(target_folder, data_file, full), largest_file=30_000)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 2 and "cannot write a checkpoint" in said
    # The one line that tells it, without the library's own; no step was whole, the one that failed least of all.
    (line,) = (line for line in said.splitlines() if line.startswith("error:"))
    assert "ERROR:absl" not in said and "Failed to run" not in said
    assert "(File too large): make room" in line and line.endswith("it resumes from step 0")
    assert not (full / "drafter").exists()
    assert main(command(target_folder, data_file, full)) == 0
    assert losses(full) == losses(finished)


def test_a_disk_without_room_for_a_checkpoint_ends_the_run_which_goes_on_when_there_is_some(
    target_folder: Path,
    data_file: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = tmp_path / "full"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    capsys.readouterr()
    assert main(command(target_folder, data_file, full)) == 2
    assert "no room for a checkpoint" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert main(command(target_folder, data_file, full)) == 0
    assert losses(full) == losses(finished)


class Bucket(MemoryFileSystem):
    """What gcsfs is to fsspec, in memory: objects by their whole names, none of which is ever appended to."""

    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix("gs:/"))

    def open(self, path: str, mode: str = "rb", **options: object) -> object:
        assert "a" not in mode and "+" not in mode
        return super().open(path, mode, **options)


def test_a_run_in_a_bucket_goes_on_and_leaves_there_what_one_in_a_folder_leaves(
    target_folder: Path, data_file: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the checkpoints: Orbax writes these to buckets through clients of its own."""
    there, kept = epath.Path("gs://drafters/runs/there"), epath.Path(tmp_path / "kept")
    monkeypatch.setattr(type(fsspec_backend), "_get_filesystem", lambda self, name: files[name])
    files = {"gcs": Bucket(), "file": LocalFileSystem()}
    monkeypatch.setattr(loop, "Checkpoints", lambda _, keep=None: Checkpoints(kept, keep))
    monkeypatch.setattr(loop, "newest_record", lambda _: newest_record(kept))
    ask, before = loop._Sigterm.ask, signal.getsignal(signal.SIGTERM)

    def terminated(self: loop._Sigterm) -> object:
        signal.raise_signal(signal.SIGTERM)
        return ask(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Sigterm, "ask", terminated)
        assert main(command(target_folder, data_file, there, "keep=4")) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(records(there)) == 1 and not (there / "drafter").exists()
    assert main(command(target_folder, data_file, there, "keep=4")) == 0
    assert losses(there) == losses(finished)
    assert {path.name for path in there.iterdir()} == {path.name for path in finished.iterdir()} - {"checkpoints"}
    for name in ("config.json", "drafter/model.safetensors", "drafter/config.json"):
        assert (there / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow  # its steps and loss: tests/drafters/test_eagle3.py
def test_eagle3_trains_by_the_same_trainer_and_a_finished_run_is_not_overwritten(
    target_folder: Path, data_file: Path, tmp_path: Path, complaint: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    changes = ["steps=30", "drafter.kind=eagle3", "drafter.reinject=False", "drafter.correction=None"]
    changes.append("drafter.num_levels=2")
    asked = command(target_folder, data_file, run, *changes)
    assert main(asked) == 0
    loss = [value for value, _ in losses(run).values()]
    assert np.mean(loss[-3:]) < 0.8 * np.mean(loss[:3])
    target = load_target(str(target_folder))
    drafter = load_drafter(run / "drafter", target.model.config, target.fingerprint)
    assert drafter.config.kind == "eagle3" and drafter.head.shape == target.model.head_rows().shape
    assert not np.array_equal(drafter.head[...], target.model.head_rows())  # its own by now
    assert "is finished" in complaint(main, *asked)


def test_a_run_starts_from_the_first_levels_of_a_trained_drafter(
    target_folder: Path, data_file: Path, tmp_path: Path, complaint: Callable[..., str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    small = ["steps=2", "drafter.draft_vocab_size=64", "drafter.correction=None", "drafter.num_levels=2"]
    assert main(command(target_folder, data_file, first, *small)) == 0
    changes = ["steps=1", "drafter.draft_vocab_size=64", f"drafter.start={first / 'drafter'}"]
    refused = command(target_folder, data_file, second, *changes, "drafter.num_levels=3")
    assert "has num_levels 2 instead of 3: set" in complaint(main, *refused)
    still = [*changes, "drafter.num_levels=1", "optimizer.learning_rate=1e-12"]
    assert main(command(target_folder, data_file, second, *still)) == 0
    theirs, mine = (load_file(run / "drafter" / "model.safetensors") for run in (first, second))
    assert set(theirs) - set(mine) == {name for name in theirs if name.startswith("levels.1.")}
    new = set(mine) - set(theirs)
    assert new == {f"correction.{part}.weight" for part in ("of_state", "of_token", "to_state")}
    assert np.abs(mine["correction.to_state.weight"]).max() < 1e-9  # so that it guesses as the one it starts from
    for name, value in mine.items():
        if name in new:
            continue
        np.testing.assert_allclose(value, theirs[name], rtol=1e-6, atol=0)  # but for fc, out of its scale and back

    # What is said of its training is of all runs: the shipped drafter's last one saw a thirtieth of its tokens.
    third, start = tmp_path / "third", f"drafter.start={second / 'drafter'}"
    assert main(command(target_folder, data_file, third, *still[:2], *still[3:], start)) == 0
    shutil.rmtree(first)
    shutil.rmtree(second / "drafter")
    exported = tmp_path / "exported"
    assert export.main(["--run", str(third), "--output", str(exported)]) == 0
    for folder in (third / "drafter", exported):
        about = json.loads((folder / "config.json").read_text())["trained"]
        runs = [*about["earlier"], about]
        assert [run["steps"] for run in runs] == [2, 1, 1]
        assert about["total_tokens"] == sum(run["tokens"] for run in runs) > 2 * about["tokens"]


def test_a_run_goes_on_with_a_drafter_whose_layer_is_not_as_the_targets(
    target_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """An imported EAGLE-3 has its own rotary table, heads and norms, which no key of a run names."""
    own = {"rope": RopeConfig(theta=123.0), "num_heads": 4, "num_kv_heads": 4, "fc_norm": True, "rms_norm_eps": 1e-3}
    start = make_drafter(tmp_path / "imported", target_folder, kind="eagle3", **own)
    run, exported = tmp_path / "run", tmp_path / "exported"
    changes = ["drafter.kind=eagle3", "drafter.reinject=False", "drafter.correction=None", "drafter.num_levels=2"]
    changes += [f"drafter.start={start}", "steps=1", "optimizer.learning_rate=1e-12"]
    assert main(command(target_folder, data_file, run, *changes)) == 0
    theirs, mine = (load_file(folder / "model.safetensors") for folder in (start, run / "drafter"))
    for name, value in theirs.items():
        np.testing.assert_allclose(mine[name], value, rtol=1e-6, atol=1e-9)
    shutil.rmtree(start)
    assert export.main(["--run", str(run), "--output", str(exported)]) == 0
    for folder in (run / "drafter", exported):
        raw = json.loads((folder / "config.json").read_text())
        assert raw["rope"]["theta"] == 123 and raw["fc_norm"] and raw["num_kv_heads"] == 4
    assert (exported / "model.safetensors").read_bytes() == (run / "drafter" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_ablate_measures_variants_of_a_run_and_trains_none_twice(
    data_file: Path, tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, complaint: Callable[..., str]
) -> None:
    talker = make_target(tmp_path / "talker", stop_rate=-9.0)
    asked = [
        "--config",
        CONFIG,
        "--folder",
        tmp_path / "runs",
        "--prompts",
        questions,
        "--max-new",
        8,
        "--tree",
        "chain",
    ]
    asked += ["--temperature", 0, "--variant", "base", "--variant", "loss.last_level_only=True drafter.num_levels=2"]
    changes = [f"target={talker}", f"data={data_file}", "steps=4", "drafter.correction=None", "drafter.reinject=False"]
    assert ablate.main([str(word) for word in [*asked, "--json", tmp_path / "a.json", *changes]]) == 0
    monkeypatch.setattr(ablate, "train", lambda *_: pytest.fail("it is trained already"))
    monkeypatch.setattr(ablate, "_decode", lambda *_: Acceptance(2, (1, 0)))
    assert ablate.main([str(word) for word in [*asked, "--json", tmp_path / "b.json", *changes]]) == 0
    report, again = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert report["losses"] == again["losses"] and report["steps"] == 4
    assert [each["acceptance_length"] for each in again["measured"]] == [1.5, 1.5]
    assert {each["variant"]: len(each["by_depth"]) for each in report["measured"]} == {
        "base": 3,
        "loss.last_level_only=True drafter.num_levels=2": 2,
    }
    assert all(each["acceptance_length"] >= 1 for each in report["measured"])
    assert "loss.first is not a key" in complaint(ablate.main, *asked, "--variant", "loss.first=1", *changes)
    said = complaint(ablate.main, *asked, *changes, "seed=1")  # not those of seed 0 under the name of seed 1
    assert "runs/base was trained with another configuration (seed 0, not 1)" in said
    said = complaint(ablate.main, *asked, "--max-new", 2000, *changes)
    assert "2000 new ones exceed the target's 1024 positions" in said

    skipped = '{"loss": 3.0}\n{"loss": null, "skipped": [[1]]}\n{"loss": 90.0, "skipped": [[2]]}\n{"loss": 1.0}\n'
    (tmp_path / "runs/base/metrics.jsonl").write_text(skipped)
    assert ablate._last_loss(tmp_path / "runs/base") == 2.0
    monkeypatch.setattr(ablate, "train", lambda *_: sys.exit(0))  # as after SIGTERM
    assert ablate.main([str(word) for word in [*asked, "--variant", "drafter.num_levels=1", *changes]]) == 143


def test_a_loss_of_guesses_without_edges_needs_a_drafter_that_has_them(
    target_folder: Path, data_file: Path, tmp_path: Path, complaint: Callable[..., str]
) -> None:
    arguments = command(target_folder, data_file, tmp_path / "run", "drafter.correction=None", "loss.without_edges=1")
    assert "of drafters with drafter.edges or drafter.correction" in complaint(main, *arguments)


def test_data_of_another_tokenizer_or_target_is_refused(
    target_folder: Path, data_file: Path, tmp_path: Path, complaint: Callable[..., str]
) -> None:
    """Token ids past the vocabulary were clamped without a word, and nobody read whose answers a file holds."""
    other = tmp_path / "other.jsonl"
    with ConversationWriter(other) as writer:
        writer.append([Conversation.of("x", [1, 2, 3, 50_000, 4], [[1, 5]])])
    said = complaint(main, *command(target_folder, f"{data_file},{other}", tmp_path / "run"))
    vocab_size = load_target(str(target_folder)).model.config.vocab_size
    assert f"other.jsonl:1: token 50000, the target's vocabulary has {vocab_size}: prepare" in said
    manifest = manifest_path(data_file)
    manifest.write_text(json.dumps({"settings": {"target": "0123abcd"}, "counts": {}}))
    said = complaint(main, *command(target_folder, data_file, tmp_path / "run"))
    assert "of target 0123abcd, this one's weights are" in said and "use that target, prepare data with" in said
    manifest.write_text("{")
    assert "manifest.json is damaged" in complaint(main, *command(target_folder, data_file, tmp_path / "run"))
    manifest.write_text(json.dumps({"settings": {"target": load_target(str(target_folder)).fingerprint}}))
    assert main(command(target_folder, data_file, tmp_path / "run", "steps=1")) == 0


DEEPKD = ["loss.deepkd=True", "drafter.draft_vocab_size=250", "steps=4", "save_every=2"]


def test_a_run_with_deepkd_that_cannot_be_is_one_line(
    target_folder: Path, data_file: Path, tmp_path: Path, complaint: Callable[..., str]
) -> None:
    run, changes = tmp_path / "run", DEEPKD
    run.mkdir()
    said = complaint(main, *command(target_folder, data_file, run, *changes, "loss.deepkd.mask_best=250"))
    assert "keeps 250 non-target classes and the draft vocabulary of 250 has 249" in said
    said = complaint(main, *command(target_folder, data_file, run, *changes, "optimizer.betas=0.95,0.99"))
    assert "the momentum of task is 1.025" in said


@pytest.mark.slow  # its steps, also after a checkpoint: tests/training/test_deepkd.py
def test_a_run_with_deepkd_logs_its_parts_resumes_and_is_exported(
    target_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    run, changes = tmp_path / "run", DEEPKD
    assert main(command(target_folder, data_file, run, *changes)) == 0
    whole = (run / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [record["kept_classes"] for record in records] == [12, 124, 124, 249]
    for record in records:
        parts = [record[f"loss_{name}"] for name in ("task", "target_class", "non_target")]
        assert min(parts) > 0 and sum(parts) == pytest.approx(record["loss"], rel=1e-5)
        assert len(record["left_out"]) == len(record["level_loss"])
        ratios = [record[f"signal_to_noise_{name}"] for name in ("task", "target_class", "non_target")]
        assert ratios == [None] * 3 if record["step"] == 1 else min(ratios) >= 0
    # From the checkpoint before, the same again.
    weights = load_file(run / "drafter" / "model.safetensors")
    shutil.rmtree(run / "drafter")
    shutil.rmtree(run / "checkpoints" / "4")
    assert main(command(target_folder, data_file, run, *changes)) == 0
    for name, value in load_file(run / "drafter" / "model.safetensors").items():
        np.testing.assert_array_equal(value, weights[name])
    assert export.main(["--run", str(run), "--output", str(tmp_path / "exported")]) == 0
    for name, value in load_file(tmp_path / "exported" / "model.safetensors").items():
        np.testing.assert_array_equal(value, weights[name])


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
    assert "write first:last" in complaint(main, *command(target_folder, data_file, run), "--profile", "9:3")
    silent = tmp_path / "silent.jsonl"
    silent.write_text('{"id": "x", "tokens": [1, 2, 3], "assistant": []}\n')
    assert "has an assistant's turn" in complaint(main, *command(target_folder, silent, run))
    assert "cannot write to" in complaint(main, *command(target_folder, data_file, data_file / "run"))
    absent = epath.Path("gs://no-such-bucket-of-anyone/run")
    assert "cannot write to gs://" in complaint(main, *command(target_folder, data_file, absent))
    if importlib.util.find_spec("wandb") is None:
        assert "pip install wandb" in complaint(main, *command(target_folder, data_file, run, "wandb=drafters"))
