"""A target with experts out of a dense one: its MLPs' neurons in groups, of which a router picks some for each token.

n tokens · E experts · k experts of a token · I neurons of an MLP · H hidden width · B rows · T tokens of a row.
Neurons that fire together on the model's own text become an expert (cf. MoEfication, arXiv 2110.01786), a router is
fitted to what each expert would add, and the whole is distilled from the dense model. What comes out is a Mixtral.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fasteagle_jax.data.packing import Batch
from fasteagle_jax.nn.linear import head_logits, to_columns
from fasteagle_jax.nn.mlp import Mlp
from fasteagle_jax.nn.moe import Router, SparseMlp, choose_experts
from fasteagle_jax.nn.packed_attention import Packed
from fasteagle_jax.nn.stored import stored_tensors
from fasteagle_jax.nn.transformer import DECODER_LAYER_NAMES, LayerKinds
from fasteagle_jax.training.losses import select_positions

ITERATIONS = 10  # of the grouping
RIDGE = 1e-2  # of the routers' fit, relative to the mean square of their inputs
# Parts of a layer by Mixtral's names, but for experts: name in the file, and place in a layer.
_OUTSIDE_EXPERTS = {name: place for name, place in DECODER_LAYER_NAMES.items() if not name.startswith("mlp.")}
_OUTSIDE_EXPERTS |= {"block_sparse_moe.gate": "mlp.router"}
FIRST_SPREAD = 0.1  # standard deviation of a fitted router's scores: a token's experts then weigh almost alike


class GroupedMlp(nnx.Module):
    """An Mlp whose neurons are E groups in a row, of which a token has the k that the router scores highest.

    It computes all neurons, and is what `SparseMlp` is with the same groups as experts of k times the output.
    """

    def __init__(self, mlp: Mlp, router: Router, num_chosen: int):
        self.mlp, self.router, self.num_chosen = mlp, router, num_chosen

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., H] of x [..., H]."""
        weights = self.weights(x)[..., None]  # [..., E, 1]
        neurons = self.mlp.neurons(x)
        groups = neurons.reshape(*neurons.shape[:-1], weights.shape[-2], -1)  # [..., E, I / E]
        return self.mlp.down((groups * weights).astype(x.dtype).reshape(neurons.shape))

    def weights(self, x: jax.Array) -> jax.Array:
        """Of each group for x [..., H], float32 [..., E]: k times what `SparseMlp` gives those chosen, 0 of others."""
        scores = self.router(x)
        chosen, weights = choose_experts(scores, self.num_chosen, renormalised=True)
        of_groups = jax.nn.one_hot(chosen, scores.shape[-1]) * weights[..., None]  # [..., k, E]
        return self.num_chosen * of_groups.sum(axis=-2)


# --- groups and routers -----------------------------------------------------------------------------------------


def hidden_and_mlp_inputs(model: Any, batch: Batch) -> tuple[jax.Array, list[jax.Array]]:
    """The final hidden states of a packed batch [B, T, H], and what each layer's MLP reads, [B, T, H].

    Of a Llama, its student or a Mixtral, whose layers are a list.
    """
    c = model.config
    attend = Packed(batch.segments)
    kinds = LayerKinds(c.layer_kinds, batch.positions, c.head_dim, stacked=False)
    x, inputs = model.embed(batch.tokens), []
    for layer, number in zip(model.layers, kinds.numbers, strict=True):
        context = kinds.of(number)
        x, _ = layer.attended(x, context.rotation, context.attend(attend, None))
        inputs.append(layer.mlp_norm(x))
        x = x + layer.mlp(inputs[-1])
    return model.norm(x), inputs


def grouped(mlp: Mlp, x: jax.Array, num_experts: int, num_chosen: int, seed: int) -> GroupedMlp:
    """The GroupedMlp of an Mlp whose width E divides, fitted to inputs x [n, H]."""
    neurons = mlp.neurons(x).astype(jnp.float32)  # [n, I]
    down = mlp.down.matrix.astype(jnp.float32)  # [I, H]
    activity = np.asarray(jnp.abs(neurons) * jnp.linalg.norm(down, axis=1))
    order = balanced_groups(activity, num_experts, seed)
    permuted = nnx.merge(*nnx.split(mlp))
    for linear in (permuted.gate, permuted.up):
        linear.set_matrix(linear.matrix[:, order])
    permuted.down.set_matrix(permuted.down.matrix[order])
    added = jnp.einsum(
        "nei,eih->neh",
        neurons[:, order].reshape(len(x), num_experts, -1),
        down[order].reshape(num_experts, -1, down.shape[1]),
    )
    router = Router(x.shape[-1], num_experts, ("embed", None))
    router.set_matrix(fitted_router(x, jnp.linalg.norm(added, axis=-1)))
    return GroupedMlp(permuted, router, num_chosen)


