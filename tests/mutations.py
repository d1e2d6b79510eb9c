"""Hostile changes of a file's bytes, drawn from a seeded generator.

Each function takes a random.Random and the bytes of a valid file, and returns a `Mutation`.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

TERABYTES = 2**43
DEEP = 200_000  # brackets, more than any parser's stack holds


class Mutation(NamedTuple):
    """A file's new bytes, what was done to it in words, and whether a header, metadata or JSON was hit."""

    what: str
    data: bytes
    is_metadata: bool = True


Mutate = Callable[[random.Random, bytes], Mutation]

# As JSON text: some are values that json.dumps would not write.
HOSTILE_JSON = (
    "0", "-1", "1", "2", "3", "7", "1.5", "-0.0", "1e308", "1e999", "-1e999", "NaN", "Infinity", "true", "false",
    str(2**31), str(2**32 - 1), str(2**63), str(2**64), str(TERABYTES), "1" + "0" * 30, "9" * 5000,
    "null", '""', '" "', '"0"', '"\\ud800"', '"\\u0000"', '"a\\nb"', '"\\u001b[2J"', f'"{"x" * 100_000}"',
    '"../../../../etc/passwd"',
    '"/etc/passwd"', '"torch.load"', '"__class__"', "[]", "{}", "[[]]", "[null]", "[1, -1]", '{"a": 1}', '["a", 1]',
    "[" + "0," * 50_000 + "0]", "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 900 + "]" * 900,
    "[", "'single'", "undefined",
)  # fmt: skip


def short(text: str) -> str:
    """A text's beginning, for a message."""
    return text if len(text) <= 40 else f"{text[:30]}...({len(text)})"


