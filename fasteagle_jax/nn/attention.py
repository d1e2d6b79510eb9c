"""Attention of fresh queries over committed and fresh keys under one softmax, and the storage format of caches.

B rows · Q query tokens · S cache slots · K heads of K/V · G query heads per K/V head · D head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.devices.sharding import by_shard, platform
from fasteagle_jax.nn.int8_vectors import Int8Vectors, to_int8_vectors
from fasteagle_jax.nn.linear import Linear
from fasteagle_jax.nn.norm import RMSNorm
from fasteagle_jax.nn.rope import Rotation, rotate

BLOCK = 128  # cache slots that attention reads at a time if it can stop early
EITHER = "either_cache"  # name in a program of what reads an EitherPast
MASKED = -1e30  # a score that softmax turns into exactly 0; finite, so that max() stays finite too


def cache_storage_dtype(dtype: Any) -> Any:
    """The dtype in which unstacked caches store `dtype`: uint16, the bits, for bfloat16 on a CPU, else itself.

    XLA's CPU compiler supports bfloat16 in products alone: to write one row or to read one block it would convert whole
    caches to float32 and back, for each row of a commit.
    """
    return jnp.uint16 if dtype == jnp.bfloat16 and platform() == "cpu" else dtype


def to_cache_storage(values: jax.Array, dtype: Any) -> jax.Array:
    """Values as a cache of `dtype` stores them: their bits in uint16, or cast."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), dtype)
    return values.astype(dtype)


def from_cache_storage(cached: Any) -> Any:
    """The values that a cache's array stores, in float32 if it holds bits: a CPU is slow at small bfloat16 products.

    Int8Vectors stay as they are: `key_products` and `value_sums` read them.
    """
    if cached.dtype != jnp.uint16:
        return cached
    return jax.lax.bitcast_convert_type(cached.astype(jnp.uint32) << 16, jnp.float32)


def key_products(q: jax.Array, k: jax.Array | Int8Vectors) -> jax.Array:
    """Products float32 [B, K, M, S] of queries [B, K, M, D] and keys [B, K, S, D]."""
    if isinstance(k, Int8Vectors):
        dtype = _int8_product_dtype(q.dtype)
        return _key_products(q.astype(dtype), k.values.astype(dtype)) * k.scales[:, :, None]
    return _key_products(q, k)


