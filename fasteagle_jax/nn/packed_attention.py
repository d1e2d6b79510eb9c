"""Attention over packed rows, for training: each row holds several texts, which do not see one another.

B rows · T tokens · K heads of K/V · G query heads per K/V head · D head width.
The [T, T] scores of a row never exist whole: on a TPU JAX's splash attention keeps them in tiles, on a GPU cuDNN does,
and elsewhere, or if these do not support the shapes, XLA computes BLOCK queries at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fasteagle_jax.devices.sharding import platform, spec
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line
from fasteagle_jax.nn.attention import MASKED, attention, by_kv_head, by_token, capped, sink_scores

BLOCK = 512  # queries whose scores are alive at once
TILE = 128  # queries of a single block that read the keys up to their last one
TILES = (512, 256, 128)  # of splash attention, in tokens
KINDS = ("auto", "xla", "splash", "cudnn")


class Packed(NamedTuple):
    """Causal attention within each segment of packed rows and, if there is one, a window."""

    segments: jax.Array  # int32 [B, T], the text of each token, 0 for padding
    window: int | None = None  # W: a token sees itself and the W - 1 before it; None for all
    kind: str = "auto"  # of KINDS
    soft_cap: float | None = None  # see nn.attention.capped

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
        """`packed_attention`, as an Attend (see nn.attention)."""
        return packed_attention(q, k, v, self, sinks)

    def within(self, window: int | None, soft_cap: float | None = None) -> Packed:
        """This Packed with another window, None for all, and another soft cap of scores."""
        return self._replace(window=window, soft_cap=soft_cap)

    def visible(self, start: jax.Array | int = 0, size: int | None = None) -> jax.Array:
        """The mask bool [B, size, T], True where the query at start + i sees the key at j; size None is T."""
        batch, num_tokens = self.segments.shape
        query = start + jnp.arange(num_tokens if size is None else size)
        return self.visible_at(jnp.broadcast_to(query, (batch, len(query))))

    def visible_at(self, at: jax.Array) -> jax.Array:
        """The rows bool [B, Q, T] of the mask for queries at places int32 [B, Q] along T."""
        query, key = at[..., None], jnp.arange(self.segments.shape[1])
        seen = key <= query
        if self.window is not None:
            seen &= query - key < self.window
        return seen & (jnp.take_along_axis(self.segments, at, axis=1)[..., None] == self.segments[:, None])


def packed_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, packed: Packed, sinks: jax.Array | None = None
) -> jax.Array:
    """Softmax attention of q [B, T, K*G, D] over k and v [B, T, K, D]: [B, T, K*G, D] in v's dtype.

    `sinks` [K*G] are those of `nn.attention.attention`, None for none.
    Raises UserError for an unknown kind, or one that does not support the shapes.
    """
    kind = packed.kind
    if kind not in KINDS:
        raise UserError(f"attention {kind!r} is not known: use one of {', '.join(KINDS)}")
    if kind == "auto":
        kind = {"tpu": "splash", "gpu": "cudnn"}.get(platform(), "xla")
        if (kind == "splash" and _tile(q.shape[1]) is None) or (kind == "cudnn" and _no_cudnn(q, k, v, packed, sinks)):
            kind = "xla"
    if kind == "splash":
        return _splash(q, k, v, packed, sinks)
    if kind == "cudnn":
        if missing := _no_cudnn(q, k, v, packed, sinks):
            raise UserError(f"cuDNN's attention cannot be had ({missing}): use attention auto or xla")
        return _cudnn(q, k, v, packed.visible())
    return _in_blocks(q, k, v, packed, sinks=sinks)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], implementation="cudnn")


def _no_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, packed: Packed, sinks: jax.Array | None) -> str:
    """The reason in a few words why cuDNN does not support the arrays; empty if it does."""
    if packed.soft_cap is not None:
        return "it takes no soft cap of scores"
    if sinks is not None:
        return "it takes no sinks"
    if q.dtype == jnp.float32:
        return "it takes no float32"
    try:
        visible = jax.ShapeDtypeStruct((q.shape[0], q.shape[1], k.shape[1]), jnp.bool_)
        jax.eval_shape(_cudnn, q, k, v, visible)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # not installed; too old; not these shapes
        return first_line(error).rstrip(".")
    return ""


def _in_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, packed: Packed, block: int = BLOCK, sinks: jax.Array | None = None
) -> jax.Array:
    """Block-wise XLA fallback of `packed_attention`."""
    kv_heads = k.shape[2]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, T, D]

    def attend(queries: tuple[jax.Array, ...], start: jax.Array | int, num_keys: int) -> jax.Array:
        (rows,) = queries  # [B, Q, K*G, D]
        size = rows.shape[1]
        visible = packed.visible(start, size)[:, :, :num_keys]
        seen = k[:, :, :num_keys], v[:, :, :num_keys], visible
        return by_token(attention(by_kv_head(rows, kv_heads), *seen, soft_cap=packed.soft_cap, sinks=sinks), size)

    return in_blocks(attend, (q,), block)


def in_blocks(
    attend: Callable[[tuple[jax.Array, ...], jax.Array | int, int], jax.Array],
    queries: tuple[jax.Array, ...],
    block: int = BLOCK,
    num_keys: int | None = None,
) -> jax.Array:
    """Causal attention [B, T, ...] over rows of T tokens, at most `block` queries at a time.

    A row of one block is computed in tiles, each over the keys up to its end: this saves products, and a CPU's caches
    hold a tile's scores. Blocks of a longer row read all keys.

    Args:
      attend: (queries, start, num_keys) -> [B, Q, ...], attention of the Q queries from `start` on, arrays [B, Q, ...],
        over the first `num_keys` keys.
      queries: arrays [B, T, ...].
      block: the most queries whose scores are alive at once.
      num_keys: of queries that are not those of all tokens in order, the number of keys, which all of them read.
    """
    num_tokens = queries[0].shape[1]
    if num_keys is not None and num_tokens <= block:
        return attend(queries, 0, num_keys)
    if num_tokens <= block:
        tile = TILE if num_tokens % TILE == 0 else num_tokens
        tiles = zip(*(jnp.split(x, num_tokens // tile, axis=1) for x in queries), strict=True)
        return jnp.concatenate([attend(part, i * tile, (i + 1) * tile) for i, part in enumerate(tiles)], axis=1)

    # A loop, since unrolled blocks could all be alive at once. The backward pass recomputes scores instead of keeping
    # those of all blocks.
    def one_block(start: jax.Array | int, size: int = block) -> jax.Array:
        part = tuple(jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in queries)
        return attend(part, start, num_keys or num_tokens)

    num_blocks, rest = divmod(num_tokens, block)
    blocks = jax.lax.map(jax.checkpoint(one_block), block * jnp.arange(num_blocks))
    blocks = jnp.moveaxis(blocks, 0, 1)  # [B, blocks, Q, ...]
    out = blocks.reshape(blocks.shape[0], num_blocks * block, *blocks.shape[3:])
    if not rest:
        return out
    last = jax.checkpoint(one_block, static_argnums=(0, 1))(num_tokens - rest, rest)
    return jnp.concatenate([out, last], axis=1)


# --- keys on a query's own path ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GivenPast:
    """An Attend over given keys and values, such as the target's, and of the fresh ones the query's own alone."""

    k: jax.Array  # [B, T, K, D], as is v
    v: jax.Array
    visible: jax.Array | Packed  # which given keys a query sees; bool [B, T, T]
    at: jax.Array | None = None  # int32 [B, A], the places of queries along T; None for T of them, at their own
    soft_cap: float | None = None
    earlier: bool = False  # a query does not see the given key at its own place

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
        """`own_path_attention`, as an Attend (see nn.attention)."""
        return own_path_attention(
            q, [self.k, k], [self.v, v], self.visible, self.soft_cap, self.at, sinks, self.earlier
        )


def own_path_attention(
    q: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    visible: jax.Array | Packed,
    soft_cap: float | None = None,
    at: jax.Array | None = None,
    sinks: jax.Array | None = None,
    earlier: bool = False,
) -> jax.Array:
    """Attention of q [B, T, K*G, D] over keys[0] that `visible` allows and, of each later keys[i], the query's own one.

    All keys and values are [B, T, K, D]; one softmax is over all that a query sees, and its head's one of `sinks`
    [K*G]. With `at`, int32 [B, A], queries and later keys are of these places along T alone, [B, A, ...]. With
    `earlier` a query does not see keys[0] at its own place.
    """
    batch, _, kv_heads, width = keys[0].shape
    q = (q * width**-0.5).reshape(batch, q.shape[1], kv_heads, -1, width)  # [B, T, K, G, D]
    # The later keys' scores and values are computed for whole rows, so that their gradients are not summed over blocks.
    later_scores = [(q.astype(jnp.float32) * k[:, :, :, None]).sum(axis=-1, keepdims=True) for k in keys[1:]]
    later = jnp.concatenate([jnp.zeros((*q.shape[:-1], 0)), *later_scores], axis=-1)  # [B, T, K, G, later]
    first_k, first_v = keys[0].transpose(0, 2, 1, 3), values[0].transpose(0, 2, 1, 3)  # [B, K, T, D]

    def attend(queries: tuple[jax.Array, ...], start: jax.Array | int, num_keys: int) -> jax.Array:
        """Attended values of the first keys and the later ones' probabilities for Q queries, [B, Q, K*G, D + later]."""
        size, heads = queries[0].shape[1], kv_heads * q.shape[3]
        rows, later_rows = (by_kv_head(x.reshape(batch, size, heads, x.shape[-1]), kv_heads) for x in queries)
        places = None if at is None else jax.lax.dynamic_slice_in_dim(at, start, size, axis=1)
        if places is not None:
            if isinstance(visible, Packed):
                seen = visible.visible_at(places)
            else:
                seen = jnp.take_along_axis(visible, places[..., None], axis=1)
        elif isinstance(visible, Packed):
            seen = visible.visible(start, size)
        else:
            seen = jax.lax.dynamic_slice_in_dim(visible, start, size, axis=1)
        if earlier:
            own = (start + jnp.arange(size))[None] if places is None else places
            seen &= own[..., None] != jnp.arange(seen.shape[-1])
        mask = jnp.tile(seen[:, :, :num_keys], (1, q.shape[3], 1))[:, None]
        scores = jnp.einsum("bkmd,bktd->bkmt", rows, first_k[:, :, :num_keys], preferred_element_type=jnp.float32)
        scores = jnp.where(mask, capped(scores, soft_cap), MASKED)
        parts = [scores, capped(later_rows, soft_cap)]
        if sinks is not None:  # last, and without a value
            of_sinks = sink_scores(sinks, kv_heads, size)
            parts.append(jnp.broadcast_to(of_sinks, (*scores.shape[:-1], 1)))
        p = jax.nn.softmax(jnp.concatenate(parts, axis=-1), axis=-1)[..., : num_keys + later_rows.shape[-1]]
        first_p = p[..., :num_keys].astype(rows.dtype)
        out = jnp.einsum("bkmt,bktd->bkmd", first_p, first_v[:, :, :num_keys], preferred_element_type=jnp.float32)
        return by_token(jnp.concatenate([out, p[..., num_keys:]], axis=-1), size)

    attended = in_blocks(attend, (q, later), num_keys=None if at is None else keys[0].shape[1])
    attended = attended.reshape(*q.shape[:-1], -1)  # [B, T, K, G, D + later]
    out = attended[..., :width]
    for i, v in enumerate(values[1:]):
        out += attended[..., width + i, None] * v[:, :, :, None]
    return out.astype(values[0].dtype).reshape(batch, q.shape[1], -1, width)


