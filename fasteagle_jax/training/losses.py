"""The layer-wise loss of FastEagle, without ever making the logits of a batch.

N levels · B rows · T tokens · S selected target positions a row · C of them a chunk · H hidden width · V draft
vocabulary.
At target position s the target's distribution for token x[s+1] is known; level i guessed that token at stream position
s - i. [B, T, V] never exists: a scan takes C positions of every row at a time, computes the target's distribution once
and then, level by level, the drafter's logits, the loss and its gradient. The target's head is frozen, so only hidden
states (and a drafter's own head) get gradients, which the forward scan computes: no logits are kept or recomputed. Rows
stay on their devices of a mesh, and so do the shards of the vocabulary: only their maxima and sums are exchanged.

The guesses from one stream position t are a path: level i's is at target position t + i. Weights that depend on the
other guesses of the path need a scan before, without gradients, for which positions are picked in runs.
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

# Of these a level's loss is the weighted sum; all but the last compare the target's distribution with the drafter's.
TERMS = ("cross_entropy", "total_variation", "acceptance", "hybrid", "smooth_l1")
SPAN = 32  # tokens of a stretch, where the loss looks at whole stretches


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss's terms, whose sum is a level's loss; level i's weight is level_decay ** (i - 1)."""

    cross_entropy: float = 1.0  # -sum p log q over the draft vocabulary, p the target's probabilities (EAGLE-3)
    total_variation: float = 0.0  # 1 - sum min(p, q): the chance that a sampled guess is rejected
    acceptance: float = 0.0  # -log sum min(p, q): the negative log-likelihood of acceptance (LK, arXiv 2602.23881)
    smooth_l1: float = 0.0  # to the target's final hidden state at the guessed position (EAGLE-1's feature term)
    # The loss of the guesses without edge scores or correction, of which drafts take their candidates: beside 1 of the
    # whole guesses; with a curriculum the share that they have at first, the whole guesses having the rest.
    without_edges: float = 0.0
    # L KL + (1 - L) TV with L = exp(-hybrid_rate x acceptance): KL while guesses are poor, then TV (LK's hybrid).
    hybrid: float = 0.0
    hybrid_rate: float = 3.0
    level_decay: float = 0.8  # EAGLE-3's weights
    last_level_only: bool = False  # supervise level N alone, for comparison
    # Weigh each guess by the gradient of its path's expected accepted length in the log of the guess's acceptance, in
    # place of level_decay (D-PACE, arXiv 2605.18810); acceptances are raised to smoothing + (1 - smoothing) a first.
    expected_length: bool = False
    smoothing: float = 0.5
    after_wrong: float = 1.0  # weight of the loss after a path's first wrong guess, which a draft never reaches
    curriculum: float = 0.0  # share of the run's steps in which `without_edges` moves to its end, linearly
    without_edges_end: float = 0.0
    tv_last: float = 0.0  # share of the run's steps, at the end, in which total variation is the only term
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
        for name in ("smoothing", "after_wrong", "curriculum", "without_edges_end", "tv_last"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"loss {name} is {getattr(self, name)}: it must be 0 to 1")
        if self.curriculum and not 0 <= self.without_edges <= 1:
            raise UserError(f"loss without_edges is {self.without_edges}: with a curriculum it is a share, give 0 to 1")
        if self.expected_length and self.last_level_only:
            raise UserError("loss expected_length weighs all levels and last_level_only one: set one of them to False")
        if self.deepkd is not None:
            own = {field.name for field in dataclasses.fields(self)} - OF_ANY_LOSS
            changed = [f.name for f in dataclasses.fields(self) if f.name in own and getattr(self, f.name) != f.default]
            if changed:
                raise UserError(
                    f"loss {', '.join(changed)} cannot be used with loss.deepkd, which has three parts and weights of "
                    "its own: leave the default, or set loss.deepkd=None"
                )

    @property
    def backward_passes(self) -> int:
        """The number of gradients that a step keeps apart."""
        return 1 if self.deepkd is None else 3

    @property
    def whole_paths(self) -> bool:
        """Whether a guess's weight depends on the other guesses of its path."""
        return self.expected_length or self.after_wrong != 1

    @property
    def scheduled(self) -> bool:
        """Whether the terms' weights depend on the share of the run that is done."""
        return bool(self.curriculum or self.tv_last)

    @property
    def weighs_without_edges(self) -> bool:
        """Whether the guesses without edge scores or correction have a weight, at some time of the run."""
        return bool(self.without_edges or (self.curriculum and self.without_edges_end))

    def uses(self, term: str) -> bool:
        """Whether one of TERMS has a weight, at some time of the run."""
        return bool(getattr(self, term) or (term == "total_variation" and self.tv_last))

    def mix(self, done: jax.Array | float) -> Mix:
        """The weights when this share of the run's steps is done."""
        terms = jnp.asarray([getattr(self, term) for term in TERMS], jnp.float32)
        if self.tv_last:
            only = jnp.asarray([term == "total_variation" for term in TERMS], jnp.float32)
            terms = jnp.where(done >= 1 - self.tv_last, only, terms)
        if not self.curriculum:
            return Mix(terms, jnp.float32(1), jnp.float32(self.without_edges))
        moved = jnp.minimum(jnp.float32(done) / self.curriculum, 1)
        without_edges = (1 - moved) * self.without_edges + moved * self.without_edges_end
        return Mix(terms, 1 - without_edges, without_edges)


