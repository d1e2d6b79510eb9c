"""A layer of experts: of E gated MLPs each token takes the k that a router scores highest.

B rows · Q tokens of a row · n tokens · E experts · k experts of a token · P = n k pairs of a token and an expert · H
hidden width.
Pairs are sorted by expert. Each expert that has any multiplies its own pairs alone, in blocks of some rows; in training
a TPU multiplies all at once (`lax.ragged_dot`). Either way no array is [n, E, ...] but the scores, and of few
tokens the experts that nobody chose are not read. A token's experts are added up in the order of their indices, so that
its sum does not depend on the tokens beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fasteagle_jax.devices.sharding import ExpertShard, by_experts, platform
from fasteagle_jax.nn.linear import Linear
from fasteagle_jax.nn.mlp import GATES, Mlp

LEAST_BLOCK, MOST_BLOCK = 8, 512  # rows that an expert multiplies at a time, on a CPU and on an accelerator
LOOP = "experts"  # name in a program of the loop over experts
FEW_TOKENS = 64  # rows up to which an accelerator is bound by memory


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Sizes and switches of a layer's experts."""

    num_experts: int  # E
    num_chosen: int  # k
    intermediate_size: int  # of an expert
    renormalised: bool  # the chosen experts' probabilities add up to 1
    shared_size: int | None = None  # of the expert that every token has, behind a gate; None for none
    bias: bool = False  # of the experts and of the router

    def matrix_size(self, hidden_size: int) -> int:
        """Elements of the matrices that a token is multiplied with."""
        of_experts = 3 * (self.num_chosen * self.intermediate_size + (self.shared_size or 0))
        return hidden_size * (of_experts + self.num_experts + bool(self.shared_size))


class Router(Linear):
    """Scores float32 of a layer's experts. Its weight is never int8: a little noise would choose other experts."""

    quantises = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [..., out] of x [..., H], multiplied in float32."""
        x, matrix = x.astype(jnp.float32), self.matrix.astype(jnp.float32)
        scores = jnp.einsum("...h,he->...e", x, matrix, precision=jax.lax.Precision.HIGHEST)
        return scores if self.bias is None else scores + self.bias[...].astype(jnp.float32)


class SparseMlp(nnx.Module):
    """The MLPs of a layer with experts, from the normed stream to what is added to it.

    `experts` is one Mlp with a leading axis E on every leaf.
    """

    def __init__(
        self,
        hidden_size: int,
        config: ExpertsConfig,
        keys: Iterator[jax.Array],
        dtype: Any = jnp.float32,
        *,
        activation: str = "silu",
    ):
        """Random weights; `activation` is one of GATES."""
        c = config
        self.num_experts, self.num_chosen, self.renormalised = c.num_experts, c.num_chosen, c.renormalised
        self.activation = activation
        self.router = Router(hidden_size, c.num_experts, ("embed", None), next(keys), dtype, bias=c.bias)
        key_experts, key_shared, key_gate = jax.random.split(next(keys), 3)

        def expert(key: jax.Array) -> Mlp:
            # Experts are split over devices, and so their insides are not.
            of_expert = iter(jax.random.split(key, 3))
            sizes = hidden_size, c.intermediate_size
            return Mlp(*sizes, of_expert, dtype, bias=c.bias, activation=activation, width_axis=None)

        self.experts = jax.vmap(expert)(jax.random.split(key_experts, c.num_experts))
        for _, node in nnx.iter_graph(self.experts):
            if isinstance(node, nnx.Param):
                node.set_metadata(axes=("expert", *node.axes), whole=True)
        if (bias := self.experts.down.bias) is not None:  # split as the outputs are
            bias.set_metadata(axes=("expert", "embed"))
        of_shared, size = iter(jax.random.split(key_shared, 3)), c.shared_size
        self.shared = Mlp(hidden_size, size, of_shared, dtype, activation=activation) if size else None
        self.shared_gate = Router(hidden_size, 1, ("embed", None), key_gate, dtype) if size else None

    def __call__(self, x: jax.Array, index: Any = None, *, rows: str = "rows") -> jax.Array:
        """[B, Q, H] of x [B, Q, H].

        `index` int32 [] is the layer's place in the stack of experts, None if these are its own alone; `rows` the
        logical axis of B, "rows" in decoding and "batch" in training.
        """
        chosen, weights = self.route(x)
        experts = self.experts
        if index is not None and rows == "batch":  # or the width of all layers' experts would be gathered at once
            experts, index = jax.tree.map(functools.partial(layer_of, i=index), experts), None
        y = by_experts(self._of_shard, rows, experts, x, chosen, weights, index).astype(x.dtype)
        if self.shared is None or self.shared_gate is None:
            return y
        return y + (jax.nn.sigmoid(self.shared_gate(x)) * self.shared(x)).astype(x.dtype)

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The chosen experts int32 [..., k] of x [..., H] and their weights float32 [..., k], see `choose_experts`."""
        return choose_experts(self.router(x), self.num_chosen, renormalised=self.renormalised)

    def _of_shard(
        self, experts: Mlp, x: jax.Array, chosen: jax.Array, weights: jax.Array, index: Any, shard: ExpertShard
    ) -> jax.Array:
        """What a device's experts add to its tokens, float32 [B, Q, H]."""
        num_experts, k = num_experts_of(experts), self.num_chosen
        tokens, mine = x.reshape(-1, x.shape[-1]), chosen.reshape(-1, k) - shard.first
        mine = jnp.where((mine >= 0) & (mine < num_experts), mine, num_experts)  # E: another device's
        block = block_rows(len(tokens), k, self.num_experts, platform())
        mlp = functools.partial(self._of_expert, shard=shard)
        outputs = of_pairs(experts, index, tokens, mine, block, mlp)  # [n, k, H]
        weighted = outputs.astype(jnp.float32) * weights.reshape(-1, k, 1)
        weighted = jnp.where(mine[..., None] < num_experts, weighted, 0)
        return sum((weighted[:, i] for i in range(1, k)), weighted[:, 0]).reshape(x.shape)

    def _of_expert(self, gate: Product, up: Product, down: Product, x: jax.Array, *, shard: ExpertShard) -> jax.Array:
        """[n, H] of x [n, H] by an expert's products; each device may have a part of H."""
        gated, raised = (product.add_bias(shard.sum_width(product.times(x))) for product in (gate, up))
        return down.add_bias(down.times(GATES[self.activation](gated, raised)))


