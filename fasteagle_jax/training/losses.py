"""The layer-wise loss of FastEagle, without ever making the logits of a batch.

N levels · B rows · T tokens · S selected target positions a row · C of them a chunk · H hidden width · V draft
vocabulary.
At target position s the target's distribution for token x[s+1] is known; level i guessed that token at stream position
s - i. [B, T, V] never exists: a scan takes C positions of every row at a time, computes the target's distribution once
and then, level by level, the drafter's logits, the loss and its gradient. The target's head is frozen, so only hidden
states (and a drafter's own head) get gradients, which the forward scan computes: no logits are kept or recomputed. Rows
stay on their devices of a mesh, and so do the shards of the vocabulary: only their maxima and sums are exchanged.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fasteagle_jax.devices.sharding import constrain
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.linear import LogitMap, head_logits
from fasteagle_jax.training.deepkd import DeepKD, part_losses, teacher, value_and_jacobian

SPAN = 32  # tokens of a stretch, where the loss looks at whole stretches


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss's terms, whose sum is a level's loss; level i's weight is level_decay ** (i - 1)."""

    cross_entropy: float = 1.0  # -sum p log q over the draft vocabulary, p the target's probabilities (EAGLE-3)
    total_variation: float = 0.0  # 1 - sum min(p, q): the chance that a sampled guess is rejected
    acceptance: float = 0.0  # -log sum min(p, q): the negative log-likelihood of acceptance
    smooth_l1: float = 0.0  # to the target's final hidden state at the guessed position (EAGLE-1's feature term)
    # Cross-entropy of the guesses without edge scores (see drafters/edges.py), of which drafts take their candidates.
    without_edges: float = 0.0
    level_decay: float = 0.8  # EAGLE-3's weights
    last_level_only: bool = False  # supervise level N alone, for comparison
    # The target's softmax over the draft vocabulary alone, and no loss if its best token is outside (EAGLE-3).
    within_draft: bool = False
    share: float = 1.0  # of a row's T slots: the most supervised positions that a step looks at, drawn anew each step
    chunk: int = 256  # positions of all rows together: memory is bounded by this many x (target vocabulary)
    deepkd: DeepKD | None = None  # the loss in DeepKD's three parts, in place of the terms above; None for these

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"loss share is {self.share}: it must be above 0 and at most 1")
        if self.chunk < 1:
            raise UserError(f"loss chunk is {self.chunk}: it must be at least 1")
        terms = self.cross_entropy, self.total_variation, self.acceptance, self.smooth_l1, self.without_edges
        if self.deepkd is not None and terms != (1, 0, 0, 0, 0):
            raise UserError(
                f"loss cross_entropy, total_variation, acceptance, smooth_l1 and without_edges are {terms}, and "
                "loss.deepkd has three parts and weights of its own: leave these five at 1, 0, 0, 0 and 0"
            )

    @property
    def backward_passes(self) -> int:
        """The number of gradients that a step keeps apart."""
        return 1 if self.deepkd is None else 3


class LevelMetrics(NamedTuple):
    """Means over the selected positions, float32 [N]."""

    loss: jax.Array
    accuracy: jax.Array  # the guess of highest probability is the target's
    acceptance: jax.Array  # sum min(p, q): the chance that a sampled guess is accepted
    count: jax.Array  # type: ignore[assignment]  # positions
    # int32 [N], of DeepKD: of these positions those without a loss, as their label is outside of the draft vocabulary.
    left_out: jax.Array | None = None


