"""MXFP8 codes, scales and values, bit for bit against the independent oracle of ``tests/oracle.py``.

Nothing here has a tolerance but the last test: quantising and dequantising are exact specifications.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracle
from tests.test_mxfp4 import (
    DTYPES,
    ROWS,
    assert_same_bits,
    cast,
    heavy_tails,
    neighbours,
    normals,
    special,
    subnormals,
)
from torq_jax import mxfp4
from torq_jax.errors import TorqError
from torq_jax.matmul import dot, matmul, prepare
from torq_jax.mxfp8 import MXFP8Array, dequantize, quantize, quantize_dequantize

RULES = ("floor", "ceil")
rules = pytest.mark.parametrize("rule", RULES)


def check(x: np.ndarray, rule: str) -> None:
    """All that quantize, dequantize and quantize_dequantize give for ``x [n, 32]`` is what the oracle says."""
    x = np.resize(x, (-(-len(x) // ROWS) * ROWS, 32))  # cyclically: one shape, so that little is compiled
    for chunk in np.split(x, len(x) // ROWS):
        expected = oracle.quantize8(chunk, rule)
        q = quantize(chunk, rule)
        scales, codes = np.asarray(q.scales), np.asarray(q.codes)
        wrong = np.flatnonzero(
            (scales != expected.scales).any(axis=1) | (codes != expected.codes).any(axis=1)
        )
        if wrong.size:
            i = wrong[0]
            pytest.fail(
                f"{wrong.size} of {len(chunk)} rows differ, the first {i}: {chunk[i].astype(float).tolist()}\n"
                f"scales {scales[i]} for {expected.scales[i]}\ncodes {codes[i]}\n  for {expected.codes[i]}"
            )
        values = cast(expected.values, chunk.dtype)
        assert_same_bits(dequantize(q, chunk.dtype), values)
        assert_same_bits(quantize_dequantize(chunk, rule), values)


@functools.cache
def boundaries() -> np.ndarray:
    """Every E4M3 magnitude, every boundary between two of them, and the floats beside, at scales from end to end.

    The block's amax runs over 1, 1.75 (where the rules part), 1.8125 (from where floor saturates) and the floats
    beside.
    """
    tops = neighbours(np.array([1.0, 1.75, 1.8125], np.float32)).astype(np.float64)
    grid = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
    blocks = []
    for k in (*range(-149, -108), -60, 0, 3, 100, 126, 127):  # amax is tops * 2**k
        at = cast(np.ldexp(points, k - 8), np.float32)  # inexact only where it becomes a subnormal or zero
        near = np.unique(neighbours(at[np.isfinite(at)]))
        near = np.resize(near, (-(-near.size // 31), 31)).astype(np.float64)
        amax = np.ldexp(tops, k)[:, None, None]
        row = np.broadcast_to(np.where(near <= amax, near, 0), (len(tops), *near.shape))
        amax = np.broadcast_to(amax, (*row.shape[:-1], 1))
        blocks.append(np.concatenate([row, amax], axis=-1).reshape(-1, 32))
    signs = np.where(np.arange(32) % 3 == 1, -1, 1)
    return (np.concatenate(blocks) * signs).astype(np.float32)


@rules
@pytest.mark.parametrize(
    "make", (normals, heavy_tails, boundaries, subnormals, special), ids=lambda f: f.__name__
)
def test_equals_oracle(make, rule):
    check(make(), rule)


def test_inputs_reach_what_they_are_meant_to():
    floor, ceil = (oracle.quantize8(boundaries(), rule) for rule in RULES)
    assert (ceil.scales != floor.scales).any() and floor.scales.min() == 0
    assert set(np.unique(floor.codes & 0x7F)) == set(range(127))  # all but NaN, subnormal codes included
    assert ceil.scales.max() == 120 + 127
    # The largest floats round up to 2**128 under ceil, which float32 has no number for.
    assert np.isinf(cast(oracle.quantize8(special(), "ceil").values, np.float32)).any()


@rules
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: np.dtype(d).name)
def test_every_16_bit_pattern_as_amax(dtype, rule):
    rng = np.random.default_rng(5)
    shares = rng.uniform(-1, 1, 31) * np.exp2(-rng.integers(0, 20, 31))  # tiny ones among them
    check(oracle.patterns_as_amax(dtype, shares), rule)


@rules
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: np.dtype(d).name)
def test_every_16_bit_pattern_as_element(dtype, rule):
    check(oracle.patterns_as_elements(dtype, 1.0, 1.75, 1.875), rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_dequantize_every_scale_and_code(dtype):
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 8))
    q = MXFP8Array(jnp.asarray(codes), jnp.asarray(scales), 256, -1)
    with np.errstate(invalid="ignore", under="ignore"):
        assert_same_bits(dequantize(q, dtype), cast(oracle.decode8(codes, scales), dtype))


@pytest.mark.parametrize("shape, axis", [((64,), 0), ((64, 3), 0), ((2, 32, 5), 1), ((2, 3, 64), -1)])
def test_any_axis(shape, axis):
    x = np.random.default_rng(6).standard_normal(shape).astype(np.float32)
    expected = oracle.quantize8(np.moveaxis(x, axis, -1), "ceil")
    q = quantize(x, axis=axis)
    assert q.shape == shape and q.ndim == x.ndim and q.axis < 0 and q.size == shape[axis]
    assert q.nbytes == x.size + x.size // 32
    np.testing.assert_array_equal(np.moveaxis(q.codes, axis, -1), expected.codes)
    np.testing.assert_array_equal(np.moveaxis(q.scales, axis, -1), expected.scales)
    assert_same_bits(dequantize(q), np.moveaxis(expected.values, -1, axis).astype(np.float32))


@pytest.mark.parametrize("size", [1, 31, 33, 64])
def test_padding_is_zeros_that_dequantize_drops(size):
    x = np.random.default_rng(7).standard_normal((3, size)).astype(np.float32)
    padded = mxfp4.padded_size(size)
    expected = oracle.quantize8(np.pad(x, ((0, 0), (0, padded - size))), "ceil")
    q = quantize(x, pad=True)
    assert q.shape == x.shape and q.codes.shape == (3, padded)
    assert_same_bits(dequantize(q), expected.values[:, :size].astype(np.float32))


def test_vmap_scan_and_jit():
    x = np.random.default_rng(8).standard_normal((4, 8, 96)).astype(np.float32)
    q = quantize(x)
    for other in (jax.vmap(quantize)(x), jax.jit(quantize)(x), jax.jit(lambda q: q)(q)):
        assert jax.tree.structure(other) == jax.tree.structure(q)
        jax.tree.map(np.testing.assert_array_equal, other, q)
    _, rows = jax.lax.scan(lambda carry, layer: (carry, dequantize(layer)), 0, q)
    assert_same_bits(rows, dequantize(q))


float32_blocks = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=128, max_size=128
).map(lambda v: np.array(v, np.float32).reshape(4, 32))


@rules
@settings(max_examples=50, deadline=None)
@given(x=float32_blocks)
def test_any_block_equals_oracle_and_stays_when_quantised_twice(rule, x):
    expected, q = oracle.quantize8(x, rule), quantize(x, rule)
    np.testing.assert_array_equal(q.codes, expected.codes)
    np.testing.assert_array_equal(q.scales, expected.scales)
    once = np.asarray(quantize_dequantize(x, rule))
    assert_same_bits(once, cast(expected.values, np.float32))
    finite = np.isfinite(once).all(axis=1)
    twice = np.asarray(quantize_dequantize(once, rule))
    np.testing.assert_array_equal(twice[finite], once[finite])


def test_errors():
    with pytest.raises(TorqError, match="unknown scale rule 'mse': must be one of floor, ceil"):
        quantize(np.ones((4, 32), np.float32), "mse")
    with pytest.raises(TorqError, match=r"length 40, not a multiple of 32: pass pad=True .* to 64"):
        quantize_dequantize(np.ones((4, 40), np.float32))
    with pytest.raises(TorqError, match="cannot quantise int8"):
        quantize(np.ones((4, 32), np.int8))
    q = MXFP8Array(jnp.zeros((4, 32), jnp.uint8), jnp.zeros((4, 2), jnp.uint8), 32, -1)
    with pytest.raises(TorqError, match="along axis -1 there must be 32 bytes of codes for each scale"):
        dequantize(q)
    with pytest.raises(TorqError, match="cannot dequantise to int8"):
        dequantize(quantize(np.ones((4, 32), np.float32)), jnp.int8)


def test_products_in_bfloat16_are_those_in_float32():
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], (24, 128)), jax.random.normal(keys[1], (48, 128)) / 11
    q = quantize(w)
    narrow = dot(prepare(x, None, "ceil", "mxfp8"), q, rounded=True)
    wide = np.asarray(quantize_dequantize(x), np.float64) @ np.asarray(dequantize(q), np.float64).T
    # Operands of 4 significant bits have exact products; 128 of them are summed in float32, the largest about 10.
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=128 * 10 * 2.0**-24)
    np.testing.assert_array_equal(matmul(x, q, activation_scale="ceil", activation_format="mxfp8"), narrow)
    with pytest.raises(TorqError, match="unknown activation format 'fp8': must be one of mxfp4, mxfp8"):
        prepare(x, None, "ceil", "fp8")


@pytest.mark.parametrize("rule, error", [("floor", 0.000864), ("ceil", 0.000705)])
def test_mean_squared_error_on_normal_values(rule, error):
    x = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    difference = np.asarray(quantize_dequantize(x, rule), np.float64) - x
    # MXFP4's best rule makes 0.012468 of it: 18 times as much.
    assert round(float(np.mean(difference**2)), 6) == error
