"""MXFP8: blocks of 32 eight-bit floats (E4M3) that share one power-of-two scale (E8M0).

The format is that of the OCP Microscaling Formats (MX) specification v1.0, sections 5.1 (blocks), 5.3.1 (FP8 E4M3:
bias 7, largest value 448, no infinities), 5.4.1 (E8M0) and 6.3 (conversion). Like :mod:`torq_jax.mxfp4`, everything
works on the bit patterns with integer operations, so that results are the same everywhere.

On normally distributed values its mean squared error is 1/18 of MXFP4's, for 8.25 bits a value instead of 4.25: it
is for the few places that need it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from torq_jax import mxfp4
from torq_jax.mxfp4 import BLOCK, SCALE_BIAS, SCALE_NAN

ScaleRule = Literal["floor", "ceil"]
SCALE_RULES: tuple[str, ...] = get_args(ScaleRule)

E4M3_MAX = 448.0
"""Largest magnitude; its code is 0x7E, that of NaN 0x7F. Bit 7 of a code is the sign."""

_MANTISSA = 23  # of float32; E4M3 has 3
_INF_BITS = 0xFF << _MANTISSA
_LARGEST = 8  # exponent of 448 = 1.75 * 2**8
_LEAST = -6  # exponent of the smallest normal number; below, numbers are multiples of 2**-9
_LARGEST_CODE = 0x7E

# Added to the bits of amax, these raise its exponent field by one exactly where the rule lies above floor.
_CARRY = {"floor": 0, "ceil": (1 << (_MANTISSA - 2)) - 1}  # mantissa > 1.75


@dataclasses.dataclass(frozen=True)
class MXFP8Array(mxfp4.BlockArray):
    """An MXFP8 array: a pytree with two leaves and two static fields.

    Invariants, with ``n = size`` rounded up to a multiple of 32::

        codes.shape[axis]  == n         uint8, E4M3
        scales.shape[axis] == n / 32    uint8, E8M0: 2**(scale - 127), 0xFF is NaN
        all other axes of codes and scales are those of the original

    ``axis`` and ``size`` are those of :class:`torq_jax.mxfp4.BlockArray`.
    """


jax.tree_util.register_dataclass(MXFP8Array, data_fields=["codes", "scales"], meta_fields=["size", "axis"])


def quantize(
    x: Float[Array, ...], scale_rule: ScaleRule = "ceil", *, axis: int = -1, pad: bool = False
) -> MXFP8Array:
    """Round ``x`` to MXFP8 in blocks of 32 along ``axis``.

    Elements are rounded to the nearest E4M3 value, ties to the even code, and saturate at 448 (specification 6.3).
    The shared exponent ``e`` of a block with largest magnitude ``amax`` is, by ``scale_rule``:

    * ``"floor"``: ``floor(log2 amax) - 8``, the specification's own rule: saturates above ``464 * 2**e``;
    * ``"ceil"``: ``ceil(log2(amax / 448))``, the smallest that never saturates. It has the smaller error (on normally
      distributed values 7.03e-4 of their mean square, with floor 8.62e-4), since the exponent that it gives up costs
      a floating-point format nothing but a binade of the smallest values.

    A block of zeros has scale code 0 and codes 0. A block with a NaN or an infinity has scale 0xFF, which decodes to
    NaN, and codes 0. Exponents are clamped to -127, the least that E8M0 holds.

    Args:
      x: float32, bfloat16 or float16, any shape with at least one axis.
      scale_rule: one of :data:`SCALE_RULES`.
      axis: the axis along which blocks lie.
      pad: whether a length that is no multiple of 32 is filled up with zeros; the original length is kept in the
        result.

    Returns:
      The rounded array; see :class:`MXFP8Array` for its shapes.

    Raises:
      TorqError: an unknown rule, a dtype other than those named, an axis out of range, or a length that is no
        multiple of 32 without ``pad=True``.
    """
    return _quantize(x, scale_rule, *mxfp4.check_input(x, scale_rule, axis, pad, SCALE_RULES))


def dequantize(q: MXFP8Array, dtype: Any = jnp.float32) -> Float[Array, ...]:
    """The values of an array, ``[q.shape]`` in ``dtype``.

    Exact in float32, subnormal results included; in bfloat16 exact but for multiples of ``2**-136`` that are none of
    ``2**-133``, its smallest number, which are rounded to nearest even. A value beyond the dtype's range becomes an
    infinity. Other dtypes are rounded from float32.

    Raises:
      TorqError: codes and scales whose shapes do not belong together, or a dtype that is no floating-point one.
    """
    mxfp4.check_packed(q, dtype, BLOCK)
    return _dequantize(q, jnp.dtype(dtype))


def quantize_dequantize(
    x: Float[Array, ...], scale_rule: ScaleRule = "ceil", *, axis: int = -1, pad: bool = False
) -> Float[Array, ...]:
    """``dequantize(quantize(x, ...), x.dtype)``: the values that MXFP8 can hold nearest to ``x``.

    Arguments and errors are those of :func:`quantize`; shape and dtype are those of ``x``. Gradients pass as if
    nothing were rounded.
    """
    return _quantize_dequantize(x, scale_rule, *mxfp4.check_input(x, scale_rule, axis, pad, SCALE_RULES))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(x: Array, scale_rule: str, axis: int, padded: int) -> MXFP8Array:
    size = x.shape[axis]
    codes, scales = _encode(mxfp4.to_blocks(x, axis, padded), scale_rule)
    codes = mxfp4.in_blocks(codes).reshape(*codes.shape[:-2], padded)
    return MXFP8Array(jnp.moveaxis(codes, -1, axis), jnp.moveaxis(scales, -1, axis), size, axis)


@functools.partial(jax.jit, static_argnums=(1,))
def _dequantize(q: MXFP8Array, dtype: Any) -> Array:
    codes = jnp.moveaxis(q.codes, q.axis, -1)
    codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // BLOCK, BLOCK)
    values = _decode(codes, jnp.moveaxis(q.scales, q.axis, -1), dtype)  # [..., blocks, 32]
    return mxfp4.from_blocks(values, q.size, q.axis)


@mxfp4.straight_through
def _quantize_dequantize(x: Array, scale_rule: str, axis: int, padded: int) -> Array:
    size = x.shape[axis]
    codes, scales = _encode(mxfp4.to_blocks(x, axis, padded), scale_rule)
    return mxfp4.from_blocks(mxfp4.in_blocks(_decode(codes, scales, x.dtype)), size, axis)


def _encode(
    blocks: Array, scale_rule: str
) -> tuple[UInt8[Array, "... blocks 32"], UInt8[Array, "... blocks"]]:
    """Codes and scale codes of ``[..., blocks, 32]``."""
    bits = mxfp4.float32_bits(blocks)
    magnitude = bits & 0x7FFFFFFF  # ordered as the magnitudes are
    sign = ((bits >> 24) & 0x80).astype(jnp.uint8)
    amax = jnp.max(magnitude, axis=-1)  # [..., blocks]
    # A subnormal amax has exponent field 0, which every rule clamps.
    exponent = ((amax + _CARRY[scale_rule]) >> _MANTISSA) - (127 + _LARGEST)
    exponent = jnp.maximum(exponent, -SCALE_BIAS)
    codes = _round_to_codes(magnitude, exponent)

    finite, nonzero = amax < _INF_BITS, amax > 0
    scales = jnp.where(finite, jnp.where(nonzero, exponent + SCALE_BIAS, 0), SCALE_NAN).astype(jnp.uint8)
    codes = jnp.where((finite & nonzero)[..., None], codes.astype(jnp.uint8) | sign, jnp.uint8(0))
    return codes, scales


def _round_to_codes(
    magnitude: Int32[Array, "... blocks 32"], exponent: Int32[Array, "... blocks"]
) -> Int32[Array, "... blocks 32"]:
    """Codes 0 to 0x7E of magnitudes divided by ``2**exponent``, ties to even."""
    binade, mantissa = _normalised(magnitude)
    binade = binade - exponent[..., None]
    # Three bits stay behind the leading one, fewer below the smallest normal number. Of 25 bits or more that are
    # dropped, nothing is left to round up.
    drop = jnp.minimum(_MANTISSA - 3 + jnp.maximum(_LEAST - binade, 0), 25)
    even = (mantissa >> drop) & 1
    rounded = (mantissa + (1 << (drop - 1)) - 1 + even) >> drop
    # Counted from 8, the code of the smallest normal number; a mantissa rounded up to 2 goes on in the next binade.
    return jnp.minimum(rounded + 8 * jnp.maximum(binade - _LEAST, 0), _LARGEST_CODE)


def _normalised(magnitude: Int32[Array, ...]) -> tuple[Int32[Array, ...], Int32[Array, ...]]:
    """``floor(log2 x)`` and the mantissa in ``2**23 .. 2**24 - 1`` of float32 patterns, subnormal ones included.

    Zero gets an exponent far below all others.
    """
    # A subnormal number is its pattern times 2**-149, and as an integer turned into a float it is normal.
    subnormal = jax.lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32) - (149 << _MANTISSA)
    bits = jnp.where(magnitude < 1 << _MANTISSA, subnormal, magnitude)
    return (bits >> _MANTISSA) - 127, (bits & ((1 << _MANTISSA) - 1)) | (1 << _MANTISSA)


def _decode(codes: Array, scales: Array, dtype: Any) -> Array:
    """Values of ``codes [..., blocks, 32]`` under ``scales [..., blocks]``."""
    exponent = scales.astype(jnp.int32) - SCALE_BIAS
    code = (codes & 0x7F).astype(jnp.int32)
    # Codes below 8 are subnormal, code * 2**-9: as floats, their exponent and mantissa can be read off.
    small = jax.lax.bitcast_convert_type(code.astype(jnp.float32), jnp.int32) - (9 << _MANTISSA)
    own = jnp.where(
        code < 8, small, (code + ((127 - 7) << 3)) << (_MANTISSA - 3)
    )  # float32 bits of the element
    field, mantissa = (own >> _MANTISSA) + exponent[..., None], own & ((1 << _MANTISSA) - 1)
    # Multiples of 2**-136 at the least: no set bit of a subnormal float32 is lost.
    subnormal = (mantissa | (1 << _MANTISSA)) >> jnp.clip(1 - field, 0, 31)
    bits = jnp.where(
        field > 0, jnp.where(field < 0xFF, (field << _MANTISSA) | mantissa, _INF_BITS), subnormal
    )
    bits = jnp.where(code == 0, 0, bits) | ((codes & 0x80).astype(jnp.int32) << 24)
    bits = jnp.where((scales == SCALE_NAN)[..., None] | (code == 0x7F), 0x7FC00000, bits)
    if dtype == jnp.bfloat16:  # by hand: a conversion may flush subnormals
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)
