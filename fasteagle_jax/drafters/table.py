"""The table of drafters: a new one is a file of its own and a line here.

A class takes (its `Config`, key, dtype, *, stacked) and is an `interfaces.Drafter`, to be trained an
`interfaces.TrainableDrafter`, and to be stored in files it has what drafters.base.DrafterModule declares, `unstacked`
and `stacked_form`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fasteagle_jax.drafters.base import DrafterConfig, attention_of
from fasteagle_jax.drafters.eagle3 import Eagle3
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.errors import UserError

CLASSES: dict[str, Any] = {"fasteagle": FastEagle, "eagle3": Eagle3}  # by DrafterConfig.kind


def class_named(kind: str) -> Any:
    """The class of drafters of this kind; UserError, listing all kinds, for an unknown one."""
    if kind not in CLASSES:
        raise UserError(f"drafter kind {kind!r} is not known: use one of {', '.join(CLASSES)}")
    return CLASSES[kind]


def class_of(config: DrafterConfig) -> Any:
    """The class of a configuration's drafter; UserError for an unknown kind."""
    return class_named(config.kind)


def default_config(target_config: Any, kind: str = "fasteagle", **changes: Any) -> Any:
    """The configuration of this kind with the target's sizes and `changes`.

    Its layers are plain decoder layers. With context "target" they attend as the target's `context_layer` does, by
    default the last one with full attention.
    Raises UserError for an unknown kind or field, and for feature layers that the target does not have.
    """
    c = target_config
    last = c.num_layers - 1
    sizes = {name: getattr(c, name) for name in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads")}
    sizes |= {name: getattr(c, name) for name in ("head_dim", "rms_norm_eps", "rope", "vocab_size")}
    sizes["draft_vocab_size"] = c.vocab_size
    sizes["feature_layers"] = tuple(min(max(f, 0), last) for f in (2, c.num_layers // 2, c.num_layers - 3))
    kind_config = class_named(kind).Config
    known = [field.name for field in dataclasses.fields(kind_config)]
    if unknown := [name for name in changes if name not in known]:
        raise UserError(f"a drafter of kind {kind} has no {', '.join(unknown)}: it has {', '.join(known)}")
    if changes.get("context") == "target":
        whole = [i for i, kind in enumerate(c.layer_kinds) if kind.window is None]
        layer = changes.get("context_layer", max(whole, default=last))
        sizes |= {"context_layer": layer}
        if 0 <= layer <= last:
            sizes |= attention_of(c, layer)
    config = kind_config(**(sizes | {"kind": kind} | changes))
    config.check_target(c)
    return config
