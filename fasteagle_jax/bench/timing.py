"""Time, and compilations counted so that it can be told from a compiler's."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any, Self

import jax

_COMPILE = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts compilations inside `with`: `number` programs and `seconds`, tracing and lowering included."""

    def __init__(self) -> None:
        self.number = 0
        self.seconds = 0.0

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        self.number += event == _COMPILE
        self.seconds += duration_secs * event.startswith("/jax/core/compile/")

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)


class Stopwatch:
    """Adds up the time inside `with`: `seconds` without compilation, and `compiling`."""

    def __init__(self) -> None:
        self.seconds = self.compiling = 0.0
        self._started = 0.0
        self._compilations = Compilations()

    def __enter__(self) -> Self:
        self._compilations = Compilations().__enter__()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        passed = time.perf_counter() - self._started
        self._compilations.__exit__()
        self.seconds += max(passed - self._compilations.seconds, 0.0)
        self.compiling += self._compilations.seconds


@dataclasses.dataclass(frozen=True)
class Spread:
    """Min, median and max over repeats."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(min(values), statistics.median(values), max(values))

    def words(self, digits: int = 2) -> str:
        """`median (min to max)`, with so many decimals."""
        return f"{self.median:.{digits}f} ({self.min:.{digits}f} to {self.max:.{digits}f})"
