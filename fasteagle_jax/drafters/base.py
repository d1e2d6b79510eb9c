"""What drafters share: sizes, the fused features of the target, the draft vocabulary, ranking.

B rows · T stream positions · N levels · F feature layers · H hidden width · V draft vocabulary.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.decoding.interfaces import Accepted, Ranking, VocabWeights
from fasteagle_jax.decoding.sampling import gumbel_noise
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.kv_cache import Cache, Ring, as_ring, empty_cache, ring_slots
from fasteagle_jax.nn.linear import Linear
from fasteagle_jax.nn.moe import SparseMlp
from fasteagle_jax.nn.norm import RMSNorm
from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.nn.stored import NamedVariable
from fasteagle_jax.nn.transformer import DECODER_LAYER_NAMES, LayerConfig

log = logging.getLogger(__name__)


MOST_LEVELS = 1024  # more than any drafter has, few enough for a list of them


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """Sizes of any drafter, extended by each kind; `hidden_size` and `vocab_size` are its target's."""

    hidden_size: int  # H
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int  # V, tokens it can guess; vocab_size for all
    feature_layers: tuple[int, ...]  # the target's layers whose inputs it reads
    kind: str = ""  # of drafters.table.CLASSES
    num_levels: int = 7  # N
    rms_norm_eps: float = 1e-5
    rope: RopeConfig | None = RopeConfig()  # None for no rotation
    window: int | None = None  # W: a position sees itself and the W - 1 before it; None for all

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "num_levels")
        for name in sizes:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(f"drafter {name} is {getattr(self, name)!r}: give a whole number of at least 1")
        if self.num_levels > MOST_LEVELS:
            raise UserError(f"drafter num_levels is {self.num_levels}: give at most {MOST_LEVELS}")
        for name in ("vocab_size", "draft_vocab_size"):
            if not isinstance(getattr(self, name), int):
                raise UserError(f"drafter {name} is {getattr(self, name)!r}: give a whole number")
        if not all(isinstance(layer, int) for layer in self.feature_layers):
            raise UserError(f"drafter feature_layers are {self.feature_layers!r}: give whole numbers")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise UserError(
                f"draft_vocab_size is {self.draft_vocab_size}: it must be 1 to the target's {self.vocab_size}"
            )
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise UserError(
                f"drafter window is {self.window!r}: give a whole number of at least 1, or None for no limit"
            )
        if not self.feature_layers:
            raise UserError("feature_layers is empty: name at least one of the target's layers")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"drafter num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")

    @property
    def context_layers(self) -> tuple[int, ...]:
        """The target's layers whose keys and values it reads."""
        return ()

    @property
    def input_layers(self) -> tuple[int, ...]:
        """The target's layers whose inputs training needs: features first, then those that keys and values are made
        of."""
        return self.feature_layers + self.context_layers

    @property
    def pointwise(self) -> bool:
        """Whether levels read the states of no other stream position, so that training computes those alone that the
        loss looks at."""
        return False

    def copied_layer(self, num_layers: int) -> int:
        """The layer of a target of so many that its own start from: whose keys and values it reads, or the last."""
        return self.context_layers[0] if self.context_layers else num_layers - 1

    def check_target(self, target_config: Any) -> None:
        """Raises UserError if the drafter does not fit a target's layers.

        Features are inputs of the target's layers, or of index `num_layers` the output of the last one.
        """
        num_layers = target_config.num_layers
        if wrong := [f for f in self.feature_layers if not 0 <= f <= num_layers]:
            raise UserError(
                f"feature_layers has {', '.join(map(str, wrong))}, the target {num_layers} layers: "
                f"give 0 to {num_layers}, or take the target that the drafter was trained for"
            )

    def for_target(self, target_config: Any) -> Self:
        """The configuration for use with a target as it is loaded."""
        return self

    # --- number of operations (see training.flops) --------------------------------------------------------------

    @property
    def level_parameters(self) -> int:
        """Elements of a level's matrices without heads: those of a decoder layer."""
        return layer_config(self).matrix_size

    @property
    def head_flops(self) -> tuple[int, int]:
        """Operations of a token at a level's heads, forward and backward: a frozen one has one product each way."""
        product = 2 * self.hidden_size * self.draft_vocab_size
        return product, product

    @property
    def input_parameters(self) -> int:
        """Elements of the matrices that compute the levels' input."""
        return len(self.feature_layers) * self.hidden_size**2


class Constant(nnx.Variable):
    """An array of a drafter that is saved but not trained."""


