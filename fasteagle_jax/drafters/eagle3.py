"""EAGLE-3 (arXiv 2503.01840): one decoder layer run once a level, on its own output and the token before the guess.

B rows · T stream positions · A newly accepted tokens · N levels · F feature layers · H hidden width · V draft
vocabulary · f nodes of a level.
At stream position t it reads the target's features g[t] and the embedding of x[t+1], and guesses x[t+2]; the next run
takes its own output instead of g[t], the embedding of that guess, and rotary position t + 1. So a draft of N levels is
N sequential runs, over a tree that grows by the f best nodes a level.

Published drafters have a few changes of it, by the names of `speculators`: norms of the features (one for all, or one
each, as EAGLE-3.1), a residual stream that begins after the norm, and the output's norm before the next run reads it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.decoding.interfaces import Accepted, Ranking, VocabWeights
from fasteagle_jax.decoding.tree import Draft, TreeSpec, grow
from fasteagle_jax.devices.sharding import constrain
from fasteagle_jax.drafters.base import (
    DrafterConfig,
    DrafterModule,
    causal,
    copy_layer,
    draft_ids,
    layer_config,
    newest,
    pending,
    random_head,
    rank,
    say_left,
)
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.attention import Attention, Past, attention, by_kv_head, by_token
from fasteagle_jax.nn.embedding import embed
from fasteagle_jax.nn.kv_cache import Ring, commit_ring, seen_in_ring
from fasteagle_jax.nn.mlp import Mlp
from fasteagle_jax.nn.norm import RMSNorm
from fasteagle_jax.nn.packed_attention import Packed, own_path_attention
from fasteagle_jax.nn.rope import rotation
from fasteagle_jax.nn.stored import NamedVariable, stored_tensors
from fasteagle_jax.nn.transformer import DECODER_LAYER_NAMES, DecoderLayer

_STORED = {  # name in the file: place in the drafter
    "fc": "fc",
    **{f"midlayer.{name}": place for name, place in DECODER_LAYER_NAMES.items()},
    "midlayer.input_layernorm": "embedding_norm",
    "midlayer.hidden_norm": "hidden_norm",
    "norm": "norm",
    "input_norm": "input_norm",
    "lm_head": "head",
}


@dataclasses.dataclass(frozen=True)
class Eagle3Config(DrafterConfig):
    """Sizes of EAGLE-3."""

    kind: str = "eagle3"
    norm_before_residual: bool = False  # the layer's residual stream begins with its input after `hidden_norm`
    norm_before_fc: bool = False  # RMSNorm of all features together before fc
    fc_norm: bool = False  # RMSNorm of each feature before fc
    norm_output: bool = False  # the next run reads the layer's output after `norm`
    qk_norm: bool = False  # norms of queries' and keys' heads, as Qwen3's layers

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_before_fc and self.fc_norm:
            raise UserError("norm_before_fc and fc_norm are both True: a drafter has one of them")

    @property
    def level_parameters(self) -> int:
        """Those of DrafterConfig, with q, k and v reading 2 H."""
        extra = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return super().level_parameters + self.hidden_size * extra

    @property
    def head_flops(self) -> tuple[int, int]:
        """Its own head, trained: one product forward and two backward."""
        product = 2 * self.hidden_size * self.draft_vocab_size
        return product, 2 * product


class Eagle3(DrafterModule):
    """The drafter, with a trained head of its own and the target's embedding."""

    architecture = "LlamaForCausalLMEagle3"
    Config = Eagle3Config
    config: Eagle3Config

    def __init__(self, config: Eagle3Config, key: jax.Array, dtype: Any = jnp.float32, *, stacked: bool = True):
        c = config
        hidden, eps = c.hidden_size, c.rms_norm_eps
        keys = iter(jax.random.split(key, 9))
        super().__init__(c, next(keys), dtype)
        self.stacked = stacked  # the form of its cache: there is one layer
        self.embedding_norm, self.hidden_norm = RMSNorm(hidden, eps, dtype), RMSNorm(hidden, eps, dtype)
        self.mlp_norm, self.norm = RMSNorm(hidden, eps, dtype), RMSNorm(hidden, eps, dtype)
        num_features = len(c.feature_layers)
        self.input_norm = RMSNorm(num_features * hidden, eps, dtype) if c.norm_before_fc else None
        self.fc_norms = nnx.List([RMSNorm(hidden, eps, dtype) for _ in range(num_features if c.fc_norm else 0)])
        norm = (lambda: RMSNorm(c.head_dim, eps, dtype)) if c.qk_norm else None
        sizes = (hidden, c.num_heads, c.num_kv_heads, c.head_dim)
        self.attention = Attention(*sizes, keys, dtype, num_in=2 * hidden, norm=norm)
        self.mlp = Mlp(hidden, c.intermediate_size, keys, dtype)
        self.head = random_head(c, next(keys), dtype)

    def start_from(
        self, target: Any, feature_rms: jax.Array, *, layers: bool, neurons: jax.Array | None = None
    ) -> None:
        """Initialises its norm and head from the target's and, with `layers`, its layer from the target's last one.

        The layer then reads the highest feature, of root mean square `feature_rms` float32 [F], or its own output as
        the target's layer reads its input, and the embedding with weight 0; a narrower MLP has the `neurons` int32 [W]
        of the target's. Warns of parts that are not copied.
        """
        hidden = self.config.hidden_size
        self.head[...] = self.first_head(target)
        self.norm.weight[...] = target.norm.gain
        if not layers:
            return
        like_target = DecoderLayer(layer_config(self.config), jax.random.key(0), jnp.float32)
        last = self.config.copied_layer(target.config.num_layers)
        source = target.layer(last)
        left = copy_layer(like_target, source, neurons)
        say_left(left, last, source, self)
        nnx.update(self.mlp, nnx.state(like_target.mlp))
        self.mlp_norm.weight[...] = like_target.mlp_norm.weight[...]
        self.hidden_norm.weight[...] = like_target.input_norm.weight[...]
        self.attention.o.set_matrix(like_target.attention.o.matrix)
        for name in ("q", "k", "v"):
            matrix = getattr(like_target.attention, name).matrix  # [H, out]; here [2 H, out], the embedding first
            getattr(self.attention, name).set_matrix(jnp.concatenate([jnp.zeros_like(matrix), matrix]))
        self.fc.set_matrix(jnp.zeros(self.fc.matrix.shape).at[-hidden:].set(jnp.eye(hidden) * feature_rms[-1]))

    def own_head(self) -> jax.Array:
        """Its head [V, H], which training gives a gradient."""
        return self.head[...]

    def unstacked(self) -> Eagle3:
        """The same drafter with its cache as a list."""
        return self._with_cache(stacked=False)

    def stacked_form(self) -> Eagle3:
        """The same drafter with its cache as a stack."""
        return self._with_cache(stacked=True)

    def _with_cache(self, *, stacked: bool) -> Eagle3:
        other = nnx.merge(*nnx.split(self))
        other.stacked = stacked
        return other

    def stored(self) -> list[NamedVariable]:
        """The tensors of DrafterModule.stored, under the names that EAGLE-3's authors gave."""
        tensors = stored_tensors(self, _STORED)
        tensors += [NamedVariable(f"fc_norm.{i}.weight", norm.weight) for i, norm in enumerate(self.fc_norms)]
        return tensors if self.token_ids is None else [*tensors, NamedVariable("d2t", self.token_ids)]

    def published(self) -> dict[str, Any]:
        """The entries whose keys EAGLE-3's authors named otherwise than DrafterConfig."""
        c = self.config
        assert c.rope is not None  # its keys are its own
        return {
            "model_type": "llama",
            "hidden_act": "silu",
            "num_hidden_layers": 1,
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads,
            **c.rope.to_hf(),
            "eagle_aux_hidden_state_layer_ids": list(c.feature_layers),
            "tie_word_embeddings": False,
        }

    def vocab_weights(self, target: Any) -> VocabWeights:
        """The target's embedding, and its own head."""
        ids = None if self.token_ids is None else self.token_ids[...]
        return VocabWeights(target.embedding[...], self.head[...], ids)

    def empty_cache(self, batch: int, num_slots: int, most_written: int) -> Ring:
        """The empty Ring of its one layer."""
        return self.empty_ring(1, batch, num_slots, most_written, stacked=self.stacked)

    def fused(self, features: jax.Array) -> jax.Array:
        """g [B, T, H] of the target's features [B, T, F*H]."""
        if self.input_norm is not None:
            features = self.input_norm(features)
        if len(self.fc_norms):
            each = jnp.split(features, len(self.fc_norms), axis=-1)
            normed = [norm(feature) for norm, feature in zip(self.fc_norms, each, strict=True)]
            features = jnp.concatenate(normed, axis=-1)
        return super().fused(features)

    # --- the layer ----------------------------------------------------------------------------------------------

    def _qkv(self, e: jax.Array, h: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, Q, K*G, D], k and v [B, Q, K, D] of embeddings and hidden states [B, Q, H]."""
        both = jnp.concatenate([self.embedding_norm(e), self.hidden_norm(h)], axis=-1)
        return self.attention.project(both, rotation(positions, self.config.rope, self.config.head_dim))

    def _qkv_by_head(self, e: jax.Array, h: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`_qkv` in the layout of `attention`: q [B, K, G*Q, D], fresh k and v [B, K, Q, D]."""
        q, k, v = self._qkv(e, h, positions)
        return by_kv_head(q, k.shape[2]), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def _after_attention(self, h: jax.Array, attended: jax.Array) -> jax.Array:
        """What the next run reads [B, Q, H], of the layer's input and the attended values [B, Q, K*G, D]."""
        residual = self.hidden_norm(h) if self.config.norm_before_residual else h
        h = residual + self.attention.output(attended.astype(h.dtype))
        h = h + self.mlp(self.mlp_norm(h))
        return self.norm(h) if self.config.norm_output else h

    def _head_input(self, h: jax.Array) -> jax.Array:
        """The head's input [B, Q, H] of what the next run reads."""
        return h if self.config.norm_output else self.norm(h)

    # --- training -----------------------------------------------------------------------------------------------

    def hidden_states(
        self,
        embedding: jax.Array,
        features: jax.Array,
        next_tokens: jax.Array,
        positions: jax.Array,
        visible: jax.Array | Packed,
        *,
        context: tuple[Any, ...] = (),
        remat: Any = None,
    ) -> tuple[Any, None]:
        """The head's input at every level and position (see interfaces.TrainableDrafter): training-time test.

        Run j reads run j - 1's output and the true token j positions further on. A query sees the keys of run 0 that
        `visible` allows and, of each later run, the key at its own position: those on its own path.

        Returns:
          A stack or list of N hidden states [B, T, H], entry i - 1 the guess for x[t+1+i]; and None.
        """
        h = self.fused(features)
        keys: list[jax.Array] = []
        values: list[jax.Array] = []
        states = []
        for j in range(self.num_levels):
            e = embed(embedding, jnp.roll(next_tokens, -j, axis=1), h.dtype)  # no loss reads past a segment's end

            def run(h: jax.Array, e: jax.Array, keys: Any, values: Any, j: int = j) -> tuple[jax.Array, Any, Any]:
                q, k, v = self._qkv(e, h, positions + j)
                keys, values = [*keys, k], [*values, v]
                return self._after_attention(h, own_path_attention(q, keys, values, visible)), keys, values

            h = constrain(h, "batch", None, None)
            h, keys, values = (run if remat is None else jax.checkpoint(run, policy=remat))(h, e, keys, values)
            states.append(self._head_input(h))
        return jnp.stack(states) if self.stacked else states, None

    # --- decoding -----------------------------------------------------------------------------------------------

    def extend(
        self, vocab: VocabWeights, new: Accepted, cache: Ring, num_levels: int, context: tuple[Past, ...] = ()
    ) -> Ring:
        """The cache with the accepted tokens' stream positions in it, which do not depend on the number of levels."""
        return self._advance(vocab, new, cache)[1]

    def draft(
        self,
        vocab: VocabWeights,
        new: Accepted,
        cache: Ring,
        tree: TreeSpec,
        ranking: Ranking,
        context: tuple[Past, ...] = (),
    ) -> tuple[Draft, Ring]:
        """A tree rooted at the pending token, grown level by level (see interfaces.Drafter and tree.grow)."""
        num_levels = tree.num_levels(self.num_levels)
        new, skipped = newest(new, num_levels + 1)
        h, cache = self._advance(vocab, new, cache._replace(length=cache.length + skipped))  # [B, H]
        batch = h.shape[0]
        ids = draft_ids(vocab)
        past = self._past(cache, jnp.maximum(cache.length - 1, 0)[:, None])  # every node sees what its root sees

        def guess(nodes: _Nodes, depth: int) -> jax.Array:
            logits = vocab.logits(self._head_input(nodes.hidden))  # [B, f, V]
            return rank(logits, cache.length[:, None] + depth, ids, ranking)

        def follow(nodes: _Nodes, parent: jax.Array, index: jax.Array, depth: int) -> _Nodes:
            h = jnp.take_along_axis(nodes.hidden, parent[..., None], axis=1)
            e = embed(vocab.embedding, ids[index], h.dtype)
            position = jnp.broadcast_to((cache.length - 1 + depth)[:, None], parent.shape)
            q, k, v = self._qkv_by_head(e, h, position)
            keys, values = [*nodes.keys, k], [*nodes.values, v]
            above = jnp.take_along_axis(nodes.own_path, parent[..., None], axis=1)  # [B, f, keys so far]
            itself = jnp.broadcast_to(jnp.eye(parent.shape[1], dtype=bool), (batch, parent.shape[1], parent.shape[1]))
            own_path = jnp.concatenate([above, itself], axis=-1)
            attended = attention(q, jnp.concatenate(keys, axis=2), jnp.concatenate(values, axis=2), own_path, past)
            return _Nodes(self._after_attention(h, by_token(attended, parent.shape[1])), keys, values, own_path)

        at_root = _Nodes(h[:, None], [], [], jnp.zeros((batch, 1, 0), bool))
        return grow(tree, pending(new), ids, num_levels, at_root, guess, follow), cache

    def _past(self, cache: Ring, queries: jax.Array) -> Past:
        """The Past of the one layer for `queries` at stream positions int32 [B, Q]."""
        layers = cache.layers
        k, v, positions = layers[0] if isinstance(layers, list) else (part[0] for part in layers)
        return Past(k, v, seen_in_ring(positions, queries, self.config.window), cache.filled())

    def _advance(self, vocab: VocabWeights, new: Accepted, cache: Ring) -> tuple[jax.Array, Ring]:
        """The layer's output [B, H] at the last accepted position, and the cache with all accepted positions."""
        batch, num_tokens = new.tokens.shape
        index = jnp.arange(num_tokens)
        positions = cache.length[:, None] + index
        visible = jnp.broadcast_to(causal(index[:, None], index, self.config.window), (batch, num_tokens, num_tokens))
        h = constrain(self.fused(new.features), "rows", None, None)
        q, k, v = self._qkv_by_head(embed(vocab.embedding, new.tokens, h.dtype), h, positions)
        h = self._after_attention(h, by_token(attention(q, k, v, visible, self._past(cache, positions)), num_tokens))
        last = jnp.maximum(new.count - 1, 0)[:, None, None]
        fresh = ([k], [v]) if isinstance(cache.k, list) else (k[None], v[None])
        return jnp.take_along_axis(h, last, axis=1)[:, 0], commit_ring(cache, fresh, new.count)


class _Nodes(NamedTuple):
    """The f expanded nodes of a level."""

    hidden: jax.Array  # [B, f, H], the layer's output
    keys: list[jax.Array]  # [B, K, f, D] of the nodes of each level so far
    values: list[jax.Array]
    own_path: jax.Array  # bool [B, f, keys], whether a node sees them
