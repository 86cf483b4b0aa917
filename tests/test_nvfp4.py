"""The reference rows' other format, against numpy and ``ml_dtypes``."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from benchmarks import nvfp4
from tests import oracle
from torq_jax.errors import TorqError


def e4m3(x: np.ndarray) -> np.ndarray:
    return np.minimum(x, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def nearest(x: np.ndarray) -> np.ndarray:
    """The format's definition, with float32's divisions as they are."""
    tensor = np.abs(x).max() / np.float32(448 * 6)
    blocks = (x / tensor).reshape(-1, 16)
    scale = e4m3(np.abs(blocks).max(axis=1, keepdims=True) / np.float32(6))
    elements = oracle.round_elements(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return (elements.astype(np.float32) * scale).reshape(x.shape) * tensor


def test_scales_round_once():
    """Every E4M3 value, every midpoint, and the floats beside them."""
    values = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    points = np.concatenate([values, (values[:-1] + values[1:]) / 2, [500.0, 1e30]]).astype(np.float32)
    points = np.concatenate(
        [np.nextafter(points, np.float32(0)), points, np.nextafter(points, np.float32(1e38))]
    )
    np.testing.assert_array_equal(nvfp4.to_e4m3(points), e4m3(points))


def test_nearest_is_the_format():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 96)) * np.exp(rng.standard_normal((64, 1)))).astype(np.float32)
    x[3, 16:32] = 0
    x[4, 16:32] *= 1e-8  # its scale is below half of the least E4M3
    expected = nearest(x)
    values = np.asarray(nvfp4.quantize_dequantize(x))
    # x / tensor_scale, the ratio to the block's scale and the products may each differ by one rounding of float32
    # (2**-24), which moves only elements that are all but ties.
    same = np.isclose(values, expected, rtol=2**-21, atol=0)
    assert same.mean() > 0.999
    np.testing.assert_allclose(np.sum((values - x) ** 2), np.sum((expected - x) ** 2), rtol=1e-4)
    assert not values[3, 16:32].any() and not values[4, 16:32].any()
    assert nvfp4.quantize_dequantize(np.zeros((2, 32), np.float32)).any() == np.False_
    given = np.asarray(nvfp4.quantize_dequantize(x, np.abs(x).max() / np.float32(448 * 6)))
    np.testing.assert_array_equal(given, values)


def test_error_on_normal_values():
    x = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
    difference = np.asarray(nvfp4.quantize_dequantize(x), np.float64) - x
    # E2M1 with blocks of 16 and fine scales: below the 0.0125 of MXFP4's best rule.
    assert 0.0085 < np.mean(difference**2) < 0.0095


def test_gptq():
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((32, 80)).astype(np.float32)  # 5 blocks of 16: no multiple of 32
    samples = rng.standard_normal((400, 80)) @ (rng.standard_normal((80, 80)) / 6)
    hessian = samples.T @ samples / 400
    identity = np.asarray(nvfp4.gptq(weight, np.eye(80)))
    np.testing.assert_array_equal(identity, nvfp4.quantize_dequantize(weight))

    def error(values) -> float:
        e = np.asarray(values, np.float64) - weight
        return float(np.sum((e @ hessian) * e))

    assert error(nvfp4.gptq(weight, hessian)) < 0.7 * error(identity)


def test_errors():
    with pytest.raises(TorqError, match=r"shape \(2, 40\): the last axis must be a multiple of 16"):
        nvfp4.quantize_dequantize(np.ones((2, 40), np.float32))
