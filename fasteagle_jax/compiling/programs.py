"""A run's programs compiled from shapes alone: prefill, a decode round, a train step, and what each costs a device.

No weights, no data, no accelerator: the devices are those of a slice (`topology.devices`) or simulated.
B rows · S cache slots · C tokens of a prefill chunk · N levels.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fasteagle_jax.compiling.hlo_cost import Cost, cost
from fasteagle_jax.data.packing import Batch
from fasteagle_jax.decoding import state as decoding_state
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import decode_rounds, num_levels_of, start
from fasteagle_jax.decoding.state import Stop
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.devices.chips import CHIPS, GIB, SLICES, Chip, chip
from fasteagle_jax.devices.memory import bytes_of
from fasteagle_jax.devices.sharding import (
    Axes,
    MeshShape,
    batch_sharding,
    check_batch,
    check_experts,
    check_heads,
    make_mesh,
    row_major,
    shardings,
)
from fasteagle_jax.drafters.table import class_of
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.attention import EITHER
from fasteagle_jax.nn.moe import LOOP, SparseMlp, block_rows, expected_turns
from fasteagle_jax.nn.transformer import stacks_are_faster
from fasteagle_jax.targets.loading import target_shapes
from fasteagle_jax.training.config import RunConfig, drafter_config
from fasteagle_jax.training.flops import flops_per_token
from fasteagle_jax.training.optimizer import make_optimizer
from fasteagle_jax.training.step import first_state, train_step

COMPILER_OPTIONS = {"gpu": {"xla_gpu_autotune_level": 0}}  # which times kernels, and so needs a GPU
PROGRAMS = ("prefill", "decode", "train")
NO_FIT = "does not fit"
HOP = 1e-6  # seconds to a neighbour: the least that a message takes (J. Austin et al., How to Scale Your Model)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The shapes of a decode: rows, tree and cache."""

    batch: int = 1
    tree: TreeSpec | None = TreeSpec("best_first", 60)  # None: plain decoding, without the drafter
    slots: int = 2048  # S
    chunk: int = 256  # C
    cache_dtype: str = ""  # of the target's cache: int8, empty for the weights'


@dataclasses.dataclass(frozen=True)
class Report:
    """What one program takes on each device, in bytes, FLOPs and seconds."""

    program: str
    shapes: str
    mesh: str
    devices: int
    device_kind: str
    weights: dict[str, int]  # bytes by part
    caches: int
    arguments: int  # all that goes in: weights, caches, optimiser, batch
    temporaries: int
    peak: int
    hbm: float | None  # None: not known, of a CPU
    cost: Cost
    state_layout_stable: bool | None  # the new state can be the next call's argument; None: the program has no state
    ideal_bytes: float  # weights once, and what is in the caches once
    necessary_flops: float  # of matrix products
    compile_seconds: float
    experts: float | None = None  # of a layer that a device reads, expected (see Experts); None: all, or none are there

    @property
    def bytes_ratio(self) -> float:
        """Bytes moved over ideal ones."""
        return self.cost.bytes / self.ideal_bytes

    @property
    def seconds(self) -> dict[str, float]:
        """Roofline seconds of HBM, matrix products and exchanges; empty if the device is not known."""
        return roofline(self.cost, chip(self.device_kind))

    @property
    def estimate(self) -> float | None:
        """Seconds: the longer of memory and products, which overlap, and the exchanges, which wait for both."""
        parts = self.seconds
        return max(parts["memory"], parts["products"]) + parts["exchange"] if parts else None

    @property
    def latency(self) -> float | None:
        """Seconds that launching the kernels takes; None if no figure is known for the device."""
        device = chip(self.device_kind)
        return None if device is None or device.kernel is None else self.cost.kernels * device.kernel

    @property
    def estimate_with_latency(self) -> float | None:
        """The estimate if nothing else goes on while a kernel starts; None if it or the latency is not known."""
        return None if self.estimate is None or self.latency is None else self.estimate + self.latency

    @property
    def bound(self) -> str:
        """The part of `seconds` that takes the longest."""
        return max(self.seconds, key=lambda part: self.seconds[part]) if self.seconds else "unknown"

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        properties = ("bytes_ratio", "seconds", "estimate", "latency", "estimate_with_latency", "bound")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in properties}


