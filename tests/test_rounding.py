"""GPTQ: against a textbook loop in numpy, and what it promises."""

import jax.numpy as jnp
import numpy as np
import pytest

from torq_jax import mxfp4, rounding
from torq_jax.errors import TorqError


def problem(rows=24, features=96, seed=0):
    """A weight, and the second moment of correlated activations."""
    rng = np.random.default_rng(seed)
    mix = np.eye(features) + rng.standard_normal((features, features)) / np.sqrt(features)
    x = rng.standard_normal((4 * features, features)) * np.exp(rng.standard_normal(features)) @ mix
    return rng.standard_normal((rows, features)).astype(np.float32), x.T @ x / len(x), x


GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def textbook(weight, hessian, damping, steps):
    """Column by column in float64, every later column updated at once; the best of ``steps`` exponents a block."""
    weight = weight.astype(np.float64).copy()
    damped = hessian + damping * np.diagonal(hessian).mean() * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    rounded = np.zeros_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], 32):
            floor = np.floor(np.log2(np.abs(weight[row, start : start + 32]).max())) - 2
            tries = []
            for step in steps:
                own, cost, values = weight[row].copy(), 0.0, []
                for i in range(start, start + 32):
                    scaled = own[i] / 2.0 ** (floor + step)
                    value = (
                        np.sign(scaled) * GRID[np.argmin(np.abs(GRID - abs(scaled)))] * 2.0 ** (floor + step)
                    )
                    error = (own[i] - value) / upper[i, i]
                    own[i:] -= error * upper[i, i:]
                    cost += error**2
                    values.append(value)
                tries.append((cost, values, own))
            _, values, own = min(tries, key=lambda t: t[0])
            rounded[row, start : start + 32] = values
            weight[row] = own
    return rounded


@pytest.mark.parametrize(("rule", "steps"), [("mse", (0, 1, -1)), ("floor", (0,))])
def test_equals_the_textbook(rule, steps):
    weight, hessian, _ = problem()
    found = np.asarray(mxfp4.dequantize(rounding.gptq(weight, hessian, rule).weight))
    expected = textbook(weight, hessian, 0.01, steps)
    # Float32 sums move a value by about 1e-6 of a grid step, so that one value in 1e5 may round the other way; of
    # 24 rows, one such row (it differs from there on) is already unlikely.
    assert (np.abs(found - expected).max(axis=1) > 0).sum() <= 1


def test_an_identity_moment_rounds_to_nearest():
    weight, _, _ = problem()
    for rule in mxfp4.SCALE_RULES:
        found = rounding.gptq(weight, np.eye(96), rule)
        nearest = mxfp4.quantize(jnp.asarray(weight), rule)
        np.testing.assert_array_equal(found.weight.codes, nearest.codes)
        np.testing.assert_array_equal(found.weight.scales, nearest.scales)
        assert found.error == pytest.approx(found.error_nearest)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("order", rounding.ORDERS)
def test_the_output_error_falls_and_is_what_is_reported(seed, order):
    weight, hessian, x = problem(seed=seed)
    found = rounding.gptq(weight, hessian, order=order)
    assert found.error < 0.7 * found.error_nearest  # correlated as here, about half is made up for
    kept = np.asarray(mxfp4.dequantize(found.weight), np.float64)
    measured = np.square(x @ (weight - kept).T).sum() / np.square(x @ weight.T).sum()
    assert found.error == pytest.approx(measured, rel=1e-3)


