"""MXFP4 elements and scales as values inside GPU kernels: int32 and float32 arithmetic, elementwise.

Integer operations on bit patterns, as in ``torq_jax.mxfp4``, so that codes do not depend on how a backend treats
subnormal numbers. Nothing here reduces, reshapes or reads memory: every kernel does that its own way.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.reference import CARRY

_MANTISSA = 23
_INFINITY = 0xFF << _MANTISSA
SCALE_NAN = 0xFF


def bits(z: Any) -> Any:
    """float32 -> its pattern as int32."""
    return lax.bitcast_convert_type(z, jnp.int32)


def as_bfloat16(z: Any) -> Any:
    """float32 rounded to what bfloat16 holds, ties to even; as bits in between, so that no compiler leaves it out."""
    upper = lax.bitcast_convert_type(z.astype(jnp.bfloat16), jnp.uint16)
    return lax.bitcast_convert_type(upper.astype(jnp.uint32) << 16, jnp.float32)


def scale_code(amax: Any, rule: str) -> Any:
    """E8M0 codes, int32: of blocks whose largest magnitudes have the float32 patterns ``amax``, int32.

    0 for zeros, 255 for blocks with a NaN or an infinity.
    """
    code = jnp.maximum(((amax + CARRY[rule]) >> _MANTISSA) - 2, 0)
    return jnp.where(amax >= _INFINITY, SCALE_NAN, code)


def encode(z: Any, scale: Any, amax: Any) -> Any:
    """E2M1 codes, int32: ``z`` float32 over ``2**(scale - 127)``, to nearest, ties to even, 6 at most.

    ``amax`` and ``scale``: int32, of the element's block, as in :func:`scale_code`; of the shape of ``z`` or
    broadcasting to it. Blocks of zeros and blocks whose scale is NaN have codes 0; other negative zeros keep their
    sign, as in ``torq_jax.mxfp4``.
    """
    pattern = bits(z)
    magnitude = pattern & 0x7FFFFFFF
    # 2**-127 is subnormal: double such blocks. Adding a pattern to itself doubles a subnormal number, adding one to
    # its exponent field a normal one.
    doubling = jnp.where(scale == 0, 1 << _MANTISSA, 0)
    doubled = magnitude + jnp.minimum(magnitude, doubling)
    unit = jnp.maximum(scale, 1)
    # From 1 (code 2) up a code is the exponent field and the first mantissa bit: round the rest away.
    rounded = (doubled + ((1 << 21) - 1) + ((doubled >> 22) & 1)) >> 22
    large = jnp.minimum(rounded - 2 * unit + 2, 7)
    # Below it, the boundaries are 0.25 (a tie goes to code 0) and 0.75 (to code 2).
    small = jnp.where(doubled > _pattern(1 << 23, unit - 2), 1, 0)
    small += jnp.where(doubled >= _pattern(3 << 22, unit - 1), 1, 0)
    code = jnp.maximum(large, small) | ((pattern >> 28) & 8)
    return jnp.where((scale == SCALE_NAN) | (amax == 0), 0, code)


def decode(code: Any, scale: Any) -> Any:
    """float32 values of E2M1 codes 0 to 15 and E8M0 scales, both int32; exact, subnormals, infinities, NaN."""
    magnitude = code & 7
    # 0.5 is the one value below 1 besides zero: a power of two like the others, of field scale - 1.
    field = scale + jnp.where(magnitude == 1, -1, (magnitude >> 1) - 1)
    significand = jnp.where((magnitude & 1 == 1) & (magnitude > 1), 3 << 22, 1 << 23)
    pattern = jnp.where(field < 0xFF, _pattern(significand, field), _INFINITY)
    pattern = jnp.where(magnitude == 0, 0, pattern)
    pattern = jnp.where(scale == SCALE_NAN, _INFINITY | 1 << 22, pattern)
    return lax.bitcast_convert_type(pattern | ((code & 8) << 28), jnp.float32)


def scale_value(scale: Any) -> Any:
    """float32 of E8M0 codes, int32: a power of two, NaN for 255."""
    pattern = jnp.where(scale == 0, 1 << (_MANTISSA - 1), scale << _MANTISSA)
    return lax.bitcast_convert_type(jnp.where(scale == SCALE_NAN, _INFINITY | 1 << 22, pattern), jnp.float32)


def decode_quickly(code: Any, value: Any) -> Any:
    """:func:`decode` in a third of the instructions, of scales as :func:`scale_value` gives them.

    float16 has subnormal numbers where E2M1 has its 0.5: an E2M1 pattern with more zeros behind is a float16, times
    ``2**-14``. Exact but where a device flushes what is subnormal in float32: scale 0, and what is below 2**-126.
    """
    pattern = ((code & 7) << 9) | ((code & 8) << 12)
    half = lax.bitcast_convert_type(pattern.astype(jnp.uint16), jnp.float16)
    return half.astype(jnp.float32) * jnp.float32(2**14) * value


def _pattern(significand: Any, field: Any) -> Any:
    """Of ``significand / 2**23 * 2**(field - 127)``, 24 bits of significand of which the lowest are zero."""
    subnormal = significand >> jnp.clip(1 - field, 0, 31)
    return jnp.where(field > 0, (field << _MANTISSA) | (significand & ((1 << _MANTISSA) - 1)), subnormal)
