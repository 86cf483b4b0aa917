"""TORQ (arXiv 2605.19561): macro-equilibrium across blocks, then micro-alignment inside them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from jaxtyping import Float

from torq_jax.errors import TorqError
from torq_jax.rotation import POSITIONS, TwoLevelRotation, check_orthogonal, rotate_host
from torq_jax.solvers import macro, micro
from torq_jax.solvers.solution import Solution
from torq_jax.statistics import SiteStatistics

_TOKENS = 512  # tokens that blocks are drawn from: bounds what is rotated for the draw


def solve(
    statistics: SiteStatistics,
    *,
    seed: int = 0,
    form: macro.Form = "shared",
    group: int | None = None,
    rule: micro.Rule = "floor",
    steps: int = 80,
    sample_blocks: int = 2048,
    anticorrelation: float = 0.1,
) -> Solution:
    """Both levels of the paper.

    Args:
      statistics: of the site: ``inter`` decides the macro stage, ``samples`` the micro stage.
      seed: of the draw of sample blocks.
      form: ``"shared"`` has one inter matrix, ``"per_position"`` one for each of the 32 positions.
      group: mix only inside groups of this many blocks; None mixes all.
      rule: scale rule of the activations: "floor", "ceil" or "even".
      steps: most R-steps of micro-alignment.
      sample_blocks: blocks that micro-alignment sees, drawn from macro-rotated samples; at most 32767.
      anticorrelation: weight lambda of the anti-correlation when micro-alignment picks pairs of columns.

    Returns:
      The rotation, intra shared, and a report: block-energy imbalance (largest over mean, standard deviation
      over mean) before and after, codebook entropy in bits originally, after macro and after micro, the loss
      after each accepted step, the numbers of rotations, seconds.

    Raises:
      TorqError: sizes that do not fit, statistics without moments or samples, an option out of range, or a
        result that is not orthogonal.
    """
    _check(statistics, steps, sample_blocks)
    features = statistics.samples.shape[-1]

    start = time.perf_counter()
    equalised = macro.solve_inter(statistics.inter, form=form, group=group)
    macro_seconds = time.perf_counter() - start

    start = time.perf_counter()
    inter = TwoLevelRotation(equalised.rotation, None, features)
    original, rotated = draw_blocks(statistics.samples, inter, sample_blocks, seed)
    aligned = micro.align(rotated, rule=rule, steps=steps, anticorrelation=anticorrelation)
    micro_seconds = time.perf_counter() - start

    rotation = TwoLevelRotation(equalised.rotation, aligned.rotation, features)
    before = macro.block_energies(statistics.inter).sum(axis=0)
    after = macro.block_energies(statistics.inter, equalised.rotation).sum(axis=0)
    report: dict[str, Any] = {
        "orthogonality_error": check_orthogonal(rotation),
        **_imbalance("before", before),
        **_imbalance("after", after),
        "macro_rotations": int(equalised.rotations.sum()),
        "macro_rotations_most": int(equalised.rotations.max()),
        "micro_rotations": aligned.rotations,
        "micro_steps": aligned.steps,
        "micro_losses": aligned.losses,
        "codebook_entropy_original": _entropy(original, rule),
        "codebook_entropy_before": aligned.entropy_before,
        "codebook_entropy_after": aligned.entropy_after,
        "macro_seconds": macro_seconds,
        "micro_seconds": micro_seconds,
    }
    return Solution(rotation, report)


def draw_blocks(
    samples: Float[np.ndarray, "n d"], rotation: TwoLevelRotation, count: int, seed: int
) -> tuple[Float[np.ndarray, "m 32"], Float[np.ndarray, "m 32"]]:
    """Blocks drawn without replacement, as sampled and after ``rotation``; at most ``count`` of them.

    Blocks that are zero after the rotation (padding) are left out.
    """
    rng = np.random.default_rng(seed)
    if len(samples) > _TOKENS:
        samples = samples[np.sort(rng.choice(len(samples), _TOKENS, replace=False))]
    rotated = rotate_host(samples, rotation).reshape(-1, POSITIONS)
    kept = np.flatnonzero(np.any(rotated != 0, axis=1))
    if len(kept) > count:
        kept = np.sort(rng.choice(kept, count, replace=False))
    return samples.reshape(-1, POSITIONS)[kept], rotated[kept]


def _check(statistics: SiteStatistics, steps: int, sample_blocks: int) -> None:
    inter, samples = statistics.inter.shape, statistics.samples.shape
    if len(samples) != 2 or not samples[0] or len(inter) != 3 or samples[1] != POSITIONS * inter[-1]:
        raise TorqError(
            f"samples {samples} and moments {inter} do not fit: must be [n, 32 B] with a token at least, and "
            "[32, B, B]"
        )
    if not np.any(statistics.inter) and np.any(statistics.samples):
        raise TorqError("the statistics hold no moments: gather them with moments=True for method 'torq'")
    if steps < 0 or not 1 <= sample_blocks <= micro.MAX_BLOCKS:
        raise TorqError(
            f"steps {steps}, sample_blocks {sample_blocks}: steps must not be negative, sample_blocks must "
            f"lie in 1..{micro.MAX_BLOCKS}"
        )


def _imbalance(when: str, energies: np.ndarray) -> dict[str, float]:
    mean = float(energies.mean())
    if mean == 0:
        return {f"block_energy_max_over_mean_{when}": 1.0, f"block_energy_std_over_mean_{when}": 0.0}
    return {
        f"block_energy_max_over_mean_{when}": float(energies.max() / mean),
        f"block_energy_std_over_mean_{when}": float(energies.std() / mean),
    }


def _entropy(blocks: np.ndarray, rule: micro.Rule) -> float:
    blocks = blocks[np.any(blocks != 0, axis=1)]
    return micro.entropy_bits(micro.codebook_histogram(blocks, rule)) if len(blocks) else 0.0