# Fields that DeepKD's loss has too.
OF_ANY_LOSS = {"level_decay", "last_level_only", "within_draft", "share", "chunk", "deepkd"}


class Mix(NamedTuple):
    """Weights of a level's loss; float32."""

    terms: jax.Array  # [5], in the order of TERMS
    whole: jax.Array  # [], of the guesses
    without_edges: jax.Array  # [], of the guesses without edge scores or correction


class LevelMetrics(NamedTuple):
    """Means over the selected positions, float32 [N]."""

    loss: jax.Array
    accuracy: jax.Array  # the guess of highest probability is the target's
    acceptance: jax.Array  # sum min(p, q): the chance that a sampled guess is accepted
    count: jax.Array  # type: ignore[assignment]  # positions
    # int32 [N], of DeepKD: of these positions those without a loss, as their label is outside of the draft vocabulary.
    left_out: jax.Array | None = None


class PathSums(NamedTuple):
    """Sums over guesses, and over the paths that the guesses of one stream position make."""

    count: jax.Array  # type: ignore[assignment]  # int32 [N]; the first is also the number of paths
    hits: jax.Array  # int32 [N]: the guess of highest probability is the target's
    accepted: jax.Array  # float32 [N], of sum min(p, q)
    run: jax.Array  # float32 [], of the number of leading hits of a path
    length: jax.Array  # float32 [], of the accepted length that is expected of a path's sum min(p, q)


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


