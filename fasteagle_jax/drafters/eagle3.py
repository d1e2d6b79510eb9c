"""EAGLE-3 (arXiv 2503.01840): one decoder layer run once a level, each time on its own output and the token before.

B rows · T stream positions · A newly accepted tokens · N levels · F feature layers · H hidden width · V draft
vocabulary · f nodes of a level.
At stream position t it reads the target's features g[t] and the embedding of x[t+1], and guesses x[t+2]; the next run
takes its own output instead of g[t], the embedding of that guess, and rotary position t + 1. So a draft of N levels is
N runs in a row, over a tree that grows by the f best nodes a level.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    copy_weights,
    draft_ids,
    layer_config,
    newest,
    pending,
    rank,
)
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.attention import MASKED, Past, attention, by_kv_head, by_token
from fasteagle_jax.nn.embedding import embed
from fasteagle_jax.nn.kv_cache import Ring, commit_ring, seen_in_ring
from fasteagle_jax.nn.linear import head_logits, matmul
from fasteagle_jax.nn.norm import rms_norm
from fasteagle_jax.nn.packed_attention import Packed, in_blocks
from fasteagle_jax.nn.rope import rotate, rotation
from fasteagle_jax.nn.transformer import LAYER_AXES, DecoderLayer

AXES = LAYER_AXES | {"fc": ("embed", "fused"), "head": ("vocab", "embed")}

_STORED = {  # name in the file: attribute, transposed
    "fc.weight": ("fc", True),
    "midlayer.input_layernorm.weight": ("embedding_norm", False),
    "midlayer.hidden_norm.weight": ("hidden_norm", False),
    "midlayer.self_attn.q_proj.weight": ("q", True),
    "midlayer.self_attn.k_proj.weight": ("k", True),
    "midlayer.self_attn.v_proj.weight": ("v", True),
    "midlayer.self_attn.o_proj.weight": ("o", True),
    "midlayer.post_attention_layernorm.weight": ("mlp_norm", False),
    "midlayer.mlp.gate_proj.weight": ("gate", True),
    "midlayer.mlp.up_proj.weight": ("up", True),
    "midlayer.mlp.down_proj.weight": ("down", True),
    "norm.weight": ("norm", False),
    "lm_head.weight": ("head", False),
}


class Eagle3(DrafterModule):
    """The drafter. Its head is its own and trained; the embedding is the target's."""

    architecture = "LlamaForCausalLMEagle3"

    def __init__(self, config: DrafterConfig, key: jax.Array, dtype: Any = jnp.float32, *, stacked: bool = True):
        c = config
        if c.reinject or c.correction:
            raise UserError(
                "reinject and correction are of FastEagle's levels, EAGLE-3 has none: "
                "set drafter.reinject=False drafter.correction=None"
            )
        hidden, heads, kv_heads = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        keys = iter(jax.random.split(key, 9))

        def weight(num_in: int, num_out: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(next(keys), (num_in, num_out), dtype) * num_in**-0.5)

        super().__init__(c, next(keys), dtype)
        self.stacked = stacked  # of its cache: there is one layer
        self.embedding_norm, self.hidden_norm, self.mlp_norm, self.norm = (
            nnx.Param(jnp.ones((hidden,), dtype)) for _ in range(4)
        )
        self.q, self.k, self.v = weight(2 * hidden, heads), weight(2 * hidden, kv_heads), weight(2 * hidden, kv_heads)
        self.o = weight(heads, hidden)
        self.gate, self.up = weight(hidden, c.intermediate_size), weight(hidden, c.intermediate_size)
        self.down = weight(c.intermediate_size, hidden)
        self.head = nnx.Param(jax.random.normal(next(keys), (c.draft_vocab_size, hidden), dtype) * hidden**-0.5)

    def start_from(self, target: Any, feature_rms: jax.Array, *, layers: bool) -> None:
        """Sets its norm and head to the target's and, with `layers`, its layer to the target's last one.

        What that layer reads, this one then reads of the highest feature, of root mean square `feature_rms` [F], and of
        its own output; of the embedding it reads nothing at first. Raises UserError where the layer is of other sizes.
        """
        hidden = self.config.hidden_size
        rows = target.head_rows()
        self.head[...] = (rows if self.token_ids is None else rows[self.token_ids[...]]).astype(jnp.float32)
        self.norm[...] = target.norm[...].astype(jnp.float32)
        if not layers:
            return
        last = jax.tree.map(lambda w: w[-1], target.layers) if target.stacked else target.layers[-1]
        mine = DecoderLayer(layer_config(self.config), jax.random.key(0), jnp.float32)
        copy_weights(mine, last)
        for name in ("o", "mlp_norm", "gate", "up", "down"):
            getattr(self, name)[...] = getattr(mine, name)[...]
        self.hidden_norm[...] = mine.input_norm[...]
        for name in ("q", "k", "v"):
            weight = getattr(mine, name)[...]  # [H, out], and here [embedding's H + H, out]
            getattr(self, name)[...] = jnp.concatenate([jnp.zeros_like(weight), weight])
        self.fc[...] = jnp.zeros_like(self.fc[...]).at[-hidden:].set(jnp.eye(hidden) * feature_rms[-1])

    def own_head(self) -> jax.Array:
        """[V, H], what training gives a gradient besides the layer."""
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

    def stored(self) -> list[tuple[str, Any, bool]]:
        """As of DrafterModule, under the names that its authors gave."""
        places = [(name, getattr(self, attribute), turned) for name, (attribute, turned) in _STORED.items()]
        return places if self.token_ids is None else [*places, ("d2t", self.token_ids, False)]

    def published(self) -> dict[str, Any]:
        """The keys that its authors gave, as far as DrafterConfig has others."""
        c = self.config
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
        """`empty_ring` of the one layer."""
        return self.empty_ring(1, batch, num_slots, most_written, stacked=self.stacked)

    # --- the layer ----------------------------------------------------------------------------------------------

    def _heads(self, e: jax.Array, h: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, Q, K*G, D] and k and v [B, Q, K, D] of embeddings and hidden states [B, Q, H]."""
        c = self.config
        eps, dtype = c.rms_norm_eps, self.k[...].dtype
        both = jnp.concatenate(
            [rms_norm(e, self.embedding_norm[...], eps), rms_norm(h, self.hidden_norm[...], eps)], axis=-1
        )
        turn = rotation(positions, c.rope, c.head_dim)

        def heads(w: nnx.Param) -> jax.Array:
            return matmul(both, w[...]).reshape(*h.shape[:2], -1, c.head_dim)

        q, k = rotate(heads(self.q), turn).astype(dtype), rotate(heads(self.k), turn).astype(dtype)
        return q, k, heads(self.v).astype(dtype)

    def _keys(self, e: jax.Array, h: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The same as `attention` has them, q [B, K, G*Q, D] and fresh k and v [B, K, Q, D]."""
        q, k, v = self._heads(e, h, positions)
        return by_kv_head(q, k.shape[2]), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def _rest(self, h: jax.Array, attended: jax.Array) -> jax.Array:
        """The layer's output [B, Q, H] from its input and what attention [B, Q, K*G, D] gave."""
        h = h + matmul(attended.reshape(*h.shape[:2], -1).astype(h.dtype), self.o[...])
        x = rms_norm(h, self.mlp_norm[...], self.config.rms_norm_eps)
        return h + matmul(jax.nn.silu(matmul(x, self.gate[...])) * matmul(x, self.up[...]), self.down[...])

    # --- training -----------------------------------------------------------------------------------------------

    def hidden_states(
        self,
        embedding: jax.Array,
        features: jax.Array,
        next_tokens: jax.Array,
        positions: jax.Array,
        visible: jax.Array | Packed,
        *,
        remat: Any = None,
    ) -> tuple[Any, None]:
        """The head's input at every level and position: training-time test.

        Run j takes run j - 1's output and the true token j further on. A query sees the keys of run 0 that `visible`
        [B, T, T] lets it see and, of each later run, the key at its own position: the path that it would be on.

        Returns:
          A stack or list of N hidden states [B, T, H], entry i - 1 the guess for x[t+1+i]; and None, where FastEagle
          has its fresh keys and values.
        """
        h = self.fused(features)
        keys: list[jax.Array] = []
        values: list[jax.Array] = []
        states = []
        for j in range(self.num_levels):
            e = embed(embedding, jnp.roll(next_tokens, -j, axis=1), h.dtype)  # past a segment's end no loss looks

            def run(h: jax.Array, e: jax.Array, keys: Any, values: Any, j: int = j) -> tuple[jax.Array, Any, Any]:
                q, k, v = self._heads(e, h, positions + j)
                keys, values = [*keys, k], [*values, v]
                return self._rest(h, _attend_to_own_path(q, keys, values, visible)), keys, values

            h = constrain(h, "batch", None, None)
            h, keys, values = (run if remat is None else jax.checkpoint(run, policy=remat))(h, e, keys, values)
            states.append(rms_norm(h, self.norm[...], self.config.rms_norm_eps))
        return jnp.stack(states) if self.stacked else states, None

    # --- decoding -----------------------------------------------------------------------------------------------

    def extend(self, vocab: VocabWeights, new: Accepted, cache: Ring, num_levels: int) -> Ring:
        """The cache with the accepted tokens' stream positions in it, whatever the number of levels."""
        return self._advance(vocab, new, cache)[1]

    def draft(
        self, vocab: VocabWeights, new: Accepted, cache: Ring, tree: TreeSpec, ranking: Ranking
    ) -> tuple[Draft, Ring]:
        """A tree rooted at the pending token (see interfaces.Drafter), grown level by level (see tree.grow)."""
        num_levels = tree.num_levels(self.num_levels)
        new, skipped = newest(new, num_levels + 1)
        h, cache = self._advance(vocab, new, cache._replace(length=cache.length + skipped))  # [B, H]
        batch = h.shape[0]
        ids = draft_ids(vocab)
        eps = self.config.rms_norm_eps
        past = self._past(cache, jnp.maximum(cache.length - 1, 0)[:, None])  # every node sees what its root does

        def guess(nodes: _Nodes, depth: int) -> jax.Array:
            logits = head_logits(rms_norm(nodes.hidden, self.norm[...], eps), vocab.head)  # [B, f, V]
            return rank(logits, cache.length[:, None] + depth, ids, ranking)

        def follow(nodes: _Nodes, parent: jax.Array, tokens: jax.Array, depth: int) -> _Nodes:
            h = jnp.take_along_axis(nodes.hidden, parent[..., None], axis=1)
            e = embed(vocab.embedding, tokens, h.dtype)
            position = jnp.broadcast_to((cache.length - 1 + depth)[:, None], parent.shape)
            q, k, v = self._keys(e, h, position)
            keys, values = [*nodes.keys, k], [*nodes.values, v]
            above = jnp.take_along_axis(nodes.own_path, parent[..., None], axis=1)  # [B, f, keys so far]
            itself = jnp.broadcast_to(jnp.eye(parent.shape[1], dtype=bool), (batch, parent.shape[1], parent.shape[1]))
            own_path = jnp.concatenate([above, itself], axis=-1)
            attended = attention(q, jnp.concatenate(keys, axis=2), jnp.concatenate(values, axis=2), own_path, past)
            return _Nodes(self._rest(h, by_token(attended, parent.shape[1])), keys, values, own_path)

        at_root = _Nodes(h[:, None], [], [], jnp.zeros((batch, 1, 0), bool))
        return grow(tree, pending(new), num_levels, ids, at_root, guess, follow), cache

    def _past(self, cache: Ring, queries: jax.Array) -> Past:
        """The committed keys of the one layer, for queries at stream positions int32 [B, Q]."""
        layers = cache.layers
        k, v, positions = layers[0] if isinstance(layers, list) else (part[0] for part in layers)
        return Past(k, v, seen_in_ring(positions, queries, self.config.window), cache.filled())

    def _advance(self, vocab: VocabWeights, new: Accepted, cache: Ring) -> tuple[jax.Array, Ring]:
        """The layer's output [B, H] at the last accepted position, and the cache with all of them."""
        batch, num_tokens = new.tokens.shape
        index = jnp.arange(num_tokens)
        positions = cache.length[:, None] + index
        visible = jnp.broadcast_to(causal(index[:, None], index, self.config.window), (batch, num_tokens, num_tokens))
        h = self.fused(new.features)
        q, k, v = self._keys(embed(vocab.embedding, new.tokens, h.dtype), h, positions)
        h = self._rest(h, by_token(attention(q, k, v, visible, self._past(cache, positions)), num_tokens))
        last = jnp.maximum(new.count - 1, 0)[:, None, None]
        fresh = ([k], [v]) if isinstance(cache.k, list) else (k[None], v[None])
        return jnp.take_along_axis(h, last, axis=1)[:, 0], commit_ring(cache, fresh, new.count)


