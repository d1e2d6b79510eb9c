"""The drafters that come with the package, found by the target that they were trained for, or by one like it."""

from __future__ import annotations

from pathlib import Path

from fasteagle_jax.drafters.files import TOKENIZER, read_config, read_raw
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.checkpoint import Checkpoint, fingerprint
from fasteagle_jax.targets.tokenizer import load_tokenizer, vocabulary_fingerprint

SHIPPED = "shipped"
FOLDER = Path(__file__).parents[1] / "drafters" / "weights"
SIZES = ("hidden_size", "vocab_size", "num_heads", "num_kv_heads", "head_dim")  # of the target and, with it, a drafter


def shipped(target_fingerprint: str) -> Path | None:
    """The folder of the drafter for the target of a fingerprint; None if none comes with the package."""
    for folder in _folders():
        if read_config(folder)[1] == target_fingerprint:
            return folder
    return None


def shipped_for_another(checkpoint: Checkpoint) -> Path | None:
    """The folder of a drafter whose target had these sizes and this tokenizer, and other weights; None if none comes.

    Such a target is the same one in other storage, whose values are rounded otherwise, or a fine-tune: its guesses are
    accepted about as often, or less. What is decoded stays the target's own.
    """
    vocabulary = None
    for folder in _folders():
        config, mark = read_config(folder)[0], read_raw(folder).get(TOKENIZER)
        if mark is None or any(getattr(config, name) != getattr(checkpoint.config, name) for name in SIZES):
            continue
        try:
            config.check_target(checkpoint.config)
            vocabulary = vocabulary or vocabulary_fingerprint(load_tokenizer(checkpoint.path))
        except UserError:  # too few layers; no tokenizer
            continue
        if mark == vocabulary:
            return folder
    return None


def drafter_folder(drafter: str | Path | None, checkpoint: Checkpoint) -> Path | None:
    """The folder that a drafter is read from: `shipped` is the target's that comes with the package, if one does.

    Else it is one of a target alike, of which reading it warns. Raises UserError if there is no such folder.
    """
    if drafter is None:
        return None
    if str(drafter) == SHIPPED:
        return shipped(fingerprint(checkpoint)) or shipped_for_another(checkpoint)
    if not Path(drafter).is_dir():
        raise UserError(f"no folder {drafter}: name a drafter's folder")
    return Path(drafter)


def _folders() -> list[Path]:
    return [config.parent for config in sorted(FOLDER.glob("*/config.json"))]
