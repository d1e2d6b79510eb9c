"""A file of lines that is appended to, line by line on the disk, by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import sync

log = logging.getLogger(__name__)


class LineFile:
    """Appends lines to a file and resumes where a killed run stopped; a second writer is refused.

    On opening, `read(line, number)` is called for every line, numbers from 1. It raises UserError for a line that
    should not be there: the last one is then cut off if it is torn, any other error goes to the caller. Raises OSError
    where the file cannot be written.
    """

    def __init__(self, path: Path, read: Callable[[bytes, int], None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        self._path = path
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  # closed by close()
        try:
            if is_new:
                sync(path.parent)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{path} is being written by another run: wait for its end") from error
            except OSError as error:  # a file system without locks
                log.warning("%s: cannot be locked (%s)", path, error.strerror)
            self._read_all(read)
        except BaseException:
            self._file.close()
            raise

    def append_lines(self, lines: bytes) -> None:
        """Writes whole lines, or after an OSError none of them, and waits until they are on the disk."""
        rest, end = memoryview(lines), os.fstat(self._file.fileno()).st_size
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), end)
            raise

    def close(self) -> None:
        """Closes the file; what was appended is on the disk already."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_all(self, read: Callable[[bytes, int], None]) -> None:
        end = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                is_whole = line.endswith(b"\n")
                try:
                    read(line, number)
                except UserError:
                    if is_whole:
                        raise
                    log.warning("%s: cut off a torn last line of %d bytes", self._path, len(line))
                    self._file.truncate(end)
                    os.fsync(self._file.fileno())
                    return
                if not is_whole:  # all but its newline
                    self.append_lines(b"\n")
                    return
                end += len(line)
