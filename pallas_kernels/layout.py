"""Canonical MXFP4 weights <-> the layout that the TPU kernels read. Pure functions on plain arrays, jit-
compiled.

The canonical weight is ``codes [N, K/2]`` (uint8, the lower index in the low nibble) and ``scales [N, K/32]``
(uint8, E8M0). Nothing here moves data along N, so a weight that is sharded along N stays so.

**What the matrix unit takes.** Every TPU from v5e on takes float8_e5m2 weights beside bfloat16 activations. Its
five exponent bits hold the two of an E2M1 code and a block's scale at once, so a code becomes a finished weight
by integer operations on its byte, four weights at a time: mask, add the scale, clear zeros. That is exact as
long as the scales of a column (all blocks of one output) lie within 27 powers of two of each other; what they
have in common is a factor of the output. :func:`check_scales` tells whether they do.

**Bytes** (v5e, v6e). A 32-bit word ``w`` holds two blocks' codes of eight rows of 4. With the mask ``m = 0x8E8E8E8E``
(of every byte bit 7, the sign, and bits 3 to 1), byte ``t`` of ``w & m``, ``w`` being word row ``r``, is element
``4 (r % 8) + t`` of block ``2 (r // 8)``, and byte ``t`` of ``(w >> 3 ^ w << 7) & m`` that of block
``2 (r // 8) + 1``: each bit that the mask leaves free is stored such that the exclusive or comes out right, which
takes one operation less than putting the sign in by itself. With magnitudes 0 and 0.5 exchanged, bits 3 to 1 are
those of e5m2: 0.5 is a power of two like the others, and only zero, which looks like 0.75, has to be cleared.

**Float4** (tpu7x). Eight consecutive rows to a word, nibble ``t`` of word row ``r`` has element ``8 r + t``:
the order of the hardware's own conversion from float4_e2m1fn, which leaves less room: 14 powers of two.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt8, UInt16, UInt32

BLOCK = 32
LANES = 128
"""K and N are filled up to multiples of this."""

Kind = Literal["bytes", "float4"]
KINDS: tuple[str, ...] = get_args(Kind)

SPAN: dict[str, int] = {"bytes": 27, "float4": 14}
"""Powers of two that the scales of a column may cover: what is left of e5m2's exponents above and below a code's."""

_TOP = {"bytes": 27, "float4": 13}
# What the largest scale of a column adds to the exponent field of a code: 0 to 3 with bytes, 14 to 17 with float4.

_LEAST_BASE = 14
"""The least scale code that a column's largest is taken for, so that the column's factor is a normal float32."""


class TPUWeight(NamedTuple):
    """A weight as the TPU kernels read it; K and N are padded to multiples of 128 with zeros.

    words: int32 ``[K/8, N]``, codes. exponents: uint8 ``[K/32, N]``, four times what the block adds to the exponent
    field (0 for a block of zeros). factor: float32 ``[1, N]``, the power of two that the columns have in common.
    """

    words: Int32[Array, "k8 n"]
    exponents: UInt8[Array, "k32 n"]
    factor: Float32[Array, "1 n"]


def padded(size: int) -> int:
    """``size`` rounded up to a multiple of 128."""
    return -(-size // LANES) * LANES


def check_scales(codes: UInt8[Array, "n k2"], scales: UInt8[Array, "n k32"], kind: Kind = "bytes") -> None:
    """Refuse what the layout cannot hold exactly. Concrete arrays only: not to be called under jit.

    Raises:
      ValueError: a scale is NaN, a column's scales are too far apart, or too large for float32.
    """
    scale = np.asarray(scales)
    if (scale == 0xFF).any():
        raise ValueError(f"{(scale == 0xFF).sum()} blocks have the scale NaN: this weight is broken")
    held = (np.asarray(codes).reshape(*scale.shape, BLOCK // 2) & 0x77).any(-1)
    top = np.where(held, scale, 0).max(1, initial=0).astype(int)
    least = np.where(held, scale, 0xFF).min(1, initial=0xFF).astype(int)
    low = np.maximum(top, _LEAST_BASE) - (SPAN[kind] - 1)
    if (least < low).any():
        row = int(np.argmax(low - least))
        raise ValueError(
            f"output {row} has scales from 2**{least[row] - 127} to 2**{top[row] - 127}, further apart than the "
            f"{SPAN[kind]} powers of two of the TPU layout {kind!r}: use "
            + ("kind='bytes'" if kind == "float4" else "implementation='xla'")
        )
    if top.max(initial=0) > 127 + 110:
        raise ValueError(
            f"a scale is 2**{top.max() - 127}: products would overflow float32, use implementation='xla'"
        )


@jax.jit(static_argnames="kind")
def to_tpu(codes: UInt8[Array, "n k2"], scales: UInt8[Array, "n k32"], kind: Kind = "bytes") -> TPUWeight:
    """The canonical weight in the TPU layout. Negative zeros become zeros.

    Outputs that :func:`check_scales` refuses get the factor NaN, and so do their products: nothing is clipped
    silently.

    Raises:
      ValueError: a kind that does not exist, or shapes that do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"layout kind {kind!r} does not exist: must be one of {', '.join(KINDS)}")
    n, blocks = scales.shape
    if codes.shape != (n, blocks * BLOCK // 2):
        raise ValueError(
            f"codes have shape {codes.shape}, scales {scales.shape}: must be [N, K/2] and [N, K/32]"
        )
    more_n, more_k = padded(n) - n, padded(blocks * BLOCK) - blocks * BLOCK
    top = _TOP[kind]
    codes = jnp.pad(codes, ((0, more_n), (0, more_k // 2)))
    scales = jnp.pad(scales, ((0, more_n), (0, more_k // BLOCK)))

    each = jnp.stack([codes & 15, codes >> 4], -1).reshape(*scales.shape, BLOCK)  # [n, b, 32]
    each = jnp.where(each == 8, 0, each)
    held = (each != 0).any(-1)
    scale = jnp.where(held, scales, 0).astype(jnp.int32)  # [n, b]
    base = jnp.maximum(scale.max(1, keepdims=True), _LEAST_BASE)
    exponents = jnp.where(held, jnp.maximum(scale - base + top, top - SPAN[kind] + 1) * 4, 0).astype(
        jnp.uint8
    )
    fits = (~held | ((scale < 0xFF) & (scale - base + SPAN[kind] > 0))).all(1, keepdims=True)
    # e5m2's exponent bias is 15; a code of 1.0 has field 1 with bytes, 15 with float4.
    factor = jax.lax.bitcast_convert_type((base - 13) << 23, jnp.float32)
    return TPUWeight(_words(each, kind), exponents.T, jnp.where(fits, factor, jnp.nan).T)


def _words(each: UInt8[Array, "n b 32"], kind: Kind) -> Int32[Array, "k8 n"]:
    n, blocks, _ = each.shape
    if kind == "float4":
        eight = each.reshape(n, blocks * 4, 8).astype(jnp.uint32)  # [n, r, t]
        word = functools.reduce(jnp.bitwise_or, [eight[..., t] << (4 * t) for t in range(8)])
    else:
        magnitude = each & 7
        magnitude = jnp.where(magnitude < 2, magnitude ^ 1, magnitude)
        byte = (((each & 8) << 4) | (magnitude << 1)).astype(jnp.uint32)
        byte = byte.reshape(n, blocks // 2, 2, 8, 4)  # [n, p, even|odd, r, t]
        both = functools.reduce(jnp.bitwise_or, [byte[..., t] << (8 * t) for t in range(4)])
        even, odd = both[:, :, 0].reshape(n, blocks * 4), both[:, :, 1].reshape(n, blocks * 4)
        # The free bits from those that are settled: 0 from the even codes, 4 and 5 from them too, 6 from bit 4.
        sign, low, high = (jnp.uint32(0x01010101 * bits) for bits in (0x80, 0x06, 0x08))
        word = even | (((odd ^ (even >> 3)) & sign) >> 7) | (((odd ^ (even << 7)) & low) << 3)
        word |= ((odd ^ (word << 7)) & high) << 3
    return jax.lax.bitcast_convert_type(word, jnp.int32).T


@jax.jit(static_argnames=("n", "k", "kind"))
def from_tpu(
    weight: TPUWeight, n: int, k: int, kind: Kind = "bytes"
) -> tuple[UInt8[Array, "n k2"], UInt8[Array, "n k32"]]:
    """Codes and scales of a weight ``[n, k]``: the inverse of :func:`to_tpu`, where blocks of zeros have scale 0."""
    word = jax.lax.bitcast_convert_type(weight.words.T, jnp.uint32)  # [n, k/8]
    rows, blocks = word.shape[0], weight.exponents.shape[0]
    if kind == "float4":
        each = jnp.stack([(word >> (4 * t)) & 15 for t in range(8)], -1).reshape(rows, blocks, BLOCK)
    else:
        both = jnp.stack([word, (word >> 3) ^ (word << 7)], 1).reshape(rows, 2, blocks // 2, 8)
        byte = jnp.stack([both >> (8 * t) for t in range(4)], -1)  # [n, even|odd, p, r, t]
        each = ((byte >> 1) & 7) | ((byte >> 4) & 8)
        each = each.transpose(0, 2, 1, 3, 4).reshape(rows, blocks, BLOCK)
        magnitude = each & 7
        each = (each & 8) | jnp.where(magnitude < 2, magnitude ^ 1, magnitude)
    codes = (each[..., ::2] | (each[..., 1::2] << 4)).astype(jnp.uint8).reshape(rows, blocks * BLOCK // 2)
    base = (jax.lax.bitcast_convert_type(weight.factor.T, jnp.int32) >> 23) + 13  # [n, 1]
    exponents = weight.exponents.T.astype(jnp.int32)
    held = (each != 0).any(-1)
    scales = jnp.where(held, exponents // 4 + base - _TOP[kind], 0).astype(jnp.uint8)
    return codes[:n, : k // 2], scales[:n, : k // BLOCK]


# ---------------------------------------------------------------- Hopper

HOPPER_STEP = 256
"""Features that one step of the Hopper kernel takes; K is filled up to multiples of it with zeros."""

HOPPER_ROWS = 128
"""N is filled up to multiples of this with zeros."""

HOPPER_SPAN = 127
"""Powers of two that the scales of an output may cover: 0.5 times the least is then a normal bfloat16."""

_SIGN = (15, 12, 9, 11)  # where the word has the sign of its element t
_FIELD = ((8, 7, 6), (5, 4, 3), (2, 1, 0), (14, 13, 10))  # and bits 2, 1 and 0 of its code


class HopperWeight(NamedTuple):
    """A weight as the Hopper kernel reads it.

    words: uint16 ``[N, K/4]``. Word ``64 j + c`` of an output has the codes of features ``256 j + 64 t + c``, t
    from 0 to 3. A code's bits stand so that a shift and a mask leave it, times ``2**-126``, as a bfloat16, for the
    two words of a 32-bit register at once: elements 0 to 2 as they are and moved up by 3 and 6, element 3 in
    three pieces.
    exponents: uint8 ``[K/32, N]``, the exponent field of the bfloat16 that a block's elements are multiplied with:
    254 for the largest scale of an output, 0 for a block of zeros.
    factor: float32 ``[N]``, the power of two that the outputs have in common; NaN for those that do not fit.
    """

    words: UInt16[Array, "n k4"]
    exponents: UInt8[Array, "k32 n"]
    factor: Float32[Array, " n"]


def _check_canonical(codes: Any, scales: Any) -> None:
    n, blocks = scales.shape
    if codes.shape != (n, blocks * BLOCK // 2):
        raise ValueError(
            f"codes have shape {codes.shape}, scales {scales.shape}: must be [N, K/2] and [N, K/32]"
        )


@jax.jit
def to_hopper(codes: UInt8[Array, "n k2"], scales: UInt8[Array, "n k32"]) -> HopperWeight:
    """The canonical weight in the Hopper layout. Negative zeros become zeros.

    Exact where the scales of an output's blocks that are not zero lie within :data:`HOPPER_SPAN` powers of two; other
    outputs, and those with a scale that is NaN, get the factor NaN: nothing is clipped silently.

    Raises:
      ValueError: shapes that do not fit.
    """
    each, held, below, base, fits = _for_hopper(codes, scales, HOPPER_SPAN, 2)
    exponents = jnp.where(held, jnp.maximum(254 - below, 0), 0).astype(jnp.uint8)
    # An element is code * 2**-126 * 2**(exponent - 127): of the largest scale, code * 2.
    factor = jax.lax.bitcast_convert_type((base - 1) << 23, jnp.float32)
    slabs = each.astype(jnp.uint16).reshape(each.shape[0], -1, 4, 64)  # [n, j, t, c]
    word = jnp.zeros_like(slabs[:, :, 0])
    for t, (sign, field) in enumerate(zip(_SIGN, _FIELD, strict=True)):
        for bit, place in zip((3, 2, 1, 0), (sign, *field), strict=True):
            word |= ((slabs[:, :, t] >> bit) & 1) << place
    return HopperWeight(word.reshape(each.shape[0], -1), exponents.T, jnp.where(fits, factor, jnp.nan))


def _for_hopper(codes: Any, scales: Any, span: int, least: int) -> tuple[Any, ...]:
    """Codes ``[n, b, 32]`` filled up, which blocks hold any, how far their scales lie below the largest of the
    output, that one ``[n]``, at ``least``, and whether all of an output's are within ``span`` powers of two."""
    _check_canonical(codes, scales)
    n, blocks = scales.shape
    more_n, more_k = -n % HOPPER_ROWS, -blocks * BLOCK % HOPPER_STEP
    codes = jnp.pad(codes, ((0, more_n), (0, more_k // 2)))
    scales = jnp.pad(scales, ((0, more_n), (0, more_k // BLOCK)))
    each = jnp.stack([codes & 15, codes >> 4], -1).reshape(*scales.shape, BLOCK)
    each = jnp.where(each == 8, 0, each)
    held = (each != 0).any(-1)
    scale = jnp.where(held, scales, 0).astype(jnp.int32)
    base = jnp.maximum(scale.max(1), least)  # so that the factor is a normal float32
    below = base[:, None] - scale
    return each, held, below, base, (~held | ((scale < 0xFF) & (below < span))).all(1)


def fits_hopper(codes: UInt8[Array, "n k2"], scales: UInt8[Array, "n k32"], *, e4m3: bool = False) -> bool:
    """Whether :func:`to_hopper` or :func:`to_hopper_e4m3` holds every output exactly. Concrete arrays only."""
    return bool(_fits_hopper(codes, scales, E4M3_SPAN if e4m3 else HOPPER_SPAN))


@jax.jit(static_argnames="span")
def _fits_hopper(codes: Any, scales: Any, span: int) -> Any:
    return _for_hopper(codes, scales, span, 0)[-1].all()


@jax.jit(static_argnames=("n", "k"))
def from_hopper(weight: HopperWeight, n: int, k: int) -> tuple[UInt8[Array, "n k2"], UInt8[Array, "n k32"]]:
    """Codes and scales of a weight ``[n, k]``: the inverse of :func:`to_hopper`; blocks of zeros have scale 0."""
    rows = weight.words.shape[0]
    each = hopper_codes(weight.words.reshape(rows, -1, 1, 64)).reshape(rows, -1, BLOCK)
    base = (jax.lax.bitcast_convert_type(weight.factor, jnp.int32) >> 23) + 1
    return _canonical(each, weight.exponents.T.astype(jnp.int32) - 254 + base[:, None], n, k)


def hopper_codes(words: UInt16[Array, "n j 1 64"]) -> Int32[Array, "n j 4 64"]:
    """The four codes of each word, 0 to 15, along the third axis."""
    word = words.astype(jnp.int32)
    return jnp.concatenate([hopper_code(word, t) for t in range(4)], axis=2)


def hopper_code(word: Array, t: int) -> Array:
    """Code 0 to 15 of element ``t`` of words."""
    parts = [
        ((word >> place) & 1) << bit for bit, place in zip((3, 2, 1, 0), (_SIGN[t], *_FIELD[t]), strict=True)
    ]
    return functools.reduce(jnp.bitwise_or, parts)


E4M3_SPAN = 12
"""Powers of two that the scales of an output may cover as e4m3, such that no element is subnormal: with subnormal
ones there would be 15, but adding a scale to an exponent field would not do."""


E4M3_TABLE = ((0x14100800, 0x24201C18), (0x08080800, 0x08080808))
"""Two words whose bytes are the e4m3 patterns of magnitudes 0 to 7 times ``2**-5``, and what an exponent adds."""


class HopperE4M3Weight(NamedTuple):
    """A weight as Hopper's product of e4m3 operands reads it.

    words: uint32 ``[N, K/8]``, the codes that one thread of a ``wgmma`` of 32 features holds: word ``8 j + 2 q + h``
    of an output has features ``32 (2 j + h) + 4 q + i`` in its nibbles 0 to 3, and those 16 further on in 4 to 7. The
    low three bits of a nibble are a magnitude, the selector of ``prmt``; the fourth of nibble ``2 i`` is the sign of
    nibble ``4 + i``, and of ``2 i + 1`` that of nibble ``i``, so that signs stand at the top of bytes as they are,
    or moved up by 4.
    exponents: uint8 ``[K/32, N]``, 11 for the largest scale of an output, what is added to e4m3's exponent field.
    factor: float32 ``[N]``, the power of two that the outputs have in common; NaN for those that do not fit.
    """

    words: UInt32[Array, "n k8"]
    exponents: UInt8[Array, "k32 n"]
    factor: Float32[Array, " n"]


@jax.jit
def to_hopper_e4m3(codes: UInt8[Array, "n k2"], scales: UInt8[Array, "n k32"]) -> HopperE4M3Weight:
    """The canonical weight for products of e4m3 operands. Negative zeros become zeros.

    Outputs whose scales cover more than :data:`E4M3_SPAN` powers of two get the factor NaN, as in :func:`to_hopper`.

    Raises:
      ValueError: shapes that do not fit.
    """
    each, held, below, base, fits = _for_hopper(codes, scales, E4M3_SPAN, 7)
    exponents = jnp.where(held, jnp.maximum(E4M3_SPAN - 1 - below, 0), 0).astype(jnp.uint8)
    # An element is code * 2**(exponent - 5): of the largest scale, code * 2**6.
    factor = jax.lax.bitcast_convert_type((base - 6) << 23, jnp.float32)
    rows = each.shape[0]
    nibble = each.astype(jnp.uint32).reshape(rows, -1, 2, 2, 4, 4)  # [n, j, h, half, q, i]
    word = jnp.zeros((rows, nibble.shape[1], 2, 4), jnp.uint32)
    for half in range(2):
        for i in range(4):
            one = nibble[:, :, :, half, :, i]
            word |= ((one & 7) << (4 * (4 * half + i))) | ((one >> 3) << (8 * i + 7 - 4 * half))
    words = word.transpose(0, 1, 3, 2).reshape(rows, -1)
    return HopperE4M3Weight(words, exponents.T, jnp.where(fits, factor, jnp.nan))


def e4m3_codes(words: Array) -> Array:
    """int32 codes 0 to 15 of words ``[n, w]``: ``[n, w / 4, 32]``, block by block."""
    word = words.astype(jnp.int32).reshape(words.shape[0], -1, 4, 2).transpose(0, 1, 3, 2)  # [n, j, h, q]
    halves = [
        [((word >> (4 * (4 * half + i))) & 7) | ((word >> (8 * i + 7 - 4 * half)) & 1) << 3 for i in range(4)]
        for half in range(2)
    ]
    each = jnp.stack([jnp.stack(half, -1) for half in halves], 3)  # [n, j, h, half, q, i]
    return each.reshape(words.shape[0], -1, BLOCK)


@jax.jit(static_argnames=("n", "k"))
def from_hopper_e4m3(
    weight: HopperE4M3Weight, n: int, k: int
) -> tuple[UInt8[Array, "n k2"], UInt8[Array, "n k32"]]:
    """Codes and scales of a weight ``[n, k]``: inverse of :func:`to_hopper_e4m3`; blocks of zeros have scale 0."""
    base = (jax.lax.bitcast_convert_type(weight.factor, jnp.int32) >> 23) + 6
    scale = weight.exponents.T.astype(jnp.int32) - (E4M3_SPAN - 1) + base[:, None]
    return _canonical(e4m3_codes(weight.words), scale, n, k)


def _canonical(each: Any, scale: Any, n: int, k: int) -> tuple[Any, Any]:
    """Codes ``[n, b, 32]`` and scales, both int32, as they are stored; those of blocks of zeros are 0."""
    codes = (each[..., ::2] | (each[..., 1::2] << 4)).astype(jnp.uint8).reshape(each.shape[0], -1)
    scales = jnp.where((each != 0).any(-1), scale, 0).astype(jnp.uint8)
    return codes[:n, : k // 2], scales[:n, : k // BLOCK]


# ---------------------------------------------------------------- Blackwell

BLACKWELL_STEP = 256
"""Features that one step of the Blackwell kernel takes; K is filled up to multiples of it with zeros."""

BLACKWELL_ROWS = 128
"""Rows of activations and outputs are filled up to multiples of this with zeros: what a block of scales covers."""


class BlackwellOperand(NamedTuple):
    """One operand of a block-scaled product as the Blackwell kernel reads it, weight or activations.

    values: float4_e2m1fn ``[R, K]``: the canonical codes, two to a byte, under another name.
    scales: float8_e8m0fnu ``[R/128, K/128, 32, 16]``, where :func:`swizzled_scale` puts them.
    """

    values: Any
    scales: Any


def swizzled_scale(row: int, block: int) -> tuple[int, int, int, int]:
    """Where ``tcgen05.mma`` looks for the scale of a block of 32 in a row: an index of ``[R/128, K/128, 32, 16]``.

    Tensor memory has 32 lanes for scales, each with the four blocks of 128 features for four rows that are 32 apart.
    """
    return row // 128, block // 4, row % 32, row % 128 // 32 * 4 + block % 4


def swizzle_scales(scales: Array) -> Array:
    """``[R, K/32]`` -> ``[R/128, K/128, 32, 16]`` by :func:`swizzled_scale`; R and K multiples of 128."""
    rows, blocks = scales.shape
    if rows % 128 or blocks % 4:
        raise ValueError(
            f"scales have shape {scales.shape}: must be multiples of 128 and 4, fill up with zeros"
        )
    split = scales.reshape(rows // 128, 4, 32, blocks // 4, 4)
    return split.transpose(0, 3, 2, 1, 4).reshape(rows // 128, blocks // 4, 32, 16)


def unswizzle_scales(scales: Array) -> Array:
    """Inverse of :func:`swizzle_scales`."""
    rows, blocks = scales.shape[0] * 128, scales.shape[1] * 4
    split = scales.reshape(rows // 128, blocks // 4, 32, 4, 4)
    return split.transpose(0, 3, 2, 1, 4).reshape(rows, blocks)


@jax.jit
def to_blackwell(codes: UInt8[Array, "r k2"], scales: UInt8[Array, "r k32"]) -> BlackwellOperand:
    """Canonical codes and scales as an operand of the Blackwell kernel. Nothing is lost: every code and scale exists.

    Raises:
      ValueError: shapes that do not fit.
    """
    _check_canonical(codes, scales)
    more_r, more_k = -scales.shape[0] % BLACKWELL_ROWS, -scales.shape[1] * BLOCK % BLACKWELL_STEP
    codes = jnp.pad(codes, ((0, more_r), (0, more_k // 2)))
    scales = jnp.pad(scales, ((0, more_r), (0, more_k // BLOCK)))
    values = jax.lax.bitcast_convert_type(codes, jnp.float4_e2m1fn).reshape(codes.shape[0], -1)
    return BlackwellOperand(values, jax.lax.bitcast_convert_type(swizzle_scales(scales), jnp.float8_e8m0fnu))


@jax.jit(static_argnames=("rows", "k"))
def from_blackwell(
    operand: BlackwellOperand, rows: int, k: int
) -> tuple[UInt8[Array, "r k2"], UInt8[Array, "r k32"]]:
    """Codes and scales of an operand ``[rows, k]``: the inverse of :func:`to_blackwell`."""
    pairs = operand.values.reshape(operand.values.shape[0], -1, 2)
    codes = jax.lax.bitcast_convert_type(pairs, jnp.uint8)
    scales = unswizzle_scales(jax.lax.bitcast_convert_type(operand.scales, jnp.uint8))
    return codes[:rows, : k // 2], scales[:rows, : k // BLOCK]
