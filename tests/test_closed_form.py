"""Solvers in closed form: what the formulas promise, in moments and through the real format."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
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


@pytest.mark.parametrize("blocks", [1, 2, 12, 16, 18, 20, 28, 40, 48, 448])
def test_the_full_hadamard_spreads_every_block_over_all(blocks):
    matrix, kind = full_hadamard.across_blocks(blocks, 0)
    if kind.startswith("Hadamard"):
        np.testing.assert_allclose(np.abs(matrix), 1 / np.sqrt(blocks), rtol=1e-12)
    else:
        assert np.abs(matrix).max() < 0.9


def nuclear(s, g):
    """The objective from the definition, in float64."""
    values = np.linalg.svd(
        wush._root(wush.ridged(g, 1e-4)) @ wush._root(wush.ridged(s, 1e-4)), compute_uv=False
    )
    return float((values.sum(-1) ** 2).sum() / 32)


def blocks_of(moment, size):
    return two_level.mixed_blocks(np.asarray(moment, np.float64), np.tile(np.eye(size), (32, 1, 1, 1)), size)


def test_the_objective_and_its_gradient_are_those_of_the_definition():
    """No derivative of a factorisation is taken: the best transform is held while its traces are derived."""
    x, w = data(64, 64, 256)
    moments = np.asarray(x.T @ x), np.asarray(w.T @ w)
    s, g = (jnp.asarray(two_level.groups(m, 2)) for m in moments)
    start, direction = 0.1 * np.random.default_rng(0).standard_normal((2, 32, 1, 2, 2))

    @jax.jit
    @jax.value_and_grad
    def loss(t):
        a = start + t * direction
        mixed, dual = two_level.exponential(a), two_level.exponential(-a).mT
        return jnp.log(two_level.error(two_level.mix(s, mixed), two_level.mix(g, dual), "nuclear"))

    def exact(t):
        mixed = scipy.linalg.expm(start + t * direction)
        dual = np.linalg.inv(mixed).mT
        return np.log(
            nuclear(two_level.mixed_blocks(moments[0], mixed, 2), two_level.mixed_blocks(moments[1], dual, 2))
        )

    with jax.default_matmul_precision("highest"):
        value, slope = loss(0.0)
    # The moments of a block are of condition 1e4 (the ridge) at most, a float32 root of their product good to
    # 1e-7 * 1e4 of its smallest values and to far less of their sum; differences in float64 add 1e-6 or so.
    assert float(value) == pytest.approx(exact(0.0), abs=1e-4)
    assert float(slope) == pytest.approx((exact(1e-4) - exact(-1e-4)) / 2e-4, rel=1e-3)


def test_the_exponential():
    rng = np.random.default_rng(0)
    for norm in (0.0, 0.1, 2.0, 8.0):
        a = rng.standard_normal((3, 5, 5))
        a *= norm / np.linalg.norm(a, 2, axis=(1, 2), keepdims=True)
        with jax.default_matmul_precision("highest"):
            found = np.asarray(two_level.exponential(jnp.asarray(a, jnp.float32)), np.float64)
        # The series: 8 * 0.25**6 / 720 relative at most; float32, doubled in each of five squarings: 2**-24 * 2**5,
        # times some products' own rounding.
        expected = scipy.linalg.expm(a)
        error = np.linalg.norm(found - expected, 2, axis=(1, 2)) / np.exp(norm)
        assert np.all(error < 2e-5)


@pytest.mark.parametrize("kind", ["general", "orthogonal"])
def test_the_macro_stage_never_raises_its_objective(kind):
    x, w = data()
    found = statistics.gather(x, moments="full")
    gathered = statistics.SiteStatistics(
        found.tokens, found.inter, found.samples, found.second, np.asarray(w.T @ w), 192
    )
    solution = solvers.solve("two_level", gathered, macro=kind, group=4, steps=30)
    report = solution.report
    assert report["macro_gain_db"] > 0.05
    mixed = solution.rotation.inter
    before = nuclear(blocks_of(found.second, 4), blocks_of(gathered.gain, 4))
    after = nuclear(
        two_level.mixed_blocks(found.second, mixed, 4),
        two_level.mixed_blocks(gathered.gain, np.linalg.inv(mixed).mT, 4),
    )
    # As reported, in float64: float32 descends with logarithms good to 1e-4, or 4e-4 dB.
    assert report["macro_gain_db"] == pytest.approx(10 * np.log10(before / after), abs=2e-3)
    # WUSH attains the nuclear norms but for the ridge, so the gains add up: 1e-4 of the traces or 32 times that
    # of the smallest directions, both before and after.
    assert report["gain_db"] == pytest.approx(report["wush_gain_db"] + report["macro_gain_db"], abs=0.05)
    assert report["condition_number"] < 1e3 and report["macro_condition_number"] < 1e3
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


def test_the_report_names_what_the_macro_stage_costs():
    found = statistics.gather(data()[0], moments="full")
    given = dataclasses.replace(found, gain=np.eye(128, dtype=np.float32))
    unknown = solvers.solve("two_level", given, steps=1).report
    assert unknown["group"] == 4 and "macro_share_of_bytes" not in unknown
    known = solvers.solve("two_level", dataclasses.replace(given, outputs=192), steps=1).report
    # d G and d outputs multiply-adds; 2 d G and 17/32 d outputs bytes.
    assert known["group"] == 2
    assert known["macro_share_of_multiply_adds"] == pytest.approx(2 / 192)
    assert known["macro_share_of_bytes"] == pytest.approx(4 / 192 * 32 / 17) and 4 / 192 * 32 / 17 < 0.05
    without = solvers.solve("two_level", dataclasses.replace(given, outputs=64))
    assert without.rotation.inter is None and without.report["group"] == 1
    assert without.report["gain_db"] == without.report["wush_gain_db"]


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
    found = statistics.gather(x, moments="full")
    with pytest.raises(TorqError, match=r"gain \(96, 96\) of 128 features"):
        solvers.solve("wush", dataclasses.replace(found, gain=np.eye(96)))
    with pytest.raises(TorqError, match=r"hold no second moment.*moments='full'"):
        solvers.solve("two_level", dataclasses.replace(found, second=None))
    for options in ({"macro": "all"}, {"steps": 0}, {"group": 3}, {"budget": -1.0}):
        with pytest.raises(TorqError):
            solvers.fit(x, "two_level", weight=w, **options)
