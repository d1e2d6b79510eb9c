"""FastEagle (arXiv 2509.20416): a cascade of N decoder layers that guesses N tokens in one forward pass.

B rows · T stream positions · A newly accepted tokens · N levels · F feature layers · H hidden width · V draft
vocabulary · R rank of edge scores.
At stream position t it reads the target's features g[t] and the embedding of the next, already chosen token x[t+1]; the
output of level i is the guess for token x[t+1+i]. No draft token is ever an input of a level, so training is one causal
pass and the cache of verified positions needs no rollback.

The paper's levels are full layers with keys and values of their own. What is not in the paper:
- `norm_inputs` fuses features and token each over its root mean square: they differ by a factor of 100 in a real
  target, and an optimiser changes what they multiply by as much in a step;
- `reinject` adds the input again before every level;
- `context` "target": levels attend to the target's own keys and values, so that the drafter has no cache (cf. GLIDE);
  "shared": to those that the first level made at earlier positions, one cache for all levels, as EAGLE-3's later runs
  read those of its first;
- `levels` "shared": all have the same attention and MLP, and norms and reinjection of their own; "first": all but the
  first, which has its own;
- `side_by_side`: attention and MLP read the same stream and are added to it at once: one all-reduce a level;
- guesses that know the token before them on their path, outside of the cascade: by a `correction` of the state (as the
  later TreeFlash and DSpark do), or by `edges`, scores of pairs of tokens (see edges.py).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.decoding.interfaces import Accepted, Ranking, VocabWeights
from fasteagle_jax.decoding.state import NO_TOKEN
from fasteagle_jax.decoding.tree import Draft, TreeSpec, build, grow
from fasteagle_jax.devices.sharding import constrain, training_rows
from fasteagle_jax.drafters.base import (
    DrafterConfig,
    DrafterModule,
    attention_of,
    causal,
    copy_layer,
    draft_ids,
    newest,
    pending,
    random_head,
    rank,
    say_left,
)
from fasteagle_jax.drafters.edges import EdgeScores, below
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.attention import Attend, Attention, Cached, Past, by_head
from fasteagle_jax.nn.embedding import embed
from fasteagle_jax.nn.kv_cache import Cache, Ring, commit_ring, seen_in_ring
from fasteagle_jax.nn.linear import Linear, to_columns
from fasteagle_jax.nn.mlp import Mlp
from fasteagle_jax.nn.norm import RMSNorm, rms_norm
from fasteagle_jax.nn.packed_attention import GivenPast
from fasteagle_jax.nn.rope import Rotation, rotation
from fasteagle_jax.nn.stored import NamedVariable, stored_tensors
from fasteagle_jax.nn.transformer import DECODER_LAYER_NAMES, run_layers, stack, unstack

EMBEDDING_SHARE = 0.1  # initial size of the embedding relative to the stream, since copied layers never read one there

_LEVEL = DECODER_LAYER_NAMES | {"norm": "norm", "reinject": "reinject"}  # name in the file: place in a Level
CONTEXTS, LEVELS, HEADS = ("own", "target", "shared"), ("own", "shared", "first"), ("target", "own")


@dataclasses.dataclass(frozen=True)
class FastEagleConfig(DrafterConfig):
    """Sizes and switches of the cascade."""

    kind: str = "fasteagle"
    norm_inputs: bool = False  # fuse features and token each over its root mean square
    reinject: bool = False  # add the fused input again before every level
    correction: int | None = None  # hidden units of the Correction; None for no correction
    context: str = "own"  # of CONTEXTS: whose earlier keys and values a level attends to: its own, or the first level's
    context_layer: int | None = None  # of the target, for context "target"
    levels: str = "own"  # of LEVELS: which levels have an attention and MLP of their own, all, none or the first
    side_by_side: bool = False  # attention and MLP of a level read the same stream
    edges: int | None = None  # rank of the EdgeScores; None for none
    edges_reach: int = 1  # tokens before a guess that they read
    edges_gated: bool = False  # they read silu of the tokens and the state
    head: str = "target"  # of HEADS: the target's rows, frozen, or a head that starts as these and is trained
    # Of the attention, with context "target" as that layer's is (see transformer.LayerConfig, LayerKind).
    qkv_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    soft_cap: float | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, unit in (("correction", "units"), ("edges", "dimensions")):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"drafter {name} is {value!r}: give a number of {unit}, or None for none")
        for name, known in (("context", CONTEXTS), ("levels", LEVELS), ("head", HEADS)):
            if getattr(self, name) not in known:
                raise UserError(f"drafter {name} is {getattr(self, name)!r}: use {' or '.join(known)}")
        if not isinstance(self.edges_reach, int) or not 1 <= self.edges_reach <= self.num_levels:
            raise UserError(f"drafter edges_reach is {self.edges_reach!r}: give 1 to num_levels {self.num_levels}")
        if self.correction and self.head == "own":
            raise UserError("a drafter with a correction reads its guesses by the target's head: leave head own out")
        if self.correction and self.edges:
            raise UserError("a drafter has a correction or edges, not both: set one of them to None")
        if (self.context_layer is None) == (self.context == "target"):
            raise UserError(
                f"drafter context_layer is {self.context_layer} with context {self.context}: "
                "context target reads a layer of the target, other contexts none"
            )

    @property
    def context_layers(self) -> tuple[int, ...]:
        """The target's layers whose keys and values it reads."""
        return () if self.context_layer is None else (self.context_layer,)

    @property
    def pointwise(self) -> bool:
        """Whether a level reads no state that a level made at another stream position."""
        return self.context != "own"

    def check_target(self, target_config: Any) -> None:
        """As of DrafterConfig; the keys that it reads must be made and seen as its own are."""
        super().check_target(target_config)
        if self.context_layer is None:
            return
        if not 0 <= self.context_layer < target_config.num_layers:
            raise UserError(
                f"drafter context_layer is {self.context_layer}, the target has {target_config.num_layers} layers: "
                f"give 0 to {target_config.num_layers - 1}"
            )
        theirs = attention_of(target_config, self.context_layer)
        for name in ("num_kv_heads", "head_dim", "rope", "window", "qk_norm", "attention_scale", "soft_cap"):
            if getattr(self, name) != theirs[name]:
                raise UserError(
                    f"drafter {name} is {getattr(self, name)}, the target's {theirs[name]}: "
                    "to read the target's keys and values they must be equal"
                )

    def for_target(self, target_config: Any) -> Self:
        """As of DrafterConfig; what is rotated like the target's keys follows its choice of longrope's factors."""
        if self.context_layer is None or self.rope is None:
            return self
        return dataclasses.replace(self, rope=dataclasses.replace(self.rope, long=target_config.rope.long))

    @property
    def level_parameters(self) -> int:
        """Those of DrafterConfig, H^2 for reinjection, 3 H R for a correction of R units, (1 + J) H R for edges and
        H R more if they are gated."""
        extra = self.hidden_size * self.reinject + 3 * (self.correction or 0)
        extra += (1 + self.edges_gated + self.edges_reach) * (self.edges or 0)
        return super().level_parameters + self.hidden_size * extra

    @property
    def head_flops(self) -> tuple[int, int]:
        """Those of DrafterConfig, two more products backward of a head of its own, and the trained table of edges."""
        forward, backward = super().head_flops
        backward += 2 * self.hidden_size * self.draft_vocab_size * (self.head == "own")
        edges = 2 * (self.edges or 0) * self.draft_vocab_size
        return forward + edges, backward + 2 * edges

    @property
    def input_parameters(self) -> int:
        """Those of DrafterConfig, and 2 H^2 for the projection of [g, e]."""
        return super().input_parameters + 2 * self.hidden_size**2


