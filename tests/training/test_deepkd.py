"""DeepKD's three gradients and momenta against slow versions of the paper's formulas, with all logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fasteagle_jax.devices.sharding import MeshShape, make_mesh, make_on, place_batch, place_weights
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.linear import LogitMap
from fasteagle_jax.training.checkpoints import Checkpoints
from fasteagle_jax.training.config import RunConfig, apply_changes, changes_since, from_json, to_json
from fasteagle_jax.training.deepkd import DeepKD, Parts, largest, mask_sizes, num_kept, split_momenta
from fasteagle_jax.training.init import init_drafter
from fasteagle_jax.training.losses import LossConfig, level_loss, select_positions
from fasteagle_jax.training.optimizer import OptimizerConfig, make_optimizer
from fasteagle_jax.training.step import TrainState, drafter_loss, first_state, make_train_step
from tests.tiny_models import tiny_target

N, B, T, H, V = 3, 2, 12, 8, 20
CLOSE = dict(rtol=1e-5, atol=1e-6)  # float32; sums over 20 tokens and 24 positions in another order
REDUCED = np.array([0, 3, 4, 9, 11, 14, 17])
PLAIN = DeepKD(task=0.0, mask=False)  # whose parts add up to the plain distillation loss


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def places(share: float = 1.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Positions, and what `select_positions` picks of them where all is supervised but one token."""
    positions = jnp.tile(jnp.arange(T), (B, 1))
    supervised = jnp.ones((B, T), bool).at[0, 5].set(False)
    return positions, *select_positions(supervised, positions, share, jax.random.key(0))


# --- the losses and their three gradients -----------------------------------------------------------------------


def slow_losses(hidden, target_hidden, head, at, ids, own_head, config: LossConfig, k: int | None) -> Any:
    """The three weighted losses [3] of N levels, and how many positions a level leaves out.

    As in the paper, with probabilities; one is over the draft vocabulary and weighted by that one's share of the
    target's mass, or within it by 1."""
    c = config.deepkd
    positions, picked, real = at
    weights = np.array([config.level_decay**i for i in range(N)])
    total, left_out = jnp.zeros(3), []
    for i in range(1, N + 1):
        pairs = [(r, int(s)) for r in range(B) for s in picked[r][real[r]] if positions[r, s] >= i]
        full = np.array([target_hidden[pair] @ head.T for pair in pairs])
        inside = np.isin(full.argmax(axis=1), ids)
        left_out.append(int((~inside).sum()))
        u, full = full[inside][:, ids], full[inside]
        rank = np.argsort(np.argsort(-u, axis=1), axis=1)  # 0 for the target class
        y, others = rank == 0, (rank >= 1) & (rank <= (k or V))
        h = jnp.stack([hidden[i - 1][r, s - i] for r, s in np.array(pairs)[inside]])
        own = 0 if own_head is None else own_head.shape[1]
        z = h[:, : H - own] @ head[ids][:, : H - own].T
        z = z if own_head is None else z + h[:, H - own :] @ own_head.T
        p, q = jax.nn.softmax(u / c.temperature), jax.nn.softmax(z / c.temperature)
        e = np.exp(full / c.temperature)
        mass = 1.0 if config.within_draft else e[:, ids].sum(axis=1) / e.sum(axis=1)
        p_y, q_y = (p * y).sum(axis=1), (q * y).sum(axis=1)
        task = -jnp.log((jax.nn.softmax(z) * y).sum(axis=1))
        target_class = p_y * jnp.log(p_y / q_y) + (1 - p_y) * jnp.log((1 - p_y) / (1 - q_y))
        p_hat, q_hat = (jnp.where(others, x, 0) / jnp.where(others, x, 0).sum(axis=1, keepdims=True) for x in (p, q))
        kl = jnp.where(others, p_hat * jnp.log(jnp.where(others, p_hat / jnp.where(others, q_hat, 1), 1)), 0).sum(
            axis=1
        )
        distilled = c.temperature**2 * mass
        parts = c.task * task, c.target_class * distilled * target_class, c.non_target * distilled * (1 - p_y) * kl
        total += weights[i - 1] / weights.sum() * jnp.stack([part.sum() for part in parts]) / len(pairs)
    return total, left_out


