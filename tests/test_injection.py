"""MXFP4 in Flax modules that are not ours."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from torq_jax import mxfp4
from torq_jax.errors import TorqError
from torq_jax.injection import DotGeneral, QuantizedLinear, Rule, quantize_linears

IN, HIDDEN, OUT = 64, 96, 32


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(IN, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, OUT, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


@pytest.fixture(scope="module")
def x():
    """Activations [tokens, IN] with uneven channels."""
    keys = jax.random.split(jax.random.key(3), 2)
    return jax.random.normal(keys[0], (256, IN)) * jnp.exp(jax.random.normal(keys[1], (IN,)))


@pytest.fixture(scope="module")
def model():
    return MLP(nnx.Rngs(0))


def check_product(got, x, kernel, bias=0.0):
    """``got`` is the product of both operands rounded, up to the order of float32 sums."""
    a = np.asarray(mxfp4.quantize_dequantize(x, "even"), np.float64)
    b = np.asarray(mxfp4.quantize_dequantize(kernel.T, "mse"), np.float64).T
    # A sum of n terms (the bias one of them) in float32, in any order, is off by n 2**-24 of the sum of magnitudes.
    bound = (len(b) + 1) * 2**-24 * (np.abs(a) @ np.abs(b) + np.abs(bias))
    assert np.all(np.abs(np.asarray(got, np.float64) - (a @ b + bias)) <= bound)


def relative(got, expected):
    return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("how", [{"dot_general": DotGeneral()}, {"dot_general_cls": DotGeneral}])
def test_linen_dense_multiplies_rounded_operands(x, how):
    dense = linen.Dense(OUT, use_bias=False, **how)
    variables = dense.init(jax.random.key(0), x)
    check_product(jax.jit(dense.apply)(variables, x), x, variables["params"]["kernel"])


def test_nnx_linear_multiplies_rounded_operands(x):
    layer = nnx.Linear(IN, OUT, use_bias=False, dot_general=DotGeneral(), rngs=nnx.Rngs(0))
    check_product(nnx.jit(layer)(x), x, layer.kernel[...])


def test_gradients_pass_the_rounding(x):
    w = jax.random.normal(jax.random.key(1), (IN, OUT))
    dimensions = (((1,), (0,)), ((), ()))
    left, right = jax.grad(lambda x, w: DotGeneral()(x, w, dimensions).sum(), (0, 1))(x, w)
    rounded = [
        mxfp4.quantize_dequantize(a, rule, axis=axis) for a, rule, axis in ((x, "even", 1), (w, "mse", 0))
    ]
    ones = jnp.ones((len(x), OUT))
    np.testing.assert_allclose(left, ones @ rounded[1].T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(right, rounded[0].T @ ones, rtol=1e-5, atol=1e-3)


def test_bad_products_are_told():
    a = jnp.ones((4, 2, 32))
    with pytest.raises(TorqError, match="one axis"):
        DotGeneral()(a, a, (((1, 2), (1, 2)), ((), ())))
    with pytest.raises(TorqError, match="40"):
        DotGeneral()(jnp.ones((2, 40)), jnp.ones((40, 2)), (((1,), (0,)), ((), ())))
    assert DotGeneral(pad=True)(jnp.ones((2, 40)), jnp.ones((40, 2)), (((1,), (0,)), ((), ())))[0, 0] == 40
    with pytest.raises(TorqError, match="best"):
        DotGeneral(weight_scale="best")


def test_rules_choose_layers_and_leave_the_model_alone(model, x):
    before = model(x)
    quantised = quantize_linears(model, [Rule("up", method="none")], x)
    assert type(quantised.up) is QuantizedLinear and type(quantised.down) is nnx.Linear
    assert type(model.up) is nnx.Linear
    np.testing.assert_array_equal(model(x), before)
    expected = mxfp4.quantize(model.up.kernel[...].T, "mse")
    np.testing.assert_array_equal(quantised.up.weight.codes, expected.codes)
    np.testing.assert_array_equal(quantised.up.weight.scales, expected.scales)
    check_product(quantised.up(x), x, model.up.kernel[...], np.asarray(model.up.bias[...], np.float64))


def test_a_rotation_and_gptq_each_lower_the_error(model, x):
    exact = model(x)
    errors = [
        relative(nnx.jit(quantize_linears(model, [Rule(".*", method=m, rounding=r)], x))(x), exact)
        for m, r in (("none", "nearest"), ("two_level", "nearest"), ("two_level", "gptq"))
    ]
    assert errors[0] > errors[1] > errors[2] > 0, errors


class Transformer(nnx.Module):
    """A block of Flax's own attention, as its examples build their models."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(IN, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, IN, decode=False, rngs=rngs)
        self.mlp = MLP(rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + jnp.tile(self.mlp(x), 2)


def test_attention_of_flax_itself(x):
    block, batch = Transformer(nnx.Rngs(0)), x.reshape(8, 32, IN)
    exact = block(batch)
    plain, turned = (
        quantize_linears(block, [Rule(".*", method=method, activation_scale=None)], batch)
        for method in ("none", "hadamard")
    )
    for name, outputs in (("query", (4, 16)), ("key", (4, 16)), ("value", (4, 16)), ("out", (IN,))):
        layer = getattr(plain.attention, name)
        assert type(layer) is QuantizedLinear
        kernel = getattr(block.attention, name).kernel[...].reshape(IN, -1)
        np.testing.assert_array_equal(layer.weight.codes, mxfp4.quantize(kernel.T, "mse").codes)
        given = batch.reshape(8, 32, 4, 16) if name == "out" else batch
        bias = getattr(block.attention, name).bias[...]
        got = layer(given)
        assert got.shape == (8, 32, *outputs)
        expected = batch @ mxfp4.quantize_dequantize(kernel.T, "mse").T + bias.reshape(-1)
        np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=1e-5, atol=2e-5)
    # Normal weights lose 0.11 of their norm in the cast, in two products one after the other; the residual stream
    # passes both by.
    for model in (plain, turned):
        assert 0 < relative(nnx.jit(model)(batch), exact) < 0.22
    with pytest.raises(TorqError, match="out_sharding is not heeded"):
        plain.mlp.up(batch, out_sharding="data")
    with pytest.raises(TorqError, match=r"shape \(8, 32, 16\) have no axes \(-1,\) of \(64,\) features"):
        plain.mlp.up(batch[..., :16])
    with pytest.raises(TorqError, match="batch axes"):
        layer = nnx.LinearGeneral(IN, 32, batch_axis={0: 8}, rngs=nnx.Rngs(0))
        quantize_linears(nnx.Sequential(layer), [Rule(".*")], batch)


