"""The drafters that come with the package, found by the fingerprint of the target that they were trained for."""

from __future__ import annotations

from pathlib import Path

from fasteagle_jax.drafters.files import read_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.checkpoint import Checkpoint, fingerprint

SHIPPED = "shipped"
FOLDER = Path(__file__).parents[1] / "drafters" / "weights"


def shipped(target_fingerprint: str) -> Path | None:
    """The folder of the drafter for the target of a fingerprint; None if none comes with the package."""
    for config in sorted(FOLDER.glob("*/config.json")):
        if read_config(config.parent)[1] == target_fingerprint:
            return config.parent
    return None


def drafter_folder(drafter: str | Path | None, checkpoint: Checkpoint) -> Path | None:
    """The folder that a drafter is read from: `shipped` is the target's that comes with the package, if one does.

    Raises UserError if there is no such folder.
    """
    if drafter is None:
        return None
    if str(drafter) == SHIPPED:
        return shipped(fingerprint(checkpoint))
    if not Path(drafter).is_dir():
        raise UserError(f"no folder {drafter}: name a drafter's folder")
    return Path(drafter)
