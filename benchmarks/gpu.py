"""The GPU kernels on the GPU at hand: codes and products against the reference first, then times beside XLA's
bfloat16 product.

    python -m benchmarks.gpu                  # on a GPU: under eight minutes
    python -m benchmarks.gpu --interpret      # on any machine: the first part alone, on small shapes

A kernel that gives a wrong result is not timed. A time is the median over runs of one compiled function that calls
the kernel on many weights in turn, together more than the L2 cache holds, divided by their number; so neither the
host's launches nor a cached weight make it look better or worse than in a model of many layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from pallas_kernels import hopper, portable, reference
from torq_jax import gpu, mxfp4

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
ROWS = (1, 16, 64, 256, 1024, 2048)
BUDGET = 390
"""Seconds after which no other time is begun."""

CACHE = 256 << 20
"""Bytes of weights that are read in turn: several times the L2 cache."""

# m, k, n, inter, intra, rule, dtype
CASES: tuple[tuple[Any, ...], ...] = (
    (1, 512, 256, None, None, "even", "bfloat16"),
    (5, 1024, 200, (32, 2, 16, 16), (32, 32, 32), "even", "bfloat16"),
    (16, 4096, 512, (32, 8, 16, 16), (128, 32, 32), "even", "bfloat16"),
    (33, 576, 128, (32, 9, 2, 2), (18, 32, 32), "ceil", "bfloat16"),
    (200, 1024, 384, (32, 32), (32, 32), "floor", "bfloat16"),
    (64, 2048, 256, (32, 64, 64), (64, 32, 32), "even", "float32"),
    (17, 512, 256, None, (16, 32, 32), None, "bfloat16"),
    (300, 14336, 1024, None, None, None, "bfloat16"),
)
SMALL = (0, 1, 3, 6)
"""Of them, those that interpretation runs."""


def available(capability: tuple[int, int] | None) -> list[str]:
    """Implementations for a compute capability, the one made for it first; all of them, to interpret, for None."""
    if capability is None:
        new = jax.__version_info__[:2] >= hopper.LEAST_JAX
        return ["portable", *(gpu.CAPABILITY if new else [])]
    return [*(kind for kind, needed in gpu.CAPABILITY.items() if needed == capability), "portable"]


def exact_case(m: int, k: int, n: int, inter: Any, intra: Any, dtype: str) -> tuple[Any, ...]:
    """Integers and matrices of few quarters: float32 sums are exact in any order, so codes are equal bit by bit."""
    rng = np.random.default_rng(m * k + n)

    def matrix(shape: tuple[int, ...] | None) -> Any:
        if shape is None:
            return None
        few = rng.random(shape) < min(1, 4 / shape[-1])
        return jnp.asarray(rng.integers(-2, 3, shape) / 4 * few, jnp.float32)

    x = jnp.asarray(rng.integers(-40, 41, (m, k)), dtype)
    w = rng.standard_normal((n, k)) * np.exp(rng.standard_normal((n, 1)))
    return x, matrix(inter), matrix(intra), mxfp4.quantize(jnp.asarray(w, jnp.float32), "even")


def interpreter(name: str) -> Any:
    """What the kernels of an implementation take to be interpreted."""
    return True if name == "portable" else hopper.require().InterpretGPUParams()


def pack(name: str, w: mxfp4.MXFP4Array) -> Any:
    """A weight as an implementation reads it."""
    return gpu.LAYOUTS[name](w.codes, w.scales)


def product(
    name: str, x: Any, inter: Any, intra: Any, weight: Any, rule: Any, interpret: bool = False
) -> Any:
    """``round(rotate(x)) @ weight.T`` by an implementation, N as padded."""
    if name == "portable":
        return portable.rotate_quantize_matmul(x, inter, intra, *weight, rule=rule, interpret=interpret)
    options = {"cores": 2, "interpret": interpreter(name)} if interpret else {"cores": gpu.cores(name)}
    return gpu.product_of(name)(x, inter, intra, weight, rule=rule, **options)


def check(name: str, case: tuple[Any, ...], interpret: bool) -> dict[str, Any]:
    """Codes and product of a case against the reference: what differs, and whether it may."""
    m, k, n, inter_shape, intra_shape, rule, dtype = case
    reason = gpu.unfit(name, rule, dtype)
    if reason is not None:
        return {"skipped": reason}
    x, inter, intra, w = exact_case(m, k, n, inter_shape, intra_shape, dtype)
    z = reference.rotate(x, inter, intra)
    result: dict[str, Any] = {}
    rounded = z.astype(dtype)
    if rule is not None:
        rounded = mxfp4.quantize_dequantize(z, rule)
        want = mxfp4.quantize(z, rule)
        codes, scales = portable.rotate_quantize(x, inter, intra, rule=rule, interpret=interpret)
        result["codes_wrong"] = int((codes != want.codes).sum()) + int((scales != want.scales).sum())
    expected = reference.multiply(rounded, mxfp4.dequantize(w))
    size = reference.multiply(jnp.abs(rounded), jnp.abs(mxfp4.dequantize(w)))
    y = product(name, x, inter, intra, pack(name, w), rule, interpret)[:, :n].astype(jnp.float32)
    # Products are exact; k sums in float32, in another order, and one rounding of the result.
    error = (k + 1) * 2.0**-24 + gpu.INEXACT.get(name, 0)
    bound = error * size + jnp.finfo(dtype).eps / 2 * jnp.abs(expected)
    wrong = ~(jnp.abs(y - expected) <= bound * (1 + 2**-6))
    result["products_wrong"] = int(wrong.sum())
    result["relative_error"] = float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))
    result["right"] = result["products_wrong"] == 0 and result.get("codes_wrong", 0) == 0
    return result


def check_all(names: list[str], interpret: bool) -> list[dict[str, Any]]:
    """Every implementation on every case; an error of the compiler or the device is a result, too."""
    rows = []
    for name in names:
        for i, case in enumerate(CASES):
            if interpret and i not in SMALL:
                continue
            try:
                found = check(name, case, interpret)
            except Exception as error:
                found = {"right": False, "error": " ".join(str(error).split())[:300]}
            rows.append({"implementation": name, "case": list(case), **found})
            state = "skipped" if "skipped" in found else "right" if found["right"] else "WRONG"
            print(f"{state:8} {name:10} {case} {found}", flush=True)
    return rows


# ---------------------------------------------------------------- times


def timed(
    call: Callable[..., Any], weights: list[Any], *shared: Any, seconds: float = 0.5
) -> dict[str, float]:
    """Microseconds a call: median, least and greatest over runs of all weights in turn."""
    run = jax.jit(lambda weights, *shared: [call(weight, *shared) for weight in weights])
    for _ in range(3):
        jax.block_until_ready(run(weights, *shared))
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 15 or (time.perf_counter() < end and len(times) < 500):
        begun = time.perf_counter()
        jax.block_until_ready(run(weights, *shared))
        times.append((time.perf_counter() - begun) / len(weights) * 1e6)
    return {"us": statistics.median(times), "least_us": min(times), "greatest_us": max(times)}


def copies(k: int, n: int, m: int, bits: float) -> int:
    """Weights that are read in turn: more than the cache holds, and results that fit into 4 GiB."""
    return max(2, min(16, int(CACHE / (k * n * bits / 8)), (4 << 30) // (m * n * 2)))


def time_shape(name: str, m: int, k: int, n: int, seconds: float) -> dict[str, Any]:
    """Times of one shape on random data: XLA's bfloat16 product, and the implementation's calls."""
    keys = iter(jax.random.split(jax.random.key(0), 100))
    x = jax.random.normal(next(keys), (m, k), jnp.bfloat16)
    blocks = k // 32
    inter = jax.random.normal(next(keys), (32, blocks // 16, 16, 16)) / 4
    intra = jax.random.normal(next(keys), (blocks, 32, 32)) / 32**0.5
    wide = [jax.random.normal(next(keys), (n, k), jnp.bfloat16) for _ in range(copies(k, n, m, 16))]
    result: dict[str, Any] = {"implementation": name, "m": m, "k": k, "n": n}
    result["xla_bf16"] = timed(
        lambda w, x: jnp.einsum("mk,nk->mn", x, w, preferred_element_type=jnp.float32).astype(x.dtype),
        wide,
        x,
        seconds=seconds,
    )
    del wide
    packed = []
    for _ in range(copies(k, n, m, 4.25)):
        w = jax.random.normal(next(keys), (n, k), jnp.float32) / k**0.5
        packed.append(pack(name, mxfp4.quantize(w, "even")))
    calls: dict[str, Callable[..., Any]] = {
        "w4a4": lambda w, x, a, b: product(name, x, None, None, w, "even"),
        "w4a4_rotated": lambda w, x, a, b: product(name, x, a, b, w, "even"),
    }
    if gpu.unfit(name, None, x.dtype) is None:
        calls["w4a16"] = lambda w, x, a, b: product(name, x, None, None, w, None)
    for title, call in calls.items():
        try:
            result[title] = timed(call, packed, x, inter, intra, seconds=seconds)
        except Exception as error:
            result[title] = {"error": " ".join(str(error).split())[:300]}
    result["rotate"] = timed(
        lambda x, a, b: portable.rotate_quantize(x, a, b, rule="even"), [x] * 8, inter, intra, seconds=seconds
    )
    weight_bytes = k * n * 4.25 / 8
    for title in calls:
        if "us" in result[title]:
            result[title]["weight_gb_per_s"] = weight_bytes / result[title]["us"] / 1e3
            result[title]["tflops"] = 2 * m * k * n / result[title]["us"] / 1e6
            result[title]["times_faster"] = result["xla_bf16"]["us"] / result[title]["us"]
    return result


def copy_bandwidth(seconds: float) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes: what "of the copy bandwidth" refers to."""
    big = jnp.zeros((1 << 28,), jnp.float32)
    return 2 * big.nbytes / timed(lambda a: a + 1, [big], seconds=seconds)["us"] * 1e6


