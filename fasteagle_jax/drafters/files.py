"""A finished drafter on disk: model.safetensors and config.json in one folder.

A drafter's class names its stored tensors, and says which of them are transposed to torch's [out, in]. EAGLE-3's have
its authors' names, and so has a reduced draft vocabulary: `d2t`, offsets from draft ids to the target's, and `t2d`, a
mask; its config.json has their keys beside ours. The target's frozen head and embedding are not stored. `config.json`
has a fingerprint of the target's weights, so that use with another target is noticed, and the SHA-256 of
model.safetensors, so that a damaged file is.

Matrices may be stored in bfloat16, or in int8 with a float32 scale for each row (an output) under the matrix's name and
`_scale`, as compressed-tensors names them; config.json then has its entry. Those whose relative error in int8 would
exceed MAX_INT8_RELATIVE_ERROR are stored in bfloat16, such as fc, whose columns differ much in size. Storage changes
guesses alone: what is decoded stays the target's own.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fasteagle_jax.devices.sharding import make_on, place
from fasteagle_jax.drafters.base import DrafterConfig
from fasteagle_jax.drafters.table import CLASSES, class_named, class_of
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import new_folder, sha256
from fasteagle_jax.io.text import parse_json
from fasteagle_jax.nn.linear import to_int8, to_rows
from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.nn.transformer import stacks_are_faster

FORMAT = 2  # of folders, the newest; one without a number is of the first. docs/format.md says what they mean
TENSORS = "model.safetensors"
TOKENIZER = "target_tokenizer"  # entry of config.json: tokenizer.vocabulary_fingerprint of the target's
STORAGE = ("float32", "bfloat16", "int8")
MAX_INT8_RELATIVE_ERROR = 0.01  # root mean square of the rounding error over that of the matrix
_SCALES = ("_scale", ".scale")  # behind a matrix's name; the latter in format 1

log = logging.getLogger(__name__)


def save_drafter(
    drafter: Any, folder: str | os.PathLike[str], fingerprint: str, info: dict[str, Any], storage: str = "float32"
) -> None:
    """Writes a drafter to a new folder, whole or not at all.

    The scale of the features is folded into fc. `info` is added to config.json. `storage`, one of STORAGE, is the dtype
    of stored matrices; float32 leaves them as they are.
    Raises UserError if the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists: name another output folder, or remove it")
    with new_folder(folder) as aside:
        stored = to_storage(tensors_of(drafter), storage)
        save_file(stored, aside / TENSORS)
        rounded = quantization_config(stored)
        text = json.dumps(
            {
                "architectures": [drafter.architecture],
                "format": FORMAT if rounded else 1,
                **drafter.published(),
                **dataclasses.asdict(drafter.config),
                "target_fingerprint": fingerprint,
                "sha256": sha256(aside / TENSORS),
                **({"quantization_config": rounded} if rounded else {}),
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

    For `stacked` and `mesh` see targets.loading.load_target. A target of the same sizes but other weights (a fine-tune,
    other storage) is a warning, or with `strict` a UserError: what is decoded stays exact, but fewer guesses may be
    accepted. A folder without a drafter, a damaged file and a target of other sizes are always a UserError.
    """
    folder = Path(folder)
    raw = read_raw(folder)
    config, trained_for = _config_of(raw, folder)
    path, digest = folder / TENSORS, raw.get("sha256")  # None in folders of older versions
    for name in ("hidden_size", "vocab_size"):
        if getattr(config, name) != getattr(target_config, name):
            theirs = getattr(target_config, name)
            raise UserError(
                f"the drafter in {folder} has {name} {getattr(config, name)}, the target {theirs}: "
                "use the target that it was trained for"
            )
    config = config.for_target(target_config)
    config.check_target(target_config)
    if trained_for != fingerprint:
        difference = (
            f"the drafter in {folder} was trained for target {trained_for}, this one's weights are {fingerprint}"
        )
        if strict:
            raise UserError(f"{difference}: use that target, or train a drafter for this one")
        log.warning("%s: answers stay exact, but fewer guesses may be accepted", difference)
    try:
        found = sha256(path)
        if digest not in (None, found):
            raise UserError(
                f"{path} has the SHA-256 {found[:16]}..., its config.json says {str(digest)[:16]}...: copy it again"
            )
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the drafter again") from None
    draft_vocabulary_ids(tensors, config.vocab_size, str(path))

    if stacked is None:
        stacked = stacks_are_faster(jax.default_backend())

    def make() -> Any:
        return class_of(config)(config, jax.random.key(0), dtype, stacked=False)

    values = from_storage(tensors)
    _check_shapes(jax.eval_shape(make), values, str(path))  # before memory is taken for what config.json claims
    drafter = make_on(mesh, make)
    if not stacked and mesh is None:
        to_rows(drafter)
    fill(drafter, values, str(path))
    return drafter if not stacked else make_on(mesh, lambda drafter: drafter.stacked_form(), drafter)


def draft_vocabulary_ids(tensors: Mapping[str, np.ndarray], vocab_size: int, source: str) -> np.ndarray | None:
    """The target's ids, int64 [V], of a reduced draft vocabulary by `d2t`; None without one.

    UserError, naming `source` and the first bad row, unless they are increasing ids of the target's, those of `t2d` if
    it is there.
    """
    if "d2t" not in tensors:
        return None
    offsets = tensors["d2t"]
    if offsets.ndim != 1 or not np.issubdtype(offsets.dtype, np.integer):
        raise UserError(f"{source}: d2t is {offsets.dtype} {offsets.shape}: take the drafter as it was published")
    ids = np.arange(len(offsets)) + offsets.astype(np.int64)
    if ids.max(initial=0) >= vocab_size:
        raise UserError(
            f"{source}: it guesses tokens up to {ids.max()}, the target has {vocab_size}: "
            "name the target that it was trained for"
        )
    if (wrong := np.flatnonzero(np.diff(ids, prepend=-1) <= 0)).size:
        raise UserError(
            f"{source}: d2t maps row {wrong[0]} to token {ids[wrong[0]]}, which is none or does not follow the row "
            "before's: take the drafter as it was published"
        )
    if (mask := tensors.get("t2d")) is not None:
        expected = np.isin(np.arange(vocab_size), ids)
        if mask.shape != expected.shape:
            raise UserError(f"{source}: t2d is of {mask.shape} tokens, the target has {vocab_size}: name its target")
        if (wrong := np.flatnonzero(mask.astype(bool) != expected)).size:
            raise UserError(f"{source}: t2d and d2t disagree on token {wrong[0]}: take the drafter as it was published")
    return ids


def read_config(folder: Path) -> tuple[DrafterConfig, str]:
    """The configuration of the drafter in a folder, and its target's fingerprint; UserError if there is no drafter."""
    return _config_of(read_raw(folder), folder)


def fill(drafter: Any, tensors: Mapping[str, np.ndarray], source: str) -> None:
    """Sets an unstacked drafter's variables, in their shards; UserError, naming `source`, if the tensors do not fit."""
    _check_shapes(drafter, tensors, source)
    for name, variable, transposed in drafter.stored():
        value = tensors[name].T if transposed else tensors[name]
        if name == "d2t":
            value = value + np.arange(len(value))
        sharding, dtype = variable[...].sharding, variable[...].dtype
        on_mesh = isinstance(sharding, NamedSharding)
        variable[...] = place(value.astype(dtype), sharding, value.shape) if on_mesh else jnp.asarray(value, dtype)


def _check_shapes(drafter: Any, tensors: Mapping[str, np.ndarray], source: str) -> None:
    """Raises UserError, naming `source`, for tensors that do not fit an unstacked drafter, or its shapes."""
    derived = {"t2d"}  # follows from d2t
    expected = {t.name: t.variable.shape[::-1] if t.transposed else t.variable.shape for t in drafter.stored()}
    found = {name: value.shape for name, value in tensors.items() if name not in derived}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))
        raise UserError(f"{source} does not fit its config.json: {', '.join(f'{n} {s}' for n, s in wrong)}")


