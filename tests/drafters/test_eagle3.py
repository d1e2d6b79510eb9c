"""EAGLE-3 against a slow version that runs one position at a time and grows its tree with lists."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fasteagle_jax.data.packing import Batch
from fasteagle_jax.decoding.interfaces import Accepted, Ranking
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.tree import MAX_CANDIDATES, TreeSpec
from fasteagle_jax.drafters.eagle3 import Eagle3
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.nn import packed_attention as packed
from fasteagle_jax.nn.linear import LogitMap
from fasteagle_jax.nn.packed_attention import Packed
from fasteagle_jax.nn.rope import rotate, rotation
from fasteagle_jax.training.losses import LossConfig
from fasteagle_jax.training.step import drafter_loss
from tests.tiny_models import tiny_config, tiny_target

IN_BLOCKS = packed.in_blocks

T, N, V, D, K, G = 9, 4, 40, 8, 2, 2
IDS = np.sort(np.random.default_rng(0).permutation(V)[:17]).astype(np.int32)
CLOSE = dict(rtol=1e-4, atol=1e-5)  # float32, sums in another order


@pytest.fixture(scope="module")
def drafter() -> Eagle3:
    return make_eagle3()


def make_eagle3(**changes) -> Eagle3:
    sizes = {"num_levels": N, "feature_layers": (1, 3), "draft_vocab_size": len(IDS)}
    config = default_config(tiny_config(), kind="eagle3", **sizes, **changes)

    def make() -> Eagle3:
        made = Eagle3(config, jax.random.key(4))
        more = [*made.fc_norms, *([made.input_norm] if made.input_norm else [])]
        for i, norm in enumerate((made.embedding_norm, made.hidden_norm, made.mlp_norm, made.norm, *more)):
            norm.weight[...] += 0.2 * jax.random.normal(jax.random.key(i), norm.weight.shape)
        made.feature_scale[...] = jnp.linspace(0.5, 2.0, made.feature_scale[...].size)
        made.head[...] = made.head[...] * 3
        return made

    made = jax.jit(make)()
    made.token_ids[...] = jnp.asarray(IDS)
    return made


def test_its_head_starts_with_the_targets_scale_of_logits(monkeypatch):
    target = tiny_target(num_layers=3)
    monkeypatch.setattr(type(target), "logit_map", LogitMap(scale=0.125))
    made = Eagle3(default_config(target.config, kind="eagle3"), jax.random.key(0))
    made.start_from(target, jnp.ones(3), layers=False)
    np.testing.assert_allclose(made.head[...], 0.125 * target.head_rows(), rtol=1e-6)


@pytest.fixture(scope="module")
def target():
    return tiny_target(num_layers=3)


@pytest.fixture(scope="module")
def stream(target):
    """A text x[0..T] and the target's features of x[0..T-1]."""
    tokens = jax.random.randint(jax.random.key(5), (1, T + 1), 0, V)
    causal = jnp.tril(jnp.ones((T, T), bool))[None]
    features = jax.jit(lambda: target(tokens[:, :-1], jnp.arange(T)[None], causal, None, (1, 3)).features)()
    return np.asarray(tokens[0]), np.asarray(features[0])


def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()


