"""A finished drafter on disk: model.safetensors and config.json in one folder.

Tensors are torch's way around, [out, in]; levels are numbered from 0. EAGLE-3's have the names that its authors gave
them, and a reduced draft vocabulary as they store it: `d2t`, offsets from draft ids to the target's, and `t2d`, a mask.
The target's frozen head and embedding are not stored. `config.json` names the target by a fingerprint of its weights,
so that a drafter is never used with another.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fasteagle_jax.config import DrafterConfig, LlamaConfig, RopeConfig
from fasteagle_jax.drafters.table import AXES, class_of
from fasteagle_jax.errors import UserError
from fasteagle_jax.files import sync
from fasteagle_jax.sharding import make_on, place

ARCHITECTURES = {"fasteagle": "FastEagleDrafter", "eagle3": "LlamaForCausalLMEagle3"}  # by kind

_LEVEL = {  # name in the file: attribute path of a Level, transposed
    "input_layernorm.weight": (("layer", "input_norm"), False),
    "self_attn.q_proj.weight": (("layer", "q"), True),
    "self_attn.k_proj.weight": (("layer", "k"), True),
    "self_attn.v_proj.weight": (("layer", "v"), True),
    "self_attn.o_proj.weight": (("layer", "o"), True),
    "post_attention_layernorm.weight": (("layer", "mlp_norm"), False),
    "mlp.gate_proj.weight": (("layer", "gate"), True),
    "mlp.up_proj.weight": (("layer", "up"), True),
    "mlp.down_proj.weight": (("layer", "down"), True),
    "norm.weight": (("norm",), False),
    "reinject.weight": (("reinject",), True),
}

_EAGLE3 = {  # name in the file: attribute, transposed
    "fc.weight": ("fc", True),
    "midlayer.input_layernorm.weight": ("embedding_norm", False),
    "midlayer.hidden_norm.weight": ("hidden_norm", False),
    "midlayer.self_attn.q_proj.weight": ("q", True),
    "midlayer.self_attn.k_proj.weight": ("k", True),
    "midlayer.self_attn.v_proj.weight": ("v", True),
    "midlayer.self_attn.o_proj.weight": ("o", True),
    "midlayer.post_attention_layernorm.weight": ("mlp_norm", False),
    "midlayer.mlp.gate_proj.weight": ("gate", True),
    "midlayer.mlp.up_proj.weight": ("up", True),
    "midlayer.mlp.down_proj.weight": ("down", True),
    "norm.weight": ("norm", False),
    "lm_head.weight": ("head", False),
}


def save_drafter(drafter: Any, folder: str | os.PathLike[str], fingerprint: str, info: dict[str, Any]) -> None:
    """Writes a drafter to a new folder, whole or not at all.

    The scale of the features is folded into fc. `info` goes into config.json beside the sizes.
    Raises UserError where the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists: name another output folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(_tensors(drafter), aside / "model.safetensors")
        config = dataclasses.asdict(drafter.config)
        text = json.dumps(
            {
                "architectures": [ARCHITECTURES[drafter.config.kind]],
                **config,
                "target_fingerprint": fingerprint,
                **info,
            },
            indent=2,
        )
        (aside / "config.json").write_text(text + "\n")
        for file in aside.iterdir():
            sync(file)
        os.rename(aside, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def load_drafter(
    folder: str | os.PathLike[str],
    target_config: LlamaConfig,
    fingerprint: str,
    dtype: Any = jnp.float32,
    *,
    stacked: bool | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """The drafter in `folder`, for the target of this configuration and fingerprint.

    `stacked` and `mesh` are as of targets.loading.load_target. Raises UserError for a folder that is not a drafter, a
    damaged file, or a drafter for another target.
    """
    folder = Path(folder)
    config, made_for = read_config(folder)
    for name in ("hidden_size", "vocab_size"):
        if getattr(config, name) != getattr(target_config, name):
            theirs = getattr(target_config, name)
            raise UserError(
                f"the drafter in {folder} has {name} {getattr(config, name)}, the target {theirs}: "
                "use the target that it was trained for"
            )
    if made_for != fingerprint:
        raise UserError(
            f"the drafter in {folder} was trained for target {made_for}, this one's weights are {fingerprint}: "
            "use that target, or train a drafter for this one"
        )
    try:
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'model.safetensors'} cannot be read ({error}): copy the drafter again") from None

    if stacked is None:
        stacked = jax.default_backend() != "cpu"
    drafter = make_on(mesh, AXES, lambda: class_of(config)(config, jax.random.key(0), dtype, stacked=False))
    fill(drafter, tensors, str(folder / "model.safetensors"))
    return drafter if not stacked else make_on(mesh, AXES, lambda drafter: drafter.stacked_form(), drafter)


def fill(drafter: Any, tensors: Mapping[str, np.ndarray], source: str) -> None:
    """Puts stored tensors into an unstacked drafter, where its arrays are; UserError, with `source`, for misfits."""
    derived = {"t2d"}  # what d2t says
    expected = {name: param.shape[::-1] if transposed else param.shape for name, param, transposed in _places(drafter)}
    found = {name: value.shape for name, value in tensors.items() if name not in derived}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))
        raise UserError(f"{source} does not fit its config.json: {', '.join(f'{n} {s}' for n, s in wrong)}")
    for name, param, transposed in _places(drafter):
        value = tensors[name].T if transposed else tensors[name]
        if name == "d2t":
            value = value + np.arange(len(value))
        sharding, dtype = param[...].sharding, param[...].dtype
        on_mesh = isinstance(sharding, NamedSharding)
        param[...] = place(value.astype(dtype), sharding, value.shape) if on_mesh else jnp.asarray(value, dtype)


