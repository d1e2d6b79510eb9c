from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fasteagle_jax.bench import peers, progress, runner
from fasteagle_jax.bench.acceptance import Answer, Case, Counts, outside, repeats
from fasteagle_jax.bench.decoders import DecoderSpec, parse_decoders
from fasteagle_jax.bench.figures import show
from fasteagle_jax.bench.peers import until_end
from fasteagle_jax.bench.prompts import check_fits
from fasteagle_jax.bench.runner import MEAN, Comparison, Measured, Result, Run, means
from fasteagle_jax.bench.sweeps import ablation
from fasteagle_jax.commands.bench import main
from fasteagle_jax.decoding.acceptance import Acceptance
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import Completion
from fasteagle_jax.errors import UserError


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder of two tasks, one of two turns; all prompts are padded to the same length, to compile once."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "talk.jsonl").write_text(
        json.dumps({"question_id": 7, "turns": ["Hi? Please answer in one word.", "And then?"]}) + "\n"
    )
    sums = [{"question_id": i, "turns": [f"What is {i} + {i}? In one word, please."]} for i in range(4)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sums))
    return folder


def run(*argv: object) -> int:
    return main([str(word) for word in argv])


def test_a_bench_reports_each_drafter_on_each_task_at_each_temperature(talkative, tasks, tmp_path, capsys):
    target, drafter = talkative
    decoders = f"plain,a={drafter}@best_first:4"
    argv = ["--target", target, "--tasks", "talk,sums", "--prompts-folder", tasks, "--limit", 2, "--drafters", decoders]
    assert run(*argv, "--temperature", "0,1", "--max-new", 12, "--repeats", 2, "--results", tmp_path / "results") == 0
    printed = capsys.readouterr().out
    assert "a best_first:4" in printed and "overhead" in printed
    for name in ("speedup", "acceptance", "time"):
        assert (tmp_path / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "results/results.json").read_text())
    assert report["compilations_while_timed"] == 0 and report["drafters"]["a"]["num_levels"] == 2
    cases = [case for case in report["cases"] if case["temperature"] == 1]
    assert [case["id"] for case in cases] == ["talk/7/1", "talk/7/2", "sums/0", "sums/1"]
    assert cases[1]["prompt_tokens"] > cases[0]["prompt_tokens"] + 10  # the first turn and its answer are in it

    names = [("plain", None), ("a", "best_first:4")]
    results = report["results"]
    keys = [(r["temperature"], r["task"], r["drafter"], r["tree"]) for r in results]
    assert keys == [(x, task, *name) for x in (0, 1) for task in ("talk", "sums", MEAN) for name in names]
    for r in results:
        assert r["differing"] == [] and r["cases"] == (4 if r["task"] == MEAN else 2)
        assert len(r["tokens_per_second"]) == len(r["speedup"]) == 2 and min(r["speedup"]) > 0
        assert r["new_tokens"] == (48 if r["task"] == MEAN else 24)
        # One token an answer comes from prefill.
        assert r["new_tokens"] - r["cases"] == r["target_passes"] + sum(r["accepted_at"])
        if r["drafter"] == "plain":
            assert r["speedup"] == [1, 1] and r["acceptance_length"] == 1

    breakdowns = report["time_of_a_round"]
    assert [(s["temperature"], s["drafter"], s["tree"]) for s in breakdowns] == [
        (x, *name) for x in (0, 1) for name in names
    ]
    for s in breakdowns:
        parts = {"target", "tree", "choose", "commit"} | ({"draft"} if s["tree"] else set())
        assert set(s["parts"]) == parts and s["nodes"] == (4 if s["tree"] else 1)
        assert s["rest"] == pytest.approx(s["round"]["median"] - sum(part["median"] for part in s["parts"].values()))


