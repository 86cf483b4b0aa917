"""This project's own method: a macro stage across blocks that serves WUSH's closed form inside them.

WUSH's error of a block is ``(|G_b^1/2 S_b^1/2|_*)^2 / 32``; which directions share a block is left as it is. The
macro stage mixes the blocks of a group, position by position, so that the sum of these errors over blocks falls:
a gradient descent on that sum itself. The block stage then is WUSH's on the mixed moments.
"""

from __future__ import annotations

import functools
import time
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Float64

from torq_jax.errors import TorqError
from torq_jax.rotation import POSITIONS, TwoLevelRotation, check_orthogonal, validate
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
      The transform; ``inter`` is ``[32, B/G, G, G]``. The report has both stages' modelled gains in dB, the group,
      the steps and the condition number.

    Raises:
      TorqError: moments or gain are missing, or an option is out of range.
    """
    second, gain = wush.moments(statistics, "two_level")
    features = second.shape[0]
    blocks = features // POSITIONS
    if macro not in get_args(Macro) or steps < 1 or not learning_rate > 0:
        raise TorqError(
            f"macro {macro!r}, steps {steps}, learning_rate {learning_rate}: macro must be one of "
            f"{', '.join(get_args(Macro))}, the others positive"
        )
    size = group_size(blocks, statistics.outputs, budget) if group is None else group
    if size < 1 or blocks % size:
        raise TorqError(f"group {size} does not divide {blocks} blocks")
    start = time.perf_counter()
    inter, macro_report = None, {"group": size, "macro_gain_db": 0.0}
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
            "macro_gain_db": float(10 * np.log10(losses[0] / losses.min())),
            "macro_steps": steps,
            "macro_condition_number": float(np.linalg.cond(inter).max()),
        }
    mixed_second, mixed_gain = mixed_blocks(second, inter, size), mixed_blocks(gain, _dual(inter), size)
    if orthogonal_only:
        rotation = TwoLevelRotation(inter, hadamard_matrix(), features)
        validate(rotation)
        error = check_orthogonal(rotation)
        return Solution(rotation, macro_report | {"orthogonality_error": error} | _seconds(start))
    intra = wush.block_transforms(mixed_second, mixed_gain, ridge=_RIDGE)
    rotation = TwoLevelRotation(inter, intra, features)
    validate(rotation)
    return Solution(rotation, macro_report | wush.report(mixed_second, mixed_gain, intra) | _seconds(start))


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
    """Matrices across blocks by Adam on the modelled error, and that error before each step; the best are kept."""
    count, size = second.shape[:2]
    unit = jnp.eye(size)
    schedule = optax.cosine_decay_schedule(learning_rate, steps, alpha=0.02)
    optimiser = optax.adam(schedule)

    def matrices(free: Array) -> tuple[Array, Array]:
        if kind == "orthogonal":  # Cayley
            skew = (free - free.mT) / 2
            mixed = jnp.linalg.solve(unit - skew, unit + skew)
            return mixed, mixed
        mixed = unit + free
        return mixed, jnp.linalg.inv(mixed).mT

    def loss(free: Array) -> Array:
        mixed, dual = matrices(free)
        return jnp.log(error(mix(second, mixed), mix(gain, dual), objective))

    def step(carry: Any, _: None) -> tuple[Any, Array]:
        free, state, best, least = carry
        value, gradient = jax.value_and_grad(loss)(free)
        # A step that left the invertible matrices is never the best one.
        better = jnp.isfinite(value) & (value < least)
        best, least = jnp.where(better, free, best), jnp.where(better, value, least)
        update, state = optimiser.update(jnp.nan_to_num(gradient), state)
        return (free + update, state, best, least), value

    with jax.default_matmul_precision("highest"):
        start = jnp.zeros((POSITIONS, count, size, size))
        carry = (start, optimiser.init(start), start, jnp.float32(jnp.inf))
        (_, _, best, _), losses = jax.lax.scan(step, carry, None, length=steps)
        return matrices(best)[0], jnp.exp(jnp.where(jnp.isfinite(losses), losses, jnp.inf))


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
    lower = jnp.linalg.cholesky(_ridged(second))
    product = lower.mT @ _ridged(gain) @ lower
    values = jnp.linalg.eigvalsh((product + product.mT) / 2)  # squares of the singular values
    floor = 1e-7 * values[..., -1:]
    return jnp.sum(jnp.sum(jnp.sqrt(jnp.maximum(values, floor)), axis=-1) ** 2) / POSITIONS


def _ridged(moment: Array) -> Array:
    mean = jnp.trace(moment, axis1=-2, axis2=-1) / POSITIONS
    ridge = _RIDGE * jnp.where(mean > 0, mean, 1.0)
    return moment + ridge[..., None, None] * jnp.eye(POSITIONS)


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


def _seconds(start: float) -> dict[str, float]:
    return {"seconds": time.perf_counter() - start}
