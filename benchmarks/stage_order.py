"""Which stage comes first: the modelled error after a macro and a micro stage, in both orders.

python -m benchmarks.stage_order --statistics FOLDER      # gathered by benchmarks.accuracy, below its --work

Macro then micro is what ``two_level`` does: matrices across blocks that serve WUSH's closed form, which comes after
them. The other way round WUSH's transforms come first, and matrices across blocks then minimise the error as it is,
``sum_b tr(S_b) tr(G_b)``. Gains in dB over a Hadamard matrix in each block, by the loss's weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from benchmarks.machine import describe
from convert import sources
from convert.progress import progress
from torq_jax.config import SITES
from torq_jax.solvers import two_level, wush
from torq_jax.statistics import SiteStatistics

BUDGET, STEPS, RATE = 0.05, 80, 0.03
"""The defaults of ``two_level``."""


def gains(statistics: SiteStatistics) -> dict[str, float]:
    """Gains of one site in dB, by the order of the stages."""
    second, gain = wush.moments(statistics, "two_level")
    size = two_level.group_size(second.shape[0] // 32, statistics.outputs, BUDGET)
    s, g = wush.diagonal_blocks(second), wush.diagonal_blocks(gain)
    intra = wush.block_transforms(s, g)
    before, alone = wush.modelled_error(s, g), wush.modelled_error(s, g, intra)
    found = {"wush": wush.decibels(before, alone)}

    inter = mixing(second, gain, size, "general", "nuclear")
    mixed = mixed_moments(second, gain, inter, size)
    found["macro, micro"] = wush.decibels(before, wush.modelled_error(*mixed, wush.block_transforms(*mixed)))

    second, gain = in_blocks(second, intra), in_blocks(gain, np.linalg.inv(intra).mT)
    first = wush.modelled_error(wush.diagonal_blocks(second), wush.diagonal_blocks(gain))
    for kind in ("general", "orthogonal"):
        inter = mixing(second, gain, size, kind, "traces")
        after = wush.modelled_error(*mixed_moments(second, gain, inter, size))
        found[f"micro, {kind} macro"] = found["wush"] + wush.decibels(first, after)
    return found


def mixing(second: np.ndarray, gain: np.ndarray, size: int, kind: str, objective: str) -> np.ndarray:
    """Matrices across the blocks of each group, ``[32, n, size, size]``."""
    s, g = (jnp.asarray(two_level.groups(m, size)) for m in (second, gain))
    matrices, _ = two_level.descend(s, g, kind, objective, STEPS, RATE)  # type: ignore[arg-type]
    return np.asarray(matrices, np.float64)


def mixed_moments(
    second: np.ndarray, gain: np.ndarray, inter: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both moments' blocks on the diagonal after mixing, ``[B, 32, 32]``."""
    dual = np.linalg.inv(inter).mT
    return two_level.mixed_blocks(second, inter, size), two_level.mixed_blocks(gain, dual, size)


def in_blocks(moment: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """``T^T moment T`` with T the ``[B, 32, 32]`` matrices on the diagonal; in float64."""
    count = len(matrices)
    blocks = moment.astype(np.float64).reshape(count, 32, count, 32)
    found = np.einsum("akc,akbl,bld->acbd", matrices, blocks, matrices, optimize=True)
    return found.reshape(moment.shape)


def main() -> None:
    """Sites of every fourth layer; means by site, and JSON."""
    from benchmarks.accuracy import load

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--statistics", type=Path, required=True)
    parser.add_argument("--every", type=int, default=4, help="layers: one of so many")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "stage_order.json")
    options = parser.parse_args()
    source = sources.open_source(str(sources.fetch_demo()))
    layers = range(1, source.config.num_layers, options.every)
    rows = []
    with progress(len(layers), "stage order") as shown:
        for layer in layers:
            for site in SITES:
                statistics = load(options.statistics, source, layer, site, "loss", None)
                rows.append({"layer": layer, "site": site, **gains(statistics)})
            shown.advance()
    orders = [key for key in rows[0] if key not in ("layer", "site")]
    print(f"{'dB over block Hadamard':24s}" + "".join(f"{o:>26s}" for o in orders))
    for site in SITES:
        own = [row for row in rows if row["site"] == site]
        print(f"{site:24s}" + "".join(f"{np.mean([r[o] for r in own]):26.2f}" for o in orders))
    result = {"machine": describe(), "model": source.name, "rows": rows}
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
