from __future__ import annotations

import pytest

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.text import json_value
from fasteagle_jax.targets.messages import UnsupportedPart, content_text, plain_messages

HALF = "half \ud83d"


def test_content_is_a_text_or_the_texts_of_its_parts():
    assert content_text("Hi", "x") == content_text([{"type": "text", "text": "Hi"}], "x") == "Hi"
    assert content_text(({"type": "text", "text": "a "}, {"type": "text", "text": "b", "cache": 1}), "x") == "a b"
    assert content_text([], "x") == content_text("", "x") == ""


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "x is None: give a text, or a list of its parts"),
        (7, "x is 7: give a text"),
        ({"type": "text", "text": "a"}, "x is {'type': 'text', 'text': 'a'}: give a text"),
        (["a"], 'x[0] is \'a\': give {"type": "text"'),
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "b" * 99}], "x[1] is {'type': 'image_url'"),
        ([{"type": "text"}], "x[0].text is None: give a text"),
        ([{"type": "text", "text": HALF}], "x[0].text is no text (character 6 is half of one"),
        (HALF, "x is no text (character 6 is half of one"),
    ],
)
def test_other_content_is_one_line(content, says):
    with pytest.raises(UserError) as caught:
        content_text(content, "x")
    message = str(caught.value)
    assert message.startswith(says) and len(message) < 200 and message.isascii() and "\n" not in message
    assert isinstance(caught.value, UnsupportedPart) == ("[1]" in says or "[0] is" in says)


def test_messages_keep_all_but_the_shape_of_their_content():
    parts = [{"type": "text", "text": "Hi"}]
    given = [{"role": "user", "content": parts, "name": "me"}, {"role": "assistant", "content": "Yes."}]
    assert plain_messages(given, "p") == [{"role": "user", "content": "Hi", "name": "me"}, given[1]]
    assert given[0]["content"] is parts
    for wrong, says in (
        ("Hi", "p: message 1 is 'Hi'"),
        ({"content": "Hi"}, "p: message 1 has the role None"),
        ({"role": "user"}, "p: message 1: its content is None"),
    ):
        with pytest.raises(UserError, match=says):
            plain_messages([given[1], wrong], "p")


def test_json_with_half_a_character_is_none():
    assert json_value(b'["\\ud83d\\ude42", "\xed\x95\x9c"]') == ["\U0001f642", "\ud55c"]
    for raw in (b'{"a": ["\\ud83d"]}', b'{"\\ude42": 1}', b'"\xed\xa0\xbd"'):
        with pytest.raises(ValueError, match="half a character"):
            json_value(raw)
