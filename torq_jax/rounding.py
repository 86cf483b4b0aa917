"""Rounding of weights to MXFP4 with second-order feedback: GPTQ (arXiv 2210.17323), blocks of 32 kept whole.

Features are rounded one after the other; what each loses, the ones not yet rounded make up for, as far as the
second moment H of the activations says that they can. A block's scale is chosen when its turn comes, from weights
that have made up for all that went before. Rows do not know of each other.

With the second moment O of the gradients at the outputs they do: an error E of the weight costs the loss
``tr(O E H E^T)``, to second order and with the two moments taken as independent (K-FAC, arXiv 1503.05671; YAQA,
arXiv 2505.22988, rounds under the same). Given what the rows before have lost, the best that real numbers can do for
the rows to come does not depend on H: ``-O_ll^-1 O_lb`` times the loss, which is GPTQ's feedback once more, from row
to row. So rows are rounded by GPTQ a few at a time, and each few hand on to all later ones what they lost.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, Float32, Float64, Int32

from torq_jax import mxfp4
from torq_jax.errors import TorqError
from torq_jax.mxfp4 import BLOCK, MXFP4Array, ScaleRule

Order = Literal["natural", "energy"]
ORDERS: tuple[Order, ...] = get_args(Order)
"""``"natural"`` takes the features as they lie; ``"energy"`` the blocks with the largest second moment first, and
inside each block its features likewise. Which 32 features share a scale does not change."""

Scales = Callable[[Float32[Array, "o k"]], Float32[Array, "c o"]]
"""Scales to try for each row of a block, one candidate or more."""


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A rounded weight, and the error that rounding made: ``tr(O E H E^T) / tr(O W H W^T)``, O = I unless given."""

    weight: MXFP4Array
    error: float
    error_nearest: float
    """The same of rounding every weight to its nearest value, with the same scale rule."""
    damping: float
    """Added to the diagonal of H, in parts of its mean."""
    dead: int
    """Features that are always zero: rounded to nearest."""


def gptq(
    weight: Float[Array, "out d"],
    hessian: Float[np.ndarray, "d d"],
    scale_rule: ScaleRule = "mse",
    *,
    damping: float = 0.01,
    order: Order = "natural",
    outputs: Float[np.ndarray, ...] | None = None,
) -> Rounded:
    """Round a weight so that the error of ``x @ weight.T`` is small, not that of the weight.

    Args:
      weight: float, in the coordinates of the activations that enter (folded with their transform).
      hessian: ``E[x^T x]`` of these activations, weighted or not; any positive scale.
      scale_rule: "floor", "ceil" and "even" follow from a block's largest value; "mse" tries the floor exponent
        and both its neighbours and keeps, for each row, the one with the least error after feedback.
      damping: added to the diagonal of ``hessian``, in parts of its mean.
      order: see :data:`ORDERS`.
      outputs: ``E[u^T u]`` of the loss's gradients u with respect to ``x @ weight.T``, ``[out, out]`` or, for parts
        of the outputs (see :func:`output_parts`), ``[parts, size, size]``; any positive scale, damped likewise. Rows
        then make up for each other as well. None: every output counts the same.

    Returns:
      The weight in MXFP4 and what was measured. Factorising takes ``2/3 d^3`` float64 operations and 24 ``d^2``
      bytes on the host, rounding ``2 out d^2`` float32 operations on the device.

    Raises:
      TorqError: sizes that do not fit, values that are not finite, a matrix that is not symmetric or not positive
        semidefinite, or a damping too small to invert it.
    """
    second = factorise(hessian, damping=damping, order=order)
    return gptq_factorised(weight, second, scale_rule, outputs=outputs)


@dataclasses.dataclass(frozen=True)
class Factorised:
    """A second moment made ready to round any number of weights that read the same activations."""

    hessian: Float[Array, "d d"]
    """In units of its trace, float32."""
    factor: Float32[Array, "d d"]
    """Of :func:`inverse_factor`, in the order in which features are taken."""
    taken: Int32[np.ndarray, " d"]
    """Features in that order."""
    damping: float
    dead: int


