"""Files of lines that are only appended to."""

from __future__ import annotations

import io

import pytest

from fasteagle_jax.io.lines import LineFile


class Full(io.FileIO):
    """A file on a disk that takes some bytes of a line and then no more."""

    room = 5

    def write(self, data):
        if self.room == 0:
            raise OSError(28, "No space left on device")
        written = super().write(bytes(data)[: self.room])
        self.room -= written
        return written


def test_a_write_that_fails_half_way_leaves_no_part_of_a_line(tmp_path):
    """Otherwise the next line, once there is room, would follow the torn one's bytes."""
    path = tmp_path / "lines"
    with LineFile(path, lambda line, number: None) as file:
        file.append_lines(b"first\n")
        whole, file._file = file._file, Full(path, "ab")
        with pytest.raises(OSError, match="No space left"):
            file.append_lines(b"second, longer\n")
        assert path.read_bytes() == b"first\n"
        file._file.close()
        file._file = whole
        file.append_lines(b"third\n")
    assert path.read_bytes() == b"first\nthird\n"
