"""Choosing the next token: one rule for greedy, sampled and mixed batches.

B rows · M nodes · V vocabulary.
The token at absolute position p of a request is argmax(filtered(logits / temperature) + G[p]) with Gumbel noise G[p]
that is a function of (seed, p, token id) alone, which draws from the filtered softmax (the Gumbel-max trick); at
temperature 0 it is argmax(logits). The choice depends on nothing but the verified prefix and the seed, so speculation
cannot change it.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fasteagle_jax.decoding.sampling_fields import FIELDS
from fasteagle_jax.errors import UserError


def _named_tuple() -> Any:
    return collections.namedtuple("Sampling", list(FIELDS))  # type: ignore[misc]  # mypy wants the names spelt out


_Fields: Any = _named_tuple()


class Sampling(_Fields):
    """How each row picks tokens: an array [B] a row of sampling_fields.FIELDS, by its name."""

    __slots__ = ()

    @classmethod
    def of(cls, values: Mapping[str, Sequence[float]]) -> Sampling:
        """Arrays of NumPy's, which compile nothing, from each field's values."""
        return cls(**{name: np.asarray(values[name], field.dtype) for name, field in FIELDS.items()})


def make_sampling(batch: int, temperature: float | Sequence[float] = 0.0, **fields: Any) -> Sampling:
    """A Sampling for `batch` rows, each field given one value for all or one a row; greedy unless told otherwise.

    Raises UserError for a field that does not exist or a value that it cannot have.
    """
    if unknown := [name for name in fields if name not in FIELDS]:
        raise UserError(f"{unknown[0]} is no sampling field: give {', '.join(FIELDS)}")
    values: dict[str, list[Any]] = {}
    for name, field in FIELDS.items():
        value = temperature if name == "temperature" else fields.get(name, field.default)
        values[name] = list(value) if isinstance(value, (list, tuple)) else [value] * batch
        if len(values[name]) != batch:
            raise UserError(f"{name} has {len(values[name])} values for {batch} rows: give one, or one a row")
        for each in values[name]:
            field.check(each)
    return jax.tree.map(jnp.asarray, Sampling.of(values))


# --- noise ------------------------------------------------------------------------------------------------------


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that flips about half of the bits for any change of one (C. Wellons' lowbias32)."""
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def gumbel_noise(seed: jax.Array, position: jax.Array, token_ids: jax.Array) -> jax.Array:
    """Standard Gumbel noise float32 [..., V] for `seed` uint32 [...] and `position` int32 [...] at token_ids int32 [V].

    Counter-based: a token's noise is a few integer operations on (seed, position, id), the same in any batch, order or
    subset of the vocabulary. The integers are exact everywhere; two logarithms may differ in the last bit between
    devices.
    """
    position = position.astype(jnp.uint32)
    seed = seed.astype(jnp.uint32)
    key_a = _mix(seed + _mix(position + jnp.uint32(0x9E3779B9)))[..., None]
    key_b = _mix(_mix(seed ^ jnp.uint32(0x85EBCA6B)) + position * jnp.uint32(0xC2B2AE35))[..., None]
    bits = _mix(_mix(token_ids.astype(jnp.uint32) + key_a) ^ key_b)
    # v in (0, 1) is exact near 0, where -log1p(-v) is small and the noise large: the tail that decides an argmax.
    v = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-v))


# --- choice -----------------------------------------------------------------------------------------------------


def choose(logits: jax.Array, positions: jax.Array, sampling: Sampling) -> jax.Array:
    """The token int32 [B, M] that goes to `positions` int32 [B, M], given the logits float32 [B, M, V] before it."""
    warm = sampling.temperature > 0  # [B]

    def draw() -> jax.Array:
        scaled = logits / jnp.where(warm, sampling.temperature, 1.0)[:, None, None]
        noise = gumbel_noise(sampling.seed[:, None], positions, jnp.arange(logits.shape[-1]))
        noise = jnp.where(warm[:, None, None], noise, 0.0)  # without it the best is the argmax, filtered or not
        filtering = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
        return jax.lax.cond(
            (filtering & warm).any(),
            lambda: _draw_filtered(scaled, noise, sampling),
            lambda: _first_argmax(scaled + noise),
        )

    return jax.lax.cond(warm.any(), draw, lambda: _first_argmax(logits))


def _first_argmax(x: jax.Array) -> jax.Array:
    """argmax over the last dimension, int32: a maximum and a minimum, which compile to faster code than jnp.argmax."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.where(x == x.max(axis=-1, keepdims=True), index, x.shape[-1] - 1).min(axis=-1)


def _draw_filtered(scaled: jax.Array, noise: jax.Array, sampling: Sampling) -> jax.Array:
    """argmax of scaled + noise [B, M, V] over the tokens that top-k, then top-p, then min-p leave, without a sort.

    All filters keep a set that is closed upwards: with a token, all of at least its logit. So the unfiltered argmax is
    tried first; if it is outside, nothing of its logit or less is inside, and the best of the rest is tried. A few
    rounds settle every node. A token is inside top-k when fewer than k tokens are larger, inside top-p when those
    larger hold less than p of the mass that top-k left, inside min-p by its own mass.
    """
    vocab = scaled.shape[-1]
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)[:, None]  # [B, 1]
    p = sampling.top_p[:, None]
    largest = scaled.max(axis=-1)
    least = largest + jnp.log(sampling.min_p)[:, None]  # [B, M], the smallest logit inside min-p
    mass = jnp.exp(scaled - largest[..., None])

    both = (k < vocab) & (p < 1)

    def left_by_top_k() -> jax.Array:
        left = jnp.where(scaled >= _kth_largest(scaled, k)[..., None], mass, 0).sum(axis=-1)
        return jnp.where(both, left, whole)  # a row's total does not depend on what other rows ask for

    whole = mass.sum(axis=-1)
    total = jax.lax.cond(both.any(), left_by_top_k, lambda: whole)  # [B, M]

    def undecided(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return ~state[2].all()

    def attempt(
        state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        floor, drawn, decided = state  # only logits above the floor are still candidates
        candidate = _first_argmax(jnp.where(scaled > floor[..., None], scaled + noise, -jnp.inf))
        logit = jnp.take_along_axis(scaled, candidate[..., None], axis=-1)
        larger = scaled > logit
        num_larger = larger.sum(axis=-1)
        in_top_p = (jnp.where(larger, mass, 0).sum(axis=-1) < p * total) | (p >= 1)
        # The largest is always inside, also where p * total underflows or logits are NaN: the loop must end.
        inside = ((num_larger < k) & in_top_p & (logit[..., 0] >= least)) | (num_larger == 0)
        drawn = jnp.where(decided, drawn, candidate)
        return jnp.where(inside, floor, logit[..., 0]), drawn, decided | inside

    shape = scaled.shape[:-1]
    start = (
        jnp.full(shape, -jnp.inf, scaled.dtype),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, bool),
    )
    start = attempt(start)  # rows without a filter are settled here
    return jax.lax.while_loop(undecided, attempt, start)[1]


def _kth_largest(x: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest value [B, M] of x float32 [B, M, V], k int32 [B, 1]: bit by bit, 32 counting passes."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(0x80000000)
    ordered = jnp.where(bits & sign, ~bits, bits | sign)  # uint32 in the order of the floats

    def add_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        trial = found | (sign >> i.astype(jnp.uint32))
        enough = (ordered >= trial[..., None]).sum(axis=-1) >= k
        return jnp.where(enough, trial, found)

    found = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros(x.shape[:-1], jnp.uint32))
    bits = jnp.where(found & sign, found ^ sign, ~found)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
