"""An engine that many threads ask at once: its slots are filled from whatever any of them has waiting."""

from __future__ import annotations

import itertools
import queue
import threading
from concurrent.futures import Future
from typing import NamedTuple, Self

from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import Completion, Prompt, Refused, SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.templates import PLAIN, ChatOptions


class _Asked(NamedTuple):
    """A prompt on its way, and what becomes of it."""

    prompt: Prompt
    params: SamplingParams
    chat: ChatOptions
    answers: Future[list[Completion]]


class SharedEngine:
    """An engine in a thread of its own, to the process's end; nobody else may ask that engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._waiting: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None  # of the engine; there are no answers after it
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def ask(self, prompt: Prompt, params: SamplingParams, chat: ChatOptions = PLAIN) -> Future[list[Completion]]:
        """The prompt's answers, `params.n` by sample, once they are there.

        The Future raises UserError for a prompt that cannot be answered, and what the engine raised if it has failed.
        """
        asked = _Asked(prompt, params, chat, Future())
        with self._lock:
            if self._failure is None:
                self._waiting.put(asked)
            else:
                asked.answers.set_exception(self._failure)
        return asked.answers

    def _run(self) -> None:
        while self._failure is None:
            source = _Source(self._waiting.get(), self._waiting)  # nothing is under way: wait
            try:
                for answer in self.engine.serve(source):
                    source.settle(answer)
            except BaseException as failure:  # of all that wait: an answer must not be waited for in vain
                with self._lock:
                    self._failure = failure
                for asked in source.unsettled():
                    if asked.answers.running() or asked.answers.set_running_or_notify_cancel():
                        asked.answers.set_exception(failure)


class _Source:
    """An iterator over what waits, for `Engine.serve`, which asks it again while anything is under way."""

    def __init__(self, first: _Asked, waiting: queue.SimpleQueue[_Asked]) -> None:
        self._first: _Asked | None = first
        self._waiting = waiting
        self._numbers = itertools.count()
        self._under_way: dict[int, tuple[_Asked, list[Completion]]] = {}  # by `prompt_index`

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Prompt, SamplingParams, ChatOptions]:
        asked, self._first = self._first, None
        while asked is None or not asked.answers.set_running_or_notify_cancel():
            try:
                asked = self._waiting.get_nowait()
            except queue.Empty:
                raise StopIteration from None
        self._under_way[next(self._numbers)] = asked, []
        return asked.prompt, asked.params, asked.chat

    def settle(self, answer: Completion | Refused) -> None:
        """Hands an answer to those who wait for it, with the prompt's others."""
        asked, answers = self._under_way[answer.prompt_index]
        if isinstance(answer, Completion):
            answers.append(answer)
            if len(answers) < asked.params.n:
                return
        del self._under_way[answer.prompt_index]
        if isinstance(answer, Refused):
            asked.answers.set_exception(UserError(answer.reason))
        else:
            asked.answers.set_result(sorted(answers, key=lambda completion: completion.sample))

    def unsettled(self) -> list[_Asked]:
        """All that is under way or waits, taken out."""
        left = [asked for asked, _ in self._under_way.values()]
        left += [] if self._first is None else [self._first]
        while not self._waiting.empty():
            left.append(self._waiting.get_nowait())
        return left
