"""The algebra of the two-level rotation, over every shape it may have."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torq_jax import rotation as rot
from torq_jax.errors import TorqError
from torq_jax.rotation import TwoLevelRotation

INTER = ("none", "shared", "grouped", "per_position", "per_position_grouped")
INTRA = ("none", "shared", "per_block")

# Forward error of a float32 product of n terms is below n * eps * |a||b| ~ 4e-6 at n = 32; the matrices'
# condition numbers are at most 4 by construction and two of them meet, twice: a factor of 16 at worst.
TOLERANCE = 1e-4


def matrices(rng, shape, orthogonal):
    q, _ = np.linalg.qr(rng.normal(size=shape))
    if orthogonal:
        return q
    r, _ = np.linalg.qr(rng.normal(size=shape))
    return (q * rng.uniform(0.5, 2.0, size=(*shape[:-2], 1, shape[-1]))) @ r  # condition number <= 4


def make(rng, inter, intra, blocks, group, orthogonal=True):
    inter_shape = {
        "none": None,
        "shared": (blocks, blocks),
        "grouped": (blocks // group, group, group),
        "per_position": (32, blocks, blocks),
        "per_position_grouped": (32, blocks // group, group, group),
    }[inter]
    intra_shape = {"none": None, "shared": (32, 32), "per_block": (blocks, 32, 32)}[intra]
    return TwoLevelRotation(
        None if inter_shape is None else matrices(rng, inter_shape, orthogonal),
        None if intra_shape is None else matrices(rng, intra_shape, orthogonal),
        32 * blocks,
    )


def by_definition(x, rotation, group):
    """Loops over the definition: X [t, B, 32]."""
    blocks = rotation.features // 32
    inter, intra = rotation.inter, rotation.intra
    X = x.reshape(-1, blocks, 32)
    Y = X.copy()
    if inter is not None:
        full = np.zeros((32, blocks, blocks))
        for k in range(32):
            if inter.shape == (blocks, blocks):
                full[k] = inter
            elif inter.shape == (32, blocks, blocks) and inter.shape[0] * inter.shape[2] != blocks:
                full[k] = inter[k]
            else:
                parts = inter[k] if inter.ndim == 4 else inter
                for n, part in enumerate(parts):
                    full[k, n * group : (n + 1) * group, n * group : (n + 1) * group] = part
        Y = np.stack([X[:, :, k] @ full[k] for k in range(32)], axis=-1)
    if intra is None:
        return Y.reshape(x.shape)
    Z = np.stack([Y[:, b] @ (intra if intra.ndim == 2 else intra[b]) for b in range(blocks)], axis=1)
    return Z.reshape(x.shape)


forms = st.tuples(
    st.sampled_from(INTER),
    st.sampled_from(INTRA),
    st.sampled_from([(1, 1), (3, 3), (4, 2)]),
    st.booleans(),
    st.integers(0, 2**16),
)


def close(a, b, tolerance=TOLERANCE):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-30)


@settings(max_examples=15, deadline=None)
@given(forms)
def test_algebra(form):
    inter, intra, (blocks, group), orthogonal, seed = form
    rng = np.random.default_rng(seed)
    rotation = make(rng, inter, intra, blocks, group, orthogonal)
    x = rng.normal(size=(2, 3, rotation.features)).astype(np.float32)
    weight = rng.normal(size=(5, rotation.features)).astype(np.float32)

    z = rot.rotate(x, rotation)
    assert z.shape == x.shape and z.dtype == jnp.float32
    close(z, by_definition(x.astype(np.float64), rotation, group))
    close(z, np.asarray(x, np.float64) @ np.asarray(rot.materialize(rotation), np.float64))
    close(rot.inverse(z, rotation), x)
    close(np.asarray(z) @ np.asarray(rot.fold(weight, rotation)).T, x @ weight.T)
    # float64 throughout: the condition number 16 at most, times 32 B terms of 1e-16
    z64 = rot.rotate_host(x, rotation)
    close(z64, z)
    close(z64 @ rot.fold_host(weight, rotation).T, x.astype(np.float64) @ weight.T, 1e-11)
    if orthogonal:
        close(rot.fold(weight, rotation), rot.rotate_host(weight, rotation))


@pytest.mark.parametrize("inter", INTER)
@pytest.mark.parametrize("intra", INTRA)
def test_every_form_is_told_from_its_shape(inter, intra):
    rng = np.random.default_rng(0)
    rotation = make(rng, inter, intra, blocks=4, group=2)
    x = rng.normal(size=(3, 128)).astype(np.float32)
    close(rot.rotate(x, rotation), by_definition(x.astype(np.float64), rotation, 2))


@pytest.mark.parametrize(("shape", "group"), [((32, 32, 32), 32), ((32, 2, 2), 2), ((32, 1, 1), 1)])
def test_thirty_two_leading_matrices(shape, group):
    """32 matrices are per position, or 32 groups: the sizes decide."""
    rng = np.random.default_rng(0)
    blocks = 32 if shape[1] == 32 else 32 * group
    rotation = TwoLevelRotation(matrices(rng, shape, True), None, 32 * blocks)
    x = rng.normal(size=(2, 32 * blocks)).astype(np.float32)
    close(rot.rotate(x, rotation), by_definition(x.astype(np.float64), rotation, group))


@pytest.mark.parametrize("inter", INTER)
def test_vmap_and_scan_over_a_stack(inter):
    rng = np.random.default_rng(1)
    layers = [make(rng, inter, "shared", 4, 2) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.float32(leaf) for leaf in leaves]), *layers)
    x = jnp.asarray(rng.normal(size=(3, 2, 128)), jnp.float32)
    expected = np.stack([rot.rotate(x[i], layers[i]) for i in range(3)])
    close(jax.vmap(rot.rotate)(x, stacked), expected, 1e-6)
    _, scanned = jax.jit(lambda s, x: jax.lax.scan(lambda c, a: (c, rot.rotate(*a)), 0, (x, s)))(stacked, x)
    close(scanned, expected, 1e-6)


def test_bfloat16_is_rounded_once():
    rng = np.random.default_rng(2)
    rotation = rot.astype(make(rng, "shared", "shared", 4, 2), ml_dtypes.bfloat16)
    assert rotation.inter.dtype == ml_dtypes.bfloat16
    x = rng.normal(size=(64, 128)).astype(ml_dtypes.bfloat16)
    z = rot.rotate(x, rotation)
    assert z.dtype == jnp.bfloat16
    exact = rot.rotate_host(x, rotation)
    # One rounding: half an ulp, 2^-8 relative; plus float32 sums of 32 terms of size |x| ~ 4.
    np.testing.assert_allclose(np.asarray(z, np.float64), exact, rtol=2.0**-8 * 1.001, atol=1e-5)


def test_stored_in_bfloat16_the_fold_still_preserves_the_product():
    rng = np.random.default_rng(3)
    rotation = rot.astype(make(rng, "per_position", "per_block", 4, 4), ml_dtypes.bfloat16)
    x, weight = rng.normal(size=(7, 128)), rng.normal(size=(9, 128))
    z = rot.rotate_host(x, rotation)
    close(z @ rot.fold_host(weight, rotation).T, x @ weight.T, 1e-12)
    # float32 products: sums of 32 + 4 terms, random rounding 6e-8 each
    close(rot.fold_host(weight, rotation, dtype=np.float32), rot.fold_host(weight, rotation), 1e-6)
    assert rot.fold_host(weight, rotation, dtype=np.float32).dtype == np.float32


def test_fold_host_in_pieces(monkeypatch):
    rng = np.random.default_rng(4)
    rotation = make(rng, "grouped", "shared", 4, 2)
    weight = rng.normal(size=(11, 128))
    whole = rot.fold_host(weight, rotation)
    monkeypatch.setattr(rot, "_ROWS", 4)
    close(rot.fold_host(weight, rotation), whole, 1e-15)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
def test_orthogonality(dtype):
    rng = np.random.default_rng(5)
    rotation = rot.astype(make(rng, "per_position", "shared", 8, 8), dtype)
    error = rot.check_orthogonal(rotation)
    assert 0 < error <= rot.orthogonality_tolerance(rotation)
    with pytest.raises(TorqError, match=r"not orthogonal: error .* exceeds 1e-20"):
        rot.check_orthogonal(rotation, 1e-20)
    bad = dataclasses.replace(rotation, intra=rotation.intra * dtype(1.1))
    with pytest.raises(TorqError, match="not orthogonal"):
        rot.check_orthogonal(bad)
    nan = dataclasses.replace(rotation, intra=rotation.intra * dtype(np.nan))
    with pytest.raises(TorqError, match="not orthogonal"):
        rot.check_orthogonal(nan)
    assert rot.check_orthogonal(rot.identity(64)) == 0


def test_online_cost():
    def cost(inter, intra):
        shaped = [None if s is None else np.broadcast_to(np.float32(0), s) for s in (inter, intra)]
        return rot.online_cost(TwoLevelRotation(*shaped, 4096))

    assert cost(None, None) == (0, 0)
    assert cost((128, 128), (32, 32)) == (4096 * (128 + 32), 2 * 128**2 + 2048)
    assert cost((32, 128, 128), None) == (4096 * 128, 2**20)  # 1 MiB
    assert cost((32, 4, 32, 32), (128, 32, 32)) == (4096 * (32 + 32), 2 * 4096 * 32 + 64 * 4096)
    assert cost((4, 32, 32), None) == (4096 * 32, 2 * 4 * 32**2)


@pytest.mark.parametrize(
    ("inter", "intra", "features", "message"),
    [
        (None, None, 33, "features 33 is no positive multiple of 32"),
        (None, None, 0, "features 0 is no positive multiple"),
        ((3, 3), None, 128, r"inter has shape \(3, 3\), features 128 has B = 4 blocks"),
        ((32, 3, 3), None, 128, "inter has shape"),
        ((32, 2, 3, 3), None, 128, "inter has shape"),
        ((4, 3), None, 128, "inter has shape"),
        ((4,), None, 128, "inter has shape"),
        (None, (16, 16), 128, r"intra has shape \(16, 16\)"),
        (None, (3, 32, 32), 128, r"intra has shape \(3, 32, 32\)"),
    ],
)
def test_shapes_that_do_not_fit(inter, intra, features, message):
    arrays = [None if shape is None else np.zeros(shape, np.float32) for shape in (inter, intra)]
    rotation = TwoLevelRotation(*arrays, features)
    with pytest.raises(TorqError, match=message):
        rot.validate(rotation)
    with pytest.raises(TorqError, match=message):
        rot.rotate(np.zeros((2, features), np.float32), rotation)


def test_other_user_errors():
    rotation = rot.identity(64)
    for function in (rot.rotate, rot.inverse, rot.fold, rot.fold_host, rot.rotate_host):
        with pytest.raises(TorqError, match=r"has shape \(2, 32\), the rotation has features 64"):
            function(np.zeros((2, 32), np.float32), rotation)
        with pytest.raises(TorqError, match="has dtype int32: must be floating"):
            function(np.zeros((2, 64), np.int32), rotation)
    with pytest.raises(TorqError, match="inter has dtype int32"):
        rot.validate(TwoLevelRotation(np.zeros((2, 2), np.int32), None, 64))
    with pytest.raises(TorqError, match="is singular"):
        rot.fold_host(np.zeros((2, 64)), TwoLevelRotation(np.zeros((2, 2)), None, 64))
    with pytest.raises(TorqError, match="float16 is not supported"):
        rot.fold_host(np.zeros((2, 64)), rotation, dtype=np.float16)
    with pytest.raises(TorqError, match=r"must be \[out, features\]"):
        rot.fold_host(np.zeros(64), rotation)
