"""Training a drafter: its first weights, the optimiser and the train step.

B rows · T tokens · N levels · H hidden width · S selected target positions a row.
The target is frozen and only read; parameters and optimiser state are float32, products run in the step's dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fasteagle_jax.config import DrafterConfig
from fasteagle_jax.data.features import TargetValues
from fasteagle_jax.data.packing import Batch
from fasteagle_jax.drafters.table import AXES, class_of
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.packed_attention import Packed
from fasteagle_jax.training.losses import LevelMetrics, LossConfig, level_loss, select_positions

MUON_RMS = 0.2  # of Muon's updates over the rate: AdamW's, so that one rate suits both (arXiv 2502.16982, section 2.2)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon with clipping by global norm; the rate warms up, stays, and falls linearly over the last steps.

    A rate that stays constant in between lets a run be made longer: its steps before the fall do not change.
    """

    name: str = "adamw"  # or muon: matrices by Muon, norms by AdamW with Nesterov's momentum, at one rate
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    decay_share: float = 0.2  # of all steps, at the end
    final_share: float = 0.05  # of the peak, at the last step
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_norm: float = 0.5
    ema: float = 0.0  # decay of the moving average of the weights, which is then what is evaluated and kept; 0 for none

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise UserError(f"optimizer name is {self.name!r}: use adamw or muon")
        if not 0 <= self.ema < 1:
            raise UserError(f"optimizer ema is {self.ema}: give a decay from 0 (no average) to below 1, e.g. 0.999")
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise UserError(f"learning_rate {self.learning_rate} and clip_norm {self.clip_norm} must be positive")
        if not 0 <= self.decay_share <= 1:
            raise UserError(f"decay_share is {self.decay_share}: it must be 0 to 1")


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


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optax transformation of a run of `num_steps`."""
    peak, decay_steps = config.learning_rate, round(config.decay_share * num_steps)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, config.warmup_steps),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, peak * config.final_share, max(decay_steps, 1)),
        ],
        [config.warmup_steps, max(config.warmup_steps, num_steps - decay_steps)],
    )
    if config.name == "muon":
        rule = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_b1=config.betas[0],
            adam_b2=config.betas[1],
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=MUON_RMS,
        )
    else:
        rule = optax.adamw(schedule, *config.betas, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def _matrices(params: Any) -> Any:
    """For each of a drafter's parameters, the dimensions of its matrix (the last two of a stack); None for vectors."""

    def of(path: Any, _: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = [str(getattr(key, "name", getattr(key, "key", key))) for key in path]
        known = [name for name in names if name in AXES]
        return optax.contrib.MuonDimensionNumbers(-2, -1) if known and len(AXES[known[-1]]) == 2 else None

    return jax.tree_util.tree_map_with_path(of, params)


# --- the first weights ------------------------------------------------------------------------------------------


def init_drafter(
    config: DrafterConfig,
    target: Any,
    key: jax.Array,
    *,
    token_ids: Any | None = None,
    feature_rms: jax.Array | None = None,
    from_target: bool = True,
) -> Any:
    """A drafter of the configured kind to train, float32, in the form (stacked or list) that the target is in.

    Args:
      config: its sizes.
      target: the Llama it will draft for.
      key: for the random weights.
      token_ids: int32 [V], the draft vocabulary, where it is reduced.
      feature_rms: float32 [F], root mean square of each feature; inputs are divided by it.
      from_target: start its layers from the target's last one, as its class's `start_from` says; sizes must be the
        target's. Otherwise all but norms and heads is random.
    """
    drafter = jax.jit(lambda key: class_of(config)(config, key, stacked=target.stacked))(key)
    if token_ids is not None:
        drafter.token_ids[...] = jnp.asarray(token_ids, jnp.int32)
    rms = jnp.ones((len(config.feature_layers),)) if feature_rms is None else feature_rms
    drafter.feature_scale[...] = jnp.repeat(1 / rms, config.hidden_size)
    drafter.start_from(target, rms, layers=from_target)
    return jax.tree.map(jnp.copy, drafter)  # the train step donates: no buffer may be the target's, or be there twice


def drafter_from(
    config: DrafterConfig, trained: Any, *, feature_rms: jax.Array | None = None, stacked: bool = False
) -> Any:
    """A drafter to train, float32, with the weights of a trained one, of which it may have the first levels alone.

    Args:
      config: its sizes; all but the number of levels and the window must be the trained one's, and a correction may be
        new, which then starts as in a new drafter.
      trained: a drafter as `load_drafter` gives it, its features' scale folded into fc.
      feature_rms: as of `init_drafter`; the scale is taken out of fc again.
      stacked: its form.

    Raises UserError for sizes that differ.
    """
    free: dict[str, Any] = {
        "window": config.window,
        "num_levels": min(config.num_levels, trained.config.num_levels),
        "correction": trained.config.correction or config.correction,
    }
    if (its := dataclasses.replace(trained.config, **free)) != config:
        mine, theirs = dataclasses.asdict(config), dataclasses.asdict(its)
        wrong = ", ".join(
            f"{name} {theirs[name]} instead of {mine[name]}" for name in mine if mine[name] != theirs[name]
        )
        raise UserError(f"the drafter to start from has {wrong}: set the run's drafter sizes to its own")
    drafter = class_of(config)(config, jax.random.key(0), stacked=False)
    # As they are stored, whichever way around a model holds them.
    weights = {name: p[...].T if transposed else p[...] for name, p, transposed in trained.unstacked().stored()}
    for name, param, transposed in drafter.stored():
        if name not in weights:  # of a new correction
            continue
        value = weights[name].T if transposed else weights[name]
        param[...] = jnp.asarray(value, param[...].dtype)
    if feature_rms is not None:
        scale = jnp.repeat(1 / feature_rms, config.hidden_size)  # [F*H]
        drafter.feature_scale[...] = scale
        drafter.fc[...] = drafter.fc[...] / scale[:, None]
    return drafter.stacked_form() if stacked else drafter


def feature_rms(
    target: Any, batch: Batch, feature_layers: tuple[int, ...], values: TargetValues | None = None
) -> jax.Array:
    """The size of each feature on a batch, float32 [F]: the median over tokens of a token's root mean square.

    Not the mean: the first token of a text can be a hundred times the size of the others. `values` are the target's,
    where they were computed before.
    """
    features = (values or target_outputs(target, batch, feature_layers)).features.astype(jnp.float32)
    features = features.reshape(*features.shape[:2], len(feature_layers), -1)
    rms = jnp.sqrt(jnp.mean(features**2, axis=-1))  # [B, T, F]
    rms = jnp.where((batch.segments > 0)[..., None], rms, jnp.nan)
    return jnp.nanmedian(rms.reshape(-1, len(feature_layers)), axis=0)


# --- the step ---------------------------------------------------------------------------------------------------


# What the backward pass computes again rather than keeps, by name: nothing, all of a level but its input, or all but
# the results of products.
REMAT: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def target_outputs(target: Any, batch: Batch, feature_layers: tuple[int, ...], attention: str = "auto") -> TargetValues:
    """The frozen target's features and final hidden states of a packed batch."""
    attend = Packed(batch.segments, None, attention)
    out = target(batch.tokens, batch.positions, attend, None, feature_layers)
    return jax.lax.stop_gradient(TargetValues(out.features, out.hidden))


def in_dtype(params: Any, dtype: Any) -> Any:
    """Parameters with their matrices in `dtype`; vectors (norms) stay float32."""
    return jax.tree.map(lambda p: p.astype(dtype) if p.ndim >= 2 and min(p.shape) > 1 else p, params)


def drafter_loss(
    drafter: Any, target: Any, batch: Batch, key: jax.Array, config: LossConfig
) -> tuple[jax.Array, LevelMetrics]:
    """The drafter's loss float32 [] and metrics on a packed batch; `key` picks the share of positions."""
    picked, real = select_positions(batch.supervised, batch.positions, config.share, key)
    return _loss_at(drafter, target, _Part(batch, None, picked, real), None, config, Ways())


class Ways(NamedTuple):
    """How a step computes what it computes."""

    attention: str = "auto"  # of packed.KINDS
    remat: str = "none"  # of REMAT


class _Part(NamedTuple):
    """Rows of a batch with the positions that the loss looks at."""

    batch: Batch
    values: TargetValues | None  # of the target, where they were computed before
    picked: jax.Array  # int32 [B, S]
    real: jax.Array  # bool [B, S]


def _loss_at(
    drafter: Any, target: Any, part: _Part, level_share: jax.Array | None, config: LossConfig, ways: Ways
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
    draft_head = head if drafter.token_ids is None else head[drafter.token_ids[...]]
    places = batch.positions, part.picked, part.real
    return level_loss(hidden, out.hidden, *places, head, draft_head, config, drafter.own_head(), level_share)


def make_train_step(
    graph: Any,
    constants: Any,
    optimizer: optax.GradientTransformation,
    config: LossConfig,
    dtype: Any,
    seed: int,
    *,
    accumulate: int = 1,
    ema: float = 0.0,
    ways: Ways = Ways(),  # noqa: B008  # immutable
    shardings: Any = None,
) -> Callable[..., tuple[TrainState, StepResult]]:
    """A compiled step: (state, target, batch, limit = infinity, values = None) -> (state, result).

    The state is consumed; `values` are the target's for the batch, where its layers are not to be run.

    Where the loss or the gradient is not finite, or the loss above `limit`, parameters, optimiser and average stay
    as they were, bit for bit; `step` alone counts on.

    Args:
      graph, constants: with the parameters, what nnx.split(drafter, nnx.Param, ...) gave.
      optimizer, config, dtype, seed: the rule, the loss, of the products, of the positions drawn.
      accumulate: the batch is taken in so many parts of rows, one after the other; the update is that of the whole.
      ema: decay of the state's average.
      ways: how it is computed.
      shardings: of the state and the result, to stay as they are; None on one device.
    """

    def gradient_of(params: Any, target: Any, part: _Part, level_share: jax.Array | None) -> Any:
        def loss_of(params: Any) -> tuple[jax.Array, LevelMetrics]:
            drafter = nnx.merge(graph, in_dtype(params, dtype), constants)
            return _loss_at(drafter, target, part, level_share, config, ways)

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    def step(
        state: TrainState,
        target: Any,
        batch: Batch,
        limit: jax.Array | float = float("inf"),
        values: TargetValues | None = None,
    ) -> tuple[TrainState, StepResult]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        whole = _Part(batch, values, *select_positions(batch.supervised, batch.positions, config.share, key))
        if accumulate == 1:
            (loss, metrics), gradients = gradient_of(state.params, target, whole, None)
        else:
            num_levels = nnx.merge(graph, state.params, constants).num_levels
            loss, metrics, gradients = _accumulated(
                lambda *args: gradient_of(state.params, target, *args), state.params, whole, accumulate, num_levels
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
