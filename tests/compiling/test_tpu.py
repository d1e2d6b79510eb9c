"""The decode round and the train step at 8B, compiled for slices by libtpu: what fits, what moves, what is exchanged.

Few layers stand for all: a scan compiles to one body, whatever it repeats. The golden figures are of the jax and
libtpu that pyproject.toml pins; another compiler may fuse otherwise, hence the tolerance.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from fasteagle_jax.compiling import programs
from fasteagle_jax.compiling.programs import Decoding, Report, compile_program, lower
from fasteagle_jax.compiling.published import PUBLISHED
from fasteagle_jax.devices import topology
from fasteagle_jax.devices.chips import chip, slice_names
from fasteagle_jax.devices.sharding import MeshShape
from fasteagle_jax.targets.gemma import Gemma3Config
from fasteagle_jax.targets.qwen_moe import Qwen3MoeConfig
from fasteagle_jax.training.config import DrafterChoice, RunConfig, load_config

pytestmark = pytest.mark.tpu
SLICES = ("v5e:2x4", "v6e:2x4")
TOLERANCE = 0.05  # of a golden figure
TRAIN_FLOPS = 1.04  # over what flops.py counts: recomputation of the levels is not in it


def config(name: str = "llama31_8b", num_layers: int = 11) -> RunConfig:
    """Of a target's widths; the features of 11 layers cut them into runs of 2, 3, 3 and 3, none of a single layer."""
    whole = load_config(f"configs/{name}.py")
    assert whole.target_config is not None
    few = dataclasses.replace(whole.target_config, num_layers=num_layers)
    return dataclasses.replace(whole, target_config=few, drafter=dataclasses.replace(whole.drafter, num_levels=3))


@functools.cache
def compiled(slice_name: str, program: str) -> Report:
    mesh = MeshShape(1, 1, 8) if program == "decode" else None
    with jax.default_matmul_precision("default"):
        return compile_program(config(), program, topology.devices(slice_name), Decoding(), mesh)


@pytest.mark.parametrize("name", slice_names())
def test_libtpu_knows_every_slice(name: str) -> None:
    generation, _, shape = name.partition(":")
    chips = math.prod(map(int, shape.split("x")))
    devices = topology.devices(name)
    assert len(devices) == chips * (2 if generation == "tpu7x" else 1)
    known = chip(devices[0].device_kind)
    assert known is not None and known.bandwidth and known.link


@pytest.mark.parametrize(
    "name, clock", [("v4:2x2x1", 1.05e9), ("v5e:1x1", 1.5e9), ("v5p:1x1x1", 1.75e9), ("v6e:1x1", 1.75e9)]
)
def test_the_latency_of_a_kernel_is_what_libtpu_expects_of_the_smallest(name: str, clock: float) -> None:
    device = topology.devices(name)[0]
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    text = jax.jit(lambda x: x * 2 + 1).lower(x).compile().as_text()
    (cycles,) = re.findall(r'"estimated_cycles":"(\d+)"', text)
    known = chip(device.device_kind)
    assert known is not None and known.kernel == pytest.approx(int(cycles) / clock, rel=TOLERANCE)


# Bytes over ideal ones, and the mebibytes of temporaries at most.
DECODE = {"v5e:2x4": (1.00, 64), "v6e:2x4": (1.00, 64)}


@pytest.mark.parametrize("slice_name", SLICES)
def test_a_decode_round_moves_the_weights_and_the_cache_once(slice_name: str) -> None:
    found = compiled(slice_name, "decode")
    ratio, temporaries = DECODE[slice_name]
    assert found.bytes_ratio == pytest.approx(ratio, rel=TOLERANCE)
    assert found.hbm is not None and found.peak < found.hbm
    assert found.temporaries < temporaries * 2**20  # no copy of the stacked weights or the cache in another layout
    assert found.cost.host_calls == 0
    exchanges = found.cost.collectives
    # Two sums a layer, of attention and of the MLP, in target and drafter; a few small ones for embedding and choice.
    assert 2 * (11 + 3) <= exchanges["all-reduce"].number <= 2 * (11 + 3) + 20
    assert set(exchanges) <= {"all-reduce", "all-gather", "collective-permute", "all-to-all"}
    rest = sum(own.bytes for kind, own in exchanges.items() if kind != "all-reduce")
    assert rest < 4 * 2**20  # neither weights nor the vocabulary's scores are gathered
    assert found.state_layout_stable


