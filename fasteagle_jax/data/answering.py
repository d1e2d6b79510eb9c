"""Conversations in the making: a question, the target's answer, the next question, and what becomes of them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import numpy as np

from fasteagle_jax.data.conversations import Conversation
from fasteagle_jax.data.sources import HeldOut, Message
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import Completion, SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.tokenizer import assistant_spans, encode_chat, prefix_spans

MIN_ANSWER = 16  # tokens: a prompt that leaves less room is too long
MIN_QUESTION = 4  # tokens of a self-made user's message
LOOP_COPIES, LOOP_TOKENS = 3, 32  # the least that an answer repeats, at one stretch, where it has begun to loop
AHEAD = 512  # samples: so many may be settled before the first one that is not

Outcome = Conversation | str  # or why there is none


@dataclasses.dataclass(frozen=True)
class Sample:
    """One thing to make a conversation of: the user's turns (None: to be written), or the messages as they are."""

    id: str
    turns: list[str] | None
    messages: list[Message] | None = None

    def asked(self) -> list[str]:
        """What the user says in it."""
        return [m["content"] for m in self.messages or () if m["role"] == "user"] + (self.turns or [])


@dataclasses.dataclass
class Talk:
    """A conversation under way: `tokens` end where the assistant (or, without turns, the user) has to speak."""

    place: int  # among all samples
    id: str
    turns: list[str]  # the user's messages; empty until a self-made one is written
    tokens: list[int]
    spans: list[list[int]] = dataclasses.field(default_factory=list)  # answers so far

    @property
    def speaker(self) -> str:
        """Who speaks next, by a name no other turn has."""
        return f"assistant {len(self.spans)}" if self.turns else "user"

    def conversation(self) -> Conversation:
        """What has been said up to the last answer."""
        return Conversation.of(self.id, self.tokens[: self.spans[-1][1]], self.spans)


@dataclasses.dataclass(frozen=True)
class Rules:
    """What every conversation is held to."""

    tokenizer: Any
    header: list[int]  # opens a conversation up to the user's first word
    max_length: int
    keep_truncated: bool
    first_turns_only: bool  # where the chat template cannot tell what stands between an answer and the next question
    held_out: HeldOut  # what no self-made question may be; samples of sources were looked through before

    def begin(self, place: int, sample: Sample) -> Talk | Outcome:
        """The conversation with its first question asked, or what became of the sample already."""
        if sample.messages is not None:
            return self._ready(sample.id, sample.messages)
        if sample.turns is None:
            return Talk(place, sample.id, [], self.header)
        return self._ask_first(place, sample.id, sample.turns)

    def hear(self, talk: Talk, tokens: list[int], stopped: bool) -> Talk | Outcome:
        """The conversation with the next question asked, or what became of it."""
        if not talk.turns:  # a self-made question
            text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            if not stopped or len(tokens) < MIN_QUESTION or not any(c.isalpha() for c in text):
                return "poor self-made questions"
            if self.held_out.holds(text):
                return "held-out questions"
            return self._ask_first(talk.place, talk.id, [text])
        start = len(talk.tokens)
        if (cut := loop_start(tokens)) is not None:  # nothing is asked after it: all later turns would see the loop
            if cut >= MIN_ANSWER:
                talk.tokens = talk.tokens + tokens[:cut]
                talk.spans.append([start, start + cut])
            return talk.conversation() if talk.spans else "looping answers"
        if stopped or self.keep_truncated:
            talk.tokens = talk.tokens + tokens
            talk.spans.append([start, start + len(tokens)])
        elif not talk.spans:
            return "truncated answers"
        if not stopped or self.first_turns_only or len(talk.spans) == len(talk.turns):
            return talk.conversation()
        between = self._between(talk.turns, len(talk.spans), tokens[-1])
        if between is None or len(talk.tokens) + len(between) + MIN_ANSWER > self.max_length:
            return talk.conversation()
        talk.tokens = talk.tokens + between
        return talk

    def _ask_first(self, place: int, id: str, turns: list[str]) -> Talk | Outcome:
        tokens = encode_chat(self.tokenizer, [{"role": "user", "content": turns[0]}])
        if len(tokens) + MIN_ANSWER > self.max_length:
            return "prompts too long"
        return Talk(place, id, turns, tokens)

    def _between(self, turns: list[str], num_answered: int, last_token: int) -> list[int] | None:
        """What stands between the end of an answer and the beginning of the next; None where the answer ended oddly.

        The answers' own text does not matter to it, so short ones stand for them: their tokens stay as sampled.
        """
        messages = []
        for turn in turns[:num_answered]:
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "Yes."}]
        ids, spans = prefix_spans(self.tokenizer, messages)
        end = spans[-1][1]
        asked = encode_chat(self.tokenizer, [*messages, {"role": "user", "content": turns[num_answered]}])
        if ids[end - 1] != last_token or asked[:end] != ids[:end]:
            return None
        return asked[end:]

    def _ready(self, id: str, messages: list[Message]) -> Outcome:
        """A conversation with its answers as they are."""
        while messages and messages[0]["role"] == "assistant":  # ShareGPT's cut beginnings
            messages = messages[1:]
        if not any(message["role"] == "assistant" for message in messages):
            return "dialogues without an answer"
        try:
            tokens, spans = assistant_spans(self.tokenizer, messages)
        except UserError:  # roles that do not alternate, for one; a template that never works is found at the start
            return "dialogues that the chat template refuses"
        if not spans:  # the template marks none of the messages as an answer
            return "dialogues without an answer"
        if len(tokens) > self.max_length:
            return "dialogues too long"
        return Conversation.of(id, tokens, [list(span) for span in spans])


