"""The lines of a batch file: what they ask for, the records that answer them, and the file these are appended to.

A line is OpenAI's, {"custom_id", "method": "POST", "url", "body"}, or simple: {"prompt"} or {"messages"}, and an "id"
if wanted. The sampling fields, in the body or beside the prompt, are OpenAI's and vLLM's; a field that would change an
answer in a way that is not supported must have its neutral value. A text as the prompt is continued as it is.

The answer to line 17 is one record, an error or not, and nothing but `line` tells whose it is:

    OpenAI's  {"id": "line-17", "custom_id", "line": 17, "response": {"status_code": 200, "request_id", "body"} or null,
               "error": null or {"code", "message"}, "statistics"}
    simple    {"id": the line's, else "line-17", "line": 17, "text", "tokens", "finish_reason", "stop_reason",
               "logprobs" if asked for, "prompt_tokens", "statistics", "error": null}; for n > 1 "answers", a list of
              objects, holds text to logprobs; of an error {"id", "line": 17, "error": {"code", "message"}}

`statistics` adds the samples up: {"rounds", "accepted_at" (rounds in which the guess of depth 1, 2, ... was accepted),
"acceptance_length" (null without a round), "seconds" (of the slowest sample)}. Choices have vLLM's `stop_reason` and
`token_ids` besides OpenAI's keys. Tokens and logprobs end with the stop token; the text does not show it.
"""

from __future__ import annotations

import codecs
import dataclasses
import fcntl
import json
import logging
import math
import os
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Self

from fasteagle_jax.decoding.acceptance import Acceptance
from fasteagle_jax.decoding.sampling import MAX_SEED
from fasteagle_jax.engine.detokenizer import TextStream
from fasteagle_jax.engine.requests import Completion, Prompt, SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import sync

MOST_SAMPLES = 128  # n, as OpenAI's
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

log = logging.getLogger(__name__)

Code = Literal[
    "invalid_line",  # not UTF-8, not JSON, not an object
    "unknown_field",
    "unsupported_value",
    "invalid_value",
    "invalid_prompt",
    "duplicate_custom_id",
]


@dataclasses.dataclass(frozen=True)
class Line:
    """Where a request stands, and what its record is to repeat."""

    number: int  # from 1; blank lines count
    is_simple: bool = False
    id: str | int | None = None  # its `custom_id` or `id`


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """What a line asks for."""

    line: Line
    prompt: Prompt
    params: SamplingParams
    url: str | None = None  # None: a simple line
    model: str | None = None  # by the name the line gives it


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a line cannot be answered."""

    line: Line
    code: Code
    message: str


class _Bad(Exception):
    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


# --- lines ------------------------------------------------------------------------------------------------------


def numbered(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line := line.rstrip():
            yield number, line


def read_requests(
    file: Iterable[bytes], defaults: SamplingParams, is_wanted: Callable[[int], bool] = lambda number: True
) -> Iterator[BatchRequest | Refusal]:
    """What the lines of wanted numbers ask for, `defaults` holding for what they leave out.

    The others are read for their custom_ids alone: of several lines with the same, the first has it.
    """
    owners: dict[str, int] = {}
    for number, raw in numbered(file):
        line = Line(number)
        try:
            record = _json_object(raw)
            line = _line(number, record)
            url, fields = (None, record) if line.is_simple else _envelope(record)
            if not line.is_simple:
                assert isinstance(line.id, str)
                if (owner := owners.setdefault(line.id, number)) != number:
                    raise _Bad("duplicate_custom_id", f"custom_id {_shown(line.id)} is that of line {owner}: rename it")
            if is_wanted(number):
                yield _request(line, fields, url, defaults)
        except _Bad as bad:
            if is_wanted(number):
                yield Refusal(line, bad.code, str(bad))


def _json_object(raw: bytes) -> dict[str, Any]:
    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        record = json.loads(raw.decode(), parse_constant=constant)
        if b"\\u" in raw:
            json.dumps(record, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise _Bad("invalid_line", f"not JSON ({error.msg} at character {error.pos + 1}): mend it") from None
    except UnicodeDecodeError as error:
        raise _Bad("invalid_line", f"not UTF-8 (byte {error.start + 1}): convert it") from None
    except UnicodeEncodeError:
        raise _Bad("invalid_line", "a \\u escape is half a character: give both surrogates") from None
    except RecursionError:
        raise _Bad("invalid_line", "not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise _Bad("invalid_line", f"not JSON that can be read ({error}): mend it") from None
    if not isinstance(record, dict):
        raise _Bad("invalid_line", f"{_kind(record)}, not an object: give one with a prompt, messages or a body")
    return record


_ENVELOPE = ("custom_id", "method", "url", "body")


def _line(number: int, record: Mapping[str, Any]) -> Line:
    """The form and the id of a line, whatever else may be wrong with it."""
    is_simple = not any(name in record for name in _ENVELOPE)
    id = record.get("id" if is_simple else "custom_id")
    given = isinstance(id, str) or (is_simple and isinstance(id, int) and not isinstance(id, bool))
    return Line(number, is_simple, id if given else None)


def _envelope(record: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The url and body of a line of OpenAI's form."""
    for name in record:
        if name not in _ENVELOPE:
            raise _Bad("unknown_field", f"{_shown(name)} is unknown: give {', '.join(_ENVELOPE)} alone")
    for name in _ENVELOPE:
        if name not in record:
            raise _Bad("invalid_value", f"{name} is missing: give {', '.join(_ENVELOPE)}")
    if not isinstance(record["custom_id"], str) or not record["custom_id"]:
        raise _Bad("invalid_value", f"custom_id is {_shown(record['custom_id'])}: give a text")
    if record["method"] != "POST":
        raise _Bad("unsupported_value", f'method is {_shown(record["method"])}: give "POST"')
    if record["url"] not in (CHAT, TEXT):
        raise _Bad("unsupported_value", f"url is {_shown(record['url'])}: give {CHAT} or {TEXT}")
    if not isinstance(record["body"], dict):
        raise _Bad("invalid_value", f"body is {_kind(record['body'])}: give an object")
    return record["url"], record["body"]


