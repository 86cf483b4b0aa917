"""This project's own method: a macro stage across blocks that serves WUSH's closed form inside them.

WUSH's error of a block is ``(|G_b^1/2 S_b^1/2|_*)^2 / 32``; which directions share a block is left as it is. The
macro stage mixes the blocks of a group, position by position, so that the sum of these errors over blocks falls:
a gradient descent on that sum itself. The block stage then is WUSH's on the mixed moments.
"""

from __future__ import annotations

import functools
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Float64

from torq_jax.errors import TorqError
from torq_jax.rotation import POSITIONS, TwoLevelRotation, check_orthogonal, online_cost, validate
from torq_jax.solvers import wush
from torq_jax.solvers.hadamard import hadamard_matrix
from torq_jax.solvers.solution import Solution
from torq_jax.statistics import SiteStatistics

Macro = Literal["general", "orthogonal", "none"]

_WEIGHT_BYTES = 17 / 32  # of an MXFP4 weight: 32 codes and their scale
_RIDGE = 1e-4


def solve(
    statistics: SiteStatistics,
    *,
    seed: int = 0,
    macro: Macro = "general",
    steps: int = 80,
    learning_rate: float = 0.03,
    group: int | None = None,
    budget: float = 0.05,
    orthogonal_only: bool = False,
) -> Solution:
    """Both stages.

    Args:
      statistics: ``second`` and ``gain`` decide; ``outputs`` bounds the groups.
      seed: not used: the descent starts from the identity.
      macro: invertible matrices across blocks, orthogonal ones, or none (WUSH alone).
      steps: of the descent.
      learning_rate: of Adam at the start; it decays by a cosine.
      group: blocks that are mixed together, contiguous; None takes as many as the budget allows.
      budget: what the macro stage's online part may cost, in parts of the site's multiply-adds and of its weights'
        bytes in MXFP4.
      orthogonal_only: two rotations as in TORQ, solved for the output error: an orthogonal macro stage that
        minimises ``sum_b tr(S_b) tr(G_b)``, and a Hadamard matrix inside blocks, where every mixing rotation is
        as good as any other to first order.

    Returns:
      The transform; ``inter`` is ``[32, B/G, G, G]``, or None where the budget has no room for pairs of blocks. The
      report has the modelled gain over block Hadamard in dB, and how much WUSH alone and each stage contribute; the
      group, the macro stage's online cost in parts of the site's where its outputs are known, steps, seconds and
      condition numbers.

    Raises:
      TorqError: moments or gain are missing, or an option is out of range.
    """
    second, gain = wush.moments(statistics, "two_level")
    features = second.shape[0]
    blocks = features // POSITIONS
    if steps < 1 or not learning_rate > 0:
        raise TorqError(f"steps {steps}, learning_rate {learning_rate}: both must be positive")
    size = group_size(blocks, statistics.outputs, budget) if group is None else group
    if size < 1 or blocks % size:
        raise TorqError(f"group {size} does not divide {blocks} blocks")
    start = time.perf_counter()
    inter = None
    macro_report: dict[str, Any] = {"group": 1, "macro_gain_db": 0.0}
    if macro != "none" and size > 1:
        kind: Macro = "orthogonal" if orthogonal_only else macro
        s, g = groups(second, size), groups(gain, size)
        mixed, costs = descend(
            jnp.asarray(s),
            jnp.asarray(g),
            kind,
            "traces" if orthogonal_only else "nuclear",
            steps,
            learning_rate,
        )
        inter = np.asarray(mixed, np.float64)
        if kind == "orthogonal":
            inter = _nearest_orthogonal(inter)  # float32 left it orthogonal to about 1e-6
        losses = np.asarray(costs, np.float64)
        macro_report = {
            "group": size,
            "macro_gain_db": wush.decibels(losses[0], losses.min()),
            "macro_steps": steps,
            "macro_condition_number": float(np.linalg.cond(inter).max()),
            **_online_shares(inter, features, statistics.outputs),
        }
    mixed_second, mixed_gain = mixed_blocks(second, inter, size), mixed_blocks(gain, _dual(inter), size)
    s, g = wush.diagonal_blocks(second), wush.diagonal_blocks(gain)
    if orthogonal_only:
        rotation = TwoLevelRotation(inter, hadamard_matrix(), features)
        validate(rotation)
        found = macro_report | {
            "gain_db": wush.decibels(
                wush.modelled_error(s, g), wush.modelled_error(mixed_second, mixed_gain)
            ),
            "orthogonality_error": check_orthogonal(rotation),
        }
        return Solution(rotation, found | _seconds(start))
    intra = wush.block_transforms(mixed_second, mixed_gain, ridge=_RIDGE)
    rotation = TwoLevelRotation(inter, intra, features)
    validate(rotation)
    before, alone = (
        wush.modelled_error(s, g),
        wush.modelled_error(s, g, wush.block_transforms(s, g, ridge=_RIDGE)),
    )
    after = wush.modelled_error(mixed_second, mixed_gain, intra)
    gains = {"gain_db": wush.decibels(before, after), "wush_gain_db": wush.decibels(before, alone)}
    found = macro_report | wush.report(mixed_second, mixed_gain, intra) | gains
    return Solution(rotation, found | _seconds(start))


