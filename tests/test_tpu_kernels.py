"""The TPU kernels in Pallas's interpretation: codes bit by bit, products, special values, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import layout, reference, tpu
from torq_jax import mxfp4

BF16, F32 = jnp.bfloat16, jnp.float32
PLAIN = tpu.TPURotation(None, None)


def exact_case(m, k, n, inter, intra, dtype, seed=0):
    """Integers and matrices of few quarters: float32 sums are exact in any order, so results are equal bit by bit."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.integers(-40, 41, (m, k)), dtype)

    def matrix(shape):
        if shape is None:
            return None
        few = rng.random(shape) < min(1, 4 / shape[-1])
        return jnp.asarray(rng.integers(-2, 3, shape) / 4 * few, F32)

    w = rng.standard_normal((n, k)).astype(np.float32) * np.exp(rng.standard_normal((n, 1))).astype(
        np.float32
    )
    return x, matrix(inter), matrix(intra), mxfp4.quantize(w, "mse")


# m, k, n, inter, intra, rule, dtype, kind, rows of a tile
CASES = [
    (1, 256, 128, None, None, "even", BF16, "bytes", 64),
    (5, 96, 40, None, (32, 32), "even", BF16, "bytes", 64),
    (16, 256, 200, (8, 8), (32, 32), "floor", BF16, "float4", 64),
    (3, 576, 200, (32, 9, 2, 2), (18, 32, 32), "ceil", BF16, "bytes", 64),
    (17, 512, 256, (32, 1, 16, 16), (16, 32, 32), "even", F32, "bytes", 64),
    pytest.param(
        *(40, 1024, 128, (32, 1, 32, 32), (32, 32, 32), "even", BF16, "float4", 64),
        marks=pytest.mark.extended,
    ),
    pytest.param(
        *(5, 4096, 128, (32, 128, 128), (128, 32, 32), "even", BF16, "bytes", 64), marks=pytest.mark.extended
    ),
    (200, 512, 256, (32, 4, 4, 4), (16, 32, 32), "even", BF16, "bytes", 256),
    (200, 256, 128, (32, 8, 8), None, "floor", BF16, "bytes", 256),
    (200, 256, 128, (2, 4, 4), (32, 32), "ceil", BF16, "float4", 256),
    (17, 256, 128, None, (8, 32, 32), None, BF16, "bytes", 64),
    (5, 256, 128, (32, 8, 1, 1), None, None, F32, "bytes", 64),
]


@pytest.mark.parametrize("m, k, n, inter, intra, rule, dtype, kind, rows", CASES)
def test_codes_and_products_equal_the_reference(m, k, n, inter, intra, rule, dtype, kind, rows):
    check_exact(m, k, n, inter, intra, rule, dtype, kind, rows, True)


# m, k, n, inter, intra, rule, dtype, kind: rotated in a call of their own, the weight's features in parts
APART = [
    (200, 1024, 256, (32, 4, 8, 8), (32, 32, 32), "even", BF16, "bytes"),
    (200, 512, 200, (16, 16), (32, 32), "floor", BF16, "float4"),
    (140, 384, 128, None, (32, 32), "ceil", F32, "bytes"),
    (140, 512, 128, (32, 2, 8, 8), None, None, F32, "bytes"),
    (140, 384, 128, None, None, None, BF16, "bytes"),
]


@pytest.mark.parametrize("m, k, n, inter, intra, rule, dtype, kind", APART)
@pytest.mark.parametrize("narrow", [False, True])
def test_many_rows_in_two_calls(m, k, n, inter, intra, rule, dtype, kind, narrow):
    check_exact(m, k, n, inter, intra, rule, dtype, kind, 256, True, features=256, narrow=narrow)


def ordinary(x):
    """Rows in all magnitudes, an outlier, a quiet block, zeros."""
    x = x.at[3, 300].multiply(1000).at[5, 32:64].multiply(2.0**-9).at[7].set(0).at[:, 64:96].set(0)
    return x * jnp.exp2(jnp.arange(140.0) - 60)[:, None]


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        (ordinary, True),
        (lambda x: x.at[5, 32:64].multiply(2.0**-40), False),
        (lambda x: x.at[5, :512].multiply(2.0**-40), False),  # by these features a row is measured
        (lambda x: x.at[5, 7].set(jnp.nan), None),  # either way
    ],
)
def test_rows_that_do_not_fit_float8_are_multiplied_in_bfloat16(change, fits, monkeypatch):
    x, _, intra, w = exact_case(140, 640, 128, None, (32, 32), BF16)
    x, taken, both = change(x.astype(F32)).astype(BF16), [], jax.lax.cond

    def cond(lost, *rest):
        taken.append(not lost)
        return both(lost, *rest)

    monkeypatch.setattr(tpu.lax, "cond", cond)
    run = functools.partial(
        tpu.rotate_quantize_matmul,
        x,
        layout.to_tpu(w.codes, w.scales),
        tpu.prepare_rotation(None, intra, 640),
        rule="even",
        interpret=True,
    )
    made, plain = (
        np.asarray(run(tiles=tpu.Tiles(256, 256, 64, features=256, narrow=n)), np.float32)
        for n in (True, False)
    )
    assert len(taken) == 1 and (fits is None or taken == [fits])
    # Powers of two aside the same products, summed in the same order.
    np.testing.assert_array_equal(made, plain)
    assert np.isnan(made[5]).any() == bool(jnp.isnan(x).any())


