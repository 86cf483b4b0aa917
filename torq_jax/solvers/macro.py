"""Macro-equilibrium: an orthogonal mix across blocks after which all blocks have the same energy.

By the Schur-Horn theorem every diagonal that the eigenvalues majorise is reachable by a rotation, the
constant one among them. Givens rotations reach it in at most ``n - 1`` steps when each sets one diagonal
entry exactly to the mean (Bendel and Mickey 1978; Chan and Li 1983; Davies and Higham 2000). TORQ's
(arXiv 2605.19561) macro stage is this on the second moment across blocks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float64, Int64

from torq_jax.errors import TorqError
from torq_jax.rotation import POSITIONS

Form = Literal["shared", "per_position"]
FORMS: tuple[str, ...] = get_args(Form)

# Deviations below this share of the trace are rounding: a diagonal entry of Q^T S Q carries an error of a few
# float64 units of the trace. With up to 1e6 blocks that stays far below the promised 1e-6 of the mean.
_ROUNDING = 1e-14


class Equalised(NamedTuple):
    """Rotations that make diagonals constant."""

    rotation: Float64[np.ndarray, "*batch n n"]
    """Orthogonal ``Q``; every diagonal entry of ``Q^T S Q`` is ``trace(S) / n``."""
    rotations: Int64[np.ndarray, "*batch"]
    """Givens rotations used, at most ``n - 1``."""


def equalise(moment: Float64[np.ndarray, "*batch n n"]) -> Equalised:
    """Rotate symmetric matrices so that each one's diagonal is constant.

    Each step takes, in every matrix that is not done, the smallest diagonal entry ``i`` and the largest ``j``
    (they lie on opposite sides of the mean ``m``) and turns their plane by the smaller angle with
    ``(s_jj - m) tan^2 t - 2 s_ij tan t + (s_ii - m) = 0``, which sets entry ``i`` to ``m``.

    Args:
      moment: symmetric, any number of leading axes.

    Returns:
      See :class:`Equalised`. Deterministic: ties go to the lower index.

    Raises:
      TorqError: not square, or not finite.
    """
    moment = np.asarray(moment, np.float64)
    if moment.ndim < 2 or moment.shape[-1] != moment.shape[-2] or not moment.shape[-1]:
        raise TorqError(f"moment has shape {moment.shape}: must be [..., n, n]")
    if not np.isfinite(moment).all():
        raise TorqError("moment holds a NaN or an infinity: calibrate again with finite activations")
    n = moment.shape[-1]
    s = moment.reshape(-1, n, n)
    # Rotations do not depend on units; near one, squares neither overflow nor vanish. 2^n is exact.
    s = np.ldexp(s, -np.frexp(np.abs(s).max(axis=(1, 2), keepdims=True))[1])  # [m, n, n], a copy
    rotation = np.broadcast_to(np.eye(n), s.shape).copy()  # transposed: rows are the columns of Q
    count = np.zeros(len(s), np.int64)

    diagonal = np.einsum("mii->mi", s)  # a view
    trace = diagonal.sum(axis=-1)
    mean = trace / n
    tolerance = _ROUNDING * np.abs(diagonal).sum(axis=-1)
    for _ in range(n - 1):
        deviation = diagonal - mean[:, None]
        low, high = deviation.argmin(axis=-1), deviation.argmax(axis=-1)
        every = np.arange(len(s))
        # Both signs are needed for a real angle; rounding may leave only one.
        below, above = deviation[every, low], deviation[every, high]
        m = every[(below < 0) & (above > 0) & (np.maximum(-below, above) > tolerance)]
        if not len(m):
            break
        i, j, below, above = low[m], high[m], below[m], above[m]
        off = s[m, i, j]
        # The smaller root, written without cancellation: below * above < 0, so the divisor is no zero.
        tangent = below / (off + np.copysign(np.sqrt(off * off - below * above), off))
        cosine = 1 / np.sqrt(1 + tangent * tangent)
        sine = tangent * cosine

        total = s[m, i, i] + s[m, j, j]
        _turn_rows(s, m, i, j, cosine, sine)
        s[m, :, i], s[m, :, j] = s[m, i], s[m, j]  # off the plane, columns are rows
        s[m, i, j] = s[m, j, i] = (off + tangent * (below - above - tangent * off)) * cosine * cosine
        s[m, i, i], s[m, j, j] = mean[m], total - mean[m]
        _turn_rows(rotation, m, i, j, cosine, sine)
        count[m] += 1
    transposed = np.swapaxes(rotation, -1, -2)
    return Equalised(np.ascontiguousarray(transposed).reshape(moment.shape), count.reshape(moment.shape[:-2]))


def _turn_rows(
    a: np.ndarray, m: np.ndarray, i: np.ndarray, j: np.ndarray, cosine: np.ndarray, sine: np.ndarray
) -> None:
    first, second = a[m, i], a[m, j]  # [m, n]
    cosine, sine = cosine[:, None], sine[:, None]
    a[m, i], a[m, j] = cosine * first - sine * second, sine * first + cosine * second


def solve_inter(
    inter: Float64[np.ndarray, "32 B B"], *, form: Form = "shared", group: int | None = None
) -> Equalised:
    """The inter matrix of a site from its second moments.

    Args:
      inter: ``inter[k, b, c] = E x[b, k] x[c, k]``.
      form: ``"shared"`` equalises the energies of whole blocks with one matrix for all positions;
        ``"per_position"`` equalises at each position, and thereby whole blocks too.
      group: mix only inside groups of this many contiguous blocks; None mixes all ``B``.

    Returns:
      ``rotation`` ``[B, B]``, ``[B/G, G, G]``, ``[32, B, B]`` or ``[32, B/G, G, G]``.

    Raises:
      TorqError: an unknown form, a group size that does not divide B, or a misshapen or non-finite moment.
    """
    if inter.ndim != 3 or inter.shape[0] != POSITIONS or inter.shape[1] != inter.shape[2]:
        raise TorqError(f"inter has shape {inter.shape}: must be [{POSITIONS}, B, B]")
    if form not in FORMS:
        raise TorqError(f"unknown form {form!r}: must be one of {', '.join(FORMS)}")
    blocks = inter.shape[-1]
    size = blocks if group is None else group
    if not isinstance(size, int) or size < 1 or blocks % size:
        raise TorqError(f"group {group} does not divide the site's {blocks} blocks: choose a divisor or None")
    moment = inter.sum(axis=0) if form == "shared" else inter
    if size == blocks:
        return equalise(moment)
    index = np.arange(blocks).reshape(-1, size)  # [B/G, G]
    return equalise(moment[..., index[:, :, None], index[:, None, :]])


def block_energies(
    inter: Float64[np.ndarray, "32 B B"], rotation: np.ndarray | None = None
) -> Float64[np.ndarray, "32 B"]:
    """``E x[b, k]^2`` of each position of each block, after the inter matrix ``rotation`` when given."""
    if rotation is None:
        return np.einsum("kbb->kb", inter)
    blocks, size = inter.shape[-1], rotation.shape[-1]
    by_position = rotation.ndim == 4 or (rotation.ndim == 3 and rotation.shape[0] * size != blocks)
    matrix = rotation.reshape(POSITIONS if by_position else 1, blocks // size, size, size)
    index = np.arange(blocks).reshape(-1, size)
    grouped = inter[:, index[:, :, None], index[:, None, :]]  # [32, B/G, G, G]
    return ((grouped @ matrix) * matrix).sum(axis=-2).reshape(POSITIONS, blocks)