# --- fields -----------------------------------------------------------------------------------------------------


def _request(line: Line, fields: Mapping[str, Any], url: str | None, defaults: SamplingParams) -> BatchRequest:
    """What the fields of a body (`url`) or of a simple line ask for."""
    prompts = {CHAT: ("messages",), TEXT: ("prompt",), None: ("messages", "prompt")}[url]
    where = "" if url is None else "body."
    given: dict[str, Any] = {}
    for field, value in fields.items():
        name = where + field
        if field in prompts:
            continue
        if field == "id" and url is None:
            if value is not None and line.id is None:
                raise _Bad("invalid_value", f"id is {_shown(value)}: give a text or a whole number")
        elif field in _SAMPLING:
            if value is None:
                continue
            if field == "logprobs" and url == TEXT and value == 0:  # OpenAI's number of alternatives
                value = value is not False
            param, check = _SAMPLING[field]
            value = check(name, value)
            if given.setdefault(param, value) != value:
                raise _Bad("invalid_value", f"{name} is {value}, but another field says {given[param]}: leave one out")
        elif field in _NEUTRAL:
            if value is not None and value not in _NEUTRAL[field]:
                neutral = " or ".join(map(json.dumps, _NEUTRAL[field])) or "null"
                raise _Bad("unsupported_value", f"{name} is {_shown(value)}: only {neutral} is supported; leave it out")
        elif field in ("model", "user"):
            if not isinstance(value, str | None):
                raise _Bad("invalid_value", f"{name} is {_shown(value)}: give a text")
        elif field != "metadata":
            raise _Bad("unknown_field", f"{_shown(name)} is unknown: leave it out")
    try:
        params = dataclasses.replace(defaults, **given)
    except UserError as error:
        raise _Bad("invalid_value", where + str(error)) from None
    return BatchRequest(line, _prompt(fields, prompts, where), params, url, fields.get("model"))


def _prompt(fields: Mapping[str, Any], names: Sequence[str], where: str) -> Prompt:
    here = [name for name in names if fields.get(name) is not None]
    if len(here) != 1:
        what = " and ".join(where + name for name in here) or " or ".join(where + name for name in names)
        raise _Bad("invalid_value", f"{what} {'are both there: give one' if here else 'is missing: give it'}")
    name, value = where + here[0], fields[here[0]]
    if here[0] == "messages":
        return _messages(name, value)
    if isinstance(value, list) and value and all(map(_is_whole, value)):
        return value
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        raise _Bad("unsupported_value", f"{name} is a list of texts: give each a line of its own")
    if not isinstance(value, str) or not value:
        raise _Bad("invalid_prompt", f"{name} is {_shown(value)}: give a text that is not empty, or token ids")
    return value


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# What a message may have besides, empty: an assistant's message comes with these.
_MESSAGE_NEUTRAL = ("name", "refusal", "annotations", "audio", "tool_calls", "tool_call_id", "function_call")


