"""The one exception for mistakes that a user can make and mend."""

_LONGEST, _END = 4000, 800  # characters of a message; of its end, which has the remedy


class UserError(ValueError):
    """A message of one line that names the value and the remedy; programs print it and exit with code 2.

    Values come from outside: control characters, line breaks among them, are escaped, and of a message of more than
    4,000 characters the middle is left out.
    """

    def __init__(self, message: str) -> None:
        text = str(message)
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST - _END]} ... ({len(text)} characters) ... {text[-_END:]}"
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))