def roofline(cost: Cost, device: Chip | None) -> dict[str, float]:
    """Seconds of HBM, matrix products and exchanges, each at the device's best; empty if it is not known."""
    if device is None or device.bandwidth is None or device.link is None:
        return {}
    exchange = [max(c.sent / (2 * device.link), c.steps * HOP) for c in cost.collectives.values()]
    return {
        "memory": cost.bytes / device.bandwidth,
        "products": cost.product_flops / device.flops,
        "exchange": sum(exchange),
    }


class OutOfMemory(UserError):
    """A program that does not fit; the message begins with NO_FIT."""


# --- the programs -----------------------------------------------------------------------------------------------


class Shapes(NamedTuple):
    """A jitted function, its arguments' shapes, and what they are."""

    step: Any
    arguments: tuple[Any, ...]
    weights: dict[str, Any]
    caches: Any
    shapes: str
    read: Any  # arrays that every run must read
    necessary_flops: float  # of all devices
    state: int | None  # which argument comes out anew; None for none
    experts: Experts | None = None  # None: all are read, or there are none


class Experts(NamedTuple):
    """The experts that a device's tokens are expected to choose, if the router chooses all alike and independently."""

    number: float  # in each layer that has some
    turns: float  # of the loop over them
    unread: float  # bytes of the others


def compile_program(
    config: RunConfig,
    program: str,
    devices: Sequence[Any],
    decoding: Decoding = Decoding(),  # immutable
    mesh_shape: MeshShape | None = None,
) -> Report:
    """The Report of one of PROGRAMS on the devices.

    `mesh_shape`: None for `decode_mesh` or `training_mesh`. Raises UserError if a mesh does not
    fit, OutOfMemory if the program does not.
    """
    started = time.perf_counter()
    mesh, shapes, lowered = lower(config, program, devices, decoding, mesh_shape)
    with jax.set_mesh(mesh):
        try:
            compiled = lowered.compile(COMPILER_OPTIONS.get(devices[0].platform))
        except jax.errors.JaxRuntimeError as error:
            raise out_of_memory(error, devices[0].device_kind, len(devices)) or error from None
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    peak = int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    expected = {LOOP: shapes.experts.turns} if shapes.experts else None
    known = chip(devices[0].device_kind)
    if devices[0].platform != "tpu" and known is not None and known.hbm and peak > known.hbm:
        raise _no_fit(peak, known.hbm, devices[0].device_kind, len(devices))  # a GPU's compiler does not say so itself
    return Report(
        program=program,
        shapes=shapes.shapes,
        mesh=" x ".join(f"{name} {size}" for name, size in mesh.shape.items()),
        devices=len(devices),
        device_kind=devices[0].device_kind,
        weights={name: bytes_of(part) for name, part in shapes.weights.items()},
        caches=bytes_of(shapes.caches),
        arguments=int(memory.argument_size_in_bytes),
        temporaries=int(memory.temp_size_in_bytes),
        peak=peak,
        hbm=None if known is None else known.hbm,
        cost=cost(compiled.as_text(), "most" if program == "train" else "least", expected, _local_share(config)),
        state_layout_stable=_state_layout_stable(shapes, compiled),
        ideal_bytes=bytes_of(shapes.read) - (shapes.experts.unread if shapes.experts else 0),
        necessary_flops=shapes.necessary_flops / len(devices),
        compile_seconds=round(seconds, 1),
        experts=shapes.experts.number if shapes.experts else None,
    )


