"""Transforms that cost nothing online: the function stays, the modelled error falls, statistics follow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.pipeline import output_gain, run_tapped
from tests.test_sensitivity import CONFIG
from torq_jax import decoder, folding, mxfp4, sensitivity, statistics
from torq_jax.config import SITES
from torq_jax.errors import TorqError
from torq_jax.solvers import wush

SMALL = dataclasses.replace(
    CONFIG, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=32, attention_bias=True, mlp_bias=True
)
WIDE = dataclasses.replace(SMALL, head_dim=64)
ODD = dataclasses.replace(SMALL, head_dim=96)  # a multiple of 32 and no power of two
CONFIGS = pytest.mark.parametrize("config", [SMALL, WIDE, ODD], ids=lambda c: f"head_dim {c.head_dim}")


def layer(config, seed=0):
    """A random layer whose weights differ in size from column to column, with biases."""
    _, shapes = decoder.make_layer(config)
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)

    def draw(shape):
        if len(shape) == 1:
            return 1 + rng.standard_normal(shape) / 4
        spread = np.exp(rng.standard_normal(shape[1]) / 2) * np.exp(rng.standard_normal((shape[0], 1)) / 2)
        return rng.standard_normal(shape) * spread / np.sqrt(shape[1])

    return jax.tree.unflatten(tree, [jnp.asarray(draw(leaf.shape), jnp.float32) for leaf in leaves])


def stream(config, tokens=24, seed=1):
    return jnp.asarray(
        np.random.default_rng(seed).standard_normal((1, tokens, config.hidden_size)), jnp.float32
    )


def gathered(config, parameters, tokens=400, **options):
    """Statistics of every site with the outputs' gain, and the activations themselves."""
    graph, _ = decoder.make_layer(config)
    _, taps = run_tapped(graph, config, parameters, stream(config, tokens))
    found = {}
    for site in SITES:
        one = statistics.gather(taps[site][0], moments="full", **options)
        found[site] = dataclasses.replace(one, gain=output_gain(parameters[site], site))
    return found, taps


def by_value(config, seed=2):
    """Random well-conditioned transforms of the key and value heads."""
    size = config.head_dim
    noise = np.random.default_rng(seed).standard_normal((config.num_kv_heads, size, size))
    return np.eye(size) + noise / (2 * np.sqrt(size))


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


# -- v -------------------------------------------------------------------------------------------------------