class Slow:
    """One position at a time, in NumPy."""

    def __init__(self, drafter, embedding, features, tokens):
        norms = ("embedding_norm", "hidden_norm", "mlp_norm", "norm")
        self.w = {name: np.asarray(getattr(drafter, name).weight[...]) for name in norms}
        for part, names in ((drafter.attention, "qkvo"), (drafter.mlp, ("gate", "up", "down"))):
            self.w |= {name: np.asarray(getattr(part, name).matrix) for name in names}
        self.w["head"] = np.asarray(drafter.head[...])
        self.config, self.embedding = drafter.config, np.asarray(embedding)
        if drafter.config.norm_before_fc:
            self.w["input"] = np.asarray(drafter.input_norm.weight[...])
            features = np.stack([self.norm(x, "input") for x in features])
        if drafter.config.fc_norm:
            self.w |= {i: np.asarray(norm.weight[...]) for i, norm in enumerate(drafter.fc_norms)}
            each = np.split(features, len(drafter.fc_norms), axis=1)
            features = np.concatenate([[self.norm(x, i) for x in part] for i, part in enumerate(each)], axis=1)
        self.g = (features * np.asarray(drafter.feature_scale[...])) @ np.asarray(drafter.fc.weight[...])
        self.outputs = {}  # what `along` returned
        # Run 0 at every position, on features.
        self.first = []
        for t in range(len(features)):
            self.first.append(self.layer(self.g[t], tokens[t + 1], t, [kv for kv, _ in self.first]))

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean() + self.config.rms_norm_eps) * self.w[name]

    def turned(self, x, position):
        """Heads [heads, D] with channels d and d + D/2 as one complex number each, turned."""
        turn = np.exp(1j * position * self.config.rope.theta ** (-np.arange(0, D, 2) / D))
        pairs = (x[:, : D // 2] + 1j * x[:, D // 2 :]) * turn
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    def layer(self, h, token, position, seen):
        """((k, v), output) of one token after the (k, v) that it sees."""
        x = np.concatenate([self.norm(self.embedding[token], "embedding_norm"), self.norm(h, "hidden_norm")])
        q, k = (self.turned((x @ self.w[n]).reshape(-1, D), position) for n in ("q", "k"))
        v = (x @ self.w["v"]).reshape(K, D)
        keys, values = np.stack([*(k for k, _ in seen), k]), np.stack([*(v for _, v in seen), v])
        out = [softmax(keys[:, i // G] @ q[i] / D**0.5) @ values[:, i // G] for i in range(K * G)]
        h = self.norm(h, "hidden_norm") if self.config.norm_before_residual else h
        h = h + np.concatenate(out) @ self.w["o"]
        y = self.norm(h, "mlp_norm")
        gate = y @ self.w["gate"]
        h = h + (gate / (1 + np.exp(-gate)) * (y @ self.w["up"])) @ self.w["down"]
        return (k, v), self.norm(h, "norm") if self.config.norm_output else h

    def along(self, t, path):
        """The layer's output after run 0 at t and one run for each token of a path of guesses, and the (k, v) seen."""
        if not path:
            return self.first[t][1], [kv for kv, _ in self.first[: t + 1]]
        if (t, path) not in self.outputs:
            h, seen = self.along(t, path[:-1])
            kv, h = self.layer(h, path[-1], t + len(path), seen)
            self.outputs[t, path] = h, [*seen, kv]
        return self.outputs[t, path]

    def log_q(self, t, path):
        h = self.along(t, path)[0]
        return np.log(softmax(self.w["head"] @ (h if self.config.norm_output else self.norm(h, "norm"))))


@pytest.fixture(scope="module")
def slow(drafter, target, stream):
    return Slow(drafter, target.embedding[...], stream[1], stream[0])


def test_training_time_test_is_the_path_of_true_tokens_at_every_position(drafter, target, stream, slow):
    tokens, features = stream
    causal = jnp.tril(jnp.ones((T, T), bool))[None]
    states, _ = jax.jit(lambda m, e: m.hidden_states(e, features[None], tokens[None, 1:], jnp.arange(T)[None], causal))(
        drafter, target.embedding[...]
    )
    for level, t in itertools.product(range(N), range(T)):
        if t + 1 + level > T:  # the true token is past the end
            continue
        expected = slow.norm(slow.along(t, tuple(tokens[t + 2 : t + 2 + level]))[0], "norm")
        np.testing.assert_allclose(states[level][0, t], expected, **CLOSE)


SEGMENTS = np.array([1] * 5 + [2] * 7 + [0])  # two texts in a row, and padding
POSITIONS = np.array([*range(5), *range(7), 0])
SUPERVISED = np.array([0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0], bool)


def slow_loss(weights, norms, scale, target, tokens):
    """Training-time test by one mask over the keys of all runs, and a loss that goes from guess to guess."""
    num, tokens = len(tokens), np.asarray(tokens)
    seen = np.array([[SEGMENTS[t] == SEGMENTS[s] and s <= t for s in range(num)] for t in range(num)])
    out = target(tokens[None], jnp.asarray(POSITIONS)[None], jnp.asarray(seen)[None], None, (1, 3))
    full = out.hidden[0] @ target.head_rows().T  # [T, target's vocabulary]
    p, held = jax.nn.softmax(full[:, IDS]), jnp.isin(full.argmax(axis=1), jnp.asarray(IDS))

    def norm(x, name):
        return x / jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * norms[name]

    h = (out.features[0] * scale) @ weights["fc"]
    keys, values, losses = [], [], []
    for j in range(N):
        read = target.embedding[...][np.append(tokens, np.zeros(N, int))[1 + j : 1 + j + num]]
        x = jnp.concatenate([norm(read, "embedding_norm"), norm(h, "hidden_norm")], axis=1)
        turn = rotation(jnp.asarray(POSITIONS)[None] + j, tiny_config().rope, D)
        q, k = (rotate((x @ weights[n]).reshape(1, num, -1, D), turn)[0] for n in ("q", "k"))
        keys.append(k)
        values.append((x @ weights["v"]).reshape(num, K, D))
        mask = np.concatenate([seen, *[np.eye(num, dtype=bool)] * j], axis=1)  # [T, (j + 1) T]
        k, v = (jnp.repeat(jnp.concatenate(parts), G, axis=1) for parts in (keys, values))
        scores = jnp.where(mask, jnp.einsum("thd,shd->hts", q, k) / D**0.5, -jnp.inf)
        attended = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), v)
        h = h + attended.reshape(num, -1) @ weights["o"]
        y = norm(h, "mlp_norm")
        h = h + (jax.nn.silu(y @ weights["gate"]) * (y @ weights["up"])) @ weights["down"]

        log_q = jax.nn.log_softmax(norm(h, "norm") @ weights["head"].T)
        terms = []
        for t in range(num):
            s = t + 1 + j  # where the target's own distribution of the guessed token is
            if s + 1 < num and SEGMENTS[s + 1] == SEGMENTS[t] != 0 and SUPERVISED[s + 1]:
                terms.append(jnp.where(held[s], -(p[s] * log_q[t]).sum(), 0))
        losses.append(sum(terms) / len(terms))
    shares = [0.8**j for j in range(N)]
    return sum(share * loss for share, loss in zip(shares, losses, strict=True)) / sum(shares)


def test_the_loss_and_its_gradients_are_those_of_one_mask_over_all_runs(drafter, target):
    tokens = np.random.default_rng(1).integers(V, size=len(SEGMENTS))
    batch = Batch(*(jnp.asarray(x)[None] for x in (tokens, POSITIONS, SEGMENTS, SUPERVISED)))
    graph, params, rest = nnx.split(drafter, nnx.Param, ...)
    config = LossConfig(within_draft=True, chunk=5)

    def loss(params, target):
        return drafter_loss(nnx.merge(graph, params, rest), target, batch, jax.random.key(0), config)[0]

    found, gradient = jax.jit(jax.value_and_grad(loss))(params, target)

    def by_name(parts):  # of the drafter, or of the gradient in its form
        norms = {n: parts[n]["weight"][...] for n in ("embedding_norm", "hidden_norm", "mlp_norm", "norm")}
        weights = {"fc": parts["fc"]["weight"][...], "head": parts["head"][...]}
        weights |= {n: parts["attention"][n]["weight"][...] for n in "qkvo"}
        return norms, weights | {n: parts["mlp"][n]["weight"][...] for n in ("gate", "up", "down")}

    norms, weights = by_name(params)
    slow = jax.jit(jax.value_and_grad(slow_loss, argnums=(0, 1)), static_argnums=4)
    expected, gradients = slow(weights, norms, drafter.feature_scale[...], target, tuple(tokens.tolist()))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    found_norms, found_weights = by_name(gradient)
    for name, value in (gradients[0] | gradients[1]).items():
        assert np.abs(value).max() > 1e-3
        actual = (found_norms | found_weights)[name]
        np.testing.assert_allclose(actual, value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow  # in short: tests/nn/test_packed_attention.py
def test_queries_in_tiles_and_in_blocks_are_queries_at_once(drafter, target, stream, monkeypatch):
    tokens, features = stream
    segments = jnp.asarray([[1] * 5 + [2] * 4])

    graph, params, rest = nnx.split(drafter, nnx.Param, ...)

    def loss(params, embedding):
        args = features[None], tokens[None, 1:], jnp.arange(T)[None], Packed(segments)
        states = jnp.stack(nnx.merge(graph, params, rest).hidden_states(embedding, *args)[0])
        return (states * jnp.cos(jnp.arange(states.size)).reshape(states.shape)).sum(), states

    def with_gradients(*args):
        return jax.value_and_grad(loss, has_aux=True)(*args)

    once = jax.jit(with_gradients)(params, target.embedding[...])
    for tile, block in ((3, T), (T, 3)):  # side by side, and in a loop
        monkeypatch.setattr(packed, "TILE", tile)
        monkeypatch.setattr(packed, "in_blocks", functools.partial(IN_BLOCKS, block=block))
        split = jax.jit(lambda *args: with_gradients(*args))(params, target.embedding[...])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), split, once)


FAST_TREES = (("chain", True), ("backbone:3", False), ("best_first:30", True))  # of each kind, of each form


def slow_tree(slow, t, root, tree: TreeSpec) -> set[tuple[int, ...]]:
    """The paths of a tree's nodes."""
    frontier, width = (1, 1) if tree.kind == "chain" else (1, tree.width)
    if tree.kind == "best_first":
        frontier = width = min(MAX_CANDIDATES, tree.nodes - 1)
    nodes, scored = [((), 0.0)], []
    for _ in range(N):
        candidates = []
        for path, score in nodes:
            log_q = slow.log_q(t, path)
            for i in np.argsort(-log_q, kind="stable")[:width]:
                candidates.append(((*path, int(IDS[i])), score + float(log_q[i])))
        scored += candidates
        nodes = sorted(candidates, key=lambda c: -c[1])[:frontier]
    most = tree.nodes - 1 if tree.kind == "best_first" else len(scored)
    return {path for path, _ in sorted(scored, key=lambda c: -c[1])[:most]}


@pytest.mark.parametrize(
    ("tree", "stacked"),
    [
        pytest.param(tree, stacked, marks=[pytest.mark.slow] * ((tree, stacked) not in FAST_TREES))
        for tree in ("chain", "backbone:3", "best_first:6", "best_first:30")
        for stacked in (True, False)
    ],
)
def test_drafts_are_those_of_the_slow_version_step_by_step(drafter, target, stream, slow, tree, stacked):
    tokens, features = stream
    tree, vocab = TreeSpec.parse(tree), drafter.vocab_weights(target)
    drafter.stacked = stacked
    cache, at = drafter.empty_cache(1, T + 8, 4), 0
    draft = jax.jit(lambda new, cache: drafter.draft(vocab, new, cache, tree, Ranking(make_sampling(1), True)))
    for count in (3, 1, 4, 1):
        index = np.minimum(at + np.arange(4), T - 1)
        new = Accepted(jnp.asarray(features[index])[None], jnp.asarray(tokens[index + 1])[None], jnp.asarray([count]))
        made, cache = draft(new, cache)
        at += count
        drafts, parents, depths, scores = (np.asarray(part)[0].tolist() for part in made)
        assert (drafts[0], parents[0], depths[0], scores[0]) == (tokens[at], -1, 0, 0)
        paths = {0: ()}
        for node in range(1, len(drafts)):
            assert parents[node] < node and depths[node] == depths[parents[node]] + 1
            assert scores[node] < scores[parents[node]]
            paths[node] = (*paths[parents[node]], drafts[node])
        assert set(paths.values()) - {()} == slow_tree(slow, at - 1, tokens[at], tree)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_before_residual": True, "fc_norm": True, "norm_output": True},
        pytest.param({"norm_before_fc": True}, marks=pytest.mark.slow),
    ],
    ids=["3.1", "one norm"],
)
def test_with_the_norms_of_published_drafters_drafts_are_the_slow_versions(target, stream, changes):
    """Training's states are compared with those of speculators in test_speculators.py."""
    changed = make_eagle3(**changes)
    slow = Slow(changed, target.embedding[...], stream[1], stream[0])
    test_drafts_are_those_of_the_slow_version_step_by_step(changed, target, stream, slow, "best_first:6", False)
