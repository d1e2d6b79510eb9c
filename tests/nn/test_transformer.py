"""The decoder layer's parts against slow versions that are written with loops or with ready-made functions."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fasteagle_jax.nn.attention import Cached, Past, attention, to_cache_storage
from fasteagle_jax.nn.embedding import embed
from fasteagle_jax.nn.linear import (
    FEW_HEAD_ROWS,
    FEW_ROWS,
    Linear,
    RowWeight,
    head_logits,
    matmul,
    to_columns,
    to_rows,
)
from fasteagle_jax.nn.norm import rms_norm
from fasteagle_jax.nn.rope import RopeConfig, rotate, rotation
from fasteagle_jax.nn.transformer import (
    DecoderLayer,
    LayerConfig,
    run_layers,
    stack,
    unstack,
)

CLOSE = dict(rtol=1e-5, atol=1e-5)  # float32 sums of some tens of terms of size 1, in another order


attend = jax.jit(attention)  # one program instead of one an operation


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def causal(batch: int, num: int) -> np.ndarray:
    """bool [B, T, T]: what each of `num` tokens may see."""
    return np.broadcast_to(np.tril(np.ones((num, num), bool)), (batch, num, num))


def slow_angle(pair: int, position: int, rope: RopeConfig, head_dim: int) -> float:
    freq = rope.theta ** (-2 * pair / head_dim)
    wavelength = 2 * math.pi / freq
    if rope.kind == "linear":
        freq /= rope.factor
    if rope.kind == "llama3":
        low = rope.original_max_positions / rope.low_freq_factor
        high = rope.original_max_positions / rope.high_freq_factor
        if wavelength > low:
            freq /= rope.factor
        elif wavelength > high:
            smooth = rope.original_max_positions / wavelength - rope.low_freq_factor
            smooth /= rope.high_freq_factor - rope.low_freq_factor
            freq = (1 - smooth) * freq / rope.factor + smooth * freq
    return position * freq


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(500.0),
        RopeConfig(500.0, "linear", 4.0),
        RopeConfig(500.0, "llama3", 8.0, 1.0, 4.0, original_max_positions=64),
    ],
    ids=lambda rope: rope.kind,
)
def test_rotation_turns_each_pair_of_channels_by_its_own_angle(rope):
    x, positions = normal(0, 2, 3, 2, 16), np.array([[0, 1, 40], [7, 2, 99]])
    expected = np.empty_like(x)
    for b, t, head, d in np.ndindex(2, 3, 2, 8):
        angle = slow_angle(d, positions[b, t], rope, 16)
        turned = complex(x[b, t, head, d], x[b, t, head, d + 8]) * complex(math.cos(angle), math.sin(angle))
        expected[b, t, head, d], expected[b, t, head, d + 8] = turned.real, turned.imag
    actual = jax.jit(lambda x, positions: rotate(x, rotation(positions, rope, 16)))(x, positions)
    # An angle of 99 radians in float32 is off by up to 4e-6.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("with_past", [False, True])
def test_attention_is_one_softmax_over_the_committed_past_and_the_visible_fresh_keys(groups, with_past):
    B, K, Q, S, D = 3, 2, 4, 6, 8
    q, k, v = normal(0, B, K, groups * Q, D), normal(1, B, K, Q, D), normal(2, B, K, Q, D)
    past_k, past_v = normal(3, B, K, S, D), normal(4, B, K, S, D)
    lengths = np.array([0, 4, 6]) if with_past else np.zeros(3, int)
    visible = np.random.default_rng(5).random((B, Q, Q)) < 0.5
    visible |= np.eye(Q, dtype=bool)
    expected = np.empty_like(q)
    for b, head, row in np.ndindex(B, K, groups * Q):
        seen = visible[b, row % Q]
        keys = np.concatenate([past_k[b, head, : lengths[b]], k[b, head, seen]])
        values = np.concatenate([past_v[b, head, : lengths[b]], v[b, head, seen]])
        p = np.exp(keys @ q[b, head, row] / math.sqrt(D))
        expected[b, head, row] = p @ values / p.sum()
    filled = (np.arange(past_k.shape[2]) < lengths[:, None])[:, None]
    actual = attend(q, k, v, visible, Past(past_k, past_v, filled) if with_past else None)
    np.testing.assert_allclose(actual, expected, **CLOSE)


def test_queries_may_see_different_slots_of_the_past():
    """Every query over the past that it sees is the query alone over nothing but that."""
    q, k, v = (normal(i, 2, 1, 3, 8) for i in range(3))
    past_k, past_v = (normal(i, 2, 1, 4, 8) for i in (3, 4))
    seen = np.random.default_rng(1).random((2, 3, 4)) < 0.5
    out = attend(q, k, v, causal(2, 3), Past(past_k, past_v, seen))
    for b, i in np.ndindex(2, 3):
        slots = np.flatnonzero(seen[b, i])
        keys = np.concatenate([past_k[b, 0, slots], k[b, 0, : i + 1]])
        values = np.concatenate([past_v[b, 0, slots], v[b, 0, : i + 1]])
        p = np.exp(keys @ q[b, 0, i] / math.sqrt(8))
        np.testing.assert_allclose(out[b, 0, i], p @ values / p.sum(), **CLOSE)


@pytest.mark.parametrize("filled", [0, 1, 128, 200, 256, 300])
def test_reading_the_past_block_by_block_is_reading_it_in_one_go(filled):
    """300 slots are two whole blocks and one that overlaps the second."""
    q, k, v = (normal(i, 2, 1, 6, 8) for i in range(3))
    past_k, past_v = (normal(i, 2, 1, 300, 8) for i in (3, 4))
    visible = causal(2, 6)
    seen = (np.arange(300) < filled) & (np.random.default_rng(1).random((2, 6, 300)) < 0.5)
    expected = attend(q, k, v, visible, Past(past_k, past_v, seen))
    behind = np.where((np.arange(300) < -(-filled // 128) * 128)[:, None], past_k, np.float32(np.nan))
    for read in (past_k, behind if filled <= 256 else past_k):  # what is not filled is not even read
        out = attend(q, k, v, visible, Past(read, past_v, seen, np.int32(filled)))
        np.testing.assert_allclose(out, expected, **CLOSE)


@pytest.mark.parametrize("filled", [None, 200], ids=["at once", "in blocks"])
def test_a_sink_takes_part_in_its_heads_softmax_and_has_no_value(filled):
    """As one more key would whose value is 0, also if it is far above all scores, where it leaves nothing."""
    B, K, G, Q, S, D = 2, 2, 3, 4, 300, 8
    q, k, v = normal(0, B, K, G * Q, D), normal(1, B, K, Q, D), normal(2, B, K, Q, D)
    past_k, past_v, sinks = normal(3, B, K, S, D), normal(4, B, K, S, D), normal(5, K * G)
    sinks[2] = 120.0  # whose exponential no float32 holds
    lengths = np.array([130, 200])
    seen = (np.arange(S) < lengths[:, None])[:, None]
    past = Past(past_k, past_v, seen, None if filled is None else np.int32(filled))
    actual = attend(q, k, v, causal(B, Q), past, None, sinks)
    for b, head, row in np.ndindex(B, K, G * Q):
        keys = np.concatenate([past_k[b, head, : lengths[b]], k[b, head, : row % Q + 1]])
        values = np.concatenate([past_v[b, head, : lengths[b]], v[b, head, : row % Q + 1]])
        p = np.exp((keys @ q[b, head, row] / math.sqrt(D)).astype(np.float64))
        expected = p @ values / (p.sum() + np.exp(np.float64(sinks[head * G + row // Q])))
        np.testing.assert_allclose(actual[b, head, row], expected, **CLOSE)


@pytest.mark.parametrize("filled", [None, 200])
def test_a_past_held_as_bits_is_read_as_the_values_it_holds(filled):
    """In float32, in which nothing is rounded between scores and values."""
    q, k, v = (jnp.asarray(normal(i, 2, 1, 3, 8), jnp.bfloat16) for i in range(3))
    past = [jnp.asarray(normal(i, 2, 1, 300, 8), jnp.bfloat16) for i in (3, 4)]
    visible, seen = np.ones((2, 3, 3), bool), np.broadcast_to(np.arange(300) < 200, (2, 1, 300))
    filled = None if filled is None else np.int32(filled)
    expected = attend(q, k, v, visible, Past(*(part.astype(jnp.float32) for part in past), seen, filled))
    bits = [to_cache_storage(part, jnp.uint16) for part in past]
    assert all(part.dtype == jnp.uint16 for part in bits)
    np.testing.assert_array_equal(attend(q, k, v, visible, Past(*bits, seen, filled)), expected)


def test_attention_never_reads_slots_past_the_length():
    q = normal(0, 1, 1, 1, 8)
    visible, zeros = np.ones((1, 1, 1), bool), np.zeros((1, 1, 4, 8), np.float32)
    seen = np.array([[[True, True, False, False]]])
    filled = zeros.copy()
    filled[:, :, 2:] = 1e4
    full, empty = Past(filled, filled, seen), Past(zeros, zeros, seen)
    np.testing.assert_array_equal(attend(q, q, q, visible, full), attend(q, q, q, visible, empty))


@pytest.mark.parametrize("shape", [(1, 6), (2, 3, 6)])
def test_matmul_and_its_gradients_are_those_of_a_plain_product(shape):
    x, w, dy = (jnp.asarray(normal(i, *s)) for i, s in enumerate([shape, (6, 5), (*shape[:-1], 5)]))
    y, gradient = jax.vjp(matmul, x, w)
    expected_y, expected_gradient = jax.vjp(lambda x, w: x @ w, x, w)
    np.testing.assert_allclose(y, expected_y, **CLOSE)
    for actual, expected in zip(gradient(dy), expected_gradient(dy), strict=True):
        np.testing.assert_allclose(actual, expected, **CLOSE)


@pytest.mark.parametrize("rows", [1, 3])
def test_matmul_in_bfloat16_accumulates_in_float32_and_returns_the_activations_dtype(rows):
    x, w = jnp.asarray(normal(0, rows, 512)), jnp.asarray(normal(1, 512, 16), jnp.bfloat16)
    expected = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(w, np.float64)
    actual = matmul(x, w)
    assert actual.dtype == jnp.float32
    # bfloat16 sums of 512 terms of size 1 would be off by about 0.1.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-3)


def test_head_logits_pass_gradients_to_the_hidden_states_and_none_to_the_frozen_head():
    hidden, head, dy = (jnp.asarray(normal(i, *s)) for i, s in enumerate([(2, 3, 8), (5, 8), (2, 3, 5)]))
    logits, gradient = jax.vjp(head_logits, hidden, head)
    np.testing.assert_allclose(logits, hidden @ head.T, **CLOSE)
    to_hidden, to_head = gradient(dy)
    np.testing.assert_allclose(to_hidden, dy @ head, **CLOSE)
    np.testing.assert_array_equal(to_head, np.zeros_like(head))


@pytest.mark.parametrize("num_rows", [1, 2, FEW_HEAD_ROWS, FEW_HEAD_ROWS + 1])
def test_head_logits_are_the_same_products_for_any_number_of_rows(num_rows):
    hidden, head = jnp.asarray(normal(0, num_rows, 8)), jnp.asarray(normal(1, 40, 8))
    np.testing.assert_allclose(jax.jit(head_logits)(hidden, head), hidden @ head.T, **CLOSE)


def test_rms_norm_divides_by_the_root_mean_square():
    x, scale = normal(0, 3, 8) * 10, normal(1, 8)
    expected = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5), expected, **CLOSE)


@pytest.mark.parametrize("span", [None, (1, 3)])
def test_a_stack_and_a_list_of_layers_give_the_same_results(span):
    config = LayerConfig(8, 12, 2, 1, 4, 1e-5)
    make = jax.jit(jax.vmap(lambda key: DecoderLayer(config, key)))  # one program instead of one an operation
    layers = make(jax.random.split(jax.random.key(0), 3))
    x, positions, visible = normal(0, 2, 3, 8), np.broadcast_to(np.arange(3), (2, 3)), causal(2, 3)
    past = Past(*(jnp.asarray(normal(i, 3, 2, 1, 5, 4)) for i in (1, 2)), np.tile(np.arange(5) < 3, (3, 2, 1, 1)))

    def body(x, layer_and_past):
        layer, past = layer_and_past
        return layer(x, rotation(positions, RopeConfig(), 4), Cached(visible, past))

    def run(stacks):
        return run_layers(body, jnp.asarray(x), stacks, span)

    out, (k, v) = jax.jit(run)((layers, past))
    listed = (nnx.List(unstack(layers, 3)), unstack(past, 3))
    listed_out, results = jax.jit(run)(listed)
    assert len(results) == (3 if span is None else span[1] - span[0])
    np.testing.assert_allclose(out, listed_out, **CLOSE)
    for stacked_part, parts in zip((k, v), zip(*results, strict=True), strict=True):
        np.testing.assert_allclose(stacked_part, np.stack(parts), **CLOSE)
    assert not np.allclose(out, x)


def linears(layer: nnx.Module) -> list[Linear]:
    return [module for _, module in nnx.iter_modules(layer) if isinstance(module, Linear)]


@pytest.mark.parametrize("num_tokens", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_of_row_weights_gives_the_same_results(num_tokens, dtype):
    config = LayerConfig(8, 12, 2, 1, 4, 1e-5, attention_bias=True, mlp_bias=True)
    layer = jax.jit(lambda: DecoderLayer(config, jax.random.key(0), dtype))()
    by_rows = nnx.merge(*nnx.split(layer))
    to_rows(by_rows)
    assert len(linears(by_rows)) == 7 and all(isinstance(linear.weight, RowWeight) for linear in linears(by_rows))
    x, positions, visible = jnp.asarray(normal(0, 1, num_tokens, 8)), np.arange(num_tokens)[None], causal(1, num_tokens)
    run = jax.jit(lambda layer: layer(x, rotation(positions, RopeConfig(), 4), Cached(visible)))
    # In bfloat16 a sum in another order can round to a neighbour where the next product reads it.
    close = CLOSE if dtype == jnp.float32 else dict(rtol=2**-7, atol=2**-7)
    as_float = functools.partial(jax.tree.map, lambda a: np.asarray(a, np.float32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), as_float(run(by_rows)), as_float(run(layer)))


def test_matrices_of_single_layers_alone_become_row_weights():
    config = LayerConfig(8, 12, 2, 1, 4, 1e-5)
    layer = jax.jit(lambda: DecoderLayer(config, jax.random.key(0)))()
    by_rows = nnx.merge(*nnx.split(layer))
    to_rows(by_rows)
    for linear, turned in zip(linears(layer), linears(by_rows), strict=True):
        assert turned.weight.shape == linear.weight.shape[::-1] and turned.weight.axes == linear.weight.axes[::-1]
        np.testing.assert_array_equal(turned.matrix, linear.matrix)
    assert by_rows.input_norm.weight.shape == layer.input_norm.weight.shape
    to_columns(by_rows)
    jax.tree.map(np.testing.assert_array_equal, by_rows, layer)
    stacked = stack([layer, layer])
    to_rows(stacked)
    assert not any(isinstance(linear.weight, RowWeight) for linear in linears(stacked))


def test_a_loop_that_embeds_bfloat16_tokens_on_a_cpu_converts_no_whole_table():
    table, tokens = jnp.asarray(normal(0, 1000, 24), jnp.bfloat16), jnp.asarray([[3, 999, 3]])

    def summed(table, tokens):
        def add(i, x):
            return x + embed(table, tokens - i, jnp.float32)

        return jax.lax.fori_loop(0, 3, add, jnp.zeros((1, 3, 24)))

    compiled = jax.jit(summed).lower(table, tokens).compile()
    assert "bf16[1000,24]" in (text := compiled.as_text())
    assert not re.search(r"(f32|u16)\[1000,24\]\S* (fusion|convert)", text)
    expected = sum(table[tokens - i].astype(jnp.float32) for i in range(3))
    np.testing.assert_array_equal(compiled(table, tokens), expected)


def test_stack_undoes_unstack():
    tree = {"a": jnp.asarray(normal(0, 3, 2)), "b": jnp.asarray(normal(1, 3))}
    jax.tree.map(np.testing.assert_array_equal, stack(unstack(tree, 3)), tree)
