"""Two-level rotation of an activation, and the same rotation folded into the weight that reads it.

An activation ``x [..., d]`` is read as ``X [..., B, 32]``, ``B = d / 32`` blocks::

    Y[b', k] = sum_b inter[(k,) b, b'] X[b, k]          mixes blocks, position by position
    Z[b, k'] = sum_k Y[b, k] intra[(b,) k, k']          mixes inside each block

With ``T = materialize(rotation)``, ``rotate(x) == x @ T`` and ``fold(W) == W @ inverse(T).T``, so that
``rotate(x) @ fold(W).T == x @ W.T`` whether or not the matrices are orthogonal.

Source: TORQ (arXiv 2605.19561); the grouped and non-orthogonal forms serve other solvers too.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.reference import by_position
from torq_jax.errors import TorqError

POSITIONS = 32
"""Positions inside a block: the block size of MXFP4, fixed by the OCP standard."""

_ROWS = 256  # rows of a weight folded at once on the host: the float64 temporaries stay in cache


@dataclasses.dataclass(frozen=True)
class TwoLevelRotation:
    """Matrices of a two-level rotation; a pytree whose ``features`` is static.

    Shapes, with ``B = features / 32`` and groups of ``G`` contiguous blocks:

    * inter: None, ``[B, B]`` shared, ``[B/G, G, G]`` grouped, ``[32, B, B]`` per position, or
      ``[32, B/G, G, G]`` per position and grouped. A 3-d array is grouped when ``shape[0] * shape[2] == B``.
    * intra: None, ``[32, 32]`` shared, or ``[B, 32, 32]`` per block.

    Leaves are jax or numpy arrays of any floating type; nothing is checked here, because a pytree also holds
    tracers, shardings and leaves stacked over layers. The functions of this module call :func:`validate`.
    """

    inter: Any
    intra: Any
    features: int


jax.tree_util.register_dataclass(TwoLevelRotation, data_fields=["inter", "intra"], meta_fields=["features"])


class OnlineCost(NamedTuple):
    """What the online part of a rotation costs at one activation."""

    multiply_adds: int
    """Multiply-adds a token."""
    bytes_read: int
    """Bytes of matrices read a step, stored in bfloat16."""


def identity(features: int) -> TwoLevelRotation:
    """The rotation that does nothing.

    Raises:
      TorqError: ``features`` is no positive multiple of 32.
    """
    rotation = TwoLevelRotation(None, None, features)
    validate(rotation)
    return rotation


def validate(rotation: TwoLevelRotation) -> None:
    """Check that the shapes of a rotation fit each other.

    Raises:
      TorqError: ``features`` is no positive multiple of 32, a matrix is not floating, or its shape is none of
        those that :class:`TwoLevelRotation` names.
    """
    features = rotation.features
    if features < 1 or features % POSITIONS:
        raise TorqError(
            f"features {features} is no positive multiple of {POSITIONS}: pad the activation first"
        )
    blocks = features // POSITIONS
    for name, matrix in (("inter", rotation.inter), ("intra", rotation.intra)):
        if matrix is not None and not jnp.issubdtype(matrix.dtype, jnp.floating):
            raise TorqError(f"{name} has dtype {matrix.dtype}: must be floating")
    inter, intra = rotation.inter, rotation.intra
    if inter is not None and not _inter_fits(tuple(inter.shape), blocks):
        raise TorqError(
            f"inter has shape {tuple(inter.shape)}, features {features} has B = {blocks} blocks: must be "
            f"[B, B], [B/G, G, G], [{POSITIONS}, B, B] or [{POSITIONS}, B/G, G, G]"
        )
    if intra is not None and tuple(intra.shape) not in (
        (POSITIONS, POSITIONS),
        (blocks, POSITIONS, POSITIONS),
    ):
        raise TorqError(
            f"intra has shape {tuple(intra.shape)}, features {features} has B = {blocks} blocks: must be "
            f"[{POSITIONS}, {POSITIONS}] or [B, {POSITIONS}, {POSITIONS}]"
        )


def _inter_fits(shape: tuple[int, ...], blocks: int) -> bool:
    if len(shape) not in (2, 3, 4) or shape[-1] != shape[-2] or shape[-1] < 1:
        return False
    if len(shape) == 2:
        return shape[-1] == blocks
    if len(shape) == 3:
        return shape[0] * shape[2] == blocks or (shape[0] == POSITIONS and shape[2] == blocks)
    return shape[0] == POSITIONS and shape[1] * shape[2] == blocks


def _check_last_axis(name: str, shape: tuple[int, ...], dtype: Any, rotation: TwoLevelRotation) -> None:
    validate(rotation)
    if not shape or shape[-1] != rotation.features:
        raise TorqError(
            f"{name} has shape {tuple(shape)}, the rotation has features {rotation.features}: "
            "the last axis must equal features"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TorqError(f"{name} has dtype {dtype}: must be floating")


def _einsum(spec: str, x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Product in at least float32. bfloat16 pairs stay as they are: their products are exact in float32."""
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    if x.dtype != matrix.dtype:
        x, matrix = x.astype(accumulate), matrix.astype(accumulate)
    return jnp.einsum(spec, x, matrix, precision=jax.lax.Precision.HIGHEST, preferred_element_type=accumulate)


