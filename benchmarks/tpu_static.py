"""Simulated cycles of the TPU kernels beside bfloat16 products and the floors of memory and matrix unit.

    python -m benchmarks.tpu_static [--anew]

Needs ``pip install 'torq-jax[tpu]' qwix``, no TPU. Nothing is measured: libtpu's static profile is an estimate, and
its model of the memory is optimistic, so the larger of its time and the time that the bytes need counts. How full
the instruction slots of each kernel's longest loop are is counted in libtpu's listing of it.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.tpu_simulator import Call, resume
from benchmarks.tpu_tune import rotation_shapes
from pallas_kernels import tiles

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
# libtpu's profiler gives up on tpu7x where all rows are one tile.
ROWS = {"v5e": (16, 1024), "v6e": (16, 1024), "tpu7x": (16, 1024, 2048)}
OPERATIONS = ("xla_bf16", "pallas_bf16", "qwix_int8", "mxfp4", "mxfp4_a4", "fused")
TITLES = {
    "xla_bf16": "XLA bfloat16",
    "pallas_bf16": "Pallas bfloat16",
    "qwix_int8": "qwix W8A8",
    "mxfp4": "W4A16",
    "mxfp4_a4": "W4A4, no rotation",
    "fused": "W4A4, both rotation stages",
}


def call_of(operation: str, generation: str, m: int, k: int, n: int) -> Call:
    """An operation of the table."""
    if operation == "mxfp4":
        return Call("fused", generation, m, k, n, rule=None)
    if operation == "mxfp4_a4":
        return Call("fused", generation, m, k, n)
    if operation == "fused":
        return Call("fused", generation, m, k, n, *rotation_shapes(k, n))
    return Call(operation, generation, m, k, n)


def floors(call: Call) -> dict[str, float]:
    """Bytes that must move, and the microseconds that they and the multiply-adds need at least."""
    properties = tiles.GENERATIONS[call.generation]
    bits = 16 if "bf16" in call.operation else 8 if call.operation == "qwix_int8" else 4.25
    matrices = sum(math.prod(shape) for shape in (call.inter, call.intra) if shape is not None)
    width = 4 if call.operation == "qwix_int8" else 2  # of an activation that enters
    moved = call.k * call.n * bits / 8 + width * call.m * call.k + 2 * (call.m * call.n + matrices)
    return {
        "bytes": moved,
        "memory_us": moved / properties.bandwidth * 1e6,
        "weights_us": call.k * call.n * bits / 8 / properties.bandwidth * 1e6,
        # Published: int8 at twice bfloat16's rate on v5e and v6e.
        "matrix_us": (0.5 if bits == 8 and call.generation != "tpu7x" else 1)
        * call.m
        * call.k
        * call.n
        / properties.multiply_adds
        / properties.clock
        * 1e6,
    }


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each call with its floors, its time and its ratios."""
    made = []
    for key, found in result["calls"].items():
        operation, generation, *numbers = key.split()
        m, k, n = map(int, numbers)
        floor = floors(call_of(operation, generation, m, k, n))
        row = {"operation": operation, "generation": generation, "m": m, "k": k, "n": n, **found, **floor}
        if "cycles" in found:
            row["simulated_us"] = found["cycles"] / tiles.GENERATIONS[generation].clock * 1e6
            row["us"] = max(row["simulated_us"], floor["memory_us"])
        made.append(row)
    return made


def fullest(slots: dict[str, dict[str, float]]) -> str:
    """The kind of slot that each kernel's longest loop uses most, and how much of it."""
    kinds = ("MXU", "XLU", "VALU", "VLOAD", "VSTORE")
    found = [max((kernel.get(kind, 0.0), kind) for kind in kinds) for kernel in slots.values()]
    return ", ".join(f"{kind} {part:.0%}" for part, kind in found)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Simulated times; decode over the time its weights need, prefill over XLA's bfloat16 product."""
    table = Table(
        *(
            "",
            "rows",
            "K",
            "N",
            "",
            "cycles",
            "simulated µs",
            "memory µs",
            "matrix µs",
            "larger µs",
            "over weights",
        ),
        "over XLA bfloat16",
        "fullest slots",
        title="simulated by libtpu's static profile: nothing was run",
    )
    xla = {
        (r["generation"], r["m"], r["k"], r["n"]): r.get("us") for r in rows if r["operation"] == "xla_bf16"
    }
    for r in rows:
        place = (r["generation"], r["m"], r["k"], r["n"])
        if "cycles" not in r:
            table.add_row(r["generation"], *map(str, place[1:]), TITLES[r["operation"]], r["error"][:40])
            continue
        other = xla.get(place)
        table.add_row(
            r["generation"],
            *map(str, place[1:]),
            TITLES[r["operation"]],
            f"{r['cycles']:,}",
            *(f"{r[name]:.1f}" for name in ("simulated_us", "memory_us", "matrix_us", "us")),
            f"{r['us'] / r['weights_us']:.2f}",
            f"{r['us'] / other:.2f}" if other else "–",
            fullest(r["slots"]),
        )
    Console(width=200).print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Roofline: time of each call against the floor that binds it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(tiles.GENERATIONS)
    figure, axes = plt.subplots(1, len(names), figsize=(13, 4.2), sharey=True)
    for axis, generation in zip(axes, names, strict=True):
        properties = tiles.GENERATIONS[generation]
        peak = 2 * properties.multiply_adds * properties.clock
        intensity = [2.0**i for i in range(2, 14)]
        axis.plot(intensity, [min(peak, i * properties.bandwidth) / 1e12 for i in intensity], "k-", lw=1)
        for operation, marker in zip(OPERATIONS, "sv*^Do", strict=True):
            some = [
                r for r in rows if r["operation"] == operation and r["generation"] == generation and "us" in r
            ]
            flops = [2 * r["m"] * r["k"] * r["n"] for r in some]
            axis.scatter(
                [f / r["bytes"] for f, r in zip(flops, some, strict=True)],
                [f / r["us"] / 1e6 for f, r in zip(flops, some, strict=True)],
                marker=marker,
                s=26,
                label=TITLES[operation],
                alpha=0.75,
            )
        axis.set(xscale="log", yscale="log", title=generation, xlabel="flop a byte")
        axis.grid(alpha=0.3, which="both", lw=0.4)
    axes[0].set_ylabel("Tflop/s, simulated")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> int:
    """Simulate what is missing, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--generations", nargs="+", choices=list(tiles.GENERATIONS), default=list(tiles.GENERATIONS)
    )
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "tpu_static.json")
    parser.add_argument("--anew", action="store_true", help="forget what the JSON has")
    options = parser.parse_args()
    if options.anew:
        options.json.unlink(missing_ok=True)
    calls = {
        f"{operation} {generation} {m} {k} {n}": call_of(operation, generation, m, k, n)
        for generation in options.generations
        for m in ROWS[generation]
        for k, n in SHAPES
        for operation in OPERATIONS
    }
    result = resume(options.json, calls, retry=True)
    rows = rows_of(result)
    print_table(rows)
    draw(rows, options.json.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
