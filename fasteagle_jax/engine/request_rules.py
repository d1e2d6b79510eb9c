"""The rules of a request in token ids: what its SamplingParams say, with a tokenizer and the tokens that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fasteagle_jax.decoding.rules import RowRules
from fasteagle_jax.decoding.sampling_fields import RULE_FIELDS
from fasteagle_jax.engine.requests import SamplingParams
from fasteagle_jax.errors import UserError


def row_rules(
    params: SamplingParams, tokenizer: Any, vocab_size: int, stop_tokens: Sequence[int], name: str
) -> RowRules | None:
    """The rules that params ask for, None if they change nothing; UserError, with the prompt's name, if they cannot be.

    Tokens that the tokenizer lacks, of an embedding with spare rows, may be biased and allowed.
    """
    words = [ids for word in params.bad_words for ids in _spellings(word, tokenizer)]
    rules = RowRules(
        logit_bias={token: bias for token, bias in params.logit_bias.items() if bias},
        allowed_token_ids=params.allowed_token_ids,
        bad_words=tuple(dict.fromkeys(words)),
        **{rule: getattr(params, rule) for rule in RULE_FIELDS},
    )
    try:
        RowRules(params.logit_bias).check(vocab_size)  # also a bias of 0
        rules.check(vocab_size, stop_tokens)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return None if rules == RowRules() else rules


def _spellings(word: str, tokenizer: Any) -> list[tuple[int, ...]]:
    """The tokens of a word at the beginning of a text and after a space."""
    texts = dict.fromkeys((word, word if word[0].isspace() else f" {word}"))
    return [tuple(ids) for text in texts if (ids := tokenizer.encode(text, add_special_tokens=False))]
