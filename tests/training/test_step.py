"""First weights, the optimiser's schedule and the train step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fasteagle_jax.data.conversations import Conversation
from fasteagle_jax.data.packing import Batch, PackedData
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.attention import Cached
from fasteagle_jax.nn.linear import to_columns
from fasteagle_jax.nn.norm import rms_norm
from fasteagle_jax.nn.rope import rotation
from fasteagle_jax.nn.transformer import unstack
from fasteagle_jax.training.checkpoints import Checkpoints
from fasteagle_jax.training.config import RunConfig
from fasteagle_jax.training.init import feature_rms, init_drafter
from fasteagle_jax.training.losses import LossConfig
from fasteagle_jax.training.optimizer import OptimizerConfig, make_optimizer
from fasteagle_jax.training.step import TrainState, drafter_loss, first_state, in_dtype, make_train_step, train_step
from tests.tiny_models import tiny_target

LEVELS = 2


def packed_batch(seed: int = 0, rows: int = 2, lengths: tuple[int, int] = (18, 18), answer: int = 3) -> Batch:
    """Rows of packed conversations without the token 39, of so many tokens; their answers start at `answer`."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(lengths[0], lengths[1] + 1, 4 * rows)
    samples = [
        Conversation.of(f"{i}", rng.integers(39, size=n).tolist(), [[answer, int(n)]]) for i, n in enumerate(sizes)
    ]
    return jax.tree.map(jnp.asarray, PackedData(samples, 40, rows, seed).batch(0))


def run_steps(state: TrainState, step: object, target: object, num_steps: int) -> tuple[TrainState, list[float]]:
    """The state after `num_steps` steps, and their losses."""
    losses = []
    for i in range(num_steps):
        state, result = step(state, target, packed_batch(i % 2))  # type: ignore[operator]
        losses.append(float(result.loss))
    return state, losses


def new_run(
    drafter: FastEagle,
    accumulate: int = 1,
    dtype: object = jnp.float32,
    loss: LossConfig = LossConfig(share=0.5, chunk=16),  # noqa: B008  # immutable
    **changes: object,
) -> tuple[TrainState, object, object, object]:
    """(state, step, graph, constants) of a run that trains `drafter`; `changes` are of the optimiser."""
    graph, params, constants = nnx.split(drafter, nnx.Param, ...)
    config = OptimizerConfig(**{"learning_rate": 1e-2, "warmup_steps": 1} | changes)
    optimizer = make_optimizer(config, 100)
    train = make_train_step(graph, optimizer, loss, dtype, 0, accumulate=accumulate, ema=config.ema)
    # The step donates its state, and a drafter may serve several runs.
    state = first_state(jax.tree.map(jnp.copy, params), optimizer, config.ema)
    return state, lambda state, *args: train(state, constants, *args), graph, constants


def small_drafter(target: object, **changes: object) -> FastEagle:
    """Of LEVELS levels, to train."""
    config = default_config(target.config, num_levels=LEVELS, **changes)
    return jax.jit(lambda target: init_drafter(config, target, jax.random.key(0)))(target)


# Every switch of the cascade that is not the paper's, but a correction.
CHEAP: dict[str, Any] = dict(context="target", context_layer=2, levels="shared", side_by_side=True, edges=4)


@pytest.mark.parametrize("changes", [{}, CHEAP], ids=["own", "shared"])
@pytest.mark.parametrize("stacked", [True, False])
def test_levels_start_as_the_targets_last_layer_or_the_one_that_they_read(stacked: bool, changes: dict) -> None:
    target = tiny_target(stacked=stacked)
    drafter = small_drafter(target, **changes)
    to_columns(target)  # as what is trained has them
    source = target.layer(2 if changes else 4)
    for level in unstack(drafter.levels, LEVELS) if drafter.scans else list(drafter.levels):
        for part in ("input_norm", "attention", "mlp_norm", "mlp"):
            own = getattr(level, part)
            if own is None:
                own = getattr(drafter.shared, part)
            jax.tree.map(np.testing.assert_array_equal, own, getattr(source, part))
        np.testing.assert_array_equal(level.norm.weight[...], target.norm.weight[...])


