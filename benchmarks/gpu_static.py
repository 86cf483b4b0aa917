"""Registers, shared memory, instructions and bounds of the GPU kernels, as compiled for GPUs that are not attached.

    python -m benchmarks.gpu_static

Needs Python 3.12, ``pip install 'torq-jax[gpu-compile]'`` and a CUDA toolkit, no GPU. Nothing is measured: times are
what the bytes, multiply-adds and instructions need at least at the published rates, not what a kernel takes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu_compiler import Call, bounds, compile_call, missing, rotation_shapes
from benchmarks.machine import describe
from convert.progress import progress

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
ROWS = (16, 1024)
OPERATIONS = (
    ("hopper", "h100"),
    ("hopper_e4m3", "h100"),
    ("blackwell", "b200"),
    ("rotate", "h100"),
    ("rotate", "b200"),
    ("portable", "a100"),
    ("portable", "rtx6000"),
)
_TENSOR = ("HGMMA", "QGMMA", "UTCOMMA", "HMMA", "QMMA", "OMMA")


def call_of(operation: str, target: str, m: int, k: int, n: int) -> Call:
    """A row of the table. The portable product is that of rounded activations, without the rotation's kernel."""
    return Call(operation, target, m, k, n, *(rotation_shapes(k) if operation == "rotate" else (None, None)))


def toolkit() -> str:
    """Version of ptxas."""
    said = subprocess.run(["ptxas", "--version"], capture_output=True, text=True).stdout
    return next((part for part in said.split() if part.startswith("V")), "unknown")


def print_table(result: dict[str, Any]) -> None:
    """What was compiled; bounds of products in microseconds, the largest one last."""
    head = ("kernel", "GPU", "rows", "K", "N", "registers", "spills", "shared KiB", "inner loop")
    table = Table(*head, "memory µs", "tensor µs", "issue µs", "bound", title="compiled, not run")
    for key, found in result["calls"].items():
        operation, target, *numbers = key.split()
        if "error" in found:
            table.add_row(operation, target, *numbers, found["error"][:60])
            continue
        loop = found["loop"] or {}
        tensor = sum(count for name, count in loop.items() if name in _TENSOR)
        cells = [
            str(found["registers"]),
            str(found["spill_stores"] + found["spill_loads"]),
            "–" if found["shared"] is None else f"{found['shared'] / 1024:.0f}",
            f"{sum(loop.values())}, {tensor} tensor" if loop else "–",
        ]
        times = {name: found["bounds"].get(f"{name}_us") for name in ("memory", "tensor", "issue")}
        cells += ["–" if time is None else f"{time:.2f}" for time in times.values()]
        known = {name: time for name, time in times.items() if time is not None}
        cells.append(max(known, key=known.__getitem__) if known else "–")
        table.add_row(operation, target, *numbers, *cells)
    Console(width=170).print(table)


def main() -> int:
    """Compile what the JSON lacks, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu_static.json")
    parser.add_argument("--anew", action="store_true", help="compile again what the JSON has")
    options = parser.parse_args()
    calls = {
        f"{operation} {target} {m} {k} {n}": call_of(operation, target, m, k, n)
        for operation, target in OPERATIONS
        for m in ROWS
        for k, n in SHAPES
        if operation != "rotate" or n == 4096  # whose kernel knows no N
    }
    result: dict[str, Any] = {"calls": {}}
    if options.json.exists() and not options.anew:
        result = json.loads(options.json.read_text())
    had = result["calls"]
    lacking = {k: c for k, c in calls.items() if "error" in had.get(k, {"error": "not compiled yet"})}
    reason = missing()
    if lacking and reason is not None:
        raise SystemExit(reason)
    with progress(len(lacking), "compiling", unit="call") as shown:
        for key, call in lacking.items():
            found = compile_call(call)
            had[key] = found
            result |= {"machine": describe(), "ptxas": toolkit()}
            options.json.write_text(json.dumps(result, indent=0) + "\n")
            shown.advance()
    result["calls"] = {key: had[key] for key in calls}
    for key, call in calls.items():
        if "error" not in had[key]:
            had[key]["bounds"] = bounds(call, had[key])
    options.json.write_text(json.dumps(result, indent=0) + "\n")
    print_table(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
