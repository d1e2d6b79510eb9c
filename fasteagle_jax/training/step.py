"""The train step of a drafter.

B rows · T tokens · N levels · H hidden width · S selected target positions a row.
The target is frozen and only read; parameters and optimiser state are float32, products run in the step's dtype.
"""

from __future__ import annotations

import dataclasses
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
from fasteagle_jax.training.deepkd import Parts, num_kept, value_and_parts
from fasteagle_jax.training.losses import (
    LevelMetrics,
    LossConfig,
    PathSums,
    counted_guesses,
    level_loss,
    path_sums,
    select_positions,
    span_of,
    stretches_read,
)
from fasteagle_jax.training.optimizer import is_matrix, make_optimizer


class TrainState(NamedTuple):
    """The arrays that a train step replaces."""

    params: Any  # the drafter's nnx.Param leaves
    optimizer: Any
    step: jax.Array  # int32 []; batches seen, with those of skipped updates
    average: Any = None  # the moving average of params; None if none is kept

    @property
    def weights(self) -> Any:
        """The parameters to decode with: the average if there is one."""
        return self.params if self.average is None else self.average


class StepResult(NamedTuple):
    """Loss, gradient norm and metrics of a step's batch."""

    loss: jax.Array  # float32 []
    norm: jax.Array  # float32 [], of the gradient before clipping
    metrics: LevelMetrics
    applied: jax.Array  # bool []; False if the update was skipped
    parts: PartResult | None = None  # with DeepKD


class PartResult(NamedTuple):
    """What DeepKD's task, target-class and non-target-class parts had in a step."""

    losses: jax.Array  # float32 [3], weighted; their sum is the loss
    signal_to_noise: jax.Array  # float32 [3], of the gradients so far: deepkd.split_momenta
    num_kept: jax.Array | None  # int32 [], K; None without a mask


def first_state(params: Any, optimizer: optax.GradientTransformation, ema: float = 0.0) -> TrainState:
    """The state before the first step; an average, with `ema` above 0, starts at `params`."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), average)


def target_outputs(target: Any, batch: Batch, feature_layers: tuple[int, ...], attention: str = "auto") -> TargetValues:
    """The frozen target's features and final hidden states of a packed batch."""
    attend = Packed(batch.segments, None, attention)
    out = target(batch.tokens, batch.positions, attend, None, feature_layers)
    return jax.lax.stop_gradient(TargetValues(out.features, out.hidden))


