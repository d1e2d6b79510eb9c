"""Metrics of a training run: metrics.jsonl, the complete record, and from it TensorBoard, W&B and a plot."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import in_bucket, write_file
from fasteagle_jax.io.text import parse_json

Record = dict[str, Any]  # of one step; "step" counts from 1; values that are not finite are None


def rounded(values: Any) -> list[float | None]:
    """An array's values in a record: five digits, None for those that are not finite."""
    return [finite(round(float(v), 5)) for v in np.asarray(values)]


def finite(value: float) -> float | None:
    """The value; None for infinity and NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def expected_length(acceptance: Sequence[float | None]) -> float | None:
    """An estimate of a chain's acceptance length: 1 + sum over depths d of the product of a_1 ... a_d.

    a_i is level i's acceptance, the mean of sum min(p, q) over the batch. It is no measurement: it assumes that levels
    are independent and that the batch's text is the target's own.
    """
    if any(a is None for a in acceptance):
        return None
    return round(1 + float(np.cumprod(np.asarray(acceptance, float)).sum()), 4)


def scalars(record: Record) -> dict[str, float]:
    """A record's numbers under their names in TensorBoard and W&B: lists by level, measured ones under eval/."""
    found = {}
    for key, value in record.items():
        measured = key.startswith(("tau", "by depth", "held-out"))
        name = ("eval/" if measured else "train/") + re.sub(r"\W+", "_", key)
        if isinstance(value, list):
            each = "depth" if key.startswith("by depth") else "level"
            pairs = [(f"{name}/{each}_{i}", v) for i, v in enumerate(value, 1) if not isinstance(v, list)]
        else:
            pairs = [(name, value)] if key != "step" else []
        found.update({name: float(v) for name, v in pairs if v is not None})
    return found


class Log:
    """The records of a run, in metrics.jsonl and, if asked for, TensorBoard and W&B. Use as a context manager.

    Records past `step`, the checkpoint that a run resumes from, are dropped. An object of a bucket cannot be appended
    to: there `flush` writes the file anew. Raises UserError for W&B or a bucket's TensorBoard that are not installed.
    """

    def __init__(
        self,
        run: epath.Path,
        step: int,
        *,
        tensorboard: bool = False,
        wandb: str = "",
        config: Record | None = None,
        writes: bool = True,
    ):
        self.records: list[Record] = []
        self._writes = writes  # False for all processes but the first
        self._path = run / "metrics.jsonl"
        self._sinks: list[Any] = []
        if wandb and writes:
            self._sinks.append(_WandB(run, wandb, config or {}))
        if tensorboard and writes:
            self._sinks.append(_TensorBoard(run, step))
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                try:
                    record = parse_json(line)
                except ValueError:
                    break  # torn by a kill; the checkpoint is older
                if record["step"] <= step:
                    self.records.append(record)
        self._file: Any = None
        self._rewrite()

    def write(self, record: Record) -> None:
        """Adds the record of the next step."""
        self.records.append(record)
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        for sink in self._sinks:
            sink.write(scalars(record), record["step"])

    def amend(self, more: Record) -> None:
        """Adds values to the last record."""
        if more:
            self.records[-1].update(more)
            self._rewrite()
            for sink in self._sinks:
                sink.write(scalars(more), self.records[-1]["step"])

    def flush(self) -> None:
        """Writes all records, if the file does not have them."""
        if self._file is None:
            self._rewrite()

    def _rewrite(self) -> None:
        if not self._writes:
            return
        if self._file is not None:
            self._file.close()
        write_file(self._path, "".join(json.dumps(record) + "\n" for record in self.records))
        if not in_bucket(self._path):
            self._file = open(os.fspath(self._path), "a")  # noqa: SIM115  # closed by __exit__

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
        for sink in self._sinks:
            sink.close()


class _TensorBoard:
    def __init__(self, run: epath.Path, step: int):
        from tensorboardX import SummaryWriter

        try:
            # Hides what an earlier process wrote past the checkpoint. The suffix tells files of one second apart.
            folder = os.fspath(run / "tensorboard")
            self._writer = SummaryWriter(folder, purge_step=step + 1, filename_suffix=f".from-{step}")
        except ImportError as error:
            raise UserError(
                f"TensorBoard cannot write to {run} ({error}): pip install google-cloud-storage, or tensorboard=False"
            ) from None

    def write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run: epath.Path, project: str, config: Record):
        check_wandb(project)
        import wandb

        # One id a folder, so that a resumed run is the same run there.
        id = hashlib.sha256(os.fspath(run.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(project=project, name=run.name, id=id, resume="allow", config=config)

    def write(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def check_wandb(project: str) -> None:
    """Raises UserError if a project is named and W&B is not installed."""
    if project:
        try:
            import wandb  # noqa: F401  # asked for, not used here
        except ImportError:
            raise UserError(
                f"wandb={project} asks for Weights & Biases, which is not installed: pip install wandb, or leave it out"
            ) from None


def plot(records: list[Record], path: epath.Path) -> None:
    """A PNG of a run: loss and accuracy by level, and the measured acceptance length, over tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    tokens = np.cumsum([record["tokens"] for record in records]) / 1e6
    window = max(1, len(records) // 100)
    smooth = np.ones(window) / window
    for axes, name in zip(figure.subplots(1, 3), ("level_loss", "accuracy", "tau"), strict=True):
        axes.set_xlabel("training tokens, millions")
        axes.grid(alpha=0.3)
        if name == "tau":
            keys = {key for record in records for key in record}
            measured = sorted(key for key in keys if key.startswith("tau ") or key == "held-out length")
            axes.set_title("acceptance length" if measured else "acceptance length: not measured")
            for key in measured:
                points = [(t, record[key]) for t, record in zip(tokens, records, strict=True) if key in record]
                axes.plot(*zip(*points, strict=True), marker="o", label=key.removeprefix("tau "))
            if measured:
                axes.legend()
            continue
        axes.set_title(name.replace("_", " "))
        for level, values in enumerate(np.array([record[name] for record in records], float).T, 1):
            axes.plot(tokens[window - 1 :], np.convolve(values, smooth, "valid"), label=f"level {level}")
        axes.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    path.write_bytes(image.getvalue())
