"""`fasteagle compile`: programs' memory, bytes and operations from shapes alone, on simulated devices."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from fasteagle_jax.commands.compile_check import main, simulated_devices
from fasteagle_jax.compiling import programs as compiling
from fasteagle_jax.compiling import table as tables
from fasteagle_jax.compiling.programs import Decoding, Report, compile_program
from fasteagle_jax.compiling.table import file_of, table
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.devices import topology
from fasteagle_jax.devices.chips import Chip, set_libtpu_flags
from fasteagle_jax.devices.sharding import MeshShape
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.llama import LlamaConfig
from fasteagle_jax.training.config import DrafterChoice, RunConfig
from fasteagle_jax.training.losses import LossConfig

VOCAB = 4096


@pytest.fixture(autouse=True)
def eight_devices() -> None:
    """Before a command asks for as many as its mesh has."""
    assert len(jax.devices()) == 8


def config(**changes) -> RunConfig:
    target = LlamaConfig(VOCAB, 64, 128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)
    given = dict(
        target="t", data=("d",), steps=5, batch_size=8, length=128, dtype="float32", target_config=target,
        drafter=DrafterChoice(num_levels=2), loss=LossConfig(chunk=64), mesh=MeshShape(1, 4, 2),
    )  # fmt: skip
    return RunConfig(**(given | changes))


def trained(config: RunConfig) -> Report:
    return compile_program(config, "train", simulated_devices(1 if config.mesh is None else 8))


def test_weights_are_split_over_the_mesh_and_the_loss_keeps_to_its_chunk():
    split, whole = trained(config()), trained(config(mesh=None))
    a, b = split.weights, whole.weights
    assert b["target"] / 8 <= a["target"] < b["target"] / 7.5  # norms are everywhere
    norms = 2 * 3 * 64  # the matrices are split 8 ways, the levels' norms not
    assert a["drafter"] == (b["drafter"] - 4 * norms) // 8 + 4 * norms
    counters = b["optimizer"] - 2 * b["drafter"]  # two moments, and what counts steps
    assert a["optimizer"] == 2 * a["drafter"] + counters
    at_once = trained(config(mesh=None, loss=LossConfig(chunk=1024)))
    logits = 8 * 128 * VOCAB * 4  # float32 [B, T, V]
    assert at_once.temporaries > whole.temporaries + 2 * logits
    larger = dataclasses.replace(config().target_config, vocab_size=2 * VOCAB)
    twice = trained(config(mesh=None, target_config=larger))
    assert twice.temporaries < whole.temporaries + logits / 4


@pytest.mark.slow  # of what one compiler did, long ago
def test_a_device_of_fsdp_has_the_activations_of_its_own_rows_alone():
    """Weights are split along the same mesh axis as rows; the compiler, unguided, split the stream as it does those."""
    wide = dataclasses.replace(config().target_config, vocab_size=256, intermediate_size=1024, num_layers=2)
    split = trained(config(target_config=wide, mesh=MeshShape(1, 8, 1), length=512, remat="full"))
    all_rows = 8 * 512 * 1024 * 4  # gate's float32 [B, T, wide]
    assert split.temporaries < 2 * all_rows


def test_mistakes_are_one_line(complaint, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "from fasteagle_jax.training.config import RunConfig\ndef get_config(): return RunConfig('t', ('d',), 1)\n"
    )
    assert "no target_config" in complaint(main, "--config", path)
    with pytest.raises(UserError, match="the mesh has 16 devices, and there are 8"):
        simulated_devices(16)
    said = "tensor 4 of the mesh does not divide the target's 2 heads of K/V: use tensor 1, 2"
    decoding, mesh = Decoding(1, TreeSpec("chain"), 64, 16), MeshShape(2, 1, 4)
    for program in ("decode", "train"):
        with pytest.raises(UserError, match=said):
            compile_program(config(), program, simulated_devices(8), decoding, mesh)


def test_a_slice_that_is_not_there_or_a_compiler_that_is_not_is_one_line(complaint, monkeypatch):
    said = complaint(main, "--config", "configs/llama31_8b.py", "--topology", "v5e:3x3")
    assert "topology 'v5e:3x3' is not known: use one of v4:2x2x1" in said and "v6e:2x4" in said
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = complaint(main, "--config", "configs/llama31_8b.py", "--topology", "v5e:2x4")
    assert "libtpu is not installed: pip install 'fasteagle-jax[tpu]'" in said
    assert "pip install 'fasteagle-jax[cuda]'" in complaint(main, "--config", "configs/tiny.py", "--topology", "h100")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1.2")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ['libtpu==0.0.42.*; extra == "tpu"'])
    said = complaint(main, "--config", "configs/llama31_8b.py", "--topology", "v5e:2x4")
    assert f"libtpu 0.0.1.2 does not go with jax {jax.__version__}, which needs 0.0.42.*: pip install" in said


def test_what_is_too_large_says_by_how_much_and_which_slice_is_not() -> None:
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.25G of 15.75G hbm. Exceeded by 4.50G."
    error = compiling.out_of_memory(RuntimeError(said), "TPU v5 lite", 8)
    assert str(error) == "does not fit: 20.25 GiB a chip of the 15.75 there are, 4.50 GiB too much: try v5e:4x4"
    said = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (1.56T) exceeds available HBM (31.25G)."
    error = compiling.out_of_memory(RuntimeError(said), "TPU v6 lite", 8)
    assert "1566.19 GiB too much: no slice here is large enough" in str(error)
    assert compiling.out_of_memory(RuntimeError("INTERNAL: bug"), "TPU v5 lite", 8) is None


def test_what_is_too_large_for_a_device_whose_compiler_says_nothing_is_an_error_too(monkeypatch) -> None:
    monkeypatch.setattr(compiling, "chip", lambda kind: Chip(1.0, hbm=2.0**20))
    with pytest.raises(
        UserError, match=r"does not fit: 0.\d+ GiB a chip .* too much: split evenly it takes \d+ devices"
    ):
        trained(config())


def test_the_report_is_printed_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("fasteagle_jax.commands.compile_check.load_config", lambda path: config())
    words = ["--config", "any", "--json", str(tmp_path / "r.json"), "--cache", "64", "--tree", "chain"]
    assert main([*words, "--program", "prefill,decode"]) == 0
    assert capsys.readouterr().out.count("temporaries") == 2
    prefill, decode = json.loads((tmp_path / "r.json").read_text())
    assert decode["mesh"] == "data 1 x fsdp 4 x tensor 2"
    assert prefill["caches"] == decode["caches"] > 0


def test_the_estimate_stands_without_and_with_the_latency_of_kernels(monkeypatch, tmp_path, capsys):
    def known(kernel: float | None) -> tuple[dict, str]:
        monkeypatch.setattr(compiling, "chip", lambda kind: Chip(1e12, 1e12, 1e11, 1e10, kernel))
        monkeypatch.setattr("fasteagle_jax.commands.compile_check.load_config", lambda path: config())
        path = tmp_path / f"{kernel}.json"
        words = ["--config", "any", "--json", str(path), "--cache", "64", "--tree", "chain", "--program", "decode"]
        assert main(words) == 0
        return json.loads(path.read_text())[0], capsys.readouterr().out

    found, said = known(2e-6)
    kernels = found["cost"]["kernels"]
    assert found["latency"] == pytest.approx(2e-6 * kernels) and kernels > 10
    assert found["estimate_with_latency"] == pytest.approx(found["estimate"] + found["latency"])
    assert f"with latency {1e3 * found['estimate_with_latency']:.2f} ms ({kernels:.0f} kernels, 2.00 us each)" in said
    # Where no figure is known there is the estimate alone, which is what it was.
    unknown, said = known(None)
    assert unknown["estimate"] == found["estimate"] and unknown["estimate_with_latency"] is None
    assert "estimate" in said and "latency" not in said


def test_the_table_keeps_what_is_compiled_and_goes_on_past_what_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "TARGETS", {"llama31_8b": ("v5e:2x4",)})
    monkeypatch.setattr(tables, "COLUMNS", {"plain, batch 1": (), "train, 8192": ("length=8192",)})

    def compiler(does: str) -> None:
        script = tmp_path / "compiler"
        script.write_text(f"#!/bin/sh\n{does}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    # What another call may mend is not kept: a failure, a missing package, a kill.
    missing = "echo 'error: libtpu is not installed: pip install it' >&2; exit 2"
    for does, said in (("false", "failed"), (missing, "libtpu is not installed"), ("kill -KILL $$", "failed")):
        compiler(does)
        with pytest.raises(UserError, match=f"--topology v5e:2x4: {said}"):
            table(tmp_path)
        assert not list(tmp_path.glob("*.json"))
    compiler("case \"$*\" in *8192*) kill -ABRT $$;; *) echo 'error: does not fit: 2 GiB' >&2; exit 2;; esac")
    lines = table(tmp_path / "none").splitlines()
    assert lines[2] == "| llama31_8b | v5e:2x4 | plain, batch 1 | no: does not fit: 2 GiB | | | | |"
    figures = dict(program="decode", peak=2**30, hbm=2**34, bytes_ratio=1.25, necessary_flops=2, estimate=0.001)
    figures |= dict(cost={"product_flops": 3}, bound="memory")
    file_of(tmp_path, "llama31_8b", "v5e:2x4", "plain, batch 1").write_text(json.dumps([figures]))
    lines = table(tmp_path).splitlines()
    assert lines[2:] == [
        "| llama31_8b | v5e:2x4 | plain, batch 1 | 1.0 of 16.0 GiB | 1.25 | 1.50 | 1.0 | memory |",
        "| llama31_8b | v5e:2x4 | train, 8192 | no: the compiler crashed | | | | |",
    ]


def test_the_table_needs_the_package_alone(tmp_path):
    """It read configs/NAME.py by a relative path, which an installed wheel does not have."""
    home, empty = tmp_path / "site", tmp_path / "empty"
    for folder in (home, empty):
        folder.mkdir()
    (home / "fasteagle_jax").symlink_to(Path(tables.__file__).parents[1])
    code = """