CASES = {
    "full vocabulary": (np.arange(V), DeepKD(), False, None, None),
    "full vocabulary, five kept": (np.arange(V), DeepKD(temperature=2.0), False, None, 5),
    "reduced vocabulary, three kept": (REDUCED, DeepKD(4.0, 0.1, 0.7, 0.9), False, None, 3),
    "reduced, distribution within it, own head": (REDUCED, DeepKD(temperature=1.5), True, H, 2),
}


@pytest.mark.parametrize(
    ("ids", "deepkd", "within", "rank", "k"),
    [pytest.param(*c, id=name, marks=[pytest.mark.slow] * (name == "full vocabulary")) for name, c in CASES.items()],
)
def test_the_three_losses_and_gradients_are_the_papers_with_all_logits(ids, deepkd, within, rank, k) -> None:
    hidden, target_hidden, head = normal(0, N, B, T, H), normal(1, B, T, H), normal(2, V, H)
    own = None if rank is None else normal(3, len(ids), rank)
    config = LossConfig(within_draft=within, chunk=5, deepkd=deepkd)
    kept = None if k is None else jnp.int32(k)

    def fast(hidden: Any, own: Any) -> Any:
        tokens = None if len(ids) == V else jnp.asarray(ids)
        args = (target_hidden, *places(), head, tokens, config, own)
        return level_loss(hidden, *args, num_kept=kept)

    known = jax.tree.map(np.asarray, (target_hidden, head, places()))

    def slow(hidden: Any, own: Any) -> Any:
        return slow_losses(hidden, *known, ids, own, config, k)

    trained = (0,) if own is None else (0, 1)
    losses, metrics = jax.jit(fast)(hidden, own)
    found = jax.jit(jax.jacrev(lambda *args: fast(*args)[0], trained))(hidden, own)
    expected, left_out = slow(hidden, own)
    gradients = jax.jit(jax.jacrev(lambda *args: slow(*args)[0], trained))(hidden, own)
    np.testing.assert_allclose(losses, expected, **CLOSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), found, gradients)
    assert all(np.abs(gradient).max() > 1e-4 for gradient in gradients[0])  # of each of the three
    assert (losses > 0).all() and (metrics.loss > 0).all()
    # Positions whose label is outside of the draft vocabulary.
    assert metrics.left_out.tolist() == left_out
    assert (sum(left_out) > 0) == (len(ids) < V)


@pytest.mark.parametrize("within", [True, False], ids=["within the draft vocabulary", "over the whole vocabulary"])
def test_target_class_and_non_target_class_add_up_to_the_plain_gradient(within: bool) -> None:
    hidden, target_hidden, head = normal(0, N, B, T, H), normal(1, B, T, H), normal(2, V, H)
    ids = jnp.asarray(REDUCED)
    if not within:  # plain training has a loss where the draft vocabulary lacks the label: here it lacks none
        ids = jnp.asarray(sorted({int(x) for x in jnp.argmax(target_hidden @ head.T, axis=-1).ravel()}))
    assert len(ids) < V

    def loss(deepkd: DeepKD | None) -> Any:
        config = LossConfig(within_draft=within, chunk=5, deepkd=deepkd)
        args = (target_hidden, *places(), head, ids, config)
        return jax.jit(jax.grad(lambda hidden: level_loss(hidden, *args)[0].sum()))(hidden)

    np.testing.assert_allclose(loss(PLAIN), loss(None), **CLOSE)
    with_task = loss(dataclasses.replace(PLAIN, task=1.0))
    assert np.abs(with_task - loss(None)).max() > 1e-3


def test_a_targets_logit_map_is_in_the_three_losses() -> None:
    hidden, target_hidden, head = normal(0, N, B, T, H), normal(1, B, T, H), normal(2, V, H)
    args = (target_hidden, *places(), head, None)

    def gradient(deepkd: DeepKD | None) -> Any:
        def loss(hidden: Any) -> Any:
            config = LossConfig(deepkd=deepkd)
            return level_loss(hidden, *args, config, logit_map=LogitMap(0.5, 3.0))[0].sum()

        return jax.jit(jax.grad(loss))(hidden)

    np.testing.assert_allclose(gradient(PLAIN), gradient(None), **CLOSE)


