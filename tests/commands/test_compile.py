"""`fasteagle compile`: a train step's memory from shapes alone."""

from __future__ import annotations

import json

import pytest

from fasteagle_jax.commands.compile_check import compile_train_step, main
from fasteagle_jax.config import LlamaConfig
from fasteagle_jax.errors import UserError
from fasteagle_jax.losses import LossConfig
from fasteagle_jax.run import DrafterChoice, RunConfig
from fasteagle_jax.sharding import MeshShape


def config(**changes) -> RunConfig:
    target = LlamaConfig(4096, 64, 128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16)
    given = dict(
        target="t", data=("d",), steps=5, batch_size=8, length=128, dtype="float32", target_config=target,
        drafter=DrafterChoice(num_levels=2), loss=LossConfig(chunk=64), mesh=MeshShape(1, 4, 2),
    )  # fmt: skip
    return RunConfig(**(given | changes))


def test_weights_are_split_over_the_mesh_and_the_loss_keeps_to_its_chunk():
    split, whole = compile_train_step(config()), compile_train_step(config(mesh=None), 1)
    for name in ("target_bytes", "drafter_bytes", "optimizer_bytes"):
        assert whole[name] / 8 <= split[name] < whole[name] / 7.5
    at_once = compile_train_step(config(mesh=None, loss=LossConfig(chunk=1024)), 1)
    logits = 8 * 128 * 4096 * 4  # float32 [B, T, V]
    assert at_once["temporaries_bytes"] > 2 * logits > 4 * whole["temporaries_bytes"]


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