def counted_guesses(
    picked: jax.Array, real: jax.Array, positions: jax.Array, num_levels: int, whole_paths: bool
) -> jax.Array:
    """Which guesses count, bool [N, B, S]: those of level i at target position s whose segment reaches back i tokens.

    With `whole_paths`, the guesses before it on its path must count too.
    """
    levels = jnp.arange(1, num_levels + 1)[:, None, None]
    depth = jnp.take_along_axis(positions, picked, axis=1)
    counted = real & (depth >= levels)
    if not whole_paths:
        return counted
    # Path by path: level i's guess at s, of the path from t = s - i, comes after those at s - 1, s - 2, ... t + 1.
    whole = jnp.cumprod(_by_path(counted, picked, positions.shape[1]), axis=0)
    return _at_picked(whole, picked) > 0


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
    done: jax.Array | float = 0.0,
    places: list[jax.Array] | None = None,
) -> tuple[jax.Array, LevelMetrics]:
    """The loss float32 [] and metrics of N levels at the selected target positions; of DeepKD three losses [3].

    Args:
      hidden: N hidden states [B, T, H] (stack or list), entry i - 1 at stream position t the guess for x[t+1+i]. They
        may be followed by H entries of the guess without a correction.
      target_hidden: the target's final hidden states [B, T, H].
      positions: int32 [B, T], counted from each segment's start.
      picked, real: from `select_positions`.
      head: the frozen head's rows [target vocabulary, H].
      token_ids: int32 [V], those of the draft vocabulary; None for all.
      config: the terms.
      own_head: [V, R] of a drafter that has one, which gets a gradient: it reads the last R entries of hidden states,
        and its products are added to those that the frozen head's rows give with the H entries before, if there are any
        (R = H for EAGLE-3, which has no others; of more, the columns after H are edges'). None for a drafter that uses
        the frozen head's rows alone.
      level_share: float32 [N], factors of the levels' losses, as a microbatch has them; None for 1.
      logit_map: the target's, from the products with `head` to logits; a head of the drafter's own has none.
      num_kept: int32 [], DeepKD's K; None for no mask.
      done: float32 [], the share of the run's steps that is done, for the schedules of `config`.
      places: of each level int32 [B, S], where along T its hidden state for each picked position is, if `hidden` is of
        some stream positions alone (see stretches_read); None: of all.
    """
    valid = counted_guesses(picked, real, positions, len(hidden), config.whole_paths)  # [N, B, S]
    count = jnp.maximum(valid.sum(axis=(1, 2)), 1)  # [N]
    weights = jnp.asarray(level_weights(len(hidden), config)) / count
    if level_share is not None:
        weights *= level_share
    made = _in_chunks(hidden, target_hidden, picked, valid, head, token_ids, own_head, config.chunk, places)
    factors = None
    if config.whole_paths:
        hits, accepted = _stats(made, picked, config.within_draft, logit_map)
        factors = path_factors(hits, accepted, valid, picked, positions.shape[1], config)
        factors = _split(factors[..., None], made.chosen.shape[3])[..., 0]
    chunks = made.chosen, made.valid, factors, made.at_target, weights
    # Levels that are a list are unrolled here too, see transformer.run_layers.
    loss, sums = _chunked(*chunks, *made.heads, num_kept, config.mix(done), config, logit_map, isinstance(hidden, list))
    left_out = None if config.deepkd is None else jnp.round(sums[3]).astype(jnp.int32)
    return loss, LevelMetrics(sums[0] / count, sums[1] / count, sums[2] / count, count, left_out)


def path_sums(
    hidden: Any,
    target_hidden: jax.Array,
    positions: jax.Array,
    picked: jax.Array,
    real: jax.Array,
    head: jax.Array,
    token_ids: jax.Array | None,
    config: LossConfig,
    own_head: jax.Array | None = None,
    logit_map: LogitMap = LogitMap(),  # noqa: B008  # immutable
) -> PathSums:
    """Sums over the guesses and the paths of a batch, given the true tokens; for the arguments see `level_loss`."""
    valid = counted_guesses(picked, real, positions, len(hidden), True)
    made = _in_chunks(hidden, target_hidden, picked, valid, head, token_ids, own_head, config.chunk)
    hits, accepted = _stats(made, picked, config.within_draft, logit_map)
    # The sum over m of a_1 ... a_m of each path, as float32 [N, B, T] before the sum.
    run, length = (
        jnp.cumprod(_by_path(jnp.where(valid, x, 0.0), picked, positions.shape[1]), axis=0).sum()
        for x in (hits, accepted)
    )
    count, right, overlap = (jnp.where(valid, x, 0).sum(axis=(1, 2)) for x in (1, hits, accepted))
    return PathSums(count, right, overlap, run, length)


