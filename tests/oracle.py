"""What MXFP4 and MXFP8 mean, written a second time in numpy: float64 and exact integers, no bit tricks, no jax.

Shares no code and no constants with ``torq_jax.mxfp4`` and ``torq_jax.mxfp8``: elements are rounded by
``ml_dtypes``, exponents come from ``np.frexp``, squared errors that are too close for float64 are compared as
whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

RULES = ("floor", "ceil", "even", "mse")


class Quantized(NamedTuple):
    codes: np.ndarray  # [..., n] uint8, one code a byte
    scales: np.ndarray  # [..., n / 32] uint8
    values: np.ndarray  # [..., n] float64, what the codes and scales stand for


def quantize(x: np.ndarray, rule: str) -> Quantized:
    """Quantise ``x [..., n]`` (n a multiple of 32) in blocks along the last axis."""
    return _quantize(x, lambda blocks, amax: _exponents(blocks, amax, rule), round_elements)


def quantize8(x: np.ndarray, rule: str) -> Quantized:
    """The same for MXFP8 (E4M3), rules "floor" and "ceil"."""

    def exponents(_: np.ndarray, amax: np.ndarray) -> np.ndarray:
        floor = _floor_log2(amax) - 8
        if rule == "floor":
            return floor
        return np.where(
            amax <= np.ldexp(448.0, floor), floor, floor + 1
        )  # the least e with amax <= 448 * 2**e

    return _quantize(x, exponents, round_elements8)


def _quantize(x: np.ndarray, exponents_of: Callable, rounded: Callable) -> Quantized:
    with np.errstate(invalid="ignore"):  # a NaN in bfloat16
        blocks = np.asarray(x).astype(np.float64).reshape(-1, 32)
    poisoned = ~np.isfinite(blocks).all(axis=1)
    blocks = np.where(poisoned[:, None], 0.0, blocks)
    amax = np.abs(blocks).max(axis=1)
    empty = amax == 0

    exponents = np.maximum(exponents_of(blocks, np.where(empty, 1.0, amax)), -127)
    exponents[empty] = -127
    elements = rounded(np.ldexp(blocks, -exponents[:, None]))
    values = np.ldexp(elements.astype(np.float64), exponents[:, None])
    codes = elements.view(np.uint8).copy()
    scales = (exponents + 127).astype(np.uint8)

    codes[empty | poisoned] = 0
    values[empty] = 0.0
    scales[poisoned] = 255
    values[poisoned] = np.nan
    shape = np.shape(x)
    return Quantized(
        codes.reshape(shape), scales.reshape(*shape[:-1], shape[-1] // 32), values.reshape(shape)
    )


def round_elements(y: np.ndarray) -> np.ndarray:
    """Nearest E2M1, ties to the even code, saturating at 6."""
    return np.clip(y, -6.0, 6.0).astype(ml_dtypes.float4_e2m1fn)


def round_elements8(y: np.ndarray) -> np.ndarray:
    """Nearest E4M3, ties to the even code, saturating at 448."""
    return np.clip(y, -448.0, 448.0).astype(ml_dtypes.float8_e4m3fn)


def pack(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte along the last axis, the first in the low nibble."""
    low, high = codes[..., 0::2].astype(int), codes[..., 1::2].astype(int)
    return (low + 16 * high).astype(np.uint8)


def unpack(packed: np.ndarray) -> np.ndarray:
    """Inverse of :func:`pack`."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    codes[..., 0::2], codes[..., 1::2] = packed % 16, packed // 16
    return codes


def decode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Values in float64 of ``codes [..., n]`` under ``scales [..., n / 32]``, read by ml_dtypes."""
    elements = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    powers = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return elements * np.repeat(powers, 32, axis=-1)


def decode8(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The same for MXFP8."""
    elements = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    powers = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return elements * np.repeat(powers, 32, axis=-1)


def _exponents(blocks: np.ndarray, amax: np.ndarray, rule: str) -> np.ndarray:
    floor = _floor_log2(amax) - 2
    if rule == "floor":
        return floor
    if rule == "ceil":  # the least e with amax <= 6 * 2**e; never floor - 1, as amax >= 4 * 2**floor
        return np.where(amax <= np.ldexp(6.0, floor), floor, floor + 1)
    if rule == "even":  # amax to one mantissa bit, ties to even, then floor
        mantissa, exponent = np.frexp(amax)  # amax = mantissa 2**exponent, 1/2 <= mantissa < 1
        return _floor_log2(np.ldexp(np.round(mantissa * 4) / 4, exponent)) - 2
    if rule == "mse":
        return _least_error(blocks, np.maximum(floor, -127))
    raise ValueError(rule)


def _floor_log2(x: np.ndarray) -> np.ndarray:
    return np.frexp(x)[1].astype(np.int64) - 1


def _least_error(blocks: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """floor, floor + 1 or floor - 1, in this order on ties, by the exact squared error."""
    candidates = np.stack([floor, floor + 1, np.maximum(floor - 1, -127)])  # [3, n]
    unit = np.ldexp(1.0, -floor)[:, None]  # errors in units of 2**floor, so that no square overflows
    rounded = [
        np.ldexp(round_elements(np.ldexp(blocks, -e[:, None])).astype(np.float64), e[:, None])
        for e in candidates
    ]
    errors = np.stack([np.sum(np.square(r * unit - blocks * unit), axis=1) for r in rounded])
    best = np.argmin(errors, axis=0)  # the first of equal ones
    # float64's sum of 32 squares is good to about 32 * 2**-53 < 1e-14: closer calls are decided exactly.
    close = np.sum(errors <= errors.min(axis=0) * (1 + 1e-13), axis=0) > 1
    exactly_zero = errors.min(axis=0) == 0  # each term is exactly zero then, so the first zero is right
    for i in np.flatnonzero(close & ~exactly_zero):
        # Every float32 is a multiple of 2**-149, and these differences have few enough bits for float64.
        exact = [sum(int(d) ** 2 for d in np.ldexp(r[i] - blocks[i], 149)) for r in rounded]
        best[i] = exact.index(min(exact))
    return np.take_along_axis(candidates, best[None], axis=0)[0]


def patterns_as_amax(dtype, shares):
    """Each of the 65536 patterns of a 16-bit dtype beside 31 companions that are fixed shares of it."""
    patterns = np.arange(65536, dtype=np.uint16)[:, None]
    with np.errstate(invalid="ignore"):
        companions = (patterns.view(dtype).astype(np.float64) * shares).astype(dtype)
    return np.concatenate([companions, patterns.view(dtype)], axis=1)


def patterns_as_elements(dtype, *largest):
    """Each finite pattern of a 16-bit dtype as an element below several amax, the dtype's own extremes among them."""
    values = np.arange(65536, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        values = values[np.isfinite(values)]
    finfo = ml_dtypes.finfo(dtype)
    blocks = []
    for amax in (finfo.smallest_subnormal, finfo.tiny, 2 * finfo.tiny, *largest, finfo.max):
        below = values[np.abs(values.astype(np.float64)) <= float(amax)]
        below = np.resize(below, (-(-below.size // 31), 31))
        blocks.append(np.concatenate([below, np.full((len(below), 1), amax, dtype)], axis=1))
    return np.concatenate(blocks)
