"""Attention over packed rows: every kind gives what a loop over segments gives, and so do their gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.errors import UserError
from fasteagle_jax.nn import packed_attention as packed
from fasteagle_jax.nn.packed_attention import Packed, packed_attention

B, T, HEADS, KV, D = 2, 256, 4, 2, 128
CLOSE = dict(rtol=2e-5, atol=2e-5)  # float32, sums in another order

SEGMENTS = np.zeros((B, T), np.int32)
SEGMENTS[0, :100], SEGMENTS[0, 100:131], SEGMENTS[0, 131:250] = 1, 2, 3  # and padding
SEGMENTS[1] = 1


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((B, T, h, D), dtype=np.float32)) for h in (HEADS, KV, KV))


def slow(q, k, v, window, soft_cap, sinks=None):
    """Segment by segment, head by head."""
    out = np.zeros(q.shape, np.float32)
    for b in range(B):
        for segment in np.unique(SEGMENTS[b]):
            at = np.flatnonzero(SEGMENTS[b] == segment)
            gap = at[:, None] - at[None]
            seen = (gap >= 0) & (gap < (window or T))
            for h in range(HEADS):
                scores = np.asarray(q[b, at, h] @ k[b, at, h // (HEADS // KV)].T) / D**0.5
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                largest = np.where(seen, scores, -np.inf).max(axis=1, keepdims=True)
                p = np.exp(np.where(seen, scores, -np.inf) - largest)
                of_sink = 0 if sinks is None else np.exp(sinks[h] - largest)
                out[b, at, h] = p / (p.sum(axis=1, keepdims=True) + of_sink) @ np.asarray(v[b, at, h // (HEADS // KV)])
    return out


@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (40, None), (40, 1.5)])
@pytest.mark.parametrize("kind", ["xla", "splash"])
def test_every_kind_is_attention_segment_by_segment(qkv, kind, window, soft_cap):
    out = jax.jit(lambda *x: packed_attention(*x, Packed(jnp.asarray(SEGMENTS), window, kind, soft_cap)))(*qkv)
    np.testing.assert_allclose(out, slow(*qkv, window, soft_cap), **CLOSE)


@pytest.mark.parametrize(("window", "kind"), [(None, "xla"), (None, "splash"), (40, "splash")])
def test_every_kind_has_sinks(qkv, window, kind):
    sinks = np.asarray([0.5, -1.0, 3.0, 1.0], np.float32)
    out = jax.jit(lambda *x: packed_attention(*x, Packed(jnp.asarray(SEGMENTS), window, kind), sinks))(*qkv)
    np.testing.assert_allclose(out, slow(*qkv, window, None, sinks), **CLOSE)
    assert "it takes no sinks" in packed._no_cudnn(*qkv, Packed(jnp.asarray(SEGMENTS)), sinks)


@pytest.mark.parametrize(("window", "size"), [(None, 64), (40, 64), (None, 100)])  # 100: two blocks and 56 queries
def test_queries_in_blocks_are_queries_at_once_with_gradients(qkv, window, size):
    segments = jnp.asarray(SEGMENTS)

    def loss(q, k, v, block):
        out = packed._in_blocks(q, k, v, Packed(segments, window, "xla"), block)
        return (out * jnp.cos(jnp.arange(D))).sum()

    once, blocks = (
        jax.jit(jax.value_and_grad(functools.partial(loss, block=block), argnums=(0, 1, 2)))(*qkv)
        for block in (T, size)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), blocks, once)


def test_splash_attentions_gradients_are_the_plain_ones(qkv):
    segments = jnp.asarray(SEGMENTS)

    def loss(q, k, v, kind):
        return (packed_attention(q, k, v, Packed(segments, None, kind)) * jnp.cos(jnp.arange(D))).sum()

    plain, splash = (
        jax.jit(jax.grad(functools.partial(loss, kind=kind), argnums=(0, 1, 2)))(*qkv) for kind in ("xla", "splash")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), splash, plain)


@pytest.mark.parametrize("num_tokens", [8192, 8000])  # 8000 is no multiple of a block's 512
def test_no_scores_of_a_whole_row_are_made(num_tokens):
    """8192 tokens: float32 scores of the 4 heads of a row would be 1 GiB, and a gradient needs several such arrays."""
    shape = jax.ShapeDtypeStruct
    q, k = (shape((1, num_tokens, heads, 64), jnp.float32) for heads in (HEADS, KV))

    def loss(q, k, v, segments):
        return packed_attention(q, k, v, Packed(segments, None, "xla")).sum()

    compiled = jax.jit(jax.grad(loss)).lower(q, k, k, shape((1, num_tokens), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < HEADS * num_tokens**2 * 4 / 2


def test_unknown_kinds_and_lengths_are_user_errors(qkv):
    with pytest.raises(UserError, match="attention 'flash' is not known: use one of auto, xla, splash, cudnn"):
        packed_attention(*qkv, Packed(jnp.asarray(SEGMENTS), None, "flash"))
    short = tuple(x[:, :100] for x in qkv)
    with pytest.raises(UserError, match="splash attention over 100 tokens: use a length that is a multiple of 128"):
        packed_attention(*short, Packed(jnp.asarray(SEGMENTS[:, :100]), None, "splash"))
