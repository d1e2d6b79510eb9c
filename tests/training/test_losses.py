"""The chunked loss and its gradient against a version that makes all logits, and the memory that it saves."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.linear import LogitMap
from fasteagle_jax.training import losses
from fasteagle_jax.training.deepkd import DeepKD
from fasteagle_jax.training.losses import LossConfig, level_loss, select_positions, stretches_read

N, B, T, H, V = 3, 2, 12, 8, 20
KEY = jax.random.key(0)
CLOSE = dict(rtol=1e-5, atol=1e-6)  # float32; sums over 20 tokens and 24 positions in another order

# Two segments in the first row, one and padding in the second.
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0]])
SEGMENTS = np.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])
SUPERVISED = np.array([[0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0]], bool)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    return normal(0, N, B, T, H), normal(1, B, T, H), normal(2, V, H)


def slow_loss(hidden, target_hidden, pairs, head, ids, config, logit_map=lambda products: products):
    """Loss and (loss, hits, acceptance) a level. `pairs` are (row, target position) that count."""
    losses, metrics = [], []
    for i in range(1, N + 1):
        # The segment must reach back i tokens.
        b, s = np.array([pair for pair in pairs if POSITIONS[pair] >= i]).T
        h, at_target = hidden[i - 1][b, s - i], target_hidden[b, s]
        p_full = jax.nn.softmax(logit_map(at_target @ head.T))
        q, p = jax.nn.softmax(logit_map(h @ head[ids].T)), p_full[:, ids]
        overlap = jnp.minimum(p, q).sum(axis=1)
        gap = jnp.abs(h - at_target)
        terms = config.cross_entropy * -(p * jnp.log(q)).sum(axis=1)
        terms += config.total_variation * (1 - overlap)
        terms += config.acceptance * -jnp.log(overlap)
        terms += config.smooth_l1 * jnp.where(gap < 1, gap**2 / 2, gap - 0.5).mean(axis=1)
        share = jnp.exp(-config.hybrid_rate * jax.lax.stop_gradient(overlap))
        terms += config.hybrid * (share * (p * jnp.log(p / q)).sum(axis=1) + (1 - share) * (1 - overlap))
        hits = ids[jnp.argmax(q, axis=1)] == jnp.argmax(p_full, axis=1)
        losses.append(terms.mean())
        metrics.append([terms.mean(), hits.mean(), overlap.mean()])
    weights = jnp.array([config.level_decay**i for i in range(N)])
    if config.last_level_only:
        weights = jnp.array([0.0] * (N - 1) + [1.0])
    return (weights * jnp.stack(losses)).sum() / weights.sum(), metrics


def pairs_that_count() -> list[tuple[int, int]]:
    """(b, s) whose next token is supervised and which one token at least precedes in the segment."""
    return [(b, s) for b, s in np.ndindex(B, T - 1) if SUPERVISED[b, s + 1] and POSITIONS[b, s] >= 1]


CONFIGS = {
    "cross entropy": LossConfig(chunk=5),
    "total variation": LossConfig(cross_entropy=0.0, total_variation=1.0, chunk=5),
    "acceptance": LossConfig(cross_entropy=0.0, acceptance=1.0, chunk=5),
    "smooth L1": LossConfig(cross_entropy=0.0, smooth_l1=1.0, chunk=5),
    "cross entropy and total variation": LossConfig(0.1, 0.9, chunk=5),
    "hybrid": LossConfig(cross_entropy=0.0, hybrid=1.0, hybrid_rate=2.0, chunk=5),
    "all terms, even weights, one chunk": LossConfig(0.1, 0.2, 0.3, 0.4, hybrid=0.5, level_decay=1.0, chunk=256),
    "last level only": LossConfig(last_level_only=True, chunk=1),
}


# Every term within a reduced vocabulary, and with the full one all together.
@pytest.mark.parametrize(
    ("ids", "config"),
    [
        pytest.param(ids, config, id=f"{of}-{name}", marks=[pytest.mark.slow] * (of == "full" and "all" not in name))
        for of, ids in (("full", None), ("reduced", np.array([0, 3, 4, 9, 17])))
        for name, config in CONFIGS.items()
    ],
)
def test_loss_metrics_and_gradient_are_those_of_the_loss_that_makes_all_logits(config, ids):
    hidden, target_hidden, head = inputs()
    picked, real = select_positions(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), config.share, jax.random.key(0))

    @functools.partial(jax.value_and_grad, has_aux=True)
    def fast(hidden):
        positions = jnp.asarray(POSITIONS)
        return level_loss(hidden, target_hidden, positions, picked, real, head, ids, config)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def slow(hidden):
        return slow_loss(
            hidden, target_hidden, pairs_that_count(), head, jnp.arange(V) if ids is None else jnp.asarray(ids), config
        )

    (loss, metrics), gradient = jax.jit(fast)(hidden)
    (expected, expected_metrics), expected_gradient = jax.jit(slow)(hidden)
    np.testing.assert_allclose(loss, expected, **CLOSE)
    np.testing.assert_allclose(jnp.stack(metrics[:3], axis=1), jnp.asarray(expected_metrics), **CLOSE)
    np.testing.assert_allclose(gradient, expected_gradient, **CLOSE)
    assert np.abs(gradient[N - 1]).max() > 1e-3
    assert config.last_level_only == (np.abs(gradient[0]).max() == 0)


@pytest.mark.parametrize(
    "ids", [pytest.param(None, marks=pytest.mark.slow), np.array([0, 3, 4, 9, 17])], ids=["full", "reduced"]
)
def test_a_targets_logit_map_is_in_its_own_logits_and_in_the_drafts(ids):
    hidden, target_hidden, head = inputs()
    picked, real = select_positions(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), 1.0, jax.random.key(0))
    config, places = LossConfig(chunk=5), (jnp.asarray(POSITIONS), picked, real)
    tokens = jnp.arange(V) if ids is None else jnp.asarray(ids)

    def fast(hidden):
        return level_loss(hidden, target_hidden, *places, head, ids, config, logit_map=LogitMap(0.5, 3.0))[0]

    def slow(hidden):
        capped = pairs_that_count(), head, tokens, config, lambda products: 3 * jnp.tanh(0.5 * products / 3)
        return slow_loss(hidden, target_hidden, *capped)[0]

    found, expected = jax.jit(jax.value_and_grad(fast))(hidden), jax.jit(jax.value_and_grad(slow))(hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), found, expected)


@pytest.mark.parametrize("has_head", [False, True], ids=["frozen head", "its own"])
@pytest.mark.parametrize(
    "ids", [pytest.param(None, marks=pytest.mark.slow), np.array([0, 3, 4, 9, 17])], ids=["full", "reduced"]
)
def test_a_table_of_edge_scores_is_added_to_the_heads_logits_and_trained(ids, has_head):
    """It reads the last entries of hidden states; the guesses without it may have a loss of their own."""
    hidden, target_hidden, head = inputs()
    width, tokens = 3, jnp.arange(V) if ids is None else jnp.asarray(ids)
    edges, table = normal(5, N, B, T, width), normal(6, len(tokens), width)
    if has_head:
        table = jnp.concatenate([normal(7, len(tokens), H), table], axis=-1)
    picked, real = select_positions(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), 1.0, jax.random.key(0))
    config, places = LossConfig(without_edges=0.3, chunk=5), (jnp.asarray(POSITIONS), picked, real)

    def fast(both, table):
        return level_loss(both, target_hidden, *places, head, ids, config, table)[0]

    def slow(both, table):
        total = 0.0
        for i in range(1, N + 1):
            b, s = np.array([pair for pair in pairs_that_count() if POSITIONS[pair] >= i]).T
            h = both[i - 1][b, s - i]
            p = jax.nn.softmax(target_hidden[b, s] @ head.T)[:, tokens]
            without = h[:, :H] @ (table[:, :H] if has_head else head[tokens]).T
            terms = -(p * jax.nn.log_softmax(without + h[:, H:] @ table[:, -width:].T)).sum(axis=1)
            terms += 0.3 * -(p * jax.nn.log_softmax(without)).sum(axis=1)
            total += config.level_decay ** (i - 1) * terms.mean()
        return total / sum(config.level_decay**i for i in range(N))

    both = jnp.concatenate([hidden, edges], axis=-1)
    found, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(both, table) for f in (fast, slow))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), found, expected)
    assert np.abs(found[1][1]).max() > 1e-3


def test_the_loss_moves_from_the_guesses_without_a_correction_to_the_whole_ones():
    """Hidden states hold both. A quarter of the run is half of its curriculum."""
    hidden, target_hidden, head = inputs()
    both = jnp.concatenate([hidden, normal(5, N, B, T, H)], axis=-1)
    places = jnp.asarray(POSITIONS), *select_positions(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), 1.0, KEY)
    config = LossConfig(0.1, 0.9, without_edges=1.0, curriculum=0.5, chunk=5)

    def moving(both, done):
        return level_loss(both, target_hidden, *places, head, None, config, done=done)[0]

    def of(hidden):
        return level_loss(hidden, target_hidden, *places, head, None, LossConfig(0.1, 0.9, chunk=5))[0]

    grad = jax.jit(jax.value_and_grad(moving))
    for done, share in ((0.0, 1.0), (0.25, 0.5), (0.75, 0.0)):
        slow = jax.value_and_grad(lambda both, s=share: (1 - s) * of(both[..., :H]) + s * of(both[..., H:]))(both)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), grad(both, done), slow)


# --- weights along a path, and over a run -----------------------------------------------------------------------


def slow_path_loss(hidden, target_hidden, pairs, head, ids, config):
    """As slow_loss, path by path: from stream position t the guesses of levels 1, 2, ... at t + 1, t + 2, ..."""

    @jax.jit
    def of_guesses(hidden):
        """Loss, hit and acceptance [N, B, T] by stream position."""
        p_full = jax.nn.softmax(jnp.stack([jnp.roll(target_hidden, -i, axis=1) for i in range(1, N + 1)]) @ head.T)
        p, log_q = p_full[..., ids], jax.nn.log_softmax(hidden @ head[ids].T)
        overlap = jnp.minimum(p, jnp.exp(log_q)).sum(axis=-1)
        loss = config.cross_entropy * -(p * log_q).sum(axis=-1) + config.total_variation * (1 - overlap)
        return loss, ids[log_q.argmax(axis=-1)] == p_full.argmax(axis=-1), overlap

    _, hit, accepted = jax.tree.map(np.asarray, of_guesses(hidden))
    weights, counts = np.zeros((N, B, T)), [0] * N
    for b, t in np.ndindex(B, T):
        reach = 0  # levels of the path before the first that does not count
        while reach < N and (b, t + reach + 1) in pairs and POSITIONS[b, t + reach + 1] > reach:
            reach += 1
        smooth = config.smoothing + (1 - config.smoothing) * accepted[:reach, b, t]
        for i in range(reach):
            weights[i, b, t] = 1.0 if hit[:i, b, t].all() else config.after_wrong
            if config.expected_length:
                weights[i, b, t] *= sum(np.prod(smooth[: m + 1]) for m in range(i, reach))
            counts[i] += 1
    levels = np.array([1 / N if config.expected_length else config.level_decay**i for i in range(N)])
    weights *= (levels / levels.sum() / counts)[:, None, None]
    value = jax.jit(jax.value_and_grad(lambda hidden: (weights * of_guesses(hidden)[0]).sum()))
    return *value(hidden), counts


PATHS = {
    "expected length": LossConfig(expected_length=True, chunk=5),
    "smoothed less, of total variation": LossConfig(0.1, 0.9, expected_length=True, smoothing=0.2, chunk=7),
    "after a wrong guess half": LossConfig(after_wrong=0.5, chunk=5),
    "after a wrong guess nothing, expected length": LossConfig(after_wrong=0.0, expected_length=True, chunk=256),
}
SLOW = ("expected length", "after a wrong guess half")  # parts of the others


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in PATHS])
def test_a_guess_is_weighed_by_the_others_of_its_path_as_path_by_path(name):
    """Half of the guesses are nearly the target's own, else a path would hardly ever go on after its first."""
    config, is_listed = PATHS[name], "wrong" in name
    _, target_hidden, head = inputs()
    own = jnp.stack([jnp.roll(target_hidden, -i, axis=1) for i in range(1, N + 1)])
    hidden = jnp.where(normal(9, N, B, T, 1) > 0, own + 0.1 * normal(0, N, B, T, H), normal(3, N, B, T, H))
    ids = jnp.asarray([0, 1, 3, 4, 6, 8, 9, 11, 12, 15, 17, 18]) if is_listed else None
    places = jnp.asarray(POSITIONS), *select_positions(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), 1.0, KEY)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def fast(hidden):
        return level_loss(list(hidden) if is_listed else hidden, target_hidden, *places, head, ids, config)

    (loss, metrics), gradient = fast(hidden)
    tokens = jnp.arange(V) if ids is None else ids
    expected, slow_gradient, counts = slow_path_loss(hidden, target_hidden, pairs_that_count(), head, tokens, config)
    assert metrics.count.tolist() == counts and counts[-1] > 1
    np.testing.assert_allclose(loss, expected, **CLOSE)
    np.testing.assert_allclose(gradient, slow_gradient, **CLOSE)


