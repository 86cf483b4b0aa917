"""The portable GPU kernels in Pallas's interpretation: codes bit by bit, products, special values, errors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import torq_jax
from pallas_kernels import elements, layout, portable, reference
from torq_jax import mxfp4, tpu
from torq_jax.errors import TorqError
from torq_jax.matmul import matmul

BF16, F32 = jnp.bfloat16, jnp.float32


def exact_case(m, k, n, inter, intra, dtype, seed=0):
    """Integers and matrices of few quarters: float32 sums are exact in any order, so results are equal bit by bit."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.integers(-40, 41, (m, k)), dtype)

    def matrix(shape):
        if shape is None:
            return None
        few = rng.random(shape) < min(1, 4 / shape[-1])
        return jnp.asarray(rng.integers(-2, 3, shape) / 4 * few, F32)

    w = rng.standard_normal((n, k)) * np.exp(rng.standard_normal((n, 1)))
    return x, matrix(inter), matrix(intra), mxfp4.quantize(w.astype(np.float32), "even")


# m, k, n, inter, intra, rule, dtype
CASES = [
    (1, 96, 40, None, (32, 32), "even", BF16),
    (2, 256, 208, (8, 8), (32, 32), "floor", BF16),
    (3, 576, 200, (32, 9, 2, 2), (18, 32, 32), "ceil", BF16),
    (3, 288, 64, (32, 9, 9), None, "even", BF16),
    (17, 512, 256, (32, 1, 16, 16), (16, 32, 32), "even", F32),
    pytest.param(*(40, 1024, 128, (32, 1, 32, 32), (32, 32, 32), "even", BF16), marks=pytest.mark.extended),
    (70, 192, 64, (2, 3, 3), (32, 32), None, BF16),
    (5, 256, 128, (32, 8, 1, 1), None, None, F32),
    (5, 96, 16, None, None, None, BF16),
]


@pytest.mark.parametrize("m, k, n, inter, intra, rule, dtype", CASES)
def test_codes_and_products_equal_the_reference(m, k, n, inter, intra, rule, dtype):
    x, inter, intra, w = exact_case(m, k, n, inter, intra, dtype)
    check_product(
        lambda rule: portable.rotate_quantize_matmul(
            x, inter, intra, w.codes, w.scales, rule=rule, interpret=True
        ),
        x,
        inter,
        intra,
        w,
        rule,
    )
    if rule is not None and dtype == BF16:
        check_codes(
            portable.rotate_quantize(x, inter, intra, rule=rule, interpret=True), x, inter, intra, rule
        )


def check_codes(got, x, inter, intra, rule):
    want = mxfp4.quantize(reference.rotate(x, inter, intra), rule)
    np.testing.assert_array_equal(got[0], want.codes)
    np.testing.assert_array_equal(got[1], want.scales)


def check_product(run, x, inter, intra, w, rule):
    """A product against the reference, within the error of float32 sums.

    Rounded operands' products are exact in both: E2M1 has two significant bits. With activations in float, bfloat16
    by E2M1 is exact, too, and float32 by E2M1 is rounded once. k float32 sums in another order differ by k units in
    the last place of the sum of magnitudes at most, and the result is rounded once to its dtype.
    """
    z = reference.rotate(x, inter, intra)
    rounded = z.astype(x.dtype) if rule is None else mxfp4.quantize_dequantize(z, rule)
    want = reference.multiply(rounded, mxfp4.dequantize(w))
    size = reference.multiply(jnp.abs(rounded), jnp.abs(mxfp4.dequantize(w)))
    bound = (x.shape[1] + 1) * 2.0**-24 * size + jnp.finfo(x.dtype).eps / 2 * jnp.abs(want)
    got = run(rule)
    assert got.dtype == x.dtype and got.shape == want.shape
    assert bool((jnp.abs(got.astype(F32) - want) <= bound * (1 + 2**-6)).all())


