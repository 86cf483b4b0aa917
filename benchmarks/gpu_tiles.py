"""Tiles of the Hopper and Blackwell products for the sites of LLaMA-3 and Qwen3 models, chosen by counting.

    python -m benchmarks.gpu_tiles [--models llama-3-8b qwen3-8b] [--rows 16 1024]

Nothing is compiled or run. *Counted* is what ``pallas_kernels.tiles.counted_us`` adds up; *bound* what the call needs
at least, for its bytes or for its multiply-adds on all multiprocessors at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.tpu_tune import MODELS
from pallas_kernels import blackwell, hopper, tiles

KERNELS: dict[str, Any] = {"hopper": hopper, "blackwell": blackwell}
ROWS = (1, 16, 64, 256, 1024, 2048)


def row(kernel: str, rows: int, k: int, n: int) -> dict[str, Any]:
    """The tiles of a call, its time by counting and its bound, in microseconds."""
    module, gpu = KERNELS[kernel], tiles.GPUS[kernel]
    chosen = module.choose(rows, k, n)
    work = module.work(chosen, rows, k, n)
    whole = module.work(chosen._replace(splits=1), rows, k, n).moved
    products = rows * k * n / gpu.multiply_adds / gpu.cores / gpu.clock
    return {
        "tiles": chosen._asdict(),
        "counted_us": tiles.counted_us(gpu, work),
        "bound_us": max(whole / gpu.bandwidth, products) * 1e6,
        "rounds": work.tiles / gpu.cores,
        "shared": module.shared_memory(chosen),
    }


def main() -> int:
    """Count, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu_tiles.json")
    options = parser.parse_args()
    shapes = sorted({site for name in options.models for site in MODELS[name].sites()})
    head = ("kernel", "K", "N", "rows", "tiles", "rounds", "shared KiB", "counted µs", "bound µs")
    table = Table(*head, title="chosen by counting, not measured")
    found: dict[str, Any] = {"machine": describe(), "calls": {}}
    for kernel in KERNELS:
        for k, n in shapes:
            for rows in options.rows:
                made = row(kernel, rows, k, n)
                found["calls"][f"{kernel} {rows} {k} {n}"] = made
                sizes = ", ".join(f"{name} {size}" for name, size in made["tiles"].items())
                cells = (kernel, str(k), str(n), str(rows), sizes, f"{made['rounds']:.2f}")
                table.add_row(
                    *cells,
                    f"{made['shared'] / 1024:.0f}",
                    f"{made['counted_us']:.2f}",
                    f"{made['bound_us']:.2f}",
                )
    Console(width=140).print(table)
    options.json.write_text(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
