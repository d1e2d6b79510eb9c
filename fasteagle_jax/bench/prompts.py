"""The models that a program runs, and the lengths that its prompts are padded to.

P prompt slots · C tokens of a prefill chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.tokenizer import check_ids

CHUNK = 64  # C


class Models(NamedTuple):
    """A target with its tokenizer, and a drafter or None."""

    target: Any
    fingerprint: str
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    drafter: Any | None
    dtype: str  # of the weights


def prompt_slots(length: int) -> int:
    """P for a prompt: 64, 128, 192, 256, 384, 512, 768, ...: few shapes, few programs to compile."""
    slots = CHUNK
    while slots < length:
        slots *= 2
    return slots * 3 // 4 if slots > 2 * CHUNK and slots * 3 // 4 >= length else slots


def check_fits(target: Any, name: str, prompt: Sequence[int], max_new: int) -> None:
    """Raises UserError for a prompt without tokens or with more than the target has positions for, or tokens it lacks.

    `target` is its configuration.
    """
    if not prompt:
        raise UserError(f"prompt {name} is empty: give it some text")
    check_ids(prompt, target.vocab_size, f"prompt {name}")
    if len(prompt) + max_new > target.max_positions:
        raise UserError(
            f"prompt {name} has {len(prompt)} tokens, which with {max_new} new ones exceed the target's "
            f"{target.max_positions} positions: shorten it or lower --max-new"
        )
