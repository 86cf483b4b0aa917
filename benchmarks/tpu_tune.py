"""The table of tiles in ``pallas_kernels/tiles.py``: for every shape the candidate with the fewest simulated cycles.

    python -m benchmarks.tpu_tune [--models llama-3-8b qwen3-8b] [--generations v6e] [--write]

Needs ``pip install 'torq-jax[tpu]'``, no TPU. Resumable: what the JSON has is kept. ``--write`` puts the table into
``pallas_kernels/tiles.py``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.tpu_simulator import Call, prepared, resume
from pallas_kernels import tiles, tpu
from torq_jax.solvers.two_level import group_size

ROWS = (16, 1024)


class Model(NamedTuple):
    """Sizes that decide the shapes of a model's four sites."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int

    def sites(self) -> list[tuple[int, int]]:
        """``(K, N)`` of each site, its weights side by side."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (self.hidden, query + 2 * kv),
            (query, self.hidden),
            (self.hidden, 2 * self.mlp),
            (self.mlp, self.hidden),
        ]


MODELS = {
    "llama-3-1b": Model(2048, 32, 8, 64, 8192),
    "llama-3-3b": Model(3072, 24, 8, 128, 8192),
    "llama-3-8b": Model(4096, 32, 8, 128, 14336),
    "llama-3-70b": Model(8192, 64, 8, 128, 28672),
    "qwen3-0.6b": Model(1024, 16, 8, 128, 3072),
    "qwen3-1.7b": Model(2048, 16, 8, 128, 6144),
    "qwen3-4b": Model(2560, 32, 8, 128, 9728),
    "qwen3-8b": Model(4096, 32, 8, 128, 12288),
    "qwen3-14b": Model(5120, 40, 8, 128, 17408),
    "qwen3-32b": Model(5120, 64, 8, 128, 25600),
}


def rotation_shapes(k: int, n: int) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Shapes of the default method's matrices at a site, the groups made a power of two."""
    size = group_size(k // 32, n, 0.05)
    while size > 1 and (size & (size - 1) or (k // 32) % size or size > 128):
        size -= 1
    return (None if size < 2 else (32, k // 32 // size, size, size)), (k // 32, 32, 32)


def candidates(generation: str, rows: int, k: int, n: int) -> Iterator[tuple[int, ...]]:
    """What is tried: what fits in VMEM by the estimate, without what never won."""
    inter, intra = rotation_shapes(k, n)
    rotation = prepared(k, inter, intra)
    for each in tiles.candidates(generation, rows, k, n):
        if rows > tpu.RESIDENT_ROWS and (each.rotated < 128 or each.rows <= tpu.RESIDENT_ROWS):
            continue
        each = tiles.held_tiles(generation, each, rows, k, n, rotation=rotation)
        if tiles.vmem_bytes(each, rows, k, n, rotation=rotation) <= tiles.limit(generation, each):
            yield (*each[:3], each.features) if each.features else each[:3]


def main() -> int:
    """Simulate what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--generations", nargs="+", choices=list(tiles.GENERATIONS), default=list(tiles.GENERATIONS)
    )
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--most", type=int, default=4, help="candidates of each shape")
    parser.add_argument(
        "--most-features",
        type=int,
        default=2**31,
        help="leave out shapes with more, which compile longest",
    )
    parser.add_argument("--write", action="store_true", help="put the table into pallas_kernels/tiles.py")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "tpu_tune.json")
    options = parser.parse_args()
    calls: dict[str, Call] = {}
    shapes = sorted({site for name in options.models for site in MODELS[name].sites()})
    shapes = [(k, n) for k, n in shapes if k <= options.most_features]
    for rows in options.rows:
        for generation in options.generations:
            for k, n in shapes:
                for each in list(candidates(generation, rows, k, n))[: options.most]:
                    key = f"{generation} {k} {n} {rows} {' '.join(map(str, each))}"
                    calls[key] = Call("fused", generation, rows, k, n, *rotation_shapes(k, n), "even", each)
    result = resume(options.json, calls, retry=False)
    lines = [f"    {entry!r}," for entry in best(result["calls"])]
    block = "TABLE: tuple[Entry, ...] = (\n" + "\n".join(lines) + "\n)\n"
    print(block)
    if options.write:
        path = Path(tiles.__file__)
        path.write_text(
            re.sub(r"TABLE: tuple\[Entry, \.\.\.\] = \(.*\)\n\Z", block, path.read_text(), flags=re.S)
        )
    return 0


def best(calls: dict[str, Any]) -> list[tiles.Entry]:
    """The fastest candidate of every shape."""
    found: dict[tuple[str, int, int, int], tuple[int, tuple[int, ...]]] = {}
    for key, result in calls.items():
        generation, *numbers = key.split()
        k, n, rows, *chosen = map(int, numbers)
        if "cycles" in result:
            place = (generation, k, n, rows)
            tried = (result["cycles"], tuple(chosen))
            found[place] = min(found.get(place, tried), tried)
    return [tiles.Entry(*place, tried[1]) for place, tried in sorted(found.items())]


if __name__ == "__main__":
    sys.exit(main())
