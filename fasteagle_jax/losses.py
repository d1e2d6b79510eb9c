"""The layer-wise loss of FastEagle, without ever making the logits of a batch.

N levels · B rows · T tokens · S selected target positions · C positions a chunk · H hidden width · V draft vocabulary.
At target position s the target's distribution for token x[s+1] is known; level i guessed that token at stream position
s - i. [B, T, V] never exists: a scan takes C positions at a time, computes the target's distribution once and then,
level
by level, the drafter's logits, the loss and its gradient. The head is frozen, so only hidden states get gradients, and
they are computed in the forward scan: no logits are kept, none are computed twice.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fasteagle_jax.errors import UserError
from fasteagle_jax.layers import head_logits


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss's terms; each level's loss is their sum, then levels are weighted by level_decay ** (i -
    1)."""

    cross_entropy: float = 1.0  # -sum p log q over the draft vocabulary, p the target's probabilities (EAGLE-3)
    total_variation: float = 0.0  # 1 - sum min(p, q): the chance that a sampled guess is rejected
    acceptance: float = 0.0  # -log sum min(p, q): the negative log-likelihood of acceptance
    smooth_l1: float = 0.0  # to the target's final hidden state at the guessed position (EAGLE-1's feature term)
    level_decay: float = 0.8  # EAGLE-3's weights
    last_level_only: bool = False  # supervise level N alone, for comparison
    share: float = 1.0  # of the supervised positions, drawn anew each step
    chunk: int = 256  # C: bounds memory at C x (target vocabulary)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"loss share is {self.share}: it must be above 0 and at most 1")
        if self.chunk < 1:
            raise UserError(f"loss chunk is {self.chunk}: it must be at least 1")


class LevelMetrics(NamedTuple):
    """Means over the selected positions, float32 [N]."""

    loss: jax.Array
    accuracy: jax.Array  # the guess of highest probability is the target's
    acceptance: jax.Array  # sum min(p, q): the chance that a sampled guess is accepted
    count: jax.Array  # type: ignore[assignment]  # positions


