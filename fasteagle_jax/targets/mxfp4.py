"""Matrices in MXFP4: blocks of 32 values of four bits, two a byte, with a power of two that they are multiplied by.

See the Open Compute Project's Microscaling Formats (MX) specification, version 1.0.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.checkpoint import StoredTensor

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1, by the lower three bits; the fourth is the sign
_VALUES = np.asarray([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], np.float32)
_EXPONENT_BIAS = 127  # of E8M0
# Both values of a byte, the lower four bits' first: float32 [256, 2].
_PAIRS = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=-1)


def unpacked(name: str, blocks: StoredTensor, scales: StoredTensor) -> StoredTensor:
    """Matrices bfloat16 [E, out, in], exact, of `blocks` uint8 [E, out, in/32, 16] and `scales` uint8 [E, out, in/32].

    Raises UserError if the shapes do not go together.
    """
    if len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape:
        raise UserError(
            f"{name} has blocks {blocks.shape} and scales {scales.shape}, which are no matrices in MXFP4: "
            "take the complete, unmodified checkpoint"
        )
    num, out, groups, size = blocks.shape

    def load(num_experts: int | None) -> np.ndarray:
        return unpack(blocks.load(num_experts), scales.load(num_experts))

    return StoredTensor((num, out, groups * size * 2), load)


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bfloat16 [..., G * 2b] of `blocks` uint8 [..., G, b] and `scales` uint8 [..., G], one matrix at a time."""
    values = np.empty((*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1] * 2), ml_dtypes.bfloat16)
    for i in range(len(blocks)):  # in float32 all experts of a layer would take gigabytes
        exponents = scales[i].astype(np.int32) - _EXPONENT_BIAS
        of_matrix = np.ldexp(_PAIRS[blocks[i]], exponents[..., None, None])  # [..., G, b, 2]
        values[i] = of_matrix.reshape(values.shape[1:])
    return values
