"""FastEagle (arXiv 2509.20416): a cascade of N decoder layers that guesses N tokens in one forward pass.

B rows · T stream positions · A newly accepted tokens · N levels · F feature layers · H hidden width · V draft
vocabulary.
At stream position t it reads the target's features g[t] and the embedding of the next, already chosen token x[t+1]; the
output of level i is the guess for token x[t+1+i]. No draft token is ever an input of a level, so training is one causal
pass and the cache of verified positions needs no rollback.

Two options are not in the paper: `reinject` adds the input again before every level, and `correction` corrects each
guess by the token before it on its path, outside of the cascade (as the later TreeFlash and DSpark do).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fasteagle_jax.decoding.interfaces import Accepted, Ranking, VocabWeights
from fasteagle_jax.decoding.tree import Draft, TreeSpec, build, grow
from fasteagle_jax.devices.sharding import constrain, training_rows
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
from fasteagle_jax.nn.attention import Attend, Cached, Past
from fasteagle_jax.nn.embedding import embed
from fasteagle_jax.nn.kv_cache import Ring, commit_ring, seen_in_ring
from fasteagle_jax.nn.linear import Linear, to_columns
from fasteagle_jax.nn.norm import RMSNorm, rms_norm
from fasteagle_jax.nn.rope import rotation
from fasteagle_jax.nn.stored import NamedVariable, stored_tensors
from fasteagle_jax.nn.transformer import DECODER_LAYER_NAMES, DecoderLayer, run_layers, stack, unstack

EMBEDDING_SHARE = 0.1  # initial size of the embedding relative to the stream, since copied layers never read one there

_LEVEL = {  # name in the file: place in a Level
    **{name: f"layer.{place}" for name, place in DECODER_LAYER_NAMES.items()},
    "norm": "norm",
    "reinject": "reinject",
}


@dataclasses.dataclass(frozen=True)
class FastEagleConfig(DrafterConfig):
    """Sizes and switches of the cascade."""

    kind: str = "fasteagle"
    reinject: bool = False  # add the fused input again before every level
    correction: int | None = None  # R, hidden units of the Correction; None for no correction

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correction is not None and (not isinstance(self.correction, int) or self.correction < 1):
            raise UserError(f"drafter correction is {self.correction!r}: give a number of units, or None for none")

    @property
    def level_parameters(self) -> int:
        """Those of DrafterConfig, H^2 for reinjection and 3 H R for a correction."""
        extra = self.hidden_size * self.reinject + 3 * (self.correction or 0)
        return super().level_parameters + self.hidden_size * extra

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
        ones = jnp.ones((h.shape[-1],), jnp.float32)
        of_state, of_token = self.of_state(rms_norm(h, ones, eps)), self.of_token(rms_norm(e, ones, eps))
        return h + self.to_state(jax.nn.silu(of_state + of_token))


class Level(nnx.Module):
    """One level of the cascade: a decoder layer, the norm before the head, and optionally the reinjected input."""

    def __init__(self, config: FastEagleConfig, key: jax.Array, dtype: Any):
        hidden = config.hidden_size
        self.layer = DecoderLayer(layer_config(config), key, dtype)
        self.norm = RMSNorm(hidden, config.rms_norm_eps, dtype)
        # Starts at zero, so that training starts from the plain cascade.
        self.reinject = Linear(hidden, hidden, ("embed", "fused"), None, dtype) if config.reinject else None


class FastEagle(DrafterModule):
    """The drafter. `levels` is one stacked Level (leading axis N) or, unstacked, a list of N of them."""

    architecture = "FastEagleDrafter"
    Config = FastEagleConfig
    config: FastEagleConfig

    def __init__(self, config: FastEagleConfig, key: jax.Array, dtype: Any = jnp.float32, *, stacked: bool = True):
        c = config
        key_fc, key_input, key_levels = jax.random.split(key, 3)
        super().__init__(c, key_fc, dtype)
        self.fuse = Linear(2 * c.hidden_size, c.hidden_size, ("embed", "fused"), key_input, dtype)
        # One for all levels: one a level had five times the parameters and was no better.
        self.correction = Correction(c, jax.random.fold_in(key, 1), dtype) if c.correction else None
        levels = jax.vmap(lambda k: Level(c, k, dtype))(jax.random.split(key_levels, c.num_levels))
        self.levels: Any = levels if stacked else nnx.List(unstack(levels, c.num_levels))

    @property
    def stacked(self) -> bool:
        """Whether the levels are one scanned stack rather than a list."""
        return not isinstance(self.levels, nnx.List)

    def start_from(self, target: Any, feature_rms: jax.Array, *, layers: bool) -> None:
        """Initialises its norms from the target's final one and, with `layers`, each layer from the target's last one.

        The head reads every level's output, as it reads that of the target's last layer. With `layers` the input is the
        highest feature, of root mean square `feature_rms` float32 [F], plus the embedding. Raises UserError if the
        sizes of the layers differ.
        """
        c = self.config
        hidden, last = c.hidden_size, target.layer(target.config.num_layers - 1)
        norm = target.norm.weight[...].astype(jnp.float32)
        for level in [self.levels] if self.stacked else self.levels:
            level.norm.weight[...] = jnp.broadcast_to(norm, level.norm.weight.shape)
        if not layers:
            return
        if self.stacked:
            copies = jax.tree.map(lambda w: jnp.broadcast_to(w, (c.num_levels, *w.shape)), last)
            copy_weights(self.levels.layer, copies)
        else:
            for level in self.levels:
                copy_weights(level.layer, last)
        # The copied layers expect a stream of the highest feature's size.
        self.fc.set_matrix(jnp.zeros(self.fc.matrix.shape).at[-hidden:].set(jnp.eye(hidden) * feature_rms[-1]))
        embedding = target.embedding[...].astype(jnp.float32)
        gain = EMBEDDING_SHARE * feature_rms[-1] / jnp.sqrt(jnp.mean(embedding**2))
        self.fuse.set_matrix(jnp.concatenate([jnp.eye(hidden), jnp.eye(hidden) * gain]))

    def own_head(self) -> None:
        """None: the head is the target's, frozen."""
        return None

    def vocab_weights(self, target: Any) -> VocabWeights:
        """The target's embedding, and its head's rows for the draft vocabulary."""
        head = target.head_rows()
        ids = None if self.token_ids is None else self.token_ids[...]
        return VocabWeights(target.embedding[...], head if ids is None else head[ids], ids, target.logit_map)

    def empty_cache(self, batch: int, num_slots: int, most_written: int) -> Ring:
        """The empty Ring of the N levels, as a stack or a list like them."""
        return self.empty_ring(self.num_levels, batch, num_slots, most_written, stacked=self.stacked)

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
        apply_correction: bool = True,
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
          context: not used, since `context_layers` is empty.
          remat: a policy of jax.checkpoint_policies, by which the backward pass recomputes levels; None: it does not.
          apply_correction: False returns the levels' outputs, for `head_input`, in place of the head's input corrected
            by the true tokens.

        Returns:
          A stack or list of N hidden states [B, T, H], entry i - 1 the guess for x[t+1+i]; and (k, v) for commit_ring.
        """
        c = self.config
        dtype = features.dtype  # of all activations
        g = self.fused(features)
        e = embed(embedding, next_tokens, dtype)
        fused = self.fuse(jnp.concatenate([g, e], axis=-1))  # h_1 = L_1(FC([g_t, e_t+1]))
        fused = training_rows(fused, visible)
        ones = jnp.ones((c.hidden_size,), jnp.float32)
        rows = "batch" if callable(visible) else "rows"  # logical axis in training and in decoding
        reinjected = rms_norm(fused, ones, c.rms_norm_eps) if c.reinject else None
        table = rotation(positions, c.rope, c.head_dim)
        past = cache.layers if cache is not None else (None if self.stacked else [None] * c.num_levels)
        filled = None if cache is None else cache.filled()

        # The token before level i's guess is i - 1 further on; no loss reads past a segment's end.
        tokens_before: Any = [None] * c.num_levels
        if c.correction and apply_correction:
            tokens_before = [jnp.roll(next_tokens, -i, axis=1) for i in range(c.num_levels)]
        if self.stacked:
            tokens_before = jnp.stack(tokens_before) if c.correction and apply_correction else None

        def level_step(h: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            level, cached, before = xs
            level_past = None
            if cached is not None:
                k, v, slot_positions = cached
                level_past = Past(k, v, seen_in_ring(slot_positions, positions, c.window), filled)
            attend = visible if callable(visible) else Cached(visible, level_past)
            if reinjected is not None:
                # All-reduced before the sum: XLA's partitioner (jax 0.10.2) gave wrong numbers on data 2 x fsdp 2 x
                # tensor 2 if the stream was added to partial sums over fsdp.
                h = h + constrain(level.reinject(reinjected), rows, None, None)
            h, kv = level.layer(h, table, attend)  # h_i = L_i(h_i-1)
            h = training_rows(h, visible)
            if not apply_correction:
                return h, (h, kv)
            e = None if before is None else embed(embedding, before, dtype)
            return h, (self.head_input(level, h, e), kv)

        if remat is not None:
            level_step = jax.checkpoint(level_step, policy=remat)
        span = None if num_levels in (None, c.num_levels) else (0, num_levels)
        _, results = run_layers(level_step, fused, (self.levels, past, tokens_before), span)
        if self.stacked:
            return results
        return [hidden for hidden, _ in results], ([kv[0] for _, kv in results], [kv[1] for _, kv in results])

    def head_input(self, level: Level, h: jax.Array, e: jax.Array | None) -> jax.Array:
        """The head's input [..., H] from a level's output h, corrected by e, the embedding of the token before."""
        eps = self.config.rms_norm_eps
        if self.correction is not None:
            assert e is not None
            h = self.correction(h, e, eps)
        return level.norm(h)

    def extend(
        self, vocab: VocabWeights, new: Accepted, cache: Ring, num_levels: int, context: tuple[Past, ...] = ()
    ) -> Ring:
        """The cache of the first levels with the accepted tokens' stream positions in it."""
        return self._advance(vocab, new, cache, num_levels)[1]

    def draft(
        self,
        vocab: VocabWeights,
        new: Accepted,
        cache: Ring,
        tree: TreeSpec,
        ranking: Ranking,
        context: tuple[Past, ...] = (),
    ) -> tuple[Draft, Ring]:
        """A tree rooted at the pending token (see interfaces.Drafter).

        A tree of fewer levels runs the first levels alone, on at most as many new tokens as its rounds accept. With a
        correction it is grown level by level, since guesses depend on the token before them.
        """
        num_levels = tree.num_levels(self.num_levels)
        if self.has_split_draft:
            logits, cache = self.draft_logits(vocab, new, cache, num_levels)
            return self.build_tree(vocab, new, cache, logits, tree, ranking), cache
        hidden, cache = self._advance_newest(vocab, new, cache, num_levels)  # [B, N, H]
        levels = unstack(self.levels, self.num_levels) if self.stacked else list(self.levels)
        ids = draft_ids(vocab)

        def states_below(depth: int, tokens: jax.Array) -> jax.Array:
            """The head's input [B, f, H] for guesses at a depth, below f nodes that hold `tokens` int32 [B, f]."""
            e = embed(vocab.embedding, tokens, hidden.dtype)
            h = jnp.broadcast_to(hidden[:, depth - 1, None], e.shape)
            return self.head_input(levels[depth - 1], h, e)

        def guess(states: jax.Array, depth: int) -> jax.Array:
            logits = vocab.logits(states)  # [B, f, V]
            return rank(logits, cache.length[:, None] + depth, ids, ranking)

        def follow(states: jax.Array, parent: jax.Array, tokens: jax.Array, depth: int) -> jax.Array:
            return states_below(depth + 1, tokens)

        root = pending(new)
        return grow(tree, root, num_levels, ids, states_below(1, root[:, None]), guess, follow), cache

    @property
    def has_split_draft(self) -> bool:
        """Whether guesses are independent, so that `draft` is `draft_logits` followed by `build_tree`."""
        return self.config.correction is None

    def draft_logits(self, vocab: VocabWeights, new: Accepted, cache: Ring, num_levels: int) -> tuple[jax.Array, Ring]:
        """The first half of `draft`: logits float32 [B, N, V] of all levels, and the cache."""
        hidden, cache = self._advance_newest(vocab, new, cache, num_levels)  # [B, N, H]
        return vocab.logits(hidden), cache

    def build_tree(
        self, vocab: VocabWeights, new: Accepted, cache: Ring, logits: jax.Array, tree: TreeSpec, ranking: Ranking
    ) -> Draft:
        """The second half of `draft`: the tree of those logits. The pending token is at cache.length."""
        positions = cache.length[:, None] + 1 + jnp.arange(logits.shape[1])  # level i guesses the token i further on
        return build(tree, pending(new), rank(logits, positions, draft_ids(vocab), ranking), vocab.token_ids)

    def _advance_newest(
        self, vocab: VocabWeights, new: Accepted, cache: Ring, num_levels: int
    ) -> tuple[jax.Array, Ring]:
        """`_advance` on the newest accepted tokens, as many as a tree of so many levels can accept."""
        new, skipped = newest(new, num_levels + 1)
        return self._advance(vocab, new, cache._replace(length=cache.length + skipped), num_levels)

    def _advance(self, vocab: VocabWeights, new: Accepted, cache: Ring, num_levels: int) -> tuple[jax.Array, Ring]:
        """The first levels' states [B, N, H] at the last accepted position, and the cache with all positions.

        The states are the head's input, or with a correction the levels' outputs.
        """
        batch, num_tokens = new.tokens.shape
        index = jnp.arange(num_tokens)
        positions = cache.length[:, None] + index
        visible = causal(index[:, None], index, self.config.window)
        visible = jnp.broadcast_to(visible, (batch, num_tokens, num_tokens))
        hidden, fresh = self.hidden_states(
            vocab.embedding,
            new.features,
            new.tokens,
            positions,
            visible,
            cache,
            num_levels,
            apply_correction=self.has_split_draft,
        )
        last = jnp.maximum(new.count - 1, 0)[:, None, None]
        at_last = [jnp.take_along_axis(h, last, axis=1)[:, 0] for h in hidden]
        return jnp.stack(at_last, axis=1), commit_ring(cache, fresh, new.count)

    def unstacked(self) -> FastEagle:
        """The same drafter with its levels as a list, which XLA's CPU compiler runs faster."""
        if not self.stacked:
            return self
        other = nnx.merge(*nnx.split(self))
        other.levels = nnx.List(unstack(self.levels, self.num_levels))
        return other

    def stacked_form(self) -> FastEagle:
        """The same drafter with its levels as one scanned stack."""
        if self.stacked:
            return self
        other = nnx.merge(*nnx.split(self))
        to_columns(other)
        other.levels = stack(list(other.levels))
        return other

    def stored(self) -> list[NamedVariable]:
        """The tensors of DrafterModule.stored, with levels numbered from 0."""
        names = {"fc": "fc", "fuse": "fuse"}
        if self.correction is not None:
            names |= {name: name for name in ("correction.of_state", "correction.of_token", "correction.to_state")}
        tensors = stored_tensors(self, names)
        if self.token_ids is not None:
            tensors.append(NamedVariable("token_ids", self.token_ids))
        for i, level in enumerate(self.levels):
            tensors += stored_tensors(level, {f"levels.{i}.{name}": place for name, place in _LEVEL.items()})
        return tensors
