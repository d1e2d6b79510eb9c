"""`fasteagle bench --predict`: speed-ups from compiled rounds and given rates."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fasteagle_jax.bench.predict import acceptance_length
from fasteagle_jax.commands.bench import main
from fasteagle_jax.compiling.table import file_of
from fasteagle_jax.training.config import load_config


def test_tau_is_one_and_the_chance_to_reach_each_depth() -> None:
    assert acceptance_length([]) == 1
    assert acceptance_length([0.5, 0.4, 1.0]) == pytest.approx(1 + 0.5 + 0.2 + 0.2)


def test_the_speed_up_is_tau_by_the_rounds_cost(tmp_path, capsys) -> None:
    for title, seconds in (("plain, batch 1", 0.002), ("60 nodes, batch 1", 0.003)):
        file_of(tmp_path, "llama31_8b", "v5e:2x4", title).write_text(json.dumps([{"estimate": seconds}]))
    file_of(tmp_path, "llama31_8b", "v5e:2x4", "plain, batch 32").write_text(json.dumps([{"error": "does not fit"}]))
    assert main(["--predict", str(tmp_path), "--rates", "0.5/0.5"]) == 0
    said = capsys.readouterr().out
    assert "| llama31_8b | v5e:2x4 | 1 | 2.00 | 3.00 | 1.17 | 583 |" in said and said.count("v5e:2x4") == 1
    assert "are estimates" in said and "DeepSeek-R1-Distill-LLaMA-8B has LLaMA-3.1-8B's sizes" in said


def test_the_target_that_has_no_rows_of_its_own_is_compiled_to_the_same_programs() -> None:
    deepseek, llama = (load_config(f"configs/{n}.py") for n in ("deepseek_r1_distill_llama_8b", "llama31_8b"))
    assert dataclasses.replace(deepseek, target=llama.target, data=llama.data) == llama


def test_a_folder_without_rounds_is_one_line(complaint, tmp_path) -> None:
    assert "make them with fasteagle compile --table" in complaint(main, "--predict", tmp_path, "--rates", "0.5")
    file_of(tmp_path, "llama31_8b", "v5e:2x4", "plain, batch 1").write_text("[{")
    assert "remove it and run fasteagle compile --table" in complaint(main, "--predict", tmp_path, "--rates", "0.5")