@pytest.mark.parametrize("stacked", [True, False])
def test_eagle3_starts_as_the_targets_last_layer_and_head(stacked: bool) -> None:
    target, ids = tiny_target(stacked=stacked), jnp.arange(5, 35)
    config = default_config(target.config, kind="eagle3", num_levels=LEVELS, draft_vocab_size=30)
    start = jax.jit(lambda target, **more: init_drafter(config, target, jax.random.key(0), **more))
    drafter = start(target, token_ids=ids, feature_rms=jnp.asarray([1.0, 2.0, 4.0]))
    # Without its attention to embeddings the layer says of a feature what the target's says of a hidden state.
    features = np.random.default_rng(1).standard_normal((1, 6, 3 * config.hidden_size), np.float32)
    positions, visible = np.arange(6)[None], np.tril(np.ones((1, 6, 6), bool))

    @jax.jit
    def both(drafter, target):
        no_tokens = jnp.zeros((1, 6), jnp.int32)
        found, _ = drafter.hidden_states(target.embedding[...], features, no_tokens, positions, visible)
        last = unstack(target.layers, 5)[-1] if stacked else target.layers[-1]
        turn = rotation(positions, config.rope, config.head_dim)
        out, _ = last(features[..., -config.hidden_size :], turn, Cached(visible))
        return found[0], rms_norm(out, target.norm.weight[...], config.rms_norm_eps)

    np.testing.assert_allclose(*both(drafter, target), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(drafter.head[...], target.head_rows()[ids])


@pytest.mark.parametrize("kind", ["fasteagle", "eagle3"])
def test_a_drafter_of_other_sizes_starts_from_the_parts_that_agree_and_says_which_do_not(kind, caplog) -> None:
    target = tiny_target()
    drafter = small_drafter(target, kind=kind, intermediate_size=8)
    assert "target's layer 4, without mlp.gate_proj, mlp.up_proj, mlp.down_proj" in caplog.text
    attention = drafter.attention if kind == "eagle3" else drafter.levels.attention
    matrix, last = attention.o.matrix, target.layer(4).attention.o.matrix
    np.testing.assert_array_equal(matrix, np.broadcast_to(last, matrix.shape))


def test_fields_that_a_drafter_does_not_have_are_named() -> None:
    target = tiny_target()
    with pytest.raises(UserError, match="kind eagle3 has no reinject: it has hidden_size"):
        default_config(target.config, kind="eagle3", reinject=True)


def test_training_never_consumes_the_target() -> None:
    """The step donates its state: a buffer that a drafter shares with the target would be gone after it."""
    target = tiny_target(num_layers=2, stacked=False)
    before = jax.tree.map(np.asarray, target)
    state, step, _, _ = new_run(
        init_drafter(default_config(target.config, num_levels=LEVELS), target, jax.random.key(0))
    )
    run_steps(state, step, target, 2)
    jax.tree.map(np.testing.assert_array_equal, target, before)


@pytest.mark.parametrize(
    "changes", [pytest.param({"correction": 8}, marks=pytest.mark.slow), CHEAP], ids=["correction", "shared"]
)
def test_stacked_and_listed_models_have_the_same_loss_and_gradient(changes: dict) -> None:
    target = tiny_target(num_layers=3)
    config = default_config(target.config, num_levels=3, reinject=True, draft_vocab_size=30, **changes)
    start = jax.jit(lambda target: init_drafter(config, target, jax.random.key(0), token_ids=jnp.arange(5, 35)))
    drafter = start(target)
    # Not at zero, where other parts have no gradient.
    if "edges" in changes:
        drafter.edges.table[...] += 0.1 * jax.random.normal(jax.random.key(2), (30, 4))
    else:
        drafter.correction.to_state.weight[...] += 0.1

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
    listed = listed.stacked_form()
    for part in ("levels", "fuse", *(("shared", "edges") if "edges" in changes else ("correction",))):
        ours, theirs = getattr(stacked, part), getattr(listed, part)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
        assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(ours))