def _key_products(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("bkmd,bksd->bkms", q, k, preferred_element_type=jnp.float32)


def value_sums(p: jax.Array, v: jax.Array | Int8Vectors, dtype: Any) -> jax.Array:
    """Sums float32 [B, K, M, D] of values [B, K, S, D] with weights p [B, K, M, S].

    The products are in the values' dtype, of Int8Vectors in that of the queries, `dtype`.
    """
    if isinstance(v, Int8Vectors):
        dtype = _int8_product_dtype(dtype)
        p, v = p * v.scales[:, :, None], v.values.astype(dtype)
    return jnp.einsum("bkms,bksd->bkmd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)


def _int8_product_dtype(dtype: Any) -> Any:
    """The dtype in which int8 keys and values are multiplied with those of `dtype`, which has all their integers.

    On a CPU float32, which is faster there.
    """
    return jnp.float32 if platform() == "cpu" else dtype


def by_kv_head(q: jax.Array, num_kv_heads: int) -> jax.Array:
    """Queries [B, Q, K*G, D] in the layout of `attention`, [B, K, G*Q, D]."""
    batch, num_tokens, heads, width = q.shape
    groups = heads // num_kv_heads
    q = q.reshape(batch, num_tokens, num_kv_heads, groups, width).transpose(0, 2, 3, 1, 4)
    return q.reshape(batch, num_kv_heads, groups * num_tokens, width)


def by_token(attended: jax.Array, num_tokens: int) -> jax.Array:
    """The output [B, K, G*Q, D] of `attention` in the layout of tokens, [B, Q, K*G, D]."""
    batch, kv_heads, _, width = attended.shape
    attended = attended.reshape(batch, kv_heads, -1, num_tokens, width).transpose(0, 3, 1, 2, 4)
    return attended.reshape(batch, num_tokens, -1, width)


class Past(NamedTuple):
    """One layer's committed keys and values, and who may see them."""

    k: Any  # [B, K, S, D] in a cache's storage format, as is v
    v: Any
    seen: jax.Array  # bool [B, Q, S], or [B, 1, S] if all queries see the same slots
    # int32 [], no slot from here on is seen: those before are read block by block. None: all are read at once.
    filled: jax.Array | None = None
    positions: jax.Array | None = None  # int32 [B, S] of the slots; None if slot p holds position p

    def within(self, window: Any, queries: jax.Array) -> Past:
        """What queries at positions int32 [B, Q] see of it: the last `window` positions, their own included."""
        slots = jnp.arange(self.k.shape[-2]) if self.positions is None else self.positions[:, None]
        return self._replace(seen=self.seen & (queries[:, :, None] - slots < window))

    @property
    def rounded(self) -> bool:
        """Whether it is of an int8 cache."""
        return isinstance(self.k, Int8Vectors)


class EitherPast(NamedTuple):
    """The Past of a layer in a scan over layers of two caches, of which only the layer's own is read."""

    is_local: jax.Array  # bool []
    local: Callable[[], Past]
    full: Callable[[], Past]
    rounded: bool

    def within(self, window: Any, queries: jax.Array) -> EitherPast:
        """As of Past; layers of the full cache have no window."""
        return self._replace(local=lambda: self.local().within(window, queries))


def attention(
    q: jax.Array,
    k: jax.Array | Int8Vectors,
    v: jax.Array | Int8Vectors,
    visible: jax.Array,
    past: Past | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Softmax attention of fresh queries over the committed past and the fresh keys, under one softmax.

    Args:
      q: [B, K, G*Q, D], query head g of a K/V head and query token i in row g*Q + i.
      k, v: fresh keys and values [B, K, T, D].
      visible: bool [B, Q, T], True where query i may see fresh key j; every query must see one, usually its own.
      past: committed slots; None for none.
      soft_cap: see `capped`.

    Returns:
      [B, K, G*Q, D] in v's dtype, q's if v is rounded. Scores and softmax are float32.
    """
    dtype = q.dtype if isinstance(v, Int8Vectors) else v.dtype
    groups = q.shape[2] // visible.shape[1]
    blockwise = past is not None and past.filled is not None and past.k.shape[2] > BLOCK
    if past is not None and not blockwise:
        past = past._replace(k=from_cache_storage(past.k), v=from_cache_storage(past.v))
    q = q * q.shape[-1] ** -0.5
    mask = jnp.tile(visible, (1, groups, 1))[:, None]  # [B, 1, G*Q, T]
    fresh = jnp.where(mask, capped(key_products(q, k), soft_cap), MASKED)
    largest = jax.lax.stop_gradient(fresh.max(axis=-1, keepdims=True))  # [B, K, G*Q, 1]
    past_scores = _past_scores(q, past, groups, soft_cap) if past is not None and not blockwise else None
    if past_scores is not None:
        largest = jnp.maximum(largest, past_scores.max(axis=-1, keepdims=True))
    p = jnp.exp(fresh - largest)
    total = p.sum(axis=-1, keepdims=True)
    out = value_sums(p, v, dtype)
    if past is None:
        return (out / total).astype(dtype)
    if past_scores is not None:
        p = jnp.exp(past_scores - largest)
        total += p.sum(axis=-1, keepdims=True)
        out += value_sums(p, past.v, dtype)
        return (out / total).astype(dtype)

    if platform() == "cpu":
        axes = {4: ("rows", "kv_heads", None, None), 3: ("rows", "kv_heads", None)}
        by_row = functools.partial(_add_blocks_by_row, groups=groups, soft_cap=soft_cap)
        out = by_shard(by_row, axes, q, past.k, past.v, past.seen[:, None], largest, total, out)
    else:
        total, out = _add_blocks(q, lambda i: _block(past, i), past.filled, (largest, total, out), groups, soft_cap)
        out /= total
    return out.astype(dtype)


def _add_blocks(
    q: jax.Array,
    block_of: Callable[[jax.Array], Past],
    filled: Any,
    sums: tuple[jax.Array, jax.Array, jax.Array],
    groups: int,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """The softmax's sum [B, K, G*Q, 1] and the weighted sum of values [B, K, G*Q, D] with the blocks before `filled`.

    `sums` are the largest score so far and the two sums without them.
    """

    def add_block(i: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        largest, total, out = sums
        block = block_of(i)
        past_scores = _past_scores(q, block, groups, soft_cap)
        new_largest = jnp.maximum(largest, past_scores.max(axis=-1, keepdims=True))
        p, rescale = jnp.exp(past_scores - new_largest), jnp.exp(largest - new_largest)
        own = value_sums(p, block.v, q.dtype)
        return new_largest, total * rescale + p.sum(axis=-1, keepdims=True), out * rescale + own

    _, total, out = jax.lax.fori_loop(0, (filled + BLOCK - 1) // BLOCK, add_block, sums)
    return total, out


def _add_blocks_by_row(
    q: jax.Array,
    k: Any,
    v: Any,
    seen: jax.Array,
    largest: jax.Array,
    total: jax.Array,
    out: jax.Array,
    *,
    groups: int,
    soft_cap: float | None,
) -> jax.Array:
    """The attended values [B, K, G*Q, D] float32: `_add_blocks` row by row, each up to the last slot it sees.

    On a CPU a block of one row and what is computed from it stay in a core's cache, those of a batch do not.
    `seen` is bool [B, 1, Q, S], or [B, 1, 1, S].
    """
    seen = seen[:, 0]
    ends = jnp.where(seen.any(axis=1), jnp.arange(1, seen.shape[2] + 1), 0).max(axis=1)  # [B]

    def add_row(b: jax.Array, out: jax.Array) -> jax.Array:
        def of_row(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, b, 1, axis=0)

        past = Past(k, v, of_row(seen))
        sums = of_row(largest), of_row(total), of_row(out)
        row_total, row_out = _add_blocks(of_row(q), lambda i: _block(past, i, b), ends[b], sums, groups, soft_cap)
        return jax.lax.dynamic_update_slice_in_dim(out, row_out / row_total, b, axis=0)

    return jax.lax.fori_loop(0, q.shape[0], add_row, out)


def capped(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    """Scores squeezed by a tanh into +-`soft_cap`, None for no cap."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _past_scores(q: jax.Array, past: Past, groups: int, soft_cap: float | None) -> jax.Array:
    """Scores float32 [B, K, G*Q, S] of scaled queries over committed slots, MASKED where a slot is not seen."""
    seen = jnp.tile(past.seen, (1, groups if past.seen.shape[1] > 1 else 1, 1))  # [B, G*Q or 1, S]
    if not isinstance(past.k, Int8Vectors):
        q = q.astype(past.k.dtype)
    scores = key_products(q, past.k)
    return jnp.where(seen[:, None], capped(scores, soft_cap), MASKED)


def _block(past: Past, i: jax.Array, row: jax.Array | None = None) -> Past:
    """The BLOCK slots from i * BLOCK on; if fewer are left, the last BLOCK ones, without those of earlier blocks.

    Of all rows, or of one `row` int32 [], of which `past.seen` is then.
    """
    rows, kv_heads, num_slots, width = past.k.shape
    start = jnp.minimum(i * BLOCK, num_slots - BLOCK)
    first, num_rows = (0, rows) if row is None else (row, 1)

    def read(part: jax.Array) -> jax.Array:  # [B, K, S, D], or of scales [B, K, S]
        starts, sizes = (first, 0, start, 0), (num_rows, kv_heads, BLOCK, width)
        return from_cache_storage(jax.lax.dynamic_slice(part, starts[: part.ndim], sizes[: part.ndim]))

    k, v = jax.tree.map(read, (past.k, past.v))
    seen = jax.lax.dynamic_slice_in_dim(past.seen, start, BLOCK, axis=2)
    return Past(k, v, seen & (start + jnp.arange(BLOCK) >= i * BLOCK))


# --- a layer's attention ----------------------------------------------------------------------------------------

# The attention function that a layer is given: from q [B, Q, heads, D] and the layer's fresh k and v [B, Q, K, D] to
# the attended values, in q's shape. It may add other keys and values, or replace the fresh ones.
Attend = Callable[[jax.Array, Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Cached:
    """An Attend over a layer's committed slots and its fresh keys."""

    visible: jax.Array  # bool [B, Q, Q], see `attention`
    past: Past | EitherPast | None = None
    soft_cap: float | None = None
    rounds: bool = False  # fresh keys and values are rounded as an int8 `past` stores them, see Attention

    def __call__(self, q: jax.Array, k: Any, v: Any) -> jax.Array:
        """`attention` in the layout of an Attend."""
        if isinstance(self.past, EitherPast):

            def over(read: Callable[[], Past]) -> Attend:
                return lambda q, k, v: dataclasses.replace(self, past=read())(q, k, v)

            with jax.named_scope(EITHER):
                return jax.lax.cond(self.past.is_local, over(self.past.local), over(self.past.full), q, k, v)
        k, v = by_head(k), by_head(v)
        q_by_head = by_kv_head(q, k.shape[1])
        return by_token(attention(q_by_head, k, v, self.visible, self.past, self.soft_cap), q.shape[1])


def by_head(fresh: Any) -> Any:
    """Fresh keys or values [B, Q, K, D] in the layout of caches, [B, K, Q, D]."""
    return jax.tree.map(lambda x: x.swapaxes(1, 2), fresh)


class Attention(nnx.Module):
    """Grouped-query self-attention, from the normed stream to what is added to the stream."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        keys: Iterator[jax.Array],
        dtype: Any = jnp.float32,
        *,
        bias: bool = False,
        output_bias: bool | None = None,
        num_in: int | None = None,
        scale: float | None = None,
        norm: Callable[[], RMSNorm] | None = None,
    ):
        """Random weights.

        Args:
          hidden_size, num_heads, num_kv_heads, head_dim: sizes.
          keys, dtype: of the weights.
          bias, output_bias: of q, k and v, and of the output; None for the same.
          num_in: the input's width; None for `hidden_size`.
          scale: of scores; None for head_dim^-1/2.
          norm: makes the norms of a query's and of a key's heads; None for none.
        """
        num_in = num_in or hidden_size
        output_bias = bias if output_bias is None else output_bias
        heads, kv_heads = num_heads * head_dim, num_kv_heads * head_dim
        self.head_dim = head_dim
        self.q = Linear(num_in, heads, ("embed", "heads"), next(keys), dtype, bias=bias)
        self.k = Linear(num_in, kv_heads, ("embed", "heads"), next(keys), dtype, bias=bias)
        self.v = Linear(num_in, kv_heads, ("embed", "heads"), next(keys), dtype, bias=bias)
        self.o = Linear(heads, hidden_size, ("heads", "embed"), next(keys), dtype, bias=output_bias)
        # Every attention function scales scores by head_dim^-1/2: what is left of the scale goes into the queries.
        self.query_gain = 1.0 if scale is None else scale * head_dim**0.5
        self.q_norm = None if norm is None else norm()
        self.k_norm = None if norm is None else norm()

    def __call__(self, x: jax.Array, rotation: Rotation, attend: Attend) -> tuple[jax.Array, tuple[Any, Any]]:
        """What attention adds to the stream [B, Q, H], and the fresh keys and values, each [B, K, Q, D].

        With an int8 cache these are rounded here, once: a token reads itself and the fresh ones before it (of its
        chunk, or its ancestors in a tree) as all later tokens will read them from the cache.
        """
        q, *fresh = self.project(x, rotation)
        k, v = map(to_int8_vectors, fresh) if isinstance(attend, Cached) and attend.rounds else fresh
        out = self.output(attend(q, k, v).astype(x.dtype))
        return out, (by_head(k), by_head(v))

    def project(self, x: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, Q, heads, D], k and v [B, Q, K, D] of x [B, Q, in], q and k normed and rotated.

        All are in the weights' (and so the cache's) dtype, whether a key is fresh or read back.
        """
        # Without the barrier XLA's TPU compiler fuses the split into heads with the product and copies all weights.
        q, k, v = jax.lax.optimization_barrier((self.q(x), self.k(x), self.v(x)))
        q, k, v = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        dtype = self.k.dtype
        return rotate(q, rotation, self.query_gain).astype(dtype), rotate(k, rotation).astype(dtype), v.astype(dtype)

    def output(self, attended: jax.Array) -> jax.Array:
        """What is added to the stream [B, Q, H], from attended values [B, Q, heads, D]."""
        return self.o(attended.reshape(*attended.shape[:2], -1))
