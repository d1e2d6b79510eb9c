"""Operations a token, against the parameters of real models; the table of devices."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from fasteagle_jax.drafters.eagle3 import Eagle3
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.training.flops import flops_per_token, peak_flops
from tests.tiny_models import tiny_config, tiny_target


def num_matrix_parameters(tree: object) -> int:
    """Of all but norms."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(x.size for path, x in leaves if "norm" not in jax.tree_util.keystr(path))


@pytest.mark.parametrize("changes", [{}, {"reinject": True}, {"correction": 5}, {"edges": 4, "edges_gated": True}])
def test_without_attention_and_heads_it_is_two_a_frozen_and_six_a_trained_parameter(changes: dict) -> None:
    target = tiny_target(num_layers=3)
    config = default_config(target.config, num_levels=4, **changes)
    drafter = FastEagle(config, jax.random.key(0))
    trained = num_matrix_parameters((drafter.fc, drafter.fuse, drafter.levels))
    trained += 4 * num_matrix_parameters(drafter.correction)  # once a level
    if drafter.edges is not None:  # its table is a head
        trained += 4 * num_matrix_parameters((drafter.edges.of_state, drafter.edges.of_token, drafter.edges.gate))
    expected = 2 * num_matrix_parameters(target.layers) + 6 * trained
    assert flops_per_token(target.config, config, length=0, share=0.0) == expected


def test_the_paired_inputs_and_the_head_of_eagle3_count() -> None:
    target = tiny_target(num_layers=3)
    config = default_config(target.config, kind="eagle3", num_levels=4)
    drafter = Eagle3(config, jax.random.key(0))
    head, fc = drafter.head.size, drafter.fc.weight.size
    layer = num_matrix_parameters(drafter) - head - fc - drafter.feature_scale.size
    frozen = 2 * (num_matrix_parameters(target.layers) + target.head_rows().size)
    assert flops_per_token(target.config, config, 0, 1.0) == frozen + 6 * (4 * layer + fc) + 6 * 4 * head


def test_attention_and_heads_add_their_products() -> None:
    target = tiny_config()  # 5 layers, 4 heads of 8, width 16, vocabulary 40
    drafter = default_config(target, num_levels=2)
    base = flops_per_token(target, drafter, 0, 0.0)
    assert flops_per_token(target, drafter, 10, 0.0) - base == (4 * 5 + 12 * 2) * 10 * 32
    assert flops_per_token(target, drafter, 0, 0.5) - base == 0.5 * 16 * 40 * (2 + 4 * 2)
    edges = dataclasses.replace(drafter, edges=3)
    assert flops_per_token(target, edges, 0, 1.0) - base - 16 * 40 * (2 + 4 * 2) == 2 * 6 * (2 * 16 * 3 + 3 * 40)
    reading = dataclasses.replace(drafter, context="target", context_layer=4)  # levels where the loss looks alone
    one, half = (flops_per_token(target, reading, 10, share) for share in (1.0, 0.5))
    assert one == flops_per_token(target, drafter, 10, 1.0)
    levels = 6 * (2 * drafter.level_parameters + drafter.input_parameters) + 12 * 2 * 10 * 32
    assert one - half == 0.5 * (levels + 16 * 40 * (2 + 4 * 2))
    first = dataclasses.replace(drafter, context="shared")
    assert flops_per_token(target, first, 10, 0.5) - half == 0.5 * 6 * drafter.input_parameters
    small = dataclasses.replace(drafter, draft_vocab_size=30)
    assert flops_per_token(target, small, 0, 1.0) - base == 16 * (2 * 40 + (4 * 2 + 2) * 30)


def test_three_backward_passes_count_three_times_and_what_is_forward_once() -> None:
    target = tiny_config()
    for kind, changes in (("fasteagle", {}), ("fasteagle", {"edges": 3}), ("eagle3", {})):
        drafter = default_config(target, kind=kind, num_levels=2, **changes)
        one, three = (flops_per_token(target, drafter, 10, 0.5, backward_passes=passes) for passes in (1, 3))
        matrices = 2 * drafter.level_parameters + drafter.input_parameters
        head = 16 * 40 * (2 if kind == "eagle3" else 1) + 2 * 3 * 40 * bool(changes)
        assert three - one == 2 * (4 * matrices + 2 * 8 * 10 * 32 + 0.5 * 2 * 2 * head)


def test_devices_are_known_by_the_start_of_their_kind_and_a_cpu_is_not() -> None:
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("cpu") is None