class _Nodes(NamedTuple):
    """Nodes of a level, which the next one grows from."""

    hidden: jax.Array  # [B, f, H], the layer's output
    keys: list[jax.Array]  # [B, K, f, D] of each level's nodes so far
    values: list[jax.Array]
    own_path: jax.Array  # bool [B, f, keys], whether a node sees them


def _attend_to_own_path(
    q: jax.Array, keys: Sequence[jax.Array], values: Sequence[jax.Array], visible: jax.Array | Packed
) -> jax.Array:
    """Attention of q [B, T, K*G, D] over run 0's keys [B, T, K, D] and the later runs' at the query's own position."""
    batch, num_tokens, kv_heads, width = keys[0].shape
    q = (q * width**-0.5).reshape(batch, num_tokens, kv_heads, -1, width)  # [B, T, K, G, D]
    # What the later runs' keys score and their values give is taken of whole rows: no gradient of these is in parts.
    own_scores = [(q.astype(jnp.float32) * k[:, :, :, None]).sum(axis=-1, keepdims=True) for k in keys[1:]]
    along = jnp.concatenate([jnp.zeros((*q.shape[:-1], 0)), *own_scores], axis=-1)  # [B, T, K, G, later]
    first_k, first_v = keys[0].transpose(0, 2, 1, 3), values[0].transpose(0, 2, 1, 3)  # [B, K, T, D]

    def attend(own: tuple[jax.Array, ...], start: jax.Array | int, num_keys: int) -> jax.Array:
        """What run 0's values give Q queries, and the weights of the later runs': [B, Q, K, G, D + later]."""
        size, heads = own[0].shape[1], kv_heads * q.shape[3]
        rows, of_later = (by_kv_head(x.reshape(batch, size, heads, x.shape[-1]), kv_heads) for x in own)
        if isinstance(visible, Packed):
            seen = visible.visible(start, size)
        else:
            seen = jax.lax.dynamic_slice_in_dim(visible, start, size, axis=1)
        mask = jnp.tile(seen[:, :, :num_keys], (1, q.shape[3], 1))[:, None]
        scores = jnp.einsum("bkmd,bktd->bkmt", rows, first_k[:, :, :num_keys], preferred_element_type=jnp.float32)
        p = jax.nn.softmax(jnp.concatenate([jnp.where(mask, scores, MASKED), of_later], axis=-1), axis=-1)
        of_first = p[..., :num_keys].astype(rows.dtype)
        out = jnp.einsum("bkmt,bktd->bkmd", of_first, first_v[:, :, :num_keys], preferred_element_type=jnp.float32)
        return by_token(jnp.concatenate([out, p[..., num_keys:]], axis=-1), size)

    attended = in_blocks(attend, (q, along)).reshape(*q.shape[:-1], -1)  # [B, T, K, G, D + later]
    out = attended[..., :width]
    for i, v in enumerate(values[1:]):
        out += attended[..., width + i, None] * v[:, :, :, None]
    return out.astype(values[0].dtype).reshape(batch, num_tokens, -1, width)
