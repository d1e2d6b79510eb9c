"""Answers of a server that speaks OpenAI's completions, asked in tokens: prepare-data asks it in place of an engine.

Prompts are token ids, so that the server applies no template of its own. Answers are token ids too where the server
gives them (vLLM, SGLang: `token_ids`); else the text is encoded, and checked to be the text of these tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from http.client import HTTPException
from typing import Any, Literal

from fasteagle_jax.decoding.sampling_fields import FIELDS
from fasteagle_jax.engine.detokenizer import Detokenizer
from fasteagle_jax.engine.requests import Completion, RequestStatistics, SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line
from fasteagle_jax.io.text import parse_json

TRIES, FIRST_WAIT = 5, 1.0  # of a request, and the seconds before the second one, doubled each time
TIMEOUT = 600.0  # seconds for one answer
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)  # worth another try


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt on its way to the server."""

    index: int
    tokens: tuple[int, ...]
    params: SamplingParams


class Endpoint:
    """A server as a source of answers; it has what `answering.answer_all` needs of an engine."""

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Any,
        stop_token_ids: Sequence[int],
        *,
        vocab_size: int,
        max_len: int,
        concurrent: int,
        key: str = "",
        first_wait: float = FIRST_WAIT,
    ) -> None:
        """`url` ends before /completions, as "http://host:8000/v1" does; `key` is sent as a bearer token if given."""
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--endpoint is {url!r}: give an address such as http://localhost:8000/v1")
        self.url, self.model = url.rstrip("/").removesuffix("/completions"), model
        self._tokenizer, self._detokenizer = tokenizer, Detokenizer(tokenizer)
        self._ends = tuple(stop_token_ids)
        if not self._ends:
            raise UserError("--endpoint: the target's files name no token that ends an answer: add it to config.json")
        self._vocab_size, self._max_len, self._concurrent = vocab_size, max_len, concurrent
        self._key, self._first_wait = key, first_wait
        self._wants_ids = True  # until the server refuses the field

    def serve(self, pairs: Iterator[tuple[Sequence[int], SamplingParams]]) -> Iterator[Completion]:
        """The answers to prompts as they come; `prompt_index` is their number, from 0 on.

        `pairs` of a prompt and its params is asked for more before each wait.
        """
        numbers = itertools.count()
        under_way: set[Future[Completion]] = set()
        while True:
            while len(under_way) < self._concurrent and (pair := next(pairs, None)) is not None:
                under_way.add(self._started(Asked(next(numbers), tuple(pair[0]), pair[1])))
            if not under_way:
                return
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda future: future.exception() is not None):  # failures last
                yield future.result()

    def _started(self, asked: Asked) -> Future[Completion]:
        """The answer that a thread of its own waits for; the process may end before it comes, unlike with a pool's."""
        future: Future[Completion] = Future()

        def run() -> None:
            try:
                future.set_result(self._answer(asked))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="endpoint", daemon=True).start()
        return future

    def _answer(self, asked: Asked) -> Completion:
        room = min(int(asked.params.max_new_tokens), self._max_len - len(asked.tokens))
        body = {"model": self.model, "prompt": list(asked.tokens), "max_tokens": room, "stream": False}
        body |= {
            name: getattr(asked.params, name)
            for name, row in FIELDS.items()
            if name in ("temperature", "seed") or getattr(asked.params, name) != row.default
        }
        answer = self._post(body)
        try:
            (choice,) = answer["choices"]
            text, ids, reason = choice["text"], choice.get("token_ids"), choice["finish_reason"]
            counted = (answer.get("usage") or {}).get("prompt_tokens", len(asked.tokens))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._wrong(f"an answer without {first_line(error)}") from None
        if counted != len(asked.tokens):
            raise self._wrong(f"{counted} tokens counted in a prompt of {len(asked.tokens)}: it changes prompts")
        tokens = self._tokens(text, ids, asked.tokens)
        stopped = reason == "stop"
        if stopped and (not tokens or tokens[-1] not in self._ends):
            eos = self._tokenizer.eos_token_id
            tokens.append(eos if eos in self._ends else self._ends[-1])
        took = RequestStatistics(0, (), 0.0)
        depths = (0,) * len(tokens)
        finish: Literal["stop", "length"] = "stop" if stopped else "length"
        return Completion(asked.index, 0, len(asked.tokens), text, tuple(tokens), depths, finish, None, None, took)

    def _tokens(self, text: Any, ids: Any, prompt: Sequence[int]) -> list[int]:
        """The answer's tokens: the server's, or the text's; UserError if they are not of this tokenizer."""
        if ids is not None:
            if not isinstance(ids, list) or not all(type(id) is int and 0 <= id < self._vocab_size for id in ids):
                raise self._wrong("token_ids that the target does not have")
            return list(ids)
        if not isinstance(text, str):
            raise self._wrong(f"a text that is {type(text).__name__}")
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        if self._detokenizer.text(tokens, list(prompt)) != text:
            raise self._wrong(f"the text {text[:40]!r}, which no tokens of the target have")
        return list(tokens)

    def _post(self, body: dict[str, Any]) -> Any:
        """The server's JSON; UserError for what several tries do not mend."""
        wait_seconds, reason = self._first_wait, ""
        for last in [False] * (TRIES - 1) + [True]:
            sent = body | ({"return_token_ids": True} if self._wants_ids else {})
            headers = {"Content-Type": "application/json"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            request = urllib.request.Request(f"{self.url}/completions", json.dumps(sent).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    return parse_json(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code}: {_said(error)}"
                if error.code in (400, 422) and "return_token_ids" in sent:
                    self._wants_ids = False  # OpenAI's own refuses fields that it does not know
                    continue
                if error.code not in _BUSY:
                    raise self._wrong(reason) from None
            except (OSError, HTTPException, ValueError) as error:  # no connection, a torn answer, no JSON
                reason = first_line(error)
            if not last:
                time.sleep(wait_seconds)
                wait_seconds *= 2
        raise UserError(
            f"{self.url} does not answer after {TRIES} tries ({reason}): what was answered is kept, "
            "the same command resumes"
        )

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self.url} gave {what} (model {self.model}): what was answered before is kept")


def _said(error: urllib.error.HTTPError) -> str:
    """What a server says of an error, in one short line."""
    try:
        raw = error.read().decode(errors="replace")
        told = parse_json(raw)
        told = told.get("error", told) if isinstance(told, dict) else told
        text = told.get("message", raw) if isinstance(told, dict) else told
    except (OSError, ValueError):
        text = error.reason
    return " ".join(str(text).split())[:200]
