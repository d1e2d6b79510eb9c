"""Lines of a batch file as requests: OpenAI's batch format, or simple ones."""

from __future__ import annotations

import codecs
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

from fasteagle_jax.decoding.sampling_fields import FIELDS, RULE_FIELDS, SamplingField
from fasteagle_jax.decoding.state import MAX_LOGPROBS
from fasteagle_jax.engine.requests import RULES, Prompt, SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.text import check_json_texts
from fasteagle_jax.targets.messages import UnsupportedPart, content_text, tool_calls
from fasteagle_jax.targets.templates import PLAIN, ChatOptions

MOST_SAMPLES = 128  # n, as OpenAI's

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

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
    """Position of a request in its file, and the id that its record repeats."""

    number: int  # from 1; blank lines count
    is_simple: bool = False
    id: str | int | None = None  # its `custom_id` or `id`
    file: str = ""  # the file's name where there are several


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """A line as a request."""

    line: Line
    prompt: Prompt
    params: SamplingParams
    url: str | None = None  # None: a simple line
    model: str | None = None  # by the name the line gives it
    chat: ChatOptions = PLAIN  # of messages


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Error of a line that cannot be answered."""

    line: Line
    code: Code
    message: str


class _Bad(Exception):
    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


def numbered(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line := line.rstrip():
            yield number, line


def read_requests(
    file: Iterable[bytes],
    defaults: SamplingParams,
    is_wanted: Callable[[int], bool] = lambda number: True,
    chat: ChatOptions = PLAIN,
) -> Iterator[BatchRequest | Refusal]:
    """The requests of the lines of wanted numbers; `defaults` and `chat` are for fields that they leave out.

    The other lines are read for their custom_ids alone, of which each belongs to the first line that has it.
    """
    owners: dict[str, int] = {}
    for number, raw in numbered(file):
        custom_id = read_custom_id(raw)
        owner = number if custom_id is None else owners.setdefault(custom_id, number)
        if is_wanted(number):
            yield read_request(raw, number, defaults, chat, owner=None if owner == number else f"line {owner}")


def read_custom_id(raw: bytes) -> str | None:
    """The custom_id that a line of OpenAI's form owns if it is the first to have it; None for any other line."""
    try:
        record = _json_object(raw)
        line = _line(Line(0), record)
        if not line.is_simple:
            _envelope(record)
            assert isinstance(line.id, str)
            return line.id
    except _Bad:
        pass
    return None


def read_request(
    raw: bytes,
    number: int,
    defaults: SamplingParams,
    chat: ChatOptions = PLAIN,
    *,
    file: str = "",
    owner: str | None = None,
) -> BatchRequest | Refusal:
    """The request of one line; `owner` is the place of an earlier line that has its custom_id, if there is one."""
    line = Line(number, file=file)
    try:
        record = _json_object(raw)
        line = _line(line, record)
        url, fields = (None, record) if line.is_simple else _envelope(record)
        if owner is not None:
            raise _Bad("duplicate_custom_id", f"custom_id {_shown(line.id)} is that of {owner}: rename it")
        return _request(line, fields, url, defaults, chat)
    except _Bad as bad:
        return Refusal(line, bad.code, str(bad))


