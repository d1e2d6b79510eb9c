"""First weights, the optimiser's schedule and the train step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fasteagle_jax.checkpoint import Checkpoints
from fasteagle_jax.data import Batch, Conversation, PackedData
from fasteagle_jax.drafters.fasteagle import FastEagle, default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.layers import unstack
from fasteagle_jax.losses import LossConfig
from fasteagle_jax.testing import tiny_target
from fasteagle_jax.training import (
    OptimizerConfig,
    TrainState,
    drafter_loss,
    feature_rms,
    init_drafter,
    make_optimizer,
    make_train_step,
)

LEVELS = 2


def packed_batch(seed: int = 0) -> Batch:
    """Two rows of packed conversations."""
    rng = np.random.default_rng(seed)
    samples = [Conversation.of(f"{i}", [int(t) for t in rng.integers(0, 40, 18)], [[3, 18]]) for i in range(6)]
    return jax.tree.map(jnp.asarray, PackedData(samples, 40, 2, seed).batch(0))


def run_steps(state: TrainState, step: object, target: object, num_steps: int) -> tuple[TrainState, list[float]]:
    """The state after `num_steps` steps, and their losses."""
    losses = []
    for i in range(num_steps):
        state, (loss, _, _) = step(state, target, packed_batch(i % 2))  # type: ignore[operator]
        losses.append(float(loss))
    return state, losses


def new_run(drafter: FastEagle, share: float = 0.5) -> tuple[TrainState, object, object, object]:
    """(state, step, graph, constants) of a run that trains `drafter`."""
    graph, params, constants = nnx.split(drafter, nnx.Param, ...)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1), 100)
    step = make_train_step(graph, constants, optimizer, LossConfig(share=share, chunk=16), jnp.float32, 0)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32)), step, graph, constants


@pytest.mark.parametrize("stacked", [True, False])
def test_levels_start_as_the_targets_last_layers(stacked: bool) -> None:
    target = tiny_target(stacked=stacked)
    drafter = init_drafter(default_config(target.config, num_levels=LEVELS), target, jax.random.key(0))
    layers = unstack(target.layers, 5) if stacked else list(target.layers)
    levels = unstack(drafter.levels, LEVELS) if stacked else list(drafter.levels)
    for level, layer in zip(levels, layers[-LEVELS:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, level.layer, layer)
        np.testing.assert_array_equal(level.norm[...], target.norm[...])


def test_a_drafter_of_other_sizes_or_too_many_levels_cannot_start_from_the_target() -> None:
    target = tiny_target()
    with pytest.raises(UserError, match="from_target"):
        init_drafter(default_config(target.config, num_levels=2, intermediate_size=8), target, jax.random.key(0))
    with pytest.raises(UserError, match="9 levels"):
        init_drafter(default_config(target.config, num_levels=9), target, jax.random.key(0))


def test_training_never_consumes_the_target() -> None:
    """The step donates its state: a buffer that a drafter shares with the target would be gone after it."""
    target = tiny_target(stacked=False)
    before = jax.tree.map(np.asarray, target)
    state, step, _, _ = new_run(init_drafter(default_config(target.config, num_levels=2), target, jax.random.key(0)))
    run_steps(state, step, target, 2)
    jax.tree.map(np.testing.assert_array_equal, target, before)


def test_stacked_and_listed_models_have_the_same_loss_and_gradient() -> None:
    target = tiny_target()
    config = default_config(target.config, num_levels=3, reinject=True, draft_vocab_size=30)
    drafter = init_drafter(config, target, jax.random.key(0), token_ids=jnp.arange(5, 35))

    def loss(params: object, graph: object, constants: object, target: object) -> jax.Array:
        drafter = nnx.merge(graph, params, constants)
        return drafter_loss(drafter, target, packed_batch(), jax.random.key(1), LossConfig(chunk=16))[0]

    found = []
    for model, draft in ((target, drafter), (target.unstacked(), drafter.unstacked())):
        graph, params, constants = nnx.split(draft, nnx.Param, ...)
        value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, graph, constants, model)
        found.append((value, nnx.merge(graph, gradient, constants)))
    (one, stacked), (other, listed) = found
    np.testing.assert_allclose(one, other, rtol=1e-6)
    assert float(one) > 0
    # Sums in another order: float32 rounding of gradients that are at most about 1.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stacked.levels, listed.stacked_form().levels)


def test_feature_rms_is_of_an_ordinary_token() -> None:
    target = tiny_target()
    rms = feature_rms(target, packed_batch(), (0, 2))
    embedding = np.asarray(target.embedding[...])
    np.testing.assert_allclose(rms[0], np.sqrt((embedding**2).mean()), rtol=0.2)
    assert rms[1] > rms[0]


def test_the_rate_warms_up_stays_and_falls() -> None:
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=1.0, warmup_steps=4, decay_share=0.5, final_share=0.1, clip_norm=1e9), 20
    )
    params = {"w": jnp.zeros(())}
    state = optimizer.init(params)
    sizes = []
    for _ in range(21):  # AdamW's step has the size of the rate under a constant gradient
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params)
        sizes.append(-float(updates["w"]))
    expected = [0, 0.25, 0.5, 0.75, *[1.0] * 6, *(1 - 0.09 * i for i in range(11))]
    np.testing.assert_allclose(sizes, expected, atol=1e-4)


def test_the_loss_falls_and_a_restored_state_goes_on_bitwise(tmp_path: object) -> None:
    target = tiny_target(stacked=False)
    drafter = init_drafter(default_config(target.config, num_levels=2), target, jax.random.key(0))
    state, step, _, constants = new_run(drafter)
    state, early = run_steps(state, step, target, 4)
    with Checkpoints(f"{tmp_path}/checkpoints", keep=1) as checkpoints:
        checkpoints.save(4, (state, constants))
        checkpoints.wait()
    state, late = run_steps(state, step, target, 40)
    assert np.mean(late[-4:]) < 0.9 * np.mean(early)

    other, step, _, constants = new_run(init_drafter(drafter.config, target, jax.random.key(7)))
    with Checkpoints(f"{tmp_path}/checkpoints", keep=1) as checkpoints:
        assert checkpoints.latest_step() == 4
        other, constants = checkpoints.restore(4, (other, constants))
    assert int(other.step) == 4
    _, again = run_steps(other, step, target, 40)
    assert again == late


def test_a_checkpoint_of_another_drafter_is_refused(tmp_path: object) -> None:
    target = tiny_target()
    small, large = (
        new_run(init_drafter(default_config(target.config, num_levels=n), target, jax.random.key(0))) for n in (2, 3)
    )
    with Checkpoints(f"{tmp_path}/checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, small[0])
        checkpoints.wait()
        with pytest.raises(UserError, match="does not fit this configuration"):
            checkpoints.restore(1, large[0])


def test_optimizer_values_are_checked() -> None:
    with pytest.raises(UserError, match="learning_rate 0"):
        OptimizerConfig(learning_rate=0)
    with pytest.raises(UserError, match="decay_share is 2"):
        OptimizerConfig(decay_share=2)
    assert isinstance(make_optimizer(OptimizerConfig(), 10), optax.GradientTransformation)
