"""Streaming calibration statistics of a site: what a solver needs to know of the activations that enter it.

A token's activation is divided by its own root mean square first. The first token of a sequence (the
attention sink) carries activations hundreds of times larger than the rest; unweighted, it alone would
decide every rotation. The full second moment can be weighed better than that: by how much the loss reacts
to an error of that token (see :mod:`torq_jax.sensitivity`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from torq_jax import experts
from torq_jax.errors import TorqError
from torq_jax.matmul import prepare
from torq_jax.mxfp4 import BLOCK, ScaleRule, padded_size
from torq_jax.rotation import TwoLevelRotation


@dataclasses.dataclass(frozen=True)
class ExpertStatistics:
    """What each expert of a layer saw of a site's activations."""

    tokens: Float64[np.ndarray, " E"]
    """How many activations went to each."""
    samples: Int[np.ndarray, " n"]
    """For each of the site's samples, an expert that it went to."""
    second: Float[np.ndarray, "E d d"] | None = None
    """Weighted sum over these of ``x^T x``, with the weights of :attr:`SiteStatistics.second`; None where it was not
    asked for."""


jax.tree_util.register_dataclass(ExpertStatistics, ["tokens", "samples", "second"], [])


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
    second: Float[np.ndarray, "d d"] | None = None
    """Weighted mean over tokens of ``x^T x``; None where it was not asked for. Its scale has no meaning."""
    gain: Float[np.ndarray, "d d"] | None = None
    """What an error of the activation costs: ``E[u^T u]`` with u the gradient of the loss with respect to x,
    or ``W^T W``, the error of the output. None where unknown. Its scale has no meaning."""
    outputs: int | None = None
    """Rows of all the weights that the site feeds: what an online part's cost is measured against."""
    sizes: Float[np.ndarray, " n"] | None = None
    """Root mean square of each sampled token before it was normalised; None where it was not kept."""
    experts: ExpertStatistics | None = None
    """Of a site whose weights are those of experts."""


jax.tree_util.register_dataclass(
    SiteStatistics, ["tokens", "inter", "samples", "second", "gain", "sizes", "experts"], ["outputs"]
)


@dataclasses.dataclass(frozen=True)
class RoundedStatistics:
    """What rounding does to a site's activations x once they are rotated: means over tokens, each with its weight.

    Two of them add up with :func:`add_rounded`.
    """

    weight: float
    """Sum of the tokens' weights."""
    cross: Float[np.ndarray, "d d"]
    """``E[x^T x_q]``."""
    second: Float[np.ndarray, "d d"]
    """``E[x_q^T x_q]``."""
    exact: Float[np.ndarray, " d"]
    """``E[x]``."""
    rounded: Float[np.ndarray, " d"]
    """``E[x_q]``."""


Moments = Literal["none", "inter", "full"]
"""What :func:`gather` gathers beside samples: nothing, ``inter``, or ``inter`` and ``second``."""


def gather(
    x: Float[Array, "tokens features"],
    *,
    samples: int | None = None,
    seed: int = 0,
    moments: Moments = "inter",
    weights: Float[Array, " tokens"] | None = None,
) -> SiteStatistics:
    """Statistics of one batch of activations.

    Args:
      x: activations, any float dtype; padded with zeros to a multiple of 32 features.
      samples: how many tokens to keep, drawn without replacement; all when None.
      seed: of the draw.
      moments: which second moments to gather: solvers that never look at them need not pay.
        Without, ``inter`` is zeros and ``second`` None.
      weights: of each token in ``second``, whose activations then are not normalised; None weighs a token by
        the inverse of its mean square.

    Raises:
      TorqError: ``x`` is not a matrix, has no token, or it or the weights hold a NaN, an infinity or (the
        weights) a negative number.
    """
    if moments not in get_args(Moments):
        raise TorqError(f"moments {moments!r}: must be one of {', '.join(get_args(Moments))}")
    if x.ndim != 2 or not x.shape[0]:
        raise TorqError(f"activations have shape {x.shape}: must be [tokens, features] with a token at least")
    count = x.shape[0]
    rows = sampled(count, samples, seed)
    if weights is not None:
        weights = check_weights(weights, count)
    sums, kept, sizes = sum_up(jnp.asarray(x), jnp.asarray(rows), weights, moments)
    return from_sums(sums, kept, sizes)


def sampled(count: int, samples: int | None, seed: int) -> Int[np.ndarray, " n"]:
    """Which of ``count`` tokens are kept: all when ``samples`` is None."""
    if samples is None or samples >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, samples, replace=False))