def test_stacked_and_listed_levels_have_the_same_three_gradients() -> None:
    hidden, target_hidden, head = normal(0, N, B, T, H), normal(1, B, T, H), normal(2, V, H)
    args = (target_hidden, *places(), head, jnp.asarray(REDUCED), LossConfig(chunk=7, deepkd=DeepKD()))
    jacobian = jax.jit(jax.jacrev(lambda hidden: level_loss(hidden, *args, num_kept=jnp.int32(3))[0]))
    np.testing.assert_allclose(jacobian(hidden), jnp.stack(jacobian(list(hidden)), axis=1), **CLOSE)


# --- the mask ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7, 18, 19])
def test_the_kept_classes_are_the_largest_of_the_others(k: int) -> None:
    logits = normal(0, 6, V) * 10.0 ** jnp.arange(-3, 3)[:, None]
    among = jnp.arange(V) != jnp.argmax(logits, axis=-1, keepdims=True)
    kept = jax.jit(largest)(logits, among, jnp.int32(k))
    for row, numbers, allowed in zip(kept, logits, among, strict=True):
        order = [int(i) for i in np.argsort(-np.asarray(numbers)) if allowed[i]]
        assert set(np.flatnonzero(row).tolist()) == set(order[:k])


def test_classes_that_tie_with_the_last_are_kept_and_all_if_k_is_more_than_there_are() -> None:
    logits = jnp.asarray([[3.0, 1.0, -2.0, 1.0, 0.0]])
    among = jnp.asarray([[False, True, True, True, True]])
    assert np.flatnonzero(largest(logits, among, jnp.int32(1))).tolist() == [1, 3]
    np.testing.assert_array_equal(largest(logits, among, jnp.int32(9)), among)


def test_what_the_mask_leaves_out_gets_no_gradient_of_the_non_target_part_whatever_the_drafter_says() -> None:
    """The same classes in both: a drafter that puts its mass on a class outside of the mask moves it not at all."""
    head = jnp.eye(V, H) + 0.1 * normal(2, V, H)
    target_hidden, hidden = normal(1, B, T, H), normal(0, 1, B, T, H)
    own = normal(3, V, H).at[V - 1].multiply(20.0)
    args = (target_hidden, *places(0.1), head, None, LossConfig(deepkd=DeepKD()))

    def non_target(own: jax.Array) -> jax.Array:
        return level_loss(hidden, *args, own, num_kept=jnp.int32(4))[0][2]

    moved = np.abs(jax.jit(jax.grad(non_target))(own)).max(axis=1) > 0  # [V]
    expected = np.zeros(V, bool)
    _, picked, real = places(0.1)
    for b in range(B):
        for s in picked[b][real[b]]:
            u = np.asarray(target_hidden[b, s] @ head.T)
            expected[np.argsort(-u)[1:5]] = True
    np.testing.assert_array_equal(moved, expected)
    assert 4 <= expected.sum() <= 8


def test_k_grows_to_the_best_stays_and_grows_to_all() -> None:
    config, steps = DeepKD(mask_start=0.05, mask_best=40), 31
    sizes = [int(num_kept(config, 101, jnp.int32(step), steps)) for step in range(steps + 5)]
    assert mask_sizes(config, 101) == (5, 40, 100)
    assert sizes[0] == 5 and sizes[10:21] == [40] * 11 and sizes[30:] == [100] * 6
    np.testing.assert_allclose(sizes[:11], 5 + 3.5 * np.arange(11), atol=0.5)
    np.testing.assert_allclose(sizes[20:31], 40 + 6 * np.arange(11), atol=0.5)
    assert num_kept(dataclasses.replace(config, mask=False), 101, jnp.int32(0), steps) is None
    assert mask_sizes(DeepKD(), 101) == (5, 50, 100)


def test_a_mask_that_the_vocabulary_is_too_small_for_is_a_user_error() -> None:
    assert mask_sizes(DeepKD(mask_best=19), 20) == (1, 19, 19)
    with pytest.raises(UserError, match="keeps 20 non-target classes and the draft vocabulary of 20 has 19: set") as a:
        mask_sizes(DeepKD(mask_best=20), 20)
    with pytest.raises(UserError, match="starts with 50 non-target .* more than its best 10: lower") as b:
        mask_sizes(DeepKD(mask_start=0.5, mask_best=10), 101)
    assert "\n" not in f"{a.value}{b.value}"


# --- the momenta ------------------------------------------------------------------------------------------------


