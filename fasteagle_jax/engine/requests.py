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
from fasteagle_jax.decoding.rules import MAX_BIAS
from fasteagle_jax.decoding.sampling_fields import FIELDS, RULE_FIELDS
from fasteagle_jax.decoding.state import MAX_LOGPROBS
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.text import check_text
from fasteagle_jax.targets.messages import short

MAX_STOP_TOKENS = 16  # of a request, the target's own end tokens included

RULES = (*RULE_FIELDS, "logit_bias", "allowed_token_ids", "bad_words", "structured_outputs")  # of SamplingParams

# {"role", "content"}, the content a text or a list of {"type": "text", "text"}; an assistant's may have "tool_calls"
# and "reasoning_content", a tool's "tool_call_id" and "name".
Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]  # plain text, token ids, or a chat conversation


_record: Any = dataclasses.dataclass(frozen=True)  # Any: mypy cannot know the table's fields

_SamplingFields: Any = dataclasses.make_dataclass(
    "_SamplingFields",
    [(name, row.python_type, row.default) for name, row in (FIELDS | RULE_FIELDS).items()],
    frozen=True,
)


@_record
class SamplingParams(_SamplingFields):
    """Settings of a request. The same prompt and settings give the same tokens, whatever else is in the batch.

    Besides the fields below it has those of `sampling_fields.FIELDS`: temperature (0 is greedy), top_k, top_p, min_p
    and seed; and of RULE_FIELDS: min_tokens (no token ends the answer before so many), repetition_penalty (of tokens in
    prompt and answer), presence_penalty and frequency_penalty (of tokens in the answer).

    Rules apply to the target's logits in vLLM's order: allowed_token_ids and bad_words, min_tokens, logit_bias,
    penalties. Then filters apply to logits / temperature in the order top-k, top-p, min-p. Sample i of `n` has a seed
    of its own, a hash of `seed` and i; sample 0 has `seed` itself.
    """

    max_new_tokens: int = 256
    stop: Sequence[str] = ()  # the answer ends before the first of these strings; its tokens end with the one that
    # completed it; a special token's text stands for its id
    stop_token_ids: Sequence[int] = ()  # besides the target's own; kept in the tokens, not in the text
    ignore_eos: bool = False  # continue after the target's own end tokens
    n: int = 1  # samples
    logprobs: bool = False  # of the emitted tokens, under the target's softmax before rules, temperature and filters;
    # a number, as in vLLM, asks for so many of `top_logprobs`, too
    top_logprobs: int = 0  # so many of the most probable tokens in each emitted token's place, with `logprobs`
    prompt_logprobs: int | None = None  # log-probabilities of the prompt's tokens, and so many alternatives of each
    # Added to logits, by token id; a dict has no hash, which only makes equal hashes more likely.
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    allowed_token_ids: Sequence[int] | None = None  # no other token is chosen; None for all
    # What the answer follows, cut where it reaches its limit: {"json": a schema}, {"regex": an expression} or
    # {"json_object": True}. Needs llguidance, of the extra `grammar`.
    structured_outputs: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    bad_words: Sequence[str] = ()  # the answer gets none of their tokens in a row, with or without a space before

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        fields = FIELDS | RULE_FIELDS
        for name in (*fields, "max_new_tokens", "n"):
            value = _plain(getattr(self, name))
            if (number := _number(value)) is None:
                raise UserError(f"{name} is {short(value)}: give a number")
            set_field(self, name, fields[name].meaning(value) if name in fields else number)
        for name in ("max_new_tokens", "n"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value < 2**31:
                raise UserError(f"{name} is {value}: give a whole number of at least 1")
        ignore_eos = _plain(self.ignore_eos)
        if not isinstance(ignore_eos, bool | None):
            raise UserError(f"ignore_eos is {ignore_eos!r}: give True or False")
        set_field(self, "ignore_eos", bool(ignore_eos))
        self._set_logprobs()
        if self.min_tokens > self.max_new_tokens:
            raise UserError(f"min_tokens is {self.min_tokens}, but max_new_tokens {self.max_new_tokens}: lower it")
        stop = _listed(self.stop)
        if stop is None or not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop is {self.stop!r}: give strings that are not empty")
        set_field(self, "stop", tuple(check_text(str(text), f"stop string {text!r}") for text in stop))
        set_field(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        self._set_rules()

    def _set_logprobs(self) -> None:
        """Settles what is asked for: `logprobs` may be a number, of `top_logprobs`."""
        set_field = object.__setattr__
        asked, top = _plain(self.logprobs), whole_number(self.top_logprobs)
        for name, value in (("logprobs", asked), ("prompt_logprobs", _plain(self.prompt_logprobs))):
            number = 0 if isinstance(value, bool | None) else whole_number(value)
            if number is None or not 0 <= number <= MAX_LOGPROBS:
                what = "True, False or " if name == "logprobs" else ""
                raise UserError(f"{name} is {short(value)}: give {what}a whole number up to {MAX_LOGPROBS}")
        if top is None or not 0 <= top <= MAX_LOGPROBS:
            raise UserError(f"top_logprobs is {short(self.top_logprobs)}: give a whole number up to {MAX_LOGPROBS}")
        if not isinstance(asked, bool | None):
            number = whole_number(asked)
            if top not in (0, number):
                raise UserError(f"logprobs is {number}, but top_logprobs {top}: leave one of them out")
            asked, top = True, number
        if top and not asked:
            raise UserError(f"top_logprobs is {top} without logprobs: give logprobs=True, too")
        of_prompt = _plain(self.prompt_logprobs)
        if isinstance(of_prompt, bool | None):
            of_prompt = 0 if of_prompt else None
        set_field(self, "logprobs", bool(asked))
        set_field(self, "top_logprobs", top)
        set_field(self, "prompt_logprobs", of_prompt)

    def _set_rules(self) -> None:
        """Checks what can be checked without a vocabulary."""
        set_field = object.__setattr__
        given: Any = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(given, Mapping):
            raise UserError(f"logit_bias is {short(given)}: give numbers by token id")
        bias = {}
        for key, value in given.items():
            token, number = _token_id(key), _number(value)
            if token is None:
                raise UserError(f"logit_bias is for {short(key)}: give token ids")
            if number is None or not -MAX_BIAS <= number <= MAX_BIAS:
                raise UserError(
                    f"logit_bias of token {token} is {short(value)}: give a number from {-MAX_BIAS:g} to {MAX_BIAS:g}"
                )
            bias[token] = float(number)
        set_field(self, "logit_bias", bias)
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise UserError("allowed_token_ids is empty, which allows no token: give some, or None for all")
            set_field(self, "allowed_token_ids", allowed)
        self._check_structured_outputs()
        words = _listed(self.bad_words)
        if words is None or not all(isinstance(text, str) and text.strip() for text in words):
            raise UserError(f"bad_words is {short(self.bad_words)}: give texts that are not empty")
        set_field(self, "bad_words", tuple(check_text(str(text), f"bad word {text!r}") for text in words))

    def _check_structured_outputs(self) -> None:
        """Checks their form, and what contradicts them; `engine.grammar` compiles them."""
        given = self.structured_outputs
        if given is None:
            return
        kinds = ("json", "regex", "json_object")
        if not isinstance(given, Mapping) or len(given) != 1 or next(iter(given)) not in kinds:
            raise UserError(f"structured_outputs is {short(given)}: give one of {', '.join(kinds)}")
        ((kind, value),) = given.items()
        right = {
            "json": isinstance(value, str | Mapping),
            "regex": isinstance(value, str) and bool(value),
            "json_object": value is True,
        }
        if not right[kind]:
            what = {"json": "a JSON schema", "regex": "a regular expression", "json_object": "True"}[kind]
            raise UserError(f"structured_outputs.{kind} is {short(value)}: give {what}")
        for name in ("ignore_eos", "min_tokens", "allowed_token_ids", "bad_words"):
            if getattr(self, name):
                raise UserError(f"{name} with structured_outputs, which say themselves what may come: leave one out")


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


def _token_id(value: Any) -> int | None:
    """A token id from a number, or from digits, as JSON's keys are; None for anything else."""
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdecimal() and len(value) < 11 else None
    number = whole_number(value)
    return number if number is not None and 0 <= number < 2**31 else None


def _token_ids(name: str, values: Any) -> tuple[int, ...]:
    """Token ids from a list or an array; UserError for anything else."""
    ids = _listed(values)
    wholes = None if ids is None else [whole_number(token) for token in ids]
    if wholes is None or not all(token is not None and 0 <= token < 2**31 for token in wholes):
        raise UserError(f"{name} is {values!r}: give token ids")
    return tuple(token for token in wholes if token is not None)


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
    # Of each token, if asked for: the most probable tokens in its place with their log-probabilities, best first.
    top_logprobs: tuple[dict[int, float], ...] | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None  # of each of the prompt's tokens, if asked for; first None
    prompt_top_logprobs: tuple[dict[int, float] | None, ...] | None = None

    @property
    def text_tokens(self) -> tuple[int, ...]:
        """The tokens without the one that ended it, which the text does not show."""
        ended_by_token = self.finish_reason == "stop" and not isinstance(self.stop_reason, str)
        return self.tokens[:-1] if ended_by_token else self.tokens
