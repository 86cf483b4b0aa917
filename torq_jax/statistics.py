"""Streaming calibration statistics of a site: what a solver needs to know of the activations that enter it.

A token's activation is divided by its own root mean square first. The first token of a sequence (the
attention sink) carries activations hundreds of times larger than the rest; unweighted, it alone would
decide every rotation.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from torq_jax.errors import TorqError
from torq_jax.mxfp4 import BLOCK, padded_size


@dataclasses.dataclass(frozen=True)
class SiteStatistics:
    """Statistics of the activations x of one site, read as ``[B, 32]`` blocks a token, ``d = 32 B``.

    Two of them add up with :func:`add`: a stream of any length needs the memory of one.
    """

    tokens: float
    """Tokens seen, zero ones left out."""
    inter: Float64[np.ndarray, "32 B B"]
    """Mean over tokens of ``x[b, k] x[c, k]``, for each position k; of normalised tokens."""
    samples: Float[np.ndarray, "n d"]
    """Normalised activations of a sample of tokens, float32."""


jax.tree_util.register_dataclass(SiteStatistics, ["tokens", "inter", "samples"], [])


def gather(
    x: Float[Array, "tokens features"], *, samples: int | None = None, seed: int = 0, moments: bool = True
) -> SiteStatistics:
    """Statistics of one batch of activations.

    Args:
      x: activations, any float dtype; padded with zeros to a multiple of 32 features.
      samples: how many tokens to keep, drawn without replacement; all when None.
      seed: of the draw.
      moments: whether to gather ``inter`` (zeros otherwise): solvers that never look at it need not pay.

    Raises:
      TorqError: ``x`` is not a matrix, has no token, or holds a NaN or an infinity.
    """
    if x.ndim != 2 or not x.shape[0]:
        raise TorqError(f"activations have shape {x.shape}: must be [tokens, features] with a token at least")
    count = x.shape[0]
    rows = np.arange(count)
    if samples is not None and samples < count:
        rows = np.sort(np.random.default_rng(seed).choice(count, samples, replace=False))
    tokens, inter, kept = _gather(jnp.asarray(x), jnp.asarray(rows), moments)
    if not np.isfinite(tokens):
        raise TorqError("activations hold a NaN or an infinity: calibration would be meaningless")
    total = float(tokens)
    return SiteStatistics(total, np.asarray(inter, np.float64) / max(total, 1.0), np.asarray(kept))


def add(a: SiteStatistics, b: SiteStatistics) -> SiteStatistics:
    """Statistics of both streams together."""
    tokens = a.tokens + b.tokens
    weight = b.tokens / tokens if tokens else 0.0
    return SiteStatistics(
        tokens, a.inter + (b.inter - a.inter) * weight, np.concatenate([a.samples, b.samples])
    )


def normalise_tokens(x: Float[Array, "tokens d"]) -> Float[Array, "tokens d"]:
    """Each token over its root mean square, in float32; zero tokens stay zero."""
    x = x.astype(jnp.float32)
    power = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jnp.where(power > 0, jax.lax.rsqrt(jnp.where(power > 0, power, 1.0)), 0.0)


@functools.partial(jax.jit, static_argnums=2)
def _gather(x: Array, rows: Array, moments: bool) -> tuple[Array, Array, Array]:
    x = jnp.pad(x, ((0, 0), (0, padded_size(x.shape[1]) - x.shape[1])))
    x = normalise_tokens(x)
    # A NaN anywhere makes the count NaN, which the caller reports.
    tokens = jnp.sum(jnp.sign(jnp.sum(x * x, axis=-1)))
    blocks = x.shape[1] // BLOCK
    if not moments:
        return tokens, jnp.zeros((BLOCK, blocks, blocks)), x[rows]
    by_position = x.reshape(x.shape[0], blocks, BLOCK)
    inter = jnp.einsum("tbk,tck->kbc", by_position, by_position, precision=jax.lax.Precision.HIGHEST)
    return tokens, inter, x[rows]
