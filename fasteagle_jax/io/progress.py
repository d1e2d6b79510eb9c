"""Progress of a long program: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60.0  # between two lines of a log


class _Lines:
    """Standard error for a bar that is written again and again, each time as a line of its own."""

    def write(self, text: str) -> None:
        if text := text.strip():  # neither what clears a bar nor its end
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(total: int, unit: str, **options: Any) -> tqdm:
    """A tqdm bar on standard error; lines there if that is no terminal."""
    if sys.stderr.isatty():
        return tqdm(total=total, unit=unit, mininterval=0.5, dynamic_ncols=True, **options)
    return tqdm(total=total, unit=unit, mininterval=LINE_SECONDS, file=_Lines(), **options)
