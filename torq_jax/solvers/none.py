"""No rotation: plain rounding, the baseline of every table."""

from __future__ import annotations

from torq_jax.rotation import identity
from torq_jax.solvers.solution import Solution
from torq_jax.statistics import SiteStatistics


def solve(statistics: SiteStatistics, *, seed: int = 0) -> Solution:
    """The identity; ``seed`` has no effect.

    Raises:
      TorqError: the site's size is no multiple of 32.
    """
    del seed
    return Solution(identity(statistics.samples.shape[-1]), {})
