"""Gradients pass the casts: those of the same computation with the rounded values in the place of the operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import torq_jax
from torq_jax import mxfp4, mxfp8
from torq_jax.rotation import TwoLevelRotation, rotate

KEYS = jax.random.split(jax.random.key(0), 4)
X, W = jax.random.normal(KEYS[0], (5, 64)), jax.random.normal(KEYS[1], (7, 64))


@pytest.mark.parametrize(("codec", "rule"), [(mxfp4, "even"), (mxfp4, "mse"), (mxfp8, "ceil")])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_derivative_of_a_cast_is_one(codec, rule, dtype):
    x = (1e3 * X).astype(dtype).at[0, 0].set(jnp.inf)  # a block that is no number, too
    y, pull = jax.vjp(lambda x: codec.quantize_dequantize(x, rule), x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(*(a.astype(jnp.float32) for a in (y, codec.quantize_dequantize(x, rule))))
    np.testing.assert_array_equal(pull(jnp.ones_like(y))[0], jnp.ones_like(x))
    short = lambda x: codec.quantize_dequantize(x, rule, axis=0, pad=True)  # noqa: E731
    tangent = jnp.full_like(x, 2)
    np.testing.assert_array_equal(jax.jvp(jax.jit(jax.vmap(short, 1, 1)), (x,), (tangent,))[1], tangent)


def test_matmul():
    transform = TwoLevelRotation(
        jax.random.normal(KEYS[2], (2, 2)), jax.random.normal(KEYS[3], (2, 32, 32)), 64
    )
    cotangent = jnp.arange(35.0).reshape(5, 7)

    def loss(x, w, transform):
        w = mxfp4.quantize_dequantize(w, "mse")
        return jnp.vdot(torq_jax.matmul(x, w, transform, activation_scale="even"), cotangent)

    def plain(x, w, transform):
        return jnp.vdot(rotate(x, transform) @ w.T, cotangent)

    dx, dw, dt = jax.grad(loss, (0, 1, 2))(X, W, transform)
    rounded = mxfp4.quantize_dequantize(W, "mse")
    turned = mxfp4.quantize_dequantize(rotate(X, transform), "even")
    ex, _, et = jax.grad(plain, (0, 1, 2))(X, rounded, transform)

    def close(found, expected):
        # Sums of at most 64 float32 products in another order.
        bound = 64 * 2**-24
        np.testing.assert_allclose(found, expected, rtol=bound, atol=bound * float(jnp.abs(expected).max()))

    close(dx, ex)
    close(dw, cotangent.T @ turned)
    jax.tree.map(close, dt, et)
    packed = mxfp4.quantize(W, "mse")
    given = jax.grad(
        lambda x: jnp.vdot(torq_jax.matmul(x, packed, transform, activation_scale="even"), cotangent)
    )(X)
    # Rounded operands are multiplied in bfloat16, and the cotangent of these products is rounded to it.
    np.testing.assert_allclose(given, ex, rtol=0, atol=2**-7 * float(jnp.abs(ex).max()))
