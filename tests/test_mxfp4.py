"""MXFP4 codes, scales and values, bit for bit against the independent oracle of ``tests/oracle.py``.

Nothing here has a tolerance: quantising and dequantising are exact specifications.
"""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracle
from torq_jax import mxfp4
from torq_jax.errors import TorqError
from torq_jax.mxfp4 import MXFP4Array, dequantize, quantize, quantize_dequantize

rules = pytest.mark.parametrize("rule", oracle.RULES)
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)


def bits_of(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def assert_same_bits(actual, expected) -> None:
    """Equal bit patterns, signs of zeros included; any NaN equals any other."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    same = (bits_of(actual) == bits_of(expected)) | (np.isnan(actual) & np.isnan(expected))
    assert same.all(), f"{(~same).sum()} differ, first {actual[~same][:4]} for {expected[~same][:4]}"


def cast(values: np.ndarray, dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(dtype)


ROWS = 8192


def check(x: np.ndarray, rule: str) -> None:
    """All that quantize, dequantize and quantize_dequantize give for ``x [n, 32]`` is what the oracle says."""
    x = np.resize(x, (-(-len(x) // ROWS) * ROWS, 32))  # cyclically: one shape, so that little is compiled
    for chunk in np.split(x, len(x) // ROWS):
        check_chunk(chunk, rule)


def check_chunk(x: np.ndarray, rule: str) -> None:
    expected = oracle.quantize(x, rule)
    q = quantize(x, rule)
    scales, codes = np.asarray(q.scales), oracle.unpack(np.asarray(q.codes))
    wrong = np.flatnonzero((scales != expected.scales).any(axis=1) | (codes != expected.codes).any(axis=1))
    if wrong.size:
        i = wrong[0]
        pytest.fail(
            f"{wrong.size} of {len(x)} rows differ, the first {i}: {x[i].astype(float).tolist()}\n"
            f"scales {scales[i]} for {expected.scales[i]}\ncodes {codes[i]}\n  for {expected.codes[i]}"
        )
    values = cast(expected.values, x.dtype)
    assert_same_bits(dequantize(q, x.dtype), values)
    assert_same_bits(quantize_dequantize(x, rule), values)


# --- Inputs: [n, 32] each ------------------------------------------------------------------------------


def power_of_two(k) -> np.ndarray:
    """2**k as float32, subnormals included (numpy's ldexp rounds to them correctly)."""
    return np.ldexp(1.0, k).astype(np.float32)


def neighbours(x: np.ndarray) -> np.ndarray:
    """Each positive float32 with its lower and upper neighbour: [..., 3 n]."""
    bits = x.view(np.int32)
    return np.concatenate([np.maximum(bits - 1, 0), bits, bits + 1], axis=-1).view(np.float32)


@functools.cache
def normals() -> np.ndarray:
    rng = np.random.default_rng(0)
    magnitude = power_of_two(rng.integers(-150, 127, (8192, 1)))
    with np.errstate(over="ignore"):
        return (rng.standard_normal((8192, 32)) * magnitude).astype(np.float32)  # some become Inf


@functools.cache
def heavy_tails() -> np.ndarray:
    rng = np.random.default_rng(1)
    spread = np.exp2(rng.uniform(0, 40, (4096, 1)))  # from one binade to far below every boundary
    log_uniform = np.exp2(
        rng.uniform(-1, 0, (4096, 32)) * np.log2(spread) + rng.uniform(-140, 127, (4096, 1))
    )
    return np.concatenate(
        [rng.standard_t(1.2, (4096, 32)), rng.choice([-1.0, 1.0], (4096, 32)) * log_uniform]
    ).astype(np.float32)


@functools.cache
def boundaries() -> np.ndarray:
    """Every decision boundary and representable value, and the floats beside them, at every scale.

    The block's amax runs over the powers of two, 1.5, 1.75 and the floats beside, where the rules part.
    """
    tops = neighbours(np.array([1.0, 1.5, 1.75], np.float32)).astype(np.float64)  # [9]
    points = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    shifted = np.concatenate([points / 2, points, points * 2])
    blocks = []
    for k in range(-149, 128):  # amax is tops * 2**k, the floor exponent k - 2
        at = cast(np.ldexp(shifted, k - 2), np.float32)  # inexact only where it becomes a subnormal or zero
        near = np.unique(neighbours(at[np.isfinite(at)]))
        near = np.resize(near, (-(-near.size // 31), 31)).astype(np.float64)
        amax = np.ldexp(tops, k)[:, None, None]
        row = np.broadcast_to(np.where(near <= amax, near, 0), (len(tops), *near.shape))
        amax = np.broadcast_to(amax, (*row.shape[:-1], 1))
        blocks.append(np.concatenate([row, amax], axis=-1).reshape(-1, 32))
    signs = np.where(np.arange(32) % 3 == 1, -1, 1)
    return (np.concatenate(blocks) * signs).astype(np.float32)


@functools.cache
def squared_error_ties() -> np.ndarray:
    """Few distinct values a block, so that two candidates' squared errors tie or nearly do, and one ulp beside."""
    rng = np.random.default_rng(2)
    grid = np.concatenate([np.arange(0, 8, 0.125), np.arange(3, 4, 1 / 64)])
    anything = rng.choice(grid, (2048, 32)) * (rng.random((2048, 32)) < rng.random((2048, 1)))
    anything[:, 0] = rng.choice(grid[grid >= 2], 2048)
    # floor + 1 wins by an element above 7; floor - 1, only if about 16 others lie near 1/4 or 3/4 and amax near 4.
    low = rng.choice([0.1875, 0.25, 0.25, 0.75], (2048, 32)) * (
        np.arange(32) <= rng.integers(14, 32, (2048, 1))
    )
    low[:, 0] = rng.choice([4, 4.0625, 4.25, 4.4375], 2048)
    blocks = np.concatenate([anything, low]).astype(np.float32)
    beside = blocks.view(np.int32) + rng.integers(-1, 2, blocks.shape, dtype=np.int32) * (blocks > 0)
    scale = power_of_two(np.where(np.arange(8192) % 2, 0, rng.integers(-149, 125, 8192)))
    return np.concatenate([blocks, beside.view(np.float32)]) * scale[:, None]


@functools.cache
def subnormals() -> np.ndarray:
    """Blocks of nothing but subnormals and of the first normal binades, up to each of many amax."""
    rng = np.random.default_rng(3)
    top = neighbours(power_of_two(np.arange(-149, -120))).view(np.int32)
    top = np.concatenate([top, rng.integers(1, 5 << 23, 4096)])
    bits = (rng.random((top.size, 31)) * (top[:, None] + 1)).astype(np.int32)
    sign = rng.integers(0, 2, (top.size, 32), dtype=np.uint32) << 31
    return (np.concatenate([bits, top[:, None]], axis=1).astype(np.uint32) | sign).view(np.float32)


@functools.cache
def special() -> np.ndarray:
    """Zero blocks with either sign, NaN and infinities at every place and beside anything, the largest floats."""
    rng = np.random.default_rng(4)
    largest = np.finfo(np.float32).max
    zero = [np.zeros(32), np.full(32, -0.0), np.where(np.arange(32) % 2, 0.0, -0.0)]
    poisoned = []
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for beside in (np.zeros(32), rng.standard_normal(32), np.full(32, largest), np.full(32, 1e-45)):
            poisoned.append(np.where(np.eye(32, dtype=bool), bad, beside))
    full = [np.full(32, v) for v in (np.nan, np.inf, -np.inf, largest, -largest, 1e-45, -1e-45)]
    edge = neighbours(power_of_two(np.array([127])) * np.array([1, 1.25, 1.5, 1.75], np.float32))
    near_overflow = np.outer(edge, rng.uniform(-1, 1, 32))
    near_overflow[:, 5] = edge
    mixed = np.where(rng.random((256, 32)) < 0.5, -0.0, rng.standard_normal((256, 32)))
    return np.concatenate([np.stack(zero + full), *poisoned, near_overflow, mixed]).astype(np.float32)


INPUTS = (normals, heavy_tails, boundaries, squared_error_ties, subnormals, special)


@rules
@pytest.mark.parametrize("make", INPUTS, ids=lambda f: f.__name__)
def test_equals_oracle(make, rule):
    check(make(), rule)


def test_inputs_reach_what_they_are_meant_to():
    ties = squared_error_ties()
    moved = oracle.quantize(ties, "mse").scales.astype(int) - oracle.quantize(ties, "floor").scales
    assert min(np.mean(moved == step) for step in (-1, 0, 1)) > 0.05  # all outcomes of the comparisons occur
    scales = {rule: oracle.quantize(boundaries(), rule).scales for rule in oracle.RULES}
    for rule in ("ceil", "even", "mse"):
        assert (scales[rule] != scales["floor"]).any()
    assert scales["floor"].min() == 0 and scales["ceil"].max() == 126 + 127
    assert np.isinf(
        cast(oracle.quantize(special(), "ceil").values, np.float32)
    ).any()  # 4 * 2**126 is beyond float32


@pytest.mark.parametrize("ulp, exponent", [(-1, 0), (0, 0), (1, -1)])
def test_squared_errors_are_compared_to_the_last_bit(ulp, exponent):
    """Saturating 4 to 3 costs 1; a quarter kept wins 1/16, 3/16 made a quarter 1/32: a tie but for one ulp."""
    x = np.array([4.0] + [0.25] * 14 + [0.1875] * 4 + [0.0] * 13, np.float32)
    x.view(np.int32)[18] += ulp
    assert quantize(x, "mse").scales[0] == 127 + exponent == oracle.quantize(x, "mse").scales[0]


@rules
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: np.dtype(d).name)
def test_every_16_bit_pattern_as_amax(dtype, rule):
    check(oracle.patterns_as_amax(dtype, np.random.default_rng(5).uniform(-1, 1, 31)), rule)


@rules
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: np.dtype(d).name)
def test_every_16_bit_pattern_as_element(dtype, rule):
    check(oracle.patterns_as_elements(dtype, 1.0, 1.5, 1.75), rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_dequantize_every_scale_and_code(dtype):
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 2))  # [256, 32]
    scales = np.arange(256, dtype=np.uint8)[:, None]
    q = MXFP4Array(jnp.asarray(oracle.pack(codes)), jnp.asarray(scales), 32, -1)
    assert_same_bits(dequantize(q, dtype), cast(oracle.decode(codes, scales), dtype))


def test_codes_take_the_low_nibble_first():
    x = np.zeros(32, np.float32)
    x[:4] = [6.0, -0.5, 1.5, -4.0]  # codes 7, 9, 3, 14
    q = quantize(x, "floor")
    np.testing.assert_array_equal(q.codes[:3], [0x97, 0xE3, 0])
    np.testing.assert_array_equal(q.scales, [127])
    codes = np.arange(256, dtype=np.uint8).reshape(4, 64) % 16
    np.testing.assert_array_equal(mxfp4.pack(codes), oracle.pack(codes))
    np.testing.assert_array_equal(mxfp4.unpack(oracle.pack(codes)), codes)


# --- Shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, axis, rule",
    [
        ((64,), 0, "floor"),
        ((64, 3), 0, "mse"),
        ((3, 96), 1, "ceil"),
        ((2, 32, 5), 1, "even"),
        ((2, 32, 5), -2, "mse"),
        ((2, 3, 64), -1, "even"),
    ],
)
def test_any_axis(shape, axis, rule):
    x = np.random.default_rng(6).standard_normal(shape).astype(np.float32)
    expected = oracle.quantize(np.moveaxis(x, axis, -1), rule)
    q = quantize(x, rule, axis=axis)
    assert q.shape == shape and q.ndim == x.ndim and q.axis < 0 and q.size == shape[axis]
    assert q.nbytes == x.size // 2 + x.size // 32
    np.testing.assert_array_equal(np.moveaxis(q.codes, axis, -1), oracle.pack(expected.codes))
    np.testing.assert_array_equal(np.moveaxis(q.scales, axis, -1), expected.scales)
    values = np.moveaxis(expected.values, -1, axis).astype(np.float32)
    assert_same_bits(dequantize(q), values)
    assert_same_bits(quantize_dequantize(x, rule, axis=axis), values)


@pytest.mark.parametrize("size", [1, 31, 33, 40, 64])
@pytest.mark.parametrize("axis", [0, 1])
def test_padding_is_zeros_that_dequantize_drops(size, axis):
    x = np.random.default_rng(7).standard_normal((3, size)).astype(np.float32)
    padded = mxfp4.padded_size(size)
    expected = oracle.quantize(np.pad(x, ((0, 0), (0, padded - size))), "even")
    x = np.moveaxis(x, -1, axis)
    q = quantize(x, "even", axis=axis, pad=True)
    assert q.shape == x.shape and q.size == size
    assert q.codes.shape[axis] == padded // 2 and q.scales.shape[axis] == padded // 32
    np.testing.assert_array_equal(np.moveaxis(q.codes, axis, -1), oracle.pack(expected.codes))
    values = np.moveaxis(expected.values[:, :size], -1, axis).astype(np.float32)
    assert_same_bits(dequantize(q), values)
    assert_same_bits(quantize_dequantize(x, "even", axis=axis, pad=True), values)


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0,)])
def test_empty(shape):
    q = quantize(jnp.zeros(shape), "even")
    assert q.shape == shape and dequantize(q).shape == shape
    assert quantize_dequantize(jnp.zeros(shape), "even").shape == shape