@pytest.mark.parametrize("rule", reference.RULES)
def test_elements_are_those_of_mxfp4_for_every_kind_of_pattern(rule):
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 2**32, (3000, 32), dtype=np.uint32)
    pattern[:500] = (pattern[:500] & 0x80FFFFFF) | (rng.integers(0, 6, (500, 1)) << 23).astype(np.uint32)
    pattern[500:1000] &= 0x81FFFFFF  # subnormal
    near = (rng.integers(100, 104, (1000, 32)) << 23).astype(np.uint32)
    pattern[1000:2000] = (pattern[1000:2000] & 0x80E00000) | near  # ties
    pattern[2000:2010] &= 0x80000000  # zeros of either sign
    pattern[2010:2020, 1:] &= 0x80000007  # beside one of another size
    x = jnp.asarray(pattern.view(np.float32))
    want = mxfp4.quantize(x, rule)
    amax = (elements.bits(x) & 0x7FFFFFFF).max(-1)
    scale = elements.scale_code(amax, rule)
    code = elements.encode(x, scale[:, None], amax[:, None])
    np.testing.assert_array_equal(scale, want.scales[:, 0])
    np.testing.assert_array_equal(code, mxfp4.unpack(want.codes))
    value, expected = elements.decode(code, scale[:, None]), mxfp4.dequantize(want)
    np.testing.assert_array_equal(np.isnan(value), np.isnan(expected))
    finite = np.isfinite(np.asarray(expected))
    np.testing.assert_array_equal(
        np.asarray(value).view(np.int32)[finite], np.asarray(expected).view(np.int32)[finite]
    )