def test_sums_over_paths_are_of_leading_right_guesses_and_of_products_of_acceptances():
    """A guess after one that does not count is not looked at."""
    _, target_hidden, head = inputs()
    own = jnp.stack([jnp.roll(target_hidden, -i, axis=1) for i in range(1, N + 1)])
    hidden = jnp.where(normal(9, N, B, T, 1) > 0, own + 0.1 * normal(0, N, B, T, H), normal(3, N, B, T, H))
    places = jnp.asarray(POSITIONS), *select_positions(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), 1.0, KEY)
    found = jax.jit(losses.path_sums, static_argnums=7)(hidden, target_hidden, *places, head, None, LossConfig(chunk=5))
    p, q = (np.asarray(jax.nn.softmax(x @ head.T)) for x in (own, hidden))
    hit, accepted = p.argmax(-1) == q.argmax(-1), np.minimum(p, q).sum(-1)
    count, hits, overlap, run, length = np.zeros(N, int), np.zeros(N, int), np.zeros(N), 0, 0.0
    for b, t in np.ndindex(B, T):
        still, product = 1, 1.0
        for i in range(N):
            if (b, t + i + 1) not in pairs_that_count() or POSITIONS[b, t + i + 1] <= i:
                break
            count[i], hits[i], overlap[i] = count[i] + 1, hits[i] + hit[i, b, t], overlap[i] + accepted[i, b, t]
            still, product = still * hit[i, b, t], product * accepted[i, b, t]
            run, length = run + still, length + product
    assert run > 3
    for ours, theirs in zip(found, (count, hits, overlap, run, length), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_weights_that_change_nothing_leave_the_plain_loss_bit_for_bit():
    """A smoothing of 1 takes every guess for accepted, and 1 after a wrong guess is no weight."""
    hidden, target_hidden, head = inputs()
    picked, real = select_positions(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), 1.0, KEY)

    def loss(config, done=0.0):
        args = target_hidden, jnp.asarray(POSITIONS), picked, real, head, None, config
        return jax.jit(jax.value_and_grad(lambda hidden: level_loss(hidden, *args, done=done)[0]))(hidden)

    plain = loss(LossConfig(chunk=5))
    for same in (LossConfig(chunk=5, after_wrong=1.0, smoothing=0.1), LossConfig(chunk=5, without_edges_end=0.5)):
        jax.tree.map(np.testing.assert_array_equal, loss(same), plain)
    jax.tree.map(np.testing.assert_array_equal, loss(LossConfig(chunk=5, tv_last=0.25), 0.74), plain)
    total_variation = LossConfig(cross_entropy=0.0, total_variation=1.0, chunk=5)
    jax.tree.map(np.testing.assert_array_equal, loss(LossConfig(chunk=5, tv_last=0.25), 0.75), loss(total_variation))


