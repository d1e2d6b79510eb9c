"""The model card of a drafter: the README.md that the hub shows, from what its training run recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard, ModelCardData

from fasteagle_jax.training.metrics_log import Record

TEMPLATE = Path(__file__).with_suffix(".md")
ROWS = 8  # of the training curve
TITLES = {"fasteagle": "FastEagle", "eagle3": "EAGLE-3"}


def model_card(
    config: dict[str, Any], records: Sequence[Record], num_parameters: int, storage: str, licence: str = ""
) -> str:
    """A drafter's README.md, with the hub's metadata in front.

    Args:
      config: the drafter's config.json, with `trained`.
      records: of the run's metrics.jsonl, up to the drafter's step.
      num_parameters: of the drafter.
      storage: the dtype that its matrices are stored in.
      licence: an identifier that the hub knows, such as apache-2.0; empty if nobody named one.
    """
    entry = config["trained"]
    run = entry["run"]
    total = entry.get("total_tokens", entry["tokens"])
    kind = config.get("kind", "fasteagle")
    of_hub = run["target"].count("/") == 1
    data = ModelCardData(
        library_name="fasteagle-jax",
        license=licence or None,
        base_model=run["target"] if of_hub else None,
        tags=["speculative-decoding", "jax", kind],
    )
    measured_step, measured = _measured(records)
    evaluation = run["evaluation"]
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=TITLES[kind],
        target=run["target"],
        fingerprint=config["target_fingerprint"],
        parameters=_millions(num_parameters),
        levels=config["num_levels"],
        storage=storage,
        draft_vocab=config["draft_vocab_size"],
        vocab=config["vocab_size"],
        tokens=_millions(entry["tokens"]),
        steps=entry["steps"],
        batch=run["batch_size"],
        length=run["length"],
        total="" if total == entry["tokens"] else f"; with the runs before it, {_millions(total)}",
        data=", ".join(f"`{name}`" for name in run["data"]),
        optimizer=f"{run['optimizer']['name']}, learning rate {run['optimizer']['learning_rate']:g}",
        curve=_curve(records),
        measured=measured,
        measured_step=measured_step,
        prompts=evaluation["limit"],
        questions=evaluation["prompts"],
        licence=licence or f"None is named here. The target's own, {run['target']}'s, binds what was made with it.",
    )
    return str(card.content)


def _millions(count: int | None) -> str:
    """A count in words: 1.07M, or all its digits below 10,000."""
    if count is None:
        return "an unknown number"
    return f"{count / 1e6:.2f}M" if count >= 10_000 else str(count)


def _curve(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Up to ROWS rows of equal parts of the run: step, tokens so far, mean accuracy by level."""
    rows, tokens = [], 0
    for part in np.array_split(np.arange(len(records)), min(ROWS, len(records))):
        of_part = [records[i] for i in part]
        tokens += sum(record["tokens"] for record in of_part)
        accuracy = np.asarray([record["accuracy"] for record in of_part], float)  # None becomes NaN
        means = " ".join(f"{value:.2f}" for value in np.nanmean(accuracy, axis=0))
        rows.append({"step": of_part[-1]["step"], "tokens": _millions(tokens), "accuracy": means})
    return rows


def _measured(records: Sequence[Record]) -> tuple[int | None, list[tuple[str, float]]]:
    """The last step whose acceptance length was measured, and the length by tree and temperature."""
    for record in reversed(records):
        found = [(name.removeprefix("tau "), value) for name, value in record.items() if name.startswith("tau ")]
        if found:
            return record["step"], found
    return None, []