@pytest.mark.parametrize("case", [CASES[2], CASES[3]])
def test_the_tpu_interpreter_agrees(case):
    check_exact(*case, pltpu.InterpretParams())


def check_exact(m, k, n, inter, intra, rule, dtype, kind, rows, interpret, features=0, narrow=False):
    x, inter, intra, w = exact_case(m, k, n, inter, intra, dtype)
    rotation = tpu.prepare_rotation(inter, intra, k, dtype=jnp.dtype(dtype))
    z = reference.rotate(x, inter, intra)
    if rule is not None and not features:
        codes, scales = tpu.rotate_quantize(x, rotation, rule=rule, rows=64, interpret=interpret)
        want = mxfp4.quantize(z, rule)
        np.testing.assert_array_equal(codes, want.codes)
        np.testing.assert_array_equal(scales, want.scales)
    y = tpu.rotate_quantize_matmul(
        x,
        layout.to_tpu(w.codes, w.scales, kind),
        rotation,
        rule=rule,
        tiles=tpu.Tiles(rows, 256, 64 if rows > 64 else 32, features=features, narrow=narrow),
        kind=kind,
        interpret=interpret,
    )[:, :n]
    rounded = z.astype(dtype) if rule is None else mxfp4.quantize_dequantize(z, rule)
    want = reference.multiply(rounded, mxfp4.dequantize(w))
    # Products are exact in both; k float32 sums in another order differ by k units in the last place of the sum of
    # magnitudes at most, and the result is rounded once to its dtype.
    size = reference.multiply(jnp.abs(rounded), jnp.abs(mxfp4.dequantize(w)))
    bound = k * 2.0**-24 * size + jnp.finfo(dtype).eps / 2 * jnp.abs(want)
    assert bool((jnp.abs(y.astype(F32) - want) <= bound * (1 + 2**-6)).all())


@pytest.mark.parametrize("m, rows", [(5, 64), pytest.param(150, 256, marks=pytest.mark.extended)])
def test_a_layer_of_a_stack_is_that_layer(m, rows):
    cases = [exact_case(m, 256, 200, (32, 2, 4, 4), (8, 32, 32), BF16, seed) for seed in range(3)]
    rotations = [tpu.prepare_rotation(inter, intra, 256) for _, inter, intra, _ in cases]
    weights = [layout.to_tpu(w.codes, w.scales) for *_, w in cases]
    stack = lambda each: jax.tree.map(lambda *a: jnp.stack(a), *each)  # noqa: E731
    tiles = tpu.Tiles(rows, 128, 64 if rows > 64 else 32)
    x = cases[0][0]
    for layer in (0, 2):
        given = {"rule": "even", "tiles": tiles, "interpret": True}
        got = tpu.rotate_quantize_matmul(x, stack(weights), stack(rotations), layer=jnp.int32(layer), **given)
        want = tpu.rotate_quantize_matmul(x, weights[layer], rotations[layer], **given)
        np.testing.assert_array_equal(got, want)


def test_random_data_differs_at_rounding_boundaries_only():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (33, 512), BF16)
    inter = jax.random.normal(keys[1], (32, 4, 4, 4)) / 2
    intra = jax.random.normal(keys[2], (16, 32, 32)) / 6
    z = reference.rotate(x, inter, intra)
    codes, scales = tpu.rotate_quantize(
        x, tpu.prepare_rotation(inter, intra, 512), rule="even", interpret=True
    )
    got = mxfp4.dequantize(mxfp4.MXFP4Array(codes, scales, 512, -1))
    want = mxfp4.quantize_dequantize(z, "even")
    different = np.asarray(got != want)
    # A sum in another order may round to the neighbouring bfloat16 between the stages, 2**-8 of one of 32 summands;
    # where it matters, the reference's value moved by that much must be able to take the other code, too.
    moved = 2.0**-8 * np.asarray(jnp.abs(z)).max(-1, keepdims=True)
    middle = (np.asarray(got) + np.asarray(want)) / 2
    assert different.mean() < 1e-3
    assert (np.abs(np.asarray(z) - middle)[different] <= moved.repeat(512, 1)[different]).all()


