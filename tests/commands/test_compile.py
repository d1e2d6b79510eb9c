"""`fasteagle compile`: a train step's memory from shapes alone."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fasteagle_jax.commands.compile_check import compile_train_step, main
from fasteagle_jax.config import LlamaConfig
from fasteagle_jax.errors import UserError
from fasteagle_jax.losses import LossConfig
from fasteagle_jax.run import DrafterChoice, RunConfig
from fasteagle_jax.sharding import MeshShape

VOCAB = 4096


def config(**changes) -> RunConfig:
    target = LlamaConfig(VOCAB, 64, 128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16)
    given = dict(
        target="t", data=("d",), steps=5, batch_size=8, length=128, dtype="float32", target_config=target,
        drafter=DrafterChoice(num_levels=2), loss=LossConfig(chunk=64), mesh=MeshShape(1, 4, 2),
    )  # fmt: skip
    return RunConfig(**(given | changes))


def test_weights_are_split_over_the_mesh_and_the_loss_keeps_to_its_chunk():
    split, whole = compile_train_step(config()), compile_train_step(config(mesh=None), 1)
    assert whole["target_bytes"] / 8 <= split["target_bytes"] < whole["target_bytes"] / 7.5  # norms are everywhere
    norms = 2 * 3 * 64  # the matrices are split 8 ways, the levels' norms not
    assert split["drafter_bytes"] == (whole["drafter_bytes"] - 4 * norms) // 8 + 4 * norms
    counters = whole["optimizer_bytes"] - 2 * whole["drafter_bytes"]  # two moments, and what counts steps
    assert split["optimizer_bytes"] == 2 * split["drafter_bytes"] + counters
    at_once = compile_train_step(config(mesh=None, loss=LossConfig(chunk=1024)), 1)
    logits = 8 * 128 * VOCAB * 4  # float32 [B, T, V]
    assert at_once["temporaries_bytes"] > whole["temporaries_bytes"] + 2 * logits
    larger = dataclasses.replace(config().target_config, vocab_size=2 * VOCAB)
    twice = compile_train_step(config(mesh=None, target_config=larger), 1)
    assert twice["temporaries_bytes"] < whole["temporaries_bytes"] + logits / 4


def test_a_device_of_fsdp_has_the_activations_of_its_own_rows_alone():
    """Weights are split along the same mesh axis as rows; the compiler, unguided, split the stream as it does those."""
    wide = dataclasses.replace(config().target_config, vocab_size=256, intermediate_size=1024, num_layers=2)
    split = compile_train_step(config(target_config=wide, mesh=MeshShape(1, 8, 1), length=512, remat="full"))
    all_rows = 8 * 512 * 1024 * 4  # gate's float32 [B, T, wide]
    assert split["temporaries_bytes"] < 2 * all_rows


def test_mistakes_are_one_line(complaint, tmp_path):
    path = tmp_path / "config.py"
    path.write_text("from fasteagle_jax.run import RunConfig\ndef get_config(): return RunConfig('t', ('d',), 1)\n")
    assert "no target_config" in complaint(main, "--config", path)
    with pytest.raises(UserError, match="the mesh has 16 devices, and there are 8"):
        compile_train_step(config(mesh=MeshShape(1, 16, 1), batch_size=16))


def test_the_report_is_printed_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("fasteagle_jax.commands.compile_check.load_config", lambda path: config())
    assert main(["--config", "any", "--json", str(tmp_path / "r.json"), "length=64"]) == 0
    assert "temporaries_bytes" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["tokens_a_step"] == 8 * 64
