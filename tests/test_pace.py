"""The tree that is drafted where none is named."""

from __future__ import annotations

from fasteagle_jax.commands.answers import ONE_AT_A_TIME
from fasteagle_jax.pace import ACCEPTED, best_nodes, default_tree


def test_the_dearer_a_row_the_fewer_nodes():
    assert best_nodes({nodes: 1.0 for nodes in ACCEPTED}) == max(ACCEPTED)
    assert best_nodes({nodes: float(nodes) for nodes in ACCEPTED}) == min(ACCEPTED)
    assert best_nodes({8: 1.0, 16: 4.0}) == 8


def test_the_default_tree_is_the_devices_as_the_help_says():
    assert f"{default_tree('cpu')} on a CPU, {default_tree('tpu')} elsewhere" == ONE_AT_A_TIME
    assert default_tree("cuda") == default_tree("tpu")