def select_positions(
    supervised: jax.Array, positions: jax.Array, share: float, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Target positions that the loss looks at, flat int32 [S] into [B * T], and which are real, bool [S].

    A position s counts when x[s+1] is supervised and level 1 can guess it (positions[s] >= 1). `share` of all B * T
    slots is the size S; a random subset is taken when more count.
    """
    counts = jnp.roll(supervised, -1, axis=1).at[:, -1].set(False) & (positions >= 1)  # [B, T]
    flat = counts.reshape(-1)
    size = max(1, round(share * flat.size))
    order = jnp.where(flat, jax.random.uniform(key, flat.shape), 2.0)
    picked = jnp.sort(jax.lax.top_k(-order, size)[1])
    return picked.astype(jnp.int32), flat[picked]


def level_loss(
    hidden: Any,
    target_hidden: jax.Array,
    positions: jax.Array,
    picked: jax.Array,
    real: jax.Array,
    head: jax.Array,
    draft_head: jax.Array,
    config: LossConfig,
) -> tuple[jax.Array, LevelMetrics]:
    """The loss float32 [] and metrics of N levels at the selected target positions.

    Args:
      hidden: N hidden states [B, T, H] (stack or list), entry i - 1 at stream position t the guess for x[t+1+i].
      target_hidden: the target's final hidden states [B, T, H].
      positions: int32 [B, T], counted from each segment's start.
      picked, real: from `select_positions`.
      head, draft_head: the frozen head's rows [target vocabulary, H] and those of the draft vocabulary [V, H].
      config: the terms.
    """
    num_levels = len(hidden)
    width = target_hidden.shape[-1]
    levels = range(1, num_levels + 1)
    # Level i's guess for the token after s stands at stream position s - i, if the segment reaches back that far.
    chosen = jnp.stack([h.reshape(-1, width)[jnp.maximum(picked - i, 0)] for i, h in zip(levels, hidden, strict=True)])
    depth = positions.reshape(-1)[picked]
    valid = real & (depth >= jnp.asarray(levels)[:, None])  # [N, S]
    count = jnp.maximum(valid.sum(axis=1), 1)  # [N]
    weights = jnp.asarray([_level_weight(i, num_levels, config) for i in levels]) / count

    size = picked.shape[0]
    num_chunks = -(-size // config.chunk)
    pad = num_chunks * config.chunk - size
    chosen = jnp.pad(chosen, ((0, 0), (0, pad), (0, 0)))
    valid = jnp.pad(valid, ((0, 0), (0, pad)))
    at_target = jnp.pad(target_hidden.reshape(-1, width)[picked], ((0, pad), (0, 0)))
    chosen = chosen.reshape(num_levels, num_chunks, -1, width).swapaxes(0, 1)  # [chunks, N, C, H]
    valid = valid.reshape(num_levels, num_chunks, -1).swapaxes(0, 1)  # [chunks, N, C]
    at_target = at_target.reshape(num_chunks, -1, width)  # [chunks, C, H]

    unrolled = isinstance(hidden, list)  # as the levels are, see layers.run_layers
    loss, sums = _chunked(chosen, valid, at_target, weights, head, draft_head, config, unrolled)
    return loss, LevelMetrics(sums[0] / count, sums[1] / count, sums[2] / count, count)


def _level_weight(i: int, num_levels: int, config: LossConfig) -> float:
    if config.last_level_only:
        return float(i == num_levels)
    total = sum(config.level_decay ** (j - 1) for j in range(1, num_levels + 1))
    return config.level_decay ** (i - 1) / total


# --- the scan over chunks, with its gradient --------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _chunked(
    chosen: jax.Array,
    valid: jax.Array,
    at_target: jax.Array,
    weights: jax.Array,
    head: jax.Array,
    draft_head: jax.Array,
    config: LossConfig,
    unrolled: bool,
) -> tuple[jax.Array, jax.Array]:
    """The weighted loss, and sums float32 [3, N] of each level's loss, hits and acceptance."""
    return _scan(chosen, valid, at_target, weights, head, draft_head, config, unrolled, with_gradient=False)[0]


def _chunked_forward(*args: Any) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    result, gradient = _scan(*args, with_gradient=True)
    return result, (gradient, *args[1:6])


def _chunked_backward(
    config: LossConfig, unrolled: bool, saved: tuple[jax.Array, ...], cotangents: Any
) -> tuple[Any, ...]:
    gradient, *_others = saved
    return (gradient * cotangents[0].astype(gradient.dtype), None, None, None, None, None)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _scan(
    chosen: jax.Array,
    valid: jax.Array,
    at_target: jax.Array,
    weights: jax.Array,
    head: jax.Array,
    draft_head: jax.Array,
    config: LossConfig,
    unrolled: bool,
    *,
    with_gradient: bool,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """((loss, sums), gradient of the loss in `chosen`'s shape, or zeros of shape [chunks, N] without it)."""
    whole_vocabulary = draft_head.shape == head.shape

    def one_chunk(carry: Any, chunk: Any) -> tuple[Any, jax.Array]:
        chosen_NCH, valid_NC, target_CH = chunk
        full = head_logits(target_CH, head)  # [C, target vocabulary]
        log_z = jax.nn.logsumexp(full, axis=-1, keepdims=True)
        kept = full if whole_vocabulary else head_logits(target_CH, draft_head)
        p = jnp.exp(kept - log_z)  # [C, V]; sums to the draft vocabulary's share of the mass
        # The draft vocabulary holds the target's first choice when its best logit is the best of all.
        best = jnp.where(kept.max(axis=-1) >= full.max(axis=-1), jnp.argmax(kept, axis=-1), -1)

        def one_level(_: None, level: Any) -> tuple[None, Any]:
            hidden_CH, valid_C, weight = level

            def loss_of(hidden_CH: jax.Array) -> tuple[jax.Array, jax.Array]:
                terms, stats = _terms(hidden_CH, target_CH, p, best, draft_head, config)
                loss = jnp.where(valid_C, terms, 0).sum()
                return weight * loss, jnp.stack([loss, *(jnp.where(valid_C, s, 0).sum() for s in stats)])

            if with_gradient:
                (loss, sums), gradient = jax.value_and_grad(loss_of, has_aux=True)(hidden_CH)
            else:
                (loss, sums), gradient = loss_of(hidden_CH), jnp.zeros(())
            return None, (loss, sums, gradient)

        xs = (chosen_NCH, valid_NC, weights)
        _, (loss_N, sums_N3, gradient) = jax.lax.scan(one_level, None, xs, unroll=unrolled)
        loss, sums = carry
        return (loss + loss_N.sum(), sums + sums_N3.T), gradient

    start = (jnp.zeros(()), jnp.zeros((3, chosen.shape[1])))
    return jax.lax.scan(one_chunk, start, (chosen, valid, at_target), unroll=unrolled)


def _terms(
    hidden: jax.Array, target: jax.Array, p: jax.Array, best: jax.Array, draft_head: jax.Array, config: LossConfig
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Each position's loss float32 [C], and (hit, acceptance) float32 [C] each, of one level's hidden states [C, H]."""
    logits = head_logits(hidden, draft_head)  # [C, V]
    log_q = jax.nn.log_softmax(logits, axis=-1)
    overlap = jnp.minimum(p, jnp.exp(log_q)).sum(axis=-1)
    loss = jnp.zeros(hidden.shape[0])
    if config.cross_entropy:
        loss += config.cross_entropy * -(p * log_q).sum(axis=-1)
    if config.total_variation:
        loss += config.total_variation * (1 - overlap)
    if config.acceptance:
        loss += config.acceptance * -jnp.log(jnp.maximum(overlap, 1e-9))
    if config.smooth_l1:
        gap = hidden.astype(jnp.float32) - target.astype(jnp.float32)
        size = jnp.abs(gap)
        loss += config.smooth_l1 * jnp.where(size < 1, 0.5 * gap * gap, size - 0.5).mean(axis=-1)
    hit = (jnp.argmax(logits, axis=-1) == best).astype(jnp.float32)
    return loss, (hit, jax.lax.stop_gradient(overlap))