def some_gradients(num_steps: int) -> list[Parts]:
    """Three gradients a step of two parameters, with unlike means and noise."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((3, 5), dtype=np.float32)

    def one(i: int) -> dict[str, jax.Array]:
        noise = rng.standard_normal(5, dtype=np.float32) * (i + 0.5)
        values = means[i] + noise
        return {"a": jnp.asarray(values[:3]), "b": jnp.asarray(values[3:])}

    return [Parts(*map(one, range(3))) for _ in range(num_steps)]


def run(optimizer: optax.GradientTransformation, gradients: list[Any], params: Any) -> tuple[Any, Any]:
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_three_buffers_and_the_weights_are_those_of_a_plain_loop(name: str) -> None:
    rate, decays, weight_decay, clip = 0.1, (0.975, 0.825, 0.95), 0.02, 7.0
    second_decay = 0.95 if name == "adamw" else None
    params = {"a": jnp.arange(3.0), "b": jnp.ones(2)}
    optimizer = split_momenta(
        lambda count: rate / (1 + count), decays, second_decay=second_decay, weight_decay=weight_decay, clip_norm=clip
    )
    steps = some_gradients(6)
    found, state = run(optimizer, steps, params)

    weights, v, s, clipped = flat(params).astype(np.float64), np.zeros((3, 5)), np.zeros(5), 0
    for t, gradients in enumerate(steps, 1):
        g = np.stack([flat(part) for part in gradients]).astype(np.float64)
        norm = np.linalg.norm(g.sum(axis=0))
        clipped += norm > clip
        g *= min(1, clip / norm)
        if name == "sgd":
            v = np.array(decays)[:, None] * v + g
            step = v.sum(axis=0)
        else:
            v = np.stack([mu * old + (1 - mu) * new for mu, old, new in zip(decays, v, g, strict=True)])
            s = 0.95 * s + 0.05 * g.sum(axis=0) ** 2
            m = sum(old / (1 - mu**t) for mu, old in zip(decays, v, strict=True))
            step = m / (np.sqrt(s / (1 - 0.95**t)) + 1e-8)
        weights -= rate / t * (step + weight_decay * weights)
    assert 0 < clipped < 6
    np.testing.assert_allclose(np.stack([flat(part) for part in state.momenta]), v, **CLOSE)
    np.testing.assert_allclose(flat(found), weights, rtol=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_equal_momenta_are_the_plain_optimiser_of_the_sum(name: str) -> None:
    config = OptimizerConfig(name, learning_rate=0.05, warmup_steps=2, weight_decay=0.1, clip_norm=2.0)
    params, steps = {"a": jnp.arange(3.0), "b": jnp.ones(2)}, some_gradients(8)
    split, _ = run(make_optimizer(config, 8, DeepKD(momenta=(0.0, 0.0, 0.0))), steps, params)
    plain, _ = run(make_optimizer(config, 8), [part.total() for part in steps], params)
    other, _ = run(make_optimizer(config, 8, DeepKD()), steps, params)
    np.testing.assert_allclose(flat(split), flat(plain), rtol=1e-5)
    assert np.abs(flat(other) - flat(plain)).max() > 1e-3


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_signal_to_noise_ratio_is_that_of_the_gradients(name: str) -> None:
    """Of many parameters, of which an estimate over some ten gradients is good; decays that are unlike agree."""
    size, ratios = 20_000, np.array([0.0, 0.5, 4.0])
    rng = np.random.default_rng(0)
    means = rng.choice([-1.0, 1.0], (3, size)) * np.sqrt(ratios)[:, None]
    second_decay = 0.95 if name == "adamw" else None
    optimizer = split_momenta(
        lambda _: 0.1, (0.95, 0.6, 0.9), second_decay=second_decay, weight_decay=0.0, clip_norm=1e9
    )
    steps = [Parts(*jnp.asarray(means + rng.standard_normal((3, size)), jnp.float32)) for _ in range(40)]
    _, state = run(optimizer, steps[:1], jnp.zeros(size))
    assert np.isnan(state.signal_to_noise).all()  # of one there is no variance
    for count in (2, 40):
        _, state = run(optimizer, steps[:count], jnp.zeros(size))
        np.testing.assert_allclose(state.signal_to_noise, ratios, rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(momenta=(0.1, 0.0, 0.0)), "the momentum of task is 1, .* loss.deepkd.momenta: it must be 0 or more"),
        (dict(momenta=(0.0, -1.0, 0.0)), "the momentum of target_class is -0.1"),
    ],
)
def test_momenta_that_are_none_are_a_user_error(changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        make_optimizer(OptimizerConfig(), 10, DeepKD(**changes))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="optimizer name is 'muon', and loss.deepkd has momenta for adamw and sgd"):
        make_optimizer(OptimizerConfig("muon"), 10, DeepKD())


# --- the train step ---------------------------------------------------------------------------------------------

LEVELS, STEPS = 2, 9


def packed_batch(seed: int = 0) -> Any:
    """Four rows of two conversations each."""
    from fasteagle_jax.data.conversations import Conversation
    from fasteagle_jax.data.packing import PackedData

    rng = np.random.default_rng(seed)
    samples = [Conversation.of(f"{i}", rng.integers(39, size=18).tolist(), [[2 + i % 5, 18]]) for i in range(16)]
    return PackedData(samples, 40, 4, seed).batch(0)


def small_drafter(target: Any, kind: str = "fasteagle", **changes: Any) -> Any:
    config = default_config(target.config, kind=kind, num_levels=LEVELS, draft_vocab_size=30, **changes)
    drafter = init_drafter(config, target, jax.random.key(0), token_ids=jnp.arange(5, 35))
    if "edges" in changes:  # not at zero, where other parts have no gradient
        drafter.edges.table[...] += 0.1 * jax.random.normal(jax.random.key(2), (30, changes["edges"]))
    return drafter


def new_run(
    drafter: Any, deepkd: DeepKD | None, accumulate: int = 1, mesh: Any = None, **changes: Any
) -> tuple[TrainState, Any, Any]:
    """(state, step, constants) of a run that trains `drafter`; `changes` are of the optimiser."""
    graph, params, constants = nnx.split(drafter, nnx.Param, ...)
    config = OptimizerConfig(**{"learning_rate": 1e-2, "warmup_steps": 1} | changes)
    optimizer = make_optimizer(config, STEPS, deepkd)
    params = jax.tree.map(jnp.copy, params)  # the step donates its state
    if mesh is not None:
        params = place_weights(mesh, params)
    state = make_on(mesh, lambda params: first_state(params, optimizer, config.ema), params)
    placed = None
    if mesh is not None:
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        placed = jax.tree.map(lambda x: x.sharding, state), whole
    train = make_train_step(
        graph,
        optimizer,
        LossConfig(share=0.5, chunk=16, deepkd=deepkd),
        jnp.float32,
        0,
        accumulate=accumulate,
        ema=config.ema,
        shardings=placed,
        num_steps=STEPS,
    )
    return state, train, constants


def run_steps(state: TrainState, step: Any, constants: Any, target: Any, num_steps: int, mesh: Any = None) -> Any:
    """The state after so many steps, and the result of each."""
    results = []
    for _ in range(num_steps):
        batch = packed_batch(int(state.step) % 2)
        state, result = step(state, constants, target, place_batch(mesh, lambda rows, b=batch: cut(b, rows), 4))
        results.append(result)
    return state, results


def cut(batch: Any, rows: slice) -> Any:
    return jax.tree.map(lambda x: x[rows], batch)


KINDS = [("fasteagle", {}), ("fasteagle", {"edges": 4}), ("eagle3", {})]


@pytest.mark.parametrize(
    ("kind", "changes", "stacked"),
    [
        pytest.param("fasteagle", {}, True, id="stack"),
        pytest.param("fasteagle", {"edges": 4}, False, id="list with edges", marks=pytest.mark.slow),
        pytest.param("eagle3", {}, False, id="eagle3", marks=pytest.mark.slow),
    ],
)
def test_a_step_has_the_gradients_of_three_losses_by_themselves(kind: str, changes: dict, stacked: bool) -> None:
    """Each buffer is, after a step, the gradient that jax.grad gives for its loss alone."""
    target, deepkd = tiny_target(num_layers=2, stacked=stacked), DeepKD(mask=False)
    drafter = small_drafter(target, kind, **changes)
    state, step, constants = new_run(drafter, deepkd, name="sgd", clip_norm=1e9)
    state, result = step(state, constants, target, jax.tree.map(jnp.asarray, packed_batch()))
    graph, params, rest = nnx.split(drafter, nnx.Param, ...)
    key = jax.random.fold_in(jax.random.key(0), 0)

    @jax.jit
    def gradient_of(params: Any, part: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            config = LossConfig(share=0.5, chunk=16, deepkd=deepkd)
            drafter = nnx.merge(graph, params, rest)
            return (
                drafter_loss(drafter, target, jax.tree.map(jnp.asarray, packed_batch()), key, config)[0] * part
            ).sum()

        return jax.value_and_grad(loss)(params)

    for i, buffer in enumerate(state.optimizer.momenta):
        loss, gradient = gradient_of(params, jnp.eye(3)[i])
        np.testing.assert_allclose(result.parts.losses[i], loss, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), buffer, gradient)
        assert np.abs(flat(buffer)).max() > 1e-3
    np.testing.assert_allclose(result.loss, result.parts.losses.sum(), rtol=1e-6)
    np.testing.assert_allclose(result.norm, optax.tree.norm(state.optimizer.momenta.total()), rtol=1e-5)
    assert (result.metrics.left_out > 0).all() and (result.metrics.left_out < result.metrics.count).all()


@pytest.mark.slow  # of the losses and of the optimiser by themselves in the tests above
def test_equal_momenta_without_a_mask_and_task_are_plain_training() -> None:
    """With the whole vocabulary, where no label is outside."""
    target = tiny_target(num_layers=2)
    drafter = init_drafter(default_config(target.config, num_levels=LEVELS), target, jax.random.key(0))
    weights = []
    for deepkd in (None, dataclasses.replace(PLAIN, momenta=(0.0, 0.0, 0.0)), PLAIN):
        state, step, constants = new_run(drafter, deepkd)
        state, results = run_steps(state, step, constants, target, 4)
        weights.append(flat(state.params))
    # AdamW's first steps divide small gradients by their own size: rounding of 1e-7 becomes 1e-4 of a rate of 1e-2.
    np.testing.assert_allclose(weights[1], weights[0], atol=2e-5)
    assert np.abs(weights[2] - weights[0]).max() > 1e-3
    assert results[-1].metrics.left_out.tolist() == [0] * LEVELS


@pytest.mark.slow  # parts of a batch of plain training: test_step.py
@pytest.mark.parametrize(("num_parts", "kind"), [(2, "fasteagle"), (4, "eagle3")])
def test_microbatches_give_the_step_of_the_whole_batch(num_parts: int, kind: str) -> None:
    target = tiny_target(num_layers=2)
    found = []
    for accumulate in (1, num_parts):
        state, step, constants = new_run(small_drafter(target, kind), DeepKD(), accumulate, warmup_steps=0)
        state, result = step(state, constants, target, jax.tree.map(jnp.asarray, packed_batch()))
        found.append((result, state.optimizer.momenta, state.optimizer.squares))
    # Sums in another order: float32 rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[1], found[0])
    assert (np.asarray(found[0][0].metrics.left_out) > 0).all()


@pytest.mark.slow  # as in plain training: test_step.py
def test_the_loss_falls_and_a_restored_run_goes_on_bitwise(tmp_path: object) -> None:
    """Three buffers, the second moment, the average and the place in the mask's phases."""
    target = tiny_target(num_layers=2)
    state, step, constants = new_run(small_drafter(target), DeepKD(), ema=0.9)
    state, results = run_steps(state, step, constants, target, 4)
    kept = [int(result.parts.num_kept) for result in results]
    with Checkpoints(f"{tmp_path}/checkpoints", keep=1) as checkpoints:
        checkpoints.save(4, (state, constants), {})
        checkpoints.wait()
    state, late = run_steps(state, step, constants, target, STEPS - 4)
    assert late[-1].loss < 0.9 * results[0].loss
    kept += [int(result.parts.num_kept) for result in late]
    assert kept[0] == 1 and 14 in kept[2:6] and kept[-1] == 29 and kept == sorted(kept)
    assert np.isnan(results[0].parts.signal_to_noise).all() and np.isfinite(late[-1].parts.signal_to_noise).all()

    other, _, constants = new_run(small_drafter(target), DeepKD(), ema=0.9)
    with Checkpoints(f"{tmp_path}/checkpoints", keep=1) as checkpoints:
        other, constants = checkpoints.restore(4, (other, constants))
    other, again = run_steps(other, step, constants, target, STEPS - 4)
    jax.tree.map(np.testing.assert_array_equal, (other, again[-1]), (state, late[-1]))


