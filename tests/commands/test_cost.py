"""`fasteagle bench --cost`: acceptance of a small target over rounds compiled at a large one's sizes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from fasteagle_jax.bench import cost
from fasteagle_jax.commands.bench import main
from fasteagle_jax.compiling.published import PUBLISHED
from fasteagle_jax.devices import topology
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.llama import LlamaConfig
from fasteagle_jax.training.config import apply_changes, drafter_config

SMALL = LlamaConfig(512, 64, 128, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=16)
DRAFTERS = {
    "cheap": default_config(SMALL, context="target", levels="shared", side_by_side=True, reinject=True, edges=128),
    "paper": default_config(SMALL, num_levels=5, correction=16, window=512, draft_vocab_size=128),
    "eagle3": default_config(SMALL, "eagle3", num_levels=8),
}
TAUS = {
    ("cheap", "best_first:16"): 2.4,
    ("paper", "best_first:8"): 2.0,
    ("eagle3", "best_first:16"): 2.5,
    ("eagle3", "best_first:8:3"): 2.2,
}
TREES = {"plain": (2.0, 3.0), "best_first:16": (4.0, 8.0), "best_first:8": (3.0, 5.0), "best_first:8:3": (3.5, 7.0)}


def results(folder: Path, **changes) -> Path:
    """A folder of results of two tasks and their mean, at one temperature."""
    folder.mkdir(exist_ok=True)
    estimates = [
        {"task": task, "drafter": name, "tree": tree, "tau": tau if task == "mean" else 9.0}
        for (name, tree), tau in TAUS.items()
        for task in ("a", "b", "mean")
    ]
    drafters = {name: dataclasses.asdict(config) for name, config in DRAFTERS.items()}
    report = {"arguments": {"target": "small-135m"}, "drafters": drafters}
    report |= {"acceptance": [{"temperature": 0.0, "estimates": estimates}]} | changes
    (folder / "results.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was compiled, by a compiler that knows the tree alone."""
    calls: list[list[str]] = []

    def compile_apart(path: Path, words: list[str]) -> None:
        calls.append(list(words))
        without, late = TREES[words[words.index("--tree") + 1]]
        if words[words.index("--topology") + 1] == "v6e:2x4":
            path.write_text(json.dumps([{"error": "the compiler crashed"}]))
        elif words[words.index("--batch") + 1] == "32":
            path.write_text(json.dumps([{"estimate": 2e-3 * without}]))  # of a version that knew no latency
        else:
            figures = {"estimate": 1e-3 * without, "estimate_with_latency": 1e-3 * late}
            path.write_text(json.dumps([figures]))

    monkeypatch.setattr(cost, "compile_apart", compile_apart)
    return calls


def run(*argv: object) -> int:
    return main([str(word) for word in argv])


def test_speed_is_tau_by_the_round_over_plain_and_over_eagle3_of_as_many_nodes(compiled, tmp_path, capsys):
    folder, out = results(tmp_path / "acceptance"), tmp_path / "out"
    argv = ["--cost", folder, "--results", out, "--slices", "v5e:2x4", "--batches", "1"]
    assert run(*argv) == 0
    said = capsys.readouterr().out
    assert "tau of small-135m, cost of llama31_8b (meta-llama/Llama-3.1-8B-Instruct)" in " ".join(said.split())
    rows = {(row["drafter"], row["tree"]): row for row in json.loads((out / "cost.json").read_text())["rows"]}
    assert list(rows) == [("plain", None), *TAUS]
    cheap, paper = rows["cheap", "best_first:16"], rows["paper", "best_first:8"]
    assert cheap["over_plain"] == pytest.approx([2.4 * 2 / 4, 2.4 * 3 / 8])
    assert cheap["baseline"] == "eagle3 best_first:16" and cheap["over_baseline"] == pytest.approx([2.4 / 2.5] * 2)
    assert paper["baseline"] == "eagle3 best_first:8:3"
    assert paper["over_baseline"] == pytest.approx([2.0 / 2.2 * 3.5 / 3, 2.0 / 2.2 * 7 / 5])
    assert "4.00 (8.00)" in said and "1.20 (0.90)" in said and "0.96 (0.96) eagle3 best_first:16" in said
    # The same command compiles nothing more, another baseline neither.
    assert len(compiled) == 5
    assert run(*argv, "--baseline", "paper") == 0 and len(compiled) == 5
    assert "0.90 (0.75) paper best_first:8" in capsys.readouterr().out