def select_positions(
    supervised: jax.Array, positions: jax.Array, share: float, key: jax.Array, span: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Each row's target positions that the loss looks at, int32 [B, S], and which of them count, bool [B, S].

    A position s counts if x[s+1] is supervised and level 1 can guess it (positions[s] >= 1). S is `share` of a row's T
    slots; if more positions count, it is a random subset of them. They are taken in stretches of `span` tokens, which
    divides T; a stretch is as likely as any other where a position of it counts.
    """
    counts = jnp.roll(supervised, -1, axis=1).at[:, -1].set(False) & (positions >= 1)  # [B, T]
    stretches = counts.reshape(len(counts), -1, span).any(axis=-1)  # [B, T / span]
    size = max(1, round(share * stretches.shape[1]))
    order = jnp.where(stretches, jax.random.uniform(key, stretches.shape), 2.0)
    first = span * jnp.sort(jax.lax.top_k(-order, size)[1], axis=1)
    picked = (first[..., None] + jnp.arange(span)).reshape(len(counts), -1).astype(jnp.int32)
    return picked, jnp.take_along_axis(counts, picked, axis=1)


def span_of(num_tokens: int) -> int:
    """The tokens of a stretch in rows of so many: at most SPAN."""
    return math.gcd(num_tokens, SPAN)


def stretches_read(picked: jax.Array, span: int, num_levels: int) -> tuple[jax.Array, list[jax.Array]]:
    """The stream positions that N levels need for their guesses at `picked` target positions, in stretches of `span`.

    Returns int32 [B, A], A = S (span + N - 1) / span, and for each level its guesses' places among them, int32 [B, S].
    """
    first = picked[:, ::span]  # [B, S / span]
    size = span + num_levels - 1
    at = first[..., None] - num_levels + jnp.arange(size)  # level i's guess for the token after s stands at s - i
    start = (size * jnp.arange(first.shape[1]))[:, None] + jnp.arange(span)  # [S / span, span]
    places = [jnp.broadcast_to((start + num_levels - i).reshape(-1), picked.shape) for i in range(1, num_levels + 1)]
    return jnp.maximum(at, 0).reshape(len(picked), -1), places


def level_loss(
    hidden: Any,
    target_hidden: jax.Array,
    positions: jax.Array,
    picked: jax.Array,
    real: jax.Array,
    head: jax.Array,
    token_ids: jax.Array | None,
    config: LossConfig,
    own_head: jax.Array | None = None,
    level_share: jax.Array | None = None,
    logit_map: LogitMap = LogitMap(),  # noqa: B008  # immutable
    num_kept: jax.Array | None = None,
    places: list[jax.Array] | None = None,
) -> tuple[jax.Array, LevelMetrics]:
    """The loss float32 [] and metrics of N levels at the selected target positions; of DeepKD three losses [3].

    Args:
      hidden: N hidden states [B, T, H] (stack or list), entry i - 1 at stream position t the guess for x[t+1+i].
      target_hidden: the target's final hidden states [B, T, H].
      positions: int32 [B, T], counted from each segment's start.
      picked, real: from `select_positions`.
      head: the frozen head's rows [target vocabulary, H].
      token_ids: int32 [V], those of the draft vocabulary; None for all.
      config: the terms.
      own_head: [V, R] of a drafter that has one, which gets a gradient: it reads the last R entries of hidden states,
        and its products are added to those that the frozen head's rows give with the H entries before, if there are any
        (R = H for EAGLE-3, which has no others). None for a drafter that uses the frozen head's rows alone.
      level_share: float32 [N], factors of the levels' losses, as a microbatch has them; None for 1.
      logit_map: the target's, from the products with `head` to logits; a head of the drafter's own has none.
      num_kept: int32 [], DeepKD's K; None for no mask.
      places: of each level int32 [B, S], where along T its hidden state for each picked position is, if `hidden` is of
        some stream positions alone (see stretches_read); None: of all.
    """
    num_levels, (batch, size) = len(hidden), picked.shape
    levels = range(1, num_levels + 1)
    # Level i's guess for the token after s stands at stream position s - i, if the segment reaches back that far.
    at_level = [jnp.maximum(picked - i, 0) for i in levels] if places is None else places
    at_guess = [jnp.take_along_axis(h, at[..., None], axis=1) for h, at in zip(hidden, at_level, strict=True)]
    depth = jnp.take_along_axis(positions, picked, axis=1)
    valid = real & (depth >= jnp.asarray(levels)[:, None, None])  # [N, B, S]
    count = jnp.maximum(valid.sum(axis=(1, 2)), 1)  # [N]
    weights = jnp.asarray(level_weights(num_levels, config)) / count
    if level_share is not None:
        weights *= level_share

    per_chunk = min(max(config.chunk // batch, 1), size)  # C
    num_chunks = -(-size // per_chunk)
    pad = num_chunks * per_chunk - size

    def in_chunks(x: jax.Array) -> jax.Array:
        """[..., B, S, H] as [chunks, ..., B, C, H]."""
        x = jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, pad), (0, 0)))
        x = jnp.moveaxis(x.reshape(*x.shape[:-2], num_chunks, per_chunk, x.shape[-1]), -3, 0)
        return constrain(x, *[None] * (x.ndim - 3), "batch", None, None)

    chosen = in_chunks(jnp.stack(at_guess))  # [chunks, N, B, C, H]
    valid = in_chunks(valid[..., None])[..., 0]  # [chunks, N, B, C]
    at_target = in_chunks(jnp.take_along_axis(target_hidden, picked[..., None], axis=1))  # [chunks, B, C, H]

    draft_head, in_draft = head, None
    if token_ids is not None:
        draft_head, in_draft = head[token_ids], jnp.zeros(head.shape[:1], bool).at[token_ids].set(True)
    unrolled = isinstance(hidden, list)  # as the levels are, see transformer.run_layers
    heads = head, draft_head, in_draft, own_head
    loss, sums = _chunked(chosen, valid, at_target, weights, *heads, num_kept, config, logit_map, unrolled)
    left_out = None if config.deepkd is None else jnp.round(sums[3]).astype(jnp.int32)
    return loss, LevelMetrics(sums[0] / count, sums[1] / count, sums[2] / count, count, left_out)


def level_weights(num_levels: int, config: LossConfig) -> list[float]:
    """The share of each of N levels' losses in the whole; they add up to 1."""
    if config.last_level_only:
        return [0.0] * (num_levels - 1) + [1.0]
    weights = [config.level_decay**i for i in range(num_levels)]
    return [weight / sum(weights) for weight in weights]


# --- the scan over chunks, with its gradient --------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(9, 10, 11))
def _chunked(
    chosen: jax.Array,
    valid: jax.Array,
    at_target: jax.Array,
    weights: jax.Array,
    head: jax.Array,
    draft_head: jax.Array,
    in_draft: jax.Array | None,
    own_head: jax.Array | None,
    num_kept: jax.Array | None,
    config: LossConfig,
    logit_map: LogitMap,
    unrolled: bool,
) -> tuple[jax.Array, jax.Array]:
    """The weighted loss, and sums float32 [3, N] of each level's loss, hits and acceptance.

    Of DeepKD three losses [3], and sums [4, N] with the positions that are left out.
    """
    heads = head, draft_head, in_draft, own_head
    args = chosen, valid, at_target, weights, *heads, num_kept, config, logit_map, unrolled
    return _scan(*args, with_gradient=False)[0]


def _chunked_forward(*args: Any) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    result, gradients = _scan(*args, with_gradient=True)
    return result, gradients


def _chunked_backward(
    config: LossConfig, logit_map: LogitMap, unrolled: bool, saved: tuple[Any, ...], cotangents: Any
) -> tuple[Any, ...]:
    def pull_back(gradient: jax.Array, parts_axis: int) -> jax.Array:
        cotangent = cotangents[0].astype(gradient.dtype)
        if config.deepkd is None:
            return gradient * cotangent
        # No product of matrices, which an accelerator may round.
        across = (-1,) + (1,) * (gradient.ndim - 1 - parts_axis)
        return (gradient * cotangent.reshape(across)).sum(axis=parts_axis)

    # [chunks, N, 3, B, C, H] and [3, V, R], without the 3 but for DeepKD.
    grad_chosen, grad_own_head = (
        None if g is None else pull_back(g, axis) for g, axis in zip(saved, (2, 0), strict=True)
    )
    return (grad_chosen, None, None, None, None, None, None, grad_own_head, None)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _scan(
    chosen: jax.Array,
    valid: jax.Array,
    at_target: jax.Array,
    weights: jax.Array,
    head: jax.Array,
    draft_head: jax.Array,
    in_draft: jax.Array | None,
    own_head: jax.Array | None,
    num_kept: jax.Array | None,
    config: LossConfig,
    logit_map: LogitMap,
    unrolled: bool,
    *,
    with_gradient: bool,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, Any]]:
    """((loss, sums), gradients of the loss in `chosen` and `own_head`), each None if it is not wanted.

    Of DeepKD each of the three losses has its gradient: [chunks, N, 3, B, C, H] and [3, V, R].
    """
    deepkd = config.deepkd
    differentiated = jax.value_and_grad if deepkd is None else value_and_jacobian
    parts = () if deepkd is None else (3,)
    # All-gathered over `fsdp` here, once, rather than for every chunk and level.
    head, draft_head = constrain(head, "vocab", None), constrain(draft_head, "vocab", None)
    trains_head = own_head is not None and with_gradient
    drafter_head = draft_head if own_head is None else own_head

    def one_chunk(carry: Any, chunk: Any) -> tuple[Any, jax.Array]:
        chosen_NBCH, valid_NBC, target_BCH = chunk
        full = constrain(logit_map(head_logits(target_BCH, head)), "batch", None, "vocab")  # [B, C, target vocabulary]
        kept = full if in_draft is None else logit_map(head_logits(target_BCH, draft_head))
        log_z = jax.nn.logsumexp(kept if config.within_draft else full, axis=-1, keepdims=True)
        p = jnp.exp(kept - log_z)  # [B, C, V]; sums to the draft vocabulary's share of the mass
        # Whether the draft vocabulary has the target's first choice: within one product, as two may round differently.
        # Maxima rather than argmax, which a CPU is slower at; a split vocabulary exchanges no more.
        has_first = jnp.ones(full.shape[:-1], bool)  # [B, C]
        if in_draft is not None:
            has_first = jnp.where(in_draft, full, -jnp.inf).max(axis=-1) >= full.max(axis=-1)
        best = has_first[..., None] & (p >= p.max(axis=-1, keepdims=True))  # [B, C, V]
        counted = has_first if config.within_draft or deepkd is not None else jnp.ones(has_first.shape, bool)
        losses_of = None
        if deepkd is not None:
            taught = teacher(kept, None if config.within_draft or in_draft is None else full, deepkd, num_kept)
            losses_of = functools.partial(part_losses, teacher=taught, config=deepkd)

        def one_level(grad_head: Any, level: Any) -> tuple[Any, Any]:
            hidden_BCH, valid_BC, weight = level

            def loss_of(hidden_BCH: jax.Array, drafter_head: jax.Array) -> tuple[jax.Array, jax.Array]:
                width = hidden_BCH.shape[-1] - (0 if own_head is None else own_head.shape[-1])
                logits: Any = logit_map(head_logits(hidden_BCH[..., :width], draft_head)) if width else 0.0
                without_edges = logits
                if own_head is not None:
                    logits += head_logits(hidden_BCH[..., width:], drafter_head, trains_head)
                logits = constrain(logits, "batch", None, "vocab")  # [B, C, V]
                hidden = hidden_BCH[..., : target_BCH.shape[-1]]
                terms, stats = _terms(logits, hidden, target_BCH, p, best, config)
                if losses_of is None:
                    if config.without_edges and own_head is not None and width:
                        log_q = jax.nn.log_softmax(constrain(without_edges, "batch", None, "vocab"), axis=-1)
                        terms += config.without_edges * -(p * log_q).sum(axis=-1)
                    loss = jnp.where(valid_BC & counted, terms, 0).sum()
                    return weight * loss, jnp.stack([loss, *(jnp.where(valid_BC, s, 0).sum() for s in stats)])
                losses = jnp.where(valid_BC & counted, losses_of(logits), 0).sum(axis=(1, 2))  # [3]
                sums = [losses.sum(), *(jnp.where(valid_BC, s, 0).sum() for s in (*stats, ~counted))]
                return weight * losses, jnp.stack(sums)

            gradient = jnp.zeros(())
            if trains_head:
                grad = differentiated(loss_of, argnums=(0, 1), has_aux=True)
                (loss, sums), (gradient, head_gradient) = grad(hidden_BCH, drafter_head)
                grad_head = grad_head + head_gradient.astype(jnp.float32)
            elif with_gradient:
                (loss, sums), gradient = differentiated(loss_of, has_aux=True)(hidden_BCH, drafter_head)
            else:
                loss, sums = loss_of(hidden_BCH, drafter_head)
            return grad_head, (loss, sums, gradient)

        loss, sums, grad_head = carry
        xs = (chosen_NBCH, valid_NBC, weights)
        grad_head, (loss_N, sums_N3, gradient) = jax.lax.scan(one_level, grad_head, xs, unroll=unrolled)
        return (loss + loss_N.sum(axis=0), sums + sums_N3.T, grad_head), gradient

    grad_head = jnp.zeros((*parts, *drafter_head.shape) if trains_head else ())
    start = (jnp.zeros(parts), jnp.zeros((3 if deepkd is None else 4, chosen.shape[1])), grad_head)
    (loss, sums, grad_head), gradient = jax.lax.scan(one_chunk, start, (chosen, valid, at_target), unroll=unrolled)
    return (loss, sums), (
        gradient if with_gradient else None,
        grad_head.astype(drafter_head.dtype) if trains_head else None,
    )


def _terms(
    logits: jax.Array, hidden: jax.Array, target: jax.Array, p: jax.Array, best: jax.Array, config: LossConfig
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Each position's loss float32 [B, C], and (hit, acceptance) likewise, of a level's logits [B, C, V].

    `best`, bool [B, C, V], marks the target's first choice.
    """
    log_q = jax.nn.log_softmax(logits, axis=-1)
    overlap = jnp.minimum(p, jnp.exp(log_q)).sum(axis=-1)
    loss = jnp.zeros(hidden.shape[:-1])
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
    hit = jnp.where(best, logits, -jnp.inf).max(axis=-1) >= logits.max(axis=-1)
    return loss, (hit.astype(jnp.float32), jax.lax.stop_gradient(overlap))
