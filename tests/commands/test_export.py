"""`fasteagle export`: a checkpoint becomes a drafter's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file

from fasteagle_jax.commands.export import main
from fasteagle_jax.commands.import_drafter import main as import_drafter
from fasteagle_jax.commands.train_drafter import main as train
from fasteagle_jax.data.conversations import Conversation, ConversationWriter
from fasteagle_jax.drafters.files import TENSORS, load_drafter, read_raw, tensors_of
from fasteagle_jax.io.files import sha256
from fasteagle_jax.targets.checkpoint import fingerprint
from fasteagle_jax.targets.compressed import is_rounded
from fasteagle_jax.targets.loading import open_checkpoint
from fasteagle_jax.training.checkpoints import Checkpoints
from tests.tiny_folder import make_drafter

CONFIG = Path(__file__).parent.parent.parent / "configs" / "tiny.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory, target_folder) -> Path:
    """A finished run of six steps, with the checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("export")
    rng = np.random.default_rng(0)
    with ConversationWriter(folder / "data.jsonl") as writer:
        tokens = [rng.integers(256, size=40).tolist() for _ in range(20)]
        writer.append([Conversation.of(str(i), t, [[4, 40]]) for i, t in enumerate(tokens)])
    changes = [f"target={target_folder}", f"data={folder / 'data.jsonl'}", "steps=6", "save_every=2", "keep=2"]
    changes.append("drafter.num_levels=1")
    assert train(["--config", str(CONFIG), "--run", str(folder / "run"), *changes, "tensorboard=False"]) == 0
    return folder / "run"


def test_the_last_checkpoint_exported_is_the_finished_runs_drafter(run, tmp_path):
    assert main(["--run", str(run), "--output", str(tmp_path / "drafter")]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "drafter", run / "drafter"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "drafter", run / "drafter")]
    assert configs[0] == configs[1]
    assert configs[0]["trained"]["run"]["data"] == ["data.jsonl"]  # where it lay is nobody's business


def test_a_run_with_an_int8_target_of_longrope_is_exported(target_folder, tmp_path):
    """The mark is that of the rounded weights, and the rotary factors are those of the run's length."""
    target = tmp_path / "target"
    shutil.copytree(target_folder, target)
    config = json.loads((target / "config.json").read_text())
    size = config["head_dim"] // 2
    factors = {"short_factor": [1.0] * size, "long_factor": [4.0] * size}
    config |= {"rope_scaling": {"rope_type": "longrope", **factors}, "original_max_position_embeddings": 512}
    (target / "config.json").write_text(json.dumps(config))
    with ConversationWriter(tmp_path / "data.jsonl") as writer:
        writer.append([Conversation.of(str(i), [*range(40)], [[4, 40]]) for i in range(4)])
    changes = [f"target={target}", f"data={tmp_path / 'data.jsonl'}", "steps=1", "target_dtype=int8", "length=64"]
    argv = ["--config", str(CONFIG), "--run", str(tmp_path / "run"), *changes, "drafter.num_levels=1"]
    assert train([*argv, "tensorboard=False"]) == 0
    assert main(["--run", str(tmp_path / "run"), "--output", str(tmp_path / "drafter")]) == 0
    found, expected = (read_raw(folder) for folder in (tmp_path / "drafter", tmp_path / "run" / "drafter"))
    assert found == expected
    assert found["rope"]["kind"] == "longrope" and not found["rope"]["long"]
    assert found["target_fingerprint"] != fingerprint(open_checkpoint(target))


def test_the_model_card_says_what_the_run_did(run, tmp_path):
    assert main(["--run", str(run), "--output", str(tmp_path / "drafter"), "--license", "apache-2.0"]) == 0
    path = tmp_path / "drafter" / "README.md"
    text, data = path.read_text(), ModelCard.load(path).data.to_dict()
    assert (data["license"], data["library_name"]) == ("apache-2.0", "fasteagle-jax")
    assert "base_model" not in data  # a folder of somebody's machine
    assert str(run.parent) not in text
    assert "`data.jsonl`" in text
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = " ".join(f"{x:.2f}" for x in records[-1]["accuracy"])
    assert f"| 6 | {sum(r['tokens'] for r in records)} | {last} |" in text
    assert "Not measured by the run." in text