# --- Transformations of jax ----------------------------------------------------------------------------


def stacked(axis: int = -1) -> tuple[np.ndarray, MXFP4Array]:
    x = np.random.default_rng(8).standard_normal((4, 64, 96)).astype(np.float32)
    return x, quantize(x, "mse", axis=axis)


def assert_same_array(actual: MXFP4Array, expected: MXFP4Array) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("axis", [-1, -2, 1, 2])
def test_vmap_and_scan_keep_the_axis(axis):
    x, q = stacked(axis)
    inner = axis if axis < 0 else axis - 1
    assert_same_array(jax.vmap(lambda row: quantize(row, "mse", axis=inner))(x), q)
    assert_same_bits(jax.vmap(dequantize)(q), dequantize(q))
    _, rows = jax.lax.scan(lambda carry, layer: (carry, dequantize(layer)), 0, q)
    assert_same_bits(rows, dequantize(q))
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, quantize(layer, "mse", axis=inner)), 0, x)
    assert_same_array(scanned, q)
    layer = jax.tree.map(lambda leaf: leaf[1], q)
    assert layer.shape == (64, 96)
    assert_same_bits(dequantize(layer), np.asarray(dequantize(q))[1])


def test_jit_takes_and_returns_arrays():
    x, q = stacked()
    assert_same_array(jax.jit(lambda x: quantize(x, "mse"))(x), q)
    assert_same_array(jax.jit(lambda q: q)(q), q)
    assert_same_bits(jax.jit(dequantize)(q), dequantize(q))
    shape = jax.eval_shape(lambda: quantize(x, "mse"))
    assert isinstance(shape, MXFP4Array) and shape.shape == x.shape and shape.nbytes == q.nbytes


