"""Micro-alignment: an orthogonal mix inside blocks that evens out the use of the E2M1 codebook.

With ``p[k, j]`` the share of column k's values that round to the j-th of the 8 magnitudes, TORQ
(arXiv 2605.19561) lowers ``L = sum_kj (p[k, j] - 1/8)^2`` over one shared 32 x 32 rotation, alternating

* an S-step: the E8M0 scale of every block, by the scale rule, from the block's largest magnitude;
* an R-step: Givens rotations of disjoint pairs of columns. With the scales fixed the loss is piecewise
  constant in the angle and has period pi/2, so its minimum is found exactly: sort the angles at which any
  value crosses a boundary between codes, and run through the counts between them.

A step is kept only if the loss, its scales derived anew, has fallen. Counts are integers throughout, so
"fallen" is exact.

The search is numpy, not jit-compiled jax, because it is mostly one large sort and running sums of 64-bit
integers: on a CPU numpy's vectorised sort is several times faster than XLA's (``benchmarks/solvers.py``
times both), and jax would need its 64-bit mode.
"""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Float64, Int64

from torq_jax.errors import TorqError
from torq_jax.rotation import POSITIONS

Rule = Literal["floor", "ceil", "even"]
RULES: tuple[str, ...] = get_args(Rule)

LEVELS = 8
"""Magnitudes of E2M1."""

BOUNDARIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
"""Where rounding passes from one magnitude to the next; ties go to the even code."""

# Least magnitude of each code from 1 on. A tie at the boundary below an odd code goes to the even code
# under it.
_LEAST = np.where(np.arange(1, LEVELS) % 2 == 1, np.nextafter(BOUNDARIES, np.inf), BOUNDARIES)

# Counters of four codes share one int64 word, 16 bits each, so that one running sum serves four. The sum of
# squares of both columns' counts must fit int32.
MAX_BLOCKS = 2**15 - 1
"""Most sample blocks that counts can hold."""
_EVENT_BITS = 5  # events are 0..27: column (2) x direction (2) x boundary (7)

# Critical angles closer than this are one: no midpoint between them survives rounding.
_LEAST_WIDTH = 1e-12


class Aligned(NamedTuple):
    """An intra rotation and how it came about."""

    rotation: Float64[np.ndarray, "32 32"]
    """Orthogonal ``R``: blocks are rotated as ``x @ R``."""
    losses: list[float]
    """``L`` at the start and after each accepted step; strictly falling."""
    rotations: int
    """Givens rotations in all accepted steps."""
    steps: int
    """R-steps tried, accepted or not."""
    entropy_before: float
    """Bits of codebook use, mean over columns, at the start."""
    entropy_after: float


def block_exponents(x: Float[np.ndarray, "n 32"], rule: Rule = "floor") -> Int64[np.ndarray, " n"]:
    """Exponent ``e`` of each block's E8M0 scale ``2^e``, exact, from the bits of the largest magnitude.

    Zero blocks have -127. Rules as in :func:`torq_jax.mxfp4.quantize`.

    Raises:
      TorqError: a rule other than those of :data:`RULES`.
    """
    if rule not in RULES:
        raise TorqError(f"scale rule {rule!r} is not supported here: must be one of {', '.join(RULES)}")
    mantissa, exponent = np.frexp(
        np.abs(x).max(axis=-1)
    )  # amax = mantissa * 2^exponent, mantissa in [1/2, 1)
    exponent = exponent.astype(np.int64) - 3  # floor(log2 amax) - 2
    if rule == "ceil":
        exponent += mantissa > 0.75  # amax > 6 * 2^(floor(log2 amax) - 2)
    elif rule == "even":
        exponent += mantissa >= 0.875
    return np.where(mantissa == 0, -127, np.clip(exponent, -127, 127))


def codebook_counts(x: Float[np.ndarray, "n 32"], rule: Rule = "floor") -> Int64[np.ndarray, "32 8"]:
    """How many of each column's values round to each of the 8 magnitudes.

    Raises:
      TorqError: an unsupported rule.
    """
    return _counts(_scaled(np.asarray(x, np.float64), rule))