def level_weights(num_levels: int, config: LossConfig) -> list[float]:
    """The share of each of N levels' losses in the whole; they add up to 1."""
    if config.last_level_only:
        return [0.0] * (num_levels - 1) + [1.0]
    if config.expected_length:
        return [1 / num_levels] * num_levels
    weights = [config.level_decay**i for i in range(num_levels)]
    return [weight / sum(weights) for weight in weights]


# --- weights along a path ---------------------------------------------------------------------------------------


def path_factors(
    hits: jax.Array,
    accepted: jax.Array,
    valid: jax.Array,
    picked: jax.Array,
    num_tokens: int,
    config: LossConfig,
) -> jax.Array:
    """Factors float32 [N, B, S] of the losses of guesses, by the guesses of their paths.

    With a path's acceptances a_1 ... a_N its expected accepted length is the sum over m of a_1 ... a_m, whose
    derivative in log a_i is the sum over m >= i of a_1 ... a_m (D-PACE, equation 8). A guess that does not count is
    taken as not accepted.

    Args:
      hits, accepted: bool and float32 [N, B, S]: the guess is the target's first choice; sum min(p, q).
      valid: bool [N, B, S], from `counted_guesses` with `whole_paths`.
      picked: int32 [B, S].
      num_tokens: T.
      config: which weights.
    """
    factors = jnp.ones(accepted.shape)
    if config.expected_length:
        smooth = jnp.where(valid, config.smoothing + (1 - config.smoothing) * accepted, 0)
        length = jnp.cumprod(_by_path(smooth, picked, num_tokens), axis=0)
        factors *= _at_picked(jnp.cumsum(length[::-1], axis=0)[::-1], picked)
    if config.after_wrong != 1:
        right = jnp.cumprod(_by_path(hits & valid, picked, num_tokens), axis=0)
        before = jnp.concatenate([jnp.ones_like(right[:1]), right[:-1]])
        factors *= jnp.where(_at_picked(before, picked) > 0, 1, config.after_wrong)
    return factors


def _by_path(values: jax.Array, picked: jax.Array, num_tokens: int) -> jax.Array:
    """Values [N, B, S] of guesses at picked target positions, by their paths [N, B, T]; 0 where there is none."""
    rows = jnp.arange(len(picked))[:, None]
    at_target = jnp.zeros((*values.shape[:2], num_tokens), values.dtype).at[:, rows, picked].set(values)
    return jnp.stack([jnp.roll(level, -i, axis=1) for i, level in enumerate(at_target, 1)])


def _at_picked(by_path: jax.Array, picked: jax.Array) -> jax.Array:
    """The reverse of `_by_path`: [N, B, S]."""
    at_target = jnp.stack([jnp.roll(level, i, axis=1) for i, level in enumerate(by_path, 1)])
    return jnp.take_along_axis(at_target, picked[None], axis=2)


# --- chunks of positions ----------------------------------------------------------------------------------------


class _Chunks(NamedTuple):
    """What the scan over chunks reads."""

    chosen: jax.Array  # [chunks, N, B, C, H]
    valid: jax.Array  # bool [chunks, N, B, C]
    at_target: jax.Array  # [chunks, B, C, H]
    heads: tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]  # whole, draft, in draft, own


