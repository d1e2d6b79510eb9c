"""`fasteagle prepare-features`: what it stores is what training would have computed."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.commands.prepare_features import main
from fasteagle_jax.data.conversations import Conversation, ConversationWriter, read_conversations
from fasteagle_jax.data.features import load_features
from fasteagle_jax.data.packing import PackedData
from fasteagle_jax.targets.loading import load_target
from fasteagle_jax.training.step import target_outputs

LENGTH = 64


@pytest.fixture
def config(target_folder, tmp_path):
    """A run's configuration file, with data of 40 conversations."""
    rng = np.random.default_rng(0)
    with ConversationWriter(tmp_path / "answers.jsonl") as writer:
        for i in range(40):
            n = int(rng.integers(4, 100))
            writer.append([Conversation.of(str(i), rng.integers(0, 256, n).tolist(), [[2, n]])])
    path = tmp_path / "config.py"
    path.write_text(
        "from fasteagle_jax.training.config import DrafterChoice, RunConfig\n\n"
        "def get_config():\n"
        f"    return RunConfig({str(target_folder)!r}, ({str(tmp_path / 'answers.jsonl')!r},), steps=3, batch_size=3,\n"
        f"        length={LENGTH}, dtype='float32', drafter=DrafterChoice(num_levels=2, feature_layers=(0, 1)))\n"
    )
    return path


@pytest.mark.parametrize("store", ["float32", "bfloat16"])
def test_stored_features_are_those_that_training_computes(config, target_folder, tmp_path, store):
    folder = tmp_path / "features"
    assert main(["--config", str(config), "--output", str(folder), "--store", store]) == 0
    data = PackedData(read_conversations(tmp_path / "answers.jsonl"), LENGTH, 4, seed=9)  # not the seed and rows stored
    loaded = load_target(str(target_folder))
    features = load_features(folder, data, loaded.fingerprint, (0, 1), loaded.model.config.hidden_size)
    # One rounding to bfloat16 is at most 2**-8; float32 differs by the order of sums in other packings.
    close = {"rtol": 2**-8, "atol": 1e-6} if store == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}
    for step in range(data.num_batches_per_epoch(0)):
        batch = data.batch(step)
        out = target_outputs(loaded.model, jax.tree.map(jnp.asarray, batch), (0, 1))
        stored, real = features.batch(step), batch.segments > 0
        for ours, theirs in ((stored.features, out.features), (stored.hidden, out.hidden)):
            assert ours.dtype == jnp.dtype(store)
            np.testing.assert_allclose(ours[real].astype(np.float32), np.asarray(theirs)[real], **close)


def test_the_same_command_goes_on_and_other_settings_are_refused(config, capsys, tmp_path):
    options = ["--config", str(config), "--output", str(tmp_path / "features")]
    assert main(options) == 0
    path = tmp_path / "features" / "features-00000.npy"
    before = path.read_bytes()
    path.write_bytes(b"rubbish")
    assert main(options) == 0
    assert path.read_bytes() == before
    assert main([*options, "drafter.feature_layers=(1,)", "length=32"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "feature_layers [0, 1], not [1]" in said and "length 64, not 32" in said
    assert path.read_bytes() == before


def test_what_cannot_be_is_one_line(config, complaint, tmp_path):
    options = ["--config", config, "--output", tmp_path / "features"]
    assert "cannot read" in complaint(main, *options, f"data={tmp_path / 'nowhere.jsonl'}")
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text('{"id": "x", "tokens": [1, 50000, 3], "assistant": [[1, 3]]}\n')
    assert "foreign.jsonl:1: token 50000" in complaint(main, *options, f"data={foreign}")
    foreign.with_name("foreign.jsonl.manifest.json").write_text('{"settings": {"target": "0123abcd"}}')
    assert "of target 0123abcd" in complaint(main, *options, f"data={foreign}")
    assert "--store" in complaint(main, *options, "--store", "int8")
    assert "is not a file" in complaint(main, "--config", tmp_path / "no.py", "--output", tmp_path / "features")


def test_pieces_that_are_left_out_are_counted_once(config, capsys, tmp_path):
    silent = Conversation.of("silent", [5] * (LENGTH + 20), [[LENGTH + 1, LENGTH + 20]])
    with ConversationWriter(tmp_path / "answers.jsonl") as writer:
        writer.append([silent])
    assert main(["--config", str(config), "--output", str(tmp_path / "features")]) == 0
    data = PackedData(read_conversations(tmp_path / "answers.jsonl"), LENGTH, 4, seed=0)
    assert data.left_out.silent_tokens == LENGTH and data.left_out.short_pieces
    assert capsys.readouterr().err.count(f"left out  {data.left_out}\n") == 1


def test_a_disk_without_room_is_one_line(config, capsys, tmp_path, monkeypatch):
    from fasteagle_jax.commands import prepare_features

    full = prepare_features.shutil._ntuple_diskusage(10, 10, 0)
    monkeypatch.setattr(prepare_features.shutil, "disk_usage", lambda path: full)
    assert main(["--config", str(config), "--output", str(tmp_path / "features")]) == 2
    assert "GB more and has 0.0 GB free: name another --output" in capsys.readouterr().err


def test_the_index_says_what_the_features_are_of(config, tmp_path):
    assert main(["--config", str(config), "--output", str(tmp_path / "features")]) == 0
    index = json.loads((tmp_path / "features" / "index.json").read_text())
    assert index["settings"]["feature_layers"] == [0, 1] and index["settings"]["dtype"] == "bfloat16"
    assert all(len(entry["sha256"]) == 64 for entry in index["files"])
