"""Files and folders that are complete or absent: written aside, synced, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.text import parse_json


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then replaces `path` in one step; a failure leaves `path` untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")  # a killed writer's is overwritten
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill with files, which then is renamed to `path` in one step; a failure leaves nothing there.

    Raises OSError if `path` exists and holds anything.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    aside.mkdir()
    try:
        yield aside
        for file in aside.iterdir():
            sync(file)
        os.rename(aside, path)
        sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Puts `text` at `path`, whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises UserError, with the file's name, for the system's errors (e.g. a full disk)."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename or path}: {error.strerror or error}") from error


def check_new(path: Path | None) -> None:
    """Raises UserError if an output file exists already; None is no file."""
    if path is not None and path.exists():
        raise UserError(f"{path} exists: name another output, or remove it")


def write_new(path: Path, text: str) -> None:
    """Writes a new file, whole or not at all."""
    with writing(path):
        check_new(path)
        write_text(path, text)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises UserError if it is not JSON or no object."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({first_line(error)}): download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object: download it again")
    return value


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def in_bucket(path: Any) -> bool:
    """Whether a path is in an object store, whose objects cannot be appended to."""
    return "://" in os.fspath(path)


def write_file(path: epath.Path, text: str) -> None:
    """Puts `text` at a path of a run folder, whole or not at all."""
    if in_bucket(path):
        path.write_text(text)
    else:
        write_text(Path(path), text)


def check_writable(folder: epath.Path) -> None:
    """Creates the folder; UserError if nothing can be written to it."""
    probe = folder / f".writable-{uuid.uuid4().hex}"  # every process of a run tries
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        for each in folder.glob(".writable-*"):  # also what a killed run has left
            each.unlink(missing_ok=True)  # another process may have been faster
    except Exception as error:  # clients of buckets raise many kinds, ImportError among them
        reason = first_line(error)[:200]
        remedy = (
            "pip install gcsfs google-cloud-storage, log in, and check the bucket's name and rights"
            if in_bucket(folder)
            else ""
        )
        raise UserError(f"cannot write to {folder} ({reason}): {remedy or 'name a folder of yours'}") from error
