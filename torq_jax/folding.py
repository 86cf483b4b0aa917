"""Transforms of a site's activation that cost nothing at run time, because what writes the activation takes them.

Three places of a decoder layer let one through, the float function unchanged:

* ``attn_out``: a query head's activation is an average of its key and value head's rows of v, ``softmax (v)``. With
  any invertible ``T_g [head_dim, head_dim]`` for each key and value head, ``softmax (v T_g) = (softmax v) T_g``: v's
  rows take ``T_g``, and the columns of o of all query heads that share the head take its inverse transpose.
* ``mlp_out``: ``silu(gate) * up`` lets a positive scale of each neuron through, which up's rows take.
* ``attn_in``, ``mlp_in``: the norm's own weight is a scale of each channel.

The best of each follows from the modelled rounding error of :mod:`torq_jax.solvers.wush`,
``sum_b tr(S_b) tr(G_b) / 32`` over blocks b of 32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64

from torq_jax.config import SITE_WEIGHTS, DecoderConfig
from torq_jax.errors import TorqError
from torq_jax.mxfp4 import BLOCK
from torq_jax.solvers import wush
from torq_jax.solvers.hadamard import hadamard_matrix
from torq_jax.statistics import SiteStatistics

Matrices = Float64[np.ndarray, "n p p"]
"""A block-diagonal matrix of ``n p`` features."""

Scales = Float64[np.ndarray, " d"]
"""A diagonal one: positive numbers."""

SCALED_SITES = ("attn_in", "mlp_in", "mlp_out")
"""Sites whose activation takes a scale of each feature for free."""

_STEPS = 30  # of the fixed point; it settles within ten or so
_SETTLED = 1e-4  # relative: a step that wins less than a thousandth of a dB is the last


def values_refusal(config: DecoderConfig) -> str | None:
    """Why ``attn_out`` has no transform that v could take, or None where it has one."""
    if config.head_dim % BLOCK:
        return (
            f"head_dim {config.head_dim} is not a multiple of {BLOCK}, so blocks straddle heads, "
            "and v cannot take a transform of a block"
        )
    return None


def solve_values(
    second: Float[np.ndarray, "d d"],
    gain: Float[np.ndarray, "d d"],
    config: DecoderConfig,
    *,
    ridge: float = 1e-4,
) -> tuple[Matrices, dict[str, Any]]:
    """The transform of every key and value head that makes the modelled error of ``attn_out`` least.

    A Hadamard matrix that ends each transform spreads a head's energy over its ``head_dim / 32`` blocks, so what
    counts is ``sum_h tr(T^T S_h T) tr(T^-1 G_h T^-T)`` over the query heads h that share it, with S_h and G_h the
    moments inside the head. It depends on ``M = T T^T`` alone and is convex along geodesics of positive definite
    matrices (each trace is log-convex along them). Where its derivative vanishes, ``M S M = G`` for

        S = sum_h tr(M^-1 G_h) S_h,   G = sum_h tr(M S_h) G_h,

    which one head solves at once (WUSH's closed form, with blocks of head_dim), and several by iterating it.

    Args:
      second: second moment of the activation that enters ``attn_out``, ``d = num_heads head_dim``.
      gain: what an error of it costs, as :class:`torq_jax.statistics.SiteStatistics` has it.
      config: the decoder, with a head_dim that is a multiple of 32.
      ridge: added to the diagonals of both moments, in parts of the mean over the heads that share a transform.

    Returns:
      ``[num_kv_heads, head_dim, head_dim]`` with Frobenius norms as of rotations, and a report: the modelled gain
      over block Hadamard in dB (``block_gain_db``), the largest condition number, the steps taken, and
      ``plain_heads``, those for which nothing better than a Hadamard matrix was found.

    Raises:
      TorqError: a head_dim that :func:`values_refusal` refuses, moments of another size or not finite.
    """
    if (reason := values_refusal(config)) is not None:
        raise TorqError(reason)
    size, groups = config.head_dim, config.num_kv_heads
    features = config.num_heads * size
    for name, moment in (("second moment", second), ("gain", gain)):
        if moment.shape != (features, features):
            raise TorqError(f"the {name} has shape {moment.shape}: attn_out needs {(features, features)}")
        if not np.isfinite(moment).all():
            raise TorqError(f"the {name} holds a NaN or an infinity: calibration failed")
    if not 0 < ridge < 1:
        raise TorqError(f"ridge {ridge} must lie between 0 and 1: 1e-4 is usual")
    s, g = (_heads(moment, groups, size) for moment in (second, gain))  # [g, r, p, p]
    raised_s, raised_g = _ridged(s, ridge), _ridged(g, ridge)
    metric, steps = _least_metric(raised_s, raised_g)
    # T = G^1/2 U s^-1/2 makes both moments diag(s); the mixing matrix after it spreads s evenly over blocks.
    found = _closed_form(*_weighted(raised_s, raised_g, metric)) @ _mixing(size)
    found *= np.sqrt(size) / np.linalg.norm(found, axis=(1, 2), keepdims=True)
    plain = np.broadcast_to(_mixing(size), found.shape)
    errors = _head_errors(s, g, found)
    # Uneven spreading or the ridge may cost more than the metric wins where there is nothing to win.
    worse = errors > _head_errors(s, g, plain)
    found = np.where(worse[:, None, None], plain, found)
    before, after = (_head_errors(s, g, t).sum() for t in (None, found))
    report = {
        "block_gain_db": wush.decibels(before, after),
        "condition_number": float(np.linalg.cond(found).max()),
        "steps": steps,
        "plain_heads": int(worse.sum()),
    }
    return found, report


def solve_scales(
    second: Float[np.ndarray, "d d"], gain: Float[np.ndarray, "d d"], *, ridge: float = 1e-4
) -> tuple[Scales, dict[str, Any]]:
    """The scale of each feature that makes the modelled error of every block least.

    By Cauchy and Schwarz ``(sum_j S_jj s_j^2) (sum_j G_jj / s_j^2)`` is least at ``s_j = (G_jj / S_jj)^(1/4)``.
    Blocks whose modelled error does not fall (the ridge can see to that) keep a scale of one.

    Args:
      second: second moment of the activation, ``d`` a multiple of 32.
      gain: what an error of it costs.
      ridge: added to both diagonals, in parts of each block's mean.

    Returns:
      Scales, float64, with a geometric mean of one in every block, and a report: the modelled gain in dB
      (``block_gain_db``), the largest ratio of two scales in a block and how many blocks are ``scaled``.

    Raises:
      TorqError: sizes that do not fit, moments that are not finite, a ridge out of range.
    """
    if second.shape != gain.shape or second.shape[0] % BLOCK:
        raise TorqError(
            f"second moment {second.shape} and gain {gain.shape}: both must be [d, d], d a multiple of {BLOCK}"
        )
    if not 0 < ridge < 1:
        raise TorqError(f"ridge {ridge} must lie between 0 and 1: 1e-4 is usual")
    s, g = (np.diagonal(m).astype(np.float64).reshape(-1, BLOCK) for m in (second, gain))
    if not (np.isfinite(s).all() and np.isfinite(g).all()):
        raise TorqError("the second moment or the gain holds a NaN or an infinity: calibration failed")
    raised_s, raised_g = (
        d + ridge * (mean + (mean <= 0)) for d in (s, g) for mean in [d.mean(-1, keepdims=True)]
    )
    scales = (raised_g / raised_s) ** 0.25
    scales /= np.exp(np.log(scales).mean(-1, keepdims=True))
    before = s.sum(-1) * g.sum(-1)
    after = (s * scales**2).sum(-1) * (g / scales**2).sum(-1)
    falls = after < before
    scales = np.where(falls[:, None], scales, 1.0)
    report = {
        "block_gain_db": wush.decibels(before.sum(), np.minimum(before, after).sum()),
        "condition_number": float((scales.max(-1) / scales.min(-1)).max()),
        "scaled": int(falls.sum()),
    }
    return scales.reshape(-1), report


# -- weights -------------------------------------------------------------------------------------------------


def fold_values(parameters: Mapping[str, Any], config: DecoderConfig, matrices: Matrices) -> dict[str, Any]:
    """A layer whose attention output is ``attention @ T``, and whose o undoes that.

    Args:
      parameters: of a float layer, nested as :func:`torq_jax.decoder.merge_layer` takes them.
      config: the decoder.
      matrices: ``T`` of each key and value head, invertible.

    Returns:
      Parameters of the same structure, the folded ones in float32 from float64 products.

    Raises:
      TorqError: matrices of another shape, or singular ones.
    """
    size, groups = config.head_dim, config.num_kv_heads
    if matrices.shape != (groups, size, size):
        raise TorqError(
            f"transforms have shape {matrices.shape}: must be [num_kv_heads, head_dim, head_dim] = "
            f"{(groups, size, size)}"
        )
    attn_in, attn_out = dict(parameters["attn_in"]), dict(parameters["attn_out"])
    v = _wide(attn_in["v"])
    attn_in["v"] = _narrow((matrices.mT @ v.reshape(groups, size, -1)).reshape(v.shape))
    if "v_bias" in attn_in:
        bias = _wide(attn_in["v_bias"]).reshape(groups, 1, size)
        attn_in["v_bias"] = _narrow((bias @ matrices).reshape(-1))
    attn_out["o"] = _narrow(_right(_wide(attn_out["o"]), _dual(query_heads(matrices, config))))
    return {**parameters, "attn_in": attn_in, "attn_out": attn_out}


def fold_scales(parameters: Mapping[str, Any], site: str, scales: Scales) -> dict[str, Any]:
    """A layer in which the activation that enters ``site`` is ``x * scales``, and whose weights there undo that.

    Args:
      parameters: of a float layer, nested as :func:`torq_jax.decoder.merge_layer` takes them.
      site: one of :data:`SCALED_SITES`: the norm before it takes the scale, or up's rows for ``mlp_out``.
      scales: positive; those beyond the site's features (its padding) are left out.

    Returns:
      Parameters of the same structure, the folded ones in float32.

    Raises:
      TorqError: another site, too few scales, or scales that are not positive.
    """
    if site not in SCALED_SITES:
        raise TorqError(
            f"nothing before site {site!r} takes a scale: must be one of {', '.join(SCALED_SITES)}"
        )
    own = dict(parameters[site])
    features = own[SITE_WEIGHTS[site][0]].shape[1]
    if scales.ndim != 1 or len(scales) < features or not (scales > 0).all():
        raise TorqError(f"scales of shape {scales.shape} for {features} features: must be positive, one each")
    scales = scales[:features]
    for name in SITE_WEIGHTS[site]:
        own[name] = _narrow(_wide(own[name]) / scales)
    found = {**parameters, site: own}
    if site == "mlp_out":
        before = dict(parameters["mlp_in"])
        before["up"] = _narrow(_wide(before["up"]) * scales[:, None])
        if "up_bias" in before:
            before["up_bias"] = _narrow(_wide(before["up_bias"]) * scales)
        return {**found, "mlp_in": before}
    return {**found, f"{site}_norm": _narrow(_wide(parameters[f"{site}_norm"]) * scales)}


# -- statistics ----------------------------------------------------------------------------------------------


def query_heads(matrices: Matrices, config: DecoderConfig) -> Matrices:
    """The transform of every query head, ``[num_heads, p, p]``: that of the key and value head that it reads."""
    return np.repeat(matrices, config.num_heads // config.num_kv_heads, axis=0)


def transform_statistics(found: SiteStatistics, transform: Matrices | Scales) -> SiteStatistics:
    """Statistics of ``x T`` from those of ``x``.

    Args:
      found: of x, ``d`` features, with ``second``.
      transform: block-diagonal ``[n, p, p]`` with ``n p = d``, or the diagonal ``[d]``.

    Returns:
      ``second`` is ``T^T S T``, ``gain`` is ``T^-1 G T^-T``, samples are transformed as they are (not normalised
      again), and ``inter`` is read off ``second``: its tokens are weighed as that one's are.

    Raises:
      TorqError: no second moment, or another size.
    """
    features = found.samples.shape[-1]
    size = transform.shape[0] * (transform.shape[-1] if transform.ndim == 3 else 1)
    if size != features:
        raise TorqError(f"a transform of {size} features {transform.shape} for statistics of {features}")
    if found.second is None:
        raise TorqError('statistics without a second moment cannot be transformed: gather moments="full"')
    second = _congruence(found.second, transform)
    blocks = features // BLOCK
    return dataclasses.replace(
        found,
        second=second,
        inter=np.einsum("bkck->kbc", second.reshape(blocks, BLOCK, blocks, BLOCK)).astype(np.float64),
        samples=_right(found.samples, transform).astype(np.float32),
        gain=None if found.gain is None else _congruence(found.gain, _dual(transform)),
    )


def transform_output_moment(
    moment: Float[np.ndarray, "parts size size"], transform: Matrices | Scales
) -> Float[np.ndarray, "parts size size"]:
    """``E[u^T u]`` at the outputs ``y T`` of a folded weight from that at the outputs ``y``: ``T^-1 O T^-T``.

    Args:
      moment: of :class:`torq_jax.sensitivity.LayerGradients`, in parts; zeros where the last part is filled up.
      transform: of the outputs.

    Raises:
      TorqError: parts whose ends cut a matrix of the transform in two.
    """
    count, part = moment.shape[:2]
    dual = _dual(transform)
    if dual.ndim == 1:
        dual = np.pad(dual, (0, count * part - len(dual)), constant_values=1.0).reshape(count, part)
        return (moment * dual[:, :, None] * dual[:, None, :]).astype(moment.dtype)
    size = dual.shape[-1]
    if part % size:
        raise TorqError(
            f"parts of {part} gradients cut heads of {size} in two: round with --rounding gptq, which needs none"
        )
    fill = count * part // size - len(dual)
    dual = np.concatenate([dual, np.broadcast_to(np.eye(size), (fill, size, size))])
    return np.stack(
        [_congruence(m, t) for m, t in zip(moment, dual.reshape(count, -1, size, size), strict=True)]
    )


def _heads(moment: np.ndarray, groups: int, size: int) -> Float64[np.ndarray, "g r p p"]:
    """Blocks of a head each on the diagonal, in units of the mean of the diagonal."""
    count = moment.shape[0] // size
    index = np.arange(count)
    found = moment.reshape(count, size, count, size)[index, :, index].astype(np.float64)
    mean = np.trace(found, axis1=1, axis2=2).sum() / moment.shape[0]
    return (found / mean if mean > 0 else found).reshape(groups, -1, size, size)


def _ridged(moments: Float64[np.ndarray, "g r p p"], ridge: float) -> Float64[np.ndarray, "g r p p"]:
    size = moments.shape[-1]
    mean = (
        np.trace(moments, axis1=2, axis2=3).mean(1) / size
    )  # of a group: a head that is dead alone counts for little
    return moments + (ridge * (mean + (mean <= 0)))[:, None, None, None] * np.eye(size)


def _least_metric(
    s: Float64[np.ndarray, "g r p p"], g: Float64[np.ndarray, "g r p p"], tolerance: float = _SETTLED
) -> tuple[Float64[np.ndarray, "g p p"], int]:
    """``M = T T^T`` with the least ``sum_h tr(M S_h) tr(M^-1 G_h)`` that the iteration meets, and its steps."""
    root = _closed_form(s.sum(1), g.sum(1))
    best = metric = root @ root.mT
    least = _metric_error(s, g, metric)
    steps = 1
    while s.shape[1] > 1 and steps < _STEPS:
        steps += 1
        root = _closed_form(*_weighted(s, g, metric))
        metric = root @ root.mT
        error = _metric_error(s, g, metric)
        falls = error < least
        best = np.where(falls[:, None, None], metric, best)
        settled = not (error < least * (1 - tolerance)).any()
        least = np.minimum(error, least)
        if settled:
            break
    return best, steps


def _weighted(s: np.ndarray, g: np.ndarray, metric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``S`` and ``G`` of the fixed point: moments of a group, each head weighed by its other trace."""
    energy, cost = _traces(s, g, metric)
    return np.einsum("gr,grij->gij", cost, s), np.einsum("gr,grij->gij", energy, g)


def _traces(s: np.ndarray, g: np.ndarray, metric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``tr(M S_h)`` and ``tr(M^-1 G_h)``, ``[g, r]``."""
    inverse = np.linalg.inv(metric)
    return np.einsum("gij,grij->gr", metric, s), np.einsum("gij,grij->gr", inverse, g)


def _metric_error(s: np.ndarray, g: np.ndarray, metric: np.ndarray) -> np.ndarray:
    energy, cost = _traces(s, g, metric)
    return (energy * cost).sum(1)


def _closed_form(s: np.ndarray, g: np.ndarray) -> np.ndarray:
    """WUSH's ``T`` without the matrix that mixes: ``T^T S T = T^-1 G T^-T = diag``, largest first."""
    half = _root(g)
    u, values, _ = np.linalg.svd(half @ _root(s))
    return (half @ u) / np.sqrt(values)[:, None]


def _root(moments: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((moments + moments.mT) / 2)
    values = np.maximum(values, 1e-12 * values[:, -1:])
    return (vectors * np.sqrt(values)[:, None]) @ vectors.mT


def _mixing(size: int) -> Float64[np.ndarray, "p p"]:
    """An orthogonal matrix that spreads directions of falling energy evenly over a head's blocks and positions.

    A Hadamard matrix of the head's size where there is one of Sylvester's; else the directions are dealt out to the
    blocks to and fro, and each block has a Hadamard matrix of its own.
    """
    if size & (size - 1) == 0:
        return hadamard_matrix(size)
    blocks = size // BLOCK
    dealt = np.arange(size).reshape(BLOCK, blocks)
    dealt[1::2] = dealt[1::2, ::-1]
    mixing = np.zeros((size, size))
    for block, rows in enumerate(dealt.T):
        mixing[rows, block * BLOCK : (block + 1) * BLOCK] = hadamard_matrix()
    return mixing


def _head_errors(
    s: Float64[np.ndarray, "g r p p"], g: Float64[np.ndarray, "g r p p"], matrices: np.ndarray | None
) -> Float64[np.ndarray, " g"]:
    """Modelled error of each group: ``sum_b tr(S_b) tr(G_b) / 32`` over the blocks of all its heads."""
    if matrices is not None:
        t, inverse = matrices[:, None], np.linalg.inv(matrices)[:, None]
        s, g = t.mT @ s @ t, inverse @ g @ inverse.mT
    traces = [
        np.einsum("grbkbk->grb", m.reshape(*m.shape[:2], -1, BLOCK, m.shape[-1] // BLOCK, BLOCK))
        for m in (s, g)
    ]
    return (traces[0] * traces[1]).sum((1, 2)) / BLOCK


def _dual(transform: Matrices | Scales) -> Any:
    """The inverse transpose: what weights take where the activation takes ``T``."""
    if transform.ndim == 1:
        return 1 / transform
    try:
        return np.linalg.inv(transform).mT
    except np.linalg.LinAlgError as error:
        raise TorqError(
            f"a transform of shape {transform.shape} is singular: solve the site again"
        ) from error


def _right(x: Float[np.ndarray, "m d"], transform: Matrices | Scales) -> Float64[np.ndarray, "m d"]:
    """``x T``."""
    if transform.ndim == 1:
        return x * transform
    count, size = transform.shape[:2]
    blocks = np.ascontiguousarray(x.reshape(-1, count, size).transpose(1, 0, 2)).astype(np.float64)
    return np.ascontiguousarray((blocks @ transform).transpose(1, 0, 2)).reshape(x.shape)


def _congruence(moment: np.ndarray, transform: Matrices | Scales) -> np.ndarray:
    """``T^T moment T`` in the moment's own dtype."""
    if transform.ndim == 1:
        narrow = transform.astype(
            moment.dtype
        )  # as large as a site's moment is, one temporary of it is enough
        return moment * narrow[:, None] * narrow
    half = _right(moment, transform)
    found = _right(np.ascontiguousarray(half.T), transform)
    return ((found + found.T) / 2).astype(moment.dtype)  # the two products round apart


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _narrow(x: np.ndarray) -> Any:
    return jnp.asarray(x, jnp.float32)