import sys
from pathlib import Path
from fasteagle_jax.commands.compile_check import main
Path("compiler").write_text("#!/bin/sh\\necho $* >> commands; echo 'error: does not fit' >&2; exit 2\\n")
Path("compiler").chmod(0o755)
sys.executable = str(Path("compiler").resolve())
assert main(["--table", "figures"]) == 0
words = Path("commands").read_text().splitlines()[0].split()
main([*words[words.index("compile") + 1 :], "--topology", "v5e:3x3", "--json", "other.json"])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=empty, env=os.environ | {"PYTHONPATH": str(home)}, capture_output=True, text=True
    )
    assert "| llama33_70b | v5p:2x2x4 | train, 8192 | no: does not fit" in done.stdout, done.stderr
    # The configuration that a child is given is found there too: only the slice is not.
    assert "topology 'v5e:3x3' is not known" in done.stderr


def test_the_compiler_of_a_slice_leaves_this_machines_accelerators_alone(complaint, monkeypatch):
    def devices(name: str) -> None:
        raise UserError(f"platforms: {jax.config.jax_platforms}")

    monkeypatch.setattr(topology, "devices", devices)
    jax.config.update("jax_platforms", None)
    assert "platforms: cpu" in complaint(main, "--config", "configs/tiny.py", "--topology", "h100")


def test_what_a_user_tells_libtpu_stays(monkeypatch):
    own = "--xla_tpu_control_large_2nd_minor_layout_for_x16"
    for given, expected in (
        ("", f"{own}=false"),
        ("--a=1", f"--a=1 {own}=false"),
        (f"{own}=true --a", f"{own}=true --a"),
    ):
        monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
        set_libtpu_flags()
        set_libtpu_flags()
        assert os.environ["LIBTPU_INIT_ARGS"] == expected
