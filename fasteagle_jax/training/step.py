"""Training a drafter: its first weights, the optimiser and the train step.

B rows · T tokens · N levels · H hidden width · S selected target positions a row.
The target is frozen and only read; parameters and optimiser state are float32, products run in the step's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fasteagle_jax.data.features import TargetValues
from fasteagle_jax.data.packing import Batch
from fasteagle_jax.nn.packed_attention import Packed
from fasteagle_jax.training.config import REMAT, RunConfig, StepOptions
from fasteagle_jax.training.losses import LevelMetrics, LossConfig, level_loss, select_positions
from fasteagle_jax.training.optimizer import OptimizerConfig, is_matrix, make_optimizer


class TrainState(NamedTuple):
    """What a train step replaces."""

    params: Any  # the drafter's nnx.Param leaves
    optimizer: Any
    step: jax.Array  # int32 []; batches seen, those of skipped updates too
    average: Any = None  # the moving average of params, where one is kept

    @property
    def weights(self) -> Any:
        """The parameters to decode with: the average where one is kept."""
        return self.params if self.average is None else self.average


class StepResult(NamedTuple):
    """What a train step says of its batch."""

    loss: jax.Array  # float32 []
    norm: jax.Array  # float32 [], of the gradient before clipping
    metrics: LevelMetrics
    applied: jax.Array  # bool []; False where the update was skipped


def first_state(params: Any, optimizer: optax.GradientTransformation, ema: float = 0.0) -> TrainState:
    """The state before the first step; the average, where one is kept, starts at `params`."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), average)


def target_outputs(target: Any, batch: Batch, feature_layers: tuple[int, ...], attention: str = "auto") -> TargetValues:
    """The frozen target's features and final hidden states of a packed batch."""
    attend = Packed(batch.segments, None, attention)
    out = target(batch.tokens, batch.positions, attend, None, feature_layers)
    return jax.lax.stop_gradient(TargetValues(out.features, out.hidden))


def in_dtype(params: Any, dtype: Any) -> Any:
    """A drafter's parameters with their matrices in `dtype`; vectors (norms), stacked or not, stay as they are."""
    return jax.tree_util.tree_map_with_path(lambda path, p: p.astype(dtype) if is_matrix(path) else p, params)


def drafter_loss(
    drafter: Any, target: Any, batch: Batch, key: jax.Array, config: LossConfig
) -> tuple[jax.Array, LevelMetrics]:
    """The drafter's loss float32 [] and metrics on a packed batch; `key` picks the share of positions."""
    picked, real = select_positions(batch.supervised, batch.positions, config.share, key)
    return _loss_at(drafter, target, _Part(batch, None, picked, real), None, config, StepOptions())


class _Part(NamedTuple):
    """Rows of a batch with the positions that the loss looks at."""

    batch: Batch
    values: TargetValues | None  # of the target, where they were computed before
    picked: jax.Array  # int32 [B, S]
    real: jax.Array  # bool [B, S]


def _loss_at(
    drafter: Any, target: Any, part: _Part, level_share: jax.Array | None, config: LossConfig, ways: StepOptions
) -> tuple[jax.Array, LevelMetrics]:
    """The loss and metrics of a part; level i's loss is multiplied by `level_share[i - 1]`, None for 1."""
    batch = part.batch
    out = part.values or target_outputs(target, batch, drafter.feature_layers, ways.attention)
    next_tokens = jnp.roll(batch.tokens, -1, axis=1)  # at a segment's end it is wrong, and no loss looks there
    attend = Packed(batch.segments, drafter.config.window, ways.attention)
    hidden, _ = drafter.hidden_states(
        target.embedding[...], out.features, next_tokens, batch.positions, attend, remat=REMAT[ways.remat]
    )
    head = target.head_rows()
    token_ids = None if drafter.token_ids is None else drafter.token_ids[...]
    places = batch.positions, part.picked, part.real
    return level_loss(hidden, out.hidden, *places, head, token_ids, config, drafter.own_head(), level_share)


