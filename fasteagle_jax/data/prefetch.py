"""A background thread that makes what a loop needs next."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")

AHEAD = 2  # items that are ready before they are asked for: the one that is next, and one while the thread is late


class Prefetcher(Generic[Item]):
    """The results of `make` for some indices in their order, made by a thread. Use as a context manager."""

    def __init__(self, make: Callable[[int], Item], indices: Iterable[int], ahead: int = AHEAD) -> None:
        """Starts at once, and is at most `ahead` results ahead of the one last taken, with one more under way."""
        self._ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, indices), name="prefetch", daemon=True)
        self._thread.start()

    def take(self) -> Item:
        """The next result; what `make` raised for it, if it did."""
        item, error = self._ready.get()
        if error is not None:
            raise error
        return item  # type: ignore[return-value]  # without an error there is one

    def _run(self, make: Callable[[int], Item], indices: Iterable[int]) -> None:
        for index in indices:
            try:
                result: tuple[Item | None, BaseException | None] = make(index), None
            except BaseException as error:  # handed over to the thread that takes it
                result = None, error
            while not self._closed.is_set():
                try:
                    self._ready.put(result, timeout=0.1)
                    break
                except queue.Full:
                    pass
            if self._closed.is_set() or result[1] is not None:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
