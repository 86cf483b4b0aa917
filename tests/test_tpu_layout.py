"""The TPU layout of a weight: an exact inverse, the documented bits, and what it refuses."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import layout

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def weight(seed: int, n: int, blocks: int, low: int, span: int):
    """Random codes; scales over ``span`` powers of two in every output, its ends included; a block of zeros."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (n, blocks * 16), dtype=np.uint8)
    codes[:, ::16] |= 0x11  # no block is zero by chance
    scales = rng.integers(low, low + span, (n, blocks)).astype(np.uint8)
    scales[:, 0], scales[:, -1] = low, low + span - 1
    codes[0, :16], scales[0, 0] = 0, 0
    return codes, scales


def without_negative_zeros(codes):
    low, high = codes & 15, codes >> 4
    return np.where(low == 8, 0, low) | (np.where(high == 8, 0, high) << 4)


def each_code(codes):
    return np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)  # [n, k]


def values(codes, scales):
    code = each_code(codes)
    sign = np.where(code & 8, -1.0, 1.0)
    return sign * MAGNITUDES[code & 7] * np.exp2(scales.astype(float) - 127).repeat(32, 1)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 140),
    blocks=st.integers(2, 9),
    kind=st.sampled_from(layout.KINDS),
    data=st.data(),
)
def test_is_its_own_inverse(seed, n, blocks, kind, data):
    span = data.draw(st.integers(1, layout.SPAN[kind]))
    codes, scales = weight(seed, n, blocks, data.draw(st.integers(30, 200 - span)), span)
    layout.check_scales(codes, scales, kind)
    packed = layout.to_tpu(jnp.asarray(codes), jnp.asarray(scales), kind)
    assert packed.words.shape == (layout.padded(blocks * 32) // 8, layout.padded(n))
    back = layout.from_tpu(packed, n, blocks * 32, kind)
    np.testing.assert_array_equal(back[0], without_negative_zeros(codes))
    np.testing.assert_array_equal(back[1], scales)


@pytest.mark.parametrize("kind", layout.KINDS)
def test_bytes_are_e5m2_numbers_of_the_documented_bits(kind):
    n, blocks = 5, 6
    codes, scales = weight(1, n, blocks, 100, layout.SPAN[kind])
    packed = layout.to_tpu(jnp.asarray(codes), jnp.asarray(scales), kind)
    words = np.asarray(packed.words).view(np.uint32)[: blocks * 4, :n]
    exponents = np.asarray(packed.exponents)[:blocks, :n].astype(int)
    made = np.zeros((blocks * 32, n))
    for k in range(blocks * 32):
        block, inside = divmod(k, 32)
        if kind == "float4":
            nibble = (words[k // 8] >> (4 * (k % 8))) & 15
            plain = np.copysign(MAGNITUDES[nibble & 7], np.where(nibble & 8, -1.0, 1.0))
            byte = plain.astype(ml_dtypes.float8_e5m2).view(np.uint8).astype(int)
            zero = byte == 0
        else:
            word = words[8 * (block // 2) + inside // 4]
            word = (word >> 3) ^ (word << 7) if block % 2 else word
            byte = ((word >> (8 * (inside % 4))) & 0x8E).astype(int)
            zero = byte == 2
        byte = np.where(zero, 0, byte + exponents[block])
        assert byte.max() < 256
        made[k] = byte.astype(np.uint8).view(ml_dtypes.float8_e5m2).astype(float)
    made = made * np.asarray(packed.factor)[:, :n]
    np.testing.assert_array_equal(made.T, values(codes, scales))


@pytest.mark.parametrize("kind", layout.KINDS)
def test_scales_too_far_apart_are_refused_and_never_clipped(kind):
    codes, scales = weight(2, 3, 4, 100, layout.SPAN[kind] + 1)
    with pytest.raises(ValueError, match=f"further apart than the {layout.SPAN[kind]} powers of two"):
        layout.check_scales(codes, scales, kind)
    factor = np.asarray(layout.to_tpu(jnp.asarray(codes), jnp.asarray(scales), kind).factor)[0]
    assert np.isnan(factor[1:3]).all()
    assert np.isfinite(factor[0])  # its least block is zeros, whose scale does not matter


def test_broken_and_huge_scales_are_refused():
    codes, scales = weight(3, 3, 4, 100, 5)
    broken = scales.copy()
    broken[1, 2] = 0xFF
    with pytest.raises(ValueError, match="1 blocks have the scale NaN"):
        layout.check_scales(codes, broken)
    assert np.isnan(np.asarray(layout.to_tpu(jnp.asarray(codes), jnp.asarray(broken)).factor)[0, 1])
    with pytest.raises(ValueError, match=r"a scale is 2\*\*11[0-9]: products would overflow"):
        layout.check_scales(codes, (scales + 140).astype(np.uint8))
    with pytest.raises(ValueError, match=r"layout kind 'words' does not exist: must be one of bytes, float4"):
        layout.to_tpu(jnp.asarray(codes), jnp.asarray(scales), "words")
    with pytest.raises(ValueError, match=r"codes have shape \(3, 64\), scales \(3, 3\)"):
        layout.to_tpu(jnp.asarray(codes), jnp.asarray(scales[:, :3]))
