"""Messages of a conversation in the shapes that they come in, and in the one that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.text import check_text, parse_json

# {"role": "user" | "assistant" | "system" | "tool", "content": a text}. An assistant's may have "reasoning_content" and
# "tool_calls", and then no content; a tool's "tool_call_id" and "name".
Message = Mapping[str, Any]
TEXTS = ("reasoning_content", "reasoning", "thinking", "name", "tool_call_id")  # fields that are texts, if there


class UnsupportedPart(UserError):
    """A part of a message's content that is no text, an image for one."""


def plain_messages(messages: Sequence[Any], name: str) -> list[Message]:
    """The messages as chat templates take them; UserError with `name` and the number of one that is none.

    Content is a text. Only an assistant that calls tools or thinks may have none. Arguments of calls are objects, also
    if they are given as OpenAI gives them, as a text of JSON.
    """
    plain: list[Message] = []
    for i, message in enumerate(messages):
        here = f"{name}: message {i}"
        if not isinstance(message, Mapping):
            raise UserError(f"{here} is {short(message)}: give an object with a role and content")
        if not isinstance(message.get("role"), str):
            raise UserError(f"{here} has the role {short(message.get('role'))}: give a text")
        own = {**message}
        for field in TEXTS:
            if not isinstance(value := own.get(field), str | None):
                raise UserError(f"{here}: its {field} is {short(value)}: give a text")
            if value is None:
                own.pop(field, None)
            else:
                check_text(value, f"{here}: its {field}")
        calls = tool_calls(own.pop("tool_calls", None), f"{here}: its tool_calls")
        if calls:
            own["tool_calls"] = calls
        if own.get("content") is None and (calls or own.get("reasoning_content")):
            own.pop("content", None)
        else:
            own["content"] = content_text(message.get("content"), f"{here}: its content")
        plain.append(own)
    return plain


def tool_calls(calls: Any, name: str, shown: Callable[[Any], str] | None = None) -> list[dict[str, Any]]:
    """An assistant's calls of tools, each {"function": {"name", "arguments"}} and more; none of None.

    Arguments are an object, or its text as JSON, which becomes one. UserError with `name` for anything else.
    """
    shown = shown or short
    if calls is None:
        return []
    if not isinstance(calls, list | tuple):
        raise UserError(f"{name} is {shown(calls)}: give a list of calls")
    plain = []
    for i, call in enumerate(calls):
        here = f"{name}[{i}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f'{here} is {shown(call)}: give {{"function": {{"name": ..., "arguments": {{...}}}}}}')
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = parse_json(check_text(arguments, f"{here}: its arguments")) if arguments.strip() else {}
            except ValueError as error:
                raise UserError(f"{here}: its arguments are not JSON ({error}): give an object") from None
        if not isinstance(arguments, Mapping | None):
            raise UserError(f"{here}: its arguments are {shown(arguments)}: give an object")
        own = {**function, "arguments": {} if arguments is None else arguments}
        plain.append({**call, "function": own} if "function" in call else own)
    return plain


def plain_tools(tools: Any, name: str) -> list[dict[str, Any]]:
    """Tools that a conversation may use, each {"type": "function", "function": {"name", ...}} or the function alone.

    UserError with `name` for anything else.
    """
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise UserError(f"{name} is {short(tools)}: give a list of tools")
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(
                f'{name}[{i}] is {short(tool)}: give {{"type": "function", "function": {{"name": ..., ...}}}}'
            )
        try:
            json.dumps(tool, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{name}[{i}] holds what JSON does not ({type(error).__name__}): give plain values"
            ) from None
    return [dict(tool) for tool in tools]


def content_text(content: Any, name: str, shown: Callable[[Any], str] | None = None) -> str:
    """The text of a message's content, which is a text or a list of parts {"type": "text", "text": ...}.

    UserError with `name` for anything else, UnsupportedPart for a part of another type; `shown` spells values.
    """
    shown = shown or short
    if isinstance(content, str):
        return check_text(content, name)
    if not isinstance(content, list | tuple):
        raise UserError(f"{name} is {shown(content)}: give a text, or a list of its parts")
    texts = []
    for i, part in enumerate(content):
        here = f"{name}[{i}]"
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise UnsupportedPart(f'{here} is {shown(part)}: give {{"type": "text", "text": ...}}')
        if not isinstance(part.get("text"), str):
            raise UserError(f"{here}.text is {shown(part.get('text'))}: give a text")
        texts.append(check_text(part["text"], f"{here}.text"))
    return "".join(texts)


def short(value: Any) -> str:
    """A value's repr, shortened: it stands in a message of one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