def _messages(name: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _Bad("invalid_prompt", f"{name} is {_shown(value)}: give a list of at least one message")
    messages = []
    for i, message in enumerate(value):
        here = f"{name}[{i}]"
        if not isinstance(message, dict):
            raise _Bad("invalid_value", f"{here} is {_kind(message)}: give an object with a role and content")
        for field in message:
            if field in _MESSAGE_NEUTRAL:
                if message[field] not in (None, [], ""):
                    raise _Bad("unsupported_value", f"{here}.{field} is not supported: leave it out")
            elif field not in ("role", "content"):
                raise _Bad("unknown_field", f"{_shown(f'{here}.{field}')} is unknown: leave it out")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in _ROLES:
            raise _Bad("invalid_value", f"{here}.role is {_shown(role)}: give one of {', '.join(_ROLES)}")
        if isinstance(content, list):
            content = "".join(_part(f"{here}.content[{k}]", part) for k, part in enumerate(content))
        if not isinstance(content, str):
            raise _Bad("invalid_value", f"{here}.content is {_shown(content)}: give a text")
        messages.append({"role": _ROLES[role], "content": content})
    if not any(message["content"] for message in messages):
        raise _Bad("invalid_prompt", f"{name} is without any text: give some")
    return messages


def _part(name: str, part: Any) -> str:
    """The text of a part of a message."""
    if not isinstance(part, dict) or part.get("type") != "text":
        raise _Bad("unsupported_value", f'{name} is {_shown(part)}: give {{"type": "text", "text": ...}}')
    for field in part:
        if field not in ("type", "text"):
            raise _Bad("unknown_field", f"{_shown(f'{name}.{field}')} is unknown: leave it out")
    if not isinstance(part.get("text"), str):
        raise _Bad("invalid_value", f"{name}.text is {_shown(part.get('text'))}: give a text")
    return str(part["text"])


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise _Bad("invalid_value", f"{name} is {_shown(value)}: give a number")


def _whole(least: int, most: int = 2**31 - 1) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if _is_whole(value) and least <= value <= most:
            return int(value)
        raise _Bad("invalid_value", f"{name} is {_shown(value)}: give a whole number from {least} to {most}")

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Bad("invalid_value", f"{name} is {_shown(value)}: give true or false")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise _Bad("invalid_value", f"{name} is {_shown(value)}: give a text or a list of texts, none of them empty")
    return tuple(texts)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(_is_whole(token) and 0 <= token < 2**31 for token in value):
        raise _Bad("invalid_value", f"{name} is {_shown(value)}: give a list of token ids")
    return tuple(value)


_SAMPLING: dict[str, tuple[str, Callable[[str, Any], Any]]] = {  # field: SamplingParams' name for it, its check
    "temperature": ("temperature", _number),
    "top_k": ("top_k", _whole(-1)),
    "top_p": ("top_p", _number),
    "min_p": ("min_p", _number),
    "seed": ("seed", _whole(0, MAX_SEED)),
    "max_tokens": ("max_new_tokens", _whole(1)),
    "max_completion_tokens": ("max_new_tokens", _whole(1)),
    "max_new_tokens": ("max_new_tokens", _whole(1)),
    "stop": ("stop", _texts),
    "stop_token_ids": ("stop_token_ids", _token_ids),
    "ignore_eos": ("ignore_eos", _flag),
    "n": ("n", _whole(1, MOST_SAMPLES)),
    "logprobs": ("logprobs", _flag),
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # field: the values, besides null, that change nothing
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "store": (False,),
    "stream": (False,),
    "stream_options": (),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
}


def _shown(value: Any) -> str:
    """A value as JSON, shortened: it stands in a message of one line."""
    if isinstance(value, (list, dict)) and len(value) > 20:
        return _kind(value)
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return _kind(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# --- records ----------------------------------------------------------------------------------------------------


def refusal_record(refusal: Refusal) -> dict[str, Any]:
    """The record of a line that cannot be answered."""
    line = refusal.line
    error = {"code": refusal.code, "message": f"line {line.number}: {refusal.message}"}
    if line.is_simple:
        return {"id": _id(line), "line": line.number, "error": error}
    return _openai_record(line, None, error, None)


def answer_record(
    request: BatchRequest, completions: Sequence[Completion], tokenizer: Any, target: str
) -> dict[str, Any]:
    """The record of a line and its n answers; `target` names the model where the line does not."""
    completions = sorted(completions, key=lambda completion: completion.sample)
    line = request.line
    statistics = _statistics(completions)
    if request.url is None:
        answers = [_simple_answer(completion) for completion in completions]
        return {
            "id": _id(line),
            "line": line.number,
            **(answers[0] if request.params.n == 1 else {"answers": answers}),
            "prompt_tokens": completions[0].prompt_tokens,
            "statistics": statistics,
            "error": None,
        }
    is_chat = request.url == CHAT
    made = sum(len(completion.tokens) for completion in completions)
    asked = completions[0].prompt_tokens
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-line-{line.number}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": request.model or target,
        "choices": [(_chat_choice if is_chat else _text_choice)(completion, tokenizer) for completion in completions],
        "usage": {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made},
    }
    response = {"status_code": 200, "request_id": f"line-{line.number}", "body": body}
    return _openai_record(line, response, None, statistics)


def _id(line: Line) -> str | int:
    return f"line-{line.number}" if line.id is None else line.id


def _openai_record(line: Line, response: Any, error: Any, statistics: Any) -> dict[str, Any]:
    return {
        "id": f"line-{line.number}",
        "custom_id": line.id,
        "line": line.number,
        "response": response,
        "error": error,
        "statistics": statistics,
    }


def _statistics(completions: Sequence[Completion]) -> dict[str, Any]:
    of = [completion.statistics for completion in completions]
    counts = Acceptance.total(of)
    return {
        "rounds": counts.rounds,
        "accepted_at": list(counts.accepted_at),
        "acceptance_length": round(counts.length, 4) if counts.rounds else None,
        "seconds": round(max(its.seconds for its in of), 4),
    }


def _simple_answer(completion: Completion) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "text": completion.text,
        "tokens": list(completion.tokens),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        answer["logprobs"] = _rounded(completion.logprobs)
    return answer


def _chat_choice(completion: Completion, tokenizer: Any) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        content = []
        pieces = [tokenizer.decode([token]) for token in completion.tokens]
        for piece, logprob in zip(pieces, _rounded(completion.logprobs), strict=True):
            is_whole = "\ufffd" not in piece  # else the token is part of a character, of which the text shows no bytes
            bytes_ = list(piece.encode()) if is_whole else None
            content.append({"token": piece, "logprob": logprob, "bytes": bytes_, "top_logprobs": []})
        logprobs = {"content": content, "refusal": None}
    message = {"role": "assistant", "content": completion.text, "refusal": None}
    return {"index": completion.sample, "message": message, "logprobs": logprobs, **_ending(completion)}


def _text_choice(completion: Completion, tokenizer: Any) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        stream, offsets = TextStream(tokenizer), []
        for token in completion.tokens:
            offsets.append(len(stream.text))
            stream.push(token)
        logprobs = {
            "tokens": [tokenizer.decode([token]) for token in completion.tokens],
            "token_logprobs": _rounded(completion.logprobs),
            "top_logprobs": None,
            "text_offset": offsets,
        }
    return {"index": completion.sample, "text": completion.text, "logprobs": logprobs, **_ending(completion)}


def _ending(completion: Completion) -> dict[str, Any]:
    return {
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "token_ids": list(completion.tokens),
    }


def _rounded(logprobs: Sequence[float]) -> list[float]:
    return [round(logprob, 6) for logprob in logprobs]


# --- the file of answers ----------------------------------------------------------------------------------------


class _Written(NamedTuple):
    line: int
    is_error: bool


class AnswerFile:
    """Appends records to a file of JSON lines and resumes where a killed run stopped.

    `done` holds the lines that are answered. On opening, a torn last line is cut off; a whole line that is no answer to
    one of the lines `numbers` raises UserError with file and line. For one process at a time, which is enforced.
    """

    def __init__(self, path: Path, numbers: Container[int]) -> None:
        self.done: set[int] = set()
        self.num_errors = 0
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  # closed by close()
        try:
            if is_new:
                sync(path.parent)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{path} is being written by another run: wait for its end") from error
            except OSError as error:  # a file system without locks
                log.warning("%s: cannot be locked (%s)", path, error.strerror)
            self._take_over(numbers)
        except BaseException:
            self._file.close()
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record and waits until it is on the disk."""
        written = _Written(record["line"], record["error"] is not None)
        assert written.line not in self.done
        self._write(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        self._add(written)

    def close(self) -> None:
        """Closes the file; what was appended is on the disk already."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_over(self, numbers: Container[int]) -> None:
        """Reads what earlier runs wrote."""
        end = 0
        with open(self._path, "rb") as file:
            for n, line in enumerate(file, 1):
                is_whole = line.endswith(b"\n")
                try:
                    written = _written(line)
                    if written.line not in numbers or written.line in self.done:
                        raise ValueError(f"line {written.line} is not to be answered here")
                except (ValueError, KeyError, TypeError) as error:
                    if not is_whole:
                        log.warning("%s: cut off a torn last line of %d bytes", self._path, len(line))
                        self._file.truncate(end)
                        os.fsync(self._file.fileno())
                        return
                    raise UserError(f"{self._path}:{n}: no answer of this batch ({error}): delete the line") from error
                self._add(written)
                if not is_whole:  # all but its newline
                    self._write(b"\n")
                    return
                end += len(line)

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())

    def _add(self, written: _Written) -> None:
        self.done.add(written.line)
        self.num_errors += written.is_error


def _written(line: bytes) -> _Written:
    record = json.loads(line)
    if not _is_whole(record["line"]):
        raise ValueError("its line is no number")
    return _Written(record["line"], record["error"] is not None)
