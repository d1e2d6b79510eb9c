"""The rooms of the library and the direction of imports between them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fasteagle_jax

LIBRARY = Path(fasteagle_jax.__file__).parent
# From the top: a room imports from those below it and from itself.
ROOMS = (
    "commands", "integrations", "bench", "compiling", "training", "data", "engine", "drafters", "decoding", "targets",
    "nn", "devices", "io", "errors",
)  # fmt: skip
ABOVE_ALL = ("__init__", "cli")
MODULES = sorted(path.relative_to(LIBRARY).with_suffix("").as_posix() for path in LIBRARY.rglob("*.py"))


def imports_of(module: str) -> set[str]:
    """The library's modules and rooms that a module imports, wherever it does so, as `room/name`."""
    found = set()
    for node in ast.walk(ast.parse((LIBRARY / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fasteagle_jax":
            home = "/".join(node.module.split(".")[1:])
            names = {f"{home}/{alias.name}".strip("/") for alias in node.names}
            found |= {name if name in MODULES else home for name in names}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names if alias.name.split(".")[0] == "fasteagle_jax"}
            found |= {"/".join(name.split(".")[1:]) for name in names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_room_and_those_below(module):
    room = module.split("/")[0]
    if room in ABOVE_ALL:
        return
    assert room in ROOMS, f"{module} is in no room: there are {', '.join(ROOMS)}"
    for imported in imports_of(module):
        below = imported.split("/")[0]
        assert ROOMS.index(below) >= ROOMS.index(room), f"{module} imports {imported}, which is above it"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("drafters/")])
def test_drafters_know_neither_targets_nor_each_other(module):
    shared = {"drafters/base", "drafters/edges", "drafters/table", "drafters/files"}
    for imported in imports_of(module):
        assert not imported.startswith("targets"), f"{module} imports {imported}"
        if module != "drafters/table" and imported.startswith("drafters/"):
            assert imported in shared, f"{module} imports {imported}, another drafter"
