"""Features on disk: the target's features and final hidden states of all training tokens, which replace its layers.

B rows · T tokens of a row · F layers whose inputs are stored · H hidden width.

    index.json              settings of the features; each file's pieces, tokens and sha256
    features-00000.npy ...  [tokens, F*H + H]: the layers' inputs in their order, then the final hidden state

A piece of `packing.PackedData` is a segment of its own in any row, so that the target's values for it do not depend on
the packing, to within rounding. It is stored once for all epochs, batch sizes and seeds; other data, another T, target
or feature layer need other features. The bits of bfloat16 are stored as uint16, which NumPy has.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fasteagle_jax.data.manifest import differences
from fasteagle_jax.data.packing import Batch, PackedData, best_fit
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line, replacing, sha256, write_text
from fasteagle_jax.io.text import parse_json
from fasteagle_jax.targets.messages import short

INDEX = "index.json"
FILE_BYTES = 1 << 26  # of a file, unless a single piece is larger: a kill loses one file's work
_FILE_NAME = re.compile(r"features-[0-9]{5,}\.npy")  # no other file, and none outside the folder
STORED = {"bfloat16": "uint16", "float32": "float32"}  # dtype: the file's


class TargetValues(NamedTuple):
    """The target's outputs that a drafter is trained on."""

    features: Any  # [B, T, F*H]
    hidden: Any  # [B, T, H], after the final norm


@dataclasses.dataclass(frozen=True)
class FeatureSettings:
    """Settings of stored features, which must be the training run's."""

    target: str  # fingerprint
    feature_layers: tuple[int, ...]
    hidden_size: int  # H
    data: str  # PackedData.digest()
    length: int  # T
    dtype: str = "bfloat16"  # that they are stored in

    def __post_init__(self) -> None:
        if self.dtype not in STORED:
            raise UserError(f"dtype {self.dtype!r} of features: use {' or '.join(STORED)}")

    @property
    def width(self) -> int:
        """Numbers per token."""
        return (len(self.feature_layers) + 1) * self.hidden_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token in a file."""
        return self.width * np.dtype(STORED[self.dtype]).itemsize


class Entry(NamedTuple):
    """A file in the index: the features of consecutive pieces."""

    file: str
    pieces: int
    tokens: int
    sha256: str


# --- writing ----------------------------------------------------------------------------------------------------


def write_features(
    folder: Path,
    data: PackedData,
    settings: FeatureSettings,
    compute: Callable[[Batch], TargetValues],
    *,
    file_bytes: int = FILE_BYTES,
) -> Iterator[int]:
    """Writes the files that the folder lacks, one an iteration, and yields the number of tokens in each.

    `compute` takes batches [B, T] with B of `data`. After a kill the same call resumes, and writes files again that are
    missing or corrupt. UserError if the folder holds features of something else.
    """
    entries = _read_index(folder, settings, missing_ok=True)
    bounds = [0, *itertools.accumulate(entry.pieces for entry in entries)]
    if bounds[-1] > len(data.lengths):
        raise _damaged(folder, "it has more pieces than the data")
    file_tokens = max(1, file_bytes // settings.bytes_per_token)
    while bounds[-1] < len(data.lengths):
        ends = np.cumsum(data.lengths[bounds[-1] :])
        bounds.append(bounds[-1] + max(1, int(np.searchsorted(ends, file_tokens, side="right"))))
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        path = folder / _file_name(i)
        num_tokens = int(data.lengths[start:end].sum())
        if i >= len(entries) or not path.is_file() or sha256(path) != entries[i].sha256:
            values = _values(data, np.arange(start, end), settings, compute)
            entry = Entry(path.name, end - start, num_tokens, _write_array(path, values))
            entries[i : i + 1] = [entry]
            _write_index(folder, settings, entries)
        yield num_tokens


def _values(
    data: PackedData, pieces: np.ndarray, settings: FeatureSettings, compute: Callable[[Batch], TargetValues]
) -> np.ndarray:
    """The values of consecutive pieces, [tokens, F*H + H] in the file's dtype."""
    dtype = jnp.dtype(settings.dtype)
    ends = np.cumsum(data.lengths[pieces])
    values = np.zeros((ends[-1], settings.width), dtype)
    rows = best_fit(pieces, data.lengths, data.T)
    for first in range(0, len(rows), data.B):
        batch_rows = [rows[r] if r < len(rows) else [] for r in range(first, first + data.B)]  # of one shape
        features, hidden = compute(data.filled(batch_rows))
        computed = np.asarray(jnp.concatenate([features, hidden], axis=-1).astype(dtype))
        for row, row_pieces in zip(computed, batch_rows, strict=True):
            at = 0
            for piece in row_pieces:
                length, end = data.lengths[piece], ends[piece - pieces[0]]
                values[end - length : end] = row[at : at + length]
                at += length
    return values.view(STORED[settings.dtype])


def _write_array(path: Path, values: np.ndarray) -> str:
    """Puts an array at `path`, whole or not at all; returns the file's sha256."""
    with replacing(path) as aside:
        with aside.open("wb") as file:
            np.save(file, values)
        return sha256(aside)


def _file_name(i: int) -> str:
    return f"features-{i:05d}.npy"


def _write_index(folder: Path, settings: FeatureSettings, entries: list[Entry]) -> None:
    index = {"settings": dataclasses.asdict(settings), "files": [entry._asdict() for entry in entries]}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


