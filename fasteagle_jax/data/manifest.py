"""The file beside an output with its settings: a command of the same settings resumes, others are refused."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line
from fasteagle_jax.io.text import parse_json
from fasteagle_jax.targets.templates import PLAIN, ChatOptions, template_digest
from fasteagle_jax.targets.tokenizer import tokenizer_digest

LATER = ("tokenizer", "stop_token_ids", "date")  # settings that manifests of older versions lack


def prompt_settings(tokenizer: Any, stop_token_ids: Sequence[int], chat: ChatOptions) -> dict[str, Any]:
    """The settings of a manifest that decide what prompts are made of conversations, and where answers end."""
    settings: dict[str, Any] = {
        "chat_template": template_digest(tokenizer),
        "tokenizer": tokenizer_digest(tokenizer),
        "stop_token_ids": list(stop_token_ids),
    }
    given = {name: value for name, value in vars(chat).items() if value != getattr(PLAIN, name)}
    if (date := given.pop("date", None)) is not None:
        settings["date"] = date
    if given:
        settings["chat"] = given
    return settings


def first_date(settings: Mapping[str, Any] | None) -> str:
    """The date of earlier settings, YYYY-MM-DD; today's if there are none, or they have no date."""
    date = (settings or {}).get("date")
    return date if isinstance(date, str) else today()


def today() -> str:
    """The date, YYYY-MM-DD."""
    return datetime.date.today().isoformat()


def saved_settings(output: Path) -> dict[str, Any] | None:
    """The settings in the manifest of `output`; None if there is none that can be read."""
    try:
        return dict(parse_json(manifest_path(output).read_bytes())["settings"])
    except (OSError, ValueError, KeyError, TypeError):  # `read_manifest` tells of a damaged one
        return None


def manifest_path(output: Path) -> Path:
    """OUTPUT.manifest.json."""
    return output.with_name(output.name + ".manifest.json")


def read_manifest(output: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of `output`, a file or a folder; None if there is none yet.

    Raises UserError if it has other settings, or if `output` exists without a manifest.
    """
    path = manifest_path(output)
    if not path.exists():
        if output.exists() and (any(output.iterdir()) if output.is_dir() else output.stat().st_size):
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


def check_target(paths: Sequence[str], *fingerprints: str) -> None:
    """Raises UserError for data whose manifest names none of these targets; data without a manifest may be of any."""
    for manifest in (manifest_path(Path(path)) for path in paths):
        if not manifest.exists():
            continue
        try:
            target = parse_json(manifest.read_bytes())["settings"]["target"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{manifest} is damaged ({first_line(error)}): prepare the data again, or remove it"
            ) from error
        if target not in fingerprints:
            raise UserError(
                f"{manifest} says that the answers are of target {target}, this one's weights are {fingerprints[0]}: "
                "use that target, prepare data with this one, or remove the manifest to train on other answers"
            )


def damaged(output: Path, error: Exception) -> UserError:
    """The error for a manifest that cannot be read."""
    return UserError(f"{manifest_path(output)} is damaged ({error}): name another --output")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`sampling.seed 0, not 5` for each setting that differs; groups of settings are compared one by one."""
    differ = []
    for name in sorted(old.keys() | new.keys()):
        if name in LATER and name not in old and not prefix:
            continue
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            differ += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            differ.append(f"{prefix}{name} {a}, not {b}")
    return differ
