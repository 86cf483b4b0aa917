"""Block Hadamard: one normalised 32 x 32 Hadamard matrix inside every block; looks at no data."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from jaxtyping import Float64

from torq_jax.rotation import POSITIONS, TwoLevelRotation, validate
from torq_jax.solvers.solution import Solution
from torq_jax.statistics import SiteStatistics


def hadamard_matrix(size: int = POSITIONS, signs: np.ndarray | None = None) -> Float64[np.ndarray, "n n"]:
    """Sylvester's matrix over ``sqrt(size)``, its rows multiplied by ``signs [size]`` when given.

    ``size`` is a power of two. Orthogonal to float64 rounding; symmetric without signs.
    """
    matrix = scipy.linalg.hadamard(size, dtype=np.float64) / np.sqrt(size)
    return matrix if signs is None else signs[:, None] * matrix


def solve(statistics: SiteStatistics, *, seed: int = 0, signs: bool = False) -> Solution:
    """The shared Hadamard matrix inside blocks.

    Args:
      statistics: only its size is used.
      seed: of the random signs.
      signs: whether position k is first multiplied by a random sign.

    Raises:
      TorqError: the site's size is no multiple of 32.
    """
    drawn = np.random.default_rng(seed).choice([-1.0, 1.0], POSITIONS) if signs else None
    rotation = TwoLevelRotation(None, hadamard_matrix(signs=drawn), statistics.samples.shape[-1])
    validate(rotation)
    return Solution(rotation, {"signs": signs})