def loop_start(tokens: Sequence[int]) -> int | None:
    """Where the second copy begins of what an answer repeats over and over; None for an answer that does not loop.

    A loop is one stretch of at least LOOP_COPIES copies, back to back, of some run of tokens, and of at least
    LOOP_TOKENS tokens in all; the earliest one counts.
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


class Talks:
    """The requests that samples make of the engine, and what becomes of the samples.

    An iterator that gives what can be asked now: what comes next in conversations under way, else a new one. Having
    come to an end it may have more to give once answers were heard; `Engine.serve` asks again before every call of
    the device.
    """

    def __init__(
        self,
        samples: Iterator[Sample],
        rules: Rules,
        engine: Engine | None,
        params: Callable[[Talk], SamplingParams],
        ahead: int,
    ) -> None:
        self._samples, self._rules, self._engine, self._params, self._ahead = samples, rules, engine, params, ahead
        self._asked: dict[int, Talk] = {}  # by place, the engine's
        self._to_ask: collections.deque[Talk] = collections.deque()
        self._outcomes: dict[int, Outcome] = {}  # by place, of samples behind one that is not settled
        self._first = self._read = 0  # the first sample that is not settled, the number of samples read
        self._more = True  # whether there are samples to read

    @property
    def over(self) -> bool:
        """Whether all samples are settled."""
        return not self._more and self._first == self._read

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        while not self._to_ask and self._more and self._read - self._first < self._ahead:
            if (sample := next(self._samples, None)) is None:
                self._more = False
            else:
                self._settle(self._read, self._rules.begin(self._read, sample))
                self._read += 1
        if not self._to_ask:
            raise StopIteration
        talk = self._to_ask.popleft()
        self._asked[talk.place] = talk
        assert self._engine is not None, "without an engine there are dialogues alone, which are settled at once"
        (request,) = self._engine.requests(talk.place, talk.tokens, self._params(talk))
        return request

    def hear(self, completion: Completion) -> None:
        """Takes an answer in."""
        talk = self._asked.pop(completion.prompt_index)
        self._settle(talk.place, self._rules.hear(talk, list(completion.tokens), completion.finish_reason == "stop"))

    def settled(self) -> list[Outcome]:
        """What became of the next samples in their order, as far as that is known."""
        settled = []
        while self._first in self._outcomes:
            settled.append(self._outcomes.pop(self._first))
            self._first += 1
        return settled

    def _settle(self, place: int, state: Talk | Outcome) -> None:
        if isinstance(state, Talk):
            self._to_ask.append(state)
        else:
            self._outcomes[place] = state


def answer_all(
    samples: Iterator[Sample],
    rules: Rules,
    engine: Engine | None,
    params: Callable[[Talk], SamplingParams],
    ahead: int = AHEAD,
) -> Iterator[tuple[list[Outcome], Completion | None]]:
    """What became of the samples, in their order and as soon as it is known, with the answer that settled it.

    Neither the slots of the engine nor its drafter change it: every answer is that of its prompt and params alone.
    No engine is needed for dialogues.
    """
    talks = Talks(samples, rules, engine, params, ahead)
    while not talks.over:
        answers: Iterator[Completion] = talks if engine is None else engine.serve(talks)
        for completion in answers:
            talks.hear(completion)
            yield talks.settled(), completion
        yield talks.settled(), None
