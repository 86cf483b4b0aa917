"""The factor of each block: it is the best of those tried, and changes nothing in float."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from torq_jax import mxfp4, prescale, rotation, statistics
from torq_jax.errors import TorqError
from torq_jax.rotation import TwoLevelRotation
from torq_jax.solvers.hadamard import hadamard_matrix


def steady(seed=0, tokens=300, blocks=4):
    """Activations whose largest value hardly varies from token to token; it lies differently in each block."""
    rng = np.random.default_rng(seed)
    levels = 4.2 * 2 ** np.linspace(0, 0.9, blocks)
    signs = rng.choice([-1.0, 1.0], (tokens, blocks, 32))
    x = signs * rng.uniform(0.2, 1.0, (tokens, blocks, 32))
    x[:, :, 0] = signs[:, :, 0] * rng.uniform(0.98, 1.0, (tokens, blocks))
    return (x * levels[:, None]).reshape(tokens, -1).astype(np.float32)


def lost(x, transform, rule="even"):
    """Squared error in the original coordinates, by block; the transform is the same in every block or diagonal."""
    rotated = np.asarray(rotation.rotate(jnp.asarray(x), transform))
    kept = np.asarray(mxfp4.quantize_dequantize(jnp.asarray(rotated), rule))
    back = np.asarray(rotation.inverse(jnp.asarray(kept), transform))
    size = np.mean(x**2, axis=-1, keepdims=True)
    return (np.square(back - x) / size).reshape(len(x), -1, 32).sum(axis=(0, 2))


@pytest.mark.parametrize("rule", mxfp4.SCALE_RULES)
def test_each_block_gets_the_best_factor(rule):
    x = steady()
    found = statistics.gather(jnp.asarray(x))
    eye = TwoLevelRotation(None, np.broadcast_to(np.eye(32), (4, 32, 32)).copy(), 128)
    scaled = prescale.prescale(eye, found, rule)
    f32 = lambda r: dataclasses.replace(r, intra=jnp.asarray(r.intra, jnp.float32))  # noqa: E731
    errors = np.stack(
        [lost(x, f32(dataclasses.replace(eye, intra=eye.intra * f)), rule) for f in prescale.FACTORS]
    )
    np.testing.assert_allclose(lost(x, f32(scaled.rotation), rule), errors.min(axis=0), rtol=1e-4)
    assert scaled.gain_db == pytest.approx(
        10 * np.log10(errors[0].sum() / errors.min(axis=0).sum()), abs=1e-2
    )
    # A steady largest value is what a factor is for: it must be worth something.
    assert scaled.gain_db > 0.3


def test_a_shared_matrix_gets_one_factor_and_the_gain_decides():
    x = steady()
    found = statistics.gather(jnp.asarray(x))
    shared = TwoLevelRotation(None, hadamard_matrix(), 128)
    scaled = prescale.prescale(shared, found, "even")
    assert scaled.rotation.intra.shape == (32, 32) and len(set(scaled.factors.tolist())) == 1
    eye = TwoLevelRotation(None, np.eye(32), 128)
    factors = []
    for block in range(4):  # only this block's error costs anything, so its own best factor wins
        gain = np.zeros(128)
        gain[32 * block : 32 * block + 32] = 1
        factors.append(
            prescale.prescale(eye, dataclasses.replace(found, gain=np.diag(gain)), "even").factors[0]
        )
    every = TwoLevelRotation(None, np.broadcast_to(np.eye(32), (4, 32, 32)).copy(), 128)
    np.testing.assert_array_equal(factors, prescale.prescale(every, found, "even").factors)


def test_errors():
    found = statistics.gather(jnp.asarray(steady()))
    with pytest.raises(TorqError, match="no matrix inside blocks"):
        prescale.prescale(rotation.identity(128), found, "even")
    with pytest.raises(TorqError, match="no sizes"):
        eye = TwoLevelRotation(None, np.eye(32), 128)
        prescale.prescale(eye, dataclasses.replace(found, sizes=None), "even")