@pytest.mark.parametrize("context", ["target", pytest.param("shared", marks=pytest.mark.slow)])
def test_levels_that_read_no_other_level_are_computed_where_the_loss_looks(
    monkeypatch: pytest.MonkeyPatch, context: str
) -> None:
    """With a share of 1 that is every position, in whichever order: the same loss and gradient, to float32 rounding."""
    target = tiny_target(num_layers=3)
    changes = CHEAP | dict(edges_reach=2, edges_gated=True, reinject=True, num_levels=3)
    changes |= {"context": "shared", "context_layer": None} if context == "shared" else {}
    config = default_config(target.config, **changes)
    drafter = jax.jit(lambda target: init_drafter(config, target, jax.random.key(0)))(target)
    drafter.edges.table[...] += 0.1 * jax.random.normal(jax.random.key(2), drafter.edges.table.shape)
    graph, params, constants = nnx.split(drafter, nnx.Param, ...)
    read: list[int] = []
    states = FastEagle.hidden_states

    def watched(self: FastEagle, *args: Any, **more: Any) -> Any:
        hidden, fresh = states(self, *args, **more)
        read.append(hidden[0].shape[1])
        return hidden, fresh

    monkeypatch.setattr(FastEagle, "hidden_states", watched)

    def gradient(share: float) -> Any:
        def loss(params: Any) -> Any:
            drafter = nnx.merge(graph, params, constants)
            return drafter_loss(drafter, target, packed_batch(), jax.random.key(1), LossConfig(chunk=16, share=share))

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    stretches = gradient(1.0)
    gradient(0.4)
    monkeypatch.setattr(FastEagle, "pointwise", False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), stretches, gradient(1.0))
    assert read == [
        5 * (8 + 2),
        2 * (8 + 2),
        40,
    ]  # stretches of 8 in rows of 40 tokens, and N - 1 positions before each


@pytest.mark.parametrize(
    "changes", [pytest.param({"correction": 8}, marks=pytest.mark.slow), CHEAP], ids=["correction", "edges"]
)
def test_a_curriculum_starts_at_the_guesses_that_do_not_know_the_token_before(changes: dict) -> None:
    """Neither a correction nor edge scores have a gradient then, and all the rest of the cascade has."""
    target = tiny_target(num_layers=3, stacked=False)
    drafter = small_drafter(target, **changes)
    part = drafter.edges.table if "edges" in changes else drafter.correction.to_state.weight
    part[...] += 0.1  # not at zero, where its other parts have no gradient
    graph, params, constants = nnx.split(drafter, nnx.Param, ...)

    def loss(params: object) -> jax.Array:
        config = LossConfig(chunk=16, without_edges=1.0, curriculum=0.5)
        return drafter_loss(nnx.merge(graph, params, constants), target, packed_batch(), jax.random.key(1), config)[0]

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        name = jax.tree_util.keystr(path)
        is_silent = "edges" in name or "correction" in name
        assert (np.abs(leaf).max() == 0) == is_silent, name


def test_feature_rms_is_of_an_ordinary_token() -> None:
    target = tiny_target()
    rms = jax.jit(feature_rms, static_argnums=2)(target, packed_batch(), (0, 2))
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
    target = tiny_target(num_layers=2, stacked=False)
    drafter = small_drafter(target)
    state, step, _, constants = new_run(drafter)
    state, early = run_steps(state, step, target, 4)
    with Checkpoints(f"{tmp_path}/checkpoints", keep=1) as checkpoints:
        checkpoints.save(4, (state, constants), {})
        checkpoints.wait()
    state, late = run_steps(state, step, target, 40)
    assert np.mean(late[-4:]) < 0.9 * np.mean(early)

    other, step, _, constants = new_run(jax.jit(lambda: init_drafter(drafter.config, target, jax.random.key(7)))())
    with Checkpoints(f"{tmp_path}/checkpoints", keep=1) as checkpoints:
        assert checkpoints.latest_step() == 4
        other, constants = checkpoints.restore(4, (other, constants))
    assert int(other.step) == 4
    _, again = run_steps(other, step, target, 40)
    assert again == late