def test_a_crash_is_a_line_and_an_older_file_an_estimate_without_latency(compiled, tmp_path, capsys):
    argv = ["--cost", results(tmp_path / "acceptance") / "results.json", "--results", tmp_path / "out"]
    assert run(*argv, "--slices", "v5e:2x4,v6e:2x4", "--batches", "32") == 0
    said = capsys.readouterr().out
    assert "no round: v6e:2x4, batch 32, cheap best_first:16: the compiler crashed" in said
    assert " 8.00 |" in said and len(json.loads((tmp_path / "out/cost.json").read_text())["rows"]) == 5


def test_of_meshes_and_trees_the_fastest_counts_by_batch(monkeypatch, tmp_path, capsys):
    """Twice the rows of chips help plain decoding, drafted rounds until there are four."""
    meshes: list[tuple[str, str]] = []

    def compile_apart(path: Path, words: list[str]) -> None:
        tree, batch = words[words.index("--tree") + 1], int(words[words.index("--batch") + 1])
        mesh = words[words.index("--mesh") + 1] if "--mesh" in words else "1,1,8"
        meshes.append((tree, mesh))
        without, late = TREES[tree]
        rows = int(mesh.split(",")[0])
        if (tree, mesh) == ("best_first:8", "2,1,4"):
            path.write_text(json.dumps([{"error": "does not fit"}]))
            return
        factor = {1: 1.0, 2: 0.5, 4: 0.75 if tree == "plain" else 0.25, 8: 0.5}[rows] * batch
        figures = {"estimate": 1e-3 * factor * without, "estimate_with_latency": 1e-3 * factor * late, "devices": 8}
        path.write_text(json.dumps([figures]))

    monkeypatch.setattr(cost, "compile_apart", compile_apart)
    out = tmp_path / "out"
    argv = ["--cost", results(tmp_path / "acceptance"), "--results", out, "--slices", "v5e:2x4", "--meshes"]
    assert run(*argv, "--batches", "1,4,8") == 0
    tried = {tree: [mesh for name, mesh in meshes if name == tree] for tree in TREES}
    alone = ["1,1,8"]  # one row
    assert tried["plain"] == alone + 2 * ["1,1,8", "2,1,4", "4,1,2"]
    assert tried["best_first:8"] == alone + 2 * ["1,1,8", "2,1,4"]
    assert tried["best_first:8:3"] == alone + ["1,1,8", "2,1,4", "4,1,2"] + ["1,1,8", "2,1,4", "4,1,2", "8,1,1"]
    rows = json.loads((out / "cost.json").read_text())["rows"]
    found = {(row["drafter"], row["tree"], row["batch"]): row for row in rows}
    assert found["plain", None, 8]["round"]["mesh"] == "data 2 x fsdp 1 x tensor 4"
    assert found["eagle3", "best_first:8:3", 8]["round"]["mesh"] == "data 4 x fsdp 1 x tensor 2"
    assert found["paper", "best_first:8", 8]["round"]["mesh"] == ""
    plain = 8e-3 * 0.5 * 2.0
    assert found["eagle3", "best_first:8:3", 8]["over_plain"][0] == pytest.approx(2.2 * plain / (8e-3 * 0.25 * 3.5))
    assert (out / "gains.png").is_file()
    # Of EAGLE-3's two trees the one of 8 nodes gains more (2.2 / 3.5 to 2.5 / 4) at every batch.
    best = capsys.readouterr().out.split("gains most")[1]
    assert best.count("best_first:8:3") == 3 and best.count("| eagle3") == 3 and best.count("| cheap") == 3


def test_switches_are_the_measured_drafters_and_widths_the_published_targets():
    target = PUBLISHED["llama31_8b"].target_config

    def sizes(name: str, draft_vocab: str | None = None):
        config = json.loads(json.dumps(dataclasses.asdict(DRAFTERS[name])))  # as results.json has it
        words = cost.switches(config, PUBLISHED["llama31_8b"], draft_vocab)
        return drafter_config(apply_changes(PUBLISHED["llama31_8b"], words).drafter, target)

    cheap = sizes("cheap")
    assert (cheap.context, cheap.levels, cheap.side_by_side, cheap.reinject) == ("target", "shared", True, True)
    assert cheap.edges == 128 and cheap.window is None and cheap.num_levels == 7 and cheap.context_layer == 31
    assert cheap.hidden_size == 4096 and cheap.intermediate_size == 14_336 and cheap.draft_vocab_size == 32_000
    paper = sizes("paper", "scaled")
    assert paper.correction == 16 * 4096 // 64 and paper.edges is None and paper.context == "own"
    assert paper.num_levels == 5 and paper.window == 512 and paper.draft_vocab_size == 128_256 // 4
    eagle3 = sizes("eagle3", "1000")
    assert eagle3.kind == "eagle3" and eagle3.num_levels == 8 and eagle3.draft_vocab_size == 1000