def test_the_weights_of_a_run_follow_the_share_of_its_steps_that_is_done():
    config = LossConfig(0.1, 0.9, without_edges=1.0, without_edges_end=0.2, curriculum=0.5, tv_last=0.2)
    found = [config.mix(done) for done in (0.0, 0.25, 0.5, 0.79, 0.8, 1.0)]
    np.testing.assert_allclose([m.without_edges for m in found], [1, 0.6, 0.2, 0.2, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose([m.whole for m in found], [0, 0.4, 0.8, 0.8, 0.8, 0.8], atol=1e-6)
    np.testing.assert_allclose([m.terms[0] for m in found], [0.1, 0.1, 0.1, 0.1, 0, 0])
    np.testing.assert_allclose([m.terms[1] for m in found], [0.9, 0.9, 0.9, 0.9, 1, 1])
    assert config.scheduled and not LossConfig(without_edges=0.3).scheduled


def test_stretches_of_positions_are_picked_so_that_most_paths_are_whole():
    """All but the first i - 1 guesses of level i in a stretch, at worst."""
    count = jax.jit(losses.counted_guesses, static_argnums=(3, 4))
    supervised, positions = jnp.ones((2, 512), bool), jnp.broadcast_to(jnp.arange(512), (2, 512))
    pick = jax.jit(select_positions, static_argnums=(2, 4))
    least = 1 - 4 / losses.span_of(512)
    for share in (0.5, 0.25):
        picked, real = pick(supervised, positions, share, KEY, losses.span_of(512))
        assert picked.shape == (2, round(512 * share)) and real.all() and (np.diff(picked, axis=1) > 0).all()
        whole, every = (count(picked, real, positions, 5, paths) for paths in (True, False))
        assert least < whole[4].sum() / every[4].sum() < 1 and (whole[0] == every[0]).all()


# --- forms of the input -----------------------------------------------------------------------------------------


def test_a_stack_and_a_list_of_levels_have_one_loss_and_gradient():
    hidden, target_hidden, head = inputs()
    picked, real = select_positions(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), 1.0, jax.random.key(0))

    @jax.jit
    @jax.value_and_grad
    def loss(hidden):
        positions = jnp.asarray(POSITIONS)
        return level_loss(hidden, target_hidden, positions, picked, real, head, None, LossConfig(chunk=7))[0]

    stacked, gradient = loss(hidden)
    listed, gradients = loss(list(hidden))
    np.testing.assert_allclose(stacked, listed, **CLOSE)
    np.testing.assert_allclose(gradient, jnp.stack(gradients), **CLOSE)


def test_a_level_counts_the_positions_whose_segment_reaches_back_far_enough():
    hidden, target_hidden, head = inputs()
    picked, real = select_positions(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), 1.0, jax.random.key(0))
    args = (hidden, target_hidden, jnp.asarray(POSITIONS), picked, real, head, None, LossConfig())
    expected = [sum(POSITIONS[pair] >= i for pair in pairs_that_count()) for i in (1, 2, 3)]
    assert expected[0] > expected[1] > expected[2]
    assert jax.jit(level_loss, static_argnums=7)(*args)[1].count.tolist() == expected


