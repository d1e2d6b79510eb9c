"""The tree that is drafted where none is named."""

from __future__ import annotations

from fasteagle_jax.commands.answers import ONE_AT_A_TIME
from fasteagle_jax.decoding.tree_selection import MAX_RELATIVE_COST, affordable_nodes, default_tree


def test_the_dearer_a_row_the_fewer_nodes():
    assert affordable_nodes({2: 1.0, 8: 1.1, 32: 1.2}) == 32
    assert affordable_nodes({2: 1.2, 8: MAX_RELATIVE_COST, 32: 4.0}) == 8
    assert affordable_nodes({2: 1.2, 8: 6.0, 32: 24.0}) == affordable_nodes({2: 1.4, 8: 6.0}) == 2


def test_the_default_tree_is_the_devices_as_the_help_says():
    assert f"{default_tree('cpu')} on a CPU, {default_tree('tpu')} elsewhere" == ONE_AT_A_TIME
    assert default_tree("cuda") == default_tree("tpu")
