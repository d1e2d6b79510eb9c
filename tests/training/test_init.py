"""A narrower MLP's first weights: the neurons of the target's that give most of its output."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.training.init import init_drafter, strongest_neurons
from tests.tiny_models import tiny_target
from tests.training.test_step import packed_batch

KEPT = [1, 4, 5, 9, 17, 22, 28, 31]


@pytest.fixture(scope="module", params=[True, False], ids=["stacked", "listed"])
def target(request):
    """A target of which all but 8 neurons of layer 3 add next to nothing, by small inputs or by small outputs."""
    made = tiny_target()
    down, up = (np.ones((5, 32), np.float32) for _ in range(2))
    for neuron in set(range(32)) - set(KEPT):
        (down if neuron < 16 else up)[3, neuron] = 1e-4
    mlp = made.layers.mlp
    mlp.down.set_matrix(mlp.down.matrix * down[..., None])
    mlp.up.set_matrix(mlp.up.matrix * up[:, None])
    return made if request.param else made.unstacked()


def test_the_strongest_neurons_are_found(target):
    chosen, left_out = strongest_neurons(target, packed_batch(), 3, 8)
    assert chosen.tolist() == KEPT and 0 < left_out < 1e-5
    chosen, left_out = strongest_neurons(target, packed_batch(), 3, 4)
    assert set(chosen.tolist()) < set(KEPT) and 0.01 < left_out < 1


@pytest.mark.parametrize(
    "kind, changes",
    [("fasteagle", {"context": "target", "context_layer": 3, "levels": "shared"}), ("fasteagle", {}), ("eagle3", {})],
)
def test_a_narrower_mlp_starts_as_the_targets(target, kind, changes):
    config = default_config(target.config, kind, intermediate_size=8, **changes)
    copied = config.copied_layer(target.config.num_layers)
    assert copied == (3 if changes else 4)
    neurons, _ = strongest_neurons(target, packed_batch(), copied, 8)
    drafter = init_drafter(config, target, jax.random.key(0), neurons=neurons)
    mlp = drafter.mlp if kind == "eagle3" else (drafter.shared or drafter.unstacked().levels[0]).mlp
    x = jax.random.normal(jax.random.key(1), (5, 16))
    own = target.layer(copied).mlp
    expected = own.neurons(x)[:, neurons] @ own.down.matrix[neurons]
    np.testing.assert_allclose(mlp(x), expected, atol=1e-5)
    if copied == 3:
        np.testing.assert_allclose(mlp(x), own(x), atol=1e-3)
