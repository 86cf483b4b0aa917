"""MXFP4: blocks of 32 four-bit floats (E2M1) that share one power-of-two scale (E8M0).

The format is that of the OCP Microscaling Formats (MX) specification v1.0, sections 5.1 (blocks), 5.3.3
(FP4 E2M1), 5.4.1 (E8M0) and 6.3 (conversion). Everything works on the bit patterns with integer operations:
results do not depend on a backend's treatment of subnormal numbers or of ``log2``, and are the same on a
CPU, a GPU and a TPU.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels.reference import CARRY
from torq_jax.errors import TorqError

BLOCK = 32
"""Elements that share one scale."""

ScaleRule = Literal["floor", "ceil", "even", "mse"]
SCALE_RULES: tuple[str, ...] = get_args(ScaleRule)

E2M1_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
"""Magnitudes by code; bit 3 of a code is the sign."""

SCALE_NAN = 0xFF
SCALE_BIAS = 127

_MANTISSA = 23
_NAN_BITS = 0x7FC00000
_INF_BITS = 0xFF << _MANTISSA

_CARRY = CARRY | {"mse": 0}  # which starts from floor


@dataclasses.dataclass(frozen=True)
class BlockArray:
    """Codes and scales of an array in blocks along an axis: what the formats have in common.

    ``axis`` counts from the end (it is negative), so an array keeps its meaning when ``vmap``, ``scan`` or
    stacking add or remove leading axes. ``size`` is the original length along ``axis``; elements past it are
    padding, zero and dropped when values are asked for.
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


@dataclasses.dataclass(frozen=True)
class MXFP4Array(BlockArray):
    """A packed MXFP4 array: a pytree with two leaves and two static fields.

    Invariants, with ``n = size`` rounded up to a multiple of 32::

        codes.shape[axis]  == n / 2     uint8, two codes a byte, the lower index in the low nibble
        scales.shape[axis] == n / 32    uint8, E8M0: 2**(scale - 127), 0xFF is NaN
        all other axes of codes and scales are those of the original

    ``axis`` and ``size`` are those of :class:`BlockArray`. For a weight ``[out, in]`` with ``axis=-1`` this is the
    layout of Hugging Face, vLLM's compressed-tensors and torchao.
    """


jax.tree_util.register_dataclass(MXFP4Array, data_fields=["codes", "scales"], meta_fields=["size", "axis"])


def quantize(x: Float[Array, ...], scale_rule: ScaleRule, *, axis: int = -1, pad: bool = False) -> MXFP4Array:
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
    return _quantize(x, scale_rule, *check_input(x, scale_rule, axis, pad))