@CONFIGS
def test_v_takes_a_transform_of_the_attention_output(config):
    parameters, matrices = layer(config), by_value(config)
    folded = folding.fold_values(parameters, config, matrices)
    graph, _ = decoder.make_layer(config)
    y, taps = run_tapped(graph, config, parameters, stream(config))
    folded_y, folded_taps = run_tapped(graph, config, folded, stream(config))
    heads = np.asarray(taps["attn_out"][0], np.float64).reshape(-1, config.num_heads, config.head_dim)
    group = config.num_heads // config.num_kv_heads
    expected = np.stack([heads[:, h] @ matrices[h // group] for h in range(config.num_heads)], 1)
    # Float32 sums of 64 to 384 products on either side, each near 1e-7 relative, through matrices of condition 5.
    assert relative(folded_taps["attn_out"][0], expected.reshape(len(heads), -1)) < 3e-6
    assert relative(folded_y, y) < 3e-6


@CONFIGS
def test_the_solved_transform_beats_a_hadamard_matrix(config):
    parameters = layer(config)
    found, taps = gathered(config, parameters)
    second, gain = wush.moments(found["attn_out"], "fold")
    matrices, report = folding.solve_values(second, gain, config)
    s, g = (wush.diagonal_blocks(m) for m in (second, gain))
    after = folding.transform_statistics(found["attn_out"], folding.query_heads(matrices, config))
    scale = np.trace(second) * np.trace(gain) / (np.trace(after.second) * np.trace(after.gain))
    folded = wush.modelled_error(wush.diagonal_blocks(after.second), wush.diagonal_blocks(after.gain)) / scale
    assert report["plain_heads"] == 0 and report["block_gain_db"] > 1
    # The report's figure is that of the transformed statistics, which are float32.
    assert report["block_gain_db"] == pytest.approx(
        wush.decibels(wush.modelled_error(s, g), folded), abs=0.01
    )
    # And through the real format: the output's error with rounded activations.
    graph, _ = decoder.make_layer(config)
    folded_layer = folding.fold_values(parameters, config, matrices)
    _, folded_taps = run_tapped(graph, config, folded_layer, stream(config, 400))
    errors = []
    for x, weight in ((taps, parameters), (folded_taps, folded_layer)):
        x, w = x["attn_out"][0], weight["attn_out"]["o"]
        errors.append(relative(mxfp4.quantize_dequantize(x, "even") @ w.T, x @ w.T))
    assert errors[1] < 0.9 * errors[0]


def test_one_head_has_the_closed_form():
    """Where no two heads share a transform, the error is the squared nuclear norm over head_dim, WUSH's bound."""
    config = dataclasses.replace(WIDE, num_kv_heads=4)
    rng = np.random.default_rng(3)
    half = rng.standard_normal((2, 256, 256)) * np.exp(rng.standard_normal(256) / 2)
    s, g = half @ half.mT
    matrices, report = folding.solve_values(s, g, config, ridge=1e-12)
    assert report["steps"] == 1
    bound = 0.0
    for h in range(4):
        part = slice(64 * h, 64 * (h + 1))
        values = np.linalg.eigvals(s[part, part] @ g[part, part]).real
        bound += np.sqrt(values).sum() ** 2 / 64
        # Both moments become the same, spread evenly: each block of a head has half of its trace.
        t = matrices[h]
        inverse = np.linalg.inv(t)
        after_s, after_g = t.T @ s[part, part] @ t, inverse @ g[part, part] @ inverse.T
        np.testing.assert_allclose(np.trace(after_s[:32, :32]), np.trace(after_s) / 2, rtol=1e-6)
        ratio = np.trace(after_s) / np.trace(after_g)
        np.testing.assert_allclose(after_s, ratio * after_g, atol=1e-6 * np.trace(after_s))
    plain = sum(
        np.trace(s[b : b + 32, b : b + 32]) * np.trace(g[b : b + 32, b : b + 32]) / 32
        for b in range(0, 256, 32)
    )
    # Moments of condition 1e4 or so, inverted in float64.
    assert report["block_gain_db"] == pytest.approx(wush.decibels(plain, bound), abs=1e-5)


def test_heads_that_share_a_transform_settle_at_the_minimum():
    rng = np.random.default_rng(4)
    half = rng.standard_normal((2, 1, 3, 8, 8)) * np.exp(rng.standard_normal((2, 1, 3, 1, 8)))
    s, g = half @ half.mT
    metric, steps = folding._least_metric(s, g, tolerance=1e-6)
    assert 1 < steps < folding._STEPS
    least = folding._metric_error(s, g, metric)
    summed = folding._closed_form(s.sum(1), g.sum(1))
    assert least < folding._metric_error(s, g, summed @ summed.mT)
    # Convex along geodesics: no neighbour is better.
    root = folding._root(metric)
    for _ in range(50):
        step = rng.standard_normal((8, 8))
        values, vectors = np.linalg.eigh(step + step.T)
        nudge = (vectors * np.exp(1e-2 * values)) @ vectors.T
        assert folding._metric_error(s, g, root @ nudge @ root) > least


def test_a_head_without_energy_or_gain_is_no_obstacle():
    rng = np.random.default_rng(5)
    half = rng.standard_normal((2, 128, 128))
    s, g = half @ half.mT
    s[:32], s[:, :32], g[32:64], g[:, 32:64] = 0, 0, 0, 0
    for second, gain in ((s, g), (np.zeros_like(s), g), (s, np.zeros_like(g))):
        matrices, report = folding.solve_values(second, gain, SMALL)
        assert np.isfinite(matrices).all() and report["condition_number"] < 1e6


# -- scales --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", folding.SCALED_SITES)
def test_scales_leave_the_layer_as_it_is(site):
    parameters = layer(SMALL)
    found, taps = gathered(SMALL, parameters)
    scales, report = folding.solve_scales(*wush.moments(found[site], "fold"))
    folded = folding.fold_scales(parameters, site, scales)
    graph, _ = decoder.make_layer(SMALL)
    y, _ = run_tapped(graph, SMALL, parameters, stream(SMALL))
    _, folded_taps = run_tapped(graph, SMALL, folded, stream(SMALL, 400))
    size = SMALL.site_in_features(site)
    # One more rounding of each factor.
    assert relative(folded_taps[site][0], np.asarray(taps[site][0]) * scales[:size]) < 1e-6
    assert relative(run_tapped(graph, SMALL, folded, stream(SMALL))[0], y) < 1e-6
    s, g = (wush.diagonal_blocks(m) for m in (found[site].second, found[site].gain))
    diagonal = np.stack([np.diag(b) for b in scales.reshape(-1, 32)])
    gain = wush.decibels(wush.modelled_error(s, g), wush.modelled_error(s, g, diagonal))
    assert report["block_gain_db"] == pytest.approx(gain, abs=1e-6) and gain > 0.1


def test_no_scale_is_better():
    rng = np.random.default_rng(6)
    s, g = np.exp(rng.standard_normal((2, 64)))
    scales, _ = folding.solve_scales(np.diag(s), np.diag(g), ridge=1e-9)

    def error(t):
        return sum((s * t**2)[b].sum() * (g / t**2)[b].sum() for b in (slice(32), slice(32, 64)))

    least = error(scales)
    assert all(error(scales * np.exp(0.05 * rng.standard_normal(64))) > least for _ in range(50))
    np.testing.assert_allclose(np.log(scales.reshape(2, 32)).mean(-1), 0, atol=1e-12)


# -- statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_follow_the_activations(weighted):
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.standard_normal((300, 128)), jnp.float32)
    weights = rng.random(300).astype(np.float32) if weighted else np.asarray(1 / jnp.mean(x * x, -1))
    gain = output_gain({"o": rng.standard_normal((50, 128))}, "attn_out")
    found = dataclasses.replace(
        statistics.gather(x, moments="full", weights=weights if weighted else None), gain=gain
    )
    for transform in (folding.query_heads(by_value(SMALL), SMALL), np.exp(rng.standard_normal(128))):
        whole = np.diag(transform) if transform.ndim == 1 else np.zeros((128, 128))
        for h, part in enumerate(transform if transform.ndim == 3 else ()):
            whole[32 * h : 32 * h + 32, 32 * h : 32 * h + 32] = part
        after = folding.transform_statistics(found, transform)
        again = statistics.gather(x @ whole, moments="full", weights=weights)
        # Float32 sums of 300 tokens, and the transform's rounding to float32 in the activations.
        assert relative(after.second, again.second) < 2e-6
        assert relative(after.samples, np.asarray(found.samples) @ whole) < 1e-6
        inverse = np.linalg.inv(whole)
        assert relative(after.gain, inverse @ gain @ inverse.T) < 1e-6
        second = after.second.reshape(4, 32, 4, 32)
        np.testing.assert_array_equal(after.inter[5], second[:, 5, :, 5].astype(np.float64))


def test_moments_at_the_outputs_of_folded_weights():
    """Gradients of the folded layer itself, at the outputs of v and up."""
    parameters, matrices = layer(SMALL), by_value(SMALL)
    scales = np.exp(np.random.default_rng(8).standard_normal(SMALL.intermediate_size) / 2)
    folded = folding.fold_scales(folding.fold_values(parameters, SMALL, matrices), "mlp_out", scales)
    cotangent = stream(SMALL, seed=9)
    before, after = (
        sensitivity.layer_gradients(SMALL, p, stream(SMALL), cotangent, outputs=True)
        for p in (parameters, folded)
    )
    for name, transform in (("attn_in/v", matrices), ("mlp_in/up", scales)):
        found = folding.transform_output_moment(np.asarray(before.outputs[name]), transform)
        # Two backward passes in float32 through a softmax, squared.
        assert relative(found, after.outputs[name]) < 1e-4
        assert relative(before.outputs[name], after.outputs[name]) > 0.1
    assert relative(before.outputs["attn_out/o"], after.outputs["attn_out/o"]) < 1e-4
    filled = np.zeros((2, 48, 48))  # 96 rows in two parts, and one with an end that cuts a head in two
    with pytest.raises(
        TorqError, match="parts of 48 gradients cut heads of 32 in two: round with --rounding gptq"
    ):
        folding.transform_output_moment(filled, np.stack([np.eye(32)] * 3))


# -- errors --------------------------------------------------------------------------------------------------


def test_what_cannot_be_folded_says_why():
    square = np.eye(40)
    assert "head_dim 10 is not a multiple of 32" in folding.values_refusal(CONFIG)
    with pytest.raises(TorqError, match="head_dim 10 is not a multiple of 32"):
        folding.solve_values(square, square, CONFIG)
    with pytest.raises(TorqError, match=r"second moment has shape \(40, 40\): attn_out needs \(128, 128\)"):
        folding.solve_values(square, square, SMALL)
    with pytest.raises(TorqError, match="the gain holds a NaN"):
        folding.solve_values(np.eye(128), np.full((128, 128), np.nan), SMALL)
    for solve, rest in ((folding.solve_values, (SMALL,)), (folding.solve_scales, ())):
        with pytest.raises(TorqError, match="ridge 0 must lie between 0 and 1"):
            solve(np.eye(128), np.eye(128), *rest, ridge=0)
    with pytest.raises(TorqError, match="d a multiple of 32"):
        folding.solve_scales(square, square)
    with pytest.raises(TorqError, match="nothing before site 'attn_out' takes a scale"):
        folding.fold_scales(layer(SMALL), "attn_out", np.ones(128))
    with pytest.raises(TorqError, match="must be positive, one each"):
        folding.fold_scales(layer(SMALL), "mlp_out", -np.ones(96))
    with pytest.raises(TorqError, match=r"must be \[num_kv_heads, head_dim, head_dim\] = \(2, 32, 32\)"):
        folding.fold_values(layer(SMALL), SMALL, np.eye(32))
    with pytest.raises(TorqError, match="is singular"):
        folding.fold_values(layer(SMALL), SMALL, np.zeros((2, 32, 32)))
    found = statistics.gather(jnp.ones((2, 64)))
    with pytest.raises(TorqError, match="without a second moment"):
        folding.transform_statistics(found, np.ones(64))
    with pytest.raises(TorqError, match="a transform of 32 features"):
        folding.transform_statistics(found, np.ones(32))
