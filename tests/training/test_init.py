"""A narrower MLP's first weights: the neurons of the target's that give most of its output."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from fasteagle_jax.drafters.fasteagle import EMBEDDING_SHARE
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.training.init import init_drafter, strongest_neurons
from tests.tiny_models import tiny_target
from tests.training.test_step import packed_batch

RMS = np.array([0.5, 2.0, 7.0], np.float32)
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


def test_normed_inputs_begin_with_the_stream_of_the_targets_size(target):
    """Without them the features pass as they are; with them each token's at the size of the highest feature."""
    made = [
        init_drafter(
            default_config(target.config, norm_inputs=norm),
            target,
            jax.random.key(0),
            feature_rms=RMS,
            from_target=True,
        )
        for norm in (False, True)
    ]
    features = jax.random.normal(jax.random.key(1), (2, 5, 48)) * np.repeat(RMS, 16)
    tokens = jax.random.randint(jax.random.key(2), (2, 5), 0, target.config.vocab_size)
    plain, normed = (np.asarray(d._fuse(target.embedding[...], features, tokens, "batch")) for d in made)
    assert np.abs(plain - normed).max() > 0.1
    sizes = [np.sqrt(np.mean(x**2, axis=-1)) for x in (plain, normed)]
    assert np.std(sizes[1]) < np.std(sizes[0]) / 3
    np.testing.assert_allclose(sizes[1], RMS[-1] * (1 + EMBEDDING_SHARE**2) ** 0.5, rtol=0.1)