def test_tree_round_trip():
    _, q = stacked(-2)
    leaves, structure = jax.tree.flatten(q)
    assert [leaf.dtype for leaf in leaves] == [np.uint8, np.uint8]
    assert_same_array(jax.tree.unflatten(structure, leaves), q)
    assert hash(structure) == hash(
        jax.tree.structure(quantize(np.ones((4, 64, 96), np.float32), "floor", axis=1))
    )
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == [".codes", ".scales"]


def test_sharding_over_two_devices():
    """In a process of its own: the number of devices is fixed once jax has started."""
    program = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from torq_jax.mxfp4 import quantize, dequantize
x = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
q = quantize(x, "even")
mesh = Mesh(np.array(jax.devices()), ("model",))
for spec in (P("model", None), P(None, "model")):
    placed = jax.device_put(q, NamedSharding(mesh, spec))
    assert len(placed.codes.sharding.device_set) == len(placed.scales.sharding.device_set) == 2
    out = dequantize(placed)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2), out.sharding
    np.testing.assert_array_equal(out, dequantize(q))
    again = quantize(jax.device_put(x, NamedSharding(mesh, spec)), "even")
    np.testing.assert_array_equal(again.codes, q.codes)
    np.testing.assert_array_equal(again.scales, q.scales)
"""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    root = pathlib.Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


# --- Properties ----------------------------------------------------------------------------------------

SHAPE = (4, 32)  # one shape, so that nothing is compiled twice
float32_blocks = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=128, max_size=128
).map(lambda v: np.array(v, np.float32).reshape(SHAPE))
moderate_blocks = st.lists(
    st.floats(width=32, min_value=-(2.0**10), max_value=2.0**10, allow_subnormal=False),
    min_size=128,
    max_size=128,
).map(lambda v: np.array(v, np.float32).reshape(SHAPE))


@rules
@settings(max_examples=30, deadline=None)
@given(x=float32_blocks)
def test_quantising_twice_changes_nothing(rule, x):
    once = np.asarray(quantize_dequantize(x, rule))
    finite = np.isfinite(once).all(axis=1)  # 4 * 2**126 overflows; the rest must stay as they are
    twice = np.asarray(quantize_dequantize(once, rule))
    np.testing.assert_array_equal(twice[finite], once[finite])  # -0.0 == 0.0: a zero block forgets signs


@rules
@settings(max_examples=30, deadline=None)
@given(x=moderate_blocks, k=st.integers(-90, 110))
def test_powers_of_two_move_only_the_scale(rule, x, k):
    x = np.where(np.abs(x) < 2.0**-20, np.float32(0), x)  # stay in the normal range, away from the clamp
    q, moved = quantize(x, rule), quantize(np.ldexp(x, k), rule)
    np.testing.assert_array_equal(moved.codes, q.codes)
    empty = (x == 0).all(axis=1, keepdims=True)
    np.testing.assert_array_equal(moved.scales, np.where(empty, 0, q.scales.astype(int) + k))


@rules
@settings(max_examples=30, deadline=None)
@given(x=float32_blocks)
def test_sign_and_order_do_not_matter(rule, x):
    values = np.asarray(quantize_dequantize(x, rule))
    np.testing.assert_array_equal(quantize_dequantize(-x, rule), -values)
    np.testing.assert_array_equal(quantize_dequantize(x[:, ::-1], rule), values[:, ::-1])


# --- Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [quantize, quantize_dequantize])
@pytest.mark.parametrize(
    "x, rule, options, message",
    [
        (
            np.ones((4, 32), np.float32),
            "rceil",
            {},
            "unknown scale rule 'rceil': must be one of floor, ceil, even",
        ),
        (
            np.ones((4, 32), np.int8),
            "floor",
            {},
            "cannot quantise int8: cast to float32, bfloat16 or float16 first",
        ),
        (np.ones((4, 32), np.float64), "floor", {}, "cannot quantise float64: cast to float32"),
        (np.ones((4, 32), np.float32), "floor", {"axis": 2}, r"axis 2 is out of range for shape \(4, 32\)"),
        (np.ones((4, 32), np.float32), "floor", {"axis": -3}, r"axis -3 is out of range for shape \(4, 32\)"),
        (np.float32(1), "floor", {}, r"axis -1 is out of range for shape \(\)"),
        (
            np.ones((4, 40), np.float32),
            "floor",
            {},
            "length 40, not a multiple of 32: pass pad=True .* to 64",
        ),
    ],
)
def test_errors_of_quantize(function, x, rule, options, message):
    with pytest.raises(TorqError, match=message):
        function(x, rule, **options)


@pytest.mark.parametrize(
    "codes, scales, size",
    [
        ((4, 16), (4, 2), 32),
        ((4, 15), (4, 1), 30),
        ((4, 16), (3, 1), 32),
        ((4, 16), (1,), 32),
        ((4, 16), (4, 1), 33),
    ],
)
def test_errors_of_dequantize(codes, scales, size):
    q = MXFP4Array(jnp.zeros(codes, jnp.uint8), jnp.zeros(scales, jnp.uint8), size, -1)
    with pytest.raises(TorqError, match="along axis -1 there must be 16 bytes of codes for each scale"):
        dequantize(q)


def test_dequantize_to_integers_is_an_error():
    q = quantize(np.ones((4, 32), np.float32), "floor")
    with pytest.raises(TorqError, match="cannot dequantise to int8: ask for a floating-point dtype"):
        dequantize(q, jnp.int8)


# --- Quality -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, error", [("floor", 0.013244), ("ceil", 0.013340), ("even", 0.012531), ("mse", 0.012468)]
)
def test_mean_squared_error_on_normal_values(rule, error):
    x = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    difference = np.asarray(quantize_dequantize(x, rule), np.float64) - x
    assert round(float(np.mean(difference**2)), 6) == error  # five significant places