def check_weights(weights: Float[Array, " tokens"], count: int) -> Float[Array, " tokens"]:
    """Weights of ``count`` tokens as float32; TorqError for what cannot be weights."""
    weights = jnp.asarray(weights, jnp.float32)
    if weights.shape != (count,) or not bool(jnp.all(jnp.isfinite(weights) & (weights >= 0))):
        raise TorqError(f"weights of shape {weights.shape} for {count} tokens: must be finite, none negative")
    return weights


def from_sums(sums: tuple[Any, Any, Any], kept: Any, sizes: Any) -> SiteStatistics:
    """Statistics from what :func:`sum_up` returns, of one batch or added up over several.

    Raises:
      TorqError: activations that are not finite.
    """
    tokens, inter, second = sums
    if not np.isfinite(tokens):
        raise TorqError("activations hold a NaN or an infinity: calibration would be meaningless")
    total = float(tokens)
    return SiteStatistics(
        total,
        np.asarray(inter, np.float64) / max(total, 1.0),
        np.asarray(kept),
        None if second is None else np.asarray(second) / np.float32(max(total, 1.0)),
        sizes=np.asarray(sizes),
    )


def add(a: SiteStatistics, b: SiteStatistics) -> SiteStatistics:
    """Statistics of both streams together; what one of them lacks, the sum lacks."""
    tokens = a.tokens + b.tokens
    weight = b.tokens / tokens if tokens else 0.0

    def mean(x: np.ndarray | None, y: np.ndarray | None) -> np.ndarray | None:
        return None if x is None or y is None else x + (y - x) * x.dtype.type(weight)

    return SiteStatistics(
        tokens,
        a.inter + (b.inter - a.inter) * weight,
        np.concatenate([a.samples, b.samples]),
        mean(a.second, b.second),
        mean(a.gain, b.gain),
        a.outputs if a.outputs == b.outputs else None,
        None if a.sizes is None or b.sizes is None else np.concatenate([a.sizes, b.sizes]),
        None if a.experts is None or b.experts is None else _add_experts(a.experts, b.experts),
    )


def _add_experts(a: ExpertStatistics, b: ExpertStatistics) -> ExpertStatistics:
    second = None if a.second is None or b.second is None else a.second + b.second
    return ExpertStatistics(a.tokens + b.tokens, np.concatenate([a.samples, b.samples]), second)


def expert_second(gathered: SiteStatistics, expert: int, prior: float) -> Float[np.ndarray, "d d"]:
    """Second moment of what one expert saw, filled up with the site's where that is little.

    ``(n S_own + prior S_site) / (n + prior)`` of ``n`` activations: without any it is the site's, and it is never
    singular where the site's is not.

    Args:
      gathered: with both second moments.
      expert: its index.
      prior: how many activations the site's moment counts for.

    Raises:
      TorqError: statistics without them.
    """
    own = gathered.experts
    if own is None or own.second is None or gathered.second is None:
        raise TorqError('the experts\' second moments were not gathered: gather with moments="full"')
    return (own.second[expert] + np.float32(prior) * gathered.second) / np.float32(own.tokens[expert] + prior)


def gather_rounded(
    x: Float[Array, "tokens features"],
    transform: TwoLevelRotation | None,
    activation_scale: ScaleRule,
    *,
    weights: Float[Array, " tokens"] | None = None,
) -> RoundedStatistics:
    """What rounding does to one batch of activations.

    Args:
      x: activations before the rotation, any float dtype; padded as :func:`torq_jax.matmul.prepare` does.
      transform: the site's rotation as it runs.
      activation_scale: scale rule of the cast.
      weights: of each token; None weighs a token by the inverse of its mean square, as :func:`gather` does.

    Raises:
      TorqError: activations that are not finite, or sizes that do not fit.
    """
    return from_rounded_sums(sum_up_rounded(x, transform, activation_scale, weights))


def from_rounded_sums(sums: tuple[Any, ...]) -> RoundedStatistics:
    """Statistics from what :func:`sum_up_rounded` returns; raises TorqError for what is not finite."""
    weight, *means = sums
    total = float(weight)
    if not np.isfinite(total) or not np.isfinite(np.asarray(means[-1])).all():
        raise TorqError("activations hold a NaN or an infinity: calibration would be meaningless")
    return RoundedStatistics(total, *(np.asarray(m) / np.float32(max(total, 1e-30)) for m in means))


def add_rounded(a: RoundedStatistics, b: RoundedStatistics) -> RoundedStatistics:
    """Statistics of both streams together."""
    weight = a.weight + b.weight
    share = np.float32(b.weight / weight if weight else 0.0)
    pairs = ((getattr(a, k), getattr(b, k)) for k in ("cross", "second", "exact", "rounded"))
    return RoundedStatistics(weight, *(x + (y - x) * share for x, y in pairs))


