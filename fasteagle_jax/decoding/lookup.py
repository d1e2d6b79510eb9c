"""Lookup: guesses copied from the row's own prompt and answer, in the tree of any drafter.

B rows · S slots of text · M nodes · N levels · K tokens of a suffix at most · W tokens of a path's end.
At every node of a draft the last tokens of the text and the path, the longest suffix of up to K that stood before, are
looked for. The tokens that followed where it stood last are guesses: the first with probability RATES of the suffix's
length, each further one with that of the suffix which it makes longer. They are mixed with the drafter's,
r(x) = (1 - rate) q(x) + rate [x is the copied token], and of all nodes the most probable are kept, as many as the
drafter's tree has. A row without a match keeps its tree. Nothing is drawn: as of any guess, which token is chosen does
not depend on it, at no temperature.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fasteagle_jax.decoding.tree import Draft, draft_of, path_ends, visible_nodes
from fasteagle_jax.devices.sharding import by_shard

# By the number of tokens that match: how often the copied token is the next one, below what `bench --acceptance` counts
# (docs/drafter.md), since where both guess it the drafter's share comes on top.
RATES = (0.0, 0.12, 0.30, 0.45, 0.55, 0.65, 0.70, 0.75, 0.80)


def with_lookup(draft: Draft, text: jax.Array, length: jax.Array, num_levels: int, longest: int | None) -> Draft:
    """The draft with its least probable nodes replaced by more probable copied ones.

    Args:
      draft: of the drafter, rooted at the pending token.
      text: int32 [B, S], prompt and answer by position.
      length: int32 [B], the pending token's position.
      num_levels: N, no node gets deeper.
      longest: K, less than the number of RATES; None for no lookup.
    """
    if longest is None:
        return draft

    def merge(draft: Draft, text: jax.Array, length: jax.Array) -> Draft:
        ends = path_ends(draft, text, length, max(longest, num_levels))
        matched, at = _longest_match(text, length, ends[..., :longest])
        copied = _copied(draft, text, length, ends, at, num_levels)
        return _merged(draft, matched, copied, longest)

    # By row: devices that share the rows exchange nothing.
    return by_shard(merge, {2: ("rows", None), 1: ("rows",)}, draft, text, length)


def _longest_match(text: jax.Array, length: jax.Array, suffixes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many of the suffix's tokens int32 [B, M, K] match, and the last position where they do, int32 [B, M] each.

    The token after that position is known, which excludes the pending token's.
    """
    num_slots = text.shape[1]
    positions = jnp.arange(num_slots)
    equal = (positions < length[:, None])[:, None]  # [B, 1, S]
    num_equal = jnp.zeros((), jnp.int32)
    for back in range(suffixes.shape[-1]):
        before = jnp.pad(text, ((0, 0), (back, 0)), constant_values=-1)[:, :num_slots]
        equal = equal & (before[:, None] == suffixes[..., back, None])  # [B, M, S]
        num_equal = num_equal + equal
    best = (num_equal * num_slots + positions).max(axis=-1)  # the longest one, of equally long ones the last
    return best // num_slots, best % num_slots


def _copied(
    draft: Draft, text: jax.Array, length: jax.Array, ends: jax.Array, at: jax.Array, num_levels: int
) -> jax.Array:
    """The N tokens int32 [B, M, N] after position `at` int32 [B, M], those to follow each node.

    The text with the path ends at the node: if the copy gets there, it goes on with itself, as a loop does.
    """
    node = length[:, None] + draft.depths
    period = jnp.maximum(node - at, 1)[..., None]  # 1 at least: a free row has no text
    position = at[..., None] + 1 + jnp.arange(num_levels) % period
    flat = jnp.minimum(position, text.shape[1] - 1).reshape(len(text), -1)
    of_text = jnp.take_along_axis(text, flat, axis=1).reshape(position.shape)
    back = jnp.clip(node[..., None] - position, 0, ends.shape[-1] - 1)
    of_path = jnp.take_along_axis(ends, back, axis=-1)
    return jnp.where(position <= length[:, None, None], of_text, of_path)


def _merged(draft: Draft, matched: jax.Array, copied: jax.Array, longest: int) -> Draft:
    """The draft's M - 1 most probable nodes of its own and the copied ones."""
    batch, num_nodes, num_levels = copied.shape
    rates = jnp.asarray(RATES)
    is_matched = matched > 0

    # --- the drafter's nodes: their probabilities in the mixture ----------------------------------------------
    above = jnp.maximum(draft.parents, 0)
    own = draft.scores - jnp.take_along_axis(draft.scores, above, axis=1)  # log q
    rate, guess = (jnp.take_along_axis(x, above, axis=1) for x in (rates[matched], copied[..., 0]))
    is_copy = (draft.depths > 0) & (rate > 0) & (draft.tokens == guess)
    mixed = own + jnp.log1p(-rate)
    mixed = jnp.where(is_copy, jnp.minimum(jnp.logaddexp(mixed, jnp.log(rate)), 0.0), mixed)
    mixed = jnp.where(draft.depths > 0, mixed, 0.0)
    scores = jnp.where(visible_nodes(draft), mixed[:, None], 0.0).sum(axis=-1)  # [B, M], of the paths

    # --- copied nodes, N after each node, unless the drafter has the first one: it has a match of its own -----
    children = draft.parents[:, None] == jnp.arange(num_nodes)[:, None]  # [B, node, child]
    is_new = is_matched & ~(children & is_copy[:, None]).any(axis=-1)
    ahead = jnp.arange(num_levels)
    each = jnp.log(rates[jnp.minimum(jnp.maximum(matched, 1)[..., None] + ahead, longest)])
    depths = draft.depths[..., None] + 1 + ahead  # [B, M, N]
    of_copies = scores[..., None] + jnp.cumsum(each, axis=-1)
    of_copies = jnp.where(is_new[..., None] & (depths <= num_levels), of_copies, -jnp.inf)

    # --- the best of both -------------------------------------------------------------------------------------
    # Candidates: nodes 1 to M - 1, then the first copied tokens after each node, then the second ones, ... So parents
    # come before children, which score no more, and top_k takes the first of equals.
    def by_distance(x: jax.Array) -> jax.Array:
        return x.transpose(0, 2, 1).reshape(batch, -1)

    parents = jnp.arange(num_nodes)[:, None] - 1 + num_nodes * ahead  # [M, N]; the root is NO_PARENT
    parents = jnp.broadcast_to(parents, copied.shape)
    of_drafter = (draft.parents[:, 1:] - 1, draft.tokens[:, 1:], draft.depths[:, 1:], scores[:, 1:])
    of_lookup = map(by_distance, (parents, copied, depths, of_copies))
    candidates = [jnp.concatenate(parts, axis=1) for parts in zip(of_drafter, of_lookup, strict=True)]
    # Not sharding.top_k, which is a shard_map itself.
    picked = jnp.sort(jax.lax.top_k(candidates[-1], num_nodes - 1)[1], axis=1)
    parents, tokens, depths, scores = (jnp.take_along_axis(x, picked, axis=1) for x in candidates)
    return draft_of(draft.tokens[:, 0], picked, parents, tokens, depths, scores)