def test_the_first_choice_is_in_the_draft_vocabulary_however_the_two_products_round(monkeypatch):
    """Maxima of the head's product and of its draft rows' were compared: one bit less in the second, and no first
    choice was a hit or, with `within_draft`, counted."""
    hidden, target_hidden, head = inputs()
    picked, real = select_positions(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), 1.0, jax.random.key(0))
    ids, exact = jnp.arange(V - 1), losses.head_logits
    monkeypatch.setattr(losses, "head_logits", lambda h, rows, *_: exact(h, rows) - jnp.where(len(rows) < V, 1e-5, 0.0))
    args = (target_hidden, jnp.asarray(POSITIONS), picked, real, head, ids, LossConfig(within_draft=True))
    hidden = jnp.roll(target_hidden, -1, axis=1)[None]  # level 1 at s - 1 says what the target says at s
    loss, metrics = jax.jit(lambda hidden: level_loss(hidden, *args))(hidden)
    first = np.array([int(jnp.argmax(target_hidden[pair] @ head.T)) for pair in pairs_that_count()])
    assert (first < V - 1).mean() > 0.5
    np.testing.assert_allclose(metrics.accuracy[0], (first < V - 1).mean(), rtol=1e-6)
    assert loss > 0


def test_acceptance_is_by_the_targets_probabilities_whatever_the_loss_compares():
    """Renormalised over the draft vocabulary, p would count the mass outside of it as accepted."""
    hidden, target_hidden, head = inputs()
    picked, real = select_positions(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), 1.0, jax.random.key(0))
    ids, size = jnp.arange(V // 2), V // 2

    @functools.partial(jax.jit, static_argnums=0)
    def acceptance(within):
        config = LossConfig(within_draft=within)
        args = target_hidden, jnp.asarray(POSITIONS), picked, real, head, ids, config
        return level_loss(hidden, *args)[1].acceptance

    within, whole = acceptance(True), acceptance(False)
    np.testing.assert_allclose(within, whole, **CLOSE)
    p = jax.nn.softmax(target_hidden @ head.T, axis=-1)[..., :size]
    assert p.sum(axis=-1).mean() < 0.9 and float(whole.max()) < float(p.sum(axis=-1).max())


def test_a_packed_rows_loss_is_that_of_its_segments_apart():
    """Levels are means over positions, so with one level the segments' losses add up by their counts."""
    hidden, target_hidden, head = inputs()
    config = LossConfig(chunk=4)

    @jax.jit
    def loss(supervised):
        picked, real = select_positions(supervised, jnp.asarray(POSITIONS), 1.0, jax.random.key(0))
        positions = jnp.asarray(POSITIONS)
        return level_loss(hidden[:1], target_hidden, positions, picked, real, head, None, config)

    whole, metrics = loss(jnp.asarray(SUPERVISED))
    apart = []
    for row, segment in ((0, 1), (0, 2), (1, 1)):
        here = np.zeros((B, T), bool)
        here[row] = SEGMENTS[row] == segment
        apart.append(loss(jnp.asarray(SUPERVISED & here)))
    counts = np.array([m.count[0] for _, m in apart])
    assert counts.sum() == metrics.count[0] and (counts > 0).all()
    np.testing.assert_allclose(whole, (counts * np.array([x for x, _ in apart])).sum() / counts.sum(), **CLOSE)


def test_other_segments_and_unsupervised_positions_get_no_gradient():
    hidden, target_hidden, head = inputs()
    picked, real = select_positions(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), 1.0, jax.random.key(0))

    def loss(hidden):
        args = (target_hidden, jnp.asarray(POSITIONS), picked, real, head, None, LossConfig())
        return level_loss(hidden, *args)[0]

    moved = np.abs(jax.jit(jax.grad(loss))(hidden)).max(axis=-1) > 0  # [N, B, T]
    expected = np.zeros((N, B, T), bool)
    for b, s in pairs_that_count():
        for i in range(1, min(N, POSITIONS[b, s]) + 1):
            expected[i - 1, b, s - i] = True
    np.testing.assert_array_equal(moved, expected)


