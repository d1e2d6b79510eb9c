"""Configurations of runs: files, changes from the command line, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from etils import epath

from fasteagle_jax.compiling.published import PUBLISHED
from fasteagle_jax.data.manifest import differences
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import check_writable, in_bucket
from fasteagle_jax.training.config import (
    RunConfig,
    apply_changes,
    changes_since,
    config_of_record,
    from_json,
    load_config,
    to_json,
)
from fasteagle_jax.training.loop import _check_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_gives_a_run(path: Path) -> None:
    config = load_config(str(path))
    assert isinstance(config, RunConfig)
    assert path.name in (path.read_text().split('"""')[1])  # its docstring says how to run it


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama31_8b", 8.03), ("deepseek_r1_distill_llama_8b", 8.03), ("llama33_70b", 70.55), ("vicuna_13b", 13.02)],
)
def test_published_sizes_give_the_published_number_of_parameters(name: str, parameters: float) -> None:
    import jax

    from fasteagle_jax.targets.llama import Llama

    target = load_config(f"{CONFIGS[0].parent}/{name}.py").target_config
    assert target is not None
    shapes = jax.eval_shape(lambda: Llama(target, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count / 1e9 == pytest.approx(parameters, abs=0.01)


def test_changes_reach_nested_keys_with_their_types() -> None:
    config = apply_changes(
        RunConfig(target="t", data=("a",), steps=3),
        ["steps=7", "loss.share=0.5", "data=b,c", "drafter.reinject=True", "drafter.draft_vocab_size=None"],
    )
    assert (config.steps, config.loss.share, config.data) == (7, 0.5, ("b", "c"))
    assert config.drafter.reinject and config.drafter.draft_vocab_size is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("stepz=3", "stepz is not a key"),
        ("loss.shares=1", "loss.shares is not a key"),
        ("loss=1", "loss is a group"),
        ("steps", "write key=value"),
        ("steps=many", "not of type int"),
        ("steps=True", "not of type int"),
        ("steps=0", "at least 1"),
        ("loss.share=0", "above 0"),
        ("dtype=float16", "float32 or bfloat16"),
        ("steps.x=1", "holds a single value"),
        ("accumulate=3", "batch_size 4 is not divisible by accumulate 3"),
        ("spike_factor=0.5", "a factor above 1"),
        ("max_bad_steps=0", "at least 1"),
        ("optimizer.ema=1.0", "a decay from 0"),
        ("optimizer.name=lion", "adamw, muon or sgd"),
        ("evaluation.every=0", "evaluation every is 0: it must be at least 1"),
        ("evaluation.max_new=0", "evaluation max_new is 0"),
    ],
)
def test_a_bad_change_is_named_with_its_remedy(change: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        apply_changes(RunConfig(target="t", data=("a",), steps=3), [change])


def test_a_stream_of_the_targets_size_is_of_features_that_are_measured() -> None:
    wanted = ["drafter.norm_inputs=True", "drafter.from_target=True", "drafter.scale_features=False"]
    with pytest.raises(UserError, match="set drafter.scale_features=True"):
        apply_changes(RunConfig(target="t", data=("a",), steps=3), wanted)


def test_a_file_that_is_no_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        load_config(str(tmp_path / "absent.py"))
    for text, said in (("x = 1", "get_config"), ("def get_config(): return 3", "returns a int"), ("a b", "no config")):
        path = tmp_path / "config.py"
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            load_config(str(path))


def test_differences_name_key_and_both_values() -> None:
    old = RunConfig(target="t", data=("a",), steps=3)
    new = apply_changes(old, ["steps=4", "loss.share=0.5"])
    assert differences(to_json(old), to_json(new)) == ["loss.share 1.0, not 0.5", "steps 3, not 4"]
    assert differences(to_json(old), to_json(old)) == []


def test_a_configuration_saved_before_a_key_was_there_differs_in_nothing() -> None:
    config = RunConfig(target="t", data=("a",), steps=3)
    old = to_json(config)
    del old["accumulate"], old["wandb"], old["optimizer"]["ema"]
    assert changes_since(old, config) == []
    assert changes_since(old, apply_changes(config, ["accumulate=2"])) == ["accumulate 1, not 2"]


def test_a_saved_key_that_is_not_known_is_named() -> None:
    """A later version's setting was dropped, and the run went on without it."""
    config = RunConfig(target="t", data=("a",), steps=3)
    raw = to_json(config)
    assert from_json(raw) == config
    raw["loss"]["focal"] = 2.0
    for read in (from_json, lambda raw: changes_since(raw, config)):
        with pytest.raises(UserError, match="has loss.focal, which this version does not know: use the version"):
            read(raw)


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("{file}/run", "cannot write to .*run .*: name a folder of yours"),
        ("gs://no-such-bucket-of-anyone/run", "cannot write to gs://no-such-bucket.*: pip install gcsfs"),
    ],
)
def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path: Path, folder: str, said: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=said) as error:
        check_writable(epath.Path(folder.format(file=tmp_path / "file")))
    assert "\n" not in str(error.value)


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(epath.Path(tmp_path / "a" / "b"))
    (tmp_path / "a" / "b" / ".writable-0").write_text("")  # a run was killed here
    check_writable(epath.Path(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []
    assert in_bucket("gs://bucket/run") and not in_bucket(tmp_path)


@pytest.mark.parametrize("record", [{}, {"config": 7}, {"config": {"target": "t"}}, {"config": {"drafter": 7}}])
def test_a_checkpoints_record_that_is_damaged_is_one_line(record):
    with pytest.raises(UserError, match="a checkpoint's record of the run is damaged"):
        config_of_record(record)


@pytest.mark.parametrize("text", ["{", "7", '{"drafter": 7}', "[" * 100_000])
def test_a_runs_configuration_that_is_damaged_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        _check_config(None, RunConfig("t", ("a.jsonl",), 1), epath.Path(tmp_path), allow_change=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_targets_sizes_survive_a_file(name):
    config = PUBLISHED[name]
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
