"""Messages of a conversation in the shapes that they come in, and in the one that chat templates take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.text import check_text

Message = Mapping[str, str]  # {"role": "user" | "assistant" | "system", "content": ...}


class UnsupportedPart(UserError):
    """A part of a message's content that is no text, an image for one."""


def plain_messages(messages: Sequence[Any], name: str) -> list[Message]:
    """The messages with each one's content as a text; UserError with `name` and its number for one that has none."""
    plain: list[Message] = []
    for i, message in enumerate(messages):
        here = f"{name}: message {i}"
        if not isinstance(message, Mapping):
            raise UserError(f"{here} is {short(message)}: give an object with a role and content")
        if not isinstance(message.get("role"), str):
            raise UserError(f"{here} has the role {short(message.get('role'))}: give a text")
        plain.append({**message, "content": content_text(message.get("content"), f"{here}: its content")})
    return plain


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
