"""The formulas of docs/theory.md against enumeration, and against simulation."""

from __future__ import annotations

import functools
import itertools
import json
import math

import numpy as np
import pytest

from fasteagle_jax.bench import theory
from fasteagle_jax.bench.simulation import random_world, simulate
from fasteagle_jax.commands.simulate import main
from fasteagle_jax.errors import UserError

P = np.array([0.5, 0.3, 0.15, 0.05])
Q = np.array([0.2, 0.4, 0.1, 0.3])


def world(seed: int = 0, vocab: int = 4):
    return random_world(np.random.default_rng(seed), vocab, 0.5, 0.3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_formula_agrees_with_the_simulation(seed: int) -> None:
    rows = list(simulate(seed, passes=4000))
    assert {row.name[0] for row in rows} == set("123456") and len(rows) > 20
    # 99% intervals: of 23 rows two are outside in one run of forty.
    assert sum(not row.agrees for row in rows) <= 2, [row for row in rows if not row.agrees]
    exact = [row for row in rows if row.half_width < 1e-9]
    assert len(exact) >= 6 and all(row.agrees for row in exact)


def test_tokens_a_pass_of_a_tree_are_those_of_all_texts_weighed() -> None:
    law, depth = world().law(2), 3
    for nodes in (theory.best_tree(law, 9, depth), theory.backbone(world(1).law(0), 2, depth)):
        expected = 0.0
        for text in itertools.product(range(4), repeat=depth):
            run = next((d for d in range(depth) if text[: d + 1] not in nodes), depth)
            expected += theory.path_probability(law, text) * (1 + run)
        assert theory.tree_length(law, nodes) == pytest.approx(expected)


def test_the_best_tree_is_the_best_of_all_trees() -> None:
    law, depth = world(3, vocab=3).law(0), 3
    paths = [text for d in range(1, depth + 1) for text in itertools.product(range(3), repeat=d)]
    for size in (2, 3, 4, 5):
        trees = (
            nodes
            for nodes in itertools.combinations(paths, size - 1)
            if all(len(node) == 1 or node[:-1] in nodes for node in nodes)
        )
        best = max(theory.tree_length(law, nodes) for nodes in trees)
        assert theory.tree_length(law, theory.best_tree(law, size, depth)) == pytest.approx(best)


def test_a_chain_of_equal_rates_has_the_closed_form_and_the_trap_is_the_known_one() -> None:
    assert theory.chain_length([0.7] * 5) == pytest.approx(theory.constant_chain_length(0.7, 5))
    assert theory.constant_chain_length(1.0, 4) == 5
    assert theory.pooled_length([3, 2, 1, 0], 3) == pytest.approx(1 + 1.21875)  # their mean is 1 + 1.5


def test_shared_noise_agrees_as_often_as_the_formula_says_and_within_its_bounds() -> None:
    noise = np.random.default_rng(0).gumbel(size=(200_000, 4))
    same = np.argmax(np.log(P) + noise, axis=1) == np.argmax(np.log(Q) + noise, axis=1)
    both = theory.shared_agreement(P, Q)
    assert same.mean() == pytest.approx(both.sum(), abs=0.005)
    low, high = theory.agreement_bounds(theory.total_variation(P, Q))
    assert low <= both.sum() <= high and (P * Q).sum() < both.sum()
    assert theory.shared_agreement(P, P).sum() == pytest.approx(1)
    assert theory.shared_agreement(np.array([1.0, 0]), np.array([0, 1.0])).sum() == 0


def test_the_loss_bounds_agreement_from_below() -> None:
    kl = float((P * np.log(P / Q)).sum())
    assert theory.total_variation(P, Q) <= math.sqrt(kl / 2)
    assert theory.agreement_by_loss(kl) <= theory.agreement_by_loss(kl, theory.total_variation(P, Q))
    assert theory.agreement_by_loss(0) == 1 and theory.agreement_by_loss(100) == 0


def test_the_best_size_of_a_tree_is_where_a_node_brings_less_than_it_costs() -> None:
    lengths = [1, 1.6, 2.0, 2.2, 2.3]
    assert theory.best_size(lengths, [1, 1.1, 1.2, 1.4, 1.6]) == 2
    assert theory.best_size(lengths, [1] * 5) == 4


def test_passes_of_one_prompt_count_less() -> None:
    assert theory.passes_needed(1.1, 0.011) == pytest.approx(10_000)
    assert theory.passes_needed(1.1, 0.011, 0.05, 21) == pytest.approx(20_000)


def _always(p: np.ndarray, path: tuple[int, ...]) -> np.ndarray:
    return p


@pytest.mark.parametrize("size", [2, 16, 300])
def test_no_tree_is_above_the_bound_of_the_entropy(size: int) -> None:
    for seed in range(20):
        p = np.random.default_rng(seed).dirichlet(np.full(8, 0.4))
        best = theory.product_paths(p, size)
        law = functools.partial(_always, p)
        paths = theory.tree_length(law, theory.best_tree(law, size, 60))
        assert best == pytest.approx(paths) and best <= theory.entropy_bound(*theory.surprisals(p), size)


def test_the_command_prints_rows_a_chain_and_a_bound(capsys, tmp_path) -> None:
    assert main(["--passes", "300", "--seed", "1"]) == 0
    assert "of 23 disagree" in capsys.readouterr().out
    assert main(["--rates", "0.5,0.5"]) == 0 and capsys.readouterr().out.startswith("1.750 tokens")
    assert main(["--costs", "1:2,4:2.4,8:40"]) == 0
    head, one, four, eight, best = capsys.readouterr().out.splitlines()
    assert one.split() == ["1", "1.000", "1.00", "1.000"] and best == "best: 4 nodes"
    _, length, cost, speed = map(float, four.split())
    assert cost == 1.2 and speed == pytest.approx(length / 1.2, abs=2e-3) and length < float(eight.split()[1])
    records = [{"id": "a", "logprobs": [-1.0, -3.0]}, {"id": "b", "answers": [{"logprobs": [-2.0]}, {}]}]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["--logprobs", str(tmp_path / "out.jsonl")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("3 tokens: entropy 2.000 nats, mean square of surprisals 4.667")
    assert f"  4 nodes: at most {1 + math.log(3) / 2 + 14 / 3 / 4:.2f} tokens a pass" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rates", "0.8,1.2"], "1.2 is no probability: give rates of 0 to 1"),
        (["--rates", "x"], "give numbers like 0.8,0.75,0.7"),
        (["--costs", "2:1"], "give 1 node first"),
        (["--costs", "1:1,4"], "give nodes and costs like 1:1,4:1.18,8:1.44"),
        (["--error", "-0.5"], "-0.5 is no probability"),
        (["--temperature", "0"], "temperature is 0.0: it must be above 0"),
        (["--logprobs", "absent.jsonl"], "absent.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(capsys, words: list[str], message: str) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_file_without_logprobs_is_one_line(tmp_path) -> None:
    for line, message in ((b'{"id": 1}', "holds no logprobs"), (b"[1]", ":1 is no record"), (b"x", ":1 is no record")):
        with pytest.raises(UserError, match=message):
            theory.measured_surprisals([line], "file")