@pytest.mark.slow  # as one of plain training: test_step.py
def test_a_skipped_update_leaves_the_buffers() -> None:
    target = tiny_target(num_layers=2)
    state, step, constants = new_run(small_drafter(target), DeepKD())
    state, _ = run_steps(state, step, constants, target, 2)
    before = jax.tree.map(np.array, state)
    batch = jax.tree.map(jnp.asarray, packed_batch())
    state, result = step(state, constants, target, batch, np.float32(0))
    assert not result.applied and int(state.step) == 3
    jax.tree.map(np.testing.assert_array_equal, state._replace(step=0), before._replace(step=0))
    np.testing.assert_array_equal(result.parts.signal_to_noise, before.optimizer.signal_to_noise)


@pytest.mark.slow  # tests/commands/test_meshes.py has plain training on meshes
@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=["fasteagle", "edges", "eagle3"])
def test_steps_on_a_mesh_are_those_on_one_device(kind: str, changes: dict) -> None:
    """Rows over data and fsdp, the vocabulary over tensor: the mask's counts, and the parts' sums, are exchanged."""
    target = tiny_target(num_layers=2)
    drafter = small_drafter(target, kind, **changes)
    state, step, constants = new_run(drafter, DeepKD(), name="sgd")
    alone, expected = run_steps(state, step, constants, target, 3)
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        sharded = place_weights(mesh, target)
        state, step, constants = new_run(drafter, DeepKD(), mesh=mesh, name="sgd")
        constants = place_weights(mesh, constants)
        state, found = run_steps(state, step, constants, sharded, 3, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state.optimizer, alone.optimizer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state.params, alone.params)


