"""Rules on logits: which tokens a request allows and how it weighs them, before temperature and filters.

B rows · M nodes · S slots of text · V vocabulary · W bad words · L tokens of one.
The order is vLLM's: allowed tokens and bad words, min_tokens, bias, then repetition, frequency and presence penalty. A
rule depends on the verified prefix alone. At a node of a draft that is the row's text with the path to the node, so
each node has the logits that plain decoding would have there, and trees stay lossless.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fasteagle_jax.decoding.sampling_fields import RULE_FIELDS
from fasteagle_jax.decoding.state import NO_TOKEN
from fasteagle_jax.decoding.tree import Draft, path_ends, visible_nodes
from fasteagle_jax.devices.sharding import by_shard
from fasteagle_jax.errors import UserError

MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS = 128, 16  # of a request: bad words of several tokens, and the tokens of one
MAX_BIAS = 100.0  # OpenAI's
BANNED = -np.inf

# --- of a request -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RowRules:
    """The rules of one request in token ids; the defaults change nothing."""

    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)  # added to the logits of these tokens
    allowed_token_ids: Sequence[int] | None = None  # the only tokens that may be chosen; None for all
    bad_words: Sequence[Sequence[int]] = ()  # no answer gets one of these sequences: its last token is banned
    min_tokens: int = 0  # so many tokens come before one that ends the answer
    repetition_penalty: float = 1.0  # divides positive logits of tokens in prompt and answer, multiplies negative ones
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the answer
    frequency_penalty: float = 0.0  # subtracted from the logit of a token for each time it is in the answer

    def check(self, vocab_size: int, stop_tokens: Sequence[int] = ()) -> None:
        """Raises UserError for a token outside the vocabulary, too many bad words, or rules that leave no token."""
        for token in self.logit_bias:
            if not 0 <= token < vocab_size:
                raise UserError(f"logit_bias is for token {token}: give token ids below {vocab_size}")
        for token in self.allowed_token_ids or ():
            if not 0 <= token < vocab_size:
                raise UserError(f"allowed_token_ids has token {token}: give token ids below {vocab_size}")
        several = [word for word in self.bad_words if len(word) > 1]
        if len(several) > MAX_BAD_WORDS:
            raise UserError(f"bad_words are {len(several)} of several tokens: give at most {MAX_BAD_WORDS}")
        for word in self.bad_words:
            if not word or not all(0 <= token < vocab_size for token in word):
                raise UserError(f"bad_words has tokens {list(word)}: give token ids below {vocab_size}")
            if len(word) > MAX_BAD_WORD_TOKENS:
                raise UserError(f"bad_words has one of {len(word)} tokens: give words of at most {MAX_BAD_WORD_TOKENS}")
        allowed = range(vocab_size) if self.allowed_token_ids is None else set(self.allowed_token_ids)
        banned = {word[0] for word in self.bad_words if len(word) == 1}
        for first, tokens in ((False, banned), (True, banned | set(stop_tokens))):
            if (self.min_tokens or not first) and len(allowed) <= len(tokens) and tokens.issuperset(allowed):
                rest = f" that does not end the answer, and min_tokens is {self.min_tokens}" if first else ""
                raise UserError(f"allowed_token_ids and bad_words leave no token{rest}: allow more")


# --- of a batch -------------------------------------------------------------------------------------------------


class Rules(NamedTuple):
    """The rules of each row. A batch without any has None in its place, and a program without this file's work."""

    bias: Any  # float32 [B, V], BANNED where a token is not allowed
    bad_words: Any  # int32 [B, W, L], those of several tokens, the last token first; then NO_TOKEN
    min_tokens: Any  # int32 [B]
    repetition_penalty: Any  # float32 [B]
    presence_penalty: Any  # float32 [B]
    frequency_penalty: Any  # float32 [B]


AXES = {"bias": ("rows", None), "bad_words": ("rows", None, None)}  # logical axes by name, those of scalars besides
AXES |= dict.fromkeys(RULE_FIELDS, ("rows",))


def make_rules(rows: Sequence[RowRules], vocab_size: int) -> Rules:
    """The Rules of checked rows, as NumPy arrays, which compile nothing."""
    bias = np.zeros((len(rows), vocab_size), np.float32)
    bad_words = np.full((len(rows), MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), NO_TOKEN, np.int32)
    for b, row in enumerate(rows):
        for token, value in row.logit_bias.items():
            bias[b, token] = value
        if row.allowed_token_ids is not None:
            allowed = np.isin(np.arange(vocab_size), list(row.allowed_token_ids))
            bias[b] = np.where(allowed, bias[b], BANNED)
        bias[b, [word[0] for word in row.bad_words if len(word) == 1]] = BANNED
        for w, word in enumerate(word for word in row.bad_words if len(word) > 1):
            bad_words[b, w, : len(word)] = word[::-1]
    numbers = {name: [getattr(row, name) for row in rows] for name in RULE_FIELDS}
    arrays = {name: np.asarray(numbers[name], field.dtype) for name, field in RULE_FIELDS.items()}
    return Rules(bias, bad_words, **arrays)


def no_rules(batch: int, vocab_size: int) -> Rules:
    """Rules that change nothing, for the free rows of a batch with some."""
    numbers = {name: jnp.full((batch,), field.default, field.dtype) for name, field in RULE_FIELDS.items()}
    bad_words = jnp.full((batch, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), NO_TOKEN, jnp.int32)
    return Rules(jnp.zeros((batch, vocab_size)), bad_words, **numbers)