def make_train_step(
    graph: Any,
    optimizer: optax.GradientTransformation,
    config: LossConfig,
    dtype: Any,
    seed: int,
    *,
    accumulate: int = 1,
    ema: float = 0.0,
    ways: StepOptions = StepOptions(),  # noqa: B008  # immutable
    shardings: Any = None,
) -> Callable[..., tuple[TrainState, StepResult]]:
    """A compiled step: (state, constants, target, batch, limit = infinity, values = None) -> (state, result).

    The state is consumed; `values` are the target's for the batch, if its layers are not to be run.

    Where the loss or the gradient is not finite, or the loss above `limit`, parameters, optimiser and average stay
    as they were, bit for bit; `step` alone counts on.

    Args:
      graph: with the parameters and `constants`, what nnx.split(drafter, nnx.Param, ...) gave.
      optimizer, config, dtype, seed: the rule, the loss, of the products, of the positions drawn.
      accumulate: the batch is taken in so many parts of rows, one after the other; the update is that of the whole.
      ema: decay of the state's average.
      ways: how it is computed.
      shardings: of the state and the result, to stay as they are; None on one device.
    """

    def gradient_of(params: Any, constants: Any, target: Any, part: _Part, level_share: jax.Array | None) -> Any:
        def loss_of(params: Any) -> tuple[jax.Array, LevelMetrics]:
            drafter = nnx.merge(graph, in_dtype(params, dtype), constants)
            return _loss_at(drafter, target, part, level_share, config, ways)

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    def step(
        state: TrainState,
        constants: Any,
        target: Any,
        batch: Batch,
        limit: jax.Array | float = float("inf"),
        values: TargetValues | None = None,
    ) -> tuple[TrainState, StepResult]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        whole = _Part(batch, values, *select_positions(batch.supervised, batch.positions, config.share, key))
        if accumulate == 1:
            (loss, metrics), gradients = gradient_of(state.params, constants, target, whole, None)
        else:
            num_levels = nnx.merge(graph, state.params, constants).num_levels
            loss, metrics, gradients = _accumulated(
                lambda *args: gradient_of(state.params, constants, target, *args),
                state.params,
                whole,
                accumulate,
                num_levels,
            )
        norm = optax.tree.norm(gradients)
        applied = jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= limit)

        def updated(state: TrainState, gradients: Any) -> tuple[Any, Any, Any]:
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            average = None
            if ema:
                # Short at first, so that the first weights are soon forgotten (TensorFlow's ExponentialMovingAverage).
                decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
                average = optax.incremental_update(params, state.average, 1 - decay)
            return params, optimizer_state, average

        # A branch, since selecting element by element makes the update half as slow again on a CPU.
        params, optimizer_state, average = jax.lax.cond(
            applied, updated, lambda state, _: (state.params, state.optimizer, state.average), state, gradients
        )
        return TrainState(params, optimizer_state, state.step + 1, average), StepResult(loss, norm, metrics, applied)

    return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def _accumulated(
    gradient_of: Callable[[_Part, jax.Array], Any],
    params: Any,
    whole: _Part,
    num_parts: int,
    num_levels: int,
) -> tuple[jax.Array, LevelMetrics, Any]:
    """The loss, metrics and gradients of a batch, of which one part after the other is in memory.

    A level's loss is a mean over the batch's positions, of which parts have unlike numbers: each weighs by its own.
    """
    # Every num_parts-th row, so that a part is spread over a mesh as the batch is.
    parts = jax.tree.map(lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), whole)
    counts = jax.vmap(lambda part: _level_counts(part, num_levels))(parts)  # [parts, N]
    total = jnp.maximum(counts.sum(axis=0), 1)

    def one(sums: Any, xs: tuple[_Part, jax.Array]) -> tuple[Any, None]:
        part, share = xs
        (loss, metrics), gradients = gradient_of(part, share)
        means = [share * mean for mean in (metrics.loss, metrics.accuracy, metrics.acceptance)]
        return jax.tree.map(jnp.add, sums, (loss, means, gradients)), None

    zeros = jnp.zeros(()), [jnp.zeros((num_levels,))] * 3, jax.tree.map(jnp.zeros_like, params)
    (loss, means, gradients), _ = jax.lax.scan(one, zeros, (parts, counts / total))
    return loss, LevelMetrics(*[*means, total]), gradients


def _level_counts(part: _Part, num_levels: int) -> jax.Array:
    """The number of positions that each level is measured at, int32 [N]."""
    depth = jnp.take_along_axis(part.batch.positions, part.picked, axis=1)  # [B, S]
    reached = part.real & (depth >= jnp.arange(1, num_levels + 1)[:, None, None])
    return reached.sum(axis=(1, 2))


def train_step(config: RunConfig, graph: Any, shardings: Any = None) -> Any:
    """The compiled step of a run, as of `make_train_step`: one a process for equal settings and sizes."""
    leaves, structure = jax.tree.flatten(shardings)
    options = StepOptions(config.attention, config.remat)
    return _train_step(
        graph,
        config.optimizer,
        config.steps,
        config.loss,
        config.dtype,
        config.seed,
        config.accumulate,
        options,
        structure,
        tuple(leaves),
    )


@functools.lru_cache(maxsize=16)
def _train_step(
    graph: Any,
    optimizer: OptimizerConfig,
    num_steps: int,
    loss: LossConfig,
    dtype: str,
    seed: int,
    accumulate: int,
    options: StepOptions,
    structure: Any,
    shardings: tuple[Any, ...],
) -> Any:
    return make_train_step(
        graph,
        make_optimizer(optimizer, num_steps),
        loss,
        jnp.dtype(dtype),
        seed,
        accumulate=accumulate,
        ema=optimizer.ema,
        ways=options,
        shardings=jax.tree.unflatten(structure, shardings),
    )