def choose_experts(scores: jax.Array, num_chosen: int, *, renormalised: bool) -> tuple[jax.Array, jax.Array]:
    """The chosen experts int32 [..., k], in increasing order, and their weights float32 [..., k], of scores [..., E].

    Those of the highest scores, of equal ones the first; a weight is an expert's probability among all, or, with
    `renormalised`, among the chosen.
    """
    chosen = _in_order(jax.lax.top_k(scores, num_chosen)[1])
    of_chosen = jnp.take_along_axis(scores, chosen, axis=-1)
    among = of_chosen if renormalised else scores
    return chosen, jnp.exp(of_chosen - jax.nn.logsumexp(among, axis=-1, keepdims=True))


class Product(NamedTuple):
    """A matrix product of some rows and, apart, since it may be a sum over devices, its bias."""

    times: Callable[[jax.Array], jax.Array]  # [n, out] of [n, in]
    bias: jax.Array | None  # [out], or [n, out]; None for none

    def add_bias(self, y: jax.Array) -> jax.Array:
        """y [n, out] and the bias."""
        return y if self.bias is None else y + self.bias.astype(y.dtype)


# --- weights of a stack of layers -------------------------------------------------------------------------------
# A loop over a layer's experts inside the scan over layers reads one expert of one layer at a time out of the stack of
# all. Were the layer sliced first, as other weights are, the slice would be the inner loop's operand, and so a copy.


def is_whole(leaf: Any) -> bool:
    """Whether a weight of a stack goes into its layers whole, with the layer's index."""
    return isinstance(leaf, nnx.Variable) and leaf.get_metadata("whole", default=False)


def layer_of(stacked: jax.Array, i: Any) -> jax.Array:
    """Layer i of an array of a stack."""
    return jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False)


def num_experts_of(experts: Mlp) -> int:
    """E, of one layer's or of a stack's."""
    return experts.gate.weight.shape[-3]


# --- products of experts ----------------------------------------------------------------------------------------


def of_pairs(experts: Mlp, index: Any, x: jax.Array, chosen: jax.Array, block: int, mlp: Any) -> jax.Array:
    """The outputs [n, k, H] of the chosen experts int32 [n, k] for tokens x [n, H]; any value where chosen is E.

    `experts` are a layer's, or with `index` those of a stack; `block` is the number of rows that an expert multiplies
    at a time; `mlp(gate, up, down, x)` is an expert's output, given its three Products.
    """
    (num_tokens, k), num_experts = chosen.shape, num_experts_of(experts)
    num_pairs = num_tokens * k
    # Sorted by counting: a TPU's compiler takes half a minute for a sort.
    has = jnp.any(chosen[..., None] == jnp.arange(num_experts), axis=1).astype(jnp.int32)  # [n, E]
    ends = jnp.cumsum(has.sum(axis=0))  # int32 [E], of each expert's pairs among all
    places = jnp.cumsum(has, axis=0) - has + ends - has.sum(axis=0)  # [n, E] of a token's pair with an expert
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])  # [E + 1]
    place = jnp.take_along_axis(places, jnp.minimum(chosen, num_experts - 1), axis=1)  # [n, k]
    own = jnp.where(chosen < num_experts, place, num_pairs)
    tokens = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], chosen.shape)
    tokens = jnp.zeros((num_pairs,), jnp.int32).at[own].set(tokens, mode="drop")  # of the pairs by expert
    # Of a stack, or of int8 weights, all products at once would read a copy.
    own_weights = index is None and experts.gate.scale is None
    if platform() == "tpu" and num_tokens > FEW_TOKENS and own_weights:
        outputs = _at_once(experts, x[tokens], jnp.diff(starts), mlp)
    else:
        outputs = _in_blocks(experts, index, x, tokens, starts, block, mlp)
    return outputs[place]