def _in_chunks(
    hidden: Any,
    target_hidden: jax.Array,
    picked: jax.Array,
    valid: jax.Array,
    head: jax.Array,
    token_ids: jax.Array | None,
    own_head: jax.Array | None,
    chunk: int,
    places: list[jax.Array] | None = None,
) -> _Chunks:
    """The states of the guesses at picked positions, in chunks of so many positions of all rows."""
    # Level i's guess for the token after s stands at stream position s - i, if the segment reaches back that far.
    if places is None:
        places = [jnp.maximum(picked - i, 0) for i in range(1, len(hidden) + 1)]
    at_guess = [jnp.take_along_axis(h, place[..., None], axis=1) for h, place in zip(hidden, places, strict=True)]
    batch, size = picked.shape
    per_chunk = min(max(chunk // batch, 1), size)  # C
    draft_head, in_draft = head, None
    if token_ids is not None:
        draft_head, in_draft = head[token_ids], jnp.zeros(head.shape[:1], bool).at[token_ids].set(True)
    return _Chunks(
        _split(jnp.stack(at_guess), per_chunk),
        _split(valid[..., None], per_chunk)[..., 0],
        _split(jnp.take_along_axis(target_hidden, picked[..., None], axis=1), per_chunk),
        (head, draft_head, in_draft, own_head),
    )


def _split(x: jax.Array, per_chunk: int) -> jax.Array:
    """[..., B, S, H] as [chunks, ..., B, C, H]."""
    num_chunks = -(-x.shape[-2] // per_chunk)
    pad = num_chunks * per_chunk - x.shape[-2]
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, pad), (0, 0)))
    x = jnp.moveaxis(x.reshape(*x.shape[:-2], num_chunks, per_chunk, x.shape[-1]), -3, 0)
    return constrain(x, *[None] * (x.ndim - 3), "batch", None, None)


def _stats(made: _Chunks, picked: jax.Array, within_draft: bool, logit_map: LogitMap) -> tuple[jax.Array, jax.Array]:
    """Hits bool [N, B, S] and acceptances float32 [N, B, S] of all guesses, by a scan without gradients."""
    (batch, size), num_levels = picked.shape, made.chosen.shape[1]
    config = LossConfig(cross_entropy=0, within_draft=within_draft)  # no terms
    weights = jnp.zeros((num_levels,))
    parts = made.chosen, made.valid, None, made.at_target, weights, *made.heads, None, config.mix(0)
    *_, stats = _scan(*jax.lax.stop_gradient(parts), config, logit_map, False, with_gradient=False)
    hits, accepted = (jnp.moveaxis(x, 0, 2).reshape(num_levels, batch, -1)[..., :size] for x in stats)
    return hits > 0, accepted


# --- the scan over chunks, with its gradient --------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(11, 12, 13))
def _chunked(
    chosen: jax.Array,
    valid: jax.Array,
    factors: jax.Array | None,
    at_target: jax.Array,
    weights: jax.Array,
    head: jax.Array,
    draft_head: jax.Array,
    in_draft: jax.Array | None,
    own_head: jax.Array | None,
    num_kept: jax.Array | None,
    mix: Mix,
    config: LossConfig,
    logit_map: LogitMap,
    unrolled: bool,
) -> tuple[jax.Array, jax.Array]:
    """The weighted loss, and sums float32 [3, N] of each level's loss, hits and acceptance.

    Of DeepKD three losses [3], and sums [4, N] with the positions that are left out.
    """
    heads = head, draft_head, in_draft, own_head
    args = chosen, valid, factors, at_target, weights, *heads, num_kept, mix, config, logit_map, unrolled
    return _scan(*args, with_gradient=False)[0]


