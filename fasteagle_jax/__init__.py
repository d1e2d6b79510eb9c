"""FastEagle in JAX: lossless speculative decoding, and the training of its drafters.

The names below are loaded when they are first used: importing the package does no work.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasteagle_jax.engine import Engine
    from fasteagle_jax.errors import UserError
    from fasteagle_jax.requests import Completion, SamplingParams

_HOMES = {"Engine": "engine", "UserError": "errors", "Completion": "requests", "SamplingParams": "requests"}

__all__ = ["Completion", "Engine", "SamplingParams", "UserError"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
