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
from fasteagle_jax.nn.packed_attention import Packed
from fasteagle_jax.nn.transformer import LayerKinds
from fasteagle_jax.training.step import target_outputs


def init_drafter(
    config: DrafterConfig,
    target: Any,
    key: jax.Array,
    *,
    token_ids: Any | None = None,
    feature_rms: jax.Array | None = None,
    neurons: jax.Array | None = None,
    from_target: bool = True,
) -> Any:
    """A drafter of the configured kind to train, float32, in the form (stacked or list) that the target is in.

    Args:
      config: the drafter's sizes.
      target: what it will draft for.
      key: for the random weights.
      token_ids: int32 [V], the draft vocabulary, if it is reduced.
      feature_rms: float32 [F], root mean square of each feature; inputs are divided by it.
      neurons: int32 [W], those of the target's MLP that a narrower one starts from (see `strongest_neurons`).
      from_target: start layers from the target's last one, by the drafter's `start_from`, where shapes agree.
        Otherwise all but norms and heads is random.
    """
    drafter = jax.jit(lambda key: class_of(config)(config, key, stacked=target.stacked))(key)
    if token_ids is not None:
        drafter.token_ids[...] = jnp.asarray(token_ids, jnp.int32)
    rms = jnp.ones((len(config.feature_layers),)) if feature_rms is None else feature_rms
    drafter.feature_scale[...] = jnp.repeat(1 / rms, config.hidden_size)
    drafter.start_from(target, rms, layers=from_target, neurons=neurons)
    return jax.tree.map(jnp.copy, drafter)  # the train step donates: no buffer may be shared


def drafter_from(
    config: DrafterConfig, trained: Any, *, feature_rms: jax.Array | None = None, stacked: bool = False
) -> Any:
    """A drafter to train, float32, with the weights of a trained one, or of the first levels of one.

    Args:
      config: sizes; all but the number of levels and the window must be the trained drafter's. A correction or edges
        may be new, and then start as in a new drafter.
      trained: a drafter as `load_drafter` gives it, its features' scale folded into fc.
      feature_rms: as of `init_drafter`; the scale is taken out of fc again.
      stacked: whether its levels are one stack rather than a list.

    Raises UserError for sizes that differ.
    """
    old, new = dataclasses.asdict(trained.config), dataclasses.asdict(config)
    old |= {"window": config.window, "num_levels": min(config.num_levels, trained.config.num_levels)}
    for name, others in (("correction", ()), ("edges", ("edges_reach", "edges_gated"))):
        if old.get(name, 0) is None:  # none of its own: the new one's may be another
            old |= {each: new.get(each) for each in (name, *others)}
    if old != new:
        wrong = ", ".join(
            f"{name} {old.get(name)} instead of {new[name]}" for name in new if old.get(name) != new[name]
        )
        raise UserError(f"the drafter to start from has {wrong}: set the run's drafter sizes to its own")
    drafter = class_of(config)(config, jax.random.key(0), stacked=False)
    # In the layout of the file: the two models may hold a matrix in different ones.
    weights = {t.name: t.variable[...].T if t.transposed else t.variable[...] for t in trained.unstacked().stored()}
    for name, variable, transposed in drafter.stored():
        if name not in weights:  # of a new correction, or new edges
            continue
        value = weights[name].T if transposed else weights[name]
        variable[...] = jnp.asarray(value, variable[...].dtype)
    if feature_rms is not None:
        scale = jnp.repeat(1 / feature_rms, config.hidden_size)  # [F*H]
        drafter.feature_scale[...] = scale
        drafter.fc.set_matrix(drafter.fc.matrix / scale[:, None])
    return drafter.stacked_form() if stacked else drafter


def strongest_neurons(
    target: Any, batch: Batch, layer: int, width: int, attention: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """The neurons of a layer's MLP that give most of its output on a batch, int32 [width], ascending.

    These have the highest means over tokens of |what a neuron adds to the output|^2 / |that output|^2. Beside them the
    mean of |what all others add|^2 / |that output|^2, float32 [].
    """
    inputs = target_outputs(target, batch, (layer,), attention).features
    source, kind = target.layer(layer), target.config.layer_kinds[layer]
    context = LayerKinds((kind,), batch.positions, target.config.head_dim, stacked=False).of(0)
    attend = context.attend(Packed(batch.segments, None, attention), None)
    attended, *_ = source.attended(inputs, context.rotation, attend)
    values = source.mlp.neurons(source.mlp_norm(attended)).astype(jnp.float32)  # [B, T, I]
    down = source.mlp.down.matrix.astype(jnp.float32)  # [I, H]
    real = batch.segments > 0
    size = jnp.where(real, ((values @ down) ** 2).sum(axis=-1), 1)  # [B, T]
    added = values**2 * (down**2).sum(axis=-1) / size[..., None]
    chosen = jnp.sort(jax.lax.top_k(jnp.where(real[..., None], added, 0).sum(axis=(0, 1)), width)[1])
    others = jnp.ones(values.shape[-1]).at[chosen].set(0)
    left_out = (((values * others) @ down) ** 2).sum(axis=-1) / size
    return chosen, jnp.where(real, left_out, 0).sum() / real.sum()


def feature_rms(
    target: Any,
    batch: Batch,
    feature_layers: tuple[int, ...],
    attention: str = "auto",
    values: TargetValues | None = None,
) -> jax.Array:
    """The root mean square of each feature on a batch, float32 [F]: the median over tokens.

    Not the mean: the first token of a text can be a hundred times the size of the others. `values` are the target's
    if they are computed already, with these features first.
    """
    features = (values or target_outputs(target, batch, feature_layers, attention)).features.astype(jnp.float32)
    num_features, hidden = len(feature_layers), target.config.hidden_size
    features = features[..., : num_features * hidden].reshape(*features.shape[:2], num_features, hidden)
    rms = jnp.sqrt(jnp.mean(features**2, axis=-1))  # [B, T, F]
    rms = jnp.where((batch.segments > 0)[..., None], rms, jnp.nan)
    return jnp.nanmedian(rms.reshape(-1, len(feature_layers)), axis=0)
