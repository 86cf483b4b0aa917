"""NVFP4, the other four-bit float format, for reference rows: E2M1 in blocks of 16 with E4M3 scales.

A value is ``element * block_scale * tensor_scale`` with one float32 ``tensor_scale = amax / (448 * 6)`` a
tensor, and ``block_scale`` the block's ``amax / 6``, in units of the tensor's scale, rounded to the nearest
E4M3. No part of the library: 4.5 bits a weight, and hardware of one maker.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from torq_jax import rounding
from torq_jax.errors import TorqError

BLOCK = 16
LARGEST_ELEMENT = 6.0
LARGEST_SCALE = 448.0


def quantize_dequantize(x: Array | np.ndarray, tensor_scale: float | Array | None = None) -> Array:
    """The values of NVFP4 nearest to ``x [..., d]``, blocks along the last axis; x's shape, float32.

    ``tensor_scale`` is taken from x itself where none is given.
    """
    x = jnp.asarray(x, jnp.float32)
    _check(x)
    return _nearest(x, _tensor_scale(x) if tensor_scale is None else jnp.float32(tensor_scale))


def gptq(weight: Array | np.ndarray, hessian: np.ndarray, *, damping: float = 0.01) -> Array:
    """:func:`torq_jax.rounding.gptq` to NVFP4: the values, ``[out, d]`` float32."""
    weight = jnp.asarray(weight, jnp.float32)
    _check(weight)
    factor = rounding.inverse_factor(hessian, damping)
    tensor = _tensor_scale(weight)  # of the weight as given: a tensor has one
    elements, scales = rounding.gptq_core(weight / tensor, jnp.asarray(factor), BLOCK, _candidates)
    return elements * jnp.repeat(scales, BLOCK, axis=-1) * tensor


@jax.jit
def _nearest(x: Array, tensor_scale: Array) -> Array:
    blocks = (x / tensor_scale).reshape(-1, BLOCK)
    scale = block_scale(blocks)[:, None]
    return (rounding.round_elements(blocks / scale) * scale).reshape(x.shape) * tensor_scale


def _tensor_scale(x: Array) -> Array:
    amax = jnp.max(jnp.abs(x))
    return jnp.where(amax > 0, amax / (LARGEST_SCALE * LARGEST_ELEMENT), 1.0)


def block_scale(blocks: Array) -> Array:
    """``[n, 16]`` in units of the tensor's scale -> ``[n]``."""
    scale = to_e4m3(jnp.max(jnp.abs(blocks), axis=-1) / LARGEST_ELEMENT)
    return jnp.where(
        scale > 0, scale, 1.0
    )  # where it rounds to zero: a block of zeros, which it is under 1, too


def _candidates(rows: Array) -> Array:
    return block_scale(rows)[None]


def to_e4m3(x: Array | np.ndarray) -> Array:
    """Non-negative float32 to the nearest E4M3, ties to even, saturating; the value, in float32.

    On bits, since a backend may go by way of float16 and round twice.
    """
    x = jnp.asarray(x, jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    rounded = (bits + ((1 << 19) - 1) + ((bits >> 20) & 1)) & ~((1 << 20) - 1)  # to three mantissa bits
    normal = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    subnormal = jnp.round(x * 512) / 512  # multiples of 2**-9 below 2**-6, ties to even
    return jnp.minimum(jnp.where(x < 2.0**-6, subnormal, normal), LARGEST_SCALE)


def _check(x: Array) -> None:
    if not x.ndim or x.shape[-1] % BLOCK:
        raise TorqError(
            f"shape {x.shape}: the last axis must be a multiple of {BLOCK}; fill it up with zeros"
        )