def balanced_groups(activity: np.ndarray, num_groups: int, seed: int) -> np.ndarray:
    """An order int [I] of neurons in which E groups of equal size stand one after the other.

    `activity` [n, I] is how much each neuron adds at each token. By k-means of their directions, in which the most
    similar pairs of a neuron and a centre are joined first, as long as there is room.
    """
    rows = activity.T / np.maximum(np.linalg.norm(activity, axis=0)[:, None], 1e-12)  # [I, n]
    size = len(rows) // num_groups
    centres = rows[np.random.default_rng(seed).choice(len(rows), num_groups, replace=False)]
    group = np.full(len(rows), -1)
    for _ in range(ITERATIONS):
        similar = rows @ centres.T  # [I, E]
        group, room = np.full(len(rows), -1), np.full(num_groups, size)
        for pair in np.argsort(-similar, axis=None, kind="stable"):
            neuron, to = divmod(int(pair), num_groups)
            if group[neuron] < 0 and room[to]:
                group[neuron], room[to] = to, room[to] - 1
        sums = np.stack([rows[group == g].sum(axis=0) for g in range(num_groups)])
        centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return np.argsort(group, kind="stable")


def fitted_router(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """The matrix float32 [H, E] whose scores of x [n, H] follow what experts add, `sizes` [n, E], by ridge regression.

    Scores have the spread FIRST_SPREAD.
    """
    x, product = x.astype(jnp.float32), functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    square = product(x.T, x) / len(x)
    ridge = RIDGE * jnp.trace(square) / len(square) * jnp.eye(len(square))
    # Of what each expert adds more than it does on the mean: else the largest would always be chosen.
    matrix = jnp.linalg.solve(square + ridge, product(x.T, sizes - sizes.mean(axis=0)) / len(x))
    return matrix * FIRST_SPREAD / jnp.maximum(jnp.std(product(x, matrix)), 1e-12)


def sparsified(target: Any, batch: Batch, num_experts: int, num_chosen: int, seed: int) -> Any:
    """A copy of a target, its layers a list, with GroupedMlps that are fitted to a packed batch."""
    real = np.asarray(batch.segments) > 0
    graph, state = nnx.split(target)
    student = nnx.merge(graph, jax.tree.map(jnp.copy, state))  # steps take its arrays over
    _, inputs = jax.jit(hidden_and_mlp_inputs)(target, batch)
    for i, (layer, x) in enumerate(zip(student.layers, inputs, strict=True)):
        layer.mlp = grouped(layer.mlp, x[real], num_experts, num_chosen, seed + i)
    to_columns(student)  # rows are for decoding
    return student


# --- distillation -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How the student learns."""

    share: float = 0.5  # of a row's positions that a step looks at
    balance: float = 0.01  # weight of the loss that keeps experts equally used (Switch, arXiv 2101.03961, eq. 4)
    dtype: str = "bfloat16"  # of the products


class Quality(NamedTuple):
    """Of texts: sums over positions."""

    count: jax.Array  # type: ignore[assignment]  # int32 []
    loss: jax.Array  # float32 [], -log of the probability of the text's next token
    hits: jax.Array  # int32 [], positions where the most probable token is the dense model's

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return float(np.exp(float(self.loss) / max(int(self.count), 1)))


def is_trained(path: tuple[Any, ...], value: Any) -> bool:
    """Whether the distillation changes a variable of a student: those of its layers."""
    return isinstance(value, nnx.Variable) and path[0] == "layers"


def in_dtype(params: Any, dtype: Any) -> Any:
    """Parameters with their matrices in `dtype`, but for routers and vectors."""

    def cast(path: Any, value: jax.Array) -> jax.Array:
        kept = value.ndim < 2 or any(getattr(part, "key", None) == "router" for part in path)
        return value if kept else value.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def make_distil_step(
    graph: Any, optimizer: optax.GradientTransformation, config: Distillation, seed: int
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """A compiled step: (params, optimizer state, rest, target, batch, step) -> (params, optimizer state, losses [2]).

    `graph`, `params` and `rest` are of nnx.split(student, is_trained, ...); the losses are the mean divergence from the
    target's distributions, over its whole vocabulary, and that of balance.
    """

    def loss_of(params: Any, rest: Any, target: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        student = nnx.merge(graph, in_dtype(params, jnp.dtype(config.dtype)), rest)
        picked, real = select_positions(batch.supervised, batch.positions, config.share, key)
        hidden, inputs = hidden_and_mlp_inputs(student, batch)
        balance = _balance(student, inputs, batch)
        dense = target(batch.tokens, batch.positions, Packed(batch.segments)).hidden

        def log_probabilities(hidden: jax.Array) -> jax.Array:
            at = jnp.take_along_axis(hidden, picked[..., None], axis=1)
            logits = target.logit_map(head_logits(at, target.head_rows()))
            return jax.nn.log_softmax(logits, axis=-1)  # [B, S, V]

        theirs = jax.lax.stop_gradient(log_probabilities(dense))
        apart = (jnp.exp(theirs) * (theirs - log_probabilities(hidden))).sum(axis=-1)
        divergence = jnp.where(real, apart, 0).sum() / jnp.maximum(real.sum(), 1)
        return divergence + config.balance * balance, jnp.stack([divergence, balance])

    def step(
        params: Any, state: Any, rest: Any, target: Any, batch: Batch, number: jax.Array
    ) -> tuple[Any, Any, jax.Array]:
        key = jax.random.fold_in(jax.random.key(seed), number)
        gradients, losses = jax.grad(loss_of, has_aux=True)(params, rest, target, batch, key)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, losses

    return jax.jit(step, donate_argnums=(0, 1))


def _balance(student: Any, inputs: list[jax.Array], batch: Batch) -> jax.Array:
    """The mean over layers of E sum_e f_e P_e, of what their MLPs read.

    f_e is the share of an expert among those chosen, P_e its mean probability by the router.
    """
    real = (batch.segments > 0)[..., None]
    total = jnp.float32(0)
    for layer, x in zip(student.layers, inputs, strict=True):
        chosen = jnp.where(real, layer.mlp.weights(x) > 0, False).sum(axis=(0, 1))  # [E]
        probability = jnp.where(real, jax.nn.softmax(layer.mlp.router(x)), 0).sum(axis=(0, 1)) / real.sum()
        total += len(chosen) * (chosen / chosen.sum() * probability).sum()
    return total / len(inputs)


def quality(model: Any, target: Any, batch: Batch) -> Quality:
    """Of a model, the target or its student, on a packed batch's answers."""
    attend = Packed(batch.segments)
    next_tokens = jnp.roll(batch.tokens, -1, axis=1)
    counts = jnp.roll(batch.supervised, -1, axis=1).at[:, -1].set(False)

    def of_row(row: Any) -> Quality:
        hidden, dense, tokens, counts = row
        logits, theirs = (target.logit_map(head_logits(h, target.head_rows())) for h in (hidden, dense))
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[:, None], axis=1)[:, 0]
        hits = (jnp.argmax(logits, axis=-1) == jnp.argmax(theirs, axis=-1)) & counts
        return Quality(counts.sum(), jnp.where(counts, losses, 0).sum(), hits.sum())

    states = [one(batch.tokens, batch.positions, attend).hidden for one in (model, target)]
    return Quality(*(part.sum() for part in jax.lax.map(of_row, (*states, next_tokens, counts))))


# --- files ------------------------------------------------------------------------------------------------------


def mixtral_tensors(student: Any) -> dict[str, np.ndarray]:
    """The student's layers as tensors of Mixtral's names, float32; experts have k times the output of its groups."""
    tensors: dict[str, np.ndarray] = {}

    def add(name: str, value: jax.Array, *, transposed: bool = True) -> None:
        array = np.asarray(value, np.float32)
        tensors[name] = np.ascontiguousarray(array.T if transposed else array)

    for i, layer in enumerate(student.layers):
        start, groups = f"model.layers.{i}.", layer.mlp
        for tensor in stored_tensors(layer, _OUTSIDE_EXPERTS):
            add(start + tensor.name, tensor.variable[...], transposed=tensor.transposed)
        matrices = groups.mlp.gate.matrix, groups.mlp.up.matrix, groups.num_chosen * groups.mlp.down.matrix
        num_experts = groups.router.matrix.shape[1]
        parts = [
            jnp.split(matrix, num_experts, axis=axis) for matrix, axis in zip(matrices, (1, 1, 0), strict=True)
        ]  # experts have neurons
        for name, of_experts in zip(("w1", "w3", "w2"), parts, strict=True):
            for e, matrix in enumerate(of_experts):
                add(f"{start}block_sparse_moe.experts.{e}.{name}.weight", matrix)
    return tensors


# --- coverage ---------------------------------------------------------------------------------------------------


def chosen_experts(target: Any, batch: Batch) -> jax.Array:
    """Which experts each token of a packed batch chooses, bool [sparse layers, B, T, E]."""
    chosen = []
    _, inputs = hidden_and_mlp_inputs(target, batch)
    for layer, x in zip(target.layers, inputs, strict=True):
        if isinstance(layer.mlp, SparseMlp):
            of_layer, _ = layer.mlp.route(x)  # [B, T, k]
            chosen.append(jax.nn.one_hot(of_layer, layer.mlp.num_experts, dtype=bool).any(axis=-2))
    return jnp.stack(chosen)


def coverage(chosen: Sequence[np.ndarray], batches: Sequence[Batch], num_tokens: int) -> float | None:
    """The mean number of a layer's experts that so many neighbouring tokens choose together.

    `chosen` is that of `chosen_experts` for each batch. None if no text has so many tokens.
    """
    experts, windows = 0, 0
    for has, batch in zip(chosen, batches, strict=True):
        rows, length = batch.segments.shape
        number = length // num_tokens
        cut = number * num_tokens
        segments = np.asarray(batch.segments)[:, :cut].reshape(rows, number, num_tokens)
        alike = (segments == segments[..., :1]).all(axis=-1) & (segments[..., 0] > 0)  # [B, windows], of one text
        together = has[:, :, :cut].reshape(len(has), rows, number, num_tokens, -1).any(axis=3).sum(axis=-1)
        experts += int((together * alike).sum())
        windows += len(has) * int(alike.sum())
    return experts / windows if windows else None
