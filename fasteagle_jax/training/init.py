"""The first weights of a drafter.

B rows · T tokens · F feature layers · V draft vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fasteagle_jax.data.features import TargetValues
from fasteagle_jax.data.packing import Batch
from fasteagle_jax.drafters.base import DrafterConfig
from fasteagle_jax.drafters.table import class_of
from fasteagle_jax.errors import UserError
from fasteagle_jax.training.step import target_outputs


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
    weights = {t.name: t.variable[...].T if t.transposed else t.variable[...] for t in trained.unstacked().stored()}
    for name, variable, transposed in drafter.stored():
        if name not in weights:  # of a new correction
            continue
        value = weights[name].T if transposed else weights[name]
        variable[...] = jnp.asarray(value, variable[...].dtype)
    if feature_rms is not None:
        scale = jnp.repeat(1 / feature_rms, config.hidden_size)  # [F*H]
        drafter.feature_scale[...] = scale
        drafter.fc.set_matrix(drafter.fc.matrix / scale[:, None])
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