def factorise(
    hessian: Float[np.ndarray, "d d"], *, damping: float = 0.01, order: Order = "natural"
) -> Factorised:
    """What :func:`gptq` does once for all the weights of a site.

    Raises:
      TorqError: as :func:`gptq`, for the second moment, the damping and the order.
    """
    if order not in ORDERS:
        raise TorqError(f"unknown order {order!r}: must be one of {', '.join(ORDERS)}")
    features = np.shape(hessian)[-1] if np.ndim(hessian) else 0
    hessian = _checked(hessian, features)
    if features % BLOCK or not features:
        raise TorqError(
            f"the second moment has {features} features, not a multiple of {BLOCK}: pad it with zeros"
        )
    taken = _order(np.diagonal(hessian), order)
    factor = inverse_factor(hessian[np.ix_(taken, taken)], damping)
    return Factorised(
        jnp.asarray(hessian / max(float(np.trace(hessian)), 1e-300), jnp.float32),
        jnp.asarray(factor),
        taken,
        damping,
        int(np.sum(np.diagonal(hessian) == 0)),
    )


def gptq_factorised(
    weight: Float[Array, "out d"],
    second: Factorised,
    scale_rule: ScaleRule = "mse",
    *,
    outputs: Float[np.ndarray, ...] | None = None,
) -> Rounded:
    """:func:`gptq` with a second moment that was factorised before.

    Raises:
      TorqError: as :func:`gptq`, for the weight, the scale rule and ``outputs``.
    """
    weight = jnp.asarray(weight, jnp.float32)
    if weight.ndim != 2 or weight.shape[1] % BLOCK or not weight.size:
        raise TorqError(
            f"weight has shape {weight.shape}: must be [out, d] with d a multiple of {BLOCK}; pad it with zeros"
        )
    if scale_rule not in mxfp4.SCALE_RULES:
        raise TorqError(f"unknown scale rule {scale_rule!r}: must be one of {', '.join(mxfp4.SCALE_RULES)}")
    if not bool(jnp.isfinite(weight).all()):
        raise TorqError("the weight holds a NaN or an infinity: nothing can make up for it")
    features = len(second.taken)
    if features != weight.shape[1]:
        raise TorqError(f"the second moment has {features} features, the weight {weight.shape[1]} features")
    moments = None if outputs is None else _checked_outputs(outputs, len(weight))
    ordered, scales_of = weight[:, second.taken], _SCALES[scale_rule]
    if moments is None:
        elements, scales = gptq_core(ordered, second.factor, BLOCK, scales_of)
    else:
        elements, scales = _round_parts(ordered, second, moments, scales_of)
    back = np.argsort(second.taken)
    codes = _codes(elements[:, back])
    blocks_back = back[::BLOCK] // BLOCK
    exponents = _exponent(scales[:, blocks_back])
    zero = jnp.all(codes.reshape(len(weight), -1, BLOCK) & 7 == 0, axis=-1)
    stored = jnp.where(zero, 0, exponents + mxfp4.SCALE_BIAS).astype(jnp.uint8)
    codes = jnp.where(jnp.repeat(zero, BLOCK, axis=-1), jnp.uint8(0), codes)
    q = MXFP4Array(mxfp4.pack(codes), stored, weight.shape[1], -1)
    nearest = mxfp4.quantize_dequantize(weight, scale_rule)
    return Rounded(
        q,
        layer_error(weight, mxfp4.dequantize(q), second.hessian, moments),
        layer_error(weight, nearest, second.hessian, moments),
        second.damping,
        second.dead,
    )


ROWS = 8
"""Fewest rows that are rounded together under gradients at the outputs."""

_LARGEST_PART = 4096