def test_bfloat16_on_patterns_is_the_cast():
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    z = np.concatenate([upper | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        want = z.astype(ml_dtypes.bfloat16).astype(np.float32)
    got = np.asarray(jax.jit(elements.as_bfloat16)(z))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    number = ~np.isnan(want)
    np.testing.assert_array_equal(got[number].view(np.uint32), want[number].view(np.uint32))


def test_quick_decoding_is_exact_for_every_code_and_scale():
    code, scale = jnp.arange(16)[None], jnp.arange(256)[:, None]
    quick = np.asarray(elements.decode_quickly(code, elements.scale_value(scale)))
    exact = np.asarray(elements.decode(code, scale))
    np.testing.assert_array_equal(quick[2:], exact[2:])
    # Below lie subnormal numbers, which this device may flush, up to 6 times 2**-127.
    assert (np.abs(quick[:2] - exact[:2]) < 2.0**-124).all()


def test_random_data_differs_at_rounding_boundaries_only():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (16, 512), BF16)
    inter = jax.random.normal(keys[1], (32, 4, 4, 4)) / 2
    intra = jax.random.normal(keys[2], (16, 32, 32)) / 6
    z = reference.rotate(x, inter, intra)
    codes, scales = portable.rotate_quantize(x, inter, intra, rule="even", interpret=True)
    got = np.asarray(mxfp4.dequantize(mxfp4.MXFP4Array(codes, scales, 512, -1)))
    want = np.asarray(mxfp4.quantize_dequantize(z, "even"))
    different = got != want
    # A sum in another order may round to the neighbouring bfloat16 between the stages, 2**-8 of one of 32 summands;
    # where it matters, the reference's value moved by that much must be able to take the other code, too.
    moved = np.broadcast_to(2.0**-8 * np.abs(z).max(-1, keepdims=True), got.shape)
    assert different.mean() < 1e-3
    assert (np.abs(np.asarray(z) - (got + want) / 2)[different] <= moved[different]).all()


@pytest.mark.parametrize("m, k, inter", [(5, 1024, (32, 2, 16, 16)), (140, 512, None), (3, 96, (3, 3))])
def test_swizzled_scales_and_codes_are_those_of_the_layout(m, k, inter):
    x, inter, intra, _ = exact_case(m, k, 8, inter, (32, 32), BF16)
    got = portable.rotate_quantize_swizzled(x, inter, intra, rule="even", interpret=True)
    want = mxfp4.quantize(reference.rotate(x, inter, intra), "even")
    more = -m % 128, -k % 256
    codes = np.pad(want.codes, ((0, more[0]), (0, more[1] // 2)))
    scales = np.pad(want.scales, ((0, more[0]), (0, more[1] // 32)))
    np.testing.assert_array_equal(got[0], codes)
    np.testing.assert_array_equal(got[1], layout.swizzle_scales(jnp.asarray(scales)))


def test_special_values_stay_in_their_row():
    x, inter, intra, w = exact_case(20, 256, 64, (32, 2, 4, 4), (8, 32, 32), BF16)
    x = x.at[3, 7].set(jnp.nan).at[6, 200].set(jnp.inf).at[9].set(0)
    call = lambda x: np.asarray(  # noqa: E731
        portable.rotate_quantize_matmul(x, inter, intra, w.codes, w.scales, rule="even", interpret=True),
        np.float32,
    )
    y, clean = call(x), call(jnp.where(jnp.isfinite(x), x, 0))
    broken = np.isin(np.arange(20), (3, 6))
    assert np.isnan(y[broken]).all()
    np.testing.assert_array_equal(y[~broken], clean[~broken])
    assert not y[9].any()


def test_errors_name_what_is_wrong():
    codes, scales = jnp.zeros((64, 128), jnp.uint8), jnp.zeros((64, 8), jnp.uint8)
    call = lambda x, inter=None, intra=None, rule="even": portable.rotate_quantize_matmul(  # noqa: E731
        x, inter, intra, codes, scales, rule=rule, interpret=True
    )
    good = jnp.zeros((4, 256), BF16)
    with pytest.raises(ValueError, match="activations are float16: must be bfloat16 or float32"):
        call(good.astype(jnp.float16))
    with pytest.raises(
        ValueError, match=r"512 features; codes are uint8 \(64, 128\), .* must be uint8 \[N, 256\]"
    ):
        call(jnp.zeros((4, 512), BF16))
    with pytest.raises(ValueError, match="activations have 40 features: must be a multiple of 32"):
        call(jnp.zeros((4, 40), BF16))
    with pytest.raises(ValueError, match="'mse' cannot run in one pass: must be one of floor, ceil, even"):
        call(good, rule="mse")
    with pytest.raises(
        ValueError, match=r"inter has shape \(3, 3\), which 256 features \(8 blocks\) do not fit"
    ):
        call(good, inter=jnp.zeros((3, 3)))
    with pytest.raises(
        ValueError, match=r"intra has shape \(4, 32, 32\): must be \[32, 32\] or \[8, 32, 32\]"
    ):
        call(good, intra=jnp.zeros((4, 32, 32)))
    with pytest.raises(ValueError, match=r"shape \(0, 256\): must be \[M, K\] with M at least 1"):
        call(jnp.zeros((0, 256), BF16))


@pytest.mark.parametrize("features, group", [pytest.param(192, 3, marks=pytest.mark.extended), (256, 4)])
def test_matmul_runs_on_them_by_name(features, group):
    keys = jax.random.split(jax.random.key(5), 3)
    x = jax.random.normal(keys[0], (2, 9, features - 5)) * jnp.exp(
        jax.random.normal(keys[1], (features - 5,))
    )
    w = jnp.pad(jax.random.normal(keys[2], (40, features - 5)), ((0, 0), (0, 5)))
    blocks = features // 32
    orthogonal = lambda key, *shape: jnp.linalg.qr(jax.random.normal(key, shape))[0]  # noqa: E731
    transform = torq_jax.TwoLevelRotation(
        orthogonal(keys[1], 32, blocks // group, group, group), orthogonal(keys[2], blocks, 32, 32), features
    )
    weight = mxfp4.quantize(torq_jax.fold(w, transform), "mse")
    run = lambda name: matmul(x, weight, transform, activation_scale="even", implementation=name)  # noqa: E731
    got, want = run("portable_interpret"), run("xla")
    assert got.shape == (2, 9, 40) and got.dtype == x.dtype
    # float32: the same codes, but where a sum of another order crosses a rounding boundary, a few of 18 rows at most;
    # then products summed in another order.
    close = np.isclose(got, want, rtol=1e-4, atol=1e-5 * float(jnp.abs(want).max())).all(-1)
    assert close.mean() >= 16 / 18, close


def test_matmul_refuses_what_they_cannot_run():
    weight = mxfp4.quantize(jnp.ones((8, 64)), "mse")
    x = jnp.ones((2, 64))
    with pytest.raises(TorqError, match="implementation 'portable' needs a GPU, the backend is cpu"):
        matmul(x, weight, implementation="portable")
    with pytest.raises(TorqError, match="the kernels cannot apply scale rule 'mse' in one pass"):
        matmul(x, weight, activation_scale="mse", implementation="portable_interpret")
    with pytest.raises(TorqError, match="activations have 128 features, the weight 64"):
        matmul(jnp.ones((2, 128)), weight, implementation="portable_interpret")
    with pytest.raises(
        TorqError, match="packed for the TPU kernels: implementation 'portable_interpret' needs"
    ):
        matmul(x, tpu.pack(weight, dtype=jnp.float32), implementation="portable_interpret")
