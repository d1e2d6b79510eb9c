from __future__ import annotations

import json

import pytest

from fasteagle_jax.commands.bench import Run, Spread, compare, main
from fasteagle_jax.metrics import Acceptance
from fasteagle_jax.tree import Tree


def test_a_bench_reports_each_tree_at_each_temperature(talkative, prompts_file, tmp_path, capsys):
    path = tmp_path / "bench.json"
    argv = ["--target", talkative[0], "--drafter", talkative[1], "--prompts", prompts_file, "--limit", 3]
    argv += ["--tree", "chain", "--tree", "best_first:4", "--temperature", 0, "--temperature", 1]
    argv += ["--max-new", 12, "--repeats", 2, "--json", path]
    assert main([str(word) for word in argv]) == 0
    printed = capsys.readouterr().out
    assert "best_first:4" in printed and "tau" in printed
    report = json.loads(path.read_text())
    assert report["compilations_while_timed"] == 0
    assert report["prompts"] == ["questions/0", "questions/1", "questions/2"]
    assert report["dtype"] == "float32" and report["drafter"]["num_levels"] == 2
    results = report["results"]
    assert [(r["temperature"], r["tree"]) for r in results] == [
        (0, "chain"),
        (0, "best_first:4"),
        (1, "chain"),
        (1, "best_first:4"),
    ]
    for r in results:
        assert r["differing_prompts"] == 0
        assert len(r["tokens_per_second"]) == len(r["plain_tokens_per_second"]) == 2
        assert 0 < r["ratio"]["min"] <= r["ratio"]["median"] <= r["ratio"]["max"]
        assert 1 <= r["acceptance_length"] <= 3
        assert len(r["acceptance_by_depth"]) == 2
        assert r["new_tokens"] == sum(r["new_tokens_by_prompt"]) == 36
        # One token a prompt comes from prefill.
        assert r["new_tokens"] - 3 == pytest.approx(r["acceptance_length"] * r["target_passes"])


def test_a_result_counts_tokens_seconds_and_differences():
    def run(seconds, tokens, rounds=2, accepted=(1, 0)):
        return Run(seconds, tokens, Acceptance(rounds, accepted))

    plain = [[run(2.0, [1, 2, 3, 4]), run(2.0, [1, 2, 3, 4])], [run(1.0, [1, 2, 3, 4]), run(1.0, [1, 2, 3, 4])]]
    fast = [[run(1.0, [1, 2, 3, 4]), run(1.0, [1, 2, 3, 4])], [run(1.0, [1, 2, 3, 4]), run(1.0, [1, 2, 9, 4])]]
    result = compare(0.0, Tree("chain"), plain, fast)
    assert result.plain_tokens_per_second == [2, 4]
    assert result.tokens_per_second == [4, 4]
    assert result.ratio == Spread(1.0, 1.5, 2.0)
    assert result.differing_prompts == 1
    assert result.acceptance_length == 1.5
    assert result.acceptance_by_depth == [0.5, 0.0]


def test_a_sweep_over_slots_reports_each_way_and_plots_it(talkative, prompts_file, tmp_path, capsys):
    argv = ["--target", talkative[0], "--drafter", talkative[1], "--prompts", prompts_file, "--limit", 3]
    argv += ["--sweep", "slots", "--slots", 1, 2, "--tree", "best_first:4", "--max-len", 256]
    argv += ["--max-new", 12, "--repeats", 2, "--json", tmp_path / "s.json", "--plot", tmp_path / "s.png"]
    assert main([str(word) for word in argv]) == 0
    assert "best_first:4" in capsys.readouterr().out
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    points = json.loads((tmp_path / "s.json").read_text())["points"]
    assert [(p["slots"], p["way"]) for p in points] == [(n, way) for n in (1, 2) for way in ("plain", "best_first:4")]
    for p in points:
        assert p["differing"] == 0 and p["requests"] == 8
        assert len(p["tokens_per_second"]) == 2 and 0 < p["host_share"] < 1
        assert p["ratio"]["median"] == 1 if p["way"] == "plain" else p["ratio"]["median"] > 0
    assert points[2]["memory"]["target_cache"] == 2 * points[0]["memory"]["target_cache"]


def test_a_sweep_over_memory_shows_that_a_windows_cache_does_not_grow(talkative, prompts_file, tmp_path):
    caches = {}
    for max_len in (300, 600):
        path = tmp_path / f"{max_len}.json"
        argv = ["--target", talkative[0], "--drafter", talkative[1], "--prompts", prompts_file, "--json", path]
        argv += ["--sweep", "memory", "--slots", 2, "--max-len", max_len, "--window", 16]
        assert main([str(word) for word in argv]) == 0
        for point in json.loads(path.read_text())["points"]:
            caches[max_len, point["window"]] = point["drafter_cache"]
            assert point["arguments"] > point["target"] + point["drafter"] + point["target_cache"]
    assert caches[300, 16] == caches[600, 16] < caches[300, None] < caches[600, None]


def test_mistakes_are_one_line(complaint, target_folder, drafter_folder, prompts_file, tmp_path):
    given = ["--target", target_folder, "--drafter", drafter_folder, "--prompts", prompts_file]
    there = tmp_path / "there.json"
    there.write_text("keep")
    assert "exists" in complaint(main, *given, "--json", there)
    assert "temperature is -1.0" in complaint(main, *given, "--temperature", "-1")
    assert "top_p is 0.0" in complaint(main, *given, "--top-p", 0)
    assert "tree 'oak'" in complaint(main, *given, "--tree", "oak")
    assert "no folder" in complaint(main, *given, "--drafter", tmp_path / "nowhere")
    assert "cannot read" in complaint(main, *given, "--prompts", tmp_path / "nowhere.jsonl")
    assert "exceed the target's 1024 positions" in complaint(main, *given, "--max-new", 1000)
    assert "required: --drafter" in complaint(main, "--prompts", prompts_file)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a" * 1000}))
    assert "long/0 has" in complaint(main, *given[:4], "--prompts", long)
    long.write_text('{"prompt": ')
    assert f"{long}:1: not JSON" in complaint(main, *given[:4], "--prompts", long)
