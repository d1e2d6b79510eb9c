"""Training a drafter: its first weights, the optimiser and the train step.

B rows · T tokens · N levels · H hidden width.
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
from fasteagle_jax.data import Batch
from fasteagle_jax.drafters.fasteagle import FastEagle, causal
from fasteagle_jax.errors import UserError
from fasteagle_jax.losses import LevelMetrics, LossConfig, level_loss, select_positions

EMBEDDING_SHARE = 0.1  # of the stream's size that the embedding starts with, beside levels that never saw one there


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping by global norm; the rate warms up, stays, and falls linearly over the last steps.

    A rate that stays constant in between lets a run be made longer: its steps before the fall do not change.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    decay_share: float = 0.2  # of all steps, at the end
    final_share: float = 0.05  # of the peak, at the last step
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_norm: float = 0.5

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise UserError(f"learning_rate {self.learning_rate} and clip_norm {self.clip_norm} must be positive")
        if not 0 <= self.decay_share <= 1:
            raise UserError(f"decay_share is {self.decay_share}: it must be 0 to 1")


class TrainState(NamedTuple):
    """What a train step replaces."""

    params: Any  # the drafter's nnx.Param leaves
    optimizer: Any
    step: jax.Array  # int32 []


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
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, *config.betas, weight_decay=config.weight_decay),
    )


# --- the first weights ------------------------------------------------------------------------------------------


def init_drafter(
    config: DrafterConfig,
    target: Any,
    key: jax.Array,
    *,
    token_ids: Any | None = None,
    feature_rms: jax.Array | None = None,
    from_target: bool = True,
) -> FastEagle:
    """A FastEagle to train, float32, in the form (stacked or list) that the target is in.

    Args:
      config: its sizes.
      target: the Llama it will draft for.
      key: for the random weights.
      token_ids: int32 [V], the draft vocabulary, where it is reduced.
      feature_rms: float32 [F], root mean square of each feature; inputs are divided by it.
      from_target: start level i from the target's layer L - N + i, the norms from its final norm, and let the input be
        the highest feature with the embedding added; sizes must be the target's. Otherwise all but the norms is random.
    """
    drafter = jax.jit(lambda key: FastEagle(config, key, stacked=target.stacked))(key)
    if token_ids is not None:
        drafter.token_ids[...] = jnp.asarray(token_ids, jnp.int32)
    hidden, num_features = config.hidden_size, len(config.feature_layers)
    rms = jnp.ones((num_features,)) if feature_rms is None else feature_rms
    drafter.feature_scale[...] = jnp.repeat(1 / rms, hidden)
    num_layers = target.config.num_layers
    levels = list(range(num_layers - config.num_levels, num_layers))
    if from_target:
        if levels[0] < 0:
            raise UserError(f"{config.num_levels} levels cannot start from a target of {num_layers} layers")
        if target.stacked:
            copied = jax.tree.map(lambda w: w[jnp.asarray(levels)].astype(jnp.float32), target.layers)
            _copy(drafter.levels.layer, copied)
        else:
            for level, index in zip(drafter.levels, levels, strict=True):
                _copy(level.layer, jax.tree.map(lambda w: w.astype(jnp.float32), target.layers[index]))
        # The stream starts at the size that the copied layers know: that of the highest feature.
        drafter.fc[...] = drafter.fc[...] * 0.0
        drafter.fc[...] = drafter.fc[...].at[-hidden:].set(jnp.eye(hidden) * rms[-1])
        embedding = target.embedding[...].astype(jnp.float32)
        gain = EMBEDDING_SHARE * rms[-1] / jnp.sqrt(jnp.mean(embedding**2))
        drafter.fuse[...] = jnp.concatenate([jnp.eye(hidden), jnp.eye(hidden) * gain])
    norm = target.norm[...].astype(jnp.float32)
    for level in [drafter.levels] if target.stacked else drafter.levels:
        level.norm[...] = jnp.broadcast_to(norm, level.norm[...].shape)
    return jax.tree.map(jnp.copy, drafter)  # the train step donates: no buffer may be the target's, or be there twice


def _copy(into: Any, source: Any) -> None:
    expected, given = jax.tree.map(jnp.shape, into), jax.tree.map(jnp.shape, source)
    if jax.tree.leaves(expected) != jax.tree.leaves(given):
        raise UserError(
            "the drafter's layers differ in size or biases from the target's and cannot start from them: "
            "set from_target=False"
        )
    nnx.update(into, nnx.state(source))


def feature_rms(target: Any, batch: Batch, feature_layers: tuple[int, ...]) -> jax.Array:
    """The size of each feature on a batch, float32 [F]: the median over tokens of a token's root mean square.

    Not the mean: the first token of a text can be a hundred times the size of the others.
    """
    out = target_outputs(target, batch, feature_layers)
    features = out.features.astype(jnp.float32)
    features = features.reshape(*features.shape[:2], len(feature_layers), -1)
    rms = jnp.sqrt(jnp.mean(features**2, axis=-1))  # [B, T, F]
    rms = jnp.where((batch.segments > 0)[..., None], rms, jnp.nan)
    return jnp.nanmedian(rms.reshape(-1, len(feature_layers)), axis=0)


# --- the step ---------------------------------------------------------------------------------------------------


def packed_visible(segments: jax.Array, window: int | None = None) -> jax.Array:
    """bool [B, T, T]: causal within a segment, no further back than the window; padding sees only padding."""
    same = segments[:, :, None] == segments[:, None, :]
    index = jnp.arange(segments.shape[1])
    return same & causal(index[:, None], index, window)


def target_outputs(target: Any, batch: Batch, feature_layers: tuple[int, ...]) -> Any:
    """The frozen target's hidden states and features of a packed batch."""
    out = target(batch.tokens, batch.positions, packed_visible(batch.segments), None, feature_layers)
    return jax.lax.stop_gradient(out)


