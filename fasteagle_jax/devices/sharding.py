"""Sharding over a mesh of devices: one table from the models' logical axes to the mesh's, RULES.

Mesh axes: `data` splits batches alone, `fsdp` splits weights and in training batches, `tensor` splits heads, MLPs and
the vocabulary. A weight's logical axes stand beside it; only this file knows mesh axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from fasteagle_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "rows": "data",  # in decoding: if split over fsdp too, every round would all-gather the weights
    "embed": "fsdp",  # H, the stream's width, of weights
    "heads": "tensor",  # the heads x head width of a projection
    "kv_heads": "tensor",  # K, of a cache
    "mlp": "tensor",
    "expert": "tensor",  # E, whole experts
    "fused": "tensor",  # the output of a drafter's own projections
    "vocab": "tensor",
    None: None,
}

Axes = Mapping[str, tuple[str | None, ...]]  # an array's name to the logical axes of its last dimensions


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """The number of devices along each mesh axis; -1, for one of them, takes all that are left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if any(not isinstance(n, int) or (n < 1 and n != -1) for n in sizes) or sizes.count(-1) > 1:
            raise UserError(f"mesh {self}: give whole numbers of at least 1, and -1 (what is left) at most once")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The MeshShape of a text `data,fsdp,tensor` in numbers; UserError for other texts."""
        sizes = [size.strip() for size in text.split(",")]
        if len(sizes) != 3 or not all(size.removeprefix("-").isdecimal() for size in sizes):
            raise UserError(f"mesh {text!r} is not understood: write data,fsdp,tensor, e.g. 1,8,1")
        return cls(*map(int, sizes))

    def __str__(self) -> str:
        return f"data {self.data} x fsdp {self.fsdp} x tensor {self.tensor}"

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """The axes' sizes on `num_devices`; UserError, listing the possible meshes, if they do not fit."""
        given = dataclasses.astuple(self)
        known = math.prod(n for n in given if n > 0)
        data, fsdp, tensor = (num_devices // known if n == -1 else n for n in given)
        if data * fsdp * tensor != num_devices:
            raise UserError(f"mesh {self} does not fit {num_devices} devices: use {_factorisations(num_devices)}")
        return data, fsdp, tensor


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a shape over all devices of all hosts, or over those given; UserError if it does not fit."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = shape.sizes(len(devices))
    # Auto: GSPMD propagates the arguments' shardings and those of `constrain`.
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_heads(mesh: Mesh, target: Any, drafter: Any | None) -> None:
    """Raises UserError, listing sizes that fit, if the mesh's tensor axis does not divide a model's heads of K/V.

    `target` and `drafter` are configurations; no drafter for plain decoding.
    """
    models = {"target": target} if drafter is None else {"target": target, "drafter": drafter}
    heads = {name: config.num_kv_heads for name, config in models.items()}
    for name, number in heads.items():
        _check_divides(mesh, f"the {name}'s {number} heads of K/V", number, math.gcd(*heads.values()))


def check_experts(mesh: Mesh, target: Any) -> None:
    """Raises UserError, listing sizes that fit, if the mesh's tensor axis does not divide a target's experts."""
    number = getattr(target, "num_experts", 0)
    _check_divides(mesh, f"the target's {number} experts", number, number)


def check_blocks(mesh: Mesh, num_in: int, scale: nnx.Variable[Any]) -> None:
    """Raises UserError, listing sizes that fit, if the mesh splits a matrix's inputs, and its blocks of them not alike.

    `scale` [..., blocks, out] has one for each block.
    """
    axis, num_blocks = scale.axes[-2], scale.shape[-2]
    if spec(mesh, [axis], [num_in]) != spec(mesh, [axis], [num_blocks]):
        parts = f"the {num_blocks} blocks of {num_in} inputs that have a scale each in the file"
        _check_divides(mesh, parts, num_blocks, num_blocks, str(RULES[axis]))


def _check_divides(mesh: Mesh, parts: str, number: int, common: int, axis: str = "tensor") -> None:
    size = mesh.shape[axis]
    if number % size:
        fitting = [str(n) for n in range(1, common + 1) if common % n == 0 and mesh.size % n == 0]
        raise UserError(f"{axis} {size} of the mesh does not divide {parts}: use {axis} {', '.join(fitting)}")


def check_batch(mesh: Mesh, batch: int) -> None:
    """Raises UserError if a batch cannot be split over the mesh's data and fsdp axes."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % shards:
        raise UserError(f"batch_size {batch} is not divisible by data x fsdp = {shards}: use a multiple of {shards}")


def spec(mesh: Mesh, logical: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """The PartitionSpec of an array's logical axes; a dimension that its mesh axes do not divide is not split."""
    parts = []
    for axis, size in zip(logical, shape, strict=True):
        if axis not in RULES:
            raise ValueError(f"logical axis {axis!r} is not known: use one of {_known_axes()}")
        names = RULES[axis]
        names = (names,) if isinstance(names, str) else names or ()
        num_shards = math.prod(mesh.shape[name] for name in names)
        parts.append(names if num_shards > 1 and size % num_shards == 0 else None)
    return PartitionSpec(*parts)


def shardings(mesh: Mesh, tree: Any, axes: Axes | None = None) -> Any:
    """A NamedSharding for each array (or ShapeDtypeStruct) of a pytree.

    The logical axes of a weight's last dimensions are its variable's `axes`. Other arrays have those that the argument
    `axes` lists for the last name in their path that is in it. Leading dimensions, of a stack, are not split, and
    arrays not in `axes` are replicated. Raises ValueError for a weight without axes.
    """
    by_name = axes or {}

    def of(logical: Sequence[str | None], x: Any) -> NamedSharding:
        if len(logical) > len(x.shape):
            logical = ()
        return NamedSharding(mesh, spec(mesh, (None,) * (len(x.shape) - len(logical)) + tuple(logical), x.shape))

    def of_leaf(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            own = weight_axes(leaf, jax.tree_util.keystr(path))
            return jax.tree.map(lambda x: of(own, x), leaf)
        known = [name for name in map(_name, path) if name in by_name]
        return of(by_name[known[-1]] if known else (), leaf)

    return jax.tree_util.tree_map_with_path(of_leaf, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def weight_axes(variable: nnx.Variable[Any], name: str) -> tuple[str | None, ...]:
    """The logical axes of a weight's last dimensions; ValueError, with its name, if it has none."""
    if not variable.has_metadata("axes"):
        raise ValueError(f"weight {name} has no logical axes: give its variable axes=(...), of {_known_axes()}")
    return variable.axes


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """The sharding of arrays [B, ...]: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], *[None] * (ndim - 1)))


def row_major(sharding: Sharding, num_dims: int) -> Format:
    """The Format of a weight whose last dimension is innermost in a device's memory.

    A TPU transposes a matrix in memory if that pads its tiles less (13824 columns over 8 devices are no whole number of
    128 each), and every program that multiplies with it would then copy it first.
    """
    return Format(Layout(tuple(range(num_dims))), sharding)


# --- arrays on a mesh -------------------------------------------------------------------------------------------


def make_on(mesh: Mesh | None, make: Callable[..., Any], *args: Any) -> Any:
    """The result of `make(*args)`, on a mesh with its arrays created in their shards."""
    if mesh is None:
        return make(*args)
    return jax.jit(make, out_shardings=shardings(mesh, jax.eval_shape(make, *args)))(*args)


def place_weights(mesh: Mesh, tree: Any, axes: Axes | None = None) -> Any:
    """The weights of a pytree in their `shardings` and `row_major`; those already placed are not copied."""

    def to_row_major(x: Any) -> jax.Array:
        is_row_major = x.format.layout.major_to_minor == tuple(range(x.ndim))
        return x if is_row_major else jax.device_put(x, row_major(x.sharding, x.ndim))

    return jax.tree.map(to_row_major, jax.device_put(tree, shardings(mesh, tree, axes)))


def place_batch(mesh: Mesh | None, make: Callable[[slice], Any], size: int) -> Any:
    """The global batch of `size` rows from `make(rows)`, which returns the rows of a slice as a pytree of NumPy arrays.

    Rows are split over the mesh; each process makes those of its own devices alone.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, make(slice(0, size)))
    indices = batch_sharding(mesh, 1).addressable_devices_indices_map((size,)).values()
    own = sorted({index[0].indices(size)[:2] for index in indices if index is not None})

    def whole(*parts: np.ndarray) -> jax.Array:
        found = dict(zip(own, parts, strict=True))
        shape = (size, *parts[0].shape[1:])
        return place(lambda index: found[index[0].indices(size)[:2]], batch_sharding(mesh, len(shape)), shape)

    return jax.tree.map(whole, *(make(slice(*rows)) for rows in own))


def place(value: np.ndarray | Callable[[Any], np.ndarray], sharding: NamedSharding, shape: Sequence[int]) -> jax.Array:
    """A global array of which each process makes its own shards alone.

    `value` is the whole array, or a function from an index (a tuple of slices) to the part there.
    """
    part = value if callable(value) else lambda index: value[index]
    return jax.make_array_from_callback(tuple(shape), sharding, part)


def process_values(mesh: Mesh | None, value: float) -> np.ndarray:
    """The values float32 of all the mesh's processes, each of which must call this."""
    if mesh is None or len({d.process_index for d in mesh.devices.flat}) == 1:
        return np.asarray([value], np.float32)
    return np.asarray(multihost_utils.process_allgather(np.float32(value)))


def fetch(tree: Any) -> Any:
    """A pytree's arrays as NumPy arrays, whole on every process; all processes must call this."""

    def whole(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            mesh: Any = getattr(x.sharding, "mesh")  # noqa: B009  # only arrays on a mesh are not addressable
            x = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(x)
        return np.asarray(x.addressable_data(0) if isinstance(x, jax.Array) and not x.is_fully_addressable else x)

    return jax.tree.map(whole, tree)


# --- inside a program -------------------------------------------------------------------------------------------


def platform() -> str:
    """The platform that a program is traced for: that of the mesh's (possibly absent) devices, or the default."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """x with its logical axes split by RULES, inside a program under `jax.set_mesh`; elsewhere x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(RULES[axis] is None for axis in logical):
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, logical, x.shape))  # type: ignore[arg-type]


def constrain_all(tree: Any, axes: Axes) -> Any:
    """A pytree with its arrays in their `shardings`, inside a program under `jax.set_mesh`; elsewhere the pytree."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, shardings(mesh, tree, axes))


def training_rows(x: jax.Array, visible: Any) -> jax.Array:
    """x [B, T, H] with its rows over data and fsdp in training, if `visible` is a function; in decoding x.

    Every layer applies this to its output. Without it the compiler splits H like that of the weights, and each device
    computes all rows.
    """
    return constrain(x, "batch", None, None) if callable(visible) else x


def by_shard(function: Callable[..., Any], axes: Mapping[int, tuple[str | None, ...]], *args: Any) -> Any:
    """The result of `function(*args)`, on a mesh under shard_map: each device works on its own shards alone.

    `axes` has the logical axes of arrays by their number of dimensions. The result is split like the first argument.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*args)
    specs = jax.tree.map(lambda x: spec(mesh, axes[x.ndim], x.shape), args)
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*args)