def in_dtype(params: Any, dtype: Any) -> Any:
    """A drafter's parameters with their matrices in `dtype`; vectors (norms), stacked or not, stay as they are."""

    def cast(param: nnx.Variable[Any]) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype), param) if is_matrix(param) else param

    return jax.tree.map(cast, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def drafter_loss(
    drafter: Any, target: Any, batch: Batch, key: jax.Array, config: LossConfig
) -> tuple[jax.Array, LevelMetrics]:
    """The drafter's loss float32 [] and metrics on a packed batch; `key` picks the share of positions.

    Of DeepKD the three losses [3], without a mask.
    """
    rows = _Rows(batch, None, *_select(drafter, batch, config, key))
    return _loss_at(drafter, target, rows, None, config, StepOptions())


def _select(drafter: Any, batch: Batch, config: LossConfig, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As of `select_positions`, in stretches if the loss wants whole paths, or the drafter needs no other positions."""
    span = span_of(batch.tokens.shape[1]) if drafter.pointwise or config.whole_paths else 1
    return select_positions(batch.supervised, batch.positions, config.share, key, span)


def path_measure(config: RunConfig, graph: Any, out_sharding: Any = None) -> Callable[..., PathSums]:
    """A compiled function (weights, constants, target, batch, values = None) -> PathSums of all supervised positions.

    For the arguments see `make_train_step`.
    """
    loss, dtype = dataclasses.replace(config.loss, without_edges=0.0, without_edges_end=0.0), jnp.dtype(config.dtype)
    options = StepOptions(config.attention)

    def measure(
        weights: Any, constants: Any, target: Any, batch: Batch, values: TargetValues | None = None
    ) -> PathSums:
        drafter = nnx.merge(graph, in_dtype(weights, dtype), constants)
        hidden, target_hidden, heads, _ = _guesses(drafter, target, batch, values, None, loss, options)
        picked, real = select_positions(batch.supervised, batch.positions, 1.0, jax.random.key(0))
        head, token_ids, own_head, logit_map = heads
        places = batch.positions, picked, real
        return path_sums(hidden, target_hidden, *places, head, token_ids, loss, own_head, logit_map)

    return jax.jit(measure, out_shardings=out_sharding)


class _Rows(NamedTuple):
    """Rows of a batch, all or a microbatch, with the positions that the loss looks at."""

    batch: Batch
    values: TargetValues | None  # of the target, if they are computed already
    picked: jax.Array  # int32 [B, S]
    real: jax.Array  # bool [B, S]


def _loss_at(
    drafter: Any,
    target: Any,
    rows: _Rows,
    level_share: jax.Array | None,
    config: LossConfig,
    options: StepOptions,
    kept: jax.Array | None = None,
    done: jax.Array | float = 0.0,
) -> tuple[jax.Array, LevelMetrics]:
    """The loss and metrics of rows; level i's loss is multiplied by `level_share[i - 1]`, None for 1.

    `kept` is the K of DeepKD's mask, `done` the share of the run's steps that is done.
    """
    args = drafter, target, rows.batch, rows.values, rows.picked, config, options
    hidden, target_hidden, (head, token_ids, own_head, logit_map), at_level = _guesses(*args)
    return level_loss(
        hidden,
        target_hidden,
        rows.batch.positions,
        rows.picked,
        rows.real,
        head,
        token_ids,
        config,
        own_head,
        level_share,
        logit_map,
        kept,
        done,
        at_level,
    )


def _guesses(
    drafter: Any,
    target: Any,
    batch: Batch,
    values: TargetValues | None,
    picked: jax.Array | None,
    config: LossConfig,
    options: StepOptions,
) -> tuple[Any, jax.Array, tuple[Any, Any, Any, Any], list[jax.Array] | None]:
    """The drafter's hidden states, the target's, and the head, draft vocabulary, own head and logit map.

    At last the places of guesses at the `picked` positions among the drafter's states, which are then of no others if
    the drafter is pointwise; else None.
    """
    layers = drafter.feature_layers + drafter.context_layers
    out = values or target_outputs(target, batch, layers, options.attention)
    # The inputs of the context layers come after the features.
    width = len(drafter.feature_layers) * target.config.hidden_size
    features, inputs = (
        out.features[..., :width],
        jnp.split(out.features[..., width:], len(drafter.context_layers) or 1, -1),
    )
    context = tuple(
        target.keys_values(layer, x, batch.positions) for layer, x in zip(drafter.context_layers, inputs, strict=False)
    )
    next_tokens = jnp.roll(batch.tokens, -1, axis=1)  # wrong at a segment's end, where no loss looks
    attend = Packed(batch.segments, drafter.config.window, options.attention)
    stream = target.embedding[...], features, next_tokens, batch.positions, attend
    more: dict[str, Any] = {}
    if config.weighs_without_edges and getattr(drafter.config, "correction", None):
        more["uncorrected"] = True
    at_level = None
    if drafter.pointwise and picked is not None:
        more["at"], at_level = stretches_read(picked, span_of(batch.tokens.shape[1]), drafter.num_levels)
    hidden, _ = drafter.hidden_states(*stream, context=context, remat=REMAT[options.remat], **more)
    head = target.head_rows()
    token_ids = None if drafter.token_ids is None else drafter.token_ids[...]
    return hidden, out.hidden, (head, token_ids, drafter.own_head(), target.logit_map), at_level


def make_train_step(
    graph: Any,
    optimizer: optax.GradientTransformation,
    config: LossConfig,
    dtype: Any,
    seed: int,
    *,
    accumulate: int = 1,
    ema: float = 0.0,
    options: StepOptions = StepOptions(),  # noqa: B008  # immutable
    shardings: Any = None,
    num_steps: int | None = None,
) -> Callable[..., tuple[TrainState, StepResult]]:
    """A compiled step: (state, constants, target, batch, limit = infinity, values = None) -> (state, result).

    The state is donated; `values` are the target's for the batch, if its layers are not to be run. If the loss or the
    gradient is not finite, or the loss above `limit`, the update is skipped: parameters, optimiser and average stay bit
    for bit, and `step` alone advances.

    Args:
      graph: with the parameters and `constants`, what nnx.split(drafter, nnx.Param, ...) gave.
      optimizer, config: the update and the loss.
      dtype: of the products.
      seed: for the positions that a step draws.
      accumulate: the number of microbatches, computed one after the other; the update is that of the whole batch.
      ema: decay of the state's average; 0 for none.
      options: attention and rematerialization.
      shardings: of the state and the result; None on one device.
      num_steps: of the run, for the phases of DeepKD's mask and the schedules of the loss.
    """
    deepkd = config.deepkd
    if (config.scheduled or (deepkd is not None and deepkd.mask)) and num_steps is None:
        raise ValueError("schedules of the loss and phases of DeepKD's mask are shares of num_steps: give it")

    def gradient_of(
        params: Any, constants: Any, target: Any, progress: Any, rows: _Rows, level_share: jax.Array | None
    ) -> Any:
        """((loss, metrics), gradients); of DeepKD three losses [3] and the Parts of the gradients."""

        def loss_of(params: Any) -> tuple[jax.Array, LevelMetrics]:
            drafter = nnx.merge(graph, in_dtype(params, dtype), constants)
            return _loss_at(drafter, target, rows, level_share, config, options, *progress)

        if deepkd is not None:
            # As the levels: where they are a list, one pass after the other rather than a loop.
            return value_and_parts(loss_of, params, unroll=not nnx.merge(graph, params, constants).stacked)
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
        whole = _Rows(batch, values, *_select(nnx.merge(graph, state.params, constants), batch, config, key))
        kept = None  # DeepKD's K
        if deepkd is not None and num_steps is not None:
            num_classes = nnx.merge(graph, state.params, constants).config.draft_vocab_size
            kept = num_kept(deepkd, num_classes, state.step, num_steps)
        progress = kept, 0.0 if num_steps is None else state.step / num_steps
        if accumulate == 1:
            (loss, metrics), gradients = gradient_of(state.params, constants, target, progress, whole, None)
        else:
            num_levels = nnx.merge(graph, state.params, constants).num_levels
            loss, metrics, gradients = _accumulated(
                lambda *args: gradient_of(state.params, constants, target, progress, *args),
                state.params if deepkd is None else Parts(*[state.params] * 3),
                whole,
                accumulate,
                num_levels,
                config.whole_paths,
            )
        losses, total = loss, gradients
        if deepkd is not None:
            loss, total = losses.sum(), gradients.total()
        norm = optax.tree.norm(total)
        applied = jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= limit)

        def updated(state: TrainState, gradients: Any) -> tuple[Any, Any, Any]:
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            average = None
            if ema:
                # Smaller at first, to forget the first weights soon (TensorFlow's ExponentialMovingAverage).
                decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
                average = optax.incremental_update(params, state.average, 1 - decay)
            return params, optimizer_state, average

        # A branch: selecting element by element would read and write everything once more.
        params, optimizer_state, average = jax.lax.cond(
            applied, updated, lambda state, _: (state.params, state.optimizer, state.average), state, gradients
        )
        parts = None if deepkd is None else PartResult(losses, optimizer_state.signal_to_noise, kept)
        result = StepResult(loss, norm, metrics, applied, parts)
        return TrainState(params, optimizer_state, state.step + 1, average), result

    return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def _accumulated(
    gradient_of: Callable[[_Rows, jax.Array], Any],
    like: Any,
    whole: _Rows,
    num_microbatches: int,
    num_levels: int,
    whole_paths: bool,
) -> tuple[jax.Array, LevelMetrics, Any]:
    """The loss, metrics and gradients of a batch, summed over microbatches, one of which is in memory at a time.

    `like` has the structure and shapes of the gradients: the parameters, or DeepKD's Parts of them. A level's loss is a
    mean over the batch's positions, of which microbatches have different numbers: each is weighted by its share.
    """
    # Every num_microbatches-th row, so that a microbatch is spread over a mesh as the batch is.
    parts = jax.tree.map(lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1), whole)
    counts = jax.vmap(lambda rows: _level_counts(rows, num_levels, whole_paths))(parts)  # [microbatches, N]
    total = jnp.maximum(counts.sum(axis=0), 1)

    def one(sums: Any, xs: tuple[_Rows, jax.Array]) -> tuple[Any, None]:
        rows, share = xs
        (loss, metrics), gradients = gradient_of(rows, share)
        means = [share * mean for mean in (metrics.loss, metrics.accuracy, metrics.acceptance)]
        return jax.tree.map(jnp.add, sums, (loss, means, metrics.left_out, gradients)), None

    is_split = isinstance(like, Parts)
    zeros = (
        jnp.zeros((3,) if is_split else ()),
        [jnp.zeros((num_levels,))] * 3,
        jnp.zeros((num_levels,), jnp.int32) if is_split else None,
        jax.tree.map(jnp.zeros_like, like),
    )
    (loss, means, left_out, gradients), _ = jax.lax.scan(one, zeros, (parts, counts / total))
    return loss, LevelMetrics(*[*means, total])._replace(left_out=left_out), gradients


def _level_counts(rows: _Rows, num_levels: int, whole_paths: bool) -> jax.Array:
    """The number of positions that each level is measured at, int32 [N]."""
    counted = counted_guesses(rows.picked, rows.real, rows.batch.positions, num_levels, whole_paths)
    return counted.sum(axis=(1, 2))


def train_step(config: RunConfig, graph: Any, shardings: Any = None) -> Any:
    """The compiled step of a run, as of `make_train_step`: one a process for equal settings and sizes."""
    leaves, structure = jax.tree.flatten(shardings)
    # Without what the program does not depend on: data, folders, evaluation.
    settings = RunConfig(
        target="",
        data=(),
        steps=config.steps,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        seed=config.seed,
        dtype=config.dtype,
        loss=config.loss,
        optimizer=config.optimizer,
        attention=config.attention,
        remat=config.remat,
    )
    return _train_step(settings, graph, structure, tuple(leaves))


@functools.lru_cache(maxsize=16)
def _train_step(config: RunConfig, graph: Any, structure: Any, shardings: tuple[Any, ...]) -> Any:
    return make_train_step(
        graph,
        make_optimizer(config.optimizer, config.steps, config.loss.deepkd),
        config.loss,
        jnp.dtype(config.dtype),
        config.seed,
        accumulate=config.accumulate,
        ema=config.optimizer.ema,
        options=StepOptions(config.attention, config.remat),
        shardings=jax.tree.unflatten(structure, shardings),
        num_steps=config.steps,
    )