class DrafterModule(nnx.Module):
    """A drafter that reads features [F*H] at every stream position and keeps its keys and values in a Ring."""

    architecture: str  # its name in a config.json
    Config: Any = DrafterConfig  # the kind's own

    def __init__(self, config: DrafterConfig, key: jax.Array, dtype: Any):
        c = config
        num_features = len(c.feature_layers) * c.hidden_size
        self.config = c
        self.fc = Linear(num_features, c.hidden_size, ("embed", "fused"), key, dtype)
        self.feature_scale = Constant(jnp.ones((num_features,), jnp.float32), axes=(None,))
        ids = jnp.arange(c.draft_vocab_size, dtype=jnp.int32)
        self.token_ids = None if c.draft_vocab_size == c.vocab_size else Constant(ids, axes=(None,))

    @property
    def num_levels(self) -> int:
        """N."""
        return self.config.num_levels

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The target's layers whose inputs are the features."""
        return self.config.feature_layers

    @property
    def context_layers(self) -> tuple[int, ...]:
        """The target's layers whose keys and values it reads."""
        return self.config.context_layers

    @property
    def pointwise(self) -> bool:
        """As of DrafterConfig."""
        return self.config.pointwise

    def rows_of(self, target: Any) -> jax.Array:
        """The rows [V, H] of the target's head for the draft vocabulary."""
        rows: jax.Array = target.head_rows()
        return rows if self.token_ids is None else rows[self.token_ids[...]]

    def first_head(self, target: Any) -> jax.Array:
        """What a head of its own starts as, float32 [V, H]: `rows_of` with the target's scale of logits."""
        return self.rows_of(target).astype(jnp.float32) * target.logit_map.scale

    def fused(self, features: jax.Array) -> jax.Array:
        """g [B, T, H] of the target's features [B, T, F*H]."""
        scaled = features.astype(jnp.float32) * self.feature_scale[...]
        return self.fc(scaled.astype(features.dtype))

    def empty_ring(self, num_layers: int, batch: int, num_slots: int, most_written: int, *, stacked: bool) -> Ring:
        """An empty cache for `batch` rows of up to `num_slots` stream positions.

        With a window its size depends on `most_written`, the most tokens of one write, and not on `num_slots`.
        """
        c = self.config
        slots = ring_slots(num_slots, c.window, most_written)
        dtype = self.fc.dtype
        return as_ring(empty_cache(num_layers, batch, c.num_kv_heads, slots, c.head_dim, dtype, stacked=stacked))

    def stored(self) -> list[NamedVariable]:
        """The tensors to store, of the unstacked form; by default all, named by their places in the module.

        `feature_scale` is not among them, since it is folded into fc.weight in files.
        """
        nodes = list(nnx.iter_graph(self))
        transposed = {id(node.weight) for _, node in nodes if isinstance(node, Linear) and not node.by_rows}
        return [
            NamedVariable(".".join(map(str, path)), node, id(node) in transposed)
            for path, node in nodes
            if isinstance(node, nnx.Variable) and node is not self.feature_scale
        ]

    def published(self) -> dict[str, Any]:
        """Entries of its config.json beside DrafterConfig's, for programs that read the architecture by other keys."""
        return {}

    def skip(self, new: Accepted, cache: Ring) -> Ring:
        """The cache past the accepted tokens, whose stream positions are left out for good."""
        return cache._replace(length=cache.length + new.count)


class WithoutCache:
    """What an `interfaces.Drafter` without keys and values keeps: how far it has read."""

    def empty_cache(self, batch: int, num_slots: int, most_written: int) -> Cache:
        """A Cache of positions alone."""
        return Cache([], [], jnp.zeros((batch,), jnp.int32))

    def extend(self, vocab: VocabWeights, new: Accepted, cache: Cache, num_levels: int, context: Any = ()) -> Cache:
        """The cache past the accepted tokens."""
        return self.skip(new, cache)

    def skip(self, new: Accepted, cache: Cache) -> Cache:
        """The cache past the accepted tokens."""
        return cache._replace(length=cache.length + new.count)


def layer_config(config: DrafterConfig) -> LayerConfig:
    """The sizes of a drafter's decoder layer."""
    c = config
    return LayerConfig(c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim, c.rms_norm_eps)


def attention_of(target_config: Any, layer: int) -> dict[str, Any]:
    """The fields of a drafter's configuration with which its layers attend as a layer of the target does."""
    kind, shared = target_config.layer_kinds[layer], target_config.layer
    return {
        "num_heads": shared.num_heads,
        "num_kv_heads": shared.num_kv_heads,
        "head_dim": shared.head_dim,
        "rope": kind.rope,
        "window": kind.window,
        "soft_cap": kind.soft_cap,
        "qkv_bias": shared.attention_bias or shared.qkv_bias,
        "qk_norm": shared.qk_norm,
        "sinks": shared.sinks,
        "attention_scale": shared.attention_scale,
    }


