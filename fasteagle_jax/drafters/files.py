"""A finished drafter on disk: model.safetensors and config.json in one folder.

A drafter's class says under which names its tensors are stored, and which of them torch's way around, [out, in].
EAGLE-3's have the names that its authors gave them, and a reduced draft vocabulary as they store it: `d2t`, offsets
from draft ids to the target's, and `t2d`, a mask; its config.json has their keys beside ours. The target's frozen head
and embedding are not stored. `config.json` names the target by a fingerprint of its weights, so that use with another
is noticed, and holds the SHA-256 of model.safetensors, so that a damaged file is found out.

Matrices may be stored smaller than they are computed with: in bfloat16, or in int8 with a float32 scale a row (an
output), under the matrix's name and `.scale`, except those whose relative error would exceed MAX_INT8_RELATIVE_ERROR,
such as fc, whose columns differ much in size. Only guesses depend on it: what is decoded stays the target's own.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fasteagle_jax.devices.sharding import make_on, place
from fasteagle_jax.drafters.base import DrafterConfig, check_features
from fasteagle_jax.drafters.table import CLASSES, class_named, class_of
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import new_folder, sha256
from fasteagle_jax.nn.linear import to_rows
from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.nn.transformer import stacks_are_faster

TENSORS = "model.safetensors"
STORAGE = ("float32", "bfloat16", "int8")
MAX_INT8_RELATIVE_ERROR = 0.01  # root mean square of what rounding to int8 adds, over that of the matrix
_SCALE = ".scale"

log = logging.getLogger(__name__)


def save_drafter(
    drafter: Any, folder: str | os.PathLike[str], fingerprint: str, info: dict[str, Any], storage: str = "float32"
) -> None:
    """Writes a drafter to a new folder, whole or not at all.

    The scale of the features is folded into fc. `info` goes into config.json beside the sizes. `storage`, one of
    STORAGE, is how matrices are stored; float32 means as they are.
    Raises UserError where the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists: name another output folder, or remove it")
    with new_folder(folder) as aside:
        save_file(packed(tensors_of(drafter), storage), aside / TENSORS)
        text = json.dumps(
            {
                "architectures": [drafter.architecture],
                **drafter.published(),
                **dataclasses.asdict(drafter.config),
                "target_fingerprint": fingerprint,
                "sha256": sha256(aside / TENSORS),
                **info,
            },
            indent=2,
        )
        (aside / "config.json").write_text(text + "\n")


def load_drafter(
    folder: str | os.PathLike[str],
    target_config: Any,
    fingerprint: str,
    dtype: Any = jnp.float32,
    *,
    stacked: bool | None = None,
    mesh: Mesh | None = None,
    strict: bool = False,
) -> Any:
    """The drafter in `folder`, for the target of this configuration and fingerprint.

    `stacked` and `mesh` are as of targets.loading.load_target. A target of the same sizes but of other weights (a
    fine-tune, other storage) is a warning: what is decoded stays exact, and fewer guesses may be accepted. `strict`
    makes it a UserError, as a folder that is not a drafter, a damaged file, or a target of other sizes always are.
    """
    folder = Path(folder)
    raw = _raw(folder)
    config, made_for = _config_of(raw, folder)
    path, stated = folder / TENSORS, raw.get("sha256")  # folders of older versions do not say
    for name in ("hidden_size", "vocab_size"):
        if getattr(config, name) != getattr(target_config, name):
            theirs = getattr(target_config, name)
            raise UserError(
                f"the drafter in {folder} has {name} {getattr(config, name)}, the target {theirs}: "
                "use the target that it was trained for"
            )
    check_features(config.feature_layers, target_config.num_layers)
    if made_for != fingerprint:
        difference = f"the drafter in {folder} was trained for target {made_for}, this one's weights are {fingerprint}"
        if strict:
            raise UserError(f"{difference}: use that target, or train a drafter for this one")
        log.warning("%s: answers stay exact, but fewer guesses may be accepted", difference)
    try:
        found = sha256(path)
        if stated not in (None, found):
            raise UserError(
                f"{path} has the SHA-256 {found[:16]}..., its config.json says {stated[:16]}...: copy it again"
            )
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the drafter again") from None

    if stacked is None:
        stacked = stacks_are_faster(jax.default_backend())
    drafter = make_on(mesh, lambda: class_of(config)(config, jax.random.key(0), dtype, stacked=False))
    if not stacked and mesh is None:
        to_rows(drafter)
    fill(drafter, unpacked(tensors), str(path))
    return drafter if not stacked else make_on(mesh, lambda drafter: drafter.stacked_form(), drafter)


