"""The parts of a Llama decoder layer, shared by targets and drafters.

B rows · Q query tokens · S cache slots · H hidden width · K heads of K/V · G query heads per K/V head · D head width.
Precision: norms, rotary angles and softmax are float32; a matrix product runs in its weight's dtype, accumulates in
float32 and returns in the activation's dtype.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.config import RopeConfig
from fasteagle_jax.devices.sharding import platform

FEW_ROWS = 64  # up to which a CPU multiplies faster from the left (see _product_from_left)
FEW_HEAD_ROWS = 32  # the same under a head, whose product is large itself, and is transposed once more
BLOCK = 128  # slots of a cache that attention reads at a time where it can stop early
MASKED = -1e30  # a score that softmax turns into exactly 0; finite, so that max() stays finite too


# --- products ---------------------------------------------------------------------------------------------------


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("...i,io->...o", x, w, preferred_element_type=jnp.float32)


def _product_of_a_row(x: jax.Array, w: jax.Array) -> jax.Array:
    # XLA's CPU compiler has no fast path for one bfloat16 row, and one eight times faster for two.
    twice = jnp.concatenate([x.reshape(1, -1)] * 2)  # [2, in]
    return _product(twice, w)[:1].reshape(*x.shape[:-1], w.shape[1])


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., in] times w [in, out], in x's dtype.

    Also backwards: cotangents are rounded to w's dtype first, so that all three products take the fast path.
    """
    rows = math.prod(x.shape[:-1])
    x_w = x.astype(w.dtype)
    if rows == 1 and w.dtype == jnp.bfloat16:
        y = jax.lax.platform_dependent(x_w, w, cpu=_product_of_a_row, default=_product)
    else:
        y = _product(x_w, w)
    return y.astype(x.dtype)


def _matmul_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return matmul(x, w), (x.astype(w.dtype), w, jnp.zeros((0,), x.dtype))


