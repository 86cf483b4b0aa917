"""Layouts of the GPU kernels: exact inverses, where each bit stands, what does not fit."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import layout
from torq_jax import mxfp4


def weight(n, k, seed=0, low=90, high=140):
    """Random codes without negative zeros, scales of blocks of zeros 0, as the layouts give them back."""
    rng = np.random.default_rng(seed)
    each = rng.integers(0, 16, (n, k // 32, 32), dtype=np.uint8)
    each[each == 8] = 0
    each[rng.random(each.shape[:2]) < 0.1] = 0
    scales = rng.integers(low, high, each.shape[:2], dtype=np.uint8) * each.any(-1)
    return jnp.asarray((each[..., ::2] | each[..., 1::2] << 4).reshape(n, k // 2)), jnp.asarray(scales)


@pytest.mark.parametrize("n, k", [(128, 256), (200, 96), (1, 1056)])
def test_hopper_is_an_exact_inverse(n, k):
    codes, scales = weight(n, k, low=14)
    packed = layout.to_hopper(codes, scales)
    assert packed.words.shape == (-(-n // 128) * 128, -(-k // 256) * 64)
    assert packed.exponents.shape == (packed.words.shape[1] // 8, packed.words.shape[0])
    back = layout.from_hopper(packed, n, k)
    np.testing.assert_array_equal(back[0], codes)
    np.testing.assert_array_equal(back[1], scales)


def test_a_shift_and_a_mask_leave_bfloat16_values():
    codes, scales = weight(128, 256)
    word = np.asarray(layout.to_hopper(codes, scales).words).astype(np.uint32)
    each = np.stack([np.asarray(codes) & 15, np.asarray(codes) >> 4], -1).reshape(128, 4, 64)
    third = ((word >> 6) & 0x0180) | ((word >> 4) & 0x0040) | ((word << 4) & 0x8000)
    got = np.stack([word & 0x81C0, (word << 3) & 0x81C0, (word << 6) & 0x81C0, third], 1)
    want = ((each & 8).astype(np.uint32) << 12) | ((each & 7).astype(np.uint32) << 6)
    np.testing.assert_array_equal(got, want)
    # ... which is the value times 2**-126, 0.5 as a subnormal number.
    values = jnp.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6], jnp.bfloat16)
    pattern = np.arange(8, dtype=np.uint32) << 22
    np.testing.assert_array_equal(pattern.view(np.float32).astype(np.float64) * 2.0**126, values)


@pytest.mark.parametrize("n, k", [(128, 256), (200, 96), (1, 1056)])
def test_hopper_e4m3_is_an_exact_inverse(n, k):
    codes, scales = weight(n, k, low=100, high=112)
    packed = layout.to_hopper_e4m3(codes, scales)
    assert packed.words.shape == (-(-n // 128) * 128, -(-k // 256) * 32) and packed.words.dtype == jnp.uint32
    back = layout.from_hopper_e4m3(packed, n, k)
    np.testing.assert_array_equal(back[0], codes)
    np.testing.assert_array_equal(back[1], scales)


def test_a_table_and_a_sign_bit_leave_e4m3_values():
    """What the kernel does with a word, byte by byte: PRMT by the low three bits of a nibble, then the signs."""
    codes, scales = weight(128, 256, low=100, high=112)
    packed = layout.to_hopper_e4m3(codes, scales)
    word = (
        np.asarray(packed.words).reshape(128, 4, 4, 2).transpose(0, 1, 3, 2).reshape(128, 8, 4)
    )  # [n, b, q]
    exponent = np.asarray(packed.exponents).T.astype(np.uint32)
    tables = layout.E4M3_TABLE[0] + exponent[..., None] * np.uint32(layout.E4M3_TABLE[1])  # [n, b, 2]
    table = np.ascontiguousarray(tables.astype("<u4")).view(np.uint8).reshape(128, 8, 8)
    got = np.zeros((128, 8, 2, 4, 4), np.uint8)
    for half in range(2):
        signs = (word << np.uint32(4 * half)) & 0x80808080
        for i in range(4):
            chosen = (word >> (4 * (4 * half + i))) & 7
            byte = np.take_along_axis(table, chosen.astype(int), 2)
            got[:, :, half, :, i] = byte | ((signs >> (8 * i)) & 0xFF).astype(np.uint8)
    values = np.asarray(jnp.asarray(got).view(jnp.float8_e4m3fn).astype(jnp.float32)).reshape(128, 256)
    want = mxfp4.dequantize(mxfp4.MXFP4Array(codes, scales, 256, -1))
    np.testing.assert_array_equal(values * np.asarray(packed.factor)[:, None], want)


def test_outputs_that_do_not_fit_hopper_are_nan():
    codes = jnp.full((4, 64), 0x11, jnp.uint8)
    scales = jnp.asarray([[200, 73, 200, 200], [200, 74, 200, 200], [255, 9, 9, 9], [1, 2, 1, 0]], jnp.uint8)
    factor = np.asarray(layout.to_hopper(codes, scales).factor)
    np.testing.assert_array_equal(np.isnan(factor[:4]), [True, False, True, False])
    assert np.isfinite(factor[4:]).all()
    assert layout.fits_hopper(codes[1:2], scales[1:2]) and not layout.fits_hopper(codes, scales)
    near = jnp.asarray([[100, 111, 100, 0], [100, 112, 100, 0]], jnp.uint8)
    factor = np.asarray(layout.to_hopper_e4m3(codes[:2].at[:, 48:].set(0), near).factor)
    np.testing.assert_array_equal(np.isnan(factor[:2]), [False, True])
    assert layout.fits_hopper(codes[:1], near[:1, :3].repeat(2, 1)[:, :4], e4m3=True)
    assert not layout.fits_hopper(codes[:2], near, e4m3=True)
    with pytest.raises(ValueError, match=r"codes have shape \(4, 64\), scales \(4, 3\)"):
        layout.to_hopper(codes, scales[:, :3])


@pytest.mark.parametrize("n, k", [(128, 256), (200, 96), (1, 1056)])
def test_blackwell_is_an_exact_inverse(n, k):
    rng = np.random.default_rng(1)
    codes = jnp.asarray(rng.integers(0, 256, (n, k // 2), dtype=np.uint8))
    scales = jnp.asarray(rng.integers(0, 256, (n, k // 32), dtype=np.uint8))
    packed = layout.to_blackwell(codes, scales)
    assert packed.values.shape == (-(-n // 128) * 128, -(-k // 256) * 256)
    back = layout.from_blackwell(packed, n, k)
    np.testing.assert_array_equal(back[0], codes)
    np.testing.assert_array_equal(back[1], scales)


def test_each_scale_stands_where_its_index_says():
    scales = np.arange(256 * 8).reshape(256, 8)
    swizzled = np.asarray(layout.swizzle_scales(jnp.asarray(scales)))
    for row in range(256):
        for block in range(8):
            assert swizzled[layout.swizzled_scale(row, block)] == scales[row, block]
    np.testing.assert_array_equal(layout.unswizzle_scales(jnp.asarray(swizzled)), scales)
    with pytest.raises(ValueError, match=r"scales have shape \(100, 8\): must be multiples of 128 and 4"):
        layout.swizzle_scales(jnp.zeros((100, 8)))