class ExpertShard(NamedTuple):
    """What a device has of a layer with experts, inside `by_experts`."""

    first: Any  # int32 [], the index of its first expert
    sum_width: Callable[[jax.Array], jax.Array]  # products of its part of H, added up over all parts


def by_experts(
    function: Callable[..., jax.Array],
    rows: str,
    experts: Any,
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    index: Any,
) -> jax.Array:
    """The sum over devices of `function(experts, x, chosen, weights, index, shard)`, each given its experts and rows.

    `experts` is a module whose weights' first axis is "expert", after that of a stack if `index`, int32 [], is not
    None; x [B, Q, H], `chosen` and `weights` [B, Q, k] have their rows along the logical axis `rows`. In decoding
    ("rows") H is split as that of the weights, which stay where they are; in training ("batch") each device has whole
    rows, and gathers the width of its experts.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(experts, x, chosen, weights, index, ExpertShard(0, lambda y: y))
    width = "embed" if rows == "rows" else None

    def of_weight(variable: Any) -> Any:
        stacks = (None,) * (index is not None)
        axes = stacks + tuple(width if axis == "embed" else axis for axis in variable.axes)
        return jax.tree.map(lambda w: spec(mesh, axes, w.shape), variable)

    of_experts = jax.tree.map(of_weight, experts, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    of_x = spec(mesh, (rows, None, width), x.shape)
    of_routing, whole = spec(mesh, (rows, None, None), chosen.shape), jax.tree.map(lambda _: PartitionSpec(), index)
    leading = int(index is not None)
    over_experts = jax.tree.leaves(of_experts)[0][leading]

    def of_shard(experts: Any, x: jax.Array, chosen: jax.Array, weights: jax.Array, index: Any) -> jax.Array:
        first: Any = 0
        if over_experts is not None:
            first = jax.lax.axis_index(over_experts) * jax.tree.leaves(experts)[0].shape[leading]
        sum_width = (lambda y: y) if of_x[2] is None else (lambda y: jax.lax.psum(y, of_x[2]))
        y = function(experts, x, chosen, weights, index, ExpertShard(first, sum_width))
        return y if over_experts is None else jax.lax.psum(y, over_experts)

    specs = (of_experts, of_x, of_routing, of_routing, whole)
    split = jax.shard_map(of_shard, in_specs=specs, out_specs=of_x, check_vma=False)
    return split(experts, x, chosen, weights, index)


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k` of x [B, ..., V], each device of its own rows."""
    return _of_rows(lambda x, axis: jax.lax.top_k(x, k), x, None)


