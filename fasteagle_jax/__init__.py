"""FastEagle in JAX: lossless speculative decoding, and the training of its drafters.

The names below are loaded when they are first used: importing the package does no work.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasteagle_jax.engine.engine import Engine
    from fasteagle_jax.engine.requests import Completion, SamplingParams
    from fasteagle_jax.errors import UserError
    from fasteagle_jax.targets.templates import ChatOptions

_HOMES = {
    "ChatOptions": "targets.templates",
    "Completion": "engine.requests",
    "Engine": "engine.engine",
    "SamplingParams": "engine.requests",
    "UserError": "errors",
}

__all__ = ["ChatOptions", "Completion", "Engine", "SamplingParams", "UserError"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
