"""A decoder layer, what differs from layer to layer, and loops over layers.

B rows · Q query tokens · H hidden width · K heads of K/V · D head width.
Precision: norms, rotary angles and softmax are float32; a matrix product runs in its weight's dtype, accumulates in
float32 and returns in the activation's dtype.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.nn.attention import Attend, Attention, Cached, EitherPast, Past
from fasteagle_jax.nn.mlp import Mlp
from fasteagle_jax.nn.moe import ExpertsConfig, SparseMlp, is_whole, layer_of
from fasteagle_jax.nn.norm import RMSNorm
from fasteagle_jax.nn.rope import RopeConfig, Rotation, rotation

NO_WINDOW = 2**30  # larger than any distance of positions


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """Sizes of one decoder layer."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    attention_bias: bool = False  # of q, k, v and the output
    mlp_bias: bool = False
    qkv_bias: bool = False  # of q, k and v, and not of the output
    qk_norm: bool = False  # norms of queries' and keys' heads
    attention_scale: float | None = None  # of scores; None for head_dim^-1/2
    sinks: bool = False  # see attention.Attention
    activation: str = "silu"  # of mlp.GATES
    norm_offset: float = 0.0  # see norm.RMSNorm
    output_norms: bool = False  # norms of what attention and MLP add to the stream
    residual_scale: float = 1.0  # of what they add
    experts: ExpertsConfig | None = None  # in place of the MLP

    @property
    def matrix_size(self) -> int:
        """Elements of the matrices that a token is multiplied with: all of a layer's but the experts not chosen."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * heads + 2 * kv_heads)
        if self.experts is not None:
            return attention + self.experts.matrix_size(self.hidden_size)
        return attention + 3 * self.hidden_size * self.intermediate_size


DECODER_LAYER_NAMES = {  # Hugging Face's name of a part of a decoder layer: its place in a DecoderLayer
    "input_layernorm": "input_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.o",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "self_attn.sinks": "attention.sinks",
}


class DecoderLayer(nnx.Module):
    """A decoder layer: RMSNorm, grouped-query attention, RMSNorm, gated MLP, each added to its input.

    That is Llama's, with what other families change in it (see LayerConfig).

    A stack of layers is this module with a leading axis on every leaf (see `run_layers`).
    """

    def __init__(self, config: LayerConfig, key: jax.Array, dtype: Any = jnp.float32):
        c = config
        keys = iter(jax.random.split(key, 7))

        def norm(size: int = c.hidden_size) -> RMSNorm:
            return RMSNorm(size, c.rms_norm_eps, dtype, offset=c.norm_offset)

        self.input_norm = norm()
        self.attention = Attention(
            c.hidden_size,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            keys,
            dtype,
            bias=c.attention_bias or c.qkv_bias,
            output_bias=c.attention_bias,
            scale=c.attention_scale,
            norm=functools.partial(norm, c.head_dim) if c.qk_norm else None,
            sinks=c.sinks,
        )
        self.mlp_norm = norm()
        self.mlp: Mlp | SparseMlp
        if c.experts is None:
            self.mlp = Mlp(c.hidden_size, c.intermediate_size, keys, dtype, bias=c.mlp_bias, activation=c.activation)
        else:
            self.mlp = SparseMlp(c.hidden_size, c.experts, keys, dtype, activation=c.activation)
        self.attention_output_norm = norm() if c.output_norms else None
        self.mlp_output_norm = norm() if c.output_norms else None
        self.residual_scale = c.residual_scale

    def __call__(
        self, x: jax.Array, rotation: Rotation, attend: Attend, index: Any = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The layer's output [B, Q, H] and its fresh keys and values, each [B, K, Q, D].

        `index` is its place in the stack that its Whole weights are, if it is of one.
        """
        x, fresh = self.attended(x, rotation, attend)
        normed = self.mlp_norm(x)
        if isinstance(self.mlp, SparseMlp):
            # Training's attention is a kernel's, over rows that are split as batches are.
            output = self.mlp(normed, index, rows="rows" if isinstance(attend, Cached) else "batch")
        else:
            output = self.mlp(normed)
        return x + self._added(output, self.mlp_output_norm), fresh

    def attended(
        self, x: jax.Array, rotation: Rotation, attend: Attend
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The stream [B, Q, H] between attention and MLP, and the fresh keys and values."""
        attended, fresh = self.attention(self.input_norm(x), rotation, attend)
        return x + self._added(attended, self.attention_output_norm), fresh

    def _added(self, output: jax.Array, norm: RMSNorm | None) -> jax.Array:
        """What an output of attention or MLP adds to the stream."""
        output = output if norm is None else norm(output)
        return output if self.residual_scale == 1 else output * self.residual_scale


# --- layers of several kinds ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ between layers of one structure, beside their weights."""

    rope: RopeConfig | None = RopeConfig()  # None: no rotation
    window: int | None = None  # W: a position sees itself and the W - 1 before it; None for all
    soft_cap: float | None = None  # of scores, see nn.attention.capped; the same for all layers


class LayerKinds:
    """The rotary tables and windows of a forward pass over layers of several kinds.

    A kind's number is its index among the distinct kinds. The layers of a stack are one compiled body: their kinds'
    numbers go through the scan, and pick the rotary table and the window there.
    """

    def __init__(self, kinds: Sequence[LayerKind], positions: jax.Array, head_dim: int, *, stacked: bool):
        """`kinds` are those of all layers in their order, `positions` int32 [B, Q] the tokens'."""
        self.distinct = tuple(dict.fromkeys(kinds))
        ropes = tuple(dict.fromkeys(kind.rope for kind in self.distinct))
        # A partial rotation has fewer channels, and so has the identity beside it.
        width = min((rope.width(head_dim) for rope in ropes if rope is not None), default=head_dim)
        tables = {rope: rotation(positions, rope, head_dim if rope else width) for rope in ropes}
        self._positions = positions
        self._rotations = [tables[kind.rope] for kind in self.distinct]
        numbers = [self.distinct.index(kind) for kind in kinds]
        varied = stacked and len(self.distinct) > 1
        # For `run_layers` beside the layers: the number of each one's kind, None for a stack of one kind.
        self.numbers: Any = jnp.asarray(numbers, jnp.int32) if varied else None if stacked else numbers

    def of(self, number: Any) -> LayerContext:
        """The LayerContext of a kind by its number: an int, an int32 [] inside a scan, or None for the only kind."""
        if not isinstance(number, jax.Array):
            kind = self.distinct[number or 0]
            return LayerContext(self._rotations[number or 0], self._positions, kind.window, kind.soft_cap, None)
        table = jax.tree.map(lambda *tables: jnp.stack(tables)[number], *self._rotations)
        windows = [kind.window for kind in self.distinct]
        soft_cap = self.distinct[0].soft_cap
        if len(set(windows)) == 1:
            return LayerContext(table, self._positions, windows[0], soft_cap, None)
        return LayerContext(table, self._positions, None, soft_cap, (number, tuple(windows)))


class LayerContext(NamedTuple):
    """One layer's rotary table and window."""

    rotation: Rotation
    positions: jax.Array  # int32 [B, Q]
    window: int | None
    soft_cap: float | None
    choice: tuple[jax.Array, tuple[int | None, ...]] | None  # inside a scan: the kind's number, the kinds' windows

    def attend(self, visible: Any, past: Past | EitherPast | None) -> Attend:
        """The layer's Attend: over `past` and fresh keys under a mask bool [B, Q, Q], or that of a Windowed `visible`.

        Inside a scan the latter has one branch for each kind, since a kernel's mask is static.
        """
        if callable(visible):
            if self.choice is None:
                return visible.within(self.window, self.soft_cap)
            number, windows = self.choice
            # lax.switch keeps weak references to its branches, which tuples such as Packed do not support.
            branches = [functools.partial(visible.within(window, self.soft_cap).__call__) for window in windows]
            return lambda q, k, v, sinks: jax.lax.switch(number, branches, q, k, v, sinks)
        rounds = past is not None and past.rounded
        if self.choice is None and self.window is None:
            return Cached(visible, past, self.soft_cap, rounds)
        window: Any = self.window
        if self.choice is not None:
            number, windows = self.choice
            window = jnp.asarray([NO_WINDOW if w is None else w for w in windows], jnp.int32)[number]
        visible = jnp.logical_and(visible, self.positions[:, :, None] - self.positions[:, None] < window)
        past = None if past is None else past.within(window, self.positions)
        return Cached(visible, past, self.soft_cap, rounds)


class Windowed(Protocol):
    """An Attend whose window can be set, such as Packed."""

    def within(self, window: int | None, soft_cap: float | None) -> Attend:
        """This attention with another window, None for all, and another soft cap of scores."""
        ...


# --- stacks and lists of layers ---------------------------------------------------------------------------------
# Layers are either a stack, one pytree whose leaves have a leading layer axis, run by a scan (one compiled body), or a
# list of pytrees, run by a Python loop.


def stacks_are_faster(platform: str, *, training: bool = False) -> bool:
    """Whether `platform` runs layers faster as one stack than as a list.

    On a CPU and on a GPU XLA copies the slices of stacked weights before their products. This multiplies the bytes of a
    decode at batch 1, and on a GPU is negligible beside a training step's products.
    """
    return platform == "tpu" or (training and platform != "cpu")


def run_layers(
    body: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    stacks: tuple[Any, ...],
    span: tuple[int, int] | None = None,
) -> tuple[Any, Any]:
    """Runs `body(carry, layer)`, a layer being one of each of `stacks`, from the first to the last, like `lax.scan`.

    Args:
      body: returns the new carry and the layer's result.
      carry: goes into the first layer.
      stacks: pytrees of layers, all stacks or all lists.
      span: the first and one past the last layer; None for all.

    Returns:
      The last carry, and the results as a stack or a list like the layers.
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
        return body(carry, jax.tree.map(lambda x: x if is_whole(x) else layer_of(x, i), stacks, is_leaf=is_whole))

    return jax.lax.scan(indexed, carry, jnp.arange(*span))


def unstack(stacked: Any, num_layers: int) -> list[Any]:
    """The list of `num_layers` pytrees in a stack."""
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_layers)]


def stack(layers: Any) -> Any:
    """The stack of a list of pytrees of one structure."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
