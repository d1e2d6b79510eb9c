"""Scalars of an HLO program that its constants decide, a loop's counter for one."""

from __future__ import annotations

import re
from typing import Any

from fasteagle_jax.compiling.hlo_parser import Instruction, Program

# A computation's argument where it is known: an int, a list of these for a tuple, None for anything else.
Value = Any


class Scalars:
    """The scalars of one computation that follow from constants and known arguments."""

    def __init__(self, program: Program, body: dict[str, Instruction], arguments: dict[int, Value]):
        self.program = program
        self.body = body
        self.arguments = arguments
        self.known: dict[str, Value] = {}

    def value(self, name: str) -> Value:
        """See _Counter.value."""
        if name not in self.known:
            self.known[name] = None  # while it is being computed
            self.known[name] = self._compute(self.body[name])
        return self.known[name]

    def _compute(self, i: Instruction) -> Value:
        if i.opcode == "parameter":
            return self.arguments.get(int(i.inside))
        if i.opcode == "tuple":
            return [self.value(name) for name in i.operands]
        if i.opcode == "get-tuple-element":
            whole = self.value(i.operands[0])
            return whole[i.part] if isinstance(whole, list) else None
        if i.opcode in ("opt-barrier", "optimization-barrier"):
            return self.value(i.operands[0])
        if i.is_tuple or len(i.shape) != 1 or i.shape[0].size != 1:
            return None
        if i.opcode == "constant":
            return _literal(i.inside)
        if i.opcode in ("copy", "bitcast", "reshape", "convert", "copy-done"):
            return self.value(i.operands[0])
        if i.opcode in ("fusion", "call"):
            inner = self.program.computations[i.called("calls") or i.called("to_apply")]
            arguments = {n: self.value(name) for n, name in enumerate(i.operands)}
            return Scalars(self.program, inner, arguments).value(next(r.name for r in inner.values() if r.is_root))
        values = [self.value(name) for name in i.operands]
        if any(not isinstance(v, int) for v in values):
            return None
        return _operate(i, values)


def _literal(text: str) -> int | None:
    text = text.strip().strip("{} ")
    if text in ("true", "false"):
        return int(text == "true")
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _operate(i: Instruction, v: list[int]) -> int | None:
    if i.opcode == "compare":
        direction = re.search(r"direction=(\w+)", i.attributes)
        a, b = v
        return int({"LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b, "EQ": a == b, "NE": a != b}[direction[1]])  # type: ignore[index]
    if i.opcode == "select":
        return v[1] if v[0] else v[2]
    if i.opcode == "not" and i.shape[0].dtype == "pred":
        return int(not v[0])
    simple = {
        "add": lambda: v[0] + v[1],
        "subtract": lambda: v[0] - v[1],
        "multiply": lambda: v[0] * v[1],
        "maximum": lambda: max(v),
        "minimum": lambda: min(v),
        "and": lambda: v[0] & v[1],
        "or": lambda: v[0] | v[1],
        "negate": lambda: -v[0],
    }
    return simple[i.opcode]() if i.opcode in simple else None