# --- configurations ---------------------------------------------------------------------------------------------


def base() -> RunConfig:
    return RunConfig(target="t", data=("a",), steps=3)


def test_it_is_switched_on_and_off_and_changed_by_key() -> None:
    assert base().loss.deepkd is None
    on = apply_changes(base(), ["loss.deepkd=True"])
    assert on.loss.deepkd == DeepKD() and apply_changes(on, ["loss.deepkd=None"]) == base()
    changed = apply_changes(base(), ["loss.deepkd.temperature=4", "loss.deepkd.momenta=0.075,-0.075,0.05"])
    assert changed.loss.deepkd == DeepKD(temperature=4.0, momenta=(0.075, -0.075, 0.05))
    assert apply_changes(changed, ["loss.deepkd=True"]) == changed
    assert from_json(to_json(changed)) == changed and from_json(to_json(base())) == base()
    assert changes_since(to_json(on), changed)[1:] == ["loss.deepkd.temperature 1.0, not 4.0"]
    old = to_json(base())
    del old["loss"]["deepkd"]  # saved before there was such a key
    assert changes_since(old, base()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("loss.deepkd.temprature=4", "loss.deepkd.temprature is not a key: there are temperature, task, target_class"),
        ("loss.deepkt=True", "loss.deepkt is not a key: there are cross_entropy, .*deepkd"),
        ("loss.deepkd=yes", "loss.deepkd=yes: give True, None, or change one of loss.deepkd.temperature, "),
        ("loss.deepkd.temperature=0", "temperature is 0.0: it must be above 0"),
        ("loss.deepkd.non_target=-1", "non_target is -1.0: a weight must be 0 or more"),
        ("loss.deepkd.momenta=0.1,0.1", "give three numbers"),
        ("loss.deepkd.momenta=0.1", "not of type"),
        ("loss.deepkd.mask_start=0", "mask_start is 0.0: it must be above 0 and at most 1"),
        ("loss.deepkd.mask_best=0", "mask_best is 0: give a number of classes"),
    ],
)
def test_a_bad_change_is_named_with_its_remedy(change: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        apply_changes(base(), [change])
    assert "\n" not in str(error.value)


def test_terms_of_the_plain_loss_beside_it_and_keys_of_a_later_version_are_refused() -> None:
    with pytest.raises(UserError, match="loss total_variation cannot be used with loss.deepkd, which has three parts"):
        apply_changes(base(), ["loss.total_variation=0.5", "loss.deepkd=True"])
    raw = to_json(apply_changes(base(), ["loss.deepkd=True"]))
    raw["loss"]["deepkd"]["gate"] = 1
    with pytest.raises(UserError, match="has loss.deepkd.gate, which this version does not know"):
        from_json(raw)
    with pytest.raises(ValueError, match="num_steps"):
        make_train_step(None, None, LossConfig(deepkd=DeepKD()), jnp.float32, 0)
