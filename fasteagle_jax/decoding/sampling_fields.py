"""The tables of sampling fields and of the rules that are one number.

Each entry becomes a field of `engine.requests.SamplingParams` and of a batch file's lines, a command-line option and an
array: of FIELDS one of `decoding.sampling.Sampling`, which `sampling.choose` implements, of RULE_FIELDS one of
`decoding.rules.Rules`, which `rules.apply_rules` does. Importing this module does not import JAX.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from fasteagle_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplingField:
    """An entry of the table: a number that every request has."""

    name: str  # also OpenAI's; with dashes, the option's
    default: float  # of a request
    dtype: str  # of the device's array
    least: float
    most: float
    accepts: str  # its values, in words for the error
    metavar: str
    help: str  # of the option
    excludes_least: bool = False
    aliases: Mapping[float, float] = dataclasses.field(default_factory=dict)  # other values, and what they mean
    zero_below: float = 0.0  # values from 0 to this one mean 0

    @property
    def python_type(self) -> type[int] | type[float]:
        """The type of a value in Python."""
        return float if self.dtype.startswith("float") else int

    @property
    def option(self) -> str:
        """The option of the command line."""
        return "--" + self.name.replace("_", "-")

    def meaning(self, value: float) -> float:
        """The value of the field that a given one stands for; raises UserError for one that it cannot have."""
        value = self.aliases.get(value, value)
        self.check(value)
        return self.python_type(value) if value >= self.zero_below else self.python_type(0)

    def check(self, value: float) -> None:
        """Raises UserError for a value that the field cannot have."""
        in_range = self.least <= value <= self.most and not (self.excludes_least and value == self.least)
        if not in_range or math.isinf(value) or (self.python_type is int and value != int(value)):
            raise UserError(f"{self.name} is {value}: it must be {self.accepts}")


MAX_SEED = 2**32 - 1

_TOP_K = "keep the K most probable tokens; 0 for all"
_TOP_P = "then keep P of the mass; 1 for all"
_MIN_P = "then keep tokens of at least P times the most probable one's probability; 0 for all"

_ENTRIES = (
    # Below 1e-5, vLLM's bound, the token is the greedy one but for rounding, which divides two logits that differ in
    # their last bit into one, and at last makes all infinite. Above 1e30 the temperature itself nears float32's end.
    SamplingField(
        "temperature", 1.0, "float32", 0, 1e30, "0 or more, at most 1e30", "X", "0 is greedy", zero_below=1e-5
    ),
    SamplingField("top_k", 0, "int32", 0, 2**31 - 1, "a whole number, 0 for all", "K", _TOP_K, aliases={-1: 0}),
    SamplingField("top_p", 1.0, "float32", 0, 1, "above 0 and at most 1", "P", _TOP_P, excludes_least=True),
    SamplingField("min_p", 0.0, "float32", 0, 1, "0 to 1", "P", _MIN_P),
    SamplingField("seed", 0, "uint32", 0, MAX_SEED, f"0 to {MAX_SEED}", "N", "another seed, other samples (default 0)"),
)

FIELDS = {field.name: field for field in _ENTRIES}

_PENALTY = "-2 to 2"  # OpenAI's range
_RULES = (
    SamplingField("min_tokens", 0, "int32", 0, 2**31 - 1, "a whole number", "T", "no end before T tokens"),
    SamplingField(
        "repetition_penalty",
        1.0,
        "float32",
        0.01,
        100,
        "0.01 to 100",
        "X",
        "divide positive logits of tokens in prompt and answer by X, multiply negative ones; 1 for none",
    ),
    SamplingField(
        "presence_penalty", 0.0, "float32", -2, 2, _PENALTY, "X", "subtract X from the logits of tokens in the answer"
    ),
    SamplingField(
        "frequency_penalty", 0.0, "float32", -2, 2, _PENALTY, "X", "subtract X for each time a token is in the answer"
    ),
)

RULE_FIELDS = {field.name: field for field in _RULES}


def from_options(args: Any) -> dict[str, Any]:
    """The sampling fields' values in a program's parsed arguments."""
    return {name: getattr(args, name) for name in FIELDS}


def recorded(values: Mapping[str, Any], always: Collection[str]) -> dict[str, Any]:
    """The values that a manifest records: the fields in `always`, and others that are not at their default.

    So a new field does not change the manifests of older runs.
    """
    return {name: value for name, value in values.items() if name in always or value != FIELDS[name].default}
