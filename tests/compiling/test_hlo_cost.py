"""What a compiled program costs, against programs whose costs are known by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.compiling.hlo_cost import _Counter, cost
from fasteagle_jax.compiling.hlo_parser import parse

L, H = 7, 64


def compiled(f, *args) -> str:
    return jax.jit(f).lower(*args).compile().as_text()


class Heaviest(_Counter):
    """Notes the bytes that each operation moves, with its shape and its place in the source program."""

    def __init__(self, text: str) -> None:
        program = parse(text)
        super().__init__(program, "most")
        self.moved: list[tuple[float, str, str, str]] = []
        self.computation(program.entry, {})

    def instruction(self, i, *args):
        before = len(self.moved)
        found = super().instruction(i, *args)
        if len(self.moved) == before and found.bytes:
            shape = ", ".join(f"{a.dtype}{list(a.dims)}" for a in i.shape[:3])
            self.moved.append((found.bytes, i.opcode, shape, i.where))
        return found

    def loop(self, i, body, arguments):
        before = len(self.moved)
        found = super().loop(i, body, arguments)
        turns = self.iterations(i, self.value(i.operands[0], body, arguments)) or 1
        self.moved[before:] = [(turns * size, *rest) for size, *rest in self.moved[before:]]
        return found


def layers(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def test_a_loop_counts_as_often_as_it_runs() -> None:
    x, stack = jnp.zeros((4, H)), jnp.zeros((L, H, H))
    once = cost(compiled(layers, x, stack[:1]))
    found = cost(compiled(layers, x, stack))
    assert found.product_flops == L * 2 * 4 * H * H == L * once.product_flops
    weights = L * H * H * 4
    # A CPU's compiler copies a layer's weights out of the stack before it reads them; activations come besides.
    assert 3 * weights <= found.bytes < 3.5 * weights
    assert found.unknown_loops == 0 and found.host_calls == 0 and not found.collectives

    def rounds(x, stack):
        return jax.lax.fori_loop(0, 5, lambda i, x: layers(x, stack), x)

    assert cost(compiled(rounds, x, stack)).product_flops == 5 * found.product_flops


def test_a_loop_until_the_data_says_so_counts_once() -> None:
    def f(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

    found = cost(compiled(f, jnp.zeros((4, H)), jnp.zeros((H, H))))
    assert found.unknown_loops == 1 and found.product_flops == 2 * 4 * H * H


def test_of_a_conditional_the_branch_asked_for_counts() -> None:
    def f(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: layers(x, w), lambda: x)

    text = compiled(f, jnp.zeros((4, H)), jnp.zeros((L, H, H)))
    assert cost(text, "most").product_flops == L * 2 * 4 * H * H
    assert cost(text, "least").product_flops == 0


def test_of_a_conditional_in_a_scope_both_branches_count_by_their_shares() -> None:
    def f(x, w):
        with jax.named_scope("either"):
            return jax.lax.cond(x.sum() > 1, lambda: layers(x, w), lambda: x)  # no other test's program

    text = compiled(f, jnp.zeros((4, H)), jnp.zeros((L, H, H)))
    assert cost(text, "least", shares={"either": 0.25}).product_flops == 0.25 * L * 2 * 4 * H * H
    assert cost(text, "least", shares={"other": 0.25}).product_flops == 0


def test_collectives_say_how_often_and_how_much() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P(None, None, "x"))
    rows = jax.NamedSharding(mesh, jax.P(None, "x", None))
    up, down = jax.device_put(jnp.zeros((L, H, H)), split), jax.device_put(jnp.zeros((L, H, H)), rows)
    x = jax.device_put(jnp.zeros((4, H)), jax.NamedSharding(mesh, jax.P()))

    def f(x, up, down):
        return jax.lax.scan(lambda x, w: ((x @ w[0]) @ w[1], None), x, (up, down))[0]

    found = cost(compiled(f, x, up, down))
    reduced = found.collectives["all-reduce"]
    size = L * 4 * H * 4
    assert reduced.number == L and reduced.bytes == size
    assert reduced.sent == pytest.approx(2 * 7 / 8 * size) and reduced.steps == L * 8
    assert found.product_flops == L * 2 * 2 * 4 * H * H / 8


def test_a_callback_is_a_call_to_the_host() -> None:
    def f(x):
        return jax.pure_callback(lambda x: np.asarray(x), x, x) + 1

    assert cost(compiled(f, jnp.zeros((4,)))).host_calls == 1


# As libtpu writes it: layouts in tiles, S(1) on the chip, a counter whose bound comes in by the loop's tuple.
TPU = """HloModule m, is_scheduled=true

