"""The draft vocabulary: the tokens that occur most often.

V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fasteagle_jax.data.conversations import Conversation
from fasteagle_jax.errors import UserError


def token_counts(conversations: Iterable[Conversation], V: int, assistant_only: bool) -> np.ndarray:
    """Counts of each token, int64 [V], in all tokens or in the assistant's alone."""
    counts = np.zeros(V, np.int64)
    for c in conversations:
        if c.tokens.max() >= V:
            raise UserError(f"conversation {c.id!r} has token {c.tokens.max()} of {V}: use the target's own tokenizer")
        parts = [c.tokens[start:end] for start, end in c.assistant] if assistant_only else [c.tokens]
        for part in parts:
            np.add.at(counts, part, 1)
    return counts


def draft_vocabulary(counts: np.ndarray, size: int) -> np.ndarray:
    """The `size` most frequent tokens as sorted ids, int32 [size]; of equally frequent ones the lower ids."""
    if not 1 <= size <= len(counts):
        raise UserError(f"draft vocabulary of {size} tokens: give 1 to {len(counts)}, the target's vocabulary")
    order = np.argsort(-np.asarray(counts, np.int64), kind="stable")
    return np.sort(order[:size]).astype(np.int32)


def coverage(ids: np.ndarray, counts: np.ndarray) -> float:
    """The share of all occurrences that are of tokens in `ids`; 0.0 if nothing was counted."""
    total = counts.sum()
    return float(counts[ids].sum() / total) if total else 0.0