def from_compressed_tensors(packed: UInt8[Array, "*b n/2"], scale: UInt8[Array, "*b n/32"]) -> MXFP4Array:
    """A weight of compressed-tensors' ``mxfp4-pack-quantized``: ``weight_packed`` and ``weight_scale``.

    The layout is ours: two codes a byte with the lower index in the low nibble, one E8M0 byte a block.

    Raises:
      TorqError: arrays that are no uint8, or of shapes that do not fit.
    """
    for name, array in (("packed", packed), ("scale", scale)):
        if array.dtype != np.uint8:
            raise TorqError(f"{name} has dtype {array.dtype}: must be uint8")
    if packed.ndim < 1 or packed.shape != (*scale.shape[:-1], scale.shape[-1] * (BLOCK // 2)):
        raise TorqError(
            f"packed has shape {packed.shape}, scale {scale.shape}: {BLOCK // 2} bytes of codes must belong to each "
            "scale"
        )
    return MXFP4Array(packed, scale, 2 * packed.shape[-1], -1)  # type: ignore[arg-type]


def from_gpt_oss(blocks: UInt8[Array, "*b n/32 16"], scales: UInt8[Array, "*b n/32"]) -> MXFP4Array:
    """A weight as gpt-oss stores it: ``*_blocks``, with a block's 16 bytes on an axis of their own, and ``*_scales``.

    Raises:
      TorqError: as :func:`from_compressed_tensors`.
    """
    if blocks.ndim < 2 or blocks.shape[-1] != BLOCK // 2:
        raise TorqError(
            f"blocks have shape {blocks.shape}: the last axis must have the {BLOCK // 2} bytes of a block"
        )
    return from_compressed_tensors(blocks.reshape(*blocks.shape[:-2], -1), scales)


def dequantize(q: MXFP4Array, dtype: Any = jnp.float32) -> Float[Array, ...]:
    """The values of a packed array, ``[q.shape]`` in ``dtype``.

    Exact in float32 and bfloat16, subnormal results included; a value beyond the dtype's range becomes an
    infinity. Other dtypes are rounded from float32.

    Raises:
      TorqError: codes and scales whose shapes do not belong together, or a dtype that is no floating-point one.
    """
    check_packed(q, dtype, BLOCK // 2)
    return _dequantize(q, jnp.dtype(dtype))


def quantize_dequantize(
    x: Float[Array, ...], scale_rule: ScaleRule, *, axis: int = -1, pad: bool = False
) -> Float[Array, ...]:
    """``dequantize(quantize(x, ...), x.dtype)`` without packing: the values that MXFP4 can hold nearest to ``x``.

    Arguments and errors are those of :func:`quantize`; shape and dtype are those of ``x``. Gradients pass as if
    nothing were rounded, where values saturate, too (a straight-through estimate).
    """
    return _quantize_dequantize(x, scale_rule, *check_input(x, scale_rule, axis, pad))


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


def amax_exponent(
    blocks: Float[Array, "*b 32"], scale_rule: Literal["floor", "ceil", "even"]
) -> Int32[Array, "*b"]:
    """Exponent that a rule gives each block by its largest magnitude; at least -127. Blocks are finite."""
    amax = jnp.max(float32_bits(blocks) & 0x7FFFFFFF, axis=-1)
    return _amax_exponent(amax, scale_rule)


def _amax_exponent(amax: Array, scale_rule: str) -> Array:
    # A subnormal amax has exponent field 0, which every rule clamps.
    return jnp.maximum(((amax + _CARRY[scale_rule]) >> _MANTISSA) - 129, -SCALE_BIAS)


def check_input(
    x: Array, scale_rule: str, axis: int, pad: bool, rules: tuple[str, ...] = SCALE_RULES
) -> tuple[int, int]:
    """Validate the arguments of quantize; the axis from the end and its padded length."""
    if scale_rule not in rules:
        raise TorqError(f"unknown scale rule {scale_rule!r}: must be one of {', '.join(rules)}")
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


def check_packed(q: BlockArray, dtype: Any, block_bytes: int) -> None:
    """Validate the arguments of dequantize, for blocks of ``block_bytes`` bytes of codes."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TorqError(f"cannot dequantise to {jnp.dtype(dtype)}: ask for a floating-point dtype")
    axis, size = q.axis, q.size
    codes, scales = q.codes.shape, q.scales.shape
    expected = list(codes)
    expected[axis] = codes[axis] // block_bytes
    if codes[axis] % block_bytes or list(scales) != expected or size > expected[axis] * BLOCK:
        raise TorqError(
            f"codes {codes} and scales {scales} of size {size} do not belong together: along axis {axis} "
            f"there must be {block_bytes} bytes of codes for each scale"
        )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(x: Array, scale_rule: str, axis: int, padded: int) -> MXFP4Array:
    size = x.shape[axis]
    codes, scales = _encode(to_blocks(x, axis, padded), scale_rule)
    packed = pack(in_blocks(codes).reshape(*codes.shape[:-2], padded))
    return MXFP4Array(jnp.moveaxis(packed, -1, axis), jnp.moveaxis(scales, -1, axis), size, axis)


@functools.partial(jax.jit, static_argnums=(1,))
def _dequantize(q: MXFP4Array, dtype: Any) -> Array:
    codes = jnp.moveaxis(q.codes, q.axis, -1)
    codes = unpack(codes.reshape(*codes.shape[:-1], codes.shape[-1] // (BLOCK // 2), BLOCK // 2))
    values = _decode(codes, jnp.moveaxis(q.scales, q.axis, -1), dtype)  # [..., blocks, 32]
    return from_blocks(values, q.size, q.axis)


def straight_through(rounded: Callable[..., Array]) -> Callable[..., Array]:
    """``rounded(x, scale_rule, axis, padded)`` under ``jit``, with the derivative of ``x`` itself."""
    own = jax.custom_jvp(rounded, nondiff_argnums=(1, 2, 3))

    def jvp(rule: str, axis: int, padded: int, primals: tuple[Array], tangents: tuple[Array]) -> Any:
        return own(*primals, rule, axis, padded), tangents[0]

    own.defjvp(jvp)
    return jax.jit(own, static_argnums=(1, 2, 3))


@straight_through
def _quantize_dequantize(x: Array, scale_rule: str, axis: int, padded: int) -> Array:
    size = x.shape[axis]
    return from_blocks(in_blocks(_round(to_blocks(x, axis, padded), scale_rule)), size, axis)


def to_blocks(x: Array, axis: int, padded: int) -> Array:
    """``[..., n, ...] -> [..., blocks, 32]``, padded with zeros."""
    x = jnp.moveaxis(x, axis, -1)
    if padded != x.shape[-1]:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - x.shape[-1])])
    return x.reshape(*x.shape[:-1], padded // BLOCK, BLOCK)


def from_blocks(values: Array, size: int, axis: int) -> Array:
    """Inverse of :func:`to_blocks`: ``[..., blocks, 32] -> [..., size, ...]``."""
    values = values.reshape(*values.shape[:-2], values.shape[-2] * BLOCK)[..., :size]
    return jnp.moveaxis(values, -1, axis)


def in_blocks(x: Array) -> Array:
    """``x [..., blocks, 32]`` unchanged, computed in loops over blocks where that matters.

    On a CPU, XLA otherwise merges the reshape that follows into the loop and works out each block's thresholds
    anew for every element, which doubles the time. jax 0.10 drops the barrier too early for it to help.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def float32_bits(x: Array) -> Int32[Array, ...]:
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


def _encode(
    blocks: Array, scale_rule: str
) -> tuple[UInt8[Array, "... blocks 32"], UInt8[Array, "... blocks"]]:
    """Codes (one a byte) and scale codes of ``[..., blocks, 32]``."""
    bits = float32_bits(blocks)
    magnitude = bits & 0x7FFFFFFF  # ordered as the magnitudes are
    sign = ((bits >> 28) & 8).astype(jnp.uint8)
    amax = jnp.max(magnitude, axis=-1)  # [..., blocks]

    exponent = _exponent(magnitude, amax, scale_rule)
    codes = _round_to_codes(magnitude, exponent)

    finite, nonzero = amax < _INF_BITS, amax > 0
    scales = jnp.where(finite, jnp.where(nonzero, exponent + SCALE_BIAS, 0), SCALE_NAN).astype(jnp.uint8)
    codes = jnp.where((finite & nonzero)[..., None], codes.astype(jnp.uint8) | sign, jnp.uint8(0))
    return codes, scales


def _exponent(magnitude: Array, amax: Array, scale_rule: str) -> Int32[Array, "... blocks"]:
    """Exponent of each block; at least -127."""
    exponent = _amax_exponent(amax, scale_rule)
    return _least_error_exponent(magnitude, exponent) if scale_rule == "mse" else exponent


def _round(blocks: Float[Array, "... blocks 32"], scale_rule: str) -> Float[Array, "... blocks 32"]:
    """What :func:`_decode` makes of :func:`_encode`'s codes, without them: bit patterns are rounded as they lie.

    The steps, and their reasons, are those of :func:`_round_to_codes`.
    """
    bits = float32_bits(blocks)
    magnitude, sign = bits & 0x7FFFFFFF, bits & jnp.int32(-(1 << 31))
    amax = jnp.max(magnitude, axis=-1)
    exponent = _exponent(magnitude, amax, scale_rule)
    doubling = jnp.where(exponent == -SCALE_BIAS, 1 << _MANTISSA, 0)[..., None]
    magnitude = magnitude + jnp.minimum(magnitude, doubling)
    exponent = jnp.maximum(exponent, 1 - SCALE_BIAS)
    one = ((exponent + SCALE_BIAS) << _MANTISSA)[..., None]
    quarter, half, three_quarters = (_scaled_bits(v, exponent)[..., None] for v in (0.25, 0.5, 0.75))

    drop = _MANTISSA - 1
    even = (magnitude >> drop) & 1
    large = (magnitude + ((1 << (drop - 1)) - 1) + even) & -(1 << drop)
    large = jnp.minimum(large, one + (5 << drop))  # 6 has code 7, five after that of 1
    small = jnp.where(magnitude > quarter, jnp.where(magnitude >= three_quarters, one, half), 0)
    rounded = jnp.where(magnitude >= one, large, small)
    rounded = rounded - jnp.minimum(
        rounded >> 1, doubling
    )  # halved again where it was doubled, with nothing lost

    rounded = jnp.where((amax > 0)[..., None], rounded | sign, 0)
    rounded = jnp.where((amax < _INF_BITS)[..., None], rounded, _NAN_BITS)
    return _from_float32_bits(rounded, blocks.dtype)


def _from_float32_bits(bits: Int32[Array, ...], dtype: Any) -> Float[Array, ...]:
    """Values whose mantissas have two bits at most, from float32 bit patterns."""
    if dtype == jnp.bfloat16:  # the low half is zero: at most two mantissa bits, shifted by at most two
        return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)


def _round_to_codes(
    magnitude: Int32[Array, "... blocks 32"], exponent: Int32[Array, "... blocks"]
) -> Int32[Array, "... blocks 32"]:
    """Codes 0 to 7 of magnitudes divided by ``2**exponent``, ties to even."""
    # 2**-127 is itself subnormal: double such a block, so that below all from 2**exponent up is normal. Adding
    # a pattern to itself doubles a subnormal number, adding one to its exponent field a normal one.
    doubling = jnp.where(exponent == -SCALE_BIAS, 1 << _MANTISSA, 0)[..., None]
    magnitude = magnitude + jnp.minimum(magnitude, doubling)
    exponent = jnp.maximum(exponent, 1 - SCALE_BIAS)

    # From 1 up a code is the exponent field and the first mantissa bit, counted from 2 (code of 1.0): round the
    # rest of the pattern away. This gives at most the right code for what is smaller.
    drop = _MANTISSA - 1
    even = (magnitude >> drop) & 1
    rounded = (magnitude + ((1 << (drop - 1)) - 1) + even) >> drop
    large = jnp.minimum(rounded - (2 * (exponent + 127) - 2)[..., None], 7)
    # Below, the boundaries are 0.25 (a tie goes down to code 0) and 0.75 (up to code 2).
    quarter, three_quarters = _scaled_bits(0.25, exponent), _scaled_bits(0.75, exponent)
    small = (magnitude > quarter[..., None]).astype(jnp.int32) + (magnitude >= three_quarters[..., None])
    return jnp.maximum(large, small)


def _scaled_bits(value: float, exponent: Int32[Array, ...]) -> Int32[Array, ...]:
    """Float32 bits of ``value * 2**exponent`` for 1/4 <= value < 1 of at most two mantissa bits, exponent >= -126."""
    bits = int(np.float32(value).view(np.int32))
    field, mantissa = (bits >> _MANTISSA) + exponent, bits & ((1 << _MANTISSA) - 1)
    subnormal = (mantissa | (1 << _MANTISSA)) >> jnp.clip(
        1 - field, 0, 31
    )  # by 2 at most: no set bit is lost
    return jnp.where(field > 0, (field << _MANTISSA) | mantissa, subnormal)


def _least_error_exponent(
    magnitude: Int32[Array, "... blocks 32"], floor: Int32[Array, "... blocks"]
) -> Int32[Array, "... blocks"]:
    """Of ``floor``, ``floor + 1`` and ``floor - 1`` the exponent with the least squared rounding error.

    At most one neighbour is better. floor + 1 needs an element above 7, where 8 is nearer than 6. That element
    costs floor - 1, which saturates at 3, more than 15, and all others can win it 31/16 at most.
    """
    y = in_blocks(_fixed_point(magnitude, floor))
    q = _round_fixed_point(y, 0)
    up = _error_falls(y, q, _round_fixed_point(y, 1))
    down = _error_falls(y, q, _round_fixed_point(y, -1)) & (floor > -SCALE_BIAS)
    return floor + up.astype(jnp.int32) - down.astype(jnp.int32)


_FRACTION = 26  # fraction bits of _fixed_point


def _fixed_point(magnitude: Array, floor: Array) -> Int32[Array, "... blocks 32"]:
    """Magnitudes over ``2**floor`` (below 8) with 26 fraction bits, exact from 1/8 up, cut off below.

    What lies below 1/8 rounds to zero under all three candidates, so it cannot decide between them.
    """
    field = magnitude >> _MANTISSA
    mantissa = (magnitude & ((1 << _MANTISSA) - 1)) | jnp.where(field > 0, 1 << _MANTISSA, 0)
    shift = jnp.maximum(field, 1) - 150 - floor[..., None] + _FRACTION
    return jnp.where(shift >= 0, mantissa << jnp.clip(shift, 0, 31), mantissa >> jnp.clip(-shift, 0, 31))


def _round_fixed_point(y: Int32[Array, "... blocks 32"], step: int) -> Int32[Array, "... blocks 32"]:
    """``y`` rounded to E2M1 times ``2**step``, in quarters."""
    one = 1 << (_FRACTION + step)
    # The grid's spacing: a half below 2, one below 4, two above (times 2**step).
    drop = (_FRACTION + step - 1) + (y >= 2 * one).astype(jnp.int32) + (y >= 4 * one).astype(jnp.int32)
    nearest = (y + (1 << (drop - 1))) >> drop  # ties go up: the error is that of going to the even code
    return jnp.minimum(nearest << (drop - (_FRACTION - 2)), 6 * 4 << step if step >= 0 else 6 * 4 >> -step)


def _error_falls(y: Array, q0: Array, q1: Array) -> Array:
    """Whether ``sum (q1 - y)**2 < sum (q0 - y)**2``, exactly: y is in fixed point, q0 and q1 are in quarters.

    The difference is ``sum (q1 - q0) (q1 + q0 - 2 y)``, in units of ``2**-27`` an integer too wide for an int32:
    it is ``high * 2**17 + low``, and negative where ``high + floor(low / 2**17)`` is.
    """
    step = q1 - q0  # 5 bits and a sign, q1 + q0 has 6
    high = jnp.sum(step * (((q1 + q0) << 6) - (y >> 17)), axis=-1)  # a term has 12 + 5 bits
    low = -jnp.sum(step * (y & 0x1FFFF), axis=-1)  # a term has 17 + 5 bits
    return high + (low >> 17) < 0


def _decode(codes: Array, scales: Array, dtype: Any) -> Array:
    """Values of ``codes [..., blocks, 32]`` under ``scales [..., blocks]``."""
    exponent = scales.astype(jnp.int32) - SCALE_BIAS
    code = (codes & 7).astype(jnp.int32)
    # E2M1 code s.ee.m: exponent field ee >= 1 means 1.m * 2**(ee - 1); code 1 is 0.5, a subnormal: 1.0 * 2**-1.
    field = jnp.where(code == 1, -1, (code >> 1) - 1) + exponent[..., None] + 127
    mantissa = jnp.where(code == 1, 0, (code & 1) << (_MANTISSA - 1))
    subnormal = (mantissa | (1 << _MANTISSA)) >> jnp.clip(1 - field, 0, 31)
    bits = jnp.where(
        field > 0, jnp.where(field < 0xFF, (field << _MANTISSA) | mantissa, _INF_BITS), subnormal
    )
    bits = jnp.where(code == 0, 0, bits) | ((codes & 8).astype(jnp.int32) << 28)
    bits = jnp.where((scales == SCALE_NAN)[..., None], _NAN_BITS, bits)
    return _from_float32_bits(bits, dtype)