def test_without_eagle3_the_first_decoder_is_what_others_are_compared_with(tmp_path):
    _, decoders = cost.read_acceptance(results(tmp_path / "acceptance"))
    cheap, paper, eagle3, short = decoders
    assert [d.nodes for d in decoders] == [16, 8, 16, 8]
    assert cost.find_baseline(paper, decoders, None) is short and cost.find_baseline(cheap, decoders, None) is eagle3
    assert cost.find_baseline(paper, [cheap, paper], None) is cheap  # none of kind eagle3
    assert cost.find_baseline(paper, [cheap, paper, eagle3], None) is cheap  # none with as many nodes
    assert cost.find_baseline(paper, decoders, "cheap") is cheap
    assert cost.find_baseline(cheap, decoders, "eagle3 best_first:8:3") is short
    with pytest.raises(UserError, match="baseline 'eagle' was not measured: use one of cheap best_first:16"):
        cost.find_baseline(cheap, decoders, "eagle")


def test_a_gpu_without_its_compiler_is_left_out(compiled, tmp_path, capsys, monkeypatch, complaint):
    monkeypatch.setattr(topology, "has_gpu_compiler", lambda: False)
    argv = ["--cost", results(tmp_path / "acceptance"), "--results", tmp_path / "out", "--batches", "1"]
    assert run(*argv, "--slices", "h100,v5e:2x4") == 0
    assert "no round: h100 needs the CUDA compiler's packages: pip install" in capsys.readouterr().out
    assert {words[words.index("--topology") + 1] for words in compiled} == {"v5e:2x4"}
    said = complaint(main, *argv, "--slices", "h100")
    assert "--slices 'h100' leaves nothing to compile for" in said


def test_mistakes_are_one_line(compiled, complaint, tmp_path):
    folder = results(tmp_path / "acceptance")

    def of(path: Path, *words: object) -> str:
        return complaint(main, "--cost", path, "--results", tmp_path / "out", *words)

    assert "nothing is not there: make it with fasteagle bench --acceptance" in of(tmp_path / "nothing")
    assert "results.json is not there" in of(tmp_path)
    assert "has no acceptance: make it with" in of(results(tmp_path / "other", acceptance=[]))
    assert "is not understood (KeyError: 'cheap')" in of(results(tmp_path / "damaged", drafters={}))
    assert "target 'llama' is not known: use one of llama31_8b" in of(folder, "--cost-target", "llama")
    assert "slice 'v5e:3x3' is not known: use some of" in of(folder, "--slices", "v5e:2x4,v5e:3x3")
    assert "--batches '1,x' is not a list" in of(folder, "--batches", "1,x")
    assert "baseline 'none' was not measured" in of(folder, "--baseline", "none")
    assert "--draft-vocab 'half' is not understood" in of(folder, "--draft-vocab", "half")
    assert "--measure needs the weights" in of(folder, "--measure")
    assert compiled == []


def test_rounds_of_this_machine_stand_in_the_same_table(compiled, talkative, tmp_path, capsys, complaint):
    target, drafter = talkative
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": 0, "turns": ["What is 1 + 1?"]}) + "\n")
    argv = ["--acceptance", "--target", target, "--tasks", questions, "--max-new", 8, "--slots", 2, "--max-len", 128]
    argv += ["--drafters", f"a={drafter}@best_first:4", "--temperature", "0,1", "--results", tmp_path / "acceptance"]
    assert run(*argv) == 0
    assert " outside " in capsys.readouterr().out
    TREES["best_first:4"] = (2.5, 4.0)
    argv = ["--cost", tmp_path / "acceptance", "--results", tmp_path / "out", "--slices", "v5e:2x4", "--batches", 1]
    assert run(*argv, "--measure", "--repeats", 2) == 0
    rows = json.loads((tmp_path / "out/cost.json").read_text())["rows"]
    here = [row for row in rows if row["place"] != "v5e:2x4"]
    assert [(row["temperature"], row["drafter"]) for row in here] == [(0, "plain"), (0, "a"), (1, "plain"), (1, "a")]
    plain, drafted = here[:2]
    assert plain["round"]["seconds"] > 0 and drafted["round"]["with_latency"] is None
    speed = drafted["tau"] * plain["round"]["seconds"] / drafted["round"]["seconds"]
    assert drafted["over_plain"] == [pytest.approx(speed), None]
    # Rounds of another drafter than the one whose tau it is are refused.
    changed = tmp_path / "changed"
    shutil.copytree(tmp_path / "acceptance", changed)
    report = json.loads((changed / "results.json").read_text())
    report["drafters"]["a"]["rms_norm_eps"] = 0.5
    (changed / "results.json").write_text(json.dumps(report))
    said = complaint(main, "--cost", changed, "--results", tmp_path / "out2", "--measure")
    assert "holds another drafter than" in said