def test_a_stopped_bench_keeps_finished_tasks_and_resumes(talkative, tasks, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "results"
    argv = ["--target", talkative[0], "--tasks", "talk,sums", "--prompts-folder", tasks, "--limit", 2]
    argv += ["--drafters", f"a={talkative[1]}@best_first:4", "--temperature", "1", "--max-new", 12, "--repeats", 2]
    measure, seen = Comparison.measure, []

    def interrupted(self: Comparison, cases, repeats, report) -> Measured:
        seen.append(cases[0].task)
        if seen == ["talk", "sums"]:
            raise KeyboardInterrupt
        return measure(self, cases, repeats, report)

    monkeypatch.setattr(Comparison, "measure", interrupted)
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    assert run(*argv, "--results", folder) == 130
    lines = capsys.readouterr().err.splitlines()  # no terminal: what is measured, and how fast so far
    assert any(line.startswith("4 of 12 answers; talk, tokens/s: plain ") for line in lines), lines
    assert [path.name for path in folder.iterdir()] == [progress.UNFINISHED]
    assert run(*argv, "--results", folder, "--max-new", 11) == 2
    assert "was begun with arguments.max_new 12, not 11: use the same settings" in capsys.readouterr().err
    kept = json.loads((folder / progress.UNFINISHED).read_text())["parts"]["temperature 1.0, talk"]

    assert run(*argv, "--results", folder) == 0
    assert seen == ["talk", "sums", "sums"]
    assert "1 parts are measured already" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"results.json", "speedup.png", "acceptance.png", "time.png"}
    report = json.loads((folder / "results.json").read_text())
    assert report["results"][:2] == kept["results"] and [r["task"] for r in report["results"][::2]][-1] == MEAN
    assert len(report["time_of_a_round"]) == 2
    assert run(*argv, "--results", folder) == 2  # a finished one is never touched
    assert f"{folder} exists" in capsys.readouterr().err
    # The same cases with the same seeds as in one go.
    assert run(*argv, "--results", tmp_path / "whole") == 0
    whole = json.loads((tmp_path / "whole/results.json").read_text())
    assert whole["cases"] == report["cases"]


def test_repeats_are_counted_by_the_longest_match_and_its_last_occurrence():
    """Before 1 and 8 nothing is known; 2 comes after `1`, 3 after `1 2` as the last time, 9 after `1 2 3` as never."""
    counts = repeats([([1, 2, 4, 5, 1, 2], [3, 1, 2, 3, 9, 8])])
    assert counts == [(2, 0), (1, 1), (1, 1), (1, 0), *[(0, 0)] * 5]


def test_tokens_outside_of_a_vocabulary_are_those_that_no_guess_could_be():
    """The first token of an answer is the prefill's; a mean counts tasks alike, not tokens."""
    cases = [Case("x", "0", [1], 0), Case("x", "1", [1], 0), Case("y", "2", [1], 0)]
    answers = [Answer(tokens, 1, []) for tokens in ([9, 1, 2, 9], [9], [1, 9])]
    known = frozenset({1, 2})
    assert outside(cases, answers, known, "x") == 1 / 3 and outside(cases, answers, known, "y") == 1
    assert outside(cases, answers, known) == 2 / 3 and outside(cases, answers, None) == 0


def test_lookup_without_a_drafter_is_measured_beside_drafters(talkative, tasks, tmp_path, capsys, complaint):
    target, drafter = talkative
    given = ["--target", target, "--tasks", "talk", "--prompts-folder", tasks, "--limit", 2, "--max-new", 12]
    of_both = ["--drafters", f"a={drafter}@best_first:4,text=none@best_first:4+lookup:4"]
    assert "measured with --acceptance alone" in complaint(main, *given, *of_both)
    assert "a=none drafts nothing" in complaint(main, *given, "--acceptance", "--drafters", "a=none")
    argv = [*given, *of_both, "--acceptance", "--slots", 2, "--max-len", 256, "--results", tmp_path / "results"]
    assert run(*argv) == 0
    report = json.loads((tmp_path / "results" / "results.json").read_text())
    assert report["drafters"]["text"] == {"kind": "lookup"}
    (record,) = report["acceptance"]
    assert [(e["drafter"], e["tree"]) for e in record["estimates"]] == [
        ("a", "best_first:4"),
        ("text", "best_first:4+lookup:4"),
    ]
    assert all(e["outside"] == 0 and e["tau"] >= 1 for e in record["estimates"])  # both may guess every token