def test_nothing_selected_means_no_loss_and_no_gradient():
    hidden, target_hidden, head = inputs()
    picked, real = select_positions(jnp.zeros((B, T), bool), jnp.asarray(POSITIONS), 1.0, jax.random.key(0))

    def loss(hidden):
        args = (target_hidden, jnp.asarray(POSITIONS), picked, real, head, None, LossConfig())
        return level_loss(hidden, *args)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(hidden)
    assert value == 0 and not gradient.any() and not real.any()


@pytest.mark.parametrize("trained", [False, True], ids=["the target's head", "its own"])
def test_under_bfloat16_heads_all_products_are_of_bfloat16_backwards_too(trained):
    hidden, target_hidden, head = inputs()
    picked, real = select_positions(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), 1.0, jax.random.key(0))

    def loss(hidden, own):
        heads = (head.astype(jnp.bfloat16), None, LossConfig(), own if trained else None)
        return level_loss(hidden, target_hidden, jnp.asarray(POSITIONS), picked, real, *heads)[0]

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head.astype(jnp.bfloat16)).as_text()
    operands = re.findall(r"dot_general .*: \(tensor<([^>]*)>, tensor<([^>]*)>\)", program)
    assert len(operands) >= 3 + trained  # of the target and a level; backwards to its state, and to its head
    assert all(part.endswith("xbf16") for pair in operands for part in pair), operands


