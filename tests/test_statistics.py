"""Calibration statistics: they add up, and no token outweighs another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from torq_jax import statistics
from torq_jax.errors import TorqError
from torq_jax.matmul import prepare
from torq_jax.rotation import TwoLevelRotation
from torq_jax.solvers.hadamard import hadamard_matrix


def direct(x):
    """The definition, in float64 numpy."""
    x = np.asarray(x, np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True))
    x = x.reshape(len(x), -1, 32)
    return np.einsum("tbk,tck->kbc", x, x) / len(x)


def test_moments_follow_the_definition():
    x = jax.random.normal(jax.random.key(0), (50, 96)) * jnp.arange(1, 97)
    found = statistics.gather(x)
    assert found.tokens == 50
    # 50 float32 products of order one.
    np.testing.assert_allclose(found.inter, direct(x), atol=2e-5)


def test_two_batches_add_up_to_one():
    x = jax.random.normal(jax.random.key(1), (60, 64))
    both = statistics.add(statistics.gather(x[:20]), statistics.gather(x[20:]))
    whole = statistics.gather(x)
    assert both.tokens == whole.tokens == 60
    np.testing.assert_allclose(both.inter, whole.inter, atol=1e-6)
    np.testing.assert_array_equal(both.samples, whole.samples)


def test_a_loud_token_counts_as_much_as_a_quiet_one():
    x = jax.random.normal(jax.random.key(2), (30, 64))
    np.testing.assert_allclose(
        statistics.gather(x.at[0].mul(1e4)).inter, statistics.gather(x).inter, rtol=1e-4, atol=1e-5
    )


def test_zero_tokens_are_left_out_and_padding_is_zero():
    x = jax.random.normal(jax.random.key(3), (10, 40)).at[4].set(0)
    found = statistics.gather(x)
    assert found.tokens == 9 and found.samples.shape == (10, 64)
    assert not found.samples[:, 40:].any() and not found.samples[4].any()
    assert not found.inter[8:, 1].any()  # positions 8 and above of the second block are padding


def test_sampling_is_reproducible():
    x = jax.random.normal(jax.random.key(4), (100, 32))
    a, b = (statistics.gather(x, samples=7, seed=5, moments="none") for _ in range(2))
    assert a.samples.shape == (7, 32) and not a.inter.any()
    np.testing.assert_array_equal(a.samples, b.samples)


def test_a_pytree():
    found = statistics.gather(jnp.ones((4, 32)))
    leaves, tree = jax.tree.flatten(found)
    assert len(leaves) == 4 and jax.tree.unflatten(tree, leaves).tokens == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_activations_are_an_error(bad):
    with pytest.raises(TorqError, match="activations hold a NaN or an infinity"):
        statistics.gather(jnp.ones((4, 32)).at[1, 3].set(bad))


def test_shapes_are_checked():
    with pytest.raises(TorqError, match=r"activations have shape \(0, 32\)"):
        statistics.gather(jnp.ones((0, 32)))


def test_the_full_moment_follows_the_weights():
    x = jax.random.normal(jax.random.key(6), (40, 64)) * jnp.arange(1, 65)
    weights = jax.random.uniform(jax.random.key(7), (40,))
    found = statistics.gather(x, moments="full", weights=weights)
    exact = np.asarray(x, np.float64)
    exact = exact.T @ (exact * np.asarray(weights, np.float64)[:, None]) / 40
    # 40 float32 products, each rounded to 2**-24 of the largest.
    np.testing.assert_allclose(found.second, exact, atol=1e-6 * exact.max())
    np.testing.assert_allclose(found.inter, direct(x), atol=2e-5)


def test_the_full_moment_of_normalised_tokens_holds_inter():
    x = jax.random.normal(jax.random.key(8), (40, 96))
    found = statistics.gather(x, moments="full")
    np.testing.assert_allclose(found.inter, direct(x), atol=2e-5)
    np.testing.assert_allclose(found.second[1 * 32 + 5, 2 * 32 + 5], found.inter[5, 1, 2], atol=1e-6)
    halves = statistics.add(
        statistics.gather(x[:10], moments="full"), statistics.gather(x[10:], moments="full")
    )
    np.testing.assert_allclose(halves.second, found.second, atol=1e-6)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_weights_must_be_finite_and_not_negative(bad):
    with pytest.raises(TorqError, match="must be finite, none negative"):
        statistics.gather(jnp.ones((3, 32)), moments="full", weights=jnp.array([1.0, bad, 1.0]))


def test_rounded_statistics_are_means_under_the_weights_and_add_up():
    x = jax.random.normal(jax.random.key(5), (50, 64)) * 3
    weights = np.random.default_rng(0).uniform(0, 2, 50).astype(np.float32)
    turn = TwoLevelRotation(None, jnp.asarray(hadamard_matrix(), jnp.float32), 64)
    halves = [
        statistics.gather_rounded(x[a:b], turn, "even", weights=weights[a:b]) for a, b in ((0, 20), (20, 50))
    ]
    found = statistics.add_rounded(*halves)
    exact = np.asarray(prepare(x, turn, None), np.float64)
    rounded = np.asarray(prepare(x, turn, "even"), np.float64)
    share = weights / weights.sum()
    assert found.weight == pytest.approx(weights.sum(), rel=1e-6)
    for name, expected in {
        "cross": exact.T @ (rounded * share[:, None]),
        "second": rounded.T @ (rounded * share[:, None]),
        "exact": share @ exact,
        "rounded": share @ rounded,
    }.items():
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-4, atol=1e-4)


def test_rounded_statistics_weigh_tokens_alike_unless_told_otherwise():
    x = np.random.default_rng(1).standard_normal((40, 32)).astype(np.float32)
    x[0] *= 512  # a power of two: rounds as before, and must not count for more
    small = x.copy()
    small[0] /= 512
    a, b = (statistics.gather_rounded(jnp.asarray(v), None, "even") for v in (x, small))
    np.testing.assert_allclose(a.cross * a.weight, b.cross * b.weight, rtol=1e-4, atol=1e-4)
    with pytest.raises(TorqError, match="NaN or an infinity"):
        statistics.gather_rounded(jnp.full((3, 32), jnp.nan), None, "even")