# Where the compiler would rather have the weights in another layout than they come in.
@pytest.mark.parametrize(
    "name, slice_name, ratio", [("llama31_8b", "tpu7x:2x2x1", 1.00), ("vicuna_13b", "v6e:2x4", 1.02)]
)
def test_no_weights_are_copied_into_another_layout(name: str, slice_name: str, ratio: float) -> None:
    with jax.default_matmul_precision("default"):
        found = compile_program(config(name), "decode", topology.devices(slice_name), Decoding(tree=None))
    assert found.bytes_ratio == pytest.approx(ratio, rel=TOLERANCE)
    assert found.temporaries < 16 * 2**20


@pytest.mark.parametrize("slice_name", ["v5e:2x4", "v6e:2x4"])
def test_int8_weights_are_read_as_they_are(slice_name: str) -> None:
    """All layers: the head, which stays in bfloat16, is a tenth of an 8B target, and more of one of few layers."""
    whole, found = config(num_layers=32), {}
    with jax.default_matmul_precision("default"):
        for dtype in ("", "int8"):
            run = dataclasses.replace(whole, target_dtype=dtype)
            found[dtype] = compile_program(run, "decode", topology.devices(slice_name), Decoding(tree=None))
    exact, rounded = found[""], found["int8"]
    assert rounded.cost.bytes < 0.6 * exact.cost.bytes
    assert rounded.bytes_ratio == pytest.approx(1.00, rel=TOLERANCE)
    assert rounded.temporaries < 16 * 2**20  # no matrix in bfloat16


class AllNames:
    """A container of all names."""

    def __contains__(self, name: str) -> bool:
        return True


