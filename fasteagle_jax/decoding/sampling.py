"""The choice of the next token: one rule for greedy, sampled and mixed batches.

B rows · M nodes · V vocabulary.
The token at absolute position p of a request is argmax(filtered(logits / temperature) + G[p]), where the Gumbel noise
G[p] is a function of (seed, p, token id) alone. This samples from the filtered softmax (the Gumbel-max trick); at
temperature 0 the token is argmax(logits). The choice depends only on the verified prefix and the seed, so speculation
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
    """How each row picks tokens: for each of sampling_fields.FIELDS, an array [B] under its name."""

    __slots__ = ()

    @classmethod
    def of(cls, values: Mapping[str, Sequence[float]]) -> Sampling:
        """A Sampling of NumPy arrays, which compile nothing, from each field's values."""
        return cls(**{name: np.asarray(values[name], field.dtype) for name, field in FIELDS.items()})


def make_sampling(batch: int, temperature: float | Sequence[float] = 0.0, **fields: Any) -> Sampling:
    """A Sampling for `batch` rows, from one value of a field for all or one a row; greedy by default.

    Raises UserError for a field that does not exist or a value that it cannot have.
    """
    if unknown := [name for name in fields if name not in FIELDS]:
        raise UserError(f"{unknown[0]} is no sampling field: give {', '.join(FIELDS)}")
    values: dict[str, list[Any]] = {}
    for name, field in FIELDS.items():
        value = temperature if name == "temperature" else fields.get(name, field.default)
        value = value.tolist() if hasattr(value, "tolist") else value
        values[name] = list(value) if isinstance(value, (list, tuple)) else [value] * batch
        if len(values[name]) != batch:
            raise UserError(f"{name} has {len(values[name])} values for {batch} rows: give one, or one a row")
        values[name] = [field.meaning(each) for each in values[name]]
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
    """Tokens int32 [B, M] for `positions` int32 [B, M], chosen by logits float32 [B, M, V] of the token before each."""
    sampled = sampling.temperature > 0  # bool [B]

    def draw() -> jax.Array:
        scaled = logits / jnp.where(sampled, sampling.temperature, 1.0)[:, None, None]
        noise = gumbel_noise(sampling.seed[:, None], positions, jnp.arange(logits.shape[-1]))
        noise = jnp.where(sampled[:, None, None], noise, 0.0)  # greedy rows: their argmax, filtered or not
        filtering = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
        return jax.lax.cond(
            (filtering & sampled).any(),
            lambda: _draw_filtered(scaled, noise, sampling),
            lambda: _first_argmax(scaled + noise),
        )

    return jax.lax.cond(sampled.any(), draw, lambda: _first_argmax(logits))


def _first_argmax(x: jax.Array) -> jax.Array:
    """argmax int32 over the last dimension; a maximum and a minimum compile to faster code than jnp.argmax."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.where(x == x.max(axis=-1, keepdims=True), index, x.shape[-1] - 1).min(axis=-1)


def _draw_filtered(scaled: jax.Array, noise: jax.Array, sampling: Sampling) -> jax.Array:
    """argmax int32 [B, M] of scaled + noise [B, M, V] over what top-k, then top-p, then min-p keep, without a sort.

    Every filter keeps a set that is closed upwards: with a token, all of at least its logit. So the unfiltered argmax
    is tried first; if a filter drops it, all tokens of its logit or less are dropped, too, and the best of the rest is
    tried. A few iterations decide all nodes. Top-k keeps a token if fewer than k logits are larger, top-p if the larger
    ones hold less than p of the mass that top-k kept, min-p by the token's own mass.
    """
    vocab = scaled.shape[-1]
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)[:, None]  # [B, 1]
    p = sampling.top_p[:, None]
    largest = scaled.max(axis=-1)
    least = largest + jnp.log(sampling.min_p)[:, None]  # [B, M], the smallest logit that min-p keeps
    mass = jnp.exp(scaled - largest[..., None])

    both = (k < vocab) & (p < 1)

    def kept_by_top_k() -> jax.Array:
        kept = jnp.where(scaled >= kth_largest(scaled, k)[..., None], mass, 0).sum(axis=-1)
        return jnp.where(both, kept, whole)  # a row's total does not depend on other rows' filters

    whole = mass.sum(axis=-1)
    total = jax.lax.cond(both.any(), kept_by_top_k, lambda: whole)  # [B, M]

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
        # The largest is always kept, even if p * total underflows or logits are NaN: the loop must end.
        kept = ((num_larger < k) & in_top_p & (logit[..., 0] >= least)) | (num_larger == 0)
        drawn = jnp.where(decided, drawn, candidate)
        return jnp.where(kept, floor, logit[..., 0]), drawn, decided | kept

    shape = scaled.shape[:-1]
    start = (
        jnp.full(shape, -jnp.inf, scaled.dtype),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, bool),
    )
    start = attempt(start)  # decides rows without a filter
    return jax.lax.while_loop(undecided, attempt, start)[1]


def kth_largest(x: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest value float32 [B, M] of x float32 [B, M, V], k int32 [B, 1] or [].

    32 counting passes, one a bit: k need not be a constant, and devices that share a vocabulary exchange counts alone.
    """
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
