"""A drafter learns what targets of other families than Llama say, on a mesh as on one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fasteagle_jax.data.conversations import Conversation
from fasteagle_jax.data.packing import Batch, PackedData
from fasteagle_jax.devices.sharding import MeshShape, make_mesh, place_batch, place_weights
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.training.init import init_drafter
from fasteagle_jax.training.losses import LossConfig
from fasteagle_jax.training.optimizer import OptimizerConfig, make_optimizer
from fasteagle_jax.training.step import first_state, make_train_step
from tests.tiny_families import hf_config, tiny_family

SIZES = dict(vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)  # which the mesh divides
CONTEXT = dict(context="target", levels="shared", side_by_side=True)


def packed_batch() -> Batch:
    rng = np.random.default_rng(0)
    texts = [rng.integers(64, size=n).tolist() for n in (28, 36, 17, 20, 30, 12, 38, 25)]
    return PackedData([Conversation.of(f"{i}", t, [[2, len(t)]]) for i, t in enumerate(texts)], 40, 4, 0).batch(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma3", {}),
        ("qwen3", CONTEXT),
        ("qwen3_moe", {}),
        ("qwen2_moe", CONTEXT),
        ("mixtral", {}),
        ("gpt_oss", CONTEXT),
    ],
    ids=["gemma3", "qwen3, context", "qwen3_moe", "qwen2_moe, context", "mixtral", "gpt_oss, context"],
)
def test_the_loss_falls_and_steps_on_a_mesh_are_those_on_one_device(name, changes):
    target = tiny_family(hf_config(name) | SIZES)
    config = default_config(target.config, num_levels=2, feature_layers=(1, 2), **changes)
    drafter = jax.jit(lambda target: init_drafter(config, target, jax.random.key(0)))(target)
    graph, params, constants = nnx.split(drafter, nnx.Param, ...)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1), 100)
    train = make_train_step(graph, optimizer, LossConfig(chunk=32), jnp.float32, 0)

    def losses(num_steps: int, mesh=None) -> list[float]:
        placed = [jax.tree.map(jnp.copy, part) for part in (params, constants, target)]
        batch = jax.tree.map(jnp.asarray, packed_batch())
        if mesh is not None:
            placed = [place_weights(mesh, part) for part in placed]
            batch = place_batch(mesh, lambda rows: jax.tree.map(lambda x: np.asarray(x)[rows], packed_batch()), 4)
        state = first_state(placed[0], optimizer)
        found = []
        for _ in range(num_steps):
            state, result = train(state, placed[1], placed[2], batch)
            found.append(float(result.loss))
        return found

    alone = losses(12)
    assert alone[-1] < 0.9 * alone[0]
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(losses(3, mesh), alone[:3], rtol=1e-4)