@pytest.mark.parametrize("stacked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_bfloat16_step_casts_matrices_and_keeps_norms_in_float32(stacked: bool) -> None:
    """Norms of stacked levels are [N, H]: two dimensions make no matrix, and in bfloat16 a norm of 1.003 is 1."""
    target = tiny_target(num_layers=2, stacked=stacked)
    drafter = small_drafter(target, reinject=True, correction=8)
    params = nnx.state(drafter, nnx.Param)
    for path, leaf in jax.tree_util.tree_leaves_with_path(in_dtype(params, jnp.bfloat16)):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == (jnp.float32 if "norm" in name else jnp.bfloat16), name
    state, step, _, _ = new_run(drafter, dtype=jnp.bfloat16)
    state, losses = run_steps(state, step, target, 12)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    exact, step, _, _ = new_run(drafter)
    _, expected = run_steps(exact, step, target, 2)
    np.testing.assert_allclose(losses[:2], expected, rtol=1e-2)  # bfloat16 has eight bits


def test_runs_of_equal_settings_compile_one_step_whatever_their_data(compilations: list[str]) -> None:
    """Draft vocabulary and feature scales were constants of the program: other data compiled it anew, as did every
    run in a process."""
    target = tiny_target(num_layers=2, stacked=False)
    config = RunConfig(target="t", data=("a",), steps=9, dtype="float32", loss=LossConfig(share=0.5, chunk=16))
    sizes = default_config(target.config, num_levels=LEVELS, draft_vocab_size=20)
    batch, results = packed_batch(), []
    for first in (0, 10):
        rms, ids = jnp.asarray([1.0, 2.0, 3.0 + first]), jnp.arange(first, first + 20)
        drafter = init_drafter(sizes, target, jax.random.key(0), token_ids=ids, feature_rms=rms)
        graph, params, constants = nnx.split(drafter, nnx.Param, ...)
        state = jax.block_until_ready(first_state(params, make_optimizer(config.optimizer, config.steps)))
        step = train_step(dataclasses.replace(config, data=(f"{first}",)), graph)
        before = len(compilations)
        _, result = step(state, constants, target, batch)
        results.append((float(result.loss), len(compilations) - before))
    assert results[0][0] != results[1][0]
    assert results[0][1] >= 1 and results[1][1] == 0


@pytest.mark.slow  # its weights at every step: test_losses.py
def test_a_schedule_of_the_loss_is_a_function_of_the_step_in_one_program(compilations: list[str]) -> None:
    """Three of four steps are of cross entropy, and the last of total variation; a state between them goes on so."""
    target, batch = tiny_target(num_layers=2, stacked=False), packed_batch()
    drafter = small_drafter(target)
    graph, params, constants = nnx.split(drafter, nnx.Param, ...)
    plain = RunConfig(target="t", data=("a",), steps=4, dtype="float32", loss=LossConfig(share=0.5, chunk=16))
    runs = []
    for changes in ({"tv_last": 0.25}, {}, {"cross_entropy": 0.0, "total_variation": 1.0}):
        config = dataclasses.replace(plain, loss=dataclasses.replace(plain.loss, **changes))
        runs.append((train_step(config, graph), make_optimizer(config.optimizer, config.steps)))
    start = jax.block_until_ready(first_state(jax.tree.map(jnp.copy, params), runs[0][1]))

    def losses(step: Any, state: TrainState, num_steps: int) -> tuple[TrainState, list[float]]:
        found = []
        for _ in range(num_steps):
            state, result = step(state, constants, target, batch)
            found.append(float(result.loss))
        return state, found

    def copy(state: TrainState) -> TrainState:
        return jax.tree.map(jnp.copy, state)

    (scheduled, _), (cross_entropy, _), (total_variation, _) = runs
    after, expected = losses(cross_entropy, copy(start), 3)
    _, last = losses(total_variation, copy(after), 1)
    state, first = losses(scheduled, copy(start), 1)
    before = len(compilations)
    restored = copy(state)
    _, rest = losses(scheduled, state, 3)
    assert len(compilations) == before
    np.testing.assert_allclose(first + rest, expected + last, rtol=1e-6)
    assert losses(scheduled, restored, 3)[1] == rest


# --- accumulation, skipped updates, the average -----------------------------------------------------------------


PATHS = {"share": 0.5, "chunk": 16, "expected_length": True, "after_wrong": 0.5}


@pytest.mark.parametrize(
    ("num_parts", "stacked", "sizes", "loss"),
    [
        (2, True, {}, {"share": 0.5, "chunk": 16}),
        pytest.param(4, False, {"kind": "eagle3"}, {"share": 0.5, "chunk": 16}, marks=pytest.mark.slow),
        pytest.param(2, False, CHEAP | {"context_layer": 1}, PATHS, marks=pytest.mark.slow),
    ],
)
def test_parts_of_a_batch_one_after_the_other_give_the_step_of_the_whole_batch(
    num_parts: int, stacked: bool, sizes: dict, loss: dict
) -> None:
    """Rows have unlike numbers of positions at each level, so a mean of the parts' losses would be another loss."""
    target = tiny_target(num_layers=2, stacked=stacked)
    drafter, batch = small_drafter(target, **sizes), packed_batch(3, rows=4, lengths=(3, 18), answer=1)
    whole, step, _, _ = new_run(drafter, loss=LossConfig(**loss), warmup_steps=0)
    whole, expected = step(whole, target, batch)
    assert len(set(np.asarray(expected.metrics.count).tolist())) == LEVELS
    parts, step, _, _ = new_run(drafter, num_parts, loss=LossConfig(**loss), warmup_steps=0)
    parts, result = step(parts, target, batch)
    # Sums in another order: float32 rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), result, expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        parts.optimizer[1][0].mu,
        whole.optimizer[1][0].mu,
    )


