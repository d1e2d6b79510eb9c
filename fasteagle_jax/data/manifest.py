"""The file beside an output with its settings: a command of the same settings resumes, others are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line
from fasteagle_jax.io.text import parse_json


def manifest_path(output: Path) -> Path:
    """OUTPUT.manifest.json."""
    return output.with_name(output.name + ".manifest.json")


def read_manifest(output: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of `output`; None if there is none yet.

    Raises UserError if it has other settings, or if `output` exists without a manifest.
    """
    path = manifest_path(output)
    if not path.exists():
        if output.exists() and output.stat().st_size:
            raise UserError(f"{output} exists without {path.name}: name another --output")
        return None
    try:
        saved = parse_json(path.read_bytes())
        old = dict(saved["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(output, error) from error
    if changed := differences(old, json.loads(json.dumps(settings))):
        raise UserError(f"{output} was made with {'; '.join(changed)}: use the same settings or another --output")
    assert isinstance(saved, dict)
    return saved


def check_target(paths: Sequence[str], fingerprint: str) -> None:
    """Raises UserError for data whose manifest names another target; data without a manifest may be of any."""
    for manifest in (manifest_path(Path(path)) for path in paths):
        if not manifest.exists():
            continue
        try:
            target = parse_json(manifest.read_bytes())["settings"]["target"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{manifest} is damaged ({first_line(error)}): prepare the data again, or remove it"
            ) from error
        if target != fingerprint:
            raise UserError(
                f"{manifest} says that the answers are of target {target}, this one's weights are {fingerprint}: "
                "use that target, prepare data with this one, or remove the manifest to train on other answers"
            )


def damaged(output: Path, error: Exception) -> UserError:
    """The error for a manifest that cannot be read."""
    return UserError(f"{manifest_path(output)} is damaged ({error}): name another --output")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`sampling.seed 0, not 5` for each setting that differs; groups of settings are compared one by one."""
    differ = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            differ += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            differ.append(f"{prefix}{name} {a}, not {b}")
    return differ