@pytest.mark.slow  # the test of held-out rows exports the best checkpoint of a run
def test_the_best_checkpoint_is_exported_with_its_average(talkative, tmp_path):
    target, _ = talkative
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": "Why so long?"}) + "\n")
    with ConversationWriter(tmp_path / "data.jsonl") as writer:
        writer.append([Conversation.of("a", list(range(40)), [[4, 40]])])
    changes = [
        "drafter.num_levels=1",
        "steps=3",
        "optimizer.ema=0.9",
        f"evaluation.prompts={questions}",
        "evaluation.every=1",
    ]
    changes += [f"target={target}", f"data={tmp_path / 'data.jsonl'}", "evaluation.trees=chain", "evaluation.max_new=4"]
    assert train(["--config", str(CONFIG), "--run", str(tmp_path / "run"), *changes, "tensorboard=False"]) == 0
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        step, _ = checkpoints.best()
    for name, which in (("best", ["--best"]), ("last", [])):
        assert main(["--run", str(tmp_path / "run"), *which, "--output", str(tmp_path / name)]) == 0
    assert json.loads((tmp_path / "best" / "config.json").read_text())["trained"]["steps"] == step
    measured = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [f"| {name[4:]} | {value} |" for name, value in measured[-1].items() if name.startswith("tau ")]
    assert rows
    assert all(row in (tmp_path / "last" / "README.md").read_text() for row in rows)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "last", tmp_path / "run" / "drafter"))
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])


@pytest.mark.slow  # what is exported is a checkpoint of any kind
def test_an_eagle3_run_is_exported(run, target_folder, tmp_path):
    changes = [f"target={target_folder}", f"data={run.parent / 'data.jsonl'}", "steps=2", "drafter.kind=eagle3"]
    changes += ["drafter.reinject=False", "drafter.correction=None", "loss.within_draft=True", "drafter.num_levels=2"]
    assert train(["--config", str(CONFIG), "--run", str(tmp_path / "run"), *changes, "tensorboard=False"]) == 0
    assert main(["--run", str(tmp_path / "run"), "--output", str(tmp_path / "drafter")]) == 0
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "drafter" / file).read_bytes() == (tmp_path / "run" / "drafter" / file).read_bytes()


