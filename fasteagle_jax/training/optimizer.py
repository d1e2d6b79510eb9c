"""The optimiser and its schedule."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from flax import nnx

from fasteagle_jax.errors import UserError
from fasteagle_jax.training.deepkd import DeepKD, Parts, split_momenta
from fasteagle_jax.training.muon import scale_by_muon

INPUTS = {"fc", "fuse", "reinject"}  # drafters' maps that write the stream


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, Muon or SGD, clipped by global norm; the rate warms up, stays, and falls linearly over the last steps.

    A run can be extended, since the rate before the fall does not depend on the number of steps.
    """

    # adamw; muon: matrices by Muon, norms and tables with a row a token (a head, edge scores) by AdamW with Nesterov's
    # momentum, at one rate; sgd, with momentum.
    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    decay_share: float = 0.2  # of all steps, at the end
    final_share: float = 0.05  # of the peak, at the last step
    betas: tuple[float, float] = (0.9, 0.95)  # of SGD the first alone, its momentum
    # Factor of the rate for the maps that write the stream: features and tokens into it, and the input into each level.
    # A target's stream is many times the size of what they read, and at one rate they hardly move.
    input_rate: float = 1.0
    weight_decay: float = 0.0
    clip_norm: float = 0.5
    ema: float = 0.0  # decay of the weights' moving average, which is then evaluated and stored; 0 for none

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon", "sgd"):
            raise UserError(f"optimizer name is {self.name!r}: use adamw, muon or sgd")
        if not 0 <= self.ema < 1:
            raise UserError(f"optimizer ema is {self.ema}: give a decay from 0 (no average) to below 1, e.g. 0.999")
        for key in ("learning_rate", "clip_norm", "input_rate"):
            if getattr(self, key) <= 0:
                raise UserError(f"optimizer {key} is {getattr(self, key)}: it must be positive")
        if not 0 <= self.decay_share <= 1:
            raise UserError(f"decay_share is {self.decay_share}: it must be 0 to 1")


def make_optimizer(
    config: OptimizerConfig, num_steps: int, deepkd: DeepKD | None = None
) -> optax.GradientTransformation:
    """The optax transformation for a run of `num_steps`; with `deepkd` that of a gradient's three Parts."""
    return _with_input_rate(_of_one_rate(config, num_steps, deepkd), config.input_rate)


def _of_one_rate(config: OptimizerConfig, num_steps: int, deepkd: DeepKD | None) -> optax.GradientTransformation:
    """`make_optimizer` but for `input_rate`."""
    peak, decay_steps = config.learning_rate, round(config.decay_share * num_steps)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, config.warmup_steps),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, peak * config.final_share, max(decay_steps, 1)),
        ],
        [config.warmup_steps, max(config.warmup_steps, num_steps - decay_steps)],
    )
    if deepkd is not None:
        if config.name == "muon":
            raise UserError("optimizer name is 'muon', and loss.deepkd has momenta for adamw and sgd: use one of these")
        return split_momenta(
            schedule,
            _decays(config, deepkd),
            second_decay=config.betas[1] if config.name == "adamw" else None,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
        )
    if config.name == "muon":
        rules = {
            "matrix": optax.chain(
                scale_by_muon(),
                optax.add_decayed_weights(config.weight_decay),
                optax.scale_by_learning_rate(schedule),
            ),
            "other": optax.adamw(schedule, *config.betas, weight_decay=config.weight_decay, nesterov=True),
        }
        rule = optax.partition(rules, _kinds)
    elif config.name == "sgd":
        rule = optax.chain(  # the decay of weights is apart from the momentum, as AdamW's
            optax.trace(config.betas[0]),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(schedule),
        )
    else:
        rule = optax.adamw(schedule, *config.betas, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def _with_input_rate(rule: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
    """The rule, and its state, with the steps of the maps in INPUTS multiplied by a factor."""
    if factor == 1:
        return rule

    def scaled(path: Any, update: jax.Array) -> jax.Array:
        names = {getattr(part, "key", getattr(part, "name", None)) for part in path}
        return update * factor if names & INPUTS else update

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = rule.update(gradients, state, params)
        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(rule.init, update)


def _decays(config: OptimizerConfig, deepkd: DeepKD) -> tuple[float, float, float]:
    """The decays of DeepKD's three momentum buffers; UserError for one that is none."""
    task, target_class, non_target = (config.betas[0] + more for more in deepkd.momenta)
    for name, decay in zip(Parts._fields, (task, target_class, non_target), strict=True):
        if not 0 <= decay < 1:
            raise UserError(
                f"the momentum of {name} is {decay:g}, optimizer.betas' first and a number of loss.deepkd.momenta: "
                "it must be 0 or more and below 1"
            )
    return task, target_class, non_target


def _kinds(params: Any) -> Any:
    """For each of a drafter's parameters its rule of Muon's: "matrix", or "other".

    Other are vectors, and tables with a row a token, whose rows have gradients of their own rather than of a map.
    """

    def of(param: nnx.Variable[Any]) -> Any:
        kind = "matrix" if is_matrix(param) and "vocab" not in param.axes else "other"
        return jax.tree.map(lambda _: kind, param)

    return jax.tree.map(of, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def is_matrix(param: nnx.Variable[Any]) -> bool:
    """Whether a parameter is a matrix by its logical axes, which leave out a stack's dimension."""
    return len(param.axes) == 2
