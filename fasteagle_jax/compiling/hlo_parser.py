"""The text of a compiled program's HLO, read into instructions and arrays as laid out."""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class Array(NamedTuple):
    """An array's shape as laid out."""

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tile: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        """Elements, padding aside."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes as laid out, the minor dimensions padded to whole tiles."""
        major_to_minor = [self.dims[i] for i in reversed(self.minor_to_major)] or list(self.dims)
        for i in range(1, min(len(self.tile), len(major_to_minor)) + 1):
            major_to_minor[-i] = -(-major_to_minor[-i] // self.tile[-i]) * self.tile[-i]
        return math.prod(major_to_minor) * bits(self.dtype) / 8


class Instruction(NamedTuple):
    """An instruction: one line of a computation."""

    name: str
    shape: tuple[Array, ...]  # of one array, or of all of a tuple's, flat
    is_tuple: bool
    opcode: str
    operands: tuple[str, ...]
    inside: str  # the brackets' text: a constant's value, a parameter's number
    attributes: str
    is_root: bool

    @property
    def where(self) -> str:
        """The operation's name in the source program."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def part(self) -> int:
        """The index of a get-tuple-element."""
        match = re.search(r"\bindex=(\d+)", self.attributes)
        assert match, self.attributes
        return int(match[1])

    def called(self, name: str) -> str:
        """The computation that an attribute such as `body` names."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else ""


class Program(NamedTuple):
    """Computations by name, each its instructions by name, in order."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def root(self, name: str) -> Instruction:
        """A computation's last instruction."""
        return next(i for i in self.computations[name].values() if i.is_root)


_ENDS = re.compile(r"\}(,|$)")  # a computation; one for another kind of core says so here

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a shape as HLO spells it, those of a tuple in their order."""
    return tuple(_array(match) for match in _ARRAY.finditer(text))


def _array(match: re.Match[str]) -> Array:
    dtype, dims, layout = match[1], match[2], match[3] or ""
    sizes = tuple(int(d.strip().lstrip("<=")) for d in dims.split(",") if d.strip())
    order, _, details = layout.partition(":")
    minor_to_major = tuple(int(i) for i in order.split(",") if i.strip().isdigit())
    tile = re.search(r"T\(([\d,]+)\)", details)
    space = re.search(r"S\((\d+)\)", details)
    return Array(
        dtype,
        sizes,
        minor_to_major,
        tuple(int(t) for t in tile[1].split(",")) if tile else (),
        int(space[1]) if space else 0,
    )


def bits(dtype: str) -> int:
    """Bits of an element of an HLO dtype."""
    if dtype == "pred":
        return 8
    if dtype in ("token", "opaque"):
        return 0
    match = re.match(r"[a-z]+(\d+)", dtype)
    return int(match[1]) if match else 0


def parse(text: str) -> Program:
    """The computations of a compiled program, given `jax.stages.Compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in _whole_lines(text):
        if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            current = computations.setdefault(name, {})
            if line.startswith("ENTRY "):
                entry = name
        elif _ENDS.match(line):
            current = None
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    return Program(computations, entry)


def _whole_lines(text: str) -> list[str]:
    """The text's lines; those that a kernel's metadata breaks are joined."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if inside and not _ENDS.match(line) and not line.startswith("  "):
            lines[-1] += line
            continue
        inside = not _ENDS.match(line) and (inside or (line.startswith(("%", "ENTRY ")) and line.endswith("{")))
        lines.append(line)
    return lines


def _instruction(line: str) -> Instruction:
    line = re.sub(r"/\*index=\d+\*/", "", line.strip())
    is_root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close]
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inside))
    attributes = rest[close + 1 :]
    return Instruction(
        name.lstrip("%"), arrays(shape), shape.startswith("("), opcode, operands, inside, attributes, is_root
    )


def _closing(text: str, start: int) -> int:
    """The index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"unbalanced brackets: {text[:80]}")