class Correction(nnx.Module):
    """An MLP of R hidden units that corrects a level's state by the token before the guess."""

    def __init__(self, config: FastEagleConfig, key: jax.Array, dtype: Any):
        hidden, width = config.hidden_size, config.correction
        assert width is not None
        key_state, key_token = jax.random.split(key)
        self.of_state = Linear(hidden, width, ("embed", "fused"), key_state, dtype)
        self.of_token = Linear(hidden, width, ("embed", "fused"), key_token, dtype)
        # Starts at zero, so that training starts from guesses without it.
        self.to_state = Linear(width, hidden, ("fused", "embed"), None, dtype)

    def __call__(self, h: jax.Array, e: jax.Array, eps: float) -> jax.Array:
        """The corrected states [..., H], from states h and embeddings e [..., H]."""
        of_state, of_token = self.of_state(rms_norm(h, None, eps)), self.of_token(rms_norm(e, None, eps))
        return h + self.to_state(jax.nn.silu(of_state + of_token))


class Layer(nnx.Module):
    """Attention and MLP, of one level or of all."""

    def __init__(self, config: FastEagleConfig, key: jax.Array, dtype: Any):
        c, keys = config, iter(jax.random.split(key, 7))
        sizes = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        head_norm = functools.partial(RMSNorm, c.head_dim, c.rms_norm_eps, dtype)
        self.attention = Attention(
            *sizes,
            keys,
            dtype,
            bias=c.qkv_bias,
            output_bias=False,
            scale=c.attention_scale,
            norm=head_norm if c.qk_norm else None,
            sinks=c.sinks,
        )
        self.mlp = Mlp(c.hidden_size, c.intermediate_size, keys, dtype)