def group_size(blocks: int, outputs: int | None, budget: float) -> int:
    """The most blocks that a budget lets the macro stage mix: a divisor of ``blocks``.

    A token costs ``d G`` multiply-adds, a step ``2 d G`` bytes of matrices in bfloat16. All blocks where the site's
    output size is unknown.
    """
    if budget < 0:
        raise TorqError(f"budget {budget} must not be negative")
    if outputs is None:
        return blocks
    limit = min(budget * outputs, budget * outputs * _WEIGHT_BYTES / 2)
    return max(size for size in range(1, blocks + 1) if blocks % size == 0 and (size <= limit or size == 1))


def groups(matrix: Float[np.ndarray, "d d"], size: int) -> Float32[np.ndarray, "n g 32 g 32"]:
    """Moments inside groups of ``size`` blocks, in units of the mean of the diagonal."""
    count = matrix.shape[0] // (POSITIONS * size)
    index = np.arange(count)
    found = matrix.reshape(count, size * POSITIONS, count, size * POSITIONS)[index, :, index]
    mean = float(np.trace(matrix)) / matrix.shape[0]
    return (
        (found / (mean if mean > 0 else 1.0))
        .astype(np.float32)
        .reshape(count, size, POSITIONS, size, POSITIONS)
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def descend(
    second: Float32[Array, "n g 32 g 32"],
    gain: Float32[Array, "n g 32 g 32"],
    kind: Macro,
    objective: Literal["nuclear", "traces"],
    steps: int,
    learning_rate: float,
) -> tuple[Float32[Array, "32 n g g"], Float32[Array, " steps"]]:
    """Matrices across blocks by Adam on the modelled error, and that error before each step; the best are kept.

    They are ``exp(A)``, of a free matrix or of a skew one; their inverses ``exp(-A)``. Products alone: on a CPU, the
    triangular solves behind an inverse or the derivative of a factorisation contend for threads with XLA's own and
    then take a hundred times as long.
    """
    count, size = second.shape[:2]
    schedule = optax.cosine_decay_schedule(learning_rate, steps, alpha=0.02)
    optimiser = optax.adam(schedule)

    def generator(free: Array) -> Array:
        return free - free.mT if kind == "orthogonal" else free

    def loss(free: Array) -> Array:
        a = generator(free)
        return jnp.log(error(mix(second, exponential(a)), mix(gain, exponential(-a).mT), objective))

    def step(carry: Any, _: None) -> tuple[Any, Array]:
        free, state, best, least = carry
        value, gradient = jax.value_and_grad(loss)(free)
        better = jnp.isfinite(value) & (value < least)
        best, least = jnp.where(better, free, best), jnp.where(better, value, least)
        update, state = optimiser.update(jnp.nan_to_num(gradient), state)
        return (free + update, state, best, least), value

    with jax.default_matmul_precision("highest"):
        start = jnp.zeros((POSITIONS, count, size, size))
        carry = (start, optimiser.init(start), start, jnp.float32(jnp.inf))
        (_, _, best, _), losses = jax.lax.scan(step, carry, None, length=steps)
        return exponential(generator(best)), jnp.exp(jnp.where(jnp.isfinite(losses), losses, jnp.inf))


def exponential(a: Float32[Array, "*n g g"]) -> Float32[Array, "*n g g"]:
    """``exp(a)``, to float32 for norms up to about 8: Taylor's series of ``a / 32``, squared five times."""
    scaled, unit = a / 32, jnp.eye(a.shape[-1])
    found = unit + scaled / 6
    for order in range(5, 0, -1):
        found = unit + scaled @ found / order
    for _ in range(5):
        found = found @ found
    return found


def mix(
    moment: Float32[Array, "n g 32 g 32"], matrices: Float32[Array, "32 n g g"]
) -> Float32[Array, "n g 32 32"]:
    """Blocks on the diagonal of a moment after mixing: ``M_k^T moment[:, k, :, l] M_l``."""
    half = jnp.einsum("kncb,nckdl->nbkdl", matrices, moment)
    return jnp.einsum("nbkdl,lndb->nbkl", half, matrices)


def error(
    second: Float32[Array, "n g 32 32"], gain: Float32[Array, "n g 32 32"], objective: str
) -> Float32[Array, ""]:
    """Modelled error of all blocks: with the best block transforms (nuclear norms), or with rotations (traces)."""
    if objective == "traces":
        traces = jnp.trace(second, axis1=-2, axis2=-1) * jnp.trace(gain, axis1=-2, axis2=-1)
        return jnp.sum(traces) / POSITIONS
    s, g = wush.ridged(second, _RIDGE), wush.ridged(gain, _RIDGE)
    # At the best transform T of a block its product of traces is the squared nuclear norm; and since T is best, the
    # derivative of that product with T held is the derivative of its minimum: nothing is factorised backwards.
    metric, inverse = jax.lax.stop_gradient(_best_metric(s, g))
    energy = jnp.sum(metric * s, axis=(-2, -1))
    cost = jnp.sum(inverse * g, axis=(-2, -1))
    return jnp.sum(energy * cost) / POSITIONS


def _best_metric(second: Array, gain: Array) -> tuple[Array, Array]:
    """``T T^T`` of WUSH's transform and its inverse: traces of their products with the moments are nuclear norms."""
    values, vectors = jnp.linalg.eigh(second)
    root = jnp.sqrt(jnp.maximum(values, 1e-7 * values[..., -1:]))[..., None, :]
    half, inverse_half = (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
    squares, u = jnp.linalg.eigh(half @ gain @ half)
    # Inexact small values only make T a little less than best: the two results stay each other's inverses.
    s = jnp.sqrt(jnp.maximum(squares, 1e-7 * squares[..., -1:]))[..., None, :]
    left, right = inverse_half @ u, half @ u
    return (left * s) @ left.mT, (right / s) @ right.mT


def mixed_blocks(
    matrix: Float[np.ndarray, "d d"], inter: Float64[np.ndarray, "32 n g g"] | None, size: int
) -> Float64[np.ndarray, "B 32 32"]:
    """Blocks on the diagonal after the macro stage, in float64."""
    if inter is None:
        return wush.diagonal_blocks(matrix)
    blocks = matrix.shape[0] // POSITIONS
    grouped = groups(matrix, size).astype(np.float64)
    half = np.einsum("kncb,nckdl->nbkdl", inter, grouped, optimize=True)
    return np.einsum("nbkdl,lndb->nbkl", half, inter, optimize=True).reshape(blocks, POSITIONS, POSITIONS)


def _dual(inter: np.ndarray | None) -> np.ndarray | None:
    return None if inter is None else np.linalg.inv(inter).mT


def _nearest_orthogonal(matrices: np.ndarray) -> np.ndarray:
    u, _, v = np.linalg.svd(matrices)
    return u @ v


def _online_shares(inter: np.ndarray, features: int, outputs: int | None) -> dict[str, float]:
    """The macro stage's online cost, in parts of the site's own multiply-adds and bytes."""
    if outputs is None:
        return {}
    cost = online_cost(TwoLevelRotation(inter, None, features))
    return {
        "macro_share_of_multiply_adds": cost.multiply_adds / (features * outputs),
        "macro_share_of_bytes": cost.bytes_read / (features * outputs * _WEIGHT_BYTES),
    }


def _seconds(start: float) -> dict[str, float]:
    return {"seconds": time.perf_counter() - start}