def _matmul_backward(saved: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w, like_x = saved
    dy = dy.astype(w.dtype)
    dx = jnp.einsum("...o,io->...i", dy, w, preferred_element_type=jnp.float32)
    dw = jnp.einsum("...i,...o->io", x, dy, preferred_element_type=jnp.float32)
    return dx.astype(like_x.dtype), dw.astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def _product_of_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("ni,oi->no", x, w, preferred_element_type=jnp.float32)


def _product_from_left(x: jax.Array, w: jax.Array) -> jax.Array:
    # XLA's CPU compiler streams the left matrix row by row, which memory likes best: 0.7 of the time for 2 to 32 rows.
    # It turns the product around again where it can see the transpositions, hence the barriers. In bfloat16 its fast
    # path wants both matrices with their rows along what is summed.
    if w.dtype == jnp.bfloat16:
        return jax.lax.optimization_barrier(jnp.einsum("oi,ni->on", w, x, preferred_element_type=jnp.float32)).T
    product = jnp.einsum("oi,in->on", w, jax.lax.optimization_barrier(x.T), preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product).T


def _matmul_by_rows(x: jax.Array, w: jax.Array, few: int) -> jax.Array:
    """x [n, in] times w [out, in], float32 [n, out]."""
    num_rows = len(x)
    if num_rows == 1 and w.dtype == jnp.bfloat16:
        x = jnp.concatenate([x] * 2)  # as in _product_of_a_row
    if 1 < len(x) <= few:
        product = jax.lax.platform_dependent(x, w, cpu=_product_from_left, default=_product_of_rows)
    else:
        product = _product_of_rows(x, w)
    return product[:num_rows]


@jax.custom_vjp
def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., H] under a frozen head, one row [H] a token: [V, H].

    The head gets no gradient. It is not `matmul` with head.T: XLA's CPU compiler has no fast path for that in bfloat16.
    """
    rows = hidden.reshape(-1, hidden.shape[-1]).astype(head.dtype)
    return _matmul_by_rows(rows, head, FEW_HEAD_ROWS).reshape(*hidden.shape[:-1], head.shape[0])


def _head_forward(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return head_logits(hidden, head), (head, jnp.zeros((0,), hidden.dtype))


def _head_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, None]:
    head, like_hidden = saved
    dx = jnp.einsum("...v,vh->...h", dy.astype(head.dtype), head, preferred_element_type=jnp.float32)
    return dx.astype(like_hidden.dtype), None


head_logits.defvjp(_head_forward, _head_backward)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x divided by its root mean square over the last dimension, times `scale`; computed in float32, in x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


# --- rotary position embedding ----------------------------------------------------------------------------------


def rope_frequencies(rope: RopeConfig, head_dim: int) -> jax.Array:
    """Angle per position of each pair of channels, float32 [D/2].

    `llama3` keeps short wavelengths, divides long ones by `factor` and blends in between (Llama 3.1 model card).
    """
    freqs = rope.theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.kind == "linear":
        return freqs / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_positions * freqs / (2 * math.pi)  # full turns within the original context
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = jnp.clip(keep, 0.0, 1.0)
        return keep * freqs + (1 - keep) * freqs / rope.factor
    return freqs


class Rotation(NamedTuple):
    """Cosine and sine of each token's rotary angles, float32 [B, Q, 1, D/2] (one for all heads)."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions: jax.Array, rope: RopeConfig, head_dim: int) -> Rotation:
    """The Rotation of tokens at `positions` int32 [B, Q]."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    if platform() != "cpu" or head_dim % 4:
        return Rotation(jnp.cos(angles), jnp.sin(angles))
    # XLA's CPU compiler computes what it can fuse anew in every layer and for every head that reads it: a sixth of a
    # training target's pass. What comes out of a loop it reads.
    halves = jnp.stack(jnp.split(angles, 2, axis=-1))
    cos, sin = jax.lax.map(lambda half: (jnp.cos(half), jnp.sin(half)), halves)
    return Rotation(jnp.concatenate([*cos], axis=-1), jnp.concatenate([*sin], axis=-1))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """x [B, Q, heads, D] with channel d and d + D/2 turned as a pair (Hugging Face's order), in x's dtype."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * by.cos - b * by.sin, b * by.cos + a * by.sin], axis=-1)
    return turned.astype(x.dtype)


# --- attention --------------------------------------------------------------------------------------------------


def held_dtype(dtype: Any) -> Any:
    """The dtype in which a list's caches hold values of `dtype`: uint16, the bits, for bfloat16 on a CPU; else itself.

    XLA's CPU compiler knows bfloat16 in products alone: to write one row, or to read one block, it turned whole caches
    into float32 and back, as often as a commit has rows.
    """
    return jnp.uint16 if dtype == jnp.bfloat16 and platform() == "cpu" else dtype


def held(values: jax.Array, dtype: Any) -> jax.Array:
    """Values as a cache of `dtype` holds them."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), dtype)
    return values.astype(dtype)


def values_of(cached: jax.Array) -> jax.Array:
    """The values of what a cache holds."""
    return jax.lax.bitcast_convert_type(cached, jnp.bfloat16) if cached.dtype == jnp.uint16 else cached


def embed(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """The rows [..., H] of an embedding [V, H] for `tokens` int32 [...], in `dtype`; read as `held`, for its reason."""
    if held_dtype(table.dtype) != table.dtype:
        # Or the compiler takes the bits of the whole table, once, before the loop that reads a few rows.
        table, tokens = jax.lax.optimization_barrier((table, tokens))
    return values_of(held(table, held_dtype(table.dtype))[tokens]).astype(dtype)


def by_kv_head(q: jax.Array, num_kv_heads: int) -> jax.Array:
    """Queries [B, Q, K*G, D] as `attention` takes them, [B, K, G*Q, D]."""
    batch, num_tokens, heads, width = q.shape
    groups = heads // num_kv_heads
    q = q.reshape(batch, num_tokens, num_kv_heads, groups, width).transpose(0, 2, 3, 1, 4)
    return q.reshape(batch, num_kv_heads, groups * num_tokens, width)


def by_token(attended: jax.Array, num_tokens: int) -> jax.Array:
    """What attention gave [B, K, G*Q, D], token by token: [B, Q, K*G, D]."""
    batch, kv_heads, _, width = attended.shape
    attended = attended.reshape(batch, kv_heads, -1, num_tokens, width).transpose(0, 3, 1, 2, 4)
    return attended.reshape(batch, num_tokens, -1, width)


class Past(NamedTuple):
    """One layer's committed keys and values, and who may see them."""

    k: jax.Array  # [B, K, S, D], as `held` holds them
    v: jax.Array
    seen: jax.Array  # bool [B, Q, S] or, where all queries see the same slots, [B, 1, S]
    # int32 [], no slot from here on is seen: the others are read block by block. None: all are read in one go.
    filled: jax.Array | None = None


def attention(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, past: Past | None = None) -> jax.Array:
    """Softmax attention of fresh queries over the committed past and the fresh keys, under one softmax.

    Args:
      q: [B, K, G*Q, D], query head g of a K/V head and query token i in row g*Q + i.
      k, v: fresh keys and values [B, K, T, D].
      visible: bool [B, Q, T], True where query i may see fresh key j; every query must see one, as a rule itself.
      past: committed slots; None for none.

    Returns:
      [B, K, G*Q, D] in v's dtype. Scores and softmax are float32.
    """
    groups = q.shape[2] // visible.shape[1]
    in_blocks = past is not None and past.filled is not None and past.k.shape[2] > BLOCK
    if past is not None and not in_blocks:
        past = past._replace(k=values_of(past.k), v=values_of(past.v))
    q = q * q.shape[-1] ** -0.5
    mask = jnp.tile(visible, (1, groups, 1))[:, None]  # [B, 1, G*Q, T]
    fresh = jnp.einsum("bkmd,bktd->bkmt", q, k, preferred_element_type=jnp.float32)
    fresh = jnp.where(mask, fresh, MASKED)
    top = jax.lax.stop_gradient(fresh.max(axis=-1, keepdims=True))  # [B, K, G*Q, 1]
    old = _past_scores(q, past, groups) if past is not None and not in_blocks else None
    if old is not None:
        top = jnp.maximum(top, old.max(axis=-1, keepdims=True))
    p = jnp.exp(fresh - top)
    total = p.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bkmt,bktd->bkmd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    if past is None:
        return (out / total).astype(v.dtype)
    if old is not None:
        p = jnp.exp(old - top)
        total += p.sum(axis=-1, keepdims=True)
        out += jnp.einsum("bkms,bksd->bkmd", p.astype(past.v.dtype), past.v, preferred_element_type=jnp.float32)
        return (out / total).astype(v.dtype)

    def add_block(i: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, out = sums
        block = _block(past, i)
        old = _past_scores(q, block, groups)
        new_top = jnp.maximum(top, old.max(axis=-1, keepdims=True))
        p, shrink = jnp.exp(old - new_top), jnp.exp(top - new_top)
        own = jnp.einsum("bkms,bksd->bkmd", p.astype(block.v.dtype), block.v, preferred_element_type=jnp.float32)
        return new_top, total * shrink + p.sum(axis=-1, keepdims=True), out * shrink + own

    num_blocks = (past.filled + BLOCK - 1) // BLOCK  # type: ignore[operator]
    _, total, out = jax.lax.fori_loop(0, num_blocks, add_block, (top, total, out))
    return (out / total).astype(v.dtype)


def _past_scores(q: jax.Array, past: Past, groups: int) -> jax.Array:
    """Scores float32 [B, K, G*Q, S] of scaled queries over committed slots, MASKED where they are not seen."""
    seen = jnp.tile(past.seen, (1, groups if past.seen.shape[1] > 1 else 1, 1))  # [B, G*Q or 1, S]
    old = jnp.einsum("bkmd,bksd->bkms", q.astype(past.k.dtype), past.k, preferred_element_type=jnp.float32)
    return jnp.where(seen[:, None], old, MASKED)


def _block(past: Past, i: jax.Array) -> Past:
    """The BLOCK slots from i * BLOCK on; the last ones, those of earlier blocks unseen, where fewer are left."""
    start = jnp.minimum(i * BLOCK, past.k.shape[2] - BLOCK)
    k, v = (jax.lax.dynamic_slice_in_dim(part, start, BLOCK, axis=2) for part in (past.k, past.v))
    seen = jax.lax.dynamic_slice_in_dim(past.seen, start, BLOCK, axis=2)
    return Past(values_of(k), values_of(v), seen & (start + jnp.arange(BLOCK) >= i * BLOCK))


Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # attention from q, k and v


# --- a decoder layer --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """Sizes of one decoder layer."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    attention_bias: bool = False
    mlp_bias: bool = False


# The logical axes of a decoder layer's weights (see sharding.RULES); those of its vectors are whole everywhere.
LAYER_AXES = {
    "q": ("embed", "heads"),
    "k": ("embed", "heads"),
    "v": ("embed", "heads"),
    "o": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "q_bias": ("heads",),
    "k_bias": ("heads",),
    "v_bias": ("heads",),
    "gate_bias": ("mlp",),
    "up_bias": ("mlp",),
}

MATRICES = tuple(name for name, axes in LAYER_AXES.items() if len(axes) == 2)


class DecoderLayer(nnx.Module):
    """A Llama decoder layer: RMSNorm, grouped-query attention, RMSNorm, SwiGLU, each added to its input.

    Weights are [in, out], or RowWeights. A stack of layers is this module with a leading axis on every leaf (see
    `run_layers`).
    """

    def __init__(self, config: LayerConfig, key: jax.Array, dtype: Any = jnp.float32):
        c = config
        heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        keys = iter(jax.random.split(key, 7))

        def weight(num_in: int, num_out: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(next(keys), (num_in, num_out), dtype) * num_in**-0.5)

        def bias(size: int, present: bool) -> nnx.Param | None:
            return nnx.Param(jnp.zeros((size,), dtype)) if present else None

        self.config = config
        self.input_norm = nnx.Param(jnp.ones((c.hidden_size,), dtype))
        self.q = weight(c.hidden_size, heads)
        self.k = weight(c.hidden_size, kv_heads)
        self.v = weight(c.hidden_size, kv_heads)
        self.o = weight(heads, c.hidden_size)
        self.mlp_norm = nnx.Param(jnp.ones((c.hidden_size,), dtype))
        self.gate = weight(c.hidden_size, c.intermediate_size)
        self.up = weight(c.hidden_size, c.intermediate_size)
        self.down = weight(c.intermediate_size, c.hidden_size)
        self.q_bias = bias(heads, c.attention_bias)
        self.k_bias = bias(kv_heads, c.attention_bias)
        self.v_bias = bias(kv_heads, c.attention_bias)
        self.o_bias = bias(c.hidden_size, c.attention_bias)
        self.gate_bias = bias(c.intermediate_size, c.mlp_bias)
        self.up_bias = bias(c.intermediate_size, c.mlp_bias)
        self.down_bias = bias(c.hidden_size, c.mlp_bias)

    def __call__(
        self, x: jax.Array, turn: Rotation, visible: jax.Array | Attend, past: Past | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The layer's output [B, Q, H] and its fresh keys and values, each [B, K, Q, D].

        `visible` is as of `attention`, or a function from q [B, Q, heads, D], k and v [B, Q, K, D] to what attention
        over these alone gives, in q's shape.
        """
        c = self.config
        batch, num_tokens, _ = x.shape

        h = rms_norm(x, self.input_norm[...], c.rms_norm_eps)
        q, k, v = _affine(h, self.q, self.q_bias), _affine(h, self.k, self.k_bias), _affine(h, self.v, self.v_bias)
        # Or XLA's TPU compiler takes the split into heads into the product, and copies all layers' weights for it.
        q, k, v = jax.lax.optimization_barrier((q, k, v))
        q = q.reshape(batch, num_tokens, c.num_heads, c.head_dim)
        k = k.reshape(batch, num_tokens, c.num_kv_heads, c.head_dim)
        v = v.reshape(batch, num_tokens, c.num_kv_heads, c.head_dim)
        # Attention runs in the weights' (and so the cache's) dtype, whether a key is fresh or read back.
        dtype = self.k[...].dtype
        q, k, v = rotate(q, turn).astype(dtype), rotate(k, turn).astype(dtype), v.astype(dtype)
        if callable(visible):
            out = visible(q, k, v)
            k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        else:
            k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, Q, D]
            out = by_token(attention(by_kv_head(q, c.num_kv_heads), k, v, visible, past), num_tokens)
        out = out.reshape(batch, num_tokens, -1).astype(x.dtype)
        x = x + _affine(out, self.o, self.o_bias)

        h = rms_norm(x, self.mlp_norm[...], c.rms_norm_eps)
        gate, up = _affine(h, self.gate, self.gate_bias), _affine(h, self.up, self.up_bias)
        return x + _affine(jax.nn.silu(gate) * up, self.down, self.down_bias), (k, v)


class RowWeight(nnx.Param):
    """A frozen matrix held [out, in], a row an output."""


def rows_are_faster() -> bool:
    """Whether this backend decodes faster with RowWeights than with [in, out]; where layers are not stacked."""
    return jax.default_backend() == "cpu"


def hold_rows(model: nnx.Module) -> None:
    """Turns the matrices of a model's unstacked decoder layers into RowWeights, where these are faster.

    It is for decoding: a training step's many rows and gradients gain nothing from it.
    """
    _hold(model, nnx.Param, RowWeight)


def hold_columns(model: nnx.Module) -> None:
    """Undoes `hold_rows`."""
    _hold(model, RowWeight, nnx.Param)


def _hold(model: nnx.Module, old: type[nnx.Param], new: type[nnx.Param]) -> None:
    for _, layer in nnx.iter_modules(model):
        for name in MATRICES if isinstance(layer, DecoderLayer) else ():
            weight = getattr(layer, name)
            if type(weight) is old and weight.ndim == 2 and rows_are_faster():
                setattr(layer, name, new(weight[...].T))


def _affine(x: jax.Array, w: nnx.Param, b: nnx.Param | None) -> jax.Array:
    if isinstance(w, RowWeight):
        rows = x.reshape(-1, x.shape[-1]).astype(w.dtype)
        y = _matmul_by_rows(rows, w[...], FEW_ROWS).reshape(*x.shape[:-1], -1).astype(x.dtype)
    else:
        y = matmul(x, w[...])
    return y if b is None else y + b[...].astype(y.dtype)


# --- stacks -----------------------------------------------------------------------------------------------------
# A stack is either one pytree whose leaves have a leading layer axis, run by a scan (one compiled body), or a list of
# per-layer pytrees, run by a Python loop.


def stacks_are_faster(platform: str, *, training: bool = False) -> bool:
    """Whether `platform` runs layers faster as one stack than as a list.

    XLA copies the slices of stacked weights before their products: on a CPU (8 times slower) and on a GPU, where it
    makes a decode at batch 1 read and write 2.7 times the bytes, and is nothing beside a training step's products.
    """
    return platform == "tpu" or (training and platform != "cpu")


def run_layers(
    body: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    stacks: tuple[Any, ...],
    span: tuple[int, int] | None = None,
) -> tuple[Any, Any]:
    """Runs `body(carry, one layer of each stack)` over the layers in turn, like `lax.scan`.

    Args:
      body: returns the new carry and this layer's result.
      carry: goes into the first layer.
      stacks: all stacked or all lists.
      span: the first and one past the last layer; None for all.

    Returns:
      The last carry, and the results stacked, or as a list where the stacks are lists.
    """
    if isinstance(stacks[0], (list, nnx.List)):
        results = []
        for layer in list(zip(*stacks, strict=True))[slice(*(span or (None,)))]:
            carry, result = body(carry, layer)
            results.append(result)
        return carry, results
    if span is None:
        return jax.lax.scan(body, carry, stacks)

    def indexed(carry: Any, i: jax.Array) -> tuple[Any, Any]:
        # Slicing the stacks to the span beforehand would copy the weights.
        layer = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stacks)
        return body(carry, layer)

    return jax.lax.scan(indexed, carry, jnp.arange(*span))


def unstack(stacked: Any, num_layers: int) -> list[Any]:
    """A stacked pytree as a list of `num_layers` pytrees."""
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_layers)]


def stack(layers: Any) -> Any:
    """A list of pytrees of one structure as one pytree with a leading layer axis."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
