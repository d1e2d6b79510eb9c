"""Text from outside: what is no text is found where it comes in, with its place."""

from __future__ import annotations

import json
from typing import Any

from fasteagle_jax.errors import UserError


def check_text(text: str, name: str) -> str:
    """The text; UserError with `name` for one with half a surrogate pair, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise UserError(f"{name} is no text (character {error.start + 1} is half of one, {half}): mend it") from None
    return text


def parse_json(raw: str | bytes) -> Any:
    """The value of a JSON document; ValueError, and no other exception, if it is none that can be read."""
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_value(raw: bytes) -> Any:
    """The value of a JSON document; ValueError if it is none, or has a text with half a surrogate pair."""
    value = parse_json(raw)
    if b"\\u" in raw or b"\xed" in raw:  # an escape, or what such a half looks like as bytes
        check_json_texts(value)
    return value


def check_json_texts(value: Any) -> None:
    """Raises ValueError if any text in a JSON value has half a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a \\u escape is half a character: give both surrogates") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