# --- which positions --------------------------------------------------------------------------------------------

select = jax.jit(select_positions, static_argnums=2)


def pairs_of(picked, real) -> list[tuple[int, int]]:
    """(row, position) of what `select` returned, in its order."""
    return [(int(b), int(picked[b, j])) for b, j in zip(*np.nonzero(real), strict=True)]


def test_all_positions_that_count_are_selected_once_where_the_share_is_large_enough():
    for share in (1.0, 0.75):
        picked, real = select(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), share, jax.random.key(0))
        assert picked.shape == (B, round(share * T))
        assert pairs_of(picked, real) == pairs_that_count()


def test_a_small_share_is_a_new_subset_for_every_key_and_every_position_gets_its_turn():
    expected = set(pairs_that_count())
    seen: set[tuple[int, int]] = set()
    subsets = set()
    for seed in range(40):
        picked, real = select(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), 0.25, jax.random.key(seed))
        assert picked.shape == (B, 3) and real.all()
        chosen = pairs_of(picked, real)
        assert len(set(chosen)) == 6 and set(chosen) <= expected
        seen |= set(chosen)
        subsets.add(tuple(chosen))
    assert seen == expected and len(subsets) > 30
    again = select(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), 0.25, jax.random.key(39))[0]
    np.testing.assert_array_equal(again, picked)