@pytest.mark.parametrize("slice_name", ["v5e:2x4", "v6e:2x4"])
def test_int8_in_blocks_with_scales_are_too(slice_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF file's Q8_0: scales are applied on the way into the product, not in memory."""
    run, found = dataclasses.replace(config(), target_dtype="int8"), {}
    in_blocks = functools.partial(programs.target_shapes, in_blocks=AllNames())
    with jax.default_matmul_precision("default"):
        for form, shapes in (("rows", programs.target_shapes), ("blocks", in_blocks)):
            monkeypatch.setattr(programs, "target_shapes", shapes)
            found[form] = compile_program(run, "decode", topology.devices(slice_name), Decoding(tree=None))
    assert 1 < found["blocks"].cost.bytes / found["rows"].cost.bytes < 1 + 2 / 32
    assert found["blocks"].bytes_ratio == pytest.approx(1.00, rel=TOLERANCE)
    assert found["blocks"].temporaries < 16 * 2**20


QWEN3_MOE = Qwen3MoeConfig(
    vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_layers=4, num_heads=32, num_kv_heads=4,
    head_dim=128, rms_norm_eps=1e-6, max_positions=40_960, num_experts=128, experts_per_token=8, expert_size=768,
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["", "int8"])
@pytest.mark.parametrize(("slice_name", "mesh"), [("v5e:1x1", None), ("v5e:2x4", MeshShape(1, 2, 4))])
def test_of_few_tokens_only_the_chosen_experts_are_read(slice_name: str, mesh: MeshShape | None, dtype: str) -> None:
    """Of the expected experts as many bytes as they have, and no copy of a layer's experts."""
    run = RunConfig(
        target="t", data=("d",), steps=5, target_config=QWEN3_MOE, target_dtype=dtype,
        drafter=DrafterChoice(num_levels=3, feature_layers=(1, 2)),
    )  # fmt: skip
    with jax.default_matmul_precision("default"):
        found = compile_program(run, "decode", topology.devices(slice_name), Decoding(tree=None), mesh)
    assert found.experts == pytest.approx(8 if mesh is None else 2)
    assert found.bytes_ratio == pytest.approx(1.00, rel=TOLERANCE)
    assert found.temporaries < 16 * 2**20 and found.cost.unknown_loops == 1  # of rounds
    assert found.state_layout_stable


@functools.cache
def lowered(program: str, rows: int) -> str:
    few = dataclasses.replace(config(num_layers=5), batch_size=rows)
    return lower(few, program, topology.devices("v5e:2x4"), Decoding(rows))[2].as_text()


@pytest.mark.parametrize("program", ["decode", "train"])
def test_equal_shapes_are_one_program_and_others_another(program: str) -> None:
    # Tokens, positions and lengths are arguments: what they are is not in the program.
    assert lowered(program, 8) == lowered.__wrapped__(program, 8) != lowered(program, 16)


def test_a_train_step_makes_the_logits_of_a_chunk_at_most() -> None:
    whole = config()
    assert whole.target_config is not None
    hidden, rows = whole.target_config.hidden_size, {whole.target_config.vocab_size, whole.drafter.draft_vocab_size}
    found = {
        tuple(map(int, dims.split("x"))) for dims in re.findall(r"tensor<(\d+(?:x\d+)*)x[a-z]", lowered("train", 8))
    }
    # All arrays over a vocabulary but weights, of all devices together.
    logits = [dims for dims in found if rows & set(dims) and hidden not in dims]
    assert max(map(len, logits)) == 3  # [B, C, V]
    assert all(math.prod(dims) <= whole.loss.chunk * max(rows & set(dims)) for dims in logits)


@pytest.mark.parametrize("slice_name", SLICES)
def test_a_train_step_fits_and_computes_what_is_necessary(slice_name: str) -> None:
    found = compiled(slice_name, "train")
    assert found.hbm is not None and found.peak < found.hbm
    logits = 8 * 2048 * 128_256 * 4 / found.devices  # a device's part of [B, T, V]
    assert found.temporaries < 3 * logits
    assert found.cost.product_flops / found.necessary_flops == pytest.approx(TRAIN_FLOPS, rel=TOLERANCE)
    assert found.cost.host_calls == 0
    # Weights come whole by either kind: each layer's once forward and once or twice backward, the head once.
    gathered = sum(found.cost.collectives[kind].bytes for kind in ("all-gather", "collective-permute"))
    weights = 2 * (found.weights["target"] + found.weights["drafter"]) * found.devices
    assert gathered < weights
    assert found.state_layout_stable


@pytest.mark.parametrize("name", ["llama31_8b", "gemma3_12b"])
def test_an_int8_cache_is_read_as_it_is(name: str) -> None:
    """In half the bytes, of layers that keep all positions and of local ones; a scan of both reads each layer's own."""
    if name == "llama31_8b":
        run, decoding = config(), Decoding(32, None)
    else:
        run, decoding = PUBLISHED[name], Decoding(8, None, 8192)
        assert isinstance(run.target_config, Gemma3Config)
        few = dataclasses.replace(run.target_config, num_layers=12, local_layers=(0, 1, 2, 3, 4, 6, 7, 8, 9, 10))
        run = dataclasses.replace(run, target_config=few)
    found = {}
    with jax.default_matmul_precision("default"):
        for dtype in ("", "int8"):
            shapes = dataclasses.replace(decoding, cache_dtype=dtype)
            found[dtype] = compile_program(run, "decode", topology.devices("v5e:2x4"), shapes)
            assert found[dtype].bytes_ratio == pytest.approx(1.00, rel=TOLERANCE)
            assert found[dtype].temporaries < 16 * 2**20  # no cache in bfloat16
    assert found["int8"].caches < 0.52 * found[""].caches
    saved = found[""].cost.bytes - found["int8"].cost.bytes
    assert saved == pytest.approx(found[""].caches - found["int8"].caches, rel=TOLERANCE)