@pytest.mark.slow  # in short: test_cost.py measures acceptance
def test_acceptance_of_many_prompts_at_once_counts_what_the_bench_counts_one_by_one(talkative, tasks, tmp_path, capsys):
    target, drafter = talkative
    argv = ["--target", target, "--tasks", "talk,sums", "--prompts-folder", tasks, "--max-new", 12]
    argv += ["--temperature", "0,1", "--drafters", f"a={drafter}@best_first:4,b={drafter}@chain"]
    assert run(*argv, "--repeats", 1, "--results", tmp_path / "one") == 0
    many = ["--acceptance", "--slots", 4, "--max-len", 256, "--results", tmp_path / "many"]
    assert run(*argv, *many) == 0
    assert "a best_first:4" in (printed := capsys.readouterr().out) and "same conversations" in printed
    one, many = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "many"))
    assert (tmp_path / "many/acceptance_t0.png").read_bytes().startswith(b"\x89PNG")
    expected = {(r["temperature"], r["task"], r["tree"]): r for r in one["results"] if r["drafter"] != "plain"}
    found = {(x["temperature"], e["task"], e["tree"]): e for x in many["acceptance"] for e in x["estimates"]}
    assert list(found) == list(expected) and any(sum(estimate["accepted_at"]) for estimate in found.values())
    for name, estimate in found.items():
        counted = expected[name]
        assert estimate["accepted_at"] == counted["accepted_at"]
        assert estimate["target_passes"] == counted["target_passes"]
        assert estimate["tau"] == pytest.approx(counted["acceptance_length"])
        assert estimate["interval"][0] <= estimate["tau"] <= estimate["interval"][1]