@functools.partial(jax.jit, static_argnums=2)
def sum_up_rounded(
    x: Array, transform: TwoLevelRotation | None, activation_scale: ScaleRule, weights: Array | None
) -> tuple[Array, ...]:
    """Sums over tokens that :class:`RoundedStatistics` has means of, in its order; see :func:`gather_rounded`."""
    x = x.astype(jnp.float32)
    if weights is None:
        power = jnp.mean(x * x, axis=-1)
        weights = jnp.where(power > 0, 1 / jnp.where(power > 0, power, 1.0), 0.0)
    exact = prepare(x, transform, None)
    rounded = prepare(x, transform, activation_scale)
    exact = jnp.pad(exact, ((0, 0), (0, rounded.shape[1] - exact.shape[1])))
    high = jax.lax.Precision.HIGHEST
    weighed = rounded * weights[:, None]
    moments = (jnp.einsum("tc,td->cd", a, weighed, precision=high) for a in (exact, rounded))
    return jnp.sum(weights), *moments, weights @ exact, weights @ rounded


@functools.partial(jax.jit, static_argnums=(3, 4))
def sum_up_experts(
    x: Float[Array, "rows features"],
    chosen: Int[Array, "tokens k"],
    weights: Float[Array, " rows"] | None,
    count: int,
    moments: bool,
) -> tuple[Float[Array, " E"], Float[Array, "E d d"] | None]:
    """Sums over tokens that :class:`ExpertStatistics` has, ``tokens`` and ``second``.

    Args:
      x: an activation for each token, or for each of its experts.
      chosen: experts of each token.
      weights: of each activation, as :func:`gather` takes them.
      count: of experts.
      moments: whether the second moments are wanted.
    """
    pairs = chosen.reshape(-1)
    tokens = jnp.bincount(pairs, length=count).astype(jnp.float32)
    if not moments:
        return tokens, None
    raw = jnp.pad(x, ((0, 0), (0, padded_size(x.shape[1]) - x.shape[1]))).astype(jnp.float32)
    weighed = normalise_tokens(raw) if weights is None else raw * jnp.sqrt(weights)[:, None]
    cut = experts.tiles(pairs, count)
    return tokens, experts.moments(weighed, cut, experts=count, pairs=pairs.shape[0])


def output_gain(weights: Float[np.ndarray, "outputs features"]) -> Float[np.ndarray, "d d"]:
    """``W^T W`` of all the weights that a site feeds, stacked: the gain where errors count as the output's do."""
    stacked = np.asarray(weights, np.float32)
    stacked = np.pad(stacked, ((0, 0), (0, padded_size(stacked.shape[1]) - stacked.shape[1])))
    return stacked.T @ stacked


def normalise_tokens(x: Float[Array, "tokens d"]) -> Float[Array, "tokens d"]:
    """Each token over its root mean square, in float32; zero tokens stay zero."""
    x = x.astype(jnp.float32)
    power = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jnp.where(power > 0, jax.lax.rsqrt(jnp.where(power > 0, power, 1.0)), 0.0)


@functools.partial(jax.jit, static_argnums=3)
def sum_up(
    x: Float[Array, "tokens features"],
    rows: Int[Array, " n"],
    weights: Float[Array, " tokens"] | None,
    moments: Moments,
) -> tuple[tuple[Array, Array, Array | None], Float[Array, "n d"], Float[Array, " n"]]:
    """Sums over tokens, and the tokens ``rows`` normalised, with their sizes; see :func:`gather`.

    The sums are the number of tokens, and what :class:`SiteStatistics` has means of: inter and second.
    """
    raw = jnp.pad(x, ((0, 0), (0, padded_size(x.shape[1]) - x.shape[1]))).astype(jnp.float32)
    x = normalise_tokens(raw)
    # A NaN anywhere makes the count NaN, which the caller reports.
    tokens = jnp.sum(jnp.sign(jnp.sum(x * x, axis=-1)))
    blocks = x.shape[1] // BLOCK
    second = None
    if moments == "full":
        weighed = x if weights is None else raw * jnp.sqrt(weights)[:, None]
        second = jnp.einsum("tc,td->cd", weighed, weighed, precision=jax.lax.Precision.HIGHEST)
    if second is not None and weights is None:
        inter = jnp.einsum("bkck->kbc", second.reshape(blocks, BLOCK, blocks, BLOCK))
    elif moments == "none":
        inter = jnp.zeros((BLOCK, blocks, blocks))
    else:
        by_position = x.reshape(x.shape[0], blocks, BLOCK)
        inter = jnp.einsum("tbk,tck->kbc", by_position, by_position, precision=jax.lax.Precision.HIGHEST)
    sizes = jnp.sqrt(jnp.mean(raw[rows] ** 2, axis=-1))
    return (tokens, inter, second), x[rows], sizes