def read_config(folder: Path) -> tuple[DrafterConfig, str]:
    """The sizes of the drafter in a folder, and the fingerprint of its target; UserError where it is none."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no config.json: name a drafter's folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the drafter again") from None
    known = set(raw.get("architectures", ())) & set(ARCHITECTURES.values()) if isinstance(raw, dict) else set()
    if not known:
        raise UserError(f"{path} is not of a {' or '.join(ARCHITECTURES.values())}: name a drafter's folder")
    if "target_fingerprint" not in raw:
        raise UserError(f"{path} names no target: bring the drafter in with fasteagle import")
    fields = {field.name for field in dataclasses.fields(DrafterConfig)}
    sizes = {name: value for name, value in raw.items() if name in fields}
    sizes["rope"] = RopeConfig(**sizes["rope"])
    sizes["feature_layers"] = tuple(sizes["feature_layers"])
    return DrafterConfig(**sizes), str(raw["target_fingerprint"])


def _places(drafter: Any) -> list[tuple[str, Any, bool]]:
    """(name in the file, parameter, transposed) of every stored tensor of an unstacked drafter."""
    if drafter.config.kind == "eagle3":
        own = [(name, getattr(drafter, attribute), turned) for name, (attribute, turned) in _EAGLE3.items()]
        return own if drafter.token_ids is None else [*own, ("d2t", drafter.token_ids, False)]
    places: list[tuple[str, Any, bool]] = [("fc.weight", drafter.fc, True), ("fuse.weight", drafter.fuse, True)]
    if drafter.token_ids is not None:
        places.append(("token_ids", drafter.token_ids, False))
    for i, level in enumerate(drafter.levels):
        for name, (path, transposed) in _LEVEL.items():
            param = level
            for attribute in path:
                param = getattr(param, attribute)
            if param is not None:
                places.append((f"levels.{i}.{name}", param, transposed))
    return places


def _tensors(drafter: Any) -> dict[str, np.ndarray]:
    drafter = drafter.unstacked()
    tensors = {}
    for name, param, transposed in _places(drafter):
        value = np.asarray(param[...])
        if name == "fc.weight":
            value = (value.astype(np.float32) * np.asarray(drafter.feature_scale[...])[:, None]).astype(value.dtype)
        if name == "d2t":
            tensors["t2d"] = np.isin(np.arange(drafter.config.vocab_size), value)
            value = (value - np.arange(len(value))).astype(np.int64)
        tensors[name] = np.ascontiguousarray(value.T if transposed else value)
    return tensors
