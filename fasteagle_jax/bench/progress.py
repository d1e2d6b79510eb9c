"""Long measurements: finished parts are kept, so that the same command resumes, and logs get a line now and then."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fasteagle_jax.data.manifest import differences
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import check_new, write_text, writing
from fasteagle_jax.io.text import parse_json

UNFINISHED = "unfinished.json"  # of a results folder: the parts that are measured
PAUSE = 60.0  # seconds between two lines of a log


def check_results(folder: Path | None) -> None:
    """Raises UserError for a results folder that exists and was not left by an interrupted measurement."""
    if folder is not None and not (folder / UNFINISHED).is_file():
        check_new(folder)


class Parts:
    """Finished parts of a measurement by name, kept in the results folder (None: kept nowhere)."""

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        check_results(folder)
        self._path = None if folder is None else folder / UNFINISHED
        self._settings = json.loads(json.dumps(settings))
        self._parts: dict[str, Any] = {}
        if self._path is None:
            return
        if self._path.is_file():
            try:
                saved = parse_json(self._path.read_text())
                settings, self._parts = dict(saved["settings"]), dict(saved["parts"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self._path} is damaged ({error}): remove {folder}") from error
            if self._parts and (changed := differences(settings, self._settings)):
                raise UserError(
                    f"{folder} was begun with {'; '.join(changed)}: use the same settings or another --results"
                )
            print(f"{folder}: {len(self._parts)} parts are measured already", file=sys.stderr)
        self._save()  # what cannot be written is found out at once

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The part of that name; if it is not there yet, what `measure` returns, of JSON's types, which is kept."""
        if name not in self._parts:
            self._parts[name] = measure()
            self._save()
        return self._parts[name]

    def finish(self, report: Mapping[str, Any], figures: Mapping[str, Callable[[], Any]]) -> None:
        """Writes the figures and results.json in place of the parts."""
        if self._path is None:
            return
        folder = self._path.parent
        with writing(folder):
            for name, figure in figures.items():
                figure().savefig(folder / f"{name}.png", dpi=120)
            write_text(folder / "results.json", json.dumps(report, indent=2) + "\n")
            self._path.unlink()

    def _save(self) -> None:
        if self._path is not None:
            with writing(self._path):
                write_text(self._path, json.dumps({"settings": self._settings, "parts": self._parts}) + "\n")


class Progress:
    """A bar on a terminal; elsewhere a line on stderr, at most one a minute."""

    def __init__(self, total: int, unit: str) -> None:
        self._total, self._unit, self._done = total, unit, 0
        self._bar = tqdm(total=total, unit=unit, disable=None)
        self._next_line = time.monotonic() + PAUSE

    def update(self, words: str, steps: int = 1) -> None:
        """Counts steps; `words` say what was measured last."""
        self._done += steps
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(steps)
        if self._bar.disable and time.monotonic() >= self._next_line:
            print(f"{self._done} of {self._total} {self._unit}s; {words}", file=sys.stderr, flush=True)
            self._next_line = time.monotonic() + PAUSE

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()