def poisoned_target() -> object:
    """A target that has no finite word for token 39, which `packed_batch` never holds."""
    target = tiny_target(num_layers=2)
    target.embedding[...] = target.embedding[...].at[39].set(jnp.nan)
    return target


@pytest.mark.parametrize("ema", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])  # with one, there is more to change
def test_a_batch_without_a_finite_loss_changes_nothing_but_the_step(ema: float) -> None:
    target = poisoned_target()
    state, step, _, _ = new_run(small_drafter(tiny_target(num_layers=2)), ema=ema)
    state, _ = run_steps(state, step, target, 3)
    before = jax.tree.map(np.array, state)
    batch = packed_batch(1)
    state, result = step(state, target, batch.__class__(batch.tokens.at[0, 5].set(39), *jax.tree.leaves(batch)[1:]))
    assert not result.applied and not np.isfinite(result.loss)
    jax.tree.map(np.testing.assert_array_equal, state._replace(step=0), before._replace(step=0))
    assert int(state.step) == before.step + 1 == 4
    state, result = step(state, target, batch)
    assert result.applied and np.isfinite(result.loss)


@pytest.mark.slow  # as a loss that is not finite, above
def test_a_loss_above_the_limit_changes_nothing_either() -> None:
    target = tiny_target(num_layers=2)
    state, step, _, _ = new_run(small_drafter(target))
    state, result = step(state, target, packed_batch())
    before = jax.tree.map(np.array, state.params)
    state, result = step(state, target, packed_batch(), np.float32(0.5 * result.loss))
    assert not result.applied
    jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_the_average_follows_the_weights_and_is_what_decodes() -> None:
    target = tiny_target(num_layers=2)
    state, step, _, _ = new_run(small_drafter(target), ema=0.5)
    average = jax.tree.map(np.array, state.params)
    for i in range(8):
        state, _ = step(state, target, packed_batch(i % 2))
        decay = min(0.5, (1 + i) / (10 + i))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p), average, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.weights, average)
    plain, _, _, _ = new_run(small_drafter(target))
    assert plain.average is None and plain.weights is plain.params


# --- Muon -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_muon_takes_the_matrices_and_leaves_vectors_and_tables_of_tokens_to_adamw(stacked: bool) -> None:
    target = tiny_target(num_layers=2, stacked=stacked)
    drafter = small_drafter(target, reinject=True, edges=4)
    drafter.edges.table[...] += 0.1  # not at zero, where the other parts of edges have no gradient
    state, step, _, _ = new_run(drafter, name="muon", warmup_steps=0, clip_norm=1e9)
    before = jax.tree.map(np.array, state.params)
    state, result = step(state, target, packed_batch())
    assert result.applied
    changes = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a, b: np.asarray(a - b), state.params, before))
    matrices = 0
    for path, change in changes:
        name = jax.tree_util.keystr(path)
        if "norm" in name or "table" in name:
            # Adam's first step has one size, whatever the gradient: with Nesterov's momentum 1.4737 times the rate.
            np.testing.assert_allclose(np.abs(change), 1.4737e-2, rtol=1e-2, err_msg=name)
            continue
        for matrix in change.reshape(-1, *change.shape[-2:]):
            size = np.linalg.svd(matrix / (1e-2 * 0.2 * max(matrix.shape) ** 0.5), compute_uv=False)
            kept = size[size > 0.3]  # Newton-Schulz brings all that is not tiny to between 0.5 and 1.5
            assert len(kept) >= len(size) // 2 and kept.max() < 1.5, name
            matrices += 1
    assert matrices == 2 + 2 + LEVELS * 8


def test_optimizer_values_are_checked() -> None:
    with pytest.raises(UserError, match="learning_rate is 0"):
        OptimizerConfig(learning_rate=0)
    with pytest.raises(UserError, match="decay_share is 2"):
        OptimizerConfig(decay_share=2)
    with pytest.raises(UserError, match="name is 'lion': use adamw, muon or sgd"):
        OptimizerConfig(name="lion")
    with pytest.raises(UserError, match="ema is 1: give a decay"):
        OptimizerConfig(ema=1)
    assert isinstance(make_optimizer(OptimizerConfig(), 10), optax.GradientTransformation)