# --- splash attention -------------------------------------------------------------------------------------------


def _tile(num_tokens: int) -> int | None:
    return next((tile for tile in TILES if num_tokens % tile == 0), None)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, packed: Packed, sinks: jax.Array | None) -> jax.Array:
    tile = _tile(q.shape[1])
    if tile is None:
        raise UserError(f"splash attention over {q.shape[1]} tokens: use a length that is a multiple of {TILES[-1]}")
    interpret = platform() != "tpu"
    run = functools.partial(
        _splash_shard, window=packed.window, soft_cap=packed.soft_cap, tile=tile, interpret=interpret
    )
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return run(q, k, v, packed.segments, sinks)
    # GSPMD does not split a kernel: each device computes its own rows and heads.
    heads = spec(mesh, ("batch", None, "heads", None), k.shape)  # split by whole heads of K/V, and q with them
    rows = PartitionSpec(*spec(mesh, ("batch", None), packed.segments.shape))
    of_sinks = PartitionSpec(heads[2])
    specs = (heads, heads, heads, rows, None if sinks is None else of_sinks)
    return jax.shard_map(run, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, packed.segments, sinks)


def _splash_shard(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    sinks: jax.Array | None,
    *,
    window: int | None,
    soft_cap: float | None,
    tile: int,
    interpret: bool,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        LocalMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha_single_device,
    )

    _, num_tokens, num_heads, width = q.shape
    shape = (num_tokens, num_tokens)
    mask = CausalMask(shape) if window is None else LocalMask(shape, (window - 1, 0), 0)
    kernel = make_splash_mha_single_device(
        MultiHeadMask([mask] * num_heads),
        block_sizes=BlockSizes(tile, tile, tile, tile, tile, tile, tile, tile),
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )

    def row(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return kernel(q, k, v, segment_ids=SegmentIds(segments, segments), sinks=sinks)

    q = (q * width**-0.5).astype(q.dtype)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    out = jax.vmap(row)(q, k, v, segments)  # [B, heads, T, D]
    return out.transpose(0, 2, 1, 3).astype(v.dtype)
