"""The parts of a Llama decoder layer, shared by targets and drafters.

B rows · Q query tokens · S cache slots · H hidden width · K heads of K/V · G query heads per K/V head · D head width.
Precision: norms, rotary angles and softmax are float32; a matrix product runs in its weight's dtype, accumulates in
float32 and returns in the activation's dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.nn.attention import Attend, Past, attention, by_kv_head, by_token
from fasteagle_jax.nn.linear import RowWeight, affine, rows_are_faster
from fasteagle_jax.nn.norm import rms_norm
from fasteagle_jax.nn.rope import Rotation, rotate

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
        q, k, v = affine(h, self.q, self.q_bias), affine(h, self.k, self.k_bias), affine(h, self.v, self.v_bias)
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
        x = x + affine(out, self.o, self.o_bias)

        h = rms_norm(x, self.mlp_norm[...], c.rms_norm_eps)
        gate, up = affine(h, self.gate, self.gate_bias), affine(h, self.up, self.up_bias)
        return x + affine(jax.nn.silu(gate) * up, self.down, self.down_bias), (k, v)


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