def fill(drafter: Any, tensors: Mapping[str, np.ndarray], source: str) -> None:
    """Puts stored tensors into an unstacked drafter, where its arrays are; UserError, with `source`, for misfits."""
    derived = {"t2d"}  # what d2t says
    stored = drafter.stored()
    expected = {t.name: t.variable.shape[::-1] if t.transposed else t.variable.shape for t in stored}
    found = {name: value.shape for name, value in tensors.items() if name not in derived}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))
        raise UserError(f"{source} does not fit its config.json: {', '.join(f'{n} {s}' for n, s in wrong)}")
    for name, variable, transposed in stored:
        value = tensors[name].T if transposed else tensors[name]
        if name == "d2t":
            value = value + np.arange(len(value))
        sharding, dtype = variable[...].sharding, variable[...].dtype
        on_mesh = isinstance(sharding, NamedSharding)
        variable[...] = place(value.astype(dtype), sharding, value.shape) if on_mesh else jnp.asarray(value, dtype)


def read_config(folder: Path) -> tuple[DrafterConfig, str]:
    """The sizes of the drafter in a folder, and the fingerprint of its target; UserError where it is none."""
    return _config_of(_raw(folder), folder)


def _config_of(raw: dict[str, Any], folder: Path) -> tuple[DrafterConfig, str]:
    path = folder / "config.json"
    if "target_fingerprint" not in raw:
        raise UserError(f"{path} names no target: bring the drafter in with fasteagle import")
    kind_config = class_named(raw.get("kind", "fasteagle")).Config
    fields = {field.name for field in dataclasses.fields(kind_config)}
    sizes = {name: value for name, value in raw.items() if name in fields}
    try:
        sizes["rope"] = RopeConfig(**sizes["rope"])
        sizes["feature_layers"] = tuple(sizes["feature_layers"])
        return kind_config(**sizes), str(raw["target_fingerprint"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): copy the drafter again") from None


def _raw(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no config.json: name a drafter's folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the drafter again") from None
    known = {kind.architecture for kind in CLASSES.values()}
    if not isinstance(raw, dict) or not known & set(raw.get("architectures") or ()):
        raise UserError(f"{path} is not of a {' or '.join(sorted(known))}: name a drafter's folder")
    return raw


def tensors_of(drafter: Any) -> dict[str, np.ndarray]:
    """A drafter's tensors by the names they are stored under, in the drafter's dtype."""
    drafter = drafter.unstacked()
    tensors = {}
    for name, variable, transposed in drafter.stored():
        value = np.asarray(variable[...])
        value = value.T if transposed else value
        if name == "fc.weight":  # [H, F*H]
            value = (value.astype(np.float32) * np.asarray(drafter.feature_scale[...])).astype(value.dtype)
        if name == "d2t":
            tensors["t2d"] = np.isin(np.arange(drafter.config.vocab_size), value)
            value = (value - np.arange(len(value))).astype(np.int64)
        tensors[name] = np.ascontiguousarray(value)
    return tensors


def packed(tensors: Mapping[str, np.ndarray], storage: str) -> dict[str, np.ndarray]:
    """Tensors with their matrices as `storage`, one of STORAGE, has them; float32 leaves them as they are."""
    stored: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if value.ndim != 2 or storage == "float32":
            stored[name] = value
            continue
        largest = np.abs(value.astype(np.float32)).max(axis=1, keepdims=True)
        scale = np.where(largest > 0, largest / 127, np.float32(1))  # [out, 1]
        whole = np.rint(value / scale)
        if storage == "int8" and np.linalg.norm(whole * scale - value) <= MAX_INT8_RELATIVE_ERROR * np.linalg.norm(
            value
        ):
            stored[name], stored[name + _SCALE] = whole.astype(np.int8), scale
        else:
            stored[name] = value.astype(jnp.bfloat16)
    return stored


def unpacked(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What was `packed`, int8 matrices in float32."""
    scales = {name.removesuffix(_SCALE): value for name, value in stored.items() if name.endswith(_SCALE)}
    return {
        name: value * scales[name] if name in scales else value
        for name, value in stored.items()
        if not name.endswith(_SCALE)
    }
