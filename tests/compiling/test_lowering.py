"""A decode round and a train step lower for a GPU, on a machine that has none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo  # has no public name to stand a GPU in

from fasteagle_jax.data.packing import Batch
from fasteagle_jax.decoding.prefill import pad_prompts
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import decode_round, num_levels_of, start
from fasteagle_jax.decoding.state import make_stop
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn import attention, rope
from fasteagle_jax.nn import packed_attention as packed
from fasteagle_jax.nn.transformer import stacks_are_faster
from fasteagle_jax.targets.llama import Llama
from fasteagle_jax.training.config import StepOptions
from fasteagle_jax.training.losses import LossConfig
from fasteagle_jax.training.optimizer import OptimizerConfig, make_optimizer
from fasteagle_jax.training.step import first_state, make_train_step
from tests.tiny_models import tiny_config

SIZES = tiny_config(hidden_size=64, head_dim=64, num_heads=2, num_kv_heads=1)
DRAFTER = default_config(SIZES, num_levels=2)


CUDNN = ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward")


def exported(step, *args) -> str:
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in CUDNN]  # not kept, so no promise is needed
    return jax.export.export(step, platforms=["cuda"], disabled_checks=checks)(*args).mlir_module()


def test_a_decode_round_lowers_for_cuda(monkeypatch) -> None:
    for module in (attention, rope):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    tree, dtype = TreeSpec("best_first", 8), jnp.bfloat16
    stacked = stacks_are_faster("gpu")
    target = jax.eval_shape(lambda: Llama(SIZES, jax.random.key(0), dtype, stacked=stacked))
    drafter = jax.eval_shape(lambda: FastEagle(DRAFTER, jax.random.key(0), dtype, stacked=stacked))
    sampling, stop = make_sampling(2, 1.0), make_stop(2, 16)
    prompts, lengths = pad_prompts([[1, 2], [3]], 8)

    def begin(target, drafter):
        sizes = dict(max_new=16, num_levels=num_levels_of(drafter, tree), chunk=8)
        return start(target, drafter, prompts, lengths, sampling, stop, **sizes)

    state, vocab = jax.eval_shape(begin, target, drafter)
    graph, leaves = (
        jax.tree.structure((target, drafter, vocab, state)),
        jax.tree.leaves((target, drafter, vocab, state)),
    )

    def round_of(*leaves):  # export takes no modules
        target, drafter, vocab, state = jax.tree.unflatten(graph, leaves)
        return jax.tree.leaves(decode_round(target, drafter, vocab, state, sampling, stop, tree=tree))

    module = exported(jax.jit(round_of), *leaves)
    assert "stablehlo.dot_general" in module and "callback" not in module
    # No layer's weights are taken out of a stack, which XLA would copy: nothing is cut out of an array of L layers.
    assert f"tensor<{SIZES.num_layers}x{SIZES.hidden_size}x" not in module
    assert "ui16" not in module  # a cache's bits are a CPU's way


def train_step_for_cuda(attention: str) -> str:
    optimizer = make_optimizer(OptimizerConfig(), 10)

    def start():
        drafter = FastEagle(DRAFTER, jax.random.key(0))
        graph, params, constants = nnx.split(drafter, nnx.Param, ...)
        return graph, first_state(params, optimizer), constants

    graph, state, constants = nnx.eval_shape(start)
    target = jax.eval_shape(lambda: Llama(SIZES, jax.random.key(0), jnp.bfloat16))
    options = StepOptions(attention, "full")
    step = make_train_step(graph, optimizer, LossConfig(chunk=64), jnp.bfloat16, 0, options=options)
    rows = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    batch = Batch(rows, rows, rows, jax.ShapeDtypeStruct((2, 128), jnp.bool_))
    leaves, structure = jax.tree.flatten((state, constants, target, batch))
    flat = jax.jit(lambda *leaves: jax.tree.leaves(step(*jax.tree.unflatten(structure, leaves))))
    return exported(flat, *leaves)


def test_a_train_step_lowers_for_cuda_with_cudnn_where_it_is_and_without_where_not(monkeypatch) -> None:
    monkeypatch.setattr(packed, "platform", lambda: "gpu")
    assert "__cudnn$fmha" not in train_step_for_cuda("auto")
    with pytest.raises(UserError, match="cuDNN's attention cannot be had .*not detected.*: use attention auto or xla"):
        train_step_for_cuda("cudnn")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    module = train_step_for_cuda("auto")
    assert all(f"@{name}(" in module for name in CUDNN)
