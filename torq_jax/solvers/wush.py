"""WUSH (arXiv 2512.00956): the best invertible transform inside each block, in closed form.

After a mixing transform the rounding error of a block is spread evenly and proportional to the block's energy,
so the errors of activation and weight both cost ``c / 32 * sum_b tr(S_b) tr(G_b)``, with S_b the second moment of
the activation in block b and G_b the gain. The transform that minimises a block's product makes both moments the
same, ``s``, the singular values of ``G_b^1/2 S_b^1/2``: the product falls to their sum squared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from torq_jax.errors import TorqError
from torq_jax.rotation import POSITIONS, TwoLevelRotation, validate
from torq_jax.solvers.hadamard import hadamard_matrix
from torq_jax.solvers.solution import Solution
from torq_jax.statistics import SiteStatistics

Moments = Float64[np.ndarray, "B 32 32"]


def solve(statistics: SiteStatistics, *, seed: int = 0, ridge: float = 1e-4) -> Solution:
    """One matrix for each block.

    Args:
      statistics: ``second`` and ``gain`` decide.
      seed: not used.
      ridge: added to the diagonals of both moments, in parts of each block's mean.

    Returns:
      The transform, general, not orthogonal; the report has the modelled error's gain over block Hadamard in dB
      (which keeps block energies, as the identity does), and the largest condition number.

    Raises:
      TorqError: moments or gain are missing, or the ridge is not positive.
    """
    second, gain = moments(statistics, "wush")
    s, g = diagonal_blocks(second), diagonal_blocks(gain)
    intra = block_transforms(s, g, ridge=ridge)
    rotation = TwoLevelRotation(None, intra, second.shape[0])
    validate(rotation)
    return Solution(rotation, report(s, g, intra))


def moments(
    statistics: SiteStatistics, method: str
) -> tuple[Float[np.ndarray, "d d"], Float[np.ndarray, "d d"]]:
    """Second moment and gain of a site; an error where one is missing."""
    if statistics.second is None or statistics.gain is None:
        missing = "second moment" if statistics.second is None else "gain"
        raise TorqError(
            f"the statistics hold no {missing}: method {method!r} needs activations gathered with moments='full' and "
            "the gain of an error (W^T W, or from gradients); fit takes weight= for it"
        )
    second, gain = statistics.second, statistics.gain
    features = statistics.samples.shape[-1]
    if second.shape != (features, features) or gain.shape != second.shape or features % POSITIONS:
        raise TorqError(
            f"second moment {second.shape} and gain {gain.shape} of {features} features: both must be [d, d], d a "
            f"multiple of {POSITIONS}; pad them with zeros"
        )
    if not (np.isfinite(second).all() and np.isfinite(gain).all()):
        raise TorqError("the second moment or the gain holds a NaN or an infinity: calibration failed")
    return second, gain


def diagonal_blocks(matrix: Float[np.ndarray, "d d"]) -> Moments:
    """The ``[32, 32]`` blocks on the diagonal, in units of the mean of the diagonal."""
    blocks = matrix.shape[0] // POSITIONS
    index = np.arange(blocks)
    found = matrix.reshape(blocks, POSITIONS, blocks, POSITIONS)[index, :, index].astype(np.float64)
    mean = np.trace(found, axis1=1, axis2=2).sum() / matrix.shape[0]
    return found / mean if mean > 0 else found


def block_transforms(second: Moments, gain: Moments, *, ridge: float = 1e-4) -> Moments:
    """The closed form: ``T = G^1/2 U s^-1/2 H`` with ``U s V^T = G^1/2 S^1/2``; norms as of rotations.

    A Hadamard matrix comes last: it leaves both moments' products alone and spreads every direction evenly.
    """
    if not 0 < ridge < 1:
        raise TorqError(f"ridge {ridge} must lie between 0 and 1: 1e-4 is usual")
    g = _root(ridged(gain, ridge))
    u, s, _ = np.linalg.svd(g @ _root(ridged(second, ridge)))
    found = (g @ u) / np.sqrt(s)[:, None] @ hadamard_matrix()
    return found * np.sqrt(POSITIONS) / np.linalg.norm(found, axis=(1, 2), keepdims=True)


def modelled_error(second: Moments, gain: Moments, transforms: Moments | None = None) -> float:
    """``sum_b tr(S_b) tr(G_b) / 32`` after block transforms."""
    if transforms is not None:
        inverse = np.linalg.inv(transforms)
        second = transforms.mT @ second @ transforms
        gain = inverse @ gain @ inverse.mT
    traces = np.trace(second, axis1=1, axis2=2) * np.trace(gain, axis1=1, axis2=2)
    return float(traces.sum() / POSITIONS)


def report(second: Moments, gain: Moments, transforms: Moments) -> dict[str, Any]:
    """What the closed form says of the block stage."""
    before, after = modelled_error(second, gain), modelled_error(second, gain, transforms)
    condition = float(np.linalg.cond(transforms).max())
    return {"block_gain_db": decibels(before, after), "condition_number": condition}


def decibels(before: float, after: float) -> float:
    """How far an error fell; 0 where there was none."""
    return float(10 * np.log10(before / after)) if before > 0 and after > 0 else 0.0


def ridged(moment: Any, ridge: float) -> Any:
    """``moment [..., 32, 32]``, of numpy or jax, with ``ridge`` times its mean diagonal added to the diagonal."""
    mean = moment.trace(axis1=-2, axis2=-1) / POSITIONS
    # A block that is always zero still needs an invertible transform: any will do.
    floor = ridge * (mean + (mean <= 0))
    return moment + floor[..., None, None] * np.eye(POSITIONS, dtype=moment.dtype)


def _root(moment: Moments) -> Moments:
    values, vectors = np.linalg.eigh((moment + moment.mT) / 2)
    values = np.maximum(values, 1e-12 * values[:, -1:])
    return (vectors * np.sqrt(values)[:, None]) @ vectors.mT