def top_log_softmax(x: jax.Array, k: int, last: str | None = None) -> tuple[jax.Array, jax.Array]:
    """The k best of log_softmax(x) of x [B, ..., V], at most 0, and their index; V is of the logical axis `last`.

    Only the k best of each shard, and its sum, are all-gathered.
    """

    def of_shard(x: jax.Array, axis: Any) -> tuple[jax.Array, jax.Array]:
        values, index = jax.lax.top_k(x, min(k, x.shape[-1]))
        total = jnp.exp(x - values[..., :1]).sum(axis=-1, keepdims=True)
        if axis is not None:
            index += jax.lax.axis_index(axis) * x.shape[-1]
            # One exchange of all, in the shards' order: among equal values the first comes first, as without a mesh.
            floats = jnp.concatenate([values, total], axis=-1).astype(jnp.float32)
            sent = jnp.concatenate([jax.lax.bitcast_convert_type(floats, jnp.int32), index], axis=-1)  # [..., 2 k + 1]
            got = jax.lax.all_gather(sent, axis, axis=x.ndim - 1)  # [..., shards, 2 k + 1]
            floats = jax.lax.bitcast_convert_type(got[..., : values.shape[-1] + 1], jnp.float32)
            indices, best, totals = got[..., values.shape[-1] + 1 :], floats[..., 0], floats[..., -1]
            total = (totals * jnp.exp(best - best.max(axis=-1, keepdims=True))).sum(axis=-1, keepdims=True)
            flat = (*x.shape[:-1], -1)
            values, chosen = jax.lax.top_k(floats[..., :-1].reshape(flat), k)
            index = jnp.take_along_axis(indices.reshape(flat), chosen, axis=-1)
        # In two steps, of which neither gives more than 0: a node must not score more than its parent.
        return (values - values[..., :1] - jnp.log(total)).astype(x.dtype), index

    return _of_rows(of_shard, x, last)


def _of_rows(
    function: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]], x: jax.Array, last: str | None
) -> tuple[jax.Array, jax.Array]:
    """`function(x, axis)` of x [B, ..., V], on a mesh of each shard; `axis` is what V is split over, or None."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(x, None)
    *leading, axis = split = spec(mesh, ("rows", *[None] * (x.ndim - 2), last), x.shape)
    whole = PartitionSpec(*leading, None)
    return jax.shard_map(lambda x: function(x, axis), in_specs=split, out_specs=whole, check_vma=False)(x)


# --- helpers ----------------------------------------------------------------------------------------------------


def _factorisations(n: int) -> str:
    """The meshes of n devices that split at most two axes, in words."""
    meshes = [(d, f, n // d // f) for d in range(1, n + 1) for f in range(1, n // d + 1) if n % (d * f) == 0]
    words = [f"{d} x {f} x {t}" for d, f, t in meshes if 1 in (d, f, t)]
    return "data x fsdp x tensor = " + ", ".join(words[:12]) + (", ..." if len(words) > 12 else "")


def _known_axes() -> str:
    return ", ".join(axis or "None" for axis in RULES)


def _name(key: Any) -> str:
    """The name of an entry of a pytree's path."""
    return str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))))