def output_parts(out: int, experts: int = 1) -> tuple[int, int]:
    """Count and size of the parts of a weight's rows that make up for each other; the last part may be filled up.

    Rows of different experts, ``out / experts`` of each, share no part.

    The moment of all the rows together would be larger than the weight itself, and where there are more than 4096
    (gate and up of a large model) it says little.
    """
    count = -(-out // (experts * _LARGEST_PART))
    size = -(-out // (experts * count))
    return experts * count, -(-size // ROWS) * ROWS


def rows_together(size: int) -> int:
    """How many rows of a part of ``size`` are rounded together, not making up for each other; they divide it.

    Fewer make up for a little more and take longer: features are taken one by one for each lot of rows. From 512 rows
    up there are 64 lots at least, of eight rows at least.
    """
    return max(rows for rows in range(ROWS, max(size // 64, ROWS) + 1, ROWS) if size % rows == 0)


def _round_parts(
    weight: Array, second: Factorised, moments: Float[np.ndarray, "n g g"], scales_of: Scales
) -> tuple[Array, Array]:
    """:func:`gptq_core` of each part of the rows, with feedback from row to row; all parts at once."""
    count, size = moments.shape[:2]
    rows = rows_together(size)
    padded = jnp.pad(weight, ((0, count * size - len(weight)), (0, 0))).reshape(count, size, -1)
    factors = np.stack([inverse_factor(moment, second.damping) for moment in moments])
    steps = np.arange(size // rows)
    diagonal = factors.reshape(count, len(steps), rows, len(steps), rows)[:, steps, :, steps]  # [s, n, r, r]
    inverses = np.linalg.inv(diagonal.astype(np.float64)).astype(np.float32).swapaxes(0, 1)
    elements, scales = jax.vmap(_two_sided_core, in_axes=(0, None, 0, 0, None, None, None))(
        padded, second.factor, jnp.asarray(factors), jnp.asarray(inverses), rows, BLOCK, scales_of
    )
    return tuple(a.reshape(count * size, -1)[: len(weight)] for a in (elements, scales))  # type: ignore[return-value]


def _checked_outputs(outputs: Any, out: int) -> Float64[np.ndarray, "n g g"]:
    """Parts of the outputs' moment, filled up to whole steps."""
    moments = np.asarray(outputs, np.float64)
    moments = moments[None] if moments.ndim == 2 else moments
    size = moments.shape[-1]
    if (
        moments.ndim != 3
        or moments.shape[-2] != size
        or not 0 <= len(moments) * size - out < len(moments) * ROWS
    ):
        raise TorqError(
            f"the outputs' moment has shape {np.shape(outputs)}, the weight {out} rows: must be [{out}, {out}], or "
            "[parts, size, size] with the last part filled up"
        )
    moments = np.stack([_checked(moment, size, "the outputs' moment", "rows") for moment in moments])
    missing = -size % ROWS
    if missing and len(moments) > 1:
        raise TorqError(f"parts of {size} outputs: must be a multiple of {ROWS}; see output_parts")
    return np.pad(moments, ((0, 0), (0, missing), (0, missing)))


def correct(
    weight: Float[np.ndarray, "out d"],
    cross: Float[np.ndarray, "d d"],
    quantised: Float[np.ndarray, "d d"],
    *,
    alpha: float = 1.0,
    damping: float = 1e-6,
) -> Float[np.ndarray, "out d"]:
    """The weight that reads rounded activations best: minimises ``E|x W^T - x_q W*^T|^2``.

    ``W* = W C S_q^-1`` with ``C = E[x^T x_q]`` and ``S_q = E[x_q^T x_q]``; the idea of QEP (arXiv 2504.09629) and
    Qronos (arXiv 2505.11695). Rounding ``W*`` with :func:`gptq` under ``S_q`` then targets the same.

    Args:
      weight: float, in the coordinates of x.
      cross: ``E[x^T x_q]``.
      quantised: ``E[x_q^T x_q]``.
      alpha: how far to go from the weight (0) to the minimiser (1).
      damping: added to the diagonals of both, in parts of the mean of ``quantised``'s.

    Returns:
      float64.

    Raises:
      TorqError: sizes that do not fit, values that are not finite, or a matrix that cannot be inverted.
    """
    weight = np.asarray(weight, np.float64)
    quantised = _checked(quantised, weight.shape[-1])
    cross = np.asarray(cross, np.float64)
    if cross.shape != quantised.shape or not np.isfinite(cross).all():
        raise TorqError(f"cross moment of shape {cross.shape}: must be finite, of shape {quantised.shape}")
    if not 0 <= alpha <= 1:
        raise TorqError(f"alpha {alpha} must lie in 0..1")
    if not quantised.any():  # nothing ever entered, so every weight reads it equally well
        return weight
    ridge = damping * np.diagonal(quantised).mean() * np.eye(len(quantised))
    try:
        solved = scipy.linalg.solve(quantised + ridge, (cross + ridge).T, assume_a="pos")
    except np.linalg.LinAlgError as error:
        raise TorqError(f"the second moment cannot be inverted with damping {damping}: raise it") from error
    return weight + alpha * (weight @ solved.T - weight)


def inverse_factor(hessian: Float[np.ndarray, "d d"], damping: float) -> Float32[np.ndarray, "d d"]:
    """Upper triangular U with ``U^T U = (H + damping mean(diag H) I)^-1``.

    Raises:
      TorqError: the damped matrix is not positive definite.
    """
    damped = np.array(hessian, np.float64)
    mean = np.diagonal(damped).mean()
    damped[np.diag_indices_from(damped)] += damping * mean if mean > 0 else 1.0
    try:
        # H = R R^T with R upper, from a Cholesky factor of H read backwards; then U = R^-1.
        lower = scipy.linalg.cholesky(damped[::-1, ::-1], lower=True, overwrite_a=True, check_finite=False)
        inverted, info = scipy.linalg.lapack.dtrtri(np.ascontiguousarray(lower[::-1, ::-1]), lower=0)
    except np.linalg.LinAlgError as error:
        raise TorqError(
            f"the second moment is not positive definite with damping {damping}: raise the damping, or calibrate on "
            "more text"
        ) from error
    if info:
        raise TorqError(f"the second moment is singular with damping {damping}: raise the damping")
    return np.triu(inverted).astype(np.float32)


def gptq_core(
    weight: Float32[Array, "o d"], factor: Float32[Array, "d d"], block: int, scales: Scales
) -> tuple[Float32[Array, "o d"], Float32[Array, "o blocks"]]:
    """Round to E2M1 with feedback, for any block size and kind of scale.

    Args:
      weight: in the order in which features are taken.
      factor: from :func:`inverse_factor`.
      block: features that share a scale.
      scales: candidates for a block; a static argument, so give the same function each time.

    Returns:
      E2M1 values before scaling, and each block's scale.
    """
    return _gptq_core(weight, factor, block, scales)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _gptq_core(weight: Array, factor: Array, block: int, scales: Scales) -> tuple[Array, Array]:
    out, features = weight.shape
    high = jax.lax.Precision.HIGHEST

    def one_block(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weight, elements, chosen = carry
        start = index * block
        rows = jax.lax.dynamic_slice(weight, (0, start), (out, block))
        upper = jax.lax.dynamic_slice(factor, (start, start), (block, block))
        candidates = scales(rows)  # [c, o]
        columns = rows.T  # [k, o]

        def one_feature(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            errors, values = carry  # [k, c, o]
            # Errors of features to come are still zero.
            pending = jnp.einsum("k,kco->co", upper[:, i], errors, precision=high)
            column = columns[i] - pending
            value = round_elements(column / candidates)
            error = (column - value * candidates) / upper[i, i]
            return errors.at[i].set(error), values.at[i].set(value)

        empty = jnp.zeros((block, *candidates.shape), jnp.float32)
        errors, values = jax.lax.fori_loop(0, block, one_feature, (empty, empty))
        best = jnp.argmin(jnp.sum(errors * errors, axis=0), axis=0)  # [o]
        pick = lambda a: jnp.take_along_axis(a, best[None, None], axis=1)[:, 0]  # noqa: E731
        error, value = pick(errors), pick(values)  # [k, o]
        rest = jax.lax.dynamic_slice(factor, (start, 0), (block, features))
        weight = weight - jnp.einsum("ko,kd->od", error, rest, precision=high)
        elements = jax.lax.dynamic_update_slice(elements, value.T, (0, start))
        scale = jnp.take_along_axis(candidates, best[None], axis=0)  # [1, o]
        return weight, elements, jax.lax.dynamic_update_slice(chosen, scale.T, (0, index))

    blocks = features // block
    start = (weight, jnp.zeros_like(weight), jnp.zeros((out, blocks), jnp.float32))
    _, elements, chosen = jax.lax.fori_loop(0, blocks, one_block, start)
    return elements, chosen


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _two_sided_core(
    weight: Array, factor: Array, outputs: Array, inverses: Array, rows: int, block: int, scales: Scales
) -> tuple[Array, Array]:
    """:func:`gptq_core` for ``rows`` rows after the others, each making up for what those before it lost.

    ``outputs`` is the factor of the gradients' moment ``[o, o]``, ``inverses [o / rows, rows, rows]`` the inverses of
    its blocks on the diagonal.
    """
    out, features = weight.shape
    high = jax.lax.Precision.HIGHEST

    def some_rows(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weight, elements, chosen = carry
        start = index * rows
        own = jax.lax.dynamic_slice(weight, (start, 0), (rows, features))
        found, scale = _gptq_core(own, factor, block, scales)
        lost = own - found * jnp.repeat(scale, block, axis=-1)
        error = jnp.einsum("kr,kd->rd", inverses[index], lost, precision=high)
        later = jax.lax.dynamic_slice(outputs, (start, 0), (rows, out))
        weight = weight - jnp.einsum("ro,rd->od", later, error, precision=high)
        place = lambda a, b: jax.lax.dynamic_update_slice(a, b, (start, 0))  # noqa: E731
        return weight, place(elements, found), place(chosen, scale)

    begin = (weight, jnp.zeros_like(weight), jnp.zeros((out, features // block), jnp.float32))
    _, elements, chosen = jax.lax.fori_loop(0, out // rows, some_rows, begin)
    return elements, chosen


def round_elements(x: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Nearest E2M1 value, ties to the even code, saturating at 6; of values already divided by their scale."""
    a = jnp.abs(x)
    # numpy's and XLA's round goes to the even neighbour, which in each binade is the even code.
    coarse = jnp.minimum(2 * jnp.round(a / 2), 6)
    return jnp.copysign(jnp.where(a < 2, jnp.round(2 * a) / 2, jnp.where(a < 4, jnp.round(a), coarse)), x)


def layer_error(
    weight: Float[Array, "o d"],
    rounded: Float[Array, "o d"],
    hessian: Float[Array, "d d"],
    outputs: Float[np.ndarray, "n g g"] | None = None,
) -> float:
    """``tr(O E H E^T) / tr(O W H W^T)`` with E the difference and O = I unless given; 0 where the denominator is."""
    weighed = None
    if outputs is not None:
        trace = float(np.trace(outputs, axis1=1, axis2=2).sum())
        weighed = jnp.asarray(outputs / max(trace, 1e-300), jnp.float32)
    return float(_layer_error(weight, rounded, hessian, weighed))


@jax.jit
def _layer_error(weight: Array, rounded: Array, hessian: Array, outputs: Array | None) -> Array:
    high = jax.lax.Precision.HIGHEST

    def energy(a: Array) -> Array:
        read = jnp.matmul(a, hessian, precision=high)
        if outputs is None:
            return jnp.sum(read * a)
        count, size = outputs.shape[:2]
        parts = jnp.pad(a, ((0, count * size - len(a)), (0, 0))).reshape(count, size, -1)
        weighed = jnp.einsum("npq,nqd->npd", outputs, parts, precision=high).reshape(count * size, -1)
        return jnp.sum(read * weighed[: len(a)])

    whole = energy(weight)
    return jnp.where(whole > 0, energy(weight - rounded) / jnp.where(whole > 0, whole, 1.0), 0.0)


def _candidates(rule: ScaleRule) -> Scales:
    """Powers of two that a rule lets a block's rows have."""

    def scales(rows: Array) -> Array:
        exponent = mxfp4.amax_exponent(rows, "floor" if rule == "mse" else rule)
        steps = jnp.array([0, 1, -1] if rule == "mse" else [0])
        # From -126 up: a normal number, and 1 / scale is one, too.
        return _power_of_two(jnp.clip(exponent[None] + steps[:, None], -126, 126))

    return scales


_SCALES = {rule: _candidates(rule) for rule in get_args(ScaleRule)}


def _power_of_two(exponent: Int32[Array, "*n"]) -> Float32[Array, "*n"]:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _exponent(scale: Float32[Array, "*n"]) -> Int32[Array, "*n"]:
    return (jax.lax.bitcast_convert_type(scale, jnp.int32) >> 23) - 127


@jax.jit
def _codes(elements: Array) -> Array:
    a = jnp.abs(elements)
    code = jnp.where(a < 2, 2 * a, jnp.where(a < 4, a + 2, a / 2 + 4)).astype(jnp.uint8)
    return code | (jnp.signbit(elements).astype(jnp.uint8) << 3)


def _order(diagonal: np.ndarray, order: Order) -> np.ndarray:
    """Features in the order in which they are taken, whole blocks at a time."""
    by_block = diagonal.reshape(-1, BLOCK)
    if order == "natural":
        return np.arange(diagonal.size)
    inside = np.argsort(-by_block, axis=1, kind="stable")
    blocks = np.argsort(-by_block.mean(1), kind="stable")
    return (inside[blocks] + BLOCK * blocks[:, None]).reshape(-1)


def _checked(
    hessian: Float[np.ndarray, "d d"], size: int, name: str = "the second moment", what: str = "features"
) -> Float[np.ndarray, "d d"]:
    hessian = np.asarray(hessian, np.float64)
    if hessian.shape != (size, size):
        raise TorqError(
            f"{name} has shape {hessian.shape}, the weight {size} {what}: must be [{size}, {size}]"
        )
    if not np.isfinite(hessian).all():
        raise TorqError(f"{name} holds a NaN or an infinity: calibration failed")
    scale = float(np.abs(hessian).max())
    # float32 sums over tokens differ in order between the two halves at most.
    if scale and float(np.abs(hessian - hessian.T).max()) > 1e-3 * scale:
        raise TorqError(f"{name} is not symmetric: must be E[x^T x]")
    if float(np.diagonal(hessian).min(initial=0.0)) < 0:
        raise TorqError(f"{name} has a negative diagonal: must be E[x^T x]")
    return (hessian + hessian.T) / 2