def test_stretches_hold_what_counts_and_the_stream_positions_before_it():
    span, seen = 4, set()
    select = jax.jit(select_positions, static_argnums=(2, 4))
    for seed in range(20):
        picked, real = select(jnp.asarray(SUPERVISED), jnp.asarray(POSITIONS), 0.6, jax.random.key(seed), span)
        assert picked.shape == (B, 8)
        np.testing.assert_array_equal(picked % span, np.tile(np.arange(span), (B, 2)))
        seen |= set(pairs_of(picked, real))
        at, places = stretches_read(picked, span, N)
        assert at.shape == (B, 2 * (span + N - 1))
        for level, place in enumerate(places, 1):
            np.testing.assert_array_equal(np.take_along_axis(at, place, 1), np.maximum(picked - level, 0))
    assert seen == set(pairs_that_count())


# --- memory -----------------------------------------------------------------------------------------------------


def temporaries(num_tokens: int, vocab: int, chunk: int) -> int:
    """Bytes that the compiled gradient needs besides its arguments and result."""

    def loss(hidden, target_hidden, head):
        positions = jnp.arange(num_tokens)[None]
        picked, real = select_positions(jnp.ones(positions.shape, bool), positions, 1.0, jax.random.key(0))
        config = LossConfig(chunk=chunk)
        return level_loss(hidden, target_hidden, positions, picked, real, head, None, config)[0]

    shape = jax.ShapeDtypeStruct
    hidden, target = shape((N, 1, num_tokens, H), jnp.float32), shape((1, num_tokens, H), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(hidden, target, shape((vocab, H), jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """From 1024 to 2048 tokens, one float32 [T, V] more would be 16 MiB; hidden states of all levels are 0.1 MiB."""
    vocab, one_more = 4096, 1024 * 4096 * 4
    few, many = temporaries(1024, vocab, chunk=64), temporaries(2048, vocab, chunk=64)
    assert many - few < one_more / 16
    assert few < one_more / 2  # a few [C, V] of 1 MiB each
    assert temporaries(1024, vocab, chunk=1024) > one_more  # what is measured does see such arrays


@pytest.mark.parametrize(
    "bad",
    [dict(share=0.0), dict(share=1.1), dict(chunk=0), dict(tv_last=1.5), dict(after_wrong=-1), dict(smoothing=2)],
    ids=str,
)
def test_a_bad_loss_setting_is_a_user_error(bad):
    ((name, value),) = bad.items()
    with pytest.raises(UserError, match=f"loss {name} is {value}"):
        LossConfig(**bad)


def test_loss_settings_that_do_not_combine_are_a_user_error():
    with pytest.raises(UserError, match="expected_length weighs all levels and last_level_only one"):
        LossConfig(expected_length=True, last_level_only=True)
    with pytest.raises(UserError, match="without_edges is 2: with a curriculum it is a share"):
        LossConfig(without_edges=2, curriculum=0.5)
    with pytest.raises(UserError, match="loss expected_length, tv_last cannot be used with loss.deepkd"):
        LossConfig(expected_length=True, tv_last=0.2, deepkd=DeepKD())