def test_errors_of_tau_are_those_of_the_prompts_and_differences_are_of_the_same_prompts():
    rng = np.random.default_rng(0)
    decoders = parse_decoders(["a=folder", "b=folder"], "chain")[1:]
    num_prompts, rounds = 400, 20
    accepted = rng.integers(0, rounds + 1, num_prompts)  # one more or less in b, and of two turns each
    shift = rng.integers(-1, 2, num_prompts)
    cases = [Case("x", str(i), [1], 0) for i in range(num_prompts) for _ in range(2)]
    answers = {
        decoders[0]: [Answer([1], rounds, [int(n)]) for n in accepted for _ in range(2)],
        decoders[1]: [Answer([1], rounds, [int(n + s), 0]) for n, s in zip(accepted, shift, strict=True) for _ in "ab"],
    }
    counts = Counts.of(cases, answers)
    a, b = counts.estimates()
    assert a["tau"] == pytest.approx(1 + accepted.mean() / rounds) and a["target_passes"] == 2 * num_prompts * rounds
    assert a["by_depth"] == [pytest.approx(accepted.mean() / rounds), 0.0]
    # Both turns of a prompt are drawn together, so they tell no more than one.
    assert a["standard_error"] == pytest.approx(accepted.std(ddof=1) / rounds / num_prompts**0.5, rel=0.1)
    (difference,) = counts.differences()
    assert difference["difference"] == pytest.approx(b["tau"] - a["tau"]) and difference["over"] == "a chain"
    low, high = difference["difference_interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * shift.std(ddof=1) / rounds / num_prompts**0.5, rel=0.1)
    assert low < 0 < high and high - low < (a["interval"][1] - a["interval"][0]) / 4


def test_a_result_counts_tokens_seconds_and_differences():
    def one(seconds, tokens, accepted=(1, 0)):
        return Run(seconds, seconds / 4, seconds / 2, tokens, Acceptance(2, accepted))

    sampling, answer = make_sampling(1), [1, 2, 3, 4]
    cases = [runner.Case(task, task + "/0", [1], sampling, answer) for task in ("x", "y")]
    plain, decoder = parse_decoders(["a=folder"], "chain")
    runs = {
        plain: [[one(2.0, answer, ()), one(2.0, answer, ())], [one(1.0, answer, ()), one(1.0, answer, ())]],
        decoder: [[one(1.0, answer), one(0.5, answer, (2, 1))], [one(1.0, answer), one(0.5, [1, 2, 9, 4], (2, 1))]],
    }
    of_tasks = Measured(cases, runs, 0).results(0.0)
    assert [Result.read(r.record(), runs) for r in of_tasks] == of_tasks
    results = {(r.task, r.decoder): r for r in of_tasks + means(of_tasks)}
    assert results["x", plain].tokens_per_second == [2, 4]
    assert results["x", decoder].speedup == [2, 1] and results["y", decoder].speedup == [4, 2]
    assert results["x", decoder].rounds_speedup == [2, 1]
    assert results["x", decoder].differing == [] and results["y", decoder].differing == ["y/0"]
    assert results["x", decoder].prefill_share == 0.25 and results["x", decoder].host_share == 0.25
    whole = results[MEAN, decoder]
    assert whole.speedup == [3, 1.5] and whole.tokens_per_second == [6, 6]
    assert whole.acceptance_length == (1.5 + 2.5) / 2
    assert whole.acceptance_by_depth == [0.75, 1 / 3]
    assert whole.differing == ["y/0"] and whole.cases == 2


def test_trees_of_a_sweep_have_equal_budgets():
    decoder = DecoderSpec("a", "best_first:16", Path("folder"))
    assert [point.decoder.tree for point in ablation("nodes", decoder, 7)] == [
        f"best_first:{n}" for n in (4, 8, 12, 16, 24, 32)
    ]
    assert [point.value for point in ablation("levels", decoder, 7)] == list(range(1, 8))
    kinds = [point.decoder.tree for point in ablation("tree", decoder, 7)]
    assert kinds == ["chain", "best_first:8", "backbone:2", "best_first:15", "backbone:4", "best_first:29"]
    few = dataclasses.replace(
        decoder, tree="best_first:4"
    )  # reaches three levels, which the other kinds are not cut to
    assert [point.decoder.tree for point in ablation("tree", few, 7)] == kinds
    assert [point.value for point in ablation("levels", few, 7)] == [1, 2, 3]


def test_a_sweep_over_slots_reports_each_way_and_plots_it(talkative, tasks, tmp_path, capsys):
    argv = ["--target", talkative[0], "--drafters", f"a={talkative[1]}@best_first:4", "--tasks", "sums"]
    argv += ["--prompts-folder", tasks, "--limit", 3, "--sweep", "slots", "--slots", 1, 2, "--max-len", 128]
    argv += ["--max-new", 12, "--repeats", 2, "--results", tmp_path / "results"]
    assert run(*argv) == 0
    assert "best_first:4" in capsys.readouterr().out
    assert (tmp_path / "results/slots.png").read_bytes().startswith(b"\x89PNG")
    points = json.loads((tmp_path / "results/results.json").read_text())["points"]
    assert [(p["slots"], p["decoder"]) for p in points] == [
        (n, decoder) for n in (1, 2) for decoder in ("plain", "a best_first:4")
    ]
    for p in points:
        assert p["differing"] == 0 and p["requests"] == 8
        assert len(p["tokens_per_second"]) == 2 and 0 < p["host_share"] < 1
        assert p["ratio"]["median"] == 1 if p["decoder"] == "plain" else p["ratio"]["median"] > 0
    assert points[2]["memory"]["target_cache"] == 2 * points[0]["memory"]["target_cache"]


@pytest.mark.torch
def test_beside_the_engine_transformers_answers_the_same_with_the_same_weights(
    talkative, tasks, tmp_path, capsys, complaint, monkeypatch
):
    given = ["--target", talkative[0], "--drafters", f"a={talkative[1]}@best_first:4", "--tasks", "sums"]
    given += ["--prompts-folder", tasks, "--limit", 3, "--sweep", "slots", "--slots", 2, "--max-len", 128]
    argv = [*given, "--max-new", 12, "--repeats", 2, "--beside", "transformers,transformers:bfloat16"]
    assert run(*argv, "--results", tmp_path / "results") == 0
    report = json.loads((tmp_path / "results/results.json").read_text())
    names = ["plain", "a best_first:4", "transformers", "transformers:bfloat16"]
    assert [p["decoder"] for p in report["points"]] == names
    theirs = report["points"][2]
    assert theirs["differing"] == 0 and theirs["memory"] is None and len(theirs["tokens_per_second"]) == 2
    assert "| transformers:bfloat16" in capsys.readouterr().out
    assert until_end([3, 4, 9, 5], [9, 5]) == [3, 4, 9] and until_end([3, 4], [9]) == [3, 4]

    assert "'vllm' is not known: write some of transformers" in complaint(main, *given, "--beside", "vllm")
    assert "--beside is of --sweep slots" in complaint(main, *given, "--beside", "transformers", "--sweep", "memory")
    assert "without filters" in complaint(main, *given, "--beside", "transformers", "--top-k", 5)
    monkeypatch.setattr(peers, "LlamaCpp", lambda *_: SimpleNamespace(most_rows=1))
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: True)
        assert "one row at a time: have 1 among the --slots" in complaint(main, *given, "--beside", "llama.cpp")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--beside llama.cpp needs llama_cpp: pip install" in complaint(main, *given, "--beside", "llama.cpp")


