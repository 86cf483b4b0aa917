"""What every solver returns."""

from __future__ import annotations

import dataclasses
from typing import Any

from torq_jax.rotation import TwoLevelRotation


@dataclasses.dataclass(frozen=True)
class Solution:
    """A rotation and what the solver has to say about it."""

    rotation: TwoLevelRotation
    """Float64 numpy leaves."""
    report: dict[str, Any]
    """Numbers and lists of numbers by name, ready for JSON."""