def test_an_earlier_checkpoint_is_exported_by_its_step(run, tmp_path):
    assert main(["--run", str(run), "--step", "4", "--output", str(tmp_path / "drafter")]) == 0
    trained = json.loads((tmp_path / "drafter" / "config.json").read_text())["trained"]
    assert (
        trained["steps"] == 4
        and 0 < trained["tokens"] < json.loads((run / "drafter" / "config.json").read_text())["trained"]["tokens"]
    )


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_a_drafter_is_stored_smaller(run, target_folder, tmp_path, storage):
    assert main(["--run", str(run), "--storage", storage, "--output", str(tmp_path / "small")]) == 0
    target = open_checkpoint(str(target_folder))
    full, small = (
        tensors_of(load_drafter(folder, target.config, fingerprint(target), stacked=False))
        for folder in (run / "drafter", tmp_path / "small")
    )
    kinds = {name: value.dtype.name for name, value in load_file(tmp_path / "small" / "model.safetensors").items()}
    assert full.keys() == small.keys()
    for name, value in full.items():
        if value.ndim != 2:
            np.testing.assert_array_equal(small[name], value)
            continue
        if kinds[name] == "int8":  # rounded by its row's largest
            bound = 0.5 / 127 * np.abs(value).max(axis=1, keepdims=True)
        else:
            bound = 2**-8 * np.abs(value)
        assert (np.abs(small[name] - value) <= bound * 1.001).all()
        assert not np.array_equal(small[name], value)
        assert np.linalg.norm(small[name] - value) <= 0.01 * np.linalg.norm(value)
    assert ("int8" in kinds.values()) == (storage == "int8")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert is_rounded(config, tmp_path) == (storage == "int8") and config["format"] == (2 if storage == "int8" else 1)
    if storage == "int8":  # as compressed-tensors says it
        rounded = {name.removesuffix(".weight") for name, kind in kinds.items() if kind == "int8"}
        floats = {name.removesuffix(".weight") for name, value in full.items() if value.ndim == 2} - rounded
        assert set(config["quantization_config"]["ignore"]) == floats
        assert {name for name in kinds if name.endswith("_scale")} == {
            f"{name}_scale" for name, kind in kinds.items() if kind == "int8"
        }
        older = tmp_path / "older"  # format 1
        shutil.copytree(tmp_path / "small", older)
        tensors = load_file(older / "model.safetensors")
        save_file({name.replace("_scale", ".scale"): value for name, value in tensors.items()}, older / TENSORS)
        config = {key: value for key, value in config.items() if key not in ("format", "quantization_config")}
        (older / "config.json").write_text(json.dumps(config | {"sha256": sha256(older / TENSORS)}))
        same = tensors_of(load_drafter(older, target.config, fingerprint(target), stacked=False))
        assert all(np.array_equal(small[name], value) for name, value in same.items())
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (run / "drafter", tmp_path / "small")]
    assert sizes[1] < sizes[0] * (0.6 if storage == "bfloat16" else 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "{run}", "--step", "3"], "there is no checkpoint 3 in .* (there are: 4, 6)"),
        (["--run", "nowhere"], "nowhere holds no config.json"),
        (["--run", "{run}/drafter"], "config.json is not of a training run"),
        (["--run", "{run}", "--best"], "no checkpoint in .* was measured"),
    ],
)
def test_what_cannot_be_exported_is_a_user_error(run, tmp_path, complaint, arguments, message):
    words = [word.format(run=run) for word in arguments]
    said = complaint(main, *words, "--output", tmp_path / "drafter")
    assert all(part in said for part in message.split(".* "))


def test_an_output_that_exists_is_left_alone(run, tmp_path, complaint):
    assert "exists" in complaint(main, "--run", run, "--output", tmp_path)


def test_a_drafters_folder_is_written_for_another_program(target_folder, tmp_path, complaint):
    folder = make_drafter(tmp_path / "eagle3", target_folder, kind="eagle3", feature_layers=(0, 1, 2))
    given = ["--drafter", folder, "--target", target_folder]
    words = [*given, "--for", "vllm", "--verifier", "some/target", "--output", tmp_path / "vllm"]
    assert main([str(word) for word in words]) == 0
    raw = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert raw["architectures"] == ["Eagle3LlamaForCausalLM"] and raw["max_position_embeddings"] == 1024
    output = ["--output", tmp_path / "other"]
    assert "sglang reads three outputs" in complaint(main, *given, *output, "--for", "sglang")
    assert "--drafter needs --for and --target" in complaint(main, *given, *output)
    assert "vllm reads no float32" in complaint(main, *given, *output, "--for", "vllm", "--storage", "float32")
    words = [*given, "--for", "vllm", "--storage", "int8", "--output", tmp_path / "int8"]
    assert main([str(word) for word in words]) == 0
    words = ["--source", tmp_path / "int8", "--target", target_folder, "--output", tmp_path / "again"]
    assert import_drafter([str(word) for word in words]) == 0
    assert read_raw(tmp_path / "again")["feature_layers"] == [0, 1, 2]
    assert "--verifier is for --for" in complaint(main, *given, *output, "--verifier", "x")
    assert "one of the arguments --run --drafter is required" in complaint(main, *output)
