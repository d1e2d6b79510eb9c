"""A drafter learns what targets of other families than Llama say, on a mesh as on one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fasteagle_jax.data.conversations import Conversation
from fasteagle_jax.data.packing import Batch, PackedData
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import generate
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.devices.sharding import MeshShape, make_mesh, place_batch, place_weights
from fasteagle_jax.drafters.files import load_drafter, save_drafter
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_a_drafter_that_learned_a_sparse_targets_answers_drafts_them_also_from_its_files(name, tmp_path):
    """The answers that it has seen, of which one that is not trained guesses little."""
    target = tiny_family(hf_config(name) | SIZES)
    prompts, sampling = np.random.default_rng(0).integers(64, size=(8, 6)).tolist(), make_sampling(8)
    sizes = dict(max_new=34, chunk=16)
    plain = generate(target, None, prompts, sampling, **sizes)
    texts = [prompt + answer[:34].tolist() for prompt, answer in zip(prompts, np.asarray(plain.tokens), strict=True)]
    data = PackedData([Conversation.of(f"{i}", text, [[6, 40]]) for i, text in enumerate(texts)], 40, 4, 0)

    config = default_config(target.config, num_levels=2, feature_layers=(1, 2))
    # Random: the target's own layer guesses many of a random target's answers as it is.
    drafter = init_drafter(config, target, jax.random.key(0), from_target=False)
    graph, params, constants = nnx.split(drafter, nnx.Param, ...)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup_steps=10), 300)
    train = make_train_step(graph, optimizer, LossConfig(chunk=32), jnp.float32, 0)
    state, losses = first_state(jax.tree.map(jnp.copy, params), optimizer), []
    for step in range(300):
        state, result = train(state, constants, target, jax.tree.map(jnp.asarray, data.batch(step)))
        losses.append(float(result.loss))
    # It ends near the target's entropy, which is high where the head is not the embedding.
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])

    def accepted(drafter) -> int:
        drafted = generate(target, drafter, prompts, sampling, tree=TreeSpec("chain"), **sizes)
        np.testing.assert_array_equal(drafted.tokens, plain.tokens)
        return int(drafted.statistics.accepted_at.sum())

    trained = nnx.merge(graph, state.params, constants)
    found = accepted(trained)
    assert found > 2 * accepted(drafter) and found > 34
    save_drafter(trained, tmp_path / "drafter", "of a test", {})
    assert accepted(load_drafter(tmp_path / "drafter", target.config, "of a test", stacked=True)) == found