# --- reading ----------------------------------------------------------------------------------------------------


def load_features(
    folder: Path, data: PackedData, target: str, feature_layers: tuple[int, ...], hidden_size: int
) -> Features:
    """The features in a folder for a training run on `data`, in the dtype that they are stored in.

    `target` is its fingerprint. The folder may have other layers besides. UserError if they are of anything else, not
    all there, or corrupt.
    """
    try:
        stored = _load_index(folder)["settings"]
        dtype, layers = str(stored["dtype"]), tuple(map(int, stored["feature_layers"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, error) from error
    if not set(feature_layers) <= set(layers):
        layers = tuple(feature_layers)  # which is refused
    settings = FeatureSettings(target, layers, hidden_size, data.digest(), data.T, dtype)
    return Features(folder, data, settings, feature_layers)


class Features:
    """The features of packed data, mapped into memory, every file's checksum found right."""

    def __init__(
        self, folder: Path, data: PackedData, settings: FeatureSettings, layers: Sequence[int] | None = None
    ) -> None:
        """The features in `folder`, of some of its `layers` or of all.

        UserError if they are not of these settings, not all there, or corrupt.
        """
        entries = _read_index(folder, settings)
        if (there := sum(entry.pieces for entry in entries)) != len(data.lengths):
            raise UserError(f"{folder} has the features of {there} of {len(data.lengths)} pieces: {_REMEDY}")
        self._data, self._hidden_size, self._dtype = data, settings.hidden_size, jnp.dtype(settings.dtype)
        self._width = settings.width
        # Each layer's place in a file.
        self._layers = [settings.feature_layers.index(layer) for layer in layers or settings.feature_layers]
        self._bounds = [0, *itertools.accumulate(entry.pieces for entry in entries)]  # of the files, in pieces
        self._ends = np.concatenate([[0], np.cumsum(data.lengths)])  # of the pieces, in tokens; one entry more
        self._arrays = []
        for entry in entries:
            path = folder / entry.file
            if not path.is_file() or sha256(path) != entry.sha256:
                raise UserError(f"{path} is {'corrupt' if path.is_file() else 'not there'}: {_REMEDY}")
            self._arrays.append(_mapped(path, (entry.tokens, self._width), self._dtype))

    def batch(self, step: int, rows: slice | None = None) -> TargetValues:
        """The features of `PackedData.batch(step, rows)`, zero if it is padding."""
        return self.of(self._data.pieces(step, rows))

    def of(self, rows_pieces: Sequence[Sequence[int] | np.ndarray]) -> TargetValues:
        """The features of `PackedData.filled(rows_pieces)`, likewise."""
        values = np.zeros((len(rows_pieces), self._data.T, self._width), self._dtype)
        for row, pieces in zip(values, rows_pieces, strict=True):
            at = 0
            for piece in pieces:
                file = bisect.bisect_right(self._bounds, piece) - 1
                first = self._ends[self._bounds[file]]
                start, end = self._ends[piece] - first, self._ends[piece + 1] - first
                row[at : at + end - start] = self._arrays[file][start:end]
                at += end - start
        parts = np.split(values, self._width // self._hidden_size, axis=-1)
        return TargetValues(np.concatenate([parts[i] for i in self._layers], axis=-1), parts[-1])


def _mapped(path: Path, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """The array in a file, mapped into memory; UserError if it is of another shape or type, or of pickled objects."""
    try:
        # Its header is read first: one that claims terabytes is not to be mapped.
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            found, in_columns, stored = read(file)
        if found != shape or in_columns or stored != STORED[dtype.name]:
            raise ValueError(f"{found} values of {stored}, not {shape} of {STORED[dtype.name]}")
        return np.load(path, mmap_mode="r", allow_pickle=False).view(dtype)
    except Exception as error:  # of many kinds: the header is a text in Python's syntax
        raise UserError(f"{path} is corrupt ({first_line(error)}): {_REMEDY}") from error


_REMEDY = "give the prepare-features command again, which writes what is missing"


def _load_index(folder: Path) -> Any:
    """The index of a folder, as JSON; UserError if there is none or it is damaged."""
    try:
        return parse_json((folder / INDEX).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no features ({INDEX}): write them with fasteagle prepare-features") from None
    except ValueError as error:
        raise _damaged(folder, error) from error


def _read_index(folder: Path, settings: FeatureSettings, *, missing_ok: bool = False) -> list[Entry]:
    """The files of a folder; UserError if they are of other settings."""
    if missing_ok and not (folder / INDEX).exists():
        return []
    index = _load_index(folder)
    try:
        old: Mapping[str, Any] = dict(index["settings"])
        entries = [Entry(**entry) for entry in index["files"]]
        for i, entry in enumerate(entries):
            counts = entry.pieces, entry.tokens
            if not _FILE_NAME.fullmatch(str(entry.file)) or any(
                type(count) is not int or count < 0 for count in counts
            ):
                raise ValueError(f"its entry {i} is {short(entry._asdict())}")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error
    new = json.loads(json.dumps(dataclasses.asdict(settings)))
    if differ := differences(old, new):
        raise UserError(f"{folder} holds features of {'; '.join(differ)}: use the same settings or another folder")
    return entries


def _damaged(folder: Path, error: object) -> UserError:
    return UserError(f"{folder / INDEX} is damaged ({error}): remove {folder} and prepare the features again")
