"""The solvers: what each promises about the rotation it returns."""

import ml_dtypes
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from torq_jax import rotation as rot
from torq_jax import solvers
from torq_jax.errors import TorqError
from torq_jax.solvers import hadamard, macro, micro
from torq_jax.statistics import SiteStatistics


def activations(blocks, tokens=200, seed=0):
    """Heavy tails, with columns and blocks of different scale."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=(blocks, 32))) * np.exp(rng.normal(size=(blocks, 1)))
    return (rng.standard_t(4, size=(tokens, blocks, 32)) * scale).reshape(tokens, -1).astype(np.float32)


def statistics(x):
    by_position = x.reshape(len(x), -1, 32).astype(np.float64)
    inter = np.einsum("tbk,tck->kbc", by_position, by_position) / len(x)
    return SiteStatistics(float(len(x)), inter, x)


# ------------------------------------------------------------------------------------------------ registry


def test_methods():
    assert solvers.METHODS == ("none", "hadamard", "random", "full_hadamard", "torq", "wush", "two_level")
    assert solvers.method_options("none") == {}
    assert solvers.method_options("hadamard") == {"signs": False}
    assert set(solvers.method_options("torq")) == {
        "form",
        "group",
        "rule",
        "steps",
        "sample_blocks",
        "anticorrelation",
    }


def test_unknown_method_and_option():
    data = statistics(activations(2))
    with pytest.raises(TorqError, match=r"^unknown method 'torque': must be one of none, hadamard, random"):
        solvers.solve("torque", data)
    with pytest.raises(TorqError, match=r"^method 'hadamard' has no option 'form': its options are signs$"):
        solvers.solve("hadamard", data, form="shared")
    with pytest.raises(TorqError, match=r"^method 'none' has no option 'form': it takes none but seed$"):
        solvers.solve("none", data, form="shared")


@pytest.mark.parametrize(
    ("method", "option", "value", "message"),
    [
        ("hadamard", "signs", "False", "signs of method 'hadamard' is 'False': must be of type bool"),
        ("torq", "steps", "many", "steps of method 'torq' is 'many': must be of type int"),
        ("torq", "steps", True, "steps of method 'torq' is True"),
        ("torq", "group", 1.5, r"group of method 'torq' is 1\.5: must be of type int \| None"),
        ("torq", "anticorrelation", "0,1", "must be of type float"),
        ("torq", "rule", "mse", "rule of method 'torq' is 'mse': must be one of floor, ceil, even"),
    ],
)
def test_options_of_the_wrong_kind(method, option, value, message):
    with pytest.raises(TorqError, match=message):
        solvers.check_options(method, {option: value})
    with pytest.raises(TorqError, match=message):
        solvers.solve(method, statistics(activations(2)), **{option: value})


def test_numbers_of_other_types_are_options():
    solvers.check_options("torq", {"steps": np.int64(3), "anticorrelation": 1, "group": None, "rule": "ceil"})


@pytest.mark.parametrize("method", ["none", "hadamard", "torq"])
def test_every_method_preserves_the_product(method):
    data = statistics(activations(3))
    rotation = solvers.solve(method, data).rotation
    assert all(leaf is None or leaf.dtype == np.float64 for leaf in (rotation.inter, rotation.intra))
    weight = np.random.default_rng(0).normal(size=(5, 96))
    stored = rot.astype(rotation, ml_dtypes.bfloat16)
    rot.check_orthogonal(stored)
    exact = data.samples.astype(np.float64) @ weight.T
    folded = rot.rotate_host(data.samples, stored) @ rot.fold_host(weight, stored).T
    assert np.abs(folded - exact).max() <= 1e-12 * np.abs(exact).max()  # float64 sums of 96 terms


def test_none():
    rotation = solvers.solve("none", statistics(activations(2))).rotation
    assert rotation == rot.TwoLevelRotation(None, None, 64)


def test_hadamard():
    data = statistics(activations(2))
    plain = solvers.solve("hadamard", data).rotation
    # 32 products of 1/32, each rounded in the last of 53 bits
    assert rot.orthogonality_error(plain) <= 2e-15
    assert plain.inter is None and np.array_equal(plain.intra, plain.intra.T)
    assert np.all(np.abs(plain.intra) == 1 / np.sqrt(32))

    signed = [solvers.solve("hadamard", data, seed=seed, signs=True).rotation.intra for seed in (0, 0, 1)]
    assert np.array_equal(signed[0], signed[1]) and not np.array_equal(signed[0], signed[2])
    assert np.array_equal(np.abs(signed[0]), np.abs(plain.intra))
    assert rot.orthogonality_error(rot.TwoLevelRotation(None, signed[0], 64)) <= 2e-15
    assert np.array_equal(hadamard.hadamard_matrix(2), np.array([[1, 1], [1, -1]]) / np.sqrt(2))


# ------------------------------------------------------------------------------------- macro-equilibrium


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 24),
    rank=st.integers(0, 24),
    spread=st.floats(0, 8),
    batch=st.sampled_from([(), (3,), (2, 2)]),
    seed=st.integers(0, 2**16),
)
def test_schur_horn(n, rank, spread, batch, seed):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(*batch, n, min(rank, n))) * np.exp(spread * rng.normal(size=(*batch, n, 1)))
    moment = factor @ np.swapaxes(factor, -1, -2)
    q, rotations = macro.equalise(moment)

    assert q.shape == moment.shape and rotations.shape == batch
    assert np.all(rotations <= n - 1)
    assert np.abs(np.swapaxes(q, -1, -2) @ q - np.eye(n)).max() <= 1e-12
    energies = np.einsum("...ii->...i", np.swapaxes(q, -1, -2) @ moment @ q)
    mean = np.einsum("...ii->...", moment)[..., None] / n
    assert np.all(np.abs(energies - mean) <= 1e-6 * mean)


def test_indefinite_matrices_are_equalised_too():
    rng = np.random.default_rng(0)
    moment = rng.normal(size=(12, 12))
    moment = moment + moment.T
    q, rotations = macro.equalise(moment)
    assert rotations <= 11
    np.testing.assert_allclose(np.diag(q.T @ moment @ q), np.trace(moment) / 12, atol=1e-12)


@pytest.mark.parametrize(
    "moment",
    [
        np.zeros((5, 5)),
        np.eye(7) * 3,
        np.ones((6, 6)),
        np.array([[2.0]]),
        scipy.linalg.toeplitz([3.0, 1.0, -0.5, 0.25]),
    ],
)
def test_nothing_to_do(moment):
    q, rotations = macro.equalise(moment)
    assert rotations == 0
    assert np.array_equal(q, np.eye(len(moment)))


def test_one_energy_among_zeros():
    """Rank one along an axis, no off-diagonal to turn by: every rotation but the last is needed."""
    q, rotations = macro.equalise(np.diag([0.0, 0.0, 0.0, 8.0]))
    assert rotations == 3
    np.testing.assert_allclose(np.diag(q.T @ np.diag([0.0, 0.0, 0.0, 8.0]) @ q), 2.0, rtol=1e-15)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30])
def test_energies_of_any_size(scale):
    moment = np.cov(np.random.default_rng(0).normal(size=(8, 50))) * scale
    q, _ = macro.equalise(moment)
    np.testing.assert_allclose(np.diag(q.T @ moment @ q), np.trace(moment) / 8, rtol=1e-12)


@pytest.mark.parametrize("form", macro.FORMS)
@pytest.mark.parametrize("group", [None, 1, 2, 3, 6])
def test_forms_and_groups(form, group):
    inter = statistics(activations(6)).inter
    equalised = macro.solve_inter(inter, form=form, group=group)
    rotation = rot.TwoLevelRotation(equalised.rotation, None, 192)
    rot.check_orthogonal(rotation)
    size = group or 6
    lead = (32,) if form == "per_position" else ()
    assert equalised.rotation.shape == (*lead, 6, 6) if size == 6 else (*lead, 6 // size, size, size)
    assert np.all(equalised.rotations <= size - 1)

    # The energies as the solver reports them are those of rotated activations.
    x = rot.rotate_host(activations(6), rotation).reshape(-1, 6, 32)
    energies = macro.block_energies(inter, equalised.rotation)  # [32, 6]
    np.testing.assert_allclose(energies, (x**2).mean(axis=0).T, rtol=1e-10)
    np.testing.assert_allclose(macro.block_energies(inter).sum(), energies.sum(), rtol=1e-12)
    checked = energies if form == "per_position" else energies.sum(axis=0, keepdims=True)
    grouped = checked.reshape(len(checked), -1, size)
    mean = grouped.mean(axis=-1, keepdims=True)
    assert np.all(np.abs(grouped - mean) <= 1e-6 * mean)


def test_macro_errors():
    inter = statistics(activations(6)).inter
    with pytest.raises(TorqError, match="unknown form 'both': must be one of shared, per_position"):
        macro.solve_inter(inter, form="both")
    for group in (4, 0, -2):
        with pytest.raises(TorqError, match=f"group {group} does not divide the site's 6 blocks"):
            macro.solve_inter(inter, group=group)
    with pytest.raises(TorqError, match=r"inter has shape \(6, 6\): must be \[32, B, B\]"):
        macro.solve_inter(inter[0])
    with pytest.raises(TorqError, match="NaN or an infinity"):
        macro.equalise(np.full((2, 2), np.nan))
    with pytest.raises(TorqError, match=r"moment has shape \(2, 3\)"):
        macro.equalise(np.zeros((2, 3)))


# ----------------------------------------------------------------------------------------- micro-alignment


def oracle_counts(x, rule):
    """Codes by ml_dtypes' own rounding, scales from exact arithmetic on powers of two."""
    counts = np.zeros((32, 8), int)
    for block in x.astype(np.float64):
        amax = np.abs(block).max()
        exponent = -127
        if amax > 0:
            exponent = -140
            while 2.0 ** (exponent + 1) <= amax:
                exponent += 1
            up = {"floor": False, "ceil": amax > 1.5 * 2.0**exponent, "even": amax >= 1.75 * 2.0**exponent}
            exponent = max(exponent - 2 + up[rule], -127)
        scaled = np.minimum(np.abs(block) / 2.0**exponent, 6.0)
        codes = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 7
        counts[np.arange(32), codes] += 1
    return counts


