"""A free factor for each block, folded into the transform: where in its octave a block's largest value lies.

A power-of-two scale leaves a block's largest magnitude anywhere within a factor of two, and the error with it. A
factor between 1 and 2 in the block's columns of the transform, and its inverse in the weight, moves it. Under the
``floor`` rule a factor of 4/3 has the effect of ``ceil`` on the exponent; with data the best factor is found by
trying. It pays only where a block's largest value varies little from token to token.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from torq_jax import mxfp4
from torq_jax.errors import TorqError
from torq_jax.mxfp4 import BLOCK, ScaleRule
from torq_jax.rotation import TwoLevelRotation, fold_host, rotate
from torq_jax.solvers.wush import diagonal_blocks
from torq_jax.statistics import SiteStatistics

FACTORS = (1.0, 2**0.25, 4 / 3, 2**0.5, 2**0.75)
"""Factors that are tried; a power of two changes nothing."""


class Prescaled(NamedTuple):
    """What :func:`prescale` returns."""

    rotation: TwoLevelRotation
    factors: Float[np.ndarray, " B"]
    """Of each block; all equal where the blocks share one matrix."""
    gain_db: float
    """By how much the sampled error fell."""


def prescale(rotation: TwoLevelRotation, statistics: SiteStatistics, rule: ScaleRule) -> Prescaled:
    """Scale the columns of a transform so that the cast that follows loses least on the sampled tokens.

    Args:
      rotation: with a matrix inside blocks; shared by all of them or one each. Other kinds have no place for factors.
      statistics: ``samples`` and ``sizes``; errors are weighed by ``gain`` where it is known, and each token by the
        inverse of its mean square.
      rule: scale rule of the cast.

    Returns:
      The rotation with float64 numpy leaves, ``intra`` scaled, and the factors.

    Raises:
      TorqError: a rotation without a matrix inside blocks, or statistics without sizes.
    """
    if rotation.intra is None:
        raise TorqError(
            "the rotation has no matrix inside blocks that could take a factor: leave prescale out"
        )
    if statistics.sizes is None:
        raise TorqError("the statistics hold no sizes of the sampled tokens: gather them again")
    blocks = rotation.features // BLOCK
    if statistics.gain is None:
        gains = np.broadcast_to(np.eye(BLOCK), (blocks, BLOCK, BLOCK))
    else:
        gains = _gains(rotation, np.asarray(statistics.gain, np.float64))
    raw = jnp.asarray(statistics.samples * statistics.sizes[:, None], jnp.float32)
    rotated = rotate(raw, jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), rotation))
    power = np.square(statistics.sizes)
    weights = np.where(power > 0, 1 / np.where(power > 0, power, 1.0), 0.0)
    costs = np.stack(  # [factors, B]
        [
            _cost(rotated, jnp.float32(f), jnp.asarray(gains, jnp.float32), jnp.asarray(weights), rule)
            for f in FACTORS
        ]
    ).astype(np.float64)
    shared = rotation.intra.ndim == 2
    chosen = np.full(blocks, costs.sum(axis=1).argmin()) if shared else costs.argmin(axis=0)
    factors = np.asarray(FACTORS)[chosen]
    after = costs[chosen, np.arange(blocks)].sum()
    intra = np.asarray(rotation.intra, np.float64) * (factors[0] if shared else factors[:, None, None])
    gain_db = float(10 * np.log10(costs[0].sum() / after)) if after > 0 else 0.0
    return Prescaled(dataclasses.replace(rotation, intra=intra), factors, gain_db)


def _gains(rotation: TwoLevelRotation, gain: np.ndarray) -> Float[np.ndarray, "B 32 32"]:
    """Blocks on the diagonal of ``T^-1 G T^-T``: what an error of the rotated activation costs, in any unit."""
    half = fold_host(gain, rotation)  # G T^-T
    return diagonal_blocks(fold_host(np.ascontiguousarray(half.T), rotation))


@functools.partial(jax.jit, static_argnums=4)
def _cost(
    rotated: Float[Array, "n d"],
    factor: Array,
    gains: Float[Array, "B 32 32"],
    weights: Float[Array, " n"],
    rule: ScaleRule,
) -> Float[Array, " B"]:
    lost = mxfp4.quantize_dequantize(rotated * factor, rule) / factor - rotated
    lost = lost.reshape(len(rotated), -1, BLOCK)
    weighed = jnp.einsum("nbk,bkl->nbl", lost, gains, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("nbl,nbl,n->b", weighed, lost, weights)