%other_tiles (given: bf16[32,4096,512]) -> bf16[32,4096,512] {
  %given = bf16[32,4096,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %same = bf16[32,4096,512]{2,1,0:T(16,128)(2,1)} copy(%given)
}

%slice (stack: bf16[32,4096,512], i: s32[], x: bf16[4096]) -> bf16[512] {
  %x = bf16[4096]{0:T(1024)(128)(2,1)S(1)} parameter(2)
  %row = bf16[1,4096]{1,0:T(2,128)(2,1)S(1)} bitcast(%x)
  %stack = bf16[32,4096,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %laid_out = bf16[32,4096,512]{2,1,0:T(16,128)(2,1)} fusion(%stack), kind=kLoop, calls=%other_tiles
  %part = bf16[1,4096,512]{2,1,0:T(8,128)(2,1)} dynamic-slice(%laid_out, %i, %zero, %zero), dynamic_slice_sizes={1,4096,512}
  %matrix = bf16[4096,512]{1,0:T(8,128)(2,1)} bitcast(%part)
  %y = bf16[1,512]{1,0:T(2,128)(2,1)S(1)} convolution(%row, %matrix), dim_labels=bf_io->bf
  ROOT %z = bf16[512]{0:T(512)(128)(2,1)S(1)} bitcast(%y)
}

%write (cache: bf16[8,2048,128], new: bf16[8,3,128], at: s32[]) -> bf16[8,2048,128] {
  %cache = bf16[8,2048,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %new = bf16[8,3,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %at = s32[]{:T(128)S(6)} parameter(2)
  %none = s32[]{:T(128)} constant(0)
  ROOT %cache.2 = bf16[8,2048,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%cache, %new, %none, %at, %none)
}

%body (state: (s32[], bf16[32,4096,512], bf16[4096], s32[], bf16[8,2048,128], /*index=5*/bf16[8,3,128])) -> (s32[], bf16[32,4096,512], bf16[4096], s32[], bf16[8,2048,128], /*index=5*/bf16[8,3,128]) {
  %state = (s32[]{:T(128)}, bf16[32,4096,512]{2,1,0:T(8,128)(2,1)}, bf16[4096]{0:T(1024)(128)(2,1)S(1)}, s32[]{:T(128)}, bf16[8,2048,128]{2,1,0:T(8,128)(2,1)}, /*index=5*/bf16[8,3,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%state), index=0
  %w = bf16[32,4096,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %h = bf16[4096]{0:T(1024)(128)(2,1)S(1)} get-tuple-element(%state), index=2
  %end = s32[]{:T(128)} get-tuple-element(%state), index=3
  %kv = bf16[8,2048,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=4
  %fresh = bf16[8,3,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=5
  %step = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)S(6)} add(%n, %step)
  %out = bf16[512]{0:T(512)(128)(2,1)S(1)} fusion(%w, %next, %h), kind=kOutput, calls=%slice, metadata={op_name="product"}
  %kv.2 = bf16[8,2048,128]{2,1,0:T(8,128)(2,1)} fusion(%kv, %fresh, %next), kind=kLoop, calls=%write
  ROOT %new_state = (s32[]{:T(128)}, bf16[32,4096,512]{2,1,0:T(8,128)(2,1)}, bf16[4096]{0:T(1024)(128)(2,1)S(1)}, s32[]{:T(128)}, bf16[8,2048,128]{2,1,0:T(8,128)(2,1)}, /*index=5*/bf16[8,3,128]{2,1,0:T(8,128)(2,1)}) tuple(%next, %w, %h, %end, %kv.2, %fresh)
}

%goes_on (state.1: (s32[], bf16[32,4096,512], bf16[4096], s32[], bf16[8,2048,128], /*index=5*/bf16[8,3,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[32,4096,512]{2,1,0:T(8,128)(2,1)}, bf16[4096]{0:T(1024)(128)(2,1)S(1)}, s32[]{:T(128)}, bf16[8,2048,128]{2,1,0:T(8,128)(2,1)}, /*index=5*/bf16[8,3,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %n.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %end.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=3
  ROOT %less = pred[]{:T(512)} compare(%n.1, %end.1), direction=LT
}

ENTRY %main (w.0: bf16[32,4096,512], h.0: bf16[4096], kv.0: bf16[8,2048,128], fresh.0: bf16[8,3,128]) -> bf16[8,2048,128] {
  %w.0 = bf16[32,4096,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %h.0 = bf16[4096]{0:T(1024)(128)(2,1)} parameter(1)
  %kv.0 = bf16[8,2048,128]{2,1,0:T(8,128)(2,1)} parameter(2)
  %fresh.0 = bf16[8,3,128]{2,1,0:T(8,128)(2,1)} parameter(3)
  %h.1 = bf16[4096]{0:T(1024)(128)(2,1)S(1)} copy(%h.0)
  %zero.0 = s32[]{:T(128)S(6)} constant(0)
  %last = s32[]{:T(128)S(6)} constant(20)
  %begin = (s32[]{:T(128)}, bf16[32,4096,512]{2,1,0:T(8,128)(2,1)}, bf16[4096]{0:T(1024)(128)(2,1)S(1)}, s32[]{:T(128)}, bf16[8,2048,128]{2,1,0:T(8,128)(2,1)}, /*index=5*/bf16[8,3,128]{2,1,0:T(8,128)(2,1)}) tuple(%zero.0, %w.0, %h.1, %last, %kv.0, %fresh.0)
  %loop = (s32[]{:T(128)}, bf16[32,4096,512]{2,1,0:T(8,128)(2,1)}, bf16[4096]{0:T(1024)(128)(2,1)S(1)}, s32[]{:T(128)}, bf16[8,2048,128]{2,1,0:T(8,128)(2,1)}, /*index=5*/bf16[8,3,128]{2,1,0:T(8,128)(2,1)}) while(%begin), condition=%goes_on, body=%body
  ROOT %result = bf16[8,2048,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=4
}
"""  # noqa: E501


def test_bytes_of_hbm_are_those_of_slices_in_tiles_and_what_is_on_the_chip_is_free() -> None:
    found = cost(TPU)
    turns, matrix = 10, 4096 * 512 * 2
    fresh = 8 * 8 * 128 * 2  # 3 rows fill a tile of 8: read, and written in place
    scalars = turns * 8
    assert found.bytes == 4096 * 2 + turns * (matrix + 2 * fresh) + scalars
    assert max(Heaviest(TPU).moved) == (turns * matrix, "fusion", "bf16[512]", "product")


def test_a_batched_product_written_as_a_convolution_counts_without_its_padding() -> None:
    window = "window={size=8 stride=7 pad=0_0 lhs_dilate=8}"
    left, right = "bf16[8,240,128]{2,1,0}", "bf16[8,2048,128]{2,1,0}"
    text = f"""HloModule m
ENTRY %main (a: bf16[8,240,128], b: bf16[8,2048,128]) -> f32[8,240,2048] {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = f32[8,240,2048]{{2,1,0}} convolution(%a, %b), {window}, dim_labels=0bf_0oi->0bf
}}
"""
    assert cost(text).product_flops == 2 * 8 * 240 * 2048 * 128


@pytest.mark.parametrize(
    "groups, ways",
    [
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2] {'b','c'}", 8),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", 2),
    ],
)
def test_the_devices_of_an_exchange_are_counted(groups: str, ways: int) -> None:
    text = f"""HloModule m
ENTRY %main (a: f32[1024]) -> f32[{1024 * ways}] {{
  %a = f32[1024]{{0}} parameter(0)
  ROOT %b = f32[{1024 * ways}]{{0}} all-gather(%a), channel_id=1, {groups}, dimensions={{0}}
}}
"""
    assert cost(text).collectives["all-gather"].sent == (ways - 1) * 4096


def test_kernels_are_counted_as_often_as_they_run() -> None:
    # The copy before the loop, and in each of its 10 iterations two fusions: its counter is no kernel.
    assert cost(TPU).kernels == 1 + 10 * 2


KINDS = """HloModule m
%double (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} add(%x, %x)
}

%end (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  ROOT %y.1 = f32[8]{0} custom-call(%x.1), custom_call_target="AsyncCollectiveDone"
}

%few (a: (f32[8])) -> f32[8] {
  %a = (f32[8]{0}) parameter(0)
  ROOT %a.0 = f32[8]{0} get-tuple-element(%a), index=0
}

%many (b: (f32[8])) -> f32[8] {
  %b = (f32[8]{0}) parameter(0)
  %b.0 = f32[8]{0} get-tuple-element(%b), index=0
  %b.1 = f32[8]{0} fusion(%b.0), kind=kLoop, calls=%double
  ROOT %b.2 = f32[8]{0} fusion(%b.1), kind=kLoop, calls=%double
}

ENTRY %main (p: f32[8], q: f32[8,8], i: s32[]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %q = f32[8,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %renamed = f32[8]{0} bitcast(%p)
  %room = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
  %moving = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%renamed)
  %moved = f32[8]{0} copy-done(%moving)
  %fused = f32[8]{0} fusion(%moved), kind=kLoop, calls=%double
  %product = f32[8]{0} dot(%q, %fused), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %called = f32[8]{0} custom-call(%product), custom_call_target="attention"
  %copied = f32[8]{0} copy(%called)
  %sorted = f32[8]{0} sort(%copied), dimensions={0}, to_apply=%double
  %summed = f32[8]{0} all-reduce(%sorted), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%double
  %waited = f32[8]{0} fusion(%summed), kind=kCustom, calls=%end
  %given = (f32[8]{0}) tuple(%waited)
  ROOT %out = f32[8]{0} conditional(%next, %given, %given), branch_computations={%few, %many}
}
"""


def test_a_kernel_is_what_does_work_and_of_a_conditional_the_branch_asked_for() -> None:
    # fused, product, called, copied, sorted, summed; not the room, the copy beside them, the end of an exchange
    assert cost(KINDS, "least").kernels == 6
    assert cost(KINDS, "most").kernels == 6 + 2


def test_a_loop_that_data_ends_counts_as_often_as_its_scope_is_expected_to_turn() -> None:
    def rows(x: jax.Array, n: jax.Array) -> jax.Array:
        with jax.named_scope("experts"):
            return jax.lax.fori_loop(0, n, lambda _, y: jnp.tanh(y @ x), x)

    text = jax.jit(rows).lower(jnp.ones((64, 64)), jnp.int32(3)).compile().as_text()
    once, several = cost(text), cost(text, "most", {"experts": 2.5})
    assert once.unknown_loops == 1 and several.unknown_loops == 0
    assert several.product_flops == pytest.approx(2.5 * once.product_flops) and once.product_flops >= 2 * 64**3
    assert cost(text, "most", {"others": 9.0}) == once
