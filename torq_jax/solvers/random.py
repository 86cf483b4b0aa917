"""Random orthogonal matrices inside blocks: what any mixing does, Hadamard's structure apart."""

from __future__ import annotations

from typing import Literal

import numpy as np

from torq_jax.rotation import POSITIONS, TwoLevelRotation, validate
from torq_jax.solvers.solution import Solution
from torq_jax.statistics import SiteStatistics


def solve(
    statistics: SiteStatistics, *, seed: int = 0, form: Literal["shared", "per_block"] = "shared"
) -> Solution:
    """Drawn from Haar's measure: the QR decomposition of a normal matrix, signs fixed.

    Args:
      statistics: only its size is used.
      seed: of the draw.
      form: one matrix for all blocks, or one for each.
    """
    features = statistics.samples.shape[-1]
    blocks = features // POSITIONS if form == "per_block" else 1
    drawn = np.random.default_rng(seed).standard_normal((blocks, POSITIONS, POSITIONS))
    q, r = np.linalg.qr(drawn)
    q *= np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    rotation = TwoLevelRotation(None, q if form == "per_block" else q[0], features)
    validate(rotation)
    return Solution(rotation, {"form": form})
