from __future__ import annotations

import json

import numpy as np
import pytest

from fasteagle_jax.bench import verify_cost
from fasteagle_jax.commands.bench import main
from fasteagle_jax.decoding.tree import TreeSpec


def test_a_sweep_over_rows_holds_every_pass_and_round_against_the_plain_one(
    talkative, prompts_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(verify_cost, "ROWS", (1, 2))
    monkeypatch.setattr(
        verify_cost, "tree_choices", lambda num_levels, reads: (None, TreeSpec(nodes=4, levels=num_levels))
    )
    argv = ["--target", talkative[0], "--drafters", f"f={talkative[1]}", "--tasks", prompts_file, "--limit", 1]
    argv += ["--sweep", "rows", "--max-len", 128, "--repeats", 2, "--results", tmp_path / "rows"]
    assert main([str(word) for word in argv]) == 0
    report = json.loads((tmp_path / "rows" / "results.json").read_text())
    assert report["read"]["min"] > 0 and report["multiply"]["min"] > 0
    costs = report["costs"]
    names = ["pass, rows: 1", "pass, rows: 2", "round, plain", "round, best_first:4:2"]
    assert [cost["name"] for cost in costs] == names
    for one, several in (costs[:2], costs[2:]):
        assert one["ratio"] == {"min": 1, "median": 1, "max": 1}
        assert several["milliseconds"]["min"] > 0
        # Of two repeats the median is the mean, and the ratios lie within those of the extremes.
        assert several["ratio"]["median"] == pytest.approx(np.mean([several["ratio"]["min"], several["ratio"]["max"]]))
        assert several["ratio"]["max"] <= several["milliseconds"]["max"] / one["milliseconds"]["min"] * (1 + 1e-6)
