"""One Hadamard-like rotation of the full width, as QuaRot (arXiv 2404.00456) rotates for integer formats.

A baseline that is known to do badly in block formats: energy spreads over all blocks, and small blocks lose the
small scales that they had.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import scipy.linalg
from jaxtyping import Float64

from torq_jax.rotation import POSITIONS, TwoLevelRotation, identity, validate
from torq_jax.solvers.hadamard import hadamard_matrix
from torq_jax.solvers.solution import Solution
from torq_jax.statistics import SiteStatistics


def solve(statistics: SiteStatistics, *, seed: int = 0) -> Solution:
    """Mixes all blocks, then inside them.

    Args:
      statistics: only its size is used.
      seed: of random signs of the blocks, where the matrix across them is no Hadamard matrix.

    Returns:
      The Kronecker product of a matrix across B blocks and Sylvester's inside; the report names the first:
      a Hadamard matrix where B is a power of two, or one times 12, 20 or 28 (Paley's constructions); else an
      orthonormal cosine transform of B's odd part times Sylvester's, with random signs.

    Raises:
      TorqError: the site's size is no multiple of 32.
    """
    features = statistics.samples.shape[-1]
    validate(identity(features))
    blocks = features // POSITIONS
    inter, kind = across_blocks(blocks, seed)
    rotation = TwoLevelRotation(inter, hadamard_matrix(), features)
    validate(rotation)
    return Solution(rotation, {"across_blocks": kind})


def across_blocks(blocks: int, seed: int) -> tuple[Float64[np.ndarray, "B B"], str]:
    """An orthogonal matrix that spreads each block over all of them, and its name."""
    power = blocks & -blocks
    odd = blocks // power
    if odd == 1:
        return hadamard_matrix(blocks), "Hadamard (Sylvester)"
    if odd in (3, 5, 7) and power >= 4:
        order = 4 * odd
        core = _paley_two(order) if order == 28 else _paley(order)
        return np.kron(core, hadamard_matrix(power // 4)), f"Hadamard (Paley {order} x Sylvester)"
    cosine = scipy.fft.dct(np.eye(odd), axis=0, norm="ortho")
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], blocks)
    mixed = np.kron(cosine, hadamard_matrix(power))
    return signs[:, None] * mixed, f"cosine transform of {odd} x Sylvester, random signs"


def _paley(order: int) -> Float64[np.ndarray, "n n"]:
    """Paley's first construction for a prime ``order - 1`` that is 3 modulo 4."""
    skew = _bordered(order - 1)
    skew[1:, 0] = -1
    return (skew + np.eye(order)) / np.sqrt(order)


def _paley_two(order: int) -> Float64[np.ndarray, "n n"]:
    """Paley's second construction for a prime ``order / 2 - 1`` that is 1 modulo 4."""
    conference = _bordered(order // 2 - 1)  # symmetric
    one, other = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return (np.kron(conference, one) + np.kron(np.eye(order // 2), other)) / np.sqrt(order)


def _bordered(prime: int) -> Float64[np.ndarray, "n n"]:
    """The quadratic characters of differences modulo a prime, with a border of ones."""
    squares = {i * i % prime for i in range(1, prime)}
    character = np.array([0] + [1 if i in squares else -1 for i in range(1, prime)])
    matrix = np.ones((prime + 1, prime + 1))
    index = np.arange(prime)
    matrix[1:, 1:] = character[(index[:, None] - index) % prime]
    matrix[0, 0] = 0
    return matrix