def output_moment(rows=24, seed=7):
    """Of gradients in which some directions count far more than others."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((8 * rows, rows)) * np.exp(rng.standard_normal(rows))
    u = u @ (np.eye(rows) + rng.standard_normal((rows, rows)) / np.sqrt(rows))
    return u.T @ u / len(u)


def test_two_sided_equals_the_textbook_row_by_row():
    weight, hessian, _ = problem()
    moment, damping = output_moment(), 0.01
    damped = moment + damping * np.diagonal(moment).mean() * np.eye(len(moment))
    target, expected = weight.astype(np.float64).copy(), np.zeros_like(weight)
    for start in range(0, len(weight), rounding.ROWS):
        now, later = slice(start, start + rounding.ROWS), slice(start + rounding.ROWS, None)
        expected[now] = textbook(target[now].astype(np.float32), hessian, damping, (0, 1, -1))
        # What is best for the rows to come, by the definition: they minimise tr(O E H E^T) in real numbers.
        best = np.linalg.solve(damped[later, later], damped[later, now] @ (target[now] - expected[now]))
        target[later] += best
    found = np.asarray(mxfp4.dequantize(rounding.gptq(weight, hessian, outputs=moment).weight))
    # As above, a row in which float32 decides one rounding the other way may differ; rows after it then differ, too.
    assert (np.abs(found - expected).max(axis=1) > 0)[: 2 * rounding.ROWS].sum() <= 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [24, 13])
def test_two_sided_lowers_the_error_that_it_reports(rows, seed):
    weight, hessian, _ = problem(rows=rows, seed=seed)
    moment = output_moment(rows, seed)
    one, two = rounding.gptq(weight, hessian), rounding.gptq(weight, hessian, outputs=moment)

    def cost(q):
        lost = weight - np.asarray(mxfp4.dequantize(q.weight), np.float64)
        return np.trace(moment @ lost @ hessian @ lost.T) / np.trace(moment @ weight @ hessian @ weight.T)

    assert cost(two) < cost(one)
    assert two.error == pytest.approx(cost(two), rel=1e-3)
    assert two.weight.codes.shape == one.weight.codes.shape


def test_outputs_that_count_the_same_change_nothing():
    weight, hessian, _ = problem()
    one = rounding.gptq(weight, hessian)
    for outputs in (3 * np.eye(24), np.stack([np.eye(16)] * 2)):  # the second in parts, the last filled up
        two = rounding.gptq(weight, hessian, outputs=outputs)
        np.testing.assert_array_equal(one.weight.codes, two.weight.codes)
        np.testing.assert_array_equal(one.weight.scales, two.weight.scales)


def test_parts_hold_every_row_once():
    for out in (1, 8, 24, 576, 4096, 4097, 14336, 28672):
        count, size = rounding.output_parts(out)
        assert 0 <= count * size - out < count * rounding.ROWS and size <= 4096 and size % rounding.ROWS == 0
        rows = rounding.rows_together(size)
        assert (
            size % rows == 0 and rows % rounding.ROWS == 0 and size // rows >= min(64, size // rounding.ROWS)
        )


def test_parts_are_rounded_each_for_itself():
    weight, hessian, _ = problem(rows=32)
    moments = np.stack([output_moment(16, 1), output_moment(16, 2)])
    whole = rounding.gptq(weight, hessian, outputs=moments).weight
    parts = [
        rounding.gptq(weight[i : i + 16], hessian, outputs=moment).weight
        for i, moment in zip((0, 16), moments, strict=True)
    ]
    # Batched products may round apart: one value on a boundary, and what follows it in its row and the next ones.
    same = np.asarray(whole.codes) == np.concatenate([p.codes for p in parts])
    assert same.all(axis=1).sum() >= 30


def test_zero_features_and_zero_blocks_stay_zero():
    weight, hessian, _ = problem()
    weight[:, 64:], hessian[64:], hessian[:, 64:] = 0, 0, 0
    found = rounding.gptq(weight, hessian)
    assert found.dead == 32
    assert not np.asarray(found.weight.scales)[:, 2].any()
    assert not np.asarray(mxfp4.unpack(found.weight.codes))[:, 64:].any()


def test_order_takes_blocks_whole():
    diagonal = np.arange(96.0)
    taken = rounding._order(diagonal, "energy")
    np.testing.assert_array_equal(taken, np.arange(95, -1, -1))
    assert set(taken[:32]) == set(range(64, 96))


def test_elements_round_as_the_format_does():
    x = np.linspace(-8, 8, 4097, dtype=np.float32)
    blocks = np.pad(x, (0, 31 * 4097 - 4097)).reshape(31, 4097).T.copy()  # one value a block beside zeros
    blocks[:, 31 - 1] = 6.0  # fixes the floor scale at one
    inside = np.abs(x) <= 6
    with_block = np.concatenate([blocks, np.zeros((4097, 1), np.float32)], axis=1)
    expected = np.asarray(mxfp4.quantize_dequantize(jnp.asarray(with_block), "floor"))[:, 0]
    np.testing.assert_array_equal(
        np.asarray(rounding.round_elements(jnp.asarray(x)))[inside], expected[inside]
    )


def test_correct_is_least_squares():
    weight, _, x = problem()
    rng = np.random.default_rng(1)
    noisy = x + 0.3 * rng.standard_normal(x.shape)
    found = rounding.correct(weight, x.T @ noisy, noisy.T @ noisy, damping=1e-12)
    expected = np.linalg.lstsq(noisy, x @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
    half = rounding.correct(weight, x.T @ noisy, noisy.T @ noisy, alpha=0.5, damping=1e-12)
    np.testing.assert_allclose(half, (weight + found) / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=np.ones((2, 40), np.float32)), "multiple of 32"),
        (dict(weight=np.full((2, 96), np.nan, np.float32)), "NaN"),
        (dict(hessian=np.eye(64)), "96 features"),
        (dict(hessian=np.full((96, 96), np.inf)), "NaN or an infinity"),
        (dict(hessian=np.triu(np.ones((96, 96)))), "not symmetric"),
        (dict(hessian=-np.eye(96)), "negative diagonal"),
        (
            dict(
                hessian=np.eye(96) + 4 * (1 - np.eye(96)) * np.sign(np.add.outer(range(96), range(96)) - 95)
            ),
            "damping",
        ),
        (dict(scale_rule="largest"), "unknown scale rule"),
        (dict(order="random"), "unknown order"),
        (dict(outputs=np.eye(23)), "24 rows"),
        (dict(outputs=np.stack([np.eye(12)] * 2)), "multiple of 8"),
        (dict(outputs=np.full((24, 24), np.nan)), "outputs' moment holds a NaN"),
    ],
)
def test_errors(change, message):
    weight, hessian, _ = problem()
    given = dict(weight=weight, hessian=hessian) | change
    with pytest.raises(TorqError, match=message):
        rounding.gptq(**given)