@pytest.mark.slow  # tests/engine/test_engine.py has the caches, the test above a sweep
def test_a_sweep_over_memory_shows_that_a_windows_cache_does_not_grow(talkative, tasks, tmp_path):
    caches = {}
    for max_len in (300, 600):
        folder = tmp_path / str(max_len)
        argv = ["--target", talkative[0], "--drafters", f"a={talkative[1]}", "--tasks", tasks / "sums.jsonl"]
        argv += ["--sweep", "memory", "--slots", 2, "--max-len", max_len, "--window", 16, "--results", folder]
        assert run(*argv) == 0
        for point in json.loads((folder / "results.json").read_text())["points"]:
            caches[max_len, point["window"]] = point["drafter_cache"]
            assert point["arguments"] > point["target"] + point["drafter"] + point["target_cache"]
    assert caches[300, 16] == caches[600, 16] < caches[300, None] < caches[600, None]


def test_a_sweep_over_slots_counts_what_differs_in_any_repeat(talkative, tasks, tmp_path, monkeypatch):
    generate, calls = Engine.generate, itertools.count()

    def mistaken(engine: Engine, *asked) -> list[Completion]:
        """With a mistake in the third answer of the drafter's first timed repeat: both decoders warm up before that."""
        found = generate(engine, *asked)
        if next(calls) == 3:
            found[2] = dataclasses.replace(found[2], tokens=[*found[2].tokens, 1])
        return found

    monkeypatch.setattr(Engine, "generate", mistaken)
    argv = ["--target", talkative[0], "--drafters", f"a={talkative[1]}@best_first:4", "--tasks", "sums"]
    argv += ["--prompts-folder", tasks, "--limit", 3, "--sweep", "slots", "--slots", 1, "--max-len", 128]
    argv += ["--max-new", 12, "--repeats", 2, "--results", tmp_path / "results"]
    assert run(*argv) == 1
    points = json.loads((tmp_path / "results/results.json").read_text())["points"]
    assert [(point["decoder"], point["differing"]) for point in points] == [("plain", 0), ("a best_first:4", 1)]


def test_a_table_shows_names_as_they_are(capsys):
    show("title", ("drafter [x]",), [("[/b] of [red]",)])
    assert "[/b] of [red]" in (said := capsys.readouterr().out) and "drafter [x]" in said


def test_a_prompt_with_a_token_that_the_embedding_lacks_is_named():
    target = SimpleNamespace(vocab_size=259, max_positions=10)
    check_fits(target, "sums/0", [1, 258], 8)
    with pytest.raises(UserError, match="^prompt sums/0 holds token 259, but the target has 259: "):
        check_fits(target, "sums/0", [1, 259], 8)
    with pytest.raises(UserError, match="^prompt sums/0 has 2 tokens, which with 9 new ones exceed"):
        check_fits(target, "sums/0", [1, 258], 9)


