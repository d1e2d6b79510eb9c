"""Dialogues between a user's questions and the target's answers, until each is a conversation or is dropped.

Ready dialogues have their answers already; a long one becomes several conversations, its windows.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any, Protocol, Self

import numpy as np

from fasteagle_jax.data.conversations import Conversation
from fasteagle_jax.data.sources import HeldOut, Message
from fasteagle_jax.data.windows import cut_windows, window_id
from fasteagle_jax.engine.detokenizer import Detokenizer
from fasteagle_jax.engine.requests import Completion, Refused, SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.chats import Chat, encode_rows, turn_opening
from fasteagle_jax.targets.templates import PLAIN, ChatOptions
from fasteagle_jax.targets.tokenizer import assistant_spans, check_ids, encode_chat

MIN_ANSWER = 16  # tokens: a prompt that leaves less room for an answer is too long
MIN_QUESTION = 4  # tokens of a user's message that the target writes
LOOP_COPIES, LOOP_TOKENS = 3, 32  # of a loop, at the least: copies back to back, tokens in all
AHEAD = 512  # samples that may be settled before the first one that is not
TOGETHER = 64  # samples whose ready dialogues are tokenised together

THOUGHTS = "<think>\nYes.\n</think>\n\nYes."  # stands for an answer with thoughts

Outcome = list[Conversation] | str  # the conversations of a sample, or the reason why it was dropped


@dataclasses.dataclass(frozen=True)
class Sample:
    """Source of one conversation: the user's turns (None: the target writes one), or complete messages."""

    id: str
    turns: list[str] | None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None  # of complete messages

    def asked(self) -> list[str]:
        """The user's messages."""
        return [m["content"] for m in self.messages or () if m["role"] == "user"] + (self.turns or [])