def lower(
    config: RunConfig,
    program: str,
    devices: Sequence[Any],
    decoding: Decoding = Decoding(),  # immutable
    mesh_shape: MeshShape | None = None,
) -> tuple[Mesh, Shapes, Any]:
    """One of PROGRAMS as `compile_program` compiles it: the mesh, its Shapes, and the jax.stages.Lowered."""
    if config.target_config is None:
        raise UserError("the configuration has no target_config: name the target's sizes there")
    if program == "train":
        mesh = make_mesh(mesh_shape or training_mesh(config, len(devices)), devices)
        check_batch(mesh, config.batch_size // config.accumulate)
    else:
        mesh = make_mesh(mesh_shape or decode_mesh(config, len(devices)), devices)
    check_heads(mesh, config.target_config, drafter_config(config.drafter, config.target_config))
    check_experts(mesh, config.target_config)
    shapes = {"train": _train, "decode": _decode, "prefill": _prefill}[program](config, mesh, decoding)
    with jax.set_mesh(mesh):
        return mesh, shapes, shapes.step.lower(*shapes.arguments)


def _state_layout_stable(shapes: Shapes, compiled: Any) -> bool | None:
    """Whether the state that a program returns has the shapes, dtypes, shardings and layouts of its argument.

    Calls can then follow each other without a new compilation or layout change. None: the program has no state.
    """
    if shapes.state is None:
        return None
    state = shapes.arguments[shapes.state]
    inputs = list(zip(jax.tree.leaves(state), jax.tree.leaves(compiled.input_formats[0][shapes.state]), strict=True))
    outputs = zip(jax.tree.leaves(compiled.out_info), jax.tree.leaves(compiled.output_formats), strict=True)

    def described(x: Any, placed: Any) -> tuple[Any, ...]:
        return x.shape, x.dtype, x.weak_type, placed

    # An argument that the program does not read has no layout of its own.
    return all(
        described(old, own) == described(new, Format(own.layout and result.layout, result.sharding))
        for (old, own), (new, result) in zip(inputs, outputs, strict=False)
    )


def _train(config: RunConfig, mesh: Mesh, _: Decoding) -> Shapes:
    target_config = config.target_config
    assert target_config is not None
    sizes = drafter_config(config.drafter, target_config)
    optimizer = make_optimizer(config.optimizer, config.steps, config.loss.deepkd)
    stacked = _stacked(mesh, training=True)

    def start() -> Any:
        drafter = class_of(sizes)(sizes, jax.random.key(0), stacked=stacked)
        graph, params, constants = nnx.split(drafter, nnx.Param, ...)  # type: ignore[misc]  # `...`: all the rest
        return graph, first_state(params, optimizer, config.optimizer.ema), constants

    graph, state, constants = nnx.eval_shape(start)
    state = on_mesh(mesh, state)
    target = _target(config, mesh, stacked=stacked)
    constants = on_mesh(mesh, constants)
    rows = (config.batch_size, config.length)
    split = batch_sharding(mesh, 2)
    batch = Batch(*(jax.ShapeDtypeStruct(rows, kind, sharding=split) for kind in (jnp.int32,) * 3 + (jnp.bool_,)))
    placed = jax.tree.map(lambda x: x.sharding, state), NamedSharding(mesh, PartitionSpec())
    step = train_step(config, graph, placed)
    tokens = math.prod(rows)
    return Shapes(
        step,
        (state, constants, target, batch),
        {"target": target, "drafter": state.params, "optimizer": state.optimizer},
        (),
        f"{rows[0]} x {rows[1]} tokens",
        # All are read, and the drafter and its moments written.
        (target, state, state),
        tokens
        * flops_per_token(
            target_config, sizes, config.length, config.loss.share, backward_passes=config.loss.backward_passes
        ),
        0,
    )


def _decode(config: RunConfig, mesh: Mesh, decoding: Decoding) -> Shapes:
    target, drafter, vocab, state, sampling, stop = _decoding_arguments(config, mesh, decoding)

    def rounds(target: Any, drafter: Any, vocab: Any, state: Any, sampling: Any, stop: Any) -> Any:
        vocab = _whole(vocab, target)
        return decode_rounds(target, drafter, vocab, state, sampling, stop, tree=decoding.tree)[0]

    nodes = decoding.tree.num_nodes(drafter.num_levels) if decoding.tree else 1
    placed = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(rounds, donate_argnums=3, out_shardings=placed)
    drafts = 0 if decoding.tree is None else decoding.tree.num_levels(drafter.num_levels) + 1
    matrices = (
        2
        * decoding.batch
        * (nodes * (_layers_size(config) + _matrix_size(_head(target))) + drafts * _matrix_size((drafter, vocab)))
    )
    return Shapes(
        step,
        (target, drafter, vocab, state, sampling, stop),
        {"target": target, "drafter": (drafter, vocab)},
        (state.target_cache, state.drafter_cache),
        f"batch {decoding.batch}, {decoding.tree or 'plain'}, {decoding.slots} slots",
        (_read(target), drafter, vocab, state.target_cache, state.drafter_cache),
        matrices,
        3,
        _experts(config, mesh, target, decoding.batch * nodes, decoding.batch),
    )


def _prefill(config: RunConfig, mesh: Mesh, decoding: Decoding) -> Shapes:
    target, drafter, vocab, state, sampling, stop = _decoding_arguments(config, mesh, decoding)
    rows = jax.ShapeDtypeStruct((decoding.batch, decoding.chunk), jnp.int32)
    prompts = on_mesh(mesh, {"tokens": rows, "length": _int32(decoding.batch)}, decoding_state.AXES)

    def start(target: Any, drafter: Any, prompts: Any, lengths: Any, sampling: Any, stop: Any) -> Any:
        return _start(config, decoding, target, drafter, prompts, lengths, sampling, stop)[0]

    step = jax.jit(start, out_shardings=jax.tree.map(lambda x: x.sharding, state))
    matrices = 2 * decoding.batch * decoding.chunk * (_layers_size(config) + _matrix_size(drafter))
    return Shapes(
        step,
        (target, drafter, prompts["tokens"], prompts["length"], sampling, stop),
        {"target": target, "drafter": drafter},
        (state.target_cache, state.drafter_cache),
        f"batch {decoding.batch}, a chunk of {decoding.chunk} tokens, {decoding.slots} slots",
        (_read(target), drafter, vocab, state.target_cache, state.drafter_cache),
        matrices,
        None,
        _experts(config, mesh, target, decoding.batch * decoding.chunk, decoding.batch),
    )


def _decoding_arguments(config: RunConfig, mesh: Mesh, decoding: Decoding) -> tuple[Any, ...]:
    """Shapes on the mesh: target, drafter, what `vocab` holds of its own, state, sampling, stop."""
    stacked = _stacked(mesh)
    target = _target(config, mesh, stacked=stacked, cache_dtype=decoding.cache_dtype)
    assert config.target_config is not None
    drafter = None
    if decoding.tree is not None:
        sizes = drafter_config(config.drafter, config.target_config)
        dtype = jnp.dtype(config.dtype)
        drafter = jax.eval_shape(lambda: class_of(sizes)(sizes, jax.random.key(0), dtype, stacked=stacked))
        drafter = weights_on_mesh(mesh, drafter)
    batch = decoding.batch
    sampling = on_mesh(mesh, jax.eval_shape(lambda: make_sampling(batch)), decoding_state.AXES)
    stop = on_mesh(mesh, Stop(_int32(batch), _int32(batch, 2)), decoding_state.AXES)

    def start(target: Any, drafter: Any, prompts: Any, lengths: Any, sampling: Any, stop: Any) -> Any:
        return _start(config, decoding, target, drafter, prompts, lengths, sampling, stop)

    prompts, lengths = _int32(batch, decoding.chunk), _int32(batch)
    with jax.set_mesh(mesh):  # what a cache holds depends on the platform that the program is for
        state, vocab = jax.eval_shape(start, target, drafter, prompts, lengths, sampling, stop)
    if vocab is not None:  # the target's own arrays are not there twice
        same = vocab.head.shape == _head(target).shape
        vocab = on_mesh(mesh, vocab._replace(embedding=None, head=None if same else vocab.head), decoding_state.AXES)
    return target, drafter, vocab, on_mesh(mesh, state, decoding_state.AXES), sampling, stop


def _start(
    config: RunConfig,
    decoding: Decoding,
    target: Any,
    drafter: Any,
    prompts: Any,
    lengths: Any,
    sampling: Any,
    stop: Any,
) -> Any:
    """`speculative.start` with as many new tokens as fill the slots."""
    num_levels = num_levels_of(drafter, decoding.tree)
    max_new = decoding.slots - decoding.chunk - num_levels - 1
    if max_new < decoding.chunk:
        raise UserError(f"{decoding.slots} cache slots are too few for chunks of {decoding.chunk}: use more")
    sizes = {"max_new": max_new, "num_levels": num_levels, "chunk": decoding.chunk}
    return start(target, drafter, prompts, lengths, sampling, stop, **sizes)


def _whole(vocab: Any, target: Any) -> Any:
    """`vocab` with the arrays that are the target's."""
    if vocab is None:
        return None
    head = target.head_rows() if vocab.head is None else vocab.head
    return vocab._replace(embedding=target.embedding[...], head=head)


def _target(config: RunConfig, mesh: Mesh, *, stacked: bool, cache_dtype: str = "") -> Any:
    assert config.target_config is not None
    form: dict[str, Any] = {"int8": config.target_dtype == "int8", "stacked": stacked}
    sizes = target_shapes(config.target_config, config.dtype, **form, cache_dtype=cache_dtype or None)
    return weights_on_mesh(mesh, sizes)


def _local_share(config: RunConfig) -> dict[str, float]:
    """How often the layers' conditional on the cache that they read is true."""
    assert config.target_config is not None
    local = [kind.window is not None for kind in config.target_config.layer_kinds]
    return {EITHER: sum(local) / len(local)}


def _stacked(mesh: Mesh, *, training: bool = False) -> bool:
    """Whether layers are one stack on the mesh's devices; simulated ones stand for TPUs."""
    platform = mesh.devices.flat[0].platform
    return platform == "cpu" or stacks_are_faster(platform, training=training)


def _experts(config: RunConfig, mesh: Mesh, target: Any, num_tokens: int, num_rows: int) -> Experts | None:
    """Those of a decoding's tokens: of each E experts n tokens choose E (1 - (1 - k/E)^n)."""
    layers = [target.layers] if target.stacked else target.layers
    own = [layer.mlp.experts for layer in layers if isinstance(layer.mlp, SparseMlp)]
    if not own:
        return None
    sizes: Any = config.target_config
    data, tensor = mesh.shape["data"], mesh.shape["tensor"]
    tokens = num_tokens // data if num_rows % data == 0 else num_tokens
    routing = tokens, sizes.experts_per_token, sizes.num_experts
    share = 1 - (1 - sizes.experts_per_token / sizes.num_experts) ** tokens
    turns = expected_turns(*routing, block_rows(*routing, mesh.devices.flat[0].platform))
    return Experts(share * sizes.num_experts / tensor, turns / tensor, (1 - share) * bytes_of(own))


def _read(target: Any) -> Any:
    """A target's arrays that a pass reads whole: of an embedding that is no head it reads a few rows."""
    return target.layers, target.norm, _head(target)


def _head(target: Any) -> Any:
    """A target's `head_rows`, of shapes."""
    return jax.tree.leaves(target.embedding if target.head is None else target.head)[0]


def _layers_size(config: RunConfig) -> int:
    """Elements of the matrices of a target's layers that a token is multiplied with."""
    sizes = config.target_config
    assert sizes is not None
    return sum(sizes.layer_at(i).matrix_size for i in range(sizes.num_layers))


def _matrix_size(tree: Any) -> int:
    """Elements of all matrices."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree) if len(x.shape) > 1 and x.dtype != jnp.int32)


def _int32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def on_mesh(mesh: Mesh, tree: Any, axes: Axes | None = None) -> Any:
    """The ShapeDtypeStructs of a pytree with their shardings."""
    placed = shardings(mesh, tree, axes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placed)


def weights_on_mesh(mesh: Mesh, tree: Any) -> Any:
    """`on_mesh` of weights that `sharding.place_weights` has placed."""

    def as_row_major(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=row_major(x.sharding, len(x.shape)))

    return jax.tree.map(as_row_major, on_mesh(mesh, tree))


# --- meshes and limits ------------------------------------------------------------------------------------------


def decode_mesh(config: RunConfig, num_devices: int) -> MeshShape:
    """Heads over as many devices as divide them, weights' other dimension over the rest."""
    tensor = math.gcd(_kv_heads(config), num_devices)
    return MeshShape(1, num_devices // tensor, tensor)


def training_mesh(config: RunConfig, num_devices: int) -> MeshShape:
    """The configuration's mesh; if that has another number of devices, rows over as many as divide a microbatch.

    Heads are split over the rest, as far as they divide it; if devices are left, `lower` raises UserError.
    """
    shape = config.mesh or MeshShape(1, 1, 1)
    if math.prod(dataclasses.astuple(shape)) == num_devices or -1 in dataclasses.astuple(shape):
        return shape
    fsdp = math.gcd(config.batch_size // config.accumulate, num_devices)
    tensor = math.gcd(_kv_heads(config), num_devices // fsdp)
    return MeshShape(1, num_devices // tensor, tensor)


def _kv_heads(config: RunConfig) -> int:
    """The most devices that divide the heads of both models."""
    assert config.target_config is not None
    drafter = drafter_config(config.drafter, config.target_config)
    return math.gcd(config.target_config.num_kv_heads, drafter.num_kv_heads)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def out_of_memory(error: Exception, device_kind: str, num_devices: int) -> OutOfMemory | None:
    """The compiler's RESOURCE_EXHAUSTED as one line; None for another error."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    size = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"Used {size} of {size}", text) or re.search(rf"\({size}\) exceeds[^(]*\({size}\)", text)
    if not found:
        return OutOfMemory(f"{NO_FIT}: {text.splitlines()[0][:200]}")
    needed, limit = float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]
    return _no_fit(needed, limit, device_kind, num_devices)


def _no_fit(needed: float, limit: float, device_kind: str, num_devices: int) -> OutOfMemory:
    """The error for `needed` bytes a device, of which there are `limit`, with a slice that may hold them."""
    larger = smallest_slice(needed * num_devices, device_kind, num_devices)
    if larger:
        remedy = f"try {larger}"
    elif "TPU" in device_kind:
        remedy = "no slice here is large enough"
    else:
        remedy = f"split evenly it takes {math.ceil(needed * num_devices / limit)} devices"
    return OutOfMemory(
        f"{NO_FIT}: {needed / GIB:.2f} GiB a chip of the {limit / GIB:.2f} there are, "
        f"{(needed - limit) / GIB:.2f} GiB too much: {remedy}"
    )


def smallest_slice(total: float, device_kind: str, more_than: int = 0) -> str | None:
    """The smallest slice of a kind of device whose HBM holds `total` bytes, were they split evenly; None for none."""
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
    for generation, kind in kinds.items():
        if chip(device_kind) is CHIPS[kind]:
            for shape in SLICES[generation]:
                number = math.prod(map(int, shape.split("x"))) * (2 if generation == "tpu7x" else 1)
                if number > more_than and number * (CHIPS[kind].hbm or 0) >= total:
                    return f"{generation}:{shape}"
    return None
