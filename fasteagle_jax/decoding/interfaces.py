"""The protocols Target and Drafter: what decoding and training ask of a model.

B rows · T tokens · A newly accepted tokens · N levels · H hidden width · F feature layers · V draft vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax

from fasteagle_jax.decoding.sampling import Sampling
from fasteagle_jax.decoding.tree import Draft, TreeSpec
from fasteagle_jax.nn.attention import Past
from fasteagle_jax.nn.linear import LogitMap, head_logits


class VocabWeights(NamedTuple):
    """The frozen embedding and head rows with which a drafter reads and writes tokens."""

    embedding: jax.Array  # [target vocabulary, H]
    head: jax.Array  # [V, H]
    token_ids: jax.Array | None  # int32 [V], target id of each row of `head`; None if the vocabularies are equal
    logit_map: LogitMap = LogitMap()  # from the head's products to logits
    shares: jax.Array | None = None  # [V, J * R], what each token adds to edge scores below it (see drafters.edges)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Draft logits float32 [..., V] of head inputs [..., H]."""
        return self.logit_map(head_logits(hidden, self.head))


class Accepted(NamedTuple):
    """The A newest verified tokens of each row and the target features they were predicted from."""

    features: jax.Array  # [B, A, F*H], of the token before each
    tokens: jax.Array  # int32 [B, A]; the last counted one is the pending token
    count: jax.Array  # type: ignore[assignment]  # int32 [B], how many of the A are real


class Ranking(NamedTuple):
    """How a drafter ranks its guesses: with the target's noise, or by probability alone."""

    sampling: Sampling
    shared_noise: bool  # rank with the target's own noise at temperature > 0
    bias: jax.Array | None = None  # float32 [B, target vocabulary], added to draft logits (see rules.Rules)


class Target(Protocol):
    """A frozen language model in one forward pass (see targets.decoder.DecoderTarget, which families build on)."""

    # vocab_size, hidden_size, num_layers, num_kv_heads, max_positions, `layer` (a nn.transformer.LayerConfig) and
    # `layer_kinds` (a LayerKind each)
    config: Any
    activation_dtype: Any
    embedding: Any  # a variable [V, H]
    norm: Any  # the final norm, a nn.norm.RMSNorm
    logit_map: LogitMap  # from the head's products to logits: decoding, the loss and drafters all use it

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, visible: Any, cache: Any = None, feature_layers: Any = ()
    ) -> Any:
        """The targets.decoder.TargetOutput of tokens int32 [B, Q] at positions int32 [B, Q]."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 [..., V] of the final hidden states [..., H]."""
        ...

    def head_rows(self) -> jax.Array:
        """The head [V, H]."""
        ...

    def empty_cache(
        self, batch: int, num_slots: int, most_written: int | None = None, longest: int | None = None
    ) -> Any:
        """An empty nn.kv_cache.Cache or MixedCache of all layers (see targets.decoder.DecoderTarget)."""
        ...

    def layer(self, index: int) -> Any:
        """One decoder layer, which drafters may start from."""
        ...

    def keys_values(self, index: int, inputs: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The keys and values [B, K, Q, D] of a layer for its inputs [B, Q, H]."""
        ...


class Drafter(Protocol):
    """A model that guesses the tokens after the pending one.

    `context` is what it sees of the target's own cache: for each of `context_layers`, a nn.attention.Past that holds
    the committed positions, those before the pending token.
    """

    num_levels: int  # N: no draft is deeper
    feature_layers: tuple[int, ...]  # whose inputs in the target it reads
    context_layers: tuple[int, ...]  # whose keys and values in the target it reads

    def vocab_weights(self, target: Any) -> VocabWeights:
        """The rows of the target that it needs, gathered once."""
        ...

    def empty_cache(self, batch: int, num_slots: int, most_written: int) -> Any:
        """Its own empty cache for rows of up to `num_slots` positions, written at most `most_written` at a time."""
        ...

    def extend(
        self, vocab: VocabWeights, new: Accepted, cache: Any, num_levels: int, context: tuple[Past, ...] = ()
    ) -> Any:
        """The cache with the accepted tokens in it, and no draft (prefill); later drafts have `num_levels` levels."""
        ...

    def skip(self, new: Accepted, cache: Any) -> Any:
        """The cache past the accepted tokens, with these left out: cheap, but later drafts are worse."""
        ...

    def draft(
        self,
        vocab: VocabWeights,
        new: Accepted,
        cache: Any,
        tree: TreeSpec,
        ranking: Ranking,
        context: tuple[Past, ...] = (),
    ) -> tuple[Draft, Any]:
        """A Draft rooted at each row's pending token, and the cache with the accepted tokens in it."""
        ...


class TrainableDrafter(Drafter, Protocol):
    """A drafter that can be trained; its parameters are its nnx.Param leaves."""

    config: Any  # a drafters.base.DrafterConfig
    token_ids: Any  # a variable int32 [V], the draft vocabulary; None if it is the target's
    feature_scale: Any  # a variable float32 [F*H] that features are multiplied by

    def start_from(
        self, target: Any, feature_rms: jax.Array, *, layers: bool, neurons: jax.Array | None = None
    ) -> None:
        """Initialises its weights from the target's, with `layers` those of its layers, too.

        `feature_rms` float32 [F] is the root mean square of each feature. `neurons` int32 [W] are those of the target's
        MLP that a narrower one starts from (see training.init.strongest_neurons).
        """
        ...

    def hidden_states(
        self,
        embedding: jax.Array,
        features: jax.Array,
        next_tokens: jax.Array,
        positions: jax.Array,
        visible: Any,
        *,
        context: tuple[tuple[jax.Array, jax.Array], ...] = (),
        remat: Any = None,
    ) -> tuple[Any, Any]:
        """The head's input at every level and position of packed rows: N of [B, T, H], as a stack or a list.

        With an `own_head` that reads R entries besides, they come last: [B, T, H + R].

        Entry i - 1 at stream position t is the guess for token x[t+1+i]. The second result is the drafter's own.

        Args:
          embedding: the target's [V, H].
          features: the target's g[t] [B, T, F*H].
          next_tokens: x[t+1] int32 [B, T].
          positions: t int32 [B, T], counted from each segment's start.
          visible: attention over packed rows (see nn.packed_attention.Packed), or a mask bool [B, T, T].
          context: for each of `context_layers`, the target's keys and values [B, K, T, D] of the same positions.
          remat: a policy of jax.checkpoint_policies, or None.
        """
        ...

    def own_head(self) -> jax.Array | None:
        """Its own head [V, R], which gets a gradient and reads the last R entries of hidden states.

        The target's frozen head reads the entries before them, all if this is None.
        """
        ...
