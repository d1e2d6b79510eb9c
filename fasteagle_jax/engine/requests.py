"""Requests of the engine and their answers.

N levels of the drafter. Names and meanings follow vLLM's `SamplingParams` and `CompletionOutput` as far as they go.
"""

from __future__ import annotations

import dataclasses
import hashlib
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from fasteagle_jax.decoding.acceptance import Acceptance
from fasteagle_jax.decoding.sampling_fields import FIELDS
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.text import check_text
from fasteagle_jax.targets.messages import short

MAX_STOP_TOKENS = 16  # of a request, the target's own end tokens included

Message = Mapping[str, Any]  # {"role", "content"}, the content a text or a list of {"type": "text", "text"}
Prompt = str | Sequence[int] | Sequence[Message]  # plain text, token ids, or a chat conversation


_record: Any = dataclasses.dataclass(frozen=True)  # Any: mypy cannot know the table's fields

_SamplingFields: Any = dataclasses.make_dataclass(
    "_SamplingFields", [(name, row.python_type, row.default) for name, row in FIELDS.items()], frozen=True
)


@_record
class SamplingParams(_SamplingFields):
    """Settings of a request. The same prompt and settings give the same tokens, whatever else is in the batch.

    Besides the fields below it has those of `sampling_fields.FIELDS`: temperature (0 is greedy), top_k, top_p, min_p
    and seed.

    Filters apply to logits / temperature in the order top-k, top-p, min-p. Sample i of `n` has a seed of its own, a
    hash of `seed` and i; sample 0 has `seed` itself.
    """

    max_new_tokens: int = 256
    stop: Sequence[str] = ()  # the answer ends before the first of these strings; its tokens end with the one that
    # completed it; a special token's text stands for its id
    stop_token_ids: Sequence[int] = ()  # besides the target's own; kept in the tokens, not in the text
    ignore_eos: bool = False  # continue after the target's own end tokens
    n: int = 1  # samples
    logprobs: bool = False  # of the emitted tokens, under the target's softmax before temperature and filters

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        for name in (*FIELDS, "max_new_tokens", "n"):
            value = _plain(getattr(self, name))
            if (number := _number(value)) is None:
                raise UserError(f"{name} is {short(value)}: give a number")
            set_field(self, name, FIELDS[name].meaning(value) if name in FIELDS else number)
        for name in ("max_new_tokens", "n"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value < 2**31:
                raise UserError(f"{name} is {value}: give a whole number of at least 1")
        for name in ("ignore_eos", "logprobs"):
            value = _plain(getattr(self, name))
            if not isinstance(value, bool | None):
                raise UserError(f"{name} is {value!r}: give True or False")
            set_field(self, name, bool(value))
        stop = _listed(self.stop)
        if stop is None or not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop is {self.stop!r}: give strings that are not empty")
        set_field(self, "stop", tuple(check_text(str(text), f"stop string {text!r}") for text in stop))
        ids = _listed(self.stop_token_ids)
        wholes = None if ids is None else [whole_number(token) for token in ids]
        if wholes is None or not all(token is not None and 0 <= token < 2**31 for token in wholes):
            raise UserError(f"stop_token_ids is {self.stop_token_ids!r}: give token ids")
        set_field(self, "stop_token_ids", tuple(wholes))


def _plain(value: Any) -> Any:
    """A scalar of NumPy, JAX or torch as Python's; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _number(value: Any) -> int | float | None:
    """A number of any kind as Python's, an int if it is whole; None if it is none."""
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    real: Any = value  # whose type does not say that int takes it
    try:
        return int(real) if real == int(real) else float(real)
    except (OverflowError, ValueError):  # infinite, or not a number
        return float(real)


def whole_number(value: Any) -> int | None:
    """A whole number of any kind as an int; None if it is none."""
    number = _number(value)
    return number if isinstance(number, int) else None


def _listed(values: Any) -> list[Any] | None:
    """A list of values from a list, an array or None; a text is one value. None for what is no list."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if values is None or isinstance(values, str):
        return [] if values is None else [values]
    return list(values) if isinstance(values, Iterable) and not isinstance(values, bytes | Mapping) else None


def sample_seed(seed: int, sample: int) -> int:
    """The seed of a request's sample: 32 bits of its own, `seed` itself for sample 0."""
    if sample == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}\n{sample}".encode()).digest()[:4], "little")


@dataclasses.dataclass(frozen=True)
class RequestStatistics(Acceptance):
    """The acceptance and the time of one answer."""

    seconds: float  # from the start of its prefill to its last token, the rest of the batch included
    acceptance_length = Acceptance.length  # tau


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some text of an unfinished answer."""

    text: str
    depth: int  # at which the last token in it was accepted as a guess, 0 for the target's own


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer."""

    prompt_index: int  # among the prompts asked together
    sample: int  # of the prompt's n
    prompt_tokens: int
    text: str  # without special tokens, and without the stop token or string that ended it
    tokens: tuple[int, ...]  # with the stop token that ended it
    depths: tuple[int, ...]  # of each token: the depth at which its guess was accepted, 0 for the target's own
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None  # the stop token or string that ended it; None for the target's own end
    logprobs: tuple[float, ...] | None  # of each token, if asked for
    statistics: RequestStatistics

    @property
    def text_tokens(self) -> tuple[int, ...]:
        """The tokens without the one that ended it, which the text does not show."""
        ended_by_token = self.finish_reason == "stop" and not isinstance(self.stop_reason, str)
        return self.tokens[:-1] if ended_by_token else self.tokens


@dataclasses.dataclass(frozen=True)
class Refused:
    """A prompt that cannot be answered, among others that can."""

    prompt_index: int
    reason: str  # in one line


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far `Engine.serve` is."""

    prompts: int  # read so far
    completions: int  # handed out, a prompt's samples each
    refused: int  # prompts
    new_tokens: int  # of the completions
    seconds: float  # since the start