def apply_rules(
    rules: Rules,
    stop_tokens: jax.Array,
    logits: jax.Array,
    draft: Draft,
    text: jax.Array,
    length: jax.Array,
    num_emitted: jax.Array,
) -> jax.Array:
    """The logits float32 [B, M, V] after the rules.

    Args:
      rules: of each row.
      stop_tokens: int32 [B, number of stop tokens], those that end a row's answer.
      logits: float32 [B, M, V], of the token after each node.
      draft: the nodes. The root is the last token of `text`: pending, or after prefill the prompt's last one.
      text: int32 [B, S], prompt and answer by position.
      length: int32 [B], the root's position.
      num_emitted: int32 [B], tokens of the answer so far, which the root ends.
    """
    num_before = num_emitted[:, None] + draft.depths  # int32 [B, M], tokens of the answer up to each node
    ends = (stop_tokens[..., None] == jnp.arange(logits.shape[-1])).any(axis=1)  # bool [B, V]
    too_early = num_before < rules.min_tokens[:, None]
    logits = logits + rules.bias[:, None]
    logits = jnp.where(too_early[..., None] & ends[:, None], BANNED, logits)

    def without_bad_words() -> jax.Array:
        banned = _completes_bad_word(rules.bad_words, draft, text, length, num_before, logits.shape[-1])
        return jnp.where(banned, BANNED, logits)

    logits = jax.lax.cond((rules.bad_words != NO_TOKEN).any(), without_bad_words, lambda: logits)
    repetition, presence, frequency = (
        x[:, None, None] for x in (rules.repetition_penalty, rules.presence_penalty, rules.frequency_penalty)
    )

    def penalised() -> jax.Array:
        in_prompt, counts = _counts(draft, text, length, num_emitted, logits.shape[-1])
        repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
        ruled = jnp.where(in_prompt[:, None] | (counts > 0), repeated, logits)
        return ruled - frequency * counts - presence * (counts > 0)

    return jax.lax.cond(((repetition != 1) | (presence != 0) | (frequency != 0)).any(), penalised, lambda: logits)


def keep_allowed(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """The logits float32 [B, M, V] with those of tokens banned whose bit in masks uint32 [B, M, V / 32] is 0."""
    token = jnp.arange(logits.shape[-1])
    bits = masks[..., token // 32] >> (token % 32).astype(jnp.uint32)
    return jnp.where(bits & 1, logits, BANNED)


def _completes_bad_word(
    bad_words: jax.Array, draft: Draft, text: jax.Array, length: jax.Array, num_before: jax.Array, vocab: int
) -> jax.Array:
    """The mask bool [B, M, V], True where a token after a node would complete a bad word, all of it in the answer."""

    def completes(words: jax.Array, draft: Draft, text: jax.Array, length: jax.Array, num_before: jax.Array) -> Any:
        before = words[:, None, :, 1:]  # [B, 1, W, L-1], the last token before the last one first
        suffixes = path_ends(draft, text, length, words.shape[-1] - 1)[:, :, None]  # [B, M, 1, L-1]
        fits = ((before == suffixes) | (before == NO_TOKEN)).all(axis=-1)
        hit = fits & ((before != NO_TOKEN).sum(axis=-1) <= num_before[..., None])  # bool [B, M, W]
        last = jnp.where(hit & (words[:, None, :, 0] != NO_TOKEN), words[:, None, :, 0], vocab)
        row, node = jnp.arange(len(last))[:, None, None], jnp.arange(last.shape[1])[:, None]
        return jnp.zeros((*last.shape[:2], vocab), bool).at[row, node, last].set(True, mode="drop")

    axes = {n: ("rows", *[None] * (n - 1)) for n in (1, 2, 3)}  # by row: devices that share the rows exchange nothing
    return by_shard(completes, axes, bad_words, draft, text, length, num_before)


def _counts(
    draft: Draft, text: jax.Array, length: jax.Array, num_emitted: jax.Array, vocab: int
) -> tuple[jax.Array, jax.Array]:
    """Whether a token is in the prompt, bool [B, V], and how often in the answer up to each node, int32 [B, M, V]."""
    positions = jnp.arange(text.shape[1])
    first = (length + 1 - num_emitted)[:, None]  # the answer's
    in_prompt = positions < first
    in_answer = ~in_prompt & (positions <= length[:, None])
    on_path = visible_nodes(draft) & (draft.depths > 0)[:, None]  # [B, M, M]; the root is in the text
    axes = {n: ("rows", *[None] * (n - 1)) for n in (2, 3)}

    def count(text: jax.Array, inside: jax.Array) -> jax.Array:
        row = jnp.arange(len(text))[:, None]
        return jnp.zeros((len(text), vocab), jnp.int32).at[row, jnp.where(inside, text, vocab)].add(1, mode="drop")

    def count_to_nodes(on_path: jax.Array, tokens: jax.Array, text: jax.Array, inside: jax.Array) -> jax.Array:
        row, node = jnp.arange(len(text))[:, None, None], jnp.arange(tokens.shape[1])[:, None]
        of_path = jnp.zeros((*tokens.shape, vocab), jnp.int32)
        of_path = of_path.at[row, node, jnp.where(on_path, tokens[:, None], vocab)].add(1, mode="drop")
        return count(text, inside)[:, None] + of_path

    counts = by_shard(count_to_nodes, axes, on_path, draft.tokens, text, in_answer)
    return by_shard(count, axes, text, in_prompt) > 0, counts