def tensors_of(drafter: Any) -> dict[str, np.ndarray]:
    """A drafter's tensors by their stored names, in the drafter's dtype."""
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


def to_storage(tensors: Mapping[str, np.ndarray], storage: str) -> dict[str, np.ndarray]:
    """Tensors with their matrices in `storage`, one of STORAGE; float32 leaves them as they are."""
    stored: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if value.ndim != 2 or storage == "float32":
            stored[name] = value
            continue
        columns, column_scale = to_int8(value.T)
        rounded, scale = np.ascontiguousarray(columns.T), column_scale[:, None]  # int8 [out, in], float32 [out, 1]
        error = np.linalg.norm(rounded * scale - value)
        if storage == "int8" and error <= MAX_INT8_RELATIVE_ERROR * np.linalg.norm(value):
            stored[name], stored[name + _SCALES[0]] = rounded, scale
        else:
            stored[name] = value.astype(jnp.bfloat16)
    return stored


def from_storage(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that were `to_storage`, int8 matrices as float32."""
    scale_of = {name: _scale_of(name, stored) for name in stored}
    return {
        name: value if scale_of[name] is None else value * stored[str(scale_of[name])].astype(np.float32)
        for name, value in stored.items()
        if name not in scale_of.values()
    }


def _scale_of(name: str, stored: Mapping[str, np.ndarray]) -> str | None:
    """The name of a tensor's scale; None if it has none."""
    return next((name + suffix for suffix in _SCALES if name + suffix in stored), None)


def quantization_config(stored: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """What compressed-tensors says of tensors of which some are int8; None if none is."""
    matrices = [name for name, value in stored.items() if value.ndim == 2 and _scale_of(name, stored)]
    if not matrices:
        return None
    others = [
        name.removesuffix(".weight")
        for name, value in stored.items()
        if value.ndim == 2 and name not in matrices and not name.endswith(_SCALES)
    ]
    return int8_scheme("int-quantized", others)


def int8_scheme(form: str, ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of int8 matrices with a scale a row, activations as they are.

    `form` is compressed-tensors' name of the format, `ignore` names or patterns (re:...) of what stays in floats.
    """
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }


def pack(values: np.ndarray) -> np.ndarray:
    """int32 [out, in / 4] of int8 [out, in], as compressed-tensors has it: plus 128, the first in the lowest byte."""
    return (values.astype(np.int16) + 128).astype(np.uint8).view("<i4")


def unpack(packed: np.ndarray) -> np.ndarray:
    """int8 [out, in] that were `pack`ed."""
    return (np.ascontiguousarray(packed, "<i4").view(np.uint8).astype(np.int16) - 128).astype(np.int8)


def _config_of(raw: dict[str, Any], folder: Path) -> tuple[DrafterConfig, str]:
    path = folder / "config.json"
    if (number := raw.get("format", 1)) not in range(1, FORMAT + 1):
        raise UserError(f"{path} is of format {number}, this version reads up to {FORMAT}: update fasteagle-jax")
    if "target_fingerprint" not in raw:
        raise UserError(f"{path} names no target: bring the drafter in with fasteagle import")
    try:
        return config_from(raw), str(raw["target_fingerprint"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): copy the drafter again") from None


def config_from(raw: Mapping[str, Any]) -> DrafterConfig:
    """The configuration whose fields are among a JSON object's; KeyError, TypeError or AttributeError for others."""
    kind_config = class_named(str(raw.get("kind", "fasteagle"))).Config
    fields = {field.name for field in dataclasses.fields(kind_config)}
    sizes = {name: value for name, value in raw.items() if name in fields}
    if sizes["rope"] is not None:  # a layer of the target without rotation is read
        rope: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in sizes["rope"].items()}
        sizes["rope"] = RopeConfig(**rope)
    sizes["feature_layers"] = tuple(sizes["feature_layers"])
    for name in ("attention_scale", "soft_cap"):
        if not isinstance(sizes.get(name), int | float | None):
            raise TypeError(f"{name} is no number")
    config: DrafterConfig = kind_config(**sizes)
    return config


def read_raw(folder: Path) -> dict[str, Any]:
    """The entries of the config.json of the drafter in a folder; UserError if there is no drafter."""
    path = folder / "config.json"
    try:
        raw = parse_json(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no config.json: name a drafter's folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the drafter again") from None
    known = {kind.architecture for kind in CLASSES.values()}
    named = raw.get("architectures") if isinstance(raw, dict) else None
    if not isinstance(named, list) or not any(name in known for name in named if isinstance(name, str)):
        raise UserError(f"{path} is not of a {' or '.join(sorted(known))}: name a drafter's folder")
    return raw