@dataclasses.dataclass
class Dialogue:
    """An unfinished conversation: `tokens` end where the assistant (or, without turns, the user) speaks next.

    Where the template rewrites what was said, as it leaves thoughts out, the next prompt begins a new row.
    """

    index: int  # of its sample
    id: str
    turns: list[str]  # the user's messages; empty until the target has written one
    tokens: list[int]
    spans: list[list[int]] = dataclasses.field(default_factory=list)  # answers so far, in this row
    said: list[str] = dataclasses.field(default_factory=list)  # texts of all answers so far
    rows: list[tuple[list[int], list[list[int]]]] = dataclasses.field(default_factory=list)  # that are finished

    @property
    def speaker(self) -> str:
        """The speaker of the next turn, by a name that is unique in the dialogue."""
        return f"assistant {len(self.said)}" if self.turns else "user"

    def conversations(self) -> list[Conversation]:
        """The conversation up to the last answer, a Conversation a row."""
        last = [(self.tokens[: self.spans[-1][1]], self.spans)] if self.spans else []
        return [Conversation.of(window_id(self.id, n), *row) for n, row in enumerate([*self.rows, *last], 1)]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Conditions for every conversation."""

    tokenizer: Any
    header: list[int]  # tokens before the user's first word
    vocab_size: int  # the target's
    max_length: int
    keep_truncated: bool
    first_turns_only: bool  # if the chat template gives no tokens between an answer and the next question
    held_out: HeldOut  # forbidden as questions that the target writes; sources were filtered before
    chat: ChatOptions = PLAIN

    @functools.cached_property
    def detokenizer(self) -> Detokenizer:
        """The tokenizer's."""
        return Detokenizer(self.tokenizer)

    def start(self, index: int, sample: Sample) -> Dialogue | Outcome:
        """The dialogue up to its first answer, or the outcome if the sample is settled already."""
        if sample.messages is not None:
            (outcome,) = self._ready([sample])
            return outcome
        if sample.turns is None:
            return Dialogue(index, sample.id, [], self.header)
        return self._ask_first(index, sample.id, sample.turns)

    def start_all(self, samples: Iterator[Sample]) -> Iterator[Dialogue | Outcome]:
        """`start` of samples in order. It reads TOGETHER of them at a time."""
        indices = count()
        while some := list(islice(samples, TOGETHER)):
            outcomes = iter(self._ready([sample for sample in some if sample.messages is not None]))
            for sample, index in zip(some, indices, strict=False):
                yield self.start(index, sample) if sample.messages is None else next(outcomes)

    def add_answer(self, dialogue: Dialogue, tokens: list[int], stopped: bool) -> Dialogue | Outcome:
        """The dialogue up to its next answer, or its outcome."""
        if not dialogue.turns:  # a question that the target wrote
            question = tokens[:-1] if stopped else tokens  # without the token that ended it
            text = self.detokenizer.text(question, dialogue.tokens).strip()
            if not stopped or len(tokens) < MIN_QUESTION or not any(c.isalpha() for c in text):
                return "poor self-made questions"
            if self.held_out.holds(text):
                return "held-out questions"
            return self._ask_first(dialogue.index, dialogue.id, [text])
        start = len(dialogue.tokens)
        if (cut := loop_start(tokens)) is not None:  # nothing is asked after it: all later turns would see the loop
            if cut >= MIN_ANSWER:
                dialogue.tokens = dialogue.tokens + tokens[:cut]
                dialogue.spans.append([start, start + cut])
            return dialogue.conversations() or "looping answers"
        if stopped or self.keep_truncated:
            dialogue.said.append(self.detokenizer.text(tokens[:-1] if stopped else tokens, dialogue.tokens))
            dialogue.tokens = dialogue.tokens + tokens
            dialogue.spans.append([start, start + len(tokens)])
        if not dialogue.said:
            return "truncated answers"
        if not stopped or self.first_turns_only or len(dialogue.said) == len(dialogue.turns):
            return dialogue.conversations()
        return self._ask_next(dialogue, tokens[-1])

    def _ask_next(self, dialogue: Dialogue, last_token: int) -> Dialogue | Outcome:
        """The dialogue up to its next answer, in this row or in a new one; its outcome if there is no room for one."""
        between = self.between(dialogue.turns, len(dialogue.said), last_token, dialogue.said)
        if between is not None:
            if len(dialogue.tokens) + len(between) + MIN_ANSWER > self.max_length:
                return dialogue.conversations()
            dialogue.tokens = dialogue.tokens + between
            return dialogue
        messages = _exchange(dialogue.turns, dialogue.said)
        try:
            tokens = encode_chat(self.tokenizer, messages, True, self.chat)
        except UserError:
            return dialogue.conversations()
        if len(tokens) + MIN_ANSWER > self.max_length:
            return dialogue.conversations()
        check_ids(tokens, self.vocab_size, f"turn {len(dialogue.said)} of sample {dialogue.id}")
        dialogue.rows.append((dialogue.tokens, dialogue.spans))
        dialogue.tokens, dialogue.spans = tokens, []
        return dialogue

    def _ask_first(self, index: int, id: str, turns: list[str]) -> Dialogue | Outcome:
        tokens = encode_chat(self.tokenizer, [{"role": "user", "content": turns[0]}], True, self.chat)
        check_ids(tokens, self.vocab_size, f"sample {id}")
        if len(tokens) + MIN_ANSWER > self.max_length:
            return "prompts too long"
        return Dialogue(index, id, turns, tokens)

    def between(
        self, turns: list[str], num_answered: int, last_token: int, said: Sequence[str] = ()
    ) -> list[int] | None:
        """Tokens between the end of an answer and the start of the next.

        None if the answer has another last token, or if the template rewrites what was said before: the next prompt is
        then no continuation. The tokens do not depend on the answers' text, so that short ones are templated here, with
        thoughts if the one in `said` has some: real ones stay as sampled.
        """
        answers = [THOUGHTS if i < len(said) and "</think>" in said[i] else "Yes." for i in range(num_answered)]
        messages = _exchange(turns, answers)
        try:
            ids, spans = assistant_spans(self.tokenizer, messages[:-1], self.chat)
            prompt = encode_chat(self.tokenizer, messages[:-2], True, self.chat)
            asked = encode_chat(self.tokenizer, messages, True, self.chat)
        except UserError:
            return None
        check_ids(asked, self.vocab_size, f"turn {num_answered} of the dialogue that begins {turns[0][:40]!r}")
        if not spans:
            return None
        start, end = spans[-1]
        if ids[end - 1] != last_token or asked[:end] != ids[:end] or ids[:start] != prompt:
            return None
        return asked[end:]

    def _ready(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Outcomes of samples of complete messages."""
        outcomes: list[Outcome] = ["dialogues without an answer"] * len(samples)
        all_messages = [_from_user(sample.messages or []) for sample in samples]
        answered = [i for i, messages in enumerate(all_messages) if any(m["role"] == "assistant" for m in messages)]
        options = [self._options(samples[i]) for i in answered]
        found = encode_rows(self.tokenizer, [all_messages[i] for i in answered], options)
        for i, rows, chat in zip(answered, found, options, strict=True):
            # E.g. roles that do not alternate; _rules of prepare_data finds a template that never works.
            if isinstance(rows, UserError):
                outcomes[i] = "dialogues that the chat template refuses"
            elif any(row.spans for row in rows):  # else the template marks no message as an answer
                parts: list[tuple[list[int], list[list[int]]]] = []
                for row in rows:
                    check_ids(row.ids, self.vocab_size, f"sample {samples[i].id}")
                    parts += self._windows(all_messages[i], row, chat) if row.spans else []
                ids = (window_id(samples[i].id, n) for n in count(1))
                outcomes[i] = [Conversation.of(id, *part) for id, part in zip(ids, parts, strict=False)]
        return outcomes

    def _options(self, sample: Sample) -> ChatOptions:
        return self.chat if sample.tools is None else dataclasses.replace(self.chat, tools=sample.tools)

    def _windows(
        self, messages: list[Message], chat: Chat, options: ChatOptions
    ) -> list[tuple[list[int], list[list[int]]]]:
        """The tokens and spans of a ready dialogue, or of several windows if it is too long for one."""
        if len(chat.ids) <= self.max_length:
            return [(chat.ids, [list(span) for span in chat.spans])]
        starts = {num: i for i, num in chat.turns.items() if messages[i]["role"] == "user"}

        def opening(start: int) -> list[int] | None:
            return turn_opening(self.tokenizer, messages, chat, starts[start], options)

        return cut_windows(chat.ids, chat.spans, list(starts), opening, self.max_length)


def _exchange(turns: Sequence[str], answers: Sequence[str]) -> list[Message]:
    """A conversation of the user's turns and the answers to all but the last one."""
    messages: list[Message] = []
    for turn, answer in zip(turns, answers, strict=False):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": turns[len(answers)]}]


def _from_user(messages: list[Message]) -> list[Message]:
    """The messages without answers at the start: some ShareGPT records lack their beginning."""
    while messages and messages[0]["role"] == "assistant":
        messages = messages[1:]
    return messages


def loop_start(tokens: Sequence[int]) -> int | None:
    """The index at which an answer's first loop begins its second copy; None for an answer that does not loop.

    A loop is at least LOOP_COPIES copies, back to back, of a run of tokens, and at least LOOP_TOKENS tokens in all.
    """
    answer = np.asarray(tokens)
    first = None
    for period in range(1, len(answer) // LOOP_COPIES + 1):
        as_before = answer[period:] == answer[:-period]
        # Stretches of equal tokens: edges of the flags, with a False on either side.
        edges = np.flatnonzero(np.diff(np.concatenate([[False], as_before, [False]]).astype(np.int8)))
        starts, ends = edges[::2], edges[1::2]
        least = max(LOOP_COPIES * period, LOOP_TOKENS)
        if len(found := starts[ends - starts + period >= least]):
            cut = int(found[0]) + period
            first = cut if first is None else min(first, cut)
    return first


class RequestSource:
    """An iterator over prompts and params of samples for `Engine.serve`, and the samples' outcomes.

    It gives the prompts that there are now, of the first samples first; at its end it may have more after further
    answers. What is asked at a time is limited: a dialogue's next turn would wait behind all that the engine has read,
    and the samples after the dialogue wait for it, since outcomes come in order.
    """

    def __init__(
        self,
        samples: Iterator[Sample],
        rules: Rules,
        params: Callable[[Dialogue], SamplingParams],
        ahead: int,
        at_once: int | None = None,
    ) -> None:
        """A source that reads `ahead` samples at most past one that is not settled, and asks `at_once` prompts."""
        self._started = rules.start_all(samples)
        self._rules, self._params, self._ahead, self._at_once = rules, params, ahead, at_once
        self._asked: dict[int, Dialogue] = {}  # by `prompt_index`, in the engine
        self._num_asked = 0
        self._to_ask: list[tuple[int, Dialogue]] = []  # a heap, by the sample's index
        self._outcomes: dict[int, Outcome] = {}  # by index, of samples after one that is not settled
        self._first = self._read = 0  # the first sample that is not settled, the number of samples read
        self._more = True  # whether there are samples to read

    @property
    def over(self) -> bool:
        """Whether all samples are settled."""
        return not self._more and self._first == self._read

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[list[int], SamplingParams]:
        while not self._to_ask and self._more and self._read - self._first < self._ahead:
            if (started := next(self._started, None)) is None:
                self._more = False
            else:
                self._settle(self._read, started)
                self._read += 1
        if not self._to_ask or len(self._asked) == self._at_once:
            raise StopIteration
        _, dialogue = heapq.heappop(self._to_ask)
        self._asked[self._num_asked] = dialogue
        self._num_asked += 1
        return dialogue.tokens, self._params(dialogue)

    def start_again(self) -> None:
        """Counts prompts from 0 on, as the next call of `Engine.serve` does; none may be under way."""
        assert not self._asked
        self._num_asked = 0

    def add_answer(self, completion: Completion) -> None:
        """Takes the engine's answer to a prompt."""
        dialogue = self._asked.pop(completion.prompt_index)
        self._settle(
            dialogue.index,
            self._rules.add_answer(dialogue, list(completion.tokens), completion.finish_reason == "stop"),
        )

    def settled(self) -> list[Outcome]:
        """Outcomes of the next samples in order, up to the first that is not settled."""
        settled = []
        while self._first in self._outcomes:
            settled.append(self._outcomes.pop(self._first))
            self._first += 1
        return settled

    def _settle(self, index: int, state: Dialogue | Outcome) -> None:
        if isinstance(state, Dialogue):
            heapq.heappush(self._to_ask, (index, state))
        else:
            self._outcomes[index] = state


class Answerer(Protocol):
    """An engine, or what stands in its place: a server, a cluster of engines."""

    def serve(self, pairs: Iterator[tuple[Sequence[int], SamplingParams]], /) -> Iterator[Completion | Refused]:
        """The answers to prompts as they come; `pairs` may end and have more after an answer (see `Engine.serve`)."""
        ...


def answer_all(
    samples: Iterator[Sample],
    rules: Rules,
    engine: Answerer | None,
    params: Callable[[Dialogue], SamplingParams],
    ahead: int = AHEAD,
    at_once: int | None = None,
) -> Iterator[tuple[list[Outcome], Completion | None]]:
    """Outcomes of samples, in order and as soon as they are known, each time with the answer that came before.

    They do not depend on the engine's slots or drafter: an answer is that of its prompt and params alone. Samples of
    complete messages need no engine.
    """
    source = RequestSource(samples, rules, params, ahead, at_once)
    while not source.over:
        source.start_again()
        for completion in () if engine is None else engine.serve(source):
            if isinstance(completion, Refused):
                raise UserError(f"a dialogue cannot be continued: {completion.reason}")
            source.add_answer(completion)
            yield source.settled(), completion
        if engine is None:
            assert next(source, None) is None, "without an engine there are complete messages alone, settled at once"
        yield source.settled(), None
