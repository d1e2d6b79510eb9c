"""Dialogues between a user's questions and the target's answers, until each is a conversation or is dropped.

Ready dialogues have their answers already; a long one becomes several conversations, its windows.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any, Self

import numpy as np

from fasteagle_jax.data.conversations import Conversation
from fasteagle_jax.data.sources import HeldOut, Message
from fasteagle_jax.data.windows import cut_windows, window_id
from fasteagle_jax.engine.detokenizer import Detokenizer
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import Completion, Refused, SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.chats import Chat, encode_chats, turn_opening
from fasteagle_jax.targets.tokenizer import check_ids, encode_chat, prefix_spans

MIN_ANSWER = 16  # tokens: a prompt that leaves less room for an answer is too long
MIN_QUESTION = 4  # tokens of a user's message that the target writes
LOOP_COPIES, LOOP_TOKENS = 3, 32  # of a loop, at the least: copies back to back, tokens in all
AHEAD = 512  # samples that may be settled before the first one that is not
TOGETHER = 64  # samples whose ready dialogues are tokenised together

Outcome = list[Conversation] | str  # the conversations of a sample, or the reason why it was dropped


@dataclasses.dataclass(frozen=True)
class Sample:
    """Source of one conversation: the user's turns (None: the target writes one), or complete messages."""

    id: str
    turns: list[str] | None
    messages: list[Message] | None = None

    def asked(self) -> list[str]:
        """The user's messages."""
        return [m["content"] for m in self.messages or () if m["role"] == "user"] + (self.turns or [])


@dataclasses.dataclass
class Dialogue:
    """An unfinished conversation: `tokens` end where the assistant (or, without turns, the user) speaks next."""

    index: int  # of its sample
    id: str
    turns: list[str]  # the user's messages; empty until the target has written one
    tokens: list[int]
    spans: list[list[int]] = dataclasses.field(default_factory=list)  # answers so far

    @property
    def speaker(self) -> str:
        """The speaker of the next turn, by a name that is unique in the dialogue."""
        return f"assistant {len(self.spans)}" if self.turns else "user"

    def conversation(self) -> Conversation:
        """The conversation up to the last answer."""
        return Conversation.of(self.id, self.tokens[: self.spans[-1][1]], self.spans)


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
            return [dialogue.conversation()] if dialogue.spans else "looping answers"
        if stopped or self.keep_truncated:
            dialogue.tokens = dialogue.tokens + tokens
            dialogue.spans.append([start, start + len(tokens)])
        elif not dialogue.spans:
            return "truncated answers"
        if not stopped or self.first_turns_only or len(dialogue.spans) == len(dialogue.turns):
            return [dialogue.conversation()]
        between = self.between(dialogue.turns, len(dialogue.spans), tokens[-1])
        if between is None or len(dialogue.tokens) + len(between) + MIN_ANSWER > self.max_length:
            return [dialogue.conversation()]
        dialogue.tokens = dialogue.tokens + between
        return dialogue

    def _ask_first(self, index: int, id: str, turns: list[str]) -> Dialogue | Outcome:
        tokens = encode_chat(self.tokenizer, [{"role": "user", "content": turns[0]}])
        check_ids(tokens, self.vocab_size, f"sample {id}")
        if len(tokens) + MIN_ANSWER > self.max_length:
            return "prompts too long"
        return Dialogue(index, id, turns, tokens)

    def between(self, turns: list[str], num_answered: int, last_token: int) -> list[int] | None:
        """Tokens between the end of an answer and the start of the next; None if the answer has another last token.

        They do not depend on the answers' text, so that short ones are templated here: real ones stay as sampled.
        """
        messages = []
        for turn in turns[:num_answered]:
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "Yes."}]
        ids, spans = prefix_spans(self.tokenizer, messages)
        end = spans[-1][1]
        asked = encode_chat(self.tokenizer, [*messages, {"role": "user", "content": turns[num_answered]}])
        check_ids(asked, self.vocab_size, f"turn {num_answered} of the dialogue that begins {turns[0][:40]!r}")
        if ids[end - 1] != last_token or asked[:end] != ids[:end]:
            return None
        return asked[end:]

    def _ready(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Outcomes of samples of complete messages."""
        outcomes: list[Outcome] = ["dialogues without an answer"] * len(samples)
        all_messages = [_from_user(sample.messages or []) for sample in samples]
        answered = [i for i, messages in enumerate(all_messages) if any(m["role"] == "assistant" for m in messages)]
        chats = encode_chats(self.tokenizer, [all_messages[i] for i in answered])
        for i, chat in zip(answered, chats, strict=True):
            # E.g. roles that do not alternate; _rules of prepare_data finds a template that never works.
            if isinstance(chat, UserError):
                outcomes[i] = "dialogues that the chat template refuses"
            elif chat.spans:  # else the template marks no message as an answer
                check_ids(chat.ids, self.vocab_size, f"sample {samples[i].id}")
                outcomes[i] = self._windows(samples[i].id, all_messages[i], chat)
        return outcomes

    def _windows(self, id: str, messages: list[Message], chat: Chat) -> list[Conversation]:
        """A ready dialogue as a conversation, or as several if it is too long for one."""
        if len(chat.ids) <= self.max_length:
            return [Conversation.of(id, chat.ids, [list(span) for span in chat.spans])]
        starts = {num: i for i, num in chat.turns.items() if messages[i]["role"] == "user"}

        def opening(start: int) -> list[int] | None:
            return turn_opening(self.tokenizer, messages, chat, starts[start])

        windows = cut_windows(chat.ids, chat.spans, list(starts), opening, self.max_length)
        return [Conversation.of(window_id(id, n), tokens, spans) for n, (tokens, spans) in enumerate(windows, 1)]


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

    It gives the prompts that there are now: next turns of dialogues, else a new dialogue. At its end it may have more
    after further answers.
    """

    def __init__(
        self,
        samples: Iterator[Sample],
        rules: Rules,
        params: Callable[[Dialogue], SamplingParams],
        ahead: int,
    ) -> None:
        self._started = rules.start_all(samples)
        self._rules, self._params, self._ahead = rules, params, ahead
        self._asked: dict[int, Dialogue] = {}  # by `prompt_index`, in the engine
        self._num_asked = 0
        self._to_ask: collections.deque[Dialogue] = collections.deque()
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
        if not self._to_ask:
            raise StopIteration
        dialogue = self._to_ask.popleft()
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
            self._to_ask.append(state)
        else:
            self._outcomes[index] = state


def answer_all(
    samples: Iterator[Sample],
    rules: Rules,
    engine: Engine | None,
    params: Callable[[Dialogue], SamplingParams],
    ahead: int = AHEAD,
) -> Iterator[tuple[list[Outcome], Completion | None]]:
    """Outcomes of samples, in order and as soon as they are known, each time with the answer that came before.

    They do not depend on the engine's slots or drafter: an answer is that of its prompt and params alone. Samples of
    complete messages need no engine.
    """
    source = RequestSource(samples, rules, params, ahead)
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