class Level(nnx.Module):
    """One level of the cascade: a decoder layer, the norm before the head, and optionally the reinjected input.

    `attention` and `mlp` are None if it has none of its own.
    """

    def __init__(self, config: FastEagleConfig, key: jax.Array, dtype: Any, *, has_layer: bool):
        c = config
        hidden, eps = c.hidden_size, c.rms_norm_eps
        layer = Layer(c, key, dtype) if has_layer else None
        self.input_norm = RMSNorm(hidden, eps, dtype)
        self.attention = None if layer is None else layer.attention
        self.mlp_norm = RMSNorm(hidden, eps, dtype)
        self.mlp = None if layer is None else layer.mlp
        self.norm = RMSNorm(hidden, eps, dtype)
        # Starts at zero, so that training starts from the plain cascade.
        self.reinject = Linear(hidden, hidden, ("embed", "fused"), None, dtype) if c.reinject else None


class FastEagle(DrafterModule):
    """The drafter. `levels` is one stacked Level (leading axis N) or, unstacked, a list of N of them.

    Levels that share their layer are always a list: XLA's TPU compiler keeps the layer in the chip's own memory where
    it sees all its uses, and would read it anew in each iteration of a scan.
    """

    architecture = "FastEagleDrafter"
    Config = FastEagleConfig
    config: FastEagleConfig

    def __init__(self, config: FastEagleConfig, key: jax.Array, dtype: Any = jnp.float32, *, stacked: bool = True):
        c = config
        key_fc, key_input, key_levels = jax.random.split(key, 3)
        super().__init__(c, key_fc, dtype)
        self.stacked = stacked  # the form of its hidden states and, if it has its own layers, of its levels and cache
        self.fuse = Linear(2 * c.hidden_size, c.hidden_size, ("embed", "fused"), key_input, dtype)
        # One for all levels: one a level had five times the parameters and was no better.
        self.correction = Correction(c, jax.random.fold_in(key, 1), dtype) if c.correction else None
        sizes = c.hidden_size, c.edges, c.edges_reach, c.edges_gated, c.draft_vocab_size, c.rms_norm_eps
        self.edges = EdgeScores(*sizes, jax.random.fold_in(key, 2), dtype) if c.edges else None
        self.head = random_head(c, jax.random.fold_in(key, 4), dtype) if c.head == "own" else None
        self.shared = None if c.levels == "own" else Layer(c, jax.random.fold_in(key, 3), dtype)
        keys = jax.random.split(key_levels, c.num_levels)
        levels = jax.vmap(lambda k: Level(c, k, dtype, has_layer=c.levels == "own"))(keys)
        each = unstack(levels, c.num_levels)
        if c.levels == "first":
            each[0] = Level(c, keys[0], dtype, has_layer=True)
        self.levels: Any = levels if self.scans else nnx.List(each)

    @property
    def scans(self) -> bool:
        """Whether the levels are one scanned stack rather than a list."""
        return self.stacked and self.shared is None

    def start_from(
        self, target: Any, feature_rms: jax.Array, *, layers: bool, neurons: jax.Array | None = None
    ) -> None:
        """Initialises norms and a head from the target's and, with `layers`, each layer from one of the target's.

        That is the last one, or the one whose keys and values it reads. The head reads every level's output, as it
        reads that of the target's last layer. With `layers` the input is the highest feature, of root mean square
        `feature_rms` float32 [F], plus the embedding; a narrower MLP has the `neurons` int32 [W] of the target's. Warns
        of parts of the layer that are not copied.
        """
        c = self.config
        hidden = c.hidden_size
        copied = c.copied_layer(target.config.num_layers)
        levels = [self.levels] if self.scans else list(self.levels)
        for level in levels:
            level.norm.weight[...] = jnp.broadcast_to(target.norm.gain, level.norm.weight.shape)
        if self.head is not None:
            self.head[...] = self.first_head(target)
        if not layers:
            return
        source = target.layer(copied)
        parts = levels if self.shared is None else [self.shared, *levels]
        left = [name for part in parts for name in copy_layer(part, source, neurons)]
        say_left(left, copied, source, parts[0])
        # The copied layers expect a stream of the highest feature's size.
        size = feature_rms[-1]
        self.fc.set_matrix(jnp.zeros(self.fc.matrix.shape).at[-hidden:].set(jnp.eye(hidden) * size))
        read: tuple[Any, Any] = 1.0, 1.0  # the sizes of what `fuse` reads
        if not c.norm_inputs:
            read = size, jnp.sqrt(jnp.mean(target.embedding[...].astype(jnp.float32) ** 2))
        gains = size / read[0], EMBEDDING_SHARE * size / read[1]
        self.fuse.set_matrix(jnp.concatenate([jnp.eye(hidden) * gain for gain in gains]))

    def own_head(self) -> jax.Array | None:
        """The table [V, R] of its edge scores, which reads the last R entries of hidden states; else None.

        A head of its own comes before it, [V, H + R]; else the head itself is the target's, frozen.
        """
        own = [] if self.head is None else [self.head[...]]
        own += [] if self.edges is None else [self.edges.table[...]]
        return jnp.concatenate(own, axis=-1) if own else None

    def vocab_weights(self, target: Any) -> VocabWeights:
        """The target's embedding, the head of the draft vocabulary, and with edges that vocabulary's shares."""
        embedding, ids = target.embedding[...], None if self.token_ids is None else self.token_ids[...]
        if self.head is None:
            vocab = VocabWeights(embedding, self.rows_of(target), ids, target.logit_map)
        else:
            vocab = VocabWeights(embedding, self.head[...], ids)
        if self.edges is None:
            return vocab
        # A row on every device: a draft that looked tokens up in the embedding would exchange them level by level.
        shares = self.edges.shares(embed(embedding, draft_ids(vocab), target.activation_dtype))
        return vocab._replace(shares=constrain(shares.reshape(len(shares), -1), None, None))

    def empty_cache(self, batch: int, num_slots: int, most_written: int) -> Ring | Cache:
        """The empty Ring of the levels that write one, all or the first, as a stack or list like them; with the
        target's context a length alone."""
        if self.context_layers:
            return Cache([], [], jnp.zeros((batch,), jnp.int32))
        num_layers = 1 if self.config.context == "shared" else self.num_levels
        return self.empty_ring(num_layers, batch, num_slots, most_written, stacked=self.scans)

    def hidden_states(
        self,
        embedding: jax.Array,
        features: jax.Array,
        next_tokens: jax.Array,
        positions: jax.Array,
        visible: jax.Array | Attend,
        cache: Ring | None = None,
        num_levels: int | None = None,
        *,
        context: tuple[Any, ...] = (),
        remat: Any = None,
        head_inputs: bool = True,
        at: jax.Array | None = None,
        uncorrected: bool = False,
    ) -> tuple[Any, Any]:
        """The head's input at every level and position, and the fresh keys and values.

        Args:
          embedding: the target's embedding [V, H].
          features: target features g[t] [B, T, F*H].
          next_tokens: x[t+1] int32 [B, T].
          positions: t int32 [B, T].
          visible: bool [B, T, T], True where position i may see fresh position j, inside the window; or an Attend (see
            nn.attention).
          cache: committed stream positions; None for none.
          num_levels: N, how many of the first levels to run; None for all.
          context: for context "target" the target's keys and values (k, v) [B, K, T, D] at these positions, of which
            position i sees those that `visible` allows; or a Past, which it sees besides what `visible` allows.
          remat: a policy of jax.checkpoint_policies, by which the backward pass recomputes levels; None: it does not.
          head_inputs: False returns the levels' outputs in place of the head's input for guesses after the true tokens
            before them.
          at: int32 [B, A], if `pointwise`: the places along T that are wanted, of which alone states are computed; None
            for all.
          uncorrected: True adds the head's input without the correction, if there is one.

        Returns:
          A stack or list of N hidden states [B, T, H], entry i - 1 the guess for x[t+1+i], with edges [B, T, H + R], of
          which `own_head` reads the last R, and [B, T, 2 H] if the last H are uncorrected; and (k, v) for commit_ring.
        """
        c = self.config
        dtype = features.dtype  # of all activations
        picked = functools.partial(_picked, at=at)
        tokens_before: Any = [None] * c.num_levels
        if head_inputs and not self.has_split_draft:
            tokens_before = [picked(x) for x in self._tokens_before(next_tokens)]
        trains = callable(visible)
        rows = "batch" if trains else "rows"  # logical axis in training and in decoding
        # The target's keys end at position t: a level stands at the next one, that of x[t+1].
        stands = positions + (c.context == "target")
        if c.context == "shared":
            fused = self._fuse(embedding, features, next_tokens, rows)  # [B, T, H]
            context = (self._first_keys(fused, stands, rows),)
            fused = picked(fused)  # [B, A, H]
        else:
            fused = self._fuse(embedding, picked(features), picked(next_tokens), rows)
        attend_to = functools.partial(_attend, visible, context=context, positions=positions, at=at, config=c)
        positions, stands = picked(positions), picked(stands)
        reinjected = rms_norm(fused, None, c.rms_norm_eps) if c.reinject else None
        inputs: Any = [None] * c.num_levels
        if reinjected is not None and not trains and not self.scans:
            every = [level.reinject(reinjected) for level in self.levels]
            inputs = list(constrain(jnp.stack(every), None, rows, None, None))  # one exchange for all levels
        table = rotation(stands, c.rope, c.head_dim)
        past = None if self.scans else [None] * c.num_levels
        one_past = None  # of all levels
        if cache is not None and c.context == "shared":
            one_past = cache.layers[0] if isinstance(cache.k, list) else tuple(part[0] for part in cache.layers)
        elif cache is not None:
            past = cache.layers
        filled = None if cache is None else cache.filled()

        if self.scans:
            tokens_before = None if tokens_before[0] is None else jnp.stack(tokens_before)
            inputs = None

        def level_step(h: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            level, cached, before, given = xs
            cached = cached if one_past is None else one_past
            level_past = None
            if cached is not None:
                k, v, slot_positions = cached
                level_past = Past(k, v, seen_in_ring(slot_positions, positions, c.window), filled)
            if given is not None:
                h = h + given
            elif reinjected is not None:
                # All-reduced before the sum: XLA's partitioner (jax 0.10.2) gave wrong numbers on data 2 x fsdp 2 x
                # tensor 2 if the stream was added to partial sums over fsdp.
                h = h + constrain(level.reinject(reinjected), rows, None, None)
            h, kv = self._run(level, h, table, attend_to(level_past))  # h_i = L_i(h_i-1)
            h = training_rows(h, visible)
            if not head_inputs:
                return h, (h, kv)
            e = None
            if before is not None:
                e = embed(embedding, jnp.maximum(before, 0), dtype) * (before != NO_TOKEN)[..., None].astype(dtype)
            hidden = self.head_input(level, h, e)
            if uncorrected and self.correction is not None:
                hidden = jnp.concatenate([hidden, level.norm(h)], axis=-1)
            return h, (hidden, kv)

        if remat is not None:
            level_step = jax.checkpoint(level_step, policy=remat)
        span = None if num_levels in (None, c.num_levels) else (0, num_levels)
        _, results = run_layers(level_step, fused, (self.levels, past, tokens_before, inputs), span)
        if self.scans:
            states, fresh = results
        else:
            states = [hidden for hidden, _ in results]
            states = jnp.stack(states) if self.stacked else states
            fresh = tuple([kv[part] for _, kv in results] for part in range(2))
        if c.context == "shared":
            k, v = (by_head(part) for part in context[0])
            fresh = (k[None], v[None]) if self.scans else ([k], [v])
        return states, fresh

    def _tokens_before(self, next_tokens: jax.Array) -> list[jax.Array]:
        """Of each level the J tokens before its guesses int32 [B, T, J], the nearest first.

        The nearest before level i's is i - 1 after x[t+1]; no loss reads past a segment's end. Those before x[t+1] are
        NO_TOKEN.
        """
        none = jnp.full_like(next_tokens, NO_TOKEN)
        reach = range(self.config.edges_reach)
        return [
            jnp.stack([jnp.roll(next_tokens, j - i, axis=1) if j <= i else none for j in reach], axis=-1)
            for i in range(self.num_levels)
        ]

    def _fuse(self, embedding: jax.Array, features: jax.Array, next_tokens: jax.Array, rows: str) -> jax.Array:
        """The levels' input [B, T, H], FC([g_t, e_t+1]); `rows` is the batch's logical axis."""
        # Gathered over the mesh at once: a stream split by its width exchanges a sum in every norm.
        g = constrain(self.fused(features), rows, None, None)
        e = embed(embedding, next_tokens, features.dtype)
        if self.config.norm_inputs:
            g, e = (rms_norm(x, None, self.config.rms_norm_eps) for x in (g, e))
        return constrain(self.fuse(jnp.concatenate([g, e], axis=-1)), rows, None, None)

    def _first_keys(self, fused: jax.Array, positions: jax.Array, rows: str) -> tuple[jax.Array, jax.Array]:
        """The first level's keys and values [B, T, K, D], with context "shared" those of all levels."""
        c = self.config
        first = self._level_list()[0]
        if first.reinject is not None:
            fused = fused + constrain(first.reinject(rms_norm(fused, None, c.rms_norm_eps)), rows, None, None)
        table = rotation(positions, c.rope, c.head_dim)
        _, k, v = self._layer_of(first).attention.project(first.input_norm(fused), table)
        return k, v

    def _layer_of(self, level: Level) -> Any:
        """What has a level's attention and MLP."""
        return self.shared if level.attention is None else level

    def _run(
        self, level: Level, h: jax.Array, table: Rotation, attend: Attend
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """A level's output [B, T, H] and its fresh keys and values."""
        layer = self._layer_of(level)
        attended, fresh = layer.attention(level.input_norm(h), table, attend)
        if self.config.side_by_side:
            return h + (attended + layer.mlp(level.mlp_norm(h))), fresh
        h = h + attended
        return h + layer.mlp(level.mlp_norm(h)), fresh

    def head_input(self, level: Level, h: jax.Array, e: jax.Array | None) -> jax.Array:
        """The head's input [..., H] from a level's output h, given the embeddings of the tokens before the guess.

        `e` is [..., J, H], the nearest first, zero for those that are not known. With edges [..., H + R].
        """
        if self.correction is not None:
            assert e is not None
            h = self.correction(h, e[..., 0, :], self.config.rms_norm_eps)
        if self.edges is not None and e is not None:
            return jnp.concatenate([level.norm(h), self.edges.query(h, e)], axis=-1)
        return level.norm(h)

    # --- decoding -----------------------------------------------------------------------------------------------

    def extend(
        self, vocab: VocabWeights, new: Accepted, cache: Any, num_levels: int, context: tuple[Past, ...] = ()
    ) -> Any:
        """The cache of the first levels with the accepted tokens' stream positions in it."""
        if self.context_layers:
            return self.skip(new, cache)
        return self._advance(vocab, new, cache, num_levels)[1]

    def draft(
        self,
        vocab: VocabWeights,
        new: Accepted,
        cache: Any,
        tree: TreeSpec,
        ranking: Ranking,
        context: tuple[Past, ...] = (),
    ) -> tuple[Draft, Any]:
        """A tree rooted at the pending token (see interfaces.Drafter).

        A tree of fewer levels runs the first levels alone, on at most as many new tokens as its rounds accept. With a
        correction or edges it is grown level by level, since guesses depend on the token before them.
        """
        num_levels = tree.num_levels(self.num_levels)
        if self.has_split_draft:
            logits, cache = self.draft_logits(vocab, new, cache, num_levels, context)
            return self.build_tree(vocab, new, cache, logits, tree, ranking), cache
        states, cache = self._newest_states(vocab, new, cache, num_levels, context)  # [B, N, H]
        grown = self._corrected_tree if self.edges is None else self._tree_of_edges
        return grown(vocab, new, cache, states, tree, ranking), cache

    def _corrected_tree(
        self, vocab: VocabWeights, new: Accepted, cache: Any, states: jax.Array, tree: TreeSpec, ranking: Ranking
    ) -> Draft:
        """The tree of states [B, N, H] of levels, corrected by the token before a guess."""
        levels, ids, root, length = self._level_list(), draft_ids(vocab), pending(new), cache.length

        def states_below(depth: int, tokens: jax.Array) -> jax.Array:
            """The head's input [B, f, H] for guesses at a depth, below f nodes that hold `tokens` int32 [B, f]."""
            e = embed(vocab.embedding, tokens, states.dtype)
            h = jnp.broadcast_to(states[:, depth - 1, None], e.shape)
            return self.head_input(levels[depth - 1], h, e[..., None, :])

        def guess(below: jax.Array, depth: int) -> jax.Array:
            return rank(vocab.logits(below), length[:, None] + depth, ids, ranking)  # [B, f, V]

        def follow(below: jax.Array, parent: jax.Array, index: jax.Array, depth: int) -> jax.Array:
            return states_below(depth + 1, ids[index])

        return grow(tree, root, ids, states.shape[1], states_below(1, root[:, None]), guess, follow)

    def _tree_of_edges(
        self, vocab: VocabWeights, new: Accepted, cache: Any, states: jax.Array, tree: TreeSpec, ranking: Ranking
    ) -> Draft:
        """The tree of states [B, N, H] of levels, with edge scores."""
        assert self.edges is not None and vocab.shares is not None
        table = vocab.shares
        ids, num_levels, root = draft_ids(vocab), states.shape[1], pending(new)
        hidden = [self.head_input(level, states[:, i], None) for i, level in enumerate(self._level_list()[:num_levels])]
        logits = vocab.logits(jnp.stack(hidden, axis=1))  # [B, N, V]
        edges, length = self.edges, cache.length
        start = edges.shares(embed(vocab.embedding, root, states.dtype))[:, None]  # [B, 1, J, R]

        def guess(paths: jax.Array, depth: int) -> jax.Array:
            scored = logits[:, depth - 1, None] + edges.of_all(states[:, depth - 1, None], paths[:, :, 0])  # [B, f, V]
            return rank(scored, length[:, None] + depth, ids, ranking)

        def follow(paths: jax.Array, parent: jax.Array, index: jax.Array, depth: int) -> jax.Array:
            shares = embed(table, index, states.dtype)
            return below(paths, parent, shares.reshape(*index.shape, *paths.shape[2:]))

        return grow(tree, root, ids, num_levels, start, guess, follow)

    @property
    def has_split_draft(self) -> bool:
        """Whether guesses are independent, so that `draft` is `draft_logits` followed by `build_tree`."""
        return self.correction is None and self.edges is None

    def draft_logits(
        self, vocab: VocabWeights, new: Accepted, cache: Any, num_levels: int, context: tuple[Past, ...] = ()
    ) -> tuple[jax.Array, Any]:
        """The first half of `draft`: logits float32 [B, N, V] of all levels, and the cache."""
        hidden, cache = self._newest_states(vocab, new, cache, num_levels, context)  # [B, N, H]
        return vocab.logits(hidden), cache

    def build_tree(
        self, vocab: VocabWeights, new: Accepted, cache: Any, logits: jax.Array, tree: TreeSpec, ranking: Ranking
    ) -> Draft:
        """The second half of `draft`: the tree of those logits. The pending token is at cache.length."""
        positions = cache.length[:, None] + 1 + jnp.arange(logits.shape[1])  # level i guesses the token i further on
        return build(tree, pending(new), rank(logits, positions, draft_ids(vocab), ranking), vocab.token_ids)

    def _newest_states(
        self, vocab: VocabWeights, new: Accepted, cache: Any, num_levels: int, context: tuple[Past, ...]
    ) -> tuple[jax.Array, Any]:
        """The first levels' states [B, N, H] at the last accepted position, and the cache with all positions.

        The states are the head's input or, if guesses depend on the token before them, the levels' outputs. Of accepted
        tokens those are read that a tree of so many levels can accept; with the target's context the last one alone.
        """
        new, skipped = newest(new, 1 if context else num_levels + 1)
        cache = cache._replace(length=cache.length + skipped)
        if not context:
            return self._advance(vocab, new, cache, num_levels)
        positions = cache.length[:, None]  # int32 [B, 1]
        itself = jnp.ones((len(positions), 1, 1), bool)
        stream = vocab.embedding, new.features, new.tokens, positions, itself, None, num_levels
        hidden, _ = self.hidden_states(*stream, context=context, head_inputs=self.has_split_draft)
        return jnp.stack([h[:, 0] for h in hidden], axis=1), self.skip(new, cache)

    def _advance(self, vocab: VocabWeights, new: Accepted, cache: Ring, num_levels: int) -> tuple[jax.Array, Ring]:
        """`_newest_states` on all accepted tokens, with a cache of its own."""
        batch, num_tokens = new.tokens.shape
        index = jnp.arange(num_tokens)
        positions = cache.length[:, None] + index
        visible = causal(index[:, None], index, self.config.window)
        visible = jnp.broadcast_to(visible, (batch, num_tokens, num_tokens))
        stream = vocab.embedding, new.features, new.tokens, positions, visible, cache, num_levels
        last = jnp.maximum(new.count - 1, 0)[:, None]
        at = last if self.pointwise else None
        hidden, fresh = self.hidden_states(*stream, head_inputs=self.has_split_draft, at=at)
        if at is None:
            hidden = [jnp.take_along_axis(h, last[..., None], axis=1) for h in hidden]
        return jnp.stack([h[:, 0] for h in hidden], axis=1), commit_ring(cache, fresh, new.count)

    # --- its form, and its files --------------------------------------------------------------------------------

    def _level_list(self) -> list[Level]:
        return unstack(self.levels, self.num_levels) if self.scans else list(self.levels)

    def unstacked(self) -> FastEagle:
        """The same drafter with its levels as a list, which XLA's CPU compiler runs faster."""
        other = nnx.merge(*nnx.split(self))
        if self.scans:
            other.levels = nnx.List(self._level_list())
        other.stacked = False
        return other

    def stacked_form(self) -> FastEagle:
        """The same drafter with its levels as one scanned stack."""
        if self.stacked:
            return self
        other = nnx.merge(*nnx.split(self))
        to_columns(other)
        other.stacked = True
        if other.scans:
            other.levels = stack(list(other.levels))
        return other

    def stored(self) -> list[NamedVariable]:
        """The tensors of DrafterModule.stored, with levels numbered from 0."""
        names = {"fc": "fc", "fuse": "fuse"}
        if self.correction is not None:
            names |= {name: name for name in ("correction.of_state", "correction.of_token", "correction.to_state")}
        if self.edges is not None:
            gate = ("edges.gate",) if self.config.edges_gated else ()
            names |= {name: name for name in ("edges.of_state", "edges.of_token", "edges.table", *gate)}
        if self.head is not None:
            names["head"] = "head"
        if self.shared is not None:
            shared = {name: place for name, place in DECODER_LAYER_NAMES.items() if "." in place}
            names |= {f"shared.{name}": f"shared.{place}" for name, place in shared.items()}
        tensors = stored_tensors(self, names)
        if self.token_ids is not None:
            tensors.append(NamedVariable("token_ids", self.token_ids))
        for i, level in enumerate(self.levels):
            of_level = {
                name: place for name, place in _LEVEL.items() if level.attention is not None or "." not in place
            }
            tensors += stored_tensors(level, {f"levels.{i}.{name}": place for name, place in of_level.items()})
        return tensors


def _picked(x: jax.Array, at: jax.Array | None) -> jax.Array:
    """x [B, T, ...] at places `at` int32 [B, A] along T, [B, A, ...]; None for all."""
    return x if at is None else jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1)


def _attend(
    visible: Any,
    past: Past | None,
    *,
    context: tuple[Any, ...],
    positions: jax.Array,
    at: jax.Array | None,
    config: FastEagleConfig,
) -> Attend:
    """The Attend of a level: over its own past and fresh keys, or over others' and its own at its own position.

    Others' are the target's, whose own position is one after the stream position of `positions` int32 [B, T] (of a
    window W of the target, it sees the W - 1 keys up to there), or the first level's at earlier positions. `at` are the
    places of the queries along T, None for all.
    """
    if not context:
        return visible if callable(visible) else Cached(visible, past)
    shared = config.context == "shared"
    window = None if config.window is None or shared else config.window - 1
    if isinstance(context[0], Past):
        (given,) = context
        if window is not None:
            given = given.within(window, positions)
        return Cached(visible, given, config.soft_cap)
    k, v = context[0] if shared else (part.transpose(0, 2, 1, 3) for part in context[0])  # [B, T, K, D]
    if shared and not callable(visible):
        return _AfterFirst(k, v, visible, at, past, config.soft_cap)
    if window is not None and callable(visible):
        visible = visible.within(window)
    elif window is not None:
        visible &= positions[:, :, None] - positions[:, None] < window
    return GivenPast(k, v, visible, at, config.soft_cap, earlier=shared)


@dataclasses.dataclass(frozen=True)
class _AfterFirst:
    """An Attend over the first level's committed and fresh keys at earlier positions, and a query's own."""

    k: jax.Array  # [B, T, K, D], as is v
    v: jax.Array
    visible: jax.Array  # bool [B, T, T]
    at: jax.Array | None  # int32 [B, A], the places of queries along T; None for all
    past: Past | None
    soft_cap: float | None

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
        """As of nn.attention.Attend."""
        earlier = self.visible & ~jnp.eye(self.visible.shape[1], dtype=bool)
        earlier = _picked(earlier, self.at)  # [B, A, T]
        itself = jnp.broadcast_to(jnp.eye(q.shape[1], dtype=bool), (*earlier.shape[:2], q.shape[1]))
        attend = Cached(jnp.concatenate([earlier, itself], axis=-1), self.past, self.soft_cap)
        return attend(q, jnp.concatenate([self.k, k], axis=1), jnp.concatenate([self.v, v], axis=1), sinks)
