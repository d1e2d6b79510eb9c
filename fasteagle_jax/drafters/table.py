"""The drafters there are: a newcomer's is a file of its own and a line here.

A class takes (DrafterConfig, key, dtype, *, stacked) and is an `interfaces.Drafter`; training asks of it besides
`start_from`, `hidden_states` and `own_head`, as FastEagle has them; files ask for `unstacked` and `stacked_form`.
"""

from __future__ import annotations

from typing import Any

from fasteagle_jax.drafters.base import DrafterConfig
from fasteagle_jax.drafters.eagle3 import Eagle3
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.errors import UserError

CLASSES: dict[str, Any] = {"fasteagle": FastEagle, "eagle3": Eagle3}  # by DrafterConfig.kind


def class_of(config: DrafterConfig) -> Any:
    """The class of a drafter's kind; UserError for one that is not known."""
    if config.kind not in CLASSES:
        raise UserError(f"drafter kind {config.kind!r} is not known: use one of {', '.join(CLASSES)}")
    return CLASSES[config.kind]