@pytest.mark.parametrize("rows", [64, 256])
def test_special_values_stay_in_their_row(rows):
    m = 150 if rows > 128 else 20
    x, inter, intra, w = exact_case(m, 256, 128, (32, 2, 4, 4), (8, 32, 32), BF16)
    x = x.at[3, 7].set(jnp.nan).at[6, 200].set(jnp.inf).at[9].set(0)
    call = lambda x: tpu.rotate_quantize_matmul(  # noqa: E731
        x,
        layout.to_tpu(w.codes, w.scales),
        tpu.prepare_rotation(inter, intra, 256),
        rule="even",
        tiles=tpu.Tiles(rows, 128, 64 if rows > 64 else 32),
        interpret=True,
    )
    y, clean = call(x), call(jnp.where(jnp.isfinite(x), x, 0))
    broken = np.isin(np.arange(m), (3, 6))
    assert np.isnan(np.asarray(y, np.float32)[broken]).any(-1).all()
    np.testing.assert_array_equal(np.asarray(y)[~broken], np.asarray(clean)[~broken])
    assert not np.asarray(y, np.float32)[9].any()


def test_zero_rows_have_zero_codes_and_scales():
    codes, scales = tpu.rotate_quantize(jnp.zeros((3, 128), BF16), rule="even", interpret=True)
    assert not np.asarray(codes).any() and not np.asarray(scales).any()


def test_errors_name_what_is_wrong():
    w = layout.to_tpu(jnp.zeros((128, 128), jnp.uint8), jnp.zeros((128, 8), jnp.uint8))
    call = lambda x, r=PLAIN, rule="even": tpu.rotate_quantize_matmul(  # noqa: E731
        x, w, r, rule=rule, tiles=tpu.Tiles(64, 128), interpret=True
    )
    with pytest.raises(ValueError, match="activations are float16: must be bfloat16 or float32"):
        call(jnp.zeros((4, 256), jnp.float16))
    with pytest.raises(ValueError, match="activations have 512 features, the weight 256"):
        call(jnp.zeros((4, 512), BF16))
    with pytest.raises(ValueError, match="'mse' cannot run in one pass: must be one of floor, ceil, even"):
        call(jnp.zeros((4, 256), BF16), rule="mse")
    wide = tpu.prepare_rotation(None, jnp.zeros((8, 32, 32)), 256, dtype=jnp.dtype(F32))
    with pytest.raises(ValueError, match="activations are bfloat16, the rotation was prepared for float32"):
        call(jnp.zeros((4, 256), BF16), wide)
    other = tpu.prepare_rotation(None, jnp.zeros((16, 32, 32)), 512)
    with pytest.raises(ValueError, match="activations have 256 features, the rotation 512"):
        call(jnp.zeros((4, 256), BF16), other)
    with pytest.raises(ValueError, match="this rotation mixes 3 of 6"):
        tpu.prepare_rotation(jnp.zeros((2, 3, 3)), None, 192)


@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize("m", [20, pytest.param(200, marks=pytest.mark.extended)])
def test_halves_round_as_whole_numbers_do(rule, m):
    keys = jax.random.split(jax.random.key(1), 3)
    x = (jax.random.normal(keys[0], (m, 512)) * jnp.exp2(jnp.arange(m) % 90.0 - 60)[:, None]).astype(BF16)
    intra = jax.random.normal(keys[1], (16, 32, 32)) / 6
    w = mxfp4.quantize(jax.random.normal(keys[2], (128, 512)), "even")
    y = [
        tpu.rotate_quantize_matmul(
            x,
            layout.to_tpu(w.codes, w.scales),
            tpu.prepare_rotation(None, intra, 512),
            rule=rule,
            tiles=tpu.Tiles(256 if m > 128 else 32, 128, 32, halves=halves),
            interpret=True,
        )
        for halves in (True, False)
    ]
    # The same codes, so the same products, summed in the same order.
    np.testing.assert_array_equal(*y)


@pytest.mark.parametrize("held", [2, 4, 9])
def test_tiles_of_the_weight_go_round_in_places_and_runs(held):
    x, _, _, w = exact_case(5, 256, 1100, None, None, BF16)
    packed = layout.to_tpu(w.codes, w.scales)
    call = functools.partial(tpu.rotate_quantize_matmul, x, packed, rule="even", interpret=True)
    assert tpu.tiles_together(held, 9, 256, 128) == {2: 1, 4: 2, 9: 9}[held]
    got = call(tiles=tpu.Tiles(32, 128, held=held))
    np.testing.assert_array_equal(got, call(tiles=tpu.Tiles(32, 1152)))
