"""A background thread that makes what a loop needs next."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")

AHEAD = 2  # items that are ready before they are asked for: the one that is next, and one while the thread is late


class Prefetcher(Generic[Item]):
    """The results of `make` for some indices in their order, made by a thread. Use as a context manager."""

    def __init__(self, make: Callable[[int], Item], indices: Iterable[int], ahead: int = AHEAD) -> None:
        """Starts at once, and is at most `ahead` results ahead of the one last taken, with one more under way."""
        self._make, self._indices = make, iter(indices)
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._coming: collections.deque[Future[Item]] = collections.deque()
        for _ in range(ahead + 1):
            self._begin_next()

    def take(self) -> Item:
        """The next result; what `make` raised for it, if it did."""
        item = self._coming.popleft().result()
        self._begin_next()
        return item

    def _begin_next(self) -> None:
        if (index := next(self._indices, None)) is not None:
            self._coming.append(self._pool.submit(self._make, index))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
