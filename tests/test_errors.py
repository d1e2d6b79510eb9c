"""Errors of users are one line of a terminal, whatever the values in them."""

from __future__ import annotations

import pytest

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.text import json_value, parse_json


def test_a_value_with_line_breaks_or_colours_is_escaped_and_a_long_one_is_cut_before_the_remedy():
    """Names in files and prompts come from anybody: one with a line break made a message of two lines."""
    assert str(UserError("no file 'a\nb\x1b[2J\ud800é': mend it")) == r"no file 'a\nb\x1b[2J\ud800é': mend it"
    long = str(UserError(f"token {'x' * 100_000}: take another"))
    assert len(long) < 5000 and long.startswith("token xxx") and long.endswith("xxx: take another")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000])
def test_json_that_python_cannot_read_is_a_value_error(text):
    """Python's parser raises RecursionError for what is nested deeply, which nobody had caught."""
    for read in (parse_json, json_value):
        with pytest.raises(ValueError):
            read(text.encode())
