"""The tree that is drafted where none is named, and the trees that `auto` chooses from."""

from __future__ import annotations

import functools

import jax
import pytest

from fasteagle_jax import Engine
from fasteagle_jax.commands.answers import ONE_AT_A_TIME
from fasteagle_jax.compiling.published import PUBLISHED
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.decoding.tree_selection import (
    MAX_RELATIVE_COST,
    TreeSelector,
    affordable_nodes,
    default_tree,
    dense,
    tree_choices,
)
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.targets.experts import relative_reads
from tests.tiny_families import hf_config, tiny_family
from tests.tiny_tokenizer import metaspace_tokenizer

SPARSE = [name for name, run in PUBLISHED.items() if getattr(run.target_config, "num_experts", 0)]


def reads_of(name: str):
    return functools.partial(relative_reads, PUBLISHED[name].target_config)


def test_the_dearer_a_row_the_fewer_nodes():
    assert affordable_nodes({2: 1.0, 8: 1.1, 32: 1.2}) == 32
    assert affordable_nodes({2: 1.2, 8: MAX_RELATIVE_COST, 32: 4.0}) == 8
    assert affordable_nodes({2: 1.2, 8: 6.0, 32: 24.0}) == affordable_nodes({2: 1.4, 8: 6.0}) == 2


def test_the_default_tree_is_the_devices_as_the_help_says():
    assert f"{default_tree('cpu')} on a CPU, {default_tree('tpu')} elsewhere" == ONE_AT_A_TIME
    assert default_tree("cuda") == default_tree("tpu")


@pytest.mark.parametrize("name", SPARSE)
def test_a_pass_of_a_sparse_target_reads_the_experts_that_its_tokens_choose(name):
    reads, config = reads_of(name), PUBLISHED[name].target_config
    assert reads(1) == 1 and reads(1) < reads(2) < reads(4) < reads(32) <= reads(1000)
    layer, experts = config.layer, config.layer.experts
    weights = config.vocab_size * config.hidden_size + config.num_layers * layer.matrix_size
    unread = config.num_layers * 3 * config.hidden_size * experts.intermediate_size
    unread *= experts.num_experts - experts.num_chosen
    assert reads(10_000) == pytest.approx((weights + unread) / weights)  # all of them
    assert relative_reads(PUBLISHED["qwen3_8b"].target_config, 60) == 1


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_targets_default_tree_is_small(name):
    for platform in ("cpu", "tpu", "cuda"):
        assert default_tree(platform, reads_of(name)).nodes == 2 < default_tree(platform).nodes


def test_auto_has_a_smaller_tree_for_a_sparse_target_and_none_that_cannot_pay():
    of_dense = (None, *(TreeSpec("best_first", nodes, levels=levels) for nodes, levels in ((4, 3), (8, 4), (16, 7))))
    smaller = TreeSpec("best_first", 2, levels=1)
    assert tree_choices(7) == tree_choices(7, reads_of("gemma3_12b"), 8) == of_dense
    for name in SPARSE:
        assert tree_choices(7, reads_of(name)) == (None, smaller, *of_dense[1:])
        # A drafter of two levels gives three tokens at most, for which passes over 8 nodes and more read too much,
        assert tree_choices(2, reads_of(name)) == (None, smaller, TreeSpec("best_first", 4, levels=2))
        # unless other rows have nearly all experts read.
        assert len(tree_choices(2, reads_of(name), slots=64)) == 5


@pytest.mark.parametrize("name", SPARSE)
def test_auto_chooses_smaller_trees_where_more_nodes_read_more_experts(name):
    """With guesses of which seven in ten are right, and seconds that are what a pass reads."""

    def chosen(reads, rows: int) -> int:
        selector = TreeSelector(tree_choices(7, reads, 32))
        for tree in selector.trees:
            nodes, levels = (1, 0) if tree is None else (tree.nodes, tree.levels)
            tokens = sum(0.7**i for i in range(levels + 1))
            seconds = reads(rows * nodes) / reads(rows)
            rounds = 10  # too few for a tree to be measured again
            counts = dict(rounds=rounds, row_rounds=rounds * rows, tokens=round(rounds * rows * tokens))
            selector.record(rows, tree, **counts, seconds=rounds * seconds)
        tree = selector.choose(rows)
        return 1 if tree is None else tree.nodes

    assert chosen(dense, 1) == chosen(dense, 32) == 16
    assert chosen(reads_of(name), 1) == 2 < chosen(reads_of(name), 32) <= 16


@pytest.mark.parametrize(
    ("name", "nodes"), [pytest.param("gpt_oss", [2, 4, 8, 16], marks=pytest.mark.slow), ("qwen3", [4, 8, 16])]
)
def test_the_engine_asks_its_target(name, nodes):
    target = tiny_family(hf_config(name)).unstacked()
    drafter = FastEagle(default_config(target.config, num_levels=7), stacked=False, key=jax.random.key(0))
    sizes = dict(slots=8, max_len=64, chunk=16)
    engine = Engine(target, drafter, metaspace_tokenizer(), (0,), **sizes)
    assert [tree.nodes for tree in engine.trees[1:]] == nodes
    (single,) = Engine(target, drafter, metaspace_tokenizer(), (0,), **sizes, tree="single").trees
    assert single == default_tree("cpu", functools.partial(relative_reads, target.config))