@pytest.mark.parametrize("rule", micro.RULES)
def test_counts_agree_with_the_format(rule):
    x = activations(2, tokens=40).reshape(-1, 32)
    # Ties, saturation, powers of two, 1.5 and 1.75 times them, a zero block, tiny numbers
    eighths = np.random.default_rng(0).integers(-64, 65, size=(60, 32)) / 8
    edges = np.zeros((6, 32), np.float32)
    edges[:, 0] = [4.0, 6.0, 7.0, 7.999, 0.0, 2.0**-130]
    edges[:4, 1:8] = micro.BOUNDARIES
    x = np.concatenate([x, eighths, edges]).astype(np.float32)
    assert np.array_equal(micro.codebook_counts(x, rule), oracle_counts(x, rule))
    histogram = solvers.codebook_histogram(x, rule)
    assert histogram.shape == (32, 8)
    np.testing.assert_allclose(histogram.sum(axis=1), 1, rtol=1e-15)


def test_entropy():
    assert solvers.entropy_bits(np.full((32, 8), 1 / 8)) == 3
    assert solvers.entropy_bits(np.eye(8)) == 0
    assert solvers.entropy_bits(np.array([0.5, 0.5, 0, 0, 0, 0, 0, 0])) == 1


def pair_squares(a, b, angles):
    """Sum of squared counts at each angle, by brute force."""
    c, s = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return sum((micro._column_counts(column) ** 2).sum(axis=1) for column in (a * c - b * s, a * s + b * c))


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 60), scale=st.floats(0.1, 6), df=st.sampled_from([1, 3, 30]), seed=st.integers(0, 2**16)
)
def test_the_angle_is_the_exact_optimum(n, scale, df, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_t(df, size=(2, 1, n)) * scale * rng.uniform(0.1, 1, size=(2, 1, 1))
    angle, gain = micro.best_angles(a, b)
    stay = pair_squares(a, b, np.zeros(1))[0]
    found = pair_squares(a, b, angle)[0]
    assert found == stay - gain[0]  # integers: the counts kept along the sweep are the true ones
    assert -np.pi / 4 <= angle[0] <= np.pi / 4
    # No angle does better, in the window or anywhere else.
    assert found <= pair_squares(a, b, np.linspace(-np.pi, np.pi, 8001)).min()


def test_the_sweep_follows_every_interval():
    """Not only at its minimum: with two values the loss takes few values, and each must be found."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.uniform(-6, 6, size=(2, 1, 2))
        angle, gain = micro.best_angles(a, b)
        grid = pair_squares(a, b, np.linspace(-np.pi / 4, np.pi / 4, 4001))
        assert pair_squares(a, b, np.zeros(1))[0] - gain[0] <= grid.min()
        assert pair_squares(a, b, angle)[0] == pair_squares(a, b, np.zeros(1))[0] - gain[0]


def test_columns_without_a_crossing_stay():
    angle, gain = micro.best_angles(np.zeros((2, 9)), np.full((2, 9), 0.1))
    assert not angle.any() and not gain.any()


@pytest.mark.parametrize("rule", micro.RULES)
def test_alignment(rule):
    x = activations(4, tokens=150, seed=1).reshape(-1, 32)
    aligned = micro.align(x, rule=rule, steps=30)
    rotation = aligned.rotation
    assert np.abs(rotation.T @ rotation - np.eye(32)).max() <= 1e-13
    assert len(aligned.losses) > 5 and np.all(np.diff(aligned.losses) < 0)
    assert 0 < aligned.rotations <= 8 * aligned.steps <= 8 * 30
    assert aligned.entropy_after > aligned.entropy_before
    # What is reported is what the rotation does. Rotating at once differs from rotating step by step in the
    # last bits, which may move a value or two across a boundary.
    before, after = (
        micro.codebook_counts(x, rule),
        micro.codebook_counts(x.astype(np.float64) @ rotation, rule),
    )
    assert aligned.losses[0] == micro.codebook_loss(before)
    assert aligned.losses[-1] == pytest.approx(micro.codebook_loss(after), rel=1e-3)
    assert aligned.entropy_before == micro.entropy_bits(before / len(x))
    assert aligned.entropy_after == pytest.approx(micro.entropy_bits(after / len(x)), abs=1e-3)


def test_alignment_of_skewed_columns_gains_much():
    """Twelve columns round to zero throughout, less than 2 bits in all; mixed with the rest they gain."""
    x = np.random.default_rng(0).normal(size=(500, 32)) * np.where(np.arange(32) < 20, 1.0, 0.05)
    aligned = micro.align(x)
    assert aligned.entropy_before < 2
    assert aligned.entropy_after > aligned.entropy_before + 0.25


def test_when_the_worst_half_is_exhausted_all_columns_are_tried():
    """Four columns carry everything, the worst sixteen hold only zeros: nothing to mix among them."""
    x = np.random.default_rng(0).normal(size=(500, 32)) * (np.arange(32) < 4)
    aligned = micro.align(x)
    assert aligned.entropy_before < 1
    assert aligned.entropy_after > aligned.entropy_before + 1


def test_alignment_is_deterministic_and_has_a_budget():
    x = activations(2, seed=2).reshape(-1, 32)
    first, second = micro.align(x, steps=10), micro.align(x, steps=10)
    assert np.array_equal(first.rotation, second.rotation) and first.losses == second.losses
    none = micro.align(x, steps=0)
    assert np.array_equal(none.rotation, np.eye(32)) and len(none.losses) == 1


def test_alignment_at_the_edges():
    for x in (np.zeros((4, 32)), np.eye(32), np.ones((1, 32)), np.full((3, 32), 1e-40)):
        aligned = micro.align(x, steps=5)
        assert np.abs(aligned.rotation.T @ aligned.rotation - np.eye(32)).max() <= 1e-13
        assert np.all(np.diff(aligned.losses) < 0)
    x = activations(2).reshape(-1, 32)
    padded = np.concatenate([x, np.zeros((500, 32))])
    assert np.array_equal(micro.align(padded, steps=5).rotation, micro.align(x, steps=5).rotation)


def test_micro_errors():
    with pytest.raises(TorqError, match=r"blocks have shape \(3, 31\): must be \[n, 32\]"):
        micro.align(np.zeros((3, 31)))
    with pytest.raises(TorqError, match="with n at least 1"):
        solvers.codebook_histogram(np.zeros((0, 32)))
    with pytest.raises(TorqError, match="NaN or an infinity"):
        micro.align(np.full((3, 32), np.inf))
    with pytest.raises(TorqError, match="32768 sample blocks are more than 32767"):
        micro.align(np.ones((2**15, 32)))
    with pytest.raises(TorqError, match="'mse' is not supported here: must be one of floor, ceil, even"):
        micro.align(np.ones((3, 32)), rule="mse")


def test_pairs_are_disjoint_and_of_the_worst_half():
    counts = micro.codebook_counts(activations(4).reshape(-1, 32))
    pairs = micro.pick_pairs(counts, np.zeros((32, 32), bool), 0.1)
    assert pairs.shape == (8, 2) and len(np.unique(pairs)) == 16
    imbalance = ((counts / counts.sum(axis=1, keepdims=True) - 1 / 8) ** 2).sum(axis=1)
    assert set(pairs.ravel()) == set(np.argsort(-imbalance)[:16])
    assert len(micro.pick_pairs(counts, np.ones((32, 32), bool), 0.1)) == 0


# ------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("options", [{}, {"form": "per_position"}, {"group": 2}, {"rule": "even"}])
def test_torq(options):
    data = statistics(activations(6))
    solution = solvers.solve("torq", data, steps=10, sample_blocks=600, **options)
    report = solution.report
    rot.check_orthogonal(solution.rotation)
    assert solution.rotation.intra.shape == (32, 32)
    assert report["orthogonality_error"] <= 1e-12
    assert report["macro_rotations_most"] <= options.get("group", 6) - 1
    if "group" in options:
        assert report["block_energy_std_over_mean_after"] < report["block_energy_std_over_mean_before"]
    else:
        assert (
            report["block_energy_max_over_mean_after"] - 1
            <= 1e-6
            < report["block_energy_max_over_mean_before"]
        )
    assert np.all(np.diff(report["micro_losses"]) < 0)
    assert report["codebook_entropy_after"] > report["codebook_entropy_before"] > 0
    assert report["codebook_entropy_original"] > 0
    assert report["macro_seconds"] >= 0 and report["micro_seconds"] > 0


def test_torq_follows_its_seed():
    data = statistics(activations(6))

    def intra(seed):
        return solvers.solve("torq", data, seed=seed, steps=4, sample_blocks=100).rotation.intra

    assert np.array_equal(intra(0), intra(0))
    assert not np.array_equal(intra(0), intra(1))


def test_torq_at_the_edges():
    one = solvers.solve("torq", statistics(activations(1)), steps=3).rotation
    assert one.inter.shape == (1, 1) and one.inter[0, 0] == 1
    dead = solvers.solve("torq", statistics(np.zeros((5, 64), np.float32)), steps=3)
    assert np.array_equal(dead.rotation.inter, np.eye(2)) and np.array_equal(dead.rotation.intra, np.eye(32))
    assert dead.report["codebook_entropy_original"] == 0


def test_torq_errors():
    data = statistics(activations(2))
    with pytest.raises(TorqError, match=r"samples \(200, 64\) and moments \(32, 3, 3\) do not fit"):
        solvers.solve("torq", SiteStatistics(1.0, np.ones((32, 3, 3)), data.samples))
    with pytest.raises(TorqError, match="hold no moments: gather them with moments=True"):
        solvers.solve("torq", SiteStatistics(1.0, np.zeros((32, 2, 2)), data.samples))
    with pytest.raises(TorqError, match="steps -1, sample_blocks 2048: steps must not be negative"):
        solvers.solve("torq", data, steps=-1)
    with pytest.raises(TorqError, match=r"sample_blocks must lie in 1\.\.32767"):
        solvers.solve("torq", data, sample_blocks=2**15)
