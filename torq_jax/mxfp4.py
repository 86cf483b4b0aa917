"""MXFP4: blocks of 32 four-bit floats (E2M1) that share one power-of-two scale (E8M0).

The format is that of the OCP Microscaling Formats (MX) specification v1.0, sections 5.1 (blocks), 5.3.3
(FP4 E2M1), 5.4.1 (E8M0) and 6.3 (conversion). Everything works on the bit patterns with integer operations:
results do not depend on a backend's treatment of subnormal numbers or of ``log2``, and are the same on a
CPU, a GPU and a TPU.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from torq_jax.errors import TorqError

BLOCK = 32
"""Elements that share one scale."""

ScaleRule = Literal["floor", "ceil", "even", "mse"]
SCALE_RULES: tuple[str, ...] = get_args(ScaleRule)

E2M1_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
"""Magnitudes by code; bit 3 of a code is the sign."""

SCALE_NAN = 0xFF
SCALE_BIAS = 127

# A magnitude rounds to code j or above when it lies beyond the j-th of these; on the boundary itself a tie goes
# to the even code, so boundaries below an odd code are exclusive and those below an even code inclusive.
_BOUNDARIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

_MANTISSA = 23
_INF_BITS = 0xFF << _MANTISSA


@dataclasses.dataclass(frozen=True)
class MXFP4Array:
    """A packed MXFP4 array: a pytree with two leaves and two static fields.

    Invariants, with ``n = size`` rounded up to a multiple of 32::

        codes.shape[axis]  == n / 2     uint8, two codes a byte, the lower index in the low nibble
        scales.shape[axis] == n / 32    uint8, E8M0: 2**(scale - 127), 0xFF is NaN
        all other axes of codes and scales are those of the original

    ``axis`` counts from the end (it is negative), so an array keeps its meaning when ``vmap``, ``scan`` or
    stacking add or remove leading axes. ``size`` is the original length along ``axis``; elements past it are
    padding, zero and dropped by :func:`dequantize`. For a weight ``[out, in]`` with ``axis=-1`` this is the
    layout of Hugging Face, vLLM's compressed-tensors and torchao.
    """

    codes: UInt8[Array, ...]
    scales: UInt8[Array, ...]
    size: int
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the original array."""
        shape = list(self.codes.shape)
        shape[self.axis] = self.size
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Number of axes of the original array."""
        return len(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return int(np.prod(self.codes.shape)) + int(np.prod(self.scales.shape))


jax.tree_util.register_dataclass(MXFP4Array, data_fields=["codes", "scales"], meta_fields=["size", "axis"])


def quantize(
    x: Float[Array, ...], scale_rule: ScaleRule, *, axis: int = -1, pad: bool = False
) -> MXFP4Array:
    """Round ``x`` to MXFP4 in blocks of 32 along ``axis``.

    Elements are rounded to the nearest E2M1 value, ties to the even code, and saturate at 6 (specification
    6.3). The shared exponent ``e`` of a block with largest magnitude ``amax`` is, by ``scale_rule``:

    * ``"floor"``: ``floor(log2 amax) - 2``, the specification's own rule;
    * ``"ceil"``: ``ceil(log2(amax / 6))``, the smallest that never saturates;
    * ``"even"``: floor of amax rounded to E2M1's precision: one more than floor from ``1.75 * 2**floor(log2 amax)``;
    * ``"mse"``: of the floor exponent and its two neighbours the one with the least squared error, compared
      exactly; ties go to the floor exponent, then to the larger.

    A block of zeros has scale code 0 and codes 0. A block with a NaN or an infinity has scale 0xFF, which
    decodes to NaN, and codes 0. Exponents are clamped to -127, the least that E8M0 holds.

    Args:
      x: float32, bfloat16 or float16, any shape with at least one axis.
      scale_rule: one of :data:`SCALE_RULES`.
      axis: the axis along which blocks lie.
      pad: whether a length that is no multiple of 32 is filled up with zeros; the original length is kept in
        the result.

    Returns:
      The packed array; see :class:`MXFP4Array` for its shapes.

    Raises:
      TorqError: an unknown rule, a dtype other than those named, an axis out of range, or a length that is no
        multiple of 32 without ``pad=True``.
    """
    return _quantize(x, scale_rule, *_check(x, scale_rule, axis, pad))


def dequantize(q: MXFP4Array, dtype: Any = jnp.float32) -> Float[Array, ...]:
    """The values of a packed array, ``[q.shape]`` in ``dtype``.

    Exact in float32 and bfloat16, subnormal results included; a value beyond the dtype's range becomes an
    infinity. Other dtypes are rounded from float32.

    Raises:
      TorqError: codes and scales whose shapes do not belong together, or a dtype that is no floating-point one.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TorqError(f"cannot dequantise to {jnp.dtype(dtype)}: ask for a floating-point dtype")
    axis, size = q.axis, q.size
    codes, scales = q.codes.shape, q.scales.shape
    expected = list(codes)
    expected[axis] = codes[axis] // (BLOCK // 2)
    if codes[axis] % (BLOCK // 2) or list(scales) != expected or size > 2 * codes[axis]:
        raise TorqError(
            f"codes {codes} and scales {scales} of size {size} do not belong together: along axis {axis} "
            "there must be 16 bytes of codes for each scale"
        )
    return _dequantize(q, jnp.dtype(dtype))


def quantize_dequantize(
    x: Float[Array, ...], scale_rule: ScaleRule, *, axis: int = -1, pad: bool = False
) -> Float[Array, ...]:
    """``dequantize(quantize(x, ...), x.dtype)`` without packing: the values that MXFP4 can hold nearest to ``x``.

    Arguments and errors are those of :func:`quantize`; shape and dtype are those of ``x``.
    """
    return _quantize_dequantize(x, scale_rule, *_check(x, scale_rule, axis, pad))


def unpack(codes: UInt8[Array, "*b n"]) -> UInt8[Array, "*b 2*n"]:
    """Two codes a byte -> one code a byte, along the last axis, the low nibble first."""
    return jnp.stack([codes & 0xF, codes >> 4], axis=-1).reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def pack(codes: UInt8[Array, "*b n"]) -> UInt8[Array, "*b n/2"]:
    """Inverse of :func:`unpack`."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def padded_size(size: int) -> int:
    """``size`` rounded up to a multiple of 32."""
    return -(-size // BLOCK) * BLOCK


def _check(x: Array, scale_rule: str, axis: int, pad: bool) -> tuple[int, int]:
    """Validate the arguments of quantize; the axis from the end and its padded length."""
    if scale_rule not in SCALE_RULES:
        raise TorqError(f"unknown scale rule {scale_rule!r}: must be one of {', '.join(SCALE_RULES)}")
    dtype = np.dtype(getattr(x, "dtype", type(x)))  # not result_type, which calls numpy's float64 float32
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TorqError(f"cannot quantise {dtype}: cast to float32, bfloat16 or float16 first")
    shape = jnp.shape(x)
    if not -len(shape) <= axis < len(shape):
        raise TorqError(f"axis {axis} is out of range for shape {shape}")
    axis = axis - len(shape) if axis >= 0 else axis
    size = shape[axis]
    if size % BLOCK and not pad:
        raise TorqError(
            f"axis {axis} has length {size}, not a multiple of {BLOCK}: pass pad=True to fill it up with "
            f"zeros to {padded_size(size)}"
        )
    return axis, padded_size(size)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(x: Array, scale_rule: str, axis: int, padded: int) -> MXFP4Array:
    size = x.shape[axis]
    codes, scales = _encode(_blocks(x, axis, padded), scale_rule)
    packed = pack(codes.reshape(*codes.shape[:-2], padded))
    return MXFP4Array(jnp.moveaxis(packed, -1, axis), jnp.moveaxis(scales, -1, axis), size, axis)


@functools.partial(jax.jit, static_argnums=(1,))
def _dequantize(q: MXFP4Array, dtype: Any) -> Array:
    codes = unpack(jnp.moveaxis(q.codes, q.axis, -1))
    padded = codes.shape[-1]
    codes = codes.reshape(*codes.shape[:-1], padded // BLOCK, BLOCK)  # [..., blocks, 32]
    values = _decode(codes, jnp.moveaxis(q.scales, q.axis, -1), dtype)
    values = values.reshape(*values.shape[:-2], padded)[..., : q.size]
    return jnp.moveaxis(values, -1, q.axis)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize_dequantize(x: Array, scale_rule: str, axis: int, padded: int) -> Array:
    size = x.shape[axis]
    codes, scales = _encode(_blocks(x, axis, padded), scale_rule)
    values = _decode(codes, scales, x.dtype)
    return jnp.moveaxis(values.reshape(*values.shape[:-2], padded)[..., :size], -1, axis)


def _blocks(x: Array, axis: int, padded: int) -> Array:
    """``[..., n, ...] -> [..., blocks, 32]``, padded with zeros."""
    x = jnp.moveaxis(x, axis, -1)
    if padded != x.shape[-1]:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - x.shape[-1])])
    return x.reshape(*x.shape[:-1], padded // BLOCK, BLOCK)


def _float32_bits(x: Array) -> Int32[Array, ...]:
    """Bit pattern of ``x`` as float32, exact for every dtype that is accepted."""
    if x.dtype == jnp.bfloat16:
        # By hand: a conversion may flush subnormals.
        return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) << 16
    if x.dtype == jnp.float16:
        half = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32)
        field, mantissa = (half >> 10) & 0x1F, half & 0x3FF
        subnormal = mantissa.astype(jnp.float32) * np.float32(2.0**-24)  # normal in float32
        normal = (jnp.where(field < 0x1F, field + 112, 0xFF) << _MANTISSA) | (mantissa << 13)
        magnitude = jnp.where(field > 0, normal, jax.lax.bitcast_convert_type(subnormal, jnp.int32))
        return magnitude | ((half >> 15) << 31)
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _encode(blocks: Array, scale_rule: str) -> tuple[UInt8[Array, "... blocks 32"], UInt8[Array, "... blocks"]]:
    """Codes (one a byte) and scale codes of ``[..., blocks, 32]``."""
    bits = _float32_bits(blocks)
    magnitude = bits & 0x7FFFFFFF  # ordered as the magnitudes are
    sign = ((bits >> 28) & 8).astype(jnp.uint8)
    amax = jnp.max(magnitude, axis=-1)  # [..., blocks]

    exponent = jnp.maximum(_exponent(amax, scale_rule), -SCALE_BIAS)
    if scale_rule == "mse":
        exponent = _least_error_exponent(magnitude, exponent)
    codes = _round_to_codes(magnitude, exponent)

    finite, nonzero = amax < _INF_BITS, amax > 0
    scales = jnp.where(finite, jnp.where(nonzero, exponent + SCALE_BIAS, 0), SCALE_NAN).astype(jnp.uint8)
    codes = jnp.where((finite & nonzero)[..., None], codes.astype(jnp.uint8) | sign, jnp.uint8(0))
    return codes, scales


def _exponent(amax: Int32[Array, ...], scale_rule: str) -> Int32[Array, ...]:
    """Shared exponent from the bits of amax, before clamping; for a subnormal amax every rule ends at the clamp."""
    floor_log2 = (amax >> _MANTISSA) - 127
    mantissa = amax & ((1 << _MANTISSA) - 1)
    if scale_rule == "ceil":  # amax / 6 = mantissa / 1.5 * 2**(floor_log2 - 2)
        return floor_log2 - 2 + (mantissa > (1 << 22)).astype(jnp.int32)
    if scale_rule == "even":
        return floor_log2 - 2 + (mantissa >= (3 << 21)).astype(jnp.int32)
    return floor_log2 - 2


def _round_to_codes(
    magnitude: Int32[Array, "... blocks 32"], exponent: Int32[Array, "... blocks"]
) -> Int32[Array, "... blocks 32"]:
    """Codes 0 to 7 of magnitudes divided by ``2**exponent``: how many decision boundaries lie below each."""
    codes = jnp.zeros(magnitude.shape, jnp.int32)
    for code, boundary in enumerate(_BOUNDARIES, start=1):
        bound = _scaled_bits(boundary, exponent) + code % 2  # exclusive below an odd code
        codes += (magnitude >= bound[..., None]).astype(jnp.int32)
    return codes


def _scaled_bits(value: float, exponent: Int32[Array, ...]) -> Int32[Array, ...]:
    """Float32 bits of ``value * 2**exponent`` (value > 0 with at most two mantissa bits), subnormals included."""
    bits = int(np.float32(value).view(np.int32))
    field, mantissa = (bits >> _MANTISSA) + exponent, bits & ((1 << _MANTISSA) - 1)
    normal = (field << _MANTISSA) | mantissa
    # exponent >= -127 and value >= 0.25 keep the shift at 3 or less, so no set bit is lost.
    subnormal = (mantissa | (1 << _MANTISSA)) >> jnp.clip(1 - field, 0, 31)
    return jnp.where(field > 0, jnp.where(field < 0xFF, normal, _INF_BITS), subnormal)


def _least_error_exponent(
    magnitude: Int32[Array, "... blocks 32"], floor: Int32[Array, "... blocks"]
) -> Int32[Array, "... blocks"]:
    """Of ``floor``, ``floor + 1`` and ``floor - 1`` the exponent with the least squared rounding error.

    The difference of two candidates' errors is ``sum (q1 - q0) (q1 + q0 - 2 y)``, which only elements large
    enough to round differently enter; in fixed point it fits exactly in two int32 sums, so the choice is
    the same on every machine.
    """
    best = floor
    best_q = _quarter_units(magnitude, floor, floor)
    y = _fixed_point(magnitude, floor)
    for step in (1, -1):
        candidate = floor + step
        q = _quarter_units(magnitude, candidate, floor)
        better = _squared_error_falls(y, best_q, q) & (candidate >= -SCALE_BIAS)
        best = jnp.where(better, candidate, best)
        best_q = jnp.where(better[..., None], q, best_q)
    return best


def _quarter_units(magnitude: Array, exponent: Array, floor: Array) -> Int32[Array, "... blocks 32"]:
    """Rounded magnitudes in units of ``2**(floor - 2)``, for an exponent at most one away from floor."""
    codes = _round_to_codes(magnitude, exponent)
    # Twice the E2M1 value: 0 1 2 3 4 6 8 12.
    doubled = jnp.where(codes < 4, codes, (2 + (codes & 1)) << (codes >> 1) >> 1)
    return doubled << (1 + exponent - floor)[..., None]


def _fixed_point(magnitude: Array, floor: Array) -> Int32[Array, "... blocks 32"]:
    """Magnitudes over ``2**floor`` with 26 fraction bits, exact for those of 1/8 and above."""
    field = magnitude >> _MANTISSA
    mantissa = (magnitude & ((1 << _MANTISSA) - 1)) | jnp.where(field > 0, 1 << _MANTISSA, 0)
    shift = jnp.maximum(field, 1) - 150 - floor[..., None] + 26
    return jnp.where(shift >= 0, mantissa << jnp.clip(shift, 0, 7), mantissa >> jnp.clip(-shift, 0, 31))


def _squared_error_falls(y: Array, q0: Array, q1: Array) -> Array:
    """Whether ``sum (y - q1)**2 < sum (y - q0)**2`` exactly; y has 26 fraction bits, q0 and q1 have 2."""
    step = q1 - q0  # at most 6 bits
    high = jnp.sum(step * (y >> 17), axis=-1)  # y >> 17 has 12 bits: the sum stays below 2**23
    low = jnp.sum(step * (y & 0x1FFFF), axis=-1)  # below 2**28
    own = jnp.sum(step * (q1 + q0), axis=-1)  # below 2**19
    # sum step (q1 + q0 - 2 y), up to a factor: own * 2**23 - (high * 2**17 + low) < 0
    return (own << 6) - high - (low >> 17) - ((low & 0x1FFFF) > 0).astype(jnp.int32) < 0


def _decode(codes: Array, scales: Array, dtype: Any) -> Array:
    """Values of ``codes [..., blocks, 32]`` under ``scales [..., blocks]``."""
    exponent = scales.astype(jnp.int32) - SCALE_BIAS
    code = (codes & 7).astype(jnp.int32)
    # E2M1 code s.ee.m: exponent field ee >= 1 means 1.m * 2**(ee - 1); code 1 is 0.5, a subnormal: 1.0 * 2**-1.
    field = jnp.where(code == 1, -1, (code >> 1) - 1) + exponent[..., None] + 127
    mantissa = jnp.where(code == 1, 0, (code & 1) << (_MANTISSA - 1))
    subnormal = (mantissa | (1 << _MANTISSA)) >> jnp.clip(1 - field, 0, 31)
    bits = jnp.where(field > 0, jnp.where(field < 0xFF, (field << _MANTISSA) | mantissa, _INF_BITS), subnormal)
    bits = jnp.where(code == 0, 0, bits) | ((codes & 8).astype(jnp.int32) << 28)
    bits = jnp.where((scales == SCALE_NAN)[..., None], 0x7FC00000, bits)
    if dtype == jnp.bfloat16:  # the low half is zero: at most two mantissa bits, shifted by at most two
        return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)