def test_mistakes_are_one_line(complaint, target_folder, drafter_folder, talkative, tasks, tmp_path):
    models = ["--target", target_folder, "--drafters", f"a={drafter_folder}"]
    given = [*models, "--tasks", "sums", "--prompts-folder", tasks]
    (tmp_path / "there").mkdir()
    assert f"{tmp_path / 'there'} exists" in complaint(main, *given, "--results", tmp_path / "there")
    assert "temperature is -1.0" in complaint(main, *given, "--temperature=-1")
    assert "'warm' is not a list of numbers" in complaint(main, *given, "--temperature", "warm")
    assert "top_p is 0.0" in complaint(main, *given, "--top-p", 0)
    for option in ("--tasks", "--temperature", "--drafters"):
        assert f"{option}: ',' is an empty list" in complaint(main, *given, option, ",")
    assert "--max-len 40 leaves" in complaint(main, *given, "--sweep", "rows", "--max-len", 40)
    assert "'0' is not a whole number of at least 1" in complaint(main, *given, "--repeats", 0)
    assert "'levels,slots' is not known" in complaint(main, *given, "--sweep", "levels,slots")
    assert "two measurements" in complaint(main, *given, "--sweep", "slots", "--acceptance")
    short = ["--acceptance", "--max-len", 64]
    assert "prompt sums/0 has" in (said := complaint(main, *given, *short)) and "exceed --max-len 64: raise it" in said
    assert "is of one temperature" in complaint(main, *given, "--sweep", "slots", "--temperature", "0,1")
    assert "exceed the target's 1024 positions" in complaint(main, *given, "--max-new", 1000)
    assert "prompt talk/7 has" in complaint(main, *given, "--tasks", "talk", "--max-new", 500)  # its second turn

    def drafters(words: str) -> str:
        return complaint(main, *given, "--drafters", words)

    assert "drafter 'medusa' is not known: write plain, NAME=FOLDER" in drafters("medusa")
    assert "(fasteagle, eagle3) or `shipped`" in drafters("fasteagle")
    assert "no folder" in drafters(f"a={tmp_path / 'nowhere'}")
    assert "holds no config.json" in drafters(f"a={tmp_path}")
    assert "tree 'oak' is not known" in drafters(f"a={drafter_folder}@oak")
    assert "acceptance '0.8/2' is not understood" in drafters("simulated=0.8/2")
    assert "two drafters have the name a" in drafters(f"a={drafter_folder},a={talkative[1]}")
    assert "plain decoding alone" in drafters("plain")
    assert "simulated is simulated" in complaint(main, *given, "--sweep", "slots", "--drafters", "simulated=0.5")
    other = shutil.copytree(drafter_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 24}))
    assert "hidden_size 24, the target 16: use the target" in drafters(f"a={other}")
    (other / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "head_dim"}))
    assert "is damaged" in drafters(f"a={other}")
    (other / "config.json").write_text(json.dumps(config | {"architectures": None}))
    assert "is not of a FastEagle" in drafters(f"a={other}")
    (other / "config.json").write_text(json.dumps(config | {"feature_layers": [0, 1, -1]}))
    assert "feature_layers has -1, the target 2 layers: give 0 to 2" in drafters(f"a={other}")
    damaged = shutil.copytree(drafter_folder, tmp_path / "damaged") / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\0\0\1")
    assert f"{damaged} has the SHA-256" in drafters(f"a={damaged.parent}")

    assert "task 'sum' is not known" in complaint(main, *given, "--tasks", "sum")
    assert "has sums, talk; the hub mt_bench" in complaint(main, *given, "--tasks", "sums,sum")
    assert "name a folder of files with --prompts-folder" in complaint(main, *models, "--tasks", "sums")
    assert "holds no .jsonl file" in complaint(main, *models, "--tasks", "sums", "--prompts-folder", tmp_path / "there")
    assert "cannot read" in complaint(main, *given, "--tasks", tmp_path / "nowhere.jsonl")
    assert "required: --drafters" in complaint(main, "--tasks", "sums")
    bad = tasks / "bad.jsonl"
    bad.write_text('{"turns": ["Hi."]}\n{"turns": \n')
    assert f"{bad}:2: not JSON" in complaint(main, *given, "--tasks", "bad")
    bad.write_text('{"turns": ["Hi."]}\n{"turns": [3]}\n')
    assert f"{bad}:2: turns[0] is 3: give a text" in complaint(main, *given, "--tasks", "bad")
    bad.write_text("")
    assert "no prompt in" in complaint(main, *given, "--tasks", "bad")
