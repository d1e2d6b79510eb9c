"""Compilations counted, so that a time can be told from a compiler's."""

from __future__ import annotations

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