def in_dtype(params: Any, dtype: Any) -> Any:
    """Parameters with their matrices in `dtype`; vectors (norms) stay float32."""
    return jax.tree.map(lambda p: p.astype(dtype) if p.ndim >= 2 and min(p.shape) > 1 else p, params)


def drafter_loss(
    drafter: Any, target: Any, batch: Batch, key: jax.Array, config: LossConfig
) -> tuple[jax.Array, LevelMetrics]:
    """The drafter's loss float32 [] and metrics on a packed batch; `key` picks the share of positions."""
    out = target_outputs(target, batch, drafter.feature_layers)
    tied = drafter.tie(target)
    next_tokens = jnp.roll(batch.tokens, -1, axis=1)  # at a segment's end it is wrong, and no loss looks there
    visible = packed_visible(batch.segments, drafter.config.window)
    hidden, _ = drafter.hidden_states(tied.embedding, out.features, next_tokens, batch.positions, visible)
    picked, real = select_positions(batch.supervised, batch.positions, config.share, key)
    return level_loss(hidden, out.hidden, batch.positions, picked, real, target.head_rows(), tied.head, config)


def make_train_step(
    graph: Any, constants: Any, optimizer: optax.GradientTransformation, config: LossConfig, dtype: Any, seed: int
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, tuple[jax.Array, jax.Array, LevelMetrics]]]:
    """A compiled step: (state, target, batch) -> (state, (loss, gradient norm, metrics)); the state is consumed.

    `graph`, params and `constants` are what nnx.split(drafter, nnx.Param, ...) gave.
    """

    def step(
        state: TrainState, target: Any, batch: Batch
    ) -> tuple[TrainState, tuple[jax.Array, jax.Array, LevelMetrics]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_of(params: Any) -> tuple[jax.Array, LevelMetrics]:
            drafter = nnx.merge(graph, in_dtype(params, dtype), constants)
            return drafter_loss(drafter, target, batch, key, config)

        (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        norm = optax.tree.norm(gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, optimizer_state, state.step + 1), (loss, norm, metrics)

    return jax.jit(step, donate_argnums=0)