def flip(
    rng: random.Random, data: bytes, start: int = 0, stop: int | None = None, is_metadata: bool = True
) -> Mutation:
    """One to four bytes of [start, stop) set to others."""
    changed = bytearray(data)
    stop = len(data) if stop is None else min(stop, len(data))
    places = sorted(rng.randrange(start, max(stop, start + 1)) for _ in range(rng.randint(1, 4)))
    for place in places:
        if place < len(changed):
            changed[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return Mutation(f"bytes at {places}", bytes(changed), is_metadata)


def cut(rng: random.Random, data: bytes, is_metadata: bool = True) -> Mutation:
    """The file's beginning alone, or with something behind it."""
    if rng.random() < 0.2:
        return Mutation("bytes behind the end", data + rng.randbytes(rng.randint(1, 64)), is_metadata)
    end = rng.choice((0, 1, 7, rng.randint(0, len(data)), max(len(data) - 1, 0)))
    return Mutation(f"cut at {end} of {len(data)}", data[:end], is_metadata)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    places = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for i, (key, inner) in enumerate(items):
        if i < 40:  # of a vocabulary's thousands
            places += _places(inner, (*path, key))
    return places


def changed_json(rng: random.Random, text: str) -> tuple[str, str]:
    """What was done, and the text of a JSON object with a value replaced, removed, doubled or renamed."""
    value = json.loads(text)
    path = rng.choice(_places(value) or [()])
    if not path or rng.random() < 0.03:
        hostile = rng.choice(HOSTILE_JSON)
        return f"all is {short(hostile)}", hostile
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    action = rng.choice(("replace",) * 7 + ("remove", "rename", "double", "scale", "swap"))
    old = holder[path[-1]]
    what = f"{action} {'.'.join(map(str, path))[-60:]}"
    if action == "remove":
        del holder[path[-1]]
    elif action == "rename" and isinstance(holder, dict):
        holder[rng.choice(("", "x", "../x", "__class__", f"{path[-1]}.weight"))] = holder.pop(path[-1])
    elif action == "double" and isinstance(holder, dict):
        marked = json.dumps({**holder, "\0double": None})
        doubled = f"{json.dumps(str(path[-1]))}: {rng.choice(HOSTILE_JSON)}"
        holder["\0inner"] = 0
        return what, _with_raw(value, holder, marked.replace(f"{json.dumps(chr(0) + 'double')}: null", doubled))
    elif action == "scale" and isinstance(old, int | float):
        holder[path[-1]] = old * rng.choice((-1, 2, 3, 10**6, 10**12, 0.5))
    elif action == "swap":
        holder[path[-1]] = rng.choice(([old], {"value": old}, str(old), [old, old], None))
    else:
        hostile = rng.choice(HOSTILE_JSON)
        holder[path[-1]] = "\0raw"
        return f"{what} by {short(hostile)}", json.dumps(value).replace(json.dumps("\0raw"), hostile)
    return what, json.dumps(value)


def _with_raw(value: Any, holder: dict[str, Any], raw: str) -> str:
    holder.clear()
    holder["\0raw"] = 1
    return json.dumps(value).replace('{"\\u0000raw": 1}', raw)


def mutate_json(rng: random.Random, data: bytes) -> Mutation:
    """A JSON document with one thing wrong, by its meaning or by its bytes."""
    if rng.random() < 0.8:
        what, text = changed_json(rng, data.decode())
        return Mutation(what, text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.2:
        where = rng.randrange(len(data) + 1)
        return Mutation(f"bytes that are no text at {where}", data[:where] + b"\xff\xfe\xed\xa0\x80" + data[where:])
    return flip(rng, data) if rng.random() < 0.6 else cut(rng, data)


def mutate_json_lines(rng: random.Random, data: bytes) -> Mutation:
    """A file of JSON lines with one line wrong, or its lines in another order."""
    lines = data.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    if rng.random() < 0.1:
        other = rng.randrange(len(lines))
        lines[i], lines[other] = lines[other], lines[i]
        return Mutation(f"lines {i} and {other} swapped", b"".join(lines))
    if rng.random() < 0.1:
        return Mutation(f"line {i} doubled", b"".join([*lines[: i + 1], *lines[i:]]))
    if rng.random() < 0.05:
        return Mutation(f"a long line {i}", b"".join([*lines[:i], b'{"a": "' + b"x" * 2**20 + b'"}\n', *lines[i:]]))
    what, line, _ = mutate_json(rng, lines[i].rstrip(b"\n"))
    lines[i] = line + b"\n"
    return Mutation(f"line {i}: {what}", b"".join(lines))


def mutate_safetensors(rng: random.Random, data: bytes) -> Mutation:
    """A safetensors file: its header's length, its header, or (a fifth) its tensors."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.random()
    if kind < 0.1:
        claimed = rng.choice((0, 1, size - 1, size + 1, len(data), 2**31, TERABYTES, 2**63, 2**64 - 1))
        return Mutation(f"header of {claimed} bytes claimed", claimed.to_bytes(8, "little") + data[8:])
    if kind < 0.55:
        what, text = changed_json(rng, header.decode())
        new = text.encode("utf-8", "surrogatepass")
        return Mutation(what, len(new).to_bytes(8, "little") + new + body)
    if kind < 0.65:  # a tensor whose data would be terabytes
        tensors = json.loads(header)
        name = rng.choice([name for name in tensors if name != "__metadata__"])
        shape = rng.choice(([TERABYTES], [2**32, 2**32], [2**63, 2], [0, 2**62], [1] * 200))
        tensors[name]["shape"] = shape
        if rng.random() < 0.5:
            tensors[name]["data_offsets"][1] = rng.choice((TERABYTES, 2**64 - 1, 2**63))
        new = json.dumps(tensors).encode()
        return Mutation(f"{name} of shape {shape[:3]}", len(new).to_bytes(8, "little") + new + body)
    if kind < 0.75:
        return flip(rng, data, 0, 8 + size)
    return cut(rng, data) if kind < 0.8 else flip(rng, data, 8 + size, is_metadata=False)


def mutate_gguf(rng: random.Random, data: bytes, header_bytes: int) -> Mutation:
    """A GGUF file: counts, types and lengths of its header, or (a fifth) its tensors."""
    kind = rng.random()
    if kind < 0.15:
        count, where = rng.choice((0, 1, 2**31, TERABYTES, 2**63, 2**64 - 1)), rng.choice((8, 16))
        return Mutation(f"count {count} at {where}", data[:where] + struct.pack("<Q", count) + data[where + 8 :])
    if kind < 0.5:  # a length, a count, a dimension or an offset, wherever one is
        starts = [
            i for i in range(24, header_bytes - 8) if data[i + 4 : i + 8] == bytes(4) and data[i] and not data[i - 1]
        ]
        where = rng.choice(starts or [24])
        value = rng.choice((0, 1, 2, 2**20, 2**31, 2**40, TERABYTES, 2**63, 2**64 - 1))
        return Mutation(f"{value} at {where}", data[:where] + struct.pack("<Q", value) + data[where + 8 :])
    if kind < 0.6:  # an array of arrays, of terabytes, or of a type that is none
        fields = struct.pack("<Q", 1) + b"x" + struct.pack("<I", 9)
        inner = rng.choice(
            (struct.pack("<IQ", 9, 1) * 5000, struct.pack("<IQ", 4, TERABYTES), struct.pack("<IQ", 8, 2**62))
        )
        count = int.from_bytes(data[16:24], "little") + 1
        return Mutation("a hostile array", data[:16] + struct.pack("<Q", count) + fields + inner + data[24:])
    if kind < 0.75:
        return flip(rng, data, 0, header_bytes)
    return cut(rng, data) if kind < 0.82 else flip(rng, data, header_bytes, is_metadata=False)


def mutate_npy(rng: random.Random, data: bytes) -> Mutation:
    """A .npy file: its header, an array of pickled objects, or (a tenth) its values."""
    size = 10 + int.from_bytes(data[8:10], "little")
    kind = rng.random()
    if kind < 0.5:
        header = rng.choice(
            (
                "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
                f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({TERABYTES}, {TERABYTES}), }}",
                "{'descr': '<u2', 'fortran_order': False, 'shape': (-1,), }",
                "{'descr': '<f8', 'fortran_order': True, 'shape': (2, 3), }",
                "{'descr': '<V64', 'fortran_order': False, 'shape': (1,), }",
                "{'descr': '<u2', 'fortran_order': False, 'shape': (), }",
                "{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (3,), }",
                "__import__('os').getcwd()",
                "(" * 5000,
                "",
            )
        ).encode()
        return Mutation(short(header.decode()), data[:8] + struct.pack("<H", len(header)) + header + data[size:])
    if kind < 0.8:
        return flip(rng, data, 0, size)
    return cut(rng, data) if kind < 0.9 else flip(rng, data, size, is_metadata=False)


def mutate_zip(rng: random.Random, data: bytes) -> Mutation:
    """A zip file: its directory, members outside it, one that inflates to a thousand times its size."""
    kind = rng.random()
    if kind < 0.35:
        out = io.BytesIO()
        name = rng.choice(("pkg/model.bin", "../model.bin", "/tmp/outside/model.bin", "a/../../model.bin", "model.bin"))
        with zipfile.ZipFile(
            out, "w", rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        ) as archive:
            if rng.random() < 0.7:
                archive.writestr(name, bytes(rng.choice((0, 2**20, 2**25))))
            for extra in rng.sample(
                ("b/model.bin", "model.bin/", "x" * 300 + "model.bin", "n\0model.bin"), rng.randint(0, 2)
            ):
                archive.writestr(extra, b"x")
        return Mutation(f"members {name}", out.getvalue())
    directory = data.rfind(b"PK\x01\x02")
    if kind < 0.55:  # a method that is none, encryption, a size of terabytes
        where, value = rng.choice(
            (
                (10, b"\x63\0"),
                (8, b"\x01\0"),
                (24, b"\xff\xff\xff\x7f"),
                (20, b"\xff\xff\xff\x7f"),
                (42, b"\xff\xff\xff\x7f"),
            )
        )
        where += directory
        return Mutation(f"{value!r} in the directory at {where}", data[:where] + value + data[where + len(value) :])
    if kind < 0.8:
        return flip(rng, data, directory)
    return cut(rng, data) if kind < 0.85 else flip(rng, data, 0, directory, is_metadata=rng.random() < 0.5)


def mutate_any(rng: random.Random, data: bytes) -> Mutation:
    """A file of metadata of an unknown format: its bytes."""
    return flip(rng, data) if data and rng.random() < 0.7 else cut(rng, data)