def _in_order(chosen: jax.Array) -> jax.Array:
    """Different indices int32 [..., k] in increasing order, by comparing all with all."""
    rank = jnp.sum(chosen[..., None, :] < chosen[..., None], axis=-1)  # [..., k]
    at_rank = rank[..., None, :] == jnp.arange(chosen.shape[-1])[:, None]  # [..., rank, k]
    return jnp.sum(jnp.where(at_rank, chosen[..., None, :], 0), axis=-1)


def block_rows(num_tokens: int, k: int, num_experts: int, platform: str) -> int:
    """The rows that an expert multiplies at a time: about its share of the pairs, so that it is read once.

    An accelerator multiplies FEW_TOKENS rows as fast as it reads an expert, a CPU does not.
    """
    share = -(-num_tokens * k // num_experts)
    least, most = (LEAST_BLOCK, FEW_TOKENS) if platform == "cpu" else (FEW_TOKENS, MOST_BLOCK)
    return min(num_tokens, most, max(least, 1 << share.bit_length()))


def expected_experts(num_tokens: int, k: int, num_experts: int) -> float:
    """The expected number of experts that n tokens choose, if the router chooses all alike and independently."""
    return num_experts * (1 - (1 - k / num_experts) ** num_tokens)


def expected_turns(num_tokens: int, k: int, num_experts: int, block: int) -> float:
    """The expected turns of the loop over all experts, if the router chooses all alike and independently.

    An expert then has a binomial number of n tokens, of probability k/E each.
    """
    p = k / num_experts
    if p == 1:
        return float(num_experts * -(-num_tokens // block))
    counts = np.arange(num_tokens + 1)
    ways = math.lgamma(num_tokens + 1) - np.asarray(
        [math.lgamma(c + 1) + math.lgamma(num_tokens - c + 1) for c in counts]
    )
    chance = np.exp(ways + counts * math.log(p) + (num_tokens - counts) * math.log1p(-p))
    return float(num_experts * (chance * -(-counts // block)).sum())


def _in_blocks(
    experts: Mlp, index: Any, x: jax.Array, tokens: jax.Array, starts: jax.Array, block: int, mlp: Any
) -> jax.Array:
    """Outputs [P, H] of pairs sorted by expert, of tokens int32 [P], by a loop over blocks of one expert each."""
    num_blocks = -(-jnp.diff(starts) // block)  # [E]
    ends = jnp.cumsum(num_blocks)  # the blocks of an expert and those before it
    tokens = jnp.pad(tokens, (0, block))

    def expert_at(e: jax.Array) -> Mlp:
        at = (e,) if index is None else (index, e)

        def one(weights: jax.Array) -> jax.Array:
            own = weights.shape[len(at) :]
            return jax.lax.dynamic_slice(weights, at + (0,) * len(own), (1,) * len(at) + own).reshape(own)

        return jax.tree.map(one, experts)

    def add_block(i: jax.Array, outputs: jax.Array) -> jax.Array:
        e = jnp.sum(ends <= i, dtype=jnp.int32)
        start = starts[e] + (i - (ends[e] - num_blocks[e])) * block
        of_block, expert = x[jax.lax.dynamic_slice_in_dim(tokens, start, block)], expert_at(e)
        # A last block's rows past its expert's are overwritten by the next expert's.
        products = (_product(linear, linear.product, None) for linear in (expert.gate, expert.up, expert.down))
        return jax.lax.dynamic_update_slice_in_dim(outputs, mlp(*products, of_block), start, axis=0)

    empty = jnp.zeros((len(tokens), x.shape[1]), x.dtype)
    with jax.named_scope(LOOP):
        return jax.lax.fori_loop(0, ends[-1], add_block, empty)[: len(tokens) - block]


def _at_once(experts: Mlp, x: jax.Array, counts: jax.Array, mlp: Any) -> jax.Array:
    """Outputs [P, H] of pairs sorted by expert, x [P, H] their tokens, `counts` int32 [E] of each expert's."""

    of_expert = jnp.repeat(jnp.arange(len(counts)), counts, total_repeat_length=len(x))  # int32 [P]

    def product(linear: Linear) -> Product:
        def apply(x: jax.Array) -> jax.Array:
            weight = linear.weight[...]
            y = jax.lax.ragged_dot(x.astype(weight.dtype), weight, counts, preferred_element_type=jnp.float32)
            return y.astype(x.dtype)

        return _product(linear, apply, of_expert)

    return mlp(product(experts.gate), product(experts.up), product(experts.down), x)


def _product(linear: Linear, times: Callable[[jax.Array], jax.Array], rows: jax.Array | None) -> Product:
    """The Product of a Linear, `times` without its bias; `rows` int32 [n] pick a row's bias [out] of several."""
    if linear.bias is None:
        return Product(times, None)
    return Product(times, linear.bias[...] if rows is None else linear.bias[...][rows])