def copy_layer(into: Any, source: Any, neurons: jax.Array | None = None) -> list[str]:
    """Copies a target's layer into a drafter's wherever their shapes agree, as float32.

    `into` has some of the places of DECODER_LAYER_NAMES, of one layer or of a stack whose layers all get the same. What
    the target multiplies queries and outputs by goes into the matrices. `neurons` int32 [W] are those of the target's
    MLP that a narrower one starts from; None for all. Returns what was not copied, by the target's names.
    """
    left = []
    for name, place in DECODER_LAYER_NAMES.items():
        module, _, attribute = place.partition(".")
        of_source, of_drafter = getattr(source, module), getattr(into, module, None)
        if of_drafter is None:
            continue
        if isinstance(of_source, SparseMlp):  # no expert is what all tokens have
            left.append("its experts")
            continue
        part, own = (getattr(m, attribute) if attribute else m for m in (of_source, of_drafter))
        if part is None:
            continue
        if isinstance(part, nnx.Variable):
            if own is None:
                left.append(name)
            else:
                own[...] = jnp.broadcast_to(part[...].astype(jnp.float32), own.shape)
            continue
        if isinstance(part, RMSNorm):
            if own is None or own.weight.shape[-1:] != part.weight.shape:
                left.append(name)
            else:
                own.weight[...] = jnp.broadcast_to(part.gain - own.offset, own.weight.shape)
            continue
        matrix, bias = part.matrix, None if part.bias is None else part.bias[...]
        if neurons is not None and module == "mlp":
            matrix = matrix[neurons] if attribute == "down" else matrix[:, neurons]
            bias = bias if bias is None or attribute == "down" else bias[neurons]
        if own.matrix.shape[-2:] != matrix.shape:
            left.append(name)
        else:
            scale = source.residual_scale if place in ("attention.o", "mlp.down") else 1.0
            if place == "attention.q":
                scale = of_source.query_gain / of_drafter.query_gain
            own.set_matrix(jnp.broadcast_to(matrix.astype(jnp.float32) * scale, own.matrix.shape))
            if bias is not None and own.bias is None:
                left.append(f"{name}.bias")
            elif bias is not None:
                own.bias[...] = jnp.broadcast_to(bias.astype(jnp.float32) * scale, own.bias.shape)
    return left


def say_left(left: Sequence[str], layer: int, source: Any, own: Any) -> None:
    """Warns of what a drafter's layers lack of the target's layer that they start from; silent if nothing."""
    lacking = list(dict.fromkeys(left))
    if source.attention_output_norm is not None:
        lacking.append("its norms after attention and MLP")
    if source.mlp.activation != own.mlp.activation:
        lacking.append(f"its activation {source.mlp.activation}")
    if lacking:
        log.warning("the drafter starts from the target's layer %d, without %s", layer, ", ".join(lacking))


def random_head(config: DrafterConfig, key: jax.Array, dtype: Any) -> nnx.Param[jax.Array]:
    """A head [V, H] of a drafter's own."""
    rows = jax.random.normal(key, (config.draft_vocab_size, config.hidden_size), dtype) * config.hidden_size**-0.5
    return nnx.Param(rows, axes=("vocab", "embed"))


def draft_ids(vocab: VocabWeights) -> jax.Array:
    """int32 [V], the target's id of each entry of the draft vocabulary."""
    return jnp.arange(vocab.head.shape[0]) if vocab.token_ids is None else vocab.token_ids


def causal(query: jax.Array, key: jax.Array, window: int | None) -> jax.Array:
    """bool, True where a query at position `query` sees a key at `key`: its own and the `window` - 1 before it."""
    visible = key <= query
    return visible if window is None else visible & (query - key < window)


def pending(new: Accepted) -> jax.Array:
    """The pending tokens int32 [B], the last accepted ones, at which trees are rooted."""
    return jnp.take_along_axis(new.tokens, jnp.maximum(new.count - 1, 0)[:, None], axis=1)[:, 0]


def newest(new: Accepted, most: int) -> tuple[Accepted, jax.Array]:
    """The last `most` of each row's newly accepted tokens, and how many were skipped before them, int32 [B]."""
    if most >= new.tokens.shape[1]:
        return new, jnp.zeros_like(new.count)
    skipped = jnp.maximum(new.count - most, 0)
    index = skipped[:, None] + jnp.arange(most)  # [B, most]
    features = jnp.take_along_axis(new.features, index[..., None], axis=1)
    return Accepted(features, jnp.take_along_axis(new.tokens, index, axis=1), new.count - skipped), skipped


LEAST_BIAS = -1e9  # a banned token's: with -inf, a level of banned tokens alone would have no scores


def rank(logits: jax.Array, positions: jax.Array, ids: jax.Array, ranking: Ranking) -> jax.Array:
    """Logits float32 [B, N, V] by whose log-softmax a draft tree ranks its guesses.

    At temperature 0 the drafter's own; above, logits / temperature. Shared noise is added to these: the noise that
    the target will add at `positions` int32 [B, N], or [B, 1] for all levels, so that guesses agree with its draw far
    more often. `logits` are float32 [B, N, V], `ids` int32 [V] the target's ids. A request's bias is added to them, so
    that what it bans is guessed last. Ranking never influences the target's choice.
    """
    temperature = ranking.sampling.temperature
    sampled = temperature > 0
    if ranking.bias is not None:
        logits = logits + jnp.maximum(ranking.bias, LEAST_BIAS)[:, None, ids]

    def perturbed() -> jax.Array:
        scaled = logits / jnp.where(sampled, temperature, 1.0)[:, None, None]
        if not ranking.shared_noise:
            return scaled
        noise = gumbel_noise(ranking.sampling.seed[:, None], positions, ids)
        return jnp.where(sampled[:, None, None], scaled + noise, scaled)

    return jax.lax.cond(sampled.any(), perturbed, lambda: logits)
