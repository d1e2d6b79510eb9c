"""Ctrl-C and SIGTERM, which end a program between two of its writes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a terminal's, and that of `kill`, a cluster or a machine that goes away


class Interrupts:
    """Either signal inside `with` is a KeyboardInterrupt, but never in the middle of what is `held`."""

    def __init__(self) -> None:
        self._asked = self._is_held = False
        self._before: dict[signal.Signals, Any] = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lets what is inside come to its end first."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._asked:  # meanwhile, or earlier where a destructor swallowed the exception
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            for each in SIGNALS:
                if signal.getsignal(each) is not signal.SIG_IGN:  # as SIGINT is under a shell's `&`
                    self._before[each] = signal.signal(each, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _hear(self, *_: object) -> None:
        self._asked = True
        if not self._is_held:
            raise KeyboardInterrupt
