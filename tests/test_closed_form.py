"""Solvers in closed form: what the formulas promise, in moments and through the real format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torq_jax import mxfp4, solvers, statistics
from torq_jax.errors import TorqError
from torq_jax.rotation import fold, orthogonality_error, rotate
from torq_jax.solvers import full_hadamard, two_level, wush


def data(features=128, outputs=192, tokens=1024, seed=0):
    """Correlated activations of very different energies, and a weight."""
    rng = np.random.default_rng(seed)
    mix = np.eye(features) + rng.standard_normal((features, features)) / np.sqrt(features)
    x = rng.standard_normal((tokens, features)) * np.exp(rng.standard_normal(features)) @ mix
    w = rng.standard_normal((outputs, features)) * np.exp(0.5 * rng.standard_normal(features))
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


def output_error(x, w, transform):
    y = x @ w.T
    rounded = mxfp4.quantize_dequantize(rotate(x, transform), "even") @ fold(w, transform).T
    return float(jnp.sum((rounded - y) ** 2) / jnp.sum(y**2))


def test_wush_attains_the_nuclear_norm():
    rng = np.random.default_rng(0)
    half = rng.standard_normal((2, 5, 32, 32))
    s, g = half @ half.mT
    found = wush.block_transforms(s, g, ridge=1e-12)
    root = wush._root(g) @ wush._root(s)
    bound = np.sum(np.linalg.svd(root, compute_uv=False).sum(-1) ** 2) / 32
    # Moments of condition 1e4 or so, inverted in float64.
    assert wush.modelled_error(s, g, found) == pytest.approx(bound, rel=1e-6)
    assert bound < wush.modelled_error(s, g)


def test_each_stage_pays_through_the_real_format():
    x, w = data()
    errors = {m: output_error(x, w, solvers.fit(x, m, weight=w)) for m in ("hadamard", "wush", "two_level")}
    assert errors["wush"] < 0.85 * errors["hadamard"]
    assert errors["two_level"] < errors["wush"]


@pytest.mark.parametrize("method", ["random", "full_hadamard", "wush", "two_level"])
def test_the_float_product_is_unchanged(method):
    x, w = data()
    transform = solvers.fit(x, method, weight=w)  # bfloat16, as stored
    y = x @ w.T
    # Float32 sums of 128 products, times the transform's condition number of at most a few hundred.
    assert float(jnp.abs(rotate(x, transform) @ fold(w, transform).T - y).max()) < 1e-4 * float(
        jnp.abs(y).max()
    )


@pytest.mark.parametrize("method", ["random", "full_hadamard"])
@settings(max_examples=10, deadline=None)
@given(blocks=st.integers(1, 24), seed=st.integers(0, 2**31))
def test_baselines_are_orthogonal(method, blocks, seed):
    found = statistics.gather(jnp.ones((2, 32 * blocks)), moments="none")
    rotation = solvers.solve(method, found, seed=seed).rotation
    assert orthogonality_error(rotation) < 1e-12 * 32 * blocks


@pytest.mark.parametrize("blocks", [1, 2, 12, 16, 18, 24, 48])
def test_the_full_hadamard_spreads_every_block_over_all(blocks):
    matrix, kind = full_hadamard.across_blocks(blocks, 0)
    if kind.startswith("Hadamard"):
        np.testing.assert_allclose(np.abs(matrix), 1 / np.sqrt(blocks), rtol=1e-12)
    else:
        assert np.abs(matrix).max() < 0.9


def test_the_gradient_is_that_of_the_objective():
    x, w = data(64, 64, 256)
    s = jnp.asarray(two_level.groups(np.asarray(x.T @ x), 2))
    g = jnp.asarray(two_level.groups(np.asarray(w.T @ w), 2))
    direction = jax.random.normal(jax.random.key(0), (32, 1, 2, 2))

    def loss(t):
        mixed = jnp.eye(2) + t * direction
        dual = jnp.linalg.inv(mixed).mT
        return jnp.log(two_level.error(two_level.mix(s, mixed), two_level.mix(g, dual), "nuclear"))

    with jax.default_matmul_precision("highest"):
        slope = jax.grad(loss)(0.1)
        step = 1e-2
        difference = (loss(0.1 + step) - loss(0.1 - step)) / (2 * step)
    # Central difference: its error is a third derivative's, times 1e-4 / 6.
    assert float(slope) == pytest.approx(float(difference), rel=0.02)


@pytest.mark.parametrize("kind", ["general", "orthogonal"])
def test_the_macro_stage_never_raises_its_objective(kind):
    x, w = data()
    found = statistics.gather(x, moments="full")
    gathered = statistics.SiteStatistics(
        found.tokens, found.inter, found.samples, found.second, np.asarray(w.T @ w), 192
    )
    solution = solvers.solve("two_level", gathered, macro=kind, group=4, steps=30)
    assert solution.report["macro_gain_db"] > 0.05
    assert solution.rotation.inter.shape == (32, 1, 4, 4)
    again = solvers.solve("two_level", gathered, macro=kind, group=4, steps=30)
    np.testing.assert_array_equal(solution.rotation.inter, again.rotation.inter)
    if kind == "orthogonal":
        gram = solution.rotation.inter.mT @ solution.rotation.inter
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(4), gram.shape), atol=1e-12)


def test_orthogonal_only_is_two_rotations():
    x, w = data()
    transform = solvers.fit(x, "two_level", weight=w, orthogonal_only=True, budget=1.0, dtype=jnp.float32)
    assert orthogonality_error(transform) < 1e-5
    assert output_error(x, w, transform) < output_error(x, w, solvers.fit(x, "hadamard"))


def test_groups_keep_to_the_budget():
    # 4.25-bit weights: of a 4096 x 4096 site 5 % is 0.05 * 4096 * 17 / 64 = 54 blocks; 32 is the divisor below.
    assert two_level.group_size(128, 4096, 0.05) == 32
    assert two_level.group_size(448, 4096, 0.05) == 32
    assert two_level.group_size(18, 960, 0.05) == 9
    assert two_level.group_size(18, 60, 0.05) == 1
    assert two_level.group_size(18, None, 0.05) == 18


def test_always_zero_blocks_do_no_harm():
    x, w = data()
    x = x.at[:, 32:64].set(0)
    transform = solvers.fit(x, "two_level", weight=w)
    assert np.isfinite(np.asarray(transform.intra, np.float32)).all()
    assert output_error(x, w, transform) < 0.02


def test_errors():
    x, w = data()
    with pytest.raises(TorqError, match="weight="):
        solvers.fit(x, "wush")
    with pytest.raises(TorqError, match=r"weight has shape \(192, 96\)"):
        solvers.fit(x, "wush", weight=w[:, :96])
    for options in ({"macro": "all"}, {"steps": 0}, {"group": 3}, {"budget": -1.0}):
        with pytest.raises(TorqError):
            solvers.fit(x, "two_level", weight=w, **options)
