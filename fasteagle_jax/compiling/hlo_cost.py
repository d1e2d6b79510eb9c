"""The cost of a compiled program, read from its optimised HLO: bytes of HBM, operations, collectives.

XLA's own `cost_analysis` counts the body of a loop once. Here a loop counts as often as it runs, which its own counter
says: the scalars that its condition reads are computed from the program's constants. What data alone can say (how many
rounds until a text ends) counts once, and is counted in `Cost.unknown_loops`.

Bytes are those of arrays as laid out, tiles' padding included, that an operation outside of a fusion reads or writes in
HBM; what stays in a faster memory on the chip costs nothing. A slice of a large array costs the slice, a write in place
what is written. All numbers are of one device.

A *kernel* is such an operation as well, each time that it runs: a fusion, product, custom call, copy, sort, exchange.
None are what only renames arrays, copies that run beside the kernels (the -start of a copy or slice), and operations
between single elements outside of fusions, loop counters above all, which a TPU's scalar unit does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping
from typing import Literal

import numpy as np

from fasteagle_jax.compiling.hlo_parser import Array, Instruction, Program, parse
from fasteagle_jax.compiling.hlo_scalars import Scalars, Value

Branch = Literal["least", "most"]

HBM = (0,)  # memory spaces of a layout, S(n): 0 is HBM (or a GPU's or CPU's memory), others are on the chip or the host

MAX_ITERATIONS = 1_000_000  # of a loop that is run for its counter alone

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Number and size of one kind of exchange between devices."""

    number: float = 0  # how often
    bytes: float = 0  # of the larger of what goes in and what comes out, of all of them
    sent: float = 0  # bytes that a device sends, at the least, on a ring
    steps: float = 0  # neighbours that one message passes after another, on a ring that goes both ways


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes, operations and exchanges of a program on one device."""

    bytes: float = 0  # read from and written to HBM
    product_flops: float = 0  # of matrix products and convolutions: 2 for a multiplication and an addition
    other_flops: float = 0  # of arithmetic between elements and of reductions; some products end up here
    collectives: dict[str, Collectives] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0  # loops in the program whose iterations only data can tell, counted as one
    host_calls: int = 0  # callbacks, infeeds and transfers to the host in the program
    kernels: float = 0  # that a device launches

    @property
    def flops(self) -> float:
        """FLOPs of all kinds."""
        return self.product_flops + self.other_flops

    def __add__(self, other: Cost) -> Cost:
        kinds = {*self.collectives, *other.collectives}
        none = Collectives()
        return Cost(
            self.bytes + other.bytes,
            self.product_flops + other.product_flops,
            self.other_flops + other.other_flops,
            {
                kind: _added(self.collectives.get(kind, none), other.collectives.get(kind, none))
                for kind in sorted(kinds)
            },
            self.unknown_loops + other.unknown_loops,
            self.host_calls + other.host_calls,
            self.kernels + other.kernels,
        )

    def times(self, iterations: float) -> Cost:
        """The cost of that many iterations of a loop; counts of places in the program stay."""
        scaled = {
            kind: Collectives(*(iterations * value for value in dataclasses.astuple(own)))
            for kind, own in self.collectives.items()
        }
        return dataclasses.replace(
            self,
            bytes=iterations * self.bytes,
            product_flops=iterations * self.product_flops,
            other_flops=iterations * self.other_flops,
            collectives=scaled,
            kernels=iterations * self.kernels,
        )


def _added(a: Collectives, b: Collectives) -> Collectives:
    return Collectives(*(x + y for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)))


def cost(
    text: str,
    branch: Branch = "most",
    expected: Mapping[str, float] | None = None,
    shares: Mapping[str, float] | None = None,
) -> Cost:
    """The Cost of a compiled program, given `jax.stages.Compiled.as_text()`.

    `branch` says which branch of a conditional runs: the one that reads and writes least (a decode that is greedy), or
    most (a train step that is applied). `expected` has iterations of loops that only data can tell, by the
    `jax.named_scope` around them, and `shares`, likewise, how often a conditional of two is true.
    """
    program = parse(text)
    return _Counter(program, branch, expected, shares).computation(program.entry, {})


_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "optimization-barrier", "add-dependency", "domain",
}  # fmt: skip

_ELEMENTWISE = {
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "exponential", "exponential-minus-one",
    "log", "log-plus-one", "logistic", "tanh", "rsqrt", "sqrt", "cosine", "sine", "negate", "remainder", "erf", "atan2",
}  # fmt: skip

_SLICES = ("dynamic-slice", "slice", "gather")

_BESIDE_KERNELS = ("copy-start", "slice-start", "dynamic-slice-start")  # by DMA

_NO_WORK = ("AllocateBuffer", "ConcatBitcast", "Sharding", "AssumeGatherIndicesInBound")  # custom calls

_ON_HOST = re.compile(r"callback|infeed|outfeed|MoveToHost|MoveToDevice", re.IGNORECASE)


class _Counter:
    def __init__(
        self,
        program: Program,
        branch: Branch,
        expected: Mapping[str, float] | None = None,
        shares: Mapping[str, float] | None = None,
    ):
        self.program = program
        self.branch = branch
        self.expected, self.shares = expected or {}, shares or {}

    def computation(self, name: str, arguments: dict[int, Value]) -> Cost:
        """The cost of running a computation once, outside of fusions; `arguments` are those that are known."""
        body = self.program.computations[name]
        total = Cost()
        channels: set[str] = set()
        for instruction in body.values():
            total += self.instruction(instruction, body, arguments, channels)
        return total

    def instruction(
        self, i: Instruction, body: dict[str, Instruction], arguments: dict[int, Value], channels: set[str]
    ) -> Cost:
        if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")):
            return Cost()
        if i.opcode == "while":
            return self.loop(i, body, arguments)
        if i.opcode == "conditional":
            return self.conditional(i, body, arguments)
        if i.opcode in ("call", "async-start"):
            inner = i.called("to_apply") or i.called("calls")
            values = {n: self.value(operand, body, arguments) for n, operand in enumerate(i.operands)}
            if self.program.root(inner).opcode != "custom-call":
                return self.computation(inner, values)
        own = Cost(self.bytes(i, body), host_calls=bool(_is_on_host(i)), kernels=self.is_kernel(i, body))
        return own + self.arithmetic(i, body, channels)

    def is_kernel(self, i: Instruction, body: dict[str, Instruction]) -> bool:
        """Whether a device launches a kernel for an instruction outside of fusions."""
        if i.opcode in _BESIDE_KERNELS:
            return False
        if i.opcode == "fusion":
            root = self.program.root(i.called("calls"))
            # The end of an exchange that overlaps other fusions is a wait for its beginning.
            return root.opcode != "custom-call" or not _target(root).endswith("Done")
        if i.opcode == "custom-call":
            return _target(i) not in _NO_WORK
        return any(a.size > 1 for arrays in (i.shape, *(body[name].shape for name in i.operands)) for a in arrays)

    def conditional(self, i: Instruction, body: dict[str, Instruction], arguments: dict[int, Value]) -> Cost:
        listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
        names = (
            re.findall(r"%([\w.\-]+)", listed[1])
            if listed
            else [i.called("true_computation"), i.called("false_computation")]
        )
        share = _of_scope(i, self.shares)
        costs = []
        for name, operand in zip(names, i.operands[1:], strict=True):
            costs.append(self.computation(name, {0: self.value(operand, body, arguments)}))
        if share is not None:
            untrue, true = costs if listed else costs[::-1]
            return true.times(share) + untrue.times(1 - share)
        pick = min if self.branch == "least" else max
        return pick(costs, key=lambda c: (c.bytes, c.flops))

    def loop(self, i: Instruction, body: dict[str, Instruction], arguments: dict[int, Value]) -> Cost:
        start = self.value(i.operands[0], body, arguments)
        known = self.iterations(i, start)
        iterations = _of_scope(i, self.expected) if known is None else known
        carried = self.carried(i, start)
        if iterations is None:
            return self.computation(i.called("body"), {0: carried}) + Cost(unknown_loops=1)
        if iterations == 0:
            return Cost()
        return self.computation(i.called("body"), {0: carried}).times(iterations)

    # --- scalars: what a loop's counter will be -----------------------------------------------------------------

    def value(self, name: str, body: dict[str, Instruction], arguments: dict[int, Value]) -> Value:
        """An instruction's value if constants decide it: an int, a list of these for a tuple, or None."""
        return Scalars(self.program, body, arguments).value(name)

    def iterations(self, i: Instruction, start: Value) -> int | None:
        """The number of iterations of a loop."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', i.attributes)
        if known:
            return int(known[1])
        if not isinstance(start, list):
            return None
        condition, body = i.called("condition"), i.called("body")
        of_condition, of_body = self.program.computations[condition], self.program.computations[body]
        root = self.program.root(body)
        needed = self.read_by(condition, body)
        now: list[Value] = list(start)
        for turn in range(MAX_ITERATIONS):
            goes_on = self.value(self.program.root(condition).name, of_condition, {0: now})
            if goes_on is None:
                return None
            if not goes_on:
                return turn
            scalars = Scalars(self.program, of_body, {0: now})
            now = [scalars.value(name) if n in needed else None for n, name in enumerate(_tuple_parts(root, of_body))]
        return None

    def read_by(self, condition: str, body: str) -> set[int]:
        """The entries of a loop's tuple on which its condition depends, directly or through others."""
        needed = {i.part for i in self.program.computations[condition].values() if i.opcode == "get-tuple-element"}
        of_body = self.program.computations[body]
        parts = _tuple_parts(self.program.root(body), of_body)
        todo, seen = list(needed), set()
        while todo:
            reached, stack = set(), [parts[todo.pop()]]
            while stack:
                i = of_body[stack.pop()]
                if i.name in seen:
                    continue
                seen.add(i.name)
                if i.opcode == "get-tuple-element" and of_body[i.operands[0]].opcode == "parameter":
                    reached.add(i.part)
                elif len(i.shape) == 1 and i.shape[0].size == 1:
                    stack += [operand for operand in i.operands if operand in of_body]
            todo += reached - needed
            needed |= reached
        return needed

    def carried(self, i: Instruction, start: Value) -> Value:
        """The entries of a loop's tuple that no iteration changes."""
        if not isinstance(start, list):
            return None
        of_body = self.program.computations[i.called("body")]
        parts = _tuple_parts(self.program.root(i.called("body")), of_body)
        kept = []
        for n, name in enumerate(parts):
            part = of_body[name]
            same = part.opcode == "get-tuple-element" and part.part == n
            kept.append(start[n] if same and of_body[part.operands[0]].opcode == "parameter" else None)
        return kept

    # --- bytes --------------------------------------------------------------------------------------------------

    def bytes(self, i: Instruction, body: dict[str, Instruction]) -> float:
        """Bytes that an instruction outside of a fusion reads and writes in HBM."""
        operands = [body[name] for name in i.operands]
        if i.opcode == "fusion":
            return self.fused_bytes(i, operands)
        if i.opcode == "custom-call":
            return _custom_call_bytes(i, operands)
        written = _in_hbm(i.shape)
        if i.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            # Its shape is (to, from, context) or ((from), to, context): the slice, or all, is read and written.
            arrays = [a for a in i.shape if a.size > 1] or list(i.shape[:1])
            moved = min(a.bytes for a in arrays)
            source = operands[0].shape[0]
            others = [a.space for a in arrays if a.space != source.space]
            return moved * ((source.space in HBM) + ((others or [source.space])[0] in HBM))
        if i.opcode in _SLICES:
            return min(_in_hbm(operands[0].shape), _size(i.shape)) + written
        if i.opcode == "dynamic-update-slice":
            return _in_hbm(operands[1].shape) + min(_size(operands[1].shape), written)
        if i.opcode == "scatter":
            updates = _size(operands[-1].shape)
            return _in_hbm(operands[-1].shape) + min(2 * updates, 2 * written)
        if i.opcode.endswith("-start"):
            return sum(_in_hbm(o.shape) for o in operands) * 2
        return sum(_in_hbm(o.shape) for o in operands) + written

    def fused_bytes(self, i: Instruction, operands: list[Instruction]) -> float:
        inner = self.program.computations[i.called("calls")]
        if self.program.root(i.called("calls")).opcode == "custom-call" and any(
            part.opcode in COLLECTIVES for part in inner.values()
        ):
            return 0.0  # the beginning or end of an exchange, which is counted by itself
        users = _users(inner)
        total = 0.0
        for parameter in (p for p in inner.values() if p.opcode == "parameter"):
            operand = operands[int(parameter.inside)]
            whole = _in_hbm(operand.shape)
            if whole:
                total += min(whole, self.read(parameter.name, inner, users, whole))
        return total + self.written(i, inner)

    def read(
        self, name: str, inner: dict[str, Instruction], users: dict[str, list[Instruction]], whole: float
    ) -> float:
        """Bytes read of a fusion's parameter: those of its slices if nothing else of it is used."""
        total = 0.0
        for user in users.get(name, []):
            if user.opcode in ("bitcast", "copy", "reshape") and not user.is_root:
                total += self.read(user.name, inner, users, whole)
            elif user.opcode in _SLICES and user.operands[0] == name:
                total += _size(user.shape)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                pass  # written in place
            elif user.opcode in COLLECTIVES or (user.opcode == "tuple" and user.is_root):
                pass  # counted with the exchange; handed on
            elif user.opcode == "fusion":
                nested = self.program.computations[user.called("calls")]
                for n, operand in enumerate(user.operands):
                    if operand == name:
                        parameter = next(p for p in nested.values() if p.opcode == "parameter" and int(p.inside) == n)
                        if _is_handed_on(parameter.name, nested):  # laid out otherwise, and that is what is sliced
                            total += self.read(user.name, inner, users, whole)
                        else:
                            total += self.read(parameter.name, nested, _users(nested), whole)
            else:
                return whole
        return total

    def written(self, i: Instruction, inner: dict[str, Instruction]) -> float:
        root = next(r for r in inner.values() if r.is_root)
        parts = _tuple_parts(root, inner) if root.opcode == "tuple" else [root.name]
        if len(parts) != len(i.shape):
            return _in_hbm(i.shape)
        total = 0.0
        for array, name in zip(i.shape, parts, strict=True):
            if array.space in HBM and inner[name].opcode not in (*COLLECTIVES, "parameter"):
                total += min(array.bytes, self.updated(inner[name], inner, array.bytes))
        return total

    def updated(self, part: Instruction, inner: dict[str, Instruction], whole: float) -> float:
        while part.opcode in ("bitcast", "copy", "reshape") and part.operands[0] in inner:
            part = inner[part.operands[0]]
        if part.opcode == "dynamic-update-slice":
            return _size(inner[part.operands[1]].shape)
        if part.opcode == "fusion":
            nested = self.program.computations[part.called("calls")]
            root = next(r for r in nested.values() if r.is_root)
            return whole if root.opcode == "tuple" else self.updated(root, nested, whole)
        return whole

    # --- operations ---------------------------------------------------------------------------------------------

    def arithmetic(self, i: Instruction, body: dict[str, Instruction], channels: set[str], fused: bool = False) -> Cost:
        """FLOPs and collectives of an instruction, those of a fusion's inside.

        An exchange that overlaps several fusions stands in each of them; its channel says that it is one.
        """
        if i.opcode in ("fusion", "call", "async-start"):
            inner = self.program.computations[i.called("calls") or i.called("to_apply")]
            total = Cost()
            for instruction in inner.values():
                total += self.arithmetic(instruction, inner, channels, fused=True)
            return total
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = re.search(r"channel_id=(\d+)", i.attributes)
            if fused and channel:
                if channel[1] in channels:
                    return Cost()
                channels.add(channel[1])
            operands = [body[name] for name in i.operands]
            moved = sum(_in_hbm(o.shape) for o in operands) + _in_hbm(i.shape) if fused else 0
            return Cost(moved, collectives={kind: _collective(kind, i, operands)})
        if i.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
            dims = body[i.operands[0]].shape[0].dims
            depth = math.prod(dims[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
            return Cost(product_flops=2 * i.shape[0].size * depth)
        if i.opcode == "convolution":
            return Cost(product_flops=_convolution(i, *(body[name].shape[0] for name in i.operands[:2])))
        if i.opcode in _ELEMENTWISE:
            return Cost(other_flops=i.shape[0].size)
        if i.opcode == "reduce":
            return Cost(other_flops=body[i.operands[0]].shape[0].size)
        if i.opcode == "custom-call":
            return Cost(product_flops=_estimate(i).get("flops", 0))
        return Cost()


def _is_handed_on(name: str, computation: dict[str, Instruction]) -> bool:
    """Whether a computation returns one of its parameters, at most in another layout."""
    part = next(r for r in computation.values() if r.is_root)
    while part.opcode in ("bitcast", "copy", "reshape"):
        part = computation[part.operands[0]]
    return part.name == name


def _users(computation: dict[str, Instruction]) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = {}
    for i in computation.values():
        for operand in dict.fromkeys(i.operands):
            users.setdefault(operand, []).append(i)
    return users


def _tuple_parts(root: Instruction, body: dict[str, Instruction]) -> list[str]:
    while root.opcode in ("opt-barrier", "bitcast") and root.is_tuple:
        root = body[root.operands[0]]
    return list(root.operands)


def _in_hbm(arrays: tuple[Array, ...]) -> float:
    return sum(array.bytes for array in arrays if array.space in HBM)


def _size(arrays: tuple[Array, ...]) -> float:
    return sum(array.bytes for array in arrays)


def _of_scope(i: Instruction, by_scope: Mapping[str, float]) -> float | None:
    """The value for the named scope that an instruction is in; None if there is no such scope."""
    named = re.search(r'op_name="([^"]*)"', i.attributes)
    scopes = named[1].split("/") if named else []
    return next((by_scope[scope] for scope in scopes if scope in by_scope), None)


def _is_on_host(i: Instruction) -> bool:
    if i.opcode in ("infeed", "outfeed", "send", "recv"):
        return True
    return i.opcode == "custom-call" and bool(_ON_HOST.search(_target(i)))


def _target(i: Instruction) -> str:
    """The function that a custom call calls."""
    match = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    return match[1] if match else ""


def _estimate(i: Instruction) -> dict[str, float]:
    """The cost estimate that a Pallas kernel carries."""
    match = re.search(r'"cost_estimate":(\{[^{}]*\})', i.attributes)
    return {key: float(value) for key, value in json.loads(match[1]).items()} if match else {}


def _custom_call_bytes(i: Instruction, operands: list[Instruction]) -> float:
    if _target(i) in _NO_WORK:
        return 0.0
    estimate = _estimate(i).get("bytes_accessed", 0)
    return estimate or sum(_in_hbm(o.shape) for o in operands) + _in_hbm(i.shape)


def _collective(kind: str, i: Instruction, operands: list[Instruction]) -> Collectives:
    """Bytes and steps of one exchange, on a ring (Chan et al. 2007, "Collective communication", for the bounds)."""
    size = max(sum(_size(o.shape) for o in operands), 0.0)
    if kind == "all-gather":
        size = max(a.bytes for a in i.shape) if i.opcode.endswith("-start") else _size(i.shape)
    ways = _group_size(i.attributes)
    share = (ways - 1) / ways
    rounds = {"all-reduce": 2.0, "collective-permute": 1.0}.get(kind, 1.0)
    sent = size if kind in ("collective-permute", "collective-broadcast") else rounds * share * size
    steps = 1.0 if kind == "collective-permute" else rounds * ways / 2
    return Collectives(1, size, sent, steps)


def _group_size(attributes: str) -> int:
    """The number of devices that take part in one exchange."""
    match = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if match:
        return int(match[2])
    match = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if match:
        return len(match[1].split(","))
    match = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if match:  # mesh['axis_0'=8,'axis_1'=2] {'axis_0'}; a part of an axis is 'axis_0':(1)2
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    return 2


def _convolution(i: Instruction, left: Array, right: Array) -> float:
    """2 x the products that a convolution adds up, padding and holes of dilation aside.

    XLA's compilers write products with batch dimensions as convolutions with windows, of which most is padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels, i.attributes[:80]
    of_left, of_right, of_out = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    total = 2.0 * i.shape[0].dims[of_out.index("b")] * i.shape[0].dims[of_out.index("f")]
    total *= right.dims[of_right.index("i")]
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    if groups:
        total /= int(groups[1])
    spatial = sorted(c for c in of_out if c.isdigit())
    for n, label in enumerate(spatial):
        kernel, size = right.dims[of_right.index(label)], left.dims[of_left.index(label)]
        out = i.shape[0].dims[of_out.index(label)]

        def field(name: str, default: str, n: int = n) -> str:
            return fields[name].split("x")[n] if name in fields else default

        stride, hole, spread = int(field("stride", "1")), int(field("rhs_dilate", "1")), int(field("lhs_dilate", "1"))
        low = int(field("pad", "0_0").split("_")[0])
        total *= _taps(kernel, size, out, stride, hole, spread, low)
    return total


@functools.cache
def _taps(kernel: int, size: int, out: int, stride: int, hole: int, spread: int, low: int) -> int:
    """Pairs of an output and a kernel entry along one dimension that meet an input entry."""
    number = 0
    for tap in range(kernel):
        at = np.arange(out) * stride + tap * hole - low
        number += int(((at % spread == 0) & (at >= 0) & (at // spread < size)).sum())
    return number