def print_table(rows: list[dict[str, Any]], device: str, bandwidth: float) -> None:
    """Times; the weights' bytes over the copy bandwidth, and XLA's time over the kernel's."""
    head = (
        "kernel",
        "rows",
        "K",
        "N",
        "",
        "µs",
        "of the copy bandwidth",
        "Tflop/s",
        "XLA bfloat16 µs",
        "times faster",
    )
    table = Table(*head, title=f"{device}, copies {bandwidth / 1e9:.0f} GB/s")
    for r in rows:
        for title in ("w4a16", "w4a4", "w4a4_rotated"):
            found = r.get(title)
            place = (r["implementation"], *(str(r[key]) for key in "mkn"), title)
            if found is None:
                continue
            if "error" in found:
                table.add_row(*place, found["error"][:40])
                continue
            table.add_row(
                *place,
                f"{found['us']:.1f}",
                f"{found['weight_gb_per_s'] * 1e9 / bandwidth:.0%}",
                f"{found['tflops']:.0f}",
                f"{r['xla_bf16']['us']:.1f}",
                f"{found['times_faster']:.2f}",
            )
    Console(width=150).print(table)


def main() -> int:
    """Check, then time what is right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--interpret", action="store_true", help="check small shapes on a CPU, time nothing")
    parser.add_argument("--only", nargs="+", choices=gpu.KINDS)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds after which no time is begun")
    parser.add_argument(
        "--json", type=Path, help="default: benchmarks/results/gpu-DEVICE.json, none to interpret"
    )
    options = parser.parse_args()
    begun = time.monotonic()
    device = jax.devices()[0]
    if not options.interpret and device.platform != "gpu":
        raise SystemExit(
            f"no GPU: the backend is {device.platform}; --interpret checks small shapes without one"
        )
    capability = None
    if not options.interpret:
        major, minor = str(device.compute_capability).split(".")
        capability = (int(major), int(minor))
    names = [name for name in available(capability) if options.only is None or name in options.only]
    if not names:
        raise SystemExit(f"{options.only} cannot run here: {', '.join(available(capability))} can")
    result: dict[str, Any] = {"device": device.device_kind, "machine": describe()}
    result["checks"] = check_all(names, options.interpret)
    wrong = {r["implementation"] for r in result["checks"] if not r.get("right", True)}

    path = options.json
    if path is None and not options.interpret:
        path = Path(__file__).parent / "results" / f"gpu-{device.device_kind.lower().replace(' ', '-')}.json"

    def keep() -> None:
        if path is not None:
            path.write_text(json.dumps(result, indent=0) + "\n")

    keep()
    if not options.interpret:
        result["copy_bandwidth"] = copy_bandwidth(0.5)
        result["times"], result["left_out"] = [], []
        # The kernel made for this GPU on every shape first, then the portable one.
        for name, m, (k, n) in ((name, m, shape) for name in names for m in options.rows for shape in SHAPES):
            place = f"{name} {m} {k} {n}"
            if name in wrong or time.monotonic() - begun > options.budget:
                why = "wrong results" if name in wrong else f"{options.budget:.0f} s are over"
                result["left_out"].append(f"{place}: {why}")
                continue
            print(f"{time.monotonic() - begun:5.0f} s  {place}", flush=True)
            try:
                result["times"].append(time_shape(name, m, k, n, 0.4))
            except Exception as error:
                result["left_out"].append(f"{place}: {' '.join(str(error).split())[:300]}")
            keep()
        print_table(result["times"], device.device_kind, result["copy_bandwidth"])
        for line in result["left_out"]:
            print("left out:", line)
        keep()
    print(f"wrong: {', '.join(sorted(wrong))}" if wrong else "every result is right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