def test_a_linen_mlp_takes_the_product_everywhere(x):
    class LinenMLP(linen.Module):
        dot_general: object = jax.lax.dot_general

        @linen.compact
        def __call__(self, x):
            x = linen.gelu(linen.Dense(HIDDEN, dot_general=self.dot_general)(x))
            return linen.Dense(OUT, dot_general=self.dot_general)(x)

    variables = LinenMLP().init(jax.random.key(0), x)
    exact, plain = LinenMLP().apply(variables, x), LinenMLP(DotGeneral(None, None)).apply(variables, x)
    np.testing.assert_array_equal(plain, exact)
    # Both operands of two products are off by about a tenth each.
    assert 0.05 < relative(jax.jit(LinenMLP(DotGeneral()).apply)(variables, x), exact) < 0.3


def test_a_quantised_model_splits_and_merges(model, x):
    quantised = quantize_linears(model, [Rule(".*", method="hadamard")], x)
    again = nnx.merge(*nnx.split(quantised))
    np.testing.assert_array_equal(again(x), quantised(x))


def test_bad_rules_are_told(model, x):
    with pytest.raises(TorqError, match=r"matches no linear layer: there are down, up"):
        quantize_linears(model, [Rule("gate")], x)
    with pytest.raises(TorqError, match="no rules"):
        quantize_linears(model, [], x)
    with pytest.raises(TorqError, match="regular expression"):
        Rule("(")
    with pytest.raises(TorqError, match="unknown method"):
        Rule(".*", method="spin")
    with pytest.raises(TorqError, match=r"up: .*NaN"):
        quantize_linears(model, [Rule("up")], x.at[0, 0].set(jnp.nan))
    with pytest.raises(TorqError, match="inside jit"):
        jax.jit(functools.partial(quantize_linears, model, [Rule("up")]))(x)


def test_qwix_rounds_to_the_same_values():
    """qwix's scale rule is our "ceil"; see goldens/make_qwix_golden.py."""
    golden = np.load(Path(__file__).parent / "goldens" / "qwix.npz")
    x, w, left, right = (golden[name] for name in ("x", "w", "left", "right"))
    np.testing.assert_array_equal(mxfp4.quantize_dequantize(x, "ceil"), left)
    np.testing.assert_array_equal(mxfp4.quantize_dequantize(w, "ceil", axis=0), right)
    y = DotGeneral("ceil", "ceil")(jnp.asarray(x), jnp.asarray(w), (((1,), (0,)), ((), ())))
    bound = (
        96 * 2**-24 * (np.abs(left) @ np.abs(right)) * 1.001
    )  # as in check_product; the bound is in float32
    assert np.all(np.abs(y - left.astype(np.float64) @ right) <= bound)