def _json_object(raw: bytes) -> dict[str, Any]:
    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        record = json.loads(raw.decode(), parse_constant=constant)
        if b"\\u" in raw:
            check_json_texts(record)
    except json.JSONDecodeError as error:
        raise _Bad("invalid_line", f"not JSON ({error.msg} at character {error.pos + 1}): mend it") from None
    except UnicodeDecodeError as error:
        raise _Bad("invalid_line", f"not UTF-8 (byte {error.start + 1}): convert it") from None
    except RecursionError:
        raise _Bad("invalid_line", "not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise _Bad("invalid_line", f"not JSON that can be read ({error}): mend it") from None
    if not isinstance(record, dict):
        raise _Bad("invalid_line", f"{_kind(record)}, not an object: give one with a prompt, messages or a body")
    return record


_ENVELOPE = ("custom_id", "method", "url", "body")


def _line(line: Line, record: Mapping[str, Any]) -> Line:
    """The line with its form and its id, whatever else may be wrong with it."""
    is_simple = not any(name in record for name in _ENVELOPE)
    id = record.get("id" if is_simple else "custom_id")
    given = isinstance(id, str) or (is_simple and isinstance(id, int) and not isinstance(id, bool))
    return dataclasses.replace(line, is_simple=is_simple, id=id if given else None)


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


def _request(
    line: Line, fields: Mapping[str, Any], url: str | None, defaults: SamplingParams, chat: ChatOptions
) -> BatchRequest:
    """The request of the fields of a body (`url`) or of a simple line."""
    prompts = {CHAT: ("messages",), TEXT: ("prompt",), None: ("messages", "prompt")}[url]
    prefix = "" if url is None else "body."
    given: dict[str, Any] = {}
    of_chat: dict[str, Any] = {}
    for field, value in fields.items():
        name = prefix + field
        if field in prompts:
            continue
        if field == "id" and url is None:
            if value is not None and line.id is None:
                raise _Bad("invalid_value", f"id is {_shown(value)}: give a text or a whole number")
        elif field in _SAMPLING:
            if value is None:
                continue
            if field == "top_logprobs" and url == TEXT:
                raise _Bad("unknown_field", f"{name} is of {CHAT}: give the number as {prefix}logprobs")
            param, check = _SAMPLING[field]
            if field == "logprobs" and url != CHAT:
                check = _logprobs
            value = check(name, value)
            if given.setdefault(param, value) != value:
                raise _Bad("invalid_value", f"{name} is {value}, but another field says {given[param]}: leave one out")
        elif field in _CHAT:
            if value in (None, [], {}):
                continue
            if fields.get("messages") is None:
                raise _Bad("unsupported_value", f"{name} is of messages alone: leave it out")
            of_chat[field] = value
        elif field in _NEUTRAL:
            if value is not None and value not in _NEUTRAL[field]:
                neutral = " or ".join(map(json.dumps, _NEUTRAL[field])) or "null"
                raise _Bad("unsupported_value", f"{name} is {_shown(value)}: only {neutral} is supported; leave it out")
        elif field in ("model", "user"):
            if not isinstance(value, str | None):
                raise _Bad("invalid_value", f"{name} is {_shown(value)}: give a text")
        elif field != "metadata":
            known = ", ".join(field for field in _SAMPLING if field not in RULES)
            raise _Bad("unknown_field", f"{_shown(name)} is unknown: leave it out, or give {known}, or a rule")
    if given.get("logprobs", True) is not True:
        given.setdefault("top_logprobs", 0)  # the defaults' is of their own number
    try:
        params = dataclasses.replace(defaults, **given)
        chat = dataclasses.replace(chat, **of_chat)
    except UserError as error:
        raise _Bad("invalid_value", prefix + str(error)) from None
    return BatchRequest(line, _prompt(fields, prompts, prefix), params, url, fields.get("model"), chat)


def _prompt(fields: Mapping[str, Any], names: Sequence[str], prefix: str) -> Prompt:
    given = [name for name in names if fields.get(name) is not None]
    if len(given) != 1:
        what = " and ".join(prefix + name for name in given) or " or ".join(prefix + name for name in names)
        raise _Bad("invalid_value", f"{what} {'are both there: give one' if given else 'is missing: give it'}")
    name, value = prefix + given[0], fields[given[0]]
    if given[0] == "messages":
        return _messages(name, value)
    if isinstance(value, list) and value and all(map(is_whole, value)):
        return value
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        raise _Bad("unsupported_value", f"{name} is a list of texts: give each a line of its own")
    if not isinstance(value, str) or not value:
        raise _Bad("invalid_prompt", f"{name} is {_shown(value)}: give a text that is not empty, or token ids")
    return value


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

# What a message may have besides, empty: an assistant's message comes with these.
_MESSAGE_NEUTRAL = ("refusal", "annotations", "audio", "function_call")
_MESSAGE_TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning")


def _messages(name: str, value: Any) -> list[dict[str, Any]]:
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
            elif field in _MESSAGE_TEXTS:
                if not isinstance(message[field], str | None):
                    raise _Bad("invalid_value", f"{here}.{field} is {_shown(message[field])}: give a text")
            elif field not in ("role", "content", "tool_calls"):
                raise _Bad("unknown_field", f"{_shown(f'{here}.{field}')} is unknown: leave it out")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in _ROLES:
            raise _Bad("invalid_value", f"{here}.role is {_shown(role)}: give one of {', '.join(_ROLES)}")
        own: dict[str, Any] = {"role": _ROLES[role]}
        own |= {field: message[field] for field in _MESSAGE_TEXTS if message.get(field)}
        try:
            if calls := tool_calls(message.get("tool_calls"), f"{here}.tool_calls", _shown):
                own["tool_calls"] = calls
        except UserError as error:
            raise _Bad("invalid_value", str(error)) from None
        if content is not None or not (calls or own.get("reasoning_content")):
            own["content"] = _content(f"{here}.content", content)
        messages.append(own)
    if not any(message.get("content") for message in messages):
        raise _Bad("invalid_prompt", f"{name} is without any text: give some")
    return messages


def _content(name: str, content: Any) -> str:
    """The text of a message's content."""
    try:
        text = content_text(content, name, _shown)
    except UserError as error:
        raise _Bad("unsupported_value" if isinstance(error, UnsupportedPart) else "invalid_value", str(error)) from None
    for i, part in enumerate(content if isinstance(content, list) else ()):
        for field in part:
            if field not in ("type", "text"):
                raise _Bad("unknown_field", f"{_shown(f'{name}[{i}].{field}')} is unknown: leave it out")
    return text


def is_whole(value: Any) -> bool:
    """Whether a JSON value is an integer."""
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
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        if is_whole(whole) and least <= whole <= most:
            return int(whole)
        raise _Bad("invalid_value", f"{name} is {_shown(value)}: give a whole number from {least} to {most}")

    return check


def _sampling_value(row: SamplingField) -> Callable[[str, Any], float]:
    """A check of the type, and of the range if numbers are whole; SamplingParams checks the others' range."""
    return _number if row.python_type is float else _whole(int(min([row.least, *row.aliases])), int(row.most))


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Bad("invalid_value", f"{name} is {_shown(value)}: give true or false")
    return value


def _logprobs(name: str, value: Any) -> bool | int:
    """Whether log-probabilities are wanted, or the number of alternatives, as OpenAI's completions have it."""
    if isinstance(value, bool):
        return value
    try:
        return _whole(0, MAX_LOGPROBS)(name, value)
    except _Bad:
        message = f"{name} is {_shown(value)}: give true, false or a whole number up to {MAX_LOGPROBS}"
        raise _Bad("invalid_value", message) from None


def _biases(name: str, value: Any) -> dict[str, float]:
    """Numbers by token id; SamplingParams checks both."""
    if not isinstance(value, dict):
        raise _Bad("invalid_value", f"{name} is {_shown(value)}: give an object of numbers by token id")
    return {token: _number(f"{name}[{_shown(token)}]", bias) for token, bias in value.items()}


def _response_format(name: str, value: Any) -> dict[str, Any] | None:
    """OpenAI's response_format as structured_outputs; None for text."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "json_schema":
        named = value.get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else None
        if not isinstance(schema, dict):
            raise _Bad("invalid_value", f"{name}.json_schema.schema is {_shown(schema)}: give a JSON schema")
        return {"json": schema}
    if kind in ("json_object", "text"):
        return {"json_object": True} if kind == "json_object" else None
    raise _Bad("invalid_value", f"{name} is {_shown(value)}: give one of the type json_schema, json_object or text")


def _any(name: str, value: Any) -> Any:
    """A value that SamplingParams checks."""
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise _Bad("invalid_value", f"{name} is {_shown(value)}: give a text or a list of texts, none of them empty")
    return tuple(texts)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(is_whole(token) and 0 <= token < 2**31 for token in value):
        raise _Bad("invalid_value", f"{name} is {_shown(value)}: give a list of token ids")
    return tuple(value)


_SAMPLING: dict[str, tuple[str, Callable[[str, Any], Any]]] = {  # field: SamplingParams' name for it, its check
    **{name: (name, _sampling_value(row)) for name, row in (FIELDS | RULE_FIELDS).items()},
    "max_tokens": ("max_new_tokens", _whole(1)),
    "max_completion_tokens": ("max_new_tokens", _whole(1)),
    "max_new_tokens": ("max_new_tokens", _whole(1)),
    "stop": ("stop", _texts),
    "stop_token_ids": ("stop_token_ids", _token_ids),
    "ignore_eos": ("ignore_eos", _flag),
    "n": ("n", _whole(1, MOST_SAMPLES)),
    "logprobs": ("logprobs", _flag),
    "top_logprobs": ("top_logprobs", _whole(0, MAX_LOGPROBS)),
    "prompt_logprobs": ("prompt_logprobs", _whole(0, MAX_LOGPROBS)),
    "logit_bias": ("logit_bias", _biases),
    "allowed_token_ids": ("allowed_token_ids", _token_ids),
    "bad_words": ("bad_words", _texts),
    "structured_outputs": ("structured_outputs", _any),
    "response_format": ("structured_outputs", _response_format),
}

# Fields of ChatOptions, beside messages; vLLM's names, and OpenAI's for tools.
_CHAT = ("tools", "chat_template", "chat_template_kwargs", "date", "add_generation_prompt", "continue_final_message")

_NEUTRAL: dict[str, tuple[Any, ...]] = {  # field: the values, besides null, that change nothing
    "best_of": (1,),
    "echo": (False,),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "store": (False,),
    "stream": (False,),
    "stream_options": (),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
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