def _apply_inter(x: jax.Array, inter: jax.Array | None, features: int) -> jax.Array:
    """``x [..., d]`` -> ``[..., d]``, accumulated in at least float32."""
    if inter is None:
        return x
    return mix_blocks(x.reshape(*x.shape[:-1], features // POSITIONS, POSITIONS), inter).reshape(x.shape)


def mix_blocks(x: jax.Array, inter: jax.Array) -> jax.Array:
    """The stage between blocks alone: ``x [..., B, 32]`` -> ``[..., B, 32]``, accumulated in at least float32."""
    blocks, size = x.shape[-2], inter.shape[-1]
    grouped = x.reshape(*x.shape[:-2], blocks // size, size, POSITIONS)  # [..., n, g, k]
    if by_position(inter.shape, blocks):
        matrix = inter.reshape(POSITIONS, blocks // size, size, size)
        mixed = _einsum("...ngk,kngh->...nhk", grouped, matrix)
    else:
        matrix = inter.reshape(blocks // size, size, size)
        mixed = _einsum("...ngk,ngh->...nhk", grouped, matrix)
    return mixed.reshape(x.shape)


def _apply_intra(x: jax.Array, intra: jax.Array | None) -> jax.Array:
    """``x [..., d]`` -> ``[..., d]``, accumulated in at least float32."""
    if intra is None:
        return x
    blocks = x.reshape(*x.shape[:-1], -1, POSITIONS)  # [..., b, k]
    mixed = _einsum("...bk,kl->...bl" if intra.ndim == 2 else "...bk,bkl->...bl", blocks, intra)
    return mixed.reshape(x.shape)


def _invert(matrix: jax.Array | None) -> jax.Array | None:
    if matrix is None:
        return None
    with jax.default_matmul_precision("highest"):  # LU and triangular solves multiply, too
        return jnp.linalg.inv(matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32)))


def _transpose(matrix: jax.Array | None) -> jax.Array | None:
    return None if matrix is None else jnp.swapaxes(matrix, -1, -2)


@jax.jit
def rotate(x: jax.Array, rotation: TwoLevelRotation) -> jax.Array:
    """Rotate an activation: ``x @ materialize(rotation)``.

    Args:
      x: ``[..., d]`` floating, ``d == rotation.features``.
      rotation: any form that :class:`TwoLevelRotation` names.

    Returns:
      ``[..., d]`` of x's dtype. Arithmetic is float32 (float64 for float64) throughout, rounded once.

    Raises:
      TorqError: sizes that do not fit, or a dtype that is not floating.
    """
    _check_last_axis("x", x.shape, x.dtype, rotation)
    mixed = _apply_inter(x, rotation.inter, rotation.features)
    return _apply_intra(mixed, rotation.intra).astype(x.dtype)


@jax.jit
def inverse(z: jax.Array, rotation: TwoLevelRotation) -> jax.Array:
    """Undo :func:`rotate`: ``z @ inv(materialize(rotation))``, orthogonal or not.

    Args:
      z: ``[..., d]`` floating, ``d == rotation.features``.
      rotation: any form; its matrices must be invertible.

    Returns:
      ``[..., d]`` of z's dtype; float32 arithmetic.

    Raises:
      TorqError: sizes that do not fit, or a dtype that is not floating.
    """
    _check_last_axis("z", z.shape, z.dtype, rotation)
    mixed = _apply_intra(z, _invert(rotation.intra))
    return _apply_inter(mixed, _invert(rotation.inter), rotation.features).astype(z.dtype)


@jax.jit
def fold(weight: jax.Array, rotation: TwoLevelRotation) -> jax.Array:
    """Fold a rotation into the weight that reads the activation: ``weight @ inv(T).T``.

    Args:
      weight: ``[..., out, d]`` floating, ``d == rotation.features``.
      rotation: any form; its matrices must be invertible.

    Returns:
      ``[..., out, d]`` of weight's dtype with ``rotate(x) @ fold(W).T == x @ W.T`` up to float32 rounding;
      :func:`fold_host` does the same in float64.

    Raises:
      TorqError: sizes that do not fit, or a dtype that is not floating.
    """
    _check_last_axis("weight", weight.shape, weight.dtype, rotation)
    # (A_inter A_intra)^-T = A_inter^-T A_intra^-T: the order of rotate, unlike that of inverse.
    mixed = _apply_inter(weight, _transpose(_invert(rotation.inter)), rotation.features)
    return _apply_intra(mixed, _transpose(_invert(rotation.intra))).astype(weight.dtype)


@jax.jit
def materialize(rotation: TwoLevelRotation) -> jax.Array:
    """The ``[d, d]`` float32 matrix ``T`` with ``x @ T == rotate(x)``. For tests and small sizes.

    Raises:
      TorqError: shapes that do not fit.
    """
    return rotate(jnp.eye(rotation.features, dtype=jnp.float32), rotation)


def astype(rotation: TwoLevelRotation, dtype: Any) -> TwoLevelRotation:
    """The rotation with its matrices rounded to ``dtype``; numpy leaves stay numpy, jax leaves jax."""

    def cast(matrix: Any) -> Any:
        # ml_dtypes narrows float64 through float32; both roundings are to nearest, so entries may differ from
        # a single rounding in rare ties. Harmless: weights are folded with the matrix as stored.
        return None if matrix is None else matrix.astype(dtype)

    return dataclasses.replace(rotation, inter=cast(rotation.inter), intra=cast(rotation.intra))


def fold_host(weight: np.ndarray, rotation: TwoLevelRotation, *, dtype: Any = np.float64) -> np.ndarray:
    """:func:`fold` on the host: float64 inverses of the matrices as stored.

    Args:
      weight: ``[out, d]`` numpy array of any floating type.
      rotation: concrete leaves of any floating type (bfloat16 as stored included).
      dtype: type of the products and of the result. ``numpy.float64`` is exact to about 1e-15 relative,
        ``numpy.float32`` to about 1e-7 in norm and twice as fast; inverses are float64 in either case.

    Returns:
      ``[out, d]`` of ``dtype``.

    Raises:
      TorqError: sizes that do not fit, a singular matrix, or ``dtype`` neither float32 nor float64.
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TorqError(f"dtype {dtype} is not supported: must be float32 or float64")
    weight = np.asarray(weight)
    if weight.ndim != 2:
        raise TorqError(f"weight has shape {weight.shape}: must be [out, features]")
    _check_last_axis("weight", weight.shape, weight.dtype, rotation)
    inter = _inverse_transpose_host("inter", rotation.inter, dtype)
    intra = _inverse_transpose_host("intra", rotation.intra, dtype)
    folded = np.empty(weight.shape, dtype)
    for start in range(0, weight.shape[0], _ROWS):
        rows = weight[start : start + _ROWS].astype(dtype)
        folded[start : start + _ROWS] = _rotate_host(rows, inter, intra, rotation.features)
    return folded


def rotate_host(x: np.ndarray, rotation: TwoLevelRotation) -> np.ndarray:
    """:func:`rotate` in float64 numpy, for solvers and reports.

    Args:
      x: ``[..., d]`` numpy array of any floating type.
      rotation: concrete leaves.

    Returns:
      ``[..., d]`` float64.

    Raises:
      TorqError: sizes that do not fit.
    """
    x = np.asarray(x)
    _check_last_axis("x", x.shape, x.dtype, rotation)
    flat = x.reshape(-1, rotation.features).astype(np.float64)
    inter, intra = _to_host(rotation.inter), _to_host(rotation.intra)
    return _rotate_host(flat, inter, intra, rotation.features).reshape(x.shape)


def _to_host(matrix: Any) -> np.ndarray | None:
    return None if matrix is None else np.asarray(matrix).astype(np.float64)


def _inverse_transpose_host(name: str, matrix: Any, dtype: np.dtype) -> np.ndarray | None:
    if matrix is None:
        return None
    try:
        inverted = np.linalg.inv(np.asarray(matrix).astype(np.float64))
    except np.linalg.LinAlgError as error:
        raise TorqError(f"{name} of shape {tuple(matrix.shape)} is singular: solve the site again") from error
    return np.swapaxes(inverted, -1, -2).astype(dtype)


def _rotate_host(
    x: np.ndarray, inter: np.ndarray | None, intra: np.ndarray | None, features: int
) -> np.ndarray:
    """``x [t, d]`` -> ``[t, d]`` as batched matrix products, in x's dtype."""
    tokens, blocks = x.shape[0], features // POSITIONS
    if inter is not None:
        size = inter.shape[-1]
        groups = blocks // size
        grouped = x.reshape(tokens, groups, size, POSITIONS)  # [t, n, g, k]
        if by_position(inter.shape, blocks):
            matrix = inter.reshape(POSITIONS, groups, size, size)
            mixed = np.matmul(np.ascontiguousarray(grouped.transpose(3, 1, 0, 2)), matrix)  # [k, n, t, g]
            x = mixed.transpose(2, 1, 3, 0).reshape(tokens, features)
        else:  # needs no transposed copy of x
            matrix = np.ascontiguousarray(np.swapaxes(inter.reshape(groups, size, size), -1, -2))
            x = np.matmul(matrix, grouped).reshape(tokens, features)
    if intra is not None and intra.ndim == 2:
        x = (x.reshape(-1, POSITIONS) @ intra).reshape(tokens, features)
    elif intra is not None:
        by_block = np.ascontiguousarray(x.reshape(tokens, blocks, POSITIONS).transpose(1, 0, 2))
        x = np.matmul(by_block, intra).transpose(1, 0, 2).reshape(tokens, features)
    return x


def orthogonality_error(rotation: TwoLevelRotation) -> float:
    """Largest entry of ``|R^T R - I|`` over all matrices of a rotation, in float64; 0 without matrices.

    Raises:
      TorqError: shapes that do not fit.
    """
    validate(rotation)
    errors = [0.0]
    for matrix in (_to_host(rotation.inter), _to_host(rotation.intra)):
        if matrix is not None:
            gram = np.swapaxes(matrix, -1, -2) @ matrix
            errors.append(float(np.max(np.abs(gram - np.eye(matrix.shape[-1])))))
    return float(np.max(errors))  # unlike max(), keeps a NaN


def orthogonality_tolerance(rotation: TwoLevelRotation) -> float:
    """The error that an orthogonal matrix may have once it is stored in the type of its leaves.

    Rounding moves each entry by at most ``u |r|`` with ``u = eps / 2``, so by Cauchy-Schwarz each entry of
    ``R^T R - I`` moves by at most ``2 u + u^2``. To that comes the solver's own rounding, at most about
    ``4 n`` units of float64 (of float32 for narrower leaves) after ``n`` Givens rotations or a QR.
    """
    tolerance = 0.0
    for matrix in (rotation.inter, rotation.intra):
        if matrix is not None:
            eps = float(ml_dtypes.finfo(matrix.dtype).eps)
            solver = 4 * matrix.shape[-1] * min(eps, float(np.finfo(np.float32).eps))
            tolerance = max(tolerance, eps + eps * eps / 4 + solver)
    return tolerance


def check_orthogonal(rotation: TwoLevelRotation, tolerance: float | None = None) -> float:
    """:func:`orthogonality_error`, when it is within ``tolerance``.

    Args:
      rotation: concrete leaves.
      tolerance: largest error allowed; None takes :func:`orthogonality_tolerance` of the storage type.

    Raises:
      TorqError: the error exceeds the tolerance, or is NaN.
    """
    error = orthogonality_error(rotation)
    limit = orthogonality_tolerance(rotation) if tolerance is None else tolerance
    if not error <= limit:
        raise TorqError(
            f"rotation of {rotation.features} features is not orthogonal: error {error:.3g} exceeds "
            f"{limit:.3g}; solve it again in float64, or do not treat it as orthogonal"
        )
    return error


def condition_number(rotation: TwoLevelRotation) -> float:
    """Bound on the condition number of the whole transform: the largest of each level's, multiplied.

    Raises:
      numpy.linalg.LinAlgError: a matrix that is not finite.
    """
    product = 1.0
    for matrix in (_to_host(rotation.inter), _to_host(rotation.intra)):
        if matrix is not None:
            product *= float(np.linalg.cond(matrix).max())
    return product


def online_cost(rotation: TwoLevelRotation) -> OnlineCost:
    """Multiply-adds a token and bfloat16 bytes read a step of a rotation.

    Inter mixes ``G`` blocks together (``d G`` multiply-adds), intra 32 positions (``32 d``).

    Raises:
      TorqError: shapes that do not fit.
    """
    validate(rotation)
    matrices = [matrix for matrix in (rotation.inter, rotation.intra) if matrix is not None]
    return OnlineCost(
        multiply_adds=sum(rotation.features * int(matrix.shape[-1]) for matrix in matrices),
        bytes_read=sum(2 * int(np.prod(matrix.shape)) for matrix in matrices),
    )
