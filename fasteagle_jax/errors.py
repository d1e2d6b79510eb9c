"""The one exception for mistakes that a user can make and mend."""


class UserError(ValueError):
    """A message of one line that names the value and the remedy; programs print it and exit with code 2."""
