"""A target and a drafter in folders, made once, and what a program says when the user made a mistake."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from fasteagle_jax.commands.interrupts import SIGNALS
from tests.tiny_folder import make_drafter, make_target


@pytest.fixture(autouse=True)
def kept_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was traced stays for the next test: sweeps and `ablate` forget all programs, of a process that ends soon."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target whose answers have about 6 tokens."""
    return make_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="session")
def drafter_folder(tmp_path_factory: pytest.TempPathFactory, target_folder: Path) -> Path:
    """A random drafter for it."""
    return make_drafter(tmp_path_factory.mktemp("models") / "drafter", target_folder)


@pytest.fixture(scope="session")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target that hardly ever ends an answer, not even greedily, and a drafter for it."""
    target = make_target(tmp_path_factory.mktemp("models") / "target", stop_rate=-4)
    return target, make_drafter(tmp_path_factory.mktemp("models") / "drafter", target)


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    """Fourteen prompts of different lengths, two of them of several turns."""
    path = tmp_path / "questions.jsonl"
    turns = [["Why " + "so " * i + "long?"] for i in range(12)]
    turns[3:3] = [["Hi?", "And?", "Go on."], ["One.", "Two."]]
    lines = [json.dumps({"question_id": i, "turns": t}) for i, t in enumerate(turns)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Runs a program that must fail by the user's mistake; returns the one line it says. It must write nothing."""

    def run(main: Callable[[Sequence[str] | None], int], *argv: object) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1, said
        assert said[0].startswith("error: ")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return said[0]

    return run


@pytest.fixture
def listening() -> Iterator[list[Any]]:
    """Python's own handlers of the signals that end a program, also where a shell's `&` has the tests ignore one."""
    own = [signal.default_int_handler, signal.SIG_DFL]
    before = [signal.signal(each, handler) for each, handler in zip(SIGNALS, own, strict=True)]
    yield own
    for each, handler in zip(SIGNALS, before, strict=True):
        signal.signal(each, handler)
