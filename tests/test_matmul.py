"""The linear layer: what rotation and rounding do to a product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import torq_jax
from torq_jax import mxfp4
from torq_jax.errors import TorqError
from torq_jax.matmul import dot, matmul, prepare, select


@pytest.fixture(scope="module")
def operands():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (96, 128)) * jnp.exp(jax.random.normal(keys[1], (128,)))
    return x, jax.random.normal(keys[2], (48, 128)) / 11


@pytest.mark.parametrize("method", torq_jax.METHODS)
def test_rotation_leaves_the_float_product_alone(operands, method):
    x, w = operands
    transform = torq_jax.fit(x, method, weight=w)
    y = matmul(x, torq_jax.fold(w, transform), transform)
    # float32 through two small rotations: about sqrt(3 * 128) units in the last place of the largest terms.
    np.testing.assert_allclose(y, x @ w.T, atol=2e-5 * float(jnp.abs(x @ w.T).max()))


def test_packed_weight_is_its_values(operands):
    x, w = operands
    q = mxfp4.quantize(w, "mse")
    np.testing.assert_array_equal(matmul(x, q), dot(x, mxfp4.dequantize(q)))
    np.testing.assert_array_equal(
        matmul(x, q, activation_scale="even"), dot(mxfp4.quantize_dequantize(x, "even"), mxfp4.dequantize(q))
    )


def test_bfloat16_operands_are_exact_and_accumulate_in_float32(operands):
    x, w = operands
    q = mxfp4.quantize(w, "mse")
    narrow = matmul(x.astype(jnp.bfloat16), q, activation_scale="even")
    wide = matmul(x.astype(jnp.bfloat16).astype(jnp.float32), q, activation_scale="even")
    assert narrow.dtype == jnp.bfloat16
    # Products of two E2M1 values are exact, so only the final rounding to bfloat16 (2**-9 relative) differs,
    # and the order of float32 sums.
    np.testing.assert_allclose(narrow.astype(jnp.float32), wide, rtol=2**-8, atol=1e-4)


def test_features_are_padded_to_whole_blocks():
    x, w = jnp.ones((3, 40)), jnp.ones((5, 40))
    q = mxfp4.quantize(w, "floor", pad=True)
    np.testing.assert_array_equal(matmul(x, q, activation_scale="floor"), jnp.full((3, 5), 40.0))
    transform = torq_jax.fit(jnp.ones((3, 40)), "hadamard")
    assert transform.features == 64 and prepare(x, transform, None).shape == (3, 64)


def test_errors_name_both_values_and_the_remedy(operands):
    x, w = operands
    with pytest.raises(TorqError, match="implementation 'cuda' does not exist: must be one of tpu, xla"):
        matmul(x, w, implementation="cuda")
    with pytest.raises(TorqError, match="activations have 128 features, the weight 64"):
        matmul(x, w[:, :64])
    with pytest.raises(TorqError, match="activations have 64 features, the rotation 128"):
        prepare(x[:, :64], torq_jax.identity(128), None)
    with pytest.raises(TorqError, match="activations have 128 features, the rotation 64"):
        matmul(x, w, torq_jax.identity(64))
    assert select(None) == "xla"


def test_works_under_jit_and_vmap(operands):
    x, w = operands
    transform = torq_jax.fit(x, "torq")
    q = mxfp4.quantize(torq_jax.fold(w, transform), "mse")
    plain = matmul(x, q, transform, activation_scale="even")
    jitted = jax.jit(lambda x, q, t: matmul(x, q, t, activation_scale="even"))(x, q, transform)
    rows = jax.vmap(lambda row: matmul(row, q, transform, activation_scale="even"))(x)
    # One compiled program may sum in another order than the other, and a rotated value that lies on a rounding
    # boundary may then fall on its other side: a few rows may differ, by a step of one element.
    for other in (jitted, rows):
        assert np.mean(np.abs(other - plain) > 1e-4) < 0.02