def codebook_histogram(
    x_blocks: Float[np.ndarray, "n 32"], rule: Rule = "floor"
) -> Float64[np.ndarray, "32 8"]:
    """Share of each column's values that round to each of the 8 magnitudes; rows sum to one.

    Args:
      x_blocks: blocks of 32 values, at least one.
      rule: scale rule.

    Raises:
      TorqError: no block, blocks of another size, or an unsupported rule.
    """
    _check_blocks(x_blocks)
    return codebook_counts(x_blocks, rule) / len(x_blocks)


def entropy_bits(histogram: Float64[np.ndarray, "*k 8"]) -> float:
    """``-sum p log2 p`` in bits, mean over columns: 3 when all 8 magnitudes are used alike."""
    positive = np.where(histogram > 0, histogram, 1.0)
    return float(np.mean(-(positive * np.log2(positive)).sum(axis=-1)))


def codebook_loss(counts: Int64[np.ndarray, "32 8"]) -> float:
    """``sum_kj (p[k, j] - 1/8)^2`` of integer counts."""
    n = int(counts[0].sum())
    return int((counts * counts).sum()) / n**2 - len(counts) / LEVELS


def align(
    x: Float[np.ndarray, "n 32"],
    *,
    rule: Rule = "floor",
    steps: int = 80,
    anticorrelation: float = 0.1,
) -> Aligned:
    """Find the intra rotation that evens out codebook use on sample blocks, starting from the identity.

    Args:
      x: blocks of 32 values. Zero blocks are left out: no rotation changes them.
      rule: scale rule of the S-step.
      steps: most R-steps to try.
      anticorrelation: weight lambda of the anti-correlation of two columns' histograms when pairs are picked.

    Returns:
      See :class:`Aligned`. Deterministic.

    Raises:
      TorqError: blocks of another size, non-finite values, more than 32767 blocks, or an unsupported rule.
    """
    _check_blocks(x, least=0)
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        raise TorqError("samples hold a NaN or an infinity: calibrate again with finite activations")
    x = x[np.any(x != 0, axis=1)]
    if len(x) > MAX_BLOCKS:
        raise TorqError(f"{len(x)} sample blocks are more than {MAX_BLOCKS}: draw fewer")
    # Columns are what everything below works on: store each contiguously.
    columns = np.ascontiguousarray(x.T)  # [32, n]
    turn = np.eye(POSITIONS)  # transposed: rows are the columns of R
    if not len(x):
        return Aligned(turn, [0.0], 0, 0, 0.0, 0.0)

    scaled = _scaled_columns(columns, rule)
    counts = _column_counts(scaled)
    losses, entropy_before = [codebook_loss(counts)], entropy_bits(counts / len(x))
    rotations = tried = 0
    # A pair is not tried again until one of its columns has been turned.
    exhausted = np.zeros((POSITIONS, POSITIONS), bool)
    while tried < steps:
        pairs = pick_pairs(counts, exhausted, anticorrelation)
        if not len(pairs):
            break
        tried += 1
        angle, gain = best_angles(scaled[pairs[:, 0]], scaled[pairs[:, 1]])
        exhausted[pairs[:, 0], pairs[:, 1]] = exhausted[pairs[:, 1], pairs[:, 0]] = True
        order = np.argsort(-gain, kind="stable")
        order = order[gain[order] > 0]
        while len(order):
            new_columns = _turn(columns, pairs[order], angle[order])
            new_scaled = _scaled_columns(new_columns, rule)
            new_counts = _column_counts(new_scaled)
            loss = codebook_loss(new_counts)
            if loss < losses[-1]:
                columns, scaled, counts = new_columns, new_scaled, new_counts
                turn = _turn(turn, pairs[order], angle[order])
                losses.append(loss)
                rotations += len(order)
                turned = pairs[order].ravel()
                exhausted[turned] = exhausted[:, turned] = False
                exhausted[pairs[order, 0], pairs[order, 1]] = exhausted[pairs[order, 1], pairs[order, 0]] = (
                    True
                )
                break
            order = order[: len(order) // 2]
    return Aligned(
        np.ascontiguousarray(turn.T), losses, rotations, tried, entropy_before, entropy_bits(counts / len(x))
    )


def pick_pairs(
    counts: Int64[np.ndarray, "32 8"], exhausted: np.ndarray, anticorrelation: float
) -> Int64[np.ndarray, "p 2"]:
    """Disjoint pairs of columns from the most imbalanced half, greedily by score.

    When all pairs of that half are exhausted, pairs of all columns are candidates.

    The score is ``h_k + h_l + lambda c_kl`` with ``h_k = sum_j (p[k, j] - 1/8)^2`` and ``c_kl`` the negative
    cosine of the columns' deviations ``p - 1/8``: columns whose histograms complement each other gain most
    from a mix.

    Args:
      counts: codebook counts.
      exhausted: ``[32, 32]`` pairs to leave out.
      anticorrelation: lambda.
    """
    deviation = counts / counts[0].sum() - 1 / LEVELS
    imbalance = (deviation**2).sum(axis=1)
    half = np.argsort(-imbalance, kind="stable")[: len(counts) // 2]
    norm = np.sqrt(np.maximum(imbalance, 1e-30))
    opposition = -(deviation @ deviation.T) / (norm[:, None] * norm)
    score = imbalance[:, None] + imbalance + anticorrelation * opposition
    for pool in (half, range(len(counts))):
        candidates = [(k, m) for k, m in itertools.combinations(pool, 2) if not exhausted[k, m]]
        if candidates:
            break
    candidates.sort(key=lambda pair: -score[pair])
    used: set[int] = set()
    pairs = []
    for k, m in candidates:
        if k not in used and m not in used:
            used |= {k, m}
            pairs.append((k, m))
    return np.array(pairs, np.int64).reshape(-1, 2)


def best_angles(
    a: Float64[np.ndarray, "p n"], b: Float64[np.ndarray, "p n"]
) -> tuple[Float64[np.ndarray, " p"], Int64[np.ndarray, " p"]]:
    """The angle that minimises the codebook loss of each pair of columns, scales fixed: exact.

    Columns turn as ``a' = a cos t - b sin t, b' = a sin t + b cos t``. A turn by pi/2 swaps the magnitudes of
    both columns, so ``[-pi/4, pi/4)`` holds every value of the loss. In polar form ``a = r cos f,
    b = r sin f``; the magnitude ``r |cos(f + t)|`` crosses a boundary ``c < r`` at ``f + t = acos(c / r)``
    up to sign and multiples of pi, the other one a quarter turn apart: two critical angles in each window of
    pi/2 for each value and boundary. Between critical angles all counts are constant.

    Args:
      a: first columns, over their blocks' scales; n at most 32767.
      b: second columns.

    Returns:
      Angles, each the middle of its interval, and gains: how much the sum of squared counts falls, 0 where
      no interval is better than staying.
    """
    # One pair at a time: its tens of thousands of events stay in cache, and only real crossings are sorted.
    best = [_best_angle(first, second) for first, second in zip(a, b, strict=True)]
    return np.array([angle for angle, _ in best]), np.array([gain for _, gain in best], np.int64)


def _best_angle(a: Float64[np.ndarray, " n"], b: Float64[np.ndarray, " n"]) -> tuple[float, int]:
    quarter = np.pi / 2
    radius, phase = np.hypot(a, b), np.arctan2(b, a)
    quadrant = np.floor(phase / quarter)
    phase = phase - quadrant * quarter  # [0, pi/2)
    on_sine = quadrant.astype(np.int64) & 1  # 1 where a is r sin(phase) and b is r cos(phase)

    boundary, value = np.nonzero(BOUNDARIES[:, None] < radius)  # [e / 2] each
    if not len(value):
        return 0.0, 0
    alpha, phase, on_sine = np.arccos(BOUNDARIES[boundary] / radius[value]), phase[value], on_sine[value]
    keys = np.empty((2, len(value)), np.int64)
    for kind, critical in enumerate((alpha, quarter - alpha)):
        # The cosine falls through the boundary at alpha (kind 0), the sine rises through it at pi/2 - alpha.
        angle = critical - phase  # (-pi/2, pi/2); moved into the window, columns swap
        low, high = angle < -quarter / 2, angle >= quarter / 2
        angle += quarter * low
        angle -= quarter * high
        event = 14 * (on_sine ^ kind ^ (low | high)) + (7 * kind + boundary)
        # Positive floats order as their bits: the lowest bits carry the event through the sort.
        keys[kind] = ((angle + 2.0).view(np.int64) & -(1 << _EVENT_BITS)) | event
    sorted_keys = np.sort(keys, axis=None)
    events = sorted_keys & ((1 << _EVENT_BITS) - 1)
    angles = (sorted_keys & -(1 << _EVENT_BITS)).view(np.float64) - 2.0  # [e]

    # Interval e is between events e and e + 1; that before the first event is the last one, columns swapped.
    words = np.cumsum(_EVENT_WORDS[events], axis=0)  # [e, 4]
    width = np.diff(angles, append=quarter / 2)
    # Counts are taken where rounding cannot matter, in the widest interval, and all others follow from there.
    widest = int(width.argmax())
    words += _pack(_pair_counts(a, b, angles[widest] + width[widest] / 2).ravel()) - words[widest]
    counters = words.view(np.int16)  # [e, 16]
    squares = np.einsum("ec,ec->e", counters, counters, dtype=np.int32)
    squares[width < _LEAST_WIDTH] = np.iinfo(np.int32).max

    best = int(squares.argmin())
    gain = int((_pair_counts(a, b, 0.0) ** 2).sum()) - int(squares[best])
    return (float(angles[best] + width[best] / 2), gain) if gain > 0 else (0.0, 0)


def _pair_counts(a: np.ndarray, b: np.ndarray, angle: float) -> Int64[np.ndarray, "2 8"]:
    cosine, sine = np.cos(angle), np.sin(angle)
    return _column_counts(np.stack([a * cosine - b * sine, a * sine + b * cosine]))


def _pack(counters: Int64[np.ndarray, "*b 16"]) -> Int64[np.ndarray, "*b 4"]:
    """Sixteen 16-bit counters in four words. Changes of counters pack the same way, and add."""
    shifts = np.int64(1) << np.arange(0, 64, 16)  # little-endian, as the view in _best_angle reads them
    return (counters.reshape(*counters.shape[:-1], 4, 4) * shifts).sum(axis=-1)


def _event_words() -> Int64[np.ndarray, "32 4"]:
    change = np.zeros((1 << _EVENT_BITS, 2 * LEVELS), np.int64)
    for column, kind, boundary in itertools.product(range(2), range(2), range(LEVELS - 1)):
        lower, upper = column * LEVELS + boundary, column * LEVELS + boundary + 1
        leaves, enters = (upper, lower) if kind == 0 else (lower, upper)
        change[column * 14 + kind * 7 + boundary, [leaves, enters]] = -1, 1
    return _pack(change)


_EVENT_WORDS = _event_words()


def _turn(
    columns: Float64[np.ndarray, "32 n"], pairs: np.ndarray, angle: np.ndarray
) -> Float64[np.ndarray, "32 n"]:
    turned = columns.copy()
    cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = columns[pairs[:, 0]], columns[pairs[:, 1]]
    turned[pairs[:, 0]], turned[pairs[:, 1]] = a * cosine - b * sine, a * sine + b * cosine
    return turned


def _scaled(x: Float64[np.ndarray, "n 32"], rule: Rule) -> Float64[np.ndarray, "n 32"]:
    return np.ldexp(x, -block_exponents(x, rule)[:, None])


def _scaled_columns(columns: Float64[np.ndarray, "32 n"], rule: Rule) -> Float64[np.ndarray, "32 n"]:
    return columns * np.ldexp(1.0, -block_exponents(columns.T, rule))


def _counts(scaled: Float64[np.ndarray, "n 32"]) -> Int64[np.ndarray, "32 8"]:
    return _column_counts(np.ascontiguousarray(scaled.T))


def _column_counts(scaled: Float64[np.ndarray, "k n"]) -> Int64[np.ndarray, "k 8"]:
    magnitude = np.abs(scaled)
    above = np.empty((len(scaled), LEVELS + 1), np.int64)  # values of code j or more
    above[:, 0], above[:, -1] = scaled.shape[1], 0
    for code, least in enumerate(_LEAST, start=1):
        above[:, code] = np.count_nonzero(magnitude >= least, axis=1)
    return above[:, :-1] - above[:, 1:]


def _check_blocks(x: np.ndarray, least: int = 1) -> None:
    if np.ndim(x) != 2 or np.shape(x)[1] != POSITIONS or len(x) < least:
        raise TorqError(f"blocks have shape {np.shape(x)}: must be [n, {POSITIONS}] with n at least {least}")
