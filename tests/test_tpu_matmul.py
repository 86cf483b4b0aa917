"""``torq_jax.matmul`` on the TPU kernels, in Pallas's interpretation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import torq_jax
from pallas_kernels import reference
from torq_jax import mxfp4, mxfp8, tpu
from torq_jax.errors import TorqError
from torq_jax.matmul import matmul, select


def site(features: int, outs: tuple[int, ...], method: str, **options):
    keys = jax.random.split(jax.random.key(3), 2 + len(outs))
    x = jax.random.normal(keys[0], (2, 9, features)) * jnp.exp(jax.random.normal(keys[1], (features,)))
    weights = [jax.random.normal(k, (out, features)) for k, out in zip(keys[2:], outs, strict=True)]
    transform = torq_jax.fit(x.reshape(-1, features), method, weight=jnp.concatenate(weights), **options)
    packed = [mxfp4.quantize(torq_jax.fold(w, transform), "mse") for w in weights]
    return x.astype(jnp.bfloat16), packed, transform


def expected(x, weights, transform, rule):
    z = reference.rotate(x.reshape(-1, x.shape[-1]), transform.inter, transform.intra)
    z = mxfp4.quantize_dequantize(z, rule)
    wanted = [reference.multiply(z, mxfp4.dequantize(w)) for w in weights]
    return jnp.concatenate(wanted, -1).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize(
    "method, options",
    [pytest.param("two_level", {"group": 4}, marks=pytest.mark.extended), ("torq", {}), ("hadamard", {})],
)
def test_a_site_runs_in_one_call(method, options):
    x, weights, transform = site(256, (96, 64), method, **options)
    linear = tpu.pack(weights, transform)
    y = matmul(x, linear, activation_scale="even", implementation="tpu_interpret")
    want = expected(x, weights, transform, "even")
    assert y.shape == (2, 9, 160) and y.dtype == jnp.bfloat16
    # The same codes but where a float32 sum of another order crosses a rounding boundary: one element of a row
    # then differs by a step. The rest differs by the rounding of the result to bfloat16, 2**-9 of it.
    close = np.abs(y.astype(jnp.float32) - want) <= 2**-8 * np.abs(want) + 1e-5 * float(jnp.abs(want).max())
    rows = close.all(-1)
    assert rows.mean() >= 16 / 18, f"{(~rows).sum()} of {rows.size} rows differ"


def test_agrees_with_xla_up_to_the_rounding_between_the_stages():
    x, weights, transform = site(256, (96,), "two_level", group=4)
    kernel = matmul(x, weights[0], transform, activation_scale="even", implementation="tpu_interpret")
    plain = matmul(x, weights[0], transform, activation_scale="even", implementation="xla")
    # bfloat16 between the stages moves a value by 2**-9 of it; where that crosses a rounding boundary (an element in
    # a hundred or so), it moves by a step of a quarter to a half. Together a few per cent of an output's size.
    error = jnp.linalg.norm((kernel - plain).astype(jnp.float32)) / jnp.linalg.norm(plain.astype(jnp.float32))
    assert error < 0.03, error


def test_groups_that_are_no_power_of_two_run_between_blocks_by_xla():
    x, weights, transform = site(192, (64,), "two_level", group=3)
    linear = tpu.pack(weights, transform)
    assert linear.before is not None and linear.rotation.inter is None
    y = matmul(x, linear, activation_scale="even", implementation="tpu_interpret").astype(jnp.float32)
    want = expected(x, weights, transform, "even")
    assert float(jnp.linalg.norm(y - want) / jnp.linalg.norm(want)) < 0.02


def test_works_under_jit_with_weights_as_arguments():
    x, weights, transform = site(128, (64,), "wush")
    linear = tpu.pack(weights, transform)
    run = jax.jit(lambda x, w: matmul(x, w, activation_scale="even", implementation="tpu_interpret"))
    np.testing.assert_array_equal(
        run(x, linear), matmul(x, linear, activation_scale="even", implementation="tpu_interpret")
    )


def test_what_cannot_run_says_why():
    x, weights, transform = site(128, (64,), "wush")
    linear = tpu.pack(weights, transform)
    with pytest.raises(TorqError, match="'tpu' needs a TPU, the backend is cpu"):
        matmul(x, weights[0], implementation="tpu")
    with pytest.raises(TorqError, match="packed for a TPU, and the backend is cpu"):
        matmul(x, linear)
    with pytest.raises(TorqError, match="'xla' needs the MXFP4Array"):
        matmul(x, linear, implementation="xla")
    with pytest.raises(TorqError, match="has its rotation in it"):
        matmul(x, linear, transform, implementation="tpu_interpret")
    with pytest.raises(TorqError, match="multiply MXFP4 weights, not MXFP8Array"):
        matmul(x, mxfp8.quantize(jnp.ones((4, 128)), "ceil"), implementation="tpu_interpret")
    with pytest.raises(TorqError, match="cannot apply scale rule 'mse'"):
        matmul(x, linear, activation_scale="mse", implementation="tpu_interpret")
    with pytest.raises(TorqError, match="round activations to mxfp4, not mxfp8"):
        matmul(x, linear, activation_scale="ceil", activation_format="mxfp8", implementation="tpu_interpret")
    with pytest.raises(TorqError, match="activations have 96 features, the weight 128"):
        matmul(x[..., :96], linear, implementation="tpu_interpret")
    with pytest.raises(TorqError, match="cannot stand side by side"):
        tpu.pack([weights[0], mxfp4.quantize(jnp.ones((4, 64)), "even")])
    with pytest.raises(TorqError, match="float16 cannot run on the TPU kernels"):
        tpu.pack(weights, dtype=jnp.float16)
    assert select(None) == "xla"
