"""Floating-point operations of training: a device's peak, and those that a token needs.

N levels · L layers · H hidden width · F feature layers · T tokens a row · V vocabulary.
"""

from __future__ import annotations

from typing import Any

from fasteagle_jax.devices.chips import chip
from fasteagle_jax.drafters.base import DrafterConfig


def peak_flops(device_kind: str) -> float | None:
    """Peak operations a second of a device; None if it is not known, as for a CPU."""
    known = chip(device_kind)
    return None if known is None else known.flops


def flops_per_token(
    target: Any, drafter: DrafterConfig, length: int, share: float, *, backward_passes: int = 1
) -> float:
    """Operations of a training step for each token, from the numbers of parameters.

    A product with a matrix of P parameters takes 2 P a token forward and 4 P backward (Kaplan et al., arXiv 2001.08361,
    section 2.1); attention over T tokens 4 T (heads x width) a layer forward and twice that backward (Chowdhery et al.,
    arXiv 2204.02311, appendix B, which counts the masked half as well). Here

        target, forward:             L (2 P_layer + 4 T A)
        drafter, both ways:          6 (N P_level + F H^2 + 2 H^2) + N 12 T A'
        heads, at `share` of tokens: 2 H V + N 4 H V', and 2 H V' more where V' < V

    with the heads frozen, so that backward has one product and not two; EAGLE-3's head is not, and its level reads 2 H.
    where a pointwise drafter (see DrafterConfig) has its levels too at `share` of tokens (the N - 1 before each stretch
    are left out), and its inputs, unless it makes keys and values of its own of them (these are left out).
    P_layer of a layer with experts counts those that a token has. A correction of R units adds 3 H R to P_level; edges
    of rank R add 2 H R, and 6 R V' to each level's head. With more `backward_passes` than one (DeepKD's three) all that
    is backward counts so many times. Norms, softmax and recomputation are left out.
    """
    layers = sum(target.layer_at(i).matrix_size for i in range(target.num_layers))
    forward = 2 * layers + target.num_layers * 4 * length * target.num_heads * target.head_dim
    levels, width = drafter.num_levels, drafter.num_heads * drafter.head_dim
    once = levels * (2 * drafter.level_parameters + 4 * length * width) * (share if drafter.pointwise else 1)
    once += 2 * drafter.input_parameters * (share if drafter.context_layers else 1)
    both_ways = once * (1 + 2 * backward_passes)
    reduced = drafter.draft_vocab_size < drafter.vocab_size
    of_target = 2 * target.hidden_size * (target.vocab_size + reduced * drafter.draft_vocab_size)
    head_forward, head_backward = drafter.head_flops
    heads = of_target + levels * (head_forward + backward_passes * head_backward)
    return forward + both_ways + share * heads