def _chunked_forward(*args: Any) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    result, gradients, _ = _scan(*args, with_gradient=True)
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
    return (grad_chosen, *[None] * 7, grad_own_head, None, None)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _scan(
    chosen: jax.Array,
    valid: jax.Array,
    factors: jax.Array | None,
    at_target: jax.Array,
    weights: jax.Array,
    head: jax.Array,
    draft_head: jax.Array,
    in_draft: jax.Array | None,
    own_head: jax.Array | None,
    num_kept: jax.Array | None,
    mix: Mix,
    config: LossConfig,
    logit_map: LogitMap,
    unrolled: bool,
    *,
    with_gradient: bool,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, Any], tuple[jax.Array, jax.Array]]:
    """((loss, sums), gradients of the loss in `chosen` and `own_head`, (hits, acceptances) [chunks, N, B, C]).

    Gradients are None if they are not wanted.

    Of DeepKD each of the three losses has its gradient: [chunks, N, 3, B, C, H] and [3, V, R].
    """
    deepkd = config.deepkd
    differentiated = jax.value_and_grad if deepkd is None else value_and_jacobian
    parts = () if deepkd is None else (3,)
    # All-gathered over `fsdp` here, once, rather than for every chunk and level.
    head, draft_head = constrain(head, "vocab", None), constrain(draft_head, "vocab", None)
    trains_head = own_head is not None and with_gradient
    drafter_head = draft_head if own_head is None else own_head
    hidden_size = at_target.shape[-1]

    def logits_of(hidden_BCH: jax.Array, drafter_head: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """A level's logits [B, C, V], and those without edge scores or correction; None if it has neither."""
        without_edges: jax.Array | None = None
        if own_head is None:
            logits = logit_map(head_logits(hidden_BCH[..., :hidden_size], draft_head))
            if hidden_BCH.shape[-1] > hidden_size:
                without_edges = logit_map(head_logits(hidden_BCH[..., hidden_size:], draft_head))
        elif own_head.shape[-1] == hidden_BCH.shape[-1] > hidden_size:  # a head, and a table of edges
            without_edges = head_logits(hidden_BCH[..., :hidden_size], drafter_head[:, :hidden_size], trains_head)
            logits = head_logits(hidden_BCH[..., hidden_size:], drafter_head[:, hidden_size:], trains_head)
            logits = without_edges + logits
        else:
            width = hidden_BCH.shape[-1] - own_head.shape[-1]
            logits = head_logits(hidden_BCH[..., width:], drafter_head, trains_head)
            if width:
                without_edges = logit_map(head_logits(hidden_BCH[..., :width], draft_head))
                logits = without_edges + logits
        if without_edges is not None:
            without_edges = constrain(without_edges, "batch", None, "vocab")
        return constrain(logits, "batch", None, "vocab"), without_edges

    def one_chunk(carry: Any, chunk: Any) -> tuple[Any, Any]:
        chosen_NBCH, valid_NBC, factors_NBC, target_BCH = chunk
        full = constrain(logit_map(head_logits(target_BCH, head)), "batch", None, "vocab")  # [B, C, target vocabulary]
        kept = full if in_draft is None else logit_map(head_logits(target_BCH, draft_head))
        log_z = jax.nn.logsumexp(full, axis=-1, keepdims=True)
        mass: jax.Array | None = None  # [B, C, 1], of the draft vocabulary, if p sums to 1 within it
        if config.within_draft and in_draft is not None:
            log_kept = jax.nn.logsumexp(kept, axis=-1, keepdims=True)
            log_z, mass = log_kept, jnp.exp(log_kept - log_z)
        p = jnp.exp(kept - log_z)  # [B, C, V]; else sums to that mass
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

        # Of p alone: what makes a cross entropy a divergence.
        entropy = -jax.scipy.special.xlogy(p, p).sum(axis=-1) if config.uses("hybrid") else None

        def one_level(grad_head: Any, level: Any) -> tuple[Any, Any]:
            hidden_BCH, valid_BC, factors_BC, weight = level

            def loss_of(hidden_BCH: jax.Array, drafter_head: jax.Array) -> tuple[jax.Array, Any]:
                logits, without_edges = logits_of(hidden_BCH, drafter_head)
                terms, stats = _distances(logits, p, mass, entropy, best, config, mix)
                counts = [jnp.where(valid_BC, s, 0).sum() for s in (*stats, ~counted)]
                if losses_of is not None:
                    losses = jnp.where(valid_BC & counted, losses_of(logits), 0).sum(axis=(1, 2))  # [3]
                    return weight * losses, (jnp.stack([losses.sum(), *counts]), stats)
                if config.weighs_without_edges and without_edges is not None:
                    others, _ = _distances(without_edges, p, mass, entropy, best, config, mix)
                    terms = mix.whole * terms + mix.without_edges * others
                if config.smooth_l1:
                    terms += mix.terms[-1] * _smooth_l1(hidden_BCH[..., :hidden_size], target_BCH)
                losses = jnp.where(valid_BC & counted, terms, 0)
                loss = losses.sum() if factors_BC is None else (losses * factors_BC).sum()
                return weight * loss, (jnp.stack([losses.sum(), *counts[:-1]]), stats)

            gradient = jnp.zeros(())
            if trains_head:
                grad = differentiated(loss_of, argnums=(0, 1), has_aux=True)
                (loss, (sums, stats)), (gradient, head_gradient) = grad(hidden_BCH, drafter_head)
                grad_head = grad_head + head_gradient.astype(jnp.float32)
            elif with_gradient:
                (loss, (sums, stats)), gradient = differentiated(loss_of, has_aux=True)(hidden_BCH, drafter_head)
            else:
                loss, (sums, stats) = loss_of(hidden_BCH, drafter_head)
            return grad_head, (loss, sums, gradient, stats)

        loss, sums, grad_head = carry
        xs = (chosen_NBCH, valid_NBC, factors_NBC, weights)
        grad_head, (loss_N, sums_N3, gradient, stats) = jax.lax.scan(one_level, grad_head, xs, unroll=unrolled)
        return (loss + loss_N.sum(axis=0), sums + sums_N3.T, grad_head), (gradient, stats)

    grad_head = jnp.zeros((*parts, *drafter_head.shape) if trains_head else ())
    start = (jnp.zeros(parts), jnp.zeros((3 if deepkd is None else 4, chosen.shape[1])), grad_head)
    chunks = chosen, valid, factors, at_target
    (loss, sums, grad_head), (gradient, stats) = jax.lax.scan(one_chunk, start, chunks, unroll=unrolled)
    gradients = (
        gradient if with_gradient else None,
        grad_head.astype(drafter_head.dtype) if trains_head else None,
    )
    return (loss, sums), gradients, stats


def _distances(
    logits: jax.Array,
    p: jax.Array,
    mass: jax.Array | None,
    entropy: jax.Array | None,
    best: jax.Array,
    config: LossConfig,
    mix: Mix,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The weighted terms between the target's p and the distribution of logits [B, C, V], float32 [B, C].

    And (hit, acceptance) likewise, the acceptance by the target's probabilities p x `mass` (None: p). `entropy` is that
    of p, for the hybrid term; `best`, bool [B, C, V], marks the target's first choice.
    """
    log_q = jax.nn.log_softmax(logits, axis=-1)
    overlap = jnp.minimum(p, jnp.exp(log_q)).sum(axis=-1)
    accepted = jax.lax.stop_gradient(overlap)
    weight = dict(zip(TERMS, mix.terms, strict=True))
    loss = jnp.zeros(logits.shape[:-1])
    cross_entropy = -(p * log_q).sum(axis=-1)
    if config.uses("cross_entropy"):
        loss += weight["cross_entropy"] * cross_entropy
    if config.uses("total_variation"):
        loss += weight["total_variation"] * (1 - overlap)
    if config.uses("acceptance"):
        loss += weight["acceptance"] * -jnp.log(jnp.maximum(overlap, 1e-9))
    if config.uses("hybrid"):
        part = jnp.exp(-config.hybrid_rate * accepted)
        assert entropy is not None
        loss += weight["hybrid"] * (part * (cross_entropy - entropy) + (1 - part) * (1 - overlap))
    hit = jnp.where(best, logits, -jnp.inf).max(axis=-1) >= logits.max(axis=-1)
    if mass is not None:
        accepted = jax.lax.stop_gradient(jnp.minimum(p * mass, jnp.exp(log_q)).sum(axis=-1))
    return loss, (hit.astype(jnp.float32), accepted)


def _smooth_l1(hidden: jax.Array, target: jax.Array) -> jax.Array:
    """The smooth L1 distance [B, C] of hidden states [B, C, H], a mean over H."""
    size = jnp.abs(hidden.astype(jnp.float32) - target.astype(jnp.float32))
    return jnp.where(size < 1, 0.5 * size * size, size - 0.5).mean(axis=-1)
